"""The cluster that a study runs on: joined where there is one, started on this machine where there is none."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lvlm_probe.errors import StudyError
from lvlm_probe_ray.options import Need, Options

__all__ = ["connected", "has_gpus", "machines", "room_for"]


@contextmanager
def connected(options: Options) -> Iterator[None]:
    """Connects this process to the cluster, and lets go of it afterwards. One that it is connected to already is kept.

    Raises:
        StudyError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise StudyError(f"the engine ray needs Ray, which cannot be imported ({error}): pip install ray") from error
    if ray.is_initialized():
        yield
        return
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if options.address is None and "RAY_ADDRESS" not in os.environ:
        # Started for this run: no page that listens on a port, and no report of it to anybody.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        settings["include_dashboard"] = False
    else:
        settings["address"] = options.address
    try:
        ray.init(**settings)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = options.address or os.environ.get("RAY_ADDRESS") or "this machine"
        reason = str(error).strip().partition("\n")[0]
        raise StudyError(
            f"there is no Ray cluster at {where} ({reason}); start one with `ray start --head` (and `ray start "
            f"--address HOST:6379` on the other machines), or leave out the address to use this machine alone"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def machines() -> list[dict[str, float]]:
    """Resources of every machine that is up."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def has_gpus() -> bool:
    """Whether any machine has GPUs."""
    return any(machine.get("GPU", 0) > 0 for machine in machines())


def room_for(need: Need) -> int:
    """How many workers the cluster has room for, nobody else on it counted.

    Raises:
        StudyError: none fits on any machine.
    """
    there = machines()
    room = sum(need.times_in(machine) for machine in there)
    if room == 0:
        largest = Need(*(max((machine.get(name, 0.0) for machine in there), default=0.0) for name in ("CPU", "GPU")))
        raise StudyError(
            f"a worker needs {need}, and no machine of the cluster has that (at most {largest}); lower num_cpus or "
            f"num_gpus under engine_options, or name workers to wait for larger machines"
        )
    return room
