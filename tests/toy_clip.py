"""An analytic video: log-probabilities in closed form of a mask over time and space, and a video processor in NumPy.

P(a_t | M) = p_base + (p_orig − p_base) · Σ_cells w · m, m the mask over the frames averaged to the toy's own grid.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from toy_replay import ToyReplay

from lvlm_probe.images.clips import over_frames
from lvlm_probe.trace.clips import Clip

__all__ = ["PairedVideos", "ToyClip", "tube_weights"]

SIDE = 48


class ToyClip(ToyReplay):
    """``ReplayLike`` without a model, of a prompt that is one video; ``weights`` ``(frame, row, col)`` sum to 1."""

    def __init__(self, weights: torch.Tensor, **settings: Any) -> None:
        super().__init__(torch.ones(len(settings.get("original", (0.9,))), 1, 1), **settings)
        self.cells = torch.as_tensor(weights, dtype=torch.float64)
        count = len(self.cells)
        self.clips = (Clip(0, count, tuple(range(count)), 2.0, count, count / 2),)
        frames = [Image.new("RGB", (SIDE, SIDE), (20 * k, 90, 200 - 20 * k)) for k in range(count)]
        self.n_images, self.image_sizes = count, [(SIDE, SIDE)] * count
        self.path = SimpleNamespace(images=frames, baseline_images=[], report=self.path.report)
        self.trace = SimpleNamespace(
            trace_id="toy",
            images=frames,
            path=None,
            log_probs=self.trace.log_probs,
            clips=self.clips,
            question=None,
        )

    def image(self, k: int = 0) -> Image.Image:
        return self.trace.images[k] if hasattr(self, "clips") else super().image(k)

    def log_probs(self, mask: torch.Tensor | None = None, *, image: Any = None, **rest: Any) -> torch.Tensor:
        if mask is None:
            mask = torch.ones(1, 1, 1, 1)
        assert image in (*self.clips, None)
        frames = over_frames(mask.double(), self.clips[0], self.n_images)
        cells = torch.nn.functional.adaptive_avg_pool2d(frames, self.cells.shape[1:])
        share = (cells * self.cells).sum((1, 2, 3))
        self.passes.add(forward=len(mask))
        probability = self.base_probability + (self.probability - self.base_probability) * share[:, None]
        return probability.clamp(min=1e-12).log().float()


def tube_weights(frames: int, grid: int, when: slice, rows: slice, cols: slice) -> torch.Tensor:
    """Equal weights in one place for some time, nothing elsewhere; they sum to 1."""
    weights = torch.zeros(frames, grid, grid, dtype=torch.float64)
    weights[when, rows, cols] = 1
    return weights / weights.sum()


class PairedVideos:
    """A video processor without torchvision: halves frames, normalises them, and lays two after each other in a patch.

    ``(clip, pair, 2 · row · col · channel)``; an odd last frame is repeated.
    """

    def __call__(self, videos: Any, do_sample_frames: bool = True, **_kwargs: Any) -> dict[str, torch.Tensor]:
        return self.preprocess(videos, do_sample_frames=do_sample_frames)

    def preprocess(self, videos: Any, do_sample_frames: bool = True) -> dict[str, torch.Tensor]:
        assert not do_sample_frames
        made = []
        for video in videos:
            values = np.asarray(video, dtype=np.float64)
            if len(values) % 2:
                values = np.concatenate([values, values[-1:]])
            count, rows, cols, channels = values.shape
            small = values.reshape(count, rows // 2, 2, cols // 2, 2, channels).mean((2, 4)).round()
            made.append((small / 255 - 0.5).reshape(count // 2, 2 * small[0].size))
        return {"pixel_values_videos": torch.from_numpy(np.stack(made)).float()}
