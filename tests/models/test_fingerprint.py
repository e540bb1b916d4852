"""The fingerprint: same weights, same model."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch

from lvlm_probe.models.fingerprint import describe_model, fingerprint, library_versions


def test_fingerprint_follows_the_weights_and_not_the_dtype(tmp_path):
    model, _ = tiny_models.build("llava")
    before = fingerprint(model)
    assert fingerprint(tiny_models.build("llava")[0]) == before
    assert fingerprint(tiny_models.build("llava", seed=1)[0]) != before
    assert fingerprint(model.to(torch.bfloat16)) == before
    model.lm_head.weight.data[:, 0] += 1
    assert fingerprint(model) != before


@pytest.mark.quick
def test_fingerprint_of_weights_that_are_not_there():
    with torch.device("meta"):
        layers = [torch.nn.Linear(2, 3), torch.nn.Linear(2, 4)]
    assert fingerprint(layers[0]) != fingerprint(layers[1])


def test_description_is_json(demo):
    description = json.loads(json.dumps(describe_model(demo[0])))
    assert description["class"] == "LlavaForConditionalGeneration" and description["torch_dtype"] == "float32"
    assert description["versions"].keys() >= {"torch", "transformers", "python"} == {"python", "torch", "transformers"}
    assert "torch" in library_versions()
