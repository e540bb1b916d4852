"""Pretend accelerators: tensors that say ``cuda:0``, hold real values in main memory, and obey a device's rules.

A CPU build of torch runs a whole model on them, forward and backward, so a suite without a GPU finds what only a GPU
would find:

* an operation on tensors of two devices fails with torch's own sentence (``Expected all tensors to be on the same
  device …``), and so do ``.numpy()`` and a generator of another device;
* every wait of the host for the device is counted, with the line of the package that asked for it: values read out
  (``.item()``, ``bool()``, ``.tolist()``), copies to the host, copies *from* ordinary host memory (torch waits for
  those too), operations whose result's shape depends on values (boolean indices, ``nonzero``, ``unique``);
* copies that do not wait (``non_blocking``) arrive only when their event, or the device, is waited for: until then the
  host sees NaN;
* there is as much memory as one says: live storages are counted, ``mem_get_info`` and the peak are kept, and what does
  not fit raises ``torch.OutOfMemoryError``;
* ``float64=False`` refuses double precision as Apple's devices do, and ``kind="mps"`` is one: there is no CUDA then,
  and no count of memory;
* backward runs in the device's own thread, as on CUDA (one device; with more, in the caller's).

::

    with Card(count=1, memory=2**30) as card:
        model.to("cuda")            # or card.put(model), or put(module, "cuda:1") for parts of it
        ...
        print(card.table())

Only for builds without CUDA.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import weakref
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _device
from torch.utils._pytree import tree_map_only

__all__ = ["Card", "OnDevice", "put"]

_CARD: Card | None = None
_aten = torch.ops.aten
_NAME = "pretended"
"""What torch itself calls the device; everything in Python sees ``_KIND``."""
_KIND = "cuda"

_GENERATORS: set[int] = set()
"""The generators of pretended devices, by what they are in C++: dispatch hands on another object in Python."""

# Operations that may take tensors of another device.
_MOVES = {"copy_", "_to_copy", "_copy_from", "set_"}
_INDEXED = {"index", "index_put_", "index_put", "_unsafe_index", "_index_put_impl_"}
# The host waits for these because a shape, or a Python number, depends on values.
_SHAPED = {
    "nonzero", "unique", "_unique2", "unique_consecutive", "unique_dim", "masked_select", "bincount", "equal",
    "_local_scalar_dense", "item", "is_nonzero", "allclose", "nonzero_static", "argwhere", "repeat_interleave",
    "lu_unpack", "_linalg_check_errors", "histc",
}  # fmt: skip


class OnDevice(Tensor):
    """A tensor that says it is on a pretended device; ``inner`` has its values, on the CPU."""

    inner: Tensor
    on: torch.device

    @staticmethod
    def __new__(cls, inner: Tensor, where: torch.device | None = None, *, requires_grad: bool | None = None) -> Any:
        if where is None:  # as a parameter's class is called, to make another of the kind
            return torch.nn.Parameter(inner.detach(), requires_grad=bool(requires_grad))
        strided = inner.layout == torch.strided
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(),
            strides=inner.stride() if strided else None,
            storage_offset=inner.storage_offset() if strided else None,
            dtype=inner.dtype, device=torch.device(_NAME, where.index or 0),
        )  # fmt: skip
        made.inner, made.on = inner, where
        if _CARD is not None:
            _CARD.account(made)
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.on

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self.on.type == "cuda"

    @property
    def is_mps(self) -> bool:  # type: ignore[override]
        return self.on.type == "mps"

    # An index given as a list is made into a tensor in C++, past every dispatch; on CUDA it is a copy that waits.
    def __getitem__(self, index: Any) -> Any:
        return Tensor.__getitem__(self, self._indices(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, bool | int | float):
            value = torch.tensor(value, dtype=self.dtype)
        Tensor.__setitem__(self, self._indices(index), value)

    def _indices(self, index: Any) -> Any:
        if isinstance(index, list):
            return torch.tensor(index).to(self.on)
        return (
            tuple(self._indices(item) if isinstance(item, list) else item for item in index)
            if isinstance(index, tuple)
            else index
        )

    def get_device(self) -> int:
        return self.on.index or 0

    def untyped_storage(self) -> Any:  # what memory accounting looks at
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            f"can't convert {self.on} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
            "memory first."
        )

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.numpy()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({tuple(self.shape)}, {self.dtype}, {self.on})"

    __str__ = __repr__

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) in memo:
            return memo[id(self)]
        copy = OnDevice(self.inner.clone(), self.on)
        if self.requires_grad:
            copy.requires_grad_(True)
        if getattr(self, "_is_param", False):
            copy._is_param = True
        memo[id(self)] = copy
        return copy


def run(function: Any, args: Any, kwargs: Any) -> Any:
    """One operation, by the rules of the devices its tensors are on."""
    card = _CARD
    name = function.overloadpacket.__name__
    place = kwargs.get("device")
    if place is not None:
        place = _cuda(torch.device(place))
    if name in _MOVES:
        return _move(card, function, name, args, kwargs, place)
    tensors: list[Tensor] = []
    inner_args, inner_kwargs = _opened(args, tensors), _opened(kwargs, tensors)
    mine = [item for item in tensors if isinstance(item, OnDevice)]
    if name in _INDEXED:
        _indexed(card, name, args, tensors)
    else:
        _same_device(tensors, name)
    where = place if place is not None and place.type == _KIND else mine[0].on if mine else None
    generator = kwargs.get("generator")
    if generator is not None and where is not None and generator._cdata not in _GENERATORS:
        raise RuntimeError(f"Expected a '{_KIND}' device type for generator but found '{generator.device.type}'")
    read_out = name in ("_local_scalar_dense", "item", "equal", "is_nonzero")
    if name in _SHAPED and mine:
        _note(card, "value read out" if read_out else "shape from values", name)
        if card is not None:
            card.arrive()
    if place is not None:
        inner_kwargs["device"] = torch.device("cpu") if place.type == _KIND else place
    if inner_kwargs.get("pin_memory"):
        inner_kwargs["pin_memory"] = False
    if name == "histc" and not inner_args[0].is_floating_point():  # which a CPU does not have, and experts count by
        out = function(inner_args[0].float(), *inner_args[1:], **inner_kwargs).to(inner_args[0].dtype)
    else:
        out = function(*inner_args, **inner_kwargs)
    if card is not None and card.operations is not None:
        card.operations[name] += 1
    return out if read_out or where is None else _wrapped(out, {id(item.inner): item for item in mine}, where, name)


def _opened(value: Any, found: list[Tensor]) -> Any:
    """Arguments with the values of pretended tensors in their places; ``found`` is given every tensor in them."""
    if isinstance(value, Tensor):
        found.append(value)
        return value.inner if isinstance(value, OnDevice) else value
    if isinstance(value, list | tuple):
        return value if value and isinstance(value[0], int) else type(value)([_opened(item, found) for item in value])
    if isinstance(value, dict):
        return {key: _opened(item, found) for key, item in value.items()}
    return value


def _indexed(card: Card | None, name: str, args: Any, tensors: list[Tensor]) -> None:
    """What an index may be, and what it costs."""
    target = args[0]
    indices = [index for index in args[1] if isinstance(index, Tensor)]
    if not isinstance(target, OnDevice) and any(isinstance(index, OnDevice) for index in indices):
        raise RuntimeError(
            f"indices should be either on cpu or on the same device as the indexed tensor ({target.device})"
        )
    for index in indices if isinstance(target, OnDevice) else ():
        if index.dtype in (torch.bool, torch.uint8):
            _note(card, "shape from values", name)
        if not isinstance(index, OnDevice):
            _note(card, "host to device", f"{name} by a CPU index")
    _same_device([item for item in tensors if not any(item is index for index in indices)], name)


def _cuda(device: torch.device) -> torch.device:
    return torch.device(_KIND, device.index or 0) if device.type in (_KIND, _NAME) else device


def _wrapped(out: Any, given: dict[int, OnDevice], where: torch.device, name: str) -> Any:
    """Results as tensors of the device; what was changed in place is the tensor that was ``given``."""
    if isinstance(out, list | tuple):
        return type(out)([_wrapped(item, given, where, name) for item in out])
    if not isinstance(out, Tensor) or isinstance(out, OnDevice):
        return out
    outer = given.get(id(out))
    if outer is not None:
        if outer.shape != out.shape:
            raise NotImplementedError(f"{name} changes a shape in place")
        return outer
    if out.dtype == torch.float64 and _CARD is not None:
        _CARD.double(name)
    # Nothing outside sees that values are to be conjugated or negated when they are read.
    return OnDevice(out.resolve_conj().resolve_neg(), where)


def _same_device(tensors: list[Tensor], name: str) -> None:
    places = {item.device for item in tensors if isinstance(item, OnDevice) or item.dim()}
    if len(places) < 2:
        return
    # A number on one device may meet a tensor on another only if it is on the CPU.
    full = {item.device for item in tensors if item.dim()}
    if len(full) > 1 or any(
        isinstance(item, OnDevice) and not item.dim() and item.device not in full for item in tensors
    ):
        if _CARD is not None:
            _CARD.mixed[f"{name} at {place_in_package()}"] += 1
        first, second = sorted(map(str, places), reverse=True)[:2]
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {first} and {second}! "
            f"(in {name})"
        )


def _move(card: Card | None, function: Any, name: str, args: Any, kwargs: Any, place: torch.device | None) -> Any:
    if name in ("copy_", "_copy_from"):
        target, source = args[0], args[1]
        free = bool(kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        there, here = isinstance(target, OnDevice), isinstance(source, OnDevice)
        if here and not there:
            if free and card is not None:
                card.later(target, source)
                return target
            _note(card, "device to host", name)
            if card is not None:
                card.arrive()
        elif there and not here and source.dim() + target.dim() > 0 and not free:
            _note(card, "host to device", name)
        (target.inner if there else target).copy_(source.inner if here else source)
        return target
    if name == "set_":
        raise NotImplementedError("set_ on a pretended device")
    source = args[0]
    here = isinstance(source, OnDevice)
    goal = place if place is not None else (source.on if here else source.device)
    free = bool(kwargs.get("non_blocking"))
    rest = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "non_blocking")}
    values = source.inner if here else source
    made = function(values, *args[1:], **rest)
    if made.data_ptr() == values.data_ptr() and made.layout == torch.strided and made.numel():
        made = made.clone()
    if goal.type == _KIND:
        if not here and not free:
            _note(card, "host to device", "to")
        elif here and source.on != goal:
            _note(card, "device to device", "to")
        if made.dtype == torch.float64 and card is not None:
            card.double("to")
        return OnDevice(made, goal)
    if here:
        _note(card, "device to host", "to")
        if card is not None:
            card.arrive()
    return made


def _note(card: Card | None, kind: str, what: str) -> None:
    if card is not None:
        card.note(kind, what)


_SELF = (os.path.dirname(os.path.abspath(__file__)), os.path.dirname(torch.__file__))


def place_in_package(package: str = "lvlm_probe") -> str:
    """The innermost line of the package on this thread's stack, and what it has called that is not torch's."""
    frame = sys._getframe(1)
    within = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if f"{os.sep}{package}{os.sep}" in file:
            line = f"{file.split(os.sep + package + os.sep, 1)[1]}:{frame.f_lineno}"
            return f"{line} in {within}" if within else line
        if not within and not file.startswith(_SELF) and "pretend.py" not in file:
            within = f"{'/'.join(Path(file).parts[-2:])}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return f"({within or 'autograd'})"


class Card:
    """Pretended CUDA devices, for the block.

    Args:
        count: how many.
        kind: ``"cuda"``, or ``"mps"`` for one of Apple's.
        memory: bytes of each; ``None``: no limit, 80 GB are reported.
        float64: whether there is double precision.
        package: whose lines are named.
        own_thread: backward runs in a thread of the device's, as on CUDA. With several devices it cannot; and torch
            ends the process where memory runs out in there, so tests of that have it in the caller's.
    """

    def __init__(
        self,
        count: int = 1,
        memory: int | None = None,
        *,
        float64: bool = True,
        package: str = "lvlm_probe",
        own_thread: bool = True,
        kind: str = "cuda",
    ) -> None:
        self.kind = kind
        self.count, self.memory, self.float64, self.package = count, memory, float64, package
        self.own_thread = own_thread and count == 1
        self.waits: Counter[tuple[str, str, str]] = Counter()
        self.doubles: Counter[str] = Counter()
        self.mixed: Counter[str] = Counter()
        self.operations: Counter[str] | None = Counter()
        self.live: dict[int, Counter[int]] = {index: Counter() for index in range(count)}
        self.sizes: dict[int, int] = {}
        self.peak = [0] * count
        self._used = [0] * count
        self._dropped: deque[tuple[int, int]] = deque()
        self.synchronized = 0
        self._later: list[tuple[Tensor, Tensor]] = []
        self._lock = threading.RLock()
        self._stack = contextlib.ExitStack()

    @property
    def total(self) -> int:
        """Bytes of each device."""
        return self.memory or 80 * 10**9

    # -- what is counted

    def note(self, kind: str, what: str) -> None:
        self.waits[kind, what, place_in_package(self.package)] += 1

    def double(self, name: str) -> None:
        where = place_in_package(self.package)
        self.doubles[f"{name} at {where}"] += 1
        if not self.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
                f"Please use float32 instead. (in {name} at {where})"
            )

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counter[tuple[str, str, str]]]:
        """The waits of the block alone."""
        before = self.waits.copy()
        found: Counter[tuple[str, str, str]] = Counter()
        yield found
        found.update(self.waits - before)

    def table(self, found: Counter[tuple[str, str, str]] | None = None, most: int = 40) -> str:
        lines = [
            f"{count:6d}  {kind:18s} {what:24s} {where}"
            for (kind, what, where), count in (found or self.waits).most_common(most)
        ]
        return "\n".join(lines)

    # -- memory

    def account(self, tensor: OnDevice) -> None:
        storage = tensor.inner.untyped_storage() if tensor.inner.layout == torch.strided else None
        if storage is None:
            return
        key, size, index = storage._cdata, storage.nbytes(), tensor.on.index or 0
        with self._lock:
            self._settle()
            held = self.live[index]
            if not held[key]:
                if self.memory is not None and self._used[index] + size > self.memory:
                    free = self.memory - self._used[index]
                    del held[key]
                    raise torch.OutOfMemoryError(
                        f"CUDA out of memory. Tried to allocate {size} bytes. GPU {index} has a total capacity of "
                        f"{self.memory} bytes of which {free} bytes is free. (in {place_in_package(self.package)})"
                    )
                self._used[index] += size
                self.sizes[key] = size
                self.peak[index] = max(self.peak[index], self._used[index])
            held[key] += 1
        # A finalizer may run within any line, of any thread: it leaves a note.
        weakref.finalize(tensor, self._dropped.append, (index, key)).atexit = False

    def _settle(self) -> None:
        while self._dropped:
            index, key = self._dropped.popleft()
            held = self.live[index]
            held[key] -= 1
            if held[key] <= 0:
                del held[key]
                size = self.sizes.pop(key, 0)
                self._used[index] -= size

    @property
    def used(self) -> list[int]:
        """Bytes in use, of each device."""
        with self._lock:
            self._settle()
            return list(self._used)

    def let_go(self, index: int = 0) -> None:
        """Wait until the device's thread has let go of what it ran.

        Backward returns as soon as its result is there. The thread that ran it drops what it still holds of it (the
        gradients it handed over, nodes of the graph) when it next gets the interpreter's lock, which on a busy machine
        is any time later. It does so before it takes up other work, so a backward pass over nothing waits for it.
        """
        if self.own_thread:
            with torch.inference_mode(False), torch.enable_grad():
                nothing = torch.zeros(0, device=torch.device(_KIND, index), requires_grad=True)
                torch.autograd.backward([nothing * 1], [torch.zeros_like(nothing)])

    def held(self, index: int = 0) -> int:
        """Bytes in use when the collector has run and the device's thread has let go."""
        gc.collect()
        self.let_go(index)
        return self.used[index]

    def forget_peak(self, index: int) -> None:
        self.peak[index] = self.used[index]

    # -- copies that do not wait

    def later(self, target: Tensor, source: OnDevice) -> None:
        values = source.inner.detach().clone()
        if target.is_floating_point():
            target.fill_(float("nan"))
        else:
            target.zero_()
        self._later.append((target, values))

    def arrive(self) -> None:
        with torch.no_grad():
            for target, values in self._later:
                target.copy_(values)
        self._later.clear()

    # -- the device itself

    def put(self, module: torch.nn.Module, where: str | torch.device = "cuda:0") -> torch.nn.Module:
        return put(module, where)

    def __enter__(self) -> Card:
        global _CARD, _KIND
        if torch.backends.cuda.is_built():
            raise RuntimeError("this torch has CUDA: use the device itself")
        _register()
        _CARD, _KIND = self, self.kind
        card = self

        class Event:
            def __init__(self, *_a: Any, **_k: Any) -> None: ...
            def record(self, _stream: Any = None) -> None: ...
            def query(self) -> bool:
                return True

            def wait(self, _stream: Any = None) -> None: ...
            def synchronize(self) -> None:
                card.synchronized += 1
                card.arrive()

        class Stream:
            def __init__(self, *_a: Any, **_k: Any) -> None: ...
            def synchronize(self) -> None:
                card.synchronized += 1
                card.arrive()

            def wait_stream(self, _other: Any) -> None: ...
            def record_event(self, event: Any = None) -> Any:
                return event or Event()

        def index_of(device: Any = None) -> int:
            if device is None:
                return 0
            if isinstance(device, int):
                return device
            return torch.device(device).index or 0

        def synchronize(_device: Any = None) -> None:
            card.note("synchronize", "torch.cuda.synchronize")
            card.arrive()
            card.let_go()

        faked = {
            "is_available": lambda: True, "device_count": lambda: card.count, "current_device": lambda: 0,
            "_lazy_init": lambda: None, "get_device_name": lambda device=None: "pretended device",
            "get_device_capability": lambda device=None: (9, 0), "is_bf16_supported": lambda *a, **k: True,
            "mem_get_info": lambda device=None: (card.total - card.used[index_of(device)], card.total),
            "memory_allocated": lambda device=None: card.used[index_of(device)],
            "memory_reserved": lambda device=None: card.used[index_of(device)],
            "max_memory_allocated": lambda device=None: card.peak[index_of(device)],
            "reset_peak_memory_stats": lambda device=None: card.forget_peak(index_of(device)),
            "synchronize": synchronize, "empty_cache": lambda: None, "Event": Event, "Stream": Stream,
            "current_stream": lambda device=None: Stream(),
            "default_stream": lambda device=None: Stream(), "stream": lambda stream: contextlib.nullcontext(),
            "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda state, device=None: None,
        }  # fmt: skip
        if self.kind == "cuda":
            for name, value in faked.items():
                self._stack.enter_context(mock.patch.object(torch.cuda, name, value))
        else:
            self._stack.enter_context(mock.patch.object(torch.backends.mps, "is_available", return_value=True))
            self._stack.enter_context(mock.patch.object(torch, "Event", Event))
        empty = torch.empty

        def unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
            return empty(*args, **kwargs)

        self._stack.enter_context(mock.patch.object(torch, "empty", unpinned))
        self._stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        # Where a device has no index, torch asks the guard, which is not CUDA's here: give it one.
        for owner, name in (
            (torch, "tensor"),
            (torch, "as_tensor"),
            (torch, "asarray"),
            (Tensor, "to"),
            (Tensor, "cuda"),
        ):
            self._stack.enter_context(mock.patch.object(owner, name, _with_index(getattr(owner, name), name)))
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        if not self.own_thread:
            self._stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        return self

    def __exit__(self, *exc: object) -> None:
        global _CARD, _KIND
        self._stack.close()
        _CARD, _KIND = None, "cuda"


_Plain = torch.Generator


class _AnyGenerator(type(_Plain)):
    def __instancecheck__(cls, item: Any) -> bool:
        return isinstance(item, _Plain)


class _Generator(_Plain, metaclass=_AnyGenerator):
    """A generator of any device; those of pretended ones are known by what they are in C++."""

    def __new__(cls, device: Any = "cpu") -> Any:
        made = super().__new__(cls)
        _GENERATORS.discard(made._cdata)  # of one that is gone
        if _cuda(torch.device(device)).type == _KIND:
            _GENERATORS.add(made._cdata)
        return made


def _with_index(function: Any, name: str) -> Any:
    def indexed(item: Any) -> Any:
        if isinstance(item, int) and not isinstance(item, bool):
            return torch.device(_KIND, item)
        if isinstance(item, str) and item == _KIND:
            return torch.device(_KIND, 0)
        return (
            torch.device(_KIND, 0)
            if isinstance(item, torch.device) and item.type == _KIND and item.index is None
            else item
        )

    def called(*args: Any, **kwargs: Any) -> Any:
        if name == "cuda":
            where = indexed(args[1] if len(args) > 1 else kwargs.get("device") or "cuda")
            return args[0].to(torch.device("cuda", where) if isinstance(where, int) else where)
        if name == "to":
            args = (args[0], *(indexed(item) for item in args[1:2]), *args[2:])
            if isinstance(args[0], OnDevice):  # torch compares with its own name of the device
                here = args[0].on
                if len(args) > 1 and (args[1] is None or isinstance(args[1], str | torch.device)):
                    kwargs = {
                        **dict(zip(("device", "dtype", "non_blocking", "copy"), args[1:], strict=False)),
                        **kwargs,
                    }
                    args = args[:1]
                kwargs = {key: value for key, value in kwargs.items() if value is not None}
                if "device" in kwargs and _is(indexed(kwargs["device"]), here):
                    del kwargs["device"]
                if (
                    len(args) == 1
                    and not {"device", "dtype", "memory_format"} & kwargs.keys()
                    and not kwargs.get("copy")
                ):
                    return args[0]
        if "device" in kwargs:
            kwargs = {**kwargs, "device": indexed(kwargs["device"])}
        if name in ("tensor", "as_tensor", "asarray"):  # they make what they read in C++, past every dispatch
            if args and isinstance(args[0], list | tuple):
                args = (
                    tree_map_only(OnDevice, lambda item: item.item() if item.dim() == 0 else item.tolist(), args[0]),
                    *args[1:],
                )
            where = indexed(kwargs.get("device") or _default())
            if where is not None and torch.device(where).type == _KIND:
                grad = kwargs.pop("requires_grad", False)
                kwargs.pop("device", None)
                with torch._C.DisableTorchFunction():  # which would ask for the default device
                    made = function(*args, **kwargs)
                made = made.to(where)
                return made.requires_grad_(True) if grad else made
        return function(*args, **kwargs)

    return called


def _default() -> torch.device | None:
    """The default device, where there is one."""
    modes = torch.overrides._get_current_function_mode_stack()
    return next((mode.device for mode in reversed(modes) if isinstance(mode, _device.DeviceContext)), None)


def _is(item: Any, where: torch.device) -> bool:
    return isinstance(item, str | torch.device) and torch.device(item) == where


def put(module: torch.nn.Module, where: str | torch.device) -> torch.nn.Module:
    """Put a module, or a part of one, on a pretended device."""
    place = torch.device(where)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(
                    parameter.detach().to(place), requires_grad=parameter.requires_grad
                )
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(place)
    return module


_LIBRARY: Any = None
_MADE: list[Any] = []
_MAKERS = ("arange", "linspace", "eye", "randperm", "tril_indices", "triu_indices", "full", "scalar_tensor")


def _maker(function: Any) -> Any:
    return lambda *args, **kwargs: run(function, args, kwargs)


def _register() -> None:
    """A device that torch knows, once per process: its own stub of a backend in Python (PrivateUse1), which gives it a
    place in the dispatcher and a thread of its own in autograd. What is asked to be made on ``cuda`` goes there too."""
    global _LIBRARY
    if _LIBRARY is None:
        from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

        class Module(_DummyBackendModule):
            def get_rng_state(self, device: Any = None) -> Tensor:
                return torch.zeros(16, dtype=torch.uint8)

            def set_rng_state(self, state: Tensor, device: Any = None) -> None: ...

            def get_amp_supported_dtype(self) -> list[torch.dtype]:
                return [torch.bfloat16, torch.float16]

        _setup_privateuseone_for_python_backend(_NAME, Module())
        _LIBRARY = torch.library.Library("_", "IMPL")
        for key in ("CUDA", "MPS", "PrivateUse1"):
            _LIBRARY.fallback(lambda function, *args, **kwargs: run(function, args, kwargs), key)
        # These are made by enlarging an empty tensor, and a tensor here keeps its shape: they are made at once instead.
        _MADE.append(torch.library.Library("aten", "IMPL"))
        for name in _MAKERS:
            packet = getattr(_aten, name)
            for overload in packet.overloads():
                if "out" in overload:
                    continue
                function = getattr(packet, overload)
                full = name if overload == "default" else f"{name}.{overload}"
                for key in ("CUDA", "MPS", "PrivateUse1"):
                    _MADE[0].impl(full, _maker(function), key)


_device._device_constructors()  # is kept, with torch's own functions and not those of a card
_register()  # at once: autograd counts the devices there are when it runs for the first time
