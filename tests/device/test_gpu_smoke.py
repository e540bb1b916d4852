"""The script that is run first on a card, rehearsed on a pretended one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from pretend import Card

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_smoke


def test_the_first_minute_on_a_card(tmp_path: Path) -> None:
    out = tmp_path / "smoke.json"
    with Card() as card:
        status = gpu_smoke.main(["--device", "cuda:0", "--families", "llava", "--seconds", "900", "--out", str(out)])
    lines = json.loads(out.read_text("utf-8"))["checks"]
    assert {line["result"] for line in lines} == {"ok"} and status == 0
    assert len(lines) > 20 and not card.mixed


def test_a_check_that_is_wrong_ends_nothing(tmp_path: Path) -> None:
    smoke = gpu_smoke.Smoke(torch.device("cpu"), 900.0, tmp_path / "smoke.json", tmp_path)
    smoke.check("raises", lambda: 1 / 0)
    smoke.check("wrong", lambda: 0.5, lambda value: value < 0.1)
    assert smoke.check("right", lambda: 0.05, lambda value: value < 0.1) == 0.05
    smoke.seconds = 0
    smoke.check("late", lambda: 1)
    lines = json.loads((tmp_path / "smoke.json").read_text("utf-8"))["checks"]
    assert [line["result"].partition(":")[0] for line in lines] == ["ZeroDivisionError", "wrong", "ok"]
    assert smoke.lines[-1]["result"] == "not reached" and smoke.failed == ["raises", "wrong"]
