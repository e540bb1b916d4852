"""Micro-batches: how many masks go through the model at once, and how to go on when memory runs out.

Then fewer go at once, then layers run again in backward, then there is an error that helps. Only the micro-batch that
failed is done again.

The number follows one rule from what does not change between calls (layers, length of the sequence, size of the
device): the same call groups its masks in the same way, and so rounds in the same way, whatever ran before it.
"""

from __future__ import annotations

import gc
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lvlm_probe.errors import ReplayError
from lvlm_probe.kinds import is_whole
from lvlm_probe.models.exhaustion import does_not_fit, ran_out
from lvlm_probe.models.quantised import stored_tensors
from lvlm_probe.models.replica import Replica, duplicated

_log = logging.getLogger("lvlm_probe")

CPU_BYTES = 768 << 20
"""Bytes that one micro-batch may keep for its backward pass on a CPU: larger ones fall out of the caches."""
_MOST = 64  # more masks at once are no faster anywhere
_PATCH = 3 * 14 * 14  # numbers of pixel input that become one position of an encoder, at the usual patch size

Run = Callable[[torch.Tensor, slice], Any]
"""What is done with a micro-batch, given its masks and their place among all."""


@dataclass
class PassCounter:
    """Number of images that went through the model, forward and backward.

    ``within`` is a counter that counts along, e.g. the replay's for that of one explanation.
    """

    forward: int = 0
    backward: int = 0
    within: PassCounter | None = field(default=None, repr=False)

    def add(self, *, forward: int = 0, backward: int = 0) -> None:
        """Count images."""
        self.forward += forward
        self.backward += backward
        if self.within is not None:
            self.within.add(forward=forward, backward=backward)


@dataclass
class Limits:
    """Settings of passes; shared by the views of a replay, and narrowed for all of them when memory runs out.

    Attributes:
        micro_batch: masks per pass; ``None`` is ``masks_at_once``.
        gradient_checkpointing: layers are run again in backward, as the user wants it.
        recompute: the same, because memory ran out.
        recovered: what was changed when memory ran out, in order.
    """

    micro_batch: int | None = None
    gradient_checkpointing: bool = False
    recovered: list[str] = field(default_factory=list)
    recompute: bool = False

    def __post_init__(self) -> None:
        """Raises ``ReplayError`` for what is no number of masks."""
        count: object = self.micro_batch
        if count is not None and not (is_whole(count) and int(count) >= 1):
            raise ReplayError(f"micro_batch is a number of masks, at least 1; got {self.micro_batch!r}")


def masks_at_once(
    model: torch.nn.Module,
    encoders: Sequence[str],
    pixel_inputs: Mapping[str, torch.Tensor],
    length: int,
    device: torch.device,
) -> int:
    """The rule: as many masks as keep ``CPU_BYTES`` on a CPU, or half of what an accelerator has beside the weights; 1
    to 64. Every linear layer is taken to keep its input and output, at every position.

    Args:
        model: the model that passes run on.
        encoders: paths of its image encoders.
        pixel_inputs: of one prompt.
        length: positions of the teacher-forced sequence.
        device: where activations are.
    """
    decoder = encoder = 0
    for path, module in model.named_modules():
        inside, outside = (getattr(module, name, None) for name in ("in_features", "out_features"))
        parts = path.split(".")
        idle = "experts" in parts[:-1] and parts[parts.index("experts") + 1] not in ("0", "1")  # of a mixture, two work
        if not (isinstance(inside, int) and isinstance(outside, int)) or idle or parts[-1] == "lm_head":
            continue
        if any(path.startswith(f"{tower}.") for tower in encoders):
            encoder += inside + outside
        else:
            decoder += inside + outside
    pixels = sum(value.numel() for value in pixel_inputs.values() if value.is_floating_point())
    width = next((weight.element_size() for weight in model.parameters() if weight.is_floating_point()), 4)
    each = max(width, 2) * (decoder * length + encoder * math.ceil(pixels / _PATCH))
    room = CPU_BYTES
    if device.type == "cuda":
        # The fullest card says how many.
        cards = weights_on_cards(model, device)
        room = min(max(0, torch.cuda.mem_get_info(card)[1] - held) // 2 for card, held in cards.items())
    return max(1, min(_MOST, room // max(1, each)))


def weights_on_cards(model: torch.nn.Module, device: torch.device) -> dict[torch.device, int]:
    """Every CUDA device that a model lies on, ``device`` first, and the bytes of its weights there."""
    found = Counter({device: 0})
    for weight in stored_tensors(model):
        if weight.device.type == "cuda":
            found[weight.device] += weight.numel() * weight.element_size()
    return dict(found)


def in_micro_batches(
    masks: torch.Tensor,
    size: int,
    run: Run,
    *,
    limits: Limits,
    model: torch.nn.Module,
    inside: bool,
    where: str,
) -> list[Any]:
    """``run`` over micro-batches of equal size, at most ``size``; goes on in smaller ones when memory runs out.

    Where one mask does not fit, layers are run again in backward from there on.

    Args:
        masks: ``(batch, ...)``.
        size: masks at once, at most.
        run: what is done with each micro-batch.
        limits: remembers what was changed.
        model: the model that runs.
        inside: somebody looks inside the passes, who would see layers twice that run again.
        where: what does not fit, if nothing fits: an answer, "does not fit into memory of", a device.

    Returns:
        what ``run`` gave, in order.

    Raises:
        OutOfMemory: one mask does not fit, whatever is tried.
    """
    results: list[Any] = []
    start, switched = 0, False
    while start < len(masks):
        rest = len(masks) - start
        count = math.ceil(rest / math.ceil(rest / size))
        part = slice(start, start + count)
        try:
            results.append(run(masks[part], part))
        except Exception as error:
            if not ran_out(error):
                raise
            recomputes = inside or limits.gradient_checkpointing or limits.recompute
            if count == 1 and (recomputes or not _can_recompute(model)):
                if switched:
                    limits.recompute = False
                state = " even with gradient checkpointing" * (switched or limits.gradient_checkpointing)
                another = ", or use a method that does not look inside the pass (needs_of(method))" * inside
                raise does_not_fit(f"one mask on {where}{state}", error, f"use a smaller image{another}") from error
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


def _can_recompute(model: torch.nn.Module) -> bool:
    """Whether it has layers that can be checkpointed."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return any(isinstance(module, GradientCheckpointingLayer) for module in model.modules())


class Recomputed(torch.autograd.Function):
    """More masks than fit at once, differentiable: each micro-batch is run again in backward, with the hooks of now.

    ``each(masks, run)`` gives what ``run`` gives, by micro-batches.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        masks: torch.Tensor,
        replica: Replica,
        passes: PassCounter,
        each: Callable[[torch.Tensor, Run], list[Any]],
        run: Run,
    ) -> torch.Tensor:
        ctx.save_for_backward(masks)
        ctx.replica, ctx.passes, ctx.each, ctx.run = replica, passes, each, run
        with replica.use() as model:
            ctx.model = duplicated(model, bare=False)
        return torch.cat(each(masks, run))

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (masks,) = ctx.saved_tensors

        def one(some: torch.Tensor, part: slice) -> torch.Tensor:
            leaf = some.detach().requires_grad_(True)
            with torch.enable_grad():
                result = ctx.run(leaf, part)
            (gradient,) = torch.autograd.grad(result, leaf, upstream[part])
            ctx.passes.add(backward=len(some))
            return gradient

        with ctx.replica.instead(ctx.model):
            return (torch.cat(ctx.each(masks, one)), None, None, None, None)


def noise_seeds(count: int, noise: float, generator: torch.Generator | None) -> torch.Tensor:
    """One noise seed per mask, so that results do not depend on how masks are grouped into micro-batches.

    Raises ``ReplayError`` for a deviation that is none.
    """
    if not 0 <= noise < math.inf:
        raise ReplayError(f"noise is a standard deviation, finite and not negative; got {noise!r}")
    if not noise:
        return torch.zeros(count, dtype=torch.long)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    return torch.randint(2**62, (count,), generator=generator, device=generator.device).cpu()


def noise_like(pixels: torch.Tensor, deviation: float, seeds: torch.Tensor) -> torch.Tensor:
    """Gaussian noise for the pixel inputs of ``len(seeds)`` masks, shaped like ``pixels``, from one seed per mask.

    It is drawn on their device: another kind of device draws other noise from the same seeds.
    """
    rows = pixels.shape[0] // len(seeds)
    noise = torch.empty(len(seeds), rows, *pixels.shape[1:], dtype=torch.float32, device=pixels.device)
    for part, seed in zip(noise, seeds, strict=True):
        part.normal_(std=deviation, generator=torch.Generator(pixels.device).manual_seed(int(seed)))
    return noise.flatten(0, 1).to(pixels.dtype)
