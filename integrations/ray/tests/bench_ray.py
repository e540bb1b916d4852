"""How much faster two workers of one core are than one: the same study with each, on a Ray cluster of two machines.

The time runs from the start of the first unit to the end of the last one, by the workers' clocks, in both phases of a
study; between them everybody waits for the last answer. Starting Ray, and loading the model, lie outside.

    OMP_NUM_THREADS=1 python integrations/ray/tests/bench_ray.py --out tests/benchmarks/results/ray.json

The two machines are processes of this one: it needs two idle cores and the memory of two models.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_worker_niceness", "0")
sys.path.insert(0, str(Path(__file__).parents[1]))
# Workers are processes of their own, and import what stands here.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])

STUDY = """\
models: {{demo: demo}}
datasets: {{scenes: {{reader: demo, source: eval, limit: {samples}}}}}
methods:
  igos++: {{}}
  occlusion: {{params: {{size: {size}}}}}
settings: {{steps: {steps}}}
filter: {{minimum_drop: 0}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--size", type=int, default=4, help="of occlusion, in cells")
    parser.add_argument("--steps", type=int, default=50, help="of the curves")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turns; the medians are compared")
    parser.add_argument("--out", type=Path, help="JSON to write")
    given = parser.parse_args()

    from lvlm_probe_ray import run_study_on_ray

    from lvlm_probe.study.results import collect
    from lvlm_probe.study.spec import read_study

    load = os.getloadavg()[0]
    times: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as directory, two_machines():
        path = Path(directory) / "study.yaml"
        path.write_text(STUDY.format(samples=given.samples, size=given.size, steps=given.steps), encoding="utf-8")
        found: list[Any] = []
        for repeat in range(given.repeats):
            for workers in (1, 2) if repeat % 2 == 0 else (2, 1):
                study = dataclasses.replace(
                    read_study(path),
                    out=Path(directory) / f"{workers}-{repeat}",
                    engine_options={"workers": workers, "min_workers": workers},
                )
                run_study_on_ray(study)
                taken = seconds(study.out / "workers.jsonl")
                times[workers].append(taken)
                print(workers, "worker" if workers == 1 else "workers", json.dumps(taken))
                found.append([{k: v for k, v in record.items() if k != "measured"} for record in collect(study).maps])
        if any(maps != found[0] for maps in found):
            raise SystemExit("the runs differ in what they found")
    middle = {
        workers: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        for workers, runs in times.items()
    }
    one, two = middle[1], middle[2]
    result = {
        "seconds": {"1 worker": one, "2 workers": two},
        "speedup": {name: round(one[name] / two[name], 3) for name in ("all", "answers", "maps")},
        # What the engine loses: the share of the time in which a worker has a unit in work.
        "busy": round(two["work"] / (2 * two["all"]), 3),
        # What the machine loses: how much longer the same units take when the other core works too.
        "units_slower": round(two["work"] / one["work"], 3),
        "units": {"answers": given.samples, "maps": len(found[0])},
        "runs": {str(workers): runs for workers, runs in times.items()},
        "settings": {key: value for key, value in vars(given).items() if key != "out"},
        **environment(load),
    }
    print(json.dumps({name: result[name] for name in ("speedup", "busy", "units_slower")}))
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def seconds(log: Path) -> dict[str, float]:
    """From the first unit's start to the last one's end: of everything, of the answers, of the maps; and of the units
    themselves, added up."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    units = [line for line in lines if line["job"] != "fingerprint"]

    def span(jobs: list[Mapping[str, Any]]) -> float:
        return round(max(job["ended"] for job in jobs) - min(job["started"] for job in jobs), 3)

    return {
        "all": span(units),
        "answers": span([job for job in units if job["job"] == "answer"]),
        "maps": span([job for job in units if job["job"] == "maps"]),
        "work": round(sum(job["ended"] - job["started"] for job in units), 3),
        "workers": len({job["pid"] for job in units}),
    }


@contextmanager
def two_machines() -> Iterator[None]:
    """A cluster of two, one core each; this process is connected to it."""
    import ray
    from ray.cluster_utils import Cluster

    one = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**one, "include_dashboard": False})
    try:
        cluster.add_node(**one)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def environment(load: float) -> dict[str, Any]:
    from importlib.metadata import version

    from lvlm_probe.models.fingerprint import library_versions

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "machine": {
            "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
            "cores": os.cpu_count(),
            "load_before": round(load, 2),
        },
        "threads": os.environ["OMP_NUM_THREADS"],
        "versions": {**library_versions(), "ray": version("ray")},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


if __name__ == "__main__":
    main()
