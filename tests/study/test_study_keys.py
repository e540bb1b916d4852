"""Keys of a study: each has what the reference shows, and the reference's examples are read as they stand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import run, succeed

from lvlm_probe.errors import StudyError
from lvlm_probe.study.datasets import registry
from lvlm_probe.study.reference import Entry, keys_page, study_keys
from lvlm_probe.study.spec import read_study

KEYS = study_keys()
NEEDED = {"models": "{demo: demo}", "datasets": "{d: {reader: demo, source: eval}}", "methods": "{center: {}}"}


def fault(entry: Entry) -> str | None:
    """What a key lacks, as a sentence."""
    lacks = [name for name in ("kind", "default", "says", "example") if not getattr(entry, name)]
    return f"{entry.key} has no {lacks[0]}" if lacks or entry.kind == "anything" else None


@pytest.mark.quick
def test_every_key_has_its_texts() -> None:
    assert not [said for entry in KEYS if (said := fault(entry))]
    assert len({(entry.key, entry.reader) for entry in KEYS}) == len(KEYS) > 45
    bare = [entry for entry in KEYS if entry.key.startswith("datasets.NAME.") and entry.reader is None]
    assert {entry.key.rpartition(".")[2] for entry in bare} >= {"reader", "source", "split", "limit", "options"}


def test_an_option_without_a_text_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_READERS", dict(registry._READERS))

    @registry.register_dataset("untold", layout="a directory with five files")
    def untold(source: str, *, split: str | None = None, page: int = 0) -> Iterator[registry.Sample]:
        """Nothing."""
        yield from ()

    (entry,) = (entry for entry in study_keys() if entry.reader == "untold")
    assert (entry.key, entry.kind, entry.default) == ("datasets.NAME.page", "a whole number", "0")
    assert fault(entry) == "datasets.NAME.page has no says"


def study_with(entry: Entry, value: str, path: Path) -> Path:
    """A study that has one key more than it needs, or with the key's own value."""
    section, _, name = entry.key.rpartition(".")
    parts = dict(NEEDED)
    if section.startswith("datasets"):
        reader = entry.reader or ("cv-bench" if name == "options" else "demo")
        given = {"reader": reader, "source": "eval", name: value}
        parts["datasets"] = "{d: {" + ", ".join(f"{key}: {text}" for key, text in given.items()) + "}}"
    elif section.startswith("models"):
        where = {"server": "http://gpu:8000"} if name in ("server", "served_model") else {"source": "demo"}
        given = {**where, name: value}
        parts["models"] = "{m: {" + ", ".join(f"{key}: {text}" for key, text in given.items()) + "}}"
    elif section.startswith("methods"):
        parts["methods"] = "{igos++: {" + f"{name}: {value}" + "}}"
    else:
        parts[section or name] = "{" + f"{name}: {value}" + "}" if section else value
    path.write_text("".join(f"{key}: {text}\n" for key, text in parts.items()), encoding="utf-8")
    return path


@pytest.mark.parametrize("entry", KEYS, ids=lambda entry: f"{entry.reader or ''}:{entry.key}")
def test_its_example_is_read(entry: Entry, tmp_path: Path) -> None:
    study = read_study(study_with(entry, entry.example.partition(": ")[2], tmp_path / "study.yaml"))
    if entry.reader is not None:
        assert entry.key.rpartition(".")[2] in study.datasets["d"].options


KINDS = ("a whole number", "a number", "true or false")


@pytest.mark.parametrize("entry", [one for one in KEYS if one.kind in KINDS], ids=lambda one: one.key)
def test_a_value_of_another_kind_is_refused(entry: Entry, tmp_path: Path) -> None:
    """What the reference says a key holds is what is checked."""
    name = entry.key.rpartition(".")[2]
    with pytest.raises(StudyError, match=re.escape(f"{name} is {entry.kind}, not 'some'")):
        read_study(study_with(entry, "some", tmp_path / "study.yaml"))


@pytest.mark.quick
def test_the_page_and_the_command_show_every_key() -> None:
    page = keys_page()
    shown = succeed("study", "keys").out
    for entry in KEYS:
        assert f"| `{entry.key.rpartition('.')[2]}` | {entry.kind} |" in page
        assert entry.key in shown and entry.example in shown
    assert page.count("### Options of the reader") == len({entry.reader for entry in KEYS}) - 1
    assert all(line.count("|") - line.count("\\|") == 6 for line in page.splitlines() if line.startswith("|"))
    assert [one["key"] for one in succeed("study", "keys", "--json").json] == [entry.key for entry in KEYS]
    assert {one["reader"] for one in succeed("study", "keys", "table", "--json").json} == {"table", None}
    wrong = run("study", "keys", "colums")
    assert wrong.code == 2 and "did you mean 'columns'?" in wrong.err
