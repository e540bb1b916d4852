"""Many threads on one model: everything this package does, at once, and each result compared with the quiet one.

``run(calls, threads, seed)`` is small in the tests and long in ``make campaign``. Every thread goes through a list of
calls of its own; all threads enter each round together, so that calls of every kind meet.
"""

from __future__ import annotations

import collections
import random
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import torch
from PIL import Image

import lvlm_probe as probe
from lvlm_probe.attention.dispatch import is_view
from lvlm_probe.metrics import CurveRule

__all__ = ["METHODS", "Counts", "Subject", "left_behind", "run", "subjects"]

METHODS: dict[str, dict[str, Any]] = {
    "attention": {}, "center": {}, "gradcam": {}, "greedy": {"segments": "grid", "regions": 6},
    "igos+": {"iterations": 2}, "igos++": {"iterations": 2}, "iia": {"points": 3}, "input_gradient": {},
    "integrated_gradients": {"steps": 2}, "occlusion": {"size": (4, 5)}, "random": {}, "relative_attention": {},
    "rise": {"masks": 8}, "rollout": {}, "tam": {}, "tmm": {},
}  # fmt: skip
"""Every method, with parameters that make it short."""

GENERATION = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@dataclass
class Counts:
    """What came of the calls.

    Attributes:
        calls: how many there were.
        changed: calls whose result is not the quiet one, bit for bit.
        lost: calls that raised, or were to become traces and did not.
        mixed: traces that hold another call's picture, answer or numbers.
        words: what was wrong, and how often.
    """

    calls: int = 0
    changed: int = 0
    lost: int = 0
    mixed: int = 0
    words: collections.Counter[str] = field(default_factory=collections.Counter)


@dataclass
class Subject:
    """A model with prompts, and what it says and how that is explained where nothing else runs."""

    model: Any
    processor: Any
    prompts: list[Callable[[], Any]]
    pictures: list[Image.Image]
    question: str | None = None
    answers: list[Any] = field(default_factory=list)
    masked: list[Any] = field(default_factory=list)
    traces: list[Any] = field(default_factory=list)
    maps: dict[tuple[int, str], Any] = field(default_factory=dict)
    scores: dict[int, tuple[float, float]] = field(default_factory=dict)
    replays: list[Any] = field(default_factory=list)
    mask: torch.Tensor = field(default_factory=lambda: torch.linspace(0, 1, 12).reshape(3, 4))

    def generate(self, index: int) -> Any:
        return self.model.generate(**self.prompts[index](), **GENERATION)

    def explain(self, index: int, method: str, replay: Any = None) -> Any:
        given = self.replay(index) if replay is None else replay
        params = dict(METHODS[method])
        if method == "relative_attention":
            params["question"] = self.question
        return probe.explain(given, method=method, tokens=(0, 2), strengthen=False, **params)

    def evaluate(self, index: int, replay: Any = None) -> tuple[float, float]:
        given = self.replay(index) if replay is None else replay
        score = probe.evaluate(self.quiet_map(index, "gradcam"), given, steps=3, curve=CurveRule(tie_orders=1))
        return score.deletion, score.insertion

    def replay(self, index: int) -> Any:
        return probe.replay(self.traces[index], self.model, self.processor)

    def quiet_map(self, index: int, method: str) -> Any:
        if (index, method) not in self.maps:
            self.maps[index, method] = self.explain(index, method)
        return self.maps[index, method]

    def quiet_score(self, index: int) -> tuple[float, float]:
        if index not in self.scores:
            self.scores[index] = self.evaluate(index)
        return self.scores[index]

    def quieten(self, folder: Path) -> None:
        """Find out what calls are compared with; maps and scores as they are asked for."""
        self.answers = [self.generate(index) for index in range(len(self.prompts))]
        with probe.attach(self.model, self.processor) as attached:
            with attached.record(folder) as recording:
                for index in range(len(self.prompts)):
                    self.generate(index)
            self.traces = recording.traces
            with attached.masked(self.mask):
                self.masked = [self.generate(index) for index in range(len(self.prompts))]
        self.replays = [self.replay(index) for index in range(len(self.prompts))]


def subjects(folder: Path, *, prompts: int = 2) -> list[Subject]:
    """The demo model, and a tiny Qwen2-VL, which keeps ``rope_deltas`` from one call to the next."""
    model, processor = probe.demo.load()
    scenes = probe.demo.scenes(prompts)

    def demo_prompt(scene: Any) -> Callable[[], Any]:
        return lambda: processor.apply_chat_template(
            scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )

    demo = Subject(model, processor, [demo_prompt(scene) for scene in scenes], [scene.image for scene in scenes])
    qwen, its_processor = tiny_models.build("qwen2_vl")
    sizes = [(90, 60), (60, 90), (75, 75)]
    pictures = [tiny_models.picture(*sizes[index % 3], seed=index) for index in range(prompts)]

    def qwen_prompt(picture: Image.Image) -> Callable[[], Any]:
        return lambda: tiny_models.inputs("qwen2_vl", qwen, its_processor, [picture], "What is it?")

    made = [demo, Subject(qwen, its_processor, [qwen_prompt(picture) for picture in pictures], pictures, "What is it?")]
    for number, subject in enumerate(made):
        subject.quieten(folder / f"quiet{number}")
    return made


def left_behind(model: torch.nn.Module) -> dict[str, Any]:
    """All that a probe or a pass could leave on a model's modules."""
    return {
        path: (
            {name: id(value) for name, value in vars(module).items() if name != "rope_deltas"},
            len(module._forward_hooks), len(module._forward_pre_hooks), len(module._forward_hooks_with_kwargs),
            len(module._forward_pre_hooks_with_kwargs), is_view(vars(module).get("config")),
            [weight.requires_grad for weight in module._parameters.values() if weight is not None],
        )
        for path, module in model.named_modules()
    }  # fmt: skip


def run(calls: int, threads: int, seed: int, *, made: list[Subject] | None = None) -> Counts:
    """Many calls of every kind from many threads, in four phases: no probe, attached, recording, masking. Threads are
    switched a thousand times as often as usual.

    Args:
        calls: how many in all, at least.
        threads: how many threads.
        seed: of what each thread does.
        made: what ``subjects`` gives; by default built here.
    """
    folder = Path(tempfile.mkdtemp())
    usual = sys.getswitchinterval()
    try:
        found = subjects(folder) if made is None else made
        sys.setswitchinterval(usual / 1000)
        before = [left_behind(subject.model) for subject in found]
        counts = Counts()
        rounds = -(-calls // (4 * threads))
        for phase in ("nothing", "attached", "recording", "masked"):
            _phase(phase, found, folder, counts, rounds=rounds, threads=threads, seed=seed)
        for subject, was in zip(found, before, strict=True):
            if left_behind(subject.model) != was:
                counts.changed += 1
                counts.words["the model is not as it was"] += 1
        return counts
    finally:
        sys.setswitchinterval(usual)
        shutil.rmtree(folder)


@dataclass(frozen=True)
class _Call:
    subject: int
    prompt: int
    kind: str
    method: str
    shared: bool
    """On the replay that other threads use too."""


def _calls(found: list[Subject], rounds: int, words: str) -> list[_Call]:
    choice = random.Random(words)
    return [
        _Call(
            number := choice.randrange(len(found)),
            choice.randrange(len(found[number].prompts)),
            choice.choice(["generate", "generate", "explain", "explain", "evaluate"]),
            choice.choice(list(METHODS)),
            choice.random() < 0.5,
        )
        for _ in range(rounds)
    ]


def _phase(
    phase: str, found: list[Subject], folder: Path, counts: Counts, *, rounds: int, threads: int, seed: int
) -> None:
    lock = threading.Lock()
    asked: list[collections.Counter[int]] = [collections.Counter() for _ in found]
    gate = threading.Barrier(threads)
    plans = [_calls(found, rounds, f"{seed} {phase} {own}") for own in range(threads)]
    for call in (call for plan in plans for call in plan):
        if call.kind == "explain":
            found[call.subject].quiet_map(call.prompt, call.method)
        elif call.kind == "evaluate":
            found[call.subject].quiet_score(call.prompt)

    def wrong(kind: str, words: str) -> None:
        with lock:
            setattr(counts, kind, getattr(counts, kind) + 1)
            counts.words[f"{phase}: {words}"] += 1

    def one(call: _Call) -> None:
        subject, index = found[call.subject], call.prompt
        shared = subject.replays[index] if call.shared else None
        if call.kind == "generate":
            with lock:
                asked[call.subject][index] += 1
            answer = subject.generate(index)
            if not _same(answer, (subject.masked if phase == "masked" else subject.answers)[index]):
                wrong("changed", "generate()")
        elif call.kind == "explain":
            heat, quiet = subject.explain(index, call.method, shared), subject.maps[index, call.method]
            # A replay that others use too has measured already what a fresh one measures, and counts that no more.
            ran, most = heat.provenance["passes"], quiet.provenance["passes"]
            if not np.array_equal(heat.values, quiet.values) or any(ran[name] > most[name] for name in ran):
                wrong("changed", f"explain({call.method})")
        elif subject.evaluate(index, shared) != subject.scores[index]:
            wrong("changed", "evaluate()")

    def work(plan: list[_Call]) -> None:
        for call in plan:
            gate.wait()
            try:
                one(call)
            except Exception as error:
                wrong("lost", f"{type(error).__name__}: {error}")

    with ExitStack() as stack:
        recordings = []
        for number, subject in enumerate(found):
            if phase == "nothing":
                continue
            attached = stack.enter_context(probe.attach(subject.model, subject.processor))
            if phase == "recording":
                recordings.append(stack.enter_context(attached.record(folder / f"loud{number}-{seed}")))
            elif phase == "masked":
                stack.enter_context(attached.masked(subject.mask))
        workers = [threading.Thread(target=work, args=(plan,)) for plan in plans]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    counts.calls += rounds * threads
    for number, recording in enumerate(recordings):
        _compare(found[number], recording, asked[number], wrong)


def _compare(
    subject: Subject, recording: Any, asked: collections.Counter[int], wrong: Callable[[str, str], None]
) -> None:
    """Each call has become one trace, which is the one that the same call makes where nothing else runs."""
    heard: collections.Counter[int] = collections.Counter()
    for trace in recording.traces:
        index = next((k for k, quiet in enumerate(subject.traces) if _pixels(trace) == _pixels(quiet)), None)
        if index is None:
            wrong("mixed", f"a picture of no call: {trace.notes}")
            continue
        heard[index] += 1
        quiet = subject.traces[index]
        for name in ("token_ids", "input_ids", "log_probs", "baseline_log_probs"):
            if not np.array_equal(getattr(trace, name), getattr(quiet, name)):
                wrong("mixed", f"{name} of another call")
        if trace.status != quiet.status or list(trace.notes) != list(quiet.notes):
            wrong("mixed", f"{trace.status} {trace.notes}")
    for index in range(len(subject.prompts)):
        for _ in range(abs(asked[index] - heard[index])):
            wrong("lost", "a generate() without its trace")


def _pixels(trace: Any) -> list[bytes]:
    return [image.tobytes() for image in trace.images]


def _same(one: Any, other: Any) -> bool:
    pairs = zip(one.logits, other.logits, strict=False)
    return torch.equal(one.sequences, other.sequences) and all(torch.equal(a, b) for a, b in pairs)
