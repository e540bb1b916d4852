"""What a tap has seen and not handed over yet.

Reading a row takes some twenty small tensor operations, and doing that in every layer of every decoding step would slow
generation down. So a step of ordinary decoding (every earlier key still in the cache) only *keeps its query*, and its
mask where there is one; the keys of the last step contain those of all steps before it, and one set of operations per
layer gives all rows at the end, each normalised over the keys that its own step saw. Nothing in a step waits for the
device: rows are copied to the CPU once, or whenever a budget is full, and the host does not wait for the copy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lvlm_probe.attention.rows import attention_rows, take_columns
from lvlm_probe.attention.transfer import Transfers

__all__ = ["Collection"]

_MOST_WAITING = 256  # queries; rows of more steps at once would take more memory than they save time


@dataclass
class _Waiting:
    """Queries of one layer whose rows are not computed yet, and the newest keys."""

    queries: list[Tensor]
    lengths: list[int]
    masks: list[Tensor]
    """``(batch|1, head|1, 1, keys)`` of each step, boolean or additive; empty where steps have none."""
    key: Tensor
    scaling: float | None

    def note(self, query: Tensor, key: Tensor) -> None:
        """One more step: its query, and the keys it saw."""
        self.queries.append(query)
        self.lengths.append(key.shape[2])
        self.key = key.detach() if key.requires_grad else key

    @property
    def masked_by(self) -> torch.dtype | None:
        return self.masks[0].dtype if self.masks else None


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
    flushed: dict[int, list[tuple[list[Tensor], list[Tensor]]]] = field(default_factory=dict)
    """Values and mass outside the columns, each as the place of a copy that ``transfers`` may still be making."""
    transfers: Transfers = field(default_factory=Transfers)
    held: int = 0
    on_device: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict)
    waiting: dict[int, _Waiting] = field(default_factory=dict)
    _joined: tuple[list[Tensor], Tensor] | None = None

    def to(self, name: str, device: torch.device) -> Tensor:
        """``columns`` or ``queries`` on a device, moved once."""
        if (name, device) not in self.on_device:
            self.on_device[name, device] = getattr(self, name).to(device)
        return self.on_device[name, device]

    def wait(self, layer: int, query: Tensor, key: Tensor, *, mask: Tensor | None, scaling: float | None) -> None:
        """Keep the last query of a step that sees ``key``, or what ``mask`` leaves; its row is computed later."""
        # A view would keep the queries of the whole prompt alive.
        last = (query[:, :, -1:].clone() if query.shape[2] > 1 else query).detach()
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, -1:].clone()
        known = self.waiting.get(layer)
        if known is not None and known.masked_by != (None if mask is None else mask.dtype):
            self.settle(layer)
            known = None
        if known is None:
            masks = [] if mask is None else [mask]
            self.waiting[layer] = _Waiting([last], [key.shape[2]], masks, key.detach(), scaling)
            return
        known.note(last, key)
        if mask is not None:
            known.masks.append(mask)
        if len(known.queries) >= _MOST_WAITING:
            self.settle(layer)

    def wait_again(self, layer: int, query: Tensor, key: Tensor, scaling: float | None) -> bool:
        """``wait`` for one more step without a mask after others, and all that is to be noted of it: most of the steps
        there are, so it does as little as it can. False: it is another kind of step, and nothing was done."""
        known = self.waiting.get(layer)
        if known is None or known.masks or known.scaling != scaling or len(known.queries) + 1 >= _MOST_WAITING:
            return False
        keys = self.seen[layer] + 1
        if keys < self.end or key.shape[2] != keys or query.shape[2] != 1 or len(query) != len(known.key):
            return False
        self.seen[layer] = self.end = keys
        known.note(query.detach() if query.requires_grad else query, key)
        return True

    def settle(self, layer: int) -> None:
        """Compute the rows that wait in one layer."""
        known = self.waiting.pop(layer, None)
        if known is None:
            return
        device, keys = known.key.device, known.key.shape[2]
        if known.masks:
            mask = self._join(known.masks, known.lengths, keys)
        else:
            lengths = torch.tensor(known.lengths, device=device)
            later = torch.arange(keys, device=device) >= lengths[:, None]
            mask = torch.zeros(later.shape, dtype=torch.float32, device=device).masked_fill_(later, float("-inf"))[
                None, None
            ]
        weights = attention_rows(
            torch.cat(known.queries, dim=2),
            known.key,
            columns=None,
            rows=torch.arange(len(known.lengths), device=device),
            scaling=known.scaling,
            attention_mask=mask,
        )
        if self.heads == "mean":  # before columns are taken: of one row instead of as many as there are heads
            weights = weights.mean(dim=1, keepdim=True)
        rows = take_columns(weights, self.to("columns", device))
        self.add(layer, rows)

    def _join(self, masks: list[Tensor], lengths: list[int], keys: int) -> Tensor:
        """The masks of several steps, ``(batch|1, head|1, step, keys)``: later keys are hidden from earlier steps.

        The layers of a decoder share their masks, so the last result is kept for the next layer.
        """
        known = self._joined
        if known is not None and known[1].shape[-1] == keys and _same(known[0], masks):
            return known[1]
        hidden = False if masks[0].dtype == torch.bool else float("-inf")
        batch, heads = (max(mask.shape[axis] for mask in masks) for axis in (0, 1))
        joined = masks[0].new_full((batch, heads, len(masks), keys), hidden)
        for step, (mask, length) in enumerate(zip(masks, lengths, strict=True)):
            joined[:, :, step : step + 1, :length] = mask[..., :length]
        self._joined = masks, joined
        return joined

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
        """Send everything to the CPU, one copy per layer: the values, and the mass outside the columns."""
        for layer in list(self.waiting):
            self.settle(layer)
        self._joined = None
        self.transfers.settle()  # the copies of the flush before, which are long there
        for layer, parts in self.steps.items():
            rows = torch.cat(parts, dim=1)
            copies = self.transfers.copy(rows.to(self.dtype)), self.transfers.copy(1.0 - rows.sum(dim=-1))
            self.flushed.setdefault(layer, []).append(copies)
        self.steps.clear()
        self.held = 0

    def finish(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Layer → values ``(batch, step, head, key)`` and mass outside the columns ``(batch, step, head)``, on the
        CPU."""
        self.flush()
        self.transfers.settle()
        return {
            layer: (torch.cat([rows[0] for rows, _ in parts], dim=1), torch.cat([mass[0] for _, mass in parts], dim=1))
            for layer, parts in self.flushed.items()
        }


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
