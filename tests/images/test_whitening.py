"""Statistics of masked images, by which a processor normalises each image, against the composite's own."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from PIL import Image

from lvlm_probe.images.whitening import Whitening

PLAIN = SimpleNamespace(name="a processor", settings={}, call=None)


@pytest.mark.quick
def test_statistics_under_a_mask_are_those_of_the_composite() -> None:
    image, baseline = tiny_models.picture(40, 30), Image.new("RGB", (40, 30), (90, 10, 200))
    mask = torch.rand(1, 1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, deviation = Whitening(PLAIN, [image], [baseline]).statistics(mask)
    fine = F.interpolate(mask, size=(30, 40), mode="bilinear", align_corners=False)[0, 0, :, :, None].numpy()
    composite = fine * np.asarray(image, dtype=np.float64) + (1 - fine) * np.asarray(baseline, dtype=np.float64)
    assert float(mean) == pytest.approx(composite.mean(), rel=1e-12)
    assert float(deviation) == pytest.approx(composite.std(), rel=1e-9)
