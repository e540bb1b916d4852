"""How well the meter tells answers that contradict their image, on a data set that has them.

::

    samples = itertools.islice(open_dataset("pope", "data/pope"), 200)
    found = detect(pairs(samples), model, processor)
    found.answers                     # area under the ROC curve, answers that contradict against right ones

Of a sample that has a right answer and one that contradicts the image, both are put into the model's mouth: the
``contradiction`` among its annotations (HalLoc, demo scenes), or another one of its choices (POPE, HallusionBench, all
data sets with choices). Nothing is generated, so that the figure does not hang on how answers are sampled or read.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lvlm_probe.importing.meter import Reading, Unread, answer_numbers, read_numbers
from lvlm_probe.importing.rows import AnswerRow, reason_of
from lvlm_probe.importing.word_origins import SURPRISE, MeteredWord
from lvlm_probe.metrics import auroc
from lvlm_probe.recording.probe import attach
from lvlm_probe.study.datasets.registry import Sample

if TYPE_CHECKING:
    import torch
    from PIL import Image


@dataclass(frozen=True)
class Pair:
    """A question with a right answer, and one that contradicts the image."""

    sample: Sample
    right: str
    wrong: str


@dataclass(frozen=True)
class Detection:
    """How well right answers and those that contradict their image are told apart.

    Attributes:
        pairs: how many were measured.
        answers: area under the ROC curve: the probability that of a right answer and one that contradicts its image the
            latter has the more surprising word; 0.5 is chance.
        words: the same, of words that contradict against all others.
        joint_drop: of answers, by what the joint probability loses on the baseline image (the less, the more
            suspicious), for comparison.
        flagged, false_alarms: share of the answers that contradict, and of the right ones, that hold a word above the
            threshold.
        threshold: nats.
        unread: what could not be measured.
    """

    pairs: int
    answers: float
    words: float
    joint_drop: float
    flagged: float
    false_alarms: float
    threshold: float
    unread: tuple[Unread, ...] = ()


def pairs(samples: Iterable[Sample]) -> Iterator[Pair]:
    """The pairs among samples; those without a right answer, or one that contradicts the image, are passed over."""
    for sample in samples:
        right = sample.answer[0] if isinstance(sample.answer, tuple) and sample.answer else sample.answer
        wrong = sample.annotations.get("contradiction")
        if wrong is None and isinstance(right, str):
            choices = [choice for choice in sample.choices if choice.strip().casefold() != right.strip().casefold()]
            wrong = choices[0] if choices and len(choices) < len(sample.choices) else None
        if isinstance(right, str) and isinstance(wrong, str) and right.strip() and wrong.strip():
            yield Pair(sample, _said(right), _said(wrong))


def detect(
    found: Iterable[Pair],
    model: torch.nn.Module,
    processor: object,
    *,
    baseline: str | Image.Image = "blur",
    threshold: float = SURPRISE,
    tell: Callable[[int], None] | None = None,
) -> Detection:
    """Measure both answers of every pair: two passes each.

    Args:
        found: the pairs; one that cannot be measured is named and stops nothing.
        model: the model.
        processor: its processor.
        baseline: for ``joint_drop``, as of ``measure``.
        threshold: surprise above which a word is flagged, nats.
        tell: called with the number of pairs that are done.
    """
    right: list[Reading] = []
    wrong: list[Reading] = []
    unread: list[Unread] = []
    with attach(model, processor) as probe:
        for number, pair in enumerate(found, start=1):
            try:
                image = pair.sample.image
                both = []
                for answer in (pair.right, pair.wrong):
                    row = AnswerRow(number, {}, (), pair.sample.question, None, answer, None, None, pair.sample.id)
                    numbers = answer_numbers(probe, row, [image], baseline)
                    both.append(read_numbers(*numbers, threshold=threshold, source=pair.sample.id))
            except Exception as error:
                unread.append(Unread(pair.sample.id, reason_of(error)))
                continue
            right.append(both[0])
            wrong.append(both[1])
            if tell is not None:
                tell(number)
    told: dict[bool, list[float]] = {False: [], True: []}
    for of_right, of_wrong in zip(right, wrong, strict=True):
        planted = {word.start for word in planted_words(of_right, of_wrong)}
        for reading, starts in ((of_right, set()), (of_wrong, planted)):
            for word in reading.words:
                if word.origin is not None:
                    told[word.start in starts].append(word.surprise)
    return Detection(
        pairs=len(right),
        answers=auroc([worst(one) for one in wrong], [worst(one) for one in right]),
        words=auroc(told[True], told[False]),
        joint_drop=auroc([-joint_ratio(one) for one in wrong], [-joint_ratio(one) for one in right]),
        flagged=_share(wrong),
        false_alarms=_share(right),
        threshold=threshold,
        unread=tuple(unread),
    )


def planted_words(right: Reading, wrong: Reading) -> list[MeteredWord]:
    """The words of an answer that contradicts its image that are not in the right one, in their order."""
    ours, theirs = ([word for word in reading.words if word.origin is not None] for reading in (right, wrong))
    matcher = difflib.SequenceMatcher(
        None, [word.text.casefold() for word in ours], [word.text.casefold() for word in theirs], autojunk=False
    )
    return [
        word
        for kind, _, _, start, stop in matcher.get_opcodes()
        if kind in ("replace", "insert")
        for word in theirs[start:stop]
    ]


def worst(reading: Reading) -> float:
    """Surprise of the most surprising word, nats; 0 where none is known."""
    word = reading.figures.worst
    return 0.0 if word is None else word.surprise


def joint_ratio(reading: Reading) -> float:
    """ln P − ln P̃ of the whole answer, nats: what the joint drop 1 − P̃/P is made of, in the same order."""
    return float(sum(word.llr for word in reading.words))


def _share(readings: list[Reading]) -> float:
    return sum(reading.origin == "unlikely" for reading in readings) / max(1, len(readings))


def _said(answer: str) -> str:
    """As a model says it: yes and no are written in small letters in data sets, and begin a sentence here."""
    return answer.capitalize() if answer in ("yes", "no") else answer
