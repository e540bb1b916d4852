"""What threads of a process share: locks, across a fork too, things kept for the next who asks, filters of warnings."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

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


_KEEPING = lock()


def of_the_last(known: OrderedDict[K, V], key: K, make: Callable[[], V], *, most: int) -> V:
    """The value of a key, made where it is none of the ``most`` that were asked for last; those are kept.

    Threads may ask at once, and two may make the same, of which one is kept. They take turns at the dictionary: within
    a step of an ``OrderedDict`` keys are compared and values let go, which runs code of theirs, and another thread that
    came in there has ended the process.
    """
    with _KEEPING:
        value = known.get(key)
    if value is None:
        value = make()
    dropped = []  # let go when others may come in: what its code waits for may wait for this
    with _KEEPING, suppress(KeyError):  # who empties it takes no turns
        value = known.setdefault(key, value)
        known.move_to_end(key)
        while len(known) > most:
            dropped.append(known.popitem(last=False))
    return value


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
