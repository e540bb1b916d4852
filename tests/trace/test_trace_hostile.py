"""Files that nobody vouches for: every one reads fine or is a ``TraceError`` with file, key, cause and way out."""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import json
import os
import random
import signal
import time
import tracemalloc
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from campaigns import hostile
from forgery import lookup3, metadata_blocks, write_seal
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import campaign
from PIL import Image
from trace_samples import sample_capture

from lvlm_probe.errors import TraceError
from lvlm_probe.storage.reading import SealedFile
from lvlm_probe.storage.seal import BLOCK_BYTES
from lvlm_probe.trace import open_store, open_trace, write
from lvlm_probe.trace.schema import FORMAT_VERSION

ROW = "traces/000000"
KIND, VERSION = "lvlm_probe.trace", FORMAT_VERSION


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(sample_capture(2), tmp_path_factory.mktemp("whole")).read_bytes()


@pytest.fixture
def tampered(tmp_path: Path, whole: bytes) -> Callable[[Callable[[h5py.File], object]], Path]:
    """A forger: changes a good file with h5py and seals it again."""

    def forge(change: Callable[[h5py.File], object]) -> Path:
        path = tmp_path / "forged.h5"
        path.write_bytes(whole)
        with h5py.File(path, "r+") as file:
            change(file)
        write_seal(path, KIND, VERSION)
        return path

    return forge


def refusal(path: Path, *, megabytes: float = 60.0) -> str:
    """Reads everything; returns the message of the ``TraceError``, which must come without much work or memory.

    Work is counted in this process's own processor time, which a busy machine does not lengthen.
    """
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(TraceError) as caught:
            open_trace(path).verify()
        assert time.process_time() - started < 5
        assert tracemalloc.get_traced_memory()[1] < megabytes * 1e6
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert str(path) in message
    assert "; " in message, "the message has no way out"
    return message


def replace(file: h5py.File, key: str, **settings: object) -> None:
    """Puts another dataset in the place of one, keeping its attributes."""
    attrs = dict(file[key].attrs) if key in file else {}
    if key in file:
        del file[key]
    file.create_dataset(key, **settings).attrs.update(attrs)


def set_attribute(file: h5py.File, key: str, name: str, value: object) -> None:
    file[key].attrs.pop(name, None)
    file[key].attrs[name] = value


class TestNotOurs:
    def test_other_formats_are_named(self, tmp_path: Path) -> None:
        picture, archive = io.BytesIO(), io.BytesIO()
        Image.new("RGB", (40, 40)).save(picture, "PNG")
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("x", "y")
        with h5py.File(tmp_path / "plain.h5", "w") as plain:
            plain["x"] = 1
        for name, data, expected in [
            ("a.h5", picture.getvalue(), "a PNG image"),
            ("b.h5", archive.getvalue(), "a ZIP archive"),
            ("c.h5", b"", "it is empty"),
            ("d.h5", b'{"x": 1}', "JSON or text"),
            ("e.h5", b"\x80\x04\x95", "it starts with"),
            ("plain.h5", None, "a plain HDF5 file"),
        ]:
            if data is not None:
                (tmp_path / name).write_bytes(data)
            assert f"not an lvlm_probe file ({expected}" in refusal(tmp_path / name)

    def test_a_pickle_is_not_opened(self, tmp_path: Path) -> None:
        import pickle

        class Bomb:
            def __reduce__(self) -> tuple[object, ...]:
                return os.mkdir, (str(tmp_path / "exploded"),)

        (tmp_path / "x.h5").write_bytes(pickle.dumps(Bomb()))
        refusal(tmp_path / "x.h5")
        assert not (tmp_path / "exploded").exists()

    def test_missing_directory_pipe(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.h5")
        assert "no such file" in refusal(tmp_path / "missing.h5")
        assert "open_store() reads a directory" in refusal(tmp_path)
        assert "not a regular file" in refusal(tmp_path / "pipe.h5")

    def test_an_explanation_is_not_a_trace(self, tmp_path: Path) -> None:
        from lvlm_probe.storage import write_arrays

        path = write_arrays(tmp_path / "x.h5", "heatmap", "1.0", {}, {})
        assert "lvlm_probe.heatmap file, not a lvlm_probe.trace file" in refusal(path)


class TestDamage:
    def test_truncated_anywhere(self, tmp_path: Path, whole: bytes) -> None:
        path = tmp_path / "cut.h5"
        lengths = {*range(0, len(whole), 97), *range(BLOCK_BYTES - 3, BLOCK_BYTES + 12), len(whole) - 1}
        for length in sorted(lengths):
            path.write_bytes(whole[:length])
            message = refusal(path)
            assert "not an lvlm_probe file" in message or "cut short" in message

    def test_longer_than_it_says(self, tmp_path: Path, whole: bytes) -> None:
        (tmp_path / "long.h5").write_bytes(whole + b"\0")
        assert "cut short or changed" in refusal(tmp_path / "long.h5")

    def test_one_flipped_bit_anywhere(self, tmp_path: Path, whole: bytes) -> None:
        path = tmp_path / "flipped.h5"
        chosen = random.Random(0).sample(range(BLOCK_BYTES + 8, len(whole)), 300)
        for position in chosen:
            data = bytearray(whole)
            data[position] ^= 1 << (position % 8)
            path.write_bytes(data)
            assert "SHA-256" in refusal(path)

    @given(st.data())
    @settings(max_examples=150)
    def test_any_damage_at_random(
        self, tmp_path_factory: pytest.TempPathFactory, whole: bytes, data: st.DataObject
    ) -> None:
        blob = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 3))):
            start = data.draw(st.integers(0, len(blob)))
            stop = data.draw(st.integers(start, min(len(blob), start + 64)))
            blob[start:stop] = data.draw(st.binary(max_size=64))
        path = tmp_path_factory.getbasetemp() / "damaged.h5"
        path.write_bytes(blob)
        if blob[BLOCK_BYTES:] == whole[BLOCK_BYTES:] and blob[:300] == whole[:300]:
            open_trace(path).verify()  # the padding of the head means nothing
        else:
            refusal(path)


class TestForged:
    """Sealed again after tampering: the checks behind the seal."""

    def test_the_forger_changes_nothing_else(self, tampered: Callable[..., Path]) -> None:
        open_trace(tampered(lambda file: None)).verify()

    def test_an_array_of_a_terabyte_is_not_allocated(self, tampered: Callable[..., Path]) -> None:
        for settings_ in (
            {"shape": (2**40,), "dtype": "i4"},
            {"shape": (2**40,), "dtype": "i4", "chunks": (1024,)},
            {"shape": (2**31, 2**31), "dtype": "i4", "chunks": (1, 8), "maxshape": (None, None)},
        ):
            path = tampered(lambda file, s=settings_: replace(file, f"{ROW}/output/token_ids", **s))
            message = refusal(path)
            assert f"[{ROW}/output/token_ids]" in message
            assert "in a file of" in message or "shape" in message

    def test_chunks_without_number_are_not_looked_for(self, tampered: Callable[..., Path]) -> None:
        """All of them stored: reading would be safe, and take seconds."""
        data = np.zeros(2**16 + 1, "i1")
        path = tampered(lambda file: replace(file, f"{ROW}/output/token_ids", data=data, chunks=(1,)))
        assert "65537 chunks" in refusal(path)

    def test_declared_but_not_stored(self, tampered: Callable[..., Path]) -> None:
        path = tampered(lambda file: replace(file, f"{ROW}/output/token_ids", shape=(8,), dtype="i4"))
        assert "declares 32 bytes and 0 are stored" in refusal(path)
        path = tampered(lambda file: replace(file, f"{ROW}/output/token_ids", shape=(8,), dtype="i4", chunks=(4,)))
        assert "declares 32 bytes and 0 are stored" in refusal(path)

    @pytest.mark.parametrize(
        "key",
        [
            "model",
            "traces",
            ROW,
            f"{ROW}/inputs",
            f"{ROW}/inputs/input_ids",
            f"{ROW}/inputs/prompt",
            f"{ROW}/output",
            f"{ROW}/output/pieces",
            f"{ROW}/output/log_probs",
            f"{ROW}/layout",
            f"{ROW}/layout/image_positions",
        ],
    )
    def test_missing_members_are_named(self, tampered: Callable[..., Path], key: str) -> None:
        message = refusal(tampered(lambda file: file.__delitem__(key)))
        assert key.rpartition("/")[2] in message
        assert "missing" in message

    @pytest.mark.parametrize(
        ("owner", "name"),
        [
            ("/", "format"),
            ("/", "format_version"),
            ("/", "complete"),
            ("traces", "rows"),
            (ROW, "trace_id"),
            (ROW, "status"),
            (f"{ROW}/output/log_probs", "source"),
            (f"{ROW}/points/decoder.attention", "axes"),
            (f"{ROW}/points/decoder.attention", "layers"),
            (f"{ROW}/images/000", "width"),
            (f"{ROW}/images/000", "sha256"),
            (f"{ROW}/inputs/model_kwargs/pixel_values", "dtype"),
        ],
    )
    def test_missing_attributes_are_named(self, tampered: Callable[..., Path], owner: str, name: str) -> None:
        message = refusal(tampered(lambda file: file[owner].attrs.__delitem__(name)))
        assert owner.strip("/") in message
        assert name in message or "width and height" in message or "list of integers" in message

    @pytest.mark.parametrize(
        ("key", "settings_", "expected"),
        [
            (f"{ROW}/output/token_ids", {"data": np.zeros(8, "f4")}, "dtype is float32"),
            (f"{ROW}/output/token_ids", {"data": np.zeros((8, 1), "i4")}, "shape is (8, 1)"),
            (f"{ROW}/output/token_ids", {"data": np.zeros(9, "i4")}, "(9,) is expected"),
            (f"{ROW}/output/log_probs", {"data": np.zeros(8, "f8")}, "f4 is expected"),
            (f"{ROW}/inputs/prompt", {"data": np.zeros(8, "u1")}, "JSON text is expected"),
            (f"{ROW}/inputs/prompt", {"data": "text", "dtype": h5py.string_dtype()}, "not a number or a fixed string"),
            (f"{ROW}/inputs/prompt", {"data": np.bytes_(b"{not json")}, "JSONDecodeError"),
            (f"{ROW}/inputs/prompt", {"data": np.bytes_(b"\xff\xfe")}, "UnicodeDecodeError"),
            (f"{ROW}/inputs/prompt", {"data": np.bytes_(b"[1]")}, "JSON is a list"),
            (f"{ROW}/output/pieces", {"data": np.bytes_(b'["a"]')}, "1 pieces for 8 tokens"),
            (f"{ROW}/output/pieces", {"data": np.bytes_(b"[1,2,3,4,5,6,7,8]")}, "list of texts"),
            (f"{ROW}/notes", {"data": np.bytes_(b"[[]]")}, "list of texts"),
            (f"{ROW}/meta", {"data": np.bytes_(b"[" * 100_000)}, "RecursionError"),
            (f"{ROW}/meta", {"data": np.bytes_(b"9" * 10_000)}, "ValueError"),
            (f"{ROW}/meta", {"data": np.bytes_(b"[" + b"0," * 3_000_000 + b"0]")}, "JSON has 6000003 bytes"),
            (f"{ROW}/output/token_ids", {"data": np.zeros(8, "i4"), "compression": "gzip"}, "compressed or filtered"),
            (f"{ROW}/output/token_ids", {"data": np.zeros(8, "i4"), "compression": "lzf"}, "compressed or filtered"),
            (f"{ROW}/output/token_ids", {"data": np.zeros(8, "i4"), "fletcher32": True}, "compressed or filtered"),
            (f"{ROW}/output/token_ids", {"data": h5py.Empty("i4")}, "no shape"),
            (f"{ROW}/output/token_ids", {"data": np.zeros(8, [("a", "i4")])}, "not a number"),
            (f"{ROW}/output/token_ids", {"data": np.zeros((1,) * 12, "i4")}, "too many axes"),
            (f"{ROW}/layout/image_positions", {"data": np.full(6, 99, "i4")}, "outside the prompt"),
            (f"{ROW}/layout/image_positions", {"data": np.full(6, -1, "i4")}, "outside the prompt"),
            (f"{ROW}/layout/image_index", {"data": np.full(6, -1, "i4")}, "it names images -1 to -1 of 1"),
            (f"{ROW}/layout/image_index", {"data": np.full(6, 3, "i4")}, "it names images 3 to 3 of 1"),
            (f"{ROW}/images/000", {"data": np.zeros(10, "u1")}, "SHA-256"),
            (f"{ROW}/inputs/model_kwargs/a b", {"data": np.zeros(1)}, "is not a name"),
        ],
    )
    def test_wrong_content_is_named(
        self, tampered: Callable[..., Path], key: str, settings_: dict[str, object], expected: str
    ) -> None:
        message = refusal(tampered(lambda file: replace(file, key, **settings_)))
        assert expected in message
        assert key.rpartition("/")[0] in message

    @pytest.mark.parametrize(
        ("owner", "name", "value", "expected"),
        [
            ("/", "complete", np.uint8(0), "was not finished"),
            ("/", "format", np.bytes_(b"lvlm_probe.heatmap"), "is expected"),
            ("/", "format_version", np.bytes_(b"1.7"), "the head of the file says"),
            ("/", "format_version", np.bytes_(b"one"), "not a version"),
            ("traces", "rows", np.int64(-1), "it is -1, outside 1 to"),
            ("traces", "rows", np.int64(2**40), "outside 1 to"),
            ("traces", "rows", np.float64(1), "an integer is expected"),
            (ROW, "trace_id", np.bytes_(b"../../etc/passwd"), "is not a trace id"),
            (ROW, "trace_id", "variable length", "not a number or a fixed string"),
            (ROW, "status", np.bytes_(b"fine"), "complete, stopped, error"),
            (ROW, "batch_row", np.int64(-3), "outside 0 to"),
            (f"{ROW}/images/000", "width", np.int64(-24), "outside 1 to"),
            (f"{ROW}/images/000", "width", np.int64(25), "24x18, declared 25x18"),
            (f"{ROW}/points/decoder.attention", "axes", np.bytes_(b"step,layer"), "2 axes"),
            (f"{ROW}/points/decoder.attention", "axes", np.bytes_(b"step,layer,head,patch"), "are expected"),
            (f"{ROW}/points/decoder.attention", "layers", np.arange(9), "axis 'layer' has size 2"),
            (f"{ROW}/points/decoder.attention", "layers", np.zeros(60_000), "more than 65536 bytes"),
            (f"{ROW}/points/decoder.attention", "encoding_version", np.bytes_(b"2.0"), "upgrade lvlm_probe"),
            (f"{ROW}/points/decoder.attention", "dtype", np.bytes_(b"bfloat16"), "stored as uint16"),
            (f"{ROW}/points/decoder.attention", "dtype", np.bytes_(b"__class__"), "unknown dtype"),
            (f"{ROW}/points/decoder.attention", "attrs", np.bytes_(b"[]"), "settings by name"),
        ],
    )
    def test_wrong_attributes_are_named(
        self, tampered: Callable[..., Path], owner: str, name: str, value: object, expected: str
    ) -> None:
        message = refusal(tampered(lambda file: set_attribute(file, owner, name, value)))
        assert expected in message
        assert owner.strip("/") in message

    def test_links_to_elsewhere_are_not_followed(self, tampered: Callable[..., Path], tmp_path: Path) -> None:
        with h5py.File(tmp_path / "secret.h5", "w") as secret:
            secret["token_ids"] = np.arange(8, dtype="i4")
        (tmp_path / "secret.raw").write_bytes(np.arange(8, dtype="i4").tobytes())
        key = f"{ROW}/output/token_ids"

        def soft(file: h5py.File) -> None:
            del file[key]
            file[key] = h5py.SoftLink(f"/{ROW}/output/special")

        def external(file: h5py.File) -> None:
            del file[key]
            file[key] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "token_ids")

        def external_group(file: h5py.File) -> None:
            del file[f"{ROW}/output"]
            file[f"{ROW}/output"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/")

        def raw(file: h5py.File) -> None:
            replace(file, key, shape=(8,), dtype="i4", external=[(str(tmp_path / "secret.raw"), 0, 32)])

        def virtual(file: h5py.File) -> None:
            del file[key]
            layout = h5py.VirtualLayout((8,), "i4")
            layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "token_ids", (8,))
            file.create_virtual_dataset(key, layout)

        assert "SoftLink" in refusal(tampered(soft))
        assert "ExternalLink" in refusal(tampered(external))
        assert "ExternalLink" in refusal(tampered(external_group))
        assert "in another file" in refusal(tampered(raw))
        assert "in another file" in refusal(tampered(virtual))

    def test_references_are_refused(self, tampered: Callable[..., Path]) -> None:
        def reference(file: h5py.File) -> None:
            replace(file, f"{ROW}/output/token_ids", data=np.array([file.ref] * 8, dtype=h5py.ref_dtype))

        assert "not a number or a fixed string" in refusal(tampered(reference))

    def test_a_group_for_an_array_and_an_array_for_a_group(self, tampered: Callable[..., Path]) -> None:
        def group(file: h5py.File) -> None:
            del file[f"{ROW}/output/token_ids"]
            file.create_group(f"{ROW}/output/token_ids")

        def array(file: h5py.File) -> None:
            del file[f"{ROW}/points"]
            file[f"{ROW}/points"] = np.zeros(3)

        def circle(file: h5py.File) -> None:
            del file[f"{ROW}/points"]
            file[f"{ROW}/points"] = file["traces"]

        assert "an array is expected" in refusal(tampered(group))
        assert "a group is expected" in refusal(tampered(array))
        assert "linked more than once" in refusal(tampered(circle))

    def test_newer_versions(self, tmp_path: Path, whole: bytes) -> None:
        path = tmp_path / "newer.h5"
        for version in ("2.0", "1.9"):
            path.write_bytes(whole)
            with h5py.File(path, "r+") as file:
                set_attribute(file, "/", "format_version", np.bytes_(version.encode()))
                file["traces/000000/output/topk_ids"] = np.zeros((8, 5))
                file["traces/000000"].attrs["mood"] = "fine"
                file.create_group("new_in_later_versions")
            write_seal(path, KIND, version)
            if version == "2.0":
                assert f"format 2.0, and this version of lvlm_probe reads up to {VERSION}; upgrade" in refusal(path)
            else:
                open_trace(path).verify()

    def test_image_bombs(self, tampered: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
        import hashlib
        import struct
        import zlib

        def png(width: int, height: int) -> bytes:
            def chunk(kind: bytes, data: bytes) -> bytes:
                return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

            head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
            return (
                b"\x89PNG\r\n\x1a\n"
                + chunk(b"IHDR", head)
                + chunk(b"IDAT", zlib.compress(bytes(1000)))
                + chunk(b"IEND", b"")
            )

        def bomb(file: h5py.File, data: bytes, width: int, height: int) -> None:
            key = f"{ROW}/images/000"
            replace(file, key, data=np.frombuffer(data, "u1"))
            set_attribute(file, key, "sha256", np.bytes_(hashlib.sha256(data).hexdigest().encode()))
            set_attribute(file, key, "width", np.int64(width))
            set_attribute(file, key, "height", np.int64(height))

        honest = png(1_000_000, 1_000_000)
        assert "pixels" in refusal(tampered(lambda file: bomb(file, honest, 1_000_000, 1_000_000)))
        # Data pipelines often lift Pillow's own limit; ours holds.
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        middling = png(15_000, 14_000)
        assert "pixels, more than" in refusal(tampered(lambda file: bomb(file, middling, 15_000, 14_000)))
        assert "declared 24x18" in refusal(tampered(lambda file: bomb(file, png(3000, 3000), 24, 18)))
        assert "cannot be decoded" in refusal(tampered(lambda file: bomb(file, b"%!PS-Adobe-3.0 EPSF-3.0\n", 24, 18)))
        assert "cannot be decoded" in refusal(tampered(lambda file: bomb(file, png(24, 18)[:60], 24, 18)))

    def test_small_files_do_not_become_large(self, tampered: Callable[..., Path]) -> None:
        """One member under many names, one place in the file under many headers, images of nothing but one colour."""

        def linked(key: str, count: int) -> Callable[[h5py.File], None]:
            def change(file: h5py.File) -> None:
                group = key.rpartition("/")[0]
                for number in range(count):
                    file[group][f"{number + 500:06d}"] = file[key]

            return change

        def rows(file: h5py.File) -> None:
            linked("traces/000000", 20)(file)
            for number in range(2, 22):
                file["traces"].move(f"{number + 498:06d}", f"{number:06d}")
            file["traces"].attrs["rows"] = np.int64(22)

        assert "linked more than once" in refusal(tampered(linked(f"{ROW}/points/decoder.attention", 3)))
        assert "linked more than once" in refusal(tampered(linked(f"{ROW}/inputs/model_kwargs/pixel_values", 3)))
        assert "more than 4096 members" in refusal(tampered(linked(f"{ROW}/points/decoder.attention", 5000)))
        many = tampered(rows)
        assert "linked more than once" in refusal(many)
        with pytest.raises(TraceError, match="linked more than once"):
            open_store(many).find()
        claimed = tampered(lambda file: set_attribute(file, "traces", "rows", np.int64(10_000)))
        assert "more than a file of" in refusal(claimed)

    def test_members_are_no_larger_than_the_file_together(self, tampered: Callable[..., Path]) -> None:
        """Headers that point at the same bytes: each member fits, and all of them together are more than there is."""
        names = ["a", "b"]

        def change(file: h5py.File) -> None:
            for name in names:
                file[f"{ROW}/inputs/model_kwargs/{name}"] = np.zeros(30_000, "f4")

        path = tampered(change)
        with h5py.File(path, "r") as opened:
            sealed = SealedFile(path, opened, 200_000)
            assert sealed.array(f"{ROW}/inputs/model_kwargs/a").nbytes == 120_000
            assert sealed.array(f"{ROW}/inputs/model_kwargs/a").nbytes == 120_000  # the same one again
            with pytest.raises(TraceError, match="240000 bytes together in a file of 200000"):
                sealed.array(f"{ROW}/inputs/model_kwargs/b")

    @pytest.mark.parametrize("target", ["fifo", "missing.h5"])
    def test_an_unlimited_virtual_dataset_opens_nothing(
        self, tampered: Callable[..., Path], tmp_path: Path, target: str
    ) -> None:
        def change(file: h5py.File) -> None:
            layout = h5py.VirtualLayout((1,), "u1", maxshape=(None,))
            source = h5py.VirtualSource(str(tmp_path / target), "x", (64,), maxshape=(None,))
            layout[0 : h5py.h5s.UNLIMITED] = source[0 : h5py.h5s.UNLIMITED]
            attrs = dict(file[f"{ROW}/output/special"].attrs)
            del file[f"{ROW}/output/special"]
            file.create_virtual_dataset(f"{ROW}/output/special", layout).attrs.update(attrs)

        path = tampered(change)
        if target == "fifo":
            os.mkfifo(tmp_path / "fifo")  # to open it would be to wait for ever
        assert "in another file" in refusal(path)
        errors: list[TraceError] = []
        assert open_store(path).find(on_error=errors.append) == []
        assert "in another file" in str(errors[0])

    def test_images_that_are_large_from_little(self, tampered: Callable[..., Path]) -> None:
        def one_colour(count: int, side: int) -> Callable[[h5py.File], None]:
            buffer = io.BytesIO()
            Image.new("1", (side, side)).save(buffer, "PNG")
            data = buffer.getvalue()

            def change(file: h5py.File) -> None:
                for number in range(count):
                    key = f"{ROW}/images/{number:03d}"
                    replace(file, key, data=np.frombuffer(data, "u1"))
                    for name, value in (("width", np.int64(side)), ("height", np.int64(side))):
                        set_attribute(file, key, name, value)
                    set_attribute(file, key, "mime", np.bytes_(b"image/png"))
                    set_attribute(file, key, "sha256", np.bytes_(hashlib.sha256(data).hexdigest().encode()))

            return change

        assert "pixels, more than 40000000, in 1 image" in refusal(tampered(one_colour(1, 7000)))
        several = tampered(one_colour(30, 2000))
        assert "pixels, more than 100000000, in 30 images" in refusal(several)
        trace = open_trace(several)
        assert trace.image.size == (2000, 2000)  # one of them is no more than it is
        assert "data:image/png" in trace._repr_html_()

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (b'{"a": NaN}', "NaN is no number"),
            (b'{"a": -Infinity}', "no number in JSON"),
            (b'{"a": 1e999}', "larger than a float"),
            (b'{"a": ' + b"9" * 400 + b"}", "400 digits"),
            (b'{"a": 1, "a": 2}', "same name twice"),
            (b'{"a":' * 65 + b"1" + b"}" * 65, "more than 64 levels"),
            (b'{"a":' * 64 + b"1" + b"}" * 64, ""),
            (b'{"a": ' + b"9" * 300 + b"}", ""),
        ],
    )
    def test_json_beyond_its_standard(self, tampered: Callable[..., Path], text: bytes, expected: str) -> None:
        for key in ("seconds", f"{ROW}/meta"):
            path = tampered(lambda file, key=key: replace(file, key, data=np.bytes_(text)))
            if expected:
                assert expected in refusal(path)
            else:
                trace = open_trace(path)
                trace.verify()
                assert trace.describe()
                assert trace._repr_html_()

    def test_a_name_that_is_no_text_spoils_one_file_only(
        self, tampered: Callable[..., Path], tmp_path: Path, whole: bytes
    ) -> None:
        path = tampered(lambda file: file[f"{ROW}/points"].create_dataset(b"\xff\xfe", data=np.zeros(3, "f4")))
        assert "UnicodeDecodeError" in refusal(path)
        (tmp_path / "good.h5").write_bytes(whole)
        odd = tmp_path / os.fsdecode(b"\xff.h5")
        odd.write_bytes(whole[:-1])
        os.mkfifo(tmp_path / "pipe.h5")
        (tmp_path / "gone.h5").symlink_to(tmp_path / "nowhere")
        errors: list[TraceError] = []
        found = open_store(tmp_path).find(on_error=errors.append)
        assert {summary.path.name for summary in found} == {"good.h5"}
        assert len(errors) == 4
        for error in errors:
            str(error).encode("utf-8")  # can be printed


class TestLongTexts:
    """Work grows with the length of a text and not with its square: counted in looks at a character."""

    @pytest.mark.parametrize("letter", ["a", "\u0301", "-", "字", " ", "\n", "\x1b"])
    def test_describing_is_linear(
        self, tampered: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, letter: str
    ) -> None:
        looks = 0
        real = unicodedata.category

        def counting(char: str) -> str:
            nonlocal looks
            looks += 1
            return real(char)

        def change(file: h5py.File) -> None:
            for name in ("token_ids", "special", "log_probs", "top_log_probs", "baseline_log_probs"):
                replace(file, f"{ROW}/output/{name}", data=np.zeros(2, file[f"{ROW}/output/{name}"].dtype))
            text = json.dumps(["x", letter * 200_000], ensure_ascii=False).encode()
            replace(file, f"{ROW}/output/pieces", data=np.bytes_(text))
            replace(file, f"{ROW}/output/top_pieces", data=np.bytes_(json.dumps(["x", "y"])))
            replace(file, f"{ROW}/inputs/question", data=np.bytes_(json.dumps(letter * 600_000).encode()))
            del file[f"{ROW}/points"]
            file.create_group(f"{ROW}/points")

        trace = open_trace(tampered(change))
        trace.verify()
        monkeypatch.setattr(unicodedata, "category", counting)
        text, card = trace.describe(), trace._repr_html_()
        assert looks < 500_000
        assert "more characters)" in " ".join(text.split())
        assert max(map(len, text.splitlines())) <= 300  # combining marks take no column
        assert len(card) < 200_000
        assert "\x1b" not in text + card


class TestTheMachineIsToBlame:
    """A whole file that cannot be read here and now is never called damaged."""

    @pytest.mark.parametrize(
        ("number", "words"),
        [
            (errno.EMFILE, "too many files open"),
            (errno.EACCES, "permission is denied"),
            (errno.EIO, "input/output error"),
        ],
    )
    def test_opening(
        self, tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch, number: int, words: str
    ) -> None:
        path = tmp_path / "whole.h5"
        path.write_bytes(whole)

        def refuse(*_: object, **__: object) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "open", refuse)
        message = refusal(path)
        assert words in message
        assert "damaged" not in message
        assert "record it again" not in message

    @pytest.mark.parametrize(
        "error", [MemoryError(), OSError(errno.EIO, os.strerror(errno.EIO))], ids=["memory", "EIO"]
    )
    def test_reading(self, tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        path = tmp_path / "whole.h5"
        path.write_bytes(whole)

        def refuse(*_: object) -> object:
            raise error

        monkeypatch.setattr(h5py.Dataset, "__getitem__", refuse)
        message = refusal(path)
        assert ("not enough memory" if isinstance(error, MemoryError) else "input/output error") in message
        assert "damaged" not in message
        assert "record it again" not in message


class TestStores:
    def test_a_store_with_one_bad_file_reads_the_others(self, tmp_path: Path, whole: bytes) -> None:
        write(sample_capture(seed=1), tmp_path)
        bad = write(sample_capture(seed=2), tmp_path)
        write(sample_capture(seed=3), tmp_path)
        bad.write_bytes(bad.read_bytes()[:5000])
        read = []
        for trace in open_store(tmp_path):
            try:
                read.append(trace.trace_id)
            except TraceError as error:
                read.append(bad.name if bad.name in str(error) else "?")
        assert read == ["sample-1-r0", bad.name, "sample-3-r0"]


def _outcome(path: Path) -> str:
    try:
        for row in (0, 1):
            open_trace(path, row).verify()
    except TraceError:
        return "TraceError"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "reads"


def test_hostile_files_never_crash_hang_grow_or_raise_anything_else() -> None:
    """A few hundred; ``python tests/campaigns/run.py --only files`` reads as many as one likes."""
    tally = hostile.damaged(0, 200, 0)
    assert tally.tried == 200
    assert not tally.broken, tally.examples
    assert tally.counts["refused"] > 80
    assert tally.counts["read"] > 20


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "crashes"),
        (lambda: [][0], "a foreign exception"),
        (lambda: np.ones(2 * 10**8, np.float32), "big"),
        (lambda: sum(range(3 * 10**7)), "slow"),
    ],
    ids=["crash", "exception", "memory", "time"],
)
def test_the_campaign_would_notice(monkeypatch: pytest.MonkeyPatch, fault: Callable[[], object], expected: str) -> None:
    def read(path: Path, kind: str, rng: random.Random | None) -> str:
        if rng is not None:  # what is damaged
            fault()
        return "read"

    if expected == "slow":
        monkeypatch.setattr(hostile, "Limits", functools.partial(hostile.Limits, slow=0.1))
    monkeypatch.setattr(hostile, "read_all", read)
    tally = hostile.damaged(0, 1, 0)
    assert dict(tally.broken) == {expected: 1}, tally.examples
    assert len(tally.examples) == 1


@pytest.mark.parametrize("every", [4, *campaign(1)])
def test_a_text_of_an_unknown_character_set(every: int, tmp_path: Path, whole: bytes) -> None:
    """Found by the test above: h5py raised a TypeError where only the size of the text was asked for."""
    path = tmp_path / "odd.h5"
    outcomes: Counter[str] = Counter()
    for start, _, end in list(metadata_blocks(whole))[::every]:
        # Datatype message of a string (class 3, version 1), padded with NUL, in UTF-8.
        position = whole.find(b"\x13\x11\x00\x00", start, end)
        if position >= 0:
            blob = bytearray(whole)
            blob[position + 1] |= 0xE0
            blob[end : end + 4] = lookup3(bytes(blob[start:end])).to_bytes(4, "little")
            path.write_bytes(blob)
            write_seal(path, KIND, VERSION)
            outcomes[_outcome(path)] += 1
    assert set(outcomes) == {"TraceError", "reads"}, outcomes


def test_the_forger_knows_the_checksum() -> None:
    # The values that Jenkins prints in lookup3.c.
    assert lookup3(b"") == 0xDEADBEEF
    assert lookup3(b"Four score and seven years ago") == 0x17770551
