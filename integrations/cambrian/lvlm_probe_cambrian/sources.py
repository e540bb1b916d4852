"""Checkpoint folders, read tensor by tensor: safetensors, PyTorch's own format, sharded or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lvlm_probe_cambrian.keys import Shape

__all__ = ["Checkpoint", "ConversionError"]


class ConversionError(Exception):
    """A checkpoint cannot be converted; the message lists what is missing, unexpected or of another shape."""


class Checkpoint:
    """The tensors of one folder or file.

    Args:
        place: a ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file, or a folder with some; one kind is read, the
            first of this list that is there.
        name: what messages call it.

    Attributes:
        shapes: name to shape of every tensor.
        settings: what the folder's ``config.json`` holds; empty where there is none.
    """

    def __init__(self, place: str | Path, name: str) -> None:
        self.place, self.name = Path(place), name
        self._files: dict[str, Path] = {}
        self._loaded: tuple[Path, dict[str, Tensor]] | None = None
        self.shapes: dict[str, Shape] = {}
        for file in self._found():
            for key, shape in self._shapes(file):
                if key in self._files:
                    raise ConversionError(f"{name}: {key} is in two files, {self._files[key].name} and {file.name}")
                self._files[key], self.shapes[key] = file, shape
        config = self.place / "config.json" if self.place.is_dir() else self.place.parent / "config.json"
        self.settings: dict[str, Any] = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}

    def tensor(self, key: str) -> Tensor:
        """One tensor, in the checkpoint's own precision."""
        file = self._files[key]
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(key)
                return tensor
        return self._unpickled(file)[key]

    def _found(self) -> list[Path]:
        if self.place.is_file():
            return [self.place]
        for ending in (".safetensors", ".bin", ".pt", ".pth"):
            files = sorted(self.place.glob(f"*{ending}"))
            # Some folders hold the same weights twice, split into shards and whole.
            sharded = [file for file in files if "-of-" in file.name]
            files = sharded or [file for file in files if file.name not in ("training_args.bin", "scheduler.pt")]
            if files:
                return files
        raise ConversionError(f"{self.name}: no .safetensors, .bin, .pt or .pth file in {self.place}")

    def _shapes(self, file: Path) -> list[tuple[str, Shape]]:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return [(key, tuple(opened.get_slice(key).get_shape())) for key in opened.keys()]  # noqa: SIM118
        return [(key, tuple(value.shape)) for key, value in self._unpickled(file).items()]

    def _unpickled(self, file: Path) -> dict[str, Tensor]:
        """The last file that was opened stays mapped: tensors of a shard are read one after the other."""
        if self._loaded is None or self._loaded[0] != file:
            try:
                held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # written before torch 1.6, which cannot be mapped
                held = torch.load(file, map_location="cpu", weights_only=True)
            held = held.get("state_dict", held) if isinstance(held, dict) else held
            tensors = {key: value for key, value in held.items() if isinstance(value, Tensor)}
            self._loaded = (file, tensors)
        return self._loaded[1]
