"""The language-prior meter: its numbers by hand, what it costs, and the csv and the page that it writes."""

from __future__ import annotations

import base64
import csv
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run, succeed
from PIL import Image

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError, ReportError, StudyError
from lvlm_probe.importing.forced_recorder import forced
from lvlm_probe.importing.meter import (
    COLUMNS,
    Reading,
    Unread,
    columns_of,
    measure,
    ranked,
    read_answer,
    worst_words,
    write_csv,
)
from lvlm_probe.importing.rows import AnswerRow
from lvlm_probe.pages.prior import write_page
from lvlm_probe.recording.recorder import RecordOptions
from lvlm_probe.trace import write

PIECES = ["A", " yel", "low", " cat", ".", "</s>"]
SPECIAL = [False] * 5 + [True]
LOG_P = [-0.1, -0.2, -0.1, -4.4, 0.0, -2.0]
TOP = [-0.1, -0.17, -0.05, -0.5, 0.0, -0.1]
TOKENS = ["A", " yel", "low", " dog", ".", " or"]
LLR = [0.0, 0.5, 0.6, 2.0, -0.1, 50.0]
NO = [0.0] * 6


def reading(llr: list[float] = LLR, **facts: Any) -> Reading:
    known = {"source": "a.jsonl, line 1", "id": None, "question": "What is it?"}
    known |= {"top_log_probs": LOG_P, "top_tokens": PIECES}
    return read_answer(PIECES, SPECIAL, LOG_P, llr, **{**known, **facts})


def surprised(llr: list[float] = LLR, **facts: Any) -> Reading:
    return reading(llr, **{"top_log_probs": TOP, "top_tokens": TOKENS, **facts})


def test_numbers_by_hand() -> None:
    found = surprised()
    assert found.answer == "A yellow cat."
    assert [word.text for word in found.words] == ["A", "yellow", "cat", "."]
    assert [word.llr for word in found.words] == pytest.approx([0.0, 1.1, 2.0, -0.1])  # yellow by its tokens together
    assert [word.surprise for word in found.words] == pytest.approx([0.0, 0.05, 3.9, 0.0])  # and the worst of them
    assert [word.origin for word in found.words] == ["habit", "image", "unlikely", None]  # the full stop does not count
    assert (found.figures.image, found.figures.habit, found.figures.unlikely) == pytest.approx((1 / 3,) * 3)
    assert found.figures.mean_llr == pytest.approx(3.1 / 3) and found.figures.words == 3
    assert found.figures.worst is found.words[2] and found.words[2].instead == "dog"
    assert found.mean_log_prob == pytest.approx(-4.8 / 5)  # without the end of the answer
    assert found.origin == "unlikely" and not found.bound
    assert [word.origin for word in surprised(threshold=4.0).words][:3] == ["habit", "image", "image"]
    assert [word.text for word in reading(alpha=1.5).from_("image")] == ["cat"]


def test_the_class_of_an_answer() -> None:
    assert reading().origin == "image"
    assert reading(NO).origin == "habit"
    assert reading([-400.0] * 6).origin == "habit"
    assert reading([math.nan] * 6).origin == "unknown" and math.isnan(reading([math.nan] * 6).figures.image)
    assert surprised(NO).origin == "unlikely", "a word that this model would not have said is one, whatever its LLR"
    without = reading(top_log_probs=None, top_tokens=None)
    assert without.bound and without.figures.worst is not None
    assert without.figures.worst.surprise == pytest.approx(4.4), "no more is known of it than that P is at most 1"
    signs = read_answer(["?", "!"], [False, False], [0, 0], [2, 2], source="s", id=None, question="q")
    assert signs.origin == "unknown" and signs.figures.words == 0
    with pytest.raises(ExplainError, match="no tokens besides special ones"):
        read_answer(["</s>"], [True], [0], [0], source="s", id=None, question="q")


@pytest.mark.quick
@pytest.mark.parametrize("each", [0.013, 0.3, 0.99, 1.01, 3.0])
@pytest.mark.parametrize("behind", [0.0, 2.9, 3.1])
def test_an_answer_that_is_said_again_and_again_is_of_the_same_class(each: float, behind: float) -> None:
    """What a joint probability cannot do: ten tokens, each e^0.013 likelier, kept 88 % of it, three hundred 2 %."""

    def of(words: int) -> Reading:
        pieces = [f" word{number}" for number in range(words)]
        numbers = {"top_log_probs": [behind - 4.0] * words, "top_tokens": pieces, "id": None, "question": "q"}
        return read_answer(pieces, [False] * words, [-4.0] * words, [each] * words, source="s", **numbers)

    short, long = of(10), of(300)
    assert short.origin == long.origin == ("unlikely" if behind > 3 else "image" if each > 1 else "habit")
    for name in ("image", "habit", "unlikely", "mean_llr"):
        assert getattr(short.figures, name) == pytest.approx(getattr(long.figures, name))


def test_sentence_by_sentence() -> None:
    text = "It is 3.5 m tall. “A dog!” The cat 。猫\nRed one"
    pieces = [
        "It",
        " is",
        " 3.5",
        " m",
        " tall",
        ".",
        " “A",
        " dog",
        "!”",
        " The",
        " cat",
        " 。",
        "猫",
        "\n",
        "Red",
        " one",
    ]
    assert "".join(pieces) == text
    top, llr = np.zeros(16), np.zeros(16)
    top[7] = 9.0
    llr[[10, 12, 14]] = 5.0
    told = {"top_log_probs": top, "top_tokens": ["x"] * 16, "source": "s", "id": None, "question": "q"}
    found = read_answer(pieces, [False] * 16, [0.0] * 16, llr, **told)
    assert [sentence.words for sentence in found.sentences] == [5, 2, 2, 1, 2]
    assert [sentence.origin for sentence in found.sentences] == ["habit", "unlikely", "image", "image", "image"]
    assert columns_of(found)["sentences_unlikely"] == 1 and columns_of(found)["sentences_from_habit"] == 1


def test_the_worst_come_first() -> None:
    readings = [
        reading(source="image"),
        reading(NO, source="habit"),
        surprised(source="worse", top_log_probs=[*TOP[:2], 0.0, 7.0, *TOP[4:]]),
        reading([math.nan] * 6, source="unknown"),
        surprised(source="bad"),
        reading([-9.0] * 6, source="against"),
    ]
    assert [one.source for one in ranked(readings)] == ["worse", "bad", "against", "habit", "image", "unknown"]
    found = worst_words(readings)
    assert [(word.text, one.source) for word, one in found] == [("cat", "worse"), ("cat", "bad")]
    both = surprised(top_log_probs=[8.0, *TOP[1:]])
    assert [word.text for word in both.from_("unlikely")] == ["A", "cat"], "the most surprising first"


# ------------------------------------------------------------------------------------------------------- on the model


@pytest.fixture(scope="module")
def asked(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recorded answers, one of them with its ratios deferred, and a jsonl of them and of two more."""
    model, processor = demo
    directory = tmp_path_factory.mktemp("asked")
    rows = []
    with probe.attach(model, processor) as p:
        for number, scene in enumerate(probe.demo.scenes(2, kinds=["pair", "colour"])):
            scene.image.save(directory / f"{number}.png")
            with p.record(directory / "traces", llr=number == 0, question=scene.question) as recording:
                inputs = processor.apply_chat_template(
                    scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
                )
                model.generate(**inputs, max_new_tokens=32, do_sample=False)
            ids = recording.traces[0].token_ids.tolist()
            rows.append({"id": f"q{number}", "image": f"{number}.png", "question": scene.question, "token_ids": ids})
    rows.append({**rows[0], "image": "none.png"})
    (directory / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return directory


class Passes:
    """Counts the pictures that a model sees."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.count = 0
        self._handle = model.register_forward_hook(self._seen)

    def _seen(self, *_: Any) -> None:
        self.count += 1

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def test_a_file_costs_one_extra_pass_per_answer(demo: Any, asked: Path) -> None:
    model, processor = demo
    with Passes(model) as passes:
        found = list(measure(asked / "answers.jsonl", model, processor))
    assert passes.count == 2 * 2
    first, second, missing = found
    assert isinstance(missing, Unread) and missing.source == "answers.jsonl, line 3" and "none.png" in missing.reason
    store = probe.open_store(asked / "traces")
    for one, trace in zip((first, second), store, strict=True):
        assert isinstance(one, Reading)
        assert one.elsewhere and one.answer == trace.answer and one.thumbnail is not None
        replay = probe.replay(trace, model, processor).over("blur")
        ratios = (torch.tensor(trace.log_probs) - replay.baseline_log_probs)[~replay.special]
        counted = [word for word in one.words if word.origin is not None]
        assert sum(word.llr for word in one.words) == pytest.approx(float(ratios.sum()), abs=1e-3)
        assert max(word.surprise for word in counted) == pytest.approx(0.0, abs=1e-4), "the model's own greedy answer"
    assert isinstance(second, Reading) and second.origin == "image" and len(second.from_("image")) == 1


def test_traces_cost_what_they_lack(demo: Any, asked: Path) -> None:
    model, processor = demo
    without = list(measure(asked / "traces"))
    assert isinstance(without[0], Reading) and isinstance(without[1], Unread)
    assert "give the model" in without[1].reason
    with Passes(model) as passes:
        first, second = measure(asked / "traces", model, processor)
    assert passes.count == 1
    assert isinstance(first, Reading) and isinstance(second, Reading)
    assert not first.elsewhere
    trace = probe.open_store(asked / "traces")[0]
    assert sum(word.llr for word in first.words) == pytest.approx(float(trace.llr[~trace.special].sum()), abs=1e-5)
    assert first.mean_log_prob == pytest.approx(float(trace.log_probs[~trace.special].mean()))
    assert not first.bound and not second.bound, "what the model would rather have said is in the trace"
    with Passes(model) as passes:
        (again,) = measure(asked / "traces", model, processor, baseline="blank", limit=1)
    assert passes.count == 1
    assert isinstance(again, Reading) and again.baseline == "blank" and first.baseline.startswith("blur")
    assert again.figures.mean_llr != pytest.approx(first.figures.mean_llr, abs=1e-3)


def test_a_trace_without_what_the_model_would_rather_have_said(demo: Any, asked: Path, tmp_path: Path) -> None:
    model, processor = demo
    trace = probe.open_store(asked / "traces")[0]
    with probe.attach(model, processor) as p:
        row = AnswerRow(1, {}, (), trace.question, None, None, tuple(map(int, trace.token_ids)), None)
        capture = forced(p, row, list(trace.images), RecordOptions(attention=False, boxes=False))
        capture.model = p.attachment.describe_model()
    wanted = capture.rows[0].top_log_probs.copy()
    capture.rows[0].top_log_probs = capture.rows[0].top_tokens = None
    capture.rows[0].log_probs = capture.rows[0].log_probs - 1.0
    write(capture, tmp_path)
    (without,) = measure(tmp_path)
    with Passes(model) as passes:
        (found,) = measure(tmp_path, model, processor)
    assert passes.count == 1
    assert isinstance(without, Reading) and isinstance(found, Reading)
    assert without.bound and not found.bound
    exact = np.maximum(wanted - capture.rows[0].log_probs, 0)
    for one, other in zip(found.words, without.words, strict=True):
        assert one.surprise == pytest.approx(float(exact[one.start : one.stop].max()), abs=1e-4)
        assert one.surprise <= other.surprise + 1e-4, "a bound"


def test_contradictions_and_the_words_that_the_model_would_rather_have_said(demo: Any, tmp_path: Path) -> None:
    """Answers with one word exchanged, and right ones on another's image: the old drop called most of them seen."""
    model, processor = demo
    rows, planted, truth = [], {}, {}
    for number, scene in enumerate(probe.demo.scenes(8, kinds=["colour"], seed=7)):
        truth[number] = scene.visual_words[0]
        scene.image.save(tmp_path / f"{number}.png")
        (start, stop), said = scene.visual_spans[0], scene.answer
        if number % 2:
            planted[number] = "purple" if scene.visual_words[0] != "purple" else "green"
            said = said[:start] + planted[number] + said[stop:]
        rows.append({"image": f"{number}.png", "question": scene.question, "answer": said})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = list(measure(tmp_path / "a.jsonl", model, processor))
    for number, one in enumerate(found):
        assert isinstance(one, Reading)
        assert [word.text for word in one.from_("unlikely")] == [planted[number] for _ in range(number % 2)]
        assert one.origin == ("unlikely" if number % 2 else "image")
        for word in one.from_("unlikely"):
            assert word.instead and truth[number].startswith(word.instead), "or the first piece of it"


def test_imported_answers_are_said_to_be(demo: Any, asked: Path, tmp_path: Path) -> None:
    probe.import_answers(asked / "answers.jsonl", *demo, tmp_path, limit=1, attention=False)
    (one,) = measure(tmp_path)
    assert isinstance(one, Reading) and one.elsewhere and one.id == "q0"


def test_answers_need_a_model(asked: Path) -> None:
    with pytest.raises(StudyError, match="give the model"):
        measure(asked / "answers.jsonl")


# ------------------------------------------------------------------------------------------------------ csv and page


def test_csv(tmp_path: Path) -> None:
    readings = [
        surprised(question='He said "no",\nagain', id="7"),
        reading([math.nan] * 6),
        reading([-4e9] * 6),
        read_answer(["=1", " =2"], [False] * 2, [-9, -8.0], [0, 0], source="s", id="=3", question="@x"),
    ]
    path = write_csv(readings, tmp_path / "new" / "a.csv", unread=[Unread("line 3", "no picture")])
    with path.open(encoding="utf-8", newline="") as file:
        first, second, against, formula, last = csv.DictReader(file)
    assert tuple(first) == COLUMNS
    assert (first["rank"], first["id"], first["question"]) == ("1", "7", 'He said "no",\nagain')
    assert float(first["surprise"]) == pytest.approx(3.9) and float(first["mean_llr"]) == pytest.approx(
        3.1 / 3, rel=1e-4
    )
    assert (first["words"], first["worst_word"], first["instead"], first["origin"]) == ("3", "cat", "dog", "unlikely")
    assert (first["unlikely_words"], first["words_from_image"]) == ("cat", "yellow")
    assert second["origin"] == "unknown" and second["image_share"] == "nan"
    assert float(against["mean_llr"]) > -1e11, "a mean, not an exponential of a sum"
    assert formula["unlikely_words"].startswith("'=1") and formula["worst_word"].startswith("'=")
    assert (last["source"], last["reason"], last["rank"]) == ("line 3", "no picture", "")
    with pytest.raises(StudyError, match="cannot be written"):
        write_csv(readings, tmp_path / "new" / "a.csv" / "b.csv")


def data_of(path: Path) -> Any:
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.DOTALL)[1])  # type: ignore[index]


@pytest.mark.quick
def test_page(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    picture = Image.new("RGB", (8, 8), (200, 0, 0))
    readings = [
        reading(question=evil, thumbnail=picture),
        reading([0.0] * 6, thumbnail=picture.copy(), elsewhere=True, baseline="blur 0.15"),
        surprised(top_tokens=[evil] * 6, top_log_probs=[*TOP[:3], math.inf, *TOP[4:]]),
    ]
    path = write_page(readings, tmp_path / "page.html", unread=[Unread("line 9", f"/home/ada/x/y.png {evil}")])
    text = path.read_text()
    assert "<script>alert(1)" not in text and "/home/ada" not in text and "{{" not in text
    data = data_of(path)
    assert [row["question"] for row in data["rows"]] == [evil, "What is it?", "What is it?"]
    assert [row["image"] for row in data["rows"]] == [0, 0, None] and len(data["images"]) == 1
    assert [row["origin"] for row in data["rows"]] == ["image", "habit", "unlikely"]
    assert data["rows"][2]["counts"] == [3, 1, 1, 1] and data["rows"][2]["words"][2][3:] == ["beyond all numbers", evil]
    assert data["worst"] == [["cat", evil, None, 2]]
    assert "".join(before + word for before, word, *_ in data["rows"][0]["words"]) == "A yellow cat."
    assert "<b>33.3 %</b> hold words that this model would not have said" in text
    assert "1 of the answers were not generated here" in text
    with pytest.raises(ReportError, match="exists"):
        write_page(readings, path)
    alone = write_page(readings[:1], tmp_path / "alone.html").read_text()
    assert "from habit 0</span>" in alone and "not known 0" not in alone, "bars of words have a colour for habit"


def test_thousands_of_answers_are_one_small_file(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 255, (88, 66, 3), dtype=np.uint8)) for _ in range(20)]
    readings = [
        reading(generator.normal(1, 2, 6).tolist(), source=f"line {n}", thumbnail=pictures[n % 20]) for n in range(5000)
    ]
    path = write_page(ranked(readings), tmp_path / "page.html")
    assert len(data_of(path)["rows"]) == 5000
    assert path.stat().st_size < 3_000_000


# ------------------------------------------------------------------------------------------------------------ command


def test_the_command(asked: Path, tmp_path: Path) -> None:
    page = tmp_path / "meter.html"
    result = run("meter", asked / "answers.jsonl", "--model", "demo", "--out", page)
    assert result.code == 1 and "1 of 3 rows are refused, more than a tenth" in result.err
    assert "2 answers:" in result.out and "line 3: the image none.png is missing" in result.err
    with page.with_suffix(".csv").open(encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    assert [row["rank"] for row in listed] == ["1", "2", ""]
    assert sorted(row["image"] for row in listed) == ["", "0.png", "1.png"]
    assert len(data_of(page)["rows"]) == 2
    again = run("meter", asked / "traces", "--out", page)
    assert again.code == 2 and "exists" in again.err
    found = succeed("meter", asked / "traces", "--out", page, "--overwrite", "--json").json
    assert [entry["source"] for entry in found["not_measured"]] == [probe.open_store(asked / "traces").files[1].name]
    assert found["answers"][0]["origin"] == "image" and found["worst_words"] == found["failed"] == []
    assert "Example:" in succeed("meter", "--help").out


@pytest.mark.parametrize("done", [0, 1])
def test_ctrl_c_keeps_what_was_measured_and_is_no_success(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    from lvlm_probe.importing import meter

    plain, page = meter.measure, tmp_path / "meter.html"

    def interrupted(*args: Any, **options: Any) -> Iterator[Any]:
        yield from itertools.islice(plain(*args, **options), done)
        raise KeyboardInterrupt

    command = ("meter", asked / "answers.jsonl", "--model", "demo", "--out", page)
    with monkeypatch.context() as patch:
        patch.setattr(meter, "measure", interrupted)
        stopped = run(*command)
    assert stopped.code == 130 and "the same command" in " ".join(stopped.err.split())
    assert page.exists() is bool(done) and (not done or "--overwrite measures all" in " ".join(stopped.err.split()))
    assert run(*command, *["--overwrite"] * done).code == 1  # one of its three rows is refused
    assert len(data_of(page)["rows"]) == 2


def test_answers_to_one_question_are_told_apart_by_their_images(asked: Path, tmp_path: Path) -> None:
    encoded = base64.b64encode((asked / "1.png").read_bytes()).decode()
    images = ["0.png", f"data:image/png;base64,{encoded}", encoded]
    rows = [{"image": image, "question": "What is it?", "answer": "I count five purple stars."} for image in images]
    (asked / "same.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = succeed("meter", asked / "same.jsonl", "--model", "demo", "--out", tmp_path / "page.html")
    assert ":  0.png  What is it?  →  I count five" in result.out and str(asked) not in result.out
    found = [one.image for one in measure(asked / "same.jsonl", *probe.demo.load())]
    assert found == ["0.png", "", ""]  # an image that stands in the row has no name


def test_the_command_fails_where_it_is_told_to(asked: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (asked / "answers.jsonl").read_text().splitlines()]
    planted = {**rows[1], "token_ids": None, "answer": "I count five purple stars."}
    (asked / "planted.jsonl").write_text("\n".join(map(json.dumps, [rows[1], planted, rows[2]])))
    asking = ("meter", asked / "planted.jsonl", "--model", "demo", "--out", tmp_path / "m.html", "--overwrite")
    assert run(*asking, "--fail-on", "habit", "--fail-on", "unlikely=34%").code == 0
    result = run(*asking, "--fail-on", "unlikely=33%", "--fail-on", "unread")
    assert result.code == 1 and (tmp_path / "m.csv").is_file()
    assert "1 of 3 answers (33.3 %) hold words that this model would not have said" in result.err
    assert "1 of 3 answers (33.3 %) could not be measured" in result.err
    assert "nats  'five'" in result.out or "nats  'I'" in result.out
    far = run(*asking, "--fail-on", "unlikely", "--threshold", "1e3", "--json")
    assert far.code == 0 and far.json["counts"]["unlikely"] == 0
    for wrong in ("picture", "habit=0.2", "unlikely=5%%"):
        refused = run(*asking, "--fail-on", wrong)
        assert refused.code == 2 and "habit=20%" in refused.err


@pytest.mark.quick
def test_the_command_refuses_in_a_sentence(asked: Path, tmp_path: Path) -> None:
    result = run("meter", tmp_path / "none")
    assert result.code == 2 and "there is no" in result.err
    result = run("meter", asked / "answers.jsonl", "--out", tmp_path / "m.html")
    assert result.code == 2 and "add --model DIR_OR_ID" in result.err
    (tmp_path / "bad.jsonl").write_text("{\n")
    result = run("meter", tmp_path / "bad.jsonl", "--model", "demo", "--out", tmp_path / "m.html")
    assert result.code == 2 and "none of the 1 answers" in result.err
