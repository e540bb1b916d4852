"""How one decoder's attention layers are led to an observed function, and back, with no config written."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from lvlm_probe.attention.layers import eager_of, registry_of
from lvlm_probe.errors import AttachError

__all__ = ["AttentionCall", "ConfigView", "Observer", "is_view", "lead"]


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
            args[0] if len(args) == 1 else get("attention_mask"), get("scaling"), get("is_causal"),
            get("dropout") or 0.0, get("softcap"), get("position_bias"), get("s_aux"),
        )  # fmt: skip

    def is_causal_for(self, module: nn.Module, implementation: str | None, queries: int) -> bool:
        """Whether sdpa itself hides later keys from these queries: no mask was built, and the module is causal."""
        causal = self.is_causal if self.is_causal is not None else getattr(module, "is_causal", True)
        return bool(implementation == "sdpa" and queries > 1 and self.attention_mask is None and causal)


class Observer(Protocol):
    """What sees each attention call after the fact and says what the layer gets: ``result``, unless it intervenes."""

    @property
    def armed(self) -> bool: ...

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


def lead(modules: Iterable[nn.Module], observer: Observer, *, model_class: str) -> weakref.finalize:
    """Lead attention modules to a function that shows their calls to ``observer``.

    Returns:
        What undoes it: called, or when the observer is collected. The modules and the observer are held weakly.

    Raises:
        AttachError: one of the modules is led somewhere already.
    """
    found = list(modules)
    if any(is_view(module.__dict__.get("config")) for module in found):
        raise AttachError(
            f"{model_class} has an attention tap installed already; remove that one (detach its probe) first"
        )
    name = f"lvlm_probe_{uuid.uuid4().hex}"
    changed: list[tuple[weakref.ref[nn.Module], ConfigView, Any]] = []
    undo = weakref.finalize(observer, _restore, name, changed)
    undo.atexit = False
    AttentionInterface.register(name, _observed_attention(weakref.ref(observer)))
    for module in found:
        config = module.__dict__["config"]
        view = ConfigView(config, name, registry_of(module), eager_of(module))
        changed.append((weakref.ref(module), view, config))
        module.__dict__["config"] = view
    return undo


def _observed_attention(reference: Callable[[], Observer | None]) -> Callable[..., Any]:
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
                return observer.observe(module, implementation, query, key, value, result, args, kwargs)
        return result

    return tapped_attention


def _restore(name: str, changed: list[tuple[weakref.ref[nn.Module], ConfigView, Any]]) -> None:
    """Put the modules' own configs back and forget ``name``. Also a finaliser: it must not refer to the tap."""
    for reference, view, config in changed:
        module = reference()
        if module is not None and module.__dict__.get("config") is view:
            module.__dict__["config"] = config
    AttentionInterface._global_mapping.pop(name, None)
