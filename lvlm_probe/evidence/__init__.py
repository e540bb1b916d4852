"""Evidence: what a map is asked next.

* ``edit`` asks the model again with a region taken away, or kept alone, and finds the smallest region of a map without
  which the answer is another.
* ``answer_boxes`` reads the boxes and points that an answer holds, ``box_maps`` makes a map for each, ``check_box``
  says whether the map looks where the answer says, and ``draw_boxes`` draws them.
* ``region`` is the smallest area of a map that keeps most of the score; ``fields`` are the values of an answer,
  ``locate`` finds where each stands on which page, and ``export`` writes that as JSON, hOCR, W3C annotations,
  COCO or a DoclingDocument.
"""

from __future__ import annotations

from lvlm_probe.evidence.documents import Field, Place, export, fields, locate
from lvlm_probe.evidence.editing import Edit, edit
from lvlm_probe.evidence.grounding import (
    CONVENTIONS,
    AnswerBox,
    BoxCheck,
    answer_boxes,
    box_maps,
    check_box,
    draw_boxes,
)
from lvlm_probe.evidence.regions import Region, region

__all__ = [
    "CONVENTIONS",
    "AnswerBox",
    "BoxCheck",
    "Edit",
    "Field",
    "Place",
    "Region",
    "answer_boxes",
    "box_maps",
    "check_box",
    "draw_boxes",
    "edit",
    "export",
    "fields",
    "locate",
    "region",
]
