"""Loading a model and its processor from a directory or the hub, with and without torchvision."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch

from lvlm_probe.plugins import load_plugins

__all__ = ["ONE_LOAD", "default_device", "load", "load_processor"]

ONE_LOAD = threading.RLock()
"""Held while transformers makes a model. It replaces ``PreTrainedModel.tie_weights`` and torch's default dtype for the
whole process meanwhile, and puts back what it found: of two loads at once the second one puts back what the first had
put there, and from then on no model of the process has its weights tied."""


def load(
    source: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    attn: str | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a vision-language model, in eval mode, and its processor.

    A short cut for ``AutoModelForImageTextToText`` and ``AutoProcessor``; a probe attaches to what those give just as
    well.

    Args:
        source: a model directory or a hub id.
        device: where to put it; by default CUDA where there is one, else the CPU. Apple's ``mps`` has no float64, which
            most methods compute with: it is taken only when asked for.
        dtype: of the weights; ``"auto"`` for that of the checkpoint, which is the default on a GPU. On the CPU it is
            float32.
        attn: ``"sdpa"``, ``"eager"``, ...; by default transformers' choice.
        device_map: ``"auto"`` spreads a model over all devices by accelerate; ``device`` is then not used.
        trust_remote_code: run the code that comes with the model, for one that transformers does not know. Without it
            such a model is refused, and nobody is asked.

    Plugins are loaded where transformers does not know the model's type, so that a family which an installed plugin
    brings opens without an import by the user.

    Raises:
        OSError, ValueError: transformers' own, when it cannot be loaded.
    """
    from transformers import AutoModelForImageTextToText

    _register_family(source)
    place = default_device() if device is None else torch.device(device)
    if dtype is None:
        dtype = torch.float32 if place.type == "cpu" and device_map is None else "auto"
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn is not None:
        options["attn_implementation"] = attn
    if device_map is not None:
        options["device_map"] = device_map
    with ONE_LOAD:
        model = AutoModelForImageTextToText.from_pretrained(source, **options).eval()
    processor = load_processor(source, trust_remote_code=trust_remote_code)
    return model if device_map is not None else model.to(place), processor


def default_device() -> torch.device:
    """Return where models go by default: CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_processor(source: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """``AutoProcessor.from_pretrained``, also for families that take videos where torchvision is not installed.

    Their video processors need torchvision, and without it the whole processor fails to load; here its class is then
    loaded without the video half. Images and text are processed by the same code either way.
    """
    from transformers import AutoProcessor
    from transformers.utils import is_torchvision_available

    _register_family(source)

    try:
        return AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (ImportError, OSError):  # OSError: saved without its video half
        processor_class = None if is_torchvision_available() else _processor_class(source, trust_remote_code)
        if processor_class is None or "video_processor" not in processor_class.get_attributes():
            raise
    return _without_video(processor_class).from_pretrained(source, trust_remote_code=trust_remote_code)


def _register_family(source: str | os.PathLike[str]) -> None:
    """Loads plugins if the model's type is not known to transformers; one of them may register it."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    try:
        settings, _ = PretrainedConfig.get_config_dict(source)
    except (OSError, ValueError):
        return  # loading will say what is wrong with it
    if settings.get("model_type") and settings["model_type"] not in CONFIG_MAPPING:
        load_plugins()


def _processor_class(source: str | os.PathLike[str], trust_remote_code: bool) -> Any:
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    try:
        model_type = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code).model_type
    except (OSError, ValueError):
        return None
    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    return None if name is None else getattr(transformers, name, None)


def _without_video(processor_class: Any) -> Any:
    """The same class minus the video processor: ``ProcessorMixin`` asks ``get_attributes`` for its parts."""
    parts = [part for part in processor_class.get_attributes() if part != "video_processor"]
    namespace = {"get_attributes": classmethod(lambda _: list(parts)), "__module__": processor_class.__module__}
    return type(processor_class.__name__, (processor_class,), namespace)
