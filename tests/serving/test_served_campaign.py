"""The campaign with real engines, here with one of ours: it goes on where it was stopped, and is published."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import publish
from campaigns import served
from demo_server import DemoServer

import lvlm_probe as probe


def test_it_goes_on_at_the_scene_where_it_was_stopped(
    behind: DemoServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes, one_scene = probe.demo.scenes, served.one_scene
    monkeypatch.setattr(probe.demo, "scenes", lambda number: scenes(number, size=(96, 96)))
    monkeypatch.setattr(served.Run, "engine", lambda self, *what, **more: behind.url)
    monkeypatch.setattr(
        served, "METHODS", {name: {**served.RISE, "masks": 6, "cells": 3, "size": 4} for name in served.METHODS}
    )
    done: list[dict[str, Any]] = []

    def stopped(server: Any, model: Any, processor: Any, scene: Any, folder: Path) -> dict[str, Any]:
        if len(done) == 1:
            done.append(done[0])
            raise KeyboardInterrupt
        made = done[0] if done else one_scene(server, model, processor, scene, folder)
        done.append({**made, "scene": scene.index})
        return done[-1]

    monkeypatch.setattr(served, "one_scene", stopped)
    out = tmp_path / "served.json"
    command = ["--env", "nowhere", "--scenes", "2", "--only", "tokens", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        served.main(command)
    assert not out.exists() and [file.name for file in tmp_path.iterdir()] == ["served.part"]
    served.main(command)
    assert len(done) == 3  # the first scene is not asked about again
    rows = json.loads(out.read_text())["tokens"]["scenes"]
    assert [row["scene"] for row in rows] == [one.index for one in scenes(2)]
    assert all(row["same_tokens"] and row["largest"] < 2e-3 and row["rise"]["spearman"] > 0.999 for row in rows)
    assert [file.name for file in tmp_path.iterdir()] == ["served.json"]
    text = publish.served("<!-- served -->\n<!-- /served -->", tmp_path)
    assert "| tokens | 2 |" in text and "tokens, throughput: masked images per second" in text
