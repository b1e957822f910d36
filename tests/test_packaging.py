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


def test_a_clone_runs_its_own_code_whatever_is_installed(tmp_path):
    other = copy_clone(tmp_path / "other", "common", "resnet_cifar")
    with (other / "common" / "__init__.py").open("a") as file:
        file.write("print('the other clone', file=sys.stderr)\n")
    program = ["resnet_cifar/train.py", *"--arch resnet20 --rank-scale 0.1 --dry-run --save-dir results".split()]
    for clone, expected in ((other, True), (ROOT, False)):
        found = run(clone / program[0], *program[1:], path=[ROOT if clone == other else other], cwd=tmp_path)
        assert found.returncode == 0, found.stderr
        assert ("the other clone" in found.stderr) == expected
