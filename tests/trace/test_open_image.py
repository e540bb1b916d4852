"""Every road opens an image as transformers' own loader does, where that is right; and says what is not shown."""

from __future__ import annotations

import base64
import gc
import importlib.util
import io
import struct
import threading
import warnings
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import tiny_models
from PIL import Image
from transformers.image_utils import load_image

import lvlm_probe as probe
from lvlm_probe.trace.image_files import encode_image, is_constant, open_image

PICTURE = tiny_models.picture()


def file_of(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def enormous() -> bytes:
    """A PNG of a few bytes that says it has 20,000 × 20,000 pixels."""
    data = file_of(Image.new("L", (1, 1)), "PNG")
    header = b"IHDR" + struct.pack(">II", 20_000, 20_000) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def oriented(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return file_of(PICTURE, "JPEG", exif=exif, quality=95)


@pytest.mark.quick
@pytest.mark.parametrize("number", range(1, 9))
def test_a_photograph_stands_upright_as_transformers_turns_it(number, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(oriented(number))
    wanted = np.asarray(load_image(str(path)))
    for source in (path, str(path), path.read_bytes(), Image.open(path)):
        found = open_image(source)
        assert found.mode == "RGB"
        assert np.array_equal(np.asarray(found), wanted)
    assert (open_image(path).size == PICTURE.size) == (number < 5)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_levels_are_scaled(kind):
    levels = np.linspace(0, 65535, 90 * 60).reshape(60, 90)
    image = Image.fromarray(levels.astype(np.uint16))
    found = np.asarray(open_image(file_of(image, kind)))[..., 0].astype(float)
    assert np.abs(found - levels / 257).max() <= 0.51
    assert found.std() > 70  # Pillow's own conversion gives white
    assert np.array_equal(np.asarray(open_image(levels.astype(np.uint16)))[..., 0], found)


@pytest.mark.parametrize("kind", ["array", "PNG", "TIFF"])
def test_16_bits_that_hold_fewer(kind):
    """8-bit levels are those, as they are in 32 bits; of 12 or 14 nobody can tell, so that they are told."""
    levels = np.asarray(PICTURE.convert("L")).astype(np.uint16)

    def opened(values):
        return np.asarray(open_image(values if kind == "array" else file_of(Image.fromarray(values), kind)))[..., 0]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(opened(levels), levels)
        assert np.array_equal(opened(levels * 257), levels)
    for bits in (12, 14):
        with pytest.warns(probe.ProbeWarning, match="shown a dark image"):
            assert opened(levels << (bits - 8)).max() < 64


def test_numbers_of_other_modes():
    shares = Image.fromarray(np.linspace(0, 1, 100, dtype=np.float32).reshape(10, 10))
    assert np.asarray(open_image(shares)).max() == 255
    levels = Image.fromarray(np.arange(100, dtype=np.int32).reshape(10, 10))
    assert np.asarray(open_image(levels)).max() == 99
    with pytest.raises(probe.errors.ImageError, match="scale it to"):
        open_image(Image.fromarray(np.full((4, 4), -3, dtype=np.int32)))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "YCbCr", "LAB"])
def test_modes_without_transparency_are_what_pillow_makes_of_them(mode):
    image = PICTURE.convert("RGB") if mode == "LAB" else PICTURE.convert(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(np.asarray(open_image(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16", "I;16B", "I;16L", "I;16N"]
)
def test_one_colour_is_told_in_every_mode(mode):
    """Some of these Pillow keeps and does not compute with; the question must never cost a recording."""
    image = Image.new(mode, (4, 4))
    assert is_constant(image)
    image.putpixel((1, 2), 1 if len(image.getbands()) == 1 else tuple([1] * len(image.getbands())))
    assert not is_constant(image)


def test_what_is_not_shown_is_said():
    clear = PICTURE.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    with pytest.warns(probe.ProbeWarning, match="transparent"):
        found = open_image(file_of(clear, "PNG"))
    assert np.array_equal(np.asarray(found), np.asarray(load_image(clear)))
    opaque = PICTURE.convert("RGBA")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_image(file_of(opaque, "PNG"))
    frames = [tiny_models.picture(seed=seed) for seed in range(3)]
    with pytest.warns(probe.ProbeWarning, match="3 frames"):
        first = open_image(file_of(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True))
    assert np.array_equal(np.asarray(first), np.asarray(frames[0]))
    later = Image.open(io.BytesIO(file_of(frames[0], "TIFF", save_all=True, append_images=frames[1:])))
    later.seek(2)
    with pytest.warns(probe.ProbeWarning, match="number 2, counted from 0, is shown"):
        assert np.array_equal(np.asarray(open_image(later)), np.asarray(frames[2]))
    with pytest.warns(probe.ProbeWarning, match="same colour"):
        open_image(Image.new("RGB", (8, 8), (9, 9, 9)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000"])
def test_kinds_of_files(kind):
    data = file_of(PICTURE, kind)
    found = np.asarray(open_image(data)).astype(int)
    assert np.abs(found - np.asarray(PICTURE).astype(int)).mean() < 12
    assert np.array_equal(np.asarray(open_image(data)), np.asarray(load_image(Image.open(io.BytesIO(data)))))


def test_texts_that_are_images():
    data = file_of(PICTURE, "PNG")
    text = base64.b64encode(data).decode()
    for source in (f"data:image/png;base64,{text}", text, "\n".join(text[i : i + 76] for i in range(0, len(text), 76))):
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(PICTURE))


def test_the_network_is_asked_where_it_may_be():
    data = file_of(PICTURE, "PNG")

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if self.path == "/image.png" else 404)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_args):
            pass

    asked: list[str] = []
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            with pytest.raises(probe.errors.ImageError, match="fetch=True"):
                open_image(f"{url}/image.png")
            assert asked == []
            assert np.array_equal(np.asarray(open_image(f"{url}/image.png", fetch=True)), np.asarray(PICTURE))
            with pytest.raises(probe.errors.ImageError, match="404"):
                open_image(f"{url}/none.png", fetch=True)
        finally:
            server.shutdown()
            thread.join()
    with pytest.raises(probe.errors.ImageError, match="cannot be fetched"):
        open_image(f"{url}/image.png", fetch=True)  # nobody there any more


def test_the_source_is_left_alone_and_a_file_of_the_users_is_kept_as_it_is(tmp_path):
    own = PICTURE.copy()
    found = open_image(own)
    found.putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(np.asarray(own), np.asarray(PICTURE))
    path = tmp_path / "photo.jpg"
    path.write_bytes(oriented(1))
    assert encode_image(open_image(path)) == (path.read_bytes(), "image/jpeg")
    path.write_bytes(oriented(6))
    data, mime = encode_image(open_image(path))
    assert mime == "image/png" and Image.open(io.BytesIO(data)).size == PICTURE.size[::-1]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (b"", "0 bytes is not an image"),
        ("", "no image at"),
        ("A" * 400, "is not an image"),
        ("/" + "ä" * 400, "no such file"),
        ("data:image/png,abc", "not base64"),
        ("data:image/png;base64,////", "is not an image"),
        (3, "got a int"),
        (np.zeros((2, 2), np.float64), r"float64 and shape \(2, 2\) is no image: give uint8 .* \(array \* 255\)"),
        (np.zeros((3, 8, 8), np.uint8), "8 channels; the channel comes last"),
        (np.zeros((0, 8), np.uint8), "uint8"),
        pytest.param(enormous(), r"exceeds limit.*; make it smaller", id="enormous"),
    ],
)
def test_what_is_no_image(source, said):
    with pytest.raises(probe.errors.ImageError, match=said) as error:
        open_image(source)
    assert len(str(error.value)) < 500


def test_a_file_that_is_no_image_is_closed(tmp_path):
    path = tmp_path / "photo.png"
    path.write_text("none")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(probe.errors.ImageError, match="give a PNG"):
            open_image(path)
        gc.collect()
    assert not [one for one in said if one.category is ResourceWarning]


@pytest.mark.skipif(importlib.util.find_spec("pillow_heif") is not None, reason="pillow-heif is installed")
def test_heic_names_its_extra(tmp_path):
    path = tmp_path / "phone.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(400))
    with pytest.raises(probe.errors.ImageError, match=r"lvlm-probe\[heic\]"):
        open_image(path)
