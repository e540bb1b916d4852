"""What the original classes computed, and the native model with their weights, loaded through the converter."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lvlm_probe_mini_gemini import MiniGeminiForConditionalGeneration
from lvlm_probe_mini_gemini.convert import convert
from safetensors.torch import load_file

__all__ = ["DATA", "VARIANTS", "checkpoint", "converted", "expanded", "outputs"]

DATA = Path(__file__).parent / "data"
VARIANTS = ("mgm_plain", "mgm_hd")
# The towers' own configurations are not part of an original checkpoint; these sizes are those of the data.
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "patch_size": 4, "image_size": 16,
}  # fmt: skip


def checkpoint(name: str, folder: Path) -> Path:
    """The original checkpoint as a directory."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(DATA / f"{name}.safetensors", folder / "model.safetensors")
    shutil.copy(DATA / f"{name}_config.json", folder / "config.json")
    return folder


@cache
def outputs(name: str) -> dict[str, torch.Tensor]:
    """What the original classes were given and what they gave."""
    return load_file(DATA / f"{name}_io.safetensors")


def converted(name: str, folder: Path, *, attention: str = "eager") -> Any:
    """The native model."""
    out = folder / "native"
    if not out.exists():
        convert(checkpoint(name, folder / "original"), out, vision_config=CLIP)
    return MiniGeminiForConditionalGeneration.from_pretrained(out, attn_implementation=attention).eval()


def expanded(input_ids: torch.Tensor, model: Any) -> torch.Tensor:
    """The original's one placeholder, −200, as the native model's: one a feature."""
    (row,) = input_ids.tolist()
    slot = row.index(-200)
    image = [model.config.image_token_id] * model.config.image_tokens()
    return torch.tensor([row[:slot] + image + row[slot + 1 :]])


def original_config(name: str) -> dict[str, Any]:
    return json.loads((DATA / f"{name}_config.json").read_text())
