"""Passes of ours that harm nobody: callers of one replay take turns, and what layers need runs again on its own."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.nn import functional

from lvlm_probe.errors import ReplayError
from lvlm_probe.hooks import HookSet, replaced
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.models.exhaustion import told_out_of_memory
from lvlm_probe.models.inputs import CACHE_NAMES
from lvlm_probe.models.replica import duplicated
from lvlm_probe.models.wrappers import every_module

P = ParamSpec("P")
R = TypeVar("R")


def outside_modes(function: Callable[P, R]) -> Callable[P, R]:
    """A function that runs outside of the modes of torch that its caller may be in: with gradients off instead of in
    ``torch.inference_mode``, and with the CPU as the default device.

    Tensors made in inference mode cannot be differentiated ever after, so nothing that is kept may be made there. And
    what is made without naming a device, such as the draws of a generator, belongs on the CPU.
    """

    @functools.wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        with contextlib.ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            return function(*args, **kwargs)

    return outside


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return what ``torch.autocast`` of the caller casts to on a device, ``None`` where it is not on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def taking_turns(function: Callable[P, R]) -> Callable[P, R]:
    """For a function of a ``replay``: calls with the same replay, or views of it, take turns, whole calls at a time.
    What is no method of its own (``explain``) looks at the model's weights first (``Replica.use``).
    They run outside of the caller's modes (``outside_modes``). Memory that runs out in one is told as ``OutOfMemory``,
    and an argument of the wrong kind by its name."""
    function = naming_arguments(function)
    names = list(inspect.signature(function).parameters)
    name = "replay" if "replay" in names else "self"
    place = names.index(name)

    @outside_modes
    @told_out_of_memory
    @functools.wraps(function)
    def turn(*args: P.args, **kwargs: P.kwargs) -> R:
        replay = args[place] if place < len(args) else kwargs.get(name)
        if name == "replay" and not hasattr(replay, "trace_id"):  # a trace, too, will do for some
            raise ReplayError(
                f"{function.__name__}() works on a replay, probe.replay(trace, model, processor); got a "
                f"{type(replay).__name__}"
            )
        replica = getattr(replay, "replica", None)
        with contextlib.nullcontext() if replica is None else replica.use(look=name == "replay"):
            return function(*args, **kwargs)

    return turn


@contextmanager
def checkpointed(model: nn.Module, *, enabled: bool = True) -> Iterator[nn.Module]:
    """Gradient checkpointing in eval mode, on exactly the layers that support it.

    transformers checkpoints a layer only in training mode, which would switch on its dropout. Here each layer's
    ``forward`` is run by ``torch.utils.checkpoint`` as it is, so that the gradient stays the same to the last bit.
    Layers run again in backward, which may be in a thread of autograd's, later, and beside another pass. So a
    checkpointed pass runs on a duplicate that is nobody else's: hooks that hang on it now see it whenever it runs.

    Args:
        model: a replica.

    Yields:
        what to run: a duplicate of ``model`` as it is now; where not ``enabled``, ``model``.

    Raises:
        ReplayError: no layer supports it.
    """
    if not enabled:
        yield model
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    own = duplicated(model, bare=False)
    layers = [module for module in own.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ReplayError(
            f"gradient checkpointing is not supported by any layer of {type(model).__name__}; replay without "
            f"gradient_checkpointing"
        )
    for layer in layers:
        # Through __dict__, where accelerate may have put a forward of its own, which then is what runs again.
        vars(layer)["forward"] = _recomputing(layer, layer.forward)
    yield own


def _recomputing(layer: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
    """``original``, run once more in backward instead of keeping what it computed on the way."""
    from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

    # Stopped half-way, accelerate would never put away again the weights it has brought for the recomputation.
    whole = any(weight.is_meta for weight in layer.parameters())
    settings: Any = {"early_stop": not whole} if "early_stop" in inspect.signature(checkpoint).parameters else None

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not getattr(layer, "_can_checkpoint_with_cache", False):  # else its keys would enter a cache twice
            kwargs.update({name: None for name in CACHE_NAMES if kwargs.get(name) is not None})
        if settings is not None:
            return checkpoint(original, *args, use_reentrant=False, **settings, **kwargs)
        with set_checkpoint_early_stop(not whole):  # for all threads; torch 2.8 takes it by the call
            return checkpoint(original, *args, use_reentrant=False, **kwargs)

    return forward


@contextmanager
def even_gradients(model: nn.Module) -> Iterator[None]:
    """Batch norms are handed contiguous gradients.

    torch 2.13 differentiates them wrongly on the CPU where one image's gradient arrives permuted, as it does in a
    tower whose feature map is flattened into tokens (tests/replaying/test_teacher_forcing.py).
    """
    with HookSet() as hooks:
        for module in every_module(model) if torch.is_grad_enabled() else ():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                hooks.forward(module, lambda _m, _a, _k, output: _evened(output), name="batch norm", fenced=False)
        yield


def _evened(output: Any) -> None:
    # A hook and no function around the tensor: what comes next may write into it (Emu3).
    if isinstance(output, torch.Tensor) and output.requires_grad:
        output.register_hook(torch.Tensor.contiguous)


@contextmanager
def patch_gradients(model: torch.nn.Module) -> Iterator[None]:
    """Differentiate patch embeddings on the CPU as one matrix product, in the passes of the block.

    Vision transformers cut an image into patches by a convolution whose stride is its kernel. Each pixel then enters
    one patch only, and the gradient to the pixels is that of the patches times the weights, laid side by side. torch's
    CPU kernels go the way of any convolution there, at a third of the speed (``tests/benchmarks/bench_engine.py``).
    What passes compute forward stays the same to the last bit; weights must be frozen.
    """
    with HookSet() as hooks:
        for module in every_module(model) if torch.is_grad_enabled() else ():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d) and _cuts_patches(module):
                hooks.shadow(module, "forward", _embedding(module))
        yield


def _cuts_patches(module: torch.nn.Conv2d | torch.nn.Conv3d) -> bool:
    return (
        type(module) in (torch.nn.Conv2d, torch.nn.Conv3d)
        and not replaced(module, "forward")
        and module.stride == module.kernel_size
        and not isinstance(module.padding, str)
        and not any(module.padding)
        and max(module.dilation) == module.groups == 1
        and module.weight.device.type == "cpu"
        and not module.weight.requires_grad
    )


def _embedding(module: torch.nn.Conv2d | torch.nn.Conv3d) -> Callable[..., torch.Tensor]:
    axes = len(module.kernel_size)

    def forward(original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        pixels = args[0] if len(args) == 1 and not kwargs else kwargs.get("input")
        if pixels is None or pixels.ndim != axes + 2 or not pixels.requires_grad:
            return original(*args, **kwargs)
        return _Patches.apply(pixels, original, module.weight)

    return forward


class _Patches(torch.autograd.Function):
    """A convolution whose stride is its kernel; differentiable in the pixels."""

    @staticmethod
    def forward(ctx: Any, pixels: torch.Tensor, original: Any, weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.weight, ctx.edges, ctx.dtype = weight.detach(), pixels.shape[2:], pixels.dtype
        return original(pixels)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        out, _, *kernel = weight_shape = ctx.weight.shape
        batch, grid, axes = len(gradient), gradient.shape[2:], len(kernel)
        columns = gradient.reshape(batch, out, -1).transpose(1, 2).reshape(-1, out)
        weight = ctx.weight.reshape(out, -1).to(gradient.dtype)  # under autocast the gradient is in half precision
        pixels = (columns @ weight).to(ctx.dtype).reshape(batch, *grid, *weight_shape[1:])
        # (batch, patches…, channel, kernel…) to (batch, channel, patch, kernel, patch, kernel, …)
        order = [0, axes + 1, *(place for axis in range(axes) for place in (1 + axis, axes + 2 + axis))]
        covered = [patches * edge for patches, edge in zip(grid, kernel, strict=True)]
        pixels = pixels.permute(order).reshape(batch, weight_shape[1], *covered)
        # Pixels beyond the last whole patch enter none.
        missing = [edge - there for edge, there in zip(ctx.edges, covered, strict=True)]
        if any(missing):
            pixels = functional.pad(pixels, [part for edge in reversed(missing) for part in (0, edge)])
        return pixels, None, None
