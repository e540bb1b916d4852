"""The larger parts of a trace: where the image tokens are, attention, and pictures."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from lvlm_probe.errors import TraceError
from lvlm_probe.format.reading import SealedFile
from lvlm_probe.format.records import ImageRecord
from lvlm_probe.format.schema import RowHeader
from lvlm_probe.format.seal import trace_error

__all__ = [
    "IMAGE_FORMATS",
    "PIXEL_LIMIT",
    "AttentionRows",
    "Layout",
    "decode",
    "file_state",
    "read_attention",
    "read_image",
]

PIXEL_LIMIT = 178_956_970
"""Pixels of one image (Pillow's own limit for a decompression bomb): about 500 MB as RGB."""
# Formats that Pillow decodes itself. Not EPS or PDF: those start other programs.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "MPO", "JPEG2000")
_ATTENTION = "decoder.attention"
_TEXT_MASS = "decoder.attention_text_mass"
_CROSS = "decoder.cross_attention"
_WAY_OUT = "the file is damaged or hostile: record it again"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the image tokens are in the prompt, and which part of the picture each stands for."""

    image_positions: np.ndarray
    """``(image_token,)`` int64: positions in ``input_ids``."""
    image_index: np.ndarray
    """``(image_token,)`` int64: the image each token belongs to."""
    patch_box: np.ndarray | None
    """``(image_token, 4)`` float32: ``x0, y0, x1, y1`` in original-image pixels."""
    image_token_id: int | None


@dataclasses.dataclass(frozen=True)
class AttentionRows:
    """Attention of the answer's tokens to the image tokens, inside the language model; or to the picture's states,
    where they reach it by cross-attention and the prompt holds no image tokens."""

    values: np.ndarray
    """``(step, layer, head, image_token)`` float32, the last axis the keys of cross-attention where there are no image
    tokens; one head when heads were averaged (see ``reduce``)."""
    layers: tuple[int, ...]
    text_mass: np.ndarray | None
    """``(step, layer, head)`` float32: what went to all other tokens."""
    reduce: str
    key_box: np.ndarray | None = None
    """``(key, 4)`` float32, of cross-attention: as ``Layout.patch_box``."""
    key_image: np.ndarray | None = None
    """``(key,)`` int64, of cross-attention: the image each key belongs to, -1 for one that stands for no pixel."""


def read_attention(file: SealedFile, row: str, header: RowHeader) -> AttentionRows | None:
    """Reads the attention rows of the batch row under the key ``row``, if there are any. Raises ``TraceError``."""
    known = {point.name: point for point in header.points}
    name, last = (_ATTENTION, "image_token") if _ATTENTION in known else (_CROSS, "key")
    if name not in known:
        return None

    def values(name: str, axes: tuple[str, ...]) -> np.ndarray:
        key = f"{row}/points/{name}"
        if known[name].axes != axes:
            what = f"axes {known[name].axes}, {axes} are expected"
            raise trace_error(file.path, f"{key}@axes", what, "record it again")
        if known[name].dtype == "bfloat16":
            return file.tensor(key).float().numpy()
        return file.array(key).astype(np.float32)

    weights = values(name, ("step", "layer", "head", last))
    mass = values(_TEXT_MASS, ("step", "layer", "head")) if _TEXT_MASS in known else None
    reduce = file.text(f"{row}/points/{name}", "reduce", "none")
    box, image = f"{_CROSS}_key_box", f"{_CROSS}_key_image"
    if name != _CROSS or box not in known or image not in known:
        return AttentionRows(weights, known[name].layers, mass, reduce)
    boxes, images = values(box, ("key", "channel")), values(image, ("key",)).astype(np.int64)
    count = weights.shape[-1]
    if boxes.shape != (count, 4) or images.shape != (count,):
        what = f"shapes {boxes.shape} and {images.shape} for {count} keys"
        raise trace_error(file.path, f"{row}/points/{box}", what, "record it again")
    if images.size and not (images.min() >= -1 and images.max() < len(header.image_sizes)):
        what = f"it names images {images.min()} to {images.max()} of {len(header.image_sizes)}"
        raise trace_error(file.path, f"{row}/points/{image}", what, "record it again")
    return AttentionRows(weights, known[name].layers, mass, reduce, boxes, images)


def read_image(file: SealedFile, key: str) -> ImageRecord:
    """Reads an image as an encoded file and checks it against its SHA-256. Raises ``TraceError``."""
    data = file.array(key, dtype="u1", shape=[None]).tobytes()
    if hashlib.sha256(data).hexdigest() != file.text(key, "sha256"):
        raise file.error(key, "the image does not match its SHA-256")
    width, height = (file.integer(key, side, low=1) or 0 for side in ("width", "height"))
    return ImageRecord(data, file.text(key, "mime"), width, height)


def decode(record: ImageRecord, path: Path, key: str) -> Image.Image:
    """Decodes an image to RGB; its header must agree with what the trace declares. Raises ``TraceError``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is an error
            image = Image.open(io.BytesIO(record.data), formats=IMAGE_FORMATS)
        if image.size != (record.width, record.height):
            what = f"the image is {image.size[0]}x{image.size[1]}, declared {record.width}x{record.height}"
            raise trace_error(path, key, what, _WAY_OUT)
        if image.size[0] * image.size[1] > PIXEL_LIMIT:
            what = f"the image has {image.size[0] * image.size[1]} pixels, more than {PIXEL_LIMIT}"
            raise trace_error(path, key, what, _WAY_OUT)
        return image.convert("RGB")
    except TraceError:
        raise
    # Decoders raise nearly anything on damaged data (OSError, SyntaxError, struct.error, zlib.error, ...).
    except Exception as error:
        what = f"the image cannot be decoded ({type(error).__name__}: {error})"
        raise trace_error(path, key, what, _WAY_OUT) from error


def file_state(path: Path) -> tuple[int, ...]:
    """What changes when somebody puts another file in this one's place. Raises ``TraceError`` when it is gone."""
    try:
        status = path.stat()
    except OSError as error:
        raise trace_error(path, "", f"it cannot be read any more ({error})", "it was moved or deleted") from error
    return status.st_ino, status.st_size, status.st_mtime_ns
