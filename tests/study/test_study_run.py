"""Whole studies on the demo model: what is done, what is kept when it is killed, and that resuming changes nothing."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lvlm_probe as probe
from lvlm_probe.errors import StudyError
from lvlm_probe.selection import word_selections
from lvlm_probe.study.results import collect
from lvlm_probe.study.run.runner import Worker, run_study
from lvlm_probe.study.run.units import Records
from lvlm_probe.study.run.word_maps import read_words
from lvlm_probe.study.spec import Study, read_study
from lvlm_probe.study.tables.export import export, state
from lvlm_probe.study.tables.paper import make_table

YAML = """\
models:
  demo: demo
datasets:
  scenes: {reader: demo, source: eval, limit: 4}
methods:
  input_gradient: {}
  occlusion: {params: {size: 6}}
  joint: {method: input_gradient, tokens: joint, tables: [2, 3]}
settings: {grid: 8, steps: 5, max_new_tokens: 24}
"""
TWO = YAML.replace("limit: 4", "limit: 2")


def study_in(directory: Path, text: str = YAML) -> Study:
    directory.mkdir(exist_ok=True)
    path = directory / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return read_study(path)


VARYING = ("measured", "passes")
"""Measured; and passes count what a process tries once for a model (shortcuts, whether gradients flow) where it was."""


def unmeasured(study: Study) -> dict[str, Any]:
    """Everything a study has found, without what varies from run to run."""
    found: dict[str, Any] = {}
    for kind in ("answers", "maps"):
        for key, record in Records(study.out / kind):
            found[f"{kind}/{key}"] = {name: value for name, value in record.items() if name not in VARYING}
    for path in sorted((study.out / "maps").glob("*.heat.h5")):
        heat = probe.Heatmap.read(path)
        found[path.name] = None if heat.values is None else heat.values.tobytes().hex()
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = study_in(tmp_path_factory.mktemp("finished"))
    counts = run_study(study)
    assert counts == {"answers": 4, "maps": 12}
    return study


def test_a_second_run_does_nothing(finished: Study) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.out.rglob("*")}
    counts = run_study(finished)
    assert counts["answers"] == counts["maps"] == 0
    assert counts["finished"] == 4
    assert {path: path.stat().st_mtime_ns for path in finished.out.rglob("*")} == before


def test_what_is_found(finished: Study) -> None:
    results = collect(finished)
    assert len(results.answers) == 4
    assert len(results.maps) == 3 * len(results.kept["scenes"]) == 12
    for record in results.answers:
        assert record["correct"] is True
        assert record["drop"] == pytest.approx(1 - np.exp(record["baseline_log_prob"] - record["log_prob"]))
    record = next(results.chosen(row="input_gradient"))
    key = record["answer"]
    trace = probe.open_trace(finished.out / "answers" / f"{key}.h5")
    heat = probe.Heatmap.read(finished.out / "maps" / record["map"], trace=trace)
    replay = probe.replay(trace, *probe.demo.load())
    again = probe.explain(replay, method="input_gradient")
    np.testing.assert_array_equal(heat.values, again.values)
    score = probe.evaluate(again, replay, grid=8, steps=5)
    assert (record["deletion"], record["insertion"]) == pytest.approx((score.deletion, score.insertion))
    joint = [record for record in results.chosen(row="joint") if "common" in record]
    assert joint, "a row that explains other tokens is judged by the study's tokens too"
    table = make_table(results, "2")
    assert [row[3] for row in table.rows] == [4, 4, 4]


def test_a_row_may_search_in_bfloat16(tmp_path: Path) -> None:
    rows = "  exact: {method: input_gradient, tokens: joint}\n"
    rows += "  low: {method: input_gradient, tokens: joint, search_dtype: bfloat16, tables: [9]}\n"
    rows += "settings: {words: true, "
    more = study_in(tmp_path, YAML[: YAML.index("  input_gradient")] + rows + YAML.partition("settings: {")[2])
    assert run_study(more, limit=1)["maps"] == 2
    (record,) = collect(more).chosen(row="low")
    (exact,) = collect(more).chosen(row="exact")
    heat, plain = (probe.Heatmap.read(more.out / "maps" / one["map"]) for one in (record, exact))
    assert (heat.search_dtype, plain.search_dtype) == ("bfloat16", None)
    assert heat.values is not None and plain.values is not None and not np.array_equal(heat.values, plain.values)
    assert np.corrcoef(heat.values.ravel(), plain.values.ravel())[0, 1] > 0.95
    replay = probe.replay(probe.open_trace(more.out / "answers" / f"{record['answer']}.h5"), *probe.demo.load())
    score = probe.evaluate(heat, replay, grid=8, steps=5)
    assert (record["deletion"], record["insertion"]) == pytest.approx((score.deletion, score.insertion))
    stored = [
        one for one in read_words(record, more.out / "maps" / record["map"]) if one.get("map", "values") != "values"
    ]
    parts = [part for _, part in word_selections(replay, heat.selection) if list(part.indices) == stored[0]["tokens"]]
    word = probe.explain(replay, method="input_gradient", tokens=parts[0], search_dtype="bfloat16", progress=False)
    np.testing.assert_array_equal(stored[0]["values"], word.values)
    searched = record["measured"]["memory"]["measured_peak"]
    assert searched == pytest.approx(probe.plan(replay, **more.methods["low"].asked).peak, rel=0.15)


def test_one_method_more_does_only_what_is_new(finished: Study, tmp_path: Path) -> None:
    more = study_in(tmp_path, YAML.replace("methods:\n", "methods:\n  center: {}\n"))
    more = dataclasses.replace(more, out=finished.out)
    counts = run_study(more, limit=2)
    assert (counts["answers"], counts["maps"]) == (0, 2)
    assert len(list(collect(finished).chosen())) == 12
    assert len(list(collect(more).chosen(row="center"))) == 2


def test_shards_add_up(finished: Study, tmp_path: Path) -> None:
    parts = study_in(tmp_path, TWO)
    assert run_study(parts, shard=(1, 2))["answers"] == 1
    assert run_study(parts, shard=(0, 2))["answers"] == 1
    assert len(list(collect(parts).chosen())) == 6
    assert unmeasured(parts) == {name: unmeasured(finished)[name] for name in unmeasured(parts)}
    with pytest.raises(StudyError, match="shard"):
        run_study(parts, shard=(2, 2))


def killed(study: Study, at: int) -> bool:
    """Whether a process that runs the study was killed as it came to the ``at``-th file that it opens, moves or removes
    in the study's directory: between those nothing changes that the next run could see."""
    child = os.fork()
    if child == 0:
        left, kinds = at, {"open", "os.rename", "os.remove", "os.mkdir"}

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event in kinds and str(arguments[0]).startswith(str(study.out)):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        # transformers reads weights in threads, in which torch's thread pool does not outlive a fork.
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
        status = 1
        try:
            run_study(study)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_killed_at_any_time_and_resumed_it_is_the_same(finished: Study, tmp_path: Path) -> None:
    study = study_in(tmp_path, TWO)
    kills, at = 0, 3
    while killed(study, at):
        kills, at = kills + 1, at + 2 + at // 2
    assert kills >= 5
    ours = unmeasured(finished)
    assert unmeasured(study) == {name: ours[name] for name in unmeasured(study)}
    assert len(list(collect(study).chosen())) == 6


def test_a_unit_that_fails_is_kept_with_its_reason(tmp_path: Path) -> None:
    for name, colour in (("a", 0), ("b", 255)):
        Image.new("RGB", (112, 112), (colour, 40, 40)).save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes(b"no picture")
    rows = [{"id": name, "image": f"{name}.png", "question": "What color is the circle?"} for name in "abc"]
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    study = study_in(
        tmp_path,
        "models: {demo: demo}\n"
        f"datasets: {{mine: {{reader: table, source: {tmp_path / 'mine.jsonl'}}}}}\n"
        "methods: {input_gradient: {}, gradcam: {params: {encoder: nowhere}}}\n"
        "settings: {grid: 8, steps: 4}\n"
        "filter: {minimum_drop: 0}\n",
    )
    told: list[int] = []
    run_study(study, tell=lambda now: told.append(now.failed))
    assert told[-1] == 1
    results = collect(study)
    failed = {record["sample"]: record["reason"] for record in results.answers if record["status"] == "failed"}
    assert set(failed) == {"c"}
    assert "the image cannot be read" in failed["c"]
    found = state(results)
    assert found["answers"] == [{"model": "demo", "dataset": "mine", "done": 2, "failed": 1}]
    assert any(reason.startswith("demo: StudyError") for reason in found["reasons"])
    assert any(reason.startswith("gradcam: ") for reason in found["reasons"])
    assert "Skipped: " in " ".join(make_table(results, "2").notes)
    before = unmeasured(study)
    run_study(study)
    assert unmeasured(study) == before
    Image.new("RGB", (112, 112)).save(tmp_path / "c.png")
    run_study(study, retry_failed=True)
    assert {record["status"] for record in collect(study).answers if record["picture"] != "unreadable"} == {"done"}


@pytest.mark.parametrize("kind", ["answers", "maps"])
def test_a_disk_that_is_full_ends_the_study_and_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The record of a failure is small, and often finds room where the trace or the map did not."""
    study = study_in(tmp_path, TWO)
    rename = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).suffix == ".h5" and kind in Path(target).parts[-3:]:
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StudyError, match=r"the disk is full .* the same command goes on"):
            run_study(study)
    assert not [one for one in study.out.rglob("*.json") if '"failed"' in one.read_text()]
    told: list[int] = []
    run_study(study, tell=lambda now: told.append(now.failed))
    assert told[-1] == 0


def test_export_and_state(finished: Study, tmp_path: Path) -> None:
    results = collect(finished)
    made = export(results, tmp_path / "out")
    assert [path.name for path in made] == ["answers.csv", "maps.csv", "samples.json", "study.json"]
    assert len(made[0].read_text().splitlines()) == 1 + 4
    assert len(made[1].read_text().splitlines()) == 1 + 12
    assert json.loads(made[2].read_text())["kept"]["scenes"] == list(results.kept["scenes"])
    assert str(finished.out.parent) not in "".join(path.read_text() for path in made)
    found = state(results)
    assert [line["missing"] for line in found["maps"]] == [0, 0, 0]


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    study = study_in(tmp_path, YAML.replace("demo: demo", "other: {source: no/such/model/here}"))
    with pytest.raises(StudyError, match=r"model other \(no/such/model/here\) cannot be loaded"):
        run_study(study)


def test_the_embedded_model_too_is_loaded_as_is_asked(tmp_path: Path) -> None:
    study = study_in(tmp_path, YAML.replace("demo: demo", "low: {source: demo, dtype: bfloat16, attn: eager}"))
    model, _ = Worker(study).model("low")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
