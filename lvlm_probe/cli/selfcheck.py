"""``lvlm-probe selfcheck``: put a model to the checks of this package's own, and write a page of it to send."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lvlm_probe.cli.shared.completion import choices
from lvlm_probe.cli.shared.options import Json, Loading, OpenPage
from lvlm_probe.cli.shared.terminal import one_line, open_page, print_json, quiet_libraries, say, stop, stored_path

_LABEL = 22


def selfcheck(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model directory, hub id, or 'demo'.", autocompletion=choices("demo"))
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="Few questions; methods that take few passes, scored by few points.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where all of it goes. Default: runs/selfcheck/MODEL.")
    ] = None,
    open_it: OpenPage = False,
    loading: Loading = Loading(),
    as_json: Json = False,
) -> None:
    """Check on built-in images that a model is recorded, replayed and explained rightly, and write a page to send.

    Answers about drawn scenes and photographs; replay against recording; gradients against finite differences; maps of
    the default method with verdict and place; every method's time and memory against its plan. Page and JSON hold no
    folder of this machine. It can be stopped: the same command goes on. Exit code 1 when a check fails.

    Example:  lvlm-probe selfcheck demo --quick
    Example:  lvlm-probe selfcheck llava-hf/llava-1.5-7b-hf --dtype bfloat16
    """
    quiet_libraries()
    from lvlm_probe.cli.shared.selfcheck import Selfcheck
    from lvlm_probe.pages.selfcheck_page import checks

    folder = out or Path("runs") / "selfcheck" / (re.sub(r"[^\w.-]+", "-", model.rstrip("/\\")).strip("-.") or "model")
    if out is None and Path(model).exists():
        folder = folder.parent / Path(model).resolve().name
    tell = (lambda *_: None) if as_json else _show
    work = Selfcheck(model, folder, quick=quick, loading=vars(loading), tell=tell)
    try:
        record = work.run()
    except KeyboardInterrupt:
        if not work.begun:  # what an earlier run has written stays
            raise stop("stopped before the first check; the same command goes on") from None
        work.write()
        raise stop(
            f"stopped; {len(work.units)} checks are kept in {stored_path(folder)}, and the same command goes on"
        ) from None
    found = checks(record)
    if open_it:
        open_page(work.page)
    if as_json:
        print_json({**record, "checks": [vars(one) for one in found], "page": str(work.page)})
    else:
        say("")
        for one in found:
            mark, style = {True: ("✓", "green"), False: ("✗", "bold red"), None: ("–", "yellow")}[one.passed]
            say((f"{mark} ", style), (one.name.ljust(_LABEL), "bold"), one.text)
        say("page:     ", (stored_path(work.page), "bold"))
        say("numbers:  ", stored_path(work.results), ("   (the two to send; nothing else leaves this machine)", "dim"))
    if any(one.passed is False for one in found):
        raise typer.Exit(1)


def _show(unit: str, record: Mapping[str, Any]) -> None:
    """One check, in a line."""
    from lvlm_probe.pages.selfcheck_page import of_gradient

    if unit == "finding":
        unit, said = str(record["name"]), str(record["text"])
    elif record.get("problem"):
        said = str(record["problem"])
    elif unit == "gradient":
        said = of_gradient(record).text
    elif "answer" in record:
        said = f"{'right' if record['right'] else 'not right'}: {record['answer']}"
        said += f"   ({record['verdict'].partition(':')[0]})" if record.get("verdict") else ""
    elif record.get("refused") or record.get("reason"):
        said = f"no map: {record.get('refused') or record['reason']}"
    else:
        said = f"gain {record['gain']:.3f}, " if record.get("gain") is not None else ""
        said += f"{record['forward']} + {record['backward']} passes, {record['seconds'] or 0.0:.2f} s"
    say((one_line(unit).ljust(_LABEL + 6), "bold"), one_line(said, 300))
