"""How many masks fit into one forward and backward pass."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch

__all__ = ["CPU_BYTES", "available", "masks_that_fit", "saved_bytes"]

# Beyond this many pictures per pass nothing gets faster.
_MOST = 64

CPU_BYTES = 768 << 20
"""Bytes that one micro-batch may keep for its backward pass on a CPU: larger ones are no faster (matrix products are as
fast from some hundred rows on, and activations fall out of the caches)."""


def saved_bytes(run: Callable[[], object], *, besides: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that autograd keeps alive for one backward pass through ``run()``, each storage counted once.

    Args:
        run: the forward pass; its result is dropped.
        besides: tensors (weights) whose storage is there anyway and is shared by all masks.
    """
    shared = {tensor.untyped_storage().data_ptr() for tensor in besides if tensor.device.type != "meta"}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in shared:
                storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(storages.values())


def masks_that_fit(bytes_per_mask: int, device: torch.device) -> int:
    """How many masks to send through at once, at least 1.

    Half of the free memory of an accelerator is used (its allocator fragments); on the CPU 30 % of what is available,
    ``CPU_BYTES`` at most.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        budget = free // 2
    else:
        budget = min(int(0.3 * available()), CPU_BYTES)
    return max(1, min(_MOST, budget // max(1, bytes_per_mask)))


def available() -> int:
    """Bytes of main memory that can be had without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return CPU_BYTES
