"""``lvlm-probe verify``: does the model still say what was recorded?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvlm_probe.cli.shared.inputs import ReplayModels, rows_of
from lvlm_probe.cli.shared.options import Json, Loading, OptionalModel, Row
from lvlm_probe.cli.shared.servers import Served
from lvlm_probe.cli.shared.terminal import note, one_line, print_json, say, stage
from lvlm_probe.errors import ModelMismatch, ProbeError, TraceError

if TYPE_CHECKING:
    from lvlm_probe.trace import Trace


def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A trace, or a directory of traces.")],
    model: OptionalModel = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            min=0.0,
            help="Largest difference in nats. Default: what rounding may come to (dtype, logits), at least 1e-4; of a "
            "server 0.01 for certain tokens, up to 0.25 for unlikely ones.",
        ),
    ] = None,
    row: Row = None,
    loading: Loading = Loading(),
    served: Served = Served(),
    as_json: Json = False,
) -> None:
    """Replay a trace and state the largest difference to the recorded log-probabilities.

    Exit code 1 when it exceeds the tolerance, or the model is another one than was recorded. A server tells the model
    by its name, and shows neither weights nor inputs: its log-probabilities alone are compared, a few requests each.

    Example:  lvlm-probe verify runs/demo --model demo
    Example:  lvlm-probe verify runs/served --server http://gpu:8000
    """
    from lvlm_probe.importing.meter import traces_in

    traces: list[Trace | ProbeError]
    traces = [trace for _, trace in traces_in(path)] if path.is_dir() else [*rows_of(path, row)]
    if not traces:
        raise TraceError(f"{path} holds no traces")
    results: list[dict[str, Any]] = []
    behind = served.open(model=model, log_probs_for="verify")
    if behind is not None:
        note("compared are log-probabilities: the model is told by its name, its weights and inputs are not seen")
    models = ReplayModels(model, loading, server=behind)
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
    from lvlm_probe.replaying.verification import verify as check
    from lvlm_probe.serving import Server

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
    steps = f"{found.steps} of {len(trace.tokens)}" if found.not_given else f"{found.steps}"
    by = model.name if isinstance(model, Server) else str(model.dtype).removeprefix("torch.")
    sentence = f"{largest} {said} {where}, {steps} tokens, tolerance {limit:.2g}, {by}"
    if found.not_given:
        names = ", ".join(f"{one} ({trace.tokens[one]!r})" for one in found.not_given)
        sentence += f"; the server cannot be asked about token {names} on this road"
    return {
        **result,
        "ok": ok,
        "tolerance": limit,
        "difference": difference,
        "step": step,
        "not_given": list(found.not_given),
        "sentence": sentence,
    }
