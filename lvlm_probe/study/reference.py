"""Reference of a study's file: every key with what it holds, its default, meaning and an example."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

from lvlm_probe.study.datasets.registry import options_of, readers
from lvlm_probe.study.keys import Key, default_text, kind_of, parts
from lvlm_probe.study.spec import DatasetSpec, FilterSpec, MethodSpec, ModelSpec, Settings, Study

_SECTIONS: tuple[tuple[str, type], ...] = (
    ("", Study),
    ("models.NAME.", ModelSpec),
    ("datasets.NAME.", DatasetSpec),
    ("methods.ROW.", MethodSpec),
    ("settings.", Settings),
    ("filter.", FilterSpec),
)


@dataclass(frozen=True)
class Entry:
    """A key of a study's file.

    Attributes:
        key: Where it stands, ``datasets.NAME.limit``.
        kind: What it holds, in words.
        default: What holds without it; ``needed`` where there is no such thing.
        says: Its meaning.
        example: A line of YAML.
        reader: The reader whose option it is, if any.
    """

    key: str
    kind: str
    default: str
    says: str
    example: str
    reader: str | None = None


def study_keys() -> list[Entry]:
    """Every key, in the order of a file; options of readers, those of plugins too, behind the keys of data sets."""
    found = []
    for where, kind in _SECTIONS:
        defaults = {item.name: item for item in dataclasses.fields(kind)}
        for name, (hint, key) in parts(kind).items():
            found.append(_entry(where, name, hint, key, _default(defaults[name])))
        if kind is DatasetSpec:
            for reader in readers():
                for name, (hint, key, default) in options_of(reader).items():
                    given = "needed" if default is inspect.Parameter.empty else default_text(default)
                    found.append(dataclasses.replace(_entry(where, name, hint, key, given), reader=reader))
    return found


def _entry(where: str, name: str, hint: Any, key: Key, default: str) -> Entry:
    example = f"{name}: {key.example}" if key.example else ""
    return Entry(where + name, kind_of(hint), key.default or default, key.says, example)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return default_text(field.default)
    return "needed" if field.default_factory is dataclasses.MISSING else "none"


def keys_page() -> str:
    """The reference as Markdown."""
    lines = [
        "# The keys of a study",
        "",
        "Made from the program: `lvlm-probe study keys` says the same. A wrong key, or a value of another kind, is an "
        "error with its line and the nearest right name; `lvlm-probe study init data.csv` writes a file to begin with.",
    ]
    readers_shown: set[str | None] = set()
    last = None
    for entry in study_keys():
        section = entry.key.rpartition(".")[0]
        if entry.reader is not None and entry.reader not in readers_shown:
            readers_shown.add(entry.reader)
            last = section
            lines += ["", f"### Options of the reader `{entry.reader}`", ""]
            lines += [f"Expects {_shown(readers()[entry.reader])}.", "", *_HEAD]
        elif entry.reader is None and section != last:
            last = section
            lines += ["", f"## `{section}`" if section else "## The file", "", *_HEAD]
        name, example = (f"`{text}`" if text else "" for text in (entry.key.rpartition(".")[2], entry.example))
        lines.append(f"| {name} | {entry.kind} | {_shown(entry.default)} | {_shown(entry.says)} | {example} |")
    return "\n".join(lines) + "\n"


def _shown(text: str) -> str:
    """A sentence of ours in a cell, its code left as code."""
    for sign, shown in (("|", r"\|"), ("*", r"\*"), ("<", "&lt;"), (">", "&gt;"), ("[", r"\[")):
        text = text.replace(sign, shown)
    return text


_HEAD = ("| key | holds | default | meaning | example |", "|---|---|---|---|---|")
