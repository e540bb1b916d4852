"""A study that never was: records, traces and maps made up without a model, for the tests of a study's pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_samples
from PIL import Image

from lvlm_probe.heatmap import Heatmap
from lvlm_probe.selection import TokenSelection
from lvlm_probe.study.pages import stored as loading
from lvlm_probe.study.results import Results
from lvlm_probe.study.spec import DatasetSpec, MethodSpec, ModelSpec, Study

PIECES = report_samples.PIECES
SELECTED = (8,)  # " red"


def study(out: Path, models: tuple[str, ...], methods: tuple[str, ...]) -> Study:
    return Study(
        "made up",
        out,
        {name: ModelSpec(name, "nowhere") for name in models},
        {"scenes": DatasetSpec("scenes", "demo", "eval", limit=2000)},
        {name: MethodSpec(name, "center") for name in methods},
    )


def results(
    out: Path,
    samples: int,
    *,
    models: tuple[str, ...] = ("first", "second"),
    methods: tuple[str, ...] = ("igos++", "center"),
    question: str = "What colour is carousel {n}?",
) -> Results:
    """Records of so many samples; deletion falls and insertion rises with the sample's number."""
    answers: list[dict[str, Any]] = []
    maps: list[dict[str, Any]] = []
    for n in range(samples):
        for m, model in enumerate(models):
            key = f"{n:06d}{m:02d}"
            about = {"model": model, "dataset": "scenes", "sample": str(n), "group": "even" if n % 2 == 0 else "odd"}
            correct = (n + m) % 3 != 0
            answers.append(
                {
                    **about,
                    "key": key,
                    "status": "done",
                    "question": question.format(n=n),
                    "answer": "".join(PIECES[:-1]),
                    "true_answer": "red",
                    "choices": [],
                    "picture": f"{n}",
                    "correct": correct,
                    "drop": 0.9,
                    "drop_normalised": 0.5,
                }
            )
            for k, method in enumerate(methods):
                maps.append(
                    {
                        **about,
                        "key": f"{key}{k}",
                        "answer": key,
                        "row": method,
                        "status": "done",
                        "map": f"{key}{k}.h5",
                        "correct": correct,
                        "text": "red",
                        "deletion": round(0.5 - 0.5 * n / samples, 4),
                        "insertion": round(0.4 + 0.5 * n / samples, 4),
                        "trusted": k == 0,
                        "verdict": "no objection" if k == 0 else "do not trust: too many ties; it is only a test",
                    }
                )
    kept = tuple(str(n) for n in range(samples))
    return Results(study(out, models, methods), tuple(answers), tuple(maps), {"scenes": kept}, {"scenes": {}})


def open_without_files(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int] = (96, 72), cells: int = 8) -> None:
    """Lets pages take pictures, words and maps from here instead of a study's files. Half of the maps have a map of
    their one word."""

    trace: Any = report_samples.trace()
    selection = TokenSelection(SELECTED, tuple(PIECES), tuple(report_samples.LLR), "llr")

    def opened(self: loading.Stored, key: loading.Key) -> loading.Opened:
        generator = np.random.default_rng(int(key[1]))
        coarse = Image.fromarray(generator.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        picture = coarse.resize(size, Image.Resampling.BICUBIC)
        heats, words = {}, {}
        for number, place in enumerate(self.maps.get(key, {})):
            values = generator.random((cells, cells)).astype(np.float32)
            heats[place] = Heatmap(values / values.max(), size, selection=selection, method="made up")
            word = {"text": "red", "tokens": list(SELECTED), "map": "word_0", "values": values[::-1] / values.max()}
            words[place] = [word] if number % 2 == 0 else []
        return loading.Opened(picture, dict.fromkeys(self.answers[key], trace), heats, words)

    monkeypatch.setattr(loading.Stored, "_open", opened)
