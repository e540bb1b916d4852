"""Patching: image tokens of one image, in their places among those of another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lvlm_probe.errors import ExplainError, ImageError
from lvlm_probe.hooks import HookSet
from lvlm_probe.images import PixelPath
from lvlm_probe.trace.clips import Clip, images_of

if TYPE_CHECKING:
    from lvlm_probe.replaying import Replay

Features = dict[str, list[Tensor]]
"""What the decoder is given about image tokens: argument → ``(image_token, channel)``; several for layered features."""


def donor_features(replay: Replay, donor: Image.Image | Sequence[Image.Image] | None, target: int | Clip) -> Features:
    """Features of the image tokens when an image, by its number, or each frame of a clip is ``donor`` (one for all or
    one each; or the baseline image), as the decoder gets them: outputs of the projector, in the order of the prompt.

    Raises:
        ExplainError: the decoder is not given embeddings.
        ImageError: the donor has another size, or there is not one for each frame.
    """
    path = replay.path
    assert not isinstance(path, PixelPath)  # refused by image_tokens
    images = list(path.images)
    places = images_of(target)
    one_each = slice(places.start, places.stop)
    if donor is None:
        donor = path.baseline_images[one_each]
    donors = [donor] * len(places) if isinstance(donor, Image.Image) else list(donor)
    if len(donors) != len(places):
        raise ImageError(f"{len(donors)} donor images for {len(places)}: give one for each, or one for all")
    images[one_each] = donors
    inputs = path.with_baseline(images).baseline_inputs
    seen: Features = {}

    def look(features: Features) -> None:
        seen.update({name: [value.detach().clone() for value in values] for name, values in features.items()})

    with torch.no_grad(), _at_decoder(replay, look):
        replay.run_inputs(inputs)
    return seen


@contextmanager
def patched(replay: Replay, features: Features, rows: np.ndarray) -> Iterator[None]:
    """Give the decoder ``features`` for some image tokens in the passes that run in the block.

    Args:
        features: what ``donor_features`` gives.
        rows: ``(image_token,)`` numbers among the image tokens of the prompt.
    """
    chosen = torch.tensor(rows)

    def swap(own: Features) -> None:
        for name, values in own.items():
            for value, other in zip(values, features[name], strict=True):
                value[chosen.to(value.device)] = other[chosen.to(other.device)]

    if len(rows) == 0:
        yield
        return
    with _at_decoder(replay, swap):
        yield


@contextmanager
def _at_decoder(replay: Replay, edit: Callable[[Features], None]) -> Iterator[None]:
    """Show the image tokens' features to ``edit``, which may change them in place, before the decoder sees them."""
    path = replay.anatomy.decoder
    positions = torch.tensor(replay.trace.layout.image_positions)  # type: ignore[union-attr]
    calls = 0

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal calls
        embeddings = kwargs.get("inputs_embeds")
        if embeddings is None or embeddings.shape[1] != replay.length:
            return None
        calls += 1
        place = positions.to(embeddings.device)
        features: Features = {"inputs_embeds": [embeddings[0, place]]}
        # Features that enter at later layers (deepstack): lists of (image_token, channel), in the same order.
        for name, value in kwargs.items():
            if isinstance(value, (list, tuple)) and value and all(_is_rows(item, len(positions)) for item in value):
                features[name] = [item.clone() for item in value]
        edit(features)
        changed = embeddings.clone()
        changed[0, place] = features.pop("inputs_embeds")[0]
        return args, {**kwargs, **features, "inputs_embeds": changed}

    with replay.replica.use() as model, HookSet() as hooks:
        hooks.forward_pre(model.get_submodule(path), hook, name=f"patch {path}", fenced=False)
        yield
    if not calls:
        raise ExplainError(
            f"{type(replay.model).__name__} does not hand embeddings of prompt and answer to {path or 'its decoder'}: "
            f"image tokens cannot be patched there"
        )


def _is_rows(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.shape[0] == count
