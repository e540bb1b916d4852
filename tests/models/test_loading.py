"""Models a user has on disk, with and without torchvision."""

from __future__ import annotations

import pytest
import tiny_models
import torch

import lvlm_probe as probe


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_5_vl", "internvl"])
def test_load_gives_the_model_and_a_processor_that_serves_it(name, tmp_path):
    directory = tiny_models.save(name, tmp_path)
    model, processor = probe.load(directory)
    original, own = tiny_models.build(name)
    assert not model.training
    picture = tiny_models.picture()
    inputs = tiny_models.inputs(name, model, processor, [picture], "What?")
    expected = tiny_models.inputs(name, original, own, [picture], "What?")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, original(**expected).logits)


@pytest.mark.quick
def test_what_is_no_model_stays_an_error(tmp_path):
    with pytest.raises((OSError, ValueError)):
        probe.load(tmp_path)
