"""What the engine is told under a study's ``engine_options``, checked.

::

    engine: ray
    engine_options:
      address: auto          # or host:port; without it a cluster of this machine alone is started
      workers: 40            # without it: as many as the cluster has room for now
      num_gpus: 1            # of one worker; a mapping where models differ: {default: 1, large: 4}
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lvlm_probe.errors import StudyError

__all__ = ["Need", "Options", "read_options"]


@dataclass(frozen=True)
class Need:
    """What one worker takes of a machine.

    Attributes:
        cpus, gpus: Numbers of them, in Ray's count; a share (0.5) puts several workers on one.
    """

    cpus: float
    gpus: float

    def times_in(self, resources: Mapping[str, float]) -> int:
        """How many such workers a machine with these resources (``CPU``, ``GPU``) has room for."""
        asked = [(resources.get("CPU", 0.0), self.cpus), (resources.get("GPU", 0.0), self.gpus)]
        room = [int(there / wanted + 1e-6) for there, wanted in asked if wanted > 0]
        return min(room, default=0)

    def __str__(self) -> str:
        return f"CPU {self.cpus:g}, GPU {self.gpus:g}"


@dataclass(frozen=True)
class Options:
    """All options, with what they are when left out.

    Attributes:
        address: Of the cluster: ``auto``, ``host:port``, ``local``. ``None``: the one in RAY_ADDRESS or of this
            process, else one that is started on this machine for the run.
        workers: How many at most; those that find no room wait, and begin when a machine joins. ``None``: as many as
            there is room for when the run begins.
        min_workers: Do not begin with fewer.
        num_cpus, num_gpus: Of one worker; a mapping from models, and ``default``, where they differ. ``num_gpus`` is 1
            where the cluster has GPUs, unless said otherwise.
        attempts: How often a unit may lose its worker before it counts as failed.
        shared: ``False``: results are sent back even where the study's directory is seen. ``None``: every worker looks.
        runtime_env: Ray's own (environment variables, packages), for the workers.
    """

    address: str | None = None
    workers: int | None = None
    min_workers: int = 1
    num_cpus: float | Mapping[str, float] = 1
    num_gpus: float | Mapping[str, float] | None = None
    attempts: int = 3
    shared: bool | None = None
    runtime_env: Mapping[str, Any] = field(default_factory=dict)

    def need(self, model: str, *, gpus: bool) -> Need:
        """What a worker that holds a model takes.

        Args:
            gpus: Whether the cluster has any.
        """
        usual = 1 if gpus else 0
        return Need(_of(self.num_cpus, model, 1), usual if self.num_gpus is None else _of(self.num_gpus, model, usual))


def read_options(given: Mapping[str, Any], models: Iterable[str]) -> Options:
    """Options of a mapping.

    Args:
        models: Names that ``num_gpus`` and ``num_cpus`` may hold.

    Raises:
        StudyError: an option is not known, or not what it should be.
    """
    known = [item.name for item in dataclasses.fields(Options)]
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it knows {', '.join(known)}"
            raise StudyError(f"engine_options: the engine ray has no {name!r}; {hint}")
    for name in ("workers", "min_workers", "attempts"):
        value = given.get(name, 1)
        if not (name == "workers" and value is None) and (not _number(value) or value != int(value) or value < 1):
            raise StudyError(f"engine_options: {name} is a whole number from 1 on, not {value!r}")
    if given.get("shared") not in (None, False):
        raise StudyError(
            f"engine_options: shared is false, or left out and found out, not {given['shared']!r}; "
            f"a worker that sees the study's directory writes there itself"
        )
    for name in ("num_cpus", "num_gpus"):
        value = given.get(name)
        entries = value if isinstance(value, Mapping) else {"default": 0 if value is None else value}
        for model, number in entries.items():
            if model not in ("default", *models):
                raise StudyError(f"engine_options: {name} names a model {model!r} that the study does not have")
            if not _number(number) or number < 0:
                raise StudyError(f"engine_options: {name} is a number from 0 on, not {number!r}")
    for name, kind in (("address", str), ("runtime_env", Mapping)):
        if given.get(name) is not None and not isinstance(given[name], kind):
            what = "a text: auto, or host:port" if kind is str else "a mapping, as Ray takes it"
            raise StudyError(f"engine_options: {name} is {what}, not {given[name]!r}")
    options = Options(**given)
    if options.workers is not None and options.min_workers > options.workers:
        raise StudyError(f"engine_options: min_workers is {options.min_workers}, but workers {options.workers}")
    return options


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _of(given: float | Mapping[str, float], model: str, usual: float) -> float:
    return float(given.get(model, given.get("default", usual)) if isinstance(given, Mapping) else given)
