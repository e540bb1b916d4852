"""Numerical truth: what computes in float32 for speed computes in float64 here, so that rounding hides nothing.

``model.double()`` alone does not do that: norms, softmax and rotary embeddings of most models ask for float32 by name.
What remains below 1e-9 does not depend on the processor; a mistake in a formula does not get smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["in_float64"]


class _Float64(TorchFunctionMode):
    """Every call of torch that names float32 means float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextmanager
def in_float64(*models: Any) -> Iterator[None]:
    """Models, what they call and what calls them compute in float64 inside; afterwards the models are as before.

    Args:
        models: float32 models of transformers; none where only the arithmetic around them is meant.
    """
    default = torch.get_default_dtype()
    experts = [model.get_experts_implementation() for model in models]
    try:
        for model in models:
            model.double()
            model.set_experts_implementation("eager")  # the grouped ones know no float64
        torch.set_default_dtype(torch.float64)
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(default)
        for model, own in zip(models, experts, strict=True):
            model.float()
            model.set_experts_implementation(own)
