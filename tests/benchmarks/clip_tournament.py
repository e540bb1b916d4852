"""Explanations of videos on the demo's clips, whose truth in space and time is known: the tables of docs/video.md.

    .venv-tv/bin/python tests/benchmarks/clip_tournament.py
    .venv-tv/bin/python tests/benchmarks/clip_tournament.py --table --fill

The model is what ``examples/train_demo_model.py --family video`` writes. Methods explain the same words of held-out
clips that are answered rightly, against the same verified baseline, and are ranked on the same grid of steps, rows and
columns. They are judged by

* deletion, insertion and gain (insertion − deletion) over tubes;
* where: whether the highest value lies on the object that the answer needs, in a frame in which it does
  (``tube_pointing``, 4 pixels of tolerance), and the part of the heatmap that lies there (``tube_energy``);
* when: whether the frame of the highest mean is one of those frames (``temporal_pointing``), and the overlap of as many
  of the highest frames with them (``temporal_iou``);
* passes and seconds.

Floors are a blob in the middle of every frame, and noise. ``which_frames`` has a value per frame, not per place.

One JSON line per clip and method: it can be stopped and goes on where it was. ``summary.json`` and ``table.md`` are
written at the end, and by ``--table`` at any time; ``--fill`` keeps the summary and puts the table into the page.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torchvision_shim  # noqa: F401  (before anything imports torchvision)

import numpy as np  # isort: skip
import torch
from held_out import machine
from judging import (
    STEPS,
    TIE_ORDERS,
    Line,
    Lines,
    again_argument,
    bar_of,
    comparison,
    curve_rule,
    digest,
    figure,
    fill,
    holm,
    numbers_of,
    scenes_to_do,
    settle,
    shown,
    values_of,
    weights_digest,
    write,
)

import lvlm_probe as probe
from lvlm_probe.demo import ClipScene
from lvlm_probe.heatmap import resample
from lvlm_probe.metrics import temporal_iou, temporal_pointing, tube_energy, tube_pointing
from lvlm_probe.replaying import Replay
from lvlm_probe.selection import TokenSelection
from lvlm_probe.video import ClipHeatmap

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results" / "video.json"
MODEL = ROOT / "examples" / "video_model"
GRID = (8, 12, 12)
TOLERANCE = 4  # pixels of 84: the same part of a frame as 15 of 336, which scenes are judged with
JUDGES = ("gain", "deletion", "insertion", "pointing", "energy", "pointing_in_time", "iou_in_time")
LEADER = "igos++"
WITHIN = 0.01  # how far an area may be off by drawing a quarter of the points
SETTINGS: dict[str, dict[str, Any]] = {"rise": {"masks": 600}}
VARIANTS: dict[str, dict[str, Any]] = {
    "igos++ (fast)": {"method": "igos++", "preset": "fast"},
    "greedy (exact)": {"method": "greedy", "search": "exact"},
    "greedy (32 regions)": {"method": "greedy", "regions": 32},
}
FLOORS = ("center", "random")
TRUTH = "ground truth"


@dataclass(frozen=True)
class ClipCase:
    """A clip whose answer is right and rests on it, with its words and a verified baseline."""

    scene: ClipScene
    replay: Replay
    selection: TokenSelection
    shared: dict[Any, Any] = field(default_factory=dict)


def clip_cases(
    split: str, wanted: int, folder: Path, *, skipped: Counter[str], after: int, model: Any, processor: Any
) -> Iterator[ClipCase]:
    """Clips in order, from ``after + 1`` on; those answered wrongly, or without a word that rests on them, are passed
    over."""
    found = 0
    for index in itertools.count(after + 1):
        if found == wanted:
            return
        (clip,) = probe.demo.clips(1, split=split, start=index)
        with probe.attach(model, processor) as attached, attached.record(folder) as recording:
            prompt = processor.apply_chat_template(
                clip.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            model.generate(**prompt)
        (trace,) = recording.traces
        if trace.answer.strip() != clip.answer:
            skipped["answered wrongly"] += 1
            continue
        replay = probe.replay(trace, model, processor)
        selection = probe.select_tokens(replay)
        if not selection:
            skipped["no token with LLR > 1"] += 1
            continue
        found += 1
        yield ClipCase(clip, replay.strengthened(selection.indices), selection)


def of_values(case: ClipCase, values: np.ndarray, method: str) -> ClipHeatmap:
    """A heatmap of values that no method of the registry made."""
    (recorded,) = case.replay.clips
    return ClipHeatmap(
        (values / max(float(values.max()), 1e-9)).astype(np.float32),
        case.scene.frames[0].size,
        recorded,
        seen=np.ones(values.shape, dtype=bool),
        selection=case.selection,
        method=method,
        trace=case.replay.trace,
    )


def center(case: ClipCase) -> ClipHeatmap:
    """The blob of the method ``center`` (a quarter of the side), in every frame alike."""
    _, rows, cols = GRID
    down, across = ((np.arange(n) + 0.5) / n - 0.5 for n in (rows, cols))
    blob = np.exp(-(down[:, None] ** 2 + across[None] ** 2) / (2 * 0.25**2))
    return of_values(case, np.broadcast_to(blob, GRID).copy(), "center")


def random(case: ClipCase) -> ClipHeatmap:
    """Noise."""
    return of_values(case, np.random.default_rng(case.scene.index).random(GRID), "random")


def truth(case: ClipCase) -> ClipHeatmap:
    """The truth itself: for comparison, not the best there could be, as within it all cells are tied."""
    mask = torch.from_numpy(case.scene.mask)[None].float()
    return of_values(case, torch.nn.functional.adaptive_avg_pool2d(mask, GRID[1:])[0].numpy(), TRUTH)


def by_frame(case: ClipCase) -> ClipHeatmap:
    """Shapley values of the frames; what speaks against the words counts as nothing."""
    found = probe.video.which_frames(
        case.replay, tokens=case.selection, segments=len(case.scene.frames), progress=False
    )
    return of_values(case, np.asarray(found.shares).clip(0)[:, None, None], "which_frames")


def explained(case: ClipCase, *, method: str, **settings: Any) -> ClipHeatmap:
    """A heatmap by a method of the registry."""
    return probe.video.explain(
        case.replay, method=method, tokens=case.selection, seed=case.scene.index, strengthen=False, progress=False,
        **settings,
    )  # fmt: skip


def entries() -> dict[str, Callable[[ClipCase], ClipHeatmap]]:
    """All that can take part, by name."""
    names = [name for name in probe.video.clip_methods() if name not in FLOORS]
    settings = {name: {"method": name, **SETTINGS.get(name, {})} for name in names} | VARIANTS
    return {name: partial(explained, **given) for name, given in settings.items()} | {
        "which_frames": by_frame,
        "center": center,
        "random": random,
        TRUTH: truth,
    }


def measure(case: ClipCase, make: Callable[[ClipCase], ClipHeatmap]) -> Line:
    """One method on one clip. What it cannot do, and why, is a result too."""
    replay = case.replay.counted()
    started = time.perf_counter()
    try:
        heat = make(replace(case, replay=replay))
    except probe.ProbeError as error:
        return {"reason": f"{type(error).__name__}: {error}"}
    cost = {"seconds": time.perf_counter() - started}
    cost |= {"forward": replay.passes.forward, "backward": replay.passes.backward}
    if heat.values is None:
        return {**cost, "reason": heat.reason}
    values = np.stack([resample(frame, GRID[1:]) for frame in heat.by_frame])
    ranked = replace(heat, values=values, seen=np.ones(GRID, dtype=bool))
    score = probe.evaluate(
        ranked, replay, baseline=case.replay.baseline, steps=STEPS, center=False,
        shared=case.shared, progress=False, curve=curve_rule(WITHIN),
    )  # fmt: skip
    judged = {name: getattr(score, name) for name in ("gain", "deletion", "insertion")}
    return {**cost, "shape": list(heat.values.shape), **judged, **placed(heat, case.scene.mask)}


def placed(heat: ClipHeatmap, mask: np.ndarray) -> Line:
    """Where and when a heatmap points, against the truth ``(frame, row, col)``; ``moments`` is what chance hits."""
    frames = torch.from_numpy(mask).float()
    wide = torch.nn.functional.max_pool2d(frames[:, None], 2 * TOLERANCE + 1, 1, TOLERANCE)[:, 0].numpy() > 0
    moments = mask.any((1, 2))
    return {
        "pointing": tube_pointing(heat, wide),
        "energy": tube_energy(heat, mask),
        "pointing_in_time": temporal_pointing(heat, moments),
        "iou_in_time": temporal_iou(heat, moments),
        "moments": float(moments.mean()),
    }


def play(arguments: argparse.Namespace, lines: Lines, chosen: Mapping[str, Callable[[ClipCase], ClipHeatmap]]) -> None:
    """Makes the lines that are missing, of the clips of this shard."""
    protocol = GRID, STEPS, TIE_ORDERS, TOLERANCE, WITHIN, weights_digest(arguments.model), arguments.split
    keys = {name: digest(name, SETTINGS.get(name, VARIANTS.get(name, {})), *protocol) for name in chosen}
    wanted = {name: min(arguments.scenes, arguments.few.get(name, arguments.scenes)) for name in chosen}
    lines.forget(arguments.again)
    model, processor = probe.load(arguments.model)
    deal = partial(clip_cases, model=model, processor=processor)
    with bar_of(arguments, lines, keys, wanted) as bar:
        for facts, case in scenes_to_do(arguments, lines, keys, wanted=wanted, deal=deal):
            for name, make in chosen.items():
                if facts["number"] < wanted[name] and not lines.has(facts["scene"], name, keys[name]):
                    bar.set_postfix_str(f"clip {facts['number']}, {name}", refresh=False)
                    lines.add({**facts, "name": name, "key": keys[name], **measure(case, make)})
                    bar.update()


def summarise(arguments: argparse.Namespace, lines: Lines) -> dict[str, Any]:
    """Means with intervals, all and by kind of question, and every method against one of them, paired by clip."""
    rows: dict[str, Any] = {}
    for name in lines.names():
        judged = lines.of(name)
        made = [line for line in judged if line.get("gain") is not None]
        rows[name] = {
            "clips": len(judged),
            "maps": len(made),
            **{column: figure(values_of(made, column).values()) for column in JUDGES},
            "by_kind": {
                kind: figure(values_of([line for line in made if line["kind"] == kind], "gain").values())
                for kind in probe.demo.CLIP_KINDS
            },
            **{cost: float(np.mean([line[cost] for line in made])) for cost in ("forward", "backward") if made},
            "seconds": float(np.median([line["seconds"] for line in made])) if made else None,
            "behind": None if name == LEADER else comparison(
                values_of(lines.of(LEADER), "gain"), values_of(judged, "gain")
            ),
        }  # fmt: skip
    tested = {name: row["behind"]["p"] for name, row in rows.items() if row["behind"] and name != TRUTH}
    for name, p in holm(tested).items():
        rows[name]["behind"]["p_holm"] = p
    by_clip = {line["scene"]: line for line in lines.latest.values()}
    last = max(by_clip.values(), key=lambda line: line["number"])
    return {
        "clips": len(by_clip),
        "split": arguments.split,
        "kinds": dict(Counter(line["kind"] for line in by_clip.values())),
        "moments": float(np.mean([line["moments"] for line in by_clip.values() if line.get("moments") is not None])),
        "passed_over": last["passed_over"],
        "weights": weights_digest(arguments.model),
        "machine": machine(),
        "lvlm_probe": probe.__version__,
        "methods": rows,
    }


def table(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown, best gain first; floors and the truth last."""
    rows, last = summary["methods"], (*FLOORS, TRUTH)
    order = sorted(rows, key=lambda name: (name in last, -(rows[name]["gain"] or {"mean": -9})["mean"]))
    named = {
        name: name if rows[name]["clips"] == summary["clips"] else f"{name} (the first {rows[name]['clips']})"
        for name in order
    }
    kinds = list(summary["kinds"])
    scored, placed_, by_kind = [], [], []
    for name in order:
        row = rows[name]
        test = row["behind"]
        p = test.get("p_holm") if test else None
        significance = "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
        passes = f"{row['forward']:.0f} + {row['backward']:.0f}" if row.get("forward") else "none"
        seconds = "–" if row["seconds"] is None or name == TRUTH else f"{row['seconds']:.2f}"
        behind = shown(test, signed=True) if test else "–"
        scored.append([named[name], shown(row["gain"]), behind, significance, passes, seconds])
        where_and_when = ("pointing", "energy", "pointing_in_time", "iou_in_time")
        placed_.append([named[name], *(shown(row[column]) for column in where_and_when)])
        by_kind.append([named[name], *(shown(row["by_kind"][kind]) for kind in kinds)])
    skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(summary["passed_over"].items())) or "none"
    split = "held-out" if summary["split"] == "eval" else "TUNING"
    text = [
        *_markdown(["heatmap", "gain ↑", f"{LEADER} − it", "p", "passes: forward + backward", "seconds"], scored),
        *_markdown(["heatmap", "pointing ↑", "energy ↑", "pointing in time ↑", "IoU in time ↑"], placed_),
        *_markdown(["gain", *kinds], by_kind),
        f"{summary['clips']} {split} clips; passed over on the way: {skipped}. Mean [95 % bootstrap interval]. Gain: "
        f"insertion − deletion over tubes, areas within {WITHIN}, ranked on {' × '.join(map(str, GRID))} cells. p: "
        "two-sided sign-flip permutation test of the paired gains, adjusted by Holm. Pointing: within "
        f"{TOLERANCE} pixels; in time, chance hits {summary['moments']:.2f}, as large a part of the frames is needed. "
        f"Seconds: median. {summary['machine']}.",
    ]
    missing = [f"{name} {row['maps']} of {row['clips']}" for name, row in rows.items() if row["maps"] < row["clips"]]
    return (
        "\n".join([*text, *([f"\nClips without a map are left out: {', '.join(missing)}."] if missing else [])]) + "\n"
    )


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)] + [""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="what train_demo_model.py --family video has written")
    parser.add_argument(
        "--clips", dest="scenes", type=int, default=120, help="how many; answered rightly, all kinds of question"
    )
    parser.add_argument("--split", choices=("eval", "tune"), default="eval", help="held out, or kept for tuning")
    parser.add_argument("--methods", default="all", help="names with commas, or all")
    parser.add_argument(
        "--few", default="", metavar="NAME=CLIPS", help="methods judged on the first clips only, commas"
    )
    again_argument(parser)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "clip-tournament")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th clip from the I-th on, I from 0")
    parser.add_argument("--threads", type=int, default=1, help="of torch; one per process is best with two shards")
    parser.add_argument("--table", action="store_true", help="only print the tables, from the lines there are")
    parser.add_argument("--fill", action="store_true", help="keep the summary and put the tables into docs/video.md")
    arguments = parser.parse_args()
    settle(arguments)
    arguments.few = numbers_of(arguments.few, arguments.scenes)
    known = entries()
    names = list(known) if arguments.methods == "all" else arguments.methods.split(",")
    if unknown := [name for name in (*names, *arguments.few, *arguments.again) if name not in known]:
        raise SystemExit(f"no method {unknown[0]!r}; there are {', '.join(known)}")
    if not arguments.table:
        play(arguments, Lines(arguments.out, arguments.shard), {name: known[name] for name in names})
    lines = Lines(arguments.out)  # with what other shards have written meanwhile
    lines.keep_complete([name for name in lines.names() if name in names and name not in arguments.few])
    if not lines.latest:
        raise SystemExit(f"no clip in {arguments.out} has been judged under every method yet")
    summary = summarise(arguments, lines)
    write(arguments.out / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    write(arguments.out / "table.md", table(summary))
    if arguments.fill:
        write(RESULTS, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        fill(ROOT / "docs" / "video.md", "tournament", table(summary))
    print(table(summary))


if __name__ == "__main__":
    main()
