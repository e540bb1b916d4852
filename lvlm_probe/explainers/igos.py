"""iGOS++: a mask over the picture, optimised so that removing what it marks costs the answer most.

One mask M, 1 = keep (paper, Eq. 8)::

    min_M  f(Φ(I, Ĩ, M)) − f(Φ(I, Ĩ, 1 − M)) + λ1 ‖1 − M‖ + λ2 e^(−γt) ‖1 − M‖₂ + λ3 BTV(M)

or two, deletion mask Mx and insertion mask My with M = Mx ⊙ My (paper, Eq. 4)::

    min  f(Φ(Mx)) − f(Φ(1 − My)) + f(Φ(M)) − f(Φ(1 − M)) + g(M)

f is the log-likelihood of the selected tokens (Eq. 7), Φ(I, Ĩ, M) = I ⊙ M + Ĩ ⊙ (1 − M) (Eq. 3). The mask starts at 1
(nothing removed); what it loses is important, and the heatmap is 1 − M.

**Integrated gradient.** Every f above is the mean of n scores along the path between mask 0 and the mask:
``(1/n) Σ_r f(Φ(I, Ĩ, r · M))`` for deletion and ``(1/n) Σ_r f(Φ(I, Ĩ, 1 − r · M))`` for insertion, r = 1/n … 1, each
with fresh Gaussian noise on the model's normalised pixels. The gradient is that mean's own (chain rule: weighted by r).
All 2n masks of an iteration (4n with two masks) go through the model in one call.

**Step.** Nesterov's accelerated gradient: with c_i = M_i − η·∇ and e = i / (i + momentum),
``M_{i+1} = clamp(c_i + e · (c_i − c_{i−1}), 0, 1)``. With ``step="scale_free"`` η = lr / max|∇_0|, so the first
iteration moves the strongest cell by exactly lr whatever the scale of the scores; ``step="absolute"`` is η = lr.
``line_search=True`` halves η until the objective (same noise) falls by Armijo's rule.

**Order.** The objective does not see in which order a heatmap covers the picture; ``refine`` iterations put the
cells into a better one, on a grid ``refine_scale`` times as fine (``ordering``).

**Tie-break.** Cells that end at the same value, above all those clamped at 0 or never moved, are ordered by the
gradient summed over the iterations: heat = (1 − ε)(1 − M) + ε·G with G that sum scaled to [0, 1] and ε = 0.001.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional

from lvlm_probe.errors import ExplainError, ImageError
from lvlm_probe.explainers.ordering import refine_order
from lvlm_probe.explainers.registry import Outcome, Problem, check_parameters, register
from lvlm_probe.explainers.regularization import BilateralForm, L2Form, bilateral_weights, btv, gnc, guide, l1

__all__ = ["PRESETS", "IgosSettings", "igos", "igos_plus", "nesterov", "path_masks"]

_ARMIJO = 1e-4
_LINE_SEARCH_TRIES = 10


@dataclass(frozen=True)
class IgosSettings:
    """Parameters of iGOS++; all may be given to ``explain(..., method="igos++")`` by name.

    Attributes:
        masks: 1 for Eq. 8, 2 for Eq. 4.
        size: Mask size: ``n``, ``(rows, columns)``, or ``None`` for about 256 cells as square as the picture allows.
        iterations: Gradient steps.
        ig_steps: n of the integrated gradient.
        noise: Standard deviation of the noise on normalised pixels.
        lr, step: Step length and what it is relative to.
        momentum: Of Nesterov's e = i / (i + momentum).
        l1, l2, l3: λ1, λ2 (``None``: 0.1 with one mask; 0 with two, as Eq. 4 has no such term) and λ3. The paper's λ3
            is 10, chosen on 32 × 32 masks; 100 is chosen on 16 × 16 ones, where it costs nothing in deletion and
            insertion and puts the maximum inside the object more often (``tests/benchmarks/tune_igos.py``).
        l2_form, gamma: Graduated non-convexity, see ``regularization.gnc``.
        btv_form, beta, sigma: Bilateral total variation, see ``regularization.btv``.
        line_search: Armijo's rule.
        init: Value the mask starts with.
        tie_break: ε above; 0 switches it off.
        refine: Iterations on the order; 0 leaves it as the mask has it.
        refine_scale: Cells of the refined heatmap per cell of the mask, along each edge.
        levels: Shares q of the picture whose level sets are scored.
        softness: T of the level sets.
        refine_lr: Length of the first step on H, relative to its range of 1.
    """

    masks: Literal[1, 2] = 1
    size: int | tuple[int, int] | None = None
    iterations: int = 5
    ig_steps: int = 10
    noise: float = 0.2
    lr: float = 0.3
    step: Literal["scale_free", "absolute"] = "scale_free"
    momentum: float = 5.0
    l1: float = 1.0
    l2: float | None = None
    l3: float = 100.0
    l2_form: L2Form = "sum_sq"
    gamma: float = 1.0
    btv_form: BilateralForm = "symmetric"
    beta: float = 2.0
    sigma: float = 0.01
    line_search: bool = False
    init: float = 1.0
    tie_break: float = 1e-3
    refine: int = 8
    refine_scale: int = 2
    levels: tuple[float, ...] = (0.01, 0.02, 0.04, 0.08, 0.16, 0.3)
    softness: float = 0.05
    refine_lr: float = 0.3

    def __post_init__(self) -> None:
        rules = (
            (self.masks in (1, 2), "masks is 1 (Eq. 8) or 2 (Eq. 4)"),
            (self.iterations >= 1, "iterations is at least 1"),
            (self.ig_steps >= 1, "ig_steps is at least 1"),
            (self.noise >= 0, "noise is not negative"),
            (self.lr > 0, "lr is positive"),
            (self.step in ("scale_free", "absolute"), "step is 'scale_free' or 'absolute'"),
            (self.momentum > 0, "momentum is positive"),
            (min(self.l1, self.l2 or 0.0, self.l3) >= 0, "l1, l2 and l3 are not negative"),
            (self.l2_form in ("sum_sq", "norm"), "l2_form is 'sum_sq' or 'norm'"),
            (self.btv_form in ("symmetric", "igos_release"), "btv_form is 'symmetric' or 'igos_release'"),
            (self.beta >= 1, "beta is at least 1"),
            (self.sigma > 0, "sigma is positive"),
            (0 < self.init <= 1, "init is in (0, 1]"),
            (0 <= self.tie_break <= 0.5, "tie_break is in [0, 0.5]"),
            (self.refine >= 0, "refine is not negative"),
            (self.refine_scale >= 1, "refine_scale is at least 1"),
            (len(self.levels) > 0 and all(0 < q < 1 for q in self.levels), "levels are shares between 0 and 1"),
            (self.softness > 0, "softness is positive"),
            (self.refine_lr > 0, "refine_lr is positive"),
        )
        for holds, rule in rules:
            if not holds:
                name = rule.split()[0].rstrip(",")
                raise ExplainError(f"igos++: {rule}; got {name}={getattr(self, name)!r}")

    @property
    def gnc_weight(self) -> float:
        """λ2 as used."""
        return self.l2 if self.l2 is not None else (0.1 if self.masks == 1 else 0.0)


PRESETS: dict[str, IgosSettings] = {
    "default": IgosSettings(),
    # The arithmetic of the recipe published with the paper, for comparison with its numbers.
    "release": IgosSettings(
        size=32, lr=10.0, step="absolute", l2=0.1, l3=10.0, btv_form="igos_release", tie_break=0.0, refine=0
    ),
}


@register("igos++", needs=("passes", "gradients"))
def igos(problem: Problem, *, preset: str = "default", **settings: Any) -> Outcome:
    """Explains by iGOS++; the module's docstring has the method, ``IgosSettings`` the parameters.

    ``preset="release"`` is the recipe published with the paper; ``settings`` replace single values of the preset.

    Raises:
        ExplainError: An unknown parameter or one out of range, or scores or gradients that are not finite.
    """
    if preset not in PRESETS:
        raise ExplainError(f"igos++ has no preset {preset!r}; there are {', '.join(map(repr, PRESETS))}")
    check_parameters("igos++", [item.name for item in dataclasses.fields(IgosSettings)] + ["preset"], settings)
    return _Optimisation(problem, dataclasses.replace(PRESETS[preset], **settings), preset).run()


@register("igos+", needs=("passes", "gradients"))
def igos_plus(problem: Problem, *, preset: str = "default", **settings: Any) -> Outcome:
    """iGOS+ (Khorram et al., 2021): one mask for deletion and insertion, without graduated non-convexity.

    Eq. 8 with λ2 = 0, unless ``l2`` is given: what the paper adds its term to; and the mask's own order, unless
    ``refine`` is given. All else is as for ``igos++``, whose parameters it takes but ``masks``.

    Raises:
        ExplainError: ``masks`` is given, and as for ``igos++``.
    """
    if "masks" in settings:
        raise ExplainError(f"igos+ has one mask; for masks={settings['masks']!r} use method='igos++'")
    return igos(problem, preset=preset, **{"l2": 0.0, "refine": 0, **settings, "masks": 1})


def path_masks(state: torch.Tensor, ig_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The masks whose scores the objective averages.

    Args:
        state: The masks being optimised, ``(1, row, col)`` for Eq. 8 or ``(2, row, col)`` (Mx, My) for Eq. 4.
        ig_steps: n, masks per term.

    Returns:
        Masks ``(2n or 4n, row, col)``, differentiable in ``state``, and the sign of each in the objective, +1 for
        deletion (r · M) and −1 for insertion (1 − r · M).
    """
    scales = torch.arange(1, ig_steps + 1, device=state.device, dtype=state.dtype).div(ig_steps)[:, None, None]
    both = state.prod(dim=0)
    deletion = [both] if len(state) == 1 else [state[0], both]
    insertion = [both] if len(state) == 1 else [state[1], both]
    masks = torch.cat([scales * mask for mask in deletion] + [1 - scales * mask for mask in insertion])
    signs = torch.ones(len(masks), device=state.device, dtype=state.dtype)
    signs[len(deletion) * ig_steps :] = -1
    return masks, signs


def nesterov(
    state: torch.Tensor, gradient: torch.Tensor, previous: torch.Tensor, *, rate: float, iteration: int, momentum: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of Nesterov's accelerated gradient.

    ``previous`` is the unclamped point c of the step before (at iteration 0 it has no weight). Returns the new state,
    clamped to [0, 1], and this step's own unclamped point.
    """
    point = state - rate * gradient
    weight = iteration / (iteration + momentum)
    return (point + weight * (point - previous)).clamp(0, 1), point


class _Optimisation:
    def __init__(self, problem: Problem, settings: IgosSettings, preset: str) -> None:
        self.problem, self.settings, self.preset = problem, settings, preset
        self.shape = problem.grid(settings.size)
        self.device = problem.replay.device
        self.seen = problem.seen(self.shape).to(self.device)
        self.weights: tuple[torch.Tensor, torch.Tensor] | None = None
        if settings.l3 > 0:
            try:
                picture = guide(problem.replay.image(problem.image))
            except (ImageError, IndexError):
                picture = None  # masks in pixel-input space: no picture to guide the bilateral term
            if picture is not None:
                down, right = bilateral_weights(picture, sigma=settings.sigma, form=settings.btv_form)
                self.weights = (down.to(self.device), right.to(self.device))

    def run(self) -> Outcome:
        settings = self.settings
        params = {"preset": self.preset, **dataclasses.asdict(settings), "size": list(self.shape)}
        params |= {"l2": settings.gnc_weight, "guided": self.weights is not None}
        if not self.seen.any():
            return Outcome(None, params, reason="the model sees no part of this picture")
        state = torch.full((settings.masks, *self.shape), settings.init, device=self.device)
        previous = state
        summed = torch.zeros_like(state)
        rate = settings.lr
        history: list[dict[str, float]] = []
        total = settings.iterations + settings.refine
        self.problem.advance(0, total)
        for iteration in range(settings.iterations):
            record, from_scores, from_mask = self.gradient(state, iteration)
            gradient = from_scores + from_mask
            if iteration == 0 and settings.step == "scale_free":
                largest = float(gradient[:, self.seen].abs().max())
                if largest == 0:
                    return Outcome(
                        None, params, tuple(history), "the score of these tokens does not change with the picture"
                    )
                rate = settings.lr / largest
            summed += from_scores
            state, previous, used = self.move(state, gradient, previous, rate, iteration, record["objective"])
            history.append({**record, "rate": used})
            self.problem.advance(iteration + 1, total)
        heat = self.heat(state, summed)
        if settings.refine:
            fine = (self.shape[0] * settings.refine_scale, self.shape[1] * settings.refine_scale)
            seen = self.problem.seen(fine)
            heat = functional.interpolate(heat[None, None], size=fine, mode="bilinear", align_corners=False)[0, 0]
            heat, records = refine_order(
                self.problem,
                heat.masked_fill(~seen, 0.0),
                seen,
                iterations=settings.refine,
                levels=settings.levels,
                softness=settings.softness,
                rate=settings.refine_lr,
                momentum=settings.momentum,
                progress=lambda done: self.problem.advance(settings.iterations + done, total),
            )
            history += records
        return Outcome(heat, params, tuple(history))

    def gradient(self, state: torch.Tensor, iteration: int) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
        """Terms of the objective, and its gradient to the masks from the scores and from the regularisers."""
        leaf = state.detach().requires_grad_(True)
        with torch.enable_grad():
            masks, signs = path_masks(leaf, self.settings.ig_steps)
            scores, slopes = self.problem.replay.score_and_grad(
                masks.detach(),
                self.problem.score,
                image=self.problem.image,
                noise=self.settings.noise,
                generator=self.problem.generator(iteration),
            )
            scores, slopes = scores.to(signs), slopes.to(masks)
            if not (scores.isfinite().all() and slopes.isfinite().all()):
                raise ExplainError(
                    f"igos++ met scores or gradients that are not finite in iteration {iteration} on "
                    f"{self.problem.replay.trace_id}: load the model in float32 (or bfloat16 instead of float16), or "
                    f"lower noise (now {self.settings.noise:g})"
                )
            # d/dM of the mean over r is a vector-Jacobian product: the model's gradient per mask through r · M.
            (from_scores,) = torch.autograd.grad(
                (signs[:, None, None] * slopes * masks).sum() / self.settings.ig_steps, leaf
            )
            terms = self.terms(leaf, iteration)
            penalty = torch.stack(list(terms.values())).sum()
            (from_mask,) = torch.autograd.grad(penalty, leaf)
        removed = 1 - state.prod(dim=0)
        record = {
            "iteration": float(iteration),
            "deletion": float(scores[signs > 0].sum() / self.settings.ig_steps),
            "insertion": float(scores[signs < 0].sum() / self.settings.ig_steps),
            **{name: float(value.detach()) for name, value in terms.items()},
            "removed": float(removed.mean()),
            "clamped": float((removed >= 1).float().mean()),
        }
        record["objective"] = record["deletion"] - record["insertion"] + float(penalty.detach())
        return record, from_scores, from_mask

    def terms(self, state: torch.Tensor, iteration: int) -> dict[str, torch.Tensor]:
        """The regularisers with their weights, on the final mask (Mx ⊙ My with two)."""
        mask, settings = state.prod(dim=0), self.settings
        return {
            "l1": settings.l1 * l1(mask),
            "l2": settings.gnc_weight * gnc(mask, iteration=iteration, gamma=settings.gamma, form=settings.l2_form),
            "btv": settings.l3 * btv(mask, self.weights, beta=settings.beta),
        }

    def objective(self, state: torch.Tensor, iteration: int) -> float:
        """Eq. 8 or Eq. 4 at a state, under the very noise that ``gradient`` met in this iteration."""
        with torch.no_grad():
            masks, signs = path_masks(state, self.settings.ig_steps)
            log_probs = self.problem.replay.log_probs(
                masks,
                image=self.problem.image,
                noise=self.settings.noise,
                generator=self.problem.generator(iteration),
            )
            scores = (signs * self.problem.score(log_probs).to(signs)).sum() / self.settings.ig_steps
            return float(scores + torch.stack(list(self.terms(state, iteration).values())).sum())

    def move(
        self,
        state: torch.Tensor,
        gradient: torch.Tensor,
        previous: torch.Tensor,
        rate: float,
        iteration: int,
        objective: float,
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """The next state, the next unclamped point, and the rate that was used (0: no descent found, state kept)."""
        momentum = self.settings.momentum
        state_after, point = nesterov(state, gradient, previous, rate=rate, iteration=iteration, momentum=momentum)
        if not self.settings.line_search:
            return state_after, point, rate
        for attempt in range(_LINE_SEARCH_TRIES):
            expected = float((gradient * (state - state_after)).sum())
            if self.objective(state_after, iteration) <= objective - _ARMIJO * max(expected, 0.0):
                return state_after, point, rate
            # Momentum may be what points uphill: it is dropped at the first failure, then the rate is halved.
            if attempt > 0 or iteration == 0:
                rate /= 2
            state_after, point = nesterov(state, gradient, state, rate=rate, iteration=0, momentum=momentum)
        return state, state, 0.0

    def heat(self, state: torch.Tensor, summed: torch.Tensor) -> torch.Tensor:
        """1 − M with ties broken by the summed gradient, 0 where the model sees nothing."""
        removed = 1 - state.prod(dim=0)
        epsilon = self.settings.tie_break
        if epsilon > 0:
            pull = summed.sum(dim=0)
            low, high = pull[self.seen].min(), pull[self.seen].max()
            order = (pull - low) / (high - low) if high > low else torch.zeros_like(pull)
            removed = (1 - epsilon) * removed + epsilon * order
        return removed.masked_fill(~self.seen, 0.0).clamp(0, 1).detach().cpu()
