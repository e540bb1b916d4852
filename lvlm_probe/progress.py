"""Progress of long work: a bar where a person waits, plain lines where nobody sees a bar.

``show_progress`` is behind ``progress=None``: on a terminal and in a notebook a bar of tqdm's, which comes only once
the work has taken a moment; elsewhere (a batch job) lines in the log ``lvlm_probe`` at level INFO, one every
half minute at most. ``progress=False`` is silence, and a function is called with (done, total).
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lvlm_probe.process import unheard

if TYPE_CHECKING:
    from typing import TypeAlias

Progress: TypeAlias = "Callable[[int, int], None]"
"""Called with (done, total) in the work's own unit."""
ProgressChoice: TypeAlias = "Progress | bool | None"
"""What ``progress=`` takes: ``None`` for the default, ``False`` for silence, or a function."""

PATIENCE = 2.0
"""Seconds that work takes before a bar is shown for it."""
EVERY = 30.0
"""Seconds between lines where there is no bar, and before the first one."""

_log = logging.getLogger("lvlm_probe")


class Lines:
    """Progress as plain lines with the time that is left, for logs.

    Args:
        title: what is being done.
        write: called with each line.
        clock: seconds, of any beginning.
    """

    def __init__(
        self,
        title: str,
        write: Callable[[str], object],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title, self._write, self._clock = title, write, clock
        self._began = self._last = clock()
        self._first: tuple[int, float] | None = None

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        if self._first is None:
            self._first = done, now  # what was there before is not part of the pace
        if done >= total or now - self._last < EVERY:
            return
        self._last = now
        start, since = self._first
        left = f", about {duration((total - done) * (now - since) / (done - start))} left" if done > start else ""
        self._write(f"{self._title}: {done} of {total}, {duration(now - self._began)} gone{left}")


def duration(seconds: float) -> str:
    """Return a duration as a clock has it: ``0:07``, ``12:30``, ``3:05:00``."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def roughly(seconds: float) -> str:
    """Return a duration that is an estimate: ``5 s``, ``4 min``, ``2.5 h``."""
    if seconds < 99.5:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


@contextmanager
def show_progress(progress: ProgressChoice, title: str) -> Iterator[Progress | None]:
    """Yield what work calls with (done, total), or ``None`` where nothing is to be shown.

    Args:
        progress: what the user gave: a function, ``None`` (or ``True``) for the default of the module, or ``False``.
        title: what is being done.
    """
    if progress is False:
        yield None
    elif callable(progress):
        yield progress
    elif not _somebody_waits():
        yield Lines(title, _log.info) if _log.isEnabledFor(logging.INFO) else None
    else:
        bar: Any = _bar(title)
        with bar:

            def advance(done: int, total: int) -> None:
                if bar.total is None:
                    bar.reset(total)  # which a notebook's bar needs to be told its length
                bar.total = total
                bar.update(done - bar.n)

            yield advance


def _somebody_waits() -> bool:
    """Whether standard error is a terminal, or this is a notebook."""
    shell = sys.modules.get("IPython")
    running = None if shell is None else shell.get_ipython()
    if running is not None and getattr(running, "kernel", None) is not None:
        return True
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False


def _bar(title: str) -> Any:
    _import_bars()
    from tqdm.auto import tqdm

    return tqdm(desc=title, delay=PATIENCE, leave=False)


@functools.cache
def _import_bars() -> None:
    with unheard():  # tqdm says, where it is imported, that widgets are not installed
        import tqdm.auto  # noqa: F401
