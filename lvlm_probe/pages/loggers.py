"""Heatmaps and scores in the loggers of experiments, Weights & Biases, MLflow and TensorBoard, and in FiftyOne.

A run is known by the package of its class, and only that package is imported: it is there, or there would be no run.
The three loggers get the same: the overlay with its verdict, the numbers of the score, a table of the answer's words,
and the report as one self-contained page. A sample of FiftyOne, whose app draws itself, gets map, region and words as
labels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_probe.errors import ExplainError, ProbeError
from lvlm_probe.evidence import region
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.pages.report_page import report
from lvlm_probe.pages.samples import answer_of, verdict_of

if TYPE_CHECKING:
    from PIL import Image

    from lvlm_probe.metrics import Score

_COLUMNS = ("word", "P", "P without the image", "LLR (nats)", "explained")


@dataclass(frozen=True)
class _Entry:
    """What is logged of one heatmap, the same for every logger."""

    name: str
    step: int | None
    ending: str  # of files that are kept by step
    image: Image.Image | None
    numbers: Mapping[str, float]
    words: Sequence[Sequence[Any]]
    told: str
    page: Path
    values: np.ndarray | None  # of the map, (row, col)
    text: str  # what it explains
    region: np.ndarray | None  # cells that keep most of the score, (row, col) bool


def log(
    heat: Heatmap, score: Score | None = None, run: Any = None, *, name: str = "lvlm_probe", step: int | None = None
) -> None:
    """Log a heatmap and what ``evaluate`` said of it to Weights & Biases, MLflow, TensorBoard or a sample of FiftyOne.

    The run gets the image under the map with its verdict, ``deletion``, ``insertion``, ``gain`` and ``trusted`` (1 or
    0) of the score, the answer's words with probability and log-likelihood ratio as a table, and the report page as an
    artefact (of TensorBoard, which has none: a file in its log directory). Where there is no map, the reason is logged.
    A sample gets fields: ``name_map``, a ``Heatmap``; ``name_words``, ``Classifications`` with P as confidence, ``llr``
    and ``explained``; ``name_region``, a ``Detections`` with the cells that keep 90 % of a score; the numbers; and
    ``name_verdict``.

    Args:
        heat: as ``explain`` returns it.
        score: what ``evaluate`` said of it; without one the map says "not checked".
        run: what ``wandb.init()`` or ``mlflow.start_run()`` returned, a ``SummaryWriter``, or a ``fiftyone.Sample`` of
            the image.
        name: what the entries are called, ``name/map``, ``name/gain`` …; maps that are followed over steps keep theirs.
        step: of training; by default none, or the logger's own. Of a sample it stands in the names, ``name_3_map``.

    Raises:
        ProbeError: it is no run of a logger that is known, or no heatmap of an image.
    """
    if not isinstance(heat, Heatmap):
        raise ProbeError(
            f"log() takes a heatmap of an image, got a {type(heat).__name__}; of a clip log its frames, heat.frame(k)"
        )
    send = next((_LOGGERS[package] for package in _packages(run) if package in _LOGGERS), None)
    if send is None:
        raise ProbeError(
            f"log() takes the run of a logger: what wandb.init() or mlflow.start_run() returned, a SummaryWriter of "
            f"TensorBoard, or a Sample of FiftyOne; got a {type(run).__module__}.{type(run).__qualname__}"
        )
    with tempfile.TemporaryDirectory(prefix="lvlm_probe_log_") as folder:
        entry = _entry(heat, score, name, step, Path(folder))
        send(run, entry)


def _packages(run: object) -> list[str]:
    """Top-level packages of a run's classes; ``torch``'s and ``tensorboardX``'s writers are TensorBoard's."""
    modules = [kind.__module__ for kind in type(run).__mro__]
    return [
        "tensorboard" if ".tensorboard" in module or "tensorboardX" in module else module.partition(".")[0]
        for module in modules
    ]


def _entry(heat: Heatmap, score: Score | None, name: str, step: int | None, folder: Path) -> _Entry:
    verdict, notes = verdict_of(heat, score), list[str]()
    answer = answer_of(heat.trace, heat, notes)
    chosen = set(heat.selection.indices)
    rows = [
        (word["text"], word["p"], word["p0"], word["llr"], bool(chosen & set(word["tokens"])))
        for word in answer["words"]
    ]
    numbers: dict[str, float] = {}
    if score is not None and score.reason is None:
        found = {"deletion": score.deletion, "insertion": score.insertion, "gain": score.gain}
        numbers = {key: float(value) for key, value in found.items() if np.isfinite(value)}
        numbers["trusted"] = float(score.verdict.trusted)
    ending = "" if step is None else f"-{step}"
    page = report([heat], scores=[score], out=folder / f"{name.replace('/', '_')}{ending}.html")
    image = None if heat.values is None else heat.preview(1024, score=score)
    told = " ".join([f"{heat.method}, “{heat.selection.text}”: {verdict['title']}", *verdict["reasons"]])
    return _Entry(
        name, step, ending, image, numbers, rows, told, page, heat.values, heat.selection.text, _kept_by(heat, score)
    )


def _kept_by(heat: Heatmap, score: Score | None) -> np.ndarray | None:
    """The cells that keep most of a score, read off its curve; ``None`` where it has none."""
    if score is None or heat.values is None:
        return None
    try:
        return region(score, heat).cells
    except ExplainError:
        return None


def _to_wandb(run: Any, entry: _Entry) -> None:
    import wandb

    told: dict[str, Any] = {f"{entry.name}/{key}": value for key, value in entry.numbers.items()}
    if entry.image is not None:
        told[f"{entry.name}/map"] = wandb.Image(entry.image, caption=entry.told)
    told[f"{entry.name}/words"] = wandb.Table(columns=list(_COLUMNS), data=[list(row) for row in entry.words])
    told[f"{entry.name}/verdict"] = entry.told
    run.log(told, step=entry.step)
    kept = wandb.Artifact(f"{entry.name.replace('/', '_')}-{run.id}", type="lvlm_probe")
    kept.add_file(str(entry.page), name=entry.page.name)
    run.log_artifact(kept)


def _to_mlflow(run: Any, entry: _Entry) -> None:
    import mlflow

    client, identity = mlflow.MlflowClient(), run.info.run_id
    for key, value in entry.numbers.items():
        client.log_metric(identity, f"{entry.name}/{key}", value, step=entry.step or 0)
    if entry.image is not None:
        client.log_image(identity, entry.image, f"{entry.name}/map{entry.ending}.png")
    table = {"columns": list(_COLUMNS), "data": [list(row) for row in entry.words]}  # as its own log_table() writes it
    client.log_dict(identity, table, f"{entry.name}/words{entry.ending}.json")
    client.log_text(identity, entry.told, f"{entry.name}/verdict{entry.ending}.txt")
    client.log_artifact(identity, str(entry.page), entry.name)


def _to_tensorboard(run: Any, entry: _Entry) -> None:
    for key, value in entry.numbers.items():
        run.add_scalar(f"{entry.name}/{key}", value, entry.step)
    if entry.image is not None:
        run.add_image(f"{entry.name}/map", np.asarray(entry.image), entry.step, dataformats="HWC")
    folder = str(getattr(run, "log_dir", None) or run.logdir)
    kept = Path(folder) / "lvlm_probe" / entry.page.name
    if "://" not in folder:  # a bucket, which the writer alone can write to
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(entry.page.read_bytes())
    table = "\n".join(
        "| " + " | ".join(map(_cell, row)) + " |" for row in (_COLUMNS, ["---"] * len(_COLUMNS), *entry.words)
    )
    run.add_text(
        f"{entry.name}/words", f"{_cell(entry.told)}\n\n{table}\n\n{_cell(f'lvlm_probe/{kept.name}')}", entry.step
    )
    run.flush()


def _to_fiftyone(sample: Any, entry: _Entry) -> None:
    import fiftyone

    name = entry.name if entry.step is None else f"{entry.name}_{entry.step}"
    if entry.values is not None:
        sample[f"{name}_map"] = fiftyone.Heatmap(map=entry.values, range=[0.0, 1.0])
    words = [
        fiftyone.Classification(label=text.strip(), confidence=p, p0=p0, llr=llr, explained=explained)
        for text, p, p0, llr, explained in entry.words
    ]
    sample[f"{name}_words"] = fiftyone.Classifications(classifications=words)
    if entry.region is not None:
        sample[f"{name}_region"] = fiftyone.Detections(detections=[_detection(fiftyone, entry.region, entry.text)])
    for key, value in entry.numbers.items():
        sample[f"{name}_{key}"] = bool(value) if key == "trusted" else value
    sample[f"{name}_verdict"] = entry.told
    if sample.in_dataset:
        sample.save()


def _detection(fiftyone: Any, cells: np.ndarray, label: str) -> Any:
    """Cells ``(row, col)`` as a box in shares of the image, with the cells in it as its mask."""
    (rows, cols), (height, width) = np.nonzero(cells), cells.shape
    top, left, bottom, right = (int(edge) for edge in (rows.min(), cols.min(), rows.max() + 1, cols.max() + 1))
    box = [left / width, top / height, (right - left) / width, (bottom - top) / height]
    return fiftyone.Detection(label=label, bounding_box=box, mask=cells[top:bottom, left:right])


def _cell(value: Any) -> str:
    """A cell of a Markdown table, in which a word of an answer is text."""
    if value is None or isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "".join(
        f"\\{sign}" if sign in "\\`*_{}[]()#+!|<>~" else " " if sign in "\r\n" else sign for sign in str(value)
    )


_LOGGERS: dict[str, Callable[[Any, _Entry], None]] = {
    "wandb": _to_wandb,
    "mlflow": _to_mlflow,
    "tensorboard": _to_tensorboard,
    "fiftyone": _to_fiftyone,
}
