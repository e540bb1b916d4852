"""Writers that are killed with SIGKILL, at every system call in turn and at random instants, and what they leave.

The parent imports and writes everything once, so that a fork is ready to write at once. Half of the victims are
traced (``ptrace``) and killed as they enter or leave a system call chosen by the seed, so that no step of a write is
missed; the other half at a random instant, which also falls into the middle of a call. Every finished file is then
read and compared with what was written; everything else has to be a ``.part`` file that the store knows as an orphan.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import report_samples
from crash_victims import expected_capture
from PIL import Image
from trace_samples import sample_image

import lvlm_probe as probe
from campaigns.tally import Campaign, Tally
from lvlm_probe.errors import ProbeError
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.study.run.units import Records
from lvlm_probe.trace import TraceStore, open_store, write

__all__ = ["CAMPAIGNS", "kills"]

BATCH = 100
"""Kills between two inspections, so that a folder stays small."""

_TRACEME, _SYSCALL, _SETOPTIONS, _KILL = 0, 24, 0x4200, 8
_EXITKILL_AND_SYSGOOD = 0x100001

# ------------------------------------------------------------------------------------------------------ what is written


def heatmap(seed: int) -> Heatmap:
    values = np.random.default_rng(seed).random((32, 32), np.float32)
    provenance = {"trace_id": f"sample-{seed}-r0", "seed": seed}
    return Heatmap(values, (24, 18), method="occlusion", selection=report_samples.selection(), provenance=provenance)


def record(seed: int) -> dict[str, Any]:
    return {
        "unit": "map",
        "status": "done",
        "seed": seed,
        "values": np.random.default_rng(seed).random(40).tolist(),
        "text": "ü" * 500,
    }


def write_trace(folder: Path, seed: int) -> None:
    write(expected_capture(seed), folder)


def write_heatmap(folder: Path, seed: int) -> None:
    heatmap(seed).write(folder / "explanations" / f"{seed}.h5")


def write_record(folder: Path, seed: int) -> None:
    Records(folder / "units").write(f"{seed:032x}", record(seed))


def write_index(folder: Path, seed: int) -> None:
    open_store(folder).find(status="complete", on_error=lambda *_: None)


def write_page(folder: Path, seed: int) -> None:
    probe.report([PAGE], out=folder / "pages" / f"{seed}.html")


def write_picture(folder: Path, seed: int) -> None:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    PAGE.save(folder / "pictures" / f"{seed}.png")


PAGE = report_samples.heat(report_samples.trace(images=[sample_image(64, 48)]))
WORK: dict[str, Callable[[Path, int], None]] = {
    "trace": write_trace,
    "heatmap": write_heatmap,
    "record": write_record,
    "index": write_index,
    "page": write_page,
    "picture": write_picture,
}

# ---------------------------------------------------------------------------------------------------------- the killing


def _do(folder: Path, seeds: list[int]) -> None:
    """Writes of every kind for each seed; each seed begins with another kind, so that all are met by early kills."""
    kinds = list(WORK.values())
    for seed in seeds:
        for place in range(len(kinds)):
            kinds[(seed + place) % len(kinds)](folder, seed)


def _child(folder: Path, seeds: list[int], before: Callable[[], None]) -> int:
    """Fork a writer; the parent gets its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            before()
            _do(folder, seeds)
            status = 0
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.write(2, f"victim: {type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(status)
    return child


def _ptrace(request: int, child: int, data: int = 0) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    return int(libc.ptrace(request, child, 0, data))


def _traced() -> None:
    if _ptrace(_TRACEME, 0) < 0:
        os._exit(2)
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_at_call(folder: Path, seeds: list[int], step: int | None) -> tuple[int, int | None]:
    """Kill a writer at its ``step``-th stop at a system call (each stops it twice); with ``None`` let it finish.

    Returns:
        stops that were passed, and the exit status of a writer that ended by itself.
    """
    child = _child(folder, seeds, _traced)
    os.waitpid(child, 0)
    _ptrace(_SETOPTIONS, child, _EXITKILL_AND_SYSGOOD)
    passed = 0
    while step is None or passed < step:
        _ptrace(_SYSCALL, child)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            return passed, os.WEXITSTATUS(status)
        passed += 1
    os.kill(child, signal.SIGKILL)
    while os.WIFSTOPPED(os.waitpid(child, 0)[1]):
        pass
    return passed, None


def kill_after(folder: Path, seeds: list[int], seconds: float) -> int | None:
    """Kill a writer ``seconds`` after it has begun; its exit status where it was faster."""
    ready, tell = os.pipe()
    child = _child(folder, seeds, lambda: os.close(tell))  # the pipe closes with the child's first step
    os.close(tell)
    os.read(ready, 1)
    os.close(ready)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def can_trace() -> bool:
    """Whether this process may trace its children; containers may forbid it."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return False
    with tempfile.TemporaryDirectory() as folder:
        return kill_at_call(Path(folder), [], None)[1] == 0


# ------------------------------------------------------------------------------------------------------- the inspection


def inspect(folder: Path, tally: Tally) -> None:
    """Read everything that victims have left."""
    store = open_store(folder)
    for path in store.files:
        tally.counts["finished traces"] += 1
        if fault := trace_fault(path):
            tally.breaks("damaged trace", f"{path.name}: {fault}")
    for path in sorted((folder / "explanations").glob("*.h5")):
        tally.counts["finished heatmaps"] += 1
        try:
            found, wanted = Heatmap.read(path), heatmap(int(path.stem))
            if not np.array_equal(found.values, wanted.values) or found.describe() != json.loads(
                json.dumps(wanted.describe())
            ):
                tally.breaks("damaged heatmap", f"{path.name}: it is not what was written")
        except ProbeError as error:
            tally.breaks("damaged heatmap", f"{path.name}: {error}")
    units = Records(folder / "units")
    for path in sorted((folder / "units").glob("*.json")):
        tally.counts["finished study records"] += 1
        try:
            if units.read(path.stem) != json.loads(json.dumps(record(int(path.stem, 16)))):
                tally.breaks("damaged study record", f"{path.name}: it is not what was written")
        except ProbeError as error:
            tally.breaks("damaged study record", f"{path.name}: {error}")
    for path in sorted((folder / "pages").glob("*.html")):
        tally.counts["finished pages"] += 1
        if not path.read_text(encoding="utf-8").rstrip().endswith("</html>"):
            tally.breaks("damaged page", path.name)
    for path in sorted((folder / "pictures").glob("*.png")):
        tally.counts["finished pictures"] += 1
        try:
            with Image.open(path) as picture:
                picture.load()
        except (OSError, SyntaxError) as error:
            tally.breaks("damaged picture", f"{path.name}: {error}")
    try:
        if len(store.find(on_error=lambda *_: None)) != len(store):
            tally.breaks("damaged index", "find() does not list all traces")
    except ProbeError as error:
        tally.breaks("damaged index", str(error))
    parts = {path for path in folder.rglob("*") if ".part" in path.name}
    tally.counts["unfinished .part files"] += len(parts)
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    known = {Path(path) for at in folders for path in open_store(at).orphans(min_age=0)}
    for path in sorted(parts - known):
        tally.counts[f"unknown to orphans(): in {path.parent.name or '.'}/"] += 1
        tally.breaks("a .part file that orphans() does not know", f"{path.relative_to(folder)}")
    for at in folders:
        open_store(at).clean(min_age=0)
    for path in sorted(path for path in known if path.exists()):
        tally.breaks("a .part file that clean() leaves", path.name)


def trace_fault(path: Path) -> str | None:
    """What is wrong with a finished trace file; ``None`` when it verifies and holds what was recorded."""
    try:
        store = TraceStore(path)
        store[0].verify()
        capture = expected_capture(store[0].meta["run"])
        if len(store) != len(capture.rows):
            return f"{len(store)} rows, {len(capture.rows)} were recorded"
        for trace, row in zip(store, capture.rows, strict=True):
            attention = np.asarray(row.points["decoder.attention"].values, np.float32)
            if not (
                trace.trace_id == row.trace_id
                and list(trace.tokens) == list(row.tokens)
                and trace.prompt == row.prompt
                and np.array_equal(trace.log_probs, row.log_probs)
                and np.array_equal(trace.baseline_log_probs, row.baseline_log_probs)
                and np.array_equal(trace.attention.values, attention)
                and trace.image_record().data == row.images[0].data
            ):
                return "it is not what was recorded"
    except (ProbeError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None


# --------------------------------------------------------------------------------------------------------- the campaign


def kills(first: int, count: int, seed: int) -> Tally:
    """Kill writers number ``first`` to ``first + count``."""
    tally = Tally()
    traceable = can_trace()
    if not traceable:
        tally.counts["chunks whose kills were all at random instants: tracing is not allowed here"] += 1
    root = Path(tempfile.mkdtemp(prefix="lvlm_probe_kills_"))
    try:
        _do(root / "warm", [0, 1])
        (root / "measured").mkdir()
        started = time.perf_counter()
        _do(root / "measured", [0])
        longest = 1.3 * (time.perf_counter() - started)
        stops = kill_at_call(root / "stepped", [0], None)[0] if traceable else 0
        tally.reaches("stops at system calls in one round of writes", stops)
        for begin in range(first, first + count, BATCH):
            folder = root / str(begin)
            for number in range(begin, min(begin + BATCH, first + count)):
                rng = random.Random(f"{seed}/{number}")
                seeds = [number * 7 + place * 2 for place in range(3)]
                if traceable and number % 2 == 0:
                    passed, status = kill_at_call(folder, seeds, rng.randrange(1, stops))
                    tally.counts["killed at a system call"] += status is None
                    tally.counts["system calls passed before"] += passed // 2
                else:
                    status = kill_after(folder, seeds, rng.uniform(0, longest))
                    tally.counts["killed at a random instant"] += status is None
                tally.tried += status is None
                if status == 0:
                    tally.counts["faster than the kill"] += 1
                elif status is not None:
                    tally.breaks("a writer failed", f"kill {number}: status {status}")
            inspect(folder, tally)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return tally


CAMPAIGNS = (
    Campaign(
        "kills",
        "A process that is killed while it writes leaves whole files, and part files that are known as such.",
        "kills",
        10_400,
        650,
        kills,
    ),
)
