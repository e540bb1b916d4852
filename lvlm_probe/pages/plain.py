"""Values as a page may show them: JSON types, finite numbers, no folders of somebody's disk."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

_ABSOLUTE_PATH = re.compile(
    r"""(?<![\w.:/\\~])                # not the tail of a URL or of a relative path
        (?:~|[A-Za-z]:)?               # a home directory or a drive
        (?:[/\\][\w.@+\-]+){2,}[/\\]?  # at least two levels
    """,
    re.VERBOSE,
)


def without_folders(text: str) -> str:
    """Reduce every absolute path in a text to its last part: ``/home/ada/models/llava`` becomes ``llava``."""
    return _ABSOLUTE_PATH.sub(lambda match: re.split(r"[/\\]", match[0].rstrip("/\\"))[-1], text)


def plain(value: Any) -> Any:
    """Return a value as JSON: arrays and tensors as lists, NaN and infinities as None, paths by their name."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return without_folders(value)
    if isinstance(value, PurePath):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if hasattr(value, "detach") and hasattr(value, "tolist"):
        return plain(value.detach().cpu().tolist())
    if isinstance(value, Sequence | set | frozenset):
        return [plain(item) for item in value]
    return without_folders(str(value))


def probability(log_probability: float) -> float | None:
    """``exp`` of a log-probability, or None where it is not known."""
    return min(1.0, math.exp(log_probability)) if math.isfinite(log_probability) else None


def nats(value: float) -> float | None:
    """A log-likelihood ratio in nats, or None where it is not known."""
    return round(float(value), 6) if math.isfinite(value) else None


def rounded(value: float | None, digits: int = 2) -> float | None:
    """A number to so many digits, or None where it is not known."""
    known = None if value is None else nats(value)
    return None if known is None else round(known, digits)
