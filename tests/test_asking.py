"""One line from a question to a figure, on the embedded model and on one whose chat template is another."""

from __future__ import annotations

import copy
import gc
import re
from pathlib import Path

import pytest
import tiny_models
import torch

import lvlm_probe as probe
from lvlm_probe.asking import Answer, ask


@pytest.fixture(scope="module")
def scene():
    return probe.demo.scenes(1, kinds=["pair"])[0]


@pytest.fixture(scope="module")
def answer(demo, scene) -> Answer:
    return ask(*demo, scene.image, scene.question, max_new_tokens=20)


@pytest.mark.quick
def test_the_answer_is_that_of_generate_and_leads_on_to_every_verb(demo, scene, answer):
    model, processor = demo
    inputs = processor.apply_chat_template(
        scene.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    said = model.generate(**inputs, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
    assert answer.text == processor.decode(said, skip_special_tokens=True).strip()
    assert answer.trace.question == scene.question
    assert answer.replay.token_ids.tolist() == said.tolist()
    assert probe.verify(answer.trace, model, processor).within()
    assert repr(answer).startswith(f"<Answer {answer.text!r}")


def test_maps_are_checked_and_kept_for_figures_and_reports(demo, scene, tmp_path):
    answer = ask(*demo, [scene.image], scene.question, out=tmp_path / "runs", max_new_tokens=20)
    word = [one.text for one in answer.words if one.text.isalpha()][-1]
    heat = answer.explain(word, method="center")
    again = answer.explain(method="center", check=False)
    (first, score), (second, none) = answer.explained
    assert first is heat and second is again and none is None
    assert heat.selection.text == word
    assert score == probe.evaluate(heat, answer.replay)
    drawn = answer.figure(tmp_path / "figure.pdf")
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")
    assert "not checked" in [item.get_text() for item in drawn.texts]
    page = answer.report(tmp_path / "report.html")
    before = page.read_text("utf-8")
    assert scene.question in before
    assert answer.report(page) == page  # a cell that runs again replaces its page
    assert Path(answer.trace.path).parent == tmp_path / "runs"


def test_a_figure_alone_explains_the_answer(demo, scene, tmp_path):
    answer = ask(*demo, scene.image, scene.question, max_new_tokens=20)
    answer.explain = lambda: Answer.explain(answer, method="center")
    answer.figure(tmp_path / "f.png", dpi=60)
    assert len(answer.explained) == 1


def test_the_trace_goes_with_the_last_of_what_was_made_of_the_answer(demo, scene, tmp_path):
    """Nobody keeps the answer of which a line wants the map, the trace or the replay alone."""
    answer = ask(*demo, scene.image, scene.question, max_new_tokens=4)
    path = Path(answer.trace.path)
    for name, used in (
        ("replay", lambda replay: probe.explain(replay, method="center")),
        ("trace", lambda trace: trace.attention),
        ("heat", lambda heat: heat.figure(tmp_path / "f.png", dpi=40)),
        ("copy", lambda heat: heat.figure(tmp_path / "g.png", dpi=40)),
    ):
        left = answer.explain(method="center", check=False) if name in ("heat", "copy") else getattr(answer, name)
        left = copy.deepcopy(left) if name == "copy" else left
        del answer
        gc.collect()
        assert used(left) is not None
        del left
        gc.collect()
        assert not path.exists(), name
        answer = ask(*demo, scene.image, scene.question, max_new_tokens=4)
        path = Path(answer.trace.path)


def test_another_template_several_images_and_paths(tmp_path):
    model, processor = tiny_models.build("qwen2_5_vl")
    paths = []
    for seed in range(2):
        paths.append(tmp_path / f"{seed}.png")
        tiny_models.picture(seed=seed).save(paths[-1])
    answer = ask(model, processor, paths, "Which is brighter?", max_new_tokens=3, min_new_tokens=3)
    assert len(answer.trace.images) == 2
    assert answer.trace.question == "Which is brighter?"
    assert "<b>" not in answer._repr_html_()
    assert "nats" in answer._repr_html_()


@pytest.mark.parametrize(
    ("family", "mark"),
    [("llava", "<image>"), ("gemma3", "<start_of_image>"), ("gemma3", "<image_soft_token>"), ("mllama", "<|image|>")],
)
def test_a_question_that_holds_the_mark_of_an_image_is_refused(family, mark):
    with pytest.raises(probe.ProbeError, match=f"the question holds {re.escape(repr(mark))}"):
        ask(*tiny_models.build(family), tiny_models.picture(), f"What is in {mark} here?", max_new_tokens=2)


def test_refusals(demo, scene):
    with pytest.raises(probe.ProbeError, match="no question"):
        ask(*demo, scene.image, "  ")
    with pytest.raises(probe.ProbeError, match="half of a character"):
        ask(*demo, scene.image, "a \ud800")
    with pytest.raises(probe.errors.ImageError, match="no such file"):
        ask(*demo, "nowhere.png", "What?")
    with pytest.raises(probe.errors.ImageError, match="fetch=True"):
        ask(*demo, "https://example.com/cat.png", "What?")
    assert not hasattr(demo[0].generate, "__lvlm_probe_shadow__")  # nothing is left attached


def test_an_answer_of_no_token_is_not_called_one_without_an_image():
    model, processor = tiny_models.build("llava")
    with torch.no_grad():
        model.lm_head.weight.mul_(torch.nan)  # whose likeliest token is the first, padding
    with pytest.warns(probe.ProbeWarning), pytest.raises(probe.ProbeError, match="returned no new token"):
        ask(model, processor, tiny_models.picture(), "What is on the left?", max_new_tokens=3)
