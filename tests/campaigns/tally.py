"""What a campaign counts, and what a campaign is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["EXAMPLES", "Campaign", "Tally", "total"]

EXAMPLES = 3
"""Broken promises that are kept in words, of each kind; all are counted."""


@dataclass
class Tally:
    """The figures of one chunk of a campaign, or of several.

    Attributes:
        tried: units tried: kills, files, calls.
        counts: what else was counted, by name; sums over chunks.
        broken: promises that were broken, by kind; empty when all held.
        worst: the largest value met, by name and unit; the largest over chunks.
        equal: digests that have to be the same in every chunk, that is in every process, by name.
        examples: the first broken ones in words, with the seed that brings each back.
    """

    tried: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    worst: dict[str, float] = field(default_factory=dict)
    equal: dict[str, str] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def breaks(self, kind: str, example: str) -> None:
        """Count a broken promise."""
        self.broken[kind] += 1
        self.keep([f"{kind}: {' '.join(example.split())[:400]}"])

    def keep(self, examples: Iterable[str]) -> None:
        """Keep examples, the first few of each kind."""
        for example in examples:
            kind = example.partition(": ")[0]
            if sum(one.startswith(f"{kind}: ") for one in self.examples) < EXAMPLES:
                self.examples.append(example)

    def reaches(self, name: str, value: float) -> None:
        """Keep the largest value of a figure."""
        self.worst[name] = max(value, self.worst.get(name, value))

    def record(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "tried": self.tried,
            "counts": dict(sorted(self.counts.items())),
            "broken": dict(sorted(self.broken.items())),
            "worst": {name: round(value, 6) for name, value in sorted(self.worst.items())},
            "equal": dict(sorted(self.equal.items())),
            "examples": self.examples,
        }


def total(records: Iterable[Mapping[str, Any]]) -> Tally:
    """The sum of what chunks recorded. A digest that differs between two of them is a broken promise."""
    found = Tally()
    for record in records:
        found.tried += record["tried"]
        found.counts.update(record["counts"])
        found.broken.update(record["broken"])
        for name, value in record["worst"].items():
            found.reaches(name, value)
        for name, digest in record["equal"].items():
            if found.equal.setdefault(name, digest) != digest:
                found.breaks("differs between processes", name)
        found.keep(record["examples"])
    return found


@dataclass(frozen=True)
class Campaign:
    """One campaign.

    Attributes:
        name: what ``--only`` takes.
        promise: what it tries to break, in one sentence.
        unit: what ``tried`` counts.
        units: how many at ``--scale 1``.
        chunk: how many a child process does; what is finished when a run is stopped.
        run: ``run(first, count, seed)`` tries the units ``first`` to ``first + count``, in the child process.
        seconds: a chunk that takes longer is stopped and counted as hanging.
        whole: it is not divided, whatever the scale: growth shows in long runs only.
        environment: of the two environments, the directory of the one it needs.
    """

    name: str
    promise: str
    unit: str
    units: int
    chunk: int
    run: Callable[[int, int, int], Tally]
    seconds: float = 1200.0
    whole: bool = False
    environment: str = ".venv"
