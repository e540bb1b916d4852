"""Which frames: Shapley values of stretches of time, and whether an answer needs motion or the order of frames at all.

The players are stretches of the video, even in time; a coalition is shown and the others are their baseline. The value
of a coalition is the log-likelihood of the selected tokens, v(S) = f(Φ(I, Ĩ, M_S)), so shares add up to f(I) − f(Ĩ);
see ``lvlm_probe.explainers.shapley``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lvlm_probe.cards import equal, in_one_line
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.explaining import Tokens, words_of
from lvlm_probe.explainers.scores import check_finite, check_rules, whole_rule
from lvlm_probe.explainers.shapley import shapley
from lvlm_probe.files import record_of
from lvlm_probe.images.baselines import CLIP_KINDS
from lvlm_probe.progress import ProgressChoice, show_progress
from lvlm_probe.replaying import Replay
from lvlm_probe.replaying.isolation import taking_turns
from lvlm_probe.trace.clips import Clip
from lvlm_probe.video.explaining import clip_of
from lvlm_probe.words import ALPHA

_AGAINST = ("blur", *CLIP_KINDS)


@dataclass(frozen=True, repr=False)
class FrameShares:
    """How much each stretch of a video speaks for the selected tokens.

    Attributes:
        shares: Shapley value of each stretch, ``(segment,)``, nats; they add up to ``total``.
        error: standard error of each, ``(segment,)``, nats; 0 where every coalition was run.
        frames: of each stretch, its first frame and the one after its last, counted from the clip's first.
        total: log-likelihood of the tokens on the whole video less that on its baseline, nats.
        text: the explained words.
        passes: forward passes that it took.
        clip: the video.
    """

    __repr__, __eq__ = in_one_line, equal

    shares: tuple[float, ...]
    error: tuple[float, ...]
    frames: tuple[tuple[int, int], ...]
    total: float
    text: str
    passes: int
    clip: Clip

    def __str__(self) -> str:
        lines = [f"{self.text!r} by stretches of the video, {self.total:+.2f} nats in all ({self.passes} passes)"]
        largest = max(map(abs, self.shares)) or 1.0
        for (start, stop), share, error in zip(self.frames, self.shares, self.error, strict=True):
            times = self.clip.times
            ends = [f"{start}", f"{stop - 1}"] if times is None else [f"{times[k]:.1f}" for k in (start, stop - 1)]
            when = " to ".join(dict.fromkeys(ends))
            when = f"frame {when}" if times is None else f"{when} s"
            bar = "█" * round(20 * abs(share) / largest)
            margin = f" ± {error:.2f}" if error else ""
            lines.append(f"  {when:>18}  {share:+.2f}{margin}  {bar}")
        return "\n".join(lines)


@taking_turns
def which_frames(
    replay: Replay,
    *,
    tokens: Tokens | None = None,
    clip: int = 0,
    segments: int | None = None,
    orders: int = 50,
    seed: int = 0,
    progress: ProgressChoice = None,
) -> FrameShares:
    """Find how much each stretch of a video speaks for the selected tokens.

    Args:
        replay: the recorded answer on its model; its baseline stands for what is not shown.
        tokens: as for ``lvlm_probe.explain``.
        clip: number of the video, when the prompt has several.
        segments: stretches, even in time; by default one per frame, at most 8.
        orders: of more than ``EXACT`` stretches, how many random orders are run, each with its reverse.
        seed: of the orders.
        progress: called with (done, total); by default a bar where a person waits, ``False`` for none.

    Raises:
        ExplainError: the prompt has no such video, no token is selected, or a parameter is out of range.
    """
    mine = clip_of(replay, clip)
    count = min(mine.frames, 8) if segments is None else segments
    check_rules(
        "which_frames",
        segments=(count, whole_rule(count)[1] and count <= mine.frames, f"between 1 and {mine.frames}, its frames"),
        orders=whole_rule(orders, 2),
    )
    replay = replay.counted()
    selection = words_of(replay, tokens)
    if not selection:
        raise ExplainError(f"nothing to explain: {selection.reason}")
    replay = replay.strengthened(selection.decided)
    ends = np.linspace(0, mine.frames, count + 1).round().astype(int).tolist()
    of_frame = torch.from_numpy(np.repeat(np.arange(count), np.diff(ends)))
    steps = list(selection.indices)

    def values(coalitions: np.ndarray) -> np.ndarray:
        shown = torch.from_numpy(coalitions).float()[:, of_frame]
        masks = shown[:, :, None, None].to(replay.device)
        log_probs = replay.log_probs(masks, image=mine, steps=steps).cpu().double()[:, steps]
        check_finite("which_frames", replay.trace_id, log_probs)
        return log_probs.sum(1, keepdim=True).numpy()

    with torch.no_grad(), replay.shortcuts.caching(), show_progress(progress, "which frames") as advance:
        found = shapley(values, count, orders=orders, seed=seed, progress=advance)
    return FrameShares(
        tuple(found.shares[:, 0].tolist()),
        tuple(found.error[:, 0].tolist()),
        tuple((ends[k], ends[k + 1]) for k in range(count)),
        float(found.everyone[0] - found.nobody[0]),
        selection.text,
        replay.passes.forward,
        mine,
    )


@dataclass(frozen=True, repr=False)
class Order:
    """What the selected tokens lose where a video's frames stay but their motion, or their order, goes.

    Attributes:
        llr: baseline → log-likelihood ratio of the tokens against it, nats: ``blur`` takes everything away,
            ``first_frame`` and ``middle_frame`` motion, ``shuffled_frames`` order (mean over the seeds).
        text: the words.
        shuffles: that ratio for each of the shuffled orders, nats; how far they lie apart is what chance does.
        noise: most that rounding moves a ratio, nats.
        trace_id: of the answer.
    """

    __repr__, __eq__ = in_one_line, equal

    llr: Mapping[str, float]
    text: str
    shuffles: tuple[float, ...] = ()
    noise: float = 0.0
    trace_id: str = ""

    @property
    def least(self) -> float:
        """What a ratio must exceed to count, nats: ``ALPHA`` (paper, Eq. 6), or rounding where that is more."""
        return max(ALPHA, self.noise)

    @property
    def needs_order(self) -> bool:
        """Whether shuffling the frames costs the tokens more than ``least``."""
        return self.llr["shuffled_frames"] > self.least

    @property
    def needs_motion(self) -> bool:
        """Whether showing any one frame all the time costs them more than that."""
        return min(self.llr["first_frame"], self.llr["middle_frame"]) > self.least

    @property
    def verdict(self) -> str:
        """What the answer needs, as a sentence."""
        if self.needs_order:
            return "This answer needs the order of frames."
        if self.needs_motion:
            return "This answer needs several frames, in any order."
        return "This answer needs neither the order of frames nor more than one of them."

    @property
    def reasons(self) -> str:
        """The figures behind the verdict, as a sentence."""
        shuffled = f"shuffled {self.llr['shuffled_frames']:+.2f}"
        if len(self.shuffles) > 1:
            shuffled += f" ({min(self.shuffles):+.2f} to {max(self.shuffles):+.2f} in {len(self.shuffles)} orders)"
        return (
            f"Log-likelihood ratio of {self.text!r} against the frames {shuffled}, the first frame all the time "
            f"{self.llr['first_frame']:+.2f}, the middle one {self.llr['middle_frame']:+.2f}, and a blurred video "
            f"{self.llr['blur']:+.2f} nats; up to {self.least:.2f} counts as nothing (rounding: {self.noise:.1g})."
        )

    def __str__(self) -> str:
        return f"{self.verdict} {self.reasons}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return record_of(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Order:
        """Rebuilds what ``to_dict`` wrote. Raises ``ExplainError`` for anything else."""
        try:
            llr = {name: float(record["llr"][name]) for name in _AGAINST}
            shuffles = tuple(float(value) for value in record["shuffles"])
            return cls(llr, str(record["text"]), shuffles, float(record["noise"]), str(record["trace_id"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ExplainError(f"not a stored order of frames: {error!r}") from error


@taking_turns
def order(replay: Replay, *, tokens: Tokens | None = None, seeds: int = 3) -> Order:
    """Ask whether an answer needs a video's motion, or the order of its frames, at all.

    Takes a forward pass for the whole video, for each of three baselines, and for each of ``seeds`` orders;
    ``report(heat, orders=...)`` shows what it found.

    Args:
        replay: the recorded answer on its model.
        tokens: as for ``lvlm_probe.explain``.
        seeds: how many orders of the frames are tried.

    Raises:
        ExplainError: the prompt holds no video, no token is selected, or a parameter is out of range.
    """
    clip_of(replay, 0)
    check_rules("order", seeds=whole_rule(seeds))
    selection = words_of(replay, tokens)
    if not selection:
        raise ExplainError(f"nothing to explain: {selection.reason}")
    steps = list(selection.indices)

    def ratio(kind: str, seed: int | None = None) -> float:
        ratios = replay.over(kind, seed=seed).llr[steps]
        check_finite("order", replay.trace_id, ratios)
        return float(ratios.sum())

    llr = {kind: ratio(kind) for kind in _AGAINST[:-1]}
    shuffles = tuple(ratio(_AGAINST[-1], seed) for seed in range(seeds))
    llr[_AGAINST[-1]] = sum(shuffles) / seeds
    noise = 2 * float(replay.rounding[steps].sum())  # a ratio is of two passes
    return Order(llr, selection.text, shuffles, noise, replay.trace_id)
