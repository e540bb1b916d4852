"""The page of promises names tests that exist and measured figures; campaigns resume, add up, and can fail."""

from __future__ import annotations

import ast
import json
import mmap
import os
import random
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import publish
from campaigns import CAMPAIGNS, faults, forked, hostile, kills, run, texts, threads
from campaigns.tally import Campaign, Tally, total

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`(tests/[\w/]+\.py)::([\w:]+)`")


def defined_in(path: Path) -> set[str]:
    """Names of the tests of a file, as pytest says them."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def test_every_test_that_is_named_exists() -> None:
    named = NAMED.findall(PAGE)
    assert len(named) > 20
    missing = [
        f"{file}::{name}" for file, name in named if not (ROOT / file).is_file() or name not in defined_in(ROOT / file)
    ]
    assert not missing
    rows = [line for line in PAGE.splitlines() if line.startswith("| **")]
    assert len(rows) > 10 and all(NAMED.search(row) for row in rows), "a promise without a test"


def test_figures_are_those_that_were_measured() -> None:
    assert publish.promises(PAGE, ROOT / "tests" / "benchmarks" / "results") == PAGE, (
        "docs/promises.md has other figures than campaign.json: run python tests/benchmarks/publish.py"
    )
    assert {name for _, name, _ in publish.FIGURE.findall(PAGE)} == set(CAMPAIGNS), "a campaign without a promise"


def test_a_figure_is_written_between_its_marks(tmp_path: Path) -> None:
    one = {
        "tried": 12_345,
        "unit": "kills",
        "broken": {"half a file": 2},
        "counts": {"whole files": 9},
        "worst": {"s": 0.5},
        "promise": "None.",
        "processor seconds": 60,
        "commit": "abc",
    }
    head = {"machine": {"cpu": "x", "cores": 2}, "python": "3", "versions": {}, "date": "d", "seed": 0, "scale": 0.1}
    (tmp_path / "campaign.json").write_text(json.dumps({**head, "campaigns": {"kills": one}}), encoding="utf-8")
    written = publish.promises(PAGE, tmp_path)
    assert "<!-- figure kills -->12,345 kills, **2 broken**<!-- /figure -->" in written
    assert "* kills: 2 × half a file" in written and "a rehearsal, of 0.1 of the cases" in written
    assert publish.promises(written, tmp_path) == written
    assert publish.promises(written, tmp_path / "none") == publish.promises(PAGE, tmp_path / "none")


def test_campaigns_are_as_long_as_is_said() -> None:
    for name, least in {"kills": 10_000, "files": 100_000, "threads": 10_000, "soak": 1_000}.items():
        wanted = run.chunks(CAMPAIGNS[name], 1.0, 0)
        assert sum(chunk.count for chunk in wanted) >= least
        assert [chunk.first for chunk in wanted[1:]] == [chunk.first + chunk.count for chunk in wanted[:-1]]
    assert list(CAMPAIGNS)[:3] == ["kills", "files", "threads"]


def test_a_stopped_campaign_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "RUNS", tmp_path)
    monkeypatch.setattr(run, "code_digest", lambda: "code")
    done: list[int] = []

    class Started:
        """A chunk that is done at once; the second is stopped by the person."""

        def __init__(self, chunk: run.Chunk) -> None:
            self.chunk = chunk

        def ended(self) -> bool:
            if self.chunk.first == 10 and not done.count(10):
                done.append(10)
                raise KeyboardInterrupt
            return True

        def record(self) -> dict[str, Any]:
            done.append(self.chunk.first)
            tally = Tally(tried=self.chunk.count)
            if self.chunk.first == 20:
                tally.breaks("half a file", "number 21")
            return {**tally.record(), "seconds": 1.0, "processor": 1.0}

        def stop(self) -> None:
            pass

    monkeypatch.setattr(run, "Child", Started)
    monkeypatch.setitem(CAMPAIGNS, "kills", Campaign("kills", "None.", "kills", 30, 10, lambda *_: Tally()))
    command = ["--only", "kills", "--jobs", "1", "--out", str(tmp_path / "campaign.json")]
    assert run.main(command) == 130
    assert run.main(command) == 1, "a broken promise is no success"
    assert done == [0, 10, 10, 20]
    found = json.loads((tmp_path / "campaign.json").read_text())["campaigns"]["kills"]
    assert (found["tried"], found["broken"], found["examples"]) == (30, {"half a file": 1}, ["half a file: number 21"])


def test_results_of_processes_are_compared() -> None:
    same, other = Tally(tried=1, equal={"a": "1", "b": "2"}), Tally(tried=1, equal={"a": "1", "b": "3"})
    assert not total([same.record(), same.record()]).broken
    assert total([same.record(), other.record()]).broken == {"differs between processes": 1}


def test_kills_at_system_calls_and_what_they_leave(tmp_path: Path) -> None:
    tally = kills.kills(0, 8, 0)
    assert tally.tried + tally.counts["faster than the kill"] == 8
    assert not tally.broken, tally.examples
    # A half file under a finished name is found.
    for name, write in kills.WORK.items():
        if name != "index":
            write(tmp_path, 1)
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        path.write_bytes(path.read_bytes()[:-100])
    found = Tally()
    kills.inspect(tmp_path, found)
    assert {"damaged trace", "damaged heatmap", "damaged study record", "damaged page", "damaged picture"} <= set(
        found.broken
    )


def test_callers_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "MODELS", ("qwen2_vl",))
    monkeypatch.setattr(threads, "METHODS", {name: threads.METHODS[name] for name in ("tmm", "input_gradient")})
    monkeypatch.setattr(threads, "KINDS", ("beside", "recorded", "masked"))
    monkeypatch.setattr(threads, "ROUND", 8)
    tally = threads.in_turn(0, 3 * 8, 0)
    assert tally.tried == 3 * 8 and tally.counts["traces"] > 2
    assert not tally.broken, tally.examples


def test_hostile_files_and_texts_in_forks() -> None:
    for campaign, count in ((hostile.damaged, 12), (CAMPAIGNS["rows"].run, 12), (CAMPAIGNS["yaml"].run, 12)):
        tally = campaign(0, count, 3)
        assert tally.tried == count
        assert not tally.broken, tally.examples


def test_crashes_hangs_and_foreign_exceptions_are_counted(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("x")

    def grow() -> str:
        pages = mmap.mmap(-1, 50_000_000)  # from the system: what is allocated may be had from what was freed before
        pages[:: mmap.PAGESIZE] = bytes(len(range(0, len(pages), mmap.PAGESIZE)))
        return str(len(pages))

    def trial(number: int, folder: Path) -> tuple[str, Any]:
        kinds = {
            1: lambda: os.kill(os.getpid(), signal.SIGKILL),
            2: lambda: {}["no such key"],
            3: lambda: (secret / "key").read_text() + "read",
            4: lambda: os.kill(os.getpid(), signal.SIGPROF),
            5: grow,
        }
        return f"kind {number}", kinds.get(number, lambda: "fine")

    tally = Tally()
    forked.in_forks(0, 7, tmp_path, trial, forked.Limits(big=30e6, secret=secret), tally)
    assert tally.tried == 7 and tally.counts["fine"] == 2
    assert set(tally.broken) == {"crashes", "a foreign exception", "hangs", "big"} | (
        {"another file was opened"} if sys.platform == "linux" else set()
    )


def test_the_places_in_which_an_exception_is_raised() -> None:
    found = faults.places("qwen2_vl")
    assert len(found) > 100
    assert ("recording/recorder.py", "GenerationRecorder.begin") in found
    assert not [place for place in found if place[1] in faults.FENCE]


def test_what_a_terminal_obeys_is_seen() -> None:
    assert texts._leaks("plain\nä[red]") == ""
    assert texts._leaks("a\x1b[2J\u202e\x9b") == "\x1b\x9b\u202e"
    rng = random.Random(0)
    assert len({texts.odd_study(rng) for _ in range(50)}) > 40
