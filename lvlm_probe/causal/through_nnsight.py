"""nnsight behind one door: the only module that imports it, and only when it is called.

Importing nnsight changes the whole process: it patches ``torch.Tensor.backward``, puts an attribute ``save`` on every
object, and on x86-64 Linux overwrites glibc's ``backtrace()``. Wrapping a model puts a ``forward`` of nnsight's on each
of its modules for good, after which ``torch.compile(fullgraph=True)`` fails. And traces of several threads, or one
inside another, break each other. So here:

* ``wrapped`` wraps a model for one block and unwraps it after: every module's ``__dict__`` is as it was before.
* What is wrapped is a replay's replica, never the user's model.
* One lock: several threads take turns, and nested use is refused.
* ``run`` holds the project's only trace. What is done inside are ordinary functions, *workers*, each in a worker of its
  own, so they may ask for their values in any order and need no readable source code.
"""

from __future__ import annotations

import ast
import difflib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from lvlm_probe.attention.cutting import AttentionCut, Layers
from lvlm_probe.errors import ExplainError, PointNotFound

if TYPE_CHECKING:
    from lvlm_probe.replaying import Replay

_Value = TypeVar("_Value")
Inputs = tuple[tuple[Any, ...], dict[str, Any]]

_LOCK = threading.Lock()
_holder: int | None = None  # the thread that holds the lock
_NESTED = (
    "an nnsight trace is running already, and traces cannot be nested: finish that one first, or use hooks "
    '(backend="hooks", replay.capture)'
)


def _load() -> Any:
    try:
        import nnsight
    except ImportError as error:
        raise ExplainError(
            f"this goes through nnsight, which cannot be imported ({error}): pip install 'lvlm-probe[causal]'"
        ) from error
    return nnsight


@contextmanager
def wrapped(model: torch.nn.Module) -> Iterator[dict[int, Any]]:
    """Wrap ``model``, a replica in use, for the block.

    Yields:
        ``id(module)`` → its envoy, for all modules of the model; the model's own is the root.

    Raises:
        ExplainError: nnsight is not installed, or a trace is running in this thread already.
    """
    global _holder
    nnsight = _load()
    if _holder == threading.get_ident():
        raise ExplainError(_NESTED)
    with _LOCK:
        if _is_running(model):
            raise ExplainError(_NESTED)
        before = [(module, _marks(module)) for module in model.modules()]
        try:
            _holder = threading.get_ident()
            yield {id(envoy._module): envoy for envoy in nnsight.NNsight(model).modules()}
        finally:
            _holder = None  # first: what is left on a replica by an interrupt here, its next pass does away with
            for module, marks in before:
                for name in _marks(module):
                    del vars(module)[name]
                vars(module).update(marks)


def _marks(module: torch.nn.Module) -> dict[str, Any]:
    """What nnsight puts on a module, or, before, what stood in its place."""
    return {name: value for name, value in vars(module).items() if name == "forward" or "nnsight" in name}


def _is_running(model: torch.nn.Module) -> bool:
    """Whether a trace is running on this very model; while the lock is ours, one of the user's own."""
    state = vars(model).get("__nnsight__")
    return state is not None and state.active()[0] is not None


def run(root: Any, function: Callable[[], _Value], workers: Mapping[str, Callable[[], None]]) -> _Value:
    """Run ``function``, which calls the wrapped model, while the workers read and edit its values.

    Args:
        root: the model's envoy.
        function: called once, without arguments.
        workers: name for messages → function that asks envoys for values; its results go into containers of its own.

    Raises:
        ExplainError: ``function`` has come to its end and a worker still waits for its value.
    """
    from nnsight.intervention.interleaver import OutOfOrderError

    if not workers:
        return function()
    results: list[_Value] = []
    missed: list[str] = []

    def call() -> None:
        results.append(function())

    def work(name: str, worker: Callable[[], None]) -> None:
        try:
            worker()
        except OutOfOrderError:
            missed.append(name)

    with root.trace(fn=call) as tracer:
        for name, worker in workers.items():
            with tracer.invoke():
                work(name, worker)
    if missed:
        raise ExplainError(f"the pass did not reach {', '.join(missed)}, so there is nothing to see or to change there")
    return results[0]


def cut_through_nnsight(
    replay: Replay, envoys: dict[int, Any], layers: Layers, queries: np.ndarray, keys: np.ndarray
) -> torch.Tensor:
    """log P of the answer's tokens under the same cut made through nnsight, ``(step,)``.

    Args:
        envoys: of ``wrapped`` on the replay's replica.
    """
    cut = AttentionCut(queries, keys, replay.length)

    def worker(module: torch.nn.Module) -> Callable[[], None]:
        return lambda: edit_inputs(envoys[id(module)], lambda args, kwargs: cut(module, args, kwargs))

    with replay.replica.use() as model:
        workers = {layer.module: worker(model.get_submodule(layer.module)) for layer, _ in layers} if cut else {}
        return run(envoys[id(model)], lambda: replay.log_probs(None)[0], workers)


def edit_inputs(envoy: Any, edit: Callable[[tuple[Any, ...], dict[str, Any]], Inputs]) -> None:
    """Inside a worker: replace the arguments of a module's next call."""
    envoy.inputs = edit(*envoy.inputs)


def read_output(holder: Any, operations: Sequence[str], *, path: str) -> Any:
    """Inside a worker: the output of a module, or of an operation in its forward, or of one inside that.

    Args:
        holder: the module's envoy.
        operations: from the outermost call inwards, as ``resolve`` takes them; none for the module itself.
        path: where this is, for messages.
    """
    for operation in operations:
        holder = resolve(holder, operation, path=path)
        path = f"{path}::{operation}"
    return holder.output


def resolve(holder: Any, operation: str, *, path: str) -> Any:
    """The operation of a function by the name its source gives it.

    nnsight numbers operations as they stand in the source (``attention_interface_1``), which changes from one release
    to the next; here a name is looked up among those that are there. A call goes before an assignment of the same name.

    Args:
        holder: a module's envoy, or the operation whose inside is meant.
        operation: ``apply_rotary_pos_emb``, ``nn.functional.softmax``; with ``[1]`` the second one of several.
        path: where this is, for messages.

    Raises:
        PointNotFound: no such operation; the message names the closest ones.
        ExplainError: there is no source code, or there are several and none is chosen.
    """
    from nnsight.intervention.source import SourceNotAvailable

    try:
        source = holder.source
    except SourceNotAvailable as error:
        raise ExplainError(f"{path}: no look inside: {error}") from error
    wanted = re.fullmatch(r"([A-Za-z_][\w.]*)(?:\[(\d+)\])?", operation)
    if wanted is None:
        raise ExplainError(f"{path}::{operation}: an operation is a name like 'nn.functional.softmax', or 'name[1]'")
    name = wanted[1].replace(".", "_")
    nodes = list(source)
    found = [node for node in nodes if _base(node.name) == name]
    found = [node for node in found if node.line in _call_lines(node.text, name)] or found
    if not found:
        names = sorted({_base(node.name) for node in nodes})
        close = difflib.get_close_matches(name, names, n=6, cutoff=0.3) or names
        raise PointNotFound(f"{path} has no operation {wanted[1]!r}; there are, e.g.: {', '.join(close)}")
    number = int(wanted[2] or 0)
    if number >= len(found) or (wanted[2] is None and len(found) > 1):
        lines = [f"{wanted[1]}[{i}] is `{_line(node)}`" for i, node in enumerate(found)]
        raise ExplainError(f"{path}::{operation}: there are {len(found)}, say which one: {'; '.join(lines)}")
    return found[number]


def _base(label: str) -> str:
    """An operation's label without its ordinal."""
    return label.rpartition("_")[0]


def _line(node: Any) -> str:
    lines = node.text.splitlines()
    return lines[node.line - 1].strip() if node.line <= len(lines) else node.name


def _call_lines(text: str, name: str) -> set[int]:
    """Lines of a function's source on which something of this name is called, counted from 1."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return set()
    return {
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and re.sub(r"\W+", "_", ast.unparse(node.func)) == name
    }
