"""The version of the package, and those of the libraries that it runs on."""

from __future__ import annotations

import functools

__version__ = "0.1.0"


def versions_of(*names: str) -> dict[str, str]:
    """Return the versions of those of the named distributions that are installed; of this package in any case."""
    found = {name: _installed(name) for name in names}
    return {name: version for name, version in found.items() if version is not None}


@functools.cache
def _installed(name: str) -> str | None:
    from importlib import metadata  # two thirds of what `import lvlm_probe` would take

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return __version__ if name in ("lvlm-probe", "lvlm_probe") else None
