"""Data sets that nobody has checked: pictures outside of them, JSON without end, options of any type."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lvlm_probe.errors import StudyError
from lvlm_probe.study import open_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set's directory, and beside it a picture that is nobody's business."""
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (20, 20)).save(folder / "ok.png")
    Image.new("RGB", (50, 40)).save(tmp_path / "private.png")
    (folder / "link.png").symlink_to(tmp_path / "private.png")
    os.mkfifo(folder / "fifo.png")
    return folder


def written(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("link.png", "lies outside of"),
        ("../private.png", "lies outside of"),
        ("/etc/passwd", "lies outside of"),
        ("PRIVATE", "lies outside of"),
        ("fifo.png", "is missing"),
        (".", "is missing"),
        ("a\0b.png", "is missing"),
        ("a" * 5000, "is missing"),
        ("~nosuchuser/a.png", "is missing"),
    ],
)
def test_pictures_are_of_the_data_set(folder: Path, name: str, said: str) -> None:
    name = name.replace("PRIVATE", str(folder.parent / "private.png"))
    source = written(folder, [{"id": 1, "question": "q", "image": name}, {"id": 2, "question": "q", "image": "ok.png"}])
    bad, good = open_dataset("table", source)
    with pytest.raises(StudyError, match=said):
        _ = bad.image
    assert good.image.size == (20, 20)
    source = written(folder, [{"id": 1, "question": "q", "image": "ok.png", "mask": name}])
    with pytest.raises(StudyError, match=said):
        list(open_dataset("table", source))


def test_a_directory_that_is_named_is_followed_into(folder: Path) -> None:
    source = written(folder, [{"id": 1, "question": "q", "image": "link.png"}])
    (sample,) = open_dataset("table", source, images=str(folder.parent))
    assert sample.image.size == (50, 40)


def test_pictures_of_a_folder(folder: Path) -> None:
    found = {sample.id: sample for sample in open_dataset("images", str(folder))}
    assert found["ok.png"].image.size == (20, 20)
    for name, said in (("link.png", "lies outside of"), ("fifo.png", "is missing")):
        with pytest.raises(StudyError, match=said):
            _ = found[name].image


@pytest.mark.parametrize(
    "boxes",
    ["[" * 100_000, "[[1, 2, 3, 1e999]]", "[[NaN, 1, 2, 3]]", [1, 2, 3], {"a": 1}, 5, [[[1]] * 4], "x" * 10_000],
)
def test_boxes(folder: Path, boxes: Any) -> None:
    source = written(folder, [{"id": 1, "question": "q", "image": "ok.png", "boxes": boxes}])
    with pytest.raises(StudyError, match="row 1: boxes are") as caught:
        list(open_dataset("table", source))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.jsonl", b"[" * 100_000),
        ("rows.jsonl", b'{"a":' * 50_000),
        ("rows.jsonl", b'{"id": "\xff"}'),
        ("rows.jsonl", b'{"id": ' + b"9" * 5000 + b"}"),
        ("rows.json", b"[" * 100_000),
        ("rows.json", b"\xff\xfe"),
        ("rows.json", b'{"a": 1}\n[1]'),
        ("rows.csv", b"a,b\n" + b"x" * 200_000),
        ("rows.csv", b"a\xff,b\n1,2"),
        ("rows.csv", b"id,question\n\0,1\n"),
        ("rows.tsv", b""),
    ],
)
def test_files_that_are_no_table(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    try:
        found = list(open_dataset("table", str(folder / name)))
    except StudyError as error:
        assert name in str(error)  # noqa: PT017
    else:
        assert not found


@pytest.mark.parametrize(
    ("reader", "source", "options"),
    [
        ("table", "DATA", {"columns": 5}),
        ("table", "DATA", {"columns": {"id": 5}}),
        ("table", "DATA", {"columns": {"id": ["a"]}}),
        ("table", "DATA", {"images": 5}),
        ("table", "DATA", {"nothing": 5}),
        ("demo", "nowhere", {}),
        ("demo", "eval", {"start": "a"}),
        ("demo", "eval", {"start": -1}),
        ("demo", "eval", {"seed": -1}),
        ("demo", "eval", {"human": [1]}),
        ("images", "DIR", {"question": 5, "more": 1}),
        ("vqa-hat", "DIR", {"questions": 5}),
        ("mmvp", "~nosuchuser/x", {}),
        ("llava-bench", "a\0b", {}),
        ("hallusion-bench", "DATA", {}),
        ("cv-bench", "DATA", {"task": 5}),
    ],
)
def test_options_of_the_wrong_type(folder: Path, reader: str, source: str, options: dict[str, Any]) -> None:
    places = {"DATA": written(folder, [{"id": 1, "question": "q", "image": "ok.png"}]), "DIR": str(folder)}
    with pytest.raises(StudyError):
        for _ in zip(range(2), open_dataset(reader, places.get(source, source), **options), strict=False):
            pass
