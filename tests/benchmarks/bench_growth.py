"""How time and memory grow with the picture's and the answer's length, method by method.

    python tests/benchmarks/bench_growth.py            # about half an hour on one free core
    python tests/benchmarks/bench_growth.py --figure   # the figure and the table alone, from results/growth.json

One small Qwen2-VL with random weights, which takes pictures of any size, is shown larger and larger ones: 144 to 7,290
image tokens, all in one picture, with an answer of 16 tokens; and at 144 image tokens it gives answers of 8 to 512.

Memory is the most bytes of tensors alive at once beyond what was alive before, summed over the allocations and releases
that torch's profiler sees (``judging.peak_memory``), scratch inside operators included; numpy and other libraries are
left out. Time is processor seconds of the one thread there is, without the profiler: the best of three runs, or one
where that takes more than three seconds.

T-MM and IIA work inside the backward pass, at each attention layer in turn. What they take *beyond the model's own* is
the most they add, at any layer, to what is alive when the pass arrives there (autograd's activations and gradients):
``layer_bytes``. The difference of whole peaks, less that of ``pass``, one forward and backward pass of the same model
over the same single mask with nobody looking inside, is smaller, as much has been released before a layer is reached;
both have a slope.

Masks go through one at a time, so that no peak depends on how many of them this machine's memory holds (IIA's points go
through together); methods that are a number of passes are timed per pass. Slopes are least squares of log against log
over all sizes; *last* is between the two largest. A slope of 1 is proportional growth; of 2, growth with the square, as
the attention maps of all layers and heads have, which nothing here keeps.

Writes ``results/growth.json``, ``docs/growth.png`` and the table in ``docs/planner.md``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from judging import fill, peak_memory
from random_model import PATCH, asked, random_qwen, recorded, write_results

import lvlm_probe as probe
from lvlm_probe.explainers.attention_relevance import Walk
from lvlm_probe.metrics import CurveRule

ROOT = Path(__file__).resolve().parents[2]
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
GRIDS = ((12, 12), (20, 20), (32, 32), (52, 52), (90, 81))
"""Image tokens, ``(row, column)``."""
ANSWER = 16
ANSWERS = (8, 32, 128, 512)
IIA_POINTS = 2
IG_STEPS = 2
CURVE_STEPS = 4
MOST = 1.1
"""The exponent that T-MM's memory beyond the model's own may have."""
LAYER = "growth.layer"
"""Name of the mark on the work at an attention layer."""
LONG = 3.0
"""Seconds of a run that needs no repeating."""

METHODS: dict[str, dict[str, Any]] = {
    "gradcam": {},
    "tmm": {},
    "iia": {"points": IIA_POINTS},
    "attention": {"source": "replay"},
    "integrated_gradients": {"steps": IG_STEPS, "batch": 1},
    "igos++": {"preset": "fast", "ig_steps": 1, "refine": 0},
}
PER_PASS = ("integrated_gradients", "igos++", "deletion/insertion")
FIRST = "record, first of its size"
SHOWN = (
    FIRST, "record", "pass", "gradcam", "tmm", "iia", "attention", "integrated_gradients", "igos++",
    "deletion/insertion",
)  # fmt: skip

Line = dict[str, Any]


def measured(run: Callable[[], object], *, repeats: int = 3) -> tuple[float, int]:
    """Processor seconds without the profiler, and peak bytes. ``run`` is warm."""
    peak = peak_memory(run)
    seconds: list[float] = []
    while not seconds or (len(seconds) < repeats and seconds[0] < LONG):
        started = time.process_time()
        run()
        seconds.append(time.process_time() - started)
    return min(seconds), peak


def measure(model: Any, processor: Any, grid: tuple[int, int], answer: int) -> list[Line]:
    """All methods at one size."""
    lines: list[Line] = []
    size = (grid[1] * PATCH, grid[0] * PATCH)
    where: Line = {"image_tokens": grid[0] * grid[1], "answer_tokens": answer}

    def note(name: str, seconds: float | None, peak: int, **more: Any) -> None:
        lines.append({**where, "method": name, "seconds": seconds, "peak_bytes": peak, **more})
        print(f"{where['image_tokens']:6} {answer:4} {name:26} {seconds or 0:9.3f} s {peak / 1e6:9.2f} MB", flush=True)

    with tempfile.TemporaryDirectory() as directory:
        whole = recorded(
            model, processor, Path(directory), size=size, answer=answer
        )  # traces the processor at this size
        assert len(whole.trace.layout.image_positions) == where["image_tokens"]
        replay = probe.replay(whole.trace, model, processor, micro_batch=1)
        where["positions"] = replay.length
        _record(model, processor, size, answer, Path(directory), note)
        selection = probe.select_tokens(replay, span=(0, answer))
        steps = list(selection.indices)
        ones = torch.ones(1, 1, 1)

        def own() -> None:
            replay.score_and_grad(ones, lambda log_probs: log_probs[:, steps].sum(dim=1))

        own()
        note("pass", *measured(own))
        heat: Any = None
        for method, params in METHODS.items():

            def run(method: str = method, params: Line = params) -> Any:
                return probe.explain(replay, method=method, tokens=selection, strengthen=False, **params)

            # What is found once per answer and kept (places of tokens, how a mask reaches the pixels) is no part of it.
            more = {}
            if method in ("tmm", "iia"):
                heat, more["layer_bytes"] = at_layers(run)
            else:
                heat = run()
            assert heat.values is not None, heat.reason
            seconds, peak = measured(run)
            passes = heat.provenance["passes"]["backward"] if method in PER_PASS else 1
            note(method, seconds / passes, peak, per_passes=passes, **more)

        def curves() -> Any:
            return probe.evaluate(heat, replay, steps=CURVE_STEPS, grid=8, curve=CurveRule(tie_orders=1))

        before = replay.passes.forward
        curves()
        passes = replay.passes.forward - before
        seconds, peak = measured(curves)
        note("deletion/insertion", seconds / passes, peak, per_passes=passes)
    return lines


def at_layers(run: Callable[[], Any]) -> tuple[Any, int]:
    """What a method gives, and the most bytes that it adds at an attention layer, in the backward pass, to what is
    alive there anyway."""
    original = Walk.__call__

    def marked(walk: Walk, layer: Any) -> None:
        with torch.profiler.record_function(LAYER):
            original(walk, layer)

    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        mock.patch.object(Walk, "__call__", marked),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        found = run()
    events = profile.profiler.kineto_results.events()
    changes: list[tuple[int, int]] = []
    for event in events:
        if event.name() == "[memory]":
            changes.append((event.start_ns(), event.nbytes()))
        elif event.name() == LAYER:
            changes += [(event.start_ns(), 0), (event.start_ns() + event.duration_ns(), 0)]
    spans = [(event.start_ns(), event.start_ns() + event.duration_ns()) for event in events if event.name() == LAYER]
    changes.sort(key=lambda change: change[0])
    times = np.array([at for at, _ in changes])
    alive = np.cumsum([change for _, change in changes])
    most = 0
    for start, stop in spans:
        inside = alive[np.searchsorted(times, start) : np.searchsorted(times, stop, side="right")]
        most = max(most, int(inside.max() - inside[0]))
    return found, most


def _record(
    model: Any, processor: Any, size: tuple[int, int], answer: int, directory: Path, note: Callable[..., None]
) -> None:
    """generate() with attention rows and log-probabilities recorded, the file included; and without a probe."""

    def plain() -> None:
        model.generate(**asked(model, processor, size), min_new_tokens=answer, max_new_tokens=answer, do_sample=False)

    plain()
    note("generate", *measured(plain))
    with probe.attach(model, processor) as attached:

        def watched() -> None:
            with attached.record(directory, llr=False):
                plain()

        note(FIRST, None, peak_memory(watched))  # finds the places of image tokens, once per picture size
        note("record", *measured(watched))


def slope(x: list[int], y: list[float | None]) -> dict[str, float] | None:
    """Exponent b of y ~ xᵇ: over all, and between the two largest. ``None`` where one is unknown or not above 0."""
    if len(x) < 2 or any(value is None or value <= 0 for value in y):
        return None
    logs = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    last = (logs[1][-1] - logs[1][-2]) / (logs[0][-1] - logs[0][-2])
    return {"all": round(float(np.polyfit(*logs, 1)[0]), 3), "last": round(float(last), 3)}


def slopes(lines: list[Line], axis: str) -> dict[str, Line]:
    """Method → slopes of time; of peak memory; and of what T-MM and IIA take beyond the model's own, in both senses."""
    found: dict[str, Line] = {}
    own = {line[axis]: line["peak_bytes"] for line in lines if line["method"] == "pass"}
    for name in dict.fromkeys(line["method"] for line in lines):
        mine = sorted((line for line in lines if line["method"] == name), key=lambda line: line[axis])
        x, inside = [line[axis] for line in mine], "layer_bytes" in mine[0]
        found[name] = {
            "seconds": slope(x, [line["seconds"] for line in mine]),
            "peak": slope(x, [line["peak_bytes"] for line in mine]),
            "layer": slope(x, [line["layer_bytes"] for line in mine]) if inside else None,
            "beyond": slope(x, [line["peak_bytes"] - own[line[axis]] for line in mine]) if inside else None,
        }
    return found


def table(result: Line) -> str:
    """Markdown: slopes of every method along both axes, and the sentence about T-MM."""
    pictures, answers = result["slopes"]["image_tokens"], result["slopes"]["answer_tokens"]
    largest = max(line["image_tokens"] for line in result["lines"])
    at = {line["method"]: line for line in result["lines"] if line["image_tokens"] == largest}

    def cell(found: Line | None) -> str:
        return "–" if found is None else f"{found['all']:.2f} ({found['last']:.2f})"

    rows = [
        "| | time, larger image | peak memory, larger image | time, longer answer | peak memory, longer answer "
        f"| at {largest:,} image tokens |",
        "|---|---|---|---|---|---|",
    ]
    for name in SHOWN:
        one, two = pictures[name], answers[name]
        cells = [cell(part[kind]) for part in (one, two) for kind in ("seconds", "peak")]
        taken = "" if at[name]["seconds"] is None else f"{at[name]['seconds']:.3g} s, "
        rows.append(f"| {label(name)} | {' | '.join(cells)} | {taken}{at[name]['peak_bytes'] / 1e6:.1f} MB |")
    tmm, own = at["tmm"], at["pass"]
    layer, beyond = pictures["tmm"]["layer"], pictures["tmm"]["beyond"]
    rows += [
        "",
        f"Exponents of growth (slopes of log against log) over {len(GRIDS)} images of 144 to {largest:,} image "
        f"tokens with {ANSWER} answer tokens, and over {len(ANSWERS)} answers of {ANSWERS[0]} to {ANSWERS[-1]} tokens "
        f"about 144 image tokens; in brackets between the two largest. Qwen2-VL with random weights, "
        f"{DECODER['num_hidden_layers']} decoder layers of {DECODER['num_attention_heads']} heads, float32, one mask "
        f"at a time; {result['machine']}, {result['date']}.",
        "",
        f"**T-MM's memory beyond the model's own grows with exponent {layer['all']:.2f}** ({layer['last']:.2f} between "
        f"the two largest): the most it adds, at any attention layer, to what the backward pass holds there, "
        f"{tmm['layer_bytes'] / 1e6:.1f} MB at {largest:,} image tokens. Its peak less that of the same pass without "
        f"it ({tmm['peak_bytes'] / 1e6:.1f} − {own['peak_bytes'] / 1e6:.1f} MB) grows with exponent {cell(beyond)}. "
        f"Attention maps of all layers and heads with their gradients would be "
        f"{dense_bytes(own['positions']) / 1e9:.1f} GB.",
    ]
    return "\n".join(rows)


def label(name: str, *, timed: bool = True) -> str:
    """A method's name in tables and figures."""
    if name == "pass":
        return "one forward and backward pass"
    if name == "iia":
        return f"iia, {IIA_POINTS} points"
    return name.replace("_", " ") + (", per pass" if timed and name in PER_PASS else "")


def dense_bytes(positions: int) -> int:
    """Attention maps of all decoder layers and heads, and their gradients, in single precision."""
    return 2 * 4 * DECODER["num_hidden_layers"] * DECODER["num_attention_heads"] * positions**2


STYLE = {
    "record": ("#16a34a", "s"), "pass": ("#111827", "D"), "gradcam": ("#7c3aed", "v"), "tmm": ("#c2410c", "o"),
    "iia": ("#d97706", "^"), "attention": ("#0891b2", "P"), "integrated_gradients": ("#64748b", "X"),
    "igos++": ("#be185d", "d"), "deletion/insertion": ("#2563eb", "<"),
}  # fmt: skip


def draw(result: Line, path: Path) -> None:
    """Two panels: memory and time against the number of image tokens."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    drawing = Figure(figsize=(10.4, 4.9), layout="constrained", facecolor="white")
    lines = [line for line in result["lines"] if line["answer_tokens"] == ANSWER]
    found = result["slopes"]["image_tokens"]
    ticks = [rows * columns for rows, columns in GRIDS]
    panels = drawing.subplots(1, 2)
    for axes, column, scale, title in (
        (panels[0], "peak_bytes", 1e6, "peak memory beyond weights, MB"),
        (panels[1], "seconds", 1.0, "processor seconds, one thread"),
    ):
        kind = "peak" if column == "peak_bytes" else "seconds"
        for name in STYLE:
            mine = sorted((line for line in lines if line["method"] == name), key=lambda line: line["image_tokens"])
            colour, marker = STYLE[name]
            text = label(name, timed=kind == "seconds")
            axes.plot(
                [line["image_tokens"] for line in mine], [line[column] / scale for line in mine], color=colour,
                marker=marker, markersize=5, linewidth=2.2 if name == "tmm" else 1.3,
                zorder=3 if name == "tmm" else 2, label=f"{text}  {found[name][kind]['all']:.2f}",
            )  # fmt: skip
        if kind == "peak":
            layers = sorted((line for line in lines if line["method"] == "tmm"), key=lambda line: line["image_tokens"])
            axes.plot(
                ticks, [line["layer_bytes"] / scale for line in layers], color="#c2410c", linestyle=":", marker="o",
                markersize=4, markerfacecolor="white", linewidth=1.8,
                label=f"tmm, beyond the model's own  {found['tmm']['layer']['all']:.2f}",
            )  # fmt: skip
            positions = {line["image_tokens"]: line["positions"] for line in lines if "positions" in line}
            axes.plot(
                ticks, [dense_bytes(positions[tick]) / scale for tick in ticks], color="#9ca3af", linestyle="--",
                linewidth=1.3, label="attention maps of all layers and heads,\nand gradients, if kept (computed)  2",
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(top=axes.get_ylim()[1] * (6 if kind == "peak" else 1.5))  # room for the legend
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.set_xlabel("image tokens")
        axes.set_ylabel(title)
        axes.grid(color="#e5e7eb")
        axes.set_axisbelow(True)
        axes.legend(fontsize=7, frameon=False, title="slope, log to log", title_fontsize=7, alignment="left")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].set_title("Memory", fontsize=10, loc="left")
    panels[1].set_title("Time", fontsize=10, loc="left")
    drawing.savefig(path, dpi=150)


def finish(result: Line) -> None:
    """The figure, the table, and whether T-MM's memory keeps its promise."""
    draw(result, ROOT / "docs" / "growth.png")
    fill(ROOT / "docs" / "planner.md", "growth", table(result))
    print(table(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "growth.json")
    parser.add_argument("--figure", action="store_true", help="draw what was measured before")
    parser.add_argument("--sizes", type=int, default=len(GRIDS), help="only so many of the sizes, smallest first")
    given = parser.parse_args()
    if given.figure:
        finish(json.loads(given.out.read_text(encoding="utf-8")))
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, processor = random_qwen(tower=TOWER, decoder=DECODER)
    pictures = [line for grid in GRIDS[: given.sizes] for line in measure(model, processor, grid, ANSWER)]
    answers = [line for count in ANSWERS[: given.sizes] for line in measure(model, processor, GRIDS[0], count)]
    by_picture = slopes(pictures, "image_tokens")
    result: Line = {
        "command": shlex.join(["python", *sys.argv]),
        "memory": "bytes of tensors alive at once, from torch's profiler (judging.peak_memory), beyond those before",
        "layer_bytes": "most bytes that the method adds at an attention layer to what is alive in the pass there",
        "model": {"tower": TOWER, "decoder": DECODER, "dtype": "float32"},
        "settings": {
            **METHODS, "deletion/insertion": {"steps": CURVE_STEPS, "grid": 8}, "micro_batch": 1, "threads": 1,
        },
        "dense_bytes": dense_bytes(max(line.get("positions", 0) for line in pictures)),
        "slopes": {"image_tokens": by_picture, "answer_tokens": slopes(answers, "answer_tokens")},
        "lines": pictures + answers,
    }  # fmt: skip
    write_results(given.out, result)
    if given.sizes == len(GRIDS):
        finish(json.loads(given.out.read_text(encoding="utf-8")))
    found = by_picture["tmm"]
    if max(*found["layer"].values(), *(found["beyond"] or {"all": 0.0}).values()) > MOST:
        raise SystemExit(f"T-MM's memory beyond the model's own grows faster than in proportion: {found}")


if __name__ == "__main__":
    main()
