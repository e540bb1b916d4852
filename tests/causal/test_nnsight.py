"""Everything that imports nnsight, in a process of its own: importing it changes ``torch.Tensor`` and ``object``."""

from __future__ import annotations

import os
from pathlib import Path

import new_process
import pytest

pytest.importorskip("greenlet", reason="nnsight is not installed")


def test_checks_of_what_goes_through_nnsight():
    checks = Path(__file__).parents[1].joinpath("nnsight_checks.py")
    # nnsight takes a -v among the arguments for its own debug switch.
    arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(checks)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    code = f"import pytest; raise SystemExit(pytest.main({arguments}))"
    done = new_process.run(code, cwd=checks.parents[1], env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
