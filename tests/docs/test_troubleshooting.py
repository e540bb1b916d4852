"""docs/troubleshooting.md and docs/trust.md quote errors and verdicts: each still occurs in the package."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GAP = "…"
"""What stands for a name or a number, in a quotation and in the texts of the package."""


@cache
def texts() -> tuple[str, ...]:
    """All texts of the package but docstrings, with a gap for each value that is filled in."""
    found = []
    for path in sorted((ROOT / "lvlm_probe").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if node in docstrings:
                continue
            if isinstance(node, ast.JoinedStr):
                found.append("".join(GAP if not isinstance(part, ast.Constant) else part.value for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def occurs(quotation: str) -> bool:
    """Whether some text has the quoted parts, in their order."""
    parts = [re.escape(part.strip()) for part in quotation.split(GAP) if part.strip()]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    return any(pattern.search(text) for text in texts())


def quoted() -> list[str]:
    errors = re.findall(r"^### `(.+)`$", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    section = (ROOT / "docs/trust.md").read_text(encoding="utf-8").partition("## The verdict")[2].partition("\n## ")[0]
    return [*errors, *re.findall(r"^\| `(.+?)`(?: …)? \|", section, re.MULTILINE)]


def test_there_is_something_to_check() -> None:
    assert len(quoted()) > 35


@pytest.mark.parametrize("quotation", quoted())
def test_a_quoted_text_is_one_of_the_package(quotation: str) -> None:
    assert occurs(quotation), "the package does not say this any more: quote what it says now"


def test_a_text_that_is_not_there_is_found_out() -> None:
    assert not occurs("the moon is … cheese")
    assert not occurs("exists … add --overwrite … lunar")
