"""Evidence: what a map is asked next.

* ``edit`` asks the model again with a region taken away, or kept alone, and finds the smallest region of a map without
  which the answer is another.
* ``answer_boxes`` reads the boxes and points that an answer holds, ``box_maps`` makes a map for each, ``check_box``
  says whether the map looks where the answer says, and ``draw_boxes`` draws them.
"""

from __future__ import annotations

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

__all__ = [
    "CONVENTIONS",
    "AnswerBox",
    "BoxCheck",
    "Edit",
    "answer_boxes",
    "box_maps",
    "check_box",
    "draw_boxes",
    "edit",
]
