"""Attention times gradient at the words' own positions, against an eager model's own maps and autograd."""

from __future__ import annotations

from typing import Any

import inside
import numpy as np
import pytest
import torch

import lvlm_probe as probe
from lvlm_probe.explainers.gradient_attention import reading_of
from lvlm_probe.explainers.registry import Problem
from lvlm_probe.selection import select_tokens

DECODER = "model.language_model"


def explain(replay: Any, **params: Any) -> probe.Heatmap:
    return probe.explain(replay, method="gradient_attention", tokens=inside.SPAN, strengthen=False, **params)


def spelled_out(name: str, *, filtered: bool) -> tuple[np.ndarray, list[float]]:
    """Word after word, layer after layer, head after head: values per image token, and each word's share."""
    eager = inside.replay(name, attention="eager")
    columns = eager.trace.layout.image_positions
    truth = inside.dense(eager)
    total, shares = np.zeros(len(columns)), []
    for step in range(*inside.SPAN):
        at = len(eager.input_ids) - 1 + step
        mine, image, everything = np.zeros(len(columns)), 0.0, 0.0
        for call in truth.of(DECODER):
            for weights, gradient in zip(call.weights[0, :, at], call.gradient[0, :, at], strict=True):
                product = np.maximum((weights * gradient).double().numpy(), 0)
                seen = product[columns]
                mine += seen * (seen.sum() / product.sum() if filtered and product.sum() > 0 else 1 - filtered)
                image, everything = image + seen.sum(), everything + product.sum()
        shares.append(image / everything)
        total += mine * (shares[-1] if filtered else 1)
    return total, shares


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_the_values_are_the_formula(name: str, filtered: bool) -> None:
    wanted, shares = spelled_out(name, filtered=filtered)
    replay = inside.replay(name)
    reading = reading_of(Problem(replay, select_tokens(replay, span=inside.SPAN)), filtered=filtered)
    assert reading.shares.tolist() == pytest.approx(shares, rel=1e-4)
    found = ((reading.shares if filtered else torch.ones(len(shares), dtype=torch.float64)) @ reading.maps).numpy()
    assert np.abs(found - wanted).max() <= 1e-5 * wanted.max()
    heat = explain(replay, filtered=filtered)
    scaled = (wanted - wanted.min()) / (wanted.max() - wanted.min())
    boxes = replay.trace.layout.patch_box
    rows, cols = heat.values.shape
    y, x = (boxes[:, 1] + boxes[:, 3]) / 120 * rows, (boxes[:, 0] + boxes[:, 2]) / 180 * cols
    assert np.allclose(heat.values[y.astype(int), x.astype(int)], scaled, atol=5e-3)  # cells are tokens but for a hair
    assert heat.provenance["diagnostics"]["layers"] == 3
    assert inside.own_passes(replay, "gradient_attention") == {"forward": 1, "backward": 1}


@pytest.mark.quick
def test_a_word_that_reads_text_counts_little() -> None:
    """The weighted map leans towards the word that reads more off the image."""
    replay = inside.replay("llava")
    reading = reading_of(Problem(replay, select_tokens(replay, span=inside.SPAN)))
    assert ((reading.shares >= 0) & (reading.shares <= 1)).all()
    assert float(reading.shares.max() - reading.shares.min()) > 1e-3  # there is something to weigh by


def test_alternatives_of_several_tokens_are_read_too() -> None:
    """A contrast with a longer word has rows of its own: each is a sequence of the same image tokens."""
    replay = inside.replay("llava")
    (ids,) = inside.other_ids(replay, 2)
    selection = select_tokens(replay, span=(1, 2), against=replay.processor.tokenizer.decode(ids))
    problem = Problem(replay.scored(selection.score), selection)
    reading = reading_of(problem)
    assert len(reading.shares) == sum(len(rows) for _, rows in _rows(problem))
    assert float(reading.maps.sum()) > 0


def _rows(problem: Problem) -> Any:
    from lvlm_probe.explainers.attention_relevance import query_rows

    return query_rows(problem)
