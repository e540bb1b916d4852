"""Baselines: what is shown where a mask takes the image away.

A baseline is a value. A replay has one for good; ``Replay.over`` and ``Replay.strengthened`` give views of the same
answer over another one.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from lvlm_probe.errors import ImageError
from lvlm_probe.images import BLUR_LADDER, CompositePath, ImagePath, PixelPath
from lvlm_probe.images.baselines import CLIP_KINDS, KINDS, make_baselines
from lvlm_probe.process import of_the_last
from lvlm_probe.trace.clips import Clip

BaselineLike = str | Image.Image | Sequence[str | Image.Image] | Mapping[str, Any]
"""A kind, an image of the user's (one per image), or the description of a baseline (``replay.baseline``)."""

_PATHS_KEPT = 6
"""Baselines whose pixel inputs stay at hand: the ladder of blurs, and one or two besides."""

Path = ImagePath | PixelPath | CompositePath


def baseline_identity(baseline: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells the baseline of a description from all others; of an image that the description does not tell from
    others, ``("image", None)``."""
    kind = baseline.get("kind", "blur")
    if kind == "image":
        return ("image", baseline.get("sha256"))
    if kind == "blur":
        strength = baseline.get("strength")
        # The limit of an ever stronger blur is the mean colour: by another name, the same image.
        if baseline.get("limit") or (strength is not None and math.isinf(strength)):
            return ("mean", None)
        return ("blur", float(BLUR_LADDER[0] if strength is None else strength))
    return (kind, int(baseline.get("seed") or 0) if kind in ("noise", "shuffled_frames") else None)


def same_baseline(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two descriptions are known to be of one baseline."""
    identity = baseline_identity(first)
    return identity == baseline_identity(second) and identity != ("image", None)


def described(baseline: Mapping[str, Any]) -> tuple[str, float | None, int | None]:
    """Kind, strength and seed of a baseline by its description.

    Raises:
        ImageError: it was an image of the user's.
    """
    kind = str(baseline.get("kind", "blur"))
    if kind not in (*KINDS, *CLIP_KINDS):
        raise ImageError(
            "this baseline was an image of your own, which a description does not hold, and it is not the one "
            "that this replay has: give the image again, as baseline=… or by replay.over(image) (on the "
            "command line --baseline FILE)"
        )
    return kind, math.inf if baseline.get("limit") else baseline.get("strength"), baseline.get("seed")


def draw(
    path: Path,
    kinds: Sequence[str | Image.Image],
    params: Mapping[str, Any],
    paths: OrderedDict[Any, Path],
    clips: Sequence[Clip] = (),
) -> tuple[Path, dict[str, Any]]:
    """``path`` over another baseline, and that baseline's description.

    Args:
        path: over any baseline.
        kinds: one per image.
        params: ``strength`` of a blur, ``seed`` of noise.
        paths: those drawn before, by ``baseline_identity``; gets this one.
        clips: which images are frames.

    Raises:
        ImageError: there is no such baseline, or it is an image of the user's in pixel-input space.
    """
    plain = isinstance(kinds[0], str) and all(kind == kinds[0] for kind in kinds)
    if isinstance(path, PixelPath):
        if not plain:
            raise ImageError(
                "masks live in pixel-input space here, where an image of your own cannot be brought to without the "
                f"image processor: give the processor, or choose one of {', '.join(KINDS)}"
            )
        kind = str(kinds[0])
        there = _cached(paths, {"kind": kind, **params}, lambda: path.with_baseline_kind(kind, **params))
        return there, dict(there.description)
    made = make_baselines(path.images, str(kinds[0]) if plain else kinds, clips=clips, **params)
    description: dict[str, Any] = {"kind": made[0].kind, **made[0].params}
    if not plain:
        digest = hashlib.sha256()
        for item in made:
            digest.update(repr((item.image.mode, item.image.size)).encode() + item.image.tobytes())
        description = {**description, "kind": "image", "sha256": digest.hexdigest()}
    return _cached(paths, description, lambda: path.with_baseline([item.image for item in made])), description


def _cached(paths: OrderedDict[Any, Path], description: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    return of_the_last(paths, baseline_identity(description), make, most=_PATHS_KEPT)
