"""Original Mini-Gemini checkpoints to the native model::

    python -m lvlm_probe_mini_gemini.convert --checkpoint MGM-7B --clip clip-vit-large-patch14-336 \\
        --convnext CLIP-convnext_large_d_320 --out mgm-7b-native --verify

Tensors are read, renamed and written one by one; no model is built. Weights of the encoders are taken from the
checkpoint where it has them, else from ``--clip`` and ``--convnext``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lvlm_probe_mini_gemini.checkpoints import Checkpoint, ConversionError, Entry, tensors
from lvlm_probe_mini_gemini.configuration import MiniGeminiConfig
from lvlm_probe_mini_gemini.keys import NameMap, clip_name, convnext_name, original_name

__all__ = ["ConversionError", "convert", "expected_shapes", "native_config", "plan", "verify"]

_SHARD = 4_000_000_000  # bytes
_TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling",
    "attention_bias", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range",
)  # fmt: skip
_TOWERS = {"clip": "model.vision_tower.", "convnext": "model.vision_tower_aux."}
_MOST = 20  # names a message lists


def native_config(original: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], **overrides: Any) -> Any:
    """The native configuration of an original one.

    Args:
        original: its ``config.json``.
        shapes: native name → shape, of all weights that were found; the encoders' sizes are read off them.
        overrides: fields of ``MiniGeminiConfig`` that are known better, ``vision_config`` for instance.

    Raises:
        ConversionError: a variant that the native model does not cover.
    """
    kind = original.get("model_type")
    if kind != "mgm":
        raise ConversionError(f"model_type is {kind!r}; only 'mgm', the Llama variant, has a native model")
    for field, wanted in (
        ("mm_projector_type", "mlp2x_gelu"),
        ("mm_vision_select_feature", "patch"),
        ("mm_use_im_start_end", False),
        ("image_aspect_ratio", "pad"),
    ):
        if original.get(field, wanted) != wanted:
            raise ConversionError(f"{field} is {original[field]!r}; the native model covers {wanted!r} only")
    text = {name: original[name] for name in _TEXT_FIELDS if original.get(name) is not None}
    fields: dict[str, Any] = {
        "text_config": {"model_type": "llama", "tie_word_embeddings": False, **text},
        "vision_config": _clip_config(shapes) if "vision_config" not in overrides else None,
        "vision_aux_config": _convnext_config(shapes),
        "image_size_aux": original.get("image_size_aux", 768),
        "image_grid": original.get("image_grid", 1),
        "image_global": original.get("image_global", False),
        "vision_feature_layer": original.get("mm_vision_select_layer", -2),
        "image_token_id": original["vocab_size"],
    }
    return MiniGeminiConfig(**{**fields, **overrides})


def _clip_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """CLIP's sizes by its weights' shapes. Heads leave no trace in them; every CLIP by OpenAI has heads of 64."""
    at = "model.vision_tower."
    try:
        hidden, _, patch, _ = shapes[f"{at}embeddings.patch_embedding.weight"]
        positions = shapes[f"{at}embeddings.position_embedding.weight"][0]
        inner = shapes[f"{at}encoder.layers.0.mlp.fc1.weight"][0]
    except KeyError as error:
        raise ConversionError(f"no weights of the low-resolution encoder ({error}); give --clip DIR") from None
    if hidden % 64:
        raise ConversionError(f"a CLIP of width {hidden} has no heads of 64; give --clip DIR with its config.json")
    return {
        "model_type": "clip_vision_model",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": _count(shapes, rf"{re.escape(at)}encoder\.layers\.(\d+)\."),
        "num_attention_heads": hidden // 64,
        "patch_size": patch,
        "image_size": round((positions - 1) ** 0.5) * patch,
    }


def _convnext_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    at = "model.vision_tower_aux."
    count = _count(shapes, rf"{re.escape(at)}stages\.(\d+)\.")
    if not count:
        raise ConversionError("no weights of the high-resolution encoder; give --convnext DIR")
    stages = [f"{at}stages.{index}" for index in range(count)]
    needed = [f"{at}embeddings.patch_embeddings.weight", *(f"{stage}.layers.0.dwconv.bias" for stage in stages)]
    if absent := [name for name in needed if name not in shapes]:
        raise ConversionError(_listed("missing", absent))
    return {
        "model_type": "convnext",
        "hidden_sizes": [shapes[f"{stage}.layers.0.dwconv.bias"][0] for stage in stages],
        "depths": [_count(shapes, rf"{re.escape(stage)}\.layers\.(\d+)\.") for stage in stages],
        "num_stages": count,
        "patch_size": shapes[f"{at}embeddings.patch_embeddings.weight"][-1],
    }


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    return 1 + max((int(found[1]) for name in shapes if (found := re.match(pattern, name))), default=-1)


def collect(checkpoint: Checkpoint, clip: Checkpoint | None, convnext: Checkpoint | None) -> dict[str, Entry]:
    """Native name → tensor, the checkpoint's own encoder weights first.

    Raises:
        ConversionError: lists keys that nobody knows.
    """
    found, unexpected = _renamed(checkpoint, original_name)
    for kind, source, rename in (("clip", clip, clip_name), ("convnext", convnext, convnext_name)):
        if source is None or any(name.startswith(_TOWERS[kind]) for name in found):
            continue
        more, unknown = _renamed(source, rename)
        found |= more
        unexpected += unknown
    if unexpected:
        raise ConversionError(_listed("unexpected", unexpected))
    return found


def _renamed(source: Checkpoint, rename: NameMap) -> tuple[dict[str, Entry], list[str]]:
    found: dict[str, Entry] = {}
    unknown: list[str] = []
    for key, entry in source.entries.items():
        try:
            name = rename(key)
        except KeyError:
            unknown.append(f"{key} ({entry.file.name})")
            continue
        if name is None:
            continue
        if name in found:
            unknown.append(f"{key} ({entry.file.name}, the same weight as {found[name].key})")
        else:
            found[name] = entry
    return found, unknown


def expected_shapes(config: MiniGeminiConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every weight of the native model. Takes no memory: it is built on the meta device."""
    from lvlm_probe_mini_gemini.modeling import MiniGeminiForConditionalGeneration

    with torch.device("meta"):
        model = MiniGeminiForConditionalGeneration(config)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def plan(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare what was found with what the model has.

    Raises:
        ConversionError: lists missing, unexpected and mis-shaped weights.
    """
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    shaped = [
        f"{name} is {found[name]}, the model has {expected[name]}"
        for name in sorted(set(found) & set(expected))
        if tuple(found[name]) != tuple(expected[name])
    ]
    parts = [
        _listed(what, names)
        for what, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", shaped))
        if names
    ]
    if parts:
        raise ConversionError("; ".join(parts))


def _listed(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return f"{len(names)} {what}: {', '.join(names[:_MOST])}{more}"


def convert(
    checkpoint: str | Path,
    out: str | Path,
    *,
    clip: str | Path | None = None,
    convnext: str | Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = _SHARD,
    **overrides: Any,
) -> dict[str, Entry]:
    """Write the native model: weights, configuration, and the processor where the checkpoint has a tokenizer.

    Args:
        checkpoint: the original model's directory.
        out: where to; made if it is not there, must hold no model yet.
        clip, convnext: checkpoints of the encoders, for what the original does not hold.
        dtype: of the written weights; by default that of each tensor.
        shard_bytes: size of one file.
        overrides: fields of the configuration.

    Returns:
        Native name → the tensor that it was written from.

    Raises:
        ConversionError: see ``native_config``, ``collect`` and ``plan``.
    """
    target = Path(out)
    if (target / "config.json").exists():
        raise ConversionError(f"{target} holds a model already; give another --out")
    source = Checkpoint(checkpoint)
    encoder = Checkpoint(clip) if clip is not None else None
    found = collect(source, encoder, Checkpoint(convnext) if convnext is not None else None)
    shapes = {name: entry.shape for name, entry in found.items()}
    if encoder is not None and "vision_config" not in overrides and (settings := encoder.config()):
        overrides["vision_config"] = {**settings.get("vision_config", settings), "model_type": "clip_vision_model"}
    config = native_config(source.config(), shapes, **overrides)
    plan(shapes, expected_shapes(config))
    target.mkdir(parents=True, exist_ok=True)
    _write_processor(source.source, target, config)
    _write_weights(found, target, dtype, shard_bytes)
    config.dtype = dtype or found["lm_head.weight"].dtype
    config.architectures = ["MiniGeminiForConditionalGeneration"]
    config.save_pretrained(target)
    _write_generation(source.source, target, config)
    return found


def _write_weights(found: Mapping[str, Entry], target: Path, dtype: torch.dtype | None, limit: int) -> None:
    """Shards in the order of the source's files, so that each is read once."""
    names = {(entry.file, entry.key): name for name, entry in found.items()}
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in sorted(found.values(), key=lambda entry: (str(entry.file), entry.key)):
        own = torch.Size(entry.shape).numel() * (dtype or entry.dtype).itemsize
        if shards[-1] and size + own > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += own
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        state = {
            names[entry.file, entry.key]: (value if dtype is None else value.to(dtype)).contiguous().clone()
            for entry, value in tensors(shard)
        }
        save_file(state, target / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(state, file)
        total += sum(value.nbytes for value in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _write_processor(source: Path, target: Path, config: MiniGeminiConfig) -> None:
    """The processor, and the placeholder's id, which the tokenizer decides."""
    folder = source if source.is_dir() else source.parent
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        print(f"note: {folder} has no tokenizer, so no processor is written", file=sys.stderr)  # noqa: T201
        return
    from transformers import AutoTokenizer

    from lvlm_probe_mini_gemini.processing import MiniGeminiImageProcessor, MiniGeminiProcessor

    # By the text model's configuration: the checkpoint's own model_type is not one that transformers knows.
    tokenizer = AutoTokenizer.from_pretrained(folder, config=config.text_config, padding_side="left")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    side = config.image_size_aux
    images = MiniGeminiImageProcessor(
        size={"height": side, "width": side}, image_size_low=config.vision_config.image_size
    )
    processor = MiniGeminiProcessor(
        images,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        image_grid=config.image_grid,
        image_global=config.image_global,
    )
    config.image_token_id = processor.image_token_id
    processor.save_pretrained(target)


def _write_generation(source: Path, target: Path, config: MiniGeminiConfig) -> None:
    from transformers import GenerationConfig

    own = (source if source.is_dir() else source.parent) / "generation_config.json"
    settings = json.loads(own.read_text(encoding="utf-8")) if own.is_file() else {}
    kept = {name: settings[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in settings}
    known = {name: getattr(config.text_config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**{**known, **kept}).save_pretrained(target)


def verify(out: str | Path, found: Mapping[str, Entry]) -> int:
    """Load the written model and compare every weight with what it was made of.

    Returns:
        How many were compared.

    Raises:
        ConversionError: lists those that differ.
    """
    from lvlm_probe_mini_gemini.modeling import MiniGeminiForConditionalGeneration

    model, report = MiniGeminiForConditionalGeneration.from_pretrained(out, dtype="auto", output_loading_info=True)
    wrong = [f"{what}: {name}" for what in ("missing_keys", "unexpected_keys") for name in report[what]]
    state = model.state_dict()
    names = {(entry.file, entry.key): name for name, entry in found.items()}
    for entry, value in tensors(list(found.values())):
        name = names[entry.file, entry.key]
        if name in state and not torch.equal(state[name], value.to(state[name].dtype)):
            wrong.append(f"differs: {name}")
    if wrong:
        raise ConversionError(_listed("weights not as their source", wrong))
    return len(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lvlm_probe_mini_gemini.convert", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="the original model")
    parser.add_argument("--clip", metavar="DIR", help="CLIP ViT-L/14-336 in transformers' names")
    parser.add_argument("--convnext", metavar="DIR", help="open_clip's ConvNeXt-L checkpoint, or its file")
    parser.add_argument("--out", required=True, metavar="DIR", help="where to write the native model")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the written weights")
    parser.add_argument("--verify", action="store_true", help="load what was written and compare every tensor")
    given = parser.parse_args(arguments)
    try:
        found = convert(
            given.checkpoint,
            given.out,
            clip=given.clip,
            convnext=given.convnext,
            dtype=getattr(torch, given.dtype) if given.dtype else None,
        )
        print(f"{len(found)} tensors written to {given.out}")  # noqa: T201
        if given.verify:
            print(f"{verify(given.out, found)} tensors compared: all as their source")  # noqa: T201
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
