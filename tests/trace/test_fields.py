"""A field of a trace is one row of a table; nothing else knows it but who records it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import h5py
import new_process
import pytest
from spec_table import SPEC, with_table
from trace_samples import sample_capture, sample_row

import lvlm_probe
from lvlm_probe.errors import TraceError
from lvlm_probe.storage.reading import SealedFile
from lvlm_probe.trace import Trace, open_trace, write
from lvlm_probe.trace.fields import Field
from lvlm_probe.trace.records import FIELDS, MODEL_JSON, MODEL_TEXT, RowCapture, TraceFields, default_of, is_recorded


@pytest.mark.quick
def test_the_specification_is_up_to_date() -> None:
    text = SPEC.read_text(encoding="utf-8")
    assert with_table(text) == text, "run: python tests/trace/spec_table.py --write"
    for name in (*MODEL_TEXT, *MODEL_JSON):
        assert name in text


@pytest.mark.quick
def test_every_attribute_of_the_table_is_a_field_that_records_and_traces_have() -> None:
    names = {item.name for item in dataclasses.fields(TraceFields)}
    assert set(FIELDS) == names <= {item.name for item in dataclasses.fields(RowCapture)}
    assert len({field.key for field in FIELDS.values()}) == len(FIELDS)
    for name, field in FIELDS.items():
        assert field.about
        own = getattr(Trace, name)
        assert own is not getattr(TraceFields, name, None), f"Trace reads {name} from the class, not from its file"
        assert own.__doc__


@pytest.mark.parametrize("name", sorted(name for name, field in FIELDS.items() if field.optional))
def test_what_is_optional_may_be_absent(tmp_path: Path, name: str) -> None:
    row = dataclasses.replace(sample_row(), **{name: default_of(name)})
    assert not is_recorded(name, default_of(name))
    path = write(dataclasses.replace(sample_capture(), rows=[row]), tmp_path)
    assert not is_stored(path, name)
    trace = open_trace(path)
    assert getattr(trace, name) == default_of(name)
    trace.verify()


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_field_is_written_read_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    row = dataclasses.replace(sample_row(clips=True), notes=["a note"], error="an error")
    path = write(dataclasses.replace(sample_capture(), rows=[row]), tmp_path)
    assert is_stored(path, name)
    open_trace(path).verify()
    field = FIELDS[name]
    real = type(field).read

    def damaged(self: Field, file: SealedFile, base: str, sizes: dict[str, int]) -> object:
        if self is field:
            raise file.error(f"{base}/{field.key}", "it is damaged")
        return real(self, file, base, sizes)

    monkeypatch.setattr(type(field), "read", damaged)
    with pytest.raises(TraceError, match=f"{field.key}.*damaged"):
        Trace(path).verify()


def is_stored(path: Path, name: str) -> bool:
    owner, at, member = FIELDS[name].key.rpartition("@")
    with h5py.File(path) as file:
        return member in (file[f"traces/000000/{owner}"].attrs if at else file["traces/000000"])


ROW = """
    surprise: Annotated[
        np.ndarray | None,
        Array("output/surprise", "f4", "T", optional=True, since="1.1", about="how surprised a reader is, per token"),
    ] = None
    error: Annotated["""
USE = """
import sys
from pathlib import Path
import numpy as np
sys.path += [{tests!r}, {trace!r}]
from trace_samples import sample_capture
from spec_table import table
from lvlm_probe.errors import TraceError
from lvlm_probe.trace import open_trace, write
from lvlm_probe.trace.records import FIELDS

capture = sample_capture(2)
capture.rows[0].surprise = np.linspace(0, 1, 8)
path = write(capture, Path({out!r}))
first, second = open_trace(path, 0), open_trace(path, 1)
assert first.surprise.tolist() == np.linspace(0, 1, 8).astype("f4").tolist() and second.surprise is None
first.verify(), second.verify()
assert "| `output/surprise` ? | f4 | (T) | 1.1 | how surprised a reader is, per token |" in table()
capture.rows[0].surprise = np.zeros(3)
try:
    write(capture, Path({out!r}))
except TraceError as error:
    assert "output/surprise: its shape is (3,), (8,) is expected" in str(error).replace("]", ""), error
else:
    raise SystemExit("a field of the wrong shape was written")
"""


def test_a_row_of_the_table_is_all_that_a_new_field_takes(tmp_path: Path) -> None:
    package = tmp_path / "lvlm_probe"
    package.mkdir()
    for item in Path(lvlm_probe.__file__).parent.iterdir():
        if item.name != "trace":
            (package / item.name).symlink_to(item)
    shutil.copytree(Path(lvlm_probe.__file__).parent / "trace", package / "trace")
    records = package / "trace" / "records.py"
    text = records.read_text(encoding="utf-8")
    assert text.count("\n    error: Annotated[") == 1
    records.write_text(text.replace("\n    error: Annotated[", ROW), encoding="utf-8")
    tests = Path(__file__).parents[1]
    code = USE.format(tests=str(tests), trace=str(tests / "trace"), out=str(tmp_path / "out"))
    done = new_process.run(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
