"""Entries of the mapping that are no LVLM are refused by one sentence, by their real classes on the meta device."""

from __future__ import annotations

import pytest
import torch
import transformers
import yaml
from sweep import ROOT, mapping

import lvlm_probe as probe

ENTRIES = yaml.safe_load((ROOT / "lvlm_probe" / "families.yaml").read_text(encoding="utf-8"))
REFUSED = {name: entry["unsupported"] for name, entry in ENTRIES.items() if "unsupported" in entry}
CLASSES = {"shieldgemma2": "ShieldGemma2ForImageClassification"}  # the mapping names its text-generating parent


@pytest.mark.parametrize("name", sorted(set(REFUSED) - {"diffusion_gemma"}))
def test_attach_refuses_it_and_says_why(name: str) -> None:
    config = transformers.CONFIG_MAPPING[name]()
    with torch.device("meta"):
        model = getattr(transformers, CLASSES.get(name, mapping()[name]))(config)
    before = frozenset(vars(model))
    with pytest.raises(probe.errors.AttachError) as refusal:
        probe.attach(model)
    assert str(refusal.value) == f"{type(model).__name__} cannot be probed: {REFUSED[name]}"
    assert frozenset(vars(model)) == before


def test_block_diffusion_is_refused() -> None:
    # Its default config builds no model; the refusal goes by the config.
    model = torch.nn.Linear(1, 1)
    model.config = transformers.CONFIG_MAPPING["diffusion_gemma"]()
    with pytest.raises(probe.errors.AttachError, match="block diffusion"):
        probe.attach(model)
