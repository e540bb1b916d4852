"""Cost of a unit: seconds on the wall and of the processor, the machine it ran on, and the memory of a map.

None of it is part of a unit's result: it stands under ``measured`` in its record and differs from run to run.
"""

from __future__ import annotations

import functools
import platform
import time
from typing import TYPE_CHECKING, Any

import torch

from lvlm_probe.explainers import Problem, resolve
from lvlm_probe.planning import Meter, weight_bytes

if TYPE_CHECKING:
    from lvlm_probe.heatmap import Heatmap
    from lvlm_probe.replaying import Replay
    from lvlm_probe.selection import TokenSelection
    from lvlm_probe.study.spec import MethodSpec
    from lvlm_probe.video import ClipHeatmap


class Stopwatch:
    """Started when made; ``taken`` is JSON-ready."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def seconds(self) -> float:
        """On the wall, so far."""
        return round(time.perf_counter() - self._wall, 4)

    def taken(self, device: torch.device | str) -> dict[str, Any]:
        """``unit_seconds`` on the wall, ``processor_seconds`` of all threads of this process, and ``machine``."""
        return {
            "unit_seconds": self.seconds(),
            "processor_seconds": round(time.process_time() - self._processor, 4),
            "machine": machine_name(str(device)),
        }


def map_memory(
    player: Replay, method: MethodSpec, heat: Heatmap | ClipHeatmap, tokens: TokenSelection, *, seed: int, measure: bool
) -> dict[str, Any]:
    """Bytes that a map took, as its provenance has them, and ``weights``, those of the model.

    A meter has to watch every tensor, which slows small models down; it is done where ``measure`` asks for it (rows of
    Table 9), in a second run that is not in the first one's seconds: ``measured_peak``.
    """
    found = dict(heat.provenance.get("memory") or {})
    if measure and Meter.counts(player.device):
        over, meter = player.over(heat.provenance["baseline"]), Meter(player.device)
        clip = player.clips[0] if player.clips else None
        problem = Problem(over, tokens, 0 if clip is None else clip.first, seed, clip=clip)
        problem = problem.searched_in(method.search_dtype)
        with problem.caching(), meter.running():
            resolve(method.method)(problem, **method.params)
        found["measured_peak"] = meter.reading.peak
    here = "activations" in player.offers  # else it runs on a server
    return {**found, "weights": weight_bytes(player.model) if here else 0}


@functools.cache
def machine_name(device: str) -> str:
    """An accelerator by its name, or the processor and the number of torch's threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    count = torch.get_num_threads()
    return f"{name}, {count} thread{'s' * (count > 1)}"
