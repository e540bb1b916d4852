"""The package in figures: rooms, import arrows between them, upward ones, circles, lines, long functions.

Run it where import-linter is installed:  python .ci/rooms.py
"""

from __future__ import annotations

import ast
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
PACKAGE = "lvlm_probe"


def layers() -> dict[str, int]:
    """Room → its layer of the import contract, 0 at the top."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    (found,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    return {room: number for number, layer in enumerate(found) for room in layer.split(" | ")}


def circles(arrows: set[tuple[str, str]]) -> int:
    """How many arrows have to go until none of them leads back to where it came from."""
    count, left = 0, set(arrows)
    while True:
        sorter: TopologicalSorter[str] = TopologicalSorter()
        for importer, imported in left:
            sorter.add(importer, imported)
        try:
            sorter.prepare()
        except CycleError as error:
            round_ = error.args[1]
            left.discard((round_[1], round_[0]))
            count += 1
        else:
            return count


def main() -> None:
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    pairs = {(one, other) for one in graph.modules for other in graph.find_modules_directly_imported_by(one)}
    rooms = {
        (one.split(".")[1], other.split(".")[1])
        for one, other in pairs
        if "." in one and "." in other and one.split(".")[1] != other.split(".")[1]
    }
    floor = layers()
    upward = [(one, other) for one, other in rooms if floor[one] >= floor[other]]
    inside = {(one, other) for one, other in pairs if "." in one and "." in other}
    files = [*(ROOT / PACKAGE).rglob("*.py")]
    texts = [path.read_text(encoding="utf-8") for path in files]
    functions = [
        node.end_lineno - node.lineno + 1
        for text in texts
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    ]
    lines = sum(text.count("\n") for text in texts)
    long = [sum(length > most for length in functions) for most in (60, 80)]
    print(
        f"{len(floor)} rooms and single modules on {max(floor.values()) + 1} floors, {len(rooms)} arrows between them,"
    )
    print(f"{len(upward)} upward, {circles(inside)} circles among {len(files)} modules.")
    print(f"{lines:,} lines with comments and docstrings; {len(functions):,} functions,")
    print(f"{long[0]} of them of over 60 lines, {long[1]} of over 80.")


if __name__ == "__main__":
    main()
