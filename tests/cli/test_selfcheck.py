"""``lvlm-probe selfcheck``: the checks of a model on built-in images, the page to send, and going on after a stop."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from command_line import Result, run

import lvlm_probe as probe
from lvlm_probe.cli.shared import selfcheck as work
from lvlm_probe.errors import OutOfMemory
from lvlm_probe.pages.selfcheck_page import checks
from lvlm_probe.planning import Meter

Checked = tuple[Path, Path, Result]


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    """The embedded model in a folder whose name is nobody's business, checked once."""
    place = tmp_path_factory.mktemp("selfcheck")
    model = place / "home of ada" / "my-model"
    shutil.copytree(probe.demo.path(), model)
    with mock.patch.object(work, "questions", return_value=questions(1)):
        return model, place / "out", run("selfcheck", model, "--quick", "--out", place / "out")


def questions(count: int, photographs: int = 1) -> list[work.Asked]:
    found = work.Asked
    drawn = [one for one in ALL if one.region is not None][:count]
    assert all(isinstance(one, found) for one in drawn)
    return drawn + [one for one in ALL if one.region is None][:photographs]


ALL = work.questions()


def stored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "selfcheck.json").read_text("utf-8"))  # type: ignore[no-any-return]


def test_a_sound_model_passes_and_its_figures_are_measured(checked: Checked) -> None:
    _, out, result = checked
    assert result.code == 0, result.out + result.err
    record = stored(out)
    assert record["finished"] and record["model"]["parameters"] > 1e6
    scene = record["units"]["answer scene 0"]
    assert scene["right"] and scene["same"] and scene["difference"] < 1e-4
    assert scene["pointing"] == 1 and scene["gain"] > 0.8 and scene["trusted"]
    assert "".join(before + word for before, word, _ in scene["words"]) == scene["answer"]
    gradient = record["units"]["gradient"]
    assert gradient["gradient"] == pytest.approx(gradient["difference"], rel=0.1)
    method = record["units"]["method integrated_gradients"]
    assert (method["forward"], method["backward"]) == (method["planned"]["forward"], method["planned"]["backward"])
    assert method["peak"] == pytest.approx(method["planned"]["peak"], rel=0.1)
    assert "method rise" not in record["units"]  # not with --quick
    named = {one.name: one for one in checks(record)}
    assert named["replay"].passed and named["gradient"].passed and named["methods"].passed
    assert named["answers, scenes"].text == "1 of 1 name what is asked for"
    for name in named:
        assert name in result.out


def test_what_is_sent_holds_no_folder_and_loads_nothing(checked: Checked) -> None:
    model, out, _ = checked
    for file in (out / "selfcheck.json", out / "selfcheck.html"):
        text = file.read_text("utf-8")
        assert "my-model" in text
        for private in (str(model), "home of ada", str(Path.home()), str(out), str(Path(probe.__file__).parent)):
            assert private not in text, private
    page = (out / "selfcheck.html").read_text("utf-8")
    assert "default-src 'none'" in page and not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert page.count("<article>") == 2 and page.count("<img") >= 3
    assert "replay" in page and "integrated_gradients" in page


def test_the_same_command_makes_only_what_is_missing(
    checked: Checked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, out, _ = checked
    out = shutil.copytree(out, tmp_path / "out")
    before = stored(out)
    monkeypatch.setattr(work, "questions", lambda *, quick: questions(1))
    monkeypatch.setattr(work, "ask", lambda *_, **__: pytest.fail("it was asked again"))
    made: list[str] = []
    real = work.explain_one

    def explain_one(replay: Any, selection: Any, label: str, settings: Any, *rest: Any, **more: Any) -> Any:
        made.append(settings.method)
        return real(replay, selection, label, settings, *rest, **more)

    monkeypatch.setattr(work, "explain_one", explain_one)
    units = {key: unit for key, unit in before["units"].items() if key != "method tmm"}
    units["gradient"] = {"fault": "", "gradient": None, "difference": None, "noise": None}  # of slopes that are NaN
    (out / "selfcheck.json").write_text(json.dumps(before | {"units": units}))
    result = run("selfcheck", model, "--quick", "--out", out)
    assert result.code == 0, result.err
    assert made == ["tmm"]
    assert re.search("gradient +not a number", result.out)
    assert stored(out)["units"].keys() == before["units"].keys()
    monkeypatch.setattr(work, "pace", lambda *_: pytest.fail("passes were timed for nothing"))
    again = run("selfcheck", model, "--quick", "--out", out)
    assert again.code == 0 and "method tmm" in again.out and made == ["tmm"]


def test_another_precision_is_another_check(checked: Checked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, out, _ = checked
    shutil.copytree(out, tmp_path / "out")
    monkeypatch.setattr(work, "questions", lambda *, quick: questions(1, 0))
    monkeypatch.setattr(work, "methods", lambda: ["center"])
    curves, score = [], work.score_one
    monkeypatch.setattr(work, "score_one", lambda *args, **how: curves.append(how["curve"]) or score(*args, **how))
    result = run("selfcheck", model, "--quick", "--dtype", "bfloat16", "--out", tmp_path / "out", "--json")
    assert [(curve.tolerance, curve.tie_orders) for curve in curves] == [(0.02, 1)]  # quick: by few points
    record = stored(tmp_path / "out")
    assert record["model"]["dtype"] == "bfloat16" and set(record["units"]) == {
        *("answer scene 0", "gradient", "method center")
    }
    unit = record["units"]["answer scene 0"]
    assert unit["same"] and unit["right"]
    assert {one["name"]: one["passed"] for one in result.json["checks"]}["replay"] is True


def test_a_model_in_the_folder_where_one_stands(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out, _ = checked
    monkeypatch.chdir(model)
    monkeypatch.setattr(work, "questions", lambda *, quick: [])
    result = run("selfcheck", ".", "--quick", "--out", out.parent / "here")
    assert result.code == 0, result.out + result.err
    assert stored(out.parent / "here")["model"]["name"] == "my-model"


def test_a_model_whose_gradients_stop_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, processor = probe.demo.load()
    tower = model.model.vision_tower
    tower.forward = torch.no_grad()(tower.forward)
    monkeypatch.setattr(work, "load_model", lambda *_, **__: (model, processor))
    monkeypatch.setattr(work, "questions", lambda *, quick: questions(1, 0))
    monkeypatch.setattr(work, "methods", lambda: ["gradcam", "center"])
    result = run("selfcheck", "demo", "--out", tmp_path)
    assert result.code == 1
    record = stored(tmp_path)
    found = {one.name: one for one in checks(record)}
    assert found["replay"].passed and "vision_tower" in record["units"]["answer scene 0"]["reason"]
    assert found["gradient"].passed is False and "vision_tower" in found["gradient"].text
    assert "1 of 2 methods made a map" in found["methods"].text and "gradcam (" in found["methods"].text


def test_a_stop_keeps_what_is_there_and_its_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(work, "questions", lambda *, quick: questions(2, 0))
    real, asked = work.ask, []

    def ask(*arguments: Any, **options: Any) -> Any:
        if asked:
            raise KeyboardInterrupt
        asked.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(work, "ask", ask)
    result = run("selfcheck", "demo", "--quick", "--out", tmp_path)
    assert result.code == 130 and "1 checks are kept" in result.err
    record = stored(tmp_path)
    assert list(record["units"]) == ["answer scene 0"] and not record["finished"]
    assert "not finished" in (tmp_path / "selfcheck.html").read_text("utf-8")


def test_a_stop_while_the_model_is_loaded_keeps_what_an_earlier_run_has_written(
    checked: Checked, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out, _ = checked
    before = stored(out)
    monkeypatch.setattr(work, "load_model", mock.Mock(side_effect=KeyboardInterrupt))
    result = run("selfcheck", model, "--quick", "--out", out)
    assert result.code == 130 and "stopped before the first check" in result.err
    assert stored(out) == before and before["units"]


def test_a_stop_between_answer_and_map_keeps_the_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(work, "questions", lambda *, quick: questions(1, 0))
    monkeypatch.setattr(work, "methods", lambda: ["center"])

    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(work, "explain_one", stopped)
        assert run("selfcheck", "demo", "--quick", "--out", tmp_path).code == 130
    answered = stored(tmp_path)["units"]["answer scene 0"]
    assert answered["right"] and "gain" not in answered
    monkeypatch.setattr(work, "ask", lambda *_, **__: pytest.fail("it was asked again"))
    assert run("selfcheck", "demo", "--quick", "--out", tmp_path).code == 0
    unit = stored(tmp_path)["units"]["answer scene 0"]
    assert unit["gain"] > 0.8 and unit["trace"] == answered["trace"] and "begun" not in unit


def test_where_memory_is_not_metered_methods_are_judged_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Meter, "counts", staticmethod(lambda device: False))
    monkeypatch.setattr(work, "questions", lambda *, quick: questions(1, 0))
    monkeypatch.setattr(work, "methods", lambda: ["input_gradient"])
    assert run("selfcheck", "demo", "--out", tmp_path).code == 0
    method = stored(tmp_path)["units"]["method input_gradient"]
    assert "refused" not in method and method["gain"] is not None and method["peak"] is None


@pytest.mark.parametrize("where", ["pace", "replay"])
def test_memory_that_runs_out_between_checks_leaves_the_others(
    where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """While passes are timed it is for each method to say what it takes; without a replay there are no methods."""
    replays, real = [], work.replay

    def full(*arguments: Any, **options: Any) -> Any:
        if where == "pace" or replays:
            raise OutOfMemory("one mask does not fit")
        replays.append(real(*arguments, **options))
        return replays[-1]

    monkeypatch.setattr(work, where, full)
    monkeypatch.setattr(work, "questions", lambda *, quick: questions(1, 0))
    monkeypatch.setattr(work, "methods", lambda: ["center"])
    result = run("selfcheck", "demo", "--quick", "--out", tmp_path)
    units = stored(tmp_path)["units"]
    assert units["answer scene 0"]["gain"] > 0.8 and (tmp_path / "selfcheck.html").is_file()
    if where == "pace":
        assert result.code == 0 and units["method center"]["gain"] is not None
    else:
        assert result.code == 1 and units["methods"] == {"problem": "one mask does not fit"}


@pytest.mark.quick
def test_a_model_that_is_not_there_is_a_finding(tmp_path: Path) -> None:
    result = run("selfcheck", tmp_path / "nothing", "--out", tmp_path / "out")
    assert result.code == 1
    assert any(one.passed is False for one in checks(stored(tmp_path / "out")))
    assert (tmp_path / "out" / "selfcheck.html").is_file()


@pytest.mark.quick
def test_checks_name_what_failed() -> None:
    unit = {"right": True, "difference": 1e-6, "allowed": 1e-4, "same": True, "gain": 0.9, "trusted": True}
    record: dict[str, Any] = {"findings": [], "finished": True, "units": {"answer scene 0": unit}}
    assert all(one.passed is not False for one in checks(record))
    off = copy.deepcopy(record)
    off["units"]["answer scene 1"] = {**unit, "difference": 0.3, "same": False}
    replay = next(one for one in checks(off) if one.name == "replay")
    assert replay.passed is False and "0.3 nats" in replay.text
    nan = copy.deepcopy(record)
    nan["units"]["answer scene 1"] = {**unit, "difference": None, "same": False}
    assert "no number" in next(one for one in checks(nan) if one.name == "replay").text
    broken = copy.deepcopy(record)
    broken["units"]["method tmm"] = {"problem": "something unexpected happened, KeyError: 'x'"}
    assert ("method tmm", False) in [(one.name, one.passed) for one in checks(broken)]


@pytest.mark.quick
def test_answers_are_right_that_name_each_thing() -> None:
    asked = work.Asked("scene", ALL[0].image, "?", (("red",), ("cat", "kitten")), None, "")
    assert asked.is_right("Red kittens.") and asked.is_right("a cat, red")
    assert not asked.is_right("a red dog") and not asked.is_right("a tired cat")
