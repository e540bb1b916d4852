"""Configuration of the native Cambrian model: a decoder, one to four vision towers, and the aggregator between them."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

__all__ = ["DECODERS", "MAX_TOWERS", "TOWERS", "CambrianConfig"]

MAX_TOWERS = 4
TOWERS = ("siglip_vision_model", "clip_vision_model", "dinov2", "convnext")
"""Kinds of vision towers, by the ``model_type`` of their own configuration."""
DECODERS = ("llama", "phi3")


class CambrianConfig(PreTrainedConfig):
    """Configuration of ``CambrianForConditionalGeneration``.

    Args:
        text_config: of the decoder, ``llama`` or ``phi3``.
        vision_config_0, …, vision_config_3: of the towers, in order, without a gap; any of ``TOWERS``. The first one is
            the source of the global context.
        tower_grids: side of the token grid that each tower's features are resampled to; a multiple of every entry of
            ``query_grids`` and of ``image_grid``.
        image_grid: side of the grid of image tokens over the padded square.
        query_grids: side of each group of queries of the connector.
        vision_hidden_size: channels d of the aggregator; a multiple of ``vision_heads``.
        vision_heads: heads of its cross-attention.
        connector_depth: layers of the aggregator in front of the decoder.
        sampler_layers: decoder layers after which image tokens look at the towers once more, counted from 0.
        clip_layer: which hidden state of a CLIP tower is its feature, as an index into hidden states.
        image_token_id: placeholder of image tokens in the prompt; may lie outside the decoder's vocabulary.
    """

    model_type: ClassVar[str] = "cambrian"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        **{
            f"vision_config_{tower}": SubConfigSpec(config_class=AutoConfig, model_type=kind, optional=True)
            for tower, kind in enumerate(TOWERS)
        },
    }

    text_config: Any = None
    vision_config_0: Any = None
    vision_config_1: Any = None
    vision_config_2: Any = None
    vision_config_3: Any = None
    tower_grids: list[int] | None = None
    image_grid: int = 24
    query_grids: list[int] | None = None
    vision_hidden_size: int = 1024
    vision_heads: int = 16
    connector_depth: int = 3
    sampler_layers: list[int] | None = None
    clip_layer: int = -2
    image_token_id: int = 128256
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # A configuration without any argument is made by transformers itself, to find out what differs from defaults.
        towers = len(self.vision_configs)
        self.query_grids = [self.image_grid] if self.query_grids is None else list(self.query_grids)
        self.tower_grids = [self.image_grid] * towers if self.tower_grids is None else list(self.tower_grids)
        self.sampler_layers = [] if self.sampler_layers is None else list(self.sampler_layers)
        self._check()

    @property
    def vision_configs(self) -> list[Any]:
        """Configurations of the towers, in order."""
        given = [getattr(self, f"vision_config_{tower}") for tower in range(MAX_TOWERS)]
        return [config for config in given if config is not None]

    def _check(self) -> None:
        towers = self.vision_configs
        if any(getattr(self, f"vision_config_{tower}") is None for tower in range(len(towers))):
            raise ValueError("vision_config_0 to vision_config_3 are filled in order, without a gap")
        if self.text_config.model_type not in DECODERS:
            raise ValueError(f"the decoder is one of {', '.join(DECODERS)}, not {self.text_config.model_type!r}")
        for config in towers:
            if config.model_type not in TOWERS:
                raise ValueError(f"a vision tower is one of {', '.join(TOWERS)}, not {config.model_type!r}")
        if len(self.tower_grids or []) != len(towers):
            raise ValueError(f"tower_grids has {len(self.tower_grids or [])} entries for {len(towers)} vision towers")
        for grid in self.tower_grids or []:
            for cells in (self.image_grid, *(self.query_grids or [])):
                if grid % cells:
                    raise ValueError(
                        f"a tower grid of side {grid} cannot be cut into {cells} x {cells} windows: tower_grids are "
                        f"multiples of image_grid and of all query_grids"
                    )
        if self.vision_hidden_size % self.vision_heads:
            raise ValueError(
                f"vision_hidden_size={self.vision_hidden_size} is no multiple of {self.vision_heads} heads"
            )
        layers = self.text_config.num_hidden_layers
        outside = [layer for layer in self.sampler_layers or [] if not 0 <= layer < layers]
        if outside or len(set(self.sampler_layers or [])) != len(self.sampler_layers or []):
            raise ValueError(f"sampler_layers are different layers of a decoder of {layers}; got {self.sampler_layers}")


AutoConfig.register("cambrian", CambrianConfig, exist_ok=True)
