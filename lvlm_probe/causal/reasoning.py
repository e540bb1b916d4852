"""Steps of an answer that reasons: where the image comes in, and which step decides the conclusion.

An answer is split into steps, which are runs of its tokens: what stands between ``<think>`` and ``</think>`` is
thought, a tool call or a fenced block is one step, a line is a step, and a line of several sentences one for each. What
is known of a step costs nothing where a trace recorded it:

* the log-likelihood ratios of its tokens: their sum, and the sum over those that the image is responsible for (over
  ``ALPHA``; paper, Eq. 6), which words that the image makes less likely do not hide;
* the share of attention that goes to the image from where its tokens are predicted, mean over layers and heads.

``check_steps`` asks the model, by two passes for each step, what the conclusion loses

* when the step is *not read*: no later position attends to its tokens (``Replay.without``);
* when the step is *not looking*: its own positions do not attend to the image (``knockout``).

A step is read along other ways too: what later steps say of it stays. So a loss is what only this step holds.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch

from lvlm_probe.attention.cutting import attention_layers, cut_attention
from lvlm_probe.cards import equal, in_one_line
from lvlm_probe.causal.effects import Recorded
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.explaining import Tokens, words_of
from lvlm_probe.explainers.scores import check_finite
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.progress import ProgressChoice, show_progress
from lvlm_probe.replaying import Replay
from lvlm_probe.replaying.isolation import taking_turns
from lvlm_probe.trace import Trace
from lvlm_probe.words import ALPHA, tokens_at

Kind = Literal["thought", "call", "answer"]

_TAG = re.compile(
    r"<(?P<end>/?)(?P<name>think|thinking|thought|reasoning|analysis|answer|tool_call|function_call)>"
    r"|\[(?P<brackets>/?)THINK\]|(?P<fence>```)",
    re.IGNORECASE,
)
_CALLS = ("tool_call", "function_call")
_ACTION = re.compile(r"\s*Action(?: Input)?\s*:")  # a call as agents write it, in a line of its own
_STOP = re.compile(r"\n+|[.!?…]+[\"'”’)\]*]*(?=\s)|[。！？]+[”’）」』]*")
_NUMBERED = re.compile(r"[\s*•#-]*\(?(?:\d{1,3}|[A-Za-z])\.")
"""The number of a line, which ends in a full stop and is no sentence."""
_SHORT = re.compile(
    r"(?:^|[\s(])(?:step\s+\d+|no|fig|eq|dr|mr|mrs|ms|st|vs|cf|e\.g|i\.e|approx|resp)\.$", re.IGNORECASE
)
"""What is shortened by a full stop."""

_TEXT_MASS = "decoder.attention_text_mass"


@dataclass(frozen=True)
class Step:
    """One step of an answer.

    Attributes:
        text: as a person reads it.
        start, stop: its tokens ``[start, stop)``; ``explain(replay, tokens=step.span)`` makes its heatmap.
        kind: ``"thought"``, ``"call"`` of a tool, or ``"answer"``.
        llr: log-likelihood ratio of its tokens together, nats; ``None`` where it was not recorded.
        from_image: the same of its tokens whose own ratio is over ``ALPHA``, nats; 0 where there are none.
        looking: share of attention to the image where its tokens are predicted, 0 to 1; ``None`` where unknown.
        unread: what the conclusion loses when this step is not read, nats; ``None`` before ``check_steps``.
        unseen: what it loses when this step does not attend to the image, nats.
    """

    text: str
    start: int
    stop: int
    kind: Kind
    llr: float | None = None
    from_image: float | None = None
    looking: float | None = None
    unread: float | None = None
    unseen: float | None = None

    @property
    def span(self) -> tuple[int, int]:
        """Its tokens, as ``tokens=`` takes a span."""
        return self.start, self.stop


@dataclass(frozen=True, repr=False)
class Steps(Recorded):
    """An answer, step by step. Iterates over its steps, and has their number.

    Attributes:
        steps: in order.
        llr: log-likelihood ratio of each token, ``(step,)`` nats; empty where it was not recorded.
        trace_id: of the answer.
        conclusion: the words that ``check_steps`` measured; empty before.
        passes: forward passes that took.
    """

    __repr__, __eq__ = in_one_line, equal

    steps: tuple[Step, ...]
    llr: tuple[float, ...]
    trace_id: str
    conclusion: str = ""
    passes: int = 0

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    @property
    def sees(self) -> int | None:
        """Number of the step that most comes from the image; ``None`` where no token's ratio is over ``ALPHA``."""
        return _highest([step.from_image for step in self.steps])

    @property
    def decides(self) -> int | None:
        """Number of the step without which the conclusion loses most; ``None`` where none costs over ``ALPHA`` nats."""
        return _highest([step.unread for step in self.steps])

    @property
    def verdict(self) -> str:
        """Where the image comes in, and which step decides, as sentences."""
        told = []
        if all(step.llr is None for step in self.steps):
            told.append("How much of each step the image is responsible for was not recorded.")
        elif self.sees is None:
            told.append("No word of any step comes from the image (LLR over 1).")
        else:
            nats = self.steps[self.sees].from_image
            told.append(f"The image comes in most at step {self._named(self.sees)}, {nats:+.1f} nats.")
        if self.conclusion and self.decides is None:
            told.append(f"No step alone decides “{self.conclusion}”.")
        elif self.decides is not None:
            lost = self.steps[self.decides].unread
            told.append(f"Step {self._named(self.decides)} decides “{self.conclusion}”: {lost:.1f} nats go without it.")
        return " ".join(told)

    def _named(self, number: int) -> str:
        text = " ".join(self.steps[number].text.split())
        return f"{number + 1} of {len(self)} (“{text if len(text) <= 60 else text[:59] + '…'}”)"

    def __str__(self) -> str:
        lines = [self.verdict]
        for number, step in enumerate(self.steps):
            facts = [f"from image {step.from_image:+.1f}"] if step.from_image is not None else []
            facts += [f"looking {step.looking:.0%}"] if step.looking is not None else []
            facts += [f"without {-step.unread:+.1f}"] if step.unread is not None else []
            facts += [f"blind {-step.unseen:+.1f}"] if step.unseen is not None else []
            text = " ".join(step.text.split())
            lines.append(f"  {number + 1:>3}  {step.kind:<7}  {'  '.join(facts)}  {text[:70]}{'…' * (len(text) > 70)}")
        return "\n".join(lines)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Rebuild what ``to_dict`` wrote. Raises ``ExplainError`` for anything else."""
        try:
            steps = [Step(**step) for step in record["steps"]]
        except (KeyError, TypeError) as error:
            raise ExplainError(f"not a stored {cls.__name__}: {error!r}") from error
        return super().from_dict({**record, "steps": steps})


def _highest(values: Sequence[float | None]) -> int | None:
    known = [(value, -number) for number, value in enumerate(values) if value is not None and value > ALPHA]
    return -max(known)[1] if known else None


@naming_arguments
def find_steps(source: Trace | Replay) -> Steps:
    """Split an answer into steps, with what its trace recorded of each. No pass of the model is run on a trace.

    Args:
        source: the trace; or the replay, whose ratios are then those over its own baseline, in two passes at most.

    Raises:
        ExplainError: the answer has no words.
    """
    trace: Any = source if isinstance(source, Trace) else source.trace
    pieces, special = list(source.tokens), [bool(flag) for flag in source.special]
    spans = _split(pieces, special)
    if not spans:
        raise ExplainError("the answer has no words, so it has no steps")
    found = source.llr
    ratios = None if found is None else np.asarray(found, dtype=np.float64)
    shares = _shares(trace)
    return Steps(
        steps=tuple(
            Step(
                text,
                start,
                stop,
                kind,
                None if ratios is None else float(ratios[start:stop].sum()),
                None if ratios is None else float(sum(ratio for ratio in ratios[start:stop] if ratio > ALPHA)),
                None if shares is None else float(shares[start:stop].mean()),
            )
            for text, start, stop, kind in spans
        ),
        llr=() if ratios is None else tuple(ratios.tolist()),
        trace_id=source.trace_id,
    )


def _shares(trace: Any) -> np.ndarray | None:
    """Share of attention to image tokens, ``(step,)``. It is what does not go to text, so that the rows themselves,
    which of a long answer are large, are not read."""
    if _TEXT_MASS not in getattr(trace, "points", ()) or not len(trace.layout.image_positions):
        return None
    values = trace.point(_TEXT_MASS).values.float()
    shares: np.ndarray = 1 - values.flatten(1).mean(1).numpy()
    return shares


def _split(pieces: Sequence[str], special: Sequence[bool]) -> list[tuple[str, int, int, Kind]]:
    """Text, first and last token, and kind of each step."""
    shown = [
        piece if not flag or _TAG.fullmatch(piece.strip()) else " " * len(piece)
        for piece, flag in zip(pieces, special, strict=True)
    ]
    text = "".join(shown)
    found: list[tuple[str, int, int, Kind]] = []
    begin = 0
    for start, stop, kind in _sentences(text):
        inside = text[start:stop]
        first = start + len(inside) - len(inside.lstrip())
        last = start + len(inside.rstrip())
        if not any(sign.isalnum() for sign in inside):
            continue
        # A token that ends one step and begins the next belongs to the former.
        tokens = [token for token in tokens_at(shown, [(first, last)]) if token >= begin and not special[token]]
        if tokens:
            begin = tokens[-1] + 1
            found.append((inside.strip(), tokens[0], begin, kind))
    return found


def _sentences(text: str) -> Iterator[tuple[int, int, Kind]]:
    for start, stop, kind, whole in _blocks(text):
        begin = start
        for found in [] if whole else _STOP.finditer(text, start, stop):
            line = text.rfind("\n", start, found.start()) + 1
            said = text[max(line, begin) : found.start() + 1]
            if found[0][0] == "." and ((begin <= line and _NUMBERED.fullmatch(said)) or _SHORT.search(said)):
                continue
            yield begin, found.end(), _kind(text[begin : found.end()], kind)
            begin = found.end()
        if begin < stop:
            yield begin, stop, _kind(text[begin:stop], kind)


def _kind(text: str, kind: Kind) -> Kind:
    return "call" if _ACTION.match(text) else kind


def _blocks(text: str) -> Iterator[tuple[int, int, Kind, bool]]:
    """Stretches between tags: their kind, and whether each is one step as it is."""
    tags = list(_TAG.finditer(text))
    closing = [_ends(tag) and tag["name"] not in _CALLS and tag["name"] != "answer" for tag in tags]
    opened = [not _ends(tag) and _thinks(tag) for tag in tags]
    # The template may have begun the thought: then the answer closes what it has not opened.
    thinking = True in closing and not any(opened[: closing.index(True)])
    at, calling, fenced = 0, False, False
    for tag in [*tags, None]:
        stop = len(text) if tag is None else tag.start()
        if text[at:stop].strip():
            yield at, stop, "call" if calling else "thought" if thinking else "answer", calling or fenced
        if tag is None:
            return
        at = tag.end()
        if tag["fence"]:
            fenced = not fenced
        elif (tag["name"] or "").lower() in _CALLS:
            calling = not _ends(tag)
        elif _thinks(tag):
            thinking = not _ends(tag)


def _ends(tag: re.Match[str]) -> bool:
    return not tag["fence"] and "/" in tag[0]


def _thinks(tag: re.Match[str]) -> bool:
    return not tag["fence"] and (tag["name"] or "think").lower() not in (*_CALLS, "answer")


@taking_turns
def check_steps(
    replay: Replay,
    *,
    steps: Sequence[int] | None = None,
    tokens: Tokens | None = None,
    progress: ProgressChoice = None,
) -> Steps:
    """Ask the model which step decides the conclusion: by what it loses without each of the steps before it.

    Takes 1 + 2 passes for each step that is checked, and two for the ratios.

    Args:
        replay: the recorded answer on its model.
        steps: numbers of the steps to check, counted from 0; by default all that end before the conclusion.
        tokens: the conclusion, as ``tokens`` of ``lvlm_probe.explain``; by default the last step.
        progress: called with (done, total) passes; by default a bar where a person waits, ``False`` for none.

    Raises:
        ExplainError: the answer has one step only, there is no such step, or it is not before the conclusion.
        ReplayError: the model cannot be asked without some of its text (``Replay.without``).
    """
    replay = replay.counted()
    found = find_steps(replay)
    selection = words_of(replay, found.steps[-1].span if tokens is None else tokens)
    if not selection:
        raise ExplainError(f"there is no conclusion to measure: {selection.reason}")
    conclusion = list(selection.indices)
    before = [number for number, step in enumerate(found) if step.stop <= conclusion[0]]
    wanted = before if steps is None else sorted(set(steps))
    if not before:
        raise ExplainError(
            f"no step of {len(found)} ends before the conclusion {selection.text!r}, so there is none to check: "
            "name a later conclusion by tokens=, or map the answer as a whole"
        )
    if not wanted or not set(wanted) <= set(before):
        raise ExplainError(
            f"steps are checked that end before the conclusion {selection.text!r}: {before}; got {list(steps or [])}"
        )
    images = np.asarray(replay.trace.layout.image_positions)
    checked = list(found.steps)
    with torch.no_grad(), show_progress(progress, "checking steps") as advance:
        whole = float(replay.original_log_probs[conclusion].double().sum())
        for done, number in enumerate(wanted, 1):
            step = found.steps[number]
            places = np.arange(step.start, step.stop) + replay.prompt_length
            without = replay.without(places.tolist()).log_probs(None)[0]
            unread = whole - float(without[conclusion].double().sum())
            unseen = None
            if len(images):
                # Where its tokens are predicted, and where they stand.
                blind = _without_image(replay, np.arange(places[0] - 1, places[-1] + 1), images)
                unseen = whole - float(blind[conclusion].double().sum())
            check_finite("check_steps", replay.trace_id, np.array([unread, unseen or 0.0]))
            checked[number] = dataclasses.replace(step, unread=unread, unseen=unseen)
            if advance is not None:
                advance(1 + 2 * done, 1 + 2 * len(wanted))
    told = found.steps[-1].text if tokens is None else selection.text
    return dataclasses.replace(found, steps=tuple(checked), conclusion=told, passes=replay.passes.forward)


def _without_image(replay: Replay, queries: np.ndarray, images: np.ndarray) -> torch.Tensor:
    with replay.replica.use() as model:
        layers = attention_layers(model, None)
    with cut_attention(replay, layers, np.setdiff1d(queries, images), images):
        return replay.log_probs(None)[0]
