"""Hooks that never harm: install, fence, bind, remove.

Everything this package hangs on a user's model or processor goes through one ``HookSet``: forward hooks, forward
pre-hooks, and *shadows* (a callable put on an instance under the name of one of its methods, so that ``del`` brings the
method back and the class is never touched). Four rules hold for all of them:

* **Fenced.** An exception inside a fenced hook is caught; the hook is disarmed, ``on_error`` hears of it, and the call
  it hangs on goes on as if the hook were not there.
* **Bound.** A model is shared by threads. Hooks of a set with a ``scope`` act in the calls that were entered for that
  scope (``Call``), by the thread and in the context that entered them; to all other callers they are not there.
* **Removed.** ``remove()`` takes away what this set has hung up and nothing else, in any order with other probes, any
  number of times, from any thread, also when hanging up was interrupted half-way.
* **Not inherited.** A deep copy or a pickle of what they hang on is a working object without them; the pickle does not
  even need this package to be loaded. Neither are they by the replica that our own passes run on (``beneath``), but
  for ``inherited`` shadows: those without which a model does not run.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import operator
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any

import torch

from lvlm_probe.errors import ProbeWarning
from lvlm_probe.process import lock

_log = logging.getLogger("lvlm_probe")

OnError = Callable[[str, BaseException], None]

_LOCK = lock()  # torch numbers its hooks without one

_CALLS: ContextVar[tuple[Call, ...]] = ContextVar("lvlm_probe_calls", default=())

NOTHING = object()
"""What is beneath a hook of ours."""


class Call:
    """A call that is entered for an owner, as a context; ``within(owner)`` is true inside it.

    Only by the thread that entered, and in its context: tasks take copies of a context along that live longer than the
    call, and go on in other threads.
    """

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self.thread: int | None = None
        self._before: Token[tuple[Call, ...]] | None = None

    def __enter__(self) -> Call:
        self._before = _CALLS.set((*_CALLS.get(), self))
        self.thread = threading.get_ident()
        return self

    def __exit__(self, *exc: object) -> None:
        self.thread = None
        if self._before is not None:
            _CALLS.reset(self._before)


def within(owner: object) -> bool:
    """Whether this thread is inside a call entered for ``owner`` in this context."""
    calls = _CALLS.get()
    if not calls:
        return False
    thread = threading.get_ident()
    return any(call.owner is owner and call.thread == thread for call in calls)


def beneath(value: Any) -> Any:
    """What something of ours stands in front of, ``NOTHING`` if there is nothing; any other value is itself."""
    find = getattr(type(value), "__beneath_lvlm_probe__", None)
    return value if find is None else find(value)


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
        return inspect.signature(self.__lvlm_probe_shadow__.below())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__lvlm_probe_shadow__.run(args, kwargs)

    def __beneath_lvlm_probe__(self) -> Any:
        shadow = self.__lvlm_probe_shadow__
        if shadow.inherited:  # as a method, which a replica binds to its own module
            return types.MethodType(functools.partial(_inherited, shadow, *shadow.parts), shadow.owner)
        return shadow.previous if shadow.had_own else NOTHING

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


class _Attributes(dict[str, Any]):
    """The ``__dict__`` of an instance that is no module, while shadows stand in it.

    Settings of processors are what their ``__dict__`` holds: ``repr``, ``to_dict`` and ``save_pretrained`` write a deep
    copy of it. That copy, and a pickle, is a plain dict of what the instance has of its own.
    """

    def own(self) -> dict[str, Any]:
        """Everything but shadows, and but what they stand in front of where that is the instance's own."""
        found = {}
        for name, value in list(self.items()):
            while (below := beneath(value)) is not value:
                value = below
            if value is not NOTHING:
                found[name] = value
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        memo[id(self)] = copied = {}
        copied.update(copy.deepcopy(self.own(), memo))
        return copied

    def __reduce__(self) -> Any:
        return dict, (self.own(),)


class Shadow:
    """A callable that stands, from ``put_up`` to ``remove``, on an instance in front of one of its methods.

    ``replacement(original, *args, **kwargs)`` is called with the method it stands in front of. After ``remove()`` the
    shadow only passes calls through, so a reference to it that somebody kept stays harmless; so it does outside
    ``scope``, if it has one. Where ``inherited`` it stands in replicas of the instance too.
    """

    def __init__(
        self, owner: object, name: str, replacement: Callable[..., Any], scope: object = None, inherited: bool = False
    ) -> None:
        self.name = name
        self.active = False
        self.inherited = inherited
        self._scope = scope
        self.had_own = name in vars(owner)
        self.previous = vars(owner).get(name)
        self._owner = weakref.ref(owner)
        self._replacement = replacement
        self._call = _Standing(self, getattr(owner, name))

    def put_up(self) -> None:
        """Stand in front of the method from now on."""
        self.active = True
        owner = self.owner
        if type(vars(owner)) is dict and not isinstance(owner, torch.nn.Module):
            object.__setattr__(owner, "__dict__", _Attributes(vars(owner)))
        # Through __dict__: torch.nn.Module.__setattr__ is for parameters and modules, and some classes forbid
        # assignment.
        vars(owner)[self.name] = self._call

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call of the shadowed method does."""
        target = self.below()
        if self.active and (self._scope is None or within(self._scope)):
            return self._replacement(target, *args, **kwargs)
        return target(*args, **kwargs)

    @property
    def parts(self) -> tuple[Callable[..., Any], Any]:
        """The replacement, and what the instance had of its own, ``NOTHING`` if nothing."""
        return self._replacement, self.previous if self.had_own else NOTHING

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

    def below(self) -> Callable[..., Any]:
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
        if type(vars(owner)) is _Attributes and not any(shadow_of(value) for value in list(vars(owner).values())):
            object.__setattr__(owner, "__dict__", dict(vars(owner)))


def _inherited(
    shadow: Shadow, replacement: Callable[..., Any], previous: Any, owner: object, *args: Any, **kwargs: Any
) -> Any:
    """What a call of the shadowed method does on a replica of its owner."""
    target = shadow.method_of(owner) if previous is NOTHING else previous
    return replacement(target, *args, **kwargs) if shadow.active else target(*args, **kwargs)


def shadow_of(function: object) -> Shadow | None:
    """The ``Shadow`` behind an instance attribute, or ``None`` when it is something else."""
    return getattr(function, "__lvlm_probe_shadow__", None)


def replaced(owner: object, name: str) -> bool:
    """Whether an instance has a method of its own that is no shadow, as a module whose weights accelerate brings when
    they are needed has a ``forward``."""
    found = vars(owner).get(name)
    return found is not None and shadow_of(found) is None


class _Hanging:
    """A hook as it is registered. In a deep copy or a pickle of its module it is a hook that does nothing.

    Args:
        hook: called with all of ``arguments``. torch registers and removes a hook in two steps, between which other
            threads call it without keyword arguments: then it is not there yet, or no more.
        mark: whose it is.
        scope: where it acts; ``None`` is everywhere.
    """

    __slots__ = ("_arguments", "_hook", "_scope", "mark")

    def __init__(self, hook: Callable[..., Any], arguments: int, mark: object, scope: object) -> None:
        self._hook, self._arguments, self._scope = hook, arguments, scope
        self.mark = mark

    def __call__(self, *args: Any) -> Any:
        if len(args) != self._arguments or (self._scope is not None and not within(self._scope)):
            return None
        return self._hook(*args)

    def __beneath_lvlm_probe__(self) -> Any:
        return NOTHING

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # Takes any arguments, returns None, and is found by pickle where this package is not installed.
        return contextlib.nullcontext().__exit__

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")


class HookSet:
    """Our hooks on one model: installed together, fenced, removed together.

    Args:
        on_error: called once per failing hook with the hook's name and the exception.
        scope: the owner of the calls (``Call``) that these hooks and shadows act in; by default they act whoever calls.
    """

    def __init__(self, on_error: OnError | None = None, *, scope: object = None) -> None:
        self._on_error = on_error
        self._scope = scope
        self._mark = object()
        self._modules: list[torch.nn.Module] = []
        self._shadows: list[Shadow] = []

    def forward_pre(self, module: torch.nn.Module, hook: Callable[..., Any], *, name: str, fenced: bool = True) -> None:
        """Register ``hook(module, args, kwargs)`` before ``module``'s forward; see ``torch.nn.Module`` for its
        result.
        """
        call = self._fence(hook, name) if fenced else hook
        with _LOCK:
            self._modules.append(module)
            hanging: Any = _Hanging(call, 3, self._mark, self._scope)
            module.register_forward_pre_hook(hanging, with_kwargs=True)

    def forward(self, module: torch.nn.Module, hook: Callable[..., Any], *, name: str, fenced: bool = True) -> None:
        """Register ``hook(module, args, kwargs, output)`` after ``module``'s forward."""
        call = self._fence(hook, name) if fenced else hook
        with _LOCK:
            self._modules.append(module)
            module.register_forward_hook(_Hanging(call, 4, self._mark, self._scope), with_kwargs=True)

    def shadow(self, owner: object, name: str, replacement: Callable[..., Any], *, inherited: bool = False) -> Shadow:
        """Put ``replacement(original, *args, **kwargs)`` in front of the method ``name`` of this one instance; where
        ``inherited``, of its replicas too, whose method ``original`` is there."""
        with _LOCK:
            shadow = Shadow(owner, name, replacement, self._scope, inherited)
            self._shadows.append(shadow)
            shadow.put_up()
        return shadow

    def remove(self) -> None:
        """Remove every hook and shadow of this set; calling it again does nothing."""
        with _LOCK:
            while self._modules:  # by mark, not by handle: an interrupt may have come before there was one
                module = self._modules[-1]
                for hooks, flags in (
                    (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
                    (module._forward_hooks, module._forward_hooks_with_kwargs),
                ):
                    for key, hook in hooks.copy().items():
                        if type(hook) is _Hanging and hook.mark is self._mark:
                            hooks.pop(key, None)
                            flags.pop(key, None)
                self._modules.pop()
            while self._shadows:
                self._shadows[-1].remove()
                self._shadows.pop()

    def __len__(self) -> int:
        return len(self._modules) + len(self._shadows)

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


def first_tensor(output: Any) -> torch.Tensor:
    """What a module's output is about: itself, or the first tensor in it."""
    if isinstance(output, torch.Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output
    for value in values:
        if isinstance(value, torch.Tensor):
            return value
    raise TypeError(f"{type(output).__name__} holds no tensor")
