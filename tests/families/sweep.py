"""Checks families of the zoo as a user has them, saved to disk and opened by ``probe.load``, and writes the table.

    python tests/families/sweep.py --save DIR              saves every family; needs torchvision (.venv-tv)
    python tests/families/sweep.py --saved DIR             every family, with what is installed here
    python tests/families/sweep.py --saved DIR --write     the same; writes this installation's half of the table
    python tests/families/sweep.py llava qwen2_vl -v       some of them; without --saved they are saved first
    python tests/families/sweep.py llava --larger --only gradient
    python tests/families/sweep.py --videos                writes the column of videos; needs torchvision (.venv-tv)

`make families` saves once and sweeps in both environments: .venv, the default install, and .venv-tv.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torchvision_shim  # noqa: E402, F401  (before anything imports torchvision)
import yaml  # noqa: E402
from checks import CHECKS, Verdict, run_checks  # noqa: E402
from family_page import markdown  # noqa: E402
from zoo import INSTALL, MEMBERS, Install, Member, load_members, opened, save  # noqa: E402

from lvlm_probe.errors import LoadError  # noqa: E402
from lvlm_probe.models.requirements import missing_library  # noqa: E402
from lvlm_probe.models.support import INSTALLS, FamilyTable, summary  # noqa: E402

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "lvlm_probe" / "families.json"
PAGE = ROOT / "docs" / "families.md"
SUMMARY_PAGE = ROOT / "docs" / "figures.md"
MARK, END = "<!-- families -->", "<!-- /families -->"


def runs_of(member: Member, installs: tuple[Install, ...] = (INSTALL,)) -> Iterator[tuple[Install, bool]]:
    """Installations, and whether the picture is one that is cut into tiles."""
    for install in installs:
        yield install, False
        if member.larger:
            yield install, True


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


class Heard:
    """Hears of every test that is parametrised by a family: family → test → whether it passed, ``None`` if skipped."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, bool | None]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        test, _, family = report.nodeid.rpartition("::")[2].rstrip("]").partition("[")
        if family in MEMBERS and (report.when == "call" or not report.passed):
            found = self.found.setdefault(family, {})
            found[test.removeprefix("test_")] = None if report.skipped else report.passed


def videos_checked(families: Sequence[str]) -> dict[str, dict[str, bool | None]]:
    """What ``test_clips.py`` finds here, by family; of all where none is named."""
    import pytest

    heard, tests = Heard(), str(Path(__file__).parent / "test_clips.py")
    named = ["-k", " or ".join(f"[{name}]" for name in families)] if families else []
    pytest.main(["-q", "-p", "no:cacheprovider", *named, tests], plugins=[heard])
    return heard.found


def write(results: dict[str, list[dict[str, Any]]], videos: dict[str, dict[str, bool | None]] | None = None) -> None:
    """This installation's runs into the table, the other's as they are; and the pages that are drawn from it."""
    reasons, classes = outside(), mapping()
    before = json.loads(TABLE.read_text(encoding="utf-8"))
    families: dict[str, Any] = {}
    for name in sorted(classes):
        if name in MEMBERS:
            kept = before["families"].get(name, {}).get("runs", [])
            own = results.get(name, [run for run in kept if run.get("install") == INSTALL])
            others = [run for run in kept if run.get("install") not in (INSTALL, None)]
            runs = sorted([*own, *others], key=lambda run: (run["install"], run["larger"]))
            families[name] = {"class": classes[name], "kind": MEMBERS[name].kind, "runs": runs}
            old = before["families"].get(name, {}).get("videos")
            if checked_videos := (videos or {}).get(name, old):
                families[name]["videos"] = checked_videos
        else:
            families[name] = {"class": classes[name], "outside": reasons.get(name, "not in the zoo yet"), "runs": []}
    named = ("transformers", "torch", "pillow", *(("torchvision",) if INSTALL == "torchvision" else ()))
    table = {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {**before["versions"], **{name: metadata.version(name) for name in named}},
        "families": families,
    }
    TABLE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    made = FamilyTable.from_json(table)
    PAGE.write_text(markdown(made), encoding="utf-8")
    start, _, rest = SUMMARY_PAGE.read_text(encoding="utf-8").partition(f"{MARK}\n")
    SUMMARY_PAGE.write_text(f"{start}{MARK}\n{short(made)}{END}{rest.partition(END)[2]}", encoding="utf-8")


def short(table: FamilyTable) -> str:
    """The table of docs/figures.md: how many families pass each check, in either installation."""
    lines = [f"| check | families | {' | '.join(INSTALLS.values())} |", "|---|---|---|---|"]
    lines += [f"| {check} | {' | '.join(counts)} |" for check, counts in summary(table)]
    versions = f"transformers {table.versions['transformers']}, torch {table.versions['torch']}"
    default, torchvision = table.passing("default"), table.passing("torchvision")
    lines += [
        "",
        f"**{table.passed} of {len(table.lvlms)}** pass every check that applies to them ({table.date}; {versions}; "
        f"CPU); {default} load and pass in the default install, {torchvision} with the extras torchvision, timm and "
        "num2words.",
    ]
    return "\n".join(lines) + "\n"


def rounded(verdict: Verdict) -> dict[str, Any]:
    """A verdict for the table: two digits are enough, and a picture's worth of noise stays out of the diff."""
    figure = None if verdict.figure is None else float(f"{verdict.figure:.1e}")
    return {"passed": verdict.passed, "figure": figure, "note": verdict.note}


def checked(name: str, directory: Path, *, larger: bool, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """One run of one saved family: its verdicts, or the libraries that it lacks here."""
    run: dict[str, Any] = {"install": INSTALL, "larger": larger}
    try:
        built = opened(name, directory)
    except LoadError as error:
        if (library := missing_library(error)) is not None:
            return {**run, "lacks": [library.library], "checks": {}}
        verdicts = [Verdict(check.__name__, False, None, f"cannot be loaded: {error}") for check in CHECKS]
    else:
        verdicts = run_checks(built, larger=larger, only=only)
    return {**run, "checks": {verdict.check: rounded(verdict) for verdict in verdicts}}


def told(name: str, run: dict[str, Any], seconds: float, *, verbose: bool) -> int:
    """Say what a run found; returns how many checks failed."""
    label = f"{name}{' larger' if run['larger'] else ''} ({seconds:.1f} s)"
    if lacks := run.get("lacks"):
        print(f"{label}: needs {', '.join(lacks)}", flush=True)
        return 0
    words = {True: "ok", False: "FAILED", None: "–"}
    marks = " ".join(
        f"{check} {words[found['passed']]}" + (f" {found['figure']:.1e}" if found["figure"] is not None else "")
        for check, found in run["checks"].items()
    )
    print(f"{label}: {marks}", flush=True)
    for check, found in run["checks"].items():
        if found["note"] and (verbose or found["passed"] is False):
            print(f"    {check}: {found['note'][:1500]}", flush=True)
    return sum(found["passed"] is False for found in run["checks"].values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="by default all")
    parser.add_argument("--save", metavar="DIR", type=Path, help="save them there, and do nothing else")
    parser.add_argument("--saved", metavar="DIR", type=Path, help="where they were saved")
    parser.add_argument("--larger", action="store_true", help="only the larger picture")
    parser.add_argument("--only", nargs="*", default=(), choices=[check.__name__ for check in CHECKS])
    parser.add_argument("--write", action="store_true", help="write what was found into the table; takes all checks")
    parser.add_argument("--videos", action="store_true", help="check videos alone, and write their column of the table")
    parser.add_argument("-v", "--verbose", action="store_true", help="notes of passed checks too")
    arguments = parser.parse_args()
    if arguments.write and (arguments.save or arguments.larger or arguments.only):
        parser.error("--write takes all checks")
    load_members()
    if arguments.videos:
        videos = videos_checked(arguments.families)
        write({}, videos)
        return int(any(passed is False for found in videos.values() for passed in found.values()))
    failed = 0
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.families or sorted(MEMBERS):
            folder = arguments.save or arguments.saved or Path(scratch)
            if arguments.saved is None:
                save(name, folder / name)
            for _, larger in runs_of(MEMBERS[name]):
                if arguments.save or (arguments.larger and not larger):
                    continue
                started = time.perf_counter()
                run = checked(name, folder / name, larger=larger, only=tuple(arguments.only))
                results.setdefault(name, []).append(run)
                failed += told(name, run, time.perf_counter() - started, verbose=arguments.verbose)
    if arguments.write:
        write(results)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
