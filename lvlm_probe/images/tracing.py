"""Traced geometry: which original pixel every model-input element looks at, learnt from the unmodified image processor.

Image processors resize, crop, pad, tile, split, patchify. Instead of one re-implementation per model family, the
processor is run as a black box on *probe images* of the image's own size, and its outputs are decoded:

========================= ============================================================================================
probe                     what it tells about one element ``pv = offset + slope * (weighted mean of grey levels)``
========================= ============================================================================================
two uniform grey images   offset and slope; a slope of zero is padding: the element never changes
one code image per bit    the image the element comes from (only with several images in one prompt)
one ramp per axis         the coordinate, to about 1/200 of the axis
cosine and sine per axis  the coordinate modulo a period of about 1/16 of the axis, to a few hundredths of a pixel
========================= ============================================================================================

A resize is a short symmetric weighted mean, so it lowers the amplitude of a sinusoid and leaves its phase in place: the
decoded phase is the element's source position. Eight runs serve one image of any size. The probes are grey, so neither
channel order nor normalisation matters; position depends on the image's size alone, so the result is reused for every
other image of that size.

Coordinates are continuous pixel coordinates of the original image: the centre of the first pixel is 0.5, the image
spans ``[0, width] x [0, height]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lvlm_probe.errors import ProcessorRefused
from lvlm_probe.images.positions import Geometry, KeyGeometry

Run = Callable[[Sequence[Image.Image]], dict[str, Tensor]]
"""The unmodified processor: one prompt's images in, named tensors out."""

# Probe grey levels stay away from 0 and 255: overshoot of bicubic and Lanczos kernels is not clipped there, and no
# processor mistakes a nearly black image for one that is already scaled to [0, 1].
_DARK, _LIGHT = 48, 208
_RAMP_START, _RAMP_SPAN = 16.0, 224.0
_WAVE = 112.0
_LIVE = 1e-3  # |slope| relative to the largest one, below which an element is padding
_WHOLE = 0.6  # ... above which an element is not blended with padding, so that its decoded position is exact
_MAX_BROADCAST = 16  # largest channel x time repetition looked for inside one axis


def trace_geometry(
    run: Run, sizes: Sequence[tuple[int, int]], reference: Mapping[str, Tensor], *, name: str = "the image processor"
) -> Geometry:
    """Learn the geometry of one prompt's images from the processor's outputs on probe images.

    Args:
        run: the unmodified processor; called ``2 + ceil(log2(n_images)) + 6`` times.
        sizes: ``(width, height)`` of each image.
        reference: the processor's output for the real images; every probe must give the same names and shapes.
        name: what to call the processor in messages.

    Raises:
        ProcessorRefused: output shapes or non-pixel outputs depend on the image's content, no element depends on it
            linearly (normalisation per image), or positions cannot be decoded.
    """
    calls = 0

    def probe(patterns: Sequence[np.ndarray]) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        out = run([Image.fromarray(np.repeat(p[:, :, None], 3, axis=2)) for p in patterns])
        check_same_layout(reference, out, name=name)
        return out

    dark = probe([_uniform(size, _DARK) for size in sizes])
    light = probe([_uniform(size, _LIGHT) for size in sizes])
    scales: dict[str, Tensor] = {}
    for key, low in dark.items():
        if low.is_floating_point() and low.numel():
            slope = (light[key].float() - low.float()) / (_LIGHT - _DARK)
            # Less than rounding noise of what images do is no response (an image's own mean taken off).
            shown = reference[key][torch.isfinite(reference[key])].float()
            span = float(shown.max() - shown.min()) if shown.numel() else 0.0
            if float(slope.abs().max()) * (_LIGHT - _DARK) > 1e-3 * span:
                scales[key] = slope
            elif not torch.equal(low, reference[key]):
                raise _own_statistics(name, key)
    if not scales:
        raise _own_statistics(name, "none of the outputs")

    divisors = {key: torch.where(slope == 0, 1.0, slope) for key, slope in scales.items()}

    def levels(out: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Grey level that each element shows, undoing offset and slope; without meaning for padding."""
        return {k: out[k].float().sub_(dark[k]).div_(d).add_(_DARK) for k, d in divisors.items()}

    codes = [
        levels(probe([_uniform(size, _LIGHT if k >> bit & 1 else _DARK) for k, size in enumerate(sizes)]))
        for bit in range((len(sizes) - 1).bit_length())
    ]
    waves = [
        levels(probe([pattern(size, axis, kind) for size in sizes]))
        for axis in (0, 1)
        for kind in ("ramp", "cos", "sin")
    ]
    keys = {
        key: _key_geometry(slope, [c[key] for c in codes], [w[key] for w in waves], sizes, where=f"{name}: {key!r}")
        for key, slope in scales.items()
    }
    return Geometry(sizes=tuple(sizes), keys=keys, runs=calls)


def _own_statistics(name: str, key: str) -> ProcessorRefused:
    return ProcessorRefused(
        f"{name}: uniform images of different brightness give the same pixel inputs, or no finite ones ({key}), so it "
        "normalises each image by its own statistics and a pixel's value depends on the whole image. Masks cannot be "
        "carried through it; attach without a processor (masks then live in pixel-input space)."
    )


def check_same_layout(reference: Mapping[str, Tensor], out: Mapping[str, Tensor], *, name: str) -> None:
    """Raise ProcessorRefused unless ``out`` has the names and shapes of ``reference`` and equal integer tensors.

    For images of one size a difference can only come from the images' content (margin cropping, a learned or random
    choice of tiles), which no mask can follow.
    """
    if set(reference) != set(out):
        raise ProcessorRefused(
            f"{name}: images of one size give different outputs ({sorted(reference)} and {sorted(out)}), so its layout "
            "depends on the image's content. Switch that option off, or attach without a processor."
        )
    for key, expected in reference.items():
        got = out[key]
        if got.shape != expected.shape:
            raise ProcessorRefused(
                f"{name}: images of one size give {key!r} of shapes {tuple(expected.shape)} and {tuple(got.shape)}, "
                "so its geometry depends on the image's content or is random. Switch that option off (cropping of "
                "margins, random resizing), or attach without a processor."
            )
        if not expected.is_floating_point() and not torch.equal(expected, got):
            raise ProcessorRefused(
                f"{name}: the integer output {key!r} depends on the image's content (or is random), so a mask "
                "cannot be carried through it with a gradient. Switch that option off, or attach without a processor."
            )


def _uniform(size: tuple[int, int], value: int) -> np.ndarray:
    return np.full((size[1], size[0]), value, dtype=np.uint8)


def _period(extent: Tensor) -> Tensor:
    # Half a period must exceed the ramp's error (two roundings, 1/150 of the axis at worst) by a wide margin, and a
    # period must span several output elements even where an image is shrunk to some tens of pixels.
    return (extent / 16).clamp(min=32.0)


def pattern(size: tuple[int, int], axis: int, kind: str) -> np.ndarray:
    """A grey probe image that varies along one axis (0: x, 1: y), uint8 ``(height, width)``."""
    extent = float(size[axis])
    centre = np.arange(size[axis]) + 0.5
    if kind == "ramp":
        values = _RAMP_START + _RAMP_SPAN * centre / extent
    else:
        wave = np.cos if kind == "cos" else np.sin
        values = 128 + _WAVE * wave(2 * math.pi * centre / float(_period(torch.tensor(extent, dtype=torch.float32))))
    values = np.rint(values).astype(np.uint8)
    shaped = values[None, :] if axis == 0 else values[:, None]
    return np.ascontiguousarray(np.broadcast_to(shaped, (size[1], size[0])))


def _key_geometry(
    slope: Tensor, codes: Sequence[Tensor], waves: Sequence[Tensor], sizes: Sequence[tuple[int, int]], *, where: str
) -> KeyGeometry:
    """Geometry of one tensor from the levels its elements show on the probes."""
    largest = slope.abs().max()
    strength = slope.abs() / largest
    view, spatial, representative = _repetitions(strength, [*codes, *waves])
    strength = representative(strength)
    live, whole = strength > _LIVE, strength > _WHOLE
    image = torch.zeros(spatial, dtype=torch.int64)
    for bit, code in enumerate(codes):
        share = (representative(code) - _DARK) / (_LIGHT - _DARK)
        if bool(((share - share.round()).abs() > 0.2).logical_and(whole).any()):
            raise ProcessorRefused(
                f"{where} mixes several images of the prompt in one element. Record one image per prompt, or attach "
                "without a processor (masks then live in pixel-input space)."
            )
        image += torch.where(live, share.round().clamp(0, 1), 0.0).long() << bit
    image.clamp_(max=len(sizes) - 1)
    extents = torch.tensor(sizes, dtype=torch.float32)
    shown = [representative(wave) for wave in waves]
    x = _decode(*shown[:3], extent=extents[image, 0], whole=whole, where=where)
    y = _decode(*shown[3:], extent=extents[image, 1], whole=whole, where=where)
    return KeyGeometry(
        shape=tuple(slope.shape),
        view=view,
        spatial=spatial,
        x=x,
        y=y,
        image=image.to(torch.int16),
        live=live,
        slope=torch.where(slope.abs() > _LIVE * largest, slope, 0.0).bfloat16(),
    )


def _decode(ramp: Tensor, cos: Tensor, sin: Tensor, *, extent: Tensor, whole: Tensor, where: str) -> Tensor:
    """Coordinate along one axis from the levels an element shows on the three probes of that axis."""
    coarse = (ramp - _RAMP_START) / _RAMP_SPAN * extent
    period = _period(extent)
    cos, sin = (cos - 128) / _WAVE, (sin - 128) / _WAVE
    fine = torch.atan2(sin, cos) / (2 * math.pi) * period
    fine += period * torch.round((coarse - fine) / period)
    amplitude = torch.hypot(cos, sin)
    decoded = (amplitude > 0.1) & (amplitude < 1.5) & ((fine - coarse).abs() < 0.35 * period)
    measured = whole & (extent > 1)
    lost = float((measured & ~decoded).sum()) / max(float(measured.sum()), 1.0)
    if lost > 0.05:
        raise ProcessorRefused(
            f"{where} does not show the image position by position ({lost:.0%} of its elements could not be "
            "located): the processor is random, mixes distant pixels or changes grey levels non-linearly. Attach "
            "without a processor (masks then live in pixel-input space)."
        )
    position = torch.where(decoded & whole, fine, coarse)
    # Elements blended with padding show a mixture; they lie at the border, so the border bounds them.
    position = torch.minimum(position.clamp_(min=0.0), extent)
    position = torch.where(extent <= 1, 0.5 * extent, position)
    centre = position.floor() + 0.5
    tolerance = 0.05 + 1e-3 * period
    if bool(measured.any()) and bool(((position - centre).abs() <= tolerance)[measured].all()):
        position = torch.where(measured, centre, position)  # nothing was resized: every element is one pixel
    return position


def _repetitions(
    strength: Tensor, shown: Sequence[Tensor]
) -> tuple[tuple[int, ...], tuple[int, ...], Callable[[Tensor], Tensor]]:
    """Find the axes, or factors of axes, along which every probe shows the same (channels, repeated frames).

    Returns:
        ``view``, ``spatial`` (see :class:`KeyGeometry`), and the function that reduces a per-element tensor to one
        value per position: that of the element least blended with padding.
    """
    view: list[int] = []
    spatial: list[int] = []
    chosen: list[tuple[tuple[int, ...], int, Tensor]] = []
    shape = tuple(strength.shape)
    for place, size in enumerate(shape):
        pair: tuple[int, ...] = (size,)
        repeated = -1
        for candidate, side in _factorings(size):
            split = (*spatial, *candidate, *shape[place + 1 :])
            axis = len(spatial) + side
            if _same_along([t.reshape(split) for t in shown], strength.reshape(split), axis):
                strongest = strength.reshape(split).argmax(axis, keepdim=True)
                chosen.append((split, axis, strongest))
                strength = strength.reshape(split).gather(axis, strongest)
                shown = [t.reshape(split).gather(axis, strongest) for t in shown]
                pair, repeated = candidate, side
                break
        view += pair
        spatial += [1 if index == repeated else n for index, n in enumerate(pair)]

    def representative(values: Tensor) -> Tensor:
        for split, axis, strongest in chosen:
            values = values.reshape(split).gather(axis, strongest)
        return values.reshape(spatial)

    return tuple(view), tuple(spatial), representative


def _factorings(size: int) -> list[tuple[tuple[int, ...], int]]:
    """Ways to read an axis as (repetition, position) or (position, repetition), largest repetition first."""
    found: list[tuple[tuple[int, ...], int]] = []
    for times in range(min(size, _MAX_BROADCAST), 1, -1):
        if times == size:
            found.append(((size,), 0))
        elif size % times == 0:
            found.append(((times, size // times), 0))
            found.append(((size // times, times), 1))
    return found


def _same_along(shown: Sequence[Tensor], strength: Tensor, axis: int) -> bool:
    """Whether elements that differ only along ``axis`` show the same level on every probe, and are live together."""
    for index in range(1, strength.shape[axis]):
        one, other = strength.select(axis, 0) > _LIVE, strength.select(axis, index) > _LIVE
        both = one & other
        # The columns of an image of one column show the same, its margins do not.
        if not bool(both.any()) or float((one ^ other).sum()) > 0.03 * float(both.sum()):
            return False
        for levels in shown:
            apart = ((levels.select(axis, index) - levels.select(axis, 0)).abs() > 0.05) & both
            # A few border elements blended with a coloured padding differ between channels.
            if float(apart.sum()) > 0.03 * float(both.sum()):
                return False
    return True
