"""Prompts by the processor's own chat template: the inputs for images and a question, and the question of a prompt.

A template is not parsed, it is asked: rendered around marks, it shows what it puts before and behind a user's words.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lvlm_probe.errors import ProbeError
from lvlm_probe.models.tokenizers import special_ids, tokenizer_of

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["chat_inputs", "placed", "question_of"]

_MARKS = ("\ue000q\ue001", "\ue000a\ue001", "\ue000r\ue001")
"""Stand for a question, its answer and a further question: signs for private use, which no template changes."""


def chat_inputs(
    processor: Any, images: Sequence[Image.Image], question: str, *, note: Callable[[str], None] | None = None
) -> Any:
    """Inputs for ``generate()``: one user turn with the images first and the question after them.

    A processor without a chat template gets its image tokens and the question.

    Args:
        processor: the model's processor.
        images: the images, in order.
        question: what is asked.
        note: called with a sentence when there is no template.

    Raises:
        ProbeError: there is neither a template nor an image token.
    """
    if getattr(processor, "chat_template", None):
        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        content.append({"type": "text", "text": question})
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    token = getattr(processor, "image_token", None)
    if not isinstance(token, str):
        raise ProbeError(
            f"{type(processor).__name__} has neither a chat template nor an image token, so it cannot be prompted; "
            f"set processor.chat_template and save it, or record in Python with probe.attach"
        )
    prompt = f"{token}\n" * len(images) + question
    if note is not None:
        note(f"{type(processor).__name__} has no chat template; the prompt is {prompt!r}")
    return processor(images=list(images), text=prompt, return_tensors="pt")


def placed(inputs: Any, model: Any) -> Any:
    """The same inputs on the model's device, floating ones in its dtype."""
    inputs = inputs.to(model.device)
    dtype = getattr(model, "dtype", None)
    for name, value in inputs.items():
        if dtype is not None and hasattr(value, "is_floating_point") and value.is_floating_point():
            inputs[name] = value.to(dtype)
    return inputs


def question_of(processor: object | None, token_ids: Sequence[int]) -> str | None:
    """The last user turn of a prompt; ``None`` where the prompt does not follow the processor's chat template.

    Args:
        processor: the processor, or its tokenizer.
        token_ids: the prompt's, those of images left out.
    """
    tokenizer = tokenizer_of(processor)
    around = _around(processor, tokenizer)
    if around is None:
        return None
    opening, closings = around
    prompt = tokenizer.decode(list(token_ids), skip_special_tokens=False)
    text, places = _squeezed(prompt)
    if (at := text.rfind(opening)) < 0:
        return None
    start = at + len(opening)
    stops = [found for closing in closings if (found := text.find(closing, start) if closing else len(text)) > start]
    if not stops:
        return None
    turn = prompt[places[start] : places[stops[0] - 1] + 1]
    names = sorted({tokenizer.decode([index]) for index in special_ids(tokenizer)} - {""}, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, names)), "", turn).strip() if names else turn.strip()


def _around(processor: Any, tokenizer: Any) -> tuple[str, tuple[str, ...]] | None:
    """What stands before a user's words, and what may stand behind the last ones, likeliest first; without white
    space, which tokenizers change."""
    place = next((one for one in (processor, tokenizer) if getattr(one, "chat_template", None)), None)
    if place is None:
        return None
    question, answer, again = _MARKS
    asked = _rendered(place, [("user", question)], prompted=True)
    turns = _rendered(place, [("user", question), ("assistant", answer), ("user", again)], prompted=False)
    if asked is None or asked.count(question) != 1:
        return None
    before, behind = asked.split(question)
    if turns is not None and answer in turns and again in turns:
        between, last = turns[turns.index(answer) + len(answer) :].split(again)
        # What both have is the beginning of a turn; the rest is a system prompt, or the end of an answer.
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before[::-1], between[::-1], strict=False))
        opening = "".join(sign for sign, _ in shared)[::-1]
    else:
        opening, last = before, behind
    return (opening, (behind, last)) if opening else None


def _rendered(place: Any, turns: Sequence[tuple[str, str]], *, prompted: bool) -> str | None:
    for whole in (False, True):  # templates of tokenizers take text, those of processors its parts
        messages = [
            {"role": role, "content": text if whole else [{"type": "text", "text": text}]} for role, text in turns
        ]
        try:
            made = place.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted)
        except Exception:  # a template refuses in a way of its own what it does not know
            continue
        if isinstance(made, str) and all(made.count(text) == 1 for _, text in turns):
            return _squeezed(made)[0]
    return None


def _squeezed(text: str) -> tuple[str, list[int]]:
    """A text without white space, and the place of each of its characters."""
    places = [place for place, sign in enumerate(text) if not sign.isspace()]
    return "".join(text[place] for place in places), places
