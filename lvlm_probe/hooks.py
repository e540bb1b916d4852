"""Hooks that never harm: install, fence, remove.

Everything this package hangs on a user's model or processor goes through one ``HookSet``: forward hooks, forward
pre-hooks, and *shadows* (a function put on an instance under the name of one of its methods, so that ``del`` brings the
method back and the class is never touched). Two rules hold for all of them:

* **Fenced.** An exception inside a fenced hook is caught; the hook is disarmed, ``on_error`` hears of it, and the call
  it hangs on goes on as if the hook were not there.
* **Removed.** ``remove()`` takes away our handles and nothing else, in any order with other probes, any number of
  times.
"""

from __future__ import annotations

import functools
import inspect
import logging
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from lvlm_probe.errors import ProbeWarning

__all__ = ["HookSet", "Shadow", "caution", "on_gradient", "shadow_of"]

_log = logging.getLogger("lvlm_probe")

OnError = Callable[[str, BaseException], None]


def caution(sentence: str, *, stacklevel: int = 2) -> None:
    """Warn with a ``ProbeWarning``; where the user turns warnings into errors, say it in the log instead."""
    try:
        warnings.warn(sentence, ProbeWarning, stacklevel=stacklevel + 1)
    except ProbeWarning:
        _log.warning(sentence)


class Shadow:
    """A function that stands on an instance in front of one of its methods.

    ``replacement(original, *args, **kwargs)`` is called with the method it stands in front of. After ``remove()`` the
    shadow only passes calls through, so a copy of it that somebody kept stays harmless.
    """

    def __init__(self, owner: object, name: str, replacement: Callable[..., Any]) -> None:
        self.name = name
        self.active = True
        self._owner = weakref.ref(owner)
        self._had_own = name in vars(owner)
        self._previous = vars(owner).get(name)
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            target = self._below()
            if not self.active:
                return target(*args, **kwargs)
            return replacement(target, *args, **kwargs)

        # Callers look at signatures (generate() does at its own parts); the bound method itself would keep owner alive.
        call.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        del call.__wrapped__  # type: ignore[attr-defined]
        call.__lvlm_probe_shadow__ = self  # type: ignore[attr-defined]
        self._call = call
        # Through __dict__: torch.nn.Module.__setattr__ is for parameters and modules, and some classes forbid
        # assignment.
        vars(owner)[name] = call

    def _below(self) -> Callable[..., Any]:
        """The callable this shadow stands in front of, looked up late so that class-level changes are seen."""
        if self._had_own:
            return self._previous  # type: ignore[return-value]
        owner = self._owner()
        if owner is None:
            raise ReferenceError(f"the object whose {self.name} was shadowed is gone")
        return getattr(type(owner), self.name).__get__(owner)

    def remove(self) -> None:
        """Take the shadow away; with another shadow on top of it, become a pass-through that the other one drops."""
        self.active = False
        owner = self._owner()
        if owner is None or vars(owner).get(self.name) is not self._call:
            return
        had_own, previous = self._had_own, self._previous
        while (lower := shadow_of(previous)) is not None and not lower.active:
            had_own, previous = lower._had_own, lower._previous
        if had_own:
            vars(owner)[self.name] = previous
        else:
            del vars(owner)[self.name]


def shadow_of(function: object) -> Shadow | None:
    """The ``Shadow`` behind an instance attribute, or ``None`` when it is something else."""
    return getattr(function, "__lvlm_probe_shadow__", None)


class HookSet:
    """Our hooks on one model: installed together, fenced, removed together.

    Args:
        on_error: called once per failing hook with the hook's name and the exception.
    """

    def __init__(self, on_error: OnError | None = None) -> None:
        self._on_error = on_error
        self._handles: list[RemovableHandle] = []
        self._shadows: list[Shadow] = []

    def forward_pre(self, module: torch.nn.Module, hook: Callable[..., Any], *, name: str, fenced: bool = True) -> None:
        """Register ``hook(module, args, kwargs)`` before ``module``'s forward; see ``torch.nn.Module`` for its
        result.
        """
        call = self._fence(hook, name) if fenced else hook
        self._handles.append(module.register_forward_pre_hook(call, with_kwargs=True))

    def forward(self, module: torch.nn.Module, hook: Callable[..., Any], *, name: str, fenced: bool = True) -> None:
        """Register ``hook(module, args, kwargs, output)`` after ``module``'s forward."""
        call = self._fence(hook, name) if fenced else hook
        self._handles.append(module.register_forward_hook(call, with_kwargs=True))

    def shadow(self, owner: object, name: str, replacement: Callable[..., Any]) -> Shadow:
        """Put ``replacement(original, *args, **kwargs)`` in front of the method ``name`` of this one instance."""
        shadow = Shadow(owner, name, replacement)
        self._shadows.append(shadow)
        return shadow

    def remove(self) -> None:
        """Remove every handle and shadow of this set; calling it again does nothing."""
        while self._handles:
            self._handles.pop().remove()
        while self._shadows:
            self._shadows.pop().remove()

    def __len__(self) -> int:
        return len(self._handles) + len(self._shadows)

    def __enter__(self) -> HookSet:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def _fence(self, hook: Callable[..., Any], name: str) -> Callable[..., Any]:
        armed = True
        on_error = self._on_error

        def fenced(*args: Any, **kwargs: Any) -> Any:
            nonlocal armed
            if not armed:
                return None
            try:
                return hook(*args, **kwargs)
            except Exception as error:
                armed = False
                _log.debug("hook %s failed and is disarmed", name, exc_info=True)
                if on_error is not None:
                    on_error(name, error)
                return None

        return fenced


def on_gradient(tensor: torch.Tensor, hook: Callable[[torch.Tensor], None]) -> None:
    """Call ``hook(gradient)`` when a backward pass reaches ``tensor``; it is gone with the tensor's graph."""
    tensor.register_hook(hook)
