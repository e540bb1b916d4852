"""``explain``: runs one method on the selected tokens and wraps its values in a ``Heatmap`` with provenance."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

from lvlm_probe._version import versions_of
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.registry import (
    Outcome,
    Problem,
    check_parameters,
    cost_of,
    follows_score,
    methods,
    needs_of,
    resolve,
    stands_for,
)
from lvlm_probe.explainers.scores import NO_SIGHT, check_rules, no_effect, no_slope, whole_rule
from lvlm_probe.explainers.trace_only import RecordedAnswer
from lvlm_probe.files import json_ready
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.kinds import is_whole, plain_number, told_by_kind
from lvlm_probe.models.exhaustion import out_of_memory, ran_out
from lvlm_probe.progress import ProgressChoice, show_progress
from lvlm_probe.replaying import Replay, ReplayLike
from lvlm_probe.replaying.isolation import taking_turns
from lvlm_probe.replaying.own_scores import OwnScore
from lvlm_probe.replaying.reduced_precision import check_reducible, told_by_kernels
from lvlm_probe.selection import Against, TokenSelection, scored_selection, select_tokens
from lvlm_probe.trace import Trace

if TYPE_CHECKING:
    import torch

    from lvlm_probe.trace.clips import Clip

Tokens = str | tuple[int, int] | list[int] | Sequence[str] | TokenSelection | OwnScore


@dataclass(frozen=True)
class Recipe:
    """How maps are made, whatever answer, words and image they are of.

    Attributes:
        method: name of a registered explainer.
        params: parameters of the method.
        seed: of everything random.
        search_dtype: number format that the method searches in; ``None`` is the model's own.
    """

    method: str = "igos++"
    params: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    search_dtype: str | None = None

    @property
    def asked(self) -> dict[str, Any]:
        """The same, as arguments of ``explain``."""
        return {"method": self.method, "seed": self.seed, "search_dtype": self.search_dtype, **self.params}


class RunPlan(Protocol):
    """How to run a method, as ``lvlm_probe.plan`` says: masks at once, and whether layers run again in backward."""

    @property
    def method(self) -> str:
        """The method it was made for."""

    @property
    def micro_batch(self) -> int | None:
        """Masks per pass; ``None`` leaves it to the replay."""

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether layers are run again in backward."""

    @property
    def search_dtype(self) -> str | None:
        """The number format that the method searches in; ``None`` is the model's own."""

    @property
    def peak(self) -> int | None:
        """Predicted bytes beyond the weights."""

    @property
    def weights(self) -> int:
        """Bytes of the model's weights."""


@taking_turns
def explain(
    replay: ReplayLike | Trace,
    *,
    method: str = "igos++",
    tokens: Tokens | None = None,
    against: Against | None = None,
    image: int = 0,
    seed: int = 0,
    strengthen: bool = True,
    progress: ProgressChoice = None,
    plan: RunPlan | None = None,
    search_dtype: str | None = None,
    **params: Any,
) -> Heatmap:
    """Explain why a recorded answer says what it says: which regions of the image made the selected tokens likely.

    The result is the same whatever ran before it, and the replay stays as it is.

    Args:
        replay: the recorded answer on its model. The trace alone will do for methods that run no pass, where it holds
            what they need (``needs_of(method)``).
        method: name of a registered explainer.
        tokens: what to explain: ``None`` for the tokens the image is responsible for (paper, Eq. 6, alpha = 1), a
            word or phrase of the answer, several of them, a token span as a tuple ``(start, stop)``, token numbers as a
            list ``[0, 3]``, a selection, or a score of your own (``probe.score``).
        against: a word that might have stood there, several of which any, or ``"next"`` for the model's own second
            choice at the first token: why it said the one and not the other. What is explained is log P(said) − log
            P(not said) (``Contrast``): the map shows what speaks for the said word against the other. With the two
            exchanged, ``tokens`` not said and ``against`` said, it shows what speaks for the other.
        image: number of the image, when the prompt has several.
        seed: of everything random in the explanation; the global random state is not touched.
        strengthen: blur the replay's baseline harder while the selected tokens keep 5 % of probability on it (paper,
            A.1); ``provenance["baseline"]`` names the baseline that was used, and ``evaluate`` judges over it.
        progress: called with (done, total); by default a bar where a person waits, ``False`` for none.
        plan: how to run it, from ``lvlm_probe.plan``: masks at once, and whether layers are run again in backward. By
            default the replay's ``micro_batch``, or a rule; when memory runs out, half as many at once.
        search_dtype: ``"bfloat16"`` lets the method's own passes compute in it on a model in float32: faster where the
            processor has instructions for it, by a map that is not quite the same. What selects tokens and baseline,
            and what maps are compared and scored by, is computed as ever. ``None`` computes everything as the model
            does.
        params: parameters of the method.

    Returns:
        The heatmap; without values, but with a reason, when nothing is selected or the image plays no part: the
        selected tokens' log-probabilities move by no more than rounding when it alone is replaced by its baseline.
        ``provenance["passes"]`` counts every image that went through the model for it: selecting tokens,
        strengthening the baseline and measuring included, as far as nothing before has found the same out;
        ``provenance["search"]`` says how many of them were computed in ``search_dtype``, where one is given.

    Raises:
        ExplainError: unknown method or parameter, the method cannot run here, it needs gradients and the model's are
            not whole, or the model cannot be computed in ``search_dtype``.
        OutOfMemory: not even one mask fits; the message says what it would take.
        SelectionError: the answer does not contain the words or span.
    """
    check_rules("explain", image=whole_rule(image, 0))
    image = int(image)
    if frame_of(replay, image) is not None:
        raise ExplainError(
            f"image {image} is a frame of a video: probe.video.explain(replay) explains by the whole of it, in time "
            "and space"
        )
    return Heatmap(
        **run(
            replay,
            image,
            Recipe(method, params, seed, search_dtype),
            tokens=tokens,
            against=against,
            strengthen=strengthen,
            progress=progress,
            plan=plan,
        ),
        image_index=image,
    )


def frame_of(replay: ReplayLike | Trace, image: int) -> Clip | None:
    """The video that an image of the prompt is a frame of; ``None`` where it is none."""
    trace = replay if isinstance(replay, Trace) else replay.trace
    clips: Sequence[Clip] = getattr(trace, "clips", ())  # an analytic replay need not have any
    return next((clip for clip in clips if image in clip.images), None)


def target_of(replay: ReplayLike | Trace, image: int) -> int | Clip:
    """What an image of the prompt is explained by: itself, or the video that it is a frame of."""
    clip = frame_of(replay, image)
    return image if clip is None else clip


def run(
    replay: ReplayLike | Trace,
    target: int | Clip,
    recipe: Recipe,
    *,
    tokens: Tokens | None,
    against: Against | None,
    strengthen: bool,
    progress: ProgressChoice,
    plan: RunPlan | None,
) -> dict[str, Any]:
    """Run a method as ``explain`` says, by an image or by a clip; what its heatmap is made of, by name.

    Raises:
        ExplainError, OutOfMemory, SelectionError: as ``explain``.
    """
    method, live = recipe.method, not isinstance(replay, Trace)
    params = {name: plain_number(value) for name, value in recipe.params.items()}
    replay = _checked(replay, dataclasses.replace(recipe, params=params), plan)
    clip, image = (None, target) if isinstance(target, int) else (target, target.first)
    if not 0 <= image < replay.n_images:
        raise ExplainError(f"image={image}, but the prompt has {replay.n_images} image(s), counted from 0")
    started = time.perf_counter()
    if live:
        replay = _counted(replay, plan)
    # A method declares its cost by the image and its parameters: no tokens need to be selected for it.
    unselected = Problem(replay, cast(TokenSelection, None), image, recipe.seed, live=live, clip=clip)
    images = functools.cache(lambda: cost_of(method, unselected, params).forward)
    if live:
        replay.announce(method, images, None)
    selection = selected(replay, tokens, against)
    replay = cast(Replay, scored_by(replay, selection, method))
    problem = dataclasses.replace(unselected, selection=selection, replay=replay)
    if live and selection:
        replay.announce(method, images, selection.columns)
    before = _Before(replay) if live else None
    if not selection:
        outcome = Outcome(None, params, reason=f"nothing to explain: {selection.reason}")
    else:
        if live and strengthen:
            replay = replay.strengthened(selection.decided)
        with show_progress(progress, f"explaining by {method}") as advance:
            problem = dataclasses.replace(problem, replay=replay, progress=advance).searched_in(recipe.search_dtype)
            outcome = _run(problem, method, params)
    values = outcome.values
    _check_values(values, method, 2 if clip is None else 3)
    provenance = _provenance(replay, recipe.seed, time.perf_counter() - started)
    if before is not None:
        provenance |= before.since(problem, plan)
    if outcome.diagnostics:
        provenance["diagnostics"] = json_ready(outcome.diagnostics, nonfinite=float)
    return {
        "values": None if values is None else values.detach().float().cpu().numpy(),
        "image_size": replay.image_sizes[image],
        "seen": None if values is None else problem.seen(tuple(values.shape)).numpy(),
        "selection": selection,
        "method": method,
        "params": json_ready(outcome.params, nonfinite=float),
        "provenance": provenance,
        "history": tuple(dict(record) for record in outcome.history),
        "reason": outcome.reason,
        "trace": cast(Trace, replay.trace),
    }


def _checked(replay: ReplayLike | Trace, recipe: Recipe, plan: RunPlan | None) -> Replay:
    """What a method runs on. Raises ``ExplainError`` where it cannot, or not as the recipe or the plan has it."""
    method, dtype = recipe.method, recipe.search_dtype
    check_parameters(method, resolve(method), recipe.params)
    check_search(replay, dtype)
    if isinstance(replay, Trace):
        _refuse_model_work(method)
    else:
        _refuse_what_it_lacks(method, replay)
    if plan is not None and (plan.method, plan.search_dtype) != (method, dtype):
        planned, wanted = (
            f"{name!r}" + ("" if searched is None else f" searched in {searched}")
            for name, searched in ((plan.method, plan.search_dtype), (method, dtype))
        )
        more = "" if dtype is None else f", search_dtype={dtype!r}"
        raise ExplainError(f"this plan is of {planned}, not of {wanted}: plan(replay, method={method!r}{more})")
    return cast(Replay, RecordedAnswer(replay) if isinstance(replay, Trace) else replay)


def _check_values(values: torch.Tensor | None, method: str, axes: int) -> None:
    if values is not None and (values.ndim != axes or not bool(((values >= 0) & (values <= 1)).all())):
        raise ExplainError(
            f"{method} returned values of shape {tuple(values.shape)} outside [0, 1]; a heatmap is "
            f"{'(row, col)' if axes == 2 else '(t, row, col)'} in [0, 1]"
        )


def scored_by(replay: Any, selection: TokenSelection, method: str | None = None) -> Any:
    """The replay as a selection scores it: a view with the column of its own score, where it has one.

    Raises:
        ExplainError: the method follows no score, or the replay is of a model that is not in this process.
    """
    score = selection.score
    if score is None:
        return replay
    if method is not None and not follows_score(method):
        raise ExplainError(
            f"{method} follows no score, so it has no map of {score.name!r}: it shows where a word looks, whatever "
            f"else it is compared with; use "
            f"{', '.join(name for name in methods() if needs_of(name) and follows_score(name))}"
        )
    if not isinstance(replay, Replay):
        raise ExplainError(
            f"{score.name!r} is scored inside the model's passes, and this is a replay without: load the model here, "
            "probe.replay(trace, model, processor)"
        )
    return replay.scored(score)


def selected(replay: Replay, tokens: Tokens | None, against: Against | None = None) -> TokenSelection:
    """The selection that ``explain(replay, tokens=…, against=…)`` explains. Raises as ``explain`` does."""
    if against is not None and isinstance(tokens, TokenSelection | OwnScore):
        raise ExplainError("against goes with words, a span or token numbers; select_tokens(…, against=…) has its own")
    if tokens is None:
        return select_tokens(replay, against=against)
    if isinstance(tokens, OwnScore):
        return scored_selection(replay, tokens)
    if isinstance(tokens, TokenSelection):
        if tokens.tokens != tuple(replay.tokens):
            raise ExplainError(
                f"this selection was made on another answer ({''.join(tokens.tokens)[:60]!r}) than the one to explain "
                f"({''.join(replay.tokens)[:60]!r}); call select_tokens on this replay"
            )
        return tokens
    if isinstance(tokens, str):
        return select_tokens(replay, words=tokens, against=against)
    items: list[Any] = list(tokens) if isinstance(tokens, Sequence) else []
    if items and all(map(is_whole, items)):
        # A tuple of two is a span, as in select_tokens; a list is a list of token numbers, however long.
        if isinstance(tokens, tuple) and len(items) == 2:
            return select_tokens(replay, span=(items[0], items[1]), against=against)
        return select_tokens(replay, indices=items, against=against)
    if items and all(isinstance(item, str) for item in items):
        return select_tokens(replay, words=items, against=against)
    raise ExplainError(
        f"tokens is a word, several words, a span (start, stop), a list of token numbers, a selection or a score; got "
        f"{tokens!r}"
    )


def words_of(replay: Replay, tokens: Tokens | None) -> TokenSelection:
    """The selection, which is one of words alone. Raises ``ExplainError`` where it has a score of its own."""
    selection = selected(replay, tokens)
    if selection.score is not None:
        raise ExplainError(
            f"this is measured by log-likelihood, and {selection.score.name!r} is another score: select the words alone"
        )
    return selection


def _refuse_model_work(method: str) -> None:
    model_work = sorted({"passes", "gradients"} & needs_of(method))
    if model_work:
        raise ExplainError(
            f"{method} needs {' and '.join(model_work)} of the model, and a trace has none: explain "
            f"probe.replay(trace, model, processor), or use a method that runs on a trace alone: "
            f"{', '.join(name for name in methods() if not {'passes', 'gradients'} & needs_of(name))}"
        )


def _refuse_what_it_lacks(method: str, replay: ReplayLike) -> None:
    def lacking(name: str) -> list[str]:
        return [] if stands_for(name) & replay.offers else sorted(needs_of(name) - replay.offers)

    if missing := lacking(method):
        less = "" if "passes" in replay.offers else f" but for {' and '.join(sorted(replay.offers))}"
        can = ", ".join(name for name in methods() if needs_of(name) and not lacking(name))
        raise ExplainError(
            f"{method} needs {' and '.join(missing)} of the model, which {replay.origin['device']} does not give"
            f"{less}: use {can}"
        )


def _counted(replay: Replay, plan: RunPlan | None) -> Replay:
    """A view of the replay with a pass counter of its own, run as the plan says."""
    counted = replay.counted()
    if plan is None:
        return counted
    return counted.with_settings(micro_batch=plan.micro_batch, gradient_checkpointing=plan.gradient_checkpointing)


def check_search(replay: ReplayLike | Trace, dtype: str | None) -> None:
    """Raise ``ExplainError`` where a method cannot search in the number format ``dtype``; ``None`` is the model's."""
    if dtype is None:
        return
    if not isinstance(replay, Replay):
        raise ExplainError(
            f"search_dtype={dtype!r} is for passes of a model in this process, and this is explained without: leave "
            "search_dtype out, or load the model here, probe.replay(trace, model, processor)"
        )
    check_reducible(replay.model, dtype)


def _run(problem: Problem, method: str, params: Mapping[str, Any]) -> Outcome:
    """The method's outcome, or the reason why the image plays no part."""
    function = resolve(method)
    reason = no_effect(problem)
    if reason is not None:
        return Outcome(None, params, reason=reason)
    if not problem.live:
        with told_by_kind(method, function, params):
            return function(problem, **params)
    replay = problem.replay
    with problem.caching():
        if "gradients" in needs_of(method):
            replay.require_gradients()
        try:
            with nullcontext() if problem.exact is None else told_by_kernels(replay.model):
                with told_by_kind(method, function, params):
                    outcome = function(problem, **params)
                if outcome.values is None and outcome.reason != NO_SIGHT and "gradients" in needs_of(method):
                    outcome = dataclasses.replace(outcome, reason=no_slope(problem) or outcome.reason)
                return outcome
        except Exception as error:
            if not ran_out(error):
                raise
            raise out_of_memory(
                f"{method} on {replay.trace_id} ran out of memory of {replay.device}: give replay() a micro_batch=…, "
                f"a smaller size=… of the heatmap, or load the model in bfloat16; plan(replay, method={method!r}) "
                f"says what it takes",
                error,
            ) from error


class _Before:
    """Counts of a replay before a method runs on it, for what its provenance says of the run alone."""

    def __init__(self, replay: Replay) -> None:
        self.shortcuts = replay.shortcuts
        self.asked, self.recovered = self.shortcuts.asked, len(replay.limits.recovered)

    def since(self, problem: Problem, plan: RunPlan | None) -> dict[str, Any]:
        """What passes left out, how they were run and in which format, and what was changed when memory ran out."""
        replay, search = problem.measuring, {}
        if problem.exact is not None and (reduced := problem.replay.reduced) is not None:
            spent = problem.replay.passes
            search["search"] = {"dtype": reduced.dtype, "forward": spent.forward, "backward": spent.backward}
            if problem.replay.shortcuts.asked:
                search["search"]["shortcuts"] = str(problem.replay.shortcuts)
        memory: dict[str, Any] = {
            "micro_batch": replay.masks_at_once,
            "gradient_checkpointing": replay.recomputes,
        }
        if plan is not None:
            memory |= {"predicted_peak": plan.peak, "weights": plan.weights}
        recovered = replay.limits.recovered[self.recovered :]
        memory |= {"recovered": recovered} if recovered else {}
        # Also where passes could leave out nothing, which the text says.
        left_out = {"shortcuts": str(self.shortcuts)} if self.shortcuts.asked > self.asked else {}
        return {**left_out, **search, "memory": memory}


def _provenance(replay: Replay, seed: int, seconds: float) -> dict[str, Any]:
    return {
        "trace_id": replay.trace_id,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "seed": seed,
        "baseline": json_ready(replay.baseline, nonfinite=float),
        "passes": {"forward": replay.passes.forward, "backward": replay.passes.backward},
        "seconds": round(seconds, 4),
        **replay.origin,
        "versions": {"python": platform.python_version(), **versions_of("lvlm-probe", "torch", "transformers")},
    }
