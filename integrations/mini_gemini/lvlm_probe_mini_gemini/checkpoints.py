"""Reading checkpoints tensor by tensor, whether they are safetensors or pickled shards, one file or many."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

__all__ = ["Checkpoint", "ConversionError", "Entry", "tensors"]

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = (
    "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
)  # fmt: skip


class ConversionError(ValueError):
    """The checkpoints cannot be made one model; the message lists what is wrong."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint, not read yet."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint:
    """The tensors of a checkpoint directory (or of one file), read one file at a time.

    Args:
        source: a directory with an index or one weights file, or a ``.safetensors`` or ``.bin`` file.

    Attributes:
        entries: key → where it is.

    Raises:
        ConversionError: there are no weights, or a file that the index names is missing.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = Path(source)
        self.entries: dict[str, Entry] = {}
        for file in self._files():
            for key, shape, dtype in _described(file):
                self.entries[key] = Entry(file, key, shape, dtype)

    def _files(self) -> list[Path]:
        if self.source.is_file():
            return [self.source]
        for name in _INDEXES:
            if (self.source / name).is_file():
                index = json.loads((self.source / name).read_text(encoding="utf-8"))
                files = [self.source / part for part in sorted(set(index["weight_map"].values()))]
                absent = [file.name for file in files if not file.is_file()]
                if absent:
                    raise ConversionError(f"{self.source} is incomplete: {name} names {', '.join(absent)}")
                return files
        found = [self.source / name for name in _SINGLE if (self.source / name).is_file()]
        if not found:
            raise ConversionError(
                f"no weights in {self.source}: looked for {', '.join((*_INDEXES, *_SINGLE))}; name the file itself if "
                f"it is called otherwise"
            )
        return found[:1]

    def config(self) -> dict[str, Any]:
        """Its ``config.json``; empty where there is none."""
        place = (self.source if self.source.is_dir() else self.source.parent) / "config.json"
        read: dict[str, Any] = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
        return read


def tensors(entries: list[Entry]) -> Iterator[tuple[Entry, torch.Tensor]]:
    """The tensors themselves, file by file; one file is open at a time."""
    by_file: dict[Path, list[Entry]] = {}
    for entry in entries:
        by_file.setdefault(entry.file, []).append(entry)
    for file, wanted in by_file.items():
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                for entry in wanted:
                    yield entry, opened.get_tensor(entry.key)
        else:
            loaded = _unpickled(file)
            for entry in wanted:
                yield entry, loaded[entry.key]


def _described(file: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a mapping)
                part = opened.get_slice(key)
                yield key, tuple(part.get_shape()), _DTYPES[part.get_dtype()]
    else:
        for key, tensor in _unpickled(file).items():
            yield key, tuple(tensor.shape), tensor.dtype


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    """A pickled state dict, mapped and not read; nothing but tensors is unpickled."""
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # an archive of before torch 1.6 cannot be mapped
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    loaded = loaded.get("state_dict", loaded)
    return {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
