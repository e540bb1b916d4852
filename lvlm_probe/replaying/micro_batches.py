"""How many masks go through the model at once, and how to go on when memory runs out: fewer at once, then layers run
again in backward, then an error that helps. Only the micro-batch that failed is done again.

The number follows one rule from what does not change between calls (layers, length of the sequence, size of the
device): the same call groups its masks in the same way, and so rounds in the same way, whatever ran before it.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lvlm_probe.errors import OutOfMemory

if TYPE_CHECKING:
    from lvlm_probe.replaying import Replay

__all__ = ["CPU_BYTES", "Limits", "in_micro_batches", "masks_at_once", "ran_out", "whole_pass"]

_log = logging.getLogger("lvlm_probe")

CPU_BYTES = 768 << 20
"""Bytes that one micro-batch may keep for its backward pass on a CPU: larger ones fall out of the caches."""
_MOST = 64  # more masks at once are no faster anywhere
_PATCH = 3 * 14 * 14  # numbers of pixel input that become one position of an encoder, at the usual patch size


@dataclass
class Limits:
    """How passes are run; shared by the views of a replay, and narrowed for all of them when memory runs out.

    Attributes:
        micro_batch: Masks per pass; ``None`` is ``masks_at_once``.
        gradient_checkpointing: Layers are run again in backward, as the user wants it.
        recompute: The same, because memory ran out.
        recovered: What was changed when memory ran out, in order.
    """

    micro_batch: int | None = None
    gradient_checkpointing: bool = False
    recovered: list[str] = field(default_factory=list)
    recompute: bool = False


def masks_at_once(replay: Replay) -> int:
    """The rule: as many masks as keep ``CPU_BYTES`` on a CPU, or half of what an accelerator has beside the weights; 1
    to 64. Every linear layer is taken to keep its input and output, at every position."""
    decoder = encoder = 0
    for path, module in replay.model.named_modules():
        inside, outside = (getattr(module, name, None) for name in ("in_features", "out_features"))
        parts = path.split(".")
        idle = "experts" in parts[:-1] and parts[parts.index("experts") + 1] not in ("0", "1")  # of a mixture, two work
        if not (isinstance(inside, int) and isinstance(outside, int)) or idle or parts[-1] == "lm_head":
            continue
        if any(path.startswith(f"{tower}.") for tower in replay.anatomy.encoders):
            encoder += inside + outside
        else:
            decoder += inside + outside
    pixels = sum(value.numel() for value in replay.path.inputs.values() if value.is_floating_point())
    width = next((weight.element_size() for weight in replay.model.parameters() if weight.is_floating_point()), 4)
    each = max(width, 2) * (decoder * replay.length + encoder * math.ceil(pixels / _PATCH))
    room = CPU_BYTES
    if replay.device.type == "cuda":
        weights = sum(w.numel() * w.element_size() for w in replay.model.parameters() if w.device == replay.device)
        room = max(0, torch.cuda.mem_get_info(replay.device)[1] - weights) // 2
    return max(1, min(_MOST, room // max(1, each)))


_RAN_OUT = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED", "valid cuDNN algorit")


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out; on the CPU and in accelerators' libraries a RuntimeError does."""
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in _RAN_OUT)
    return told or isinstance(error, torch.OutOfMemoryError | MemoryError)


def in_micro_batches(
    replay: Replay, masks: torch.Tensor, size: int, run: Callable[[torch.Tensor, slice], Any]
) -> list[Any]:
    """``run`` over micro-batches of equal size, at most ``size``; goes on in smaller ones when memory runs out.

    Where one mask does not fit, layers are run again in backward from there on, unless somebody looks inside the pass.
    ``replay.limits`` remembers both. ``run`` is given the masks and their place among all.

    Raises:
        OutOfMemory: one mask does not fit, whatever is tried.
    """
    results: list[Any] = []
    start, switched, limits = 0, False, replay.limits
    while start < len(masks):
        rest = len(masks) - start
        count = math.ceil(rest / math.ceil(rest / size))
        part = slice(start, start + count)
        try:
            results.append(run(masks[part], part))
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            reason = str(error).strip().split("\n")[0]
            if count == 1 and not _can_recompute(replay):
                if switched:
                    limits.recompute = False
                inside = ", or use a method that does not look inside the pass (needs_of(method))" * replay.inside
                state = " even with gradient checkpointing" * (switched or limits.gradient_checkpointing)
                raise OutOfMemory(
                    f"one mask on {replay.trace_id} does not fit into memory of {replay.device}{state} "
                    f"({reason}); load the model in bfloat16 or with device_map='auto', or use a smaller "
                    f"image{inside}"
                ) from error
        else:
            start += count
            continue
        # Out of the handler, where the failed pass is still held by its traceback.
        step = f"{count // 2} at once instead of {count}" if count > 1 else "gradient checkpointing"
        if count > 1:
            size = limits.micro_batch = count // 2
        else:
            limits.recompute = switched = True
        limits.recovered.append(step)
        _log.warning("out of memory with %d masks at once; going on with %s", count, step)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results


def whole_pass(replay: Replay, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """One pass over one picture without a gradient. Raises ``OutOfMemory``, with the way out, where it does not fit."""
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        reason = str(error).strip().split("\n")[0]
        raise OutOfMemory(
            f"one pass over the {replay.prompt_length} prompt and {len(replay.token_ids)} answer tokens of "
            f"{replay.trace_id} does not fit into memory of {replay.device}, even without a mask or gradients "
            f"({reason}); load the model in bfloat16 or with device_map='auto', or record the answer "
            "with a smaller image"
        ) from error


def _can_recompute(replay: Replay) -> bool:
    """Whether layers could be checkpointed and are not."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    possible = any(isinstance(module, GradientCheckpointingLayer) for module in replay.model.modules())
    return possible and not (replay.inside or replay.recomputes)
