"""Many callers of one model at once: every call gives what it gives when it is alone, and every one is recorded.

Eight threads draw their calls from the seed. Five kinds of round, one after the other: *beside* (generate() beside
explain(), evaluate() and verify(), nothing attached), *recorded* (the same inside ``p.record()``), *tasks* (the same
with ``asyncio.to_thread``), *masked* (inside ``p.masked()``: every generate() masked, no explanation touched) and
*detached* (``detach()`` while they run). Outputs are compared bit for bit with those of the quiet model.

A model that keeps state of a running generate() on itself (Qwen2-VL's ``rope_deltas``) cannot run two at once without
us either; its callers take turns, as its server would, and all else runs beside them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

import lvlm_probe as probe
from campaigns.stage import METHODS, SPAN, Stage, differences, picture_number, same_output, scratch, stage, state_of
from campaigns.tally import Campaign, Tally

__all__ = ["CAMPAIGNS", "threads"]

THREADS = 8
ROUND = 40
"""Calls in a round."""
MODELS = ("demo", "qwen2_vl")
KINDS = ("beside", "recorded", "tasks", "masked", "detached")


class Round:
    """One round: what is expected of each call, and who has been found wrong."""

    def __init__(self, on: Stage, tally: Tally, expected: list[Any], label: str) -> None:
        self.on, self.tally, self.expected, self.label = on, tally, expected, label
        self.generated: Counter[int] = Counter()
        self.finished = 0
        self._lock = threading.Lock()

    def wrong(self, kind: str, said: str) -> None:
        with self._lock:
            self.tally.breaks(kind, f"{self.label}: {said}")

    def call(self, what: tuple[str, int, str]) -> None:
        """One call of one thread."""
        kind, k, method = what
        try:
            getattr(self, f"_{kind}")(k, method)
        except Exception as error:
            self.wrong(f"{kind} raised", f"{method} {type(error).__name__}: {error}")
        finally:
            with self._lock:
                self.tally.tried += 1
                self.tally.counts[kind] += 1
                self.finished += 1

    def _generate(self, k: int, _: str) -> None:
        inputs = self.on.prepare(k)
        with self.on.turns or contextlib.nullcontext():
            output = self.on.generate(k, inputs)
        with self._lock:
            self.generated[k] += 1
        if not same_output(output, self.expected[k]):
            self.wrong("generate() changed", f"question {k}: {output.sequences[0].tolist()[-8:]}")

    def _explain(self, k: int, method: str) -> None:
        heat = probe.explain(self.on.replay(k), method=method, tokens=SPAN, **METHODS[method])
        quiet = self.on.quiet_map(k, method)[0]
        if heat.values is None or quiet.values is None:
            if (heat.values is None) != (quiet.values is None):
                self.wrong("explain() changed", f"{method} of question {k}: {heat.reason} against {quiet.reason}")
        elif not np.array_equal(heat.values, quiet.values):
            gap = np.abs(heat.values - quiet.values).max()
            self.tally.reaches("largest difference of a map", float(gap))
            self.wrong("explain() changed", f"{method} of question {k}, by {gap:.3g} of 1")

    def _evaluate(self, k: int, method: str) -> None:
        heat, quiet = self.on.quiet_map(k, method)
        score = probe.evaluate(heat, self.on.replay(k), steps=8)
        if (score.deletion, score.insertion) != (quiet.deletion, quiet.insertion):
            self.wrong("evaluate() changed", f"{method} of question {k}: {score.deletion} against {quiet.deletion}")

    def _verify(self, k: int, _: str) -> None:
        found = self.on.replay(k).original_log_probs
        if not torch.equal(found, self.on.log_probs[k]):
            self.wrong("replay changed", f"question {k}, by {float((found - self.on.log_probs[k]).abs().max()):.3g}")

    def check_traces(self, traces: list[Any], *, all_of: bool) -> None:
        """Every generate() has a trace with its own picture, answer and scores."""
        found: Counter[int] = Counter()
        for trace in traces:
            try:
                k = picture_number(self.on.pictures, trace.image)
            except probe.ProbeError as error:
                self.wrong("a trace without its picture", f"{error} {list(trace.notes)}")
                continue
            if k is None:
                self.wrong("mixed: a trace with another picture", trace.trace_id)
                continue
            found[k] += 1
            quiet = self.on.traces[k]
            if trace.status != "complete":
                self.wrong("a trace is incomplete", f"{trace.status}: {trace.error} {list(trace.notes)}")
            elif not np.array_equal(trace.token_ids, quiet.token_ids) or trace.prompt != quiet.prompt:
                self.wrong("mixed: a trace with another answer", f"question {k}: {trace.answer!r}")
            elif not np.array_equal(trace.log_probs, quiet.log_probs):
                self.wrong("recorded log-probabilities changed", f"question {k}")
            elif trace.llr is None or not np.array_equal(trace.llr, quiet.llr):
                self.wrong("recorded log-likelihood ratios changed", f"question {k}: {list(trace.notes)}")
            elif (trace.attention is None) or not np.array_equal(trace.attention.values, quiet.attention.values):
                self.wrong("recorded attention changed or missing", f"question {k}: {list(trace.notes)}")
        lost = self.generated - found
        if all_of and lost:
            for _ in range(lost.total()):
                self.wrong("lost: a generate() without a trace", f"{found.total()} of {self.generated.total()}")
        self.tally.counts["traces"] += len(traces)


def calls_of(rng: random.Random, questions: int) -> list[tuple[str, int, str]]:
    """The calls of a round: half of them the user's own generate()."""
    found = []
    for _ in range(ROUND):
        kind = rng.choice(["generate", "generate", "generate", "generate", "explain", "explain", "evaluate", "verify"])
        found.append((kind, rng.randrange(questions), rng.choice(list(METHODS))))
    return found


def in_threads(work: Callable[[Any], None], calls: list[Any]) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, calls))


def in_tasks(work: Callable[[Any], None], calls: list[Any]) -> None:
    async def run() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))
        await asyncio.gather(*(asyncio.to_thread(work, call) for call in calls))

    asyncio.run(run())


@contextlib.contextmanager
def measured(on: Stage, current: Callable[[], Round]) -> Iterator[None]:
    before = state_of(on.model, on.processor)
    yield
    if changed := differences(before, state_of(on.model, on.processor)):
        current().wrong("the model is not as it was", changed)


def one_round(on: Stage, kind: str, calls: list[Any], tally: Tally, label: str, rng: random.Random) -> None:
    folder = scratch("threads")
    here = Round(on, tally, on.plain, label)
    try:
        with measured(on, lambda: here):
            if kind == "beside":
                in_threads(here.call, calls)
            elif kind == "masked":
                mask = torch.ones(8, 8)
                mask[2:6, 2:6] = 0
                with probe.attach(on.model, on.processor) as p, p.masked(mask):
                    here.expected = [on.generate(k) for k in range(len(on.pictures))]
                    in_threads(here.call, calls)
            elif kind == "detached":
                stop = rng.randrange(2, max(3, len(calls) // 2))
                p = probe.attach(on.model, on.processor)
                done = threading.Semaphore(0)

                def counted(call: Any) -> None:
                    here.call(call)
                    done.release()

                with p.record(folder) as recording:
                    leaver = threading.Thread(target=lambda: ([done.acquire() for _ in range(stop)], p.detach()))
                    leaver.start()
                    in_threads(counted, calls)
                    leaver.join()
                here.check_traces(recording.traces, all_of=False)
            else:
                with probe.attach(on.model, on.processor) as p, p.record(folder) as recording:
                    (in_tasks if kind == "tasks" else in_threads)(here.call, calls)
                here.check_traces(recording.traces, all_of=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


CHUNK = 1_300


def threads(first: int, count: int, seed: int) -> Tally:
    """Make calls number ``first`` to ``first + count``.

    Every second chunk is of ``tests/thread_campaign.py``, whose threads enter every round together, where those of this
    module take their calls as they come.
    """
    return together(first, count, seed) if first // CHUNK % 2 else in_turn(first, count, seed)


def together(first: int, count: int, seed: int) -> Tally:
    """About ``count`` calls by ``thread_campaign``."""
    import thread_campaign

    found = thread_campaign.run(count, THREADS, seed * 1_000_000 + first)
    tally = Tally(tried=found.calls)
    for kind in ("changed", "lost", "mixed"):
        if number := getattr(found, kind):
            tally.broken[f"{kind} (of threads that enter together)"] += number
    tally.keep(f"thread_campaign: {number} × {words}" for words, number in found.words.items())
    return tally


def in_turn(first: int, count: int, seed: int) -> Tally:
    """Calls number ``first`` to ``first + count`` of this module, in rounds."""
    tally = Tally()
    for on in map(stage, MODELS):
        on.log_probs = [on.replay(k).original_log_probs for k in range(len(on.pictures))]
        for k in range(len(on.pictures)):
            for method in METHODS:
                on.quiet_map(k, method)
    for begin in range(first, first + count, ROUND):
        number = begin // ROUND
        rng = random.Random(f"{seed}/{number}")
        on = stage(MODELS[number % len(MODELS)])
        kind = KINDS[number // len(MODELS) % len(KINDS)]
        calls = calls_of(rng, len(on.pictures))[: first + count - begin]
        label = f"{kind}, {on.name}, round {number}"
        one_round(on, kind, calls, tally, label, rng)
        for k, quiet in enumerate(on.plain):
            if not same_output(on.generate(k), quiet):
                tally.breaks("the model is broken for good", f"{label}: question {k}")
    return tally


CAMPAIGNS = (
    Campaign(
        "threads",
        "Calls of many threads on one model, probed or not, give what each gives alone; each is recorded, as itself.",
        "calls",
        10_400,
        CHUNK,
        threads,
        seconds=1800,
    ),
)
