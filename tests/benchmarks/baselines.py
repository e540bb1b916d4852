"""Why TAM and Grad-CAM stand low: the part of docs/tournament.md that says so.

    python tests/benchmarks/baselines.py
    python tests/benchmarks/baselines.py --hard --model examples/hard_model
    python tests/benchmarks/baselines.py --cases runs/photographs --model runs/real/model --scenes 24 --split eval
    python tests/benchmarks/baselines.py --fill

On scenes kept for tuning, maps are made of every layer that a method could have been built on. Asked of each:

* AUC: does an image token inside the objects that the answer needs score above one outside (1: always, 0.5: a coin)?
* rank: at which place of the vocabulary is the word, read by the logit lens, at tokens inside and at tokens outside?
* gain: insertion − deletion of the map, as the tournament judges it (not of stored images, whose passes are slow).

Grad-CAM is ReLU(Σ_c w_c A_c) with w_c the mean of ∂y/∂A_c over tokens; *unpooled* leaves the mean out.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from held_out import Case, cases, machine
from judging import GRID, STEPS, figure, fill, scene_arguments, settle, write
from torch import Tensor
from tqdm import tqdm

import lvlm_probe as probe
from lvlm_probe.boxes.encoder_tokens import (
    blocks_of,
    encoder_tokens,
    encoders_of,
    feature_map_boxes,
    is_convolutional,
)
from lvlm_probe.boxes.image_tokens import image_tokens
from lvlm_probe.boxes.painting import have_extent, paint, pitch
from lvlm_probe.explainers.registry import Problem
from lvlm_probe.explainers.scores import finish

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
TOLERANCE = 0.04
"""How far an area of a curve may be off: three quarters of the passes are saved, and means are within less."""
RANKED, LARGE = (100, 20), 10_000
"""Words that the lens is asked for at every token, of a vocabulary as large as this fewer; one further down counts as
that rank."""

SIGNS: dict[str, Callable[[Tensor], Tensor]] = {
    "ReLU": lambda values: values.clamp(min=0),
    "absolute": Tensor.abs,
    "signed": lambda values: values,
}


def inside(boxes: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The share of each box that the mask covers, ``(token,)``."""
    total = np.pad(np.cumsum(np.cumsum(mask.astype(np.float64), axis=0), axis=1), ((1, 0), (1, 0)))
    x0, y0, x1, y1 = np.rint(boxes).astype(int).T.clip(0)
    x1, y1 = np.minimum(x1, mask.shape[1]), np.minimum(y1, mask.shape[0])
    area = np.maximum((x1 - x0) * (y1 - y0), 1)
    covered: np.ndarray = (total[y1, x1] - total[y0, x1] - total[y1, x0] + total[y0, x0]) / area
    return covered


def apart(share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens are inside, half as covered as the one that is covered most, and which outside altogether: objects
    are smaller than tokens here and there."""
    return share >= max(1e-6, share.max() / 2), share == 0


def auc(values: np.ndarray, share: np.ndarray) -> float:
    """P(a token inside scores above one that is outside), ties half; NaN without either kind."""
    high, low = (values[which] for which in apart(share))
    if not len(high) or not len(low):
        return math.nan
    return float(np.mean((high[:, None] > low) + 0.5 * (high[:, None] == low)))


def gain(case: Case, values: Tensor, boxes: np.ndarray) -> float:
    """Insertion − deletion of values per token, NaN where all are the same."""
    size = case.replay.image_sizes[0]
    outcome = finish(*paint(values, boxes, size, pitch(boxes, size)), {})
    if outcome.values is None:
        return math.nan
    heat = probe.Heatmap(
        outcome.values.numpy(), size, selection=case.selection, method="of one layer", trace=case.replay.trace
    )
    return judged_gain(case, heat)


def judged_gain(case: Case, heat: probe.Heatmap) -> float:
    """Insertion − deletion, each area within ``TOLERANCE``."""
    how = {"grid": GRID, "tie_orders": 1, "shared": case.shared, "center": False}
    return probe.evaluate(
        heat, case.replay, baseline=case.replay.baseline, steps=STEPS, sampling="adaptive", tolerance=TOLERANCE, **how
    ).gain


def cam(activations: Tensor, gradients: Tensor, *, pooled: bool) -> Tensor:
    """Σ_c w_c A_c of tokens ``(token, channel)``, before any sign."""
    weights = gradients.mean(dim=0) if pooled else gradients
    return (weights * activations).sum(dim=-1)


def layers(case: Case) -> dict[str, tuple[str, bool]]:
    """Name in the table → module, and whether its tokens are the language model's sequence. The last layer's image
    tokens have none: nothing reads them."""
    replay = case.replay
    found: dict[str, tuple[str, bool]] = {}
    encoder = encoders_of(replay)[0]
    modules = dict(replay.model.named_modules())
    blocks = blocks_of(replay.model, encoder)
    for number, path in enumerate(blocks, start=1):
        if number < len(blocks) and is_convolutional(replay.model, encoder):
            continue  # cells by the ten thousand
        found[f"encoder, block {number} of {len(blocks)}"] = (path, False)
        norm = next((f"{path}.{name}" for name in ("layer_norm1", "norm1") if f"{path}.{name}" in modules), None)
        if norm and number == len(blocks):
            found["its input norm"] = (norm, False)
    decoder = replay.anatomy.decoder
    count = len(modules[f"{decoder}.layers"])
    for number in range(1, count):
        found[f"language model, layer {number} of {count}"] = (f"{decoder}.layers.{number - 1}", True)
    return found


def grad_cam(case: Case, *, judge: bool) -> dict[str, dict[str, float]]:
    """AUC and gain of every layer, sign and pooling."""
    replay, mask = case.replay, case.scene.mask
    problem = Problem(replay, case.selection)
    named, last = layers(case), blocks_of(replay.model, encoders_of(replay)[0])[-1]
    with replay.capture(modules=[module for module, _ in named.values()]) as seen:
        replay.score_and_grad(torch.ones(1, 1, 1), problem.score)
    image, lines = image_tokens(replay, 0), {}
    for name, (module, sequence) in named.items():
        if module not in seen.gradients:
            continue
        given = [part[module].double() for part in (seen.outputs, seen.gradients)]
        boxes, at = image.boxes, torch.from_numpy(image.positions)
        if not sequence and given[0].ndim == 4:  # a convolutional stage, (view, channel, row, col)
            boxes = feature_map_boxes(replay, module, given[0], 0)
            given = [part.flatten(2).transpose(1, 2) for part in given]
        elif not sequence:
            boxes = encoder_tokens(replay, encoders_of(replay)[0]).boxes
        at = at if sequence else torch.arange(len(boxes))
        at, boxes = at[torch.from_numpy(have_extent(boxes))], boxes[have_extent(boxes)]
        given = [part.reshape(-1, part.shape[-1])[at] for part in given]
        share = inside(boxes, mask)
        for pooled in (True, False):
            for sign, cut in SIGNS.items() if module.startswith(last) else [("ReLU", SIGNS["ReLU"])]:
                values = cut(cam(*given, pooled=pooled))
                line = {"auc": auc(values.numpy(), share)}
                if judge:
                    line["gain"] = gain(case, values, boxes)
                lines[f"{name} | {'pooled' if pooled else 'unpooled'} | {sign}"] = line
    return lines


def words(case: Case, *, judge: bool) -> dict[str, dict[str, float]]:
    """What the image tokens say of the word, layer by layer: AUC of its logit, and its rank inside and outside."""
    replay, mask = case.replay, case.scene.mask
    known = len(replay.model.get_output_embeddings().weight)
    lens = probe.causal.logit_lens(replay, top=min(RANKED[known >= LARGE], known))
    share = inside(lens.boxes, mask)
    wanted = [int(replay.token_ids[step]) for step in case.selection.indices]
    lines = {}
    for layer, ids in enumerate(lens.token_ids):
        ranks = np.stack(
            [np.where((ids == word).any(1), (ids == word).argmax(1) + 1, ids.shape[1]) for word in wanted]
        ).mean(axis=0)
        lines[f"layer {layer + 1} of {len(lens.token_ids)}"] = {
            "auc": auc(-ranks, share),
            **{
                where: float(np.median(ranks[which])) if which.any() else math.nan
                for where, which in zip(("inside", "outside"), apart(share), strict=True)
            },
        }
    boxes = image_tokens(replay, 0).boxes
    for name, method, params in (
        ("w·h alone", "tam", {"interference": False, "filtered": False}),
        ("without the filter", "tam", {"filtered": False}),
        ("TAM", "tam", {}),
        ("attention, for comparison", "attention", {}),
    ):
        heat = probe.explain(replay, method=method, tokens=case.selection, strengthen=False, **params)
        if heat.values is None:
            lines[name] = {"auc": 0.5}
            continue
        width, height = heat.image_size
        x, y = (boxes[:, 0] + boxes[:, 2]) / 2 / width, (boxes[:, 1] + boxes[:, 3]) / 2 / height
        rows, cols = heat.shape
        values = heat.values[(y * rows).astype(int).clip(0, rows - 1), (x * cols).astype(int).clip(0, cols - 1)]
        lines[name] = {"auc": auc(values, inside(boxes, mask))}
        if judge:
            lines[name]["gain"] = judged_gain(case, heat)
    return lines


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Means over scenes of everything above."""
    judge = arguments.cases is None
    found: dict[str, dict[str, dict[str, list[float]]]] = {
        part: defaultdict(lambda: defaultdict(list)) for part in ("words", "grad_cam")
    }
    folder = arguments.out / "traces-baselines"
    folder.mkdir(parents=True, exist_ok=True)
    how = {"hard": arguments.hard, "model": arguments.model, "images": arguments.cases}
    scenes = cases(arguments.split, arguments.scenes, folder, skipped=Counter(), **how)
    count = 0
    for case in tqdm(scenes, total=arguments.scenes, unit="scene"):
        if case.scene.mask is None:
            continue
        count += 1
        for part, made in (("words", words(case, judge=judge)), ("grad_cam", grad_cam(case, judge=judge))):
            for name, line in made.items():
                for column, value in line.items():
                    if math.isfinite(value):
                        found[part][name][column].append(value)
    means = {
        part: {name: {column: figure(values) for column, values in line.items()} for name, line in lines.items()}
        for part, lines in found.items()
    }
    return {"scenes": count, "split": arguments.split, "machine": machine(), **means}


NAMES = ("easy", "hard", "photographs")
READ = (
    ("words", "w·h alone", "TAM: w·h alone"),
    ("words", "without the filter", "TAM: w·h, less interference"),
    ("words", "TAM", "TAM"),
    ("words", "attention, for comparison", "`attention`, for comparison"),
)


def tables() -> str:
    """Both tables and what they were measured on, as Markdown."""
    found = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name in NAMES
        if (path := RESULTS / f"baselines-{name}.json").exists()
    }
    lens = [
        {"at image tokens": f"rank of the word, {_layer(name)}"}
        | {kind: _ranks(one["words"], name) for kind, one in found.items()}
        for name in ("first", "last but one", "last")
    ]
    lens += [
        {"at image tokens": f"AUC, {title}"} | {kind: _mean(one[part], name, "auc") for kind, one in found.items()}
        for part, name, title in READ
    ]
    cams = []
    for where in (
        "last block",
        "its input norm",
        "language model, first layer",
        "language model, last layer with a gradient",
    ):
        for pooled in ("pooled", "unpooled"):
            for sign in SIGNS:
                cells = {"map of": f"{where}, {pooled}, {sign}"}
                for kind, one in found.items():
                    key = f"{_module(one['grad_cam'], where)} | {pooled} | {sign}"
                    cells[f"AUC, {kind}"] = _mean(one["grad_cam"], key, "auc")
                    if kind != "photographs":
                        cells[f"gain, {kind}"] = _mean(one["grad_cam"], key, "gain")
                if any(cell != "–" for cell in list(cells.values())[1:]):
                    cams.append(cells)
    scenes = ", ".join(f"{one['scenes']} {kind}" for kind, one in found.items())
    machines = "; ".join(dict.fromkeys(one["machine"] for one in found.values()))
    splits = "plain and hard scenes of split `tune`, photographs held out"
    return "\n".join(
        [*_markdown(lens), "", *_markdown(cams), "", f"{scenes} ({splits}). Means over scenes. {machines}."]
    )


def _layer(name: str) -> str:
    return f"logit lens behind the {name} layer: inside / outside"


def _ranks(lines: Mapping[str, Any], which: str) -> str:
    names = [name for name in lines if name.startswith("layer ")]
    line = lines[names[{"first": 0, "last but one": -2, "last": -1}[which]]]
    return " / ".join("–" if line.get(side) is None else f"{line[side]['mean']:.0f}" for side in ("inside", "outside"))


def _module(lines: Mapping[str, Any], where: str) -> str:
    """The name that was measured, which says of how many it is."""
    names = list(dict.fromkeys(key.split(" | ")[0] for key in lines))
    if where == "its input norm":
        return where
    kind = "encoder" if where == "last block" else "language model"
    of_kind = [name for name in names if name.startswith(kind)]
    return (of_kind[0] if where.endswith("first layer") else of_kind[-1]) if of_kind else ""


def _mean(lines: Mapping[str, Any], key: str, column: str) -> str:
    found = lines.get(key, {}).get(column)
    return "–" if found is None else f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _markdown(lines: Sequence[Mapping[str, str]]) -> list[str]:
    heads = list(lines[0])
    return [
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
        *(f"| {' | '.join(line.get(head, '–') for head in heads)} |" for line in lines),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scene_arguments(parser, "runs/baselines")
    parser.add_argument("--fill", action="store_true", help="put what was measured into docs/tournament.md")
    parser.set_defaults(split="tune", scenes=60)
    arguments = parser.parse_args()
    if not arguments.fill:
        settle(arguments)
        name = "photographs" if arguments.cases else "hard" if arguments.hard else "easy"
        measured = json.dumps(measure(arguments), indent=1, ensure_ascii=False)
        write(RESULTS / f"baselines-{name}.json", measured + "\n")
    else:
        fill(ROOT / "docs" / "tournament.md", "baselines", tables())


if __name__ == "__main__":
    main()
