"""Whether to believe a heatmap: plain sentences, from numbers that a score already holds.

The thresholds are constants below, each with its reason. A verdict never changes a number; it says which not to trust.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lvlm_probe.explainers.curve_points import MIN_GAIN
from lvlm_probe.files import record_of
from lvlm_probe.words import ALPHA

BASELINE_PROBABILITY = 0.05
"""The paper's own demand on the baseline image (A.1): selected tokens keep less than 5 % of probability on it."""

MIN_CONTRAST = 0.05
"""Original and baseline probability closer than this: normalised curves divide by next to nothing (paper, A.7)."""

CENTER_MARGIN = 0.05
"""By how much a heatmap may fall short of the blob in the middle of the image before that counts against it, and has to
exceed it before its score says more than that the object stands in the middle: what separates methods of one rank in
the tournaments, and the error of the blob's own score."""

MIN_ORIGINAL = 0.05
"""Mean probability of the tokens with the whole image in sight: below it the model itself hardly holds the answer."""

MAX_TIE_SPREAD = 0.05
"""Standard deviation of insertion − deletion over random orders of tied cells: as much as separates methods of one rank
in the tournaments. How many cells are tied does not matter by itself: the true mask of an object has two values."""

MAX_REPLAY_DIFFERENCE = 0.05
"""Nats between recorded and replayed log-probabilities of the selected tokens: 5 % in probability, far above rounding
in float32 (1e-4). In half precision rounding alone may come to more, and then it is the limit (``Replay.rounding``)."""

MAX_PARITY_ERROR = 1.5
"""Mean grey levels (of 255) between the fast path of masks to pixels and the processor, whose own rounding is 0.6."""


_ROUNDING = 1e-6
"""A curve of float32 probabilities may pass its ends by this."""

_NO_OBJECTION, _OBJECTIONS = "no objection", "do not trust: "
_OF_THE_MAP = re.compile(r"^insertion − deletion is |of the cells are tied with others")
"""Objections to a heatmap, in the words of ``judge``; all others are to how it was measured."""


@dataclass(frozen=True)
class Verdict:
    """Whether a heatmap may be trusted; ``reasons`` are the sentences against it, empty when it may.

    Attributes:
        trusted: No objection.
        reasons: The objections.
        measured: Whether the scores are a measurement at all, which may be that of a bad heatmap: all that is said
            against it is said about the heatmap (no better than chance, tied), not about how it was judged. What is not
            measured enters no mean; what is measured does, trusted or not, since a mean over a method's good maps would
            flatter those that make few. By default as ``trusted``.
    """

    trusted: bool
    reasons: tuple[str, ...] = ()
    measured: bool | None = None

    def __post_init__(self) -> None:
        if self.measured is None:
            of_the_map = bool(self.reasons) and all(_OF_THE_MAP.search(reason) for reason in self.reasons)
            object.__setattr__(self, "measured", self.trusted or of_the_map)

    def __str__(self) -> str:
        if self.trusted:
            return f"{_NO_OBJECTION}: the scores give no reason to distrust this heatmap"
        return _OBJECTIONS + "; ".join(self.reasons)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``Verdict.from_dict`` is the inverse."""
        return record_of(self)

    @classmethod
    def from_text(cls, text: str) -> Verdict:
        """Reads what ``str()`` wrote."""
        if text.startswith(_NO_OBJECTION):
            return cls(True)
        return cls(False, tuple(part for part in text.removeprefix(_OBJECTIONS).split("; ") if part))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Verdict:
        """Rebuilds what ``to_dict`` wrote."""
        measured = record.get("measured")
        reasons = tuple(str(reason) for reason in record["reasons"])
        return cls(bool(record["trusted"]), reasons, None if measured is None else bool(measured))


def out_of_range(name: str, area: float, own: str | None = None) -> str | None:
    """What an area outside [0, 1] says, as a sentence; ``None`` for one inside.

    Args:
        name: ``"deletion"`` or ``"insertion"``.
        area: under the normalised curve.
        own: name of the score that is followed in the place of the words' probability.
    """
    if not math.isfinite(area) or -_ROUNDING <= area <= 1 + _ROUNDING:
        return None
    away = "with parts of the image taken away" if name == "deletion" else "with only parts of the image in sight"
    where, than = ("below 0", "less likely than on the baseline") if area < 0 else (
        "above 1", "likelier than with the whole image"
    )  # fmt: skip
    if own is not None:
        beyond = "lower" if area < 0 else "higher"
        return f"{name} {area:.3g} is {where}: {away}, {own!r} is {beyond} than on the whole image and on the baseline"
    return f"{name} {area:.3g} is {where} (0 is the baseline, 1 the whole image): {away}, the words are {than}"


def level_with_center(gain: float, center_gain: float) -> str | None:
    """What a gain that is level with that of the blob in the middle says, as a sentence; ``None`` for any other.

    It is no objection: a heatmap that rightly marks an object in the middle of the image is level with it too.
    """
    if not abs(gain - center_gain) <= CENTER_MARGIN:
        return None
    return (
        f"a blob in the middle of the image scores as well ({center_gain:.2f} against {gain:.2f}): what counts stands "
        f"in the middle, and the score does not show that the map knows more than that"
    )


def _little_contrast(original: float, baseline: float) -> str:
    """In the unit of the log-likelihood ratio by which words are selected, so that the two do not contradict."""
    change = math.log(original / baseline) if original > 0 and baseline > 0 else math.nan
    told = f"{original:.2g} with the image, {baseline:.2g} without, {change:.2g} nats"
    if change > ALPHA:
        return (
            f"the image makes these tokens likelier, but they stay so improbable ({told}) that there is hardly "
            f"anything to take away (the probabilities should differ by {MIN_CONTRAST:g})"
        )
    if change < -ALPHA:
        return f"these tokens are likelier without the image ({told}): no region of it speaks for them"
    return (
        f"taking the image away changes the probability of these tokens hardly at all ({told}), so there is no region "
        f"to find"
    )


def _of_probabilities(original: float, baseline: float) -> list[str]:
    """What the words' probabilities with and without the image say against a heatmap of them."""
    reasons = []
    if not original >= MIN_ORIGINAL:
        reasons.append(
            f"the model gives these tokens a probability of only {original:.2g} with the whole image in sight"
        )
    if not original - baseline >= MIN_CONTRAST:
        reasons.append(_little_contrast(original, baseline))
    elif not baseline < BASELINE_PROBABILITY:
        reasons.append(
            f"the baseline image still leaves these tokens a probability of {baseline:.2g} "
            f"(it should be below {BASELINE_PROBABILITY:g}): try another baseline, such as explain(replay.over('mean'))"
        )
    return reasons


def _nothing_speaks_for(name: str, original: float, baseline: float, highest: float) -> list[str]:
    """What a score that the image as a whole lowers says of a heatmap of what raises it.

    A map of everything but what lowers the score has a good gain too. Where something in the image does raise it, that
    alone brings it above the baseline.
    """
    if not original < baseline or highest - baseline > CENTER_MARGIN * (baseline - original):
        return []
    return [
        f"nothing in the image speaks for {name!r}: it is {original:.3g} with the image, {baseline:.3g} on the "
        f"baseline, and no more than {highest:.3g} when what the heatmap marks is shown"
    ]


@dataclass(frozen=True)
class Measured:
    """What was measured of one heatmap, and how far the measuring itself can be trusted.

    Attributes:
        empty: why there is no heatmap; nothing else is looked at then.
        deletion, insertion: normalised areas.
        original_probability, baseline_probability: mean probability of the selected tokens on the image and on the
            baseline.
        tie_share: share of seen cells that have the value of another.
        tie_spread: standard deviation of insertion − deletion over random orders of them; NaN when unknown.
        random_gains: insertion − deletion of random heatmaps, when they were asked for; NaN among them does not count.
        center_gain: insertion − deletion of the blob in the middle of the image; NaN where it was not taken.
        undefined: why deletion and insertion are NaN, where they are.
        own_score: of a score in the place of probabilities, which are not looked at then: its name, its value on the
            image and on the baseline, and the highest that was met while parts of the image were shown.
        replay_difference: largest difference to the recorded log-probabilities, nats; ``None`` when unknown.
        replay_tolerance: how large it may be: rounding where that is more than ``MAX_REPLAY_DIFFERENCE``.
        parity_error: mean grey levels between the fast path and the processor; ``None`` when unknown.
        parity_mode: ``"exact"`` scores went through the real processor, so parity does not matter.
        deterministic: whether the processor makes the same inputs twice.
        way_on: what may give a better heatmap, said where this one is too poor.
    """

    empty: str | None = None
    deletion: float = math.nan
    insertion: float = math.nan
    original_probability: float = math.nan
    baseline_probability: float = math.nan
    tie_share: float = 0.0
    tie_spread: float = 0.0
    random_gains: tuple[float, ...] = ()
    center_gain: float = math.nan
    undefined: str | None = None
    own_score: tuple[str, float, float, float] | None = None
    replay_difference: float | None = None
    replay_tolerance: float = MAX_REPLAY_DIFFERENCE
    parity_error: float | None = None
    parity_mode: str = "fast"
    deterministic: bool = True
    way_on: str = ""


def judge(measured: Measured | None = None, /, **numbers: Any) -> Verdict:
    """The verdict on one heatmap.

    Args:
        measured: of the heatmap.
        **numbers: its attributes, in its place.
    """
    measured = measured or Measured(**numbers)
    if measured.empty is not None:
        return Verdict(False, (f"there is no heatmap, because {measured.empty}",))
    if measured.own_score is not None:
        reasons = _nothing_speaks_for(*measured.own_score)
    else:
        reasons = _of_probabilities(measured.original_probability, measured.baseline_probability)
    reasons += _of_areas(measured) + _of_measuring(measured)
    return Verdict(not reasons, tuple(reasons))


def _of_areas(measured: Measured) -> list[str]:
    """What insertion − deletion says against a heatmap, by itself and beside heatmaps made without looking."""
    gain, onward = measured.insertion - measured.deletion, f": {measured.way_on}" if measured.way_on else ""
    by_chance = [one for one in measured.random_gains if math.isfinite(one)]
    reasons = []
    if not math.isfinite(gain):
        undefined = f": {measured.undefined}" if measured.undefined else ""
        reasons.append(f"deletion and insertion are undefined{undefined}")
    elif gain < MIN_GAIN:
        reasons.append(
            f"insertion − deletion is {gain:.2f}, not clearly above the 0 of a random heatmap (threshold {MIN_GAIN:g})"
            f"{onward}"
        )
    elif by_chance and gain <= max(by_chance):
        reasons.append(
            f"insertion − deletion is {gain:.2f}, and one of {len(by_chance)} random heatmaps reached "
            f"{max(by_chance):.2f}{onward}"
        )
    if measured.center_gain - gain > CENTER_MARGIN:
        reasons.append(
            f"insertion − deletion is {gain:.2f}, and a blob in the middle of the image, made without looking, "
            f"has {measured.center_gain:.2f}{onward}"
        )
    if measured.tie_spread > MAX_TIE_SPREAD:
        reasons.append(
            f"{measured.tie_share:.0%} of the cells are tied with others, and insertion − deletion varies by "
            f"±{measured.tie_spread:.2f} with their order"
        )
    return reasons


def _of_measuring(measured: Measured) -> list[str]:
    """What speaks against the numbers themselves."""
    difference, error = measured.replay_difference, measured.parity_error
    reasons = []
    if difference is not None and not difference <= measured.replay_tolerance:
        reasons.append(
            f"the replay differs from the recording by {difference:.2g} nats on these tokens (rounding explains "
            f"{measured.replay_tolerance:.2g}): check that model, dtype and processor are the recorded ones"
        )
    if not measured.deterministic:
        reasons.append("the image processor does not make the same inputs twice")
    if measured.parity_mode == "fast" and error is not None and not error <= MAX_PARITY_ERROR:
        reasons.append(
            f"masked images differ from what the processor would make by {error:.1f} grey levels in the mean: "
            f"evaluate with mode='exact'"
        )
    return reasons
