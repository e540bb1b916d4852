"""Models of several encoders, of the plugins in ``integrations``, on pretended cards: their parts by turns on two."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from marks import campaign
from pretend import Card, put

import lvlm_probe as probe

PLUGINS = Path(__file__).parents[2] / "integrations"


def tiny(plugin: str) -> Any:
    """The tiny models of a plugin, which is registered as its entry point does."""
    for folder in (PLUGINS / plugin, PLUGINS / plugin / "tests"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    importlib.import_module(f"lvlm_probe_{plugin}").register()
    return importlib.import_module(f"{plugin}_tiny")


def spread(model: Any, count: int) -> None:
    """Parts by turns on so many cards, layers of the decoder too: as ``device_map="auto"`` may cut it."""
    from accelerate import dispatch_model

    decoder = model.model.language_model
    parts = [f"model.{name}" for name, _ in model.model.named_children() if name != "language_model"]
    parts += [f"model.{name}" for name, _ in model.model.named_parameters(recurse=False)]
    rest = [f"model.language_model.{name}" for name, _ in decoder.named_children() if name != "layers"]
    layers = [f"model.language_model.layers.{number}" for number in range(len(decoder.layers))]
    places = {path: number % count for number, path in enumerate(parts)}
    places |= {path: (number + 1) % count for number, path in enumerate([*rest, "lm_head", *layers])}
    for path, card in places.items():
        parent, _, name = path.rpartition(".")
        held = model.get_submodule(parent)._parameters
        if name in held:
            held[name] = type(held[name])(held[name].detach().to(f"cuda:{card}"), requires_grad=False)
        else:
            put(model.get_submodule(path), f"cuda:{card}")
    dispatch_model(model, {path: f"cuda:{card}" for path, card in places.items()}, main_device="cuda:0")


def road(plugin: str, count: int, folder: Path) -> dict[str, Any]:
    """What is recorded, and what methods find that look into the decoder, into an encoder, and at masked images."""
    module = tiny(plugin)
    model, processor = module.build("hd") if plugin == "mini_gemini" else module.build()
    if count:
        spread(model, count)
    with probe.attach(model, processor) as attached, attached.record(folder, baseline="blank") as recording:
        inputs = module.inputs(processor, module.picture()).to("cuda:0" if count else "cpu")
        model.generate(**inputs, min_new_tokens=4, max_new_tokens=4, do_sample=False)
    assert not recording.faults
    (trace,) = recording.traces
    replay = probe.replay(trace, model, processor)
    found = {"log_probs": trace.log_probs, "llr": trace.llr, "rows": trace.attention.values}
    for method, params in {"tmm": {}, "gradcam": {"encoder": 0}, "integrated_gradients": {"steps": 2}}.items():
        found[method] = probe.explain(replay, method=method, tokens=(0, 3), strengthen=False, **params).values
    found["evaluate"] = [probe.evaluate(probe.explain(replay, method="center"), replay, steps=3).insertion]
    return found


@pytest.mark.parametrize(
    ("plugin", "count"), [("mini_gemini", 2), ("cambrian", 2), *campaign(("mini_gemini", 1), ("cambrian", 1))]
)
def test_several_encoders_on_cards(plugin: str, count: int, tmp_path: Path) -> None:
    there = road(plugin, 0, tmp_path / "cpu")
    with Card(count=count, float64=False) as card:
        here = road(plugin, count, tmp_path / "device")
    assert not card.mixed and not card.doubles and min(card.peak) > 0
    for step, value in there.items():
        np.testing.assert_allclose(np.asarray(here[step]), np.asarray(value), atol=2e-3, err_msg=step)
