"""Pictures to files and back."""

from __future__ import annotations

import io

import numpy as np
import pytest
import tiny_models
from PIL import Image

import lvlm_probe as probe
from lvlm_probe.trace.image_files import encode_image, open_image_file


@pytest.mark.quick
def test_the_users_own_file_is_kept(tmp_path):
    path = tmp_path / "photo.jpg"
    tiny_models.picture().save(path, quality=80)
    data, mime = encode_image(Image.open(path))
    assert data == path.read_bytes() and mime == "image/jpeg"


def test_a_file_that_changed_since_is_not(tmp_path):
    path = tmp_path / "photo.png"
    tiny_models.picture(seed=1).save(path)
    image = Image.open(path)
    image.load()
    tiny_models.picture(seed=2).save(path)
    data, mime = encode_image(image)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(tiny_models.picture(seed=1)))
    assert mime == "image/png"


def test_colours_that_changed_since_are_kept(tmp_path):
    """The numbers of the pixels are those of the file."""
    path = tmp_path / "palette.png"
    tiny_models.picture().quantize(8).save(path)
    image = Image.open(path)
    assert encode_image(image)[0] == path.read_bytes()
    image.putpalette([255 - level for level in image.getpalette()])
    stored = Image.open(io.BytesIO(encode_image(image)[0]))
    assert np.array_equal(np.asarray(stored.convert("RGB")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK"])
def test_pixels_survive(mode):
    image = tiny_models.picture().convert(mode)
    stored = Image.open(io.BytesIO(encode_image(image)[0]))
    assert np.array_equal(np.asarray(stored.convert("RGB")), np.asarray(image.convert("RGB")))


def test_what_is_no_picture(tmp_path):
    with pytest.raises(probe.errors.ImageError, match="no such file"):
        open_image_file(tmp_path / "none.png")
    with pytest.raises(probe.errors.ImageError, match="directory"):
        open_image_file(tmp_path)
    text = tmp_path / "text.png"
    text.write_text("hello")
    with pytest.raises(probe.errors.ImageError, match="not an image"):
        open_image_file(text)
