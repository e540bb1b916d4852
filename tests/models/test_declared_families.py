"""Families that a plugin declares: an own model type on disk, its parts, and where its image tokens lie."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from plugin_site import Install

import lvlm_probe as probe
from lvlm_probe.models import families as adapters
from lvlm_probe.models.anatomy import examine
from lvlm_probe.models.families import Family, family_of, register_family

PLUGIN = """
import numpy as np
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration
from lvlm_probe.models.families import Family, register_family
from lvlm_probe.models.families import Places

class DeclaredConfig(LlavaConfig):
    model_type = "declared_llava"

class DeclaredModel(LlavaForConditionalGeneration):
    config_class = DeclaredConfig

def boxes(replay, positions):
    count = len(positions)
    width, height = replay.image_sizes[0]
    left = np.arange(count, dtype=np.float32) * width / count
    places = np.stack([left, left * 0, left + width / count, left * 0 + height], axis=1)
    images = np.zeros(count, dtype=np.int64)
    places[-1], images[-1] = 0, -1
    return Places(places, images)

def register():
    AutoConfig.register("declared_llava", DeclaredConfig)
    AutoModelForImageTextToText.register(DeclaredConfig, DeclaredModel)
    register_family("declared_llava", Family(
        encoders=("model.vision_tower*",), mergers=("model.multi_modal_projector.linear_2",),
        decoder="model.language_model", token_boxes=boxes))
"""


@pytest.fixture(autouse=True)
def own_registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    monkeypatch.setattr(adapters, "_FAMILIES", {})
    kept = [
        (mapping, dict(mapping._extra_content)) for mapping in (CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    ]
    yield
    for mapping, content in kept:
        mapping._extra_content = content


@pytest.fixture
def checkpoint(tmp_path: Path, install: Install) -> Path:
    """A model directory of a type that only an installed plugin knows."""
    directory = tiny_models.save("llava", tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    config["model_type"], config["architectures"] = "declared_llava", ["DeclaredModel"]
    (directory / "config.json").write_text(json.dumps(config))
    install("declared-llava", "declared", "declared_llava:register", source=PLUGIN)
    return directory


def test_a_directory_of_a_plugins_family_opens_without_an_import(checkpoint: Path) -> None:
    model, processor = probe.load(checkpoint)
    assert type(model).__name__ == "DeclaredModel"
    anatomy = examine(model, processor)
    assert anatomy.encoders == ("model.vision_tower",)  # what lies inside it is no encoder of its own
    assert anatomy.mergers == ("model.multi_modal_projector.linear_2",)
    assert anatomy.decoder == "model.language_model"


@pytest.mark.quick
def test_declared_places_are_recorded_and_drawn(checkpoint: Path, tmp_path: Path) -> None:
    model, processor = probe.load(checkpoint)
    picture = tiny_models.picture()
    with probe.attach(model, processor) as p, p.record(tmp_path / "run") as recording:
        inputs = tiny_models.inputs("llava", model, processor, [picture], "What is this?")
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    (trace,) = recording.traces
    count = len(trace.layout.image_positions)
    width, height = picture.size
    wanted = [[k * width / count, 0, (k + 1) * width / count, height] for k in range(count - 1)] + [[0, 0, 0, 0]]
    assert np.allclose(trace.layout.patch_box, wanted)
    heat = probe.explain(trace, method="attention", tokens=(0, 3), size=(1, count))
    assert heat.values.shape == (1, count)
    # Without the processor positions are those in the pixel inputs, of which the declaration does not speak.
    bare = probe.explain(probe.replay(trace, model), method="tmm", tokens=(0, 3), strengthen=False)
    assert bare.values.shape == (4, 4)


def test_places_of_the_wrong_shape_name_the_plugin() -> None:
    from lvlm_probe.boxes.image_tokens import _checked
    from lvlm_probe.models.families import Places

    with pytest.raises(probe.errors.ImageError, match=r"plugin for MyModel gave boxes of shape \(3, 2\)"):
        _checked(Places(np.zeros((3, 2)), np.zeros(3)), 3, "MyModel")


def test_a_declared_part_that_is_missing_is_named(checkpoint: Path) -> None:
    model, _ = probe.load(checkpoint)
    adapters._FAMILIES["declared_llava"] = Family(encoders=("model.towers.*",))
    with pytest.raises(probe.errors.PointNotFound, match=r"no module matches 'model.towers\.\*' in DeclaredModel"):
        examine(model)


def test_unsupported_families_and_image_tokens(checkpoint: Path) -> None:
    model, processor = probe.load(checkpoint)
    for token, wanted in (("none", None), (7, 7), (None, model.config.image_token_id)):
        adapters._FAMILIES["declared_llava"] = Family(image_token=token, pixel_names=("thermal",))
        anatomy = examine(model, processor)
        assert anatomy.image_token_id == wanted
        assert anatomy.is_pixel_name("thermal")
    adapters._FAMILIES["declared_llava"] = Family(unsupported="it dreams")
    with pytest.raises(probe.errors.AttachError, match="DeclaredModel cannot be probed: it dreams"):
        probe.attach(model, processor)


def test_built_in_families_load_no_plugin(install: Install) -> None:
    from lvlm_probe import plugins

    install("declared-llava", "declared", "declared_llava:register", source=PLUGIN)
    model, processor = tiny_models.build("llava")
    with probe.attach(model, processor):
        assert plugins._cache.plugins is None
    assert family_of("declared_llava") is not None  # while an unknown name does
    assert plugins._cache.plugins is not None


def test_two_declarations_of_one_type_are_refused() -> None:
    first = Family(decoder="model")
    register_family("somebodys_vlm", first)
    register_family("somebodys_vlm", Family(decoder="model"))  # a plugin registered twice is no clash
    with pytest.raises(probe.errors.PluginError, match="'somebodys_vlm' is declared already, by another plugin"):
        register_family("somebodys_vlm", Family(decoder="other"))
    assert family_of("somebodys_vlm") is first
    with pytest.raises(probe.errors.PluginError, match="'llava' is one of transformers' own"):
        register_family("llava", first)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"encoders": "model.tower"}, r"encoders=\('model.tower',\)"),
        ({"image_token": "<image>"}, "a token id, 'none' or None"),
    ],
)
def test_a_wrong_declaration_says_what_is_wanted(wrong: dict, message: str) -> None:
    with pytest.raises(probe.errors.PluginError, match=message):
        Family(**wrong)
    with pytest.raises(probe.errors.PluginError, match="takes a Family, not dict"):
        register_family("mine", wrong)
