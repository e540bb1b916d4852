"""Weights of a class of their own: what they take, what is said of them. Those of the libraries: tests/quantised."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from torch import nn
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError, ModelMismatch
from lvlm_probe.models.fingerprint import fingerprint
from lvlm_probe.models.quantised import quantisation, stored_tensors
from lvlm_probe.planning import weight_bytes
from lvlm_probe.sanity.random_weights import randomised


class Scaled(torch.Tensor):
    """A weight of 8-bit integers with a scale per row, which says that it is of single precision."""

    @staticmethod
    def __new__(cls, integers: torch.Tensor, scale: torch.Tensor) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(cls, integers.shape, dtype=scale.dtype)  # type: ignore[attr-defined]

    def __init__(self, integers: torch.Tensor, scale: torch.Tensor) -> None:
        self.integers, self.scale = integers, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["integers", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function).startswith("aten.detach"):
            return Scaled(args[0].integers, args[0].scale)
        raise NotImplementedError(str(function))


@pytest.mark.quick
def test_what_weights_are_kept_in_is_counted() -> None:
    """32 integers and 4 scales of four bytes each, 8 biases; the integers that two layers share once."""
    kept = Scaled(torch.zeros(4, 8, dtype=torch.int8), torch.ones(4))
    linear = nn.Linear(8, 4)
    linear.weight = nn.Parameter(kept, requires_grad=False)
    other = nn.Linear(8, 4)
    other.weight = nn.Parameter(Scaled(kept.integers, torch.ones(4)), requires_grad=False)
    assert weight_bytes(nn.Sequential(linear, other)) == 32 + 2 * 16 + 2 * 16
    assert sum(tensor.numel() for tensor in stored_tensors(linear)) == 32 + 4 + 4


def test_weights_that_hold_others_are_not_randomised() -> None:
    linear = nn.Linear(8, 4)
    linear.weight = nn.Parameter(Scaled(torch.zeros(4, 8, dtype=torch.int8), torch.ones(4)), requires_grad=False)
    with pytest.raises(ExplainError, match=r"weight is Scaled, so it cannot be randomised.*unquantised"):
        with randomised(dict(linear.named_parameters())):
            pass


def test_a_mismatch_says_which_weights_are_quantised(tmp_path: Any) -> None:
    model, processor = tiny_models.build("llava")
    with probe.attach(model, processor) as attached, attached.record(tmp_path) as recording:
        asked = tiny_models.inputs("llava", model, processor, [tiny_models.picture()], "What is it?")
        model.generate(**asked, min_new_tokens=3, max_new_tokens=3, do_sample=False)
    (trace,) = recording.traces
    model.lm_head.weight.data[:, 0] += 1
    with pytest.raises(ModelMismatch, match=r"fingerprint \w+…; load the recorded model, or pass strict=False"):
        probe.replay(trace, model, processor)
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert quantisation(model.config) == quantisation(model.config.to_dict()) == "gptq"
    with pytest.raises(ModelMismatch, match=r"weights were not quantised, these are quantised by gptq; .*strict=False"):
        probe.replay(trace, model, processor)
    assert probe.verify(trace, model, processor, strict=False).largest_difference > 0


@pytest.fixture
def mesh() -> Any:
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    destroy_process_group()


def test_a_model_whose_weights_are_distributed(mesh: Any, tmp_path: Any) -> None:
    """DTensors, as ``tp_plan="auto"`` makes them, all on this process."""
    model, processor = tiny_models.build("llava")
    whole, taken = fingerprint(model), weight_bytes(model)
    for layer in model.model.language_model.layers:
        plan = {
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(),
        }
        parallelize_module(layer, mesh, plan)
    assert type(model.model.language_model.layers[0].mlp.up_proj.weight.data).__name__ == "DTensor"
    assert fingerprint(model) == whole and weight_bytes(model) == taken
    with probe.attach(model, processor) as attached, attached.record(tmp_path) as recording:
        asked = tiny_models.inputs("llava", model, processor, [tiny_models.picture()], "What is it?")
        model.generate(**asked, min_new_tokens=3, max_new_tokens=3, do_sample=False)
    assert not recording.faults
    (trace,) = recording.traces
    replay = probe.replay(trace, model, processor)
    assert probe.verify(trace, model, processor).within(None)
    for method in ("input_gradient", "tmm", "attention", "occlusion"):
        probe.explain(replay, method=method, tokens=(0, 3), strengthen=False)
    assert probe.plan(replay, method="igos++").weights == taken
    heat = probe.explain(replay, method="random", tokens=(0, 3), strengthen=False)
    with pytest.raises(ExplainError, match="cannot be randomised"):
        probe.sanity.weights(replay, heat, stages=1)
