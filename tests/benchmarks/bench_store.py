"""What a large store of traces costs: opening the last, listing with filters, reading one attention map.

    python tests/benchmarks/bench_store.py               # 10,000 traces, some 3 minutes, under 2 GB of disk
    python tests/benchmarks/bench_store.py --traces 50   # that everything runs

One answer is recorded with a small random model, and its file is copied with new trace ids and times. Bytes are those
that this process asks the system for (``rchar`` of ``/proc/self/io``), milliseconds medians over repeats; files lie in
the page cache, as they have just been written. The first list opens every file once and keeps what their headers say;
later lists open new files only. Writes ``results/store.json``.
"""

from __future__ import annotations

import argparse
import datetime
import os
import secrets
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import torch
from random_model import SMALL, random_llava, write_results

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny_models
from forgery import write_seal

import lvlm_probe as probe
from lvlm_probe.trace.schema import FORMAT, FORMAT_VERSION, row_key

TRACES = 10_000
DISK_LIMIT = 2_000_000_000
STATUSES = ("complete", "complete", "complete", "stopped")
START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def record_one(directory: Path) -> Path:
    """One real trace with attention and ratios."""
    model, processor = random_llava(6, patch=14, tower=SMALL, decoder=SMALL)
    with probe.attach(model, processor) as attached, attached.record(directory) as recording:
        given = tiny_models.inputs("llava", model, processor, [tiny_models.picture(84, 84)], "What is in the picture?")
        model.generate(**given, min_new_tokens=24, max_new_tokens=24, do_sample=False)
    return recording.paths[0]


def clone(original: Path, directory: Path, number: int) -> Path:
    """A whole trace file of its own: another id, time and status, sealed anew."""
    created = START + datetime.timedelta(minutes=number)
    path = directory / f"{created:%Y%m%dT%H%M%S.%f}Z-{os.getpid()}-{secrets.token_hex(4)}.b1.h5"
    part = path.with_name(f"{path.name}.part")
    shutil.copyfile(original, part)
    with h5py.File(part, "r+", libver=("v108", "v108")) as file:
        for owner, name, text in (
            (file, "created", created.isoformat()),
            (file[row_key(0)], "trace_id", secrets.token_hex(8)),
            (file[row_key(0)], "status", STATUSES[number % len(STATUSES)]),
        ):
            data = text.encode("ascii")
            owner.attrs.create(name, data, dtype=h5py.string_dtype("utf-8", len(data)))
    write_seal(part, FORMAT, FORMAT_VERSION)
    os.replace(part, path)
    return path


def bytes_read() -> int:
    """Bytes that this process has asked the system for so far."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def cost(run: Callable[[], Any], repeats: int = 5) -> dict[str, float]:
    """Median milliseconds and bytes of ``run()``."""
    taken, read = [], []
    counting = bytes_read()
    counting = bytes_read() - counting  # of asking
    for _ in range(repeats):
        before, started = bytes_read(), time.perf_counter()
        run()
        taken.append(1e3 * (time.perf_counter() - started))
        read.append(bytes_read() - before - counting)
    return {"ms": statistics.median(taken), "bytes": statistics.median(read)}


def measure(directory: Path, traces: int) -> dict[str, Any]:
    """Fills ``directory`` and measures."""
    original = record_one(directory / "original")
    store = directory / "store"
    store.mkdir()
    size = original.stat().st_size
    if size * traces > DISK_LIMIT:
        raise SystemExit(f"{traces} traces of {size} bytes would take more than {DISK_LIMIT} bytes; ask for fewer")
    started = time.perf_counter()
    for number in range(traces):
        clone(original, store, number)
    filled = time.perf_counter() - started

    def last() -> None:
        assert probe.open_store(store)[-1].answer

    def listed() -> None:
        found = probe.open_store(store).find(status="stopped", since=START + datetime.timedelta(minutes=traces // 2))
        assert 0 < len(found) < traces

    def map_of_one() -> None:
        attention = probe.open_store(store)[traces // 2].attention
        assert attention is not None

    opened = probe.open_store(store)[traces // 2]
    _ = opened.header

    def map_of_opened() -> None:
        opened.__dict__.pop("attention", None)
        assert opened.attention is not None

    costs = {
        "open the store": cost(lambda: probe.open_store(store)),
        "open the store and read the last answer": cost(last),
        "list with filters, first time": cost(listed, repeats=1),
        "list with filters, again": cost(listed),
    }
    clone(original, store, traces)
    costs["list with filters, one file new"] = cost(listed, repeats=1)
    costs["open one of them and read its attention map"] = cost(map_of_one)
    costs["read the attention map of an opened trace"] = cost(map_of_opened)
    attention = opened.attention
    assert attention is not None
    return {
        "traces": traces, "file_bytes": size, "total_bytes": sum(file.stat().st_size for file in store.iterdir()),
        "seconds_to_fill": filled, "attention_map_bytes": attention.values.size * 2, "costs": costs,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=TRACES)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "store.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=probe.ProbeWarning)
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as directory:
        found = measure(Path(directory), options.traces)
    command = "python tests/benchmarks/bench_store.py"
    command += "" if options.traces == TRACES else f" --traces {options.traces}"
    write_results(options.out, {"command": command, "load_average": [before, os.getloadavg()[0]], **found})
    print(f"{found['traces']} traces of {found['file_bytes'] / 1024:.0f} KiB, {found['total_bytes'] / 1e9:.2f} GB")
    for what, figures in found["costs"].items():
        print(f"{what:46s} {figures['ms']:10.1f} ms  {figures['bytes'] / 1024:12.0f} KiB read")


if __name__ == "__main__":
    main()
