"""Running a user's model so that it is afterwards what it was: mode, flags, weights, generation state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from lvlm_probe.errors import ReplayError
from lvlm_probe.hooks import HookSet
from lvlm_probe.wrappers import every_module, uncompiled

__all__ = ["OWN_PASS", "checkpointed", "even_gradients", "frozen", "own_pass"]

OWN_PASS: ContextVar[bool] = ContextVar("lvlm_probe_own_pass", default=False)
"""True while a teacher-forced pass of ours runs, so that a mask on the user's own calls leaves it alone."""

# State that generate() leaves on a module for its own next call (M-RoPE offsets); a pass of ours must not disturb it.
_GENERATION_STATE = ("rope_deltas",)


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Run ``model`` without side effects: eval mode, weights without gradients, generation state kept.

    Everything is put back on exit, also after an exception. Weights without ``requires_grad`` matter for memory too:
    autograd then saves nothing that only a weight gradient would need.
    """
    modules = every_module(model)
    training = [module for module in modules if module.training]
    own = (parameter for module in modules for parameter in module._parameters.values())
    trainable = [parameter for parameter in own if parameter is not None and parameter.requires_grad]
    state = [
        (module, name, vars(module)[name]) for module in modules for name in _GENERATION_STATE if name in vars(module)
    ]
    try:
        for module in training:
            module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        for module, name, _ in state:
            setattr(module, name, None)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, name, value in state:
            setattr(module, name, value)


@contextmanager
def checkpointed(model: torch.nn.Module, *, enabled: bool = True) -> Iterator[int]:
    """Gradient checkpointing in eval mode, on exactly the layers that support it.

    transformers checkpoints a layer only in training mode, which would switch on its dropout. Here each layer's
    ``forward`` is run by ``torch.utils.checkpoint`` as it is, so that the gradient stays the same to the last bit.

    Yields:
        the number of layers that will be recomputed.

    Raises:
        ReplayError: no layer supports it.
    """
    if not enabled:
        yield 0
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ReplayError(
            f"gradient checkpointing is not supported by any layer of {type(model).__name__}; replay without "
            f"gradient_checkpointing"
        )
    saved = [(layer, vars(layer).get("forward")) for layer in layers]
    try:
        for layer in layers:
            # Through __dict__, where accelerate may have put a forward of its own, which then is what runs again.
            vars(layer)["forward"] = _recomputing(layer, layer.forward)
        yield len(layers)
    finally:
        for layer, own in saved:
            if own is None:
                vars(layer).pop("forward", None)
            else:
                vars(layer)["forward"] = own


_CACHES = ("past_key_values", "past_key_value", "layer_past")


def _recomputing(layer: torch.nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
    """``original``, run once more in backward instead of keeping what it computed on the way."""
    from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

    # Stopped half-way, accelerate would never put away again the weights it has brought for the recomputation.
    whole = any(weight.is_meta for weight in layer.parameters())

    # Frozen in the recomputation too: it runs in backward(), when the model's own flags are back in place.
    def again(*args: Any, **kwargs: Any) -> Any:
        with frozen(layer), uncompiled(layer):
            return original(*args, **kwargs)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not getattr(layer, "_can_checkpoint_with_cache", False):  # else its keys would enter a cache twice
            kwargs.update({name: None for name in _CACHES if kwargs.get(name) is not None})
        with set_checkpoint_early_stop(not whole):
            return checkpoint(again, *args, use_reentrant=False, **kwargs)

    return forward


@contextmanager
def own_pass() -> Iterator[None]:
    """``OWN_PASS`` is True in the block."""
    before = OWN_PASS.set(True)
    try:
        yield
    finally:
        OWN_PASS.reset(before)


@contextmanager
def even_gradients(model: torch.nn.Module) -> Iterator[None]:
    """Batch norms are handed contiguous gradients.

    torch 2.13 differentiates them wrongly on the CPU where one picture's gradient arrives permuted, as it does in a
    tower whose feature map is flattened into tokens (tests/test_forcing_layouts.py).
    """
    with HookSet() as hooks:
        for module in every_module(model) if torch.is_grad_enabled() else ():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                hooks.forward(module, lambda _m, _a, _k, output: _Even.apply(output), name="batch norm", fenced=False)
        yield


class _Even(torch.autograd.Function):
    """The same tensor; its gradient contiguous."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient.contiguous()
