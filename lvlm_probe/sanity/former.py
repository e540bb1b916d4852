"""The checks by the names and arguments that they had in ``lvlm_probe.metrics``; they go with the next release."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers import explain
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.metrics.scoring import over_baseline
from lvlm_probe.replaying import replay as make_replay
from lvlm_probe.sanity.checks import SanityCheck
from lvlm_probe.sanity.randomisation import answers, weights
from lvlm_probe.sanity.stability import Stability, stability

if TYPE_CHECKING:
    from lvlm_probe.replaying import Replay

SanityReport = SanityCheck
_WEIGHTS = ("kind", "how", "blocks", "stages", "draws", "seed", "progress")
_ANSWERS = ("draws", "pool", "seed", "progress")


def weight_randomisation(trace: Any, model: Any, processor: Any = None, **options: Any) -> SanityCheck:
    """Explain, then check by ``weights``."""
    own = {name: options.pop(name) for name in _WEIGHTS if name in options}
    return weights(*_explained(trace, model, processor, **options), **own)


def answer_randomisation(trace: Any, model: Any, processor: Any = None, **options: Any) -> SanityCheck:
    """Explain, then check by ``answers``."""
    own = {name: options.pop(name) for name in _ANSWERS if name in options}
    return answers(*_explained(trace, model, processor, **options), **own)


def _explained(
    trace: Any, model: Any, processor: Any, *, baseline: Any = None, explain_seed: int = 0, **options: Any
) -> tuple[Replay, Heatmap]:
    subject = make_replay(trace, model, processor)
    subject = subject if baseline is None else over_baseline(subject, baseline)
    return subject, explain(subject, seed=explain_seed, progress=False, **options)


def over_seeds(replay: Replay, *, seeds: int | Sequence[int] = 5, tokens: Any = None, **options: Any) -> Stability:
    """Explain with several seeds, and compare."""
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if len(set(chosen)) < 2:
        raise ExplainError(f"stability over seeds takes at least two different ones; got {seeds!r}")
    first = explain(replay, tokens=tokens, seed=chosen[0], progress=False, **options)
    others = [explain(replay, tokens=first.selection, seed=seed, progress=False, **options) for seed in chosen[1:]]
    return stability([first, *others])


def over_prompts(replays: Sequence[Replay], **options: Any) -> Stability:
    """Explain the answers to several prompts, and compare."""
    return stability([explain(replay, progress=False, **options) for replay in replays])
