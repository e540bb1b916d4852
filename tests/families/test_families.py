"""Every family of the zoo, opened by ``probe.load``, passes exactly the checks that the shipped table says it passes.

Each of the two environments tries its own half: .venv-tv, with torchvision, saves the families, into the directory
``LVLM_PROBE_ZOO`` if that is set; .venv, the default install, takes those that it finds there. `make test` takes every
family that is not slow, and of every kind of preprocessing both installations and both pictures; `make campaign` takes
all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from sweep import checked, mapping, outside, runs_of
from zoo import INSTALL, MEMBERS, SLOW, Install, load_members, save

from lvlm_probe.models.support import family_table

RUNS = [
    (name, *run)
    for name, member in sorted(load_members().items())
    for run in runs_of(member, ("default", "torchvision"))
]


def lacks(run: tuple[str, Install, bool]) -> bool:
    """Whether the table says that the family cannot be loaded in the run's installation, which takes no time to see."""
    return bool(family_table()[run[0]].lacks(run[1]))


LOADED = [run for run in RUNS if not lacks(run)]


def taken() -> set[tuple[str, str, bool]]:
    """The runs of `make test`: one of every family, and more where a kind would lack an installation or a picture."""
    seen: set[tuple[str, object]] = set()
    found: set[tuple[str, str, bool]] = set()

    def new(run: tuple[str, str, bool]) -> list[tuple[str, object]]:
        parts = [(MEMBERS[run[0]].kind, run[1]), (MEMBERS[run[0]].kind, run[2])]
        return [part for part in parts if part not in seen]

    for name in (name for name in MEMBERS if name not in SLOW):
        found.add(max((run for run in LOADED if run[0] == name), key=lambda run: len(new(run))))
        seen.update(part for run in found for part in new(run))
    for run in LOADED:
        if run[0] not in SLOW and new(run):
            found.add(run)
            seen.update(new(run))
    return found


TAKEN = taken()
HOW = "run  make families  and look at what changed"
SAVED = os.environ.get("LVLM_PROBE_ZOO")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a saved family, by its name. One that nobody has saved is."""
    folder = Path(SAVED) if SAVED else tmp_path_factory.mktemp("zoo")
    return lambda name: folder / name if (folder / name).exists() else save(name, folder / name)


@pytest.mark.skipif(INSTALL == "default", reason="saving takes torchvision")
def test_families_are_saved_for_the_default_install(zoo: Callable[[str], Path]) -> None:
    for name in sorted({name for name, install, _ in TAKEN if install == "default"}):
        assert {"config.json", "tokenizer.json"} <= {path.name for path in zoo(name).iterdir()}


@pytest.mark.skipif(
    INSTALL == "default" and not SAVED,
    reason="saving takes torchvision: run tests/families by .venv-tv/bin/python with LVLM_PROBE_ZOO=DIR, then this",
)
@pytest.mark.parametrize(
    ("name", "install", "larger"),
    [
        pytest.param(*run, marks=() if run in TAKEN or (lacks(run) and run[0] not in SLOW) else pytest.mark.campaign)
        for run in RUNS
        if run[1] == INSTALL
    ],
)
def test_a_family_passes_what_the_table_says(name: str, install: str, larger: bool, zoo: Callable[[str], Path]) -> None:
    written = next(run for run in family_table()[name].runs if (run["install"], run["larger"]) == (install, larger))
    found = checked(name, zoo(name), larger=larger)
    assert found.get("lacks") == written.get("lacks"), HOW
    for check, verdict in found["checks"].items():
        expected = written["checks"][check]["passed"]
        assert verdict["passed"] is expected, f"{check}: {verdict['figure']} {verdict['note']}; {HOW}"


def test_of_every_kind_both_installations_and_both_pictures_are_taken() -> None:
    for part in (1, 2):
        assert {(MEMBERS[run[0]].kind, run[part]) for run in TAKEN} == {
            (MEMBERS[run[0]].kind, run[part]) for run in LOADED
        }
    assert {run[0] for run in TAKEN} == set(MEMBERS) - SLOW
    assert len(TAKEN) < len(LOADED) / 2


def test_every_entry_of_the_mapping_is_in_the_zoo_or_has_a_reason_to_be_outside() -> None:
    unknown = set(mapping()) - set(MEMBERS) - set(outside())
    assert not unknown, f"transformers knows families that the zoo does not: {sorted(unknown)}"
    assert set(MEMBERS) <= set(mapping())
    assert not set(MEMBERS) & set(outside())


def test_the_table_lists_the_mapping() -> None:
    assert {family.name for family in family_table().families} == set(mapping()), HOW
    assert {family.name for family in family_table().lvlms} == set(MEMBERS), HOW
