"""Scores of the user's own in the place of log P: one number per masked image, from what the model gives in that pass.

A score is one function::

    @probe.score(steps=[6])
    def grip(given: probe.Given) -> torch.Tensor:      # (batch,), one number per mask
        return given.logits(6)[:, bins].softmax(-1) @ centres

    heat = probe.explain(replay, tokens=grip)
    probe.evaluate(heat, replay)

``Replay.scored`` is a view whose ``log_probs`` has one column more, behind the answer's tokens: the score, computed in
the very pass. So whatever follows ``log_probs`` follows it: masks and gradients, micro-batches, curves, journals.

``Contrast`` is the built-in one: log P of what was said less that of what might have stood in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, overload

import torch

from lvlm_probe.errors import ReplayError, SelectionError
from lvlm_probe.escaping import writable
from lvlm_probe.plugins import load_plugins

Other = tuple[int, tuple[int, ...]]
"""Another course of the answer: from this token on, these token ids."""

_KNOWN: dict[str, OwnScore] = {}
"""Name → score, of those that ``score`` has made: a stored heatmap names its own."""


@dataclass(frozen=True, eq=False)
class Given:
    """What the model gives in a pass over masked images, one row per mask; differentiable where the pass is.

    Attributes:
        log_probs: log P(a_t) of the answer's tokens, ``(batch, step)``, nats; NaN outside the score's ``steps``.
        steps: the tokens that the score asks for.
        others: log P of the tokens of each of the score's ``others``, ``(batch, token)`` each, nats.
        input_ids: token ids of that sequence, ``(position,)`` int64: prompt, and all answer tokens but the last.
        image_positions: where the image tokens are in it, ``(image_token,)`` int64; none in models without.
    """

    log_probs: torch.Tensor
    steps: tuple[int, ...]
    others: tuple[torch.Tensor, ...]
    input_ids: torch.Tensor
    image_positions: torch.Tensor
    _logits: torch.Tensor = field(repr=False)
    _states: torch.Tensor | None = field(repr=False)

    @property
    def states(self) -> torch.Tensor:
        """Final hidden states of the teacher-forced sequence, as the LM head reads them, in the model's type: ``(batch,
        position, channel)``.

        Raises:
            ReplayError: the score does not ask for them.
        """
        if self._states is None:
            raise ReplayError("hidden states are kept for scores that ask for them: @probe.score(states=True)")
        return self._states

    def logits(self, step: int) -> torch.Tensor:
        """Logits that predict token ``step`` of the answer, ``(batch, token)`` float32 (float64 on a float64 model).

        Raises:
            ReplayError: the score does not ask for this step.
        """
        if step not in self.steps:
            raise ReplayError(f"the score reads steps {list(self.steps)}; step {step} is not among them: steps=[…]")
        return self._logits[:, self.steps.index(step)]


@dataclass(frozen=True)
class OwnScore:
    """A score of the user's own; ``score`` makes one. Called with a ``Given`` it returns ``(batch,)``.

    Attributes:
        name: what maps, pages and files call it.
        function: ``Given`` to one number per mask, ``(batch,)``.
        steps: the answer's tokens that it reads, ascending; ``None`` for all of them.
        others: other courses of the answer, scored in the same pass.
        states: whether it reads hidden states.
    """

    kind: ClassVar[str] = "own"

    name: str
    function: Callable[[Given], torch.Tensor]
    steps: tuple[int, ...] | None = None
    others: tuple[Other, ...] = ()
    states: bool = False

    def __call__(self, given: Given) -> torch.Tensor:
        return self.function(given)

    @property
    def label(self) -> str:
        """What the score is called to a person."""
        return self.name

    @property
    def indices(self) -> tuple[int, ...]:
        """Tokens of the answer that the score is about."""
        return self.steps or ()

    def read(self, count: int) -> tuple[int, ...]:
        """Tokens whose logits it reads, of an answer that has so many."""
        return tuple(range(count)) if self.steps is None else self.steps

    @property
    def longer(self) -> tuple[Other, ...]:
        """Other courses of more than a token, each once: the sequences that go through the model behind the answer's
        own, in this order."""
        return tuple(dict.fromkeys(other for other in self.others if len(other[1]) > 1))

    followed: ClassVar[Literal["own", "prob"]] = "own"
    """What curves follow by default: the score, or the probability whose log-odds it is."""

    def bounded(self, scores: torch.Tensor) -> torch.Tensor | None:
        """Scores as probabilities, where they are log-odds; ``None`` where they are what they are."""
        return None

    def rounding(self, score: float, token: float, epsilon: float) -> float:
        """Most that the score may differ by rounding.

        Args:
            score: its value.
            token: the same of one unlikely token's log-probability, nats.
            epsilon: ε of the model's number format.
        """
        return epsilon * abs(score)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``stored_score`` is the inverse."""
        return {"kind": self.kind, "name": self.name}


@dataclass(frozen=True)
class Contrast(OwnScore):
    """log P of the said words less that of others in their place: Σ log P(said) − log Σ_alternatives P(alternative).

    P of an alternative is that of its tokens after what was said before; of several, any one of them would do, so their
    probabilities add up. Each is the probability of a whole text, so alternatives of another number of tokens compare.
    Where the said words stand several times the contrasts of all their places add up.

    Attributes:
        places: ``(start, stop)`` of the said words in the answer.
        alternatives: token ids of each alternative.
        texts: the alternatives as a person reads them.
        said: the said words.
        turned: the contrast is read the other way round, for the alternatives and against what was said.
    """

    kind: ClassVar[str] = "contrast"
    followed: ClassVar[Literal["own", "prob"]] = "prob"

    places: tuple[tuple[int, int], ...] = ()
    alternatives: tuple[tuple[int, ...], ...] = ()
    texts: tuple[str, ...] = ()
    said: str = ""
    turned: bool = False

    @classmethod
    def of(
        cls,
        places: Sequence[tuple[int, int]],
        alternatives: Sequence[Sequence[int]],
        texts: Sequence[str],
        said: str,
        *,
        turned: bool = False,
    ) -> Contrast:
        """The contrast of these places with these alternatives; see the class."""
        own = tuple((int(start), int(stop)) for start, stop in places)
        other = tuple(tuple(map(int, ids)) for ids in alternatives)
        named = " or ".join(texts)
        name = f"{named}, not {said}" if turned else f"{said}, not {named}"
        return cls(
            name,
            _contrasted,
            steps=tuple(step for start, stop in own for step in range(start, stop)),
            others=tuple((start, ids) for start, _ in own for ids in other),
            places=own,
            alternatives=other,
            texts=tuple(texts),
            said=said,
            turned=turned,
        )

    def __call__(self, given: Given) -> torch.Tensor:
        total = torch.zeros(len(given.log_probs), dtype=given.log_probs.dtype, device=given.log_probs.device)
        number = len(self.alternatives)
        for place, (start, stop) in enumerate(self.places):
            others = given.others[place * number : (place + 1) * number]
            against = torch.stack([tokens.sum(dim=1) for tokens in others]).logsumexp(dim=0)
            total = total + given.log_probs[:, start:stop].sum(dim=1) - against
        return -total if self.turned else total

    def bounded(self, scores: torch.Tensor) -> torch.Tensor:
        """P(said) / (P(said) + Σ P(alternative)), the logistic function of the contrast."""
        return scores.sigmoid()

    def rounding(self, score: float, token: float, epsilon: float) -> float:
        longest = max(map(len, self.alternatives))
        return token * sum(stop - start + longest for start, stop in self.places)

    def other_way(self) -> Contrast:
        """The same contrast, read the other way round."""
        return Contrast.of(self.places, self.alternatives, self.texts, self.said, turned=not self.turned)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            "places": [list(place) for place in self.places],
            "alternatives": [list(ids) for ids in self.alternatives],
            "texts": list(self.texts),
            "said": self.said,
            "turned": self.turned,
        }


def _contrasted(_given: Given) -> torch.Tensor:
    raise NotImplementedError  # the class is the function


@overload
def score(
    function: Callable[[Given], torch.Tensor],
    /,
    *,
    name: str | None = None,
    steps: Sequence[int] | None = None,
    others: Sequence[tuple[int, Sequence[int]]] = (),
    states: bool = False,
) -> OwnScore: ...


@overload
def score(
    *,
    name: str | None = None,
    steps: Sequence[int] | None = None,
    others: Sequence[tuple[int, Sequence[int]]] = (),
    states: bool = False,
) -> Callable[[Callable[[Given], torch.Tensor]], OwnScore]: ...


def score(
    function: Callable[[Given], torch.Tensor] | None = None,
    /,
    *,
    name: str | None = None,
    steps: Sequence[int] | None = None,
    others: Sequence[tuple[int, Sequence[int]]] = (),
    states: bool = False,
) -> Any:
    """Make a function of a ``Given`` a score of your own: what ``explain(replay, tokens=…)`` and ``evaluate`` follow.

    A decorator, bare or with settings. Methods that follow no score (plain attention, token activation maps) refuse it.
    A score has no unit: methods and curves take it as it is where they would take a probability.

    Args:
        function: one number per mask, ``(batch,)``, of what the model gives; row i may depend on row i only.
        name: what maps, pages and files call it, by default the function's name. Stored maps are found by it: scores
            that differ need other names.
        steps: numbers of the answer's tokens whose logits it reads, by default of all; passes leave out what others
            would take.
        others: other courses of the answer, ``(token number, token ids)``, scored in the same pass. One of a single
            token costs nothing, each longer one a sequence more per mask.
        states: whether it reads the final hidden states; such passes take no shortcuts.

    Raises:
        SelectionError: it is no function, or a step or a course that no answer has.
    """

    def made_of(function: Callable[[Given], torch.Tensor]) -> OwnScore:
        own = name or getattr(function, "__name__", "")
        if not callable(function) or not own:
            raise SelectionError(f"a score of your own is a function with a name, or name=…; got {function!r}")
        read = None if steps is None else tuple(sorted({int(step) for step in steps}))
        courses = tuple((int(step), tuple(map(int, ids))) for step, ids in others)
        if read == () or any(step < 0 for step in read or ()) or any(step < 0 or not ids for step, ids in courses):
            raise SelectionError(f"steps and others of {own!r} are token numbers from 0, and others have tokens")
        made = OwnScore(own, function, read, courses, states)
        _KNOWN[own] = made
        return made

    return made_of if function is None else made_of(function)


def stored_score(record: Mapping[str, Any]) -> OwnScore:
    """The score that ``to_dict`` wrote. One of the user's own is looked for by its name, in plugins too; where it is
    not known, one is returned that says so when it is called.

    Raises:
        KeyError, TypeError, ValueError: it is no record of a score.
    """
    if record["kind"] == Contrast.kind:
        return Contrast.of(
            [(start, stop) for start, stop in record["places"]],
            record["alternatives"],
            [str(text) for text in record["texts"]],
            str(record["said"]),
            turned=bool(record["turned"]),
        )
    name = str(record["name"])
    if name not in _KNOWN:
        load_plugins()

    def missing(_given: Given) -> torch.Tensor:
        raise ReplayError(f"there is no score {name!r} here: run the code that makes it by @probe.score first")

    return _KNOWN.get(name) or OwnScore(name, missing)


def alternative_ids(tokenizer: Any, said: Sequence[int], pieces: str, text: str) -> tuple[int, ...]:
    """Token ids of a text in the place of said words, with the white space that they begin with.

    Args:
        tokenizer: the tokenizer.
        said: token ids of the said words.
        pieces: their text as the answer shows it, with the white space in front.
        text: the alternative.

    Raises:
        SelectionError: the tokenizer has no tokens for it, or unknown ones.
    """

    def ids_of(words: str) -> tuple[int, ...]:
        return tuple(map(int, tokenizer(words, add_special_tokens=False)["input_ids"]))

    if writable(text) != text:
        raise SelectionError(f"{writable(text)!r} holds half of a character, which no tokenizer reads")
    own = pieces[: len(pieces) - len(pieces.lstrip())]
    # Some tokenizers put a space in front themselves: what gives the said tokens back is the right way to write.
    leads = list(dict.fromkeys((own, "", " ")))
    lead = next((one for one in leads if ids_of(one + pieces.strip()) == tuple(map(int, said))), own)
    found = ids_of(lead + text.strip()) if text.strip() else ()
    if not found:
        raise SelectionError(f"the tokenizer makes no token of {text!r}")
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown in found and getattr(tokenizer, "unk_token", "") not in text:
        raise SelectionError(
            f"the tokenizer cannot write {text!r}, it reads {tokenizer.decode(list(found))!r}: name a word that this "
            f"model could say"
        )
    return found
