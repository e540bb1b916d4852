"""What recording costs: generate() with and without a probe, in one run, token by token in turn.

    python tests/benchmarks/bench_recording.py                    # some 12 minutes in one thread
    python tests/benchmarks/bench_recording.py --small            # a tiny model: that everything runs

A random LLaVA (ViT-B/16 at 224 pixels, a decoder of 12 × 768, 32,000 words, 196 image tokens; float32) answers the same
prompt of some thirty words with 100 tokens again and again: two copies of it side by side, one plainly and one under a
kind of recording, on the same core, a token of the one and a token of the other. Whole calls one after the other would
differ by five per cent either way, as the speed of a machine drifts over seconds; over a token it does not. The copies
differ as well, by where they lie in memory: they change places from round to round, and two rounds make one figure, the
geometric mean of their ratios. What is left of the noise shows where both copies answer plainly.

The overhead of a kind is the median of those figures, everything included: hooks, attention rows, the file on disk.
Kept apart, because they are not paid for every answer:

* the baseline pass behind the log-likelihood ratios (``llr=True``), which ``llr=False`` leaves for later;
* the fingerprint of the weights, once per recording;
* the places of image tokens, once per picture size.

Seconds are those of the processor, one thread each; those of the clock, while it is a copy's turn, stand beside them.
The time inside the probe's own code is taken as well, part by part. Writes ``results/recording.json``.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from random_model import MID_SIZE, SMALL, random_llava, write_results

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny_models

import lvlm_probe as probe
from lvlm_probe.attention import RowTap
from lvlm_probe.recording import probe as session
from lvlm_probe.recording.log_probs import StepLogProbs
from lvlm_probe.recording.recorder import GenerationRecorder

PLAIN, RECORDED = "plain", "recorded"
NOTHING = "nothing"
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


@contextmanager
def one_core() -> Iterator[None]:
    """All threads on the same core, where the system can do that."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


class Turns:
    """Two threads, one at a time: each works until it hands over."""

    def __init__(self) -> None:
        self._ready = threading.Barrier(2)
        self._mine = threading.Semaphore(1), threading.Semaphore(0)
        self._gone = [False, False]
        self._since = 0.0
        self.clock = [0.0, 0.0]
        """Seconds that each has had the turn."""

    def start(self, who: int) -> None:
        """Waits until both are here, and for the first turn."""
        self._ready.wait(timeout=600)
        self._take(who)

    def over(self, who: int) -> None:
        """The other one's turn, if it has not left."""
        if not self._gone[1 - who]:
            self._give(who)
            self._take(who)

    def leave(self, who: int) -> None:
        """All turns are the other one's from here on."""
        self._gone[who] = True
        self._give(who)

    def _take(self, who: int) -> None:
        self._mine[who].acquire()
        self._since = time.perf_counter()

    def _give(self, who: int) -> None:
        self.clock[who] += time.perf_counter() - self._since
        self._mine[1 - who].release()


class AfterEachToken(transformers.StoppingCriteria):
    """Hands over after each token, and never stops."""

    def __init__(self, turns: Turns, who: int) -> None:
        self.turns, self.who = turns, who

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.turns.over(self.who)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def in_turn(*sides: Callable[[Callable[[Callable[..., Any]], None]], None]) -> list[tuple[float, float]]:
    """Seconds ``(cpu, clock)`` of what each of two sides times, a token each in turn.

    A side is given a function, which it calls once, when all is prepared, with a function of generate()'s further
    arguments.
    """
    turns = Turns()
    cpu = [0.0, 0.0]

    def run(who: int) -> None:
        torch.set_num_threads(1)  # holds for the thread that says it

        def timed(generate: Callable[..., Any]) -> None:
            turns.start(who)
            started = time.thread_time()
            try:
                generate(stopping_criteria=[AfterEachToken(turns, who)])
            finally:
                cpu[who] = time.thread_time() - started
                turns.leave(who)

        sides[who](timed)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(run, who) for who in range(2)]:
            future.result()
    return list(zip(cpu, turns.clock, strict=True))


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
            started = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.thread_time() - started

        return timed_call

    with ExitStack() as stack:
        for name, owner, attribute in PARTS:
            stack.enter_context(mock.patch.object(owner, attribute, timing(name, getattr(owner, attribute))))
        yield
    # finish() calls collect()
    seconds["after generate()"] -= seconds["attention rows, at the end"]


def measure(model: Any, processor: Any, edge: int, *, rounds: int, tokens: int, directory: Path) -> dict[str, Any]:
    """Seconds ``[cpu, clock]`` of every kind and its plain partner, in rounds; what is paid once; file sizes."""
    picture = tiny_models.picture(edge, edge)
    kinds = list(KINDS)
    copies = model, copy.deepcopy(model)
    places: dict[Any, Any] = {}
    once: dict[str, float] = {}

    def inputs(of: Any) -> Any:
        return tiny_models.inputs("llava", of, processor, [picture], QUESTION)

    def generate(of: Any, given: Any, **more: Any) -> None:
        of.generate(**given, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, **more)

    def recorded(kind: str, of: Any, timed: Callable[[Callable[..., Any]], None]) -> None:
        with probe.attach(of, processor) as attached:
            attachment = attached._attachment
            given = inputs(of)
            with attached.record(directory / kind.replace(" ", "-"), **KINDS[kind]):
                started = time.thread_time()
                attachment.describe_model()
                once.setdefault("fingerprint", time.thread_time() - started)
                attachment.boxes.update(places)
                timed(lambda **more: generate(of, given, **more))
                places.update(attachment.boxes)

    def alone(kind: str) -> float:
        taken = 0.0

        def timed(run: Callable[..., Any]) -> None:
            nonlocal taken
            started = time.thread_time()
            run()
            taken = time.thread_time() - started

        recorded(kind, model, timed)
        return taken

    bare = [inputs(each) for each in copies]
    for each, given in zip(copies, bare, strict=True):
        generate(each, given)
    first = alone("with attention")  # also finds the places of image tokens
    once["places of image tokens"] = max(0.0, first - alone("with attention"))
    seconds: dict[str, list[dict[str, tuple[float, float]]]] = {kind: [] for kind in (NOTHING, *kinds)}
    for number in range(rounds):
        for kind in seconds:
            plain = number % 2  # this copy answers plainly, and the first token is always the first one's
            sides: list[Any] = [
                lambda timed, who=who: timed(lambda **more: generate(copies[who], bare[who], **more)) for who in (0, 1)
            ]
            if kind != NOTHING:
                sides[1 - plain] = lambda timed, who=1 - plain, kind=kind: recorded(kind, copies[who], timed)
            taken = in_turn(*sides)
            seconds[kind].append({PLAIN: taken[plain], RECORDED: taken[1 - plain]})
        print(f"\rround {number + 1}/{rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    samples: list[dict[str, float]] = []
    for _ in range(max(1, rounds // 3)):
        samples.append({})
        with watched(samples[-1]):
            alone("with attention")
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


def overheads(seconds: dict[str, list[dict[str, tuple[float, float]]]], tokens: int) -> dict[str, dict[str, Any]]:
    """Of every kind: time relative to that of the plain partner, median and quartiles over pairs of rounds in which the
    copies have changed places; added µs per token."""
    found: dict[str, dict[str, Any]] = {}
    for kind, rounds in seconds.items():
        line: dict[str, Any] = {}
        for number, clock in enumerate(("cpu", "clock")):
            ratios = [one[RECORDED][number] / one[PLAIN][number] for one in rounds]
            pairs = [math.sqrt(a * b) - 1 for a, b in zip(ratios[::2], ratios[1::2], strict=True)]
            quartiles = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else [pairs[0]] * 3
            base = statistics.median(one[PLAIN][number] for one in rounds)
            line[clock] = {
                "overhead": statistics.median(pairs), "quartiles": [quartiles[0], quartiles[2]],
                "added_us_per_token": 1e6 * base * statistics.median(pairs) / tokens,
            }  # fmt: skip
        found[kind] = line
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=10, help="an even number")
    parser.add_argument("--small", action="store_true", help="a tiny model: figures mean nothing, but everything runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "recording.json")
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    if options.rounds % 2 or options.rounds < 2:
        parser.error("--rounds is an even number: the copies change places in every other one")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=probe.ProbeWarning)
    model, processor, edge = build(options.small)
    before = os.getloadavg()[0]
    directory = Path(tempfile.mkdtemp())
    try:
        with one_core():
            found = measure(model, processor, edge, rounds=options.rounds, tokens=options.tokens, directory=directory)
    finally:
        shutil.rmtree(directory)
    lines = overheads(found["seconds"], options.tokens)
    weights = sum(parameter.numel() for parameter in model.parameters())
    base = statistics.median(one[PLAIN][0] for rounds in found["seconds"].values() for one in rounds)
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
        cpu, clock = line["cpu"], line["clock"]
        low, high = cpu["quartiles"]
        goal = f"  goal {GOALS[kind]:.0%}" if kind in GOALS else ""
        written = ""
        if size := found["size"].get(kind):
            written = f"  file {size['file_bytes'] / 1024:.0f} KiB, attention "
            written += f"{size['attention_bytes_per_token'] / 1024:.1f} KiB per token"
        print(
            f"{kind:24s} {cpu['overhead']:+6.1%}  (quartiles {low:+.1%} to {high:+.1%}; clock {clock['overhead']:+.1%})"
            f"  {cpu['added_us_per_token']:6.0f} us per token{written}{goal}"
        )
    for part, taken in found["inside"]["seconds"].items():
        print(f"inside: {part:30s} {taken / base:6.2%}  {1e6 * taken / options.tokens:6.0f} us per token")
    print(f"inside: {'all of it':30s} {sum(found['inside']['seconds'].values()) / base:6.2%}")
    for what, taken in found["once"].items():
        print(f"once: {what} {taken:.2f} s")


if __name__ == "__main__":
    main()
