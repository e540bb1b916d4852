"""Teacher-forcing inputs of one batch row, besides its token ids."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from lvlm_probe.models.inputs import is_separate
from lvlm_probe.recording.prompt_images import NotRecorded

# Rebuilt from the tokens by every replay, or of no use to one.
_NOT_REPLAYED = ("input_ids", "inputs", "attention_mask", "position_ids", "cache_position", "labels")


def image_token_mask(inputs: Mapping[str, Any], tokens: Sequence[int]) -> torch.Tensor | None:
    """Positions of the prompts that take image features, ``(batch, P)`` bool: those of the ``tokens``, or what an
    input of the family says (Kosmos-2's ``image_embeds_position_mask``); ``None`` where there are none to take.
    """
    ids: torch.Tensor = inputs["input_ids"]
    if tokens:
        return torch.isin(ids, torch.tensor(tokens, dtype=ids.dtype, device=ids.device))
    masks = [v for name, v in inputs.items() if name.endswith("position_mask") and v.shape == ids.shape]
    return masks[0].to(ids.device) == 1 if masks else None


def columns_of(places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions that are True in each row of ``places``, ``(batch, key)``, and which of them are no filling."""
    width = int(places.sum(1).max())
    order = places.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    return order, places.gather(1, order)


def row_inputs(
    inputs: Mapping[str, Any],
    row: int,
    real: torch.Tensor | None,
    alone: Mapping[str, torch.Tensor],
    is_pixel_name: Callable[[str], bool],
    absent: Collection[str] = (),
) -> tuple[dict[str, torch.Tensor], bool]:
    """The inputs of one row as it would have been asked alone.

    Args:
        inputs: the tensors given to ``generate()``.
        row: row of the batch.
        real: ``(P,)`` bool, which of its prompt positions are not padding; ``None`` for all.
        alone: what the image processor makes of the row's own images; empty where that is not known, or needless.
        is_pixel_name: whether an input carries the image.
        absent: inputs that the row alone would not have been given.

    Returns:
        the inputs on the CPU, and whether images were left out that only fill the row up to the batch's longest.

    Raises:
        NotRecorded: an input cannot be divided among the rows.
    """
    ids = inputs["input_ids"]
    kept: dict[str, torch.Tensor] = {}
    padded = False
    for name, value in inputs.items():
        if (name in _NOT_REPLAYED and not is_pixel_name(name)) or name in absent:
            continue
        if name in alone:
            made = alone[name].to(value.dtype)
            # The processor around an image processor may put an axis of prompts in front (Idefics).
            kept[name] = made[None] if value.ndim == made.ndim + 1 else made
        elif (
            value.ndim >= 2
            and value.shape[:2] == ids.shape
            and not is_pixel_name(name)
            and not is_separate(name, inputs)
        ):
            own = (value[row][real] if real is not None else value[row])[None]
            kept[name] = _unpadded(own, inputs, alone)
            padded |= kept[name].shape != own.shape
        else:
            kept[name] = _split(name, value, row, len(ids))
    return {name: value.detach().cpu() for name, value in kept.items()}, padded


def _unpadded(
    value: torch.Tensor, batch: Mapping[str, torch.Tensor], alone: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """A sequence input ``(1, P, ...)`` without the images that one row of a batch only has as padding.

    Cross-attention masks have a place per image (and tile) of the longest row: axes that pixel inputs have too.
    """
    extra = value.shape[2:]
    for name, made in alone.items():
        shape, own = (batch[name].shape[1:] if name in batch else ()), made.shape[1:]
        if extra and len(own) >= len(extra) and shape[: len(extra)] == extra and own[: len(extra)] != extra:
            return value[(slice(None), slice(None), *(slice(size) for size in own[: len(extra)]))]
    return value


def _split(name: str, value: torch.Tensor, row: int, batch: int) -> torch.Tensor:
    if batch == 1 or value.ndim == 0:
        return value
    share, odd = divmod(len(value), batch)
    if odd or share == 0:
        raise NotRecorded(
            f"{name} of shape {tuple(value.shape)} cannot be divided among {batch} prompts; attach the processor, "
            f"or record one prompt at a time. Nothing is recorded"
        )
    return value[row * share : (row + 1) * share]
