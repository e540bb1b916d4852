"""Trains the demo model that ships in ``lvlm_probe/demo``: a small LLaVA that answers questions about synthetic scenes.

    OMP_WAIT_POLICY=passive python examples/train_demo_model.py --out lvlm_probe/demo/checkpoint

The model is an unmodified ``LlavaForConditionalGeneration`` (CLIP tower, two-layer projector, Llama decoder) with about
a million parameters. It is trained in four stages:

1. the vision tower alone, on the shape and colour of the object under every patch (a throw-away linear head);
2. everything, on questions about clear pictures: first one or two objects, then up to three, then three to five;
3. everything, with part of the pictures blended with a blurred, flat, black or noisy version of themselves through
   random masks, and with questions about objects that are not there. What cannot be seen is answered "hidden", so that
   masked pictures are in distribution and a blurred picture takes their probability from the words it decides;
4. the same on fresh scenes with more objects alike, half of the questions being about their number, learnt last of all.
   It starts from the checkpoint that stage 3 has written, so ``--count-only`` does exactly what a whole run does.

All questions about a picture share one sequence: the picture's tokens come once, then every question with its answer as
a block that attends to the picture and to itself. In part of the blocks the words in the answer's slots are replaced by
others on the input side, while the targets stay: each slot must be read off the picture, not off the slot before it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip import image_processing_pil_clip

from lvlm_probe.demo import questions
from lvlm_probe.demo import scene as sc
from lvlm_probe.demo.drawing import render

IMAGE_SIDE = 112
PATCH = 14
GRID = IMAGE_SIDE // PATCH
IMAGE_TOKENS = GRID * GRID
SCENE_SIDE = 336
HIDDEN = 128
PREFIX = 2 + IMAGE_TOKENS  # <s> <user> <image> * 64
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<user>", "<assistant>")

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<user>{% elif message['role'] == 'assistant' %}<assistant>{% endif %}"
    "{% if message['role'] != 'system' %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

WORDS = (
    "What color is the are and shape a object How many there Where in I count The In hidden part no one two three four "
    "five top bottom left right red green cyan blue circle square star cross heart"
)
"""The words that are one piece each."""

PIECES = "▁tri angle ▁yel low ▁pur ple es . ? ,"
"""The other pieces of more than a character, and the punctuation."""

KIND_WEIGHTS = {"colour": 0.13, "shape": 0.16, "count": 0.24, "where": 0.19, "pair": 0.10, "cell": 0.18}
COUNTING_WEIGHTS = {"colour": 0.09, "shape": 0.10, "count": 0.50, "where": 0.13, "pair": 0.08, "cell": 0.10}
NUMBER_WEIGHTS = (0.0, 0.3, 0.7, 2.0, 2.5, 2.5)
"""How often a picture is asked about a group of that many objects, against its other groups: large ones are rare."""


def build_tokenizer(
    words: str = WORDS,
    others: str = PIECES,
    special: Sequence[str] = SPECIAL,
    places: Mapping[str, str] = MappingProxyType({"image_token": "<image>"}),
) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer over the scenes' words.

    Three long words and the plurals have two pieces; all else falls to characters. `places` names the tokens, of those
    in `special`, that stand for images or videos.
    """
    pieces = ["▁" + word for word in dict.fromkeys(words.split())] + others.split()
    characters = [c for c in map(chr, range(33, 127)) if c not in ".?,<>|{}[]\\^`~_"] + ["▁", "\n"]
    vocabulary = [(token, 0.0) for token in special] + [(piece, -2.0) for piece in pieces]
    vocabulary += [(character, -12.0) for character in characters]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=special.index("<unk>")))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={**places, "user_token": "<user>", "assistant_token": "<assistant>"},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_processor(
    tokenizer: PreTrainedTokenizerFast | None = None, *, side: int = IMAGE_SIDE, patch: int = PATCH
) -> LlavaProcessor:
    """The processor of the released LLaVA models, at this model's picture size."""
    image_processor = image_processing_pil_clip.CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer or build_tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    side: int = IMAGE_SIDE,
    patch: int = PATCH,
    hidden: int = HIDDEN,
    layers: int = 3,
) -> LlavaForConditionalGeneration:
    """The untrained model, initialised so that so small a tower, of that many layers, sees positions from the start."""
    vision = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=side,
        patch_size=patch,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(side // patch) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.no_grad():
        tower = model.model.vision_tower
        table = next(p for name, p in tower.named_parameters() if name.endswith("position_embedding.weight"))
        table.copy_(torch.cat([torch.zeros(1, hidden), sincos_table(side // patch, hidden)]))
        for name, parameter in tower.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(2)
    return model


def sincos_table(grid: int = GRID, hidden: int = HIDDEN, std: float = 0.2) -> Tensor:
    """Two-dimensional sine-cosine positions of `grid` × `grid` patches, ``(patch, hidden)``, scaled to standard
    deviation `std`."""
    quarter = hidden // 4
    frequency = 1.0 / 30 ** (torch.arange(quarter) / quarter)
    angle = torch.arange(grid)[:, None] * frequency
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)
    table = torch.cat([wave[:, None].expand(grid, grid, -1), wave[None].expand(grid, grid, -1)], dim=2).reshape(
        grid * grid, hidden
    )
    return (table - table.mean(0)) / table.std() * std


@dataclass
class Pool:
    """Scenes drawn once, at model size. `pixels` ``(n, 112, 112, 3)`` uint8, `labels` ``(n, 112, 112)`` int8."""

    pixels: np.ndarray
    labels: np.ndarray
    layouts: list[questions.Layout]

    @staticmethod
    def draw(split: str, n: int, *, objects: tuple[int, int], offset: int, workers: int, grouped: float = 0.5) -> Pool:
        """Draws scenes ``offset .. offset + n`` of seed 0 of a split, in `workers` processes.

        A share `grouped` of them has two to four objects alike.
        """
        step = 250
        chunks = [range(i, min(i + step, offset + n)) for i in range(offset, offset + n, step)]
        jobs = [(split, objects, grouped, chunk) for chunk in chunks]
        if workers > 1:
            with ProcessPoolExecutor(workers) as executor:
                parts = list(executor.map(_draw_part, jobs))
        else:
            parts = [_draw_part(job) for job in jobs]
        return Pool(
            np.concatenate([part[0] for part in parts]),
            np.concatenate([part[1] for part in parts]),
            [layout for part in parts for layout in part[2]],
        )


def _draw_part(job: tuple[str, tuple[int, int], float, range]) -> tuple[np.ndarray, np.ndarray, list[questions.Layout]]:
    split, objects, grouped, indices = job
    pixels, labels, layouts = [], [], []
    for index in indices:
        rng = sc.scene_rng(split, 0, index)
        group = int(rng.choice((2, 3, 4), p=(0.2, 0.4, 0.4))) if objects[1] > 3 and rng.random() < grouped else None
        layout = sc.draw_layout(rng, objects=objects, group=group)
        picture, label = draw_small(layout)
        pixels.append(picture)
        labels.append(label)
        layouts.append(layout)
    return np.stack(pixels), np.stack(labels), layouts


def draw_small(layout: questions.Layout) -> tuple[np.ndarray, np.ndarray]:
    """The layout's picture and label map at the model's size, by way of the size at which scenes are drawn."""
    from PIL import Image

    image, label = render(layout, (SCENE_SIDE, SCENE_SIDE))
    ratio = SCENE_SIDE // IMAGE_SIDE
    picture = np.asarray(image.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC))
    return picture, label[ratio // 2 :: ratio, ratio // 2 :: ratio]


@dataclass
class Example:
    """One question with, per slot, whether the objects that decide it can be seen."""

    query: questions.Query
    seen: tuple[bool, ...]


class Writer:
    """Turns examples into token ids and targets."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.pieces: Callable[[str], tuple[int, ...]] = lru_cache(maxsize=2**16)(self._pieces)
        self.assistant = tokenizer.convert_tokens_to_ids("<assistant>")
        self.eos = tokenizer.eos_token_id

    def _pieces(self, word: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(word, add_special_tokens=False))

    def write(
        self, example: Example, *, swap: np.random.Generator | None = None
    ) -> tuple[list[int], list[int], list[bool]]:
        """Returns the block's ids, the target of each position (-100 for none), and which targets open a slot's word.

        With `swap`, the words in the slots are replaced by random ones on the input side.
        """
        query = example.query
        if swap is not None and query.kind == "count":
            noun = tuple(query.question.removeprefix("How many ").removesuffix(" are there?").split())
            plural = " ".join(noun)
            singular = plural.removesuffix("es") if plural.endswith("crosses") else plural.removesuffix("s")
            number = int(swap.integers(1, len(questions.NUMBERS)))
            drawn = questions.count_query((singular, plural), number, ())
            given, template = list(drawn.words), drawn.template
        elif swap is not None:
            given = [str(swap.choice(questions.DOMAINS[domain])) for domain in query.domains]
            template = query.template
        elif not any(example.seen):
            given, template = [], query.hidden_template
        else:
            given = [w if s else h for w, s, h in zip(query.words, example.seen, query.hidden_words, strict=True)]
            template = query.template
        true = [w if s else h for w, s, h in zip(query.words, example.seen, query.hidden_words, strict=True)]

        ids = [piece for word in query.question.split() for piece in self.pieces(word)] + [self.assistant]
        targets, opens = [-100] * (len(ids) - 1), [False] * (len(ids) - 1)
        slot = 0
        for word in template.split():
            if "{}" in word and given:
                pieces = self.pieces(word.format(given[slot]))
                ids += pieces
                targets += [self.pieces(true[slot])[0], *pieces[1:]]
                opens += [True] + [False] * (len(pieces) - 1)
                slot += 1
            else:
                pieces = self.pieces(word)
                ids += pieces
                targets += pieces
                opens += [False] * len(pieces)
        ids.append(self.eos)
        targets += [self.eos, -100]
        opens += [False, False]
        return ids, targets, opens


class Asker:
    """Draws questions about a layout of which only some objects can be seen."""

    queries = staticmethod(questions.queries)

    def __init__(self, rng: np.random.Generator, *, absent: float, weights: dict[str, float]) -> None:
        self.rng = rng
        self.absent = absent
        self.kinds = list(weights)
        self.weights = np.asarray([weights[kind] for kind in self.kinds])
        self.weights /= self.weights.sum()

    def ask(self, layout: questions.Layout, visibility: np.ndarray) -> Iterator[Example]:
        """Examples without end, or none when nothing can be asked. `visibility` is ``(objects,)`` in 0..1."""
        by_kind: dict[str, list[questions.Query]] = {kind: [] for kind in self.kinds}
        for query in self.queries(layout):
            by_kind[query.kind].append(query)
        for kind in itertools.islice(self._draw_kinds(), 60):
            if self.rng.random() < self.absent:
                example = self._absent(kind, layout, by_kind[kind], visibility)
            else:
                example = self._present(by_kind[kind], visibility)
            if example is not None:
                yield example

    def _draw_kinds(self) -> Iterator[str]:
        while True:
            for index in self.rng.choice(len(self.kinds), 16, p=self.weights):
                yield self.kinds[index]

    def _present(self, options: list[questions.Query], visibility: np.ndarray) -> Example | None:
        if not options:
            return None
        if options[0].kind == "count":
            weights = np.asarray([NUMBER_WEIGHTS[len(query.targets[0])] for query in options])
            return self._count(options[int(self.rng.choice(len(options), p=weights / weights.sum()))], visibility)
        query = options[int(self.rng.integers(len(options)))]
        states = [self._state(query.domains[i], targets, visibility) for i, targets in enumerate(query.targets)]
        if query.kind in ("where", "cell"):
            states = [states[-1]] * len(states)
        if any(state is None for state in states):
            return None
        return Example(query, tuple(bool(state) for state in states))

    @staticmethod
    def _state(domain: str, targets: tuple[int, ...], visibility: np.ndarray) -> bool | None:
        """True when the objects can be seen well enough for such a slot, False when not at all, None between."""
        seen = visibility[list(targets)]
        if (seen >= (0.70 if domain == "shape" else 0.55)).all():
            return True
        return False if (seen <= 0.25).all() else None

    @staticmethod
    def _count(query: questions.Query, visibility: np.ndarray) -> Example | None:
        seen = visibility[list(query.targets[0])]
        if ((seen > 0.25) & (seen < 0.65)).any():
            return None
        number = int((seen >= 0.65).sum())
        if number == 0:
            return Example(query, (False,))
        plural = query.question.removeprefix("How many ").removesuffix(" are there?")
        singular = plural.removesuffix("es") if plural.endswith("crosses") else plural.removesuffix("s")
        return Example(questions.count_query((singular, plural), number, query.targets[0]), (True,))

    def _pick(self, words: Sequence[str]) -> str | None:
        return words[int(self.rng.integers(len(words)))] if words else None

    def _absent(
        self, kind: str, layout: questions.Layout, options: list[questions.Query], visibility: np.ndarray
    ) -> Example | None:
        """A question about something that is not in the picture."""
        shapes = [s for s in questions.SHAPES if all(item.shape != s for item in layout.items)]
        colours = [c for c in questions.COLOURS if all(item.colour != c for item in layout.items)]
        shape, colour = self._pick(shapes), self._pick(colours)
        if kind == "colour" and shape:
            return Example(questions.colour_query(shape, "red", ()), (False,))
        if kind == "shape" and colour:
            return Example(questions.shape_query(colour, "star", ()), (False,))
        if kind == "count" and shape and colour:
            noun = (
                (shape, questions.plural(shape))
                if self.rng.random() < 0.5
                else (f"{colour} object", f"{colour} objects")
            )
            return Example(questions.count_query(noun, 2, ()), (False,))
        if kind == "where":
            there = layout.items[int(self.rng.integers(len(layout.items)))]
            near = there.colour if self.rng.random() < 0.5 else self._pick(questions.COLOURS)
            other = self._pick(questions.SHAPES) if near == there.colour else there.shape
            if any((item.colour, item.shape) == (near, other) for item in layout.items):
                return None
            return Example(questions.where_query(str(near), str(other), "top", "left", ()), (False, False))
        if kind == "pair" and options and shape:
            query = options[int(self.rng.integers(len(options)))]
            first = query.question.removeprefix("What color are the ").split()[0]
            state = self._state("colour", query.targets[0], visibility)
            if state is None:
                return None
            if self.rng.random() < 0.5:
                given = questions.pair_query((first, shape), (query.words[0], "red"), (query.targets[0], ()))
                return Example(given, (state, False))
            given = questions.pair_query((shape, first), ("red", query.words[0]), ((), query.targets[0]))
            return Example(given, (False, state))
        if kind == "cell":
            row, column = questions.ROWS[int(self.rng.integers(2))], questions.COLUMNS[int(self.rng.integers(2))]
            if any(item.row in (row, None) and item.column in (column, None) for item in layout.items):
                return None
            return Example(questions.cell_query(row, column, "red", "star", ()), (False, False))
        return None


class Veil:
    """Blends pictures with pictures of nothing, as an explainer's masks do."""

    def __init__(self, rng: np.random.Generator, side: int = IMAGE_SIDE) -> None:
        self.rng = rng
        self.side = side
        centres = (np.arange(side, dtype=np.float32) + 0.5) / side
        self.ys, self.xs = np.meshgrid(centres, centres, indexing="ij")

    def mask(self, layout: questions.Layout) -> np.ndarray:
        """How much of the picture shows, ``(112, 112)`` float32 in 0..1."""
        rng = self.rng
        way = rng.choice(5, p=[0.20, 0.12, 0.33, 0.25, 0.10])
        full = np.ones((IMAGE_SIDE, IMAGE_SIDE), dtype=np.float32)
        if way == 0:
            return full * 0
        if way == 1:
            return full * float(rng.random())
        if way == 2:
            return self._grid()
        discs = full * 0
        chosen = rng.random(len(layout.items)) < rng.uniform(0.2, 0.8)
        grow, soft = rng.uniform(1.0, 1.5), rng.uniform(0.004, 0.05)
        for item, taken in zip(layout.items, chosen, strict=True):
            if taken:
                distance = np.hypot(self.xs - item.x, self.ys - item.y)
                discs = np.maximum(discs, 1 / (1 + np.exp(np.clip((distance - grow * item.radius) / soft, -30, 30))))
        if way == 3:
            return discs if rng.random() < 0.5 else 1 - discs
        low, high = sorted(rng.random(2))
        return (low + (high - low) * (discs if rng.random() < 0.5 else 1 - discs)).astype(np.float32)

    def _grid(self) -> np.ndarray:
        rng = self.rng
        side = int(rng.choice([4, 6, 8, 12, 16, 28, 32]))
        cells = torch.from_numpy(rng.random((1, 1, side, side)).astype(np.float32))
        way = rng.choice(3)
        if way == 0:
            cells = (cells < float(rng.uniform(0.1, 0.9))).float()
        elif way == 1:
            cells = cells ** float(np.exp(rng.uniform(-1.5, 1.5)))
        else:
            rough = F.interpolate(cells, size=(5, 5), mode="area") + 0.15 * (cells.mean() - 0.5)
            smooth = F.interpolate(rough, size=(side, side), mode="bicubic", align_corners=True)
            cells = torch.sigmoid((smooth - float(rng.uniform(0.35, 0.65))) * float(np.exp(rng.uniform(1.5, 4.5))))
            cells = cells + float(rng.choice([0.0, 0.1, 0.2])) * torch.from_numpy(
                rng.standard_normal((1, 1, side, side)).astype(np.float32)
            )
        mode = "nearest" if rng.random() < 0.25 else "bilinear"
        return F.interpolate(cells.clamp(0, 1), size=(self.side, self.side), mode=mode)[0, 0].numpy()

    def baseline(self, pixels: np.ndarray) -> np.ndarray:
        """A version of ``(side, side, 3)`` float32 pixels in which nothing can be seen."""
        rng = self.rng
        way = rng.choice(5, p=[0.60, 0.12, 0.08, 0.08, 0.12])
        if way == 0:
            return blur(
                pixels, float(np.exp(rng.uniform(math.log(0.14), math.log(0.6)))), reflect=bool(rng.integers(2))
            )
        if way == 1:
            return np.broadcast_to(pixels.mean((0, 1)), pixels.shape)
        if way == 2:
            return np.zeros_like(pixels)
        if way == 3:
            return np.broadcast_to(rng.uniform(0, 255, 3).astype(np.float32), pixels.shape)
        noise = rng.standard_normal(pixels.shape).astype(np.float32) * float(rng.uniform(8, 90))
        level = pixels.mean((0, 1)) if rng.random() < 0.5 else np.float32(rng.uniform(60, 190))
        return np.clip(level + noise, 0, 255)


def blur(pixels: np.ndarray, sigma: float, *, reflect: bool) -> np.ndarray:
    """A wide Gaussian blur of ``(side, side, 3)`` pixels; `sigma` is a fraction of the side. Computed on cells of 4x4
    pixels."""
    side = len(pixels) // 4
    coarse = pixels.reshape(side, 4, side, 4, 3).mean((1, 3))
    kernel = blur_matrix(side, round(sigma * side, 2), reflect)
    soft = np.einsum("ij,jkc,lk->cil", kernel, coarse, kernel, optimize=True)
    grown = F.interpolate(torch.from_numpy(np.ascontiguousarray(soft))[None], size=len(pixels), mode="bilinear")
    return grown[0].permute(1, 2, 0).numpy()


@lru_cache(maxsize=4096)
def blur_matrix(side: int, sigma: float, reflect: bool) -> np.ndarray:
    reach = math.ceil(3 * sigma)
    index = np.arange(side)[:, None] + np.arange(-reach, reach + 1)[None]
    if reflect:
        index = np.abs((index + side) % (2 * side) - side + 0.5).astype(int)
        index = np.clip(index, 0, side - 1)
    else:
        index = np.clip(index, 0, side - 1)
    weight = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    matrix = np.zeros((side, side), dtype=np.float32)
    for row in range(side):
        np.add.at(matrix[row], index[row], weight / weight.sum())
    return matrix


@dataclass
class Batch:
    """One step's tensors: `pixels` ``(b, 3, 112, 112)``, patch targets ``(b, 64)``, the rest ``(b, length)``.

    `block` numbers the questions from 1; it is 0 on the picture and -1 on padding.
    """

    pixels: Tensor
    ids: Tensor
    targets: Tensor
    opens: Tensor
    block: Tensor
    position: Tensor
    patch_shape: Tensor
    patch_colour: Tensor
    kinds: list[list[tuple[str, bool]]] = field(default_factory=list)

    def attention(self) -> Tensor:
        return attention(self.block)


def attention(block: Tensor) -> Tensor:
    """Who attends to whom, ``(b, 1, length, length)`` bool: the picture, and one's own block up to oneself."""
    length = block.shape[1]
    query, key = block[:, :, None], block[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return (causal & ((query == key) | (key == 0)))[:, None]


class Loader:
    """Makes batches out of a pool."""

    asker: type[Asker] = Asker

    def __init__(
        self,
        pool: Pool,
        writer: Writer,
        image_processor: Any,
        *,
        seed: int,
        weights: dict[str, float],
        tokens: int = IMAGE_TOKENS,
    ) -> None:
        self.pool = pool
        self.writer = writer
        self.weights = weights
        self.rng = np.random.default_rng(seed)
        self.mean = np.asarray(image_processor.image_mean, dtype=np.float32) * 255
        self.std = np.asarray(image_processor.image_std, dtype=np.float32) * 255
        self.order: list[int] = []
        tokenizer = writer.tokenizer
        user, image = (tokenizer.convert_tokens_to_ids(token) for token in ("<user>", "<image>"))
        self.prefix = [tokenizer.bos_token_id, user] + [image] * tokens

    def _next(self) -> int:
        if not self.order:
            self.order = self.rng.permutation(2 * len(self.pool.layouts)).tolist()
        return self.order.pop()

    def picture(self, veiled: float) -> tuple[np.ndarray, questions.Layout, np.ndarray, np.ndarray]:
        """One picture: ``(112, 112, 3)`` float32 in 0..255, its layout, each object's visibility, the label map."""
        index = self._next()
        flip = index % 2 == 1
        index //= 2
        layout = self.pool.layouts[index]
        pixels, labels = self.pool.pixels[index], self.pool.labels[index]
        if flip:
            layout, pixels, labels = layout.mirrored(), pixels[:, ::-1], labels[:, ::-1]
        pixels = pixels.astype(np.float32)
        visibility = np.ones(len(layout.items))
        if self.rng.random() < veiled:
            veil = Veil(self.rng)
            shown = veil.mask(layout)
            base = veil.baseline(pixels)
            pixels = base + shown[:, :, None] * (pixels - base)
            flat = labels.reshape(-1) + 1
            area = np.bincount(flat, minlength=len(layout.items) + 1)[1:]
            visibility = np.bincount(flat, shown.reshape(-1), minlength=len(layout.items) + 1)[1:] / np.maximum(area, 1)
        return pixels, layout, visibility, labels

    def batch(self, size: int, *, room: int = 0, veiled: float = 0.0, absent: float = 0.0, swap: bool = False) -> Batch:
        """Draws `size` pictures with as many questions as fit in `room` tokens each (0: no text)."""
        asker = self.asker(self.rng, absent=absent, weights=self.weights)
        pictures: list[np.ndarray] = []
        shapes: list[np.ndarray] = []
        colours: list[np.ndarray] = []
        kinds: list[list[tuple[str, bool]]] = []
        start = len(self.prefix)
        length = start + room
        ids = np.zeros((size, length), dtype=np.int64)
        targets = np.full((size, length), -100, dtype=np.int64)
        opens = np.zeros((size, length), dtype=bool)
        block = np.full((size, length), -1, dtype=np.int64)
        position = np.zeros((size, length), dtype=np.int64)
        ids[:, :start] = self.prefix
        block[:, :start] = 0
        position[:, :start] = np.arange(start)
        for row in range(size):
            pixels, layout, visibility, labels = self.picture(veiled)
            pictures.append((pixels - self.mean) / self.std)
            shape, colour = patch_targets(layout, labels, visibility)
            shapes.append(shape)
            colours.append(colour)
            kinds.append([])
            asked: set[str] = set()
            at, number = start, 0
            for example in asker.ask(layout, visibility) if room else ():
                if example.query.question in asked:
                    continue
                swapped = swap and self.rng.random() < (0.15 if all(example.seen) else 0.6)
                piece_ids, piece_targets, piece_opens = self.writer.write(example, swap=self.rng if swapped else None)
                stop = at + len(piece_ids)
                if stop > length:
                    break
                asked.add(example.query.question)
                number += 1
                ids[row, at:stop], targets[row, at:stop], opens[row, at:stop] = piece_ids, piece_targets, piece_opens
                block[row, at:stop] = number
                position[row, at:stop] = np.arange(start, start + len(piece_ids))
                kinds[row].append((example.query.kind, all(example.seen)))
                at = stop
        return Batch(
            pixels=torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy()),
            ids=torch.from_numpy(ids),
            targets=torch.from_numpy(targets),
            opens=torch.from_numpy(opens),
            block=torch.from_numpy(block),
            position=torch.from_numpy(position),
            patch_shape=torch.from_numpy(np.stack(shapes)),
            patch_colour=torch.from_numpy(np.stack(colours)),
            kinds=kinds,
        )


def patch_targets(
    layout: questions.Layout, labels: np.ndarray, visibility: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Shape and colour of the object under each patch, ``(64,)`` each: 0 for none, -100 for too little to tell."""
    n = len(layout.items)
    cells = labels.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(IMAGE_TOKENS, -1)
    share = np.stack([(cells == i).mean(1) for i in range(n)], axis=1)
    best = share.argmax(1)
    most = share.max(1)
    shape = np.asarray([1 + questions.SHAPES.index(item.shape) for item in layout.items])[best]
    colour = np.asarray([1 + questions.COLOURS.index(item.colour) for item in layout.items])[best]
    dim = (visibility[best] < 0.6) & (most >= 0.03)
    for values in (shape, colour):
        values[most < 0.03] = 0
        values[((most >= 0.03) & (most < 0.2)) | dim] = -100
    return shape, colour


class Net(nn.Module):
    """The training view of the model: picture and text in, decoder states and patch logits out."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.llava = model
        self.head = nn.Linear(HIDDEN, 2 + len(questions.SHAPES) + len(questions.COLOURS))

    @property
    def lm_head(self) -> nn.Module:
        return self.llava.lm_head

    def patches(self, pixels: Tensor) -> Tensor:
        """Output of the vision tower for the patches, ``(b, 64, 128)``."""
        return self.llava.model.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]

    def states(self, patches: Tensor, ids: Tensor, mask: Tensor, position: Tensor) -> Tensor:
        """The decoder's last states, ``(b, length, 128)``."""
        embedded = self.llava.get_input_embeddings()(ids)
        image = self.llava.model.multi_modal_projector(patches)
        embedded = torch.cat([embedded[:, :2], image, embedded[:, PREFIX:]], dim=1)
        return self.llava.model.language_model(
            inputs_embeds=embedded, attention_mask=mask, position_ids=position, use_cache=False
        ).last_hidden_state

    def patch_loss(self, patches: Tensor, batch: Batch) -> tuple[Tensor, float]:
        """Loss on the patches' shape and colour, and the share of object patches whose shape is right."""
        logits = self.head(patches).flatten(0, 1)
        shape, colour = logits[:, : 1 + len(questions.SHAPES)], logits[:, 1 + len(questions.SHAPES) :]
        on_shape, on_colour = batch.patch_shape.flatten(), batch.patch_colour.flatten()
        loss = F.cross_entropy(shape, on_shape) + F.cross_entropy(colour, on_colour)
        objects = on_shape > 0
        right = (shape.detach().argmax(1)[objects] == on_shape[objects]).float().mean()
        return loss, float(right)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        patches = self.patches(batch.pixels)
        return patches, self.states(patches, batch.ids, batch.attention(), batch.position)

    def answer_loss(self, states: Tensor, batch: Batch) -> Tensor:
        wanted = batch.targets >= 0
        return answer_loss(self.lm_head(states[wanted]), batch.targets[wanted], batch.opens[wanted])


def answer_loss(logits: Tensor, targets: Tensor, opens: Tensor) -> Tensor:
    """Cross entropy over all answer positions, those that open a slot's word counting four times."""
    each = F.cross_entropy(logits, targets, reduction="none")
    weight = torch.where(opens, 1.0, 0.25)
    return (each * weight).sum() / weight.sum()


@torch.no_grad()
def held_out(
    net: Any, loader: Any, *, batches: int, room: int = 150, veiled: float = 0.0, absent: float = 0.0
) -> dict[str, float]:
    """Share of answers whose every token is the most probable one, per kind; ``!kind`` for what cannot be seen."""
    net.eval()
    right: dict[str, list[bool]] = {}
    for _ in range(batches):
        batch = loader.batch(32, room=room, veiled=veiled, absent=absent)
        _, states = net(batch)
        predicted = net.lm_head(states).argmax(-1)
        wrong = (predicted != batch.targets) & (batch.targets >= 0)
        for row, kinds in enumerate(batch.kinds):
            for number, (kind, seen) in enumerate(kinds, start=1):
                name = kind if seen else "!" + kind
                right.setdefault(name, []).append(not bool(wrong[row][batch.block[row] == number].any()))
    net.train()
    return {name: round(float(np.mean(right[name])), 3) for name in sorted(right)}


def with_hub_names(path: Path) -> None:
    """Gives a checkpoint's vision tower the names that checkpoints on the hub have, which serving engines look for;
    transformers reads both, and writes the short ones."""
    weights = load_file(path)
    short, long = "vision_tower.", "vision_tower.vision_model."
    named = {
        long + name.removeprefix(short) if name.startswith(short) and not name.startswith(long) else name: weight
        for name, weight in weights.items()
    }
    save_file(named, path, metadata={"format": "pt"})
    path.chmod(0o644)  # which the one before had


def save(net: Net, processor: LlavaProcessor, out: Path) -> None:
    """Writes the checkpoint with the names of the hub."""
    save_halved(net.llava, processor, out)
    with_hub_names(out / "model.safetensors")


def save_halved(model: Any, processor: Any, out: Path) -> None:
    """Writes a checkpoint: the file in half precision, the configuration asking for single precision on loading."""
    copy.deepcopy(model).half().save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    processor.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


@dataclass
class Clock:
    """Wall time since the start and processor time of the run, in seconds."""

    wall: float = field(default_factory=time.time)

    def read(self) -> dict[str, float]:
        used = os.times()  # with the processes that drew the scenes
        cpu = used.user + used.system + used.children_user + used.children_system
        return {"wall_s": round(time.time() - self.wall, 1), "cpu_s": round(cpu, 1)}


def log(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def schedule(step: int, steps: int, peak: float, *, warmup: int = 100, floor: float) -> float:
    """Linear warm-up, then a cosine down to ``floor * peak``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def optimiser(parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.AdamW:
    decayed = [p for _, p in parameters if p.dim() > 1]
    plain = [p for _, p in parameters if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    clock = Clock()
    processor = build_processor()
    net = Net(build_model(processor.tokenizer))
    writer = Writer(processor.tokenizer)

    def loader(pool: Pool, seed: int, weights: dict[str, float] = KIND_WEIGHTS) -> Loader:
        return Loader(pool, writer, processor.image_processor, seed=options.seed * 1000 + seed, weights=weights)

    def pool(n: int, objects: tuple[int, int], offset: int, **extra: float) -> Pool:
        n = max(1, int(n * options.scale))
        return Pool.draw("train", n, objects=objects, offset=offset, workers=options.threads, **extra)

    part = min(1.0, options.scale)
    check = loader(
        Pool.draw("tune", max(16, int(320 * part)), objects=(3, 5), offset=10**6, workers=options.threads), 9
    )
    parameters = sum(p.numel() for p in net.llava.parameters())
    log(parameters=parameters, vocabulary=len(processor.tokenizer), threads=options.threads, seed=options.seed)

    patches, states = net.patches, net.states
    if options.compile:
        patches, states = torch.compile(net.patches), torch.compile(net.states)

    def step_loss(batch: Batch, aux: float) -> tuple[Tensor, float]:
        seen = patches(batch.pixels)
        loss = net.answer_loss(states(seen, batch.ids, batch.attention(), batch.position), batch)
        return (loss + aux * net.patch_loss(seen, batch)[0] if aux > 0 else loss), float(loss.detach())

    def run(
        stage: int, steps: int, peak: float, floor: float, draw: Callable[[int], Batch], aux: Callable[[int], float]
    ) -> None:
        trained = list(net.named_parameters())
        if stage == 1:
            trained = [(n, p) for n, p in trained if ".vision_tower." in n or n.startswith("head.")]
        optimise = optimiser(trained)
        total = 0.0
        for step in range(steps):
            for group in optimise.param_groups:
                group["lr"] = schedule(step, steps, peak, floor=floor)
            batch = draw(step)
            if stage == 1:
                loss, value = net.patch_loss(patches(batch.pixels), batch)
            else:
                loss, value = step_loss(batch, aux(step))
            optimise.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
            optimise.step()
            total += value
            last = step + 1 == steps
            if (step + 1) % 100 == 0 or last:
                count = (step % 100) + 1
                name = "patch_accuracy" if stage == 1 else "loss"
                log(stage=stage, step=step + 1, **{name: round(total / count, 4)}, **clock.read())
                total = 0.0
            if stage > 1 and ((step + 1) % options.check == 0 or last):
                clear = held_out(net, check, batches=max(1, int(6 * part)), veiled=0.0, absent=0.0)
                few = max(1, int(4 * part))
                veiled = held_out(net, check, batches=few, veiled=0.6, absent=0.2) if stage > 2 else {}
                log(stage=stage, step=step + 1, clear=clear, veiled=veiled, **clock.read())
                save(net, processor, options.out)

    n1, n2, n3, n4 = (max(2, int(n * options.scale)) for n in options.steps)

    def learn() -> None:
        on_few = loader(pool(1500, (1, 2), 10**6), 2)
        on_some = loader(pool(1500, (1, 3), 2 * 10**6), 3)
        on_many = loader(pool(options.pool, (3, 5), 0), 1)
        log(stage="scenes", **clock.read())

        def curriculum(step: int) -> Batch:
            source = on_few if step < 0.10 * n2 else on_some if step < 0.25 * n2 else on_many
            return source.batch(16, room=options.room, absent=0.05, swap=step > 0.5 * n2)

        def blended(step: int) -> Batch:
            share = 0.20 + 0.25 * min(1.0, step / (0.5 * n3))
            return on_many.batch(16, room=options.room, veiled=share, absent=0.10, swap=True)

        run(1, n1, 2e-3, 0.02, lambda step: on_many.batch(32), lambda step: 0.0)
        run(2, n2, 1.5e-3, 0.6, curriculum, lambda step: 0.5 * max(0.0, 1 - step / (0.8 * n2)))
        run(3, n3, 1.2e-3, 0.01, blended, lambda step: 0.0)

    def count() -> None:
        saved = LlavaForConditionalGeneration.from_pretrained(options.out, dtype=torch.float32)
        net.llava.load_state_dict(saved.state_dict())
        counting = loader(pool(options.pool // 2, (3, 5), 3 * 10**6, grouped=0.7), 4, COUNTING_WEIGHTS)
        log(stage="scenes", **clock.read())
        draw = counting.batch
        run(
            4,
            n4,
            7e-4,
            0.01,
            lambda step: draw(16, room=options.room, veiled=0.35, absent=0.08, swap=True),
            lambda _: 0.0,
        )

    if not options.count_only:
        learn()
    count()
    save(net, processor, options.out)
    log(stage="done", out=str(options.out), **clock.read())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=4, default=(1500, 1600, 4400, 2400), help="steps of the stages")
    parser.add_argument("--pool", type=int, default=16000, help="number of distinct training scenes")
    parser.add_argument("--room", type=int, default=126, help="tokens of questions and answers per picture")
    parser.add_argument("--check", type=int, default=300, help="steps between held-out checks")
    parser.add_argument("--scale", type=float, default=1.0, help="shortens everything, for a try-out")
    parser.add_argument(
        "--count-only", action="store_true", help="do stage 4 alone, on the checkpoint that is in --out"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the two towers (needs a C++ compiler)")
    parser.add_argument(
        "--family",
        choices=("llava", "cambrian", "video", "document"),
        default="llava",
        help="cambrian: see train_cambrian_model.py; video and document likewise",
    )
    parser.add_argument(
        "--cambrian-steps", type=int, nargs=3, default=(250, 400, 700), help="steps of the stages of --family cambrian"
    )
    parser.add_argument(
        "--video-steps", type=int, nargs=3, default=(2400, 2400, 4700), help="steps of the stages of --family video"
    )
    parser.add_argument("--video-pool", type=int, default=5000, help="number of distinct training clips")
    parser.add_argument(
        "--document-steps", type=int, nargs=3, default=(900, 2000, 2100), help="steps of --family document"
    )
    parser.add_argument("--document-pool", type=int, default=5000, help="number of distinct training documents")
    options = parser.parse_args(arguments)
    if options.family == "cambrian":
        import train_cambrian_model

        train_cambrian_model.train(options)
    elif options.family == "video":
        import train_video_model

        train_video_model.train(options)
    elif options.family == "document":
        import train_document_model

        train_document_model.train(options)
    else:
        train(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
