"""The causal check on held-out demo scenes: do interventions on the true region cost more than on other image tokens?

    python tests/benchmarks/bench_causal.py --scenes 30

Prints, with 95 % bootstrap intervals over scenes: what the explained words lose when attention to the image tokens that
the true region touches is cut (by who is made blind, and by layer), when their features are replaced by the baseline
picture's, and with equally many tokens drawn at random; and the agreement score of three heatmaps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from held_out import Case, cases, machine

import lvlm_probe as probe
from lvlm_probe import causal
from lvlm_probe.metrics import bootstrap_ci

QUERIES = ("text", "answer", "tokens")


def measure(case: Case) -> dict[str, float]:
    """All figures of one scene; drops in nats of f and in mean probability."""
    region, replay = case.scene.mask.astype(bool), case.replay
    row: dict[str, float] = {}

    def add(name: str, effect: Any) -> None:
        row[f"{name}: f"], row[f"{name}: f, control"] = effect.drop, effect.control_drop
        row[f"{name}: probability"] = effect.probability_drop
        row[f"{name}: probability, control"] = effect.control_probability_drop

    for queries in QUERIES:
        effect = causal.knockout(replay, region, tokens=case.selection, queries=queries, sweep=3)
        add(f"knockout, {queries}", effect)
        for window in effect.windows:
            row[f"knockout, {queries}, layers {window.layers}: f"] = effect.original - window.score
    row["image tokens"] = effect.effects[0].top
    add("patch", causal.patch(replay, region, tokens=case.selection))
    truth = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(case.scene.mask)[None].float(), 32)[0].numpy()
    noise = np.random.default_rng(case.scene.index).random((32, 32))
    size = replay.image_sizes[0]
    heats = {
        "igos++": probe.explain(replay, tokens=case.selection, strengthen=False),
        "ground truth": probe.Heatmap(truth, size, selection=case.selection),
        "random": probe.Heatmap(noise, size, selection=case.selection),
    }
    for kind in ("knockout", "patch"):
        for name, heat in heats.items():
            row[f"agreement by {kind}, {name}"] = causal.agreement(replay, heat, kind=kind)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=30)
    parser.add_argument("--out", type=Path, help="also write the figures of every scene, JSON lines")
    given = parser.parse_args()
    skipped: Counter[str] = Counter()
    columns: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as directory:
        for case in cases("eval", given.scenes, Path(directory), skipped=skipped):
            row = measure(case)
            for name, value in row.items():
                columns[name].append(value)
            if given.out is not None:
                with given.out.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps({"scene": case.scene.index, "kind": case.scene.kind, **row}) + "\n")
    print(f"{given.scenes} scenes, passed over: {dict(skipped)}; {machine()}")
    for name, values in columns.items():
        print(f"{name:52} {bootstrap_ci(values)}")


if __name__ == "__main__":
    main()
