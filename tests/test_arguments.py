"""What is not of the kind that a public function asks for is named, in whichever of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy_replay import ToyReplay

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError, ProbeError, ReplayError, SelectionError
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.kinds import naming_arguments

KINDS = ("Replay", "Trace", "Heatmap", "HeatGrid", "OfVideo", "AnswerBox", "Image.Image")
ROOMS = (probe, probe.causal, probe.evidence, probe.metrics, probe.sanity, probe.video)


def asked(room: ModuleType) -> list[Any]:
    """Functions of a room, and their parameters that are of our own kinds."""
    found = []
    for name in room.__all__:
        function = getattr(room, name)
        if inspect.isfunction(function):
            for parameter in inspect.signature(function).parameters.values():
                required = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
                if required and any(kind in str(parameter.annotation) for kind in KINDS):
                    place = f"{room.__name__.partition('.')[2]}.{name}, {parameter.name}"
                    found.append(pytest.param(function, parameter.name, id=place.lstrip(".")))
    return found


@pytest.mark.parametrize(("function", "parameter"), [each for room in ROOMS for each in asked(room)])
@pytest.mark.parametrize("wrong", [None, "a text", 3], ids=["None", "text", "number"])
def test_a_wrong_kind_is_told(function: Any, parameter: str, wrong: Any, tmp_path: Any) -> None:
    replay = ToyReplay(torch.ones(4, 4))
    heat = probe.explain(replay, method="center")  # type: ignore[arg-type]
    others = {
        "replay": replay, "heat": heat, "first": heat, "second": heat, "source": replay, "out": tmp_path / "page.html",
        "region": np.ones((4, 4), bool), "image": Image.new("RGB", (4, 4)),
    }  # fmt: skip
    required = [one.name for one in inspect.signature(function).parameters.values() if one.default is one.empty]
    given = {name: others.get(name) for name in required if name not in ("params", "options", "settings")}
    with pytest.raises(ProbeError):
        function(**{**given, parameter: wrong})


@pytest.mark.quick
def test_what_is_said() -> None:
    @naming_arguments
    def shown(heat: Heatmap, others: Sequence[Heatmap] = (), image: Image.Image | None = None) -> None:
        if heat == "broken":
            raise ProbeError("known")
        _ = heat.values, [one.values for one in others], image.size  # type: ignore[union-attr]

    with pytest.raises(ExplainError, match=r"shown\(\): heat is a heatmap, probe.explain\(replay\); got a NoneType"):
        shown(None)  # type: ignore[arg-type]
    heat = probe.explain(ToyReplay(torch.ones(4, 4)), method="center")  # type: ignore[arg-type]
    with pytest.raises(ExplainError, match=r"others is several of them, each a heatmap.*got a list"):
        shown(heat, [heat, 3])  # type: ignore[list-item]
    with pytest.raises(ExplainError, match=r"image is an image.*got a str"):
        shown(heat, image="cat.png")  # type: ignore[arg-type]
    with pytest.raises(AttributeError):  # nothing is wrong with what was given
        shown(heat)
    with pytest.raises(ProbeError, match=r"^known$"):
        shown("broken")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="missing"):
        shown()  # type: ignore[call-arg]


@pytest.fixture(scope="module")
def answer(demo: Any, tmp_path_factory: Any) -> Any:
    scene = probe.demo.scenes(1)[0]
    return probe.ask(*demo, scene.image, scene.question, out=tmp_path_factory.mktemp("answer"))


OTHERS: list[tuple[Any, dict[str, Any], str]] = [
    (probe.evaluate, {"mode": ["fast"]}, r"mode is 'fast' or 'exact'; got \['fast'\]"),
    (probe.evaluate, {"synergy": 3.5}, "synergy is True or False or a text; got a float"),
    (probe.explain, {"seed": 3.5}, "seed is a whole number; got a float"),
    (probe.explain, {"plan": "fast"}, r"plan is a plan, probe.plan\(replay\); got a str"),
    (
        probe.evidence.edit,
        {"remove": object()},
        "remove is a share of the image .* boxes in pixels or a mask; got <object",
    ),
    (probe.sanity.answers, {"progress": 3}, "progress is a function of how many are done.*; got a int"),
    (
        probe.causal.knockout,
        {"queries": 3.5},
        "queries is 'tokens' or 'answer' or 'text' or several of them",
    ),
    (probe.causal.knockout, {"tokens": 3}, r"tokens is tokens, probe.select_tokens\(trace, …\); got a int"),
    (probe.causal.logit_lens, {"top": -1}, "top is a whole number of at least 1; got -1"),
    (probe.causal.logit_lens, {"top": 10**6}, "the model has .* tokens; got top=1000000"),
    (probe.causal.knockout, {"seed": -1}, r"knockout\(\): seed is a whole number of at least 0; got -1"),
    (probe.compare, {"grid": 0}, "grid is a number of cells .*; got 0"),
    (probe.compare, {"steps": -1}, "steps is a whole number of at least 1.*; got steps=-1"),
    (probe.compare, {"seed": -1}, "seed is a whole number of at least 0; got seed=-1"),
    (
        probe.edit,
        {"max_new_tokens": 0, "remove": [(0, 0, 9, 9)]},
        "max_new_tokens is a whole number of at least 1, or None",
    ),
    (probe.sanity.weights, {"blocks": []}, "blocks is empty"),
    (probe.sanity.answers, {"pool": [-1, 5]}, r"pool holds token ids, 0 to \d+; got \[-1, 5\]"),
    (probe.sanity.completeness, {"attributions": np.full((2, 2), np.nan)}, "attributions are finite numbers"),
    (probe.figure, {"dpi": "high"}, "dpi is a number; got a str"),
    (probe.figure, {"dpi": 0}, "dpi is 10 to 10,000 pixels per inch; got 0"),
    (probe.figure, {"dpi": float("nan")}, "dpi is 10 to 10,000"),
    (probe.figure, {"font_size": -1}, "font_size is 1 to 100 points; got -1"),
    (probe.figure, {"columns": 1.5}, "columns is 1 to 100 panels side by side; got 1.5"),
    (probe.figure, {"columns": 90}, "no room for its panels"),
    (probe.figure, {"images": 3}, "images is several of them, each an image.*; got a int"),
    (probe.report, {"title": 3}, "title is a text; got a int"),
    (probe.open_trace, {"row": "1"}, "row is a whole number; got a str"),
    (probe.select_tokens, {"words": 3}, "words is a text or several of them, each a text; got a int"),
    (
        probe.select_tokens,
        {"stop_words": 3.5},
        "stop_words is True or False or several of them.*; got a float",
    ),
    (probe.select_tokens, {"stop_words": 3}, "stop_words is True or False or several of them.*; got a int"),
    (probe.metrics.paired_difference, {"level": "high"}, "level is a number; got a str"),
    (probe.metrics.permutation_test, {"resamples": [5]}, "resamples is a whole number; got a list"),
    (probe.metrics.boxes_to_mask, {"boxes": None}, r"boxes is boxes \(left, top, right, bottom\); got a NoneType"),
    (probe.metrics.boxes_to_mask, {"size": 7}, "size is several of them, each a whole number; got a int"),
    (probe.metrics.tube_mask, {"boxes": [(0, 0, 1, 1)]}, "boxes is boxes by frame, {0: .*}; got a list"),
]


@pytest.mark.parametrize(("function", "wrong", "message"), OTHERS, ids=[f"{f.__name__}-{[*w]}" for f, w, _ in OTHERS])
def test_an_option_of_a_wrong_kind_is_told(
    function: Any, wrong: dict[str, Any], message: str, answer: Any, tmp_path: Any
) -> None:
    replay = answer.replay
    heat = probe.explain(replay, method="center")
    has = {
        "replay": replay, "heat": heat, "heats": heat, "trace": answer.trace, "out": tmp_path / "page.html",
        "path": answer.trace.path, "first": [0.1, 0.4, 0.3], "second": [0.2, 0.3, 0.1],
        "frames": 3, "size": (4, 4), "boxes": [], "sources": replay, "indices": [0], "attributions": np.ones(4),
    }  # fmt: skip
    parameters = inspect.signature(function).parameters.values()
    given = {one.name: has[one.name] for one in parameters if one.default is one.empty and one.name in has}
    with pytest.raises(ExplainError, match=message):
        function(**{**given, **wrong})


def test_a_switch_is_no_text(answer: Any, demo: Any, tmp_path: Any) -> None:
    """Which would be one that is on, whatever it says."""
    heat = probe.explain(answer.replay, method="center")
    with pytest.raises(ExplainError, match=r"explain\(\): strengthen is True or False; got 'no'"):
        probe.explain(answer.replay, strengthen="no")  # type: ignore[arg-type]
    with pytest.raises(ExplainError, match="contour is True or False; got None"):
        heat.overlay(contour=None)  # type: ignore[arg-type]
    with probe.attach(*demo) as attached:
        with pytest.raises(ExplainError, match=r"record\(\): attention is True or False; got 'mean'"):
            attached.record(tmp_path, attention="mean")  # type: ignore[arg-type]
    assert heat.overlay(contour=np.bool_(False)).tobytes() == heat.overlay(contour=0).tobytes()  # type: ignore[arg-type]


def test_numbers_out_of_range_are_told(answer: Any) -> None:
    replay, heat = answer.replay, probe.explain(answer.replay, method="center")
    for given, message in (
        ({"indices": [0.5]}, "token numbers are 0 to"),
        ({"span": (0.5, 2)}, r"a span is \(start, stop\)"),
        ({"stop_words": "the"}, "stop_words is True, False or several words; got 'the'"),
    ):
        with pytest.raises(SelectionError, match=message):
            probe.select_tokens(replay, **given)
    for wrong in ([], [-1], [99], [0.5]):
        with pytest.raises(ExplainError, match="indices are tokens 0 to"):
            probe.sanity.completeness(np.ones(4), replay, wrong)
        with pytest.raises(ReplayError, match="steps are tokens 0 to"):
            replay.log_probs(torch.ones(1, 4, 4), steps=wrong)
        if wrong:
            with pytest.raises(ReplayError, match="steps are tokens 0 to"):
                replay.strengthened(wrong)
    for below in (-0.1, 1.5, float("nan")):
        with pytest.raises(ReplayError, match="below is a probability"):
            replay.strengthened([0], below=below)
    for noise in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ReplayError, match="noise is a standard deviation"):
            replay.log_probs(torch.ones(1, 4, 4), noise=noise)
    for side in (0, -1, float("nan")):
        with pytest.raises(ExplainError, match="side is a number of pixels"):
            heat.preview(side)
    assert probe.select_tokens(replay, indices=torch.tensor([1, 0])).indices == (0, 1)
