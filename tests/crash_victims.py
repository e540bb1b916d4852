"""Processes that record and are killed at random times, and the inspection of what they leave behind."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
from trace_samples import sample_capture

from lvlm_probe.errors import TraceError
from lvlm_probe.format import Capture, read_arrays, write_arrays
from lvlm_probe.trace import TraceStore, open_store, write


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


def _record_for_ever(directory: Path, first_seed: int, ready: int) -> None:
    seed = first_seed
    while True:
        write(expected_capture(seed), directory)
        write_arrays(
            directory / "explanations" / f"{seed}.h5",
            "heatmap",
            "1.0",
            {"values": expected_heatmap(seed)},
            {"seed": seed},
        )
        if seed == first_seed:
            os.write(ready, b"!")
        seed += 1


def kill_recorders(directory: Path, *, kills: int, seed: int, writes: float = 3) -> Toll:
    """Forks ``kills`` recorders one after the other, and kills each with SIGKILL at a random time within about
    ``writes`` writes after its first; compares every finished file with what was recorded."""
    rng = random.Random(seed)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as warm:
        # Whatever is imported or set up at the first write is done before the forks, so that victims die writing.
        write(expected_capture(0), warm)
        begun = time.perf_counter()
        for warm_seed in range(3):
            write(expected_capture(warm_seed), warm)
        longest = min(0.3, writes * (time.perf_counter() - begun) / 3)
    for kill in range(kills):
        ready, signal_ready = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                _record_for_ever(directory, kill * 10_000, signal_ready)
            finally:
                os._exit(1)
        os.read(ready, 1)
        time.sleep(rng.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        os.close(ready)
        os.close(signal_ready)
        if not os.WIFSIGNALED(status):
            raise RuntimeError(f"victim {kill} ended by itself (status {status}) before it was killed")
    store = open_store(directory)
    damaged = [f"{path.name}: {fault}" for path in store.files if (fault := _fault(path))]
    explanations = sorted((directory / "explanations").glob("*.h5"))
    damaged += [f"{path.name}: {fault}" for path in explanations if (fault := _heatmap_fault(path))]
    return Toll(
        kills=kills,
        files=len(store.files),
        traces=len(store),
        explanations=len(explanations),
        parts=len(store.orphans(min_age=0)),
        damaged=tuple(damaged),
        seconds=time.perf_counter() - started,
    )


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
                and trace.tokens == row.pieces
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
