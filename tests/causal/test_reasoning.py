"""Steps of an answer: how it is split, what a trace knows of each, and what the conclusion loses without one."""

from __future__ import annotations

import itertools
import json
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from test_parts import by_hand

import lvlm_probe as probe
from lvlm_probe import causal
from lvlm_probe.causal.reasoning import Step, Steps
from lvlm_probe.errors import ExplainError


def said(text: str, special: tuple[str, ...] = (), llr: Any = None) -> Any:
    """An answer in pieces of up to four letters, as a trace has it."""
    parts = re.split(f"({'|'.join(map(re.escape, special))})", text) if special else [text]
    pieces = [p for part in parts for p in ([part] if part in special else re.findall(r"\n| ?[^\s]{1,4}| ", part))]
    assert "".join(pieces) == text
    flags = np.array([piece in special for piece in pieces])
    trace = SimpleNamespace(points=(), layout=SimpleNamespace(image_positions=np.zeros(0)))
    return SimpleNamespace(tokens=pieces, special=flags, llr=llr, trace_id="t", trace=trace)


def split(text: str, special: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    answer = said(text, special)
    steps = causal.find_steps(answer)
    spans = [step.span for step in steps]
    assert spans == sorted(spans) and all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    for step in steps:
        tokens = "".join(answer.tokens[step.start : step.stop])
        assert step.text[1:-1] in tokens or len(step.text) < 3
    return [(step.kind, step.text) for step in steps]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "<think>I look. There are 3.5 dots, e.g. Dr. Who's.\n1. One is red.\n\nStep 2. Two!</think>\nIt is red.",
            [
                ("thought", "I look."),
                ("thought", "There are 3.5 dots, e.g. Dr. Who's."),
                ("thought", "1. One is red."),
                ("thought", "Step 2. Two!"),
                ("answer", "It is red."),
            ],
        ),
        ("I look.\n</think>\n\nRed.", [("thought", "I look."), ("answer", "Red.")]),
        ("[THINK]Hm? Yes.[/THINK]Red", [("thought", "Hm?"), ("thought", "Yes."), ("answer", "Red")]),
        (
            'See.\n<tool_call>\n{"name": "zoom. in", "at": [1, 2]}\n</tool_call>\nDone',
            [("answer", "See."), ("call", '{"name": "zoom. in", "at": [1, 2]}'), ("answer", "Done")],
        ),
        ("So.\nAction: zoom[1, 2]\nred", [("answer", "So."), ("call", "Action: zoom[1, 2]"), ("answer", "red")]),
        ("```\na. b\nc\n```\nEnd", [("answer", "a. b\nc"), ("answer", "End")]),
        ("这是红色的。 那是蓝色的！ 好", [("answer", "这是红色的。"), ("answer", "那是蓝色的！"), ("answer", "好")]),
        ("- one\n- two\n---\n", [("answer", "- one"), ("answer", "- two")]),
        ("<answer>It is 5 < 6. Yes</answer>", [("answer", "It is 5 < 6."), ("answer", "Yes")]),
        ("It is A. I see 3. Yes.", [("answer", "It is A."), ("answer", "I see 3."), ("answer", "Yes.")]),
        ("Only one", [("answer", "Only one")]),
    ],
)
def test_an_answer_is_split_into_steps(text: str, expected: list[tuple[str, str]]) -> None:
    assert split(text) == expected


def test_special_tokens_are_no_step_but_may_be_tags() -> None:
    steps = causal.find_steps(said("<think>Aha. Bah.</think>C.<|end|>", ("<think>", "</think>", "<|end|>")))
    assert [(step.kind, step.text) for step in steps] == [("thought", "Aha."), ("thought", "Bah."), ("answer", "C.")]
    assert steps.steps[0].start == 1
    assert max(step.stop for step in steps) < len(said("<think>Aha. Bah.</think>C.<|end|>").tokens)
    for nothing in ("", " \n", "<think></think>", "..."):
        with pytest.raises(ExplainError, match="no words"):
            causal.find_steps(said(nothing))


def test_a_step_has_the_bytes_that_begin_its_first_character() -> None:
    answer = said("See it.\n猫 sat.")
    at = answer.tokens.index("猫")
    answer.tokens[at:at] = ["", ""]
    answer.special, answer.llr = np.zeros(len(answer.tokens), bool), np.arange(len(answer.tokens), dtype=np.float32)
    step = list(causal.find_steps(answer))[-1]
    assert (step.text, step.start, step.llr) == ("猫 sat.", at, sum(range(at, len(answer.tokens))))


def test_the_step_where_the_image_comes_in() -> None:
    """Words that the image makes unlikely do not hide the one that comes from it."""
    answer = said("Who b c. Dor e f. Gus h.")
    answer.llr = np.array([-9, 0.5, 3, -8, 9, -1, 2, 0.9], dtype=np.float32)
    steps = causal.find_steps(answer)
    assert [step.from_image for step in steps] == [3.0, 9.0, 2.0]
    assert steps.steps[1].llr == pytest.approx(0.0)
    assert steps.sees == 1 and steps.decides is None
    assert "step 2 of 3 (“Dor e f.”), +9.0 nats" in steps.verdict
    answer.llr = np.zeros(8)
    assert causal.find_steps(answer).verdict == "No word of any step comes from the image (LLR over 1)."
    answer.llr = None
    assert "was not recorded" in causal.find_steps(answer).verdict


@pytest.fixture(scope="module")
def reasoned(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny random model whose answer is given: three sentences."""
    folder = tmp_path_factory.mktemp("reasoned")
    model, processor = tiny_models.build("llava")
    tiny_models.picture().save(folder / "a.png")
    answer = {"image": "a.png", "question": "What is this?", "answer": "the small dog. it is red. a dog."}
    (folder / "a.json").write_text(json.dumps([answer]))
    probe.import_answers(folder / "a.json", model, processor, folder / "runs")
    trace = probe.open_store(folder / "runs")[-1]
    return probe.replay(trace, model, processor)


def test_a_trace_knows_of_each_step_without_a_pass(reasoned: Any) -> None:
    trace = reasoned.trace
    steps = causal.find_steps(trace)
    assert [step.text for step in steps] == ["the small dog.", "it is red.", "a dog."]
    rows = trace.attention.values.sum(-1).mean((1, 2))
    for step in steps:
        assert step.llr == pytest.approx(float(trace.llr[step.start : step.stop].sum()), abs=1e-5)
        assert step.looking == pytest.approx(float(rows[step.start : step.stop].mean()), abs=1e-3)
    assert steps.llr == pytest.approx(trace.llr.tolist())
    heat = probe.explain(trace, method="attention", tokens=steps.steps[1].span)
    assert heat.selection.indices == tuple(range(*steps.steps[1].span))


def test_what_the_conclusion_loses_is_that_of_passes_by_hand(reasoned: Any) -> None:
    fresh = probe.replay(reasoned.trace, reasoned.model, reasoned.processor)  # whose baseline nobody has asked for
    steps = causal.check_steps(fresh, progress=False)
    *before, last = steps
    end = slice(last.start, last.stop)
    whole = by_hand(reasoned, (True,), set())[end].sum()
    for step in before:
        places = set(range(reasoned.prompt_length + step.start, reasoned.prompt_length + step.stop))
        assert step.unread == pytest.approx(whole - by_hand(reasoned, (True,), places)[end].sum(), abs=1e-3)
    assert last.unread is None and steps.conclusion == "a dog."
    assert steps.passes == 2 + 2 * len(before)  # and on the baseline, for the ratios
    one = causal.check_steps(reasoned, steps=[1], progress=False)
    assert one.steps[0].unread is None and one.steps[1].unread == pytest.approx(before[1].unread, abs=1e-5)
    assert Steps.from_dict(json.loads(json.dumps(steps.to_dict()))) == steps
    for wrong in ({"steps": [2]}, {"steps": [7]}, {"tokens": (0, 1)}):
        with pytest.raises(ExplainError, match="before the conclusion"):
            causal.check_steps(reasoned, progress=False, **wrong)
    with pytest.raises(ExplainError, match="not a stored Steps"):
        Steps.from_dict({"steps": [{"text": "a"}]})


def test_a_step_that_does_not_look_is_blind_where_it_stands(reasoned: Any) -> None:
    """Against attention masks written out: the step's own positions, and none else, do not see the image."""
    steps = causal.check_steps(reasoned, steps=[0], progress=False)
    first, last = steps.steps[0], steps.steps[-1]
    images = set(reasoned.trace.layout.image_positions.tolist())
    place = reasoned.prompt_length
    ids = torch.cat([reasoned.input_ids, reasoned.token_ids[:-1]])
    mask = torch.full((len(ids), len(ids)), torch.finfo(torch.float32).min).triu(1)
    for query in range(place + first.start - 1, place + first.stop):
        mask[query, sorted(images)] = torch.finfo(torch.float32).min
    pixels = reasoned.processor.image_processor([reasoned.image()], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = reasoned.model(input_ids=ids[None], pixel_values=pixels, attention_mask=mask[None, None]).logits[0]
    log_probs = logits.double().log_softmax(-1)[place - 1 :].gather(1, reasoned.token_ids[:, None])[:, 0]
    end = slice(last.start, last.stop)
    lost = float(reasoned.original_log_probs.double()[end].sum() - log_probs[end].sum())
    assert first.unseen == pytest.approx(lost, abs=1e-3) and abs(lost) > 1e-4


def test_the_step_that_decided_is_seen_on_the_page(reasoned: Any, tmp_path: Any) -> None:
    steps = causal.check_steps(reasoned, progress=False)
    decided = Steps.from_dict(
        {**steps.to_dict(), "steps": [{**step, "unread": [0.5, 4.0, None][k]} for k, step in enumerate(
            steps.to_dict()["steps"])]}
    )  # fmt: skip
    assert decided.decides == 1 and "Step 2 of 3 (“it is red.”) decides “a dog.”: 4.0 nats" in decided.verdict
    heats = [
        probe.explain(reasoned.trace, method="attention", tokens=span)
        for span in ((0, len(reasoned.tokens)), decided.steps[1].span)
    ]
    page = probe.report(heats, evidence=decided, out=tmp_path / "page.html").read_text()
    template = page.split('<template id="evidence-0">')[1].split("</template>")[0]
    cards = template.split("<li ")[1:]
    assert len(cards) == 3 and "decides</span>" in cards[1] and "decides</span>" not in cards[0] + cards[2]
    assert [card.count("<img") for card in cards] == [0, 1, 0]
    assert f'data-tokens="{decided.steps[1].start}-{decided.steps[1].stop}"' in cards[1]


def test_a_long_answer_costs_one_reading_of_few_numbers(tmp_path: Any) -> None:
    """4,000 tokens: the rows of attention are never read, and the curve on the page has a bound number of bars."""
    from trace_samples import sample_capture

    from lvlm_probe.pages.evidence import evidence_markup
    from lvlm_probe.trace import Trace, open_trace, write
    from lvlm_probe.trace.records import PointRecord

    count = 4000
    capture = sample_capture()
    row = capture.rows[0]
    words = [" Look", " at", " it", "."] * (count // 4)
    generator = np.random.default_rng(0)
    mass = generator.random((count, 2, 1)).astype(np.float32)
    row.tokens, row.token_ids = words, np.arange(count)
    row.special = np.zeros(count, bool)
    row.log_probs = -generator.random(count).astype(np.float32)
    row.baseline_log_probs = row.log_probs - 2 * generator.random(count).astype(np.float32)
    row.top_log_probs = row.top_tokens = None
    tokens = len(row.image_positions)
    rows = np.zeros((count, 2, 1, tokens), np.float32)
    axes = ("step", "layer", "head")
    row.points = {
        "decoder.attention": PointRecord(rows, (*axes, "image_token"), (0, 1), "head_mean"),
        "decoder.attention_text_mass": PointRecord(mass, axes, (0, 1), "head_mean"),
    }
    trace = open_trace(write(capture, tmp_path))
    read: list[str] = []
    own = Trace.point
    try:
        Trace.point = lambda self, name: (read.append(name), own(self, name))[1]  # type: ignore[method-assign]
        steps = causal.find_steps(trace)
    finally:
        Trace.point = own  # type: ignore[method-assign]
    assert read == ["decoder.attention_text_mass"] and "attention" not in vars(trace)
    assert len(steps) == count // 4
    assert steps.steps[7].looking == pytest.approx(1 - float(mass[28:32].mean()), abs=1e-5)
    markup = evidence_markup([steps])
    assert markup.count("<li ") == count // 4
    assert len(re.findall(r"<rect[^>]*width=\"0.9\"", markup)) <= 600


@pytest.mark.parametrize("steps", [(Step("a", 0, 1, "answer"),)])
def test_what_was_not_recorded_is_not_drawn(steps: Any) -> None:
    from lvlm_probe.pages.evidence import evidence_markup

    markup = evidence_markup([Steps(steps, (), "t")])
    assert "was not recorded" in markup and "<rect" not in markup
