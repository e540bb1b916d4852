"""Which tokens of an answer to explain: the set K of the paper, Eq. 6.

The image's part in one token is its log-likelihood ratio between the image and a baseline image without visual
information, under teacher forcing::

    LLR_t = log P(a_t | a_<t; I, Q) − log P(a_t | a_<t; Ĩ, Q)            natural logarithm, "nats"
    K     = {t : LLR_t > alpha}                                          alpha = 1 by default

``rule="joint"`` takes every token of the answer instead, and a user may name words or a token span. Special tokens
(``</s>``, ``<|im_end|>``) never join K. An answer from which nothing is selected is a result with a reason.

What is scored is their log-likelihood, unless the selection says otherwise: ``against`` contrasts words with others
that might have stood in their place, and a score of the user's own may be about any tokens, or none
(``replaying.own_scores``).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lvlm_probe.cards import answer_html, card
from lvlm_probe.errors import SelectionError
from lvlm_probe.files import record_of
from lvlm_probe.kinds import indices_of, naming_arguments
from lvlm_probe.models.exhaustion import told_out_of_memory
from lvlm_probe.models.tokenizers import display_pieces, tokenizer_of
from lvlm_probe.replaying.own_scores import Contrast, OwnScore, alternative_ids, stored_score
from lvlm_probe.words import ALPHA, distinct_texts, group_words, phrase_spans, tokens_at

if TYPE_CHECKING:
    from lvlm_probe.replaying.protocol import ReplayLike
    from lvlm_probe.trace import Trace
    from lvlm_probe.words import Word

_STOP_WORDS = (
    "a an the this that these those it its there here is are was were be been being am do does did has have had and or "
    "but nor so of in on at to from by with for as than then which who what where"
)
STOP_WORDS: frozenset[str] = frozenset(_STOP_WORDS.split())
"""English function words that ``stop_words=True`` keeps out of K; compared by text, so any tokenizer will do."""

_SPECIAL = "special token"
"""How the reason begins why a special token is skipped."""

Rule = Literal["llr", "joint", "words", "span", "indices", "score"]
Against = str | Sequence[str]
"""Words that might have stood in the place of others; ``"next"``: the token that the model held for next likely."""


@dataclass(frozen=True, repr=False)
class TokenSelection:
    """The tokens of an answer that an explanation is about. Iterates over, and has the length of, their indices.

    Attributes:
        indices: Positions in the answer, ascending, counted from 0.
        tokens: Display strings of all tokens of the answer, ``(step,)``.
        llr: Log-likelihood ratio of all tokens in nats, ``(step,)``; empty where a trace deferred it.
        rule: ``"llr"``, ``"joint"``, ``"words"``, ``"span"``, ``"indices"`` or ``"score"``, one of the user's own.
        params: What the rule was given (``alpha``, ``words``, ``span``, ``indices``, ``skip_first``, ``stop_words``).
        skipped: Tokens the rule would have taken but an option or their nature keeps out: index → reason.
        reason: Why nothing is selected, as a sentence; ``None`` when something is.
        special: Indices of special tokens, which are never selected and never shown; by default those that ``skipped``
            calls so.
        score: What is scored in the place of the tokens' log-likelihood; ``None``: that.
    """

    indices: tuple[int, ...]
    tokens: tuple[str, ...]
    llr: tuple[float, ...]
    rule: Rule
    params: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[int, str] = field(default_factory=dict)
    reason: str | None = None
    special: tuple[int, ...] = ()
    score: OwnScore | None = None

    def __post_init__(self) -> None:
        if not self.special:
            known = tuple(sorted(index for index, why in self.skipped.items() if why.startswith(_SPECIAL)))
            object.__setattr__(self, "special", known)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __bool__(self) -> bool:
        return bool(self.indices) or self.score is not None

    def __repr__(self) -> str:
        if not self:
            return f"<TokenSelection {self.rule}: none, {self.reason}>"
        named = self.text if self.score is None else self.label
        return f"<TokenSelection {self.rule}: {named!r}, {len(self.indices)} of {len(self.tokens)} tokens>"

    @property
    def columns(self) -> tuple[int, ...]:
        """Columns of ``log_probs`` that are scored: the tokens', or the one of a score of the user's own."""
        return self.indices if self.score is None else (len(self.tokens),)

    def _repr_html_(self) -> str:
        special = [index in self.special for index in range(len(self.tokens))]
        words = answer_html(self.tokens, special, llr=self.llr, marked=self.indices)
        taken = f"{len(self.indices)} of {len(self.tokens)} tokens selected (underlined), rule {self.rule}"
        left_out = "; ".join(f"{self.tokens[index].strip()}: {why}" for index, why in self.skipped.items())
        return card("Selection", words, facts=[taken, self.reason or "", f"left out: {left_out}" if left_out else ""])

    @property
    def decided(self) -> tuple[int, ...]:
        """The selected tokens that the image decides (LLR > 1), or all of them where it decides none.

        The baseline check looks at these: the later pieces of a word follow from its first one, whatever the image.
        """
        return tuple(index for index in self.indices if self.llr and self.llr[index] > 1.0) or self.indices

    @property
    def text(self) -> str:
        """The words that the selected tokens belong to, as a person reads them; gaps are shown as ``…``, special tokens
        not at all."""
        return " … ".join("".join(self._pieces(word) for word in run).strip() for run, _ in self._runs())

    @property
    def label(self) -> str:
        """The same, with a number to a word alone that stands earlier in the answer too: ``cat (2nd)``; of a score its
        name: ``red, not blue``."""
        if self.score is not None:
            return self.score.name
        return " … ".join(
            told[0] if len(run) == 1 else "".join(map(self._pieces, run)).strip() for run, told in self._runs()
        )

    def _runs(self) -> list[tuple[list[Word], list[str]]]:
        """The chosen words, those that follow each other together, with their texts told apart."""
        chosen = set(self.indices)
        words = group_words(self.tokens, [index in self.special for index in range(len(self.tokens))])
        runs: list[tuple[list[Word], list[str]]] = []
        previous = None
        for number, (word, told) in enumerate(zip(words, distinct_texts(words), strict=True)):
            if chosen.isdisjoint(range(word.start, word.stop)):
                continue
            if previous is None or number != previous + 1:
                runs.append(([], []))
            runs[-1][0].append(word)
            runs[-1][1].append(told)
            previous = number
        return runs

    def _pieces(self, word: Word) -> str:
        return "".join(self.tokens[word.start : word.stop])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``TokenSelection.from_dict`` is the inverse."""
        return record_of(self, *(["score"] if self.score is None else []))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> TokenSelection:
        """Rebuilds what ``to_dict`` wrote. Raises ``SelectionError`` for anything else."""
        try:
            tokens = tuple(str(token) for token in record["tokens"])
            indices = tuple(int(index) for index in record["indices"])
            if any(not 0 <= index < len(tokens) for index in indices):
                raise ValueError(f"indices {indices} outside an answer of {len(tokens)} tokens")
            return cls(
                indices=indices,
                tokens=tokens,
                llr=tuple(float("nan") if value is None else float(value) for value in record["llr"]),
                rule=record["rule"],
                params=dict(record["params"]),
                skipped={int(index): str(reason) for index, reason in record["skipped"].items()},
                reason=None if record["reason"] is None else str(record["reason"]),
                special=tuple(int(index) for index in record.get("special", ())),
                score=stored_score(record["score"]) if record.get("score") else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SelectionError(f"not a stored token selection: {error!r}") from error


@naming_arguments
@told_out_of_memory
def select_tokens(
    replay: ReplayLike | Trace,
    *,
    alpha: float = ALPHA,
    rule: Literal["llr", "joint"] = "llr",
    words: str | Sequence[str] | None = None,
    span: tuple[int, int] | None = None,
    indices: Sequence[int] | None = None,
    skip_first: bool = False,
    stop_words: bool | Collection[str] | None = None,
    against: Against | None = None,
) -> TokenSelection:
    """Selects the tokens of an answer to explain.

    Args:
        replay: A replay, or a trace that holds the log-likelihood ratios (no model needed then).
        alpha: Threshold on the LLR in nats, exclusive (paper: 1). Used by ``rule="llr"`` only.
        rule: ``"llr"`` (paper, Eq. 6) or ``"joint"``, every token of the answer.
        words: A word or phrase of the answer, or several; every occurrence as whole words is taken, whatever its case:
            ``3`` is not in 3.5, and ``known`` is a part of ``well-known`` where it stands nowhere by itself.
        span: ``(start, stop)``, a token span of the answer, stop exclusive.
        indices: Token numbers of the answer, counted from 0, in any order.
        skip_first: Keeps the answer's first token out, which often decides the sentence's structure, not its content.
        stop_words: ``True`` keeps ``STOP_WORDS`` out, a collection its own words; compared by text, ignoring case.
        against: Words that might have stood in the place of the selected ones, written as they would stand there; of
            several, any. ``"next"`` is the token that the model held for likeliest but for the first selected one,
            which is then all that is selected. Where ``words`` are not in the answer and these are, the contrast is
            read the other way round. See ``Contrast`` for what is scored.

    Returns:
        The selection; empty, with a ``reason``, when no token qualifies.

    Raises:
        SelectionError: The answer does not contain a word, span or token (the message lists the answer's words), more
            than one of them are given, or the ratios are needed but were not recorded; or ``against`` is given for
            words of several kinds, or on a trace alone.
    """
    if not hasattr(replay, "tokens"):
        raise SelectionError(f"words are selected on a replay or a trace; got a {type(replay).__name__}")
    if against is not None:
        options: dict[str, Any] = {"alpha": alpha, "rule": rule, "span": span, "indices": indices}
        options |= {"skip_first": skip_first, "stop_words": stop_words}
        return _contrasted(replay, words, against, options)
    tokens = tuple(str(token) for token in replay.tokens)
    special = np.asarray(replay.special, dtype=bool)
    llr = _ratios(replay, len(tokens))
    params: dict[str, Any] = {"skip_first": bool(skip_first)}
    if sum(given is not None for given in (words, span, indices)) > 1:
        raise SelectionError(
            f"give words, a span or token numbers, not both: words={words!r}, span={span!r}, indices={indices!r}"
        )
    chosen: Rule
    if words is not None:
        chosen, wanted = "words", [words] if isinstance(words, str) else list(words)
        params["words"] = wanted
        candidates = _find_words(wanted, tokens, special, replay.words)
    elif span is not None:
        chosen, candidates = "span", _span_indices(span, tokens, replay.words)
        params["span"] = [candidates[0], candidates[-1] + 1]
    elif indices is not None:
        chosen, candidates = "indices", _numbers(indices, tokens, replay.words)
        params["indices"] = candidates
    elif rule == "joint":
        chosen, candidates = "joint", list(range(len(tokens)))
    elif rule == "llr":
        chosen, candidates = "llr", _above(alpha, llr)
        params["alpha"] = float(alpha)
    else:
        raise SelectionError(f"unknown rule {rule!r}: use 'llr' or 'joint', or give words= or span=")
    if isinstance(stop_words, str):  # it has letters as a collection has words
        raise SelectionError(f"stop_words is True, False or several words; got {stop_words!r}")
    stops = STOP_WORDS if stop_words is True else frozenset(word.casefold() for word in (stop_words or ()))
    params["stop_words"] = sorted(stops) if stops and stop_words is not True else bool(stops)
    by_option = _skipped_by_option(tokens, special, replay.words, skip_first=skip_first, stops=stops)
    skipped = {index: by_option[index] for index in candidates if index in by_option}
    taken = tuple(index for index in candidates if index not in skipped)
    ratios = () if llr is None else tuple(float(value) for value in llr)
    reason = None if taken else _why_empty(chosen, alpha, tokens, special, ratios, skipped)
    names = tuple(np.flatnonzero(special).tolist())
    return TokenSelection(taken, tokens, ratios, chosen, params, skipped, reason, names)


_NOT_HERE = (
    "against= is scored inside the model's passes, and this is an answer without them (of a server, or a trace alone): "
    "load the model here, probe.replay(trace, model, processor)"
)


def _above(alpha: float, llr: np.ndarray | None) -> list[int]:
    """The tokens whose log-likelihood ratio is above a threshold. Raises ``SelectionError`` where none is known."""
    if llr is None:
        raise SelectionError(
            "there are no log-likelihood ratios: the trace was recorded with llr=False, or its server gives no "
            "log-probabilities on a baseline; select on a replay (probe.replay(trace, model, processor)), or use "
            "rule='joint', words= or span="
        )
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or math.isnan(alpha):
        raise SelectionError(f"alpha is a number of nats that a token has to gain from the image; got {alpha!r}")
    return [index for index, value in enumerate(llr) if value > alpha]


def _contrasted(
    replay: ReplayLike | Trace, words: str | Sequence[str] | None, against: Against, options: Mapping[str, Any]
) -> TokenSelection:
    """The selection of said words with their contrast; see ``select_tokens``."""
    others = [against] if isinstance(against, str) else list(against) if isinstance(against, Iterable) else []
    if not others or not all(isinstance(text, str) and text.strip() for text in others):
        raise SelectionError(f"against is a word that might have stood there, or several; got {against!r}")
    turned = False
    try:
        selection = select_tokens(replay, words=words, **options)
    except SelectionError as error:
        if words is None or against == "next":
            raise
        wanted = [words] if isinstance(words, str) else list(words)
        try:
            selection, others, turned = select_tokens(replay, words=others, **options), wanted, True
        except SelectionError:
            raise error from None
    if not selection:
        return selection
    ids = [int(token) for token in replay.token_ids]
    tokenizer = tokenizer_of(getattr(replay, "processor", None))
    alternatives: list[tuple[int, ...]]
    if against == "next":
        first = selection.indices[0]
        selection = dataclasses.replace(selection, indices=(first,))
        if not hasattr(replay, "runners_up"):
            raise SelectionError(_NOT_HERE)
        runner = int(replay.runners_up[0][first])
        text = display_pieces(tokenizer, [*ids[:first], runner])[-1].strip() or display_pieces(tokenizer, [runner])[0]
        places, alternatives, others = [(first, first + 1)], [(runner,)], [text]
    else:
        places = _places(selection)
        if tokenizer is None:
            raise SelectionError(_NOT_HERE)
        start, stop = places[0]
        said = "".join(selection.tokens[start:stop])
        alternatives = [alternative_ids(tokenizer, ids[start:stop], said, text) for text in others]
        others = [text.strip() for text in others]
    start, stop = places[0]
    said = "".join(selection.tokens[start:stop]).strip()
    score = Contrast.of(places, alternatives, others, said, turned=turned)
    return dataclasses.replace(selection, score=score, params={**selection.params, "against": others})


def _places(selection: TokenSelection) -> list[tuple[int, int]]:
    """``(start, stop)`` of the runs of selected tokens. Raises ``SelectionError`` where they are not all one text."""
    runs = [
        [index for _, index in group]
        for _, group in itertools.groupby(enumerate(selection.indices), key=lambda item: item[1] - item[0])
    ]
    texts = {"".join(selection.tokens[run[0] : run[-1] + 1]).strip().casefold() for run in runs}
    if len(texts) > 1:
        named = ", ".join(map(repr, sorted(texts)))
        raise SelectionError(f"against stands in the place of one word or phrase, and these are {named}: name one")
    return [(run[0], run[-1] + 1) for run in runs]


def scored_selection(replay: ReplayLike | Trace, score: OwnScore) -> TokenSelection:
    """The selection that a score of the user's own is: the tokens that it is about, and the score."""
    tokens, special = tuple(str(token) for token in replay.tokens), np.asarray(replay.special, dtype=bool)
    llr = _ratios(replay, len(tokens))
    if any(index >= len(tokens) for index in score.indices):
        raise SelectionError(f"the answer has tokens 0 to {len(tokens) - 1}; {score.name!r} reads {score.indices}")
    return TokenSelection(
        score.indices,
        tokens,
        () if llr is None else tuple(float(value) for value in llr),
        "score",
        {"score": score.name},
        special=tuple(np.flatnonzero(special).tolist()),
        score=score,
    )


def word_llr(words: Sequence[Word], llr: Sequence[float] | np.ndarray) -> list[float]:
    """Log-likelihood ratio of whole words in nats: the sum over a word's tokens (paper, Eq. 6), one value per word."""
    values = np.asarray(llr, dtype=np.float64)
    return [float(values[word.start : word.stop].sum()) for word in words]


def word_selections(replay: ReplayLike, selection: TokenSelection) -> list[tuple[str, TokenSelection]]:
    """The selection word by word: ``(word, its selected tokens)``, in order; equal words are told apart by a number.

    A word keeps its unselected tokens out: the "low" of "yellow" follows from the "yel" whatever the image shows.
    """
    parts: list[tuple[str, TokenSelection]] = []
    for word, told in zip(replay.words, distinct_texts(replay.words), strict=True):
        indices = tuple(index for index in selection.indices if word.start <= index < word.stop)
        if indices:
            parts.append((told, dataclasses.replace(selection, indices=indices)))
    return parts


def _ratios(replay: ReplayLike | Trace, steps: int) -> np.ndarray | None:
    llr: Any = replay.llr
    if llr is None:
        return None
    if hasattr(llr, "detach"):
        llr = llr.detach().float().cpu()
    values = np.asarray(llr, dtype=np.float64)
    if values.shape != (steps,):
        raise SelectionError(f"{steps} tokens but log-likelihood ratios of shape {values.shape}")
    return values


def _skipped_by_option(
    tokens: Sequence[str], special: np.ndarray, words: Sequence[Word], *, skip_first: bool, stops: Collection[str]
) -> dict[int, str]:
    skipped: dict[int, str] = {}
    for word in words:
        if word.text.strip().casefold() in stops:
            skipped.update(dict.fromkeys(range(word.start, word.stop), f"stop word {word.text.strip()!r}"))
    if skip_first and tokens:
        skipped[0] = "first token of the answer"
    skipped.update({index: f"{_SPECIAL} {tokens[index]!r}" for index in np.flatnonzero(special).tolist()})
    return skipped


def _answer_words(words: Sequence[Word]) -> str:
    distinct = dict.fromkeys(word.text.strip() for word in words)
    return ", ".join(repr(word) for word in distinct if word) or "no words at all"


def _find_words(wanted: Sequence[str], tokens: Sequence[str], special: np.ndarray, words: Sequence[Word]) -> list[int]:
    # A special token reads as one space, as it does where words are told apart.
    pieces = [" " if is_special else piece for piece, is_special in zip(tokens, special, strict=True)]
    answer = "".join(pieces)
    spans: list[tuple[int, int]] = []
    for phrase in wanted:
        matches = phrase_spans(phrase, answer)
        if not matches:
            raise SelectionError(
                f"{phrase!r} is not in the answer; its words are {_answer_words(words)}. To ask why it does not say "
                f"so, name what it says in that place, and against={phrase!r}"
            )
        spans += matches
    return [index for index in tokens_at(pieces, spans) if not special[index]]


def _span_indices(span: tuple[int, int], tokens: Sequence[str], words: Sequence[Word]) -> list[int]:
    try:
        start, stop = (operator.index(edge) for edge in span)
    except (TypeError, ValueError) as error:
        raise SelectionError(f"a span is (start, stop), two token positions; got {span!r}") from error
    if not 0 <= start < stop <= len(tokens):
        spans = ", ".join(f"{word.text.strip()!r} ({word.start}, {word.stop})" for word in words) or "none"
        raise SelectionError(
            f"span ({start}, {stop}) is empty or outside the answer of {len(tokens)} tokens; "
            f"the spans of its words: {spans}"
        )
    return list(range(start, stop))


def _numbers(indices: Sequence[int], tokens: Sequence[str], words: Sequence[Word]) -> list[int]:
    found = indices_of(indices, len(tokens))
    if found is None:
        spans = ", ".join(f"{word.text.strip()!r} ({word.start}, {word.stop})" for word in words) or "none"
        raise SelectionError(
            f"token numbers are 0 to {len(tokens) - 1} for this answer; got {list(indices)}; the spans of its words: "
            f"{spans}"
        )
    return found


def _why_empty(
    rule: Rule,
    alpha: float,
    tokens: Sequence[str],
    special: np.ndarray,
    llr: Sequence[float],
    skipped: Mapping[int, str],
) -> str:
    ordinary = np.flatnonzero(~special)
    if ordinary.size == 0:
        return "the answer has no tokens besides special ones"
    if skipped and not all(special[index] for index in skipped):
        left_out = "; ".join(f"{tokens[index].strip()!r}: {why}" for index, why in skipped.items())
        return f"every token that qualified is skipped ({left_out})"
    if rule != "llr":
        return "only special tokens are in the span" if rule == "span" else "only special tokens are asked for"
    values = np.asarray(llr)[ordinary]
    if not np.isfinite(values).any():
        return "the log-likelihood ratios are not finite: replay in float32"
    of_word = {
        index: word.text for word in group_words(tokens, special.tolist()) for index in range(word.start, word.stop)
    }
    told = f"no token gains more than {alpha:g} nats from the image"
    readable = [index for index in of_word if np.isfinite(llr[index])]
    if not readable:
        return told
    top = max(readable, key=lambda index: llr[index])
    return f"{told}; the largest is {of_word[top]!r} with {llr[top]:.2g}"
