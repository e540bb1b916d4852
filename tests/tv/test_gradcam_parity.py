"""Grad-CAM against pytorch-grad-cam, which lives in the second environment."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision", reason="needs the second environment, .venv-tv, which has torchvision")
pytest.importorskip("pytorch_grad_cam", reason="needs grad-cam, which lives in .venv-tv")

import inside
import pytorch_grad_cam

import lvlm_probe as probe
from lvlm_probe.explainers.gradcam import weighted_activations


class Answering(torch.nn.Module):
    """Pixel inputs → log P of the answer's tokens, ``(1, step)``: what pytorch-grad-cam takes for a classifier."""

    def __init__(self, replay) -> None:
        super().__init__()
        self.model = replay.model
        self._ids = torch.cat([replay.input_ids, replay.token_ids])
        self._prompt = len(replay.input_ids)
        kwargs = replay.trace.model_kwargs
        self._more = {}
        if "token_type_ids" in kwargs:
            longer = torch.ones(1, len(self._ids) - 1, dtype=torch.long)
            longer[:, : self._prompt] = kwargs["token_type_ids"]
            self._more["token_type_ids"] = longer

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        output = self.model(input_ids=self._ids[None, :-1], pixel_values=pixel_values, use_cache=False, **self._more)
        log_probs = output.logits[0, self._prompt - 1 :].log_softmax(-1)
        return log_probs[torch.arange(len(log_probs)), self._ids[self._prompt :]][None]


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize(("name", "class_tokens"), [("llava", 1), ("paligemma", 0)])
def test_same_layer_same_map(name: str, class_tokens: int, pooled: bool) -> None:
    """Grad-CAM, and HiResCAM, whose weights are no means."""
    replay = inside.replay(name)
    heat = probe.explain(replay, method="gradcam", tokens=inside.SPAN, strengthen=False, pooled=pooled)

    def reshape(tensor: torch.Tensor) -> torch.Tensor:
        kept = tensor[:, class_tokens:]
        side = round(kept.shape[1] ** 0.5)
        return kept.reshape(len(kept), side, side, -1).permute(0, 3, 1, 2)

    layer = replay.model.get_submodule(heat.params["layer"])
    pixels = replay.path.inputs["pixel_values"].clone()

    def target(output: torch.Tensor) -> torch.Tensor:
        return output[slice(*inside.SPAN)].sum()

    theirs_is = pytorch_grad_cam.GradCAM if pooled else pytorch_grad_cam.HiResCAM
    with theirs_is(Answering(replay), [layer], reshape_transform=reshape) as cam:
        cam(pixels, targets=[target])
        seen = cam.activations_and_grads
        raw = cam.get_cam_image(pixels, layer, [target], seen.activations[0].numpy(), seen.gradients[0].numpy(), False)
    theirs = np.maximum(raw[0], 0)
    theirs = (theirs - theirs.min()) / (theirs.max() - theirs.min())
    assert theirs.std() > 0.05
    ours = heat.values[:, 1:5] if name == "llava" else heat.values  # CLIP sees the middle square of the picture
    assert ours.shape == theirs.shape
    # The grid's cells are the tokens' boxes but for a hair at their edges, so values are compared there …
    assert np.abs(ours - theirs).max() < 0.01
    # … and to 1e-5 where they are per token.
    with replay.capture(modules=[heat.params["layer"]]) as captured:
        replay.score_and_grad(torch.ones(1, 1, 1), lambda log_probs: log_probs[:, slice(*inside.SPAN)].sum(1))
    activations, gradients = captured.outputs[heat.params["layer"]], captured.gradients[heat.params["layer"]]
    live = torch.ones(activations.shape[:2], dtype=torch.bool)
    live[:, :class_tokens] = False
    values = weighted_activations(activations, gradients, live, pooled=pooled)[0, class_tokens:]
    values = values.reshape(theirs.shape).numpy()
    assert np.abs(values - np.maximum(raw[0], 0)).max() <= 1e-5 * max(1.0, float(values.max()))
    scaled = (values - values.min()) / (values.max() - values.min())
    assert np.abs(scaled - theirs).max() <= 1e-5
