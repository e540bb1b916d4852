"""Files of named arrays and JSON settings: what explanations are kept in. Same seal, same renaming, same checks."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lvlm_probe._version import __version__
from lvlm_probe.storage.encoding import JSON, NAME, put_array, put_json, put_text
from lvlm_probe.storage.reading import SealedFile, open_sealed
from lvlm_probe.storage.seal import sealed_writer, trace_error

if TYPE_CHECKING:
    import torch


def write_arrays(
    path: str | os.PathLike[str],
    kind: str,
    version: str,
    arrays: Mapping[str, np.ndarray | torch.Tensor],
    attrs: Mapping[str, JSON],
    *,
    fsync: bool = False,
) -> Path:
    """Writes arrays and settings to one file, whole or not at all, and returns its path.

    ``kind`` says what they are (``"heatmap"``: lower-case letters and ``_``) and ``version`` is the version of that
    kind (``"1.0"``). Tensors are stored bit for bit, bfloat16 included; ``attrs`` must be JSON. Raises ``TraceError``.
    """
    path = Path(path)
    for name in arrays:
        if re.fullmatch(NAME, name) is None:
            raise trace_error(path, "", f"{name!r} cannot name an array", "use letters, digits, '_', '-' and '.'")
    try:
        nbytes = sum(int(getattr(value, "nbytes", 0)) for value in arrays.values())
        with sealed_writer(path, f"lvlm_probe.{kind}", version, nbytes=nbytes, fsync=fsync) as file:
            put_text(file, "format", f"lvlm_probe.{kind}")
            put_text(file, "format_version", version)
            put_text(file, "writer", f"lvlm_probe {__version__}")
            put_json(file, "attrs", dict(attrs))
            group = file.create_group("arrays")
            for name, value in arrays.items():
                put_array(group, name, value)
            file.attrs.create("complete", np.uint8(1))
    except (TypeError, ValueError, RecursionError) as error:
        raise trace_error(path, "", f"it could not be written ({error})", "store numbers and JSON only") from error
    return path


def read_arrays(
    path: str | os.PathLike[str], kind: str, *, version: str = "1.0"
) -> tuple[dict[str, np.ndarray], dict[str, JSON]]:
    """Reads what ``write_arrays`` wrote: ``(arrays, attrs)``; bfloat16 comes as the uint16 of its bits.

    ``version`` is the newest version of ``kind`` that the caller understands; a newer major version is refused. Raises
    ``TraceError`` for damaged, foreign or hostile files.
    """
    with open_sealed(path, f"lvlm_probe.{kind}", version) as file:
        attrs = _attrs(file)
        arrays: dict[str, np.ndarray] = {}
        for name in file.named("arrays"):
            key = f"arrays/{name}"
            arrays[name] = file.array(key)
            if file.text(key, "dtype", "") == "bool":
                arrays[name] = arrays[name].astype(bool)
    return arrays, attrs


def read_attrs(path: str | os.PathLike[str], kind: str, *, version: str = "1.0") -> dict[str, JSON]:
    """Reads the settings alone, as ``read_arrays`` does."""
    with open_sealed(path, f"lvlm_probe.{kind}", version) as file:
        return _attrs(file)


def _attrs(file: SealedFile) -> dict[str, JSON]:
    attrs = file.json("attrs")
    if not isinstance(attrs, dict):
        raise file.error("attrs", f"settings by name are expected, this is a {type(attrs).__name__}")
    return attrs
