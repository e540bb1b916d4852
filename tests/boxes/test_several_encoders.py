"""Models with several vision encoders, a convolutional one among them: one map each, their mean, and who is who."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import inside
import numpy as np
import pytest
import tiny_models
import torch
from torch import nn
from transformers import ConvNextConfig, ConvNextModel

import lvlm_probe as probe
from lvlm_probe.boxes.encoder_tokens import _read_by, blocks_of, chosen_encoder, encoder_tokens, is_convolutional
from lvlm_probe.boxes.painting import paint
from lvlm_probe.models.replica import Replica

CLIP, CONVNEXT = "model.vision_tower", "model.second"


@functools.cache
def two_encoders() -> tuple[object, object, object]:
    """A LLaVA whose image features are CLIP's plus those of a ConvNeXt (two stages) on the same pixels."""
    model, processor = tiny_models.build("llava")
    torch.manual_seed(0)
    config = ConvNextConfig(num_stages=2, depths=[1, 3], hidden_sizes=[8, 16], patch_size=4)
    model.model.second = ConvNextModel(config).eval()
    model.model.between = nn.Linear(16, model.config.text_config.hidden_size)
    tiny_models.redraw(model.model.between, 1)
    plain = model.model.get_image_features

    def both(pixel_values, **kwargs):
        found = plain(pixel_values=pixel_values, **kwargs)
        features = found.pooler_output
        stage = model.model.second(pixel_values).last_hidden_state
        grid = nn.functional.interpolate(stage, size=(4, 4), mode="bilinear", align_corners=False)
        more = model.model.between(grid.flatten(2).transpose(1, 2))
        found.pooler_output = tuple(one + own for one, own in zip(features, more, strict=True))
        return found

    model.model.get_image_features = both
    return inside.record("llava", model, processor), model, processor


def replayed():
    made = probe.replay(*two_encoders())
    made.anatomy = dataclasses.replace(made.anatomy, encoders=(CLIP, CONVNEXT))
    return made


def explain(replay, **params):
    return probe.explain(replay, method="gradcam", tokens=inside.SPAN, strengthen=False, **params)


def test_blocks_of_a_convolutional_encoder_are_its_stages() -> None:
    model = two_encoders()[1]
    assert is_convolutional(model, CONVNEXT) and not is_convolutional(model, CLIP)
    assert blocks_of(model, CONVNEXT) == ("model.second.encoder.stages.0", "model.second.encoder.stages.1")


def test_each_encoder_has_a_map_and_the_result_is_their_mean() -> None:
    replay = replayed()
    both = explain(replay, size=(12, 18))
    one, two = (explain(replay, encoder=name, size=(12, 18)) for name in ("clip", CONVNEXT))
    assert both.params["layer"] == ["model.vision_tower.encoder.layers.0", "model.second.encoder.stages.1"]
    assert np.abs(one.values - two.values).max() > 0.3
    # The middle square alone is seen; there the mean is scaled from its smallest to its largest value.
    seen = np.s_[:, 3:15]
    mean = ((one.values + two.values) / 2)[seen]
    assert np.allclose(both.values[seen], (mean - mean.min()) / (mean.max() - mean.min()), atol=0.01)
    parts = both.provenance["diagnostics"]["encoders"]
    assert np.allclose(parts[CLIP], one.values, atol=1e-3) and np.allclose(parts[CONVNEXT], two.values, atol=1e-3)


def test_the_convolutional_map_is_the_formula_on_plain_hooks() -> None:
    """ReLU(Σ_c w_c A_c) at the last stage, by a hook of our own and one backward(); its cells are CLIP's square."""
    replay = replayed()
    heat = explain(replay, encoder=1)
    kept: list[torch.Tensor] = []
    hook = replay.model.get_submodule("model.second.encoder.stages.1").register_forward_hook(
        lambda _m, _a, output: (output.retain_grad(), kept.append(output))[1]
    )
    leaves = {key: replay.path.inputs[key].clone().requires_grad_(True) for key in replay.path.pixel_keys}
    try:
        replay.run_inputs({**replay.path.inputs, **leaves})[0, slice(*inside.SPAN)].sum().backward()
    finally:
        hook.remove()
    (output,) = kept
    acts, grads = output.detach()[0].double(), output.grad[0].double()
    cam = (acts * grads.mean(dim=(1, 2), keepdim=True)).sum(dim=0).clamp(min=0)
    rows, cols = cam.shape  # the processor's crop is the middle square, 60 of 90 columns from 15 on
    edges = [(15 + c * 60 / cols, r * 60 / rows, 15 + (c + 1) * 60 / cols, (r + 1) * 60 / rows)
             for r in range(rows) for c in range(cols)]  # fmt: skip
    grid, met = paint(cam.flatten(), np.array(edges), (90, 60), heat.values.shape)
    wanted = torch.where(met, (grid - grid[met].min()) / (grid[met].max() - grid[met].min()), 0.0)
    assert np.allclose(heat.values, wanted.numpy(), atol=0.03)


@pytest.mark.quick
def test_methods_over_attention_say_where_they_are_not_applicable() -> None:
    replay = replayed()
    for method in ("tmm", "iia"):
        with pytest.raises(
            probe.errors.ExplainError, match=r"not applicable: model\.second is a convolutional encoder"
        ):
            probe.explain(replay, method=method, tokens=inside.SPAN, scope="encoder", encoder="convnext")
    named = probe.explain(replay, method="tmm", tokens=inside.SPAN, scope="encoder", encoder="clip", strengthen=False)
    first = probe.explain(replay, method="tmm", tokens=inside.SPAN, scope="encoder", encoder=0, strengthen=False)
    assert np.array_equal(named.values, first.values)


@pytest.mark.parametrize(
    ("name", "wanted"), [(0, CLIP), (1, CONVNEXT), (CLIP, CLIP), ("SECOND", CONVNEXT), ("ConvNext", CONVNEXT)]
)
def test_an_encoder_is_chosen_by_number_path_or_name(name: int | str, wanted: str) -> None:
    assert chosen_encoder(replayed(), name) == wanted


@pytest.mark.parametrize(("name", "message"), [(2, "there are 2"), ("dino", "fits none"), ("model", "fits 2 of")])
def test_an_encoder_that_is_not_there_is_refused(name: int | str, message: str) -> None:
    with pytest.raises(probe.errors.ExplainError, match=message):
        chosen_encoder(replayed(), name)


def test_cells_lie_in_the_pixel_input_that_the_encoder_reads() -> None:
    """Of two inputs of one picture the second is read; its other half would be the answer by the first."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 2, 2, 2), nn.Conv2d(1, 2, 2, 2)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.first(a).sum() + self.second(b).sum()

    net = Net()
    inputs = {"a": torch.rand(1, 1, 4, 4), "b": torch.rand(1, 1, 4, 4)}
    path = SimpleNamespace(inputs=inputs, pixel_keys=("a", "b"))
    replica = Replica(net)

    def run(given: dict[str, torch.Tensor]) -> torch.Tensor:
        with replica.use() as own:
            found: torch.Tensor = own(**given)
        return found

    replay = SimpleNamespace(model=net, replica=replica, path=path, run_inputs=run)
    assert _read_by(replay, "first") == ["a"] and _read_by(replay, "second") == ["b"]
    assert not net.second._forward_hooks


def test_a_picture_that_is_resized_inside_the_model_has_places_all_the_same() -> None:
    """Bilinear at factor 1.25 lets neighbouring patches share a few columns; boxes come from what one alone reads."""
    made = probe.replay(*two_encoders())
    tower, sizes = made.model.model.vision_tower, []
    plain = encoder_tokens(made, CLIP).boxes

    def shrink(_module, args, kwargs):
        pixels = kwargs.pop("pixel_values", args[0] if args else None)
        sizes.append(pixels.shape[-1])
        wide = nn.functional.interpolate(pixels, size=70, mode="nearest")
        small = nn.functional.interpolate(wide, size=56, mode="bilinear", align_corners=False)
        return (small,), kwargs

    hook = tower.register_forward_pre_hook(shrink, with_kwargs=True)
    try:
        again = encoder_tokens(probe.replay(*two_encoders()), CLIP).boxes
    finally:
        hook.remove()
    assert sizes and np.abs(again - plain).max() < 2.5  # pixels; a patch is 15 of them wide
