"""The table of families: what it counts, and that the page and the command say what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from family_page import markdown

import lvlm_probe as probe
from lvlm_probe.models.support import CHECKS, FamilyTable, family_table

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def _run(install: str, passed: bool | None, figure: float | None = None, note: str = "") -> dict:
    entry = {"passed": passed, "figure": figure, "note": note}
    return {"install": install, "larger": False, "checks": dict.fromkeys(CHECKS, entry)}


TABLE = FamilyTable.from_json(
    {
        "date": "2026-01-01",
        "versions": {"transformers": "5"},
        "families": {
            "good": {"class": "A", "kind": "A", "runs": [_run("default", True, 1e-6), _run("torchvision", True, 3e-6)]},
            "half": {
                "class": "B",
                "kind": "B",
                "runs": [_run("default", True), _run("torchvision", False, 0.5, "too far")],
            },
            "none": {"class": "C", "kind": "C", "runs": [_run("default", None, None, "no attention map")]},
            "tied": {
                "class": "E",
                "kind": "A",
                "runs": [
                    {"install": "default", "larger": False, "lacks": ["torchvision"], "checks": {}},
                    _run("torchvision", True),
                ],
            },
            "text": {"class": "D", "outside": "it takes no picture"},
        },
    }
)


def test_a_family_passes_a_check_when_all_its_runs_do() -> None:
    assert TABLE["good"].verdict("replay") is True and TABLE["good"].passed
    assert TABLE["half"].verdict("replay") is False and not TABLE["half"].passed
    assert TABLE["half"].verdict("replay", "default") is True
    assert TABLE["none"].verdict("attention") is None and TABLE["none"].passed
    assert TABLE["good"].worst("replay") == 3e-6
    assert TABLE["half"].reasons("replay") == ("too far",)


def test_counts_leave_out_what_does_not_apply_and_who_is_not_counted() -> None:
    assert [family.name for family in TABLE.lvlms] == ["good", "half", "none", "tied"]
    assert TABLE.count("replay") == (2, 3)
    assert TABLE.count("replay", "default") == (2, 2)


def test_a_family_that_lacks_a_library_does_not_pass_in_that_installation() -> None:
    tied = TABLE["tied"]
    assert tied.passed and tied.lacks("default") == ("torchvision",) and tied.lacks("torchvision") == ()
    assert (tied.passes("default"), tied.passes("torchvision")) == (False, True)
    assert not TABLE["none"].passes("torchvision")  # it was not tried there
    assert (TABLE.passing("default"), TABLE.passing("torchvision")) == (3, 2)


def test_the_page_says_what_failed_and_why() -> None:
    text = markdown(TABLE)
    assert "**3 of 4** families" in text
    assert "| half | resize to a square | yes | **no** | **no** |" in text
    assert "| tied | resize and centre crop | needs torchvision | yes | yes |" in text
    assert "- **half**, replay: too far" in text
    assert "| text | D | it takes no picture |" in text


@pytest.mark.quick
def test_an_unknown_family_is_an_error_that_says_that_it_may_work() -> None:
    with pytest.raises(probe.ProbeError, match="can be attached all the same"):
        TABLE["unheard of"]


def test_the_page_is_the_shipped_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(family_table())
