"""ImagePath over the PIL backends of eleven families, odd and refused processors, baselines, PixelPath."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from image_processors import (
    FAMILIES,
    AlphaSquared,
    MarginCropped,
    Odd,
    OverWhite,
    RandomCrop,
    RandomFlip,
    Stretched,
    Untouched,
    Whitened,
    build,
    over_white,
    photograph,
)
from marks import campaign
from PIL import Image, ImageFilter
from torch.nn import functional as F

from lvlm_probe.errors import ImageError, MaskError, ProbeWarning, ProcessorRefused
from lvlm_probe.images import BLUR_LADDER, ImagePath, PixelPath, make_baseline
from lvlm_probe.recording.handed_images import hand_over


class Counting:
    """Counts the calls of a processor, outside its ``__dict__``: a count is no setting."""

    __slots__ = ("__dict__", "__weakref__", "calls", "processor")

    def __init__(self, processor) -> None:
        self.processor, self.calls = processor, 0

    def __call__(self, **kwargs):
        self.calls += 1
        return self.processor(**kwargs)


def composite_by_hand(image: Image.Image, baseline: Image.Image, mask: torch.Tensor) -> Image.Image:
    fine = F.interpolate(mask[None, None], size=(image.height, image.width), mode="bilinear", align_corners=False)[0, 0]
    m = fine.numpy()[:, :, None]
    blend = np.asarray(image, np.float32) * m + np.asarray(baseline, np.float32) * (1 - m)
    return Image.fromarray(np.rint(blend).astype(np.uint8))


# -- families ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(500, 333), *campaign(((427, 640),))], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_parity_end_points_and_side_outputs(family, size) -> None:
    processor, structure = build(family, small=True)
    image = photograph(*size)
    path = ImagePath.from_processor(processor, [image], structure=structure)
    assert path.report.mean_error <= 0.6
    assert path.report.max_error <= 4.0
    assert path.report.backend == "pil"
    kept, removed = path.apply(torch.ones(2, 6, 9)), path.apply(torch.zeros(2, 6, 9))
    given = [[image]] if structure == "nested" else [image]
    own = processor(images=given, return_tensors="pt")
    for key, value in path.inputs.items():
        assert torch.equal(value, torch.as_tensor(own[key]))  # Mllama counts tiles in lists
        assert torch.equal(kept[key], torch.cat([value, value]))
        assert torch.equal(removed[key], torch.cat([path.baseline_inputs[key]] * 2))
        if key not in path.pixel_keys:
            assert torch.equal(value, path.baseline_inputs[key])
    assert {"pixel_values"} <= set(path.pixel_keys)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_path_agrees_with_the_processor_on_a_binary_mask(family) -> None:
    """Another mask than the report's, judged by this test's own arithmetic."""
    processor, structure = build(family, small=True)
    image = photograph(320, 240, seed=4)
    path = ImagePath.from_processor(processor, [image], structure=structure)
    mask = (torch.rand(7, 7, generator=torch.Generator().manual_seed(3)) > 0.5).float()
    mixed = composite_by_hand(image, path.baseline_images[0], mask)
    real = processor(images=[[mixed]] if structure == "nested" else [mixed], return_tensors="pt")
    fast = path.apply(mask[None])
    for key in path.pixel_keys:
        span = float(path.inputs[key].max() - path.inputs[key].min())
        assert float((fast[key] - real[key]).abs().mean()) < 0.005 * span
        assert float((path.inputs[key] - real[key]).abs().mean()) > 0.002 * span  # the mask did change something


@pytest.mark.parametrize(
    "family", ["llava_onevision", "qwen2_vl", "mllama", "pixtral", "internvl", *campaign("idefics3")]
)
def test_prompts_with_several_images(family) -> None:
    processor, structure = build(family, small=True)
    images = [photograph(120, 80), photograph(90, 150, seed=1), photograph(100, 100, seed=2)]
    path = ImagePath.from_processor(processor, images, structure=structure)
    assert path.n_images == 3
    assert path.report.mean_error <= 0.6
    zeros = torch.zeros(1, 4, 4)
    key = path.pixel_keys[0]
    index, live = path.coordinates(key)[2:]
    for k in range(3):
        out = path.apply(zeros, image=k)[key]
        mine = (index == k) & live
        assert bool(mine.any())
        assert torch.equal(out[mine], path.baseline_inputs[key][mine])
        assert torch.equal(out[~mine], path.inputs[key][~mine])
    stacked = torch.ones(1, 3, 4, 4)
    stacked[:, 1] = 0
    assert torch.equal(path.apply(stacked)[key], path.apply(zeros, image=1)[key])
    with pytest.raises(MaskError, match="image=k"):
        path.apply(zeros)


@pytest.mark.parametrize("size", [(1, 40), (20, 900), (1, 1), *campaign(((40, 1),), ((3, 3),))], ids=str)
@pytest.mark.parametrize("family", ["siglip", "llava_onevision", "idefics3"])
def test_tiny_and_long_images(family, size) -> None:
    processor, structure = build(family, small=True)
    image = photograph(*size)
    try:
        processor(images=[[image]] if structure == "nested" else [image], return_tensors="pt")
    except Exception:
        with pytest.raises(ImageError, match="cannot process"):
            ImagePath.from_processor(processor, [image], structure=structure)
        return
    path = ImagePath.from_processor(processor, [image], structure=structure)
    assert path.report.mean_error <= 2.0  # above it a warning is given
    key = path.pixel_keys[0]
    assert torch.equal(path.apply(torch.ones(1, 5, 5))[key], path.inputs[key])
    assert torch.equal(path.apply(torch.zeros(1, 5, 5))[key], path.baseline_inputs[key])
    assert bool(path.seen(0, (3, 3)).all())


def test_what_a_processor_cannot_do_is_said_with_its_reason() -> None:
    processor, _ = build("qwen2_vl")
    with pytest.raises(ImageError, match=r"Qwen2VLImageProcessorPil cannot process 1x900 RGB: ValueError"):
        ImagePath.from_processor(processor, [photograph(1, 900)])


# -- modes, gradients, dtypes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["clip", "qwen2_vl", "mllama"])
def test_exact_mode_has_the_processors_value_and_the_traced_gradient(family) -> None:
    processor, structure = build(family, small=True)
    image = photograph(150, 100)
    path = ImagePath.from_processor(processor, [image], structure=structure)
    masks = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    exact, fast = path.apply(masks, mode="exact"), path.apply(masks)
    gradients = []
    for key in path.pixel_keys:
        real = []
        for mask in masks.detach():
            mixed = composite_by_hand(image, path.baseline_images[0], mask)
            real.append(processor(images=[[mixed]] if structure == "nested" else [mixed], return_tensors="pt")[key])
        assert torch.equal(exact[key], torch.cat(real))
        weights = torch.randn(exact[key].shape, generator=torch.Generator().manual_seed(1))
        gradients = [torch.autograd.grad((out[key] * weights).sum(), masks)[0] for out in (exact, fast)]
        assert torch.equal(*gradients)
        assert float(gradients[0].abs().max()) > 0


def test_gradient_matches_finite_differences_of_the_fast_path() -> None:
    processor, _ = build("llava_next")
    path = ImagePath.from_processor(processor, [photograph(200, 90)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(1, 4, 5, dtype=torch.float64, generator=generator).clamp(0.1, 0.9).requires_grad_()
    weights = torch.randn(path.inputs["pixel_values"].shape, generator=generator, dtype=torch.float64)

    def score(m: torch.Tensor) -> torch.Tensor:
        return (path.apply(m)["pixel_values"] * weights).sum()

    (gradient,) = torch.autograd.grad(score(mask), mask)
    direction = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    ahead, behind = score(mask.detach() + 1e-3 * direction), score(mask.detach() - 1e-3 * direction)
    assert float((gradient * direction).sum()) == pytest.approx(float(ahead - behind) / 2e-3, rel=1e-6)


def test_half_precision_models_get_their_dtype_and_end_points() -> None:
    processor, _ = build("clip")
    path = ImagePath.from_processor(processor, [photograph(90, 60)], dtype=torch.bfloat16)
    mask = torch.ones(3, 4, 4, requires_grad=True)
    out = path.apply(mask)["pixel_values"]
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, path.inputs["pixel_values"].repeat(3, 1, 1, 1))
    out.float().sum().backward()
    assert mask.grad is not None
    assert mask.grad.shape == mask.shape


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 4), "batch, row, col"),
        (torch.full((1, 4, 4), 1.5), r"lies in \[0, 1\]"),
        (torch.full((1, 4, 4), math.nan), r"lies in \[0, 1\]"),
        (torch.ones(1, 4, 4, dtype=torch.int64), "floating"),
        (torch.ones(1, 2, 4, 4), r"1 image\(s\), the mask is for 2"),
        (torch.ones(0, 4, 4), "not empty"),
    ],
)
def test_wrong_masks(mask, message) -> None:
    path = ImagePath.from_processor(Untouched(), [photograph(32, 24)])
    with pytest.raises(MaskError, match=message):
        path.apply(mask)
    with pytest.raises(MaskError, match="numbered from 0"):
        path.apply(torch.ones(1, 4, 4), image=1)
    with pytest.raises(MaskError, match="mode"):
        path.apply(torch.ones(1, 4, 4), mode="slow")


# -- cost --------------------------------------------------------------------------------------------------------------


def test_nothing_is_traced_before_the_first_mask_and_once_per_size() -> None:
    processor = Counting(Odd())
    path = ImagePath.from_processor(processor, [photograph(90, 60)])
    assert torch.equal(path.apply(None)["pixels"], path.inputs["pixels"])
    assert processor.calls == 2
    path.apply(torch.rand(2, 4, 4))
    traced = processor.calls
    assert path.report.runs == 8
    assert traced == 2 + 8 + 2  # the trace, the second run of the image, the composite
    path.apply(torch.rand(2, 7, 5))
    path.seen()
    assert processor.calls == traced
    other = path.with_baseline("blank")
    other.apply(torch.rand(1, 4, 4))
    assert processor.calls == traced + 1
    again = ImagePath.from_processor(processor, [photograph(90, 60, seed=9)])
    again.apply(torch.rand(1, 4, 4))
    assert processor.calls == traced + 1 + 4
    assert again.report.runs == 0
    processor.setting = "changed"
    assert ImagePath.from_processor(processor, [photograph(90, 60)]).report.runs == 8
    assert ImagePath.from_processor(processor, [photograph(60, 90)]).report.runs == 8


# -- odd and refused processors ----------------------------------------------------------------------------------------


def test_odd_third_party_processors_work() -> None:
    image = photograph(90, 60)
    path = ImagePath.from_processor(Odd(), [image])
    assert path.report.mean_error < 0.6
    assert set(path.inputs) == {"pixels"}  # names are not tensors
    exact = ImagePath.from_processor(Untouched(), [image])
    mask = torch.rand(1, 5, 5)
    assert exact.report.mean_error < 0.3  # only the composite's own rounding
    apart = exact.apply(mask)["pixel_values"] - exact.apply(mask, mode="exact")["pixel_values"]
    assert float(apart.abs().max()) * 255 <= 0.5 + 1e-3
    assert torch.equal(path.apply(mask)["pixels"].isfinite().all(), torch.tensor(True))


@pytest.mark.parametrize(
    ("processor", "reason"),
    [
        (RandomCrop(), "two runs on the same image|could not be located|off in the mean"),
        (RandomFlip(), "two runs on the same image|could not be located|off in the mean"),
        (Whitened(), "own statistics"),
        (Stretched(), "off in the mean|could not be located"),
    ],
    ids=lambda value: type(value).__name__ if callable(value) else "",
)
def test_processors_that_masks_cannot_go_through_are_refused(processor, reason) -> None:
    path = ImagePath.from_processor(processor, [photograph(96, 64)])
    with pytest.raises(ProcessorRefused, match=f"^{type(processor).__name__}: .*({reason})") as refused:
        path.apply(torch.rand(1, 4, 4))
    assert "ttach" in str(refused.value)


def noise(width: int, height: int) -> Image.Image:
    """Black and white noise: nothing is sharper."""
    drawn = np.random.default_rng(0).random((height, width)) > 0.5
    return Image.fromarray((drawn * 255).astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize("size", [(8, 8), (60, 3)], ids=str)
def test_sharp_images_of_few_pixels_are_no_other_processor(size) -> None:
    """Enlarging them overshoots, which is clipped: the fast path is further off than where a processor is refused."""
    processor, _ = build("clip", size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96})
    path = ImagePath.from_processor(processor, [noise(*size)])
    with pytest.warns(ProbeWarning, match="levels off in the mean; use mode='exact'"):
        assert path.report.mean_error > 8
    mask = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0))
    composite = composite_by_hand(path.images[0], path.baseline_images[0], mask[0])
    real = processor(images=[composite], return_tensors="pt")["pixel_values"]
    assert float((path.apply(mask, mode="exact")["pixel_values"] - real).abs().max()) < 0.02


class Thresholded(Untouched):
    def __call__(self, *, images: list[Image.Image], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        out = super().__call__(images=images)
        values = out["pixel_values"]
        near = (values - values.mean()).abs() < 0.2
        out["pixel_values"] = torch.where(near, values, (values > 0.5).float())
        return out


@pytest.mark.parametrize("processor", [Stretched(), Thresholded()], ids=lambda one: type(one).__name__)
def test_a_sharp_image_excuses_no_processor_that_masks_cannot_go_through(processor) -> None:
    with pytest.raises(ProcessorRefused, match=r"off in the mean|could not be located|own statistics"):
        ImagePath.from_processor(processor, [noise(16, 16)]).apply(torch.rand(1, 4, 4))


def test_geometry_that_depends_on_the_picture_is_refused() -> None:
    image = photograph(96, 64)
    image.paste((0, 0, 0), (0, 0, 24, 64))
    with pytest.raises(ProcessorRefused, match=r"MarginCropped: .*depends on the image's content"):
        ImagePath.from_processor(MarginCropped(), [image]).apply(torch.rand(1, 4, 4))


def test_wrong_images_and_references() -> None:
    with pytest.raises(ImageError, match="PIL"):
        ImagePath.from_processor(Odd(), [np.zeros((4, 4, 3))])  # type: ignore[list-item]
    with pytest.raises(ImageError, match="no image"):
        ImagePath.from_processor(Odd(), [])
    image = photograph(90, 60)
    with pytest.raises(ImageError, match=r"\(1, 3, 336, 336\).*not the images"):
        ImagePath.from_processor(build("clip")[0], [image], reference={"pixel_values": torch.zeros(1, 3, 224, 224)})
    own = ImagePath.from_processor(Odd(), [image]).inputs["pixels"]
    same = ImagePath.from_processor(Odd(), [image], reference={"pixels": own.bfloat16()})
    assert same.report.notes == ()
    with pytest.raises(ImageError, match=r"differs by up to 0\.25.*more than another backend would"):
        ImagePath.from_processor(Odd(), [image], reference={"pixels": own + 0.25})
    other = ImagePath.from_processor(Odd(), [image], reference={"pixels": own + 0.004})  # less than a grey level
    with pytest.warns(ProbeWarning, match=r"differs by up to 0\.004"):
        assert "0.004" in other.report.notes[0]


# -- modes of pictures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "1"])
def test_pictures_of_other_modes_are_composed_in_the_rgb_the_processor_sees(mode) -> None:
    processor, _ = build("siglip")
    image = photograph(64, 48).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image = (image if mode in ("RGBA", "LA") else image.convert("RGB")).convert(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ProbeWarning)
        path = ImagePath.from_processor(processor, [image])
        kept = path.apply(torch.ones(1, 4, 4))["pixel_values"]
    assert torch.equal(kept, processor(images=[image], return_tensors="pt")["pixel_values"])
    assert path.images[0].mode == "RGB"


def test_transparency_laid_over_white_is_noticed_and_nonsense_refused() -> None:
    image = photograph(64, 48).convert("RGBA")
    image.putalpha(100)
    path = ImagePath.from_processor(OverWhite(), [image])
    with pytest.warns(ProbeWarning, match="laid over white"):
        path.apply(torch.rand(1, 4, 4))
    assert np.array_equal(np.asarray(path.images[0]), np.asarray(over_white(image)))
    with pytest.raises(ProcessorRefused, match=r"AlphaSquared: no conversion to RGB .*convert\('RGB'\)"):
        ImagePath.from_processor(AlphaSquared(), [image])


class OverStripes(OverWhite):
    """A background of its own, as Inkling 2 has a chequered one, by the step that transformers' processors have."""

    def process_image(self, image: Image.Image, *, do_convert_rgb: bool) -> torch.Tensor:
        stripes = np.zeros((image.height, image.width, 4), np.uint8)
        stripes[..., 3], stripes[::2, :, :3] = 255, 255
        made = Image.alpha_composite(Image.fromarray(stripes), image.convert("RGBA")).convert("RGB")
        return torch.from_numpy(np.array(made)).permute(2, 0, 1)

    def __call__(self, *, images: list[Image.Image], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        rgb = [self.process_image(image, do_convert_rgb=True).permute(1, 2, 0).numpy() for image in images]
        return super().__call__(images=[Image.fromarray(pixels) for pixels in rgb])


def test_a_processors_own_background_is_asked_of_it() -> None:
    image = photograph(64, 48).convert("RGBA")
    image.putalpha(100)
    path = ImagePath.from_processor(OverStripes(), [image])
    shown = OverStripes().process_image(image, do_convert_rgb=True).permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(path.images[0]), shown)
    with pytest.warns(ProbeWarning, match="laid over its own background"):
        path.apply(torch.rand(1, 4, 4))


class Truncating(OverWhite):
    """Lays arrays over white otherwise than images, as transformers' processors by torchvision do, which cut off."""

    def process_image(self, image: Image.Image | np.ndarray, *, do_convert_rgb: bool) -> np.ndarray:
        if isinstance(image, Image.Image):
            return np.array(over_white(image.convert("RGBA"))).transpose(2, 0, 1)
        rgba = image if image.shape[0] == 4 else image.transpose(2, 0, 1)
        share = rgba[3:].astype(np.float32) / 255
        return (rgba[:3] * share + 255 * (1 - share)).astype(np.uint8)

    def __call__(self, *, images: list[Any], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        rgb = [self.process_image(image, do_convert_rgb=True).transpose(1, 2, 0) for image in images]
        return super().__call__(images=[Image.fromarray(np.ascontiguousarray(pixels)) for pixels in rgb])


@pytest.mark.parametrize("order", ["channels_first", "channels_last"])
def test_transparent_arrays_are_composed_as_the_processor_composes_arrays(order) -> None:
    image = photograph(64, 48).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    given = np.array(image).transpose(2, 0, 1) if order == "channels_first" else np.array(image)
    fed = Truncating()(images=[given])
    (handed,) = hand_over([given]).images or ()
    path = ImagePath.from_processor(Truncating(), [handed])
    assert all(torch.equal(path.inputs[key], value) for key, value in fed.items())
    assert not np.array_equal(np.asarray(path.images[0]), np.asarray(over_white(image)))
    again = ImagePath.from_processor(Truncating(), path.images)
    assert all(torch.equal(again.inputs[key], value) for key, value in fed.items())


# -- report ------------------------------------------------------------------------------------------------------------


def test_report_reads_well() -> None:
    path = ImagePath.from_processor(build("clip")[0], [photograph(300, 150)])
    text = str(path.report)
    assert text.startswith("CLIPImageProcessorPil (pil): traced geometry of pixel_values")
    assert "of 255 levels" in text
    assert path.report.coverage[0] == pytest.approx(0.5, abs=0.01)  # the centre crop
    assert path.report.to_dict()["pixel_keys"] == ["pixel_values"]
    assert path.seen(0, (1, 6)).tolist() == [[False, True, True, True, True, False]]


# -- baselines ---------------------------------------------------------------------------------------------------------


def test_blur_is_a_gaussian_of_the_stated_width() -> None:
    dot = Image.new("RGB", (101, 81))
    assert make_baseline(dot, strength=0.03).params == {"strength": 0.03, "sigma": pytest.approx(3.03)}
    soft = make_baseline(photograph(200, 100), strength=0.05).image
    expected = photograph(200, 100).filter(ImageFilter.GaussianBlur(10))
    assert np.array_equal(np.asarray(soft), np.asarray(expected))
    step = Image.new("L", (400, 20))
    step.paste(255, (200, 0, 400, 20))
    edge = np.asarray(make_baseline(step, strength=0.05).image, dtype=np.float64)[10, :, 0] / 255
    normal = [0.5 * (1 + math.erf((x + 0.5 - 200) / (20 * math.sqrt(2)))) for x in range(400)]
    assert np.abs(edge - normal).max() < 0.02


def test_the_strongest_rung_of_the_ladder_is_the_mean_colour() -> None:
    image = photograph(60, 40)
    assert list(BLUR_LADDER) == sorted(BLUR_LADDER)
    limit = make_baseline(image, strength=BLUR_LADDER[-1])
    mean = np.asarray(image, dtype=np.float64).mean(axis=(0, 1))
    assert np.abs(np.asarray(limit.image, dtype=np.float64) - mean).max() <= 0.5
    assert np.array_equal(np.asarray(limit.image), np.asarray(make_baseline(image, "mean").image))
    assert limit.kind == "blur"
    assert limit.params["limit"] == "mean colour"
    contrast = [np.asarray(make_baseline(image, strength=s).image, float).std(axis=(0, 1)).sum() for s in BLUR_LADDER]
    assert contrast == sorted(contrast, reverse=True)


def test_other_baselines() -> None:
    image = photograph(60, 40)
    assert np.asarray(make_baseline(image, "blank").image).max() == 0
    noise = [np.asarray(make_baseline(image, "noise", seed=seed).image) for seed in (1, 1, 2)]
    assert np.array_equal(noise[0], noise[1])
    assert not np.array_equal(noise[0], noise[2])
    assert abs(noise[0].mean() - 127.5) < 5
    own = make_baseline(image, Image.new("L", (10, 10), 77))
    assert own.image.size == image.size
    assert np.unique(np.asarray(own.image)).tolist() == [77]
    assert own.params == {"size": [10, 10], "resized": True}
    for wrong in ("fog", 3):
        with pytest.raises(ImageError, match="blur, blank, noise, mean"):
            make_baseline(image, wrong)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="positive"):
        make_baseline(image, strength=0.0)
    with pytest.raises(ImageError, match="PIL"):
        make_baseline(np.zeros((3, 3, 3)))  # type: ignore[arg-type]


def test_with_baseline_replaces_the_baseline_alone() -> None:
    image = photograph(60, 40)
    path = ImagePath.from_processor(build("siglip")[0], [image])
    black = path.with_baseline([Image.new("RGB", image.size)])
    zeros = torch.zeros(1, 4, 4)
    assert torch.equal(black.apply(zeros)["pixel_values"], torch.full((1, 3, 384, 384), -1.0))
    assert torch.equal(black.inputs["pixel_values"], path.inputs["pixel_values"])
    noise = path.with_baseline("noise", seed=3)
    assert noise.baselines[0].params == {"seed": 3}
    with pytest.raises(ImageError, match="30x20"):
        path.with_baseline([Image.new("RGB", (30, 20))])
    with pytest.raises(ImageError, match="2 baseline"):
        path.with_baseline([image, image])


# -- without a processor -----------------------------------------------------------------------------------------------


def pixels(count: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(count, 3, 12, 16, generator=generator),
        "image_sizes": torch.ones(count, 2).long(),
    }


@pytest.mark.parametrize("kind", ["blur", "mean", "blank", "noise"])
def test_pixel_path_blends_the_inputs_themselves(kind) -> None:
    inputs = pixels()
    path = PixelPath(inputs, baseline=kind, strength=0.1, seed=4)
    low, high = path.apply(torch.zeros(2, 2, 3, 4)), path.apply(torch.ones(2, 2, 3, 4))
    assert torch.equal(high["pixel_values"], inputs["pixel_values"].repeat(2, 1, 1, 1))
    assert torch.equal(low["pixel_values"], path.baseline_inputs["pixel_values"].repeat(2, 1, 1, 1))
    assert torch.equal(low["image_sizes"], torch.ones(4, 2).long())
    assert path.image_sizes == [(16, 12)] * 2
    mask = torch.rand(1, 3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = path.apply(mask, image=1)["pixel_values"]
    fine = F.interpolate(mask[:, None], size=(12, 16), mode="bilinear", align_corners=False)[0]
    base = path.baseline_inputs["pixel_values"]
    assert torch.equal(out[0], inputs["pixel_values"][0])
    assert torch.allclose(out[1], base[1] + fine * (inputs["pixel_values"][1] - base[1]), atol=1e-6)
    out.sum().backward()
    assert mask.grad is not None
    assert float(mask.grad.abs().min()) > 0


@pytest.mark.quick
def test_pixel_path_baselines_and_interface() -> None:
    path = PixelPath(pixels(1))
    values = path.inputs["pixel_values"]
    mean = path.with_baseline_kind("blur", strength=math.inf).baseline_inputs["pixel_values"]
    assert torch.allclose(mean, values.mean((-2, -1), keepdim=True).expand_as(values), atol=1e-6)
    flat = PixelPath({"pixel_values": torch.full((1, 3, 8, 9), 0.7)}, baseline="blur", strength=0.3)
    assert torch.allclose(flat.baseline_inputs["pixel_values"], torch.tensor(0.7))  # a blur keeps a flat picture
    blank = path.with_baseline_kind("blank").baseline_inputs["pixel_values"]
    assert torch.equal(blank[0, :, 0, 0], values[0].amin((1, 2)))
    assert bool(path.seen(0, (3, 3)).all())
    assert path.images[0].size == (16, 12)
    x, y, index, live = path.coordinates("pixel_values")
    assert float(x[0, 0, 3, 5]) == 5.5
    assert float(y[0, 0, 3, 5]) == 3.5
    assert int(index.max()) == 0
    assert bool(live.all())
    assert path.report.engine == "pixel-input"
    with pytest.raises(ImageError, match="no baseline 'fog'"):
        PixelPath(pixels(), baseline="fog")


@pytest.mark.parametrize("shape", [(1, 5, 3, 8, 8), (40, 1176)])
def test_pixel_path_refuses_layouts_that_are_no_pictures(shape) -> None:
    with pytest.raises(ProcessorRefused, match=r"pixel_values \(.*attach\(model, processor\)"):
        PixelPath({"pixel_values": torch.zeros(shape)})
