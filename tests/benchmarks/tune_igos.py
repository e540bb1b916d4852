"""Compares settings of iGOS++, to choose them on scenes kept for tuning and to judge the choice on held-out ones.

    python tests/benchmarks/tune_igos.py --scenes 40                                   # settings of few passes
    python tests/benchmarks/tune_igos.py --only $ROUNDS --hard --model examples/hard_model
    python tests/benchmarks/tune_igos.py --judge --scenes 200 --write                  # the default on held-out scenes
    python tests/benchmarks/tune_igos.py --judge --scenes 60 --model runs/cambrian --write
    python tests/benchmarks/tune_igos.py --judge --scenes 12 --model runs/real/model --cases runs/photographs \
        --adaptive 0.04 --lines runs/tournament/photographs --name "real parts, photographs" --write

``--judge`` runs the default (which goes on while passes help), the fixed fast setting and the thorough one on scenes of
split ``eval``; ``--write`` puts what came of them into ``results/adaptive.json``, one entry per model, which
``publish.py`` puts into docs/methods.md. Maps that the tournament has judged on the same scenes with the same seeds are
not made again (``--lines``). One JSON line per scene and setting, so that it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from held_out import Case, cases, machine, read_records
from judging import (
    TOLERANCE,
    Lines,
    by_held_out,
    comparison,
    curve_rule,
    figure,
    placed,
    shown,
    values_of,
    weights_digest,
)
from tqdm import tqdm

import lvlm_probe as probe
from lvlm_probe.metrics import bootstrap_ci, paired_difference
from lvlm_probe.metrics.verdict import CENTER_MARGIN

RESULTS = Path(__file__).parent / "results" / "adaptive.json"

_FEW = {
    "preset": "fast", "path": "stratified", "refine_pace": "each", "refine_decay": True, "refine_lr": 0.4,
    "refine_levels": 2,
}  # fmt: skip

# About 25 passes: what the fast setting was chosen from.
FEW_PASSES: dict[str, dict[str, Any]] = {
    "fast": {"preset": "fast"},
    "24: 1 x 2, order 5 x 2": {"iterations": 1, "ig_steps": 2, "refine": 5, **_FEW},
    "24: 1 x 4, order 4 x 2": {"iterations": 1, "ig_steps": 4, "refine": 4, **_FEW},
    "24: 1 x 6, order 3 x 2": {"iterations": 1, "ig_steps": 6, "refine": 3, **_FEW},
    "24: 2 x 2, order 4 x 2": {"iterations": 2, "ig_steps": 2, "refine": 4, **_FEW},
    "24: 2 x 3, order 3 x 2": {"iterations": 2, "ig_steps": 3, "refine": 3, **_FEW},
    "24: 3 x 2, order 3 x 2": {"iterations": 3, "ig_steps": 2, "refine": 3, **_FEW},
    "24: 6 x 2, no order": {**_FEW, "iterations": 6, "ig_steps": 2, "refine": 0},
}

# When to go on.
ROUNDS: dict[str, dict[str, Any]] = {
    "default": {},
    "enough at 0.85": {"enough": 0.85},
    "enough at 0.93": {"enough": 0.93},
    "always two rounds": {"enough": 9.0, "budget": 72},
    "all rounds": {"enough": 9.0},
    "long rounds below 0.78": {"enough": 0.97},
    "the order on its own cells": {"refine_cells": None},
    "the order on other cells by a little": {"refine_cells": (0.7, 1.0)},
    "one pull for each level from the first round": {"refine_pace": "level"},
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
    **ROUNDS,
    **FEW_PASSES,
    **{name: {"preset": "thorough", **settings} for name, settings in THOROUGH.items()},
}

JUDGED = {"default": "igos++", "fast": "igos++ (fast)", "thorough": "igos++ (thorough)"}
"""Settings of ``--judge``, and what the tournament's lines call them."""


def measured(case: Case, name: str, grid: int, adaptive: float | None, held_out: Sequence[str]) -> dict[str, Any]:
    """One setting on one scene."""
    before = case.replay.passes.forward, case.replay.passes.backward
    started = time.perf_counter()
    heat = probe.explain(case.replay, tokens=case.selection, seed=case.scene.index, strengthen=False, **SETTINGS[name])
    seconds = time.perf_counter() - started
    passes = case.replay.passes.forward - before[0], case.replay.passes.backward - before[1]
    how: dict[str, Any] = {"grid": grid, "curve": curve_rule(adaptive)}
    score = probe.evaluate(heat, case.replay, baseline=case.replay.baseline, **how)
    diagnostics = heat.provenance.get("diagnostics") or {}
    return {
        "deletion": score.deletion,
        "insertion": score.insertion,
        "center": score.center_gain,
        "trusted": score.verdict.trusted,
        "reasons": list(score.verdict.reasons),
        "pointing": None,
        "energy": None,
        **placed(heat, case.scene.mask),
        **(by_held_out(heat, case, held_out, how) if held_out else {}),
        "forward": passes[0],
        "backward": passes[1],
        "seconds": seconds,
        **diagnostics,
        **({"rounds": len(diagnostics["rounds"])} if "rounds" in diagnostics else {}),
    }


def tournament_records(directory: Path, scenes: int, weights: str) -> list[dict[str, Any]]:
    """What the tournament's lines say of the same settings on its first scenes, by the same model."""
    if not directory.is_dir():
        return []
    names = {line: setting for setting, line in JUDGED.items()}
    lines = [line for name in names for line in Lines(directory).of(name)]
    return [
        {"pointing": None, "energy": None, **line, "setting": names[line["name"]], "weights": weights}
        for line in lines
        if line["number"] < scenes and line.get("gain") is not None
        # Lines of the time when a blob in the middle was no floor say too little of the default.
        if names[line["name"]] != "default" or {"center", "rounds"} <= line.keys()
    ]


def table(records: list[dict[str, Any]], names: list[str]) -> None:
    columns = ["deletion", "insertion", "pointing", "energy", "forward", "backward"]
    columns += sorted({key for record in records for key in record if key.startswith(("gain_", "held_out"))})
    print(f"| setting | n | {' | '.join(columns)} | trusted | ins − del | against the first |")
    print(f"|{'---|' * (len(columns) + 5)}")
    by_setting = {name: {r["scene"]: r for r in records if r["setting"] == name} for name in names}
    first = by_setting[names[0]]
    for name, rows in by_setting.items():
        if not rows:
            continue
        values = [[row[column] for row in rows.values() if row.get(column) is not None] for column in columns]
        cells = [f"{np.mean(of):.3f}" if of else "–" for of in values]
        trusted = sum(bool(row.get("trusted")) for row in rows.values())
        gain = bootstrap_ci([_gain(row) for row in rows.values()])
        common = sorted(set(rows) & set(first))
        change = paired_difference(*([_gain(of[key]) for key in common] for of in (rows, first)))
        print(f"| {name} | {len(rows)} | {' | '.join(cells)} | {trusted} | {gain} | {change} |")


def _gain(record: dict[str, Any]) -> float:
    return float(record["insertion"] - record["deletion"])


def summary(records: list[dict[str, Any]], arguments: argparse.Namespace, skipped: Counter[str]) -> dict[str, Any]:
    """The default beside the fast and the thorough setting, on the scenes that all three have been judged on."""
    by_setting = {name: {r["scene"]: r for r in records if r["setting"] == name} for name in JUDGED}
    common = sorted(set.intersection(*(set(rows) for rows in by_setting.values())))
    rows = {name: [of[scene] for scene in common] for name, of in by_setting.items()}
    gains = {name: [_gain(row) for row in of] for name, of in rows.items()}
    for row, default in zip([row for of in rows.values() for row in of], len(rows) * rows["default"], strict=True):
        # The tournament's lines were judged without this floor, which is the same for all maps of a scene.
        row["trusted"] = bool(row["trusted"]) and not default["center"] - _gain(row) > CENTER_MARGIN
    thorough = float(np.mean(gains["thorough"]))
    ratios = [
        float(np.mean(picked[:, 0]) / np.mean(picked[:, 1]))
        for picked in _resampled(np.array([gains["default"], gains["thorough"]]).T)
    ]
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "model": arguments.name or ("embedded demo model" if arguments.model is None else arguments.model.name),
        "weights": weights_digest(arguments.model),
        "scenes": len(common),
        "hard": arguments.hard,
        "passed_over": dict(skipped),
        "settings": {
            name: {
                "gain": figure(gains[name]),
                "forward": figure(row["forward"] for row in of),
                "backward": figure(row["backward"] for row in of),
                "most_forward": max(row["forward"] for row in of),
                "trusted": sum(row["trusted"] for row in of),
            }
            for name, of in rows.items()
        },
        "center": figure(row["center"] for row in rows["default"]),
        "center_beats_default": sum(row["center"] > _gain(row) for row in rows["default"]),
        "share_of_thorough": float(np.mean(gains["default"])) / thorough,
        "share_interval": [float(edge) for edge in np.quantile(ratios, (0.025, 0.975))],
        "fast_share_of_thorough": float(np.mean(gains["fast"])) / thorough,
        "went_on": sum(row["rounds"] > 1 for row in rows["default"]),
        "only_thorough_trusted": sum(
            a["trusted"] < b["trusted"] for a, b in zip(rows["default"], rows["thorough"], strict=True)
        ),
        "ahead_of": {} if arguments.lines is None else ahead_of(arguments.lines, rows["default"]),
    }


def ahead_of(directory: Path, default: list[dict[str, Any]]) -> dict[str, Any]:
    """The default's gain less that of each other map of the tournament, on the scenes that both have been judged on."""
    lines = Lines(directory)
    own = {row["scene"]: _gain(row) for row in default}
    names = [name for name in lines.names() if name != JUDGED["default"]]
    return {name: comparison(own, values_of(lines.of(name), "gain")) for name in names}


def _resampled(pairs: np.ndarray, times: int = 2000) -> np.ndarray:
    generator = np.random.default_rng(0)
    return pairs[generator.integers(0, len(pairs), (times, len(pairs)))]


def write(found: dict[str, Any]) -> None:
    """Puts one model's summary into the results, in the place of an older one."""
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    kept = [one for one in known if (one["model"], one["hard"]) != (found["model"], found["hard"])]
    text = json.dumps([*kept, found], indent=1, ensure_ascii=False, allow_nan=False)
    RESULTS.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--hard", action="store_true", help="hard scenes; give --model as well")
    parser.add_argument("--model", type=Path, help="checkpoint that answers; by default the embedded demo model")
    parser.add_argument("--name", help="what results call the model; by default its folder")
    parser.add_argument("--out", type=Path, help="by default a folder of runs/tune")
    parser.add_argument("--only", nargs="*", help="names of settings; by default those of few passes")
    parser.add_argument("--judge", action="store_true", help="the default, fast and thorough, on held-out scenes")
    parser.add_argument("--lines", type=Path, help="the tournament's lines of the same model, for --judge")
    parser.add_argument("--write", action="store_true", help="put the judgement into results/adaptive.json")
    parser.add_argument("--cases", type=Path, help="stored images instead: a folder that photographs.py has written")
    parser.add_argument("--adaptive", nargs="?", type=float, const=TOLERANCE, help="areas within this, by few points")
    parser.add_argument("--held-out", default="", help="baselines that judge too, with commas")
    parser.add_argument("--grid", type=int, default=32, help="cells a side on which all are scored")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    split, names = ("eval", list(JUDGED)) if arguments.judge else ("tune", arguments.only or list(FEW_PASSES))
    kind = "hard" if arguments.hard else "easy" if arguments.cases is None else arguments.cases.name
    out = arguments.out or Path("runs/tune") / f"{split}-{kind}-{weights_digest(arguments.model)}"
    out.mkdir(parents=True, exist_ok=True)
    path = out / "settings.jsonl"
    records = read_records(path)
    held_out = tuple(filter(None, arguments.held_out.split(",")))
    if arguments.lines is not None:
        records += tournament_records(arguments.lines, arguments.scenes, weights_digest(arguments.model))
    done = {(record["scene"], record["setting"]) for record in records}
    skipped: Counter[str] = Counter()
    known = [sum(setting == name for _, setting in done) for name in names]
    found: Iterable[Case] = ()
    if min(known) < arguments.scenes:
        found = cases(
            *(split, arguments.scenes, out / "traces"),
            skipped=skipped,
            hard=arguments.hard,
            model=arguments.model,
            images=arguments.cases,
        )
    else:  # lines of the tournament say it, and no scene need be answered again
        skipped.update(max(records, key=lambda record: record.get("number", -1)).get("passed_over", {}))
    for case in tqdm(found, total=arguments.scenes):
        for name in names:
            if (case.scene.index, name) in done:
                continue
            facts = {"scene": case.scene.index, "kind": case.scene.kind, "setting": name}
            records.append({**facts, **measured(case, name, arguments.grid, arguments.adaptive, held_out)})
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(records[-1]) + "\n")
    print(f"{machine()}; passed over: {dict(skipped)}")
    table(records, names)
    if arguments.judge:
        whole = summary(records, arguments, skipped)
        print(json.dumps(whole, indent=1, ensure_ascii=False))
        own = whole["settings"]["default"]
        print(f"default: {shown(own['gain'])}, passes {shown(own['forward'])}")
        if arguments.write:
            write(whole)


if __name__ == "__main__":
    main()
