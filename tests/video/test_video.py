"""Explaining by a video: methods find the frames and the place that a closed form says carry the answer."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from toy_clip import ToyClip, tube_weights
from toy_replay import ToyReplay

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError, ImageError, ProbeError, ReportError, TraceError
from lvlm_probe.explainers.greedy import regions_of
from lvlm_probe.explainers.igos.regularizers import bilateral_weights, btv, tv
from lvlm_probe.explainers.registry import METHODS, Outcome, Problem, cost_of, register
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.heatmap_store import MapFile
from lvlm_probe.trace.clips import Clip
from lvlm_probe.video import ClipHeatmap
from lvlm_probe.video.heatmap import film_sheet

TUBE = (slice(4, 6), slice(0, 3), slice(5, 8))
SETTINGS: dict[str, dict[str, Any]] = {
    "igos++": {"size": 8},
    "igos+": {"size": 8, "iterations": 4},
    "input_gradient": {"size": 8},
    "integrated_gradients": {"size": 8, "steps": 8},
    "occlusion": {"size": 8, "lasting": 2},
    "rise": {"size": 8, "masks": 3000, "cells": (8, 8, 8)},
    "greedy": {"segments": "grid", "regions": (8, 8), "stretches": 4},
}
# in tests/families/test_clips.py
OVER_TOKENS = {
    "attention", "relative_attention", "rollout", "tmm", "iia", "gradcam", "tam",
    "gradient_attention", "weighted_tmm", "gradient_value", "attention_flow", "refined",
}  # fmt: skip
FLOORS = {"random", "center"}


@pytest.fixture
def toy() -> ToyClip:
    return ToyClip(tube_weights(8, 8, *TUBE))


def test_the_methods_that_explain_by_a_video_are_tested_here() -> None:
    assert set(probe.video.clip_methods()) == {*SETTINGS, *OVER_TOKENS, *FLOORS} == set(probe.methods())


@pytest.mark.parametrize("method", SETTINGS)
def test_a_method_finds_the_frames_and_the_place(toy: ToyClip, method: str) -> None:
    heat = probe.video.explain(toy, method=method, progress=False, **SETTINGS[method])
    assert heat.clip == toy.clips[0]
    step, row, col = np.unravel_index(int(heat.values.argmax()), heat.values.shape)
    rows, cols = heat.values.shape[1:]
    assert step in (4, 5)
    assert row < 3 * rows / 8
    assert col >= 5 * cols / 8
    assert int(heat.over_time.argmax()) in (4, 5)
    score = probe.evaluate(heat, toy, progress=False)
    assert score.deletion < 0.2 < 0.8 < score.insertion
    assert score.params["grid"] == list(heat.values.shape)


def test_greedy_takes_tubes_in_the_order_of_brute_force() -> None:
    cells = torch.rand(4, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    toy = ToyClip(cells / cells.sum())
    options = {"segments": "grid", "regions": (2, 2), "stretches": 2, "search": "exact"}
    heat = probe.video.explain(toy, method="greedy", progress=False, **options)
    shares = (cells / cells.sum()).reshape(2, 2, 2, 2).sum(1).flatten().tolist()  # of each stretch and cell

    def worth(taken: list[int]) -> float:
        only = sum(shares[k] for k in taken)
        return 2 * (0.01 + 0.89 * only) - 0.01 + 1 - 0.9  # P(only) + 1 − P(all but)

    order: list[int] = []
    while len(order) < 8:
        order.append(max(set(range(8)) - set(order), key=lambda k: worth([*order, k])))
    assert [record["region"] for record in heat.history[1:]] == order
    assert heat.values.shape == (4, 2, 2)
    assert np.array_equal(heat.values[0], heat.values[1]) and np.array_equal(heat.values[2], heat.values[3])
    assert np.argsort(-heat.values[::2].ravel()).tolist() == order
    assert heat.params["stretches"] == 2
    with pytest.raises(ExplainError, match="stretches is between 1 and 4"):
        probe.video.explain(toy, method="greedy", segments="grid", stretches=5)
    with pytest.raises(ExplainError, match="this is an image"):
        probe.explain(ToyReplay(torch.full((2, 2), 0.25)), method="greedy", segments="grid", stretches=2)


def test_greedy_cuts_each_stretch_of_a_clip_in_sixteen_by_default(toy: ToyClip) -> None:
    clip = probe.video.explain(toy, method="greedy", segments="grid", progress=False)
    image = probe.explain(ToyReplay(torch.full((8, 8), 1 / 64)), method="greedy", segments="grid", progress=False)
    for heat, regions in ((clip, 4 * 16), (image, 32)):
        assert heat.params["regions"] == regions
        assert heat.provenance["diagnostics"]["regions"] == pytest.approx(regions, rel=0.15)  # a grid of about as many
    cost = cost_of("greedy", Problem(toy, None, clip=toy.clips[0]), {"segments": "grid"})  # type: ignore[arg-type]
    assert cost.at_least == (64 + 2, 0)


def test_superpixels_of_a_stretch_follow_what_moves() -> None:
    pytest.importorskip("skimage")
    frames = []
    for number in range(4):  # a bright square that moves half its side in a frame
        pixels = np.full((48, 48, 3), 30, np.uint8)
        pixels[16:32, 4 + 8 * number : 20 + 8 * number] = 240
        frames.append(Image.fromarray(pixels))
    toy = ToyClip(tube_weights(4, 4, slice(0, 4), slice(0, 4), slice(0, 4)))
    toy.trace.images[:] = frames
    problem = Problem(toy, None, clip=toy.clips[0])  # type: ignore[arg-type]
    labels = regions_of(problem, "slic", 24, 1).numpy()
    assert labels.shape == (4, 48, 48)
    for frame, image in zip(labels, frames, strict=True):
        bright = np.asarray(image)[..., 0] > 128
        of_square = np.isin(frame, np.unique(frame[bright]))
        assert of_square.sum() < 0.75 * 16 * 40  # regions that stand still would take all of its way
    apart = regions_of(problem, "slic", 24, 2)
    assert not set(apart[:2].unique().tolist()) & set(apart[2:].unique().tolist())


def test_passes_do_not_depend_on_the_number_of_frames() -> None:
    counts = []
    for frames in (4, 12):
        toy = ToyClip(tube_weights(frames, 4, slice(0, 2), slice(0, 1), slice(0, 1)))
        heat = probe.video.explain(toy, size=4, progress=False)
        counts.append(heat.provenance["passes"]["backward"])
    assert counts == [24, 24]


def test_integrated_gradients_add_up_over_time_and_space(toy: ToyClip) -> None:
    heat = probe.video.explain(toy, method="integrated_gradients", size=(4, 8, 8), steps=60, progress=False)
    found = heat.provenance["diagnostics"]
    assert found["change"] == pytest.approx(math.log(0.9 / 0.01), rel=1e-4)
    assert found["completeness_error"] < 0.02
    assert heat.values.shape == (4, 8, 8)


def test_variation_in_time_counts_where_frames_look_alike() -> None:
    mask = torch.zeros(3, 2, 2, dtype=torch.float64)
    mask[1] = 1  # two steps in time, one in space nowhere
    assert float(tv(mask)) == 1.0
    still = torch.zeros(3, 3, 4, 4, dtype=torch.float64)
    assert float(btv(mask, bilateral_weights(still))) == 0.5 * (1 + 1)
    cut = still.clone()
    cut[1:] = 10  # another scene
    assert float(btv(mask, bilateral_weights(cut))) == pytest.approx(0.5 * (1 + 0.5))


# --------------------------------------------------------------------------------------------------------- which frames


def by_definition(weights: list[float], base: float, original: float) -> list[float]:
    """Shapley values as means over all orders of the players."""

    def v(players: tuple[int, ...]) -> float:
        return math.log(base + (original - base) * sum(weights[k] for k in players))

    shares = [0.0] * len(weights)
    orders = list(itertools.permutations(range(len(weights))))
    for each in orders:
        for place, player in enumerate(each):
            shares[player] += (v(each[: place + 1]) - v(each[:place])) / len(orders)
    return shares


def test_shares_are_the_shapley_values() -> None:
    cells = torch.tensor([0.05, 0.6, 0.05, 0.3], dtype=torch.float64)
    toy = ToyClip(cells[:, None, None])
    found = probe.video.which_frames(toy, progress=False)
    assert found.shares == pytest.approx(by_definition(cells.tolist(), 0.01, 0.9), abs=1e-5)
    assert sum(found.shares) == pytest.approx(found.total, abs=1e-5)
    assert found.error == (0.0,) * 4
    assert found.passes == 16
    assert "0.5 s" in str(found)


@pytest.mark.quick
def test_stretches_are_even_and_add_their_frames_up() -> None:
    cells = torch.full((6,), 1 / 6, dtype=torch.float64)
    found = probe.video.which_frames(ToyClip(cells[:, None, None]), segments=3, progress=False)
    assert found.frames == ((0, 2), (2, 4), (4, 6))
    assert found.shares == pytest.approx([found.total / 3] * 3, abs=1e-5)


def test_many_stretches_are_sampled_with_an_error_that_holds() -> None:
    cells = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    toy = ToyClip((cells / cells.sum())[:, None, None])
    truth = probe.video.which_frames(toy, segments=10, progress=False)
    assert truth.error == (0.0,) * 10
    found = probe.video.which_frames(toy, segments=12, orders=100, progress=False)
    exact = by_coalitions((cells / cells.sum()).numpy(), 0.01, 0.9)
    off = np.abs(np.array(found.shares) - exact) / np.array(found.error)
    assert off.max() < 5
    assert sum(found.shares) == pytest.approx(found.total, abs=1e-5)


def by_coalitions(weights: np.ndarray, base: float, original: float) -> np.ndarray:
    """Shapley values as sums over coalitions, by size, from the distribution of what the others carry."""
    count = len(weights)
    shares = np.zeros(count)
    for player in range(count):
        others = np.delete(weights, player)
        members = (np.arange(2 ** (count - 1))[:, None] >> np.arange(count - 1)) & 1
        carried, size = members @ others, members.sum(1)
        gain = np.log(base + (original - base) * (carried + weights[player]))
        gain -= np.log(base + (original - base) * carried)
        means = [gain[size == k].mean() for k in range(count)]  # every size is as likely as any other
        shares[player] = np.mean(means)
    return shares


# ----------------------------------------------------------------------------------------------------- motion and order


class Ordered(ToyClip):
    """Loses so many nats against each baseline."""

    def __init__(self, **lost: float) -> None:
        super().__init__(tube_weights(4, 2, slice(0, 1), slice(0, 1), slice(0, 1)))
        self.lost, self.rounding = lost, torch.full((1,), 0.003)

    def over(self, kind: str, *, seed: int | None = None, **_rest: Any) -> Any:
        lost = self.lost[kind] + 0.25 * (seed or 0)
        return SimpleNamespace(llr=torch.tensor([lost]))


@pytest.mark.parametrize(
    ("shuffled", "frozen", "said"),
    [
        (2.0, 3.0, "needs the order of frames."),
        (0.1, 3.0, "needs several frames, in any order."),
        (0.1, 0.2, "needs neither the order of frames nor more than one of them."),
    ],
)
def test_what_an_answer_needs_of_time(shuffled: float, frozen: float, said: str) -> None:
    toy = Ordered(blur=4.0, first_frame=frozen, middle_frame=frozen + 1, shuffled_frames=shuffled)
    found = probe.video.order(toy, tokens=[0])  # type: ignore[arg-type]
    assert found.verdict.endswith(said)
    assert found.shuffles == pytest.approx((shuffled, shuffled + 0.25, shuffled + 0.5))
    assert found.llr["shuffled_frames"] == pytest.approx(shuffled + 0.25)
    assert found.noise == pytest.approx(0.006) and found.least == 1.0
    assert f"({shuffled:+.2f} to {shuffled + 0.5:+.2f} in 3 orders)" in str(found)
    assert probe.video.Order.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    with pytest.raises(ExplainError, match="not a stored order"):
        probe.video.Order.from_dict({**found.to_dict(), "llr": {"blur": 1.0}})


# --------------------------------------------------------------------------------------------------------------- sanity


def test_other_random_numbers_make_other_maps_of_a_video(toy: ToyClip, tmp_path: Any) -> None:
    few = probe.video.explain(toy, method="rise", size=8, masks=20, cells=(4, 4, 4), progress=False)
    check = probe.sanity.seeds(toy, few, seeds=3)
    assert {one.values.shape for one in check.heatmaps} == {few.values.shape}
    maps = [few.values.ravel(), *(one.values.ravel() for one in check.heatmaps)]
    pairs = [spearmanr(*pair).statistic for pair in itertools.combinations(maps, 2)]
    assert check.stability.rank_correlation == pytest.approx(np.mean(pairs))
    probe.report([check.attached()], out=tmp_path / "page.html")
    assert "Other random numbers:" in (tmp_path / "page.html").read_text()
    same = probe.sanity.seeds(toy, probe.video.explain(toy, method="input_gradient", size=8, progress=False))
    assert same.verdict == "passes" and "draws no random numbers" in same.reason
    with pytest.raises(ExplainError, match="a video that this prompt does not have"):
        probe.sanity.seeds(toy, dataclasses.replace(few, clip=Clip(1, 7)))
    with pytest.raises(ExplainError, match="a video that this prompt does not have"):
        probe.evaluate(dataclasses.replace(few, clip=Clip(1, 7)), toy)
    whole = probe.sanity.completeness(np.full((4, 2), 1.0), toy, [0], image=toy.clips[0])
    assert whole.difference == pytest.approx(math.log(0.9 / 0.01), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------- the heatmap


def test_a_heatmap_is_saved_as_a_strip_and_as_an_animation(
    toy: ToyClip, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    heat = probe.video.explain(toy, method="input_gradient", size=8, progress=False)
    with Image.open(heat.save(tmp_path / "map.gif")) as movie:
        assert movie.n_frames == 8
        assert movie.info["duration"] == 500
        assert b"input_gradient" in movie.info["comment"]
        pixels = [np.asarray(frame.convert("RGB"), float) for frame in frames_of(movie)]
    plain = [np.asarray(frame.resize((480, 480)), float) for frame in toy.trace.images]
    changed = [float(np.abs(one - other)[:, 240:].mean()) for one, other in zip(pixels, plain, strict=True)]
    assert set(np.argsort(changed)[-2:].tolist()) == {4, 5}
    with Image.open(heat.save(tmp_path / "map.png")) as strip:
        assert "clip" in strip.text["lvlm_probe"]
    with pytest.raises(ExplainError, match="GIF or MP4"):
        heat.save(tmp_path / "map.jpg")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "av", None)
        with pytest.raises(ProbeError, match=r"lvlm-probe\[video\]"):
            heat.save(tmp_path / "map.mp4")
    assert not (tmp_path / "map.mp4").exists()
    assert "data:image/png" in heat._repr_html_()


def test_a_figure_has_a_strip_of_frames_and_the_curve_over_time(toy: ToyClip, tmp_path: Any) -> None:
    toy.trace.question, few = "What is there?", {"size": (8, 4, 4)}
    heat = probe.video.explain(toy, method="input_gradient", size=8, progress=False)
    other = probe.video.explain(toy, method="occlusion", lasting=2, progress=False, **few)
    drawn = heat.figure(tmp_path / "map.pdf", dpi=72)
    assert b"input_gradient" in (tmp_path / "map.pdf").read_bytes()
    strip, (curve,) = drawn.axes[:8], [axes for axes in drawn.axes if axes.lines]
    (line,) = curve.lines
    assert np.array_equal(line.get_xdata(), toy.clips[0].times)
    assert np.allclose(line.get_ydata(), heat.over_time)
    assert [text.get_text() for text in drawn.texts].count("2.5 s") == 1
    tops = [axes.get_position().y1 for axes in strip]
    assert len(set(tops)) == 2 and tops == sorted(tops, reverse=True)  # six beside each other, two below
    painted = [axes.images[0].get_array() for axes in strip]
    ground = [np.asarray(image, float)[0, 0] for image in toy.trace.images]
    changed = [np.abs(pixels - colour).max() > 2 for pixels, colour in zip(painted, ground, strict=True)]
    assert changed == [number in (4, 5) for number in range(8)]  # each stretched by the highest of all
    both = probe.figure([heat, other], scores=[probe.evaluate(heat, toy, progress=False), None], dpi=72)
    texts = [text.get_text() for text in both.texts]
    assert any("holds up" in text for text in texts) and "not checked  4 × 4 cells" in texts
    assert len([axes for axes in both.axes if axes.lines]) == 2


def test_a_frame_is_outlined_at_half_of_the_highest_of_all(toy: ToyClip) -> None:
    toy.trace.question, values = "Where?", np.zeros((8, 8, 8), np.float32)
    values[2, :, :4], values[2, :, 4:], values[5, 3, 3] = 0.45, 0.6, 1.0
    heat = ClipHeatmap(values, (48, 48), toy.clips[0], trace=toy.trace)
    frame = heat.frame(2).overlay(mark=False, normalise=False, contour=False)
    outline = np.abs(np.asarray(heat.shown(2, 48), int) - np.asarray(frame, int)).sum(2).any(0)
    # Between 0.45 and 0.6, one pixel on either side; half of its own highest is 0.3.
    assert 0 < outline.sum() <= 2 and 20 <= np.flatnonzero(outline).min() <= np.flatnonzero(outline).max() <= 27
    painted = heat.figure(dpi=72, contour=False).axes[2].images[0].get_array()
    assert np.abs(painted[0, -1].astype(int) - np.asarray(frame, int)[0, -1]).max() <= 1


def frames_of(movie: Image.Image) -> list[Image.Image]:
    shown = []
    for number in range(movie.n_frames):
        movie.seek(number)
        shown.append(movie.copy().convert("RGB"))
    return shown


def test_a_heatmap_is_written_and_read(toy: ToyClip, tmp_path: Any) -> None:
    heat = probe.video.explain(toy, method="input_gradient", size=(4, 8, 8), progress=False)
    path = heat.write(tmp_path / "map.h5")
    again = MapFile(path).read()
    assert isinstance(again, ClipHeatmap)
    assert np.array_equal(again.values, heat.values)
    assert np.array_equal(again.seen, heat.seen)
    assert again.describe() == heat.describe()
    assert again.clip == toy.clips[0]
    with pytest.raises(TraceError, match="it is of a video"):
        Heatmap.read(path)
    other = heat.frame(2).write(tmp_path / "frame.h5")
    assert isinstance(MapFile(other).read(), Heatmap)
    with pytest.raises(TraceError, match="it is of an image"):
        ClipHeatmap.read(other)


def test_a_heatmap_lies_over_a_sheet_of_frames(toy: ToyClip) -> None:
    heat = probe.video.explain(toy, method="input_gradient", size=8, progress=False)
    flat, sheet = heat.on_sheet(), film_sheet(toy.trace.images, heat.clip)
    assert flat.image_size == sheet.size == (2 * 48, 4 * 48)
    assert flat.shape == (32, 16)
    for number in range(8):  # two beside each other
        row, col = number // 2 * 8, number % 2 * 8
        assert np.allclose(flat.values[row : row + 8, col : col + 8], heat.frame(number).values)
        colour = sheet.getpixel((col * 6 + 40, row * 6 + 40))
        assert colour == toy.trace.images[number].getpixel((0, 0))


def test_methods_are_compared_on_a_video(toy: ToyClip, tmp_path: Any) -> None:
    made = probe.compare(
        [toy], {"input_gradient": {"size": 8}, "occlusion": {"size": 8}, "gradcam": {}}, out=tmp_path / "compare.html",
        progress=False,
    )  # fmt: skip
    (row,) = made.rows
    assert [heat.values is not None for heat in row.heats] == [True, True, False]
    assert "needs activations" in row.heats[2].reason
    assert [list(score.params["grid"]) for score in row.scores[:2]] == [[8, 8, 8]] * 2
    text = made.path.read_text()
    assert "Video of 8 frames, from 0.0 s to 3.5 s" in text
    assert "8\u00a0×\u00a08\u00a0×\u00a08" in text
    again = probe.compare(list(row.heats[:2]), scores=list(row.scores[:2]), out=tmp_path / "again.html")
    assert again.methods == ("input_gradient", "occlusion")


@pytest.mark.quick
def test_one_frame_of_a_heatmap_is_a_heatmap(toy: ToyClip) -> None:
    heat = probe.video.explain(toy, method="input_gradient", size=(4, 8, 8), progress=False)
    frame = heat.frame(3)
    assert frame.image_index == 3
    assert np.allclose(frame.values, 0.75 * heat.values[1] + 0.25 * heat.values[2], atol=1e-6)
    for number in (8, -1, 0.5, None, "1"):  # of a negative one another image of the prompt was shown
        for shown in (heat.frame, heat.image):
            with pytest.raises(ExplainError, match="counted from 0"):
                shown(number)
    with pytest.raises(ExplainError, match="side is a number of pixels"):
        heat.preview(0)


def test_values_are_what_they_say() -> None:
    clip = Clip(0, 2)
    with pytest.raises(ExplainError, match=r"\(t, row, col\)"):
        ClipHeatmap(np.zeros((2, 2)), (4, 4), clip)
    with pytest.raises(ExplainError, match="needs a reason"):
        ClipHeatmap(None, (4, 4), clip)
    with pytest.raises(ImageError, match="no frames at hand"):
        ClipHeatmap(np.zeros((2, 2, 2)), (4, 4), clip).overlay()


# ------------------------------------------------------------------------------------------------------ what is refused


def test_what_does_not_explain_by_a_video_says_so(toy: ToyClip) -> None:
    assert "stills" not in METHODS
    register("stills")(lambda problem: Outcome(None, reason="never run"))
    try:
        with pytest.raises(ExplainError, match=r"stills does not explain by a video; these do: attention, .*center"):
            probe.video.explain(toy, method="stills")
    finally:
        del METHODS["stills"]
    with pytest.raises(ExplainError, match=r"frame of a video: probe.video.explain"):
        probe.explain(toy)
    with pytest.raises(ExplainError, match=r"has 1 video\(s\)"):
        probe.video.explain(toy, clip=1)
    with pytest.raises(ExplainError, match="no explainer"):
        probe.video.explain(toy, method="nothing")
    with pytest.raises(ExplainError, match="segments is between 1 and 8"):
        probe.video.which_frames(toy, segments=9)
    for ask in (probe.video.which_frames, probe.video.order):
        with pytest.raises(ExplainError, match="'sharp' is another score: select the words alone"):
            ask(toy, tokens=probe.score(lambda given: given.log_probs[:, 0], name="sharp", steps=[0]))
    with pytest.raises(ExplainError, match="at least one step in time"):
        probe.video.explain(toy, method="input_gradient", size=(0, 4, 4))
    with pytest.raises(ExplainError, match=r"leave grid out"):
        probe.evaluate(probe.video.explain(toy, method="input_gradient", progress=False), toy, grid=4)


def test_what_cannot_be_shown_of_a_video_says_so(toy: ToyClip, tmp_path: Any) -> None:
    heat = probe.video.explain(toy, method="input_gradient", size=8, progress=False)
    with pytest.raises(ReportError, match="shows one of the two"):
        probe.report([heat, heat.frame(0)], out=tmp_path / "report.html")  # type: ignore[list-item]
    with pytest.raises(ImageError, match="drawn on the frames of its trace"):
        probe.figure(heat, images=[toy.trace.images[0]])
    assert not list(tmp_path.iterdir())


def test_a_video_that_plays_no_part_has_no_heatmap() -> None:
    toy = ToyClip(torch.zeros(4, 2, 2), original=(0.5,), base=(0.5,))
    heat = probe.video.explain(toy, tokens=[0], progress=False)
    assert not heat
    assert "the clip plays no part" in heat.reason
