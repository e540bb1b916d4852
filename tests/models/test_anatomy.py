"""Finding the parts of a model."""

from __future__ import annotations

import pytest
import tiny_models

import lvlm_probe as probe
from lvlm_probe.models.anatomy import examine, find_modules

PARTS = {
    "llava": ("model.vision_tower", "model.multi_modal_projector", "model.language_model"),
    "llava_onevision": ("model.vision_tower", "model.multi_modal_projector", "model.language_model"),
    "qwen2_5_vl": ("model.visual", "model.visual.merger", "model.language_model"),
    "gemma3": ("model.vision_tower", "model.multi_modal_projector", "model.language_model"),
    "idefics3": ("model.vision_model", "model.connector", "model.text_model"),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_found(name):
    model, processor = tiny_models.build(name)
    anatomy = examine(model, processor)
    assert (anatomy.encoders, anatomy.mergers, anatomy.decoder) == tuple(
        (part,) if index < 2 else part for index, part in enumerate(PARTS[name])
    )
    assert anatomy.image_token_id == model.config.image_token_id
    assert anatomy.is_pixel_name("pixel_values") and not anatomy.is_pixel_name("input_ids")


@pytest.mark.quick
def test_a_family_that_cannot_be_probed_says_why():
    model, _ = tiny_models.build("llava")
    model.config.__class__ = type("Pi0", (type(model.config),), {"model_type": "pi0"})
    try:
        with pytest.raises(probe.errors.AttachError, match="robot policy"):
            examine(model)
    finally:
        model.config.__class__ = type(model.config).__mro__[1]


def test_modules_by_pattern():
    model, _ = tiny_models.build("llava")
    paths = [path for path, _ in find_modules(model, "model.language_model.layers.*.self_attn")]
    assert len(paths) == model.config.text_config.num_hidden_layers
    with pytest.raises(probe.errors.PointNotFound, match=r"closest: .*model\.vision_tower"):
        find_modules(model, "model.vision_towr")
