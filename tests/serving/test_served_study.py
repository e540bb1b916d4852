"""A study with a model on a server: answered, filtered and explained as any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from demo_server import DemoServer, serving

from lvlm_probe.errors import StudyError
from lvlm_probe.serving.measuring import QUESTION
from lvlm_probe.study.results import collect
from lvlm_probe.study.run.runner import run_study
from lvlm_probe.study.spec import read_study

STUDY = """
models:
  here: {{source: demo}}
  big: {{server: "{url}", name: demo}}
datasets:
  scenes: {{reader: demo, source: eval, limit: 1}}
methods:
  rise: {{method: rise, params: {{masks: 8, cells: 3, size: 4}}}}
  tmm: {{}}
settings: {{grid: 4, steps: 6, max_new_tokens: 12}}
"""


def test_a_study_explains_a_model_on_a_server(behind: DemoServer, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.format(url=behind.url), encoding="utf-8")
    study = read_study(file)
    assert study.models["big"].served_model == "demo" and study.models["big"].source == behind.url
    run_study(study)
    results = collect(study)
    answers = {record["model"]: record for record in results.answers}
    assert answers["big"]["status"] == "done", answers["big"]
    assert answers["big"]["answer"].strip() == answers["here"]["answer"].strip()
    assert answers["big"]["drop"] == pytest.approx(answers["here"]["drop"], abs=1e-3)
    maps = {(record["model"], record["row"]): record for record in results.maps}
    big, here = maps["big", "rise"], maps["here", "rise"]
    assert big["status"] == "done", big
    assert big["insertion"] == pytest.approx(here["insertion"], abs=0.05)
    assert maps["big", "tmm"]["status"] == "failed" and "does not give" in maps["big", "tmm"]["reason"]
    before = behind.count
    run_study(study)
    assert behind.count == before  # all is finished: nobody is asked


def test_a_server_that_gives_too_little_for_a_study_is_asked_nothing(demo: Any, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    with serving(*demo, {"top"}) as behind:
        behind.fault = lambda number, body: "no_ids"
        file.write_text(STUDY.format(url=behind.url), encoding="utf-8")
        with pytest.raises(StudyError, match=r"model big .* a study goes by log-probabilities"):
            run_study(read_study(file))
    asked = {body["messages"][0]["content"][-1]["text"] for _, body in behind.requests if "messages" in body}
    assert asked == {QUESTION}  # what connecting asks, and no question of the study's


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("{server: 'http://x:1', source: demo}", "has a source and a server"),
        ("{source: demo, name: x}", "there is no server"),
        ("{name: x}", "there is no server"),
        ("{}", "nor a server"),
        ("{served_name: x, source: demo}", "has no 'served_name'"),
    ],
)
def test_what_does_not_name_a_model_is_said_with_its_line(model: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.format(url="http://x:1").replace("{source: demo}", model), encoding="utf-8")
    with pytest.raises(StudyError, match=f"line 3: .*{said}"):
        read_study(file)
