"""The question of a prompt, by chat templates as families write them."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lvlm_probe.models.prompts import question_of, turns_of

QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "<bos>{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] if message['content'] is string else message['content'][-1]['text'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "<s>{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] }}</s>{% endif %}{% endfor %}"
)
VICUNA = (
    "A chat between a human and an assistant. {% for message in messages %}{{ message['role'] | upper }}: "
    "{{ message['content'] if message['content'] is string else message['content'][-1]['text'] }}"
    "{{ ' ' if message['role'] == 'user' else '</s>' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SPECIAL = [
    "<s>", "</s>", "<bos>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|vision_start|>",
    "<|vision_end|>", "<|image_pad|>",
]  # fmt: skip


def tokenizer(template: str | None) -> Any:
    """A token for every byte, and the special tokens of all families."""
    vocabulary = {piece: index for index, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=raw)
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    made.chat_template = template
    return made


def ids(found: Any, prompt: str) -> list[int]:
    return found(prompt, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("template", [QWEN, GEMMA, MISTRAL, VICUNA], ids=["qwen", "gemma", "mistral", "vicuna"])
@pytest.mark.parametrize("question", ["What is this?", "图中是什么？", "ما هذا؟", "Read it:\n1. top\n2. bottom"])
def test_the_last_user_turn_is_the_question(template: str, question: str) -> None:
    found = tokenizer(template)
    asked = [{"role": "user", "content": question}]
    before = [{"role": "user", "content": "And that?"}, {"role": "assistant", "content": "A cat."}]
    for turns in (asked, before + asked):
        for prompted in (True, False):
            prompt = found.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompted)
            assert question_of(found, ids(found, prompt)) == question
    answered = found.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) + " It is"
    assert question_of(found, ids(found, answered)) == question, "a begun answer is none of it"


def test_system_prompts_and_what_stands_around_images_are_no_question() -> None:
    found = tokenizer(QWEN)
    prompt = found.apply_chat_template(
        [
            {"role": "system", "content": "Speak like a pirate."},
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is this?"}],
            },
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert "pirate" in prompt and "<|image_pad|>" in prompt
    assert question_of(found, ids(found, prompt)) == "What is this?"


def test_a_prompt_of_no_template_has_no_known_question() -> None:
    for template in (QWEN, VICUNA):
        assert question_of(tokenizer(template), ids(tokenizer(template), "Question: what? Answer:")) is None
    assert question_of(tokenizer(None), ids(tokenizer(None), "What is this?")) is None
    assert question_of(tokenizer("{{ raise_exception('no') }}"), [5, 6]) is None
    assert question_of(None, [1, 2]) is None


@pytest.mark.parametrize("template", [QWEN, GEMMA, MISTRAL, VICUNA], ids=["qwen", "gemma", "mistral", "vicuna"])
@pytest.mark.parametrize("question", ["What is this?", "图中是什么？", "Read it:\n1. top\n2. bottom"])
def test_turns_of_a_conversation(template: str, question: str) -> None:
    found = tokenizer(template)
    turns = [
        {"role": "user", "content": "And that?"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": question},
    ]
    for said, prompted in ((turns, True), (turns[:1], True), (turns[2:], True), (turns, False)):
        prompt = ids(found, found.apply_chat_template(said, tokenize=False, add_generation_prompt=prompted))
        spans = turns_of(found, prompt)
        assert [who for who, _, _ in spans] == [turn["role"] for turn in said]
        told = [found.decode(prompt[start:stop]).removesuffix("</s>") for _, start, stop in spans]
        told = [text.removesuffix("<|im_end|>").removesuffix("<end_of_turn>").strip() for text in told]
        assert told == [turn["content"] for turn in said]


def test_an_answer_that_begins_with_a_thought_is_no_turn() -> None:
    found = tokenizer(QWEN.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"))
    prompt = found.apply_chat_template(
        [{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<think>\n")
    assert [who for who, _, _ in turns_of(found, ids(found, prompt))] == ["user"]


def test_a_prompt_of_no_template_has_no_known_turns() -> None:
    for template in (QWEN, VICUNA, None, "{{ raise_exception('no') }}"):
        assert turns_of(tokenizer(template), ids(tokenizer(template), "Question: what? Answer:")) == []
    assert turns_of(None, [1, 2]) == []
