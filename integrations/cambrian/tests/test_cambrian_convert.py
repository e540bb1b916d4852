"""The converter: tables of real size, every way in which a checkpoint does not fit, and what it reads and writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cambrian_tiny import DATA, IMAGE, converted, folders, tokenizer
from lvlm_probe_cambrian import CambrianForConditionalGeneration, CambrianProcessor
from lvlm_probe_cambrian.convert import convert, main, plan, verify
from lvlm_probe_cambrian.keys import LANGUAGE, interpolated_positions, recipes
from lvlm_probe_cambrian.original_config import make_config, tower_kind
from lvlm_probe_cambrian.original_processor import prompt_format, write_processor
from lvlm_probe_cambrian.sources import Checkpoint, ConversionError
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

STEM = "cambrian_tiny"
TOWERS = [
    "siglip/CLIP-ViT-SO400M-14-384",
    "openai/clip-vit-large-patch14-336",
    "facebook/dinov2-giant-res378",
    "clip-convnext-XXL-multi-stage",
]
TABLES = {
    "siglip_vision_model": "timm:vit_so400m_patch14_siglip_384",
    "clip_vision_model": "hf4:clip-l-336",
    "dinov2": "hf4:dinov2-giant",
    "convnext": "timm:convnext_xxlarge",
}
SIZES = {
    "cambrian-8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                    "num_attention_heads": 32, "num_key_value_heads": 8, "stride_of_vision_sampler_layers": 3},
    "cambrian-13b": {"vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                     "num_attention_heads": 40, "num_key_value_heads": 40, "stride_of_vision_sampler_layers": 4},
}  # fmt: skip


def real_size(name: str) -> dict[str, Any]:
    """Shapes and settings of a published model, without weights."""
    tables = json.loads((DATA / "fullscale_shapes.json").read_text(encoding="utf-8"))
    settings = {
        **SIZES[name], "model_type": "cambrian_llama", "mm_projector_type": "sva", "mm_vision_tower_aux_list": TOWERS,
        "mm_vision_tower_aux_token_len_list": [576, 576, 576, 9216], "image_token_len": 576, "query_num_list": [576],
        "vision_hidden_size": 1024, "connector_depth": 3, "num_of_vision_sampler_layers": 10,
        "start_of_vision_sampler_layers": 0, "mm_vision_select_layer": -2, "rope_theta": 500000.0,
    }  # fmt: skip
    shapes = {kind: tables[table] for kind, table in {LANGUAGE: name, **TABLES}.items()}
    return {
        kind: SimpleNamespace(
            shapes={key: tuple(shape) for key, shape in held.items()}, settings=settings if kind == LANGUAGE else {}
        )
        for kind, held in shapes.items()
    }


@pytest.mark.parametrize(("name", "billions"), [("cambrian-8b", 11.03), ("cambrian-13b", 16.05)])
def test_every_key_of_real_size_has_its_place_and_shape(name: str, billions: float) -> None:
    sources = real_size(name)
    config = make_config(sources)
    made = plan(config, {kind: source.shapes for kind, source in sources.items()})
    numbers = sum(
        torch.Size(recipe.shape(sources[recipe.source].shapes[recipe.key])).numel() for recipe in made.values()
    )
    assert round(numbers / 1e9, 2) == billions
    assert config.tower_grids == [24, 24, 24, 96]
    layers = SIZES[name]["num_hidden_layers"]
    assert config.sampler_layers == [*range(0, layers, SIZES[name]["stride_of_vision_sampler_layers"])][:10]
    siglip, clip, dinov2, convnext = config.vision_configs
    assert [part.image_size for part in config.vision_configs] == [384, 336, 378, 1024]
    assert (siglip.num_attention_heads, siglip.hidden_act, siglip.intermediate_size) == (16, "gelu", 4304)
    assert (clip.num_attention_heads, clip.hidden_act) == (16, "quick_gelu")
    assert (dinov2.num_attention_heads, dinov2.use_swiglu_ffn, dinov2.mlp_ratio) == (24, True, 4)
    assert (convnext.layer_norm_eps, list(convnext.depths)) == (1e-5, [3, 4, 30, 3])
    assert prompt_format(config) == {"cambrian-8b": "llama_3", "cambrian-13b": "vicuna_v1"}[name]


def test_all_that_does_not_fit_is_listed_at_once() -> None:
    sources = real_size("cambrian-8b")
    shapes = {kind: dict(source.shapes) for kind, source in sources.items()}
    del shapes["clip_vision_model"]["vision_model.encoder.layers.3.mlp.fc1.bias"]
    shapes[LANGUAGE]["model.vision_query"] = (2, 1024)
    shapes["convnext"]["stages.9.blocks.0.gamma"] = (7,)
    with pytest.raises(ConversionError) as caught:
        plan(make_config(sources), shapes)
    message = str(caught.value)
    assert message.startswith("3 keys do not fit")
    assert "missing: model.vision_towers.1.encoder.layers.3.mlp.fc1.bias" in message
    assert "shape of model.vision_query: (2, 1024) from model.vision_query of checkpoint, wanted (1, 1024)" in message
    assert "unexpected in convnext: stages.9.blocks.0.gamma" in message


def test_positions_follow_the_formula_of_the_release_the_model_was_trained_with() -> None:
    """Cubic convolution (Keys, 1981; a = −0.75) at (i + ½) · n / (m + 0.1) − ½ along each axis, edges repeated."""
    own, side = 7, 5
    table = torch.randn(1, 1 + own * own, 3, generator=torch.Generator().manual_seed(0))
    mixing = np.zeros((side, own))
    for row in range(side):
        at = (row + 0.5) * own / (side + 0.1) - 0.5
        for tap in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            x = abs(at - tap)
            near = 1.25 * x**3 - 2.25 * x**2 + 1
            far = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            mixing[row, min(max(tap, 0), own - 1)] += near if x <= 1 else far
    square = table[0, 1:].reshape(own, own, 3).double().numpy()
    expected = np.einsum("ir,jc,rcd->ijd", mixing, mixing, square).reshape(side * side, 3)
    found = interpolated_positions(table, side)
    assert found.shape == (1, side * side + 1, 3)
    assert torch.equal(found[:, 0], table[:, 0])
    assert np.abs(found[0, 1:].numpy() - expected).max() < 1e-5
    assert torch.equal(interpolated_positions(table, own), table)


def test_written_and_read_back_bit_for_bit(tmp_path: Path) -> None:
    folder = converted(STEM, tmp_path)
    sources = {kind: Checkpoint(tmp_path / kind, kind) for kind in (LANGUAGE, *TABLES)}
    assert verify(sources, folder, say=lambda _line: None) == len(load_file(folder / "model.safetensors"))
    # One weight by hand: keys of SigLIP's second block are the middle third of the joint projection.
    joint = load_file(tmp_path / "siglip_vision_model" / "model.safetensors")["blocks.1.attn.qkv.weight"]
    found = load_file(folder / "model.safetensors")["model.vision_towers.0.encoder.layers.1.self_attn.k_proj.weight"]
    assert torch.equal(found, joint[32:64])


def test_verify_finds_one_changed_number(tmp_path: Path) -> None:
    folder = converted(STEM, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.image_newline"][3] += 1e-6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sources = {kind: Checkpoint(tmp_path / kind, kind) for kind in (LANGUAGE, *TABLES)}
    with pytest.raises(ConversionError, match=r"model\.image_newline"):
        verify(sources, folder, say=lambda _line: None)


def test_shards_pickles_and_open_clip_names_give_the_same_model(tmp_path: Path) -> None:
    whole = load_file(converted(STEM, tmp_path / "one") / "model.safetensors")
    places = folders(STEM, tmp_path / "two")
    language = load_file(places[LANGUAGE] / "model.safetensors")
    (places[LANGUAGE] / "model.safetensors").unlink()
    names = sorted(language)
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        held = {name: language[name] for name in part}
        held |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)} if number else {}
        torch.save(held, places[LANGUAGE] / f"pytorch_model-{number + 1:05d}-of-00002.bin")
    torch.save({"step": torch.ones(1)}, places[LANGUAGE] / "training_args.bin")
    for kind in ("siglip_vision_model", "convnext"):
        tower = load_file(places[kind] / "model.safetensors")
        (places[kind] / "model.safetensors").unlink()
        named = {f"visual.trunk.{name}": value for name, value in tower.items()}
        named |= {"logit_scale": torch.ones(()), "text.token_embedding.weight": torch.ones(2, 2)}
        torch.save({"state_dict": named}, places[kind] / "open_clip_pytorch_model.bin")
    sources = {kind: Checkpoint(place, kind) for kind, place in places.items()}
    folder = convert(sources, tmp_path / "out", say=lambda _line: None, shard=300_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(set(index["weight_map"].values())) > 2
    model = CambrianForConditionalGeneration.from_pretrained(folder)
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())
    assert verify(sources, folder, say=lambda _line: None) == len(whole)


def test_the_command_writes_a_model_and_a_processor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = folders(STEM, tmp_path)
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    flags = ["--siglip", "--clip", "--dinov2", "--convnext"]
    given = ["--checkpoint", str(places[LANGUAGE]), "--out", str(tmp_path / "out"), "--verify"]
    given += [text for flag, kind in zip(flags, TABLES, strict=True) for text in (flag, str(places[kind]))]
    assert main([*given, "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    assert "verified 444 tensors" in capsys.readouterr().out
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(processor, CambrianProcessor)
    assert [tower["size"] for tower in processor.image_processor.towers] == [20, 16, 20, 64]
    model = CambrianForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.config.image_token_id == processor.image_token_id == IMAGE
    shutil.rmtree(places["dinov2"])
    save_file({"nothing": torch.ones(1)}, tmp_path / "other.safetensors")
    given[given.index(str(places["dinov2"]))] = str(tmp_path / "other.safetensors")
    assert main(given) == 1
    assert "has no embeddings.patch_embeddings.projection.weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("off", "said"), [(0, "as the published configuration has it"), (1, "differs from the published")]
)
def test_the_place_of_the_picture_is_compared_with_the_published_one(tmp_path: Path, off: int, said: str) -> None:
    folder = converted(STEM, tmp_path)
    tokenizer().save_pretrained(tmp_path / "tokens")
    before = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    before += "detailed, and polite answers to the user's questions. USER: "
    place = 1 + len(before)  # one token a byte, and the one that begins every prompt
    (tmp_path / "tokens" / "config.json").write_text(json.dumps({"image_position": place + off}), encoding="utf-8")
    notes = write_processor(folder, tokenizer=tmp_path / "tokens")
    assert any(said in note and str(place) in note for note in notes)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    places = folders(STEM, tmp_path)
    sources = {kind: Checkpoint(place, kind) for kind, place in places.items() if kind != "dinov2"}
    with pytest.raises(ConversionError, match="no checkpoint was given for: dinov2"):
        make_config(sources)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match=r"no \.safetensors, \.bin"):
        Checkpoint(tmp_path / "empty", "clip")
    with pytest.raises(ConversionError, match="of no kind that is known"):
        tower_kind("facebook/sam-vit-huge")


def test_a_key_is_read_once() -> None:
    """Recipes name every native tensor once, and pieces of a joint projection differ."""
    found = recipes("siglip_vision_model", {"blocks.0.attn.qkv.bias": (96,), "attn_pool.q.bias": (32,)}, tower=2)
    assert found["attn_pool.q.bias"] is None
    pieces = [recipe for recipe in found.values() if recipe is not None]
    whole = torch.arange(96.0)
    assert torch.equal(torch.cat([piece.make(whole) for piece in pieces]), whole)
