"""A pretended accelerator for the tests of this folder, which run in a process of their own: torch looks once at which
devices there are, when it first runs backward."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pretend  # noqa: F401
import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.backends.cuda.is_built():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="this torch has CUDA: tests/benchmarks/gpu_run.sh uses the device"))
