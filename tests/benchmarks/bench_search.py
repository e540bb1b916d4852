r"""What a search in bfloat16 saves and what it costs a map: ``search_dtype="bfloat16"`` beside the float32 one.

    python tests/benchmarks/bench_search.py --scenes 30                                    # the demo model
    python tests/benchmarks/bench_search.py --scenes 8 --cases runs/photographs --model runs/real/model \
        --methods "igos++ (fast)" integrated_gradients greedy rise

    python tests/benchmarks/bench_search.py --tried --cases runs/photographs --model runs/real/model

Held-out scenes, or images that ``photographs.py`` wrote; each is explained both ways by each method, in one thread, one
after the other, and both maps are scored in float32 by ``evaluate``. Seconds are those of the processor, without the
scoring. ``pass`` is four masks forward, and forward and backward. Lines are kept in ``--out`` and found again; their
means and paired differences, with bootstrap intervals, go into ``results/search.json``, beside those of other models.

``--tried`` times plain passes, seven images at once, in float32, in bfloat16, with linear layers in int8
(``quantize_dynamic``, which has no gradient), and with the decoder's layers compiled.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from held_out import Case, cases, read_records
from random_model import write_results

import lvlm_probe as probe
from lvlm_probe.metrics import CurveRule, bootstrap_ci, evaluate, paired_difference

METHODS: dict[str, dict[str, Any]] = {
    "igos++": {"method": "igos++"},
    "igos++ (fast)": {"method": "igos++", "preset": "fast"},
    "integrated_gradients": {"method": "integrated_gradients", "steps": 20},
    "greedy": {"method": "greedy"},
    "rise": {"method": "rise", "masks": 100},
}
"""At sizes that a photograph can be had at in minutes; what a pass costs does not depend on them."""
SEARCHES = (None, "bfloat16")
MASKS = 4
SIDE = 7
"""Images at once of what was tried."""
PIXELS = ("pixel_values",)
STEPS = 8
"""Points of the curves: the same ones both ways."""


def spent(run: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and seconds of the processor."""
    started = time.process_time()
    return run(), time.process_time() - started


def passes(case: Case) -> dict[str, Any]:
    """Seconds of a mask both ways, and how alike log-probabilities and gradients are."""
    steps = list(case.selection.columns)
    masks = torch.rand(MASKS, 8, 8, generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {}
    seen = {}
    for dtype in SEARCHES:
        replay = case.replay if dtype is None else case.replay.computed_in(dtype)

        def forward(replay: Any = replay) -> torch.Tensor:
            with torch.no_grad():
                return replay.log_probs(masks, steps=steps)

        def backward(replay: Any = replay) -> tuple[torch.Tensor, torch.Tensor]:
            return replay.score_and_grad(masks, lambda log_probs: log_probs[:, steps].sum(dim=1), steps=steps)

        with replay.shortcuts.caching():
            backward()  # finds the shortcuts, and casts weights
            _, found[f"forward {dtype or 'float32'}"] = spent(forward)
            seen[dtype], found[f"backward {dtype or 'float32'}"] = spent(backward)
    (scores, slopes), (others, near) = seen.values()
    found = {name: value / MASKS for name, value in found.items()}
    found["nats"] = float((scores - others).abs().max())
    cosines = torch.nn.functional.cosine_similarity(slopes.flatten(1), near.flatten(1))
    return {**found, "cosine": float(cosines.mean())}


def compared(case: Case, name: str) -> dict[str, Any]:
    """One method both ways."""
    line: dict[str, Any] = {}
    maps = []
    for dtype in SEARCHES:
        heat, seconds = spent(
            lambda dtype=dtype: probe.explain(
                case.replay, tokens=case.selection, strengthen=False, progress=False, search_dtype=dtype,
                **METHODS[name],
            )
        )  # fmt: skip
        if heat.values is None:
            return {"reason": heat.reason}
        score = evaluate(
            heat, case.replay, grid=32, steps=STEPS, center=False, curve=CurveRule(tie_orders=1), shared=case.shared
        )
        maps.append(heat.values.ravel())
        line[dtype or "float32"] = {
            "gain": score.gain, "seconds": seconds, "trusted": score.verdict.trusted,
            "forward": heat.provenance["passes"]["forward"], "search": heat.provenance.get("search"),
        }  # fmt: skip
    return {**line, "correlation": float(np.corrcoef(*maps)[0, 1])}


def run(model: str, path: Path, options: argparse.Namespace) -> None:
    """Measure what is not kept yet, line by line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {(record["scene"], record["what"]) for record in read_records(path)}
    with tempfile.TemporaryDirectory() as folder, path.open("a", encoding="utf-8") as lines:
        found = cases(
            "eval", options.scenes, Path(folder), skipped=Counter(), model=options.model, images=options.cases
        )
        for case in found:
            for what in ("pass", *options.methods):
                if (case.scene.index, what) in done:
                    continue
                made = passes(case) if what == "pass" else compared(case, what)
                lines.write(json.dumps({"scene": case.scene.index, "what": what, **made}) + "\n")
                lines.flush()
                print(model, case.scene.index, what, made, flush=True)


def tried(case: Case) -> dict[str, Any]:
    """Seconds of a plain pass of the model and how far log P is off, nats per token, by ways that were not taken."""
    replay = case.replay
    model, ids = replay.model, torch.cat([replay.input_ids, replay.token_ids[:-1]])[None].expand(SIDE, -1)
    fed = {name: torch.cat([value] * SIDE) for name, value in replay.path.inputs.items() if name in PIXELS}
    targets = replay.token_ids[None, :, None].expand(SIDE, -1, 1)

    def passed(run: Any, *, grad: bool) -> torch.Tensor:
        given = {name: value.clone().requires_grad_(grad) for name, value in fed.items()}
        with torch.set_grad_enabled(grad):
            logits = run(input_ids=ids, attention_mask=torch.ones_like(ids), **given, use_cache=False).logits
            found = logits[:, replay.prompt_length - 1 :].float().log_softmax(-1).gather(-1, targets)[0, :, 0]
            if grad:
                torch.autograd.grad(found.sum(), list(given.values()))
        return found.detach()

    model.requires_grad_(False)
    exact, found = passed(model, grad=False), {}

    def timed(name: str, run: Any, grads: tuple[bool, ...] = (False, True)) -> None:
        for grad in grads:
            (_, first), (log_probs, taken) = (spent(lambda grad=grad: passed(run, grad=grad)) for _ in range(2))
            line = {"seconds": taken / SIDE, "first": first, "nats": float((log_probs - exact).abs().mean())}
            found[f"{name}, {'forward and backward' if grad else 'forward'}"] = line
            print(name, grad, line, flush=True)

    timed("float32", model)
    with torch.autocast("cpu", torch.bfloat16):
        timed("bfloat16", model)
    timed("int8", torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8), (False,))
    for layer in model.get_decoder().layers:
        layer.compile()
    timed("float32, compiled", model)
    return found


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over scenes of one model, and paired differences between both ways."""
    here: dict[str, Any] = {}
    timed = [record for record in records if record["what"] == "pass"]
    names = [name for name in timed[0] if name not in ("scene", "what")]
    here["pass"] = {"n": len(timed), **{name: float(np.median([one[name] for one in timed])) for name in names}}
    for method in dict.fromkeys(record["what"] for record in records if record["what"] != "pass"):
        mine = [one for one in records if one["what"] == method and "reason" not in one]
        gains = {kind: [one[kind]["gain"] for one in mine] for kind in ("float32", "bfloat16")}
        here[method] = {
            "n": len(mine),
            "params": METHODS[method],
            "correlation": float(np.median([one["correlation"] for one in mine])),
            "least_correlation": min(one["correlation"] for one in mine),
            "difference": vars(paired_difference(gains["bfloat16"], gains["float32"])),
            "seconds_ratio": sum(one["bfloat16"]["seconds"] for one in mine)
            / sum(one["float32"]["seconds"] for one in mine),
            **{
                kind: {
                    "gain": vars(bootstrap_ci(values)),
                    "seconds": float(np.mean([one[kind]["seconds"] for one in mine])),
                    "forward": float(np.mean([one[kind]["forward"] for one in mine])),
                    "trusted": sum(one[kind]["trusted"] for one in mine),
                }
                for kind, values in gains.items()
            },
        }
    return here


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=30)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--model", type=Path, help="folder of a checkpoint; by default the embedded model")
    parser.add_argument("--name", default="real parts", help="what that model is called in the table")
    parser.add_argument("--cases", type=Path, help="folder of images from photographs.py, in the place of scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/search"), help="folder of the lines")
    parser.add_argument("--tried", action="store_true", help="time what was tried besides, on the first image")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "search.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=probe.ProbeWarning)
    model = "demo" if options.model is None else options.name
    path = options.out / f"{model}.jsonl"
    results: dict[str, Any] = {"models": {}, "tried": {}}
    if options.results.exists():  # of models that are not measured now
        before = json.loads(options.results.read_text(encoding="utf-8"))
        results = {name: before.get(name, {}) for name in results}
    if options.tried:
        with tempfile.TemporaryDirectory() as folder:
            found = cases("eval", 1, Path(folder), skipped=Counter(), model=options.model, images=options.cases)
            results["tried"][model] = tried(next(found))
    else:
        run(model, path, options)
        results["models"][model] = summary(read_records(path))
    write_results(options.results, {"command": "python tests/benchmarks/bench_search.py", **results})


if __name__ == "__main__":
    main(sys.argv[1:])
