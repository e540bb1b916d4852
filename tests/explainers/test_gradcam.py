"""Grad-CAM, and where the tokens inside an encoder are in the picture."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import inside
import numpy as np
import pytest
import tiny_models
import torch
from torch import Tensor

import lvlm_probe as probe
from lvlm_probe.boxes.encoder_tokens import blocks_of, encoder_tokens, encoders_of, feature_map_boxes
from lvlm_probe.errors import ExplainError, PointNotFound
from lvlm_probe.explainers import gradcam as gradcam_module
from lvlm_probe.explainers.gradcam import weighted_activations

WIDTH, HEIGHT = 90, 60


def explain(replay, **params: Any):
    return probe.explain(replay, method="gradcam", tokens=inside.SPAN, strengthen=False, **params)


def test_the_map_by_hand():
    """Two channels, gradients' means over the three live tokens 2 and −1: 2·A_1 − A_2, cut at 0; the fourth token
    (class token) is in neither."""
    activations = torch.tensor([[[1.0, 0.0], [1.0, 3.0], [0.5, 0.5], [9.0, 0.0]]])
    gradients = torch.tensor([[[1.0, -3.0], [2.0, 0.0], [3.0, 0.0], [50.0, 50.0]]])
    live = torch.tensor([[True, True, True, False]])
    assert torch.allclose(
        weighted_activations(activations, gradients, live), torch.tensor([[2.0, 0.0, 0.5, 0.0]], dtype=torch.float64)
    )
    two = weighted_activations(activations.repeat(2, 1, 1), torch.cat([gradients, -gradients]), live.repeat(2, 1))
    assert torch.allclose(two[1], torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64))  # weights of its own


def test_each_patch_by_its_own_gradient_by_hand():
    """Two channels: 1·1 − 3·0, 2·1 − 1·3 and 3·½ + 0·½ of the three live tokens: 1, −1 and 1.5."""
    activations = torch.tensor([[[1.0, 0.0], [1.0, 3.0], [0.5, 0.5], [9.0, 0.0]]])
    gradients = torch.tensor([[[1.0, -3.0], [2.0, -1.0], [3.0, 0.0], [50.0, 50.0]]])
    live = torch.tensor([[True, True, True, False]])
    cut, absolute = (
        weighted_activations(activations, gradients, live, pooled=False, sign=sign) for sign in ("positive", "absolute")
    )
    assert cut.tolist() == [[1.0, 0.0, 1.5, 0.0]]
    assert absolute.tolist() == [[1.0, 1.0, 1.5, 0.0]]
    with pytest.raises(ExplainError, match="sign is 'positive' or 'absolute'"):
        explain(inside.replay("llava"), sign="both")


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("llava", "layers.0"),  # vision_feature_layer = -2 of two: the last one is not read
        ("llava_next", "layers.0"),
        ("llava_onevision", "layers.1"),
        ("qwen2_vl", "blocks.1"),
        ("gemma3", "layers.1"),
        ("idefics3", "layers.1"),
        ("mllama", "transformer.layers.1"),
    ],
)
def test_the_layer_is_found(name, block):
    replay = inside.replay(name)
    heat = explain(replay)
    assert heat.params["layer"].endswith(block)
    assert inside.own_passes(replay, "gradcam") == {"forward": 1, "backward": 1}


@pytest.mark.parametrize(
    ("name", "norm"),
    [("llava", None), ("qwen2_vl", "merger.ln_q"), ("paligemma", "post_layernorm"), ("mllama", None)],
)
def test_unpooled_it_is_read_behind_the_norm(name, norm):
    """In front of one Σ_c ∂y/∂A_c A_c is 0, whatever is in the image: a norm does not see how long its input is."""
    replay = inside.replay(name)
    block = explain(replay).params["layer"]
    layer = explain(replay, pooled=False).params["layer"]
    assert layer.endswith(norm) if norm else layer == block or "layernorm_post" in layer
    share = {}
    with replay.capture(modules=[block, layer]) as seen:
        replay.score_and_grad(torch.ones(1, 1, 1), lambda log_probs: log_probs[:, slice(*inside.SPAN)].sum(1))
    for module in (block, layer):
        products = (seen.outputs[module] * seen.gradients[module]).double()
        share[module] = float(products.sum(dim=-1).abs().sum() / products.abs().sum())
    assert share[layer] > 0.02
    assert norm is None or share[block] < 1e-3


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen2_5_vl", "paligemma"])
def test_the_map_is_the_formula_on_plain_hooks(name):
    """Activations and gradients by a hook of our own and one backward(); tokens put where the processor's grid says."""
    replay = inside.replay(name)
    kept: list[Tensor] = []

    def keep(_module, _args, output):
        output = output if isinstance(output, Tensor) else output[0]
        output.retain_grad()
        kept.append(output)

    heat = explain(replay)
    hook = replay.model.get_submodule(heat.params["layer"]).register_forward_hook(keep)
    leaves = {key: replay.path.inputs[key].clone().requires_grad_(True) for key in replay.path.pixel_keys}
    try:
        replay.run_inputs({**replay.path.inputs, **leaves})[0, slice(*inside.SPAN)].sum().backward()
    finally:
        hook.remove()
    (output,) = kept
    acts, grads = (part.detach().reshape(-1, part.shape[-1]).double() for part in (output, output.grad))
    if name == "llava":
        acts, grads = acts[1:], grads[1:]
    cam = (acts * grads.mean(dim=0)).sum(dim=-1).clamp(min=0).numpy()
    cam = (cam - cam.min()) / (cam.max() - cam.min())
    if name == "llava":  # the middle square of the picture
        wanted = np.zeros((4, 6))
        wanted[:, 1:5] = cam.reshape(4, 4)
    elif name == "paligemma":
        wanted = cam.reshape(4, 4)
    else:
        merged = [(row, col) for row in range(2) for col in range(3)]
        if name == "qwen2_5_vl":
            merged.sort(key=lambda token: (token[0] // 2, token[1] // 2, token))
        wanted = np.zeros((4, 6))
        for number, (row, col) in enumerate(merged):
            wanted[2 * row : 2 * row + 2, 2 * col : 2 * col + 2] = cam[4 * number : 4 * number + 4].reshape(2, 2)
    assert heat.values.shape == wanted.shape
    assert np.allclose(heat.values, wanted, atol=0.01)


# ------------------------------------------------------------------------------------------ places of tokens


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_a_token_is_where_pixels_move_it(name):
    """Blur one square of the picture after the other, through the real processor, and see which tokens change."""
    replay = inside.replay(name)
    tokens = encoder_tokens(replay, encoders_of(replay)[0])
    first = replay.model.get_submodule(tokens.blocks[0])
    seen: list[Tensor] = []

    def keep(_module, args, kwargs):
        given = args[0] if args else next(iter(kwargs.values()))
        seen.append(given.detach().reshape(-1, given.shape[-1]))

    def run(mask: Tensor) -> Tensor:
        with torch.no_grad():
            replay.log_probs(mask, mode="exact")
        return seen.pop()

    hook = first.register_forward_pre_hook(keep, with_kwargs=True)
    boxes, side = tokens.boxes, 15
    changed_at_all = np.zeros(len(boxes), bool)
    try:
        whole = run(torch.ones(1, HEIGHT, WIDTH))
        for top in range(0, HEIGHT, side):
            for left in range(0, WIDTH, side):
                mask = torch.ones(1, HEIGHT, WIDTH)
                mask[:, top : top + side, left : left + side] = 0
                moved = ((run(mask) - whole).abs().amax(dim=1) > 1e-3 * whole.abs().max()).numpy()
                wide = np.minimum(boxes[:, 2], left + side) - np.maximum(boxes[:, 0], left)
                high = np.minimum(boxes[:, 3], top + side) - np.maximum(boxes[:, 1], top)
                assert not (moved & ((wide < -8) | (high < -8))).any()  # resampling reaches some pixels beyond
                assert moved[(wide > 1.5) & (high > 1.5)].all()
                changed_at_all |= moved
    finally:
        hook.remove()
    assert np.array_equal(changed_at_all, tokens.live)
    assert tokens.blocks == blocks_of(replay.model, tokens.encoder) and len(tokens.blocks) == 2


def test_places_are_known_in_half_precision_too():
    model, processor = tiny_models.build("llava_next")
    trace = inside.record("llava_next", model, processor, attention=False, points=[])
    exact = encoder_tokens(probe.replay(trace, model, processor), "model.vision_tower")
    coarse = encoder_tokens(probe.replay(trace, model.bfloat16(), processor, strict=False), "model.vision_tower")
    assert exact.live.sum() == 4 * 16  # four tiles and the overview, without what pads them
    assert np.array_equal(exact.boxes, coarse.boxes)


def test_pictures_of_one_prompt_are_told_apart():
    replay = inside.replay("qwen2_vl", images=2)
    one, two = (encoder_tokens(replay, "model.visual", image).live for image in (0, 1))
    assert one.sum() == two.sum() == 24 and not (one & two).any() and len(one) == 48
    assert encoder_tokens(replay, "model.visual", 1) is encoder_tokens(replay, "model.visual", 1)
    first, second = explain(replay, image=0), explain(replay, image=1)
    assert first.image_index == 0 and second.image_index == 1 and not np.allclose(first.values, second.values)


def test_tiles_are_pasted_back_where_they_were_cut(monkeypatch):
    """A map that is hot in one view alone: the overview is the whole picture, the four tiles are its quarters."""
    replay = inside.replay("llava_next")
    quarters = [np.s_[:, :], np.s_[:30, :45], np.s_[:30, 45:], np.s_[30:, :45], np.s_[30:, 45:]]
    for view, quarter in enumerate(quarters):

        def one(activations, gradients, live, view=view, **_how):
            values = torch.zeros(live.shape, dtype=torch.float64)
            values[view] = 1
            return values * live

        monkeypatch.setattr(gradcam_module, "weighted_activations", one)
        heat = explain(replay, size=(HEIGHT, WIDTH)).values
        inside_it = np.zeros((HEIGHT, WIDTH), bool)
        inside_it[quarter] = True
        if view == 0:  # where a tile has no token of its own, the overview is alone
            assert (heat > 0).mean() > 0.95
        else:
            assert (heat[inside_it] > 0).mean() > 0.9
            assert (heat[~inside_it] > 0).mean() < 0.02


def test_several_encoders_have_a_mean(monkeypatch):
    replay = inside.replay("llava")
    single = explain(replay)
    path = encoders_of(replay)[0]
    monkeypatch.setattr(gradcam_module, "encoders_of", lambda _: (path, path))
    both = explain(replay)
    assert np.allclose(both.values, single.values) and len(both.params["layer"]) == 2
    assert np.allclose(explain(replay, encoder=1).values, single.values)


def test_cells_of_a_convolutional_map():
    """An 8 × 8 input from a 32 × 16 picture, its right half padding, and a map of 2 × 4 cells."""
    rows, cols = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    x, y = ((cols + 0.5) * 8).expand(1, 3, 8, 8), ((rows + 0.5) * 2).expand(1, 3, 8, 8)
    live = (cols < 4).expand(1, 3, 8, 8)
    path = SimpleNamespace(
        coordinates=lambda _: (x, y, torch.zeros(1, 3, 8, 8, dtype=torch.long), live),
        pixel_keys=("pixel_values",),
        image_sizes=[(32, 16)],
    )
    boxes = feature_map_boxes(SimpleNamespace(path=path), "stages.3", torch.zeros(1, 5, 2, 4), 0).reshape(2, 4, 4)
    assert np.allclose(boxes[0, 0], [0, 0, 16, 8]) and np.allclose(boxes[1, 1], [16, 8, 32, 16])
    assert not boxes[:, 2:].any()
    with pytest.raises(ExplainError, match="no pixel input has the 2 views"):
        feature_map_boxes(SimpleNamespace(path=path), "stages.3", torch.zeros(2, 5, 2, 4), 0)


# --------------------------------------------------------------------------------------------------- refusals


def test_tokens_that_mix_before_the_first_block_are_refused():
    replay = inside.replay("llava")
    embeddings = next(m for n, m in replay.model.named_modules() if n.endswith("vision_tower.embeddings"))
    hook = embeddings.register_forward_hook(lambda _m, _a, output: output + output.roll(1, dims=1))
    try:
        with pytest.raises(ExplainError, match="do not stand for one patch each"):
            explain(replay)
    finally:
        hook.remove()
    assert explain(replay).values is not None


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"encoder": 1}, ExplainError, "encoder=1, but there are 1"),
        (
            {"layer": "model.language_model.layers.0"},
            ExplainError,
            "is not in an encoder; those are model.vision_tower",
        ),
        ({"layer": "model.vision_tower_2"}, ExplainError, "is not in an encoder"),
        ({"layer": "model.vision_tower.nothing"}, PointNotFound, "no module matches"),
        ({"size": (0, 4)}, ExplainError, "at least 1"),
    ],
)
def test_wrong_parameters_are_refused(params, error, message):
    with pytest.raises(error, match=message):
        explain(inside.replay("llava"), **params)


@pytest.mark.quick
def test_a_layer_that_is_not_read_is_named():
    replay = inside.replay("llava")
    last = blocks_of(replay.model, "model.vision_tower")[-1]
    with pytest.raises(ExplainError, match=f"no gradient of the score reaches {last}"):
        explain(replay, layer=last)


@pytest.mark.parametrize("method", ["gradcam", "tmm", "attention", "tam", "rollout"])
def test_without_a_processor_the_picture_is_what_the_model_sees(method):
    """Masks and maps live in pixel-input space then, whatever picture the recorded boxes refer to."""
    replay = inside.replay("llava")
    bare = probe.replay(replay.trace, replay.model)
    whole, inner = (probe.explain(each, method=method, tokens=inside.SPAN, strengthen=False) for each in (replay, bare))
    assert whole.image_size == (WIDTH, HEIGHT) and inner.image_size == (56, 56)
    assert whole.values.shape == (4, 6) and inner.values.shape == (4, 4)
    assert np.allclose(inner.values, whole.values[:, 1:5], atol=0.02)  # CLIP's crop is the middle square
