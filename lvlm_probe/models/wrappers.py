"""What users wrap around a model (LoRA adapters, compiled modules), and the model inside that generates."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lvlm_probe.errors import AttachError


def is_compiled(model: object) -> bool:
    """Whether this is the wrapper that ``torch.compile(model)`` returns."""
    return isinstance(model, torch.nn.Module) and "_orig_mod" in model._modules


def is_peft(model: object) -> bool:
    """Whether this is a ``peft.PeftModel``; peft need not be installed to ask."""
    return isinstance(model, torch.nn.Module) and hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def compiled_parts(model: torch.nn.Module, around: str = "") -> bool:
    """Whether modules of the model run as compiled graphs, inside which hooks and attention may not be seen.

    Args:
        model: the whole model.
        around: path of the part that matters; what is neither in it nor around it does not count.
    """
    if "torch._dynamo" not in sys.modules:
        return False
    parts = (
        (
            module
            for path, module in model.named_modules()
            if f"{path}.".startswith(f"{around}.") or not path or around.startswith(f"{path}.")
        )
        if around
        else every_module(model)
    )
    return any(
        is_compiled(module)
        or module._compiled_call_impl is not None
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in parts
    )


def every_module(model: torch.nn.Module) -> list[torch.nn.Module]:
    """``model`` and all modules inside it, each once, the model first. ``model.modules()`` goes through a generator per
    level for every one of them, which a pass over a small model feels."""
    found: dict[torch.nn.Module, None] = {}
    waiting: list[torch.nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found[module] = None
            waiting += reversed(module._modules.values())
    return list(found)


def generating_model(model: Any) -> Any:
    """The model whose ``generate`` runs in the end: what is inside a ``PeftModel`` or a compiled wrapper.

    A ``PeftModel`` hands ``generate`` and its own calls on to the model inside, whose layers carry the adapters; every
    hook therefore belongs on the model inside.

    Raises:
        AttachError: the adapter adds tokens to the prompt, which no trace could tell from the user's.
    """
    while is_compiled(model) or is_peft(model):
        if is_compiled(model):
            model = model._orig_mod
            continue
        config = model.active_peft_config
        if getattr(config, "is_prompt_learning", False):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise AttachError(
                f"{type(model).__name__} cannot be probed with a {kind} adapter: it puts virtual tokens in front of "
                f"the prompt, so that positions in prompt and model differ; LoRA and other adapters inside the layers "
                f"can be probed"
            )
        model = model.get_base_model()
    return model


Found = Iterator[tuple[str, torch.nn.Module, str, torch.Tensor]]


def computing_parameters(model: torch.nn.Module) -> Found:
    """The parameters that the next forward pass computes with: ``(name, module, name in it, parameter)``.

    Names are those of the model without adapters, and adapters that are merged, disabled or not active are left out:
    a model with its adapter disabled is the base model, one with the adapter merged is the merged model.
    """
    yield from _walk(model, "", _parameters)


def computing_buffers(model: torch.nn.Module) -> Found:
    """The buffers that the next forward pass computes with and a checkpoint stores, as ``computing_parameters``.

    Quantised layers (GPTQ, AWQ) keep their weights in such; buffers that are not stored are recomputed from the
    configuration.
    """
    yield from _walk(model, "", _stored_buffers)


def computes(module: torch.nn.Module) -> bool:
    """Whether a module or one inside it has weights: parameters, or buffers that a checkpoint stores."""
    inside = every_module(module)
    return any(value is not None for m in inside for value in (*m._parameters.values(), *_stored_buffers(m).values()))


def active_adapters(model: torch.nn.Module) -> list[str]:
    """Names of the adapters that the next forward pass computes with, merged ones included, sorted."""
    found: set[str] = set()
    for module in every_module(model):
        layer: Any = module
        if hasattr(module, "disable_adapters") and {"base_layer", "original_module"} & module._modules.keys():
            found |= set(getattr(layer, "merged_adapters", ()))
            found |= set() if layer.disable_adapters else set(layer.active_adapters)
    return sorted(found)


def _parameters(module: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    return dict(module._parameters)


def _stored_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    return {n: value for n, value in module._buffers.items() if n not in module._non_persistent_buffers_set}


def _walk(
    module: torch.nn.Module, path: str, held: Callable[[torch.nn.Module], dict[str, torch.Tensor | None]]
) -> Found:
    children = dict(module._modules)
    adapted = {"base_layer", "original_module"} & set(children)
    layer: Any = module
    if adapted and hasattr(layer, "disable_adapters"):
        base = getattr(layer, adapted.pop())
        active = () if layer.disable_adapters or getattr(layer, "merged", False) else tuple(layer.active_adapters)
        copies: Any = children.get("modules_to_save")
        chosen = [copies[name] for name in active if name in copies] if copies is not None else []
        yield from _walk(chosen[0] if chosen else base, path, held)
        scaling = getattr(module, "scaling", None)
        for name in active:
            if held is _parameters and isinstance(scaling, dict) and isinstance(scaling.get(name), int | float):
                yield f"{path}scaling.{name}", module, "", torch.tensor(float(scaling[name]))
            for kind in getattr(module, "adapter_layer_names", ()):
                container: Any = module
                for step in kind.split("."):
                    container = getattr(container, step, None)
                if container is None or container is copies:
                    continue
                own = held(container).get(name)
                if name in container._modules:
                    yield from _walk(container._modules[name], f"{path}{kind}.{name}.", held)
                elif own is not None:
                    yield f"{path}{kind}.{name}", container, name, own
        return
    for name, value in held(module).items():
        if value is not None:
            yield f"{path}{name}", module, name, value
    for name, child in children.items():
        if child is not None:
            yield from _walk(child, path if name == "_orig_mod" else f"{path}{name}.", held)


def adapters_of_this_call(model: torch.nn.Module) -> str:
    """Why this one call cannot be replayed, where peft has hung its own hooks on the layers for it; else empty."""
    names = {
        getattr(getattr(hook, "func", hook), "__name__", "")
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
    }
    if not any("adapter_names" in name or "alora_offsets" in name for name in names):
        return ""
    return (
        "this call of generate() chooses adapters by batch row or by position (adapter_names=, aLoRA), which a replay "
        "cannot repeat; nothing is recorded. Choose one adapter with set_adapter()"
    )


def stored_value(module: torch.nn.Module, name: str) -> torch.Tensor | None:
    """The value of a parameter that accelerate keeps elsewhere between passes (on the CPU or on disk), if it does."""
    hook = getattr(module, "_hf_hook", None)
    for one in (hook, *getattr(hook, "hooks", ())):
        weights = getattr(one, "weights_map", None)
        if weights is not None:
            try:
                return weights[name]
            except KeyError:
                continue
    return None


def execution_device(module: object) -> torch.device:
    """Where accelerate runs a module whose weights it has offloaded."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is None:
        return torch.device("cpu")
    if isinstance(device, int):  # accelerate numbers the devices of whatever kind there is
        accelerator = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
        return torch.device(accelerator.type if accelerator else "cuda", device)
    return torch.device(device)
