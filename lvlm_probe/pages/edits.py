"""What the model says with a region taken away, as plain JSON that the page draws: the image it saw, and its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from lvlm_probe.errors import ProbeError
from lvlm_probe.explainers.curve_points import curve_masks, rank
from lvlm_probe.heatmap import Heatmap, resample
from lvlm_probe.images import make_baseline
from lvlm_probe.metrics.localization import boxes_to_mask
from lvlm_probe.pages.data_uris import data_uri, shrink

if TYPE_CHECKING:
    from lvlm_probe.video import ClipHeatmap

__all__ = ["edits_of"]

_SIDE = 320
_MOST = 12  # edits of one map
_LONGEST = 2000


def edits_of(heat: Heatmap | ClipHeatmap, pictures: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """Every edit that the heatmap carries; what is no edit is left out, as anybody may have written the file."""
    records = heat.provenance.get("edits")
    found = []
    for record in records[:_MOST] if isinstance(records, list | tuple) else ():
        if not isinstance(record, Mapping) or record.get("kind") not in ("remove", "keep"):
            continue
        sentence = str(record.get("sentence") or "")[:_LONGEST]
        changes, notes = (
            value if isinstance(value, list | tuple) else () for value in (record.get("changes"), record.get("notes"))
        )
        found.append(
            {
                "src": _shown(heat, record, pictures),
                "lead": sentence.partition(" it says ")[0],
                "answer": str(record.get("answer") or "")[:_LONGEST],
                "same": not changes,
                "flipped": record.get("flipped") is True,
                "changes": [
                    [str(part)[:200] for part in pair][:2]
                    for pair in changes
                    if isinstance(pair, list | tuple) and len(pair) == 2
                ],
                "notes": [str(note)[:_LONGEST] for note in notes[:4]],
                "sentence": sentence,
            }
        )
    return found


def _shown(heat: Heatmap | ClipHeatmap, record: Mapping[str, Any], pictures: Sequence[Image.Image]) -> str | None:
    """What the model saw, small; ``None`` where the image or the baseline cannot be made again."""
    facts = dict(heat.provenance.get("baseline") or {})
    if not isinstance(heat, Heatmap) or heat.values is None or heat.image_index >= len(pictures):
        return None
    if facts.get("limit"):
        facts = {"kind": "mean"}
    if facts.get("kind") not in ("blur", "blank", "noise", "mean"):
        return None
    picture = shrink(pictures[heat.image_index], _SIDE)
    settings = {name: facts[name] for name in ("strength", "seed") if facts.get(name) is not None}
    try:
        other = make_baseline(picture, facts["kind"], **settings).image
        mask = _mask(heat, record, picture.size)
    except (ProbeError, TypeError, ValueError):
        return None
    if mask is None:
        return None
    share = Image.fromarray(np.uint8(np.rint(255 * mask)))
    seen = Image.composite(picture, other.convert("RGB"), share)
    drawn = np.array(seen)
    # Around the region, dark and light, so that it is found on images of any colour.
    for width, grey in ((5, 30), (3, 255)):
        around = share.point(lambda value: 255 * (value >= 128))
        ring = ImageChops.difference(around.filter(ImageFilter.MaxFilter(width)), around)
        drawn[np.asarray(ring) > 0] = grey
    return data_uri(Image.fromarray(drawn), quality=80)


def _mask(heat: Heatmap, record: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray | None:
    """``(row, col)`` of the shown image, 1 = the image itself; ``None`` of a mask, which is not kept."""
    assert heat.values is not None
    assert heat.seen is not None
    keep = record["kind"] == "keep"
    cells, boxes = record.get("cells"), record.get("boxes")
    if isinstance(cells, int) and 0 < cells <= heat.values.size:
        order = rank(heat.values, heat.seen, np.random.default_rng(0))
        mask = curve_masks(order, np.array([cells]), heat.values.shape, insert=keep)[0].numpy()
        return resample(mask, size[::-1])
    if isinstance(boxes, list | tuple) and boxes:
        scale = [size[k % 2] / heat.image_size[k % 2] for k in range(4)]
        inside = boxes_to_mask([[edge * by for edge, by in zip(box, scale, strict=True)] for box in boxes], size)
        return (inside == keep).astype(np.float32)
    return None
