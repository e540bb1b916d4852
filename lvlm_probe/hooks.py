"""Hooks that never harm: install, fence, remove.

Everything this package hangs on a user's model or processor goes through one ``HookSet``: forward hooks, forward
pre-hooks, and *shadows* (a callable put on an instance under the name of one of its methods, so that ``del`` brings the
method back and the class is never touched). Three rules hold for all of them:

* **Fenced.** An exception inside a fenced hook is caught; the hook is disarmed, ``on_error`` hears of it, and the call
  it hangs on goes on as if the hook were not there.
* **Removed.** ``remove()`` takes away our handles and nothing else, in any order with other probes, any number of
  times.
* **Not inherited.** A deep copy or a pickle of what they hang on is a working object without them; the pickle does not
  even need this package to be loaded.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import operator
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


class _Standing:
    """What stands in the instance's ``__dict__``: calls go to the shadow, copies and pickles to the method below it."""

    def __init__(self, shadow: Shadow, original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        del self.__wrapped__  # type: ignore[attr-defined]  # the bound method would keep its owner alive
        self.__lvlm_probe_shadow__ = shadow

    @property
    def __signature__(self) -> inspect.Signature:
        """Callers look at signatures (generate() does at its own parts). Found when asked for: it takes longer than to
        put a shadow up, and some stand for one pass only."""
        return inspect.signature(self.__lvlm_probe_shadow__._below())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__lvlm_probe_shadow__.run(args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        shadow = self.__lvlm_probe_shadow__
        if shadow.had_own:
            return copy.deepcopy(shadow.previous, memo)
        # While the owner is copied its copy stands in memo already; alone, a method is copied with its object.
        owner = copy.deepcopy(shadow.owner, memo)
        return shadow.method_of(owner)

    def __reduce__(self) -> Any:
        shadow = self.__lvlm_probe_shadow__
        if shadow.had_own:
            return operator.getitem, ((shadow.previous,), 0)
        return getattr, (shadow.owner, shadow.name)  # which is how Python pickles a bound method


class Shadow:
    """A callable that stands on an instance in front of one of its methods.

    ``replacement(original, *args, **kwargs)`` is called with the method it stands in front of. After ``remove()`` the
    shadow only passes calls through, so a reference to it that somebody kept stays harmless.
    """

    def __init__(self, owner: object, name: str, replacement: Callable[..., Any]) -> None:
        self.name = name
        self.active = True
        self.had_own = name in vars(owner)
        self.previous = vars(owner).get(name)
        self._owner = weakref.ref(owner)
        self._replacement = replacement
        self._call = _Standing(self, getattr(owner, name))
        # Through __dict__: torch.nn.Module.__setattr__ is for parameters and modules, and some classes forbid
        # assignment.
        vars(owner)[name] = self._call

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call of the shadowed method does."""
        target = self._below()
        return self._replacement(target, *args, **kwargs) if self.active else target(*args, **kwargs)

    @property
    def owner(self) -> Any:
        """The instance."""
        owner = self._owner()
        if owner is None:
            raise ReferenceError(f"the object whose {self.name} was shadowed is gone")
        return owner

    def method_of(self, owner: object) -> Callable[..., Any]:
        """The class's own method, bound to ``owner``."""
        return getattr(type(owner), self.name).__get__(owner)

    def _below(self) -> Callable[..., Any]:
        """The callable this shadow stands in front of, looked up late so that class-level changes are seen."""
        return self.previous if self.had_own else self.method_of(self.owner)  # type: ignore[return-value]

    def remove(self) -> None:
        """Take the shadow away; with another shadow on top of it, become a pass-through that the other one drops."""
        self.active = False
        owner = self._owner()
        if owner is None or vars(owner).get(self.name) is not self._call:
            return
        had_own, previous = self.had_own, self.previous
        while (lower := shadow_of(previous)) is not None and not lower.active:
            had_own, previous = lower.had_own, lower.previous
        if had_own:
            vars(owner)[self.name] = previous
        else:
            del vars(owner)[self.name]


def shadow_of(function: object) -> Shadow | None:
    """The ``Shadow`` behind an instance attribute, or ``None`` when it is something else."""
    return getattr(function, "__lvlm_probe_shadow__", None)


class _Hanging:
    """A hook as it is registered. In a deep copy or a pickle of its module it is a hook that does nothing."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._hook(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # Takes any arguments, returns None, and is found by pickle where this package is not installed.
        return contextlib.nullcontext().__exit__

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")


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
        self._handles.append(module.register_forward_pre_hook(_Hanging(call), with_kwargs=True))

    def forward(self, module: torch.nn.Module, hook: Callable[..., Any], *, name: str, fenced: bool = True) -> None:
        """Register ``hook(module, args, kwargs, output)`` after ``module``'s forward."""
        call = self._fence(hook, name) if fenced else hook
        self._handles.append(module.register_forward_hook(_Hanging(call), with_kwargs=True))

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
