"""Every vision-language family of transformers, saved and opened by ``probe.load``, also with pictures that are tiled.

The checks are those of ``tests/families``; this runs all of them, where the tests run a part. It needs the
environment that has torchvision (``.venv-tv``).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from campaigns.tally import Campaign, Tally

__all__ = ["CAMPAIGNS", "families"]

ROOT = Path(__file__).resolve().parents[2]


def families(first: int, count: int, seed: int) -> Tally:
    """Check runs number ``first`` to ``first + count`` of all families."""
    sys.path.insert(0, str(ROOT / "tests" / "families"))
    import sweep  # takes the zoo and torchvision with it

    sweep.load_members()
    runs = [(name, *how) for name in sorted(sweep.MEMBERS) for how in sweep.runs_of(sweep.MEMBERS[name])]
    tally = Tally()
    for name, install, larger in runs[first : first + count]:
        label = f"{name} {install}{' larger' if larger else ''}"
        tally.tried += 1
        with tempfile.TemporaryDirectory() as directory:
            try:
                run = sweep.checked(name, sweep.save(name, Path(directory)), larger=larger)
            except Exception as error:
                tally.breaks("cannot be built", f"{label}: {type(error).__name__}: {error}")
                continue
        for check, verdict in run["checks"].items():
            tally.counts[f"{check} held"] += verdict["passed"] is True
            if verdict["passed"] is False:
                tally.breaks(f"{check} failed", f"{label}: {verdict['figure']} {verdict['note']}")
    return tally


def _runs() -> int:
    table = json.loads((ROOT / "lvlm_probe" / "families.json").read_text(encoding="utf-8"))
    runs = (run for family in table["families"].values() for run in family["runs"])
    return sum(run["install"] == "torchvision" for run in runs)


CAMPAIGNS = (
    Campaign(
        "families",
        "Every family of the table is recorded, replayed and masked as the table says.",
        "families with torchvision",
        _runs(),
        61,
        families,
        seconds=3600,
        environment=".venv-tv",
    ),
)
