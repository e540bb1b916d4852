"""The package where it is not installed, closed forms of the core's tests, and the embedded model."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import lvlm_probe_captum
import pytest
from draws import pytest_runtest_call, pytest_runtest_setup  # noqa: F401  (hooks)

import lvlm_probe as probe

lvlm_probe_captum.register()


@pytest.fixture(scope="session")
def demo():
    """The embedded model and its processor."""
    return probe.demo.load()
