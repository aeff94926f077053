"""The house as it stands: rooms, their longest files, and the longest functions; ``make check`` prints it.

python -m tests.house
"""

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
ROOMS = ("core", "datamodules", "lightning_modules", "callbacks", "commands", "demo")


class Function(NamedTuple):
    """A function, and its lines without its docstring."""

    lines: int
    name: str
    file: str


def functions(file: Path) -> Iterator[Function]:
    """The functions of a file, methods included."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node, clean=False)
            told = docstring.count("\n") + 1 if docstring else 0
            lines = (node.end_lineno or node.lineno) - node.lineno + 1 - told
            yield Function(lines, node.name, str(file.relative_to(ROOT)))


def main() -> None:
    """Print the floors from the bottom up, then what is longest."""
    files = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]
    lengths = {file: len(file.read_text("utf-8").splitlines()) for file in files}
    floors = dict.fromkeys(file.parent for file in files)
    for floor in floors:
        here = {file: length for file, length in lengths.items() if file.parent == floor}
        longest = max(here, key=lambda file: here[file])
        name = str(floor.relative_to(ROOT))
        print(f"{name:30} {len(here):3} files {sum(here.values()):5} lines  longest {longest.name} {here[longest]}")
    found = sorted((function for file in files for function in functions(file)), reverse=True)
    print(f"{len(found)} functions, median {statistics.median(f.lines for f in found):g} lines; the longest:")
    for function in found[:5]:
        print(f"  {function.lines:3} {function.name} ({function.file})")


if __name__ == "__main__":
    main()
