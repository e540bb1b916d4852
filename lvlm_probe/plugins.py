"""Loads plugins: other distributions that add explainers, model families and drivers to this one.

A plugin names itself in the entry-point group ``lvlm_probe.plugins``::

    [project.entry-points."lvlm_probe.plugins"]
    template = "lvlm_probe_template:register"

The value is a callable without arguments that registers what the plugin brings, or a module whose import does so.
Nothing is read at ``import lvlm_probe``. The first look into a registry for what is not built in (a method, a model's
``model_type``) loads every plugin, once per process. A plugin must not be able to break somebody else's run, so one
that fails is skipped with a warning that names it, and of two distributions with the same plugin name the first is kept
and the other named in a warning.

What cannot be contained is said here: a plugin is code of this process. One that never comes back from its import has
to be stopped with Ctrl-C, which then names it; one that ends the process itself (``os._exit``, a crash in C) takes it
along; one that changes other packages has changed them. Uninstall such a one.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType, ModuleType
from typing import Any

from lvlm_probe.errors import PluginError, ProbeError, ProbeWarning
from lvlm_probe.process import lock

GROUP = "lvlm_probe.plugins"
"""The entry-point group that plugins stand in."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plugin:
    """One plugin as this process sees it.

    Attributes:
        name: Name of the entry point.
        target: ``module:attribute`` that it stands for.
        distribution: Name and version of the distribution, ``"lvlm-probe-template 0.1.0"``.
        error: Why the plugin was skipped, as one line; ``None`` when it is loaded.
    """

    name: str
    target: str
    distribution: str
    error: str | None = None

    @property
    def loaded(self) -> bool:
        """Whether what the plugin brings is available."""
        return self.error is None


class _Cache:
    """The plugins of this process. The lock is re-entrant: a plugin may look into a registry while it registers."""

    def __init__(self) -> None:
        self.lock = lock()
        self.plugins: dict[str, Plugin] | None = None

    def clear(self) -> None:
        with self.lock:
            self.plugins = None


_cache = _Cache()


def installed_plugins() -> tuple[metadata.EntryPoint, ...]:
    """The entry points of all installed plugins, one per name, sorted by name. Imports none of them.

    Warns (``ProbeWarning``) when two distributions claim one name; the first in sorted order of the distributions'
    names wins, so that the winner does not depend on the order of ``sys.path``.
    """
    by_name: dict[str, list[metadata.EntryPoint]] = {}
    try:
        points_found = list(metadata.entry_points(group=GROUP))
    except Exception as error:  # of any installed distribution, not of plugins alone
        warnings.warn(
            f"no plugin is loaded: the entry points of an installed distribution cannot be read ({_reason(error)})",
            ProbeWarning,
            stacklevel=2,
        )
        return ()
    for point in points_found:
        # One distribution can be found twice (editable install and its build folder); that is no clash.
        others = by_name.setdefault(point.name, [])
        if all((point.value, _distribution(point)) != (other.value, _distribution(other)) for other in others):
            others.append(point)
    chosen: list[metadata.EntryPoint] = []
    for name, points in sorted(by_name.items()):
        points.sort(key=lambda point: (_distribution(point), point.value))
        if len(points) > 1:
            claims = " and ".join(f"{_distribution(point)} ({point.value})" for point in points)
            warnings.warn(
                f"{len(points)} plugins are called {name!r}: {claims}; "
                f"{_distribution(points[0])} is used. Uninstall one of them.",
                ProbeWarning,
                stacklevel=2,
            )
        chosen.append(points[0])
    return tuple(chosen)


def load_plugins() -> Mapping[str, Plugin]:
    """Loads every installed plugin on the first call in a process; later calls return the same mapping.

    Returns:
        Plugin name → ``Plugin``, in order of name; those that failed are in it with their ``error``. While plugins are
        being loaded (a plugin that itself looks into a registry), the mapping holds those loaded so far.

    Warns:
        ProbeWarning: for every plugin that is skipped, once per process.
    """
    with _cache.lock:
        if _cache.plugins is None:
            loading: dict[str, Plugin] = {}
            _cache.plugins = loading
            try:
                for point in installed_plugins():
                    loading[point.name] = _load(point)
            except BaseException:
                _cache.plugins = None  # stopped half-way: the next look loads the rest
                raise
        return MappingProxyType(_cache.plugins)


def _load(point: metadata.EntryPoint) -> Plugin:
    distribution = _distribution(point)
    try:
        _activate(point.load())
    except KeyboardInterrupt:  # of the person, who is told what did not come back
        warnings.warn(
            f"stopped while loading plugin {point.name!r} of {distribution} ({point.value}); uninstall it if it hangs",
            ProbeWarning,
            stacklevel=3,
        )
        raise
    # SystemExit, CancelledError and the like too: a script registered by mistake must not end the user's process.
    except BaseException as error:
        reason = _reason(error)
        warnings.warn(
            f"plugin {point.name!r} of {distribution} is skipped: loading {point.value} raised {reason}. "
            f"Update it or uninstall it; everything else works without it.",
            ProbeWarning,
            stacklevel=3,
        )
        return Plugin(point.name, point.value, distribution, error=reason)
    _log.debug("loaded plugin %s (%s) of %s", point.name, point.value, distribution)
    return Plugin(point.name, point.value, distribution)


def _activate(loaded: Any) -> None:
    if isinstance(loaded, ModuleType):
        return
    if not callable(loaded):
        raise PluginError(
            f"the entry point is {type(loaded).__name__}; it has to be a module or a callable without arguments"
        )
    loaded()


def check_registration(what: str, name: object, function: object, error: type[ProbeError]) -> None:
    """Raises ``error`` when a name cannot be typed, or what is registered under it cannot be called.

    Checked at registration, where the plugin at fault is named, not at the first look of somebody else.
    """
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise error(f"{what} has a name that can be typed, not {repr(name)[:60]}")
    if not callable(function):
        raise error(f"{what} {name!r} is a function, not {type(function).__name__}")


def _reason(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # an exception of the plugin's own making
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _distribution(point: metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unnamed distribution"
