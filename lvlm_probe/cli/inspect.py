"""``lvlm-probe inspect`` and ``lvlm-probe verify``: what is in a trace, and does the model still say it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvlm_probe.cli.explain import map_summary, show_map
from lvlm_probe.cli.record import trace_summary
from lvlm_probe.cli.shared.inputs import ReplayModels
from lvlm_probe.cli.shared.maps import MapFile, find_maps
from lvlm_probe.cli.shared.options import Attn, Device, Dtype, Json, OptionalModel, Row, TrustRemoteCode
from lvlm_probe.cli.shared.terminal import note, one_line, print_json, say, stage, stored_path
from lvlm_probe.errors import ModelMismatch, ProbeError, TraceError

if TYPE_CHECKING:
    from lvlm_probe.trace import Trace

__all__ = ["inspect", "verify"]

_LISTED = 300
"""Characters of a question or an answer in a list; ``inspect FILE`` and ``--json`` have them whole."""


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A trace, a stored map, or a directory of traces.")],
    row: Row = None,
    last: Annotated[int, typer.Option("--last", min=1, help="How many traces of a directory to list.")] = 20,
    as_json: Json = False,
) -> None:
    """Show what is in a trace as a person wants to read it; list a directory. No model is loaded.

    Example:  lvlm-probe inspect runs/demo
    """
    if path.is_dir():
        _list_directory(path, last, as_json)
        return
    if _is_map(path):
        found = find_maps([path])[0]
        if as_json:
            print_json(map_summary(found))
        else:
            show_map(found)
        return
    traces = _rows(path, row)
    if as_json:
        print_json([trace_summary(trace) for trace in traces] if len(traces) > 1 else trace_summary(traces[0]))
        return
    for number, trace in enumerate(traces):
        if number:
            say("")
        say(trace.describe())


def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A trace, or a directory of traces.")],
    model: OptionalModel = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            min=0.0,
            help="Largest difference in nats. Default: what rounding may come to (dtype, logits), at least 1e-4.",
        ),
    ] = None,
    row: Row = None,
    device: Device = None,
    dtype: Dtype = None,
    attn: Attn = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Replay a trace and state the largest difference to the recorded log-probabilities.

    Exit code 1 when it exceeds the tolerance, or the model is another one than was recorded.

    Example:  lvlm-probe verify runs/demo --model demo
    """
    from lvlm_probe.importing.meter import traces_in

    traces: list[Trace | ProbeError]
    traces = [trace for _, trace in traces_in(path)] if path.is_dir() else [*_rows(path, row)]
    if not traces:
        raise TraceError(f"{path} holds no traces")
    results: list[dict[str, Any]] = []
    models = ReplayModels(model, device=device, dtype=dtype, attn=attn, trust_remote_code=trust_remote_code)
    for trace in traces:
        if isinstance(trace, ProbeError):
            result = {"trace": None, "ok": False, "difference": None, "sentence": str(trace)}
        else:
            result = _verify_one(trace, *models.of(trace), tolerance)
        results.append(result)
        if not as_json:
            mark, style = ("✓", "green") if result["ok"] else ("✗", "red")
            name = "" if isinstance(trace, ProbeError) else one_line(trace.path.name)
            say((f"{mark} ", style), (name, "bold"), f"  {one_line(result['sentence'])}")
    if as_json:
        print_json(results)
    if not all(result["ok"] for result in results):
        raise typer.Exit(1)


def _verify_one(trace: Trace, model: Any, processor: Any, tolerance: float | None) -> dict[str, Any]:
    from lvlm_probe import verify as check

    dtype = str(model.dtype).removeprefix("torch.")
    result: dict[str, Any] = {"trace": str(trace.path), "row": trace.row, "tolerance": tolerance, "difference": None}
    trace.verify()
    try:
        with stage("replaying"):
            found = check(trace, model, processor)
    except ModelMismatch as error:
        return {**result, "ok": False, "sentence": f"another model: {error}"}
    ok = found.within(tolerance)
    # By default each token has its own limit, and the one to name is that which is furthest beyond it.
    step = found.step if ok or tolerance is not None else found.worst
    limit = found.allowed(step) if tolerance is None else tolerance
    difference = found.differences[step] if found.steps else found.largest_difference
    said = "not a number" if math.isnan(difference) else f"{difference:.2e} nats"
    where = f"at token {step} ({trace.tokens[step]!r})" if found.steps else ""
    largest = "largest difference" if step == found.step else "difference"
    sentence = f"{largest} {said} {where}, {found.steps} tokens, tolerance {limit:.2g}, {dtype}"
    return {**result, "ok": ok, "tolerance": limit, "difference": difference, "step": step, "sentence": sentence}


def _rows(path: Path, row: int | None) -> list[Trace]:
    from lvlm_probe.trace import open_trace

    first = open_trace(path, row=row or 0)
    return [first] if row is not None else [first, *(open_trace(path, row=other) for other in range(1, first.rows))]


def _is_map(path: Path) -> bool:
    if path.suffix != ".h5" or not path.is_file():
        return False
    try:
        MapFile(path).read()
    except TraceError:
        return False
    return True


def _list_directory(path: Path, last: int, as_json: bool) -> None:
    from lvlm_probe.trace import open_store

    store = open_store(path)
    shown, broken = [], []
    for file in store.files[-last:]:
        try:
            shown += _rows(file, None)
        except ProbeError as error:
            broken.append(str(error))
    if as_json:
        print_json({"traces": [trace_summary(trace) for trace in shown], "damaged": broken, "files": len(store.files)})
        return
    if not store.files:
        say(f"{stored_path(path)} holds no traces")
        return
    for trace in shown:
        row = f" row {trace.row}" if trace.rows > 1 else ""
        state = "" if trace.status == "complete" else f"  [{trace.status}]"
        say((one_line(trace.path.name), "bold"), row, (state, "red"))
        say(("  Q  ", "dim"), one_line(trace.question or trace.prompt, _LISTED))
        say(("  A  ", "dim"), one_line(trace.answer, _LISTED))
    if len(store.files) > last:
        say((f"the last {last} of {len(store.files)} files; --last N shows more", "dim"))
    for sentence in broken:
        note(sentence, kind="warning")
    if orphans := store.orphans():
        note(f"{len(orphans)} unfinished .part files of processes that were killed; open_store(…).clean() deletes them")
