"""What the model says with a region taken away, as plain JSON that the page draws: the image it saw, and its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from lvlm_probe.errors import ProbeError
from lvlm_probe.evidence.editing import mask_by_map
from lvlm_probe.heatmap import Heatmap, resample
from lvlm_probe.images import make_baseline
from lvlm_probe.metrics.localization import boxes_to_mask, whole_pixels
from lvlm_probe.pages.data_uris import data_uri, shrink
from lvlm_probe.replaying.baselines import described

if TYPE_CHECKING:
    from lvlm_probe.video import ClipHeatmap

_SIDE = 320
_MOST = 12  # edits of one map
_LONGEST = 2000


def edits_of(heat: Heatmap | ClipHeatmap, shown: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """Every edit that the heatmap carries; what is no edit is left out, as anybody may have written the file."""
    records = heat.provenance.get("edits")
    edits = [
        record
        for record in (records[:_MOST] if isinstance(records, list | tuple) else ())
        if isinstance(record, Mapping) and record.get("kind") in ("remove", "keep")
    ]
    images = _images(heat, shown) if edits else None
    found = []
    for record in edits:
        sentence = str(record.get("sentence") or "")[:_LONGEST]
        changes, notes = (
            value if isinstance(value, list | tuple) else () for value in (record.get("changes"), record.get("notes"))
        )
        found.append(
            {
                "src": _shown(heat, record, *images) if images else None,
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


def _images(heat: Heatmap | ClipHeatmap, shown: Sequence[Image.Image]) -> tuple[Image.Image, Image.Image] | None:
    """The image and its baseline, small; ``None`` where one of them cannot be made again."""
    facts = heat.provenance.get("baseline")
    if not isinstance(heat, Heatmap) or heat.values is None or heat.image_index >= len(shown):
        return None
    if not isinstance(facts, Mapping) or not facts.get("kind"):
        return None
    image = shrink(shown[heat.image_index], _SIDE)
    try:
        kind, strength, seed = described(facts)
        settings: dict[str, Any] = {
            name: value for name, value in (("strength", strength), ("seed", seed)) if value is not None
        }
        return image, make_baseline(image, kind, **settings).image
    except (ProbeError, TypeError, ValueError):
        return None


def _shown(
    heat: Heatmap | ClipHeatmap, record: Mapping[str, Any], image: Image.Image, baseline: Image.Image
) -> str | None:
    """What the model saw, small; ``None`` where the mask cannot be made again."""
    try:
        mask = _mask(heat, record, image.size)
    except (ProbeError, TypeError, ValueError):
        return None
    if mask is None:
        return None
    share = Image.fromarray(np.uint8(np.rint(255 * mask)))
    seen = Image.composite(image, baseline, share)
    drawn = np.array(seen)
    # Around the region, dark and light, so that it is found on images of any colour.
    for width, grey in ((5, 30), (3, 255)):
        around = share.point(lambda value: 255 * (value >= 128))
        ring = ImageChops.difference(around.filter(ImageFilter.MaxFilter(width)), around)
        drawn[np.asarray(ring) > 0] = grey
    return data_uri(Image.fromarray(drawn), quality=80)


def _mask(heat: Heatmap | ClipHeatmap, record: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray | None:
    """``(row, col)`` of the shown image, 1 = the image itself; ``None`` of a mask, which is not kept."""
    assert heat.values is not None
    cells, boxes = record.get("cells"), record.get("boxes")
    if isinstance(cells, int) and 0 < cells <= heat.values.size:
        return resample(mask_by_map(heat, cells, record["kind"]).numpy(), size[::-1])
    if isinstance(boxes, list | tuple) and boxes:
        scale = [size[k % 2] / heat.image_size[k % 2] for k in range(4)]
        shown = [[edge * by for edge, by in zip(box, scale, strict=True)] for box in boxes]
        inside = boxes_to_mask(list(map(whole_pixels, shown)), size)
        return (inside == (record["kind"] == "keep")).astype(np.float32)
    return None
