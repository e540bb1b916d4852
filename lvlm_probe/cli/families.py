"""``lvlm-probe families``: which model families this version was checked on."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lvlm_probe.cli.shared.completion import complete_family
from lvlm_probe.cli.shared.options import Json
from lvlm_probe.cli.shared.terminal import print_json, say, width, wrapped

RUNS_BARE = True

_VERDICTS = {True: ("yes", "green"), False: ("no", "bold red"), None: ("–", "dim")}
_Name = Annotated[
    str | None,
    typer.Argument(metavar="[FAMILY]", autocompletion=complete_family, help="Show what was measured on this one."),
]


def families(name: _Name = None, as_json: Json = False) -> None:
    """List the model families that were checked, and what each check found.

    Tiny models with random weights and real processors, of every family in transformers' image-text-to-text mapping.

    Example:  lvlm-probe families qwen2_5_vl
    """
    from lvlm_probe.models.support import CHECKS, family_table

    table = family_table()
    if name is not None:
        family = table[name]
        if as_json:
            print_json(_plain(family))
            return
        _show(family)
        return
    if as_json:
        print_json(
            {
                "date": table.date,
                "versions": dict(table.versions),
                "families": {family.name: _plain(family) for family in table.families},
            }
        )
        return
    indent = max(len(family.name) for family in table.families) + 2
    heads = list(CHECKS)
    if indent + sum(len(check) + 2 for check in CHECKS) > width():  # numbers stand for the names
        heads = [str(number) for number in range(1, len(CHECKS) + 1)]
        for line in wrapped("  ".join(map("=".join, zip(heads, CHECKS, strict=True))), indent=0):
            say((line, "dim"))
    columns = [max(len(head), 3) + 2 for head in heads]
    say(" " * indent, ("".join(head.ljust(column) for head, column in zip(heads, columns, strict=True)), "dim"))
    for family in table.lvlms:
        cells: list[tuple[str, str]] = []
        for check, column in zip(CHECKS, columns, strict=True):
            word, style = _VERDICTS[family.verdict(check)]
            cells.append((word.ljust(column), style))
        say((family.name.ljust(indent), "bold"), *cells)
    say("")
    for family in table.families:
        if family.outside:
            name, *further = wrapped(family.outside, indent=indent)
            say((family.name.ljust(indent), "dim"), (name, "dim"))
            for line in further:
                say(" " * indent, (line, "dim"))
    say("")
    say(
        (f"{table.passed} of {len(table.lvlms)}", "bold"),
        " families pass every check that applies to them",
    )
    say(_when(table))
    say(("What was measured on one:  lvlm-probe families NAME", "dim"))


def _show(family: Any) -> None:
    from lvlm_probe.models.requirements import Missing
    from lvlm_probe.models.support import CHECKS, INSTALLS, KINDS

    say((family.name, "bold"), f"  {family.model_class}")
    if family.outside:
        say("not counted as a vision-language model: ", family.outside)
        return
    say(("preprocessing  ", "dim"), KINDS.get(family.kind, family.kind))
    for run in family.runs:
        say("")
        say((f"{INSTALLS[run['install']]}{', a larger image' if run['larger'] else ''}", "bold"))
        if lacks := run.get("lacks"):
            say("  cannot be loaded: ", ", ".join(str(Missing(library, family.name)) for library in lacks))
        for check in CHECKS:
            found = run["checks"].get(check)
            if found is None:
                continue
            word, style = _VERDICTS[found["passed"]]
            figure = "" if found["figure"] is None else f"{found['figure']:.1e}"
            say("  ", (check.ljust(15), ""), (word.ljust(5), style), figure.ljust(9), (found["note"], "dim"))


def _plain(family: Any) -> dict[str, Any]:
    return {
        "class": family.model_class,
        "kind": family.kind,
        "outside": family.outside,
        "passed": family.passed,
        "runs": [dict(run) for run in family.runs],
    }


def _when(table: Any) -> tuple[str, str]:
    return f"({table.date}, transformers {table.versions['transformers']})", "dim"
