"""The processor against the documented recipe, written out here with PIL and NumPy alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lvlm_probe_mini_gemini import MiniGeminiImageProcessor, MiniGeminiProcessor
from mini_gemini_tiny import KINDS, build, chat, inputs, picture, tokenizer
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from lvlm_probe.images import ImagePath

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def recipe(image: Image.Image, side: int) -> torch.Tensor:
    """Pad to a square with the mean colour, resize (PIL, bicubic), scale, normalise: ``(3, side, side)``."""
    size = max(image.size)
    square = Image.new("RGB", (size, size), tuple(int(mean * 255) for mean in MEAN))
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    pixels = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC), np.float64) / 255
    return torch.from_numpy(((pixels - MEAN) / STD).transpose(2, 0, 1)).float()


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (41, 60), (64, 64), (20, 64), (100, 30), (7, 300)])
@pytest.mark.parametrize("aux", ["full", "none"])
def test_pixels_are_the_recipe(size: tuple[int, int], aux: str) -> None:
    image = picture(*size)
    processor = MiniGeminiImageProcessor(size={"height": 96, "width": 96}, image_size_low=42, aux=aux)
    found = processor(images=[image], return_tensors="pt")["pixel_values"]
    wanted = recipe(image, 96 if aux == "full" else 42)
    assert found.shape == (1, *wanted.shape)
    assert float((found[0] - wanted).abs().max()) < 1e-5


def test_padding_colour() -> None:
    """int(mean · 255): 122, 116, 104."""
    found = MiniGeminiImageProcessor()(images=[Image.new("RGB", (90, 30), "red")], return_tensors="pt")["pixel_values"]
    colour = [(value / 255 - mean) / std for value, mean, std in zip((122, 116, 104), MEAN, STD, strict=True)]
    assert found.shape == (1, 3, 768, 768)
    assert found[0, :, 0, 0].tolist() == pytest.approx(colour, abs=1e-5)
    assert found[0, :, 384, 384].tolist() == pytest.approx(
        [(value - mean) / std for value, mean, std in zip((1, 0, 0), MEAN, STD, strict=True)], abs=1e-5
    )


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_modes_are_converted(mode: str) -> None:
    image = picture().convert(mode)
    found = MiniGeminiImageProcessor()(images=image, return_tensors="pt")["pixel_values"]
    assert found.shape == (1, 3, 768, 768)


@pytest.mark.parametrize("kind", KINDS)
def test_placeholders(kind: str) -> None:
    model, processor = build(kind)
    for aux in ("full", "none"):
        given = inputs(processor, picture(), aux=aux)
        count = int((given["input_ids"] == processor.image_token_id).sum())
        assert count == model.config.image_tokens(aux) == processor.image_tokens(aux)
        assert set(given) == {"input_ids", "attention_mask", "pixel_values"}
    assert processor.image_tokens() == (16 if kind == "plain" else 80)
    (counts,) = processor._get_num_multimodal_tokens(image_sizes=[(40, 60)])["num_image_tokens"]
    assert counts == processor.image_tokens()


def test_published_sizes() -> None:
    processor = MiniGeminiProcessor(MiniGeminiImageProcessor(), tokenizer())
    assert processor.image_tokens() == 576
    large = MiniGeminiProcessor(
        MiniGeminiImageProcessor(size={"height": 1536, "width": 1536}), tokenizer(), image_grid=2, image_global=True
    )
    assert (large.image_tokens(), large.image_tokens("none")) == (2880, 576)


def test_chat_template_is_the_vicuna_conversation() -> None:
    _, processor = build("plain")
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )
    turns: list[dict[str, Any]] = chat("What is this?", picture())
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text == f"{system} USER: <image>\nWhat is this? ASSISTANT:"
    turns += [
        {"role": "assistant", "content": [{"type": "text", "text": " A cat."}]},
        {"role": "user", "content": "Sure?"},
    ]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text == f"{system} USER: <image>\nWhat is this? ASSISTANT:  A cat.</s>USER: Sure? ASSISTANT:"
    own = [{"role": "system", "content": "Be brief."}, *turns[:1]]
    assert processor.apply_chat_template(own).startswith("Be brief. USER: <image>\n")


def test_chat_template_with_the_picture() -> None:
    _, processor = build("hd")
    given = processor.apply_chat_template(
        chat("What is this?", picture()), add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    text = processor.apply_chat_template(chat("What is this?", picture()), add_generation_prompt=True)
    direct = processor(text=text, images=[picture()], return_tensors="pt")
    assert torch.equal(given["input_ids"], direct["input_ids"])
    assert torch.equal(given["pixel_values"], direct["pixel_values"])


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same(kind: str, tmp_path: Path) -> None:
    model, processor = build(kind)
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, MiniGeminiProcessor)
    assert isinstance(again.image_processor, MiniGeminiImageProcessor)
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), MiniGeminiImageProcessor)
    assert again.chat_template == processor.chat_template
    given, same = inputs(processor, picture()), inputs(again, picture())
    assert torch.equal(given["input_ids"], same["input_ids"])
    assert torch.equal(given["pixel_values"], same["pixel_values"])


def test_a_tokenizer_without_the_placeholder_is_refused() -> None:
    class Splits:
        def encode(self, text: str, **_: Any) -> list[int]:
            return [1, 2, 3]

    with pytest.raises(ValueError, match="add it first"):
        MiniGeminiProcessor(MiniGeminiImageProcessor(), Splits())


@pytest.mark.parametrize("size", [(60, 40), (30, 50)])
def test_masks_go_through_it_as_through_a_black_box(size: tuple[int, int]) -> None:
    """A hard mask through the traced geometry against the real processor on the real composite."""
    processor = MiniGeminiImageProcessor(size={"height": 32, "width": 32}, image_size_low=16)
    image, other = picture(*size), picture(*size, seed=1)
    path = ImagePath.from_processor(processor, [image], baseline=[other])
    mask = torch.zeros(1, 1, 2, 2)
    for value, wanted in ((1.0, image), (0.0, other)):
        found = path.apply(torch.full_like(mask, value))["pixel_values"]
        assert torch.allclose(found, processor(images=[wanted], return_tensors="pt")["pixel_values"], atol=1e-5)
    # Padding comes from nowhere in the picture, and no mask changes it.
    _, _, _, alive = path.coordinates("pixel_values")
    rows = alive[0, 0].any(dim=1) if size[0] > size[1] else alive[0, 0].any(dim=0)
    assert not rows[0] and not rows[-1] and rows[16]
    parts = [path.apply(mask + value)["pixel_values"] for value in (0.0, 0.5, 1.0)]
    assert torch.equal(parts[0][~alive], parts[2][~alive]) and torch.equal(parts[0][~alive], parts[1][~alive])
