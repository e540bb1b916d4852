"""How well the planner predicts: predicted and measured peak memory of every method, on models of several sizes.

    python tests/benchmarks/bench_planner.py

The prediction is made from passes over two and three masks; the measurement is the method itself. Peaks are bytes of
tensors beyond what is alive before. To keep the run short, iterative methods do one iteration (their peak is that of
any iteration) with the stated number of masks at once. Writes ``results/planner.json``.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from random_model import MID_SIZE, SMALL, random_llava, recorded, write_results

import lvlm_probe as probe

METHODS: dict[str, dict[str, Any]] = {
    "igos++": {"iterations": 1, "refine": 1},
    "integrated_gradients": {"steps": 16},
    "input_gradient": {},
    "gradcam": {},
    "tmm": {},
    "iia": {},
    "rollout": {},
    "attention": {"source": "replay"},
    "rise": {"masks": 64},
    "occlusion": {"size": 8, "patch": 2, "stride": 2},
    "tam": {},
}
MID_SIZE_METHODS: dict[str, dict[str, Any]] = {
    **METHODS,
    "igos++": {"iterations": 1, "refine": 0, "ig_steps": 4},
    "integrated_gradients": {"steps": 6},
    "iia": {"points": 4},
    "rise": {"masks": 12},
    "occlusion": {"size": 4, "patch": 2, "stride": 2},
}
SMALL_SIDES = (12, 24, 34, 48)


def compare(name: str, replay: Any, methods: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per method."""
    last = len(replay.tokens)
    selection = probe.select_tokens(replay, span=(0, max(1, last - 1)))
    lines = []
    for method, params in methods.items():
        planned = probe.plan(replay, method=method, seconds=False, **params)
        heat = probe.explain(
            replay, method=method, tokens=selection, strengthen=False, measure_memory=True, **params
        )  # fmt: skip
        used = heat.provenance["memory"]
        predicted, measured = used["predicted_peak"], used["measured_peak"]
        assert predicted == planned.peak, "the plan changed under way"
        lines.append({
            "model": name,
            "method": method,
            "params": params,
            "micro_batch": planned.micro_batch,
            "predicted_bytes": predicted,
            "measured_bytes": measured,
            "ratio": round(predicted / measured, 4),
            "passes_predicted": [planned.forward, planned.backward],
            "passes": [heat.provenance["passes"][way] for way in ("forward", "backward")],
        })  # fmt: skip
        print(
            f"{name:28} {method:22} {predicted / 1e6:10.2f} MB predicted {measured / 1e6:10.2f} MB measured "
            f"{predicted / measured:7.3f}",
            flush=True,
        )
    return lines


def demo_replay(directory: Path) -> Any:
    """A held-out scene of the embedded model."""
    model, processor = probe.demo.load()
    (scene,) = probe.demo.scenes(1, split="eval", start=3)
    with probe.attach(model, processor) as attached, attached.record(directory) as recording:
        inputs = processor.apply_chat_template(
            scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        model.generate(**inputs, max_new_tokens=20, do_sample=False)
    return probe.replay(recording.traces[-1], model, processor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "planner.json")
    parser.add_argument("--without-mid-size", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        lines += compare("embedded model", demo_replay(Path(directory)), METHODS)
    sizes: list[tuple[str, int, int, dict[str, int], dict[str, dict[str, Any]]]] = [
        (f"random, {side * side} image tokens", side, 4, SMALL, METHODS) for side in SMALL_SIDES
    ]
    if not given.without_mid_size:
        sizes.append(("ViT-B/16 + 12 × 768, 196", 14, 16, MID_SIZE, MID_SIZE_METHODS))
    for name, side, patch, shape, methods in sizes:
        with tempfile.TemporaryDirectory() as directory:
            model, processor = random_llava(side, patch=patch, tower=shape, decoder=shape)
            lines += compare(
                name, recorded(model, processor, Path(directory), edge=side * patch, answer=20), methods
            )  # fmt: skip
        write_results(given.out, {"lines": lines})
    worst = max(lines, key=lambda line: abs(line["ratio"] - 1))
    print(f"{len(lines)} predictions, worst {worst['ratio']:.3f}: {worst['method']} on {worst['model']}")


if __name__ == "__main__":
    main()
