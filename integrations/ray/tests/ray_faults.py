"""Explainers that take their process down, or wait: for the tests and, as a plugin, for the workers."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from lvlm_probe.explainers import Outcome, Problem
from lvlm_probe.explainers import register as register_method


def register() -> None:
    """What the entry point of ``plugin_path`` calls."""
    from lvlm_probe.explainers import methods

    if "dies_once" not in methods():
        register_method("dies_once")(dies_once)
        register_method("dies_always")(dies_always)
        register_method("waits")(waits)


def dies_once(problem: Problem, *, flag: str) -> Outcome:
    """The first process that comes here is killed; all others make a map."""
    try:
        Path(flag).touch(exist_ok=False)
    except FileExistsError:
        return _map(problem)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("killed processes go no further")


def dies_always(problem: Problem, *, log: str) -> Outcome:
    """Every process that comes here is killed."""
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("killed processes go no further")


def waits(problem: Problem, *, told: str, node: str = "", done: str = "") -> Outcome:
    """Waits for good, on the machine ``node`` or on all, unless there is a file ``done``; elsewhere it makes a map.

    ``told`` is a FIFO: a byte says that the wait has begun, and its end that the process is gone.
    """
    import ray

    if (not node or ray.get_runtime_context().get_node_id() == node) and not (done and Path(done).exists()):
        with open(told, "wb", buffering=0) as pipe:
            pipe.write(b".")
            threading.Event().wait()
    return _map(problem)


def _map(problem: Problem) -> Outcome:
    import torch

    values = torch.zeros(8, 8)
    values[2:4, 2:4] = 1.0
    return Outcome(values, {})


def plugin_path(directory: Path) -> str:
    """A value of PYTHONPATH with which a worker finds this module as an installed plugin."""
    info = directory / "ray_faults-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ray-faults\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[lvlm_probe.plugins]\nfaults = ray_faults:register\n")
    return os.pathsep.join([str(directory), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
