"""Which part of which picture each image token stands for, found by asking the model.

Layouts are many: tiles in front of or behind an overview, newline tokens, padding that is cut away, shuffled pixels,
windows, merge groups. One question answers all of them: which elements of the pixel inputs does the feature that enters
the decoder at this token come from? Attention between patches would mix every answer, so it is silenced, outside the
decoder, for one forward pass up to the decoder's first block; from there ``places_of`` goes back to the pixels, and
the traced geometry of the processor says where in the picture they were cut out.

A token that gets nothing once attention is silenced reads the picture through attention alone: a resampler's query.
Where it looks depends on what is in the picture, so it has no place, and that is said by name.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lvlm_probe.errors import ImageError
from lvlm_probe.hooks import HookSet

if TYPE_CHECKING:
    from lvlm_probe.format import RowCapture
    from lvlm_probe.player import Replay

__all__ = ["Places", "box_key", "extents", "in_order", "place", "places_of", "token_places"]

_SHARE = 1e-3  # of the elements that may be read by several tokens before the code is given up
_SAMPLE = 8  # tokens that are compared to see whether all look at the same places
_ALIKE = 0.4  # mean cosine of what they look at


@dataclass(frozen=True)
class Places:
    """Where tokens are.

    Attributes:
        boxes: ``(token, 4)`` float32, ``x0, y0, x1, y1`` in pixels of the original picture; all 0 for a token without
            pixels (a newline, padding).
        images: ``(token,)`` int64, the picture of each; -1 for a token without pixels.
    """

    boxes: np.ndarray
    images: np.ndarray


def token_places(replay: Replay, positions: np.ndarray) -> Places:
    """Places of the tokens at ``positions`` of the prompt: one pass up to the decoder, and back from there once per
    binary digit of their number (once per token where tokens share patches).

    Without positions, of the states that the decoder's cross-attention reads instead, in the order of its keys.

    Raises:
        ImageError: There is no processor to trace, or the tokens have no place in the picture; the message says why.
    """
    path: Any = replay.path
    if not hasattr(path, "coordinates"):
        raise ImageError("there is no processor to trace")
    name = type(replay.model).__name__
    outside = _attention_modules(replay)
    # A pooling layer that attends within its own window has no other way from pixels to tokens.
    inner = [p for p in outside if _within(p, replay.anatomy.encoders) and any(s.isdigit() for s in p.split("."))]
    for silenced in (outside, inner) if len(inner) < len(outside) else (outside,):
        with _entry(replay, positions, silenced) as (leaves, hidden):
            found = places_of(hidden, leaves, path, alike=silenced is not outside) if hidden.requires_grad else None
            if found is not None:
                return found
    with _entry(replay, positions, ()) as (_, hidden):
        if not hidden.requires_grad:
            raise ImageError(f"no gradient reaches the image tokens of {name} from the pixels")
    readers = [place for place in outside if place not in inner] or outside
    raise ImageError(
        f"the image tokens of {name} read the picture through attention alone"
        + (f" ({_owner_of(readers[0])})" if readers else "")
        + ", so that none of them stands for a part of it"
    )


def in_order(images: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    """The picture of every token, ``(token,)``: one without pixels goes with the token in front of it.

    Args:
        images: as in ``Places``.
        fallback: what to keep where no token has pixels.
    """
    placed = np.flatnonzero(images >= 0)
    if len(placed) == 0:
        return fallback
    before = np.searchsorted(placed, np.arange(len(images)), side="right") - 1
    result: np.ndarray = images[placed[before.clip(min=0)]].astype(np.int64)
    return result


def place(row: RowCapture, places: Places) -> None:
    """Enter places into what is recorded of one batch row."""
    row.patch_box, row.image_index = places.boxes, in_order(places.images, row.image_index)


def box_key(row: RowCapture) -> tuple[Any, ...]:
    """All that the boxes of a row depend on: the processor is the probe's, the picture counts by its size alone."""
    sizes = tuple((image.width, image.height) for image in row.images)
    shapes = tuple(sorted((name, tuple(value.shape)) for name, value in row.model_kwargs.items()))
    settings = json.dumps((row.processor_call or {}).get("kwargs"), sort_keys=True)
    return sizes, shapes, settings, row.image_index.tobytes()


# ---------------------------------------------------------------------------------------------------- asking the model


def _within(path: str, roots: Sequence[str]) -> bool:
    return any(not root or path == root or path.startswith(root + ".") for root in roots)


def _attention_modules(replay: Replay) -> list[str]:
    """Modules that mix tokens by attention, all that are not the decoder's own. Innermost ones: what stands around them
    may hold the residual connection too, and a whole merger."""
    decoder = replay.anatomy.decoder
    parts = (*replay.anatomy.encoders, *replay.anatomy.mergers)
    found: list[str] = []
    for path, module in replay.model.named_modules():
        kind = type(module).__name__.lower()
        if not path or not ("attention" in kind or "attn" in kind) or next(module.parameters(), None) is None:
            continue
        if _within(path, (decoder,)) and not _within(path, parts):
            continue
        if found and _within(path, found[-1:]):
            found.pop()
        found.append(path)
    return found


def _owner_of(path: str) -> str:
    """The part that an attention module belongs to: its path up to the first list of layers."""
    steps = path.split(".")
    numbered = next((place for place, step in enumerate(steps) if step.isdigit()), len(steps))
    return ".".join(steps[: max(1, min(numbered, len(steps)) - 1)])


class _Stop(Exception):
    """Leaves the model's forward once the decoder has been reached."""


@contextlib.contextmanager
def _entry(
    replay: Replay, positions: np.ndarray, silenced: Sequence[str]
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """The pixel inputs as leaves, and what enters the decoder at ``positions``, ``(token, channel)``, as a function of
    them. Hooks stay until the block is left: a layer that is recomputed in backward must be silent again."""
    path: Any = replay.path
    inputs = dict(path.inputs)
    leaves = {name: inputs[name].detach().clone().requires_grad_(True) for name in path.pixel_keys}
    # In an encoder-decoder model pictures enter the encoder's stack, which reads the prompt and no answer.
    lengths = {len(replay.input_ids)} | ({replay.length} if not replay.anatomy.encoder_decoder else set())
    entered: list[torch.Tensor] = []

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.is_floating_point()]
        given = [v for v in given if v.ndim >= 3]
        if not given or given[0].shape[-2] not in lengths:
            return
        # Some models add the picture in front of a later layer only; up to there nothing depends on the pixels.
        found = given[:1] if len(positions) else [v.flatten(0, -2) for v in given[1:] if v.requires_grad]
        entered[:] = found or entered
        if found and found[0].requires_grad:
            raise _Stop

    with HookSet() as hooks, torch.enable_grad():
        for place in silenced:
            hooks.forward(replay.model.get_submodule(place), _silent, name="silent attention", fenced=False)
        for block in _blocks(replay):
            hooks.forward_pre(block, enter, name="decoder entry", fenced=False)
        with contextlib.suppress(_Stop):
            replay.run_inputs({**inputs, **leaves})
        if not entered:
            raise ImageError(
                f"the layer of {type(replay.model).__name__} where the picture enters its decoder was not found"
            )
        hidden = entered[0]
        if len(positions):
            # Leading axes other than the batch are versions of the same token (gemma3n keeps several).
            at = torch.as_tensor(np.asarray(positions).copy(), device=hidden.device)
            hidden = hidden.index_select(-2, at).movedim(-2, 0).flatten(1)
        yield leaves, hidden


def _blocks(replay: Replay) -> list[nn.Module]:
    """Modules of every outermost list that is no encoder's: the decoder's layers are among them."""
    lists: list[str] = []
    found: list[nn.Module] = []
    for path, module in replay.model.named_modules():
        if not isinstance(module, nn.ModuleList) or _within(path, replay.anatomy.encoders):
            continue
        if not (lists and _within(path, lists[-1:])):
            lists.append(path)
            found.extend(module)
    return found


def _silent(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return torch.zeros_like(output)
    if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
        return (torch.zeros_like(output[0]), *output[1:])
    return None


# ---------------------------------------------------------------------------------------------- from tokens to pixels


def places_of(
    hidden: torch.Tensor, leaves: Mapping[str, torch.Tensor], path: Any, *, alike: bool = False
) -> Places | None:
    """Places of tokens that depend on few elements of the pixel inputs each.

    With one random direction g and weights w_j the gradient of ``Σ_j w_j ⟨g, h_j⟩`` to an element that token j alone
    reads is w_j times something that does not depend on w. With w_j = 1 or −1 by one binary digit of j, the ratio to
    the gradient for w_j = 1 is that digit, whatever precision the model runs in, and all digits name the token. Where
    ratios are not ±1 several tokens read an element, and every token is asked for itself.

    Args:
        hidden: ``(token, channel)``.
        leaves: the pixel inputs it was computed from.
        path: says where their elements come from, ``coordinates(name)``, and ``image_sizes``.
        alike: tokens may turn out to read the whole picture, all of them in the same way; then there is no place.

    Returns:
        ``None``: no token reads any pixel, or all of them read all of it.
    """
    count = len(hidden)
    generator = torch.Generator().manual_seed(0)
    along = hidden @ torch.randn(hidden.shape[1], generator=generator).to(hidden)
    wanted = list(leaves.values())

    def gradients(weights: torch.Tensor) -> list[np.ndarray]:
        found = torch.autograd.grad(
            (along * weights).sum(), wanted, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return [gradient.detach().double().cpu().numpy() for gradient in found]

    numbers = torch.arange(count, device=along.device)
    plain = gradients(torch.ones_like(along))
    sources = [tuple(part.numpy() for part in path.coordinates(name)) for name in leaves]
    clear = [(g != 0) & alive for g, (_, _, _, alive) in zip(plain, sources, strict=True)]
    if not any(part.any() for part in clear):
        return None
    signed = [gradients((1 - 2 * (numbers >> digit & 1)).to(along)) for digit in range((count - 1).bit_length())]
    boxes, images = np.zeros((count, 4), np.float32), np.full(count, -1, np.int64)
    most = np.zeros(count, np.int64)
    for place, (x, y, owner, _) in enumerate(sources):
        base, asked = plain[place], clear[place]
        token = np.zeros(int(asked.sum()), np.int64)
        shared = np.zeros(len(token), bool)
        for digit, found in enumerate(signed):
            ratio = found[place][asked] / base[asked]
            shared |= np.abs(np.abs(ratio) - 1) > 0.05
            token |= (ratio < 0).astype(np.int64) << digit
        if shared.sum() > _SHARE * len(shared):
            return _one_by_one(gradients, count, along, sources, path.image_sizes, alike)
        # Turning a sign is exact in floating point, so elements that a norm has all but muted may be asked too.
        for image, size in enumerate(path.image_sizes):
            mine = ~shared & (owner[asked] == image)
            per_token = np.bincount(token[mine], minlength=count)
            better = per_token > most
            most[better], images[better] = per_token[better], image
            for axis, source in enumerate((x, y)):
                which, low, high = extents(source[asked][mine], token[mine])
                keep = better[which]
                boxes[which[keep], axis] = low[keep].clip(0, size[axis])
                boxes[which[keep], axis + 2] = high[keep].clip(0, size[axis])
    return Places(boxes, images)


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
    gradients: Any,
    count: int,
    along: torch.Tensor,
    sources: Sequence[tuple[np.ndarray, ...]],
    sizes: Sequence[tuple[int, int]],
    alike: bool,
) -> Places | None:
    """Places of tokens that share elements (overlapping convolutions, pooling, resized features): between the 10 % and
    90 % quantiles of a token's squared gradient along each axis, stretched by 1/0.8, which is the whole extent of a
    token that reads evenly and leaves out the thin end of a wide receptive field."""
    flat = [np.concatenate([part.reshape(-1) for part in parts]) for parts in zip(*sources, strict=True)]
    x, y, owner, alive = flat
    orders = [np.argsort(axis, kind="stable") for axis in (x, y)]

    def energy(token: int) -> np.ndarray:
        weights = torch.zeros_like(along)
        weights[token] = 1
        parts = [gradient.reshape(-1) ** 2 for gradient in gradients(weights)]
        result: np.ndarray = np.where(alive, np.concatenate(parts), 0.0)
        return result

    if alike:
        wide = np.asarray(sizes, dtype=float)[owner.clip(min=0)]
        cell = (
            owner * 64 + (y / wide[:, 1] * 8).clip(0, 7).astype(int) * 8 + (x / wide[:, 0] * 8).clip(0, 7).astype(int)
        )
        sample = np.unique(np.linspace(0, count - 1, _SAMPLE).astype(int))
        if _look_alike([np.bincount(cell[alive], energy(token)[alive], len(sizes) * 64) for token in sample]):
            return None
    boxes, images = np.zeros((count, 4), np.float32), np.full(count, -1, np.int64)
    for token in range(count):
        weights = energy(token)
        if not weights.any():
            continue
        image = int(np.bincount(owner[weights > 0], weights[weights > 0]).argmax())
        images[token] = image
        weights[owner != image] = 0
        for axis, (source, order) in enumerate(zip((x, y), orders, strict=True)):
            low, high = _spread(source[order], weights[order])
            boxes[token, axis], boxes[token, axis + 2] = max(0.0, low), min(float(sizes[image][axis]), high)
    return Places(boxes, images)


def _spread(source: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Extent of sorted positions by their weights."""
    read = weights > 0
    distinct, first = np.unique(source[read].round(3), return_index=True)
    if len(distinct) == 1:
        return float(distinct[0]) - 0.5, float(distinct[0]) + 0.5
    totals = np.add.reduceat(weights[read], first)
    steps = np.diff(distinct)
    edges = np.concatenate([
        [distinct[0] - steps[0] / 2], distinct[:-1] + steps / 2, [distinct[-1] + steps[-1] / 2]
    ])  # fmt: skip
    below = np.concatenate([[0.0], np.cumsum(totals)]) / totals.sum()
    low, high = np.interp([0.1, 0.9], below, edges)
    middle, half = (low + high) / 2, (high - low) / 2 / 0.8
    return max(float(edges[0]), middle - half), min(float(edges[-1]), middle + half)


def _look_alike(energies: Sequence[np.ndarray]) -> bool:
    """Whether tokens read the same parts of the pictures, each about as much as the others do."""
    stacked = np.stack([energy for energy in energies if energy.any()] or [np.ones(1)])
    if len(stacked) < 2:
        return False
    unit = stacked / np.linalg.norm(stacked, axis=1, keepdims=True)
    cosines = unit @ unit.T
    return bool(cosines[~np.eye(len(unit), dtype=bool)].mean() > _ALIKE)
