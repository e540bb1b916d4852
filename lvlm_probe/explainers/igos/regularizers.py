"""The regularisers of a mask, as pure functions of tensors: g(M) of the paper's Eq. 4 and 8.

A mask ``(row, col)``, of a clip ``(t, row, col)``, is 1 where the image is kept. All functions return a scalar tensor,
differentiable in the mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from PIL import Image

L2Form = Literal["sum_sq", "norm"]
BilateralForm = Literal["symmetric", "igos_release"]

GUIDE_SIZE = 336
"""Side of the guide image of the bilateral term, pixels: the input size of LLaVA-1.5, on which λ3 = 10 was chosen."""

CLIP_GUIDE_SIZE = 112
"""Side of the guide images of a clip: as many numbers for nine steps in time as for one image."""

# CLIP's published pixel statistics: sigma = 0.01 is stated in pixels normalised by them.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def l1(mask: torch.Tensor) -> torch.Tensor:
    """Share of the image that is removed: **mean** of |1 − M| over cells (the norm of Eq. 8 divided by the cells)."""
    return (1 - mask).abs().mean()


def gnc(mask: torch.Tensor, *, iteration: int, gamma: float, form: L2Form = "sum_sq") -> torch.Tensor:
    """The graduated non-convexity term without its weight λ2, t = ``iteration`` counted from 0. Paper, Eq. 8.

    ``"sum_sq"`` is e^(−γt) · Σ (1 − M)², **summed** over cells, as λ2 = 0.1 was used with; ``"norm"`` is
    e^(−γt) · ‖1 − M‖₂, as Eq. 8 is written (its gradient at M = 1 is taken as 0).
    """
    removed = 1 - mask
    size = removed.square().sum() if form == "sum_sq" else torch.linalg.vector_norm(removed)
    return size * float(torch.exp(torch.tensor(-gamma * iteration, dtype=torch.float64)))


def tv(mask: torch.Tensor, *, beta: float = 2.0) -> torch.Tensor:
    """Total variation: mean over vertical neighbours of |ΔM|^β plus the same over horizontal neighbours; of a clip plus
    the same over neighbours in time."""
    total = _mean(_vertical(mask).abs().pow(beta)) + _mean(_horizontal(mask).abs().pow(beta))
    return total if mask.ndim == 2 else total + _mean(mask.diff(dim=0).abs().pow(beta))


def bilateral_weights(
    image: torch.Tensor, *, sigma: float = 0.01, form: BilateralForm = "symmetric"
) -> tuple[torch.Tensor, ...]:
    """How much a pixel and its neighbour look alike, in [0, 1].

    Args:
        image: Guide ``(channel, row, col)`` in normalised pixels (``guide``), of a clip ``(t, channel, row, col)``.
        sigma: Divisor of the squared difference.
        form: With Δ the difference of neighbours, ``"symmetric"`` is exp(−mean_channel(Δ²) / σ) on both axes;
            ``"igos_release"`` is exp(−(mean_channel Δ)² / σ) vertically and mean_channel(exp(−Δ² / σ)) horizontally,
            the two different rules of the released recipe.

    Returns:
        Weights of vertical ``(row − 1, col)`` and of horizontal neighbours ``(row, col − 1)``, of a clip each with an
        axis of time in front, and of neighbours in time ``(t − 1, row, col)``, which are symmetric.
    """
    down, right = _vertical(image), _horizontal(image)
    later = () if image.ndim == 3 else (torch.exp(-image.diff(dim=0).square().mean(-3) / sigma),)
    if form == "symmetric":
        return torch.exp(-down.square().mean(-3) / sigma), torch.exp(-right.square().mean(-3) / sigma), *later
    return torch.exp(-down.mean(-3).square() / sigma), torch.exp(-right.square() / sigma).mean(-3), *later


def btv(mask: torch.Tensor, weights: tuple[torch.Tensor, ...] | None = None, *, beta: float = 2.0) -> torch.Tensor:
    """Bilateral total variation without its weight λ3 (Khorram et al., 2021)::

        ½ · ( TV(M) + mean_vertical(w · |ΔU|^β) + mean_horizontal(w · |ΔU|^β) )

    TV(M) is taken on the mask's own grid; U is the mask brought bilinearly to the size of the guide image, where the
    bilateral ``weights`` live, so a border of the mask costs less along a border of the image. Without weights
    (no image to guide) only ½ · TV(M) is left. A clip has one more such mean, over neighbours in time.
    """
    total = tv(mask, beta=beta)
    if weights is not None:
        vertical, horizontal = weights[:2]
        size = (horizontal.shape[-2], vertical.shape[-1])
        steps = mask.reshape(-1, 1, *mask.shape[-2:])
        up = functional.interpolate(steps, size=size, mode="bilinear", align_corners=False)
        up = up.reshape(*mask.shape[:-2], *size)
        total = (
            total
            + _mean(vertical * _vertical(up).abs().pow(beta))
            + _mean(horizontal * _horizontal(up).abs().pow(beta))
        )
        if len(weights) > 2:
            total = total + _mean(weights[2] * up.diff(dim=0).abs().pow(beta))
    return 0.5 * total


def guide(image: Image.Image, *, size: int = GUIDE_SIZE) -> torch.Tensor:
    """The image at ``size`` × ``size``, normalised with CLIP's statistics, ``(channel, row, col)`` float32."""
    from PIL import Image as PILImage

    resized = image.convert("RGB").resize((size, size), PILImage.Resampling.BICUBIC)
    values = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).reshape(size, size, 3)
    scaled = values.permute(2, 0, 1).float() / 255
    return (scaled - torch.tensor(_MEAN, dtype=torch.float32)[:, None, None]) / torch.tensor(
        _DEVIATION, dtype=torch.float32
    )[:, None, None]


def _vertical(values: torch.Tensor) -> torch.Tensor:
    return values[..., 1:, :] - values[..., :-1, :]


def _horizontal(values: torch.Tensor) -> torch.Tensor:
    return values[..., :, 1:] - values[..., :, :-1]


def _mean(values: torch.Tensor) -> torch.Tensor:
    # A mask of one row or one column has no neighbours on that axis, and the mean of nothing would be NaN.
    return values.mean() if values.numel() else values.sum()
