"""Everything that imports nnsight, in a process of its own: importing it changes ``torch.Tensor`` and ``object``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("greenlet", reason="nnsight is not installed")


def test_checks_of_what_goes_through_nnsight():
    checks = Path(__file__).parents[1].joinpath("nnsight_checks.py")
    # nnsight takes a -v among the arguments for its own debug switch.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(checks)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=checks.parents[1], env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
