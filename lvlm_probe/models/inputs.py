"""What a model's ``forward`` takes, and where it wants it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, get_args, get_origin

import torch

from lvlm_probe.models.wrappers import execution_device

CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
"""What models call their key-value cache: transformers' own ``cache`` since 5.24, and as the second before."""


def cache_in(values: Mapping[str, Any] | Any) -> Any:
    """The cache among arguments of a call, or in what a model returned; ``None`` where there is none."""
    for name in CACHE_NAMES[:2]:
        found = values.get(name) if isinstance(values, Mapping) else getattr(values, name, None)
        if found is not None:
            return found
    return None


def list_inputs(model: torch.nn.Module) -> frozenset[str]:
    """Inputs that the model takes as lists, and as nothing else (``num_local_patches: list[int] | None``): traces and
    replays keep them as tensors."""

    def only_lists(annotation: Any) -> bool:
        kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not type(None)]
        if get_origin(annotation) is list:
            kinds = [annotation]
        return bool(kinds) and all(get_origin(kind) is list for kind in kinds)

    try:
        parameters = inspect.signature(model.forward, eval_str=True).parameters
    except Exception:  # annotations name what is not there to be looked up
        parameters = inspect.signature(model.forward).parameters
    return frozenset(name for name, parameter in parameters.items() if only_lists(parameter.annotation))


def is_separate(name: str, inputs: Mapping[str, Any]) -> bool:
    """Whether an input goes with another sequence of tokens than the prompt: one of a text that is read elsewhere
    (``qformer_attention_mask`` beside ``qformer_input_ids``), or of the decoder.
    """
    streams = [other.removesuffix("input_ids") for other in inputs if other.endswith("_input_ids")]
    return name.startswith(tuple(streams)) if streams else False


@functools.lru_cache(256)
def index_on(device: torch.device, numbers: tuple[int, ...]) -> torch.Tensor:
    """Indices ``(number,)`` on a device, made there once: a list as an index is copied there again each time."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.long).to(device)


def input_device(model: torch.nn.Module) -> torch.device:
    """The device that token ids and pixels go to: that of the input embeddings, or, offloaded, that they run on."""
    hub: Any = model
    try:
        embeddings = hub.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # remote code need not answer
        embeddings = None
    weight = getattr(embeddings, "weight", None)
    device = weight.device if weight is not None else next(model.parameters()).device
    return execution_device(embeddings) if device.type == "meta" else device
