"""Engines, which do the units: this process, or what a plugin brings (``lvlm-probe-ray``: many machines).

An engine is a function with the arguments of ``run_study``; every engine does the same units and leaves the same files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from lvlm_probe.errors import PluginError, StudyError
from lvlm_probe.plugins import check_registration, load_plugins
from lvlm_probe.study.run.runner import Told, run_study

if TYPE_CHECKING:
    from lvlm_probe.study.spec import Study


class Engine(Protocol):
    """The type of what ``register_engine`` takes."""

    def __call__(
        self,
        study: Study,
        *,
        limit: int | None = None,
        shard: tuple[int, int] = (0, 1),
        retry_failed: bool = False,
        tell: Callable[[Told], None] | None = None,
    ) -> Counter[str]: ...


_ENGINES: dict[str, Engine] = {"local": run_study}


def register_engine(name: str, engine: Engine) -> None:
    """Add an engine.

    Raises:
        PluginError: another one has the name, or what is registered is no function under a name.
    """
    check_registration("an engine", name, engine, PluginError)
    known = _ENGINES.setdefault(name, engine)
    if known is not engine:
        raise PluginError(f"there is an engine {name!r} already; uninstall one of the two plugins, or rename yours")


def engines() -> tuple[str, ...]:
    """Names of all engines, those of plugins included."""
    load_plugins()
    return tuple(_ENGINES)


def engine_named(name: str) -> Engine:
    """The engine of a name.

    Raises:
        StudyError: there is none.
    """
    if name not in _ENGINES and name not in engines():
        hint = "; for ray: pip install lvlm-probe-ray (integrations/ray)" if name == "ray" else ""
        raise StudyError(f"there is no engine {name!r}; there are {', '.join(_ENGINES)}{hint}")
    return _ENGINES[name]
