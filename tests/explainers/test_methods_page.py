"""docs/methods.md says of every method what it needs: the table is compared with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lvlm_probe.explainers import needs_of, registry

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
COLUMNS = ("passes", "gradients", "attention", "activations")


def rows() -> dict[str, tuple[list[str], str]]:
    """Method → its cells "yes" or "", and what the last column says."""
    found: dict[str, tuple[list[str], str]] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 7:
            for name in re.findall(r"`([^`]+)`", cells[0]):
                found[name] = (cells[2:6], cells[6])
    return found


@pytest.mark.quick
def test_the_page_lists_exactly_the_methods_of_the_package() -> None:
    built_in = {name for name in registry.names() if registry.find(name).__module__.startswith("lvlm_probe.explainers")}
    assert set(rows()) == built_in


def test_the_page_says_what_each_method_needs() -> None:
    for name, (cells, alone) in rows().items():
        assert {column for column, cell in zip(COLUMNS, cells, strict=True) if cell == "yes"} == set(needs_of(name)), (
            name
        )
        assert bool(alone) == (not {"passes", "gradients"} & needs_of(name)), name
