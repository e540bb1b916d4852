"""Attention layers of a decoder: those that can be read, and for the others the reason."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any, Literal

from torch import nn

from lvlm_probe.models.anatomy import text_stack

_CROSS = re.compile(r"cross|encoder_attn|encoder_decoder_att|encdecatt", re.IGNORECASE)


LayerKind = Literal["self", "cross", "merged"]
"""What an attention layer's keys are: positions of the sequence; states from elsewhere (an encoder's); or both, in this
order."""


@dataclass(frozen=True)
class TapLayer:
    """One attention layer of the decoder."""

    index: int
    """Position in the decoder's stack of layers."""
    module: str
    """Path of the attention module in the model, as in ``model.named_modules()``."""
    kind: LayerKind = "self"


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
    layers: list[tuple[TapLayer, nn.Module]] = []
    unsupported: dict[str, str] = {}
    stacks: dict[str, set[int]] = {}  # path of each ModuleList with attention in it → its indices that have some
    for name, module in _attention_modules(decoder, prefix):
        relative = name.removeprefix(prefix).lstrip(".")
        stack, number = _place(relative)
        kind = _kind(module, relative)
        stacks.setdefault(f"{prefix}.{stack}".strip("."), set()).add(number)
        if cross and kind == "self":
            continue
        reason = _refusal(module, cross=kind == "cross" and not cross)
        if reason is None:
            index = getattr(module, "layer_idx", None)
            layers.append((TapLayer(index if isinstance(index, int) else number, name, kind), module))
        else:
            unsupported[name] = reason
    if not stacks:
        unsupported[prefix] = (
            f"no attention map: {type(decoder).__name__} has no attention layer that looks its function up in "
            "transformers' attention interface"
        )
    elif not cross:
        unsupported |= _other_layers(model, stacks)
    elif not layers and not unsupported:
        unsupported[prefix] = f"{type(decoder).__name__} has no cross-attention layer"
    layers.sort(key=lambda pair: pair[0].index)
    return layers, unsupported


def _place(path: str) -> tuple[str, int]:
    """The first stack of layers that a path goes through, and the number of the layer there."""
    found = re.match(r"(?:(.*?)\.)?(\d+)(?:\.|$)", path)
    assert found is not None
    return found[1] or "", int(found[2])


def _attention_modules(decoder: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules in the decoder's layers that compute attention, by the registry or in a forward of their own."""
    text_class = type(getattr(decoder, "config", None))
    for name, module in decoder.named_modules(prefix=prefix):
        if not any(part.isdecimal() for part in name.removeprefix(prefix).split(".")):
            continue
        if not (dispatches(module) or _attends_itself(module)) or not _along_the_sequence(module):
            continue
        if text_class is type(None) or isinstance(getattr(module, "config", None), text_class):
            yield name, module  # else it is of another encoder that lives inside the decoder


def _along_the_sequence(module: nn.Module) -> bool:
    """Whether positions attend to positions. Where residuals are attention over what earlier layers gave (Inkling 2),
    a module has states of layers, and neither the sequence's nor a mask of it."""
    given = inspect.signature(type(module).forward).parameters.values()
    known = re.compile("hidden_states|mask|query|input|^x$")
    return any(one.kind is one.VAR_KEYWORD or known.search(one.name) for one in given)


def _attends_itself(module: nn.Module) -> bool:
    return (
        "attention" in type(module).__name__.lower()
        and isinstance(getattr(module, "layer_idx", None), int)
        and not any(dispatches(child) for child in module.modules())
    )


def _other_layers(model: nn.Module, stacks: Mapping[str, set[int]]) -> dict[str, str]:
    """Layers without attention in stacks that have some, and what they have instead."""
    found: dict[str, str] = {}
    for stack, having in stacks.items():
        blocks = model.get_submodule(stack)
        for index, module in enumerate(blocks if isinstance(blocks, nn.ModuleList) else ()):
            if index not in having:
                # What stands where attention would: the first part of the layer that knows the layer's number.
                mixers = (m for path, m in module.named_modules() if path and hasattr(m, "layer_idx"))
                what = type(next(mixers, module)).__name__
                found[f"{stack}.{index}"] = f"no attention map: {what} has no softmax attention"
    return found


def _kind(module: nn.Module, relative: str) -> LayerKind:
    if (
        getattr(module, "is_cross_attention", False)
        or _CROSS.search(re.split(r"(?:^|\.)\d+\.", relative)[-1])
        or _CROSS.search(type(module).__name__)
    ):
        return "cross"
    # A layer that cannot run without the encoder's states and is no cross-attention has them behind its own keys.
    given = inspect.signature(type(module).forward).parameters.get("encoder_hidden_states")
    return "merged" if given is not None and given.default is inspect.Parameter.empty else "self"


def _refusal(module: nn.Module, *, cross: bool) -> str | None:
    """Why this attention module is not tapped, or ``None``."""
    kind = type(module).__name__
    if cross:
        return f"{kind} is cross-attention: its keys are image states, not positions of the prompt"
    if not dispatches(module):
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
