"""Models of any size with random weights, and recorded answers of any length; shared by benchmarks of cost."""

from __future__ import annotations

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

__all__ = [
    "MID_SIZE",
    "PATCH",
    "QUESTION",
    "SMALL",
    "asked",
    "random_llava",
    "random_qwen",
    "recorded",
    "write_results",
]

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
MID_SIZE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
"""ViT-B, and a decoder of the same width and depth."""
QUESTION = "What is in the picture? Describe the colour and shape of the two on the left."
PATCH = 14
"""Pixels along the edge of what one image token of ``random_qwen`` stands for."""


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


def random_qwen(*, tower: dict[str, int], decoder: dict[str, int]) -> tuple[Any, Any]:
    """An unmodified Qwen2-VL, which takes pictures of any size, and its processor; float32 weights drawn with seed 0.

    It joins no patches, so a picture of ``PATCH`` · rows × ``PATCH`` · columns pixels has rows · columns image tokens:
    one and the same model has as many of them as is wanted, all in one picture.

    Args:
        tower, decoder: Sizes as in ``SMALL``.
    """
    family = tiny_models.FAMILIES["qwen2_vl"]
    tokenizer = tiny_models.make_tokenizer(family)
    ids = tokenizer.get_vocab()
    channels = decoder["hidden_size"] // decoder["num_attention_heads"]
    sections = [channels // 4 // 2, (channels // 2 - channels // 4 // 2) // 2]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [*sections, channels // 2 - sum(sections)]}
    config = transformers.Qwen2VLConfig(
        vision_config={
            "depth": tower["num_hidden_layers"], "embed_dim": tower["hidden_size"],
            "hidden_size": decoder["hidden_size"], "num_heads": tower["num_attention_heads"],
            "mlp_ratio": tower["intermediate_size"] // tower["hidden_size"], "patch_size": PATCH,
            "spatial_merge_size": 1,
        },
        text_config={
            **tiny_models.text_config(ids), **decoder, "num_key_value_heads": decoder["num_attention_heads"],
            "max_position_embeddings": 16384, "rope_parameters": rope,
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Qwen2VLForConditionalGeneration(config)
    tiny_models.redraw(model, 0)
    image_processor = tiny_models.pil_image_processor(
        "Qwen2VLImageProcessorPil", size={"shortest_edge": PATCH**2, "longest_edge": 16384 * PATCH**2},
        patch_size=PATCH, merge_size=1,
    )  # fmt: skip
    processor = tiny_models.video_family("Qwen2VLProcessor", "Qwen2VLVideoProcessor", image_processor, tokenizer)
    processor.chat_template = tiny_models.make_chat_template(family.slot)
    return model.float().eval(), processor


def asked(model: Any, processor: Any, size: tuple[int, int]) -> Any:
    """Inputs of a prompt of some thirty tokens besides those of its picture of ``(width, height)`` pixels."""
    family = "qwen2_vl" if "qwen" in type(model).__name__.lower() else "llava"
    return tiny_models.inputs(family, model, processor, [tiny_models.picture(*size)], QUESTION)


def recorded(model: Any, processor: Any, directory: Path, *, size: tuple[int, int], answer: int) -> Any:
    """A replay of an answer of exactly ``answer`` tokens to ``asked``."""
    with probe.attach(model, processor) as attached, attached.record(directory, llr=False) as recording:
        inputs = asked(model, processor, size)
        model.generate(**inputs, min_new_tokens=answer, max_new_tokens=answer, do_sample=False)
    return probe.replay(recording.traces[-1], model, processor)


def write_results(path: Path, what: dict[str, Any]) -> None:
    """JSON with the machine, the versions and the date."""
    record = {
        "machine": machine(),
        "python": platform.python_version(),
        "lvlm_probe": probe.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **what,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")  # who is stopped while writing keeps what was measured before
    part.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
