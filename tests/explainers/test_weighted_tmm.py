"""Weighted T-MM against dense products written here from the formulas, on maps from eager autograd."""

from __future__ import annotations

import inside
import numpy as np
import pytest

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError

DECODER = "model.language_model"


def softmax(values: np.ndarray) -> np.ndarray:
    """By its definition."""
    raised: np.ndarray = np.exp(values - values.max())
    return raised / raised.sum()


def spelled_out(name: str, temperature: float) -> tuple[np.ndarray, list[float]]:
    """Relevance per image token, and each layer's weight, lowest first: the whole product, from the left."""
    eager = inside.replay(name, attention="eager")
    calls = inside.dense(eager).of(DECODER)
    columns, length = eager.trace.layout.image_positions, eager.length
    products = [np.maximum((call.weights * call.gradient)[0].double().numpy(), 0) for call in calls]
    positive = [np.maximum(call.gradient[0].double().numpy(), 0) for call in calls]
    fused = []
    for product, gradient in zip(products, positive, strict=True):
        heads = softmax(product.sum(axis=(1, 2)) / gradient.sum(axis=(1, 2)) / temperature)
        fused.append(np.einsum("h,hij->ij", heads, product))
    sums = np.array([layer.sum() for layer in fused])
    alphas = sums / sums.sum()
    start = np.zeros(length)
    for step in range(*inside.SPAN):
        at = len(eager.input_ids) - 1 + step
        start[at] = sum(product[:, at][:, columns].sum() for product in products)
        start[at] /= sum(product[:, at].sum() for product in products)
    matrix = np.eye(length)
    for alpha, layer in zip(alphas, fused, strict=True):  # (I + α_L Ê_L) … (I + α_1 Ê_1)
        matrix = (np.eye(length) + alpha * layer / np.maximum(layer.sum(axis=1, keepdims=True), 1e-300)) @ matrix
    return (start @ matrix)[columns], alphas.tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.02])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_the_map_is_the_dense_product(name: str, temperature: float) -> None:
    wanted, alphas = spelled_out(name, temperature)
    replay = inside.replay(name)
    heat = probe.explain(replay, method="weighted_tmm", tokens=inside.SPAN, strengthen=False, temperature=temperature)
    scaled = (wanted - wanted.min()) / (wanted.max() - wanted.min())
    boxes = replay.trace.layout.patch_box
    rows, cols = heat.values.shape
    y, x = (boxes[:, 1] + boxes[:, 3]) / 120 * rows, (boxes[:, 0] + boxes[:, 2]) / 180 * cols
    assert np.allclose(heat.values[y.astype(int), x.astype(int)], scaled, atol=5e-3)  # cells are tokens but for a hair
    found = heat.provenance["diagnostics"]["layer_weights"]
    assert list(found.values()) == pytest.approx(alphas[::-1], abs=1e-4)  # the last layer is reached first
    assert inside.own_passes(replay, "weighted_tmm") == {"forward": 2, "backward": 2}


@pytest.mark.quick
def test_it_is_not_tmm_and_heads_matter() -> None:
    replay = inside.replay("llava")
    soft, sharp, plain = (
        probe.explain(replay, method=method, tokens=inside.SPAN, strengthen=False, **params).values
        for method, params in (("weighted_tmm", {}), ("weighted_tmm", {"temperature": 0.01}), ("tmm", {}))
    )
    assert np.abs(soft - sharp).max() > 1e-3
    assert np.abs(soft - plain).max() > 1e-3


@pytest.mark.parametrize("temperature", [0, -1.0, float("inf")])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(ExplainError, match="temperature is a number above 0"):
        probe.explain(inside.replay("llava"), method="weighted_tmm", tokens=inside.SPAN, temperature=temperature)
