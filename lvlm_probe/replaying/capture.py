"""Inside one replayed pass: activations and attention, gradients included, one layer at a time.

``with replay.capture(...) as seen:`` hangs up hooks for the passes that run in the block. What is kept is small, and a
method that needs attention never holds more than one layer's: nothing of size layer × head × query × key exists.

**Attention and its gradient under any backend.** A layer's output is O = A·V, so the gradient of a score to the weights
is dA = dO·Vᵀ, as exact as the one autograd would keep for a dense A. Queries, keys and values are kept by autograd
anyway; A is recomputed from them for a block of rows at a time, and dO arrives at a hook on the layer's output during
``backward``, last layer first. That is the order in which relevance propagates (Chefer et al., 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lvlm_probe.attention.dispatch import AttentionCall, ConfigView, observing, redirect, release, unobserved
from lvlm_probe.attention.layers import TapLayer, discover
from lvlm_probe.attention.rows import attention_rows, take_rows
from lvlm_probe.errors import ExplainError
from lvlm_probe.hooks import HookSet, first_tensor
from lvlm_probe.models.anatomy import find_modules

_BLOCK_NUMBERS = 2**24
"""Numbers of one block of attention weights, at most (64 MiB in float32)."""
_BLOCK_ROWS = 128
"""Rows of one block, at most: with a fixed number of them a block grows with the sequence, not with its square."""


@dataclass(eq=False)
class AttentionLayer:
    """One attention layer in a pass that has just run.

    Attributes:
        layer: index and path.
        part: ``"decoder"``, ``"cross"`` or the path of the encoder it belongs to.
        start: position of its first query in the sequence, for layers that attend in windows, one call each.
        query, key, value: what it was given, ``(batch, head, position, channel)``.
        call: its further arguments; ``causal`` where it hides later keys itself, ``sinks`` where it heeds those given.
        gradient: dO, ``scale`` times the score's gradient to the layer's output, ``(batch, head, query, channel)``;
            only inside ``visit``.
        scale: what the score was multiplied by on its way back, see ``Captured.scale``.
    """

    layer: TapLayer
    part: str
    start: int
    query: Tensor
    key: Tensor
    value: Tensor
    call: AttentionCall
    causal: bool
    sinks: bool
    gradient: Tensor | None = None
    scale: float = 1.0

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def batch(self) -> int:
        """Sequences of the layer: images in the batch, times views where an encoder takes views as batch entries."""
        return int(self.query.shape[0])

    @property
    def heads(self) -> int:
        return int(self.query.shape[1])

    @property
    def queries(self) -> int:
        """Number of positions of the sequence."""
        return int(self.query.shape[2])

    @property
    def keys(self) -> int:
        return int(self.key.shape[2])

    def blocks(self, device: torch.device | None = None) -> Iterator[Tensor]:
        """Row indices ``(row,)`` in blocks whose weights fit comfortably into memory, in order; by default on the
        layer's device."""
        rows = max(1, min(_BLOCK_ROWS, _BLOCK_NUMBERS // max(1, self.batch * self.heads * self.keys)))
        yield from torch.arange(self.queries, device=device or self.query.device).split(rows)

    def weights(self, rows: Tensor) -> Tensor:
        """Attention weights A of some query rows on all keys, ``(batch, head, row, key)`` float32."""
        call = self.call
        with torch.no_grad():
            return attention_rows(
                self.query,
                self.key,
                columns=None,
                rows=rows,
                scaling=call.scaling,
                attention_mask=call.attention_mask,
                causal=self.causal,
                softcap=call.softcap,
                position_bias=call.position_bias,
                sinks=call.sinks if self.sinks else None,
            )

    def weight_gradient(self, rows: Tensor) -> Tensor:
        """The score's gradient to those weights, dA = dO·Vᵀ, ``(batch, head, row, key)`` float32.

        Raises:
            ExplainError: no gradient has reached this layer (outside ``visit``).
        """
        if self.gradient is None:
            raise ExplainError(f"no gradient has reached {self.layer.module}: ask for it inside visit()")
        with torch.no_grad():
            value = self.value.float()
            value = value.repeat_interleave(self.heads // value.shape[1], dim=1)
            taken = take_rows(self.gradient.float(), rows, self.batch) @ value.transpose(-1, -2)
            return taken if self.scale == 1.0 else taken / self.scale


Visit = Callable[[AttentionLayer], None]
Edit = Callable[[TapLayer, Tensor], Tensor]


class Captured:
    """Outputs, gradients and attention layers of the passes in a block.

    Attributes:
        outputs: module path → its output in the last pass, detached.
        gradients: module path → the score's gradient to that output; there once a backward pass has run through it.
        layers: the attention layers of the last pass, in the order they ran.
        tapped: part → paths of the attention modules that are read, first layer first.
        unreadable: paths of attention layers that cannot be read → reason.
        scale: what the score is multiplied by in the backward passes to come, which gradients are divided by, in single
            precision. ``None``: nothing is seen of them.
    """

    def __init__(self, *, visit: Visit | None = None, edit: Edit | None = None) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.layers: list[AttentionLayer] = []
        self.tapped: dict[str, list[str]] = {}
        self.unreadable: dict[str, str] = {}
        self.scale: float | None = 1.0
        self._visit, self._edit = visit, edit
        self._taps: dict[int, tuple[TapLayer, str]] = {}
        self._positions: dict[int, int] = {}
        self._keep = visit is None

    def begin(self, _module: nn.Module, _args: Any, _kwargs: Any) -> None:
        """A forward pre-hook on the model: a new pass begins."""
        self.layers.clear()
        self._positions.clear()

    # -- module outputs

    def watch(self, path: str) -> Callable[..., None]:
        """A forward hook that keeps the module's output, and its gradient when there is one."""

        def hook(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            tensor = first_tensor(output)
            self.outputs[path] = tensor.detach()
            self.gradients.pop(path, None)
            if tensor.requires_grad:
                tensor.register_hook(arrive)

        def arrive(gradient: Tensor) -> None:
            if self.scale is not None:
                gradient = gradient.detach()
                self.gradients[path] = gradient if self.scale == 1.0 else gradient.float() / self.scale

        return hook

    # -- attention

    @property
    def armed(self) -> bool:
        return bool(self._taps)

    def tap(self, model: nn.Module, part: str, root: nn.Module | None, *, cross: bool = False) -> list[nn.Module]:
        """The attention modules of one part, known to ``observe`` from now on."""
        found, unreadable = discover(model, root, cross=cross)
        self.unreadable.update(unreadable)
        for layer, module in found:
            self._taps[id(module)] = (layer, part)
            self.tapped.setdefault(part, []).append(layer.module)
        return [module for _, module in found]

    def fail(self, error: Exception) -> None:
        """Raise it: the pass is ours, and so is what goes wrong in it."""
        raise error

    def observe(
        self,
        module: nn.Module,
        implementation: str | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        result: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Keep one attention call, and visit it when the backward pass gets there."""
        tapped = self._taps.get(id(module))
        if tapped is None:
            return result
        layer, part = tapped
        output = result[0] if isinstance(result, tuple) else result
        if self._edit is not None:
            output = self._edit(layer, output)
            result = (output, *result[1:]) if isinstance(result, tuple) else output
        call = AttentionCall.of(args, kwargs)
        seen = AttentionLayer(
            layer,
            part,
            self._positions.get(id(module), 0),
            query.detach(),
            key.detach(),
            value.detach(),
            call,
            causal=call.is_causal_for(module, implementation, query.shape[2]),
            sinks=implementation != "sdpa",
        )
        if part not in ("decoder", "cross"):  # whose layers may attend in windows, one call each
            self._positions[id(module)] = seen.start + seen.queries
        if self._keep:
            self.layers.append(seen)
        visit = self._visit
        if visit is not None and output.requires_grad:

            def arrive(gradient: Tensor) -> None:
                if self.scale is None:
                    return
                # Attention functions return (batch, query, head, channel).
                seen.scale = self.scale
                seen.gradient = gradient.detach().transpose(1, 2)
                visit(seen)
                seen.gradient = None

            output.register_hook(arrive)
        return result


@contextmanager
def capture(
    model: nn.Module,
    encoders: Sequence[str],
    *,
    modules: Sequence[str] = (),
    attention: Sequence[str] = (),
    visit: Visit | None = None,
    edit: Edit | None = None,
) -> Iterator[Captured]:
    """Look inside the passes that ``model`` runs in the block; see ``Replay.capture``.

    Args:
        model: a replica, which nobody else runs meanwhile.
        encoders: paths of its image encoders.
        modules, attention, visit, edit: as for ``Replay.capture``.
    """
    seen = Captured(visit=visit, edit=edit)
    tapped = _tap(model, encoders, seen, attention)
    redirected: list[ConfigView] = []
    with HookSet() as hooks:
        try:
            hooks.forward_pre(model, seen.begin, name="capture", fenced=False)
            for pattern in modules:
                for path, module in find_modules(model, pattern):
                    hooks.forward(module, seen.watch(path), name=f"capture {path}", fenced=False)
            if tapped:
                redirect(tapped, redirected)
                observing(seen)
            yield seen
        finally:
            unobserved(seen)
            release(redirected)


def _tap(model: nn.Module, encoders: Sequence[str], seen: Captured, attention: Sequence[str]) -> list[nn.Module]:
    """The attention modules to lead to ``seen``."""
    tapped: list[nn.Module] = []
    for part in attention:
        if part in ("decoder", "cross"):
            tapped += seen.tap(model, part, None, cross=part == "cross")
        elif part == "encoder":
            for path in encoders:
                tapped += seen.tap(model, path, model.get_submodule(path))
        else:
            raise ExplainError(f"attention of {part!r}: there are 'decoder', 'cross' and 'encoder'")
    if attention and not tapped:
        reasons = "; ".join(sorted(set(seen.unreadable.values()))) or "it has no attention layer"
        raise ExplainError(
            f"no attention of the {' or '.join(attention)} of {type(model).__name__} can be read: {reasons}"
        )
    return tapped
