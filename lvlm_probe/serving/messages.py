"""What is sent to a server and what it said: images as lossless files, a prompt, an answer by its tokens."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

ImageFormat = Literal["PNG, level 1", "WebP, lossless"]
"""Lossless: JPEG at quality 90 moves log-probabilities by up to 0.9 nats. The default level of PNG takes eight times as
long for a tenth less; of WebP, the fastest effort is smaller than that for most photographs."""
PNG: ImageFormat = "PNG, level 1"
WEBP: ImageFormat = "WebP, lossless"
_LARGEST_WEBP = 16383
"""Pixels along a side."""


def as_uri(image: Image.Image, form: ImageFormat = PNG) -> str:
    """An RGB image as a ``data:`` URI, lossless."""
    file = io.BytesIO()
    if form == WEBP and max(image.size) <= _LARGEST_WEBP:
        kind = "webp"
        image.save(file, "WEBP", lossless=True, quality=0, method=0)
    else:
        kind = "png"
        image.save(file, "PNG", compress_level=1)
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode("ascii")


def smaller(images: Sequence[Image.Image]) -> ImageFormat:
    """The format that takes fewer bytes for images."""
    sizes = {form: sum(len(as_uri(image, form)) for image in images) for form in (PNG, WEBP)}
    return min(sizes, key=lambda form: sizes[form])


@dataclass(frozen=True)
class Prompt:
    """What is asked, besides the images.

    Attributes:
        question: text of the user's turn, after the images.
        system: the system's turn; ``None``: none.
        fields: further fields of the request that decide the prompt, ``chat_template_kwargs`` for one.
    """

    question: str
    system: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    def messages(self, images: Sequence[str], *, beginning: str | None = None) -> list[dict[str, Any]]:
        """The turns as chat messages.

        Args:
            images: ``data:`` URIs.
            beginning: of the assistant's turn, which is to be continued.
        """
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": image}} for image in images]
        turns = [{"role": "user", "content": [*parts, {"type": "text", "text": self.question}]}]
        if self.system is not None:
            turns.insert(0, {"role": "system", "content": self.system})
        if beginning is not None:
            turns.append({"role": "assistant", "content": beginning})
        return turns


@dataclass(frozen=True)
class Said:
    """An answer by its tokens, and what it is an answer to.

    Attributes:
        prompt: what was asked.
        answer: the answer's text, without special tokens.
        token_ids, pieces, special: its tokens, ``(T,)`` each.
            Where the server names no ids, −1 for each.
        prompt_ids: token ids of the prompt, an image's tokens all there, ``(P,)``; empty where the server does not say.
        log_probs: what the server gave while it generated, ``(T,)``, nats; empty for an answer that was given to it.
        texts: of its tokens, as the server writes each alone; empty where these are ``pieces``.
        top_log_probs, top_tokens: log P of what was likeliest in the place of each token, and its text; empty where the
            server does not say.
        finish: why it stopped: ``"stop"``, ``"length"``, or what the server says.
    """

    prompt: Prompt
    answer: str
    token_ids: tuple[int, ...]
    pieces: tuple[str, ...]
    special: tuple[bool, ...]
    prompt_ids: tuple[int, ...]
    log_probs: tuple[float, ...] = ()
    finish: str = "stop"
    top_log_probs: tuple[float, ...] = ()
    top_tokens: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()

    @property
    def raw(self) -> tuple[str, ...]:
        """Texts of the tokens as the server writes them, ``(T,)``."""
        return self.texts or self.pieces

    def before(self, step: int) -> str:
        """The answer's text before a token."""
        there = zip(self.pieces[:step], self.special[:step], strict=True)
        return "".join(piece for piece, flag in there if not flag)

    @property
    def closing(self) -> int:
        """Number of special tokens at the end: a chat message cannot hold them."""
        count = 0
        while count < len(self.special) and self.special[-1 - count]:
            count += 1
        return count


def aligned(texts: Sequence[str], answer: str, *, stopped: bool) -> tuple[list[str], list[bool], bool]:
    """Display texts of tokens as pieces whose concatenation is the answer.

    Servers decode tokens one by one: a character that is split over several shows as ``�`` in each. Such tokens get
    an empty piece, and the character stands with the last of them. Tokens that the answer's text leaves out are
    special.

    Args:
        texts: of the tokens, ``(step,)``.
        answer: the whole text.
        stopped: the model closed its turn itself: an empty last text is the token that does.

    Returns:
        Pieces, which are special, and whether they make up the answer; where not, pieces are the texts as they are.
    """
    pieces: list[str] = []
    special: list[bool] = []
    at, waiting = 0, 0
    for index, text in enumerate(texts):
        last = index == len(texts) - 1
        if "\ufffd" in text and not answer.startswith(text, at):
            waiting += 1
            pieces.append("")
            special.append(False)
            continue
        if waiting:
            start = answer.find(text, at) if text else len(answer)
            if start < 0:
                start = len(answer)
            pieces[-1], at, waiting = answer[at:start], start, 0
        found = next((one for one in (text, text.lstrip(" "), f" {text}") if answer.startswith(one, at)), None)
        closes = last and stopped and not text
        if found is None or closes:
            pieces.append(text)
            special.append(True)
            continue
        pieces.append(found)
        special.append(False)
        at += len(found)
    if waiting:
        pieces[-1], at = answer[at:], len(answer)
    whole = at == len(answer) and not all(special)
    return (pieces, special, True) if whole else (list(texts), [False] * len(texts), False)


def one_placeholder_each(prompt_ids: Sequence[int], images: int) -> list[int] | None:
    """The prompt with one token in the place of each image's many, as the tokens route takes it; ``None`` where nobody
    can tell which they are.

    An image's tokens are taken to be the longest run of one id, and all other runs of it. Whoever sends this checks
    what the server makes of it.
    """
    spans = _image_spans(prompt_ids, images)
    if spans is None:
        return None
    placeholder = prompt_ids[spans[0][0]]
    each = images if len(spans) == 1 else 1  # images side by side make one run
    short, at = [], 0
    for offset, length in spans:
        short += [*prompt_ids[at:offset], *[placeholder] * each]
        at = offset + length
    return [*short, *prompt_ids[at:]]


def image_token_positions(prompt_ids: Sequence[int], images: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Positions ``(image_token,)`` of the images' tokens, and the image of each; ``None`` where nobody can tell."""
    spans = _image_spans(prompt_ids, images)
    if spans is None:
        return None
    placeholder = prompt_ids[spans[0][0]]
    each = [[at for at in range(start, start + length) if prompt_ids[at] == placeholder] for start, length in spans]
    if len(each) == 1 and images > 1:  # side by side: parts of one size
        if len(each[0]) % images:
            return None
        each = np.split(np.asarray(each[0]), images)  # type: ignore[assignment]
    positions = np.concatenate([np.asarray(part, np.int64) for part in each])
    return positions, np.repeat(np.arange(len(each)), [len(part) for part in each]).astype(np.int64)


def _image_spans(ids: Sequence[int], images: int) -> list[tuple[int, int]] | None:
    """Offset and length of what stands for each image, or of one run of several side by side."""
    runs = _runs(ids)
    longest = max(runs, key=lambda run: run[1], default=(0, 0))
    if longest[1] < 2:
        return None
    spans = [run for run in runs if ids[run[0]] == ids[longest[0]]]
    if len(spans) not in (1, images):
        if images > 1:
            return None
        # Rows of image tokens with a separator after each.
        spans = [(spans[0][0], spans[-1][0] + spans[-1][1] - spans[0][0])]
    return spans


def _runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Offset and length of every run of one id."""
    runs: list[tuple[int, int]] = []
    start = 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or ids[stop] != ids[start]:
            runs.append((start, stop - start))
            start = stop
    return runs
