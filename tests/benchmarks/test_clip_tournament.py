"""What the tournament of clips rests on: places in space and time, floors below the truth, tables of what there is."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from toy_clip import SIDE, ToyClip, tube_weights

import lvlm_probe as probe

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import clip_tournament as tournament
import judging

WHEN, ROWS, COLS = (
    slice(4, 6),
    slice(0, 12),
    slice(24, 48),
)  # of 8 frames of 48 × 48 pixels: two of the toy's 2 × 4 cells


@pytest.fixture
def case() -> tournament.ClipCase:
    toy = ToyClip(tube_weights(8, 4, WHEN, slice(0, 1), slice(2, 4)))
    mask = np.zeros((8, SIDE, SIDE), dtype=bool)
    mask[WHEN, ROWS, COLS] = True
    clip: Any = SimpleNamespace(index=3, mask=mask, frames=toy.trace.images, kind="order", answer="a")
    return tournament.ClipCase(clip, toy, probe.select_tokens(toy))  # type: ignore[arg-type]


def test_the_truth_points_at_itself_and_floors_do_not(case: tournament.ClipCase) -> None:
    truth, middle = (tournament.measure(case, make) for make in (tournament.truth, tournament.center))
    assert truth["pointing"] == truth["pointing_in_time"] == 1
    assert truth["energy"] > 0.8  # brought from the cells of the ranking to pixels, its edges are soft
    assert truth["moments"] == 0.25
    assert truth["gain"] > 0.8 > 0.3 > middle["gain"]
    assert middle["pointing"] == 0
    assert np.isnan(middle["pointing_in_time"])  # every frame alike
    assert 0 < middle["energy"] < 0.1


def test_a_method_is_judged_with_its_passes_and_one_that_fails_says_why(case: tournament.ClipCase) -> None:
    made = tournament.measure(case, tournament.entries()["occlusion"])
    assert made["pointing"] == made["pointing_in_time"] == 1
    assert made["gain"] > 0.8
    assert made["forward"] > 10
    assert made["backward"] == 0
    failed = tournament.measure(case, lambda _: (_ for _ in ()).throw(probe.errors.ExplainError("no way")))
    assert failed == {"reason": "ExplainError: no way"}


def test_values_by_frame_tell_when_and_not_where(case: tournament.ClipCase) -> None:
    made = tournament.measure(case, tournament.by_frame)
    assert made["pointing_in_time"] == 1
    assert made["pointing"] == pytest.approx(((12 + 4) * (24 + 4)) / SIDE**2)  # what chance hits in the right frames
    assert made["forward"] == 256


def test_a_table_has_the_leader_first_and_kinds_by_themselves(tmp_path: Path) -> None:
    lines = judging.Lines(tmp_path)
    for scene in range(12):
        facts = {"scene": scene, "number": scene, "kind": probe.demo.CLIP_KINDS[scene % 4], "answer": "", "key": "k"}
        cost = {"passed_over": {"answered wrongly": 2}, "forward": 3, "backward": 3, "seconds": 0.5, "moments": 0.5}
        for name, gain in (("igos++", 0.9), ("rise", 0.6), ("random", 0.0)):
            if name == "rise" and scene >= 8:
                continue
            figures = {"gain": gain + 0.001 * scene, "deletion": 0.1, "insertion": 0.9, "energy": 0.4, "pointing": 1.0}
            lines.add({**facts, **cost, **figures, "pointing_in_time": None if name == "random" else 1.0, "name": name})
    arguments = SimpleNamespace(split="eval", model=None)
    summary = tournament.summarise(arguments, lines)  # type: ignore[arg-type]
    assert summary["clips"] == 12
    assert summary["methods"]["rise"]["behind"]["mean"] == pytest.approx(0.3)
    text = tournament.table(summary)
    rows = [row.split(" | ")[0].removeprefix("| ") for row in text.splitlines() if row.startswith("| ")]
    methods = ["igos++", "rise (the first 8)", "random"]
    assert [row for row in rows if row != "---"] == ["heatmap", *methods, "heatmap", *methods, "gain", *methods]
    assert "12 held-out clips; passed over on the way: 2 answered wrongly." in text


def test_lines_are_made_anew_where_that_is_asked_for(
    case: tournament.ClipCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "load", lambda folder: (None, None))
    monkeypatch.setattr(tournament, "clip_cases", lambda *_, **__: iter([case]))
    made: list[str] = []

    def measure(_: Any, make: Any) -> dict[str, Any]:
        made.append(make())
        return {"gain": 0.5}

    monkeypatch.setattr(tournament, "measure", measure)
    options = argparse.Namespace(scenes=1, few={}, shard=(0, 1), model=tournament.MODEL, split="eval", out=tmp_path)
    for again in ([], [], ["center"]):
        options.again = again
        chosen: Any = {name: (lambda name=name: name) for name in ("center", "random")}
        tournament.play(options, judging.Lines(tmp_path), chosen)
    assert made == ["center", "random", "center"]


def test_the_page_shows_the_table_of_the_summary_that_is_kept() -> None:
    summary = json.loads(tournament.RESULTS.read_text(encoding="utf-8"))
    page = (tournament.ROOT / "docs" / "video.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- tournament -->\n")[2].partition("\n<!-- /tournament -->")[0]
    assert shown == tournament.table(summary).strip()
