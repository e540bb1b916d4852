"""Samples that belong together (HallusionBench, paper, Figure 15): what changed from one to the next, and whether the
model looked there.

A set holds an original, and variants of it: another question about the same image (*counterfactual question*), or the
same question about an edited image (*counterfactual image*). A variant is compared with the member that differs from
it in that one thing.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from lvlm_probe.errors import ProbeError
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.metrics import compare_maps, energy_in_region
from lvlm_probe.study.run.sample_filter import is_correct

ORIGINAL = "original"
_ROLES = (ORIGINAL, "counterfactual question", "counterfactual image")

TOLERANCE = 32
"""Grey levels (of 255) by which a channel must differ in its mean over 5 × 5 pixels. JPEG keeps such means where it
moves colours about an edge by a pixel or two."""

NEARLY_ALL = 0.5
"""Share of the image above which a change is no region but another image."""


@dataclass(frozen=True)
class Region:
    """The region in which two images differ.

    Attributes:
        mask: ``(row, col)`` bool in pixels of the second image; ``None`` where no region can be told.
        reason: Why there is none.
    """

    mask: np.ndarray | None
    reason: str | None = None

    @property
    def share(self) -> float:
        """Its share of the image's area, 0 to 1."""
        return 0.0 if self.mask is None else float(self.mask.mean())


def order_of(role: str | None) -> int:
    """Place of a role among the members of a set: the original first."""
    return _ROLES.index(role) if role in _ROLES else len(_ROLES)


def references(members: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Choose the member that each variant is compared with: number → number.

    An edited image is compared with the same question about another image, a counterfactual question with the
    original about the same image; where there is no such member, with the first original, or the first member.

    Args:
        members: ``role``, ``question`` and ``picture`` (digest) of each.
    """
    if not members:
        return {}
    base = next((number for number, one in enumerate(members) if one.get("role") == ORIGINAL), 0)
    found: dict[int, int] = {}
    for number, one in enumerate(members):
        if number == base:
            continue
        others = [
            (place, other)
            for place, other in enumerate(members)
            if place != number and order_of(other.get("role")) < order_of("counterfactual image")
        ]
        if one.get("role") == "counterfactual image":
            fitting = [
                place
                for place, other in others
                if other["question"] == one["question"] and other["picture"] != one["picture"]
            ]
        else:
            fitting = [
                place for place, other in others if other["picture"] == one["picture"] and other.get("role") == ORIGINAL
            ]
        found[number] = fitting[0] if fitting else base
    return found


def question_diff(before: str, after: str) -> list[tuple[str, str]]:
    """Word by word: ``(text, kind)`` in order of reading, kind ``same``, ``gone`` (in ``before`` only) or ``new``."""
    left, right = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (before, after))
    found: list[tuple[str, str]] = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        if kind == "equal":
            found.append(("".join(right[c:d]), "same"))
            continue
        found += [(text, name) for text, name in (("".join(left[a:b]), "gone"), ("".join(right[c:d]), "new")) if text]
    return found


def changed_region(before: Image.Image, after: Image.Image) -> Region:
    """Find where pixels of two images differ by more than ``TOLERANCE``.

    It is widened by a hundredth of the long side, so that an edited letter is an area. Of images of one shape, the
    first is brought to the size of the second.
    """
    (width, height), (other_width, other_height) = after.size, before.size
    if abs(other_width * height - other_height * width) > 0.02 * other_width * height:
        return Region(None, f"the images have different shapes ({before.size} and {after.size} pixels)")
    first = before.convert("RGB").resize(after.size) if before.size != after.size else before.convert("RGB")
    blur = ImageFilter.BoxBlur(2)
    levels = [np.asarray(one.filter(blur), dtype=np.int16) for one in (first, after.convert("RGB"))]
    difference = np.abs(levels[0] - levels[1]).max(axis=2)
    changed = Image.fromarray(((difference > TOLERANCE) * 255).astype(np.uint8))
    wide = 2 * max(1, round(max(width, height) / 200)) + 1
    mask = np.asarray(changed.filter(ImageFilter.MaxFilter(wide))) > 0
    if not mask.any():
        return Region(None, "the images do not differ visibly")
    if mask.mean() > NEARLY_ALL:
        return Region(None, f"the images differ nearly everywhere ({100 * mask.mean():.0f} % of the area)")
    return Region(mask)


def looking(heat: Heatmap | None, before: Heatmap | None, region: Region) -> dict[str, float | None] | None:
    """Compare two maps where their images differ.

    Args:
        heat, before: maps of the variant and of what it is compared with.
        region: where their images differ.

    Returns:
        ``mass``, ``mass_before``: share of the maps' sums in the region; ``area``: the region's share of what the model
        sees of the image, which is what a map that knows nothing has there; ``rank_correlation`` and ``top_iou`` of
        the two maps. ``None`` for what cannot be told, and instead of all where there is no map.
    """
    if heat is None or heat.values is None:
        return None
    found: dict[str, float | None] = dict.fromkeys(("mass", "mass_before", "area", "rank_correlation", "top_iou"))
    if region.mask is not None:
        found["mass"] = _share(heat, region.mask)
        found["mass_before"] = _share(before, region.mask)
        cells = Image.fromarray(np.asarray(heat.seen, dtype=np.uint8) * 255)
        seen = np.asarray(cells.resize(region.mask.shape[::-1], Image.Resampling.NEAREST)) > 0
        found["area"] = float(region.mask[seen].mean()) if seen.any() else None
    if before is not None and before.values is not None:
        try:
            likeness = compare_maps(heat, before)
        except ProbeError:  # images of different size, or scipy is missing
            return found
        found["rank_correlation"] = _finite(likeness.rank_correlation)
        found["top_iou"] = _finite(likeness.top_iou)
    return found


def stance(answer: str, choices: Sequence[str]) -> str:
    """Return the one choice that an answer holds, or else its own words without case and signs."""
    held = [choice for choice in choices if is_correct(answer, choice, choices)]
    return held[0].casefold() if len(held) == 1 else " ".join(re.findall(r"\w+", answer.casefold()))


def _share(heat: Heatmap | None, mask: np.ndarray) -> float | None:
    if heat is None or heat.values is None:
        return None
    try:
        return _finite(energy_in_region(heat, mask))
    except ProbeError:
        return None


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
