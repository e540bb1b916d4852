"""The parity report: how far the fast path is from the real processor, on the image at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvlm_probe._version import versions_of
from lvlm_probe.files import record_of
from lvlm_probe.images.positions import Geometry

WARN_LEVELS = 2.0
"""Mean error in 1/255 levels above which the fast path is warned about."""
REFUSE_LEVELS = 8.0
"""... and above which it is not the processor's function any more, unless it is on images without edges."""
SHARP_LEVELS = 24.0
"""... up to which sharp images of few pixels differ then: black and white noise of 8 x 8, enlarged, by some 14."""


@dataclass(frozen=True)
class ParityReport:
    """A random-mask composite through the fast path and through the real processor, in 1/255 grey levels.

    The real processor rounds to 8 bits before and after it resizes, so that 0.2 to 0.6 levels in the mean are the
    truth's own rounding. Largest errors sit where a resize kernel overshoots saturated pixels.
    """

    engine: str
    processor: str
    backend: str
    mean_error: float
    max_error: float
    deterministic: bool
    coverage: tuple[float, ...]
    """Share of each image's pixels that some pixel-input element sees."""
    pixel_keys: tuple[str, ...]
    runs: int
    """Processor calls that the trace took; 0 when the geometry was known from an image of the same size."""
    seconds: float
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()
    """Sentences about anything a reader should know (a converted image, inputs that differ from the user's run)."""

    def __str__(self) -> str:
        seen = ", ".join(f"{share:.1%}" for share in self.coverage)
        lines = [
            f"{self.processor} ({self.backend}): {self.engine} geometry of {', '.join(self.pixel_keys)}",
            f"  fast path vs processor on a random mask: mean {self.mean_error:.2f}, max {self.max_error:.1f} of 255 "
            "levels",
            f"  seen by the model: {seen} of the image; "
            f"{'deterministic' if self.deterministic else 'NOT deterministic'}; {self.runs} probe runs, "
            f"{self.seconds:.2f} s",
            "  " + ", ".join(f"{name} {version}" for name, version in self.versions.items()),
        ]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return record_of(self)


def level_errors(fast: Mapping[str, Tensor], real: Mapping[str, Tensor], geometry: Geometry) -> tuple[float, float]:
    """Mean and largest absolute difference over all live elements, in grey levels of 255."""
    total, count, largest = 0.0, 0, 0.0
    for key, traced in geometry.keys.items():
        slope = traced.slope.float().abs()
        live = slope > 0
        # A level is what the normalisation makes of one; an element blended with padding moves by a part of it only.
        slope = torch.where(slope < 0.6 * slope.max(), slope.max(), slope)
        levels = ((fast[key].float() - real[key].float()).abs()[live] / slope[live]).double()
        total, count = total + float(levels.sum()), count + levels.numel()
        largest = max(largest, float(levels.max()) if levels.numel() else 0.0)
    return total / max(count, 1), largest


def backend_of(image_processor: object) -> str:
    """``"pil"``, ``"torchvision"`` or ``"unknown"``: two backends of one class differ by up to two levels."""
    declared = getattr(image_processor, "backend", None)
    if isinstance(declared, str):
        return declared
    name = type(image_processor).__name__
    return "pil" if name.endswith("Pil") else "torchvision" if name.endswith("Fast") else "unknown"


def versions() -> dict[str, str]:
    """Versions of everything that decides a pixel's value (Pillow changed its resize between releases)."""
    return versions_of("pillow", "torch", "torchvision", "transformers")
