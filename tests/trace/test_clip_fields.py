"""Clips in a trace file: what is known of a video comes back, and a stranger's file is believed nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from trace_samples import sample_capture, sample_row

from lvlm_probe.errors import TraceError
from lvlm_probe.trace import open_trace, write
from lvlm_probe.trace.clips import Clip, ClipList
from lvlm_probe.trace.fields import Json


def written(directory: Path, clips: tuple[Clip, ...], images: int = 5) -> Any:
    row = dataclasses.replace(sample_row(images=images), clips=clips)
    return open_trace(write(dataclasses.replace(sample_capture(), rows=[row]), directory))


def test_clips_come_back_as_they_were(tmp_path: Path) -> None:
    clips = (Clip(1, 2, (0, 7), 24.0, 8, 0.33), Clip(3, 2))
    trace = written(tmp_path, clips)
    assert trace.clips == clips
    assert trace.clips[0].times == (0.0, 7 / 24)
    assert trace.clips[1].times is None
    assert [list(clip.images) for clip in trace.clips] == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        ({"clips": [{"first": 0, "frames": 9}]}, "images 0 to 8 of 5"),
        ({"clips": [{"first": 2, "frames": 2}, {"first": 3, "frames": 1}]}, "images 3 to 3"),
        ({"clips": [{"first": -1, "frames": 2}]}, "from image -1"),
        ({"clips": [{"first": 0, "frames": 10**9}]}, "a clip of 1000000000 frames"),
        ({"clips": [{"first": 0, "frames": 2, "indices": [1]}]}, "1 indices"),
        ({"clips": [{"first": 0, "frames": 2, "indices": [1, "2"]}]}, "whole numbers"),
        ({"clips": [{"first": 0, "frames": 2, "fps": -1}]}, "fps -1"),
        ({"clips": [{"first": 0, "frames": 2, "fps": "24"}]}, "numbers as total"),
        ({"clips": [{"first": True, "frames": 2}]}, "whole numbers"),
        ({"clips": "all"}, "a clip is an object"),
        ({}, "a clip is an object"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: dict[str, Any], told: str
) -> None:
    monkeypatch.setattr(ClipList, "put", lambda self, trace, _value: Json.put(self, trace, stored))
    trace = written(tmp_path, (Clip(0, 2),))
    with pytest.raises(TraceError, match=f"inputs/clips.*{told}"):
        _ = trace.clips


def test_steps_in_time_share_frames_where_they_must() -> None:
    parts = [[*part] for part in Clip(0, 4).parts(3)]
    assert parts == [[0, 1], [1, 2], [2, 3]]
    assert [[*part] for part in Clip(0, 2).parts(4)] == [[0], [0], [1], [1]]
