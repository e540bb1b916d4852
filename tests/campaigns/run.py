"""Tries to break what the product promises, many thousands of times, and writes down how often it held.

    python tests/campaigns/run.py                       # all campaigns, in order
    python tests/campaigns/run.py --only kills          # one; may be given several times
    python tests/campaigns/run.py --scale 0.01          # a rehearsal
    python tests/campaigns/run.py --list

Every chunk runs in a process of its own, and is one line in ``runs/campaign/`` when it is done: stopped with Ctrl-C,
the same command goes on where it was, as long as the code is the same. The sum of all chunks goes to
``tests/benchmarks/results/campaign.json`` (rehearsals: ``runs/campaign/``), and from there to ``docs/promises.md``
(``python tests/benchmarks/publish.py``). Exits with 1 when a promise was broken.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "tests", ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torchvision_shim  # noqa: E402, F401  (before anything imports torchvision, in the environment that has it)

from campaigns import CAMPAIGNS  # noqa: E402
from campaigns.tally import Campaign, Tally, total  # noqa: E402

RESULTS = ROOT / "tests" / "benchmarks" / "results" / "campaign.json"
RUNS = ROOT / "runs" / "campaign"
COMMAND = "make campaign"


@dataclass(frozen=True)
class Chunk:
    """The units of a campaign that one process does."""

    campaign: Campaign
    first: int
    count: int
    seed: int

    @property
    def key(self) -> tuple[int, int, int]:
        return self.first, self.count, self.seed


def chunks(campaign: Campaign, scale: float, seed: int) -> list[Chunk]:
    """The chunks of a campaign at a scale; at least one unit."""
    units = max(1, round(campaign.units * scale))
    size = units if campaign.whole else campaign.chunk
    return [Chunk(campaign, first, min(size, units - first), seed) for first in range(0, units, size)]


def code_digest() -> str:
    """12 hex digits over the code that is tried and the code that tries it: figures of another state are not reused."""
    digest = hashlib.sha256()
    files = [*(ROOT / "lvlm_probe").rglob("*"), *(ROOT / "tests").rglob("*.py")]
    for path in sorted(path for path in files if path.is_file() and "__pycache__" not in path.parts):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def work(chunk: Chunk) -> dict[str, Any]:
    """Do a chunk, in this process."""
    started = time.perf_counter()
    tally = chunk.campaign.run(chunk.first, chunk.count, chunk.seed)
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    processor = sum(one.ru_utime + one.ru_stime for one in used)
    return {**tally.record(), "seconds": round(time.perf_counter() - started, 2), "processor": round(processor, 2)}


class Child:
    """A chunk in a process of its own, and in a process group of its own, so that it goes with all it started."""

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        # Closed, and so deleted, with this object.
        self.out = tempfile.TemporaryFile()  # noqa: SIM115
        self.result = tempfile.NamedTemporaryFile(prefix="lvlm_probe_campaign_", suffix=".json")  # noqa: SIM115
        self.started = time.monotonic()
        # The environment of that name beside the one this runs in.
        other = Path(sys.prefix).with_name(chunk.campaign.environment) / "bin" / "python"
        python = str(other) if other.exists() else sys.executable
        environment = {
            "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **os.environ,
        }  # fmt: skip
        self.process = subprocess.Popen(
            [
                python, __file__, "--work", chunk.campaign.name, *map(str, chunk.key), "--result", self.result.name,
            ],
            stdout=self.out, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip

    def ended(self) -> bool:
        if self.process.poll() is not None:
            return True
        if time.monotonic() - self.started < self.chunk.campaign.seconds:
            return False
        self.stop()
        return True

    def stop(self) -> None:
        """Kill it and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def record(self) -> dict[str, Any]:
        """What it found; a process that died or did not end has broken a promise itself."""
        self.stop()
        seconds = round(time.monotonic() - self.started, 2)
        text = Path(self.result.name).read_bytes()
        if self.process.returncode == 0 and text:
            found: dict[str, Any] = json.loads(text)
            return found
        self.out.seek(0)
        tail = self.out.read().decode("utf-8", "replace")[-400:]
        tally = Tally()
        over = seconds >= self.chunk.campaign.seconds
        end = f"not ended in {seconds:.0f} s" if over else f"status {self.process.returncode}"
        tally.breaks(
            "a whole chunk died", f"units {self.chunk.first} to {self.chunk.first + self.chunk.count}: {end}: {tail}"
        )
        return {**tally.record(), "seconds": seconds}


def kept(path: Path) -> dict[tuple[int, int, int], dict[str, Any]]:
    """The chunks that are done; a last line that was cut short is not."""
    found: dict[tuple[int, int, int], dict[str, Any]] = {}
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    for line in lines:
        record = json.loads(line)
        found[tuple(record["key"])] = record
    return found


def carry_out(campaign: Campaign, wanted: Sequence[Chunk], path: Path, jobs: int) -> Iterator[dict[str, Any]]:
    """Do the chunks, ``jobs`` side by side; yields each one's record when it is done, those of an earlier run first."""
    done = kept(path)
    waiting = [chunk for chunk in wanted if chunk.key not in done]
    yield from (done[chunk.key] for chunk in wanted if chunk.key in done)
    running: list[Child] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(Child(waiting.pop(0)))
            for child in [child for child in running if child.ended()]:
                running.remove(child)
                record = {"key": child.chunk.key, **child.record()}
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                yield record
            time.sleep(0.05)
    finally:
        for child in running:
            child.stop()


def progress(campaign: Campaign, tally: Tally, units: int, started: float, *, last: bool = False) -> None:
    broken = sum(tally.broken.values())
    line = (
        f"{campaign.name:<12} {tally.tried:>8,} of {units:,} {campaign.unit}, {broken} broken, "
        f"{time.monotonic() - started:.0f} s"
    )
    if sys.stdout.isatty():
        print(f"\r{line}\x1b[K", end="\n" if last else "", flush=True)
    else:
        print(line, flush=True)


def summary(campaign: Campaign, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is published of one campaign."""
    found = total(records).record()
    found["promise"], found["unit"] = campaign.promise, campaign.unit
    found["seconds"] = round(sum(record["seconds"] for record in records))
    found["processor seconds"] = round(sum(record.get("processor", 0) for record in records))
    found["processes"] = len(records)
    if found["equal"]:
        found["counts"]["results that are equal in all processes"] = len(found["equal"])
    del found["equal"]
    return found


def machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return {"cpu": name, "cores": os.cpu_count()}


def heading(code: str, scale: float, seed: int) -> dict[str, Any]:
    """Where, when and of what the figures are."""
    from importlib.metadata import version

    import lvlm_probe

    def git(*words: str) -> str:
        run = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return run.stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "lvlm_probe", "tests")
    return {
        "command": COMMAND,
        "machine": machine(),
        "python": platform.python_version(),
        "lvlm_probe": lvlm_probe.__version__,
        "versions": {name: version(name) for name in ("torch", "transformers", "h5py", "numpy", "pillow")},
        "date": datetime.date.today().isoformat(),
        "commit": commit + (" with changes" if changed else ""),
        "code": code,
        "scale": scale,
        "seed": seed,
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """What stands on the terminal at the end."""
    lines = [f"{'campaign':<12} {'tried':>9}  {'broken':>7}  {'seconds':>7}  {'on a core':>9}  worst"]
    for name, one in found.items():
        worst = ", ".join(f"{what} {value:g}" for what, value in one["worst"].items())
        lines.append(
            f"{name:<12} {one['tried']:>9,}  {sum(one['broken'].values()):>7}  {one['seconds']:>7}  "
            f"{one['processor seconds']:>9}  {worst}"
        )
        lines += [f"    {count} × {kind}" for kind, count in one["broken"].items()]
        lines += [f"        {example}" for example in one["examples"]]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", choices=list(CAMPAIGNS), metavar="NAME", help="this campaign; several"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of the units to try (default: 1)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes side by side (default: cores)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--out", type=Path, help="where the sum goes, instead of the published file")
    parser.add_argument("--list", action="store_true", help="print the campaigns and stop")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        campaign = CAMPAIGNS[options.work[0]]
        record = work(Chunk(campaign, *map(int, options.work[1:])))
        options.result.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
        return 0
    if options.list:
        for campaign in CAMPAIGNS.values():
            print(f"{campaign.name:<12} {campaign.units:>8,} {campaign.unit}: {campaign.promise}")
        return 0
    out = options.out or (RESULTS if options.scale >= 1 else RUNS / f"rehearsal-{options.scale:g}.json")
    code = code_digest()
    found: dict[str, dict[str, Any]] = {}
    head = heading(code, options.scale, options.seed)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # its children are groups of their own, and end with it
    try:
        for name in options.only or CAMPAIGNS:
            campaign = CAMPAIGNS[name]
            wanted = chunks(campaign, options.scale, options.seed)
            units = sum(chunk.count for chunk in wanted)
            started = time.monotonic()
            records: list[dict[str, Any]] = []
            for record in carry_out(campaign, wanted, RUNS / code / f"{name}.jsonl", options.jobs):
                records.append(record)
                progress(campaign, total(records), units, started, last=len(records) == len(wanted))
            found[name] = {**summary(campaign, records), **{key: head[key] for key in ("date", "commit", "code")}}
            publish(out, head, found)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"\n{table(found)}\nwritten to {out}")
    return 1 if any(one["broken"] for one in found.values()) else 0


def publish(out: Path, head: dict[str, Any], found: dict[str, dict[str, Any]]) -> None:
    """Write the sums so far. Campaigns that were not run now keep the figures, date and commit they had."""
    before: dict[str, Any] = {}
    if out.is_file():
        before = json.loads(out.read_text(encoding="utf-8")).get("campaigns", {})
    campaigns = {name: found.get(name) or before.get(name) for name in CAMPAIGNS}
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {**head, "campaigns": {name: one for name, one in campaigns.items() if one}}
    out.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
