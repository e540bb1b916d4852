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
from lvlm_probe.errors import ExplainError, ProbeError
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
