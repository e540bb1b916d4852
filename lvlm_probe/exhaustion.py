"""Going on when memory runs out: fewer masks at once, then layers run again in backward, then an error that helps.

What is finished is kept: only the micro-batch that failed is done again.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from lvlm_probe.errors import OutOfMemory

if TYPE_CHECKING:
    from lvlm_probe.player import Replay

__all__ = ["in_micro_batches", "ran_out", "whole_pass"]

_log = logging.getLogger("lvlm_probe")


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out. torch has a class for accelerators; on the CPU it is a plain
    ``RuntimeError`` of the allocator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in str(error) or "not enough memory" in str(error) or "out of memory" in str(error)
    )


def in_micro_batches(
    player: Replay, masks: torch.Tensor, size: int, run: Callable[[torch.Tensor, slice], torch.Tensor]
) -> torch.Tensor:
    """``run`` over micro-batches of equal size, joined; goes on in smaller ones when memory runs out.

    Where one mask alone does not fit, the layers of the model are checkpointed from there on, unless somebody is
    looking inside the pass. The replay remembers both.

    Args:
        player: the replay; its ``_micro_batch``, ``_recompute`` and ``recovered`` are set.
        masks: all masks, along the first axis.
        size: how many to try at once.
        run: computes one micro-batch, given its masks and its place among all.

    Raises:
        OutOfMemory: one mask does not fit, whatever is tried.
    """
    results: list[torch.Tensor] = []
    start, switched = 0, False
    while start < len(masks):
        rest = len(masks) - start
        count = math.ceil(rest / math.ceil(rest / size))
        part = slice(start, start + count)
        try:
            results.append(run(masks[part], part))
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            failure = _first_line(error)
            if count == 1 and not _can_recompute(player):
                if switched:
                    player._recompute = False
                raise OutOfMemory(_advice(player, failure, tried=switched)) from error
        else:
            start += count
            continue
        # Out of the handler, where the failed pass is still held by its traceback.
        if count > 1:
            size = player._micro_batch = count // 2
            step = f"{size} at once instead of {count}"
        else:
            player._recompute = switched = True
            step = "gradient checkpointing"
        player.recovered.append(step)
        _log.warning("out of memory with %d masks at once; going on with %s", count, step)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results[0] if len(results) == 1 else torch.cat(results)


def whole_pass(player: Replay, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """One pass over one picture without a gradient: nothing about it can be made smaller here.

    Raises:
        OutOfMemory: it does not fit; the message says what would.
    """
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise OutOfMemory(
            f"one pass over the {player.prompt_length} prompt and {len(player.token_ids)} answer tokens of "
            f"{player.trace_id} does not fit into memory of {player.device}, even without a mask or gradients "
            f"({_first_line(error)}); load the model in bfloat16 or with device_map='auto', or record the answer "
            "with a smaller image"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def _can_recompute(player: Replay) -> bool:
    """Whether layers could be checkpointed and are not."""
    if player._recompute is not False or player.gradient_checkpointing:
        return False
    from transformers.modeling_layers import GradientCheckpointingLayer

    return any(isinstance(module, GradientCheckpointingLayer) for module in player.model.modules())


def _advice(player: Replay, failure: str, *, tried: bool) -> str:
    inside = player._recompute is None
    state = " even with gradient checkpointing" if tried or player.gradient_checkpointing else ""
    other = (
        ", or use a method that does not look inside the pass (needs_of(method)), whose layers can be checkpointed"
        if inside
        else ""
    )
    return (
        f"one mask on {player.trace_id} does not fit into memory of {player.device}{state} ({failure}); load "
        f"the model in bfloat16 or with device_map='auto', or use a smaller image{other}"
    )
