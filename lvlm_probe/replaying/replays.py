"""A recorded answer on a live model, as a function of a mask."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np
import torch

from lvlm_probe.attention.cutting import Layers, attention_layers, cut_attention
from lvlm_probe.cards import answer_html, card, text_html
from lvlm_probe.errors import ExplainError, ReplayError
from lvlm_probe.images import PixelPath
from lvlm_probe.images.masks import expand_masks
from lvlm_probe.models.anatomy import examine
from lvlm_probe.models.drivers import Driver, probed_model
from lvlm_probe.models.exhaustion import does_not_fit, ran_out
from lvlm_probe.models.inputs import index_on, is_separate
from lvlm_probe.models.precision import differentiate_scaled, epsilon_of
from lvlm_probe.models.replica import Replica
from lvlm_probe.models.tokenizers import tokenizer_of
from lvlm_probe.process import of_the_last
from lvlm_probe.replaying.answer_source import LiveTrace, recorded_path
from lvlm_probe.replaying.capture import Captured, capture
from lvlm_probe.replaying.gradient_flow import gradient_check
from lvlm_probe.replaying.isolation import autocast_dtype, outside_modes, taking_turns
from lvlm_probe.replaying.micro_batches import (
    Limits,
    Recomputed,
    Run,
    in_micro_batches,
    masks_at_once,
    noise_like,
    noise_seeds,
)
from lvlm_probe.replaying.own_scores import OwnScore
from lvlm_probe.replaying.protocol import MaskJournal, Mode, Need, ScoreFunction, Stand
from lvlm_probe.replaying.reduced_precision import ReducedPrecision, check_reducible
from lvlm_probe.replaying.rewording import positions_of, reword
from lvlm_probe.replaying.shortcuts import Shortcuts
from lvlm_probe.replaying.teacher_forcing import Shortcut, TeacherForcing, rounding_of
from lvlm_probe.replaying.views import Kept, Views

if TYPE_CHECKING:
    from lvlm_probe.attention import TapLayer
    from lvlm_probe.replaying.capture import AttentionLayer
    from lvlm_probe.trace import Trace
    from lvlm_probe.trace.clips import Clip

_ANSWER_SHOWN = 60
"""Characters of an answer that one line shows."""
_SCORES = 32
"""Scores of the user's own of which results are kept: a loop over thousands of them ends with no more."""


class Replay(Views):
    """One recorded answer on one live model. Made by ``lvlm_probe.replay``.

    No call changes it, and none mixes two models: where the model has changed since the last call, nothing that
    was found before counts, and of weights that are no longer the recorded ones a warning tells. ``over``,
    ``strengthened``, ``with_settings``, ``counted``, ``reworded``, ``scored``, ``without`` and ``computed_in`` give
    views: other objects on the same model that share what has been computed.

    Attributes:
        trace, trace_id: what is replayed.
        model, processor, anatomy: what it is replayed on, and where the model's parts are.
        replica: the model as passes run it, in ``replica.use()``; the user's own is never touched.
        tokens, token_ids, special, words: the recorded answer, ``(T,)`` each but ``words``.
        device: where pixel inputs go.
        path: how a mask reaches the model's pixel inputs, over this view's baseline.
        passes: images sent through the model so far.
        limits: how passes are run, and what was changed when memory ran out.
        journal: keeps what masks give (``journalled``); by default nothing does.
        inside: whether somebody looks inside the passes (``capture``).
        own: the score of the user's own that is one more column of log-probabilities (``scored``); by default none.
        unread: positions that no other one reads (``without``), ascending; by default none.
        reduced: the number format that passes compute in (``computed_in``); by default the model's own.
        kept: what all views share.
        shortcuts: what passes leave out when only some ``steps`` are asked for; ``str()`` of it says so.
    """

    _plain: Replay | None = None
    offers: frozenset[Need | Stand] = frozenset(get_args(Need))
    """What methods may ask of it: all that there is."""

    @outside_modes
    def __init__(
        self,
        trace: Trace | LiveTrace,
        model: torch.nn.Module,
        processor: object | None,
        *,
        gradient_checkpointing: bool = False,
        micro_batch: int | None = None,
        check_pixels: bool = True,
    ) -> None:
        self.model = model = probed_model(model, processor)
        self.replica = Replica(model, own_configs=isinstance(model, Driver))
        super().__init__(trace)
        self.processor = processor
        self.limits = Limits(micro_batch, gradient_checkpointing)
        self.inside: tuple[Captured, ...] = ()
        self.journal: MaskJournal | None = None
        self.unread: tuple[int, ...] = ()
        self.reduced: ReducedPrecision | None = None
        self._cut: Layers = []

        self.anatomy = examine(model, processor)
        self._read_inputs(check_pixels)
        self.device = self._forcing.device

    @property
    def _changes(self) -> tuple[int, torch.dtype | None]:
        return self.replica.changes, autocast_dtype(self.device)

    def _read_inputs(self, check_pixels: bool) -> None:
        """Sort the inputs of the recording by what becomes of them in a pass."""
        trace, anatomy = self.trace, self.anatomy
        prompt = torch.tensor(trace.input_ids).long()
        recorded = {
            name: value.clone() if value.is_inference() else value  # a trace read in inference mode
            for name, value in trace.model_kwargs.items()
            if isinstance(value, torch.Tensor)
        }
        beginning = recorded.pop("decoder_input_ids", None) if anatomy.encoder_decoder else None
        self._shapes = {name: value.shape[1:] for name, value in recorded.items() if value.ndim and len(value) == 1}
        self.path, self._baseline = recorded_path(trace, recorded, self.processor, self.model, check=check_pixels)
        # Texts that another part of the model reads beside the prompt (InstructBLIP's Q-Former) stay as they are.
        separate = {name: value for name, value in recorded.items() if is_separate(name, recorded)}
        # One entry per prompt position, and not the image's: such inputs are extended over the answer.
        sequence = {
            name: value
            for name, value in recorded.items()
            if value.ndim >= 2
            and value.shape[1] == prompt.numel()
            and (name not in self.path.inputs or isinstance(self.path, PixelPath))
            and not anatomy.is_pixel_name(name)
            and name not in separate
        }
        self._fed = frozenset(recorded) - frozenset(sequence) - frozenset(separate)
        self._settings: dict[str, Any] = {
            "other_inputs": {name: recorded[name] for name in self._fed if name not in self.path.inputs},
            "answer_token_type": anatomy.answer_token_type,
            "separate_inputs": separate,
            "decoder_input_ids": beginning,
            "reads_prompt": anatomy.reads_prompt,
            "image_token_id": anatomy.image_token_id,
        }
        self._ask(prompt, sequence)

    def _ask(self, prompt: torch.Tensor, sequence: dict[str, torch.Tensor]) -> None:
        """Set what the answer is an answer to: the prompt's token ids, and inputs with one entry for each of them."""
        self._prompt, self._sequence = prompt, sequence
        self._forcing = TeacherForcing(
            self.replica,
            input_ids=prompt,
            token_ids=self.token_ids,
            sequence_inputs=sequence,
            score=self.own,
            image_positions=torch.isin(prompt, torch.tensor(self.anatomy.placeholders)).nonzero()[:, 0],
            **self._settings,
        )
        self.shortcuts = self._own_shortcuts()

    def _own_shortcuts(self) -> Shortcuts:
        return Shortcuts(
            self._forcing, model=self.model, anatomy=self.anatomy, prompt=self._prompt, trace_id=self.trace_id
        )

    # ------------------------------------------------------------------ what is replayed

    @property
    def origin(self) -> dict[str, Any]:
        """Where its passes are run, for the provenance of what is made of them."""
        made: dict[str, Any] = {"device": str(self.device)}
        made |= {"unread": list(self.unread)} if self.unread else {}
        return made | ({"computed_in": self.reduced.dtype} if self.reduced is not None else {})

    def announce(self, what: str, images: Callable[[], int | None], steps: Sequence[int] | None) -> None:
        """Be told, before ``what`` runs, how many images it will send through the model: here they cost nothing."""

    @property
    def prompt_length(self) -> int:
        """P, prompt tokens: answer token t is predicted at position P + t − 1 of the teacher-forced sequence."""
        return self._forcing.prompt_length

    @property
    def input_ids(self) -> torch.Tensor:
        """Token ids of the prompt, ``(P,)`` int64."""
        return self._prompt.clone()

    @property
    def length(self) -> int:
        """Positions of the teacher-forced sequence: prompt and all answer tokens but the last."""
        return self._forcing.length

    # ------------------------------------------------------------------ views

    def with_settings(self, *, micro_batch: int | None = None, gradient_checkpointing: bool = False) -> Self:
        """A view whose passes are run in another way, as a plan says."""
        other = self.viewed()
        other.limits = Limits(micro_batch, gradient_checkpointing)
        return other

    def __repr__(self) -> str:
        answer = "".join(piece for piece, flag in zip(self.tokens, self.special.tolist(), strict=True) if not flag)
        shown = answer.strip() if len(answer) <= _ANSWER_SHOWN else f"{answer.strip()[:_ANSWER_SHOWN]}…"
        return f"<Replay of {shown!r} ({self.trace_id}) on {type(self.model).__name__}, baseline {self._kind()}>"

    def _kind(self) -> str:
        return str(dict(self.baseline).get("kind", "unknown"))

    def _repr_html_(self) -> str:
        words = answer_html(self.tokens, self.special.tolist())
        question = getattr(self.trace, "question", None)
        facts = [
            f"trace {self.trace_id} on {type(self.model).__name__}, baseline {self._kind()}",
            f"{self.n_images} image{'s' * (self.n_images != 1)}, {len(self.tokens)} tokens, "
            f"{self.passes.forward} forward and {self.passes.backward} backward passes so far",
        ]
        return card(
            "Replay", f'<br><span dir="auto">{text_html(question)}</span>' if question else "", words, facts=facts
        )

    def reworded(self, text: str, *, question: str | None = None) -> Self:
        """The same answer after another question on the same images, e.g. a general one to compare with.

        Args:
            text: what is asked instead.
            question: the question as it stands in the prompt; by default what was recorded as such, or all of the
                prompt where no question was.

        Returns:
            a replay that shares model, images, baseline and pass counter with this one.

        Raises:
            ReplayError: there is no tokenizer, or the prompt does not hold the question.
        """
        if separate := self._settings["separate_inputs"]:
            raise ReplayError(
                f"{type(self.model).__name__} reads the question twice: {', '.join(separate)} "
                "would stay the old one; record another generate() call with the other question instead"
            )
        if self.unread:
            raise ReplayError("a view without some of its text asks no other question: reworded() first")
        wanted = question or getattr(self.trace, "question", None) or ""
        if not wanted and (tokenizer := tokenizer_of(self.processor)) is not None:
            wanted = tokenizer.decode(self._prompt.tolist(), skip_special_tokens=True)
        start, stop, ids = reword(self._prompt, self.processor, wanted, text)
        other: Self = copy.copy(self)
        sequence = {
            name: torch.cat(
                [value[:, :start], value[:, start : start + 1].expand(-1, len(ids), *value.shape[2:]), value[:, stop:]],
                dim=1,
            )
            for name, value in self._sequence.items()
        }
        other._ask(torch.cat([self._prompt[:start], ids, self._prompt[stop:]]), sequence)
        other.kept = self.kept.anew()
        other._plain = None if self._plain is None else self._plain.reworded(text, question=question)
        return other

    @taking_turns
    def scored(self, score: OwnScore) -> Self:
        """A view whose log-probabilities have one column more, behind the answer's tokens: a score of the user's own.

        ``explain`` and ``evaluate`` make it by themselves where the selected tokens come with a score.

        Args:
            score: from ``probe.score``, or a ``Contrast``.

        Raises:
            ReplayError: the answer has not as many tokens as the score reads.
        """
        if score == self.own:
            return self
        other: Self = copy.copy(self)
        other.own, other._plain = score, self.plain

        def asked() -> tuple[Kept, TeacherForcing, Shortcuts]:
            other._ask(self._prompt, self._sequence)
            return self.kept.anew(), other._forcing, other.shortcuts

        found = of_the_last(self.kept.scored, score, asked, most=_SCORES)
        other.kept, other._forcing, other.shortcuts = found
        return other

    @taking_turns
    def computed_in(self, dtype: str = "bfloat16") -> Self:
        """A view whose passes compute in a smaller number format, with a counter of its own: to search by, where
        ``explain(search_dtype=…)`` makes it by itself. log P on the whole image and on the baseline stay the model's.

        Args:
            dtype: ``"bfloat16"``. Processors without instructions for it may take longer than in float32.

        Raises:
            ExplainError: another format, or the model is not in float32.
        """
        check_reducible(self.model, dtype)
        _ = self.original_log_probs, self.baseline_log_probs
        other: Self = self.counted()
        other._plain = self.plain
        other.shortcuts = shortcuts = self._own_shortcuts()
        other.reduced = ReducedPrecision(dtype, self.device, lambda: shortcuts.held)
        known = dict(self.kept.baseline_log_probs)
        other.kept = dataclasses.replace(self.kept, baseline_log_probs=known, scored=OrderedDict(), facts={})
        return other

    @property
    def plain(self) -> Replay:
        """This replay without a score of the user's own, computed as the model does."""
        return self if self._plain is None else self._plain

    @property
    def rows(self) -> int:
        """Sequences that go through the model for one mask: more than one where a score asks for other courses of the
        answer that are longer than a token. ``capture`` sees them one after the other, the answer's own first."""
        return self._forcing.rows

    @outside_modes
    def without(self, text: str | Sequence[int] | None = None) -> Self:
        """The same answer where some of the text is not read, as a view: its tokens stay, but in no layer of the
        decoder does any other position attend to them.

        Args:
            text: a text of the prompt as it stands there (its last place); by default the recorded question. Or
                positions of text in the teacher-forced sequence: answer token t is at ``prompt_length + t``.

        Raises:
            ReplayError: the prompt does not hold the text, a position is none of a text, the model reads its prompt in
                another place too, or its attention cannot be cut.
        """
        name = type(self.model).__name__
        if self.anatomy.encodes_prompt or self._settings["separate_inputs"]:
            raise ReplayError(f"{name} reads its prompt outside its decoder too, where no attention is cut")
        images = np.asarray(self.trace.layout.image_positions)
        if len(self._prompt) != len(self.trace.input_ids):
            raise ReplayError("this view asks another question than was recorded: without() is of the recorded prompt")
        if text is None or isinstance(text, str):
            wanted = text if text is not None else getattr(self.trace, "question", None) or ""
            found = positions_of(self._prompt, images, self.processor, wanted)
        else:
            found = np.unique(np.asarray(list(text), dtype=np.int64))
        unread = np.union1d(found, np.asarray(self.unread, dtype=np.int64))
        if not len(found) or unread[0] < 0 or unread[-1] >= self.length or np.isin(unread, images).any():
            raise ReplayError(f"positions of text are 0 to {self.length - 1} but for image tokens; got {found[:8]}")
        try:
            with self.replica.use() as model:
                layers = attention_layers(model, None, of_text=True)
        except ExplainError as error:
            raise ReplayError(f"{name} cannot be asked without some of its text: {error}") from error
        other: Self = self.viewed()
        other.unread, other._cut = tuple(unread.tolist()), layers
        other._plain = None if self._plain is None else self._plain.without(found.tolist())
        other.kept = self.kept.anew(gradients=self.kept.gradients, masks_at_once=self.kept.masks_at_once)
        return other

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """In the block passes compute in the number format of this view."""
        if self.reduced is None:
            yield
            return
        with self.replica.use() as model, self.reduced.passes(model):
            yield

    def _reading(self) -> AbstractContextManager[None]:
        """In the block passes do not read what is ``unread``.

        What a run of unread tokens hands on to what follows it, by the prediction at its last position, is cut too, but
        for what that position is: its own token.
        """
        if not self.unread:
            return nullcontext()
        unread = np.asarray(self.unread)
        ends = unread[~np.isin(unread + 1, unread)]
        seen = np.setdiff1d(np.arange(self.length), unread)
        return cut_attention(self, self._cut, np.union1d(seen, ends[ends > seen[0]]), unread)

    # ------------------------------------------------------------------ the function

    @property
    @taking_turns
    def original_log_probs(self) -> torch.Tensor:
        """Replayed log P(a_t) on the whole image, ``(step,)`` float32 on the CPU. Paper, Eq. 1."""
        if self.kept.original is None:
            original = self.log_probs(None)[0].cpu()
            seen = self._forcing.seen
            if (largest := seen.largest_logit) is not None:
                rounder = max(seen.epsilon, epsilon_of(self.trace.model.get("torch_dtype")))
                self.kept.rounding = rounding_of(original, float(largest), rounder)
                if self.own is not None:
                    token = float(rounding_of(torch.tensor([-math.inf]), float(largest), rounder))
                    self.kept.rounding[-1] = self.own.rounding(float(original[-1]), token, rounder)
            self.kept.likeliest, self.kept.runners_up = seen.likeliest, seen.runners_up
            self.kept.original = original
        return self.kept.original.clone()

    @torch.no_grad()
    def _on_baseline(self) -> torch.Tensor:
        return self._whole_pass(self.path.baseline_inputs)[0].cpu()

    @property
    def rounding(self) -> torch.Tensor:
        """Most that ``original_log_probs`` may differ by rounding, ``(step,)`` nats; see ``rounding_of``."""
        original = self.original_log_probs
        return torch.zeros_like(original) if self.kept.rounding is None else self.kept.rounding.clone()

    @property
    def likeliest(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model would rather have said in the place of each token, the answer before it given, on the whole
        image: token ids ``(step,)`` int64 and their log P ``(step,)`` float32, on the CPU."""
        _ = self.original_log_probs
        assert self.kept.likeliest is not None
        ids, log_probs = (part.cpu() for part in self.kept.likeliest)
        return ids.clone(), log_probs.clone()

    @property
    def runners_up(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of the likeliest token besides the one that was said, ``(step,)`` int64 and ``(step,)`` float32."""
        _ = self.original_log_probs
        assert self.kept.runners_up is not None
        ids, log_probs = (part.cpu() for part in self.kept.runners_up)
        return ids.clone(), log_probs.clone()

    @taking_turns
    def log_probs(
        self,
        mask: torch.Tensor | None = None,
        *,
        image: int | Clip | None = None,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
        mode: Mode = "fast",
        micro_batch: int | None = None,
        steps: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """log P(a_t) under masked images.

        Args:
            mask: ``(batch, row, col)`` or ``(row, col)`` in [0, 1], 1 = keep; several images: ``(batch, image, row,
                col)``; with a clip ``(batch, t, row, col)``. ``None`` is the whole image.
            image: mask this image only, or this one of ``clips``, and leave the others whole.
            noise: standard deviation of Gaussian noise added to the normalised pixel inputs, fresh for every mask.
            generator: source of the noise; the global random state is never touched.
            mode: ``"exact"`` runs the real processor on the real composite (gradient from the traced geometry).
            micro_batch: masks per forward pass, by default the replay's.
            steps: the tokens that are wanted, by default all. Passes for some leave out what these do not depend on
                (``shortcuts``); the columns of all others are NaN.

        Returns:
            ``(batch, step)`` float32, natural log, with gradient to ``mask`` when it is enabled. Paper, Eq. 1 and 3. Of
            a view that is ``scored`` the last column, one more than the answer has tokens, is the score.

        Raises:
            MaskError: wrong shape, type or range.
            ReplayError: there is no such step.
            OutOfMemory: not even one mask fits, or the whole image without one.
        """
        if mask is None:
            with torch.no_grad():
                return self._whole_pass(self.path.inputs)
        masks = self._batch_of(mask, image)
        seeds = noise_seeds(len(masks), noise, generator)
        shortcut = self._shortcut(steps)
        size = Limits(micro_batch).micro_batch or self.masks_at_once

        def run(some: torch.Tensor, part: slice) -> torch.Tensor:
            return self._forward(some, image, noise, seeds[part], mode, shortcut)

        def each(masks: torch.Tensor, run: Run) -> list[Any]:
            return self._in_micro_batches(masks, size, run)

        differentiable = torch.is_grad_enabled() and masks.requires_grad
        if differentiable and len(masks) > size:
            return Recomputed.apply(masks, self.replica, self.passes, each, run)
        keys = None if differentiable or noise or self.inside else self._keys(masks, image, mode, steps)
        if keys is not None and (known := self._recalled(keys)) is not None:
            return known
        with torch.set_grad_enabled(differentiable):
            found = torch.cat(each(masks, run))
        if keys is not None:
            self._keep(keys, found)
        return found

    def journalled(self, journal: MaskJournal) -> Self:
        """A view that keeps what masks give, and does not ask the model again for what the journal holds.

        For work that may be stopped: what was finished of it is found when the same calls are made again, to the last
        bit. Passes with noise or a gradient are run as ever; found ones are counted as passes.
        """
        other = self.viewed()
        other.journal = journal
        return other

    def _keys(
        self, masks: torch.Tensor, image: int | Clip | None, mode: Mode, steps: Sequence[int] | None
    ) -> list[str] | None:
        """What a journal knows masks by: everything that decides their numbers."""
        if self.journal is None:
            return None
        place = image if image is None or isinstance(image, int) else image.to_dict()
        decisive = [self.trace_id, sorted(map(str, self.baseline.items())), place, mode, steps and list(steps)]
        decisive += [list(self.unread)] if self.unread else []
        decisive += [self.reduced.dtype] if self.reduced is not None else []
        decisive += [str(self.model.dtype), self.device.type, list(masks.shape[1:]), self.input_ids.tolist()]
        decisive += [] if self.own is None else [self.own.to_dict()]
        start = hashlib.sha256(json.dumps(decisive).encode())
        keys = []
        for mask in masks.detach().float().cpu():
            found = start.copy()
            found.update(mask.contiguous().numpy().tobytes())
            keys.append(found.hexdigest())
        return keys

    def _recalled(self, keys: Sequence[str]) -> torch.Tensor | None:
        """The log-probabilities of a call, ``(batch, step)``, where the journal holds it whole."""
        assert self.journal is not None
        rows = [self.journal.get(key) for key in keys]
        if not rows or any(row is None or any(isinstance(one, tuple) for one in row.values()) for row in rows):
            return None
        found = torch.full((len(rows), self.columns), torch.nan, dtype=torch.float32)
        for place, row in enumerate(rows):
            for step, value in (row or {}).items():
                found[place, step] = torch.tensor(value)
        self.passes.add(forward=len(rows) * self.rows)
        return found.to(self.device)

    def _keep(self, keys: Sequence[str], found: torch.Tensor) -> None:
        assert self.journal is not None
        for key, row in zip(keys, found.detach().cpu().tolist(), strict=True):
            if all(value <= 0 or math.isnan(value) for value in row[: len(self.token_ids)]):
                self.journal.put(key, {step: value for step, value in enumerate(row) if not math.isnan(value)})

    @taking_turns
    def score_and_grad(
        self,
        mask: torch.Tensor,
        score: ScoreFunction,
        *,
        image: int | Clip | None = None,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
        micro_batch: int | None = None,
        steps: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score every mask and differentiate, one micro-batch at a time: memory of one, no recomputation.

        Args:
            mask: as for ``log_probs``; need not require a gradient.
            score: log-probabilities ``(batch, step)`` to scores ``(batch,)``; row i may depend on row i only.
            image, noise, generator, micro_batch, steps: as for ``log_probs``; ``score`` may read the columns ``steps``
                of what it is given, and no others.

        Returns:
            scores ``(batch,)``, float32 whatever type masks are of, and the gradient of each mask's own score to that
            mask, shaped like ``mask``.
        """
        masks = self._batch_of(mask, image).detach()
        if not self.inside:  # hooks that stand would take the passes of a check for the caller's
            self.require_gradients()
        seeds = noise_seeds(len(masks), noise, generator)
        shortcut = self._shortcut(steps)
        size = Limits(micro_batch).micro_batch or self.masks_at_once

        def one(some: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
            leaf = some.detach().requires_grad_(True)
            with torch.enable_grad():
                scores = score(self._forward(leaf, image, noise, seeds[part], "fast", shortcut))
                if scores.shape != (len(some),):
                    raise ReplayError(
                        f"score() must return one number per mask, ({len(some)},), not {tuple(scores.shape)}"
                    )
                if self.own is not None and self._forcing.seen.cut_off:
                    raise ExplainError(
                        f"the score {self.own.name!r} hands on no gradient (an argmax, a rounding, a detach): write it "
                        "without, or use a method that needs no gradients: occlusion, rise, greedy"
                    )
                gradient = self._differentiated(scores, leaf)
            return scores.detach().to(torch.promote_types(scores.dtype, torch.float32)), gradient

        found = self._in_micro_batches(masks, size, one)
        scores, gradients = (torch.cat(parts) for parts in zip(*found, strict=True))
        return scores, gradients.reshape(mask.shape if mask.ndim > 2 else masks.shape).to(mask.dtype)

    @taking_turns
    def require_gradients(self) -> None:
        """Check, once for all views, that the score's gradient arrives at the image whole.

        Raises:
            ExplainError: it does not; the message says why, or names the layer where it stops, and the methods that
                need none.
        """
        if self.plain is not self:
            self.plain.require_gradients()
            return
        if reason := self.anatomy.no_gradient:
            raise ExplainError(
                f"{type(self.model).__name__} cannot be explained by gradients: {reason}; use a method that needs "
                "none: occlusion, rise, greedy"
            )
        if self.kept.gradients is None:
            self.kept.gradients = ""  # while it is being looked for, and where there is nothing to say
            try:
                self.kept.gradients = gradient_check(self, self.replica, self.anatomy.decoder).fault
            except BaseException:
                self.kept.gradients = None
                raise
        if self.kept.gradients:
            raise ExplainError(self.kept.gradients)

    def _differentiated(self, scores: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
        """Gradient of each score, ``(batch,)``, to its row of ``leaf``.

        In half precision scores are scaled on their way. Who reads the gradients inside sees those of the scale that is
        kept, one for all rows.
        """

        def backward(scales: torch.Tensor | float, *, seen: float | None = None, again: bool = True) -> torch.Tensor:
            for inside in self.inside:
                inside.scale = seen
            total = (scores * (scales.to(scores) if isinstance(scales, torch.Tensor) else scales)).sum()
            (gradient,) = torch.autograd.grad(total, leaf, retain_graph=again)
            self.passes.add(backward=len(leaf) * self.rows)
            return gradient

        if not self._half:
            return backward(1.0, seen=1.0, again=False)
        gradient, scales = differentiate_scaled(backward, len(leaf), together=bool(self.inside))
        if self.inside:
            scale = float(scales[0])
            gradient = backward(scale, seen=scale, again=False) / scale
        return gradient

    # ------------------------------------------------------------------ inside the model

    @outside_modes
    def run_inputs(self, pixel_inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """log P(a_t) for one image given as the model's own pixel inputs (``replay.path.inputs``, or tensors of their
        shapes), ``(1, step)``; differentiable in them when gradients are enabled. Raises ``OutOfMemory``."""
        return self._whole_pass(dict(pixel_inputs))

    def asked(
        self, mask: torch.Tensor | None = None, *, image: int | Clip | None = None, mode: Mode = "fast"
    ) -> dict[str, Any]:
        """The arguments by which ``generate()`` is asked again, with a masked image.

        Args:
            mask: one mask, as for ``log_probs``; ``None`` is the whole image.
            image, mode: as for ``log_probs``.

        Raises:
            MaskError: wrong shape, type or range.
            ReplayError: the model is another package's, whose own call alone is known to it.
        """
        if isinstance(self.model, Driver):
            raise ReplayError(
                f"{type(self.model.original).__name__} generates in a way of its own: ask it again yourself, with "
                "attach(model, processor).masked(mask) around your call of generate()"
            )
        if mask is None:
            pixels = self.path.inputs
        else:
            pixels = self.path.apply(self._batch_of(mask, image), image=image, mode=mode)
        fed = {name: self._placed(name, value, 1) for name, value in pixels.items() if name in self._fed}
        fed = {name: value.to(self.device) if isinstance(value, torch.Tensor) else value for name, value in fed.items()}
        return {**self._forcing.asked(), **fed}

    def masked_pass(self, mask: torch.Tensor, shortcut: Shortcut | None = None) -> torch.Tensor:
        """log P(a_t) under masks ``(batch, image, row, col)``, ``(batch, step)``, in one pass as it comes: nothing is
        done about memory. What ``shortcut`` leaves out is NaN."""
        return self._run(self.path.apply(mask), len(mask), shortcut)

    def capture(
        self,
        *,
        modules: Sequence[str] = (),
        attention: Sequence[Literal["decoder", "cross", "encoder"]] = (),
        visit: Callable[[AttentionLayer], None] | None = None,
        edit: Callable[[TapLayer, torch.Tensor], torch.Tensor] | None = None,
    ) -> AbstractContextManager[Captured]:
        """Look inside the passes that run in the block: outputs of modules, attention, and the score's gradients.

        ::

            with replay.capture(modules=["model.multi_modal_projector"], attention=["decoder"], visit=see) as seen:
                scores, _ = replay.score_and_grad(mask, score)

        Args:
            modules: paths or fnmatch patterns of modules whose outputs are kept, in ``seen.outputs``, and their
                gradients in ``seen.gradients``.
            attention: whose attention layers to read: the decoder's on its own sequence, the decoder's on states from
                elsewhere, the encoders'.
            visit: called during each backward pass, once per layer, last layer first, with the layer's weights and the
                score's gradient to them at hand. Without it the layers of the last pass are kept in ``seen.layers``;
                their weights can be asked for, one block of rows at a time.
            edit: may replace each layer's output ``(batch, query, head, channel)`` by another one.

        Raises:
            PointNotFound: no module matches.
            ExplainError: no attention layer can be read (the message says why), or the replay recomputes its layers.

        Other threads that use the same replay wait until the block is left.
        """
        if self.anatomy.encodes_prompt and {"decoder", "cross"} & set(attention):
            raise ExplainError(
                f"the decoder of {type(self.model).__name__} reads the image through its encoder: its attention "
                "layers have no columns of image tokens; use a method that works by masking the image"
            )
        return self._looking_inside(modules=modules, attention=attention, visit=visit, edit=edit)

    @contextmanager
    def _looking_inside(self, **wanted: Any) -> Iterator[Captured]:
        if self.gradient_checkpointing:
            raise ExplainError(
                "capture does not go together with gradient checkpointing, which runs every layer twice: "
                "replay without gradient_checkpointing"
            )
        with self.replica.use() as model, capture(model, self.anatomy.encoders, **wanted) as seen:
            before = self.inside
            self.inside = (*before, seen)
            try:
                yield seen
            finally:
                self.inside = before

    # ------------------------------------------------------------------ inside

    def _shortcut(self, steps: Sequence[int] | None) -> Shortcut | None:
        """What a call for ``steps`` leaves out. Nothing while somebody looks inside: they count positions."""
        if steps is None:
            return None
        wanted = self.wanted(steps)
        if self.own is not None:
            wanted = tuple(sorted({*self.own.read(len(self.token_ids)), *wanted} - {len(self.token_ids)}))
        looked_into = self.inside or bool(self.unread) or (self.own is not None and self.own.states)
        if looked_into:
            return None
        with self._computing():
            return self.shortcuts.take(self, wanted)

    def _in_micro_batches(self, masks: torch.Tensor, size: int, run: Run) -> list[Any]:
        return in_micro_batches(
            masks,
            size,
            run,
            limits=self.limits,
            model=self.model,
            inside=bool(self.inside or self.unread),
            where=f"{self.trace_id} does not fit into memory of {self.device}",
        )

    def _whole_pass(self, pixel_inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """One pass over one image. Raises ``OutOfMemory`` where it does not fit."""
        try:
            return self._run(pixel_inputs, 1)
        except Exception as error:
            if not ran_out(error):
                raise
            what = (
                f"one pass over the {self.prompt_length} prompt and {len(self.token_ids)} answer tokens of "
                f"{self.trace_id} does not fit into memory of {self.device}, even without a mask"
                f"{'' if torch.is_grad_enabled() else ' or gradients'}"
            )
            raise does_not_fit(what, error, "record the answer with a smaller image") from error

    def _run(self, pixel_inputs: dict[str, torch.Tensor], batch: int, shortcut: Shortcut | None = None) -> torch.Tensor:
        given = {name: value for name, value in pixel_inputs.items() if name in self._fed}
        if (rows := self.rows) > 1:
            given = {name: _repeated(value, batch, rows) for name, value in given.items()}
        joined = self.path.joined(given, batch * rows)
        fed = {name: self._placed(name, value, batch * rows) for name, value in joined.items()}
        checkpoint = self.recomputes and torch.is_grad_enabled()
        self.passes.add(forward=batch * rows)
        with self._reading(), self._computing():
            log_probs = self._forcing.log_probs(fed, batch=batch, checkpoint=checkpoint, shortcut=shortcut)
        if shortcut is None:
            return log_probs
        every = log_probs.new_full((batch, self.columns), torch.nan)
        columns = (*shortcut.steps, *range(len(self.token_ids), self.columns))
        return every.index_copy(1, index_on(every.device, columns), log_probs)

    def _placed(self, name: str, value: torch.Tensor, batch: int) -> torch.Tensor:
        """With an axis of prompts in front, where the processor has put one there and its image processor has not."""
        shape = self._shapes.get(name)
        if shape and value.ndim == len(shape) and value.shape[1:] == shape[1:] and len(value) == batch * shape[0]:
            return value.reshape(batch, *shape)
        return value

    def _forward(
        self,
        masks: torch.Tensor,
        image: int | Clip | None,
        noise: float,
        seeds: torch.Tensor,
        mode: Mode,
        shortcut: Shortcut | None = None,
    ) -> torch.Tensor:
        inputs = self.path.apply(masks, image=image, mode=mode)
        if noise:
            for name in self.path.pixel_keys:
                inputs[name] = inputs[name] + noise_like(inputs[name], noise, seeds)
        if shortcut is not None and self.recomputes and torch.is_grad_enabled():  # since memory ran out in this call
            shortcut = Shortcut(shortcut.steps)
        return self._run(inputs, len(masks), shortcut)

    def _batch_of(self, mask: torch.Tensor, image: int | Clip | None) -> torch.Tensor:
        """The mask as a batch in single precision or more, checked before anything is computed."""
        masks = mask[None] if isinstance(mask, torch.Tensor) and mask.ndim == 2 else mask
        expand_masks(masks, self.n_images, image)
        masks = masks.clone() if masks.is_inference() else masks
        return masks if masks.dtype == torch.float64 else masks.float()

    @property
    def masks_at_once(self) -> int:
        """Masks per pass: as many as the user wants, as have proved to fit where memory ran out, or by the rule."""
        if self.limits.micro_batch is not None:
            return self.limits.micro_batch
        if self.kept.masks_at_once is None:
            self.kept.masks_at_once = masks_at_once(
                self.model, self.anatomy.encoders, self.path.inputs, self.length, self.device
            )
        return max(1, self.kept.masks_at_once // self.rows)

    @property
    def recomputes(self) -> bool:
        """Whether layers are run again in backward: wanted so, or as memory ran out; not while somebody looks inside,
        who would see them twice, nor where some text is unread, which is so in forward only."""
        if self.unread:
            return False
        return self.limits.gradient_checkpointing or (self.limits.recompute and not self.inside)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether layers are run again in backward, as the user wanted."""
        return self.limits.gradient_checkpointing

    @property
    def _half(self) -> bool:
        return any(weight.dtype == torch.float16 for weight in self.model.parameters())


def _repeated(value: torch.Tensor, batch: int, rows: int) -> torch.Tensor:
    """Inputs of ``batch`` images, copy after copy, each of them ``rows`` times."""
    if not value.ndim:
        return value
    parts = value.reshape(batch, len(value) // batch, *value.shape[1:])
    return parts.repeat_interleave(rows, dim=0).flatten(0, 1)
