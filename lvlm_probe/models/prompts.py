"""The inputs of a model for images and a question, by the processor's chat template or by a rule; a prompt's question.

A rule is a text in which ``{question}`` stands for the question and ``{images}`` for the image tokens; without
``{images}`` the processor itself puts the image where it belongs. ``prompt_rule`` finds the one that holds:

1. what the caller gives (``prompt=``, ``--prompt``);
2. no rule where the processor has a chat template;
3. what is declared of the model's family: ``families.yaml`` has what the model cards of families without a chat
   template document, ``register_family`` takes it from a plugin;
4. the image tokens, a line each, and the question.

Captioners and readers take no question. What they are given beside the image, if anything, is the beginning of their
answer, or a task (``"<ocr>"``): a rule without ``{question}``, which may be empty.

A template is not parsed, it is asked: rendered around marks, it shows what it puts before and behind a user's words.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lvlm_probe.errors import ProbeError
from lvlm_probe.escaping import writable
from lvlm_probe.models.anatomy import reads_a_prompt
from lvlm_probe.models.exhaustion import ran_out
from lvlm_probe.models.families import Family, family_of
from lvlm_probe.models.tokenizers import display_pieces, special_ids, tokenizer_of
from lvlm_probe.models.wrappers import generating_model

if TYPE_CHECKING:
    from PIL import Image

_MARKS = ("\ue000q\ue001", "\ue000a\ue001", "\ue000r\ue001")
"""Stand for a question, its answer and a further question: signs for private use, which no template changes."""

_TASK = re.compile(r"<[A-Z_]+>")
"""A task token, as Florence-2 has them. A question that begins with one takes the place of the rule's own."""
_SLOTS = re.compile(r"(\{images\})")
_KINDS = "mm_token_type_ids"


@dataclass(frozen=True)
class PromptRule:
    """How a prompt is made of images and a question.

    Attributes:
        text: with ``{question}`` and ``{images}``.
        origin: who says so.
        interleaved: the processor takes the images themselves between the texts, no image tokens (Idefics).
        begins: the argument of ``generate()`` that takes the text's token ids, in a model that takes no question:
            ``"decoder_input_ids"``, ``"input_ids"``, or ``"text"`` where its processor makes them.
    """

    text: str
    origin: str
    interleaved: bool = False
    begins: str = ""

    @property
    def asks(self) -> bool:
        """Whether there must be a question."""
        return not self.begins or "{question}" in self.text

    def asked(self, question: str) -> str:
        """The text for a question: without its own task where the question names one."""
        alone = _TASK.match(self.text) and _TASK.match(question)
        return _TASK.sub("", self.text, count=1) if alone else self.text

    def __str__(self) -> str:
        return f"{self.text!r} ({self.origin})"


def prompt_rule(processor: Any, model: Any = None, *, prompt: str | None = None) -> PromptRule | None:
    """Find the rule for a model's prompts.

    Args:
        processor: the model's processor.
        model: the model; without it nothing is known of its family.
        prompt: the caller's own rule.

    Returns:
        the rule; ``None`` where the processor's chat template makes the prompt.

    Raises:
        ProbeError: ``prompt`` is empty.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    family = family_of(model_type) if isinstance(model_type, str) else None
    declared = () if family is None or isinstance(family.prompt, str) else family.prompt
    interleaved = len(declared) > 1
    begins = _begins(processor, model, family)
    if prompt is not None:
        if not prompt.strip() and not begins:
            raise ProbeError('prompt is empty; it is a text such as "Question: {question} Answer:"')
        return PromptRule(prompt, "given by the caller", interleaved, begins)
    if begins:
        return PromptRule("".join(declared), f"family {model_type}, which takes no question", begins=begins)
    if _draws(processor):
        return PromptRule("{question}", "the processor draws it above the image")
    if getattr(processor, "chat_template", None):
        return None
    if declared:
        return PromptRule("".join(declared), f"family {model_type}", interleaved)
    return PromptRule("{images}\n{question}", "no rule is known of the family")


def _draws(processor: Any) -> bool:
    """Whether the processor draws the question into the image (Pix2Struct for questions)."""
    return bool(getattr(getattr(processor, "image_processor", None), "is_vqa", False))


def _begins(processor: Any, model: Any, family: Family | None) -> str:
    """Where the text goes in a model that takes no question; empty for one that takes a question."""
    if model is None or _draws(processor):
        return ""
    if isinstance(model, torch.nn.Module) and not reads_a_prompt(model):
        return "decoder_input_ids"
    return "" if family is None else family.begins


def _begun(processor: Any, images: Sequence[Image.Image], text: str, rule: PromptRule) -> Any:
    """Inputs for a model that takes no question: the image, and the beginning of the answer if there is one."""
    if rule.begins == "text":
        # In a batch, as Kosmos-2.5 takes it.
        return processor(images=list(images), return_tensors="pt", **({"text": [text]} if text else {}))
    inputs = processor(images=list(images), return_tensors="pt")
    if text:
        tokenizer = tokenizer_of(processor)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        start = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
        if rule.begins == "input_ids" and start is not None:  # the decoder's own is put there by generate()
            ids = [start, *ids]
        inputs[rule.begins] = torch.tensor([ids])
    return inputs


_IMAGE_MARKS = ("image_token", "boi_token", "video_token")


def check_question(processor: Any, question: str, image_token_id: int | None) -> None:
    """Refuse a question that holds what stands for an image in the model's prompt, or what no tokenizer reads.

    Raises:
        ProbeError: it does; the processor, or the model, would look for an image in its place.
    """
    if writable(question) != question:
        raise ProbeError(f"the question holds half of a character ({writable(question)!r}): leave it out")
    marks = {getattr(processor, name, None) for name in _IMAGE_MARKS}
    tokenizer = tokenizer_of(processor)
    if image_token_id is not None and hasattr(tokenizer, "convert_ids_to_tokens"):
        marks.add(tokenizer.convert_ids_to_tokens(image_token_id))
    for mark in marks:
        if isinstance(mark, str) and mark and mark in question:
            raise ProbeError(
                f"the question holds {mark!r}, which stands for an image in this model's prompt and is put there for "
                f"each image that is given: leave it out"
            )


def chat_inputs(
    processor: Any,
    images: Sequence[Image.Image],
    question: str,
    *,
    videos: Sequence[Any] = (),
    sampling: Mapping[str, Any] | None = None,
    rule: PromptRule | None = None,
    note: Callable[[str], None] | None = None,
) -> Any:
    """Inputs for ``generate()``: one user turn with the images first, then the videos, and the question after them.

    Args:
        processor: the model's processor.
        images: the images, in order.
        question: what is asked.
        videos: the videos, in order: paths, arrays or lists of frames.
        sampling: arguments for its video processor.
        rule: how the prompt is made, as ``prompt_rule`` finds it; by default the processor's chat template.
        note: called with a sentence when there is a rule.

    Raises:
        ProbeError: there is neither a template nor an image token, or the processor does not take the prompt.
    """
    rule = rule or prompt_rule(processor)
    if rule is None:
        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        content += [{"type": "video", "video": video} for video in videos]
        content.append({"type": "text", "text": question})
        try:
            return processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                **({"processor_kwargs": dict(sampling)} if sampling else {}),
            )
        except ValueError as error:
            if not videos or isinstance(error, ProbeError):
                raise
            raise ProbeError(
                f"{type(processor).__name__} does not take the video ({error}); its chat template may know no videos: "
                "give the prompt by prompt= (command line: --prompt)"
            ) from error
    name = type(processor).__name__
    if note is not None:
        none = "" if getattr(processor, "chat_template", None) else f"{name} has no chat template; "
        note(f"{none}the prompt is made by the rule {rule}")
    if question.strip() and rule.begins and not rule.asks:
        raise ProbeError(
            f"{name} belongs to a model that takes no question: ask none, or give the beginning of its answer, or its "
            f"task, by prompt= (command line: --prompt), in which {{question}} stands for the question"
        )
    text = rule.asked(question)
    try:
        if rule.begins:
            return _begun(processor, images, text.replace("{question}", question), rule)
        if rule.interleaved:
            parts: list[Any] = []
            for part in _SLOTS.split(text):
                parts += images if part == "{images}" else [part.replace("{question}", question)] if part else []
            return processor(text=[parts], return_tensors="pt")
        text = _with_tokens(processor, text, len(images), len(videos)).replace("{question}", question)
        given: dict[str, Any] = {"images": list(images)} if images or not videos else {}
        if videos:
            given |= {"videos": list(videos), **(sampling or {})}
        return processor(**given, text=text, return_tensors="pt")
    except Exception as error:  # of any kind: StopIteration where image tokens are missing
        if isinstance(error, ProbeError) or ran_out(error):
            raise
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        told = f" and {len(videos)} video(s)" if videos else ""
        raise ProbeError(
            f"{name} does not take the prompt {text!r} with {len(images)} image(s){told}: {first}. Give the prompt "
            f"that the model card documents by prompt= (command line: --prompt), with {{question}} and, where the "
            f"image token is to be written, {{images}}"
        ) from error


def _with_tokens(processor: Any, text: str, images: int, videos: int = 0) -> str:
    """The text with the tokens of images, and then of videos, for ``{images}``; on lines of their own where it has a
    line for them."""
    if "{images}" not in text:
        return text
    tokens: list[str] = []
    for which, count in (("an image", images), ("a video", videos)):
        kind = which.split()[1]
        token = getattr(processor, f"{kind}_token", None)
        token = getattr(token, "content", token)  # a tokenizer's AddedToken
        if count and not isinstance(token, str):
            raise ProbeError(
                f"{type(processor).__name__} has neither a chat template nor {which} token, so it cannot "
                f'be prompted; say how by prompt= (command line: --prompt), as in "Question: {{question}} Answer:", or '
                f"set processor.chat_template and save it"
            )
        tokens += [str(token)] * count
    between = "\n" if "{images}\n" in text else ""
    return text.replace("{images}", between.join(tokens))


def placed(inputs: Any, model: Any, processor: Any = None) -> Any:
    """The inputs as ``generate()`` takes them: on the model's device, floating ones in its dtype.

    With the processor also what the model's ``forward`` reads and the processor makes only when it is told to: the kind
    of each token, text or image (Cosmos 3 Edge).
    """
    make, ids = getattr(processor, f"create_{_KINDS}", None), inputs.get("input_ids")
    if make and ids is not None and _KINDS not in inputs and _KINDS in _arguments(model):
        inputs[_KINDS] = torch.as_tensor(make(ids.tolist()), dtype=ids.dtype)
    inputs = inputs.to(model.device)
    dtype = getattr(model, "dtype", None)
    for name, value in inputs.items():
        if dtype is not None and hasattr(value, "is_floating_point") and value.is_floating_point():
            inputs[name] = value.to(dtype)
    return inputs


def _arguments(model: Any) -> Mapping[str, Any]:
    """The parameters of the ``forward`` that runs in the end; none of what is no module."""
    forward = getattr(generating_model(model), "forward", None)
    return {} if forward is None else inspect.signature(forward).parameters


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
    prompt = tokenizer.decode(list(token_ids), skip_special_tokens=False)
    text, places = _squeezed(prompt)
    if (at := text.rfind(around.opening)) < 0:
        return None
    start = at + len(around.opening)
    stops = [
        found
        for closing in (around.behind, around.last)
        if (found := text.find(closing, start) if closing else len(text)) > start
    ]
    if not stops:
        return None
    turn = prompt[places[start] : places[stops[0] - 1] + 1]
    names = sorted({tokenizer.decode([index]) for index in special_ids(tokenizer)} - {""}, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, names)), "", turn).strip() if names else turn.strip()


def turns_of(processor: object | None, token_ids: Sequence[int]) -> list[tuple[str, int, int]]:
    """The turns of a conversation: who speaks (``"user"``, ``"assistant"``), and start and stop of the tokens; empty
    where the prompt does not follow the processor's chat template.

    Args:
        processor: the processor, or its tokenizer.
        token_ids: the prompt's, those of images left out.
    """
    tokenizer = tokenizer_of(processor)
    around = _around(processor, tokenizer)
    if around is None or not around.answered or not around.asked_again:
        return []
    pieces = display_pieces(tokenizer, token_ids)
    squeezed = ["".join(piece.split()) for piece in pieces]
    text = "".join(squeezed)
    token_at = [token for token, piece in enumerate(squeezed) for _ in piece]
    turns: list[tuple[str, int, int]] = []
    start = text.find(around.opening)
    if start < 0:
        return []
    start += len(around.opening)
    for who, closing in itertools.cycle([("user", around.answered), ("assistant", around.asked_again)]):
        stop = text.find(closing, start)
        if stop < 0 or (text.endswith(around.behind) and stop > len(text) - len(around.behind)):
            stop = len(text.removesuffix(around.behind)) if who == "user" else len(text)
        if stop > start:
            first = token_at[start]
            while first and not pieces[first - 1]:  # bytes that this one makes a character of
                first -= 1
            turns.append((who, first, token_at[stop - 1] + 1))
        start = stop + len(closing)
        if start >= len(text) or text[stop:] == around.behind:
            break
    return turns


class _Around(NamedTuple):
    """What stands around the words of a conversation, without white space, which tokenizers change.

    Attributes:
        opening: before a user's words.
        behind: behind the last ones, where an answer is asked for.
        last: behind the last ones, where none is.
        answered: between a user's words and the answer; empty where that is not known.
        asked_again: between an answer and a user's next words.
    """

    opening: str
    behind: str
    last: str
    answered: str = ""
    asked_again: str = ""


def _around(processor: object | None, tokenizer: Any) -> _Around | None:
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
        answered = turns[turns.index(question) + len(question) : turns.index(answer)]
        between, last = turns[turns.index(answer) + len(answer) :].split(again)
        # What both have is the beginning of a turn; the rest is a system prompt, or the end of an answer.
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before[::-1], between[::-1], strict=False))
        found = _Around("".join(sign for sign, _ in shared)[::-1], behind, last, answered, between)
    else:
        found = _Around(before, behind, behind)
    return found if found.opening else None


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
