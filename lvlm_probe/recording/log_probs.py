"""log P(a_t) as the model computes it while it generates, and beside it that of its likeliest token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from lvlm_probe.hooks import HookSet


class StepValues(NamedTuple):
    """What was read off the logits of the steps, ``(batch, step)`` each.

    Attributes:
        log_probs: of the tokens of the answer, nats.
        top_log_probs: of the likeliest token, nats.
        top_ids: which one that is.
    """

    log_probs: torch.Tensor
    top_log_probs: torch.Tensor
    top_ids: torch.Tensor


class StepLogProbs:
    """Reads log P(a_t) off the model's own logits while it generates.

    The logits of one step are kept until the next step shows which token was chosen: one ``(batch, vocabulary)`` tensor
    at a time, and no synchronisation with the device.
    """

    def __init__(self) -> None:
        self._pending: torch.Tensor | None = None
        self._chosen: list[torch.Tensor] = []
        self._values: list[StepValues] = []
        self._lengths: list[int | None] = []  # positions of each pass; None: embeddings
        self._fed: tuple[int, torch.Tensor] | None = None  # positions of the newest pass, and its last token ids
        self._early: tuple[list[int], StepValues] | None = None  # what ``chosen`` has read of it

    def hang(
        self, module: torch.nn.Module, hooks: HookSet, *, compiled: bool, on_error: Callable[[str, BaseException], None]
    ) -> None:
        """Put the reader onto ``module``.

        Where a call of it runs as a compiled graph, a hook would be traced into the graph, compiled anew at every step,
        and refused where the graph must be whole; so the reader stands in front of the two methods between which
        ``generate()`` makes the call.
        """
        if not compiled:
            hooks.forward(module, self, name="log_probs")
            return

        def fed(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            try:
                self._feed(args[0] if args else kwargs.get("input_ids"))
            except Exception as error:
                on_error("log_probs", error)
            return original(*args, **kwargs)

        def made(original: Callable[..., Any], outputs: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                self._pending, self._early = outputs.logits[:, -1].clone(), None
            except Exception as error:
                on_error("log_probs", error)
            return original(outputs, *args, **kwargs)

        hooks.shadow(module, "prepare_inputs_for_generation", fed)
        hooks.shadow(module, "_update_model_kwargs_for_generation", made)

    def __call__(self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The forward hook."""
        logits = output.logits
        ids = kwargs.get("decoder_input_ids")
        if ids is None:
            ids = kwargs.get("input_ids", args[0] if args else None)
        self._feed(ids)
        # Not a view: it would keep the logits of the whole prompt alive, and a model that runs as a CUDA graph, or with
        # buffers of its own, writes the next step's logits where this step's are.
        self._pending, self._early = logits[:, -1].clone(), None

    def _feed(self, ids: torch.Tensor | None) -> None:
        if self._pending is not None and ids is not None:
            self._take(ids[:, -1])
        self._lengths.append(None if ids is None else ids.shape[1])
        self._fed = None if ids is None else (ids.shape[1], ids[:, -1])

    def _take(self, chosen: torch.Tensor) -> None:
        assert self._pending is not None
        early, self._early = self._early, None
        known = early is not None and early[0] == chosen.tolist()
        self._values.append(early[1] if early is not None and known else self._read(self._pending, chosen))
        self._chosen.append(chosen.to(self._pending.device))

    @staticmethod
    def _read(pending: torch.Tensor, chosen: torch.Tensor) -> StepValues:
        """The values of chosen tokens ``(batch,)`` in logits ``(batch, vocabulary)``."""
        scores = pending.float()
        whole = scores.logsumexp(-1)
        top = scores.max(-1)
        picked = scores.gather(-1, chosen.to(scores.device)[:, None])[:, 0]
        return StepValues(picked - whole, top.values - whole, top.indices)

    def chosen(self, step: int, ids: torch.Tensor) -> float | None:
        """log P of token number ``step``, nats, as soon as it is chosen; what is recorded waits for the next step.

        Args:
            step: how many tokens stand before it in the answer.
            ids: ``(1, position)`` of what was generated from and what was generated, this token the last.

        Returns:
            ``None`` where the newest pass was not one that ends at the token before, or earlier ones were not.
        """
        if self._pending is None or len(self._values) != step or len(self._pending) != len(ids):
            return None
        if self._fed is None:  # embeddings, with which only the prompt is given
            usual = step == 0 and len(self._lengths) == 1
        else:  # passes over guessed tokens are longer
            count, last = self._fed
            usual = count in (1, ids.shape[1] - 1) and torch.equal(last.to(ids.device), ids[:, -2])
        if not usual:
            return None
        values = self._read(self._pending, ids[:, -1])
        self._early = ids[:, -1].tolist(), values
        return float(values.log_probs[0])

    def result(self, generated: torch.Tensor, prompt: int | None = None) -> StepValues | None:
        """The values of ``generated`` ``(batch, step)``; ``None`` unless every step was seen with its token.

        Args:
            prompt: how many positions it continues, where that is known.
        """
        steps = generated.shape[1]
        if self._pending is not None and len(self._values) == steps - 1 and len(self._pending) == len(generated):
            self._take(generated[:, -1])
        self._pending = None
        if len(self._values) < steps or not _one_by_one(self._lengths, prompt):
            return None
        chosen = torch.stack(self._chosen[:steps], dim=1)
        if chosen.shape != generated.shape or not torch.equal(chosen, generated.to(chosen.device)):
            return None
        return StepValues(*(torch.stack(values, dim=1).cpu() for values in zip(*self._values[:steps], strict=True)))


def _one_by_one(lengths: Sequence[int | None], prompt: int | None) -> bool:
    """Whether passes over so many positions are those of one step each: over the newest token, or over all so far anew.

    A pass over guessed tokens may end with the token that the answer has there, although the guess was refused, and the
    first one may have guesses behind the prompt; and one over embeddings, which a user's logits processor makes, says
    nothing of its tokens.
    """
    first, *later = lengths
    if None in later or (first is not None and prompt is not None and first > prompt):
        return False
    anew = {length - step for step, length in enumerate(lengths) if length is not None}
    return len(anew) <= 1 or all(length == 1 for length in later)


def generators(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules whose logits ``model.generate()`` may read, outermost first: the model itself, or, where its class
    has a ``generate`` of its own that hands over to a language model inside, that one.
    """
    inner = (m for m in model.modules() if m is not model and hasattr(m, "prepare_inputs_for_generation"))
    return [model, *inner]


def _seen_by(readers: Sequence[StepLogProbs], generated: torch.Tensor, prompt: int | None = None) -> StepValues | None:
    """``result`` of the first of ``readers`` that saw every step with its token; ``None`` if none did."""
    found = None
    for reader in readers:
        values = reader.result(generated, prompt) if generated.shape[1] else None
        found = values if found is None else found
    return found


def answer_in(
    sequences: torch.Tensor, start: torch.Tensor, readers: Sequence[StepLogProbs], *, alone: bool
) -> tuple[torch.Tensor, StepValues | None] | None:
    """The answers ``(batch, step)`` in what ``generate()`` returned, and their values where every step was seen.

    Args:
        sequences: what it returned.
        start: what the answers continue, ``(prompt, position)``: one row for one or more of ``sequences``.
        readers: what watched the logits.
        alone: the answer may have been returned without its prompt. A model whose own ``generate()`` begins with
            embeddings does that; that all of its tokens were seen being chosen tells it from a prompt that was edited.

    Returns:
        ``None`` where the sequences do not continue ``start``.
    """
    copies, odd = divmod(len(sequences), len(start))
    if odd or copies == 0:
        return None
    if torch.equal(sequences[:, : start.shape[1]], start.repeat_interleave(copies, 0).to(sequences.device)):
        generated = sequences[:, start.shape[1] :]
        return generated, _seen_by(readers, generated, start.shape[1])
    values = _seen_by(readers, sequences) if alone else None
    return None if values is None else (sequences, values)
