"""Files written whole or not at all, parts that nobody can plant, regular files only, and true words for failures."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lvlm_probe import files
from lvlm_probe.files import (
    NotRegularFile,
    causes,
    json_ready,
    open_regular,
    orphans,
    part_path,
    read_small,
    remove_orphans,
)
from lvlm_probe.files import write_whole as write


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write(path, "one\r\nä")
    assert path.read_bytes() == "one\r\nä".encode()
    write(path, b"two", fsync=True)
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("at", ["write", "replace", "full"])
def test_what_was_there_stays_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    path = tmp_path / "a.txt"
    write(path, b"old")
    if at == "replace":

        def refuse(*_: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="Input/output"):
            write(path, b"new")
    else:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0 if at == "full" else 4096, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                write(path, b"x" * 10_000)  # the first 4096 bytes are taken
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_link_at_the_part_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    names = iter(["0" * 16, "0" * 16, "1" * 16])
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: next(names))
    planted = part_path(tmp_path / "a.txt")
    planted.symlink_to(victim)
    write(tmp_path / "a.txt", b"mine")
    assert victim.read_bytes() == b"precious"
    assert (tmp_path / "a.txt").read_bytes() == b"mine"
    assert planted.is_symlink(), "and what somebody put there is not ours to delete"


def test_a_link_at_the_name_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "a.txt").symlink_to(tmp_path / "victim")
    write(tmp_path / "a.txt", b"mine")
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert not (tmp_path / "a.txt").is_symlink()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_only_regular_files_are_replaced_and_read(tmp_path: Path, make: Callable[[str], None]) -> None:
    path = tmp_path / "a"
    make(str(path))
    for use in (lambda: write(path, b"x"), lambda: open_regular(path), lambda: read_small(path, limit=9)):
        with pytest.raises(NotRegularFile):
            use()
    with pytest.raises(NotRegularFile):
        write("/dev/null", b"x")


def test_a_file_that_becomes_a_pipe_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, regular = tmp_path / "a", tmp_path / "b"
    os.mkfifo(path)
    regular.write_bytes(b"x")
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda at, **more: stat(regular if at == path else at, **more))
    with pytest.raises(NotRegularFile):
        open_regular(path)


def test_a_long_name_has_a_part_too(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 125 + ".html")
    write(path, b"x")
    assert len(os.fsencode(part_path(path).name)) <= 255
    assert path.read_bytes() == b"x"


def test_parts_of_every_kind_are_found_again(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    dead = [
        tmp_path / f"{name}.{child.pid}-{tail}.part"
        for name in ("report.html", ".index.jsonl", "x.score.json", "m.csv", "t.h5")
        for tail in ("0123456789abcdef", "0123abcd")
    ]
    for part in dead:
        part.write_bytes(b"x")
    folder = tmp_path / f"page.{child.pid}-0123456789abcdef.part"
    (folder / "data").mkdir(parents=True)
    mine = part_path(tmp_path / "x.html")
    mine.write_bytes(b"x")
    (tmp_path / "download.part").write_bytes(b"x")
    assert orphans([tmp_path]) == []  # young
    assert orphans([tmp_path, tmp_path / "missing"], min_age=0) == sorted([*dead, folder])
    assert remove_orphans([tmp_path], min_age=0) == sorted([*dead, folder])
    assert sorted(os.listdir(tmp_path)) == sorted(["download.part", mine.name])


def test_a_small_file_is_read_and_a_large_one_is_not(tmp_path: Path) -> None:
    write(tmp_path / "a", b"12345")
    gc.collect()  # what other tests have left open
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert read_small(tmp_path / "a", limit=5) == b"12345"
        gc.collect()
    assert not told, "a file is left open"
    with pytest.raises(OSError, match="more than 4"):
        read_small(tmp_path / "a", limit=4)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "not enough memory"),
        (OSError(errno.EMFILE, "Too many open files"), "too many files open"),
        (OSError(errno.EACCES, "Permission denied"), "permission is denied"),
        (OSError(errno.EIO, "Input/output error"), "input/output error"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(4711, "something new"), "something new"),
    ],
)
def test_every_failure_has_its_own_words(error: BaseException, words: str) -> None:
    what, way_out = causes(error)
    assert words in what
    assert "record it again" not in way_out
    assert way_out


@pytest.mark.quick
def test_whatever_a_user_keeps_in_settings_becomes_json() -> None:
    class Odd:
        def __str__(self) -> str:
            return "odd"

    value = {
        1: (True, None, "é"),
        "numbers": [1, 2.5, math.nan, -math.inf, 10**400],
        "numpy": [np.float32(0.5), np.int64(3), np.bool_(True), np.arange(4).reshape(2, 2)],
        "tensors": [torch.tensor(2), torch.tensor([1.0, math.inf])],
        "others": [Path("/x"), b"y", Odd(), {3, 1, 2}, range(2), torch.float16],
    }
    made = json_ready(value)
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert made == {
        "1": [True, None, "é"],
        "numbers": [1, 2.5, None, None, hex(10**400)],
        "numpy": [0.5, 3, True, [[0, 1], [2, 3]]],
        "tensors": [2, [1.0, None]],
        "others": ["/x", "b'y'", "odd", [1, 2, 3], [0, 1], "torch.float16"],
    }
    assert json_ready([math.nan, {"a": math.inf}], nonfinite=str) == ["nan", {"a": "inf"}]
