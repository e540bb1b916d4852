"""T-MM, IIA and rollout against dense products written here from the formulas, on maps from eager autograd."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import inside
import numpy as np
import pytest
import torch
from torch import Tensor

import lvlm_probe as probe
from lvlm_probe.attention import TapLayer
from lvlm_probe.attention.dispatch import AttentionCall
from lvlm_probe.errors import ExplainError, OutOfMemory
from lvlm_probe.explainers.attention_relevance import Walk, relu_product
from lvlm_probe.explainers.registry import Problem
from lvlm_probe.kinds import told_by_kind
from lvlm_probe.replaying.capture import AttentionLayer
from lvlm_probe.selection import TokenSelection, select_tokens

DECODER = "model.language_model"
ONE = torch.ones(1, 1, 1)


def explain(replay, method: str, **params: Any):
    return probe.explain(replay, method=method, tokens=inside.SPAN, strengthen=False, **params)


def bars(calls: list[inside.Dense], length: int, product=None) -> list[Tensor]:
    """Ā per layer, lowest first, ``(view, token, token)``; windows of a layer put at their places."""
    product = product or (lambda call: (call.weights * call.gradient).clamp(min=0))
    layers: dict[str, Tensor] = {}
    for call in calls:
        mean = product(call).double().mean(dim=1)
        at = slice(call.start, call.start + mean.shape[1])
        layers.setdefault(call.module, torch.zeros(len(mean), length, length, dtype=torch.float64))[:, at, at] = mean
    return list(layers.values())


def row(vector: Tensor, maps: list[Tensor], *, bare: bool = False) -> Tensor:
    """Row vectors ``(view, token)`` times (I + Ā_L) … (I + Ā_1), or … (I + Ā_2) Ā_1."""
    rows = []
    for view in range(len(vector)):
        own = [bar[view] for bar in maps]
        product = inside.chefer(own[1:]) @ own[0] if bare and len(own) > 1 else own[0] if bare else inside.chefer(own)
        rows.append(vector[view] @ product)
    return torch.stack(rows)


def rolled(vector: Tensor, maps: list[Tensor]) -> Tensor:
    """Row vectors times the product of (Ā + I) / rowsum, the top layer first."""
    eye = torch.eye(maps[0].shape[-1], dtype=torch.float64)
    for bar in reversed(maps):
        mixed = bar + eye
        vector = torch.einsum("vr,vrk->vk", vector, mixed / mixed.sum(dim=-1, keepdim=True))
    return vector


def decoder_start(replay) -> Tensor:
    start = torch.zeros(1, replay.length, dtype=torch.float64)
    start[0, [len(replay.input_ids) - 1 + step for step in range(*inside.SPAN)]] = 1
    return start


def walked(replay, scope: str, **settings: Any) -> Walk:
    problem = Problem(replay, select_tokens(replay, span=inside.SPAN))
    walk = Walk(problem, scope, relu_product, **settings)
    with replay.capture(attention=walk.parts, visit=walk) as seen:
        walk.starts_at(seen.tapped[walk.lowest_part][0])
        replay.score_and_grad(ONE, problem.score, image=0)
    return walk


def close(found: Tensor, wanted: Tensor, *, within: float = 1e-6) -> None:
    """To ``within`` of 1, and of the largest value where those are smaller than 1."""
    assert found.shape == wanted.shape
    scale = min(1.0, float(wanted.abs().max()))
    assert scale > 0
    difference = float((found.double() - wanted.double()).abs().max())
    assert difference <= within
    assert difference <= 20 * within * scale


def image_columns(replay) -> Tensor:
    return torch.tensor(replay.trace.layout.image_positions)


def encoder_of_image_tokens(name: str, replay, above: Tensor) -> Tensor:
    """The decoder's relevance of the image tokens on the encoder's own tokens, worked out by the model's own order."""
    if name == "llava":
        return torch.cat([torch.zeros(1, dtype=torch.float64), above])[None]  # a class token in front
    if name in ("gemma3", "paligemma"):
        side = 4
        cells = round(math.sqrt(len(above)))
        size = side // cells
        spread = above.reshape(cells, cells).repeat_interleave(size, 0).repeat_interleave(size, 1)
        return spread.reshape(1, -1) / size**2
    spread = above.repeat_interleave(4) / 4  # four patches, one after the other, make one token
    if name == "qwen2_5_vl":
        # 56 pixels are windows of 2 × 2 merged patches, one window after the other.
        rows, cols = (int(edge) // 2 for edge in replay.trace.model_kwargs["image_grid_thw"][0, 1:])
        tokens = [(row, col) for row in range(rows) for col in range(cols)]
        order = sorted(tokens, key=lambda token: (token[0] // 2, token[1] // 2, token))
        index = torch.tensor([row * cols + col for row, col in order])
        assert index.tolist() != sorted(index.tolist())
        spread = spread.reshape(-1, 4)[index].reshape(-1)
    return spread[None]


FAMILIES = ("llava", "qwen2_vl", "gemma3")


@pytest.mark.parametrize("last_factor", ["identity", "bare"])
@pytest.mark.parametrize("name", FAMILIES)
def test_tmm_through_the_decoder_is_the_dense_product(name, last_factor):
    truth = inside.dense(inside.replay(name, attention="eager"))
    replay = inside.replay(name)
    maps = bars(truth.of(DECODER), replay.length)
    assert len(maps) == 3
    wanted = row(decoder_start(replay), maps, bare=last_factor == "bare")[0, image_columns(replay)]
    walk = walked(replay, "decoder", last_factor=last_factor)
    values, boxes, _ = walk.values()
    close(values, wanted)
    assert np.array_equal(boxes, replay.trace.layout.patch_box)
    # And as a heatmap: on the tokens' own grid, every token is a cell.
    heat = explain(replay, "tmm", last_factor=last_factor)
    scaled = (wanted - wanted.min()) / (wanted.max() - wanted.min())
    for value, (x0, y0, x1, y1) in zip(scaled, boxes, strict=True):
        rows, cols = heat.values.shape
        cell = heat.values[int((y0 + y1) / 2 / 60 * rows), int((x0 + x1) / 2 / 90 * cols)]
        assert cell == pytest.approx(float(value), abs=5e-3)  # a cell is a token but for a hair at its edges
    assert heat.provenance["diagnostics"] == {"layers": 3, "unreadable": {}}
    own = inside.own_passes(replay, "tmm", last_factor=last_factor)
    assert own == {"forward": 1, "backward": 1}


@pytest.mark.parametrize("name", [*FAMILIES, "qwen2_5_vl", "llava_next"])
def test_tmm_through_the_encoder_is_the_dense_product(name):
    """From all tokens alike; layers above the one that is read (LLaVA's last) take no part."""
    truth = inside.dense(inside.replay(name, attention="eager"))
    replay = inside.replay(name)
    calls = [call for call in truth.calls if not call.module.startswith(DECODER) and call.gradient is not None]
    walk = walked(replay, "encoder")
    live = torch.from_numpy(walk.encoder_tokens.live)
    shape = walk.encoder_tokens.shape if len(walk.encoder_tokens.shape) == 2 else (1, len(live))
    start = (live.double() / live.sum()).reshape(shape)
    wanted = row(start, bars(calls, shape[1]))
    close(walk.values()[0], wanted.reshape(-1)[live])
    assert len(set(walk.visited)) == (1 if name.startswith("llava") else 2)


@pytest.mark.parametrize("last_factor", ["identity", "bare"])
@pytest.mark.parametrize("name", [*FAMILIES, "qwen2_5_vl", "paligemma"])
def test_tmm_through_both_is_the_dense_product(name, last_factor):
    truth = inside.dense(inside.replay(name, attention="eager"))
    replay = inside.replay(name)
    above = row(decoder_start(replay), bars(truth.of(DECODER), replay.length))[0, image_columns(replay)]
    start = encoder_of_image_tokens(name, replay, above)
    calls = [call for call in truth.calls if not call.module.startswith(DECODER) and call.gradient is not None]
    tower = bars(calls, start.shape[1])
    wanted = row(start, tower, bare=last_factor == "bare")
    walk = walked(replay, "both", last_factor=last_factor)
    live = torch.from_numpy(walk.encoder_tokens.live)
    found = walk.values()[0]
    close(found, wanted.reshape(-1)[live])
    if last_factor == "identity":
        # The encoder takes part: without it the values would be the decoder's.
        moved = float((found - start.reshape(-1)[live]).abs().max() / start.max())
        assert moved > 1e-6
        assert moved <= math.prod(1 + float(bar.sum(dim=-2).max()) for bar in tower) - 1 + 1e-6


def test_several_tokens_at_once_are_a_sum_of_starts_not_of_maps():
    """One backward pass for the sum: relevance of a set is not the sum of relevances, Ā being that of the sum."""
    replay, eager = inside.replay("llava"), inside.replay("llava", attention="eager")
    for span in ((0, 1), (2, 5)):
        truth = inside.dense(eager, range(*span))
        start = torch.zeros(1, replay.length, dtype=torch.float64)
        start[0, [len(replay.input_ids) - 1 + step for step in range(*span)]] = 1
        wanted = row(start, bars(truth.of(DECODER), replay.length))[0, image_columns(replay)]
        problem = Problem(replay, select_tokens(replay, span=span))
        walk = Walk(problem, "decoder", relu_product)
        with replay.capture(attention=["decoder"], visit=walk):
            replay.score_and_grad(ONE, problem.score)
        close(walk.values()[0], wanted)


def test_another_picture_of_the_prompt():
    eager = inside.replay("qwen2_vl", images=2, attention="eager")
    truth = inside.dense(eager)
    replay = inside.replay("qwen2_vl", images=2)
    maps = bars(truth.of(DECODER), replay.length)
    columns = torch.tensor(replay.trace.layout.image_positions)
    for image in (0, 1):
        problem = Problem(replay, select_tokens(replay, span=inside.SPAN), image)
        walk = Walk(problem, "decoder", relu_product)
        with replay.capture(attention=["decoder"], visit=walk):
            replay.score_and_grad(torch.ones(1, 2, 1, 1), problem.score)
        wanted = row(decoder_start(replay), maps)[0, columns[replay.trace.layout.image_index == image]]
        close(walk.values()[0], wanted)


# ------------------------------------------------------------------------------------------------------ by hand


def toy_problem() -> Any:
    """Three tokens; the first two are the picture's, the answer is predicted at the third."""
    layout = SimpleNamespace(
        image_positions=np.array([0, 1]),
        image_index=np.array([0, 0]),
        patch_box=np.array([[0, 0, 1, 1], [1, 0, 2, 1]], np.float32),
        patch_frames=None,
    )
    return SimpleNamespace(
        replay=SimpleNamespace(length=3, rows=1, image_sizes=[(2, 1)], path=None, trace=SimpleNamespace(layout=layout)),
        queries=torch.tensor([2]),
        selection=TokenSelection(indices=(0,), tokens=(" red",), llr=(), rule="indices"),
        target=0,
        extent=(2, 1),
        live=True,
    )


def toy_layer(index: int, *heads: list[list[float]], gradient: list[list[float]] | None = None) -> AttentionLayer:
    """A layer whose maps are given: query i is the unit vector e_i, key j has ln A_ij in its channel i; V is I."""
    weights = torch.tensor(heads)[None]
    key = weights.clamp(min=1e-30).log().transpose(-1, -2)
    unit = torch.eye(3).expand(1, len(heads), 3, 3)
    layer = AttentionLayer(
        TapLayer(index, f"layers.{index}"), "decoder", 0, unit, key, unit, AttentionCall(scaling=1.0),
        causal=True, sinks=False,
    )  # fmt: skip
    if gradient is not None:
        layer.gradient = torch.tensor(gradient).expand(1, len(heads), 3, 3)
    rows = torch.arange(3)
    assert torch.allclose(layer.weights(rows), weights, atol=1e-6)
    return layer


LOW = [[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 4, 1 / 4, 1 / 2]]
HIGH = ([[1, 0, 0], [1 / 3, 2 / 3, 0], [1, 0, 0]], [[1, 0, 0], [1 / 3, 2 / 3, 0], [0, 1 / 2, 1 / 2]])


def test_rollout_of_three_tokens_by_hand():
    """Mean of the top layer's heads at the third token: 1/2, 1/4, 1/4; with I and halved 1/4, 1/8, 5/8. Through
    the lower layer: 1/4 + 1/8·1/4 + 5/8·1/8 = 23/64 to the first, 1/8·3/4 + 5/8·1/8 = 11/64 to the second."""
    walk = Walk(toy_problem(), "decoder", lambda layer, rows: layer.weights(rows).double().mean(dim=1), normalised=True)
    walk(toy_layer(1, *HIGH))
    walk(toy_layer(0, LOW))
    assert torch.allclose(walk.values()[0], torch.tensor([23 / 64, 11 / 64], dtype=torch.float64))
    assert float(walk._vectors["decoder"].sum()) == pytest.approx(1)


@pytest.mark.parametrize(("last_factor", "wanted"), [("identity", [1.5, 0.5]), ("bare", [1.0, 0.25])])
def test_tmm_of_three_tokens_by_hand(last_factor, wanted):
    """dA = 1, 1, −1 at the third token. Top: heads' means of 1·1, 0, 0 and 0, 1·½, 0 (the negative one is cut): ½, ¼.
    Vector: ½, ¼, 1. Lower layer, dA = 1, 1, −1: Ā rows (1, 0, 0), (½, ½, 0), (¼, ¼, 0): adds ½·1 + ¼·½ + ¼ = 7/8 to
    the first and ¼·½ + ¼ = 3/8 to the second."""
    walk = Walk(toy_problem(), "decoder", relu_product, last_factor=last_factor)
    walk.starts_at("layers.0")
    walk(toy_layer(1, *HIGH, gradient=[[1, 1, -1]] * 3))
    walk(toy_layer(0, LOW, gradient=[[1, 1, -1]] * 3))
    added = torch.tensor([7 / 8, 3 / 8], dtype=torch.float64)
    kept = torch.tensor([1 / 2, 1 / 4], dtype=torch.float64)
    assert torch.allclose(walk.values()[0], added + (kept if last_factor == "identity" else 0))


# ------------------------------------------------------------------------------------------------------ rollout


@pytest.mark.parametrize("scope", ["decoder", "encoder", "both"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen2_5_vl"])
def test_rollout_is_the_dense_product(name, scope):
    truth = inside.dense(inside.replay(name, attention="eager"))
    replay = inside.replay(name)
    maps = bars(truth.of(DECODER), replay.length, lambda call: call.weights)
    above = rolled(decoder_start(replay), maps)
    read = [call for call in truth.calls if not call.module.startswith(DECODER) and call.gradient is not None]
    values = above[0, image_columns(replay)]
    if scope != "decoder":
        start = encoder_of_image_tokens(name, replay, values)
        if scope == "encoder":
            start = (start > 0).double() / (start > 0).sum()
        tower = bars(read, start.shape[1], lambda call: call.weights)
        assert len(tower) == (1 if name == "llava" else 2)  # LLaVA does not read its encoder's last layer
        values = rolled(start, tower)[0]
        if name == "llava":
            values = values[1:]
    wanted = (values - values.min()) / (values.max() - values.min())
    found: list[Tensor] = []
    original = Walk.values

    def values_of(walk):
        found.append(original(walk)[0])
        return original(walk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Walk, "values", values_of)
        heat = explain(replay, "rollout", scope=scope)
    close(found[0], values)
    assert heat.values.max() == 1 and float(wanted.max()) == 1
    own = inside.own_passes(replay, "rollout", scope=scope)
    assert own == {"forward": 1, "backward": int(scope != "decoder")}  # the encoder's places are known by now


# ---------------------------------------------------------------------------------------------------------- IIA


def values_of(replay, **params: Any) -> Tensor:
    found: list[Tensor] = []
    original = Walk.values

    def keep(walk):
        found.append(original(walk)[0])
        return original(walk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Walk, "values", keep)
        explain(replay, "iia", **params)
    return found[0]


def between(replay, share: float) -> dict[str, Tensor]:
    """r·I + (1 − r)·Ĩ in the model's own pixel inputs."""
    first, last = replay.path.baseline_inputs, replay.path.inputs
    return {
        name: first[name] + share * (last[name] - first[name]) if name in replay.path.pixel_keys else last[name]
        for name in last
    }


@pytest.mark.parametrize("last_factor", ["identity", "bare"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_iia_as_the_paper_words_it(name, last_factor):
    """11 pictures r·I + (1 − r)·Ĩ, r = 0, 0.1 … 1; gradients averaged; then T-MM on the whole picture's attention."""
    eager, replay = inside.replay(name, attention="eager"), inside.replay(name)
    runs = [inside.dense(eager, inputs=between(eager, step / 10)).of(DECODER) for step in range(11)]
    averaged = [
        inside.Dense(calls[-1].module, 0, calls[-1].weights, torch.stack([call.gradient for call in calls]).mean(dim=0))
        for calls in zip(*runs, strict=True)
    ]
    wanted = row(decoder_start(replay), bars(averaged, replay.length), bare=last_factor == "bare")
    close(values_of(replay, last_factor=last_factor), wanted[0, image_columns(replay)])


@pytest.mark.parametrize("scope", ["decoder", "encoder"])
def test_iia_as_its_authors_run_it(scope):
    """From a black picture; along each point's inner path the last layer's attention grows from 0; ReLU(dA ⊙ A) is
    averaged over both paths; the layers are joined by rollout. The encoder's last layer is the last that is read."""
    eager, replay = inside.replay("llava", attention="eager"), inside.replay("llava")
    last = inside.dense(eager)
    part = [call.module for call in last.calls if call.module.startswith(DECODER) == (scope == "decoder")]
    scaled = part[-1] if scope == "decoder" else part[-2]
    points = [0.0, 0.5, 1.0]
    runs = []
    black = eager.over("blank")
    assert float(black.path.baseline_inputs["pixel_values"].std(dim=(2, 3)).max()) < 1e-6
    for outer in points:
        for inner in points:
            run = inside.dense(black, inputs=between(black, outer), scale={scaled: inner})
            runs.append([c for c in run.calls if c.module in part and c.gradient is not None])
    products = [
        inside.Dense(
            calls[0].module, 0, torch.stack([(c.weights * c.gradient).clamp(min=0) for c in calls]).mean(dim=0)
        )
        for calls in zip(*runs, strict=True)
    ]
    if scope == "decoder":
        start, columns = decoder_start(replay), image_columns(replay)
    else:
        start, columns = torch.cat([torch.zeros(1), torch.full((16,), 1 / 16)])[None].double(), torch.arange(1, 17)
    wanted = rolled(start, bars(products, start.shape[1], lambda call: call.weights))[0, columns]
    baseline = dict(replay.baseline)
    close(values_of(replay, variant="iia2", points=3, scope=scope), wanted)
    assert replay.baseline == baseline  # the black picture is gone again


def test_iia_refuses_points_that_do_not_stay_in_one_batch(monkeypatch):
    """Memory runs out with more than three pictures at once: the replay would go on in parts, the average would not."""
    replay = inside.replay("llava")
    run = type(replay)._run

    def small(self, pixel_inputs, batch, shortcut=None):
        if batch > 3:
            raise torch.OutOfMemoryError("no room")
        return run(self, pixel_inputs, batch, shortcut)

    monkeypatch.setattr(type(replay), "_run", small)
    with pytest.raises(OutOfMemory, match=r"5 points of the path do not fit.*points="):
        explain(replay, "iia", points=5)
    assert explain(replay, "iia", points=3).values is not None
    monkeypatch.setattr(type(replay), "_run", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    with pytest.raises(OutOfMemory, match="points="):
        explain(replay, "iia", points=5)


def test_iia_says_where_points_cannot_be_told_apart():
    with pytest.raises(ExplainError, match=r"joins all images of a batch.*'tmm'"):
        explain(inside.replay("qwen2_vl"), "iia", scope="encoder")


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("tmm", {"scope": "all"}, "scope is 'decoder', 'encoder' or 'both'"),
        ("tmm", {"last_factor": "none"}, "last_factor is 'identity' or 'bare'"),
        ("tmm", {"scope": "encoder", "encoder": 1}, "encoder=1, but there are 1"),
        ("tmm", {"size": 0}, "at least 1"),
        ("rollout", {"scope": "merger"}, "scope is"),
        ("iia", {"variant": "iia"}, "variant is 'paper' or 'iia2'"),
        ("iia", {"points": 1}, "points is at least 2"),
        ("iia", {"variant": "iia2", "last_factor": "bare"}, "belongs to variant='paper'"),
        ("tmm", {"depth": 3}, "takes no parameter 'depth'"),
        ("weighted_tmm", {"temperature": "high"}, "weighted_tmm: temperature is a number; got temperature='high'"),
        ("gradient_attention", {"filtered": "no"}, "gradient_attention: filtered is True or False"),
        ("iia", {"points": "10"}, "iia: points is a whole number or None; got points='10'"),
        ("gradcam", {"encoder": [0]}, r"gradcam: encoder is .*a whole number or a text.*; got encoder=\[0\]"),
        (
            "attention",
            {"layers": 1.5},
            "attention: layers is 'all' or .* or a list, each a whole number; got layers=1.5",
        ),
        ("attention", {"heads": True}, "attention: heads is .*; got heads=True"),
        ("relative_attention", {"general": 3}, "relative_attention: general is a text; got general=3"),
        ("relative_attention", {"reference": 3}, "reference is a Trace or a Replay or None; got reference=3"),
        ("tam", {"size": True}, r"size is a number of cells or \(rows, columns\), both at least 1; got True"),
        (
            "center",
            {"size": 10**9},
            r"size=1000000000 is 1000000000 x 1000000000 cells, more than the \d+ x \d+ pixels",
        ),
        ("igos++", {"gamma": "2"}, r"igos\+\+: gamma is a number; got gamma='2'"),
        ("igos++", {"budget": "30"}, r"igos\+\+: budget is a whole number or None; got budget='30'"),
        ("igos++", {"preset": ["fast"]}, r"igos\+\+: preset is a text"),
    ],
)
@pytest.mark.quick
def test_wrong_parameters_are_refused(method, params, message):
    replay = inside.replay("llava")
    with pytest.raises(ExplainError, match=message):
        explain(replay, method, **params)


def test_a_plan_refuses_more_cells_than_pixels():
    with pytest.raises(ExplainError, match=r"more than the .* pixels of the image"):
        probe.plan(inside.replay("llava"), "occlusion", size=(10**9, 3))


def test_numbers_of_an_array_library_are_numbers():
    replay = inside.replay("llava")
    for size in (np.int64(6), torch.tensor(6)):
        assert np.array_equal(explain(replay, "tmm", size=size).values, explain(replay, "tmm", size=6).values)


def test_an_error_that_no_parameter_made_is_not_told_as_one():
    def method(problem, *, size: int = 3):
        raise TypeError("a fault of the method's own")

    with pytest.raises(TypeError, match="own"), told_by_kind("mine", method, {"size": 4}):
        method(None, size=4)


def test_sizes_repeat_and_no_state_stays():
    replay = inside.replay("llava")
    first = explain(replay, "tmm", size=(8, 12))
    assert first.values.shape == (8, 12) and first.params["size"] == [8, 12]
    small = explain(replay, "tmm")
    assert np.allclose(first.values.reshape(4, 2, 6, 2).mean(axis=(1, 3))[:, 1:5], small.values[:, 1:5], atol=1e-5)
    assert np.array_equal(explain(replay, "tmm").values, small.values)
