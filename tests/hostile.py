"""Seeded fuzzers of what the package reads besides traces: rows of answers, studies, and texts for the terminal.

Each takes a number of cases and a seed, and gives counts by outcome; any other outcome is raised as ``AssertionError``.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from lvlm_probe.cli.shared import terminal
from lvlm_probe.errors import StudyError
from lvlm_probe.importing.rows import AnswerRow, BadRow, read_rows
from lvlm_probe.study.spec import read_study

STUDY = """\
name: demo
about: What is studied.
models:
  demo: {source: demo, size: 7, group: a}
  other: {source: dir/model, dtype: bfloat16}
datasets:
  scenes: {reader: demo, source: eval, limit: 3, options: {hard: true}}
methods:
  igos++: {params: {preset: paper}}
  joint: {method: igos++, tokens: joint, tables: [2, 3], alpha: 1.5}
settings: {alpha: 1.0, grid: 32, steps: 50, seed: 0}
filter: {minimum_drop: 0.3, normalised: false}
"""
YAML_BITS = (
    "&a ", "*a", "!!set ", "!!binary ", "!x ", "<<: ", "? ", "- ", ": ", "{", "}", "[", "]", "[" * 60, "|", ">", "'",
    '"', "\\", "#", "%", "@", "`", "~", ".nan", ".inf", "1e999", "9" * 80, "0x" + "f" * 70, "1:30", "2024-01-01", "\t",
    "---", "...", '"\\0"', '"\\ud800"', '"\\UFFFFFFFF"', "null", "true", "\n", "  ", "\x00", "\x1b", "\x85", "\u2028",
    "\ufeff", "\U0001f600", "=", "y", "-1", "{a: [1, {b: 2}]}", "name", "models:", "methods:", "~nosuchuser/x",
)  # fmt: skip


def _mutated(text: str, bits: tuple[str, ...], rng: random.Random) -> str:
    for _ in range(rng.choice([1, 1, 2, 4])):
        place = rng.randrange(len(text) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            text = text[:place] + rng.choice(bits) + text[place:]
        elif kind == 1:
            text = text[:place] + text[place + rng.choice([1, 1, 4, 20]) :]
        elif kind == 2:
            text = text[:place] + rng.choice(bits) + text[place + rng.choice([1, 2, 8]) :]
        else:
            lines = text.split("\n")
            other = rng.choice(lines)
            lines.insert(rng.randrange(len(lines) + 1), other)
            text = "\n".join(lines)
    return text


def fuzz_studies(count: int, seed: int) -> Counter[str]:
    """Mutated study files: each is read, or refused by a ``StudyError`` that names the file."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.yaml"
        for _ in range(count):
            text = _mutated(STUDY, YAML_BITS, rng)
            data = text.encode("utf-8", "surrogatepass")
            if rng.random() < 0.05:
                data = data[: len(data) // 2] + rng.randbytes(3) + data[len(data) // 2 :]
            path.write_bytes(data)
            said = ""
            try:
                study = read_study(path)
                json.dumps(study.to_dict(), allow_nan=False).encode("utf-8")
            except StudyError as error:
                said = str(error)
            assert not said or (str(path) in said and len(said) < 1000), said[:200]
            counts["refused" if said else "read"] += 1
    return counts


VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 2**63, 10**400, -(10**400), 1.5, float("nan"), float("inf"), "", " ", "a", "a" * 5000,
    "\x00", "\x1b[2J", "\ud800", "\u202e", [], [[]], [None], [1, "a"], {}, {"a": {}}, {"logprob": None},
    {"content": [{"token": "a"}]}, [[-0.1, 5, "a"]], [{"5": {"logprob": -1.0}}], "data:image/png;base64,AAAA",
    "/etc/passwd", "../x.png", "x.png", ["x.png"] * 3, "~nosuchuser/x",
)  # fmt: skip
ROW = {
    "image": "x.png",
    "question": "What?",
    "answer": "Red.",
    "token_ids": [5, 6],
    "logprobs": [-0.1, -0.2],
    "id": "q",
}
JSON_BITS = (
    "[" * 3000, "{", "}", '"', ",", ":", "\\ud800", "\\u0000", "NaN", "Infinity", "-Infinity", "9" * 5000, "1e400",
    "null", "true", "\x00", "\x1b", "\t", "\ufeff", '{"image":', "\\", "//", "\u2028",
)  # fmt: skip


def fuzz_rows(count: int, seed: int) -> Counter[str]:
    """One mutated line between two good ones: the good ones are read, the other one is read or refused in words."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    good = json.dumps(ROW).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        for _ in range(count):
            row = dict(ROW)
            for _ in range(rng.choice([0, 1, 2])):
                row[rng.choice([*ROW, "prompt", "engine", "extra"])] = rng.choice(VALUES)
            text = json.dumps(row)
            if rng.random() < 0.5:
                text = _mutated(text, JSON_BITS, rng)
            data = text.replace("\n", " ").encode("utf-8", "surrogatepass")
            if rng.random() < 0.1:
                place = rng.randrange(len(data) + 1)
                data = data[:place] + bytes([rng.choice([0xFF, 0xC3, 0x80, 0x00])]) + data[place:]
            path.write_bytes(good + b"\n" + data + b"\n" + good + b"\n")
            found = dict(read_rows(path))
            assert isinstance(found[1], AnswerRow) and isinstance(found[3], AnswerRow), data[:200]
            other = found.get(2)
            if isinstance(other, BadRow):
                str(other).encode("utf-8")
                assert 0 < len(str(other)) <= 400, str(other)
                counts["refused"] += 1
            else:
                assert other is None or all(isinstance(value, float) for value in other.log_probs or ())
                counts["read"] += 1
    return counts


ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
EVIL = (
    "\x1b]0;OWNED\x07\x1b[2J\x1b[31mred\x1b[0m \x9b31m \x1b]8;;http://evil/\x1b\\link\x1b]8;;\x1b\\ \u202egnp.exe "
    "\x1b]52;c;ZWNobyBvd25lZA==\x07 \r\x08\x7f \u2028\u2066\ud800 [red]markup[/red]"
)
TERMINAL_BITS = (
    "\x1b", "\x1b[", "\x1b]", "\x1bP", "\x9b", "\x9d", "\x07", "\x08", "\r", "\r\n", "\n", "\t", "\x00", "\x7f",
    "\u202e", "\u2066", "\u2028", "\u2029", "\u200f", "\ufeff", "\ud800", "\udfff", "[red]", "[/red]", "[link=http://evil]",
    "a", "é", "\U0001f600", "\u200d", "中", "{}", "%s", "\\",
)  # fmt: skip


def fuzz_terminal(count: int, seed: int) -> Counter[str]:
    """Texts of acting characters through every way to the terminal; nothing acting comes out, and JSON is unchanged."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    for _ in range(count):
        text = "".join(rng.choice(TERMINAL_BITS) for _ in range(rng.randrange(1, 12)))
        way = rng.choice(("say", "note", "json", "show", "stored_path"))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if way == "say":
                terminal.say(text, (text, "bold"), terminal.answer_text((), [text], None, ()))
            elif way == "note":
                terminal.note(text)
            elif way == "json":
                terminal.print_json({text: [text]})
            elif way == "show":
                terminal.show(text)
            else:
                terminal.show(terminal.stored_path(Path(text.replace("\x00", ""))))
        written = out.getvalue() + err.getvalue()
        assert not ACTING.search(written), (way, text, written)
        written.encode("utf-8")
        if way == "json":
            same = json.loads(json.dumps(text))  # two halves become one character in JSON
            assert json.loads(out.getvalue()) == {same: [same]}
        counts[way] += 1
    return counts
