"""Images from anywhere as a model is shown them, and back to bytes: the user's own file, or a lossless copy."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from lvlm_probe.errors import ImageError
from lvlm_probe.hooks import caution
from lvlm_probe.trace.parts import IMAGE_FORMATS

_DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
_LARGEST = 256 << 20
"""Bytes of a file from the network."""
_TIMEOUT = 60.0
"""Seconds for which a server may say nothing."""

# Modes that PNG stores without loss; anything else is kept as the RGB that a processor would make of it.
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def encode_image(image: Image.Image) -> tuple[bytes, str]:
    """An image as an encoded file and its MIME type; decoding gives the same pixels.

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
                same = same and np.array_equal(np.asarray(stored), np.asarray(image))
                if same and _colours(stored) == _colours(image):
                    return data, mime
        except OSError:
            pass  # the file has been replaced by something else since
    buffer = io.BytesIO()
    (image if image.mode in _PNG_MODES else image.convert("RGB")).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue(), "image/png"


def _colours(image: Image.Image) -> Any:
    """What the numbers of an image with a palette stand for; ``None`` of other images."""
    return (image.getpalette("RGBA"), image.info.get("transparency")) if image.mode in ("P", "PA") else None


def open_image(source: Any, *, fetch: bool = False) -> Image.Image:
    """Open an image as every road of this package shows it to a model: upright, 8 bit, RGB.

    The camera's orientation (EXIF) is applied, as transformers' own loader does; 16-bit levels are scaled, not cut off,
    but those of no more than 255, which are 8-bit ones; of an animation or a file of several pages the first one is
    taken, or of a PIL image the one it is at. What a model is not shown, or not as it may be meant, is said in a
    ``ProbeWarning``: further frames, transparency (the colours below it count), levels that use less than a quarter of
    their range, and an image of one colour only.

    Args:
        source: a path; the bytes of a file; a ``data:`` URI; bare base64; a PIL image; an array of uint8 or uint16,
            ``(row, col)`` or ``(row, col, channel)``; with ``fetch`` an http(s) URL. HEIC needs ``pillow-heif``
            (``pip install 'lvlm-probe[heic]'``).
        fetch: ask the network for URLs.

    Returns:
        A new image, loaded; the source is left alone.

    Raises:
        ImageError: nothing there, no image, or a kind of source that is not known; the message says what was given.
    """
    if isinstance(source, Image.Image):
        with _reading("the given image"):
            source.load()
            return _shown(source, "the given image")
    if isinstance(source, np.ndarray):
        with _reading(f"an array of {source.dtype} and shape {source.shape}"):
            return _shown(_of_array(source), "the array")
    if isinstance(source, bytes | bytearray | memoryview):
        return decode_image(bytes(source))
    if isinstance(source, str) and (text := source.strip()):
        if text.startswith("data:"):
            return decode_image(_of_uri(text))
        if text.startswith(("http://", "https://")):
            return decode_image(_fetched(text, fetch))
        if len(text) > 255 and (data := _of_base64(text)) is not None:  # no file has so long a name
            return decode_image(data)
    if isinstance(source, str | Path):
        return open_image_file(source)
    raise ImageError(
        f"an image is a path, bytes, a data: URI, base64, a PIL image or an array; got a {type(source).__name__}"
    )


def open_image_file(path: str | Path, *, most_pixels: int | None = None) -> Image.Image:
    """Open an image file as ``open_image`` does.

    Args:
        most_pixels: refuse an image of more, before it is decoded.

    Raises:
        ImageError: there is no such file, it is not an image, or it has too many pixels.
    """
    path = Path(path)
    try:
        there, folder = path.is_file(), path.is_dir()
    except (OSError, ValueError):  # a name that is too long, or has a NUL in it
        there = folder = False
    if not there:
        shown = str(path) if len(str(path)) < 200 else f"{str(path)[:200]}…"
        raise ImageError(f"no image at {shown}: {'it is a directory' if folder else 'there is no such file'}")
    return _rgb(path, str(path), most_pixels)


def decode_image(data: bytes) -> Image.Image:
    """Open the image in the bytes of a file as ``open_image`` does. Raises ``ImageError``."""
    return _rgb(io.BytesIO(data), f"a file of {len(data)} bytes")


def _rgb(source: Path | io.BytesIO, what: str, most_pixels: int | None = None) -> Image.Image:
    """Only formats that are pixels: Pillow would also hand a PostScript file to an interpreter."""
    formats = _formats()
    with _reading(what, source), Image.open(source, formats=formats) as image:
        if most_pixels is not None and image.width * image.height > most_pixels:
            raise ImageError(
                f"{what} has {image.width} × {image.height} pixels, and {most_pixels / 1e6:.0f} million are the most "
                "here: make the image smaller"
            )
        image.load()
        return _shown(image, what, keep=True)


@contextlib.contextmanager
def _reading(what: str, source: Path | io.BytesIO | None = None) -> Iterator[None]:
    # Broken files raise nearly anything: struct.error, SyntaxError, KeyError, EOFError, MemoryError.
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        cure = "give a PNG, JPEG or WebP file"
        if isinstance(error, Image.DecompressionBombError):
            cure = "make it smaller"
        if source is not None and _is_heic(source):
            cure = "it is HEIC, as phones write it: pip install 'lvlm-probe[heic]', or save it as JPEG"
        raise ImageError(f"{what} is not an image that can be read ({error}); {cure}") from error


def _shown(image: Image.Image, what: str, *, keep: bool = False) -> Image.Image:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a photograph with previews
        at = image.tell()
        shown = f"number {at}, counted from 0," if at else "the first one"
        caution(f"{what} has {frames} frames or pages, and {shown} is shown to the model")
    turned = ImageOps.exif_transpose(image)
    if turned.mode in _DEEP:
        turned = Image.fromarray(_eight_bit(np.asarray(turned), what))
    if turned.mode in ("RGBA", "LA", "PA") or "transparency" in turned.info:
        opacity = np.asarray(turned.convert("RGBA").getchannel("A"))
        if opacity.min() < 255:
            share = float(np.mean(opacity < 255))
            caution(f"{share:.0%} of {what} is transparent, and the model is shown the colours below that")
    same = turned.mode == "RGB" and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    result = image if same and keep else turned.convert("RGB")  # which still knows its file
    if is_constant(result):
        caution(f"every pixel of {what} has the same colour: there is nothing to see in it")
    return result


def is_constant(image: Image.Image) -> bool:
    """Whether every pixel has the same colour."""
    try:
        levels: Any = image.getextrema()
    except ValueError:  # modes that Pillow keeps and does not compute with: 16 bit, big-endian for one
        values = np.asarray(image)
        levels = (values.min(), values.max())
    return all(low == high for low, high in (levels if isinstance(levels[0], tuple) else [levels]))


def _eight_bit(values: np.ndarray, what: str) -> np.ndarray:
    """Levels of 16 bits at 8, by scale; numbers that are levels of 0 to 255, or shares of 1, already stay."""
    levels = values.astype(np.float64)
    most = levels.max(initial=0.0)
    highest = 1.0 if values.dtype.kind == "f" and most <= 1 else 255.0 if most <= 255 else 65535.0
    if not np.isfinite(levels).all() or levels.min(initial=0.0) < 0 or most > highest:
        raise ImageError(
            f"{what} has values of {values.dtype} from {levels.min():g} to {most:g}, which are no levels that are "
            f"known; scale it to 0…255"
        )
    if highest == 65535 and most <= highest / 4:
        caution(
            f"levels of {what} reach {most:g} of {highest:g}, so the model is shown a dark image; if they have 12 or "
            "14 bits, scale them"
        )
    scaled: np.ndarray = np.rint(levels * (255 / highest)).astype(np.uint8)
    return scaled


def _of_array(values: np.ndarray) -> Image.Image:
    if values.dtype == np.uint16:
        values = _eight_bit(values, "the array")
    if values.dtype != np.uint8 or values.ndim not in (2, 3) or values.size == 0:
        raise ImageError(
            f"an array of {values.dtype} and shape {values.shape} is no image: give uint8 or uint16, (row, col) or "
            "(row, col, channel); shares of 1 are levels as (array * 255).astype('uint8')"
        )
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim == 3 and values.shape[2] not in (2, 3, 4):
        raise ImageError(f"it has {values.shape[2]} channels; the channel comes last")
    return Image.fromarray(np.ascontiguousarray(values))


def _of_uri(text: str) -> bytes:
    head, _, data = text.partition(",")
    found = _of_base64(data) if head.endswith(";base64") else None
    if found is None:
        raise ImageError(f"the image in the URI {head[:60]!r} cannot be read: it is not base64")
    return found


def _of_base64(text: str) -> bytes | None:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        return None


def _fetched(url: str, allowed: bool) -> bytes:
    if not allowed:
        raise ImageError(f"{url[:200]} lies on the network, which is asked only with fetch=True; or download it first")
    from urllib.error import URLError
    from urllib.request import urlopen

    try:
        with urlopen(url, timeout=_TIMEOUT) as reply:  # the scheme is http or https
            data: bytes = reply.read(_LARGEST + 1)
    except (URLError, OSError, ValueError) as error:
        raise ImageError(f"{url[:200]} cannot be fetched: {error}") from error
    if len(data) > _LARGEST:
        raise ImageError(f"{url[:200]} is larger than {_LARGEST >> 20} MB, and no image")
    return data


def _is_heic(source: Path | io.BytesIO) -> bool:
    try:
        with io.BytesIO(source.getvalue()) if isinstance(source, io.BytesIO) else source.open("rb") as file:
            head = file.read(12)
    except OSError:
        return False
    return head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")


def _formats() -> list[str]:
    """Of the formats that are pixels, what this Pillow was built with; HEIC where its plugin is installed."""
    Image.init()
    if importlib.util.find_spec("pillow_heif") is not None:
        importlib.import_module("pillow_heif").register_heif_opener()
    return [name for name in (*IMAGE_FORMATS, "HEIF") if name in Image.OPEN]
