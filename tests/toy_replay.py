"""An analytic stand-in for a replay: log-probabilities in closed form, so optima, gradients and areas are known.

P(a_t | M) = p_base + (p_orig − p_base) · Σ_cells w_t · m, m the mask averaged to the toy's own grid and Σ w_t = 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from lvlm_probe.replaying import PassCounter
from lvlm_probe.words import group_words


class ToyReplay:
    """``ReplayLike`` without a model."""

    def __init__(
        self,
        weights: torch.Tensor,
        *,
        original: Sequence[float] = (0.9,),
        base: Sequence[float] = (0.01,),
        tokens: Sequence[str] | None = None,
        special: Sequence[bool] | None = None,
        size: tuple[int, int] = (64, 64),
        seen: torch.Tensor | None = None,
        gain: float = 1.0,
    ) -> None:
        weights = torch.as_tensor(weights, dtype=torch.float64)
        self.weights = weights[None] if weights.ndim == 2 else weights  # (step, row, col)
        steps = len(self.weights)
        self.probability = torch.tensor(list(original), dtype=torch.float64)
        self.base_probability = torch.tensor(list(base), dtype=torch.float64)
        self.gain = gain
        self.tokens = list(tokens) if tokens is not None else [f" word{index}" for index in range(steps)]
        assert len(self.tokens) == steps == len(self.probability) == len(self.base_probability)
        self.special = torch.tensor(list(special) if special is not None else [False] * steps)
        self.token_ids = torch.arange(steps)
        self.shortcuts = SimpleNamespace(asked=0, caching=nullcontext)  # it takes none
        self.words = group_words(self.tokens, self.special.tolist())
        self.trace_id = "toy"
        self.image_sizes = [size]
        self.n_images = 1
        self.device = torch.device("cpu")
        self.baseline: dict[str, Any] = {"kind": "blur", "strength": 0.1}
        self.passes = PassCounter()
        self.rounding = torch.zeros(steps)
        self.path: Any = SimpleNamespace(
            images=[self.image()], baseline_images=[], report=SimpleNamespace(mean_error=0.0, deterministic=True)
        )
        self.trace: Any = SimpleNamespace(
            trace_id="toy", images=[self.image()], path=None, log_probs=self.probability.log().mul(gain).float().numpy()
        )
        self._seen = seen

    def image(self, k: int = 0) -> Image.Image:
        picture = Image.new("RGB", self.image_sizes[k], (90, 120, 150))
        picture.paste((220, 40, 40), (8, 8, 40, 40))
        return picture

    def seen(self, k: int = 0, shape: tuple[int, int] | None = None) -> torch.Tensor:
        width, height = self.image_sizes[k]
        shape = shape or (height, width)
        if self._seen is None:
            return torch.ones(shape, dtype=torch.bool)
        return torch.nn.functional.adaptive_max_pool2d(self._seen[None].float(), shape)[0] > 0

    masks_at_once, recomputes = 64, False
    offers = frozenset({"passes", "gradients"})
    origin: Mapping[str, Any] = {"device": "cpu"}
    limits = SimpleNamespace(recovered=[])

    def counted(self) -> ToyReplay:
        other = copy.copy(self)
        other.passes = PassCounter(within=self.passes)
        return other

    def over(self, baseline: Any = "blur", *, strength: float | None = None, seed: int | None = None) -> ToyReplay:
        assert baseline["kind"] == self.baseline["kind"]
        return self

    def strengthened(self, steps: Sequence[int], *, below: float = 0.05) -> ToyReplay:
        mean = float(self.baseline_log_probs[list(steps)].exp().mean())
        other = copy.copy(self)
        other.baseline = {**self.baseline, "mean_probability": mean, "verified": mean < below}
        return other

    def announce(self, what: str, images: Callable[[], int | None], steps: Sequence[int] | None) -> None:
        """They cost nothing."""

    def require_gradients(self) -> None:
        """They are whole."""

    @property
    def original_log_probs(self) -> torch.Tensor:
        return (self.gain * self.probability.log()).float()

    @property
    def baseline_log_probs(self) -> torch.Tensor:
        return (self.gain * self.base_probability.log()).float()

    @property
    def llr(self) -> torch.Tensor:
        return self.original_log_probs - self.baseline_log_probs

    def log_probs(
        self,
        mask: torch.Tensor | None = None,
        *,
        image: int | None = None,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
        mode: str = "fast",
        micro_batch: int | None = None,
        steps: Sequence[int] | None = None,
    ) -> torch.Tensor:
        if mask is None:
            mask = torch.ones(1, *self.weights.shape[1:])
        assert mask.ndim == 3
        assert float(mask.detach().min()) >= 0
        assert float(mask.detach().max()) <= 1
        self.passes.add(forward=len(mask))
        cells = torch.nn.functional.adaptive_avg_pool2d(mask.double(), self.weights.shape[1:])
        share = torch.einsum("brc,trc->bt", cells, self.weights)
        if noise:
            jitter = torch.randn(len(mask), 1, generator=generator, dtype=torch.float64)
            share = share + 0.01 * noise * jitter * (share - share.detach() + 1)
        probability = self.base_probability + (self.probability - self.base_probability) * share
        log_probs = (self.gain * probability.clamp(min=1e-12).log()).float()
        if steps is None:
            return log_probs
        wanted = torch.zeros(len(self.weights), dtype=torch.bool)
        wanted[list(steps)] = True
        return log_probs.where(wanted, torch.nan)  # as a replay does: who reads what was not asked for will see

    def score_and_grad(
        self,
        mask: torch.Tensor,
        score: Callable[[torch.Tensor], torch.Tensor],
        *,
        image: int | None = None,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
        micro_batch: int | None = None,
        steps: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = mask.detach().requires_grad_(True)
        with torch.enable_grad():
            scores = score(self.log_probs(leaf, image=image, noise=noise, generator=generator, steps=steps))
            (gradient,) = torch.autograd.grad(scores.sum(), leaf)
        self.passes.add(backward=len(mask))
        return scores.detach(), gradient


def box_weights(grid: int, rows: slice, cols: slice) -> torch.Tensor:
    """Equal weights on a box of cells, nothing elsewhere; they sum to 1."""
    weights = torch.zeros(grid, grid, dtype=torch.float64)
    weights[rows, cols] = 1
    return weights / weights.sum()
