"""Which attention layers a decoder has, and for those that cannot be read, why."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any, Literal

from torch import nn

from lvlm_probe.models.anatomy import text_stack

__all__ = ["TapLayer", "discover", "eager_of", "registry_of"]

_CROSS = re.compile(r"cross|encoder_attn", re.IGNORECASE)


@dataclass(frozen=True)
class TapLayer:
    """One attention layer of the decoder."""

    index: int
    """Position in the decoder's stack of layers."""
    module: str
    """Path of the attention module in the model, as in ``model.named_modules()``."""
    kind: Literal["self", "cross", "merged"] = "self"
    """What its keys are: positions of the sequence; states from elsewhere (an encoder's); or both, in this order."""


def own_forward(module: nn.Module) -> tuple[CodeType, dict[str, Any]] | None:
    """Code and globals of a module class's own ``forward``, decorators peeled off."""
    function = inspect.unwrap(type(module).forward)
    code = getattr(function, "__code__", None)
    return None if code is None else (code, function.__globals__)


def registry_of(module: nn.Module) -> Any:
    """The registry object that the module's ``forward`` asks; a modeling file may keep one with its own entries."""
    found = own_forward(module)
    return None if found is None else found[1].get("ALL_ATTENTION_FUNCTIONS")


def dispatches(module: nn.Module) -> bool:
    """Whether the module looks its attention function up in transformers' registry."""
    found = own_forward(module)
    return found is not None and "ALL_ATTENTION_FUNCTIONS" in found[0].co_names


def eager_of(module: nn.Module) -> Callable[..., Any] | None:
    """The eager function that the module itself would fall back to, from the globals its ``forward`` reads."""
    found = own_forward(module)
    names = [] if found is None else [name for name in found[0].co_names if "eager" in name]
    if found is not None and len(names) == 1:
        function = found[1].get(names[0])
    else:
        function = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
    return function if callable(function) else None


def _decoder(model: nn.Module) -> nn.Module:
    """The innermost module that ``get_decoder()`` leads to: the text decoder's stack."""
    module = model
    for _ in range(4):
        step = getattr(module, "get_decoder", None)
        try:
            inner = step() if callable(step) else None
        except Exception:  # exotic classes raise here; what was found so far is the best answer
            inner = None
        if not isinstance(inner, nn.Module) or inner is module:
            break
        module = inner
    return text_stack(module)


def discover(
    model: nn.Module, root: nn.Module | None = None, *, cross: bool = False
) -> tuple[list[tuple[TapLayer, nn.Module]], dict[str, str]]:
    """Attention layers that can be read, and for all others the reason why not.

    Args:
        model: the whole model, which paths are relative to.
        root: the part of it to look at, an encoder for example; by default its decoder.
        cross: look for layers that read states from elsewhere instead of those that read the sequence; the others are
            then passed over without a word.
    """
    decoder = _decoder(model) if root is None else root
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    text_class = type(getattr(decoder, "config", None))
    layers: list[tuple[TapLayer, nn.Module]] = []
    unsupported: dict[str, str] = {}
    stacks: dict[str, set[int]] = {}  # path of each ModuleList with attention in it → its indices that have some
    for name, module in decoder.named_modules(prefix=prefix):
        relative = name.removeprefix(prefix).lstrip(".")
        place = re.match(r"(?:(.*?)\.)?(\d+)(?:\.|$)", relative)
        if place is None:
            continue
        dispatching = dispatches(module)
        own_attention = (
            not dispatching
            and "attention" in type(module).__name__.lower()
            and isinstance(getattr(module, "layer_idx", None), int)
            and not any(dispatches(child) for child in module.modules())
        )
        if not dispatching and not own_attention:
            continue
        config = getattr(module, "config", None)
        if text_class is not type(None) and not isinstance(config, text_class):
            continue  # another encoder that lives inside the decoder
        index = module.layer_idx if isinstance(getattr(module, "layer_idx", None), int) else int(place[2])
        kind = _kind(module, relative)
        stacks.setdefault(f"{prefix}.{place[1] or ''}".strip("."), set()).add(int(place[2]))
        if cross and kind == "self":
            continue
        reason = _refusal(module, dispatching=dispatching, cross=kind == "cross" and not cross)
        if reason is None:
            layers.append((TapLayer(int(index), name, kind), module))
        else:
            unsupported[name] = reason
    for stack, having in stacks.items() if not cross else ():
        blocks = model.get_submodule(stack)
        for index, module in enumerate(blocks if isinstance(blocks, nn.ModuleList) else ()):
            if index not in having:
                # What stands where attention would: the first part of the layer that knows the layer's number.
                mixers = (m for path, m in module.named_modules() if path and hasattr(m, "layer_idx"))
                what = type(next(mixers, module)).__name__
                unsupported[f"{stack}.{index}"] = f"no attention map: {what} has no softmax attention"
    if not stacks:
        unsupported[prefix] = (
            f"no attention map: {type(decoder).__name__} has no attention layer that looks its function up in "
            "transformers' attention interface"
        )
    if cross and stacks and not layers and not unsupported:
        unsupported[prefix] = f"{type(decoder).__name__} has no cross-attention layer"
    layers.sort(key=lambda pair: pair[0].index)
    return layers, unsupported


def _kind(module: nn.Module, relative: str) -> Literal["self", "cross", "merged"]:
    if (
        getattr(module, "is_cross_attention", False)
        or _CROSS.search(relative.rsplit(".", 1)[-1])
        or _CROSS.search(type(module).__name__)
    ):
        return "cross"
    # A layer that cannot run without the encoder's states and is no cross-attention has them behind its own keys.
    given = inspect.signature(type(module).forward).parameters.get("encoder_hidden_states")
    return "merged" if given is not None and given.default is inspect.Parameter.empty else "self"


def _refusal(module: nn.Module, *, dispatching: bool, cross: bool) -> str | None:
    """Why this attention module is not tapped, or ``None``."""
    kind = type(module).__name__
    if cross:
        return f"{kind} is cross-attention: its keys are image states, not positions of the prompt"
    if not dispatching:
        return f"{kind} computes attention in its own forward, past transformers' attention interface"
    config = module.__dict__.get("config")
    if config is None:
        return f"{kind} keeps no config of its own, so its attention function cannot be exchanged"
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in ("sdpa", "eager", None):
        return (
            f"{kind} runs {implementation!r}, which gives no attention weights; "
            'load the model with attn_implementation="sdpa" or "eager"'
        )
    if implementation != "sdpa" and eager_of(module) is None:
        return f"the eager attention function of {kind} was not found beside its class"
    return None
