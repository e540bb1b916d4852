"""The authors' own Mini-Gemini package (``mgm``), unmodified: how its models are recorded and replayed.

``probe.attach(model, processor)`` takes an instance of the package's class as it is; nothing of the package is
imported. It is known by what it has: ``get_vision_tower_aux``, ``encode_images`` and
``prepare_inputs_labels_for_multimodal``. What is particular about these models, and is dealt with here, for the length
of one pass each time:

* Both encoders switch autograd off unless they are being trained; opening one of them alone would give a partial
  gradient without an error.
* ``generate`` takes two tensors: ``images_aux`` at high resolution and ``images``, which is that one scaled down (and,
  for HD, cut into crops). Here the second is computed from the first, so that one mask drives both encoders.

The published code of the paper on where these models look passes ``images`` alone: the high-resolution encoder never
runs, and the language model sees one grid of CLIP tokens. ``OriginalProcessor(..., aux="none")`` does the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from lvlm_probe.errors import AttachError, ReplayError
from lvlm_probe.models.drivers import Driver, attributes, collapsed, expanded, open_gates
from lvlm_probe.models.families import Family
from lvlm_probe.models.tokenizers import positional
from lvlm_probe.recording.prompt_images import NotRecorded
from lvlm_probe_mini_gemini.mining import low_resolution_views
from lvlm_probe_mini_gemini.places import square_boxes

if TYPE_CHECKING:
    from lvlm_probe.models.families import Places

__all__ = [
    "IMAGE_MARK",
    "MiniGeminiDriver",
    "OriginalImageProcessor",
    "OriginalProcessor",
    "matches",
    "views_of",
]

IMAGE_MARK = -200
"""What the package's tokenization puts into the prompt for a picture."""

FULL, NONE = "pixel_values", "pixel_values_low"
"""Names of the pixel input: the high-resolution tensor, or without the second encoder the low-resolution one."""

_GATE = "is_optimize"
_APART = 0.02  # of normalised values; half precision stays below, another way of scaling is far above


def matches(model: Any) -> bool:
    """Whether a model is one of the package's, by what it has."""
    return all(
        callable(getattr(model, name, None))
        for name in ("get_vision_tower_aux", "encode_images", "prepare_inputs_labels_for_multimodal", "generate")
    )


def views_of(config: Any, images_aux: torch.Tensor, side: int) -> torch.Tensor:
    """``images`` as the package's own scripts make it of ``images_aux`` ``(batch, 3, S, S)``: ``(batch, 3, side,
    side)``, with ``image_grid`` > 1 ``(batch, view, 3, side, side)``, crops first; differentiable."""
    grid, whole = int(getattr(config, "image_grid", 1)), bool(getattr(config, "image_global", False))
    views = low_resolution_views(images_aux, side, grid, whole)
    return views if grid > 1 else views[:, 0]


class MiniGeminiDriver(Driver):
    """Drives an ``MGMLlamaForCausalLM`` or one of its sisters; see the module.

    The pixel input is ``pixel_values`` ``(batch, 3, S, S)``, what the package calls ``images_aux``; or, where a call
    gave none, ``pixel_values_low`` ``(batch, 3, s, s)``. The placeholder of image tokens is the first id behind the
    vocabulary.

    Raises:
        AttachError: encoders or the modules between them are not loaded.
    """

    def __init__(self, original: torch.nn.Module, processor: object | None = None) -> None:
        super().__init__(original, processor)
        body = self.original.get_model()
        name = type(original).__name__
        towers = {"vision_tower": self.original.get_vision_tower(), "aux": self.original.get_vision_tower_aux()}
        self.alone = getattr(processor, "aux", "full") == "none"
        for which, tower in towers.items():
            needed = which == "vision_tower" or (processor is not None and not self.alone)
            if needed and (tower is None or getattr(tower, "is_loaded", True) is False):
                raise AttachError(
                    f"the vision towers of this {name} are not loaded; load them first: "
                    f"model.get_vision_tower().load_model(); model.get_vision_tower_aux().load_model()"
                )
        if processor is not None and not self.alone and (reason := self._unfinished()):
            raise AttachError(reason)
        listed = [tower for tower in towers.values() if tower is not None]
        self.adopt(listed)
        if self.alone:
            listed = listed[:1]
        self.towers = tuple(listed)
        self.placeholder = int(self.config.vocab_size)
        self.side = int(listed[0].config.image_size)
        self.per_view = int(listed[0].num_patches)
        between = [f"vlm_uni_{part}_projector" for part in ("query", "aux", "val")]
        between = [part for part in between if hasattr(body, part) and not self.alone]
        self.family = Family(
            encoders=tuple(self.path_of(tower) for tower in listed),
            mergers=tuple(self.path_of(getattr(body, part)) for part in [*between, "mm_projector"]),
            decoder=self.path_of(body),
            image_token=self.placeholder,
            pixel_names=frozenset({FULL, NONE}),
            token_boxes=token_boxes,
        )

    def _unfinished(self) -> str:
        """What is missing between the two encoders; empty if nothing is."""
        if hasattr(self.original.get_model(), "vlm_uni_query_projector"):
            return ""
        return (
            f"this {type(self.original).__name__} has no vlm_uni_query_projector: from_pretrained alone does not make "
            f"the modules between its two encoders. Call model.get_model().initialize_uni_modules(model.config, "
            f"for_eval=True) with config.model_path set to the checkpoint's directory, as the package's "
            f"load_pretrained_model does"
        )

    @property
    def grid(self) -> int:
        """Crops along one side."""
        return int(getattr(self.config, "image_grid", 1))

    @property
    def whole(self) -> bool:
        """Whether the whole picture is a view beside its crops."""
        return bool(getattr(self.config, "image_global", False))

    def image_tokens(self, *, full: bool) -> int:
        """Image tokens of a picture in the prompt."""
        return self.per_view * (self.grid**2 + self.whole if full else 1)

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        given = {**positional(self.original, args), **kwargs}
        ids, images, aux = (given.pop(name, None) for name in ("inputs", "images", "images_aux"))
        mask = given.pop("attention_mask", None)
        name = type(self.original).__name__
        if not isinstance(ids, torch.Tensor) or images is None:
            raise NotRecorded(
                f"the prompt holds no image: {name}.generate(inputs, images=..., images_aux=...) records; nothing is "
                f"recorded"
            )
        if len(ids) != 1:
            raise NotRecorded(f"{name} is recorded one prompt at a time, not in a batch of {len(ids)}")
        images, aux = (torch.stack(value) if isinstance(value, list) else value for value in (images, aux))
        if aux is None:
            pixels = images if images.ndim == 4 else images[None]
            if pixels.shape != (1, 3, self.side, self.side):
                raise NotRecorded(
                    f"without images_aux {name} is recorded on one picture of (1, 3, {self.side}, {self.side}), not on "
                    f"{tuple(images.shape)}; nothing is recorded"
                )
        elif self.alone:
            raise NotRecorded(
                'images_aux was given although the processor says aux="none"; attach with a processor of aux="full"; '
                "nothing is recorded"
            )
        else:
            pixels = aux
            made = views_of(self.config, aux.float(), self.side)
            if made.shape != images.shape or float((made - images.float()).abs().max()) > _APART:
                raise NotRecorded(
                    "images is not images_aux scaled down (bilinear, corners not aligned) and cut into crops, so one "
                    "mask cannot drive both encoders; prepare both with this package's OriginalProcessor, or as the "
                    "package's own command line does. Nothing is recorded"
                )
        row = ids[0] if mask is None else ids[0][mask[0].to(ids.device).bool()]
        try:
            long = expanded(row, IMAGE_MARK, self.placeholder, self.image_tokens(full=aux is not None))
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
            NONE if aux is None else FULL: pixels,
        }

    def with_pixels(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], pixels: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = {**positional(self.original, args), **kwargs}
        if FULL not in pixels:
            return (), {**given, "images": pixels[NONE]}
        large = pixels[FULL]
        small = views_of(self.config, large.float(), self.side).to(large.dtype)
        return (), {**given, "images": small, "images_aux": large}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_low: torch.Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """One pass over prompt and answer; see ``Driver.forward``.

        Raises:
            ReplayError: there is no picture.
        """
        short = collapsed(input_ids, self.placeholder, IMAGE_MARK)
        # Prompt and answer go through one call here; in generate() the prompt alone did, and was not cut.
        settings: dict[str, Any] = {"tokenizer_model_max_length": None}
        aux = pixel_values
        if pixel_values is not None:
            if reason := self._unfinished():
                raise ReplayError(reason)
            exact = pixel_values if pixel_values.dtype == torch.float64 else pixel_values.float()
            images = views_of(self.config, exact, self.side).to(pixel_values.dtype)
        elif pixel_values_low is not None:
            images = pixel_values_low
            settings |= {"image_grid": 1, "image_global": False}
        else:
            raise ReplayError(f"{FULL} is missing: the encoders would have nothing to see")
        with open_gates(self.towers, _GATE), attributes(self.config, settings):
            made = self.original.prepare_inputs_labels_for_multimodal(short, None, None, None, None, images, aux)
            position_ids, mask, embeddings = made[1], made[2], made[4]
            if embeddings.shape[1] != input_ids.shape[1]:
                raise ReplayError(
                    f"{type(self.original).__name__} made a sequence of {embeddings.shape[1]} of this prompt where "
                    f"{input_ids.shape[1]} were recorded: another version or configuration of the package"
                )
            return self.original(
                inputs_embeds=embeddings,
                attention_mask=mask,
                position_ids=position_ids,
                use_cache=False,
                return_dict=True,
            )


def token_boxes(replay: Any, positions: np.ndarray) -> Places | None:
    """Where image tokens lie: the whole padded square's grid, then those of its crops; what is padding has no place."""
    from lvlm_probe.models.families import Places

    model = replay.model
    (width, height), *others = replay.image_sizes
    side = round(model.per_view**0.5)
    if others:
        return None
    if len(positions) == model.image_tokens(full=True):
        shares = square_boxes(side, model.grid, model.whole)
    elif len(positions) == model.image_tokens(full=False):
        shares = square_boxes(side, 1, False)
    else:
        return None
    square = max(width, height)
    left, top = (square - width) // 2, (square - height) // 2
    boxes = (shares * square - [left, top, left, top]).clip(0, [width, height, width, height])
    inside = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return Places(np.where(inside[:, None], boxes, 0).astype(np.float32), np.where(inside, 0, -1).astype(np.int64))


# ------------------------------------------------------------------------------------------------------ preprocessing


class OriginalImageProcessor:
    """The package's preprocessing of one picture: pad to a square with the mean colour, resize (PIL, bicubic),
    normalise.

    Args:
        processor: the low-resolution tower's image processor; its ``image_mean`` and ``image_std`` are used.
        side: side of the tensor, pixels.
        name: what it is called.
    """

    def __init__(self, processor: Any, side: int, name: str = FULL) -> None:
        self.image_mean = [float(value) for value in processor.image_mean]
        self.image_std = [float(value) for value in processor.image_std]
        self.side = side
        self.model_input_names = [name]

    def __call__(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        return self.preprocess(images, return_tensors=return_tensors, **kwargs)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        """One tensor ``(image, 3, side, side)`` by name."""
        pictures = [image.convert("RGB") for image in (images if isinstance(images, list | tuple) else [images])]
        return {self.model_input_names[0]: torch.stack([self._one(picture) for picture in pictures])}

    def to_dict(self) -> dict[str, Any]:
        """What a trace keeps of it."""
        return {"side": self.side, "image_mean": self.image_mean, "image_std": self.image_std}

    def _one(self, picture: Image.Image) -> torch.Tensor:
        square = max(picture.size)
        padded = Image.new("RGB", (square, square), tuple(int(mean * 255) for mean in self.image_mean))
        padded.paste(picture, ((square - picture.width) // 2, (square - picture.height) // 2))
        sized = padded.resize((self.side, self.side), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(sized, dtype=np.float32) / 255).permute(2, 0, 1)
        mean, std = (torch.tensor(value)[:, None, None] for value in (self.image_mean, self.image_std))
        return (pixels - mean) / std


class OriginalProcessor:
    """Text and picture to the arguments of the package's ``generate``, and what a probe needs to mask the picture.

    ::

        processor = OriginalProcessor(tokenizer, model.get_vision_tower().image_processor, model.config)
        with probe.attach(model, processor) as p, p.record("runs/mine") as recording:
            model.generate(**processor(prompt, image, device=model.device, dtype=model.dtype), max_new_tokens=64)

    Args:
        tokenizer: the package's.
        image_processor: the low-resolution tower's.
        config: the model's: ``image_size_aux``, ``image_grid``, ``image_global``.
        side: side of the low-resolution tower's pictures; by default the image processor's.
        aux: ``"full"``: both encoders. ``"none"``: the low-resolution one alone, see the module.
    """

    def __init__(
        self, tokenizer: Any, image_processor: Any, config: Any, *, side: int | None = None, aux: str = "full"
    ) -> None:
        if aux not in ("full", "none"):
            raise ValueError(f'aux is "full" or "none"; got {aux!r}')
        self.tokenizer, self.config, self.aux = tokenizer, config, aux
        self.side = side or _side(image_processor)
        large = int(config.image_size_aux) if aux == "full" else self.side
        self.image_processor = OriginalImageProcessor(image_processor, large, FULL if aux == "full" else NONE)

    def __call__(
        self,
        text: str,
        images: Image.Image,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Any]:
        """``inputs`` ``(1, P)``, ``images`` and, with both encoders, ``images_aux`` for ``generate``.

        Args:
            text: the whole prompt in the package's conversation template, with one ``<image>``.
            images: the picture.

        Raises:
            ValueError: the prompt does not hold exactly one ``<image>``.
        """
        (made,) = self.image_processor(images).values()
        ids = {"inputs": tokenize(self.tokenizer, text).to(device)}
        if self.aux == "none":
            return {**ids, "images": made.to(device, dtype)}
        small = views_of(self.config, made, self.side)
        return {**ids, "images": small.to(device, dtype), "images_aux": made.to(device, dtype)}


def _side(processor: Any) -> int:
    # The package's scripts enlarge crop_size in place and keep what it was as image_size_raw.
    size = getattr(processor, "image_size_raw", None) or getattr(processor, "crop_size", None) or processor.size
    return int(size if isinstance(size, int) else size["height"])


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
