"""The training recipe of the guide: the probe changes nothing about the training, and sees what training changes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import lvlm_probe as probe

pytest.importorskip("peft")
pytest.importorskip("accelerate")
PAGE = Path(__file__).parents[2] / "docs" / "guides" / "integrations.md"


def test_a_training_with_maps_is_the_training_without(demo, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(from copy import deepcopy\n.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    without, cut = re.subn(r"\n    callbacks=.*\n", "\n", code)
    assert cut == 1
    monkeypatch.chdir(tmp_path)
    for name, scene in zip(("photo.jpg", "other.jpg"), probe.demo.scenes(2), strict=True):
        scene.image.save(name)
    weights = []
    for recipe in (code, without):
        torch.manual_seed(0)  # of the adapter's first weights
        names = {"probe": probe, "model": demo[0], "processor": demo[1]}
        exec(recipe, names)
        weights.append({path: value for path, value in names["adapted"].state_dict().items() if "lora_" in path})
        assert names["adapted"].training
    assert weights[0].keys() == weights[1].keys() and len(weights[0]) > 4
    assert all(torch.equal(value, weights[1][path]) for path, value in weights[0].items())
    pages = sorted(Path("runs/maps").glob("*/0.html"))
    assert [page.parent.name for page in pages] == ["epoch-1", "epoch-2"]
    first, second = (probe.open_store(page.parent)[0] for page in pages)
    assert first.model["adapter"] == second.model["adapter"] == "default"
    assert first.model["fingerprint"] != second.model["fingerprint"]
    assert first.log_probs.tolist() != second.log_probs.tolist()
