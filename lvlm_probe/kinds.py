"""Kinds of arguments: what a whole number is, whether a value is what an annotation names, and the error where not.

Neither methods nor verbs look at what they are given before they work with it. Where an error of Python's own comes out
of one, its arguments are held against the annotations, and the first that is of another kind is named: parameters of
methods by their types (``told_by_kind``), arguments of public verbs by what such a thing has (``naming_arguments``).
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, ParamSpec, TypeGuard, TypeVar, Union, get_args, get_origin

from lvlm_probe.errors import ExplainError, ProbeError


def is_whole(number: object) -> TypeGuard[Integral]:
    """Whether it is a whole number, of any library."""
    return isinstance(number, Integral) and not isinstance(number, bool)


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
    "Score": (("insertion", "deletion"), "a score, probe.evaluate(heat, replay)"),
    "AnswerBox": (("region", "fault"), "a box of probe.evidence.answer_boxes(trace)"),
    "Image": (("convert", "size"), "an image, probe.open_image(path)"),
    "OfVideo": (("by_frame",), "a heatmap of a video, probe.video.explain(replay)"),
    "ndarray": (("__len__",), "an array"),
    "Tensor": (("__len__",), "an array"),
    "Region": (("__len__",), "a mask (row, col), or boxes (left, top, right, bottom)"),
    "Frames": (("__len__",), "numbers of frames, or a mask over them"),
    "str": (("casefold",), "a text"),
}
"""What a thing of a kind has, and how it is come by; a replay has ``log_probs``. Only a text is a text."""


def naming_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """A verb from which no error of Python's comes for an argument of another kind than its annotation says.

    Such an argument is named in an ``ExplainError``; a default is of the right kind.
    """

    @functools.wraps(function)
    def named(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (TypeError, AttributeError, ValueError, LookupError) as error:
            if not isinstance(error, ProbeError):
                _name_wrong(function, args, kwargs, error)
            raise

    return named


def _name_wrong(function: Callable[..., object], args: Any, kwargs: Any, error: Exception) -> None:
    """Raise ``ExplainError`` from ``error`` where an argument is of another kind."""
    name, signature = function.__name__, inspect.signature(function)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return  # one is missing, which Python says well
    for parameter, value in given.items():
        known = signature.parameters[parameter]
        kinds = str(known.annotation).split(" | ")
        if value is not known.default and not any(_has_what(value, kind) for kind in kinds):
            told = " or ".join(dict.fromkeys(_HAS[_inner(kind)][1] for kind in kinds if kind != "None"))
            several = "several of them, each " * any("[" in kind for kind in kinds)
            raise ExplainError(f"{name}(): {parameter} is {several}{told}; got a {type(value).__name__}") from error


def _inner(kind: str) -> str:
    """The last name of an annotation: of ``torch.nn.Module`` ``Module``, of ``Sequence[Heatmap]`` ``Heatmap``."""
    return re.findall(r"\w+", kind)[-1]


def _has_what(value: object, kind: str) -> bool:
    """Whether a value has what those of a kind have; ``True`` for kinds that are not known here."""
    if kind == "None":
        return value is None
    if _inner(kind) not in _HAS or kind.startswith(("dict", "Mapping")):
        return True
    if "[" not in kind:
        return _fits(value, _inner(kind))
    several = isinstance(value, Iterable) and not isinstance(value, str | dict)
    return several and all(_fits(one, _inner(kind)) for one in value)  # type: ignore[attr-defined]


def _fits(value: object, kind: str) -> bool:
    """Whether there are the attributes of a kind; no property is read for it."""
    if isinstance(value, str) and kind != "str":
        return False
    dynamic = hasattr(type(value), "__getattr__")
    return all(
        inspect.getattr_static(value, name, _NOTHING) is not _NOTHING or (dynamic and hasattr(value, name))
        for name in _HAS[kind][0]
    )


_NOTHING = object()
