"""Random weights for a while: a model's weights in blocks, and a context that randomises some and puts them back.

``how="normal"`` re-initialises: every tensor is drawn anew from a normal distribution of its own mean and standard
deviation, so that activations keep their scale and no architecture's own initialiser has to be known.
``how="permute"`` shuffles the entries of every tensor, which keeps their distribution exactly, outliers included, at
the price of an index as large as the tensor. Either way tensors of equal entries (untrained norms, zero biases) stay
what they are. Buffers are left alone.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch

from lvlm_probe.errors import ExplainError
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.models.anatomy import examine, find_modules, lm_head

How = Literal["normal", "permute"]
Weights = dict[str, torch.nn.Parameter]
"""Path → parameter."""


@naming_arguments
def weight_blocks(model: torch.nn.Module, blocks: Sequence[str] | None = None) -> dict[str, Weights]:
    """The model's weights in blocks, from the output to the input: block → (path → parameter).

    A block is one layer of a stack (``….layers.2``), or a module with weights of its own outside one. The order is that
    of the model's parts (output layer, decoder, mergers, encoders), within a part against the order in which its
    modules are registered. A weight that two modules share belongs to the one nearer to the output.

    Raises:
        PointNotFound: A pattern of ``blocks`` matches no module.
        ExplainError: There are no patterns.
    """
    if blocks is not None and not blocks:
        raise ExplainError("blocks is empty: name modules by patterns, or leave it out for all of the model")
    if blocks is None:
        names = _ordered(model)
    else:
        names = [(pattern, path) for pattern in blocks for path, _ in find_modules(model, pattern)]
    found: dict[str, Weights] = {}
    taken: set[int] = set()
    modules = dict(model.named_modules())
    for name, module in names:
        for path, parameter in modules[module].named_parameters(prefix=module, recurse=blocks is not None):
            if id(parameter) not in taken:
                taken.add(id(parameter))
                found.setdefault(name, {})[path] = parameter
    return found


def grouped(blocks: Mapping[str, Weights], stages: int | None) -> dict[str, Weights]:
    """At most ``stages`` blocks, by taking neighbouring ones together; all of them for ``None``."""
    if stages is None or stages >= len(blocks):
        return dict(blocks)
    if stages < 1:
        raise ExplainError(f"stages is at least 1; got {stages}")
    names = list(blocks)
    edges = [round(index * len(names) / stages) for index in range(stages + 1)]
    groups = {}
    for start, stop in itertools.pairwise(edges):
        title = names[start] if stop - start == 1 else f"{names[start]} … {names[stop - 1]}"
        groups[title] = {path: weight for name in names[start:stop] for path, weight in blocks[name].items()}
    return groups


@contextmanager
def randomised(
    weights: Mapping[str, torch.nn.Parameter], *, how: How = "normal", seed: int = 0
) -> Iterator[Mapping[str, torch.nn.Parameter]]:
    """Randomises weights in place while the block runs, and puts them back bit for bit, whatever happens in it.

    Args:
        weights: Name → parameter; ``dict(module.named_parameters())`` of any module. The name and ``seed`` decide the
            random numbers, whatever else is randomised; the global random state is not touched.
        how: ``"normal"`` or ``"permute"``, see the module.

    Raises:
        ExplainError: A parameter is quantised, or has no data (meta device, offloaded).
    """
    for name, parameter in weights.items():
        own = hasattr(parameter, "__tensor_flatten__")  # of a class that keeps other tensors: torchao, quanto, DTensor
        if parameter.device.type == "meta" or own or not parameter.is_floating_point():
            what = f"is {type(parameter).__name__ if own else parameter.dtype}"
            what = "has no data here" if parameter.device.type == "meta" else what
            raise ExplainError(
                f"{name} {what}, so it cannot be randomised: load the model whole and unquantised "
                f"(no device_map, float32 or bfloat16)"
            )
    saved: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
    try:
        for name, parameter in weights.items():
            # Kept before it is changed: an interrupt between the two lines finds it in the list.
            saved.append((parameter, parameter.detach().to("cpu", copy=True)))
            generator = torch.Generator().manual_seed((seed * 1_000_003 + zlib.crc32(name.encode())) % 2**63)
            with torch.no_grad():
                parameter.copy_(_random_like(saved[-1][1], how, generator))
        yield weights
    finally:
        interrupted: BaseException | None = None
        while saved:
            try:
                _put_back(saved)
            except Exception:
                raise
            except BaseException as stop:  # an impatient second Ctrl-C, or SIGTERM: first put everything back
                interrupted = stop
        if interrupted is not None:
            raise interrupted


def _put_back(saved: list[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
    while saved:
        parameter, values = saved[-1]
        with torch.no_grad():
            parameter.copy_(values)
        saved.pop()


def _random_like(values: torch.Tensor, how: How, generator: torch.Generator) -> torch.Tensor:
    if how == "permute":
        order = torch.randperm(values.numel(), generator=generator)
        return values.reshape(-1)[order].reshape(values.shape)
    wide = values.float()
    spread = float(wide.std(correction=0)) if values.numel() else 0.0
    drawn = torch.empty_like(wide, memory_format=torch.contiguous_format).normal_(generator=generator)
    return drawn.mul_(spread).add_(wide.mean() if values.numel() else 0.0).to(values.dtype)


def _ordered(model: torch.nn.Module) -> list[tuple[str, str]]:
    """(block, module) pairs from the output to the input, of all modules that hold weights themselves."""
    anatomy = examine(model)
    head = lm_head(model)

    def part(path: str, module: torch.nn.Module) -> int:
        if module is head:
            return 0
        # Mergers first: some stand inside an encoder. The decoder last: of some models it is everything.
        if any(_within(path, merger) for merger in anatomy.mergers):
            return 3
        if any(_within(path, encoder) for encoder in anatomy.encoders):
            return 4
        return 1 if _within(path, anatomy.decoder) else 2

    holders = [
        (part(path, module), -number, path)
        for number, (path, module) in enumerate(model.named_modules())
        if any(True for _ in module.parameters(recurse=False))
    ]
    return [(_block_of(path), path) for _, _, path in sorted(holders)]


def _within(path: str, root: str) -> bool:
    return not root or path == root or path.startswith(root + ".")


def _block_of(path: str) -> str:
    """The path up to its first number, which is a layer of a stack; all of it where there is none."""
    parts = path.split(".")
    first = next((index for index, name in enumerate(parts) if name.isdigit()), len(parts) - 1)
    return ".".join(parts[: first + 1])
