"""Demo scenes or stored images, answered by a model and ready to be explained; what benchmarks of methods share."""

from __future__ import annotations

import itertools
import json
import platform
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import lvlm_probe as probe
from lvlm_probe.demo import Scene
from lvlm_probe.recording.answering import record_answer
from lvlm_probe.replaying import Replay
from lvlm_probe.selection import TokenSelection

POINTING_TOLERANCE = 15
"""Pixels by which the highest point may miss the object: the margin the pointing game was defined with (Zhang et al.,
2018). It is less than a cell of a 16 × 16 mask on these pictures of 336 × 336 pixels, which is 21 pixels wide."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A line of ``cases.jsonl``, in the place of a scene.

    Attributes:
        index: its line, from 0.
        words: an answer is right that has one of these; without any, every answer is taken.
        mask: ``(row, col)`` bool, the objects that the answer needs; ``None`` where nobody marked them.
    """

    index: int
    image: Image.Image
    question: str
    words: tuple[str, ...]
    kind: str
    mask: np.ndarray | None

    @property
    def answer(self) -> str:
        """What is expected."""
        return " or ".join(self.words)

    def is_right(self, answer: str) -> bool:
        return not self.words or any(re.search(rf"\b{re.escape(word)}", answer, re.IGNORECASE) for word in self.words)


def stored(folder: Path) -> Iterator[Stored]:
    """The images of a folder, as ``photographs.py`` writes them: ``cases.jsonl``, images and masks beside it."""
    for index, line in enumerate((folder / "cases.jsonl").read_text(encoding="utf-8").splitlines()):
        record = json.loads(line)
        with Image.open(folder / record["image"]) as opened:
            image = opened.convert("RGB")
        mask = None
        if record.get("mask"):
            with Image.open(folder / record["mask"]) as opened:
                mask = np.asarray(opened.convert("L")) >= 128
        yield Stored(index, image, record["question"], tuple(record["words"]), record["kind"], mask)


@dataclass(frozen=True)
class Case:
    """One scene whose answer is right and rests on the picture, with its tokens and a verified baseline."""

    scene: Scene | Stored
    replay: Replay
    selection: TokenSelection
    shared: dict[Any, Any] = field(default_factory=dict)
    """What heatmaps of it are both judged on (``evaluate``)."""


def cases(
    split: str,
    wanted: int,
    directory: Path,
    *,
    skipped: Counter[str],
    after: int = -1,
    hard: bool = False,
    model: Path | None = None,
    images: Path | None = None,
) -> Iterator[Case]:
    """Yields ``wanted`` cases of a split in order, from scene ``after + 1`` on; of a folder as many as there are.

    With ``hard`` they are hard scenes, with ``images`` those stored in this folder. ``model`` is the folder of the
    checkpoint that answers them, by default the demo model; for hard scenes, one that ``examples/train_hard_model.py``
    has written.

    Scenes answered wrongly, or without a token whose LLR exceeds 1, are passed over and counted in ``skipped``: the
    ground-truth mask is that of the right answer, and nothing can be localised where the picture has no say.
    """
    llava, processor = probe.demo.load() if model is None else _load(model)
    found = 0
    for scene in _scenes(split, after + 1, hard=hard, images=images):
        if found == wanted:
            return
        options = {"max_new_tokens": 32}
        record_answer(llava, processor, [scene.image], scene.question, directory, generate=options)
        trace = probe.open_store(directory)[-1]
        if not (scene.is_right(trace.answer) if isinstance(scene, Stored) else trace.answer.strip() == scene.answer):
            skipped["answered wrongly"] += 1
            continue
        replay = probe.replay(trace, llava, processor)
        selection = probe.select_tokens(replay)
        if not selection:
            skipped["no token with LLR > 1"] += 1
            continue
        found += 1
        yield Case(scene, replay.strengthened(selection.indices), selection)


def _scenes(split: str, start: int, *, hard: bool, images: Path | None) -> Iterator[Scene | Stored]:
    if images is not None:
        yield from itertools.islice(stored(images), start, None)
        return
    for index in itertools.count(start):
        yield from probe.demo.scenes(1, split=split, start=index, hard=hard)


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
