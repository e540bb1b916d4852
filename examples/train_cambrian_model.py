"""The small Cambrian that ``train_demo_model.py --family cambrian`` trains: four vision towers and one decoder.

It begins where the published models do, with parts that have been trained: the CLIP tower, the projector and the
decoder are those of the demo model. Three stages follow:

1. the other towers (SigLIP, DINOv2, ConvNeXt), each alone, on the shape and colour of the object under every patch;
2. towers and connector, so that the projector gets what it knows, the demo model's patch features of the same picture;
3. everything, on packed questions about pictures, part of them blended with pictures of nothing, as in stage 3 of the
   demo model. The aggregator's layers inside the decoder begin here: before, their output is zero.

In stages 2 and 3 the features of a tower are left out now and then, so that none of the four is superfluous.

The plugin ``integrations/cambrian`` has to be installed, or to be on ``PYTHONPATH``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import train_demo_model as base
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    ConvNextConfig,
    Dinov2Config,
    GenerationConfig,
    LlamaConfig,
    SiglipVisionConfig,
)

from lvlm_probe import demo
from lvlm_probe.demo import questions

SIDE, PATCH, GRID, HIDDEN = base.IMAGE_SIDE, base.PATCH, base.GRID, base.HIDDEN
IMAGE_TOKENS = GRID * (GRID + 1)
"""A square picture's cells, and a newline at the end of each row."""

CLIP_TOWER = 1
TOWERS = 4
LEFT_OUT = 0.25
"""How often the features of a tower are left out."""
CONNECTOR = ("model.model.tower_projectors.", "model.model.connectors.", "model.model.vision_query")
TRAINED = (
    f"model.model.vision_towers.{CLIP_TOWER}.",
    "model.model.mm_projector.",
    "model.model.language_model.embed_tokens.",
    "model.model.language_model.layers.",
    "model.model.language_model.norm.",
    "model.lm_head.",
)
PACE = 0.3
"""What has been trained before learns at this share of the rate: at the full rate it would forget."""


def build_model(tokenizer: Any) -> Any:
    """The untrained model with the demo model's CLIP tower, decoder and words."""
    from lvlm_probe_cambrian import CambrianConfig, CambrianForConditionalGeneration

    llava, _ = demo.load()
    shape: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    siglip = SiglipVisionConfig(**shape, intermediate_size=2 * HIDDEN, hidden_act="gelu")
    dinov2 = Dinov2Config(**shape, mlp_ratio=2, use_swiglu_ffn=False)
    convnext = ConvNextConfig(
        hidden_sizes=[32, 48, 64, 96],
        depths=[1, 1, 2, 1],
        image_size=SIDE,
        layer_norm_eps=1e-5,
        layer_scale_init_value=0.1,
    )
    clip = CLIPVisionConfig.from_dict(llava.config.vision_config.to_dict())
    config = CambrianConfig(
        text_config=LlamaConfig.from_dict(llava.config.text_config.to_dict()),
        vision_config_0=siglip,
        vision_config_1=clip,
        vision_config_2=dinov2,
        vision_config_3=convnext,
        tower_grids=[GRID, GRID, GRID, 2 * GRID],
        image_grid=GRID,
        query_grids=[GRID],
        vision_hidden_size=HIDDEN,
        vision_heads=4,
        connector_depth=2,
        sampler_layers=[0, 1],
        clip_layer=-1,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = CambrianForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.no_grad():
        towers: Any = model.model.vision_towers
        towers[CLIP_TOWER].load_state_dict(llava.model.vision_tower.state_dict())
        # The decoder's layers hold the aggregator's as well, which the demo model does not have.
        model.model.language_model.load_state_dict(llava.model.language_model.state_dict(), strict=False)
        model.lm_head.load_state_dict(llava.lm_head.state_dict())
        model.model.image_newline.zero_()
        table = base.sincos_table()
        towers[0].embeddings.position_embedding.weight.copy_(table)
        towers[2].embeddings.position_embeddings.copy_(torch.cat([torch.zeros(1, HIDDEN), table])[None])
        decoder: Any = model.model.language_model
        for layer in decoder.layers:
            if getattr(layer, "sampler", None) is not None:
                for inner in layer.sampler.layers:
                    inner.proj_out.linear_2.weight.zero_()
        for tower in (towers[0], towers[2]):
            for name, parameter in tower.named_parameters():
                if name.endswith(("q_proj.weight", "k_proj.weight", "query.weight", "key.weight")):
                    parameter.mul_(2)
    return model


class Teacher:
    """What the connector learns in stage 2: the demo model's patch features, without correlation and of variance one.

    As they are, one direction holds most of their variance, and of that of the image tokens nearly all: a squared
    distance would see nothing else. The projector's first layer is made to undo the change, so that image tokens are
    the demo model's once the connector is exact.

    Args:
        llava: the demo model.
        pixels: ``(image, 3, S, S)``, pictures to measure the features' covariance on.
    """

    FLOOR = 0.3
    """A direction of this variance counts half as much as one of great variance; those far below are noise."""

    @torch.no_grad()
    def __init__(self, llava: Any, pixels: Tensor) -> None:
        self.llava = llava
        features = self._features(pixels).flatten(0, 1)
        self.mean = features.mean(dim=0)
        variance, directions = torch.linalg.eigh(torch.cov(features.T))
        self.whiten, self.colour = directions / variance.sqrt(), directions * variance.sqrt()
        weights = variance / (variance + self.FLOOR)
        self.weights = weights / weights.mean()

    def _features(self, pixels: Tensor) -> Tensor:
        patches: Tensor = self.llava.model.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]
        return patches

    @torch.no_grad()
    def fit(self, projector: Any) -> None:
        """Gives ``projector`` the demo model's weights, for features as the connector learns them."""
        known = self.llava.model.multi_modal_projector
        projector[0].weight.copy_(known.linear_1.weight @ self.colour)
        projector[0].bias.copy_(known.linear_1.bias + known.linear_1.weight @ self.mean)
        projector[2].load_state_dict(known.linear_2.state_dict())

    def distance(self, given: Tensor, pixels: Tensor) -> Tensor:
        """Weighted mean squared distance of ``(image, patch, d)`` from the features of ``pixels``."""
        with torch.no_grad():
            wanted = (self._features(pixels) - self.mean) @ self.whiten
        return ((given - wanted).square() * self.weights).mean()


class Net(nn.Module):
    """The training view of the model: a batch in, decoder states and patch logits out."""

    def __init__(self, model: Any, normalisation: list[tuple[list[float], list[float]]], given: int) -> None:
        super().__init__()
        from lvlm_probe_cambrian.towers import feature_size

        self.model = model
        sizes = [feature_size(config) for config in model.config.vision_configs]
        self.heads = nn.ModuleList(
            [nn.Linear(size, 2 + len(questions.SHAPES) + len(questions.COLOURS)) for size in sizes]
        )
        self.means = [torch.tensor(mean)[:, None, None] for mean, _ in normalisation]
        self.stds = [torch.tensor(std)[:, None, None] for _, std in normalisation]
        self.given = given
        self.draw = torch.Generator().manual_seed(0)

    @contextmanager
    def thinned(self, share: float = LEFT_OUT) -> Iterator[None]:
        """In the block, every tower's features are left out with probability ``share``; one tower at least is kept."""
        kept = torch.rand(TOWERS, generator=self.draw) >= share
        kept[int(torch.randint(TOWERS, (1,), generator=self.draw))] = True
        projectors = self.model.model.tower_projectors
        hooks = [
            projectors[tower].register_forward_hook(lambda _m, _a, output: output * 0.0)
            for tower in range(TOWERS)
            if not kept[tower]
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def feature_loss(self, batch: base.Batch, teacher: Teacher) -> Tensor:
        """Distance of what the connector gives to the projector from what the teacher has for these pictures."""
        given: list[Tensor] = []
        watch = self.model.model.mm_projector.register_forward_pre_hook(lambda _m, args: given.append(args[0]))
        named = {f"pixel_values_{tower}": part for tower, part in enumerate(self.pixels(batch))}
        try:
            self.model.model.get_image_features(**named, image_sizes=torch.full((len(batch.pixels), 2), sc_side()))
        finally:
            watch.remove()
        return teacher.distance(given[0].flatten(1, 2), batch.pixels)

    @property
    def lm_head(self) -> nn.Module:
        head: nn.Module = self.model.lm_head
        return head

    def pixels(self, batch: base.Batch) -> list[Tensor]:
        """The batch's pictures as each tower's processor normalises them."""
        plain = batch.pixels * self.stds[self.given] + self.means[self.given]
        return [(plain - mean) / std for mean, std in zip(self.means, self.stds, strict=True)]

    def patch_loss(self, batch: base.Batch, towers: tuple[int, ...]) -> tuple[Tensor, list[float]]:
        """Loss of some towers on the patches' shape and colour, and the share of object patches each gets right."""
        from lvlm_probe_cambrian.towers import tower_features

        pixels = self.pixels(batch)
        total, right = torch.zeros(()), []
        for tower in towers:
            features = tower_features(self.model.model.vision_towers[tower], pixels[tower], grid=GRID, clip_layer=-1)
            logits = self.heads[tower](features).flatten(0, 1)
            shape, colour = logits[:, : 1 + len(questions.SHAPES)], logits[:, 1 + len(questions.SHAPES) :]
            on_shape, on_colour = batch.patch_shape.flatten(), batch.patch_colour.flatten()
            total = total + F.cross_entropy(shape, on_shape) + F.cross_entropy(colour, on_colour)
            objects = on_shape > 0
            right.append(float((shape.detach().argmax(1)[objects] == on_shape[objects]).float().mean()))
        return total, right

    def forward(self, batch: base.Batch) -> tuple[None, Tensor]:
        named = {f"pixel_values_{tower}": part for tower, part in enumerate(self.pixels(batch))}
        states = self.model.model(
            input_ids=batch.ids,
            image_sizes=torch.full((len(batch.ids), 2), sc_side()),
            attention_mask=batch.attention(),
            position_ids=batch.position,
            use_cache=False,
            **named,
        ).last_hidden_state
        return None, states

    def answer_loss(self, states: Tensor, batch: base.Batch) -> Tensor:
        wanted = batch.targets >= 0
        return base.answer_loss(self.lm_head(states[wanted]), batch.targets[wanted], batch.opens[wanted])


def sc_side() -> int:
    """Side of a training scene, pixels; all are square."""
    return base.SCENE_SIDE


def train(options: argparse.Namespace) -> None:
    """Trains the model and writes it, with its processor, to ``options.out``."""
    from lvlm_probe_cambrian import CambrianProcessor
    from lvlm_probe_cambrian.original_processor import make_image_processor

    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    clock = base.Clock()
    tokenizer = base.build_tokenizer()
    model = build_model(tokenizer)
    processor = CambrianProcessor(make_image_processor(model.config), tokenizer, chat_template=base.CHAT_TEMPLATE)
    towers = processor.image_processor.towers
    net = Net(model, [(list(tower["image_mean"]), list(tower["image_std"])) for tower in towers], CLIP_TOWER)
    writer = base.Writer(tokenizer)

    class Normalisation:
        image_mean, image_std = towers[CLIP_TOWER]["image_mean"], towers[CLIP_TOWER]["image_std"]

    def loader(pool: base.Pool, seed: int) -> base.Loader:
        return base.Loader(
            pool, writer, Normalisation, seed=options.seed * 1000 + seed, weights=base.KIND_WEIGHTS, tokens=IMAGE_TOKENS
        )

    def pool(split: str, n: int, offset: int) -> base.Pool:
        return base.Pool.draw(split, n, objects=(3, 5), offset=offset, workers=options.threads)

    scale = min(1.0, options.scale)
    check = loader(pool("tune", max(32, int(320 * options.scale)), 10**6), 9)
    source = loader(pool("train", max(1, int(options.pool * options.scale)), 0), 1)
    base.log(parameters=sum(p.numel() for p in model.parameters()), threads=options.threads, seed=options.seed)
    llava, _ = demo.load()

    seen = torch.cat([source.batch(32, veiled=0.3).pixels for _ in range(8)])
    teacher = Teacher(llava, seen)
    teacher.fit(model.model.mm_projector)

    def patches(step: int, steps: int) -> tuple[Tensor, dict[str, Any]]:
        loss, right = net.patch_loss(source.batch(16), (0, 2, 3))
        return loss, {"patch_accuracy": [round(value, 3) for value in right]}

    def features(step: int, steps: int) -> tuple[Tensor, dict[str, Any]]:
        with net.thinned():
            return net.feature_loss(source.batch(16, veiled=0.3), teacher), {}

    def answers(step: int, steps: int) -> tuple[Tensor, dict[str, Any]]:
        share = 0.20 + 0.25 * min(1.0, step / (0.5 * steps))
        batch = source.batch(16, room=options.room, veiled=share, absent=0.10, swap=True)
        with net.thinned():
            return net.answer_loss(net(batch)[1], batch), {}

    def run(stage: int, steps: int, peak: float, trained: list[tuple[str, nn.Parameter]], draw: Any) -> None:
        optimise = base.optimiser(trained)
        for group in list(optimise.param_groups):
            ids = {id(p) for n, p in trained if trained_before(n)}
            slow = [p for p in group["params"] if id(p) in ids]
            group["params"] = [p for p in group["params"] if id(p) not in ids]
            group["pace"] = 1.0
            if slow:
                optimise.add_param_group({**group, "params": slow, "pace": PACE})
        total = 0.0
        for step in range(steps):
            for group in optimise.param_groups:
                group["lr"] = group["pace"] * base.schedule(step, steps, peak, floor=0.02)
            loss, found = draw(step, steps)
            optimise.zero_grad(set_to_none=True)
            loss.backward()
            for part in parts_of(trained):  # each at its own pace: the loudest does not slow the others down
                nn.utils.clip_grad_norm_(part, 1.0)
            optimise.step()
            total += float(loss.detach())
            last = step + 1 == steps
            if (step + 1) % 50 == 0 or last:
                base.log(stage=stage, step=step + 1, loss=round(total / (step % 50 + 1), 4), **found, **clock.read())
                total = 0.0
            if stage > 1 and ((step + 1) % options.check == 0 or last):
                clear = base.held_out(net, check, batches=max(1, int(6 * scale)), veiled=0.0, absent=0.0)
                veiled = base.held_out(net, check, batches=max(1, int(4 * scale)), veiled=0.6, absent=0.2)
                base.log(stage=stage, step=step + 1, clear=clear, veiled=veiled, **clock.read())
                base.save_halved(model, processor, options.out)

    named = list(net.named_parameters())
    fresh = tuple(f"model.model.vision_towers.{tower}." for tower in (0, 2, 3))
    n1, n2, n3 = (max(2, int(n * options.scale)) for n in options.cambrian_steps)
    run(1, n1, 2e-3, [(n, p) for n, p in named if n.startswith((*fresh, "heads."))], patches)
    run(2, n2, 2e-3, [(n, p) for n, p in named if n.startswith((*fresh, *CONNECTOR))], features)
    run(3, n3, 1e-3, [(n, p) for n, p in named if not n.startswith("heads.")], answers)
    base.save_halved(model, processor, options.out)
    base.log(stage="done", out=str(options.out), **clock.read())


def trained_before(name: str) -> bool:
    """Whether a parameter is the demo model's; the aggregator inside the decoder's layers is not."""
    return name.startswith(TRAINED) and ".sampler." not in name


def parts_of(trained: list[tuple[str, nn.Parameter]]) -> list[list[nn.Parameter]]:
    """Parameters by tower; all that are no tower's together."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in trained:
        place = name.find("vision_towers.")
        parts.setdefault(name[place : place + 15] if place >= 0 else "", []).append(parameter)
    return list(parts.values())
