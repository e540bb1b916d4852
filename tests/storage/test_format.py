from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from lvlm_probe.errors import TraceError
from lvlm_probe.storage import read_arrays, write_arrays
from lvlm_probe.storage.encoding import JSON_LIMIT, as_array, json_text, parse_json, put_array, restore_tensor
from lvlm_probe.storage.seal import BLOCK_BYTES, check_open, open_file, parse_version

KIND = "heatmap"


def test_arrays_and_settings_come_back(tmp_path: Path) -> None:
    arrays = {
        "values": np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4),
        "seen": np.array([[True, False], [False, True]]),
        "scalar": np.float64(2.5),
        "empty": np.zeros((0, 7), np.int16),
        "big_endian": np.arange(3, dtype=">i4"),
    }
    attrs = {"method": "igos++", "params": {"alpha": 1.0, "sizes": [1, 2]}, "text": 'é\0"\n図', "none": None}
    path = write_arrays(tmp_path / "deep" / "x.h5", KIND, "1.0", arrays, attrs)
    back, back_attrs = read_arrays(path, KIND)
    assert back_attrs == attrs
    assert set(back) == set(arrays)
    for name, value in arrays.items():
        np.testing.assert_array_equal(back[name], value)
        assert back[name].shape == np.shape(value)
        assert back[name].dtype == np.asarray(value).dtype.newbyteorder("=")
    assert [item.name for item in path.parent.iterdir()] == ["x.h5"]


@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", "float16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32", "int64", "float8_e4m3fn"],
)
def test_tensors_keep_every_bit(tmp_path: Path, dtype: str) -> None:
    source = torch.tensor([[0.0, 1.0, -3.0], [70_000.0, 1e-3, 100.0]])
    if dtype.startswith(("uint", "int")):
        source = source.remainder(100)
    tensor = source.to(getattr(torch, dtype))
    array, name = as_array(tensor.T)
    assert name == dtype
    back = restore_tensor(array, name)
    assert back.dtype == tensor.dtype
    assert torch.equal(back.view(torch.uint8), tensor.T.contiguous().view(torch.uint8))
    path = write_arrays(tmp_path / "t.h5", KIND, "1.0", {"t": tensor}, {})
    with h5py.File(path) as file:
        assert file["arrays/t"].attrs["dtype"] == dtype.encode()


def test_bfloat16_beyond_float16_survives() -> None:
    tensor = torch.tensor([3.0e38, -1.0e-30], dtype=torch.bfloat16)
    array, _ = as_array(tensor)
    assert array.dtype == np.uint16
    assert torch.equal(restore_tensor(array, "bfloat16"), tensor)


@given(
    hnp.arrays(hnp.integer_dtypes() | hnp.floating_dtypes(sizes=(16, 32, 64)), hnp.array_shapes(min_dims=0, min_side=0))
)
@settings(max_examples=40)
def test_any_numeric_array_comes_back(array: np.ndarray) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        back, _ = read_arrays(write_arrays(Path(folder) / "a.h5", KIND, "1.0", {"a": array}, {}), KIND)
    assert back["a"].dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(back["a"], array)


@pytest.mark.parametrize("value", [np.array(["text"]), np.array([object()]), np.array([1 + 2j])])
def test_only_numbers_are_stored(tmp_path: Path, value: np.ndarray) -> None:
    with pytest.raises(TraceError, match="could not be written"):
        write_arrays(tmp_path / "x.h5", KIND, "1.0", {"x": value}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a/b", "", ".hidden", "a b", "x" * 200])
def test_names_are_plain(tmp_path: Path, name: str) -> None:
    with pytest.raises(TraceError, match="cannot name an array"):
        write_arrays(tmp_path / "x.h5", KIND, "1.0", {name: np.zeros(1)}, {})


def test_json_is_strict_and_takes_what_settings_hold() -> None:
    assert json_text("x", {"a": float("nan"), "b": -math.inf, 3: (1, np.int64(2)), "d": torch.float32}) == (
        '{"a":"nan","b":"-inf","3":[1,2],"d":"torch.float32"}'
    )
    assert json_text("x", "half \ud800 pair") == '"half \\ud800 pair"'
    with pytest.raises(ValueError, match="at most"):
        json_text("x", "y" * JSON_LIMIT)


def test_seal_is_text_and_its_hash_can_be_checked_with_standard_tools(tmp_path: Path) -> None:
    path = write_arrays(tmp_path / "x.h5", KIND, "1.0", {"a": np.arange(4)}, {})
    data = path.read_bytes()
    lines = data[:BLOCK_BYTES].decode("ascii").split("\n")
    assert lines[0] == "lvlm_probe.heatmap 1.0"
    assert lines[1] == f"bytes {len(data)}"
    assert lines[2] == f"sha256 {hashlib.sha256(data[BLOCK_BYTES:]).hexdigest()}"
    with h5py.File(path) as file:
        assert file.userblock_size == BLOCK_BYTES
        assert file.attrs["format"] == b"lvlm_probe.heatmap"


def test_wrong_kind_and_newer_version_say_so(tmp_path: Path) -> None:
    path = write_arrays(tmp_path / "x.h5", KIND, "1.3", {"a": np.arange(4)}, {})
    assert read_arrays(path, KIND)[0]["a"].tolist() == [0, 1, 2, 3]
    with pytest.raises(TraceError, match=r"lvlm_probe.heatmap file, not a lvlm_probe.score file"):
        read_arrays(path, "score")
    newer = write_arrays(tmp_path / "y.h5", KIND, "2.0", {"a": np.arange(4)}, {})
    with pytest.raises(TraceError, match=r"format 2\.0.*upgrade lvlm_probe"):
        read_arrays(newer, KIND)
    assert read_arrays(newer, KIND, version="2.1")[0]["a"].tolist() == [0, 1, 2, 3]


def test_an_exception_while_writing_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "x.h5"
    write_arrays(target, KIND, "1.0", {"a": np.arange(3)}, {})
    before = target.read_bytes()
    with pytest.raises(TraceError):
        write_arrays(target, KIND, "1.0", {"a": np.arange(3), "b": np.array(["no"])}, {})
    assert target.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["x.h5"]


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(TraceError, match="could not be written"):
        write_arrays(tmp_path / "file" / "x.h5", KIND, "1.0", {}, {})


@pytest.mark.quick
def test_rewriting_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    write_arrays(path, KIND, "1.0", {"a": np.zeros(3)}, {}, fsync=True)
    write_arrays(path, KIND, "1.0", {"a": np.ones(2)}, {})
    assert read_arrays(path, KIND)[0]["a"].tolist() == [1, 1]


def test_chunks_hold_one_step_and_at_most_a_megabyte(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "c.h5", "w") as file:
        small = put_array(file, "small", np.zeros((6, 4, 2, 10), np.float16), by_step=True)
        assert small.chunks == (1, 4, 2, 10)
        large = put_array(file, "large", np.zeros((3, 64, 16, 1500), np.float16), by_step=True)
        assert large.chunks is not None
        assert large.chunks[0] == 1
        assert 2**19 <= np.prod(large.chunks) * 2 <= 2**20
        assert put_array(file, "flat", np.zeros((6, 4))).chunks is None
        assert put_array(file, "none", np.zeros((0, 4, 1, 2)), by_step=True).chunks is None


@pytest.mark.parametrize("text", ["1", "1.0.0", "", "a.b", "1.0 ", "-1.0", "12345.0"])
def test_versions_are_two_numbers(text: str) -> None:
    assert parse_version("1.10") == (1, 10)
    with pytest.raises(ValueError, match="not a version"):
        parse_version(text)


def test_what_is_not_a_file_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no such file"):
        read_arrays(tmp_path / "missing.h5", KIND)
    with pytest.raises(TraceError, match="this is a directory"):
        read_arrays(tmp_path, KIND)
    os.mkfifo(tmp_path / "pipe.h5")
    # Opening a pipe that nobody writes to would wait for ever.
    with pytest.raises(TraceError, match="not a regular file"):
        read_arrays(tmp_path / "pipe.h5", KIND)


def test_a_file_may_be_open_elsewhere_with_any_locking(tmp_path: Path) -> None:
    path = write_arrays(tmp_path / "x.h5", KIND, "1.0", {"a": np.arange(3)}, {})
    for locking in (None, True, False, "best-effort"):
        with h5py.File(path, "r", locking=locking):
            assert read_arrays(path, KIND)[0]["a"].tolist() == [0, 1, 2]


def test_the_specification_names_the_limits_of_the_code() -> None:
    from lvlm_probe.storage import encoding, reading
    from lvlm_probe.trace import parts, schema

    text = " ".join(Path(schema.__file__).parents[1].joinpath("SPEC.md").read_text("utf-8").split())
    limits = {
        f"JSON ({encoding.JSON_LIMIT // 2**20} MiB, {encoding.JSON_DEPTH} levels)": "JSON",
        f"at most {encoding.JSON_LIMIT // 2**20} MiB, with at most {encoding.JSON_DEPTH} levels": "JSON, for writers",
        f"integers of at most {encoding.NUMBER_DIGITS} digits": "integers, for writers",
        f"integers of more than {encoding.NUMBER_DIGITS} digits": "integers",
        f"attributes ({reading.TEXT_LIMIT // 2**10} KiB)": "attributes",
        f"rank of arrays ({reading.RANK_LIMIT})": "rank",
        f"members of a group ({reading.MEMBER_LIMIT:,})": "members",
        f"traces of a file ({schema.ROW_LIMIT:,}, and one for each {schema.ROW_BYTES:,} bytes of it)": "traces",
        f"images of a trace ({schema.IMAGE_LIMIT:,})": "images",
        f"{parts.PIXEL_LIMIT:,} for one image, and above {parts.FREE_PIXELS:,} no more than "
        f"{parts.PIXELS_PER_BYTE} for each byte": "pixels of an image",
        f"above {parts.FREE_PIXELS_TOGETHER:,}, no more than {parts.PIXELS_PER_BYTE} for each byte": "pixels of all",
    }
    for sentence, what in limits.items():
        assert sentence in text, what


def test_what_json_lacks_is_written_as_what_a_reader_takes() -> None:
    for value in (float("nan"), float("inf"), 10**299, -(10**400), {"a": 10**5000}, "\ud800"):
        parse_json(json_text("x", value).encode("utf-8"))
    deep: list = []
    for _ in range(64):
        deep = [deep]
    with pytest.raises(ValueError, match="65 levels"):
        json_text("x", deep)


def test_large_files_are_hashed_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lvlm_probe.storage.seal.CHECKSUM_LIMIT", 1000)
    path = write_arrays(tmp_path / "x.h5", KIND, "1.0", {"a": np.arange(1000)}, {})
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with open_file(path) as file:
        check_open(path, file, f"lvlm_probe.{KIND}", "1.0")
        file.seek(0)
        with pytest.raises(TraceError, match="SHA-256"):
            check_open(path, file, f"lvlm_probe.{KIND}", "1.0", full=True)
