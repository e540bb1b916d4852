"""Explanations of videos on the demo's clips, whose truth in space and time is known: the tables of docs/video.md.

    .venv-tv/bin/python tests/benchmarks/clip_tournament.py --model runs/video-model

The model is what ``examples/train_demo_model.py --family video`` writes. Every method that explains by a video explains
the same words of held-out clips that are answered rightly, against the same verified baseline, and is ranked on the
same grid of steps, rows and columns. It is judged by

* deletion, insertion and gain (insertion − deletion) over tubes;
* energy: the part of the heatmap on the object that the answer needs, in the frames in which it does;
* pointing: whether the highest value lies there (4 pixels of tolerance), and in time, whether the frame of the highest
  mean is one of those frames;
* passes and seconds.

Floors are a blob in the middle of every frame, and noise. ``which_frames`` has a value per frame, not per place.

One JSON line per clip and method: it can be stopped and goes on where it was. ``summary.json`` and ``table.md`` are
written at the end, and by ``--table`` at any time; ``--fill`` puts the table into the page.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from held_out import machine
from judging import FEW, Line, Lines, comparison, digest, figure, fill, holm, shown, values_of, weights_digest, write
from tqdm import tqdm

import lvlm_probe as probe
from lvlm_probe.demo import ClipScene
from lvlm_probe.replaying import Replay
from lvlm_probe.selection import TokenSelection
from lvlm_probe.video import ClipHeatmap

ROOT = Path(__file__).resolve().parents[2]
GRID = (8, 12, 12)
STEPS = 50
TOLERANCE = 4  # pixels of 84: the same part of a frame as 15 of 336, which scenes are judged with
JUDGES = ("gain", "deletion", "insertion", "energy", "pointing", "pointing_in_time")
LEADER = "igos++"
SETTINGS: dict[str, dict[str, Any]] = {"rise": {"masks": 600}}
FLOORS = ("center", "random")
TRUTH = "ground truth"


@dataclass(frozen=True)
class ClipCase:
    """A clip whose answer is right and rests on it, with its words and a verified baseline."""

    clip: ClipScene
    replay: Replay
    selection: TokenSelection


def clip_cases(
    model: Any, processor: Any, split: str, folder: Path, skipped: Counter[str], start: int
) -> Iterator[ClipCase]:
    """Clips from number ``start`` on; those answered wrongly, or without a word that rests on them, are passed over."""
    for index in itertools.count(start):
        (clip,) = probe.demo.clips(1, split=split, start=index)
        prompt = processor.apply_chat_template(
            clip.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        with probe.attach(model, processor) as attached, attached.record(folder) as recording:
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
        yield ClipCase(clip, replay.strengthened(selection.indices), selection)


def of_values(case: ClipCase, values: np.ndarray, method: str) -> ClipHeatmap:
    """A heatmap of values that no method of the registry made."""
    (recorded,) = case.replay.clips
    return ClipHeatmap(
        (values / max(float(values.max()), 1e-9)).astype(np.float32),
        case.clip.frames[0].size,
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
    return of_values(case, np.random.default_rng(case.clip.index).random(GRID), "random")


def truth(case: ClipCase) -> ClipHeatmap:
    """The truth itself: for comparison, not the best there could be, as within it all cells are tied."""
    mask = torch.from_numpy(case.clip.mask)[None].float()
    return of_values(case, torch.nn.functional.adaptive_avg_pool2d(mask, GRID[1:])[0].numpy(), TRUTH)


def by_frame(case: ClipCase) -> ClipHeatmap:
    """Shapley values of the frames; what speaks against the words counts as nothing."""
    found = probe.video.which_frames(case.replay, tokens=case.selection, progress=False)
    shares = np.asarray(found.shares).clip(0)
    if len(shares) != len(case.clip.frames):
        raise probe.errors.ExplainError(f"{len(shares)} stretches of {len(case.clip.frames)} frames")
    return of_values(case, shares[:, None, None], "which_frames")


def explained(method: str, case: ClipCase) -> ClipHeatmap:
    return probe.video.explain(
        case.replay, method=method, tokens=case.selection, seed=case.clip.index, strengthen=False, progress=False,
        **SETTINGS.get(method, {}),
    )  # fmt: skip


def entries() -> dict[str, Callable[[ClipCase], ClipHeatmap]]:
    """All that can take part, by name."""
    registered = {name: partial(explained, name) for name in probe.video.clip_methods() if name not in FLOORS}
    return registered | {"which_frames": by_frame, "center": center, "random": random, TRUTH: truth}


def measure(case: ClipCase, make: Callable[[ClipCase], ClipHeatmap]) -> Line:
    """One method on one clip. What it cannot do, and why, is a result too."""
    replay = case.replay.counted()
    case = ClipCase(case.clip, replay, case.selection)
    started = time.perf_counter()
    try:
        heat = make(case)
    except probe.ProbeError as error:
        return {"reason": f"{type(error).__name__}: {error}"}
    passes = heat.provenance.get("passes", {"forward": replay.passes.forward, "backward": replay.passes.backward})
    cost = {"seconds": time.perf_counter() - started, **{k: passes[k] for k in ("forward", "backward")}}
    if heat.values is None:
        return {**cost, "reason": heat.reason}
    score = probe.evaluate(
        heat, replay, baseline=case.replay.baseline, steps=STEPS, grid=GRID, center=False, progress=False, **FEW
    )
    judged = {name: getattr(score, name) for name in ("gain", "deletion", "insertion")}
    return {**cost, "shape": list(heat.values.shape), **judged, **placed(heat, case.clip.mask)}


def placed(heat: ClipHeatmap, mask: np.ndarray) -> Line:
    """Where and when a heatmap points, against the truth ``(t, row, col)``."""
    frames = [heat.frame(k).values for k in range(len(mask))]
    values = torch.nn.functional.interpolate(
        torch.from_numpy(np.stack(frames))[:, None], mask.shape[1:], mode="bilinear", align_corners=False
    )[:, 0].numpy()  # fmt: skip
    size = 2 * TOLERANCE + 1
    wide = torch.nn.functional.max_pool2d(torch.from_numpy(mask)[:, None].float(), size, 1, TOLERANCE)[:, 0].numpy() > 0
    total, curve, moments = float(values.sum()), heat.over_time, mask.any((1, 2))
    highest = values >= values.max() * (1 - 1e-6)
    flat = values.max() == values.min()
    even = float(np.ptp(curve)) <= 1e-6 * float(curve.max())
    return {
        "energy": float(values[mask].sum()) / total if total > 0 else None,
        "pointing": None if flat else float(wide[highest].mean()),
        "pointing_in_time": None if even else float(moments[curve >= curve.max() * (1 - 1e-6)].mean()),
        "moments": float(moments.mean()),
    }


def play(arguments: argparse.Namespace, lines: Lines, chosen: Mapping[str, Callable[[ClipCase], ClipHeatmap]]) -> None:
    """Makes the lines that are missing."""
    weights = weights_digest(arguments.model)
    keys = {name: digest(name, SETTINGS.get(name, {}), GRID, STEPS, FEW, weights, arguments.split) for name in chosen}
    model, processor = probe.load(arguments.model)
    skipped: Counter[str] = Counter()
    folder = arguments.out / "traces"
    found = clip_cases(model, processor, arguments.split, folder, skipped, 0)
    total = arguments.clips * len(chosen)
    with tqdm(total=total, unit="map", smoothing=0, mininterval=5) as bar:
        for number, case in enumerate(itertools.islice(found, arguments.clips)):
            facts = {"scene": case.clip.index, "number": number, "kind": case.clip.kind, "answer": case.clip.answer}
            for name, make in chosen.items():
                if not lines.has(case.clip.index, name, keys[name]):
                    lines.add(
                        {**facts, "passed_over": dict(skipped), "name": name, "key": keys[name], **measure(case, make)}
                    )
                bar.update()
            for path in folder.glob("*.h5"):  # a store is read through at every clip
                path.unlink()


def summarise(arguments: argparse.Namespace, lines: Lines) -> dict[str, Any]:
    """Means with intervals, all and by kind of question, and every method against one of them, paired by clip."""
    rows: dict[str, Any] = {}
    for name in lines.names():
        made = [line for line in lines.of(name) if line.get("gain") is not None]
        rows[name] = {
            "maps": len(made),
            **{column: figure(values_of(made, column).values()) for column in JUDGES},
            "by_kind": {
                kind: {
                    column: figure(values_of([line for line in made if line["kind"] == kind], column).values())
                    for column in JUDGES
                }
                for kind in probe.demo.CLIP_KINDS
            },
            **{cost: float(np.mean([line[cost] for line in made])) for cost in ("forward", "backward") if made},
            "seconds": float(np.median([line["seconds"] for line in made])) if made else None,
            "reasons": sorted({line["reason"] for line in lines.of(name) if line.get("reason")})[:3],
        }
    tests = {
        name: comparison(values_of(lines.of(LEADER), "gain"), values_of(lines.of(name), "gain"))
        for name in rows
        if name != LEADER
    }
    adjusted = holm({name: test["p"] for name, test in tests.items() if test and name != TRUTH})
    for name, test in tests.items():
        rows[name]["behind"] = test and {**test, "p_holm": adjusted.get(name)}
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
    rows = summary["methods"]
    last = (*FLOORS, TRUTH)
    order = sorted(rows, key=lambda name: (name in last, -(rows[name]["gain"] or {"mean": -9})["mean"]))
    text = [
        f"| heatmap | gain ↑ | {LEADER} − it | p | energy ↑ | pointing ↑ | pointing in time ↑ | passes | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in order:
        row = rows[name]
        test = row.get("behind")
        p = (
            "–"
            if not test or test["p_holm"] is None
            else "< 0.001"
            if test["p_holm"] < 0.001
            else f"{test['p_holm']:.3f}"
        )
        passes = f"{row['forward']:.0f} + {row['backward']:.0f}" if row.get("forward") else "none"
        figures = [shown(row[column]) for column in ("energy", "pointing", "pointing_in_time")]
        seconds = "–" if row["seconds"] is None else f"{row['seconds']:.2f}"
        behind = shown(test, signed=True) if test else "–"
        text.append(
            f"| {name} | {shown(row['gain'])} | {behind} | {p} | {' | '.join(figures)} | {passes} | {seconds} |"
        )
    skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(summary["passed_over"].items())) or "none"
    text += [
        "",
        f"{summary['clips']} {'held-out' if summary['split'] == 'eval' else 'TUNING'} clips; passed over on the way: "
        f"{skipped}. Mean [95 % bootstrap interval]; p: sign-flip permutation test of the paired gains, adjusted by "
        f"Holm. Ranked on {' × '.join(map(str, GRID))} cells. {summary['moments']:.0%} of the frames are ones that the "
        f"answer needs, which is what pointing in time hits by chance. {summary['machine']}.",
        "",
        "| gain by kind | " + " | ".join(summary["kinds"]) + " |",
        "|---" * (1 + len(summary["kinds"])) + "|",
    ]
    for name in order:
        text.append(
            f"| {name} | {' | '.join(shown(rows[name]['by_kind'][kind]['gain']) for kind in summary['kinds'])} |"
        )
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="what train_demo_model.py --family video has written")
    parser.add_argument("--clips", type=int, default=120, help="how many; answered rightly, all kinds of question")
    parser.add_argument("--split", choices=("eval", "tune"), default="eval", help="held out, or kept for tuning")
    parser.add_argument("--methods", default="all", help="names with commas, or all")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "clip-tournament")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--table", action="store_true", help="only print the tables, from the lines there are")
    parser.add_argument("--fill", action="store_true", help="put the table into docs/video.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    known = entries()
    names = list(known) if arguments.methods == "all" else arguments.methods.split(",")
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"no method {unknown[0]!r}; there are {', '.join(known)}")
    lines = Lines(arguments.out)
    if not arguments.table:
        play(arguments, lines, {name: known[name] for name in names})
    lines.keep_complete([name for name in lines.names() if name in names])
    if not lines.latest:
        raise SystemExit(f"no clip in {arguments.out} has been judged under every method yet")
    summary = summarise(arguments, lines)
    write(arguments.out / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    write(arguments.out / "table.md", table(summary))
    if arguments.fill:
        fill(ROOT / "docs" / "video.md", "clip tournament", table(summary))
    print(table(summary))


if __name__ == "__main__":
    main()
