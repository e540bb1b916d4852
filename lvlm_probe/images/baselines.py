"""Baseline images: what a masked-out pixel is replaced by.

A baseline is drawn on the original image, before the processor, so that it goes through exactly the steps the image
does. Which one takes the visual evidence away depends on the model: the blur is strengthened (``BLUR_LADDER``) until
the selected words have lost their probability, and the strength that it took is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from lvlm_probe.errors import ImageError
from lvlm_probe.trace.clips import Clip

BLUR_LADDER: tuple[float, ...] = (0.15, 0.3, 0.6, math.inf)
"""Blur strengths to try in turn: sigma of the Gaussian relative to the image's long side; the last is its limit, the
mean colour. The first is a full blur already: words are selected by what it takes away, and a word that a light blur
leaves readable would not be selected at all."""

KINDS = ("blur", "blank", "noise", "mean")

CLIP_KINDS = ("first_frame", "middle_frame", "shuffled_frames")
"""Baselines of a clip that are made of its own frames: one of them in the place of all, or all in another order. They
leave what is to be seen and take away motion, or order, alone."""


@dataclass(frozen=True)
class Baseline:
    """A baseline image and how it was made. ``params`` is plain JSON."""

    image: Image.Image
    kind: str
    params: dict[str, Any] = field(default_factory=dict)


def check_baseline(kind: object) -> None:
    """Raise ``ImageError`` for what no baseline is made of, whatever the image: a kind, an image, a description, or one
    for each image."""
    for each in kind if isinstance(kind, list | tuple) else [kind]:
        if not isinstance(each, Image.Image | Mapping) and each not in (*KINDS, *CLIP_KINDS):
            raise no_baseline(each)


def no_baseline(kind: object) -> ImageError:
    """What is raised where there is no such kind."""
    return ImageError(f"no baseline {kind!r}; choose one of {', '.join(KINDS)}, or give a PIL image of your own.")


def make_baseline(
    image: Image.Image, kind: str | Image.Image = "blur", *, strength: float = BLUR_LADDER[0], seed: int = 0
) -> Baseline:
    """Draw the baseline of one image.

    Args:
        image: the original.
        kind: ``"blur"`` (Gaussian, sigma = ``strength`` x the long side; ``inf`` gives the mean colour), ``"blank"``
            (black), ``"noise"`` (independent uniform pixels from ``seed``), ``"mean"`` (the mean colour), or an image
            of your own, which is scaled to the original's size where it differs.

    Raises:
        ImageError: ``image`` is not a PIL image, or ``kind`` is neither a known name nor a PIL image, or the blur's
            strength is not positive.
    """
    if not isinstance(image, Image.Image):
        raise ImageError(
            f"a baseline is drawn on a PIL image; got {type(image).__name__}. Use PIL.Image.open or .fromarray."
        )
    rgb = image.convert("RGB")
    if isinstance(kind, Image.Image):
        own = kind.convert("RGB")
        resized = own.size != rgb.size
        if resized:
            own = own.resize(rgb.size, Image.Resampling.BICUBIC)
        return Baseline(own, "image", {"size": list(kind.size), "resized": resized})
    if kind == "blur":
        if not strength > 0:
            raise ImageError(f"blur strength must be positive (sigma relative to the long side); got {strength!r}.")
        if math.isinf(strength):
            return Baseline(_mean_colour(rgb), "blur", {"strength": None, "sigma": None, "limit": "mean colour"})
        sigma = strength * max(rgb.size)
        return Baseline(
            rgb.filter(ImageFilter.GaussianBlur(sigma)), "blur", {"strength": float(strength), "sigma": float(sigma)}
        )
    if kind == "blank":
        return Baseline(Image.new("RGB", rgb.size), "blank")
    if kind == "noise":
        pixels = np.random.default_rng(seed).integers(0, 256, (rgb.height, rgb.width, 3), dtype=np.uint8)
        return Baseline(Image.fromarray(pixels), "noise", {"seed": int(seed)})
    if kind == "mean":
        return Baseline(_mean_colour(rgb), "mean")
    raise no_baseline(kind)


def make_baselines(
    images: Sequence[Image.Image],
    kind: str | Sequence[str | Image.Image],
    *,
    clips: Sequence[Clip] = (),
    strength: float = BLUR_LADDER[0],
    seed: int = 0,
) -> list[Baseline]:
    """Draw the baselines of a prompt's images.

    Args:
        images: in order, frames of clips among them.
        kind: as for ``make_baseline``, for all or one each; or one of ``CLIP_KINDS``, which leaves images that are no
            frames as they are.
        clips: which images are frames.
        strength, seed: as for ``make_baseline``; ``seed`` also of the order of shuffled frames.

    Raises:
        ImageError: there is no such kind, or it is one of clips and there is none.
    """
    if not isinstance(kind, str) or kind not in CLIP_KINDS:
        kinds = [kind] * len(images) if isinstance(kind, str) else list(kind)
        pairs = zip(images, kinds, strict=True)
        return [make_baseline(image, each, strength=strength, seed=seed) for image, each in pairs]
    if not clips:
        raise ImageError(f"the baseline {kind!r} is made of the frames of a video, and this prompt has none")
    params: dict[str, Any] = {"seed": int(seed)} if kind == "shuffled_frames" else {}
    made = [Baseline(image.convert("RGB"), kind, params) for image in images]
    for number, clip in enumerate(clips):
        middle = clip.frames // 2 if kind == "middle_frame" else 0
        order = [middle] * clip.frames if kind != "shuffled_frames" else _shuffled(clip.frames, (seed, number))
        for place, source in enumerate(order):
            shown = images[clip.first + source].convert("RGB")
            made[clip.first + place] = Baseline(shown, kind, params)
    return made


def _shuffled(count: int, seed: tuple[int, int]) -> list[int]:
    """Another order of ``count`` frames than their own, where there is one."""
    generator = np.random.default_rng(seed)
    while True:
        order: list[int] = generator.permutation(count).tolist()
        if count < 2 or order != sorted(order):
            return order


def _mean_colour(image: Image.Image) -> Image.Image:
    red, green, blue = np.rint(np.asarray(image, dtype=np.float64).mean(axis=(0, 1))).astype(int).tolist()
    return Image.new("RGB", image.size, (red, green, blue))
