"""Which model is this: a fingerprint that survives saving, loading and a change of dtype, and the facts a trace
keeps.

Both are made for every ``generate()`` call. Sampling 64 values of each tensor costs a few milliseconds, and the host
waits for an accelerator twice, however many tensors there are; only what is read from elsewhere (offloaded weights) or
computed (quantised ones) is remembered, until that tensor is changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import platform
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from lvlm_probe._version import versions_of
from lvlm_probe.files import json_ready
from lvlm_probe.models.drivers import called_model, probed_model
from lvlm_probe.models.exhaustion import ran_out
from lvlm_probe.models.quantised import is_packed, plain_value, stored_shape
from lvlm_probe.models.wrappers import active_adapters, computing_buffers, computing_parameters, stored_value

_log = logging.getLogger("lvlm_probe")
_SAMPLES = 64


@torch.no_grad()
def fingerprint(model: torch.nn.Module, *, buffers: bool = True) -> str:
    """SHA-256 over names, shapes and up to 64 evenly spaced values of each parameter and each buffer.

    Values are rounded to bfloat16 first, so that the same checkpoint loaded in float32 and in bfloat16 has one
    fingerprint. Weights that accelerate has offloaded are read where they are kept; tensors without data anywhere, and
    those of a kind that does not show its values, count by name and shape; quantised ones by what they dequantise to.
    Adapters count as far as they compute: disabled, the model is its base model. Of buffers those count that a
    checkpoint stores (weights of GPTQ and AWQ, running statistics); what the model recomputes (rotary frequencies,
    position ids) does not.

    Args:
        model: any module; not changed.
        buffers: ``False`` looks at parameters alone, as versions did whose fingerprints have no ``2:`` in front.

    Returns:
        64 hex digits, behind ``2:`` where buffers count.
    """
    probed = probed_model(model)
    found = list(computing_parameters(probed))
    kept = list(computing_buffers(probed)) if buffers else []
    digest = hashlib.sha256()
    named = sorted(found, key=lambda item: item[0]) + sorted(kept, key=lambda item: item[0])
    together = _sampled_together([tensor for *_, tensor in named])
    for place, (name, module, own, tensor) in enumerate(named):
        digest.update(f"{name}:{stored_shape(tensor)};".encode())
        digest.update(together[place] if place in together else _sampled(module, own, tensor))
    return ("2:" if kept else "") + digest.hexdigest()


def same_fingerprint(model: torch.nn.Module, recorded: str) -> tuple[bool, str]:
    """Whether a model is the one of a recorded fingerprint, of this or an older version; and its own, made alike."""
    present = fingerprint(model, buffers=recorded.startswith("2:"))
    return present == recorded, present


_REMEMBERED: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, tuple[Any, Any, bytes]]] = weakref.WeakKeyDictionary()


def _sampled(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> bytes:
    """The sampled values of one tensor as bytes; empty where it has none to show."""
    if tensor.device.type != "meta" and not is_packed(tensor):
        try:
            return _values(tensor)
        except Exception as error:
            if ran_out(error):
                raise
            # A subclass: quantised or distributed weights, which need not know how to be indexed.
    state = (None if tensor.is_inference() else tensor._version, tensor.dtype)
    known = _REMEMBERED.setdefault(module, {}).get(name)
    if known is None or known[0]() is not tensor or known[1] != state:
        value = stored_value(module, name) if tensor.device.type == "meta" else plain_value(tensor)
        known = weakref.ref(tensor), state, b"" if value is None else _values(value)
        _REMEMBERED[module][name] = known
    return known[2]


def _sampled_together(tensors: Sequence[torch.Tensor]) -> dict[int, bytes]:
    """The sampled values of the tensors on accelerators, by their places in the list: of all on one device by one copy
    to it and one back, each of which waits. Those that cannot be sampled so are left out."""
    lying: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if tensor.device.type not in ("cpu", "meta") and tensor.numel():
            lying.setdefault(tensor.device, []).append(place)
    found: dict[int, bytes] = {}
    for device, places in lying.items():
        chosen = [_chosen(tensors[place].numel()) for place in places]
        indices = torch.cat(chosen).to(device).split([len(index) for index in chosen])
        kinds: dict[int, torch.dtype] = {}
        parts: list[torch.Tensor] = []
        with contextlib.suppress(Exception):  # what it says, it says again when it is sampled alone
            for place, index in zip(places, indices, strict=True):
                with contextlib.suppress(Exception):  # a subclass
                    values = tensors[place].detach().reshape(-1)[index]
                    parts.append(values.view(torch.uint8))
                    kinds[place] = values.dtype
            read = torch.cat(parts).cpu().split([len(part) for part in parts])
            found |= {
                place: _bytes_of(raw.clone().view(kind)) for (place, kind), raw in zip(kinds.items(), read, strict=True)
            }
    return found


def _chosen(count: int) -> torch.Tensor:
    """Indices of up to ``_SAMPLES`` of ``count`` values, evenly spaced, on the CPU."""
    return torch.linspace(0, count - 1, min(_SAMPLES, count), dtype=torch.float64).round().long()


def _values(value: torch.Tensor) -> bytes:
    if value.numel() == 0:
        return b""
    flat = value.detach().reshape(-1)
    return _bytes_of(flat[_chosen(flat.numel()).to(flat.device)].to("cpu"))


def _bytes_of(values: torch.Tensor) -> bytes:
    """Values on the CPU as bytes that are the same in every format they may be loaded in."""
    if values.is_floating_point():
        values = values.to(torch.bfloat16).view(torch.int16)
    made: bytes = values.to(torch.int64).numpy().tobytes()
    return made


def library_versions() -> dict[str, str]:
    """Versions of the libraries whose arithmetic a replay depends on."""
    libraries = "torch", "transformers", "tokenizers", "pillow", "torchvision", "numpy", "h5py", "peft"
    return {"python": platform.python_version(), **versions_of("lvlm_probe", *libraries)}


def undescribed(model: torch.nn.Module, error: Exception) -> tuple[dict[str, Any], str]:
    """What a trace says of a model that cannot be described, and the sentence that says so."""
    _log.debug("the model could not be described", exc_info=error)
    told = (
        f"the model could not be described ({type(error).__name__}: {error}), so that no replay can check that it is it"
    )
    return {"class": type(model).__name__, "versions": library_versions()}, told


def describe_model(model: torch.nn.Module) -> dict[str, Any]:
    """What a trace says about its model: identity, dtype, attention, configuration, versions. JSON only."""
    config: Any = model.config
    generation_config: Any = getattr(model, "generation_config", None)
    generation = {} if generation_config is None else generation_config.to_dict()
    return {
        "model_id": str(getattr(config, "_name_or_path", "") or ""),
        "revision": str(getattr(config, "_commit_hash", "") or ""),
        "class": type(called_model(model)).__name__,
        "adapter": ",".join(active_adapters(model)),
        "attn_implementation": str(getattr(config, "_attn_implementation", "") or ""),
        "torch_dtype": str(getattr(model, "dtype", "")).removeprefix("torch."),
        "fingerprint": fingerprint(model),
        "config": json_ready(config.to_dict(), nonfinite=str),
        "generation_config": json_ready(generation, nonfinite=str),
        "versions": library_versions(),
    }
