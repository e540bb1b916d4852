"""Explainers: one method, one file; ``explain`` runs one and wraps its values in a ``Heatmap`` with provenance."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import logging
import platform
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from lvlm_probe import planning
from lvlm_probe.errors import ExplainError, MaskError
from lvlm_probe.explainers import registry
from lvlm_probe.explainers.costs import cost_of
from lvlm_probe.explainers.recorded import RecordedAnswer
from lvlm_probe.explainers.registry import Outcome, Problem, Progress, check_parameters, find, needs_of, register
from lvlm_probe.explainers.scaling import no_effect
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.isolation import taking_turns
from lvlm_probe.player import Replay
from lvlm_probe.selection import TokenSelection, select_tokens
from lvlm_probe.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Outcome", "Problem", "explain", "methods", "needs_of", "register", "register_explainer"]

_log = logging.getLogger("lvlm_probe")

register_explainer = register
"""What ``lvlm_probe.register_explainer`` is."""

# Importing a method's module registers it.
for _module in (
    "attention", "floors", "gradcam", "greedy", "igos", "iia", "input_gradient", "integrated_gradients", "occlusion",
    "rise", "rollout", "tam", "tmm",
):  # fmt: skip
    importlib.import_module(f"{__name__}.{_module}")

Tokens = str | tuple[int, int] | Sequence[str] | TokenSelection


@taking_turns
def explain(
    replay: Replay | Trace,
    *,
    method: str = "igos++",
    tokens: Tokens | None = None,
    image: int = 0,
    seed: int = 0,
    strengthen: bool = True,
    progress: Progress | None = None,
    memory: int | str | None = None,
    measure_memory: bool = False,
    **params: Any,
) -> Heatmap:
    """Explains why a recorded answer says what it says: which regions of the picture made the selected tokens likely.

    Args:
        replay: The recorded answer on its model. The trace alone will do for methods that run no pass, where it holds
            what they need (``needs_of(method)``).
        method: Name of a registered explainer.
        tokens: What to explain: ``None`` for the tokens the picture is responsible for (paper, Eq. 6, alpha = 1), a
            word or phrase of the answer, several of them, a token span ``(start, stop)``, or a selection.
        image: Number of the picture, when the prompt has several.
        seed: Of everything random in the explanation; the global random state is not touched.
        strengthen: Blur the baseline harder while the selected tokens keep 5 % of probability on it (paper, A.1). The
            replay keeps the stronger baseline, so that later scores refer to the same one.
        progress: Called with (done, total).
        memory: What may be used, weights included: bytes or a size such as ``"24GB"``. By default what the device has
            free. How many masks go through at once, and whether layers are checkpointed, is planned with it
            (``lvlm_probe.plan``) before any work, and again whenever memory runs out.
        measure_memory: Note the peak that was reached beside the one that was planned, in
            ``provenance["memory"]``. On CUDA it is noted anyway; on the CPU it takes time on small models.
        params: Parameters of the method.

    Returns:
        The heatmap; without values, but with a reason, when nothing is selected or the picture plays no part: the
        selected tokens' log-probabilities move by no more than rounding when it alone is replaced by its baseline.

    Raises:
        ExplainError: Unknown method or parameter, or the method cannot run here.
        OutOfMemory: Not even one mask fits; the message says what it would take.
        SelectionError: The answer does not contain the words or span.
    """
    function = resolve(method)
    check_parameters(method, function, params)
    live = not isinstance(replay, Trace)
    if isinstance(replay, Trace):
        model_work = sorted({"passes", "gradients"} & registry.needs_of(method))
        if model_work:
            raise ExplainError(
                f"{method} needs {' and '.join(model_work)} of the model, and a trace has none: explain "
                f"probe.replay(trace, model, processor), or use a method that runs on a trace alone: "
                f"{', '.join(name for name in methods() if not {'passes', 'gradients'} & registry.needs_of(name))}"
            )
        replay = cast(Replay, RecordedAnswer(replay))
    if not 0 <= image < replay.n_images:
        raise ExplainError(f"image={image}, but the prompt has {replay.n_images} image(s), counted from 0")
    selection = _selection(replay, tokens)
    started = time.perf_counter()
    before = (replay.passes.forward, replay.passes.backward)
    used: dict[str, Any] = {}
    shortcuts = getattr(replay, "shortcuts", None) if live else None
    asked = shortcuts.asked if shortcuts is not None else 0
    if not selection:
        outcome = Outcome(None, params, reason=f"nothing to explain: {selection.reason}")
    else:
        if strengthen and live:
            replay.strengthen(selection.decided)
        problem = Problem(replay, selection, image, seed, progress, live)
        if (reason := no_effect(problem)) is not None:
            outcome = Outcome(None, params, reason=reason)
        else:
            planned = _planned(problem, method, params, memory, measure_memory)
            with (
                planning.applied(replay, planned, method=method, measure=measure_memory) as watch,
                contextlib.nullcontext() if shortcuts is None else shortcuts.held(),
            ):
                outcome = function(problem, **params)
            used = watch.record() if live else {}
    values = outcome.values
    if values is not None and (values.ndim != 2 or not bool(((values >= 0) & (values <= 1)).all())):
        raise ExplainError(
            f"{method} returned values of shape {tuple(values.shape)} outside [0, 1]; a heatmap is (row, col) in [0, 1]"
        )
    provenance = {
        "trace_id": replay.trace_id,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "seed": seed,
        "baseline": _json_ready(replay.baseline),
        "passes": {
            "forward": replay.passes.forward - before[0],
            "backward": replay.passes.backward - before[1],
        },
        "seconds": round(time.perf_counter() - started, 4),
        "device": str(replay.device),
        "versions": _versions(),
    }
    if shortcuts is not None and shortcuts.asked > asked:
        provenance["shortcuts"] = str(shortcuts)  # what passes left out, or that none could leave out anything
    if used:
        provenance["memory"] = used
    if outcome.diagnostics:
        provenance["diagnostics"] = _json_ready(outcome.diagnostics)
    return Heatmap(
        values=None if values is None else values.detach().float().cpu().numpy(),
        image_size=replay.image_sizes[image],
        image_index=image,
        seen=None if values is None else _seen(replay, image, (values.shape[0], values.shape[1])),
        selection=selection,
        method=method,
        params=_json_ready(outcome.params),
        provenance=provenance,
        history=tuple(dict(record) for record in outcome.history),
        reason=outcome.reason,
        trace=getattr(replay, "trace", None),
    )


def _planned(
    problem: Problem, method: str, params: dict[str, Any], memory: int | str | None, measure: bool
) -> planning.Plan | None:
    """How to run a method. Unasked, only those that send several masks at once: there is nothing to choose for others,
    and the probe would take as long as they do."""
    replay = problem.replay
    if not isinstance(replay, Replay):
        return None
    asked = memory is not None or measure
    cost = cost_of(method, problem, params)
    if not asked and (replay._micro_batch is not None or not cost.splits or max(cost.groups, default=1) < 2):
        return None
    try:
        return planning.plan_for(replay, method, params, memory=memory, image=problem.image)
    except Exception as error:
        if memory is not None:
            raise
        _log.debug("no plan for %s: %s", method, error)  # it runs without one, and says what is wrong itself
        return None


def methods() -> list[str]:
    """Names of all explainers, those of installed plugins included."""
    from lvlm_probe.plugins import load_plugins

    load_plugins()
    return registry.names()


def _selection(replay: Replay, tokens: Tokens | None) -> TokenSelection:
    if tokens is None:
        return select_tokens(replay)
    if isinstance(tokens, TokenSelection):
        if tokens.tokens != tuple(replay.tokens):
            raise ExplainError(
                f"this selection was made on another answer ({''.join(tokens.tokens)[:60]!r}) than the one to explain "
                f"({''.join(replay.tokens)[:60]!r}); call select_tokens on this replay"
            )
        return tokens
    if isinstance(tokens, str):
        return select_tokens(replay, words=tokens)
    items: list[Any] = list(tokens) if isinstance(tokens, Sequence) else []
    if len(items) == 2 and all(isinstance(item, int) for item in items):
        return select_tokens(replay, span=(items[0], items[1]))
    if items and all(isinstance(item, str) for item in items):
        return select_tokens(replay, words=items)
    raise ExplainError(f"tokens is a word, several words, a span (start, stop) or a selection; got {tokens!r}")


def resolve(method: str) -> Callable[..., Outcome]:
    """The explainer of a name, those of installed plugins included. Raises ``ExplainError`` for an unknown one."""
    # Plugins are looked for only when a name is not our own: importing them may take long.
    if method not in registry.names():
        methods()
    return find(method)


def _seen(replay: Replay, image: int, shape: tuple[int, int]) -> Any:
    try:
        return replay.seen(image, shape).cpu().numpy()
    except MaskError:
        return torch.ones(shape, dtype=torch.bool).numpy()


def _versions() -> dict[str, str]:
    import importlib.metadata

    versions = {"python": platform.python_version()}
    for name in ("lvlm-probe", "torch", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return versions


def _json_ready(value: Any) -> Any:
    if isinstance(value, dict) or hasattr(value, "items"):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_json_ready(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor) or hasattr(value, "tolist"):
        return value.tolist()
    return str(value)
