"""What quantised weights cost a map: every quantisation that computes on a CPU, against the same model in float32.

    make .venv-quantised/.installed
    PYTHONPATH=.venv-quantised python tests/benchmarks/bench_quantised.py

The embedded model, ``--scenes`` questions about plain scenes. Each answer is recorded and replayed; log-probabilities,
the gradient of log P of the words from the image to a mask of 8 × 8, and the maps of igos++ and occlusion are compared
with those of the float32 model for the *same* tokens. Writes ``results/quantised.json``; ``publish.py`` makes the table
of ``docs/reality.md`` of it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_model import write_results

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from quantised_models import KINDS, METHODS, WITHOUT_DERIVATIVE, installed, load

import lvlm_probe as probe
from lvlm_probe import causal
from lvlm_probe._version import versions_of
from lvlm_probe.planning import weight_bytes

LIBRARIES = ("torch", "transformers", "bitsandbytes", "torchao", "hqq", "optimum-quanto")
GRADIENTS = ("igos++", "gradcam", "tmm", "iia", "integrated_gradients", "input_gradient")
ATTENTION = ("attention", "rollout", "tam")
MASKS = ("rise", "occlusion", "greedy")


def recorded(model: Any, processor: Any, scene: Any, folder: Path) -> Any:
    with probe.attach(model, processor) as attached, attached.record(folder) as recording:
        inputs = processor.apply_chat_template(
            scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(model.device, model.dtype)
        model.generate(**inputs, max_new_tokens=12, do_sample=False)
    if recording.faults:
        raise RuntimeError("; ".join(recording.faults))
    return recording.traces[-1]


def works(run: Callable[[], Any]) -> str:
    """``"yes"``, or the first sentence of the error."""
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return "yes"


def gradient(replay: Any, steps: list[int]) -> torch.Tensor:
    mask = torch.full((1, 8, 8), 0.5)
    return replay.score_and_grad(mask, lambda log_probs: log_probs[:, steps].sum(dim=1))[1].flatten().double()


def parts(replay: Any, trace: Any, model: Any, processor: Any) -> dict[str, Any]:
    """What works, on one answer."""
    selection = probe.select_tokens(replay)

    def explained(methods: tuple[str, ...]) -> None:
        for method in methods:
            heat = probe.explain(replay, method=method, tokens=selection, strengthen=False, **METHODS[method])
            if heat.values is None:
                raise RuntimeError(f"{method}: {heat.reason}")

    def judged() -> None:
        heat = probe.explain(replay, method="occlusion", size=6, tokens=selection, strengthen=False)
        probe.evaluate(heat, replay, steps=6)

    def cut() -> None:
        heat = probe.explain(replay, method="occlusion", size=6, tokens=selection, strengthen=False)
        causal.knockout(replay, heat, draws=1)

    return {
        "boxes": trace.layout.patch_box is not None,
        "verify": works(lambda: _within(trace, model, processor)),
        "gradients": works(lambda: explained(GRADIENTS)),
        "attention": works(lambda: explained(ATTENTION)),
        "masks": works(lambda: explained(MASKS)),
        "evaluate": works(judged),
        "knockout": works(cut),
        "plan": works(lambda: probe.plan(replay, method="rise")),
    }


def _within(trace: Any, model: Any, processor: Any) -> None:
    found = probe.verify(trace, model, processor)
    if not found.within(None):
        raise RuntimeError(f"{found.largest_difference:.2g} nats")


class Truth:
    """One answer of the float32 model, with what others are compared with."""

    def __init__(self, replay: Any) -> None:
        self.replay = replay
        self.selection = probe.select_tokens(replay)
        self.gradient = gradient(replay, list(self.selection.indices))
        self.maps = {method: self.map(replay, method) for method in ("igos++", "occlusion")}

    def map(self, replay: Any, method: str) -> Any:
        """The map of a method on a model for these tokens."""
        params = METHODS[method]
        return probe.explain(replay, method=method, tokens=self.selection, strengthen=False, **params).values

    def against(self, replay: Any) -> dict[str, float]:
        """How far log-probabilities, gradient and maps of another model are from these."""
        found = {"log_probs": float((self.replay.original_log_probs - replay.original_log_probs).abs().max())}
        methods = ["occlusion"]
        try:
            slope = gradient(replay, list(self.selection.indices))
        except probe.errors.ExplainError:  # a kernel without a derivative
            pass
        else:
            found["gradient"] = float(torch.nn.functional.cosine_similarity(self.gradient, slope, dim=0))
            methods.append("igos++")
        for method in methods:
            maps = self.maps[method], self.map(replay, method)
            if maps[0] is not None and maps[1] is not None:
                found[method] = float(np.corrcoef(*map(np.ravel, maps))[0, 1])
        return found


def measured(kind: str, tower: bool, scenes: list[Any], truths: list[Truth], processor: Any) -> dict[str, Any]:
    """One quantisation."""
    model = load(kind, tower=tower)
    lines: list[dict[str, float]] = []
    line: dict[str, Any] = {"weights": weight_bytes(model)}
    with tempfile.TemporaryDirectory() as folder:
        same = 0
        for number, (scene, truth) in enumerate(zip(scenes, truths, strict=True)):
            trace = recorded(model, processor, scene, Path(folder))
            same += list(trace.token_ids) == list(truth.replay.token_ids)
            if not number:
                replay = probe.replay(trace, model, processor)
                line["works"] = {"record": trace.status, **parts(replay, trace, model, processor)}
            lines.append(truth.against(probe.replay(truth.replay.trace, model, processor, strict=False)))
    line["same answers"] = same
    for name in ("log_probs", "gradient", "igos++", "occlusion"):
        values = [one[name] for one in lines if name in one]
        if values:
            line[name] = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return line


def main(arguments: list[str] | None = None) -> None:
    """Measure what is installed, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", help="default: all whose library is there")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quantised.json")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    _, processor = probe.demo.load()
    scenes = probe.demo.scenes(options.scenes)
    plain = load("float32")
    known = {**KINDS, **WITHOUT_DERIVATIVE}
    there = ["bfloat16", *(kind for kind, (library, _, _) in known.items() if installed(library))]
    kinds: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        truths = [
            Truth(probe.replay(recorded(plain, processor, scene, Path(folder)), plain, processor)) for scene in scenes
        ]
        for kind in options.kinds or there:
            for tower in (True, False) if kind in WITHOUT_DERIVATIVE else (True,):
                name = kind if tower else f"{kind}; language model alone"
                try:
                    kinds[name] = measured(kind, tower, scenes, truths, processor)
                except Exception as error:
                    kinds[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
                print(name, {part: value for part, value in kinds[name].items() if part != "works"}, flush=True)
                write_results(options.out, {
                    "command": "PYTHONPATH=.venv-quantised python tests/benchmarks/bench_quantised.py",
                    "versions": versions_of(*LIBRARIES), "scenes": len(scenes), "float32": weight_bytes(plain),
                    "kinds": kinds,
                })  # fmt: skip
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
