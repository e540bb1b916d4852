"""Makes the package importable where it is not installed, and registers it as its entry point does."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[3] / "tests"))

import lvlm_probe_mini_gemini
import torchvision_shim  # noqa: F401  (before anything imports torchvision, where it is installed)
from draws import pytest_runtest_call, pytest_runtest_setup  # noqa: F401  (hooks)

lvlm_probe_mini_gemini.register()
