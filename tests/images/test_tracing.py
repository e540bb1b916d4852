"""Traced positions against positions computed by hand; the composite against interpolation and finite differences."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from image_processors import Fourier, MarginCropped, Odd, Untouched, Whitened, build, photograph
from PIL import Image
from torch.nn import functional as F

from lvlm_probe.errors import ProcessorRefused
from lvlm_probe.images.composite import composite
from lvlm_probe.images.positions import Geometry
from lvlm_probe.images.processor import BlackBox
from lvlm_probe.images.tracing import trace_geometry
from lvlm_probe.planning.meter import Meter


def trace(processor, sizes, *, structure="flat") -> Geometry:
    box = BlackBox(processor, {}, structure)
    return trace_geometry(box, sizes, box([photograph(*size) for size in sizes]), name=box.name)


def expanded(geometry: Geometry, key: str = "pixel_values"):
    traced = geometry.keys[key]
    return tuple(traced.expand(t) for t in (traced.x, traced.y, traced.image, traced.live))


@pytest.mark.parametrize("size", [(64, 48), (8, 8), (203, 101), (1500, 1000)])
def test_without_a_resize_every_element_is_one_pixel_exactly(size) -> None:
    width, height = size
    geometry = trace(Untouched(), [size])
    x, y, _, live = expanded(geometry)
    rows, cols = height // 8, width // 8
    down, across = torch.meshgrid(torch.arange(rows * 8), torch.arange(cols * 8), indexing="ij")

    def patches(grid):
        return (
            grid.reshape(rows, 8, cols, 8).permute(0, 2, 1, 3).reshape(rows * cols, 1, 64).expand(-1, 3, -1).flatten(1)
        )

    assert torch.equal(x, patches(across) + 0.5)
    assert torch.equal(y, patches(down) + 0.5)
    assert bool(live.all())
    assert geometry.keys["pixel_values"].spatial == (rows * cols, 1, 64)  # channels share positions


@pytest.mark.parametrize("size", [(500, 333), (1500, 1000), (33, 47)])
def test_resize_and_centre_crop(size) -> None:
    width, height = size
    processor, _ = build("clip")
    x, y, _, live = expanded(trace(processor, [size]))
    new_width, new_height = (336 * side // min(size) for side in size)
    left, top = (new_width - 336) // 2, (new_height - 336) // 2
    expected_x = (left + torch.arange(336) + 0.5) * width / new_width
    expected_y = (top + torch.arange(336) + 0.5) * height / new_height
    inner = slice(8, -8)  # at the border the clipped kernel's centre of mass is drawn inwards
    tolerance = 0.05 * max(1.0, min(size) / 336)  # pixels; a twentieth of an element
    assert float((x[0, :, inner, inner] - expected_x[inner]).abs().mean()) < 0.4 * tolerance
    assert float((x[0, :, inner, inner] - expected_x[inner]).abs().max()) < 4 * tolerance
    assert float((y[0, :, inner, inner] - expected_y[inner, None]).abs().max()) < 4 * tolerance
    assert bool(live.all())


def test_an_odd_layout_is_decoded_like_any_other() -> None:
    width, height = 200, 120
    x, y, _, live = expanded(trace(Odd(), [(width, height)]), "pixels")
    assert x.shape == (1, 40, 24, 3)
    expected_x = width - (torch.arange(40) + 0.5) * width / 40  # mirrored
    expected_y = (torch.arange(24) + 0.5) * height / 24
    assert float((x[0, 1:-1, :, :] - expected_x[1:-1, None, None]).abs().max()) < 0.3
    assert float((y[0, :, 1:-1, :] - expected_y[1:-1, None]).abs().max()) < 0.3
    assert bool(live.all())


def test_padding_is_known_and_tiles_come_from_their_own_part() -> None:
    processor, _ = build("llava_next")
    width, height = 640, 200  # fitted into tiles, which leaves bars above and below
    x, y, _, live = expanded(trace(processor, [(width, height)]))
    out = processor(images=[photograph(width, height)], return_tensors="pt")["pixel_values"]
    other = processor(images=[photograph(width, height, seed=5)], return_tensors="pt")["pixel_values"]
    assert not bool(live.all())
    assert torch.equal(out[~live], other[~live])
    assert x.shape == out.shape
    tile_means = [float(x[0, tile][live[0, tile]].mean()) for tile in range(1, x.shape[1])]
    assert tile_means == sorted(tile_means)  # the tiles of one row, left to right
    assert float(x[live].min()) >= 0
    assert float(x[live].max()) <= width
    assert float(y[live].max()) <= height


@pytest.mark.parametrize("size", [(1, 7), (7, 1), (1, 40)])
def test_the_margins_of_an_image_of_one_column_or_row_are_padding(size) -> None:
    """Along it every element shows the same, so that margins could pass for copies of the image beside them."""
    small = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    processor, _ = build("llava_next", **small, image_grid_pinpoints=[[112, 56], [56, 112]])
    *_, live = expanded(trace(processor, [size]))
    grey, other = (processor(images=[Image.new("RGB", size, (level,) * 3)], return_tensors="pt") for level in (90, 170))
    moved = (grey["pixel_values"] - other["pixel_values"]).abs() > 0.01
    assert moved.any() and not moved.all()
    assert torch.equal(live, moved)


def test_two_tensors_of_one_image() -> None:
    processor, _ = build("deepseek_vl_hybrid")
    geometry = trace(processor, [(300, 200)])
    assert set(geometry.keys) == {"pixel_values", "high_res_pixel_values"}
    for key in geometry.keys:
        x, y, _, live = expanded(geometry, key)
        centre = x.shape[-1] // 2
        assert abs(float(x[0, 0, centre, centre]) - 150) < 0.6
        assert abs(float(y[0, 0, centre, centre]) - 100) < 0.6
        assert not bool(live.all())  # padded to a square


def test_several_images_are_told_apart() -> None:
    sizes = [(64, 48), (40, 80), (24, 24)]
    x, y, image, _ = expanded(trace(Untouched(), sizes))
    counts = [width // 8 * (height // 8) for width, height in sizes]
    expected = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    assert torch.equal(image[:, 0].long(), expected)
    assert float(x[image == 1].max()) == 39.5
    assert float(y[image == 1].max()) == 79.5


def test_seen_is_all_of_a_scaled_image_and_the_middle_of_a_cropped_one() -> None:
    siglip, _ = build("siglip")
    assert bool(trace(siglip, [(431, 517)]).seen(0).all())
    clip, _ = build("clip")
    seen = trace(clip, [(600, 300)]).seen(0)
    assert seen.shape == (300, 600)
    columns = torch.nonzero(seen.any(0)).flatten()
    assert abs(int(columns[0]) - 150) <= 1
    assert abs(int(columns[-1]) - 449) <= 1
    assert bool(seen[:, 151:449].all())


def test_what_is_seen_of_a_page_takes_some_bytes_per_pixel_once() -> None:
    clip, _ = build("clip")
    found, meter, again = trace(clip, [(900, 1200)]), Meter(torch.device("cpu")), Meter(torch.device("cpu"))
    with meter.running():
        seen = found.seen(0)
    with again.running():
        assert found.seen(0) is seen
    assert again.reading.peak == 0 and meter.reading.peak < 14 * 900 * 1200  # two copies in 64 bits alone are 16


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (3, 4), (48, 64), (90, 100)])
def test_sampling_is_bilinear_interpolation(shape) -> None:
    """Where nothing is resized, sampling at pixel centres is what ``interpolate`` does to the whole mask."""
    geometry = trace(Untouched(), [(64, 48)])
    mask = torch.rand(2, 1, *shape, generator=torch.Generator().manual_seed(1))
    ones, zeros = torch.ones(48, 192), torch.zeros(48, 192)
    sampled = composite(mask, geometry, "pixel_values", original=ones, baseline=zeros, dtype=torch.float32)
    fine = F.interpolate(mask, size=(48, 64), mode="bilinear", align_corners=False)
    expected = fine.reshape(2, 6, 8, 8, 1, 8).transpose(2, 3).reshape(2, 6, 8, 1, 64).expand(-1, -1, -1, 3, -1)
    assert torch.allclose(sampled.reshape(2, 48, 192), expected.reshape(2, 48, 192), atol=2e-6)


@pytest.mark.quick
def test_the_composite_is_the_formula_and_its_gradient_the_finite_difference() -> None:
    geometry = trace(Odd(), [(50, 30), (20, 40)])
    generator = torch.Generator().manual_seed(0)
    original, baseline = (torch.rand(2, 40, 24, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(3, 2, 4, 5, generator=generator, dtype=torch.float64)

    def blend(m: torch.Tensor) -> torch.Tensor:
        return composite(m, geometry, "pixels", original=original, baseline=baseline, dtype=torch.float64)

    out = blend(mask)
    assert out.shape == (6, 40, 24, 3)
    x, y, image, _ = (t.double() for t in expanded(geometry, "pixels"))
    sizes = np.array(geometry.sizes)
    for copy, n, i, j, c in [(0, 0, 3, 4, 0), (2, 1, 39, 23, 2), (1, 1, 20, 0, 1)]:
        k = int(image[n, i, j, c])
        col = min(max(float(x[n, i, j, c]) / sizes[k, 0] * 5 - 0.5, 0), 4)
        row = min(max(float(y[n, i, j, c]) / sizes[k, 1] * 4 - 0.5, 0), 3)
        c0, r0 = min(int(col), 3), min(int(row), 2)
        a, b = col - c0, row - r0
        cells = mask[copy, k]
        m = (1 - b) * ((1 - a) * cells[r0, c0] + a * cells[r0, c0 + 1])
        m = m + b * ((1 - a) * cells[r0 + 1, c0] + a * cells[r0 + 1, c0 + 1])
        expected = baseline[n, i, j, c] + m * (original[n, i, j, c] - baseline[n, i, j, c])
        assert float(out[2 * copy + n, i, j, c]) == pytest.approx(float(expected), abs=1e-6)
    assert torch.autograd.gradcheck(blend, (mask[:1, :, :2, :3].clone().requires_grad_(),), fast_mode=True)


def test_refusals_name_the_processor_and_the_reason() -> None:
    with pytest.raises(ProcessorRefused, match=r"Whitened: .*own statistics"):
        trace(Whitened(), [(64, 48)])
    box = BlackBox(MarginCropped(), {}, "flat")
    image = photograph(64, 48)
    image.paste((0, 0, 0), (0, 0, 20, 48))
    with pytest.raises(ProcessorRefused, match=r"MarginCropped: .*depends on the image"):
        trace_geometry(box, [(64, 48)], box([image]), name=box.name)
    with pytest.raises(ProcessorRefused, match=r"Fourier: .*could not be located"):
        trace(Fourier(), [(64, 48)])


def test_threads_may_share_the_sampling_matrices() -> None:
    """More grids than are kept, so that each thread lets go of what another is about to use."""
    geometry = trace(Untouched(), [(64, 48)])
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    alone = {n: trace(Untouched(), [(64, 48)]).sampler("pixel_values", n, n, **options) for n in range(4, 9)}
    together = threading.Barrier(4)

    def work(step: int) -> None:
        together.wait()
        for turn in range(300):
            n = 4 + turn // 2 * step % 5
            for found, expected in zip(geometry.sampler("pixel_values", n, n, **options), alone[n], strict=True):
                assert torch.equal(found.values(), expected.values())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(1, 5)))
    finally:
        sys.setswitchinterval(interval)
