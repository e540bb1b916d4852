"""Growth: T-MM keeps no attention map of all layers and heads, and the benchmark that says so measures exponents."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from marks import campaign

from lvlm_probe.attention.dispatch import AttentionCall
from lvlm_probe.attention.layers import TapLayer
from lvlm_probe.explainers.attention_relevance import Walk, relu_product
from lvlm_probe.planning.meter import Meter
from lvlm_probe.replaying.capture import AttentionLayer
from lvlm_probe.selection import TokenSelection

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_growth

HEADS, CHANNELS, LAYERS = 4, 8, 3


def walk_over(positions: int) -> Walk:
    """T-MM over a sequence of image tokens whose last position predicts the answer."""
    count = positions - 1
    boxes = np.stack([np.arange(count), np.zeros(count), np.arange(1, count + 1), np.ones(count)], axis=1)
    layout = SimpleNamespace(
        image_positions=np.arange(count), image_index=np.zeros(count, int), patch_box=boxes.astype(np.float32),
        patch_frames=None,
    )  # fmt: skip
    problem: Any = SimpleNamespace(
        trace=(trace := SimpleNamespace(layout=layout)),
        replay=SimpleNamespace(length=positions, rows=1, image_sizes=[(count, 1)], path=None, trace=trace),
        selection=TokenSelection(indices=(0,), tokens=(" red",), llr=(), rule="indices"),
        queries=torch.tensor([count]),
        image=0,
        target=0,
        extent=(count, 1),
        live=True,
    )
    return Walk(problem, "decoder", relu_product)


def layers_of(positions: int) -> list[tuple[AttentionLayer, tuple[torch.Tensor, ...]]]:
    """Layers from the last to the first, each with its query, key, value and output gradient, as in backward."""
    generator = torch.Generator().manual_seed(positions)
    found = []
    for index in reversed(range(LAYERS)):
        parts = tuple(torch.randn(1, HEADS, positions, CHANNELS, generator=generator) for _ in range(4))
        layer = AttentionLayer(
            TapLayer(index, f"layers.{index}"), "decoder", 0, *parts[:3], AttentionCall(), causal=True, sinks=False
        )
        layer.gradient = parts[3] / positions
        found.append((layer, parts))
    return found


def bytes_at_layers(positions: int) -> int:
    """Most bytes that T-MM adds at a layer."""
    walk, layers = walk_over(positions), layers_of(positions)
    meter = Meter(torch.device("cpu"))
    with meter.running():
        for layer, _ in layers:
            with meter.span():
                walk(layer)
    return max(span.peak - span.before for span in meter.reading.spans)


@pytest.mark.parametrize("largest", [2048, *campaign(4096)])
def test_tmm_grows_with_the_sequence_and_not_with_its_square(largest: int) -> None:
    sizes = [largest // 4, largest // 2, largest]
    taken = [bytes_at_layers(size) for size in sizes]
    for small, large in itertools.pairwise(taken):
        assert math.log2(large / small) <= 1.1
    one_map = 4 * HEADS * sizes[-1] ** 2  # of one layer, in single precision
    assert taken[-1] < one_map / 4


@pytest.mark.quick
def test_and_it_is_the_dense_product_all_the_same() -> None:
    positions = 300  # more than two blocks of rows, the last one short
    walk = walk_over(positions)
    row = torch.zeros(positions, dtype=torch.float64)
    row[-1] = 1
    hidden = torch.ones(positions, positions, dtype=torch.bool).triu(1)
    for layer, (query, key, value, gradient) in layers_of(positions):
        walk(layer)
        scores = query[0].double() @ key[0].double().transpose(-1, -2) / math.sqrt(CHANNELS)
        weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
        slope = gradient[0].double() / positions @ value[0].double().transpose(-1, -2)
        row = row + row @ (weights * slope).clamp(min=0).mean(dim=0)
    torch.testing.assert_close(walk.values()[0], row[:-1], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_exponents_are_found(exponent: float) -> None:
    x = [144, 400, 1024, 7290]
    found = bench_growth.slope(x, [3.0 * value**exponent for value in x])
    assert found == {"all": pytest.approx(exponent, abs=1e-3), "last": pytest.approx(exponent, abs=1e-3)}
    assert bench_growth.slope(x, [1.0, 0.0, 1.0, 1.0]) is None  # nothing grows from 0


def test_the_dense_maps_are_counted_right() -> None:
    maps = [torch.empty(bench_growth.DECODER["num_attention_heads"], 50, 50) for _ in range(2)]
    layers = bench_growth.DECODER["num_hidden_layers"]
    assert bench_growth.dense_bytes(50) == layers * sum(part.nbytes for part in maps)
