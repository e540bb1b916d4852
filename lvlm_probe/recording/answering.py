"""One question asked by this package itself: the prompt, ``generate()`` with the probe attached, the trace.

A video that is a file is opened by the user's own processor, which says what it samples; only the decoding is ours, in
the place of transformers', which takes torchcodec and an FFmpeg of the system.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_probe.errors import ImageError, ProbeError
from lvlm_probe.hooks import Call, HookSet, caution
from lvlm_probe.images.clips import video_processor_of
from lvlm_probe.models.exhaustion import told_out_of_memory
from lvlm_probe.models.prompts import chat_inputs, check_question, placed, prompt_rule
from lvlm_probe.recording.probe import Probe, attach
from lvlm_probe.recording.token_boxes import BoxCache
from lvlm_probe.trace.video_files import VideoFacts, read_video

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from lvlm_probe.trace import Trace

EVENLY = 16
"""Frames of a file, evenly spaced, that are shown to a model whose processor would else take all there are."""


@told_out_of_memory
def record_answer(
    model: torch.nn.Module,
    processor: Any,
    images: Sequence[Image.Image],
    question: str,
    directory: str | os.PathLike[str],
    *,
    generate: Mapping[str, Any],
    videos: Sequence[Any] = (),
    num_frames: int | None = None,
    fps: float | None = None,
    prompt: str | None = None,
    note: Callable[[str], None] | None = None,
    boxes: BoxCache | None = None,
    **record: Any,
) -> Trace:
    """Record a model's answer to a question about images and videos, greedy unless ``generate`` says otherwise.

    Args:
        directory: where the trace goes.
        generate: arguments of ``model.generate`` besides the inputs.
        videos: after the images: files, arrays ``(frame, row, col, channel)`` of uint8, or lists of frames.
        num_frames, fps: how many frames the video processor samples, in all or in a second; by default as it does,
            or of a file, where it samples none, ``EVENLY``.
        prompt: how the prompt is made, with ``{question}`` and ``{images}``; by default the processor's chat template,
            or the rule of the model's family. A rule is kept in ``trace.meta["prompt_rule"]``.
        note: called with a sentence where the prompt is not made by a chat template.
        boxes: token boxes that earlier answers of this model have found, which is added to; by default none.
        **record: further options of ``Probe.record``.

    Returns:
        the trace.

    Raises:
        AttachError: the model cannot be probed, or is probed already.
        ImageError: a video cannot be read.
        OutOfMemory: the model cannot answer in the memory there is.
        ProbeError: nothing was recorded, or the recording is faulty; the message says why.
    """
    sampling = _sampling(num_frames, fps, videos)
    rule = prompt_rule(processor, model, prompt=prompt)
    if not question.strip() and (rule is None or rule.asks):
        raise ProbeError('there is no question: give question="…", on the command line --question "…"')
    if rule is not None:
        record["meta"] = {**(record.get("meta") or {}), "prompt_rule": rule.text}
    with attach(model, processor) as probe:
        if boxes is not None:
            probe.attachment.boxes = boxes
        shown = [_as_given(video) for video in videos]
        if shown:
            _check_takes_videos(probe)
        check_question(processor, question, probe.anatomy.image_token_id)
        given = None if shown else list(images)  # of a prompt with videos they are known by the processor's calls
        recording = probe.record(directory, images=given, question=question or None, **record)
        with recording.alone():  # others may generate with the model meanwhile
            with _decoding(processor, num_frames, note or caution) if shown else contextlib.nullcontext():
                made = chat_inputs(
                    processor, images, question, videos=shown, sampling=sampling, rule=rule, note=note
                )  # fmt: skip
            inputs = placed(made, model, processor)
            model.generate(**inputs, **{"do_sample": False, **generate})  # type: ignore[operator]
        if not recording.paths:
            why = recording.faults or recording.passed_over or ["the model saw no image"]
            raise ProbeError("nothing was recorded: " + "; ".join(why)) from recording.lost_by
        trace = recording.traces[-1]
        if trace.status == "error":
            raise ProbeError(f"the recording of {trace.path.name} is faulty: {trace.error}")
        return trace


def _sampling(num_frames: int | None, fps: float | None, videos: Sequence[Any]) -> dict[str, Any]:
    """Arguments of the video processor by which it samples so many frames."""
    asked = {name: value for name, value in (("num_frames", num_frames), ("fps", fps)) if value is not None}
    if len(asked) == 2:
        raise ProbeError("num_frames and fps are two ways to say how many frames are sampled: give one of them")
    for name, value in asked.items():
        if not videos:
            raise ProbeError(f"{name} is of a video, and none is given")
        if not value > 0:
            raise ProbeError(f"{name}={value}: at least one frame is sampled")
    # The other one is its own setting, which would stand beside that which is asked for.
    return {"do_sample_frames": True, "num_frames": None, "fps": None, **asked} if asked else {}


def _check_takes_videos(probe: Probe) -> None:
    """Refuse a video before the model is asked about it. Raises ``ProbeError``."""
    name = type(probe.model).__name__
    if not probe.anatomy.takes_clips:
        raise ProbeError(f"videos of {name} are not recorded yet; docs/guides/videos.md names the families whose are")
    if video_processor_of(probe.processor) is None:
        raise ProbeError(
            f"{type(probe.processor).__name__} has no video processor (transformers' own need torchvision: pip install "
            "'lvlm-probe[torchvision,video]'), so it takes no video"
        )


def _as_given(video: Any) -> Any:
    """A video as the processor takes it: a path as text. Raises ``ImageError``."""
    if not isinstance(video, str | os.PathLike):
        return video
    path = os.fspath(video)
    if re.match(r"https?:/+", path):
        raise ImageError(f"{path[:200]} lies on the network; download it first, and give the file")
    return path


@contextlib.contextmanager
def _decoding(processor: Any, num_frames: int | None, tell: Callable[[str], None]) -> Iterator[None]:
    """Files that the processor is given inside are decoded by PyAV, with the frames that it samples itself."""
    from transformers.video_utils import VideoMetadata

    name = type(video_processor_of(processor)).__name__

    def one(path: str, choose: Callable[..., Any] | None) -> tuple[np.ndarray, VideoMetadata]:
        def known(facts: VideoFacts, indices: Sequence[int] | None = None) -> VideoMetadata:
            return VideoMetadata(
                total_num_frames=facts.frames, fps=facts.fps, duration=facts.duration, width=facts.width,
                height=facts.height, video_backend="pyav", frames_indices=None if indices is None else list(indices),
            )  # fmt: skip

        def sampled(facts: VideoFacts) -> Sequence[int]:
            if choose is None:
                if facts.frames > EVENLY:
                    tell(
                        f"{name} samples no frames by itself: {EVENLY} of {facts.frames} in {Path(path).name} are "
                        "shown, evenly spaced; num_frames or fps says how many (command line: --num-frames, --fps)"
                    )
                return _evenly(facts.frames, min(EVENLY, facts.frames))
            try:
                indices = [int(index) for index in choose(metadata=known(facts))]
            except (TypeError, ValueError) as error:  # a setting that it needs and does not have is None
                raise ImageError(f"{name} cannot sample {Path(path).name}: {error}") from error
            if num_frames not in (None, len(indices)):
                tell(
                    f"{name} samples by a rule of its own: {len(indices)} frames of {Path(path).name}, not {num_frames}"
                )
            return indices

        frames, indices, facts = read_video(path, sampled)
        return frames, known(facts, indices)

    def fetched(original: Any, source: Any, sample_indices_fn: Any = None) -> Any:
        if isinstance(source, list):
            return [list(each) for each in zip(*(one(path, sample_indices_fn) for path in source), strict=True)]
        return one(source, sample_indices_fn)

    owner = object()
    with HookSet(scope=owner) as hooks, Call(owner):
        hooks.shadow(video_processor_of(processor), "fetch_videos", fetched)
        yield


def _evenly(total: int, count: int) -> list[int]:
    """So many of all frames, each from the middle of its stretch of time."""
    return [int((place + 0.5) * total / count) for place in range(count)]
