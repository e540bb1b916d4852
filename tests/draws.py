"""The draws of a test from the generators that everybody shares: the same, whatever ran before it.

``DRAWS=7 make test`` draws otherwise: no test may hang on what it happens to draw."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

__all__ = ["pytest_runtest_call", "pytest_runtest_setup"]


def _seed() -> None:
    seed = int(os.environ.get("DRAWS", "0"))
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (what is tested may draw from it)
    torch.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed what fixtures draw."""
    _seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Seed what the test draws: its fixtures may have been made for an earlier one."""
    _seed()
