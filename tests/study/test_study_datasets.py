"""Readers, on small files in exactly the layouts that the data sets are published in."""

from __future__ import annotations

import csv
import io
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run, succeed
from PIL import Image

from lvlm_probe.errors import ProbeError, StudyError
from lvlm_probe.study.datasets.open_ended import (
    inline_choices,
    lettered,
    strip_choices,
    strip_instructions,
    true_choice,
)
from lvlm_probe.study.datasets.registry import Sample, open_dataset, readers
from lvlm_probe.study.spec import read_study


def picture(colour: tuple[int, int, int] = (200, 10, 10), size: tuple[int, int] = (12, 8)) -> Image.Image:
    return Image.new("RGB", size, colour)


def encoded(colour: tuple[int, int, int] = (200, 10, 10)) -> bytes:
    out = io.BytesIO()
    picture(colour).save(out, "PNG")
    return out.getvalue()


def parquet(path: Path, rows: list[dict[str, Any]], *, images: bool = True) -> None:
    """A parquet file as the hub has it: pictures as bytes and path."""
    library = pytest.importorskip("datasets")
    found = library.Dataset.from_list(rows)
    if images:
        found = found.cast_column("image", library.Image())
    path.parent.mkdir(parents=True, exist_ok=True)
    found.to_parquet(str(path))


@pytest.mark.parametrize("heading", ["Index", "lndex"])
def test_mmvp(tmp_path: Path, heading: str) -> None:
    (tmp_path / "MMVP Images").mkdir()
    for index in (1, 2, 3):
        picture((index, 0, 0)).save(tmp_path / "MMVP Images" / f"{index}.jpg")
    with (tmp_path / "Questions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([heading, "Question", "Options", "Correct Answer"])
        writer.writerow([1, "Is the door open?", "(a) Open (b) Closed", "(a)"])
        writer.writerow([2, "Is the door open?", "(a) Open (b) Closed", "(b)"])
        writer.writerow([3, "How many, in all?", "(a) 1, at most (b) 2", "(b)"])
    found = list(open_dataset("mmvp", str(tmp_path)))
    assert [(sample.id, sample.answer) for sample in found] == [("1", "Open"), ("2", "Closed"), ("3", "2")]
    assert found[0].question == "Is the door open?\n(A) Open\n(B) Closed"
    assert found[0].choices == ("Open", "Closed")
    assert [sample.annotations["set"] for sample in found] == ["1", "1", "2"]
    assert found[1].image.size == (12, 8)
    relaxed = list(open_dataset("mmvp", str(tmp_path), open_ended=True))
    assert [sample.question for sample in relaxed] == ["Is the door open?"] * 2 + ["How many, in all?"]
    assert relaxed[2].choices == ("1, at most", "2")
    (tmp_path / "MMVP Images" / "2.jpg").unlink()
    with pytest.raises(StudyError, match=r"MMVP, question 2: the image 2\.jpg is missing"):
        _ = relaxed[1].image


def test_mmvp_as_parquet(tmp_path: Path) -> None:
    rows = [
        {
            "index": 1,
            "question": "Open?",
            "options": "(a) Yes (b) No",
            "correct_answer": "(b)",
            "image": {"bytes": encoded(), "path": "1.jpg"},
        }
    ]
    parquet(tmp_path / "data" / "test-00000.parquet", rows)
    (sample,) = open_dataset("mmvp", str(tmp_path))
    assert (sample.answer, sample.image.getpixel((0, 0))) == ("No", (200, 10, 10))


CV_ROW = {
    "idx": 0,
    "type": "2D",
    "task": "Count",
    "question": "How many organs are in the image?",
    "choices": ["3", "2", "1"],
    "answer": "(C)",
    "source": "ADE20K",
    "filename": "img/2D/count/ade20k_10.png",
    "prompt": "How many organs are in the image? Select from the following choices.\n(A) 3\n(B) 2\n(C) 1",
}


def test_cv_bench(tmp_path: Path) -> None:
    (tmp_path / "img" / "2D" / "count").mkdir(parents=True)
    picture().save(tmp_path / CV_ROW["filename"])
    file = tmp_path / "test.jsonl"
    file.write_text("\n".join(json.dumps({**CV_ROW, "idx": i, "task": t}) for i, t in enumerate(("Count", "Depth"))))
    first, second = open_dataset("cv-bench", str(file))
    assert (first.id, first.answer, first.choices, first.group) == ("0", "1", ("3", "2", "1"), "Count")
    assert first.question == CV_ROW["prompt"]
    assert first.image.size == (12, 8)
    (relaxed,) = open_dataset("cv-bench", str(file), open_ended=True, task="depth")
    assert (relaxed.id, relaxed.question) == (second.id, "How many organs are in the image?")
    parquet(tmp_path / "p" / "test.parquet", [{**CV_ROW, "image": {"bytes": encoded(), "path": None}}])
    (sample,) = open_dataset("cv-bench", str(tmp_path / "p"))
    assert sample.answer == "1" and sample.image.size == (12, 8)
    file.write_text(json.dumps({name: value for name, value in CV_ROW.items() if name != "choices"}))
    with pytest.raises(StudyError, match="row 1: there is no column 'choices'; it has 'idx', 'type'"):
        list(open_dataset("cv-bench", str(file)))


def test_mmstar(tmp_path: Path) -> None:
    row = {
        "index": 7,
        "question": "Which is true?\nOptions: A: The man, a guard, waits, B: Nobody waits, C: x, D: y",
        "image": {"bytes": encoded(), "path": None},
        "answer": "A",
        "category": "coarse perception",
        "l2_category": "scene",
    }
    parquet(tmp_path / "mmstar.parquet", [row])
    (sample,) = open_dataset("mmstar", str(tmp_path / "mmstar.parquet"))
    assert sample.answer == "The man, a guard, waits"
    assert sample.choices == ("The man, a guard, waits", "Nobody waits", "x", "y")
    assert sample.group == "coarse perception"
    assert sample.image.mode == "RGB"
    (relaxed,) = open_dataset("mmstar", str(tmp_path), open_ended=True)
    assert relaxed.question == "Which is true?"
    assert list(open_dataset("mmstar", str(tmp_path), category="math")) == []


def test_a_corrupt_picture_costs_its_own_sample_only(tmp_path: Path) -> None:
    rows = [
        {
            "index": i,
            "question": "q\nOptions: A: 1, B: 2",
            "image": {"bytes": data, "path": None},
            "answer": "B",
            "category": "c",
            "l2_category": "d",
        }
        for i, data in enumerate((b"not a picture", encoded()))
    ]
    parquet(tmp_path / "a.parquet", rows)
    broken, whole = open_dataset("mmstar", str(tmp_path))
    with pytest.raises(StudyError, match="MMStar, 0: the image cannot be read"):
        _ = broken.image
    assert whole.image.size == (12, 8)


def test_llava_bench(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "images" / "001.jpg")
    line = {"question_id": 0, "image": "001.jpg", "text": "What is the name of this place?", "category": "conv"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(line) + "\n\n")
    (sample,) = open_dataset("llava-bench", str(tmp_path), open_ended=True)
    assert (sample.id, sample.question, sample.answer, sample.group) == ("0", line["text"], None, "conv")
    assert sample.image.size == (12, 8)
    (tmp_path / "questions.jsonl").write_text("{")
    with pytest.raises(StudyError, match=r"questions\.jsonl, line 1: not JSON"):
        list(open_dataset("llava-bench", str(tmp_path)))
    with pytest.raises(StudyError, match="LLaVA-Bench: there is no directory"):
        list(open_dataset("llava-bench", str(tmp_path / "none")))


def test_vqa_hat(tmp_path: Path) -> None:
    questions = [
        {"question_id": 10, "image_id": 5, "question": "What color is the bus?"},
        {"question_id": 11, "image_id": 5, "question": "Without a map?"},
        {"question_id": 12, "image_id": 6, "question": "How many?"},
    ]
    (tmp_path / "OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": questions}))
    answer = {
        "question_id": 10,
        "multiple_choice_answer": "red",
        "answers": [{"answer": "red"}, {"answer": "dark red"}],
    }
    (tmp_path / "mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": [answer]}))
    (tmp_path / "val2014").mkdir()
    for image in (5, 6):
        picture().save(tmp_path / "val2014" / f"COCO_val2014_{image:012d}.jpg")
    (tmp_path / "maps").mkdir()
    looked = np.zeros((8, 12), np.uint8)
    looked[2:4, 3:6] = 255
    Image.fromarray(looked).save(tmp_path / "maps" / "10.png")
    for person in (1, 2, 3):
        Image.fromarray(looked).save(tmp_path / "maps" / f"12_{person}.png")
    first, second = open_dataset("vqa-hat", str(tmp_path))
    assert (first.id, first.answer) == ("10", ("red", "dark red"))
    assert (second.id, second.answer) == ("12", None)
    assert [len(sample.annotations["human"]) for sample in (first, second)] == [1, 3]
    np.testing.assert_allclose(first.annotations["human"][0], looked / 255, atol=1e-6)
    assert first.image.size == (12, 8)


def test_hallusion_bench(tmp_path: Path) -> None:
    def row(figure: str, question: str, visual: str, answer: str) -> dict[str, Any]:
        return {
            "category": "VS",
            "subcategory": "chart",
            "visual_input": visual,
            "set_id": "3",
            "figure_id": figure,
            "question_id": question,
            "question": f"q{question}?",
            "gt_answer": answer,
            "filename": f"./VS/chart/3_{figure}.png",
        }

    rows = [row("0", "0", "0", "1"), row("0", "0", "1", "1"), row("0", "1", "1", "0"), row("1", "0", "2", "0")]
    (tmp_path / "HallusionBench.json").write_text(json.dumps(rows))
    (tmp_path / "hallusion_bench" / "VS" / "chart").mkdir(parents=True)
    for figure in "01":
        picture().save(tmp_path / "hallusion_bench" / "VS" / "chart" / f"3_{figure}.png")
    found = list(open_dataset("hallusion-bench", str(tmp_path)))
    assert [sample.annotations["role"] for sample in found] == [
        "original",
        "counterfactual question",
        "counterfactual image",
    ]
    assert [sample.answer for sample in found] == ["yes", "no", "no"]
    assert {sample.annotations["set"] for sample in found} == {"VS-chart-3"}
    assert len({sample.id for sample in found}) == 3
    assert all(sample.image.size == (12, 8) for sample in found)


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_pope(tmp_path: Path, ending: str) -> None:
    (tmp_path / "val2014").mkdir()
    picture().save(tmp_path / "val2014" / "COCO_val2014_000000310196.jpg")
    for kind, label in (("random", "no"), ("adversarial", "yes")):
        row = {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a cat?", "label": label}
        lines = [json.dumps({**row, "question_id": number}) for number in (1, 2)]
        (tmp_path / f"coco_pope_{kind}.{ending}").write_text("\n".join(lines) + "\n")
    (tmp_path / "instances_val2014.json").write_text("{}")  # what else lies beside COCO's images
    found = list(open_dataset("pope", str(tmp_path)))
    assert [(sample.id, sample.answer) for sample in found] == [
        ("adversarial-1", "yes"), ("adversarial-2", "yes"), ("random-1", "no"), ("random-2", "no"),
    ]  # fmt: skip
    assert found[0].question == "Is there a cat?" and found[0].choices == ("yes", "no")
    assert found[0].group == "adversarial" and found[0].image.size == (12, 8)
    assert [sample.id for sample in open_dataset("pope", str(tmp_path), split="random")] == ["random-1", "random-2"]
    (alone, _) = open_dataset("pope", str(tmp_path / f"coco_pope_random.{ending}"))
    assert alone.image.size == (12, 8)


def test_pope_as_the_hub_has_it(tmp_path: Path) -> None:
    row = {"question_id": "7", "question": "Is there a dog?", "answer": "no", "category": "popular"}
    parquet(tmp_path / "test-00000.parquet", [{**row, "image": {"bytes": encoded(), "path": "a.png"}}])
    (sample,) = open_dataset("pope", str(tmp_path))
    assert (sample.id, sample.answer, sample.group) == ("popular-7", "no", "popular")
    assert sample.image.size == (12, 8)


def test_halloc(tmp_path: Path) -> None:
    (tmp_path / "VG_100K_2").mkdir()
    picture().save(tmp_path / "VG_100K_2" / "2356194.jpg")
    row = {
        "prompt": "What is on the table?",
        "source_text": "A red cup.",
        "hallucinated_text": "A red dog.",
        "annotations": {"object": [[2, 3]]},
        "image_id": 2356194,
    }
    (tmp_path / "halloc_vqa.json").write_text(json.dumps([row]))
    (tmp_path / "halloc_caption.json").write_text(json.dumps([{**row, "image_id": "2356194"}, {**row, "image_id": 1}]))
    found = list(open_dataset("halloc", str(tmp_path)))
    assert [sample.id for sample in found] == ["caption-1", "caption-2", "vqa-1"]
    assert (found[2].question, found[2].answer) == ("What is on the table?", "A red cup.")
    assert found[2].annotations["contradiction"] == "A red dog."
    assert found[0].image.size == found[2].image.size == (12, 8)
    with pytest.raises(StudyError, match=r"1\.jpg is missing"):
        _ = found[1].image
    assert [sample.group for sample in open_dataset("halloc", str(tmp_path), split="vqa")] == ["vqa"]
    with pytest.raises(StudyError, match="has no halloc_instruct"):
        list(open_dataset("halloc", str(tmp_path), split="instruct"))


@pytest.mark.quick
def test_a_table_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    picture().save(tmp_path / "photos" / "a.png")
    mask = np.zeros((8, 12), np.uint8)
    mask[0, 0] = 255
    Image.fromarray(mask).save(tmp_path / "photos" / "m.png")
    file = tmp_path / "mine.csv"
    file.write_text(
        "name,ask,file,true,options,where,spot\n"
        'x,"Which? (A) one (B) two",a.png,B,"(A) one (B) two","[[1, 2, 3, 4]]",\n'
        "y,Which?,a.png,,,,m.png\n"
    )
    columns = {
        "id": "name",
        "question": "ask",
        "image": "file",
        "answer": "true",
        "choices": "options",
        "boxes": "where",
        "mask": "spot",
    }
    first, second = open_dataset("table", str(file), columns=columns, images="photos")
    assert (first.id, first.answer, first.choices) == ("x", "two", ("one", "two"))
    assert first.annotations["region"] == [(1.0, 2.0, 3.0, 4.0)]
    assert second.answer is None
    assert second.annotations["region"].sum() == 1
    assert first.image.size == second.image.size == (12, 8)
    with pytest.raises(StudyError, match="columns has no 'picture'; it knows id, question"):
        list(open_dataset("table", str(file), columns={"picture": "file"}))
    with pytest.raises(StudyError, match="there is no column 'question'; it has 'name', 'ask'"):
        list(open_dataset("table", str(file)))
    file.write_text("question,image,boxes\nq,a.png,here\n")
    with pytest.raises(StudyError, match=r"row 1: boxes are \[\[x0, y0, x1, y1\]"):
        list(open_dataset("table", str(file)))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question": None}], "row 1: there is nothing in column 'question'"),
        ([{"question": float("nan")}], "nothing in column 'question'"),
        ([{"question": " "}], "nothing in column 'question'"),
        ([{"id": 7}, {"id": "7"}], "row 2: the id '7' stands in row 1 too"),
        ([{"answer": True}], "an answer is a text"),
        ([{"answer": 1, "choices": ["red", "blue"]}], "'1' is none of the choices, red, blue"),
        ([{"boxes": [[0.1, 0.2, 0.5, 1]]}], "in pixels; got .*shares of the image"),
        ([{"question": "What is in <image>?"}], "the question holds <image>"),
    ],
)
def test_what_a_table_does_not_say_is_not_made_up(tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"image": "a.png", "question": "q", **row}) + "\n" for row in rows))
    with pytest.raises(StudyError, match=said):
        list(open_dataset("table", str(file)))


def test_ids_and_answers_of_a_table_are_what_stands_there(tmp_path: Path) -> None:
    """An index that begins at 0, whole numbers beside missing ones, several answers, a choice that is a letter."""
    answers: list[Any] = [3.0, float("nan"), ["red", "scarlet"], "A", ""]
    rows = [{"id": number, "question": "<image>\nq", "answer": answer} for number, answer in enumerate(answers)]
    rows[3]["choices"] = ["B", "A"]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"image": "a.png", **row}) + "\n" for row in rows))
    found = list(open_dataset("table", str(file)))
    assert [sample.id for sample in found] == ["0", "1", "2", "3", "4"]
    assert [sample.answer for sample in found] == ["3", None, ("red", "scarlet"), "A", None]
    assert {sample.question for sample in found} == {"q"}
    file = tmp_path / "rows.csv"
    for text, said in {
        "image,question,answer\na.png\n": "nothing in column 'question'",
        "image,question,answer,answer\na.png,q,red,blue\n": "row 2: two columns are named 'answer'",
        'image,question,answer\na.png,q,"red\nb.png,q,blue\n': "row 2: .* a quote that is not closed",
        "image,question\na.png,q,blue\n": "row 2: it has 3 cells, and the header 2",
    }.items():
        file.write_text(text)
        with pytest.raises(StudyError, match=said):
            list(open_dataset("table", str(file)))


def test_a_mask_is_what_is_white_or_the_lighter_of_two_colours(tmp_path: Path) -> None:
    """0 and 255, 0 and 1, and a palette whose second colour is a dark red (PASCAL VOC) mean the same."""
    inside = np.zeros((8, 12), np.uint8)
    inside[2:4, 3:6] = 1
    voc = Image.fromarray(inside, "P")
    voc.putpalette([0, 0, 0, 128, 0, 0])
    soft = Image.fromarray(inside * 200)
    soft.putpixel((0, 0), 40)  # a third level, as JPEG and soft edges have
    kinds = [Image.fromarray(inside * 255), Image.fromarray(inside), Image.fromarray(inside.astype(bool)), voc, soft]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"image": "a.png", "question": "q", "mask": "m.png"}))
    for kind in kinds:
        kind.save(tmp_path / "m.png")
        (sample,) = open_dataset("table", str(file))
        assert np.array_equal(sample.annotations["region"], inside == 1)
    labels = inside.copy()
    labels[6, 6] = 2
    black, white = Image.new("L", (12, 8)), Image.new("L", (12, 8), 255)
    for none, said in ((Image.fromarray(labels), "nowhere white"), (black, "nowhere white"), (white, "white all over")):
        none.save(tmp_path / "m.png")
        with pytest.raises(StudyError, match=f"row 1: the mask is {said}"):
            list(open_dataset("table", str(file)))


def test_boxes_of_a_video_hold_from_a_frame_on(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    boxes: Any = {"20": [], "3": [[1, 2, 3, 4]], "0": [5, 6, 7, 8]}
    for given in (boxes, json.dumps(boxes)):
        file.write_text(json.dumps({"question": "q", "video": "a.mp4", "boxes": given}))
        (sample,) = open_dataset("table", str(file))
        assert sample.annotations == {"region": {0: [(5, 6, 7, 8)], 3: [(1, 2, 3, 4)], 20: []}}
        assert list(sample.annotations["region"]) == [0, 3, 20]
    for wrong in ([[1, 2, 3, 4]], {"-1": [[1, 2, 3, 4]]}, {"first": [[1, 2, 3, 4]]}, {"0": []}, {"0": [[1, 2]]}):
        file.write_text(json.dumps({"question": "q", "video": "a.mp4", "boxes": wrong}))
        with pytest.raises(StudyError, match=r"row 1: boxes (of a video are|are \[\[x0)"):
            list(open_dataset("table", str(file)))


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    for name in ("b/2.png", "a/1.jpg", "top.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture().save(tmp_path / name)
    found = list(open_dataset("images", str(tmp_path), question="What?"))
    assert [(sample.id, sample.group) for sample in found] == [("a/1.jpg", "a"), ("b/2.png", "b"), ("top.png", None)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudyError, match="holds no images"):
        list(open_dataset("images", str(tmp_path / "empty")))


@pytest.mark.quick
def test_demo_scenes_are_a_data_set() -> None:
    found = list(itertools.islice(open_dataset("demo", "eval", start=5), 3))
    assert [sample.id for sample in found] == ["5", "6", "7"]
    assert all(isinstance(sample, Sample) and sample.annotations["region"].any() for sample in found)
    hard = next(open_dataset("demo", "eval", hard=True))
    assert hard.question != found[0].question or hard.answer != found[0].answer


def test_reading_is_lazy(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "q", "image": "none.png"}) + "\nnot json\n")
    found = open_dataset("table", str(file))
    assert next(found).question == "q"
    with pytest.raises(StudyError, match="line 2"):
        next(found)


def test_unknown_names_and_options(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="did you mean 'mmstar'"):
        open_dataset("mmstr", "x")
    with pytest.raises(StudyError, match="data set mmvp has no option 'taks'; it has none"):
        open_dataset("mmvp", "x", taks="Count")
    with pytest.raises(StudyError, match="data set cv-bench has no option 'taks'; did you mean 'task'"):
        open_dataset("cv-bench", "x", taks="Count")
    with pytest.raises(StudyError, match="neither here nor a hub id"):
        list(open_dataset("table", str(tmp_path / "none.csv")))
    assert {
        "mmvp",
        "cv-bench",
        "mmstar",
        "llava-bench",
        "vqa-hat",
        "hallusion-bench",
        "table",
        "images",
        "demo",
    } <= set(readers())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(a) Open (b) Closed", {"a": "Open", "b": "Closed"}),
        ("A: 0, B: 1, C: two, or so, D: 3", {"a": "0", "b": "1", "c": "two, or so", "d": "3"}),
        ("A. red car\nB. blue car", {"a": "red car", "b": "blue car"}),
        ("no letters", {}),
        ("(A) vitamin C (B) vitamin D", {"a": "vitamin C", "b": "vitamin D"}),
    ],
)
def test_lettered(text: str, expected: dict[str, str]) -> None:
    assert lettered(text) == expected


def test_stripping() -> None:
    assert inline_choices("Why?\nOptions: A: x, B: y") == ("Why?", {"a": "x", "b": "y"})
    assert strip_choices("Which?\n(A) x\n(B) y") == "Which?"
    assert strip_choices("Is it A or B?") == "Is it A or B?"
    for instruction in (
        "Answer with the option's letter from the given choices directly.",
        "Please answer yes or no.",
        "Answer the question using a single word or phrase.",
        "Select from the following choices.",
    ):
        assert strip_instructions(f"What is it? {instruction}") == "What is it?"
    assert strip_instructions("What does he answer?") == "What does he answer?"
    assert strip_instructions("Which option did she choose on the menu?") == "Which option did she choose on the menu?"
    choices = {"a": "Open", "b": "Closed"}
    assert [true_choice(text, choices) for text in ("(b)", "B", "b.", "A) Open", "Closed")] == [
        "Closed",
        "Closed",
        "Closed",
        "Open",
        "Closed",
    ]
    assert true_choice("A cat", choices) == "A cat"


def test_only_whole_sentences_are_instructions() -> None:
    for question in (
        "What did he choose as his word of the day?",
        "Whom should the boy answer directly?",
        "Is the reply one of joy?",
    ):
        assert strip_instructions(question) == question
    hint = "Hint: Please answer with one of the following letters.\nQuestion: Which is it?"
    assert strip_instructions(hint) == "Question: Which is it?"


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ProbeError, match=r"pip install 'lvlm-probe\[study\]'"):
        list(open_dataset("mmstar", str(tmp_path)))
    (tmp_path / "b.jsonl").write_text(json.dumps({"question": "q", "image": "x.png"}))
    assert next(open_dataset("table", str(tmp_path / "b.jsonl"))).question == "q"  # needs no library


def test_a_data_set_in_a_study_file(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps({"ask": "Which?", "file": "a.png"}))
    text = (
        "models: {m: demo}\nmethods: {center: {}}\n"
        f"datasets:\n  mine: {{reader: table, source: {tmp_path / 'mine.jsonl'}, options: "
        "{columns: {question: ask, image: file}}}\n"
    )
    (tmp_path / "study.yaml").write_text(text)
    spec = read_study(tmp_path / "study.yaml").datasets["mine"]
    (sample,) = open_dataset(spec.reader, spec.source, **spec.options)
    assert sample.question == "Which?"


OWN = """\
models: {m: demo}
methods: {center: {}}
datasets:
  mine:
    reader: table
    source: mine.jsonl
    columns:
      question: ask
      image: file
    images: photos
"""


@pytest.mark.quick
def test_options_of_the_reader_stand_beside_the_other_keys(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(OWN)
    spec = read_study(path).datasets["mine"]
    assert spec.options == {"columns": {"question": "ask", "image": "file"}, "images": "photos"}
    under = OWN.replace("    images: photos\n", "    options: {images: photos}\n")
    path.write_text(under)
    assert read_study(path).datasets["mine"] == spec


@pytest.mark.parametrize(
    ("change", "line", "sentence"),
    [
        (("image: file", "imag: file"), 9, "columns has no 'imag'; did you mean 'image'?"),
        (("image: file", "image: 5"), 9, "columns has 'image', which is a text, not 5"),
        (("    columns:", "    colums:"), 7, "data set mine has no 'colums'; did you mean 'columns'?"),
        (("images: photos", "images: [photos]"), 10, "images is a text, not ['photos']"),
        (("images: photos", "options: {imges: photos}"), 10, "has no option 'imges'; did you mean 'images'?"),
        (("images: photos", "options: {columns: {}}"), 7, "has 'columns' twice"),
        (("reader: table", "reader: tabel"), 5, "there is no reader 'tabel'; did you mean 'table'?"),
        (("reader: table", "reader: images"), 7, "data set mine has no 'columns'; it knows reader, source"),
    ],
)
def test_a_wrong_option_is_named_with_its_line(
    tmp_path: Path, change: tuple[str, str], line: int, sentence: str
) -> None:
    assert change[0] in OWN
    (tmp_path / "study.yaml").write_text(OWN.replace(*change, 1))
    with pytest.raises(StudyError, match=f"line {line}: ") as caught:
        read_study(tmp_path / "study.yaml")
    assert sentence in str(caught.value)


def test_columns_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("ask,photo,truth\nWhich?,none.png,red\n")
    peek = ("study", "peek", "table", tmp_path / "x.csv", "--json")
    for given in (
        ("--param", "columns.image=photo", "--param", "columns.question=ask", "--param", "columns.answer=truth"),
        ("--column", "image=photo", "--column", "question=ask", "--column", "answer=truth"),
        ("--param", "columns={image: photo, question: ask}", "--column", "answer=truth"),
    ):
        (facts,) = succeed(*peek, *given).json
        assert (facts["question"], facts["answer"]) == ("Which?", "red")
        assert "none.png is missing" in facts["image"]
    for wrong, sentence in (
        ("columns=photo", "columns is a mapping (id: value), not 'photo'"),
        ("columns.imag=photo", "columns has no 'imag'; did you mean 'image'?"),
        ("colums.image=photo", "no option 'colums'; did you mean 'columns'?"),
    ):
        result = run(*peek, "--param", wrong)
        assert result.code == 2 and sentence in " ".join(result.err.split())
    both = run(*peek, "--param", "columns=5", "--param", "columns.image=photo")
    assert both.code == 2 and "as a value and as a mapping" in " ".join(both.err.split())
    assert run(*peek, "--param", "columns=5", "--column", "image=photo").code == 2


@pytest.mark.quick
def test_the_commands(tmp_path: Path) -> None:
    listed = succeed("study", "datasets").out
    assert "mmvp" in listed and "Questions.csv" in listed
    assert set(succeed("study", "datasets", "--json").json) >= {"cv-bench", "hallusion-bench"}
    row = {"index": 7, "question": "Which?\nOptions: A: x, B: y", "image": "none.png", "answer": "B", "category": "c"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    result = succeed("study", "peek", "mmstar", tmp_path / "a.jsonl", "--open-ended")
    assert "Options" not in result.out and "x, y" in result.out and "none.png is missing" in result.out
    (first, second) = succeed("study", "peek", "demo", "eval", "--limit", "2", "--param", "start=4", "--json").json
    assert (first["id"], second["id"], first["image"]) == ("4", "5", "336 x 336")
    region, contradiction = first["annotations"]
    assert region == "region (336 x 336)" and contradiction.startswith("contradiction The ")
    wrong = run("study", "peek", "mmvp", tmp_path)
    assert wrong.code == 2 and "Traceback" not in wrong.err
