"""Photographs put together: one or two cut-out objects on a photograph, with exact masks, questions and answers.

The cut-outs are the photographs among Debian's Tux Paint stamps, named in ``names.txt``; where the background comes
from is up to the caller. A scene is a function of its random generator alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

WIDTH, HEIGHT = 576, 448
"""Size of a scene in pixels."""
MIRROR, BICUBIC = Image.Transpose.FLIP_LEFT_RIGHT, Image.Resampling.BICUBIC


@dataclass(frozen=True)
class Name:
    """A word of the vocabulary, the coarse group it belongs to, and what it names."""

    word: str
    group: str
    classes: tuple[int, ...]
    stems: tuple[str, ...]


def names(path: Path | None = None) -> list[Name]:
    """Return the vocabulary of ``names.txt``; a word may stand on several lines."""
    found = []
    for line in (path or Path(__file__).with_name("names.txt")).read_text().splitlines():
        if line.startswith("#"):
            continue
        group, word, classes, stems = (part.strip() for part in line.split("|"))
        ranges = [part.partition("-") for part in classes.split()]
        numbers = [number for first, _, last in ranges for number in range(int(first), int(last or first) + 1)]
        found.append(Name(word, group, tuple(numbers), tuple(stems.split())))
    return found


@dataclass(frozen=True)
class CutOut:
    """An object with transparent surroundings."""

    stem: str
    word: str
    image: Image.Image


def cut_outs(folder: Path, vocabulary: Iterable[Name]) -> list[CutOut]:
    """Return the named cut-outs under a folder, cropped to what is opaque and at most `HEIGHT` pixels large."""
    words = {stem: name.word for name in vocabulary for stem in name.stems}
    found = []
    for path in sorted(folder.rglob("*.png")):
        if path.stem in words and not {"cartoon", "seasonal"} & set(path.parts):
            image = Image.open(path).convert("RGBA")
            image = image.crop(image.getchannel("A").getbbox())
            image.thumbnail((HEIGHT, HEIGHT))
            found.append(CutOut(path.stem, words[path.stem], image))
    return found


@dataclass(frozen=True)
class Placed:
    """An object of a scene: its word, where it stands ("" when alone) and its mask, ``(HEIGHT, WIDTH)`` bool."""

    stem: str
    word: str
    place: str
    mask: np.ndarray


@dataclass(frozen=True)
class Scene:
    """An image and the one or two objects on it."""

    image: Image.Image
    objects: tuple[Placed, ...]


def compose(rng: random.Random, objects: Sequence[CutOut], backgrounds: Sequence[Image.Image]) -> Scene:
    """Put one or two objects on a part of a background, which is softened as by a lens.

    Two wide objects stand one above the other, others side by side; they do not overlap.
    """
    image = _background(rng, rng.choice(backgrounds))
    edge = 4
    right, low = WIDTH - edge, HEIGHT - edge
    if len(objects) == 1:
        side = rng.randint(HEIGHT * 3 // 4, HEIGHT - 2 * edge)
        x, y = rng.randint(edge, right - side), rng.randint(edge, low - side)
        places = {"": (x, y, x + side, y + side)}
    elif sum(cut.image.width / cut.image.height for cut in objects) > 3:
        middle = HEIGHT // 2
        places = {"top": (edge, edge, right, middle - edge), "bottom": (edge, middle + edge, right, low)}
    else:
        middle = WIDTH // 2
        places = {"left": (edge, edge, middle - edge, low), "right": (middle + edge, edge, right, low)}
    placed = []
    for cut, (place, box) in zip(objects, places.items(), strict=True):
        placed.append(Placed(cut.stem, cut.word, place, _paste(rng, image, cut.image, box)))
    return Scene(image, tuple(placed))


def _background(rng: random.Random, photograph: Image.Image) -> Image.Image:
    width = rng.uniform(0.6, 1) * min(photograph.width, photograph.height * WIDTH / HEIGHT)
    height = width * HEIGHT / WIDTH
    x, y = rng.uniform(0, photograph.width - width), rng.uniform(0, photograph.height - height)
    part = photograph.resize((WIDTH, HEIGHT), BICUBIC, (x, y, x + width, y + height)).convert("RGB")
    part = part.filter(ImageFilter.GaussianBlur(rng.uniform(2, 9)))
    return part.transpose(MIRROR) if rng.random() < 0.5 else part


def _paste(rng: random.Random, image: Image.Image, cut: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
    x0, y0, x1, y1 = box
    scale = min((x1 - x0) / cut.width, (y1 - y0) / cut.height) * rng.uniform(0.85, 1)
    cut = cut.resize((max(1, int(cut.width * scale)), max(1, int(cut.height * scale))), BICUBIC)
    if rng.random() < 0.5:
        cut = cut.transpose(MIRROR)
    x, y = rng.randint(x0, x1 - cut.width), rng.randint(y0, y1 - cut.height)
    image.paste(cut, (x, y), cut)
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y : y + cut.height, x : x + cut.width] = np.asarray(cut.getchannel("A")) >= 128
    return mask


def with_article(word: str) -> str:
    """Return the word with "a" or "an"."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def questions(objects: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the questions of a scene and their answers, from the word and place of each object."""
    words = [with_article(word) for word, _ in objects]
    asked = []
    if len(objects) == 1:
        return [("What is in the picture?", f"The picture shows {words[0]}.")]
    for (_, place), word in zip(objects, words, strict=True):
        preposition = "on" if place in ("left", "right") else "at"
        asked.append((f"What is {preposition} the {place}?", f"{word[0].upper()}{word[1:]}."))
    return [*asked, ("What is in the picture?", f"The picture shows {words[0]} and {words[1]}.")]
