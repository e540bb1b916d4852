"""Keys of a study's file: what each means, what it holds, and whether a value is of that kind.

A key stands once, as an annotation of the field it fills (``spec``) or as an argument of a reader, whose docstring says
what it means. From there come the check of a file with its sentences, ``lvlm-probe study keys``, and the reference.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from lvlm_probe.kinds import is_whole


@dataclass(frozen=True)
class Key:
    """What a key of a file means.

    Attributes:
        says: Its meaning, a sentence.
        example: A value, as YAML.
        default: What holds without it, where its own default does not say.
        least, most, above: Bounds of a number; the last one is not allowed itself.
    """

    says: str
    example: str
    default: str | None = None
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf


class WrongValue(Exception):
    """A value is not of its key's kind; a sentence that goes on after the key's name, and where in the value it is."""

    def __init__(self, sentence: str, *, inside: str | None = None) -> None:
        super().__init__(sentence)
        self.inside = inside


def nearest(name: str, known: Collection[str], otherwise: str = "there are") -> str:
    """A hint at the name that was meant, or at all there are."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"{otherwise} {', '.join(known)}"


def parts(kind: type) -> dict[str, tuple[Any, Key]]:
    """Key → type and meaning of the fields of a dataclass that are keys of a file."""
    found = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        key = next((item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Key)), None)
        if key is not None:
            found[name] = (hint.__origin__, key)
    return found


def arguments(function: Callable[..., Any]) -> dict[str, tuple[Any, Key, Any]]:
    """Name → type, meaning and default of the options of a reader; its docstring has meaning and example.

    ``task: Only this one, e.g. ``task: Depth``.`` under ``Args:`` gives the example after ``e.g.``.
    """
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # names that are there for type checkers only
        hints = {}
    said = _said(inspect.getdoc(function) or "")
    found = {}
    for name, parameter in list(inspect.signature(function).parameters.items())[1:]:
        if name == "split" or parameter.kind is parameter.VAR_KEYWORD:
            continue
        text = said.get(name, "")
        example = re.search(rf"``{name}: (.+?)``", text)
        meaning = re.sub(r",? e\.g\. ``\w+: .+?``", "", text)
        found[name] = (hints.get(name, Any), Key(meaning, example[1] if example else ""), parameter.default)
    return found


def _said(documentation: str) -> dict[str, str]:
    """Argument → its text, of a docstring."""
    block = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)+)", documentation, re.MULTILINE)
    found: dict[str, str] = {}
    for names, text in re.findall(r"^ {4}([\w, ]+): (.*(?:\n {8}.*)*)", block[1] if block else "", re.MULTILINE):
        found |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return found


def checked(hint: Any, value: Any, key: Key | None = None) -> Any:
    """A value as its key holds it.

    Args:
        hint: type of the key.
        value: as the file, or the command line, has it.
        key: with the bounds of a number.

    Raises:
        WrongValue: it is of another kind, or out of bounds.
    """
    wanted, optional = _wanted(hint)
    if value is None and optional:
        return None
    origin = get_origin(wanted)
    if origin is Literal:
        if value not in get_args(wanted):
            raise WrongValue(f"is one of {', '.join(get_args(wanted))}, not {short(value)}")
    elif origin is tuple:
        items = value if isinstance(value, list) else [value]
        if not all(map(is_whole, items)):
            raise WrongValue(f"is a list of whole numbers, not {short(value)}")
        return tuple(items)
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        _check_mapping(wanted, value)
    elif wanted in (bool, int, float, str):
        good = isinstance(value, int | float if wanted is float else wanted)
        if not good or (isinstance(value, bool) and wanted is not bool):
            raise WrongValue(f"is {kind_of(wanted)}, not {short(value)}")
        return _bounded(float(value) if wanted is float else value, key) if wanted in (int, float) else value
    return value


def _check_mapping(hint: Any, value: Any) -> None:
    names, held = get_args(hint)
    known = get_args(names) if get_origin(names) is Literal else ()
    if not isinstance(value, Mapping):
        shown = f"{known[0] if known else 'name'}: value"
        raise WrongValue(f"is a mapping ({shown}), not {short(value)}")
    for name, item in value.items():
        if known and name not in known:
            raise WrongValue(f"has no {name!r}; {nearest(str(name), known, 'it knows')}", inside=str(name))
        try:
            checked(held, item)
        except WrongValue as error:
            raise WrongValue(f"has {name!r}, which {error}", inside=str(name)) from None


def _bounded(value: float, key: Key | None) -> float:
    if key is None or (key.least <= value <= key.most and value > key.above):
        return value
    if value <= key.above:
        raise WrongValue(f"is above {key.above:g}, not {value:g}")
    least, most = f"{key.least:.12g}", f"{key.most:.12g}"
    bound = f"at least {least}" if value < key.least else f"at most {most}"
    if abs(key.least) < math.inf and key.most <= 1:
        bound = f"between {least} and {most}"
    raise WrongValue(f"is {bound}, not {value:g}")


def _wanted(hint: Any) -> tuple[Any, bool]:
    """The type that a hint asks for, and whether it may be none at all."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next(option for option in options if option is not types.NoneType), types.NoneType in options


def kind_of(hint: Any) -> str:
    """What a key holds, in words."""
    wanted, _ = _wanted(hint)
    origin = get_origin(wanted)
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(wanted)))
    if origin is tuple:
        return "a list of whole numbers"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        names = get_args(wanted)[0]
        return "a mapping" + (f" of {', '.join(get_args(names))}" if get_origin(names) is Literal else "")
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a text"}
    return words.get(wanted, "a mapping" if dataclasses.is_dataclass(wanted) else "anything")


def default_text(default: Any) -> str:
    """A default, as YAML."""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return f"[{', '.join(map(str, default))}]"
    return "none" if default is None or default == "" else str(default)


def short(value: Any, width: int = 60) -> str:
    """A value for a sentence, in at most ``width`` characters."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 1] + "…"
