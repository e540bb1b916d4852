"""Which processor call made these inputs."""

from __future__ import annotations

import numpy as np
import tiny_models
import torch
from PIL import Image

from lvlm_probe.recording.handed_images import flatten_images
from lvlm_probe.recording.processor_watch import ProcessorCall, ProcessorWatch, describe_call


def test_a_call_is_recognised_by_its_result_only():
    processor = tiny_models.build_processor("llava").image_processor
    watch = ProcessorWatch()
    made = []
    for seed in range(3):
        images = [tiny_models.picture(seed=seed)]
        result = processor(images=images, return_tensors="pt")
        watch.add(images, {"return_tensors": "pt", "do_resize": True}, result)
        made.append(result["pixel_values"])
    call = watch.find({"pixel_values": made[1].to(torch.bfloat16), "input_ids": torch.ones(1, 3)})
    assert np.array_equal(np.asarray(call.images[0]), np.asarray(tiny_models.picture(seed=1)))
    assert call.kwargs == {"do_resize": True}
    assert watch.find({"pixel_values": made[1] + 0.01}) is None
    assert watch.find({"pixel_values": made[1][:, :, :5]}) is None
    assert watch.find({}) is None
    assert len(watch) == 3


def test_results_without_tensors_are_made_into_some():
    """ProcessorMixin asks for tensors only after joining with the text."""
    watch = ProcessorWatch()
    watch.add([tiny_models.picture()], {}, {"pixel_values": [np.ones((3, 2, 2), np.float32)]})
    assert watch.find({"pixel_values": torch.ones(1, 3, 2, 2)}) is not None


def test_pictures_in_every_shape_they_are_given():
    picture = tiny_models.picture(20, 10)
    array = np.asarray(picture)
    tensor = torch.tensor(array).permute(2, 0, 1)
    for given in (picture, [picture], array, [array], tensor, [tensor]):
        found, groups = flatten_images(given)
        assert groups is None and np.array_equal(np.asarray(found[0]), array)
    found, groups = flatten_images([[picture, picture], [picture]])
    assert len(found) == 3 and groups == (2, 1)
    assert flatten_images([torch.rand(3, 4, 4)])[0] is None  # floats are no picture any more


def test_a_call_is_described_in_json():
    processor = tiny_models.build_processor("llava").image_processor
    kwargs = {"resample": Image.Resampling.BICUBIC, "size": {"height": 3}, "strange": object()}
    description, lost = describe_call(processor, ProcessorCall(None, None, kwargs))
    assert description["kwargs"] == {"resample": 3, "size": {"height": 3}} and lost == ["strange"]
    assert description["backend"] == "pil" and description["config"]["do_resize"] is True
