"""Llama and Phi-3 as Cambrian uses them: behind some layers, image tokens look at the vision towers once more.

The decoders are transformers' own. A layer gets the state of the pass as one more keyword, ``vision``, which the
models hand on to every layer; in a pass without pictures (text alone, a decoding step) there is none. The aggregator of
a layer is a part of it, so that it is moved, offloaded, frozen and recomputed with it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import LlamaModel, Phi3Model
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from lvlm_probe_cambrian.configuration import CambrianConfig
from lvlm_probe_cambrian.sampler import SamplerState, VisionSampler

__all__ = ["CambrianLlamaModel", "CambrianPhi3Model", "make_decoder"]


class CambrianLlamaLayer(LlamaDecoderLayer):
    """A Llama layer, and the aggregator behind it where there is one."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.sampler: VisionSampler | None = None

    def forward(self, hidden_states: Tensor, *args: Any, vision: SamplerState | None = None, **kwargs: Any) -> Tensor:
        hidden: Tensor = super().forward(hidden_states, *args, **kwargs)
        return hidden if vision is None or self.sampler is None else vision.update(self.sampler, hidden)


class CambrianPhi3Layer(Phi3DecoderLayer):
    """A Phi-3 layer, and the aggregator behind it where there is one."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.sampler: VisionSampler | None = None

    def forward(self, hidden_states: Tensor, *args: Any, vision: SamplerState | None = None, **kwargs: Any) -> Tensor:
        hidden: Tensor = super().forward(hidden_states, *args, **kwargs)
        return hidden if vision is None or self.sampler is None else vision.update(self.sampler, hidden)


class CambrianLlamaModel(LlamaModel):
    """Llama with ``CambrianLlamaLayer``s; its own weights under their own names."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([CambrianLlamaLayer(config, index) for index in range(config.num_hidden_layers)])
        self.post_init()


class CambrianPhi3Model(Phi3Model):
    """Phi-3 with ``CambrianPhi3Layer``s; its own weights under their own names."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([CambrianPhi3Layer(config, index) for index in range(config.num_hidden_layers)])
        self.post_init()


def make_decoder(config: CambrianConfig) -> nn.Module:
    """The decoder of a Cambrian, with an aggregator in each of ``config.sampler_layers``, without a language head."""
    models: dict[str, Any] = {"llama": CambrianLlamaModel, "phi3": CambrianPhi3Model}
    text = config.text_config
    decoder: nn.Module = models[text.model_type](text)
    sides = [grid // config.image_grid for grid in config.tower_grids or []]
    for layer in config.sampler_layers or []:
        decoder.layers[layer].sampler = VisionSampler(1, text.hidden_size, sides, config)  # type: ignore[index,union-attr]
    return decoder
