"""Gradient checkpointing changes no gradient, also where a layer applies dropout by its own training flag."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers

import lvlm_probe as probe
from lvlm_probe.models.replica import Replica
from lvlm_probe.replaying.isolation import checkpointed


def opt() -> Any:
    """The language model of BLIP-2 and InstructBLIP: functional dropout in the layer itself."""
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, dropout=0.5,
            attention_dropout=0.5, max_position_embeddings=64, word_embed_proj_dim=32,
        )
    )  # fmt: skip


def bart() -> Any:
    """The language model of Florence-2: an encoder-decoder, dropout and activation dropout in the layers."""
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=64, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=2, decoder_attention_heads=2, dropout=0.5, activation_dropout=0.5,
            attention_dropout=0.5, max_position_embeddings=64,
        )
    )  # fmt: skip


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    )


def t5() -> Any:
    """Position bias is computed by the first layer and handed on to the others."""
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=2,
            dropout_rate=0.5, decoder_start_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


def kosmos2() -> Any:
    """Two kinds of dropout in the text layers, and image features from a latent query."""
    return transformers.Kosmos2ForConditionalGeneration(
        transformers.Kosmos2Config(
            text_config={
                "vocab_size": 64, "embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 2, "dropout": 0.5,
                "attention_dropout": 0.5, "activation_dropout": 0.5, "max_position_embeddings": 64,
            },
            vision_config={
                "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                "image_size": 28, "patch_size": 14,
            },
            latent_query_num=4,
        )
    )  # fmt: skip


def blip2() -> Any:
    """A Q-Former between tower and OPT, with dropout everywhere."""
    return transformers.Blip2ForConditionalGeneration(
        transformers.Blip2Config(
            vision_config={
                "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                "image_size": 28, "patch_size": 14, "attention_dropout": 0.5,
            },
            qformer_config={
                "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                "encoder_hidden_size": 32, "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5,
                "vocab_size": 64,
            },
            text_config={
                "model_type": "opt", "vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
                "num_attention_heads": 2, "dropout": 0.5, "max_position_embeddings": 64, "word_embed_proj_dim": 32,
            },
            num_query_tokens=4,
            image_token_index=5,
        )
    )  # fmt: skip


def text_inputs(model: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, 7, 32, generator=generator).requires_grad_(True)
    if model.config.is_encoder_decoder:
        return {"inputs_embeds": embeds, "decoder_input_ids": torch.arange(1, 6)[None]}
    return {"inputs_embeds": embeds}


def pixel_inputs(model: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 28, 28, generator=generator).requires_grad_(True)
    ids = torch.tensor([[1, 5, 5, 5, 5, 7, 8, 9]])
    inputs = {"input_ids": ids, "pixel_values": pixels}
    if model.config.model_type == "kosmos-2":
        inputs["image_embeds_position_mask"] = (ids == 5).long()
    return inputs


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], dict[str, Any]]]] = {
    "opt": (opt, text_inputs),
    "bart": (bart, text_inputs),
    "gpt2": (gpt2, text_inputs),
    "t5": (t5, text_inputs),
    "kosmos2": (kosmos2, pixel_inputs),
    "blip2": (blip2, pixel_inputs),
}


def run(model: Any, inputs: dict[str, Any], *, checkpoint: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Log-probabilities, their gradient to the input, and how often parts of checkpointed layers ran."""
    calls: list[int] = []
    layers = [m for m in model.modules() if isinstance(m, transformers.modeling_layers.GradientCheckpointingLayer)]
    leaves = {part for layer in layers for part in layer.modules() if not part._modules}
    handles = [leaf.register_forward_pre_hook(lambda *_: calls.append(1)) for leaf in leaves]
    given = next(value for value in inputs.values() if value.requires_grad)
    with Replica(model).use() as replica, checkpointed(replica, enabled=checkpoint) as passing:
        values = passing(**inputs, use_cache=False).logits.log_softmax(-1)
    weight = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((values * weight).sum(), given)
    for handle in handles:
        handle.remove()
    return values.detach(), gradient, len(calls)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_same_to_the_last_bit(name):
    build, make_inputs = CASES[name]
    torch.manual_seed(0)
    model = build()
    tiny_models.redraw(model, 0)
    model.train()  # with all its dropout, as it is while it is trained
    inputs = make_inputs(model)
    plain, expected, once = run(model, inputs, checkpoint=False)
    values, gradient, twice = run(model, inputs, checkpoint=True)
    assert expected.abs().max() > 0
    assert torch.equal(values, plain) and torch.equal(gradient, expected)
    assert twice >= 1.5 * once > 0
    assert model.training and all(module.training for module in model.modules())


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_every_tiny_family(name, tmp_path: Path):
    model, processor = tiny_models.build(name)
    with probe.attach(model, processor) as p, p.record(tmp_path, attention=False) as recording:
        inputs = tiny_models.inputs(name, model, processor, [tiny_models.picture()], "What is it?")
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    (trace,) = recording.traces
    leaf = (0.3 + 0.5 * torch.rand(1, 5, 5, generator=torch.Generator().manual_seed(2))).requires_grad_(True)
    gradients = []
    for saving in (False, True):
        replay = probe.replay(trace, model, processor, gradient_checkpointing=saving)
        gradients.append(torch.autograd.grad(replay.log_probs(leaf).sum(), leaf)[0])
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0
