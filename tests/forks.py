"""A forked process, and another thread that holds something meanwhile."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

__all__ = ["HAS_FORK", "entered_elsewhere", "holds_in_a_fork"]

HAS_FORK = hasattr(os, "fork")

_EVER = 60
"""Seconds after which who waits in a fork waits for ever."""


def holds_in_a_fork(work: Callable[[], object]) -> bool:
    """Whether ``work`` gives something true in a forked process; not where it raises or waits for ever."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_EVER)
        status = 1
        try:
            status = 0 if work() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@contextmanager
def entered_elsewhere(block: AbstractContextManager[Any]) -> Iterator[None]:
    """Another thread is inside ``block`` all the while."""
    entered, done = threading.Event(), threading.Event()

    def stay() -> None:
        with block:
            entered.set()
            done.wait()

    thread = threading.Thread(target=stay)
    thread.start()
    entered.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()
