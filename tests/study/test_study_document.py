"""The demo study, cut down to one scene: every table of the paper comes out of it, and one document of them all."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import succeed

from lvlm_probe.metrics import Interval
from lvlm_probe.study.datasets.registry import open_dataset
from lvlm_probe.study.results import Results, collect
from lvlm_probe.study.run.runner import run_study
from lvlm_probe.study.spec import Study, read_study
from lvlm_probe.study.tables.document import document
from lvlm_probe.study.tables.paper import TABLES, make_table

EXAMPLE = Path(__file__).parents[2] / "examples" / "study_demo.yaml"


@pytest.fixture(scope="module")
def whole() -> Study:
    return read_study(EXAMPLE)


@pytest.fixture(scope="module")
def results(whole: Study, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """One hard scene, one model, every row, on few cells and, but for the release, after few iterations."""
    methods = dict(whole.methods)
    for name, spec in methods.items():
        if spec.method == "igos++" and spec.behaviour != "release":
            methods[name] = dataclasses.replace(spec, params={**spec.params, "iterations": 2})
    study = dataclasses.replace(
        whole,
        methods=methods,
        out=tmp_path_factory.mktemp("study"),
        models={"demo": whole.models["demo"]},
        datasets={"hard": whole.datasets["hard"]},
        settings=dataclasses.replace(whole.settings, grid=8, steps=4),
    )
    counts = run_study(study, limit=1)
    assert counts == {"answers": 1, "maps": 16}
    return collect(study)


def test_every_table_of_the_paper_has_rows_in_it(whole: Study) -> None:
    for number in (2, 3, 5, 6, 7, 9):
        assert [name for name, spec in whole.methods.items() if number in spec.tables], f"table {number}"
    assert {name for name, spec in whole.methods.items() if 5 in spec.tables} == {
        "λ2 = 0.1",
        "λ2 = 0",
        "λ2 = 1",
        "λ2 = 10",
    }
    assert not any(spec.paper for spec in whole.models.values()), "these models are none of the paper's"


def test_rows_that_ask_for_the_same_are_done_once(results: Results) -> None:
    keys: dict[tuple[str, str], set[str]] = {}
    for record in results.maps:
        keys.setdefault((record["model"], record["key"]), set()).add(record["row"])
    assert {"igos++", "LLR > 1", "α = 1", "blurred"} in keys.values()
    assert len(list((results.study.out / "maps").glob("*.json"))) == 16


@pytest.mark.parametrize("name", [*TABLES, "figure5"])
def test_every_table_is_filled(results: Results, name: str) -> None:
    table = make_table(results, name)
    place = table.columns.index("n")
    assert table.rows
    assert all(row[place] == 1 for row in table.rows), "one scene, answered, kept and explained in every row"
    numbers = [cell for row in table.rows for cell in row if isinstance(cell, Interval)]
    assert all(np.isfinite(cell.estimate) for cell in numbers)


def test_memory_is_measured_for_the_rows_of_table_9_and_not_in_their_seconds(results: Results) -> None:
    for record in results.chosen():
        memory = record["measured"]["memory"]
        measured = memory.get("measured_peak") is not None
        assert measured == (record["row"] in {"igos++", "gradcam", "tmm", "iia", "LLR > 1", "α = 1", "blurred"})
        assert memory["weights"] > 4_000_000
        assert record["measured"]["unit_seconds"] > record["measured"]["seconds"]
        assert record["measured"]["processor_seconds"] > 0
        assert "thread" in record["measured"]["machine"]


def test_the_release_is_also_judged_by_its_own_rule(results: Results) -> None:
    (record,) = results.chosen(row="igos++ (release)")
    assert record["release"]["deletion"] > record["deletion"] - 0.02, "its last chunk counts as 1"
    assert record["release"] != {"deletion": record["deletion"], "insertion": record["insertion"]}
    assert not any("release" in record for record in results.chosen(row="igos++"))


def test_regions_stand_for_people_only_where_the_study_says_so(results: Results) -> None:
    (asked,) = _first(human="region")
    (plain,) = _first()
    np.testing.assert_array_equal(asked.annotations["human"] > 0.5, asked.annotations["region"])
    assert "human" not in plain.annotations
    notes = " ".join(make_table(results, "8").notes)
    assert "No person has looked at the images of hard" in notes
    people = dataclasses.replace(results.study.datasets["hard"], options={"hard": True})
    others = dataclasses.replace(results.study, datasets={"hard": people})
    assert "No person" not in " ".join(make_table(dataclasses.replace(results, study=others), "8").notes)
    with pytest.raises(Exception, match="human is one of region, not 'people'"):
        _first(human="people")


def _first(**options: Any) -> list[Any]:
    found = open_dataset("demo", "eval", **options)
    return [next(found)]


def test_table_8_has_the_rows_that_name_it(results: Results) -> None:
    table = make_table(results, "8")
    assert [row[2] for row in table.rows if row[0] == "demo"] == ["igos++", "gradcam", "tmm", "iia", "random"]


def test_the_document_says_what_was_run_and_holds_every_table(results: Results) -> None:
    text = document(results, command="lvlm-probe study table x.yaml --document x.md")
    assert text.startswith("# The demo study\n\nMade by `lvlm-probe study table x.yaml --document x.md` on 20")
    assert results.study.about in text
    assert "**Run.** 1 answer (0 failed) and 16 maps (0 without values, 0 failed, 0 to do), on " in text
    assert re.search(r"[\d.]+ minutes of processor time, judging included", text)
    headings = re.findall(r"^## (Table \d|Figure 5|Reproduction ledger)", text, flags=re.MULTILINE)
    assert headings == [*(f"Table {number}" for number in range(1, 10)), "Figure 5", "Reproduction ledger"]
    assert "| hard | demo | eval | 1 | 1 |" in text
    assert "not run" in text and "0 numbers of this study stand beside the paper's" in text
    assert str(results.study.out) not in text and str(EXAMPLE.parent) not in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_a_table_that_cannot_be_made_is_there_with_the_reason(results: Results) -> None:
    rows = {"random": results.study.methods["random"]}
    text = document(dataclasses.replace(results, study=dataclasses.replace(results.study, methods=rows)), command="c")
    assert "## Table 5\n\nNot made: no method of this study belongs to table 5" in text


@pytest.mark.quick
def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(
        "name: small\nmodels: {demo: demo}\ndatasets: {s: {reader: demo, source: eval, limit: 1}}\n"
        "methods: {random: {}, input_gradient: {}}\nsettings: {grid: 4, steps: 2, max_new_tokens: 24, words: true}\n"
    )
    succeed("study", "run", path)
    assert all("words" in record for record in collect(read_study(path)).chosen())
    succeed("study", "table", path, "--document", tmp_path / "out" / "small.md")
    text = (tmp_path / "out" / "small.md").read_text(encoding="utf-8")
    assert text.startswith(f"# Small\n\nMade by `lvlm-probe study table {path.as_posix()} --document ")
    assert "| demo | s | random | 1 |" in text
