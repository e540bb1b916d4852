"""Videos from files, decoded by PyAV: of the frames in the file those that a rule of sampling asks for.

A header knows how many frames there are, or nothing of it, or more than a file has that was cut off. So the packets are
read first, which tell how many there are and when each is shown; frames are then decoded from the last key frame before
each that is wanted. Only formats that hold pixels are opened: FFmpeg would also follow a playlist to other files.
"""

from __future__ import annotations

import bisect
import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lvlm_probe.errors import ImageError
from lvlm_probe.extras import require
from lvlm_probe.hooks import caution
from lvlm_probe.trace.clips import MOST_FRAMES, MOST_PIXELS

_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ogv", ".wmv", ".flv", ".3gp", ".m2ts", ".mts",
)  # fmt: skip
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,webp_pipe,mpeg,mpegvideo,mpegts,ogg,asf,flv,h264,hevc,ivf,obu,"
    "yuv4mpegpipe"
)
_LOST = 0.01  # of the frames that the packets promise: what edit lists and hidden frames take away
_UNEVEN = 0.5
"""Seconds by which a frame may be shown earlier or later than its number says."""


@dataclass(frozen=True)
class VideoFacts:
    """What a file says of its video.

    Attributes:
        frames: how many there are.
        fps: frames per second, in the mean.
        duration: seconds.
        width, height: of a frame as it is shown, pixels.
        audio: whether there is an audio track.
    """

    frames: int
    fps: float
    duration: float
    width: int
    height: int
    audio: bool


Sampling = Callable[[VideoFacts], Sequence[int]]


def is_video_name(source: Any) -> bool:
    """Whether a path is named like a video. GIF and animated WebP are images too, and are not."""
    return isinstance(source, str | Path) and str(source).lower().endswith(_SUFFIXES)


def read_video(path: str | Path, sampling: Sampling) -> tuple[np.ndarray, tuple[int, ...], VideoFacts]:
    """Decode frames of a video file, upright, RGB.

    Args:
        path: MP4, WebM, MOV, MKV, AVI, GIF, …: what FFmpeg decodes. An audio track is left alone, with a caution.
        sampling: what is known of the video → the numbers of the frames that are wanted, ascending.

    Returns:
        the frames, ``(frame, row, col, channel)`` uint8, their numbers in the video, and what is known of it.

    Raises:
        ImageError: there is no such file, no video in it, it is damaged or cut off, or more is wanted than a trace
            keeps; the message says which.
        ProbeError: PyAV is not installed.
    """
    path = Path(path)
    av = require("av", extra="video", purpose=f"the video file {path.name}")
    shown = check_video_file(path)
    with _reading(shown, av):
        facts, packets = _surveyed(av, path, shown)
    if facts.audio:
        caution(f"{shown} has an audio track, which is not looked at: the model is shown its frames alone")
    wanted = _chosen(sampling, facts, shown)
    with _reading(shown, av):
        found = _decoded(av, path, wanted, packets)
        if len(found) < len(set(wanted)):  # not as the packets promise: an edit list, hidden frames, or it is damaged
            there = _counted(av, path)
            if there < facts.frames * (1 - _LOST) - 2:
                raise ImageError(
                    f"of {facts.frames} frames in {shown} only {there} can be decoded: it is damaged; copy it again, "
                    "or save what is whole of it as a file of its own"
                )
            facts = replace(facts, frames=there, duration=there / facts.fps)
            wanted = _chosen(sampling, facts, shown)
            found = _decoded(av, path, wanted, _Packets((), ()))
    return np.stack([found[number] for number in wanted]), wanted, facts


@dataclass(frozen=True)
class _Packets:
    """When the frames are shown, ascending, and those of them that can be decoded alone; in the stream's time base.
    Empty where the file does not say."""

    times: tuple[int, ...]
    keys: tuple[int, ...]


def check_video_file(path: Path) -> str:
    """Return how a path is told in a sentence. Raises ``ImageError`` where there is no file, or an empty one."""
    shown = str(path) if len(str(path)) < 200 else f"{str(path)[:200]}…"
    try:
        there, folder = path.is_file(), path.is_dir()
        size = path.stat().st_size if there else 0
    except (OSError, ValueError):  # a name that is too long, or has a NUL in it
        there, folder, size = False, False, 0
    if not there:
        raise ImageError(f"no video at {shown}: {'it is a directory' if folder else 'there is no such file'}")
    if not size:
        raise ImageError(f"{shown} is empty; copy it again")
    return shown


@contextlib.contextmanager
def _reading(shown: str, av: Any) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(
            f"{shown} does not fit into memory; ask for fewer frames (num_frames, --num-frames)"
        ) from error
    except (av.error.FFmpegError, OSError, ValueError, ArithmeticError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise ImageError(
            f"{shown} is not a video that can be read ({said}): it is damaged, cut off, or of "
            "a kind that FFmpeg does not know; try it in a player, and save it anew as MP4"
        ) from error


@contextlib.contextmanager
def _opened(av: Any, path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream; of a file that is handed over open, so that its name is no address."""
    with (
        path.open("rb") as file,
        av.open(file, options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"}) as container,
    ):
        if not container.streams.video:
            raise ImageError(f"{path} holds no video{', only audio' if container.streams.audio else ''}")
        yield container, container.streams.video[0]


def _surveyed(av: Any, path: Path, shown: str) -> tuple[VideoFacts, _Packets]:
    """What the packets say; none is decoded but the first, for its size."""
    with _opened(av, path) as (container, stream):
        times, keys, count, dated = [], [], 0, True
        for packet in container.demux(stream):
            if not packet.size:
                continue
            count += 1
            dated = dated and packet.pts is not None
            if dated:
                times.append(packet.pts)
                if packet.is_keyframe:
                    keys.append(packet.pts)
        if not count:
            raise ImageError(f"{shown} holds no frames: it was cut off; copy it again")
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        tick = float(stream.time_base or 0)
        whole = container.duration / av.time_base if container.duration else 0.0
        audio = bool(container.streams.audio)
        if (stream.frames or 0) > count * (1 + _LOST) + 2:
            raise ImageError(
                f"{shown} says that it has {stream.frames} frames, and {count} are there: it was cut off; copy it again"
            )
    dated = dated and len(set(times)) == count
    spanned = (max(times) - min(times)) * tick if dated else 0.0
    if dated and spanned and not 0 < fps < 1000:
        fps = (count - 1) / spanned
    if dated and whole > 1.2 * spanned + 1:
        caution(
            f"{shown} is {whole:.1f} s long, and its video ends after {spanned:.1f} s: the rest was cut off, or is "
            "audio alone"
        )
    if dated and 0 < fps < 1000:
        shown_at = (np.sort(np.array(times)) - min(times)) * tick
        apart = float(np.abs(shown_at - np.arange(count) / fps).max())
        if apart > max(_UNEVEN, 2 / fps):
            caution(
                f"the frames of {shown} are not evenly spaced in time: the model and the trace take them at {fps:.3g} "
                f"a second, which is up to {apart:.1f} s from when they are shown; save it anew at an even rate"
            )
    with _opened(av, path) as (container, stream):
        first = next(container.decode(stream))
        high, wide = _upright(first).shape[:2]
    fps = fps if 0 < fps < 1000 else 25.0
    facts = VideoFacts(count, fps, count / fps, wide, high, audio)
    return facts, _Packets(tuple(sorted(times)), tuple(sorted(keys))) if dated else _Packets((), ())


def _chosen(sampling: Sampling, facts: VideoFacts, shown: str) -> tuple[int, ...]:
    wanted = tuple(int(number) for number in sampling(facts))
    if not wanted or min(wanted) < 0 or max(wanted) >= facts.frames:
        raise ImageError(f"no frames of {shown} are chosen, or such as it does not have: it has {facts.frames}")
    pixels = len(wanted) * facts.width * facts.height
    if len(wanted) > MOST_FRAMES or pixels > MOST_PIXELS:
        most = min(MOST_FRAMES, MOST_PIXELS // (facts.width * facts.height))
        raise ImageError(
            f"{len(wanted)} frames of {facts.width} x {facts.height} in {shown} are more than a trace keeps; ask for "
            f"{most} or fewer: num_frames={min(most, 16)} (command line: --num-frames), or for fewer in a second, fps"
        )
    return wanted


def _decoded(av: Any, path: Path, wanted: Sequence[int], packets: _Packets) -> dict[int, np.ndarray]:
    """The wanted frames by number; without those that the file does not have."""
    found: dict[int, np.ndarray] = {}
    with _opened(av, path) as (container, stream):
        stream.thread_type = "AUTO"
        if not packets.times:
            for number, frame in enumerate(container.decode(stream)):
                if number > max(wanted):
                    break
                if number in wanted:
                    found[number] = _upright(frame)
            return found
        number_at = {time: number for number, time in enumerate(packets.times)}
        frames: Iterator[Any] = iter(())
        at = None  # time of the latest frame
        for number in sorted(set(wanted)):
            time = packets.times[number]
            place = bisect.bisect_right(packets.keys, time)
            key = packets.keys[place - 1] if place else None
            if at is None or (key is not None and key > at):
                if key is not None and key > packets.times[0]:
                    container.seek(key, stream=stream, backward=True)
                frames = container.decode(stream)
            for frame in frames:
                at = frame.pts
                if at == time:
                    found[number] = _upright(frame)
                    break
                if at not in number_at or at > time:
                    return {}  # times of frames are not those of packets: count them
    return found


def _counted(av: Any, path: Path) -> int:
    count = 0
    with _opened(av, path) as (container, stream), contextlib.suppress(av.error.FFmpegError):
        for _ in container.decode(stream):
            count += 1
    return count


def _upright(frame: Any) -> np.ndarray:
    """A frame as it is shown: phones store it as the sensor has it, and say how to turn it."""
    array: np.ndarray = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(array, round(getattr(frame, "rotation", 0) / 90)))


def encode_video(frames: Iterable[Image.Image], *, seconds: float, comment: str = "") -> bytes:
    """Encode images of one size as an MP4 that browsers and players show (H.264; MPEG-4 where FFmpeg lacks it).

    Args:
        frames: RGB; sides of an odd number of pixels lose one, as the format has only even ones.
        seconds: for which each is shown.
        comment: goes into the file.

    Raises:
        ProbeError: PyAV is not installed.
    """
    av = require("av", extra="video", purpose="an MP4")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        if comment:
            container.metadata["comment"] = comment
        rate = Fraction(1 / seconds).limit_denominator(1000)
        stream = container.add_stream(codec, rate=rate)
        for number, image in enumerate(frames):
            array = np.asarray(image.convert("RGB"))
            array = array[: array.shape[0] // 2 * 2, : array.shape[1] // 2 * 2]
            if not number:
                stream.height, stream.width, stream.pix_fmt = *array.shape[:2], "yuv420p"
            shown = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            shown.pts, shown.time_base = number, 1 / rate
            container.mux(stream.encode(shown))
        container.mux(stream.encode())
    return buffer.getvalue()
