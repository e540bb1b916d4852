"""Repeats: does the heatmap come out the same with other random numbers, and after another wording of the question?

Agreement says nothing about truth: a method that draws the image's edges agrees with itself perfectly. Disagreement
does: where chance decides the map, no single map is the reason for the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_probe.errors import ExplainError
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.models.exhaustion import told_out_of_memory
from lvlm_probe.progress import Progress
from lvlm_probe.replaying.isolation import outside_modes
from lvlm_probe.replaying.own_scores import Contrast
from lvlm_probe.sanity.checks import (
    AGREEING,
    AnyHeatmap,
    Check,
    SanityCheck,
    Verdict,
    again,
    cannot_say,
    opened,
    step_of,
)
from lvlm_probe.sanity.stability import stability
from lvlm_probe.selection import TokenSelection, scored_selection, select_tokens

if TYPE_CHECKING:
    from lvlm_probe.replaying import Replay


@naming_arguments
@outside_modes
@told_out_of_memory
def seeds(
    replay: Replay, heat: AnyHeatmap, *, seeds: int | Sequence[int] = 5, progress: Progress | None = None
) -> SanityCheck:
    """Explain the answer again with other seeds: it passes where two maps share half of their highest fifth.

    Costs one explanation per seed besides the heatmap's own. Method, parameters, tokens, image and baseline are the
    heatmap's.

    Args:
        replay: the same answer on its model.
        heat: the heatmap, from ``explain``.
        seeds: how many maps to compare, the given one among them, or the other seeds.
        progress: called with (done, total) explanations.

    Returns:
        The check, with ``stability`` over all pairs of maps, whose ``top_iou`` decides. A method that draws no random
        numbers passes.

    Raises:
        ExplainError: no other seed; the heatmap has no values or is of another answer, or its method is not registered.
        ImageError: the heatmap was made over an image of the user's that the replay does not have.
        ProbeError: scipy is missing (``pip install 'lvlm-probe[stats]'``).
    """
    own = heat.provenance.get("seed", 0)
    others = [seed for seed in range(seeds) if seed != own][: seeds - 1] if isinstance(seeds, int) else list(seeds)
    others = list(dict.fromkeys(seed for seed in others if seed != own))
    if not others:
        raise ExplainError(f"stability over seeds takes at least two different ones; got {seeds!r} besides {own}")
    subject = opened(replay, heat)
    made = []
    for done, seed in enumerate(others):
        made.append(again(subject, heat, seed=seed))
        if progress is not None:
            progress(done + 1, len(others))
    return _compared("seeds", heat, made, [f"seed {seed}" for seed in others], {"seeds": [own, *others]})


@naming_arguments
@outside_modes
@told_out_of_memory
def prompts(
    replay: Replay,
    heat: AnyHeatmap,
    others: Sequence[str | Replay],
    *,
    question: str | None = None,
    progress: Progress | None = None,
) -> SanityCheck:
    """Explain the same words after other wordings of the question: it passes where two maps share half of
    their highest fifth.

    Costs one explanation per wording. Method, parameters, image and baseline are the heatmap's.

    Args:
        replay: the same answer on its model.
        heat: the heatmap, from ``explain``.
        others: paraphrases of the question, after which the recorded answer is scored as it is; or replays of the
            answers that the model gave to them on the same image, in which the heatmap's words are looked for.
        question: the question as it stands in the prompt; by default what was recorded as such.
        progress: called with (done, total) explanations.

    Returns:
        The check, with ``stability`` over all pairs of maps.

    Raises:
        ExplainError: no other wording; the heatmap has no values or is of another answer, its method is not registered,
            or it is of an image of another size than a replay's.
        ImageError: the heatmap was made over an image of the user's that the replay does not have.
        ReplayError: there is no tokenizer, or the prompt does not hold the question.
        SelectionError: another answer does not contain the heatmap's words.
        ProbeError: scipy is missing (``pip install 'lvlm-probe[stats]'``).
    """
    if isinstance(others, str) or not others:
        raise ExplainError(f"prompts takes several wordings of the question, or replays; got {others!r}")
    subject = opened(replay, heat)
    made, names = [], []
    for done, other in enumerate(others):
        asked = subject.reworded(other, question=question) if isinstance(other, str) else other.over(subject.baseline)
        same = tuple(asked.tokens) == heat.selection.tokens
        chosen = heat.selection if same else _found_again(asked, heat.selection)
        made.append(again(asked, heat, selection=chosen))
        names.append(other if isinstance(other, str) else str(getattr(other.trace, "question", None) or other.trace_id))
        if progress is not None:
            progress(done + 1, len(others))
    return _compared("prompts", heat, made, names, {"prompts": names})


def _found_again(replay: Replay, selection: TokenSelection) -> TokenSelection:
    """The same words, or the same contrast, in another answer."""
    score = selection.score
    if score is None:
        return select_tokens(replay, words=selection.text.split(" … "))
    if not isinstance(score, Contrast):
        return scored_selection(replay, score)
    sides: list[Any] = [score.said, list(score.texts)]
    words, against = reversed(sides) if score.turned else sides
    return select_tokens(replay, words=words, against=against)


def _compared(
    check: Check, heat: AnyHeatmap, made: list[AnyHeatmap], names: list[str], params: dict[str, Any]
) -> SanityCheck:
    steps = tuple(step_of(name, heat, other) for name, other in zip(names, made, strict=True))
    why, agreed = cannot_say(heat, steps), None
    verdict: Verdict
    if why is not None:
        verdict, reason = "cannot say", why
    else:
        agreed = stability([heat, *made])
        verdict = "passes" if agreed.top_iou > AGREEING else "fails"
        same = all(np.array_equal(np.asarray(heat.values), np.asarray(other.values)) for other in made)
        reason = (
            f"two of {agreed.n} maps share their highest fifth with an overlap of {agreed.top_iou:.2f} in the mean "
            f"(limit {AGREEING:.2f}, of unrelated maps 0.11), rank correlation {agreed.rank_correlation:.2f}"
        )
        if same and check == "seeds":
            reason = f"the maps are identical: {heat.method} draws no random numbers"
        if agreed.missing:
            reason += f"; {agreed.missing} further ones have no values"
    return SanityCheck(check, verdict, reason, AGREEING, steps, params, heat, tuple(made), agreed)
