"""Image processors that return more than one tensor of pixels: every one of them carries the mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from PIL import Image

from lvlm_probe.errors import ProcessorRefused
from lvlm_probe.images import ImagePath
from lvlm_probe.recording.processor_watch import ProcessorWatch

_SIDES = {"height": 56, "width": 56}
_HIGH = {"height": 112, "width": 112}


def _hybrid() -> Any:
    return transformers.DeepseekVLHybridImageProcessorPil(size=_SIDES, high_res_size=_HIGH)


def _crops() -> Any:
    return transformers.DeepseekOcr2ImageProcessorPil(
        size=_SIDES, tile_size=48, crop_to_patches=True, min_patches=2, max_patches=6
    )


_CASES = {
    "two resolutions": (_hybrid, ("pixel_values", "high_res_pixel_values"), ()),
    "local crops": (_crops, ("pixel_values", "pixel_values_local"), ("num_local_patches",)),
}
_ALL = pytest.mark.parametrize("case", _CASES)


def _composite(path: ImagePath, mask: torch.Tensor) -> Image.Image:
    """The masked picture, in NumPy: every cell of the mask is a block of whole pixels."""
    whole, low = (np.asarray(p, dtype=np.float64) for p in (path.images[0], path.baseline_images[0]))
    rows, columns = (side // cells for side, cells in zip(whole.shape[:2], mask.shape, strict=True))
    weight = np.kron(mask.numpy(), np.ones((rows, columns)))[:, :, None]
    return Image.fromarray((weight * whole + (1 - weight) * low).round().astype(np.uint8))


@_ALL
def test_every_pixel_tensor_carries_the_mask_and_counts_stay_as_they_are(case: str) -> None:
    make, pixels, counts = _CASES[case]
    processor = make()
    path = ImagePath.from_processor(processor, [tiny_models.picture(120, 80)])
    assert set(path.pixel_keys) == set(pixels)
    mask = torch.ones(80, 120)  # one cell a pixel, so that nothing is interpolated
    mask[:, :60] = 0
    made = path.apply(mask[None])
    truth = processor(images=[_composite(path, mask)], return_tensors="pt")
    for name in pixels:
        scale = 255 * 0.27  # levels in one unit of a normalised tensor, about
        blended, whole = made[name], path.inputs[name]
        assert float((blended - truth[name]).abs().mean()) * scale < 2
        assert float((whole - truth[name]).abs().mean()) * scale > 4  # the mask is seen in this tensor at all
    for name in counts:
        assert torch.equal(made[name], path.inputs[name])
        assert not made[name].is_floating_point()


@_ALL
def test_each_pixel_tensor_has_the_gradient_of_its_finite_difference(case: str) -> None:
    make, pixels, _ = _CASES[case]
    path = ImagePath.from_processor(make(), [tiny_models.picture(120, 80)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    mask = 0.3 + 0.4 * torch.rand(1, 8, 12, generator=generator, dtype=torch.float64)
    way = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    for name in pixels:
        weight = torch.randn(path.inputs[name].shape, generator=generator, dtype=torch.float64)
        leaf = mask.clone().requires_grad_()
        (grad,) = torch.autograd.grad((path.apply(leaf)[name] * weight).sum(), leaf)
        ends = [(path.apply(mask + side * 1e-3 * way)[name] * weight).sum() for side in (1, -1)]
        slope = float(ends[0] - ends[1]) / 2e-3
        assert float(grad.abs().max()) > 0
        assert float((grad * way).sum()) == pytest.approx(slope, rel=1e-3, abs=1e-4)


@pytest.mark.quick
def test_a_crop_shows_its_own_part_of_the_picture() -> None:
    path = ImagePath.from_processor(_crops(), [tiny_models.picture(120, 60)])  # two crops, side by side
    x, _, _, live = path.coordinates("pixel_values_local")
    assert x.shape[0] == 2 and bool(live.all())
    assert float(x[0].max()) <= 61 and float(x[1].min()) >= 59
    left = torch.ones(1, 2, 12)
    left[..., :4] = 0  # the left third
    made, whole = path.apply(left)["pixel_values_local"], path.inputs["pixel_values_local"]
    assert float((made[0] - whole[0]).abs().max()) > 0.05
    assert torch.allclose(made[1], whole[1], atol=1e-6)


@_ALL
def test_a_call_with_several_tensors_is_recognised_only_if_all_of_them_are_the_models(case: str) -> None:
    make, pixels, _ = _CASES[case]
    picture, processor, watch = tiny_models.picture(120, 80), make(), ProcessorWatch()
    made = processor(images=[picture], return_tensors="pt")
    watch.add([picture], {}, made)
    assert watch.find(dict(made)) is not None
    for name in pixels:
        assert watch.find({**made, name: made[name] + 0.01}) is None


def test_lists_of_bfloat16_tensors_are_recognised_and_ragged_ones_do_not_disturb() -> None:
    watch = ProcessorWatch()
    parts = [torch.rand(3, 4, 4).to(torch.bfloat16) for _ in range(2)]
    watch.add([tiny_models.picture()], {}, {"pixel_values": parts})
    assert watch.find({"pixel_values": torch.stack(parts)}) is not None
    watch = ProcessorWatch()
    watch.add([tiny_models.picture()], {}, {"pixel_values": [torch.rand(3, 4, 4), torch.rand(3, 5, 4)]})
    assert len(watch) == 0


@pytest.mark.quick
def test_ragged_pixels_and_whitened_pictures_are_refused_in_words() -> None:
    def ragged(images: Any, return_tensors: str = "pt") -> dict[str, Any]:
        return {"pixel_values": [torch.rand(3, 4, 4), torch.rand(3, 5, 4)]}

    def whitened(images: Any, return_tensors: str = "pt") -> dict[str, Any]:
        values = torch.from_numpy(np.array(images[0])).permute(2, 0, 1).float()
        return {"pixel_values": ((values - values.mean()) / values.std())[None]}

    with pytest.raises(ProcessorRefused, match="different shapes"):
        ImagePath.from_processor(ragged, [tiny_models.picture()])
    with pytest.raises(ProcessorRefused):
        ImagePath.from_processor(whitened, [tiny_models.picture()]).apply(torch.rand(1, 4, 4))
