"""Points beyond attention: outputs of encoders, mergers or any module, kept while the model generates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lvlm_probe.hooks import HookSet, first_tensor
from lvlm_probe.models.anatomy import Anatomy, find_modules
from lvlm_probe.trace.records import PointRecord

HIDDEN = "hidden"
"""The point that is no module's output: hidden states, computed by a pass of their own."""


def modules_of(
    model: torch.nn.Module, anatomy: Anatomy, points: Sequence[str]
) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield path and module of each point but ``HIDDEN``. Raises ``PointNotFound``, as ``PointTap``."""
    for point in points:
        if point != HIDDEN:
            for pattern in {"encoder": anatomy.encoders, "merger": anatomy.mergers}.get(point, (point,)):
                yield from find_modules(model, pattern)


class PointTap:
    """Keeps the first output of chosen modules during one ``generate()`` call (the pass that sees the image).

    Args:
        model, anatomy: what to look at.
        points: ``"encoder"``, ``"merger"``, or an fnmatch pattern of module paths.
        hooks: where the forward hooks go.

    Raises:
        PointNotFound: a pattern matches no module.
    """

    def __init__(self, model: torch.nn.Module, anatomy: Anatomy, points: Sequence[str], hooks: HookSet) -> None:
        self._kept: dict[str, torch.Tensor] = {}
        for path, module in modules_of(model, anatomy, points):
            hooks.forward(module, self._keep(f"{path}.output"), name=f"point {path}")

    def _keep(self, name: str) -> Any:
        def hook(_module: torch.nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            if name not in self._kept:
                self._kept[name] = first_tensor(output).detach().clone()

        return hook

    def records(self) -> dict[str, PointRecord]:
        """Outputs that were kept, ``batch`` first as the module returned them."""
        records = {}
        for name, value in self._kept.items():
            axes = ("batch", "patch", "channel") if value.ndim == 3 else tuple(f"dim{i}" for i in range(value.ndim))
            records[name] = PointRecord(value.cpu(), axes, (), "none", name.removesuffix(".output"))
        return records
