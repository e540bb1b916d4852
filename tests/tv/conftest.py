"""Tests of the torchvision backends; they run in a second environment that has torchvision beside a CPU torch."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torchvision_shim  # noqa: F401  (before anything imports torchvision)
