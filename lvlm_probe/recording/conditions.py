"""Conditions of a ``generate()`` call that no replay has.

A log-likelihood ratio subtracts two passes over one answer. A replay runs both of them in eval mode, without autocast,
over a prompt without padding, and positions are numbered by the model. Where ``generate()`` ran otherwise, what it
computed cannot be one of the two.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from lvlm_probe.models.inputs import cache_in, input_device, list_inputs
from lvlm_probe.models.tokenizers import Stops
from lvlm_probe.models.wrappers import every_module
from lvlm_probe.recording.row_inputs import image_token_mask


def inferred_mask(model: Any, inputs: Mapping[str, torch.Tensor], stops: Stops) -> torch.Tensor | None:
    """The attention mask ``(batch, position)`` that ``generate()`` makes for itself where none is given: padding tokens
    count as padding, unless they end answers too. ``None`` where it makes none."""
    from transformers import GenerationMixin

    if "attention_mask" in inputs or stops.pad is None or stops.pad in stops.eos:
        return None
    if type(model).generate is not GenerationMixin.generate:  # one of its own, which does as it likes
        return None
    real = inputs["input_ids"] != stops.pad
    return None if bool(real.all()) else real.long()


def hides_image_tokens(inputs: Mapping[str, torch.Tensor], placeholders: Sequence[int]) -> bool:
    """Whether the attention mask of a call has image tokens among what it leaves out as padding."""
    mask, places = inputs.get("attention_mask"), image_token_mask(inputs, placeholders)
    return mask is not None and places is not None and mask.shape == places.shape and bool((places & (mask == 0)).any())


def other_conditions(model: Any, inputs: Mapping[str, torch.Tensor], kwargs: Mapping[str, Any]) -> list[str]:
    """Conditions of a ``generate()`` call that no replay has, as parts of a sentence; right padding is of a row alone.

    Args:
        model: the generating model, as it is at the call.
        inputs: the tensors of the call, with the mask that ``generate()`` infers.
        kwargs: all arguments by name.
    """
    found = []
    if model.training or any(module.training and _differs(module) for module in every_module(model)):
        found.append("the model was in training mode")
    device = input_device(model).type
    if torch.is_autocast_enabled(device):
        found.append(f"generate() ran under autocast to {str(torch.get_autocast_dtype(device)).removeprefix('torch.')}")
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        found.append(f"an attention mask of shape {tuple(mask.shape)} was given")
    if (given := inputs.get("position_ids")) is not None and not _usual(given, ids, mask):
        found.append("position_ids were given")
    cache = cache_in(kwargs)
    if kwargs.get("cache_implementation") == "quantized" or type(cache).__name__.startswith("Quantized"):
        found.append("the cache was quantised")
    if held := _positions_in(cache):
        found.append(f"a key-value cache was given that held {held} positions already")
    found += [f"{name} were given" for name in _MADE_BEFORE if kwargs.get(name) is not None]
    found += [f"{name}={value!r} was given" for name, value in _options(model, kwargs).items()]
    return found


_MADE_BEFORE = ("encoder_outputs", "mm_encoder_outputs", "decoder_inputs_embeds")
"""What replays make themselves of pixels and tokens."""


def _options(model: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``generate()`` that are no tensors and reach the model's own call (``vision_feature_layer=-1``)."""
    from transformers import GenerationConfig, GenerationMixin

    generation, lists = GenerationConfig(), list_inputs(model)
    of_call = inspect.signature(type(model).forward).parameters.keys() - {"labels", "return_dict", "logits_to_keep"}
    of_generation = {
        *inspect.signature(GenerationMixin.generate).parameters,
        *("tokenizer", "assistant_tokenizer", "trust_remote_code", "return_dict", "logits_to_keep"),
    }

    def reaches(name: str) -> bool:
        return not hasattr(generation, name) and (name in of_call or name not in of_generation)

    def is_option(value: Any) -> bool:
        single = not isinstance(value, list | tuple)
        return all(isinstance(one, int | float | str) for one in ([value] if single else value)) and value is not False

    given = {name: value for name, value in kwargs.items() if name not in lists and is_option(value)}
    return {name: value for name, value in given.items() if value not in ([], ()) and reaches(name)}


def padded_behind(real: torch.Tensor | None) -> list[str]:
    """The same of one prompt's padding, ``(position,)`` bool: the answer must follow on the prompt's last token."""
    return [] if real is None or bool(real[-1]) else ["the prompt was padded on the right"]


def forced_because(conditions: Sequence[str]) -> list[str]:
    """The sentence for the trace; none without conditions."""
    if not conditions:
        return []
    return [
        f"{' and '.join(conditions)}, unlike in a replay; log-probabilities come from one teacher-forced pass as a "
        "replay runs it, so that both sides of the log-likelihood ratio are computed alike; attention rows, where "
        "there are some, are the call's own"
    ]


def _differs(module: torch.nn.Module) -> bool:
    """Whether a module inside a model in eval mode computes otherwise in training mode."""
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) or getattr(module, "gradient_checkpointing", False):
        return True
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return module.p > 0
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items())


def compiles_itself(model: Any, setting: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether ``generate()`` compiles the model's call for its decoding steps, as it does for caches of fixed size on
    accelerators.

    Args:
        model: the generating model.
        setting: ``settings_of`` the call.
        kwargs: its arguments by name.
    """
    if setting("disable_compile"):
        return False
    everywhere = bool(getattr(setting("compile_config"), "_compile_all_devices", None))
    if input_device(model).type not in ("cuda", "xpu", "neuron", "tpu") and not everywhere:
        return False
    cache = cache_in(kwargs)
    fixed = getattr(cache, "is_compileable", False) and type(cache).__name__ != "DynamicCache"
    return fixed or setting("cache_implementation") in ("static", "sliding_window", "hybrid", "hybrid_chunked")


def other_cache(setting: Callable[..., Any], kwargs: Mapping[str, Any]) -> str:
    """Which cache of a ``generate()`` call may show the model other keys than a pass without one, as a part of a
    sentence; empty of the usual one, which grows. Arguments as above."""
    named, cache = setting("cache_implementation"), cache_in(kwargs)
    if cache is not None and not type(cache).__name__.startswith(("DynamicCache", "EncoderDecoderCache")):
        return f"the cache was a {type(cache).__name__}"
    return "" if named is None or str(named).startswith("dynamic") else f"the cache was {named}"


def offloads_its_cache(setting: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether keys and values of a ``generate()`` call live in main memory between its steps; arguments as above."""
    named = str(setting("cache_implementation") or "").startswith("offloaded")
    return named or bool(getattr(cache_in(kwargs), "offloading", False))


def without_autocast(model: torch.nn.Module) -> AbstractContextManager[Any]:
    """Inside the block passes of ours run in the model's own dtypes, as they will when the answer is replayed."""
    device = input_device(model).type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _usual(given: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether positions are those that the model counts itself, at all tokens that are no padding."""
    if given.shape[-2:] != ids.shape[-2:] or given.ndim != 2:
        return False
    real = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else mask.to(ids.device).long()
    counted = real.cumsum(-1) - 1
    return bool(((given.to(ids.device) == counted) | (real == 0)).all())


def cached_images(ids: torch.Tensor, image_token: int | None, kwargs: Mapping[str, Any]) -> str:
    """The reason why a call is not recorded whose pixel inputs are those of its last images alone, as a key-value cache
    holds the ones before; empty where it holds none."""
    held = _positions_in(cache_in(kwargs))
    tokens = int((ids[:, :held] == image_token).sum()) if image_token is not None else 0
    return _only_cached(held, tokens) if tokens else ""


def _positions_in(cache: Any) -> int:
    length = getattr(cache, "get_seq_length", None)
    return int(length()) if callable(length) else 0


def _only_cached(held: int, tokens: int) -> str:
    told = f"{tokens} image tokens stand for images" if tokens else "an earlier turn may have had images"
    return (
        f"this turn goes on from a key-value cache ({held} positions), and {'its ' if tokens else ''}{told} that only "
        "the cache holds; nothing is recorded. Record this turn without the cache: generate() over the conversation "
        "with its images"
    )


def without_image(
    ids: torch.Tensor, image_token: int | None, kwargs: Mapping[str, Any], whole: str | None = None
) -> str:
    """The reason why a call without pixel inputs in floating point is not recorded; ``whole`` is one of grey levels."""
    if whole is not None:
        return (
            f"{whole} was given to generate() in whole grey levels (torch.uint8), between which no mask can blend; "
            "nothing is recorded. Let the processor rescale and normalise (no do_rescale=False)"
        )
    held = _positions_in(cache_in(kwargs))
    tokens = int((ids == image_token).sum()) if image_token is not None else 0
    if held:
        return _only_cached(held, tokens)
    if tokens:
        return (
            f"the prompt holds {tokens} image tokens, but no pixel inputs were given to generate(); nothing is "
            f"recorded. Pass the processor's outputs on: model.generate(**inputs)"
        )
    return (
        "the prompt holds no image (no pixel inputs were given to generate()), so there is nothing to explain; nothing "
        "is recorded. Put an image into the prompt and pass the processor's outputs on: model.generate(**inputs)"
    )
