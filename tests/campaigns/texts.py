"""Texts of strangers: lines to import, studies in YAML, and whatever the command line prints.

*rows*: A file of JSON lines with one odd line between two good ones: the good ones come through, the odd one is a row
or a reason. *yaml*: A study with an odd place in it is read, or refused in words. *terminal*: Traces whose every text
is made to drive a terminal are listed, described and metered; nothing but printable text and line ends is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import random
import shutil
import sys
import tempfile
import unicodedata
import unittest.mock
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trace_samples import sample_capture

from campaigns.forked import Limits, in_forks
from campaigns.hostile import odd_json
from campaigns.tally import Campaign, Tally
from lvlm_probe.cli import main
from lvlm_probe.errors import StudyError
from lvlm_probe.importing.rows import AnswerRow, BadRow, read_rows
from lvlm_probe.study.spec import read_study
from lvlm_probe.trace import write

__all__ = ["CAMPAIGNS", "ROWS", "STUDIES"]

ROW: dict[str, Any] = {
    "id": "a-1", "image": "photo.png", "question": "What is this?", "answer": "A red cross.",
    "token_ids": [3, 4, 5], "logprobs": [-0.1, -0.2, -0.3], "model": "served",
}  # fmt: skip
STUDY = """
name: demo
about: What is studied, and why.
out: runs/study-demo
models:
  demo: {source: demo}
  other: {source: path/to/model, dtype: bfloat16, device_map: auto, group: llava, size: 7}
datasets:
  scenes: {reader: demo, source: easy, limit: 20}
methods:
  igos++: {}
  paper: {method: igos++, params: {preset: paper}}
  joint: {method: igos++, tokens: joint}
settings: {alpha: 1.0, baseline: blur, grid: 32, steps: 50, seed: 0}
filter: {minimum_drop: 0.3, normalised: false}
"""
ODD_YAML = (
    "!!python/object/apply:os.system ['true']",
    "!!set {a, b}",
    "2026-11-28",
    "!!binary aGVsbG8=",
    "&a [*a]",
    "*nobody",
    "<<: {a: 1}",
    "~nosuchuser/x",
    "1e999",
    ".nan",
    ".inf",
    "-.inf",
    "1" * 5_000,
    "0x" + "f" * 400,
    "null",
    "''",
    "[]",
    "{}",
    "{a: {b: {c: 1}}}",
    "[" * 400,
    "[" * 5_000,
    "{" * 2_000,
    "? [a, b] : c",
    "'\\ud800'",
    '"\\x00"',
    '"\\e[2J"',
    "yes",
    "1_000_000_000",
    "1:30:45",
    "|\n  text",
    "- - - -",
    "%TAG ! x",
    "\t",
    ": :",
    "\u202e",
    "x" * 100_000,
)


YAML_BITS = (
    "&a ", "*a", "!!set ", "!!binary ", "!x ", "<<: ", "? ", "- ", ": ", "{", "}", "[", "]", "[" * 60, "|", ">", "'",
    '"', "\\", "#", "%", "@", "`", "~", ".nan", ".inf", "1e999", "9" * 80, "0x" + "f" * 70, "1:30", "2024-01-01", "\t",
    "---", "...", '"\\0"', '"\\ud800"', '"\\UFFFFFFFF"', "null", "true", "\n", "  ", "\x00", "\x1b", "\x85", "\u2028",
    "\ufeff", "\U0001f600", "=", "y", "-1", "{a: [1, {b: 2}]}", "name", "models:", "methods:", "~nosuchuser/x",
)  # fmt: skip


def mutated(text: str, bits: tuple[str, ...], rng: random.Random) -> str:
    """A text with bits of it put in, left out, exchanged or repeated."""
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


def odd_study(rng: random.Random) -> str:
    """A study with something odd in it."""
    kind = rng.randrange(10)
    if kind > 5:
        return mutated(STUDY, YAML_BITS, rng)
    lines = STUDY.splitlines()
    place = rng.randrange(1, len(lines))
    odd = rng.choice(ODD_YAML)
    if kind == 0:
        head = lines[place].partition(":")[0]
        lines[place] = f"{head}: {odd}"
    elif kind == 1:
        inside = lines[place].split(": ")
        lines[place] = ": ".join([*inside[:-1], odd]) + ("}" if "{" in lines[place] else "")
    elif kind == 2:
        lines.insert(place, rng.choice([lines[place], odd, f"{odd}: {odd}", f"  {odd}: x"]))
    elif kind == 3:
        names = ["a"] + [f"a{n}" for n in range(rng.choice([3, 8, 12]))]
        bomb = [f"a: &a [{', '.join(['x'] * 9)}]"]
        bomb += [f"{name}: &{name} [{', '.join([f'*{names[n]}'] * 9)}]" for n, name in enumerate(names[1:])]
        lines = [*bomb, *lines, f"settings: {{grid: *{names[-1]}}}"]
    elif kind == 4:
        text = "\n".join(lines)
        for _ in range(rng.choice([1, 3, 10])):
            at = rng.randrange(len(text))
            text = (
                text[:at] + rng.choice(["", "\t", "{", "}", ":", "&a ", "*a", "!", "\x00", "é", "- "]) + text[at + 1 :]
            )
        return text
    else:
        lines = [line for line in lines if rng.random() < 0.8]
        lines += [f"k{n}: {n}" for n in range(rng.choice([0, 3, 20_000]))]
    return "\n".join(lines)


def _yaml(number: int, at: Path, seed: int) -> tuple[str, Callable[[], str]]:
    rng = random.Random(f"{seed}/{number}")
    text = odd_study(rng)
    data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.03:
        data = data[: len(data) // 2] + rng.randbytes(3) + data[len(data) // 2 :]
    path = at / "study.yaml"
    path.write_bytes(data)

    def read() -> str:
        try:
            study = read_study(path)
        except StudyError as error:
            fine = str(path) in str(error) and len(str(error)) < 1000
            return "refused" if fine else f"refused without naming the file, or at length: {str(error)[:200]}"
        json.dumps(study.to_dict(), allow_nan=False).encode("utf-8")
        return "read"

    return f"yaml {text[:30]!r}", read


VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 2**63, 10**400, -(10**400), 1.5, float("nan"), float("inf"), "", " ", "a", "a" * 5000,
    "\x00", "\x1b[2J", "\ud800", "\u202e", [], [[]], [None], [1, "a"], {}, {"a": {}}, {"logprob": None},
    {"content": [{"token": "a"}]}, [[-0.1, 5, "a"]], [{"5": {"logprob": -1.0}}], "data:image/png;base64,AAAA",
    "/etc/passwd", "../x.png", "x.png", ["x.png"] * 3, "~nosuchuser/x",
)  # fmt: skip
JSON_BITS = (
    "[" * 3000, "{", "}", '"', ",", ":", "\\ud800", "\\u0000", "NaN", "Infinity", "-Infinity", "9" * 5000, "1e400",
    "null", "true", "\x00", "\x1b", "\t", "\ufeff", '{"image":', "\\", "//", "\u2028",
)  # fmt: skip


def odd_line(rng: random.Random) -> bytes:
    """A line of a file to import that is not as it should be."""
    kind = rng.randrange(10)
    if kind > 4:
        row = dict(ROW)
        for _ in range(rng.choice([0, 1, 2])):
            row[rng.choice([*ROW, "prompt", "engine", "extra"])] = rng.choice(VALUES)
        text = json.dumps(row)
        data = (mutated(text, JSON_BITS, rng) if rng.random() < 0.5 else text).encode("utf-8", "surrogatepass")
        place = rng.randrange(len(data) + 1)
        return data[:place] + bytes([rng.choice([0xFF, 0xC3, 0x80, 0x00])]) * (rng.random() < 0.1) + data[place:]
    if kind == 0:
        return odd_json(rng, json.dumps(ROW))
    if kind == 1:
        name = rng.choice(list(ROW))
        values = [
            None,
            True,
            -1,
            2**70,
            -(10**400),
            1e308,
            "",
            "x" * rng.choice([10, 200_000]),
            [],
            {},
            [[1]],
            [None],
            [-1, 0.5],
            {"content": [{"logprob": "x"}]},
            "data:image/png;base64,AAAA",
            "/etc/passwd",
            "../" * 40,
            "\ud800",
            [float("nan")],
        ]
        return json.dumps({**ROW, name: rng.choice(values)}).encode("utf-8", "surrogatepass")
    if kind == 2:
        line = bytearray(json.dumps(ROW).encode())
        for _ in range(rng.choice([1, 3])):
            line[rng.randrange(len(line))] = rng.choice([b for b in range(256) if b not in b"\r\n"])
        return bytes(line)
    if kind == 3:
        return json.dumps({name: value for name, value in ROW.items() if rng.random() < 0.6}).encode()
    return rng.choice(
        [b"\xff\xfe", b"\xef\xbb\xbf{}", b"\x00" * 99, b"{" * 99_999, b"[" * 99_999, b'{"a":' * 50_000, b"1", b"\x1b"]
    )


def _rows(number: int, at: Path, seed: int) -> tuple[str, Callable[[], str]]:
    odd = odd_line(random.Random(f"{seed}/{number}")).replace(b"\n", b" ").replace(b"\r", b" ")
    path = at / "rows.jsonl"
    good = json.dumps(ROW).encode()
    path.write_bytes(b"\n".join([good, odd, good]) + b"\n")

    def read() -> str:
        found = dict(read_rows(path))
        if not isinstance(found.get(1), AnswerRow) or not isinstance(found.get(3), AnswerRow):
            return f"a good row was lost: {found}"
        other = found.get(2)
        if isinstance(other, BadRow):
            str(other).encode("utf-8")
            return "refused" if 0 < len(str(other)) <= 400 else f"a reason of {len(str(other))} characters"
        if other is not None and not all(isinstance(value, float) for value in other.log_probs or ()):
            return f"log-probabilities that are no numbers: {other.log_probs}"
        return "read"

    return f"rows {odd[:30]!r}", read


# ------------------------------------------------------------------------------------------------------------- terminal

ESCAPES = (
    "\x1b]0;title\x07",
    "\x1b[2J",
    "\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\",
    "\x1b]52;c;aGk=\x07",
    "\x9b2J",
    "\x9d0;t\x9c",
    "\u202e",
    "\u2066",
    "\x07",
    "\x08\x08",
    "\r",
    "\x00",
    "\x7f",
    "\x85",
    "\u2028",
    "[red]",
    "[link=http://x]y[/link]",
    "\x1b[?1049h",
)


def _leaks(text: str) -> str:
    """Characters that a terminal obeys; line ends are ours."""
    turning = "\u202a\u202b\u202d\u202e\u2066\u2067\u2068"
    obeyed = {c for c in text if c in turning or (c != "\n" and unicodedata.category(c) in ("Cc", "Zl", "Zp"))}
    return "".join(sorted(obeyed))


def _terminal(number: int, at: Path, seed: int) -> tuple[str, Callable[[], str]]:
    rng = random.Random(f"{seed}/{number}")

    def odd(text: str) -> str:
        place = rng.randrange(len(text) + 1)
        return text[:place] + rng.choice(ESCAPES) + text[place:] if rng.random() < 0.7 else text

    capture = sample_capture(1, seed=number)
    row = capture.rows[0]
    # A name is a file's and not a text's: what no file system forbids.
    folder = at / f"{number}"
    rows = [dataclasses.replace(
        row, tokens=[odd(piece) for piece in row.tokens], prompt=odd(row.prompt), question=odd("What is there?"),
        notes=[odd("a note")], meta={"run": odd("x"), odd("key"): 1},
    )]  # fmt: skip
    model = {**capture.model, "model_id": odd("demo/tiny"), "class": odd("Llava")}
    path = write(dataclasses.replace(capture, rows=rows, model=model), folder)
    name = odd("answers").replace("\x00", "").replace("/", "")
    path.rename(folder / f"{name}.b1.h5")
    if rng.random() < 0.3:
        (folder / f"{odd('broken').replace(chr(0), '').replace('/', '')}.h5").write_bytes(b"\x1b[2J no trace")
    lines = folder / "answers.jsonl"
    lines.write_text(
        json.dumps({**{k: odd(v) if isinstance(v, str) else v for k, v in ROW.items()}, "image": "no.png"}) + "\n"
    )
    model_name = odd("none").replace("\x00", "")
    command: list[Any] = rng.choice(
        [
            ["inspect", folder],
            ["inspect", folder / f"{name}.b1.h5"],
            ["inspect", "--json", folder],
            ["verify", folder, "--model", folder / "none"],
            ["import", lines, "--model", model_name, "--out", folder],
            ["explain", folder, "--model", model_name],
        ]
    )

    def read() -> str:
        printed, unexpected = io.StringIO(), False
        words = ["lvlm-probe", *(str(word) for word in command)]
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            with unittest.mock.patch.object(sys, "argv", words):
                try:
                    main()
                except SystemExit as end:
                    unexpected = end.code == 3
        shutil.rmtree(folder, ignore_errors=True)
        leaked = _leaks(printed.getvalue())
        if unexpected:
            return f"{command[0]} ended in something unexpected: {printed.getvalue()[:200]!r}"
        return f"printed control characters: {leaked!r} by {command[0]}" if leaked else "clean"

    return f"{command[0]} {number}", read


def campaign(name: str, promise: str, units: int, trial: Any) -> Campaign:
    def run(first: int, count: int, seed: int) -> Tally:
        warnings.simplefilter("ignore")
        tally = Tally()
        folder = Path(tempfile.mkdtemp(prefix=f"lvlm_probe_{name}_"))
        try:
            (folder / "warm").mkdir()
            trial(0, folder / "warm", seed)[1]()  # imports, before the forks
        except Exception as error:
            tally.breaks("a foreign exception", f"number 0: {type(error).__name__}: {error}")
        try:
            in_forks(first, count, folder, lambda number, at: trial(number, at, seed), Limits(), tally)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return tally

    return Campaign(name, promise, "texts", units, max(500, units // 4), run)


ROWS = campaign("rows", "A line that cannot be imported is a reason, and never stops the others.", 10_000, _rows)
STUDIES = campaign("yaml", "A study that cannot be run is refused in words that name the file.", 10_000, _yaml)
CAMPAIGNS = (
    ROWS,
    STUDIES,
    campaign("terminal", "No text of a file drives the terminal.", 4_000, _terminal),
)
