"""How passes, time and memory grow with the number of a video's frames: iGOS++ and greedy search.

    python tests/benchmarks/bench_clips.py    # needs torchvision; a minute on one core

A tiny Qwen2-VL with random weights is shown 4 to 64 frames of 90 × 60 pixels, 6 image tokens for every two frames, and
explained by iGOS++ (preset "fast", whose passes are fixed, and a mask of 8 × 8 cells), and by greedy search over
16 regions of a grid in 4 stretches of time. What grows here with the frames is the length of the prompt; the share of
the vision encoder is that of the tiny model.

Memory is the most bytes of tensors alive at once beyond what was alive before (``judging.peak_memory``); masks go
through one at a time. Time is processor seconds of the one thread there is, without the profiler, of one run.

Writes ``results/clips.json`` and the table in ``docs/guides/videos.md``.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "families")]

import torchvision_shim  # noqa: E402, F401  (before anything imports torchvision)

import clips  # noqa: E402  # isort: skip
import torch  # noqa: E402
from judging import peak_memory  # noqa: E402
from random_model import write_results  # noqa: E402

import lvlm_probe as probe  # noqa: E402

FRAMES = (4, 8, 16, 32, 64)
METHODS: dict[str, dict[str, Any]] = {
    "igos++": {"size": 8, "preset": "fast"},
    "greedy": {"segments": "grid", "regions": (2, 2), "stretches": 4},
}
RESULTS = Path(__file__).parent / "results" / "clips.json"
PAGE = Path(__file__).parents[2] / "docs" / "guides" / "videos.md"
MARK, END = "<!-- growth -->", "<!-- /growth -->"


def measure(frames: int) -> list[dict[str, Any]]:
    """A line for each method."""
    built = clips.built("qwen2_vl")
    with tempfile.TemporaryDirectory() as folder:
        with probe.attach(built.model, built.processor) as p, p.record(folder) as recording:
            built.generate(clips.clip_inputs(built, [clips.frames(frames)]))
        replay = probe.replay(recording.traces[0], built.model, built.processor, micro_batch=1)
        lines = []
        for method, params in METHODS.items():
            found: list[Any] = []

            def run(method: str = method, params: dict[str, Any] = params, found: list[Any] = found) -> None:
                found.append(probe.video.explain(replay, method=method, tokens=[0, 1], progress=False, **params))

            started = time.process_time()
            run()
            seconds = time.process_time() - started
            short = {"iterations": 1} if method == "igos++" else {"regions": (1, 1)}  # the same pass, fewer times
            peak = peak_memory(lambda method=method, all_={**params, **short}: probe.video.explain(
                replay, method=method, tokens=[0, 1], progress=False, **all_
            ))  # fmt: skip
            passes = found[0].provenance["passes"]
            line = {"method": method, "frames": frames, "tokens": len(recording.traces[0].image_positions)}
            lines.append({**line, **passes, "seconds": round(seconds, 2), "peak": peak})
            print(lines[-1], flush=True)
    return lines


def table(result: dict[str, Any]) -> str:
    """The table of the page."""
    lines = [
        "| frames | image tokens | "
        + " | ".join(f"`{method}` passes forward / backward | s | MB" for method in METHODS) + " |",
        "|---|---|" + "---|---|---|" * len(METHODS),
    ]  # fmt: skip
    for frames in FRAMES:
        own = [line for line in result["lines"] if line["frames"] == frames]
        cells = [
            f"{line['forward']:,} / {line['backward']} | {line['seconds']:.1f} | {line['peak'] / 1e6:.1f}"
            for line in own
        ]
        lines.append(f"| {frames} | {own[0]['tokens']} | {' | '.join(cells)} |")
    where = f"{result['machine']}, {result['date']}"
    return "\n".join([*lines, "", f"`python tests/benchmarks/bench_clips.py`; {where}."]) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines = [line for frames in FRAMES for line in measure(frames)]
    write_results(RESULTS, {"lines": lines})
    import json

    text, made = PAGE.read_text(encoding="utf-8"), table(json.loads(RESULTS.read_text(encoding="utf-8")))
    start, _, rest = text.partition(f"{MARK}\n")
    PAGE.write_text(f"{start}{MARK}\n{made}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
