"""Marks of parameters."""

from __future__ import annotations

from typing import Any

import pytest

__all__ = ["campaign"]


def campaign(*values: Any) -> list[Any]:
    """Parameters that show what others of their test show as well: `make campaign` tries them, `make test` does not."""
    several = (value if isinstance(value, tuple) else (value,) for value in values)
    return [pytest.param(*value, marks=pytest.mark.campaign) for value in several]
