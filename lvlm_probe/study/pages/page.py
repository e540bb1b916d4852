"""Pages of a study: every answer, map and score of it to look through, as the paper's Figures 3, 4 and 6 to 15 do.

One sample per row, with models or methods side by side; or one set of samples that belong together per row
(HallusionBench: original, counterfactual question, counterfactual image), with what changed and whether the model
looked there. Up to ``MOST`` samples are one file of HTML; more are a folder, whose index loads the rest from files
beside it as it is scrolled, without a server and without the network.
"""

from __future__ import annotations

import html
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_probe.errors import ReportError, StudyError
from lvlm_probe.escaping import counted
from lvlm_probe.files import part_path
from lvlm_probe.pages.shell import asset, json_for_script, page_text, refuse_existing, without_script, write_text
from lvlm_probe.progress import Progress
from lvlm_probe.study.pages.changes import TOLERANCE
from lvlm_probe.study.pages.samples import gather
from lvlm_probe.study.pages.stored import with_sets

if TYPE_CHECKING:
    from lvlm_probe.study.results import Results

MOST = 300
"""Samples that one file holds; more make a folder."""

PART = 24
"""Samples in one data file of a folder."""

VIEWS = ("models", "methods", "groups")

_STYLES = ("page.css", "comparison.css", "prior.css", "study.css")
_SCRIPTS = ("draw.js", "theme.js", "study_cells.js", "study.js")
_OURS = re.compile(r"index\.html|data(/part-\d+\.js)?")


def write_page(
    results: Results,
    out: Path | None = None,
    *,
    by: str | None = None,
    overwrite: bool = False,
    tell: Progress | None = None,
) -> Path:
    """Write the page of a study.

    Args:
        results: what is finished of it.
        out: a file ending in ``.html``, which then holds all samples however many they are, or a folder; by default
            ``page.html`` or the folder ``page`` in the study's directory, by the number of samples.
        by: what stands side by side at first: ``models``, ``methods`` or ``groups``; by default methods where the study
            has one model, else models. The page can switch.
        overwrite: replace what is there.
        tell: called with (done, total) samples.

    Returns:
        the file to open.

    Raises:
        StudyError: nothing is finished yet, no such view, or ``groups`` of data without sets.
        ReportError: ``out`` exists or cannot be written.
    """
    study = results.study
    samples = len({(record["dataset"], record["sample"]) for record in results.answers})
    if not samples:
        raise StudyError(f"study {study.name} has no answers yet; run it first: lvlm-probe study run STUDY.yaml")
    view = by or ("models" if len(study.models) > 1 else "methods")
    if view not in VIEWS:
        raise StudyError(f"a page stands side by side {', '.join(VIEWS[:-1])} or {VIEWS[-1]}; not {view!r}")
    if view == "groups" and not any(record.get("set") is not None for record in results.answers):
        results = with_sets(results)  # answers of a study that did not keep them yet
    if out is None:
        out = study.out / ("page.html" if samples <= MOST else "page")
    if out.suffix.lower() in (".html", ".htm"):
        refuse_existing(out, overwrite=overwrite)
        pairs = list(gather(results, tell=tell))
        head = _head(results, view, [index for index, _ in pairs])
        write_text(out, _filled(results, head, [detail for _, detail in pairs]), overwrite=overwrite)
        return out
    return _folder(results, out, view, overwrite=overwrite, tell=tell)


def _folder(results: Results, out: Path, view: str, *, overwrite: bool, tell: Progress | None) -> Path:
    """Index and data files; they appear together, once all are written."""
    if out.exists():
        found = [path.relative_to(out).as_posix() for path in out.rglob("*")] if out.is_dir() else ["a file"]
        if found and not (overwrite and all(_OURS.fullmatch(name) for name in found)):
            why = "exists; pass overwrite" if all(_OURS.fullmatch(name) for name in found) else "holds other things"
            raise ReportError(f"cannot write the page: {out} {why}, or name another folder")
    part = part_path(out)
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()  # never into one that stands there
        (part / "data").mkdir()
        indices: list[dict[str, Any]] = []
        for number, batch in enumerate(_batches(gather(results, tell=tell))):
            indices += [index for index, _ in batch]
            text = json_for_script([detail for _, detail in batch])
            # One call per file: a page opened from disk may load scripts, but not JSON.
            script = f"lvlm_probe_part({number}, {text});\n"
            (part / "data" / f"part-{number:05d}.js").write_text(script, encoding="utf-8", newline="\n")
        text = _filled(results, _head(results, view, indices), None)
        (part / "index.html").write_text(text, encoding="utf-8", newline="\n")
        if out.is_dir():
            shutil.rmtree(out)
        os.replace(part, out)
    except OSError as error:
        raise ReportError(f"cannot write the page to {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out / "index.html"


def _batches(pairs: Iterator[tuple[Any, Any]]) -> Iterator[list[tuple[Any, Any]]]:
    while batch := list(itertools.islice(pairs, PART)):
        yield batch


def _head(results: Results, view: str, indices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    study = results.study
    if view == "groups" and not any(index.get("ref") is not None for index in indices):
        raise StudyError(
            f"no samples of study {study.name} belong together: sets are known of HallusionBench and MMVP; leave "
            f"--by out, or compare models or methods"
        )
    return {
        "by": view,
        "models": list(study.models),
        "methods": list(study.methods),
        "datasets": list(study.datasets),
        "alpha": study.settings.alpha,
        "part": PART,
        "samples": list(indices),
    }


def _filled(results: Results, head: dict[str, Any], details: list[dict[str, Any]] | None) -> str:
    """The page; with its details in it, or (``None``) in files beside it."""
    files = "One file, nothing is loaded from the network."
    if details is None:
        files = "It needs the folder data beside it, and nothing from the network."
    return page_text(
        "study.html",
        results.study.name,
        "".join(asset(name) for name in _STYLES),
        "".join(asset(name) for name in _SCRIPTS),
        body='<body class="comparison study">',
        beside=details is None,
        lead=_lead(results, head),
        plain=_plain(head),
        files=files,
        tolerance=str(TOLERANCE),
        data=json_for_script({**head, "details": details}),
    )


def _lead(results: Results, head: dict[str, Any]) -> str:
    """What is on the page, and what a study has stored."""
    study, samples = results.study, head["samples"]
    done = sum(1 for record in results.maps if record["status"] == "done" and record["map"] is not None)
    with_words = sum(1 for record in results.maps if record.get("words"))
    dropped = sum(1 for index in samples if index["dropped"])
    said = [f"<p>{html.escape(study.about)}</p>"] if study.about else []
    numbers = {"sample": len(samples), "model": len(study.models), "method": len(study.methods), "map": done}
    counts = [counted(number, noun) for noun, number in numbers.items()]
    kept = f" {counted(dropped, 'sample')} without maps: the study’s filter drops them." if dropped else ""
    said.append(f"<p><b>{', '.join(counts)}.</b>{kept}</p>")
    if with_words:
        some = "" if with_words == done else f" for {with_words} of the {done} maps"
        said.append(
            f"<p>Underlined words are explained together by the map beside them. Click one: every column shows the map "
            f"of that word alone{some}. Scores are of the whole answer’s map; word maps are not judged.</p>"
        )
    else:
        said.append(
            "<p>Underlined words are explained together by the map beside them. One map per answer is stored, none per "
            "word: a click on a word tells its log-likelihood ratio. For maps of words, put "
            "<code>words: true</code> under the study’s settings and run it again.</p>"
        )
    return "\n".join(said)


def _plain(head: dict[str, Any]) -> str:
    rows = []
    for index in head["samples"]:
        answers = [
            f"{html.escape(model)}: {html.escape(answer.get('text') or answer.get('failed') or '')}"
            for model, answer in zip(head["models"], index["answers"], strict=True)
            if answer is not None
        ]
        rows.append(f"<p><b>{html.escape(index['question'])}</b><br>{'<br>'.join(answers)}</p>")
    return without_script(rows, len(rows))
