"""Which vision tower, and where in it, the aggregator looked at: its attention drawn over the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lvlm_probe.errors import ExplainError
from lvlm_probe.hooks import HookSet
from lvlm_probe_cambrian.modeling import CambrianForConditionalGeneration
from lvlm_probe_cambrian.padding import content_box
from lvlm_probe_cambrian.sampler import CrossAttention

if TYPE_CHECKING:
    from lvlm_probe.replaying import Replay

__all__ = ["LayerShares", "encoder_shares"]


@dataclass(frozen=True)
class LayerShares:
    """The attention of one layer of the aggregator, for one picture.

    Attributes:
        layer: path of the cross-attention in the model.
        decoder_layer: the decoder layer it follows; ``None`` in front of the decoder.
        encoders: paths of the towers, in order.
        shares: ``(encoder, row, col)`` float32: how much of a query's attention goes to each tower, mean over heads, on
            the grid of queries cut to the picture. Sums to 1 over encoders.
        maps: per tower ``(row, col)`` float32, on the tower's own grid cut to the picture: attention that each of its
            tokens gets from its query, mean over heads.
    """

    layer: str
    decoder_layer: int | None
    encoders: tuple[str, ...]
    shares: np.ndarray
    maps: tuple[np.ndarray, ...]


def encoder_shares(replay: Replay, *, image: int = 0) -> list[LayerShares]:
    """Attention of the aggregator on one picture of a replay, layer by layer, in the order in which they run.

    One forward pass; weights are computed beside it, whatever attention implementation the model runs, and nothing of
    the model changes. Attention says what was read, not what the answer hangs on: see ``probe.causal`` and
    ``method="gradcam"`` for that.

    Raises:
        ExplainError: the replay's model is no native Cambrian, or it has no such picture.
    """
    model: Any = replay.model
    if not isinstance(model, CambrianForConditionalGeneration):
        raise ExplainError(
            f"{type(model).__name__} is no native Cambrian model, whose aggregator can be read; convert the checkpoint "
            f"(python -m lvlm_probe_cambrian.convert --help)"
        )
    sizes = replay.image_sizes
    if not 0 <= image < len(sizes):
        raise ExplainError(f"image={image}, but the prompt has {len(sizes)}, counted from 0")
    found: list[LayerShares] = []

    def read(path: str, module: CrossAttention, args: tuple[Any, ...]) -> None:
        query, windows, masks = args
        with torch.no_grad():
            weights = module.weights(query, windows, masks).mean(dim=1)
        steps = path.split(".")
        inside = steps[1] == "language_model"  # model.language_model.layers.N.sampler…, or model.connectors.N…
        cells = model.config.image_grid if inside else (model.config.query_grids or [])[int(steps[2])]
        parts = weights.split([part.shape[1] for part in windows], dim=1)
        found.append(
            LayerShares(
                layer=path,
                decoder_layer=int(steps[3]) if inside else None,
                encoders=tuple(f"model.vision_towers.{tower}" for tower in range(len(parts))),
                shares=np.stack([_cut(part.sum(dim=1)[:, None], cells, 1, sizes, image, inside) for part in parts]),
                maps=tuple(_cut(part, cells, round(part.shape[1] ** 0.5), sizes, image, inside) for part in parts),
            )
        )

    with replay.replica.use() as own, HookSet() as hooks, torch.no_grad():
        for path, module in own.named_modules():
            if isinstance(module, CrossAttention):
                hooks.forward_pre(
                    module,
                    lambda m, args, _kwargs, path=path: read(path, m, args),
                    name="aggregator attention",
                    fenced=False,
                )
        replay.run_inputs(dict(replay.path.inputs))
    return found


def _cut(values: Tensor, cells: int, window: int, sizes: list[tuple[int, int]], image: int, inside: bool) -> np.ndarray:
    """``(query, window * window)`` of all pictures to the map of one, ``(row * window, col * window)``, cut to it.

    Inside the decoder only queries within the pictures run; in front of it all of the square.
    """
    boxes = [content_box(cells, size) for size in sizes]
    counts = [box.rows * box.cols if inside else cells * cells for box in boxes]
    mine = values.split(counts)[image]
    box = boxes[image]
    rows, cols = (box.rows, box.cols) if inside else (cells, cells)
    grid = mine.float().cpu().reshape(rows, cols, window, window).transpose(1, 2)
    if not inside:
        grid = grid[box.top : box.bottom, :, box.left : box.right]
    return grid.reshape(box.rows * window, box.cols * window).numpy()
