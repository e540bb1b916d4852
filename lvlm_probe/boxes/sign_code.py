"""From the features of tokens back to the pixels they were made of, and from there to the image."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lvlm_probe.errors import ImageError
from lvlm_probe.models.families import Places

_ROUNDING = 0.05  # of a ratio that is a sign, whatever precision the model runs in
_SHARE = 1e-3  # of the elements that may be read by several tokens before the code is given up
_SAMPLE = 8  # tokens that are asked whether they read the whole image,
_WHOLE = 0.9  # which is this much of its cells
_FINE = 96  # cells a side of the image that tokens which share elements are told apart by
_PART = 0.2  # of what a token reads most of, which makes another image one that it reads
_HEAPED = 0.6  # mean share of the smaller of two boxes that lies in the other


class SignCode:
    """Which token reads each element of the pixel inputs.

    With one random direction g and weights w_j the gradient of ``Σ_j w_j ⟨g, h_j⟩`` to an element that token j alone
    reads is w_j times something that does not depend on w. With w_j = 1 or −1 by one binary digit of j, the ratio to
    the gradient for w_j = 1 is that digit, whatever precision the model runs in, and all digits name the token. Where
    ratios are not ±1 several tokens read an element.

    Args:
        hidden: ``(token, channel)``, the h_j.
        leaves: the pixel inputs it was computed from.

    Attributes:
        plain: the gradient to each of ``leaves`` for w = 1; 0 where no token reads an element.
    """

    def __init__(self, hidden: torch.Tensor, leaves: Iterable[torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        self._along = hidden @ torch.randn(hidden.shape[1], generator=generator, dtype=torch.float32).to(hidden)
        self._numbers = torch.arange(len(hidden), device=hidden.device)
        self._leaves = list(leaves)
        self.plain = self._gradients(torch.ones_like(self._along))

    def _gradients(self, weights: torch.Tensor) -> list[np.ndarray]:
        found = torch.autograd.grad(
            (self._along * weights).sum(), self._leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return [gradient.detach().cpu().double().numpy() for gradient in found]

    @functools.cached_property
    def _signed(self) -> list[list[np.ndarray]]:
        digits = (self._numbers >> digit & 1 for digit in range((len(self._numbers) - 1).bit_length()))
        return [self._gradients((1 - 2 * digit).to(self._along)) for digit in digits]

    def of(self, token: int) -> list[np.ndarray]:
        """The gradient of one token's own feature to each of the pixel inputs."""
        return self._gradients((self._numbers == token).to(self._along))

    def read(self, place: int, asked: np.ndarray, tolerance: float = _ROUNDING) -> tuple[np.ndarray, np.ndarray]:
        """The token of each element of the ``place``-th pixel input that is ``asked``, and whether it has several.

        Turning a sign is exact in floating point, so elements that a norm has all but muted may be asked too.
        """
        base = self.plain[place][asked]
        token, shared = np.zeros(len(base), np.int64), np.zeros(len(base), bool)
        for digit, found in enumerate(self._signed):
            ratio = found[place][asked] / base
            shared |= np.abs(np.abs(ratio) - 1) > tolerance
            token |= (ratio < 0).astype(np.int64) << digit
        return token, shared


def boxes_by_sign_code(
    hidden: torch.Tensor, leaves: Mapping[str, torch.Tensor], path: Any, *, alike: bool = False
) -> Places | None:
    """Places of tokens that depend on few elements of the pixel inputs each, by their sign code; where several tokens
    read an element, every token is asked for itself.

    Args:
        hidden: ``(token, channel)``.
        leaves: the pixel inputs it was computed from.
        path: says where their elements come from, ``coordinates(name)``, and ``image_sizes``.
        alike: attention is at work between pixels and tokens: a token's place is all it reads, however little of it,
            and if that is the whole image for every token then there is no place.

    Returns:
        ``None``: no token reads any pixel, or all of them read all of it.
    """
    count = len(hidden)
    code = SignCode(hidden, leaves.values())
    sources = [tuple(part.numpy() for part in path.coordinates(name)) for name in leaves]
    clear = [(g != 0) & alive for g, (_, _, _, alive) in zip(code.plain, sources, strict=True)]
    if not any(part.any() for part in clear):
        return None
    flat = [np.concatenate([part.reshape(-1) for part in parts]) for parts in zip(*sources, strict=True)]

    def energy(token: int) -> np.ndarray:
        own = np.concatenate([part.reshape(-1) for part in code.of(token)])
        result: np.ndarray = np.where(flat[3], own**2, 0.0)
        return result

    if alike and _all_read_all(energy, count, flat, path.image_sizes):
        return None
    boxes, images = np.zeros((count, 4), np.float32), np.full(count, -1, np.int64)
    most = np.zeros(count, np.int64)
    elements = np.zeros((count, len(path.image_sizes)), np.int64)
    for place, (x, y, owner, _) in enumerate(sources):
        asked = clear[place]
        token, shared = code.read(place, asked, 1e-6 if alike else _ROUNDING)
        if shared.sum() > _SHARE * len(shared):
            return _one_by_one(energy, count, flat, path.image_sizes, alike)
        for image, size in enumerate(path.image_sizes):
            mine = ~shared & (owner[asked] == image)
            per_token = np.bincount(token[mine], minlength=count)
            better = per_token > most
            elements[:, image] += per_token
            most[better], images[better] = per_token[better], image
            for axis, source in enumerate((x, y)):
                which, low, high = extents(source[asked][mine], token[mine])
                keep = better[which]
                boxes[which[keep], axis] = low[keep].clip(0, size[axis])
                boxes[which[keep], axis + 2] = high[keep].clip(0, size[axis])
    return Places(boxes, images, _several(elements))


def _several(read: np.ndarray) -> np.ndarray:
    """First and last image that each token reads, ``(token, 2)``, from how much of each, ``(token, image)``."""
    seen = (read > _PART * read.max(axis=1, keepdims=True)) & (read > 0)
    first, last = seen.argmax(axis=1), read.shape[1] - 1 - seen[:, ::-1].argmax(axis=1)
    found: np.ndarray = np.where(seen.any(axis=1)[:, None], np.stack([first, last], axis=1), -1)
    return found


def extents(source: np.ndarray, token: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which tokens there are, and the extent of each along one axis: half a step beyond its outermost elements."""
    # Token and position, in thousandths of a pixel, in one integer: sorting pairs takes many times as long.
    thousandths = np.rint(source.astype(np.float64) * 1000).astype(np.int64) + 2**31
    distinct = np.unique((token << 32) + thousandths)
    found, first, count = np.unique(distinct >> 32, return_index=True, return_counts=True)
    low, high = (((distinct[at] & (2**32 - 1)) - 2**31) / 1000 for at in (first, first + count - 1))
    half = np.where(count > 1, (high - low) / np.maximum(count - 1, 1), 1.0) / 2
    return found, low - half, high + half


def _one_by_one(
    energy: Callable[[int], np.ndarray],
    count: int,
    flat: Sequence[np.ndarray],
    sizes: Sequence[tuple[int, int]],
    alike: bool,
) -> Places:
    """Places of tokens that share elements (overlapping convolutions, pooling, resized features).

    A token's squared gradient, as a share of its total, less the mean of that share over all tokens (what all of them
    read alike, pooled over the image for instance, is nobody's place); of the rest the part between the 10 % and 90 %
    quantiles along each axis, stretched by 1/0.8: the whole extent of a token that reads evenly, without the thin end
    of a wide receptive field. Under attention, all that it reads.

    Raises:
        ImageError: The boxes of one image's tokens all lie over each other.
    """
    x, y, _, alive = flat
    cell = _cells(flat, sizes, _FINE)
    shape = (len(sizes), _FINE, _FINE)
    cells = int(np.prod(shape))
    filled = np.bincount(cell[alive], minlength=cells).reshape(shape)
    middles = [np.bincount(cell[alive], axis[alive], cells).reshape(shape) for axis in (x, y)]
    read = np.zeros((count, *shape), np.float32)
    for token in range(count):
        found = np.bincount(cell[alive], energy(token)[alive], cells).reshape(shape)
        read[token] = found / (found.sum() or 1)
    boxes, images = np.zeros((count, 4), np.float32), np.full(count, -1, np.int64)
    totals = read.sum(axis=(2, 3))
    images[totals.any(axis=1)] = totals.argmax(axis=1)[totals.any(axis=1)]
    for image, size in enumerate(sizes):
        mine = np.flatnonzero(images == image)
        common = read[mine, image].mean(axis=0) if len(mine) > 1 and not alike else 0.0
        for token in mine.tolist():
            own = (read[token, image] - common).clip(min=0)
            own = own if own.any() else read[token, image]
            for axis in (0, 1):  # columns of the grid lie along x, its rows along y
                along = (own > 0 if alike else own).sum(axis=axis)
                some = along > 0
                at = middles[axis][image].sum(axis=axis)[some] / filled[image].sum(axis=axis)[some]
                low, high = _spread(at, along[some], 0.0 if alike else 0.1)
                boxes[token, axis], boxes[token, axis + 2] = max(0.0, low), min(float(size[axis]), high)
        if len(mine) > 1 and not alike and _on_one_heap(boxes[mine]):
            raise ImageError(
                "the receptive fields of the image tokens lie over each other (overlapping convolutions), so that none "
                "of them stands for a part of the image"
            )
    return Places(boxes, images, _several(totals))


def _on_one_heap(boxes: np.ndarray) -> bool:
    """Whether boxes share most of their area with most others, whichever two are taken: a grid's share none or some."""
    low, high = boxes[:, :2], boxes[:, 2:]
    shared = (np.minimum(high[:, None], high) - np.maximum(low[:, None], low)).clip(min=0)
    area = (high - low).prod(axis=1)
    ratio = shared.prod(axis=2) / np.minimum(area[:, None], area[None]).clip(min=1e-9)
    return bool(ratio[~np.eye(len(boxes), dtype=bool)].mean() > _HEAPED)


def _cells(flat: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]], side: int) -> np.ndarray:
    """The cell of each element on a grid of ``side × side`` over its image, counted through all images."""
    x, y, owner, _ = flat
    image = owner.clip(min=0)
    size = np.asarray(sizes, dtype=float)[image]
    row, col = ((at / end * side).clip(0, side - 1).astype(int) for at, end in ((y, size[:, 1]), (x, size[:, 0])))
    result: np.ndarray = (image * side + row) * side + col
    return result


def _spread(at: np.ndarray, weights: np.ndarray, margin: float) -> tuple[float, float]:
    """Extent of ascending positions by their weights, without ``margin`` of them at either end."""
    if len(at) == 1:
        return float(at[0]) - 0.5, float(at[0]) + 0.5
    steps = np.diff(at)
    edges = np.concatenate([[at[0] - steps[0] / 2], at[:-1] + steps / 2, [at[-1] + steps[-1] / 2]])
    below = np.concatenate([[0.0], np.cumsum(weights, dtype=np.float64)]) / weights.sum(dtype=np.float64)
    low, high = np.interp([margin, 1 - margin], below, edges)
    middle, half = (low + high) / 2, (high - low) / 2 / (1 - 2 * margin)
    return max(float(edges[0]), middle - half), min(float(edges[-1]), middle + half)


def _all_read_all(
    energy: Callable[[int], np.ndarray], count: int, flat: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]
) -> bool:
    """Whether tokens read the whole of their image, however much or little of each part of it: a softmax leaves
    nothing out, while a window reads nothing outside."""
    _, _, owner, alive = flat
    cell = _cells(flat, sizes, 8)
    shares = []
    for token in np.unique(np.linspace(0, count - 1, _SAMPLE).astype(int)):
        read = energy(int(token)) > 0
        if read.any():
            mine = alive & (owner == np.bincount(owner[read]).argmax())
            shares.append(len(np.unique(cell[read & mine])) / len(np.unique(cell[mine])))
    return len(shares) > 1 and min(shares) > _WHOLE
