"""Demo scenes, answered by the demo model and ready to be explained; shared by the benchmarks of explanations."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lvlm_probe as probe
from lvlm_probe.demo import Scene
from lvlm_probe.replaying import Replay
from lvlm_probe.selection import TokenSelection

POINTING_TOLERANCE = 15
"""Pixels by which the highest point may miss the object: the margin the pointing game was defined with (Zhang et al.,
2018). It is less than a cell of a 16 × 16 mask on these pictures of 336 × 336 pixels, which is 21 pixels wide."""


@dataclass(frozen=True)
class Case:
    """One scene whose answer is right and rests on the picture, with its tokens and a verified baseline."""

    scene: Scene
    replay: Replay
    selection: TokenSelection


def cases(
    split: str,
    wanted: int,
    directory: Path,
    *,
    skipped: Counter[str],
    after: int = -1,
    hard: bool = False,
    model: Path | None = None,
) -> Iterator[Case]:
    """Yields ``wanted`` cases of a split in order, from scene ``after + 1`` on.

    With ``hard`` they are hard scenes. ``model`` is the folder of the checkpoint that answers them, by default the demo
    model; for hard scenes, one that ``examples/train_hard_model.py`` has written.

    Scenes answered wrongly, or without a token whose LLR exceeds 1, are passed over and counted in ``skipped``: the
    ground-truth mask is that of the right answer, and nothing can be localised where the picture has no say.
    """
    llava, processor = probe.demo.load() if model is None else _load(model)
    index, found = after + 1, 0
    while found < wanted:
        (scene,) = probe.demo.scenes(1, split=split, start=index, hard=hard)
        index += 1
        attached = probe.attach(llava, processor)
        try:
            inputs = processor.apply_chat_template(
                scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            with attached.record(directory, images=[scene.image]):
                llava.generate(**inputs, max_new_tokens=32, do_sample=False)
        finally:
            attached.detach()
        trace = probe.open_store(directory)[-1]
        if trace.answer.strip() != scene.answer:
            skipped["answered wrongly"] += 1
            continue
        replay = probe.replay(trace, llava, processor)
        selection = probe.select_tokens(replay)
        if not selection:
            skipped["no token with LLR > 1"] += 1
            continue
        found += 1
        yield Case(scene, replay.strengthened(selection.indices), selection)


def _load(directory: Path) -> tuple[Any, Any]:
    return probe.load(directory)  # which finds families that plugins bring


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; a last line cut off by an interruption is dropped."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return records


def machine() -> str:
    """The machine and the software, in one line."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{name}, {torch.get_num_threads()} thread(s), {versions}"
