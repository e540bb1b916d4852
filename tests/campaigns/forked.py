"""Trials in forks: a crash, a hang, memory and foreign exceptions are counted, and the campaign goes on.

Time is the fork's own processor time, which a busy machine does not lengthen.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from campaigns.tally import Tally

__all__ = ["Limits", "in_forks"]

Trial = Callable[[int, Path], tuple[str, Callable[[], str]]]
"""``(number, folder)`` → a label, whose first word is counted, and the trial: returns an outcome in one word."""


@dataclass(frozen=True)
class Limits:
    """What one trial may take.

    Attributes:
        slow: processor seconds that break the promise.
        hangs: processor seconds after which the fork is stopped; twenty times as long by the clock, for waiting.
        big: bytes by which the fork's peak may grow.
        secret: a folder in which nothing may be opened.
        batch: trials in one fork.
    """

    slow: float = 5.0
    hangs: int = 30
    big: float = 400e6
    secret: Path | None = None
    batch: int = 500


class Openings:
    """Who opens anything in a folder, as Linux' inotify tells it."""

    def __init__(self, folder: Path | None) -> None:
        self.descriptor = -1
        if sys.platform == "linux" and folder is not None:
            libc = ctypes.CDLL(None, use_errno=True)
            self.descriptor = libc.inotify_init1(os.O_NONBLOCK)
            opened = 0x20
            libc.inotify_add_watch(self.descriptor, os.fsencode(folder), opened)

    def any(self) -> bool:
        """Whether something was opened since the last call."""
        if self.descriptor < 0:
            return False
        try:
            return bool(os.read(self.descriptor, 65536))
        except BlockingIOError:
            return False


def in_forks(first: int, count: int, folder: Path, trial: Trial, limits: Limits, tally: Tally) -> None:
    """Carry out trials number ``first`` to ``first + count``."""
    number = first
    while number < first + count:
        number = _batch(folder, range(number, min(number + limits.batch, first + count)), trial, limits, tally)


def _carry_out(folder: Path, numbers: range, trial: Trial, limits: Limits, tell: int) -> None:
    """Runs in a fork: writes half a line before each trial, and the rest after it."""
    faulthandler.disable()  # a crash is the parent's to tell
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    statm = Path("/proc/self/statm")
    if statm.exists():
        limit = int(statm.read_text().split()[0]) * 4096 + 6 * 2**30
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    watch = Openings(limits.secret)
    for number in numbers:
        label, work = trial(number, folder)
        watch.any()
        os.write(tell, f"{number}\t{label}\t".encode())
        signal.setitimer(signal.ITIMER_PROF, limits.hangs)
        signal.setitimer(signal.ITIMER_REAL, 20 * limits.hangs)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.process_time()
        try:
            outcome = work()
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        seconds = time.process_time() - started
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        said = " ".join(outcome.split())[:300]
        os.write(tell, f"{said}\t{seconds:.4f}\t{grown}\t{int(watch.any())}\n".encode("utf-8", "replace"))


def _batch(folder: Path, numbers: range, trial: Trial, limits: Limits, tally: Tally) -> int:
    """Let a fork carry out some trials; returns the first number that is still to be done."""
    at = folder / str(numbers.start)
    at.mkdir()
    lines, tell = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(lines)
            _carry_out(at, numbers, trial, limits, tell)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(tell)
    reached, last = numbers.start, ""
    with os.fdopen(lines, encoding="utf-8", errors="replace", newline="\n") as log:
        for line in log:
            last = line
            if line.endswith("\n"):
                reached = int(line.partition("\t")[0]) + 1
                _judge(line, limits, tally)
                last = ""
    status = os.waitpid(child, 0)[1]
    if status:
        tally.tried += 1
        number, _, label = last.partition("\t")
        reached = int(number or reached) + 1
        ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        kind = {signal.SIGPROF: "hangs", signal.SIGALRM: "waits for ever"}.get(ended, "crashes")
        tally.breaks(kind, f"number {number} ({label.strip()}): signal {ended}, status {status}")
    shutil.rmtree(at, ignore_errors=True)
    return reached


def _judge(line: str, limits: Limits, tally: Tally) -> None:
    number, label, outcome, seconds, grown, opened = line.rstrip("\n").split("\t")
    said = f"number {number} ({label}): {outcome}"
    tally.tried += 1
    tally.counts[label.partition(" ")[0]] += 1
    tally.reaches("processor seconds for one", float(seconds))
    tally.reaches("MB for one", float(grown) / 1e6)
    if len(outcome.split()) == 1:
        tally.counts[outcome] += 1
    else:
        tally.breaks("a foreign exception", said)
    if float(seconds) > limits.slow:
        tally.breaks("slow", f"{said}, {seconds} s")
    if float(grown) > limits.big:
        tally.breaks("big", f"{said}, {float(grown) / 1e6:.0f} MB")
    if opened == "1":
        tally.breaks("another file was opened", said)
