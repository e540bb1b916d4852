"""What every family is held to: checks, each of which says a figure and whether it is good enough.

Each compares the product with something it did not compute itself: generation without a probe, the logits generate()
returned, finite differences, attention maps under eager, pictures that differ in one place.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from float64 import in_float64
from PIL import Image
from zoo import Built

import lvlm_probe as probe
from lvlm_probe.attention.dispatch import NAME
from lvlm_probe.models.anatomy import text_stack
from lvlm_probe.models.prompts import chat_inputs, placed, prompt_rule

__all__ = ["CHECKS", "Verdict", "run_checks"]

QUESTION = "What colour is the circle?"
EXACT = 1e-9
"""Nats by which two ways to one log-probability may differ in float64."""
ROUNDING = 16.0
"""How many times further than generate() itself a float32 log-probability may be from the float64 one."""
SLOPE = 1e-5
"""Of a typical slope: error of a central finite difference in float64."""
GRADIENT = 1e-2
"""Of its length: how far a float32 gradient may be from the float64 one."""
ROWS = 5e-5
"""What a float32 attention weight may be off by, beside the rounding of the float16 that it is kept in."""
RECOMPUTED = 1e-6
LEVELS = 2.0
_TOKENS = 4
_MASK = 6  # cells a side of the mask that is differentiated
_WAYS = 3  # directions of finite differences
_STEP = 3e-6  # in the mask: curvature times its square, and rounding over it, are both far below SLOPE
_EPSILON = torch.finfo(torch.float32).eps
_MOVED = 1e-3  # of the largest move, in features that should not move at all


@dataclass(frozen=True)
class Verdict:
    """One check of one family.

    Attributes:
        check: its name.
        passed: whether the figure is good enough; ``None`` where the check does not apply, and ``note`` says why.
        figure: what was measured.
        note: the reason, or the error.
    """

    check: str
    passed: bool | None
    figure: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Case:
    """One family, its answer without a probe, and the trace of the same answer with one."""

    def __init__(self, built: Built, directory: Path, *, larger: bool) -> None:
        self.built, self.model, self.processor = built, built.model, built.processor
        self.picture = built.picture(larger=larger)
        self.plain = built.generate(built.inputs([self.picture]))
        # After one call: transformers itself hangs hooks on a model whose hidden states are asked for, and leaves them.
        self.before = _hooks(self.model)
        self.probe = probe.attach(self.model, self.processor)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with self.probe.record(directory) as recording:
                self.seen = built.generate(built.inputs([self.picture]))
        self.faults = [*recording.faults, *(str(w.message) for w in caught if "lvlm" in str(w.category).lower())]
        self.traces = recording.traces
        self._replay: Any = None
        self._exact: _Exact | None = None

    @property
    def trace(self) -> Any:
        if not self.traces:
            raise AssertionError(f"nothing was recorded: {'; '.join(self.faults) or 'no reason given'}")
        return self.traces[0]

    @property
    def replay(self) -> Any:
        if self._replay is None:
            self._replay = probe.replay(self.trace, self.model, self.processor)
        return self._replay

    @property
    def exact(self) -> _Exact:
        """What generate() and a replay give where nothing is rounded to float32; computed once."""
        if self._exact is None:
            inputs = self.built.inputs([self.picture])
            wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
            mask = _mask().double()
            ways = torch.randn(_WAYS, _MASK, _MASK, generator=torch.Generator().manual_seed(2)).double()
            self.model.double()
            player = probe.replay(self.trace, self.model, self.processor)
            # The processor runs here, as it does for everybody.
            player.path.joined(player.path.apply(torch.cat([mask, mask])), 2)
            with in_float64(self.model):
                truth = _log_probs(self.built.generate(wide, use_cache=self.built.member.cached))
                again = player.original_log_probs
                grad = _gradient(player, mask) if not self.built.member.discrete else torch.full_like(mask, torch.nan)
                rows = player.log_probs(mask.expand(3, -1, -1)).sum(1)
                ends = torch.cat([mask + _STEP * ways, mask - _STEP * ways])
                high, low = player.log_probs(ends).sum(1).chunk(2)
                off = ((high - low) / (2 * _STEP) - (grad * ways).sum((1, 2))).abs().max() / grad.norm()
            self._exact = _Exact(
                log_probs=truth,
                replay=float((again - truth).abs().max()),
                rows=float(rows.max() - rows.min()),
                gradient=grad[0],
                slope=float(off),
            )
        return self._exact


@dataclass(frozen=True)
class _Exact:
    """Float64 truth of one case.

    Attributes:
        log_probs: of generate()'s own logits, ``(step,)``.
        replay: largest difference of replayed ones, nats.
        rows: largest difference between rows of one batch that hold the same mask, nats.
        gradient: of the answer's log-likelihood to the mask, ``(row, col)``.
        slope: largest error of a finite difference, as a share of the gradient's length.
    """

    log_probs: torch.Tensor
    replay: float
    rows: float
    gradient: torch.Tensor
    slope: float


def _mask() -> torch.Tensor:
    """The mask that is differentiated, ``(1, row, col)``."""
    return 0.3 + 0.5 * torch.rand(1, _MASK, _MASK, generator=torch.Generator().manual_seed(1))


def _gradient(player: Any, mask: torch.Tensor) -> torch.Tensor:
    leaf = mask.clone().requires_grad_(True)
    return torch.autograd.grad(player.log_probs(leaf).sum(), leaf)[0]


def _log_probs(output: Any) -> torch.Tensor:
    """Log-probabilities of the tokens that generate() said, by the logits that it returned, ``(step,)``."""
    scores = torch.cat(list(output.logits))
    scores = (scores if scores.dtype is torch.float64 else scores.float()).log_softmax(-1)
    return scores.gather(-1, output.sequences[0, -len(scores) :, None])[:, 0].cpu()


def _hooks(model: torch.nn.Module) -> dict[str, Any]:
    """Everything that a probe could leave on a model: hooks, instance attributes, configs, attention registry."""
    from transformers import AttentionInterface

    return {
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "attributes": {path: frozenset(vars(m)) for path, m in model.named_modules()},
        "configs": {path: type(vars(m).get("config")).__name__ for path, m in model.named_modules()},
        "flags": {path: (m.training,) for path, m in model.named_modules()},
        "requires": [p.requires_grad for p in model.parameters()],
        "registry": frozenset(AttentionInterface._global_mapping) - {NAME},
    }


def asked(case: _Case) -> Verdict:
    """The prompt of ``probe.ask`` and the command line, by the chat template or the family's rule, is taken by the
    processor as opened, shows the image as the family's own call does, and is answered."""
    scale = case.built.member.call
    rule = prompt_rule(case.processor, case.model)
    question = QUESTION if rule is None or rule.asks else ""
    with _called_with(case.processor, scale):
        made = placed(chat_inputs(case.processor, [case.picture], question, rule=rule), case.model, case.processor)
    own = case.built.inputs([case.picture])
    shown = {name: value for name, value in own.items() if torch.is_tensor(value) and value.is_floating_point()}
    same = all(torch.equal(made[name], value) for name, value in shown.items())
    answered = case.built.generate(made).sequences.shape[-1] > 0
    notes = [f"by the rule {rule}"] if rule is not None else []
    if scale:
        notes.append(f"the tiny model is made for other images than its family's by default: {scale}")
    return Verdict("asked", same and answered, None, "; ".join(notes))


@contextlib.contextmanager
def _called_with(processor: Any, scale: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block these are the defaults of the processor's call, as if its family's images were so small."""
    own = type(processor).__call__
    with mock.patch.object(type(processor), "__call__", lambda *args, **given: own(*args, **{**scale, **given})):
        yield


def generation(case: _Case) -> Verdict:
    """Tokens and logits of generate() are the same to the last bit with a probe that records everything."""
    same = torch.equal(case.plain.sequences, case.seen.sequences)
    logits = list(zip(case.plain.logits, case.seen.logits, strict=True))
    largest = max(float((a.float() - b.float()).abs().nan_to_num(0).max()) for a, b in logits)
    equal = same and all(torch.equal(a, b) for a, b in logits) and not case.faults
    return Verdict("generation", equal and bool(case.traces), largest, "; ".join(case.faults))


def replay(case: _Case) -> Verdict:
    """Replayed log-probabilities are those of the logits that the unprobed generate() returned: in float64 to the last
    digits, and in float32, as recorded ones, as closely as float32 holds them."""
    truth = _log_probs(case.plain)
    recorded = float((torch.tensor(case.trace.log_probs) - truth).abs().max())
    again = float((case.replay.original_log_probs - truth).abs().max())
    traced = float((case.replay.log_probs(torch.ones(1, _MASK, _MASK), mode="exact")[0].cpu() - truth).abs().max())
    figure, exact = max(recorded, again, traced), case.exact
    rounding = ROUNDING * max(float((truth - exact.log_probs).abs().max()), float(truth.abs().max()) * _EPSILON)
    passed = figure <= rounding and max(exact.replay, exact.rows) <= EXACT
    note = f"recorded {recorded:.1e}, float64 {exact.replay:.1e}, rows of a batch {exact.rows:.1e}"
    return Verdict("replay", passed, figure, note)


def pixels(case: _Case) -> Verdict:
    """A random mask through the traced geometry is what the real processor makes of the composite (grey levels)."""
    case.replay.log_probs(torch.full((1, _MASK, _MASK), 0.5))
    report = case.replay.path.report
    return Verdict("pixels", report.mean_error <= LEVELS, report.mean_error, f"seen {min(report.coverage):.0%}")


def gradient(case: _Case) -> Verdict:
    """The gradient to the mask is not zero, and in float64 it equals central finite differences in random directions;
    in float32 it is that gradient, rounded."""
    if case.built.member.discrete:
        return _without_gradient(case)
    grad = _gradient(case.replay, _mask())
    exact = case.exact
    error = float((grad[0] - exact.gradient).norm() / exact.gradient.norm())
    size = float(grad.abs().max())
    passed = size > 1e-6 and error <= GRADIENT and exact.slope <= SLOPE
    return Verdict("gradient", passed, error, f"largest {size:.1e}, finite differences in float64 {exact.slope:.1e}")


def _without_gradient(case: _Case) -> Verdict:
    """A model whose gradient does not reach the picture: methods that need one say so and name those that do not, and
    one of these makes a map."""
    try:
        probe.explain(case.replay, method="input_gradient", tokens=(0, _TOKENS))
    except probe.errors.ExplainError as refusal:
        sentence = str(refusal)
    else:
        return Verdict("gradient", False, None, "a gradient was taken where there is none")
    heat = probe.explain(case.replay, method="occlusion", tokens=(0, _TOKENS))
    told = all(name in sentence for name in ("occlusion", "rise", "greedy"))
    passed = told and heat.values is not None and float(np.ptp(heat.values)) > 0
    return Verdict("gradient", None if passed else False, None, f"{case.built.member.discrete}: {sentence}")


def attention(case: _Case) -> Verdict:
    """Recorded rows are those that the same model returns under eager attention."""
    if case.built.member.attention:
        rows = case.trace.attention
        if rows is not None:
            return Verdict("attention", False, None, "rows were recorded where none were expected")
        return Verdict("attention", None, None, case.built.member.attention)
    rows = case.trace.attention
    if rows is None:
        return Verdict("attention", False, None, "; ".join(case.trace.notes))
    twin = case.built.twin()
    twin.model.set_attn_implementation("eager")
    steps, columns = len(case.trace.tokens), torch.as_tensor(case.trace.layout.image_positions.copy())
    crossed: list[list[torch.Tensor]] = []
    handles = _cross_maps(twin.model, crossed) if len(columns) == 0 else []
    eager = twin.generate(twin.inputs([case.picture]), output_attentions=True)
    for handle in handles:
        handle.remove()
    if len(columns) == 0 and len(crossed) != len(rows.layers):
        return Verdict("attention", False, None, f"{len(rows.layers)} of {len(crossed)} cross-attention layers")
    maps = _attention_maps(eager, rows) if not crossed else lambda step, place, _: crossed[place][step]
    across = bool(crossed) or getattr(eager, "cross_attentions", None) is not None  # all keys are there from the start
    largest, beyond = 0.0, -ROWS
    for place, index in enumerate(rows.layers):
        for step in range(steps):
            weights = maps(step, place, index)  # (batch, head, query, key)
            truth = weights[0, :, -1].float().mean(0)
            # A cache that slides keeps the newest keys only; the first pass, a prompt long, still has them all.
            gone = maps(0, place, index).shape[-1] + step - truth.numel()
            if not across and truth.numel() < maps(0, place, index).shape[-1]:
                truth = torch.nn.functional.pad(truth, (gone, 0))
            truth = truth[columns] if len(columns) and truth.numel() > columns.max() else truth
            mine = torch.as_tensor(rows.values[step, place]).float().mean(0)
            if mine.shape != truth.shape:
                return Verdict("attention", False, None, f"{len(mine)} columns recorded, {len(truth)} under eager")
            off = (mine - truth).abs()
            largest = max(largest, float(off.max()))
            beyond = max(beyond, float((off - truth * torch.finfo(torch.float16).eps / 2).max()))
    return Verdict("attention", beyond <= ROWS, largest, f"{len(rows.layers)} layers")


def _attention_maps(eager: Any, rows: Any) -> Callable[[int, int, int], torch.Tensor]:
    """(step, place among the recorded layers, layer) → the map that generate() returned under eager attention."""
    kinds = ("cross_attentions", "attentions")  # of a decoder that reads its encoder, the keys that hold the picture
    per_step = next(found for kind in kinds if (found := getattr(eager, kind, None)) is not None)

    def find(step: int, place: int, index: int) -> torch.Tensor:
        layers = per_step[step]
        real = [layer for layer in layers if layer is not None]
        return real[place] if len(real) == len(rows.layers) else layers[index]

    return find


def _cross_maps(model: torch.nn.Module, kept: list[list[torch.Tensor]]) -> list[Any]:
    """Hooks that keep what every cross-attention module of a model under eager returns beside its output: its map."""
    handles = []
    for path, module in model.named_modules():
        if path.endswith(
            (".cross_attn", ".encoder_attn", ".encoder_decoder_attention.attention")
        ):  # no .act_cross_attn
            kept.append([])
            handles.append(module.register_forward_hook(lambda _m, _a, out, mine=kept[-1]: mine.append(_map_in(out))))
    return handles


def _map_in(output: Any) -> torch.Tensor:
    """The attention map ``(batch, head, query, key)`` in what a module returned; behind a position bias (T5)."""
    return next(v for v in reversed(output) if isinstance(v, torch.Tensor) and v.dim() == 4)


def geometry(case: _Case) -> Verdict:
    """Light one region: of all image tokens, exactly those whose box covers it move (attention across patches cut)."""
    layout = case.trace.layout
    found = layout.patch_box
    if found is None and len(layout.image_positions) == 0:  # cross-attention: the places of its keys
        name = "decoder.cross_attention_key_box"
        found = case.trace.point(name).values if name in case.trace.points else None
    if found is None:
        if case.built.member.attention and len(layout.image_positions) == 0:
            return Verdict(
                "geometry", None, None, f"boxes are those of attention's keys: {case.built.member.attention}"
            )
        reason = "; ".join(n for n in case.trace.notes if "box" in n) or "no boxes"
        if case.built.member.discrete and "no gradient reaches" in reason:
            return Verdict("geometry", None, None, reason)
        if "through attention alone" in reason or "receptive fields" in reason:
            return _resampled(case, reason, convolved="receptive fields" in reason)
        return Verdict("geometry", False, None, reason)
    boxes = np.asarray(found)
    live = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    if not live.any():
        return Verdict("geometry", False, None, "no image token has a box")
    grey = Image.new("RGB", case.picture.size, (128, 128, 128))
    chosen = np.flatnonzero(live)
    chosen = chosen[np.unique(np.linspace(0, len(chosen) - 1, 9).round().astype(int))]
    wrong, asked, telling = 0, 0, int(live.sum() == 1)
    with _features(case) as features:
        base = features(grey)
        for token in chosen:
            x0, y0, x1, y1 = boxes[token]
            inset = (x1 - x0) / 4, (y1 - y0) / 4
            spot = (round(x0 + inset[0]), round(y0 + inset[1]), round(x1 - inset[0]), round(y1 - inset[1]))
            if spot[2] <= spot[0] or spot[3] <= spot[1]:
                continue
            lit = grey.copy()
            lit.paste((250, 30, 60), spot)
            moved = np.asarray((features(lit) - base).norm(dim=-1))
            covers = _overlap(boxes, spot)
            # A resize kernel reaches a few pixels over the edge, so a box that only touches the surroundings may move.
            margin = max(x1 - x0, y1 - y0) * 0.75
            near = _overlap(boxes, (spot[0] - margin, spot[1] - margin, spot[2] + margin, spot[3] + margin))
            asked += 1
            telling += not covers[live].all()
            if case.built.member.local:
                inside, outside = moved[covers & live], moved[~near]
                still = outside.max(initial=0.0) <= _MOVED * moved.max()
                wrong += not (inside.min(initial=math.inf) > _MOVED * moved.max() > 0 and still)
            else:
                wrong += not near[int(moved.argmax())]
    passed = asked > 0 and wrong == 0 and telling > asked / 2  # boxes that all cover everything tell nothing
    return Verdict("geometry", passed, wrong / max(asked, 1), f"{asked} regions, {telling} of them not in every box")


def _resampled(case: _Case, reason: str, *, convolved: bool) -> Verdict:
    """Image tokens that are said to have no place: with all attention but the decoder's cut none of them depends on the
    picture (where convolutions are the reason all still do), and with all of it whole most of them look at both of two
    distant corners: of the picture or, where local crops are cut out of it, of one crop."""
    grey = Image.new("RGB", case.picture.size, (128, 128, 128))
    views = _views(case)
    corners = []
    for x0, y0, x1, y1 in views:
        width, height = (x1 - x0) // 3, (y1 - y0) // 3
        for at in ((x0, y0), (x1 - width, y1 - height)):
            lit = grey.copy()
            lit.paste((250, 30, 60), (*at, at[0] + width, at[1] + height))
            corners.append(lit)
    moved = []
    for cut in ("none", "everywhere"):
        with _features(case, cut=cut) as features:
            base = features(grey)
            moved.append(np.stack([(features(lit) - base).norm(dim=-1).numpy() for lit in corners]))
    whole, without = moved
    looks = (without if convolved else whole) > _MOVED * whole.max()
    both = looks.reshape(len(views), 2, -1).all(axis=1).any(axis=0).mean()
    passed = whole.max() > 0 and both > 0.5 and (convolved or without.max() <= 1e-6 * whole.max())
    return Verdict("geometry", None if passed else False, None, f"{reason} ({both:.0%} of them look at both corners)")


def _views(case: _Case) -> list[tuple[int, int, int, int]]:
    """The whole picture, and the part of it that every local crop shows (``pixel_values_local``)."""
    views = [(0, 0, *case.picture.size)]
    for key in case.replay.path.pixel_keys:
        if not key.endswith("_local"):
            continue
        x, y, _, live = case.replay.path.coordinates(key)
        for column, row, shown in zip(x, y, live, strict=True):
            ends = (float(t[shown].aminmax()[k]) for k in (0, 1) for t in (column, row))
            views.append(tuple(round(end) for end in ends))  # type: ignore[arg-type]
    return views


def _overlap(boxes: np.ndarray, spot: tuple[float, ...]) -> np.ndarray:
    wide = np.minimum(boxes[:, 2], spot[2]) - np.maximum(boxes[:, 0], spot[0])
    high = np.minimum(boxes[:, 3], spot[3]) - np.maximum(boxes[:, 1], spot[1])
    return (wide > 0) & (high > 0)


class _features:
    """Inside the block: picture → what the decoder reads at the image tokens, attention of the encoders silenced (or
    of nothing, or of everything that is not the decoder's).

    That is what enters the decoder or, in models that add the picture further on, the first of its layers at which two
    pictures differ.
    """

    def __init__(self, case: _Case, *, cut: Literal["encoders", "none", "everywhere"] = "encoders") -> None:
        self._case, self._cut = case, cut
        self._handles: list[Any] = []
        self._kept: list[torch.Tensor] = []

    def __enter__(self) -> Callable[[Image.Image], torch.Tensor]:
        case, anatomy = self._case, self._case.probe.anatomy
        modules = dict(case.model.named_modules())
        positions = torch.as_tensor(case.trace.layout.image_positions.copy())

        def keep(_module: Any, args: Any, kwargs: Any) -> None:
            if len(positions) == 0:
                states = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.dim() == 3]
                keys = [v for v in states if v.is_floating_point() and v.shape[1] != len(case.trace.input_ids)]
                self._kept.extend(v.detach().flatten(0, -2) for v in keys)
                return
            given = kwargs.get("inputs_embeds", kwargs.get("hidden_states", args[0] if args else None))
            if given is not None and given.dim() >= 3:
                axis = next((k for k in range(given.dim() - 2, 0, -1) if given.shape[k] > positions.max()), None)
                if axis is not None:
                    self._kept.append(given.detach().index_select(axis, positions).movedim(axis, 0).flatten(1))

        # An encoder-decoder model reads the picture where it reads the prompt.
        decoder = text_stack(case.model.get_encoder()) if anatomy.encodes_prompt else modules[anatomy.decoder]
        lists = [child for child in decoder.children() if isinstance(child, torch.nn.ModuleList)]
        if len(positions):
            lists = [max(lists, key=len, default=torch.nn.ModuleList())]
        for module in (decoder, *(layer for layers in lists for layer in layers)):
            self._handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
        roots = {"encoders": anatomy.encoders, "none": (), "everywhere": ("",)}[self._cut]
        for root in roots:
            for path, module in modules[root].named_modules(prefix=root):
                if not root and path.startswith(anatomy.decoder + "."):
                    continue
                last = path.rpartition(".")[2].lower()
                wide = not root and ("attn" in last or last.endswith("attention"))
                if wide or last in ("self_attn", "attn", "attention", "self_attention"):
                    self._handles.append(module.register_forward_hook(_silent))

        def all_levels(picture: Image.Image) -> list[torch.Tensor]:
            self._kept.clear()
            with torch.no_grad():
                start = {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)} if anatomy.encoder_decoder else {}
                case.model(**{**start, **case.built.inputs([picture])})
            return [level.float() for level in self._kept]

        plain, other = all_levels(Image.new("RGB", case.picture.size, (128, 128, 128))), all_levels(case.picture)
        level = next((k for k, (a, b) in enumerate(zip(plain, other, strict=True)) if not torch.equal(a, b)), 0)
        return lambda picture: all_levels(picture)[level]

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()


def _silent(_module: Any, _args: Any, output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


def checkpointing(case: _Case) -> Verdict:
    """The gradient with gradient checkpointing is the one without, and layers really are run twice for it."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if case.built.member.discrete:
        return Verdict("checkpointing", None, None, case.built.member.discrete)
    mask = 0.3 + 0.5 * torch.rand(1, _MASK, _MASK, generator=torch.Generator().manual_seed(2))
    layers = [module for module in case.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    leaves = {part for layer in layers for part in layer.modules() if not part._modules}
    gradients, runs, calls = [], [], []
    for saving in (False, True):
        player = probe.replay(case.trace, case.model, case.processor, gradient_checkpointing=saving)
        calls.clear()
        handles = [part.register_forward_pre_hook(lambda *_: calls.append(1)) for part in leaves]
        try:
            leaf = mask.clone().requires_grad_(True)
            gradients.append(torch.autograd.grad(player.log_probs(leaf).sum(), leaf)[0])
        except probe.errors.ReplayError as refusal:
            return Verdict("checkpointing", None, None, str(refusal))
        finally:
            for handle in handles:
                handle.remove()
        runs.append(len(calls))
    error = float((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max().clamp_min(1e-12))
    twice = runs[1] >= 1.5 * runs[0] > 0
    return Verdict("checkpointing", error <= RECOMPUTED and twice, error, f"{len(layers)} layers, calls {runs}")


def detach(case: _Case) -> Verdict:
    """After detach() nothing of the probe is left on model and processor, and another probe can be attached."""
    case.probe.detach()
    after = _hooks(case.model)
    left = [name for name, value in case.before.items() if after[name] != value]
    inner = getattr(case.processor, "image_processor", case.processor)
    if "preprocess" in vars(inner):
        left.append("preprocess")
    if "_process_images" in vars(case.processor):
        left.append("_process_images")
    probe.attach(case.model, case.processor).detach()
    return Verdict("detach", not left, None, ", ".join(left))


CHECKS: tuple[Callable[[_Case], Verdict], ...] = (
    asked,
    generation,
    replay,
    pixels,
    gradient,
    attention,
    geometry,
    checkpointing,
    detach,
)


def run_checks(built: Built, *, larger: bool = False, only: tuple[str, ...] = ()) -> list[Verdict]:
    """All checks of one family as it was opened; an exception is a failure with its message."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            case = _Case(built, Path(directory), larger=larger)
        except Exception as error:
            note = f"{type(error).__name__}: {error} [{_where(error)}]"
            return [Verdict(check.__name__, False, None, note) for check in CHECKS]
        verdicts = []
        for check in CHECKS:
            if only and check.__name__ not in only:
                continue
            try:
                verdicts.append(check(case))
            except Exception as error:
                note = f"{type(error).__name__}: {error} [{_where(error)}]"
                verdicts.append(Verdict(check.__name__, False, None, note))
        return verdicts


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
