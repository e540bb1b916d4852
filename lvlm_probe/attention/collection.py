"""What a tap has seen and not handed over yet.

Reading a row takes some twenty small tensor operations, and doing that in every layer of every decoding step would slow
generation down. So a step of ordinary decoding (no mask, every earlier key still in the cache) only *keeps its query*;
the keys of the last step contain those of all steps before it, and one set of operations per layer gives all rows at
the end, each normalised over the keys that its own step saw.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lvlm_probe.attention.rows import attention_rows

__all__ = ["Collection"]

_MOST_WAITING = 256  # queries; rows of more steps at once would take more memory than they save time


@dataclass
class _Waiting:
    """Queries of one layer whose rows are not computed yet, and the newest keys."""

    queries: list[Tensor]
    lengths: list[int]
    key: Tensor
    scaling: float | None


@dataclass
class Collection:
    """The state of one collection: ``arm``'s arguments, and rows by layer."""

    columns: Tensor | None
    valid: Tensor | None
    queries: Tensor | None
    heads: Literal["mean", "all"]
    dtype: torch.dtype
    prompt_length: int | None
    budget: int
    end: int
    cross_keys: int | None = None
    seen: dict[int, int] = field(default_factory=dict)
    steps: dict[int, list[Tensor]] = field(default_factory=dict)
    flushed: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    held: int = 0
    on_device: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict)
    waiting: dict[int, _Waiting] = field(default_factory=dict)

    def to(self, name: str, device: torch.device) -> Tensor:
        """``columns`` or ``queries`` on a device, moved once."""
        if (name, device) not in self.on_device:
            self.on_device[name, device] = getattr(self, name).to(device)
        return self.on_device[name, device]

    def wait(self, layer: int, query: Tensor, key: Tensor, *, scaling: float | None) -> None:
        """Keep the last query of a step that sees all of ``key``; its row is computed later, with others."""
        last = query[:, :, -1:]
        # A view would keep the queries of the whole prompt alive.
        last = (last.clone() if query.shape[2] > 1 else last).detach()
        known = self.waiting.get(layer)
        if known is None:
            self.waiting[layer] = _Waiting([last], [key.shape[2]], key.detach(), scaling)
            return
        known.queries.append(last)
        known.lengths.append(key.shape[2])
        known.key = key.detach()
        if len(known.queries) >= _MOST_WAITING:
            self.settle(layer)

    def settle(self, layer: int) -> None:
        """Compute the rows that wait in one layer."""
        known = self.waiting.pop(layer, None)
        if known is None:
            return
        device = known.key.device
        lengths = torch.tensor(known.lengths, device=device)
        visible = torch.arange(known.key.shape[2], device=device) < lengths[:, None]
        rows = attention_rows(
            torch.cat(known.queries, dim=2),
            known.key,
            columns=self.to("columns", device),
            rows=torch.arange(len(lengths), device=device),
            scaling=known.scaling,
            attention_mask=visible[None, None],
        )
        self.add(layer, rows)

    def add(self, layer: int, rows: Tensor) -> None:
        """Take rows ``(batch, head, step, key)`` float32 of one layer; means over heads are taken here."""
        self.settle(layer)  # steps stay in order
        rows = rows.transpose(1, 2)
        rows = rows.mean(dim=2, keepdim=True) if self.heads == "mean" else rows.contiguous()
        self.steps.setdefault(layer, []).append(rows)
        self.held += rows.numel() * rows.element_size()
        if self.held > self.budget:
            self.flush()

    def flush(self) -> None:
        """Move everything to the CPU, one copy per layer: the values, and the mass outside the columns."""
        for layer in list(self.waiting):
            self.settle(layer)
        for layer, parts in self.steps.items():
            rows = torch.cat(parts, dim=1)
            moved = rows.to(self.dtype).cpu(), (1.0 - rows.sum(dim=-1)).cpu()
            self.flushed.setdefault(layer, []).append(moved)
        self.steps.clear()
        self.held = 0
