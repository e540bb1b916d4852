"""Sparse matrices that sample masks: multiplying by one is how a batch of masks is read at a million positions."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

__all__ = ["sparse_pair"]


def sparse_pair(columns: Tensor, weights: Tensor, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The matrix with ``weights`` at ``columns`` (both ``(position, 4)``), and its transpose."""
    height, per_row = columns.shape
    flat, order = columns.reshape(-1).sort(stable=True)
    rows = order.div(per_row, rounding_mode="floor")
    ends = torch.searchsorted(flat, torch.arange(width + 1))
    forward = (torch.arange(height + 1) * per_row, columns.reshape(-1), weights.reshape(-1), (height, width))
    backward = (ends, rows, weights.reshape(-1)[order], (width, height))
    return _sparse(*forward, device), _sparse(*backward, device)


def _sparse(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int], device: torch.device) -> Tensor:
    _hear_of_csr()
    matrix = torch.sparse_csr_tensor(starts.int(), columns.int(), values, shape, check_invariants=False)
    if device.type != "cuda" and not (device.type == "cpu" and torch.backends.mkl.is_available()):
        # Without MKL only the slower coordinate layout can be multiplied.
        matrix = matrix.to_sparse_coo()
    return matrix.to(device)


@functools.cache
def _hear_of_csr() -> None:
    """Have torch say once, and unheard, that the layout is in beta. Filters of warnings are the whole process's: they
    are not to be touched whenever a thread of ours needs a matrix."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(CSR|invariant).*")
        empty = torch.zeros(2, dtype=torch.int32)
        torch.sparse_csr_tensor(empty, empty[:0], torch.zeros(0), (1, 1), check_invariants=False)
