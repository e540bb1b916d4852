"""``knockout``, ``patch`` and ``agreement``: interventions on the image tokens under a heatmap, against a control."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import nn

from lvlm_probe.attention.cutting import attention_layers, cut_attention
from lvlm_probe.boxes.image_tokens import ImageTokens
from lvlm_probe.causal.effects import CausalEffect, Effect
from lvlm_probe.causal.patching import donor_features, patched
from lvlm_probe.causal.through_nnsight import cut_through_nnsight
from lvlm_probe.causal.tokens import Queries, placed_tokens, query_positions, token_heat
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.explaining import frame_of
from lvlm_probe.explainers.scores import check_finite
from lvlm_probe.heatmap import HeatGrid, Heatmap
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.progress import Progress
from lvlm_probe.replaying.isolation import taking_turns
from lvlm_probe.selection import TokenSelection, select_tokens
from lvlm_probe.trace.clips import images_of

if TYPE_CHECKING:
    from lvlm_probe.replaying import Replay
    from lvlm_probe.trace.clips import Clip
    from lvlm_probe.video import ClipHeatmap

SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Shares of the image tokens at which ``agreement`` samples its curves."""

_TOP = 0.1

Control = Literal["random", "bottom"]
Backend = Literal["hooks", "nnsight"]
Take = Callable[[np.ndarray, Sequence[int]], torch.Tensor]
"""Image tokens (numbers among ``ImageTokens``) and layers → log P of the answer's tokens without them, ``(step,)``."""


@taking_turns
def knockout(
    replay: Replay,
    heat: Heatmap | ClipHeatmap | np.ndarray,
    *,
    top: float | Sequence[float] | None = None,
    layers: int | Sequence[int] | Literal["all"] | None = None,
    sweep: int = 4,
    queries: Queries | Sequence[int] = "text",
    control: Control = "random",
    draws: int = 5,
    tokens: TokenSelection | None = None,
    image: int = 0,
    seed: int = 0,
    backend: Backend = "hooks",
    progress: Progress | None = None,
) -> CausalEffect:
    """Cut attention to the image tokens under a heatmap's top area, and see what the answer loses.

    Args:
        replay: The recorded answer on its model, under sdpa or eager attention.
        heat: The heatmap; or ``(row, col)`` values or a boolean region over the image, of a video ``(t, row, col)``,
            with ``tokens`` and ``image``.
        top: Share of the image tokens to cut, or several: the ones with the highest mean heat, ties in random order. By
            default 0.1; for a boolean region all tokens that it touches.
        layers: Indices of the layers to cut in; by default all.
        sweep: Into how many ranges of layers to split them, each cut on its own as well (with the smallest share); 0
            for none.
        queries: Who no longer sees them: ``"text"``, all text after the first image token, the question included
            (through which much of the image reaches the answer); ``"answer"``, the positions that predict the answer
            up to the last explained token; ``"tokens"``, only those that predict the explained tokens; or positions.
        control: ``"random"``: as many image tokens drawn at random from all; ``"bottom"``: those with the least heat.
        draws: Random draws to average.
        tokens: The explained tokens, when ``heat`` is an array; by default those with LLR > 1.
        image: Number of the image, when ``heat`` is an array; a frame stands for its video.
        seed: Of draws and ties; the global random state is not touched.
        backend: ``"hooks"``, or ``"nnsight"``, which makes the same cut to the same bits.
        progress: Called with (done, total) passes.

    Raises:
        ExplainError: The heatmap is of another answer or has no values, where the image tokens belong is unknown, or
            attention of this model cannot be cut.
    """
    if backend not in ("hooks", "nnsight"):
        raise ExplainError(f"backend is 'hooks' or 'nnsight'; got {backend!r}")
    with replay.replica.use() as model, _knife(model, backend) as envoys:
        target = target_of(replay, heat, tokens, image)
        found = attention_layers(model, layers)
        positions = query_positions(replay, target.selection, queries)

        def take(rows: np.ndarray, within: Sequence[int]) -> torch.Tensor:
            chosen = [pair for pair in found if pair[0].index in set(within)]
            keys = target.tokens.positions[rows]
            if envoys is not None:
                return cut_through_nnsight(replay, envoys, chosen, positions, keys)
            with cut_attention(replay, chosen, positions, keys):
                return replay.log_probs(None)[0]

        return measure(
            "knockout",
            replay,
            target,
            Measured(take, list(target.selection.indices), progress),
            Draws(control, draws, seed),
            counts=counts_of(top, target),
            layers=[layer.index for layer, _ in found],
            sweep=sweep,
            params={"queries": queries if isinstance(queries, str) else positions.tolist(), "backend": backend},
        )


@taking_turns
def patch(
    replay: Replay,
    heat: Heatmap | ClipHeatmap | np.ndarray,
    *,
    donor: Image.Image | Sequence[Image.Image] | None = None,
    top: float | Sequence[float] | None = None,
    control: Control = "random",
    draws: int = 5,
    tokens: TokenSelection | None = None,
    image: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> CausalEffect:
    """Replace the features of the image tokens under a heatmap's top area by a donor image's, and see what the answer
    loses.

    The features are those that the decoder is given: the projector's output, with features that enter at later layers.
    Tokens of the donor image were made by the vision encoder from the whole donor.

    Args:
        replay: The recorded answer on its model, with its processor.
        heat, top, control, draws, tokens, image, seed, progress: As for ``knockout``.
        donor: An image of the same size, of a video one for each frame or one for all; by default the baseline image
            that the heatmap names, else the replay's.

    Raises:
        ExplainError: As for ``knockout``, or the model gives its decoder no embeddings.
        ImageError: The donor has another size.
    """
    target = target_of(replay, heat, tokens, image)
    if donor is None and isinstance(heat, HeatGrid):
        replay = replay.over(heat.provenance.get("baseline") or replay.baseline)
    features = donor_features(replay, donor, target.place)

    def take(rows: np.ndarray, _layers: Sequence[int]) -> torch.Tensor:
        with patched(replay, features, target.tokens.rows[rows]):
            return replay.log_probs(None)[0]

    return measure(
        "patch",
        replay,
        target,
        Measured(take, list(target.selection.indices), progress),
        Draws(control, draws, seed),
        counts=counts_of(top, target),
        params={"donor": "baseline" if donor is None else "image", "where": "projector output"},
    )


@naming_arguments
def agreement(
    replay: Replay,
    heat: Heatmap | ClipHeatmap | np.ndarray,
    *,
    kind: Literal["knockout", "patch"] = "knockout",
    score: Literal["prob", "log"] = "prob",
    seed: int = 0,
    **settings: Any,
) -> float:
    """One number per heatmap: how much earlier the answer is lost when image tokens go in the heatmap's order.

    It is ``agreement_score`` over ``SHARES``, by default of attention knockout in all layers, against the mean of five
    random draws: 0 as good as chance, 1 at best, below 0 worse than chance. Costs 38 passes.

    Args:
        replay, heat: As for ``knockout``; a heatmap without values has no score (NaN).
        kind: Which intervention.
        score: Mean probability of the explained tokens, or f in nats.
        seed: Of draws and ties.
        settings: Anything else ``knockout`` or ``patch`` takes.

    Returns:
        the score; NaN when taking away all image tokens costs less than 0.05 of mean probability.
    """
    if kind not in ("knockout", "patch"):
        raise ExplainError(f"kind is 'knockout' or 'patch'; got {kind!r}")
    if isinstance(heat, HeatGrid) and heat.values is None:
        return float("nan")
    given = {"top": SHARES, "seed": seed, **settings}
    if kind == "knockout":
        return knockout(replay, heat, **{"sweep": 0, **given}).agreement_of(score)
    return patch(replay, heat, **given).agreement_of(score)


@dataclass(frozen=True)
class Target:
    """What is taken away, and from which words: the heat of each image token, ``(image_token,)``."""

    tokens: ImageTokens
    heat: np.ndarray
    selection: TokenSelection
    place: int | Clip
    region: bool
    method: str


def target_of(
    replay: Replay, heat: Heatmap | ClipHeatmap | np.ndarray, tokens: TokenSelection | None, image: int
) -> Target:
    region, method = False, "array"
    if isinstance(heat, HeatGrid):
        values, method, place = heat.known_values(), heat.method, heat.target
        tokens = heat.selection if tokens is None else tokens
    else:
        values = np.asarray(heat)
        region = values.dtype == bool
        clip = frame_of(replay, image)
        place, axes = (image, "(row, col)") if clip is None else (clip, "(t, row, col)")
        if values.ndim != axes.count(",") + 1 or not (values.size and np.isfinite(values.astype(np.float64)).all()):
            raise ExplainError(f"heat is a heatmap, or finite values or a boolean region {axes}; got {values.shape}")
    selection = select_tokens(replay) if tokens is None else tokens
    if selection.tokens != tuple(replay.tokens):
        raise ExplainError(
            f"this explains another answer ({''.join(selection.tokens)[:60]!r}) than the replay's "
            f"({''.join(replay.tokens)[:60]!r})"
        )
    if not selection.indices:
        raise ExplainError(f"there are no explained tokens: {selection.reason or 'it is a score of no words'}")
    if not isinstance(place, int) and place not in replay.clips:
        raise ExplainError("the heatmap is of a video that this prompt does not have")
    found = placed_tokens(replay, place)
    return Target(found, token_heat(values, found.boxes, found.size), selection, place, region, method)


@contextmanager
def _knife(model: nn.Module, backend: Backend) -> Iterator[dict[int, Any] | None]:
    """The wrapped model's envoys for nnsight, nothing for hooks."""
    if backend == "hooks":
        yield None
        return
    from lvlm_probe.causal import through_nnsight

    with through_nnsight.wrapped(model) as envoys:
        yield envoys


def counts_of(top: float | Sequence[float] | None, target: Target) -> list[int]:
    """Numbers of image tokens to take away, ascending."""
    total = len(target.tokens)
    if top is None:
        count = int((target.heat > 0).sum()) if target.region else round(_TOP * total)
        if count == 0:
            raise ExplainError("the region is empty, or lies where no image token looks")
        return [count]
    shares = [top] if isinstance(top, (int, float)) else list(top)
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ExplainError(f"top is a share of the image tokens, over 0 and at most 1, or several; got {top!r}")
    return sorted({max(1, round(share * total)) for share in shares})


@dataclass(frozen=True)
class Draws:
    """What is measured against: control tokens, and how they are drawn."""

    control: Control
    draws: int
    seed: int

    def __post_init__(self) -> None:
        if self.control not in ("random", "bottom"):
            raise ExplainError(f"control is 'random' or 'bottom'; got {self.control!r}")
        if self.draws < 1:
            raise ExplainError(f"draws is at least 1; got {self.draws}")

    def orders(self, heat: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """The heatmap's order of the tokens, ties at random, and the controls' orders."""
        generator = np.random.default_rng([self.seed, 0])
        order = np.lexsort((generator.random(len(heat)), -heat))
        if self.control == "bottom":
            return order, [order[::-1]]
        # Nested draws: one random order each, of which every share takes the first tokens.
        return order, [generator.permutation(len(heat)) for _ in range(self.draws)]


class Measured:
    """f and mean probability of the explained tokens without some image tokens, counted."""

    def __init__(self, take: Take, steps: list[int], progress: Progress | None) -> None:
        self.take, self.steps, self.progress = take, steps, progress
        self.done = self.passes = 0

    def scores(self, rows: np.ndarray, within: Sequence[int]) -> tuple[float, float]:
        log_probs = self.take(rows, within)[self.steps].cpu().double()
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.passes)
        return float(log_probs.sum()), float(log_probs.exp().mean())

    def effect(self, order: np.ndarray, others: list[np.ndarray], count: int, within: Sequence[int]) -> Effect:
        score, probability = self.scores(order[:count], within)
        controls = [self.scores(other[:count], within) for other in others]
        return Effect(
            top=count / len(order),
            tokens=count,
            layers=tuple(int(index) for index in within),
            score=score,
            probability=probability,
            control=tuple(pair[0] for pair in controls),
            control_probability=tuple(pair[1] for pair in controls),
        )


def measure(
    kind: Literal["knockout", "patch"],
    replay: Replay,
    target: Target,
    measured: Measured,
    drawn: Draws,
    *,
    counts: Sequence[int],
    layers: Sequence[int] = (),
    sweep: int = 0,
    params: Mapping[str, Any],
) -> CausalEffect:
    """The effect of taking image tokens away by ``measured``, next to that of control tokens."""
    if sweep < 0:
        raise ExplainError(f"sweep is at least 0; got {sweep}")
    order, others = drawn.orders(target.heat)
    ranges = [part.tolist() for part in np.array_split(np.asarray(layers), min(sweep, len(layers)))] if sweep else []
    measured.passes = 2 + (len(counts) + len(ranges)) * (1 + len(others))
    started, before = time.perf_counter(), replay.passes.forward
    original, everything = measured.scores(order[:0], layers), measured.scores(order, layers)
    effects = tuple(measured.effect(order, others, count, layers) for count in counts)
    windows = tuple(measured.effect(order, others, counts[0], within) for within in ranges)
    found = [original[0], everything[0], *(number for one in effects for number in (one.score, *one.control))]
    check_finite(kind, replay.trace_id, np.array(found))
    return CausalEffect(
        kind=kind,
        original=original[0],
        original_probability=original[1],
        everything=everything[0],
        everything_probability=everything[1],
        effects=effects,
        windows=windows,
        params={
            **params,
            "control": drawn.control,
            "draws": len(others),
            "seed": drawn.seed,
            "image_tokens": len(target.tokens),
        },
        provenance={
            "trace_id": replay.trace_id,
            "method": target.method,
            "tokens": measured.steps,
            "text": target.selection.text,
            "image": images_of(target.place).start,
            "passes": replay.passes.forward - before,
            "seconds": round(time.perf_counter() - started, 4),
        },
    )
