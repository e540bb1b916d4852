"""The pictures of a replay, and the baseline that is shown where a mask takes a picture away."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lvlm_probe.errors import ImageError
from lvlm_probe.exhaustion import whole_pass
from lvlm_probe.images import BLUR_LADDER, ImagePath, PixelPath, make_baseline

if TYPE_CHECKING:
    from PIL import Image

    from lvlm_probe.forcing import Shortcut
    from lvlm_probe.recorded_path import LiveTrace
    from lvlm_probe.trace import Trace

__all__ = ["WithBaseline"]


class WithBaseline:
    """The part of ``Replay`` that knows the pictures, chooses the baseline and strengthens it.

    Attributes:
        path: how a mask reaches the model's pixel inputs, over the present baseline.
        baseline: what the baseline picture is.
    """

    trace: Trace | LiveTrace
    path: ImagePath | PixelPath
    baseline: dict[str, Any]
    _baseline_log_probs: torch.Tensor | None

    @property
    def n_images(self) -> int:
        """Number of pictures in the prompt."""
        return self.path.n_images

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """``(width, height)`` of each picture, pixels."""
        return list(self.path.image_sizes)

    def image(self, k: int = 0) -> Image.Image:
        """Picture ``k`` as the user gave it, RGB."""
        return self.trace.images[k]

    def seen(self, k: int = 0, shape: tuple[int, int] | None = None) -> torch.Tensor:
        """Which pixels (or cells of a grid of ``shape``) of picture ``k`` reach the model, bool ``(row, col)``."""
        return self.path.seen(k, shape)

    def _run(self, pixel_inputs: dict[str, torch.Tensor], batch: int, shortcut: Shortcut | None = None) -> torch.Tensor:
        raise NotImplementedError

    def baseline_image(self, k: int = 0) -> Image.Image | None:
        """Baseline of picture ``k``; ``None`` when masks live in pixel-input space."""
        images = self.path.baseline_images
        return images[k] if images else None

    @property
    def baseline_log_probs(self) -> torch.Tensor:
        """Replayed log P̃(a_t) on the baseline picture, ``(step,)`` float32 on the CPU."""
        if self._baseline_log_probs is None:
            with torch.no_grad():
                passed = whole_pass(self, lambda: self._run(self.path.baseline_inputs, 1))  # type: ignore[arg-type]
                self._baseline_log_probs = passed[0].cpu()
        return self._baseline_log_probs

    def set_baseline(self, kind: str | Image.Image | Sequence[Image.Image] = "blur", **params: Any) -> dict[str, Any]:
        """Choose the baseline picture Ĩ.

        Args:
            kind: ``"blur"``, ``"blank"``, ``"noise"``, ``"mean"``, or the user's own picture (one per image).
            params: ``strength`` (blur: sigma as a share of the long side), ``seed`` (noise).

        Returns:
            the description that provenance keeps; also in ``replay.baseline``.
        """
        kinds = list(kind) if isinstance(kind, Sequence) and not isinstance(kind, str) else [kind] * self.n_images
        if len(kinds) != self.n_images:
            raise ImageError(
                f"{len(kinds)} baseline pictures for a prompt with {self.n_images} images; give one per image"
            )
        if isinstance(self.path, PixelPath):
            self.path = self.path.with_baseline_kind(str(kinds[0]), **params)
            self.baseline = {"kind": str(kinds[0]), **params}
        else:
            made = [make_baseline(picture, k, **params) for picture, k in zip(self.path.images, kinds, strict=True)]
            self.path = self.path.with_baseline([item.image for item in made])
            self.baseline = {"kind": made[0].kind, **made[0].params}
        self._baseline_log_probs = None
        return self.baseline

    @contextmanager
    def on_baseline(
        self, kind: str | Image.Image | Sequence[Image.Image] = "blur", **params: Any
    ) -> Iterator[dict[str, Any]]:
        """Another baseline (see ``set_baseline``) for the block; afterwards the present one is back."""
        kept = self.path, self.baseline, self._baseline_log_probs
        try:
            yield self.set_baseline(kind, **params)
        finally:
            self.path, self.baseline, self._baseline_log_probs = kept

    def strengthen(self, steps: Sequence[int], *, below: float = 0.05) -> dict[str, Any]:
        """Blur harder until the mean probability of the answer tokens ``steps`` is under ``below`` (paper, A.1).

        Only a blurred baseline is changed; of several that do not reach ``below`` the best is kept. The result says
        ``mean_probability`` and whether it is ``verified``.
        """
        index = torch.as_tensor(list(steps), dtype=torch.long)
        if index.numel() == 0:
            return self.baseline
        best: tuple[float, dict[str, Any], Any, torch.Tensor] | None = None
        current = math.inf if self.baseline.get("limit") else float(self.baseline.get("strength") or 0.0)
        harder = [rung for rung in BLUR_LADDER if rung > current] if self.baseline.get("kind") == "blur" else []
        for rung in [None, *harder]:
            if rung is not None:
                self.set_baseline("blur", strength=rung)
            probability = float(self.baseline_log_probs[index].exp().mean())
            if best is None or probability < best[0]:
                best = (probability, dict(self.baseline), self.path, self.baseline_log_probs)
            if probability < below:
                break
        assert best is not None
        probability, description, self.path, self._baseline_log_probs = best
        self.baseline = {**description, "mean_probability": probability, "verified": probability < below}
        return self.baseline
