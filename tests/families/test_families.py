"""Every family of the zoo passes exactly the checks that the shipped table says it passes."""

from __future__ import annotations

import pytest
from checks import run_checks
from sweep import mapping, outside, runs_of
from zoo import MEMBERS, build, load_members

from lvlm_probe.family_table import family_table

RUNS = [(name, *run) for name, member in sorted(load_members().items()) for run in runs_of(member)]
HOW = "run  .venv-tv/bin/python tests/families/sweep.py --write  and look at what changed"


@pytest.mark.parametrize(("name", "backend", "larger"), RUNS)
def test_a_family_passes_what_the_table_says(name: str, backend: str, larger: bool) -> None:
    written = next(
        run["checks"] for run in family_table()[name].runs if (run["backend"], run["larger"]) == (backend, larger)
    )
    for verdict in run_checks(build(name, backend), larger=larger):
        expected = written[verdict.check]["passed"]
        assert verdict.passed is expected, f"{verdict.check}: {verdict.figure} {verdict.note}; {HOW}"


def test_every_entry_of_the_mapping_is_in_the_zoo_or_has_a_reason_to_be_outside() -> None:
    unknown = set(mapping()) - set(MEMBERS) - set(outside())
    assert not unknown, f"transformers knows families that the zoo does not: {sorted(unknown)}"
    assert set(MEMBERS) <= set(mapping())
    assert not set(MEMBERS) & set(outside())


def test_the_table_lists_the_mapping() -> None:
    assert {family.name for family in family_table().families} == set(mapping()), HOW
    assert {family.name for family in family_table().lvlms} == set(MEMBERS), HOW
