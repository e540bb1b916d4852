"""Which part of which image each image token stands for, found by asking the model.

Layouts are many: tiles in front of or behind an overview, newline tokens, padding that is cut away, shuffled pixels,
windows, merge groups. One question answers all of them: which elements of the pixel inputs does the feature that enters
the decoder at this token come from? Attention between patches would mix every answer, so it is silenced, outside the
decoder, for one forward pass up to the decoder's first block; from there ``boxes_by_sign_code`` goes back to the
pixels, and the traced geometry of the processor says where in the image they were cut out.

A token that gets nothing once attention is silenced reads the image through attention alone: a resampler's query.
Where it looks depends on what is in the image, so it has no place, and that is said by name.

A token of a clip may read several frames: its place is a tube (``painting``).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lvlm_probe.boxes.painting import have_extent, tubes
from lvlm_probe.boxes.sign_code import boxes_by_sign_code
from lvlm_probe.errors import ExplainError, ImageError, ProbeError
from lvlm_probe.hooks import HookSet
from lvlm_probe.images import ImagePath, PixelPath
from lvlm_probe.models.exhaustion import ran_out
from lvlm_probe.models.families import Places
from lvlm_probe.models.wrappers import computes
from lvlm_probe.replaying.isolation import outside_modes
from lvlm_probe.trace.clips import Clip, images_of

if TYPE_CHECKING:
    from lvlm_probe.replaying import Replay

_KNOWN: weakref.WeakKeyDictionary[Any, dict[bytes, Places]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of one image or clip in the prompt, or the keys of cross-attention where the prompt holds none.

    Attributes:
        positions: ``(image_token,)`` int64, in the prompt; of cross-attention, among its keys.
        rows: ``(image_token,)`` int64, their numbers among the image tokens of all images, in prompt order.
        boxes: ``(image_token, 4)`` float32, ``x0, y0, x1, y1`` in pixels of the original image, or the tubes of a clip
            (``painting``); an empty one (all 0) for a token that stands for no pixel.
        size: ``(width, height)`` of the image, or ``(width, height, frames)`` of the clip.
        cross: they are the keys of cross-attention.
    """

    positions: np.ndarray
    rows: np.ndarray
    boxes: np.ndarray
    size: tuple[int, ...]
    cross: bool = False

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def placed(self) -> ImageTokens:
        """Those that stand for a part of the image: no padding, no newlines."""
        there = have_extent(self.boxes)
        return ImageTokens(self.positions[there], self.rows[there], self.boxes[there], self.size, self.cross)


def image_tokens(replay: Replay, target: int | Clip, *, cross: bool = False, live: bool = True) -> ImageTokens:
    """The tokens of an image or of a clip, as recorded or, failing that, traced now.

    Args:
        replay: the answer on its model, or what stands for it where a trace alone is at hand.
        target: number of the image, or the clip.
        cross: where the prompt holds none, the keys of cross-attention will do.
        live: whether the model is at hand, to be asked for boxes that were not recorded.

    Raises:
        ExplainError: the prompt has no image tokens, or which part of the image each stands for is not known.
    """
    layout = replay.trace.layout  # type: ignore[union-attr]
    cross = cross and len(layout.image_positions) == 0
    frames: np.ndarray | None = None
    if cross:
        rows = getattr(replay.trace, "attention", None)
        boxes, images = (None, None) if rows is None else (rows.key_box, rows.key_image)
    elif len(layout.image_positions) == 0:
        raise ExplainError(
            "the prompt holds no image tokens (the image reaches this model another way, by cross-attention for "
            "instance), so nothing can be drawn per token; use a method that works through masks, like 'igos++'"
        )
    else:
        boxes, images, frames = layout.patch_box, layout.image_index, layout.patch_frames
    # Without a processor the replay's image is its pixel inputs, not the one that recorded boxes refer to.
    if live and (boxes is None or isinstance(replay.path, PixelPath)):
        try:
            places = find_token_boxes(replay, layout.image_positions)
        except ImageError as error:
            what = "key of cross-attention" if cross else "image token"
            none = replay.anatomy.no_gradient or isinstance(error, _NoGradient)
            remain = "'rise', 'occlusion' or 'greedy'" if none else "'igos++' or 'integrated_gradients'"
            raise ExplainError(
                f"which part of the image each {what} stands for is not known ({error}); use what works through "
                f"masks, like {remain}, and evaluate"
            ) from error
        boxes, images, frames = places.boxes, places.images if cross else images, places.frames
    if boxes is None or images is None:
        raise ExplainError(
            f"this trace holds no boxes of {'cross-attention’s keys' if cross else 'its image tokens'} (recorded with "
            f"boxes=False, or a layout that is not known); explain a replay instead of the trace: "
            f"probe.replay(trace, model, processor)"
        )
    clip = None if isinstance(target, int) else target
    mine = np.flatnonzero(images == target if clip is None else np.isin(images, clip.images))
    positions = mine if cross else np.asarray(layout.image_positions)[mine].astype(np.int64)
    own, size = np.asarray(boxes, dtype=np.float32)[mine], replay.image_sizes[images_of(target)[0]]
    if clip is None:
        return ImageTokens(positions, mine, own, size, cross)
    lasting = np.stack([images, images], axis=1) if frames is None else frames
    return ImageTokens(positions, mine, tubes(own, lasting[mine], clip), (*size, clip.frames), cross)


@outside_modes
def find_token_boxes(replay: Replay, positions: np.ndarray) -> Places:
    """Places of the tokens at ``positions`` of the prompt: one pass up to the decoder, and back from there once per
    binary digit of their number (once per token where tokens share patches).

    Without positions, of the states that the decoder's cross-attention reads instead, in the order of its keys. Found
    once per replay.

    Raises:
        ImageError: There is no processor to trace, or the tokens have no place in the image; the message says why.
    """
    replay = replay.plain  # one sequence per image
    known, key = _KNOWN.setdefault(replay, {}), positions.tobytes()
    if key not in known:
        known[key] = _find(replay, positions)
    return known[key]


def _find(replay: Replay, positions: np.ndarray) -> Places:
    declared = replay.anatomy.token_boxes
    # A declaration speaks of pixels of the images; without a processor positions are those in the pixel inputs.
    if declared is not None and len(positions) and isinstance(replay.path, ImagePath):
        places = declared(replay, positions)
        if places is not None:
            return _checked(places, len(positions), type(replay.model).__name__)
    path: Any = replay.path
    if not hasattr(path, "coordinates"):
        raise ImageError("there is no processor to trace")
    name = type(replay.model).__name__
    outside = _attention_modules(replay)
    # A pooling layer that attends within its own window has no other way from pixels to tokens.
    inner = [p for p in outside if _within(p, replay.anatomy.encoders) and any(s.isdigit() for s in p.split("."))]
    try:
        for silenced in (outside, inner) if len(inner) < len(outside) else (outside,):
            with _entry(replay, positions, silenced) as (leaves, hidden):
                found = (
                    boxes_by_sign_code(hidden, leaves, path, alike=silenced is not outside)
                    if hidden.requires_grad
                    else None
                )
                if found is not None:
                    return found
        with _entry(replay, positions, ()) as (_, hidden):
            if not hidden.requires_grad:
                raise _NoGradient(f"no gradient reaches the image tokens of {name} from the pixels")
    except RuntimeError as error:  # a kernel without a derivative
        if isinstance(error, ProbeError) or ran_out(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise _NoGradient(f"no gradient reaches the image tokens of {name} from the pixels: {reason}") from error
    readers = [place for place in outside if place not in inner] or outside[-1:]
    raise ImageError(
        f"the image tokens of {name} read the image through attention alone"
        + (f" ({_owner_of(readers[0])})" if readers else "")
        + ", so that none of them stands for a part of it"
    )


def _checked(places: Places, count: int, name: str) -> Places:
    """What a plugin says, in the shapes that everything after it counts on."""
    boxes = np.asarray(places.boxes, np.float32)
    images = np.asarray(places.images, np.int64)
    if boxes.shape != (count, 4) or images.shape != (count,):
        raise ImageError(
            f"the plugin for {name} gave boxes of shape {boxes.shape} and images of shape {images.shape} for {count} "
            f"image tokens; (token, 4) and (token,) are wanted. Update the plugin"
        )
    return Places(boxes, images)


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
        if not path or not ("attention" in kind or "attn" in kind) or not computes(module):
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


class _NoGradient(ImageError):
    """The pixels of a token cannot be found by gradients, and so no other method's gradient reaches them either."""


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
    # In an encoder-decoder model images enter the encoder's stack, which reads the prompt and no answer; where there is
    # no prompt to read, the decoder's.
    lengths = {len(replay.input_ids)} | (set() if replay.anatomy.encodes_prompt else {replay.length})
    entered: list[torch.Tensor] = []

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.is_floating_point()]
        given = [v for v in given if v.ndim >= 3]
        if not given or _axis(given[0], lengths) is None:
            return
        # Some models add the image in front of a later layer only; up to there nothing depends on the pixels.
        found = given[:1] if len(positions) else [v.flatten(0, -2) for v in given[1:] if v.requires_grad]
        entered[:] = found or entered
        if found and found[0].requires_grad:
            raise _Stop

    with replay.replica.use() as model, HookSet() as hooks, torch.enable_grad():
        for place in silenced:
            hooks.forward(model.get_submodule(place), _silent, name="silent attention", fenced=False)
        for block in _blocks(replay, model):
            hooks.forward_pre(block, enter, name="decoder entry", fenced=False)
        with contextlib.suppress(_Stop):
            replay.run_inputs({**inputs, **leaves})
        if not entered:
            raise ImageError(
                f"the layer of {type(replay.model).__name__} where the image enters its decoder was not found"
            )
        hidden = entered[0]
        if len(positions):
            axis = _axis(hidden, lengths) or 0
            at = torch.as_tensor(np.asarray(positions).copy(), device=hidden.device)
            hidden = hidden.index_select(axis, at).movedim(axis, 0).flatten(1)
        yield leaves, hidden


def _axis(hidden: torch.Tensor, lengths: set[int]) -> int | None:
    """The axis of the sequence: mostly the last but one. Further axes hold versions of the same token (gemma3n keeps
    several, hyper-connections too)."""
    return next((axis for axis in range(hidden.ndim - 2, 0, -1) if hidden.shape[axis] in lengths), None)


def _blocks(replay: Replay, model: nn.Module) -> list[nn.Module]:
    """Modules of every outermost list that is no encoder's: the decoder's layers are among them."""
    lists: list[str] = []
    found: list[nn.Module] = []
    for path, module in model.named_modules():
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
