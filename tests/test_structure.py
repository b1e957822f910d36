"""The house: who imports whom, and that documents say what is there."""

import ast
import re
import subprocess
import sys

import pytest

from common.experiments.files import ROOT

SUBPROJECTS = [path.parent.name for path in ROOT.glob("*/rows.py")]


def imports(path):
    """The names of what a file imports, relative imports as they are written."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def test_the_library_imports_itself_by_relative_names_and_no_subproject():
    """So it can be installed under a name of its own."""
    for path in (ROOT / "common").rglob("*.py"):
        depth = len(path.relative_to(ROOT).parts) - 1
        for name in imports(path):
            assert name.partition(".")[0] not in {"common", "fnl", "benchmarks", *SUBPROJECTS}, f"{path} imports {name}"
            assert len(name) - len(name.lstrip(".")) <= depth, f"{path} imports {name} from outside of the library"


@pytest.mark.parametrize("house", SUBPROJECTS)
def test_subprojects_import_only_common_and_themselves_by_absolute_names(house):
    for path in (ROOT / house).rglob("*.py"):
        for name in imports(path):
            top = name.partition(".")[0]
            assert top, f"{path} imports {name}: imports of a subproject are absolute"
            assert top not in {"fnl", "benchmarks", *SUBPROJECTS} - {house}, f"{path} imports {name}"


def test_importing_common_and_its_core_loads_torch_and_nothing_heavier():
    code = """
import sys, common
common.factorize_, common.FrobeniusDecay
heavy = {"torchvision", "sklearn", "matplotlib", "pandas", "scipy", "tensorboard", "PIL"} & set(sys.modules)
sys.exit(", ".join(heavy) or 0)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_name_of_the_core_is_exported():
    import common

    for name in common.__all__:
        assert getattr(common, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = common.nothing


def test_links_of_the_documents_lead_somewhere():
    documents = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert "README.md" in documents
    for document in documents:
        for target in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / document).read_text()):
            assert ((ROOT / document).parent / target).exists(), f"{document} links to {target}"
