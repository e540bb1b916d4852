"""Image tokens: which image, which box."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image

import lvlm_probe as probe
from lvlm_probe.layout import image_spans, token_boxes


def test_spans_by_counts_runs_or_shares():
    positions = np.array([1, 2, 3, 7, 8])
    assert image_spans(positions, 1).tolist() == [0] * 5
    assert image_spans(positions, 2).tolist() == [0, 0, 0, 1, 1]
    assert image_spans(positions, 2, [2, 3]).tolist() == [0, 0, 1, 1, 1]
    assert image_spans(np.arange(6), 3).tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(probe.ImageError, match="cannot be divided"):
        image_spans(np.arange(5), 3)


class GridPath:
    """Two images; the second is a 2 x 3 picture padded to 3 x 3 whose elements look at every other pixel."""

    pixel_keys = ("pixel_values",)
    image_sizes = ((6, 6), (6, 4))

    def coordinates(self, key):
        rows, cols = np.mgrid[0:3, 0:3] * 2.0 + 1.0
        shape = (2, 1, 3, 3)
        x = torch.tensor(np.broadcast_to(cols, shape).copy())
        y = torch.tensor(np.broadcast_to(rows, shape).copy())
        owner = torch.tensor([0, 1]).view(2, 1, 1, 1).expand(shape)
        live = torch.ones(shape, dtype=torch.bool)
        live[1, :, 2] = False
        return x, y, owner, live


def test_grid_boxes_by_hand():
    boxes = token_boxes(GridPath(), np.repeat([0, 1], 9))
    assert boxes[0].tolist() == [0.5, 0.5, 1.5, 1.5]  # a token of one element: its own pixel
    assert boxes[9 + 5].tolist() == [4.5, 2.5, 5.5, 3.5]
    assert boxes[9 + 8].tolist() == [0, 0, 0, 0]  # padding: no part of the picture
    with pytest.raises(probe.ImageError, match="no grid"):
        token_boxes(GridPath(), np.repeat([0, 1], 7))


@pytest.mark.parametrize(("name", "size"), [("llava", (90, 60)), ("llava", (50, 120)), ("qwen2_5_vl", (150, 100))])
def test_round_trip_light_a_region_and_its_tokens_move(name, size, tmp_path):
    """Change the picture inside one token's box: of all image tokens entering the decoder, that one moves most."""
    model, processor = tiny_models.build(name)
    grey = Image.new("RGB", size, (128, 128, 128))
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        model.generate(**tiny_models.inputs(name, model, processor, [grey], "What?"), max_new_tokens=2)
    layout = recording.traces[0].layout
    kept: list[torch.Tensor] = []
    decoder = dict(model.named_modules())[p.anatomy.decoder]
    handle = decoder.register_forward_pre_hook(
        lambda m, args, kwargs: kept.append(kwargs["inputs_embeds"][0, layout.image_positions.copy()]), with_kwargs=True
    )
    # Attention mixes patches inside an encoder; without it a token shows only what it is made of.
    tower = dict(model.named_modules())[p.anatomy.encoders[0]]
    blocks = [m for path, m in tower.named_modules() if path.endswith((".self_attn", ".attn"))]
    silenced = [block.register_forward_hook(_silent) for block in blocks]
    try:
        for token in range(0, len(layout.patch_box), 3):
            x0, y0, x1, y1 = layout.patch_box[token].astype(int)
            lit = grey.copy()
            lit.paste((250, 30, 60), (x0 + 1, y0 + 1, x1 - 1, y1 - 1))
            kept.clear()
            with torch.no_grad():
                for picture in (grey, lit):
                    model(**tiny_models.inputs(name, model, processor, [picture], "What?"))
            moved = (kept[0] - kept[1]).norm(dim=-1)
            assert int(moved.argmax()) == token
    finally:
        for hook in (handle, *silenced):
            hook.remove()


def _silent(_module, _args, output):
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)
