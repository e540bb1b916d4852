"""What recording costs: generate() with and without a probe, in one run, call by call in turn.

    python tests/benchmarks/bench_recording.py                    # some 8 minutes in one thread
    python tests/benchmarks/bench_recording.py --small            # a tiny model: that everything runs

A random LLaVA (ViT-B/16 at 224 pixels, a decoder of 12 × 768, 32,000 words, 196 image tokens; float32) answers the same
prompt of some thirty words with 100 tokens again and again: plainly, and under each kind of recording, in turn.
The overhead of a kind is the median over rounds of its time relative to the plain call of the same round, everything
included: hooks, attention rows, the file on disk. Kept apart, because they are not paid for every answer:

* the baseline pass behind the log-likelihood ratios (``llr=True``), which ``llr=False`` leaves for later;
* the fingerprint of the weights, once per recording;
* the places of image tokens, once per picture size.

Seconds are those of the CPU in one thread, which other jobs on the machine disturb least; those of the clock stand
beside them. As even they differ by some per cent from call to call on a busy machine, the time inside the probe's own
code is taken as well, part by part. Writes ``results/recording.json``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from random_model import MID_SIZE, SMALL, random_llava, write_results

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny_models

import lvlm_probe as probe
from lvlm_probe import session
from lvlm_probe.attention import RowTap
from lvlm_probe.logprobs import StepLogProbs
from lvlm_probe.recorder import GenerationRecorder

PLAIN = "plain"
KINDS: dict[str, dict[str, Any]] = {
    "without attention": {"llr": False, "attention": False},
    "with attention": {"llr": False, "attention": True},
    "with attention and LLR": {"llr": True, "attention": True},
}
GOALS = {"without attention": 0.02, "with attention": 0.05}
"""Highest overhead, relative to the plain call."""
QUESTION = "What is in the picture? Describe the colour and shape of the two on the left."


def build(small: bool) -> tuple[Any, Any, int]:
    """The model, its processor, and the pictures' edge in pixels."""
    if small:
        return *random_llava(4, patch=16, tower=SMALL, decoder={**SMALL, "vocab_size": 32000}), 64
    return *random_llava(14, patch=16, tower=MID_SIZE, decoder={**MID_SIZE, "vocab_size": 32000}), 224


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of ``run()``: of the CPU, of the clock."""
    clock, cpu = time.perf_counter(), time.process_time()
    run()
    return time.process_time() - cpu, time.perf_counter() - clock


PARTS: tuple[tuple[str, Any, str], ...] = (
    ("log-probabilities", StepLogProbs, "__call__"),
    ("attention rows, in the pass", RowTap, "observe"),
    ("attention rows, at the end", RowTap, "collect"),
    ("before generate()", GenerationRecorder, "begin"),
    ("after generate()", GenerationRecorder, "finish"),
    ("writing the file", session, "write"),
)
PER_TOKEN = [name for name, _, _ in PARTS[:2]]


@contextmanager
def watched(seconds: dict[str, float]) -> Iterator[None]:
    """Adds up CPU seconds in the probe's own functions."""

    def timing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.process_time() - started

        return timed_call

    with ExitStack() as stack:
        for name, owner, attribute in PARTS:
            stack.enter_context(mock.patch.object(owner, attribute, timing(name, getattr(owner, attribute))))
        yield
    # finish() calls collect()
    seconds["after generate()"] -= seconds["attention rows, at the end"]


def measure(model: Any, processor: Any, edge: int, *, rounds: int, tokens: int, directory: Path) -> dict[str, Any]:
    """Seconds ``[cpu, clock]`` per call for every kind, in rounds; what is paid once; and the sizes of the files."""
    picture = tiny_models.picture(edge, edge)
    kinds = list(KINDS)
    places: dict[Any, Any] = {}
    once: dict[str, float] = {}

    def inputs() -> Any:
        return tiny_models.inputs("llava", model, processor, [picture], QUESTION)

    def generate(given: Any) -> None:
        model.generate(**given, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)

    def recorded(kind: str) -> tuple[float, float]:
        with probe.attach(model, processor) as attached:
            attachment = attached._attachment
            given = inputs()
            with attached.record(directory / kind.replace(" ", "-"), **KINDS[kind]):
                described = timed(attachment.describe_model)
                once.setdefault("fingerprint", described[0])
                attachment.boxes.update(places)
                taken = timed(lambda: generate(given))
                places.update(attachment.boxes)
                return taken

    bare = inputs()
    generate(bare)
    first = {kind: recorded(kind) for kind in kinds}  # also finds the places of image tokens
    again = recorded("with attention")
    once["places of image tokens"] = max(0.0, first["with attention"][0] - again[0])
    seconds: dict[str, list[tuple[float, float]]] = {PLAIN: [], **{kind: [] for kind in kinds}}
    for number in range(rounds):
        for kind in seconds:
            seconds[kind].append(timed(lambda: generate(bare)) if kind == PLAIN else recorded(kind))
        print(f"\rround {number + 1}/{rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    samples: list[dict[str, float]] = []
    for _ in range(max(1, rounds // 3)):
        samples.append({})
        with watched(samples[-1]):
            recorded("with attention")
    inside = {name: statistics.median(sample[name] for sample in samples) for name, _, _ in PARTS}
    size: dict[str, dict[str, float]] = {}
    for kind in kinds:
        traces = list(probe.open_store(directory / kind.replace(" ", "-")))
        rows = 0 if traces[-1].attention is None else _attention_bytes(traces[-1])
        size[kind] = {
            "file_bytes": statistics.median(trace.path.stat().st_size for trace in traces),
            "attention_bytes_per_token": rows / tokens,
        }
    prompt, images = traces[-1].header.prompt_tokens, traces[-1].header.image_tokens
    return {
        "image_tokens": images, "text_tokens": prompt - images, "seconds": seconds, "once": once, "size": size,
        "inside": {"seconds": inside, "per_token": PER_TOKEN},
    }  # fmt: skip


def _attention_bytes(trace: probe.Trace) -> int:
    attention = trace.attention
    assert attention is not None and attention.text_mass is not None
    return attention.values.size * 2 + attention.text_mass.size * 4  # rows in half precision, the rest in single


def overheads(seconds: dict[str, list[tuple[float, float]]], tokens: int) -> dict[str, dict[str, Any]]:
    """Of every kind: time relative to the plain call of the same round, median and quartiles; added µs per token."""
    plain = seconds[PLAIN]
    found: dict[str, dict[str, Any]] = {}
    for kind in (kind for kind in seconds if kind != PLAIN):
        line: dict[str, Any] = {}
        for number, clock in enumerate(("cpu", "clock")):
            pairs = [(mine[number], base[number]) for mine, base in zip(seconds[kind], plain, strict=True)]
            ratios = [mine / base - 1 for mine, base in pairs]
            quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
            added = statistics.median(mine - base for mine, base in pairs)
            line[clock] = {
                "overhead": statistics.median(ratios), "quartiles": [quartiles[0], quartiles[2]],
                "added_us_per_token": 1e6 * added / tokens,
            }  # fmt: skip
        found[kind] = line
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--small", action="store_true", help="a tiny model: figures mean nothing, but everything runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "recording.json")
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=probe.ProbeWarning)
    model, processor, edge = build(options.small)
    before = os.getloadavg()[0]
    directory = Path(tempfile.mkdtemp())
    try:
        found = measure(model, processor, edge, rounds=options.rounds, tokens=options.tokens, directory=directory)
    finally:
        shutil.rmtree(directory)
    lines = overheads(found["seconds"], options.tokens)
    weights = sum(parameter.numel() for parameter in model.parameters())
    base = statistics.median(cpu for cpu, _ in found["seconds"][PLAIN])
    write_results(options.out, {
        "command": shlex.join(["python", "tests/benchmarks/bench_recording.py", *given]),
        "small": options.small, "weights": weights, "tokens": options.tokens, "rounds": options.rounds,
        "load_average": [before, os.getloadavg()[0]], "plain_cpu_seconds": base, "goals": GOALS, "overheads": lines,
        **found,
    })  # fmt: skip
    print(
        f"{weights / 1e6:.0f} M weights, {found['image_tokens']} image tokens, {found['text_tokens']} others, "
        f"{options.tokens} answer tokens, {options.rounds} rounds; plain generate(): {base:.2f} s"
    )
    for kind, line in lines.items():
        cpu, clock, size = line["cpu"], line["clock"], found["size"][kind]
        low, high = cpu["quartiles"]
        goal = f"  goal {GOALS[kind]:.0%}" if kind in GOALS else ""
        print(
            f"{kind:24s} {cpu['overhead']:+6.1%}  (quartiles {low:+.1%} to {high:+.1%}; clock {clock['overhead']:+.1%})"
            f"  {cpu['added_us_per_token']:6.0f} us per token  file {size['file_bytes'] / 1024:.0f} KiB, attention "
            f"{size['attention_bytes_per_token'] / 1024:.1f} KiB per token{goal}"
        )
    for part, taken in found["inside"]["seconds"].items():
        print(f"inside: {part:30s} {taken / base:6.2%}  {1e6 * taken / options.tokens:6.0f} us per token")
    print(f"inside: {'all of it':30s} {sum(found['inside']['seconds'].values()) / base:6.2%}")
    for what, taken in found["once"].items():
        print(f"once: {what} {taken:.2f} s")


if __name__ == "__main__":
    main()
