"""Hostile files by the thousand: made from good ones by seed, read by children that may die, counted by how it ended.

    python tests/file_campaign.py --count 100000 --seed 0

Every file must be read or be refused with a ``ProbeError``, in seconds and in some hundred megabytes. What is made and
how it is read depends on the seed alone, so that a fault is found again by ``--seed N --count 1``.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import functools
import hashlib
import io
import json
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from forgery import metadata_blocks, mutate, mutate_metadata, resealed
from trace_samples import sample_capture

from lvlm_probe.errors import ProbeError
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.selection import TokenSelection
from lvlm_probe.storage.seal import BLOCK_BYTES
from lvlm_probe.trace import Trace, open_store, open_trace, write
from lvlm_probe.trace.fields import Array, Json
from lvlm_probe.trace.records import FIELDS, MODEL_JSON

ROW = "traces/000000"
SECONDS, MEGABYTES = 5.0, 500.0
"""What one file may take: processor time, and memory beyond what the process had."""
PATIENCE = 60.0
"""Seconds without a word after which a child counts as hung."""
BATCH = 250
"""Files that one child reads, at most."""


@dataclasses.dataclass
class Campaign:
    """How a number of hostile files ended."""

    files: int = 0
    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    """``read``, ``refused``; and what must not be: ``slow``, ``big``, ``hang``, ``signal N``, an exception's name."""
    kinds: Counter[str] = dataclasses.field(default_factory=Counter)
    faults: list[str] = dataclasses.field(default_factory=list)
    """Seed, kind, and what happened, of each that ended otherwise than read or refused."""
    seconds: float = 0.0


def run(count: int, seed: int = 0, seconds: float | None = None) -> Campaign:
    """Makes and reads ``count`` files, of the seeds from ``seed`` on, or as many as ``seconds`` allow."""
    started, result = time.monotonic(), Campaign()
    seeds = _seeds()
    with tempfile.TemporaryDirectory() as folder:
        following, end = seed, seed + count
        while following < end and (seconds is None or time.monotonic() - started < seconds):
            following = _batch(seeds, Path(folder), range(following, min(following + BATCH, end)), result)
    result.seconds = time.monotonic() - started
    return result


def _batch(seeds: Seeds, folder: Path, numbers: range, result: Campaign) -> int:
    """Reads files in a child as far as it comes; returns the number that is next."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            _child(seeds, folder, numbers, writing)
        finally:
            os._exit(0)
    os.close(writing)
    done, pending = numbers.start, b""
    while True:
        if not select.select([reading], [], [], PATIENCE)[0]:
            os.kill(child, signal.SIGKILL)
            break
        if not (chunk := os.read(reading, 2**16)):
            break
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            kind, outcome, detail = json.loads(line)
            _count(result, done, kind, outcome, detail)
            done += 1
    os.close(reading)
    status = os.waitpid(child, 0)[1]
    if done < numbers.stop:  # the file after the last one that was told of
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        outcome = "hang" if killed == signal.SIGKILL else f"signal {killed}"
        _count(result, done, "?", outcome, "")
        done += 1
    return done


def _count(result: Campaign, number: int, kind: str, outcome: str, detail: str) -> None:
    result.files += 1
    result.outcomes[outcome] += 1
    result.kinds[kind] += 1
    if outcome not in ("read", "refused"):
        result.faults.append(f"seed {number} ({kind}): {outcome} {detail}")


def _child(seeds: Seeds, folder: Path, numbers: range, writing: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders write there what they think of a picture
    warnings.simplefilter("ignore")
    faulthandler.disable()  # a crash is the parent's to tell
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + 4 * 2**30,) * 2)
    for number in numbers:
        rng = random.Random(number)
        kind, data = seeds.forged(rng)
        path = folder / f"{os.getpid()}.h5"
        path.write_bytes(data)
        before, begun = _memory(reset=True), time.process_time()
        outcome, detail = _outcome(path, kind, rng)
        taken, grown = time.process_time() - begun, (_memory() - before) / 1e6
        if taken > SECONDS:
            outcome, detail = "slow", f"{taken:.1f} s, {outcome} {detail}"
        elif grown > MEGABYTES:
            outcome, detail = "big", f"{grown:.0f} MB, {outcome} {detail}"
        os.write(writing, json.dumps([kind, outcome, detail[:300]]).encode() + b"\n")


def _memory(*, reset: bool = False) -> int:
    """Bytes that the process has, at most since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# --- how files are read -----------------------------------------------------------------------------------------------


READ = (
    *FIELDS,
    "words",
    "llr",
    "attention",
    "images",
    "image",
    "model",
    "seconds",
    "layout",
    "model_kwargs",
    "created",
    "answer",
)


def _outcome(path: Path, kind: str, rng: random.Random) -> tuple[str, str]:
    refused = False
    for read in _heatmap_reads(path) if kind.startswith("heat") else _trace_reads(path, rng):
        try:
            read()
        except ProbeError:
            refused = True
        except BaseException as error:
            where = error.__traceback__
            while where is not None and where.tb_next is not None:
                where = where.tb_next
            place = f"{Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}" if where is not None else ""
            return type(error).__name__, f"{place} {error}"
    return ("refused" if refused else "read"), ""


def _trace_reads(path: Path, rng: random.Random) -> list[Callable[[], object]]:
    """The header always, and of the many ways to read on a few."""
    trace = Trace(path)
    reads: list[Callable[[], object]] = [lambda: open_store(path).find(on_error=_raise), lambda: trace.header]
    try:
        _ = trace.header
    except BaseException:
        return reads
    ways = [trace.verify, trace.describe, trace._repr_html_, lambda: open_trace(path, 1).answer]
    ways += [lambda name=name: getattr(trace, name) for name in rng.sample(READ, 4)]
    return reads + rng.sample(ways, 3)


def _heatmap_reads(path: Path) -> list[Callable[[], object]]:
    def read() -> None:
        heat = Heatmap.read(path)
        heat.describe()
        repr(heat)
        heat._repr_html_()

    return [read]


def _raise(error: Exception) -> None:
    raise error


# --- how files are made -----------------------------------------------------------------------------------------------


class Seeds:
    """The good files that hostile ones are made from."""

    def __init__(self, folder: Path) -> None:
        self.trace = write(sample_capture(1), folder).read_bytes()
        values = np.random.default_rng(0).random((6, 8), np.float32)
        selection = TokenSelection((1, 2), ("a", " red", " dot"), (0.1, 2.0, 3.0), "llr")
        heat = Heatmap(values, (24, 18), 0, values > 0.1, selection, "igos++", {"steps": 3}, {"trace_id": "x"})
        self.heat = heat.write(folder / "heat.h5").read_bytes()
        self.blocks = {name: metadata_blocks(data) for name, data in (("trace", self.trace), ("heat", self.heat))}
        self.images = _images()

    def forged(self, rng: random.Random) -> tuple[str, bytes]:
        """Returns the kind of a hostile file and its content."""
        heat = rng.random() < 0.15
        good, which = (self.heat, "heat") if heat else (self.trace, "trace")
        kind = rng.choices(["raw", "metadata", "members", "seal"], [15, 30, 50, 5])[0]
        if kind == "raw":
            data = resealed(mutate(good, rng))
        elif kind == "metadata":
            data = resealed(mutate_metadata(good, self.blocks[which], rng))
        elif kind == "seal":
            head = bytearray(good[: BLOCK_BYTES + 8])
            for _ in range(rng.choice([1, 2, 8])):
                head[rng.randrange(rng.choice([120, len(head)]))] = rng.choice(
                    [0, 10, 32, 48, 57, 255, rng.randrange(256)]
                )
            data = bytes(head) + good[BLOCK_BYTES + 8 :]
        else:
            data = self._changed(good, rng, HEAT_CHANGES if heat else CHANGES)
        return f"{which}-{kind}", data

    def _changed(self, good: bytes, rng: random.Random, changes: list[Change]) -> bytes:
        image = io.BytesIO(good)
        with h5py.File(image, "r+") as file:
            for change in rng.choices(changes, k=rng.choice([1, 1, 1, 2, 3])):
                try:
                    change(self, file, rng)
                except (KeyError, ValueError, TypeError, OSError, RuntimeError, AttributeError):
                    continue  # what an earlier change left cannot be changed like that
        return resealed(image.getvalue())


@functools.cache
def _seeds() -> Seeds:
    with tempfile.TemporaryDirectory() as folder:
        return Seeds(Path(folder))


Change = Callable[[Seeds, h5py.File, random.Random], None]

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


def change_json(seeds: Seeds, file: h5py.File, rng: random.Random) -> None:
    keys = [f"{ROW}/{field.key}" for field in FIELDS.values() if isinstance(field, Json)]
    keys += [*(f"model/{name}" for name in (*MODEL_JSON, "more")), "seconds"]
    _put(file, rng.choice(keys), data=np.bytes_(_json(rng)))


def change_array(seeds: Seeds, file: h5py.File, rng: random.Random) -> None:
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


def change_attribute(seeds: Seeds, file: h5py.File, rng: random.Random) -> None:
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


def change_link(seeds: Seeds, file: h5py.File, rng: random.Random) -> None:
    members = _all_members(file)
    key, other = rng.choice(members), rng.choice(["/", *members])
    links: list[Callable[[], Any]] = [
        lambda: h5py.SoftLink("/" + other),
        lambda: h5py.ExternalLink("/dev/zero", other),
        lambda: h5py.ExternalLink("/etc/passwd", "/"),
        lambda: file[other],
        lambda: file[other],
        lambda: np.dtype("i4"),
    ]
    made = rng.choice(links)()
    del file[key]
    if rng.random() < 0.85:
        file[key] = made


def change_names(seeds: Seeds, file: h5py.File, rng: random.Random) -> None:
    group = file[rng.choice([f"{ROW}/points", f"{ROW}/inputs/model_kwargs", f"{ROW}/images", ROW, "traces", "/"])]
    name = rng.choice(
        [b"\xff\xfe", b"a b", b"\x1b[2J", b"x" * 5000, b"001", b"..", "字".encode(), b"decoder.cross_attention"]
    )
    made = group.create_dataset(name, data=np.zeros(3, "f4"))
    for attribute, value in (("axes", b"x"), ("dtype", b"float32")):
        made.attrs.create(attribute, np.bytes_(value))
    made.attrs.create("layers", np.zeros(0, "i4"))


def change_many(seeds: Seeds, file: h5py.File, rng: random.Random) -> None:
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


def change_elsewhere(seeds: Seeds, file: h5py.File, rng: random.Random) -> None:
    key = f"{ROW}/{rng.choice([field.key for field in FIELDS.values() if isinstance(field, Array)])}"
    count, dtype = len(file[key]), file[key].dtype
    if rng.random() < 0.4:
        _put(
            file, key, shape=(count,), dtype=dtype, external=[(rng.choice(["/etc/passwd", "/dev/zero"]), 0, 4 * count)]
        )
        return
    attrs = dict(file[key].attrs)
    del file[key]
    unlimited = rng.random() < 0.5
    layout = h5py.VirtualLayout((1 if unlimited else count,), dtype, maxshape=(None,) if unlimited else None)
    source = h5py.VirtualSource("/dev/zero", "x", (64,), maxshape=(None,))
    if unlimited:
        layout[0 : h5py.h5s.UNLIMITED] = source[0 : h5py.h5s.UNLIMITED]
    else:
        layout[:] = source[:count]
    made = file.create_virtual_dataset(key, layout)
    for name, value in attrs.items():
        made.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else value


def change_image(seeds: Seeds, file: h5py.File, rng: random.Random) -> None:
    data = bytearray(rng.choice(seeds.images))
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


def change_answer(seeds: Seeds, file: h5py.File, rng: random.Random) -> None:
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


def change_heat_settings(seeds: Seeds, file: h5py.File, rng: random.Random) -> None:
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


def change_heat_values(seeds: Seeds, file: h5py.File, rng: random.Random) -> None:
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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="how many files (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first one")
    parser.add_argument("--seconds", type=float, default=None, help="stop after so long")
    given = parser.parse_args()
    result = run(given.count, given.seed, given.seconds)
    shown = {"files": result.files, "outcomes": result.outcomes, "kinds": result.kinds, "seconds": result.seconds}
    print(json.dumps({**shown, "faults": len(result.faults)}, indent=1))
    for fault in result.faults[:200]:
        print(fault, file=sys.stderr)
    return 1 if result.faults else 0


if __name__ == "__main__":
    sys.exit(main())
