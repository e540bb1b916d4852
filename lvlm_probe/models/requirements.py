"""The optional libraries that a model or its processor asks for, and how to get them.

transformers declares what a class needs and raises when it is not there, but by errors of several kinds: a video
processor's ``ImportError``, a ``ValueError`` from the choice of an image processor, and, where a library is installed
and does not import, ``Could not import module 'LlamaConfig'`` with the reason hidden in the chain. ``missing_library``
reads them all.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from types import TracebackType

from lvlm_probe.errors import chain_of
from lvlm_probe.escaping import first_line

EXTRAS = ("torchvision", "timm", "num2words")
"""Libraries of processors and towers that are extras of this package, by the library's own name."""


@dataclass(frozen=True)
class Missing:
    """A library without which a model or its processor cannot be had.

    Attributes:
        library: what to install.
        part: what asks for it, a class of transformers; empty where that is not known.
        fault: why an installed library cannot be imported; empty where it is not installed.
    """

    library: str
    part: str = ""
    fault: str = ""

    @property
    def remedy(self) -> str:
        """What to type."""
        if self.fault:
            return f"pip install --upgrade torch {self.library}"
        return f'pip install "lvlm-probe[{self.library}]"' if self.library in EXTRAS else f"pip install {self.library}"

    def __str__(self) -> str:
        if not self.fault:
            return f"{self.part or 'it'} needs {self.library}, which is not installed: {self.remedy}"
        return (
            f"{self.library}{_version(self.library)} is installed and cannot be imported beside "
            f"torch{_version('torch')} ({self.fault}): install releases that belong together ({self.remedy}), or "
            f"remove it (pip uninstall {self.library})"
        )


def missing_library(error: BaseException) -> Missing | None:
    """Find the library that an error of transformers is about, in its whole chain of causes.

    Returns:
        the library, or ``None`` where the error is about something else.
    """
    chain = list(chain_of(error))
    for link in reversed(chain):  # what happened first says most
        if found := _declared(link) or _not_found(link):
            return found
    if any(isinstance(link, ImportError) for link in chain):
        return _broken(chain[-1])
    return None


def _declared(error: BaseException) -> Missing | None:
    """What transformers says is required: by its table of backends, or in a sentence with ``pip install``."""
    if not isinstance(error, ImportError | ValueError):
        return None
    text = str(error)
    backends = getattr(sys.modules.get("transformers.utils.import_utils"), "BACKENDS_MAPPING", {})
    for name, (available, template) in backends.items():
        says = template.partition("{0}")[2].strip().partition("\n")[0]
        if says and (at := text.find(says)) >= 0 and not available():
            part = re.search(r"(\w+)\s*$", text[:at])
            return Missing(_package(template) or name, part[1] if part else "")
    if listed := re.search(r"Missing optional dependencies: ([\w-]+)", text):
        part = re.search(r": (\w*Processor\w*)", text)
        return Missing(listed[1], part[1] if part else "")
    if isinstance(error, ImportError) and (library := _package(text)):
        part = re.search(r"required to run (\w+) processor", text) or re.search(r"^\s*`?(\w+)`? requires", text)
        return Missing(library, part[1] if part else "")
    return None


def _package(text: str) -> str | None:
    named = re.search(r"pip install (?:-U |--upgrade )?[`'\"]?([A-Za-z][\w.-]*\w)", text)
    return named[1] if named else None


def _not_found(error: BaseException) -> Missing | None:
    """A module that is not installed. transformers' own ``Could not import module`` names one that is."""
    library = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return Missing(library) if library and importlib.util.find_spec(library) is None else None


def _broken(error: BaseException) -> Missing | None:
    """The installed library whose import failed: of the modules in the traceback the first that is a third party's."""
    own = {"transformers", "lvlm_probe", "importlib", "torch", *sys.stdlib_module_names}
    for name in _modules(error.__traceback__):
        if name not in own and not name.startswith("_"):
            return Missing(name, fault=first_line(error))
    return None


def _modules(traceback: TracebackType | None) -> Iterator[str]:
    importing = False
    while traceback is not None:
        name = str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        importing = importing or name == "transformers"
        if importing:  # what called transformers is the user's
            yield name
        traceback = traceback.tb_next


def _version(library: str) -> str:
    try:
        return f" {metadata.version(library)}"
    except metadata.PackageNotFoundError:
        return ""
