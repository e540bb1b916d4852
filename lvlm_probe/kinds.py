"""Kinds of arguments: what a whole number is, whether a value is what an annotation names, and the error where not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin

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
