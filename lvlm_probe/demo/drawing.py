"""Drawing a layout of coloured shapes: anti-aliased, softly lit, on a mottled ground."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from lvlm_probe.demo.questions import Item, Layout

REACH = 1.12
"""The farthest any outline gets from its centre, in radii."""
_OVERSAMPLE = 4
_HSV: dict[str, tuple[float, float, float]] = {
    "red": (0.990, 0.84, 0.88),
    "yellow": (0.138, 0.86, 0.96),
    "green": (0.345, 0.72, 0.66),
    "cyan": (0.502, 0.70, 0.88),
    "blue": (0.617, 0.82, 0.84),
    "purple": (0.775, 0.66, 0.74),
}


def shade(rng: np.random.Generator, colour: str) -> tuple[float, float, float]:
    """A shade of a named colour, RGB in 0..1."""
    hue, saturation, value = _HSV[colour]
    hue = (hue + rng.uniform(-0.014, 0.014)) % 1.0
    saturation = min(1.0, saturation * rng.uniform(0.90, 1.08))
    value = min(1.0, value * rng.uniform(0.90, 1.08))
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return float(red), float(green), float(blue)


def render(layout: Layout, size: tuple[int, int] = (336, 336)) -> tuple[Image.Image, np.ndarray]:
    """Draw a layout.

    Returns the RGB image and, ``(H, W)`` int8, the index of the object that covers at least half of a pixel, or -1.
    """
    return next(render_frames([layout], size))


def render_frames(layouts: Sequence[Layout], size: tuple[int, int]) -> Iterator[tuple[Image.Image, np.ndarray]]:
    """Draw layouts one after the other, all on the ground of the first."""
    import numpy as np
    from PIL import Image

    width, height = size
    side = min(size)
    left, top = (width - side) / 2, (height - side) / 2
    texture, pattern = layouts[0].texture, layouts[0].pattern
    empty = background(texture, size)
    if pattern:
        empty += pattern * _weave(texture, size)
    ground = _ground(np.random.default_rng(texture)).astype(np.float32)
    for layout in layouts:
        canvas = empty.copy()
        labels = np.full((height, width), -1, dtype=np.int8)
        for index, item in enumerate(layout.items):
            x, y, radius = left + item.x * side, top + item.y * side, item.radius * side
            _draw_item(canvas, labels, index, item, x, y, radius, ground)
        yield Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8)), labels


def footprints(layout: Layout, side: int) -> np.ndarray:
    """Return what each object would cover alone, ``(objects, side, side)`` bool on the central square."""
    import numpy as np
    from PIL import Image, ImageDraw

    found = np.zeros((len(layout.items), side, side), dtype=bool)
    for index, item in enumerate(layout.items):
        stencil = Image.new("1", (side, side))
        outline = [
            ((item.x + px * item.radius) * side - 0.5, (item.y + py * item.radius) * side - 0.5)
            for px, py in _outline(item.shape, item.angle)
        ]
        ImageDraw.Draw(stencil).polygon(outline, fill=1)
        found[index] = np.asarray(stencil)
    return found


def _draw_item(
    canvas: np.ndarray,
    labels: np.ndarray,
    index: int,
    item: Item,
    x: float,
    y: float,
    radius: float,
    ground: np.ndarray,
) -> None:
    import numpy as np
    from PIL import Image, ImageDraw, ImageFilter

    pad = math.ceil(radius * 0.35) + 2
    reach = math.ceil(radius * REACH) + pad
    x0, y0 = math.floor(x) - reach, math.floor(y) - reach
    extent = 2 * reach + 1
    outline = [
        ((x - x0 + px * radius) * _OVERSAMPLE, (y - y0 + py * radius) * _OVERSAMPLE)
        for px, py in _outline(item.shape, item.angle)
    ]
    stencil = Image.new("L", (extent * _OVERSAMPLE, extent * _OVERSAMPLE))
    ImageDraw.Draw(stencil).polygon(outline, fill=255)
    stencil = stencil.reduce(_OVERSAMPLE)
    blurred = stencil.filter(ImageFilter.BoxBlur(max(1, round(radius * 0.12))))
    drop = max(1, round(radius * 0.10))

    rows = slice(max(0, y0), min(canvas.shape[0], y0 + extent))
    columns = slice(max(0, x0), min(canvas.shape[1], x0 + extent))
    own = (slice(rows.start - y0, rows.stop - y0), slice(columns.start - x0, columns.stop - x0))
    cover = np.asarray(stencil, dtype=np.float32)[own] / 255
    shadow = np.roll(np.asarray(blurred, dtype=np.float32), (drop, drop // 2), (0, 1))[own] / 255

    ys = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None]
    xs = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :]
    light = 1.0 - 0.10 * ((ys - y) + 0.5 * (xs - x)) / radius
    fill = np.asarray(item.rgb, dtype=np.float32) * 255 * light[:, :, None]
    if item.contrast < 1.0:
        fill = ground + item.contrast * (fill - ground)
    patch = canvas[rows, columns]
    patch *= 1.0 - 0.38 * item.contrast * (shadow * (1 - cover))[:, :, None]
    patch += cover[:, :, None] * (np.minimum(fill, 255) - patch)
    labels[rows, columns][cover >= 0.5] = index


def _outline(shape: str, angle: float) -> list[tuple[float, float]]:
    """The outline in radii around the centre, y downwards, turned by `angle`."""
    points: list[tuple[float, float]]
    if shape == "circle":
        points = [(math.cos(t * math.tau / 72), math.sin(t * math.tau / 72)) for t in range(72)]
    elif shape == "square":
        points = [(-0.80, -0.80), (0.80, -0.80), (0.80, 0.80), (-0.80, 0.80)]
    elif shape == "triangle":
        points = [(1.10 * math.sin(t * math.tau / 3), 0.14 - 1.10 * math.cos(t * math.tau / 3)) for t in range(3)]
    elif shape == "star":
        points = []
        for t in range(10):
            length = 1.10 if t % 2 == 0 else 0.46
            points.append((length * math.sin(t * math.tau / 10), -length * math.cos(t * math.tau / 10)))
    elif shape == "cross":
        arm, end = 0.30, 0.98
        corner = [(arm, -end), (arm, -arm), (end, -arm)]
        points = []
        for turn in range(4):
            c, s = math.cos(turn * math.pi / 2), math.sin(turn * math.pi / 2)
            points += [(px * c - py * s, px * s + py * c) for px, py in corner]
    elif shape == "heart":
        points = []
        for t in range(72):
            a = t * math.tau / 72
            px = math.sin(a) ** 3
            py = (13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16
            points.append((0.98 * px, -0.98 * py - 0.06))
    else:
        raise ValueError(f"no outline is known for the shape {shape!r}")
    c, s = math.cos(angle), math.sin(angle)
    return [(px * c - py * s, px * s + py * c) for px, py in points]


def background(texture: int, size: tuple[int, int]) -> np.ndarray:
    """Paint a muted, mottled ground with a fine grain, ``(H, W, 3)`` float32 in 0..255."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(texture)
    width, height = size
    base = _ground(rng)

    def mottle(cells: int, amplitude: float, channels: int) -> np.ndarray:
        coarse = np.clip(128 + amplitude * rng.standard_normal((cells, cells, channels)), 0, 255).astype(np.uint8)
        mottled = Image.fromarray(np.broadcast_to(coarse, (cells, cells, 3)))
        return np.asarray(mottled.resize((56, 56), Image.Resampling.BICUBIC), dtype=np.float32) - 128

    ground = base.astype(np.float32) + mottle(5, 7.0, 3) + mottle(14, 7.0, 1) + mottle(56, 5.0, 1)
    image = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = np.frombuffer(rng.bytes(width * height), dtype=np.uint8).reshape(height, width, 1)
    return np.asarray(image, dtype=np.float32) + (grain.astype(np.float32) - 127.5) * 0.055


def _ground(rng: np.random.Generator) -> np.ndarray:
    """The mean colour of the ground, ``(3,)`` in 0..255."""
    import numpy as np

    hue, saturation = rng.random(), rng.uniform(0.02, 0.15)
    value = rng.uniform(0.26, 0.92)
    return np.asarray(colorsys.hsv_to_rgb(hue, saturation, value)) * 255


def _weave(texture: int, size: tuple[int, int]) -> np.ndarray:
    """Stripes, checks or ripples in a random direction, ``(H, W, 1)`` float32 in -1..1."""
    import numpy as np

    rng = np.random.default_rng([texture, 1])  # apart from the ground's own generator, which stays as it was
    width, height = size
    side = min(size)
    ys = ((np.arange(height, dtype=np.float32) + 0.5 - height / 2) / side)[:, None]
    xs = ((np.arange(width, dtype=np.float32) + 0.5 - width / 2) / side)[None, :]
    way, angle, period = int(rng.integers(3)), rng.uniform(0, math.pi), rng.uniform(0.07, 0.16)
    phase, bend = rng.uniform(0, math.tau, 2)
    along, across = xs * math.cos(angle) + ys * math.sin(angle), ys * math.cos(angle) - xs * math.sin(angle)
    if way == 2:
        along = along + 0.35 * period * np.sin(math.tau * across / (2.5 * period) + bend)
    wave = np.sin(math.tau * along / period + phase)
    if way == 1:
        wave = wave * np.sin(math.tau * across / period + bend)
    return wave.astype(np.float32)[:, :, None]
