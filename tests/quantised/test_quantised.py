"""The road of a user with quantised weights, by every library that computes on a CPU."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import quantised_models
import torch
from quantised_models import KINDS, METHODS, WITHOUT_DERIVATIVE, load, record
from torch import nn

import lvlm_probe as probe
from lvlm_probe import causal
from lvlm_probe.errors import ExplainError, ModelMismatch
from lvlm_probe.models.fingerprint import fingerprint
from lvlm_probe.models.loading import load as load_model
from lvlm_probe.planning import weight_bytes

LATER = {"bitsandbytes nf4, double", "torchao int4, unpacked", "HQQ int4"}
"""Whose library has another kind that is tried: `make campaign` has them."""


def present(kinds: dict[str, Any]) -> list[Any]:
    """The kinds as parameters, those skipped whose library is not there."""
    return [
        pytest.param(
            kind,
            marks=[
                pytest.mark.skipif(
                    not quantised_models.installed(library),
                    reason=f"{library} is not there: .ci/checks quantised (make test installs it)",
                ),
                *([pytest.mark.campaign] if kind in LATER else []),
            ],
        )
        for kind, (library, _, _) in kinds.items()
    ]


KIND = pytest.mark.parametrize("kind", present(KINDS))


@pytest.fixture(scope="module")
def processor() -> Any:
    return probe.demo.load()[1]


@pytest.fixture(scope="module")
def full(processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same answer of the model in float32: trace, gradient to a mask."""
    model = load("float32")
    trace = record(model, processor, tmp_path_factory.mktemp("float32"))
    return trace, gradient_of(probe.replay(trace, model, processor))


@pytest.fixture(scope="module")
def made(processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kind → model, its fingerprint before anything ran, trace; each once."""
    known: dict[str, Any] = {}

    def of(kind: str) -> Any:
        if kind not in known:
            known.clear()
            model = load(kind)
            before = fingerprint(model)
            known[kind] = model, before, record(model, processor, tmp_path_factory.mktemp("quantised"))
        return known[kind]

    return of


def gradient_of(replay: Any) -> torch.Tensor:
    """Of log P of the colour that is in the image, at half a mask."""
    mask = torch.full((1, 8, 8), 0.5)
    _, gradient = replay.score_and_grad(mask, lambda log_probs: log_probs[:, 3])
    return gradient.flatten().double()


@KIND
def test_the_answer_is_recorded_and_replayed(kind: str, made: Any, full: Any, processor: Any) -> None:
    model, before, trace = made(kind)
    assert trace.status == "complete" and not trace.notes
    assert trace.answer == full[0].answer
    assert trace.layout.patch_box is not None and trace.llr is not None and trace.attention is not None
    assert trace.llr.argmax() == full[0].llr.argmax() == 3
    assert probe.verify(trace, model, processor).within(None)
    replay = probe.replay(trace, model, processor)
    cosine = torch.nn.functional.cosine_similarity(gradient_of(replay), full[1], dim=0)
    assert cosine > 0.97
    assert fingerprint(model) == trace.model["fingerprint"] == before


@KIND
def test_every_method_has_a_map(kind: str, made: Any, processor: Any) -> None:
    model, _, trace = made(kind)
    replay = probe.replay(trace, model, processor)
    selection = probe.select_tokens(replay)
    heats = {
        method: probe.explain(replay, method=method, tokens=selection, strengthen=False, **params)
        for method, params in METHODS.items()
    }
    assert not [method for method, heat in heats.items() if heat.values is None]
    assert probe.evaluate(heats["occlusion"], replay, steps=6).gain > 0.5
    assert causal.knockout(replay, heats["occlusion"], draws=1).drop > 1
    assert probe.plan(replay, method="igos++").peak > 0
    again = probe.replay(trace, model, processor, gradient_checkpointing=True)
    assert torch.allclose(gradient_of(again), gradient_of(replay), atol=1e-2 * float(gradient_of(replay).abs().max()))


@KIND
def test_it_is_known_again_and_told_from_others(kind: str, made: Any, full: Any, processor: Any) -> None:
    model, before, trace = made(kind)
    assert fingerprint(load(kind)) == before
    method = getattr(model.config, "quantization_config", None)
    told = "these are quantised by" if method is not None else "load the recorded model"
    with pytest.raises(ModelMismatch, match=rf"{told}.*strict=False"):
        probe.replay(full[0], model, processor)
    assert probe.replay(full[0], model, processor, strict=False).original_log_probs.isfinite().all()
    assert 0 < probe.verify(full[0], model, processor, strict=False).largest_difference < 1
    plain = load("bfloat16")
    told = "the recorded weights were quantised by" if method is not None else "load the recorded model"
    with pytest.raises(ModelMismatch, match=told):
        probe.replay(trace, plain, processor)


@KIND
def test_memory_is_that_of_what_is_stored(kind: str, made: Any) -> None:
    """Every weight of a linear layer in its bits and no more than a quarter for its scales, the rest as it is."""
    model, _, _ = made(kind)
    plain = load("bfloat16")
    linear = {
        id(m.weight): m.weight.numel() for n, m in plain.named_modules() if type(m) is nn.Linear and n != "lm_head"
    }
    rest = weight_bytes(plain) - 2 * sum(linear.values())
    least = rest + sum(linear.values()) * KINDS[kind][1] / 8
    assert least <= weight_bytes(model) <= 1.25 * least


@KIND
def test_quantised_weights_are_not_randomised_in_place(kind: str, made: Any, processor: Any) -> None:
    model, before, trace = made(kind)
    replay = probe.replay(trace, model, processor)
    heat = probe.explain(replay, method="attention", tokens=probe.select_tokens(replay), strengthen=False)
    if kind == "quanto int8":  # a copy of such a weight is an ordinary tensor
        assert probe.sanity.weights(replay, heat, stages=1).heatmaps
    else:
        with pytest.raises(ExplainError, match="cannot be randomised: load the model whole and unquantised"):
            probe.sanity.weights(replay, heat, stages=1)
    assert fingerprint(model) == before


@pytest.mark.parametrize("kind", present({kind: KINDS[kind] for kind in ("bitsandbytes int8", "bitsandbytes nf4")}))
def test_a_saved_model_is_loaded_in_its_own_format(kind: str, processor: Any, tmp_path: Path) -> None:
    """By default: in single precision the rest would not go with it."""
    load(kind).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    model, other = load_model(tmp_path / "model", device="cpu")
    assert model.dtype == torch.bfloat16
    assert record(model, other, tmp_path / "traces").status == "complete"


@pytest.mark.parametrize("kind", present({"bitsandbytes nf4": KINDS["bitsandbytes nf4"]}))
def test_gradients_of_four_bits_are_those_of_what_they_dequantise_to(kind: str, processor: Any, tmp_path: Path) -> None:
    """Also where the processor has had the weights packed for a kernel that has no derivative."""
    from bitsandbytes.functional import dequantize_4bit

    model = load(kind)
    plain = load("bfloat16")
    for path, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            state = copy.copy(module.weight.quant_state)
            plain.get_submodule(path).weight.data = dequantize_4bit(module.weight.data, state).to(torch.bfloat16)
    trace = record(model, processor, tmp_path)  # packs them, where it can
    found, expected = (gradient_of(probe.replay(trace, one, processor, strict=False)) for one in (model, plain))
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.999
    assert 0.97 < found.norm() / expected.norm() < 1.03


@pytest.mark.parametrize("kind", present(WITHOUT_DERIVATIVE))
@pytest.mark.parametrize("tower", [False, True])
def test_kernels_without_a_derivative_are_told(kind: str, tower: bool, processor: Any, tmp_path: Path) -> None:
    """With the image encoder as it was, attention can be drawn; with it quantised, only what masks the image."""
    model = load(kind, tower=tower)
    trace = record(model, processor, tmp_path)
    assert trace.status == "complete" and trace.llr is not None
    replay = probe.replay(trace, model, processor)
    selection = probe.select_tokens(replay)
    told = r"no gradients: occlusion, rise, greedy" + ("$" if tower else ", attention, rollout, tam$")
    for method, params in itertools.islice(METHODS.items(), 6):
        with pytest.raises(ExplainError, match=f"computes without autograd.*{told}"):
            probe.explain(replay, method=method, tokens=selection, strengthen=False, **params)
    assert "occlusion, rise, greedy" in probe.plan(replay, method="igos++").sentence()
    heats = {}
    for method, params in itertools.islice(METHODS.items(), 6, None):
        if tower and method in ("attention", "rollout", "tam"):
            with pytest.raises(ExplainError, match=r"no gradient reaches the image tokens.*'rise', 'occlusion' or"):
                probe.explain(replay, method=method, tokens=selection, strengthen=False, **params)
        else:
            heats[method] = probe.explain(replay, method=method, tokens=selection, strengthen=False, **params)
            assert heats[method].values is not None
    assert probe.evaluate(heats["occlusion"], replay, steps=6).gain > 0.5
    assert tower == any("no gradient reaches" in note for note in trace.notes)
