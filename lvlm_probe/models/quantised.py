"""Quantised weights, and others of a class of their own: what they stand for, what they take, and how to differentiate
through a kernel that has no derivative.

Libraries keep such weights in four ways: as parameters of integers with scales beside them (bitsandbytes), as
parameters and scales of a module of their own (HQQ, GPTQ, AWQ), as tensors of a class of their own that hold others
(torchao, quanto), and as parts on other devices (DTensor). None of these libraries is imported here.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from lvlm_probe.models.exhaustion import ran_out

_BESIDE = ("quant_state", "SCB", "absmax", "state2", "offset")
"""Names under which bitsandbytes keeps scales beside a weight, and inside what it keeps there."""


def quantisation(config: Any) -> str:
    """By which method a configuration says that weights are quantised, ``"torchao"``; empty where it does not.

    Args:
        config: a model's, or its ``to_dict()``.
    """
    name = "quantization_config"
    found = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method) or "")


def plain_value(tensor: torch.Tensor) -> torch.Tensor | None:
    """What a tensor of a class of its own stands for, as an ordinary one: what it dequantises to, or all of a
    distributed one that lies here; ``None`` where that is not to be had on this process alone. Of a packed weight, the
    same bytes in the order of before."""
    if is_packed(tensor):
        return _unpacked(tensor)
    for way in ("dequantize", "to_local"):
        try:
            value = getattr(tensor, way)()
        except Exception as error:
            if ran_out(error):
                raise
            continue
        if isinstance(value, torch.Tensor) and value.shape == tensor.shape:
            return value
    return None


def stored_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Every ordinary tensor that a model keeps its weights and buffers in, scales included, each object once."""
    known: set[int] = set()
    for module in model.modules():
        held: list[Any] = [*module._parameters.values(), *module._buffers.values()]
        if isinstance(scales := vars(module).get("meta"), dict):  # HQQ
            held += scales.values()
        for value in held:
            for tensor in _inside(value):
                if id(tensor) not in known:
                    known.add(id(tensor))
                    yield tensor


def _inside(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        try:
            names, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
        except (AttributeError, NotImplementedError):
            yield value
        else:
            for name in names:
                yield from _inside(getattr(value, name))
    own = getattr(value, "__dict__", {})
    for name in _BESIDE:
        if own.get(name) is not None:
            yield from _inside(own[name])


# ------------------------------------------------------------------------------------------- 4 bits on some processors


def is_packed(weight: Any) -> bool:
    """Whether bitsandbytes has packed a weight anew, in place. A layer does so in its first pass without gradients, on
    processors that multiply bfloat16 by AVX-512; the kernel it is packed for has no derivative."""
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def stored_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of a weight, as it was before it was packed."""
    return tuple(tensor.quant_state.original_qshape if is_packed(tensor) else tensor.shape)  # type: ignore[attr-defined]


def _unpacked(weight: Any) -> torch.Tensor | None:
    try:
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as inverse
    except ImportError:
        return None
    # It would change the state it is given.
    made: torch.Tensor = inverse(weight.data, copy.copy(weight.quant_state))[0]
    return made


def differentiable(layer: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A forward for a 4-bit layer of bitsandbytes that can be differentiated when its weight is packed, and computes
    the same; ``None`` for every other module. The layer is not kept alive by it."""
    kind = type(layer)
    if not any(base.__name__ == "Linear4bit" and base.__module__.startswith("bitsandbytes.") for base in kind.__mro__):
        return None
    held = weakref.ref(layer)

    def forward(x: torch.Tensor) -> torch.Tensor:
        own = held()
        assert own is not None
        if torch.is_grad_enabled() and x.requires_grad and is_packed(own.weight):
            made: torch.Tensor = _PackedLinear.apply(x, own)
            return made
        plain: torch.Tensor = kind.forward(own, x)
        return plain

    return forward


class _PackedLinear(torch.autograd.Function):
    """``x Wᵀ + b`` by the packed kernel; backward multiplies by W, which is what the kernel makes of the identity."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any) -> torch.Tensor:  # type: ignore[override]
        ctx.layer, ctx.width = layer, x.shape[-1]
        made: torch.Tensor = type(layer).forward(layer, x)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        import bitsandbytes

        weight = ctx.layer.weight
        identity = torch.eye(ctx.width, dtype=torch.bfloat16, device=gradient.device)
        columns = bitsandbytes.matmul_4bit(identity, weight, quant_state=weight.quant_state)
        return gradient @ columns.T.to(gradient.dtype), None
