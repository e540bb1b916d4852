"""docs/families.md, drawn from the table of families that the package ships."""

from __future__ import annotations

import textwrap

from lvlm_probe.models.support import CHECKS, INSTALLS, KINDS, CheckedFamily, FamilyTable, summary

__all__ = ["markdown"]


def markdown(table: FamilyTable) -> str:
    """Return the page."""
    lvlms = table.lvlms
    versions = ", ".join(f"{name} {version}" for name, version in table.versions.items())
    about = (
        f"**{table.passed} of {len(lvlms)}** families pass every check that applies to them. They are those of "
        f"transformers' image-text-to-text mapping ({len(table.families)} entries) that answer in words about an "
        "image; the others stand at the end, with the reason. Each was built tiny, with random weights, and with its "
        "real processor, saved to disk, and opened by `probe.load`, as a user opens a model: in an environment of this "
        f"package alone, where {table.passing('default')} load and pass, and in one with the extras torchvision, timm "
        f"and num2words, where {table.passing('torchvision')} do. One that lacks a library ends in a sentence that "
        "names it. This says that the hooks, the replay, the gradient and the geometry are right, not how well a "
        "trained model of the family is explained. A family that is not in the table may work as well: parts are "
        "found, not listed."
    )
    header = [*INSTALLS.values(), *CHECKS, "videos"]
    lines = [
        "# Model families",
        "",
        "Made by `python tests/families/sweep.py --write` from what the checks measured; do not edit.",
        f"{table.date}; {versions}; CPU, float32.",
        "",
        *textwrap.wrap(about, 118),
        "",
        f"| check | what | all runs | {' | '.join(INSTALLS.values())} |",
        "|---|---|---|---|---|",
        *(f"| {check} | {CHECKS[check]} | {' | '.join(counts)} |" for check, counts in summary(table)),
        "",
        "## Family by family",
        "",
        "A figure is the largest over installations and images (mostly a small and a larger one, cut into tiles",
        "where a family does that); – means that the check does not apply, **no** that it failed; reasons are below.",
        "Of videos: how many of the checks of `tests/families/test_clips.py` passed, with torchvision; – means that",
        "they are refused, or that the family takes none.",
        "",
        f"| family | preprocessing | {' | '.join(header)} |",
        "|---|---|" + "---|" * len(header),
    ]
    for family in lvlms:
        cells = [*(_installed(family, install) for install in INSTALLS), *(_cell(family, check) for check in CHECKS)]
        cells.append(_videos(family))
        lines.append(f"| {family.name} | {KINDS.get(family.kind, family.kind)} | {' | '.join(cells)} |")
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


def _installed(family: CheckedFamily, install: str) -> str:
    lacks = family.lacks(install)
    return f"needs {', '.join(lacks)}" if lacks else "yes" if family.passes(install) else "**no**"


def _videos(family: CheckedFamily) -> str:
    asked = [passed for passed in family.videos.values() if passed is not None]
    return "–" if not asked else f"{sum(asked)} of {len(asked)}" if all(asked) else "**no**"


def _cell(family: CheckedFamily, check: str) -> str:
    verdict, worst = family.verdict(check), family.worst(check)
    if verdict is None:
        return "–"
    if not verdict:
        return "**no**"
    if worst is None or check in ("asked", "generation", "geometry", "detach"):
        return "yes"
    return "exact" if worst == 0 else f"{worst:.0e}"
