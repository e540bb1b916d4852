"""The converter: real-size tables, shards of either kind, separate encoder checkpoints, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lvlm_probe_mini_gemini import MiniGeminiConfig, MiniGeminiForConditionalGeneration, MiniGeminiProcessor
from lvlm_probe_mini_gemini.checkpoints import Checkpoint, tensors
from lvlm_probe_mini_gemini.convert import (
    ConversionError,
    convert,
    expected_shapes,
    main,
    native_config,
    plan,
    verify,
)
from lvlm_probe_mini_gemini.keys import clip_name, convnext_name, original_name
from mini_gemini_originals import CLIP, DATA, VARIANTS, checkpoint, original_config, outputs
from mini_gemini_tiny import inputs, picture, tokenizer
from safetensors.torch import load_file, save_file

import lvlm_probe as probe

SIZES = {  # hidden, inner, layers: Vicuna 7B and 13B
    "7b": (4096, 11008, 32),
    "13b": (5120, 13824, 40),
}


def real_size(size: str) -> dict[str, tuple[int, ...]]:
    """Key → shape of an MGM checkpoint at its real size."""
    hidden, inner, layers = SIZES[size]
    table = json.loads((DATA / "mgm_fullscale_shapes.json").read_text())
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (32000, hidden), "model.embed_tokens.weight": (32000, hidden), "model.norm.weight": (hidden,),
        "model.mm_projector.0.weight": (hidden, 1024), "model.mm_projector.0.bias": (hidden,),
        "model.mm_projector.2.weight": (hidden, hidden), "model.mm_projector.2.bias": (hidden,),
    }  # fmt: skip
    for number in range(layers):
        at = f"model.layers.{number}"
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{at}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    for name, width in (("query", 1024), ("aux", 2880), ("val", 2880)):
        at = f"model.vlm_uni_{name}_projector"
        shapes |= {f"{at}.0.weight": (width,), f"{at}.0.bias": (width,)}
        shapes |= {f"{at}.1.weight": (1024, width), f"{at}.1.bias": (1024,)}
    shapes |= {f"model.vision_tower.vision_tower.{key}": tuple(v) for key, v in table["hf4:clip-l-336"].items()}
    for key, shape in table["timm:convnext_large"].items():
        if not key.startswith("head."):
            shapes[f"model.vision_tower_aux.vision_{key}"] = tuple(shape)
    return shapes


def original_settings(size: str, **more: Any) -> dict[str, Any]:
    hidden, inner, layers = SIZES[size]
    return {
        "model_type": "mgm", "vocab_size": 32000, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 128, "num_key_value_heads": hidden // 128,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "mm_projector_type": "mlp2x_gelu", **more,
    }  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("large", [False, True])
def test_real_size_tables(size: str, large: bool) -> None:
    """No key missing, left over or of another shape; the encoders' sizes are read off their weights."""
    shapes = {original_name(key): shape for key, shape in real_size(size).items()}
    assert None not in shapes and len(shapes) == len(real_size(size))
    more = {"image_size_aux": 1536, "image_grid": 2, "image_global": True} if large else {}
    config = native_config(original_settings(size, **more), shapes)
    published = MiniGeminiConfig.hd() if large else MiniGeminiConfig()
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "image_size", "patch_size"):
        assert getattr(config.vision_config, name) == getattr(published.vision_config, name)
    assert config.vision_aux_config.depths == [3, 3, 27, 3]
    assert config.vision_aux_config.hidden_sizes == [192, 384, 768, 1536]
    assert config.image_tokens() == published.image_tokens() and config.image_size_aux == published.image_size_aux
    expected = expected_shapes(config)
    plan(shapes, expected)
    assert len(expected) == len(shapes)
    wrong = dict(shapes)
    wrong["model.patch_mining.key.1.weight"] = (1024, 2879)
    del wrong["model.multi_modal_projector.linear_2.bias"]
    with pytest.raises(ConversionError, match=r"1 missing: model\.multi_modal_projector\.linear_2\.bias; 1 mis-shaped"):
        plan(wrong, expected)


def test_every_key_pattern_has_a_name() -> None:
    patterns = (DATA / "mgm_keys.txt").read_text().split()
    assert len(patterns) > 50
    names = {original_name(re.sub(r"\bN\b", "0", pattern)) for pattern in patterns}
    assert None not in names and len(names) == len(patterns)


def test_separate_encoder_checkpoints_have_names() -> None:
    """All of timm's ConvNeXt but its head, all of CLIP's picture half; the text halves are not asked for."""
    table = json.loads((DATA / "mgm_fullscale_shapes.json").read_text())
    timm = [convnext_name(key) for key in table["timm:convnext_large"] if not key.startswith("head.")]
    clip = [convnext_name(f"visual.trunk.{key}") for key in table["timm:convnext_large"]]
    assert None not in timm and set(timm) == set(clip) - {None}
    assert convnext_name("visual.head.proj.weight") is None and convnext_name("transformer.resblocks.0.x") is None
    with pytest.raises(KeyError):
        convnext_name("visual.trunk.stages.0.blocks.0.new.weight")
    assert None not in {clip_name(key) for key in table["hf4:clip-l-336"]}
    assert clip_name("text_model.final_layer_norm.bias") is None and clip_name("logit_scale") is None
    with pytest.raises(KeyError):
        clip_name("vision.new")


def _answers(out: Path, name: str) -> None:
    """The converted model gives the original's logits."""
    model = MiniGeminiForConditionalGeneration.from_pretrained(out, attn_implementation="eager").eval()
    io = outputs(name)
    row = io["input_ids"][0].tolist()
    slot = row.index(-200)
    ids = row[:slot] + [model.config.image_token_id] * model.config.image_tokens() + row[slot + 1 :]
    with torch.no_grad():
        logits = model(torch.tensor([ids]), pixel_values=io["images_aux"]).logits
    assert float((logits - io["logits"]).abs().max()) <= 3e-5


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_sharded_checkpoint_to_sharded_model(name: str, kind: str, tmp_path: Path) -> None:
    source = tmp_path / "original"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(original_config(name)))
    state = load_file(DATA / f"{name}.safetensors")
    keys = sorted(state)
    weight_map = {}
    for number, part in enumerate((keys[::3], keys[1::3], keys[2::3])):
        file = f"part-{number}.{kind}"
        weight_map |= dict.fromkeys(part, file)
        chosen = {key: state[key] for key in part}
        if kind == "bin":
            torch.save(chosen, source / file)
        else:
            save_file(chosen, source / file)
    index = "pytorch_model.bin.index.json" if kind == "bin" else "model.safetensors.index.json"
    (source / index).write_text(json.dumps({"weight_map": weight_map}))
    out = tmp_path / "native"
    found = convert(source, out, vision_config=CLIP, shard_bytes=100_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    assert verify(out, found) == len(state)
    _answers(out, name)


def test_encoders_from_their_own_checkpoints(tmp_path: Path) -> None:
    """A checkpoint without encoder weights, a CLIP with its text half, and an open_clip file."""
    state = load_file(DATA / "mgm_hd.safetensors")
    low, high = "model.vision_tower.vision_tower.", "model.vision_tower_aux.vision_"
    folders = {name: tmp_path / name for name in ("original", "clip", "convnext")}
    for folder in folders.values():
        folder.mkdir()
    rest = {key: value for key, value in state.items() if not key.startswith((low, high))}
    rest["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(rest, folders["original"] / "pytorch_model.bin")
    (folders["original"] / "config.json").write_text(json.dumps(original_config("mgm_hd")))
    clip = {key.removeprefix(low): value for key, value in state.items() if key.startswith(low)}
    clip["text_model.final_layer_norm.bias"], clip["logit_scale"] = torch.ones(3), torch.ones(())
    clip["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(clip, folders["clip"] / "model.safetensors")
    (folders["clip"] / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": CLIP}))
    trunk = {f"visual.trunk.{key.removeprefix(high)}": value for key, value in state.items() if key.startswith(high)}
    trunk |= {"visual.trunk.head.norm.weight": torch.ones(32), "token_embedding.weight": torch.ones(2, 2)}
    torch.save({"state_dict": trunk}, folders["convnext"] / "open_clip_pytorch_model.bin")
    arguments = [part for name, flag in (("original", "checkpoint"), ("clip", "clip"), ("convnext", "convnext"))
                 for part in (f"--{flag}", str(folders[name]))]  # fmt: skip
    assert main([*arguments, "--out", str(tmp_path / "native"), "--verify"]) == 0
    _answers(tmp_path / "native", "mgm_hd")
    with pytest.raises(ConversionError, match="no weights of the high-resolution encoder; give --convnext DIR"):
        convert(folders["original"], tmp_path / "other", clip=folders["clip"])
    with pytest.raises(ConversionError, match="give --clip DIR"):
        convert(folders["original"], tmp_path / "other", convnext=folders["convnext"])
    assert not (tmp_path / "other").exists()


def test_missing_unexpected_and_misshaped_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint("mgm_plain", tmp_path / "original")
    state = load_file(source / "model.safetensors")

    def again(change: dict[str, Any]) -> str:
        save_file({k: v for k, v in {**state, **change}.items() if v is not None}, source / "model.safetensors")
        with pytest.raises(ConversionError) as caught:
            convert(source, tmp_path / "native", vision_config=CLIP)
        return str(caught.value)

    assert again({"model.norm.weight": None}) == "1 missing: model.language_model.norm.weight"
    assert again({"model.new.weight": torch.ones(2)}) == "1 unexpected: model.new.weight (model.safetensors)"
    gone = {"model.vision_tower_aux.vision_stages.1.blocks.0.conv_dw.bias": None}
    assert again(gone) == "1 missing: model.vision_tower_aux.stages.1.layers.0.dwconv.bias"
    extra = {"model.layers.3.input_layernorm.weight": torch.ones(32)}
    assert again(extra) == "1 unexpected: model.language_model.layers.3.input_layernorm.weight"
    assert "1 mis-shaped: lm_head.weight is (63, 32), the model has (64, 32)" in again(
        {"lm_head.weight": torch.ones(63, 32)}
    )
    assert not (tmp_path / "native").exists()
    assert main(["--checkpoint", str(source), "--out", str(tmp_path / "native")]) == 1
    assert "error: " in capsys.readouterr().err


def test_verify_finds_a_changed_weight(tmp_path: Path) -> None:
    out = tmp_path / "native"
    found = convert(checkpoint("mgm_plain", tmp_path / "original"), out, vision_config=CLIP)
    (file,) = out.glob("*.safetensors")
    state = load_file(file)
    state["model.patch_mining.key.1.bias"][3] += 1e-6
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"1 weights not as their source: differs: model\.patch_mining\.key"):
        verify(out, found)


def test_dtype_of_the_written_weights(tmp_path: Path) -> None:
    out = tmp_path / "native"
    found = convert(checkpoint("mgm_plain", tmp_path / "original"), out, vision_config=CLIP, dtype=torch.bfloat16)
    assert {entry.dtype for entry in Checkpoint(out).entries.values()} == {torch.bfloat16}
    assert verify(out, found) == len(found)
    model = MiniGeminiForConditionalGeneration.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "mgm_gemma", "only 'mgm', the Llama variant"),
        ("mm_projector_type", "linear", "covers 'mlp2x_gelu' only"),
        ("mm_use_im_start_end", True, "mm_use_im_start_end is True"),
    ],
)
def test_variants_that_are_not_covered_are_refused(field: str, value: Any, message: str, tmp_path: Path) -> None:
    source = checkpoint("mgm_plain", tmp_path / "original")
    (source / "config.json").write_text(json.dumps({**original_config("mgm_plain"), field: value}))
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "native", vision_config=CLIP)


def test_incomplete_and_occupied_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="no weights in"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ConversionError, match=r"is incomplete: .* names gone\.safetensors"):
        Checkpoint(tmp_path)
    source = checkpoint("mgm_plain", tmp_path / "original")
    with pytest.raises(ConversionError, match="holds a model already"):
        convert(source, source, vision_config=CLIP)


def test_tensors_come_file_by_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "model.safetensors")
    read = Checkpoint(tmp_path)
    assert {entry.key: value.tolist() for entry, value in tensors(list(read.entries.values()))} == {
        "a": [1, 1], "b": [0, 0, 0],
    }  # fmt: skip
    assert (read.entries["b"].shape, read.entries["b"].dtype) == ((3,), torch.float32)


def test_converted_directory_opens_with_its_processor(tmp_path: Path) -> None:
    """Tokenizer and all: what is written is a model that the library opens and prompts."""
    source = checkpoint("mgm_hd", tmp_path / "original")
    letters = tokenizer(259)
    state = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for key in ("lm_head.weight", "model.embed_tokens.weight"):
        state[key] = torch.randn(259, 32, generator=generator)
    save_file(state, source / "model.safetensors")
    settings = {**original_config("mgm_hd"), "vocab_size": 259, "max_position_embeddings": 1024}
    (source / "config.json").write_text(json.dumps(settings))
    letters.save_pretrained(source)
    out = tmp_path / "native"
    found = convert(source, out, vision_config=CLIP)
    assert verify(out, found) == len(found)
    model, processor = probe.load(out)
    assert isinstance(processor, MiniGeminiProcessor)
    assert model.config.image_token_id == processor.image_token_id == 259
    given = inputs(processor, picture())
    assert int((given["input_ids"] == 259).sum()) == model.config.image_tokens() == processor.image_tokens() == 80
    assert model.generate(**given, max_new_tokens=3, do_sample=False).shape[1] == given["input_ids"].shape[1] + 3
