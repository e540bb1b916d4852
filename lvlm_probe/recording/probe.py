"""Attach to a live model: record what it generates, mask what it sees, detach without a trace.

``attach`` puts a function in front of ``generate`` on this one instance, and one in front of the image processor's
``preprocess``. ``generate`` is the place to stand because transformers encodes the image *before* the first top-level
forward pass, which therefore never sees it. All other hooks live only as long as one ``generate()`` call.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lvlm_probe.cards import card, text_html
from lvlm_probe.errors import AttachError, ImageError, MaskError, ProbeError, chain_of
from lvlm_probe.escaping import counted
from lvlm_probe.files import path_of
from lvlm_probe.hooks import Call, HookSet, caution, shadow_of, within
from lvlm_probe.images.clips import video_processor_of
from lvlm_probe.images.processor import OWN_CALL
from lvlm_probe.images.processor_step import image_processor_of, watched_method
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.models.anatomy import Anatomy, examine
from lvlm_probe.models.drivers import called_model, probed_model
from lvlm_probe.models.fingerprint import describe_model, undescribed
from lvlm_probe.models.inputs import input_device
from lvlm_probe.models.tokenizers import settings_of, tokenizer_of
from lvlm_probe.models.wrappers import generating_model, is_compiled
from lvlm_probe.process import lock
from lvlm_probe.recording.conditions import without_autocast
from lvlm_probe.recording.handed_images import flatten_images
from lvlm_probe.recording.masked_calls import Masking
from lvlm_probe.recording.module_outputs import modules_of
from lvlm_probe.recording.processor_watch import ProcessorWatch
from lvlm_probe.recording.prompt_images import NotRecorded
from lvlm_probe.recording.recorder import GenerationRecorder, RecordOptions, Target
from lvlm_probe.recording.stream import Feed, Stream, settings_here
from lvlm_probe.replaying.isolation import outside_modes
from lvlm_probe.trace import Trace, open_rows, open_trace, write
from lvlm_probe.trace.records import Capture

if TYPE_CHECKING:
    from PIL import Image

_log = logging.getLogger("lvlm_probe")

_OWN: ContextVar[tuple[Recording, Feed | None] | None] = ContextVar("lvlm_probe_own_recording", default=None)
"""What records the ``generate()`` of this thread alone, whatever others record; and the stream whose ``generate()`` it
is."""

_ATTACHING = lock()

_SAMPLES = "_decode_and_sample_videos"
"""The method of transformers' video processors that opens videos and chooses frames."""


def attach(model: torch.nn.Module, processor: object | None = None) -> Probe:
    """Attach a probe to a loaded Hugging Face vision-language model.

    Args:
        model: any model with image input and ``generate``; it is not changed.
        processor: its processor, or its image processor alone. Without one, masks live in pixel-input space
            (``masked(mask, space="pixels")``), and no words can be shown, only token ids.

    Raises:
        AttachError: a probe is attached already, the model cannot be probed, or a tokenizer stands for its processor;
            the message says why.
    """
    return Probe(model, processor)


class Recording:
    """A recording, from ``Probe.record``: every ``generate()`` inside the ``with`` block becomes a trace file.

    The file is there when ``generate()`` returns. A streamer that is read in another thread ends before that: join the
    thread that generates, then look at the traces.

    Attributes:
        directory: where the files go.
        paths: the files written so far, oldest first.
        faults: what went wrong inside hooks, as sentences; the user's generation was not affected.
        passed_over: why calls are not recorded that there is nothing to record of, as sentences, each once.
        lost_by: the error that cost the last trace that could not be written.
    """

    def __init__(self, attachment: Attachment, directory: Path, options: RecordOptions, probe: Probe) -> None:
        self.directory = directory
        self.paths: list[Path] = []
        self.faults: list[str] = []
        self.passed_over: list[str] = []
        self.lost_by: Exception | None = None
        self._attachment = attachment
        self._probe: Probe | None = probe  # dropping the last reference to it detaches, which is not yet
        self._options = options
        self._warned: set[str] = set()
        self._met = False  # whether a generate() was seen at all

    @property
    def traces(self) -> list[Trace]:
        """The traces written so far, opened; one per batch row."""
        return [trace for path in self.paths for trace in open_rows(path)]

    @contextmanager
    def alone(self, feed: Feed | None = None) -> Iterator[Recording]:
        """Record what this thread generates in the block, in its context, and nothing of others."""
        self._attachment.made.block = None
        before = _OWN.set((self, feed))
        try:
            yield self
        finally:
            _OWN.reset(before)

    def __repr__(self) -> str:
        faults = f", {counted(len(self.faults), 'fault')}" if self.faults else ""
        return f"<Recording to {str(self.directory)!r}: {counted(len(self.paths), 'file')}{faults}>"

    def _repr_html_(self) -> str:
        last = ""
        if self.paths:
            try:
                last = open_trace(self.paths[-1])._repr_html_()
            except ProbeError as error:
                last = text_html(f" The last one cannot be read: {error}")
        count = counted(len(self.paths), "trace file")
        title = f"Recording to {self.directory}: {count}{', the last:' * bool(self.paths)}"
        return card(title, last, facts=self.faults[:20])

    def __enter__(self) -> Recording:
        with self._attachment.lock:
            if self._attachment.recording is not None:
                raise AttachError("a recording is running on this probe already; leave its `with` block first")
            if self._attachment.closed:
                raise AttachError("the probe was detached; attach again to record")
            self._attachment.recording, self._attachment.made.block = self, None
        return self

    def __exit__(self, *exc: object) -> None:
        with self._attachment.lock:
            if self._attachment.recording is self:
                self._attachment.recording = None
        self._probe = None
        if not (exc[0] or self.paths or self.faults or self._met):
            self.warn_once(
                "nothing",
                "nothing was recorded: no generate() of the attached model ran inside the `with` block; call "
                "model.generate(...) inside it, on the model that was given to attach()",
                stacklevel=3,
            )

    def run(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any], feed: Feed | None = None) -> Any:
        """Record one ``generate()`` call. Whatever goes wrong in here, the user gets what ``generate`` returns.

        Calls of several threads are recorded side by side: everything here but ``self`` belongs to this one. ``feed``
        is that of the stream that shows the answer as it is generated.
        """
        owner = self._attachment
        self._met = True
        faults: list[str] = []

        def fault(name: str, error: BaseException, kept: str = "the trace is marked status='error'") -> None:
            faults.append(f"{name}: {type(error).__name__}: {error}")
            told = f"recording went wrong in {name} ({type(error).__name__}: {error}); the generation is not affected, "
            self.warn_once(kept, told + kept)

        recorder = GenerationRecorder(owner, self._options, fault)
        ready = False
        try:
            recorder.begin(args, kwargs)
            ready = True
        except NotRecorded as reason:
            recorder.abort()
            self._pass_over(str(reason))
        except Exception as error:
            recorder.abort()
            _log.debug("recording could not begin", exc_info=True)
            faults.append(f"begin: {type(error).__name__}: {error}")
            self.warn_once("begin", f"this generation is not recorded: {type(error).__name__}: {error}")
        except BaseException:  # Ctrl-C while hooks were being hung up
            recorder.abort()
            raise
        if feed is not None:
            kwargs = feed.begin(recorder if ready else None, kwargs)
        try:
            with Call(recorder):
                output = original(*args, **kwargs)
        except BaseException:
            recorder.abort()
            raise
        if feed is not None:
            feed.generated()
        if not ready:
            self.faults += faults
            return output
        try:
            path = self._keep(recorder, output, faults, fault)
            if feed is not None:
                feed.kept(path)
        except NotRecorded as reason:
            self._pass_over(str(reason))
        except Exception as error:
            _log.debug("recording failed", exc_info=True)
            fault("finish", error, "but there is no trace of it")
            for one in chain_of(error):
                one.__traceback__ = None  # its frames hold tensors
            self.lost_by = error
        finally:
            recorder.abort()
            self.faults += faults
        return output

    def _pass_over(self, reason: str) -> None:
        if reason not in self.passed_over:  # a thousand calls without an image are one sentence
            self.passed_over.append(reason)
        self.warn_once(reason[:40], reason)

    @outside_modes
    def _keep(self, recorder: GenerationRecorder, output: Any, faults: list[str], fault: Any) -> Path:
        interrupted: list[BaseException] = []  # Ctrl-C, or what a handler of SIGTERM raises: it waits for the trace

        def whole(step: Callable[[], Any]) -> Any:
            """What a step gives, which is done again where the first interrupt comes in it."""
            try:
                return step()
            except Exception:
                raise
            except BaseException as stop:
                interrupted.append(stop)
                return step()

        def warn() -> None:
            for told in recorder.cautions:
                self.warn_once(*told, stacklevel=6)

        # Nothing here draws from the global random state, which is all threads' own: passes run in eval mode, noise has
        # generators of ours.
        with torch.no_grad(), without_autocast(self._attachment.model):
            capture = whole(lambda: recorder.finish(output))
            try:
                recorder.complete(capture)
            except Exception as error:
                fault("teacher-forced pass", error)
            except BaseException as stop:
                interrupted.append(stop)  # the answer is complete: keep it, without the scores that were being computed
                self._note(capture, "the baseline pass was interrupted; replay gives the log-likelihood ratios")
            whole(warn)
            try:
                capture.model = whole(self._attachment.describe_model)
            except Exception as error:  # it costs the description, not the answer
                capture.model, told = undescribed(self._attachment.model, error)
                self._note(capture, told)
                self.faults.append(told)
                self.warn_once("describe", told)
        if faults:
            for row in capture.rows:
                row.status, row.error = "error", "; ".join(faults)
        path = whole(lambda: write(capture, self.directory))
        self.paths.append(path)
        if interrupted:
            raise interrupted[0]
        return path

    def of(self, attachment: Attachment) -> bool:
        """Whether this records what is attached there."""
        return self._attachment is attachment

    def give_up(self, error: Exception) -> None:
        """Say that a ``generate()`` call is not recorded because of an error that nothing else has caught."""
        told = f"this generation is not recorded: {type(error).__name__}: {error}"
        with contextlib.suppress(Exception):
            self.faults.append(told)
            self.warn_once("given up", told)

    @staticmethod
    def _note(capture: Capture, sentence: str) -> None:
        for row in capture.rows:
            row.notes.append(sentence)

    def warn_once(self, kind: str, sentence: str, *, stacklevel: int = 4) -> None:
        """Say each kind of thing once per recording."""
        with self._attachment.lock:
            new = kind not in self._warned
            self._warned.add(kind)
        if new:
            caution(sentence, stacklevel=stacklevel)


class _Made(threading.local):
    """A block that this thread has made, and that waits for its `with`."""

    block: str | None = None


class _Once:
    """The user's ``generate``, and what came of it: of all that happens around it, only that is the user's."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self._original = original
        self.returned, self.output = False, None
        self.error: Exception | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            self.output = self._original(*args, **kwargs)
        except Exception as error:
            self.error = error
            raise
        self.returned = True
        return self.output


class Attachment(Target):
    """Everything that hangs on the model. It knows nothing of the ``Probe``, so that dropping the probe detaches.

    ``recording`` and ``masking`` are for every caller of the model, in whatever thread or task; what a ``generate()``
    calls in its turn, in its own thread and context, is a part of it (``Call``).
    """

    def __init__(self, model: torch.nn.Module, processor: object | None, anatomy: Anatomy) -> None:
        super().__init__(model, processor, anatomy, watch=ProcessorWatch(), boxes={}, clips=ProcessorWatch())
        self.hooks = HookSet()
        self.recording: Recording | None = None
        self._maskings: tuple[Masking, ...] = ()
        self.made = _Made()
        self.closed = False
        self.lock = lock()

    def open(self) -> None:
        self.hooks.shadow(called_model(self.model), "generate", self._generate)
        self.hooks.forward_pre(called_model(self.model), self._forward, name="masked", fenced=False)
        if (watched := watched_method(self.processor)) is not None:
            self.hooks.shadow(*watched, self._preprocess)
        if self.anatomy.takes_clips and (videos := video_processor_of(self.processor)) is not None:
            self.hooks.shadow(videos, "preprocess", self._preprocess_clips)
            if callable(getattr(videos, _SAMPLES, None)):
                self.hooks.shadow(videos, _SAMPLES, ProcessorWatch.sampled)

    def close(self) -> None:
        with self.lock:
            self.closed = True
            self.recording, self._maskings = None, ()
        self.hooks.remove()
        self.watch = ProcessorWatch()
        self.clips = ProcessorWatch()  # calls that are being recorded still have theirs

    @property
    def masking(self) -> Masking | None:
        """The ``masked`` block in force: of those that are open, in whatever threads, the one entered last."""
        return self._maskings[-1] if self._maskings else None

    def mask(self, masking: Masking) -> None:
        """Enter a ``masked`` block."""
        with self.lock:
            self._maskings, self.made.block = (*self._maskings, masking), None

    def unmask(self, masking: Masking) -> None:
        """Leave a block, which need not be the one entered last: threads leave theirs in any order."""
        with self.lock:
            self._maskings = tuple(one for one in self._maskings if one is not masking)

    def describe_model(self) -> dict[str, Any]:
        """The model's description and fingerprint as it is now: between two calls weights are trained or switched."""
        return describe_model(self.model)

    def _generate(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        # Looked up once: other threads come and go.
        masking = self.masking
        recording, feed = self._recording_here()
        if masking is not None and not within(self):
            # Not fenced: a mask the user asked for and did not get would be a silent lie.
            with Call(self):
                if recording is not None:
                    recording.warn_once("masked", "a masked generation is not recorded: its image is not the user's")
                args, kwargs = masking.of_generate(self.model, args, kwargs)
                return original(*args, **kwargs)
        once = _Once(original)
        try:
            if within(self):
                return once(*args, **kwargs)
            if recording is None and (made := self.made.block) is not None:
                self.made.block = None
                caution(
                    f"{made} was called and does nothing yet: it is a block, so write `with probe.{made}:` and call "
                    "generate() inside it",
                    stacklevel=4,
                )
            with Call(self):
                return once(*args, **kwargs) if recording is None else recording.run(once, args, kwargs, feed)
        except Exception as error:
            if once.error is not None:
                raise once.error from None
            if recording is not None:
                recording.give_up(error)
            return once.output if once.returned else original(*args, **kwargs)

    def _recording_here(self) -> tuple[Recording | None, Feed | None]:
        """What records a call of this thread, and the stream that shows it."""
        own, feed = _OWN.get() or (None, None)
        return (own, feed) if own is not None and own.of(self) else (self.recording, None)

    def _forward(self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Not fenced: a mask the user asked for and did not get would be a silent lie.
        masking = self.masking
        if masking is None or within(self):
            return None
        return args, masking.of_forward(self.model, kwargs)

    def _preprocess(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        if within(self) or OWN_CALL.get():
            return original(*args, **kwargs)
        return self.watch.observe(image_processor_of(self.processor), original, args, kwargs, self._unwatched)

    def _preprocess_clips(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        if within(self) or OWN_CALL.get():
            return original(*args, **kwargs)
        videos = video_processor_of(self.processor)
        return self.clips.observe_clips(videos, original, args, kwargs, self._unwatched)

    def _unwatched(self, error: Exception) -> None:
        if (recording := self._recording_here()[0]) is not None:
            recording.faults.append(f"processor watch: {error}")
            recording.warn_once("watch", f"the processor call could not be watched: {error}")


class Probe:
    """A probe on one model; made by ``attach``. Usable as a context manager that detaches at the end.

    Attributes:
        model, processor: what was attached.
        anatomy: where encoders, mergers, decoder and image tokens are; inside a ``PeftModel``, in its base model.
        attachment: all that hangs on the model, and what other recorders than that of ``generate`` are given.
    """

    def __init__(self, model: torch.nn.Module, processor: object | None = None) -> None:
        if is_compiled(model):
            raise AttachError(
                "this is the wrapper that torch.compile(model) returns; attach the model itself before compiling "
                "it, or use model.compile(), which compiles in place"
            )
        _check_alone(model)
        if tokenizer_of(processor) is processor is not None and image_processor_of(processor) is processor:
            # Models with code of their own may have nothing else: their images are made elsewhere.
            caution(
                f"this is the tokenizer ({type(processor).__name__}), which sees no images: masks will lie in the "
                f"space of the pixel inputs; give the model's processor, AutoProcessor.from_pretrained(...), if there "
                f"is one"
            )
        self.model, self.processor = model, processor
        inner = probed_model(generating_model(model), processor)
        self.anatomy = examine(inner, processor)
        self.attachment = Attachment(inner, processor, self.anatomy)
        with _ATTACHING:
            _check_alone(model)  # another thread may have come first while the model was looked at
            try:
                self.attachment.open()
            except BaseException:
                self.attachment.close()
                raise
        self._finalizer = weakref.finalize(self, self.attachment.close)

    @naming_arguments
    def record(
        self,
        path: str | os.PathLike[str],
        *,
        images: Any = None,
        llr: bool = True,
        attention: bool = True,
        heads: Literal["mean", "all"] = "mean",
        boxes: bool = True,
        baseline: str | Image.Image = "blur",
        points: str | Sequence[str] = (),
        question: str | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> Recording:
        """Record every ``generate()`` call inside the ``with`` block.

        Args:
            path: directory for the trace files, made if missing; existing traces stay.
            images: the original images, where they cannot be taken from the processor call (a list; nested for
                batches).
            llr: also compute log-likelihood ratios, by one more pass per row on the baseline image; ``False`` leaves
                them for later.
            attention: record decoder attention from answer tokens to image tokens.
            heads: ``"mean"`` over heads or ``"all"`` of them.
            boxes: with attention, also keep which part of the image each image token stands for. On the first image
                of every size the processor is run some eight times for that, the encoder once and back ten times.
            baseline: ``"blur"``, ``"blank"``, ``"noise"``, ``"mean"``, or an image; of videos as for ``replay.over``.
            points: further module outputs to keep: ``"encoder"``, ``"merger"`` or module path patterns; and
                ``"hidden"``, the decoder's final hidden states with the LM head's rows of the prompt's and the answer's
                words (one more pass), from which ``explain(trace, method="tam")`` needs no model.
            question: text to show as the question; by default the last user turn of the prompt, by the processor's
                chat template; a prompt that does not follow it is shown as a prompt.
            meta: JSON to keep with the traces.

        Raises:
            ProbeError: the directory cannot be written, or an option is none.
            PointNotFound: a point that no module has; ImageError: no such baseline, or ``images`` that are none.
        """
        directory = _folder(path)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ProbeError(f"traces cannot be written to {directory}: {error}; name a directory") from error
        if not os.access(directory, os.W_OK):
            raise ProbeError(f"traces cannot be written to {directory}: no permission; name another directory")
        if images is not None:
            self._check_images(images)
        points = (points,) if isinstance(points, str) else tuple(points)
        for _ in modules_of(self.attachment.model, self.anatomy, points):
            pass  # a name that no module has is said now, not when an answer is there
        options = RecordOptions(
            images,
            llr,
            attention,
            boxes,
            heads,
            baseline,
            points,
            question,
            dict(meta) if isinstance(meta, Mapping) else meta or {},
        )
        self.attachment.made.block = "record(…)"
        return Recording(self.attachment, directory, options, self)

    def stream(
        self,
        path: str | os.PathLike[str] | None = None,
        /,
        *,
        by: Literal["word", "token"] = "word",
        record: Mapping[str, Any] | None = None,
        **generate: Any,
    ) -> Stream:
        """Generate one answer, recorded, and get its words as they are said.

        ``for word in p.stream(**inputs, max_new_tokens=64): print(word, end="")``. The model generates in a thread of
        its own and does not wait for the loop. Words come with log P and attention; log-likelihood ratios take the
        baseline pass, which begins when the answer is complete: the loop ends when the trace is written, and
        ``Stream.words`` and ``Stream.trace`` have them. The answer is that of ``generate()`` to the last bit, and the
        trace that of ``record``.

        Args:
            path: directory for the trace; by default that of the recording that is running, or else a temporary one
                that goes with the stream and its trace.
            by: ``"word"``, or ``"token"`` for every token, special ones included.
            record: options of ``record``, where ``path`` is not that of a running recording.
            **generate: arguments of ``model.generate``, for one prompt.

        Raises:
            ProbeError: more than one answer is asked for, the probe is detached or masked, or the directory cannot be
                written. What ``generate()`` raises comes out of the loop.
        """
        attachment = self.attachment
        if by not in ("word", "token"):
            raise ProbeError(f"by={by!r}: a stream gives words or tokens; by is 'word' or 'token'")
        self._check_streams(generate)
        recording, folder = attachment.recording if path is None else None, None
        if recording is None:
            if path is None:
                folder = tempfile.TemporaryDirectory(prefix="lvlm_probe_stream_")
            recording = self.record(folder.name if folder is not None else path or "", **(record or {}))
            attachment.made.block = None  # it is entered by the thread that generates
        elif record:
            raise ProbeError(f"record={dict(record)}: the recording that is running has its options; give a path too")
        settings, model = settings_here(input_device(attachment.model)), self.model

        def run(feed: Feed) -> None:
            with recording.alone(feed), settings():
                model.generate(**generate)  # type: ignore[operator]

        return Stream(run, self.processor, by, folder)

    def _check_streams(self, generate: Mapping[str, Any]) -> None:
        """Raises ``ProbeError`` where a ``generate()`` call cannot be shown as a stream."""
        if self.attachment.closed:
            raise AttachError("the probe was detached; attach again to stream")
        if self.attachment.masking is not None:
            raise ProbeError("a masked generation is not recorded, so it has no stream: leave the masked() block first")
        setting = settings_of(self.attachment.model, generate)
        names = ("input_ids", "inputs", "inputs_embeds", getattr(self.attachment.model, "main_input_name", ""))
        prompts = next((len(generate[name]) for name in names if isinstance(generate.get(name), torch.Tensor)), 1)
        answers, beams = (int(setting(name, 1)) for name in ("num_return_sequences", "num_beams"))
        if prompts * answers > 1:
            raise ProbeError(
                f"a stream shows one answer, and {prompts * answers} are asked for: give one prompt, or record() them"
            )
        if beams > 1:
            raise ProbeError(
                f"beam search ({beams} beams) goes back on words that it has said: num_beams=1, or record()"
            )

    def masked(
        self,
        mask: torch.Tensor,
        *,
        images: Any = None,
        image: int | None = None,
        clip: int | None = None,
        baseline: str | Image.Image = "blur",
        mode: Literal["fast", "exact"] = "fast",
        space: Literal["image", "pixels"] = "image",
    ) -> contextlib.AbstractContextManager[None]:
        """Inside the block, ``model(**inputs)`` and ``model.generate(**inputs)`` see the masked image or video.

        Args:
            mask: ``(row, col)`` for every image of the call, or ``(image, row, col)``, frames of videos among them; 1
                keeps, 0 is the baseline. Any loss on ``model(**inputs)`` is differentiable in it.
            images: the original images, where they cannot be taken from the processor call.
            image: mask this image only.
            clip: mask this video only, counted from 0, by ``(t, row, col)`` or ``(row, col)``. It need not be named
                where the call has no other and no image.
            baseline: what stands where the mask is 0, as for ``replay.over``.
            mode: ``"exact"`` runs the real processor on the real composite.
            space: ``"image"`` refuses a call whose original image is not known; ``"pixels"`` lays the mask on what
                the processor made of it, without what was cropped away.

        Raises:
            MaskError, ImageError: the mask does not fit, the call has no image, or it is not known which.
        """
        if not isinstance(mask, torch.Tensor) or not mask.is_floating_point():
            raise MaskError("a mask is a floating-point tensor with values in [0, 1]")
        if space == "picture":
            warnings.warn("space='picture' is called 'image' now", DeprecationWarning, stacklevel=2)
            space = "image"
        if space not in ("image", "pixels"):
            raise MaskError(f"space is 'image' or 'pixels'; got {space!r}")
        masking = Masking(
            self.processor,
            self.attachment.watch,
            self.attachment.clips,
            self.anatomy,
            mask,
            images=images,
            image=image,
            clip=clip,
            baseline=baseline,
            mode=mode,
            space=space,
        )
        self.attachment.made.block = "masked(…)"
        return self._masked(masking)

    @contextmanager
    def _masked(self, masking: Masking) -> Iterator[None]:
        if self.attachment.closed:
            raise AttachError("the probe was detached; attach again")
        self.attachment.mask(masking)
        try:
            yield
        finally:
            self.attachment.unmask(masking)

    def detach(self) -> None:
        """Remove everything this probe hung on the model and its processor; calling it again does nothing."""
        try:
            self.attachment.close()
        except BaseException:  # Ctrl-C half-way
            self.attachment.close()
            raise
        self._finalizer.detach()

    @property
    def attached(self) -> bool:
        """Whether the probe is still attached."""
        return not self.attachment.closed

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        return f"<Probe {state}: {type(self.model).__name__}, decoder {self.anatomy.decoder!r}>"

    @staticmethod
    def _check_images(images: Any) -> None:
        found, _ = flatten_images(images)
        if found is None:
            raise ImageError(
                "images= takes images as open_image() does: PIL images, uint8 arrays, paths, bytes (nested in one list "
                "per prompt for batches)"
            )


def _check_alone(model: torch.nn.Module) -> None:
    """Raise ``AttachError`` where a probe is attached."""
    inner = generating_model(model)
    present = shadow_of(vars(inner).get("generate")) if hasattr(inner, "__dict__") else None
    if present is not None and present.active:
        raise AttachError(
            f"a probe is attached to this {type(model).__name__} already; use that one, or call its detach() first"
        )


def _folder(path: Any) -> Path:
    """The directory that is named. Raises ``ProbeError`` for what names none, such as the inputs of a model."""
    try:
        return path_of(path, "the directory for traces", ProbeError)
    except ProbeError as error:
        raise ProbeError(f"{error} (inputs of the model go by name, **inputs)") from error
