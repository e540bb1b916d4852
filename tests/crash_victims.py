"""Processes that record and are killed at random times, and the inspection of what they leave behind."""

from __future__ import annotations

import dataclasses
import io
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from trace_samples import sample_capture

from lvlm_probe.errors import TraceError
from lvlm_probe.storage import read_arrays, write_arrays
from lvlm_probe.trace import TraceStore, open_store, write
from lvlm_probe.trace.records import Capture


@dataclasses.dataclass(frozen=True)
class Toll:
    """What a number of kills did."""

    kills: int
    files: int
    traces: int
    explanations: int
    parts: int
    damaged: tuple[str, ...]
    seconds: float


def expected_capture(seed: int) -> Capture:
    """What the victim recorded under ``seed``."""
    return sample_capture(1 + seed % 3, seed=seed, tokens=5 + seed % 7, image_tokens=64, layers=8, heads=2)


def expected_heatmap(seed: int) -> np.ndarray:
    """What the victim explained under ``seed``."""
    return np.random.default_rng(seed).random((64, 64), np.float32)


def _record_for_ever(directory: Path, first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 1000):  # it is killed long before
        write(expected_capture(seed), directory)
        write_arrays(
            directory / "explanations" / f"{seed}.h5",
            "heatmap",
            "1.0",
            {"values": expected_heatmap(seed)},
            {"seed": seed},
        )


_STEPS = ("open", "fsync", "replace", "unlink", "stat", "mkdir")
"""What a write asks of the system, by its name in ``os``."""


def _die_at(step: int, *, after: bool) -> None:
    """Kills this process with SIGKILL at its ``step``-th request to the file system, before or after it is served.

    The bytes themselves are written piece by piece, so that a kill also falls between two pieces.
    """
    left = step

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            nonlocal left
            left -= 1
            if left <= 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*args, **settings)
            finally:  # a folder that is there already is answered with an exception
                if left <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    class Piecewise(io.FileIO):
        def write(self, data: Any) -> int:
            return counted(super().write)(memoryview(data)[:8192])

    for name in _STEPS:
        setattr(os, name, counted(getattr(os, name)))
    io.FileIO = Piecewise  # type: ignore[misc]


def kill_recorders(directory: Path, *, kills: int, seed: int, steps: int = 45) -> Toll:
    """Forks ``kills`` recorders one after the other, each of which is killed with SIGKILL at a moment that the seed
    chooses: at one of its first ``steps`` requests to the file system, or, every fourth, from outside while it runs.
    Compares every finished file with what was recorded.

    Imports and whatever else is set up at a first write are done before the forks, so that victims die writing, and a
    kill costs little more than the writes before it.
    """
    rng = random.Random(seed)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as warm:
        write(expected_capture(0), warm)
    for kill in range(kills):
        moment, after, outside = rng.randint(1, steps), rng.random() < 0.5, kill % 4 == 3
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                if outside:
                    _tell_at(moment, writing)
                else:
                    _die_at(moment, after=after)
                _record_for_ever(directory, (seed * 1_000_003 + kill) * 1000)
            finally:
                os._exit(1)
        if outside:
            os.read(reading, 1)  # it writes, and goes on writing: what it is at now depends on the two processes
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        os.close(reading)
        os.close(writing)
        if not os.WIFSIGNALED(status):
            raise RuntimeError(f"victim {kill} ended by itself (status {status}) before it was killed")
    store = open_store(directory)
    damaged = [f"{path.name}: {fault}" for path in store.files if (fault := _fault(path))]
    explanations = sorted((directory / "explanations").glob("*.h5"))
    damaged += [f"{path.name}: {fault}" for path in explanations if (fault := _heatmap_fault(path))]
    known = set(store.orphans(min_age=0))
    others = [path for path in directory.rglob("*") if path.is_file() and path.suffix != ".h5"]
    damaged += [f"{path.name}: no file of ours and no orphan" for path in others if path not in known]
    return Toll(
        kills=kills,
        files=len(store.files),
        traces=len(store),
        explanations=len(explanations),
        parts=len(known),
        damaged=tuple(damaged),
        seconds=time.perf_counter() - started,
    )


def _tell_at(step: int, writing: int) -> None:
    """Tells the parent at the ``step``-th request to the file system, and goes on."""
    left = step
    real = os.open

    def call(*args: Any, **settings: Any) -> int:
        nonlocal left
        left -= 6
        if -6 < left <= 0:
            os.write(writing, b"!")
        return real(*args, **settings)

    os.open = call  # type: ignore[assignment]


def _fault(path: Path) -> str | None:
    """What is wrong with a finished trace file, None when it holds exactly what was recorded."""
    try:
        store = TraceStore(path)
        capture = expected_capture(store[0].meta["run"])
        if len(store) != len(capture.rows):
            return f"{len(store)} rows, {len(capture.rows)} were recorded"
        for trace, row in zip(store, capture.rows, strict=True):
            attention = row.points["decoder.attention"].values
            same = (
                trace.trace_id == row.trace_id
                and trace.tokens == row.tokens
                and trace.prompt == row.prompt
                and np.array_equal(trace.log_probs, row.log_probs)
                and np.array_equal(trace.baseline_log_probs, row.baseline_log_probs)
                and np.array_equal(trace.attention.values, np.asarray(attention, np.float32))
                and trace.image_record().data == row.images[0].data
            )
            if not same:
                return "it is not what was recorded"
    except TraceError as error:
        return str(error)
    return None


def _heatmap_fault(path: Path) -> str | None:
    try:
        arrays, attrs = read_arrays(path, "heatmap")
    except TraceError as error:
        return str(error)
    return None if np.array_equal(arrays["values"], expected_heatmap(attrs["seed"])) else "it is not what was written"
