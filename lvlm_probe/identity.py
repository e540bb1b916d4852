"""Which model is this: a fingerprint that survives saving, loading and a change of dtype, and the facts a trace
keeps.
"""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata
from typing import Any

import torch

from lvlm_probe.originals import called_model, probed_model
from lvlm_probe.wrappers import computing_parameters, stored_value

__all__ = ["describe_model", "fingerprint", "library_versions"]

_SAMPLES = 64


@torch.no_grad()
def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over parameter names, shapes and up to 64 evenly spaced values of each.

    Values are rounded to bfloat16 first, so that the same checkpoint loaded in float32 and in bfloat16 has one
    fingerprint. Weights that accelerate has offloaded are read where they are kept; parameters without data anywhere
    count by name and shape. Adapters count as far as they compute: disabled, the model is its base model.

    Args:
        model: any module; not changed.

    Returns:
        64 hex digits.
    """
    digest = hashlib.sha256()
    found = computing_parameters(probed_model(model))
    for name, module, own, parameter in sorted(found, key=lambda item: item[0]):
        digest.update(f"{name}:{tuple(parameter.shape)};".encode())
        value = stored_value(module, own) if parameter.device.type == "meta" else parameter
        if value is None or value.numel() == 0:
            continue
        flat = value.detach().reshape(-1)
        index = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).round().long()
        values = flat[index.to(flat.device)].to("cpu")
        if values.is_floating_point():
            values = values.to(torch.bfloat16).view(torch.int16)
        digest.update(values.to(torch.int64).numpy().tobytes())
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of the libraries whose arithmetic a replay depends on."""
    versions = {"python": platform.python_version()}
    for name in ("lvlm_probe", "torch", "transformers", "tokenizers", "pillow", "torchvision", "numpy", "h5py", "peft"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def describe_model(model: torch.nn.Module) -> dict[str, Any]:
    """What a trace says about its model: identity, dtype, attention, configuration, versions. JSON only."""
    config: Any = model.config
    generation_config: Any = getattr(model, "generation_config", None)
    adapter = sorted(getattr(model, "peft_config", {}) or {})
    return {
        "model_id": str(getattr(config, "_name_or_path", "") or ""),
        "revision": str(getattr(config, "_commit_hash", "") or ""),
        "class": type(called_model(model)).__name__,
        "adapter": ",".join(adapter),
        "attn_implementation": str(getattr(config, "_attn_implementation", "") or ""),
        "torch_dtype": str(getattr(model, "dtype", "")).removeprefix("torch."),
        "fingerprint": fingerprint(model),
        "config": _json(config.to_dict()),
        "generation_config": _json(generation_config.to_dict()) if generation_config is not None else {},
        "versions": library_versions(),
    }
