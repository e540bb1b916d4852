"""Replay: log P(answer | masked image), the one differentiable function everything else is written on.

A mask says how much of the image the model may see: 1 keeps a pixel, 0 puts the baseline image there
(``Φ(I, Ĩ, M) = I ⊙ M + Ĩ ⊙ (1 − M)``, paper, Eq. 3). ``Replay.log_probs(mask)`` carries it through the processor's
geometry and the unmodified model to the log-probabilities of the recorded answer.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, overload

import torch

from lvlm_probe.errors import ModelMismatch, ProbeWarning, ReplayError
from lvlm_probe.models.drivers import probed_model
from lvlm_probe.models.exhaustion import told_out_of_memory
from lvlm_probe.models.fingerprint import same_fingerprint
from lvlm_probe.models.inputs import input_device
from lvlm_probe.models.quantised import quantisation
from lvlm_probe.replaying.isolation import outside_modes
from lvlm_probe.replaying.micro_batches import PassCounter
from lvlm_probe.replaying.protocol import Elsewhere, ReplayLike
from lvlm_probe.replaying.recorded_inputs import check_inputs, refused_in_words
from lvlm_probe.replaying.replays import Replay

if TYPE_CHECKING:
    from lvlm_probe.trace import Trace

__all__ = ["PassCounter", "Replay", "ReplayLike", "replay"]


@overload
def replay(
    trace: Trace,
    model: torch.nn.Module,
    processor: object | None = None,
    *,
    strict: bool = True,
    gradient_checkpointing: bool = False,
    micro_batch: int | None = None,
) -> Replay: ...


@overload
def replay(trace: Trace, model: Elsewhere, processor: object | None = None, *, strict: bool = True) -> ReplayLike: ...


@outside_modes
@told_out_of_memory
def replay(
    trace: Trace,
    model: torch.nn.Module | Elsewhere,
    processor: object | None = None,
    *,
    strict: bool = True,
    gradient_checkpointing: bool = False,
    micro_batch: int | None = None,
) -> Replay | ReplayLike:
    """Get ready to replay a recorded answer under masked images.

    Args:
        trace: what ``open_trace`` or a store gives.
        model: the model that was recorded, loaded again in any process; or the server that runs it
            (``lvlm_probe.connect``), which gives log-probabilities and no gradients.
        processor: its processor, or its image processor; without it masks live in pixel-input space.
        strict: refuse another model, and warn where its weights have become others since. ``False`` replays the answer
            on it all the same, e.g. to compare two models.
        gradient_checkpointing: trade time for memory in gradient passes.
        micro_batch: masks per forward pass; by default as many as one rule says (``micro_batches``).

    Raises:
        ModelMismatch: the fingerprint differs from the recorded one, or the processor makes other inputs.
        ImageError: the trace holds no image a mask could cover.
        ProcessorRefused: masks cannot be carried through this processor.
        ReplayError: the trace holds inputs that the model cannot be run on.
    """
    if not hasattr(trace, "trace_id"):
        raise ReplayError(f"a trace is what open_trace() or a store gives; got a {type(trace).__name__}")
    if isinstance(model, Elsewhere):
        return model.replayed(trace, processor=processor, strict=strict)
    if not isinstance(model, torch.nn.Module):
        raise ReplayError(
            f"the model is what from_pretrained() or probe.load() gives, or a server; got a {type(model).__name__}"
        )
    present = _check_model(trace, model) if strict else ""
    check_inputs(trace, model, processor)
    with refused_in_words(trace):
        made = Replay(trace, model, processor, gradient_checkpointing=gradient_checkpointing, micro_batch=micro_batch)
    made.replica.look(present if made.model is model else "")
    made.replica.on_change = functools.partial(_check_again, trace, model, made.device, strict)
    return made


def _check_model(trace: Trace, model: torch.nn.Module) -> str:
    """Return the model's fingerprint; empty, where the trace has none. Raises ``ModelMismatch`` for another model than
    the recorded one."""
    recorded = str(trace.model.get("fingerprint") or "")
    same, present = same_fingerprint(model, recorded) if recorded else (True, "")
    if not same:
        raise ModelMismatch(
            f"{trace.path.name} was recorded with {trace.model.get('class')} "
            f"{trace.model.get('model_id') or '(no name)'} (fingerprint {recorded[:12]}…), but this "
            f"{type(model).__name__} has fingerprint {present[:12]}…{_other_weights(trace, model)}; load the "
            f"recorded model, or pass strict=False to replay the answer on another one"
        )
    return present


def _check_again(trace: Trace, model: torch.nn.Module, device: torch.device, strict: bool) -> None:
    """What ``replay`` checks, of a model that has changed since: warns of other weights. Raises ``ReplayError``."""
    if (now := input_device(probed_model(model))) != device:
        raise ReplayError(f"the model has gone from {device} to {now} since this replay was opened: open it again")
    if strict:
        try:
            _check_model(trace, model)
        except ModelMismatch as other:
            warnings.warn(f"the model has changed since this replay was opened: {other}", ProbeWarning, stacklevel=2)


def _other_weights(trace: Trace, model: torch.nn.Module) -> str:
    """What a mismatch is due to where one of two models is quantised, or another way; else empty."""
    recorded = trace.model.get("config")
    methods = (
        quantisation(recorded if isinstance(recorded, dict) else {}),
        quantisation(getattr(probed_model(model), "config", None)),
    )
    if methods[0] == methods[1]:
        return ""
    then, now = (f"quantised by {method}" if method else "not quantised" for method in methods)
    return f": the recorded weights were {then}, these are {now}"
