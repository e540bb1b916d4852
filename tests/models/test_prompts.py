"""Prompts of families without a chat template: what their model cards document, and what a caller says."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "families"), str(Path(__file__).parents[1])]

import torchvision_shim  # noqa: E402, F401  (before anything imports torchvision)
from command_line import run  # noqa: E402
from tiny_models import make_tokenizer, picture  # noqa: E402
from zoo import MEMBERS, build, load_members  # noqa: E402

import lvlm_probe as probe  # noqa: E402
from lvlm_probe.models import families  # noqa: E402
from lvlm_probe.models.families import Family, register_family  # noqa: E402
from lvlm_probe.models.prompts import PromptRule, chat_inputs, prompt_rule  # noqa: E402

QUESTION = "What colour is the circle?"
CARDS = {
    "blip-2": f"Question: {QUESTION} Answer:",
    "instructblip": QUESTION,
    "kosmos-2": f"Question: {QUESTION} Answer:",
    "florence2": f"<VQA>{QUESTION}",
    "idefics": f"User: {QUESTION}<end_of_utterance>\nAssistant:",
    "paligemma": f"answer en {QUESTION}\n",  # the processor ends the line
    "got_ocr2": f"<|im_start|>user\n<img></img>\n{QUESTION}<|im_end|><|im_start|>assistant\n",
    "vipllava": "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    f"detailed, and polite answers to the human's questions.###Human: \n{QUESTION}###Assistant:",
    "llava": f"USER: \n{QUESTION} ASSISTANT:",
}
IMAGE = (
    "<image>",
    "</image>",
    "<fake_token_around_image>",
    "<unk>",
    "<imgpad>",
    "<bos>",
    "<eos>",
    "<pad>",
    "</s>",
    "<s>",
)

load_members()


def bare(name: str) -> Any:
    """The family's processor as released, without a chat template, and a model of which only the type is known."""
    member = MEMBERS[name]
    processor = member.processor(make_tokenizer(member), "pil")
    processor.chat_template = None
    return processor, SimpleNamespace(config=SimpleNamespace(model_type=name))


def asked(name: str, question: str = QUESTION, **options: Any) -> str:
    """The prompt that a family's processor made, without the tokens of the image."""
    processor, model = bare(name)
    inputs = chat_inputs(processor, [picture()], question, rule=prompt_rule(processor, model, **options))
    ids = inputs["input_ids"][0]
    if (image := inputs.get("image_embeds_position_mask")) is not None:  # Kosmos-2: any ids stand for the image
        ids = ids[image[0] == 0]
    text = processor.tokenizer.decode(ids)
    for token in IMAGE:
        text = text.replace(token, "")
    return text.removeprefix(" ") if name == "kosmos-2" else text


@pytest.mark.parametrize("name", CARDS)
def test_the_prompt_is_the_one_of_the_model_card(name: str) -> None:
    assert asked(name) == CARDS[name]


def test_a_task_of_florence_stands_alone() -> None:
    assert asked("florence2", "<CAPTION>") == "What does the image describe?"  # what its processor makes of the task
    assert asked("florence2", "<REGION_TO_CATEGORY> a b") == "What is the region a b?"


@pytest.mark.parametrize("name", ["blip-2", "idefics", "llava", "florence2"])
def test_the_callers_prompt_goes_before_the_family(name: str) -> None:
    rule = "Look. {question} Say:" + ("{images}" if name in ("idefics", "llava") else "")
    assert asked(name, prompt=rule) == f"Look. {QUESTION} Say:"


def test_the_callers_prompt_goes_before_a_chat_template() -> None:
    _, processor = probe.demo.load()
    assert prompt_rule(processor) is None
    inputs = chat_inputs(processor, [picture()], QUESTION, rule=prompt_rule(processor, prompt="{images}Q {question}"))
    assert processor.tokenizer.decode(inputs["input_ids"][0]).endswith(f"Q {QUESTION}")


def test_a_question_is_never_read_as_a_rule() -> None:
    assert asked("llava", "{images} <b> {question}") == "USER: \n{images} <b> {question} ASSISTANT:"


def test_a_plugins_family_gives_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_FAMILIES", {})
    register_family("prompted_vlm", Family(prompt="Q: {question} A:"))
    processor, model = bare("blip-2")
    model.config.model_type = "prompted_vlm"
    assert prompt_rule(processor, model) == PromptRule("Q: {question} A:", "family prompted_vlm")
    with pytest.raises(probe.errors.PluginError, match="prompt"):
        Family(prompt=("a", 3))  # type: ignore[arg-type]


def test_a_prompt_that_the_processor_does_not_take_is_told_with_the_way_out() -> None:
    processor, _ = bare("florence2")
    with pytest.raises(probe.ProbeError, match=r"does not take the prompt '<image>.*--prompt"):
        chat_inputs(processor, [picture()], QUESTION)  # without the family: image tokens, which it writes itself
    processor, model = bare("kosmos-2")
    with pytest.raises(probe.ProbeError, match=r"nor an image token.*--prompt"):
        chat_inputs(processor, [picture()], QUESTION)
    with pytest.raises(probe.ProbeError, match="prompt is empty"):
        prompt_rule(processor, model, prompt=" ")


def test_florence_is_asked_at_the_command_line(tmp_path: Path) -> None:
    built = build("florence2", "pil")
    built.model.save_pretrained(tmp_path / "model")
    built.processor.chat_template = None
    built.processor.save_pretrained(tmp_path / "model")
    built.picture().save(tmp_path / "image.png")
    common = ("--model", tmp_path / "model", "--image", tmp_path / "image.png", "--max-new-tokens", "3")
    done = run("record", *common, "--question", QUESTION, "--out", tmp_path / "a")
    assert done.code == 0, done.err
    assert "no chat template; the prompt is made by the rule '<VQA>{question}' (family florence2)" in done.err
    (trace,) = probe.open_store(tmp_path / "a")
    assert trace.meta["prompt_rule"] == "<VQA>{question}" and f"<VQA>{QUESTION}" in trace.prompt
    assert trace.question == QUESTION and "<VQA>{question}" in trace.describe()
    done = run("record", *common, "--question", QUESTION, "--prompt", "Say: {question}", "--out", tmp_path / "b")
    assert done.code == 0, done.err
    (trace,) = probe.open_store(tmp_path / "b")
    assert trace.meta["prompt_rule"] == "Say: {question}" and f"Say: {QUESTION}" in trace.prompt
