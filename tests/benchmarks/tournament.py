"""Every method on the same scenes, judged in the same way: the comparison of explainers in docs/figures.md.

    python tests/benchmarks/tournament.py
    python tests/benchmarks/tournament.py --hard --model examples/hard_model
    python tests/benchmarks/tournament.py --cases runs/photographs --model DIR --few greedy,rise --few-scenes 20
    python tests/benchmarks/tournament.py --shard 0/2 &  python tests/benchmarks/tournament.py --shard 1/2

Every method explains the same tokens against the same verified baseline and is ranked on the same grid. It is judged by

* deletion, insertion and gain (insertion − deletion) against the baseline that all were made with;
* the same against held-out baselines, which no method was made with: mean colour, uniform noise;
* pointing game (15 pixels of tolerance, and none), energy, average precision against the objects the answer needs;
* causal agreement: is attention to the image tokens it marks what the answer hangs on (``probe.causal.agreement``);
* passes, seconds, and, on a few scenes, peak memory of tensors.

RISE, which may take any number of passes, is given 600 masks, somewhat more work than iGOS++ with a backward pass
counting as two. Everything else runs with its defaults.

Slow methods may be judged on the first scenes only (``--few``); their rows say on how many, and they are compared with
others on those.

One JSON line per scene and method: it can be stopped and goes on where it was. ``summary.json`` and ``table.md`` are
written at the end, and by ``--table`` at any time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from held_out import POINTING_TOLERANCE, Case, cases
from judging import (
    HELD_OUT,
    PROTOCOL,
    Line,
    Lines,
    bar_of,
    comparison,
    digest,
    figure,
    fill,
    holm,
    judged,
    judges,
    numbers_of,
    peak_memory,
    placed,
    sampling,
    scene_arguments,
    scenes_sentence,
    scenes_summary,
    scenes_to_do,
    settle,
    shown,
    values_of,
    weights_digest,
    write,
)
from tqdm import tqdm

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers import methods

DEFAULT = "igos++"
GROUND_TRUTH = "ground-truth mask"
FLOORS = ("random", "center")
JUDGES = ("deletion", "insertion", "gain", "held_out", *(f"gain_{kind}" for kind in HELD_OUT))
PLACES = ("pointing", "pointing_strict", "energy", "average_precision", "iou", "causal")
MEMORY_SCENES = 3
ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Entry:
    """A method with its settings; without a method, the mask of the objects that the answer needs."""

    method: str | None
    params: Mapping[str, Any] = field(default_factory=dict)

    def explain(self, case: Case) -> probe.Heatmap:
        if self.method is None:
            if case.scene.mask is None:
                raise ExplainError("nobody has marked what the answer needs")
            # Dilution over cells ranks its border; inside, all cells are tied.
            mask = torch.from_numpy(case.scene.mask)[None].float()
            values = torch.nn.functional.adaptive_avg_pool2d(mask, PROTOCOL["grid"])[0].numpy()
            size = case.replay.image_sizes[0]
            return probe.Heatmap(values, size, selection=case.selection, method=GROUND_TRUTH, trace=case.replay.trace)
        return probe.explain(
            case.replay,
            method=self.method,
            tokens=case.selection,
            seed=case.scene.index,
            strengthen=False,
            **self.params,
        )


SETTINGS: dict[str, dict[str, Any]] = {
    "igos++": {"preset": "default"},  # said, as lines of the time when that was the fixed fast one are not its
    "rise": {"masks": 600},
}

VARIANTS: dict[str, Entry] = {
    "igos++ (fast)": Entry("igos++", {"preset": "fast"}),
    "igos++ (thorough)": Entry("igos++", {"preset": "thorough"}),
    "igos++ (release)": Entry("igos++", {"preset": "release"}),
    "iia (authors')": Entry("iia", {"variant": "iia2"}),
    "gradcam (unpooled)": Entry("gradcam", {"pooled": False, "sign": "absolute"}),
    "gradient_value (cosine)": Entry("gradient_value", {"weights": "cosine", "sign": "positive"}),
    "refined (earlier words)": Entry("refined", {"earlier": 4}),
    GROUND_TRUTH: Entry(None),
}


def entries() -> dict[str, Entry]:
    """All that can take part, by name: every registered method and some variants."""
    return {name: Entry(name, SETTINGS.get(name, {})) for name in methods()} | VARIANTS


def measure(case: Case, entry: Entry, arguments: argparse.Namespace, *, curves: bool = True) -> Line:
    """One method on one scene, without curves by place alone. What it cannot do, and why, is a result too."""
    before = case.replay.passes.forward, case.replay.passes.backward
    started = time.perf_counter()
    try:
        heat = entry.explain(case)
    except probe.ProbeError as error:
        return {"reason": f"{type(error).__name__}: {error}"}
    cost = {
        "seconds": time.perf_counter() - started,
        "forward": case.replay.passes.forward - before[0],
        "backward": case.replay.passes.backward - before[1],
        "params": dict(heat.params),
    }
    if heat.values is None:
        return {**cost, "reason": heat.reason}
    rounds = (heat.provenance.get("diagnostics") or {}).get("rounds")
    cost |= {"shape": list(heat.shape)} if rounds is None else {"shape": list(heat.shape), "rounds": len(rounds)}
    if not curves:
        return {**cost, "place_alone": True, **placed(heat, case.scene.mask)}
    how = {"held_out": judges(arguments), "causal": arguments.causal, "adaptive": arguments.adaptive}
    return cost | judged(case, heat, **how)


def play(arguments: argparse.Namespace, lines: Lines, chosen: Mapping[str, Entry]) -> None:
    """Makes the lines that are missing."""
    scenes = weights_digest(arguments.model), arguments.split, arguments.hard
    if arguments.adaptive is not None:
        scenes = (*scenes, sampling(arguments.adaptive))
    if judges(arguments) != HELD_OUT:
        scenes = (*scenes, judges(arguments))
    if arguments.cases is not None:
        scenes = (*scenes, hashlib.sha256((arguments.cases / "cases.jsonl").read_bytes()).hexdigest())
    keys = {
        name: digest(entry.method, dict(entry.params), PROTOCOL, arguments.causal, *scenes)
        for name, entry in chosen.items()
    }
    lines.forget(arguments.again)
    for place, line in list(lines.latest.items()):
        if line.get("place_alone") and _curves(place[1], line["number"], arguments):
            del lines.latest[place]
    wanted = {name: min(arguments.scenes, arguments.few.get(name, arguments.scenes)) for name in chosen}
    with bar_of(arguments, lines, keys, wanted) as bar:
        for facts, case in scenes_to_do(arguments, lines, keys, wanted=wanted):
            for name, entry in chosen.items():
                left_out = facts["number"] >= wanted[name]
                curves = _curves(name, facts["number"], arguments)
                left_out |= not curves and case.scene.mask is None
                if not left_out and not lines.has(facts["scene"], name, keys[name]):
                    bar.set_postfix_str(f"scene {facts['number']}, {name}", refresh=False)
                    made = measure(case, entry, arguments, curves=curves)
                    lines.add({**facts, "name": name, "key": keys[name], **made})
                    bar.update()


def _curves(name: str, number: int, arguments: argparse.Namespace) -> bool:
    """Whether a method's map of this scene is judged by deletion and insertion, not by its place alone."""
    return number < arguments.place.get(name, arguments.scenes)


def weigh(arguments: argparse.Namespace, chosen: Mapping[str, Entry]) -> None:
    """Peak memory of the methods on a few scenes of their own run, one file for all."""
    path = arguments.out / "memory.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    missing = [
        name for name, entry in chosen.items() if entry.method and (name not in known or name in arguments.again)
    ]
    if not missing or arguments.memory < 1:
        return
    folder = arguments.out / "traces-memory"
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[int]] = {name: [] for name in missing}
    scenes = cases(
        *(arguments.split, arguments.memory, folder),
        skipped=Counter(),
        hard=arguments.hard,
        model=arguments.model,
        images=arguments.cases,
    )
    for case in tqdm(scenes, total=arguments.memory, unit="scene", desc="memory"):
        for name in missing:
            try:
                chosen[name].explain(case)  # once before, so that what stays in caches is not counted
                found[name].append(peak_memory(partial(chosen[name].explain, case)))
            except probe.ProbeError:
                continue
    write(path, json.dumps(known | found, indent=2) + "\n")


def summarise(arguments: argparse.Namespace, lines: Lines) -> dict[str, Any]:
    """Means with intervals, and every method against one of them, paired by scene."""
    path = arguments.out / "memory.json"
    memory = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    names = [name for name in lines.names() if arguments.methods == "all" or name in arguments.methods.split(",")]
    rows: dict[str, Any] = {}
    for name in names:
        mine = lines.of(name)
        made = [line for line in mine if line.get("gain") is not None or line.get("place_alone")]
        curves = [line for line in made if not line.get("place_alone")]
        rows[name] = {
            "scenes": len(mine),
            "first": 1 + max(line["number"] for line in mine),
            "maps": len(made),
            "gains": len(curves),
            "reasons": sorted({line["reason"] for line in mine if line.get("reason")})[:3],
            **{column: figure(values_of(made, column).values()) for column in (*JUDGES, *PLACES)},
            "trusted": float(np.mean([line["trusted"] for line in curves])) if curves else None,
            "by_kind": {
                kind: figure(line["gain"] for line in curves if line["kind"] == kind)
                for kind in dict.fromkeys(line["kind"] for line in curves)
            },
            "params": made[-1].get("params", {}) if made else {},
            **{cost: _mean(made, cost) for cost in ("forward", "backward")},
            "seconds": float(np.median([line["seconds"] for line in made])) if made else None,
            "peak_mib": float(np.mean(memory[name])) / 2**20 if memory.get(name) else None,
        }
    leader = arguments.against
    for column in ("gain", "held_out", "pointing", "causal"):
        tests = {
            name: comparison(values_of(lines.of(leader), column), values_of(lines.of(name), column))
            for name in names
            if name != leader
        }
        rivals = {name: test["p"] for name, test in tests.items() if test and name != GROUND_TRUTH}
        adjusted = holm(rivals)
        for name, test in tests.items():
            rows[name].setdefault("behind", {})[column] = test and {**test, "p_holm": adjusted.get(name)}
    ahead = {column: _default_against_others(lines, names, column) for column in ("gain", "held_out")}
    return {**scenes_summary(arguments, lines), "against": leader, "methods": rows, "ahead": ahead}


def _default_against_others(lines: Lines, names: Sequence[str], column: str) -> dict[str, Any]:
    """The default method against every other one, its own presets and floors left out, paired by scene."""
    default = values_of(lines.of(DEFAULT), column)
    own = {name for name, entry in entries().items() if entry.method == DEFAULT}
    others = [name for name in names if name not in (*FLOORS, GROUND_TRUTH, *own)]
    tests = {name: comparison(default, values_of(lines.of(name), column)) for name in others}
    return {name: test for name, test in tests.items() if test is not None}


def _mean(lines: list[Line], column: str) -> float | None:
    return float(np.mean([line[column] for line in lines])) if lines else None


def table(summary: dict[str, Any]) -> str:
    """The summary as Markdown, best gain first; floors and the reference last."""
    rows, leader, order = summary["methods"], summary["against"], _order(summary)
    scored, placed_ = [], []
    for name in order:
        row = rows[name]
        cells = {"heatmap": _named(name, summary), "deletion ↓": shown(row["deletion"])}
        cells |= {"insertion ↑": shown(row["insertion"]), "gain ↑": _gain(row)}
        cells["gain, held-out baselines ↑"] = shown(row["held_out"])
        for title, column in ((f"{leader} − it: gain", "gain"), ("held out", "held_out")):
            cells |= _against(row, column, title)
        scored.append(cells)
        cells = {"heatmap": _named(name, summary)}
        for title, column in (
            ("pointing ↑", "pointing"),
            ("without tolerance ↑", "pointing_strict"),
            ("energy ↑", "energy"),
            ("average precision ↑", "average_precision"),
            ("causal agreement ↑", "causal"),
        ):
            cells[title] = shown(row[column])
        cells["passes: forward + backward"] = _passes(row)
        cells["seconds"] = "–" if row["seconds"] is None or name == GROUND_TRUTH else f"{row['seconds']:.2f}"
        cells["peak MiB"] = "–" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}"
        placed_.append(cells)
    protocol = summary["protocol"]
    within = f"areas within {protocol['tolerance']}" if "tolerance" in protocol else f"{protocol['steps']} points"
    others = f"; held out: mean over {', '.join(protocol['held_out'])} ({protocol['held_out_steps']} points)"
    others = others if protocol["held_out"] else ""
    peak = " Peak: tensors alive at once, from torch's profiler, mean of a few scenes."
    peak = peak if "peak MiB" in _heads(placed_) else ""
    text = [
        *_markdown(scored),
        "",
        *_markdown(placed_),
        "",
        f"{scenes_sentence(summary)} Gain: insertion − deletion, {within}, against the baseline that "
        f"the heatmaps were made with{others}. p: two-sided sign-flip permutation test of the paired differences, "
        f"adjusted by Holm for all methods of the column. Pointing: within {POINTING_TOLERANCE} pixels. Seconds: "
        f"median.{peak} {summary['machine']}.",
    ]
    if said := _ahead(summary["ahead"]):
        text.append(f"\n{said}")
    missing = [f"{name} {row['maps']} of {row['scenes']}" for name, row in rows.items() if row["maps"] < row["scenes"]]
    if missing:
        text.append(f"\nScenes without a map are left out: {'; '.join(missing)}.")
    fewer = [f"{name} {row['gains']}" for name, row in rows.items() if row["gains"] < row["maps"]]
    if fewer:
        text.append(f"\nJudged by place alone from some image on, with as many gains: {', '.join(fewer)}.")
    if summary["begun"]:
        text.append(f"\nScenes begun and not judged under every method yet are left out: {summary['begun']}.")
    return "\n".join(text) + "\n"


def short_table(summary: dict[str, Any]) -> str:
    """The columns that the summary has room for, best gain first; floors and the reference last."""
    rows, leader = summary["methods"], summary["against"]
    lines = []
    for name in _order(summary):
        row = rows[name]
        means = {
            title: "–" if row[column] is None else f"{row[column]['mean']:.3f}"
            for title, column in (
                ("gain, held-out baselines ↑", "held_out"),
                ("pointing ↑", "pointing"),
                ("average precision ↑", "average_precision"),
                ("causal agreement ↑", "causal"),
            )
        }
        cells = {"heatmap": _named(name, summary), "gain ↑": _gain(row), **_against(row, "gain", f"{leader} − it")}
        lines.append(cells | means | {"passes": _passes(row)})
    return "\n".join([*_markdown(lines), "", scenes_sentence(summary)])


def _ahead(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Whether the default method is ahead of every other one, in sentences; empty where it was compared with none."""
    said = []
    for title, column in (("gain", "gain"), ("held-out baselines", "held_out")):
        tests = {name: shown(test, signed=True) for name, test in found[column].items()}
        level = [name for name, test in found[column].items() if test["low"] <= 0]
        behind = sorted(tests.keys() - level, key=lambda name: found[column][name]["mean"])
        if tests:
            answer = f"not of {' and '.join(f'`{name}`, {tests[name]}' for name in level)}" if level else "yes"
            nearest = f"; the nearest that it is ahead of is `{behind[0]}`, {tests[behind[0]]}" if behind else ""
            said.append(f"By {title}: {answer}{nearest}.")
    asked = f"Is `{DEFAULT}` ahead of every other method, paired by scene, with its whole 95 % interval?"
    return " ".join([asked, *said, "Its own presets are not asked."]) if said else ""


def _order(summary: Mapping[str, Any]) -> list[str]:
    rows, last = summary["methods"], (*FLOORS, GROUND_TRUTH)
    return sorted(rows, key=lambda name: (name in last, -(rows[name]["gain"] or {"mean": -9})["mean"]))


def _heads(lines: Sequence[Mapping[str, str]]) -> list[str]:
    """The columns in which some line says something."""
    return [head for head in lines[0] if any(line[head] != "–" for line in lines)]


def _markdown(lines: Sequence[Mapping[str, str]]) -> list[str]:
    heads = _heads(lines)
    # Columns of p stand beside others of their name.
    titles = ["p" if head.endswith(": p") else head for head in heads]
    return [
        f"| {' | '.join(titles)} |",
        "|---" * len(heads) + "|",
        *(f"| {' | '.join(line[head] for head in heads)} |" for line in lines),
    ]


def _against(row: Mapping[str, Any], column: str, title: str) -> dict[str, str]:
    """How far the method is behind the one that all are compared with, and p."""
    test = row.get("behind", {}).get(column)
    return {title: shown(test, signed=True) if test else "–", f"{title}: p": _p(test) if test else "–"}


def _gain(row: Mapping[str, Any]) -> str:
    """Mean and interval, and of how many maps, where others are judged by place alone."""
    return shown(row["gain"]) + (f" ({row['gains']})" if 0 < row["gains"] < row["maps"] else "")


def _passes(row: Mapping[str, Any]) -> str:
    return f"{row['forward']:.0f} + {row['backward']:.0f}" if row["forward"] else "none"


def _named(name: str, summary: Mapping[str, Any]) -> str:
    """A method with the number of its scenes, where those are not all."""
    firsts = {one: row["first"] for one, row in summary["methods"].items()}
    return name if firsts[name] == max(firsts.values()) else f"{name} (the first {firsts[name]})"


def _p(test: Mapping[str, Any]) -> str:
    p = test["p"] if test["p_holm"] is None else test["p_holm"]
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scene_arguments(parser, "runs/tournament")
    parser.add_argument("--methods", default="all", help="names with commas, or all; --methods list shows them")
    parser.add_argument(
        "--few", default="", help="methods judged on the first scenes only: NAME or NAME=SCENES, commas"
    )
    parser.add_argument("--few-scenes", type=int, default=20, help="how many those are, where --few does not say")
    parser.add_argument("--place", default="", help="methods judged by place alone from a scene on: NAME or NAME=SCENE")
    parser.add_argument("--place-from", type=int, default=20, help="which scene that is, where --place does not say")
    parser.add_argument("--against", default="igos++ (fast)", help="the method that all others are compared with")
    parser.add_argument("--no-causal", dest="causal", action="store_false", help="leave causal agreement out")
    parser.add_argument(
        "--memory", type=int, default=MEMORY_SCENES, help="scenes to measure peak memory on; 0 for none"
    )
    parser.add_argument(
        "--fill",
        action="store_true",
        help="put the tables where the pages (tournament, figures or reality) name the folder of --out",
    )
    arguments = parser.parse_args()
    settle(arguments)
    arguments.few = numbers_of(arguments.few, arguments.few_scenes)
    arguments.place = numbers_of(arguments.place, arguments.place_from)
    known = entries()
    if arguments.methods == "list":
        print("\n".join(known))
        return
    names = list(known) if arguments.methods == "all" else arguments.methods.split(",")
    unknown = [name for name in (*names, *arguments.again, *arguments.few, *arguments.place) if name not in known]
    if unknown:
        raise SystemExit(f"no method {unknown[0]!r}; there are {', '.join(known)}")
    chosen = {name: known[name] for name in names}
    lines = Lines(arguments.out, arguments.shard)
    if not arguments.table:
        play(arguments, lines, chosen)
        if arguments.shard[0] == 0:
            weigh(arguments, chosen)
        lines = Lines(arguments.out, arguments.shard)  # with what other shards have written meanwhile
    if not lines.latest:
        raise SystemExit(f"no lines in {arguments.out}; run without --table first")
    names = [name for name in lines.names() if name in chosen]
    everywhere = [name for name in names if name not in (*arguments.few, *arguments.place)]
    begun = lines.keep_complete(everywhere) if everywhere else 0
    if not lines.latest:
        raise SystemExit(f"no scene in {arguments.out} has been judged under every method yet; let it go on")
    summary = {**summarise(arguments, lines), "begun": begun}
    write(arguments.out / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    write(arguments.out / "table.md", table(summary))
    if arguments.fill:
        mark = arguments.out.name
        page = "reality.md" if arguments.cases else "figures.md"
        fill(ROOT / "docs" / page, f"tournament {mark}", short_table(summary))
        if arguments.cases:
            write(RESULTS / f"{mark}.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        fill(ROOT / "docs" / "tournament.md", mark, table(summary))
    print(table(summary))


if __name__ == "__main__":
    main()
