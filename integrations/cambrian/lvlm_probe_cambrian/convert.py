"""Converts a published Cambrian checkpoint and its four towers to the native model::

    python -m lvlm_probe_cambrian.convert --checkpoint cambrian-8b --siglip SIGLIP --clip CLIP --dinov2 DINOV2 \\
        --convnext CONVNEXT --out cambrian-8b-native --verify

Published checkpoints hold decoder and aggregator alone; towers come from where their authors put them. Weights are
streamed: no more than one output file is in memory. Nothing is written unless every tensor has its place and shape.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lvlm_probe_cambrian.configuration import CambrianConfig
from lvlm_probe_cambrian.keys import LANGUAGE, Recipe, Shape, recipes
from lvlm_probe_cambrian.modeling import CambrianForConditionalGeneration
from lvlm_probe_cambrian.original_config import make_config
from lvlm_probe_cambrian.sources import Checkpoint, ConversionError
from lvlm_probe_cambrian.towers import image_size

__all__ = ["convert", "main", "plan", "verify"]

_SHARD = 4 * 2**30
"""Bytes of one output file."""

Say = Callable[[str], None]


def plan(config: CambrianConfig, shapes: Mapping[str, Mapping[str, Shape]]) -> dict[str, Recipe]:
    """How every tensor of the native model is made.

    Args:
        config: of the native model.
        shapes: by source (``LANGUAGE`` and the kinds of the towers), name to shape of its tensors.

    Raises:
        ConversionError: the list of all keys that are missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        model = CambrianForConditionalGeneration(config)
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    made: dict[str, Recipe] = {}
    faults: list[str] = []
    kinds = [LANGUAGE, *(part.model_type for part in config.vision_configs)]
    for number, kind in enumerate(kinds):
        side = 0
        if kind == "dinov2":
            tower = config.vision_configs[number - 1]
            side = image_size(tower) // tower.patch_size
        layers = config.sampler_layers or []
        for name, recipe in recipes(kind, shapes[kind], tower=number - 1, side=side, layers=layers).items():
            if recipe is None:
                continue
            if name not in wanted:
                faults.append(f"unexpected in {kind}: {recipe.key}")
            elif (shape := recipe.shape(tuple(shapes[kind][recipe.key]))) != wanted[name]:
                faults.append(f"shape of {name}: {shape} from {recipe.key} of {kind}, wanted {wanted[name]}")
            made[name] = recipe
    faults += [f"missing: {name}" for name in wanted if name not in made]
    if faults:
        raise ConversionError(f"{len(faults)} keys do not fit:\n  " + "\n  ".join(faults))
    return {name: made[name] for name in wanted}


def convert(sources: Mapping[str, Checkpoint], out: str | Path, *, say: Say = print, shard: int = _SHARD) -> Path:
    """Writes the native model of some checkpoints to the folder ``out``.

    Args:
        sources: by source, see ``plan``.
        shard: bytes of one output file.

    Raises:
        ConversionError: something does not fit; nothing has been written then.
    """
    config = make_config(sources)
    made = plan(config, {name: source.shapes for name, source in sources.items()})
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(made, sources, shard))
    index: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: made[name].make(sources[made[name].source].tensor(made[name].key)) for name in names}
        # safetensors refuses tensors that share memory, which pieces of a mapped file do.
        tensors = {name: value.clone() for name, value in tensors.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(names, file))
        total += sum(value.numel() * value.element_size() for value in tensors.values())
        say(f"wrote {file}: {len(names)} tensors")
    if len(shards) > 1:
        listed = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(listed, indent=2), encoding="utf-8")
    config.architectures = ["CambrianForConditionalGeneration"]
    config.dtype = sources[LANGUAGE].tensor("lm_head.weight").dtype
    config.save_pretrained(folder)
    return folder


def verify(sources: Mapping[str, Checkpoint], out: str | Path, *, say: Say = print) -> int:
    """Compares every tensor of a written model with its source, bit for bit, and opens the model.

    Returns:
        Number of tensors compared.

    Raises:
        ConversionError: one differs, or transformers does not find every weight in the folder.
    """
    folder = Path(out)
    config = CambrianConfig.from_pretrained(folder)
    made = plan(config, {name: source.shapes for name, source in sources.items()})
    different = []
    held: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                held.add(name)
                recipe = made.get(name)
                source = None if recipe is None else recipe.make(sources[recipe.source].tensor(recipe.key))
                if source is None or not torch.equal(opened.get_tensor(name), source):
                    different.append(name)
    different += sorted(set(made) - held)
    _, loading = CambrianForConditionalGeneration.from_pretrained(folder, output_loading_info=True, dtype="auto")
    problems = {key: sorted(map(str, value)) for key, value in loading.items() if value and key.endswith("_keys")}
    if different or problems:
        raise ConversionError(f"the written model differs from its sources: {different or ''} {problems or ''}")
    say(f"verified {len(made)} tensors")
    return len(made)


def _shards(made: Mapping[str, Recipe], sources: Mapping[str, Checkpoint], limit: int) -> Iterator[list[str]]:
    """Names of the tensors of each output file, in the order of the model."""
    names: list[str] = []
    size = 0
    for name, recipe in made.items():
        # Four bytes a number at most, so that no weight need be read to divide them.
        own = 4 * int(torch.Size(recipe.shape(sources[recipe.source].shapes[recipe.key])).numel())
        if names and size + own > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += own
    if names:
        yield names


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 when everything fits."""
    parser = argparse.ArgumentParser(prog="python -m lvlm_probe_cambrian.convert", description=__doc__.split("::")[0])
    parser.add_argument("--checkpoint", required=True, help="folder of the published model, with its config.json")
    parser.add_argument("--siglip", help="SigLIP checkpoint as timm or open_clip name it")
    parser.add_argument("--clip", help="CLIP checkpoint as transformers names it")
    parser.add_argument("--dinov2", help="DINOv2 checkpoint as transformers 4 named it")
    parser.add_argument("--convnext", help="ConvNeXt checkpoint as timm or open_clip name it")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--tokenizer", help="folder of the tokenizer, by default that of the checkpoint")
    parser.add_argument("--prompt", choices=("llama_3", "vicuna_v1", "phi3"), help="prompt format of the processor")
    parser.add_argument("--verify", action="store_true", help="read the result back and compare every tensor")
    given = parser.parse_args(arguments)
    places: dict[str, Any] = {
        "siglip_vision_model": given.siglip,
        "clip_vision_model": given.clip,
        "dinov2": given.dinov2,
        "convnext": given.convnext,
    }
    try:
        sources = {LANGUAGE: Checkpoint(given.checkpoint, LANGUAGE)}
        sources |= {kind: Checkpoint(place, kind) for kind, place in places.items() if place}
        convert(sources, given.out, say=_print)
        if given.verify:
            verify(sources, given.out, say=_print)
    except ConversionError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    from lvlm_probe_cambrian.original_processor import write_processor

    for note in write_processor(given.out, tokenizer=given.tokenizer or given.checkpoint, prompt=given.prompt):
        _print(note)
    return 0


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    raise SystemExit(main())
