"""Several masked copies of a prompt are joined as the processor joins several prompts; a processor's own image step."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lvlm_probe.images import ImagePath
from lvlm_probe.images.batching import Joint, joints_of
from lvlm_probe.images.processor_step import ImageStep, image_processor_of, image_step, watched_method
from lvlm_probe.recording.row_inputs import row_inputs


def _noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8))


class _Packing:
    """Pictures side by side along the last axis, their sizes below each other, and indices into all patches."""

    def __call__(self, images: Sequence[Image.Image], return_tensors: str = "pt") -> dict[str, Any]:
        made = [torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images]
        index = [torch.tensor([[0, 1], [2, -1]]) + torch.tensor([[3, 3], [3, 0]]) * k for k in range(len(images))]
        return {
            "pixel_values": torch.cat(made, dim=-1)[None],
            "target_sizes": torch.tensor([[8, 8]] * len(images)),
            "pooling": torch.cat(index),
            "counts": [1] * len(images),
        }


@pytest.mark.quick
def test_copies_are_joined_as_the_processor_joins_pictures() -> None:
    processor = _Packing()
    path = ImagePath.from_processor(processor, [_noise(0)])
    masks = torch.stack([torch.ones(8, 8), torch.zeros(8, 8), torch.ones(8, 8)])
    joined = path.joined(path.apply(masks), 3)
    whole, low = _noise(0), path.baseline_images[0]
    expected = processor([whole, low, whole])
    for name in ("target_sizes", "pooling"):
        assert torch.equal(joined[name], expected[name])
    assert joined["counts"].tolist() == [1, 1, 1]
    assert joined["pixel_values"].shape == (1, 3, 8, 24)
    assert torch.allclose(joined["pixel_values"], expected["pixel_values"], atol=1e-5)


def test_one_copy_is_left_as_it_is_without_asking_the_processor() -> None:
    calls: list[int] = []

    class Counting(_Packing):
        def __call__(self, images: Sequence[Image.Image], return_tensors: str = "pt") -> dict[str, Any]:
            calls.append(len(images))
            return super().__call__(images, return_tensors)

    path = ImagePath.from_processor(Counting(), [_noise(0)])
    assert torch.equal(path.joined(path.inputs, 1)["pooling"], path.inputs["pooling"])
    assert set(calls) == {1}


def test_a_processor_of_one_prompt_at_a_time_is_joined_along_the_first_axis() -> None:
    class Single(_Packing):
        def __call__(self, images: Sequence[Image.Image], return_tensors: str = "pt") -> dict[str, Any]:
            if len(images) > 1:
                raise ValueError("one picture")
            return super().__call__(images, return_tensors)

    path = ImagePath.from_processor(Single(), [_noise(0)])
    assert path.joined({"a": torch.arange(6).view(2, 3)}, 2)["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("once", "twice", "joint"),
    [
        ([[1, 2]], [[1, 2], [1, 2]], None),
        ([[1, 2]], [[1, 2, 1, 2]], Joint(axis=1)),
        ([[0, -1]], [[0, -1], [4, -1]], Joint(offset=4)),
        ([[0, 5]], [[0, 5], [4, 8]], None),  # neither the same nor counted on
        ([[0, 1]], [[0, 1]], None),  # does not grow
    ],
)
def test_joints(once: list[list[int]], twice: list[list[int]], joint: Joint | None) -> None:
    found = joints_of({"x": torch.tensor(once)}, {"x": torch.tensor(twice)})
    assert found == ({} if joint is None else {"x": joint})


class _Inner:
    def __init__(self) -> None:
        self.size = 8

    def preprocess(self, images: Any, **kwargs: Any) -> dict[str, Any]:
        return {"images": torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) / 255 for i in images])}

    __call__ = preprocess

    def to_dict(self) -> dict[str, Any]:
        return {"size": self.size}


class _Finishing:
    """Cuts rows out of what its image processor returns, as Fuyu's processor does with patches."""

    def __init__(self) -> None:
        self.image_processor = _Inner()

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        made = self.image_processor(images, **kwargs)["images"]
        return {"image_patches": made.flatten(0, 2)}, [""] * len(images)


class _HandingOn(_Finishing):
    def _process_images(self, images: Any, **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        return self.image_processor(images, **kwargs), [""] * len(images)


def test_a_processor_that_finishes_the_pixel_inputs_is_masked_through_its_own_step() -> None:
    processor = _Finishing()
    step = image_processor_of(processor)
    assert isinstance(step, ImageStep) and image_processor_of(processor) is step
    assert watched_method(processor) == (processor, "_process_images")
    path = ImagePath.from_processor(step, [_noise(1)])
    assert path.pixel_keys == ("image_patches",)
    mask = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    fast, exact = (path.apply(mask, mode=mode)["image_patches"] for mode in ("fast", "exact"))
    assert float((fast - exact).abs().max()) < 1 / 255


def test_a_processor_that_hands_on_is_not() -> None:
    processor = _HandingOn()
    assert image_step(processor) is None
    assert watched_method(processor) == (processor.image_processor, "preprocess")


def test_the_step_does_not_keep_its_processor_alive() -> None:
    processor = _Finishing()
    image_step(processor)
    gone = weakref.ref(processor)
    del processor
    gc.collect()
    assert gone() is None


def test_a_row_is_not_given_the_local_crops_of_another() -> None:
    batch = {
        "input_ids": torch.arange(8).view(2, 4),
        "pixel_values": torch.rand(2, 3, 4, 4),
        "pixel_values_local": torch.rand(6, 3, 2, 2),
        "num_local_patches": torch.tensor([0, 6]),
    }
    alone = {"pixel_values": batch["pixel_values"][:1], "num_local_patches": torch.tensor([0])}
    kept, _ = row_inputs(
        batch, 0, None, alone, lambda name: name.startswith("pixel"), frozenset({"pixel_values_local"})
    )
    assert kept.keys() == alone.keys()
