"""The state of a study, and its results as flat files to hand on."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lvlm_probe.escaping import csv_cell
from lvlm_probe.files import write_whole
from lvlm_probe.study.results import Results

_ANSWER = (
    "dataset sample model status question answer true_answer correct group log_prob baseline_log_prob drop "
    "drop_normalised error reason"
)
_MAP = (
    "dataset sample model row method status text selected deletion insertion center_gain tie_share trusted verdict "
    "pointing energy average_precision iou error reason"
)


def state(results: Results) -> dict[str, Any]:
    """Count finished, failed and missing units, JSON-ready."""
    study = results.study
    answers = []
    for model in study.models:
        for dataset in study.datasets:
            here = [r["status"] for r in results.answers if (r["model"], r["dataset"]) == (model, dataset)]
            answers.append(
                {"model": model, "dataset": dataset, "done": here.count("done"), "failed": here.count("failed")}
            )
    wanted = len(study.models) * sum(len(kept) for kept in results.kept.values())
    maps = []
    reasons: Counter[str] = Counter()
    for row in study.methods:
        made = [record for record in results.maps if record["row"] == row]
        failed = sum(record["status"] == "failed" for record in made)
        empty = sum(record["status"] == "done" and record["map"] is None for record in made)
        maps.append(
            {
                "row": row,
                "done": len(made) - failed - empty,
                "empty": empty,
                "failed": failed,
                "missing": wanted - len(made),
            }
        )
        reasons.update({f"{row}: {reason}": count for reason, count in results.skips(row=row).items()})
    for record in results.answers:
        if record["status"] == "failed":
            reasons[f"{record['model']}: {record['error']}: {record['reason']}"] += 1
    return {
        "study": study.name,
        "kept": {dataset: len(kept) for dataset, kept in results.kept.items()},
        "dropped": {dataset: len(dropped) for dataset, dropped in results.dropped.items()},
        "answers": answers,
        "maps": maps,
        "reasons": dict(reasons.most_common()),
    }


def export(results: Results, directory: Path) -> list[Path]:
    """Write ``answers.csv``, ``maps.csv``, ``samples.json`` (ids kept, why others were dropped) and ``study.json``.

    Returns:
        the files. No images and no paths of this machine are in them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    study = results.study.to_dict()
    study["out"] = results.study.out.name
    for spec in (*study["models"].values(), *study["datasets"].values()):
        spec["source"] = Path(spec["source"]).name if Path(spec["source"]).is_absolute() else spec["source"]
    samples = {
        "filter": study["filter"],
        "kept": {dataset: list(kept) for dataset, kept in results.kept.items()},
        "dropped": {dataset: dict(dropped) for dataset, dropped in results.dropped.items()},
    }
    return [
        _table(directory / "answers.csv", _ANSWER, results.answers),
        _table(directory / "maps.csv", _MAP, results.maps),
        _json(directory / "samples.json", samples),
        _json(directory / "study.json", study),
    ]


def _table(path: Path, columns: str, records: Sequence[Mapping[str, Any]]) -> Path:
    names = columns.split()
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    for record in records:
        writer.writerow(["" if record.get(name) is None else csv_cell(record[name]) for name in names])
    write_whole(path, file.getvalue())
    return path


def _json(path: Path, content: Any) -> Path:
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    return path
