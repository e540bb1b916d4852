"""Stores a capture: one file, written under another name and renamed when it is whole."""

from __future__ import annotations

import datetime
import hashlib
import os
import secrets
from pathlib import Path

import h5py
import numpy as np

from lvlm_probe._version import __version__
from lvlm_probe.errors import TraceError
from lvlm_probe.process import lock
from lvlm_probe.storage.encoding import ENCODING_VERSION, json_text, put_array, put_json, put_text
from lvlm_probe.storage.reading import SealedFile
from lvlm_probe.storage.seal import sealed_writer
from lvlm_probe.trace.fields import Json
from lvlm_probe.trace.records import (
    FIELDS,
    MODEL_JSON,
    MODEL_TEXT,
    Capture,
    ImageRecord,
    PointRecord,
    RowCapture,
    is_recorded,
)
from lvlm_probe.trace.schema import FORMAT, FORMAT_VERSION, row_key, validate, validate_row


class _Clock:
    """Time stamps that never repeat and never go back within a process, even when the system's clock does."""

    def __init__(self) -> None:
        self._lock = lock()
        self._last = datetime.datetime.min.replace(tzinfo=datetime.UTC)

    def stamp(self) -> str:
        with self._lock:
            now = datetime.datetime.now(datetime.UTC)
            self._last = max(now, self._last + datetime.timedelta(microseconds=1))
            return self._last.strftime("%Y%m%dT%H%M%S.%fZ")


_CLOCK = _Clock()


def write(capture: Capture, directory: str | os.PathLike[str], *, fsync: bool = False) -> Path:
    """Writes one ``generate()`` call to a new file in ``directory`` (made when missing) and returns its path.

    File names sort by creation time, are unique across threads, processes and machines, and end in the number of
    traces inside: ``20261123T051141.123456Z-4711-9f86d081.b2.h5``. A process killed on the way leaves a ``.part`` file,
    never a broken trace; ``fsync=True`` also survives a power cut. Raises ``TraceError`` when the capture does not keep
    to the schema or the disk does not take it.
    """
    if not capture.rows:
        raise TraceError(f"{os.fspath(directory)}: the capture has no rows, so there is nothing to write; record a row")
    stem = f"{_CLOCK.stamp()}-{os.getpid()}-{secrets.token_hex(4)}"
    path = Path(directory) / f"{stem}.b{len(capture.rows)}.h5"
    try:
        with sealed_writer(path, FORMAT, FORMAT_VERSION, nbytes=_nbytes(capture), fsync=fsync) as file:
            _put_root(file, capture)
            for index, row in enumerate(capture.rows):
                _put_row(file.create_group(row_key(index)), row)
            file.attrs.create("complete", np.uint8(1))
            file.flush()
            # What a reader would refuse is not written: the same check, before the file gets its name.
            written = SealedFile(path, file, file.id.get_filesize())
            for index in range(validate(written)):
                header = validate_row(written, index)
                base = row_key(index)
                for field in FIELDS.values():
                    if isinstance(field, Json) and field.count and field.is_kept(written, base):
                        field.read(written, base, header.sizes)
    except (TypeError, ValueError, RecursionError) as error:
        raise TraceError(f"{path}: the capture cannot be stored ({error}); fix the recorded value") from error
    return path


def _nbytes(capture: Capture) -> int:
    """About what the arrays of a capture take, bytes."""
    total = 0
    for row in capture.rows:
        arrays = [*row.model_kwargs.values(), *(point.values for point in row.points.values())]
        total += sum(int(getattr(array, "nbytes", 0)) for array in arrays)
        total += sum(len(image.data) for image in row.images)
    return total


def _put_root(file: h5py.File, capture: Capture) -> None:
    put_text(file, "format", FORMAT)
    put_text(file, "format_version", FORMAT_VERSION)
    put_text(file, "created", capture.created)
    put_text(file, "writer", f"lvlm_probe {__version__}")
    put_json(file, "seconds", capture.seconds)
    model = file.create_group("model")
    for name in MODEL_TEXT:
        if capture.model.get(name) is not None:
            put_text(model, name, str(capture.model[name]))
    for name in MODEL_JSON:
        if name in capture.model:
            put_json(model, name, capture.model[name])
    known = {*MODEL_TEXT, *MODEL_JSON}
    if more := {name: value for name, value in capture.model.items() if name not in known}:
        put_json(model, "more", more)
    file.create_group("traces").attrs.create("rows", np.int64(len(capture.rows)))


def _put_row(group: h5py.Group, row: RowCapture) -> None:
    put_text(group, "encoding", "trace")
    put_text(group, "encoding_version", ENCODING_VERSION)
    for name, field in sorted(FIELDS.items(), key=lambda item: item[1].is_attribute):  # once their owners are there
        value = getattr(row, name)
        if is_recorded(name, value):
            field.put(group, value)
    kwargs = group.create_group("inputs/model_kwargs")
    for name, tensor in row.model_kwargs.items():
        put_array(kwargs, name, tensor, encoding="tensor")
    images = group.create_group("images")
    for index, image in enumerate(row.images):
        _put_image(images, f"{index:03d}", image)
    points = group.create_group("points")
    for name, point in row.points.items():
        _put_point(points, name, point)


def _put_image(group: h5py.Group, name: str, image: ImageRecord) -> None:
    dataset = put_array(group, name, np.frombuffer(image.data, np.uint8), encoding="image-file")
    put_text(dataset, "mime", image.mime)
    put_text(dataset, "sha256", hashlib.sha256(image.data).hexdigest())
    dataset.attrs.create("width", np.int64(image.width))
    dataset.attrs.create("height", np.int64(image.height))


def _put_point(group: h5py.Group, name: str, point: PointRecord) -> None:
    by_step = bool(point.axes) and point.axes[0] == "step"
    dataset = put_array(group, name, point.values, encoding="tensor", by_step=by_step)
    put_text(dataset, "axes", ",".join(point.axes))
    put_text(dataset, "module", point.module)
    put_text(dataset, "reduce", point.reduce)
    put_text(dataset, "attrs", json_text("attrs", dict(point.attrs), limit=2**15))
    dataset.attrs.create("layers", np.asarray(point.layers, np.int32).reshape(-1))
