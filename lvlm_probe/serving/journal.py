"""Answers of a server that are paid for: one line of JSON each, in a file that is only added to.

A line is ``{"key": …, "log_probs": {step: nats}}``; ``null`` is −∞, a pair the least and the most that it can be. The
key is the SHA-256 of everything that decides the numbers (engine, model, prompt, answer, route, pixels), so whoever
asks for the same again finds it here: a run that was killed, an ``evaluate`` after an ``explain``, another method that
meets the same mask. ``{"drop": [keys]}`` takes back what a later check has found untrue. A line that a kill cut in two
is passed over. ``{"key": …, "said": {…}}`` is an answer that was given before, by the tokens that the server makes of
it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lvlm_probe.errors import ReplayError
from lvlm_probe.files import causes, open_regular
from lvlm_probe.process import lock
from lvlm_probe.serving.roads import Reading

FILE = "served.jsonl"
"""Its name beside the traces."""

_LONGEST_LINE = 1 << 22


class Journal:
    """What a server has answered, by content.

    Args:
        path: the file; ``None`` keeps answers in memory only.

    Raises:
        ReplayError: the file cannot be read or written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[str, dict[int, Reading]] = {}
        self._said: dict[str, dict[str, Any]] = {}
        self._lock = lock()
        self._file: int | None = None
        if path is not None:
            self._read(path)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> dict[int, Reading] | None:
        """Log-probabilities by step; ``None`` for what was not asked."""
        with self._lock:
            known = self._known.get(key)
            return None if known is None else dict(known)

    def put(self, key: str, values: Mapping[int, Reading]) -> None:
        """Keep an answer; when this returns, a kill does not lose it."""
        with self._lock:
            self._known.setdefault(key, {}).update(values)
            self._write({"key": key, "log_probs": {str(step): _plain(value) for step, value in values.items()}})

    def said(self, key: str) -> dict[str, Any] | None:
        """What the server makes of an answer; ``None`` where it was not asked."""
        with self._lock:
            return self._said.get(key)

    def keep_said(self, key: str, said: dict[str, Any]) -> None:
        """Keep what the server makes of an answer."""
        with self._lock:
            self._said[key] = said
            self._write({"key": key, "said": said})

    def drop(self, keys: Iterable[str]) -> None:
        """Take answers back."""
        with self._lock:
            gone = [key for key in keys if self._known.pop(key, None) is not None]
            if gone:
                self._write({"drop": gone})

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _read(self, path: Path) -> None:
        try:
            with open_regular(path) as file:
                for line in file:
                    if len(line) <= _LONGEST_LINE:
                        self._take(line)
        except FileNotFoundError:
            return
        except OSError as error:
            raise ReplayError(f"{path} cannot be read: {'; '.join(causes(error))}") from error

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            for key in record.get("drop", ()):
                self._known.pop(key, None)
            if isinstance(record.get("said"), dict):
                self._said[str(record["key"])] = record["said"]
            elif "key" in record:
                values = {int(step): _read(value) for step, value in record["log_probs"].items()}
                self._known.setdefault(str(record["key"]), {}).update(values)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass  # torn by a kill, or no line of ours

    def _write(self, record: Mapping[str, object]) -> None:
        if self.path is None:
            return
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
                self._file = os.open(self.path, flags, 0o666)
                if os.fstat(self._file).st_size:
                    os.write(self._file, b"\n")  # ends a line that a kill or a full disk cut in two
            line = memoryview(json.dumps(record).encode() + b"\n")
            while line:  # a disk that fills up takes a part first, and refuses the rest
                line = line[os.write(self._file, line) :]
        except OSError as error:
            if self._file is not None:
                os.close(self._file)
                self._file = None
            raise ReplayError(
                f"{self.path} cannot be written: {'; '.join(causes(error))}; name another file, connect(…, journal=…)"
            ) from error


def _plain(value: Reading) -> float | list[float | None] | None:
    """JSON for a value."""
    if isinstance(value, tuple):
        return [None if math.isinf(one) else one for one in value]
    return None if math.isinf(value) else value


def _read(value: object) -> Reading:
    """What ``_plain`` has written. Raises ``ValueError`` or ``TypeError`` for anything else."""
    if isinstance(value, list):
        low, high = (-math.inf if one is None else float(one) for one in value)
        if not low <= high <= 0:
            raise ValueError(value)
        return low, high
    found = -math.inf if value is None else float(value)  # type: ignore[arg-type]
    if not found <= 0 or (math.isinf(found) and value is not None):
        raise ValueError(value)
    return found
