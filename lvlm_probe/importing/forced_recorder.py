"""A recorder for answers that were said elsewhere: the model is shown the answer instead of being asked for one.

It is the recorder of ``generate()`` calls, given the sequence that such a call would have returned. One teacher-forced
pass over prompt and answer takes the place of the decoding steps: log P(a_t) is read at the answer's positions, and so
is attention (paper, Eq. 1 and 5).
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lvlm_probe.attention import RowTap
from lvlm_probe.importing.retokenize import answer_tokens, checked_ids
from lvlm_probe.importing.rows import AnswerRow, BadRow
from lvlm_probe.models.prompts import chat_inputs, placed, prompt_rule
from lvlm_probe.models.tokenizers import tokenizer_of
from lvlm_probe.recording.prompt_images import NotRecorded
from lvlm_probe.recording.recorder import GenerationRecorder, RecordOptions, Target
from lvlm_probe.recording.row_inputs import columns_of, image_places
from lvlm_probe.replaying import Replay
from lvlm_probe.trace.reader import Trace
from lvlm_probe.trace.records import Capture, RowCapture

if TYPE_CHECKING:
    from PIL import Image

    from lvlm_probe.recording.probe import Probe

__all__ = ["ForcedRecorder", "forced", "said_by"]

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
        replay = self.replay(row)
        faults: list[str] = []
        with replay.replica.use() as model:
            tap = self._tap_for(model, row, faults)
            with contextlib.nullcontext() if tap is None else tap:
                if tap is not None:
                    self._armed(tap, replay, row)
                row.log_probs = replay.original_log_probs.numpy()
                rows = None if tap is None else tap.collect()
                if rows is not None:
                    self.add_attention(row, rows, 0)
        row.notes += [f"attention rows are not recorded: {fault}" for fault in faults]

    def _tap_for(self, model: torch.nn.Module, row: RowCapture, faults: list[str]) -> RowTap | None:
        """A tap on the model that the pass runs on; ``None``, and why, where there is nothing to read."""
        found = image_places({"input_ids": torch.as_tensor(row.input_ids)[None]}, self.anatomy.image_token_id)
        cross = found is None or self.anatomy.encoder_decoder
        tap = RowTap(model, cross=cross, on_error=lambda error: faults.append(str(error)))
        if not tap.layers:
            faults.append("; ".join(sorted(set(map(str, tap.unsupported.values())))) or "there is no attention layer")
            return None
        if found is not None and not found.any():
            faults.append("the prompt holds no image tokens")
            return None
        return tap

    def _armed(self, tap: RowTap, replay: Replay, row: RowCapture) -> None:
        """The tap reads the queries that predict the answer's tokens."""
        found = image_places({"input_ids": torch.as_tensor(row.input_ids)[None]}, self.anatomy.image_token_id)
        columns, valid = (None, None) if found is None else columns_of(found)
        tap.arm(
            columns,
            valid=valid,
            queries=torch.arange(replay.prompt_length - 1, replay.length),
            heads=self.options.heads,
            cross_keys=len(row.input_ids) if self.anatomy.encoder_decoder else None,
        )


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
        _check_length(len(images), limit, "pictures, of a token each at least")
        inputs = placed(_inputs(probe.processor, row, images, target.model), target.model)
        # These two are looked at alone: what is searched or sampled elsewhere has been found already.
        recorder.begin((), {**inputs, "num_beams": 1, "num_return_sequences": 1})
        start = recorder.beginning.shape[1]
        _check_length(start, limit, "tokens of the prompt")
        candidates, notes = _candidates(target, recorder, row, limit)
        _check_length(start + min(map(len, candidates)), limit, "tokens of prompt and answer")
        candidates = [ids for ids in candidates if start + len(ids) <= limit]
        with torch.no_grad():
            capture = _likeliest(recorder, candidates)
            recorder.complete(capture)
    except NotRecorded as reason:
        raise BadRow(str(reason)) from reason
    finally:
        recorder.abort()
    (made,) = capture.rows
    made.notes += notes
    if faults:
        made.status, made.error = "error", "; ".join(faults)
    return capture


def _positions(model: Any) -> int:
    """How many tokens the decoder was made for; no bound where its configuration does not say."""
    config = getattr(model, "config", None)
    with contextlib.suppress(AttributeError, TypeError, ValueError):  # another package's, or with several decoders
        config = config.get_text_config(decoder=True)  # type: ignore[union-attr]
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else sys.maxsize


def _check_length(count: int, limit: int, what: str) -> None:
    if count > limit:
        raise BadRow(f"{count} {what}, and the model was made for {limit} positions")


def said_by(trace: Trace) -> Mapping[str, Any] | None:
    """What a trace says of where its answer was imported from; ``None`` for one that was generated when recorded."""
    found = trace.meta.get("imported")
    return found if isinstance(found, Mapping) else None


def _likeliest(recorder: ForcedRecorder, candidates: Sequence[Sequence[int]]) -> Capture:
    """The capture of the tokenisation with the highest log P; one pass each, and none where there is one only."""
    found: list[tuple[float, Capture]] = []
    for ids in candidates:
        own = copy.copy(recorder)  # ``finish`` may be called once
        own.notes = list(recorder.notes)
        start = recorder.beginning
        capture = own.finish(torch.cat([start, torch.tensor([ids], device=start.device, dtype=start.dtype)], dim=1))
        (row,) = capture.rows
        if len(row.token_ids) != len(ids):
            raise BadRow(f"the answer goes on after its end: token {len(row.token_ids)} of {len(ids)} ends a sequence")
        if len(candidates) == 1:
            return capture
        found.append((float(recorder.replay(row).original_log_probs.sum()), capture))
    return max(found, key=lambda item: item[0])[1]


def _inputs(processor: Any, row: AnswerRow, images: Sequence[Image.Image], model: Any) -> Any:
    """The prompt's inputs, by the chat template for a question, as it stands for a prompt."""
    prompt = row.prompt
    if prompt is None or not _is_rendered(processor, prompt):
        return chat_inputs(processor, images, row.question or prompt or "", rule=prompt_rule(processor, model))
    begin = getattr(tokenizer_of(processor), "bos_token", None)
    settings = {"add_special_tokens": False} if begin and prompt.startswith(begin) else {}
    refusal: Exception | None = None
    for given in (list(images), [list(images)]):  # some families take one list per prompt only
        try:
            return processor(images=given, text=prompt, return_tensors="pt", **settings)
        except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            refusal = refusal or error
    raise BadRow(f"{type(processor).__name__} does not take this prompt: {refusal}") from refusal


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
        embeddings: Any = target.model.get_input_embeddings()  # type: ignore[operator]
        width = embeddings.weight.shape[0]
        return [checked_ids(tokenizer, row.token_ids, row.answer, width)], []
    assert row.answer is not None
    if tokenizer is not None and len(row.answer) > limit:  # a text of megabytes need not be tokenised to be too long
        longest = max(map(len, tokenizer.get_vocab()))
        _check_length(-(-len(row.answer) // longest), limit, "tokens of the answer at least")
    found = answer_tokens(tokenizer, recorder.beginning[0].tolist(), row.answer)
    if row.log_probs is None:
        return found, []
    given = len(row.log_probs)
    fitting = [ids for ids in found if len(ids) == given]
    if fitting:
        return fitting, []
    end = getattr(tokenizer, "eos_token_id", None)
    if end in recorder.stops.eos and (ended := [[*ids, end] for ids in found if len(ids) == given - 1]):
        return ended, ["the log-probabilities count one token more than the text: the end of the answer"]
    lengths = " or ".join(str(length) for length in sorted({len(ids) for ids in found}))
    raise BadRow(f"{given} log-probabilities for an answer of {lengths} tokens; give token_ids")
