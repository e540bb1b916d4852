"""Parameters of iGOS++, and named sets of them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.igos.order import Pace
from lvlm_probe.explainers.igos.regularizers import BilateralForm, L2Form
from lvlm_probe.kinds import is_whole


@dataclass(frozen=True)
class IgosSettings:
    """Parameters of iGOS++; all may be given to ``explain(..., method="igos++")`` by name.

    Attributes:
        masks: 1 for Eq. 8, 2 for Eq. 4.
        size: Mask size: ``n``, ``(rows, columns)``, or ``None`` for about 256 cells as square as the image allows.
        iterations: Gradient steps.
        ig_steps: n of the integrated gradient.
        path: Where along it, see ``igos``.
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
        refine_cells: Least and largest share of those cells along an edge on which every second step sees the order,
            drawn anew each time, so that it suits no one grid of cells; ``None``: always its own.
        levels: Shares q of the image whose level sets are scored.
        softness: T of the level sets.
        refine_lr: Length of the first step on H, relative to its range of 1.
        refine_levels: Levels per step, dealt out so that each comes up as often as any other; ``None``: all of them.
        refine_pace: The largest change of H is ``refine_lr`` at the ``"first"`` step, at ``"each"``, or at each with
            one size for the gradients of every ``"level"``, as in all rounds after the first.
        refine_decay: Steps on H shorten linearly.
        budget: Passes forward at most, as many rounds as the map needs (``rounds``); ``None`` is one round.
        enough: Insertion − deletion, by a quick estimate, after which no round as long as the first follows; a longer
            one follows a map that lacks much more, or is not clear of chance and of a blob in the middle (``rounds``).
    """

    masks: Literal[1, 2] = 1
    size: int | tuple[int, int] | None = None
    iterations: int = 5
    ig_steps: int = 10
    path: Literal["grid", "stratified"] = "grid"
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
    refine_cells: tuple[float, float] | None = None
    levels: tuple[float, ...] = (0.01, 0.02, 0.04, 0.08, 0.16, 0.3)
    softness: float = 0.05
    refine_lr: float = 0.3
    refine_levels: int | None = None
    refine_pace: Pace = "first"
    refine_decay: bool = False
    budget: int | None = None
    enough: float = 0.95

    def __post_init__(self) -> None:
        names = ("iterations", "ig_steps", "refine", "refine_scale", "refine_levels", "budget")
        counts = {name: getattr(self, name) for name in names}
        rules = (
            # None breaks below on what takes none.
            *((count is None or is_whole(count), f"{name} is a whole number") for name, count in counts.items()),
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
            (
                self.refine_cells is None
                or (len(self.refine_cells) == 2 and 0 < self.refine_cells[0] <= self.refine_cells[1] <= 1),
                "refine_cells are two shares above 0 and up to 1, the smaller first",
            ),
            (len(self.levels) > 0 and all(0 < q < 1 for q in self.levels), "levels are shares between 0 and 1"),
            (self.softness > 0, "softness is positive"),
            (self.refine_lr > 0, "refine_lr is positive"),
            (self.path in ("grid", "stratified"), "path is 'grid' or 'stratified'"),
            (
                self.refine_levels is None or 1 <= self.refine_levels <= len(self.levels),
                "refine_levels is 1 to the number of levels",
            ),
            (self.refine_pace in get_args(Pace), "refine_pace is 'first', 'each' or 'level'"),
            (math.isfinite(self.enough), "enough is a number"),
            (self.budget is None or self.budget >= 1, "budget is at least 1"),
        )
        for holds, rule in rules:
            if not holds:
                name = rule.split()[0].rstrip(",")
                raise ExplainError(f"igos++: {rule}; got {name}={getattr(self, name)!r}")

    def masks_at_once(self, ig_steps: int) -> int:
        """Masks of an iteration with so many per term, all of which go forward and backward."""
        return 2 * self.masks * ig_steps

    def levels_at_once(self, levels: int | None) -> int:
        """Masks of a step on the order with so many levels."""
        return 2 * (levels or len(self.levels))

    @property
    def gnc_weight(self) -> float:
        """λ2 as used."""
        return self.l2 if self.l2 is not None else (0.1 if self.masks == 1 else 0.0)


_FAST = IgosSettings(
    iterations=1,
    ig_steps=4,
    path="stratified",
    refine=4,
    refine_levels=2,
    refine_pace="each",
    refine_decay=True,
    refine_lr=0.4,
    refine_cells=(0.4, 1.0),
)
"""Chosen on some twenty tuning scenes among settings of about 25 passes (tests/benchmarks/tune_igos.py)."""

PRESETS: dict[str, IgosSettings] = {
    # The fast one first, and on from there while it helps, up to what the thorough one takes.
    "default": dataclasses.replace(_FAST, budget=196),
    "fast": _FAST,
    "thorough": IgosSettings(),
    # Eq. 8 alone, with a step that does not depend on the scale of the scores.
    "paper": IgosSettings(refine=0),
    # The arithmetic of the recipe published with the paper, for comparison with its numbers.
    "release": IgosSettings(
        size=32, lr=10.0, step="absolute", l2=0.1, l3=10.0, btv_form="igos_release", tie_break=0.0, refine=0
    ),
}
