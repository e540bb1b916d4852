"""How many masks fit into one forward and backward pass."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch

__all__ = ["available", "masks_that_fit", "saved_bytes"]

# Beyond this many pictures per pass nothing gets faster; on CPUs large activations fall out of the caches and it gets
# slower.
_MOST = 64
_CPU_BYTES = 3 << 30


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
    3 GiB at most.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        budget = free // 2
    else:
        budget = min(int(0.3 * available()), _CPU_BYTES)
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
        return _CPU_BYTES
