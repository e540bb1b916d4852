"""From pictures and text to Mini-Gemini's inputs: one high-resolution tensor a picture, placeholders in the prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import ProcessorMixin
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs, MultiModalData, Unpack

__all__ = ["CHAT_TEMPLATE", "MiniGeminiImageProcessor", "MiniGeminiProcessor", "expand_to_square"]

_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}" + _SYSTEM + " {% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""The ``vicuna_v1`` conversation: pictures in front of the text of their turn, a line each."""


def expand_to_square(image: np.ndarray, colour: tuple[int, ...]) -> np.ndarray:
    """``(channel, row, col)`` uint8, padded on both sides of its shorter axis to a square of one colour."""
    channels, height, width = image.shape
    side = max(height, width)
    square = np.empty((channels, side, side), image.dtype)
    square[:] = np.asarray(colour, image.dtype)[:, None, None]
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = image
    return square


class MiniGeminiImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """What a call may change, besides the usual.

    Attributes:
        aux: ``"full"``: a tensor of ``size``; ``"none"``: of ``image_size_low``.
        image_size_low: side of the low-resolution encoder's pictures.
    """

    aux: str
    image_size_low: int


class MiniGeminiImageProcessor(PilBackend):
    """Pads to a square with CLIP's mean colour, resizes with PIL (bicubic) and normalises.

    What the low-resolution encoder sees is not made here but by the model, from this tensor.
    """

    valid_kwargs = MiniGeminiImagesKwargs
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"height": 768, "width": 768}  # noqa: RUF012 (the base class's own way)
    image_size_low = 336
    aux = "full"
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_pad = True

    def __init__(self, **kwargs: Unpack[MiniGeminiImagesKwargs]) -> None:
        super().__init__(**kwargs)

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_pad: bool,
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | None,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: list[float],
        image_std: list[float],
        return_tensors: str | None,
        aux: str = "full",
        image_size_low: int = 336,
        **kwargs: Any,
    ) -> BatchFeature:
        if aux not in ("full", "none"):
            raise ValueError(f"aux is 'full' or 'none'; got {aux!r}")
        target = size if aux == "full" else SizeDict(height=image_size_low, width=image_size_low)
        colour = tuple(int(mean * 255) for mean in image_mean)
        processed = []
        for image in images:
            if do_pad:
                image = expand_to_square(image, colour)
            if do_resize:
                image = self.resize(image=image, size=target, resample=resample)
            if do_rescale:
                image = self.rescale(image, rescale_factor)
            if do_normalize:
                image = self.normalize(image, image_mean, image_std)
            processed.append(image)
        return BatchFeature(data={"pixel_values": processed}, tensor_type=return_tensors)


class MiniGeminiProcessor(ProcessorMixin):
    """Image processor and tokenizer; writes as many placeholders into the prompt as a picture has image tokens.

    Args:
        image_processor: a ``MiniGeminiImageProcessor``.
        tokenizer: with ``image_token`` as one special token.
        patch_size, image_grid, image_global: as in the model's configuration.
        chat_template: Jinja; by default ``CHAT_TEMPLATE``.

    Raises:
        ValueError: the tokenizer has no such token.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 14,
        image_grid: int = 1,
        image_global: bool = False,
        chat_template: str | None = None,
        image_token: str = "<image>",
        **kwargs: Any,
    ) -> None:
        self.patch_size, self.image_grid, self.image_global = patch_size, image_grid, image_global
        self.image_token = image_token
        ids = tokenizer.encode(image_token, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"the tokenizer splits {image_token!r} into {len(ids)} tokens; add it first: "
                f"tokenizer.add_tokens([{image_token!r}], special_tokens=True)"
            )
        self.image_token_id = int(ids[0])
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def image_tokens(self, aux: str | None = None) -> int:
        """Image tokens of one picture."""
        per_view = (self.image_processor.image_size_low // self.patch_size) ** 2
        whole = (aux or self.image_processor.aux) == "none"
        return per_view * (1 if whole else self.image_grid**2 + self.image_global)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self.image_tokens(kwargs.get("aux"))

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """Placeholders of pictures of the given ``(height, width)``: the same for all."""
        if image_sizes is None:
            return MultiModalData()
        count = self.image_tokens(kwargs.get("aux"))
        return MultiModalData(num_image_tokens=[count] * len(image_sizes), num_image_patches=[1] * len(image_sizes))
