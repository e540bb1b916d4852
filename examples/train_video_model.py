"""Trains a video model on the demo's clips: ``train_demo_model.py --family video``.

The model is an unmodified ``Qwen2VLForConditionalGeneration`` of a million parameters: two frames share a patch, so the
tower sees motion, and the decoder sees when and where a token is by its three rotary positions. It is trained in three
stages, like the demo model:

1. the tower alone, on the shape, the color and the motion of the object under every patch (a throw-away linear head);
2. everything, on clear clips: first of one or two objects, then of two or three;
3. everything, with part of the clips blended with a version of themselves in which nothing can be seen, through random
   masks in space and time. What cannot be seen is answered "hidden", and a frozen clip moves "nowhere".

All questions about a clip share one sequence, as those about an image do. Needs torchvision, which the video processor
needs. A run that was stopped goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import math
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import train_demo_model as base
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl

from lvlm_probe.demo import clip_scene as cs
from lvlm_probe.demo import questions

SIDE = 84
PATCH = 14
MERGE = 2
STEPS = cs.FRAMES // 2
GRID = SIDE // PATCH
PATCHES = GRID * GRID
TOKENS = PATCHES // MERGE**2
VIDEO_TOKENS = STEPS * TOKENS
WIDTH = 96
HIDDEN = 128
BEFORE = 3  # <s> <user> <|vision_start|>
PREFIX = BEFORE + VIDEO_TOKENS + 1
SPECIAL = (
    "<pad>", "<s>", "</s>", "<unk>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<user>",
    "<assistant>",
)  # fmt: skip
PLACES = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
WORDS = (
    "Which way does the move What appears vanishes color is at first last comes The moves A First Last a hidden object "
    "somewhere nowhere left right up down red green cyan blue circle square star cross heart"
)
PIECES = "▁tri angle ▁yel low ▁pur ple . ?"
CHAT_TEMPLATE = base.CHAT_TEMPLATE.replace(
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}",
    "{% for part in message['content'] if part['type'] in ('image', 'video') %}"
    "<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>{% endfor %}",
)
WEIGHTS = {"direction": 3.0, "nowhere": 0.6, "appearance": 3.0, "colour": 2.0, "still": 0.5, "order": 3.0}
"""How often a question is asked against the others of a clip; of what stays as it is, less often."""
FILMS = {"direction": 0.30, "appearance": 0.20, "colour": 0.15, "order": 0.35}


def build_processor() -> Qwen2VLProcessor:
    """The processor of the released Qwen2-VL models, at this model's frame size."""
    from transformers import Qwen2VLVideoProcessor

    pixels = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
    return Qwen2VLProcessor(
        image_processor=image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil(size=pixels, patch_size=PATCH),
        tokenizer=base.build_tokenizer(WORDS, PIECES, SPECIAL, PLACES),
        video_processor=Qwen2VLVideoProcessor(
            size=pixels, patch_size=PATCH, do_sample_frames=False, cap_pixels_per_frame=False
        ),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLForConditionalGeneration:
    """The untrained model. Rotary bases are small, for few positions: each axis is to turn far enough to be seen."""
    ids = tokenizer.convert_tokens_to_ids
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 3,
        "embed_dim": WIDTH,
        "hidden_size": HIDDEN,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": PATCH,
        "initializer_range": 0.04,
        "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 224,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 8.0, "mrope_section": [6, 5, 5]},
        **special,
    }
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=ids("<|image_pad|>"),
            video_token_id=ids("<|video_pad|>"),
            vision_start_token_id=ids("<|vision_start|>"),
            vision_end_token_id=ids("<|vision_end|>"),
            tie_word_embeddings=False,
        )
    )
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=16, **special)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".attn.qkv.weight", ".q_proj.weight", ".k_proj.weight")):
                parameter[: 2 * WIDTH if "qkv" in name else None].mul_(2)
    return model


@dataclass
class Pool:
    """Films drawn once. `pixels` ``(n, 8, 84, 84, 3)`` uint8, `labels` ``(n, 8, 84, 84)`` int8."""

    pixels: np.ndarray
    labels: np.ndarray
    films: list[cs.Film]

    @staticmethod
    def draw(split: str, n: int, *, objects: tuple[int, int], offset: int, workers: int) -> Pool:
        """Draws films ``offset .. offset + n`` of seed 0 of a split, in `workers` processes."""
        jobs = [(split, objects, range(k, min(k + 100, offset + n))) for k in range(offset, offset + n, 100)]
        if workers > 1:
            with ProcessPoolExecutor(workers) as executor:
                parts = list(executor.map(_draw_part, jobs))
        else:
            parts = [_draw_part(job) for job in jobs]
        films = [film for part in parts for film in part[2]]
        return Pool(np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]), films)


def _draw_part(job: tuple[str, tuple[int, int], range]) -> tuple[np.ndarray, np.ndarray, list[cs.Film]]:
    split, objects, indices = job
    pixels, labels, films = [], [], []
    for index in indices:
        rng = cs.clip_rng(split, 0, index)
        film = cs.draw_film(rng, kind=str(rng.choice(list(FILMS), p=list(FILMS.values()))), objects=objects)
        frames, covers = film.render((SIDE, SIDE))
        pixels.append(np.stack([np.asarray(frame) for frame in frames]))
        labels.append(covers)
        films.append(film)
    return np.stack(pixels), np.stack(labels), films


class Asker:
    """Draws questions about a film of which only a part can be seen."""

    def __init__(self, rng: np.random.Generator, *, absent: float) -> None:
        self.rng = rng
        self.absent = absent

    def ask(self, film: cs.Film, seen: np.ndarray) -> Iterator[base.Example]:
        """Different examples in random order. `seen` is ``(track, t)``, the part of each object that shows, in 0..1."""
        queries = cs.film_queries(film)
        weights = np.asarray([WEIGHTS[self.sort_of(query, film)] for query in queries])
        keys = self.rng.random(len(queries)) ** (1 / weights)  # an order that draws by weight
        for number in np.argsort(-keys):
            state = self._state(queries[number], film, seen)
            if state is not None:
                yield base.Example(queries[number], (state,) * len(queries[number].words))
            if self.rng.random() < self.absent and (example := self._absent(film)):
                yield example

    @staticmethod
    def sort_of(query: cs.ClipQuery, film: cs.Film) -> str:
        if not query.frames:
            return "-"  # of what is not in the clip
        if query.words == ("nowhere",):
            return "nowhere"
        (frames, *_) = query.frames.values()
        return "still" if query.kind == "colour" and len(frames) == film.frames else query.kind

    @staticmethod
    def _state(query: cs.ClipQuery, film: cs.Film, seen: np.ndarray) -> bool | None:
        """True when enough can be seen to answer, False when too little, None between."""
        parts = [seen[track, list(frames)] for track, frames in query.frames.items()]
        if min(part.max() for part in parts) <= 0.25:
            return False
        if query.kind == "direction":
            return True if parts[0].mean() >= 0.6 else None
        if min(part.max() for part in parts) < 0.75:
            return None
        if query.kind == "appearance":  # where it is not must be seen as well
            (track,) = query.frames
            before = [frame for frame in range(film.frames) if frame not in query.frames[track]]
            return True if seen[track, before].max() >= 0.6 else None
        return True

    def _absent(self, film: cs.Film) -> base.Example | None:
        """A question about what is not in the clip."""
        shapes = [s for s in questions.SHAPES if all(track.any.shape != s for track in film.tracks)]
        shape = shapes[int(self.rng.integers(len(shapes)))]
        comes = {track.comes for track in film.tracks}
        made: list[cs.ClipQuery] = [
            cs.direction_query(shape, "left", (), {}),
            cs.colour_query(shape, ("first", "last")[int(self.rng.integers(2))], "red", (), {}),
        ]
        made += [
            cs.appearance_query(verb, ("red", "star"), (), {})
            for verb in ("appears", "vanishes")
            if not comes & {verb, "briefly"}
        ]
        if not cs.order_queries(film) and comes <= {"always"}:
            made += [cs.order_query(end, ("red", "star"), (), {}) for end in ("first", "last")]
        query = made[int(self.rng.integers(len(made)))]
        return base.Example(query, (False,) * len(query.words))


class Veil(base.Veil):
    """Blends clips with clips of nothing, through masks in space and time."""

    def tube(self, labels: np.ndarray, tracks: int) -> np.ndarray:
        """How much of a clip shows, ``(8, 84, 84)`` float32 in 0..1."""
        rng = self.rng
        shape = (cs.FRAMES, SIDE, SIDE)
        way = rng.choice(5, p=[0.14, 0.08, 0.16, 0.40, 0.22])
        if way == 0:
            return np.zeros(shape, dtype=np.float32)
        if way == 1:
            return np.full(shape, rng.random(), dtype=np.float32)
        if way == 2:  # whole frames
            shown = (rng.random(cs.FRAMES) < rng.uniform(0.2, 0.8)).astype(np.float32)
            return np.broadcast_to(shown[:, None, None], shape)
        if way == 3:
            return self._coarse()
        chosen = np.flatnonzero(rng.random(tracks) < 0.5)
        inside = torch.from_numpy(np.isin(labels, chosen).astype(np.float32))[None]
        kernel = int(rng.choice([5, 9, 13]))
        grown = F.avg_pool2d(F.max_pool2d(inside, kernel, 1, kernel // 2), 5, 1, 2, count_include_pad=False)[0].numpy()
        since, until = sorted(int(v) for v in rng.integers(0, cs.FRAMES + 1, 2))
        if rng.random() < 0.5:
            grown[:since], grown[until:] = 0, 0
        return grown if rng.random() < 0.4 else 1 - grown

    def _coarse(self) -> np.ndarray:
        rng = self.rng
        steps, side = int(rng.choice([1, 2, 4, 8])), int(rng.choice([2, 3, 4, 6, 8, 12, 16]))
        cells = torch.from_numpy(rng.random((1, 1, steps, side, side)).astype(np.float32))
        way = rng.choice(3)
        if way == 0:
            cells = (cells < float(rng.uniform(0.1, 0.9))).float()
        elif way == 1:
            cells = cells ** float(np.exp(rng.uniform(-1.5, 1.5)))
        else:
            rough = F.interpolate(cells, size=(min(steps, 3), 4, 4), mode="trilinear")
            smooth = F.interpolate(rough, size=(steps, side, side), mode="trilinear", align_corners=True)
            cells = torch.sigmoid((smooth - float(rng.uniform(0.35, 0.65))) * float(np.exp(rng.uniform(1.5, 4.0))))
        mode = "nearest" if rng.random() < 0.3 else "trilinear"
        return F.interpolate(cells.clamp(0, 1), size=(cs.FRAMES, SIDE, SIDE), mode=mode)[0, 0].numpy()

    def nothing(self, pixels: np.ndarray) -> np.ndarray:
        """A version of ``(8, 84, 84, 3)`` float32 pixels in which nothing can be seen."""
        rng = self.rng
        way = rng.choice(5, p=[0.60, 0.12, 0.08, 0.08, 0.12])
        if way == 0:
            sigma = float(np.exp(rng.uniform(math.log(0.14), math.log(0.6))))
            return blur(pixels, sigma, reflect=bool(rng.integers(2)))
        if way == 1:
            return np.broadcast_to(pixels.mean((0, 1, 2)), pixels.shape)
        if way == 2:
            return np.zeros_like(pixels)
        if way == 3:
            return np.broadcast_to(rng.uniform(0, 255, 3).astype(np.float32), pixels.shape)
        noise = rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(rng.uniform(8, 90))
        level = pixels.mean((0, 1, 2)) if rng.random() < 0.5 else np.float32(rng.uniform(60, 190))
        return np.clip(level + noise, 0, 255)


def blur(pixels: np.ndarray, sigma: float, *, reflect: bool) -> np.ndarray:
    """A wide Gaussian blur of frames ``(t, 84, 84, 3)``; `sigma` is a part of the side. Computed on 21 × 21 cells."""
    side = 21
    coarse = pixels.reshape(len(pixels), side, SIDE // side, side, SIDE // side, 3).mean((2, 4))
    kernel = base.blur_matrix(side, round(sigma * side, 2), reflect)
    soft = np.einsum("ij,tjkc,lk->tcil", kernel, coarse, kernel, optimize=True)
    grown = F.interpolate(torch.from_numpy(np.ascontiguousarray(soft)), size=SIDE, mode="bilinear")
    return grown.permute(0, 2, 3, 1).numpy()


@dataclass
class Batch:
    """One step's tensors: `pixels` ``(b, 8, 84, 84, 3)`` normalised, patch targets ``(b, 4 * 36)`` by name, the rest
    ``(b, length)`` as in the recipe of the demo model."""

    pixels: Tensor
    ids: Tensor
    targets: Tensor
    opens: Tensor
    block: Tensor
    position: Tensor
    patches: dict[str, Tensor]
    kinds: list[list[tuple[str, bool]]]

    def attention(self) -> Tensor:
        return base.attention(self.block)

    def positions(self) -> Tensor:
        """Rotary positions in time, down and across, ``(3, b, length)``."""
        found = self.position.expand(3, *self.position.shape).clone()
        found[:, :, BEFORE : PREFIX - 1] = torch.from_numpy(video_positions())[:, None]
        return found


def video_positions() -> np.ndarray:
    """Rotary positions of the video's tokens, ``(3, 36)``."""
    side = GRID // MERGE
    return BEFORE + np.stack(np.meshgrid(range(STEPS), range(side), range(side), indexing="ij")).reshape(3, -1)


class Loader:
    """Makes batches out of a pool: as they are, mirrored, and played backwards."""

    def __init__(self, pool: Pool, writer: base.Writer, video_processor: Any, *, seed: int) -> None:
        self.pool = pool
        self.writer = writer
        self.rng = np.random.default_rng(seed)
        self.mean = np.asarray(video_processor.image_mean, dtype=np.float32) * 255
        self.std = np.asarray(video_processor.image_std, dtype=np.float32) * 255
        ids = writer.tokenizer.convert_tokens_to_ids
        self.prefix = [
            writer.tokenizer.bos_token_id,
            *map(ids, ("<user>", "<|vision_start|>", *["<|video_pad|>"] * VIDEO_TOKENS, "<|vision_end|>")),
        ]
        self.start = BEFORE + GRID // MERGE + 1  # position of the question's first token

    def clip(self, veiled: float, frozen: float) -> tuple[np.ndarray, cs.Film, np.ndarray, np.ndarray]:
        """One clip: ``(8, 84, 84, 3)`` float32 in 0..255, its film, ``(track, t)`` what shows of each track, labels."""
        rng = self.rng
        index, way = int(rng.integers(len(self.pool.films))), int(rng.integers(4))
        film, pixels, labels = self.pool.films[index], self.pool.pixels[index], self.pool.labels[index]
        if way & 1:
            film, pixels, labels = film.mirrored(), pixels[:, :, ::-1], labels[:, :, ::-1]
        if way & 2:
            film, pixels, labels = film.reversed(), pixels[::-1], labels[::-1]
        if rng.random() < frozen:
            frame = int(rng.integers(cs.FRAMES))
            there = [number for number, track in enumerate(film.tracks) if track.items[frame]]
            if there:
                film = film.frozen(frame)
                pixels = np.broadcast_to(pixels[frame], pixels.shape)
                kept = np.full(len(self.pool.films[index].tracks) + 1, -1, dtype=np.int8)
                kept[there] = np.arange(len(there))
                labels = np.broadcast_to(kept[labels[frame]], labels.shape)
        pixels = pixels.astype(np.float32)
        seen = np.ones((len(film.tracks), cs.FRAMES))
        if rng.random() < veiled:
            veil = Veil(rng)
            shown = veil.tube(labels, len(film.tracks))
            nothing = veil.nothing(pixels)
            pixels = nothing + shown[..., None] * (pixels - nothing)
            seen = visible(film, labels, shown)
        return pixels, film, seen, labels

    def batch(
        self, size: int, *, room: int = 0, veiled: float = 0.0, frozen: float = 0.0, absent: float = 0.0,
        swap: bool = False,
    ) -> Batch:  # fmt: skip
        """Draws `size` clips with as many questions as fit in `room` tokens each (0: no text, and of each clip only two
        frames in a row: what stands still looks alike in all of them)."""
        asker = Asker(self.rng, absent=absent)
        start, length = len(self.prefix), len(self.prefix) + room
        ids = np.zeros((size, length), dtype=np.int64)
        targets = np.full((size, length), -100, dtype=np.int64)
        opens = np.zeros((size, length), dtype=bool)
        block = np.full((size, length), -1, dtype=np.int64)
        position = np.zeros((size, length), dtype=np.int64)
        ids[:, :start], block[:, :start] = self.prefix, 0
        position[:, :start] = [*range(BEFORE), *[0] * VIDEO_TOKENS, self.start - 1]
        clips, patches, used = [], [], start
        kinds: list[list[tuple[str, bool]]] = []
        for row in range(size):
            pixels, film, seen, labels = self.clip(veiled, frozen)
            if not room:
                pair = slice(first := 2 * int(self.rng.integers(STEPS)), first + 2)
                pixels, seen, labels = pixels[pair], seen[:, pair], labels[pair]
                film = replace(film, tracks=tuple(cs.Track(track.items[pair]) for track in film.tracks))
            clips.append((pixels - self.mean) / self.std)
            patches.append(patch_targets(film, labels, seen))
            kinds.append([])
            at = start
            for example in asker.ask(film, seen) if room else ():
                swapped = swap and self.rng.random() < (0.15 if all(example.seen) else 0.6)
                written = self.writer.write(example, swap=self.rng if swapped else None)
                stop = at + len(written[0])
                if stop > length:
                    break
                ids[row, at:stop], targets[row, at:stop], opens[row, at:stop] = written
                assert isinstance(example.query, cs.ClipQuery)
                kinds[row].append((asker.sort_of(example.query, film), all(example.seen)))
                block[row, at:stop] = len(kinds[row])
                position[row, at:stop] = np.arange(self.start, self.start + stop - at)
                at = stop
            used = max(used, at)
        ids, targets, opens, block, position = (each[:, :used] for each in (ids, targets, opens, block, position))
        return Batch(
            pixels=torch.from_numpy(np.stack(clips)),
            ids=torch.from_numpy(ids),
            targets=torch.from_numpy(targets),
            opens=torch.from_numpy(opens),
            block=torch.from_numpy(block),
            position=torch.from_numpy(position),
            patches={name: torch.from_numpy(np.stack([each[name] for each in patches])) for name in patches[0]},
            kinds=kinds,
        )


def visible(film: cs.Film, labels: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """The part of each object that shows in each frame, ``(track, t)``; where it is not, of its place."""
    seen = np.zeros((len(film.tracks), cs.FRAMES))
    for number, track in enumerate(film.tracks):
        place = labels[track.shown[0]] == number
        for frame in range(cs.FRAMES):
            under = labels[frame] == number if track.items[frame] else place
            seen[number, frame] = shown[frame][under].mean()
    return seen


def by_patch(values: np.ndarray) -> np.ndarray:
    """Frames ``(8, 84, 84)`` by patch, ``(4 * 36, 2 * 14 * 14)``, in the video processor's order."""
    side, steps = GRID // MERGE, len(values) // 2
    cut = values.reshape(steps, 2, side, MERGE, PATCH, side, MERGE, PATCH)
    return cut.transpose(0, 2, 5, 3, 6, 1, 4, 7).reshape(steps * PATCHES, -1)


def patch_targets(film: cs.Film, labels: np.ndarray, seen: np.ndarray) -> dict[str, np.ndarray]:
    """Shape, color and motion of the object under each patch, ``(4 * 36,)`` each: 0 for none, -100 for too little to
    tell."""
    cells = by_patch(labels)
    share = np.stack([(cells == number).mean(1) for number in range(len(film.tracks))], axis=1)
    best, most = share.argmax(1), share.max(1)
    found = {name: np.full(len(cells), -100) for name in ("shape", "colour", "way")}
    for patch in np.flatnonzero(most >= 0.2):
        track, first = int(best[patch]), patch // PATCHES * 2
        items = [film.tracks[track].items[frame] for frame in (first, first + 1)]
        there = [item for item in items if item]
        if seen[track, first : first + 2].min() < 0.6:
            continue
        found["shape"][patch] = 1 + questions.SHAPES.index(there[0].shape)
        if len({item.colour for item in there}) == 1:
            found["colour"][patch] = 1 + questions.COLOURS.index(there[0].colour)
        if len(there) == 2:
            moved = cs.Track((there[0], there[1])).way
            found["way"][patch] = 0 if moved == "nowhere" else 1 + questions.WAYS.index(moved)
    for values in found.values():
        values[most < 0.03] = 0
    return found


class Net(nn.Module):
    """The training view of the model: the same modules, the frames' attention as one batch."""

    tower = ".visual."  # in the names of what the first stage trains

    def __init__(self, model: Qwen2VLForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        self.sizes = {"shape": 1 + len(questions.SHAPES), "colour": 1 + len(questions.COLOURS), "way": 5}
        self.head = nn.Linear(WIDTH, sum(self.sizes.values()))

    @property
    def lm_head(self) -> nn.Module:
        return self.model.lm_head

    def patches(self, pixels: Tensor) -> Tensor:
        """Output of the tower before tokens are merged, ``(b, 4 * 36, 96)``."""
        tower, size, steps, side = self.model.model.visual, len(pixels), pixels.shape[1] // 2, GRID // MERGE
        cut = pixels.view(size, steps, 2, side, MERGE, PATCH, side, MERGE, PATCH, 3)
        flat = cut.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8).reshape(size * steps * PATCHES, -1)
        kernel = tower.patch_embed.proj.weight
        states = (flat @ kernel.flatten(1).T).view(size * steps, PATCHES, WIDTH)
        cos, sin = tower.rotary_pos_emb(states, self.places())
        for block in tower.blocks:
            states = states + attend(block.attn, block.norm1(states), cos, sin)
            states = states + block.mlp(block.norm2(states))
        return states.view(size, steps * PATCHES, WIDTH)

    @staticmethod
    def places() -> Tensor:
        """Row and column of each patch of a frame, in the order of the processor, ``(36, 2)``."""
        rows, cols = np.meshgrid(range(GRID), range(GRID), indexing="ij")
        side = GRID // MERGE
        order = [each.reshape(side, MERGE, side, MERGE).transpose(0, 2, 1, 3).reshape(-1) for each in (rows, cols)]
        return torch.from_numpy(np.stack(order, axis=1))

    def states(self, patches: Tensor, batch: Batch) -> Tensor:
        """The decoder's last states, ``(b, length, 128)``."""
        embedded = self.model.get_input_embeddings()(batch.ids)
        video = self.model.model.visual.merger(patches.reshape(-1, WIDTH)).view(len(embedded), VIDEO_TOKENS, HIDDEN)
        embedded = torch.cat([embedded[:, :BEFORE], video, embedded[:, PREFIX - 1 :]], dim=1)
        found: Tensor = self.model.model.language_model(
            inputs_embeds=embedded, attention_mask=batch.attention(), position_ids=batch.positions(), use_cache=False
        ).last_hidden_state
        return found

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        patches = self.patches(batch.pixels)
        return patches, self.states(patches, batch)

    def patch_loss(self, patches: Tensor, batch: Batch) -> tuple[Tensor, list[float]]:
        """Loss on what is under the patches, and for each property the share of object patches that are right."""
        parts = self.head(patches).flatten(0, 1).split(list(self.sizes.values()), dim=1)
        loss, right = torch.zeros(()), []
        for name, logits in zip(self.sizes, parts, strict=True):
            wanted = batch.patches[name].flatten()
            loss = loss + F.cross_entropy(logits, wanted)
            objects = wanted > 0
            right.append(float((logits.detach().argmax(1)[objects] == wanted[objects]).float().mean()))
        return loss, right

    def answer_loss(self, states: Tensor, batch: Batch) -> Tensor:
        wanted = batch.targets >= 0
        return base.answer_loss(self.lm_head(states[wanted]), batch.targets[wanted], batch.opens[wanted])


def attend(layer: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A tower's attention within each frame, ``(frame, patch, width)``, as the layer itself does it frame by frame."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

    frames, patches, _ = states.shape
    query, key, value = layer.qkv(states).view(frames, patches, 3, layer.num_heads, -1).unbind(2)
    query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
    mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    found: Tensor = layer.proj(mixed.transpose(1, 2).reshape(frames, patches, -1))
    return found


class Progress:
    """Where a run is, on disk: written now and then and when the process is told to end, read when it starts again."""

    def __init__(self, path: Path, net: Net, loaders: dict[str, Any], told: threading.Event) -> None:
        self.path, self.net, self.loaders, self.told = path, net, loaders, told
        self.kept: dict[str, Any] = torch.load(path, weights_only=False) if path.exists() else {}
        if self.kept:
            net.load_state_dict(self.kept["net"])
            for name, state in self.kept["loaders"].items():
                loaders[name].rng.bit_generator.state = state

    def write(self, stage: int, step: int, optimise: torch.optim.Optimizer) -> None:
        """Keeps everything that the next step depends on. Whole or not at all."""
        part = self.path.with_suffix(".part")
        loaders = {name: loader.rng.bit_generator.state for name, loader in self.loaders.items()}
        kept = {"net": self.net.state_dict(), "optimise": optimise.state_dict(), "stage": stage, "step": step}
        torch.save({**kept, "loaders": loaders}, part)
        part.replace(self.path)


@contextmanager
def told_to_end() -> Iterator[threading.Event]:
    """Set when the process gets SIGTERM, which does not end it meanwhile."""
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)


def train(options: argparse.Namespace) -> None:
    """Trains the model and writes it, with its processor, to ``options.out``."""
    with told_to_end() as told:
        _train(options, told)


def _train(options: argparse.Namespace, told: threading.Event) -> None:
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    clock = base.Clock()
    processor = build_processor()
    net = Net(build_model(processor.tokenizer))
    writer = base.Writer(processor.tokenizer)
    options.out.mkdir(parents=True, exist_ok=True)

    def loader(split: str, n: float, objects: tuple[int, int], offset: int, seed: int) -> Loader:
        n = max(8, int(n * options.scale))
        pool = Pool.draw(split, n, objects=objects, offset=offset, workers=options.threads)
        return Loader(pool, writer, processor.video_processor, seed=options.seed * 1000 + seed)

    few = loader("train", options.video_pool / 6, (1, 2), 10**6, 2)
    many = loader("train", options.video_pool, (2, 3), 0, 1)
    check = loader("tune", 300, (2, 3), 10**6, 9)
    parameters = sum(p.numel() for p in net.model.parameters())
    base.log(parameters=parameters, vocabulary=len(processor.tokenizer), seed=options.seed, **clock.read())
    progress = Progress(options.out / "training.pt", net, {"few": few, "many": many, "check": check}, told)
    n1, n2, n3 = (max(2, int(n * options.scale)) for n in options.video_steps)

    def draw(stage: int, step: int) -> Batch:
        if stage == 1:
            return many.batch(48)
        if stage == 2:
            return (few if step < 0.15 * n2 else many).batch(16, room=options.room, absent=0.05, swap=step > 0.4 * n2)
        share = 0.20 + 0.30 * min(1.0, step / (0.5 * n3))
        return many.batch(16, room=options.room, veiled=share, frozen=0.08, absent=0.08, swap=True)

    def loss_of(stage: int, step: int) -> tuple[Tensor, dict[str, Any]]:
        batch = draw(stage, step)
        patches = net.patches(batch.pixels)
        if stage == 1:
            loss, right = net.patch_loss(patches, batch)
            return loss, {"patch_accuracy": [round(value, 3) for value in right]}
        loss = net.answer_loss(net.states(patches, batch), batch)
        weight = 0.5 * max(0.0, 1 - step / (0.8 * n2)) if stage == 2 else 0.0
        return (loss + weight * net.patch_loss(patches, batch)[0] if weight else loss), {}

    for stage, steps, peak, floor in ((1, n1, 2e-3, 0.05), (2, n2, 1.5e-3, 0.5), (3, n3, 1.2e-3, 0.01)):
        run_stage(stage, steps, peak, floor, net, loss_of, progress, options, clock, check, processor)
        if told.is_set():
            return
    base.save_halved(net.model, processor, options.out)
    progress.path.unlink()
    base.log(stage="done", out=str(options.out), **clock.read())


def run_stage(
    stage: int, steps: int, peak: float, floor: float, net: Net, loss_of: Any, progress: Progress,
    options: argparse.Namespace, clock: base.Clock, check: Any, processor: Any,
) -> None:  # fmt: skip
    """One stage, from where it was left."""
    kept = progress.kept
    if kept and kept["stage"] > stage:
        return
    trained = [(n, p) for n, p in net.named_parameters() if stage > 1 or net.tower in n or n.startswith("head.")]
    optimise = base.optimiser(trained)
    first = 0
    if kept and kept["stage"] == stage:
        optimise.load_state_dict(kept["optimise"])
        first = kept["step"]
    total: list[float] = []
    for step in range(first, steps):
        for group in optimise.param_groups:
            group["lr"] = base.schedule(step, steps, peak, floor=floor)
        loss, found = loss_of(stage, step)
        optimise.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
        optimise.step()
        total.append(float(loss.detach()))
        last = step + 1 == steps
        if (step + 1) % 50 == 0 or last:
            base.log(stage=stage, step=step + 1, loss=round(float(np.mean(total)), 4), **found, **clock.read())
            total.clear()
        if stage > 1 and ((step + 1) % options.check == 0 or last):
            drawn = {"batches": max(1, int(4 * options.scale)), "room": 120}
            clear = base.held_out(net, check, **drawn)
            veiled = base.held_out(net, check, **drawn, veiled=0.6, absent=0.2) if stage > 2 else {}
            base.log(stage=stage, step=step + 1, clear=clear, veiled=veiled, **clock.read())
            base.save_halved(net.model, processor, options.out)
        if progress.told.is_set() or last or (step + 1) % 200 == 0:
            progress.write(stage, step + 1, optimise)
        if progress.told.is_set():
            base.log(stage=stage, step=step + 1, stopped=True)
            return
    progress.kept = {}
