"""Checks families of the zoo, says what each check measured, and writes the table that the package ships.

    python tests/families/sweep.py                        every family, on every backend it has
    python tests/families/sweep.py --write                the same; writes the table and what is drawn from it
    python tests/families/sweep.py llava qwen2_vl -v      some of them
    python tests/families/sweep.py llava --backend pil --larger --only gradient

It runs in the environment that has torchvision (.venv-tv), where both backends of the image processors are at hand.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torchvision_shim  # noqa: E402, F401  (before anything imports torchvision)
import yaml  # noqa: E402
from checks import CHECKS, Verdict, run_checks  # noqa: E402
from family_page import markdown  # noqa: E402
from zoo import MEMBERS, Backend, Member, build, load_members  # noqa: E402

from lvlm_probe.models.support import FamilyTable, summary  # noqa: E402

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "lvlm_probe" / "families.json"
PAGE = ROOT / "docs" / "families.md"
SUMMARY_PAGE = ROOT / "docs" / "figures.md"
MARK, END = "<!-- families -->", "<!-- /families -->"


def runs_of(member: Member) -> Iterator[tuple[Backend, bool]]:
    """Backends, and whether the picture is one that is cut into tiles."""
    for backend in member.backends:
        yield backend, False
        if member.larger:
            yield backend, True


def mapping() -> dict[str, str]:
    """transformers' image-text-to-text mapping: entry → class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as names

    return dict(names)


def outside() -> dict[str, str]:
    """Entries of the mapping that are not counted, and why."""
    text = (ROOT / "lvlm_probe" / "families.yaml").read_text(encoding="utf-8")
    entries = yaml.safe_load(text).items()
    reasons = {name: entry.get("unsupported", entry.get("outside")) for name, entry in entries}
    return {name: reason for name, reason in reasons.items() if reason}


def write(results: dict[str, list[dict[str, Any]]]) -> None:
    """The table and its page."""
    reasons, classes = outside(), mapping()
    families: dict[str, Any] = {}
    for name in sorted(classes):
        if name in MEMBERS:
            families[name] = {"class": classes[name], "kind": MEMBERS[name].kind, "runs": results[name]}
        else:
            families[name] = {"class": classes[name], "outside": reasons.get(name, "not in the zoo yet"), "runs": []}
    table = {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: metadata.version(name) for name in ("transformers", "torch", "pillow", "torchvision")},
        "families": families,
    }
    TABLE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    made = FamilyTable.from_json(table)
    PAGE.write_text(markdown(made), encoding="utf-8")
    before, _, rest = SUMMARY_PAGE.read_text(encoding="utf-8").partition(f"{MARK}\n")
    SUMMARY_PAGE.write_text(f"{before}{MARK}\n{short(made)}{END}{rest.partition(END)[2]}", encoding="utf-8")


def short(table: FamilyTable) -> str:
    """The table of docs/figures.md: how many families pass each check, on either backend."""
    lines = ["| check | families | PIL | torchvision |", "|---|---|---|---|"]
    lines += [f"| {check} | {' | '.join(counts)} |" for check, counts in summary(table)]
    versions = f"transformers {table.versions['transformers']}, torch {table.versions['torch']}"
    lines += [
        "",
        f"**{table.passed} of {len(table.lvlms)}** pass every check that applies to them ({table.date}; {versions}; "
        "CPU).",
    ]
    return "\n".join(lines) + "\n"


def rounded(verdict: Verdict) -> dict[str, Any]:
    """A verdict for the table: two digits are enough, and a picture's worth of noise stays out of the diff."""
    figure = None if verdict.figure is None else float(f"{verdict.figure:.1e}")
    return {"passed": verdict.passed, "figure": figure, "note": verdict.note}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="by default all")
    parser.add_argument("--backend", choices=("pil", "torchvision"), help="by default every one that a family has")
    parser.add_argument("--larger", action="store_true", help="only the larger picture")
    parser.add_argument("--only", nargs="*", default=(), choices=[check.__name__ for check in CHECKS])
    parser.add_argument("--write", action="store_true", help="write the table; takes no other option")
    parser.add_argument("-v", "--verbose", action="store_true", help="notes of passed checks too")
    arguments = parser.parse_args()
    if arguments.write and (arguments.families or arguments.backend or arguments.larger or arguments.only):
        parser.error("--write takes all families and all checks")
    load_members()
    failed = 0
    results: dict[str, list[dict[str, Any]]] = {}
    for name in arguments.families or sorted(MEMBERS):
        for backend, larger in runs_of(MEMBERS[name]):
            if (arguments.backend and backend != arguments.backend) or (arguments.larger and not larger):
                continue
            started = time.perf_counter()
            try:
                verdicts = run_checks(build(name, backend), larger=larger, only=tuple(arguments.only))
            except Exception as error:
                note = f"cannot be built: {type(error).__name__}: {error}"
                verdicts = [Verdict(check.__name__, False, None, note) for check in CHECKS]
            found = {verdict.check: rounded(verdict) for verdict in verdicts}
            results.setdefault(name, []).append({"backend": backend, "larger": larger, "checks": found})
            marks = " ".join(
                f"{v.check} {'–' if v.passed is None else 'ok' if v.passed else 'FAILED'}"
                + (f" {v.figure:.1e}" if v.figure is not None else "")
                for v in verdicts
            )
            print(f"{name} {backend}{' larger' if larger else ''} ({time.perf_counter() - started:.1f} s): {marks}")
            for verdict in verdicts:
                if verdict.note and (arguments.verbose or verdict.passed is False):
                    print(f"    {verdict.check}: {verdict.note[:1500]}")
            failed += sum(verdict.passed is False for verdict in verdicts)
    if arguments.write:
        write(results)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
