"""What a study will take, before it runs: counted without a model, measured with one; and the paper's Table 2."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest
from command_line import run, succeed
from PIL import Image
from test_study_datasets import CV_ROW, encoded, parquet

from lvlm_probe.errors import StudyError
from lvlm_probe.study.forecast import forecast
from lvlm_probe.study.run.runner import run_study, samples_of
from lvlm_probe.study.spec import DatasetSpec, MethodSpec, Study, read_study
from lvlm_probe.study.tables.ledger import printed

EXAMPLES = Path(__file__).parents[2] / "examples"

YAML = """\
models:
  demo: demo
  again: {source: demo}
datasets:
  scenes: {reader: demo, source: eval, limit: 3}
  gone: {reader: mmvp, source: no/such/directory}
methods:
  igos++: {tables: [2, 9]}
  LLR > 1: {method: igos++, tables: [3]}
  input_gradient: {}
  attention: {}
  random: {}
settings: {grid: 8, steps: 5, max_new_tokens: 24}
"""


@pytest.fixture
def study(tmp_path: Path) -> Study:
    (tmp_path / "study.yaml").write_text(YAML, encoding="utf-8")
    return read_study(tmp_path / "study.yaml")


def test_without_a_model_units_and_passes_are_counted(study: Study) -> None:
    found = forecast(study)
    assert found.samples == {"scenes": 3}
    assert "no/such/directory" in found.unreadable["gone"]
    assert found.answers == 2 * 3
    assert found.maps == 2 * 3 * 4, "rows that ask for the same maps share them"
    lines = {line.rows[0]: line for line in found.lines if line.model == "demo"}
    assert lines["igos++"].rows == ("igos++", "LLR > 1")
    assert {name: (line.forward, line.backward) for name, line in lines.items()} == {
        "igos++": (188, 156),
        "input_gradient": (1, 1),
        "attention": (None, None),
        "random": (0, 0),
    }
    assert lines["igos++"].at_least == (32, 24) and lines["input_gradient"].at_least is None
    assert found.hours() is None
    assert "a map takes as many as it needs" in " ".join(found.sentences())
    assert "Nothing was measured" in " ".join(found.sentences())
    assert not study.out.exists(), "a plan leaves nothing behind"
    assert forecast(study, limit=1).maps == 2 * 1 * 4


@pytest.mark.quick
def test_measured_it_says_memory_and_hours_and_keeps_the_answers(study: Study) -> None:
    low = MethodSpec("low", "input_gradient", search_dtype="bfloat16")
    study = dataclasses.replace(
        study,
        models={"demo": study.models["demo"]},
        datasets={"scenes": study.datasets["scenes"]},
        methods={**study.methods, "low": low},
    )
    found = forecast(study, measure=True)
    lines = {line.rows[0]: line for line in found.lines}
    assert (lines["low"].peak or 0) > (lines["input_gradient"].peak or math.inf), "with weights that it casts"
    assert lines["igos++"].passes == (188, 156, (32, 24))
    igos = lines["igos++"]
    assert igos.peak is not None and igos.total is not None and igos.seconds is not None
    assert igos.total - igos.peak == pytest.approx(4 * 1_042_176, rel=0.01), "the weights, in single precision"
    assert lines["attention"].forward == 0 and lines["random"].seconds == 0.0
    by_hand = (
        sum(3 * ((line.seconds or 0.0) + (line.judging_seconds or 0.0)) for line in found.lines)
        + 3 * found.answer_seconds["demo", "scenes"]
    )
    assert found.hours() == pytest.approx(by_hand / 3600)
    counts = run_study(study, limit=1)
    assert counts["answers"] == 0 and counts["finished"] == 1, "the answer that was measured on is a unit of the study"
    tight = forecast(study, measure=True, memory="1MB")
    assert all("takes" in (line.problem or "") for line in tight.lines if line.rows[0] == "igos++")


def test_once_answers_are_there_the_filter_is_known(study: Study) -> None:
    study = dataclasses.replace(
        study,
        models={"demo": study.models["demo"]},
        datasets={"scenes": study.datasets["scenes"]},
        methods={"random": study.methods["random"]},
        filter=dataclasses.replace(study.filter, minimum_drop=1.0),
    )
    run_study(study)
    found = forecast(study, measure=True)
    passed, known = found.kept["scenes"]
    assert known == 3 and passed == 0, "no answer loses all of its probability"
    assert found.hours(filtered=True) == pytest.approx(3 * found.answer_seconds["demo", "scenes"] / 3600)
    assert "0 of 3 answered so far pass" in " ".join(found.sentences())


def test_a_model_that_cannot_be_loaded_costs_its_own_lines(study: Study) -> None:
    models = {"demo": dataclasses.replace(study.models["demo"], source="no/such/model")}
    scenes = {"scenes": study.datasets["scenes"]}
    found = forecast(dataclasses.replace(study, models=models, datasets=scenes), measure=True)
    assert all("no/such/model" in (line.problem or "") for line in found.lines)


@pytest.mark.quick
def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(YAML, encoding="utf-8")
    shown = succeed("study", "plan", path)
    lines = [" ".join(line.split()) for line in shown.out.splitlines()]
    assert "demo scenes igos++ = LLR > 1 3 32–188 + 24–156 10" in lines and "hours" not in shown.out.split("─")[0]
    assert "gone cannot be opened" in " ".join((shown.out + shown.err).split())
    record = succeed("study", "plan", path, "--json").json
    assert record["maps"] == 24 and record["hours"] is None
    assert run("study", "plan", tmp_path / "none.yaml").code != 0


def test_scenes_without_a_limit_have_no_end(study: Study) -> None:
    scenes = dataclasses.replace(study.datasets["scenes"], limit=None)
    endless = dataclasses.replace(study, datasets={"scenes": scenes})
    with pytest.raises(StudyError, match=r"scenes .* has no end: give it a limit"):
        list(samples_of(endless, "scenes"))
    assert len(list(samples_of(endless, "scenes", limit=2))) == 2


# -------------------------------------------------------------------------------------------------- the paper's Table 2


def test_table_2_names_what_the_paper_has_and_enumerates_its_units(tmp_path: Path) -> None:
    study = read_study(EXAMPLES / "table2.yaml")
    cells = printed()["table2"]
    assert {spec.paper for spec in study.models.values()} == set(cells)
    assert {spec.paper for spec in study.datasets.values()} == {
        name for row in cells["LLaVA-1.5-7b"].values() for name in row
    }
    rows = {spec.paper: name for name, spec in study.methods.items() if spec.paper and spec.behaviour == "corrected"}
    assert set(rows) == set(cells["LLaVA-1.5-7b"])
    assert any(spec.behaviour == "release" for spec in study.methods.values())
    assert all(spec.options == {} and spec.open_ended for spec in study.datasets.values())

    found = forecast(dataclasses.replace(study, datasets=_local(study, tmp_path), out=tmp_path / "out"))
    assert found.unreadable == {}
    assert found.samples == {"MMVP": 2, "MMStar": 1, "CV-Bench": 3, "LLaVA-Bench": 1}
    assert found.answers == 3 * 7
    assert found.maps == found.answers * len(study.methods)
    passes = {line.rows[0]: (line.forward, line.backward) for line in found.lines}
    assert passes["iGOS++"] == (188, 156) and passes["IIA"] == (11, 11) and passes["T-MM"] == (1, 1)


def _local(study: Study, directory: Path) -> dict[str, DatasetSpec]:
    """The same data sets as small files in the layouts that they are published in."""
    mmvp, bench = directory / "MMVP", directory / "LLaVA-Bench"
    (mmvp / "MMVP Images").mkdir(parents=True)
    (bench / "images").mkdir(parents=True)
    with (mmvp / "Questions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Index", "Question", "Options", "Correct Answer"])
        for index in (1, 2):
            Image.new("RGB", (20, 20), (index, 0, 0)).save(mmvp / "MMVP Images" / f"{index}.jpg")
            writer.writerow([index, "Is the door open?", "(a) Open (b) Closed", "(a)"])
    Image.new("RGB", (20, 20)).save(bench / "images" / "001.jpg")
    line = {"question_id": 0, "image": "001.jpg", "text": "What is this?", "category": "conv"}
    (bench / "questions.jsonl").write_text(json.dumps(line))
    star = {
        "index": 7,
        "question": "Which?\nOptions: A: a, B: b",
        "image": {"bytes": encoded(), "path": None},
        "answer": "A",
        "category": "c",
        "l2_category": "d",
    }
    parquet(directory / "star" / "val-00000.parquet", [star])
    parquet(
        directory / "cv" / "test_2d.parquet",
        [{**CV_ROW, "idx": index, "image": {"bytes": encoded(), "path": None}} for index in range(3)],
    )
    places = {"MMVP": mmvp, "MMStar": directory / "star", "CV-Bench": directory / "cv", "LLaVA-Bench": bench}
    return {name: dataclasses.replace(spec, source=str(places[name])) for name, spec in study.datasets.items()}
