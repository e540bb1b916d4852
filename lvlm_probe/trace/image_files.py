"""Pictures to bytes: the user's own file where it is known, a lossless copy otherwise."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from lvlm_probe.errors import ImageError
from lvlm_probe.trace.parts import IMAGE_FORMATS

__all__ = ["decode_picture", "encode_picture", "open_picture"]

# Modes that PNG stores without loss; anything else is kept as the RGB that a processor would make of it.
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def encode_picture(image: Image.Image) -> tuple[bytes, str]:
    """The picture as an encoded file and its MIME type; decoding gives the same pixels.

    The bytes of the file it was opened from are used when they still decode to these pixels (a JPEG stays as small as
    it was); otherwise PNG.
    """
    name = getattr(image, "filename", "")
    mime = Image.MIME.get(image.format or "", "")
    if name and mime and image.format in IMAGE_FORMATS and Path(name).is_file():
        data = Path(name).read_bytes()
        try:
            with Image.open(io.BytesIO(data)) as stored:
                same = stored.size == image.size and stored.mode == image.mode
                if same and np.array_equal(np.asarray(stored), np.asarray(image)):
                    return data, mime
        except OSError:
            pass  # the file has been replaced by something else since
    buffer = io.BytesIO()
    (image if image.mode in _PNG_MODES else image.convert("RGB")).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue(), "image/png"


def open_picture(path: str | Path) -> Image.Image:
    """Open an image file, loaded and RGB.

    Raises:
        ImageError: there is no such file, or it is not an image.
    """
    path = Path(path)
    try:
        there, folder = path.is_file(), path.is_dir()
    except (OSError, ValueError):  # a name that is too long, or has a NUL in it
        there = folder = False
    if not there:
        raise ImageError(f"no image at {path}: {'it is a directory' if folder else 'there is no such file'}")
    return _rgb(path, str(path))


def decode_picture(data: bytes) -> Image.Image:
    """The image in the bytes of a file, loaded and RGB. Raises ``ImageError``."""
    return _rgb(io.BytesIO(data), f"a file of {len(data)} bytes")


def _rgb(source: Path | io.BytesIO, what: str) -> Image.Image:
    """Only formats that are pixels: Pillow would also hand a PostScript file to an interpreter."""
    try:
        # Broken files raise nearly anything: struct.error, SyntaxError, KeyError, EOFError, MemoryError.
        with Image.open(source, formats=_formats()) as image:
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:
        raise ImageError(f"{what} is not an image that can be read ({error}); give a PNG, JPEG or WebP file") from error


def _formats() -> list[str]:
    """Of ``IMAGE_FORMATS``, what this Pillow was built with."""
    Image.init()
    return [name for name in IMAGE_FORMATS if name in Image.OPEN]
