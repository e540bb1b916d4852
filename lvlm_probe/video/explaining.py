"""``explain`` for videos: methods whose masks, or whose tokens' tubes, have an axis of time."""

from __future__ import annotations

from typing import Any

from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.explaining import Recipe, RunPlan, Tokens, run
from lvlm_probe.explainers.explaining import explain as explain_image
from lvlm_probe.explainers.registry import METHODS, resolve
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.progress import ProgressChoice
from lvlm_probe.replaying import Replay
from lvlm_probe.replaying.isolation import taking_turns
from lvlm_probe.selection import Against
from lvlm_probe.trace import Trace
from lvlm_probe.trace.clips import Clip
from lvlm_probe.video.heatmap import ClipHeatmap


def clip_methods() -> list[str]:
    """Names of the methods that explain by a video, sorted."""
    return sorted(name for name, method in METHODS.items() if method.clips)


def clip_of(replay: Replay | Trace, clip: int, *, by_trace: bool = False) -> Clip:
    """The video number ``clip`` of the prompt.

    Raises:
        ExplainError: it has none such, or a trace is given where it takes the model.
    """
    if isinstance(replay, Trace) and not by_trace:
        raise ExplainError("this takes passes of the model: give probe.replay(trace, model, processor)")
    if not replay.clips:
        raise ExplainError("the prompt holds no video: probe.explain(replay) explains by an image")
    if not 0 <= clip < len(replay.clips):
        raise ExplainError(f"clip={clip}, but the prompt has {len(replay.clips)} video(s), counted from 0")
    return replay.clips[clip]


@taking_turns
def explain(
    replay: Replay | Trace,
    *,
    method: str = "igos++",
    tokens: Tokens | None = None,
    against: Against | None = None,
    clip: int = 0,
    seed: int = 0,
    strengthen: bool = True,
    progress: ProgressChoice = None,
    plan: RunPlan | None = None,
    search_dtype: str | None = None,
    **params: Any,
) -> ClipHeatmap:
    """Explain why a recorded answer about a video says what it says: which places in which frames made the selected
    tokens likely.

    Args:
        replay: the recorded answer on its model; the trace alone will do as for ``lvlm_probe.explain``.
        method: one of ``clip_methods()``.
        tokens, against, seed, strengthen, progress, plan, search_dtype: as for ``lvlm_probe.explain``.
        clip: number of the video, when the prompt has several; images and other videos stay whole.
        params: parameters of the method; ``size`` may be ``(steps, rows, columns)``.

    Returns:
        the heatmap; without values, but with a reason, when nothing is selected or the video plays no part.

    Raises:
        ExplainError: the prompt has no such video, the method does not explain by one, and as ``lvlm_probe.explain``.
        OutOfMemory, SelectionError: as ``lvlm_probe.explain``.
    """
    mine = clip_of(replay, clip, by_trace=True)
    resolve(method)
    if not METHODS[method].clips:
        raise ExplainError(f"{method} does not explain by a video; these do: {', '.join(clip_methods())}")
    made = run(
        replay,
        mine,
        Recipe(method, params, seed, search_dtype),
        tokens=tokens,
        against=against,
        strengthen=strengthen,
        progress=progress,
        plan=plan,
    )
    return ClipHeatmap(**made, clip=mine)


def explain_by(replay: Replay | Trace, *, target: int | Clip, **asked: Any) -> Heatmap | ClipHeatmap:
    """Explain by an image of the prompt or by one of its videos; ``asked`` is what ``explain`` takes besides."""
    if isinstance(target, int):
        return explain_image(replay, image=target, **asked)
    return explain(replay, clip=list(replay.clips).index(target), **asked)
