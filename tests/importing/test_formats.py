"""Files of answers as people have them: each shape gives the trace that ``generate()`` gave, or says why not."""

from __future__ import annotations

import base64
import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run, succeed
from served_shapes import (
    Served,
    as_bytes_uri,
    batch_input,
    batch_output,
    chat_request,
    chat_response,
    request_output,
)

import lvlm_probe as probe
from lvlm_probe.errors import StudyError
from lvlm_probe.importing import import_answers, row_files
from lvlm_probe.importing.refusals import by_kind
from lvlm_probe.importing.rows import AnswerRow, BadRow, Source, read_rows

QUICK = {"llr": False, "attention": False}


@pytest.fixture(scope="module")
def answers(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Served]:
    """Answers that the demo model gave, as an engine knows them."""
    model, processor = demo
    found = []
    directory = tmp_path_factory.mktemp("answers")
    for number, scene in enumerate(probe.demo.scenes(3, kinds=["pair", "colour", "count"])):
        with probe.attach(model, processor) as p, p.record(directory / str(number)) as recording:
            inputs = processor.apply_chat_template(
                scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            model.generate(**inputs, max_new_tokens=32, do_sample=False)
        (trace,) = recording.traces
        scene.image.save(directory / "x.png")
        found.append(
            Served(
                name=f"q{number}",
                image=(directory / "x.png").read_bytes(),
                question=scene.question,
                text=" " + trace.answer.strip(),  # as vLLM says it
                ids=trace.token_ids.tolist(),
                log_probs=[float(value) for value in trace.log_probs],
                pieces=[str(piece) for piece in trace.tokens],
                prompt=processor.apply_chat_template(scene.messages, add_generation_prompt=True),
                prompt_ids=trace.input_ids.tolist(),
            )
        )
    return found


@pytest.fixture
def place(answers: list[Served], tmp_path: Path) -> Path:
    for number, one in enumerate(answers):
        (tmp_path / f"{one.name}.png").write_bytes(one.image)
        (tmp_path / f"{number}.png").write_bytes(one.image)
    return tmp_path


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def checked(demo: Any, file: Path, answers: list[Served], *, end: bool = True, **settings: Any) -> Any:
    """Imports a file; its traces have the tokens, probabilities, questions and images that the engine had."""
    out = file.parent / f"out-{file.name}"
    result = import_answers(file, *demo, out, **QUICK, **settings)
    assert not result.rejected, result.rejected
    assert len(result.imported) == len(answers) and not result.differing
    for made, one in zip(result.imported, answers, strict=True):
        trace = probe.open_trace(made.path)
        wanted = one.ids if end else one.ids[:-1]
        assert trace.token_ids.tolist() == wanted
        np.testing.assert_allclose(trace.log_probs, one.log_probs[: len(wanted)], atol=1e-4)
        assert trace.input_ids.tolist() == one.prompt_ids
        assert trace.question == one.question
        assert np.array_equal(np.asarray(trace.image), np.asarray(probe.open_trace(made.path).image))
    return result


def own(one: Served, **more: Any) -> dict[str, Any]:
    """A row of one's own, with whatever has been copied into it."""
    return {"image": f"{one.name}.png", "question": one.question, **more}


def with_token_names(one: Served) -> dict[str, Any]:
    """``return_tokens_as_token_ids``."""
    pairs = zip(one.ids, one.log_probs, strict=True)
    content = [{"token": f"token_id:{token}", "logprob": value} for token, value in pairs]
    return {
        "request": chat_request(one),
        "choices": [{"message": {"content": one.text}, "logprobs": {"content": content}}],
    }


def responses(one: Served) -> dict[str, Any]:
    asked = [{"type": "input_image", "image_url": as_bytes_uri(one)}, {"type": "input_text", "text": one.question}]
    said = [{"type": "reasoning"}, {"type": "message", "content": [{"type": "output_text", "text": one.text}]}]
    return {"object": "response", "input": [{"role": "user", "content": asked}], "output": said}


def hf_messages(one: Served) -> dict[str, Any]:
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": one.question}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": one.text}]}
    return {"images": [f"{one.name}.png"], "messages": [asked, said]}


def chat_messages(one: Served) -> dict[str, Any]:
    return {"messages": chat_request(one, more=[{"role": "assistant", "content": one.text}])["messages"]}


def sglang(one: Served, *, alone: bool = False) -> dict[str, Any]:
    facts: dict[str, Any] = {"id": "x", "finish_reason": {"type": "stop", "matched": one.ids[-1]}}
    if alone:
        return {"text": one.text, "meta_info": facts}
    facts["output_token_logprobs"] = [[value, token, None] for token, value in zip(one.ids, one.log_probs, strict=True)]
    return {"text": one.text, "output_ids": one.ids, "meta_info": facts}


def sglang_pair(one: Served) -> dict[str, Any]:
    request = {"text": one.prompt, "image_data": as_bytes_uri(one)}
    return {"request": request, "question": one.question, "response": sglang(one, alone=True)}


def llava(one: Served) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{one.question}"}, {"from": "gpt", "value": one.text.strip()}]
    return {"id": one.name, "image": f"{one.name}.png", "conversations": turns}


Shape = Callable[[Served], dict[str, Any]]
SHAPES: dict[str, tuple[Shape, str, bool]] = {
    "request, response": (lambda one: {"request": chat_request(one), "response": chat_response(one)}, "OpenAI", True),
    "response beside messages": (lambda one: {**chat_request(one), **chat_response(one)}, "OpenAI", True),
    "batch line and request": (lambda one: {**batch_output(one), "request": chat_request(one)}, "OpenAI", True),
    "token ids": (lambda one: {"request": chat_request(one), **chat_response(one, ids=True)}, "OpenAI", True),
    "log P without the end": (
        lambda one: {**chat_request(one), "response": chat_response(one, end=False)},
        "OpenAI",
        False,
    ),
    "no log P": (
        lambda one: {**chat_request(one, f"{one.name}.png"), **chat_response(one, logprobs=False)},
        "OpenAI",
        True,
    ),
    "messages with the answer": (chat_messages, "OpenAI", False),
    "HF messages and images": (hf_messages, "OpenAI", False),
    "a choice": (lambda one: own(one, **chat_response(one)["choices"][0]), "OpenAI", True),
    "choices": (lambda one: own(one, choices=chat_response(one)["choices"]), "OpenAI", True),
    "token ids as tokens": (with_token_names, "OpenAI", True),
    "responses": (responses, "OpenAI", False),
    "asdict(RequestOutput)": (lambda one: {**request_output(one), **own(one)}, "vLLM", True),
    "an output in a row": (lambda one: own(one, output=request_output(one)), "vLLM", True),
    "outputs[0]": (lambda one: own(one, **request_output(one)["outputs"][0]), "plain", True),
    "a text cut off": (lambda one: own(one, text=one.text, finish_reason="length"), "plain", False),
    "SGLang": (lambda one: own(one, **sglang(one)), "SGLang", True),
    "SGLang request": (sglang_pair, "SGLang", True),
    "LLaVA": (llava, "LLaVA", False),
    "PIL": (
        lambda one: own(one, image={"bytes": base64.b64encode(one.image).decode()}, answer=one.text),
        "plain",
        False,
    ),
    "stripped": (lambda one: own(one, answer=one.text.strip()), "plain", False),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_taken_as_it_is(name: str, demo: Any, answers: list[Served], place: Path) -> None:
    shape, words, end = SHAPES[name]
    file = lines(place / "a.jsonl", [shape(answers[1])])
    result = checked(demo, file, answers[1:2], end=end)
    assert result.read_as.startswith("JSON lines, ") and words in result.read_as


@pytest.mark.quick
def test_a_leading_space_does_not_make_other_tokens(demo: Any, answers: list[Served], place: Path) -> None:
    """vLLM keeps the space that the model's first token stands for; a joint log P of -28 instead of -0.0008."""
    row = {"image": "q1.png", "question": answers[1].question, "answer": answers[1].text}
    checked(demo, lines(place / "a.jsonl", [row]), answers[1:2], end=False)


def test_batch_input_and_output_are_joined(demo: Any, answers: list[Served], place: Path) -> None:
    inputs = lines(place / "input.jsonl", [batch_input(one) for one in reversed(answers)])
    output = lines(place / "output.jsonl", [batch_output(one) for one in answers])
    result = checked(demo, output, answers, requests=inputs)
    assert probe.importing.said_by(probe.open_trace(result.imported[0].path))["id"] == "q0"  # type: ignore[index]
    both = place / "both.jsonl"
    both.write_text(inputs.read_text() + output.read_text())
    checked(demo, both, answers)
    found = [row for _, row in read_rows(inputs)]
    assert all(isinstance(row, BadRow) and "--requests" in str(row) for row in found)
    (_, alone), *_ = read_rows(output)
    assert isinstance(alone, BadRow) and "--requests FILE" in str(alone)


def test_an_answer_that_the_engine_was_given_to_score(demo: Any, answers: list[Served], place: Path) -> None:
    """The assistant's message is the answer, and the last of ``prompt_logprobs`` are of it."""
    rows = []
    for one in answers:
        request = chat_request(one, more=[{"role": "assistant", "content": one.text}])
        request |= {
            "max_tokens": 1,
            "continue_final_message": True,
            "add_generation_prompt": False,
            "prompt_logprobs": 0,
        }
        scored = [None, *({str(token): {"logprob": -5.0}} for token in one.prompt_ids[1:])]
        scored += [
            {str(token): {"logprob": value}}
            for token, value in zip(one.ids[:-1], one.log_probs[:-1], strict=True)
        ]  # fmt: skip
        reply = chat_response(one) | {"prompt_logprobs": scored, "prompt_token_ids": one.prompt_ids + one.ids[:-1]}
        rows.append({"request": request, "response": reply})
    result = checked(demo, lines(place / "a.jsonl", rows), answers, end=False)
    assert all(made.mean_difference is not None and made.mean_difference < 1e-4 for made in result.imported)


def test_llava_answers_and_questions(demo: Any, answers: list[Served], place: Path) -> None:
    questions = [
        {"question_id": number, "image": f"{one.name}.png", "text": one.question, "category": "x"}
        for number, one in enumerate(answers)
    ]
    said = [
        {"question_id": number, "prompt": one.question, "text": one.text.strip(), "answer_id": "a", "model_id": "llava"}
        for number, one in enumerate(answers)
    ]
    file = lines(place / "answers.jsonl", said)
    checked(demo, file, answers, end=False, requests=lines(place / "questions.jsonl", questions))


def test_a_mark_in_a_text_is_the_place_of_an_image(demo: Any, answers: list[Served], place: Path) -> None:
    """As LLaMA-Factory and ms-swift write it, and in a question; the answer in parts is one text."""

    def row(one: Served, number: int) -> dict[str, Any]:
        if number == 0:
            return {"image": f"{one.name}.png", "question": f"<image>\n{one.question}", "answer": one.text}
        half = len(one.text) // 2
        said = [{"type": "text", "text": part} for part in (one.text[:half], one.text[half:])]
        asked = {"role": "user", "content": f"<image>{one.question}"}
        return {"images": [f"{one.name}.png"], "messages": [asked, {"role": "assistant", "content": said}]}

    file = lines(place / "a.jsonl", [row(one, number) for number, one in enumerate(answers)])
    checked(demo, file, answers, end=False)


def test_a_request_s_switches_and_tools_reach_the_template(
    demo: Any, answers: list[Served], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, processor = demo
    template = processor.chat_template + "{% if enable_thinking %} circle{% endif %}{% if tools %} star{% endif %}"
    monkeypatch.setattr(processor, "chat_template", template)
    more = {"chat_template_kwargs": {"enable_thinking": True, "truncation": True}, "tools": [{"type": "function"}]}
    rows = [{"request": {**chat_request(answers[0]), **given}, **chat_response(answers[0])} for given in ({}, more)]
    result = import_answers(lines(place / "a.jsonl", rows), *demo, place / "out", **QUICK)
    plain, switched = (probe.open_trace(made.path).input_ids.tolist() for made in result.imported)
    assert processor.tokenizer.decode(switched[len(plain) :]).split() == ["circle", "star"]
    ((_, row),) = read_rows(lines(place / "b.jsonl", rows[1:]))
    assert isinstance(row, AnswerRow) and row.asked is None, "a server would make another prompt of it"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("image,question,answer,answer\na.png,q,red,blue\nb.png,q,,red\n", ["two columns are named 'answer'", "red"]),
        ('image,question,answer\na.png,q,"red\nb.png,q,blue\n', ["a quote that is not closed"]),
        ('image,question,answer\na.png,q,"red" x\nb.png,q,blue\n', ["a quote that is not closed", "blue"]),
        ('image,question,answer,"the\nscore"\na.png,q,red,1\n', ["red"]),
    ],
)
def test_a_cell_is_what_stands_in_it(text: str, found: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    rows = [row for _, row in read_rows(tmp_path / "a.csv")]
    assert len(rows) == len(found)
    for row, wanted in zip(rows, found, strict=True):
        assert row.answer == wanted if isinstance(row, AnswerRow) else wanted in str(row)


def test_lmms_eval(demo: Any, answers: list[Served], place: Path) -> None:
    rows = [
        {
            "doc_id": number,
            "doc": {"question_id": one.name, "question": one.question, "answer": "yes"},
            "target": "yes",
            "arguments": [one.question, {"max_new_tokens": 16, "until": ["\n"]}, number, "pope", "test"],
            "resps": [[one.text.strip()]],
            "filtered_resps": [one.text.strip().lower()],
            "doc_hash": "0",
        }
        for number, one in enumerate(answers)
    ]
    checked(demo, lines(place / "a.jsonl", rows), answers, end=False, images=place)
    whole = place / "old.json"
    whole.write_text(json.dumps({"args": {}, "model_configs": {}, "logs": rows, "time": "1"}, indent=4))
    file = lines(
        place / "b.jsonl", [{**row, "doc": {**row["doc"], "file": f"{row['doc']['question_id']}.png"}} for row in rows]
    )
    checked(demo, file, answers, end=False, columns={"image": "doc.file"})
    result = checked(demo, whole, answers, end=False, images=place)
    assert result.read_as == "JSON, lmms-eval samples"
    choice = {**rows[0], "resps": [[[-1.5, False]]], "filtered_resps": [[-1.5, False]]}
    ((_, bad),) = read_rows(lines(place / "c.jsonl", [choice]))
    assert "log-likelihoods of given choices" in str(bad)


def result_rows(answers: list[Served]) -> list[dict[str, Any]]:
    return [
        {"index": number, "question": one.question, "answer": "A", "category": "x", "prediction": one.text.strip()}
        for number, one in enumerate(answers)
    ]


def as_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_vlmevalkit(demo: Any, answers: list[Served], place: Path) -> None:
    rows = result_rows(answers)
    result = checked(demo, as_csv(place / "r.csv", rows), answers, end=False, images=place)
    assert result.read_as == "comma-separated values, VLMEvalKit results"
    assert [made.line for made in result.imported] == [2, 3, 4]  # as a spreadsheet counts
    data = [
        {"index": number, "image": base64.b64encode(one.image).decode(), "question": "?"}
        for number, one in enumerate(answers)
    ]
    data_set = as_csv(place / "DATA.tsv", data, "\t")
    checked(demo, as_csv(place / "r.tsv", rows, "\t"), answers, end=False, requests=data_set)
    (place / "r.json").write_text(json.dumps(rows, indent=4))
    checked(demo, place / "r.json", answers, end=False, images=place)
    choices = [{**row, "hint": "look", "A": "red", "B": "blue"} for row in rows]
    ((_, row), *_) = read_rows(Source(as_csv(place / "c.csv", choices), images=place))
    assert isinstance(row, AnswerRow) and row.question is not None
    assert (
        row.question.startswith("Hint: look\nQuestion: ") and "Options:\nA. red\nB. blue\nPlease select" in row.question
    )


def test_tables_and_arrays(demo: Any, answers: list[Served], place: Path) -> None:
    rows = [{"image": f"{one.name}.png", "question": one.question, "answer": one.text} for one in answers]
    checked(demo, as_csv(place / "a.csv", rows), answers, end=False)
    checked(demo, as_csv(place / "semicolons.csv", rows, ";"), answers, end=False)
    lists = [
        {**row, "image": str([row["image"]]), "token_ids": str(one.ids), "logprobs": json.dumps(one.log_probs)}
        for row, one in zip(rows, answers, strict=True)
    ]
    checked(demo, as_csv(place / "a.tsv", lists, "\t"), answers)
    for name, text in (
        ("flat.json", json.dumps(rows)),
        ("pretty.json", json.dumps(rows, indent=2)),
        ("one.after.other", "\n".join(json.dumps(row, indent=2) for row in rows)),
        ("held.json", json.dumps({"version": 1, "data": rows})),
    ):
        (place / name).write_text(text)
        assert checked(demo, place / name, answers, end=False).read_as == "JSON, plain rows"


def test_parquet(demo: Any, answers: list[Served], place: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [
        {
            "image": {"bytes": one.image, "path": None},
            "question": one.question,
            "answer": one.text,
            "token_ids": one.ids,
            "logprobs": one.log_probs,
        }
        for one in answers
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), place / "a.parquet")
    result = checked(demo, place / "a.parquet", answers)
    assert result.read_as == "parquet, plain rows"
    again = import_answers(place / "a.parquet", *demo, result.directory, **QUICK)
    assert len(again.present) == len(answers)


def test_whole_numbers_beside_a_missing_one_stay_whole(tmp_path: Path) -> None:
    """As pandas writes them, a column of answers with a gap is of floats."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{**BASE, "answer": answer} for answer in (3.0, 2.5, None)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [row for _, row in read_rows(tmp_path / "a.parquet")]
    assert [row.answer for row in found if isinstance(row, AnswerRow)] == ["3", "2.5"]
    assert isinstance(found[2], BadRow)


def test_xlsx(demo: Any, answers: list[Served], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    rows = result_rows(answers)
    for cells in (list(rows[0]), *(list(row.values()) for row in rows)):
        book.active.append(cells)
    book.save(place / "r.xlsx")
    result = checked(demo, place / "r.xlsx", answers, end=False, images=place)
    assert result.read_as == "an Excel sheet, VLMEvalKit results"


@pytest.mark.parametrize(("kind", "module"), [("xlsx", "openpyxl"), ("parquet", "pyarrow.parquet")])
def test_a_reader_that_is_not_installed_is_named(
    kind: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(probe.errors.ProbeError, match=r"pip install 'lvlm-probe\[tables\]'"):
        list(row_files.rows_in(tmp_path / "a", kind))


# ---------------------------------------------------------------------------------------------------- kinds of a file


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b'{"a": 1}\n{"b": 2}\n', "jsonl"),
        (b'\xef\xbb\xbf{"a": 1}\n', "jsonl"),
        (b'{"a": \n{"b": 2}\n', "jsonl"),  # broken in its first line
        (b"{\n", "jsonl"),
        (b"", "jsonl"),
        (b"5\n", "jsonl"),
        (b"[" * 50_000, "jsonl"),
        (b'[{"a": 1}]', "json"),
        (b'[\n  {"a": 1}\n]', "json"),
        (b'{\n  "a": 1\n}\n{\n  "a": 2\n}\n', "json"),
        (b'{"samples": {"pope": [{"a": 1}]}}', "json"),
        (b"image,question,answer\nx,y,z\n", "csv"),
        (b"image;question;answer\nx;y;z\n", "csv"),
        (b"index\tquestion\tprediction\n0\ty\tz\n", "tsv"),
        (b"PAR1....", "parquet"),
    ],
)
def test_the_kind_of_a_file_is_told_by_its_content(data: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    assert row_files.kind_of(tmp_path / "a.txt") == kind


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x80\x04\x95", "a pickle, which runs what it holds"),
        (b"\x1f\x8b\x08", "gunzip it first"),
        (b"PK\x03\x04nothing", "an archive, and no Excel sheet"),
        (b"\xd0\xcf\x11\xe0\xa1", "save it as xlsx or csv"),
        ("{}".encode("utf-16"), "UTF-16; save it as UTF-8"),
    ],
)
def test_a_file_of_another_kind_says_what_to_do(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(StudyError, match=words):
        list(read_rows(tmp_path / "a"))


def test_a_format_may_be_forced(answers: list[Served], place: Path) -> None:
    one = answers[0]
    row = {"index": 0, "question": one.question, "prediction": "said", "answer": "true", "image": "0.png"}
    file = lines(place / "a.jsonl", [row])
    ((_, found),) = read_rows(Source(file))
    assert isinstance(found, AnswerRow) and (found.shape, found.answer) == ("vlmevalkit", "said")
    ((_, found),) = read_rows(Source(file, {"answer": "answer"}, "jsonl,plain"))
    assert isinstance(found, AnswerRow) and (found.shape, found.answer) == ("plain", "true")
    with pytest.raises(StudyError, match="there is no format 'excel'; choose of jsonl, "):
        Source(file, format="excel")


# ------------------------------------------------------------------------------------------------------ one bad row


def test_one_broken_item_of_an_array_costs_itself(tmp_path: Path) -> None:
    good = {"image": "x.png", "question": "q", "answer": "a"}
    pretty = json.dumps([good, {**good, "answer": "BREAK"}, {**good, "answer": "last"}], indent=2)
    (tmp_path / "a.json").write_text(pretty.replace('"BREAK"', '"BREAK" "'))
    found = [row for _, row in read_rows(tmp_path / "a.json")]
    assert [type(row) for row in found] == [AnswerRow, BadRow, AnswerRow]
    assert isinstance(found[2], AnswerRow) and found[2].answer == "last"
    (tmp_path / "b.csv").write_bytes(b"image,question,answer\nx.png,q,a\nx.png,q,a,b,c\nx.png,\xff,a\n,,\nx.png,q,c\n")
    rows = list(read_rows(tmp_path / "b.csv"))
    assert [(number, type(row)) for number, row in rows] == [(2, AnswerRow), (3, BadRow), (4, BadRow), (6, AnswerRow)]


BASE = {"image": "x.png", "question": "q", "answer": "a"}
MARKED = [{"role": "user", "content": "<image>\nq"}]
REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "another column": ({"image": "x.png", "question": "q", "prediction": "a"}, r"--column answer=prediction$"),
    "another image column": ({"img": "x.png", "question": "q", "answer": "a"}, r"is it 'img'\? --column image=img"),
    "another question column": ({"image": "x.png", "query": "q", "answer": "a"}, r"--column question=query"),
    "a misspelt column": ({"image": "x.png", "question": "q", "answr": "a"}, r"--column answer=answr"),
    "truth and prediction": ({**BASE, "prediction": "b"}, r"both 'answer' and 'prediction' .* answer=prediction"),
    "an empty answer": ({**BASE, "answer": ""}, r"\(the answer is empty\)"),
    "an error": ({"custom_id": "a", "response": None, "error": {"message": "too long"}}, "an error .*: too long"),
    "a status": ({"custom_id": "a", "response": {"status_code": 500, "body": {"error": "no"}}}, "an error instead"),
    "no choice": ({**BASE, "choices": []}, "choices is empty"),
    "a tool": ({**BASE, "choices": [{"message": {"content": None, "tool_calls": [1]}}]}, "a call of a tool"),
    "reasoning": (
        {**BASE, "choices": [{"message": {"content": "a", "reasoning_content": "Hm."}}]}, "return_token_ids: true",
    ),
    "video": ({**BASE, "messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "holds 'video_url'"),
    "a tool before": ({**BASE, "messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "calls a tool"),
    "images without places": ({**BASE, "image": ["x.png", "y.png"], "messages": MARKED}, "2 images .* places for 1"),
    "places without images": ({**BASE, "question": "<image><image>q"}, "1 images .* places for 2"),
    "settings of images": ({**BASE, "request": {"messages": MARKED, "mm_processor_kwargs": {"a": 1}}}, "how images"),
    "a template of its own": ({**BASE, "request": {"messages": MARKED, "chat_template": "{{ 1 }}"}}, "a chat template"),
    "a switch that is none": (
        {**BASE, "request": {"messages": MARKED, "chat_template_kwargs": {"images": [1]}}}, "holds 'images'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_a_row_that_is_not_taken_says_why(name: str, tmp_path: Path) -> None:
    content, words = REASONS[name]
    ((_, row),) = read_rows(lines(tmp_path / "a.jsonl", [content]))
    with pytest.raises(BadRow, match=words):  # without a question: once it is known whether the model takes one
        raise row if isinstance(row, BadRow) else BadRow(row.unasked)


def test_images_of_every_kind(answers: list[Served], place: Path) -> None:
    one = answers[0]
    bare = base64.b64encode(one.image).decode()
    objects: list[Any] = [{"bytes": bare, "path": None}, {"url": as_bytes_uri(one)}, {"image_url": {"url": bare}}]
    texts = [
        "q0.png",
        str(place / "q0.png"),
        f"file://{place}/q0.png",
        bare,
        f"{bare[:76]}\n{bare[76:]}",
        as_bytes_uri(one),
    ]
    given = [*texts, *objects, {"path": "q0.png"}]
    rows = [{"image": image, "question": "q", "answer": "a"} for image in [*given, given[:3]]]
    for (_, row), count in zip(read_rows(lines(place / "a.jsonl", rows)), [1] * len(given) + [3], strict=True):
        assert isinstance(row, AnswerRow)
        opened = row.open_images([place])
        assert len(opened) == count and all(image.size == (336, 336) for image in opened)


def test_base64_is_never_shown(answers: list[Served], place: Path) -> None:
    bare = base64.b64encode(answers[0].image).decode()
    broken = bare.replace("A", "A!", 1)
    rows = [
        {"image": broken, "question": "q", "answer": "a"},
        {"image": bare[: len(bare) // 2 * 2 // 4 * 4 - 400], "question": "q", "answer": "a"},
        {"image": "q0.png", "question": "q", "answer": "a", "logprobs": [bare]},
        {"image": f"http://x/{bare}", "question": "q", "answer": "a"},
        {"image": f"{bare}/x.png", "question": "q", "answer": "a"},
        {bare: 1, "question": "q", "answer": "a"},
        {"image": "q0.png", "question": "q", "answer": 5, "response": {"error": bare}},
        {"custom_id": "x", "response": None, "error": bare},
    ]
    for number, row in read_rows(lines(place / "a.jsonl", rows)):
        with pytest.raises(BadRow) as refused:
            raise row if isinstance(row, BadRow) else row.open_images([place]) and AssertionError(number)
        assert bare[120:160] not in str(refused.value) and len(str(refused.value)) <= 400


def test_the_network_is_asked_where_the_user_says_so(
    answers: list[Served], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fetched(url: str, allowed: bool) -> bytes:
        asked.append(url)
        assert allowed
        return answers[0].image

    monkeypatch.setattr("lvlm_probe.trace.image_files._fetched", fetched)
    file = lines(place / "a.jsonl", [{"image": "https://example.com/x.png", "question": "q", "answer": "a"}])
    ((_, row),) = read_rows(file)
    assert isinstance(row, AnswerRow)
    with pytest.raises(BadRow, match="only with --fetch"):
        row.open_images([place])
    assert not asked
    assert row.open_images([place], fetch=True)[0].size == (336, 336) and asked == ["https://example.com/x.png"]


ODD: list[Any] = [
    None, True, -1, 0, 10**400, 1e308, float("nan"), float("-inf"), "", " ", "\ud800", "\x1b[2J", "a" * 100_000, [],
    [[]], [None], {}, {"": ""}, {"url": {"url": {"url": {}}}}, [{}], [1, "a", None], {"content": 5}, [{"type": None}],
    [{"type": "text", "text": 5}], {"choices": [None]}, {"bytes": 5}, "[1, 2", "{", "http://", "data:", "file://\0",
    json.loads("[" * 200 + "]" * 200), {"message": [1]}, {"type": "stop", "matched": []}, [[1, 2], [3]], "é" * 300,
]  # fmt: skip
"""Values that nobody writes on purpose."""


@pytest.mark.parametrize("seed", range(4))
def test_odd_values_anywhere_are_a_row_or_a_reason(seed: int, answers: list[Served], tmp_path: Path) -> None:
    rng = random.Random(seed)
    shapes = [shape for shape, _, _ in SHAPES.values()]
    rows = []
    for _ in range(150):
        row = json.loads(json.dumps(rng.choice(shapes)(answers[0])))
        at: Any = row
        while True:
            key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
            if not isinstance(at[key], dict | list) or not at[key] or rng.random() < 0.3:
                break
            at = at[key]
        at[key] = rng.choice(ODD)
        rows.append(row)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8", errors="replace")
    found = [row for _, row in read_rows(Source(tmp_path / "a.jsonl", images=tmp_path))]
    assert len(found) == len(rows) and all(isinstance(row, AnswerRow | BadRow) for row in found)
    broken = [str(row) for row in found if isinstance(row, BadRow) and "it cannot be read, " in str(row)]
    assert not broken, broken[:5]


# ------------------------------------------------------------------------------------------------- what is not the same


def test_an_engine_that_ran_something_else_is_an_error(demo: Any, answers: list[Served], place: Path) -> None:
    rows = [{"request": chat_request(one), "response": chat_response(one, ids=True)} for one in answers]
    other = [value - 0.3 for value in answers[1].log_probs]
    for token, value in zip(rows[1]["response"]["choices"][0]["logprobs"]["content"], other, strict=True):
        token["logprob"] = value
    rows[2]["response"]["prompt_token_ids"] = [*answers[2].prompt_ids[:-1], 23, answers[2].prompt_ids[-1]]
    file = lines(place / "a.jsonl", rows)
    command = ("import", file, "--model", "demo", "--out", place / "out", "--no-llr", "--no-attention")
    for again in (False, True):  # also of what an earlier call has imported
        result = run(*command)
        assert result.code == 1
        assert "2 of 3 answers are not this model's" in result.err and "(line 2, line 3)" in result.err
        assert "image, chat template or weights are others" in result.err
        assert f"{0 if again else 3} imported" in result.out
    notes = [note for trace in probe.open_store(place / "out") for note in trace.notes]
    assert any("0.3 on average; that is more than rounding" in note for note in notes)
    assert any("the engine's prompt has other tokens" in note for note in notes)
    measured = run("meter", file, "--model", "demo", "--out", place / "m.html")
    assert measured.code == 1 and "2 of 3 answers are not this model's" in measured.err
    assert (place / "m.html").exists()
    fine = lines(place / "b.jsonl", [rows[0]])
    assert (
        "read as JSON lines, OpenAI chat completions"
        in succeed("meter", fine, "--model", "demo", "--out", place / "n.html").err
    )


def test_the_exit_code_says_whether_a_file_was_taken(answers: list[Served], place: Path) -> None:
    good = {"image": "q0.png", "question": answers[0].question, "answer": answers[0].text}
    many = [{**good, "id": str(number)} for number in range(10)]
    command = ("--model", "demo", "--no-llr", "--no-attention", "--out")
    file = lines(place / "a.jsonl", [*many, {"image": "none.png", "question": "q", "answer": "a"}])
    result = run("import", file, *command, place / "a")
    assert result.code == 0 and "10 imported, 0 were there, 1 rejected" in result.out
    result = run("import", file, *command, place / "a", "--strict")
    assert result.code == 1 and "1 of 11 rows are refused" in result.err
    file = lines(
        place / "b.jsonl", [good, {"image": "x.png", "question": "q", "answer": "a"}, {**good, "image": "y.png"}, {}]
    )
    result = run("import", file, *command, place / "b")
    assert result.code == 1 and "3 of 4 rows are refused, more than a tenth" in result.err
    assert "3 rows refused: 2 × the image … is missing, 1 × there is no image" in result.err
    result = run("import", lines(place / "c.jsonl", [{}]), *command, place / "c", "--json")
    assert result.code == 1 and result.json["failed"] == ["none of the 1 rows could be taken"]
    assert run("meter", file).err.count("--model DIR_OR_ID") == 1


def test_reasons_are_counted_by_kind() -> None:
    reasons = [
        "the image a.png is missing (looked in /x)",
        "the image b/c.png is missing (looked in /y)",
        "not JSON: 1",
    ]
    assert by_kind(reasons) == [("the image … is missing", 2), ("not JSON", 1)]
    assert by_kind(["the image https://x/y lies on the network, which"]) == [
        ("the image … lies on the network, which", 1)
    ]
