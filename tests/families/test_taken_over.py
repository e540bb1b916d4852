"""Answers of families that are asked in ways of their own, taken over from a file: what ``import`` and ``meter`` make
of a row is what ``generate()`` with a probe has recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from test_readers import trocr
from zoo import Built, build, load_members

import lvlm_probe as probe
from lvlm_probe.importing import import_answers
from lvlm_probe.importing.meter import Reading, measure
from lvlm_probe.trace import Trace, open_trace

load_members()
QUESTION = "What colour?"


def asked(built: Built, directory: Path, **given: Any) -> Trace:
    built.picture().save(directory / "page.png")
    options = {"max_new_tokens": 4, "suppress_tokens": built.processor.tokenizer.all_special_ids, **given}
    return probe.ask(built.model, built.processor, built.picture(), out=directory / "asked", **options).trace


def written(trace: Trace, directory: Path, **fields: Any) -> Path:
    row = {"image": "page.png", "token_ids": trace.token_ids.tolist(), "logprobs": trace.log_probs.tolist(), **fields}
    (directory / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return directory / "rows.jsonl"


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("trocr", None),
        ("vision-encoder-decoder", "<s_docvqa>"),
        ("pp_formulanet", None),
        ("pix2struct", None),
        ("kosmos-2.5", None),
        ("git", None),
        ("git", "a picture of"),
        ("blip", None),
        ("blip", "a picture of"),
    ],
)
def test_a_row_of_a_reader_is_what_was_recorded_of_it(name: str, prompt: str | None, tmp_path: Path) -> None:
    built = trocr() if name == "trocr" else build(name, "torchvision")
    trace = asked(built, tmp_path, prompt=prompt)
    file = written(trace, tmp_path, **({} if prompt is None else {"prompt": prompt}))
    made = import_answers(file, built.model, built.processor, tmp_path / "out")
    assert not made.rejected
    (answer,) = made.imported
    assert answer.largest_difference is not None and answer.largest_difference < 1e-4
    again = open_trace(answer.path)
    assert again.status == "complete"
    assert again.input_ids.tolist() == trace.input_ids.tolist()
    np.testing.assert_allclose(again.llr, trace.llr, atol=1e-4)
    assert (again.attention is None) == (trace.attention is None), again.notes
    if trace.attention is not None:
        assert again.attention.layers == trace.attention.layers
        np.testing.assert_allclose(
            again.attention.values.astype(np.float32), trace.attention.values.astype(np.float32), atol=1e-3
        )
    (reading,) = measure(file, built.model, built.processor)
    assert isinstance(reading, Reading) and reading.mean_log_prob == pytest.approx(trace.log_probs.mean(), abs=1e-4)


def test_what_the_model_demands_and_its_processor_leaves_out_is_added(tmp_path: Path) -> None:
    # The kind of each token, which Cosmos 3 Edge's processor makes when it is told to.
    built = build("cosmos3_edge", "torchvision")
    given = {"question": QUESTION}
    assert "mm_token_type_ids" not in built.processor(images=built.picture(), text="<|image_pad|>", return_tensors="pt")
    trace = asked(built, tmp_path, **given)
    own = built.inputs([built.picture()], QUESTION)
    assert trace.input_ids.tolist() == own["input_ids"][0].tolist()
    assert np.array_equal(trace.model_kwargs["mm_token_type_ids"], own["mm_token_type_ids"])
    (answer,) = import_answers(written(trace, tmp_path, **given), built.model, built.processor, tmp_path).imported
    assert answer.largest_difference is not None and answer.largest_difference < 1e-4
    built.model.save_pretrained(tmp_path / "model")
    built.processor.save_pretrained(tmp_path / "model")
    what = ["--model", str(tmp_path / "model"), "--image", str(tmp_path / "page.png"), "--question", QUESTION]
    done = run("record", *what, "--out", str(tmp_path / "runs"), "--max-new-tokens", "3", "--json")
    assert done.code == 0 and done.json["status"] == "complete", done.err
    done = run(
        "meter", tmp_path / "rows.jsonl", "--model", tmp_path / "model", "--out", tmp_path / "meter.html", "--json"
    )
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("vision-encoder-decoder", {"question": QUESTION}, "takes no question"),
        ("llava", {}, "neither question nor prompt"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(name: str, row: dict[str, str], reason: str, tmp_path: Path) -> None:
    built = build(name, "torchvision")
    built.picture().save(tmp_path / "page.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "page.png", "answer": "red", **row}))
    rejected = import_answers(tmp_path / "rows.jsonl", built.model, built.processor, tmp_path / "out").rejected
    assert reason in rejected[1]
