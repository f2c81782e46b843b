"""The package's tree for docs/architecture.md, made from the code: its docstrings, in the order of its floors.

python scripts/tree.py            # print it
python scripts/tree.py --write    # put it into docs/architecture.md
"""

from __future__ import annotations

import argparse
import ast
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
WIDTH = 120
BLOCK = re.compile(r"(?<=```text\n)dawhisper/.*?(?=^```)", re.MULTILINE | re.DOTALL)


def tree() -> str:
    """The package from the top floor down, as import-linter's contract in pyproject.toml has them."""
    contract = (ROOT / "pyproject.toml").read_text("utf-8").split("\nlayers = [")[1].split("]")[0]
    lines = ["dawhisper/"]
    for name in re.findall(r"\w+", contract):
        place = ROOT / "dawhisper" / name
        lines += wing(place) if place.is_dir() else [f"  {name + '.py':20}{summary(place.with_suffix('.py'))}"]
    return "\n".join(lines) + "\n"


def wing(folder: Path) -> list[str]:
    """A folder, what it is for, and the names of its files."""
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    indent = " " * 22
    head = f"  {folder.name + '/':20}{summary(folder / '__init__.py')}"
    return [head, *textwrap.wrap(" ".join(names), WIDTH, initial_indent=indent, subsequent_indent=indent)]


def summary(file: Path) -> str:
    """The first line of a file's docstring, where it fits, else what of it comes before a colon, semicolon or comma."""
    first = (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").splitlines()[0].rstrip(".")
    while len(first) > WIDTH - 22:
        first = re.split(r"[:;,.] (?!.*[:;,.] )", first)[0] if re.search(r"[:;,.] ", first) else first[: WIDTH - 22]
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put it into docs/architecture.md")
    if not parser.parse_args().write:
        print(tree(), end="")
        return
    PAGE.write_text(BLOCK.sub(lambda _: tree(), PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
