"""All benchmarks on one page, ``docs/benchmarks.md``: every goal beside the figure, met or missed.

    python tests/benchmarks/publish.py

Reads what the scripts beside this one have written to ``results/``; what is not there is "not measured". The figures of
the campaigns (``campaign.json``) go between the marks of ``docs/promises.md``.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["SECTIONS", "Goal", "Section", "page", "promises"]

ROOT = Path(__file__).resolve().parents[2]
Found = Mapping[str, Any]
NOT_MEASURED = "not measured"
UNDECIDED = "not decided"


@dataclass(frozen=True)
class Goal:
    """One figure and the bound it should keep to.

    ``figure`` is ``None`` where it was not measured; ``bound`` is ``None`` where there is no goal. Where repeats spread
    so widely that their quartiles lie on both sides of the bound, the run does not decide.
    """

    what: str
    figure: float | None
    bound: float | None
    shown: Callable[[float], str]
    at_least: bool = False
    quartiles: tuple[float, float] | None = None

    @property
    def verdict(self) -> str:
        if self.figure is None:
            return NOT_MEASURED
        if self.bound is None:
            return "–"
        if self.quartiles is not None and self.quartiles[0] < self.bound < self.quartiles[1]:
            low, high = (self.shown(value) for value in self.quartiles)
            return f"{UNDECIDED}: quartiles {low} to {high}"
        return "met" if (self.figure >= self.bound if self.at_least else self.figure <= self.bound) else "**missed**"

    def row(self) -> str:
        bound = "–" if self.bound is None else f"{'≥' if self.at_least else '≤'} {self.shown(self.bound)}"
        figure = NOT_MEASURED if self.figure is None else self.shown(self.figure)
        return f"| {self.what} | {bound} | {figure} | {self.verdict} |"


@dataclass(frozen=True)
class Section:
    """One benchmark: its result file, the command, what it measures, its goals, and what else to show."""

    title: str
    file: str
    command: str
    about: str
    goals: Callable[[Found], list[Goal]]
    more: Callable[[Found], list[str]] = field(default=lambda _: [])


def ratio(value: float) -> str:
    return f"{value:.2f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def milliseconds(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 10 else f"{value:.1f} ms"


def kilobytes(value: float) -> str:
    return f"{value / 1e3:,.0f} kB"


def at(found: Any, *path: str) -> Any:
    """What lies at a path of names; ``None`` where there is nothing."""
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


# --------------------------------------------------------------------------------------------------------- the sections


ENGINE = {
    "demo": {"iteration": 0.25, "curves": 0.5, "explanation": 0.15, "peak": 0.4},
    "mid": {"iteration": 0.65, "curves": 0.5, "explanation": 0.15, "peak": 0.4},
}
_MODELS = {"demo": "the embedded model", "mid": "ViT-B/16 + 12 × 768"}
_ONE_THREAD = ", one thread"
_PARTS = {
    "iteration": "time of one iteration of iGOS+",
    "curves": "time of deletion and insertion",
    "explanation": "time of one explanation at the defaults",
    "peak": "peak memory",
}


def engine(found: Found) -> list[Goal]:
    return [
        Goal(f"{_PARTS[part]}, {_MODELS[model]}", at(found, "models", model, "ratios", part), bound, ratio)
        for model, bounds in ENGINE.items()
        for part, bound in bounds.items()
    ]


RECORDING = {"nothing": None, "without attention": 0.02, "with attention": 0.05, "with attention and LLR": None}


def engine_more(found: Found) -> list[str]:
    models = found.get("models") or {}
    loads = [load for line in models.values() for load in line.get("load_average", [])]
    if not loads:
        return []
    shown = {**_MODELS, **{model + _ONE_THREAD: name + _ONE_THREAD for model, name in _MODELS.items()}}
    names = [name for name in shown if name in models]
    lines = ["| ours relative to the recipe's | " + " | ".join(shown[name] for name in names) + " |"]
    lines.append("|---" * (1 + len(names)) + "|")
    for part in dict.fromkeys(part for name in names for part in models[name]["ratios"]):
        cells = [at(models, name, "ratios", part) for name in names]
        lines.append(f"| {part} | " + " | ".join("–" if cell is None else ratio(cell) for cell in cells) + " |")
    threads = max(line["threads"] for line in models.values())
    alone = " Where it says one thread they are those of the processor." if len(names) > len(_MODELS) else ""
    return [
        f"Seconds of the clock in {threads} threads, load of the machine {min(loads):.1f} to {max(loads):.1f}.{alone} "
        "*arithmetic* are floating-point operations; *frugal* sends four masks at once.",
        "",
        *lines,
        *_where(models, names),
    ]


def _where(models: Found, names: Sequence[str]) -> list[str]:
    """Where the engine's time goes, of the models that were profiled."""
    lines: list[str] = []
    for name in names:
        for what, shares in (at(models, name, "kernels") or {}).items():
            told = ", ".join(f"{kind} {percent(share)}" for kind, share in shares.items())
            lines.append(f"| {_MODELS.get(name, name)}, {what} | {told} |")
    if not lines:
        return []
    said = (
        "Where that time goes (`bench_engine.py --profile`, one thread). What is left is arithmetic: every layer of "
        "tower and decoder sees each masked image anew, as attention carries a cell that changes into all tokens from "
        "the first layer on, so that no windows of the tower and no prefix but that before the image can be used "
        "again. What lies under the goals of 0.50 and 0.25 is cheaper arithmetic: "
        "[bfloat16](#searching-in-bfloat16), for a search."
    )
    return ["", said, "", "| | shares |", "|---|---|", *lines]


def recording(found: Found) -> list[Goal]:
    goals: list[Goal] = []
    for kind, bound in RECORDING.items():
        line = at(found, "overheads", kind, "cpu")
        quartiles = None if line is None else (line["quartiles"][0], line["quartiles"][1])
        name = f"time added to generate(), {kind}"
        if kind == "nothing":
            name = "two plain calls: the noise of what follows"
        goals.append(Goal(name, at(line, "overhead"), bound, percent, quartiles=quartiles))
    return goals


def recording_more(found: Found) -> list[str]:
    if not found:
        return []
    lines = [
        f"{found['weights'] / 1e6:.0f} million weights, {found['image_tokens']} image tokens, {found['text_tokens']} "
        f"others, {found['tokens']} answer tokens; {found['plain_cpu_seconds']:.1f} s without a probe; medians of "
        f"{found['rounds'] // 2} pairs of rounds, processor seconds in one thread; load of the machine "
        f"{' to '.join(f'{load:.1f}' for load in found['load_average'])}.",
        "",
        "| recorded | quartiles | by the clock | per answer token | file | attention per token |",
        "|---|---|---|---|---|---|",
    ]
    for kind, line in found["overheads"].items():
        low, high = line["cpu"]["quartiles"]
        size = found["size"].get(kind)
        if size is None:
            continue
        lines.append(
            f"| {kind} | {percent(low)} to {percent(high)} | {percent(line['clock']['overhead'])} "
            f"| {line['cpu']['added_us_per_token']:,.0f} µs | {kilobytes(size['file_bytes'])} "
            f"| {size['attention_bytes_per_token'] / 1e3:.1f} kB |"
        )
    if inside := found.get("inside"):
        lines += [
            "",
            "Processor time inside the probe's own code, with attention, as a share of the plain call. Unlike the "
            "difference of two calls it is hardly disturbed by what else the machine does:",
            "",
            "| part | share | |",
            "|---|---|---|",
        ]
        for part, seconds in inside["seconds"].items():
            note = f"{1e6 * seconds / found['tokens']:,.0f} µs per token" if part in inside["per_token"] else "once"
            lines.append(f"| {part} | {percent(seconds / found['plain_cpu_seconds'])} | {note} |")
    once = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in found["once"].items())
    return [*lines, "", f"Paid once per recording, or per image size, and not in the figures above: {once}."]


GROWTH_BOUND = 1.1


def growth(found: Found) -> list[Goal]:
    layer = at(found, "slopes", "image_tokens", "tmm", "layer")
    worst = max(layer.values()) if layer else None
    return [Goal("T-MM: exponent of memory beyond the model's own", worst, GROWTH_BOUND, ratio)]


def growth_more(found: Found) -> list[str]:
    slopes = at(found, "slopes", "image_tokens")
    if not slopes:
        return []
    lines = [
        "| exponent over image tokens (over answer tokens) | time | peak memory |", "|---|---|---|",
    ]  # fmt: skip
    for name, kinds in slopes.items():
        other = at(found, "slopes", "answer_tokens", name) or {}
        cells = [
            f"{at(kinds, kind, 'all'):.2f}"
            + ("" if at(other, kind, "all") is None else f" ({at(other, kind, 'all'):.2f})")
            if at(kinds, kind, "all") is not None
            else "–"
            for kind in ("seconds", "peak")
        ]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return [*lines, "", "![Time and memory against image tokens](growth.png)", "", "More in [planner.md](planner.md)."]


def store(found: Found) -> list[Goal]:
    costs = found.get("costs") or {}
    names = list(costs) or list(STORE)
    goals: list[Goal] = []
    for name in names:
        goals += [
            Goal(name, at(costs, name, "ms"), None, milliseconds),
            Goal(f"{name}: bytes read", at(costs, name, "bytes"), None, kilobytes),
        ]
    return goals


STORE = ("open the store and read the last answer", "list with filters, again", "read one attention map")


def store_more(found: Found) -> list[str]:
    if not found:
        return []
    return [
        f"{found['traces']:,} traces of {kilobytes(found['file_bytes'])}, {found['total_bytes'] / 1e9:.2f} GB in "
        f"all; an attention map is {kilobytes(found['attention_map_bytes'])}. The first list opens every file once and "
        "keeps what their headers say. A trace that is opened has its hash checked, so its file is read whole, once."
    ]


PLANNER_BOUND = 0.15


def planner(found: Found) -> list[Goal]:
    worst = [abs(line["ratio"] - 1) for line in found.get("lines", [])]
    count = f", worst of {len(worst)} predictions" if worst else ""
    return [Goal(f"error of predicted peak memory{count}", max(worst, default=None), PLANNER_BOUND, percent)]


def planner_more(found: Found) -> list[str]:
    by_model: dict[str, list[float]] = {}
    for line in found.get("lines", []):
        by_model.setdefault(line["model"], []).append(line["ratio"])
    if not by_model:
        return []
    lines = ["| model | predictions | predicted / measured, lowest to highest |", "|---|---|---|"]
    return lines + [
        f"| {model} | {len(ratios)} | {min(ratios):.2f} to {max(ratios):.2f} |" for model, ratios in by_model.items()
    ]


RAY_BOUND = 1.8


def ray(found: Found) -> list[Goal]:
    return [Goal("speed-up of two workers over one", at(found, "speedup", "all"), RAY_BOUND, ratio, at_least=True)]


def ray_more(found: Found) -> list[str]:
    if not found:
        return []
    units, one, two = found["units"], at(found, "seconds", "1 worker"), at(found, "seconds", "2 workers")
    return [
        f"{units['answers']} answers and {units['maps']} maps: {one['all']:.0f} s with one worker, {two['all']:.0f} "
        "s with two, from the start of the first unit to the end of the last; medians of "
        f"{len(found['runs']['1'])} runs. The two workers are at work for {percent(found['busy'])} of that time; units "
        f"take {found['units_slower']:.2f} times as long when the other "
        "core works too, which is the machine's share of what is missing to 2."
    ]


METER_MEASURES = {
    "surprise of the worst word": "the most surprising word",
    "share of words not from the image": "the share of words from the image",
    "joint drop (before)": "the drop of the joint probability, as before",
    "joint log P": "the joint log-probability",
}
_METER_KINDS = {
    "contradicted": ("one word contradicts the image", "surprise of the worst word", 0.98),
    "swapped": ("right answers for other images", "surprise of the worst word", 0.98),
    "unseen": ("given to an image of one colour", "share of words not from the image", 0.98),
}


def meter(found: Found) -> list[Goal]:
    return [
        Goal(
            f"{what}: area under the ROC curve of {METER_MEASURES[measure]}, 1 to 8 sentences mixed",
            at(found, "areas", kind, "mixed", measure),
            bound,
            "{:.3f}".format,
            at_least=True,
        )
        for kind, (what, measure, bound) in _METER_KINDS.items()
    ]


def judging(found: Found) -> list[Goal]:
    explaining, judged = at(found, "explaining_default"), at(found, "judging")
    return [
        Goal(
            "images to judge a map, median, as a share of those that igos++ takes to make it",
            judged / explaining if found else None,
            1.0,
            ratio,
        ),
        Goal("gain of few points against that of all, mean difference", at(found, "off"), 0.01, "{:.4f}".format),
    ]


def judging_more(found: Found) -> list[str]:
    if not found:
        return []
    lines = [
        f"{found['scenes']} plain scenes. Images through the model, forward and backward, means of a map; of all "
        f"points {found['judging_full']:.0f} images in the median. The bound is one for curves that fall, or rise, all "
        f"the way: those that turn may be off by more. Largest difference in gain: {found['off_most']:.3f}.",
        "",
        "| method | explaining | judging, few points | judging, all points | difference in gain | its bound | turns |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in found["methods"].items():
        counts = " | ".join(f"{one[key]:.0f}" for key in ("explaining", "judging", "judging_full"))
        lines.append(f"| {name} | {counts} | {one['off']:.4f} | {one['bound']:.4f} | {one['turns']:.2f} |")
    return lines


def meter_more(found: Found) -> list[str]:
    if not found:
        return []
    lengths = [str(length) for length in found["lengths"]]
    words = ", ".join(f"{count:.0f}" for count in found["words_per_answer"].values())
    lines = [
        f"{found['images']} images of the split `eval`, plain and hard; answers of {', '.join(lengths)} sentences, "
        f"which are {words} words on average. Area under the ROC curve against the model's own greedy answers; 0.5 is "
        "chance. Greedy words have no surprise by definition: that nothing else has as little is what the area says; "
        "words drawn at temperature 1, below, are the harder case. The model is sure of what it says, so that here the "
        "joint log-probability tells contradictions as well; in less certain answers it grows with length.",
        "",
        f"| answers | judged by | sentences: {' | '.join(lengths)} | mixed |",
        "|---|---" + "|---" * (len(lengths) + 1) + "|",
    ]
    for kind, (what, _, _) in _METER_KINDS.items():
        for measure, name in METER_MEASURES.items():
            cells = [at(found, "areas", kind, length, measure) for length in (*lengths, "mixed")]
            lines.append(f"| {what} | {name} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    lines += [
        "",
        f"Classes of words, at the thresholds ({found['threshold']:g} nats, LLR 1):",
        "",
        "| words | number | not from this model | from habit | from the image |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {kind} | {line['words']:,} "
        f"| {percent(line['unlikely'])} | {percent(line['habit'])} | {percent(line['image'])} |"
        for kind, line in found["words"].items()
    ]
    lines += [
        "",
        "Classes of answers, and the share of them that the drop of the joint probability called from the image:",
        "",
        "| answers | sentences | not from this model | from habit | from the image | joint drop above 70 % |",
        "|---|---|---|---|---|---|",
    ]
    for kind, of_length in found["answers"].items():
        for length in (lengths[0], lengths[-1]):
            line = of_length[length]
            shares = (percent(line[name]) for name in ("unlikely", "habit", "image", "joint drop above 70 %"))
            lines.append(f"| {kind} | {length} | {' | '.join(shares)} |")
    lines += [
        "",
        "The threshold on surprise, looked for on images of the split `tune`: words above it.",
        "",
        f"| nats | {' | '.join(found['tuned'])} |",
        "|---" * (1 + len(found["tuned"])) + "|",
    ]
    for kind in ("planted", "own"):
        lines.append(f"| {kind} | {' | '.join(percent(line[kind]) for line in found['tuned'].values())} |")
    return lines


GPU_MODELS = ("LLaVA-1.5-7B", "Qwen2.5-VL-7B", "LLaVA-OneVision-7B")
GPU_PAPER = {
    "igos++ (paper)": ("iGOS++", 31, 7.0),
    "gradcam": ("Grad-CAM", 20, 1.0),
    "tmm": ("T-MM", 36, 2.7),
    "iia": ("IIA", 22, 4.7),
}


GPU_OURS: dict[str, tuple[float, float | None]] = {
    "igos++ (fast)": (1.0, 18), "gradcam": (0.1, None), "tmm": (0.5, 20), "iia": (1.0, None),
}  # fmt: skip
"""Our own goals on an H200, for LLaVA-1.5-7B: seconds, and GB with the 14 GB of weights."""


def gpu(found: Found) -> list[Goal]:
    goals: list[Goal] = []
    for step, (seconds, gigabytes) in GPU_OURS.items():
        line = at(found, "models", GPU_MODELS[0], "steps", step)
        what = f"{GPU_MODELS[0]}, {step}: %s (our goal on an H200)"
        goals.append(Goal(what % "seconds", at(line, "seconds"), seconds, "{:.1f} s".format))
        if gigabytes is not None:
            goals.append(Goal(what % "GB", at(line, "peak_gb"), gigabytes, "{:.0f} GB".format))
    for model in GPU_MODELS:
        for step, (name, gigabytes, seconds) in GPU_PAPER.items():
            line = at(found, "models", model, "steps", step)
            goals += [
                Goal(f"{model}, {step}: seconds ({name} in Table 9)", at(line, "seconds"), seconds, "{:.1f} s".format),
                Goal(f"{model}, {step}: GB ({name} in Table 9)", at(line, "peak_gb"), gigabytes, "{:.0f} GB".format),
            ]
    return goals


def gpu_more(found: Found) -> list[str]:
    lines: list[str] = []
    for model, result in (found.get("models") or {}).items():
        lines += [
            f"{model}: {result.get('weights', 0) / 1e9:.1f} billion weights, {result.get('image_tokens', '?')} image "
            f"tokens, {result.get('answer_tokens', '?')} answer tokens; {found['device']}.",
            "",
            "| step | passes | seconds | peak GB | share of the chip's peak |",
            "|---|---|---|---|---|",
        ]
        for step, line in result["steps"].items():
            if "seconds" not in line:
                lines.append(f"| {step} | – | {line.get('error', NOT_MEASURED)[:80]} | – | – |")
                continue
            passes = " + ".join(map(str, line["passes"])) if "passes" in line else "–"
            memory = "–" if line.get("peak_gb") is None else f"{line['peak_gb']:.1f}"
            share = "–" if line.get("share_of_peak") is None else percent(line["share_of_peak"])
            lines.append(f"| {step} | {passes} | {line['seconds']:.2f} | {memory} | {share} |")
        lines.append("")
    return lines


DOCUMENTS_READ = 0.9
DOCUMENTS_POINTING = 0.9


def documents(found: Found) -> list[Goal]:
    where = "maps of values that are highest in the value's box or its label's"
    return [
        Goal("values read to the letter, all questions", found.get("exact"), DOCUMENTS_READ, ratio, at_least=True),
        Goal(where, found.get("pointing_either"), DOCUMENTS_POINTING, ratio, at_least=True),
    ]


def documents_more(found: Found) -> list[str]:
    if not found:
        return []
    counts = {key: Counter(found[key]) for key in ("says_own", "says_other")}
    told = {key: ", ".join(f"{name} {number}" for name, number in sorted(counts[key].items())) for key in counts}
    rows = [
        f"| {kind} | {row['n']} | {row['exact']:.3f} | {row['interval'][0]:.3f} – {row['interval'][1]:.3f} |"
        for kind, row in found["read"].items()
    ]
    return [
        "| question | documents | whole answers read to the letter | 95 % interval |",
        "|---|---|---|---|",
        *rows,
        "",
        f"{found['values']} values of rightly read answers about {found['documents']} documents, {found['placed']} "
        "with a place, by the default method. The box of a value is "
        f"{percent(found['share'])} of the page in the mean.",
        "",
        "| | mean |",
        "|---|---|",
        f"| highest in the value's own box | {ratio(found['pointing_value'])} |",
        f"| share of the map in the value's box; in label's or value's | {ratio(found['energy'])}; "
        f"{ratio(found['energy_either'])} |",
        f"| part of the value's box that the region has (90 % of the score) | {ratio(found['covered'])} |",
        f"| area of the region | {percent(found['area'])} |",
        f"| IoU of the region and the value's box; both boxes | {ratio(found['iou_value'])}; "
        f"{ratio(found['iou_either'])} |",
        f"| maps that nothing speaks against | {ratio(found['trusted'])} |",
        f"| `check_box` of the value's own box | {told['says_own']} |",
        f"| `check_box` of another value's box | {told['says_other']} |",
    ]


_SEARCHED = {"demo": "the embedded model, held-out scenes", "real parts": "real parts, photographs"}


def search(found: Found) -> list[Goal]:
    return [
        Goal(f"{what} in bfloat16 to float32, {_SEARCHED.get(model, model)}", ours / theirs, None, ratio)
        for model, line in (found.get("models") or {}).items()
        for what, name in (("a pass forward", "forward"), ("a pass forward and backward", "backward"))
        if (ours := at(line, "pass", f"{name} bfloat16")) and (theirs := at(line, "pass", f"{name} float32"))
    ]


def search_more(found: Found) -> list[str]:
    lines: list[str] = []
    for model, line in (found.get("models") or {}).items():
        told = line["pass"]
        lines += [
            f"{_SEARCHED.get(model, model)}: at random masks the score differs by {told['nats']:.2g} nats at most, and "
            f"gradients have a cosine of {told['cosine']:.4f} (medians of {told['n']}). Gain in brackets with its "
            "interval, over images; its difference is paired.",
            "",
            "| method | images | gain, float32 | bfloat16 − float32 | correlation of maps, median, least | time |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in line.items():
            if name == "pass":
                continue
            gain, off = row["float32"]["gain"], row["difference"]
            lines.append(
                f"| {name} | {row['n']} | {gain['estimate']:.3f} [{gain['low']:.3f}, {gain['high']:.3f}] | "
                f"{off['estimate']:+.3f} [{off['low']:+.3f}, {off['high']:+.3f}] | {row['correlation']:.3f}, "
                f"{row['least_correlation']:.3f} | {row['seconds_ratio']:.2f} |"
            )
        lines.append("")
    for model, ways in (found.get("tried") or {}).items():
        lines += [
            f"Tried besides, on {_SEARCHED.get(model, model)}: plain passes of seven images, seconds of the processor "
            "an image, and how far log P of the answer's tokens is off in the mean. Linear layers in int8 are hardly "
            "faster than bfloat16, have no gradient, and give other numbers; `torch.compile` of the decoder's layers "
            "gains next to nothing where matrix products take nearly all the time. Neither was kept.",
            "",
            "| | seconds | nats a token |",
            "|---|---|---|",
            *(f"| {way} | {one['seconds']:.3f} | {one['nats']:.2g} |" for way, one in ways.items()),
            "",
        ]
    return lines


SECTIONS: tuple[Section, ...] = (
    Section(
        "Explaining", "engine.json", "python tests/benchmarks/bench_engine.py",
        "The engine against a plain loop that does what the recipe published with the paper does, on the same model, "
        "words and passes; ours relative to it.", engine, engine_more,
    ),
    Section(
        "Searching in bfloat16", "search.json", "python tests/benchmarks/bench_search.py",
        "`explain(search_dtype=\"bfloat16\")` beside the float32 one on the same answers, both maps scored in float32; "
        "seconds of the processor in one thread, on a processor with AVX512-BF16.", search, search_more,
    ),
    Section(
        "Recording", "recording.json", "python tests/benchmarks/bench_recording.py",
        "generate() with a recording probe relative to generate() without, token by token in turn.",
        recording, recording_more,
    ),
    Section(
        "Growth", "growth.json", "python tests/benchmarks/bench_growth.py",
        "How time and memory grow with the image's and the answer's length.", growth, growth_more,
    ),
    Section(
        "Store", "store.json", "python tests/benchmarks/bench_store.py",
        "What a directory of many traces costs.", store, store_more,
    ),
    Section(
        "Meter", "meter.json", "python tests/benchmarks/bench_meter.py",
        "Whether `lvlm-probe meter` finds answers that contradict their image, and answers that were given without "
        "looking, whatever their length; `lvlm-probe study contradictions` gives the first figure for a model and data "
        "of one's own.",
        meter, meter_more,
    ),
    Section(
        "Judging", "judging.json", "python tests/benchmarks/bench_judging.py",
        "What it takes to judge a map in `lvlm-probe evaluate --methods`, which scores as few points of the curves as "
        "keep each area within 0.005 where curves do not turn, beside making it.", judging, judging_more,
    ),
    Section(
        "Documents", "documents.json", "python tests/benchmarks/bench_documents.py",
        "Whether the document reader of `examples/document_model` reads held-out receipts, tables and forms, and "
        "whether the map of a value stands where it is printed "
        "([Evidence](evidence.md#a-reader-whose-pages-are-known)).",
        documents, documents_more,
    ),
    Section(
        "GPU", "gpu.json", "tests/benchmarks/gpu_run.sh",
        "Models of 7 billion weights with their true geometry and random weights in bfloat16, against the paper's "
        "Table 9 (which names neither the model nor the chip).", gpu, gpu_more,
    ),
    Section(
        "Planner", "planner.json", "python tests/benchmarks/bench_planner.py",
        "Predicted against measured peak memory of every method.", planner, planner_more,
    ),
    Section(
        "Many machines", "ray.json", "python integrations/ray/tests/bench_ray.py",
        "A study through Ray with two workers of one core, on a cluster of two nodes, against one.", ray, ray_more,
    ),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- the page


def read(path: Path) -> Found:
    """A result file, empty where there is none."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise SystemExit(f"{path} holds no result; run the benchmark again")
    return found


def page(results: Path) -> str:
    """The page as Markdown, from the JSON files of a directory."""
    parts: list[str] = []
    met = missed = undecided = open_goals = 0
    for section in SECTIONS:
        found = read(results / section.file)
        goals = section.goals(found)
        verdicts = [goal.verdict for goal in goals if goal.bound is not None]
        met += verdicts.count("met")
        missed += verdicts.count("**missed**")
        open_goals += verdicts.count(NOT_MEASURED)
        undecided += sum(verdict.startswith(UNDECIDED) for verdict in verdicts)
        parts += [f"## {section.title}", "", section.about, "", "| | goal | measured | |", "|---|---|---|---|"]
        parts += [goal.row() for goal in goals]
        if more := section.more(found):
            parts += ["", *more]
        parts += ["", _origin(section, found), ""]
    summary = f"{met} goals met, {missed} missed, {undecided} not decided, {open_goals} not measured."
    head = [
        "# Benchmarks",
        "",
        "Written by `python tests/benchmarks/publish.py` from `tests/benchmarks/results/*.json`; do not edit. Every "
        f"figure comes from the command under its table. {summary}",
        "",
    ]
    text = "\n".join([*head, *parts])
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.rstrip() + "\n"


def _origin(section: Section, found: Found) -> str:
    command = found.get("command", section.command)
    if not found:
        return f"`{command}`: {NOT_MEASURED}."
    versions = {**(found.get("versions") or {}), **found}
    software = ", ".join(
        f"{name} {versions[key]}"
        for name, key in (("Python", "python"), ("lvlm_probe", "lvlm_probe"), ("Ray", "ray"))
        if key in versions
    )
    small = (
        " With tiny models, only to see that everything runs: these figures mean nothing." if found.get("small") else ""
    )
    machine = found.get("machine", "machine unknown")
    if isinstance(machine, Mapping):
        machine = f"{machine['cpu']}, {machine['cores']} cores"
    return f"`{command}`: {machine}; {software}; {found.get('date', 'undated')}.{small}"


# --------------------------------------------------------------------------------------------------------- the promises

FIGURE = re.compile(r"(<!-- figure (\w+) -->).*?(<!-- /figure -->)", re.DOTALL)
REHEARSAL = "**a rehearsal, of {share} of the cases**; "


def promises(text: str, results: Path) -> str:
    """``docs/promises.md`` with the figures of ``campaign.json`` between its marks."""
    found = read(results / "campaign.json")
    campaigns: Mapping[str, Found] = found.get("campaigns", {})

    def figure(mark: re.Match[str]) -> str:
        return f"{mark[1]}{_tried(campaigns.get(mark[2]))}{mark[3]}"

    before = read(results / "campaign-before.json")
    return between(FIGURE.sub(figure, text), "campaigns", _campaigns(found, campaigns, before))


def between(text: str, mark: str, lines: Sequence[str]) -> str:
    """A page with these lines between ``<!-- mark -->`` and ``<!-- /mark -->``; without any, that nothing is known."""
    told = "\n".join(lines) or NOT_MEASURED
    place = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    return place.sub(lambda found: f"{found[1]}{told}\n{found[2]}", text)


def _tried(one: Found | None) -> str:
    if one is None:
        return NOT_MEASURED
    broken = sum(one["broken"].values())
    return f"{one['tried']:,} {one['unit']}, {f'**{broken:,} broken**' if broken else '0 broken'}"


def _campaigns(found: Found, campaigns: Mapping[str, Found], before: Found) -> list[str]:
    if not campaigns:
        return []
    titles = ("campaign", "tried", "broken", "broken before", "also counted; the worst met", "minutes", "commit")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    notes: list[str] = []
    for name, one in campaigns.items():
        more = [f"{count:,} {what}" for what, count in one["counts"].items()]
        more += [f"{what}: {value:,.6g}" for what, value in one["worst"].items()]
        broken = sum(one["broken"].values())
        lines.append(
            f"| {name}: {one['promise']} | {one['tried']:,} {one['unit']} | {f'**{broken:,}**' if broken else 0} "
            f"| {at(before, 'campaigns', name) or '–'} "
            f"| {'; '.join(more)} | {one['processor seconds'] / 60:.0f} | {one['commit']} |"
        )
        notes += [f"* {name}: {count:,} × {kind}" for kind, count in one["broken"].items()]
    machine, versions = found["machine"], found["versions"]
    software = ", ".join([f"Python {found['python']}", *(f"{name} {version}" for name, version in versions.items())])
    head = "" if found["scale"] >= 1 else REHEARSAL.format(share=f"{found['scale']:g}")
    lines += [
        "",
        f"{head}{machine['cpu']}, {machine['cores']} cores; {software}; {found['date']}, seed {found['seed']}. Minutes "
        "are of one core." + (f" Before: commit {before['commit']}, at small scale." if before else ""),
    ]
    if notes:
        lines += ["", "Broken:", "", *notes]
    return lines


def served(text: str, results: Path) -> str:
    """``docs/served.md`` with the figures of ``served.json`` between its marks."""
    found = read(results / "served.json")
    return between(text, "served", _served(found) if found else [])


def _served(found: Found) -> list[str]:
    """What a real engine and the model itself agree on, part by part of the campaign; what was not run is not told."""
    lines = [
        "| road | scenes | largest difference | mean | RISE maps, Spearman | occlusion maps, Spearman | measured |",
        "|---" * 7 + "|",
    ]
    roads = [road for road in ("tokens", "chat") if at(found, road, "scenes")]
    for road in roads:
        scenes = at(found, road, "scenes")
        mean = sum(one["mean"] * one["numbers"] for one in scenes) / sum(one["numbers"] for one in scenes)
        maps = [[one[name]["spearman"] for one in scenes if "spearman" in one[name]] for name in ("rise", "occlusion")]
        spans = " | ".join(f"{min(one):.4f} to {max(one):.4f}" if one else "–" for one in maps)
        largest, when = max(one["largest"] for one in scenes), at(found, road, "date")
        lines.append(f"| {road} | {len(scenes)} | {largest:.1g} nats | {mean:.1g} nats | {spans} | {when} |")
    lines.append("")
    for road in roads:
        lines += _served_road(found, road)
    for name, told in (("trouble", _served_trouble), ("qwen", _served_qwen), ("lens", _served_lens)):
        lines += told(at(found, name)) if at(found, name) else []
    if kept := at(found, "sampled"):
        lines.append(
            f"* Middleware `sample_requests`, {kept['asked']} requests, {kept['streamed']} of them streamed: "
            f"{kept['same_answers']} answered as when nobody looks; {kept['kept']} kept, {kept['kept_as_answered']} of "
            f"them word for word, {kept['traces']} made traces ({kept['date']})."
        )
    if batch := at(found, "batch"):
        lines.append(
            f"* Answers that `vllm run-batch` wrote: {batch['imported']} of {batch['rows']} imported; for "
            f"{batch['compared']} the engine gave log-probabilities, at most {batch['largest']:.1g} nats away."
        )
    if at(found, "transformers_serve", "refused"):
        lines.append(f"* `transformers serve` is refused: {at(found, 'transformers_serve', 'refused')}")
    return [
        *lines,
        "* Both sides have image processors of their own (torchvision in the engine, Pillow here), which is most of "
        "the largest difference.",
    ]


def _served_road(found: Found, road: str) -> list[str]:
    """Scores, requests and throughput on one road."""
    gains = [
        abs(one[name]["insertion"][0] - one[name]["deletion"][0] - one[name]["insertion"][1] + one[name]["deletion"][1])
        for one in at(found, road, "scenes")
        for name in ("rise", "occlusion")
        if "insertion" in one[name]
    ]
    spent = at(found, road, "spent")
    rates = [one["masked_images_per_second"] for one in at(found, road, "scenes") if "masked_images_per_second" in one]
    lines = [
        f"* {road}: insertion − deletion of a map through the server and of the local one at most {max(gains):.1g} "
        f"apart; {spent['requests']:,} requests, {spent['retries']:,} of which were sent again.",
    ]
    if rates:
        told = []
        for name in ("exact_one_by_one", "fast_by_sixteen"):
            ratios = [one["server"] / one[name] for one in rates]
            told.append(f"{statistics.median(ratios):.2g} ({min(ratios):.2g} to {max(ratios):.2g})")
        lines.append(
            f"* {road}, throughput: masked images per second through the server, eight at a time, are {told[0]} times "
            f"those of exact passes here one by one, and {told[1]} times those of fast passes by sixteen (median and "
            f"span of {len(rates)} scenes; on each, both sides one after the other, one thread each, under a load of "
            f"{min(one['load'] for one in rates):.0f} to {max(one['load'] for one in rates):.0f})."
        )
    return lines


def _served_trouble(found: Found) -> list[str]:
    """Faults, kills, and roads that give less than log-probabilities."""
    faults, killed, meter = found["faults"], found["killed"], found["meter"]
    bad = sum(faults[name] for name in ("429", "503", "dropped"))
    lines = [
        f"* Through a proxy that failed {bad:,} of {bad + faults['handed on']:,} requests (429, 503, dropped): "
        f"{faults['retries']:,} retries, the map {'identical' if faults['same_map'] else '**another one**'}.",
        f"* Killed (`kill -9`) in the middle of a map and started again: {killed['reused']:,} answers reused, "
        f"{killed['asked']:,} requests sent, the map {'identical' if killed['same_map'] else '**another one**'}.",
        f"* A `meter` of {meter['answers']} answers killed in the middle and started again: {meter['asked']} requests "
        f"sent anew; ratios at most {meter['largest_llr_difference']:.1g} nats from those of the model itself.",
    ]
    for road, one in found["less"].items():
        facts = one.get("diagnostics") or {}
        told = (
            f"Spearman {one['spearman']:.3f} with the map by log-probabilities" if "spearman" in one else one["reason"]
        )
        told += f", off by at most {facts['bound_max']:.0%} of the peak" if "bound_max" in facts else ""
        told += f", mean standard error {facts['standard_error_mean']:.0%} of the peak" if facts else ""
        lines.append(f"* {road}, RISE with 300 masks, {one['requests']:,} requests: {told}.")
    return lines


def _served_qwen(found: Found) -> list[str]:
    """Another family."""
    same = [one for one in found["scenes"] if one.get("same_tokens")]
    if not same:
        return []
    largest, numbers = max(one["largest"] for one in same), sum(one["numbers"] for one in same)
    return [
        "* A tiny Qwen2-VL with random weights (M-RoPE, images of any size), tokens road: at most "
        f"{largest:.1g} nats apart over {numbers:,} log-probabilities of {len(same)} answers."
    ]


def _served_lens(found: Found) -> list[str]:
    """Attention from inside the engine."""
    scenes = found["scenes"]
    rows, boxes = (max(one[name] for one in scenes) for name in ("largest", "boxes"))
    return [
        f"* Attention rows imported from vllm-lens, {len(scenes)} scenes: at most {rows:.1g} from those recorded on "
        f"the model itself; maps by `attention`: Spearman {min(one['spearman'] for one in scenes):.4f} or more; token "
        f"boxes at most {boxes:.1g} pixels apart."
    ]


def adaptive(text: str, results: Path) -> str:
    """``docs/methods.md`` with what ``adaptive.json`` says of the default of iGOS++ between its marks."""
    found = json.loads(path.read_text(encoding="utf-8")) if (path := results / "adaptive.json").exists() else []
    return between(text, "adaptive", _adaptive(found))


_NEAREST = 7
"""Other maps that the default of iGOS++ is compared with in words."""


def _adaptive(found: Sequence[Found]) -> list[str]:
    """The default beside the fixed settings, model by model."""
    if not found:
        return []
    titles = (
        "answers of", "n", "default: gain", "share of thorough's", "fast: share", "forward passes", "went on",
        "trusted: default, fast, thorough", "a blob in the middle: gain",
    )  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for one in found:
        own = {name: one["settings"][name] for name in ("default", "fast", "thorough")}
        low, high = one["share_interval"]
        passes = own["default"]["forward"]
        cells = (
            one["model"] + (", hard scenes" if one["hard"] else ""),
            str(one["scenes"]),
            _mean(own["default"]["gain"]),
            f"{one['share_of_thorough']:.3f} [{low:.3f}, {high:.3f}]",
            f"{one['fast_share_of_thorough']:.3f}",
            f"{passes['mean']:.0f} [{passes['low']:.0f}, {passes['high']:.0f}], at most "
            f"{own['default']['most_forward']}",
            f"{one['went_on']} of {one['scenes']}",
            ", ".join(str(row["trusted"]) for row in own.values()),
            _mean(one["center"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    machines = dict.fromkeys(f"{one['machine']}, {one['date']}" for one in found)
    lines += ["", f"Held-out answers; mean [95 % bootstrap interval]. {'; '.join(machines)}."]
    for one in found:
        others = sorted(one.get("ahead_of", {}).items(), key=lambda item: item[1]["mean"])
        if others:
            near = ", ".join(
                f"{name} {cell['mean']:+.3f} [{cell['low']:+.3f}, {cell['high']:+.3f}]"
                + ("" if cell["n"] == one["scenes"] else f" ({cell['n']} answers)")
                for name, cell in others[:_NEAREST]
            )
            lines += ["", f"Gain of the default less that of others, the nearest first, {one['model']}: {near}."]
    return lines


def _mean(cell: Found) -> str:
    return f"{cell['mean']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"


_PARTS_THAT_WORK = {
    "verify": "replay is the recording", "gradients": "6 methods by gradients", "attention": "attention, rollout, tam",
    "masks": "rise, occlusion, greedy", "evaluate": "evaluate", "knockout": "knockout", "plan": "plan",
}  # fmt: skip


def quantised(text: str, results: Path) -> str:
    """``docs/reality.md`` with the tables of ``quantised.json`` between its marks."""
    found = read(results / "quantised.json")
    return between(text, "quantised", _quantised(found) if found else [])


def _quantised(found: Found) -> list[str]:
    """What works on weights of every kind, and how close to single precision it is."""
    kinds: dict[str, Found] = {name: line for name, line in found["kinds"].items() if "works" in line}
    lines = [f"| weights | recorded | {' | '.join(_PARTS_THAT_WORK.values())} |"]
    lines.append("|---" * (2 + len(_PARTS_THAT_WORK)) + "|")
    for name, line in kinds.items():
        works = line["works"]
        recorded = works["record"] + ("" if works["boxes"] else ", no boxes")
        cells = ["yes" if works[part] == "yes" else "no, says so" for part in _PARTS_THAT_WORK]
        lines.append(f"| {name} | {recorded} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Against float32, of {found['scenes']} answers: bytes that the model is kept in, and of the same tokens the "
        "largest difference of log P, the cosine of the gradient of log P to an 8 × 8 mask, and the correlation of "
        "maps; the median, and the worst answer.",
        "",
        "| weights | kept in | same answer | log P, nats | gradient, cosine | igos++, r | occlusion, r |",
        "|---" * 7 + "|",
    ]
    for name, line in kinds.items():
        cells = [
            f"{100 * line['weights'] / found['float32']:.0f}\u00a0%",
            f"{line['same answers']} of {found['scenes']}",
        ]
        cells += [_spread(line.get(part), worst) for part, worst in (
            ("log_probs", "most"), ("gradient", "least"), ("igos++", "least"), ("occlusion", "least"),
        )]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    beside = {library: version for library, version in found["versions"].items() if library not in found["machine"]}
    versions = ", ".join(f"{library} {version}" for library, version in beside.items())
    return [*lines, "", f"`{found['command']}`: {found['machine']}; {versions}; {found['date']}."]


def _spread(figure: Found | None, worst: str) -> str:
    if figure is None:
        return "–"
    if worst == "most":
        return f"{figure['median']:.1g}, {figure[worst]:.1g}"
    return f"{figure['median']:.3f}, {figure[worst]:.3f}"


def app(text: str, results: Path) -> str:
    """``docs/guides/app.md`` with the latencies of ``app.json`` between its marks."""
    found = read(results / "app.json")
    return between(text, "app figures", _app(found) if found else [])


def _app(found: Found) -> list[str]:
    """When the first word of an answer is there, and when it is coloured."""
    lines = ["| | plain streaming | the app |", "|---|---|---|"]
    for what, told in (("first", "first word"), ("whole", "whole answer"), ("coloured", "coloured words")):
        cells = [found["seconds"].get(f"{kind}_{what}") for kind in ("plain", "app")]
        lines.append(f"| {told} | {' | '.join('–' if cell is None else milliseconds(1e3 * cell) for cell in cells)} |")
    model = "the embedded model" if found["model"] == "demo" else found["model"]
    first, coloured = (found["of_plain_first"][what] for what in ("first", "coloured"))
    return [
        *lines,
        "",
        f"Median of {len(found['rounds'])} questions to {model}, asked in turn, from the question on. Of the time to "
        f"plain streaming's first word, the app's takes {first:.1f} times, its first coloured one {coloured:.1f} "
        "times: it waits for the whole answer, the pass on the baseline image and the trace on disk. The first image "
        "of a size took "
        f"{milliseconds(1e3 * found['first_image_of_a_size']['coloured'])}.",
        "",
        f"`{found['command']}`: {found['machine']}; {found['date']}.",
    ]


def main(arguments: list[str] | None = None) -> None:
    """Write the page, and the figures of the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--promises", type=Path, help="page to fill; by default the own results' own")
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page(options.results), encoding="utf-8")
    print(f"written to {options.out}")
    own = ROOT / "docs" / "promises.md" if options.results == parser.get_default("results") else None
    pages = {page_of: promises} if (page_of := options.promises or own) is not None else {}
    if own is not None:
        docs = ROOT / "docs"
        pages |= {docs / "served.md": served, docs / "methods.md": adaptive, docs / "reality.md": quantised}
        pages |= {docs / "guides" / "app.md": app}
    for path, filled in pages.items():
        path.write_text(filled(path.read_text(encoding="utf-8"), options.results), encoding="utf-8")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
