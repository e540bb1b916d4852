"""The study engine ``ray`` of ``lvlm_probe``: the units of a study on many machines.

Installed, ``engine: ray`` in a study's YAML file, or ``lvlm-probe study run STUDY.yaml --engine ray``, is all it takes.
Importing this package imports neither Ray nor torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lvlm_probe.study.run.runner import Told
    from lvlm_probe.study.spec import Study

__all__ = ["register", "run_study_on_ray"]


def register() -> None:
    """What the entry point calls: tells ``lvlm_probe`` of the engine. Again does nothing."""
    from lvlm_probe.study.run.engines import register_engine

    register_engine("ray", run_study_on_ray)


def run_study_on_ray(
    study: Study,
    *,
    limit: int | None = None,
    shard: tuple[int, int] = (0, 1),
    retry_failed: bool = False,
    tell: Callable[[Told], None] | None = None,
) -> Counter[str]:
    """Do all units of a study that are not finished on a Ray cluster, as ``lvlm_probe.study.run.runner`` does.

    What the cluster is and what a worker gets of it stands under the study's ``engine_options`` (``Options``).

    Returns:
        counts: ``answers`` and ``maps`` made in this run, ``finished`` answers found, and ``failed`` units, if any.

    Raises:
        StudyError: Ray is not installed, there is no cluster at the address, or no worker is left that could go on.
            Units that are finished stay.
    """
    from lvlm_probe_ray.engine import run

    return run(study, limit=limit, shard=shard, retry_failed=retry_failed, tell=tell)
