"""docs/families.md, drawn from the table of families that the package ships."""

from __future__ import annotations

import textwrap

from lvlm_probe.models.support import CHECKS, KINDS, CheckedFamily, FamilyTable, summary

__all__ = ["markdown"]


def markdown(table: FamilyTable) -> str:
    """Return the page."""
    lvlms = table.lvlms
    versions = ", ".join(f"{name} {version}" for name, version in table.versions.items())
    about = (
        f"**{table.passed} of {len(lvlms)}** families pass every check that applies to them. They are those of "
        f"transformers' image-text-to-text mapping ({len(table.families)} entries) that answer questions about a "
        "picture; the others stand at the end, with the reason. Each was built tiny, with random weights, and with its "
        "real processor: this says that the hooks, the replay, the gradient and the geometry are right, not how well a "
        "trained model of the family is explained. A family that is not in the table may work as well: parts are "
        "found, not listed."
    )
    lines = [
        "# Model families",
        "",
        "Made by `python tests/families/sweep.py --write` from what the checks measured; do not edit.",
        f"{table.date}; {versions}; CPU, float32.",
        "",
        *textwrap.wrap(about, 118),
        "",
        "| check | what | all runs | PIL | torchvision |",
        "|---|---|---|---|---|",
        *(f"| {check} | {CHECKS[check]} | {' | '.join(counts)} |" for check, counts in summary(table)),
        "",
        "## Family by family",
        "",
        "A figure is the largest over backends and pictures (mostly a small and a larger one, cut into tiles where a",
        "family does that); – means that the check does not apply, **no** that it failed; the reasons are below.",
        "",
        f"| family | preprocessing | backends | {' | '.join(CHECKS)} |",
        "|---|---|---|" + "---|" * len(CHECKS),
    ]
    for family in lvlms:
        cells = [_cell(family, check) for check in CHECKS]
        lines.append(
            f"| {family.name} | {KINDS.get(family.kind, family.kind)} | {', '.join(family.backends)} | "
            f"{' | '.join(cells)} |"
        )
    notes = [
        f"- **{family.name}**, {check}: {' / '.join(family.reasons(check))}"
        for family in lvlms
        for check in CHECKS
        if family.verdict(check) is not True and family.reasons(check)
    ]
    if notes:
        lines += ["", "## Reasons", "", *notes]
    lines += ["", "## Not counted", "", "| entry | class | why |", "|---|---|---|"]
    lines += [
        f"| {family.name} | {family.model_class} | {family.outside} |" for family in table.families if family.outside
    ]
    return "\n".join(lines) + "\n"


def _cell(family: CheckedFamily, check: str) -> str:
    verdict, worst = family.verdict(check), family.worst(check)
    if verdict is None:
        return "–"
    if not verdict:
        return "**no**"
    if worst is None or check in ("generation", "geometry", "detach"):
        return "yes"
    return "exact" if worst == 0 else f"{worst:.0e}"
