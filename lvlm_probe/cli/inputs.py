"""What the commands are given besides models: pictures and questions, trace files, method parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_probe.cli.models import DEMO, first_line
from lvlm_probe.errors import ImageError, ProbeError, TraceError

if TYPE_CHECKING:
    from PIL import Image

    from lvlm_probe.trace import Trace

__all__ = ["find_trace", "model_of", "open_images", "output_directory", "parameters"]


def open_images(paths: Sequence[Path]) -> list[Image.Image]:
    """Opens the pictures. Raises ``ImageError`` for none, or one that is missing or no image."""
    from lvlm_probe.pictures import open_picture

    if not paths:
        raise ImageError("there is no picture to explain anything with: add --image FILE")
    return [open_picture(path) for path in paths]


def output_directory(path: Path) -> Path:
    """A directory to add to. Raises ``ProbeError`` when the path is a file."""
    if path.exists() and not path.is_dir():
        raise ProbeError(f"--out {path} is a file; name a directory (an existing one is added to)")
    return path


def find_trace(path: Path, row: int | None = None) -> Trace:
    """The trace in a file, or the last one of a directory. Raises ``TraceError``."""
    from lvlm_probe.trace import open_store, open_trace

    if path.is_dir():
        store = open_store(path)
        if not store.files:
            raise TraceError(f"{path} holds no traces; record one: lvlm-probe record --out {path} …")
        return open_trace(store.files[-1], row=row) if row is not None else store[-1]
    return open_trace(path, row=row or 0)


def model_of(trace: Trace, spec: str | None) -> str:
    """The model to replay a trace on: the one given, else the one that the trace names."""
    if spec is not None:
        return spec
    named = str(trace.model.get("model_id") or "")
    # A demo trace names the package directory of the machine it was made on; the model is the same everywhere.
    if Path(named).parts[-3:] == ("lvlm_probe", "demo", "checkpoint"):
        return DEMO
    if not named:
        raise ProbeError(f"{trace.path} does not name its model; add --model DIR_OR_ID")
    if "/" in named and not Path(named).expanduser().is_dir() and named.count("/") != 1:
        raise ProbeError(f"{trace.path.name} was recorded with {named}, which is not here; add --model DIR_OR_ID")
    return named


def parameters(pairs: Sequence[str]) -> dict[str, Any]:
    """``["size=14", "preset=release"]`` as keyword arguments; values are read as YAML."""
    import yaml

    found: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name.isidentifier():
            raise ProbeError(f"--param {pair!r}: write it as NAME=VALUE, e.g. --param size=14")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ProbeError(f"--param {pair!r}: the value cannot be read ({first_line(error)})") from error
    return found
