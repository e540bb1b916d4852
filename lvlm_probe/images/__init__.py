"""From a mask on the original image to the model's pixel inputs, differentiably.

``ImagePath`` goes through the unmodified image processor (traced geometry, or the processor itself in exact mode);
``PixelPath`` masks the pixel inputs themselves where no processor is at hand; ``CompositePath`` makes real images, for
a model that runs elsewhere. ``make_baseline`` draws what stands in for the pixels that a mask takes away.
"""

from lvlm_probe.images.baselines import BLUR_LADDER, Baseline, make_baseline
from lvlm_probe.images.composite_path import CompositePath
from lvlm_probe.images.image_path import ImagePath
from lvlm_probe.images.parity import ParityReport
from lvlm_probe.images.pixel_path import PixelPath

__all__ = ["BLUR_LADDER", "Baseline", "CompositePath", "ImagePath", "ParityReport", "PixelPath", "make_baseline"]
