"""Explainers that take their process down: registered in the tests' process and, as a plugin, in the workers."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from lvlm_probe.explainers import Outcome, Problem
from lvlm_probe.explainers import register as register_method


def register() -> None:
    """What the entry point of ``plugin_path`` calls."""
    from lvlm_probe.explainers import methods

    if "dies_once" not in methods():
        register_method("dies_once")(dies_once)
        register_method("dies_always")(dies_always)
        register_method("sleeps")(sleeps)


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


def sleeps(problem: Problem, *, seconds: float = 1.0) -> Outcome:
    """A map that takes its time."""
    time.sleep(seconds)
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
