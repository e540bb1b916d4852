"""Drivers for models of other packages: how they are found, driven, and what their tools promise.

The model here takes a list of pictures, keeps its encoder in a list, and runs it without autograd.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lvlm_probe as probe
from lvlm_probe.models import drivers as originals
from lvlm_probe.models.drivers import (
    Driver,
    attributes,
    collapsed,
    expanded,
    open_gates,
    probed_model,
    register_original,
)
from lvlm_probe.models.families import Family
from lvlm_probe.models.fingerprint import fingerprint

MARK, SIDE = -7, 8


class Eye(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.trained = False

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(self.trained):
            return self.patches(picture).flatten(2).transpose(1, 2)


class Foreign(LlamaForCausalLM):
    """Answers come back without the prompt; the encoder is no sub-module."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.eyes = [Eye()]

    def see(self, ids: torch.Tensor, pictures: list[torch.Tensor]) -> torch.Tensor:
        rows = []
        for row, features in zip(ids, self.eyes[0](torch.cat(pictures)), strict=True):
            at = row.tolist().index(MARK)
            words = self.model.embed_tokens
            rows.append(torch.cat([words(row[:at]), features, words(row[at + 1 :])]))
        return torch.stack(rows)

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor, pictures: list[torch.Tensor], **kwargs: Any) -> Any:
        return super().generate(inputs_embeds=self.see(inputs, pictures), **kwargs)


class ForeignDriver(Driver):
    def __init__(self, original: torch.nn.Module, processor: object | None) -> None:
        super().__init__(original, processor)
        self.adopt(self.original.eyes)
        self.family = Family(encoders=("outside.0",), decoder="original.model", image_token=self.config.vocab_size)

    def arguments(self, args: tuple[Any, ...], kwargs: Any) -> dict[str, Any]:
        given = {**dict(zip(("inputs", "pictures"), args, strict=False)), **kwargs}
        ids, pictures = given.pop("inputs"), given.pop("pictures")
        return {
            **given,
            "input_ids": expanded(ids[0], MARK, self.config.vocab_size, 4)[None],
            "pixel_values": torch.cat(pictures),
        }

    def with_pixels(self, args: tuple[Any, ...], kwargs: Any, pixels: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = {**dict(zip(("inputs", "pictures"), args, strict=False)), **kwargs}
        return (), {**given, "pictures": [pixels["pixel_values"]]}

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, pixel_values: Any = None, **_: Any
    ) -> Any:
        short = collapsed(input_ids, self.config.vocab_size, MARK)
        with open_gates(self.original.eyes, "trained"):
            embeddings = self.original.see(short, list(pixel_values.split(1)))
        return self.original(inputs_embeds=embeddings, use_cache=False)


class Pictures:
    """A processor that only makes pixels."""

    def preprocess(self, images: Any, return_tensors: str | None = None, **_: Any) -> dict[str, torch.Tensor]:
        sized = [np.asarray(image.resize((SIDE, SIDE)), dtype=np.float32) / 255 - 0.5 for image in images]
        return {"pixel_values": torch.from_numpy(np.stack(sized)).permute(0, 3, 1, 2)}

    __call__ = preprocess


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(originals, "_ORIGINALS", {})
    monkeypatch.setattr(originals, "built_in", lambda _: False)  # its model_type is LLaMA's
    monkeypatch.setattr(originals, "load_plugins", dict)


def has_eyes(model: Any) -> bool:
    return hasattr(model, "eyes")


def build() -> Foreign:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = Foreign(config).eval()
    tiny_models.redraw(model.requires_grad_(False), 0)
    tiny_models.redraw(model.eyes[0].requires_grad_(False), 1)
    return model


@pytest.mark.quick
def test_a_foreign_model_is_recorded_and_replayed(tmp_path: Any) -> None:
    register_original("foreign", matches=has_eyes, adapt=ForeignDriver)
    model, processor = build(), Pictures()
    ids, image = torch.tensor([[5, 6, MARK, 9]]), tiny_models.picture(40, 40)
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        pictures = [processor.preprocess([image])["pixel_values"]]
        out = model.generate(ids, pictures, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert p.anatomy.encoders == ("outside.0",) and p.anatomy.decoder == "original.model"
    assert not recording.faults and "generate" not in vars(model)
    (trace,) = recording.traces
    assert trace.token_ids.tolist() == out[0].tolist() and trace.log_probs_source == "generation"
    assert trace.model["class"] == "Foreign" and len(trace.input_ids) == 7
    replay = probe.replay(trace, model, processor)
    assert np.abs(replay.original_log_probs.numpy() - trace.log_probs).max() < 1e-5
    mask = torch.ones(1, 4, 4)
    _, gradient = replay.score_and_grad(mask, lambda log_probs: log_probs.sum(1))
    assert gradient.abs().max() > 1e-3 and model.eyes[0].trained is False
    assert trace.layout.patch_box is not None  # found by asking: nothing was declared


def test_encoders_outside_the_module_tree_count_in_the_fingerprint() -> None:
    register_original("foreign", matches=has_eyes, adapt=ForeignDriver)
    model = build()
    before = fingerprint(model)
    assert fingerprint(build()) == before
    with torch.no_grad():
        model.eyes[0].patches.bias.add_(1)
    assert fingerprint(model) != before


def test_adopted_encoders_that_are_in_the_tree_stay_where_they_are() -> None:
    model = build()
    model.inside = model.eyes[0]
    driver = ForeignDriver(model, None)
    assert len(driver.outside) == 0 and driver.path_of(model.eyes[0]) == "original.inside"
    with pytest.raises(probe.errors.PluginError, match="Linear is no part of Foreign"):
        driver.path_of(nn.Linear(1, 1))


def test_names_and_models_are_claimed_once() -> None:
    register_original("foreign", matches=has_eyes, adapt=ForeignDriver)
    register_original("foreign", matches=has_eyes, adapt=ForeignDriver)
    with pytest.raises(probe.errors.PluginError, match="'foreign' is taken"):
        register_original("foreign", matches=has_eyes, adapt=lambda model, processor: ForeignDriver(model, processor))
    register_original("other", matches=has_eyes, adapt=ForeignDriver)
    with pytest.raises(probe.errors.PluginError, match="claimed by the drivers foreign and other"):
        probed_model(build())


def test_models_of_transformers_are_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(originals, "built_in", lambda name: name == "llava")
    monkeypatch.setattr(originals, "load_plugins", lambda: pytest.fail("a plugin was loaded"))
    register_original("greedy", matches=lambda _: True, adapt=ForeignDriver)
    model, _ = tiny_models.build("llava")
    assert probed_model(model) is model


# -------------------------------------------------------------------------------------------------------------- tools


def test_attributes_are_put_back_also_after_an_exception() -> None:
    class Owner:
        kept = "of the class"

    owner = Owner()
    owner.own = value = [1]
    with pytest.raises(ZeroDivisionError), attributes(owner, {"kept": 2, "own": 3, "new": 4}):
        assert (owner.kept, owner.own, owner.new) == (2, 3, 4)
        _ = 1 // 0
    assert vars(owner) == {"own": value} and owner.own is value and owner.kept == "of the class"


@pytest.mark.parametrize("flag", ["trained", "no_such_flag"])
def test_gates_open_for_the_caller_that_has_autograd_on(flag: str) -> None:
    eye, other = Eye(), Eye()
    picture = torch.rand(1, 3, SIDE, SIDE, requires_grad=True)
    before = dict(vars(eye))
    with open_gates([eye, other], flag):
        assert eye(picture).requires_grad and other(picture).requires_grad
    assert not eye(picture).requires_grad
    assert vars(eye) == before and not eye.patches._forward_pre_hooks
    with torch.no_grad(), open_gates([eye], flag):
        assert not eye(picture).requires_grad and torch.is_grad_enabled() is False
    with pytest.raises(ZeroDivisionError), open_gates([eye], flag):
        _ = 1 // 0
    assert vars(eye) == before and not eye.patches._forward_pre_hooks


def test_a_flag_of_the_class_is_not_left_on_the_instance() -> None:
    class Shut(Eye):
        gate = False

    eye = Shut()
    with open_gates([eye], "gate"):
        assert eye.gate is True
    assert "gate" not in vars(eye)


def test_a_mark_becomes_a_run_of_placeholders_and_back() -> None:
    ids = torch.tensor([4, MARK, 5])
    long = expanded(ids, MARK, 99, 3)
    assert long.tolist() == [4, 99, 99, 99, 5]
    assert collapsed(torch.stack([long, long]), 99, MARK).tolist() == [[4, MARK, 5]] * 2
    assert collapsed(torch.tensor([[99, 99, 1, 99]]), 99, MARK).tolist() == [[MARK, 1, MARK]]
    for wrong in ([4, 5], [MARK, MARK]):
        with pytest.raises(ValueError, match="exactly one is supported"):
            expanded(torch.tensor(wrong), MARK, 99, 3)
