"""Teacher forcing: one pass over prompt and recorded answer that gives log P(a_t) at every step (paper, Eq. 1 and 5).

The answer's token t is predicted by the logits at position ``P + t - 1`` of the sequence ``prompt + answer[:-1]``
(P prompt tokens, t from 0), so one forward pass serves all steps and only those T positions go through the LM head.

A caller that wants only some of the answer's tokens says so by a ``Shortcut``; then the tokens after the last of them
are left out, only their positions go through the LM head, and what comes before the image may be read from a cache.

A score of the user's own (``own_scores``) is computed in the same pass. Another course of the answer that it asks for
is a further row of the batch, next to the answer's own: prompt, answer up to where they part, and its tokens but the
last. Its first token is predicted by the answer's own row, so one of a single token needs none.
"""

from __future__ import annotations

import copy
import inspect
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lvlm_probe.errors import ReplayError
from lvlm_probe.hooks import HookSet
from lvlm_probe.models.anatomy import lm_head
from lvlm_probe.models.exhaustion import ran_out
from lvlm_probe.models.inputs import cache_in, index_on, input_device, list_inputs
from lvlm_probe.models.precision import epsilon_of
from lvlm_probe.models.replica import Replica
from lvlm_probe.replaying.isolation import checkpointed, even_gradients, patch_gradients
from lvlm_probe.replaying.own_scores import Given, OwnScore

_OWN_ROUND = 1.5
"""Roundings to the model's number format between two runs, in units of ε · max |logit|: half a step of the logit in
each run, and half a step of the states that it is made of. Between cached decoding and one pass over tiny models of two
families, 120 answers with largest logits of 12 and 25, up to 0.8 were found in bfloat16 and float16."""

_SUMS_ROUND = 16
"""What sums of products add, in units of float32's ε (float64's on a float64 model): they are made in float32 whatever
the format. In the same answers in float32, up to 4 were found."""


@dataclass(frozen=True)
class Shortcut:
    """The part of a pass that is left out because it cannot change the log-probabilities that are wanted.

    Attributes:
        steps: The answer's tokens that are wanted, ascending.
        start: How many positions at the beginning of the prompt are not fed but read from ``past``.
        past: The model's own cache of them, one row; it is copied for every pass.
        position_ids: Of all positions of the whole sequence, ``(..., 1, position)``, where the model cannot number what
            follows ``past`` by itself.
        narrow: Path of a module after the last mixing of positions (the last layer's MLP), which is run at the wanted
            positions only.
    """

    steps: tuple[int, ...]
    start: int = 0
    past: Any = None
    position_ids: torch.Tensor | None = None
    narrow: str | None = None


class Seen(threading.local):
    """What passes of one thread have shown; those that run again in a backward pass wait for no other thread's.

    Attributes:
        cut_off: whether the score of the last differentiable pass came without a gradient.
        largest_logit: max |logit| over steps and vocabulary, float32, in the last pass over one image and all steps;
            ``None`` before there was one.
        likeliest: of that pass, the likeliest token's id in the place of each token of the answer, and its log P,
            ``(step,)`` each, where the logits are.
        runners_up: the same of the likeliest token but the answer's own.
        epsilon: ε of the number format of that pass: of its logits or of the weights, whichever is the rounder.
    """

    largest_logit: torch.Tensor | None = None
    likeliest: tuple[torch.Tensor, torch.Tensor] | None = None
    runners_up: tuple[torch.Tensor, torch.Tensor] | None = None
    epsilon: float = 0.0
    cut_off: bool = False


class TeacherForcing:
    """The teacher-forced pass over one prompt and one answer, for any number of images at once.

    Args:
        model: the generating model, or the replica of one; passes run on a replica.
        input_ids: ``(P,)`` prompt token ids without padding.
        token_ids: ``(T,)`` answer token ids, T >= 1.
        sequence_inputs: further inputs with one entry per prompt position, ``(1, P, ...)``; they are extended over the
            answer (token types by ``answer_token_type``, anything else by its last entry).
        other_inputs: inputs of any other shape, handed on as they are.
        answer_token_type: token type of the answer's tokens; text is 0 nearly everywhere.
        reads_prompt: there is a prompt beside the answer's own sequence; where not, ``input_ids`` are the decoder's.
        image_token_id: the placeholder that image features replace. generate() reads one that the model has said as a
            word; in one pass over prompt and answer the model would look for an image to it.
        score: a score of the user's own, which is one more column of ``log_probs``.
        image_positions: positions of the image tokens in the prompt, which that score may read.

    Attributes:
        rows: sequences per image: the answer, and each course of it that parts from it by more than a token.
        seen: what this thread's last passes have shown beside log-probabilities.
        separate: names of ``separate_inputs``.
    """

    def __init__(
        self,
        model: torch.nn.Module | Replica,
        *,
        input_ids: torch.Tensor,
        token_ids: torch.Tensor,
        sequence_inputs: Mapping[str, torch.Tensor] | None = None,
        other_inputs: Mapping[str, Any] | None = None,
        answer_token_type: int = 0,
        separate_inputs: Mapping[str, torch.Tensor] | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        reads_prompt: bool = True,
        image_token_id: int | None = None,
        score: OwnScore | None = None,
        image_positions: torch.Tensor | None = None,
    ) -> None:
        if token_ids.numel() == 0:
            raise ReplayError("the answer has no tokens, so there is nothing to replay")
        self.replica, self.seen = model if isinstance(model, Replica) else Replica(model), Seen()
        with self.replica.use() as model:
            self.device = input_device(model)
            self._lists = list_inputs(model)
            parameters = inspect.signature(model.forward).parameters
        self.steps = int(token_ids.numel())
        self._targets = token_ids.to(self.device).long()
        self._score = score
        self._image_positions = torch.zeros(0, dtype=torch.long) if image_positions is None else image_positions
        # What the answer continues: the prompt or, in an encoder-decoder model, the decoder's own beginning.
        start = input_ids if decoder_input_ids is None else decoder_input_ids.flatten()
        self.prompt_length = int(start.numel())
        tails = self._courses(token_ids.long().cpu())
        self._said_image = decoder_input_ids is None and any(image_token_id in tail.tolist() for tail in tails)
        ids = torch.stack([torch.cat([start.long().cpu(), tail]) for tail in tails])
        self.rows, self.length = ids.shape
        self._ids = ids[0]
        asked = ids if decoder_input_ids is None else input_ids.long().cpu()[None]
        width = int(asked.shape[1])
        self._sequence: dict[str, torch.Tensor] = {
            "input_ids" if reads_prompt else "decoder_input_ids": asked.to(self.device)
        }
        if reads_prompt:
            self._sequence["attention_mask"] = torch.ones(1, width, dtype=torch.long, device=self.device)
        if decoder_input_ids is not None:
            self._sequence["decoder_input_ids"] = ids.to(self.device)
        for name, value in (sequence_inputs or {}).items():
            if name not in self._sequence:
                self._sequence[name] = _extend(name, value, width, answer_token_type).to(self.device)
        # Those that go on over the answer, and end where it is cut.
        self._answering = frozenset(self._sequence) if decoder_input_ids is None else frozenset({"decoder_input_ids"})
        self.separate = frozenset(separate_inputs or {})
        for name, value in (separate_inputs or {}).items():
            self._sequence.setdefault(name, value.to(self.device))
        self._other = dict(other_inputs or {})
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._keeps_logits = "logits_to_keep" in parameters
        self._takes_use_cache = "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def log_probs(
        self,
        pixel_inputs: Mapping[str, torch.Tensor],
        *,
        batch: int,
        checkpoint: bool = False,
        shortcut: Shortcut | None = None,
    ) -> torch.Tensor:
        """Log-probabilities of the answer's tokens for ``batch`` images.

        Args:
            pixel_inputs: the image inputs of ``batch`` copies of the prompt, concatenated along their first axis.
            batch: number of copies.
            checkpoint: recompute layers in backward instead of keeping their activations.
            shortcut: only its ``steps`` are wanted; ``None`` is all of them, by the plain pass.

        Returns:
            ``(batch, step)`` float32 (float64 on a float64 model), natural log; differentiable in ``pixel_inputs`` when
            gradients are enabled. With a ``shortcut`` the steps are those of ``shortcut.steps``.
            Paper, Eq. 1.
        """
        steps = shortcut.steps if shortcut is not None else tuple(range(self.steps))
        slots = tuple(sorted({*steps, *self._slots}))
        inputs = self._inputs(pixel_inputs, batch, shortcut, slots)
        with (
            self.replica.use() as replica,
            checkpointed(replica, enabled=checkpoint) as model,
            even_gradients(model),
            patch_gradients(model),
            self._wanted_positions_only(model, slots, shortcut) as (extra, states),
        ):
            try:
                logits = model(**inputs, **extra, return_dict=True).logits
            except (ValueError, RuntimeError, IndexError) as error:
                if not self._said_image or ran_out(error):
                    raise
                raise ReplayError(
                    f"the answer holds the image token itself, to which {type(model).__name__} looks for another "
                    f"image, so this answer cannot be replayed ({error})"
                ) from error
        logits = _of_slots(logits, slots)
        epsilon = max(epsilon_of(logits.dtype), epsilon_of(getattr(model, "dtype", None)))
        banned = torch.finfo(logits.dtype).min / 2  # what a model fills in for tokens that it never says (Chameleon)
        if logits.dtype != torch.float64:
            logits = logits.float()
        if logits.shape[:2] != (batch * self.rows, len(slots)):
            raise ReplayError(
                f"{type(model).__name__} returned logits of shape {tuple(logits.shape)} for {batch * self.rows} images "
                f"and {len(slots)} answer tokens; its forward edits the sequence, so this answer cannot be replayed"
            )
        by_row = logits.reshape(batch, self.rows, *logits.shape[1:])
        logits, known = by_row[:, 0], slots
        if slots[-1] >= self.steps:  # behind the answer's end are other courses of it alone
            known = tuple(slot for slot in slots if slot < self.steps)
            logits = logits[:, : len(known)]
        targets = self._targets.to(logits.device)[index_on(logits.device, known)]
        if shortcut is None and batch == 1:
            self._look_at(logits.detach()[0], targets, banned, epsilon)
        picked = logits.gather(-1, targets[None, :, None].expand(batch, -1, 1)).squeeze(-1)
        log_probs = picked - logits.logsumexp(dim=-1)
        if self._score is None:
            return log_probs
        own = self._scored(log_probs, by_row, slots, states)
        return torch.cat([log_probs[:, [known.index(step) for step in steps]], own], dim=1)

    def _inputs(
        self, pixel_inputs: Mapping[str, torch.Tensor], batch: int, shortcut: Shortcut | None, slots: Sequence[int]
    ) -> dict[str, Any]:
        """What the model is fed: the text once per image, and what is cached where the pass begins behind it."""
        rows = batch * self.rows
        inputs: dict[str, Any] = {
            name: value.repeat(batch, *[1] * (value.ndim - 1))
            if len(value) > 1
            else value.expand(rows, *value.shape[1:])
            for name, value in self._text(shortcut, slots).items()
        }
        # Of Qwen2.5-VL, seconds that a patch lasts: one number per clip, not per row.
        inputs.update({n: v.repeat(rows) if "second_per_grid" in n else v for n, v in self._other.items()})
        inputs.update({name: _to(value, self.device) for name, value in pixel_inputs.items()})
        inputs.update({name: inputs[name].tolist() for name in self._lists & inputs.keys()})
        if self._takes_use_cache:
            inputs["use_cache"] = False
        if shortcut is not None and shortcut.start:
            past = copy.deepcopy(shortcut.past)
            past.batch_repeat_interleave(rows)
            inputs |= {self._cache_name: past, "use_cache": True}
            if (places := shortcut.position_ids) is not None:
                fed = places[..., shortcut.start : self.stop(slots)]
                inputs["position_ids"] = fed.expand(*fed.shape[:-2], rows, fed.shape[-1])
        return inputs

    def _look_at(self, logits: torch.Tensor, targets: torch.Tensor, banned: float, epsilon: float) -> None:
        """Note what rounding depends on, and the likeliest tokens, of one image's logits ``(step, token)``."""
        spoken = logits.masked_fill(logits < banned, 0.0)
        seen = self.seen
        seen.largest_logit, seen.epsilon = spoken.abs().amax().float(), epsilon
        top, total = logits.topk(2), logits.logsumexp(-1)
        seen.likeliest = top.indices[:, 0], (top.values[:, 0] - total).float()
        second = (top.indices[:, 0] == targets).long()[:, None]
        ids, values = (part.gather(1, second)[:, 0] for part in (top.indices, top.values))
        seen.runners_up = ids, (values - total).float()

    # ------------------------------------------------------------------ a score of the user's own

    def _courses(self, answer: torch.Tensor) -> list[torch.Tensor]:
        """What is fed after the prompt, row by row: the answer but its last token, and so each other course of it that
        has more than one token; all as long as the longest, which nothing that is read depends on."""
        score, self._slots = self._score, frozenset[int]()
        if score is None:
            return [answer[:-1]]
        if late := [step for step, _ in score.others if step >= self.steps]:
            raise ReplayError(f"the answer has tokens 0 to {self.steps - 1}; another course begins at {late[0]}")
        read = score.read(self.steps)
        if read and read[-1] >= self.steps:
            raise ReplayError(f"the answer has tokens 0 to {self.steps - 1}; {score} reads token {read[-1]}")
        self._slots = frozenset(read).union(step + place for step, ids in score.others for place in range(len(ids)))
        tails = [answer[:-1], *(torch.cat([answer[:step], torch.tensor(ids[:-1])]) for step, ids in score.longer)]
        longest = max(map(len, tails))
        return [torch.cat([tail, answer[-1:].expand(longest - len(tail))]) for tail in tails]

    def _scored(
        self,
        log_probs: torch.Tensor,
        by_row: torch.Tensor,
        slots: tuple[int, ...],
        states: list[torch.Tensor],
    ) -> torch.Tensor:
        """The score of each image, ``(batch, 1)``, from log P of the answer's ``slots`` and the logits ``(batch, row,
        slot, token)`` of all of them."""
        score = self._score
        assert score is not None
        batch = len(log_probs)
        read = score.read(self.steps)
        at = [slots.index(step) for step in read]
        every = log_probs.new_full((batch, self.steps), torch.nan)
        every = every.index_copy(1, index_on(every.device, read), log_probs[:, at])
        others, row_of = [], {other: row for row, other in enumerate(score.longer, start=1)}
        for step, ids in score.others:
            rows = [0, *[row_of.get((step, ids), 0)] * (len(ids) - 1)]
            found = by_row[:, rows, [slots.index(step + place) for place in range(len(ids))]]
            index = torch.tensor(ids, device=found.device)[None, :, None].expand(batch, -1, 1)
            others.append(found.gather(-1, index)[:, :, 0] - found.logsumexp(dim=-1))
        if score.states and not states:
            raise ReplayError("this model has no LM head of its own, so there are no hidden states for a score to read")
        given = Given(
            every,
            read,
            tuple(others),
            self._ids,
            self._image_positions,
            by_row[:, 0, at],
            states[0].reshape(batch, self.rows, *states[0].shape[1:])[:, 0] if score.states else None,
        )
        found = score(given)
        if not isinstance(found, torch.Tensor) or found.shape != (batch,):
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise ReplayError(f"the score {score.name!r} must return one number per mask, ({batch},), not {shape}")
        self.seen.cut_off = log_probs.requires_grad and not found.requires_grad
        return found[:, None].to(log_probs)

    def stop(self, steps: Sequence[int]) -> int:
        """Number of positions of the sequence that it takes to predict ``steps``."""
        return self.prompt_length + steps[-1]

    def asked(self) -> dict[str, Any]:
        """What ``generate()`` is given beside pixels, the answer not yet said: of one prompt, on the device."""
        start = self.prompt_length
        asked = {n: value[:1, :start] if n in self._answering else value for n, value in self._sequence.items()}
        asked |= {name: _to(value, self.device) for name, value in self._other.items()}
        return asked | {name: asked[name].tolist() for name in self._lists & asked.keys()}

    @property
    def names(self) -> frozenset[str]:
        """Names of the inputs beside pixels."""
        return frozenset(self._sequence) | frozenset(self._other)

    def past(self, length: int, *, position_ids: torch.Tensor | None = None) -> Any:
        """The model's own cache of the first ``length`` positions, which hold no image; without gradients.

        Raises:
            Exception: whatever the model says where it cannot be asked that.
        """
        inputs: dict[str, Any] = {name: value[:1, :length] for name, value in self._sequence.items()}
        if position_ids is not None:
            inputs["position_ids"] = position_ids[..., :length]
        with torch.no_grad(), self.replica.use() as model:
            keep = {"logits_to_keep": 1} if self._keeps_logits else {}
            return cache_in(model(**inputs, **keep, use_cache=True, return_dict=True))

    def _text(self, shortcut: Shortcut | None, slots: Sequence[int]) -> dict[str, torch.Tensor]:
        """Inputs beside the image, of one image, up to the last position that is wanted."""
        if shortcut is None:
            return self._sequence
        stop, start = self.stop(slots), shortcut.start
        return {
            # The mask tells of what is in the cache too.
            name: value[:, 0 if name == "attention_mask" else start : stop] if name in self._answering else value
            for name, value in self._sequence.items()
        }

    @contextmanager
    def _wanted_positions_only(
        self, model: torch.nn.Module, steps: Sequence[int], shortcut: Shortcut | None
    ) -> Iterator[tuple[dict[str, int], list[torch.Tensor]]]:
        """Only wanted positions through the LM head, by trimming what it is given, which a score may read.

        ``logits_to_keep`` is for models whose head is not found: with it some drop all other positions before their
        last layers (Gemma 4), where whoever looks inside would miss them.
        """
        head = lm_head(model)
        span = steps[-1] - steps[0] + 1
        whole = self._score is not None and self._score.states
        states: list[torch.Tensor] = []
        extra = {"logits_to_keep": span} if self._keeps_logits and head is None else {}
        back = tuple(step - steps[-1] - 1 for step in steps)  # counted from the end, which all of them share

        def trim(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = args[0]
            if whole:
                states.append(given)
            if len(steps) == span:
                return (given[:, -span:], *args[1:]), kwargs
            return (given.index_select(1, index_on(given.device, back) + given.shape[1]), *args[1:]), kwargs

        def narrowed(original: Callable[..., Any], given: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            rows = index_on(given.device, back) + given.shape[1]
            some = original(given.index_select(1, rows), *args, **kwargs)
            every = some.new_zeros(*given.shape[:2], *some.shape[2:])
            return every.index_copy(1, rows, some)

        def of_one_prompt(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            # HunYuanVL counts images over all rows of a batch, and places them by that; here every row is one prompt.
            positions, *rest = original(*args, **kwargs)
            return positions[..., :1, :].expand_as(positions), *rest

        with HookSet() as hooks:
            for part in model.modules():
                if hasattr(part, "get_rope_index"):
                    hooks.shadow(part, "get_rope_index", of_one_prompt)
            if head is not None:
                hooks.forward_pre(head, trim, name="wanted positions", fenced=False)
            if shortcut is not None and shortcut.narrow:
                hooks.shadow(model.get_submodule(shortcut.narrow), "forward", narrowed)
            yield extra, states


def rounding_of(log_probs: torch.Tensor, largest_logit: float, epsilon: float) -> torch.Tensor:
    """Largest distance of log-probabilities from those of a run that rounds otherwise (cached decoding, another batch).

    Every logit may be off by δ = (1.5 ε + 16 ε₃₂) · max |logit|, the maximum over all steps, as what is rounded is the
    hidden states too. With P = e^z / Σ e^z and every other logit moved against the token's own, log P falls by at most
    log(P + (1 − P) e^(2 δ)): 2 δ for an unlikely token, next to nothing for a certain one. Taking the logarithm rounds
    too, by 4 ε₃₂ · max |logit|.

    Args:
        log_probs: ``(step,)`` natural log.
        largest_logit: max |logit|.
        epsilon: ε of the model's number format. Below float32's (float64) it stands for ε₃₂ too.

    Returns:
        ``(step,)`` nats.
    """
    fine = min(epsilon, epsilon_of(torch.float32))
    # e^600 is a number still, and no logits are that large.
    moved = min((_OWN_ROUND * epsilon + _SUMS_ROUND * fine) * largest_logit, 300.0)
    others = -torch.expm1(log_probs.cpu().double().clamp(max=0))
    return (torch.log1p(others * math.expm1(2 * moved)) + 4 * fine * largest_logit).to(log_probs)


def _extend(name: str, value: torch.Tensor, length: int, answer_token_type: int) -> torch.Tensor:
    missing = length - value.shape[1]
    if missing <= 0:
        return value[:, :length]
    tail = value[:, -1:].expand(-1, missing, *value.shape[2:])
    if "type_ids" in name:
        tail = torch.full_like(tail, answer_token_type)
    elif name.endswith("position_mask"):  # which positions are the image's: none of the answer's
        tail = torch.zeros_like(tail)
    return torch.cat([value, tail], dim=1)


def _of_slots(logits: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
    """Logits of the wanted positions, where the head has run over more than these."""
    span = slots[-1] - slots[0] + 1
    if logits.shape[1] != len(slots):
        logits = logits[:, -span:]
        if logits.shape[1] == span != len(slots):
            logits = logits[:, [slot - slots[0] for slot in slots]]
    return logits


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
