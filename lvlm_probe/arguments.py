"""Arguments of public verbs: what an annotation asks for, told where something else was given.

A verb need not look at what it is given before it works with it. Where an error of Python's own comes out of one, each
argument is held against its annotation by what such a thing has (a replay has ``log_probs``), and the first that lacks
it is named.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

from lvlm_probe.errors import ExplainError, ProbeError

P = ParamSpec("P")
R = TypeVar("R")

_REPLAY = ("log_probs", "strengthened"), "a replay, probe.replay(trace, model, processor)"
_HEATMAP = ("selection", "provenance"), "a heatmap, probe.explain(replay)"
_KINDS: dict[str, tuple[tuple[str, ...], str]] = {
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
"""What a thing of a kind has, and how it is come by. Only a text is a text."""


def naming_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """A verb from which no error of Python's comes for an argument of another kind than its annotation says.

    Such an argument is named in an ``ExplainError``; a default is of the right kind.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def named(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if not isinstance(error, ProbeError):
                _name_wrong(function.__name__, signature, args, kwargs, error)
            raise

    return named


def _name_wrong(name: str, signature: inspect.Signature, args: Any, kwargs: Any, error: Exception) -> None:
    """Raise ``ExplainError`` from ``error`` where an argument is of another kind."""
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return  # one is missing, which Python says well
    for parameter, value in given.items():
        known = signature.parameters[parameter]
        kinds = str(known.annotation).split(" | ")
        if value is not known.default and not any(_is_of(value, kind) for kind in kinds):
            told = " or ".join(dict.fromkeys(_KINDS[_inner(kind)][1] for kind in kinds if kind != "None"))
            several = "several of them, each " * any("[" in kind for kind in kinds)
            raise ExplainError(f"{name}(): {parameter} is {several}{told}; got a {type(value).__name__}") from error


def _inner(kind: str) -> str:
    """The last name of an annotation: of ``torch.nn.Module`` ``Module``, of ``Sequence[Heatmap]`` ``Heatmap``."""
    return re.findall(r"\w+", kind)[-1]


def _is_of(value: object, kind: str) -> bool:
    """Whether a value has what those of a kind have; ``True`` for kinds that are not known here."""
    if kind == "None":
        return value is None
    if _inner(kind) not in _KINDS or kind.startswith(("dict", "Mapping")):
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
        for name in _KINDS[kind][0]
    )


_NOTHING = object()
