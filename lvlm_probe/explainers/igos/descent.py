"""iGOS++: a mask over the image, optimised so that removing what it marks costs the answer most.

One mask M, 1 = keep (paper, Eq. 8)::

    min_M  f(Φ(I, Ĩ, M)) − f(Φ(I, Ĩ, 1 − M)) + λ1 ‖1 − M‖ + λ2 e^(−γt) ‖1 − M‖₂ + λ3 BTV(M)

or two, deletion mask Mx and insertion mask My with M = Mx ⊙ My (paper, Eq. 4)::

    min  f(Φ(Mx)) − f(Φ(1 − My)) + f(Φ(M)) − f(Φ(1 − M)) + g(M)

f is the log-likelihood of the selected tokens (Eq. 7), Φ(I, Ĩ, M) = I ⊙ M + Ĩ ⊙ (1 − M) (Eq. 3). The mask starts at 1
(nothing removed); what it loses is important, and the heatmap is 1 − M.

**Integrated gradient.** Every f above is the mean of n scores along the path between mask 0 and the mask:
``(1/n) Σ_r f(Φ(I, Ĩ, r · M))`` for deletion and ``(1/n) Σ_r f(Φ(I, Ĩ, 1 − r · M))`` for insertion, r = 1/n … 1, each
with fresh Gaussian noise on the model's normalised pixels. The gradient is that mean's own (chain rule: weighted by r).
All 2n masks of an iteration (4n with two masks) go through the model in one call. With ``path="stratified"`` r is
drawn from each n-th part of the path instead, r = (k − u) / n with u uniform, anew for every term and iteration: an
unbiased estimate of the mean over the whole path, from as few masks as one likes.

**Step.** Nesterov's accelerated gradient: with c_i = M_i − η·∇ and e = i / (i + momentum),
``M_{i+1} = clamp(c_i + e · (c_i − c_{i−1}), 0, 1)``. With ``step="scale_free"`` η = lr / max|∇_0|, so the first
iteration moves the strongest cell by exactly lr whatever the scale of the scores; ``step="absolute"`` is η = lr.
``line_search=True`` halves η until the objective (same noise) falls by Armijo's rule.

**Order.** The objective does not see in which order a heatmap covers the image; ``refine`` iterations put the
cells into a better one, on a grid ``refine_scale`` times as fine (``ordering``).

**Passes.** ``preset="default"`` begins with 24 forward and backward passes, one iteration over eight masks, then four
steps on the order with two levels each, looks at the score of the map it has, and goes on while that is poor and passes
help, to 196 at most (``rounds``; ``budget`` sets another limit). ``"fast"`` is the first 24 alone; ``"thorough"`` takes
196, ``"paper"`` (Eq. 8 alone) 100; ``docs/pareto.md`` says what more passes buy.

**Clips.** The mask has an axis of time in front, (t, row, col); BTV then adds the variation between steps in time,
weighed by how much the frames look alike there. The number of passes does not depend on the number of frames.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from lvlm_probe.errors import ExplainError, ImageError
from lvlm_probe.explainers.curve_points import QUICK_PASSES
from lvlm_probe.explainers.igos.order import draw_grids, draw_levels, refine_order
from lvlm_probe.explainers.igos.regularizers import CLIP_GUIDE_SIZE, bilateral_weights, btv, gnc, guide, l1
from lvlm_probe.explainers.igos.rounds import Judge, Round, budget_of, rounds
from lvlm_probe.explainers.igos.settings import PRESETS, IgosSettings
from lvlm_probe.explainers.registry import Cost, Outcome, Problem, Shape, check_parameters, register
from lvlm_probe.kinds import told_by_kind

_ARMIJO = 1e-4
_LINE_SEARCH_TRIES = 10
_NATS_OF_A_WORD = 5.0
"""Log-likelihood ratio of a word that the image decides: of the demo models' words most have 3 to 9."""


def _cost(problem: Problem, params: Mapping[str, Any]) -> Cost:
    settings = _chosen(**params)
    planned = rounds(settings)
    shape = problem.shape(settings.size)
    grids = [shape]
    groups = {settings.masks_at_once(one.ig_steps) for one in planned if one.iterations}
    if settings.refine:
        grids.insert(0, _finer(shape, settings.refine_scale))
        groups |= {settings.levels_at_once(one.levels) for one in planned if one.steps}
    least, most = planned[0].passes(settings), sum(one.passes(settings) for one in planned)
    looked = budget_of(settings, planned)  # with looks at the score, where there may be several rounds
    return Cost(
        "gradient",
        None if settings.line_search else looked or most,  # it tries steps until one is good
        most,
        at_least=(least + QUICK_PASSES, least) if looked and not settings.line_search else None,
        groups=tuple(sorted(groups, reverse=True)),
        noise=settings.noise,
        numbers=3 * max(settings.masks_at_once(one.ig_steps) for one in planned) * math.prod(shape),
        grids=tuple(grids),
        drawn=grids[0] if settings.refine and settings.refine_cells else None,
    )


def _plus_cost(problem: Problem, params: Mapping[str, Any]) -> Cost:
    return _cost(problem, _one_mask(**params))


@register("igos++", needs=("passes", "gradients"), cost=_cost, clips=True)
def igos(problem: Problem, *, preset: str = "default", **settings: Any) -> Outcome:
    """Explains by iGOS++; the module's docstring has the method, ``IgosSettings`` the parameters.

    Args:
        preset: ``"default"``, which takes as many passes as the map needs; ``"fast"``, ``"thorough"``, ``"paper"``
            (Eq. 8 alone), or ``"release"``, the recipe that came with the paper.
        settings: values of ``IgosSettings`` in place of the preset's.

    Raises:
        ExplainError: An unknown parameter or one out of range, or scores or gradients that are not finite.
    """
    chosen = _chosen(preset, **settings)
    with told_by_kind("igos++", IgosSettings, settings):
        return Optimisation(problem, chosen, preset).run()


def _chosen(preset: str = "default", **settings: Any) -> IgosSettings:
    """A preset with other settings. Raises ``ExplainError`` as ``igos``."""
    if preset not in PRESETS:
        raise ExplainError(f"igos++ has no preset {preset!r}; there are {', '.join(map(repr, PRESETS))}")
    settings.pop("guided", None)  # what a heatmap says beside its settings, so that its params can be given again
    check_parameters("igos++", [item.name for item in dataclasses.fields(IgosSettings)] + ["preset"], settings)
    with told_by_kind("igos++", IgosSettings, settings):
        chosen = dataclasses.replace(PRESETS[preset], **settings)
        own = rounds(chosen)[0].passes(chosen)
        if settings.get("budget") is not None and settings["budget"] < own:
            raise ExplainError(
                f"igos++: a budget of {settings['budget']} passes is less than the {own} of the first round; "
                f"a smaller one has fewer ig_steps (now {chosen.ig_steps}) or refine steps (now {chosen.refine})"
            )
    return chosen


@register("igos+", needs=("passes", "gradients"), cost=_plus_cost, clips=True)
def igos_plus(problem: Problem, *, preset: str = "paper", **settings: Any) -> Outcome:
    """iGOS+ (Khorram et al., 2021): one mask for deletion and insertion, without graduated non-convexity.

    Eq. 8 with λ2 = 0, unless ``l2`` is given: what the paper adds its term to; and the mask's own order, unless
    ``refine`` is given. All else is as for ``igos++``, whose parameters it takes but ``masks``.

    Args:
        preset: as for ``igos++``; here the paper's by default.
        settings: as for ``igos++``.

    Raises:
        ExplainError: ``masks`` is given, and as for ``igos++``.
    """
    return igos(problem, **_one_mask(preset, **settings))


def _one_mask(preset: str, **settings: Any) -> dict[str, Any]:
    """Parameters of ``igos`` for those of ``igos_plus``. Raises ``ExplainError`` as it."""
    if settings.get("masks", 1) != 1:
        raise ExplainError(f"igos+ has one mask; for masks={settings['masks']!r} use method='igos++'")
    return {"preset": preset, "l2": 0.0, "refine": 0, **settings, "masks": 1}


def path_masks(
    state: torch.Tensor, ig_steps: int, offsets: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The masks whose scores the objective averages.

    Args:
        state: The masks being optimised, ``(1, row, col)`` for Eq. 8 or ``(2, row, col)`` (Mx, My) for Eq. 4; of a clip
            with an axis of time in front of the rows.
        ig_steps: n, masks per term.
        offsets: u of every mask, ``(term, n)`` in [0, 1), for r = (k − u) / n; the two or four terms are Mx, M, My, M.
            By default 0.

    Returns:
        Masks ``(2n or 4n, row, col)``, differentiable in ``state``, and the sign of each in the objective, +1 for
        deletion (r · M) and −1 for insertion (1 − r · M).
    """
    both = state.prod(dim=0)
    deletion = [both] if len(state) == 1 else [state[0], both]
    insertion = [both] if len(state) == 1 else [state[1], both]
    steps = torch.arange(1, ig_steps + 1, device=state.device, dtype=state.dtype).expand(2 * len(deletion), -1)
    scales = (steps if offsets is None else steps - offsets.to(steps)).div(ig_steps)
    scales = scales.reshape(*scales.shape, *[1] * both.ndim)
    given = [scale * mask for scale, mask in zip(scales, [*deletion, *insertion], strict=True)]
    masks = torch.cat([*given[: len(deletion)], *(1 - mask for mask in given[len(deletion) :])])
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


def _finer(shape: Shape, scale: int) -> Shape:
    """A grid ``scale`` times as fine in space, and as fine in time."""
    return (*shape[:-2], shape[-2] * scale, shape[-1] * scale)


class Optimisation:
    def __init__(self, problem: Problem, settings: IgosSettings, preset: str) -> None:
        self.problem, self.settings, self.preset = problem, settings, preset
        self.shape = problem.shape(settings.size)
        self.device = problem.replay.device
        self.seen = problem.seen(self.shape).to(self.device)
        self.fine = _finer(self.shape, settings.refine_scale) if settings.refine else self.shape  # the heatmap's grid
        self.fine_seen = problem.seen(self.fine)
        self.weights: tuple[torch.Tensor, ...] | None = None
        if settings.l3 > 0:
            try:
                guide = self.guide()
            except (ImageError, IndexError):
                guide = None  # masks in pixel-input space: no image to guide the bilateral term
            if guide is not None:
                weights = bilateral_weights(guide, sigma=settings.sigma, form=settings.btv_form)
                self.weights = tuple(weight.to(self.device) for weight in weights)
        self.state = torch.full((settings.masks, *self.shape), settings.init, dtype=torch.float32, device=self.device)
        self.previous, self.summed, self.rate = self.state, torch.zeros_like(self.state), settings.lr
        self.iteration = self.done = self.total = 0
        self.ig_steps = settings.ig_steps
        self.history: list[dict[str, float]] = []

    def scored(self, log_probs: torch.Tensor) -> torch.Tensor:
        """The score in nats, which the regularisers are weighed against, ``(batch,)``. One of the user's own has no
        unit: what the image makes of it is taken for that of a word."""
        score, own = self.problem.score(log_probs), self.problem.selection.score
        if own is None or own.followed != "own":
            return score
        replay = self.problem.replay
        span = abs(float(replay.original_log_probs[-1] - replay.baseline_log_probs[-1]))
        return score * (_NATS_OF_A_WORD / span) if span > 0 else score

    def guide(self) -> torch.Tensor:
        """What the bilateral term looks at: the image, or the middle frame of each step in time of the clip."""
        problem = self.problem
        if problem.clip is None:
            return guide(problem.replay.image(problem.image))
        middles = [problem.clip.first + part[len(part) // 2] for part in problem.clip.parts(self.shape[0])]
        return torch.stack([guide(problem.replay.image(k), size=CLIP_GUIDE_SIZE) for k in middles])

    def run(self) -> Outcome:
        settings, planned = self.settings, rounds(self.settings)
        params = {"preset": self.preset, **dataclasses.asdict(settings), "size": list(self.shape)}
        params |= {"l2": settings.gnc_weight, "guided": self.weights is not None, "budget": None}
        if not self.seen.any():
            return Outcome(None, params, reason="the model sees no part of this image")
        judge = Judge(self.problem, settings)
        for number, one in enumerate(planned):
            self.total += one.iterations + one.steps
            self.advance(self.done)
            reason = self.descend(one)
            if reason is not None:
                return Outcome(None, params, tuple(self.history), reason)
            heat = self.ordered(judge.best, one, number)
            if len(planned) == 1:
                return Outcome(heat, params, tuple(self.history))
            judge.take(heat, self.fine_seen, planned[number : number + 2])
            if judge.stopped is not None:
                break
        params["budget"] = budget_of(settings, planned[: len(judge.gains)])
        return Outcome(judge.best, params, tuple(self.history), diagnostics=judge.told())

    def descend(self, one: Round) -> str | None:
        """Go on with the mask; why that cannot be done, as a sentence, or ``None``."""
        self.ig_steps = one.ig_steps
        for _ in range(one.iterations):
            record, from_scores, from_mask = self.gradient(self.state, self.iteration)
            gradient = from_scores + from_mask
            if self.iteration == 0 and self.settings.step == "scale_free":
                largest = float(gradient[:, self.seen].abs().max())
                if largest == 0:
                    return (
                        "no gradient of these tokens' score reaches the image, though the score changes with it: use "
                        "a method that works by masking alone, such as occlusion or rise"
                    )
                self.rate = self.settings.lr / largest
            self.summed += from_scores
            self.state, self.previous, used = self.move(
                self.state, gradient, self.previous, self.rate, self.iteration, record["objective"]
            )
            self.history.append({**record, "rate": used})
            self.iteration += 1
            self.advance(self.done + 1)
        return None

    def ordered(self, best: torch.Tensor | None, one: Round, number: int) -> torch.Tensor:
        """The map of a round, on the grid of its order: that of the mask, and of the best map so far, refined."""
        settings = self.settings
        heat = self.heat(self.state, self.summed)
        if not settings.refine:
            return heat
        alone = heat.reshape(-1, 1, *self.shape[-2:])  # steps in time, each by itself
        heat = functional.interpolate(alone, size=self.fine[-2:], mode="bilinear", align_corners=False)
        heat = heat.reshape(self.fine)
        if best is not None:
            heat = (heat + best) / 2 if one.iterations else best
        done = self.done
        heat, records = refine_order(
            self.problem,
            heat.masked_fill(~self.fine_seen, 0.0),
            self.fine_seen,
            plan=self.plan(one, number),
            grids=self.grids(one, number),
            softness=settings.softness,
            rate=settings.refine_lr,
            momentum=settings.momentum,
            progress=lambda steps: self.advance(done + steps),
            pace=settings.refine_pace if number == 0 else "level",
            decay=settings.refine_decay,
        )
        self.history += records
        return heat

    def advance(self, done: int) -> None:
        """Tell that so many iterations and steps are done."""
        self.done = done
        self.problem.advance(done, self.total)

    def gradient(self, state: torch.Tensor, iteration: int) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
        """Terms of the objective, and its gradient to the masks from the scores and from the regularisers."""
        leaf = state.detach().requires_grad_(True)
        with torch.enable_grad():
            masks, signs = path_masks(leaf, self.ig_steps, self.offsets(iteration))
            scores, slopes = self.problem.replay.score_and_grad(
                masks.detach(),
                self.scored,
                image=self.problem.target,
                noise=self.settings.noise,
                generator=self.problem.generator(iteration),
                steps=self.problem.columns,
            )
            scores, slopes = scores.to(signs), slopes.to(masks)
            # d/dM of the mean over r is a vector-Jacobian product: the model's gradient per mask through r · M.
            along = signs.reshape(-1, *[1] * len(self.shape))
            (from_scores,) = torch.autograd.grad((along * slopes * masks).sum() / self.ig_steps, leaf)
            terms = self.terms(leaf, iteration)
            penalty = torch.stack(list(terms.values())).sum()
            (from_mask,) = torch.autograd.grad(penalty, leaf)
        removed = 1 - state.prod(dim=0)
        numbers = {
            **{name: value.detach() for name, value in terms.items()},
            "removed": removed.mean(),
            "clamped": (removed >= 1).float().mean(),
            "penalty": penalty.detach(),
            "finite": (scores.isfinite().all() & slopes.isfinite().all()).to(scores),
        }
        # All at once: each number that is read out waits for the device.
        host = torch.cat([torch.stack([value.to(scores) for value in numbers.values()]), scores, signs]).cpu()
        known = dict(zip(numbers, host.tolist(), strict=False))
        of_masks, signs = host[len(numbers) :].reshape(2, -1)
        if not known.pop("finite"):
            raise ExplainError(
                f"igos++ met scores or gradients that are not finite in iteration {iteration} on "
                f"{self.problem.replay.trace_id}: load the model in float32 (or bfloat16 instead of float16), or "
                f"lower noise (now {self.settings.noise:g})"
            )
        record = {
            "iteration": float(iteration),
            "deletion": float(of_masks[signs > 0].sum() / self.ig_steps),
            "insertion": float(of_masks[signs < 0].sum() / self.ig_steps),
            **known,
        }
        record["objective"] = record["deletion"] - record["insertion"] + record.pop("penalty")
        return record, from_scores, from_mask

    def plan(self, one: Round, number: int) -> list[tuple[float, ...]]:
        """Levels of every step on the order in a round."""
        levels = self.settings.levels
        if one.levels is None:
            return [tuple(levels)] * one.steps
        generator = self.problem.generator(2_000 + number)
        return draw_levels(levels, steps=one.steps, per_step=one.levels, generator=generator)

    def grids(self, one: Round, number: int) -> list[Shape] | None:
        """Cells of every step on the order in a round; ``None``: always its own."""
        shares = self.settings.refine_cells
        if shares is None:
            return None
        return draw_grids(self.fine, steps=one.steps, shares=shares, generator=self.problem.generator(3_000 + number))

    def offsets(self, iteration: int) -> torch.Tensor | None:
        """u of every mask of an iteration, the same whenever they are asked for."""
        if self.settings.path == "grid":
            return None
        generator = self.problem.generator(1_000 + iteration)
        return torch.rand(2 * self.settings.masks, self.ig_steps, generator=generator, dtype=torch.float32)

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
            masks, signs = path_masks(state, self.ig_steps, self.offsets(iteration))
            log_probs = self.problem.replay.log_probs(
                masks,
                image=self.problem.target,
                noise=self.settings.noise,
                generator=self.problem.generator(iteration),
                steps=self.problem.columns,
            )
            scores = (signs * self.scored(log_probs).to(signs)).sum() / self.ig_steps
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
