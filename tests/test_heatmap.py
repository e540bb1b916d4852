"""Heatmap: its invariants, drawing, provenance in PNG, and the way to disk and back."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lvlm_probe.errors import ExplainError, ImageError, TraceError
from lvlm_probe.heatmap import Heatmap, resample
from lvlm_probe.selection import TokenSelection

SELECTION = TokenSelection((1,), ("a", " rød", "</s>"), (0.1, 4.5, 9.0), "llr", {"alpha": 1.0}, {2: "special token"})
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))
TRACE = SimpleNamespace(images=[PICTURE], trace_id="t-1", path=None)


@pytest.fixture
def heat() -> Heatmap:
    values = np.zeros((4, 6), dtype=np.float32)
    values[1, 4] = 0.8
    return Heatmap(
        values,
        (90, 60),
        selection=SELECTION,
        method="igos++",
        params={"lr": 0.3},
        provenance={"trace_id": "t-1", "seed": 7, "passes": {"forward": 100, "backward": 100}},
        history=({"objective": 1.0},),
        trace=TRACE,
    )


# ---------------------------------------------------------------- values


def test_what_was_called_a_picture_is_found_by_its_old_name_with_a_warning(heat: Heatmap) -> None:
    with pytest.warns(DeprecationWarning, match=r"Heatmap\.picture is called Heatmap\.image now"):
        assert heat.picture().tobytes() == heat.image().tobytes() == PICTURE.tobytes()
    assert "picture" not in {field.name for field in dataclasses.fields(heat)}


def test_values_are_frozen_float32_and_cells_out_of_sight_zero() -> None:
    seen = np.ones((2, 2), dtype=bool)
    seen[0, 0] = False
    source = np.full((2, 2), 0.5, dtype=np.float64)
    heat = Heatmap(source, (8, 8), seen=seen)
    assert heat.values.dtype == np.float32
    assert heat.values.tolist() == [[0.0, 0.5], [0.5, 0.5]]
    assert source[0, 0] == 0.5
    with pytest.raises(ValueError):
        heat.values[0, 0] = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        heat.method = "x"
    assert heat


@pytest.mark.parametrize(
    "bad", [np.full((2, 2), 1.5), np.full((2, 2), np.nan), np.zeros(4), np.zeros((0, 3)), -np.ones((1, 1))]
)
def test_values_out_of_range_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ExplainError, match=r"\(row, col\) within \[0, 1\]"):
        Heatmap(bad, (8, 8))


def test_upsampled_matches_masks_bilinear_cell_centres(heat: Heatmap) -> None:
    up = heat.upsampled()
    assert up.shape == (60, 90)
    assert up.dtype == np.float32
    row, col = np.unravel_index(up.argmax(), up.shape)
    assert 15 <= row < 30
    assert 60 <= col < 75
    # Cell centres: pixel (22, 67) is nearest to the centre of cell (1, 4), (22.5, 67.5) in pixel edges.
    assert up[22, 67] == pytest.approx(0.8, abs=0.06)
    assert up[:5].max() == 0.0
    assert np.array_equal(resample(heat.values, (4, 6)), heat.values)


def test_without_values_there_is_a_reason_and_no_picture(tmp_path: Path) -> None:
    empty = Heatmap(
        None, (90, 60), selection=SELECTION, reason="nothing to explain: no token gains <1> nats", trace=TRACE
    )
    assert not empty
    assert empty._repr_png_() is None
    assert "no token gains &lt;1&gt; nats" in empty._repr_html_()
    for act in (empty.upsampled, empty.overlay, lambda: empty.save(tmp_path / "x.png"), lambda: empty.shape):
        with pytest.raises(ExplainError, match="no token gains"):
            act()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ExplainError, match="needs a reason"):
        Heatmap(None, (90, 60))


# ---------------------------------------------------------------- drawing


def test_overlay_leaves_the_picture_where_heat_is_zero_and_covers_it_where_high(heat: Heatmap) -> None:
    drawn = np.asarray(heat.overlay(alpha=1.0, contour=False, mark=False)).astype(int)
    original = np.asarray(PICTURE).astype(int)
    assert drawn.shape == (60, 90, 3)
    cold = heat.upsampled() == 0
    assert np.array_equal(drawn[cold], original[cold])
    from matplotlib import colormaps

    up = heat.upsampled()
    hottest = np.unravel_index(up.argmax(), up.shape)
    top = np.array(colormaps["inferno"](1.0)[:3]) * 255
    assert np.abs(drawn[hottest] - top).max() <= 1.5
    assert np.array_equal(np.asarray(heat.overlay(alpha=0.0)), np.asarray(PICTURE))


def test_contour_runs_along_half_of_the_highest_value(heat: Heatmap) -> None:
    plain = np.asarray(heat.overlay(contour=False, mark=False)).astype(int)
    drawn = np.asarray(heat.overlay(mark=False)).astype(int)
    changed = (plain != drawn).any(axis=2)
    up = heat.upsampled() / heat.upsampled().max()
    assert changed.any()
    assert 0.2 < up[changed].min() < 0.5 < up[changed].max() < 0.8


def test_overlay_is_opaquer_the_more_a_region_matters() -> None:
    heat = Heatmap(np.array([[0.1, 0.4, 0.9]]), (30, 10))
    black = np.asarray(heat.overlay(image=Image.new("RGB", (30, 10)), mark=False)).astype(int).sum(axis=2)
    assert black[5, 5] < black[5, 15] < black[5, 25]
    faint = (
        np.asarray(heat.overlay(image=Image.new("RGB", (30, 10)), normalise=False, mark=False)).astype(int).sum(axis=2)
    )
    assert faint[5, 25] < black[5, 25]


def test_regions_never_seen_are_grey_and_hatched() -> None:
    seen = np.ones((4, 6), dtype=bool)
    seen[:, :2] = False
    colourful = Image.new("RGB", (90, 60), (250, 30, 30))
    drawn = np.asarray(Heatmap(np.zeros((4, 6)), (90, 60), seen=seen).overlay(image=colourful, mark=False)).astype(int)
    hidden, shown = drawn[:, :30], drawn[:, 30:]
    assert (np.ptp(hidden, axis=2) <= 1).all()
    assert len(np.unique(hidden[:, :28])) >= 2  # hatching, not a flat area
    assert (shown == [250, 30, 30]).all()


def test_overlay_refusals(heat: Heatmap) -> None:
    with pytest.raises(ExplainError, match="no colour map 'infernoo'"):
        heat.overlay(colormap="infernoo")
    with pytest.raises(ExplainError, match="alpha is between"):
        heat.overlay(alpha=2)
    with pytest.raises(ImageError, match="got one of"):
        heat.overlay(image=Image.new("RGB", (9, 9)))
    with pytest.raises(ImageError, match=r"Heatmap\.read"):
        dataclasses.replace(heat, trace=None).overlay()
    blind = SimpleNamespace(images=(), trace_id="t-1", path=None)
    with pytest.raises(ImageError, match=r"record with images="):
        dataclasses.replace(heat, trace=blind).overlay()


# ---------------------------------------------------------------- PNG and notebooks


def test_saved_png_says_how_it_was_made(heat: Heatmap, tmp_path: Path) -> None:
    path = heat.save(tmp_path / "heat.png")
    with Image.open(path) as saved:
        assert saved.size == (90, 60)
        record = json.loads(saved.text["lvlm_probe"])
    assert record["method"] == "igos++"
    assert record["provenance"]["trace_id"] == "t-1"
    assert record["selection"]["tokens"][1] == " rød"
    with pytest.raises(ExplainError, match="saved as PNG"):
        heat.save(tmp_path / "heat.jpg")


def test_notebook_reprs(heat: Heatmap) -> None:
    with Image.open(io.BytesIO(heat._repr_png_())) as shown:
        assert shown.size == (90, 60)
    page = heat._repr_html_()
    assert "igos++: rød" in page
    assert "100 forward" in page
    embedded = re.search(r"base64,([A-Za-z0-9+/=]+)", page)
    assert embedded is not None
    assert base64.b64decode(embedded[1]).startswith(b"\x89PNG")
    assert dataclasses.replace(heat, trace=None)._repr_png_() is not None
    assert "PIL" not in repr(heat)


# ---------------------------------------------------------------- files


def test_half_a_character_in_what_is_stored_does_not_break_the_png(heat: Heatmap) -> None:
    odd = dataclasses.replace(heat, provenance={**heat.provenance, "note": "half \ud800 pair"})
    with Image.open(io.BytesIO(odd._repr_png_())) as shown:
        assert json.loads(shown.text["lvlm_probe"]) == odd.describe()


def test_round_trip_through_a_file(heat: Heatmap, tmp_path: Path) -> None:
    path = heat.write(tmp_path / "heat.h5")
    again = Heatmap.read(path)
    assert np.array_equal(again.values, heat.values)
    assert np.array_equal(again.seen, heat.seen)
    assert again.describe() == heat.describe()
    assert again.trace is None
    assert Heatmap.read(path, trace=TRACE).overlay().size == (90, 60)


@pytest.mark.quick
def test_round_trip_without_values(tmp_path: Path) -> None:
    empty = Heatmap(None, (9, 6), selection=SELECTION, reason="nothing", method="igos++")
    again = Heatmap.read(empty.write(tmp_path / "empty.h5"))
    assert again.values is None
    assert again.reason == "nothing"
    assert again.selection == SELECTION


def test_a_file_that_is_no_heatmap_is_a_trace_error(heat: Heatmap, tmp_path: Path) -> None:
    from lvlm_probe.storage import write_arrays

    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(TraceError):
        Heatmap.read(tmp_path / "text.h5")
    with pytest.raises(TraceError):
        Heatmap.read(tmp_path / "missing.h5")
    write_arrays(tmp_path / "half.h5", "heatmap", "1.0", {"values": heat.values}, {"method": "x"})
    with pytest.raises(TraceError, match="not a complete heatmap"):
        Heatmap.read(tmp_path / "half.h5")
    attrs = heat.describe()
    write_arrays(tmp_path / "wild.h5", "heatmap", "1.0", {"values": heat.values * 9}, attrs)
    with pytest.raises(TraceError, match="within"):
        Heatmap.read(tmp_path / "wild.h5")
    write_arrays(tmp_path / "future.h5", "heatmap", "2.0", {"values": heat.values}, attrs)
    with pytest.raises(TraceError):
        Heatmap.read(tmp_path / "future.h5")


def test_reprs_fit_on_a_line() -> None:
    chosen = TokenSelection((1,), (" a", " red"), (0.0, 4.0), "llr")
    found = Heatmap(values=np.ones((3, 4)), image_size=(40, 30), method="igos++", selection=chosen)
    empty = Heatmap(values=None, image_size=(40, 30), method="igos++", reason="nothing to explain")
    assert repr(found) == "<Heatmap igos++ of 'red': 3×4 cells over 40×30 pixels>"
    assert repr(empty) == "<Heatmap igos++: none, nothing to explain>"
    assert repr(chosen) == "<TokenSelection llr: 'red', 1 of 2 tokens>"


@pytest.mark.parametrize("ending", ["pdf", "svg", "png", "tiff"])
def test_a_figure_of_ours_is_replaced_and_a_stranger_s_is_not(heat: Heatmap, tmp_path: Path, ending: str) -> None:
    from matplotlib.figure import Figure

    heat, path = dataclasses.replace(heat, trace=None), tmp_path / "paper" / "new" / f"figure.{ending}"
    picture = Image.new("RGB", heat.image_size)
    heat.figure(path, image=picture, dpi=40)
    heat.figure(path, image=picture, dpi=40)  # a cell that runs again
    with pytest.raises(ExplainError, match="exists"):
        heat.figure(path, image=picture, dpi=40, overwrite=False)
    Figure(figsize=(1, 1)).savefig(path)  # somebody else's, made by the same library
    before = path.read_bytes()
    with pytest.raises(ExplainError, match="not written by lvlm_probe"):
        heat.figure(path, image=picture, dpi=40)
    assert path.read_bytes() == before
    heat.figure(path, image=picture, dpi=40, overwrite=True)
    assert path.read_bytes() != before
