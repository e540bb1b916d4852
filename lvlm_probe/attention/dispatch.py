"""How one decoder's attention layers are led to an observed function, and back, with no config written."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

__all__ = ["AttentionCall", "ConfigView", "Observer", "is_view", "observed_attention", "restore"]


class ImplementationName(str):
    """The name of the untouched implementation, except as a dictionary key, where it is the name of the tap.

    Some attention layers (the sparse ones of dots3_note, deepseek_v32, minimax_m3_vl …) compare the name with "sdpa"
    and take another branch under any other. So the name reads and compares as it did; only its hash leads a lookup in
    the registry to the tap's entry, and equality with the tap's own name confirms it.
    """

    __slots__ = ("_key",)
    _key: str

    def __new__(cls, name: str, key: str) -> ImplementationName:
        made = super().__new__(cls, name)
        made._key = key
        return made

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or self._key == other

    def __ne__(self, other: object) -> bool:
        return not self == other


class ConfigView:
    """A config seen with another ``_attn_implementation``; everything else reads and writes the config itself."""

    __slots__ = ("__weakref__", "_tap_eager", "_tap_name", "_tap_registry", "_tapped")

    def __init__(self, config: Any, name: str, registry: Any, eager: Callable[..., Any] | None) -> None:
        object.__setattr__(self, "_tapped", config)
        object.__setattr__(self, "_tap_name", name)
        object.__setattr__(self, "_tap_registry", registry)
        object.__setattr__(self, "_tap_eager", eager)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # isinstance() must answer as for the config
        return type(self._tapped)

    @property
    def _attn_implementation(self) -> str:
        return ImplementationName(self._tapped._attn_implementation or "eager", self._tap_name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tapped, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._tapped, name, value)

    # Copies and pickles of a tapped model are untapped: the registered name means nothing elsewhere.
    def __copy__(self) -> Any:
        return self._tapped

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return deepcopy(self._tapped, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _same, (self._tapped,)


def _same(config: Any) -> Any:
    return config


def is_view(config: Any) -> bool:
    return type(config) is ConfigView


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of an attention call that change its weights."""

    attention_mask: Tensor | None = None
    scaling: float | None = None
    is_causal: bool | None = None
    dropout: float = 0.0
    softcap: float | None = None
    position_bias: Tensor | None = None
    sinks: Tensor | None = None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall:
        names = ("attention_mask", "dropout", "scaling")  # the order that attention functions share
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return cls(
            attention_mask=given.get("attention_mask"),
            scaling=given.get("scaling"),
            is_causal=given.get("is_causal"),
            dropout=given.get("dropout") or 0.0,
            softcap=given.get("softcap"),
            position_bias=given.get("position_bias"),
            sinks=given.get("s_aux"),
        )


class Observer(Protocol):
    """What sees each attention call after the fact; ``observe`` must not raise."""

    @property
    def armed(self) -> bool: ...

    def observe(
        self,
        module: nn.Module,
        implementation: str | None,
        query: Tensor,
        key: Tensor,
        result: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None: ...


def observed_attention(reference: Callable[[], Observer | None]) -> Callable[..., Any]:
    """The function to register: the layer's own attention, its result shown to the observer while that is armed.

    ``reference`` is weak: the registry must not keep the observer alive. Inside a compiled graph nothing is observed.
    """

    def tapped_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        view: Any = module.config
        implementation = view._tapped._attn_implementation
        attend = view._tap_registry.get_interface(implementation, view._tap_eager)
        result = attend(module, query, key, value, *args, **kwargs)
        if not torch.compiler.is_compiling():
            observer = reference()
            if observer is not None and observer.armed:
                observer.observe(module, implementation, query, key, result, args, kwargs)
        return result

    return tapped_attention


def restore(name: str, changed: list[tuple[weakref.ref[nn.Module], ConfigView, Any]]) -> None:
    """Put the modules' own configs back and forget ``name``. Also a finaliser: it must not refer to the tap."""
    for reference, view, config in changed:
        module = reference()
        if module is not None and module.__dict__.get("config") is view:
            module.__dict__["config"] = config
    AttentionInterface._global_mapping.pop(name, None)
