"""``lvlm_probe`` on a Cambrian, from ``attach`` to maps over the picture."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cambrian_tiny import IMAGE, build, chat, inputs, picture
from lvlm_probe_cambrian import encoder_shares
from lvlm_probe_cambrian.places import grid_places
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import lvlm_probe as probe
from lvlm_probe.images import ImagePath

TOWERS = tuple(f"model.vision_towers.{tower}" for tower in range(4))
PIXELS = tuple(f"pixel_values_{tower}" for tower in range(4))
SPAN = (0, 6)


def record(folder: Path, **more: Any) -> tuple[Any, Any, Any]:
    """A recorded answer of six tokens, the model and its processor."""
    model, processor = build(**more)
    with probe.attach(model, processor) as p, p.record(folder, attention=True) as recording:
        given = inputs(processor)
        given = given.to(model.dtype)
        model.generate(**given, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    return recording.traces[-1], model, processor


@functools.cache
def recorded(decoder: str = "llama", attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    import tempfile

    return record(Path(tempfile.mkdtemp()), decoder=decoder, attention=attention, dtype=dtype)


def replayed(*given: Any) -> Any:
    return probe.replay(*recorded(*given))


@pytest.mark.parametrize("decoder", ["llama", "phi3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_recording_changes_nothing_and_replay_repeats_it(tmp_path: Path, decoder: str, attention: str) -> None:
    trace, model, processor = record(tmp_path, decoder=decoder, attention=attention)
    plain = model.generate(
        **inputs(processor), max_new_tokens=6, min_new_tokens=6, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    said = plain.sequences[0, -6:]
    assert trace.token_ids.tolist() == said.tolist()
    wanted = torch.stack([step[0] for step in plain.logits]).log_softmax(-1).gather(-1, said[:, None])[:, 0]
    replay = probe.replay(trace, model, processor)
    assert (replay.original_log_probs - wanted).abs().max() <= 1e-5
    assert np.abs(np.asarray(trace.log_probs) - wanted.numpy()).max() <= 1e-5
    assert replay.llr.abs().max() > 0.1
    assert replay.anatomy.encoders == TOWERS
    assert replay.anatomy.decoder == "model.language_model"
    assert set(replay.path.pixel_keys) == set(PIXELS)


def test_the_processor_is_seen_through_as_it_is() -> None:
    """Masks reach all four inputs, and match the real processor on the real composite within rounding to 8 bits."""
    processor = build()[1]
    path = ImagePath.from_processor(processor.image_processor, [picture()])
    assert set(path.pixel_keys) == set(PIXELS)
    mask = torch.rand(1, 9, 9, generator=torch.Generator().manual_seed(0))
    fast, exact = path.apply(mask), path.apply(mask, mode="exact")
    for name in PIXELS:
        # One level of 255 is 1 / (255 σ), some 0.015 of a normalised value.
        assert (fast[name] - exact[name]).abs().mean() < 0.015
    whole = path.apply(torch.ones(1, 3, 3))
    real = processor.image_processor(images=picture(), return_tensors="pt")
    assert all(torch.equal(whole[name], real[name]) for name in PIXELS)
    assert path.seen().all()


def test_the_mask_gradient_is_the_finite_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers' norm computes in float32 whatever the model's precision, which differences this small do not bear.
    monkeypatch.setattr(
        LlamaRMSNorm,
        "forward",
        lambda self, x: self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt(),
    )
    replay = replayed("llama", "sdpa", torch.float64)
    generator = torch.Generator().manual_seed(0)
    mask = 0.3 + 0.4 * torch.rand(1, 6, 6, generator=generator, dtype=torch.float64)
    along = torch.randn(1, 6, 6, generator=generator, dtype=torch.float64)
    score = lambda log_probs: log_probs.sum(dim=1)  # noqa: E731
    _, gradient = replay.score_and_grad(mask, score)
    step = 1e-4
    with torch.no_grad():
        up, down = (replay.log_probs(mask + sign * step * along).sum() for sign in (1, -1))
    assert torch.allclose((gradient * along).sum(), (up - down) / (2 * step), rtol=1e-6)


def test_every_tower_has_a_part_in_the_answer() -> None:
    """With one tower's input held still, the gradient of the mask is another one; all parts add up to the whole."""
    replay = replayed("llama", "sdpa", torch.float64)
    mask = torch.full((1, 6, 6), 0.6, dtype=torch.float64, requires_grad=True)
    fed = replay.path.apply(mask)
    parts = []
    for moving in ((name,) for name in PIXELS):
        held = {name: value if name in moving else value.detach() for name, value in fed.items()}
        parts.append(torch.autograd.grad(replay.run_inputs(held).sum(), mask, retain_graph=True)[0])
    whole = torch.autograd.grad(replay.run_inputs(dict(fed)).sum(), mask)[0]
    assert torch.allclose(sum(parts), whole, rtol=1e-9, atol=1e-12)
    for part in parts:
        assert part.abs().max() > 0.01 * whole.abs().max()


def test_image_tokens_lie_where_their_cells_are() -> None:
    trace, _, _ = recorded()
    layout = trace.layout
    assert (np.asarray(trace.input_ids)[layout.image_positions] == IMAGE).all()
    # 90 × 60 in a square of 90: a cell of the 4 × 4 grid is 22.5 wide, the picture begins at 15, and of 4 rows the
    # middle ones are kept: 22.5 − 15 = 7.5 to 67.5 − 15 = 52.5. Every fifth token is a newline.
    boxes = layout.patch_box.reshape(2, 5, 4)
    for row, col in np.ndindex(2, 4):
        assert boxes[row, col].tolist() == [22.5 * col, 7.5 + 22.5 * row, 22.5 * (col + 1), 30 + 22.5 * row]
    assert (boxes[:, 4] == 0).all()


@pytest.mark.parametrize("size", [(640, 426), (333, 500), (512, 512), (30, 700)])
def test_places_cover_the_picture_once(size: tuple[int, int]) -> None:
    places = grid_places(24, [size, size])
    boxes = places.boxes[: len(places.boxes) // 2]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    # Rounding to whole cells may leave a margin of less than one on either side.
    cell = max(size) / 24
    least = (size[0] - 2 * cell * (size[0] < size[1])) * (size[1] - 2 * cell * (size[1] < size[0]))
    assert least - 1 <= area.sum() <= size[0] * size[1] + 1
    assert boxes[:, 2].max() <= size[0] and boxes[:, 3].max() <= size[1] and boxes.min() >= 0
    assert np.array_equal(places.images[len(boxes) :][places.images[: len(boxes)] == 0], np.ones((area > 0).sum()))


def test_a_patch_of_the_picture_moves_the_tokens_over_it_most() -> None:
    """ConvNeXt alone, whose features are local: light one cell, and its token moves more than any other."""
    model, processor = build(towers=(("convnext", 128),))
    images = [picture(80, 80), picture(80, 80)]
    images[1].paste((255, 255, 255), (40, 20, 60, 40))
    made = [processor.image_processor(images=image, return_tensors="pt") for image in images]
    with torch.no_grad():
        one, two = (model.get_image_features(**each).tokens[0] for each in made)
    moved = (one - two).norm(dim=-1)
    boxes = grid_places(model.config.image_grid, [(80, 80)]).boxes
    assert boxes[int(moved.argmax())].tolist() == [40, 20, 60, 40]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("igos++", {"size": 6, "iterations": 3}),
        ("integrated_gradients", {"size": 6}),
        ("rise", {"masks": 40}),
        ("input_gradient", {}),
        ("tmm", {}),
        ("iia", {"points": 3}),
        ("attention", {}),
        ("rollout", {}),
        ("tam", {}),
    ],
)
def test_methods_draw_maps_over_the_picture(method: str, settings: dict[str, Any]) -> None:
    heat = probe.explain(replayed(), method=method, tokens=SPAN, strengthen=False, **settings)
    assert heat.values is not None
    assert heat.values.shape[0] > 1 and np.ptp(heat.values) > 0.5
    assert heat.image_size == (90, 60)
    assert heat.overlay().size == (90, 60)


def test_gradcam_looks_at_each_tower_and_joins_them() -> None:
    replay = replayed()
    both = probe.explain(replay, method="gradcam", tokens=SPAN, strengthen=False, size=(8, 12))
    # CLIP is read in front of its last layer; of ConvNeXt the last stage.
    assert both.params["layer"] == [
        f"{TOWERS[0]}.encoder.layers.1",
        f"{TOWERS[1]}.encoder.layers.0",
        f"{TOWERS[2]}.encoder.layer.1",
        f"{TOWERS[3]}.stages.3",
    ]
    each = [
        probe.explain(replay, method="gradcam", tokens=SPAN, strengthen=False, size=(8, 12), encoder=tower).values
        for tower in TOWERS
    ]
    assert both.values is not None and all(part is not None for part in each)
    mean = np.mean(each, axis=0)
    assert np.allclose(both.values, (mean - mean.min()) / (mean.max() - mean.min()), atol=0.02)
    assert (
        probe.explain(replay, method="gradcam", tokens=SPAN, strengthen=False, encoder="dinov2")
        .params["layer"]
        .startswith(TOWERS[2])
    )


@pytest.mark.parametrize("method", ["tmm", "iia"])
def test_relevance_through_a_tower(method: str) -> None:
    replay = replayed()
    for tower in ("siglip", "clip", "dinov2"):
        heat = probe.explain(replay, method=method, tokens=SPAN, strengthen=False, scope="encoder", encoder=tower)
        assert heat.values is not None and np.ptp(heat.values) > 0.5
    with pytest.raises(
        probe.errors.ExplainError, match=r"not applicable: model\.vision_towers\.3 is a convolutional encoder"
    ):
        probe.explain(replay, method=method, tokens=SPAN, scope="encoder", encoder="convnext")


def test_attention_rows_are_those_of_the_eager_decoder() -> None:
    trace, _, _ = recorded()
    model, processor = build(attention="eager")
    ids = torch.tensor([[*trace.input_ids.tolist(), *trace.token_ids.tolist()[:-1]]])
    given = {**inputs(processor), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        layers = model(**given, output_attentions=True).attentions
    start = len(trace.input_ids) - 1
    columns = trace.layout.image_positions.copy()
    rows = trace.attention.values[:, :, 0]  # the mean over heads, stored in half precision
    wanted = torch.stack([layer[0].mean(dim=0)[start : start + 6][:, columns] for layer in layers], dim=1).numpy()
    assert rows.shape == wanted.shape
    assert np.abs(rows - wanted).max() < 1e-3


def test_a_map_is_scored_checked_and_reported(tmp_path: Path) -> None:
    replay = replayed()
    step = int(replay.llr.abs().argmax())  # of weights drawn at random the picture decides little else
    heat = probe.explain(replay, method="integrated_gradients", tokens=(step, step + 1), strengthen=False, size=6)
    score = probe.evaluate(heat, replay)
    assert np.isfinite([score.deletion, score.insertion]).all()
    cut = probe.causal.knockout(replay, heat)
    assert np.isfinite(cut.drop)
    page = probe.report([heat], scores=[score], out=tmp_path / "report.html")
    assert Path(page).stat().st_size > 10_000


def test_checkpointing_gives_the_same_gradient() -> None:
    trace, model, processor = recorded()
    score = lambda log_probs: log_probs.sum(dim=1)  # noqa: E731
    mask = torch.full((2, 4, 4), 0.5)
    mask[1, 2, 1] = 0.9
    found = [
        probe.replay(trace, model, processor, gradient_checkpointing=on).score_and_grad(mask, score)[1]
        for on in (False, True)
    ]
    assert torch.allclose(found[0], found[1], atol=1e-6) and found[0].abs().max() > 1e-4


def test_masks_on_a_call_of_the_users_own() -> None:
    model, processor = build()
    mask = torch.zeros(4, 4)
    mask[:, :2] = 1
    with probe.attach(model, processor) as p, torch.no_grad():
        given = inputs(processor)
        whole = model(**given).logits
        with p.masked(mask):
            half = model(**given).logits
        assert torch.equal(model(**given).logits, whole)
    assert (half - whole).abs().max() > 1e-3


def test_a_saved_model_opens_by_the_package_alone(tmp_path: Path) -> None:
    model, processor = build()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, read = probe.load(tmp_path)
    given = read.apply_chat_template(
        chat(picture()), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        assert torch.equal(again(**given).logits, model(**inputs(processor)).logits)


# ------------------------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_shares_are_the_softmax_by_hand(attention: str) -> None:
    """The first layer: queries, keys and mask computed here from the weights, cell by cell."""
    trace, model, processor = recorded("llama", attention)
    replay = probe.replay(trace, model, processor)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = encoder_shares(replay)
    assert [layer.decoder_layer for layer in found] == [None, None, 0, 2]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.config._attn_implementation == attention
    core, layer = model.model, model.model.connectors[0].layers[0]
    given = replay.path.inputs
    with torch.no_grad():
        features = [
            project(_features(tower, given[f"pixel_values_{number}"], grid))
            for number, (tower, project, grid) in enumerate(
                zip(core.vision_towers, core.tower_projectors, model.config.tower_grids, strict=True)
            )
        ]
        context = features[0].mean(dim=1)
        hidden = layer.proj_in(torch.cat([core.vision_query[:1], layer.proj_context(context)], dim=-1))
        attend = layer.cross_attn
        query = attend.q_proj(hidden)[0].reshape(4, 8)
        for row, col in np.ndindex(2, 4):  # of the picture; rows 1 and 2 of the square of 4 × 4
            scores = []
            for tower, part in enumerate(features):
                side = round(part.shape[1] ** 0.5)
                size = side // 4
                square = part[0].reshape(side, side, -1)
                window = square[(row + 1) * size : (row + 2) * size, col * size : (col + 1) * size].reshape(size**2, -1)
                if size > 1:
                    window = window + getattr(layer, f"pos_embed_{tower}")
                keys = getattr(attend, f"k_proj_{tower}")(window).reshape(-1, 4, 8)
                score = torch.einsum("hd,khd->hk", query, keys) / 8**0.5
                # 60 of 90 rows on 8 cells: 5 rows, from the 2nd to the 6th (⌊(8 − 5)/2⌋ = 1 left out above).
                if size > 1:
                    inside = torch.tensor([1 <= (row + 1) * size + k // size < 7 for k in range(size**2)])
                    score = score.masked_fill(~inside, -torch.inf)
                scores.append(score)
            weights = torch.cat(scores, dim=1).softmax(dim=1).mean(dim=0)
            pieces = weights.split([part.shape[1] for part in scores])
            for tower, piece in enumerate(pieces):
                assert abs(found[0].shares[tower, row, col] - piece.sum().item()) < 1e-5
                size = round(len(piece) ** 0.5)
                drawn = found[0].maps[tower][row * size : (row + 1) * size, col * size : (col + 1) * size]
                assert np.allclose(drawn, piece.reshape(size, size).numpy(), atol=1e-5)
    for each in found:
        assert each.shares.shape == (4, 2, 4)
        assert np.allclose(each.shares.sum(axis=0), 1, atol=1e-5)
        assert [part.shape for part in each.maps] == [(2, 4), (2, 4), (2, 4), (4, 8)]


def _features(tower: Any, pixels: torch.Tensor, grid: int) -> torch.Tensor:
    from lvlm_probe_cambrian.towers import tower_features

    return tower_features(tower, pixels, grid=grid, clip_layer=-2)


def test_shares_of_the_second_picture_are_its_own(tmp_path: Path) -> None:
    model, processor = build()
    images = [picture(90, 60, 0), picture(40, 90, 1)]
    text = "<s>USER: <image><image>Which? ASSISTANT:"
    traces = []
    for given in (images, images[1:]):
        with probe.attach(model, processor) as p, p.record(tmp_path / str(len(given))) as recording:
            made = processor(
                images=given, text=text.replace("<image>", "", 2 - len(given)), return_tensors="pt",
                add_special_tokens=False,
            )  # fmt: skip
            model.generate(**made, max_new_tokens=3, do_sample=False)
        traces.append(recording.traces[-1])
    both, alone = (
        encoder_shares(probe.replay(trace, model, processor), image=n) for trace, n in zip(traces, (1, 0), strict=True)
    )
    # In front of the decoder nothing of the first picture is read; inside it queries carry the text before them.
    assert np.allclose(both[0].shares, alone[0].shares, atol=1e-5)
    assert [layer.shares.shape for layer in both] == [layer.shares.shape for layer in alone]
    with pytest.raises(probe.errors.ExplainError, match="has 1, counted from 0"):
        encoder_shares(probe.replay(traces[1], model, processor), image=1)
