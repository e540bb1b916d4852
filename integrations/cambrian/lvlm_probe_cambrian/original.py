"""The authors' own Cambrian package, unmodified: how its models are recorded and replayed.

``probe.attach(model, processor)`` takes an instance of the package's class as it is; nothing of the package is
imported. It is known by what it has, ``get_vision_tower_aux_list`` and ``prepare_inputs_labels_for_multimodal``. What
is particular about these models, and is dealt with here, for the length of one pass each time:

* The towers stand in a plain list, outside the module tree, and switch autograd off unless they are being trained.
* ``forward(input_ids, images=...)`` computes the features of the pictures and then uses those that ``generate`` stored
  last. Here the features are made first, stored, used, and what was stored before is put back.
* Decoder layers update the image tokens at ``config.image_position``, whatever the prompt. A prompt that has its
  picture elsewhere gets numbers that mean nothing, so it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from lvlm_probe.errors import AttachError, ReplayError
from lvlm_probe.models.drivers import Driver, attributes, collapsed, expanded, open_gates
from lvlm_probe.models.families import Family
from lvlm_probe.models.tokenizers import positional, settings_of
from lvlm_probe.recording.prompt_images import NotRecorded
from lvlm_probe_cambrian.padding import content_box, image_token_count

if TYPE_CHECKING:
    from lvlm_probe.models.families import Places

__all__ = ["IMAGE_MARK", "CambrianDriver", "OriginalImageProcessor", "OriginalProcessor", "matches"]

IMAGE_MARK = -200
"""What the package's tokenization puts into the prompt for a picture."""

_STATE = (
    "vision_tower_aux_feature_list",
    "vision_tower_aux_attention_masks_list",
    "final_vision_feature_size",
    "global_context_feature",
)
"""What ``generate`` leaves on the model for its own forward passes, in the order of what makes it."""

_GATE = "unfreeze_mm_vision_tower"


def matches(model: Any) -> bool:
    """Whether a model is one of the package's, by what it has."""
    return all(
        callable(getattr(model, name, None))
        for name in ("get_vision_tower_aux_list", "prepare_inputs_labels_for_multimodal", "generate")
    )


class CambrianDriver(Driver):
    """Drives a ``CambrianLlamaForCausalLM`` or one of its sisters; see the module.

    Pixel inputs are ``pixel_values_0`` … in the order of the towers, ``(batch, 3, S_t, S_t)``, and ``image_sizes``
    ``(batch, 2)``, width and height of the original pictures. The placeholder of image tokens is the first id behind
    the vocabulary.

    Raises:
        AttachError: the towers are not loaded.
    """

    def __init__(self, original: torch.nn.Module, processor: object | None = None) -> None:
        super().__init__(original, processor)
        listed = list(self.original.get_vision_tower_aux_list() or ())
        if not listed or any(getattr(tower, "is_loaded", True) is False for tower in listed):
            raise AttachError(
                f"the vision towers of this {type(original).__name__} are not loaded; load them first: "
                f"for tower in model.get_vision_tower_aux_list(): tower.load_model()"
            )
        self.adopt(listed)
        self.towers = tuple(listed)
        self.placeholder = int(self.config.vocab_size)
        self.side = math.isqrt(int(self.config.image_token_len))
        body = self.original.get_model()
        projector = getattr(body, "mm_projector", None)
        self.family = Family(
            encoders=tuple(self.path_of(tower) for tower in listed),
            mergers=(self.path_of(projector),) if projector is not None else (),
            decoder=self.path_of(body),
            image_token=self.placeholder,
            pixel_names=frozenset({*self.pixel_keys, "image_sizes"}),
            token_boxes=token_boxes,
        )

    @property
    def pixel_keys(self) -> tuple[str, ...]:
        """Names of the pixel inputs, one a tower."""
        return tuple(f"pixel_values_{tower}" for tower in range(len(self.towers)))

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        given = {**positional(self.original, args), **kwargs}
        ids, images, sizes = (given.pop(name, None) for name in ("inputs", "images", "image_sizes"))
        mask = given.pop("attention_mask", None)
        name = type(self.original).__name__
        if not isinstance(ids, torch.Tensor) or images is None:
            raise NotRecorded(
                f"the prompt holds no image: {name}.generate(inputs, images=[...], image_sizes=[...]) records; "
                f"nothing is recorded"
            )
        if len(ids) != 1:
            raise NotRecorded(f"{name} is recorded one prompt at a time, not in a batch of {len(ids)}")
        setting = settings_of(self, given)
        if max(int(setting("num_beams", 1)), int(setting("num_return_sequences", 1))) > 1 and not self._connector_only:
            raise NotRecorded(
                f"{name} updates the image tokens of the first of several beams or sequences only, so that what the "
                f"others say rests on another picture than the first; generate one at a time. Nothing is recorded"
            )
        if len(images) != len(self.towers) or sizes is None or len(sizes) != 1:
            raise NotRecorded(
                f"{name} takes one tensor for each of its {len(self.towers)} towers and the (width, height) of the "
                f"original picture; got {len(images)} tensors and image_sizes={sizes!r}. Nothing is recorded"
            )
        row = ids[0] if mask is None else ids[0][mask[0].to(ids.device).bool()]
        if (reason := self._misplaced(row)) is not None:
            raise NotRecorded(f"{reason}; nothing is recorded")
        size = (int(sizes[0][0]), int(sizes[0][1]))
        try:
            long = expanded(row, IMAGE_MARK, self.placeholder, image_token_count(self.side, size))
        except ValueError as error:
            raise NotRecorded(f"{error}; nothing is recorded") from error
        limit = getattr(self.config, "tokenizer_model_max_length", None)
        if limit is not None and len(long) > limit:
            raise NotRecorded(
                f"{name} cuts this prompt of {len(long)} tokens off at config.tokenizer_model_max_length = {limit}; "
                f"nothing is recorded"
            )
        return {
            **given,
            "input_ids": long[None],
            "attention_mask": torch.ones_like(long)[None],
            **dict(zip(self.pixel_keys, images, strict=True)),
            "image_sizes": torch.tensor([size]),
        }

    def with_pixels(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], pixels: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = {**positional(self.original, args), **kwargs}
        return (), {**given, "images": [pixels[name] for name in self.pixel_keys]}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """One pass over prompt and answer; see ``Driver.forward``.

        Raises:
            ReplayError: the picture is not where the model looks for it, or a pixel input is missing.
        """
        missing = [name for name in self.pixel_keys if name not in inputs]
        if missing or image_sizes is None:
            raise ReplayError(f"{', '.join(missing) or 'image_sizes'} is missing: a tower would have nothing to see")
        short = collapsed(input_ids, self.placeholder, IMAGE_MARK)
        if (reason := self._misplaced(short[0])) is not None:
            raise ReplayError(reason)
        images = [inputs[name] for name in self.pixel_keys]
        sizes = [(int(width), int(height)) for width, height in image_sizes.tolist()]
        # Prompt and answer go through one call here; in generate() the prompt alone did, and was not cut.
        with open_gates(self.towers, _GATE), attributes(self.config, {"tokenizer_model_max_length": None}):
            made = self.original.prepare_inputs_labels_for_multimodal(
                short, None, None, None, None, images, image_sizes=sizes
            )
            position_ids, mask, embeddings = made[1], made[2], made[4]
            if embeddings.shape[1] != input_ids.shape[1]:
                raise ReplayError(
                    f"{type(self.original).__name__} made a sequence of {embeddings.shape[1]} of this prompt where "
                    f"{input_ids.shape[1]} were recorded: another picture size, or another version of the package"
                )
            with attributes(self.original, dict(zip(_STATE, made[6:10], strict=True))):
                return self.original(
                    inputs_embeds=embeddings,
                    attention_mask=mask,
                    position_ids=position_ids,
                    use_cache=False,
                    return_dict=True,
                )

    @property
    def _connector_only(self) -> bool:
        """Whether decoder layers leave the image tokens as they are."""
        return bool(getattr(self.config, "connector_only", False))

    def _misplaced(self, ids: torch.Tensor) -> str | None:
        """Why the picture of this prompt is not where decoder layers look for it; ``None`` if it is."""
        fixed = getattr(self.config, "image_position", None)
        if fixed is None or self._connector_only:
            return None
        found = (ids == IMAGE_MARK).nonzero()[:, 0].tolist()
        if len(found) != 1 or found[0] == int(fixed):
            return None
        return (
            f"the picture stands at position {found[0]} of the prompt, but {type(self.original).__name__} updates its "
            f"image tokens at config.image_position = {int(fixed)} whatever the prompt, so its answers to this one "
            f"mean nothing. Use the conversation template it was trained with, or the converted model of this package, "
            f"which goes by the prompt"
        )


def token_boxes(replay: Any, positions: np.ndarray) -> Places | None:
    """Cells of the grid over the padded square that the picture fills, row by row, each with a newline behind it."""
    from lvlm_probe.models.families import Places

    side = replay.model.side
    (width, height), *others = replay.image_sizes
    if others or len(positions) != image_token_count(side, (width, height)):
        return None
    box, square = content_box(side, (width, height)), max(width, height)
    left, top = (square - width) // 2, (square - height) // 2
    boxes = np.zeros((box.rows, box.cols + 1, 4), np.float32)
    images = np.full((box.rows, box.cols + 1), -1, np.int64)
    cols, rows = np.meshgrid(np.arange(box.left, box.right), np.arange(box.top, box.bottom))
    edges = np.stack([cols, rows, cols + 1, rows + 1], axis=-1) * (square / side) - [left, top, left, top]
    boxes[:, :-1] = edges.clip(0, [width, height, width, height])
    images[:, :-1] = 0
    return Places(boxes.reshape(-1, 4), images.reshape(-1))


# ------------------------------------------------------------------------------------------------------ preprocessing


class OriginalImageProcessor:
    """The package's preprocessing of one picture for all towers, on any device.

    Per tower: pad to a square with the tower's mean colour, resize (PIL, bicubic) to its side, and the tower's own
    image processor on that.

    Args:
        processors: the towers' image processors, ``[tower.image_processor for tower in towers]``: each has
            ``image_mean``, ``crop_size`` and ``preprocess``.
    """

    def __init__(self, processors: Sequence[Any]) -> None:
        self.processors = list(processors)
        self.model_input_names = [*(f"pixel_values_{tower}" for tower in range(len(self.processors))), "image_sizes"]

    def __call__(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        return self.preprocess(images, return_tensors=return_tensors, **kwargs)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        """``pixel_values_t`` ``(image, 3, S_t, S_t)`` for each tower t, and ``image_sizes`` ``(image, 2)``, (W, H)."""
        pictures = [image.convert("RGB") for image in (images if isinstance(images, list | tuple) else [images])]
        made = {
            f"pixel_values_{tower}": torch.stack([self._one(processor, picture) for picture in pictures])
            for tower, processor in enumerate(self.processors)
        }
        return {**made, "image_sizes": torch.tensor([picture.size for picture in pictures])}

    def to_dict(self) -> dict[str, Any]:
        """What a trace keeps of it."""
        return {
            "towers": [
                {"class": type(each).__name__, "side": _side(each), "image_mean": [float(v) for v in each.image_mean]}
                for each in self.processors
            ]
        }

    @staticmethod
    def _one(processor: Any, picture: Image.Image) -> torch.Tensor:
        square = max(picture.size)
        colour = tuple(int(mean * 255) for mean in processor.image_mean)
        padded = Image.new("RGB", (square, square), colour)
        padded.paste(picture, ((square - picture.width) // 2, (square - picture.height) // 2))
        side = _side(processor)
        made = processor.preprocess(padded.resize((side, side)), return_tensors="pt")["pixel_values"][0]
        return torch.as_tensor(made)


def _side(processor: Any) -> int:
    size = getattr(processor, "crop_size", None) or processor.size
    return int(size if isinstance(size, int) else size["height"])


class OriginalProcessor:
    """Text and picture to the arguments of the package's ``generate``, and what a probe needs to mask the picture.

    ::

        processor = OriginalProcessor(tokenizer, [t.image_processor for t in model.get_vision_tower_aux_list()])
        with probe.attach(model, processor) as p, p.record("runs/mine") as recording:
            model.generate(**processor(prompt, image, device=model.device, dtype=model.dtype), max_new_tokens=64)

    Args:
        tokenizer: the package's.
        image_processors: the towers', see ``OriginalImageProcessor``.
        config: the model's; not needed.
    """

    def __init__(self, tokenizer: Any, image_processors: Sequence[Any], config: Any = None) -> None:
        self.tokenizer = tokenizer
        self.image_processor = OriginalImageProcessor(image_processors)
        self.config = config

    def __call__(
        self,
        text: str,
        images: Image.Image,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Any]:
        """``inputs`` ``(1, P)``, ``images`` (one tensor a tower) and ``image_sizes`` for ``generate``.

        Args:
            text: the whole prompt in the package's conversation template, with one ``<image>``.
            images: the picture.

        Raises:
            ValueError: the prompt does not hold exactly one ``<image>``.
        """
        made = self.image_processor(images)
        sizes = [tuple(size) for size in made.pop("image_sizes").tolist()]
        return {
            "inputs": tokenize(self.tokenizer, text).to(device),
            "images": [value.to(device, dtype) for value in made.values()],
            "image_sizes": sizes,
        }


def tokenize(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids ``(1, P)`` of a prompt with one ``<image>``, ``IMAGE_MARK`` in its place. A beginning-of-sequence token
    stands in front of the whole, not of the second part.

    Raises:
        ValueError: the prompt does not hold exactly one ``<image>``.
    """
    parts = text.split("<image>")
    if len(parts) != 2:
        raise ValueError(f"the prompt holds {len(parts) - 1} times '<image>'; write it once, where the picture stands")
    before, after = (list(tokenizer(part)["input_ids"]) for part in parts)
    if after and before and after[0] == before[0] == tokenizer.bos_token_id:
        after = after[1:]
    return torch.tensor([[*before, IMAGE_MARK, *after]])
