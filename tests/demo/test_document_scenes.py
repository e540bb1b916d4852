"""Drawn documents: what they say is what is printed, and where; and the recipe of the model that reads them."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lvlm_probe as probe
from lvlm_probe import demo
from lvlm_probe.evidence import AnswerBox, check_box, fields, locate

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import evaluate_demo_model as evaluation
import train_demo_model as base
import train_document_model as recipe

SHIPPED = Path(recipe.__file__).parent / "document_model"


@pytest.fixture(scope="module")
def drawn() -> list[demo.DocumentScene]:
    return demo.documents(48, side=240)


@pytest.mark.quick
def test_a_document_is_drawn_again_the_same_and_no_other_split_has_it(drawn: list[demo.DocumentScene]) -> None:
    (again,) = demo.documents(1, side=240, start=5)
    assert again.question == drawn[5].question and again.page == drawn[5].page
    assert np.array_equal(np.asarray(again.image), np.asarray(drawn[5].image))
    (other,) = demo.documents(1, side=240, split="train", start=5)
    assert other.page != drawn[5].page
    assert {one.kind for one in drawn} == set(demo.DOCUMENT_KINDS)
    assert {one.page.layout for one in drawn} == {"receipt", "table", "form"}


def test_an_answer_is_what_the_page_says(drawn: list[demo.DocumentScene]) -> None:
    for one in drawn:
        printed = {text.name: text.text for text in one.page.texts if not text.is_label}
        assert one.visual_words == tuple(printed[name] for name in one.names)
        assert one.names[0] in one.question
        prices = [float(printed[name]) for name in one.page.goods]
        assert sum(prices) == pytest.approx(float(printed["total"])) and 2 <= len(prices) <= 3
        assert one.mask.sum() == sum(mask.sum() for mask in one.word_masks)
    record = next(one for one in drawn if one.kind == "record")
    import json

    assert tuple(json.loads(record.answer).values()) == record.visual_words


def test_a_box_holds_the_print_of_its_value_and_of_no_other(drawn: list[demo.DocumentScene]) -> None:
    for one in drawn[:12]:
        page, side = one.page, one.image.width
        for text in page.texts:
            others = tuple(other for other in page.texts if other != text)
            # The paper's edge follows the texts, so a blank of the same size stays in the place of this one.
            blank = dataclasses.replace(page, texts=(*others, dataclasses.replace(text, text=" " * 3)))
            left, top, right, bottom = (one.labels if text.is_label else one.boxes)[text.name]
            ink = np.asarray(page.render(side)).astype(int) - np.asarray(blank.render(side)).astype(int)
            changed = np.argwhere(np.abs(ink).sum(2)[: int(bottom) + 3, : int(right) + 3] > 60)
            inside = (changed[:, 1] >= left - 2) & (changed[:, 1] <= right + 2)
            inside &= (changed[:, 0] >= top - 2) & (changed[:, 0] <= bottom + 2)
            assert inside.sum() > 20
            assert inside.mean() > 0.9, text


def test_the_place_tells_nothing(drawn: list[demo.DocumentScene]) -> None:
    for name in ("date", "total"):
        centres = np.array([[(b[0] + b[2]) / 2, (b[1] + b[3]) / 2] for b in (one.boxes[name] for one in drawn)]) / 240
        assert (centres.std(0) > 0.15).all(), (name, centres.std(0))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"split": "test"}, "unknown split"),
        ({"kinds": ["tip"]}, "unknown kinds"),
        ({"kinds": []}, "unknown kinds"),
        ({"side": 20}, "too small to read"),
        ({"start": -1}, "cannot draw"),
    ],
)
def test_what_cannot_be_drawn_is_said(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        demo.documents(1, **asked)


# -------------------------------------------------------------------------------------------------------------- recipe


@pytest.fixture(scope="module")
def untrained() -> tuple[recipe.Net, Any, recipe.Loader]:
    torch.manual_seed(0)
    processor = recipe.build_processor()
    net = recipe.Net(recipe.build_model(processor.tokenizer)).eval()
    pool = recipe.Pool.draw("tune", 4, offset=0, workers=1)
    writer = recipe.Writer(processor.tokenizer)
    return net, processor, recipe.Loader(pool, writer, processor.image_processor, seed=0)


def test_training_sees_what_the_model_sees_through_its_processor(
    untrained: tuple[recipe.Net, Any, recipe.Loader],
) -> None:
    from PIL import Image

    net, processor, loader = untrained
    batch = loader.batch(1, room=80)
    pixels = batch.pixels[0].permute(1, 2, 0).numpy() * loader.std + loader.mean
    image = Image.fromarray(pixels.round().astype(np.uint8))
    first = batch.block[0].eq(0) | batch.block[0].eq(1)
    ids = batch.ids[:, first]
    text = processor.decode(ids[0]).replace("<image>" * recipe.TOKENS, "<image>")
    question = text.removeprefix("<s><user><image>").partition("<assistant>")[0].strip()
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    length = prompt["input_ids"].shape[1]
    assert prompt["input_ids"][0].tolist() == ids[0, :length].tolist()
    with torch.no_grad():
        real = net.model(**prompt).logits[0]
        trained = net.lm_head(net(batch)[1])[0, first][:length]
    torch.testing.assert_close(trained, real, atol=2e-5, rtol=1e-5)
    assert real.std() > 0.1  # not two of nothing


def test_the_recipe_runs_and_what_it_writes_is_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ("--scale", "0.001", "--document-pool", "9000", "--check", "100", "--room", "60", "--threads", "1")
    assert base.main(["--family", "document", "--out", str(tmp_path), *short]) == 0
    assert '"stage": "done"' in capsys.readouterr().out and not (tmp_path / "training.pt").exists()
    model, processor = probe.load(tmp_path)
    (scene,) = demo.documents(1)
    assert probe.ask(model, processor, scene.image, scene.question, max_new_tokens=2).replay.n_images == 1


def test_the_tower_is_taught_the_character_under_each_patch(
    untrained: tuple[recipe.Net, Any, recipe.Loader],
) -> None:
    _, _, loader = untrained
    for page, prints in zip(loader.pool.pages, loader.prints, strict=True):
        found = prints.under_patches((0, 0))
        total = page.texts[page.find("total")]
        right = 0
        for place, (character, box) in enumerate(zip(total.text, total.glyphs, strict=True)):
            across, down = (int((box[k] + box[k + 2]) / 2 * recipe.SIDE) // recipe.PATCH for k in (0, 1))
            patch = down * recipe.GRID + across
            told = (found["kind"][patch], found["name"][patch], found["place"][patch])
            wanted = (1 + recipe.CHARACTERS.find(character), 1 + recipe.NAMES.index("total"), 1 + place)
            right += told == wanted
        assert right >= 2  # two figures may share a patch, which then has the larger part


def test_what_cannot_be_read_is_answered_hidden(untrained: tuple[recipe.Net, Any, recipe.Loader]) -> None:
    _, _, loader = untrained
    page, prints = loader.pool.pages[0], loader.prints[0]
    shown = np.ones((recipe.SIDE, recipe.SIDE), np.float32)
    left, top, right, bottom = (round(edge * recipe.SIDE) for edge in page.texts[page.find("total")].glyphs[-1])
    shown[top:bottom, left:right] = 0  # the last figure of the total alone
    seen = recipe.readable(prints, shown, (0, 0))
    asker = recipe.Asker(np.random.default_rng(0), absent=0.0)
    told = {example.query.question: example for example in asker.ask(page, seen)}
    assert told["What is the total?"].seen == (False,) and told["What is the date?"].seen == (True,)
    assert told["Read the date and the total."].seen == (True, False)

    def written(example: base.Example, **options: Any) -> str:
        _ids, targets, _opens = loader.writer.write(example, **options)
        return str(loader.writer.tokenizer.decode([token for token in targets if token >= 0]))

    date = page.texts[page.find("date")].text
    assert written(told["Read the date and the total."]) == f'{{"date": "{date}", "total": "hidden"}}</s>'
    assert written(told["What is the date?"], swap=np.random.default_rng(1)) == f"The date is {date}.</s>"
    swapped = written(told["What is the total?"], swap=np.random.default_rng(1))
    assert swapped.count("hidden") == 3  # a target for each figure, whatever is said before it


# ------------------------------------------------------------------------------------------------------ what it made


@pytest.fixture(scope="module")
def reader() -> tuple[Any, Any]:
    return probe.load(SHIPPED)


def test_the_reader_is_small_and_an_ordinary_model(reader: tuple[Any, Any]) -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 2**21
    assert type(reader[0]).__name__ == "LlavaForConditionalGeneration"
    weights = load_file(SHIPPED / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert sum(parameter.numel() for parameter in reader[0].parameters()) == 660_384
    torch.manual_seed(0)
    built = recipe.build_model(recipe.build_processor().tokenizer)
    assert {k: v.shape for k, v in built.state_dict().items()} == {
        k: v.shape for k, v in reader[0].state_dict().items()
    }


def test_it_reads_documents_that_it_has_not_seen(reader: tuple[Any, Any]) -> None:
    found = evaluation.exact_match(*reader, n=12, seed=11, of="documents")
    assert sum(row["exact"] for row in found.values()) / len(found) >= 0.85, found


def test_the_map_of_a_value_stands_on_the_value(reader: tuple[Any, Any]) -> None:
    pointed, verdicts = [], []
    for scene in demo.documents(4, seed=12, kinds=["total", "date"]):
        answer = probe.ask(*reader, scene.image, scene.question)
        if answer.text != scene.answer:
            continue
        (one,) = (one for one in fields(answer.trace) if one.value == scene.visual_words[0])
        (place,) = locate(answer.replay, [one], progress=False, judge={"steps": 12})
        (name,) = scene.names
        boxes = [scene.boxes[name], scene.labels[name]]
        pointed.append(probe.metrics.pointing_game(place.heat, boxes))
        other = next(box for key, box in scene.boxes.items() if key != name)
        for box in (scene.boxes[name], other):
            given = AnswerBox("box", box, "", box, "pixels", 0, scene.image.size, ())
            verdicts.append(check_box(given, place.heat).lift)
        assert place.region is not None and place.region.area < 0.25
    assert len(pointed) >= 3 and np.mean(pointed) > 0.6, pointed
    own, others = np.array(verdicts[::2]), np.array(verdicts[1::2])
    assert (own > others + 0.05).mean() > 0.6 and np.median(own) > 0.1, (own, others)  # the label takes its part
