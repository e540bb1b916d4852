"""Cambrian-1 (Tong et al., 2024) as a transformers model: several vision towers, aggregated, in front of and inside a
decoder.

Differences to the published package, none of which changes its numbers where that one is driven as intended: towers are
sub-modules and gradients reach them; image tokens are where the prompt has their placeholders, not at a fixed index;
``forward`` runs the aggregator inside the decoder, on every pass that holds pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from lvlm_probe_cambrian.configuration import MAX_TOWERS, CambrianConfig
from lvlm_probe_cambrian.decoders import make_decoder
from lvlm_probe_cambrian.padding import content_box, image_token_count
from lvlm_probe_cambrian.sampler import Readings, SamplerLayer, SamplerState, VisionSampler, readings
from lvlm_probe_cambrian.towers import feature_size, image_size, make_tower, resample, tower_features

__all__ = ["CambrianForConditionalGeneration", "CambrianModel", "CambrianPreTrainedModel", "ImageFeatures"]

PIXELS = tuple(f"pixel_values_{tower}" for tower in range(MAX_TOWERS))


@dataclass(frozen=True)
class ImageFeatures:
    """What the vision side made of the pictures of a batch.

    Attributes:
        tokens: per picture ``(rows * (cols + 1), channel)``, its image tokens with a newline at the end of each row.
        read: what the queries of the whole grid may read, for the aggregator inside the decoder.
        sizes: ``(width, height)`` of each picture.
    """

    tokens: list[Tensor]
    read: Readings
    sizes: list[tuple[int, int]]


class CambrianPreTrainedModel(PreTrainedModel):
    """What Cambrian models share: initial weights, and what transformers may do with them."""

    config_class = CambrianConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["CambrianLlamaLayer", "CambrianPhi3Layer", "SamplerLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SamplerLayer):
            for tower in module.positions:
                nn.init.normal_(getattr(module, f"pos_embed_{tower}"), std=self.config.initializer_range)
        elif isinstance(module, CambrianModel):
            nn.init.normal_(module.vision_query, std=self.config.vision_hidden_size**-0.5)
            nn.init.normal_(module.image_newline, std=self.config.text_config.hidden_size**-0.5)


class CambrianModel(CambrianPreTrainedModel):
    """Towers, aggregator and decoder, without the language head."""

    def __init__(self, config: CambrianConfig) -> None:
        super().__init__(config)
        if not config.vision_configs:
            raise ValueError("a Cambrian model has at least one vision tower; give vision_config_0")
        channels, outer = config.vision_hidden_size, config.text_config.hidden_size
        grids = config.tower_grids or []
        self.vision_towers = nn.ModuleList([make_tower(part) for part in config.vision_configs])
        self.tower_projectors = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Linear(feature_size(part), channels),
                    nn.GELU(),
                    nn.Linear(channels, channels),
                    nn.LayerNorm(channels),
                )
                for part in config.vision_configs
            ]
        )
        queries = config.query_grids or []
        self.vision_query = nn.Parameter(torch.zeros(len(queries), channels))
        self.connectors = nn.ModuleList(
            [
                VisionSampler(config.connector_depth, channels, [grid // cells for grid in grids], config)
                for cells in queries
            ]
        )
        self.mm_projector = nn.Sequential(nn.Linear(channels * len(queries), outer), nn.GELU(), nn.Linear(outer, outer))
        self.image_newline = nn.Parameter(torch.zeros(outer))
        self.language_model = make_decoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.language_model.get_input_embeddings()  # type: ignore[operator]
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)  # type: ignore[operator]

    def get_decoder(self) -> nn.Module:
        return self.language_model

    def get_image_features(
        self,
        pixel_values_0: Tensor,
        pixel_values_1: Tensor | None = None,
        pixel_values_2: Tensor | None = None,
        pixel_values_3: Tensor | None = None,
        image_sizes: Tensor | None = None,
    ) -> ImageFeatures:
        """Image tokens of some pictures, and what the decoder may read of them.

        Args:
            pixel_values_0, …, pixel_values_3: per tower ``(image, 3, S_t, S_t)``.
            image_sizes: ``(image, 2)``, width and height of the pictures before they were padded to squares.

        Raises:
            ValueError: an input of a tower is missing, or of another size than the tower's.
        """
        pixels = self._checked([pixel_values_0, pixel_values_1, pixel_values_2, pixel_values_3], image_sizes)
        sizes = [(int(width), int(height)) for width, height in torch.as_tensor(image_sizes).tolist()]
        grids = self.config.tower_grids or []
        features = [
            projector(tower_features(tower, part, grid=grid, clip_layer=self.config.clip_layer).to(self._wide))
            for tower, projector, part, grid in zip(
                self.vision_towers, self.tower_projectors, pixels, grids, strict=True
            )
        ]
        context = features[0].mean(dim=1)
        groups = []
        cells = self.config.image_grid
        for query, connector, asked in zip(
            self.vision_query, self.connectors, self.config.query_grids or [], strict=True
        ):
            read = readings(features, context, sizes, asked)
            found = connector(query.expand(len(read.context), -1), read).unflatten(0, (len(sizes), asked, asked))
            groups.append(resample(found.permute(0, 3, 1, 2), cells).permute(0, 2, 3, 1))
        squares = self.mm_projector(torch.cat(groups, dim=-1))
        tokens = []
        for square, size in zip(squares, sizes, strict=True):
            box = content_box(cells, size)
            kept = square[box.top : box.bottom, box.left : box.right]
            newline = self.image_newline.to(kept).expand(box.rows, 1, -1)
            tokens.append(torch.cat([kept, newline], dim=1).flatten(0, 1))
        return ImageFeatures(tokens, readings(features, context, sizes, cells), sizes)

    @property
    def _wide(self) -> torch.dtype:
        return self.vision_query.dtype

    def _checked(self, given: Sequence[Tensor | None], image_sizes: Tensor | None) -> list[Tensor]:
        towers = len(self.vision_towers)
        missing = [name for name, value in zip(PIXELS[:towers], given, strict=False) if value is None]
        if missing or image_sizes is None:
            missing += ["image_sizes"] if image_sizes is None else []
            raise ValueError(
                f"{', '.join(missing)} missing: pictures are given to {towers} vision towers and with their sizes; the "
                f"processor makes all of them"
            )
        pixels = [value for value in given[:towers] if value is not None]
        for name, value, config in zip(PIXELS, pixels, self.config.vision_configs, strict=False):
            side = image_size(config)
            if tuple(value.shape) != (len(image_sizes), 3, side, side):
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; its tower reads ({len(image_sizes)}, 3, {side}, {side}), "
                    f"one entry per row of image_sizes"
                )
        return pixels

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values_0: Tensor | None = None,
        pixel_values_1: Tensor | None = None,
        pixel_values_2: Tensor | None = None,
        pixel_values_3: Tensor | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """See ``get_image_features`` for pictures; a pass without them is one of the decoder alone.

        Raises:
            ValueError: the prompt has another number of placeholders than the pictures have tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            assert input_ids is not None
            known = input_ids
            if self.config.image_token_id >= self.config.text_config.vocab_size:
                known = input_ids.masked_fill(input_ids == self.config.image_token_id, 0)
            inputs_embeds = self.get_input_embeddings()(known)
        vision = None
        if pixel_values_0 is not None:
            if input_ids is None:
                raise ValueError("pictures are placed by the placeholders in input_ids; inputs_embeds have none")
            features = self.get_image_features(
                pixel_values_0, pixel_values_1, pixel_values_2, pixel_values_3, image_sizes
            )
            inputs_embeds, vision = self._placed(input_ids, inputs_embeds, features)
        result: BaseModelOutputWithPast = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            vision=vision,
            **kwargs,
        )
        return result

    def _placed(self, input_ids: Tensor, embeds: Tensor, features: ImageFeatures) -> tuple[Tensor, SamplerState]:
        """Embeddings with image tokens in place of their placeholders, and the state for the decoder's layers."""
        places = (input_ids == self.config.image_token_id).flatten().nonzero()[:, 0]
        expected = [len(part) for part in features.tokens]
        if len(places) != sum(expected):
            raise ValueError(
                f"the prompt has {len(places)} image tokens (id {self.config.image_token_id}), and pictures of sizes "
                f"{features.sizes} have {' + '.join(map(str, expected))}; let the processor expand the placeholders"
            )
        flat = embeds.flatten(0, 1)
        tokens = torch.cat(features.tokens).to(flat)
        embeds = flat.index_copy(0, places.to(flat.device), tokens).view_as(embeds)
        cells = self.config.image_grid
        positions, queries, start = [], [], 0
        for image, size in enumerate(features.sizes):
            box = content_box(cells, size)
            rows = places[start : start + box.rows * (box.cols + 1)].unflatten(0, (box.rows, box.cols + 1))
            positions.append(rows[:, :-1].flatten())
            whole = (
                torch.arange(cells * cells, device=places.device).unflatten(0, (cells, cells)) + image * cells * cells
            )
            queries.append(whole[box.top : box.bottom, box.left : box.right].flatten())
            start += rows.numel()
        read = features.read.of(torch.cat(queries).to(features.read.context.device)).to(embeds.device)
        return embeds, SamplerState(torch.cat(positions).to(embeds.device), read)


class CambrianForConditionalGeneration(CambrianPreTrainedModel, GenerationMixin):
    """Cambrian with its language head: what ``AutoModelForImageTextToText`` gives."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: CambrianConfig) -> None:
        super().__init__(config)
        self.model = CambrianModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_decoder(self) -> nn.Module:
        return self.model.get_decoder()

    def get_image_features(
        self,
        pixel_values_0: Tensor,
        pixel_values_1: Tensor | None = None,
        pixel_values_2: Tensor | None = None,
        pixel_values_3: Tensor | None = None,
        image_sizes: Tensor | None = None,
    ) -> ImageFeatures:
        """See ``CambrianModel.get_image_features``."""
        return self.model.get_image_features(
            pixel_values_0, pixel_values_1, pixel_values_2, pixel_values_3, image_sizes
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values_0: Tensor | None = None,
        pixel_values_1: Tensor | None = None,
        pixel_values_2: Tensor | None = None,
        pixel_values_3: Tensor | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """See ``CambrianModel.forward``.

        Args:
            labels: ``(batch, sequence)``, token ids to learn; −100 is left out.
            logits_to_keep: number of last positions, or indices, to compute logits for; 0: all.
        """
        as_object = kwargs.pop("return_dict", None)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values_0=pixel_values_0,
            pixel_values_1=pixel_values_1,
            pixel_values_2=pixel_values_2,
            pixel_values_3=pixel_values_3,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result.to_tuple() if as_object is False else result

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """As for every model; pictures go in with the prompt alone, and again where no cache keeps it."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in (*PIXELS, "image_sizes"):
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Rows are repeated one by one; the pictures of a row, of which there may be several, together."""
        pictures = {name: kwargs.pop(name) for name in (*PIXELS, "image_sizes") if kwargs.get(name) is not None}
        if expand_size > 1 and pictures and input_ids is not None:
            order = self._rows_of_pictures(input_ids, pictures["image_sizes"], expand_size)
            pictures = {name: value[order.to(value.device)] for name, value in pictures.items()}
        ids, more = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return ids, {**more, **pictures}

    def _rows_of_pictures(self, input_ids: Tensor, image_sizes: Tensor, times: int) -> Tensor:
        """Indices of pictures, those of each row ``times`` times in turn."""
        counts = (input_ids == self.config.image_token_id).sum(dim=1).tolist()
        sizes = [(int(width), int(height)) for width, height in image_sizes.tolist()]
        order: list[int] = []
        image = 0
        for count in counts:
            first = image
            while count > 0 and image < len(sizes):
                count -= image_token_count(self.config.image_grid, sizes[image])
                image += 1
            order += [*range(first, image)] * times
        return torch.tensor(order, dtype=torch.long)
