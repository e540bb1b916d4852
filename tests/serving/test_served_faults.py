"""Faults of a server: each gives the right map or a sentence, never a wrong number; nothing is asked twice."""

from __future__ import annotations

import _thread
import email.utils
import errno
import json
import os
import signal
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import new_process
import numpy as np
import pytest
import torch
from demo_server import DemoServer, serving
from trace_samples import sample_capture

import lvlm_probe as probe
from lvlm_probe.importing.meter import measure
from lvlm_probe.serving import server as server_module
from lvlm_probe.serving.journal import FILE, Journal
from lvlm_probe.serving.transport import Refused, Transport
from lvlm_probe.trace import write

RISE: dict[str, Any] = {"method": "rise", "masks": 24, "cells": 3, "size": 6, "strengthen": False}


def image_of(body: dict[str, Any]) -> str:
    """The image of a request, to tell requests apart."""
    parts = body.get("content_parts") or body["messages"][0]["content"]
    part = parts[0]
    return part["url"] if isinstance(part.get("url"), str) else part["image_url"]["url"]


@pytest.fixture(scope="module")
def clean(asked: Any, demo_server: DemoServer, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The map of a server without faults."""
    folder = tmp_path_factory.mktemp("clean")
    (folder / asked.path.name).write_bytes(asked.path.read_bytes())
    with probe.connect(demo_server.url) as server:
        heat = probe.explain(probe.replay(probe.open_trace(folder / asked.path.name), server), **RISE)
    assert heat.values is not None
    return heat.values


@pytest.fixture(scope="module")
def client(demo_server: DemoServer) -> Iterator[Any]:
    """One connection for tests that ask for nothing of their own."""
    with probe.connect(demo_server.url) as server:
        yield server


# --------------------------------------------------------------------------------------------------------- two at once


def test_two_threads_with_one_replay_get_what_each_gets_alone(
    behind: DemoServer, trace: Any, clean: np.ndarray
) -> None:
    """And the check that ends a run is made once no thread is inside any more."""
    with probe.connect(behind.url) as server:
        replay = probe.replay(trace, server)
        there = replay.baseline_log_probs
        together = threading.Barrier(2, timeout=60)
        checks: list[int] = []
        replay.check = lambda: checks.append(1)

        def work() -> np.ndarray:
            with replay.shortcuts.caching():
                together.wait()  # both are inside
                heat = probe.explain(replay, **RISE)
            assert heat.values is not None
            return heat.values

        with ThreadPoolExecutor(2) as pool:
            maps = [done.result() for done in [pool.submit(work), pool.submit(work)]]
        assert torch.equal(replay.baseline_log_probs, there)
    assert all(np.array_equal(values, clean) for values in maps)
    assert checks == [1]


class _Shared(OrderedDict[Any, Any]):
    """What a thread puts in here another one lets go of at once."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self.clear()


def test_a_baseline_that_another_thread_lets_go_of_is_there_for_who_asked(behind: DemoServer, trace: Any) -> None:
    """Nothing makes threads take turns here, as on a model itself."""
    with probe.connect(behind.url) as server:
        replay = probe.replay(trace, server)
        replay.kept.paths = _Shared()
        assert replay.over("mean").baseline == {"kind": "mean"} and not replay.kept.paths


# ---------------------------------------------------------------------------------------------------- faults that pass


@pytest.mark.parametrize("fault", ["429", "503", "500", "drop", "truncated"])
def test_what_passes_is_asked_again_and_the_map_is_the_same(
    fault: str, behind: DemoServer, trace: Any, clean: np.ndarray, naps: list[float]
) -> None:
    behind.fault = lambda number, body: fault if number % 3 == 0 else None
    with probe.connect(behind.url, sleep=naps.append, retries=20) as server:
        heat = probe.explain(probe.replay(trace, server), **RISE)
        assert server.spent.retries > 0  # how many hangs on which requests met in a connection that was dropped
    assert np.array_equal(heat.values, clean)
    assert len(naps) == server.spent.retries  # no other wait, and none by the clock
    assert all(0 < nap <= 45 for nap in naps)


def test_what_does_not_pass_is_not_asked_again(behind: DemoServer, trace: Any, naps: list[float]) -> None:
    with probe.connect(behind.url, sleep=naps.append) as server:
        replay = probe.replay(trace, server)
        behind.fault = lambda number, body: "400"
        before = behind.count
        with pytest.raises(Refused, match="HTTP 400: no"):
            replay.log_probs(torch.zeros(1, 2, 2))
        assert behind.count == before + 1
        assert not naps


def test_a_server_that_stays_busy_ends_in_a_sentence(behind: DemoServer, trace: Any, naps: list[float]) -> None:
    with probe.connect(behind.url, sleep=naps.append, retries=3) as server:
        replay = probe.replay(trace, server)
        behind.fault = lambda number, body: "429"
        with pytest.raises(probe.errors.ReplayError, match=r"HTTP 429: slow down \(4 tries\); try again later"):
            replay.log_probs(torch.zeros(1, 2, 2))
        assert len(naps) == 3 and naps[0] < naps[2]  # ever longer


@pytest.mark.parametrize("after", ["7", "date"])
def test_the_server_says_how_long_to_wait(after: str, behind: DemoServer, trace: Any, naps: list[float]) -> None:
    with probe.connect(behind.url, sleep=naps.append) as server:
        replay = probe.replay(trace, server)
        first = behind.count
        behind.retry_after = email.utils.formatdate(time.time() + 60, usegmt=True) if after == "date" else after
        behind.fault = lambda number, body: "503" if number == first else None
        replay.log_probs(torch.zeros(1, 2, 2))
    assert len(naps) == 1
    assert naps == [7.0] if after == "7" else 0 < naps[0] <= 60


def test_a_server_that_wants_to_be_left_alone_for_long_is(behind: DemoServer, trace: Any, naps: list[float]) -> None:
    with probe.connect(behind.url, sleep=naps.append) as server:
        replay = probe.replay(trace, server)
        behind.retry_after = "3600"
        behind.fault = lambda number, body: "429"
        with pytest.raises(probe.errors.ReplayError, match="come back in 3600 s"):
            replay.log_probs(torch.zeros(1, 2, 2))
        assert not naps


@pytest.mark.quick
def test_fewer_are_under_way_while_a_server_is_busy(behind: DemoServer, naps: list[float]) -> None:
    transport = Transport(behind.url, concurrency=8, sleep=naps.append)
    body = {"messages": [], "token_ids": [4], "content_parts": [], "sampling_params": {"prompt_logprobs": 0}}
    behind.fault = lambda number, body: "429" if len(naps) < 2 else "400"
    assert transport.at_once == 8
    with pytest.raises(Refused):
        transport.post("/inference/v1/generate", body)
    assert transport.at_once == 2  # halved by either answer, each to a request that was sent after the one before
    for _ in range(5):
        transport.get("/v1/models")
    assert transport.at_once == 4  # two answers for the third, three for the fourth


def test_an_address_with_nobody_behind_it_is_said_at_once(naps: list[float]) -> None:
    with pytest.raises(probe.errors.ReplayError, match="is the server running"):
        probe.connect("http://127.0.0.1:9", sleep=naps.append)
    assert not naps
    for wrong, said in (
        ("gpu:8000", "write it as http://host:8000"),
        ("http://me:secret@gpu:8000", "no name or password"),
        ("http://gpu:99999", "no address"),
    ):
        with pytest.raises(probe.errors.ReplayError, match=said) as raised:
            probe.connect(wrong)
        assert "secret" not in str(raised.value)


# ------------------------------------------------------------------------------------------- 200 with wrong numbers


def scoring(body: dict[str, Any]) -> bool:
    """Whether a request asks for the log-probabilities of a given answer."""
    return "prompt_logprobs" in body or "prompt_logprobs" in body.get("sampling_params", {})


LIES = {
    "wrong_ids": "other tokens than they are",
    "logits": "which none is|add up to|differ by up to",
    "half": "differ by up to",
    "uninitialised": "no log-probability for token",
    "ignored": "ignores prompt_logprobs",
    "no_ids": "does not say which tokens",
    "no_image": "do not arrive at the model|differ by up to",
    "double_image": "other tokens than they are",
    "other_model": "differ by up to",
    "noisy": "asked the same again|differ by up to",
}


@pytest.mark.parametrize("fault", list(LIES))
def test_a_server_that_lies_from_the_start_is_refused(fault: str, demo: Any) -> None:
    with serving(*demo, {"tokens"}) as behind:
        behind.fault = lambda number, body: fault if scoring(body) else None
        with pytest.raises(probe.errors.ReplayError, match=LIES[fault]) as raised:
            probe.connect(behind.url)
        assert "vLLM 0.32.0 serving 'demo' gives no log-probabilities" in str(raised.value)


@pytest.mark.parametrize("fault", list(LIES))
def test_a_server_that_begins_to_lie_is_found_out(fault: str, behind: DemoServer, trace: Any, client: Any) -> None:
    behind.fault = lambda number, body: fault if scoring(body) else None
    with pytest.raises((probe.errors.ReplayError, probe.errors.ModelMismatch), match=LIES[fault]):
        probe.replay(trace, client)


@pytest.mark.parametrize("fault", [*LIES])
def test_a_server_that_lies_in_the_middle_of_a_map_gives_no_map(
    fault: str, behind: DemoServer, trace: Any, client: Any
) -> None:
    replay = probe.replay(trace, client)
    start = behind.count + 10
    behind.fault = lambda number, body: fault if number >= start else None
    with pytest.raises((probe.errors.ReplayError, probe.errors.ModelMismatch)):
        probe.explain(replay, **RISE)


def test_what_another_model_has_answered_is_forgotten(behind: DemoServer, trace: Any, clean: np.ndarray) -> None:
    with probe.connect(behind.url) as server:
        replay = probe.replay(trace, server)
        start = behind.count + 10
        behind.fault = lambda number, body: "other_model" if number >= start else None
        with pytest.raises(probe.errors.ModelMismatch, match="another model was started there meanwhile"):
            probe.explain(replay, **RISE)
        behind.fault = lambda number, body: None
        heat = probe.explain(probe.replay(trace, server), **RISE)
    assert np.array_equal(heat.values, clean)
    lines = [json.loads(line) for line in (trace.path.parent / FILE).read_text().splitlines() if line]
    assert any("drop" in line for line in lines)


@pytest.mark.parametrize(("what", "value"), [("version", "0.33.0"), ("name", "other")])
def test_a_server_with_another_name_at_the_end_is_found_out(
    what: str, value: str, behind: DemoServer, trace: Any
) -> None:
    with probe.connect(behind.url) as server:
        replay = probe.replay(trace, server)
        setattr(behind, what, value)
        with pytest.raises(probe.ProbeError, match=r"another one than at the start|serves no 'demo'"):
            probe.explain(replay, **RISE)


def test_a_server_that_never_shows_the_image_is_refused(demo: Any) -> None:
    with serving(*demo, {"tokens"}) as behind:
        behind.fault = lambda number, body: "no_image"
        with pytest.raises(probe.errors.ReplayError, match="do not arrive at the model"):
            probe.connect(behind.url)


def test_a_server_that_ignores_log_probabilities_altogether_is_refused_by_its_reason(demo: Any) -> None:
    with serving(*demo, set()) as behind:
        behind.fault = lambda number, body: "ignored"
        with pytest.raises(probe.errors.ReplayError, match="ignores `logprobs`"):
            probe.connect(behind.url)
        behind.fault = lambda number, body: "no_ids"
        with pytest.raises(probe.errors.ReplayError, match="does not return token ids"):
            probe.connect(behind.url)
        behind.fault = lambda number, body: None
        with pytest.raises(probe.errors.ReplayError, match=r"tokens: .*403.*next token.*: .*422.*top.*: .*ignores"):
            probe.connect(behind.url)


def test_log_probabilities_taken_after_the_others_are_shut_out_are_refused(demo: Any) -> None:
    with serving(*demo, {"allowed"}) as behind:
        behind.biased_before = True
        with pytest.raises(probe.errors.ReplayError, match=r"after the others are shut out|differ by up to"):
            probe.connect(behind.url)


def test_a_video_is_refused_before_anything_is_sent(behind: DemoServer, client: Any, tmp_path: Path) -> None:
    sent = behind.count
    with pytest.raises(probe.errors.ImageError, match="holds a video"):
        probe.replay(probe.open_trace(write(sample_capture(clips=True), tmp_path)), client, strict=False)
    assert behind.count == sent


def test_another_model_is_refused_by_name_unless_it_is_wanted(behind: DemoServer, trace: Any) -> None:
    behind.name = "other"
    with probe.connect(behind.url) as server:
        with pytest.raises(probe.errors.ModelMismatch, match="answered by 'demo', and this server runs 'other'"):
            probe.replay(trace, server)
        assert probe.replay(trace, server, strict=False).log_probs().shape == (1, len(trace.token_ids))
    with pytest.raises(probe.errors.ReplayError, match="serves no 'demo'; it serves other"):
        probe.connect(behind.url, "demo")


def test_a_server_that_lists_no_models_is_asked_for_the_one_that_is_named(behind: DemoServer) -> None:
    behind.lists_models = False
    with pytest.raises(probe.errors.ReplayError, match="names no model: name it"):
        probe.connect(behind.url)
    with probe.connect(behind.url, "demo") as server:
        assert server.model == "demo" and server.road == "tokens"


# --------------------------------------------------------------------------------------------------- nothing is lost


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """A process that was started in the background of a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_keeps_what_was_answered(behind: DemoServer, trace: Any, clean: np.ndarray) -> None:
    with probe.connect(behind.url) as server:
        replay = probe.replay(trace, server)
        start = behind.count

        def interrupt(number: int) -> None:
            if number == start + 12:
                _thread.interrupt_main()

        behind.before = interrupt
        with pytest.raises(KeyboardInterrupt):
            probe.explain(replay, **RISE)
    with probe.connect(behind.url) as server:
        again = probe.replay(trace, server)
        before = len(behind.requests)
        heat = probe.explain(again, **RISE)
        asked_now = {image_of(body) for _, body in behind.requests[before:]}
        assert server.spent.reused >= 10
    assert np.array_equal(heat.values, clean)
    assert len(asked_now) <= 24 - 10


def killed_after(requests: int, script: str, behind: DemoServer, *arguments: Path) -> int:
    """Run a script until the server has got so many requests of its work, kill it, and return how many it had before.

    The script is given the server's address before its arguments, says that it is ready, and waits for a line.
    """
    with tempfile.TemporaryDirectory() as folder:
        go, said, error = (Path(folder) / name for name in ("go", "said", "error"))
        os.mkfifo(go)
        os.mkfifo(said)
        child = new_process.start(script, behind.url, *map(str, arguments), streams=(go, said, error))
        with said.open() as lines:
            assert lines.readline() == "ready\n", error.read_text()
        start = behind.count
        behind.before = lambda number: os.kill(child.number, signal.SIGKILL) if number == start + requests else None
        go.write_text("go\n")
        assert child.wait() == -signal.SIGKILL
    behind.before = lambda number: None
    return start


KILLED = """
import sys, torch
torch.set_num_threads(1)
import lvlm_probe as probe
url, trace = sys.argv[1:]
with probe.connect(url, concurrency=1) as server:
    replay = probe.replay(probe.open_trace(trace), server)
    print("ready", flush=True)
    sys.stdin.readline()
    probe.explain(replay, method="rise", masks=24, cells=3, size=6, strengthen=False)
"""


def test_a_killed_run_goes_on_without_asking_twice(behind: DemoServer, trace: Any, clean: np.ndarray) -> None:
    start = killed_after(10, KILLED, behind, trace.path)
    # Ten requests were answered (of one, the kill may have come before its line): each is one line of the journal.
    kept = Journal(trace.path.parent / FILE)
    assert len(kept) >= 9
    killed = [image_of(body) for _, body in behind.requests[start:][:10]]
    with probe.connect(behind.url) as server:
        replay = probe.replay(trace, server)
        before = len(behind.requests)
        heat = probe.explain(replay, **RISE)
        now = Counter(image_of(body) for _, body in behind.requests[before:])
        assert server.spent.reused >= 9
    assert np.array_equal(heat.values, clean)
    assert sum(image in now for image in killed) <= 2  # the one under way, and the whole image, which is checked anew
    assert max(count for image, count in now.items() if image not in killed) == 1


def test_evaluation_and_repetition_reuse_what_is_paid_for(behind: DemoServer, trace: Any) -> None:
    with probe.connect(behind.url) as server:
        replay = probe.replay(trace, server)
        heat = probe.explain(replay, **RISE)
        probe.evaluate(heat, replay, steps=6)
        before = server.spent.requests
        again = probe.explain(replay, **RISE)
        probe.evaluate(again, replay, steps=6)
        assert server.spent.requests == before
        assert np.array_equal(again.values, heat.values)


def test_a_journal_of_a_stranger_is_read_as_such(tmp_path: Path) -> None:
    path = tmp_path / FILE
    good = {"key": "a", "log_probs": {"0": -1.5}}
    lines = [json.dumps(good), "[1]", '{"key": "b", "log_probs": {"0": 3}}', '{"key": "c", "log_probs": {"0": NaN}}']
    lines += ['{"key": "d", "log_probs": [1]}', "null", "\x00", '{"drop": 3}', '{"key": "e", "log_probs": {"0": -1']
    path.write_text("\n".join(lines))
    journal = Journal(path)
    assert len(journal) == 1 and journal.get("a") == {0: -1.5}
    journal.put("f", {2: -0.25})
    journal.close()
    assert Journal(path).get("f") == {2: -0.25}  # on a line of its own, behind the one that was cut
    (tmp_path / "elsewhere").write_text("")
    planted = tmp_path / "planted" / FILE
    planted.parent.mkdir()
    planted.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(probe.errors.ReplayError, match="cannot be written"):
        Journal(planted).put("g", {0: -1.0})


def test_what_follows_a_full_disk_is_on_a_line_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up takes the beginning of a line."""
    journal, written = Journal(tmp_path / FILE), os.write
    journal.put("a", {0: -1.0})

    def full(descriptor: int, data: Any) -> int:
        if len(data) < 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(descriptor, bytes(data)[: len(data) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(probe.errors.ReplayError, match="the disk is full"):
            journal.put("b", {0: -2.0})
    journal.put("c", {0: -3.0})
    again = Journal(tmp_path / FILE)
    assert [again.get(key) for key in "abc"] == [{0: -1.0}, None, {0: -3.0}]


def test_what_a_journal_gave_stays_as_it_is_when_another_thread_adds_to_it() -> None:
    journal = Journal(None)
    journal.put("a", {0: -1.0, 1: -2.0})
    found = journal.get("a")
    assert found is not None
    journal.put("a", {2: -3.0})
    assert found == {0: -1.0, 1: -2.0} and journal.get("a") == {**found, 2: -3.0}


def test_threads_that_open_answers_of_one_folder_share_its_journal(
    behind: DemoServer, trace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one of them pays for the other one has."""
    together = threading.Barrier(2, timeout=60)

    def opened(path: Path | None) -> Journal:
        together.wait()  # neither has one yet
        return Journal(path)

    with probe.connect(behind.url) as server, ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(server_module, "Journal", opened)
        work = [pool.submit(probe.replay, trace, server) for _ in range(2)]
        first, second = (done.result() for done in work)
        mask = torch.zeros(1, 3, 3)
        there, asked = first.log_probs(mask), server.spent.requests
        assert torch.equal(second.log_probs(mask), there) and server.spent.requests == asked


# ------------------------------------------------------------------------------------------------------------- the cost


@pytest.mark.parametrize(("road", "limit", "least"), [("tokens", 40, ""), ("next token", 150, "at least ")])
def test_more_than_is_allowed_is_said_before_it_is_sent(
    road: str, limit: int, least: str, behind: DemoServer, trace: Any
) -> None:
    """Also where it depends on the words, which may take a request to choose."""
    said: list[str] = []
    with probe.connect(behind.url, road=road, max_requests=limit, tell=said.append) as server:
        replay = probe.replay(trace, server)
        before = behind.count
        sends = rf"rise sends {least}1,000 requests, about \d+ MB.*max_requests={limit}"
        with pytest.raises(probe.errors.ReplayError, match=sends):
            probe.explain(replay, method="rise")
        assert behind.count == before and not said
        with pytest.raises(probe.errors.ReplayError, match=f"max_requests={limit} are spent"):
            replay.log_probs(torch.rand(60, 3, 3))
        assert server.spent.requests <= limit
    with probe.connect(behind.url) as server:  # and it goes on from there
        probe.replay(trace, server).log_probs(torch.zeros(1, 2, 2))


@pytest.mark.parametrize(("road", "each"), [("tokens", 1), ("next token", 2)])
def test_what_a_method_costs_is_said_once(road: str, each: int, behind: DemoServer, trace: Any) -> None:
    said: list[str] = []
    with probe.connect(behind.url, road=road, tell=said.append) as server:
        probe.explain(probe.replay(trace, server), tokens=[2, 3], **RISE)
    assert [one.partition(" requests")[0] for one in said] == [f"rise: {24 * each}"]


METERED = """
import sys
import lvlm_probe as probe
from lvlm_probe.importing.meter import measure
url, file, journal = sys.argv[1:]
with probe.connect(url, concurrency=1, journal=journal) as server:
    print("ready", flush=True)
    sys.stdin.readline()
    list(measure(file, server))
"""


def test_a_killed_meter_goes_on_without_asking_twice(behind: DemoServer, scene: Any, demo: Any, tmp_path: Path) -> None:
    scene.image.save(tmp_path / "photo.png")
    questions = [scene.question, "What color is the circle?", "Where is the cross?"]
    rows = [{"image": "photo.png", "question": one, "answer": scene.answer} for one in questions]
    file, journal = tmp_path / "answers.jsonl", tmp_path / "kept" / "journal.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    killed_after(4, METERED, behind, file, journal)
    with probe.connect(behind.url, journal=journal) as server:
        before = server.spent.requests
        found = list(measure(file, server))
        # Of nine requests four were answered: three of the first answer, and the second's prompt, which is asked again.
        assert server.spent.requests - before in (5, 6)
        before = server.spent.requests
        assert list(measure(file, server)) == found and server.spent.requests == before
    with probe.connect(behind.url) as server:
        assert list(measure(file, server)) == found
