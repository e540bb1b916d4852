"""Tiny Cambrians: with random weights and a byte-level tokenizer written out here, and from the parity data."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lvlm_probe_cambrian import CambrianForConditionalGeneration, CambrianProcessor
from lvlm_probe_cambrian.convert import convert
from lvlm_probe_cambrian.keys import LANGUAGE
from lvlm_probe_cambrian.original_processor import make_image_processor
from lvlm_probe_cambrian.padding import image_token_count
from lvlm_probe_cambrian.processing import CHAT_TEMPLATES
from lvlm_probe_cambrian.small import small_config
from lvlm_probe_cambrian.sources import Checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

DATA = Path(__file__).parent / "data"
KINDS = ("siglip_vision_model", "clip_vision_model", "dinov2", "convnext")
VOCABULARY = 3 + 256
IMAGE = VOCABULARY
"""Id of the image token, the first behind the vocabulary, as in a converted checkpoint."""

# What shapes do not tell of the towers that the parity data was made with.
_TOWERS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {"num_attention_heads": 4},
    "clip_vision_model": {"num_attention_heads": 4},
    "dinov2": {"num_attention_heads": 4},
    "convnext": {"layer_norm_eps": 1e-5},
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the image token behind them."""
    pieces = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert made.convert_tokens_to_ids("<image>") == IMAGE
    return made


def config(**more: Any) -> Any:
    return small_config(vocab_size=VOCABULARY, image_token_id=IMAGE, **more)


def redraw(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights whose parts all matter: matrices from N(0, 1/fan_in), norms and biases jittered, layer scales open."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if "layer_scale" in name or "lambda1" in name:
                value.copy_(0.5 + 0.1 * noise)
            elif value.ndim > 1:
                value.copy_(noise / math.sqrt(value.shape[1] if "embed_tokens" in name else value[0].numel()))
            else:
                value.add_(0.1 * noise)
        model.lm_head.weight.mul_(3)  # type: ignore[union-attr]


@cache
def _state(decoder: str, towers: tuple[tuple[str, int], ...] | None) -> tuple[Any, dict[str, torch.Tensor]]:
    made = config(decoder=decoder, **({} if towers is None else {"towers": towers}))
    torch.manual_seed(0)  # of what redraw only jitters
    model = CambrianForConditionalGeneration(made)
    redraw(model)
    return made.to_dict(), model.state_dict()


def build(
    *,
    decoder: str = "llama",
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    towers: tuple[tuple[str, int], ...] | None = None,
) -> tuple[Any, Any]:
    """A model and its processor."""
    settings, state = _state(decoder, towers)
    made = type(config())(**{**settings, "attn_implementation": attention})
    made._attn_implementation = attention
    model = CambrianForConditionalGeneration(made).to(dtype).eval()
    model.load_state_dict(state)
    processor = CambrianProcessor(make_image_processor(made), tokenizer(), chat_template=CHAT_TEMPLATES["vicuna_v1"])
    return model, processor


def picture(width: int = 90, height: int = 60, seed: int = 0) -> Image.Image:
    """Coarse random colours, so that every part of the picture is unlike the others."""
    values = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def chat(image: Image.Image, question: str = "What is it?") -> list[dict[str, Any]]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def inputs(processor: Any, image: Image.Image | None = None, question: str = "What is it?") -> Any:
    return processor.apply_chat_template(
        chat(image or picture(), question),
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip


def folders(stem: str, place: Path) -> dict[str, Path]:
    """The checkpoints of the parity data, as their authors publish them: one folder each."""
    tensors = load_file(DATA / f"{stem}.safetensors")
    parts = {LANGUAGE: {key: value for key, value in tensors.items() if not key.startswith("__tower__")}}
    for number, kind in enumerate(KINDS):
        mark = f"__tower__.{number}."
        parts[kind] = {key.removeprefix(mark): value for key, value in tensors.items() if key.startswith(mark)}
    made = {}
    for kind, held in parts.items():
        made[kind] = place / kind
        made[kind].mkdir(parents=True, exist_ok=True)
        save_file(held, made[kind] / "model.safetensors")
        settings = _TOWERS.get(kind) or json.loads((DATA / f"{stem}_config.json").read_text(encoding="utf-8"))
        (made[kind] / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return made


def converted(stem: str, place: Path) -> Path:
    """The native model of the parity data."""
    sources = {kind: Checkpoint(folder, kind) for kind, folder in folders(stem, place).items()}
    return convert(sources, place / "native", say=lambda _line: None)


class Case:
    """One picture and prompt of the parity data, and what the original classes made of them."""

    def __init__(self, stem: str, name: str) -> None:
        held = load_file(DATA / f"{stem}_io.safetensors")
        self.of = {key.removeprefix(f"{name}."): value for key, value in held.items() if key.startswith(f"{name}.")}
        self.size = tuple(self.of["image_sizes"][0].tolist())

    def ids(self, model: Any, *, answer: bool = True) -> torch.Tensor:
        """The prompt with its placeholder expanded, with or without the three answer tokens at its end."""
        ids = self.of["input_ids"][0].tolist()
        at = ids.index(-200)
        count = image_token_count(model.config.image_grid, self.size)
        ids = [*ids[:at], *[model.config.image_token_id] * count, *ids[at + 1 :]]
        return torch.tensor([ids if answer else ids[: -self.of["label"].shape[1]]])

    def pixels(self, *, leaves: bool = False) -> dict[str, torch.Tensor]:
        return {f"pixel_values_{tower}": self.of[f"image{tower}"].clone().requires_grad_(leaves) for tower in range(4)}

    def errors(self, model: Any) -> tuple[float, float]:
        """Largest difference of logits, and the largest of a gradient relative to that gradient's largest value."""
        leaves = self.pixels(leaves=True)
        logits = model(input_ids=self.ids(model), image_sizes=self.of["image_sizes"], **leaves).logits
        label = self.of["label"]
        steps = logits[:, -label.shape[1] - 1 : -1].log_softmax(-1).gather(-1, label[..., None])
        gradients = torch.autograd.grad(steps.sum(), list(leaves.values()))
        apart = [
            ((gradient - self.of[f"grad{tower}"]).abs().max() / self.of[f"grad{tower}"].abs().max()).item()
            for tower, gradient in enumerate(gradients)
        ]
        return (logits - self.of["logits"]).abs().max().item(), max(apart)
