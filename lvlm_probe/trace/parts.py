"""The larger parts of a trace: attention, and images."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lvlm_probe.cards import equal, in_one_line
from lvlm_probe.errors import TraceError
from lvlm_probe.files import causes
from lvlm_probe.storage.reading import SealedFile
from lvlm_probe.storage.seal import trace_error
from lvlm_probe.trace.records import ImageRecord
from lvlm_probe.trace.schema import RowHeader

PIXEL_LIMIT = 178_956_970
"""Pixels of one image (Pillow's own limit for a decompression bomb): about 700 MB as RGB."""
FREE_PIXELS = 40_000_000
"""Pixels that an encoded image may have however short it is: a page of A4 at 600 dpi, 160 MB as RGB."""
FREE_PIXELS_TOGETHER = 100_000_000
"""The same for all images of a trace, where all are asked for at once."""
PIXELS_PER_BYTE = 64
"""Above those an image has at most as many pixels for each byte of its encoded file. Photographs have 2 to 10."""
THUMBNAIL_PIXELS = 2**24
"""Pixels of the largest image that is decoded only to be shown small."""
# Formats that Pillow decodes itself. Not EPS or PDF: those start other programs.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "MPO", "JPEG2000")
_ATTENTION = "decoder.attention"
_TEXT_MASS = "decoder.attention_text_mass"
_CROSS = "decoder.cross_attention"
_WAY_OUT = "the file is damaged or hostile: record it again"
_TOO_LARGE = "it is hostile, or an image too large for this program: record it with a smaller image"


@dataclasses.dataclass(frozen=True, repr=False)
class AttentionRows:
    """Attention of the answer's tokens to the image tokens, inside the language model; or to the image's states,
    where they reach it by cross-attention and the prompt holds no image tokens."""

    __repr__, __eq__ = in_one_line, equal

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
            array = file.tensor(key).float().numpy()
        else:
            array = file.array(key).astype(np.float32)
        array.flags.writeable = False  # cached, and shared by everyone who asks
        return array

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


def check_pixels(
    path: Path, key: str, sizes: Sequence[tuple[int, int]], nbytes: int, *, free: int = FREE_PIXELS_TOGETHER
) -> None:
    """Refuses images that become large from little: above ``free``, encoded bytes bound their pixels.

    Args:
        path: of the file, for the message.
        key: of the member, for the message.
        sizes: ``(width, height)`` of each image, pixels.
        nbytes: bytes of their encoded files together.
        free: pixels that are allowed whatever they are encoded in.

    Raises:
        TraceError: there are more.
    """
    pixels, most = sum(width * height for width, height in sizes), max(free, PIXELS_PER_BYTE * nbytes)
    if pixels > most:
        what = f"{pixels} pixels, more than {most}, in {len(sizes)} image{'s' * (len(sizes) != 1)} of {nbytes} bytes"
        raise trace_error(path, key, what, _TOO_LARGE)


def decode(record: ImageRecord, path: Path, key: str) -> Image.Image:
    """Decodes an image to RGB; its header must agree with what the trace declares. Raises ``TraceError``."""
    with _decoding(record, path, key) as image:
        return image.convert("RGB")


def thumbnail(record: ImageRecord, path: Path, key: str, *, side: int) -> Image.Image | None:
    """Decodes an image to RGB for a thumbnail of at most ``side`` pixels; None where that takes much memory.

    Raises ``TraceError`` where ``decode`` would.
    """
    with _decoding(record, path, key) as image:
        image.draft("RGB", (side, side))  # a JPEG is decoded small
        if image.size[0] * image.size[1] > THUMBNAIL_PIXELS:
            return None
        image.thumbnail((side, side))
        return image.convert("RGB")


@contextlib.contextmanager
def _decoding(record: ImageRecord, path: Path, key: str) -> Iterator[Image.Image]:
    try:
        image = Image.open(io.BytesIO(record.data), formats=IMAGE_FORMATS)
        if image.size != (record.width, record.height):
            what = f"the image is {image.size[0]}x{image.size[1]}, declared {record.width}x{record.height}"
            raise trace_error(path, key, what, _WAY_OUT)
        if image.size[0] * image.size[1] > PIXEL_LIMIT:
            what = f"the image has {image.size[0] * image.size[1]} pixels, more than {PIXEL_LIMIT}"
            raise trace_error(path, key, what, _TOO_LARGE)
        check_pixels(path, key, [image.size], len(record.data), free=FREE_PIXELS)
        yield image
    except TraceError:
        raise
    except MemoryError as error:
        raise trace_error(path, key, *causes(error)) from error
    # Decoders raise nearly anything on damaged data (OSError, SyntaxError, struct.error, zlib.error, ...).
    except Exception as error:
        what = f"the image cannot be decoded ({type(error).__name__}: {error})"
        raise trace_error(path, key, what, _WAY_OUT) from error
