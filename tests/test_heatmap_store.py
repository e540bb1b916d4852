"""The store of explained and scored heatmaps: what is found again, and what is read of files that anybody wrote."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_samples as samples
from PIL import Image

import lvlm_probe as probe
from lvlm_probe.errors import ProbeError, SelectionError, TraceError
from lvlm_probe.heatmap_store import (
    FOLDER,
    MapFile,
    MapSettings,
    by_trace,
    explain_one,
    find_maps,
    not_made,
    read_record,
    score_one,
    write_record,
)
from lvlm_probe.metrics import CurveRule
from lvlm_probe.recording.answering import record_answer
from lvlm_probe.selection import select_tokens


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A folder of two maps, the second one older."""
    folder = tmp_path / FOLDER
    folder.mkdir()
    for name, second in (("new", 2), ("old", 1)):
        samples.heat(samples.trace()).write(folder / f"{name}.h5")
        os.utime(folder / f"{name}.h5", (second, second))
    return folder


def test_a_map_that_goes_while_it_is_listed_spoils_no_list(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread or process deletes it, as the app does with the oldest answers of its visitors."""
    samples.heat(samples.trace()).write(stored / "going.h5")
    plain = Path.glob

    def listed(folder: Path, pattern: str) -> Iterator[Path]:
        yield from sorted(plain(folder, pattern))
        (stored / "going.h5").unlink()

    monkeypatch.setattr(Path, "glob", listed)
    found = find_maps([stored])
    assert [item.path.stem for item in found if item.path.is_file()] == ["old", "new"]
    with pytest.raises(TraceError, match="going"):
        next(item for item in found if not item.path.is_file()).read()


def test_a_record_is_what_json_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert read_record(path) is None
    write_record(path, {"b": (np.float32(0.5), math.nan), "a": {"deep": -math.inf}, "text": "à"})
    assert read_record(path) == {"b": [0.5, None], "a": {"deep": None}, "text": "à"}
    assert path.read_text(encoding="utf-8").endswith("}\n")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "damaged"),
        ("[1]", "no record"),
        ("[" * 100_000, "nested too deep"),
        ("\x00", "damaged"),
        ("NaN", "no record"),
    ],
)
def test_what_is_no_record_is_refused_with_the_way_out(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ProbeError, match=re.escape(str(path)) + f".*{said}.*; delete it$"):
        read_record(path, way_out="delete it")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ProbeError, match=r"a\.json cannot be read: it is not a regular file"):
        read_record(tmp_path / "a.json")


def test_maps_are_found_by_file_and_folder_the_oldest_first(stored: Path) -> None:
    assert [item.path.stem for item in find_maps([stored])] == ["old", "new"]
    assert find_maps([stored.parent]) == find_maps([stored])
    assert find_maps([stored / "new.h5", stored]) == [MapFile(stored / "new.h5"), MapFile(stored / "old.h5")]
    with pytest.raises(TraceError, match="there is no file or directory"):
        find_maps([stored / "lost.h5"])


def test_what_is_no_file_among_maps_is_left_out(stored: Path) -> None:
    (stored / "nowhere.h5").symlink_to(stored / "lost")
    (stored / "folder.h5").mkdir()
    os.mkfifo(stored / "pipe.h5")
    assert [item.path.stem for item in find_maps([stored])] == ["old", "new"]


def test_a_score_is_taken_again_when_it_was_taken_in_another_way(stored: Path) -> None:
    found = MapFile(stored / "new.h5")
    asked: dict[str, Any] = {"score": "prob", "mode": "fast", "steps": 8, "chance": 0, "grid": 16}
    asked["curve"] = CurveRule()
    assert found.score() is None and found.score_taken_by(asked) is None
    params = {
        "score": "prob",
        "auc": "trapezoid",
        "mode": "fast",
        "seed": 0,
        "grid": [16, 16],
        "steps": 8,
        "center": True,
    }
    found.write_score(samples.score(params={**params, "held_out": False}, random_gains=()))
    assert found.score_taken_by(asked) == found.score()
    found.write_score(samples.score(params={**params, "held_out": False, "center": False}, random_gains=()))
    assert found.score_taken_by(asked) is None, "the floor of the middle was not taken"
    found.write_score(samples.score(params={**params, "held_out": False}, random_gains=()))
    others = ({"curve": CurveRule(auc="release")}, {"curve": CurveRule(seed=1)})
    for change in ({"grid": 8}, {"steps": 9}, {"chance": 2}, *others):
        assert found.score_taken_by({**asked, **change}) is None
    found.score_path.write_text("{")
    assert found.score_taken_by(asked) is None


def test_a_map_without_its_trace_belongs_to_none(stored: Path) -> None:
    with pytest.raises(ProbeError, match="its trace is not beside it any more"):
        by_trace(find_maps([stored]))


def test_a_heatmap_that_was_not_made_says_why() -> None:
    selection = samples.heat(samples.trace()).selection
    replay: Any = samples.trace(image_sizes=[(9, 6)], baseline={"kind": "blur"}, trace=None)
    for error, reason in ((SelectionError("no such word"), "no such word"), (ZeroDivisionError("x"), "unexpected")):
        heat = not_made(replay, "gradcam", selection, error)
        assert heat.values is None and reason in str(heat.reason)
        assert (heat.method, heat.image_size, heat.provenance["baseline"]) == ("gradcam", (9, 6), {"kind": "blur"})


def test_an_overlay_says_what_the_stored_score_says(demo: Any, tmp_path: Path) -> None:
    """A map that was drawn before it was scored must not go on saying that nobody has checked it."""
    model, processor = demo
    scene = probe.demo.scenes(1, kinds=["pair"])[0]
    trace = record_answer(model, processor, [scene.image], scene.question, tmp_path, generate={"max_new_tokens": 20})
    replay = probe.replay(trace, model, processor)
    chosen, folder = select_tokens(replay), tmp_path / FOLDER
    settings = MapSettings("center", {}, scored=False)
    found, _ = explain_one(replay, chosen, "answer", settings, folder)

    def corner() -> tuple[int, ...]:
        with Image.open(found.overlay_path) as image:
            return image.convert("RGB").getpixel((0, image.height - 1))

    assert corner() == (90, 90, 90)  # not checked
    score = score_one(replay, found)
    assert not score.verdict.trusted and corner() == (213, 94, 0)
    found.overlay_path.unlink()
    assert explain_one(replay, chosen, "answer", settings, folder) == (found, True)
    assert corner() == (213, 94, 0)
