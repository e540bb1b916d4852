"""Answers recorded elsewhere as traces: what generate() gave and what an import of it gives are one and the same."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import inside
import numpy as np
import pytest
import tiny_models
import torch
from command_line import run, succeed
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import lvlm_probe as probe
from lvlm_probe.errors import ProbeError, StudyError
from lvlm_probe.importing import REJECTED, import_answers, said_by
from lvlm_probe.importing.retokenize import answer_tokens, checked_ids
from lvlm_probe.importing.rows import AnswerRow, BadRow, read_rows


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


@pytest.fixture(scope="module")
def served(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any], list[dict[str, Any]]]:
    """Pictures, what generate() recorded on them, and the same answers as an engine would write them down."""
    model, processor = demo
    directory = tmp_path_factory.mktemp("served")
    rows = []
    with probe.attach(model, processor) as p, p.record(directory / "generated") as recording:
        for number, scene in enumerate(probe.demo.scenes(3, kinds=["pair", "colour", "count"])):
            scene.image.save(directory / f"{number}.png")
            inputs = processor.apply_chat_template(
                scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            model.generate(**inputs, max_new_tokens=32, do_sample=False)
            rows.append({"id": f"q{number}", "image": f"{number}.png", "question": scene.question})
    traces = recording.traces
    for row, trace in zip(rows, traces, strict=True):
        row |= {"answer": trace.answer, "logprobs": [float(value) for value in trace.log_probs], "engine": "vLLM"}
    return directory, traces, rows


def row_of(**fields: Any) -> AnswerRow:
    known = {"line": 1, "content": {}, "images": ("x.png",), "question": "q", "prompt": None, "answer": None,
             "token_ids": None, "log_probs": None}  # fmt: skip
    return AnswerRow(**{**known, **fields})


@pytest.mark.parametrize(
    ("asked", "said"), [({"limit": -1}, "limit is a number of rows"), ({"baseline": "grey"}, "no baseline 'grey'")]
)
def test_what_no_row_could_be_imported_with_is_said_at_once(
    demo: Any, served: Any, tmp_path: Path, asked: dict[str, Any], said: str
) -> None:
    directory, _, rows = served
    with pytest.raises(ProbeError, match=said):
        import_answers(jsonl(directory / "served.jsonl", rows), *demo, tmp_path / "new", **asked)
    assert not (tmp_path / "new").exists()


def test_an_import_is_what_generate_recorded(demo: Any, served: Any, tmp_path: Path) -> None:
    directory, traces, rows = served
    result = import_answers(jsonl(directory / "served.jsonl", rows), *demo, tmp_path)
    assert [made.line for made in result.imported] == [1, 2, 3]
    assert not result.rejected and (tmp_path / REJECTED).read_text() == ""
    store = probe.open_store(tmp_path)
    assert len(store) == 3
    for made, generated, imported in zip(result.imported, traces, store, strict=True):
        assert imported.token_ids.tolist() == generated.token_ids.tolist()  # the end of the answer included
        assert imported.answer == generated.answer
        assert imported.question == generated.question
        assert imported.log_probs_source == "teacher_forced"
        np.testing.assert_allclose(imported.log_probs, generated.log_probs, atol=1e-4)
        np.testing.assert_allclose(imported.llr, generated.llr, atol=1e-3)
        assert imported.attention.layers == generated.attention.layers
        np.testing.assert_allclose(imported.attention.values, generated.attention.values, atol=1e-3)
        assert imported.attention.values.max() > 0.01
        assert made.largest_difference == pytest.approx(
            np.abs(generated.log_probs - imported.log_probs).max(), abs=1e-7
        )
        assert imported.images[0].tobytes() == generated.images[0].tobytes()


def test_a_trace_says_that_its_answer_was_imported(demo: Any, served: Any, tmp_path: Path) -> None:
    directory, traces, rows = served
    off = [dict(rows[0])]
    off[0]["logprobs"] = [value - 0.25 - (step == 2) for step, value in enumerate(rows[0]["logprobs"])]
    off[0]["logprobs"][1] = None
    (made,) = import_answers(jsonl(directory / "off.jsonl", off), *demo, tmp_path).imported
    count = len(off[0]["logprobs"])
    assert made.largest_difference == pytest.approx(1.25, abs=1e-3)
    assert made.mean_difference == pytest.approx((0.25 * (count - 1) + 1) / (count - 1), abs=1e-3)
    trace = probe.open_trace(made.path)
    assert trace.notes[0].startswith("the answer was not generated here, but imported from off.jsonl, line 1, said by")
    assert "differ from this model's by 1.25 nats at most (token 2" in trace.notes[1]
    assert f"1 of {count} are not given" in trace.notes[1] and "more than rounding" in trace.notes[1]
    assert not any("max_new_tokens" in note for note in trace.notes)
    facts = said_by(trace)
    assert facts is not None and (facts["line"], facts["id"], facts["engine"]) == (1, "q0", "vLLM")
    assert facts["largest_difference"] == pytest.approx(made.largest_difference)
    assert "generate" not in trace.seconds
    assert "not generated here" in trace.describe()
    assert said_by(traces[0]) is None


def test_replay_explain_and_report_work_on_it(demo: Any, served: Any, tmp_path: Path) -> None:
    directory, traces, rows = served
    (made,) = import_answers(jsonl(directory / "one.jsonl", rows[:1]), *demo, tmp_path, llr=False).imported
    trace = probe.open_trace(made.path)
    assert trace.llr is None
    assert probe.verify(trace, *demo).within(1e-5)
    replay, direct = probe.replay(trace, *demo), probe.replay(traces[0], *demo)
    heat = probe.explain(replay, method="input_gradient")
    assert heat.values == pytest.approx(probe.explain(direct, method="input_gradient").values, abs=1e-4)
    assert probe.explain(trace, method="attention", tokens=(1, 3)).values is not None
    page = probe.report([heat], out=tmp_path / "report.html").read_text()
    assert "was not generated here" in page


@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl", "gemma3", "idefics3", "mllama", "paligemma"])
def test_families(name: str, tmp_path: Path) -> None:
    """Token ids of generate(), by another road into the same model: log-probabilities and attention agree."""
    model, processor = tiny_models.build(name)
    generated = inside.record(name, model, processor, points=[], heads="mean")
    tiny_models.picture(seed=0).save(tmp_path / "p.png")
    content = [{"type": "image"}, {"type": "text", "text": inside.QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    row = {"image": "p.png", "prompt": prompt, "token_ids": generated.token_ids.tolist()}
    result = import_answers(jsonl(tmp_path / "a.jsonl", [row]), model, processor, tmp_path / "out")
    assert not result.rejected
    trace = probe.open_store(tmp_path / "out")[0]
    assert trace.input_ids.tolist() == generated.input_ids.tolist()
    np.testing.assert_allclose(trace.log_probs, generated.log_probs, atol=2e-5)
    np.testing.assert_allclose(trace.baseline_log_probs, generated.baseline_log_probs, atol=2e-5)
    assert trace.points == generated.points
    assert {point for point in trace.points if "attention" in point}
    for point in trace.points:
        ours, theirs = trace.point(point).values, generated.point(point).values
        np.testing.assert_allclose(ours.float().numpy(), theirs.float().numpy(), atol=2e-3)


@pytest.mark.quick
def test_bad_rows_are_listed_and_do_not_stop_the_rest(demo: Any, served: Any, tmp_path: Path) -> None:
    directory, traces, rows = served
    good = {name: rows[1][name] for name in ("image", "question", "answer")}
    ids = traces[1].token_ids.tolist()
    (directory / "text.png").write_text("not a picture")
    bad: list[tuple[Any, str]] = [
        ("{", "not JSON"),
        ([1], "a row is an object, not list"),
        ({**good, "image": "none.png"}, r"the image none\.png is missing"),
        ({**good, "image": "text.png"}, "is not an image that can be read"),
        ({**good, "image": "data:image/png;base64,AAAA"}, "data: URI cannot be read"),
        ({"question": "q", "answer": "a"}, "there is no image"),
        ({"generated_texts": ["a"], "input_lens": [9]}, "does not say which image and question a text answers"),
        ({"image": "0.png", "answer": "a"}, "neither question nor prompt"),
        ({**good, "answer": " "}, "neither an answer nor token_ids"),
        ({**good, "answer": "Ωmega ₿"}, "does not tokenise back"),
        ({**good, "logprobs": [-0.1] * 50}, r"50 log-probabilities for an answer of \d+ tokens"),
        ({**good, "token_ids": ids, "logprobs": [-0.1]}, f"1 log-probabilities for {len(ids)} tokens"),
        ({**good, "token_ids": [5, 10**6]}, "token 1000000 is outside the model's vocabulary"),
        ({**good, "token_ids": ids[:3]}, "token_ids decode to"),
        ({**good, "token_ids": [*ids, *ids], "answer": None}, "the answer goes on after its end"),
        ({**good, "logprobs": [0.9] * len(ids)}, "above 0: natural logarithms"),
        ({"image": "0.png", "prompt": "USER: <|image_pad|> q ASSISTANT:", "answer": "a"}, "no image placeholder of"),
    ]  # fmt: skip
    file = jsonl(directory / "bad.jsonl", [row for row, _ in bad] + [good])
    result = import_answers(file, *demo, tmp_path)
    assert [made.line for made in result.imported] == [len(bad) + 1]
    assert sorted(result.rejected) == list(range(1, len(bad) + 1))
    for line, (_, reason) in enumerate(bad, start=1):
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(result.rejected[line])
    listed = [json.loads(line) for line in (tmp_path / REJECTED).read_text().splitlines()]
    assert {entry["line"]: entry["reason"] for entry in listed} == result.rejected
    assert len(probe.open_store(tmp_path)) == 1
    with probe.attach(*demo):  # the import has let go of the model
        pass


def test_it_goes_on_where_it_was(demo: Any, served: Any, tmp_path: Path) -> None:
    directory, _, rows = served
    file = jsonl(directory / "resumed.jsonl", [*rows, rows[0], {**rows[1], "image": "later.png"}])
    first = import_answers(file, *demo, tmp_path, limit=2, llr=False, attention=False)
    assert [made.line for made in first.imported] == [1, 2]
    second = import_answers(file, *demo, tmp_path, llr=False, attention=False)
    assert (second.present, [made.line for made in second.imported]) == (
        (1, 2),
        [3, 4],
    )  # a row that stands there twice
    assert list(second.rejected) == [5]
    first.imported[1].path.unlink()
    Image.open(directory / "1.png").save(directory / "later.png")
    told: list[tuple[int, int]] = []
    third = import_answers(
        file, *demo, tmp_path, llr=False, attention=False, tell=lambda done, total: told.append((done, total))
    )
    assert (third.present, [made.line for made in third.imported]) == ((1, 3, 4), [2, 5])
    assert told == [(done, 5) for done in range(1, 6)]
    assert (tmp_path / REJECTED).read_text() == ""
    model, processor = probe.demo.load()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    other = import_answers(file, model, processor, tmp_path, limit=1, llr=False, attention=False)
    assert len(other.imported) == 1  # another model's replay of the same answer is another trace


def test_formats_of_log_probabilities(tmp_path: Path) -> None:
    base = {"image": "x.png", "question": "q", "answer": "a b"}
    openai = {"content": [{"token": "a", "logprob": -0.1, "top_logprobs": []}, {"token": " b", "logprob": -0.2}]}
    vllm = [
        {"7": {"logprob": -0.1, "rank": 1, "decoded_token": "a"}, "9": {"logprob": -3.0}},
        {"3": {"logprob": -9.0}, "8": {"logprob": -0.2}},
    ]
    rows = [
        {**base, "logprobs": [-0.1, None]},
        {**base, "logprobs": openai},
        {**base, "logprobs": {"tokens": ["a", " b"], "token_logprobs": [-0.1, -0.2]}},
        {**base, "token_ids": [7, 8], "logprobs": vllm},
        {**base, "output_token_logprobs": [[-0.1, 7, "a"], [-0.2, 8, None]]},
        {**base, "logprobs": vllm},
        {**base, "token_ids": [7, 4], "logprobs": vllm},
        {**base, "token_ids": [7, 9], "output_token_logprobs": [[-0.1, 7, "a"], [-0.2, 8, None]]},
        {**base, "logprobs": "many"},
    ]
    found = [row for _, row in read_rows(jsonl(tmp_path / "a.jsonl", rows))]
    first, *same = found[:5]
    assert isinstance(first, AnswerRow) and first.log_probs is not None
    assert first.log_probs[0] == -0.1 and math.isnan(first.log_probs[1])
    for row in same:
        assert isinstance(row, AnswerRow)
        assert row.log_probs == (-0.1, -0.2)
    assert [row.token_ids for row in same if isinstance(row, AnswerRow)] == [None, None, (7, 8), (7, 8)]
    reasons = [str(row) for row in found[5:] if isinstance(row, BadRow)]
    assert len(reasons) == 4
    assert "token_ids must say which was chosen" in reasons[0]
    assert "not given for the token of the answer (4)" in reasons[1]
    assert "differ" in reasons[2] and "are a list, not str" in reasons[3]


def test_other_names(tmp_path: Path) -> None:
    row = {"img": "x.png", "ask": "q", "pred": "a", "text": "not this"}
    file = jsonl(tmp_path / "a.jsonl", [row])
    ((line, found),) = read_rows(file, columns={"image": "img", "question": "ask", "answer": "pred"})
    assert isinstance(found, AnswerRow) and (line, found.answer, found.question) == (1, "a", "q")
    with pytest.raises(StudyError, match="there is no field 'reply'"):
        list(read_rows(file, columns={"reply": "pred"}))
    with pytest.raises(StudyError, match="cannot be read"):
        list(read_rows(tmp_path / "none.jsonl"))


def test_a_picture_in_the_row_itself(served: Any) -> None:
    directory, _, _ = served
    data = base64.b64encode((directory / "0.png").read_bytes()).decode()
    (image,) = row_of(images=(f"data:image/png;base64,{data}",)).open_images([])
    assert image.tobytes() == Image.open(directory / "0.png").convert("RGB").tobytes()


# ------------------------------------------------------------------------------------------------------------- tokens


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A BPE tokenizer as SentencePiece models have it, or byte-level, trained on a few words."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    if (
        kind == "llama"
    ):  # the first tokenizers of Llama: a space before every text, taken away again from the decoded one
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        alphabet = ["▁"]
    elif kind == "metaspace":
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        inner.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = []
    else:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = ["ASSISTANT: a cat sat on a mat", "USER: what sat on a mat? ASSISTANT: the cat", "cat mat sat"] * 20
    special = ["<unk>", "</s>", "<image>"]
    inner.train_from_iterator(text, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")


def test_a_leading_space_behind_a_special_token_is_no_token_of_its_own() -> None:
    """Decoded by themselves the wrong tokens have the text's space, and the right ones hide it."""
    tokenizer = tokenizer_of("llama")
    prompt = [*tokenizer.encode("what", add_special_tokens=False), tokenizer.convert_tokens_to_ids("<image>")]
    right, wrong = (tokenizer.encode(text, add_special_tokens=False) for text in ("a cat", " a cat"))
    assert tokenizer.decode(wrong) == " a cat" and tokenizer.decode(right) == "a cat"
    assert right in answer_tokens(tokenizer, prompt, " a cat")


@pytest.mark.parametrize("kind", ["metaspace", "bytes"])
def test_the_tokens_that_would_have_been_said_are_among_those_offered(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    prompt = tokenizer.encode("<image>USER: what sat on a mat? ASSISTANT:", add_special_tokens=False)
    whole = tokenizer.encode("<image>USER: what sat on a mat? ASSISTANT: a cat", add_special_tokens=False)
    assert whole[: len(prompt)] == prompt
    said = whole[len(prompt) :]
    for text in (" a cat", "a cat"):  # as the engine has it, and stripped
        offered = answer_tokens(tokenizer, prompt, text)
        assert len({tuple(ids) for ids in offered}) == len(offered)
        for ids in offered:
            assert tokenizer.decode(ids).strip() == "a cat"
        if text.startswith(" "):
            assert offered == [said]  # to the letter: nothing to choose
        else:
            assert said in offered  # a tokenizer may have hidden the space, or a script stripped it


def test_the_likeliest_tokenisation_is_taken(
    demo: Any, served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, traces, rows = served
    right = traces[1].token_ids.tolist()[:-1]
    wrong = demo[1].tokenizer.convert_tokens_to_ids(list(traces[1].answer.replace(" ", "▁")))  # letter by letter
    assert wrong != right and demo[1].tokenizer.unk_token_id not in wrong
    monkeypatch.setattr("lvlm_probe.importing.forced_recorder.answer_tokens", lambda *_: [wrong, right, wrong])
    row = {name: rows[1][name] for name in ("image", "question", "answer")}
    (made,) = import_answers(jsonl(directory / "likely.jsonl", [row]), *demo, tmp_path, llr=False).imported
    trace = probe.open_trace(made.path)
    assert trace.token_ids.tolist() == right
    np.testing.assert_allclose(trace.log_probs, traces[1].log_probs[:-1], atol=1e-4)


def test_given_ids_are_checked() -> None:
    tokenizer = tokenizer_of("bytes")
    ids = [*tokenizer.encode("a cat", add_special_tokens=False), tokenizer.eos_token_id]
    assert checked_ids(tokenizer, ids, "a cat", 500) == ids
    assert checked_ids(None, ids, "whatever", 500) == ids
    with pytest.raises(BadRow, match="decode to 'a cat', but the answer is 'a dog'"):
        checked_ids(tokenizer, ids, "a dog", 500)
    with pytest.raises(BadRow, match="no tokenizer"):
        answer_tokens(None, [], "a")


# ------------------------------------------------------------------------------------------------------------ command


def test_the_command(served: Any, tmp_path: Path) -> None:
    directory, _, rows = served
    renamed = [{**{k: v for k, v in row.items() if k != "answer"}, "pred": row["answer"]} for row in rows[:1]]
    file = jsonl(directory / "cli.jsonl", [*renamed, "{"])
    command = ("import", file, "--model", "demo", "--out", tmp_path / "out", "--column", "answer=pred", "--no-llr")
    result = run(*command)
    assert result.code == 1 and "1 of 2 rows are refused, more than a tenth" in result.err
    assert "1 imported, 0 were there, 1 rejected" in result.out
    assert "differ by" in result.out and "(line 1)" in result.out
    assert "line 2: not JSON" in result.err
    again = run(*command, "--json").json
    assert again["imported"] == [] and again["present"] == [1]
    assert [entry["line"] for entry in again["rejected"]] == [2]
    (made,) = (tmp_path / "out").glob("*.h5")
    assert "not generated here" in succeed("inspect", made).out
    assert "Example:" in succeed("import", "--help").out


@pytest.mark.quick
def test_the_command_refuses_in_a_sentence(tmp_path: Path) -> None:
    result = run("import", tmp_path / "none.jsonl", "--model", "demo")
    assert result.code == 2 and "there is no file" in result.err
    file = jsonl(tmp_path / "a.jsonl", ["{}"])
    result = run("import", file, "--model", "demo", "--column", "answer")
    assert result.code == 2 and "FIELD=NAME" in result.err
    with pytest.raises(ProbeError, match="cannot be written"):
        import_answers(file, *probe.demo.load(), file)


def test_results_are_frozen(demo: Any, tmp_path: Path) -> None:
    result = import_answers(jsonl(tmp_path / "a.jsonl", ["{}"]), *demo, tmp_path / "out")
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.present = ()  # type: ignore[misc]
