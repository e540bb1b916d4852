"""The first minute on a CUDA device: every method on tiny models against the CPU, then what only a device shows.

    python tests/benchmarks/gpu_smoke.py                       # on cuda:0
    python tests/benchmarks/gpu_smoke.py --device cpu          # a rehearsal, without what needs a device

Begins with the checks that say most. Prints a line per check and writes JSON after each; no failure stops the others,
and no check is begun after ``--seconds``. Exit code 1 when one failed. Writes ``results/gpu-smoke.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_model import write_results

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny_models

import lvlm_probe as probe
from lvlm_probe import causal
from lvlm_probe.attention.cutting import attention_layers, cut_attention

METHODS: dict[str, dict[str, Any]] = {
    "igos++": {"preset": "fast"}, "gradcam": {}, "tmm": {}, "iia": {}, "attention": {"source": "replay"},
    "relative_attention": {}, "rollout": {}, "tam": {}, "rise": {"masks": 16}, "occlusion": {"size": 4},
    "greedy": {"segments": "grid", "regions": 6}, "integrated_gradients": {"steps": 6}, "input_gradient": {},
}  # fmt: skip
FAMILIES = ("llava", "qwen2_5_vl", "demo", "llava_onevision", "mllama")
LOG_PROBS = 1e-3
"""Most by which log-probabilities of a device may differ from the CPU's in single precision, nats: some thousand
roundings of 6e-8, of logits of about ten."""
MAPS = 0.02
"""Most by which a map in [0, 1] may: of iterative methods roundings add up over their steps."""


class Smoke:
    """Runs checks and keeps what they found.

    Args:
        device: where models are put.
        seconds: no check is begun after as long.
        out: the JSON file.
    """

    def __init__(self, device: torch.device, seconds: float, out: Path, folder: Path) -> None:
        self.device, self.seconds, self.out, self.folder = device, seconds, out, folder
        self.lines: list[dict[str, Any]] = []
        self._started = time.perf_counter()

    @property
    def real(self) -> bool:
        """Whether it is a CUDA device whose driver can be asked."""
        return self.device.type == "cuda" and torch.backends.cuda.is_built()

    @property
    def pretended(self) -> bool:
        """Whether the device is one of ``tests/device``, which compiles nothing and takes no models made meanwhile."""
        return self.device.type == "cuda" and not self.real

    def check(self, name: str, run: Callable[[], Any], right: Callable[[Any], bool] = lambda _: True) -> Any:
        """Run one check: ``ok`` where its value is right, else the value or the error."""
        if time.perf_counter() - self._started > self.seconds:
            self.lines.append({"check": name, "result": "not reached"})
            return None
        began, value = time.perf_counter(), None
        try:
            value = run()
            result = "ok" if right(value) else "wrong"
        except Exception as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "lvlm_probe" in f.filename]
            where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
            result = f"{type(error).__name__}: {str(error)[:300]}{where}"
        shown = value if isinstance(value, bool | int | float | str | list | dict) else None
        self.lines.append({
            "check": name, "result": result, "value": shown, "seconds": round(time.perf_counter() - began, 3),
        })  # fmt: skip
        print(f"{self.lines[-1]['seconds']:7.2f} s  {name:58s} {result}  {'' if shown is None else shown}", flush=True)
        self.write()
        return value

    def write(self) -> None:
        """The JSON file, as far as it has come."""
        name = torch.cuda.get_device_name(self.device) if self.real else str(self.device)
        write_results(self.out, {
            "command": "python tests/benchmarks/gpu_smoke.py", "device": name, "torch": torch.__version__,
            "checks": self.lines,
        })  # fmt: skip

    @property
    def failed(self) -> list[str]:
        """Names of the checks that were not right."""
        return [line["check"] for line in self.lines if line["result"] not in ("ok", "not reached")]


def load(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A tiny model of a family, or the embedded one, on the CPU."""
    model, processor = probe.demo.load() if name == "demo" else tiny_models.build(name)
    return model.to(dtype), processor


def ask(name: str, model: Any, processor: Any) -> Any:
    if name != "demo":
        found = tiny_models.inputs(name, model, processor, [tiny_models.picture()], "What is on the left?")
        return found.to(model.device, model.dtype)
    (scene,) = probe.demo.scenes(1)
    return processor.apply_chat_template(
        scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).to(model.device, model.dtype)


def record(name: str, model: Any, processor: Any, folder: Path, tokens: int = 6, **settings: Any) -> Any:
    """The trace of an answer; ``generate`` in the settings goes to ``generate()``."""
    how = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, **settings.pop("generate", {})}
    with probe.attach(model, processor) as attached, attached.record(folder, **settings) as recording:
        model.generate(**ask(name, model, processor), **how)
    if recording.faults:
        raise RuntimeError("; ".join(recording.faults))
    return recording.traces[-1]


def difference(first: Any, second: Any) -> float:
    return float(np.abs(np.asarray(first, dtype=float) - np.asarray(second, dtype=float)).max())


def family(smoke: Smoke, name: str) -> None:
    """The whole road on one family, against the CPU."""
    truth, processor = load(name)
    model, _ = load(name)
    model.to(smoke.device)
    trace = smoke.check(f"{name}: record", lambda: record(name, model, processor, smoke.folder, points=("hidden",)))
    if trace is None:
        return
    here, there = probe.replay(trace, truth, processor), probe.replay(trace, model, processor)
    smoke.check(
        f"{name}: log P, device − CPU",
        lambda: difference(here.original_log_probs, there.original_log_probs),
        lambda value: value < LOG_PROBS,
    )
    smoke.check(
        f"{name}: recorded − replayed is rounding",
        lambda: probe.verify(trace, model, processor).excess,
        lambda value: value <= 1,
    )
    selection = probe.select_tokens(there, span=(0, 4))
    for method, params in METHODS.items():

        def both(method: str = method, params: dict[str, Any] = params) -> float | str:
            maps, refused = [], []
            for replay in (here, there):
                try:
                    heat = probe.explain(replay, method=method, tokens=selection, strengthen=False, **params)
                    maps.append(heat.values)
                    refused.append(heat.reason)
                except probe.errors.ExplainError as error:  # not for this family: on both, in the same words
                    maps.append(None)
                    refused.append(str(error))
            if maps[0] is None or maps[1] is None:
                return "both refuse" if refused[0] == refused[1] else f"{refused[0]} | {refused[1]}"
            return difference(*maps)

        smoke.check(
            f"{name}: {method}, difference of the maps",
            both,
            lambda value: value == "both refuse" or (isinstance(value, float) and value < MAPS),
        )
    heat = probe.explain(there, method="input_gradient", tokens=selection, strengthen=False)
    smoke.check(
        f"{name}: evaluate, difference of the gain",
        lambda: difference(*(probe.evaluate(heat, replay, steps=8).gain for replay in (here, there))),
        lambda value: value < MAPS,
    )
    with contextlib.suppress(probe.errors.ExplainError):  # cross-attention has no image tokens to cut
        causal.knockout(here, heat, draws=1)
        smoke.check(f"{name}: knockout", lambda: causal.knockout(there, heat, draws=1, sweep=2).drop)
    smoke.check(f"{name}: masked generate", lambda: masked(name, model, processor))


def masked(name: str, model: Any, processor: Any) -> bool:
    with probe.attach(model, processor) as attached, attached.masked(torch.zeros(6, 6)), torch.no_grad():
        return bool(model(**ask(name, model, processor)).logits.isfinite().all())


def caches(smoke: Smoke, model: Any, processor: Any) -> None:
    """Static caches, whose decoding transformers compiles on CUDA, and offloaded ones."""
    plain = record("llava", model, processor, smoke.folder, 12, llr=False)

    def of(kind: str) -> float:
        trace = record("llava", model, processor, smoke.folder, 12, llr=False, generate={"cache_implementation": kind})
        if trace.tokens != plain.tokens:
            raise RuntimeError(f"another answer: {trace.tokens}")
        return difference(trace.log_probs, plain.log_probs)

    if not smoke.pretended:  # decoding is compiled
        smoke.check("static cache: log P, − with a plain one", lambda: of("static"), lambda value: value < LOG_PROBS)
    if smoke.real:
        smoke.check(
            "offloaded cache: log P, − with a plain one", lambda: of("offloaded"), lambda value: value < LOG_PROBS
        )


def fast(replay: Any, selection: Any) -> Any:
    """The map of igos++ in few passes."""
    return probe.explain(replay, preset="fast", tokens=selection, strengthen=False).values


def half(smoke: Smoke, dtype: torch.dtype) -> None:
    """Half precision on the embedded model, which is sure of its words."""
    name = str(dtype).removeprefix("torch.")
    model, processor = load("demo", dtype)
    model.to(smoke.device)
    trace = record("demo", model, processor, smoke.folder)
    truth = probe.replay(trace, load("demo")[0], processor, strict=False)
    replay = probe.replay(trace, model, processor)
    smoke.check(
        f"{name}: recorded − replayed is rounding",
        lambda: probe.verify(trace, model, processor).excess,
        lambda value: value <= 1,
    )
    selection = probe.select_tokens(replay, span=(0, 4))

    def cosine() -> float:
        found = [
            one.score_and_grad(torch.full((1, 8, 8), 0.5, device=one.device), lambda log_probs: log_probs[:, 3])[1]
            for one in (truth, replay)
        ]
        first, second = (gradient.flatten().double().cpu() for gradient in found)
        return float(torch.nn.functional.cosine_similarity(first, second, dim=0))

    smoke.check(f"{name}: gradient, cosine to single precision", cosine, lambda value: value > 0.98)
    smoke.check(
        f"{name}: igos++, correlation of the map to single precision",
        lambda: float(np.corrcoef(*(np.ravel(fast(one, selection)) for one in (truth, replay)))[0, 1]),
        lambda value: value > 0.9,
    )


@contextlib.contextmanager
def counting() -> Iterator[list[int]]:
    """How often the host waits for the device in the block, as the driver's own bookkeeping says."""
    found: list[int] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found.append(sum("synchroniz" in str(item.message) for item in seen))


def waits_of_a_token(smoke: Smoke, model: Any, processor: Any) -> dict[str, float]:
    """Waits that one more token of the answer takes, with recording and without."""
    grown = {}
    for name in ("plain", "recorded"):
        counts = []
        for tokens in (4, 4, 20):  # the first warms up
            with counting() as found:
                if name == "plain":
                    model.generate(
                        **ask("llava", model, processor), min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False
                    )
                else:
                    record("llava", model, processor, smoke.folder, tokens, llr=False, boxes=False)
            counts.append(found[0])
        grown[name] = (counts[2] - counts[1]) / 16
    return grown


def waits_of_an_iteration(replay: Any, selection: Any) -> int:
    """Waits that one more iteration of igos++ takes, of 20 masks."""
    counts = []
    for iterations in (1, 1, 2):
        with counting() as found:
            probe.explain(replay, preset="paper", iterations=iterations, tokens=selection, strengthen=False)
        counts.append(found[0])
    return counts[2] - counts[1]


def little_memory(smoke: Smoke, replay: Any, selection: Any) -> list[Any]:
    """With less and less room on the card: what was changed to go on, or the error's sentence."""
    found: list[Any] = []
    total = torch.cuda.get_device_properties(smoke.device).total_memory
    for room in (400, 120, 60):  # MiB
        gc.collect()
        torch.cuda.empty_cache()
        used = torch.cuda.memory_reserved(smoke.device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, (used + room * 2**20) / total), smoke.device)
        view = replay.with_settings(micro_batch=64)
        try:
            probe.explain(view, method="rise", masks=256, tokens=selection, strengthen=False)
            found.append([room, list(view.limits.recovered)])
        except probe.OutOfMemory as error:
            found.append([room, str(error)[:120]])
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, smoke.device)
    return found


def left_behind(replay: Any, heat: Any) -> int:
    """Bytes that the second and third evaluation leave on the card."""
    used = []
    for _ in range(3):
        probe.evaluate(heat, replay.over("blur"), steps=3)
        gc.collect()
        used.append(torch.cuda.memory_allocated(replay.device))
    return used[2] - used[0]


def device_only(smoke: Smoke) -> None:
    """What only a device shows."""
    model, processor = load("llava")
    model.to(smoke.device)
    trace = record("llava", model, processor, smoke.folder, llr=False)
    replay = probe.replay(trace, model, processor)
    selection = probe.select_tokens(replay, span=(0, 4))
    if smoke.real:
        smoke.check(
            "waits per token, recorded and plain",
            lambda: waits_of_a_token(smoke, model, processor),
            lambda value: value["recorded"] <= value["plain"],
        )
        smoke.check(
            "waits per iteration of igos++", lambda: waits_of_an_iteration(replay, selection), lambda value: value <= 4
        )
    smoke.check("caches", lambda: caches(smoke, model, processor))
    for dtype in () if smoke.pretended else (torch.bfloat16, torch.float16):  # of models that are not there yet
        smoke.check(str(dtype).removeprefix("torch."), lambda dtype=dtype: half(smoke, dtype))

    def cut() -> float:
        gradients = []
        for checkpointing in (False, True):
            other = probe.replay(trace, model, processor, gradient_checkpointing=checkpointing)
            queries = np.arange(other.prompt_length - 1, other.length)
            with cut_attention(other, attention_layers(model, None), queries, trace.layout.image_positions[:8]):
                _, gradient = other.score_and_grad(torch.full((1, 6, 6), 0.5), lambda log_probs: log_probs.sum(dim=1))
            gradients.append(gradient.cpu())
        return float((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max())

    smoke.check("a cut where layers run again: gradient off by", cut, lambda value: value < 1e-3)
    smoke.check(
        "igos++ twice, difference of the maps",
        lambda: difference(*(fast(replay, selection) for _ in range(2))),
        lambda value: value < MAPS,
    )
    if smoke.real:
        heat = probe.explain(replay, method="input_gradient", tokens=selection, strengthen=False)
        smoke.check("bytes left behind by evaluate", lambda: left_behind(replay, heat), lambda value: value == 0)
        smoke.check("little memory: what was changed", lambda: little_memory(smoke, replay, selection))
        planned = probe.plan(replay, method="igos++", preset="fast")

        def taken() -> float:
            gc.collect()
            before = torch.cuda.memory_allocated(smoke.device)
            torch.cuda.reset_peak_memory_stats(smoke.device)
            probe.explain(replay, preset="fast", tokens=selection, strengthen=False, plan=planned)
            return planned.peak / (torch.cuda.max_memory_allocated(smoke.device) - before)

        smoke.check("planned peak / measured peak, igos++", taken, lambda value: 0.8 < value < 1.3)


def main(arguments: list[str] | None = None) -> int:
    """Run what fits into the time; 1 where a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda:0"))
    parser.add_argument("--seconds", type=float, default=75.0, help="begin nothing new after this long")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu-smoke.json")
    options = parser.parse_args(arguments)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --device cpu rehearses")
    torch.backends.cudnn.allow_tf32 = False  # ten bits of a number are not what is compared
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        smoke = Smoke(options.device, options.seconds, options.out, Path(folder))
        first, *others = options.families
        smoke.check(f"{first}: all", lambda: family(smoke, first))
        smoke.check("the device", lambda: device_only(smoke))
        for name in others:
            smoke.check(f"{name}: all", lambda name=name: family(smoke, name))
    reached = [line for line in smoke.lines if line["result"] != "not reached"]
    print(f"{len(reached)} checks, {len(smoke.failed)} failed, {len(smoke.lines) - len(reached)} not reached")
    return int(bool(smoke.failed))


if __name__ == "__main__":
    raise SystemExit(main())
