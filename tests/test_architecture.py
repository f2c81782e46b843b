"""Imports always run down, the model's own file needs torch alone, and docs/architecture.md shows the tree there is."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).resolve().parent.parent


def test_imports_keep_the_contracts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_the_models_file_needs_torch_alone() -> None:
    tree = ast.parse((ROOT / "dawhisper" / "model.py").read_text("utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {"." * node.level + (node.module or "") for node in imports if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"torch"}


def test_the_documented_tree_is_the_codes() -> None:
    tree = runpy.run_path(str(ROOT / "scripts" / "tree.py"))["tree"]()
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    assert f"```text\n{tree}```" in page, "python scripts/tree.py --write"


def test_documented_names_exist() -> None:
    """Files and folders that the page names; `module.function` pairs of its walks."""
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8").split("## From an audio file")[1]
    for file in re.findall(r"`(dawhisper/[\w/]+\.py)`", page):
        assert (ROOT / file).is_file(), file
    for module, name in re.findall(r"`((?:\w+\.)+)(\w+)`", page):
        file = ROOT / "train.py" if module == "train." else ROOT / "dawhisper" / f"{module[:-1].replace('.', '/')}.py"
        if file.is_file():
            code = file.read_text("utf-8")
            assert re.search(rf"\b(?:def|class) {name}\b|^{name}\b", code, re.MULTILINE), f"{module}{name}"
