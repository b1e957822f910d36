"""The house: who imports whom, and that documents say what is there."""

import ast
import re
import subprocess
import sys

import pytest

from common.runs import ROOT

SUBPROJECTS = [path.parent.name for path in ROOT.glob("*/rows.py")]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module


@pytest.mark.parametrize("house", ["common", *SUBPROJECTS])
def test_subprojects_import_only_common_and_themselves(house):
    for path in (ROOT / house).rglob("*.py"):
        for name in imports(path):
            top = name.partition(".")[0]
            assert top not in SUBPROJECTS or top == house, f"{path} imports {name}"


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
