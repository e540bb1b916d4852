"""Drawing: heatmaps over images (``overlays``), and figures of several for print (``figures``)."""

from __future__ import annotations

from lvlm_probe.drawing.figures import (
    FORMATS,
    WIDTHS,
    Panel,
    curve_figure,
    figure,
    figure_bytes,
    save_figure,
    wrap_words,
)
from lvlm_probe.drawing.overlays import Mark, Scored, cells_of, colour_bar, difference, mark_of, overlay, resample

__all__ = [
    "FORMATS",
    "WIDTHS",
    "Mark",
    "Panel",
    "Scored",
    "cells_of",
    "colour_bar",
    "curve_figure",
    "difference",
    "figure",
    "figure_bytes",
    "mark_of",
    "overlay",
    "resample",
    "save_figure",
    "wrap_words",
]
