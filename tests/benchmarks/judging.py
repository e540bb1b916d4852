"""What the tournament and the ablations share: lines that survive an interruption, scenes in shards, one way to judge.

One JSON line per scene and entry (a method, a setting). Lines are appended whole, each process has a file of its own,
and of two lines for the same thing the later one counts, so runs can be stopped, resumed and split at will.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from held_out import POINTING_TOLERANCE, Case, cases, machine
from tqdm import tqdm

import lvlm_probe as probe
from lvlm_probe.metrics import (
    CurveRule,
    average_precision,
    bootstrap_ci,
    energy_in_region,
    iou,
    paired_difference,
    permutation_test,
    pointing_game,
)
from lvlm_probe.metrics.verdict import MIN_CONTRAST

GRID = 32
"""Cells a side on which all heatmaps are ranked, whatever their own resolution."""

STEPS = 50
HELD_OUT = ("mean", "noise")
HELD_OUT_STEPS = 32
"""Points on the curves against the replay's own baseline, and against each held-out one. The trapezoid of the
first of n points keeps any gain below about 1 − 1/n, alike for all methods: compare within a column, not across."""

CAUSAL_DRAWS = 2
"""Random orders of image tokens that causal agreement is measured against, the same ones for all methods of a scene."""

TIE_ORDERS = 1
"""Random orders of tied cells: one gives an unbiased area, and means over scenes leave little of its scatter."""

PROTOCOL = {
    "grid": GRID,
    "steps": STEPS,
    "tie_orders": TIE_ORDERS,
    "held_out": HELD_OUT,
    "held_out_steps": HELD_OUT_STEPS,
    "causal_draws": CAUSAL_DRAWS,
}

TOLERANCE = 0.01
"""How far areas may be off with ``--adaptive``: a quarter of the points, for models that take a second for an image."""

Line = dict[str, Any]


class Lines:
    """The lines of a directory, of which this process adds to ``lines-{shard}.jsonl``."""

    def __init__(self, directory: Path, shard: tuple[int, int] = (0, 1)) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.path = directory / f"lines-{shard[0]}of{shard[1]}.jsonl"
        self.latest: dict[tuple[int, str], Line] = {}
        for path in sorted(directory.glob("lines-*.jsonl")):
            for line in _read(path):
                self._keep(line)

    def _keep(self, line: Line) -> None:
        place = line["scene"], line["name"]
        if place not in self.latest or self.latest[place]["time"] <= line["time"]:
            self.latest[place] = line

    def add(self, line: Line) -> None:
        """Appends a line; NaN becomes null."""
        line = {**line, "time": round(time.time(), 3)}
        text = json.dumps(_finite(line), ensure_ascii=False, allow_nan=False)
        cut_off = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if cut_off else "") + text + "\n")
        self._keep(json.loads(text))

    def has(self, scene: int, name: str, key: str) -> bool:
        """Whether the scene has a line of this entry with these very settings."""
        line = self.latest.get((scene, name))
        return line is not None and line["key"] == key

    def of(self, name: str) -> list[Line]:
        """Lines of an entry in order of scenes, those of its latest settings only."""
        mine = [line for (_, other), line in self.latest.items() if other == name]
        key = max(mine, key=lambda line: line["time"])["key"] if mine else ""
        return sorted((line for line in mine if line["key"] == key), key=lambda line: line["scene"])

    def forget(self, names: Sequence[str]) -> None:
        """Forgets the lines of these entries, so that they are made anew; the files keep them."""
        self.latest = {place: line for place, line in self.latest.items() if place[1] not in names}

    def keep_complete(self, names: Sequence[str]) -> int:
        """Forgets scenes that not each of these entries has judged yet, and says how many those were: all are compared
        on one set of scenes."""
        done = [{line["scene"] for line in self.of(name)} for name in names]
        complete = set.intersection(*done) if done else set()
        begun = {scene for scene, _ in self.latest} - complete
        self.latest = {place: line for place, line in self.latest.items() if place[0] in complete}
        return len(begun)

    def names(self) -> list[str]:
        """Entries that have lines, in order of first appearance."""
        return list(dict.fromkeys(line["name"] for line in sorted(self.latest.values(), key=lambda line: line["time"])))


def _read(path: Path) -> Iterator[Line]:
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            yield json.loads(text)
        except json.JSONDecodeError:
            continue  # cut off by an interruption, or being written at this moment


def scene_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """The options that say which scenes, by which model, and where the lines go."""
    parser.add_argument("--scenes", type=int, default=200, help="how many; answered rightly, all kinds of question")
    parser.add_argument("--split", choices=("eval", "tune"), default="eval", help="held out, or kept for tuning")
    parser.add_argument("--hard", action="store_true", help="hard scenes; give --model as well")
    parser.add_argument("--cases", type=Path, help="stored images instead: a folder that photographs.py has written")
    parser.add_argument("--held-out", default=",".join(HELD_OUT), help="baselines that judge too, with commas")
    parser.add_argument(
        "--adaptive",
        nargs="?",
        type=float,
        const=TOLERANCE,
        metavar="SHARE",
        help=f"few points of the curves, areas within this, by default {TOLERANCE}",
    )
    parser.add_argument("--model", type=Path, help="checkpoint that answers; by default the embedded demo model")
    parser.add_argument("--out", type=Path, help=f"by default {out}/easy or {out}/hard, with -tune for that split")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th scene from the I-th on, I from 0")
    parser.add_argument("--threads", type=int, default=1, help="of torch; one per process is best with two shards")
    again_argument(parser)
    parser.add_argument("--table", action="store_true", help="only print the tables, from the lines there are")
    parser.set_defaults(root=Path(out))


def again_argument(parser: argparse.ArgumentParser) -> None:
    """The option that says which lines are made anew, as the library has changed since."""
    parser.add_argument("--again", nargs="*", default=[], metavar="NAME", help="make the lines of these anew")


def settle(arguments: argparse.Namespace) -> None:
    """Fills in what options leave open, and sets the threads."""
    index, _, number = arguments.shard.partition("/")
    arguments.shard = (int(index), int(number or 1))
    if not 0 <= arguments.shard[0] < arguments.shard[1]:
        raise SystemExit(f"--shard I/N has I from 0 to N − 1; got {index}/{number}")
    if arguments.out is None and arguments.cases is not None:
        arguments.out = arguments.root / arguments.cases.name
    if arguments.out is None:
        folder = ("hard" if arguments.hard else "easy") + ("-tune" if arguments.split == "tune" else "")
        arguments.out = arguments.root / folder
    if arguments.model is not None and not arguments.model.is_dir():
        raise SystemExit(f"--model: there is no folder {arguments.model}; the recipes of examples/ write one")
    torch.set_num_threads(arguments.threads)


def judges(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The held-out baselines that judge."""
    return tuple(filter(None, arguments.held_out.split(",")))


def sampling(tolerance: float | None) -> dict[str, Any]:
    """How curves are drawn: ``evaluate``'s own way, or by as few points as leave this much of an area open."""
    return {} if tolerance is None else {"sampling": "adaptive", "tolerance": tolerance}


def curve_rule(tolerance: float | None) -> CurveRule:
    """``sampling``, of one order of tied cells."""
    return CurveRule(tie_orders=TIE_ORDERS, **sampling(tolerance))


def digest(*parts: Any) -> str:
    """A short name for settings: lines with another one are made again."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def weights_digest(model: Path | None) -> str:
    """A short name for the weights that answer."""
    folder = probe.demo.path() if model is None else model
    names = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in names)).hexdigest()[:12]


def numbers_of(text: str, default: int) -> dict[str, int]:
    """Names with commas, some of them with their own number: ``rise, greedy=5``."""
    parts = [part.partition("=") for part in text.split(",") if part]
    return {name.strip(): int(number or default) for name, _, number in parts}


def bar_of(arguments: argparse.Namespace, lines: Lines, keys: Mapping[str, str], wanted: Mapping[str, int]) -> Any:
    """A progress bar over the lines of this shard, from those that there are; ``wanted``: scenes of each entry."""
    shard, shards = arguments.shard
    done = sum(
        lines.has(line["scene"], line["name"], keys.get(line["name"], ""))
        for line in lines.latest.values()
        if line["number"] < arguments.scenes and line["number"] % shards == shard
    )
    total = sum(len(range(shard, scenes, shards)) for scenes in wanted.values())
    return tqdm(total=total, initial=done, unit="map", smoothing=0, mininterval=5)


def scenes_to_do(
    arguments: argparse.Namespace,
    lines: Lines,
    keys: Mapping[str, str],
    *,
    wanted: Mapping[str, int] | None = None,
    deal: Callable[..., Iterator[Any]] | None = None,
) -> Iterator[tuple[Line, Any]]:
    """The scenes of this shard that lack a line, with what every line says about its scene.

    ``wanted`` says on how many scenes each is, where not on all; ``deal`` makes cases as ``held_out.cases`` does, by
    default that. All shards count the same scenes (``number``), so that together they judge exactly what one process
    would.
    """
    shard, shards = arguments.shard
    mine = [number for number in range(arguments.scenes) if number % shards == shard]
    by_number = {line["number"]: line for line in lines.latest.values()}
    complete = {
        number
        for number, line in by_number.items()
        if all(
            lines.has(line["scene"], name, key)
            for name, key in keys.items()
            if number < (wanted or {}).get(name, arguments.scenes)
        )
    }
    remaining = [number for number in mine if number not in complete]
    if not remaining:
        return
    # What lies before the first scene to do need not be answered again, as far as some line tells where that is.
    before = by_number.get(max((known for known in by_number if known < remaining[0]), default=-1))
    number = before["number"] if before else -1
    skipped: Counter[str] = Counter(before["passed_over"]) if before else Counter()
    folder = arguments.out / f"traces-{shard}of{shards}"
    folder.mkdir(parents=True, exist_ok=True)
    deal = deal or partial(cases, hard=arguments.hard, model=arguments.model, images=arguments.cases)
    after = before["scene"] if before else -1
    for case in deal(arguments.split, remaining[-1] - number, folder, skipped=skipped, after=after):
        number += 1
        if number in remaining:
            yield (
                {
                    "scene": case.scene.index,
                    "number": number,
                    "kind": case.scene.kind,
                    "answer": case.scene.answer,
                    "baseline": dict(case.replay.baseline),
                    "passed_over": dict(skipped),
                },
                case,
            )
        for path in folder.glob("*.h5"):  # a store is read through at every scene
            path.unlink()


def judged(
    case: Case,
    heat: probe.Heatmap,
    *,
    held_out: Sequence[str] = HELD_OUT,
    causal: bool = True,
    adaptive: float | None = None,
) -> Line:
    """Everything a heatmap is judged by, NaN where it cannot be said; areas to within ``adaptive``, where it is given.

    ``held_out`` is the mean gain over those held-out baselines that take the words away and are not, by another name,
    the one that the heatmap was made with.
    """
    how: dict[str, Any] = {"grid": GRID, "curve": curve_rule(adaptive), "shared": case.shared}
    score = probe.evaluate(heat, case.replay, baseline=case.replay.baseline, steps=STEPS, **how)
    line: Line = {
        "deletion": score.deletion,
        "insertion": score.insertion,
        "gain": score.gain,
        "ties": score.tie_share,
        "trusted": score.verdict.trusted,
        "reasons": list(score.verdict.reasons),
        "center": score.center_gain,
        **placed(heat, case.scene.mask),
    }
    line |= by_held_out(heat, case, held_out, how)
    if causal:
        try:
            line["causal"] = probe.causal.agreement(replay=case.replay, heat=heat, draws=CAUSAL_DRAWS)
        except probe.ProbeError as error:
            line |= {"causal": math.nan, "not_causal": str(error)}
    return line


def by_held_out(heat: probe.Heatmap, case: Case, kinds: Sequence[str], how: Mapping[str, Any]) -> Line:
    """Scores over baselines that the heatmap was not made with, and their mean gain, ``held_out``."""
    line: Line = {}
    gains = []
    for kind in kinds:
        if kind == "mean" and case.replay.baseline.get("limit"):
            continue
        other = probe.evaluate(heat, case.replay, baseline=kind, steps=HELD_OUT_STEPS, center=False, **how)
        check = other.baseline_check
        if check["original_probability"] - check["mean_probability"] < MIN_CONTRAST:
            continue
        line |= {f"deletion_{kind}": other.deletion, f"insertion_{kind}": other.insertion, f"gain_{kind}": other.gain}
        gains.append(other.gain)
    return {**line, "held_out": float(np.mean(gains)) if gains else math.nan}


def placed(heat: probe.Heatmap, mask: np.ndarray | None) -> Line:
    """Where a heatmap points, nothing where the place is not known."""
    if mask is None:
        return {}
    return {
        "pointing": pointing_game(heat, mask, tolerance=POINTING_TOLERANCE),
        "pointing_strict": pointing_game(heat, mask),
        "energy": energy_in_region(heat, mask),
        "average_precision": average_precision(heat, mask),
        "iou": iou(heat, mask),
    }


def peak_memory(run: Any) -> int:
    """Most bytes of tensors alive at once while ``run()`` works, above those alive before.

    Counted from the allocations that torch's profiler sees: what numpy and other libraries take is left out.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    current = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


# ------------------------------------------------------------------------------------------------------------- figures


def values_of(lines: Iterable[Line], column: str) -> dict[int, float]:
    """A column by scene, without scenes that have no value."""
    return {line["scene"]: float(line[column]) for line in lines if line.get(column) is not None}


def figure(values: Iterable[float]) -> dict[str, Any] | None:
    """Mean with its 95 % bootstrap interval, ``None`` of nothing."""
    data = list(values)
    if not data:
        return None
    interval = bootstrap_ci(data)
    return {"mean": interval.estimate, "low": interval.low, "high": interval.high, "n": interval.n}


def comparison(first: Mapping[int, float], second: Mapping[int, float]) -> dict[str, Any] | None:
    """first − second on the scenes that both have: paired bootstrap interval and two-sided sign-flip p-value."""
    common = sorted(first.keys() & second.keys())
    if not common:
        return None
    left, right = [first[scene] for scene in common], [second[scene] for scene in common]
    interval, test = paired_difference(left, right), permutation_test(left, right)
    return {
        "mean": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "n": interval.n,
        "p": test.p_value,
    }


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values of a family of tests, adjusted by Holm (1979) for their number."""
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return adjusted


def shown(cell: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """A figure as a table shows it."""
    if cell is None:
        return "–"
    form = "{:+.3f}" if signed else "{:.3f}"
    return f"{form} [{form}, {form}]".format(cell["mean"], cell["low"], cell["high"])


def scenes_summary(arguments: argparse.Namespace, lines: Lines) -> dict[str, Any]:
    """Which scenes, which model, which machine."""
    by_scene = {line["scene"]: line for line in lines.latest.values()}
    last = max(by_scene.values(), key=lambda line: line["number"])
    return {
        "scenes": len(by_scene),
        "hard": arguments.hard,
        "split": arguments.split,
        "stored": None if arguments.cases is None else arguments.cases.name,
        "kinds": dict(Counter(line["kind"] for line in by_scene.values())),
        "passed_over": last["passed_over"],
        "model": "embedded demo model" if arguments.model is None else arguments.model.name,
        "weights": weights_digest(arguments.model),
        "protocol": PROTOCOL | {"held_out": judges(arguments)} | sampling(arguments.adaptive),
        "machine": machine(),
        "lvlm_probe": probe.__version__,
    }


def scenes_sentence(summary: Mapping[str, Any]) -> str:
    """The line under a table."""
    skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(summary["passed_over"].items())) or "none"
    if summary.get("stored"):
        kinds = ", ".join(f"{count} {kind}" for kind, count in summary["kinds"].items())
        return (
            f"{summary['scenes']} images ({kinds}); passed over on the way: {skipped}. Mean [95 % bootstrap interval]. "
            f"Ranked on {GRID} × {GRID} cells."
        )
    split = "held-out" if summary["split"] == "eval" else "TUNING"
    return (
        f"{summary['scenes']} {split} {'hard' if summary['hard'] else 'easy'} scenes of {len(summary['kinds'])} kinds "
        f"of question; passed over on the way: {skipped}. Mean [95 % bootstrap interval]. Ranked on "
        f"{GRID} × {GRID} cells."
    )


def write(path: Path, text: str) -> None:
    """Writes a file whole: the other shard may write it too."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def fill(path: Path, mark: str, text: str) -> None:
    """Puts a text between ``<!-- mark -->`` and ``<!-- /mark -->`` in a Markdown file.

    Raises:
        SystemExit: The file has no such place.
    """
    page = path.read_text(encoding="utf-8")
    before, opened, rest = page.partition(f"<!-- {mark} -->")
    _, closed, after = rest.partition(f"<!-- /{mark} -->")
    if not (opened and closed):
        raise SystemExit(f"{path} has no place <!-- {mark} --> … <!-- /{mark} -->")
    write(path, f"{before}{opened}\n{text.strip()}\n{closed}{after}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value
