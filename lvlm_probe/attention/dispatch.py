"""Dispatch of attention layers to an observed function, and back, with no config written.

The function is registered once for the process and stays: a layer that has just read its name still finds it when the
last observer has gone. A layer may be redirected by several observers at once; the last one out restores its config.
Who hears of a call is told by the caller's context (``observing``): layers of a shared model run for many callers.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextvars import ContextVar
from copy import deepcopy
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from lvlm_probe.attention.layers import eager_of, registry_of
from lvlm_probe.process import lock

NAME = "lvlm_probe"
"""Of the one function in transformers' registry of attention functions."""

_LOCK = lock()

_OBSERVERS: ContextVar[tuple[weakref.ref[Any], ...]] = ContextVar("lvlm_probe_observers", default=())


class ImplementationName(str):
    """The name of the untouched implementation, except as a dictionary key, where it is the name of the tap.

    Some attention layers (the sparse ones of dots3_note, deepseek_v32, minimax_m3_vl …) compare the name with "sdpa"
    and take another branch under any other. So the name reads and compares as it did; only its hash leads a lookup in
    the registry to the tap's entry, and equality with the tap's own name confirms it.
    """

    __slots__ = ()

    def __hash__(self) -> int:
        return hash(NAME)

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or other == NAME

    def __ne__(self, other: object) -> bool:
        return not self == other


class ConfigView:
    """A config seen with another ``_attn_implementation``; everything else reads and writes the config itself.

    It counts who has redirected its module, and knows the module: a duplicate of the module has the same view.
    """

    __slots__ = ("__weakref__", "tap_attend", "tap_config", "tap_count", "tap_module")

    def __init__(self, module: nn.Module) -> None:
        object.__setattr__(self, "tap_config", module.__dict__["config"])
        object.__setattr__(self, "tap_module", weakref.ref(module))
        object.__setattr__(self, "tap_attend", (registry_of(module), eager_of(module)))
        object.__setattr__(self, "tap_count", 0)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # isinstance() must answer as for the config
        return type(self.tap_config)

    @property
    def _attn_implementation(self) -> str:
        return ImplementationName(self.tap_config._attn_implementation or "eager")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tap_config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.tap_config, name, value)

    def __beneath_lvlm_probe__(self) -> Any:
        return self.tap_config

    # Copies and pickles of a tapped model are untapped: the registered name means nothing elsewhere.
    def __copy__(self) -> Any:
        return self.tap_config

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return deepcopy(self.tap_config, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _same, (self.tap_config,)


def _same(config: Any) -> Any:
    return config


def is_view(config: Any) -> bool:
    return type(config) is ConfigView


class AttentionCall(NamedTuple):
    """The arguments of an attention call that change its weights. Made for every layer of every step: cheap to make."""

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
        given = {**dict(zip(names, args, strict=False)), **kwargs} if len(args) > 1 else kwargs
        get = given.get
        return cls(
            args[0] if len(args) == 1 else get("attention_mask"),
            get("scaling"),
            get("is_causal"),
            get("dropout") or 0.0,
            get("softcap"),
            get("position_bias"),
            get("s_aux"),
        )

    def is_causal_for(self, module: nn.Module, implementation: str | None, queries: int) -> bool:
        """Whether sdpa itself hides later keys from these queries: no mask was built, and the module is causal."""
        causal = self.is_causal if self.is_causal is not None else getattr(module, "is_causal", True)
        return bool(implementation == "sdpa" and queries > 1 and self.attention_mask is None and causal)

    def is_plain(self, keys: int) -> bool:
        """Whether scores are q·kᵀ and at most a mask of ``keys`` columns."""
        mask = self.attention_mask
        fits = mask is None or (mask.dim() == 4 and mask.shape[-1] >= keys)
        return fits and self.softcap is None and self.position_bias is None


class Observer(Protocol):
    """Sees each attention call after the fact and says what the layer gets: ``result``, unless it intervenes."""

    @property
    def armed(self) -> bool: ...

    def fail(self, error: Exception) -> None:
        """Something went wrong in ``armed`` or ``observe``: raise it, or keep it from the layer that is observed."""

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
    ) -> Any: ...


def redirect(modules: Iterable[nn.Module], redirected: list[ConfigView]) -> None:
    """Lead attention modules to the function that shows their calls to who is ``observing``.

    Args:
        redirected: gets an entry for each module in its turn, for ``release``; also when this is interrupted half-way.
    """
    with _LOCK:
        if NAME not in AttentionInterface._global_mapping:
            AttentionInterface.register(NAME, _attention)
        for module in modules:
            view = module.__dict__["config"]
            if not is_view(view):
                view = ConfigView(module)
            redirected.append(view)
            object.__setattr__(view, "tap_count", view.tap_count + 1)
            module.__dict__["config"] = view


def release(redirected: list[ConfigView]) -> None:
    """Give the modules' own configs back where nobody else has redirected them; calling it again does nothing."""
    with _LOCK:
        while redirected:
            view = redirected.pop()
            object.__setattr__(view, "tap_count", view.tap_count - 1)
            module = view.tap_module()
            if view.tap_count < 1 and module is not None and module.__dict__.get("config") is view:
                module.__dict__["config"] = view.tap_config


def observing(observer: Observer) -> None:
    """From now on ``observer`` hears of attention calls in this context; held weakly."""
    unobserved(observer)
    _OBSERVERS.set((*_OBSERVERS.get(), weakref.ref(observer)))


def unobserved(observer: Observer) -> None:
    """``observer`` hears no more of calls in this context."""
    _OBSERVERS.set(tuple(one for one in _OBSERVERS.get() if one() not in (None, observer)))


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """What is registered: the layer's own attention, its result shown to observers that are armed.

    Inside a compiled graph nothing is observed. The view may be gone since the layer has read its name.
    """
    view: Any = module.__dict__.get("config")
    redirected = is_view(view)
    implementation = (view.tap_config if redirected else view)._attn_implementation
    registry, eager = view.tap_attend if redirected else (registry_of(module), eager_of(module))
    result = registry.get_interface(implementation, eager)(module, query, key, value, *args, **kwargs)
    if redirected and not torch.compiler.is_compiling():
        for reference in _OBSERVERS.get():
            observer: Observer | None = reference()
            if observer is None:
                continue
            try:
                if observer.armed:
                    led_module = view.tap_module() or module
                    result = observer.observe(led_module, implementation, query, key, value, result, args, kwargs)
            except Exception as error:
                observer.fail(error)
    return result
