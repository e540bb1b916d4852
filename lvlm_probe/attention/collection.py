"""Attention rows between a tap and the recorder that collects them.

Reading a row takes some twenty small tensor operations, and doing that in every layer of every decoding step would slow
generation down. So a step of ordinary decoding (every earlier key still in the cache) only *keeps its query*, and its
mask where there is one; the keys of the last step contain those of all steps before it, and one set of operations per
layer gives all rows at the end, each normalised over the keys that its own step saw. Nothing in a step waits for the
device: rows are copied to the CPU once, or whenever a budget is full, and the host does not wait for the copy.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from lvlm_probe.attention.layers import LayerKind
from lvlm_probe.attention.rows import attention_rows, take_columns
from lvlm_probe.errors import ProbeError

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


class Transfers:
    """Copies from an accelerator to main memory that the host does not wait for.

    ``tensor.cpu()`` makes the host wait until the device has done everything asked of it so far, and the device then
    idles until the host has caught up. A copy into page-locked memory is queued behind the work that makes its source,
    like any other operation; the host waits once, when the values are wanted.

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

    def finish(self) -> None:
        """Wait for all copies begun so far, and put them into ordinary memory."""
        for event in self._events.values():
            event.synchronize()
        self._events.clear()
        for place in self._under_way:
            place[0] = place[0].clone()
        self._under_way.clear()


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
    holds_keys: bool = True
    seen: dict[int, int] = field(default_factory=dict)
    steps: dict[int, list[Tensor]] = field(default_factory=dict)
    flushed: dict[int, list[tuple[list[Tensor], list[Tensor]]]] = field(default_factory=dict)
    """Values and mass outside the columns, each as the place of a copy that ``transfers`` may still be making."""
    transfers: Transfers = field(default_factory=Transfers)
    held: int = 0
    on_device: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict)
    waiting: dict[int, _Waiting] = field(default_factory=dict)
    repeated: set[int] = field(default_factory=set)
    """Layers that run more than once in a pass (Inkling 2's loop): they have no one row per step, and give none."""
    _ran: dict[int, None] = field(default_factory=dict)
    """Layers that have run in this pass, in order."""
    _joined: tuple[list[Tensor], Tensor] | None = None
    _moving: threading.RLock = field(default_factory=threading.RLock, repr=False)
    """Held while rows go from ``waiting`` to ``steps`` and on, by whoever moves them or looks from another thread."""

    def repeats(self, layer: int) -> bool:
        """Note that a layer runs. True: it has run in this pass before, which ends where the first layer runs again;
        what it gave is dropped."""
        if layer in self.repeated:
            return True
        if layer not in self._ran:
            self._ran[layer] = None
        elif layer == next(iter(self._ran)):
            self._ran = {layer: None}
        elif not torch.is_grad_enabled():  # else it may be run again for a backward pass
            self.repeated.add(layer)
            with self._moving:
                for kept in (self.waiting, self.steps, self.flushed):
                    kept.pop(layer, None)  # type: ignore[attr-defined]
        return layer in self.repeated

    def advance(self, layer: int, queries: int, keys: int) -> None:
        """Count the positions of one more pass of a layer, which sees as many keys as there are queries where it begins
        at the first position: without a cache each pass does."""
        # Layers that reuse another layer's keys may be handed fewer queries; all layers end at the same position.
        self.seen[layer] = queries if queries == keys > 1 else self.seen[layer] + queries
        self.end = max(self.end, self.seen[layer])

    def wants(self, layer: int) -> bool:
        """Whether the pass that ``advance`` has counted has a row to give: not where it is run again for a backward
        pass, and not where it is a part of the prompt that ends before the prompt does."""
        if self.queries is not None:
            return layer not in self.steps and layer not in self.flushed
        return self.prompt_length is None or self.end >= self.prompt_length

    def rows(self, queries: int, device: torch.device) -> Tensor | None:
        """The wanted rows of a pass over the last ``queries`` positions, as indices into it; ``None``: the last one."""
        if self.queries is None:
            return None
        start = self.end - queries
        if self.queries.min() < start or self.queries.max() >= self.end:
            raise ProbeError(
                f"query positions {int(self.queries.min())}…{int(self.queries.max())} are not all in this pass, "
                f"which covers {start}…{self.end - 1}"
            )
        return self.to("queries", device) - start

    def columns_of(self, kind: LayerKind, shape: torch.Size, device: torch.device) -> Tensor:
        """The wanted columns ``(batch, column)`` as indices into a layer's keys, whose shape is ``(batch, head, key,
        channel)``."""
        batch, count = shape[0], shape[2]
        if self.columns is None:
            return torch.arange(count, device=device).expand(batch, -1)
        columns = self.to("columns", device)
        if kind == "self":  # a sliding-window cache keeps the newest keys only: its first key is not position 0
            return columns - max(0, self.end - count)
        return columns + count - (self.cross_keys or 0) if kind == "merged" else columns

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
            self.compute(layer)
            known = None
        if known is None:
            masks = [] if mask is None else [mask]
            self.waiting[layer] = _Waiting([last], [key.shape[2]], masks, key.detach(), scaling)
            return
        known.note(last, key)
        if mask is not None:
            known.masks.append(mask)
        if len(known.queries) >= _MOST_WAITING:
            self.compute(layer)

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

    def compute(self, layer: int) -> None:
        """Compute the rows that wait in one layer."""
        with self._moving:
            if (known := self.waiting.pop(layer, None)) is not None:
                self.add(layer, self._made(known))

    def _made(self, known: _Waiting) -> Tensor:
        """The rows of queries that wait, ``(batch, head|1, step, column)`` float32."""
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
        return take_columns(weights, self.to("columns", device))

    def peek(self, layer: int, start: int, stop: int) -> Tensor:
        """Rows of a layer's steps ``[start, stop)``, ``(batch, step, head|1, column)`` float32 on the CPU, as many as
        there are; the collection goes on as if nobody had looked. In any thread, for steps that are past."""
        with self._moving:
            self.transfers.finish()
            ready = [rows[0] for rows, _ in self.flushed.get(layer, ())] + self.steps.get(layer, [])
            found, passed = [], 0
            for rows in ready:
                found.append(rows[:, max(0, start - passed) : max(0, stop - passed)].float().cpu())
                passed += rows.shape[1]
            if (known := self.waiting.get(layer)) is not None and stop > passed:
                some = slice(max(0, start - passed), stop - passed)
                part = replace(known, queries=known.queries[some], lengths=known.lengths[some], masks=known.masks[some])
                rows = self._made(part).transpose(1, 2)
                found.append((rows.mean(dim=2, keepdim=True) if self.heads == "mean" else rows).cpu())
        return torch.cat(found, dim=1) if found else torch.zeros(0, 0, 0, 0)

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
        self.compute(layer)  # steps stay in order
        rows = rows.transpose(1, 2)
        rows = rows.mean(dim=2, keepdim=True) if self.heads == "mean" else rows.contiguous()
        self.steps.setdefault(layer, []).append(rows)
        self.held += rows.numel() * rows.element_size()
        if self.held > self.budget:
            self.flush()

    def flush(self) -> None:
        """Send everything to the CPU, one copy per layer: the values, and the mass outside the columns."""
        with self._moving:
            for layer in list(self.waiting):
                self.compute(layer)
            self._joined = None
            self.transfers.finish()  # the copies of the flush before, which are long there
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
        self.transfers.finish()
        return {
            layer: (torch.cat([rows[0] for rows, _ in parts], dim=1), torch.cat([mass[0] for _, mass in parts], dim=1))
            for layer, parts in self.flushed.items()
        }


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
