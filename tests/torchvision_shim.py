"""Lets torchvision import beside a CPU build of torch that its compiled operators do not match.

``import torchvision`` registers shape functions for ``torchvision::nms`` and its kin and fails where the compiled
library that declares them cannot be loaded. Image processors need none of these operators (resizing is torch's own), so
declaring them is enough. Import this module before torchvision; operators that exist already are left alone.
"""

from __future__ import annotations

import importlib.util

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def declare() -> torch.library.Library | None:
    """Declare the missing operators. The caller keeps the result alive: dropping it takes them away again."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        if not hasattr(torch.ops.torchvision, schema.split("(")[0]):
            library.define(schema)
    return library


LIBRARY = declare()
