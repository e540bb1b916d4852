"""Models with their questions, what they answer when nobody disturbs them, and what may hang on them afterwards."""

from __future__ import annotations

import functools
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import torch
from PIL import Image

import lvlm_probe as probe
from lvlm_probe.models.prompts import chat_inputs, placed

__all__ = ["METHODS", "Stage", "differences", "same_output", "stage", "state_of"]

METHODS: dict[str, dict[str, Any]] = {
    "igos++": {},
    "gradcam": {},
    "tmm": {},
    "iia": {},
    "input_gradient": {},
    "integrated_gradients": {"steps": 8},
    "occlusion": {"patch": 3, "stride": 3},
    "rise": {"masks": 64},
    "rollout": {},
    "attention": {},
    "tam": {},
}
"""Methods and the settings under which each takes well below a second on a small model."""

SPAN = (1, 4)


@dataclass
class Stage:
    """A model, and what it says to a few pictures when nothing else runs.

    Attributes:
        name: ``"demo"`` or the name of a tiny model.
        prepare: inputs for question number k, by a call of the processor.
        plain: what ``generate()`` returns for question k without any probe.
        traces: the quiet recording of question k.
        turns: held around ``generate()`` by the caller where the model's own code is not made for two at once.
    """

    name: str
    model: Any
    processor: Any
    pictures: list[Image.Image]
    prepare: Callable[[int], Any]
    turns: threading.Lock | None
    new_tokens: int = 8
    plain: list[Any] = field(default_factory=list)
    traces: list[Any] = field(default_factory=list)
    log_probs: list[Any] = field(default_factory=list)
    _maps: dict[tuple[int, str], Any] = field(default_factory=dict)

    def generate(self, k: int, inputs: Any = None) -> Any:
        """The user's own call."""
        given = self.prepare(k) if inputs is None else inputs
        return self.model.generate(
            **given, max_new_tokens=self.new_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
        )

    def replay(self, k: int) -> Any:
        """A fresh replay of the quiet recording."""
        return probe.replay(self.traces[k], self.model, self.processor)

    def quiet_map(self, k: int, method: str) -> tuple[Any, Any]:
        """Heatmap and score of a fresh replay when nothing else runs."""
        if (k, method) not in self._maps:
            heat = probe.explain(self.replay(k), method=method, tokens=SPAN, **METHODS[method])
            self._maps[k, method] = heat, probe.evaluate(heat, self.replay(k), steps=8)
        found: tuple[Any, Any] = self._maps[k, method]
        return found


def same_output(one: Any, other: Any) -> bool:
    """Whether two results of ``generate()`` are equal bit for bit, sequences and logits."""
    return (
        torch.equal(one.sequences, other.sequences)
        and len(one.logits) == len(other.logits)
        and all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))
    )


@functools.cache
def stage(name: str, questions: int = 4) -> Stage:
    """Build a stage; once per process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if name == "demo":
        model, processor = probe.demo.load()
        scenes = probe.demo.scenes(questions)
        found = Stage(
            name, model, processor, [scene.image for scene in scenes],
            lambda k: placed(chat_inputs(processor, [scenes[k].image], scenes[k].question), model), None,
        )  # fmt: skip
    else:
        model, processor = tiny_models.build(name)
        pictures = [tiny_models.picture(90 + 14 * k, 60, seed=k) for k in range(questions)]
        found = Stage(
            name, model, processor, pictures,
            lambda k: tiny_models.inputs(name, model, processor, [pictures[k]], "What is this?"), threading.Lock(),
        )  # fmt: skip
    found.plain = [found.generate(k) for k in range(questions)]
    folder = tempfile.mkdtemp(prefix="lvlm_probe_stage_")
    with probe.attach(found.model, found.processor) as p, p.record(folder) as recording:
        for k in range(questions):
            found.generate(k)
    found.traces = recording.traces
    assert len(found.traces) == questions, recording.faults
    return found


def state_of(model: Any, processor: Any = None) -> dict[str, Any]:
    """All that a probe could leave on a model: hooks, instance attributes, flags, attention, global switches."""
    hooks = 0
    attributes = []
    for name, module in model.named_modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            hooks += len(getattr(module, kind))
        attributes += [f"{name}.{key}" for key in vars(module) if callable(vars(module)[key])]
    attention = {
        f"{type(config).__name__}{place}": getattr(config, "_attn_implementation", None)
        for place, config in enumerate(_configs(model))
    }
    parts = [getattr(processor, name, None) for name in ("image_processor", "tokenizer", "video_processor")]
    return {
        "hooks": hooks,
        "instance attributes": sorted(attributes),
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": sum(parameter.grad is not None for parameter in model.parameters()),
        "training": [module.training for module in model.modules()],
        "attention": attention,
        "configs": [type(config).__name__ for config in _configs(model)],
        "processor": [sorted(vars(part)) for part in (processor, *parts) if part is not None],
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": str(torch.get_default_dtype()),
        "parameters": _digest(model),
    }


def _configs(model: Any) -> list[Any]:
    found = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return list(found.values())


def _digest(model: Any) -> float:
    """A figure that changes when any weight does."""
    with torch.no_grad():
        return float(sum(float(parameter.double().abs().sum()) for parameter in model.parameters()))


def differences(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What of a state is not as it was, in words; empty when all is."""
    found = []
    for name, value in before.items():
        if after[name] != value:
            said = f"{value!r} -> {after[name]!r}" if len(repr(value)) < 60 else _lists(value, after[name])
            found.append(f"{name}: {said}")
    return "; ".join(found)


def _lists(before: Any, after: Any) -> str:
    if isinstance(before, list) and isinstance(after, list) and all(isinstance(one, str) for one in before + after):
        return f"new {sorted(set(after) - set(before))[:4]}, gone {sorted(set(before) - set(after))[:4]}"
    return "changed"


def picture_number(pictures: list[Image.Image], found: Image.Image) -> int | None:
    """Which of the pictures a recorded one is."""
    for k, picture in enumerate(pictures):
        if picture.size == found.size and np.array_equal(np.asarray(picture.convert("RGB")), np.asarray(found)):
            return k
    return None


def scratch(prefix: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"lvlm_probe_{prefix}_"))
