"""Which part of the prompt: shares of its images, of the turns of a conversation, and of image and question.

Parts of a prompt are players of a game whose value is the log-likelihood of the answer's tokens where only some of them
are there, and their shares are Shapley values (``lvlm_probe.explainers.shapley``). What is not there:

* an image, or a video, is its baseline, as everywhere;
* a text is not read: its tokens stay where they are, and no other position attends to them (``Replay.without``). A turn
  of a conversation is its text. Nothing is rendered anew, so positions, templates and all other tokens stay.

``modalities`` is the game of two players, all images and the question. Its parts are Harsanyi dividends, v(·) being the
log-likelihood with the image I or its baseline Ĩ, and with the question T or without it, T̃::

    image     v(I, T̃) − v(Ĩ, T̃)
    question  v(Ĩ, T) − v(Ĩ, T̃)
    together  v(I, T) − v(Ĩ, T) − v(I, T̃) + v(Ĩ, T̃)          F_syn of Ky et al., arXiv:2605.22168

They add up to v(I, T) − v(Ĩ, T̃). ``together`` is what neither gives alone; below 0 the two say the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from lvlm_probe.cards import equal, in_one_line
from lvlm_probe.causal.effects import Recorded
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.explaining import Tokens, words_of
from lvlm_probe.explainers.scores import check_finite, check_rules, whole_rule
from lvlm_probe.explainers.shapley import shapley
from lvlm_probe.models.prompts import turns_of
from lvlm_probe.models.tokenizers import special_ids, tokenizer_of
from lvlm_probe.progress import ProgressChoice, show_progress
from lvlm_probe.replaying import Replay, ReplayLike
from lvlm_probe.replaying.isolation import taking_turns
from lvlm_probe.selection import select_tokens, word_selections
from lvlm_probe.words import ALPHA

_NAMED = 40
"""Characters of a text by which a part is called."""
_BAR = 20


@dataclass(frozen=True, repr=False)
class PartShares(Recorded):
    """How much each part of a prompt speaks for the selected tokens.

    Attributes:
        parts: what each part is called.
        shares: Shapley value of each, ``(part,)``, nats; they add up to ``total``.
        error: standard error of each, ``(part,)``, nats; 0 where every coalition was run.
        total: log-likelihood of the tokens with all parts less that with none, nats.
        words: the words that the tokens belong to.
        by_word: the same shares for each of these words, ``(word, part)``, nats.
        text: the explained words as one text.
        passes: forward passes that it took.
        baseline: what stands for an image that is not there.
        trace_id: of the answer.
    """

    __repr__, __eq__ = in_one_line, equal

    parts: tuple[str, ...]
    shares: tuple[float, ...]
    error: tuple[float, ...]
    total: float
    words: tuple[str, ...]
    by_word: tuple[tuple[float, ...], ...]
    text: str
    passes: int
    baseline: str
    trace_id: str

    def __str__(self) -> str:
        lines = [f"{self.text!r} by parts of the prompt, {self.total:+.2f} nats in all ({self.passes} passes)"]
        wide = max(map(len, self.parts))
        for part, share, error, bar in zip(self.parts, self.shares, self.error, _bars(self.shares), strict=True):
            margin = f" ± {error:.2f}" if error else ""
            lines.append(f"  {part:<{wide}}  {share:+.2f}{margin}  {bar}")
        return "\n".join(lines)


def _bars(values: Sequence[float]) -> Iterator[str]:
    largest = max(map(abs, values), default=0.0) or 1.0
    for value in values:
        yield ("█" if value >= 0 else "░") * round(_BAR * abs(value) / largest)


@dataclass(frozen=True)
class _Part:
    """A player: images of the prompt, or positions of a text."""

    name: str
    images: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()


@taking_turns
def which_parts(
    replay: ReplayLike,
    parts: str | Sequence[str] = "images",
    *,
    tokens: Tokens | None = None,
    orders: int = 50,
    seed: int = 0,
    progress: ProgressChoice = None,
) -> PartShares:
    """Find how much each image of a prompt, turn of a conversation, or text of the prompt speaks for the answer.

    Takes 2^n forward passes for n parts up to 10, and at most about 100 · n above. A video is one part.

    Args:
        replay: the recorded answer on its model; its baseline stands for an image that is not there.
        parts: ``"images"``; ``"turns"``, the text of each turn of the user's and of the model's, by the processor's
            chat template; ``"all"``, both; or texts as they stand in the prompt (passages), all images being there.
        tokens: as for ``lvlm_probe.explain``.
        orders: of more than 10 parts, how many random orders are run, each with its reverse.
        seed: of the orders.
        progress: called with (done, total) passes; by default a bar where a person waits, ``False`` for none.

    Raises:
        ExplainError: no token is selected, there are no such parts, or a parameter is out of range.
        ReplayError: the prompt does not hold a text, or its text cannot be left unread (``Replay.without``).
    """
    check_rules("which_parts", orders=whole_rule(orders, 2))
    players = _players(replay, parts)
    replay = replay.counted()
    selection = words_of(cast(Replay, replay), tokens)
    if not selection:
        raise ExplainError(f"nothing to explain: {selection.reason}")
    replay = replay.strengthened(selection.decided)
    words = word_selections(replay, selection)
    columns = [selection.indices, *(word.indices for _, word in words)]
    hidden = np.array([np.isin(np.arange(replay.n_images), player.images) for player in players])
    texts = [player.positions for player in players]
    steps = list(selection.indices)

    def values(coalitions: np.ndarray) -> np.ndarray:
        found = np.empty((len(coalitions), len(columns)))
        absent = ~coalitions
        unread = [tuple(p for text, gone in zip(texts, row, strict=True) if gone for p in text) for row in absent]
        for some in dict.fromkeys(unread):
            rows = [number for number, one in enumerate(unread) if one == some]
            view = cast(Replay, replay).without(some) if some else replay
            shown = torch.from_numpy(~(absent[rows] @ hidden))
            masks = shown.float()[:, :, None, None].to(view.device)
            log_probs = view.log_probs(masks, steps=steps).cpu().double().numpy()
            check_finite("which_parts", view.trace_id, log_probs[:, steps])
            found[rows] = np.stack([log_probs[:, list(column)].sum(1) for column in columns], axis=1)
        return found

    with torch.no_grad(), replay.shortcuts.caching(), show_progress(progress, "which parts") as advance:
        game = shapley(values, len(players), orders=orders, seed=seed, progress=advance)
    return PartShares(
        parts=tuple(player.name for player in players),
        shares=tuple(game.shares[:, 0].tolist()),
        error=tuple(game.error[:, 0].tolist()),
        total=float(game.everyone[0] - game.nobody[0]),
        words=tuple(told for told, _ in words),
        by_word=tuple(tuple(column) for column in game.shares[:, 1:].T.tolist()),
        text=selection.text,
        passes=replay.passes.forward,
        baseline=str(replay.baseline.get("kind") or "unknown"),
        trace_id=replay.trace_id,
    )


def _players(replay: ReplayLike, parts: str | Sequence[str]) -> list[_Part]:
    if isinstance(parts, str) and parts not in ("images", "turns", "all"):
        raise ExplainError(f"parts is 'images', 'turns', 'all', or a list of texts of the prompt; got {parts!r}")
    if isinstance(parts, str):
        images = _images(replay) if parts in ("images", "all") else []
        return images + (_turns(_live(replay)) if parts in ("turns", "all") else [])
    players: list[_Part] = []
    live = _live(replay)
    for text in parts:
        if not isinstance(text, str):
            raise ExplainError(f"parts are texts as they stand in the prompt; got {text!r}")
        players.append(_Part(_named(text), positions=live.without(text).unread))
    taken = [place for player in players for place in player.positions]
    if not players or len(set(taken)) < len(taken):
        raise ExplainError("parts are one text or several of the prompt, none inside another")
    return players


def _live(replay: ReplayLike) -> Replay:
    if not isinstance(replay, Replay):
        raise ExplainError("texts of the prompt are taken away inside the model: replay on the model itself")
    return replay


def _images(replay: ReplayLike) -> list[_Part]:
    clips = list(getattr(replay.trace, "clips", ()))
    players: list[_Part] = []
    for image in range(replay.n_images):
        clip = next((clip for clip in clips if image in clip.images), None)
        if clip is None:
            number = sum(not player.name.startswith("video") for player in players) + 1
            players.append(_Part(f"image {number}", images=(image,)))
        elif image == clip.first:
            players.append(_Part(f"video {clips.index(clip) + 1}", images=tuple(clip.images)))
    return players


def _turns(replay: Replay) -> list[_Part]:
    prompt = np.asarray(replay.trace.input_ids)
    written = np.setdiff1d(np.arange(len(prompt)), np.asarray(replay.trace.layout.image_positions))
    tokenizer = tokenizer_of(replay.processor)
    players: list[_Part] = []
    for who, start, stop in turns_of(replay.processor, prompt[written].tolist()):
        named = set() if tokenizer is None else special_ids(tokenizer)
        mine = [int(place) for place in written[start:stop] if int(prompt[place]) not in named]
        if mine:
            text = tokenizer.decode(prompt[mine].tolist()).strip()
            players.append(_Part(f"turn {len(players) + 1}, {who}: {_named(text)}", positions=tuple(mine)))
    if not players:
        raise ExplainError(
            "which turns this prompt has cannot be told: its processor has no chat template, or the prompt does not "
            "follow it; name texts of the prompt instead, parts=['...', '...']"
        )
    return players


def _named(text: str) -> str:
    line = " ".join(text.split())
    return f"“{line if len(line) <= _NAMED else line[: _NAMED - 1].rstrip() + '…'}”"


@dataclass(frozen=True, repr=False)
class Modalities(Recorded):
    """What image and question give to each word of an answer, alone and together.

    Attributes:
        words: the words of the answer.
        chosen: which of them ``verdict`` speaks of, by number.
        both, image_only, question_only, neither: log-likelihood of each word, ``(word,)`` nats, with image and
            question, without the question, without the image, and without both.
        asked: what the question is.
        passes: forward passes that it took.
        baseline: what stands for the image where it is not there.
        trace_id: of the answer.
    """

    __repr__, __eq__ = in_one_line, equal

    words: tuple[str, ...]
    chosen: tuple[int, ...]
    both: tuple[float, ...]
    image_only: tuple[float, ...]
    question_only: tuple[float, ...]
    neither: tuple[float, ...]
    asked: str
    passes: int
    baseline: str
    trace_id: str

    @property
    def image(self) -> tuple[float, ...]:
        """What the image gives each word without the question, nats."""
        return self._of(self.image_only, self.neither)

    @property
    def question(self) -> tuple[float, ...]:
        """What the question gives each word without the image, nats."""
        return self._of(self.question_only, self.neither)

    @property
    def together(self) -> tuple[float, ...]:
        """What the two give each word beyond that, nats: F_syn. Below 0 they say the same."""
        parts = zip(self.both, self.question_only, self.image_only, self.neither, strict=True)
        return tuple(both - question - image + neither for both, question, image, neither in parts)

    @staticmethod
    def _of(more: Sequence[float], less: Sequence[float]) -> tuple[float, ...]:
        return tuple(a - b for a, b in zip(more, less, strict=True))

    @property
    def totals(self) -> tuple[float, float, float]:
        """``image``, ``question`` and ``together`` of the chosen words, nats."""
        image, question, together = (
            sum(values[word] for word in self.chosen) for values in (self.image, self.question, self.together)
        )
        return image, question, together

    @property
    def verdict(self) -> str:
        """What the chosen words need, as a sentence; up to ``ALPHA`` nats count as nothing."""
        image, question, together = self.totals
        name = "“" + " ".join(self.words[word] for word in self.chosen[:6]) + "”"
        if image + together <= ALPHA:
            return (
                f"The question gives {name} without the image, which adds {image + together:+.2f} nats: what a map of "
                f"the image loses or keeps says little here."
            )
        if question + together <= ALPHA:
            return f"The image gives {name} without the question, which adds {question + together:+.2f} nats."
        if together < -ALPHA:
            return f"Image and question say the same of {name}: either would do for {-together:.2f} nats of it."
        if together > max(image, question):
            return f"{name} takes image and question together: {together:+.2f} nats that neither gives alone."
        return f"Image and question add to {name} each on its own."

    def __str__(self) -> str:
        image, question, together = self.totals
        lines = [
            f"{self.verdict} Image {image:+.2f}, question {question:+.2f}, together {together:+.2f} nats "
            f"({self.passes} passes)."
        ]
        wide = max(map(len, self.words))
        rows = zip(self.words, self.image, self.question, self.together, strict=True)
        lines += [f"  {word:<{wide}}  image {a:+.2f}  question {b:+.2f}  together {c:+.2f}" for word, a, b, c in rows]
        return "\n".join(lines)


@taking_turns
def modalities(replay: Replay, *, tokens: Tokens | None = None, question: str | None = None) -> Modalities:
    """Ask whether the words of an answer come from the image, from the question, or take both.

    Takes four forward passes, and a few on baselines. The image that is not there is its baseline, all images of the
    prompt at once; the question that is not there is not read (``Replay.without``).

    Args:
        replay: the recorded answer on its model.
        tokens: the words that the verdict speaks of, as for ``lvlm_probe.explain``; by default those that the image is
            responsible for, or all where there are none.
        question: the question as it stands in the prompt; by default what was recorded as such.

    Raises:
        ExplainError: the answer has no words.
        ReplayError: the prompt does not hold the question, or its text cannot be left unread.
    """
    replay = _live(replay).counted()
    selection = words_of(replay, tokens)
    if not selection and tokens is None:
        selection = select_tokens(replay, rule="joint")
    if not selection or not replay.words:
        raise ExplainError(f"nothing to explain: {selection.reason or 'the answer has no words'}")
    replay = replay.strengthened(selection.decided)
    unread = replay.without(question)
    ends = torch.tensor([1.0, 0.0], device=replay.device)[:, None, None, None].expand(-1, replay.n_images, 1, 1)
    with torch.no_grad():
        found = [view.log_probs(ends).cpu().double().numpy() for view in (replay, unread)]
    check_finite("modalities", replay.trace_id, *found)
    (both, question_only), (image_only, neither) = found

    def by_word(values: np.ndarray) -> tuple[float, ...]:
        return tuple(float(values[word.start : word.stop].sum()) for word in replay.words)

    chosen = set(selection.indices)
    return Modalities(
        words=tuple(word.text for word in replay.words),
        chosen=tuple(k for k, word in enumerate(replay.words) if chosen & set(range(word.start, word.stop))),
        both=by_word(both),
        image_only=by_word(image_only),
        question_only=by_word(question_only),
        neither=by_word(neither),
        asked=question or str(getattr(replay.trace, "question", None) or ""),
        passes=replay.passes.forward,
        baseline=str(replay.baseline.get("kind") or "unknown"),
        trace_id=replay.trace_id,
    )
