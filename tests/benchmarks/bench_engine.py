"""What the engine saves against a plain loop that does what the recipe published with the paper does.

    python tests/benchmarks/bench_engine.py                 # the demo model and a mid-size one, some 15 minutes
    python tests/benchmarks/bench_engine.py --models demo
    python tests/benchmarks/bench_engine.py --timed-n 4     # shorter: iterations with n = 4 are timed
    python tests/benchmarks/bench_engine.py --threads 1     # processor seconds in one thread
    python tests/benchmarks/bench_engine.py --profile --threads 1   # adds where our own time goes

Both sides run side by side in one process, on the same model, words, picture, baseline and number of passes:

* **iteration**: one iteration of iGOS+, 2n masks forward and backward, with fresh noise. The plain loop takes one
  picture at a time, computes the logits of every position, and keeps the graphs of an objective's n pictures alive
  until one backward pass.
* **curves**: deletion and insertion on 32 × 32 cells. The plain loop takes one picture at a time.
* **explanation**: ``explain`` at its defaults, against the recipe's five iterations with n = 10, which is that many
  times its own iteration. The **first explanation** on a model also plans its memory and finds out what passes may
  leave out.
* **arithmetic**: floating-point operations of an iteration, which do not depend on the machine or who else is on it.
* **frugal**: the iteration and its peak with four masks at once. By default as many go through as pays: time is bought
  with memory where a model is so small that there is plenty.

Seconds are those of the clock in as many threads as the machine has cores, which is how people run it; nothing else
should run beside it, and the load is written down. With ``--threads 1`` they are processor seconds of one thread,
which other jobs on the machine disturb least; they stand beside the others. A and B alternate, and medians are
reported. All sides are in float32. Peak memory is the highest resident set of a process that runs one side only,
beyond what it had with the loaded model after a first pass. Both sides are first compared: the same scores but for
rounding and the processor's way of resizing a mask. Writes ``results/engine.json``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_model import MID_SIZE, random_llava, write_results
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import lvlm_probe as probe
from lvlm_probe.metrics import CurveRule, evaluate

NOISE = 0.2
RECIPE_ITERATIONS, RECIPE_N = 5, 10
FRUGAL = 4
GOALS = {
    "demo": {"iteration": 0.25, "curves": 0.5, "explanation": 0.15, "peak": 0.4},
    "mid": {"iteration": 0.65, "curves": 0.5, "explanation": 0.15, "peak": 0.4},
}
SYSTEM = "Describe this picture: on the left is a square, to the right of it a blue circle and two triangles."


class Recipe:
    """The plain loop. Masks are resized to the model's pixels, as the recipe does for one square view."""

    def __init__(self, replay: probe.Replay, steps: list[int]) -> None:
        self.model, self.steps = replay.model, steps
        self.model.requires_grad_(False)
        (self.key,) = replay.path.pixel_keys
        self.whole, self.blurred = replay.path.inputs[self.key], replay.path.baseline_inputs[self.key]
        prompt = replay.input_ids
        self.ids = torch.cat([prompt, replay.token_ids])[None]
        self.rows = torch.tensor(steps) + len(prompt) - 1
        self.targets = replay.token_ids[steps]

    def log_probs(self, mask: torch.Tensor, noise: float) -> torch.Tensor:
        size = self.whole.shape[-2:]
        fine = functional.interpolate(mask[None, None], size=size, mode="bilinear", align_corners=False)
        pixels = self.whole * fine + self.blurred * (1 - fine)
        if noise:
            pixels = pixels + noise * torch.randn_like(pixels)
        logits = self.model(
            input_ids=self.ids, attention_mask=torch.ones_like(self.ids), **{self.key: pixels}, use_cache=False
        ).logits
        return logits.log_softmax(-1)[0, self.rows, self.targets]

    def iteration(self, mask: torch.Tensor, n: int) -> torch.Tensor:
        leaf = mask.clone().requires_grad_(True)
        gradient = torch.zeros_like(mask)
        for sign in (1, -1):
            terms = [
                self.log_probs(r / n * leaf if sign > 0 else 1 - r / n * leaf, NOISE).sum() for r in range(1, n + 1)
            ]
            gradient += torch.autograd.grad(sign * torch.stack(terms).mean(), leaf)[0]
        return gradient

    def curves(self, heat: torch.Tensor, points: int) -> list[list[float]]:
        order = heat.flatten().argsort(descending=True)
        counts = torch.linspace(0, len(order), points).round().long()
        result = []
        for insert in (False, True):
            scores = []
            for count in counts:
                mask = torch.full_like(heat, 0.0 if insert else 1.0).flatten()
                mask[order[:count]] = 1.0 if insert else 0.0
                with torch.no_grad():
                    scores.append(float(self.log_probs(mask.reshape(heat.shape), 0.0).exp().mean()))
            result.append(scores)
        return result


class Engine:
    """The same, by the package."""

    def __init__(self, replay: probe.Replay, steps: list[int], *, micro_batch: int | None = None) -> None:
        self.replay, self.steps, self.micro_batch = replay, steps, micro_batch

    def iteration(self, mask: torch.Tensor, n: int) -> torch.Tensor:
        scales = torch.arange(1, n + 1)[:, None, None] / n
        masks = torch.cat([scales * mask, 1 - scales * mask])
        _, slopes = self.replay.score_and_grad(
            masks, lambda log_probs: log_probs[:, self.steps].sum(1), noise=NOISE, steps=self.steps,
            micro_batch=self.micro_batch,
        )  # fmt: skip
        signs = torch.cat([scales, scales])  # chain rule: d(r M)/dM is r, and deletion and insertion point one way
        return (signs * slopes).sum(0) / n


def demo(directory: str) -> tuple[probe.Replay, list[int]]:
    model, processor = probe.demo.load()
    (scene,) = probe.demo.scenes(1, split="tune", start=3)
    with probe.attach(model, processor) as attached, attached.record(directory, images=[scene.image]) as recording:
        inputs = processor.apply_chat_template(
            scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        model.generate(**inputs, max_new_tokens=32, do_sample=False)
    replay = probe.replay(recording.traces[-1], model, processor)
    selection = probe.select_tokens(replay)
    return replay.strengthened(selection.decided), list(selection.indices)


def mid(directory: str) -> tuple[probe.Replay, list[int]]:
    """ViT-B/16 at 224 pixels, 12 layers of 768, 32,000 words; most of the prompt's text before the picture, as in
    LLaVA-1.5's own template; three words of 20 selected."""
    from tiny_models import picture

    model, processor = random_llava(14, patch=16, tower=MID_SIZE, decoder={**MID_SIZE, "vocab_size": 32000})
    said = [{"type": "text", "text": SYSTEM}, {"type": "image", "image": picture(224, 224)}]
    chat = [{"role": "user", "content": [*said, {"type": "text", "text": "What is in the picture?"}]}]
    with probe.attach(model, processor) as attached, attached.record(directory, llr=False) as recording:
        inputs = processor.apply_chat_template(
            chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        model.generate(**inputs, min_new_tokens=20, max_new_tokens=20, do_sample=False)
    return probe.replay(recording.traces[-1], model, processor), [4, 9, 13]


VARIANTS = (
    ("iteration", "iteration", "engine"),
    ("curves", "curves", "engine"),
    ("explanation", "explanation", "engine"),
    ("peak", "peak", "engine"),
    ("arithmetic", "flop", "engine"),
    ("adaptive curves", "curves", "adaptive"),
    ("first explanation", "explanation", "first"),
    ("frugal iteration", "iteration", "frugal"),
    ("frugal peak", "peak", "frugal"),
)
"""What is compared with the recipe's: a name, and where it stands in the results."""

MODELS: dict[str, Callable[[str], tuple[probe.Replay, list[int]]]] = {"demo": demo, "mid": mid}


def now() -> float:
    """Seconds of the processor where there is one thread, and of the clock where there are several."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(run: Callable[[], Any]) -> float:
    started = now()
    run()
    return now() - started


def alternating(rounds: int, **sides: Callable[[], Any]) -> dict[str, float]:
    """Median seconds of each side, run in turn; the first round warms up where there are several."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            taken[name].append(seconds(run))
    return {name: statistics.median(values[1:] if len(values) > 2 else values) for name, values in taken.items()}


def compare(recipe: Recipe, engine: Engine) -> dict[str, float]:
    """Largest difference of log-probabilities, nats, and the cosine of the gradients, on one mask without noise."""
    mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(1))
    leaf = mask.clone().requires_grad_(True)
    plain = recipe.log_probs(leaf, 0.0)
    (slope,) = torch.autograd.grad(plain.sum(), leaf)
    score = lambda log_probs: log_probs[:, engine.steps].sum(1)  # noqa: E731
    _, mine = engine.replay.score_and_grad(mask[None], score, steps=engine.steps)
    with torch.no_grad():
        log_probs = engine.replay.log_probs(mask, steps=engine.steps)[0, engine.steps]
    cosine = functional.cosine_similarity(mine.flatten(), slope.flatten(), dim=0)
    return {"log_probs": float((log_probs - plain.detach()).abs().max()), "gradient_cosine": float(cosine)}


def arithmetic(recipe: Recipe, engine: Engine) -> dict[str, int]:
    """Floating-point operations of matrix products and convolutions in an iteration with n = 1. They do not
    depend on the machine: what is left of them is what an iteration can at best be left of where they are all that
    takes time."""
    mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(1))
    counted = {}
    alone = Engine(engine.replay, engine.steps, micro_batch=1)  # which needs no pass to find out how many fit
    for side, run in (("recipe", recipe.iteration), ("engine", alone.iteration)):
        with FlopCounterMode(display=False) as counter:
            run(mask, 1)
        counted[side] = counter.get_total_flops()
    return counted


def measure(name: str, directory: str, *, rounds: int, n: int) -> dict[str, Any]:
    replay, steps = MODELS[name](directory)
    recipe, engine = Recipe(replay, steps), Engine(replay, steps)
    same = compare(recipe, engine)
    mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    line: dict[str, Any] = {
        "prompt": replay.prompt_length, "answer": len(replay.token_ids), "selected": steps, "n": n, **same,
        "shortcuts": str(replay.shortcuts), "flop": arithmetic(recipe, engine),
    }  # fmt: skip
    frugal = Engine(replay, steps, micro_batch=FRUGAL)
    sides = {"recipe": lambda: recipe.iteration(mask, n), "engine": lambda: engine.iteration(mask, n)}
    if name == "demo":  # a larger model has no more at once anyway
        sides["frugal"] = lambda: frugal.iteration(mask, n)
    iteration = alternating(rounds, **sides)
    span = probe.select_tokens(replay, span=(steps[0], steps[0] + 1))
    selection = span if name == "mid" else probe.select_tokens(replay)
    first = seconds(lambda: probe.explain(replay, preset="fast", tokens=selection, strengthen=False))
    explained: list[float] = []
    for _ in range(3):
        started = now()
        heat = probe.explain(replay, preset="fast", tokens=selection, strengthen=False)
        explained.append(now() - started)
    line["default_passes"] = heat.provenance["passes"]
    fine = functional.interpolate(torch.tensor(heat.values)[None, None], size=(32, 32), mode="bilinear")[0, 0]
    points = 51 if name == "demo" else 13
    marked = probe.Heatmap(fine.numpy(), heat.image_size, selection=heat.selection, method=heat.method)
    scores: dict[str, Any] = {}

    def scored(sampling: str) -> None:
        scores[sampling] = evaluate(marked, replay, steps=points - 1, curve=CurveRule(tie_orders=1, sampling=sampling))

    recipe_curves = Recipe(replay, list(selection.indices))
    curves = alternating(
        max(1, rounds - 1),
        recipe=lambda: recipe_curves.curves(fine, points),
        engine=lambda: scored("full"),
        adaptive=lambda: scored("adaptive"),
    )
    full, adaptive = scores["full"], scores["adaptive"]
    line |= {
        "iteration": iteration,
        "curves": curves,
        "points": points,
        "adaptive": {
            "pictures": adaptive.params["images"],
            "error_bound": adaptive.params["error_bound"],
            "turns": adaptive.params["turns"],
            "differences": [adaptive.deletion - full.deletion, adaptive.insertion - full.insertion],
        },
        "explanation": {
            "recipe": iteration["recipe"] * RECIPE_ITERATIONS * RECIPE_N / n,
            "engine": statistics.median(explained),
            "first": first,
        },
    }
    return line


def child(name: str, side: str, n: int, directory: str) -> None:
    """Prints bytes: peak resident set of one iteration beyond the loaded model's."""
    replay, steps = MODELS[name](directory)
    runner: Any = Recipe(replay, steps)
    if side != "recipe":
        runner = Engine(replay, steps, micro_batch=FRUGAL if side == "frugal" else None)
    mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        replay.log_probs(mask)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak of loading
    runner.iteration(mask, n)
    print(_status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def peaks(name: str, n: int) -> dict[str, int]:
    found = {}
    for side in ("recipe", "engine", "frugal") if name == "demo" else ("recipe", "engine"):
        command = [sys.executable, __file__, "--child", name, side, "--n", str(n)]
        command += ["--threads", str(torch.get_num_threads())]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[side] = int(done.stdout.split()[-1])
    return found


KERNELS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::mkldnn_convolution", "aten::convolution"),
    "attention": ("aten::_scaled_dot_product",),
}
"""Beginnings of the names of kernels."""


def kernels(run: Callable[[], Any]) -> dict[str, float]:
    """Shares of the time of a run, by kinds of kernels; what was done before is not done in it."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    taken = dict.fromkeys((*KERNELS, "everything else"), 0.0)
    for event in seen.key_averages():
        kind = next((kind for kind, names in KERNELS.items() if event.key.startswith(names)), "everything else")
        taken[kind] += event.self_cpu_time_total
    return {kind: value / sum(taken.values()) for kind, value in taken.items()}


def profiled(name: str, directory: str) -> dict[str, dict[str, float]]:
    """Where the engine's time goes, in an iteration and in a stretch of a curve."""
    replay, steps = MODELS[name](directory)
    engine, mask = Engine(replay, steps), torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    n = RECIPE_N if name == "demo" else 1

    def curve() -> None:
        with torch.no_grad(), replay.shortcuts.caching():
            replay.log_probs(torch.rand(2 * n, 32, 32).round(), steps=steps)

    return {"iteration": kernels(lambda: engine.iteration(mask, n)), "curves": kernels(curve)}


def ratios(line: dict[str, Any]) -> dict[str, float]:
    """Ours to the recipe's."""
    found: dict[str, float] = {}
    for what, of, side in VARIANTS:
        if side in line.get(of, {}):
            found[what] = line[of][side] / line[of]["recipe"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=4, help="of A and B; the first only warms up")
    parser.add_argument("--n", type=int, default=RECIPE_N, help="of the integrated gradient")
    parser.add_argument("--timed-n", type=int, help="another n for the timing, to keep it short")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--profile", action="store_true", help="of models that have been measured, where the time goes")
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "SIDE"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "engine.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=probe.ProbeWarning)
    if options.child:
        with tempfile.TemporaryDirectory() as directory:
            child(*options.child, options.n, directory)
        return
    results: dict[str, Any] = {}
    if options.out.exists():  # of the models that are not measured now
        results = json.loads(options.out.read_text(encoding="utf-8"))["models"]
    before = os.getloadavg()[0]
    for name in options.models if options.profile else ():
        with tempfile.TemporaryDirectory() as directory:
            results[name]["kernels"] = profiled(name, directory)
            print(name, results[name]["kernels"])
    for name in () if options.profile else options.models:
        with tempfile.TemporaryDirectory() as directory:
            rounds = options.rounds * (3 if name == "demo" else 1)  # which takes a second
            line = measure(name, directory, rounds=rounds, n=options.timed_n or options.n)
        if not options.no_memory:
            line["peak"] = peaks(name, options.n)
        line["ratios"] = ratios(line)
        line["threads"] = options.threads
        results[name if options.threads > 1 else f"{name}, one thread"] = line
        print(f"\n{name}, {options.threads} thread(s): {line['shortcuts']}")
        print(f"  off by {line['log_probs']:.1e} nats, cosine of the gradients {line['gradient_cosine']:.4f}")
        for what, of, side in VARIANTS:
            if what not in line["ratios"]:
                continue
            goal, theirs, ours = GOALS[name].get(what), line[of]["recipe"], line[of][side]
            scale, unit = {"peak": (2**20, "MiB"), "flop": (10**9, "GFLOP")}.get(of, (1, "s"))
            print(
                f"  {what:18s} {theirs / scale:9.2f} {ours / scale:9.2f} {unit:5s}  {line['ratios'][what]:5.2f}"
                + (f"  (goal {goal}{'' if line['ratios'][what] <= goal else ', missed'})" if goal else "")
            )
        line["goals"] = GOALS[name]
        line["load_average"] = [before, os.getloadavg()[0]]
        line["command"] = " ".join(["python tests/benchmarks/bench_engine.py", *sys.argv[1:]])
        write_results(options.out, {"command": "python tests/benchmarks/bench_engine.py", "models": results})
    if options.profile:  # of the run that was measured
        kept = json.loads(options.out.read_text(encoding="utf-8"))
        options.out.write_text(json.dumps({**kept, "models": results}, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
