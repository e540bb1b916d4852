"""Which model families this version was checked on, and what each check measured.

``families.json`` is written by the sweep over tiny models with random weights of every family, saved to disk and opened
by ``probe.load`` in either installation (``tests/families/sweep.py --write``), never by hand; the same command draws
docs/families.md from it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from lvlm_probe.errors import ProbeError

CHECKS: Mapping[str, str] = {
    "asked": "the prompt that `probe.ask` and the command line make, by the chat template or the family's rule, is "
    "taken by the processor and answered",
    "generation": "tokens and logits of generate() with a recording probe equal those without, to the last bit",
    "replay": "recorded and replayed log-probabilities equal those of generate()'s own logits (in float64 ≤ 1e-9 nats; "
    "shown: in float32, as far as rounding on the machine at hand allows), and equal masks give equal rows",
    "pixels": "a random mask through the traced geometry equals the real processor on the masked image (≤ 2 levels "
    "of 255 in the mean)",
    "gradient": "the gradient to the mask is not zero and in float64 equals finite differences (≤ 1e-5); shown: how "
    "far the float32 one is from it (≤ 1 %)",
    "attention": "recorded attention rows equal those of the same model under eager attention (≤ 5e-5 beside the "
    "rounding of the float16 that they are kept in)",
    "geometry": "light one region of the image: the image tokens that move are those whose box covers it",
    "checkpointing": "the gradient with gradient checkpointing equals the one without, or it is refused",
    "detach": "after detach() nothing is left on model or processor",
}
"""What is checked, in the order of the table."""

INSTALLS: Mapping[str, str] = {"default": "default install", "torchvision": "with torchvision"}
"""The installations that are measured: of this package alone, and with the extras torchvision, timm and num2words."""

KINDS: Mapping[str, str] = {
    "A": "resize and centre crop",
    "B": "resize to a square",
    "C": "resize with padding",
    "D": "tiles of a chosen canvas and a base view",
    "E": "native size, flattened patches",
    "F": "square tiles and a thumbnail",
    "G": "splitting by the longest edge, and a global view",
    "H": "tile canvas with aspect-ratio ids",
    "I": "native aspect, padded batch",
    "J": "patches within a token budget",
    "K": "global view and local crops",
    "L": "flattened patches, each image normalised by its own statistics",
}


@dataclass(frozen=True)
class CheckedFamily:
    """One entry of transformers' image-text-to-text mapping.

    Attributes:
        name: its name there.
        model_class: the model class.
        kind: preprocessing, a letter of ``KINDS``; empty where it is not an LVLM.
        outside: why it is not counted as one, empty where it is.
        runs: one per installation and image: ``{"install", "larger", "checks": {name: {"passed", "figure",
            "note"}}}``; where the family cannot be loaded, no checks and ``"lacks"``, the libraries to install.
        videos: check → whether it passed, of videos (``tests/families/test_clips.py``); ``None``: it does not apply.
    """

    name: str
    model_class: str
    kind: str
    outside: str
    runs: tuple[Mapping[str, Any], ...]
    videos: Mapping[str, bool | None] = field(default_factory=dict)

    def lacks(self, install: str) -> tuple[str, ...]:
        """The libraries that are missing in an installation; empty where the family loads."""
        runs = [run for run in self.runs if run["install"] == install]
        return tuple(dict.fromkeys(name for run in runs for name in run.get("lacks", ())))

    def passes(self, install: str) -> bool:
        """Whether it loads in an installation and every check that applies passed there."""
        runs = [run for run in self.runs if run["install"] == install]
        return bool(runs) and not self.lacks(install) and all(self.verdict(c, install) is not False for c in CHECKS)

    def verdict(self, check: str, install: str | None = None) -> bool | None:
        """Whether a check passed in every run (of one installation); ``None`` where it applies to none."""
        found = [
            run["checks"][check]["passed"]
            for run in self.runs
            if check in run["checks"] and install in (None, run["install"])
        ]
        asked = [passed for passed in found if passed is not None]
        return all(asked) if asked else None

    def worst(self, check: str) -> float | None:
        """The largest figure a check measured."""
        figures = [run["checks"].get(check, {}).get("figure") for run in self.runs]
        return max((figure for figure in figures if figure is not None), default=None)

    def reasons(self, check: str) -> tuple[str, ...]:
        """Why a check failed or does not apply, each reason once."""
        entries = (run["checks"].get(check, {}) for run in self.runs)
        notes = (entry.get("note", "") for entry in entries if entry.get("passed") is not True)
        return tuple(dict.fromkeys(note for note in notes if note))

    @property
    def passed(self) -> bool:
        """Whether it loads somewhere, and every check that applies passed in every run."""
        loads = any(run["checks"] for run in self.runs)
        return loads and all(self.verdict(check) is not False for check in CHECKS)


@dataclass(frozen=True)
class FamilyTable:
    """All families, the day of the sweep, and the versions it ran with."""

    date: str
    versions: Mapping[str, str]
    families: tuple[CheckedFamily, ...]

    @property
    def lvlms(self) -> tuple[CheckedFamily, ...]:
        """The families that are counted."""
        return tuple(family for family in self.families if not family.outside)

    def __getitem__(self, name: str) -> CheckedFamily:
        for family in self.families:
            if family.name == name:
                return family
        raise ProbeError(
            f"{name!r} is not among the {len(self.families)} families of transformers {self.versions['transformers']}; "
            f"lvlm-probe families lists them. A model of another family can be attached all the same"
        )

    @property
    def passed(self) -> int:
        """How many of the counted families pass every check that applies to them."""
        return sum(family.passed for family in self.lvlms)

    def passing(self, install: str) -> int:
        """How many of the counted families load in an installation and pass there."""
        return sum(family.passes(install) for family in self.lvlms)

    def count(self, check: str, install: str | None = None) -> tuple[int, int]:
        """How many families pass a check, and of how many it was asked (those that load and that it applies to)."""
        verdicts = [family.verdict(check, install) for family in self.lvlms]
        return sum(v is True for v in verdicts), sum(v is not None for v in verdicts)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FamilyTable:
        """The table that ``families.json`` holds."""
        families = tuple(
            CheckedFamily(
                name,
                entry["class"],
                entry.get("kind", ""),
                entry.get("outside", ""),
                tuple(entry.get("runs", ())),
                entry.get("videos", {}),
            )
            for name, entry in value["families"].items()
        )
        return cls(value["date"], value["versions"], families)


@functools.cache
def family_table() -> FamilyTable:
    """The table that ships with this version."""
    text = resources.files("lvlm_probe").joinpath("families.json").read_text(encoding="utf-8")
    return FamilyTable.from_json(json.loads(text))


def summary(table: FamilyTable) -> Iterator[tuple[str, list[str]]]:
    """Check → "passed of asked" over all runs, and in each installation."""
    for check in CHECKS:
        yield check, ["{} of {}".format(*table.count(check, install)) for install in (None, *INSTALLS)]
