"""LLaVA models of any size with random weights, and recorded answers of any length; shared by benchmarks of cost."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from held_out import machine

import lvlm_probe as probe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny_models

__all__ = ["MID_SIZE", "SMALL", "random_llava", "recorded", "write_results"]

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
MID_SIZE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
"""ViT-B, and a decoder of the same width and depth."""


def random_llava(side: int, *, patch: int, tower: dict[str, int], decoder: dict[str, int]) -> tuple[Any, Any]:
    """An unmodified LLaVA with ``side``² image tokens, and its processor; float32 weights drawn with seed 0."""
    family = tiny_models.FAMILIES["llava"]
    tokenizer = tiny_models.make_tokenizer(family)
    ids = tokenizer.get_vocab()
    edge = side * patch
    config = transformers.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model", **tower, "image_size": edge, "patch_size": patch,
            "projection_dim": tower["hidden_size"],
        },
        text_config={
            "model_type": "llama", **tiny_models.text_config(ids), **decoder, "max_position_embeddings": 16384,
            "num_key_value_heads": decoder["num_attention_heads"],
        },
        image_token_index=ids["<image>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        tiny_models.redraw(model, 0)
    processor = transformers.LlavaProcessor(
        tiny_models.pil_image_processor(
            "CLIPImageProcessorPil", size={"shortest_edge": edge}, crop_size=tiny_models.square(edge)
        ),
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.chat_template = tiny_models.make_chat_template(family.slot)
    return model.float().eval(), processor


def recorded(model: Any, processor: Any, directory: Path, *, edge: int, answer: int) -> Any:
    """A replay of an answer of exactly ``answer`` tokens to a prompt of some thirty besides the picture's."""
    question = "What is in the picture? Describe the colour and shape of the two on the left."
    with probe.attach(model, processor) as attached, attached.record(directory, llr=False) as recording:
        inputs = tiny_models.inputs("llava", model, processor, [tiny_models.picture(edge, edge)], question)
        model.generate(**inputs, min_new_tokens=answer, max_new_tokens=answer, do_sample=False)
    return probe.replay(recording.traces[-1], model, processor)


def write_results(path: Path, what: dict[str, Any]) -> None:
    """JSON with the machine, the versions and the date."""
    record = {
        "machine": machine(),
        "python": platform.python_version(),
        "lvlm_probe": importlib.metadata.version("lvlm-probe"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **what,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
