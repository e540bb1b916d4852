"""The demo model: its checkpoint, its scenes, and that it behaves as its card says (lower floors, fewer scenes)."""

from __future__ import annotations

import colorsys
import hashlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ImageFilter

from lvlm_probe import demo
from lvlm_probe.demo import questions
from lvlm_probe.demo import scene as scenery


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return demo.load()


def ask(model: Any, processor: Any, scenes: Sequence[demo.Scene]) -> list[str]:
    prompts = [processor.apply_chat_template(s.messages, add_generation_prompt=True) for s in scenes]
    inputs = processor(images=[s.image for s in scenes], text=prompts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=24)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_import_is_light() -> None:
    code = "import sys, lvlm_probe.demo; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_checkpoint_is_small_half_precision_and_complete() -> None:
    files = {f.name: f.stat().st_size for f in demo.path().iterdir()}
    assert sum(files.values()) <= 4 * 2**20
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "processor_config.json",
    } <= set(files)
    from safetensors import safe_open

    with safe_open(demo.path() / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
        assert {weights.get_tensor(name).dtype for name in names} == {torch.float16}
    # As checkpoints on the hub have them: serving engines look for these, and transformers for both.
    towers = [name for name in names if name.startswith("vision_tower.")]
    assert towers and all(name.startswith("vision_tower.vision_model.") for name in towers)


def test_auto_classes_load_the_real_thing(loaded: tuple[Any, Any]) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

    model = AutoModelForImageTextToText.from_pretrained(demo.path())
    processor = AutoProcessor.from_pretrained(demo.path())
    assert type(model) is LlavaForConditionalGeneration
    assert type(processor) is LlavaProcessor
    assert type(processor.image_processor).__name__.startswith("CLIPImageProcessor")
    assert processor.tokenizer.is_fast
    assert processor.tokenizer.padding_side == "left"
    assert not model.generation_config.do_sample
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id
    ours, _ = loaded
    assert not ours.training
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    for (name, mine), theirs in zip(ours.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs.float()), name


def test_save_pretrained_round_trip(loaded: tuple[Any, Any], tmp_path: Any) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = loaded
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    scenes = demo.scenes(6, seed=3)
    assert ask(*again, scenes) == ask(model, processor, scenes)


def test_generate_stops_by_itself_and_decodes_to_text(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    scene = demo.scenes(1, seed=4)[0]
    inputs = processor.apply_chat_template(
        scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with torch.inference_mode():
        out = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert out[-1] == processor.tokenizer.eos_token_id
    assert processor.decode(out, skip_special_tokens=True) == scene.answer


def test_tokenizer_writes_every_sentence_and_survives_others(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1].tokenizer
    assert len(tokenizer) <= 160
    for index in range(60):
        for query in questions.queries(scenery.draw_layout(scenery.scene_rng("tune", 5, index))):
            for text in (query.question, query.answer, query.hidden_template):
                ids = tokenizer.encode(text, add_special_tokens=False)
                assert tokenizer.decode(ids) == text
                assert tokenizer.unk_token_id not in ids
    assert tokenizer.tokenize("triangles") == ["▁tri", "angle", "s"]
    assert tokenizer.decode(tokenizer.encode("why, oh why?", add_special_tokens=False)) == "why, oh why?"
    assert tokenizer.unk_token_id in tokenizer.encode("多い", add_special_tokens=False)


def test_scenes_are_deterministic_and_do_not_depend_on_how_many() -> None:
    few, many = demo.scenes(3, seed=7), demo.scenes(8, seed=7)
    for a, b in zip(few, many, strict=False):
        assert (a.question, a.answer, a.visual_spans) == (b.question, b.answer, b.visual_spans)
        assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
        assert np.array_equal(a.mask, b.mask)
    later = demo.scenes(1, seed=7, start=6)[0]
    assert np.array_equal(np.asarray(later.image), np.asarray(many[6].image))
    assert later.answer == many[6].answer
    assert demo.scenes(1, seed=8)[0].layout != few[0].layout


PINNED = {
    "train": "a60e608e0747c32e 60635c63d231f10f 2942e9c8e51d694c 95bd0ff4ca281971 8cc761ad2478c2f6 022d89fb0295669b",
    "tune": "de79ae5d25468193 9d0ad22af27a5c78 82280672394db3a9 917f222d676c43bf a41e5a1d01b893e9 d607a7a822400be2",
    "eval": "e88ad81e5f2ab854 600c954030c06df5 54b534f42e0fc71e 6ffd07a7040b655a 6859b8b5b8ab6cd7 f1a70cde36e1ba3f",
}
"""Digests of the first scenes of seed 1 of each split, from before there were hard scenes (`digest`)."""


def digest(scene: demo.Scene) -> str:
    sha = hashlib.sha256(np.asarray(scene.image).tobytes())
    for mask in (scene.mask, *scene.word_masks):
        sha.update(np.packbits(mask).tobytes())
    sha.update(f"{scene.question}|{scene.answer}|{scene.visual_spans}|{scene.kind}".encode())
    return sha.hexdigest()[:16]


@pytest.mark.parametrize("split", list(PINNED))
def test_plain_scenes_stay_as_the_model_was_trained_and_measured_on(split: str) -> None:
    assert " ".join(digest(scene) for scene in demo.scenes(6, split=split, seed=1)) == PINNED[split]


@pytest.mark.quick
def test_plain_scenes_of_other_sizes_and_the_weights_stay_too() -> None:
    scenes = demo.scenes(3, seed=40, size=(500, 360), start=100)
    assert [digest(scene) for scene in scenes] == ["c8a5e8fea1fbc465", "1a72ad61c4b67db6", "f993bf777452439d"]
    weights = hashlib.sha256((demo.path() / "model.safetensors").read_bytes()).hexdigest()
    assert weights == "5addf763585145d42d084733047c972ac02c558c1e42e7b6873f5739840f7513"


def test_splits_share_no_scene() -> None:
    seen = {split: {str(s.layout) for s in demo.scenes(40, seed=0, split=split)} for split in scenery.SPLITS}
    assert len(set.union(*seen.values())) == sum(len(layouts) for layouts in seen.values())


def test_kinds_are_dealt_in_turn() -> None:
    assert [s.kind for s in demo.scenes(2 * len(demo.KINDS))] == list(demo.KINDS) * 2
    assert {s.kind for s in demo.scenes(4, kinds=["where", "count"])} == {"where", "count"}


@pytest.mark.parametrize("arguments", [{"split": "test"}, {"kinds": ["colours"]}, {"kinds": []}, {"size": (336, 8)}])
def test_bad_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"unknown|too small"):
        demo.scenes(1, **arguments)


def nearest_colour(pixels: np.ndarray) -> str:
    red, green, blue = (pixels.mean(0) / 255).tolist()
    hue = colorsys.rgb_to_hsv(red, green, blue)[0]
    hues = {"red": 0.99, "yellow": 0.138, "green": 0.345, "cyan": 0.502, "blue": 0.617, "purple": 0.775}
    return min(hues, key=lambda name: min(abs(hue - hues[name]), 1 - abs(hue - hues[name])))


@pytest.mark.parametrize("size", [(336, 336), (640, 400), (300, 500)])
def test_masks_are_the_objects_that_decide_the_words(size: tuple[int, int]) -> None:
    for scene in demo.scenes(24, seed=9, size=size):
        pixels = np.asarray(scene.image)
        assert scene.image.size == size
        assert scene.mask.shape == size[::-1] == pixels.shape[:2]
        assert scene.mask.dtype == bool
        assert len(scene.word_masks) == len(scene.visual_spans)
        assert np.array_equal(scene.mask, np.logical_or.reduce(scene.word_masks))
        for word, mask in zip(scene.visual_words, scene.word_masks, strict=True):
            rows, columns = np.nonzero(mask)
            y = (rows.mean() - (size[1] - min(size)) / 2) / min(size)
            x = (columns.mean() - (size[0] - min(size)) / 2) / min(size)
            assert 0 < x < 1
            assert 0 < y < 1
            if word in questions.COLOURS:
                assert nearest_colour(pixels[mask]) == word, scene.answer
            elif word in questions.ROWS:
                assert (y < 0.5) == (word == "top")
            elif word in questions.COLUMNS:
                assert (x < 0.5) == (word == "left")
            elif word in questions.NUMBERS:
                assert pieces(mask) == questions.NUMBERS.index(word)
            else:
                assert word in questions.SHAPES
                fill = mask.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
                low, high = {"circle": (0.74, 0.82), "square": (0.6, 1.0)}.get(word, (0.25, 0.72))
                assert low <= fill <= high, (word, fill)


def pieces(mask: np.ndarray) -> int:
    """Number of 4-connected regions of more than a few pixels (the tip of a star can stand apart), by flood fill."""
    left = mask.copy()
    found = 0
    while left.any():
        size, stack = 0, [tuple(np.argwhere(left)[0])]
        while stack:
            row, column = stack.pop()
            if 0 <= row < left.shape[0] and 0 <= column < left.shape[1] and left[row, column]:
                left[row, column] = False
                size += 1
                stack += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
        found += size > 9
    return found


def test_visual_spans_are_the_words_only_the_picture_tells() -> None:
    every = {*questions.COLOURS, *questions.SHAPES, *questions.NUMBERS, *questions.ROWS, *questions.COLUMNS}
    for scene in demo.scenes(30, seed=10):
        assert set(scene.visual_words) <= every
        if scene.kind in ("colour", "shape", "count", "pair"):
            assert not set(scene.visual_words) & {w.strip("?") for w in scene.question.split()} or scene.kind == "pair"
        assert scene.messages[0]["content"][1]["text"] == scene.question


def test_training_pictures_take_the_processors_road(loaded: tuple[Any, Any]) -> None:
    from PIL import Image

    processor = loaded[1].image_processor
    for scene in demo.scenes(3, seed=11):
        small = np.asarray(scene.image.resize((112, 112), Image.Resampling.BICUBIC), dtype=np.float32) / 255
        expected = (small - np.asarray(processor.image_mean)) / np.asarray(processor.image_std)
        got = np.asarray(processor(scene.image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
        assert np.abs(got - expected).max() < 2.5 / 255 / min(processor.image_std)
        assert np.abs(got - expected).mean() < 0.1 / 255 / min(processor.image_std)


def test_answers_are_right(loaded: tuple[Any, Any]) -> None:
    scenes = demo.scenes(60, seed=12)
    said = ask(*loaded, scenes)
    right = [a == s.answer for a, s in zip(said, scenes, strict=True)]
    assert np.mean(right) >= 0.90, [(s.answer, a) for s, a in zip(scenes, said, strict=True) if s.answer != a]


@pytest.mark.parametrize("size", [(336, 336), (720, 480), (360, 900), (112, 112)])
def test_answers_hold_at_other_sizes(loaded: tuple[Any, Any], size: tuple[int, int]) -> None:
    scenes = demo.scenes(12, seed=13, size=size)
    assert np.mean([a == s.answer for a, s in zip(ask(*loaded, scenes), scenes, strict=True)]) >= 0.8


def test_left_padded_batch_answers_like_single_questions(loaded: tuple[Any, Any]) -> None:
    scenes = demo.scenes(6, seed=14)
    assert ask(*loaded, scenes) == [ask(*loaded, [scene])[0] for scene in scenes]


def test_blur_takes_visual_words_and_leaves_the_others(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    visual, other = [], []
    for scene in demo.scenes(18, seed=15):
        prompt = processor.apply_chat_template(scene.messages, add_generation_prompt=True)
        answer = processor.tokenizer(scene.answer, add_special_tokens=False)["input_ids"]
        log_probs = []
        for image in (scene.image, scene.image.filter(ImageFilter.GaussianBlur(0.4 * 336))):
            inputs = processor(images=image, text=prompt, return_tensors="pt")
            ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
            with torch.inference_mode():
                logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -len(answer) - 1 : -1]
            log_probs.append(logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)])
        llr = (log_probs[0] - log_probs[1]).tolist()
        slots = {scene.answer[:start].count(" ") for start, _ in scene.visual_spans}
        position, words = -1, {}
        for piece, value in zip(processor.tokenizer.convert_ids_to_tokens(answer), llr, strict=True):
            position += piece.startswith("▁")
            key = "." if piece == "." else position
            words[key] = words.get(key, 0.0) + value
        visual += [value for key, value in words.items() if key in slots]
        other += [value for key, value in words.items() if key not in slots]
    assert np.mean([v > 1 for v in visual]) >= 0.85
    assert np.mean([v < 1 for v in other]) >= 0.95
    assert np.mean([v > o for v in visual for o in other]) >= 0.95


def test_masked_pictures_keep_what_is_shown(loaded: tuple[Any, Any]) -> None:
    """Blurred all over except on the objects asked about, the answer stands; blurred on them alone, it does not."""
    from PIL import Image

    model, processor = loaded
    kept, hidden, answers = [], [], []
    for scene in demo.scenes(20, seed=16, kinds=["colour", "shape"]):
        base = scene.image.filter(ImageFilter.GaussianBlur(0.4 * 336))
        grown = (
            Image.fromarray(scene.mask).convert("L").filter(ImageFilter.BoxBlur(10)).point(lambda v: min(255, 8 * v))
        )
        kept.append(Image.composite(scene.image, base, grown))
        hidden.append(Image.composite(base, scene.image, grown))
        answers.append(scene)
    prompts = [processor.apply_chat_template(s.messages, add_generation_prompt=True) for s in answers]

    def accuracy(images: list[Image.Image]) -> float:
        inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True)
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=24)[:, inputs["input_ids"].shape[1] :]
        said = processor.batch_decode(out, skip_special_tokens=True)
        return float(np.mean([a == s.answer for a, s in zip(said, answers, strict=True)]))

    assert accuracy(kept) >= 0.85
    assert accuracy(hidden) <= 0.15
