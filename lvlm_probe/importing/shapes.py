"""What programs write of an answer: the fields of a row, wherever its writer put them.

A row has two halves, what was asked and what was said. Each is looked for where the programs of ``SHAPES`` keep it: the
question and its images in ``messages`` (of a request, of a line of batch input), in ``conversations``, or under names
of their own; the answer in ``choices[0]``, ``outputs[0]``, beside ``meta_info``, in ``resps``, or under a name of its
own. So a response alone, a pair of request and response, and a response copied into a row of one's own are all read.
Nothing here looks at types closer than it needs to: ``rows`` checks every field.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lvlm_probe.importing.refusals import BadRow, shortened
from lvlm_probe.kinds import is_whole

FIELDS: dict[str, tuple[str, ...]] = {
    "image": ("image", "images", "image_path", "image_file"),
    "question": ("question",),
    "prompt": ("prompt",),
    "answer": ("answer", "response", "output", "generated_text", "completion", "text"),
    "token_ids": ("token_ids", "output_token_ids", "answer_token_ids", "output_ids"),
    "logprobs": ("logprobs", "log_probs", "output_token_logprobs"),
    "id": ("custom_id", "id", "question_id", "request_id"),
    "engine": ("engine", "model_id"),
}
"""Field → the names it is looked for under, in this order."""

SHAPES: dict[str, str] = {
    "openai": "OpenAI chat completions",
    "vllm": "vLLM outputs",
    "sglang": "SGLang outputs",
    "llava": "LLaVA conversations",
    "lmms-eval": "lmms-eval samples",
    "vlmevalkit": "VLMEvalKit results",
    "plain": "plain rows",
}
"""Shape → what a person calls it."""

IDS = ("custom_id", "question_id", "index", "doc_id", "id", "request_id")
"""Names that rows of requests and of answers are joined by, in this order."""

_SAID = ("answer", "response", "output", "generated_text", "completion", "prediction", "pred", "model_answer",
         "model_output", "model_response")  # fmt: skip
"""Names for what a model said. ``answer`` may also be the truth: two that differ have to be told apart by the user."""

_LIKE = {
    "image": ("img", "picture", "photo", "file_name", "filename", "path", "image_url", "img_path", "image_id"),
    "question": ("query", "instruction", "text", "input", "user", "ask", "text_input", "problem"),
    "answer": (
        *_SAID,
        "caption",
        "reply",
        "generated",
        "hypothesis",
        "assistant",
        "result",
        "predicted",
        "text_output",
    ),
    "token_ids": ("ids", "tokens", "output_tokens"),
    "logprobs": ("logprob", "token_logprobs", "scores"),
}
"""Names that others use, for a hint; too uncertain to be taken unasked."""

_MORE = ("messages", "template", "prompt_ids", "finish", "ended", "scored", "reasoning")
_IMAGE = "<image>"
"""The place of an image in a text of LLaVA's, and of many after it."""

_NO_SWITCH = (
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "return_dict",
    "return_tensors",
)
"""Arguments beside the switches of a chat template."""

_NOTHING_SAID = dict.fromkeys(("answer", "token_ids", "logprobs"))
"""Where a response is, what the row calls so beside it is something else: the truth, or a setting of the request."""

_DEPTH = 4
"""How far a response is looked for in objects in one another."""


def is_request(row: Mapping[str, Any]) -> bool:
    """Whether a row is a line of batch input: what was asked, without an answer."""
    return "custom_id" in row and isinstance(row.get("body"), Mapping) and not row.get("response")


def fields_of(
    content: Mapping[str, Any],
    *,
    request: Mapping[str, Any] | None = None,
    columns: Mapping[str, str] | None = None,
    shape: str | None = None,
) -> dict[str, Any]:
    """The fields of a row by name, ``None`` where there is none: those of ``FIELDS``, and of its shape ``messages``,
    ``template``, ``prompt_ids``, ``finish``, ``ended``, ``scored``, ``reasoning``, ``notes`` and ``shape``.

    Args:
        content: the row.
        request: the row of another file that holds what was asked.
        columns: field → name in the row; dots lead into objects (``doc.question``).
        shape: one of ``SHAPES``, to be taken whatever the row looks like.

    Raises:
        BadRow: it holds an error instead of an answer, or an answer of another kind.
    """
    holder = _response(content)
    shape = shape or _shape_of(content, holder)
    fields: dict[str, Any] = dict.fromkeys((*FIELDS, *_MORE))
    fields["notes"] = []
    _take_plain(fields, content, asked=False)
    if shape == "plain" and "answer" not in (columns or {}):
        _refuse_two_answers(content)
    said = _ANSWERS[shape](content, holder, fields)
    fields.update({name: value for name, value in said.items() if value is not None})
    _take_question(fields, content, request)
    for name, column in (columns or {}).items():
        fields[name] = _at(content, column)
        if fields[name] is None and request is not None:
            fields[name] = _at(request, column)
    fields["shape"] = shape
    return fields


def found_in(content: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value under the first name that has one."""
    return next((content[name] for name in names if content.get(name) is not None), None)


def keys_of(content: Mapping[str, Any], missing: str = "") -> str:
    """The names that a row has, for a message; the nearest to a missing field with the option that takes it."""
    keys = [repr(str(key)[:40]) for key in itertools.islice(content, 12)]
    listed = ", ".join(keys + ["…"] * (len(content) > len(keys))) or "nothing"
    filled = [str(key) for key in itertools.islice(content, 100) if content[key] not in (None, "")]
    names = [name for name in filled if name not in FIELDS.get(missing, ())]
    likely = [name for name in _LIKE.get(missing, ()) if name in names]
    likely += difflib.get_close_matches(missing, names, 1, 0.7)
    return f"{listed}; is it {likely[0][:40]!r}? --column {missing}={likely[0][:40]}" if likely and missing else listed


# ------------------------------------------------------------------------------------------------------- what was said


def _response(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The object that holds the answer: the row, or the response in it, or its body. Raises ``BadRow``."""
    holder = content
    for _ in range(_DEPTH):
        error = holder.get("error")
        status = holder.get("status_code")
        answered = _has_answer(holder) or isinstance(found_in(holder, FIELDS["answer"]), str)
        if (isinstance(status, int) and status >= 400) or (error and not answered):
            body = holder.get("body")
            told = error or (body.get("error") if isinstance(body, Mapping) else None) or f"status {status}"
            told = told.get("message", told) if isinstance(told, Mapping) else told
            raise BadRow(f"the engine gave an error instead of an answer: {shortened(told, 160)}")
        if _has_answer(holder):
            return holder
        inner = found_in(holder, ("response", "body", "output", "result", "completion", "request_output"))
        if isinstance(inner, list) and len(inner) == 1:
            inner = inner[0]
        if not isinstance(inner, Mapping):
            return holder
        holder = inner
    return holder


def _has_answer(holder: Mapping[str, Any]) -> bool:
    return any(isinstance(holder.get(name), list) for name in ("choices", "outputs")) or (
        holder.get("object") == "response" or "meta_info" in holder
    )


def _shape_of(content: Mapping[str, Any], holder: Mapping[str, Any]) -> str:
    if isinstance(holder.get("choices"), list) or holder.get("object") == "response":
        return "openai"
    if isinstance(holder.get("outputs"), list):
        return "vllm"
    if isinstance(holder.get("meta_info"), Mapping):
        return "sglang"
    if isinstance(content.get("conversations"), list):
        return "llava"
    if "doc_id" in content and ("resps" in content or "filtered_resps" in content):
        return "lmms-eval"
    if "index" in content and "prediction" in content and "question" in content:
        return "vlmevalkit"
    if isinstance(content.get("messages"), list) or isinstance(content.get("message"), Mapping):
        return "openai"
    return "plain"


def _plain(content: Mapping[str, Any], holder: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """A row of somebody's own; what was said may be an object in it."""
    said = () if holder is content else ("answer", "token_ids", "logprobs")
    return {**{name: found_in(holder, FIELDS[name]) for name in said}, **_ending(holder)}


def _refuse_two_answers(content: Mapping[str, Any]) -> None:
    said = {name: content[name] for name in _SAID if isinstance(content.get(name), str) and content[name].strip()}
    if len({text.strip() for text in said.values()}) > 1:
        names = list(said)
        raise BadRow(
            f"both {names[0]!r} and {names[1]!r} could be what the model said, and they differ; say which: "
            f"--column answer={names[1]}"
        )


def _openai(content: Mapping[str, Any], holder: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    if holder.get("object") == "response" and isinstance(holder.get("output"), list):
        parts = [part for item in _objects(holder["output"]) for part in _objects(item.get("content"))]
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        fields.update(_NOTHING_SAID)
        return {"answer": "".join(texts) or None, "engine": holder.get("model")}
    if not isinstance(holder.get("choices"), list):
        said = content.get("message")
        return _message(said, fields) | _ending(content) if isinstance(said, Mapping) else {}
    choice = _first(holder["choices"], "choices", fields)
    message = choice.get("message")
    fields.update(_NOTHING_SAID)
    said = _message(message, fields) if isinstance(message, Mapping) else {"answer": choice.get("text")}
    ids = found_in(choice, ("token_ids", "output_token_ids"))
    said |= {"token_ids": ids, "logprobs": choice.get("logprobs"), "engine": holder.get("model"), **_ending(choice)}
    said["prompt_ids"] = holder.get("prompt_token_ids") or choice.get("prompt_token_ids")
    scores = holder.get("prompt_logprobs")
    return said | ({"scored": scores} if isinstance(scores, list) else {})


def _message(message: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    text = message.get("content")
    if isinstance(text, list):
        text = "".join(str(part.get("text") or "") for part in _objects(text))
    if not text and message.get("tool_calls"):
        raise BadRow("the answer is a call of a tool, and no text")
    reasoning = found_in(message, ("reasoning_content", "reasoning"))
    return {"answer": text, "reasoning": reasoning if isinstance(reasoning, str) and reasoning.strip() else None}


def _vllm(content: Mapping[str, Any], holder: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    output = _first(holder["outputs"], "outputs", fields)
    fields.update(_NOTHING_SAID)
    said = {"answer": output.get("text"), "token_ids": output.get("token_ids"), "logprobs": output.get("logprobs")}
    asked = {"prompt": holder.get("prompt"), "prompt_ids": holder.get("prompt_token_ids")}
    return {**said, **asked, "id": found_in(content, IDS) or holder.get("request_id"), **_ending(output)}


def _sglang(content: Mapping[str, Any], holder: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    facts = holder["meta_info"]
    fields.update(_NOTHING_SAID)
    ids = found_in(holder, ("output_ids", "token_ids"))
    said = {"answer": holder.get("text"), "token_ids": ids, "logprobs": facts.get("output_token_logprobs")}
    return {**said, "id": found_in(content, IDS) or facts.get("id"), **_ending(facts)}


def _llava(content: Mapping[str, Any], holder: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The last turn of the model is the answer, and the turns before it are the prompt."""
    turns = _conversation(content.get("conversations"))
    last = max((at for at, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if not last:
        raise BadRow("the conversations hold no turn of the model behind a question (from: gpt)")
    answers = sum(turn["role"] == "assistant" for turn in turns)
    fields["notes"] += [f"the last of {answers} answers; those before it are its prompt"] * (answers > 1)
    text = "".join(part.get("text", "") for part in turns[last]["content"])
    return {"answer": text, "messages": turns[:last]}


def _conversation(conversations: Any) -> list[dict[str, Any]]:
    roles = {"human": "user", "gpt": "assistant", "model": "assistant"}
    turns = []
    for turn in _objects(conversations):
        role = str(found_in(turn, ("from", "role")))
        turns.append({"role": roles.get(role, role), "content": _slots(found_in(turn, ("value", "content")))})
    return turns


def _slots(text: Any) -> list[dict[str, Any]]:
    """A text with ``<image>`` in it as parts of a message."""
    parts: list[dict[str, Any]] = []
    pieces = re.split(rf"\s*{_IMAGE}\s*", text) if isinstance(text, str) else []
    for number, piece in enumerate(pieces):
        parts += [{"type": "image"}] * (number > 0)
        parts += [{"type": "text", "text": piece}] * bool(piece)
    return parts


def _lmms_eval(content: Mapping[str, Any], holder: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    said = found_in(content, ("resps", "filtered_resps"))
    while isinstance(said, list) and said:
        said = said[0]
    if not isinstance(said, str):
        raise BadRow("resps holds no text: log-likelihoods of given choices are no answer")
    asked = found_in(content, ("input", "arguments"))
    while isinstance(asked, list | Mapping) and asked:
        asked = asked[0] if isinstance(asked, list) else next(iter(asked.values()))
    doc = content["doc"] if isinstance(content.get("doc"), Mapping) else {}
    question = re.sub(r"\s*<image(?:\s*\d+)?>\s*", "", asked) if isinstance(asked, str) else doc.get("question")
    image = fields["image"] or found_in(content, ("image_paths",)) or found_in(doc, FIELDS["image"])
    return {"answer": said, "question": question, "image": image, "id": content["doc_id"]}


def _vlmevalkit(content: Mapping[str, Any], holder: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """``answer`` is the truth here, ``prediction`` what was said. The prompt is not kept: of choices it is rebuilt."""
    question = content.get("question")
    options = {letter: content[letter] for letter in "ABCDEFGH" if content.get(letter) not in (None, "")}
    if options and isinstance(question, str):
        hint = f"Hint: {content['hint']}\n" if content.get("hint") else ""
        listed = "".join(f"{letter}. {text}\n" for letter, text in options.items())
        question = f"{hint}Question: {question}\nOptions:\n{listed}{_CHOOSE}"
        fields["notes"].append(
            "the file does not keep the prompt: it is VLMEvalKit's own for a choice; a model with one of its own was "
            "asked otherwise"
        )
    return {"answer": content.get("prediction"), "question": question, "id": content.get("index")}


_CHOOSE = "Please select the correct answer from the options above. \n"

_ANSWERS = {
    "openai": _openai, "vllm": _vllm, "sglang": _sglang, "llava": _llava, "lmms-eval": _lmms_eval,
    "vlmevalkit": _vlmevalkit, "plain": _plain,
}  # fmt: skip


def _ending(said: Mapping[str, Any]) -> dict[str, Any]:
    """How the answer ended, as its engine says; ``ended``: by a token of the model's own, not by a text to stop at."""
    finish: Any = said.get("finish_reason")
    matched, known = said.get("stop_reason"), "stop_reason" in said
    if isinstance(finish, Mapping):  # SGLang
        matched, known = finish.get("matched"), True
        finish = finish.get("type")
    if not isinstance(finish, str):
        return {}
    own = known and (matched is None or is_whole(matched))
    return {"finish": shortened(finish, 40), "ended": finish == "stop" and own}


def _first(items: list[Any], name: str, fields: dict[str, Any]) -> Mapping[str, Any]:
    if not items or not isinstance(items[0], Mapping):
        raise BadRow(f"{name} is empty: there is no answer" if not items else f"{name}[0] is no object")
    fields["notes"] += [f"the first of {len(items)} answers to the question"] * (len(items) > 1)
    return items[0]


# ------------------------------------------------------------------------------------------------------ what was asked


def _take_question(fields: dict[str, Any], content: Mapping[str, Any], request: Mapping[str, Any] | None) -> None:
    """The messages, or the question and images, of the row, of the request in it, or of the one joined to it."""
    limit = None
    for asked in (request, *(content.get(name) for name in ("request", "input", "body")), content):
        if not isinstance(asked, Mapping):
            continue
        inner = asked.get("body")
        body = inner if isinstance(inner, Mapping) else asked
        messages = found_in(body, ("messages", "input"))
        if isinstance(messages, list) and fields["messages"] is None:
            fields["messages"], fields["template"] = _objects(messages), _template(body)
            limit = found_in(body, ("max_completion_tokens", "max_tokens"))
        if asked is request and fields["messages"] is None and isinstance(body.get("conversations"), list):
            turns = _conversation(body["conversations"])
            fields["messages"] = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
        if asked is not content:
            _take_plain(fields, body, asked=True)
    if not fields["messages"] and _IMAGE in str(fields["question"]) and not fields["prompt"]:
        fields["messages"] = [{"role": "user", "content": fields["question"]}]
    if fields["messages"]:
        _take_messages(fields, scores=isinstance(limit, int) and limit <= 1)
    else:
        fields["messages"] = fields["scored"] = None


def _template(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a request gives the chat template besides the messages: switches, and tools.

    Raises ``BadRow`` for what changes the images, or is a template itself: it would run here.
    """
    for name, what in (("mm_processor_kwargs", "how images are processed"), ("chat_template", "a chat template")):
        if body.get(name):
            raise BadRow(f"the request sets {what} ({name}): set it on the processor, and leave it out of the row")
    given = body.get("chat_template_kwargs")
    switches = given if isinstance(given, Mapping) else {}
    if odd := [name for name, value in switches.items() if not isinstance(value, bool | str) or name in _NO_SWITCH]:
        raise BadRow(f"chat_template_kwargs holds {shortened(odd[0], 40)!r}: switches and texts are taken")
    return {**switches, **({"tools": body["tools"]} if body.get("tools") else {})} or None


def _take_messages(fields: dict[str, Any], *, scores: bool) -> None:
    """Turns, their images, and the answer where it is the last of them: given, or given to be scored."""
    turns, given = _turns(fields["messages"], beside=fields["image"] is not None)
    if turns[-1]["role"] != "assistant" or not (fields["answer"] is None or (fields["scored"] and scores)):
        fields["scored"] = None
    else:
        fields["answer"] = "".join(part["text"] for part in turns.pop()["content"] if part["type"] == "text")
        fields.update(dict.fromkeys(("finish", "ended")))
        if fields["scored"]:  # the other values are of the token that the engine had to add
            fields.update(dict.fromkeys(("token_ids", "logprobs", "reasoning")))
    fields["image"] = _filled(given, fields["image"], turns)
    fields["messages"] = turns
    asked = [_text(turn) for turn in turns if turn["role"] == "user"]
    fields["question"] = asked[-1].strip() if asked else fields["question"]


def _take_plain(fields: dict[str, Any], content: Mapping[str, Any], *, asked: bool) -> None:
    """Fields under names of their own, where none has been found yet; of a request ``text`` is the question."""
    names: Mapping[str, Sequence[str]] = FIELDS
    if asked:
        more = {"image": (*FIELDS["image"], "image_data"), "question": ("question", "query")}
        names = {"image": more["image"], "question": more["question"], "prompt": FIELDS["prompt"]}
    for name, known in names.items():
        if fields[name] is None:
            fields[name] = found_in(content, known)
    if asked and not (fields["question"] or fields["prompt"]) and isinstance(content.get("text"), str):
        fields["prompt"] = content["text"]  # a question where no image stands in it


def _turns(messages: Sequence[Mapping[str, Any]], *, beside: bool) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages with texts and places for images, and the images, ``None`` where a place has none.

    Images that stand ``beside`` messages without any have their places where a text says ``<image>``. Raises
    ``BadRow``.
    """
    turns: list[dict[str, Any]] = []
    images: list[Any] = []
    for message in messages:
        if message.get("tool_calls"):
            raise BadRow("a turn before the answer calls a tool: images and texts are read")
        content = message.get("content")
        parts: list[dict[str, Any]] = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else _objects(content):
            kind = str(part.get("type") or next(iter(part), ""))
            if kind in ("text", "input_text", "output_text"):
                parts.append({"type": "text", "text": str(part.get("text") or "")})
            elif kind in ("image_url", "image", "input_image", "image_pil"):
                parts.append({"type": "image"})
                images.append(found_in(part, ("image_url", "image", "url", "path", "base64", "source", "image_pil")))
            else:
                raise BadRow(f"a message holds {shortened(kind, 40)!r}: images and texts are read")
        turns.append({"role": str(message.get("role") or "user")[:40], "content": parts})
    if beside and not images:
        for turn in turns:
            if any(_IMAGE in part["text"] for part in turn["content"]):
                turn["content"] = [piece for part in turn["content"] for piece in _slots(part["text"])]
        images = [None for turn in turns for part in turn["content"] if part["type"] == "image"]
    return turns, images


def _filled(given: list[Any], images: Any, turns: list[dict[str, Any]]) -> list[Any] | None:
    """The images of the messages; places without one take those beside them, and without places they come first.

    Raises ``BadRow`` where there are not as many of either.
    """
    beside = images if isinstance(images, list) else [] if images is None else [images]
    if not given:
        first = next((turn for turn in turns if turn["role"] == "user"), None)
        if first is not None:
            first["content"] = [{"type": "image"}] * len(beside) + first["content"]
        return beside or None
    places = sum(image is None for image in given)
    if places and len(beside) != places:
        raise BadRow(f"{len(beside)} images beside the messages, which have places for {places}")
    waiting = iter(beside)
    return [next(waiting) if image is None else image for image in given]


def _text(turn: Mapping[str, Any]) -> str:
    return "\n".join(part["text"] for part in turn["content"] if part["type"] == "text")


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _at(content: Mapping[str, Any], name: str) -> Any:
    """A value by name; by a path with dots where no name is so."""
    if name in content:
        return content[name]
    found: Any = content
    for part in name.split("."):
        if isinstance(found, list) and part.isdigit():
            found = found[int(part)] if int(part) < len(found) else None
        else:
            found = found.get(part) if isinstance(found, Mapping) else None
    return found
