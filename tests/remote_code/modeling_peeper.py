"""Peeper: a tower called ``eyes``, a projector called ``bridge``, a language model called ``mind``."""

import torch
from torch import nn
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_peeper import PeeperConfig


class Glance(nn.Module):
    """A block of the tower, with attention of its own making."""

    def __init__(self, width):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mix = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        x = x + self.out(torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, dim=-1) @ value)
        return x + self.mix(x)


class Eyes(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.cut = nn.Conv2d(3, 32, config.patch, config.patch)
        self.place = nn.Parameter(0.1 * torch.randn((config.side // config.patch) ** 2, 32))
        self.blocks = nn.ModuleList(Glance(32) for _ in range(2))

    def forward(self, pictures):
        x = self.cut(pictures).flatten(2).mT + self.place
        for block in self.blocks:
            x = block(x)
        return x


class PeeperForConversation(PreTrainedModel, GenerationMixin):
    config_class = PeeperConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.eyes = Eyes(config)
        self.bridge = nn.Sequential(nn.Linear(32, config.width), nn.GELU(), nn.Linear(config.width, config.width))
        self.mind = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.width,
                intermediate_size=2 * config.width,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                attn_implementation=config._attn_implementation,
            )
        )
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, pictures=None,
                use_cache=None, cache=None, **kwargs):  # fmt: skip
        past_key_values = cache if past_key_values is None else past_key_values  # its name from transformers 5.24 on
        embeds = self.mind.model.embed_tokens(input_ids)
        started = past_key_values is not None and past_key_values.get_seq_length() > 0
        if pictures is not None and not started:
            seen = self.bridge(self.eyes(pictures.to(embeds.dtype)))
            embeds = embeds.masked_scatter((input_ids == self.config.image_token_index)[..., None], seen)
        out = self.mind(
            inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, use_cache=use_cache,
        )  # fmt: skip
        return CausalLMOutputWithPast(logits=out.logits, past_key_values=out.past_key_values)


class PeeperWithChat(PeeperForConversation):
    """As many remote models do it: a ``generate`` of its own, which gives embeddings to the language model's."""

    @torch.no_grad()
    def generate(self, pictures=None, input_ids=None, attention_mask=None, **settings):
        embeds = self.mind.model.embed_tokens(input_ids)
        seen = self.bridge(self.eyes(pictures.to(embeds.dtype)))
        embeds = embeds.masked_scatter((input_ids == self.config.image_token_index)[..., None], seen)
        return self.mind.generate(inputs_embeds=embeds, attention_mask=attention_mask, **settings)
