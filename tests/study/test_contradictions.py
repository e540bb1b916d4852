"""How well right answers and those that contradict their image are told apart: what is paired, and what is counted."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run, succeed
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import lvlm_probe as probe
from lvlm_probe.importing.meter import Reading, read_answer
from lvlm_probe.metrics import auroc
from lvlm_probe.study import open_dataset
from lvlm_probe.study.contradictions import detect, pairs, planted_words
from lvlm_probe.study.datasets.registry import Sample

SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=8)


@pytest.mark.quick
@given(SCORES, SCORES)
def test_the_area_is_the_share_of_pairs_in_order(positives: list[int], negatives: list[int]) -> None:
    wins = [(one > other) + (one == other) / 2 for one in positives for other in negatives]
    assert auroc(positives, negatives) == pytest.approx(sum(wins) / len(wins))
    assert auroc(positives, negatives) + auroc(negatives, positives) == pytest.approx(1.0)


def test_no_area() -> None:
    assert np.isnan(auroc([], [1.0])) and np.isnan(auroc([1.0], [])) and np.isnan(auroc([np.nan], [1.0]))
    assert auroc([np.inf], [1.0]) == 1.0


def sample(**facts: Any) -> Sample:
    return Sample(**{"id": "1", "question": "q", "load": lambda: Image.new("RGB", (8, 8)), **facts})


@pytest.mark.quick
def test_what_is_paired() -> None:
    found = pairs(
        [
            sample(answer="no", choices=("yes", "no")),
            sample(answer=("Closed", "shut"), choices=("Open", "closed")),
            sample(answer="A cup.", annotations={"contradiction": "A dog."}),
            sample(answer="somewhere else", choices=("here", "there")),  # none of the choices is right: which is wrong?
            sample(answer=None, choices=("yes", "no")),
            sample(answer="a free answer"),
            sample(answer=" ", annotations={"contradiction": "A dog."}),
        ]
    )
    assert [(pair.right, pair.wrong) for pair in found] == [("No", "Yes"), ("Closed", "Open"), ("A cup.", "A dog.")]


def said(text: str) -> Reading:
    pieces = [f" {word}" for word in text.split()]
    zeros = [0.0] * len(pieces)
    return read_answer(pieces, [False] * len(pieces), zeros, zeros, source="s", id=None, question="q")


def test_which_words_contradict() -> None:
    right = said("The red cup is on the table")
    for wrong, planted in (
        ("The red dog is on the table", ["dog"]),
        ("the RED cup is under a green table", ["under", "a", "green"]),
        ("The red cup is on the table today", ["today"]),
        ("The cup is on the table", []),
    ):
        assert [word.text for word in planted_words(right, said(wrong))] == planted


def test_on_the_demo_scenes(demo: Any) -> None:
    samples = list(itertools.islice(open_dataset("demo", "eval"), 8))
    for one, scene in zip(samples, probe.demo.scenes(8), strict=True):
        said, truth = one.annotations["contradiction"].split(), scene.answer.split()
        (place,) = [i for i, (a, b) in enumerate(zip(said, truth, strict=True)) if a != b]
        assert truth[place].strip(".") in scene.visual_words
    broken = sample(answer="a", annotations={"contradiction": "b"}, id="broken", load=lambda: 1 / 0)
    told: list[int] = []
    found = detect(pairs([*samples, broken]), *demo, tell=told.append)
    assert (found.pairs, told) == (8, list(range(1, 9)))
    assert [one.source for one in found.unread] == ["broken"] and "ZeroDivisionError" in found.unread[0].reason
    assert found.answers == 1.0 and found.words > 0.99
    assert (found.flagged, found.false_alarms) == (1.0, 0.0)
    assert detect(pairs(samples[:2]), *demo, threshold=1e3).flagged == 0.0


def test_the_command(tmp_path: Path) -> None:
    found = succeed("study", "contradictions", "demo", "eval", "--model", "demo", "--limit", "2", "--json").json
    assert found["pairs"] == 2 and found["answers"] == 1.0 and found["threshold"] == 3.0
    rows = []
    for number, scene in enumerate(probe.demo.scenes(2)):
        scene.image.save(tmp_path / f"{number}.jpg")
        wrong = scene.answer.replace(scene.visual_words[0], "hidden")
        texts = {"source_text": scene.answer, "hallucinated_text": wrong, "annotations": []}
        rows.append({"prompt": scene.question, "image_id": number, **texts})
    (tmp_path / "halloc_vqa.json").write_text(json.dumps(rows))
    result = succeed("study", "contradictions", "halloc", tmp_path, "--model", "demo")
    assert "2 pairs of answers" in result.out and "1.000  answers, by their most surprising word" in result.out
    (tmp_path / "halloc_vqa.json").write_text(json.dumps([{**rows[0], "image_id": "none"}]))
    refused = run("study", "contradictions", "halloc", tmp_path, "--model", "demo")
    assert (
        refused.code == 2
        and "has no sample with a right answer" in refused.err
        and "none.jpg is missing" in refused.err
    )
