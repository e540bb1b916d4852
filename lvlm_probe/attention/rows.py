"""Softmax rows for a few queries and a few keys: pure functions on tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_rows(
    query: Tensor,
    key: Tensor,
    *,
    columns: Tensor | None,
    rows: Tensor | None = None,
    scaling: float | None = None,
    attention_mask: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention weights of a few query rows at a few key columns, normalised over *all* keys, in float32.

    Args:
        query: ``(batch, head, query, channel)``.
        key: ``(batch, key_head, key, channel)``; ``head`` is a multiple of ``key_head`` (grouped-query attention).
        columns: wanted keys, ``(batch, column)``, indices into the key axis; outside it the weight is 0. ``None``: all.
        rows: wanted queries, ``(row,)`` or ``(batch, row)``, indices into the query axis; ``None``: the last one.
        scaling: factor on q·kᵀ; ``None``: ``channel ** -0.5``.
        attention_mask: ``(batch|1, head|1, query|1, ≥ key)``, boolean (True = may be seen) or additive.
        causal: query *i* sees keys ``0..i`` only (upper-left aligned, as sdpa's ``is_causal``).
        softcap: ``s → softcap · tanh(s / softcap)``, before bias and mask.
        position_bias: added to the scores, ``(batch|1, head|1, query|1, ≥ key)``.
        sinks: ``(head,)`` logits of an extra slot that takes part in the normalisation only.

    Returns:
        ``(batch, head, row, column)`` float32. A row that may see no key at all is 0 everywhere.
    """
    batch, heads, queries, channels = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    if heads % key_heads:
        raise ValueError(f"{heads} query heads over {key_heads} key heads: not a whole number of groups")
    picked = take_rows(query, rows, batch)  # (batch, head, row, channel)
    count = picked.shape[2]
    # Heads that share a key head become rows of one matrix product: keys are not repeated.
    grouped = picked.float().reshape(batch, key_heads, heads // key_heads * count, channels)
    with torch.autocast(query.device.type, enabled=False):  # the arithmetic is float32 whatever the model runs in
        scores = grouped @ key.float().transpose(-1, -2)
    scores = scores.reshape(batch, heads, count, keys) * (channels**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + _broadcast_rows(position_bias, rows, batch)[..., :keys].float()
    blocked: Tensor | None = None
    if attention_mask is not None:
        mask = _broadcast_rows(attention_mask, rows, batch)[..., :keys]
        if mask.dtype == torch.bool:
            blocked = ~mask
        else:
            scores = scores + mask.float()
    if causal:
        at = torch.full((1, 1), queries - 1, device=query.device) if rows is None else rows.reshape(-1, count)
        ahead = torch.arange(keys, device=query.device) > at[:, None, :, None]
        blocked = ahead if blocked is None else blocked | ahead
    if blocked is not None:
        scores = scores.masked_fill(blocked, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().reshape(1, heads, 1, 1).expand(batch, -1, count, 1)], dim=-1)
    weights = scores.softmax(dim=-1)
    del scores  # of the same size; two of them side by side are what this takes
    if blocked is not None:
        weights = weights.nan_to_num(0.0)  # a row of -inf only: a padding query
    return weights[..., :keys] if columns is None else take_columns(weights[..., :keys], columns)


def take_rows(tensor: Tensor, rows: Tensor | None, batch: int) -> Tensor:
    """Select ``rows`` on axis 2."""
    if rows is None:
        return tensor[:, :, -1:]
    if rows.dim() == 1:
        return tensor.index_select(2, rows)
    spread = tensor.expand(batch, -1, -1, -1)
    return spread.gather(2, rows[:, None, :, None].expand(-1, spread.shape[1], -1, spread.shape[3]))


def _broadcast_rows(tensor: Tensor, rows: Tensor | None, batch: int) -> Tensor:
    """Select ``rows`` on axis 2, unless that axis is one row for all queries."""
    return tensor if tensor.shape[2] == 1 else take_rows(tensor, rows, batch)


def take_columns(weights: Tensor, columns: Tensor) -> Tensor:
    """Gather ``columns`` ``(batch, column)`` on the last axis; 0 where a column lies outside it."""
    inside = (columns >= 0) & (columns < weights.shape[-1])
    index = columns.where(inside, 0)[:, None, None, :].expand(-1, weights.shape[1], weights.shape[2], -1)
    return weights.gather(-1, index) * inside[:, None, None, :]
