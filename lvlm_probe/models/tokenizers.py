"""Token ids to text a person reads: display pieces that join to the answer, special tokens, the end of an answer."""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_REPLACEMENT = "�"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_WAITING = 3
"""Tokens that may wait for the end of their character: UTF-8 has at most four bytes, and a token has one or more."""


def tokenizer_of(processor: object | None) -> Any:
    """The tokenizer inside a processor, the object itself when it is one, else ``None``."""
    for candidate in (getattr(processor, "tokenizer", None), processor):
        if callable(getattr(candidate, "decode", None)) and hasattr(candidate, "all_special_ids"):
            return candidate
    return None


def decoder_config(model: Any) -> Any:
    """The configuration of what says the words; the model's own where it has no part for that, or several."""
    config = getattr(model, "config", None)
    with contextlib.suppress(AttributeError, TypeError, ValueError):  # another package's, or with several decoders
        config = config.get_text_config(decoder=True)  # type: ignore[union-attr]
    return config


def vocabulary_size(model: Any) -> int:
    """How many tokens the decoder knows; no bound where the model does not say."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):  # of a model whose encoder embeds images
        found = getattr(decoder_config(model), "vocab_size", None)
        return found if isinstance(found, int) else sys.maxsize


def display_pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds; joined, they are the decoded answer.

    A byte-level token that only begins a character adds nothing of it; the token that completes the character shows it.
    Without a tokenizer a piece is the id in angle brackets.
    """
    spelling = Spelling(tokenizer)
    for token in token_ids:
        spelling.add(token)
    spelling.end()
    return spelling.pieces


class Spelling:
    """``display_pieces`` of an answer that grows.

    Attributes:
        pieces: the texts so far, ``(step,)``. Those at the end that are empty may be filled in by tokens to come.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.pieces: list[str] = []
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # The window [start, shown) is context already displayed; decoding it again keeps spaces right.
        self._start, self._shown = 0, 0
        # Tokens behind it end within a character: this much of their text is whole, up to this one of them.
        self._whole, self._last = 0, 0

    def add(self, token: int) -> None:
        """One more token."""
        if self._tokenizer is None:
            self.pieces.append(f"<{int(token)}>")
            return
        end = len(self._ids)
        if (settled := end - _WAITING) > max(self._shown, self._last):  # what began there is completed no more
            self.pieces[settled - 1] = self._decoded(settled)[self._whole :]
            self._begin(self._shown, settled)
        self._ids.append(int(token))
        text = self._decoded(end + 1)
        known = text.rstrip(_REPLACEMENT)
        self.pieces.append(known[self._whole :])
        if known == text:
            self._begin(self._shown, end + 1)
        elif len(known) > self._whole:  # a token may end a character and begin the next one
            self._whole, self._last = len(known), end + 1

    def end(self) -> None:
        """There are no more tokens: what was begun is shown as it is."""
        if self._shown < len(self._ids):
            self.pieces[-1] += self._decoded(len(self._ids))[self._whole :]

    def _begin(self, start: int, shown: int) -> None:
        self._start, self._shown, self._whole, self._last = start, shown, 0, 0

    def _decoded(self, end: int) -> str:
        """The text of the tokens before ``end`` that are not shown yet."""
        before = _decode(self._tokenizer, self._ids[self._start : self._shown])
        return _decode(self._tokenizer, self._ids[self._start : end])[len(before) :]


def top_pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text of each token by itself: they are no answer, but what could stand in the place of its tokens."""
    texts = {token: "".join(display_pieces(tokenizer, [token])) for token in set(token_ids)}
    return [texts[token] for token in token_ids]


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    if not ids:
        return ""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def special_flags(tokenizer: Any, token_ids: Sequence[int], also: Iterable[int] = ()) -> list[bool]:
    """Whether each token is a special one: never a word of the answer.

    Special are the tokenizer's own special tokens, tokens that were added to it as special, ``also``, and bytes that
    its decoder spells (``<0x0A>``) instead of joining them to characters. Added tokens that are not marked special
    (``<loc_12>``) belong to the answer.
    """
    return list(map(special_among(tokenizer, also), token_ids))


def special_among(tokenizer: Any, also: Iterable[int] = ()) -> Callable[[int], bool]:
    """``special_flags`` of one token after another."""
    special = set(also) | special_ids(tokenizer)
    return lambda token: int(token) in special or _spelled_byte(tokenizer, int(token))


def special_ids(tokenizer: Any) -> set[int]:
    """The ids that a tokenizer calls special, or to which such tokens were added."""
    added: Mapping[Any, Any] = getattr(tokenizer, "added_tokens_decoder", None) or {}
    named = set(getattr(tokenizer, "all_special_ids", ()) or ())
    return named | {int(index) for index, token in added.items() if getattr(token, "special", False)}


def _spelled_byte(tokenizer: Any, token: int) -> bool:
    convert = getattr(tokenizer, "convert_ids_to_tokens", None)
    if convert is None:
        return False
    name = convert(token)
    return isinstance(name, str) and bool(_BYTE.fullmatch(name)) and _decode(tokenizer, [token]) == name


@dataclass(frozen=True)
class Stops:
    """What can end the answers of one ``generate()`` call.

    Attributes:
        eos: end-of-sequence ids; empty where there are none, or where they were switched off.
        pad: what fills up rows that end early.
        strings: stop strings.
        criteria: whether stopping criteria of the user's were given.
        limit: most new tokens, and ``limit_name``, the setting that says so.
        max_time: most seconds.
    """

    eos: frozenset[int]
    pad: int | None
    strings: tuple[str, ...] = ()
    criteria: bool = False
    limit: int | None = None
    limit_name: str = ""
    max_time: float | None = None

    @property
    def custom(self) -> bool:
        """Whether a row can end without an end-of-sequence token and be filled up."""
        return bool(self.strings) or self.criteria

    def answer_length(self, token_ids: Sequence[int]) -> int:
        """How many of a row's generated tokens are the answer, its end-of-sequence token included.

        Rows of a batch that finish early are filled up with padding. With a custom stop rule (stop strings) a row can
        end without an end-of-sequence token; if padding uses that very id, the two cannot be told apart and it is left
        out.
        """
        ids = [int(token) for token in token_ids]
        length = len(ids)
        for index, token in enumerate(ids):
            if token in self.eos and not (self.custom and token == self.pad):
                return index + 1
        if self.pad is not None and self.eos and (self.pad not in self.eos or self.custom):
            while length and ids[length - 1] == self.pad:
                length -= 1
        return length

    def told(self, token_ids: Sequence[int], text: str) -> str | None:
        """How an answer ended that has no end-of-sequence token, as a sentence; ``None`` where it has one.

        Args:
            token_ids: the row's answer.
            text: the same, decoded; empty without a tokenizer.
        """
        count = len(token_ids)
        if count and int(token_ids[-1]) in self.eos:
            return None
        # The last token may go on behind the string that it completes.
        if found := [string for string in self.strings if string in text[-len(string) - 32 :]]:
            return f"the answer ended after {count} tokens at the stop string {found[0]!r}"
        if count == self.limit:
            return f"the answer was cut after {count} tokens ({self.limit_name})"
        others = [f"max_time={self.max_time:g}"] if self.max_time is not None else []
        others += ["a stopping criterion given to generate()"] if self.criteria else []
        others += ["a stop string"] if self.strings else []
        if not others:
            return f"the answer ended after {count} tokens without an end token, for a reason that is not known"
        return f"the answer was stopped after {count} tokens by {' or '.join(others)}"


def stops_of(model: Any, kwargs: Mapping[str, Any], prompt_length: int) -> Stops:
    """What can end the answers of ``model.generate(**kwargs)``.

    Args:
        model: the generating model.
        kwargs: the arguments of the call by name.
        prompt_length: positions that count in ``max_length``: of the prompt, or of the decoder's beginning.
    """
    setting = settings_of(model, kwargs)
    named = setting("eos_token_id")
    off = named is None and "eos_token_id" in kwargs
    ends = [] if off else _ids(named if named is not None else getattr(model.config, "eos_token_id", None))
    pad = setting("pad_token_id")
    strings = setting("stop_strings") or ()
    limit, name = setting("max_new_tokens"), "max_new_tokens"
    if limit is None:
        whole = setting("max_length")
        limit, name = (20, "20 by default") if whole is None else (int(whole) - prompt_length, "max_length")
    return Stops(
        eos=frozenset(ends),
        pad=int(pad) if pad is not None else (ends[0] if ends else None),
        strings=(strings,) if isinstance(strings, str) else tuple(map(str, strings)),
        criteria=bool(kwargs.get("stopping_criteria")),
        limit=int(limit),
        limit_name=name,
        max_time=setting("max_time"),
    )


def _ids(value: Any) -> list[int]:
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if value is None:
        return []
    return [int(value)] if isinstance(value, int) else [int(item) for item in value]


def folded(prompt: str) -> str:
    """The prompt with runs of one repeated placeholder (hundreds of image tokens) shown once with their number."""

    def fold(match: re.Match[str]) -> str:
        count = len(match[0]) // len(match[1])
        return f"{match[1]}×{count}"

    return re.sub(r"(<[^<>\s]{1,40}>|\[[A-Z_]{2,40}\])\1{2,}", fold, prompt)


def positional(model: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments of ``model.generate()`` by their names."""
    names = [name for name in inspect.signature(type(model).generate).parameters if name != "self"]
    return dict(zip(names, args, strict=False))


def settings_of(model: Any, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """``(name, default=None)`` → a setting of one ``generate()`` call: its argument, else what its generation config
    says, else the one of the model, or of the language model inside that a ``generate`` of its own hands over to. An
    argument that is given as ``None`` means none, as it does to ``generate()``.
    """
    inner = [module.generation_config for module in model.modules() if hasattr(module, "generation_config")]
    places = [kwargs.get("generation_config"), *inner]

    def setting(name: str, default: Any = None) -> Any:
        if name in kwargs:
            return default if kwargs[name] is None else kwargs[name]
        for value in (getattr(place, name, None) for place in places):
            if value is not None:
                return value
        return default

    return setting


def named_inputs(model: Any, kwargs: Mapping[str, Any], *, reads_prompt: bool) -> dict[str, Any]:
    """Arguments of ``model.generate()`` with ``inputs`` under its own name: the prompt's, or the image's of a model
    that reads no prompt."""
    named = {name: value for name, value in kwargs.items() if name != "inputs"}
    if (first := kwargs.get("inputs")) is not None:
        named["input_ids" if reads_prompt else str(model.main_input_name)] = first
    return named


def own_prompt(model: Any, image_token_id: int | None, setting: Callable[..., Any], like: torch.Tensor) -> Any:
    """What ``generate()`` begins with where it is given images and no text, ``(batch, position)``; ``None`` where it
    does not begin without one.

    That is the start token, behind the image tokens of models that have a fixed number of them (BLIP-2).
    """
    text = getattr(model.config, "get_text_config", lambda: model.config)()
    start = setting("bos_token_id", getattr(text, "bos_token_id", None))
    if start is None:
        return None
    images = [image_token_id] * int(getattr(model.config, "num_query_tokens", 0) or 0) if image_token_id else []
    return torch.tensor([[*images, int(start)]], device=like.device).expand(len(like), -1)


def decoder_prompt(
    model: Any, given: torch.Tensor | None, setting: Callable[..., Any], like: torch.Tensor
) -> torch.Tensor:
    """What the decoder's sequence of an encoder-decoder model begins with, ``(batch, position)``.

    It is what the user gave, behind the start token, which ``generate()`` puts in front unless it is there; but in
    Donut, whose task prompts begin with a token of their own.

    Args:
        model: the generating model.
        given: the user's ``decoder_input_ids``.
        setting: ``settings_of`` the call.
        like: a tensor ``(batch, ...)`` on the device.
    """
    start = setting("decoder_start_token_id", getattr(model, "decoder_start_token_id", setting("bos_token_id")))
    if isinstance(start, Sequence):
        start = start[0]
    if given is not None:
        given = given.to(like.device)
        encoder = getattr(getattr(model.config, "encoder", None), "model_type", "")
        if "donut" in str(encoder).lower() or bool((given[:, 0] == start).all()):
            return given
    if start is None:
        raise ValueError("the model has no decoder_start_token_id, so its answer has no known beginning")
    first = torch.full((len(like), 1), int(start), dtype=torch.long, device=like.device)
    return first if given is None else torch.cat([first, given], dim=1)
