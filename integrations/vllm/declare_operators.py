"""Declares two operators of torchvision when it is first imported, where its own library cannot be loaded.

The registry's torchvision is built for CUDA. Beside a torch for CPUs its compiled part does not load, and its Python
part then stumbles over operators that nobody has declared. No engine runs them for an image.
"""

import importlib.abc
import sys


class _Before(importlib.abc.MetaPathFinder):
    """Answers for nothing; declares the operators when torchvision is looked for."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in (
                "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            ):
                if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
                    self.library.define(schema)
            _kept.append(self)
        return None


_kept: list[_Before] = []
sys.meta_path.insert(0, _Before())
