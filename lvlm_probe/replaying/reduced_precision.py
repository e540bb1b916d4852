"""Reduced precision: passes of a float32 model in bfloat16, for the search of a map and never for what is said of it.

Matrix products and attention run in bfloat16 by autocast, in the thread of a pass and while it lasts; norms, the
residual stream and what is read off stay in float32, and so do the model's weights. So do convolutions, which autocast
would round too: a convolutional tower takes a small part of the time and makes most of the error (its gradients to the
image had a cosine of 0.91 with those of float32, and of 1.00 so; ``tests/benchmarks/bench_search.py``).

Autocast casts weights in each pass anew, as it keeps those alone that require a gradient. Plain linear layers, where
nearly all weights are, are therefore handed weights that were cast once, for as long as the caller says that the model
does not change: the same numbers to the last bit, for half the memory of the model more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from lvlm_probe.errors import ExplainError
from lvlm_probe.hooks import HookSet, replaced
from lvlm_probe.models.exhaustion import ran_out
from lvlm_probe.models.quantised import stored_tensors
from lvlm_probe.models.wrappers import every_module

DTYPES = {"bfloat16": torch.bfloat16}
"""Number formats of a search, by name. Not float16, whose range gradients fall out of on their way."""


def check_reducible(model: nn.Module, dtype: str) -> None:
    """Raise ``ExplainError`` where there is no such format, or the model is not one in float32 throughout."""
    if dtype not in DTYPES:
        raise ExplainError(f"a search is computed in {', '.join(DTYPES)}, or in the model's own format; got {dtype!r}")
    kinds = {weight.dtype for weight in model.parameters()}
    kinds |= {tensor.dtype for tensor in stored_tensors(model) if tensor.dtype in (torch.int8, torch.uint8)}
    if others := sorted(str(kind).removeprefix("torch.") for kind in kinds - {torch.float32}):
        raise ExplainError(
            f"{type(model).__name__} holds weights in {', '.join(others)}, and a search in {dtype} is for a model in "
            f"float32: leave it out, or load the model in float32"
        )


@contextmanager
def told_by_kernels(model: nn.Module) -> Iterator[None]:
    """In the block a pass of ``model`` in another number format that fails, and not for want of memory, raises
    ``ExplainError``."""
    try:
        yield
    except RuntimeError as error:
        if ran_out(error):
            raise
        raise ExplainError(
            f"{type(model).__name__} has kernels that do not go along with a search in another number format "
            f"({str(error).strip().splitlines()[0]}): leave search_dtype out"
        ) from error


class ReducedPrecision:
    """Passes that compute in a smaller number format.

    Args:
        dtype: a name of ``DTYPES``.
        device: where they run.
        held: what is kept as long as the model does not change, where cast weights go too; ``None`` where nothing is.
    """

    def __init__(self, dtype: str, device: torch.device, held: Callable[[], dict[Any, Any] | None]) -> None:
        self.dtype, self._device, self._held = dtype, device, held

    @property
    def kept(self) -> int:
        """Bytes of the weights that were cast and are kept now; of several devices, on the one that holds most."""
        found: Counter[torch.device] = Counter()
        for place, value in (self._held() or {}).items():
            if isinstance(place, tuple) and place[0] == self.dtype:
                found[value.device] += value.nbytes
        return max(found.values(), default=0)

    @contextmanager
    def passes(self, model: nn.Module) -> Iterator[None]:
        """In the block passes of ``model``, a replica, compute so, in this thread."""
        weights = self._held()
        with torch.autocast(self._device.type, DTYPES[self.dtype]), HookSet() as hooks:
            for module in every_module(model):
                if isinstance(module, _ConvNd):
                    hooks.shadow(module, "forward", self._in_float32)
                elif weights is not None and _is_plain(module):
                    hooks.shadow(module, "forward", self._linear(module, weights))
            yield

    def _in_float32(self, original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.autocast(self._device.type, enabled=False):
            return original(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})

    def _linear(self, module: nn.Linear, weights: dict[Any, Any]) -> Callable[..., torch.Tensor]:
        def forward(_original: Callable[..., torch.Tensor], input: torch.Tensor) -> torch.Tensor:
            own = module.weight
            # By where they lie: replicas of a model have modules and parameters of their own, and one storage.
            place = self.dtype, own.data_ptr(), own.shape, own.stride()
            if place not in weights:
                weights[place] = own.detach().to(DTYPES[self.dtype])
            return functional.linear(input, weights[place], module.bias)

        return forward


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    return (
        type(module) is nn.Linear
        and not replaced(module, "forward")
        and type(module.weight) in (nn.Parameter, torch.Tensor)
        and not module.weight.requires_grad
    )
