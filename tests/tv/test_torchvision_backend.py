"""Traced geometry through the torchvision backends, and its gradient against exact autograd."""

from __future__ import annotations

import warnings

import pytest
import torch

pytest.importorskip("torchvision", reason="needs the second environment, .venv-tv, which has torchvision")

from image_processors import FAMILIES, build, photograph
from straight_through import exact_inputs

from lvlm_probe.errors import ProbeWarning
from lvlm_probe.images import ImagePath


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_parity_and_end_points(family: str) -> None:
    processor, structure = build(family, "torchvision", small=True)
    path = ImagePath.from_processor(processor, [photograph(500, 333)], structure=structure)
    assert path.report.backend == "torchvision"
    assert path.report.mean_error <= 0.6
    assert path.report.max_error <= 4.0
    kept, removed = path.apply(torch.ones(1, 6, 9)), path.apply(torch.zeros(1, 6, 9))
    for key, value in path.inputs.items():
        assert torch.equal(kept[key], value)
        assert torch.equal(removed[key], path.baseline_inputs[key])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_follows_exact_autograd(family: str) -> None:
    processor, structure = build(family, "torchvision", small=True)
    image = photograph(640, 427, seed=1)
    path = ImagePath.from_processor(processor, [image], structure=structure)
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(14, 14, generator=generator).requires_grad_()
    exact = exact_inputs(processor, structure, path.images[0], path.baseline_images[0], mask)
    fast = path.apply(mask[None])
    cotangents = {key: torch.randn(exact[key].shape, generator=generator) for key in path.pixel_keys}
    keys = path.pixel_keys
    (truth,) = torch.autograd.grad([exact[k] for k in keys], mask, [cotangents[k] for k in keys])
    (traced,) = torch.autograd.grad([fast[k] for k in keys], mask, [cotangents[k] for k in keys])
    assert float(truth.norm()) > 0
    assert float(torch.cosine_similarity(truth.flatten(), traced.flatten(), dim=0)) >= 0.998
    assert 0.95 < float(traced.norm() / truth.norm()) < 1.05


@pytest.mark.parametrize("family", ["clip", "llava_onevision", "qwen2_vl", "idefics3"])
def test_exact_mode_is_the_processor_on_the_composite(family: str) -> None:
    processor, structure = build(family, "torchvision", small=True)
    path = ImagePath.from_processor(processor, [photograph(320, 200)], structure=structure)
    mask = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    by_autograd = exact_inputs(processor, structure, path.images[0], path.baseline_images[0], mask)
    for key in path.pixel_keys:
        assert torch.allclose(path.apply(mask[None], mode="exact")[key], by_autograd[key], atol=1e-5)


@pytest.mark.parametrize("mode", ["RGBA", "P", "L"])
def test_pictures_of_other_modes(mode: str) -> None:
    processor, _ = build("siglip", "torchvision")
    image = photograph(64, 48).convert("RGBA")
    image.putalpha(100)
    image = image.convert(mode)
    path = ImagePath.from_processor(processor, [image])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ProbeWarning)
        kept = path.apply(torch.ones(1, 4, 4))["pixel_values"]
    assert torch.equal(kept, processor(images=[image], return_tensors="pt")["pixel_values"])


def test_both_backends_have_the_same_geometry() -> None:
    image = photograph(500, 333)
    for family in ("clip", "qwen2_vl"):
        (pil, structure), (tv, _) = build(family, "pil"), build(family, "torchvision")
        one = ImagePath.from_processor(pil, [image], structure=structure).coordinates("pixel_values")
        two = ImagePath.from_processor(tv, [image], structure=structure).coordinates("pixel_values")
        assert float((one[0] - two[0]).abs().max()) < 0.2
        assert float((one[1] - two[1]).abs().max()) < 0.2
