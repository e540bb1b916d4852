"""Image tokens: which image, which box."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image

import lvlm_probe as probe
from lvlm_probe.boxes.image_tokens import _axis, find_token_boxes
from lvlm_probe.boxes.painting import have_extent, image_spans, paint, pitch, tubes
from lvlm_probe.boxes.sign_code import boxes_by_sign_code
from lvlm_probe.recording.token_boxes import in_order
from lvlm_probe.trace.clips import Clip


def test_spans_by_counts_runs_or_shares():
    positions = np.array([1, 2, 3, 7, 8])
    assert image_spans(positions, 1).tolist() == [0] * 5
    assert image_spans(positions, 2).tolist() == [0, 0, 0, 1, 1]
    assert image_spans(positions, 2, [2, 3]).tolist() == [0, 0, 1, 1, 1]
    assert image_spans(np.arange(6), 3).tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(probe.errors.ImageError, match="cannot be divided"):
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


def places(cells: torch.nn.Module, path=None):
    """Places of tokens that ``cells`` makes of the pixels of ``GridPath``: ``(view, channel, row, col)`` out."""
    leaf = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    made = cells(leaf)
    hidden = torch.cat([torch.zeros(1, made.shape[1]), made.permute(0, 2, 3, 1).flatten(0, 2)])  # a newline in front
    return boxes_by_sign_code(hidden, {"pixel_values": leaf}, path or GridPath())


def test_grid_boxes_by_hand():
    found = places(torch.nn.Conv2d(1, 5, 1))
    assert found.boxes[0].tolist() == [0, 0, 0, 0] and found.images[0] == -1  # no part of any picture
    assert found.boxes[1].tolist() == [0.5, 0.5, 1.5, 1.5]  # a token of one element: its own pixel
    assert found.boxes[10 + 5].tolist() == [4.5, 2.5, 5.5, 3.5]
    assert found.boxes[10 + 8].tolist() == [0, 0, 0, 0]  # padding
    assert found.images.tolist() == [-1] + [0] * 9 + [1] * 6 + [-1] * 3
    assert in_order(found.images, np.zeros(19, int)).tolist() == [0] * 10 + [1] * 9


def test_a_mark_where_an_image_begins_belongs_to_that_image():
    """HunYuanVL: each image's tokens begin and end with one that has no pixels."""
    found = np.array([-1, 0, 0, -1, -1, 1, 1, -1])
    assert in_order(found, np.array([0, 0, 0, 0, 1, 1, 1, 1])).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    # Where the prompt is read otherwise than the pixels are, these are right.
    assert in_order(found, np.array([0, 0, 1, 1, 1, 1, 1, 1])).tolist() == [0, 0, 0, 0, 0, 1, 1, 1]


def test_boxes_of_tokens_that_share_pixels():
    """Every token the mean of 2 × 2 of 3 × 3 elements: those in the middle belong to all four."""
    found = places(torch.nn.Sequential(torch.nn.AvgPool2d(2, 1), torch.nn.Conv2d(1, 5, 1)))
    assert found.images.tolist() == [-1] + [0] * 4 + [1] * 4
    assert np.allclose(found.boxes[1:5], [[0, 0, 4, 4], [2, 0, 6, 4], [0, 2, 4, 6], [2, 2, 6, 6]], atol=0.4)
    assert np.allclose(found.boxes[7], [0, 2.5, 4, 3.5], atol=0.4)  # one row, the other is padding


@pytest.mark.parametrize("alike", [False, True])
def test_tokens_that_all_read_everything_have_no_place(alike):
    """As a resampler's queries do: different sums, but of the same elements."""
    leaf = torch.rand(2, 1, 3, 3).requires_grad_(True)
    hidden = leaf.sum() * torch.rand(4, 5, generator=torch.Generator().manual_seed(1))
    if alike:
        assert boxes_by_sign_code(hidden, {"pixel_values": leaf}, GridPath(), alike=True) is None
    else:  # as very wide receptive fields do
        with pytest.raises(probe.errors.ImageError, match="lie over each other"):
            boxes_by_sign_code(hidden, {"pixel_values": leaf}, GridPath())
    assert boxes_by_sign_code(torch.zeros(4, 5) + 0 * leaf.sum(), {"pixel_values": leaf}, GridPath()) is None


def test_attention_has_the_place_of_all_it_reads_however_little_of_it():
    """Queries that look almost only at one pixel each: in a window of their own they have its place, else none."""
    looks = torch.softmax(12 * torch.eye(3)[:, [0, 1, 2]], dim=1)  # 1e-5 of the attention is elsewhere
    leaf = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    rows = leaf[0, 0].matmul(looks.T).reshape(9, 1) * torch.ones(1, 5)  # a window is a row of the first picture
    found = boxes_by_sign_code(rows, {"pixel_values": leaf}, GridPath(), alike=True)
    assert np.allclose(found.boxes, np.repeat([[0, 0.5, 6, 1.5], [0, 2.5, 6, 3.5], [0, 4.5, 6, 5.5]], 3, axis=0))
    whole = torch.softmax(12 * torch.eye(9), dim=1) @ leaf[0, 0].reshape(9, 1) * torch.ones(1, 5)
    assert boxes_by_sign_code(whole, {"pixel_values": leaf}, GridPath(), alike=True) is None


def test_sequences_stand_on_any_axis():
    lengths = {7}
    assert [_axis(torch.zeros(shape), lengths) for shape in ((1, 7, 5), (4, 1, 7, 5), (1, 7, 4, 5))] == [1, 2, 1]
    assert _axis(torch.zeros(1, 5, 7), lengths) is None


@pytest.mark.parametrize(
    ("name", "size"),
    [("llava", (90, 60)), ("llava", (50, 120)), ("qwen2_5_vl", (150, 100)), ("gemma3", (90, 60))],
)
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


@pytest.mark.parametrize("name", ["llava_next", "internvl", "idefics3"])
def test_places_of_several_tiled_pictures_in_bfloat16(name, tmp_path):
    """Unequal pictures in one prompt; half precision tells the same places; the model is left as it was."""
    model, processor = tiny_models.build(name)
    pictures = [tiny_models.picture(*size, seed=seed) for seed, size in enumerate([(90, 60), (40, 120)])]
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        inputs = tiny_models.inputs(name, model, processor, pictures, "What?")
        model.generate(**inputs, max_new_tokens=2)
    (trace,) = recording.traces
    layout = trace.layout
    for image, (width, height) in enumerate([(90, 60), (40, 120)]):
        mine = layout.patch_box[layout.image_index == image]
        real = mine[mine[:, 2] > mine[:, 0]]
        assert (
            len(real) >= 8 and real[:, :2].min() < 1 and np.allclose(real[:, 2:].max(axis=0), (width, height), atol=1)
        )
    assert np.array_equal(np.sort(layout.image_index), layout.image_index)
    replay = probe.replay(trace, model.bfloat16(), processor, strict=False)
    hooks, state = count_hooks(model), torch.random.get_rng_state()
    coarse = find_token_boxes(replay, layout.image_positions)
    assert np.array_equal(coarse.boxes, layout.patch_box)
    saving = probe.replay(trace, model, processor, strict=False, gradient_checkpointing=True)
    assert np.array_equal(find_token_boxes(saving, layout.image_positions).boxes, layout.patch_box)
    assert count_hooks(model) == hooks and torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters()) and not model.training


def count_hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.quick
def test_cross_attention_keys_have_places_too(tmp_path):
    """Blur one tile's worth of the picture: of all keys, exactly those whose box meets it change in the encoder."""
    model, processor = tiny_models.build("mllama")
    grey = Image.new(
        "RGB", (112, 56), (128, 128, 128)
    )  # two whole tiles of 56 × 56, each 4 × 4 patches and a class token
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        model.generate(**tiny_models.inputs("mllama", model, processor, [grey], "What?"), max_new_tokens=2)
    found = find_token_boxes(probe.replay(recording.traces[0], model, processor), np.zeros(0, int))
    live = found.images >= 0
    sides = np.array(
        [[x, y, x + 14, y + 14] for tile in (0, 56) for y in range(0, 56, 14) for x in range(tile, tile + 56, 14)]
    )
    assert live.sum() == 32 and not live[0] and np.allclose(found.boxes[live], sides, atol=0.5)


@pytest.mark.parametrize("name", ["llava_next", "internvl"])
def test_a_map_over_tiles_is_the_mean_of_the_views_that_cover_a_pixel(name, tmp_path):
    """Recorded attention, pasted pixel by pixel: views one after the other, then their mean."""
    model, processor = tiny_models.build(name)
    shown = tiny_models.picture(90, 60)
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        inputs = tiny_models.inputs(name, model, processor, [shown], "What?")
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
    (trace,) = recording.traces
    heat = probe.explain(trace, method="attention", tokens=[1, 2], strengthen=False, size=(12, 18))
    weights = (
        torch.as_tensor(np.array(trace.attention.values))[list(heat.selection.indices)].float().mean(dim=(0, 1, 2))
    )
    total, views = np.zeros((120, 180)), np.zeros((120, 180))  # half pixels: a tile's token is 22.5 pixels wide
    for value, (x0, y0, x1, y1) in zip(weights.tolist(), (trace.layout.patch_box * 2).round().astype(int), strict=True):
        total[y0:y1, x0:x1] += value
        views[y0:y1, x0:x1] += 1
    assert views.min() == np.median(views) == 2  # a tile and the overview; neighbours may overlap by a pixel
    wanted = (total / views).reshape(12, 10, 18, 10).mean(axis=(1, 3))
    wanted = (wanted - wanted.min()) / (wanted.max() - wanted.min())
    assert np.allclose(heat.values, wanted, atol=0.03)


def test_a_grid_is_never_finer_than_any_models_tokens() -> None:
    """Boxes of a file from a stranger: a pitch of 1e-12 pixels asked for 17 TiB."""
    tiny = np.array([[0, 0, 1e-12, 1e-12], [3, 3, 3 + 1e-12, 3 + 1e-12]])
    assert pitch(tiny, (90, 60)) == (1024, 1024)
    assert pitch(np.array([[0.0, 0.0, 30.0, 30.0]]), (90, 60)) == (2, 3)


def test_tubes_are_painted_by_the_time_they_share_with_a_step() -> None:
    clip = Clip(3, 4)
    boxes = np.array([[0, 0, 8, 4], [0, 0, 8, 4], [0, 4, 8, 8], [0, 0, 0, 0]], np.float32)
    found = tubes(boxes, np.array([[3, 4], [5, 6], [3, 6], [3, 6]]), clip)
    assert found.tolist() == [[0, 0, 0, 8, 4, 2], [0, 0, 2, 8, 4, 4], [0, 4, 0, 8, 8, 4], [0] * 6]
    assert have_extent(found).tolist() == [True, True, True, False]
    size = (8, 8, 4)
    assert pitch(found, size) == (2, 2, 1)  # the median lasts two frames
    values = torch.tensor([1.0, 3.0, 5.0, 9.0])
    grid, met = paint(values, found, size, (2, 2, 1))
    assert grid.tolist() == [[[1.0], [5.0]], [[3.0], [5.0]]] and met.all()
    whole, _ = paint(values, found, size, (1, 1, 1))
    assert whole.item() == pytest.approx((1 * 2 + 3 * 2 + 5 * 4) / 8)  # by time and area
    thirds, _ = paint(values, found, size, (3, 2, 1))
    assert thirds[:, 0, 0].tolist() == pytest.approx([1.0, 2.0, 3.0])  # half of the middle third each
    early, met = paint(values[:1], found[:1], size, (2, 2, 1))
    assert met[:, :, 0].tolist() == [[True, False], [False, False]] and early[0, 0, 0] == 1
