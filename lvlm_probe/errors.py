"""Every error this package raises on purpose.

    ProbeError
     ├── LoadError            a model or its processor cannot be loaded          (also OSError)
     ├── AttachError          the model cannot be attached, or already is
     ├── ImageError           no image, or not the image that was recorded
     ├── MaskError            a mask of the wrong shape, type or range           (also ValueError)
     ├── ProcessorRefused     an image processor that masks cannot get through
     ├── TraceError           a trace file that is damaged, foreign or too new
     ├── ModelMismatch        a trace replayed on another model
     ├── ReplayError          the teacher-forced pass cannot be run
     │    └── OutOfMemory     not even one mask fits
     ├── PointNotFound        no module matches a path
     ├── SelectionError       words or spans that the answer does not contain    (also ValueError)
     ├── ExplainError         an explainer that cannot run here
     ├── ReportError          a report that cannot be written
     ├── StudyError           a study or a data set that cannot be read
     └── PluginError          a plugin that does not load or clashes

    ProbeWarning              the one warning category                          (UserWarning)

A message says what happened, where, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = [
    "AttachError",
    "ExplainError",
    "ImageError",
    "LoadError",
    "MaskError",
    "ModelMismatch",
    "OutOfMemory",
    "PluginError",
    "PointNotFound",
    "ProbeError",
    "ProbeWarning",
    "ProcessorRefused",
    "ReplayError",
    "ReportError",
    "SelectionError",
    "StudyError",
    "TraceError",
]


class ProbeError(Exception):
    """Base class: ``except ProbeError`` catches everything this package raises on purpose."""


class LoadError(ProbeError, OSError):
    """A model or its processor cannot be loaded: there is none, or a library that it needs is missing or broken."""


class AttachError(ProbeError):
    """The model cannot be attached: no ``generate``, no decoder, or a probe is attached already."""


class ImageError(ProbeError):
    """There is no image where one is needed, or it is not the image that was recorded."""


class MaskError(ProbeError, ValueError):
    """A mask has the wrong shape, dtype or range."""


class ProcessorRefused(ProbeError):
    """Masks cannot be carried through this image processor; the message names it and the reason."""


class TraceError(ProbeError):
    """A trace file is missing, damaged, foreign, incomplete or written by a newer format."""


class ModelMismatch(ProbeError):
    """A trace is replayed on a model (or processor) other than the one that was recorded."""


class ReplayError(ProbeError):
    """The teacher-forced pass over a recorded answer cannot be run."""


class OutOfMemory(ReplayError):
    """Not even one mask fits into memory, or not even the whole image; the message says what to reduce."""


class PointNotFound(ProbeError):
    """No module of the model matches a path; the message names the closest ones."""


class SelectionError(ProbeError, ValueError):
    """The words or span to explain are not in the answer."""


class ExplainError(ProbeError):
    """An explanation cannot be computed: unknown method, bad parameters."""


class ReportError(ProbeError):
    """A report cannot be written."""


class StudyError(ProbeError):
    """A study or a data set cannot be read; the message names the file and the line, column or image."""


class PluginError(ProbeError):
    """A plugin does not load, or clashes with another one."""


class ProbeWarning(UserWarning):
    """Something was not recorded or not as good as it could be; the user's own run goes on untouched."""


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from, the first cause last."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
