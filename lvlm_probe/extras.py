"""Optional libraries, imported when a metric needs them."""

from __future__ import annotations

import importlib
from typing import Any

from lvlm_probe.errors import ProbeError


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Imports a module of an optional library. Raises ``ProbeError`` that names the extra to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ProbeError(
            f"{purpose} needs {module.partition('.')[0]}, which cannot be imported ({error}): "
            f"pip install 'lvlm-probe[{extra}]'"
        ) from error
