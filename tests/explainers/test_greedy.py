"""Greedy search against a brute-force search written out here, and against the best of all subsets."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from toy_replay import ToyReplay, box_weights

from lvlm_probe.errors import ExplainError, ImageError
from lvlm_probe.explainers import Problem, explain
from lvlm_probe.explainers.greedy import regions_of
from lvlm_probe.selection import select_tokens


class Interacting(ToyReplay):
    """P of two tokens on a 2 × 3 picture, with pairs of cells that only help together: no order is obvious."""

    def __init__(self, seed: int) -> None:
        super().__init__(torch.full((2, 2, 3), 1 / 6), original=[0.9, 0.8], base=[0.02, 0.05])
        generator = torch.Generator().manual_seed(seed)
        self.single = torch.rand(2, 6, generator=generator, dtype=torch.float64)
        self.pair = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64) * 2

    def log_probs(self, mask=None, **_):  # type: ignore[no-untyped-def]
        mask = torch.ones(1, 2, 3) if mask is None else mask
        self.passes.add(forward=len(mask))
        cells = mask.double().flatten(1)
        logit = cells @ self.single.T + torch.einsum("bi,tij,bj->bt", cells, self.pair, cells) - 1.5
        return torch.nn.functional.logsigmoid(logit).float()


def brute_force(replay: ToyReplay, l1: float, l2: float) -> tuple[list[int], list[float]]:
    """The greedy order over the cells of a 2 × 3 picture, one mask at a time, from the definition."""

    def probability(shown: set[int]) -> float:
        mask = torch.tensor([[[1.0 if 3 * row + col in shown else 0.0 for col in range(3)] for row in range(2)]])
        return float(replay.log_probs(mask)[0].double().exp().mean())

    def worth(chosen: set[int]) -> float:
        return l1 * probability(chosen) + l2 * (1 - probability(set(range(6)) - chosen))

    order: list[int] = []
    track = [worth(set())]
    for _ in range(6):
        scores = {cell: worth({*order, cell}) for cell in range(6) if cell not in order}
        order.append(max(scores, key=lambda cell: scores[cell]))
        track.append(scores[order[-1]])
    return order, track


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("lambdas", [(1.0, 1.0), (1.0, 0.0), (0.3, 2.0)])
def test_exact_search_equals_brute_force_on_six_regions(seed: int, lambdas: tuple[float, float]) -> None:
    replay = Interacting(seed)
    order, track = brute_force(replay, *lambdas)
    before = replay.passes.forward
    options = {"segments": "grid", "regions": (2, 3), "tokens": (0, 2)}
    heat = explain(replay, method="greedy", search="exact", l1=lambdas[0], l2=lambdas[1], **options)
    assert replay.passes.forward - before == 6 * 7 + 2 == heat.provenance["diagnostics"]["images"]
    assert [record["region"] for record in heat.history[1:]] == order
    assert np.allclose([record["worth"] for record in heat.history], track, atol=1e-6)
    assert np.argsort(-heat.values.ravel(), kind="stable").tolist() == order
    assert len(set(heat.values.ravel().tolist())) == 6
    # Value: what was still missing of the whole rise before the region was taken.
    highest = np.maximum.accumulate(track)
    missing = 1 - (highest[:-1] - track[0]) / (highest[-1] - track[0])
    assert np.allclose(heat.values.ravel()[order], missing, atol=1.1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_fast_search_without_short_cuts_is_the_exact_one(seed: int) -> None:
    replay = Interacting(seed)
    options = {"segments": "grid", "regions": (2, 3), "tokens": (0, 2), "method": "greedy"}
    exact = explain(replay, search="exact", **options)
    full = explain(replay, rescan=1, pending=0, **options)
    assert np.array_equal(exact.values, full.values)
    fast = explain(replay, rescan=2, top=2, pending=2, **options)
    assert sorted(record["region"] for record in fast.history[1:]) == list(range(6))
    assert fast.provenance["diagnostics"]["images"] < exact.provenance["diagnostics"]["images"]


class Covering(ToyReplay):
    """P rises with the weight of the facts that the shown cells cover: monotone and submodular."""

    def __init__(self, seed: int) -> None:
        super().__init__(torch.full((2, 4), 1 / 8))
        generator = torch.Generator().manual_seed(seed)
        self.covers = (torch.rand(8, 12, generator=generator) < 0.3).double()
        self.value = torch.rand(12, generator=generator, dtype=torch.float64)

    def log_probs(self, mask=None, **_):  # type: ignore[no-untyped-def]
        mask = torch.ones(1, 2, 4) if mask is None else mask
        known = (mask.double().flatten(1)[:, :, None] * self.covers).amax(dim=1) @ self.value / self.value.sum()
        return (0.01 + 0.98 * known).log()[:, None].float()


@pytest.mark.parametrize("seed", range(8))
def test_exact_search_keeps_its_promise_on_a_submodular_worth(seed: int) -> None:
    replay = Covering(seed)
    options = {"segments": "grid", "regions": (2, 4), "tokens": (0, 1)}
    heat = explain(replay, method="greedy", search="exact", l1=1.0, l2=0.0, **options)
    track = [record["worth"] for record in heat.history]
    for count in range(1, 8):
        sets = list(itertools.combinations(range(8), count))
        masks = torch.zeros(len(sets), 8)
        for row, members in enumerate(sets):
            masks[row, list(members)] = 1
        best = float(replay.log_probs(masks.reshape(-1, 2, 4)).exp().max())
        assert track[count] - track[0] >= (1 - math.exp(-1)) * (best - track[0]) - 1e-6
        assert track[count] <= best + 1e-6


def test_superpixels_follow_the_picture_and_lead_to_the_object() -> None:
    # The toy's picture: a red square over pixels 8 … 39 of 64.
    weights = torch.zeros(64, 64)
    weights[8:40, 8:40] = 1 / 32**2
    replay = ToyReplay(weights)
    problem = Problem(replay, select_tokens(replay))
    labels = regions_of(problem, "slic", 16)
    assert labels.shape == (64, 64)
    shares = {number: float((weights > 0)[labels == number].float().mean()) for number in labels.unique().tolist()}
    assert all(share < 0.1 or share > 0.9 for share in shares.values())  # no superpixel straddles the border
    heat = explain(replay, method="greedy", regions=16)
    value = {number: float(heat.values[(labels == number).numpy()][0]) for number in shares}
    on = [value[number] for number, share in shares.items() if share > 0.9]
    off = [value[number] for number, share in shares.items() if share < 0.1]
    assert min(on) > max(off)
    assert len(set(value.values())) == len(value)
    assert heat.params["segments"] == "slic"


def test_fast_search_costs_a_fraction_and_finds_the_box() -> None:
    box = box_weights(8, slice(1, 3), slice(4, 7))
    told: list[tuple[int, int]] = []
    heat = explain(
        ToyReplay(box), method="greedy", segments="grid", regions=64, progress=lambda a, b: told.append((a, b))
    )
    assert heat.provenance["passes"]["forward"] == heat.provenance["diagnostics"]["images"] < 1500
    assert len(np.unique(heat.values)) == 64
    inside = box.numpy() > 0
    assert heat.values[inside].min() > heat.values[~inside].max()
    assert told[0] == (0, 64)
    assert told[-1] == (64, 64)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_regions_out_of_sight_are_left_alone() -> None:
    seen = torch.ones(64, 64, dtype=torch.bool)
    seen[:, :16] = False
    heat = explain(
        ToyReplay(box_weights(8, slice(1, 3), slice(4, 7)), seen=seen), method="greedy", segments="grid", regions=64
    )
    assert heat.provenance["diagnostics"]["regions"] == 48
    assert (heat.values[:, :2] == 0).all()
    assert (heat.values[:, 2:] > 0).all()
    blind = ToyReplay(torch.ones(1, 1), seen=torch.zeros(64, 64, dtype=torch.bool))
    assert "sees no part" in str(explain(blind, method="greedy", segments="grid").reason)


def test_no_rise_is_a_reason() -> None:
    flat = explain(
        ToyReplay(torch.ones(1, 1), original=[0.4], base=[0.5]), method="greedy", segments="grid", tokens=(0, 1)
    )
    assert flat.values is None
    assert "no set of regions" in str(flat.reason)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"segments": "voronoi"}, "segments is 'slic' or 'grid'"),
        ({"search": "lazy"}, "search is 'fast' or 'exact'"),
        ({"regions": 0}, "regions is a whole number of at least 1"),
        ({"regions": (2, 3)}, "regions is a whole number"),
        ({"l1": -1.0}, "l1 is not negative"),
        ({"l1": 0.0, "l2": 0.0}, "not 0 when l1 is"),
        ({"rescan": 0}, "rescan is"),
        ({"pending": -1}, "pending is a whole number of at least 0"),
        ({"batch": 1}, "batch is a whole number of at least 2"),
    ],
)
def test_refusals(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ExplainError, match=message):
        explain(ToyReplay(torch.ones(2, 2) / 4), method="greedy", **wrong)


@pytest.mark.quick
def test_what_superpixels_need_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pictureless(ToyReplay):
        def image(self, k: int = 0):  # type: ignore[no-untyped-def]
            raise ImageError("the trace holds no picture")

        def __init__(self) -> None:
            self.image = super().image  # type: ignore[method-assign]
            super().__init__(torch.ones(2, 2) / 4)
            del self.image

    with pytest.raises(ExplainError, match=r"no image to cut into superpixels.*use segments='grid'"):
        explain(Pictureless(), method="greedy")
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    with pytest.raises(ExplainError, match=r"pip install 'lvlm-probe\[superpixels\]', or segments='grid'"):
        explain(ToyReplay(torch.ones(2, 2) / 4), method="greedy")
