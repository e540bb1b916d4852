"""Sizes of a Mini-Gemini model. The defaults are MGM-7B's; ``MiniGeminiConfig.hd()`` is MGM-7B-HD."""

from __future__ import annotations

from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

__all__ = ["Aux", "MiniGeminiConfig"]

Aux = Literal["full", "none"]
"""``"full"``: both encoders, as the model was trained. ``"none"``: the low-resolution encoder alone, on one view of its
own size; no mining, no crops."""

_CLIP_LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 336,
    "projection_dim": 768,
}
_CONVNEXT_LARGE = {"hidden_sizes": [192, 384, 768, 1536], "depths": [3, 3, 27, 3]}


class MiniGeminiConfig(PreTrainedConfig):
    """Configuration of ``MiniGeminiForConditionalGeneration``.

    Args:
        text_config: the language model's (Llama; Vicuna 7B and 13B).
        vision_config: the low-resolution encoder's (CLIP).
        vision_aux_config: the high-resolution encoder's (ConvNeXt, four stages).
        image_size_aux: side of the one tensor that the model takes, in pixels: 768, HD 1536.
        image_grid: the low-resolution encoder sees the picture as ``image_grid × image_grid`` crops: 1, HD 2.
        image_global: with crops, whether it also sees the whole picture in one view: HD True.
        vision_feature_layer: hidden state of the low-resolution encoder that is read; its class token is dropped.
        aux: see ``Aux``; ``forward`` and ``generate`` take it too. Left at ``"full"``, pictures of ``image_size_aux``
            are read by both encoders, and pictures of the low-resolution encoder's size by that alone.
        image_token_id: placeholder of image features in ``input_ids``. It may lie outside the vocabulary.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    model_type = "mini_gemini"
    sub_configs_defaults = {  # noqa: RUF012 (the base class's own way)
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "vision_config": SubConfigSpec(AutoConfig, model_type="clip_vision_model", init_kwargs=_CLIP_LARGE_336),
        "vision_aux_config": SubConfigSpec(AutoConfig, model_type="convnext", init_kwargs=_CONVNEXT_LARGE),
    }

    text_config: Any = None
    vision_config: Any = None
    vision_aux_config: Any = None
    image_size_aux: int = 768
    image_grid: int = 1
    image_global: bool = False
    vision_feature_layer: int = -2
    projector_hidden_act: str = "gelu"
    aux: Aux = "full"
    image_token_id: int = 32000
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.aux not in ("full", "none"):
            raise ValueError(f"aux is 'full' or 'none'; got {self.aux!r}")
        if self.image_grid < 1 or (self.image_global and self.image_grid == 1):
            raise ValueError(
                f"image_grid={self.image_grid} with image_global={self.image_global}: the grid is at least 1, and the "
                f"whole picture as a view of its own belongs to a grid of crops (image_grid=2)"
            )
        patch = self.vision_aux_config.patch_size
        cells, rest = divmod(self.image_size_aux, patch if isinstance(patch, int) else patch[0])
        if rest or cells % (self.image_grid * self.grid_side):
            raise ValueError(
                f"image_size_aux={self.image_size_aux} gives the high-resolution encoder {cells} × {cells} cells, "
                f"which {self.image_grid} × {self.image_grid} views of {self.grid_side} × {self.grid_side} tokens do "
                f"not divide; take a multiple"
            )

    @classmethod
    def hd(cls, **kwargs: Any) -> MiniGeminiConfig:
        """The high-definition variant: 1536 pixels, four crops and the whole picture."""
        return cls(**{"image_size_aux": 1536, "image_grid": 2, "image_global": True, **kwargs})

    @property
    def grid_side(self) -> int:
        """Image tokens along one side of one view."""
        return int(self.vision_config.image_size // self.vision_config.patch_size)

    def image_tokens(self, aux: Aux | None = None) -> int:
        """Image tokens that one picture becomes: 576, HD 2880; 576 with ``aux="none"``."""
        views = 1 if (aux or self.aux) == "none" else self.image_grid**2 + self.image_global
        return views * self.grid_side**2
