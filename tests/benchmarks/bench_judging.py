"""What judging a map takes beside explaining, and how far few points of the curves are from all of them.

    python tests/benchmarks/bench_judging.py              # some three minutes on one core
    python tests/benchmarks/bench_judging.py --scenes 1   # that everything runs

Every method that is not a search explains demo scenes, plain ones, and is judged on 32 × 32 cells twice: on all points
of both curves, and as ``lvlm-probe evaluate --methods`` does (adaptive sampling, both ends and what else is asked for
twice shared among methods). Images through the model are counted by the model's own forward passes. Writes
``results/judging.json``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_model import write_results

import lvlm_probe as probe
from lvlm_probe.explainers import methods
from lvlm_probe.metrics import CurveRule

SEARCHES = ("greedy", "rise", "occlusion")
TOLERANCE = 0.005
GRID = 32


def measured(scene: Any, model: Any, processor: Any) -> list[dict[str, Any]]:
    """One scene under every method."""
    answer = probe.ask(model, processor, scene.image, scene.question)
    selection = probe.select_tokens(answer.replay)
    replay = answer.replay.strengthened(selection.indices)
    shared: dict[Any, Any] = {}
    found = []
    for name in methods():
        if name in SEARCHES:
            continue
        counts = [_images(replay)]
        heat = probe.explain(replay, method=name, tokens=selection, strengthen=False, progress=False)
        if heat.values is None:
            continue
        counts.append(_images(replay))
        adaptive = CurveRule(sampling="adaptive", tolerance=TOLERANCE)
        few = probe.evaluate(heat, replay, grid=GRID, curve=adaptive, shared=shared, progress=False)
        counts.append(_images(replay))
        full = probe.evaluate(heat, replay, grid=GRID, progress=False)
        counts.append(_images(replay))
        explaining, judging, judging_full = np.diff(counts).tolist()
        line = {"method": name, "explaining": explaining, "judging": judging, "judging_full": judging_full}
        line |= {"off": abs(few.gain - full.gain), "turns": sum(few.params["turns"].values())}
        found.append({**line, "bound": sum(few.params["error_bound"].values())})
    return found


def _images(replay: Any) -> int:
    return int(replay.passes.forward + replay.passes.backward)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "judging.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = probe.demo.load()
    lines = [line for scene in probe.demo.scenes(arguments.scenes) for line in measured(scene, model, processor)]
    by_method = {}
    for name in dict.fromkeys(line["method"] for line in lines):
        mine = [line for line in lines if line["method"] == name]
        by_method[name] = {key: float(np.mean([line[key] for line in mine])) for key in mine[0] if key != "method"}
    figures = {
        "judging": float(np.median([line["judging"] for line in lines])),
        "judging_full": float(np.median([line["judging_full"] for line in lines])),
        "explaining_default": by_method["igos++"]["explaining"],
        "off": float(np.mean([line["off"] for line in lines])),
        "off_most": float(np.max([line["off"] for line in lines])),
    }
    write_results(arguments.out, {"scenes": arguments.scenes, "tolerance": TOLERANCE, **figures, "methods": by_method})
    print(figures)


if __name__ == "__main__":
    main()
