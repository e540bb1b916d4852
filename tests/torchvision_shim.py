"""Lets torchvision import beside a CPU build of torch that its compiled operators do not match.

``import torchvision`` registers shape functions for ``torchvision::nms`` and its kin and fails where the compiled
library that declares them cannot be loaded. Image processors need none of these operators (resizing is torch's own), so
declaring them is enough. Import this module before torchvision. Where the library loads, as beside torch for CUDA, it
declares them, and a second declaration would end the process.
"""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def declare() -> torch.library.Library | None:
    """Declare the missing operators. The caller keeps the result alive: dropping it takes them away again."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return None
    compiled = (file for file in Path(found.origin).parent.glob("_C.*") if file.suffix in (".so", ".pyd", ".dylib"))
    with contextlib.suppress(OSError, StopIteration):  # it is for another build of torch
        torch.ops.load_library(next(compiled))
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        if not hasattr(torch.ops.torchvision, schema.split("(")[0]):
            library.define(schema)
    return library


LIBRARY = declare()
