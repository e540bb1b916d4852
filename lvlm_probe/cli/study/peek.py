"""``lvlm-probe study peek``: what is read of a data set."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvlm_probe.cli.shared.completion import complete_dataset
from lvlm_probe.cli.shared.inputs import columns_from, parameters
from lvlm_probe.cli.shared.options import Columns, Json
from lvlm_probe.cli.shared.terminal import one_line, print_json, quiet_libraries, say
from lvlm_probe.errors import ProbeError

if TYPE_CHECKING:
    from lvlm_probe.study import Sample


def peek(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", autocompletion=complete_dataset, help="Of the data set; `study datasets` lists them."
        ),
    ],
    source: Annotated[str, typer.Argument(metavar="PATH_OR_ID", help="Its directory or file, or a hub id.")],
    split: Annotated[str | None, typer.Option("--split", help="Where there are several.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Samples to show.")] = 3,
    open_ended: Annotated[
        bool, typer.Option("--open-ended", help="As open questions: without choices and instructions.")
    ] = False,
    param: Annotated[
        list[str] | None,
        typer.Option("--param", metavar="NAME=VALUE", help="Option of the reader; columns.image=photo; repeatable."),
    ] = None,
    column: Columns = None,
    as_json: Json = False,
) -> None:
    """Show the first samples of a data set as they are read, each with its image opened.

    Example:  lvlm-probe study peek mmvp data/MMVP --open-ended

    Example:  lvlm-probe study peek table questions.csv --column image=photo --column answer=truth
    """
    quiet_libraries()
    from lvlm_probe.study import open_dataset

    options = parameters(param or [])
    if column:
        given = options.get("columns") or {}
        if not isinstance(given, dict):
            raise ProbeError("--param columns is a mapping; leave it out where --column says which is which")
        options["columns"] = {**given, **columns_from(column)}
    samples = open_dataset(name, source, split=split, open_ended=open_ended, **options)
    shown = [_facts(sample) for sample in itertools.islice(samples, limit)]
    if not shown:
        raise ProbeError(f"{source}, read as {name}, has no samples")
    if as_json:
        print_json(shown)
        return
    for facts in shown:
        say((one_line(facts["id"]), "bold"), f"  {one_line(facts['group'] or '')}")
        for label in ("question", "choices", "answer", "image", "annotations"):
            if facts[label]:
                text = ", ".join(facts[label]) if isinstance(facts[label], list) else str(facts[label])
                say((f"  {label:<12}", "dim"), text.replace("\n", "\n" + " " * 14))
        say("")


def _facts(sample: Sample) -> dict[str, Any]:
    try:
        width, height = sample.image.size
        size = f"{width} x {height}" + ("" if sample.video is None else f", a video: {sample.video().name}")
    except ProbeError as error:
        size = f"not to be had: {error}"
    answer = sample.answer
    return {
        "id": sample.id,
        "group": sample.group,
        "question": sample.question,
        "choices": list(sample.choices),
        "answer": list(answer) if isinstance(answer, tuple) else answer,
        "image": size,
        "annotations": [_named(key, value) for key, value in sample.annotations.items() if value is not None],
    }


def _named(name: str, value: Any) -> str:
    """An annotation in a few characters: arrays by their shape."""
    if isinstance(value, list) and value and hasattr(value[0], "shape"):
        return f"{name} ({len(value)} of {' x '.join(map(str, value[0].shape))})"
    if hasattr(value, "shape"):
        return f"{name} ({' x '.join(map(str, value.shape))})"
    text = str(value)
    return f"{name} {text if len(text) <= 60 else text[:59] + '…'}"
