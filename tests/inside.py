"""Recorded answers of the tiny models, once per session, and attention as an eager model's own autograd sees it."""

from __future__ import annotations

import copy
import functools
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_models
import torch
from torch import Tensor

import lvlm_probe as probe

__all__ = [
    "QUESTION", "SPAN", "Dense", "Scored", "answering", "chefer", "dense", "other_ids", "record", "replay", "trace",
]  # fmt: skip

QUESTION = "What is this?"
SPAN = (1, 4)
"""The answer tokens that are explained: several, and not the first."""

_DIRECTORY = tempfile.TemporaryDirectory(prefix="lvlm_probe_inside_")


def record(
    name: str, model: Any, processor: Any, *, images: int = 1, tokens: int = 5, question: str = QUESTION, **options: Any
) -> Any:
    """One recorded answer of a model on pictures of 90 × 60."""
    directory = tempfile.mkdtemp(dir=_DIRECTORY.name)
    settings = {"points": ["hidden"], "heads": "all", "question": question, **options}
    with probe.attach(model, processor) as p, p.record(directory, **settings) as recording:
        pictures = [tiny_models.picture(seed=seed) for seed in range(images)]
        inputs = tiny_models.inputs(name, model, processor, pictures, question).to(model.dtype)
        model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    (made,) = recording.traces
    return made


@functools.cache
def _recorded(name: str, images: int, attention: str) -> tuple[Any, Any, Any]:
    model, processor = tiny_models.build(name, attn_implementation=attention)
    if attention == "eager":  # the same answer, whatever it would say itself
        return _recorded(name, images, "sdpa")[0], model, processor
    return record(name, model, processor, images=images), model, processor


def trace(name: str, *, images: int = 1) -> Any:
    """What was recorded, opened afresh."""
    made = _recorded(name, images, "sdpa")[0]
    return probe.open_trace(Path(made.path), made.row)


def replay(name: str, *, images: int = 1, attention: str = "sdpa") -> Any:
    """A fresh replay; the model below it is shared and must be left as it is."""
    return probe.replay(*_recorded(name, images, attention))


def answering(replay: Any, ids: Sequence[int]) -> Any:
    """A view of a replay in which the same prompt was answered by other tokens, which no trace has."""
    other = copy.copy(replay)
    other._token_ids, other._tokens = torch.tensor(ids), tuple(str(token) for token in ids)
    other._ask(other._prompt, other._sequence)
    return other


def other_ids(replay: Any, *lengths: int) -> list[tuple[int, ...]]:
    """Alternatives of so many tokens, none of them said."""
    said = replay.token_ids.tolist()
    drawn = [token for token in range(300, 400) if token not in said]
    return [tuple(drawn[7 * n : 7 * n + length]) for n, length in enumerate(lengths)]


@dataclass
class Dense:
    """One call of an attention layer of an eager model: A and dA, ``(batch, head, query, key)``."""

    module: str
    start: int
    weights: Tensor
    gradient: Tensor | None = None


@dataclass
class Scored:
    """All calls of one pass, in order, and the score that was differentiated."""

    calls: list[Dense] = field(default_factory=list)
    score: float = 0.0

    def of(self, part: str) -> list[Dense]:
        return [call for call in self.calls if call.module.startswith(part)]


@contextmanager
def _seen(model: Any, scale: Mapping[str, float]) -> Iterator[list[tuple[str, Tensor]]]:
    """Every attention map of an eager model, kept by its own modeling files' functions; some scaled by a factor."""
    names = {id(module): name for name, module in model.named_modules()}
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    files = {file for file in files if hasattr(file, "eager_attention_forward")}
    own = {file: file.eager_attention_forward for file in files}
    calls: list[tuple[str, Tensor]] = []

    def spying(original: Any) -> Any:
        def attend(module: Any, *args: Any, **kwargs: Any) -> Any:
            output, weights = original(module, *args, **kwargs)
            if names[id(module)] in scale:
                weights = weights * scale[names[id(module)]]
                value = args[2].repeat_interleave(weights.shape[1] // args[2].shape[1], dim=1)
                output = (weights @ value).transpose(1, 2).contiguous()
            if weights.requires_grad:
                weights.retain_grad()
            calls.append((names[id(module)], weights))
            return output, weights

        return attend

    try:
        for file in files:
            file.eager_attention_forward = spying(own[file])
        yield calls
    finally:
        for file in files:
            file.eager_attention_forward = own[file]


def dense(
    replay: Any,
    indices: Any = range(*SPAN),
    inputs: Mapping[str, Tensor] | None = None,
    scale: Mapping[str, float] | None = None,
) -> Scored:
    """A and dA of every layer: ``attn_implementation="eager"``, ``retain_grad()``, ``backward()``.

    Args:
        replay: of a model that was built with eager attention.
        indices: answer tokens whose log-likelihood is differentiated.
        inputs: pixel inputs, by default the whole picture's.
        scale: attention modules whose weights are multiplied by a number.
    """
    given = dict(replay.path.inputs if inputs is None else inputs)
    given.update({name: given[name].detach().clone().requires_grad_(True) for name in replay.path.pixel_keys})
    with replay.replica.use() as model, _seen(model, scale or {}) as calls, torch.enable_grad():
        score = replay.run_inputs(given)[0, list(indices)].sum()
        score.backward()
    found = Scored(score=score.item())
    ends: dict[str, int] = {}
    for name, weights in calls:
        start = ends.get(name, 0)
        ends[name] = start + weights.shape[2]
        found.calls.append(Dense(name, start, weights.detach(), weights.grad))
    return found


def chefer(maps: list[Tensor]) -> Tensor:
    """(I + Ā_L) … (I + Ā_1), the textbook product; ``maps`` lowest layer first, ``(token, token)`` each."""
    result = torch.eye(len(maps[0]), dtype=torch.float64)
    for bar in maps:
        result = result + bar @ result
    return result


def own_passes(replay: Any, method: str, **params: Any) -> dict[str, int]:
    """Passes of a method itself, on a replay that it has explained before: words are chosen by then, gradients are
    checked, and all that is found out once is known."""
    heat = probe.explain(replay, method=method, tokens=SPAN, strengthen=False, **params)
    passes: dict[str, int] = heat.provenance["passes"]
    return passes
