"""Memory that runs out: how errors of devices and libraries say so, and how it is told to the user."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from lvlm_probe.errors import OutOfMemory, ProbeError

P = ParamSpec("P")
R = TypeVar("R")

_FRAMES_TOLD = 8
"""Innermost frames that are told of an error whose frames are dropped."""
_RAN_OUT = (
    "can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED", "valid cuDNN algorit",
    "HOST_ALLOCATION_FAILED", "NVML_SUCCESS == r", "insufficient resources", "INSUFFICIENT_RESOURCES",
    "OUT_OF_DEVICE_MEMORY", "OUT_OF_HOST_MEMORY", "bad_alloc", "NOT_INITIALIZED when calling `cublasCreate",
)  # fmt: skip


def ran_out(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out, or one that it was raised from, or one of a group; on the CPU and in
    accelerators' libraries a RuntimeError does. What this package says itself is final: it has tried already."""
    met: list[BaseException] = []  # an error may have been raised from itself
    while error is not None and error not in met and not isinstance(error, ProbeError):
        told = isinstance(error, RuntimeError) and any(words in str(error) for words in _RAN_OUT)
        if told or isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, BaseExceptionGroup) and any(map(ran_out, error.exceptions)):
            return True
        met.append(error)
        error = error.__cause__
    return False


def out_of_memory(sentence: str, error: BaseException | None) -> OutOfMemory:
    """The error to raise from ``error``, which lets go of what its frames hold: it is the memory that is missing.

    Cleared frames are not enough, as the functions that ran in them hold the variables that they share. Where it was
    raised stands in a note.
    """
    chain: BaseException | None = error
    while chain is not None and chain.__traceback__ is not None:
        chain.add_note("Raised at:\n" + "".join(traceback.format_tb(chain.__traceback__, -_FRAMES_TOLD)).rstrip())
        traceback.clear_frames(chain.__traceback__)
        chain.__traceback__ = None
        chain = chain.__context__
    return OutOfMemory(sentence)


def does_not_fit(what: str, error: BaseException, way_out: str) -> OutOfMemory:
    """``out_of_memory`` of a pass: what did not fit, the device's own words, and the ways out."""
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    advice = f"load the model in bfloat16 or with device_map='auto', or {way_out}"
    return out_of_memory(f"{what} ({reason}); {advice}", error)


def told_out_of_memory(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose caller is told of memory that runs out in it, wherever, by ``OutOfMemory``."""

    @functools.wraps(function)
    def told(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if not ran_out(error):
                raise
            raise does_not_fit(f"{function.__name__}: memory ran out", error, "use a smaller image") from error

    return told
