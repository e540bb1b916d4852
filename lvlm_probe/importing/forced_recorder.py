"""A recorder for answers that were said elsewhere: the model is shown the answer instead of being asked for one.

It is the recorder of ``generate()`` calls, given the sequence that such a call would have returned. One teacher-forced
pass over prompt and answer takes the place of the decoding steps: log P(a_t) is read at the answer's positions, and so
is attention (paper, Eq. 1 and 5).
"""

from __future__ import annotations

import contextlib
import copy
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from lvlm_probe.attention import RowTap
from lvlm_probe.hooks import Call, HookSet
from lvlm_probe.importing.retokenize import answer_tokens, checked_ids
from lvlm_probe.importing.rows import AnswerRow, BadRow
from lvlm_probe.models.families import family_of
from lvlm_probe.models.prompts import PromptRule, chat_inputs, placed, prompt_rule
from lvlm_probe.models.tokenizers import decoder_config, tokenizer_of, vocabulary_size
from lvlm_probe.recording.log_probs import generators
from lvlm_probe.recording.prompt_images import NotRecorded
from lvlm_probe.recording.recorder import GenerationRecorder, RecordOptions, Target
from lvlm_probe.recording.row_inputs import columns_of, image_token_mask
from lvlm_probe.replaying import Replay
from lvlm_probe.replaying.isolation import outside_modes
from lvlm_probe.trace.reader import Trace
from lvlm_probe.trace.records import Capture, RowCapture

if TYPE_CHECKING:
    from PIL import Image

    from lvlm_probe.recording.probe import Probe

MORE_THAN_ROUNDING = 0.1
"""Mean difference, nats per token, beyond which two engines do not run the same thing in another precision."""

_PLACEHOLDERS = ("<image>", "<|image|>", "<|image_pad|>", "<img>", "[IMG]", "<IMG_CONTEXT>", "<start_of_image>")
"""What families write where an image stands: a prompt with one of another family is not a question."""


class ForcedRecorder(GenerationRecorder):
    """Makes a capture of one prompt and one answer. Used once: ``begin`` → ``finish`` → ``complete``."""

    def arm_attention(self, ids: torch.Tensor, copies: int) -> None:
        """Nothing decodes, so there is nothing to read yet; ``complete`` reads the rows of its one pass."""

    def ending(self, token_ids: torch.Tensor, text: str) -> str | None:
        """Nothing: it was decided elsewhere."""
        return None

    def finish(self, output: Any) -> Capture:
        capture = super().finish(output)
        capture.seconds.clear()  # nothing was generated
        return capture

    def complete(self, capture: Capture) -> None:
        if self.options.attention:
            for row in capture.rows:
                self._force(row)
        super().complete(capture)

    def _force(self, row: RowCapture) -> None:
        """Log-probabilities and attention rows, in one pass."""
        replay, places = self.replay(row), self._places(row)
        faults: list[str] = []
        with replay.replica.use() as model:
            tap = self._tap_for(model, places, faults)
            with contextlib.nullcontext() if tap is None else tap:
                if tap is not None:
                    self._armed(tap, places, replay, row)
                self.take_log_probs(row, replay)
                rows = None if tap is None else tap.collect()
                if rows is not None:
                    self.add_attention(row, rows, 0)
        row.notes += [f"attention rows are not recorded: {fault}" for fault in faults]

    def _tap_for(self, model: torch.nn.Module, places: torch.Tensor | None, faults: list[str]) -> RowTap | None:
        """A tap on the model that the pass runs on; ``None``, and why, where there is nothing to read."""
        cross = places is None or self.anatomy.encoder_decoder
        if places is None and self.anatomy.encodes_prompt:
            faults.append("the decoder reads a text that has read the image, and no image tokens")
            return None
        tap = RowTap(model, cross=cross, on_error=lambda error: faults.append(str(error)))
        if not tap.layers:
            faults.append("; ".join(sorted(set(map(str, tap.unsupported.values())))) or "there is no attention layer")
            return None
        if places is not None and not places.any():
            faults.append("the prompt holds no image tokens")
            return None
        return tap

    def _places(self, row: RowCapture) -> torch.Tensor | None:
        inputs = {name: torch.as_tensor(value) for name, value in row.model_kwargs.items()}
        ids = torch.as_tensor(row.input_ids)[None]
        return image_token_mask({**inputs, "input_ids": ids}, self.anatomy.placeholders)

    def _armed(self, tap: RowTap, places: torch.Tensor | None, replay: Replay, row: RowCapture) -> None:
        """The tap reads the queries that predict the answer's tokens."""
        columns, valid = (None, None) if places is None else columns_of(places)
        tap.arm(
            columns,
            valid=valid,
            queries=torch.arange(replay.prompt_length - 1, replay.length),
            heads=self.options.heads,
            cross_keys=len(row.input_ids) if self.anatomy.encodes_prompt else None,
        )


@outside_modes
def forced(probe: Probe, row: AnswerRow, images: Sequence[Image.Image], options: RecordOptions) -> Capture:
    """The capture of an answer that was said elsewhere, on the attached model.

    Args:
        probe: attached, with a processor.
        row: question or prompt, and answer.
        images: its images, RGB.
        options: as for a recording; ``images`` and ``points`` are not used.

    Returns:
        one row, with log-probabilities, and with what ``options`` asks for.

    Raises:
        BadRow: the answer does not fit the model: the reason.
        ProbeError: the model or its processor cannot be replayed.
    """
    target = probe.attachment
    faults: list[str] = []
    recorder = ForcedRecorder(target, options, lambda name, error: faults.append(f"{name}: {error}"))
    limit = _positions(target.model)
    try:
        _check_length(len(images), limit, "images, of a token each at least")
        inputs = placed(_inputs(probe.processor, row, images, target.model), target.model, probe.processor)
        inputs = _as_handed_over(target.model, inputs)
        # These two are looked at alone: what is searched or sampled elsewhere has been found already.
        recorder.begin((), {**inputs, "num_beams": 1, "num_return_sequences": 1})
        start = recorder.beginning.shape[1]
        _check_length(start, limit, "tokens of the prompt")
        candidates, notes = _candidates(target, recorder, row, limit)
        _check_length(start + min(map(len, candidates)), limit, "tokens of prompt and answer")
        candidates = [ids for ids in candidates if start + len(ids) <= limit]
        with torch.no_grad():
            capture = _likeliest(recorder, candidates, row)
            recorder.complete(capture)
    except NotRecorded as reason:
        raise BadRow(str(reason)) from reason
    finally:
        recorder.abort()
    (made,) = capture.rows
    made.notes += [*row.notes, *notes]
    if row.finish == "length":
        made.notes.append("the engine cut the answer off at its limit of tokens")
    if faults:
        made.status, made.error = "error", "; ".join(faults)
    return capture


class _Handed(Exception):
    """Ends a ``generate()`` of ours where the language model inside would begin."""


def _as_handed_over(model: Any, inputs: Any) -> Any:
    """The inputs with the prompt that a captioner's own ``generate`` makes of a given one (BLIP: another first token,
    and not the last one)."""
    family = family_of(getattr(getattr(model, "config", None), "model_type", None) or "")
    ids, inner = inputs.get("input_ids"), [part for part in generators(model)[1:] if hasattr(part, "generate")]
    if family is None or family.begins != "text" or ids is None or not inner:
        return inputs
    handed: list[torch.Tensor] = []

    def stop(_original: Any, *args: Any, **kwargs: Any) -> None:
        found = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        handed.extend([found] if isinstance(found, torch.Tensor) and found.ndim == 2 else [])
        raise _Handed

    with HookSet(scope=handed) as hooks, Call(handed), torch.no_grad(), contextlib.suppress(_Handed):
        for part in inner:
            hooks.shadow(part, "generate", stop)
        model.generate(**inputs, max_new_tokens=1)
    if not handed or torch.equal(handed[0], ids):
        return inputs
    width = handed[0].shape[1]
    cut = {name: value[:, :width] for name, value in inputs.items() if value.shape == ids.shape}
    return {**inputs, **cut, "input_ids": handed[0]}


def _positions(model: Any) -> int:
    """How many tokens the decoder was made for; no bound where its configuration does not say."""
    found = getattr(decoder_config(model), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else sys.maxsize


def _check_length(count: int, limit: int, what: str) -> None:
    if count > limit:
        raise BadRow(f"{count} {what}, and the model was made for {limit} positions")


def said_by(trace: Trace) -> Mapping[str, Any] | None:
    """What a trace says of where its answer was imported from; ``None`` for one that was generated when recorded."""
    found = trace.meta.get("imported")
    return found if isinstance(found, Mapping) else None


class Difference(NamedTuple):
    """What an engine says of an answer against what this model says.

    Attributes:
        largest, mean: of the log-probabilities, absolute, over the tokens that both give, nats; ``None`` without any.
        sentence: on both, and on the prompt; empty where nothing can be compared.
        serious: the two did not run the same: the mean is above ``MORE_THAN_ROUNDING``, or the prompts differ.
    """

    largest: float | None
    mean: float | None
    sentence: str
    serious: bool


def difference(made: RowCapture, row: AnswerRow, probe: Probe) -> Difference:
    """The log-probabilities and the prompt that a row gives, compared with those of its capture.

    Args:
        made: what ``forced`` made of the row.
        row: the row.
        probe: that the capture was made with.
    """
    prompt = _prompt_difference(made, row, probe.attachment)
    given = _given(row, len(made.token_ids))
    if given is None:
        return Difference(None, None, prompt, bool(prompt))
    differences = np.abs(given - made.log_probs.astype(np.float64))
    known = np.flatnonzero(np.isfinite(differences))
    if not known.size:
        told = "none of the given log-probabilities is a number that can be compared"
        return Difference(None, None, "; ".join(filter(None, (told, prompt))), bool(prompt))
    step = int(known[differences[known].argmax()])
    largest, mean = float(differences[step]), float(differences[known].mean())
    sentence = (
        f"the given log-probabilities differ from this model's by {largest:.3g} nats at most (token {step}, "
        f"{made.tokens[step]!r}: {given[step]:.3f} given, {made.log_probs[step]:.3f} here), {mean:.3g} on average"
    )
    if known.size < len(given):
        sentence += f"; {len(given) - known.size} of {len(given)} are not given"
    serious = mean > MORE_THAN_ROUNDING
    if serious:
        sentence += "; that is more than rounding: image, chat template or weights are not the engine's"
    return Difference(largest, mean, "; ".join(filter(None, (sentence, prompt))), serious or bool(prompt))


def _given(row: AnswerRow, count: int) -> np.ndarray | None:
    """The row's log-probabilities of the answer's tokens, ``(step,)``."""
    if row.scored is not None:
        return np.asarray([value for _, value in row.scored[-count:]], dtype=np.float64)
    return None if row.log_probs is None else np.asarray(row.log_probs, dtype=np.float64)


def _prompt_difference(made: RowCapture, row: AnswerRow, target: Target) -> str:
    """A sentence where the engine's prompt has other tokens; empty where it has the same, or is not known.

    Of images engines write one placeholder each or all of them, with their rows' ends or without: no special token is
    compared.
    """
    tokenizer = tokenizer_of(target.processor)
    if row.prompt_ids is None or tokenizer is None:
        return ""
    special = {
        *tokenizer.all_special_ids,
        *getattr(tokenizer, "added_tokens_decoder", ()),
        target.anatomy.image_token_id,
    }
    given = row.prompt_ids[: -len(made.token_ids)] if row.scored is not None else row.prompt_ids
    there = [token for token in given if token not in special]
    here = [int(token) for token in made.input_ids if int(token) not in special]
    if here == there:
        return ""
    pairs = zip(here, there, strict=False)
    step = next((at for at, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(here), len(there)))
    return (
        f"the engine's prompt has other tokens ({len(there)} of text, {len(here)} here; text token {step} is the first "
        "that differs): question or chat template are not the engine's"
    )


def _likeliest(recorder: ForcedRecorder, candidates: Sequence[Sequence[int]], row: AnswerRow) -> Capture:
    """The capture of the likeliest tokenisation, or of that nearest to given log-probabilities; one pass each."""
    found: list[tuple[float, Capture]] = []
    for ids in candidates:
        own = copy.copy(recorder)  # ``finish`` may be called once
        own.notes = list(recorder.notes)
        start = recorder.beginning
        capture = own.finish(torch.cat([start, torch.tensor([ids], device=start.device, dtype=start.dtype)], dim=1))
        (made,) = capture.rows
        if len(made.token_ids) != len(ids):
            raise BadRow(f"the answer goes on after its end: token {len(made.token_ids)} of {len(ids)} ends a sequence")
        if len(candidates) == 1:
            return capture
        values = recorder.replay(made).original_log_probs.double().numpy()
        given = _given(row, len(ids))
        apart = np.abs(values - given) if given is not None else np.asarray([np.nan])
        apart = apart[np.isfinite(apart)]
        found.append((-float(apart.mean()) if apart.size else float(values.sum()), capture))
    return max(found, key=lambda item: item[0])[1]


def _inputs(processor: Any, row: AnswerRow, images: Sequence[Image.Image], model: Any) -> Any:
    """The prompt's inputs, by the chat template for a question, as it stands for a prompt."""
    prompt, rule = row.prompt, prompt_rule(processor, model)
    if rule is not None and rule.begins:  # what it is given beside the image, as its task or how the answer begins
        return chat_inputs(processor, images, row.question or "", rule=prompt_rule(processor, model, prompt=prompt))
    if row.unasked:
        raise BadRow(row.unasked)
    if prompt is None or not _is_rendered(processor, prompt):
        if row.messages is not None:
            return _chat(processor, row, images, rule)
        return chat_inputs(processor, images, row.question or prompt or "", rule=rule)
    begin = getattr(tokenizer_of(processor), "bos_token", None)
    settings = {"add_special_tokens": False} if begin and prompt.startswith(begin) else {}
    refusal: Exception | None = None
    for given in (list(images), [list(images)]):  # some families take one list per prompt only
        try:
            return processor(images=given, text=prompt, return_tensors="pt", **settings)
        except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            refusal = refusal or error
    raise BadRow(f"{type(processor).__name__} does not take this prompt: {refusal}") from refusal


def _chat(processor: Any, row: AnswerRow, images: Sequence[Image.Image], rule: PromptRule | None) -> Any:
    """The inputs of messages, by the chat template. Raises ``BadRow`` where it does not take them."""
    waiting = iter(images)
    turns: list[dict[str, Any]] = [
        {"role": turn["role"], "content": [{**part, "image": next(waiting)} if part["type"] == "image" else part
                                           for part in turn["content"]]}
        for turn in row.messages or ()
    ]  # fmt: skip
    if not getattr(processor, "chat_template", None):
        if len(turns) == 1:
            return chat_inputs(processor, images, row.question or "", rule=rule)
        raise BadRow(
            f"{type(processor).__name__} has no chat template, and the row has {len(turns)} messages; give the prompt"
        )
    goes_on = turns[-1]["role"] == "assistant"
    form: dict[str, Any] = {"continue_final_message": True} if goes_on else {"add_generation_prompt": True}
    # A name that the template does not know has no effect in an engine, and would be the processor's here.
    known = re.findall(r"\w+", str(processor.chat_template))
    form |= {name: value for name, value in row.template.items() if name == "tools" or name in known}
    form |= {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    as_text = [
        turn if any(part["type"] == "image" for part in turn["content"])
        else {**turn, "content": "".join(part["text"] for part in turn["content"])}
        for turn in turns
    ]  # fmt: skip
    refusal: Exception | None = None
    for given in (turns, as_text):  # some templates take a system message, or every one without images, as text only
        try:
            return processor.apply_chat_template(given, **form)
        except Exception as error:  # a template raises what it likes
            refusal = refusal or error
    raise BadRow(f"the chat template of {type(processor).__name__} does not take the messages: {refusal}") from refusal


def _is_rendered(processor: Any, prompt: str) -> bool:
    """Whether a prompt has its images' places in it. Raises ``BadRow`` for those of another family."""
    named = (getattr(processor, name, None) for name in ("image_token", "boi_token"))
    own = {slot for slot in named if isinstance(slot, str) and slot}
    if any(slot in prompt for slot in own):
        return True
    tokenizer = tokenizer_of(processor)
    foreign = [slot for slot in _PLACEHOLDERS if slot in prompt]
    foreign += [text for text in getattr(tokenizer, "all_special_tokens", ()) if len(text) > 2 and text in prompt]
    if foreign:
        raise BadRow(
            f"the prompt holds {foreign[0]!r}, but no image placeholder of {type(processor).__name__} "
            f"({', '.join(sorted(own)) or 'it has none'}); give the question alone, or the prompt as this processor "
            "takes it"
        )
    return False


def _candidates(
    target: Target, recorder: ForcedRecorder, row: AnswerRow, limit: int
) -> tuple[list[list[int]], list[str]]:
    """Token ids of the answer, the tokenisations that can be meant, and sentences on what was decided."""
    tokenizer = tokenizer_of(target.processor)
    if row.token_ids is not None:
        _check_length(len(row.token_ids), limit, "tokens of the answer")
        return [checked_ids(tokenizer, row.token_ids, row.answer, vocabulary_size(target.model))], []
    assert row.answer is not None
    if tokenizer is not None and len(row.answer) > limit:  # a text of megabytes need not be tokenised to be too long
        longest = max(map(len, tokenizer.get_vocab()))
        _check_length(-(-len(row.answer) // longest), limit, "tokens of the answer at least")
    found = answer_tokens(tokenizer, recorder.beginning[0].tolist(), row.answer)
    end = getattr(tokenizer, "eos_token_id", None)
    ended = [[*ids, end] for ids in found] if end in recorder.stops.eos else []
    if row.scored is not None:
        tokens = [token for token, _ in row.scored]
        fitting = [ids for ids in found if tokens[-len(ids) :] == ids]
        if not fitting:
            raise BadRow("the prompt's tokens do not end in the answer: it is tokenised otherwise; give token_ids")
        return [max(fitting, key=len)], []
    if row.log_probs is None:
        if row.ended and ended:
            return ended, ["the engine ended the answer by a token of its own: the end of the answer"]
        return found, []
    given = len(row.log_probs)
    fitting = [ids for ids in (*found, *ended) if len(ids) == given]
    if any(ids in found for ids in fitting):
        return fitting, []
    if fitting:
        return fitting, ["the log-probabilities count one token more than the text: the end of the answer"]
    lengths = " or ".join(str(length) for length in sorted({len(ids) for ids in found}))
    raise BadRow(f"{given} log-probabilities for an answer of {lengths} tokens; give token_ids")
