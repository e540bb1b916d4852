"""Data sets of questions about images, by name: what a reader yields, and where readers are registered.

A reader is a function ``(source, **options) -> iterator of Sample`` that reads lazily and names what is missing::

    for sample in open_dataset("mmvp", "data/MMVP"):
        sample.question, sample.image, sample.answer

``lvlm-probe study datasets`` lists them with the layout that each expects.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lvlm_probe.errors import ProbeError, StudyError
from lvlm_probe.plugins import check_registration
from lvlm_probe.study.keys import Key, WrongValue, arguments, checked, nearest

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Sample:
    """One question about one image, or one video.

    Attributes:
        id: Name of it within its data set, stable.
        question: As it is asked.
        load: Opens the image, RGB; called when it is needed, and raises ``StudyError`` when it cannot be opened.
        answer: The true answer, several (VQA), or ``None`` where the data set has none.
        choices: Texts of the choices, without their letters; empty for open questions.
        group: Category of the question.
        annotations: What else is known: ``region`` (bool mask ``(row, col)``, or boxes in pixels) that decides the
            answer, ``human`` (human attention maps ``(row, col)``), ``set`` and ``role`` of samples that belong
            together.
        video: Finds the file of the video, where the question is about one; ``load`` then opens its first frame.
    """

    id: str
    question: str
    load: Callable[[], Image.Image] = field(repr=False)
    answer: str | tuple[str, ...] | None = None
    choices: tuple[str, ...] = ()
    group: str | None = None
    annotations: Mapping[str, Any] = field(default_factory=dict, repr=False)
    video: Callable[[], Path] | None = field(default=None, repr=False)

    @property
    def shown(self) -> Image.Image | Path:
        """What the model is shown: the image, or the file of the video. Raises ``StudyError`` without it."""
        return self.load() if self.video is None else self.video()

    @property
    def image(self) -> Image.Image:
        """The image. Raises ``StudyError`` when it cannot be opened."""
        return self.load()


class Reader(Protocol):
    """A registered reader; options are keyword-only."""

    def __call__(self, source: str, /, *, split: str | None = None, **options: Any) -> Iterator[Sample]: ...


@dataclass(frozen=True)
class _Entry:
    read: Reader
    layout: str
    relax: Callable[[Sample], Sample]


_Function = TypeVar("_Function", bound=Callable[..., Iterator[Sample]])
_READERS: dict[str, _Entry] = {}


def register_dataset(
    name: str, *, layout: str, relax: Callable[[Sample], Sample] = lambda sample: sample
) -> Callable[[_Function], _Function]:
    """Register a reader.

    Args:
        name: What ``open_dataset`` is given.
        layout: One sentence on the files that it expects.
        relax: Makes an open-ended question of a sample (paper, §4.3); a pure function.

    Raises:
        StudyError: the name is taken, or what is registered is no function under a name.
    """

    def decorate(function: _Function) -> _Function:
        check_registration("a data set", name, function, StudyError)
        check_registration("the relax of data set", name, relax, StudyError)
        known = _READERS.get(name)
        if known is not None and getattr(known.read, "__qualname__", "") != getattr(function, "__qualname__", ""):
            raise StudyError(f"there is a data set {name!r} already; register yours under another name")
        _READERS[name] = _Entry(function, str(layout), relax)  # type: ignore[arg-type]
        return function

    return decorate


def readers() -> dict[str, str]:
    """Name → layout of every reader, those of plugins included."""
    _load()
    return {name: entry.layout for name, entry in sorted(_READERS.items())}


def reader_named(name: str) -> _Entry:
    """The entry of a reader. Raises ``StudyError`` that names the closest."""
    _load()
    try:
        return _READERS[name]
    except KeyError:
        raise StudyError(f"there is no data set {name!r}; {nearest(name, sorted(_READERS))}") from None


def options_of(name: str) -> dict[str, tuple[Any, Key, Any]]:
    """Option → type, meaning and default of one reader."""
    return arguments(reader_named(name).read)


def checked_option(reader: str, name: str, value: Any) -> Any:
    """The value of an option, as its reader takes it.

    Raises:
        WrongValue: the reader has no such option, or it is of another kind.
    """
    known = options_of(reader)
    if name not in known:
        parameters = inspect.signature(reader_named(reader).read).parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return value
        said = nearest(name, known, "it knows") if known else "it has none"
        raise WrongValue(f"data set {reader} has no option {name!r}; {said}")
    try:
        return checked(known[name][0], value)
    except WrongValue as error:
        raise WrongValue(f"{name} {error}", inside=error.inside) from None


def open_dataset(
    name: str, source: str, *, split: str | None = None, open_ended: bool = False, **options: Any
) -> Iterator[Sample]:
    """The samples of a data set, lazily, in its own order.

    Args:
        name: Of the reader.
        source: Directory, file or hub id.
        split: Where the data set has several.
        open_ended: Strip choices and instructions from the questions (paper, §4.3).
        options: Of the reader.

    Raises:
        StudyError: no such reader or option, or something is missing: the message names the file, column or image.
    """
    entry = reader_named(name)
    try:
        given = {option: checked_option(name, option, value) for option, value in options.items()}
        found = entry.read(str(source), split=split, **given)
    except (TypeError, WrongValue) as error:
        raise StudyError(str(error) if isinstance(error, WrongValue) else f"data set {name}: {error}") from error
    return _guarded(name, found, entry.relax if open_ended else None)


def _guarded(name: str, found: Iterator[Sample], relax: Callable[[Sample], Sample] | None) -> Iterator[Sample]:
    """The samples of a reader; what it did not expect in an option or a file ends in a sentence too."""
    try:
        for sample in found:
            yield sample if relax is None else relax(sample)
    except ProbeError:
        raise
    except Exception as error:
        raise StudyError(f"data set {name} cannot be read: {type(error).__name__}: {error}") from error


def replaced(sample: Sample, question: str, choices: Sequence[str] = ()) -> Sample:
    """The sample with another question; its choices are kept for judging the answer."""
    return dataclasses.replace(sample, question=question, choices=tuple(choices) or sample.choices)


def _load() -> None:
    from lvlm_probe.plugins import load_plugins

    package = importlib.import_module(__name__.rpartition(".")[0])
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):  # a reader registers itself
        importlib.import_module(module.name)
    load_plugins()
