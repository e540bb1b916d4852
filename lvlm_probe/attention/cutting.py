"""Cut attention: some queries no longer see some keys, in some layers, before the softmax.

A pre-hook on the attention module edits the mask it is given. Under sdpa there often is none (the kernel hides later
keys itself): then a mask that says the same is built first. The weights of the cut pairs are exactly zero, and the
others of the row share what is left in their old proportions: A' = A / (1 − Σ cut A) in the first layer that is cut.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lvlm_probe.attention.dispatch import AttentionCall
from lvlm_probe.attention.layers import TapLayer, discover
from lvlm_probe.errors import ExplainError
from lvlm_probe.hooks import HookSet

if TYPE_CHECKING:
    from lvlm_probe.models.replica import Replica

_MASK = "attention_mask"

Layers = list[tuple[TapLayer, nn.Module]]


def attention_layers(model: nn.Module, layers: int | Sequence[int] | str | None, *, of_text: bool = False) -> Layers:
    """The decoder's attention layers to cut, in order.

    Args:
        layers: ``None`` or ``"all"``, a layer's index, or several (a ``range`` too), counted from 0.
        of_text: text is to be cut: layers of cross-attention, whose keys are states of the image, stay as they are.

    Raises:
        ExplainError: one of them does not exist, or its attention cannot be cut (the message says why).
    """
    found, unreadable = discover(model)
    if of_text:
        for layer, _ in discover(model, cross=True)[0]:
            if layer.kind == "cross":
                unreadable.pop(layer.module, None)
    for layer, module in found:
        if _MASK not in inspect.signature(type(module).forward).parameters:
            unreadable[layer.module] = f"{type(module).__name__} takes no {_MASK}"
    found = [(layer, module) for layer, module in found if layer.module not in unreadable]
    known = {layer.index: (layer, module) for layer, module in found}
    name = type(model).__name__
    if layers is None or layers == "all":
        if unreadable or not found:
            reasons = "; ".join(f"{path}: {reason}" for path, reason in list(unreadable.items())[:3])
            raise ExplainError(
                f"attention of {name} cannot be cut in every layer ({reasons}), so the image would still come "
                f"through; name the layers to cut: layers={sorted(known)}, or use patch()"
            )
        return found
    wanted = [layers] if isinstance(layers, int) else layers
    if isinstance(wanted, str) or not all(isinstance(index, (int, np.integer)) for index in wanted):
        raise ExplainError(
            f"layers is 'all', the index of a layer, or several, range(0, 8) for example; got {layers!r}"
        )
    missing = sorted(set(wanted) - set(known))
    if missing or not wanted:
        reasons = "; ".join(sorted(set(unreadable.values())))
        raise ExplainError(
            f"{name} has no attention layer {missing or '(none given)'} that can be cut; it has {sorted(known)}"
            f"{f' (and others: {reasons})' if reasons else ''}"
        )
    return [known[index] for index in sorted(set(wanted))]


class AttentionCut:
    """The cut in one set of layers: an edit of each attention module's arguments.

    Args:
        queries, keys: positions in the sequence, ``(query,)`` and ``(key,)``.
        length: number of positions.
    """

    def __init__(self, queries: np.ndarray, keys: np.ndarray, length: int) -> None:
        self.queries, self.keys = torch.tensor(queries), torch.tensor(keys)
        self.length = length

    def __bool__(self) -> bool:
        return bool(self.queries.numel() and self.keys.numel())

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the pairs cut out of their mask; nothing is changed in place."""
        slot = list(inspect.signature(type(module).forward).parameters).index(_MASK) - 1
        given = args[slot] if slot < len(args) else kwargs.get(_MASK)
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        mask = self.mask(module, given, hidden, kwargs)
        if slot < len(args):
            return (*args[:slot], mask, *args[slot + 1 :]), kwargs
        return args, {**kwargs, _MASK: mask}

    def mask(self, module: nn.Module, given: Tensor | None, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The attention mask with the pairs cut: boolean (True = visible) or additive, as the one that was given.

        Args:
            given: ``(batch or 1, head or 1, query, key)`` or ``None``.
            hidden: ``(batch, query, channel)``, what the module attends in.
            kwargs: the module's arguments.
        """
        name, length = type(module).__name__, int(hidden.shape[1])
        if length != self.length:
            raise ExplainError(
                f"{name} attends in {length} positions, the prompt and answer have {self.length}: this model edits its "
                f"sequence, and what to cut cannot be told"
            )
        if given is None:
            implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
            call = AttentionCall(is_causal=kwargs.get("is_causal"))
            mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=hidden.device)
            if call.is_causal_for(module, implementation, length):
                mask = mask.tril()
            if implementation != "sdpa":  # eager adds its mask to the scores
                mask = torch.zeros(mask.shape, dtype=hidden.dtype, device=hidden.device)
        elif given.ndim != 4 or given.shape[-2:] != (length, length):
            raise ExplainError(
                f"{name} is given a mask of shape {tuple(given.shape)}; (batch, head, query, key) is needed"
            )
        elif given.dtype != torch.bool and not given.is_floating_point():
            raise ExplainError(f"{name} is given a mask of {given.dtype}; boolean or additive ones can be cut")
        else:
            mask = given.clone()
        hidden_value = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask[..., self.queries.to(mask.device)[:, None], self.keys.to(mask.device)] = hidden_value
        return mask


class _Passes(Protocol):
    """What runs the passes: a ``Replay``."""

    @property
    def replica(self) -> Replica: ...
    @property
    def length(self) -> int: ...


@contextmanager
def cut_attention(replay: _Passes, layers: Layers, queries: np.ndarray, keys: np.ndarray) -> Iterator[None]:
    """Cut attention in the passes that ``replay`` runs in the block, by hooks; nothing at all for an empty cut.

    Args:
        layers: what ``attention_layers`` gives.
        queries, keys: positions in the teacher-forced sequence, ``(query,)`` and ``(key,)``.

    Raises:
        ExplainError: a layer did not run in the block, or is given a mask that cannot be cut.
    """
    cut = AttentionCut(queries, keys, replay.length)
    if not cut:
        yield
        return
    done: set[str] = set()

    def hook_of(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            done.add(path)
            return cut(module, args, kwargs)

        return hook

    with replay.replica.use() as model, HookSet() as hooks:
        for layer, _ in layers:
            hooks.forward_pre(
                model.get_submodule(layer.module), hook_of(layer.module), name=f"cut {layer.module}", fenced=False
            )
        yield
    missed = [layer.module for layer, _ in layers if layer.module not in done]
    if missed:
        raise ExplainError(f"the pass did not reach {', '.join(missed)}, so there is nothing to cut there")
