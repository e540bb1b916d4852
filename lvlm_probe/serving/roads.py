"""Roads: the requests by which engines give the log-probability of an answer that is given to them, best first.

==========  ===========================================================  ======================  =====================
road        request                                                      one request gives       needs
==========  ===========================================================  ======================  =====================
tokens      vLLM ``/inference/v1/generate`` with the answer's token ids  all tokens              ``--enable-scale-out``
sglang      SGLang ``/generate``, ``input_token_logprobs``               all tokens              the processor, here
chat        ``prompt_logprobs`` of a continued assistant turn            all but the closing     vLLM
next token  ``allowed_token_ids`` or ``logit_bias``, ``logprobs``        one token               an answer's token ids
top         ``top_logprobs`` of the next token                           one, or a bound on it   ``logprobs``
sampling    the next token at temperature 1                              one token, 0 or 1       nothing
==========  ===========================================================  ======================  =====================

All but the first two continue the assistant's turn (``continue_final_message``). On the last two, where a server names
no token ids either, a token is what its text is: a token that is no whole character cannot be asked about. *Top* knows
P of a token that is listed, and of any other that it is no larger than the least one listed, nor than what those
leave. *Sampling* draws the next token and says whether it was the one: 0 or 1, with P as its mean.

A road writes a body and reads a reply, and believes nothing: engines answer 200 with wrong numbers where a field is
misspelt or unknown, where the answer is cut into other tokens, where an image's tokens are expanded twice, where a
cache was not filled. So every reply has to name the tokens that it is about, prompt and answer, and to be
log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lvlm_probe.errors import ReplayError
from lvlm_probe.serving.messages import Prompt, Said, one_placeholder_each

_ROUNDING = 1e-3
"""Nats above 0 that a log-probability may have by rounding in half precision."""
_LEAST = -1e5
"""Nats: engines write −9999 for an impossible token; less is memory that nobody has filled."""
_BIAS = 30.0
_SUM = 1.01
"""Sum of probabilities that rounding in half precision explains."""
_CUT = "\ufffd"
"""What servers show of a character that a token holds a part of."""

Gives = Literal["passes", "bounds", "samples"]
"""Log-probabilities; or, of some tokens, the least and the most they can be; or whether the token was drawn."""
Reading = float | tuple[float, float]
"""Log P of a token, nats, or the least and the most that it can be; of a sample 0, or −∞ for another token."""


class Untrue(ReplayError):
    """A reply whose numbers are not those of the answer that was asked about."""


class Road:
    """How the log-probabilities of an answer are asked for."""

    name: str
    """What it is called."""
    every: bool = False
    """Whether one request gives all tokens."""
    gives: Gives = "passes"
    """What it gives of a token."""
    by_ids: bool = False
    """Whether it names tokens by their ids."""
    closing: bool = False
    """Whether it can hold the token that closes the turn."""

    def request(self, said: Said, images: Sequence[str], step: int | None) -> tuple[str, dict[str, Any]]:
        """Path and body that ask for all tokens, or for the one at ``step``.

        Raises:
            ReplayError: this answer cannot be asked about on this road.
        """
        raise NotImplementedError

    def read(self, said: Said, reply: Any, step: int | None) -> Mapping[int, Reading]:
        """Log-probabilities in a reply, by step, nats. Raises ``Untrue``."""
        raise NotImplementedError

    def likeliest(self, body: dict[str, Any], number: int) -> bool:
        """Make a request ask for the likeliest tokens of each position too; whether it can."""
        return False


def log_prob_in(value: Any, what: str) -> float:
    """A number of a reply as a log-probability, nats. Raises ``Untrue`` for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Untrue(f"the server gives no log-probability for {what}: {str(value)[:60]!r}")
    if math.isnan(value) or value > _ROUNDING or value < _LEAST:
        raise Untrue(
            f"the server gives {value:.6g} as the log-probability of {what}, which none is: it may return logits "
            "(vLLM: leave --logprobs-mode at raw_logprobs)"
        )
    return min(float(value), 0.0)


class Chat(Road):
    """vLLM's ``prompt_logprobs`` of a chat whose last turn, the assistant's, is continued."""

    name, every, by_ids = "chat", True, True

    def request(self, said: Said, images: Sequence[str], step: int | None) -> tuple[str, dict[str, Any]]:
        body = continued(said.prompt, images, said.answer, ask={"prompt_logprobs": 0})
        return "/v1/chat/completions", body

    def likeliest(self, body: dict[str, Any], number: int) -> bool:
        body["prompt_logprobs"] = number
        return True

    def read(self, said: Said, reply: Any, step: int | None) -> dict[int, float]:
        held = len(said.token_ids) - said.closing  # a turn that is continued has not been closed
        return _prompt_log_probs(reply, said, held)


class Tokens(Road):
    """vLLM's tokens in, tokens out: prompt and answer as ids, so that nothing is cut into tokens again."""

    name, every, by_ids, closing = "tokens", True, True, True

    def request(self, said: Said, images: Sequence[str], step: int | None) -> tuple[str, dict[str, Any]]:
        short = one_placeholder_each(said.prompt_ids, len(images))
        if short is None:
            raise ReplayError(
                "the tokens route needs one placeholder for each image, and the prompt does not show where an image's "
                "tokens stand"
            )
        return "/inference/v1/generate", {
            "token_ids": [*short, *said.token_ids],
            "content_parts": [{"type": "image_url", "url": image} for image in images],
            # Without detokenize: an id that the tokenizer does not know would end the whole engine.
            "sampling_params": {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0, "detokenize": False},
            "return_token_ids": True,
        }

    def likeliest(self, body: dict[str, Any], number: int) -> bool:
        body["sampling_params"]["prompt_logprobs"] = number
        return True

    def read(self, said: Said, reply: Any, step: int | None) -> dict[int, float]:
        return _prompt_log_probs(reply, said, len(said.token_ids))


class Sglang(Road):
    """SGLang's own route. Prompts are made here, by the model's processor."""

    name, every, by_ids, closing = "sglang", True, True, True

    def request(self, said: Said, images: Sequence[str], step: int | None) -> tuple[str, dict[str, Any]]:
        return "/generate", {
            "input_ids": [*said.prompt_ids, *said.token_ids],
            "image_data": list(images),
            "return_logprob": True,
            "logprob_start_len": 0,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        }

    def read(self, said: Said, reply: Any, step: int | None) -> dict[int, float]:
        entries = _at(_at(reply, "meta_info"), "input_token_logprobs")
        steps = len(said.token_ids)
        # An image's placeholder stands for its many tokens there, so only the rest of the prompt can be compared.
        if not isinstance(entries, list) or len(entries) < len(said.prompt_ids) + steps:
            raise Untrue("the server returns no log-probabilities of the prompt (input_token_logprobs)")
        named = [entry[1] if isinstance(entry, list) and len(entry) > 1 else None for entry in entries]
        _same_ids(named[-steps:], said.token_ids, "the answer")
        return {
            index: log_prob_in(entry[0], f"token {index} of the answer") for index, entry in enumerate(entries[-steps:])
        }


class NextToken(Road):
    """One token at a time: the answer so far is continued by the token that is asked for and by no other.

    Engines take log-probabilities before they shut out all others; whether this one does is measured.

    Args:
        by: the field that shuts out the others.
    """

    by_ids, closing = True, True

    def __init__(self, by: Literal["allowed_token_ids", "logit_bias"]) -> None:
        self.name, self._by = f"next token ({by})", by

    def request(self, said: Said, images: Sequence[str], step: int | None) -> tuple[str, dict[str, Any]]:
        assert step is not None
        token = said.token_ids[step]
        only: dict[str, Any] = (
            {"allowed_token_ids": [token]} if self._by == "allowed_token_ids" else {"logit_bias": {str(token): _BIAS}}
        )
        ask = {**only, "logprobs": True, "top_logprobs": 0}
        return "/v1/chat/completions", continued(said.prompt, images, said.before(step), ask=ask)

    def read(self, said: Said, reply: Any, step: int | None) -> dict[int, float]:
        assert step is not None
        _same_ids(_at(reply, "prompt_token_ids"), [*said.prompt_ids, *said.token_ids[:step]], "prompt and answer")
        choice = _first(_at(reply, "choices"))
        _same_ids(_at(choice, "token_ids"), [said.token_ids[step]], f"token {step} of the answer")
        entry = _first(_at(_at(choice, "logprobs"), "content"))
        return {step: log_prob_in(_at(entry, "logprob"), f"token {step} of the answer")}


class Top(Road):
    """One token at a time, by what is likeliest in its place; a token that is not listed is known within bounds.

    Args:
        number: of the likeliest tokens that are asked for; APIs list 20, 5 or 1 at most.
    """

    gives = "bounds"

    def __init__(self, number: int) -> None:
        self.name, self._number = f"top ({number})", number

    def request(self, said: Said, images: Sequence[str], step: int | None) -> tuple[str, dict[str, Any]]:
        assert step is not None
        ask = {"logprobs": True, "top_logprobs": self._number}
        return "/v1/chat/completions", continued(said.prompt, images, _begun(said, step), ask=ask)

    def read(self, said: Said, reply: Any, step: int | None) -> dict[int, Reading]:
        assert step is not None
        _same_beginning(said, reply, step)
        entry = _first(_at(_at(_first(_at(reply, "choices")), "logprobs"), "content"))
        listed = _at(entry, "top_logprobs")
        if not isinstance(listed, list) or not listed:
            raise Untrue("the server ignores top_logprobs: it lists no likely tokens")
        values = [log_prob_in(_at(one, "logprob"), "a likely token") for one in listed]
        left = 1.0 - sum(map(math.exp, values))
        if left < 1.0 - _SUM:
            raise Untrue(f"the probabilities of the likeliest tokens add up to {1 - left:.3g}: they are none")
        same = [value for one, value in zip(listed, values, strict=True) if _at(one, "token") == said.raw[step]]
        if same:  # two tokens may be shown by the same text: it is one of them
            return {step: min(same) if min(same) == max(same) else (min(same), max(same))}
        return {step: (-math.inf, min(*values, math.log(max(left, 0.0) + _ROUNDING)))}


class Sampled(Road):
    """One token at a time, drawn by the model's probabilities: whether it was the one that is asked about.

    Args:
        whole: further fields that keep an engine from drawing among the likeliest tokens alone, which is what a model's
            own generation settings may say.
    """

    gives = "samples"

    def __init__(self, name: str, whole: Mapping[str, Any]) -> None:
        self.name, self._whole = name, {"temperature": 1, "top_p": 1, **whole}

    def request(self, said: Said, images: Sequence[str], step: int | None) -> tuple[str, dict[str, Any]]:
        assert step is not None
        return "/v1/chat/completions", continued(said.prompt, images, _begun(said, step), ask=self._whole)

    def read(self, said: Said, reply: Any, step: int | None) -> dict[int, Reading]:
        assert step is not None
        _same_beginning(said, reply, step)
        return {step: 0.0 if spoken_in(reply) == said.raw[step] else -math.inf}


ROADS: tuple[Road, ...] = (
    Tokens(),
    Sglang(),
    Chat(),
    NextToken("allowed_token_ids"),
    NextToken("logit_bias"),
    Top(20),
    Top(5),
    Top(1),
    Sampled("sampling", {"top_k": -1, "min_p": 0, "repetition_penalty": 1}),
    Sampled("sampling (top_p alone)", {}),
)
"""All of them, best first."""


def roads_named(name: str | None) -> tuple[Road, ...]:
    """The roads that a name stands for, best first: ``"tokens"``, ``"chat"``, ``"next token"``, ``"top"``,
    ``"sampling"``, ``"sglang"``, or one kind of them, as ``"top (5)"``; ``None``: all. As on a command line,
    ``"next-token"`` and ``"top-k"`` are taken too.

    Raises:
        ReplayError: there is no such road.
    """
    if name is None:
        return ROADS
    wanted = " ".join(name.lower().replace("-", " ").replace("top k", "top").split())
    chosen = tuple(road for road in ROADS if wanted in (road.name, road.name.partition(" (")[0]))
    if not chosen:
        known = dict.fromkeys(road.name.partition(" (")[0] for road in ROADS)
        raise ReplayError(f"there is no road {name!r}; there are {', '.join(known)}; without a name the best is used")
    return chosen


def no_log_probs(what: str, who: str, gives: str) -> ReplayError:
    """What is raised where ``what`` takes log-probabilities of a given answer, and ``who`` gives something else."""
    return ReplayError(
        f"{what} takes log-probabilities of a given answer, and {who} gives {gives}: leave the road out (road=, "
        "--road), or use a server that gives them (vLLM)"
    )


def spoken_in(reply: Any) -> str:
    """The text of a chat's reply. Raises ``Untrue`` where it has none."""
    message = _at(_first(_at(reply, "choices")), "message")
    text = _at(message, "content")
    if text is None and isinstance(message, dict) and not message.get("reasoning_content"):
        return ""  # the turn was closed at once
    if not isinstance(text, str):
        raise Untrue("the server's answer has no text: a reasoning or tool parser may have taken it")
    return text


def continued(prompt: Prompt, images: Sequence[str], beginning: str, *, ask: Mapping[str, Any]) -> dict[str, Any]:
    """Body of a chat request that goes on with ``beginning`` (nothing: a new turn) for one token."""
    begun = {"add_generation_prompt": False, "continue_final_message": True} if beginning else {}
    return {
        **prompt.fields,
        "messages": prompt.messages(images, beginning=beginning or None),
        "max_tokens": 1,
        "temperature": 0,
        "return_token_ids": True,
        **begun,
        **ask,
    }


def _begun(said: Said, step: int) -> str:
    """The answer before a token that is known by its text. Raises ``ReplayError`` for one that has none of its own."""
    if said.special[step] or not said.raw[step] or _CUT in said.raw[step]:
        raise ReplayError(
            f"token {step} of the answer, {said.raw[step]!r}, is no text of whole characters, and this server is asked "
            "about tokens by their text: leave it out (tokens=…)"
        )
    return said.before(step)


# ------------------------------------------------------------------------------------------------------------- replies


def _same_beginning(said: Said, reply: Any, step: int) -> None:
    """Check, where the server names ids, that it has continued what it was to continue. Raises ``Untrue``."""
    if said.prompt_ids:
        _same_ids(_at(reply, "prompt_token_ids"), [*said.prompt_ids, *said.token_ids[:step]], "prompt and answer")


def _prompt_log_probs(reply: Any, said: Said, held: int) -> dict[int, float]:
    """Of the first ``held`` tokens of the answer, which are the prompt's last."""
    answer = said.token_ids[:held]
    _same_ids(_at(reply, "prompt_token_ids"), [*said.prompt_ids, *answer], "prompt and answer")
    entries = _at(reply, "prompt_logprobs")
    if not isinstance(entries, list) or len(entries) != len(said.prompt_ids) + held:
        raise Untrue("the server ignores prompt_logprobs: it returns none of them, or not one for each token")
    found = {}
    for step, (entry, token) in enumerate(zip(entries[-held:] if held else [], answer, strict=True)):
        what = f"token {step} of the answer"
        if not isinstance(entry, dict) or str(token) not in entry:
            raise Untrue(f"the server gives no log-probability for {what}, id {token}, but for {_short(entry)}")
        found[step] = log_prob_in(_at(entry[str(token)], "logprob"), what)
    return found


def check_continued(reply: Any, said: Said) -> None:
    """Check that a chat has read prompt and answer, but for the closing tokens, as they are. Raises ``Untrue``."""
    held = len(said.token_ids) - said.closing
    _same_ids(_at(reply, "prompt_token_ids"), [*said.prompt_ids, *said.token_ids[:held]], "prompt and answer")


def likeliest_in(entry: Any, own: str, value: float) -> tuple[float, str]:
    """Log P and text of the likeliest token that an entry of ``prompt_logprobs`` lists.

    Args:
        entry: of one position.
        own, value: text and log P of the token that stands there, which is the likeliest where no other is listed.

    Raises:
        Untrue: a number is no log-probability.
    """
    best = value, own
    for one in entry.values() if isinstance(entry, dict) else ():
        found = log_prob_in(_at(one, "logprob"), "a likely token")
        if found > best[0]:
            best = found, str(_at(one, "decoded_token") or "")
    return best


def most_probable(reply: Any, said: Said) -> float:
    """Largest sum of the probabilities that a reply lists for one position of the answer: 1 at most, if they are any.

    Raises:
        Untrue: there are none.
    """
    entries = _at(reply, "prompt_logprobs")
    held = len(said.token_ids) - said.closing
    if not isinstance(entries, list) or not entries[-held:]:
        raise Untrue("the server ignores prompt_logprobs")
    sums = []
    for entry in entries[-held:]:
        listed = list(entry.values()) if isinstance(entry, dict) else []
        sums.append(sum(math.exp(log_prob_in(_at(one, "logprob"), "a likely token")) for one in listed))
    return max(sums)


def _same_ids(named: Any, wanted: Sequence[int], what: str) -> None:
    if not isinstance(named, list):
        raise Untrue("the server does not say which tokens its numbers are about (return_token_ids)")
    if named == list(wanted):
        return
    at = next((k for k, (one, other) in enumerate(zip(named, wanted, strict=False)) if one != other), None)
    at = min(len(named), len(wanted)) if at is None else at
    raise Untrue(
        f"the server reads {what} as other tokens than they are: {len(named)} for {len(wanted)}, from number {at} on "
        f"{_short(named[at : at + 6])} instead of {_short(list(wanted[at : at + 6]))}"
    )


def _at(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:60] + "…"
