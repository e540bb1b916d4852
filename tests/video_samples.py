"""Video files as cameras and people make them, drawn frame by frame; needs PyAV."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import av
import numpy as np

__all__ = ["film"]


def film(
    path: Path,
    *,
    frames: int = 24,
    fps: int = 12,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    size: tuple[int, int] = (64, 48),
    keys: int = 250,
    audio: bool = False,
    options: Mapping[str, str] | None = None,
) -> Path:
    """A red square that moves over ground that changes its colour; ``keys`` frames from one key frame to the next."""
    width, height = size
    with av.open(str(path), "w", options=dict(options or {})) as container:
        stream = None
        if frames:
            stream = container.add_stream(codec, rate=fps, options={"g": str(keys)})
            stream.width, stream.height, stream.pix_fmt = width, height, pixels
        sound = container.add_stream("aac", rate=16000, layout="mono") if audio else None
        for number in range(frames):
            image = np.full((height, width, 3), (40, 80, number * 5 % 256), np.uint8)
            left = number * 3 % (width - 16)
            image[10:30, left : left + 16] = (220, 30, 30)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        if stream is not None:
            container.mux(stream.encode())
        if sound is not None:
            for number in range(10):
                samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                samples.sample_rate, samples.pts = 16000, number * 1024
                container.mux(sound.encode(samples))
            container.mux(sound.encode())
    return path
