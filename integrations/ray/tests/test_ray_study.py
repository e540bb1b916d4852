"""Whole studies on a cluster of two machines: what one process finds, whatever dies meanwhile."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lvlm_probe_ray.engine import LOG
from ray_faults import plugin_path

import lvlm_probe as probe
from lvlm_probe.errors import ProbeWarning, StudyError
from lvlm_probe.study.results import collect
from lvlm_probe.study.run.engines import engine_named
from lvlm_probe.study.run.runner import Told, run_study
from lvlm_probe.study.run.units import Records
from lvlm_probe.study.spec import ModelSpec, Study, read_study

HEAD = """\
models: {demo: demo}
settings: {grid: 8, steps: 4, max_new_tokens: 12}
filter: {minimum_drop: 0}
engine: ray
"""
SMALL = "datasets: {scenes: {reader: demo, source: eval, limit: 1}}\nmethods: {center: {}}\n"


def study_in(directory: Path, text: str, **options: Any) -> Study:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "study.yaml").write_text(HEAD + text, encoding="utf-8")
    return dataclasses.replace(read_study(directory / "study.yaml"), engine_options=options)


def pictures(directory: Path, count: int) -> str:
    """A table of questions whose last picture is none; the YAML of it."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, scene in enumerate(probe.demo.scenes(count)):
        scene.image.save(directory / f"{number}.png")
        boxes = [[8, 8, 60, 60]]
        rows.append({"id": str(number), "image": f"{number}.png", "question": scene.question, "boxes": boxes})
    (directory / f"{count - 1}.png").write_bytes(b"no picture")
    (directory / "mine.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return f"datasets: {{mine: {{reader: table, source: {directory / 'mine.jsonl'}}}}}\n"


VARYING = ("measured", "passes")
"""Measured; and passes count what a process tries once for a model (shortcuts, whether gradients flow) where it was."""


def unmeasured(study: Study) -> dict[str, Any]:
    """Everything a study has found, without what varies from run to run."""
    found: dict[str, Any] = {}
    for kind in ("answers", "maps"):
        for key, record in Records(study.out / kind):
            found[f"{kind}/{key}"] = {name: value for name, value in record.items() if name not in VARYING}
    for path in sorted((study.out / "maps").glob("*.heat.h5")):
        heat = probe.Heatmap.read(path)
        found[path.name] = None if heat.values is None else heat.values.tobytes().hex()
    for path in sorted((study.out / "answers").glob("*.h5")):
        found[path.name] = (probe.open_trace(path).answer, probe.open_trace(path).log_probs.tobytes().hex())
    return found


def log(study: Study) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (study.out / LOG).read_text(encoding="utf-8").splitlines()]


def left_over(study: Study) -> list[str]:
    return [path.name for path in study.out.glob("*.part")]


def test_what_one_process_finds_and_what_was_done_before(cluster: Any, tmp_path: Path) -> None:
    """Written by the workers, and sent back by workers that do not see the directory: the same files, bit by bit."""
    data = pictures(tmp_path / "data", 3) + "methods: {input_gradient: {}, gradcam: {params: {encoder: nowhere}}}\n"
    local = study_in(tmp_path / "local", data)
    made = run_study(local)
    expected = unmeasured(local)
    assert made == {"answers": 3, "maps": 4}
    assert len(expected) == 3 + 4 + 2 + 2  # one picture cannot be read, one method fails

    told: list[Told] = []
    shared = study_in(tmp_path / "shared", data, min_workers=2)
    counts = engine_named("ray")(shared, tell=told.append)
    assert counts == {"answers": 3, "maps": 4, "failed": 1 + 2}
    assert unmeasured(shared) == expected
    assert [step.done for step in told] == list(range(1, 7))
    assert {step.total for step in told} == {6}
    assert told[-1].failed == 3
    lines = log(shared)
    assert {line["shared"] for line in lines} == {True}
    assert len({line["node"] for line in lines}) == 2, "both machines have worked"
    assert left_over(shared) == []

    apart = study_in(tmp_path / "apart", data, shared=False, workers=1)
    # A part of it was done by the other engine before.
    assert run_study(apart, limit=1)["answers"] == 1
    counts = engine_named("ray")(apart)
    assert counts == {"answers": 2, "maps": 2, "finished": 1, "failed": 1 + 1}
    assert unmeasured(apart) == expected
    assert {line["shared"] for line in log(apart)} == {False}
    assert sorted(path.name for path in (apart.out / "maps").iterdir()) == sorted(
        path.name for path in (local.out / "maps").iterdir()
    )

    # Nothing is left to do: no worker is started, nothing is written.
    before = {path: path.stat().st_mtime_ns for path in apart.out.rglob("*")}
    assert engine_named("ray")(apart) == {"finished": 3}
    assert {path: path.stat().st_mtime_ns for path in apart.out.rglob("*")} == before


def test_workers_that_die_in_a_unit(cluster: Any, tmp_path: Path) -> None:
    """One process is killed once: its unit is done by another. A unit that kills every worker fails, alone."""
    methods = (
        "datasets: {scenes: {reader: demo, source: eval, limit: 3}}\n"
        "methods:\n"
        f"  once: {{method: dies_once, params: {{flag: {tmp_path / 'flag'}}}}}\n"
        "  after: {method: input_gradient}\n"
        f"  always: {{method: dies_always, params: {{log: {tmp_path / 'log'}}}}}\n"
    )
    path = plugin_path(tmp_path / "plugin")
    environment = {"env_vars": {"PYTHONPATH": path}}
    study = study_in(tmp_path / "s", methods, attempts=2, workers=1, runtime_env=environment)
    with pytest.warns(ProbeWarning, match="was lost: .* given to another one"):
        counts = engine_named("ray")(study, limit=1)
    assert (tmp_path / "flag").exists()
    assert counts == {"answers": 1, "maps": 3, "failed": 1}
    records = {record["row"]: record for record in collect(study).maps}
    assert {row: record["status"] for row, record in records.items()} == {
        "once": "done",
        "after": "done",
        "always": "failed",
    }
    assert records["always"]["error"] == "WorkerLost"
    assert records["always"]["reason"].startswith("2 workers were lost with it; the last: the worker on ")
    tried = (tmp_path / "log").read_text().split()
    assert len(tried) == len(set(tried)) == 1, "the first attempt was lost before it came here"
    lines = [line for line in log(study) if line["job"] == "maps"]
    assert Counter(row for line in lines for row in line["rows"]) == {"once": 1, "after": 1, "always": 1}
    # A failure is a result: it is not tried again unless that is asked for.
    assert engine_named("ray")(study, limit=1) == {"finished": 1}


def test_stopped_by_the_person_and_resumed(cluster: Any, tmp_path: Path) -> None:
    """Ctrl-C: a line that says how to go on, no worker left behind, and the next run, here of the other engine, does
    only what is missing."""
    pipe, done = tmp_path / "told", tmp_path / "done"
    os.mkfifo(pipe)
    path = plugin_path(tmp_path / "plugin")
    text = (
        "datasets: {scenes: {reader: demo, source: eval, limit: 2}}\n"
        f"methods: {{held: {{method: waits, params: {{told: {pipe}, done: {done}}}}}}}\n"
        f"engine_options: {{workers: 1, runtime_env: {{env_vars: {{PYTHONPATH: '{path}'}}}}}}\n"
    )
    (tmp_path / "study.yaml").write_text(HEAD + text, encoding="utf-8")
    study = read_study(tmp_path / "study.yaml")
    code = (
        f"import signal, sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it\n"
        "import lvlm_probe_ray; lvlm_probe_ray.register(); from lvlm_probe.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "study", "run", str(tmp_path / "study.yaml"), "--address", cluster.address]
    error = tmp_path / "error"
    with error.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=file, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}
        )
    waiting = os.open(pipe, os.O_RDONLY)  # returns when a worker has begun to wait in a unit
    assert os.read(waiting, 1)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130, error.read_text()
    assert "the same command goes on" in error.read_text()
    while os.read(waiting, 16):  # ends when no worker is left
        pass
    os.close(waiting)
    assert left_over(study) == []
    assert len(list((study.out / "answers").glob("*.json"))) == 2
    done.touch()
    assert run_study(study) == {"finished": 2, "maps": 2}
    assert len(list(collect(study).chosen())) == 2


def test_no_machine_is_large_enough(cluster: Any, tmp_path: Path) -> None:
    study = study_in(tmp_path, SMALL, num_gpus=8)
    with pytest.raises(StudyError, match=r"a worker needs CPU 1, GPU 8, and no machine of the cluster has that"):
        engine_named("ray")(study)


def test_a_model_that_no_worker_can_load(cluster: Any, tmp_path: Path) -> None:
    study = study_in(tmp_path, SMALL, workers=1)
    study = dataclasses.replace(study, models={"other": ModelSpec("other", "no/such/model/here")})
    with pytest.raises(StudyError, match=r"no worker is left: model other \(no/such/model/here\) cannot be loaded"):
        engine_named("ray")(study)


@pytest.mark.campaign
def test_a_machine_that_goes_away(cluster: Any, tmp_path: Path) -> None:
    """It is gone for good with a unit in work, and no room is left for its worker: the other one does everything."""
    (victim,) = cluster.worker_nodes
    pipe = tmp_path / "told"
    os.mkfifo(pipe)
    text = (
        "datasets: {scenes: {reader: demo, source: eval, limit: 4}}\n"
        f"methods: {{there: {{method: waits, params: {{told: {pipe}, node: {victim.node_id}}}}}}}\n"
    )
    path = plugin_path(tmp_path / "plugin")
    study = study_in(tmp_path / "s", text, min_workers=2, runtime_env={"env_vars": {"PYTHONPATH": path}})

    def take_away() -> None:
        with open(pipe, "rb", buffering=0) as waiting:  # until it has a unit in work
            waiting.read(1)
        cluster.remove_node(victim, allow_graceful=False)

    thread = threading.Thread(target=take_away, daemon=True)
    thread.start()
    with pytest.warns(ProbeWarning, match="was lost"):
        counts = engine_named("ray")(study)
    thread.join()
    cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)  # for the tests after this one
    assert counts == {"answers": 4, "maps": 4}
    results = collect(study)
    assert [record["sample"] for record in results.maps] == [str(number) for number in range(4)]
    assert {record["status"] for record in results.maps} == {"done"}
    lines = [line for line in log(study) if line["job"] == "maps"]
    assert sorted(line["sample"] for line in lines) == [str(number) for number in range(4)], "each exactly once"
    assert max(line["attempt"] for line in lines) == 2
    assert victim.node_id in {line["node"] for line in log(study)}
    local = study_in(tmp_path / "local", text)
    run_study(local, limit=1)
    found = unmeasured(study)
    assert unmeasured(local) == {name: found[name] for name in unmeasured(local)}
