"""The language-prior meter: its numbers by hand, what it costs, and the csv and the page that it writes."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run, succeed
from PIL import Image

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError, ReportError, StudyError
from lvlm_probe.importing.meter import (
    COLUMNS,
    Reading,
    Unread,
    band_of,
    measure,
    ranked,
    read_answer,
    write_csv,
)
from lvlm_probe.pages.prior import write_page
from lvlm_probe.study.run.unit_work import drops

PIECES = ["A", " yel", "low", " cat", ".", "</s>"]
SPECIAL = [False] * 5 + [True]
LOG_P = [-0.1, -0.2, -0.1, -0.4, 0.0, -2.0]
LLR = [0.0, 0.5, 0.6, 2.0, -0.1, 50.0]


def reading(llr: list[float] = LLR, **facts: Any) -> Reading:
    known = {"source": "a.jsonl, line 1", "id": None, "question": "What is it?"}
    return read_answer(PIECES, SPECIAL, LOG_P, llr, **{**known, **facts})


def test_numbers_by_hand() -> None:
    found = reading()
    assert found.answer == "A yellow cat."
    assert [word.text for word in found.words] == ["A", "yellow", "cat", "."]
    assert found.llr == pytest.approx((0.0, 1.1, 2.0, -0.1))
    assert found.counts == (True, True, True, False)
    assert found.share == pytest.approx(2 / 3)  # yellow by its two tokens together; the full stop does not count
    assert found.mean_llr == pytest.approx(3.1 / 3)
    assert found.log_prob == pytest.approx(-0.8)  # without the end of the answer
    assert found.baseline_log_prob == pytest.approx(-0.8 - 3.0)
    assert found.drop == pytest.approx(1 - math.exp(-3.8) / math.exp(-0.8))
    with_picture, without = math.exp(-0.8 / 5), math.exp(-3.8 / 5)
    assert found.drop_normalised == pytest.approx(1 - without / with_picture)
    assert (found.band, found.seen) == ("picture", ("yellow", "cat"))
    assert reading(alpha=1.5).seen == ("cat",)
    assert reading(alpha=1.5).share == pytest.approx(1 / 3)


def test_edges() -> None:
    assert [band_of(drop) for drop in (-3.0, 0.29, 0.3, 0.7, 0.71, math.nan)] == [
        "habit", "habit", "mixed", "mixed", "picture", "unknown",
    ]  # fmt: skip
    against = reading([-400.0] * 6)
    assert against.drop == -math.inf and against.band == "habit"
    unknown = reading([math.nan] * 6)
    assert math.isnan(unknown.drop) and unknown.band == "unknown"
    signs = read_answer(["?", "!"], [False, False], [0, 0], [2, 2], source="s", id=None, question="q")
    assert math.isnan(signs.share) and signs.drop == pytest.approx(1 - math.exp(-4))
    with pytest.raises(ExplainError, match="no tokens besides special ones"):
        read_answer(["</s>"], [True], [0], [0], source="s", id=None, question="q")


def test_ranks() -> None:
    totals = [9.0, -5.0, math.nan, 40.0, 80.0, 0.1]  # 40 and 80: both drops round to 1
    readings = [reading([total, 0, 0, 0, 0, 0], source=str(total)) for total in totals]
    assert [one.source for one in ranked(readings)] == ["-5.0", "0.1", "9.0", "40.0", "80.0", "nan"]


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
        assert one.elsewhere and one.answer == trace.answer and one.picture is not None
        replay = probe.replay(trace, model, processor).over("blur")
        ratios = (torch.tensor(trace.log_probs) - replay.baseline_log_probs)[~replay.special]
        assert one.drop == pytest.approx(1 - math.exp(-float(ratios.sum())), abs=1e-4)
    assert isinstance(second, Reading) and second.band == "picture" and len(second.seen) == 1


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
    known = drops(trace)
    for name in ("log_prob", "baseline_log_prob", "drop", "drop_normalised"):
        assert getattr(first, name) == pytest.approx(known[name], rel=1e-9)
    with Passes(model) as passes:
        (again,) = measure(asked / "traces", model, processor, baseline="blank", limit=1)
    assert passes.count == 1
    assert isinstance(again, Reading) and again.baseline == "blank" and first.baseline.startswith("blur")
    assert again.baseline_log_prob != pytest.approx(first.baseline_log_prob, abs=1e-3)


def test_imported_answers_are_said_to_be(demo: Any, asked: Path, tmp_path: Path) -> None:
    probe.import_answers(asked / "answers.jsonl", *demo, tmp_path, limit=1, attention=False)
    (one,) = measure(tmp_path)
    assert isinstance(one, Reading) and one.elsewhere and one.id == "q0"


def test_answers_need_a_model(asked: Path) -> None:
    with pytest.raises(StudyError, match="give the model"):
        measure(asked / "answers.jsonl")


# ------------------------------------------------------------------------------------------------------ csv and page


def test_csv(tmp_path: Path) -> None:
    readings = [reading(question='He said "no",\nagain', id="7"), reading([math.nan] * 6)]
    path = write_csv(readings, tmp_path / "new" / "a.csv", unread=[Unread("line 3", "no picture")])
    with path.open(encoding="utf-8", newline="") as file:
        first, second, third = csv.DictReader(file)
    assert tuple(first) == COLUMNS
    assert (first["rank"], first["id"], first["question"]) == ("1", "7", 'He said "no",\nagain')
    assert float(first["drop"]) == pytest.approx(readings[0].drop, rel=1e-5)
    assert (first["words"], first["words_from_picture"], first["band"]) == ("3", "yellow; cat", "picture")
    assert second["band"] == "unknown" and second["drop"] == "nan"
    assert (third["source"], third["reason"], third["rank"]) == ("line 3", "no picture", "")
    with pytest.raises(StudyError, match="cannot be written"):
        write_csv(readings, tmp_path / "new" / "a.csv" / "b.csv")


def data_of(path: Path) -> Any:
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.DOTALL)[1])  # type: ignore[index]


@pytest.mark.quick
def test_page(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    picture = Image.new("RGB", (8, 8), (200, 0, 0))
    readings = [
        reading(question=evil, picture=picture),
        reading([0.0] * 6, picture=picture.copy(), elsewhere=True, baseline="blur 0.15"),
        reading([-400.0] * 6),
    ]
    path = write_page(readings, tmp_path / "page.html", unread=[Unread("line 9", f"/home/ada/x/y.png {evil}")])
    text = path.read_text()
    assert "<script>alert(1)" not in text and "/home/ada" not in text and "{{" not in text
    data = data_of(path)
    assert [row["question"] for row in data["rows"]] == [evil, "What is it?", "What is it?"]
    assert [row["picture"] for row in data["rows"]] == [0, 0, None] and len(data["pictures"]) == 1
    assert [row["band"] for row in data["rows"]] == ["picture", "habit", "habit"]
    assert data["rows"][2]["drop"] is None and data["rows"][2]["total"] == pytest.approx(-2000)
    assert "".join(before + word for before, word, _ in data["rows"][0]["words"]) == "A yellow cat."
    assert "<b>66.7 %</b>, 30 to 70 %" in text and "1 of the answers were not generated here" in text
    with pytest.raises(ReportError, match="exists"):
        write_page(readings, path)


def test_thousands_of_answers_are_one_small_file(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 255, (88, 66, 3), dtype=np.uint8)) for _ in range(20)]
    readings = [
        reading(generator.normal(1, 2, 6).tolist(), source=f"line {n}", picture=pictures[n % 20]) for n in range(5000)
    ]
    path = write_page(ranked(readings), tmp_path / "page.html")
    assert len(data_of(path)["rows"]) == 5000
    assert path.stat().st_size < 3_000_000


# ------------------------------------------------------------------------------------------------------------ command


def test_the_command(asked: Path, tmp_path: Path) -> None:
    page = tmp_path / "meter.html"
    result = run("meter", asked / "answers.jsonl", "--model", "demo", "--out", page)
    assert result.code == 1 and "1 of 3 rows are refused, more than a tenth" in result.err
    assert "2 answers:" in result.out and "line 3: the picture none.png is missing" in result.err
    with page.with_suffix(".csv").open(encoding="utf-8") as file:
        assert [row["rank"] for row in csv.DictReader(file)] == ["1", "2", ""]
    assert len(data_of(page)["rows"]) == 2
    again = run("meter", asked / "traces", "--out", page)
    assert again.code == 2 and "exists" in again.err
    found = succeed("meter", asked / "traces", "--out", page, "--overwrite", "--json").json
    assert [entry["source"] for entry in found["not_measured"]] == [probe.open_store(asked / "traces").files[1].name]
    assert found["answers"][0]["band"] == "picture"
    assert "Example:" in succeed("meter", "--help").out


@pytest.mark.quick
def test_the_command_refuses_in_a_sentence(asked: Path, tmp_path: Path) -> None:
    result = run("meter", tmp_path / "none")
    assert result.code == 2 and "there is no" in result.err
    result = run("meter", asked / "answers.jsonl", "--out", tmp_path / "m.html")
    assert result.code == 2 and "add --model DIR_OR_ID" in result.err
    (tmp_path / "bad.jsonl").write_text("{\n")
    result = run("meter", tmp_path / "bad.jsonl", "--model", "demo", "--out", tmp_path / "m.html")
    assert result.code == 2 and "none of the 1 answers" in result.err
