"""Which part of the image each token inside a vision encoder stands for, found with a few short backward passes.

Tokens of an encoder come in any order (windows, merge groups, tiles as batch entries, a class token in front). In front
of its first block every token still depends on its own patch alone, so that a ``SignCode`` names the token of every
element of the pixel inputs, and the traced geometry of the processor says where that element comes from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lvlm_probe.boxes.painting import have_extent, source_span
from lvlm_probe.boxes.sign_code import SignCode, extents
from lvlm_probe.errors import ExplainError
from lvlm_probe.hooks import HookSet
from lvlm_probe.trace.clips import Clip, images_of

if TYPE_CHECKING:
    from lvlm_probe.replaying import Replay

_SHARED = 0.3  # of the elements a token reads, which its neighbours may read too (an image resized inside the model)


@dataclass(frozen=True)
class EncoderTokens:
    """The tokens that one encoder's blocks work on, for one image or clip of the prompt.

    Attributes:
        encoder: path of the encoder.
        blocks: paths of its blocks, in order.
        shape: leading shape of a block's input without the channels: ``(token,)`` or ``(view, token)``.
        boxes: ``(view * token, 4)`` float32, ``x0, y0, x1, y1`` in pixels of the image, or the tubes of a clip
            (``painting``); all 0 for a token without pixels (a class token, padding, another image).
    """

    encoder: str
    blocks: tuple[str, ...]
    shape: tuple[int, ...]
    boxes: np.ndarray

    @property
    def live(self) -> np.ndarray:
        """Which tokens stand for a part of the image, ``(view * token,)`` bool."""
        return have_extent(self.boxes)


def blocks_of(model: nn.Module, encoder: str) -> tuple[str, ...]:
    """Paths of an encoder's blocks: the longest list of like modules in it, the first of several that are as long. Of a
    convolutional encoder its stages, the outermost such list: each has a resolution of its own.

    Raises:
        ExplainError: It has none.
    """
    root = model.get_submodule(encoder)
    best: tuple[str, ...] = ()
    stages = is_convolutional(model, encoder)
    for path, module in root.named_modules(prefix=encoder):
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len({type(m) for m in module}) != 1:
            continue
        if isinstance(module, nn.Sequential) and not (stages or _attends(module[0])):
            continue  # a small part, as an MLP is
        if len(module) > max(len(best), 1 if stages else 0):
            best = tuple(f"{path}.{index}" for index in range(len(module)))
            if stages:
                break
    if not best:
        raise ExplainError(f"the encoder {encoder} ({type(root).__name__}) has no list of blocks to look at")
    return best


def is_convolutional(model: nn.Module, encoder: str) -> bool:
    """Whether an encoder has convolutions beyond the one that cuts patches, and no attention."""
    root = model.get_submodule(encoder)
    return not _attends(root) and sum(isinstance(module, nn.Conv2d) for module in root.modules()) > 1


def _attends(module: nn.Module) -> bool:
    names = (type(part).__name__.lower() for part in module.modules())
    return any("attention" in name or "attn" in name for name in names)


def chosen_encoder(replay: Replay, encoder: int | str, among: Sequence[str] | None = None) -> str:
    """The path of one of the model's encoders.

    Args:
        encoder: Its number, counted from 0; its path; or a part of its path or of the name of a class in it that no
            other encoder has, in any case (``"siglip"``).
        among: The encoders to choose from; by default all of the model.

    Raises:
        ExplainError: There is none such, or several.
    """
    encoders = tuple(encoders_of(replay) if among is None else among)
    if isinstance(encoder, int):
        if not 0 <= encoder < len(encoders):
            raise ExplainError(f"encoder={encoder}, but there are {len(encoders)}, counted from 0")
        return encoders[encoder]
    if encoder in encoders:
        return encoder
    wanted = encoder.lower()
    kinds = {
        path: (path, *(type(module).__name__ for module in replay.model.get_submodule(path).modules()))
        for path in encoders
    }
    found = [path for path, names in kinds.items() if any(wanted in name.lower() for name in names)]
    if len(found) != 1:
        listed = ", ".join(f"{path} ({type(replay.model.get_submodule(path)).__name__})" for path in encoders)
        raise ExplainError(f"encoder={encoder!r} fits {len(found) or 'none'} of the encoders; those are {listed}")
    return found[0]


class _Stop(Exception):
    """Leaves the model's forward once the module that is looked for has been reached."""


def encoder_tokens(replay: Replay, encoder: str, target: int | Clip = 0) -> EncoderTokens:
    """Boxes or tubes of the tokens of one encoder, once per replay: one forward pass up to its first block, and back
    from there once per binary digit of their number.

    Raises:
        ExplainError: There is no processor to trace, or a token of the encoder does not stand for one patch.
    """
    found = _kept(replay, encoder, target)
    if found is None:
        raise ExplainError(
            f"the pass did not reach {blocks_of(replay.model, encoder)[0]}: its encoder takes no part in this answer"
        )
    return found


def tokens_that_read(replay: Replay, encoder: int | str, target: int | Clip) -> EncoderTokens:
    """The tokens of the chosen encoder (``chosen_encoder``); of encoder 0, of the first that reads the image or clip.

    Raises:
        ExplainError: as ``chosen_encoder`` and ``encoder_tokens``, or none reads it.
    """
    *before, last = encoders_of(replay) if encoder == 0 else (chosen_encoder(replay, encoder),)
    for path in before:
        found = _kept(replay, path, target)
        if found is not None and found.live.any():
            return found
    found = encoder_tokens(replay, last, target)
    if not found.live.any():
        raise ExplainError(f"no token of {last} stands for a part of the image")
    return found


def _kept(replay: Replay, encoder: str, target: int | Clip) -> EncoderTokens | None:
    """``encoder_tokens``; ``None`` where the pass does not reach the encoder."""
    replay = replay.plain  # one sequence per image
    known, key = replay.kept.facts, ("encoder tokens", encoder, target)
    if key not in known:
        with torch.enable_grad():
            known[key] = _find(replay, encoder, target)
    found: EncoderTokens | None = known[key]
    return found


def _find(replay: Replay, encoder: str, target: int | Clip) -> EncoderTokens | None:
    path = replay.path
    blocks = blocks_of(replay.model, encoder)
    if is_convolutional(replay.model, encoder):
        raise ExplainError(
            f"not applicable: {encoder} is a convolutional encoder, without tokens or attention; name another one of "
            f"{', '.join(replay.anatomy.encoders)}, or use a method that masks the image"
        )
    inputs = dict(path.inputs)
    leaves = {name: inputs[name].detach().clone().requires_grad_(True) for name in path.pixel_keys}
    entered: list[torch.Tensor] = []

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else next(v for v in kwargs.values() if isinstance(v, torch.Tensor))
        entered.append(given)
        raise _Stop

    with replay.replica.use() as model, HookSet() as hooks:
        hooks.forward_pre(model.get_submodule(blocks[0]), enter, name="first block", fenced=False)
        with contextlib.suppress(_Stop):
            replay.run_inputs({**inputs, **leaves})
    if not entered:
        return None
    (hidden,) = entered
    if hidden.ndim not in (2, 3):
        raise ExplainError(
            f"not applicable: {blocks[0]} works on {tuple(hidden.shape)}, not on a sequence of tokens, which methods "
            f"over tokens and attention read; use a method that masks the image"
        )
    if not hidden.requires_grad:
        raise ExplainError(f"no gradient reaches {encoder} from the pixels: the model runs it without autograd")
    shape = tuple(hidden.shape[:-1])
    count = int(np.prod(shape))
    boxes = _boxes(hidden.reshape(count, -1), leaves, path, target)
    if boxes is None and hidden.ndim == 3 and len(hidden) > 1:
        # A model that cuts views itself may show a part of the image in several, as a whole and as a crop.
        parts = [_boxes(view, leaves, path, target) for view in hidden]
        known = [part for part in parts if part is not None]
        boxes = np.concatenate(known) if len(known) == len(parts) else None
    if boxes is None:
        raise ExplainError(
            f"tokens of {encoder} do not stand for one patch each in front of its first block (overlapping "
            f"convolutions, or mixing before it), so their places in the image cannot be told"
        )
    return EncoderTokens(encoder, blocks, shape, boxes)


def _boxes(
    hidden: torch.Tensor, leaves: Mapping[str, torch.Tensor], path: Any, target: int | Clip
) -> np.ndarray | None:
    """Boxes or tubes of the tokens of ``hidden``, ``(token, channel)``; ``None``: several read the same elements."""
    count = len(hidden)
    code = SignCode(hidden, leaves.values())
    size = _extent(path, target)
    boxes = np.zeros((count, 2 * len(size)), np.float32)
    for place, name in enumerate(leaves):
        if not code.plain[place].any():
            continue
        *sources, alive = _sources(path, name, target)
        clear = (code.plain[place] != 0) & alive
        token, shared = code.read(place, clear)
        if shared.sum() > _SHARED * len(shared):
            return None
        for axis, (source, edge) in enumerate(zip(sources, size, strict=True)):
            found, low, high = extents(source[clear][~shared], token[~shared])
            boxes[found, axis], boxes[found, axis + len(size)] = low.clip(0, edge), high.clip(0, edge)
    return boxes


def _extent(path: Any, target: int | Clip) -> tuple[int, ...]:
    """``(width, height)`` of an image, or ``(width, height, frames)`` of a clip."""
    size: tuple[int, ...] = tuple(path.image_sizes[images_of(target)[0]])
    return size if isinstance(target, int) else (*size, target.frames)


def _sources(path: Any, name: str, target: int | Clip) -> list[np.ndarray]:
    """Where the elements of a pixel input come from along each axis of ``_extent``, and which come from there, bool."""
    x, y, owner, alive = (part.numpy() for part in path.coordinates(name))
    if isinstance(target, int):
        return [x, y, alive & (owner == target)]
    return [x, y, owner - target.first + 0.5, alive & np.isin(owner, target.images)]


def encoders_of(replay: Replay) -> tuple[str, ...]:
    """Paths of the model's vision encoders. Raises ``ExplainError`` when it has none."""
    found = replay.anatomy.encoders
    if not found:
        raise ExplainError(f"{type(replay.model).__name__} has no vision encoder of its own to look into")
    return found


def feature_map_boxes(replay: Replay, module: str, output: torch.Tensor, target: int | Clip) -> np.ndarray:
    """Boxes of the cells of a convolutional feature map, ``(view * row * col, 4)`` float32, in pixels of the image; of
    a clip tubes.

    A cell stands for its even share of the pixel input that gave the map: a receptive field's centre, not its reach.

    Args:
        output: ``(view, channel, row, col)``, what ``module`` gave.

    Raises:
        ExplainError: No pixel input that the module reads has as many views.
    """
    path = replay.path
    views, _, rows, cols = output.shape
    for name in path.pixel_keys if len(path.pixel_keys) == 1 else _read_by(replay, module):
        parts = _sources(path, name, target)
        shape = parts[0].shape
        if len(shape) < 4 or int(np.prod(shape[:-3])) != views:
            continue
        *sources, mine = (part.reshape(views, *shape[-3:]) for part in parts)
        size = _extent(path, target)
        tops = np.linspace(0, shape[-2], rows + 1).round().astype(int)
        lefts = np.linspace(0, shape[-1], cols + 1).round().astype(int)
        boxes = np.zeros((views, rows, cols, 2 * len(size)), np.float32)
        for view, row, col in np.ndindex(views, rows, cols):
            part = np.s_[view, :, tops[row] : tops[row + 1], lefts[col] : lefts[col + 1]]
            keep = mine[part]
            if keep.any():
                spans = [source_span(source[part][keep], edge) for source, edge in zip(sources, size, strict=True)]
                boxes[view, row, col] = np.concatenate(list(zip(*spans, strict=True)))
        return boxes.reshape(-1, 2 * len(size))
    raise ExplainError(f"no pixel input has the {views} views of {module}, so its cells cannot be placed")


def _read_by(replay: Replay, module: str) -> list[str]:
    """The pixel inputs that a module's output depends on, where a model has one for each of its encoders."""
    path = replay.path
    inputs = dict(path.inputs)
    leaves = {name: inputs[name].detach().clone().requires_grad_(True) for name in path.pixel_keys}
    given: list[torch.Tensor] = []

    def leave(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        given.append(output if isinstance(output, torch.Tensor) else output[0])
        raise _Stop

    with replay.replica.use() as model, HookSet() as hooks, torch.enable_grad():
        hooks.forward(model.get_submodule(module), leave, name="sources", fenced=False)
        with contextlib.suppress(_Stop):
            replay.run_inputs({**inputs, **leaves})
    if not given or not given[0].requires_grad:
        return []
    found = torch.autograd.grad(given[0].float().square().sum(), list(leaves.values()), allow_unused=True)
    return [name for name, gradient in zip(leaves, found, strict=True) if gradient is not None and gradient.any()]
