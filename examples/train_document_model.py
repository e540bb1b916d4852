"""Trains a document reader on the demo's receipts, tables and forms: ``train_demo_model.py --family document``.

The model is the demo model's ``LlavaForConditionalGeneration``, three quarters as wide, with smaller patches and one
more layer in its tower. It is trained in three stages, like the demo model:

1. the tower alone, on which character is under every patch, to which value or label it belongs, and the how-many-eth of
   its text it is (a throw-away linear head);
2. everything, on clear documents;
3. everything, with part of the documents blended with a version of themselves in which nothing can be read, through
   random masks. A value of which a figure cannot be seen is answered "hidden", and so is one that is not on the page.

All questions about a document share one sequence, as those about an image do, and in part of the answers the figures
are replaced by others on the input side while the targets stay. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import train_demo_model as base
import train_video_model as video
from torch import Tensor, nn
from transformers import GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor

from lvlm_probe.demo import document_scene as dd

SIDE = 120
PATCH = 10
GRID = SIDE // PATCH
TOKENS = GRID * GRID
HIDDEN = 96
PREFIX = 2 + TOKENS  # <s> <user> <image> * 144
DRAWN = 240  # side at which documents are drawn, pixels
SHIFT = 4  # how far a document is moved, pixels
WORDS = "What is the date total ? does cost Read and The costs " + " ".join(dd.GOODS)
PIECES = '. ? hidden ▁{"date": ▁"total": ▁" ", "}'
NAMES = ("date", "total", *dd.GOODS)
CHARACTERS = "0123456789" + "".join(sorted(set("".join(NAMES).upper())))
LONGEST = 5  # characters of a text
WEIGHTS = {"date": 1.0, "total": 1.0, "price": 0.8, "record": 0.8}
"""How often a question is asked against the others of a document."""


def build_processor() -> LlavaProcessor:
    """The processor of the demo model, at this model's size and with its words."""
    return base.build_processor(base.build_tokenizer(WORDS, PIECES), side=SIDE, patch=PATCH)


def build_model(tokenizer: Any) -> LlavaForConditionalGeneration:
    """The untrained model."""
    model = base.build_model(tokenizer, side=SIDE, patch=PATCH, hidden=HIDDEN, layers=4)
    settings = model.generation_config.to_diff_dict()
    model.generation_config = GenerationConfig(**{**settings, "max_new_tokens": 32})
    return model


@dataclass
class Print:
    """The characters of a page, without points: `boxes` ``(glyph, 4)`` in pixels, the rest ``(glyph,)``.

    `kind` is the number of a character from 1, `name` that of the value it belongs to, from 1, `place` the how-many-eth
    it is in a value's text, from 1, or ``LONGEST + 1`` in a label's; `text` is the index of its text.
    """

    boxes: np.ndarray
    kind: np.ndarray
    name: np.ndarray
    place: np.ndarray
    text: np.ndarray

    @staticmethod
    def of(page: dd.Page) -> Print:
        rows = [
            (box, 1 + CHARACTERS.index(character), 1 + NAMES.index(text.name),
             LONGEST + 1 if text.is_label else 1 + at, number)
            for number, text in enumerate(page.texts)
            for at, (character, box) in enumerate(zip(text.text, text.glyphs, strict=True))
            if character != "."
        ]  # fmt: skip
        boxes, *rest = zip(*rows, strict=True)
        return Print(np.asarray(boxes) * SIDE, *(np.asarray(values) for values in rest))

    def under_patches(self, shift: tuple[int, int]) -> dict[str, np.ndarray]:
        """What is under each patch, ``(144,)`` each: 0 for nothing, -100 for too little to tell."""
        edges = np.arange(GRID) * PATCH

        def overlap(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
            return np.clip(np.minimum(stop[:, None], edges + PATCH) - np.maximum(start[:, None], edges), 0, None)

        across = overlap(self.boxes[:, 0] + shift[0], self.boxes[:, 2] + shift[0])
        down = overlap(self.boxes[:, 1] + shift[1], self.boxes[:, 3] + shift[1])
        area = (down[:, :, None] * across[:, None]).reshape(len(self.boxes), TOKENS) / PATCH**2
        best, most = area.argmax(0), area.max(0)
        found = {name: getattr(self, name)[best] for name in ("kind", "name", "place")}
        for values in found.values():
            values[most < 0.25] = -100
            values[most < 0.03] = 0
        return found


@dataclass
class Pool:
    """Documents drawn once. `pixels` ``(n, 120, 120, 3)`` uint8."""

    pixels: np.ndarray
    pages: list[dd.Page]

    @staticmethod
    def draw(split: str, n: int, *, offset: int, workers: int) -> Pool:
        """Draws documents ``offset .. offset + n`` of seed 0 of a split, in `workers` processes."""
        jobs = [(split, range(k, min(k + 100, offset + n))) for k in range(offset, offset + n, 100)]
        if workers > 1:
            with ProcessPoolExecutor(workers) as executor:
                parts = list(executor.map(_draw_part, jobs))
        else:
            parts = [_draw_part(job) for job in jobs]
        return Pool(np.concatenate([part[0] for part in parts]), [page for part in parts for page in part[1]])


def _draw_part(job: tuple[str, range]) -> tuple[np.ndarray, list[dd.Page]]:
    from PIL import Image

    pages = [dd.draw_page(dd.document_rng(job[0], 0, index)) for index in job[1]]
    drawn = [page.render(DRAWN).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for page in pages]
    return np.stack([np.asarray(image) for image in drawn]), pages


class Asker:
    """Draws questions about a document of which only a part can be read."""

    def __init__(self, rng: np.random.Generator, *, absent: float) -> None:
        self.rng = rng
        self.absent = absent

    def ask(self, page: dd.Page, seen: list[bool | None]) -> Iterator[base.Example]:
        """Different examples in random order. `seen` says of each text whether it can be read, ``None`` for hardly."""
        queries = page.queries()
        weights = np.asarray([WEIGHTS[query.kind] for query in queries])
        keys = self.rng.random(len(queries)) ** (1 / weights)  # an order that draws by weight
        for number in np.argsort(-keys):
            query = queries[number]
            states = [self._state(page, target, seen) for (target,) in query.targets]
            if None not in states:
                yield base.Example(query, tuple(bool(state) for state in states))
            if self.rng.random() < self.absent:
                missing = [name for name in dd.GOODS if name not in page.goods]
                name = missing[int(self.rng.integers(len(missing)))]
                yield base.Example(dd.price_query(name, "0.00", ()), (False,))

    @staticmethod
    def _state(page: dd.Page, target: int, seen: list[bool | None]) -> bool | None:
        """Whether a value can be told; ``None`` also where it can be read and its label cannot."""
        label = seen[page.find(page.texts[target].name, label=True)]
        return False if seen[target] is False else True if seen[target] and label else None


class Writer(base.Writer):
    """Turns examples into token ids and targets; all figures of a value count as its opening."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.hidden = tokenizer.convert_tokens_to_ids("hidden")
        self.figures = {tokenizer.convert_tokens_to_ids(figure) for figure in "0123456789"}

    def write(
        self, example: base.Example, *, swap: np.random.Generator | None = None
    ) -> tuple[list[int], list[int], list[bool]]:
        query = example.query
        true = [w if s else h for w, s, h in zip(query.words, example.seen, query.hidden_words, strict=True)]
        given = true if swap is None else [other_value(domain, swap) for domain in query.domains]
        ids = [piece for word in query.question.split() for piece in self.pieces(word)] + [self.assistant]
        targets, slot = [-100] * (len(ids) - 1), 0
        for word in query.template.split():
            if "{}" not in word:
                pieces = self.pieces(word.format())
                ids += pieces
                targets += pieces
                continue
            pieces = self.pieces(word.format(given[slot]))
            ids += pieces
            if swap is None or example.seen[slot]:
                targets += self.pieces(word.format(true[slot]))
            else:  # whatever is said before, no figure can be read
                targets += [self.hidden if piece in self.figures else -100 for piece in pieces]
            slot += 1
        ids.append(self.eos)
        targets += [self.eos, -100]
        return ids, targets, [target == self.hidden or target in self.figures for target in targets]


def other_value(domain: str, rng: np.random.Generator) -> str:
    """Any value of a kind."""
    first, rest = int(rng.integers(100)), int(rng.integers(100))
    return f"{first:02}.{rest:02}" if domain == "date" else f"{first // 10}.{rest:02}"


class Veil(base.Veil):
    """Blends documents with documents of nothing."""

    def over(self, page: dd.Page, shift: tuple[int, int]) -> np.ndarray:
        """How much of a document shows, ``(120, 120)`` float32 in 0..1."""
        rng = self.rng
        way = rng.choice(4, p=[0.15, 0.10, 0.35, 0.40])
        shown = np.zeros((SIDE, SIDE), dtype=np.float32)
        if way == 0:
            return shown
        if way == 1:
            return shown + np.float32(rng.random())
        if way == 2:
            return self._grid()
        grow = rng.uniform(0, 4)
        for text in page.texts:
            if rng.random() < 0.5:
                left, top, right, bottom = (edge * SIDE for edge in text.box)
                columns = slice(max(0, round(left - grow) + shift[0]), round(right + grow) + shift[0])
                shown[max(0, round(top - grow) + shift[1]) : round(bottom + grow) + shift[1], columns] = 1
        kernel = int(rng.choice([1, 3, 5, 7]))
        soft = F.avg_pool2d(torch.from_numpy(shown)[None], kernel, 1, kernel // 2, count_include_pad=False)[0].numpy()
        low, high = (0.0, 1.0) if rng.random() < 0.7 else sorted(rng.random(2))
        return (low + (high - low) * (soft if rng.random() < 0.4 else 1 - soft)).astype(np.float32)


class Loader:
    """Makes batches out of a pool, each document moved by a few pixels."""

    def __init__(self, pool: Pool, writer: base.Writer, image_processor: Any, *, seed: int) -> None:
        self.pool = pool
        self.prints = [Print.of(page) for page in pool.pages]
        self.writer = writer
        self.rng = np.random.default_rng(seed)
        self.mean = np.asarray(image_processor.image_mean, dtype=np.float32) * 255
        self.std = np.asarray(image_processor.image_std, dtype=np.float32) * 255
        ids = writer.tokenizer.convert_tokens_to_ids
        self.prefix = [writer.tokenizer.bos_token_id, ids("<user>"), *[ids("<image>")] * TOKENS]

    def document(self, veiled: float) -> tuple[np.ndarray, int, list[bool | None], tuple[int, int]]:
        """One document: ``(120, 120, 3)`` float32 in 0..255, its number, whether each text can be read, its shift."""
        rng = self.rng
        number = int(rng.integers(len(self.pool.pages)))
        page = self.pool.pages[number]
        across, down = (int(v) for v in rng.integers(-SHIFT, SHIFT + 1, 2))
        padded = np.pad(self.pool.pixels[number], ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
        pixels = padded[SHIFT - down :, SHIFT - across :][:SIDE, :SIDE].astype(np.float32)
        seen: list[bool | None] = [True] * len(page.texts)
        if rng.random() < veiled:
            veil = Veil(rng, SIDE)
            shown = veil.over(page, (across, down))
            nothing = veil.baseline(pixels)
            pixels = nothing + shown[:, :, None] * (pixels - nothing)
            seen = readable(self.prints[number], shown, (across, down))
        return pixels, number, seen, (across, down)

    def batch(
        self, size: int, *, room: int = 0, veiled: float = 0.0, absent: float = 0.0, swap: bool = False
    ) -> video.Batch:
        """Draws `size` documents with as many questions as fit in `room` tokens each (0: no text)."""
        asker = Asker(self.rng, absent=absent)
        start, length = PREFIX, PREFIX + room
        ids = np.zeros((size, length), dtype=np.int64)
        targets = np.full((size, length), -100, dtype=np.int64)
        opens = np.zeros((size, length), dtype=bool)
        block = np.full((size, length), -1, dtype=np.int64)
        position = np.zeros((size, length), dtype=np.int64)
        ids[:, :start], block[:, :start], position[:, :start] = self.prefix, 0, np.arange(start)
        pages, patches, used = [], [], start
        kinds: list[list[tuple[str, bool]]] = []
        for row in range(size):
            pixels, number, seen, shift = self.document(veiled)
            pages.append((pixels - self.mean) / self.std)
            patches.append(self.prints[number].under_patches(shift))
            kinds.append([])
            at = start
            for example in asker.ask(self.pool.pages[number], seen) if room else ():
                swapped = swap and self.rng.random() < (0.15 if all(example.seen) else 0.6)
                written = self.writer.write(example, swap=self.rng if swapped else None)
                stop = at + len(written[0])
                if stop > length:
                    break
                ids[row, at:stop], targets[row, at:stop], opens[row, at:stop] = written
                kinds[row].append((example.query.kind, all(example.seen)))
                block[row, at:stop] = len(kinds[row])
                position[row, at:stop] = np.arange(start, start + stop - at)
                at = stop
            used = max(used, at)
        ids, targets, opens, block, position = (each[:, :used] for each in (ids, targets, opens, block, position))
        return video.Batch(
            pixels=torch.from_numpy(np.stack(pages).transpose(0, 3, 1, 2).copy()),
            ids=torch.from_numpy(ids),
            targets=torch.from_numpy(targets),
            opens=torch.from_numpy(opens),
            block=torch.from_numpy(block),
            position=torch.from_numpy(position),
            patches={name: torch.from_numpy(np.stack([each[name] for each in patches])) for name in patches[0]},
            kinds=kinds,
        )


def readable(prints: Print, shown: np.ndarray, shift: tuple[int, int]) -> list[bool | None]:
    """Whether each text can be read: all of its figures or letters; not, where one of them is gone; else ``None``."""
    seen: list[bool | None] = []
    boxes = np.round(prints.boxes + np.asarray([*shift, *shift])).astype(int).clip(0, SIDE)
    for number in range(int(prints.text.max()) + 1):
        parts = [shown[top:bottom, left:right].mean() for left, top, right, bottom in boxes[prints.text == number]]
        seen.append(True if min(parts) >= 0.6 else False if min(parts) <= 0.15 else None)
    return seen


class Net(video.Net):
    """The training view of the model: the same modules, the image's tokens in place."""

    tower = ".vision_tower."

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.sizes = {"kind": 1 + len(CHARACTERS), "name": 1 + len(NAMES), "place": 2 + LONGEST}
        self.head = nn.Linear(HIDDEN, sum(self.sizes.values()))

    def patches(self, pixels: Tensor) -> Tensor:
        """Output of the tower, ``(b, 144, 96)``."""
        found: Tensor = self.model.model.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]
        return found

    def states(self, patches: Tensor, batch: video.Batch) -> Tensor:
        """The decoder's last states, ``(b, length, 96)``."""
        embedded = self.model.get_input_embeddings()(batch.ids)
        image = self.model.model.multi_modal_projector(patches)
        embedded = torch.cat([embedded[:, :2], image, embedded[:, PREFIX:]], dim=1)
        found: Tensor = self.model.model.language_model(
            inputs_embeds=embedded, attention_mask=batch.attention(), position_ids=batch.position, use_cache=False
        ).last_hidden_state
        return found


def train(options: argparse.Namespace) -> None:
    """Trains the model and writes it, with its processor, to ``options.out``."""
    with video.told_to_end() as told:
        _train(options, told)


def _train(options: argparse.Namespace, told: threading.Event) -> None:
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    clock = base.Clock()
    processor = build_processor()
    net = Net(build_model(processor.tokenizer))
    writer = Writer(processor.tokenizer)
    options.out.mkdir(parents=True, exist_ok=True)

    def loader(split: str, n: float, offset: int, seed: int) -> Loader:
        pool = Pool.draw(split, max(8, int(n * options.scale)), offset=offset, workers=options.threads)
        return Loader(pool, writer, processor.image_processor, seed=options.seed * 1000 + seed)

    many = loader("train", options.document_pool, 0, 1)
    check = loader("tune", 300, 10**6, 9)
    parameters = sum(p.numel() for p in net.model.parameters())
    base.log(parameters=parameters, vocabulary=len(processor.tokenizer), seed=options.seed, **clock.read())
    progress = video.Progress(options.out / "training.pt", net, {"many": many, "check": check}, told)
    n1, n2, n3 = (max(2, int(n * options.scale)) for n in options.document_steps)

    def loss_of(stage: int, step: int) -> tuple[Tensor, dict[str, Any]]:
        if stage == 1:
            batch = many.batch(24)
            loss, right = net.patch_loss(net.patches(batch.pixels), batch)
            return loss, {"patch_accuracy": [round(value, 3) for value in right]}
        if stage == 2:
            batch = many.batch(16, room=options.room, absent=0.05, swap=step > 0.4 * n2)
        else:
            share = 0.20 + 0.30 * min(1.0, step / (0.5 * n3))
            batch = many.batch(16, room=options.room, veiled=share, absent=0.10, swap=True)
        patches = net.patches(batch.pixels)
        loss = net.answer_loss(net.states(patches, batch), batch)
        weight = 0.5 * max(0.0, 1 - step / (0.8 * n2)) if stage == 2 else 0.0
        return (loss + weight * net.patch_loss(patches, batch)[0] if weight else loss), {}

    for stage, steps, peak, floor in ((1, n1, 2e-3, 0.05), (2, n2, 1.5e-3, 0.5), (3, n3, 1.2e-3, 0.01)):
        video.run_stage(stage, steps, peak, floor, net, loss_of, progress, options, clock, check, processor)
        if told.is_set():
            return
    base.save_halved(net.model, processor, options.out)
    base.with_hub_names(options.out / "model.safetensors")
    progress.path.unlink()
    base.log(stage="done", out=str(options.out), **clock.read())
