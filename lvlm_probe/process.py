"""What belongs to the whole process: locks across a fork, and filters of warnings."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LOCKS: weakref.WeakSet[Any] = weakref.WeakSet()


def lock() -> threading.RLock:
    """A re-entrant lock that a forked process finds open.

    A fork may come while another thread holds a lock. That thread is not there in the child, which would wait for it
    for ever: a worker of a data loader for one that has just looked at a processor's call.
    """
    made = threading.RLock()
    _LOCKS.add(made)
    return made


def _open_all() -> None:
    for one in list(_LOCKS):
        one._at_fork_reinit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_open_all)

_UNHEARD = lock()


@contextmanager
def unheard(message: str = "") -> Iterator[None]:
    """No warning that begins with ``message``, a regular expression, in the block: for what is done once in a process.

    Filters of warnings belong to all threads. Two that change them at once and put back what they found leave those of
    one of them for good; so one block at a time, and none around what is done again and again.
    """
    with _UNHEARD, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=message)
        yield
