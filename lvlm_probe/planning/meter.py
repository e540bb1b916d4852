"""How much memory a piece of work takes: the most bytes of tensors alive at once, above those alive before it.

On CUDA the allocator keeps that count itself. On the CPU torch's profiler reports every allocation and release in
order, in-operator scratch included, and their running sum is the count; what numpy and other libraries allocate is not
in it. That costs some microseconds per operator, so on the CPU it is done for short probes, and on request. Other
devices (Apple's) count nothing that can be read.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lvlm_probe.errors import ExplainError, ProbeError
from lvlm_probe.kinds import is_whole
from lvlm_probe.models.quantised import stored_tensors
from lvlm_probe.process import lock

_SPAN = "lvlm_probe.span"
_ERROR = 2
"""torch's log level that leaves out warnings."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Span:
    """A marked part of the work: bytes alive when it began, and the most alive during it."""

    before: int
    peak: int


@dataclass
class Reading:
    """What a piece of work took, bytes above what was alive before.

    Attributes:
        peak: Most bytes alive at once, of the whole work.
        outside: The same, without its marked spans.
        spans: The marked spans in order.
        seconds: Time it took, the metering included.
    """

    peak: int = 0
    outside: int = 0
    spans: list[Span] = field(default_factory=list)
    seconds: float = 0.0


class Meter:
    """Meters tensors on one device, or on several cards, of which the one that most is taken of counts::

        meter = Meter(device)
        with meter.running():
            first()
            with meter.span():
                second()
        meter.reading.peak, meter.reading.spans[0].peak

    One meter runs once, and one at a time; on the CPU not inside another profiler.

    Args:
        device: where tensors are made.
        others: more cards, beside a CUDA ``device``.
    """

    def __init__(self, device: torch.device, *others: torch.device) -> None:
        self.device = device
        self.reading = Reading()
        self._before = dict.fromkeys((device, *others), 0)

    @staticmethod
    def counts(device: torch.device) -> bool:
        """Whether tensors on a device can be metered."""
        return device.type in ("cpu", "cuda")

    @contextmanager
    def running(self) -> Iterator[Meter]:
        """Meters what runs in the block; the reading is complete when it ends, also by an error.

        Raises:
            ExplainError: torch does not count the bytes of tensors on this device.
        """
        if not self.counts(self.device):
            raise ExplainError(
                f"memory on {self.device} cannot be metered, as torch counts the most bytes at once on CUDA devices "
                f"and the CPU alone; where it runs out, fewer masks go at once, as with replay(..., micro_batch=…)"
            )
        started = time.perf_counter()
        try:
            with self._on_cuda() if self.device.type == "cuda" else self._on_cpu():
                yield self
        finally:
            self.reading.seconds = time.perf_counter() - started

    @contextmanager
    def span(self) -> Iterator[None]:
        """Marks a part of the work."""
        if self.device.type == "cuda":
            self._flush()
            before = max(torch.cuda.memory_allocated(card) - held for card, held in self._before.items())
            try:
                yield
            finally:
                peak = self._most()
                self.reading.spans.append(Span(before, peak))
                self.reading.peak = max(self.reading.peak, peak)
        else:
            with torch.profiler.record_function(_SPAN):
                yield

    @contextmanager
    def _on_cuda(self) -> Iterator[None]:
        users: dict[torch.device, int] = {}
        for card in self._before:
            torch.cuda.synchronize(card)
            users[card] = torch.cuda.max_memory_allocated(card)
            torch.cuda.reset_peak_memory_stats(card)
            self._before[card] = torch.cuda.memory_allocated(card)
        try:
            yield
        finally:
            for card in self._before:
                torch.cuda.synchronize(card)
            self._flush()
            for card, peak in users.items():
                _raise_peak(card, peak)

    def _most(self) -> int:
        """Most bytes at once on a card since this was asked last."""
        peak = max(torch.cuda.max_memory_allocated(card) - held for card, held in self._before.items())
        for card in self._before:
            torch.cuda.reset_peak_memory_stats(card)
        return peak

    def _flush(self) -> None:
        """The peak since the last span ended belongs to what is outside of spans."""
        peak = self._most()
        self.reading.outside = max(self.reading.outside, peak)
        self.reading.peak = max(self.reading.peak, peak)

    @contextmanager
    def _on_cpu(self) -> Iterator[None]:
        # The recorder that gives plain events in order; the newer one writes to standard error.
        from torch._C import _profiler
        from torch.autograd import _disable_profiler_legacy, _enable_profiler_legacy

        settings = _profiler.ProfilerConfig(
            _profiler.ProfilerState.CPU, False, True, False, False, False, _profiler._ExperimentalConfig()
        )
        with _quiet_allocator():
            _enable_profiler_legacy(settings)
            try:
                yield
            finally:
                threads = _disable_profiler_legacy()
                self.reading = _replayed(threads)


def _raise_peak(card: torch.device, peak: int) -> None:
    """Let ``torch.cuda.max_memory_allocated`` be at least ``peak`` again, which a user may want to read later.

    It can be forgotten but not set: so that much is allocated for a moment, where there is room for it.
    """
    if torch.cuda.max_memory_allocated(card) < peak:
        with contextlib.suppress(torch.OutOfMemoryError):
            torch.empty(peak - torch.cuda.memory_allocated(card), dtype=torch.uint8, device=card)


_QUIET = lock()
_quieted: list[int] = []
"""The allocator's log level before, once for each meter that runs just now."""


@contextmanager
def _quiet_allocator() -> Iterator[None]:
    """Keep torch's allocator from writing to standard error that a block is released which is older than the metering.

    Such blocks are none of what is metered. torch reads its log level from the environment once, when it is imported;
    what it compares with afterwards is a global of libc10, which the first of several meters sets and the last one puts
    back. A torch without that global is left as it is.
    """
    name = {"win32": "c10.dll", "darwin": "libc10.dylib"}.get(sys.platform, "libc10.so")
    level: ctypes.c_int | None = None
    with contextlib.suppress(OSError, ValueError):
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        level = ctypes.c_int.in_dll(library, "FLAGS_caffe2_log_level")
    if level is None:
        yield
        return
    with _QUIET:
        _quieted.append(_quieted[0] if _quieted else level.value)
        level.value = max(level.value, _ERROR)
    try:
        yield
    finally:
        with _QUIET:
            before = _quieted.pop()
            if not _quieted:
                level.value = before


def _replayed(threads: list[list[Any]]) -> Reading:
    """Peaks from the events of every thread; threads besides the first add to what its spans do not cover."""
    reading = Reading()
    for events in threads:
        current = peak = outside = 0
        depth = marked = 0
        before = inside = 0
        for event in events:
            kind = event.kind()
            if kind == "push":
                depth += 1
                if event.name() == _SPAN and not marked:
                    marked, before, inside = depth, current, current
            elif kind == "pop":
                if marked == depth:
                    reading.spans.append(Span(before, inside))
                    marked = 0
                depth -= 1
            elif kind == "memory_alloc":
                current += event.cpu_memory_usage()
                peak = max(peak, current)
                if marked:
                    inside = max(inside, current)
                else:
                    outside = max(outside, current)
        reading.peak += peak
        reading.outside += outside
    return reading


def available() -> int:
    """Bytes of main memory that can be had without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 1 << 30  # not known; little enough for any machine


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage once; those that are offloaded included, and the scales of
    quantised ones."""
    counted: dict[Any, int] = {}
    for tensor in stored_tensors(model):
        size = tensor.numel() * tensor.element_size()
        try:
            storage = tensor.untyped_storage()
            place = storage.data_ptr() if tensor.device.type != "meta" else 0
        except (RuntimeError, NotImplementedError):  # a subclass that does not say what it keeps its numbers in
            place = 0
        counted[place or id(tensor)] = storage.nbytes() if place else size
    return sum(counted.values())


def parse_bytes(size: int | str) -> int:
    """Bytes of ``"24GB"`` (10⁹), ``"24GiB"`` (2³⁰), ``"512M"``, or a number. Raises ``ProbeError`` for all else."""
    if is_whole(size) and int(size) > 0:
        return int(size)
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if found is None or float(found[1]) <= 0:
        raise ProbeError(f"memory is a number of bytes or a size such as '24GB' or '512MiB'; got {size!r}")
    unit = found[2].upper()
    factor = 1024 ** "KMGT".index(unit) * 1024 if found[3] and unit else _UNITS[unit]
    return int(float(found[1]) * factor)


def show_bytes(count: float) -> str:
    """Bytes for people: ``"1.53 GB"``."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= 0.9995 * factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"
