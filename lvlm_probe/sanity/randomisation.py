"""Sanity checks (Adebayo et al., 2018): does a heatmap depend on the model, and on the answer, at all?

A method that draws the same picture for a model with random weights draws the picture's edges, not the model's reasons.

**Weights.** The model's weights are randomised, the same answer is explained again, and the heatmaps are compared.
*Cascading*: from the output layer down to the input, block after block, all of them random in the end. *Independent*:
one block at a time. ``randomisation`` says how they are drawn.

**Answer.** The tokens that are explained are replaced by other ones, drawn at random, and the same picture is explained
for that sentence, ``f = Σ_k log P(a'_k | a'_<k, picture)``: teacher forcing scores any answer, said or not. It is the
random-logit test (Sixt et al., 2020) on a sequence. Read it with care: the evidence *against* "blue" lies where that
for "red" does, so a map of random words may rightly resemble the first one; only one that is the same is suspicious.
Attention on its own (rows, rollout) does not know which word it leads to, and fails on a single word by construction.

The tokens and the baseline picture are those of the first heatmap throughout.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from lvlm_probe.errors import ExplainError
from lvlm_probe.extras import require
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.metrics.scoring import BaselineChoice, over_baseline
from lvlm_probe.metrics.similarity import Similarity, compare_maps
from lvlm_probe.models.replica import duplicated
from lvlm_probe.sanity.random_weights import How, grouped, randomised, weight_blocks
from lvlm_probe.selection import TokenSelection

if TYPE_CHECKING:
    from lvlm_probe.replaying import Replay
    from lvlm_probe.trace import Trace

__all__ = ["SanityReport", "SanityStep", "answer_randomisation", "weight_randomisation"]

SIMILAR = 0.5
"""|ρ| above which a heatmap of a random model counts as the same picture: two unrelated maps with some 16 independent
regions have ρ of 0 ± 0.26, so 0.5 is about two standard deviations."""


@dataclass(frozen=True)
class SanityStep:
    """One heatmap under randomisation.

    Attributes:
        name: What was randomised: a block of the model, or the words put in.
        modules: Paths of all modules randomised at this step.
        weights: How many numbers were randomised.
        similarity: Likeness to the original heatmap; ``None`` where there was no heatmap any more.
        reason: Why there was none.
    """

    name: str
    modules: tuple[str, ...] = ()
    weights: int = 0
    similarity: Similarity | None = None
    reason: str | None = None

    @property
    def shown(self) -> str:
        """The rank correlation as text, or why there is none."""
        if self.similarity is None:
            return "no heatmap"
        rho = self.similarity.rank_correlation
        return "a constant heatmap" if math.isnan(rho) else f"{rho:.2f}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "name": self.name,
            "modules": list(self.modules),
            "weights": self.weights,
            "similarity": None if self.similarity is None else self.similarity.to_dict(),
            "reason": self.reason,
        }


@dataclass(frozen=True, repr=False)
class SanityReport:
    """How a heatmap changes when what it is said to explain is randomised.

    Attributes:
        kind: ``"cascading"``, ``"independent"`` or ``"answer"``.
        steps: In the order they were made; the last one of ``"cascading"`` has every block random.
        method, params, seed: The explainer, and the seed of the randomisation (the explainer's own is the heatmap's).
        how: ``"normal"`` or ``"permute"``, or where random answers came from.
        trace_id: What was explained.
        heatmap: The original one.
        heatmaps: Those of the steps, to be looked at; not part of ``to_dict``.
    """

    kind: Literal["cascading", "independent", "answer"]
    steps: tuple[SanityStep, ...]
    method: str
    params: Mapping[str, Any]
    seed: int
    how: str
    trace_id: str
    heatmap: Heatmap
    heatmaps: tuple[Heatmap, ...] = field(default=(), compare=False)

    def __repr__(self) -> str:
        return f"<SanityReport {self.method}, {self}>"

    def __str__(self) -> str:
        shown = "; ".join(f"{step.name}: {step.shown}" for step in self.steps)
        return f"{self.kind} randomisation, rank correlation with the original: {shown}"

    @property
    def rank_correlations(self) -> tuple[float, ...]:
        """Spearman's ρ with the original heatmap at each step, ``(step,)``; NaN where there was no heatmap."""
        return tuple(math.nan if step.similarity is None else step.similarity.rank_correlation for step in self.steps)

    @property
    def suspicious(self) -> bool | None:
        """Whether the heatmap hardly depends on what was randomised; ``None`` when there was nothing to compare.

        The last step of a cascade, or the mean over the steps of the others, has |ρ| above ``SIMILAR``. A constant
        heatmap, and none where there was one, is as different as can be.
        """
        if all(step.similarity is None for step in self.steps):
            return None
        values = [0.0 if math.isnan(rho) else abs(rho) for rho in self.rank_correlations]
        return (values[-1] if self.kind == "cascading" else sum(values) / len(values)) > SIMILAR

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: everything but the pictures."""
        return {
            "kind": self.kind,
            "steps": [step.to_dict() for step in self.steps],
            "method": self.method,
            "params": dict(self.params),
            "seed": self.seed,
            "how": self.how,
            "trace_id": self.trace_id,
            "tokens": list(self.heatmap.selection.indices),
            "text": self.heatmap.selection.text,
            "suspicious": self.suspicious,
        }

    def attached(self) -> Heatmap:
        """The original heatmap with this report in its provenance, ``["sanity"][kind]``, where ``write`` keeps it."""
        provenance = dict(self.heatmap.provenance)
        provenance["sanity"] = {**provenance.get("sanity", {}), self.kind: self.to_dict()}
        return dataclasses.replace(self.heatmap, provenance=provenance)


def weight_randomisation(
    trace: Trace,
    model: torch.nn.Module,
    processor: object | None = None,
    *,
    kind: Literal["cascading", "independent"] = "cascading",
    how: How = "normal",
    blocks: Sequence[str] | None = None,
    stages: int | None = None,
    method: str = "igos++",
    tokens: Any = None,
    image: int = 0,
    baseline: BaselineChoice | None = None,
    seed: int = 0,
    explain_seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **params: Any,
) -> SanityReport:
    """Explains an answer again on the model with randomised weights, and compares the heatmaps.

    Random are weights of a duplicate of the model's modules; the model's own are not touched, so that it may go on
    answering meanwhile. Costs one explanation per stage and one for the original;
    needs scipy, and memory for what is randomised: once more on its device, and once on the CPU.

    Args:
        trace, model, processor: As for ``lvlm_probe.replay``; the model is the recorded one.
        kind: ``"cascading"``, from the output down, or ``"independent"``, each block alone.
        how: ``"normal"`` or ``"permute"``, how weights are drawn: see ``randomisation``.
        blocks: Patterns of module paths (fnmatch), each one block, in the order to go through them; by default all of
            the model: output layer, decoder layers from the last to the first, token embeddings, mergers, encoders.
        stages: At most so many steps, by taking neighbouring blocks together; by default one per block.
        method, tokens, image, params: What ``explain`` is given. The tokens are chosen once, on the true model.
        baseline: As for ``evaluate``; by default the recorded one, a blur strengthened on the true model as ``explain``
            does.
        seed: Of the random weights: block and seed decide them, not the order.
        explain_seed: The explainer's.
        progress: Called with (done, total) explanations.

    Raises:
        ModelMismatch: It is another model to begin with.
        ExplainError: There is no heatmap to check, or weights that cannot be randomised (quantised, offloaded).
        PointNotFound: A pattern of ``blocks`` matches no module.
        ProbeError: scipy is missing.
    """
    if kind not in ("cascading", "independent"):
        raise ExplainError(f"kind is 'cascading' or 'independent'; got {kind!r}")
    if how not in ("normal", "permute"):
        raise ExplainError(f"how is 'normal' or 'permute'; got {how!r}")
    from lvlm_probe.replaying import replay as make_replay

    subject = make_replay(trace, model, processor)
    random_model = duplicated(model)
    groups = grouped(weight_blocks(random_model, blocks), stages)
    original = _original(subject, method, tokens, image, baseline, explain_seed, params)

    def explained() -> Heatmap:
        # A replay remembers log-probabilities, which are another model's now; and that one has another fingerprint.
        bare: Any = _Unrecorded(trace)
        fresh = make_replay(bare, random_model, processor, strict=False)
        return _again(fresh, original, original.selection, baseline, explain_seed, params)

    total = len(groups) + 1
    steps, heatmaps = [], []
    modules: tuple[str, ...] = ()
    numbers = 0
    if progress is not None:
        progress(1, total)
    with ExitStack() as random:
        for number, (name, weights) in enumerate(groups.items()):
            if kind == "independent":
                random.close()
                modules, numbers = (), 0
            own = _owned(random_model, weights)
            random.enter_context(randomised(own, how=how, seed=seed))
            modules = (*modules, *dict.fromkeys(path.rpartition(".")[0] for path in weights))
            numbers += sum(weight.numel() for weight in weights.values())
            heat = explained()
            heatmaps.append(heat)
            steps.append(_step(name, original, heat, modules=modules, weights=numbers))
            if progress is not None:
                progress(number + 2, total)
    return SanityReport(
        kind, tuple(steps), method, original.params, seed, how, subject.trace_id, original, tuple(heatmaps)
    )


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


def answer_randomisation(
    trace: Trace,
    model: torch.nn.Module,
    processor: object | None = None,
    *,
    draws: int = 3,
    pool: Sequence[int] | None = None,
    method: str = "igos++",
    tokens: Any = None,
    image: int = 0,
    baseline: BaselineChoice | None = None,
    seed: int = 0,
    explain_seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **params: Any,
) -> SanityReport:
    """Explains the same picture for other words in the place of the explained ones, and compares the heatmaps.

    Args:
        trace, model, processor: As for ``lvlm_probe.replay``.
        draws: How many times words are drawn.
        pool: Token ids to draw from; by default the vocabulary without special tokens. Ids of words that could stand
            there ("red", "blue", "left") make the harder and fairer test.
        method, tokens, image, baseline, explain_seed, params: As for ``weight_randomisation``.
        seed: Of the draws.
        progress: Called with (done, total) explanations.

    Raises:
        ModelMismatch: It is another model.
        ExplainError: There is no heatmap to check, or nothing to draw from.
        ProbeError: scipy is missing.
    """
    from lvlm_probe.replaying import replay as make_replay

    if draws < 1:
        raise ExplainError(f"draws is at least 1; got {draws}")
    subject = make_replay(trace, model, processor)
    original = _original(subject, method, tokens, image, baseline, explain_seed, params)
    ids = _vocabulary(model, processor) if pool is None else torch.as_tensor(list(pool), dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    steps, heatmaps = [], []
    if progress is not None:
        progress(1, draws + 1)
    for draw in range(draws):
        other: Any = _other_answer(trace, original.selection, ids, generator, processor)
        selection = dataclasses.replace(original.selection, tokens=tuple(other.tokens), llr=())
        fresh = make_replay(other, model, processor)
        heat = _again(fresh, original, selection, baseline, explain_seed, params)
        heatmaps.append(heat)
        steps.append(_step(selection.text, original, heat))
        if progress is not None:
            progress(draw + 2, draws + 1)
    source = "the vocabulary" if pool is None else f"{len(ids)} given tokens"
    return SanityReport(
        "answer", tuple(steps), method, original.params, seed, source, subject.trace_id, original, tuple(heatmaps)
    )


def _original(
    subject: Replay,
    method: str,
    tokens: Any,
    image: int,
    baseline: BaselineChoice | None,
    seed: int,
    params: Mapping[str, Any],
) -> Heatmap:
    from lvlm_probe.explainers import explain

    require("scipy.stats", extra="stats", purpose="a sanity check")  # now, not after the first explanation
    subject = subject if baseline is None else over_baseline(subject, baseline)
    heat = explain(subject, method=method, tokens=tokens, image=image, seed=seed, **params)
    if heat.values is None:
        raise ExplainError(f"there is no heatmap to check: {heat.reason}")
    return heat


def _again(
    fresh: Replay,
    original: Heatmap,
    selection: TokenSelection,
    baseline: BaselineChoice | None,
    seed: int,
    params: Mapping[str, Any],
) -> Heatmap:
    from lvlm_probe.explainers import explain

    # The very baseline of the original, a strengthened blur or the user's picture too; it does not hang on the weights.
    fresh = fresh if baseline is None else over_baseline(fresh, baseline)
    fresh = fresh.over(original.provenance["baseline"])
    try:
        heat = explain(
            fresh,
            method=original.method,
            tokens=selection,
            image=original.image_index,
            seed=seed,
            strengthen=False,
            **params,
        )
        return dataclasses.replace(heat, trace=original.trace)
    except ExplainError as error:  # a random model's scores need not be finite; that is a result here
        return Heatmap(
            None,
            original.image_size,
            image_index=original.image_index,
            selection=selection,
            method=original.method,
            reason=f"the method could not be run any more: {error}",
        )


def _step(name: str, original: Heatmap, heat: Heatmap, **details: Any) -> SanityStep:
    if heat.values is None:
        return SanityStep(name, reason=heat.reason, **details)
    return SanityStep(name, similarity=compare_maps(original, heat), **details)


def _vocabulary(model: torch.nn.Module, processor: object | None) -> torch.Tensor:
    hub: Any = model
    head = hub.get_output_embeddings()
    tokenizer: Any = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise ExplainError("without a tokenizer special tokens cannot be told from words: give the processor, or pool=")
    special = set(tokenizer.all_special_ids)
    special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    size = min(len(tokenizer), int(head.weight.shape[0]))
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
