"""``lvlm-probe plan``: how much memory, how many passes and about how long a method takes on a recorded answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lvlm_probe.cli.shared.completion import complete_methods
from lvlm_probe.cli.shared.inputs import ReplayModels, alternatives, find_trace, parameters
from lvlm_probe.cli.shared.options import AgainstOption, Json, Loading, OptionalModel, Row, SearchDtype
from lvlm_probe.cli.shared.terminal import note, print_json, show
from lvlm_probe.errors import ProbeError


def plan(
    path: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace, or a directory whose last one is taken.")],
    model: OptionalModel = None,
    methods: Annotated[
        str,
        typer.Option(
            "--methods", metavar="NAMES", autocompletion=complete_methods, help="Methods, commas between, or all."
        ),
    ] = "igos++",
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="What there is, weights included: 24GB. Default: what is free."),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option("--param", metavar="NAME=VALUE", help="Parameter of the method (of a single one); repeatable."),
    ] = None,
    words: Annotated[
        list[str] | None, typer.Option("--words", metavar="TEXT", help="With --against: the words of the contrast.")
    ] = None,
    against: AgainstOption = None,
    search_dtype: SearchDtype = None,
    seconds: Annotated[bool, typer.Option(help="Also time a few passes on this machine.")] = True,
    row: Row = None,
    loading: Loading = Loading(),
    as_json: Json = False,
) -> None:
    """Predict peak memory, passes and time of methods on a recorded answer, measured on a few small passes.

    Example:  lvlm-probe plan runs/demo --methods igos++,gradcam,tmm --memory 24GB
    Example:  lvlm-probe plan runs/demo --words purple --against red
    """
    from lvlm_probe import explainers, planning

    names = explainers.methods() if methods == "all" else [name.strip() for name in methods.split(",")]
    given = parameters(param or [])
    if given and len(names) > 1:
        raise ProbeError("--param goes with one method: name it with --methods")
    if words and not against:
        raise ProbeError("a plan is for all words of the answer; --words goes with --against")
    contrast: Any = {"tokens": words or None, "against": alternatives(against)} if against else {}
    trace = find_trace(path, row)
    replay = ReplayModels(model, loading).replay(trace)
    image = trace.clips[0].first if trace.clips else 0
    plans, refused = [], {}
    for name in names:
        try:
            asked = {"memory": memory, "image": image, "seconds": seconds, **contrast, **given}
            plans.append(planning.plan(replay, method=name, search_dtype=search_dtype, **asked))
        except ProbeError as error:
            if len(names) == 1:
                raise
            refused[name] = str(error)
    if as_json:
        print_json({"plans": [found.to_dict() for found in plans], "refused": refused})
        return
    if plans:
        show(planning.table(plans))
    for name, reason in refused.items():
        note(f"{name}: {reason}")
