"""Trains a larger model for the hard scenes (``demo.scenes(n, hard=True)``), from the demo model's weights.

    OMP_WAIT_POLICY=passive python examples/train_hard_model.py --out runs/hard/model

The demo model grows first: layers whose output is zero are added, and units to the tower's MLPs whose output is
zero, so that the larger model starts by answering exactly as the small one does. Then it is trained as the demo model
is (``train_demo_model.py``: packed questions, blended pictures, "hidden" for what cannot be seen) in two stages, each
with some plain layouts among the crowded ones. Their objects are smaller, fainter and more hidden than those of hard
scenes (``hard.HARD``), in the first stage more so than in the second. In the first, the vision tower's loss on the
object under every patch fades out on the way.

Every `--save` steps a usable checkpoint is written to `--out` with ``card.json`` (settings, steps, seconds, held-out
accuracy), and beside it the state of the training (``.state``; the scenes are in ``.pool1`` and ``.pool2``). The same
command after an interruption goes on from there and ends with the same weights, bit for bit, as a run without one.

With ``--processes 2`` each draws half of every batch and they average their gradients once per step, which on a busy
machine is faster than two threads that meet after every product.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import train_demo_model as base
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from lvlm_probe import demo
from lvlm_probe.demo import hard, questions
from lvlm_probe.demo import scene as sc

KIND_WEIGHTS = {
    "colour": 0.12,
    "shape": 0.15,
    "count": 0.29,
    "where": 0.14,
    "pair": 0.09,
    "cell": 0.11,
    "which": 0.10,
}
"""How often a picture is asked a question of each kind."""

LATER_WEIGHTS = {
    "colour": 0.12,
    "shape": 0.17,
    "count": 0.25,
    "where": 0.10,
    "pair": 0.08,
    "cell": 0.08,
    "which": 0.20,
}
"""The same in the second stage: more of what the first leaves weakest, and of ``which``, new to the demo model."""

FAINTEST = hard.Ranges((5, 8), radius=(0.088, 0.138), contrast=(0.45, 0.80), pattern=(8.0, 20.0), hidden=(0.15, 0.40))
FAINT = hard.Ranges((5, 8), radius=(0.105, 0.145), contrast=(0.55, 0.90), pattern=(8.0, 20.0), hidden=(0.12, 0.30))


@dataclass(frozen=True)
class Stage:
    """Layouts and the index of their first, highest learning rate, weights of the loss on patches and of the kinds."""

    ranges: hard.Ranges
    offset: int
    peak: float
    patches: float
    kinds: dict[str, float]


STAGES = (Stage(FAINTEST, 0, 1e-3, 0.3, KIND_WEIGHTS), Stage(FAINT, 2 * 10**6, 7e-4, 0.0, LATER_WEIGHTS))

SIZES = ("tower_layers", "tower_units", "decoder_layers")
"""What `grow` makes larger."""

GROUPS = (1, 2, 3, 4, 5)
"""Sizes of the groups of objects alike that a layout laid out for counting can have, in equal shares."""


class HardAsker(base.Asker):
    """The questions of hard scenes, absent things included."""

    queries = staticmethod(hard.queries)

    def _absent(
        self, kind: str, layout: questions.Layout, options: list[questions.Query], visibility: np.ndarray
    ) -> base.Example | None:
        items = layout.items
        if kind == "which":
            shape = (
                self._pick([item.shape for item in items]) if self.rng.random() < 0.8 else self._pick(questions.SHAPES)
            )
            row, column = self._pick(questions.ROWS), self._pick(questions.COLUMNS)
            if any(item.shape == shape and questions.may_be_in(item, str(row), str(column)) for item in items):
                return None
            return base.Example(hard.which_query(str(shape), str(row), str(column), "red", ()), (False,))
        if kind == "count" and self.rng.random() < 0.6:
            colour, shape = self._pick([item.colour for item in items]), self._pick([item.shape for item in items])
            if any((item.colour, item.shape) == (colour, shape) for item in items):
                return None
            noun = (f"{colour} {shape}", f"{colour} {questions.plural(str(shape))}")
            return base.Example(questions.count_query(noun, 2, ()), (False,))
        return super()._absent(kind, layout, options, visibility)


class HardLoader(base.Loader):
    """Makes batches of hard questions out of a pool."""

    asker = HardAsker


def draw_pool(split: str, n: int, *, offset: int, workers: int, ranges: hard.Ranges = hard.HARD) -> base.Pool:
    """Hard layouts ``offset .. offset + n`` of seed 0 of a split, laid out for each kind of question in turn.

    The ones laid out for counting are two in eight.
    """
    chunks = [range(i, min(i + 250, offset + n)) for i in range(offset, offset + n, 250)]
    jobs = [(split, ranges, chunk) for chunk in chunks]
    if workers > 1:
        with ProcessPoolExecutor(workers) as executor:
            parts = list(executor.map(_draw_part, jobs))
    else:
        parts = [_draw_part(job) for job in jobs]
    return join([base.Pool(*part) for part in parts])


def _draw_part(job: tuple[str, hard.Ranges, range]) -> tuple[np.ndarray, np.ndarray, list[questions.Layout]]:
    split, ranges, indices = job
    pixels, labels, layouts = [], [], []
    kinds = (*sc.HARD_KINDS, "count")
    for index in indices:
        rng = sc.scene_rng(split, 0, index, hard=True)
        kind = kinds[index % len(kinds)]
        group = int(rng.choice(GROUPS)) if kind == "count" else None
        layout = hard.draw_layout(rng, kind, group, ranges=ranges)
        picture, label = base.draw_small(layout)
        pixels.append(picture)
        labels.append(label)
        layouts.append(layout)
    return np.stack(pixels), np.stack(labels), layouts


def join(pools: Sequence[base.Pool]) -> base.Pool:
    """One pool out of several."""
    return base.Pool(
        np.concatenate([pool.pixels for pool in pools]),
        np.concatenate([pool.labels for pool in pools]),
        [layout for pool in pools for layout in pool.layouts],
    )


def training_pool(options: argparse.Namespace, number: int) -> base.Pool:
    """The scenes that a stage trains on, drawn once and kept beside the checkpoint."""
    stage, file = STAGES[number], options.out.with_name(f"{options.out.name}.pool{number + 1}")
    wanted = {
        "ranges": asdict(stage.ranges),
        "offset": stage.offset,
        "pool": options.pool[number],
        "plain": options.plain,
    }
    if file.exists():
        kept = torch.load(file, weights_only=False)
        if kept.pop("wanted") == wanted:
            return base.Pool(**kept)
    plain = base.Pool.draw("train", options.plain, objects=(3, 5), offset=4 * 10**6, workers=options.workers)
    n, workers = options.pool[number], options.workers
    crowded = draw_pool("train", n, offset=stage.offset, workers=workers, ranges=stage.ranges)
    pool = join([crowded, plain])
    partial = file.with_name(file.name + ".part")
    torch.save({"wanted": wanted, **vars(pool)}, partial)
    partial.replace(file)
    return pool


def grow(
    model: LlavaForConditionalGeneration, *, tower_layers: int, tower_units: int, decoder_layers: int
) -> LlavaForConditionalGeneration:
    """A deeper model with wider MLPs in its tower that computes what `model` does.

    Added layers are copies of the last one whose output projections are zero, so their residual branches add nothing
    yet; added units keep their random input weights and have zero output weights. Both still receive gradients.
    """
    config = copy.deepcopy(model.config)
    config.vision_config.num_hidden_layers = tower_layers
    config.vision_config.intermediate_size = tower_units
    config.text_config.num_hidden_layers = decoder_layers
    grown = LlavaForConditionalGeneration(config)
    grown.generation_config = copy.deepcopy(model.generation_config)
    old = model.state_dict()
    with torch.no_grad():
        for key, tensor in grown.state_dict().items():
            source = key
            while source not in old:  # an added layer starts from the one before it
                source = re.sub(r"(?<=\.layers\.)\d+", lambda number: str(int(number[0]) - 1), source)
            if source != key and re.search(r"\.(out_proj|o_proj|fc2|down_proj)\.", key):
                tensor.zero_()
                continue
            if key.endswith("fc2.weight"):
                tensor.zero_()
            tensor[tuple(slice(size) for size in old[source].shape)] = old[source]
    return grown


def step_loss(net: base.Net, batch: base.Batch, aux: float) -> tuple[Tensor, float]:
    """The loss to descend, and the answers' part of it."""
    seen = net.patches(batch.pixels)
    loss = net.answer_loss(net.states(seen, batch.ids, batch.attention(), batch.position), batch)
    return (loss + aux * net.patch_loss(seen, batch)[0] if aux > 0 else loss), float(loss.detach())


def export(net: base.Net, processor: LlavaProcessor, out: Path, card: dict[str, Any]) -> None:
    """Writes checkpoint and card beside `out` and then puts them in its place, so that `out` is always whole."""
    fresh, stale = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    for folder in (fresh, stale):
        shutil.rmtree(folder, ignore_errors=True)
    base.save(net, processor, fresh)
    (fresh / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    if out.exists():
        out.rename(stale)
    fresh.rename(out)
    shutil.rmtree(stale, ignore_errors=True)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replaces the gradients in every process by their mean over the processes."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def train_part(rank: int, options: argparse.Namespace, meeting: str) -> None:
    """One of several processes that train together."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=options.processes)
    train(options, rank)
    dist.destroy_process_group()


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What decides the weights."""
    names = (*SIZES, "seed", "steps", "pool", "plain", "room", "batch", "processes")
    return {name: getattr(options, name) for name in names}


def state_of(options: argparse.Namespace) -> dict[str, Any] | None:
    """Where an interrupted run of the same settings stopped, or None."""
    file = options.out.with_name(options.out.name + ".state")
    state = torch.load(file, weights_only=False) if file.exists() else None
    if state is not None and state["settings"] != settings_of(options):
        raise SystemExit(f"{file} is from a run with other settings, {state['settings']}; remove it to start anew")
    return state


def train(options: argparse.Namespace, rank: int = 0) -> None:
    settings, state = settings_of(options), state_of(options)
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    small, processor = demo.load()
    net = base.Net(grow(small, **{name: settings[name] for name in SIZES})).train()
    writer = base.Writer(processor.tokenizer)

    def loader(pool: base.Pool, seed: int, weights: dict[str, float] = KIND_WEIGHTS) -> HardLoader:
        return HardLoader(pool, writer, processor.image_processor, seed=seed, weights=weights)

    started, before = time.time(), state["seconds"] if state else {"wall": 0.0, "cpu": 0.0}

    def seconds() -> dict[str, float]:
        used = os.times()  # of this process and of those that drew scenes for it
        cpu = used.user + used.system + used.children_user + used.children_system
        return {"wall": round(before["wall"] + time.time() - started, 1), "cpu": round(before["cpu"] + cpu, 1)}

    if rank == 0:
        checked = draw_pool("tune", options.check_scenes, offset=10**6, workers=options.workers)
    if state is not None:
        net.load_state_dict(state["net"])
    first, total_steps = state["step"] if state else 0, sum(options.steps)
    parameters = sum(p.numel() for p in net.llava.parameters())
    if rank == 0:
        base.log(parameters=parameters, threads=options.threads, first_step=first, seconds=seconds(), **settings)

    def keep(step: int, own: HardLoader, optimise: torch.optim.Optimizer) -> None:
        loaders = [(own.rng.bit_generator.state, own.order)]
        if options.processes > 1:
            loaders *= options.processes
            dist.all_gather_object(loaders, loaders[rank])
        if rank > 0:
            return
        clear = base.held_out(net, loader(checked, 9), batches=options.check_batches, veiled=0.0, absent=0.0)
        veiled = base.held_out(net, loader(checked, 10), batches=options.check_batches, veiled=0.6, absent=0.2)
        base.log(step=step, clear=clear, veiled=veiled, seconds=seconds())
        card = {
            "what": "LLaVA for lvlm_probe's hard demo scenes, grown from the demo model; examples/train_hard_model.py",
            "settings": settings,
            "parameters": parameters,
            "steps": step,
            "finished": step == total_steps,
            "seconds": seconds(),
            "threads": options.threads,
            "torch": torch.__version__,
            "held_out_tune_scenes": {"clear": clear, "veiled_and_absent": veiled},
        }
        export(net, processor, options.out, card)
        partial, file = (options.out.with_name(options.out.name + end) for end in (".state.part", ".state"))
        torch.save(
            {
                "settings": settings,
                "net": net.state_dict(),
                "optimiser": optimise.state_dict(),
                "loaders": loaders,
                "step": step,
                "seconds": seconds(),
            },
            partial,
        )
        partial.replace(file)

    start, recent = 0, 0.0
    for number, (stage, steps) in enumerate(zip(STAGES, options.steps, strict=True)):
        begin, start = start, start + steps
        if first >= start:
            continue
        own = loader(training_pool(options, number), options.seed * 1000 + 1 + number + 100 * rank, stage.kinds)
        optimise = base.optimiser(list(net.named_parameters()))
        if state is not None and first > begin:
            optimise.load_state_dict(state["optimiser"])
            own.rng.bit_generator.state, own.order = state["loaders"][rank]
        for step in range(max(first, begin), start):
            done = step - begin
            for group in optimise.param_groups:
                group["lr"] = base.schedule(done, steps, stage.peak, floor=0.01)
            size = options.batch // options.processes
            batch = own.batch(size, room=options.room, veiled=0.35, absent=0.08, swap=True)
            loss, value = step_loss(net, batch, stage.patches * max(0.0, 1 - done / (0.7 * steps)))
            optimise.zero_grad(set_to_none=True)
            loss.backward()
            if options.processes > 1:
                average_gradients(list(net.parameters()))
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimise.step()
            recent += value
            if (step + 1) % 50 == 0 and rank == 0:
                base.log(step=step + 1, loss=round(recent / 50, 4), seconds=seconds())
                recent = 0.0
            if (step + 1) % options.save == 0 or step + 1 == start:
                keep(step + 1, own, optimise)
            if options.stop_after is not None and step + 1 - first >= options.stop_after:
                return


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2, help="processes that train together")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw the scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=2, default=[1500, 1500], help="steps of the two stages")
    parser.add_argument(
        "--pool", type=int, nargs=2, default=[5000, 4000], help="their numbers of distinct hard layouts"
    )
    parser.add_argument("--plain", type=int, default=600, help="number of plain ones among them")
    parser.add_argument("--room", type=int, default=126, help="tokens of questions and answers per picture")
    parser.add_argument("--batch", type=int, default=16, help="pictures per step")
    parser.add_argument("--tower-layers", type=int, default=5)
    parser.add_argument("--tower-units", type=int, default=512, help="width of the tower's MLPs")
    parser.add_argument("--decoder-layers", type=int, default=4)
    parser.add_argument("--save", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--check-scenes", type=int, default=200)
    parser.add_argument("--check-batches", type=int, default=2)
    parser.add_argument(
        "--stop-after", type=int, help="stop after so many steps, for a try-out; goes on when run again"
    )
    options = parser.parse_args(arguments)
    if options.batch % options.processes:
        parser.error(f"--batch {options.batch} does not part into {options.processes} processes")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.processes == 1:
        train(options)
        return 0
    state_of(options)
    for number in range(len(STAGES)):
        training_pool(options, number)  # once, for all of them
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train_part, args=(options, str(Path(folder) / "meeting")), nprocs=options.processes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
