"""The command line in this process."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lvlm_probe import cli

__all__ = ["Result", "run", "succeed"]


@dataclass(frozen=True)
class Result:
    """What a command left on the terminal."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run(*arguments: str | Path, columns: int = 200) -> Result:
    """``lvlm-probe ARGUMENTS`` in this process, on so many columns."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["lvlm-probe", *map(str, arguments)]),
        mock.patch.dict(os.environ, {"COLUMNS": str(columns)}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
        _log_as_it_was(),
        pytest.raises(SystemExit) as exit_,
    ):
        cli.main()
    return Result(int(exit_.value.code or 0), out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _log_as_it_was() -> Iterator[None]:
    """A command sets how much is logged, and this process goes on."""
    logger = logging.getLogger("lvlm_probe")
    level, handlers = logger.level, logger.handlers[:]
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.handlers[:] = handlers


def succeed(*arguments: str | Path, columns: int = 200) -> Result:
    result = run(*arguments, columns=columns)
    assert result.code == 0, result.err
    return result
