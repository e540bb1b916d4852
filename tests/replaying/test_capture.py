"""Looking inside a replayed pass: attention and its gradient against an eager model's own autograd, and manners."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import weakref
from typing import Any

import inside
import pytest
import tiny_models
import torch
import transformers
from float64 import in_float64
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

import lvlm_probe as probe
from lvlm_probe.attention import RowTap
from lvlm_probe.attention.dispatch import NAME
from lvlm_probe.errors import ExplainError, PointNotFound
from lvlm_probe.replaying import capture as capture_module

ONE = torch.ones(1, 1, 1)
EXACT = 1e-9
"""Of float64, which holds these sums to 1e-13; a wrong formula is off by more than a thousandth."""
FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "gemma3", "paligemma", "llava_next")


def score(log_probs):
    return log_probs[:, slice(*inside.SPAN)].sum(1)


def visited(
    replay, parts=("decoder", "encoder"), arithmetic=contextlib.nullcontext
) -> dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]:
    """(module, start) → A and dA, as ``visit`` sees them, in the order of the visits.

    ``arithmetic`` is entered in each: autograd leaves modes of torch behind where it calls back.
    """
    seen: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def visit(layer):
        rows = torch.cat(list(layer.blocks()))
        assert torch.equal(rows, torch.arange(layer.queries))
        with arithmetic():
            seen[layer.layer.module, layer.start] = (layer.weights(rows), layer.weight_gradient(rows))

    with replay.capture(attention=parts, visit=visit):
        replay.score_and_grad(ONE, score)
    return seen


def agree(seen, truth) -> None:
    """Same layers, same weights, same gradients, both of float64: a processor's own rounding is far below ``EXACT``."""
    wanted = {(call.module, call.start): call for call in truth.calls if call.gradient is not None}
    assert seen.keys() == wanted.keys()
    for key, (weights, gradient) in seen.items():
        call = wanted[key]
        assert weights.shape == call.weights.shape
        assert weights.dtype == gradient.dtype == torch.float64
        assert float((weights - call.weights).abs().max()) <= EXACT, key
        scale = float(call.gradient.abs().max())
        assert scale > 0
        assert float((gradient - call.gradient).abs().max()) <= EXACT * scale, key


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_weights_and_gradients_are_those_of_eager_autograd(name, attention):
    """Grouped queries, sliding windows, bidirectional prefixes, windows of an encoder, tiles."""
    eager, replay = inside.replay(name, attention="eager"), inside.replay(name, attention=attention)
    with in_float64(eager.model, replay.model):
        truth = inside.dense(inside.replay(name, attention="eager"))
        seen = visited(inside.replay(name, attention=attention), arithmetic=in_float64)
    agree(seen, truth)
    parts = [key[0].startswith(replay.model.base_model_prefix + ".language_model") for key in seen]
    assert parts == sorted(parts, reverse=True) and any(parts) and not all(parts)  # the decoder first, then the encoder
    order = [int(key[0].split("layers.")[1].split(".")[0]) for key, text in zip(seen, parts, strict=True) if text]
    assert order == sorted(order, reverse=True)


def test_windows_of_an_encoder_are_told_apart():
    """Qwen2.5-VL's first block attends in windows: one visit each, and the starts add up to the sequence."""
    seen = visited(inside.replay("qwen2_5_vl"), ("encoder",))
    first = [(start, len(a[0][0, 0])) for (module, start), a in seen.items() if module.endswith("blocks.0.attn")]
    assert len(first) > 1
    covered = sorted(first)
    assert covered[0][0] == 0
    assert all(start + length == after for (start, length), (after, _) in itertools.pairwise(covered))


def test_a_layer_that_runs_twice_is_seen_twice_from_the_first_position_on(tmp_path):
    """A decoder's loop is no window: relevance goes through both runs, the later one first."""
    model, processor = tiny_models.build("llava")
    tiny_models.loop(model, [1])
    with probe.attach(model, processor) as attached, attached.record(tmp_path, llr=False) as recording:
        model.generate(
            **tiny_models.inputs("llava", model, processor, [tiny_models.picture()], "Where?"), max_new_tokens=3
        )
    replay = probe.replay(recording.traces[0], model, processor)
    seen = []
    with replay.capture(attention=("decoder",), visit=lambda layer: seen.append((layer.layer.index, layer.start))):
        replay.score_and_grad(ONE, lambda log_probs: log_probs.sum(1))
    assert seen == [(2, 0), (1, 0), (1, 0), (0, 0)]
    for method in ("rollout", "tmm", "relative_attention"):
        assert probe.explain(replay, method=method, tokens=(0, 3)).values.std() > 0


def test_weights_are_what_output_attentions_gives():
    """Not by way of our own spy: the model's public interface."""
    replay = inside.replay("llava")
    eager = inside.replay("llava", attention="eager")
    ids = torch.cat([replay.input_ids, replay.token_ids[:-1]])[None]
    pixels = replay.path.inputs["pixel_values"].clone().requires_grad_(True)
    output = eager.model(input_ids=ids, pixel_values=pixels, output_attentions=True, use_cache=False)
    for weights in output.attentions:
        weights.retain_grad()
    log_probs = output.logits[0].log_softmax(-1)[len(replay.input_ids) - 1 :]
    log_probs[torch.arange(len(replay.token_ids)), replay.token_ids][slice(*inside.SPAN)].sum().backward()
    eager.model.zero_grad()
    seen = visited(replay, ("decoder",))
    assert len(seen) == len(output.attentions) == 3
    for (module, _), (weights, gradient) in seen.items():
        own = output.attentions[int(module.split("layers.")[1].split(".")[0])]
        assert torch.allclose(weights, own, atol=1e-5)
        assert torch.allclose(gradient, own.grad, atol=1e-5 * float(own.grad.abs().max()))


def softcapped() -> tuple[Any, Any]:
    """PaliGemma 2: the same tower over Gemma 2, whose scores are capped; sdpa refuses that, so it runs eager."""
    model, processor = tiny_models.build("paligemma")
    text = model.config.text_config
    settings = {
        key: getattr(text, key)
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    }
    config = transformers.PaliGemmaConfig(
        vision_config=model.config.vision_config.to_dict(),
        text_config={
            **settings,
            "model_type": "gemma2",
            "head_dim": 12,
            "num_hidden_layers": 2,
            "sliding_window": 8,
            "attn_logit_softcapping": 0.5,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        image_token_index=model.config.image_token_id,
        projection_dim=48,
        hidden_size=48,
    )
    capped = transformers.PaliGemmaForConditionalGeneration(config).float().eval()
    tiny_models.redraw(capped, 0)
    capped.set_attn_implementation("eager")
    return capped, processor


def test_softcapped_scores_with_a_sliding_window():
    model, processor = softcapped()
    trace = inside.record("paligemma", model, processor)
    with in_float64(model):
        replay = probe.replay(trace, model, processor)
        truth = inside.dense(replay)
        agree(visited(replay, arithmetic=in_float64), truth)
    for module in model.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = None
    uncapped = inside.dense(replay)
    assert (
        max(
            float((one.weights - two.weights).abs().max()) for one, two in zip(truth.calls, uncapped.calls, strict=True)
        )
        > 0.01
    )  # the cap does something


def test_half_precision_is_the_same_within_its_rounding():
    model, processor = tiny_models.build("llava")
    trace = inside.record("llava", model, processor)
    replay = probe.replay(trace, model.bfloat16(), processor, strict=False)
    exact = visited(inside.replay("llava"))
    for key, (weights, gradient) in visited(replay).items():
        assert weights.dtype == gradient.dtype == torch.float32
        assert float((weights - exact[key][0]).abs().max()) < 0.05
        assert float(torch.cosine_similarity(gradient.flatten(), exact[key][1].flatten(), dim=0)) > 0.95


def test_without_visit_the_layers_of_the_last_pass_are_kept():
    replay = inside.replay("llava")
    truth = inside.dense(inside.replay("llava", attention="eager"))
    with replay.capture(attention=["decoder"]) as seen, torch.no_grad():
        replay.log_probs(torch.zeros(1, 1, 1))
        replay.log_probs(ONE)
    calls = truth.of("model.language_model")
    assert [layer.layer.module for layer in seen.layers] == [call.module for call in calls]
    assert [layer.layer.index for layer in seen.layers] == [0, 1, 2]
    for layer, call in zip(seen.layers, calls, strict=True):
        assert (layer.part, layer.start, layer.batch) == ("decoder", 0, 1)
        assert layer.queries == layer.keys == replay.length
        assert torch.allclose(layer.weights(torch.tensor([3, 20])), call.weights[:, :, [3, 20]], atol=1e-5)
        with pytest.raises(ExplainError, match="no gradient has reached"):
            layer.weight_gradient(torch.tensor([0]))


@pytest.mark.quick
def test_outputs_and_gradients_of_modules():
    replay = inside.replay("llava")
    path = "model.multi_modal_projector"
    with replay.capture(modules=[path, "model.vision_tower*layers.?"]) as seen:
        replay.score_and_grad(ONE, score)
    kept: list[torch.Tensor] = []
    hook = replay.model.get_submodule(path).register_forward_hook(lambda _m, _a, output: kept.append(output))
    try:
        leaf = replay.path.inputs["pixel_values"].clone().requires_grad_(True)
        value = score(replay.run_inputs({"pixel_values": leaf}))
        (gradient,) = torch.autograd.grad(value.sum(), kept[0])
    finally:
        hook.remove()
    assert torch.equal(seen.outputs[path], kept[0])
    assert torch.allclose(seen.gradients[path], gradient, atol=1e-6)
    blocks = sorted(key for key in seen.outputs if key != path)
    assert len(blocks) == 2
    assert blocks[0] in seen.gradients and blocks[1] not in seen.gradients  # LLaVA reads the last block but one


# ------------------------------------------------------------------------------------------------------ manners


def state(model) -> tuple[Any, ...]:
    """Everything that could be left behind."""
    return (
        {name: found for name, found in AttentionInterface._global_mapping.items() if name != NAME},
        [(name, id(module.__dict__["config"])) for name, module in model.named_modules() if "config" in vars(module)],
        [
            (name, len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for name, module in model.named_modules()
        ],
        [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()],
        [module.training for module in model.modules()],
        model.config.to_json_string(),
    )


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_model_is_left_as_it_was(name):
    replay = inside.replay(name)
    before, output = state(replay.model), replay.log_probs(ONE)
    _, gradient = replay.score_and_grad(ONE, score)
    with replay.capture(modules=["*"], attention=["decoder", "encoder"], visit=lambda layer: None):
        assert state(replay.model) == before  # passes run on a replica
        assert torch.equal(replay.log_probs(ONE), output)
        _, watched = replay.score_and_grad(ONE, score)
    assert torch.equal(watched, gradient)
    assert state(replay.model) == before
    assert torch.equal(replay.log_probs(ONE), output)


@pytest.mark.parametrize("where", ["visit", "block", "edit"])
def test_and_after_an_exception(where):
    replay = inside.replay("llava")
    before, output = state(replay.model), replay.log_probs(ONE)

    class Mine(Exception):
        pass

    def fail(*_):
        raise Mine(where)

    with pytest.raises(Mine, match=where):
        with replay.capture(
            attention=["decoder"],
            visit=fail if where == "visit" else None,
            edit=fail if where == "edit" else None,
        ):
            if where == "block":
                fail()
            replay.score_and_grad(ONE, score)
    assert state(replay.model) == before
    assert torch.equal(replay.log_probs(ONE), output)
    visited(replay)  # and it can be looked into again


def test_edit_replaces_a_layers_output():
    """Scaling O of every layer by 0 is a model whose attention says nothing; by 1, the model itself."""
    replay = inside.replay("llava")
    output = replay.log_probs(ONE)
    with replay.capture(attention=["decoder"], edit=lambda layer, value: value * 1.0):
        assert torch.equal(replay.log_probs(ONE), output)
    hooks = [
        module.o_proj.register_forward_pre_hook(lambda _m, args: (args[0] * 0,))
        for name, module in replay.model.named_modules()
        if name.startswith("model.language_model") and name.endswith("self_attn")
    ]
    try:
        expected = replay.log_probs(ONE)
    finally:
        for hook in hooks:
            hook.remove()
    with replay.capture(attention=["decoder"], edit=lambda layer, value: value * 0):
        assert torch.allclose(replay.log_probs(ONE), expected, atol=1e-6)
    assert not torch.allclose(expected, output, atol=1e-3)


def test_refusals():
    replay = inside.replay("llava")
    with pytest.raises(ExplainError, match="'decoder', 'cross' and 'encoder'"), replay.capture(attention=["merger"]):
        pass
    with pytest.raises(PointNotFound, match="no module matches 'nothing'"), replay.capture(modules=["nothing"]):
        pass
    recomputing = probe.replay(replay.trace, replay.model, replay.processor, gradient_checkpointing=True)
    with pytest.raises(ExplainError, match="without gradient_checkpointing"), recomputing.capture():
        pass


def test_one_look_inside_another():
    replay = inside.replay("llava")
    before, alone = state(replay.model), replay.log_probs(ONE)
    tap = RowTap(replay.model).install()
    with (
        replay.capture(attention=["decoder"]) as outer,
        replay.capture(modules=["lm_head"], attention=["decoder"]) as own,
    ):
        assert torch.equal(replay.log_probs(ONE), alone)
    assert len(outer.layers) == len(own.layers) == 3
    tap.remove()
    assert state(replay.model) == before


def test_attention_that_cannot_be_read_is_refused_by_name(monkeypatch):
    replay = inside.replay("llava")
    monkeypatch.setattr(replay.model.model.language_model.config, "_attn_implementation_internal", "flash_attention_2")
    with (
        pytest.raises(ExplainError, match=r'flash_attention_2.*attn_implementation="sdpa" or "eager"'),
        replay.capture(attention=["decoder"]),
    ):
        pass


# ------------------------------------------------------------------------------------------------------- memory


class Sizes(TorchDispatchMode):
    """The numbers of every tensor that any operation makes, backward included, and which of them are alive."""

    def __init__(self, watched: int) -> None:
        super().__init__()
        self.largest, self.made, self.at_once, self._watched = 0, 0, 0, watched
        self._alive: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if not isinstance(value, torch.Tensor):
                continue
            stored = value.untyped_storage().nbytes() // value.element_size()
            self.largest = max(self.largest, stored)
            if stored >= self._watched:
                self.made += 1
                self._alive = [item for item in self._alive if item() is not None] + [weakref.ref(value)]
                storages = [item().untyped_storage() for item in self._alive]
                distinct = {storage.data_ptr(): storage.nbytes() for storage in storages}
                self.at_once = max(self.at_once, sum(distinct.values()))
        return result


def test_nothing_of_the_size_of_all_heads_maps_is_made(monkeypatch):
    """The weights of one layer on all rows are H·N² numbers; with blocks of rows no tensor comes near that."""
    model, processor = tiny_models.build("llava")
    trace = inside.record("llava", model, processor, question="What is in this picture? " * 60, attention=False)
    replay = probe.replay(trace, model, processor)
    heads, length = 4, replay.length
    whole = heads * length**2
    assert length > 400
    monkeypatch.setattr(capture_module, "_BLOCK_NUMBERS", heads * length * 32)  # 32 rows at once
    visits: list[str] = []

    def visit(layer):
        vector = torch.ones(layer.queries, dtype=torch.float64)
        for rows in layer.blocks():
            assert len(rows) <= 32
            bar = (layer.weights(rows) * layer.weight_gradient(rows)).clamp(min=0).double().mean(dim=1)
            vector = vector + (vector[rows] @ bar[0])
        visits.append(layer.layer.module)

    replay.score_and_grad(ONE, score)  # the processor is traced at the first mask
    gc.collect()
    with replay.capture(attention=["decoder"], visit=visit) as seen, Sizes(watched=heads * length * 32) as sizes:
        replay.score_and_grad(ONE, score)
    assert len(visits) == 3 and seen.layers == []
    model_alone = Sizes(watched=heads * length * 32)
    with model_alone:
        replay.score_and_grad(ONE, score)
    assert model_alone.largest < whole / 4  # sdpa's kernel keeps no map itself, or the test would say nothing
    assert sizes.made > model_alone.made  # the mode sees what happens inside backward()
    assert sizes.largest < whole / 4
    # All that is alive at once beyond the model's own activations is a handful of blocks, for all layers together.
    assert sizes.at_once - model_alone.at_once < 4 * whole / 2


def test_a_visited_layer_is_let_go():
    """No layer outlives the graph it belongs to: with ``visit`` the capture keeps none."""
    replay = inside.replay("llava")
    alive: list[weakref.ref[Any]] = []

    def visit(layer):
        alive.append(weakref.ref(layer))

    with replay.capture(attention=["decoder"], visit=visit):
        replay.score_and_grad(ONE, score)
        gc.collect()
        assert len(alive) == 3 and all(reference() is None for reference in alive)


def test_blocks_cover_all_rows_once(monkeypatch):
    replay = inside.replay("llava")
    whole = visited(replay, ("decoder",))
    monkeypatch.setattr(capture_module, "_BLOCK_NUMBERS", 4 * replay.length * 5)
    sizes: list[int] = []

    def visit(layer):
        blocks = list(layer.blocks())
        sizes.append(max(map(len, blocks)))
        assert torch.equal(torch.cat(blocks), torch.arange(layer.queries))
        weights = torch.cat([layer.weights(rows) for rows in blocks], dim=2)
        assert torch.allclose(weights, whole[layer.layer.module, 0][0], atol=1e-6)

    with replay.capture(attention=["decoder"], visit=visit):
        replay.score_and_grad(ONE, score)
    assert sizes == [5, 5, 5] and math.ceil(replay.length / 5) > 1
