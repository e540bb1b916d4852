"""What threads of a process share: locks, things kept for the next who asks, filters of warnings."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
from forks import HAS_FORK, entered_elsewhere, holds_in_a_fork

import lvlm_probe
from lvlm_probe.process import lock, of_the_last, unheard


@pytest.mark.skipif(not HAS_FORK, reason="no fork here")
def test_a_forked_process_finds_a_lock_open_that_another_thread_held() -> None:
    shared = lock()
    with entered_elsewhere(shared):
        assert holds_in_a_fork(lambda: shared.acquire(blocking=False))
        assert not shared.acquire(blocking=False)
    assert shared.acquire(blocking=False)


def test_every_lock_is_one_that_a_fork_opens() -> None:
    """But for those whose threads no forked process has: what is under way at a server, and the app's visitors."""
    found = {
        path.name
        for path in Path(lvlm_probe.__file__).parent.rglob("*.py")
        if any(f"threading.{kind}()" in path.read_text(encoding="utf-8") for kind in ("Lock", "RLock", "Condition"))
    }
    assert found == {"process.py", "transport.py", "replays.py", "service.py", "through_nnsight.py"}


def test_what_was_asked_for_last_is_kept() -> None:
    made: list[str] = []
    known: OrderedDict[str, str] = OrderedDict()

    def asked(key: str) -> str:
        return of_the_last(known, key, lambda: made.append(key) or key.upper(), most=2)

    assert [asked(key) for key in "abacab"] == ["A", "B", "A", "C", "A", "B"]
    assert "".join(made) == "abcb" and list(known) == ["a", "b"]


_RACE = """
import sys
import threading
from collections import OrderedDict

from lvlm_probe.process import of_the_last

class Key:
    def __init__(self, number):
        self.number = number

    def __hash__(self):
        return self.number % 3

    def __eq__(self, other):
        return self.number == other.number

class Value(Key):
    def __del__(self):
        sum(range(20))

known, wrong = OrderedDict(), []

def work(start):
    for number in range(start, start + 20000):
        value = of_the_last(known, Key(number % 9), lambda: Value(number % 9), most=4)
        if value.number != number % 9:
            wrong.append(value)

threading.excepthook = lambda args: wrong.append(args.exc_value)
sys.setswitchinterval(1e-6)
threads = [threading.Thread(target=work, args=(5 * number,)) for number in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.exit(bool(wrong) or len(known) != 4)
"""


def test_threads_that_ask_at_once_do_not_end_the_process() -> None:
    assert subprocess.run([sys.executable, "-c", _RACE], check=False).returncode == 0


def test_warnings_are_not_heard_in_the_block_alone() -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        before = warnings.filters.copy()
        with unheard("of old"):
            warnings.warn("of old, nobody hears", stacklevel=1)
            warnings.warn("but this", stacklevel=1)
        assert warnings.filters == before
        with unheard():
            warnings.warn("nor this", stacklevel=1)
    assert [str(one.message) for one in heard] == ["but this"]
