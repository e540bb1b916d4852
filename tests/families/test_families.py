"""Every family of the zoo passes exactly the checks that the shipped table says it passes.

`make test` takes every family, and of every kind of preprocessing every backend and both pictures; `make campaign`
takes all runs.
"""

from __future__ import annotations

import pytest
from checks import run_checks
from sweep import mapping, outside, runs_of
from zoo import MEMBERS, build, load_members

from lvlm_probe.models.support import family_table

RUNS = [(name, *run) for name, member in sorted(load_members().items()) for run in runs_of(member)]


def taken() -> set[tuple[str, str, bool]]:
    """The runs of `make test`: one of every family, and more where a kind would lack a backend or a picture."""
    seen: set[tuple[str, object]] = set()
    found: set[tuple[str, str, bool]] = set()

    def new(run: tuple[str, str, bool]) -> list[tuple[str, object]]:
        parts = [(MEMBERS[run[0]].kind, run[1]), (MEMBERS[run[0]].kind, run[2])]
        return [part for part in parts if part not in seen]

    for name in MEMBERS:
        found.add(max((run for run in RUNS if run[0] == name), key=lambda run: len(new(run))))
        seen.update(part for run in found for part in new(run))
    for run in RUNS:
        if new(run):
            found.add(run)
            seen.update(new(run))
    return found


TAKEN = taken()
HOW = "run  .venv-tv/bin/python tests/families/sweep.py --write  and look at what changed"


@pytest.mark.parametrize(
    ("name", "backend", "larger"),
    [pytest.param(*run, marks=() if run in TAKEN else pytest.mark.campaign) for run in RUNS],
)
def test_a_family_passes_what_the_table_says(name: str, backend: str, larger: bool) -> None:
    written = next(
        run["checks"] for run in family_table()[name].runs if (run["backend"], run["larger"]) == (backend, larger)
    )
    for verdict in run_checks(build(name, backend), larger=larger):
        expected = written[verdict.check]["passed"]
        assert verdict.passed is expected, f"{verdict.check}: {verdict.figure} {verdict.note}; {HOW}"


def test_of_every_kind_every_backend_and_both_pictures_are_taken() -> None:
    for part in (1, 2):
        assert {(MEMBERS[run[0]].kind, run[part]) for run in TAKEN} == {
            (MEMBERS[run[0]].kind, run[part]) for run in RUNS
        }
    assert {run[0] for run in TAKEN} == set(MEMBERS)
    assert len(TAKEN) < len(RUNS) / 2


def test_every_entry_of_the_mapping_is_in_the_zoo_or_has_a_reason_to_be_outside() -> None:
    unknown = set(mapping()) - set(MEMBERS) - set(outside())
    assert not unknown, f"transformers knows families that the zoo does not: {sorted(unknown)}"
    assert set(MEMBERS) <= set(mapping())
    assert not set(MEMBERS) & set(outside())


def test_the_table_lists_the_mapping() -> None:
    assert {family.name for family in family_table().families} == set(mapping()), HOW
    assert {family.name for family in family_table().lvlms} == set(MEMBERS), HOW
