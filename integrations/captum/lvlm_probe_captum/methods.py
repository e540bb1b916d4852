"""captum's attributions of a mask as explainers: ``probe.explain(replay, method="captum:occlusion")``.

Attributions are those of captum, unchanged: the mask that keeps all against the mask that keeps nothing. They are then
scaled as every method's are (the highest is 1, what speaks against the words is cut); ``unit`` in the diagnostics is
what 1 stands for.

What captum draws at random comes from the global random numbers of torch and NumPy. They are seeded by the
explanation's seed while it runs and are put back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
import torch
from captum import attr
from captum._utils.models.model import Model

from lvlm_probe.explainers import Outcome, Problem, register
from lvlm_probe.explainers.registry import Cost, batches
from lvlm_probe.explainers.scores import NO_SIGHT, ScoreKind, Sign, check_rules, scaled, sign_rule, whole_rule
from lvlm_probe_captum.forwarding import Forward

__all__ = [
    "feature_ablation",
    "gradient_shap",
    "input_x_gradient",
    "integrated_gradients",
    "kernel_shap",
    "occlusion",
    "shapley_value_sampling",
]

Rule = Literal["gausslegendre", "riemann_middle", "riemann_left", "riemann_right", "riemann_trapezoid"]
Size = int | tuple[int, int] | None
Attribute = Callable[[Forward, torch.Tensor], torch.Tensor]
"""A forward function and the mask that keeps all, ``(1, row, col)``, to attributions of the same shape."""

_CELLS = 64
"""Cells of methods whose passes are counted by cells."""


def _cost(kind: Literal["forward", "gradient"], cells: int, masks: Callable[[Mapping[str, Any], int, int], int]) -> Any:
    """The rule of a method's cost: ``masks`` of its parameters, rows and columns."""

    def rule(problem: Problem, params: Mapping[str, Any]) -> Cost:
        shape = problem.grid(params["size"], cells=cells)
        number, batch = masks(params, *shape), params.get("batch", 1)
        numbers = 2 * min(batch, number) * math.prod(shape)
        backward = number if kind == "gradient" else 0
        return Cost(kind, number, backward, batches(number, batch), numbers=numbers, grids=(shape,))

    return rule


def _attributed(
    problem: Problem,
    attribute: Attribute,
    params: dict[str, Any],
    cost: Any,
    *,
    shape: tuple[int, int],
    sign: Sign = "positive",
    score: ScoreKind = "log",
) -> Outcome:
    """The heatmap of an attribution, with parameters as used."""
    total = cost(problem, params).forward
    params |= {"size": list(shape)}
    seen = problem.seen(shape)
    if not seen.any():
        return Outcome(None, params, reason=NO_SIGHT)
    problem.advance(0, total)
    with _seeded(problem.seed):
        found = attribute(Forward(problem, score, total=total), torch.ones(1, *shape))[0].detach()
    heat = scaled(found, seen, sign=sign)
    unit = float((found.abs() if sign == "absolute" else found)[seen].max())
    diagnostics = {"unit": unit, "attributed": float(found.double().sum())}
    if heat is None:
        return Outcome(None, params, reason="no cell of the image speaks for these tokens", diagnostics=diagnostics)
    return Outcome(heat, params, diagnostics=diagnostics)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global random numbers of the CPU, which captum draws from, begin at ``seed`` inside."""
    kept = np.random.get_state()  # noqa: NPY002 (what captum draws from)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(kept)  # noqa: NPY002


_INTEGRATED = _cost("gradient", 256, lambda params, rows, cols: params["steps"])


@register("captum:integrated_gradients", needs=("passes", "gradients"), cost=_INTEGRATED)
def integrated_gradients(
    problem: Problem,
    *,
    size: Size = None,
    steps: int = 50,
    rule: Rule = "gausslegendre",
    sign: Sign = "positive",
    batch: int = 16,
) -> Outcome:
    """Integrated gradients by captum (Sundararajan et al., 2017), on the mask.

    Args:
        problem: the answer's tokens and the image.
        size: cells, ``n`` or ``(rows, columns)``; ``None`` for about 256 as square as the image allows.
        steps: points on the path; a forward and a backward pass each.
        rule: captum's ``method`` of integration.
        sign: ``"positive"`` shows what speaks for the words, ``"absolute"`` also what speaks against them.
        batch: masks at once.
    """
    check_rules(
        "captum:integrated_gradients",
        steps=whole_rule(steps),
        rule=(rule, rule in get_args(Rule), f"one of {', '.join(get_args(Rule))}"),
        sign=sign_rule(sign),
        batch=whole_rule(batch),
    )
    shape, params = problem.grid(size), {"size": size, "steps": steps, "rule": rule, "sign": sign, "batch": batch}

    def attribute(f: Forward, whole: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = attr.IntegratedGradients(f).attribute(
            whole, n_steps=steps, method=rule, internal_batch_size=batch
        )
        return found

    return _attributed(problem, attribute, params, _INTEGRATED, shape=shape, sign=sign)


_EXPECTED = _cost("gradient", 256, lambda params, rows, cols: params["samples"])


@register("captum:gradient_shap", needs=("passes", "gradients"), cost=_EXPECTED)
def gradient_shap(problem: Problem, *, size: Size = None, samples: int = 50, sign: Sign = "positive") -> Outcome:
    """Expected gradients by captum (Lundberg and Lee, 2017; Erion et al., 2021), at random points of the path.

    Args:
        problem: the answer's tokens and the image.
        size: cells, ``n`` or ``(rows, columns)``; ``None`` for about 256 as square as the image allows.
        samples: random points on the path; a forward and a backward pass each.
        sign: ``"positive"`` shows what speaks for the words, ``"absolute"`` also what speaks against them.
    """
    check_rules("captum:gradient_shap", samples=whole_rule(samples), sign=sign_rule(sign))
    shape, params = problem.grid(size), {"size": size, "samples": samples, "sign": sign}

    def attribute(f: Forward, whole: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = attr.GradientShap(f).attribute(
            whole, baselines=torch.zeros_like(whole), n_samples=samples
        )
        return found

    return _attributed(problem, attribute, params, _EXPECTED, shape=shape, sign=sign)


_GRADIENT = _cost("gradient", 256, lambda params, rows, cols: 1)


@register("captum:input_x_gradient", needs=("passes", "gradients"), cost=_GRADIENT)
def input_x_gradient(problem: Problem, *, size: Size = None, sign: Sign = "absolute") -> Outcome:
    """Gradient × input by captum (Shrikumar et al., 2016); on a mask of ones that is its saliency as well.

    Args:
        problem: the answer's tokens and the image.
        size: cells, ``n`` or ``(rows, columns)``; ``None`` for about 256 as square as the image allows.
        sign: ``"absolute"`` shows what speaks for and against the words, ``"positive"`` what speaks for them.
    """
    check_rules("captum:input_x_gradient", sign=sign_rule(sign))

    def attribute(f: Forward, whole: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = attr.InputXGradient(f).attribute(whole.requires_grad_())
        return found

    return _attributed(problem, attribute, {"size": size, "sign": sign}, _GRADIENT, shape=problem.grid(size), sign=sign)


def _windows(params: Mapping[str, Any], rows: int, cols: int) -> int:
    places = (1 + math.ceil(max(0, edge - params["patch"]) / params["stride"]) for edge in (rows, cols))
    return 1 + math.prod(places)


_OCCLUSION = _cost("forward", 256, _windows)


@register("captum:occlusion", cost=_OCCLUSION)
def occlusion(
    problem: Problem, *, size: Size = None, patch: int = 3, stride: int = 1, score: ScoreKind = "log", batch: int = 64
) -> Outcome:
    """Occlusion by captum (Zeiler and Fergus, 2014): windows that stay inside the image.

    Args:
        problem: the answer's tokens and the image.
        size: cells, ``n`` or ``(rows, columns)``; ``None`` for about 256 as square as the image allows.
        patch: edge of a window, cells.
        stride: step between windows, cells; at most ``patch``.
        score: ``"log"`` likelihood of the tokens, or the ``"prob"`` or ``"geometric"`` mean of their probabilities.
        batch: masks at once.
    """
    shape = problem.grid(size)
    fits = isinstance(patch, int) and 1 <= patch <= min(shape)
    check_rules(
        "captum:occlusion",
        patch=(patch, fits, f"a whole number from 1 to {min(shape)}, the cells along the shorter side"),
        stride=(stride, isinstance(stride, int) and 1 <= stride <= patch, f"between 1 and patch={patch}"),
        batch=whole_rule(batch),
    )
    params = {"size": size, "patch": patch, "stride": stride, "score": score, "batch": batch}

    def attribute(f: Forward, whole: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = attr.Occlusion(f).attribute(
            whole, sliding_window_shapes=(patch, patch), strides=(stride, stride), perturbations_per_eval=batch
        )
        return found

    return _attributed(problem, attribute, params, _OCCLUSION, shape=shape, score=score)


_ABLATION = _cost("forward", 256, lambda params, rows, cols: 1 + rows * cols)


@register("captum:feature_ablation", cost=_ABLATION)
def feature_ablation(problem: Problem, *, size: Size = None, score: ScoreKind = "log", batch: int = 64) -> Outcome:
    """Feature ablation by captum: what the words lose with each cell.

    Args:
        problem: the answer's tokens and the image.
        size: cells, ``n`` or ``(rows, columns)``; ``None`` for about 256 as square as the image allows.
        score: ``"log"`` likelihood of the tokens, or the ``"prob"`` or ``"geometric"`` mean of their probabilities.
        batch: masks at once.
    """
    check_rules("captum:feature_ablation", batch=whole_rule(batch))

    def attribute(f: Forward, whole: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = attr.FeatureAblation(f).attribute(whole, perturbations_per_eval=batch)
        return found

    params = {"size": size, "score": score, "batch": batch}
    return _attributed(problem, attribute, params, _ABLATION, shape=problem.grid(size), score=score)


_SHAPLEY = _cost("forward", _CELLS, lambda params, rows, cols: 1 + params["orders"] * rows * cols)


@register("captum:shapley_value_sampling", cost=_SHAPLEY)
def shapley_value_sampling(
    problem: Problem, *, size: Size = None, orders: int = 25, score: ScoreKind = "log", batch: int = 64
) -> Outcome:
    """Shapley values of cells by captum (Castro et al., 2009), the mean over random orders in which they are shown.

    Args:
        problem: the answer's tokens and the image.
        size: cells, ``n`` or ``(rows, columns)``; ``None`` for about 64 as square as the image allows.
        orders: random orders; a pass for each cell of each.
        score: ``"log"`` likelihood of the tokens, or the ``"prob"`` or ``"geometric"`` mean of their probabilities.
        batch: masks at once.
    """
    check_rules("captum:shapley_value_sampling", orders=whole_rule(orders), batch=whole_rule(batch))

    def attribute(f: Forward, whole: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = attr.ShapleyValueSampling(f).attribute(
            whole, n_samples=orders, perturbations_per_eval=batch
        )
        return found

    params = {"size": size, "orders": orders, "score": score, "batch": batch}
    return _attributed(problem, attribute, params, _SHAPLEY, shape=problem.grid(size, cells=_CELLS), score=score)


class _LeastSquares(Model):  # type: ignore[misc]
    """The weighted linear regression of KernelSHAP, which captum itself leaves to scikit-learn."""

    def fit(self, train_data: Any, **kwargs: object) -> None:
        ((shown, scores, weight),) = (tuple(part.double() for part in data) for data in train_data)
        root = weight.sqrt()[:, None]
        shown = torch.cat([shown, torch.ones_like(root)], dim=1)
        solved = torch.linalg.lstsq(shown * root, scores[:, None] * root, driver="gelsd").solution[:, 0]
        self.weights, self.bias = solved[:-1], solved[-1]

    def representation(self) -> torch.Tensor:
        return self.weights

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.double() @ self.weights + self.bias


_KERNEL = _cost("forward", _CELLS, lambda params, rows, cols: params["samples"])


@register("captum:kernel_shap", cost=_KERNEL)
def kernel_shap(
    problem: Problem, *, size: Size = None, samples: int = 1000, score: ScoreKind = "log", batch: int = 64
) -> Outcome:
    """KernelSHAP of cells by captum (Lundberg and Lee, 2017): a linear model of the score by which cells are shown.

    Args:
        problem: the answer's tokens and the image.
        size: cells, ``n`` or ``(rows, columns)``; ``None`` for about 64 as square as the image allows.
        samples: random sets of cells, a pass each; more than there are cells, by at least two.
        score: ``"log"`` likelihood of the tokens, or the ``"prob"`` or ``"geometric"`` mean of their probabilities.
        batch: masks at once.
    """
    shape = problem.grid(size, cells=_CELLS)
    cells = math.prod(shape)
    check_rules(
        "captum:kernel_shap",
        size=(size, cells >= 2, "at least 2 cells: one has nothing to be compared with"),
        samples=(samples, isinstance(samples, int) and samples >= cells + 2, f"at least {cells + 2} for {cells} cells"),
        batch=whole_rule(batch),
    )

    def attribute(f: Forward, whole: torch.Tensor) -> torch.Tensor:
        theirs = attr.KernelShap(f)
        theirs.interpretable_model = _LeastSquares()
        found: torch.Tensor = theirs.attribute(whole, n_samples=samples, perturbations_per_eval=batch)
        return found

    params = {"size": size, "samples": samples, "score": score, "batch": batch}
    return _attributed(problem, attribute, params, _KERNEL, shape=shape, score=score)
