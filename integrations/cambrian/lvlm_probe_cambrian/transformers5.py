"""The authors' Cambrian package on transformers 5, for which it was not written.

Its decoder has a ``forward`` of its own, copied from transformers 4.37 around the places where image tokens are
updated; it calls layers and caches in ways that are gone. Here the ``forward`` of the class it was copied from runs
instead, and the updates are hooks behind the decoder layers::

    with on_transformers_5(model), probe.attach(model, processor) as p, p.record("runs/mine"):
        model.generate(**processor(prompt, image), max_new_tokens=64)

DINOv2 resizes its position embeddings otherwise in transformers 5 than in 4.37, which moves its features a little. The
converted model of this package has them baked in as they were.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lvlm_probe.errors import AttachError
from lvlm_probe.hooks import Call, HookSet

__all__ = ["on_transformers_5"]

_MODELS = "transformers.models."
_FEATURES = "vision_tower_aux_feature_list"
_OWN = (_FEATURES, "vision_tower_aux_attention_masks_list", "final_vision_feature_size", "global_context_feature")


def on_transformers_5(model: Any) -> HookSet:
    """Makes a model of the package run on transformers 5, until the block is left or ``remove()`` is called.

    Args:
        model: the package's, e.g. ``CambrianLlamaForCausalLM``; only this instance is changed.

    Raises:
        AttachError: its decoder is not a subclass of one of transformers'.
    """
    body = model.get_model()
    base: Any = next((kind for kind in type(body).__mro__[1:] if kind.__module__.startswith(_MODELS)), None)
    if base is None:
        raise AttachError(f"{type(body).__name__} is no subclass of a decoder of transformers'")
    taken = inspect.signature(type(body).forward)

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        decoder = original.__self__  # type: ignore[attr-defined]
        given = dict(taken.bind(decoder, *args, **kwargs).arguments)
        given.pop(next(iter(taken.parameters)))
        given.update(given.pop("kwargs", {}))
        features, masks, sizes, context = (given.pop(name, None) for name in _OWN)
        given = {name: value for name, value in given.items() if value is not None}
        entering = given.get("inputs_embeds", given.get("input_ids"))
        call = object()
        with Call(call), HookSet(scope=call) as hooks:  # other threads have other pictures
            # A decoding step holds no picture.
            if features is not None and entering is not None and entering.shape[1] > 1:
                for number, sampler in enumerate(decoder.vision_sampler_layers):
                    place = decoder.config.start_of_vision_sampler_layers
                    place += number * decoder.config.stride_of_vision_sampler_layers
                    if place < len(decoder.layers):
                        update = _update(sampler, decoder.config.image_position, sizes, (context, *features, *masks))
                        hooks.forward(decoder.layers[place], update, name="vision sampler", fenced=False)
            return base.forward(decoder, **given)

    made = HookSet()
    made.shadow(body, "forward", forward, inherited=True)
    return made


def _update(
    sampler: torch.nn.Module, start: int, sizes: Sequence[tuple[int, int]], read: Sequence[torch.Tensor]
) -> Callable[..., Any]:
    """A hook that updates the image tokens of each row behind one decoder layer.

    Args:
        sampler: ``(query, 1, channel)``, and what it reads, to the same.
        start: position of the first image token.
        sizes: rows and columns of image tokens of each row of the batch; a newline follows each row.
        read: context, features and masks, all rows' queries one after the other.
    """

    def hook(_module: torch.nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        hidden = hidden.clone()
        spans = [slice(start, start + rows * (cols + 1)) for rows, cols in sizes]
        grids = [
            hidden[row, span].view(rows, cols + 1, -1)
            for row, (span, (rows, cols)) in enumerate(zip(spans, sizes, strict=True))
        ]
        queries = torch.cat([grid[:, :-1].reshape(-1, 1, grid.shape[-1]) for grid in grids])
        updated = sampler(queries, *read).split([rows * cols for rows, cols in sizes])
        for row, (span, grid, part) in enumerate(zip(spans, grids, updated, strict=True)):
            tokens = part.reshape(grid.shape[0], grid.shape[1] - 1, -1)
            hidden[row, span] = torch.cat([tokens.to(grid.dtype), grid[:, -1:].clone()], dim=1).flatten(0, 1)
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    return hook
