"""A small model with the interface and the habits of the authors' Mini-Gemini package, written for tests.

Encoders that run without autograd unless they are being trained, two picture tensors, one −200 a picture, answers that
come back without the prompt, modules between the encoders that exist only once they are initialised.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
)

__all__ = ["LookalikeForCausalLM", "build", "make_tokenizer", "picture"]

LOW, HIGH, CHANNELS = 28, 64, 24


class LookalikeConfig(LlamaConfig):
    model_type: ClassVar[str] = "mgm"


class Tower(nn.Module):
    """CLIP's hidden state −2 without the class token, or both stages of a ConvNeXt as one map."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.is_loaded, self.is_optimize = True, False
        self.vision_tower = tower
        mean, std = [0.48, 0.45, 0.41], [0.26, 0.26, 0.27]
        self.image_processor = SimpleNamespace(image_mean=mean, image_std=std, crop_size={"height": LOW, "width": LOW})

    @property
    def config(self) -> Any:
        return self.vision_tower.config

    @property
    def num_patches(self) -> int:
        return (self.config.image_size // self.config.patch_size) ** 2

    def image_forward(self, images: Tensor) -> Tensor:
        found = self.vision_tower(images, output_hidden_states=True)
        if isinstance(self.vision_tower, CLIPVisionModel):
            return found.hidden_states[-2][:, 1:]
        fine, coarse = found.hidden_states[-2:]
        size = fine.shape[-2:]
        return torch.cat([fine, F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        if not self.is_optimize:
            with torch.no_grad():
                return self.image_forward(images)
        return self.image_forward(images)


class LookalikeModel(LlamaModel):
    config_class = LookalikeConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        clip = CLIPVisionConfig(
            hidden_size=CHANNELS, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=LOW,
            patch_size=7,
        )  # fmt: skip
        convnext = ConvNextConfig(num_stages=2, depths=[1, 1], hidden_sizes=[8, 16], patch_size=4)
        self.vision_tower = Tower(CLIPVisionModel(clip))
        self.vision_tower_aux = Tower(ConvNextModel(convnext))
        self.mm_projector = nn.Sequential(nn.Linear(CHANNELS, config.hidden_size), nn.GELU())

    def initialize_uni_modules(self) -> None:
        for part, size in (("query", CHANNELS), ("aux", 24), ("val", 24)):
            self.add_module(f"vlm_uni_{part}_projector", nn.Sequential(nn.LayerNorm(size), nn.Linear(size, CHANNELS)))

    def get_vision_tower(self) -> Tower:
        return self.vision_tower

    def get_vision_tower_aux(self) -> Tower:
        return self.vision_tower_aux


class LookalikeForCausalLM(LlamaForCausalLM):
    config_class = LookalikeConfig

    def __init__(self, config: Any) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LookalikeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_model(self) -> LookalikeModel:
        return self.model

    def get_vision_tower(self) -> Tower:
        return self.model.get_vision_tower()

    def get_vision_tower_aux(self) -> Tower:
        return self.model.get_vision_tower_aux()

    def encode_images(self, images: Tensor, images_aux: Tensor | None = None) -> Tensor:
        grid = getattr(self.config, "image_grid", 1)
        batch = len(images)
        views = images.flatten(0, 1) if grid > 1 else images
        low = self.get_vision_tower()(views).unflatten(0, (batch, -1))
        if images_aux is not None:
            high = self.get_vision_tower_aux()(images_aux)
            maps = []
            if grid > 1:
                side = high.shape[-1] // grid
                maps += [
                    high[..., row * side : (row + 1) * side, col * side : (col + 1) * side]
                    for row in range(grid)
                    for col in range(grid)
                ]
            if grid == 1 or self.config.image_global:
                scale = 1 / grid
                maps.append(F.interpolate(high, scale_factor=scale, mode="bilinear") if grid > 1 else high)
            low = torch.stack([self._mined(low[:, view], part) for view, part in enumerate(maps)], dim=1)
        if grid > 1 and self.config.image_global:
            low = torch.cat([low[:, -1:], low[:, :-1]], dim=1)
        return self.model.mm_projector(low.flatten(1, 2))

    def _mined(self, low: Tensor, high: Tensor) -> Tensor:
        body, side = self.model, math.isqrt(low.shape[1])
        size = high.shape[-1] // side
        cut = high.unflatten(2, (side, size)).unflatten(4, (side, size)).permute(0, 2, 4, 3, 5, 1)
        cut = cut.flatten(3, 4).flatten(1, 2)
        scores = body.vlm_uni_query_projector(low)[:, :, None] @ body.vlm_uni_aux_projector(cut).transpose(-1, -2)
        shares = (scores / math.sqrt(low.shape[-1])).softmax(dim=-1)
        return low + (shares @ body.vlm_uni_val_projector(cut))[:, :, 0]

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images=None, images_aux=None
    ):
        if images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        features, rows = self.encode_images(images, images_aux), []
        for ids, image in zip(input_ids, features, strict=True):
            at = ids.tolist().index(-200)
            embed = self.model.embed_tokens
            rows.append(torch.cat([embed(ids[:at]), image, embed(ids[at + 1 :])]))
        embeddings = torch.stack(rows)
        limit = getattr(self.config, "tokenizer_model_max_length", None)
        return None, position_ids, attention_mask, past_key_values, embeddings[:, :limit], labels

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, images=None, images_aux=None,
        return_dict=None,
    ):  # fmt: skip
        if inputs_embeds is None:
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids, position_ids, attention_mask, past_key_values, labels, images, images_aux
                )
            )
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
        )  # fmt: skip

    @torch.no_grad()
    def generate(self, inputs=None, images=None, images_aux=None, **kwargs):
        position_ids, attention_mask = kwargs.pop("position_ids", None), kwargs.pop("attention_mask", None)
        if images is None:
            return super().generate(inputs_embeds=self.model.embed_tokens(inputs), **kwargs)
        _, position_ids, attention_mask, _, inputs_embeds, _ = self.prepare_inputs_labels_for_multimodal(
            inputs, position_ids, attention_mask, None, None, images, images_aux
        )
        return super().generate(
            position_ids=position_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, with a beginning-of-sequence token in front."""
    pieces = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def build(
    *, hd: bool = False, seed: int = 0, attention: str = "sdpa", initialised: bool = True
) -> tuple[LookalikeForCausalLM, Any]:
    """A model whose every path carries signal, and its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = LookalikeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
        image_size_aux=2 * HIGH if hd else HIGH, image_grid=2 if hd else 1, image_global=hd,
        tokenizer_model_max_length=256, attn_implementation=attention,
    )  # fmt: skip
    model = LookalikeForCausalLM(config).eval()
    if initialised:
        model.get_model().initialize_uni_modules()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.add_(0.1 * noise)
    return model.eval(), tokenizer


def picture(width: int = 60, height: int = 40, *, seed: int = 0) -> Image.Image:
    """Colour blobs."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
