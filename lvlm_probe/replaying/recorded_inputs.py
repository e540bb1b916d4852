"""Inputs of a recorded answer, checked against the model they are to be given to, before it is.

A trace comes from a file, and a file from anyone: ids outside the vocabulary, pixels that are no numbers or a mask of
another length would end as an error deep inside the model, on a GPU as one that ends the whole process. What can be
told beforehand is refused in words; what the model raises all the same is told as the trace's fault.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from lvlm_probe.errors import ProbeError, ReplayError
from lvlm_probe.escaping import first_line
from lvlm_probe.models.anatomy import Anatomy, examine
from lvlm_probe.models.drivers import probed_model
from lvlm_probe.models.exhaustion import does_not_fit, ran_out
from lvlm_probe.models.tokenizers import vocabulary_size

if TYPE_CHECKING:
    from lvlm_probe.trace.records import TraceLike

_MOST_PATCHES = 2**22
"""Patches of all images of a prompt: more than any model has context for."""


def check_inputs(trace: TraceLike, model: torch.nn.Module, processor: object | None = None) -> None:
    """Refuses a trace that the model cannot be run on. Nothing is run for it.

    Args:
        trace: what ``open_trace`` gives.
        model: the model that it is to be replayed on.
        processor: its processor.

    Raises:
        ReplayError: an id is outside the vocabulary, there is nothing to read or to say, or an input has NaN or
            infinite pixels, or the mask is of another prompt.
        TraceError: the file cannot be read.
    """
    model = probed_model(model, processor)
    anatomy = examine(model, processor)
    prompt, answer = torch.tensor(trace.input_ids), torch.tensor(trace.token_ids)
    if not len(prompt) or not len(answer):
        raise _refusal(trace, f"the prompt has {len(prompt)} tokens and the answer {len(answer)}")
    # A placeholder of images may be any number: the model replaces it before it looks it up.
    known, size = torch.tensor(anatomy.placeholders, dtype=prompt.dtype), vocabulary_size(model)
    spared = torch.isin(prompt, known) if len(known) else (prompt < 0)
    for name, ids in (("prompt", prompt[~spared]), ("answer", answer)):
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            what = f"the {name} holds ids from {int(ids.min())} to {int(ids.max())}"
            raise _refusal(trace, f"{what}, and the model's vocabulary has {size}")
    inputs = trace.model_kwargs
    for name, value in inputs.items():
        _check_numbers(trace, name, value, anatomy)
    _check_shapes(trace, {n: v for n, v in inputs.items() if not anatomy.is_pixel_name(n)}, len(prompt))


def _check_numbers(trace: TraceLike, name: str, value: torch.Tensor, anatomy: Anatomy) -> None:
    pixels = name.startswith("pixel_values")
    if pixels and not value.dtype.is_floating_point and value.dtype != torch.uint8:
        raise _refusal(trace, f"{name} are of dtype {str(value.dtype).removeprefix('torch.')}, which no pixels are")
    if value.dtype.is_floating_point:
        seen = value.float()
        if bool(seen.isnan().any()):
            raise _refusal(trace, f"{name} has {int(seen.isnan().sum())} values that are NaN")
        if anatomy.is_pixel_name(name) and bool(seen.isinf().any()):  # in a mask it means something
            raise _refusal(trace, f"{name} has {int(seen.isinf().sum())} infinite values")
    elif name.endswith(("_grid_thw", "_grid_hws", "_sizes", "_shapes")) and value.numel():
        if int(value.min()) < 0 or int(value.max()) > _MOST_PATCHES:
            raise _refusal(trace, f"{name} holds sizes from {int(value.min())} to {int(value.max())}")
        if "grid" in name and value.ndim == 2 and int(value.double().prod(1).sum()) > _MOST_PATCHES:
            raise _refusal(trace, f"{name} stands for {int(value.double().prod(1).sum())} patches")


def _check_shapes(trace: TraceLike, inputs: Mapping[str, torch.Tensor], prompt: int) -> None:
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        if tuple(mask.shape) != (1, prompt):
            raise _refusal(trace, f"attention_mask has shape {tuple(mask.shape)} for a prompt of {prompt} tokens")
        if not bool((mask != 0).any()):
            raise _refusal(trace, "attention_mask hides the whole prompt")


@contextlib.contextmanager
def refused_in_words(trace: TraceLike) -> Iterator[None]:
    """Turns what a model or a processor raises on the inputs of ``trace`` into ``ReplayError``."""
    try:
        yield
    except ProbeError:
        raise
    # What a model raises on inputs of the wrong kind is of any of these types. What our own code raises by mistake is
    # told as such too, with the error itself behind it.
    except (
        ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError,
    ) as error:  # fmt: skip
        if ran_out(error):
            what = f"what the model reads of {trace.path.name} does not fit into memory"
            raise does_not_fit(what, error, "record the answer with a smaller image") from error
        raise _refusal(trace, f"the model does not take it ({first_line(error, 200)})") from error


def _refusal(trace: TraceLike, what: str) -> ReplayError:
    return ReplayError(
        f"{trace.path.name} cannot be replayed: {what}; record it again with this model, or do not trust the file"
    )
