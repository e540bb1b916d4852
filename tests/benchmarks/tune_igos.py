"""Compares settings of iGOS++ on demo scenes kept for tuning, which no published figure uses.

    python tests/benchmarks/tune_igos.py --scenes 40 --out runs/tune

One JSON line per scene and setting, so that it can be interrupted and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from held_out import POINTING_TOLERANCE, cases, machine, read_records
from tqdm import tqdm

import lvlm_probe as probe
from lvlm_probe.metrics import bootstrap_ci, energy_in_region, paired_difference, pointing_game

_FEW = {"path": "stratified", "refine_pace": "each", "refine_decay": True, "refine_lr": 0.4, "refine_levels": 2}

# About 25 passes: what the default was chosen from.
FEW_PASSES: dict[str, dict[str, Any]] = {
    "default": {},
    "24: 1 x 2, order 5 x 2": {"iterations": 1, "ig_steps": 2, "refine": 5, **_FEW},
    "24: 1 x 4, order 4 x 2": {"iterations": 1, "ig_steps": 4, "refine": 4, **_FEW},
    "24: 1 x 6, order 3 x 2": {"iterations": 1, "ig_steps": 6, "refine": 3, **_FEW},
    "24: 2 x 2, order 4 x 2": {"iterations": 2, "ig_steps": 2, "refine": 4, **_FEW},
    "24: 2 x 3, order 3 x 2": {"iterations": 2, "ig_steps": 3, "refine": 3, **_FEW},
    "24: 3 x 2, order 3 x 2": {"iterations": 3, "ig_steps": 2, "refine": 3, **_FEW},
    "24: 6 x 2, no order": {"iterations": 6, "ig_steps": 2, "path": "stratified", "refine": 0},
}

# Variations of the thorough preset.
THOROUGH: dict[str, dict[str, Any]] = {
    "thorough": {},
    "5 it, lr .15": {"lr": 0.15},
    "5 it, lr .5": {"lr": 0.5},
    "10 it, lr .15": {"iterations": 10, "lr": 0.15},
    "10 it, lr .3": {"iterations": 10, "lr": 0.3},
    "l3 30": {"l3": 30.0},
    "l3 10": {"l3": 10.0},
    "l3 300": {"l3": 300.0},
    "5 ig steps": {"ig_steps": 5},
    "no noise": {"noise": 0.0},
    "12 x 12": {"size": 12},
    "24 x 24": {"size": 24},
    "two masks": {"masks": 2},
    "line search": {"line_search": True},
    "no tie-break": {"tie_break": 0.0},
    "release": {"preset": "release"},
    "release + tie-break": {"preset": "release", "tie_break": 1e-3},
}

SETTINGS: dict[str, dict[str, Any]] = {
    **FEW_PASSES,
    **{name: {"preset": "thorough", **settings} for name, settings in THOROUGH.items()},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("runs/tune"))
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), help="names of settings")
    parser.add_argument("--grid", type=int, default=32, help="cells a side on which all are scored")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "settings.jsonl"
    records = read_records(path)
    done = {(record["scene"], record["setting"]) for record in records}
    skipped: Counter[str] = Counter()
    found = cases("tune", arguments.scenes, arguments.out / "traces", skipped=skipped)
    for case in tqdm(found, total=arguments.scenes):
        for name in arguments.only:
            if (case.scene.index, name) in done:
                continue
            started = time.perf_counter()
            heat = probe.explain(case.replay, tokens=case.selection, strengthen=False, **SETTINGS[name])
            seconds = time.perf_counter() - started
            score = probe.evaluate(heat, case.replay, grid=arguments.grid)
            record = {
                "scene": case.scene.index,
                "kind": case.scene.kind,
                "setting": name,
                "deletion": score.deletion,
                "insertion": score.insertion,
                "pointing": pointing_game(heat, case.scene.mask, tolerance=POINTING_TOLERANCE),
                "strict": pointing_game(heat, case.scene.mask),
                "energy": energy_in_region(heat, case.scene.mask),
                "seconds": seconds,
            }
            records.append(record)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    print(f"{machine()}; passed over: {dict(skipped)}")
    columns = ("deletion", "insertion", "pointing", "strict", "energy", "seconds")
    print(f"| setting | n | {' | '.join(columns)} | ins − del | against default |\n|{'---|' * 10}")
    by_setting = {name: {r["scene"]: r for r in records if r["setting"] == name} for name in arguments.only}
    for name, rows in by_setting.items():
        cells = [f"{np.nanmean([row[column] for row in rows.values()]):.3f}" for column in columns]
        gain = bootstrap_ci([row["insertion"] - row["deletion"] for row in rows.values()])
        default = by_setting.get("default", {})
        common = sorted(set(rows) & set(default))
        change = paired_difference(
            [rows[key]["insertion"] - rows[key]["deletion"] for key in common],
            [default[key]["insertion"] - default[key]["deletion"] for key in common],
        )
        print(f"| {name} | {len(rows)} | {' | '.join(cells)} | {gain} | {change} |")


if __name__ == "__main__":
    main()
