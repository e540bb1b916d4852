"""Readers of the data sets that the paper uses, in the layouts they are published in."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_probe.errors import StudyError
from lvlm_probe.study.datasets.files import find_file, folder, is_local, open_image, read_json, rows
from lvlm_probe.study.datasets.open_ended import (
    inline_choices,
    lettered,
    strip_choices,
    strip_instructions,
    true_choice,
)
from lvlm_probe.study.datasets.registry import Sample, register_dataset, replaced

if TYPE_CHECKING:
    from PIL import Image


def _open_ended(sample: Sample) -> Sample:
    """Without choices and instructions."""
    return replaced(sample, strip_instructions(strip_choices(sample.question)))


def _with_choices(question: str, choices: dict[str, str]) -> str:
    """A multiple-choice question as it is put to models."""
    return (
        question + "".join(f"\n({letter.upper()}) {text}" for letter, text in choices.items()) if choices else question
    )


def _loader(value: Any, where: str, *beside: Path) -> Callable[[], Image.Image]:
    return partial(open_image, value, where=where, beside=beside)


@register_dataset(
    "mmvp",
    layout="a directory with Questions.csv and images 1.jpg … 300.jpg (here or in a folder), or parquet with index, "
    "question, options, correct answer and image",
    relax=_open_ended,
)
def mmvp(source: str, *, split: str | None = None) -> Iterator[Sample]:
    """MMVP (Tong et al., 2024): 150 pairs of images that CLIP takes for alike; two choices each."""
    path = Path(os.path.expanduser(source))
    here = is_local(source) and path.is_dir()
    table = next(iter(sorted(path.rglob("Questions.csv"))), None) if here else None
    folders = sorted({file.parent for file in path.rglob("1.jpg")}) if here else []
    where = f"MMVP, {table or source}"
    empty = True
    for row in rows(table or source, what=where, split=split):
        empty = False
        index = row.text("Index", "lndex", "index", "question_id").strip()
        question = row.text("Question", "question").strip()
        choices = lettered(row.text("Options", "options"))
        true = row.column("Correct Answer", "Correct answer", "correct_answer", "answer")
        value = next((row[name] for name in ("image", "Image") if row.get(name) is not None), f"{index}.jpg")
        yield Sample(
            id=index,
            question=_with_choices(question, choices),
            load=_loader(value, f"MMVP, question {index}", *folders, path),
            answer=true_choice(str(true), choices),
            choices=tuple(choices.values()),
            group=None,
            annotations={"set": str((int(index) + 1) // 2)} if index.isdigit() else {},
        )
    if empty:
        raise StudyError(f"{where} holds no questions")


def _relax_cv_bench(sample: Sample) -> Sample:
    plain = str(sample.annotations.get("plain_question") or sample.question)
    return replaced(sample, strip_instructions(strip_choices(plain)))


@register_dataset(
    "cv-bench",
    layout="parquet or jsonl with idx, type, task, image or filename, question, choices, answer, prompt, source",
    relax=_relax_cv_bench,
)
def cv_bench(source: str, *, split: str | None = None, task: str | None = None) -> Iterator[Sample]:
    """CV-Bench (Tong et al., 2024): counting, relation, depth and distance.

    Args:
        task: Only this one (Count, Relation, Depth, Distance), e.g. ``task: Depth``.
    """
    path = Path(os.path.expanduser(source))
    beside = (path if path.is_dir() else path.parent,)
    where = f"CV-Bench, {source}"
    for row in rows(source, what=where, split=split):
        kind = row.text("task")
        if task is not None and kind.casefold() != task.casefold():
            continue
        index = row.text("idx")
        texts = [str(item) for item in row.column("choices")]
        choices = {chr(ord("a") + place): text for place, text in enumerate(texts)}
        question = row.text("question").strip()
        value = row.get("image")
        value = row.column("filename") if value is None else value
        yield Sample(
            id=index,
            question=str(row.get("prompt") or _with_choices(question, choices)),
            load=_loader(value, f"CV-Bench, {index}", *beside),
            answer=true_choice(row.text("answer"), choices),
            choices=tuple(texts),
            group=kind,
            annotations={"type": row.get("type"), "source": row.get("source"), "plain_question": question},
        )


@register_dataset(
    "mmstar",
    layout='parquet or jsonl with index, question (with "Options: A: …" in it), image, answer, category, l2_category',
    relax=_open_ended,
)
def mmstar(source: str, *, split: str | None = None, category: str | None = None) -> Iterator[Sample]:
    """MMStar (Chen et al., 2024): 1,500 questions that cannot be answered without the image, four choices each.

    Args:
        category: Only this one, e.g. ``category: math``.
    """
    path = Path(os.path.expanduser(source))
    beside = (path if path.is_dir() else path.parent,)
    where = f"MMStar, {source}"
    for row in rows(source, what=where, split=split or (None if is_local(source) else "val")):
        group = row.text("category")
        if category is not None and group.casefold() != category.casefold():
            continue
        index = row.text("index")
        question = row.text("question").strip()
        _, choices = inline_choices(question)
        yield Sample(
            id=index,
            question=question,
            load=_loader(row.column("image"), f"MMStar, {index}", *beside),
            answer=true_choice(row.text("answer"), choices),
            choices=tuple(choices.values()),
            group=group,
            annotations={"l2_category": row.get("l2_category")},
        )


@register_dataset(
    "llava-bench",
    layout="a directory with questions.jsonl (question_id, image, text, category) and images/",
)
def llava_bench(source: str, *, split: str | None = None) -> Iterator[Sample]:
    """LLaVA-Bench in the wild (Liu et al., 2024): open questions, without a true answer that a rule could judge by."""
    path = folder(source, "LLaVA-Bench")
    file = find_file(path, "questions.jsonl", what="LLaVA-Bench")
    where = f"LLaVA-Bench, {file}"
    for row in rows(file, what=where):
        index = row.text("question_id")
        name = row.text("image")
        yield Sample(
            id=index,
            question=row.text("text"),
            load=_loader(name, f"LLaVA-Bench, {index}", path / "images", path),
            group=row.text("category"),
        )


@register_dataset(
    "vqa-hat",
    layout="a directory with the questions of VQA v1 (*_questions.json, *_annotations.json if wished), the images "
    "COCO_*_<12 digits>.jpg, and human maps <question id>.png or <question id>_1.png … _3.png",
)
def vqa_hat(
    source: str,
    *,
    split: str | None = None,
    questions: str | None = None,
    maps: str | None = None,
    images: str | None = None,
) -> Iterator[Sample]:
    """VQA-HAT (Das et al., 2016): where people looked to answer a question; one or three maps per question.

    Args:
        questions: The file of questions, relative to the source, where its name does not say so, e.g.
            ``questions: v1/val.json``.
        maps: Folder of the human maps, relative to the source, e.g. ``maps: human``.
        images: Folder of the images, relative to the source, e.g. ``images: val2014``.
    """
    path = folder(source, "VQA-HAT")
    file = path / questions if questions else _one(path, "*questions*.json", split, "VQA-HAT")
    try:
        listed = read_json(file)["questions"]
    except (KeyError, TypeError) as error:
        raise StudyError(f"{file} is no question file of VQA v1 (an object with questions): {error!r}") from error
    answers = _vqa_answers(path, split)
    humans: dict[str, list[Path]] = {}
    for human in sorted((path / maps if maps else path).rglob("*.png")):
        found = re.fullmatch(r"(\d+)(?:_\d+)?", human.stem)
        if found:
            humans.setdefault(found[1], []).append(human)
    if not humans:
        raise StudyError(f"VQA-HAT: {path / maps if maps else path} holds no human maps <question id>.png")
    photos = {photo.stem[-12:]: photo for photo in sorted((path / images if images else path).rglob("*.jpg"))}
    for entry in listed:
        index, image = str(entry["question_id"]), f"{int(entry['image_id']):012d}"
        if index not in humans:
            continue
        where = f"VQA-HAT, question {index}"
        yield Sample(
            id=index,
            question=str(entry["question"]),
            load=_loader(photos.get(image, f"*_{image}.jpg"), where, path / images if images else path),
            answer=answers.get(index),
            annotations={"human": [_grey(file, where, path / maps if maps else path) for file in humans[index]]},
        )


def _vqa_answers(path: Path, split: str | None) -> dict[str, tuple[str, ...]]:
    files = [file for file in sorted(path.rglob("*annotations*.json")) if split is None or split in file.name]
    found: dict[str, tuple[str, ...]] = {}
    for file in files:
        try:
            for entry in read_json(file)["annotations"]:
                given = [str(answer["answer"]) for answer in entry.get("answers", ())]
                found[str(entry["question_id"])] = tuple(dict.fromkeys([str(entry["multiple_choice_answer"]), *given]))
        except (AttributeError, KeyError, TypeError) as error:
            raise StudyError(f"{file} is no annotation file of VQA v1: {error!r}") from error
    return found


def _one(path: Path, pattern: str, split: str | None, what: str) -> Path:
    found = [file for file in sorted(path.rglob(pattern)) if split is None or split in file.name]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise StudyError(f"{what}: one file {pattern} is needed in {path}, there is {names}; name it with questions:")
    return found[0]


def _grey(file: Path, where: str, folder: Path) -> np.ndarray:
    return np.asarray(open_image(file, where=where, beside=(folder,)).convert("L"), dtype=np.float32) / 255


@register_dataset(
    "hallusion-bench",
    layout="a directory with HallusionBench.json (category, subcategory, visual_input, set_id, figure_id, question_id, "
    "question, gt_answer, filename) and the images it names",
    relax=lambda sample: replaced(sample, strip_instructions(sample.question)),
)
def hallusion_bench(source: str, *, split: str | None = None) -> Iterator[Sample]:
    """HallusionBench (Guan et al., 2024). Questions without an image are left out: there is nothing to look at.

    Samples of one set are told apart by their ``role``: ``original``, ``counterfactual question`` (the same image,
    another question), ``counterfactual image`` (an edited image).
    """
    path = Path(os.path.expanduser(source))
    file: str | Path = source
    beside: tuple[Path, ...] = ()
    if is_local(source):
        file = find_file(path, "HallusionBench.json", what="HallusionBench") if path.is_dir() else path
        root = Path(file).parent
        beside = (root, root / "hallusion_bench", root / "images")
    where = f"HallusionBench, {file}"
    for row in rows(file, what=where, split=split):
        if row.text("visual_input") == "0":
            continue
        names = ("category", "subcategory", "set_id", "figure_id", "question_id")
        category, subcategory, group, figure, question = map(row.text, names)
        index = f"{category}-{subcategory}-{group}-{figure}-{question}"
        edited = str(row["visual_input"]) == "2"
        role = "counterfactual image" if edited else "original" if question == "0" else "counterfactual question"
        value = row.get("image")
        value = row.column("filename") if value is None else value
        true = row.text("gt_answer").strip()
        yield Sample(
            id=index,
            question=row.text("question"),
            load=_loader(value, f"HallusionBench, {index}", *beside),
            answer={"1": "yes", "0": "no"}.get(true, true),
            choices=("yes", "no") if true in ("0", "1") else (),
            group=f"{category}/{subcategory}",
            annotations={
                "set": f"{category}-{subcategory}-{group}",
                "role": role,
                "figure": figure,
                "question": question,
            },
        )


@register_dataset(
    "pope",
    layout="a directory with *pope*.json of JSON lines (question_id, image, text, label), or one of them, and the "
    "images it names, here or in val2014 or images; or parquet with question_id, question, answer, category, image",
)
def pope(source: str, *, split: str | None = None) -> Iterator[Sample]:
    """POPE (Li et al., 2023): is there such an object? Yes or no; the groups are random, popular and adversarial.

    Args:
        split: Of several files only those whose name holds it.
    """
    path = Path(os.path.expanduser(source))
    here = is_local(source) and path.is_dir()
    files: list[str | Path] = sorted(path.rglob("*pope*.json*")) if here else []  # type: ignore[assignment]
    files = [file for file in files if split is None or split in Path(file).name] or [source]
    root = path if here else path.parent
    beside = (root, root / "val2014", root / "images")
    for file in files:
        where = f"POPE, {file}"
        kind = re.search(r"random|popular|adversarial", Path(file).name)
        for row in rows(file, what=where, split=None if files != [source] else split):
            group = str(row.get("category") or (kind[0] if kind else "")) or None
            label = row.text("label", "answer").strip().casefold()
            index = "-".join(filter(None, [group, row.text("question_id")]))
            yield Sample(
                id=index,
                question=row.text("text", "question").strip(),
                load=_loader(row.column("image"), f"POPE, {index}", *beside),
                answer=label,
                choices=("yes", "no"),
                group=group,
            )


@register_dataset(
    "halloc",
    layout="a directory with halloc_vqa.json, halloc_instruct.json or halloc_caption.json, or one of them (prompt, "
    "source_text, hallucinated_text, image_id), and Visual Genome's images <image_id>.jpg, here or in VG_100K*",
)
def hal_loc(source: str, *, split: str | None = None) -> Iterator[Sample]:
    """HalLoc (Park et al., 2025): answers and captions in which hallucinations were put, beside the right ones.

    The right text is the answer, the other one the annotation ``contradiction``; which words are hallucinated follows
    from the two. The annotations of tokens by kind are not read.

    Args:
        split: ``vqa``, ``instruct`` or ``caption``; by default all that are there.
    """
    path = Path(os.path.expanduser(source))
    here = is_local(source) and path.is_dir()
    files: list[Path] = sorted(path.rglob("halloc_*.json*")) if here else [path]
    files = [file for file in files if split is None or split in file.name]
    if not files:
        raise StudyError(f"HalLoc: {source} has no halloc_{split or 'vqa, halloc_instruct or halloc_caption'}.json")
    root = path if here else path.parent
    beside = (root, root / "VG_100K", root / "VG_100K_2", root / "images")
    for file in files:
        where = f"HalLoc, {file}"
        group = file.stem.removeprefix("halloc_")
        for number, row in enumerate(rows(file, what=where), start=1):
            image = row.text("image_id")
            yield Sample(
                id=f"{group}-{number}",
                question=row.text("prompt").strip(),
                load=_loader(image if "." in image else f"{image}.jpg", row.where, *beside),
                answer=row.text("source_text").strip(),
                group=group,
                annotations={"contradiction": row.text("hallucinated_text").strip()},
            )
