"""Pictures to bytes: the user's own file where it is known, a lossless copy otherwise."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from lvlm_probe.errors import ImageError
from lvlm_probe.trace.parts import IMAGE_FORMATS

__all__ = ["encode_picture", "open_picture"]

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
    if not path.is_file():
        raise ImageError(f"no image at {path}: {'it is a directory' if path.is_dir() else 'there is no such file'}")
    try:
        with Image.open(path) as image:
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path} is not an image that can be read ({error}); give a PNG, JPEG or WebP file") from error
