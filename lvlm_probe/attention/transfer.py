"""Copies from an accelerator to main memory that the host does not wait for.

``tensor.cpu()`` makes the host wait until the device has done everything asked of it so far, and the device then idles
until the host has caught up. A copy into page-locked memory is queued behind the work that makes its source, like any
other operation; the host waits once, when the values are wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Transfers"]


class Transfers:
    """Copies that are under way.

    Page-locked memory is scarce, so ``settle`` moves what has arrived to ordinary memory. Called before each new group
    of copies it finds the group before long there, and no more than two groups are ever page-locked.
    """

    def __init__(self) -> None:
        self._under_way: list[list[Tensor]] = []
        self._events: dict[torch.device, torch.cuda.Event] = {}

    def copy(self, tensor: Tensor) -> list[Tensor]:
        """Begin to copy; the list's only entry is the copy, to be read after ``settle``."""
        if tensor.device.type != "cuda":
            return [tensor.cpu()]
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        # The source may be freed at once: its memory is given out again behind this copy, in the order of the stream.
        host.copy_(tensor, non_blocking=True)
        if tensor.device not in self._events:
            self._events[tensor.device] = torch.cuda.Event()
        self._events[tensor.device].record(torch.cuda.current_stream(tensor.device))
        place = [host]
        self._under_way.append(place)
        return place

    def settle(self) -> None:
        """Wait for all copies begun so far, and put them into ordinary memory."""
        for event in self._events.values():
            event.synchronize()
        self._events.clear()
        for place in self._under_way:
            place[0] = place[0].clone()
        self._under_way.clear()
