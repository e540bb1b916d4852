"""The tap: install it, arm it, let the model run, collect the rows."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import torch
from torch import BoolTensor, LongTensor, Tensor, nn

from lvlm_probe.attention.collection import Collection
from lvlm_probe.attention.dispatch import AttentionCall, ConfigView, observing, redirect, release, unobserved
from lvlm_probe.attention.layers import TapLayer, discover
from lvlm_probe.attention.rows import attention_rows, take_columns, take_rows
from lvlm_probe.errors import AttachError, ProbeError

logger = logging.getLogger("lvlm_probe")


@dataclass(frozen=True)
class Rows:
    """Attention rows that a tap collected: attention of each step's query on the image keys."""

    values: Tensor
    """``(batch, step, layer, head|1, key)`` on the CPU; 0 where ``valid`` is False."""
    text_mass: Tensor
    """``(batch, step, layer, head|1)`` float32: attention on everything that is not one of the columns."""
    layers: tuple[TapLayer, ...]
    """What the layer axis holds."""
    valid: Tensor | None
    """``(batch, key)`` bool: which columns are real, which are filling; ``None`` where all keys were asked for."""
    heads: Literal["mean", "all"]
    missing: dict[str, str] = field(default_factory=dict)
    """Layers (module paths) that were tapped and still gave no complete rows, with the reason."""


class RowTap:
    """Reads attention rows out of a running model: ``install`` → ``arm`` → the model's own forward → ``collect``.

    Read is what the thread that armed it runs, in its context. The model's outputs are bit-equal with and without the
    tap, and no random number is drawn. A failure inside the tap
    disarms it, calls ``on_error`` once and leaves the model's run alone. The tap holds the model weakly; ``remove``,
    leaving the context and garbage collection of the tap all restore the modules.

    Args:
        cross: read the layers whose keys are not the sequence's own, but an encoder's states; by default the
            decoder's self-attention.

    Attributes:
        layers: the decoder's attention layers that will be read, in order.
        unsupported: module path → reason, for every decoder layer that cannot be read.
        error: what disarmed the tap, or ``None``.
    """

    def __init__(
        self, model: nn.Module, *, cross: bool = False, on_error: Callable[[BaseException], None] | None = None
    ) -> None:
        found, self.unsupported = discover(model, cross=cross)
        self.layers: tuple[TapLayer, ...] = tuple(layer for layer, _ in found)
        self.error: BaseException | None = None
        self._on_error = on_error
        self._model_class = type(model).__name__
        self._modules = [weakref.ref(module) for _, module in found]
        self._number = {id(module): number for number, (_, module) in enumerate(found)}
        self._armed: Collection | None = None
        self._thread = 0
        self._installed = False
        self._redirected: list[ConfigView] = []
        weakref.finalize(self, release, self._redirected).atexit = False

    # -- installing

    @property
    def installed(self) -> bool:
        """Whether the decoder's attention modules are routed through the tap now."""
        return self._installed

    def install(self) -> RowTap:
        """Route the decoder's attention layers through the tap, beside others that may be there. Idempotent."""
        if not self._installed:
            self._installed = True
            redirect([module for reference in self._modules if (module := reference()) is not None], self._redirected)
        return self

    def remove(self) -> None:
        """Put every module's own config back, if no other tap is left. Idempotent; disarms."""
        self.disarm()
        self._installed = False
        release(self._redirected)

    def __enter__(self) -> RowTap:
        return self.install()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    # -- collecting

    def arm(
        self,
        columns: LongTensor | Tensor | None,
        *,
        valid: BoolTensor | Tensor | None = None,
        queries: Literal["last"] | LongTensor | Tensor = "last",
        heads: Literal["mean", "all"] = "mean",
        dtype: torch.dtype = torch.float16,
        prompt_length: int | None = None,
        cross_keys: int | None = None,
        budget_bytes: int = 256 * 2**20,
        holds_keys: bool = True,
    ) -> None:
        """Begin to collect; what was collected before and not fetched is dropped.

        Args:
            columns: image keys, ``(batch, key)``: absolute positions in the (padded) sequence, past included; of
                cross-attention, numbers of its keys, and ``None`` for all of them.
            valid: ``(batch, key)``; False marks filling, where rows have different numbers of image tokens.
            queries: ``"last"``: each forward pass gives one step, its last position (prefill: the query that predicts
                the first answer token; then every decoding step). Or absolute positions ``(step,)`` or
                ``(batch, step)``: those rows of the first forward pass, all of which it must contain.
            heads: ``"mean"`` averages over heads, ``"all"`` keeps them.
            dtype: of the collected values; the arithmetic is float32 throughout.
            prompt_length: with ``"last"``: passes that end before this position (chunks of a prefill) give no step.
            cross_keys: how many keys cross-attention has to have, where that is known.
            budget_bytes: rows wait on the model's device; above this many bytes they are moved to the CPU.
            holds_keys: a layer's newest keys may be kept between steps, and the rows made of them at the end. Not where
                a cache keeps its keys elsewhere between steps, as there is no room for them: rows are made at once.

        Raises:
            ValueError: shapes that do not go together.
            AttachError: the tap is not installed, or the model has no layer that it can read.
        """
        if not self.installed:
            raise AttachError("the attention tap is not installed: call install() first, or use it as a context")
        if not self.layers:
            reasons = "; ".join(sorted(set(self.unsupported.values())))
            raise AttachError(f"no attention layer of {self._model_class} can be read: {reasons}")
        kinds = {layer.kind for layer in self.layers}
        if columns is None and kinds != {"cross"}:
            raise ValueError("columns can be left out only where all layers read are cross-attention")
        if "merged" in kinds and cross_keys is None:
            raise ValueError("cross_keys must be given: these layers have keys of their own in front of the encoder's")
        if columns is not None:
            columns, valid = _columns(columns, valid)
        picked: Tensor | None = None
        if isinstance(queries, str):
            if queries != "last":
                raise ValueError(f"queries must be 'last' or positions, not {queries!r}")
        else:
            picked = torch.as_tensor(queries, dtype=torch.long)
            if picked.dim() not in (1, 2) or not picked.numel():
                raise ValueError(f"queries must be (step,) or (batch, step) and not empty, not {tuple(picked.shape)}")
        if heads not in ("mean", "all"):
            raise ValueError(f"heads must be 'mean' or 'all', not {heads!r}")
        self.error = None
        self._thread = threading.get_ident()
        observing(self)
        self._armed = Collection(
            columns=columns,
            valid=None if valid is None else torch.as_tensor(valid),
            queries=picked,
            heads=heads,
            dtype=dtype,
            prompt_length=prompt_length,
            budget=budget_bytes,
            end=0,
            cross_keys=cross_keys,
            holds_keys=holds_keys,
            seen=dict.fromkeys(range(len(self.layers)), 0),
        )

    @property
    def armed(self) -> bool:
        """Whether this thread's next forward pass will be read."""
        return self._armed is not None and self._thread == threading.get_ident()

    def disarm(self) -> None:
        """Stop collecting and drop what was collected."""
        self._armed = None
        unobserved(self)

    @torch.autocast("cpu", enabled=False)  # it cannot join tensors of half precision
    def collect(self) -> Rows | None:
        """Hand over what was collected since ``arm`` and disarm; ``None`` if there is nothing (see ``error``).

        A layer that gave fewer steps than the others is left out and named in ``missing``. The caller compares the
        number of steps with the number of tokens: passes inside a compiled graph are not seen.

        Raises:
            ProbeError: ``heads="all"`` on a decoder whose layers differ in their number of heads, or all keys of
                cross-attention layers that differ in their number of keys.
        """
        armed, self._armed = self._armed, None
        unobserved(self)
        if armed is None:
            return None
        with torch.no_grad():
            full = armed.finish()
        steps = max((mass.shape[1] for _, mass in full.values()), default=0)
        if not steps:
            return None
        missing: dict[str, str] = {}
        for number, layer in enumerate(self.layers):
            got = full[number][1].shape[1] if number in full else 0
            if number in armed.repeated:
                missing[layer.module] = "runs more than once in a pass, so that no row is the one of a step"
            elif got != steps:
                missing[layer.module] = f"gave {got} of {steps} rows: its attention did not go through the interface"
                full.pop(number, None)
        heads = {mass.shape[2] for _, mass in full.values()}
        if len(heads) > 1:
            raise ProbeError(
                f"the attention layers of {self._model_class} have {sorted(heads)} heads, which do not fit one array; "
                'arm the tap with heads="mean"'
            )
        keys = {rows.shape[-1] for rows, _ in full.values()}
        if len(keys) > 1:
            raise ProbeError(
                f"the cross-attention layers of {self._model_class} have {sorted(keys)} keys, which do not fit one "
                "array"
            )
        kept = sorted(full)
        return Rows(
            values=torch.stack([full[number][0] for number in kept], dim=2),
            text_mass=torch.stack([full[number][1] for number in kept], dim=2),
            layers=tuple(self.layers[number] for number in kept),
            valid=armed.valid,
            heads=armed.heads,
            missing=missing,
        )

    def peek(self, start: int, stop: int) -> Tensor | None:
        """Look at rows of steps ``[start, stop)`` that are past, in any thread, while collecting goes on.

        Returns:
            ``(batch, step, layer, head|1, key)`` float32 on the CPU, of the layers that have them all; ``None`` where
            none has, or nothing is collected now.
        """
        if (armed := self._armed) is None:
            return None
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            found = [armed.peek(number, start, stop) for number in range(len(self.layers))]
        whole = [rows for rows in found if rows.shape[1] == stop - start]
        return torch.stack(whole, dim=2) if whole and stop > start else None

    # -- inside the model's forward pass

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
        """Read one attention call of the model and hand its result back as it is; never raises."""
        armed, number = self._armed, self._number.get(id(module))
        if armed is None or number is None or armed.repeats(number):
            return result
        try:
            if (  # one more step of ordinary decoding, as nearly all calls are
                implementation == "sdpa"
                and (args[0] is None if len(args) == 1 else not args and kwargs.get("attention_mask") is None)
                and kwargs.get("softcap") is None
                and kwargs.get("position_bias") is None
                and isinstance(result, tuple)
                and result[-1] is None
                and armed.wait_again(number, query, key, kwargs.get("scaling"))
            ):
                return result
            call = AttentionCall.of(args, kwargs)
            with torch.no_grad():
                rows = self._read(armed, number, module, implementation, query, key, result, call)
                if rows is not None:
                    armed.add(number, rows)
        except Exception as error:
            self.fail(error)
        return result

    def _read(
        self,
        armed: Collection,
        number: int,
        module: nn.Module,
        implementation: str | None,
        query: Tensor,
        key: Tensor,
        result: Any,
        call: AttentionCall,
    ) -> Tensor | None:
        """Rows of one call, ``(batch, head, step, key)`` float32, or None where it has none to give, or none yet."""
        if implementation not in ("sdpa", "eager", None):
            raise ProbeError(f"the model was switched to {implementation!r}, which gives no attention weights")
        batch, _, queries, _ = query.shape
        keys, kind, device = key.shape[2], self.layers[number].kind, query.device
        armed.advance(number, queries, keys)
        if kind == "cross" and armed.cross_keys not in (None, keys):
            raise ProbeError(f"cross-attention has {keys} keys where the encoder was given {armed.cross_keys} tokens")
        if armed.columns is not None and armed.columns.shape[0] != batch:
            raise ProbeError(f"the tap was armed for a batch of {armed.columns.shape[0]}, the model runs {batch}")
        if not armed.wants(number):
            return None
        rows = armed.rows(queries, device)
        weights = result[1] if isinstance(result, tuple) and len(result) > 1 else None
        if weights is not None and weights.dim() == 4 and not (call.dropout and module.training):
            return take_columns(take_rows(weights, rows, batch).float(), armed.columns_of(kind, key.shape, device))
        sdpa, causal = implementation == "sdpa", call.is_causal_for(module, implementation, queries)
        newest = armed.holds_keys and sdpa and armed.queries is None and kind == "self" and keys == armed.end
        if newest and call.is_plain(keys) and (queries == 1 or call.attention_mask is not None or causal):
            armed.wait(number, query, key, mask=call.attention_mask, scaling=call.scaling)
            return None
        return attention_rows(
            query,
            key,
            columns=armed.columns_of(kind, key.shape, device),
            rows=rows,
            scaling=call.scaling,
            attention_mask=call.attention_mask,
            causal=causal,
            softcap=call.softcap,
            position_bias=call.position_bias,
            sinks=None if sdpa else call.sinks,
        )

    def fail(self, error: BaseException) -> None:
        """Disarm, and say why: the model's run is the user's."""
        self._armed = None
        self.error = error
        logger.debug("attention tap disarmed", exc_info=error)
        if self._on_error is not None:
            with contextlib.suppress(Exception):
                self._on_error(error)


def _columns(columns: Any, valid: Any) -> tuple[Tensor, Tensor]:
    """Checked columns and validity on the CPU."""
    columns = torch.as_tensor(columns, dtype=torch.long).cpu()
    if columns.dim() != 2:
        raise ValueError(f"columns must be (batch, key), not {tuple(columns.shape)}")
    valid = torch.ones_like(columns, dtype=torch.bool) if valid is None else torch.as_tensor(valid).bool().cpu()
    if valid.shape != columns.shape:
        raise ValueError(f"valid is {tuple(valid.shape)}, columns are {tuple(columns.shape)}: they must agree")
    # Filling points outside every key axis: its weight is 0 by the same rule as a key that left the window.
    return columns.masked_fill(~valid, -(2**40)), valid
