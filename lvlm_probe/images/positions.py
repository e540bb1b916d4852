"""Source positions of pixel-input elements, as tracing learns them, and what follows from them."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lvlm_probe.process import of_the_last, unheard

_MAX_SAMPLERS = 2


@dataclass(frozen=True)
class KeyGeometry:
    """Source positions of one pixel-input tensor.

    Elements that differ only in channel (or in a repeated frame) look at the same place. ``view`` splits the tensor's
    axes so that such repetitions are axes of their own; ``spatial`` is ``view`` with those axes set to 1, and positions
    are kept once per spatial element.
    """

    shape: tuple[int, ...]
    view: tuple[int, ...]
    spatial: tuple[int, ...]
    x: Tensor
    """Column in pixels of the source image, ``spatial``, float32."""
    y: Tensor
    """Row in pixels of the source image, ``spatial``, float32."""
    image: Tensor
    """Index of the source image in the prompt, ``spatial``, int16."""
    live: Tensor
    """False where the element is padding, ``spatial``, bool."""
    slope: Tensor
    """Change of the element per grey level, ``shape``, bfloat16 (it only scales error figures); 0 for padding."""
    whitened: bool = False
    """Each image is normalised by its own statistics behind this."""

    @property
    def repeated_axes(self) -> tuple[int, ...]:
        """Axes of ``view`` along which position does not change (channels, repeated frames)."""
        return tuple(axis for axis, (n, m) in enumerate(zip(self.view, self.spatial, strict=True)) if n != m)

    def expand(self, spatial: Tensor) -> Tensor:
        """A per-position tensor, ``spatial`` -> one value per element, ``shape``."""
        return spatial.reshape(self.spatial).expand(self.view).reshape(self.shape)


@dataclass
class Geometry:
    """Positions of every pixel-input tensor of one prompt, and the sampling matrices built from them."""

    sizes: tuple[tuple[int, int], ...]
    """``(width, height)`` per image of the prompt."""
    keys: dict[str, KeyGeometry]
    runs: int
    """Processor calls that the trace took."""
    _samplers: OrderedDict[tuple, tuple[Tensor, Tensor]] = field(default_factory=OrderedDict, repr=False)
    _seen: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def sampler(
        self, key: str, height: int, width: int, *, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The bilinear sampling matrix ``(position, image * height * width)`` of a ``height x width`` mask, and its
        transpose.

        Bilinear with ``align_corners=False``: mask cell ``(row, col)`` is centred at ``((col + .5) / width,
        (row + .5) / height)`` of the image; beyond the outermost centres the mask is constant.
        """
        token = (key, height, width, device, dtype)

        def made() -> tuple[Tensor, Tensor]:
            return self._sampler(key, height, width, device=device, dtype=dtype)

        return of_the_last(self._samplers, token, made, most=_MAX_SAMPLERS * len(self.keys))

    def _sampler(
        self, key: str, height: int, width: int, *, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        geometry = self.keys[key]
        sizes = torch.tensor(self.sizes, dtype=torch.float32)
        image = geometry.image.reshape(-1).long()
        col = (geometry.x.reshape(-1) / sizes[image, 0] * width - 0.5).clamp_(0, width - 1)
        row = (geometry.y.reshape(-1) / sizes[image, 1] * height - 0.5).clamp_(0, height - 1)
        col0, row0 = col.floor().clamp_(max=max(width - 2, 0)), row.floor().clamp_(max=max(height - 2, 0))
        along, down = (col - col0).double(), (row - row0).double()
        first = (image * height + row0.long()) * width + col0.long()
        right, below = int(width > 1), width * int(height > 1)
        columns = torch.stack([first, first + right, first + below, first + below + right], dim=1)
        weights = torch.stack([(1 - down) * (1 - along), (1 - down) * along, down * (1 - along), down * along], dim=1)
        return _sparse_pair(columns, weights.to(dtype), len(self.sizes) * height * width, device)

    def as_whitened(self) -> Geometry:
        """The same positions, of a processor that normalises each image by its own statistics behind them."""
        return replace(self, keys={name: replace(key, whitened=True) for name, key in self.keys.items()})

    def seen(self, image: int) -> Tensor:
        """Pixels of one image that reach some element, bool ``(height, width)``.

        Each element covers a box as large as the distance to its neighbours, so that an image that is only scaled down
        counts as seen everywhere and a centre crop leaves its margins unseen.
        """
        if image in self._seen:
            return self._seen[image]
        width, height = self.sizes[image]
        edges = torch.zeros(height + 1, width + 1, dtype=torch.int32)
        for geometry in self.keys.values():
            mine = geometry.live & (geometry.image == image)
            for group in _tiles(geometry):
                chosen = mine.reshape(-1)[group]
                if chosen.any():
                    x, y = geometry.x.reshape(-1)[group][chosen], geometry.y.reshape(-1)[group][chosen]
                    _add_boxes(edges, x, y, width, height)
        # In place: on a scanned page every copy is tens of megabytes.
        self._seen[image] = edges.cumsum_(0).cumsum_(1)[:height, :width] > 0
        return self._seen[image]


def _tiles(geometry: KeyGeometry) -> list[slice]:
    """Runs of flat positions that share one scale: each image-like plane of a tiled tensor, else the whole tensor."""
    total = math.prod(geometry.spatial)
    planes = [n for n in geometry.spatial if n > 1]
    if len(planes) >= 2 and min(planes[-2:]) >= 8:
        plane = planes[-1] * planes[-2]
        if total // plane <= 256:  # else the planes are single patches of one image
            return [slice(start, start + plane) for start in range(0, total, plane)]
    return [slice(0, total)]


def _step(position: Tensor) -> float:
    """Distance between neighbouring distinct positions, at least one pixel."""
    ordered = position.double().sort().values
    distinct = int((ordered.diff() > 0.25).sum())
    return max(float(ordered[-1] - ordered[0]) / distinct, 1.0) if distinct else 1.0


def _add_boxes(edges: Tensor, x: Tensor, y: Tensor, width: int, height: int) -> None:
    """Add the boxes around positions to a summed-area difference table ``(height + 1, width + 1)``, in place."""
    # Somewhat more than half: at the border a clipped kernel's centre of mass is drawn inwards.
    half_x, half_y = 0.6 * _step(x) + 0.3, 0.6 * _step(y) + 0.3
    left = (x - half_x).round().long().clamp_(0, width)
    right = (x + half_x).round().long().clamp_(0, width)
    top = (y - half_y).round().long().clamp_(0, height)
    bottom = (y + half_y).round().long().clamp_(0, height)
    flat = edges.reshape(-1)
    for rows, cols, sign in ((top, left, 1), (bottom, right, 1), (top, right, -1), (bottom, left, -1)):
        flat.index_add_(0, rows * (width + 1) + cols, torch.full_like(rows, sign, dtype=edges.dtype))


def _sparse_pair(columns: Tensor, weights: Tensor, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Matrices that sample a batch of masks at a million positions by one product.

    Returns:
        the matrix with ``weights`` at ``columns`` (both ``(position, 4)``), and its transpose.
    """
    height, per_row = columns.shape
    flat, order = columns.reshape(-1).sort(stable=True)
    rows = order.div(per_row, rounding_mode="floor")
    ends = torch.searchsorted(flat, torch.arange(width + 1))
    forward = (torch.arange(height + 1) * per_row, columns.reshape(-1), weights.reshape(-1), (height, width))
    backward = (ends, rows, weights.reshape(-1)[order], (width, height))
    return _sparse(*forward, device), _sparse(*backward, device)


def _sparse(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int], device: torch.device) -> Tensor:
    _hear_of_csr()
    matrix = torch.sparse_csr_tensor(starts.int(), columns.int(), values, shape, check_invariants=False)
    if device.type != "cuda" and not (device.type == "cpu" and torch.backends.mkl.is_available()):
        # Without MKL only the slower coordinate layout can be multiplied.
        matrix = matrix.to_sparse_coo()
    return matrix.to(device)


@functools.cache
def _hear_of_csr() -> None:
    """Have torch say once, and unheard, that the layout is in beta."""
    with unheard(".*(CSR|invariant).*"):
        empty = torch.zeros(2, dtype=torch.int32)
        torch.sparse_csr_tensor(empty, empty[:0], torch.zeros(0), (1, 1), check_invariants=False)
