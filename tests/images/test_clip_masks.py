"""A clip on its way to the model: frames through a video processor, masks over time and space."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import picture
from toy_clip import PairedVideos

from lvlm_probe.errors import ImageError, MaskError
from lvlm_probe.images import ImagePath
from lvlm_probe.images.baselines import make_baselines
from lvlm_probe.images.clips import ClipStep, over_frames
from lvlm_probe.trace.clips import Clip


def shown(count: int, *, seed: int = 0) -> list[Image.Image]:
    return [picture(40, 36, seed=seed + k) for k in range(count)]


def stacked(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


class Stills:
    """An image processor: grey levels of each image, normalised."""

    def __call__(self, images: Any, **_kwargs: Any) -> dict[str, torch.Tensor]:
        arrays = [torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) for image in images]
        return {"pixel_values": torch.stack(arrays) / 255 - 0.5}


def test_every_element_comes_from_one_frame_and_its_place() -> None:
    frames, videos = shown(5), PairedVideos()
    path = ImagePath.from_processor(ClipStep(videos, (Clip(0, 5),), {}), frames)
    x, y, frame, live = path.coordinates("pixel_values_videos")
    assert live.all()
    where = frame.reshape(3, 2, 18, 20, 3)
    assert where[:, :, 0, 0, 0].tolist() == [[0, 1], [2, 3], [4, 4]]
    assert torch.equal(where, where[:, :, :1, :1, :1].expand_as(where))
    middles = torch.arange(20) * 2.0 + 1
    assert torch.allclose(x.reshape(3, 2, 18, 20, 3)[1, 0, 3, :, 0], middles, atol=0.1)
    assert torch.allclose(y.reshape(3, 2, 18, 20, 3)[1, 1, :, 5, 0], middles[:18], atol=0.1)


def test_a_masked_clip_is_what_the_processor_makes_of_the_composite() -> None:
    frames, videos, clip = shown(4), PairedVideos(), Clip(0, 4)
    path = ImagePath.from_processor(ClipStep(videos, (clip,), {}), frames)
    mask = torch.rand(1, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(mask, (36, 40), mode="bilinear", align_corners=False)[0, ..., None]
    first, last = (stacked(images).astype(float) for images in (path.baseline_images, frames))
    blend = np.rint(first + fine.double().numpy() * (last - first)).astype(np.uint8)
    real = videos.preprocess([blend], do_sample_frames=False)["pixel_values_videos"]
    assert torch.equal(path.apply(mask, image=clip, mode="exact")["pixel_values_videos"], real)
    assert float((path.apply(mask, image=clip)["pixel_values_videos"] - real).abs().mean()) < 1 / 255
    for value, images in ((1.0, frames), (0.0, path.baseline_images)):
        made = path.apply(torch.full((2, 3, 2, 2), value), image=clip)["pixel_values_videos"]
        plain = videos.preprocess([stacked(images)], do_sample_frames=False)["pixel_values_videos"]
        assert torch.equal(made, plain.repeat(2, 1, 1))


def test_the_gradient_is_that_of_finite_differences() -> None:
    clip = Clip(0, 4)
    path = ImagePath.from_processor(ClipStep(PairedVideos(), (clip,), {}), shown(4), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    mask = 0.2 + 0.6 * torch.rand(1, 3, 3, 4, generator=generator, dtype=torch.float64)
    way = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    weights = torch.randn(path.inputs["pixel_values_videos"].shape, generator=generator, dtype=torch.float64)

    def score(given: torch.Tensor) -> torch.Tensor:
        return (path.apply(given, image=clip)["pixel_values_videos"] * weights).sum()

    leaf = mask.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(score(leaf), leaf)
    slope = (score(mask + 1e-4 * way) - score(mask - 1e-4 * way)) / 2e-4  # linear in the mask
    assert float((slope - (gradient * way).sum()).abs()) < 1e-8 * float(gradient.norm() * way.norm())


def test_images_stand_before_the_frames_of_several_clips() -> None:
    clips, images = (Clip(1, 2), Clip(3, 2)), [picture(40, 36, seed=9), *shown(4)]
    step = ClipStep(PairedVideos(), clips, {}, image_processor=Stills())
    path = ImagePath.from_processor(step, images)
    made = path.apply(torch.zeros(1, 1, 1, 1), image=clips[1])
    assert torch.equal(made["pixel_values"], path.inputs["pixel_values"])
    changed = made["pixel_values_videos"] != path.inputs["pixel_values_videos"]
    assert [bool(part.any()) for part in changed] == [False, True]
    twice = path.joined(path.apply(torch.ones(2, 5, 1, 1)), 2)
    assert {name: len(value) for name, value in twice.items()} == {"pixel_values": 2, "pixel_values_videos": 4}


@pytest.mark.quick
def test_time_is_interpolated_between_the_middles_of_steps() -> None:
    steps = torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1)
    frames = over_frames(steps, Clip(1, 4), 6)
    assert frames.flatten().tolist() == [1.0, 0.0, 0.25, 0.75, 1.0, 1.0]
    assert torch.equal(over_frames(torch.ones(3, 7, 2, 2), Clip(0, 4), 4), torch.ones(3, 4, 2, 2))
    with pytest.raises(MaskError, match=r"\(batch, t, row, col\)"):
        over_frames(torch.ones(1, 2, 2), Clip(0, 4), 4)
    with pytest.raises(MaskError, match="no frames 2 to 5"):
        over_frames(torch.ones(1, 2, 2, 2), Clip(2, 4), 5)


def test_baselines_of_a_clip_are_made_of_its_own_frames() -> None:
    images, clips = [picture(40, 36, seed=9), *shown(4)], (Clip(1, 4),)

    def order(kind: str, **params: Any) -> list[int]:
        made = make_baselines(images, kind, clips=clips, **params)
        assert {each.kind for each in made} == {kind}
        return [[image.tobytes() for image in images].index(each.image.tobytes()) for each in made]

    assert order("first_frame") == [0, 1, 1, 1, 1]
    assert order("middle_frame") == [0, 3, 3, 3, 3]
    shuffled = order("shuffled_frames", seed=4)
    assert sorted(shuffled) == [0, 1, 2, 3, 4]
    assert shuffled[0] == 0
    assert shuffled[1:] != [1, 2, 3, 4]
    assert order("shuffled_frames", seed=4) == shuffled
    blurred = make_baselines(images, "blur", clips=clips)
    assert [each.kind for each in blurred] == ["blur"] * 5
    with pytest.raises(ImageError, match="this prompt has none"):
        make_baselines(images, "first_frame")
