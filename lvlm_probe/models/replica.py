"""Replica of a user's model: passes of ours run on it, and nobody who runs the model sees them.

A module is shared state. Hooks, instance attributes, ``training``, ``requires_grad`` and what ``generate()`` leaves
behind for its next call are seen by every thread that runs it. So none of them is touched: a ``Replica`` has a module
object of its own for each of the model's, with dictionaries of its own and the same tensors in them, and whatever a
pass of ours hangs up, it hangs up there. What differs from the model:

* evaluation mode; parameters are aliases that require no gradient, so that autograd keeps nothing only they would need;
* 4-bit layers of bitsandbytes can be differentiated where their own kernel cannot;
* no generation state (``rope_deltas``), nothing compiled, and none of our own hooks and shadows;
* bound methods, partial and decorated functions, plain containers and callable objects that hold modules hold those of
  the replica, and accelerate's hooks have state of their own.

Everything else (configs, the user's hooks and objects) is shared by reference. Modules that cannot be copied by their
``__dict__`` (ScriptModules, ``__slots__``, a ``__deepcopy__`` of their own) are shared whole, and what an object of
the user's calls by itself is the user's module: the numbers are the same, hooks of ours do not see it.

The replica follows the model. Before a pass its attributes are compared with those it was made from, object by object;
what has changed (an adapter switched, a hook added, a layer replaced) is made anew, and weights are looked up again.
Changes after which passes may give something else are counted: whoever keeps results lets go of them then.
"""

from __future__ import annotations

import copy
import functools
import operator
import os
import sys
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lvlm_probe.errors import ReplayError
from lvlm_probe.hooks import NOTHING, beneath
from lvlm_probe.models.fingerprint import fingerprint
from lvlm_probe.models.quantised import differentiable
from lvlm_probe.models.wrappers import is_compiled
from lvlm_probe.process import lock

# State that generate() leaves on a module for its own next call (M-RoPE offsets).
_GENERATION_STATE = ("rope_deltas",)

_BARE_MODULE = vars(nn.Module())
_INTERNAL = tuple(name for name, value in _BARE_MODULE.items() if isinstance(value, dict | set))
_COMPARED = tuple(name for name in _INTERNAL if isinstance(_BARE_MODULE[name], dict) and name != "_parameters")
"""Dictionaries of every module whose entries are compared too; those of parameters are read again for each pass."""

_LOOK_SECONDS = 0.5
"""How often who waits for a turn looks whether it is waited for."""
_ENDLESS = (threading.Thread.join.__code__, Future.result.__code__)
"""Where a thread waits for another one."""

_PLAIN = frozenset({str, int, float, bool, bytes, type(None), torch.Tensor, torch.dtype, torch.device, torch.Size})
_CONTAINERS = frozenset({list, tuple, dict, set, frozenset, deque, OrderedDict})


class _Copier:
    """Copies of the modules that are reachable from one: module → its copy, made once.

    Args:
        bare: leave our own hooks and shadows out.
        configs: give the copies configs of their own, which are kept in ``configs``.
    """

    def __init__(self, *, bare: bool, configs: bool = False) -> None:
        self.copies: dict[nn.Module, nn.Module] = {}
        self.configs: dict[int, tuple[Any, Any]] = {}
        self.seen: dict[nn.Module, list[Any]] = {}
        """Module → what its copy was made from, for ``changed``."""
        self.made: dict[nn.Module, list[Any]] = {}
        """Module → what its copy was made of besides weights; nothing of ours is in it."""
        self.reached: dict[nn.Module, dict[nn.Module, None]] = {}
        """Module → the modules that its attributes hold."""
        self._bare, self.own_configs = bare, configs
        self._containers: dict[nn.Module, list[Any]] = {}
        self._waiting: list[nn.Module] = []
        self._reached: dict[nn.Module, None] = {}
        self._held: list[Any] = []
        self._pending: set[int] = set()
        self._hook_state: dict[int, tuple[Any, Any]] = {}

    def copied(self, root: nn.Module) -> nn.Module:
        """The copy of a module, with copies of all that it leads to."""
        found = self._copy(root)
        while self._waiting:
            self._fill(self._waiting.pop())
        return found

    def fill(self, module: nn.Module) -> None:
        """Give the copy of a module all that the module has now."""
        self._fill(module)
        self.copied(module)

    def _copy(self, module: nn.Module) -> nn.Module:
        """The copy of a module, which may still be empty; the module itself where it cannot be copied."""
        known = self.copies.get(module)
        if known is None:
            known = self.copies[module] = object.__new__(type(module)) if _copyable(module) else module
            if known is not module:
                self._waiting.append(module)
        self._reached[module] = None
        return known

    def _fill(self, module: nn.Module) -> None:
        self._reached = self.reached[module] = {}
        self._held = self._containers[module] = []
        # One C call each: another thread may be at work on the module.
        state = vars(module).copy()
        inner = {name: state[name].copy() for name in _INTERNAL if name in state}
        self.seen[module] = [*state, *state.values()]
        for name in _COMPARED:
            if entries := inner.get(name):
                self.seen[module] += [*entries, *entries.values()]
        made = {name: self._renewed(value, name) for name, value in state.items() if name not in inner}
        made = {name: value for name, value in made.items() if value is not NOTHING}
        for name, entries in inner.items():
            if name.endswith("_hooks"):
                hooks = [(key, self._hook(hook)) for key, hook in entries.items()]
                made[name] = type(entries)(pair for pair in hooks if pair[1] is not NOTHING)
            else:
                made[name] = entries
        made["_modules"] = {
            name: None if child is None else self._copy(child) for name, child in inner["_modules"].items()
        }
        made |= {"training": False, "_compiled_call_impl": None}
        made |= dict.fromkeys(name for name in _GENERATION_STATE if name in made)
        if is_compiled(module):
            inside = made["_modules"]["_orig_mod"]
            made |= {name: inside.__call__ for name in ("forward", "_forward") if name in made}
        mine = self.copies[module]
        if (forward := differentiable(mine)) is not None:
            if "_old_forward" in made:  # accelerate's own stands in front
                made["_old_forward"] = forward
            made.setdefault("forward", forward)
        if type(mine) is not type(module):  # parametrizations and sharding swap the class
            mine.__class__ = type(module)
        own = vars(mine)
        own.clear()
        own.update(made)
        self.made[module] = _parts(made)
        for container in self._held:
            self.seen[module] += _items(container)

    def changed(self, module: nn.Module) -> bool:
        """Whether a module has other attributes than those its copy was made from."""
        own, known = vars(module), self.seen[module]
        now = [*own, *own.values()]
        for name in _COMPARED:
            if entries := own.get(name):
                now += [*entries, *entries.values()]
        for container in self._containers[module]:
            now += _items(container)
        return not _same(now, known) or type(module) is not type(self.copies[module])

    def forget_unreachable(self, root: nn.Module) -> None:
        """Let go of modules that the model no longer holds."""
        live: dict[nn.Module, None] = {}
        waiting = [root]
        while waiting:
            module = waiting.pop()
            if module not in live:
                live[module] = None
                waiting += self.reached.get(module, ())
        for module in [module for module in self.copies if module not in live]:
            for table in (self.copies, self.seen, self.made, self.reached, self._containers):
                table.pop(module, None)

    def _renewed(self, value: Any, name: str = "") -> Any:
        """What the copy has in the place of an attribute's value: the same, unless it leads to a module."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if self._bare and (below := beneath(value)) is not value:
            return self._renewed(below, name)
        if isinstance(value, nn.Module):
            return self._copy(value)
        if name == "config" and self.own_configs and hasattr(value, "__dict__"):
            return self.configs.setdefault(id(value), (value, copy.copy(value)))[1]
        if id(value) in self._pending:
            return value
        self._pending.add(id(value))
        try:
            if kind in _CONTAINERS:
                return self._container(value)
            if kind is types.MethodType:
                owner = value.__self__
                mine = self._copy(owner) if isinstance(owner, nn.Module) else owner
                function = self._renewed(value.__func__)
                same = mine is owner and function is value.__func__
                return value if same else types.MethodType(function, mine)
            if kind is functools.partial:
                parts = value.func, value.args, value.keywords
                mine = tuple(self._renewed(part) for part in parts)
                if all(map(operator.is_, mine, parts)):
                    return value
                made: Any = functools.partial(mine[0], *mine[1], **mine[2])
                vars(made).update({key: self._renewed(item) for key, item in vars(value).items()})
                return made
            if kind is types.FunctionType:
                return self._function(value)
            if callable(value) or any(base.__module__ == "accelerate.hooks" for base in kind.__mro__):
                return self._object(value)
            return value
        finally:
            self._pending.discard(id(value))

    def _hook(self, hook: Any) -> Any:
        """A hook of the user's is shared, with all that it keeps; a method of a module becomes that of its copy."""
        if self._bare and beneath(hook) is NOTHING:
            return NOTHING
        return self._renewed(hook) if isinstance(hook, types.MethodType | functools.partial) else hook

    def _container(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, dict):
            old = list(value.copy().items())
            new = [(self._renewed(key), self._renewed(item)) for key, item in old]
            same = all(a is c and b is d for (a, b), (c, d) in zip(old, new, strict=True))
        else:
            old = list(value)
            new = [self._renewed(item) for item in old]
            same = all(map(operator.is_, old, new))
        if same:
            return value
        if kind is not tuple and kind is not frozenset:
            self._held.append(value)
        return deque(new, value.maxlen) if kind is deque else kind(new)

    def _function(self, value: types.FunctionType) -> Any:
        """A function around modules (a decorated ``forward``), around their copies."""
        compiled = vars(value).get("_torchdynamo_orig_callable")
        if compiled is not None:
            return self._renewed(compiled)
        cells, defaults = value.__closure__ or (), value.__defaults__ or ()
        new_cells = tuple(map(self._cell, cells))
        new_defaults = tuple(item if type(item) in _CONTAINERS else self._renewed(item) for item in defaults)
        if all(map(operator.is_, (*cells, *defaults), (*new_cells, *new_defaults))):
            return value
        made = types.FunctionType(
            value.__code__, value.__globals__, value.__name__, new_defaults or None, new_cells or None
        )
        made.__kwdefaults__, made.__qualname__ = value.__kwdefaults__, value.__qualname__
        vars(made).update({key: self._renewed(item) for key, item in vars(value).items()})
        return made

    def _cell(self, cell: Any) -> Any:
        try:
            content = cell.cell_contents
        except ValueError:  # not assigned yet
            return cell
        # What a function keeps in containers of its own is its state, and stays shared.
        mine = content if type(content) in _CONTAINERS else self._renewed(content)
        return cell if mine is content else types.CellType(mine)

    def _object(self, value: Any) -> Any:
        """A callable object around modules, around their copies; and a hook of accelerate's, with state of its own."""
        own = getattr(value, "__dict__", None)
        if isinstance(value, type) or not isinstance(own, dict):
            return value
        hook = any(base.__module__ == "accelerate.hooks" for base in type(value).__mro__)
        old = own.copy()
        new = {
            key: item if type(item) in _CONTAINERS and not hook else self._renewed(item) for key, item in old.items()
        }
        if not hook and all(map(operator.is_, old.values(), new.values())):
            return value
        try:
            made = object.__new__(type(value))
        except TypeError:
            return value
        vars(made).update({key: self._apart(item) for key, item in new.items()} if hook else new)
        return made

    def _apart(self, value: Any) -> Any:
        """State of a hook of accelerate's, which its hooks on one model share: which weights are where just now."""
        if type(value) is set:
            return value.copy()
        if type(value) is not dict:
            return value
        made = {key: item.copy() if type(item) is dict else item for key, item in value.items()}
        return self._hook_state.setdefault(id(value), (value, made))[1]


def _parts(made: dict[str, Any]) -> list[Any]:
    """Attributes of a module besides its weights; of containers, which may be made anew each time, what is in them."""
    found: list[Any] = []
    for name, value in made.items():
        if name not in ("_parameters", "_buffers") and not name.endswith(("_with_kwargs", "_always_called")):
            found += [name, *(_items(value) if type(value) in _CONTAINERS else (value,))]
    return found


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _state_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What changes when another tensor stands there, or its values are written to."""
    if tensor.device.type == "meta":  # kept elsewhere between passes
        return ()
    try:
        place = tensor.data_ptr()
    except Exception:  # a subclass, whose values lie in other tensors
        place = 0
    return id(tensor), None if tensor.is_inference() else tensor._version, place, tensor.dtype, tensor.device


def _items(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def _copyable(module: nn.Module) -> bool:
    kind = type(module)
    return not (
        isinstance(module, torch.jit.ScriptModule)
        or any(_copies_itself(base) or vars(base).get("__slots__") for base in kind.__mro__)
    )


def _copies_itself(kind: type) -> bool:
    own = vars(kind).get("__deepcopy__")
    # That of parametrized modules copies the __dict__.
    return own is not None and getattr(own, "__module__", "") != "torch.nn.utils.parametrize"


def duplicated(model: nn.Module, *, bare: bool = True) -> nn.Module:
    """The model's module tree once more, as it is now: the same tensors in dictionaries of its own.

    Args:
        bare: without hooks and shadows of ours.
    """
    copier = _Copier(bare=bare)
    made = copier.copied(model)
    for module, mine in copier.copies.items():
        if mine is not module:
            vars(mine)["_parameters"] = module._parameters.copy()
    return made


class Replica:
    """A model's module tree once more, for passes of ours; see the module.

    Args:
        model: the user's.
        own_configs: passes change the model's configs, so that the replica has some of its own.

    Attributes:
        changes: how often the model was found to be another one than before, by its weights or what it is made of.
        on_change: called when it is found so, before any pass; raises where there is to be none.
    """

    on_change: Callable[[], None] | None = None

    def __init__(self, model: nn.Module, *, own_configs: bool = False) -> None:
        self._live = model
        self._copier = _Copier(bare=True, configs=own_configs)
        self._lock = lock()
        self._depth, self._holder = 0, 0
        self._instead = threading.local()
        self._copier.copied(model)
        self._return_weights()
        self._state: list[Any] | None = self._state_now()
        self.changes, self._values = 0, ""
        _EVERY.add(self)

    @contextmanager
    def use(self, *, look: bool = False) -> Iterator[nn.Module]:
        """The replica for passes in the block; other threads that want it wait for the end of the block.

        What the user does with the model is seen when the outermost block begins.

        Args:
            look: notice weights, too, that were written to through ``.data``: of these nothing tells but their values,
                which takes a few milliseconds.

        Yields:
            the replica's root, of the same class as the model and with the same paths in it.

        Raises:
            ReplayError: the thread whose block it is waits for this one. And what ``on_change`` raises.
        """
        if (own := getattr(self._instead, "model", None)) is not None:
            yield own
            return
        self._take_turn()
        try:
            depth = self._depth
            try:
                if not depth:
                    self._follow()
                    if look:
                        self.look()
                self._depth, self._holder = depth + 1, threading.get_ident()
                yield self._copier.copies[self._live]
            except Exception:
                raise
            except BaseException:  # Ctrl-C, which may have come while hooks were being taken away
                if not depth:
                    self._make_anew()
                raise
            finally:
                self._depth = depth
                if not depth:
                    self._return_weights()
        finally:
            self._lock.release()

    def _take_turn(self) -> None:
        while not self._lock.acquire(timeout=_LOOK_SECONDS):
            if _waits_for_us(self._holder):
                raise ReplayError(
                    "this thread was to use a replay inside a block of another thread's (capture() or explain() on the "
                    "same model), which waits for this thread before the block ends: neither could go on. Wait for the "
                    "thread behind the block, or give it a replay of its own"
                )

    @contextmanager
    def instead(self, model: nn.Module) -> Iterator[None]:
        """Passes of this thread run on ``model`` in the block, a duplicate of what ``use`` gave before, and wait for
        nobody. For passes in backward: a thread of autograd's serves everybody and must not wait.
        """
        before = getattr(self._instead, "model", None)
        self._instead.model = model
        try:
            yield
        finally:
            self._instead.model = before

    def _follow(self) -> None:
        copier = self._copier
        swapped = [module for module, mine in copier.copies.items() if type(mine) is not type(module)]
        if not all(map(_copyable, swapped)):  # one that was copied is to be shared now
            copier = self._copier = _Copier(bare=True, configs=copier.own_configs)
            copier.copied(self._live)
        changed = [module for module, mine in copier.copies.items() if mine is not module and copier.changed(module)]
        before = [copier.made[module] for module in changed]
        for module in changed:
            copier.fill(module)
        same = all(_same(parts, copier.made[module]) for parts, module in zip(before, changed, strict=True))
        if changed:
            copier.forget_unreachable(self._live)
        self._note(self._state_now(), others=bool(swapped) or not same)
        for config, mine in copier.configs.values():
            vars(mine).clear()
            vars(mine).update(vars(config))
        aliases: dict[int, Any] = {}
        for module, mine in copier.copies.items():
            own = vars(mine)
            for name in _GENERATION_STATE:
                if name in own:
                    own[name] = None
            if mine is not module and (weights := module._parameters):
                own["_parameters"] = {name: _alias(weight, aliases) for name, weight in weights.copy().items()}

    def look(self, values: str = "") -> None:
        """Compare values of the weights, or their fingerprint ``values``, with those of the last time."""
        values = values or fingerprint(self._live)
        self._note(self._state, others=self._values not in ("", values))
        self._values = values

    def _note(self, state: list[Any] | None, *, others: bool) -> None:
        """Count a change of the state, or of ``others``. One that ``on_change`` refuses is found again next time."""
        if not others and state == self._state:
            return
        self._state, self._values = None, ""
        if self.on_change is not None:
            self.on_change()
        self._state = state
        self.changes += 1

    def _state_now(self) -> list[Any]:
        """What tells the weights from others and from what they were, and by which attention layers compute."""
        found: list[Any] = []
        for module in self._copier.copies:
            fleeting = module._non_persistent_buffers_set  # recomputed by the model itself, as by rotary embeddings
            kept = [tensor for name, tensor in module._buffers.copy().items() if name not in fleeting]
            kept += module._parameters.copy().values()
            found += [_state_of(tensor) for tensor in kept if tensor is not None]
            if "config" in vars(module):
                found.append(getattr(module.config, "_attn_implementation", None))
        return found

    def _return_weights(self) -> None:
        """Between passes the replica keeps no weights alive that the model has let go of (``model.to(...)``)."""
        for module, mine in self._copier.copies.items():
            if mine is not module:
                vars(mine)["_parameters"] = module._parameters

    def _make_anew(self) -> None:
        """Fill all copies again before the next pass, so that nothing hangs on them whose removal was interrupted."""
        self._copier.seen = {module: [] for module in self._copier.seen}

    def after_fork(self) -> None:
        """In a forked process: what other threads held is held by nobody."""
        self._depth = 0
        self._make_anew()


_EVERY: weakref.WeakSet[Replica] = weakref.WeakSet()


def _after_fork() -> None:
    for replica in list(_EVERY):
        replica.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _waits_for_us(thread: int) -> bool:
    """Whether another thread is in ``join()`` of this one, or waits for the result of what an executor runs in it."""
    ours: list[Any] = [threading.current_thread()]
    for frame in _frames(threading.get_ident()):
        if frame.f_globals.get("__name__") == "concurrent.futures.thread":  # a worker: it runs what has this future
            ours.append(getattr(frame.f_locals.get("self"), "future", None))
    return any(
        frame.f_code in _ENDLESS
        and frame.f_locals.get("timeout") is None
        and any(frame.f_locals.get("self") is one for one in ours)
        for frame in _frames(thread)
    )


def _frames(thread: int) -> Iterator[types.FrameType]:
    frame = sys._current_frames().get(thread)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _alias(weight: Any, known: dict[int, Any]) -> Any:
    """The same storage without ``requires_grad``; one and the same for weights that are tied."""
    if weight is None or not weight.requires_grad:
        return weight
    alias = known.get(id(weight))
    if alias is None:
        try:
            alias = nn.Parameter(weight, requires_grad=False)
        except Exception:  # a subclass of tensors that cannot be detached
            alias = weight
        else:
            vars(alias).update(vars(weight))
        known[id(weight)] = alias
    return alias
