"""Integrated gradients and gradient × input: against captum and autograd on the model's own pixels, and by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from captum.attr import IntegratedGradients
from toy_replay import ToyReplay, box_weights

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers import Problem, explain
from lvlm_probe.explainers.integrated_gradients import mean_slope, nodes
from lvlm_probe.explainers.scores import scaled
from lvlm_probe.selection import select_tokens

SIDE = 56  # the tiny towers' own size: the processor leaves pixels where they are


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> probe.Replay:
    model, processor = tiny_models.build("llava")
    picture = tiny_models.picture(SIDE, SIDE, seed=3)
    with probe.attach(model, processor) as p, p.record(tmp_path_factory.mktemp("llava")) as recording:
        model.generate(**tiny_models.inputs("llava", model, processor, [picture], "What is this?"), max_new_tokens=4)
    return probe.replay(recording.traces[0], model, processor)


def plain_score(replay: probe.Replay, steps: list[int]):
    """Log-likelihood of answer tokens as a function of the model's pixel input: its own forward, nothing of ours."""
    prompt = torch.tensor(replay.trace.input_ids)
    ids = torch.cat([prompt, replay.token_ids])[None]

    def score(pixels: torch.Tensor) -> torch.Tensor:
        many = ids.expand(len(pixels), -1)
        logits = replay.model(input_ids=many, pixel_values=pixels, attention_mask=torch.ones_like(many)).logits
        log_probs = logits.float().log_softmax(-1)
        return sum(log_probs[:, len(prompt) - 1 + step, replay.token_ids[step]] for step in steps)

    return score


def problem_of(replay: object, **more: object) -> Problem:
    return Problem(replay, select_tokens(replay, span=(0, len(replay.tokens))), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rule", "captum_rule"), [("gauss_legendre", "gausslegendre"), ("midpoint", "riemann_middle")])
def test_equals_captum_on_the_pixels_of_a_model(llava: probe.Replay, rule: str, captum_rule: str) -> None:
    problem = problem_of(llava)
    steps = list(problem.selection.indices)
    x, baseline = llava.path.inputs["pixel_values"], llava.path.baseline_inputs["pixel_values"]
    theirs = IntegratedGradients(plain_score(llava, steps)).attribute(x, baseline, n_steps=7, method=captum_rule)
    theirs = theirs.sum(dim=1)[0].double()
    ours = mean_slope(problem, (SIDE, SIDE), *nodes(7, rule), batch=3, method="test")
    scale = float(theirs.abs().max())
    assert scale > 1e-3
    assert float((ours - theirs).abs().max()) < 1e-5 * scale
    # On a coarser grid a cell counts pixels as masks are brought to pixels: the transpose of bilinear interpolation.
    grid = torch.zeros(1, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    fine = torch.nn.functional.interpolate(grid, (SIDE, SIDE), mode="bilinear", align_corners=False)
    (expected,) = torch.autograd.grad((fine[0, 0] * theirs).sum(), grid)
    coarse = mean_slope(problem, (4, 5), *nodes(7, rule), batch=16, method="test")
    assert float((coarse - expected[0, 0]).abs().max()) < 1e-5 * float(expected.abs().max())
    heat = explain(
        llava,
        method="integrated_gradients",
        tokens=problem.selection,
        strengthen=False,
        size=(4, 5),
        steps=7,
        rule=rule,
    )
    assert np.allclose(heat.values, coarse.clamp(min=0) / coarse.max(), atol=1.1e-3)
    assert np.array_equal(np.argsort(heat.values.ravel()), np.argsort(coarse.numpy().ravel()))


def test_completeness_on_a_model(llava: probe.Replay) -> None:
    errors = {}
    for steps in (1, 40):
        heat = explain(llava, method="integrated_gradients", tokens=(0, 4), strengthen=False, steps=steps)
        found = heat.provenance["diagnostics"]
        change = float((llava.original_log_probs - llava.baseline_log_probs)[:4].sum())
        assert found["change"] == pytest.approx(change, abs=1e-4)
        errors[steps] = found["completeness_error"]
        assert errors[steps] == pytest.approx(abs(found["attributed"] - change) / abs(change), rel=1e-3, abs=1e-4)
        assert heat.provenance["passes"] == {"forward": steps + 2, "backward": steps}
    assert errors[40] < 0.005 < errors[1]


def test_input_gradient_equals_autograd_on_the_pixels_of_a_model(llava: probe.Replay) -> None:
    problem = problem_of(llava)
    x, baseline = llava.path.inputs["pixel_values"], llava.path.baseline_inputs["pixel_values"]
    leaf = x.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(plain_score(llava, list(problem.selection.indices))(leaf).sum(), leaf)
    expected = ((x - baseline) * slope).sum(dim=1)[0]
    options = {"method": "input_gradient", "tokens": problem.selection, "strengthen": False, "size": (SIDE, SIDE)}
    heat = explain(llava, **options)
    unit = heat.provenance["diagnostics"]["unit"]
    assert unit == pytest.approx(float(expected.abs().max()), rel=1e-5)
    assert np.allclose(heat.values, expected.abs() / unit, atol=1e-5)
    assert explain(llava, **options).provenance["passes"] == {"forward": 1, "backward": 1}
    positive = explain(llava, sign="positive", **options)
    assert np.allclose(positive.values, expected.clamp(min=0) / expected.max(), atol=1.1e-3)


def test_by_hand_on_a_replay_in_closed_form() -> None:
    # f = log(b + (o − b) Σ w m): IG of a cell is w · (log o − log b), its slope at the whole picture w (o − b) / o.
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(5, 6, generator=generator, dtype=torch.float64)
    weights /= weights.sum()
    replay = ToyReplay(weights, original=[0.9], base=[0.1])
    found = mean_slope(problem_of(replay), (5, 6), *nodes(12, "gauss_legendre"), batch=5, method="test")
    assert torch.allclose(found, weights * math.log(9), atol=1e-6)
    theirs = IntegratedGradients(lambda masks: replay.log_probs(masks)[:, 0]).attribute(
        torch.ones(1, 5, 6), torch.zeros(1, 5, 6), n_steps=12, method="gausslegendre"
    )
    assert torch.allclose(found, theirs[0].double(), atol=1e-6)
    heat = explain(replay, method="integrated_gradients", size=(5, 6), steps=12, rule="gauss_legendre")
    assert heat.provenance["diagnostics"]["completeness_error"] < 1e-5
    assert heat.provenance["diagnostics"]["unit"] == pytest.approx(float(weights.max()) * math.log(9), rel=1e-5)
    assert np.allclose(heat.values, weights / weights.max(), atol=1e-3)
    gradient = explain(replay, method="input_gradient", size=(5, 6))
    assert gradient.provenance["diagnostics"]["unit"] == pytest.approx(float(weights.max()) * 0.8 / 0.9, rel=1e-5)


def test_rules_integrate_polynomials() -> None:
    points, weights = nodes(4, "gauss_legendre")
    for power in range(8):  # exact up to degree 2n − 1
        assert sum(w * a**power for a, w in zip(points, weights, strict=True)) == pytest.approx(1 / (power + 1))
    points, weights = nodes(4, "midpoint")
    assert points == [0.125, 0.375, 0.625, 0.875]
    assert weights == [0.25] * 4


def test_scaling_by_hand() -> None:
    raw = torch.tensor([[4.0, 1.0], [-1.0, 9.0]])
    seen = torch.tensor([[True, True], [True, False]])
    assert scaled(raw, seen, tie_break=0.0).tolist() == [[1.0, 0.25], [0.0, 0.0]]
    # order over the seen cells: (a + 1) / 5
    expected = [[1.0, 0.9 * 0.25 + 0.1 * 0.4], [0.0, 0.0]]
    assert torch.allclose(scaled(raw, seen, tie_break=0.1), torch.tensor(expected))
    assert scaled(raw, seen, sign="absolute").tolist() == [[1.0, 0.25], [0.25, 0.0]]
    assert scaled(-raw.abs(), seen) is None
    assert scaled(raw, torch.zeros_like(seen)) is None


@pytest.mark.quick
def test_progress_interrupt_and_refusals() -> None:
    replay = ToyReplay(box_weights(8, slice(0, 2), slice(0, 3)))
    told: list[tuple[int, int]] = []
    explain(replay, method="integrated_gradients", steps=5, batch=2, progress=lambda a, b: told.append((a, b)))
    assert told == [(0, 5), (2, 5), (4, 5), (5, 5)]

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        explain(replay, method="integrated_gradients", progress=interrupt)
    for wrong, message in (
        ({"steps": 0}, "steps is a whole number of at least 1"),
        ({"rule": "simpson"}, "rule is 'gauss_legendre' or 'midpoint'"),
        ({"sign": "both"}, "sign is 'positive' or 'absolute'"),
        ({"batch": 0}, "batch is"),
        ({"size": 0}, "size is a number of cells"),
    ):
        with pytest.raises(ExplainError, match=message):
            explain(replay, method="integrated_gradients", **wrong)
    with pytest.raises(ExplainError, match="sign is"):
        explain(replay, method="input_gradient", sign=None)


def test_nothing_to_show_is_a_reason() -> None:
    flat = ToyReplay(torch.zeros(4, 4))  # no cell has a part in what the picture does
    for method in ("integrated_gradients", "input_gradient"):
        heat = explain(flat, method=method, tokens=(0, 1))
        assert heat.values is None
        assert "gradient is zero in every cell of the whole image" in str(heat.reason)
        blind = ToyReplay(box_weights(4, slice(0, 2), slice(0, 2)), seen=torch.zeros(64, 64, dtype=torch.bool))
        assert "sees no part" in str(explain(blind, method=method).reason)


def test_not_a_number_is_refused() -> None:
    class Broken(ToyReplay):
        def score_and_grad(self, mask, score, **options):  # type: ignore[no-untyped-def]
            scores, gradient = super().score_and_grad(mask, score, **options)
            return scores, gradient * float("nan")

    with pytest.raises(ExplainError, match="integrated_gradients met scores or gradients that are not finite on toy"):
        explain(Broken(box_weights(4, slice(0, 2), slice(0, 2))), method="integrated_gradients")


def test_marks_the_object_that_decides_a_word(demo: tuple[object, object], tmp_path: Path) -> None:
    model, processor = demo
    (scene,) = probe.demo.scenes(1, split="tune", kinds=["colour"])
    with probe.attach(model, processor) as p, p.record(tmp_path, images=[scene.image]) as recording:
        inputs = processor.apply_chat_template(
            scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        model.generate(**inputs, max_new_tokens=16)
    replay = probe.replay(recording.traces[0], model, processor)
    heat = probe.explain(replay, method="integrated_gradients")
    assert probe.evaluate(heat, replay).gain > 0.6
    assert heat.provenance["diagnostics"]["completeness_error"] < 0.05
