"""Weighted values of the encoder, against eager maps and against queries, keys and values taken out by hooks."""

from __future__ import annotations

from typing import Any

import inside
import numpy as np
import pytest
import torch
from torch import Tensor

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError

READ = "model.vision_tower.encoder.layers.0.self_attn"
"""LLaVA reads its encoder's last layer but one, of two."""


def explain(replay: Any, **params: Any) -> probe.Heatmap:
    return probe.explain(replay, method="gradient_value", tokens=inside.SPAN, strengthen=False, **params)


def scaled(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / (values.max() - values.min())


@pytest.mark.parametrize("sign", ["positive", "absolute"])
def test_attention_weights_give_the_columns_of_attention_times_gradient(sign: str) -> None:
    eager = inside.replay("llava", attention="eager")
    (call,) = [call for call in inside.dense(eager).calls if "vision" in call.module and call.gradient is not None]
    columns = (call.weights * call.gradient).double().sum(dim=(1, 2))[0, 1:].numpy()  # but for the class token
    wanted = np.abs(columns) if sign == "absolute" else columns.clip(min=0)
    replay = inside.replay("llava")
    heat = explain(replay, weights="attention", sign=sign)
    assert heat.provenance["diagnostics"]["layer"] == call.module
    assert np.allclose(heat.values[:, 1:5], scaled(wanted).reshape(4, 4), atol=5e-3)  # CLIP sees the middle square
    assert inside.own_passes(replay, "gradient_value", sign=sign) == {"forward": 1, "backward": 1}


@pytest.mark.quick
def test_cosines_are_those_of_queries_and_keys_taken_out_by_hooks() -> None:
    """Σ_j Σ_c ∂y/∂O_jc λ_ji V_ic, token by token, from the projections' own outputs; O is what out_proj is given."""
    replay = inside.replay("llava")
    attention = replay.model.get_submodule(READ)
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, args: Any, output: Tensor) -> None:
            kept[name] = args[0] if name == "out" else output
            kept[name].retain_grad()

        return hook

    hooks = [getattr(attention, f"{name}_proj").register_forward_hook(keep(name)) for name in ("q", "k", "v", "out")]
    leaves = {key: replay.path.inputs[key].clone().requires_grad_(True) for key in replay.path.pixel_keys}
    try:
        replay.run_inputs({**replay.path.inputs, **leaves})[0, slice(*inside.SPAN)].sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    query, key, value = (kept[name][0].detach().double().numpy() for name in "qkv")
    gradient = kept["out"].grad[0].double().numpy()
    total = np.zeros(len(query))
    for j in range(len(query)):
        cosines = np.array([query[j] @ other / np.linalg.norm(query[j]) / np.linalg.norm(other) for other in key])
        low, high = cosines[1:].min(), cosines[1:].max()  # the class token is no place
        loose = ((cosines - low) / (high - low)).clip(0, 1)
        total += loose * (value @ gradient[j])
    heat = explain(replay, weights="cosine", sign="positive")
    wanted = total[1:].clip(min=0)
    assert (wanted > 0).sum() > 1
    assert np.allclose(heat.values[:, 1:5], scaled(wanted).reshape(4, 4), atol=5e-3)


@pytest.mark.parametrize("weights", ["attention", "cosine"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "gemma3", "llava_next", "paligemma"])
def test_windows_views_and_merged_tokens(name: str, weights: str) -> None:
    """Every token of the encoder that stands for a part of the image gets a value at its own place: of an eager model
    with ``"attention"``, and finite and not all the same in either case."""
    replay = inside.replay(name)
    heat = explain(replay, weights=weights)
    assert heat.values is not None and heat.values.std() > 1e-3
    if weights == "cosine":
        return
    eager = inside.replay(name, attention="eager")
    calls = [call for call in inside.dense(eager).calls if "visual" in call.module or "vision" in call.module]
    read = [call for call in calls if call.gradient is not None]
    last = [call for call in read if call.module == read[-1].module]
    columns = torch.cat([(call.weights * call.gradient).double().sum(dim=(1, 2)).abs().reshape(-1) for call in last])
    if name.startswith("llava"):
        columns = columns.reshape(len(last[0].weights), -1)[:, 1:].reshape(-1)
    if name == "llava_next":
        return  # views overlap
    assert heat.values.max() == 1
    assert np.allclose(np.sort(heat.values.ravel()), np.sort(scaled(columns.numpy())), atol=5e-3)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"weights": "softmax"}, "weights is 'attention' or 'cosine'"),
        ({"sign": "negative"}, "sign is 'positive' or 'absolute'"),
        ({"encoder": 2}, "encoder=2, but there are 1"),
    ],
)
def test_wrong_parameters_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ExplainError, match=message):
        explain(inside.replay("llava"), **params)
