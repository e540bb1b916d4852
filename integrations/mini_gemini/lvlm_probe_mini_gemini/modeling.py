"""Mini-Gemini on transformers' own CLIP, ConvNeXt and Llama.

The model takes ONE tensor a picture, the high-resolution one; what the low-resolution encoder sees is computed from it
inside ``forward``, so that a mask, or a gradient, on it goes through both encoders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, LogitsProcessorList, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from lvlm_probe_mini_gemini.configuration import Aux, MiniGeminiConfig
from lvlm_probe_mini_gemini.mining import ConvNextPyramid, PatchInfoMining, crops, low_resolution_views, resize

__all__ = ["MiniGeminiForConditionalGeneration", "MiniGeminiModel", "MiniGeminiPreTrainedModel"]


@dataclass
class MiniGeminiOutput(CausalLMOutputWithPast):
    """What ``forward`` returns; ``image_hidden_states`` is ``(picture, image_token, hidden)``."""

    image_hidden_states: torch.Tensor | None = None


@dataclass
class MiniGeminiModelOutput(BaseModelOutputWithPast):
    """The same without the language model's head."""

    image_hidden_states: torch.Tensor | None = None


class MiniGeminiProjector(nn.Module):
    """Linear, GELU, Linear: from the encoder's channels to the language model's."""

    def __init__(self, config: MiniGeminiConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.linear_2(self.act(self.linear_1(features)))
        return projected


class MiniGeminiPreTrainedModel(PreTrainedModel):
    config: MiniGeminiConfig
    config_class = MiniGeminiConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _no_split_modules = ["CLIPEncoderLayer", "ConvNextStage", "LlamaDecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class MiniGeminiModel(MiniGeminiPreTrainedModel):
    """Both encoders, patch info mining, the projector and the language model, without its head."""

    def __init__(self, config: MiniGeminiConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.vision_tower_aux = ConvNextPyramid(config.vision_aux_config)
        self.patch_mining = PatchInfoMining(config.vision_config.hidden_size, self.vision_tower_aux.channels)
        self.multi_modal_projector = MiniGeminiProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        pixel_values_low: torch.Tensor | None = None,
        aux: Aux | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Pictures to features of the language model.

        Args:
            pixel_values: ``(picture, 3, S, S)``. S says which encoders read them: both at ``config.image_size_aux``,
                the low-resolution one alone at its own size (``Aux``).
            pixel_values_low: what the low-resolution encoder sees beside the other, ``(picture, 3, s, s)`` or
                ``(picture, view, 3, s, s)`` with the whole picture as the last view; by default computed from
                ``pixel_values``.
            aux: say so, and have the size checked.

        Returns:
            ``pooler_output``: one ``(image_token, hidden)`` a picture. With crops, the whole picture's tokens come
            first, then those of each crop, row by row.

        Raises:
            ValueError: pictures of another size, or views of another number.
        """
        mode = self._mode(aux, pixel_values)
        config = self.config
        side = int(config.vision_config.image_size)
        expected = 1 if mode == "none" else config.image_grid**2 + config.image_global
        if mode == "none":
            views = pixel_values[:, None]
        elif pixel_values_low is None:
            views = low_resolution_views(pixel_values, side, config.image_grid, config.image_global)
        else:
            views = pixel_values_low if pixel_values_low.ndim == 5 else pixel_values_low[:, None]
        if views.shape[1] != expected or (mode == "none" and pixel_values_low is not None):
            given = None if pixel_values_low is None else tuple(pixel_values_low.shape)
            wanted = "none at all" if mode == "none" else f"(picture, {expected}, 3, {side}, {side})"
            raise ValueError(f"pixel_values_low has shape {given}; with aux={mode!r} this model takes {wanted}")
        tokens = self._low_resolution(views)
        if mode == "full":
            tokens = self._mine(tokens, self.vision_tower_aux(pixel_values))
        if mode == "full" and config.image_global:
            tokens = torch.cat([tokens[:, -1:], tokens[:, :-1]], dim=1)
        features = self.multi_modal_projector(tokens.flatten(1, 2))
        output = BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=list(features))
        return output.to_tuple() if return_dict is False else output

    def _mode(self, aux: Aux | None, pixel_values: torch.Tensor) -> Aux:
        """Which encoders read pictures of this size. The size has the say, so that a recorded tensor is never read
        another way than it was; ``aux`` and the configuration have it only where both sizes are one."""
        low, high = self.config.vision_config.image_size, self.config.image_size_aux
        mode = aux if aux is not None else self.config.aux
        if mode not in ("full", "none"):
            raise ValueError(f"aux is 'full' or 'none'; got {mode!r}")
        size = tuple(pixel_values.shape[-2:])
        if aux is None and low != high and size == (low, low):
            mode = "none"
        side = high if mode == "full" else low
        if size != (side, side):
            raise ValueError(
                f"pixel_values is {tuple(pixel_values.shape)}, but with aux={mode!r} this model takes pictures of "
                f"{side} × {side}; prepare them with the model's own processor and the same aux "
                f"(processor.image_processor.aux = {mode!r})"
            )
        return mode

    def _low_resolution(self, views: torch.Tensor) -> torch.Tensor:
        """``(picture, view, 3, s, s)`` → ``(picture, view, N, channel)``; the class token is left out."""
        states = self.vision_tower(views.flatten(0, 1), output_hidden_states=True).hidden_states
        found: torch.Tensor = states[self.config.vision_feature_layer][:, 1:]
        return found.unflatten(0, views.shape[:2])

    def _mine(self, tokens: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        """Each view's tokens against its own part of the map. One view at a time: keys and values of all at once are
        the largest tensors of the model."""
        grid = self.config.image_grid
        parts = list(crops(picture, grid).unbind(1))
        if self.config.image_global:
            parts.append(resize(picture, picture.shape[-1] // grid))
        return torch.stack([self.patch_mining(tokens[:, view], part) for view, part in enumerate(parts)], dim=1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values_low: torch.Tensor | None = None,
        aux: Aux | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> MiniGeminiModelOutput:
        """Like Llama's ``forward``, with pictures; see ``get_image_features`` for what is said of them.

        Args:
            mm_encoder_outputs: ``{"image": get_image_features(...)}``, in place of the pixels.

        Raises:
            ValueError: placeholders without pictures, pictures without placeholders, or unequal counts of the two.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        encoded = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            if encoded is not None:
                raise ValueError("give pixel_values or mm_encoder_outputs, one of the two")
            encoded = self.get_image_features(pixel_values, pixel_values_low=pixel_values_low, aux=aux)
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self._embed(input_ids)
        features = None
        if encoded is not None:
            features = torch.stack(list(encoded.pooler_output)).to(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(self._placeholders(input_ids, features), features)
        elif input_ids is not None and bool((input_ids == self.config.image_token_id).any()):
            raise ValueError("the prompt has image placeholders, but there are no pixel_values")
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return MiniGeminiModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features,
        )

    def _embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The placeholder's id may lie outside the vocabulary: any row of the table will do, it is overwritten."""
        embedded: torch.Tensor = self.get_input_embeddings()(
            input_ids.masked_fill(input_ids == self.config.image_token_id, 0)
        )
        return embedded

    def _placeholders(self, input_ids: torch.Tensor | None, features: torch.Tensor) -> torch.Tensor:
        """Where features go, ``(batch, token, 1)``."""
        if input_ids is None:
            raise ValueError("pictures are placed by their placeholders in input_ids; give those, not inputs_embeds")
        found = input_ids == self.config.image_token_id
        count, wanted = int(found.sum()), features.shape[0] * features.shape[1]
        if count != wanted:
            raise ValueError(
                f"the prompt has {count} image placeholders, but {features.shape[0]} picture(s) give {wanted} features "
                f"({features.shape[1]} each); prepare prompt and pictures in one call of the model's own processor"
            )
        return found.unsqueeze(-1).to(features.device)  # parts of the model may lie on several cards


class _WithinVocabulary(LogitsProcessorList):
    """Logits processors look tokens of the prompt up in the scores, where a placeholder outside the vocabulary has no
    column: to them it is token 0."""

    def __init__(self, processors: LogitsProcessorList, size: int) -> None:
        super().__init__(processors)
        self._size = size

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        inside: Any = input_ids.masked_fill(input_ids >= self._size, 0)
        processed: torch.Tensor = super().__call__(inside, scores, **kwargs)
        return processed


class MiniGeminiForConditionalGeneration(MiniGeminiPreTrainedModel, GenerationMixin):
    """Mini-Gemini with the language model's head.

    ::

        inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True,
                                               return_tensors="pt")
        model.generate(**inputs, max_new_tokens=64)
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MiniGeminiConfig) -> None:
        super().__init__(config)
        self.model = MiniGeminiModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        pixel_values_low: torch.Tensor | None = None,
        aux: Aux | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """See ``MiniGeminiModel.get_image_features``."""
        return self.model.get_image_features(pixel_values, pixel_values_low=pixel_values_low, aux=aux, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values_low: torch.Tensor | None = None,
        aux: Aux | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> MiniGeminiOutput:
        """Logits ``(batch, token, vocabulary)``, of the last ``logits_to_keep`` tokens where that is not 0.

        Args and errors: as ``MiniGeminiModel.forward``; ``labels``: next-token targets, −100 is left out.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values_low=pixel_values_low,
            aux=aux,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return MiniGeminiOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        size = self.config.text_config.vocab_size
        return _WithinVocabulary(processors, size) if self.config.image_token_id >= size else processors
