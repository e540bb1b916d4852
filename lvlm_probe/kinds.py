"""Kinds of arguments: what a whole number is, whether a value is what an annotation names, and the error where not.

Neither methods nor verbs look at what they are given before they work with it. Where an error of Python's own comes out
of one, its arguments are held against the annotations, and the first that is of another kind is named: parameters of
methods by their types (``told_by_kind``), arguments of public verbs by what such a thing has (``naming_arguments``).
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, ParamSpec, TypeGuard, TypeVar, Union, get_args, get_origin

from lvlm_probe.errors import ExplainError, ProbeError


def is_whole(number: object) -> TypeGuard[Integral]:
    """Whether it is a whole number, of any library."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def indices_of(given: Iterable[Any], count: int) -> list[int] | None:
    """Indices below ``count``, each once and ascending; ``None`` where there are none, or one is no such index."""
    found = sorted({operator.index(one) if hasattr(one, "__index__") else -1 for one in given})
    return found if found and found[0] >= 0 and found[-1] < count else None


def plain_number(value: Any) -> Any:
    """Return a number of an array library as Python's own, and anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


@contextmanager
def told_by_kind(name: str, function: Callable[..., object], params: Mapping[str, Any]) -> Iterator[None]:
    """Inside, an error of Python's that a parameter of the wrong kind makes is one that names the parameter.

    A method says in words of its own what is out of range; that a text or a list stands for a number, it need not look
    for.

    Raises:
        ExplainError: a parameter is not of the kind that the method's annotation names.
    """
    try:
        yield
    except (TypeError, AttributeError, ValueError, IndexError) as error:
        kinds = {} if isinstance(error, ProbeError) else _kinds_of(function)
        for parameter in params.keys() & kinds.keys():
            if not _is_of(params[parameter], kinds[parameter]):
                raise wrong_kind(name, parameter, kinds[parameter], params[parameter]) from error
        raise


def wrong_kind(name: str, parameter: str, kind: Any, value: object) -> ExplainError:
    """The error of a method's parameter that is not of the kind its annotation names."""
    return ExplainError(f"{name}: {parameter} is {_said(kind)}; got {parameter}={value!r:.200}")


def _kinds_of(function: Callable[..., object]) -> dict[str, Any]:
    """The annotations of a method's parameters by name; none where they cannot be read."""
    try:
        signature = inspect.signature(function, eval_str=True).parameters.values()
    except Exception:  # names that are known to type checkers alone, of a plugin
        return {}
    return {one.name: one.annotation for one in signature if one.annotation is not inspect.Parameter.empty}


_TOLD = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "None"}


def _is_of(value: object, kind: Any) -> bool:
    """Whether a value is of the kind that an annotation names; what is neither number, text nor list is not judged."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Any, object) or not (inner or origin is None or isinstance(origin, type)):
        return True
    if origin in (Union, UnionType):
        return any(_is_of(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) for each in inner)
    if origin in (None, type(None)):
        return value is None
    if origin is int:
        return is_whole(value)
    if origin is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    if origin in (bool, str) or origin is Mapping:
        return isinstance(value, origin)
    if origin in (tuple, list, Sequence):
        of = [each for each in inner if each is not Ellipsis]
        return isinstance(value, list | tuple) and all(any(_is_of(one, each) for each in of or [Any]) for one in value)
    return not isinstance(value, bool | Real | str | Mapping | list | tuple | None)


def _said(kind: Any) -> str:
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_said, inner)))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin in (tuple, list, Sequence):
        return f"a list, each {_said(inner[0])}" if inner else "a list"
    return _TOLD.get(origin) or f"a {getattr(origin, '__name__', origin)}"


P = ParamSpec("P")
R = TypeVar("R")

_REPLAY = ("log_probs", "strengthened"), "a replay, probe.replay(trace, model, processor)"
_HEATMAP = ("selection", "provenance"), "a heatmap, probe.explain(replay)"
_HAS: dict[str, tuple[tuple[str, ...], str]] = {
    "Replay": _REPLAY,
    "ReplayLike": _REPLAY,
    "Heatmap": _HEATMAP,
    "ClipHeatmap": _HEATMAP,
    "AnyHeatmap": _HEATMAP,
    "HeatGrid": _HEATMAP,
    "Trace": (("token_ids", "layout"), "a recorded answer, probe.open_trace(path)"),
    "TokenSelection": (("indices",), "tokens, probe.select_tokens(trace, …)"),
    "Score": (("insertion", "deletion"), "a score, probe.evaluate(heat, replay)"),
    "RunPlan": (("micro_batch",), "a plan, probe.plan(replay)"),
    "AnswerBox": (("region", "fault"), "a box of probe.evidence.answer_boxes(trace)"),
    "Image": (("convert", "size"), "an image, probe.open_image(path)"),
    "OfVideo": (("by_frame",), "a heatmap of a video, probe.video.explain(replay)"),
    "ndarray": (("__len__",), "an array"),
    "Tensor": (("__len__",), "an array"),
    "Region": (("__len__",), "a mask (row, col), or boxes (left, top, right, bottom)"),
    "Boxes": (("__len__",), "boxes (left, top, right, bottom)"),
    "BoxesByFrame": (("items",), "boxes by frame, {0: [(left, top, right, bottom)]}"),
    "Frames": (("__len__",), "numbers of frames, or a mask over them"),
    "Progress": (("__call__",), "a function of how many are done, and of how many"),
    "Callable": (("__call__",), "a function"),
    "Mapping": (("items",), "a dictionary"),
    "dict": (("items",), "a dictionary"),
    "PathLike": (("__fspath__",), "a path"),
    "str": (("casefold",), "a text"),
    "int": (("__index__",), "a whole number"),
    "float": (("__float__",), "a number"),
    "bool": (("__bool__", "__and__"), "True or False"),
}
"""What a thing of a kind has, and how it is come by; a replay has ``log_probs``. Only a text is a text."""

_SEVERAL = frozenset({"Sequence", "Iterable", "Collection", "list", "tuple", "set"})


def naming_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """A verb from which no error of Python's comes for an argument of another kind than its annotation says.

    Such an argument is named in an ``ExplainError``; a default is of the right kind. Of switches, ``bool``, a text or
    ``None`` is told at once, as either would do for one.
    """
    switches = {name for name, kind in function.__annotations__.items() if kind in ("bool", bool)}

    @functools.wraps(function)
    def named(*args: P.args, **kwargs: P.kwargs) -> R:
        for switch in switches & kwargs.keys():
            if (value := kwargs[switch]) is None or isinstance(value, str):
                raise ExplainError(f"{function.__name__}(): {switch} is True or False; got {value!r}")
        try:
            return function(*args, **kwargs)
        except (TypeError, AttributeError, ValueError, LookupError, RuntimeError) as error:
            if not isinstance(error, ProbeError):
                _name_wrong(function, args, kwargs, error)
            raise

    return named


def _name_wrong(function: Callable[..., object], args: Any, kwargs: Any, error: Exception) -> None:
    """Raise ``ExplainError`` from ``error`` where an argument is of another kind, or a seed that is none."""
    name, signature = function.__name__, inspect.signature(function)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return  # one is missing, which Python says well
    for parameter, value in given.items():
        known = signature.parameters[parameter]
        if known.kind in (known.VAR_POSITIONAL, known.VAR_KEYWORD) or value is known.default:
            continue
        kinds = _kinds(known.annotation, function)
        if not any(_has_what(value, kind) for kind in kinds):
            raise ExplainError(f"{name}(): {parameter} is {_told(kinds)}; got a {type(value).__name__}") from error
        if parameter == "seed" and is_whole(value) and int(value) < 0:  # which only some generators take
            raise ExplainError(f"{name}(): seed is a whole number of at least 0; got {value!r}") from error


def _kinds(annotation: object, function: Callable[..., object]) -> list[ast.expr]:
    """The kinds that an annotation joins by ``|``; the name of a ``Literal`` in the function's module is that one."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    names = getattr(inspect.unwrap(function), "__globals__", {})
    found = []
    for kind in _joined(ast.parse(text, mode="eval").body):
        meant = names.get(kind.id) if isinstance(kind, ast.Name) else None
        choices = f"Literal[{', '.join(map(repr, get_args(meant)))}]" if get_origin(meant) is Literal else None
        found.append(kind if choices is None else ast.parse(choices, mode="eval").body)
    return found


def _joined(kind: ast.expr) -> list[ast.expr]:
    return [*_joined(kind.left), *_joined(kind.right)] if isinstance(kind, ast.BinOp) else [kind]


def _split(kind: ast.expr) -> tuple[str, list[ast.expr]]:
    """The last name of an annotation, and what is in its brackets: of ``abc.Sequence[int | str]`` ``Sequence``, and
    ``int`` and ``str``."""
    outer, inside = (kind.value, kind.slice) if isinstance(kind, ast.Subscript) else (kind, ast.Tuple([]))
    parts = inside.elts if isinstance(inside, ast.Tuple) else [inside]
    name = ast.unparse(outer).rpartition(".")[2]
    return name, [one for part in parts for one in _joined(part) if ast.unparse(one) != "..."]


def _told(kinds: Iterable[ast.expr]) -> str:
    """The kinds of an argument as a text."""
    said: list[str] = []
    for kind in kinds:
        name, inside = _split(kind)
        if name == "Literal":
            said += map(ast.unparse, inside)
        elif name in _SEVERAL:
            said.append("several of them" + f", each {_told(inside)}" * bool(inside))
        elif name != "None":
            said.append(_HAS[name][1] if name in _HAS else f"a {name}")
    return " or ".join(dict.fromkeys(said))


def _has_what(value: object, kind: ast.expr) -> bool:
    """Whether a value has what those of a kind have; ``True`` for kinds that are not known here."""
    name, inside = _split(kind)
    if name == "None":
        return value is None
    if name == "Literal":
        return any(type(value) is type(each) for each in map(ast.literal_eval, inside))  # which one, a verb says itself
    if name in _SEVERAL:
        if not isinstance(value, Iterable) or isinstance(value, str | Mapping):
            return False
        return not inside or all(any(_has_what(one, each) for each in inside) for one in value)
    return name not in _HAS or (value is not None and _fits(value, name))


def _fits(value: object, kind: str) -> bool:
    """Whether there are the attributes of a kind; no property is read for it."""
    if isinstance(value, str) and kind != "str":
        return False
    if isinstance(value, Real) and kind == "bool":
        return isinstance(value, bool)
    dynamic = hasattr(type(value), "__getattr__")
    return all(
        inspect.getattr_static(value, name, _NOTHING) is not _NOTHING or (dynamic and hasattr(value, name))
        for name in _HAS[kind][0]
    )


_NOTHING = object()
