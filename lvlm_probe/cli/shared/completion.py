"""Shell completion: what may stand behind an option, offered without importing torch.

Names of methods and data sets are read off the source of the package, where each registers itself by name: a person
who presses a key waits tenths of a second, not for torch. Those of plugins are not offered, and work all the same.
Files are completed by the shell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from importlib import resources
from importlib.resources.abc import Traversable

Completion = Callable[[str], list[str]]


def choices(*words: str) -> Completion:
    """Return the completion of one of a few words."""
    return lambda incomplete: _beginning(incomplete, words)


def complete_method(incomplete: str) -> list[str]:
    """Complete the name of a method."""
    return _beginning(incomplete, _registered("explainers", "register"))


def complete_methods(incomplete: str) -> list[str]:
    """Complete the last of several names of methods with commas between, or ``all``."""
    before, comma, last = incomplete.rpartition(",")
    named = before.split(",")
    names = [name for name in _registered("explainers", "register") if name not in named]
    return [f"{before}{comma}{name}" for name in _beginning(last, names if comma else [*names, "all"])]


def complete_dataset(incomplete: str) -> list[str]:
    """Complete the name of a data set."""
    return _beginning(incomplete, _registered("study/datasets", "register_dataset"))


def complete_family(incomplete: str) -> list[str]:
    """Complete the name of a family that was checked."""
    text = resources.files("lvlm_probe").joinpath("families.json").read_text(encoding="utf-8")
    return _beginning(incomplete, json.loads(text)["families"])


def _beginning(incomplete: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]


def _registered(room: str, decorator: str) -> list[str]:
    """Names that modules of a room register, read off their source."""
    pattern = re.compile(rf'^@{decorator}\(\s*"([^"]+)"', re.MULTILINE)
    return sorted(
        name for text in _sources(resources.files("lvlm_probe").joinpath(room)) for name in pattern.findall(text)
    )


def _sources(folder: Traversable) -> Iterable[str]:
    for item in folder.iterdir():
        if item.is_dir():
            yield from _sources(item)
        elif item.name.endswith(".py"):
            yield item.read_text(encoding="utf-8")
