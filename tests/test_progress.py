"""Progress: a bar where a person waits, lines with the time left in logs, silence on request; never by the clock."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
from toy_replay import ToyReplay, box_weights
from tqdm import tqdm

import lvlm_probe as probe
from lvlm_probe import progress
from lvlm_probe.progress import Lines, duration, roughly, show_progress


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def waiting() -> Iterator[io.StringIO]:
    """Somebody waits at a terminal, and bars come at once."""
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    at_once = mock.patch("tqdm.auto.tqdm", functools.partial(tqdm, mininterval=0))
    with at_once, mock.patch.object(progress, "PATIENCE", 0), mock.patch.object(sys, "stderr", screen):
        yield screen


def test_bars_of_two_threads_leave_the_users_warnings_alone() -> None:
    made = {"first": threading.Event(), "second": threading.Event()}
    shown = {title: threading.Event() for title in made}

    def bar(desc: str, **_: Any) -> Any:
        made[desc].set()
        assert shown[desc].wait(60)
        return contextlib.nullcontext(mock.Mock())

    def show(title: str) -> None:
        with show_progress(None, title):
            pass

    before = warnings.filters.copy()
    with waiting(), mock.patch("tqdm.auto.tqdm", bar):
        threads = {title: threading.Thread(target=show, args=(title,)) for title in made}
        for title, thread in threads.items():
            thread.start()
            assert made[title].wait(60)
        for title, thread in threads.items():
            shown[title].set()
            thread.join()
    assert warnings.filters == before


def test_lines_come_every_half_minute_with_the_time_left() -> None:
    clock, lines = Clock(), []
    tell = Lines("explaining", lines.append, clock=clock)
    for done in range(101):
        tell(done, 100)  # a step of 2 s
        clock.now += 2
    assert len(lines) == 6
    assert lines[0] == "explaining: 15 of 100, 0:30 gone, about 2:50 left"
    assert lines[-1] == "explaining: 90 of 100, 3:00 gone, about 0:20 left"


def test_what_was_done_before_is_no_part_of_the_pace() -> None:
    clock, lines = Clock(), []
    tell = Lines("study", lines.append, clock=clock)
    tell(900, 1000)  # found finished
    clock.now += 60
    tell(910, 1000)
    assert lines == ["study: 910 of 1000, 1:00 gone, about 9:00 left"]


def test_work_that_stands_still_promises_nothing() -> None:
    clock, lines = Clock(), []
    tell = Lines("work", lines.append, clock=clock)
    tell(0, 10)
    clock.now += 31
    tell(0, 10)
    assert lines == ["work: 0 of 10, 0:31 gone"]


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (7.4, "0:07"), (750, "12:30"), (11100, "3:05:00")])
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_a_bar_is_drawn_where_somebody_waits() -> None:
    with waiting() as screen, show_progress(None, "explaining by rise") as tell:
        assert tell is not None
        tell(0, 8)
        tell(5, 8)
        tell(8, 8)
    assert "explaining by rise" in screen.getvalue() and "5/8" in screen.getvalue()


def test_false_is_silence_and_a_function_is_called() -> None:
    with waiting() as screen:
        with show_progress(False, "x") as tell:
            assert tell is None
        seen: list[Any] = []
        with show_progress(lambda *step: seen.append(step), "x") as tell:
            assert tell is not None
            tell(1, 2)
    assert seen == [(1, 2)] and screen.getvalue() == ""


def test_without_a_terminal_lines_go_to_the_log_if_it_is_read(caplog: pytest.LogCaptureFixture) -> None:
    with show_progress(None, "x") as tell:
        assert tell is None
    with caplog.at_level(logging.INFO, "lvlm_probe"), mock.patch.object(progress, "EVERY", 0.0):
        with mock.patch.object(Lines.__init__, "__kwdefaults__", {"clock": Clock()}):
            with show_progress(None, "explaining") as tell:
                assert tell is not None
                tell(1, 3)
    assert [record.getMessage() for record in caplog.records] == ["explaining: 1 of 3, 0:00 gone"]


def test_explain_evaluate_and_compare_show_themselves_and_are_silenced(tmp_path: Any) -> None:
    replay: Any = ToyReplay(box_weights(16, slice(2, 6), slice(8, 12)))
    with waiting() as screen:
        heat = probe.explain(replay, method="occlusion", size=4)
        probe.evaluate(heat, replay)
    assert "explaining by occlusion" in screen.getvalue() and "deletion and insertion" in screen.getvalue()
    with waiting() as screen:
        probe.evaluate(probe.explain(replay, method="occlusion", size=4, progress=False), replay, progress=False)
    assert screen.getvalue() == ""
    with waiting() as screen:
        probe.compare([heat], out=tmp_path / "c.html")  # nothing to wait for
        probe.compare(replay, ["random", "center"], out=tmp_path / "d.html")
    assert "explaining and judging" in screen.getvalue() and "explaining by" not in screen.getvalue()


@pytest.mark.quick
def test_estimates_are_said_roughly() -> None:
    said = {0.1: "1 s", 99.4: "99 s", 100: "2 min", 2400: "40 min", 5960: "99 min", 5971: "1.7 h", 36000: "10.0 h"}
    assert {seconds: roughly(seconds) for seconds in said} == said
