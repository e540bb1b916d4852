"""Hard scenes keep their promises, on pixels and by brute force, and so does the recipe that trains on them."""

from __future__ import annotations

import colorsys
import importlib
import itertools
import json
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from lvlm_probe import demo
from lvlm_probe.demo import hard, questions
from lvlm_probe.demo import scene as scenery
from lvlm_probe.demo.drawing import _HSV, render

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def scenes() -> list[demo.Scene]:
    return demo.scenes(35, seed=21, split="tune", hard=True)


def script(folder: Path, name: str) -> ModuleType:
    """A script as a module."""
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return script(EXAMPLES, "train_hard_model")


def alone(layout: questions.Layout, index: int, size: tuple[int, int]) -> np.ndarray:
    """What one object covers without the others, from the drawing itself."""
    return render(replace(layout, items=(layout.items[index],)), size)[1] == 0


def needed(scene: demo.Scene) -> set[int]:
    """The objects under the scene's mask, from the drawing itself."""
    return set(np.unique(render(scene.layout, scene.image.size)[1][scene.mask]).tolist())


def reach(item: questions.Item, other: questions.Item) -> float:
    """Distance between the circles that two objects fit in."""
    return math.hypot(item.x - other.x, item.y - other.y) - 1.12 * (item.radius + other.radius)


def test_hard_scenes_are_deterministic_and_apart_from_plain_ones(scenes: list[demo.Scene]) -> None:
    again = demo.scenes(3, seed=21, split="tune", hard=True, start=7)
    for a, b in zip(again, scenes[7:], strict=False):
        assert (a.layout, a.question, a.answer) == (b.layout, b.question, b.answer)
        assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
        assert np.array_equal(a.mask, b.mask)
    textures = [
        s.layout.texture for h in (False, True) for p in scenery.SPLITS for s in demo.scenes(4, split=p, hard=h)
    ]
    assert len(set(textures)) == len(textures)


def test_kinds_are_dealt_in_turn_and_which_is_for_hard_scenes_alone(scenes: list[demo.Scene]) -> None:
    assert [s.kind for s in scenes] == [demo.HARD_KINDS[i % len(demo.HARD_KINDS)] for i in range(len(scenes))]
    with pytest.raises(ValueError, match="unknown kinds"):
        demo.scenes(1, kinds=["which"])
    with pytest.raises(ValueError, match="which"):
        demo.scenes(1, kinds=["whose"], hard=True)


def test_ranges_of_objects_contrast_and_weave(scenes: list[demo.Scene]) -> None:
    assert {len(s.layout.items) for s in scenes} <= set(range(hard.HARD.objects[0], hard.HARD.objects[1] + 1))
    contrasts = [item.contrast for s in scenes for item in s.layout.items]
    assert hard.HARD.contrast[0] <= min(contrasts) < max(contrasts) <= hard.HARD.contrast[1] < 1
    assert all(hard.HARD.pattern[0] <= s.layout.pattern <= hard.HARD.pattern[1] for s in scenes)


def test_an_object_that_the_answer_needs_is_partly_hidden_and_none_more(scenes: list[demo.Scene]) -> None:
    low, high = hard.HARD.hidden
    for scene in scenes:
        labels = render(scene.layout, (224, 224))[1]
        hidden = []
        for index in range(len(scene.layout.items)):
            whole = alone(scene.layout, index, (224, 224))
            hidden.append(1 - (labels == index).sum() / whole.sum())
            assert (whole[labels == index]).all()
        assert hard.hidden_shares(scene.layout) == pytest.approx(hidden, abs=0.05)
        assert max(hidden) <= high + 0.05
        assert max(hidden[i] for i in needed(scene)) >= low - 0.05


def test_no_object_is_hidden_by_one_of_its_own_colour(scenes: list[demo.Scene]) -> None:
    for scene in scenes:
        for a, b in itertools.combinations(range(len(scene.layout.items)), 2):
            if scene.layout.items[a].colour == scene.layout.items[b].colour:
                assert not (alone(scene.layout, a, (168, 168)) & alone(scene.layout, b, (168, 168))).any()


def test_a_look_alike_that_the_answer_does_not_need_is_near(scenes: list[demo.Scene]) -> None:
    for scene in scenes:
        items, used = scene.layout.items, needed(scene)
        assert any(
            reach(items[i], items[j]) <= hard.NEAR
            and (items[i].shape == items[j].shape) + (items[i].colour == items[j].colour) == 1
            for i in used
            for j in set(range(len(items))) - used
        )


def test_counts_are_one_to_three_and_of_colours_shapes_and_both() -> None:
    counted = demo.scenes(48, seed=22, split="tune", kinds=["count"], hard=True, size=(84, 84))
    numbers = Counter(s.visual_words[0] for s in counted)
    assert set(numbers) == {"one", "two", "three"}
    assert min(numbers.values()) >= 4  # of 16 expected
    nouns = [s.question.removeprefix("How many ").removesuffix(" are there?").split() for s in counted]
    assert {"objects" if n[-1] == "objects" else len(n) for n in nouns} == {"objects", 1, 2}


def truth(query: questions.Query, items: tuple[questions.Item, ...]) -> list[str]:
    """The answers that hold, by brute force over the objects and from the question's words alone."""
    words = query.question.rstrip("?").split()
    of_colour = lambda word: [i for i in items if i.colour == word]  # noqa: E731
    of_shape = lambda word: [i for i in items if i.shape == word]  # noqa: E731
    outside = {"top": lambda i: i.y >= 0.57, "bottom": lambda i: i.y <= 0.43}
    outside |= {"left": lambda i: i.x >= 0.57, "right": lambda i: i.x <= 0.43}
    if query.kind in ("colour", "pair"):
        names = [w for w in words if w in questions.SHAPES]
        return [" ".join(c) for c in itertools.product(*[[i.colour for i in of_shape(n)] for n in names])]
    if query.kind == "shape":
        return [i.shape for i in of_colour(words[4])]
    if query.kind == "where":
        found = [i for i in of_colour(words[3]) if i.shape == words[4]]
        return [f"{'top' if i.y < 0.5 else 'bottom'} {'left' if i.x < 0.5 else 'right'}" for i in found]
    if query.kind == "count":
        colour = words[2] if words[2] in questions.COLOURS else None
        shape = next((s for s in questions.SHAPES if words[-3].startswith(s)), None)
        n = sum(colour in (None, i.colour) and shape in (None, i.shape) for i in items)
        return [[*questions.NUMBERS, "six", "seven", "eight"][n]]
    row, column = words[-2:]
    found = [i for i in items if not outside[row](i) and not outside[column](i)]
    if query.kind == "cell":
        return [f"{i.colour} {i.shape}" for i in found]
    assert query.kind == "which"
    return [i.colour for i in found if i.shape == words[4]]


@pytest.mark.quick
def test_every_question_has_the_one_answer_that_brute_force_finds(scenes: list[demo.Scene]) -> None:
    kinds: Counter[str] = Counter()
    for scene in scenes:
        questions = hard.queries(scene.layout)
        assert scene.question in [q.question for q in questions]
        for query in questions:
            assert truth(query, scene.layout.items) == [" ".join(query.words)], query.question
            assert query.template.format(*query.words) == query.answer
            kinds[query.kind] += 1
    assert set(kinds) == set(demo.HARD_KINDS)


@pytest.mark.parametrize("size", [(336, 336), (500, 300)])
def test_colours_can_be_told_from_the_visible_pixels(size: tuple[int, int]) -> None:
    """Of the six colours blended towards the ground, as measured beside the objects, its own is an object's nearest."""
    pure = {name: np.asarray(colorsys.hsv_to_rgb(*hsv)) * 255 for name, hsv in _HSV.items()}
    for scene in demo.scenes(7, seed=23, split="tune", hard=True, size=size):
        pixels, labels = np.asarray(scene.image).astype(float), render(scene.layout, size)[1]
        ground = pixels[labels == -1].mean(0)
        assert scene.mask.shape == labels.shape == size[::-1]
        for index, item in enumerate(scene.layout.items):
            shown = pixels[labels == index].mean(0)
            blended = {n: ground + item.contrast * (rgb - ground) for n, rgb in pure.items()}
            assert min(blended, key=lambda n: float(np.abs(blended[n] - shown).sum())) == item.colour


def test_masks_are_of_visible_pixels_and_join_up(scenes: list[demo.Scene]) -> None:
    for scene in scenes:
        labels = render(scene.layout, scene.image.size)[1]
        assert np.array_equal(scene.mask, np.logical_or.reduce(scene.word_masks))
        assert np.array_equal(scene.mask, np.isin(labels, list(needed(scene))))
        if scene.kind == "count":
            assert len(needed(scene)) == questions.NUMBERS.index(scene.visual_words[0])
        elif scene.kind == "pair":
            assert not (scene.word_masks[0] & scene.word_masks[1]).any()
        else:
            assert len(needed(scene)) == 1


def test_low_contrast_is_low(scenes: list[demo.Scene]) -> None:
    """The picture differs less from its ground than the same layout at full contrast without a weave."""
    for scene in scenes[:7]:
        loud = replace(scene.layout, pattern=0.0, items=tuple(replace(i, contrast=1.0) for i in scene.layout.items))
        differences = []
        for layout in (scene.layout, loud):
            image, labels = render(layout, (168, 168))
            pixels = np.asarray(image).astype(float)
            differences.append(np.abs(pixels[labels >= 0] - pixels[labels == -1].mean(0)).mean())
        assert differences[0] < 0.85 * differences[1]


def test_the_demo_models_tokenizer_writes_every_sentence(demo_model: Any, scenes: list[demo.Scene]) -> None:
    tokenizer = demo_model[1].tokenizer
    for scene in scenes[:14]:
        for query in hard.queries(scene.layout):
            for text in (query.question, query.answer, query.hidden_template):
                ids = tokenizer.encode(text, add_special_tokens=False)
                assert tokenizer.decode(ids) == text
                assert tokenizer.unk_token_id not in ids
                assert max(len(tokenizer.tokenize(word)) for word in text.split()) <= 4  # no spelling out


@pytest.fixture(scope="module")
def demo_model() -> Any:
    return demo.load()


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_a_grown_model_answers_as_before_and_can_learn_everywhere(demo_model: Any, recipe: ModuleType) -> None:
    small, processor = demo_model
    grown = recipe.grow(small, tower_layers=5, tower_units=512, decoder_layers=4).eval()
    assert sum(p.numel() for p in grown.parameters()) > 1.5 * sum(p.numel() for p in small.parameters())
    scene = demo.scenes(1, seed=24)[0]
    inputs = processor.apply_chat_template(
        scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    expected, got = small(**inputs).logits, grown(**inputs).logits
    assert torch.allclose(got, expected, atol=1e-4, rtol=1e-4)
    got.log_softmax(-1)[0, -1, 5].backward()
    new = {
        name: parameter.grad.abs().max()
        for name, parameter in grown.named_parameters()
        if name.endswith(("out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight"))
    }
    assert len(new) == 2 * (5 + 4)
    assert min(new.values()) > 0  # zero weights, but not zero gradients


def test_absent_things_are_absent_and_hidden(recipe: ModuleType) -> None:
    rng = np.random.default_rng(0)
    asker = recipe.HardAsker(rng, absent=1.0, weights=recipe.KIND_WEIGHTS)
    asked: Counter[str] = Counter()
    for index in range(40):
        layout = hard.draw_layout(rng, demo.HARD_KINDS[index % 7])
        seen = np.ones(len(layout.items))
        for example in itertools.islice(asker.ask(layout, seen), 12):
            answers = truth(example.query, layout.items)
            if example.query.kind == "pair":  # one of the two is there
                assert not all(example.seen)
                answers = answers if not any(example.seen) else []
            if example.query.kind == "count":
                assert answers == ["no"]
            else:
                assert answers == [], example.query.question
            assert example.query.kind == "pair" or not any(example.seen)
            asked[example.query.kind] += 1
    assert set(asked) == set(demo.HARD_KINDS)


def test_training_layouts_share_none_with_tuning_ones_and_keep_to_their_ranges(recipe: ModuleType) -> None:
    drawn = [(split, ranges) for split in ("train", "tune") for ranges in (hard.HARD, recipe.FAINTEST)]
    textures = set()
    for number, (split, ranges) in enumerate(drawn):
        pool = recipe.draw_pool(split, 8, offset=100 * number, workers=1, ranges=ranges)
        for layout, labels in zip(pool.layouts, pool.labels, strict=True):
            textures.add(layout.texture)
            assert hard.hidden_shares(layout).max() <= ranges.hidden[1]
            assert all(ranges.radius[0] <= item.radius <= ranges.radius[1] for item in layout.items)
            assert all(ranges.contrast[0] <= item.contrast <= ranges.contrast[1] for item in layout.items)
            assert set(np.unique(labels).tolist()) == {-1, *range(len(layout.items))}
    assert len(textures) == 8 * len(drawn)


def test_an_interrupted_training_ends_with_the_same_weights(recipe: ModuleType, tmp_path: Path) -> None:
    numbers = {"save": 3, "plain": 2, "batch": 2, "check-batches": 0, "check-scenes": 2}
    numbers |= {"processes": 1, "workers": 1, "tower-layers": 4, "tower-units": 256, "decoder-layers": 3}
    common = [f"--{name}={value}" for name, value in numbers.items()] + ["--steps", "4", "4", "--pool", "6", "6"]
    recipe.main(["--out", str(tmp_path / "whole"), *common, "--check-batches", "1", "--save", "8"])
    recipe.main(["--out", str(tmp_path / "halves"), *common, "--stop-after", "5"])
    between = (tmp_path / "halves" / "model.safetensors").read_bytes()
    halfway = json.loads((tmp_path / "halves" / "card.json").read_text())
    assert (halfway["steps"], halfway["finished"]) == (4, False)  # its last checkpoint, at the end of the first stage
    recipe.main(["--out", str(tmp_path / "halves"), *common, "--stop-after", "3"])
    assert json.loads((tmp_path / "halves" / "card.json").read_text())["steps"] == 6  # within the second
    recipe.main(["--out", str(tmp_path / "halves"), *common])
    whole, halves = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "halves"))
    assert whole == halves != between
    card = json.loads((tmp_path / "halves" / "card.json").read_text())
    assert (card["steps"], card["finished"]) == (8, True)
    assert card["seconds"]["wall"] >= halfway["seconds"]["wall"]
    checks = json.loads((tmp_path / "whole" / "card.json").read_text())["held_out_tune_scenes"]
    assert {"shape", "count"} <= set(checks["clear"]) <= set(demo.HARD_KINDS)
    assert all(0 <= share <= 1 for share in checks["clear"].values())
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"{run}{part}" for run in ("halves", "whole") for part in ("", ".pool1", ".pool2", ".state")
    ]
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    assert model.config.vision_config.num_hidden_layers == 4
    assert AutoProcessor.from_pretrained(tmp_path / "whole").tokenizer.is_fast
    with pytest.raises(SystemExit, match="other settings"):
        recipe.main(["--out", str(tmp_path / "whole"), *common, "--seed", "3"])


def test_processes_that_train_together_descend_along_the_mean_gradient(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = [torch.tensor([[3.0, -1.0]]), torch.tensor([8.0])]  # of another process, in the order of the parameters

    def all_reduce(flat: torch.Tensor) -> None:
        flat += torch.cat([gradient.flatten() for gradient in other])

    monkeypatch.setattr(recipe.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(recipe.dist, "get_world_size", lambda: 2)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((1, 2), (3,), (1,))]
    parameters[0].grad, parameters[2].grad = torch.tensor([[1.0, 1.0]]), torch.tensor([-2.0])
    recipe.average_gradients(parameters)
    assert parameters[0].grad.tolist() == [[2.0, 0.0]]
    assert parameters[1].grad is None
    assert parameters[2].grad.tolist() == [3.0]


def test_evaluation_asks_about_hard_scenes(capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = script(EXAMPLES, "evaluate_demo_model")
    capsys.readouterr()
    evaluation.main(["--hard", "--n", "2", "--llr-scenes", "7", "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert list(figures["exact_match"]) == list(demo.HARD_KINDS)
    assert all(row["n"] == 2 and row["exact"] in (0, 0.5, 1) for row in figures["exact_match"].values())
    asked = figures["exact_match"]["which"]["wrong"]
    assert all(" in the " in question for question, _, _ in asked)
    assert len(asked) == 2  # the demo model was not taught this kind
    assert figures["llr"]["visual_words"] > 0


def test_benchmark_cases_can_be_hard_scenes_answered_by_a_model_of_ones_own(tmp_path: Path) -> None:
    held_out = script(Path(__file__).parents[1] / "benchmarks", "held_out")
    skipped: Counter[str] = Counter()
    case = next(held_out.cases("tune", 1, tmp_path, skipped=skipped, after=6, hard=True, model=demo.path()))
    (same,) = demo.scenes(1, split="tune", start=case.scene.index, hard=True)
    assert case.scene.index == 7 + skipped.total()
    assert (case.scene.layout, case.scene.answer) == (same.layout, same.answer)
    assert case.replay.trace.answer.strip() == same.answer
    assert case.selection
