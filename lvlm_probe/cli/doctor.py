"""``lvlm-probe doctor``: what is here, what works, and the command that mends the rest."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable
from typing import Annotated

import typer

from lvlm_probe.cli.shared.checkup import Finding, environment, mending, model_checks
from lvlm_probe.cli.shared.options import Json, Loading
from lvlm_probe.cli.shared.terminal import print_json, quiet_libraries, say, wrapped

RUNS_BARE = True

_MARKS = {"ok": ("✓", "green"), "note": ("–", "yellow"), "mend": ("✗", "bold red")}
_LABEL = 14


def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Model directory, hub id, or 'demo'. Default: none.")
    ] = None,
    attempt: Annotated[
        bool, typer.Option("--try/--no-try", help="Load the model, and record a short answer about a drawn image.")
    ] = True,
    loading: Loading = Loading(),
    as_json: Json = False,
) -> None:
    """Check the environment and a model: what works, what does not, and the command that mends it.

    Looked at: versions, torchvision, extras, device and dtype; of a model its processor, prompt, memory, what is
    recorded of an answer, and which methods run. Nothing is changed. Exit code 1 when something does not work.

    Example:  lvlm-probe doctor
    Example:  lvlm-probe doctor llava-hf/llava-1.5-7b-hf --no-try
    """
    with contextlib.suppress(Exception):  # transformers may be what is broken
        quiet_libraries()
    of_model: Iterable[Finding] = ()
    if model is not None:
        of_model = model_checks(model, **vars(loading), attempt=attempt)
    found: list[Finding] = []
    for one in itertools.chain(environment(), of_model):
        found.append(one)
        if not as_json:
            _show(one)
    broken = [one.name for one in found if one.state == "mend"]
    commands = mending(found)
    if as_json:
        print_json({"ok": not broken, "findings": [vars(one) for one in found], "mend": commands})
    else:
        say("")
        say((f"does not work: {', '.join(broken)}", "bold red") if broken else ("nothing to mend", "bold green"))
        for command in commands:
            say(("mend:  ", "dim"), command)
    if broken:
        raise typer.Exit(1)


def _show(one: Finding) -> None:
    mark, style = _MARKS[one.state]
    first, *rest = wrapped(one.text, indent=_LABEL + 2) or [""]
    say((f"{mark} ", style), (one.name.ljust(_LABEL), "bold"), first)
    for line in rest:
        say(" " * (_LABEL + 2), line)
