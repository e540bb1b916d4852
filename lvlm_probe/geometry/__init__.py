"""Traced geometry: which original pixel every model-input element looks at, learnt from the unmodified image processor.

Image processors resize, crop, pad, tile, split, patchify. Instead of one re-implementation per model family, the
processor is run as a black box on *probe images* of the image's own size, and its outputs are decoded:

========================= ============================================================================================
probe                     what it tells about one element ``pv = offset + slope * (weighted mean of grey levels)``
========================= ============================================================================================
two uniform grey images   offset and slope; a slope of zero is padding: the element never changes
one code image per bit    the image the element comes from (only with several images in one prompt)
one ramp per axis         the coordinate, to about 1/200 of the axis
cosine and sine per axis  the coordinate modulo a period of about 1/16 of the axis, to a few hundredths of a pixel
========================= ============================================================================================

A resize is a short symmetric weighted mean, so it lowers the amplitude of a sinusoid and leaves its phase in place: the
decoded phase is the element's source position. Eight runs serve one image of any size. The probes are grey, so neither
channel order nor normalisation matters; position depends on the image's size alone, so the result is reused for every
other image of that size.

Coordinates are continuous pixel coordinates of the original image: the centre of the first pixel is 0.5, the image
spans ``[0, width] x [0, height]``.
"""

from lvlm_probe.geometry.blend import composite
from lvlm_probe.geometry.positions import Geometry, KeyGeometry
from lvlm_probe.geometry.trace import check_same_layout, trace_geometry

__all__ = ["Geometry", "KeyGeometry", "check_same_layout", "composite", "trace_geometry"]
