"""Rows of answers that nobody can use, or that somebody means harm with: each costs itself, and is told why."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from campaigns import texts
from PIL import Image

import lvlm_probe as probe
from lvlm_probe.errors import ImageError, ProbeError, StudyError
from lvlm_probe.importing import REJECTED, import_answers, row_files, rows
from lvlm_probe.importing.meter import Reading, Unread, measure
from lvlm_probe.importing.rows import AnswerRow, BadRow, count_rows, read_rows
from lvlm_probe.trace import open_store
from lvlm_probe.trace.image_files import open_image_file

ROW = {"image": "ok.png", "question": "What color is the circle?", "answer": "The circle is red."}
GOOD = json.dumps(ROW)
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"


def row(**fields: Any) -> str:
    return json.dumps({**ROW, **fields})


LINES: dict[str, tuple[str | bytes, str]] = {
    "deep nesting": ("[" * 100_000, "too deep"),
    "deep nesting in a field": ('{"image": "ok.png", "x": ' + "[" * 20_000 + "]" * 20_000 + "}", "too deep"),
    "deep objects": ('{"a":' * 50_000, "too deep"),
    "int of 5000 digits": ('{"id": ' + "9" * 5000 + "}", "not JSON"),
    "a log-probability of 400 digits": (row(token_ids=[5, 6], logprobs=[-(10**400), -1]), "too large"),
    "true as a log-probability": (row(logprobs=[True]), "no number"),
    "infinity as a log-probability": (row(logprobs=[float("inf")]), "above 0"),
    "true as a token": (row(token_ids=[True]), "list of whole numbers"),
    "a token of 100 digits": (row(token_ids=[10**100]), "outside the model's vocabulary"),
    "a token below 0": (row(token_ids=[-1]), "list of whole numbers"),
    "no UTF-8": (b'{"image": "ok.png", "question": "\xff"}', "not UTF-8: byte 0xff at 33"),
    "half a UTF-8 character": (GOOD.encode()[:-10] + b"\xe2\x82", "not UTF-8"),
    "NUL": (b"\0\0\0", "not JSON"),
    "NUL in a path": (row(image="a\0b.png"), "missing"),
    "a path of 5000": (row(image="a" * 5000), "missing"),
    "no such home": (row(image="~nosuchuser/x.png"), "missing"),
    "half a character in the question": (row(question="\ud800 What?"), "U+D800"),
    "half a character in the answer": (row(answer="red \udfff"), "U+DFFF"),
    "half a character in a path": (row(image="\ud800.png"), "missing"),
    "half a character in an id": (row(id="\ud800", image="missing.png"), "missing"),
    "answer of 200 kB": (row(answer="The circle is red. " * 10_000), "made for 512 positions"),
    "tokens of 200 kB": (row(token_ids=[5] * 200_000), "made for 512 positions"),
    "an answer a little too long": (row(answer="red " * 480), "made for 512 positions"),
    "500 pictures": (row(image=["ok.png"] * 500), "32009 tokens of the prompt"),
    "600 images": (row(image=["ok.png"] * 600), "600 images"),
    "a million keys": (json.dumps({str(n): 0 for n in range(100_000)}), "there is no image"),
    "a list": ("[1, 2]", "a row is an object, not list"),
    "a number": ("5", "a row is an object, not int"),
    "NaN": ("NaN", "a row is an object, not float"),
    "a picture that is a number": (row(image=5), "there is no image"),
    "an answer that is a number": (row(answer=5), "the answer is a text, not int"),
    "a picture that is SVG": (row(image="data:image/svg+xml;base64,PHN2Zy8+"), "cannot be read"),
    "a picture that is PostScript": (
        row(image=f"data:image/png;base64,{base64.b64encode(POSTSCRIPT).decode()}"),
        "cannot be read",
    ),
    "a pipe": (row(image="fifo.png"), "missing"),
    "a directory": (row(image="."), "missing"),
    "a URL": (row(image="http://example.com/x.png"), "lies on the network"),
    "/etc/passwd": (row(image="/etc/passwd"), "lies outside of"),
    "a relative way out": (row(image="../" * 20 + "etc/passwd"), "lies outside of"),
    "a private picture": (row(image="PRIVATE"), "lies outside of"),
    "a link to a private picture": (row(image="link.png"), "lies outside of"),
    "a private picture by a linked directory": (row(image="linked/private.png"), "lies outside of"),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a picture, and ways out of it to one that is nobody's business."""
    place, private = tmp_path_factory.mktemp("rows"), tmp_path_factory.mktemp("private")
    Image.new("RGB", (112, 112), (200, 10, 10)).save(place / "ok.png")
    Image.new("RGB", (50, 40)).save(private / "private.png")
    (place / "link.png").symlink_to(private / "private.png")
    (place / "linked").symlink_to(private)
    os.mkfifo(place / "fifo.png")
    (place / "private").write_text(str(private / "private.png"))
    return place


def line_of(name: str, place: Path) -> bytes:
    text = LINES[name][0]
    data = text if isinstance(text, bytes) else text.encode("utf-8")
    return data.replace(b"PRIVATE", (place / "private").read_bytes())


def test_a_bad_line_costs_itself(demo: Any, place: Path, tmp_path: Path) -> None:
    file = place / "a.jsonl"
    file.write_bytes(b"\n".join([GOOD.encode(), *(line_of(name, place) for name in LINES), GOOD.encode(), b""]))
    for again in (False, True):
        result = import_answers(file, *demo, tmp_path, llr=False, attention=False)
        assert len(result.imported) == (0 if again else 2)
        assert result.present == ((1, len(LINES) + 2) if again else ())
        for number, name in enumerate(LINES, start=2):
            assert LINES[name][1] in result.rejected.get(number, "taken over"), name
    assert {trace.image.size for trace in open_store(tmp_path)} == {(112, 112)}, "a private picture is in a trace"
    written = [json.loads(line) for line in (tmp_path / REJECTED).read_text(encoding="utf-8").splitlines()]
    assert {entry["line"]: entry["reason"] for entry in written} == dict(result.rejected)
    assert all(len(reason) <= 400 for reason in result.rejected.values())


def test_a_bad_line_costs_the_meter_itself(demo: Any, place: Path) -> None:
    file = place / "meter.jsonl"
    names = ["deep nesting", "no UTF-8", "a private picture", "answer of 200 kB", "half a character in an id"]
    file.write_bytes(b"\n".join([GOOD.encode(), *(line_of(name, place) for name in names), GOOD.encode(), b""]))
    found = list(measure(file, *demo))
    assert [type(one) for one in found] == [Reading, *[Unread] * len(names), Reading]
    assert all(LINES[name][1] in one.reason for name, one in zip(names, found[1:-1], strict=True))  # type: ignore[union-attr]


def test_marks_at_the_beginning_of_a_file(demo: Any, place: Path, tmp_path: Path) -> None:
    file = place / "bom.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n")
    ((_, found),) = read_rows(file)
    assert isinstance(found, AnswerRow)
    file.write_bytes(GOOD.encode("utf-16"))
    with pytest.raises(StudyError, match="UTF-16; save it as UTF-8"):
        list(read_rows(file))
    with pytest.raises(StudyError, match="UTF-16"):
        import_answers(file, *demo, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(StudyError, match="no such file"):
        list(read_rows(place / "fifo.png"))


def test_a_line_that_is_too_long_to_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "LONGEST_LINE", 1000)
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join([GOOD, row(x="a" * 5000), GOOD]))
    first, second, third = (found for _, found in read_rows(file))
    assert isinstance(first, AnswerRow) and isinstance(third, AnswerRow)
    assert isinstance(second, BadRow) and "longer than 1000 bytes" in str(second)
    assert count_rows(file) == 3


def test_pictures_that_would_fill_the_memory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_LARGEST_IMAGES", 3 * 112 * 112)
    file = place / "many.jsonl"
    file.write_text(row(image=["ok.png"] * 4))
    ((_, found),) = read_rows(file)
    assert isinstance(found, AnswerRow)
    with pytest.raises(BadRow, match="4 images have more than"):
        found.open_images([place])


def test_a_directory_that_is_named_is_followed_into(demo: Any, place: Path, tmp_path: Path) -> None:
    private = Path((place / "private").read_text())
    file = place / "named.jsonl"
    file.write_text("\n".join([row(image="private.png"), row(image=str(private), id="2"), row(image="link.png")]))
    options = {"llr": False, "attention": False}
    result = import_answers(file, *demo, tmp_path / "a", images=private.parent, **options)
    assert not result.rejected
    assert {trace.image.size for trace in open_store(tmp_path / "a")} == {(50, 40)}


def test_only_formats_that_are_pixels_are_opened(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    os.replace(tmp_path / "a.eps", tmp_path / "a.png")
    with pytest.raises(ImageError, match="not an image that can be read"):
        open_image_file(tmp_path / "a.png")
    for name in ("a\0b.png", "a" * 5000):
        with pytest.raises(ImageError, match="there is no such file"):
            open_image_file(tmp_path / name)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_broken_pictures_are_refused_in_words(form: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((40, 40), 50).convert("RGB").save(buffer, form)
    data = buffer.getvalue()
    for step in range(1, 40):
        blob = bytearray(data)
        blob[(step * 37) % len(blob)] ^= 0xFF
        (tmp_path / "a.png").write_bytes(bytes(blob[: len(blob) - (step % 3) * len(blob) // 5]))
        with contextlib.suppress(ImageError):
            assert open_image_file(tmp_path / "a.png").mode == "RGB"


def test_two_imports_into_one_directory_take_each_row_once(place: Path, tmp_path: Path) -> None:
    file = place / "both.jsonl"
    file.write_text("\n".join(row(answer=f"The circle is {colour}.") for colour in ("red", "blue", "green", "red")))
    results: list[Any] = []
    together = threading.Barrier(2)

    def run() -> None:
        model, processor = probe.demo.load()
        together.wait()
        results.append(import_answers(file, model, processor, tmp_path, llr=False, attention=False))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers = sorted(trace.answer.split()[-1] for trace in open_store(tmp_path))
    assert len(answers) == 4, answers
    assert sorted(len(result.imported) + len(result.present) for result in results) == [4, 4]
    assert sum(len(result.imported) for result in results) == 4


def test_a_link_planted_for_the_rejected_rows_is_not_followed(demo: Any, place: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / REJECTED).symlink_to(victim)
    (place / "one.jsonl").write_text("5\n")
    with pytest.raises(ProbeError, match="cannot be written"):
        import_answers(place / "one.jsonl", *demo, tmp_path / "out")
    assert victim.read_text() == "mine"


def test_mutated_rows_cost_themselves() -> None:
    tally = texts.ROWS.run(0, 400, 1)
    assert tally.tried == 400
    assert not tally.broken, tally.examples
    assert min(tally.counts["read"], tally.counts["refused"]) > 50
