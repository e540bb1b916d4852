"""Which part of the picture each token inside a vision encoder stands for, found with a few short backward passes.

Tokens of an encoder come in any order (windows, merge groups, tiles as batch entries, a class token in front). In front
of its first block every token still depends on its own patch alone, so that a ``SignCode`` names the token of every
element of the pixel inputs, and the traced geometry of the processor says where that element comes from.
"""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lvlm_probe.errors import ExplainError
from lvlm_probe.hooks import HookSet
from lvlm_probe.layout import source_span
from lvlm_probe.places import SignCode, extents

if TYPE_CHECKING:
    from lvlm_probe.player import Replay

__all__ = ["EncoderTokens", "blocks_of", "encoder_tokens", "encoders_of", "feature_map_boxes"]

_KNOWN: weakref.WeakKeyDictionary[Any, dict[tuple[str, int], EncoderTokens]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class EncoderTokens:
    """The tokens that one encoder's blocks work on, for one picture of the prompt.

    Attributes:
        encoder: path of the encoder.
        blocks: paths of its blocks, in order.
        shape: leading shape of a block's input without the channels: ``(token,)`` or ``(view, token)``.
        boxes: ``(view * token, 4)`` float32, ``x0, y0, x1, y1`` in pixels of the picture; all 0 for a token without
            pixels (a class token, padding, another picture).
    """

    encoder: str
    blocks: tuple[str, ...]
    shape: tuple[int, ...]
    boxes: np.ndarray

    @property
    def live(self) -> np.ndarray:
        """Which tokens stand for a part of the picture, ``(view * token,)`` bool."""
        return (self.boxes[:, 2] > self.boxes[:, 0]) & (self.boxes[:, 3] > self.boxes[:, 1])


def blocks_of(model: nn.Module, encoder: str) -> tuple[str, ...]:
    """Paths of an encoder's blocks: the longest list of like modules in it, the first of several that are as long.

    Raises:
        ExplainError: It has none.
    """
    root = model.get_submodule(encoder)
    best: tuple[str, ...] = ()
    for path, module in root.named_modules(prefix=encoder):
        if isinstance(module, nn.ModuleList) and len(module) > len(best) and len({type(m) for m in module}) == 1:
            best = tuple(f"{path}.{index}" for index in range(len(module)))
    if not best:
        raise ExplainError(f"the encoder {encoder} ({type(root).__name__}) has no list of blocks to look at")
    return best


class _Stop(Exception):
    """Leaves the model's forward once the first block has been reached."""


def encoder_tokens(replay: Replay, encoder: str, image: int = 0) -> EncoderTokens:
    """Boxes of the tokens of one encoder, once per replay: one forward pass up to its first block, and back from there
    once per binary digit of their number.

    Raises:
        ExplainError: There is no processor to trace, or a token of the encoder does not stand for one patch.
    """
    known = _KNOWN.setdefault(replay, {})
    if (encoder, image) not in known:
        known[encoder, image] = _find(replay, encoder, image)
    return known[encoder, image]


def _find(replay: Replay, encoder: str, image: int) -> EncoderTokens:
    path: Any = replay.path
    if not hasattr(path, "coordinates"):
        raise ExplainError(
            f"where the tokens of {encoder} are in the picture is read off the processor: replay with one "
            f"(probe.replay(trace, model, processor))"
        )
    blocks = blocks_of(replay.model, encoder)
    inputs = dict(path.inputs)
    leaves = {name: inputs[name].detach().clone().requires_grad_(True) for name in path.pixel_keys}
    entered: list[torch.Tensor] = []

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else next(v for v in kwargs.values() if isinstance(v, torch.Tensor))
        entered.append(given)
        raise _Stop

    with HookSet() as hooks, torch.enable_grad():
        hooks.forward_pre(replay.model.get_submodule(blocks[0]), enter, name="first block", fenced=False)
        with contextlib.suppress(_Stop):
            replay.run_inputs({**inputs, **leaves})
    if not entered:
        raise ExplainError(f"the pass did not reach {blocks[0]}: its encoder takes no part in this answer")
    (hidden,) = entered
    if hidden.ndim not in (2, 3):
        raise ExplainError(
            f"{blocks[0]} works on {tuple(hidden.shape)}, not on a sequence of tokens: a convolutional encoder, for "
            f"which methods over attention are not applicable"
        )
    if not hidden.requires_grad:
        raise ExplainError(f"no gradient reaches {encoder} from the pixels: the model runs it without autograd")
    shape = tuple(hidden.shape[:-1])
    count = int(np.prod(shape))
    code = SignCode(hidden.reshape(count, -1), leaves.values())
    boxes = np.zeros((count, 4), np.float32)
    for place, name in enumerate(leaves):
        if not code.plain[place].any():
            continue
        x, y, owner, alive = (part.numpy() for part in path.coordinates(name))
        clear = (code.plain[place] != 0) & alive & (owner == image)
        token, shared = code.read(place, clear)
        if shared.any():
            raise ExplainError(
                f"tokens of {encoder} do not stand for one patch each in front of its first block (overlapping "
                f"convolutions, or mixing before it), so their places in the picture cannot be told"
            )
        for axis, (source, size) in enumerate(zip((x, y), path.image_sizes[image], strict=True)):
            found, low, high = extents(source[clear], token)
            boxes[found, axis], boxes[found, axis + 2] = low.clip(0, size), high.clip(0, size)
    return EncoderTokens(encoder, blocks, shape, boxes)


def encoders_of(replay: Replay) -> tuple[str, ...]:
    """Paths of the model's vision encoders. Raises ``ExplainError`` when it has none."""
    found = replay.anatomy.encoders
    if not found:
        raise ExplainError(f"{type(replay.model).__name__} has no vision encoder of its own to look into")
    return found


def feature_map_boxes(replay: Replay, module: str, output: torch.Tensor, image: int) -> np.ndarray:
    """Boxes of the cells of a convolutional feature map, ``(view * row * col, 4)`` float32, in pixels of the picture.

    A cell stands for its even share of the pixel input that gave the map: a receptive field's centre, not its reach.

    Args:
        output: ``(view, channel, row, col)``, what ``module`` gave.

    Raises:
        ExplainError: No pixel input has as many views.
    """
    path: Any = replay.path
    views, _, rows, cols = output.shape
    if not hasattr(path, "coordinates"):
        raise ExplainError(f"where the cells of {module} are in the picture is read off the processor: replay with one")
    for name in path.pixel_keys:
        x, y, owner, alive = (part.numpy() for part in path.coordinates(name))
        if x.ndim < 4 or int(np.prod(x.shape[:-3])) != views:
            continue
        x, y, mine = (part.reshape(views, *part.shape[-3:]) for part in (x, y, alive & (owner == image)))
        width, height = path.image_sizes[image]
        tops = np.linspace(0, x.shape[-2], rows + 1).round().astype(int)
        lefts = np.linspace(0, x.shape[-1], cols + 1).round().astype(int)
        boxes = np.zeros((views, rows, cols, 4), np.float32)
        for view, row, col in np.ndindex(views, rows, cols):
            part = np.s_[view, :, tops[row] : tops[row + 1], lefts[col] : lefts[col + 1]]
            keep = mine[part]
            if keep.any():
                across, down = source_span(x[part][keep], width), source_span(y[part][keep], height)
                boxes[view, row, col] = across[0], down[0], across[1], down[1]
        return boxes.reshape(-1, 4)
    raise ExplainError(f"no pixel input has the {views} views of {module}, so its cells cannot be placed")
