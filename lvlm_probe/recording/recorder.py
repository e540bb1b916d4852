"""One ``generate()`` call seen from outside: what it was given, what it said, how sure it was.

``GenerationRecorder.begin`` looks at the arguments and hangs up two things for the length of the call: a forward hook
that reads log P(a_t) off the logits the model computes anyway, and the attention row tap. They act in this one call
(``hooks.Call``), whoever else runs the model meanwhile. ``finish`` turns the returned
sequences into one capture per batch row. Nothing here may raise into the user's generation: the session fences every
call.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image

from lvlm_probe.attention import Rows, RowTap
from lvlm_probe.boxes.image_tokens import find_token_boxes
from lvlm_probe.boxes.painting import image_spans
from lvlm_probe.errors import OutOfMemory, ProbeError
from lvlm_probe.hooks import HookSet
from lvlm_probe.images.baselines import check_baseline
from lvlm_probe.images.processor import whole_numbers
from lvlm_probe.models.anatomy import Anatomy
from lvlm_probe.models.drivers import Driver
from lvlm_probe.models.exhaustion import does_not_fit, ran_out
from lvlm_probe.models.inputs import list_inputs
from lvlm_probe.models.prompts import question_of
from lvlm_probe.models.tokenizers import (
    Stops,
    decoder_prompt,
    display_pieces,
    folded,
    named_inputs,
    own_prompt,
    positional,
    settings_of,
    special_flags,
    stops_of,
    tokenizer_of,
    top_pieces,
)
from lvlm_probe.models.wrappers import adapters_of_this_call, compiled_parts
from lvlm_probe.recording.attention_points import CROSS, attention_points
from lvlm_probe.recording.conditions import (
    cached_images,
    compiles_itself,
    forced_because,
    hides_image_tokens,
    inferred_mask,
    offloads_its_cache,
    other_cache,
    other_conditions,
    padded_behind,
    without_image,
)
from lvlm_probe.recording.log_probs import StepLogProbs, StepValues, answer_in, generators
from lvlm_probe.recording.module_outputs import HIDDEN, PointTap
from lvlm_probe.recording.processor_watch import ProcessorWatch
from lvlm_probe.recording.prompt_clips import labels_of_frames
from lvlm_probe.recording.prompt_images import ImageFinder, NotRecorded, PromptImages, RowImages, encoded
from lvlm_probe.recording.row_inputs import columns_of, image_token_mask, row_inputs
from lvlm_probe.recording.token_boxes import BoxCache, box_key, place
from lvlm_probe.replaying import Replay
from lvlm_probe.replaying.answer_source import LiveTrace
from lvlm_probe.replaying.hidden_states import point_records
from lvlm_probe.replaying.verification import FLOOR
from lvlm_probe.trace.clips import Clip
from lvlm_probe.trace.image_files import is_constant
from lvlm_probe.trace.records import Capture, RowCapture
from lvlm_probe.words import ALPHA

_BOXES_KEPT = 64

Heads = Literal["mean", "all"]


@dataclass(frozen=True)
class RecordOptions:
    """Arguments of ``Probe.record``; see there."""

    images: Any = None
    llr: bool = True
    attention: bool = True
    boxes: bool = True
    heads: Heads = "mean"
    baseline: str | Image.Image = "blur"
    points: tuple[str, ...] = ()
    question: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse now what would cost the answer its record when it is there. Raises ``ProbeError``."""
        if self.heads not in get_args(Heads):
            raise ProbeError(f"heads is 'mean' or 'all'; got {self.heads!r}")
        if not isinstance(self.meta, Mapping):
            raise ProbeError(f"meta is a mapping, names to JSON values; got {self.meta!r:.80}")
        check_baseline(self.baseline)


@dataclass
class Target:
    """An attached model, its processor, and what is known of both.

    Attributes:
        model: the model that generates.
        processor: its processor.
        anatomy: its parts.
        watch: the processor's calls since ``attach``.
        boxes: token boxes that were found already.
        clips: the video processor's calls since ``attach``.
    """

    model: torch.nn.Module
    processor: object | None
    anatomy: Anatomy
    watch: ProcessorWatch
    boxes: BoxCache
    clips: ProcessorWatch


class GenerationRecorder:
    """Everything around one ``generate()`` call. Used once: ``begin`` → the call → ``finish`` → ``complete``, or
    ``abort``.

    A recorder of answers that are come by in another way overrides ``arm_attention`` and ``ending``, and reads
    ``beginning`` and ``stops`` after ``begin``, ``replay`` after ``finish``.

    Args:
        target: what is recorded.
        options: what is asked for.
        on_error: called with the name of what failed, and the error; the generation goes on.
    """

    def __init__(self, target: Target, options: RecordOptions, on_error: Callable[[str, BaseException], None]) -> None:
        self.model, self.processor, self.anatomy = target.model, target.processor, target.anatomy
        self.options = options
        self.notes: list[str] = []
        self.stops = Stops(frozenset(), None)
        self.cut_by: str | None = None  # who ended the generation from outside, as a part of a sentence
        self._watch, self._clips = target.watch, target.clips
        self._hooks = HookSet(on_error, scope=self)
        self._log_probs: dict[torch.nn.Module, StepLogProbs] = {}  # by the module whose logits they read
        self._decoder_ids: torch.Tensor | None = None
        self._handed_over: torch.Tensor | None = None
        self._inner_stops: Stops | None = None
        self._tap: RowTap | None = None
        self._attention: Rows | None = None
        self._points: PointTap | None = None
        self._on_error = on_error
        self._boxes = target.boxes
        self._inputs: dict[str, Any] = {}
        self._images: dict[str, list[Image.Image]] = {}
        self._doubt = ""  # why the call may have computed otherwise than a replay, as a part of a sentence
        self._unlike: dict[str, str] = {}  # traces of a call that may have computed otherwise than a replay, and why
        self._other_conditions: list[str] = []
        self._compiling = self._offloading = False
        self.cautions: list[tuple[str, str]] = []
        self._started = time.perf_counter()

    # ------------------------------------------------------------------ around the call

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Look at the arguments of ``generate`` and hang up the hooks.

        Raises:
            NotRecorded: there is nothing to record, or it cannot be recorded without wrong numbers.
        """
        if isinstance(self.model, Driver):
            kwargs = self.model.arguments(args, kwargs)
        else:
            kwargs = {**positional(self.model, args), **kwargs}
        kwargs = named_inputs(self.model, kwargs, reads_prompt=self.anatomy.reads_prompt)
        if kwargs.get("inputs_embeds") is not None:
            raise NotRecorded(
                "generate() was given inputs_embeds, and a replay makes embeddings of the prompt's tokens itself; give "
                "input_ids alone, or record another call; nothing is recorded"
            )
        setting = settings_of(self.model, kwargs)
        ids = self._prompt(kwargs, setting)
        # As they are now: a streamer gives control back to the user while the answer is generated.
        self._inputs = {n: value.detach().clone() for n, value in kwargs.items() if isinstance(value, torch.Tensor)}
        for name in list_inputs(self.model) & kwargs.keys():
            if (numbers := whole_numbers(kwargs[name])) is not None:
                self._inputs[name] = numbers
        self._inputs["input_ids"] = ids = ids.detach().clone()
        if not self.anatomy.reads_prompt:
            for name in ("decoder_input_ids", "decoder_attention_mask"):
                self._inputs.pop(name, None)
        pixels = [name for name in self._inputs if self.anatomy.is_pixel_name(name)]
        if reason := adapters_of_this_call(self.model):
            raise NotRecorded(reason)
        if any("video" in name for name in pixels) and not self.anatomy.takes_clips:
            raise NotRecorded(
                f"the prompt holds a video, and videos of {type(self.model).__name__} are not recorded yet; nothing is "
                "recorded"
            )
        if not any(self._inputs[name].is_floating_point() for name in pixels):
            whole = next((name for name in pixels if self._inputs[name].dtype == torch.uint8), None)
            raise NotRecorded(without_image(ids, self.anatomy.image_token_id, kwargs, whole))
        if not self.anatomy.encodes_prompt and (reason := cached_images(ids, self.anatomy.image_token_id, kwargs)):
            raise NotRecorded(reason)
        if self.anatomy.encodes_prompt:
            self._decoder_ids = decoder_prompt(self.model, kwargs.get("decoder_input_ids"), setting, ids)
            self._inputs["decoder_input_ids"] = self._decoder_ids
        self.stops = stops_of(self.model, kwargs, self.beginning.shape[1])
        if self.anatomy.reads_prompt and (mask := inferred_mask(self.model, self._inputs, self.stops)) is not None:
            self._inputs["attention_mask"] = mask
        if hides_image_tokens(self._inputs, self.anatomy.placeholders):
            raise NotRecorded(
                "the attention mask hides image tokens, and a replay passes all of them or none; hide a part of the "
                "image by masked() or causal.knockout(); nothing is recorded"
            )
        texts = {n: v for n, v in self._inputs.items() if not self.anatomy.is_pixel_name(n)}
        self._other_conditions = other_conditions(self.model, texts, kwargs)
        self._compiling = compiles_itself(self.model, setting, kwargs)
        self._offloading = offloads_its_cache(setting, kwargs)
        self._doubt = other_cache(setting, kwargs)
        beams = int(setting("num_beams", 1))
        if beams > 1:
            self.notes.append(
                f"beam search ({beams} beams) reorders rows while it runs, so log-probabilities come from one "
                f"teacher-forced pass over the returned answer, and attention rows are not recorded"
            )
            return
        for inner in generators(self.model)[1:]:
            if hasattr(inner, "generate"):
                self._hooks.shadow(inner, "generate", self._hand_over)
        for module in generators(self.model):
            self._log_probs[module] = reader = StepLogProbs()
            graph = self._compiling or module._compiled_call_impl is not None
            reader.hang(module, self._hooks, compiled=graph, on_error=self._on_error)
        if self.options.points:
            self._points = PointTap(self.model, self.anatomy, self.options.points, self._hooks)
        if self.options.attention:
            try:
                self.arm_attention(ids, int(setting("num_return_sequences", 1)))
            except Exception as error:  # the answer can be recorded all the same
                self._on_error("attention", error)
                if self._tap is not None:
                    self._tap.remove()
                    self._tap = None

    def _prompt(self, kwargs: Mapping[str, Any], setting: Callable[..., Any]) -> torch.Tensor:
        """Token ids that the answer is an answer to, ``(batch, position)``: where there are none, what ``generate()``
        begins with by itself.

        Raises:
            NotRecorded: what it begins with is not known.
        """
        ids = kwargs.get("input_ids")
        pixels = (v for n, v in kwargs.items() if isinstance(v, torch.Tensor) and self.anatomy.is_pixel_name(n))
        copies = next((v.new_zeros((len(v), 0), dtype=torch.long) for v in pixels if v.ndim >= 3), None)
        if copies is not None and not self.anatomy.reads_prompt:
            given = kwargs.get("decoder_input_ids")
            return decoder_prompt(self.model, ids if given is None else given, setting, copies)
        if ids is None and copies is not None and "inputs_embeds" not in kwargs:
            ids = own_prompt(self.model, self.anatomy.image_token_id, setting, copies)
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
            raise NotRecorded("generate() was called without input_ids of shape (batch, prompt); nothing is recorded")
        return ids

    def _hand_over(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Note what the model's own ``generate`` has the language model inside continue, as it may edit the prompt, and
        read the logits of that one alone: what passes through the model around it is no step of the answer."""
        try:
            self._log_probs = {m: reader for m, reader in self._log_probs.items() if m is original.__self__}  # type: ignore[attr-defined]
            ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
            if isinstance(ids, torch.Tensor) and ids.ndim == 2:
                self._handed_over = ids.detach().clone()
                self._inner_stops = stops_of(original.__self__, kwargs, ids.shape[1])  # type: ignore[attr-defined]
        except Exception as error:
            self._on_error("prompt", error)
        return original(*args, **kwargs)

    @property
    def beginning(self) -> torch.Tensor:
        """Token ids that the answer continues, ``(batch, position)``: the prompt, or the decoder's own beginning."""
        return self._inputs["input_ids"] if self._decoder_ids is None else self._decoder_ids

    def arm_attention(self, ids: torch.Tensor, copies: int) -> None:
        """Read attention rows in the call that follows.

        Args:
            ids: ``(batch, position)`` of the prompts.
            copies: answers to each.
        """
        found = image_token_mask(self._inputs, self.anatomy.placeholders)
        if self._compiling or compiled_parts(self.model, self.anatomy.decoder):
            self.notes.append(
                "attention rows are not recorded: the model is compiled"
                f"{' by generate() for its static cache' if self._compiling else ''}, and a compiled graph does not "
                "show its attention; record with the model before torch.compile, or with disable_compile=True"
            )
            return
        # Without image tokens in what the decoder reads, the image reaches it by cross-attention.
        cross = found is None or self.anatomy.encoder_decoder
        if found is None and self.anatomy.encodes_prompt:
            self.notes.append(
                "attention rows are not recorded: the decoder reads a text that has read the image, and no image tokens"
            )
            return
        tap = RowTap(self.model, cross=cross, on_error=lambda error: self._on_error("attention", error))
        if not tap.layers:
            reasons = "; ".join(sorted(set(map(str, tap.unsupported.values())))) or "no attention layer was found"
            reasons = f"there are no image tokens in the prompt, and {reasons}" if found is None else reasons
            self.notes.append(f"attention rows are not recorded: {reasons}")
            return
        if tap.unsupported:
            self.notes.append(f"{len(tap.unsupported)} layer(s) without attention rows: {tap.unsupported}")
        if found is not None and not found.any():
            self.notes.append("attention rows are not recorded: the prompt holds no image tokens")
            return
        columns, valid = (
            (None, None) if found is None else (part.repeat_interleave(copies, 0) for part in columns_of(found))
        )
        keys = ids.shape[1] if self.anatomy.encodes_prompt else None
        self._tap = tap
        tap.install()
        tap.arm(
            columns, valid=valid, heads=self.options.heads, prompt_length=self.beginning.shape[1], cross_keys=keys,
            holds_keys=not self._offloading,
        )  # fmt: skip

    def abort(self) -> None:
        """The call is over, or failed, or was interrupted: take everything down, keep nothing.

        The hooks and this hold each other until the collector comes by, which does not know what memory a device has.
        """
        self._hooks.remove()
        if self._tap is not None:
            self._tap.remove()
        self._inputs, self._log_probs, self._points, self._tap, self._attention = {}, {}, None, None, None

    # ------------------------------------------------------------------ while it runs

    def chosen(self, step: int, ids: torch.Tensor) -> float | None:
        """log P of token number ``step`` of the answer, nats, now that it is chosen, the last of ``ids`` ``(1,
        position)``; ``None`` where it cannot be read before the end."""
        values = (reader.chosen(step, ids) for reader in self._log_probs.values())
        return next((value for value in values if value is not None), None)

    def attention_so_far(self, start: int, stop: int) -> np.ndarray | None:
        """Attention of tokens ``[start, stop)`` of an answer that goes on, their and all heads' mean, ``(layer,
        image_token)`` float32; ``None`` where no rows are read, or the answer is complete."""
        tap = self._tap
        rows = None if tap is None else tap.peek(start, stop)
        return None if rows is None else rows[0].mean(dim=(0, 2)).numpy()

    # ------------------------------------------------------------------ after the call

    def finish(self, output: Any) -> Capture:
        """Turn what ``generate`` returned into a capture (further passes are ``complete``'s). Where an interrupt ended
        it, it may be called again.

        Raises:
            NotRecorded: the returned sequences do not continue the prompt.
        """
        generated_seconds = time.perf_counter() - self._started
        self._hooks.remove()
        attention = self._collected()
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        ids = self._inputs["input_ids"]
        if isinstance(self.model, Driver):
            sequences = self.model.sequences(ids, sequences)
        # An encoder-decoder model returns the decoder's sequence, which has a beginning of its own.
        found = self._answers(sequences)
        if found is None:
            raise NotRecorded(
                f"{type(self.model).__name__}.generate() did not return prompt + answer for this prompt: it drops or "
                "edits tokens of the prompt. Nothing is recorded"
            )
        self.stops = self._inner_stops or self.stops
        generated, values = found
        if attention is not None and (values is None or attention.values.shape[1] != generated.shape[1]):
            # Assisted decoding, guidance: rows cannot be matched to tokens where passes and tokens are not one to one.
            attention = None
            self.notes.append("attention rows are not recorded: the model did not run one pass per answer token")
        rows = self._rows(generated, values, attention)
        if not rows:
            raise NotRecorded("generate() returned no new token; nothing is recorded")
        created = datetime.now(UTC).isoformat()
        return Capture(rows=rows, model={}, created=created, seconds={"generate": generated_seconds})

    def _answers(self, sequences: torch.Tensor) -> tuple[torch.Tensor, StepValues | None] | None:
        """The answers in what ``generate()`` returned, as ``answer_in``; of a prompt that it edited, what it made of it
        becomes the prompt."""
        inner, readers = self._handed_over, list(self._log_probs.values())
        if inner is None or self._decoder_ids is not None or torch.equal(inner, self.beginning):
            return answer_in(sequences, self.beginning, readers, alone=self._decoder_ids is None)
        found = answer_in(sequences, inner, readers, alone=False)
        if found is None:
            return answer_in(sequences, self.beginning, readers, alone=True)
        if len(inner) != len(self._inputs["input_ids"]):
            return None
        width = inner.shape[1]
        self._inputs = {
            name: value[:, :width] if value.shape == self._inputs["input_ids"].shape else value
            for name, value in self._inputs.items()
        }
        self._inputs["input_ids"] = inner
        return found

    def _collected(self) -> Rows | None:
        """Attention rows of the call; the same where it is asked again."""
        tap = self._tap
        if tap is None:
            return self._attention
        try:
            if self._attention is None:
                self._attention = tap.collect()
        except Exception as error:
            self._on_error("attention", error)
        except BaseException:
            self.notes.append("attention rows are not recorded: an interrupt came while they were collected")
            raise
        finally:
            tap.remove()
        self._tap = None
        return self._attention

    def _rows(self, generated: torch.Tensor, values: StepValues | None, attention: Rows | None) -> list[RowCapture]:
        """One capture for each batch row that has an image and an answer.

        Args:
            generated: ``(batch, step)`` token ids.
            values: their log-probabilities as they were generated, where these could be read.
            attention: their attention rows.
        """
        prompts = len(self._inputs["input_ids"])
        copies = len(generated) // prompts
        pixels = [value for name, value in self._inputs.items() if self.anatomy.is_pixel_name(name)]
        if copies > 1 and any(len(value) != prompts for value in pixels):  # Fuyu's patches get into another order
            self._doubt = (
                self._doubt or "pixel inputs of all prompts in a row were repeated for several answers to each"
            )
        finder = ImageFinder(
            self.processor,
            self._watch,
            self._inputs,
            given=self.options.images,
            image_token_id=self.anatomy.image_token_id,
            is_pixel_name=self.anatomy.is_pixel_name,
            clips=self._clips if self.anatomy.takes_clips else None,
        )
        prompt_images = finder.find(prompts, on_error=self._on_error)
        self.notes += finder.notes
        self.cautions += finder.cautions
        tokenizer = tokenizer_of(self.processor)
        rows = []
        for row in range(len(generated)):
            if prompt_images.rows[row // copies].images == []:
                self.notes.append(f"row {row} of the batch has no image and is not recorded")
                continue
            length = self.stops.answer_length(generated[row].tolist())
            if length == 0:
                self.notes.append(f"row {row} of the batch generated nothing and is not recorded")
                continue
            capture = self._row(row, row // copies, generated[row, :length].cpu(), prompt_images, tokenizer)
            if values is not None and capture.log_probs_source == "generation":
                own = StepValues(*(each[row, :length] for each in values))
                capture.log_probs = own.log_probs.numpy()
                capture.top_log_probs = own.top_log_probs.numpy()
                capture.top_tokens = top_pieces(tokenizer, own.top_ids.tolist())
            else:
                capture.log_probs_source = "teacher_forced"
            if attention is not None:
                self.add_attention(capture, attention, row)
            if self._points is not None and len(generated) == 1:
                capture.points = {**capture.points, **self._points.records()}
            rows.append(capture)
        return rows

    def _row(
        self, row: int, prompt_row: int, token_ids: torch.Tensor, prompt_images: PromptImages, tokenizer: Any
    ) -> RowCapture:
        ids = self._inputs["input_ids"][prompt_row]
        mask = self._inputs.get("attention_mask")
        real = mask[prompt_row].bool() if mask is not None and mask.shape == self._inputs["input_ids"].shape else None
        prompt_ids = (ids[real] if real is not None else ids).cpu()
        mine = encoded(prompt_images.rows[prompt_row], self._on_error)
        if any(is_constant(image) for image in mine.images or []):
            told = "every pixel of an image that the model was shown has the same colour: check how it was loaded"
            self.cautions.append(("constant", told))
        kwargs, padded = row_inputs(
            self._inputs, prompt_row, real, mine.inputs, self.anatomy.is_pixel_name, mine.absent
        )
        places = image_token_mask(self._inputs, self.anatomy.placeholders)
        taken = ids < 0 if places is None else places[prompt_row]
        positions = (taken if real is None else taken[real]).nonzero()[:, 0].cpu()
        notes = list(dict.fromkeys([*self.notes, *prompt_images.notes, *mine.notes]))
        if padded:
            notes.append(
                "in its batch this row ran beside images that only fill it up, which this model sees; its "
                "log-probabilities come from one teacher-forced pass without them"
            )
        pieces = display_pieces(tokenizer, token_ids.tolist())
        ended = self.ending(token_ids, "" if tokenizer is None else "".join(pieces))
        unlike = [*self._other_conditions, *padded_behind(real)]
        cut = ended is not None and self.cut_by is not None
        notes += [*([ended] if ended else []), *forced_because(unlike)]
        read = prompt_ids.tolist()
        prompt = tokenizer.decode(read) if tokenizer is not None else ""
        images = mine.images or []
        trace_id = uuid.uuid4().hex[:16]
        self._images[trace_id] = images
        if doubt := self._doubt if real is None or bool(real.all()) else "the prompt was padded":
            self._unlike[trace_id] = doubt
        spans = self._spans(prompt_ids, positions, mine)
        return RowCapture(
            trace_id=trace_id,
            batch_row=row,
            status="stopped" if cut else "complete",
            input_ids=prompt_ids.numpy().astype(np.int64),
            prompt=folded(prompt),
            question=self.options.question or self._question(prompt_ids, positions.numpy(), spans, mine.clips),
            model_kwargs=kwargs,
            images=mine.records,
            processor_call=mine.call,
            image_token_id=self.anatomy.image_token_id,
            image_positions=positions.numpy().astype(np.int64),
            image_index=spans,
            clips=mine.clips,
            token_ids=token_ids.numpy().astype(np.int64),
            tokens=pieces,
            special=np.asarray(special_flags(tokenizer, token_ids.tolist(), self.stops.eos), dtype=bool),
            log_probs=np.full(len(token_ids), np.nan, np.float32),
            log_probs_source="teacher_forced" if padded or unlike else "generation",
            notes=notes,
            meta=dict(self.options.meta),
        )

    def _spans(self, prompt_ids: torch.Tensor, positions: torch.Tensor, mine: RowImages) -> np.ndarray:
        """The image each image token belongs to, ``(N,)``; of frames by equal shares, until boxes tell."""
        count = max(1, len(mine.images or []))
        if not mine.clips:
            return image_spans(positions.numpy(), count, mine.tokens_per_image)
        still = mine.clips[0].first
        video = self.anatomy.video_token_id
        of_clip = (prompt_ids[positions] == video).numpy() if still and video is not None else None
        if of_clip is None or not of_clip.any():
            return np.arange(len(positions)) * count // max(1, len(positions))
        found = np.zeros(len(positions), np.int64)
        found[~of_clip] = image_spans(positions.numpy()[~of_clip], still)
        frames, tokens = count - still, int(of_clip.sum())
        found[of_clip] = still + np.arange(tokens) * frames // tokens
        return found

    def _question(
        self, prompt_ids: torch.Tensor, positions: np.ndarray, spans: np.ndarray, clips: Sequence[Clip]
    ) -> str | None:
        ids = prompt_ids.tolist()
        words = np.ones(len(ids), bool)
        words[positions] = False
        tokenizer = tokenizer_of(self.processor)

        def is_number(token: int) -> bool:
            text = tokenizer.decode([token])
            return bool(text.strip(" .0123456789") == "" != text.strip(" ."))

        try:
            for clip in clips:
                frames = positions[np.isin(spans, clip.images)]
                words &= ~labels_of_frames(ids, frames, is_number)
            return question_of(self.processor, np.asarray(ids)[words].tolist())
        except Exception:  # what a tokenizer makes of a prompt costs the question, not the trace
            return None

    def ending(self, token_ids: torch.Tensor, text: str) -> str | None:
        """A note on how the answer ends; ``None`` where there is nothing to say."""
        told = self.stops.told(token_ids.tolist(), text)
        if told is None or self.cut_by is None:
            return told
        return f"the answer was stopped after {len(token_ids)} tokens by {self.cut_by}"

    def add_attention(self, capture: RowCapture, attention: Rows, row: int) -> None:
        """Enter the attention rows of one batch row, or a note on why there are none."""
        length = len(capture.token_ids)
        if attention.values.shape[1] < length:
            capture.notes.append("attention rows are not recorded: the model ran fewer passes than answer tokens")
            return
        if attention.missing:
            capture.notes.append(f"layers without attention rows: {attention.missing}")
        tokens = len(capture.image_positions)
        capture.points = attention_points(
            attention, row, steps=length, image_tokens=tokens, heads=self.options.heads, decoder=self.anatomy.decoder
        )

    # ------------------------------------------------------------------ teacher-forced passes

    def complete(self, capture: Capture) -> None:
        """Add what needs further passes: log-likelihood ratios, boxes of image tokens, hidden states.

        Baseline log-probabilities (paper, Eq. 6) take one pass per row, and one more where its prompt was padded; the
        baseline is blurred harder until the selected tokens keep less than 5 % probability (paper, A.1).
        Log-probabilities themselves are computed where the hook saw none.
        """
        start = time.perf_counter()
        for row in capture.rows:
            try:
                self._complete(row)
            except Exception as error:
                full = _out_of_memory(error)
                if full is None or np.isnan(row.log_probs).any():
                    raise
                # It costs what this pass would have given, not the answer.
                row.notes.append(f"recorded without log-likelihood ratios: {full}")
                self.cautions.append(("memory", row.notes[-1]))
        capture.seconds["teacher_forced"] = time.perf_counter() - start

    def take_log_probs(self, row: RowCapture, replay: Replay) -> None:
        """Enter the log-probabilities of a teacher-forced pass."""
        row.log_probs = replay.original_log_probs.numpy()
        top_ids, top_log_probs = replay.likeliest
        row.top_log_probs = top_log_probs.numpy()
        row.top_tokens = top_pieces(tokenizer_of(self.processor), top_ids.tolist())

    def replay(self, row: RowCapture) -> Replay:
        """A row of ``finish`` on the live model."""
        return Replay(LiveTrace(row, self._images[row.trace_id]), self.model, self.processor, check_pixels=False)

    def _complete(self, row: RowCapture) -> None:
        missing = bool(np.isnan(row.log_probs).any())
        hidden = HIDDEN in self.options.points
        boxes = self.options.boxes and (self.options.attention or hidden) and bool(row.images)
        boxes = boxes and (len(row.image_positions) > 0 or CROSS in row.points)
        key = box_key(row) if boxes else ()
        if (known := self._boxes.get(key)) is not None:
            place(row, known)
            boxes = False
        if not (missing or self.options.llr or boxes or hidden):
            return
        replay = self.replay(row)
        if missing:
            self.take_log_probs(row, replay)
        if boxes:
            if len(self._boxes) >= _BOXES_KEPT:
                self._boxes.clear()
            try:
                known = self._boxes[key] = find_token_boxes(replay, row.image_positions)
            except Exception as error:
                full = _out_of_memory(error)
                if full is None and not isinstance(error, ProbeError):
                    raise
                known = str(full or error)
                if full is None:  # memory that is missing now is there another time
                    self._boxes[key] = known
            place(row, known)
        if hidden:
            try:
                found = point_records(replay, row.input_ids, row.image_positions, row.token_ids)
                row.points = {**row.points, **found}
            except ProbeError as error:
                row.notes.append(f"no hidden states: {error}")
        if self.options.llr:
            if row.trace_id in self._unlike and row.log_probs_source == "generation":
                self._settle(row, replay, self._unlike[row.trace_id])
            replay = replay.over(self.options.baseline)
            llr = torch.as_tensor(row.log_probs) - replay.baseline_log_probs
            selected = ((llr > ALPHA) & ~replay.special).nonzero()[:, 0].tolist()
            replay = replay.strengthened(selected)
            row.baseline_log_probs = replay.baseline_log_probs.numpy()
            row.baseline = dict(replay.baseline)

    def _settle(self, row: RowCapture, replay: Replay, unlike: str) -> None:
        """Take the log-probabilities of a pass as a replay runs it, where the call's own differ by more than rounding.

        Most models mask padding and number positions without it. Some number it all the same (Florence-2), or number
        the answer behind it (Kosmos-2); and a cache of fixed size may show a model other keys (Gemma 4, unified).

        Args:
            unlike: what may have changed them, as a part of a sentence.
        """
        apart = (torch.as_tensor(row.log_probs) - replay.original_log_probs).abs()
        if bool((apart <= replay.rounding.clamp(min=FLOOR)).all()):
            return
        self.take_log_probs(row, replay)
        row.log_probs_source = "teacher_forced"
        why = f"{unlike}, which moves this model's log-probabilities (by {float(apart.max()):.2g} nats)"
        row.notes += forced_because([why])


def _out_of_memory(error: Exception) -> OutOfMemory | None:
    """What to say of an error in a pass behind the answer, if memory ran out there."""
    if isinstance(error, OutOfMemory):
        return error
    way_out = "record with llr=False, boxes=False"
    return does_not_fit("memory ran out behind the answer", error, way_out) if ran_out(error) else None
