"""Changes that a forger makes to a good file with h5py: each is known to be dangerous to some reader.

``campaigns.hostile`` damages files at random beside these, and reads them in children that may die.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

from lvlm_probe.trace.fields import Array, Json
from lvlm_probe.trace.records import FIELDS, MODEL_JSON

__all__ = ["forge_members"]

ROW = "traces/000000"
Change = Callable[[h5py.File, random.Random, Path], None]


def forge_members(path: Path, kind: str, rng: random.Random, secret: Path) -> None:
    """Changes a good file of a kind, one to three times; links lead to ``secret``, a folder that nobody may open."""
    changes = CHANGES if kind == "lvlm_probe.trace" else HEAT_CHANGES
    with h5py.File(path, "r+") as file:
        for change in rng.choices(changes, k=rng.choice([1, 1, 1, 2, 3])):
            try:
                change(file, rng, secret)
            except (KeyError, ValueError, TypeError, OSError, RuntimeError, AttributeError, IndexError, MemoryError):
                continue  # what an earlier change left cannot be changed like that


_TEXTS = [
    "", "a", "-" * 30_000, "a\u0301" * 5000, "\x1b]0;x\x07", "\u202e", "\u0000", "\ud800", "字" * 3000, " " * 10_000,
    "\n" * 20_000, "<script>", "\ufffd" * 20_000, "é", "../../x", "nan",
]  # fmt: skip
_NUMBERS = [0, 1, -1, 2**31, 2**63 - 1, -(2**63), 0.5, 1e308, 10**300, 1e-320]


def _value(rng: random.Random, depth: int = 0) -> Any:
    pick = rng.randrange(9 if depth < 3 else 6)
    if pick < 2:
        return rng.choice(_TEXTS)
    if pick < 4:
        return rng.choice(_NUMBERS)
    if pick < 6:
        return rng.choice([None, True, False])
    if pick == 6:
        return {str(rng.choice(_TEXTS))[:50]: _value(rng, depth + 1) for _ in range(rng.randrange(5))}
    return [_value(rng, depth + 1) for _ in range(rng.randrange(6))]


def _json(rng: random.Random) -> bytes:
    made: list[Callable[[], bytes]] = [
        lambda: json.dumps(_value(rng)).encode("utf-8", "surrogatepass"),
        lambda: b"[" * (n := rng.choice([10, 63, 64, 65, 900, 100_000])) + b"]" * n,
        lambda: b'{"a":' * (n := rng.choice([10, 64, 65, 400])) + b"1" + b"}" * n,
        lambda: rng.choice([b"NaN", b"-Infinity", b"1e999", b"[NaN]", b'{"a": 1e400}', b"-0", b"1E2"]),
        lambda: b'{"generate": ' + b"9" * rng.choice([299, 300, 301, 400, 5000]) + b"}",
        lambda: b'{"a": 1, "a": 2}',
        lambda: b"[" + b",".join([rng.choice([b"[]", b"{}", b"0", b'""'])] * rng.choice([10, 200_000])) + b"]",
        lambda: json.dumps("a" * rng.choice([100, 70_000, 4_000_000])).encode(),
        lambda: rng.randbytes(rng.choice([1, 20, 300])),
        lambda: b'"\\ud800"',
        lambda: b"\xff",
        lambda: b" " * 70_000 + b"1",
    ]
    return rng.choice(made)()


def _put(file: h5py.File, key: str, **settings: Any) -> None:
    attrs = dict(file[key].attrs) if key in file else {}
    if key in file:
        del file[key]
    made = file.create_dataset(key, **settings)
    for name, value in attrs.items():
        made.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else value


def _all_members(file: h5py.File) -> list[str]:
    names: list[str] = []
    file.visit(names.append)
    return names


def change_json(file: h5py.File, rng: random.Random, secret: Path) -> None:
    keys = [f"{ROW}/{field.key}" for field in FIELDS.values() if isinstance(field, Json)]
    keys += [*(f"model/{name}" for name in (*MODEL_JSON, "more")), "seconds"]
    _put(file, rng.choice(keys), data=np.bytes_(_json(rng)))


def change_array(file: h5py.File, rng: random.Random, secret: Path) -> None:
    names = [name for name in _all_members(file) if isinstance(file.get(name), h5py.Dataset)]
    key = rng.choice(names)
    shape = rng.choice(
        [(), (0,), (1,), (8,), (6,), (6, 4), (2**40,), (2**31, 2**31), (1,) * 9, (1000, 1000), (8, 2, 1, 6)]
    )
    dtype = rng.choice(["u1", "i1", "i4", ">i4", "i8", "f2", "f4", "f8", "c8", "S5", "V3", "?"])
    settings: dict[str, Any] = {"shape": shape, "dtype": dtype}
    if np.prod([float(side) for side in shape]) < 1e7 and rng.random() < 0.7:
        settings = {"data": np.array(np.random.default_rng(rng.randrange(99)).integers(0, 256, shape), dtype)}
        if rng.random() < 0.2 and dtype[0] in "f":
            settings["data"][...] = rng.choice([np.nan, np.inf, -np.inf])
    if shape and rng.random() < 0.3:
        settings["chunks"] = tuple(max(1, min(side, rng.choice([1, 4, 100_000]))) for side in shape)
    if shape and rng.random() < 0.2:
        settings["compression"] = rng.choice(["gzip", "lzf"])
    _put(file, key, **settings)


def change_attribute(file: h5py.File, rng: random.Random, secret: Path) -> None:
    key = rng.choice(["/", *_all_members(file)])
    names = list(file[key].attrs) or ["encoding_version"]
    values: list[Any] = [
        np.bytes_(str(rng.choice(_TEXTS)).encode("utf-8", "replace")[:60_000] or b"x"),
        np.bytes_(b"\xff\xfe"),
        np.int64(int(rng.choice(_NUMBERS[:6]))) if rng.random() < 0.9 else np.uint64(2**64 - 1),
        np.float64(rng.choice([np.nan, np.inf, 1.5])),
        np.zeros(rng.choice([0, 3, 7000]), rng.choice(["i4", "f4", "u1"])),
        h5py.Empty(rng.choice(["i4", "S1"])),
        "variable length",
        np.zeros(2, [("a", "i4")]),
        np.bool_(True),
        np.bytes_(b"step,layer,head"),
        np.bytes_(b"2.0"),
    ]
    name = rng.choice(names)
    del file[key].attrs[name]
    file[key].attrs[name] = rng.choice(values)


def change_link(file: h5py.File, rng: random.Random, secret: Path) -> None:
    members = _all_members(file)
    key, other = rng.choice(members), rng.choice(["/", *members])
    links: list[Callable[[], Any]] = [
        lambda: h5py.SoftLink("/" + other),
        lambda: h5py.ExternalLink("/dev/zero", other),
        lambda: h5py.ExternalLink(str(secret / "other.h5"), "x"),
        lambda: file[other],
        lambda: file[other],
        lambda: np.dtype("i4"),
    ]
    made = rng.choice(links)()
    del file[key]
    if rng.random() < 0.85:
        file[key] = made


def change_names(file: h5py.File, rng: random.Random, secret: Path) -> None:
    group = file[rng.choice([f"{ROW}/points", f"{ROW}/inputs/model_kwargs", f"{ROW}/images", ROW, "traces", "/"])]
    name = rng.choice(
        [b"\xff\xfe", b"a b", b"\x1b[2J", b"x" * 5000, b"001", b"..", "字".encode(), b"decoder.cross_attention"]
    )
    made = group.create_dataset(name, data=np.zeros(3, "f4"))
    for attribute, value in (("axes", b"x"), ("dtype", b"float32")):
        made.attrs.create(attribute, np.bytes_(value))
    made.attrs.create("layers", np.zeros(0, "i4"))


def change_many(file: h5py.File, rng: random.Random, secret: Path) -> None:
    count = rng.choice([3, 3, 3, 300, 300, 6000])
    at, first = rng.choice(
        [
            (f"{ROW}/points", "decoder.attention"),
            (f"{ROW}/inputs/model_kwargs", "pixel_values"),
            (f"{ROW}/images", "000"),
            ("traces", "000000"),
        ]
    )
    group, copies = file[at], rng.random() < 0.3
    for number in range(1, min(count, 300) if copies else count):
        name = f"{number:06d}" if at == "traces" else f"{number:03d}"
        if name not in group:
            if copies:
                file.copy(group[first], group, name)
            else:
                group[name] = group[first]
    if at == "traces":
        group.attrs["rows"] = np.int64(count)


def change_elsewhere(file: h5py.File, rng: random.Random, secret: Path) -> None:
    key = f"{ROW}/{rng.choice([field.key for field in FIELDS.values() if isinstance(field, Array)])}"
    count, dtype = len(file[key]), file[key].dtype
    if rng.random() < 0.4:
        _put(
            file,
            key,
            shape=(count,),
            dtype=dtype,
            external=[(rng.choice([str(secret / "raw"), "/dev/zero"]), 0, 4 * count)],
        )
        return
    attrs = dict(file[key].attrs)
    del file[key]
    unlimited = rng.random() < 0.5
    layout = h5py.VirtualLayout((1 if unlimited else count,), dtype, maxshape=(None,) if unlimited else None)
    source = h5py.VirtualSource(str(secret / "other.h5"), "x", (64,), maxshape=(None,))
    if unlimited:
        layout[0 : h5py.h5s.UNLIMITED] = source[0 : h5py.h5s.UNLIMITED]
    else:
        layout[:] = source[:count]
    made = file.create_virtual_dataset(key, layout)
    for name, value in attrs.items():
        made.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else value


def change_image(file: h5py.File, rng: random.Random, secret: Path) -> None:
    data = bytearray(rng.choice(_images()))
    if rng.random() < 0.03:
        data = bytearray(_large_image(*rng.choice([("1", 6000), ("1", 13_370), ("L", 6300), ("RGB", 6300)])))
    for _ in range(rng.choice([0, 1, 2, 8, 30])):
        data[rng.randrange(len(data))] = rng.choice([0, 255, rng.randrange(256)])
    if rng.random() < 0.1:
        data = data[: rng.randrange(1, len(data))]
    size = (24, 18)
    try:
        Image.MAX_IMAGE_PIXELS = None
        with Image.open(io.BytesIO(data)) as image:
            size = image.size
    except Exception:
        pass
    key = f"{ROW}/images/000"
    _put(file, key, data=np.frombuffer(bytes(data), "u1"))
    file[key].attrs["sha256"] = np.bytes_(hashlib.sha256(data).hexdigest().encode())
    file[key].attrs["width"], file[key].attrs["height"] = (np.int64(side) for side in size)


def change_answer(file: h5py.File, rng: random.Random, secret: Path) -> None:
    """An answer of another length, of any text and any numbers, in itself without a fault."""
    steps = rng.choice([0, 1, 3, 3, 500, 500, 20_000] if rng.random() < 0.3 else [0, 1, 3])
    texts = (
        [*_TEXTS[:6], *_TEXTS[8:9], " a", ".", "b", "\u0301"]
        if steps < 10
        else [" a", ".", "b", "\u0301", "", "字", "é"]
    )
    arrays: dict[str, Any] = {
        "token_ids": np.full(steps, rng.choice([0, 5, -1, 2**31 - 1]), "i4"),
        "special": np.full(steps, rng.choice([0, 0, 1, 255]), "u1"),
        "log_probs": np.full(steps, rng.choice([-1.0, np.nan, -np.inf, np.inf, 1e38]), "f4"),
        "baseline_log_probs": np.full(steps, rng.choice([-4.0, np.nan, -np.inf, -1e38]), "f4"),
    }
    for name, values in arrays.items():
        _put(file, f"{ROW}/output/{name}", data=values)
    pieces = [rng.choice(texts) for _ in range(steps)]
    _put(file, f"{ROW}/output/pieces", data=np.bytes_(json.dumps(pieces).encode()))
    del file[f"{ROW}/points"]
    file.create_group(f"{ROW}/points")


CHANGES: list[Change] = [
    change_json, change_json, change_array, change_attribute, change_link, change_names, change_many, change_elsewhere,
    change_image, change_image, change_answer,
]  # fmt: skip


def change_heat_settings(file: h5py.File, rng: random.Random, secret: Path) -> None:
    if rng.random() < 0.3:
        _put(file, "attrs", data=np.bytes_(_json(rng)))
        return
    record = json.loads(bytes(file["attrs"][()]))
    for _ in range(rng.choice([1, 2])):
        name = rng.choice(list(record))
        record[name] = _value(rng)
    if rng.random() < 0.5:
        record["image_size"] = [rng.choice([0, 1, -3, 24, 5000, 2**20, 2**40, "9", None, 1.5]) for _ in range(2)]
    if rng.random() < 0.2:
        record["trace_path"] = rng.choice(["/dev/zero", "/proc/self/mem", ".", "\x00", "x" * 5000, "/etc/passwd"])
    _put(file, "attrs", data=np.bytes_(json.dumps(record).encode()))


def change_heat_values(file: h5py.File, rng: random.Random, secret: Path) -> None:
    shape = rng.choice([(0, 0), (1, 1), (6, 8), (48,), (2, 3, 4), (1, 300_000), (1000, 1000)])
    fill = rng.choice([0.0, 0.5, 1.0, 2.0, -1.0, np.nan, np.inf])
    for name, dtype in (("values", rng.choice(["f4", "f8", "u1", "f2"])), ("seen", rng.choice(["u1", "f4"]))):
        if rng.random() < 0.8:
            _put(file, f"arrays/{name}", data=np.full(shape, 1 if dtype[0] == "u" else fill, dtype))


HEAT_CHANGES: list[Change] = [
    change_heat_settings,
    change_heat_settings,
    change_heat_values,
    change_array,
    change_attribute,
    change_link,
]


@functools.cache
def _images() -> list[bytes]:
    """One small picture in every format that is read, in several modes."""
    found = []
    x, y = np.meshgrid(np.arange(24), np.arange(18))
    picture = Image.fromarray(np.stack([x * 9, y * 13, (x + y) * 5], -1).astype(np.uint8), "RGB")
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"):
        for mode in ("RGB", "L", "P", "1", "RGBA"):
            buffer = io.BytesIO()
            try:
                picture.convert(mode).save(buffer, form)
            except (OSError, KeyError, ValueError):
                continue
            found.append(buffer.getvalue())
    return found


@functools.cache
def _large_image(mode: str, side: int) -> bytes:
    """A picture of one colour: many pixels in few bytes."""
    buffer = io.BytesIO()
    Image.new(mode, (side, side)).save(buffer, "PNG")
    return buffer.getvalue()
