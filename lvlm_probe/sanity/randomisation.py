"""Randomisation checks (Adebayo et al., 2018): does a heatmap depend on the model, and on the answer, at all?

A method that draws the same map for a model with random weights draws the image's edges, not the model's reasons.

**Weights.** The model's weights are randomised, the same answer is explained again, and the heatmaps are compared.
*Cascading*: from the output layer down to the input, block after block, all of them random in the end. *Independent*:
one block at a time. ``random_weights`` says how they are drawn.

**Answers.** The tokens that are explained are replaced by other ones, drawn at random, and the same image is explained
for that sentence, ``f = Σ_k log P(a'_k | a'_<k, image)``: teacher forcing scores any answer, said or not. It is the
random-logit test (Sixt et al., 2020) on a sequence. Read it with care: the evidence *against* "blue" lies where that
for "red" does, so a map of random words may rightly resemble the first one; only one that is the same fails.
Attention on its own (rows, rollout) does not know which word it leads to, and fails on a single word by construction.

Method, parameters, tokens and baseline image are those of the heatmap that is checked, throughout.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from lvlm_probe.errors import ExplainError
from lvlm_probe.kinds import is_whole, naming_arguments
from lvlm_probe.models.anatomy import lm_head
from lvlm_probe.models.exhaustion import told_out_of_memory
from lvlm_probe.models.replica import duplicated
from lvlm_probe.models.tokenizers import decoder_config, special_ids, vocabulary_size
from lvlm_probe.progress import Progress
from lvlm_probe.replaying import replay as make_replay
from lvlm_probe.replaying.isolation import outside_modes
from lvlm_probe.sanity.checks import (
    SAME,
    SIMILAR,
    AnyHeatmap,
    SanityCheck,
    SanityStep,
    Verdict,
    again,
    cannot_say,
    opened,
    step_of,
)
from lvlm_probe.sanity.random_weights import How, grouped, randomised, weight_blocks

if TYPE_CHECKING:
    from lvlm_probe.replaying import Replay
    from lvlm_probe.selection import TokenSelection
    from lvlm_probe.trace import Trace


@naming_arguments
@outside_modes
@told_out_of_memory
def weights(
    replay: Replay,
    heat: AnyHeatmap,
    *,
    kind: Literal["cascading", "independent"] = "cascading",
    how: How = "normal",
    blocks: Sequence[str] | None = None,
    stages: int | None = None,
    draws: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
) -> SanityCheck:
    """Explain the answer again on the model with random weights: a map that stays the same says nothing of the model.

    It passes where the rank correlation with the heatmap, |ρ|, is at most 0.5 once every weight is random, in the mean
    over ``draws`` (of ``"independent"``, over blocks). Random are weights of a duplicate of the model's modules; the
    model's own are not touched, so that it may go on answering meanwhile. Costs one explanation per stage and further
    draw, and memory for what is randomised: once more on its device, and twice on the CPU. Method, parameters, tokens,
    image and baseline are the heatmap's.

    Args:
        replay: the same answer on its model.
        heat: the heatmap, from ``explain``.
        kind: ``"cascading"``, from the output down, or ``"independent"``, each block alone.
        how: ``"normal"`` or ``"permute"``, how weights are drawn: see ``random_weights``.
        blocks: patterns of module paths (fnmatch), each one block, in the order to go through them; by default all of
            the model: output layer, decoder layers from the last to the first, token embeddings, mergers, encoders.
        stages: at most so many steps, by taking neighbouring blocks together; by default one per block.
        draws: how many times all weights are drawn at the end of a cascade: one random model may draw a like map by
            chance.
        seed: of the random weights: block and seed decide them, not the order; the next draw takes the next seed.
        progress: called with (done, total) explanations.

    Raises:
        ExplainError: the heatmap has no values or is of another answer, its method is not registered, or weights cannot
            be randomised (quantised, offloaded).
        ImageError: the heatmap was made over an image of the user's that the replay does not have.
        PointNotFound: a pattern of ``blocks`` matches no module.
        ProbeError: scipy is missing (``pip install 'lvlm-probe[stats]'``).
    """
    if kind not in ("cascading", "independent"):
        raise ExplainError(f"kind is 'cascading' or 'independent'; got {kind!r}")
    if how not in ("normal", "permute"):
        raise ExplainError(f"how is 'normal' or 'permute'; got {how!r}")
    if draws < 1:
        raise ExplainError(f"draws is at least 1; got {draws}")
    subject, trace = opened(replay, heat), cast(Any, replay.trace)
    random_model = duplicated(subject.model)
    groups = grouped(weight_blocks(random_model, blocks), stages)
    draws = draws if kind == "cascading" else 1
    steps: list[SanityStep] = []
    heatmaps: list[AnyHeatmap] = []
    modules: tuple[str, ...] = ()
    numbers = 0
    drawn: dict[str, torch.nn.Parameter] = {}

    def explained(name: str) -> None:
        # A replay remembers log-probabilities, which are another model's now; and that one has another fingerprint.
        heatmaps.append(again(_replayed(subject, _Unrecorded(trace), random_model), heat))
        steps.append(step_of(name, heat, heatmaps[-1], modules=modules, weights=numbers))
        if progress is not None:
            progress(len(steps), len(groups) + draws - 1)

    with ExitStack() as random:
        for name, block in groups.items():
            if kind == "independent":
                random.close()
                modules, numbers = (), 0
            own = _owned(random_model, block)
            drawn |= own
            random.enter_context(randomised(own, how=how, seed=seed))
            modules = (*modules, *dict.fromkeys(path.rpartition(".")[0] for path in block))
            numbers += sum(weight.numel() for weight in block.values())
            explained(name)
        for extra in range(1, draws):
            with randomised(drawn, how=how, seed=seed + extra):
                explained(f"all of them, drawn with seed {seed + extra}")
    verdict, reason = _judged_weights(heat, steps, None if kind == "independent" else draws)
    params = {"kind": kind, "how": how, "draws": draws, "seed": seed}
    return SanityCheck("weights", verdict, reason, SIMILAR, tuple(steps), params, heat, tuple(heatmaps))


@naming_arguments
@outside_modes
@told_out_of_memory
def answers(
    replay: Replay,
    heat: AnyHeatmap,
    *,
    draws: int = 3,
    pool: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> SanityCheck:
    """Explain other words in the place of the explained ones: a map that stays the same says nothing of the words.

    It passes where the mean rank correlation with the heatmap, |ρ|, is at most 0.5, and fails above 0.95; between them
    the check cannot say, as the evidence against one word may be that for another. Costs one explanation per draw.
    Method, parameters, image and baseline are the heatmap's.

    Args:
        replay: the same answer on its model.
        heat: the heatmap, from ``explain``.
        draws: how many times words are drawn.
        pool: token ids to draw from; by default the vocabulary without special tokens. Ids of words that could stand
            there ("red", "blue", "left") make the harder and fairer test.
        seed: of the draws.
        progress: called with (done, total) explanations.

    Raises:
        ExplainError: the heatmap has no values or is of another answer, its method is not registered, or there is
            nothing to draw from.
        ImageError: the heatmap was made over an image of the user's that the replay does not have.
        ProbeError: scipy is missing (``pip install 'lvlm-probe[stats]'``).
    """
    if draws < 1:
        raise ExplainError(f"draws is at least 1; got {draws}")
    subject = opened(replay, heat)
    if not heat.selection.indices:
        raise ExplainError(f"{heat.selection.label!r} is of no words of the answer, so no others can take their place")
    processor = subject.processor
    known = vocabulary_size(subject.model)
    if pool is not None and not all(is_whole(token) and 0 <= int(token) < known for token in pool):
        raise ExplainError(f"pool holds token ids, 0 to {known - 1}; got {list(pool)[:8]}")
    ids = _vocabulary(subject.model, processor) if pool is None else torch.as_tensor(list(pool), dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    steps, heatmaps = [], []
    for draw in range(draws):
        other = _other_answer(cast(Any, subject.trace), heat.selection, ids, generator, processor)
        selection = dataclasses.replace(heat.selection, tokens=tuple(other.tokens), llr=())
        made = again(_replayed(subject, other, subject.model), heat, selection=selection)
        heatmaps.append(made)
        steps.append(step_of(selection.text, heat, made))
        if progress is not None:
            progress(draw + 1, draws)
    verdict, reason = judged_answers(heat, steps)
    source = "the vocabulary" if pool is None else f"{len(ids)} given tokens"
    params = {"draws": draws, "from": source, "seed": seed}
    return SanityCheck("answers", verdict, reason, SAME, tuple(steps), params, heat, tuple(heatmaps))


def _judged_weights(heat: AnyHeatmap, steps: Sequence[SanityStep], draws: int | None) -> tuple[Verdict, str]:
    """From the last ``draws`` steps, which have all weights random, or from all of them.

    A constant heatmap, and none where there was one, is as different as can be.
    """
    if (why := cannot_say(heat, steps)) is not None:
        return "cannot say", why
    likeness = _likeness(steps)[-(draws or 0) :]
    kept = sum(likeness) / len(likeness)
    when = "with one block of weights random at a time" if draws is None else "with the weights of all blocks random"
    said = f"{when}, the rank correlation with the heatmap is {kept:.2f}"
    said += f" in the mean of {len(likeness)} (limit {SIMILAR:g})" if len(likeness) > 1 else f" (limit {SIMILAR:g})"
    if kept > SIMILAR:
        return "fails", f"{said}: the image draws it rather than what the model has learnt"
    return "passes", said


def judged_answers(heat: AnyHeatmap, steps: Sequence[SanityStep]) -> tuple[Verdict, str]:
    """The verdict on a heatmap and its sentence, from the heatmaps of other words."""
    if (why := cannot_say(heat, steps)) is not None:
        return "cannot say", why
    likeness = _likeness(steps)
    kept = sum(likeness) / len(likeness)
    said = f"for {len(steps)} draws of other words, the mean rank correlation with the heatmap is {kept:.2f}"
    if kept > SAME:
        return "fails", f"{said} (limit {SAME:g}): it does not depend on the words that it is said to explain"
    if kept > SIMILAR:
        return (
            "cannot say",
            f"{said}, between {SIMILAR:g} and {SAME:g}: evidence against one word may be that for another",
        )
    return "passes", f"{said} (limit {SIMILAR:g})"


def _likeness(steps: Sequence[SanityStep]) -> list[float]:
    rhos = [math.nan if one.similarity is None else one.similarity.rank_correlation for one in steps]
    return [0.0 if math.isnan(rho) else abs(rho) for rho in rhos]


def _replayed(subject: Replay, trace: Any, model: torch.nn.Module) -> Replay:
    """Another answer or another model, over the baseline of the subject."""
    fresh = make_replay(
        trace,
        model,
        subject.processor,
        strict=model is subject.model,
        micro_batch=subject.limits.micro_batch,
        gradient_checkpointing=subject.gradient_checkpointing,
    )
    if subject.baseline.get("kind") == "image":  # the user's own, which the description does not hold
        fresh = fresh.over(list(subject.path.baseline_images))
    return fresh.over(subject.baseline)


def _owned(model: torch.nn.Module, weights: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.nn.Parameter]:
    """These weights of a duplicate, from now on its own; a weight that modules share stays one."""
    own = {
        id(weight): torch.nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        for weight in weights.values()
    }
    for module in model.modules():
        for name, weight in module._parameters.items():
            if id(weight) in own:
                module._parameters[name] = own[id(weight)]
    return {path: own[id(weight)] for path, weight in weights.items()}


def _vocabulary(model: torch.nn.Module, processor: object | None) -> torch.Tensor:
    tokenizer: Any = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise ExplainError("without a tokenizer special tokens cannot be told from words: give the processor, or pool=")
    special = special_ids(tokenizer)
    rows = getattr(lm_head(model), "weight", None)  # fewer than embeddings, where some are for images
    said = getattr(decoder_config(model), "vocab_size", None) if rows is None else rows.shape[0]
    size = min(len(tokenizer), vocabulary_size(model), said if isinstance(said, int) else len(tokenizer))
    return torch.tensor([index for index in range(size) if index not in special], dtype=torch.long)


def _other_answer(
    trace: Trace,
    selection: TokenSelection,
    pool: torch.Tensor,
    generator: torch.Generator,
    processor: object | None,
) -> _Unrecorded:
    ids, tokens = [int(index) for index in trace.token_ids], list(trace.tokens)
    tokenizer: Any = getattr(processor, "tokenizer", None)
    for step in selection:
        candidates = pool[pool != ids[step]]
        if len(candidates) == 0:
            raise ExplainError(f"the pool holds no token besides the recorded {tokens[step]!r}: give more")
        ids[step] = int(candidates[torch.randint(len(candidates), (1,), generator=generator)])
        tokens[step] = f" <{ids[step]}>" if tokenizer is None else str(tokenizer.decode([ids[step]]))
    return _Unrecorded(trace, token_ids=ids, tokens=tokens)


class _Unrecorded:
    """A trace without what the recorded model computed, which says nothing of another model or another answer."""

    log_probs = baseline_log_probs = llr = attention = None
    points: tuple[str, ...] = ()

    def __init__(self, trace: Trace, **others: Any) -> None:
        self._trace = trace
        vars(self).update(others)

    def __getattr__(self, name: str) -> Any:
        if name == "_trace":  # not there yet, while being copied
            raise AttributeError(name)
        return getattr(self._trace, name)
