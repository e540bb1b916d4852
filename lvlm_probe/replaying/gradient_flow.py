"""Check that the score's gradient arrives at the image whole, told from an image that plays no part.

Kernels for inference compute without autograd, and towers run under ``no_grad``: what goes through them is missing from
every gradient, without an error where another way (a residual) leads round them. Before the first gradient of a replay,
the slope of the answer's log-likelihood along one direction of the mask is therefore measured twice: by a backward
pass, and by a finite difference. In the same passes every module is asked whether it was given something that carries a
gradient and gave something that carries none, though it changes with the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lvlm_probe.errors import ProbeError
from lvlm_probe.hooks import HookSet
from lvlm_probe.models.exhaustion import ran_out
from lvlm_probe.models.replica import Replica
from lvlm_probe.replaying.isolation import autocast_dtype
from lvlm_probe.replaying.protocol import ReplayLike

_AGREE = 0.1
"""Slopes that differ by less of their size are the same one: what a finite difference may leave out by curvature."""
_AGREE_CUT = 0.02
"""The same where a module is known to hand on no gradient."""
_STEPS = 5
"""Finite differences at most, each over a quarter of the step before."""
_ROUNDINGS = 16.0
"""Units of rounding by which one log-probability may be off, per 1 + |log P|."""


@dataclass(frozen=True)
class GradientCheck:
    """The slope of an answer's log-likelihood along one direction of the mask, measured twice, in nats.

    Attributes:
        fault: what is wrong, with the layer where gradients stop, and methods that need none; empty for nothing.
        gradient: by a backward pass; NaN where there is none.
        difference: by the last finite difference that was taken; NaN where none was.
        noise: what rounding in the model's dtype may add to that.
    """

    fault: str = ""
    gradient: float = math.nan
    difference: float = math.nan
    noise: float = math.nan


def gradient_check(replay: ReplayLike, replica: Replica, decoder: str) -> GradientCheck:
    """Compare the gradients of a replay with finite differences.

    Costs three forward passes and a backward pass, and two forward passes more for each smaller step where the slopes
    differ.

    Args:
        replay: whose score is differentiated.
        replica: the model that its passes run on.
        decoder: path of the decoder.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2, 1, replay.n_images, 5, 6)
    # Inside [0, 1] with room on both sides, and towards the image everywhere: a slope that adds up.
    drawn, direction = torch.rand(shape, generator=generator, dtype=torch.float32).to(replay.device)
    base, direction = 0.3 + 0.4 * drawn, 0.5 + 0.5 * direction
    with replica.use() as model:  # held throughout: what is compared are passes of one and the same model
        rounding = _rounding(model, replay.device)
        step = min(0.2, 4 * rounding ** (1 / 3))
        return _compared(replay, _Modules(model, decoder), base, direction, step, rounding)


def _compared(
    replay: ReplayLike, modules: _Modules, base: torch.Tensor, direction: torch.Tensor, step: float, rounding: float
) -> GradientCheck:
    """Whether both slopes at ``base`` along ``direction`` are one."""
    try:
        with modules.followed():
            _, slopes = replay.score_and_grad(base, lambda log_probs: log_probs.sum(dim=1))
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, ProbeError) or ran_out(error):
            raise
        with torch.no_grad():
            replay.log_probs(base)  # raises by itself where gradients are not what is wrong
        reason = str(error).strip().splitlines()[0]
        detail = "" if "does not require grad" in reason else f" ({reason})"
        return GradientCheck(_sentence(replay, modules, modules.stop(), detail))

    noise = math.nan

    def slope(step: float) -> float:
        nonlocal noise
        with torch.no_grad(), modules.compared():
            ends = [replay.log_probs(base + sign * step * direction)[0].cpu().double() for sign in (1, -1)]
        noise = _ROUNDINGS * rounding * float((1 + ends[0].abs()).sum()) / step
        return float((ends[0] - ends[1]).sum()) / (2 * step)

    expected = float((slopes.cpu().double() * direction.cpu()).sum())
    if not math.isfinite(expected):
        return GradientCheck(gradient=expected)  # methods say so themselves
    measured, previous, cut, told = math.nan, math.nan, "", False
    for _ in range(_STEPS):
        measured = slope(step)
        if not math.isfinite(measured):
            return GradientCheck("", expected, measured, noise)
        cut, size, off = modules.cut(), max(abs(expected), abs(measured)), abs(expected - measured)
        exact = noise <= _AGREE * size
        if off <= (_AGREE_CUT if cut else _AGREE) * size + noise and (exact or (math.isnan(previous) and not cut)):
            # What a module hands on without a gradient does not matter, or not for this answer.
            return GradientCheck("", expected, measured, noise)
        if not exact:
            told = told and off > _AGREE * size + noise  # what rounding leaves open is held against no model
            break
        told = off > _AGREE * size + 3 * (abs(measured - previous) + noise)
        previous, step = measured, step / 4  # choices among experts or positions jump: not within a step so small
    detail = f" (along the image the score rises by {measured:.3g}, by its gradient {expected:.3g})"
    return GradientCheck(_sentence(replay, modules, cut, detail) if cut or told else "", expected, measured, noise)


def _sentence(replay: ReplayLike, modules: _Modules, layer: str, detail: str) -> str:
    where = f"stop at {layer}, which computes without autograd" if layer else "are not those of its output"
    # Where image tokens lie was found by gradients of the encoder; where it was not, these methods have no map.
    layout, rows = (getattr(replay.trace, name, None) for name in ("layout", "attention"))
    placed = any(boxes is not None for boxes in (getattr(layout, "patch_box", None), getattr(rows, "key_box", None)))
    return (
        f"the gradients of {modules.name} {where}, so a map made of them would be wrong{detail}; load the model with "
        f"layers that can be differentiated, or use a method that needs no gradients: occlusion, rise, greedy"
        f"{', attention, rollout, tam' if placed else ''}"
    )


def _rounding(model: torch.nn.Module, device: torch.device) -> float:
    """The unit of rounding of what the model computes with; of bfloat16 where it is quantised."""
    if (cast := autocast_dtype(device)) is not None:
        return torch.finfo(cast).eps
    kinds = {weight.dtype for weight in model.parameters()}
    kinds |= {value.dtype for value in model.buffers() if value.dtype in (torch.int8, torch.uint8)}
    return max((torch.finfo(kind if kind.is_floating_point else torch.bfloat16).eps for kind in kinds), default=1e-7)


class _Modules:
    """What modules hand on, by the order in which they run."""

    def __init__(self, model: torch.nn.Module, decoder: str) -> None:
        self._model, self._decoder, self.name = model, decoder, type(model).__name__
        self._stopped: list[str] = []  # inner ones before the module around them
        self._arrived: list[str] = []
        self._seen: list[list[tuple[str, torch.Tensor]]] = []

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Follow gradients through the pass that runs in the block."""

        def follow(path: str, leaf: bool, args: Any, kwargs: Any, output: Any) -> None:
            given, made = list(_tensors((args, kwargs))), list(_tensors(output))
            carrying = [tensor for tensor in made if tensor.requires_grad]
            if leaf and carrying:
                carrying[0].register_hook(lambda _gradient: self._arrived.append(path))
            elif made and not carrying and any(tensor.requires_grad for tensor in given):
                self._stopped.append(path)

        with HookSet() as hooks:
            for path, module in self._model.named_modules():
                leaf = next(module.children(), None) is None
                hooks.forward(
                    module,
                    lambda _m, args, kwargs, output, path=path, leaf=leaf: follow(path, leaf, args, kwargs, output),
                    name="gradients",
                )
            yield

    @contextmanager
    def compared(self) -> Iterator[None]:
        """Note what the modules that hand on no gradient give in the passes that run in the block."""
        suspects = dict.fromkeys(self._stopped)
        seen: list[tuple[str, torch.Tensor]] = []
        with HookSet() as hooks:
            for path in suspects:
                hooks.forward(
                    self._model.get_submodule(path),
                    lambda _m, _a, _k, output, path=path: seen.extend((path, t.detach()) for t in _tensors(output)),
                    name="gradients",
                )
            yield
        half = len(seen) // 2
        self._seen += [seen[:half], seen[half:]]

    def cut(self) -> str:
        """The first module that hands on without a gradient what depends on the image."""
        first, second = self._seen[:2]
        for (path, one), (_, other) in zip(first, second, strict=True):
            if one.shape != other.shape or not torch.equal(one, other):
                return self._named(path)
        return ""

    def stop(self) -> str:
        """Where a pass stopped that could not be differentiated: the module that takes a gradient and gives none on, or
        the last one that a gradient has arrived at."""
        return self._arrived[-1] if self._arrived else self._named(self._stopped[0]) if self._stopped else ""

    def _named(self, path: str) -> str:
        """With the outermost module around it, within a tower or the decoder, that hands on no gradient either."""
        around = min(
            (
                other
                for other in self._stopped
                if f"{path}.".startswith(f"{other}.") and not f"{self._decoder}.".startswith(f"{other}.")
            ),
            key=len,
            default=path,
        )
        return path if around == path else f"{around} (first at {path})"


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
