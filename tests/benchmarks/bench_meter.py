"""Does the meter find answers that contradict their image, and answers that were given without looking?

    python tests/benchmarks/bench_meter.py              # some three minutes on one core
    python tests/benchmarks/bench_meter.py --images 4   # that everything runs

On the demo scenes, plain and hard in turn, where every word from the image is known. Answers of 1, 2, 4 and 8
sentences are the answers to so many questions on one image, each measured under its own question and joined, as a
caption is. Four kinds of them:

* *own*: what the model says by itself, greedily;
* *contradicted*: the same, with one word of one sentence exchanged for another of its kind (a colour for a colour);
* *swapped*: right answers to the same questions on other images;
* *unseen*: what the model says to an image of one colour, measured on that image.

Judged by the most surprising word, and by the share of words from the image; beside them, on the same answers, by the
joint probability: its drop on the baseline image, by which answers were ranked before, and itself. The threshold on
surprise is looked for on scenes of the split ``tune``; all other figures are of the split ``eval``. Answers that the
model has drawn at temperature 1 say how often it is taken for another. Writes ``results/meter.json``.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from random_model import write_results

import lvlm_probe as probe
from lvlm_probe.demo import hard as hard_scenes
from lvlm_probe.demo.drawing import render
from lvlm_probe.demo.questions import DOMAINS, Query, queries
from lvlm_probe.demo.scene import draw_layout, scene_rng
from lvlm_probe.importing.meter import Reading, answer_numbers, read_answer
from lvlm_probe.importing.rows import AnswerRow
from lvlm_probe.importing.word_origins import LEAST_FROM_IMAGE, ORIGINS, SURPRISE
from lvlm_probe.metrics import auroc

LENGTHS = (1, 2, 4, 8)
KINDS = ("own", "contradicted", "swapped", "unseen")
SCENES = 400
"""Layouts whose questions and answers are known; images are made of the first of them that have questions enough."""

THRESHOLDS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)


@dataclass(frozen=True)
class Sentence:
    """One answer as it was measured: what ``read_answer`` takes, and which words only the image can tell."""

    pieces: list[str]
    special: list[bool]
    log_probs: np.ndarray
    llr: np.ndarray
    top_log_probs: np.ndarray
    visual: frozenset[str]


class Bench:
    """The demo model, attached, as what answers and what is measured on."""

    def __init__(self) -> None:
        self.model, self.processor = probe.demo.load()
        self.probe = probe.attach(self.model, self.processor)

    def says(self, image: Image.Image, question: str, **settings: Any) -> str:
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        out = self.model.generate(**inputs, max_new_tokens=32, **{"do_sample": False, **settings})
        return self.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    def measured(self, image: Image.Image, question: str, answer: str, visual: Sequence[str] = ()) -> Sentence:
        row = AnswerRow(1, {}, (), question, None, answer, None, None)
        made, llr, _ = answer_numbers(self.probe, row, [image])
        assert made.top_log_probs is not None
        pieces = list(made.tokens)
        pieces[0] = f" {pieces[0].lstrip()}"
        return Sentence(pieces, made.special.tolist(), made.log_probs, llr, made.top_log_probs, frozenset(visual))


def joined(parts: Sequence[Sentence], threshold: float = SURPRISE) -> Reading:
    """The reading of several sentences as one answer."""
    return read_answer(
        list(itertools.chain.from_iterable(part.pieces for part in parts)),
        list(itertools.chain.from_iterable(part.special for part in parts)),
        np.concatenate([part.log_probs for part in parts]),
        np.concatenate([part.llr for part in parts]),
        top_log_probs=np.concatenate([part.top_log_probs for part in parts]),
        threshold=threshold,
        source="",
        id=None,
        question="",
    )


def contradicted(answer: str, query: Query, rng: np.random.Generator) -> tuple[str, str] | None:
    """The answer with a word of the image exchanged, and that word; ``None`` where it holds no such word."""
    words = answer.removesuffix(".").split()
    places = [place for place in query.slots if place < len(words)]
    rng.shuffle(places)
    for place in places:
        for domain in DOMAINS.values():
            if words[place] in domain:
                words[place] = str(rng.choice([word for word in domain if word != words[place]]))
                return " ".join(words) + ".", words[place]
    return None


def sentences_of(bench: Bench, split: str, images: int, rng: np.random.Generator) -> list[dict[str, list[Sentence]]]:
    """For every image, the sentences of each kind, one a question, as many as the longest answer takes."""
    found: list[dict[str, list[Sentence]]] = []
    answers: dict[str, set[str]] = defaultdict(set)
    pools: list[tuple[Image.Image, list[Query]]] = []
    for index in range(SCENES):
        hard = index % 2 == 1  # in these the model is not sure, nor always right
        rng_of = scene_rng(split, 5, index, hard=hard)
        layout = hard_scenes.draw_layout(rng_of, "pair") if hard else draw_layout(rng_of)
        asked = hard_scenes.queries(layout) if hard else queries(layout)
        for query in asked:
            answers[query.question].add(query.answer)
        if len(asked) >= 2 * LENGTHS[-1] and len(pools) < images:
            pools.append((render(layout)[0], [asked[i] for i in rng.permutation(len(asked))]))
    for image, asked in pools:
        own: dict[str, list[Sentence]] = {kind: [] for kind in (*KINDS, "drawn")}
        empty = Image.new("RGB", image.size, tuple(int(level) for level in rng.integers(40, 216, 3)))
        for query in asked:
            said = bench.says(image, query.question)
            others = sorted(answers[query.question] - {query.answer, said})
            planted = contradicted(said, query, rng)
            if not others or planted is None:
                continue
            own["own"].append(bench.measured(image, query.question, said, query.words))
            own["contradicted"].append(bench.measured(image, query.question, planted[0], [planted[1]]))
            own["swapped"].append(bench.measured(image, query.question, str(rng.choice(others))))
            own["unseen"].append(bench.measured(empty, query.question, bench.says(empty, query.question)))
            if len(own["drawn"]) < 2:
                sampled = bench.says(image, query.question, do_sample=True, top_k=0, temperature=1.0)
                if sampled:
                    own["drawn"].append(bench.measured(image, query.question, sampled))
            if len(own["own"]) == LENGTHS[-1]:
                found.append(own)
                break
    return found


def answers_of(
    found: Sequence[dict[str, list[Sentence]]], rng: np.random.Generator
) -> dict[int, dict[str, list[Reading]]]:
    """Answers of every length and kind: of one image the first sentences, of which one is contradicted."""
    made: dict[int, dict[str, list[Reading]]] = {length: {kind: [] for kind in KINDS} for length in LENGTHS}
    for one in found:
        for length in LENGTHS:
            parts = {kind: one[kind][:length] for kind in KINDS}
            place = int(rng.integers(length))
            parts["contradicted"] = [
                one["contradicted" if number == place else "own"][number] for number in range(length)
            ]
            for kind in KINDS:
                made[length][kind].append(joined(parts[kind]))
    return made


def scores(reading: Reading) -> dict[str, float]:
    """By how much an answer is suspected, by each measure."""
    worst = reading.figures.worst
    tokens = sum(1 for piece in reading.pieces if piece)
    return {
        "surprise of the worst word": 0.0 if worst is None else worst.surprise,
        "share of words not from the image": 1.0 - reading.figures.image,
        "joint drop (before)": -sum(word.llr for word in reading.words),
        "joint log P": -reading.mean_log_prob * tokens,
    }


def areas(made: dict[int, dict[str, list[Reading]]], bad: str, lengths: Sequence[int]) -> dict[str, float]:
    """Area under the ROC curve of each measure: answers of a kind against the model's own, of these lengths."""
    good, found = ([scores(reading) for length in lengths for reading in made[length][kind]] for kind in ("own", bad))
    return {name: auroc([one[name] for one in found], [one[name] for one in good]) for name in good[0]}


def word_classes(found: Sequence[dict[str, list[Sentence]]]) -> dict[str, dict[str, float]]:
    """Which share of the words of a kind is told to be of which origin."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(ORIGINS, 0))
    for one in found:
        for sentence in one["own"]:
            for word in joined([sentence]).words:
                if word.origin is not None:
                    kind = (
                        "own words that only the image can tell" if word.text in sentence.visual else "own other words"
                    )
                    counts[kind][word.origin] += 1
        for sentence in one["contradicted"]:
            for word in joined([sentence]).words:
                if word.origin is not None and word.text in sentence.visual:
                    counts["planted words"][word.origin] += 1
        for sentence in one["drawn"]:
            for word in joined([sentence]).words:
                if word.origin is not None:
                    counts["words drawn at temperature 1"][word.origin] += 1
    return {
        kind: {"words": sum(line.values()), **{name: line[name] / sum(line.values()) for name in ORIGINS}}
        for kind, line in counts.items()
    }


def threshold_curve(found: Sequence[dict[str, list[Sentence]]]) -> dict[str, dict[str, float]]:
    """Of each threshold, the shares of planted and of own words above it."""
    own, planted = [], []
    for one in found:
        own += [word.surprise for sentence in one["own"] for word in joined([sentence]).words]
        planted += [
            max(word.surprise for word in joined([sentence]).words if word.text in sentence.visual)
            for sentence in one["contradicted"]
        ]
    return {
        f"{limit:g}": {
            "planted": float(np.mean(np.array(planted) > limit)),
            "own": float(np.mean(np.array(own) > limit)),
        }
        for limit in THRESHOLDS
    }


def class_of_answers(made: dict[int, dict[str, list[Reading]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Of each kind and length, the shares of the classes, and of the bands of the joint drop."""
    lines: dict[str, dict[str, dict[str, float]]] = {}
    for kind in KINDS:
        for length in LENGTHS:
            readings = made[length][kind]
            drops = 1 - np.exp(-np.array([sum(word.llr for word in one.words) for one in readings]))
            lines.setdefault(kind, {})[str(length)] = {
                **{name: float(np.mean([one.origin == name for one in readings])) for name in ORIGINS},
                "joint drop above 70 %": float(np.mean(drops > 0.7)),
            }
    return lines


def figures(found: Sequence[dict[str, list[Sentence]]], rng: np.random.Generator) -> dict[str, Any]:
    """What is published of the sentences of some images."""
    made = answers_of(found, rng)
    return {
        "images": len(found),
        "lengths": LENGTHS,
        "threshold": SURPRISE,
        "least_from_image": LEAST_FROM_IMAGE,
        "words_per_answer": {str(n): float(np.mean([one.figures.words for one in made[n]["own"]])) for n in LENGTHS},
        "areas": {
            bad: {**{str(length): areas(made, bad, [length]) for length in LENGTHS}, "mixed": areas(made, bad, LENGTHS)}
            for bad in KINDS[1:]
        },
        "words": word_classes(found),
        "answers": class_of_answers(made),
    }


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "meter.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench()
    rng = np.random.default_rng(0)
    tuned = threshold_curve(sentences_of(bench, "tune", max(2, options.images // 3), rng))
    found = figures(sentences_of(bench, "eval", options.images, rng), rng)
    small = {"small": True} if options.images < 16 else {}
    write_results(options.out, {"command": "python tests/benchmarks/bench_meter.py", **small, **found, "tuned": tuned})


if __name__ == "__main__":
    main()
