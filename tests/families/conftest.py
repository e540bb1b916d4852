"""Tests of the model families; they run in the second environment, which has torchvision beside a CPU torch."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torchvision_shim  # noqa: E402, F401  (before anything imports torchvision)
