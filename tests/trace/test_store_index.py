"""Lists of traces: filters, the index that saves opening files, and what happens to it when anything changes."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trace_samples import sample_capture

from lvlm_probe.errors import TraceError
from lvlm_probe.trace import TraceSummary, open_store, open_trace, write
from lvlm_probe.trace import index as index_module
from lvlm_probe.trace.index import INDEX_NAME


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose headers were read."""
    names: list[str] = []
    read = index_module.read_summaries

    def counting(path: Path) -> list[TraceSummary]:
        names.append(path.name)
        return read(path)

    monkeypatch.setattr(index_module, "read_summaries", counting)
    return names


def filled(directory: Path, count: int = 4) -> list[Path]:
    """Traces of the days from 2026-03-01 on; the third of another model, the second stopped, the last of two rows."""
    paths = []
    for number in range(count):
        capture = sample_capture(rows=2 if number == count - 1 else 1, seed=number)
        capture.created = f"2026-03-{number + 1:02d}T12:00:00+00:00"
        capture.model = {"model_id": "maker/Other-7B" if number == 2 else "maker/Small-1B", "class": "Llava"}
        if number == 1:
            capture.rows[0].status = "stopped"
            capture.rows[0].question = "How many Circles?"
        paths.append(write(capture, directory))
    return paths


def test_a_summary_says_what_the_trace_says(tmp_path: Path) -> None:
    filled(tmp_path)
    for _ in range(2):  # from the files, and from the index
        found = open_store(tmp_path).find()
        traces = list(open_store(tmp_path))
        assert len(found) == len(traces) == 5
        for summary, trace in zip(found, traces, strict=True):
            assert summary.path == trace.path
            assert summary.open() == trace
            for name in ("row", "trace_id", "created", "status", "question", "answer", "points"):
                assert getattr(summary, name) == getattr(trace, name), name
            assert summary.model == trace.model["model_id"]
            assert (summary.steps, summary.image_tokens) == (trace.header.steps, trace.header.image_tokens)
            assert summary.has_llr is (trace.llr is not None)


def test_halves_of_characters_are_listed_as_they_are_in_the_trace(tmp_path: Path) -> None:
    capture = sample_capture()
    capture.rows[0].question, capture.rows[0].tokens[1] = "half \ud83d", "\udc80"
    trace = open_trace(write(capture, tmp_path))
    for _ in range(2):  # from the file, and from the index
        (found,) = open_store(tmp_path).find()
        assert (found.question, found.answer) == ("half \ud83d", trace.answer) and "\udc80" in found.answer


def test_filters(tmp_path: Path) -> None:
    paths = filled(tmp_path)
    store = open_store(tmp_path)

    def files(**conditions: Any) -> list[int]:
        return [paths.index(summary.path) for summary in store.find(**conditions)]

    assert files(status="stopped") == [1]
    assert files(status="error") == []
    assert files(model="other") == [2]
    assert files(text="circles") == [1]
    assert files(text="SMALL SQUARE") == [0, 1, 2, 3, 3]
    assert files(since="2026-03-02T12:00:00") == [1, 2, 3, 3]
    assert files(since="2026-03-02", until="2026-03-03T14:00:00+02:00") == [1]  # which is when the third begins
    assert files(where=lambda summary: summary.row == 1) == [3]
    assert files(status="complete", model="small", since="2026-03-04") == [3, 3]
    with pytest.raises(ValueError, match="isoformat"):
        store.find(since="yesterday")


def test_only_new_and_changed_files_are_opened(tmp_path: Path, opened: list[str]) -> None:
    paths = filled(tmp_path)
    open_store(tmp_path).find()
    assert sorted(opened) == sorted(path.name for path in paths)
    opened.clear()
    open_store(tmp_path).find(status="complete")
    assert opened == []
    added = write(sample_capture(seed=9), tmp_path)
    paths[0].unlink()
    os.utime(paths[1], ns=(1, 1))
    found = open_store(tmp_path).find()
    assert sorted(opened) == sorted([added.name, paths[1].name])
    assert {summary.path for summary in found} == {*paths[1:], added}
    kept = [json.loads(line)[0] for line in (tmp_path / INDEX_NAME).read_text("utf-8").splitlines()[1:]]
    assert sorted(kept) == sorted(path.name for path in [*paths[1:], added])


def test_the_index_is_no_trace_and_is_not_needed(tmp_path: Path, opened: list[str]) -> None:
    filled(tmp_path)
    first = open_store(tmp_path).find()
    assert len(open_store(tmp_path)) == 5
    assert open_store(tmp_path)[-1].answer
    index = tmp_path / INDEX_NAME
    assert not list(tmp_path.glob("*.part"))
    text = index.read_bytes()
    lines = text.split(b"\n")
    cases = {
        "gone": None,
        "empty": b"",
        "cut off": text[: len(text) // 2],
        "not JSON": b"\xff\x00nonsense\n" * 3,
        "another version": text.replace(b'"version": 1', b'"version": 2', 1),
        "other entries": b"\n".join([lines[0], b'{"name": 3}', b'["x"]', b'"x"', b"3", b"[" * 100_000]),
        "a wrong type": text.replace(b'"complete"', b"7", 1),
        "a wrong row": text.replace(b"[[0, ", b"[[1, ", 1),
        "a wrong name of a point": text.replace(b'["decoder.attention"', b"[3", 1),
    }
    for case, content in cases.items():
        assert content != text
        index.unlink(missing_ok=True)
        if content is not None:
            index.write_bytes(content)
        opened.clear()
        assert open_store(tmp_path).find() == first, case
        assert opened, case
        assert index.read_bytes() == text, case  # mended


def test_an_index_of_somebody_elses_making_is_not_believed(
    tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever packs a folder may write an index that fits the files in everything but the truth."""
    paths = filled(tmp_path, count=2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another user's"))
    index_module._key.cache_clear()
    first = open_store(tmp_path).find()
    index = tmp_path / INDEX_NAME
    text = index.read_bytes()
    assert b"maker/Small-1B" in text
    index.write_bytes(text.replace(b"maker/Small-1B", b"maker/Liar-99B"))
    opened.clear()
    assert open_store(tmp_path).find() == first
    assert sorted(opened) == sorted(path.name for path in paths)
    opened.clear()
    assert open_store(tmp_path).find() == first
    assert opened == []
    key = tmp_path / "another user's" / "lvlm_probe" / "index.key"
    assert key.stat().st_mode & 0o077 == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a third one's"))
    index_module._key.cache_clear()
    assert open_store(tmp_path).find() == first
    assert sorted(opened) == sorted(path.name for path in paths)
    index_module._key.cache_clear()


def test_a_file_put_in_the_place_of_another_of_its_size_and_time_is_read(tmp_path: Path, opened: list[str]) -> None:
    first, second = filled(tmp_path, count=2)[0], sample_capture(seed=0)
    open_store(tmp_path).find()
    times, size = first.stat().st_mtime_ns, first.stat().st_size
    second.created, second.model = "2026-03-01T12:00:00+00:00", {"model_id": "maker/Smart-1B", "class": "Llava"}
    os.replace(write(second, tmp_path), first)
    os.utime(first, ns=(times, times))
    assert first.stat().st_size == size
    opened.clear()
    assert open_store(tmp_path).find()[0].model == "maker/Smart-1B"
    assert opened == [first.name]


def test_an_index_of_hundreds_of_megabytes_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, count=1)
    first = open_store(tmp_path).find()
    monkeypatch.setattr(index_module, "_MOST_BYTES", 10_000)
    (tmp_path / INDEX_NAME).write_bytes(b"[]," * 10_000)
    tracemalloc.start()
    try:
        index_module.Index(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 20_000
    finally:
        tracemalloc.stop()
    (tmp_path / INDEX_NAME).unlink()
    os.mkfifo(tmp_path / INDEX_NAME)  # nor waited for
    assert open_store(tmp_path).find() == first


def test_an_entry_does_not_outlive_its_file_or_name_another(tmp_path: Path) -> None:
    paths = filled(tmp_path, count=2)
    open_store(tmp_path).find()
    index = tmp_path / INDEX_NAME
    text = index.read_text("utf-8").replace(paths[0].name, f"../{paths[0].name}")
    index.write_text(text, encoding="utf-8")
    assert {summary.path for summary in open_store(tmp_path).find()} == set(paths)


def test_a_folder_that_cannot_be_written_is_listed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path)

    def refuse(*_: Any) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(index_module.os, "replace", refuse)
    assert len(open_store(tmp_path).find()) == 5
    assert not (tmp_path / INDEX_NAME).exists()
    assert not list(tmp_path.glob(".*.part"))


def test_a_damaged_file_is_named_and_the_list_goes_on_when_asked(tmp_path: Path) -> None:
    paths = filled(tmp_path)
    paths[0].write_bytes(paths[0].read_bytes()[:-10])
    with pytest.raises(TraceError, match=paths[0].name):
        open_store(tmp_path).find()
    errors: list[TraceError] = []
    found = open_store(tmp_path).find(on_error=errors.append)
    assert len(found) == 4
    assert [paths[0].name in str(error) for error in errors] == [True]


def test_one_file_can_be_listed(tmp_path: Path) -> None:
    path = filled(tmp_path)[-1]
    assert [summary.row for summary in open_store(path).find()] == [0, 1]
    assert not (tmp_path / INDEX_NAME).exists()


@pytest.mark.quick
def test_a_header_costs_a_few_kilobytes_whatever_the_file_holds(tmp_path: Path) -> None:
    """By the count that the system keeps of what this process reads."""
    capture = sample_capture()
    capture.rows[0].model_kwargs = {"pixel_values": np.zeros((1, 3, 1000, 1000), np.float32)}
    path = write(capture, tmp_path)
    assert path.stat().st_size > 12_000_000

    def read() -> int:
        lines = Path("/proc/self/io").read_text("ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))

    before = read()
    index_module.read_summaries(path)
    assert read() - before < 100_000
