"""The processor against the published preparation, written out here once more from its description."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cambrian_tiny import IMAGE, build, chat, picture, tokenizer
from lvlm_probe_cambrian import CambrianImageProcessor, CambrianProcessor
from lvlm_probe_cambrian.padding import content_box, image_token_count, valid_cells
from lvlm_probe_cambrian.processing import CHAT_TEMPLATES
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TABLE = [
    (384, HALF, (122, 116, 104)),
    (336, CLIP, (122, 116, 104)),
    (378, IMAGENET, (123, 116, 103)),
    (1024, CLIP, (122, 116, 104)),
]
"""Input size, mean and standard deviation, and colour of the margins of each published tower."""


def prepared(image: Image.Image, size: int, norm: Any, color: tuple[int, int, int]) -> np.ndarray:
    """One tower's input in float64: rows and columns of margin by numpy, resizing by Pillow, then (v / 255 − μ) / σ."""
    values = np.asarray(image.convert("RGB"))
    rows, cols = values.shape[:2]
    side = max(rows, cols)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = color
    top, left = (side - rows) // 2, (side - cols) // 2
    square[top : top + rows, left : left + cols] = values
    resized = np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC), np.float64)
    return ((resized / 255 - np.array(norm[0])) / np.array(norm[1])).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(90, 60), (61, 90), (50, 50), (7, 200)])
def test_each_tower_gets_what_the_published_model_gives_it(size: tuple[int, int]) -> None:
    image = picture(*size)
    found = CambrianImageProcessor()(images=image, return_tensors="pt")
    assert found["image_sizes"].tolist() == [list(size)]
    for number, (side, norm, color) in enumerate(TABLE):
        wanted = prepared(image, side, norm, color)
        assert found[f"pixel_values_{number}"].shape == (1, 3, side, side)
        assert np.abs(found[f"pixel_values_{number}"][0].numpy() - wanted).max() < 1e-5


def test_arrays_grey_pictures_and_lists_are_read_alike() -> None:
    processor = build()[1].image_processor
    image = picture()
    one = processor(images=image, return_tensors="pt")["pixel_values_0"]
    values = np.asarray(image)
    for given in (values, values.transpose(2, 0, 1), torch.from_numpy(values.copy()), [image], [[image]]):
        assert torch.equal(processor(images=given, return_tensors="pt")["pixel_values_0"], one)
    assert processor(images=[image.convert("L"), image], return_tensors="pt")["pixel_values_3"].shape[0] == 2
    with pytest.raises(ValueError, match="8-bit arrays"):
        processor(images=values.astype(np.float32))


@pytest.mark.parametrize(
    ("size", "box", "tokens"),
    [  # by hand: 24 · 400/600 = 16 rows; 24 · 333/500 = 15.98, so 15, margin 4; 24 · 1/10 = 2.4, so 2 columns
        ((600, 400), (4, 20, 0, 24), 16 * 25),
        ((500, 333), (4, 20, 0, 24), 16 * 25),
        ((100, 1000), (0, 24, 11, 13), 24 * 3),
        ((640, 640), (0, 24, 0, 24), 24 * 25),
    ],
)
def test_the_picture_in_its_square(size: tuple[int, int], box: tuple[int, ...], tokens: int) -> None:
    found = content_box(24, size)
    assert (found.top, found.bottom, found.left, found.right) == box
    assert image_token_count(24, size) == tokens
    assert valid_cells(24, size).sum() == found.rows * found.cols


def test_placeholders_become_as_many_as_the_picture_has_tokens() -> None:
    processor = build()[1]
    wide, tall = picture(90, 60), picture(40, 90)
    found = processor(images=[wide, tall], text=["<image>a", "<image>bcd"], return_tensors="pt", padding=True)
    grid = processor.image_processor.image_grid
    counts = (found["input_ids"] == IMAGE).sum(dim=1).tolist()
    assert counts == [image_token_count(grid, image.size) for image in (wide, tall)]
    assert found["attention_mask"][1, 0] == 0 or found["attention_mask"][0, 0] == 0  # padded on the left
    assert found["pixel_values_1"].shape[0] == 2
    assert "pixel_values_0" not in processor(text="no picture", return_tensors="pt")


@pytest.mark.parametrize(
    ("name", "start", "end"),
    [
        ("llama_3", "<|begin_of_text|><|start_header_id|>system<|end_header_id|>You are Cambrian, ",
         "<|eot_id|><|start_header_id|>user<|end_header_id|><image>\nWhat?<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>Red.<|eot_id|>"
         "<|start_header_id|>user<|end_header_id|>Why?<|eot_id|><|start_header_id|>assistant<|end_header_id|>"),
        ("vicuna_v1", "<s>A chat between a curious user and ",
         "the user's questions. USER: <image>\nWhat? ASSISTANT: Red.</s>USER: Why? ASSISTANT:"),
        ("phi3", "<s><|system|>\nYou are a helpful AI assistant.<|end|>\n<|user|>\n",
         "<|user|>\n<image>\nWhat?<|end|>\n<|assistant|>\nRed.<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n"),
    ],
)  # fmt: skip
def test_prompts_are_those_of_the_published_models(name: str, start: str, end: str) -> None:
    image_processor = build()[1].image_processor
    processor = CambrianProcessor(image_processor, tokenizer(), chat_template=CHAT_TEMPLATES[name])
    turns = [*chat(picture(), "What?"), {"role": "assistant", "content": "Red."}, {"role": "user", "content": "Why?"}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text.startswith(start) and text.endswith(end)
    own = processor.apply_chat_template([{"role": "system", "content": "Be brief."}, *turns])
    assert "Be brief." in own and "assistant gives" not in own and "You are" not in own


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    processor = build()[1]
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, CambrianProcessor)
    assert again.image_processor.towers == processor.image_processor.towers
    assert again.image_processor.image_grid == processor.image_processor.image_grid
    assert again.chat_template == processor.chat_template
    image = picture()
    one, two = (
        each.apply_chat_template(chat(image), tokenize=True, return_dict=True, return_tensors="pt")
        for each in (processor, again)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    processor.image_processor.save_pretrained(tmp_path / "alone")
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path / "alone"), CambrianImageProcessor)


def test_a_tokenizer_without_the_image_token_is_refused() -> None:
    plain = tokenizer()
    with pytest.raises(ValueError, match="add it as one"):
        CambrianProcessor(CambrianImageProcessor(), plain, image_token="<picture>")
    with pytest.raises(ValueError, match="1 to 4 towers"):
        CambrianImageProcessor(towers=[])
