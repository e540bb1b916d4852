"""Short rehearsals of what methods do, metered on this very model, image and answer.

A pass over b masks takes ``fixed + b · per_mask`` bytes; the two are told apart by passes over two masks and over
three (a single mask often takes a shorter way through kernels). Where those do not fit, one is sent.
Methods that look inside a pass are rehearsed by such a pass and their work on one attention layer (or block), which is
then set where it hurts most: at the layer that is reached while most is still alive.

Readings are kept per model, and shared by answers of the same shape.
"""

from __future__ import annotations

import time
import weakref
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from lvlm_probe.boxes.encoder_tokens import blocks_of, encoder_tokens, encoders_of
from lvlm_probe.errors import ExplainError, OutOfMemory
from lvlm_probe.explainers.registry import Cost, Kind
from lvlm_probe.models.exhaustion import ran_out
from lvlm_probe.models.precision import sum_dtype
from lvlm_probe.planning.meter import Meter
from lvlm_probe.process import of_the_last
from lvlm_probe.replaying.hidden_states import head_rows, hidden_states, text_tokens
from lvlm_probe.replaying.micro_batches import weights_on_cards
from lvlm_probe.trace.clips import Clip, images_of

if TYPE_CHECKING:
    from lvlm_probe.replaying import Replay
    from lvlm_probe.replaying.capture import AttentionLayer

_KNOWN: weakref.WeakKeyDictionary[torch.nn.Module, OrderedDict[tuple[Any, ...], CostModel]] = (
    weakref.WeakKeyDictionary()
)
_MOST = 256
"""Costs kept for a model: those of a dozen answers by all methods. One of a score of the user's own holds that."""


@dataclass(frozen=True)
class CostModel:
    """Peak of a pass over b masks: ``fixed + b · per_mask`` bytes above what is alive anyway."""

    fixed: int
    per_mask: int

    def at(self, masks: int) -> int:
        return self.fixed + masks * self.per_mask

    def fit(self, budget: int) -> int:
        """How many masks stay within ``budget`` bytes."""
        return max(0, (budget - self.fixed) // max(1, self.per_mask))


def cost_model(replay: Replay, cost: Cost, *, target: int | Clip = 0, checkpoint: bool = False) -> CostModel:
    """Rehearses the pass of a method.

    What of the image is seen, and how a mask of each of its grids is brought to the pixels, is worked out here and kept
    by the replay, so that it is no part of the method's own peak; of grids that are drawn later it is. Where it never
    sends more than one mask at once, all is counted as one mask's.

    Args:
        replay: The answer on its model.
        cost: What the method asks of the model.
        target: Number of the image, or the clip.
        checkpoint: Layers are run again in backward.

    Raises:
        ExplainError: What the method reads cannot be read on this model.
        OutOfMemory, torch.OutOfMemoryError: Not even one mask fits.
    """
    with torch.no_grad():
        for k in images_of(target):
            replay.seen(k, (1, 1))
        for grid in cost.grids:
            replay.path.apply(_half(1, grid, target, replay.device), image=target)
    known = _KNOWN.setdefault(replay.model, OrderedDict())
    kind, several = cost.kind or "forward", max(cost.groups, default=1) > 1
    shapes = tuple((name, tuple(value.shape)) for name, value in sorted(replay.path.inputs.items()))
    grids = tuple(cost.grids[-1]), cost.drawn
    asked = (kind, bool(cost.noise), tuple(cost.parts), *grids, several, cost.joined, cost.queries)
    sent = (replay.own, replay.length, replay.prompt_length, shapes)
    searched = None if replay.reduced is None else replay.reduced.dtype
    on = (str(replay.device), next(replay.model.parameters()).dtype, searched)
    # Not when a video's frames are shown.
    key = (*asked, isinstance(target, int), images_of(target), checkpoint, *sent, *on)
    return of_the_last(known, key, lambda: _metered(replay, cost, target, kind, several, checkpoint), most=_MOST)


def _metered(replay: Replay, cost: Cost, target: int | Clip, kind: Kind, several: bool, checkpoint: bool) -> CostModel:
    """``cost_model`` by passes."""
    replay = replay.with_settings(gradient_checkpointing=checkpoint)
    rehearse = _Rehearsal(replay, target, cost)
    if kind in ("gradient", "relevance", "activations"):
        replay.require_gradients()
    with torch.no_grad():  # what is made at first use and kept is not the pass's own
        replay.log_probs(rehearse.masks(1), image=target, micro_batch=1, steps=rehearse.steps)
        if several:
            replay.path.joined({}, 2)
    kept = 0 if replay.reduced is None else replay.reduced.kept  # there beside every pass of a search
    if cost.drawn is not None:
        kept += rehearse.brought(cost.drawn)
    found = _several(rehearse, kind) if several else CostModel(0, rehearse.peak(kind, 1))
    return CostModel(kept + found.fixed, found.per_mask)


def _several(rehearse: _Rehearsal, kind: Kind) -> CostModel:
    """From two and three masks, or from one where memory runs out or all but runs out with more."""
    try:
        two = rehearse.peak(kind, 2)
        if not rehearse.cut:
            three = rehearse.peak(kind, 3)
            if not rehearse.cut:
                per_mask = max(three - two, 1)
                return CostModel(two - 2 * per_mask, per_mask)
    except Exception as error:
        if not (ran_out(error) or isinstance(error, OutOfMemory)):
            raise
    return CostModel(0, rehearse.peak(kind, 1))


def timed(
    replay: Replay, *, gradient: bool, target: int | Clip = 0, grid: tuple[int, ...] = (1, 1), masks: int = 3
) -> tuple[float, float]:
    """Seconds of a call and of each mask in it, forward and with ``gradient`` backward: from a call with one mask and,
    where ``masks`` allows, one with more. The model is warm."""
    rehearse = _Rehearsal(replay, target, Cost("gradient" if gradient else "forward", grids=(grid,)))
    taken = []
    for count in (1, 1, masks) if masks > 1 else (1, 1):  # the first warms up
        started = time.perf_counter()
        if gradient:
            replay.score_and_grad(rehearse.masks(count), _total, image=target, micro_batch=count, steps=rehearse.steps)
        else:
            with torch.no_grad():
                replay.log_probs(rehearse.masks(count), image=target, micro_batch=count, steps=rehearse.steps)
        if replay.device.type == "cuda":
            torch.cuda.synchronize(replay.device)
        taken.append(time.perf_counter() - started)
    each = max(taken[2] - taken[1], 0.0) / (masks - 1) if masks > 1 else taken[1]
    return max(taken[1] - each, 0.0), each


def _half(count: int, grid: tuple[int, ...], target: int | Clip, device: torch.device) -> torch.Tensor:
    """Masks that keep half of everything, with an axis of time where they lie on a clip."""
    steps = () if isinstance(target, int) or len(grid) == 3 else (1,)
    return torch.full((count, *steps, *grid), 0.5, dtype=torch.float32, device=device)


def _total(log_probs: torch.Tensor) -> torch.Tensor:
    return log_probs.sum(dim=1)


class _Rehearsal:
    """Passes over some masks, each metered.

    They are for all of the answer's tokens. Those for some of them (``Replay.log_probs``, ``steps``) leave out the same
    beginning of the prompt, and what follows the last of them besides.
    """

    def __init__(self, replay: Replay, target: int | Clip, cost: Cost) -> None:
        self.replay, self.target, self.grid = replay, target, cost.grids[-1]
        self.noise, self.parts, self.joined, self.queries = cost.noise, cost.parts, cost.joined, cost.queries
        self.steps = range(len(replay.token_ids))
        self.cut = False

    def masks(self, count: int) -> torch.Tensor:
        return _half(count, self.grid, self.target, self.replay.device)

    def peak(self, kind: Kind, count: int) -> int:
        """Bytes. ``cut`` says afterwards that memory ran out on the way, and the masks went through in parts."""
        recovered = len(self.replay.limits.recovered)
        peak: int = getattr(self, f"_{kind}")(self._meter(), count)
        self.cut = len(self.replay.limits.recovered) > recovered
        return peak

    def brought(self, grid: tuple[int, ...]) -> int:
        """Bytes kept of how masks of another grid, a little coarser than this, reach the pixels."""
        meter, other = self._meter(), (*grid[:-2], *(max(1, edge - 1) for edge in grid[-2:]))
        with torch.no_grad(), meter.running():
            self.replay.path.apply(_half(1, other, self.target, self.replay.device), image=self.target)
            with meter.span():
                torch.ones(1)
        return meter.reading.spans[0].before

    def _meter(self) -> Meter:
        device = self.replay.device
        return Meter(*weights_on_cards(self.replay.model, device)) if device.type == "cuda" else Meter(device)

    def _pass(self, count: int, *, gradient: bool) -> None:
        masks, replay = self.masks(count), self.replay
        if gradient:
            replay.score_and_grad(
                masks, _total, image=self.target, noise=self.noise, micro_batch=count, steps=self.steps
            )
        else:
            with torch.no_grad():
                replay.log_probs(masks, image=self.target, noise=self.noise, micro_batch=count, steps=self.steps)

    def _forward(self, meter: Meter, count: int) -> int:
        with meter.running():
            self._pass(count, gradient=False)
        return meter.reading.peak

    def _gradient(self, meter: Meter, count: int) -> int:
        with meter.running():
            self._pass(count, gradient=True)
        return meter.reading.peak

    def _relevance(self, meter: Meter, count: int) -> int:
        worked: dict[str, int] = {}
        visited: list[str] = []

        def visit(layer: AttentionLayer) -> None:
            with meter.span():
                if layer.part not in worked:
                    worked[layer.part] = len(visited)
                    # As relevance is made, Ā = mean over heads of ReLU(dA ⊙ A), for the widest block of rows.
                    rows = next(layer.blocks())
                    if self.joined:
                        gradient = layer.weight_gradient(rows).mean(dim=0, keepdim=True)
                        product = gradient * layer.weights(rows)[-1:]
                    else:
                        product = layer.weights(rows) * layer.weight_gradient(rows)
                    product.clamp_(min=0).mean(dim=1, dtype=sum_dtype(layer.device))
            visited.append(layer.part)

        with meter.running(), self.replay.capture(attention=self.parts, visit=visit):
            self._pass(count, gradient=True)
        reading = meter.reading
        own = {part: reading.spans[at].peak - reading.spans[at].before for part, at in worked.items()}
        # The first layer is reached with few rows to carry on, those where words are predicted; the others with all.
        layers = [span.before + own[part] for span, part in list(zip(reading.spans, visited, strict=True))[1:]]
        return max([reading.outside, *layers])

    def _rollout(self, meter: Meter, count: int) -> int:
        with meter.running(), self.replay.capture(attention=self.parts) as seen:
            self._pass(count, gradient=False)
            layer = seen.layers[-1]
            layer.weights(next(layer.blocks())).mean(dim=1, dtype=sum_dtype(layer.device))
        return meter.reading.peak

    def _rows(self, meter: Meter, count: int) -> int:
        replay, trace = self.replay, cast(Any, self.replay.trace)
        layout = trace.layout
        steps = torch.arange(replay.prompt_length - 1, replay.length)[: self.queries]
        own = np.isin(layout.image_index, images_of(self.target))
        tokens = torch.tensor(layout.image_positions)[torch.from_numpy(own)]
        with meter.running(), replay.capture(attention=self.parts) as seen:
            self._pass(count, gradient=False)
            with meter.span():
                layer = seen.layers[-1]
                weights = layer.weights(steps.to(layer.device))[0].cpu().double()
                kept = weights[..., tokens] if len(tokens) else weights
        # The last layer's rows are made while those of the others wait, and joining them copies all once.
        whole, each, span = weights.nbytes, kept.nbytes, meter.reading.spans[0]
        making = span.peak + whole + (len(seen.layers) - 1) * each
        return max(meter.reading.peak, making, span.before + whole + 2 * len(seen.layers) * each)

    def _activations(self, meter: Meter, count: int) -> int:
        replay = self.replay
        encoders = encoders_of(replay)
        for path in encoders:  # found once and kept, see ``grids``
            with suppress(ExplainError):
                encoder_tokens(replay, path, self.target)
        blocks = [module for path in encoders for module in blocks_of(replay.model, path)]
        with meter.running(), replay.capture(modules=blocks) as seen:
            self._pass(count, gradient=True)
            reached = [module for module in blocks if module in seen.gradients]
            if reached:
                output, gradient = (kept[reached[-1]] for kept in (seen.outputs, seen.gradients))
                wide = sum_dtype(output.device)
                (gradient.to(wide) * output.to(wide)).sum(dim=-1)
        return meter.reading.peak

    def _hidden(self, meter: Meter, _count: int) -> int:
        replay: Any = self.replay
        positions = torch.tensor(replay.trace.layout.image_positions)
        _, ids = text_tokens(replay.trace.input_ids, replay.trace.layout.image_positions, replay.trace.token_ids)
        with meter.running():
            states = hidden_states(replay).double()
            rows = head_rows(replay.model, ids).double()
            states[positions] @ rows.clone().T
        return meter.reading.peak
