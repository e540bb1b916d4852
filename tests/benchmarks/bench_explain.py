"""Deletion, insertion, pointing game and energy-in-region on 100 held-out demo scenes: the README's table.

    python tests/benchmarks/bench_explain.py --out runs/bench_explain

Every method explains the same tokens against the same baseline and is scored on the same 32 × 32 grid. Scenes come from
split "eval", settings were tuned on split "tune". One JSON line per scene: it can be interrupted and goes on where it
stopped. Writes ``scenes.jsonl``, ``summary.json`` and ``table.md``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from held_out import POINTING_TOLERANCE, Case, cases, machine, read_records
from tqdm import tqdm

import lvlm_probe as probe
from lvlm_probe.metrics import bootstrap_ci, energy_in_region, paired_difference, pointing_game

COLUMNS = ("deletion", "insertion", "pointing", "energy")
FLOORS = {"deletion": ("at most", 0.06), "insertion": ("at least", 0.95), "pointing": ("at least", 0.95)}
RANDOM_HEATMAPS = 3


def _igos(**settings: Any) -> Callable[[Case, int], list[probe.Heatmap]]:
    return lambda case, grid: [probe.explain(case.replay, tokens=case.selection, strengthen=False, **settings)]


def _wrapped(case: Case, values: np.ndarray, method: str) -> probe.Heatmap:
    return probe.Heatmap(
        values, case.replay.image_sizes[0], selection=case.selection, method=method, trace=case.replay.trace
    )


def _ground_truth(case: Case, grid: int) -> list[probe.Heatmap]:
    mask = torch.from_numpy(case.scene.mask)[None].float()
    return [_wrapped(case, torch.nn.functional.adaptive_avg_pool2d(mask, grid)[0].numpy(), "ground truth")]


def _random(case: Case, grid: int) -> list[probe.Heatmap]:
    generator = np.random.default_rng(case.scene.index)
    return [_wrapped(case, generator.random((grid, grid)), "random") for _ in range(RANDOM_HEATMAPS)]


METHODS: dict[str, Callable[[Case, int], list[probe.Heatmap]]] = {
    "igos++": _igos(),
    "igos++, release preset": _igos(preset="release"),
    "ground-truth mask": _ground_truth,
    "random": _random,
}


def measure(case: Case, grid: int) -> dict[str, Any]:
    """All methods on one scene; several heatmaps of one method are averaged, their gains kept."""
    record: dict[str, Any] = {
        "scene": case.scene.index,
        "kind": case.scene.kind,
        "answer": case.scene.answer,
        "tokens": case.selection.text,
        "baseline": dict(case.replay.baseline),
        "methods": {},
    }
    for name, explain in METHODS.items():
        forward, backward = case.replay.passes.forward, case.replay.passes.backward
        started = time.perf_counter()
        heats = explain(case, grid)
        seconds = time.perf_counter() - started
        passes = [case.replay.passes.forward - forward, case.replay.passes.backward - backward]
        scores = [probe.evaluate(heat, case.replay, grid=grid) for heat in heats]
        record["methods"][name] = {
            "deletion": float(np.mean([score.deletion for score in scores])),
            "insertion": float(np.mean([score.insertion for score in scores])),
            "pointing": float(
                np.mean([pointing_game(heat, case.scene.mask, tolerance=POINTING_TOLERANCE) for heat in heats])
            ),
            "strict_pointing": float(np.mean([pointing_game(heat, case.scene.mask) for heat in heats])),
            "energy": float(np.mean([energy_in_region(heat, case.scene.mask) for heat in heats])),
            "gains": [score.gain for score in scores],
            "tie_share": float(np.mean([score.tie_share for score in scores])),
            "trusted": all(score.verdict.trusted for score in scores),
            "reasons": sorted({reason for score in scores for reason in score.verdict.reasons}),
            "seconds": seconds,
            "forward": passes[0],
            "backward": passes[1],
        }
    return record


def summarise(records: list[dict[str, Any]], skipped: dict[str, int], grid: int) -> dict[str, Any]:
    """Means with 95 % bootstrap intervals over scenes."""
    rows: dict[str, Any] = {}
    for name in METHODS:
        per_scene = [record["methods"][name] for record in records]
        intervals = {column: bootstrap_ci([row[column] for row in per_scene]) for column in COLUMNS}
        rows[name] = {
            **{column: [interval.estimate, interval.low, interval.high] for column, interval in intervals.items()},
            "forward": float(np.mean([row["forward"] for row in per_scene])),
            "backward": float(np.mean([row["backward"] for row in per_scene])),
            "strict_pointing": float(np.mean([row["strict_pointing"] for row in per_scene])),
            "seconds": float(np.median([row["seconds"] for row in per_scene])),
            "trusted": float(np.mean([row["trusted"] for row in per_scene])),
        }
    gain = {name: [np.mean(record["methods"][name]["gains"]) for record in records] for name in METHODS}
    chance = np.array([value for record in records for value in record["methods"]["random"]["gains"]])
    against = {name: str(paired_difference(gain["igos++"], gain[name])) for name in METHODS if name != "igos++"}
    return {
        "scenes": len(records),
        "kinds": dict(Counter(record["kind"] for record in records)),
        "passed_over": skipped,
        "grid": grid,
        "machine": machine(),
        "methods": rows,
        "gain_over": against,
        "random_gain": {
            "mean": float(chance.mean()),
            "deviation": float(chance.std()),
            "quantile_95": float(np.quantile(chance, 0.95)),
            "largest": float(chance.max()),
        },
    }


def table(summary: dict[str, Any]) -> str:
    """The summary as Markdown."""
    lines = [
        "| heatmap | deletion ↓ | insertion ↑ | pointing ↑ | energy inside ↑ | passes: forward + backward | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in summary["methods"].items():
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*row[column]) for column in COLUMNS]
        passes = f"{row['forward']:.0f} + {row['backward']:.0f}" if row["forward"] else "none"
        seconds = f"{row['seconds']:.2f}" if row["forward"] else "none"
        lines.append(f"| {name} | {' | '.join(cells)} | {passes} | {seconds} |")
    skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(summary["passed_over"].items())) or "none"
    lines += [
        "",
        f"{summary['scenes']} held-out scenes, mean [95 % bootstrap interval]; passed over on the way: {skipped}. "
        f"Scored on {summary['grid']} × {summary['grid']} cells. Pointing: the highest point lies on an object "
        f"that the answer needs, or within {POINTING_TOLERANCE} pixels of it (without that margin: "
        + ", ".join(f"{name} {row['strict_pointing']:.2f}" for name, row in summary["methods"].items())
        + f"). Seconds: median, {summary['machine']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_explain"))
    parser.add_argument("--grid", type=int, default=32, help="cells a side on which all methods are scored")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--check", action="store_true", help="exit with 1 when igos++ misses a floor")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "scenes.jsonl"
    records = read_records(path)
    skipped: Counter[str] = Counter()
    last = -1
    for record in records:
        last, skipped = record["scene"], Counter(record["passed_over"])
    missing = arguments.scenes - len(records)
    with tqdm(total=arguments.scenes, initial=len(records), unit="scene") as bar:
        for case in cases("eval", missing, arguments.out / "traces", skipped=skipped, after=last):
            record = measure(case, arguments.grid) | {"passed_over": dict(skipped)}
            records.append(record)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            bar.update()
    summary = summarise(records, dict(skipped), arguments.grid)
    (arguments.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (arguments.out / "table.md").write_text(table(summary), encoding="utf-8")
    print(table(summary))
    print(json.dumps({key: summary[key] for key in ("gain_over", "random_gain", "kinds")}, indent=2))
    missed = [
        f"{column} {summary['methods']['igos++'][column][0]:.3f}, wanted {word} {floor}"
        for column, (word, floor) in FLOORS.items()
        if (summary["methods"]["igos++"][column][0] - floor) * (1 if word == "at least" else -1) < 0
    ]
    print("floors: " + ("all met" if not missed else "MISSED: " + "; ".join(missed)))
    raise SystemExit(1 if missed and arguments.check else 0)


if __name__ == "__main__":
    main()
