"""Files of strangers: every one reads fine or is refused in words, soon, with little memory, and opens nothing else.

Each unit is one trace or heatmap file, damaged as its number says: raw bytes behind a valid seal, HDF5's own metadata
with renewed checksums, members changed with h5py (types, shapes, links, storage elsewhere), JSON texts exchanged for
odd ones, or the seal itself. All of it is read once, and then in some of the many ways there are.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import shutil
import struct
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import report_samples
import torch
from forgery import metadata_blocks, mutate, mutate_metadata, write_seal
from trace_samples import sample_capture, sample_image

import lvlm_probe as probe
from campaigns.forged import forge_members
from campaigns.forked import Limits, in_forks
from campaigns.tally import Campaign, Tally
from lvlm_probe.errors import ProbeError
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.trace import Trace, open_store, open_trace, write
from lvlm_probe.trace.schema import FORMAT, FORMAT_VERSION
from lvlm_probe.trace.stored import Kept

__all__ = ["CAMPAIGNS", "damaged", "odd_json"]

ODD_NAME = "odd.h5"

FIELDS = sorted(
    name for name in dir(Trace)
    if not name.startswith("_") and isinstance(getattr(Trace, name), (property, Kept))
)  # fmt: skip


class Sources:
    """Good files, and a folder of files that no reader has any business with."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.secret = folder / "secret"
        self.secret.mkdir()
        with h5py.File(self.secret / "other.h5", "w") as other:
            other["x"] = np.arange(8, dtype="i4")
            other.create_dataset("long", data=np.arange(8, dtype="i4"), maxshape=(None,))
        (self.secret / "raw").write_bytes(bytes(4096))
        small = sample_image(64, 48)
        heat = report_samples.heat(report_samples.trace(images=[small]))
        trace = write(sample_capture(1), folder / "good").read_bytes()
        kept = heat.write(folder / "good" / "map.h5").read_bytes()
        self.files = {"lvlm_probe.trace": trace, "lvlm_probe.heatmap": kept}
        self.blocks = {kind: metadata_blocks(data) for kind, data in self.files.items()}


# ----------------------------------------------------------------------------------------------------------- the damage


def odd_json(rng: random.Random, text: str) -> bytes:
    """A JSON text with something odd in it."""
    kinds: list[Callable[[], str]] = [
        lambda: "[" * rng.choice([50, 2_000, 100_000]),
        lambda: "[" * 900 + "]" * 900,
        lambda: rng.choice(["1e999", "-1e999", "1" * 400, "-" + "9" * 5_000, "NaN", "Infinity", "1e-400", "-0.0"]),
        lambda: json.dumps("a" * rng.choice([2_000, 20_000, 200_000])),
        lambda: json.dumps(["-" * 300] * rng.choice([10, 1_000])),
        lambda: '"\\ud800"',
        lambda: json.dumps("\x1b]0;x\x07\u202e" * 50),
        lambda: json.dumps({str(n): n for n in range(rng.choice([10, 5_000]))}),
        lambda: rng.choice(["null", "true", "{}", "[]", '""', "0", "[[]]", '{"": ""}', "[null]", "\x00", ""]),
        lambda: text[: rng.randrange(len(text) + 1)],
        lambda: text.replace(rng.choice("0123456789") or "0", rng.choice(["null", "-1", "1e300", '"x"', "[]"]), 3),
        lambda: json.dumps(_changed(rng, json.loads(text))),
    ]
    with contextlib.suppress(ValueError, RecursionError):
        return rng.choice(kinds)().encode("utf-8", "replace")
    return rng.randbytes(40)


def _changed(rng: random.Random, value: Any) -> Any:
    """JSON with one of its values exchanged."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        return {**value, name: _changed(rng, value[name])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        return [*value[:place], _changed(rng, value[place]), *value[place + 1 :]]
    return rng.choice([None, True, -1, 2**70, 1e308, "", "x" * 3_000, [], {}, [[1]], {"a": {"b": [1, 2]}}, "\n\x1b[2J"])


def _members(file: h5py.File) -> list[str]:
    names: list[str] = []
    file.visit(names.append)
    return names


def _replaced(file: h5py.File, key: str, **settings: Any) -> None:
    attrs = dict(file[key].attrs)
    del file[key]
    file.create_dataset(key, **settings).attrs.update(attrs)


def _h5py_change(rng: random.Random, file: h5py.File, secret: Path) -> None:
    """One change that a forger makes with h5py."""
    members = _members(file)
    if not members:  # an earlier change has taken them all
        return
    key = rng.choice(members)
    thing = file[key]
    kind = rng.randrange(13)
    if kind == 0:
        del file[key]
    elif kind == 1 and len(thing.attrs):
        name = rng.choice(list(thing.attrs))
        odd = [np.int64(-1), np.int64(2**62), np.float64("nan"), np.bytes_(b""), np.bytes_(b"\xff\xfe"), np.zeros(3)]
        value = rng.choice([*odd, np.bytes_(b"x" * 2_000), np.bytes_(b"../../etc/passwd"), h5py.Empty("f4")])
        del thing.attrs[name]
        thing.attrs[name] = value
    elif kind == 2:
        links: list[Any] = [
            h5py.SoftLink("/"),
            h5py.SoftLink(f"/{key}"),
            h5py.ExternalLink(str(secret / "other.h5"), "x"),
        ]
        del file[key]
        file[key] = rng.choice(links)
    elif kind == 3 and "/" in key:
        for number in range(rng.choice([1, 10, 1_500])):
            file[f"{key.rpartition('/')[0]}/more{number:05d}"] = thing
    elif kind == 4:
        layout = h5py.VirtualLayout((8,), "i4", maxshape=(None,) if (endless := rng.random() < 0.5) else None)
        source = h5py.VirtualSource(str(secret / "other.h5"), "long" if endless else "x", (8,), maxshape=(None,))
        if endless:
            layout[0 : h5py.h5s.UNLIMITED : 1] = source[0 : h5py.h5s.UNLIMITED : 1]
        else:
            layout[:] = source
        del file[key]
        file.create_virtual_dataset(key, layout)
    elif kind == 5:
        del file[key]
        file.create_dataset(key, shape=(8,), dtype="i4", external=[(str(secret / "raw"), 0, 4096)])
    elif isinstance(thing, h5py.Dataset):
        _dataset_change(rng, file, key, kind)
    else:
        file[f"{key}/odd{rng.randrange(9)}"] = np.zeros(rng.choice([0, 1, 3, 50_000]))


def _dataset_change(rng: random.Random, file: h5py.File, key: str, kind: int) -> None:
    thing = file[key]
    if thing.dtype.kind == "S" and (kind < 11 or thing.shape == ()):
        text = thing[()] if thing.shape == () else b"{}"
        _replaced(file, key, data=np.bytes_(odd_json(rng, text.decode("utf-8", "replace"))))
    elif kind == 6:
        shape = rng.choice([(), (0,), (1,), (2**40,), (2**16, 2**16), (1, 1, 1, 1, 1), (3, 0)])
        _replaced(file, key, shape=shape, dtype=thing.dtype if thing.dtype.kind in "iuf" else "f4")
    elif kind == 7:
        _replaced(file, key, data=np.asarray(rng.choice([[np.nan], [np.inf], [-1], [2**31], [1e38]])).repeat(8))
    elif kind == 8 and thing.shape:
        _replaced(file, key, shape=(2**34,), dtype="u1", chunks=(2**20,), compression="gzip")
    elif kind == 9:
        _replaced(file, key, data=["text", "of", "its", "own"], dtype=h5py.string_dtype())
    elif kind == 10:
        _replaced(file, key, data=np.array([file.ref] * 4, dtype=h5py.ref_dtype))
    elif kind == 11 and thing.dtype.kind in "iuf" and thing.shape and thing.nbytes < 2**26:  # no bomb of before
        values = np.array(thing[()])
        flat = values.reshape(-1)
        for _ in range(min(3, flat.size)):
            with np.errstate(all="ignore"):
                flat[rng.randrange(flat.size)] = np.asarray(rng.choice([-1, 0, 2**31 - 1, 255, 1e30])).astype(
                    flat.dtype
                )
        _replaced(file, key, data=values)
    else:
        _replaced(file, key, data=_png(rng.choice([1, 24, 3_000, 13_000]), rng.choice([1, 18, 3_000, 13_000])))


def _png(width: int, height: int) -> np.ndarray:
    """A picture of one bit per pixel, small in a file and large in memory."""
    import zlib

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", rows) + part(b"IEND", b"")
    return np.frombuffer(data, "u1")


WAYS = ("raw", "metadata", "members", "forged", "seal")
SHARES = (0.36, 0.27, 0.24, 0.1, 0.03)


def forge(path: Path, sources: Sources, rng: random.Random) -> str:
    """Write a damaged file; returns how it was damaged."""
    kind = rng.choices(list(sources.files), (0.8, 0.2))[0]
    data = sources.files[kind]
    way = rng.choices(WAYS, SHARES)[0]
    if way == "raw":
        path.write_bytes(mutate(data, rng))
    elif way == "metadata":
        path.write_bytes(mutate_metadata(data, sources.blocks[kind], rng))
    elif way == "members":
        path.write_bytes(data)
        with h5py.File(path, "r+") as file:
            for _ in range(rng.choice([1, 1, 2, 3])):
                with contextlib.suppress(
                    KeyError, ValueError, TypeError, OSError, RuntimeError, OverflowError, MemoryError
                ):
                    _h5py_change(rng, file, sources.secret)
    elif way == "forged":
        path.write_bytes(data)
        forge_members(path, kind, rng, sources.secret)
    else:
        head = bytearray(data)
        for _ in range(rng.choice([1, 3])):
            head[rng.randrange(200)] = rng.randrange(256)
        path.write_bytes(bytes(head[: rng.choice([len(head), rng.randrange(len(head))])]))
        return f"{way} {kind}"
    write_seal(path, kind, FORMAT_VERSION if kind == FORMAT else "1.0")
    return f"{way} {kind}"


# ---------------------------------------------------------------------------------------------------------- the reading


DRAWN = 3
"""Ways of reading, beside ``verify()``, that are drawn for each file: all of them would take five times as long."""


def ways(thing: Any, path: Path) -> list[Callable[[], Any]]:
    """Every way to read a trace or a heatmap."""
    store: list[Callable[[], Any]] = [
        lambda: open_store(path.parent).find(on_error=lambda *_: None),
        lambda: list(open_store(path.parent)),
    ]
    if isinstance(thing, Heatmap):
        page = path.parent / "page.html"
        return [thing._repr_html_, thing.describe, lambda: probe.report([thing], out=page, overwrite=True)]
    fields = [functools.partial(getattr, thing, name) for name in FIELDS]
    whole = [thing.describe, thing._repr_html_, lambda: probe.explain(thing, method="attention")]
    return [*store, *fields, *whole * 5]


def read_all(path: Path, kind: str, rng: random.Random | None) -> str:
    """Read a file: all of it once, and in ways that are drawn, or in every way without ``rng``.

    Returns:
        ``"read"`` or ``"refused"``; everything foreign comes through.
    """
    try:
        thing = Heatmap.read(path) if kind == "lvlm_probe.heatmap" else open_trace(path)
        if isinstance(thing, Trace):
            thing.verify()
    except ProbeError:
        thing, outcome = None, "refused"
        if rng is None or rng.random() < 0.1:
            open_store(path.parent).find(on_error=lambda *_: None)
        if kind == "lvlm_probe.trace" and (rng is None or rng.random() < 0.5):
            # What one part of a file breaks, others may still be asked for.
            with contextlib.suppress(ProbeError):
                thing = open_trace(path)
    else:
        outcome = "read"
    if thing is not None:
        found = ways(thing, path)
        for way in found if rng is None else rng.sample(found, DRAWN):
            with contextlib.suppress(ProbeError):
                way()
    return outcome


CHUNK = 5_000


def damaged(first: int, count: int, seed: int) -> Tally:
    """Read damaged files number ``first`` to ``first + count``."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tally = Tally()
    folder = Path(tempfile.mkdtemp(prefix="lvlm_probe_files_"))
    try:
        sources = Sources(folder / "sources")
        good = folder / "warm" / ODD_NAME
        good.parent.mkdir()
        for kind, data in sources.files.items():  # whatever a first read imports is imported before the forks
            good.write_bytes(data)
            if read_all(good, kind, None) != "read":
                tally.breaks("a good file was refused", kind)

        def trial(number: int, at: Path) -> tuple[str, Callable[[], str]]:
            rng = random.Random(f"{seed}/{number}")
            (at / ODD_NAME).unlink(missing_ok=True)  # HDF5 takes a file that it still has open for the same one
            made = forge(at / ODD_NAME, sources, rng)
            return made, lambda: read_all(at / ODD_NAME, made.split()[1], rng)

        in_forks(first, count, folder, trial, Limits(big=500e6, secret=sources.secret), tally)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return tally


CAMPAIGNS = (
    Campaign(
        "files",
        "A stranger's file is read or refused: no crash, no hang, no memory on its word, no other file opened.",
        "files",
        100_000,
        CHUNK,
        damaged,
        seconds=2400,
    ),
)
