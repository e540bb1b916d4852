"""Gradients that do not arrive are told apart from pictures that do not matter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn

import lvlm_probe as probe
from lvlm_probe.replaying.gradient_flow import gradient_check


class Kernel(nn.Module):
    """A linear layer that computes without autograd, as inference kernels do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Forward(torch.autograd.Function):
    """An operation without a derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x @ weight.T


class Opaque(Kernel):
    """A linear layer whose backward raises."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Forward.apply(x, self.weight)


def replaced(model: Any, kind: type[nn.Module], wanted: str) -> None:
    for path, module in list(model.named_modules()):
        if wanted in path and isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, kind(module))


def tower_without(model: Any) -> None:
    tower = model.model.vision_tower
    tower.forward = torch.no_grad()(tower.forward)


def inside_a_function(model: Any) -> None:
    """No module shows it: a part of a layer's own sum is cut off."""
    layer = model.model.language_model.layers[0]
    forward = layer.mlp.forward
    layer.mlp.forward = lambda x: 0.25 * forward(x) + 0.75 * forward(x.detach())


def straight_through(model: Any) -> None:
    """Its own backward is that of another function."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return 2 * gradient

    projector = model.model.multi_modal_projector
    forward = projector.forward
    projector.forward = lambda x: Twice.apply(forward(x))


LAYERS = "model.language_model.layers"
Q_PROJ, MLP, DOWN = f"{LAYERS}.0.self_attn", f"{LAYERS}.1.mlp", f"{LAYERS}.1.mlp.down_proj"
CUTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "all layers": (lambda model: replaced(model, Kernel, LAYERS), rf"stop at {Q_PROJ} \(first at {Q_PROJ}.q_proj\)"),
    "a linear layer": (lambda model: replaced(model, Kernel, DOWN), rf"stop at {MLP} \(first at {DOWN}\)"),
    "the projector": (lambda model: replaced(model, Kernel, "projector.linear_2"), "stop at model.multi_modal_project"),
    "the tower": (tower_without, r"stop at model.vision_tower \(first at model.vision_tower.*patch_embedding\)"),
    "no derivative": (lambda model: replaced(model, Opaque, DOWN), rf"stop at {LAYERS}.*down_proj"),
    "inside a function": (inside_a_function, "are not those of its output"),
    "another backward": (straight_through, "are not those of its output"),
}


def asked(name: str, model: Any, processor: Any) -> Any:
    return tiny_models.inputs(name, model, processor, [tiny_models.picture()], "What is in the picture")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model, processor = tiny_models.build("llava")
    with probe.attach(model, processor) as p, p.record(tmp_path_factory.mktemp("flow")) as recording:
        model.generate(**asked("llava", model, processor), min_new_tokens=4, max_new_tokens=4, do_sample=False)
    return recording.traces[0]


@pytest.fixture
def model() -> Any:
    return tiny_models.build_model("llava")


@pytest.mark.parametrize("where", CUTS)
def test_a_cut_is_said_with_its_place_and_the_way_out(trace: Any, model: Any, where: str) -> None:
    cut, place = CUTS[where]
    cut(model)
    replay = probe.replay(trace, model, tiny_models.build_processor("llava"), strict=False)
    for method in ("input_gradient", "igos++", "gradcam"):
        with pytest.raises(probe.errors.ExplainError, match=f"{place}.*occlusion, rise"):
            probe.explain(replay, method=method, tokens=(0, 4), strengthen=False)
    passes = replay.passes.forward
    with pytest.raises(probe.errors.ExplainError, match=place):
        replay.over("mean").score_and_grad(torch.full((1, 3, 3), 0.5), lambda log_probs: log_probs.sum(dim=1))
    assert replay.passes.forward == passes  # looked for once
    assert probe.explain(replay, method="occlusion", size=3, tokens=(0, 4), strengthen=False)


@pytest.mark.parametrize("kind", [Kernel, Opaque])
@pytest.mark.parametrize("tower", [False, True])
def test_methods_that_are_named_work(model: Any, tmp_path: Any, kind: type[nn.Module], tower: bool) -> None:
    """Whole models of inference kernels: recorded without a fault, and told what is left. Attention can be drawn where
    gradients of the image encoder have said which part of the image each token stands for."""
    replaced(model, kind, "" if tower else LAYERS)
    processor = tiny_models.build_processor("llava")
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        model.generate(**asked("llava", model, processor), min_new_tokens=4, max_new_tokens=4, do_sample=False)
    (trace,) = recording.traces
    assert trace.status == "complete" and trace.llr is not None and trace.attention is not None
    assert tower == any("no gradient reaches the image tokens" in note for note in trace.notes)
    replay = probe.replay(trace, model, processor)
    told = "occlusion, rise, greedy" if tower else "occlusion, rise, greedy, attention, rollout, tam"
    for method in ("igos++", "tmm", "integrated_gradients"):
        with pytest.raises(probe.errors.ExplainError, match=f"computes without autograd.*needs no gradients: {told}$"):
            probe.explain(replay, method=method, tokens=(0, 4), strengthen=False)
        assert probe.plan(replay, method=method).sentence().endswith(told)
    for method, params in {"occlusion": {"size": 3}, "rise": {"masks": 8}, "attention": {}, "tam": {}}.items():
        if tower and method in ("attention", "tam"):
            with pytest.raises(
                probe.errors.ExplainError, match=r"no gradient reaches .* 'rise', 'occlusion' or 'greedy'"
            ):
                probe.explain(replay, method=method, tokens=(0, 4), strengthen=False, **params)
        else:
            probe.explain(replay, method=method, tokens=(0, 4), strengthen=False, **params)
    heat = probe.explain(replay, method="random", tokens=(0, 4), strengthen=False)
    assert probe.evaluate(heat, replay, steps=3).original
    if not tower:
        assert probe.causal.knockout(replay, heat, draws=1).effects


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3", "mllama"])
def test_whole_gradients_are_taken_as_such(name: str, tmp_path: Any) -> None:
    model, processor = tiny_models.build(name)
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        model.generate(**asked(name, model, processor), min_new_tokens=4, max_new_tokens=4, do_sample=False)
    replay = probe.replay(recording.traces[0], model, processor)
    replay.require_gradients()
    assert (replay.passes.forward, replay.passes.backward) == (3, 1)
    replay.over("mean").require_gradients()
    assert (replay.passes.forward, replay.passes.backward) == (3, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounding_is_no_cut(trace: Any, model: Any, dtype: torch.dtype) -> None:
    replay = probe.replay(trace, model.to(dtype), tiny_models.build_processor("llava"), strict=False)
    replay.require_gradients()
    replaced(model, Kernel, f"{LAYERS}.0.mlp.down_proj")
    cut = probe.replay(trace, model, tiny_models.build_processor("llava"), strict=False)
    with pytest.raises(probe.errors.ExplainError, match=f"{LAYERS}.0.mlp"):
        cut.require_gradients()


def test_a_picture_that_does_not_matter_is_no_cut(trace: Any, model: Any) -> None:
    for weight in model.model.multi_modal_projector.parameters():
        weight.data.zero_()
    replay = probe.replay(trace, model, tiny_models.build_processor("llava"), strict=False)
    replay.require_gradients()
    heat = probe.explain(replay, method="input_gradient", tokens=(0, 4), strengthen=False)
    assert heat.values is None and "plays no part" in heat.reason


def test_what_carries_no_gradient_and_does_not_matter_is_no_cut(trace: Any, model: Any) -> None:
    """A module that looks at the picture, without a gradient, for nothing that the answer depends on."""
    projector = model.model.multi_modal_projector
    projector.watcher = Kernel(nn.Linear(projector.linear_2.out_features, 2))
    forward = projector.forward

    def watched(features: torch.Tensor) -> torch.Tensor:
        made = forward(features)
        projector.watcher(made)
        return made

    projector.forward = watched
    probe.replay(trace, model, tiny_models.build_processor("llava"), strict=False).require_gradients()


class Bent:
    """A score that is half as steep from ``bend`` on, on both sides of where it is differentiated; it says that it is
    ``said`` times as steep there as it is."""

    n_images, device = 1, torch.device("cpu")
    trace = SimpleNamespace(layout=None, attention=None)

    def __init__(self, slope: float, bend: float, said: float = 1.0) -> None:
        self.slope, self.bend, self.said = slope, bend, said

    def score_and_grad(self, masks: torch.Tensor, _score: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.base = masks
        slopes = torch.zeros_like(masks)
        slopes[0] = self.said * self.slope
        return torch.zeros(len(masks)), slopes

    def log_probs(self, masks: torch.Tensor) -> torch.Tensor:
        away = (masks - self.base)[0].double().sum()
        bent = away.clamp(-self.bend, self.bend)
        return (self.slope * (bent + 0.5 * (away - bent)) - 2.0).reshape(1, 1).expand(len(masks), 1)


@pytest.mark.parametrize(("said", "fault"), [(1.0, False), (3.0, True)])
def test_a_bend_that_rounding_hides_is_no_fault(said: float, fault: bool) -> None:
    """A flat score of a photograph: finite differences of two steps agreed with one another and not with the gradient,
    and before one small enough for the bend was reached, rounding was a tenth of it."""
    replica = SimpleNamespace(use=lambda: contextlib.nullcontext(nn.Linear(1, 1)))
    found = gradient_check(Bent(0.00105, 0.0132, said), replica, "decoder")  # type: ignore[arg-type]
    assert 0.1 * abs(found.difference) < found.noise < abs(found.difference)
    assert bool(found.fault) == fault
