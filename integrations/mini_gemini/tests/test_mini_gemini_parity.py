"""The native model against what the original classes gave (transformers 4.37, float32), and what breaks the agreement.

Every control changes one thing that an inattentive port gets wrong, and must leave the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lvlm_probe_mini_gemini.modeling as modeling
import pytest
import torch
from mini_gemini_originals import VARIANTS, converted, expanded, outputs
from torch import nn
from transformers.activations import ACT2FN

LOGITS = 3e-5
GRADIENT = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native")


@pytest.fixture(params=VARIANTS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def answer(model: Any, name: str, **pictures: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and log P of the label tokens, which end the prompt."""
    io = outputs(name)
    logits = model(expanded(io["input_ids"], model), **pictures).logits
    label = io["label"][0]
    log_probs = logits[0, -len(label) - 1 : -1].log_softmax(dim=-1)
    return logits, log_probs.gather(1, label[:, None])[:, 0]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def error(model: Any, name: str, **more: Any) -> float:
    """Largest difference of logits, the model given the high-resolution picture alone."""
    io = outputs(name)
    with torch.no_grad():
        logits, _ = answer(model, name, pixel_values=io["images_aux"], **more)
    return float((logits - io["logits"]).abs().max())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_and_gradients(folder: Path, name: str, attention: str) -> None:
    model = converted(name, folder / name, attention=attention)
    assert model.model.language_model.config._attn_implementation == attention
    io = outputs(name)
    aux = io["images_aux"].clone().requires_grad_()
    logits, log_probs = answer(model, name, pixel_values=aux)
    assert float((logits - io["logits"]).detach().abs().max()) <= LOGITS
    assert float((log_probs - io["logp"][0]).detach().abs().max()) <= LOGITS
    (gradient,) = torch.autograd.grad(log_probs.sum(), [aux])
    assert relative(gradient, io["grad_aux"]) <= GRADIENT


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_pictures_given(folder: Path, name: str, attention: str) -> None:
    model = converted(name, folder / name, attention=attention)
    io = outputs(name)
    aux, low = io["images_aux"].clone().requires_grad_(), io["images"].clone().requires_grad_()
    logits, log_probs = answer(model, name, pixel_values=aux, pixel_values_low=low)
    assert float((logits - io["logits"]).detach().abs().max()) <= LOGITS
    of_aux, of_low = torch.autograd.grad(log_probs.sum(), [aux, low])
    assert relative(of_low, io["grad_images_partial"]) <= GRADIENT
    # What the low-resolution picture leaves of the whole gradient comes through the high-resolution encoder.
    assert relative(of_aux, io["grad_aux"]) > GRADIENT and of_aux.abs().max() > 0


def test_low_resolution_views_are_the_originals(folder: Path, name: str) -> None:
    config = converted(name, folder / name).config
    io = outputs(name)
    views = modeling.low_resolution_views(
        io["images_aux"], config.vision_config.image_size, config.image_grid, config.image_global
    )
    assert torch.equal(views.reshape(io["images"].shape), io["images"])


def test_encoders_and_features(folder: Path, name: str) -> None:
    """Each part against its own output of the original."""
    model = converted(name, folder / name).model
    io = outputs(name)
    with torch.no_grad():
        views = io["images"] if io["images"].ndim == 5 else io["images"][:, None]
        assert float((model._low_resolution(views)[0] - io["clip_feat"]).abs().max()) < 1e-5
        assert float((model.vision_tower_aux(io["images_aux"]) - io["aux_feat"]).abs().max()) < 1e-5
        features = model.get_image_features(io["images_aux"]).pooler_output[0]
    assert float((features - io["embeds"][0]).abs().max()) <= LOGITS


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_greedy_tokens(folder: Path, name: str, attention: str) -> None:
    model = converted(name, folder / name, attention=attention)
    io = outputs(name)
    prompt = expanded(io["input_ids"], model)[:, : -io["label"].shape[1]]
    wanted = io["generated"][0, 1:].tolist()  # 4.37 writes a BOS in front when it generates from embeddings
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        pixel_values=io["images_aux"],
        max_new_tokens=len(wanted),
        do_sample=False,
    )
    assert found[0, prompt.shape[1] :].tolist() == wanted


# ------------------------------------------------------------------------------------------------- negative controls


def _activation(kind: str, part: Callable[[Any], list[nn.Module]], name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        modules = part(model)
        assert modules
        for module in modules:
            setattr(module, name, ACT2FN[kind])

    return change


def _norms(eps: float) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        norms = [module for module in model.model.vision_tower_aux.modules() if isinstance(module, nn.LayerNorm)]
        assert norms and all(norm.eps == 1e-6 for norm in norms)
        for norm in norms:
            norm.eps = eps

    return change


def _mining_scale(model: Any) -> None:
    model.model.patch_mining.scale *= 1.1


CONTROLS: dict[str, Callable[[Any], None]] = {
    "CLIP's GELU": _activation(
        "gelu", lambda m: [layer.mlp for layer in m.model.vision_tower.encoder.layers], "activation_fn"
    ),
    "ConvNeXt's GELU": _activation(
        "quick_gelu",
        lambda m: [layer for stage in m.model.vision_tower_aux.stages for layer in stage.layers],
        "act",
    ),
    "the projector's GELU": _activation("gelu_new", lambda m: [m.model.multi_modal_projector], "act"),
    "ConvNeXt's LayerNorm eps": _norms(1e-5),
    "the mining scale": _mining_scale,
}


@pytest.mark.parametrize("control", CONTROLS)
def test_control_in_the_modules(folder: Path, name: str, control: str) -> None:
    model = converted(name, folder / name)
    assert error(model, name) <= LOGITS
    CONTROLS[control](model)
    assert error(model, name) > LOGITS


def _nearest(picture: torch.Tensor, side: int) -> torch.Tensor:
    return nn.functional.interpolate(picture, size=(side, side), mode="nearest")


def _antialiased(picture: torch.Tensor, side: int) -> torch.Tensor:
    return nn.functional.interpolate(picture, size=(side, side), mode="bilinear", antialias=True)


@pytest.mark.parametrize("wrong", [_nearest, _antialiased])
def test_control_interpolation(
    folder: Path, name: str, wrong: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lvlm_probe_mini_gemini.mining as mining

    model = converted(name, folder / name)
    monkeypatch.setattr(mining, "resize", wrong)
    monkeypatch.setattr(modeling, "resize", wrong)
    assert error(model, name) > LOGITS


def test_control_no_mining(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted(name, folder / name)
    monkeypatch.setattr(type(model.model), "_mine", lambda self, tokens, picture: tokens)
    assert error(model, name) > 1  # it changes the answer, not its rounding


@pytest.mark.parametrize("what", ["columns first", "whole picture last"])
def test_control_order_of_views(folder: Path, what: str) -> None:
    model = converted("mgm_hd", folder / "mgm_hd")
    features = model.model.get_image_features(outputs("mgm_hd")["images_aux"])
    assert error(model, "mgm_hd") <= LOGITS
    (tokens,) = features.pooler_output
    whole, first, second, third, fourth = tokens.chunk(5)
    order = [whole, first, third, second, fourth]
    if what == "whole picture last":
        order = [first, second, third, fourth, whole]
    features.pooler_output = [torch.cat(order)]
    io = outputs("mgm_hd")
    with torch.no_grad():
        logits, _ = answer(model, "mgm_hd", mm_encoder_outputs={"image": features})
    assert float((logits - io["logits"]).detach().abs().max()) > LOGITS


def test_one_encoder_alone_is_another_model(folder: Path, name: str) -> None:
    """``aux="none"``: one view through the low-resolution encoder, no mining, no crops."""
    model = converted(name, folder / name)
    io = outputs(name)
    calls: list[int] = []
    handle = model.model.vision_tower_aux.register_forward_hook(lambda *_: calls.append(1))
    low = modeling.resize(io["images_aux"], model.config.vision_config.image_size)
    with torch.no_grad():
        found = model.model.get_image_features(low, aux="none").pooler_output[0]
        states = model.model.vision_tower(low, output_hidden_states=True).hidden_states
        wanted = model.model.multi_modal_projector(states[-2][0, 1:])
    assert torch.equal(found, wanted)
    assert found.shape[0] == model.config.image_tokens("none") == 16
    if name == "mgm_plain":  # the same number of image tokens, another answer
        with torch.no_grad():
            logits, _ = answer(model, name, pixel_values=low)
        assert float((logits - io["logits"]).abs().max()) > 1
    handle.remove()
    assert not calls
