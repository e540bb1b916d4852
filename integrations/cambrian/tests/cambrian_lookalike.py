"""A small model with the interface and the habits of the authors' Cambrian package, written for tests.

Towers in a plain list that switch autograd off, features that ``generate`` stores on the model for its forward passes,
image tokens updated at a fixed position of the prompt, one −200 a picture, answers that come back without the prompt.
The aggregator is a one-headed stand-in: what matters here is how the model is driven.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from lvlm_probe_cambrian.padding import content_box, valid_cells
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
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

__all__ = ["LookalikeForCausalLM", "TowerProcessor", "build", "make_tokenizer", "picture"]

SIDE = 4
CHANNELS = 16
STATE = (
    "vision_tower_aux_feature_list", "vision_tower_aux_attention_masks_list", "final_vision_feature_size",
    "global_context_feature",
)  # fmt: skip


class LookalikeConfig(LlamaConfig):
    model_type: ClassVar[str] = "cambrian_llama"


class TowerProcessor:
    """What the package wraps around the transforms of open_clip's models."""

    def __init__(self, side: int, mean: float) -> None:
        self.crop_size = {"height": side, "width": side}
        self.image_mean = [mean] * 3

    def preprocess(self, image: Image.Image, return_tensors: str = "pt") -> dict[str, list[Tensor]]:
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
        return {"pixel_values": [(pixels - self.image_mean[0]) / 0.25]}


class Tower(nn.Module):
    """One vision tower: features on ``side × side`` tokens, autograd off unless it is being trained."""

    def __init__(self, tower: nn.Module, side: int, processor: TowerProcessor) -> None:
        super().__init__()
        self.is_loaded = True
        self.unfreeze_mm_vision_tower = False
        self.vision_tower, self.side, self.image_processor = tower, side, processor

    def forward(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.unfreeze_mm_vision_tower):
            found = self.vision_tower(images, output_hidden_states=True)
            if isinstance(self.vision_tower, CLIPVisionModel):
                maps = _map(found.hidden_states[-2][:, 1:])
            else:
                last = found.last_hidden_state
                maps = last if last.ndim == 4 else _map(last)
            maps = F.interpolate(maps, size=(self.side, self.side), mode="bilinear", align_corners=False)
            return maps.flatten(2).transpose(1, 2)


def _map(tokens: Tensor) -> Tensor:
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).unflatten(2, (side, side))


class Sampler(nn.Module):
    """q ← q + W_o softmax(W_q [q; g] · kᵀ) v over the windows of all towers."""

    def __init__(self, outer: int, towers: int) -> None:
        super().__init__()
        self.towers = towers
        self.ask = nn.Linear(outer + CHANNELS, CHANNELS)
        self.keys = nn.ModuleList([nn.Linear(CHANNELS, CHANNELS) for _ in range(towers)])
        self.out = nn.Linear(CHANNELS, outer)

    def forward(self, queries: Tensor, context: Tensor, *read: Tensor) -> Tensor:
        windows, masks = read[: self.towers], read[self.towers :]
        asked = self.ask(torch.cat([queries, context], dim=-1))
        keys = torch.cat([key(part) for key, part in zip(self.keys, windows, strict=True)], dim=1)
        scores = (asked @ keys.transpose(1, 2)).masked_fill(~torch.cat(masks, dim=1)[:, None], -math.inf)
        return queries + self.out(scores.softmax(dim=-1) @ torch.cat(windows, dim=1))


class LookalikeModel(LlamaModel):
    config_class = LookalikeConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vision_tower_aux_list = make_towers()  # a plain list: no sub-modules
        for tower, size in enumerate((24, 24, 16)):
            self.add_module(f"mm_projector_aux_{tower}", nn.Linear(size, CHANNELS))
        self.vision_query = nn.Parameter(torch.randn(1, CHANNELS))
        self.vision_sampler_0 = Sampler(CHANNELS, 3)
        self.mm_projector = nn.Sequential(nn.Linear(CHANNELS, config.hidden_size), nn.GELU())
        self.image_newline = nn.Parameter(torch.randn(config.hidden_size))
        self.vision_sampler_layers = nn.ModuleList([Sampler(config.hidden_size, 3) for _ in range(2)])

    def get_vision_tower_aux_list(self) -> list[Tower]:
        return self.vision_tower_aux_list

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        use_cache=None, vision_tower_aux_feature_list=None, vision_tower_aux_attention_masks_list=None,
        final_vision_feature_size=None, global_context_feature=None, **kwargs,
    ):  # fmt: skip
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)[None]
        mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=attention_mask, past_key_values=past_key_values,
            position_ids=position_ids,
        )  # fmt: skip
        rotary = self.rotary_emb(hidden, position_ids=position_ids)
        for number, layer in enumerate(self.layers):
            hidden = layer(
                hidden, attention_mask=mask, position_embeddings=rotary, position_ids=position_ids,
                past_key_values=past_key_values, use_cache=use_cache,
            )  # fmt: skip
            if vision_tower_aux_feature_list is None or hidden.shape[1] == 1 or number % 2:
                continue
            start, offset = self.config.image_position, 0
            for row, (high, wide) in enumerate(final_vision_feature_size):
                span = slice(start, start + high * (wide + 1))
                block = hidden[row, span].clone().view(high, wide + 1, -1)
                mine = slice(offset, offset + high * wide)
                updated = self.vision_sampler_layers[number // 2](
                    block[:, :-1].reshape(high * wide, 1, -1),
                    global_context_feature[mine],
                    *[part[mine] for part in vision_tower_aux_feature_list],
                    *[part[mine] for part in vision_tower_aux_attention_masks_list],
                )
                hidden[row, span] = torch.cat([updated.view(high, wide, -1), block[:, -1:]], dim=1).flatten(0, 1)
                offset += high * wide
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


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

    def get_vision_tower_aux_list(self) -> list[Tower]:
        return self.model.get_vision_tower_aux_list()

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images=None,
        image_aux_attention_masks_list=None, image_sizes=None,
    ):  # fmt: skip
        body = self.model
        if images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels, None, None, None, None
        features = [
            getattr(body, f"mm_projector_aux_{number}")(tower(image))
            for number, (tower, image) in enumerate(zip(body.vision_tower_aux_list, images, strict=True))
        ]
        context = features[0].mean(dim=1)
        rows, kept, kept_masks, contexts, sizes = [], [[], [], []], [[], [], []], [], []
        for row, ids in enumerate(input_ids):
            size = (int(image_sizes[row][0]), int(image_sizes[row][1]))
            box = content_box(SIDE, size)
            windows = [_windows(part[row]) for part in features]
            masks = [_windows(valid_cells(math.isqrt(part.shape[1]), size).reshape(-1, 1))[..., 0] for part in features]
            masks = [mask | ~mask.any(dim=1, keepdim=True) for mask in masks]
            ctx = context[row].expand(SIDE * SIDE, 1, -1)
            queries = body.vision_sampler_0(body.vision_query.expand(SIDE * SIDE, 1, -1), ctx, *windows, *masks)
            grid = body.mm_projector(queries).view(SIDE, SIDE, -1)[box.top : box.bottom, box.left : box.right]
            line = body.image_newline.expand(box.rows, 1, -1)
            image = torch.cat([grid, line], dim=1).flatten(0, 1)
            at = ids.tolist().index(-200)
            rows.append(torch.cat([body.embed_tokens(ids[:at]), image, body.embed_tokens(ids[at + 1 :])]))
            inside = valid_cells(SIDE, size).flatten()
            for tower in range(3):
                kept[tower].append(windows[tower][inside])
                kept_masks[tower].append(masks[tower][inside])
            contexts.append(ctx[inside])
            sizes.append((box.rows, box.cols))
        return (
            None, position_ids, attention_mask, past_key_values, torch.stack(rows), labels,
            [torch.cat(part) for part in kept], [torch.cat(part) for part in kept_masks], sizes, torch.cat(contexts),
        )  # fmt: skip

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, images=None,
        image_aux_attention_masks_list=None, image_sizes=None, return_dict=None, cache_position=None,
    ):  # fmt: skip
        if inputs_embeds is None:
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels, *_ = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids, position_ids, attention_mask, past_key_values, labels, images,
                    image_aux_attention_masks_list, image_sizes,
                )
            )  # fmt: skip
        # The features just made are forgotten; those that generate() stored last are used.
        stored = {name: getattr(self, name) for name in STATE} if hasattr(self, STATE[0]) else {}
        outputs = self.model(
            input_ids=None if inputs_embeds is not None else input_ids, attention_mask=attention_mask,
            position_ids=position_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds,
            use_cache=use_cache, **stored,
        )  # fmt: skip
        logits = self.lm_head(outputs[0]).float()
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)

    @torch.no_grad()
    def generate(self, inputs=None, images=None, image_sizes=None, **kwargs):
        position_ids, attention_mask = kwargs.pop("position_ids", None), kwargs.pop("attention_mask", None)
        if images is None:
            return super().generate(inputs_embeds=self.model.embed_tokens(inputs), **kwargs)
        _, position_ids, attention_mask, _, inputs_embeds, _, *made = self.prepare_inputs_labels_for_multimodal(
            inputs, position_ids, attention_mask, None, None, images, image_sizes=image_sizes
        )
        for name, value in zip(STATE, made, strict=True):
            setattr(self, name, value)
        return super().generate(
            position_ids=position_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )


def _windows(tokens: Tensor) -> Tensor:
    """``(S * S, channel)`` to ``(SIDE * SIDE, r * r, channel)``."""
    size = math.isqrt(tokens.shape[0]) // SIDE
    cut = tokens.view(SIDE, size, SIDE, size, -1).permute(0, 2, 1, 3, 4)
    return cut.reshape(SIDE * SIDE, size * size, -1)


def make_towers() -> list[Tower]:
    """SigLIP at 60 pixels, CLIP at 56, ConvNeXt at 64 (two stages, read at 8 × 8)."""
    small = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    siglip = SiglipVisionModel(SiglipVisionConfig(**small, image_size=60, patch_size=15))
    clip = CLIPVisionModel(CLIPVisionConfig(**small, image_size=56, patch_size=14))
    convnext = ConvNextModel(ConvNextConfig(num_stages=2, depths=[1, 1], hidden_sizes=[8, 16], patch_size=4))
    return [
        Tower(siglip, 4, TowerProcessor(60, 0.48)),
        Tower(clip, 4, TowerProcessor(56, 0.48)),
        Tower(convnext, 8, TowerProcessor(64, 0.48)),
    ]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes."""
    pieces = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def build(*, seed: int = 0, attention: str = "sdpa", position: int = 6) -> tuple[LookalikeForCausalLM, Any]:
    """A model whose every path carries signal, and its tokenizer. The picture belongs at ``position``."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = LookalikeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, image_token_len=SIDE * SIDE,
        image_position=position, connector_only=False, start_of_vision_sampler_layers=0,
        stride_of_vision_sampler_layers=2, tie_word_embeddings=False, attn_implementation=attention,
    )  # fmt: skip
    model = LookalikeForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for part in (model, *model.get_vision_tower_aux_list()):
        part.eval()
        with torch.no_grad():
            for parameter in part.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim > 1:
                    parameter.copy_(noise / math.sqrt(parameter[0].numel()))
                else:
                    parameter.add_(0.1 * noise)
    return model, tokenizer


def picture(width: int = 50, height: int = 40, *, seed: int = 0) -> Image.Image:
    """Colour blobs."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
