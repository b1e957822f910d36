"""What is installed, under which name, and that each clone's programs run its own code."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata

import pytest
from packaging.version import Version

from common.experiments.files import ROOT


def copy_clone(target, *folders):
    """Copy the files of this clone, tracked or new but not ignored; with folders, of these alone."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


def run(*arguments, path=(), **options):
    """Run Python with these folders first on its path, behind only the folder of the program."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The folder of an installed wheel of this clone."""
    if Version(metadata.version("setuptools")) < Version("77"):
        pytest.skip("building a wheel without a network needs setuptools 77 or later")
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_clone(folder / "source", "common", "resnet_cifar", "pyproject.toml", "README.md", "LICENSE")
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    built = run("-c", code, cwd=source)
    assert built.returncode == 0, built.stderr
    (archive,) = folder.glob("*.whl")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_the_library_alone(wheel):
    (information,) = wheel.glob("*.dist-info")
    assert {path.name for path in wheel.iterdir()} == {"fnl", information.name}
    packed = {path.relative_to(wheel / "fnl") for path in (wheel / "fnl").rglob("*.py")}
    library = {path.relative_to(ROOT / "common") for path in (ROOT / "common").rglob("*.py")}
    assert packed == {path for path in library if path.parts[0] != "tables"}  # of no use without the rows of a clone


def test_the_lines_of_the_readme_work_beside_a_package_called_common(wheel, tmp_path):
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").write_text("whose = 'mine'\n")
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = f"""
import common, fnl, torch
import fnl.experiments.config, fnl.tables.rows, fnl.vision.training
assert common.whose == "mine" and "site" in fnl.__file__
model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
{lines}
model(torch.ones(2, 8)).sum().backward()
decay.step()
optimizer.step()
print([(type(layer).__module__, layer.rank) for layer in model])
"""
    for order in (code, code.replace("import common, fnl", "import fnl, common")):
        found = run("-c", order, path=[wheel], cwd=tmp_path)
        assert (found.returncode, found.stdout) == (0, "[('fnl.layers', 2), ('fnl.layers', 1)]\n"), found.stderr


@pytest.mark.parametrize(("first", "second"), [("common", "fnl"), ("fnl", "common")])
def test_one_process_uses_the_library_under_one_name(wheel, tmp_path, first, second):
    files = {"common": ROOT / "common" / "__init__.py", "fnl": wheel / "fnl" / "__init__.py"}
    found = run("-c", f"import {first}, {second}", path=[ROOT, wheel], cwd=tmp_path)
    error = found.stderr.splitlines()[-1]
    assert found.returncode == 1
    assert error.startswith("ImportError: ")
    assert f"as {first!r} from {files[first]}" in error
    assert f"as {second!r} from {files[second]}" in error
    assert "import it under one name" in error


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another clone, whose library says so where it is imported."""
    clone = copy_clone(tmp_path_factory.mktemp("clone") / "other")
    with (clone / "common" / "__init__.py").open("a") as file:
        file.write("print('the other clone', file=sys.stderr)\n")
    return clone


def programs_of(clone):
    """The programs of a clone: files that are run by their path."""
    files = [path for path in clone.glob("*/*.py") if path.parent.name not in ("tests", "benchmarks")]
    return sorted(path for path in files if "__main__" in path.read_text())


def test_every_program_imports_the_library_beside_it(other, wheel, tmp_path):
    """From the folder of another clone, with that one, a wheel and a package of the user's own called common on the path."""
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").write_text("raise SystemExit('the package of the user')")
    found = programs_of(other)
    assert len(found) == len(programs_of(ROOT)) >= 10
    for program in found:
        done = run(program, "--help", path=[tmp_path, ROOT, wheel], cwd=ROOT)
        assert (done.returncode, done.stderr) == (0, "the other clone\n"), program
        assert done.stdout.startswith("usage: "), program
    done = run(ROOT / "resnet_cifar" / "train.py", "--help", path=[tmp_path, other, wheel], cwd=other)
    assert (done.returncode, done.stderr) == (0, "")


def test_tables_are_of_the_clone_that_they_are_in(other, tmp_path):
    """Also from elsewhere, where folders have the names of programs; under the name fnl they say how they are called."""
    (tmp_path / "resnet_cifar").mkdir()
    (tmp_path / "resnet_cifar" / "rows.py").write_text("raise SystemExit('the wrong folder')")
    words = ["-m", "common.tables", "list", "--table", "quickstart"]
    done = run(*words, path=[other], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "the other clone\n")
    assert len(done.stdout.splitlines()) == 7
    done = run(*words, path=[other], cwd=ROOT)  # the clone that one stands in comes first
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "fnl").symlink_to(other / "common")  # as pip install -e makes it
    done = run("-m", "fnl.tables", "list", cwd=tmp_path)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 2
    assert error.endswith(f"where this package is called common: run python -m common.tables in {other}")


def test_a_clone_runs_its_own_code_whatever_is_installed(other, tmp_path):
    program = ["resnet_cifar/train.py", *"--arch resnet20 --rank-scale 0.1 --dry-run --save-dir results".split()]
    for clone, expected in ((other, True), (ROOT, False)):
        found = run(clone / program[0], *program[1:], path=[ROOT if clone == other else other], cwd=tmp_path)
        assert found.returncode == 0, found.stderr
        assert ("the other clone" in found.stderr) == expected


FAKE = """#!/bin/sh
case "$1" in
    -V) echo "Python {version}" ;;
    -m) echo "{version}: $*" >>log; if [ "$2" = venv ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; fi ;;
esac
"""


def test_setup_makes_the_environment_again_for_another_python(tmp_path):
    for name in ("setup.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for version in ("3.12.1", "3.13.0"):
        (tmp_path / version).write_text(FAKE.format(version=version))
        (tmp_path / version).chmod(0o755)

    def install(python):
        (tmp_path / "log").write_text("")
        environment = {**os.environ, "PYTHON": python and str(tmp_path / python)}
        subprocess.run(["bash", "setup.sh"], cwd=tmp_path, env=environment, check=True, capture_output=True)
        return [line for line in (tmp_path / "log").read_text().splitlines() if "common.tables" not in line]

    pip = "-m pip install --quiet --disable-pip-version-check -c constraints.txt -e .[dev,translation,pretraining]"
    assert install("3.13.0") == ["3.13.0: -m venv .venv", f"3.13.0: {pip}"]
    assert install("3.13.0") == install("") == []
    assert install("3.12.1") == ["3.12.1: -m venv --clear .venv", f"3.12.1: {pip}"]
    assert install("") == []


@pytest.mark.parametrize(
    "words", ["quickstart --translate", "test --gup", "scripts --foo", "install x", "quickstart --pretraining x"]
)
def test_setup_refuses_words_that_it_does_not_know(words, tmp_path):
    shutil.copy(ROOT / "setup.sh", tmp_path)
    done = subprocess.run(["bash", "setup.sh", *words.split()], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"setup.sh: error: unknown word '{words.split()[-1]}': the first lines of setup.sh show its usage\n"
