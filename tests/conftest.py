"""Fixtures shared by the tests: one thread per process, the demo model, tiny random models, a picture."""

from __future__ import annotations

import contextlib
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from PIL import Image

with contextlib.suppress(ImportError):  # the environment with torchvision goes without
    from hypothesis import HealthCheck, settings

    # How long an example takes is the machine's affair: nothing may fail on a busy one.
    settings.register_profile("anywhere", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("anywhere")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tests run side by side on few cores; more threads only fight each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo():
    """The embedded model and its processor, ``(model, processor)``; treat as read-only."""
    import lvlm_probe as probe

    return probe.demo.load()


@pytest.fixture
def photo() -> Image.Image:
    """A smooth colourful picture, 90 x 60, that no processor leaves at its size."""
    rows, cols = np.mgrid[0:60, 0:90]
    pixels = np.stack([cols * 2.5, rows * 4.0, 255 - cols - rows], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
