"""Greedy search against a brute-force search written out here, and against the best of all subsets."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from toy_replay import ToyReplay, box_weights

from lvlm_probe.errors import ExplainError, ImageError
from lvlm_probe.explainers import Problem, explain
from lvlm_probe.explainers.greedy import greedy, regions_of
from lvlm_probe.explainers.registry import cost_of
from lvlm_probe.metrics import evaluate
from lvlm_probe.replaying.own_scores import OwnScore
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
    # Of 6 · 7 + 2 images some are one: all but the last three is what showing only the first three is, and so on.
    assert replay.passes.forward - before == heat.provenance["diagnostics"]["images"] <= 6 * 7
    assert [record["region"] for record in heat.history[1:]] == order
    assert np.allclose([record["worth"] for record in heat.history], track, atol=1e-6)
    assert np.argsort(-heat.values.ravel(), kind="stable").tolist() == order
    assert len(set(heat.values.ravel().tolist())) == 6
    # Value: what was still missing of the whole rise before the region was taken.
    highest = np.maximum.accumulate(track)
    missing = 1 - (highest[:-1] - track[0]) / (highest[-1] - track[0])
    assert np.allclose(heat.values.ravel()[order], missing, atol=1.1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_a_window_over_all_regions_is_exact_search(seed: int) -> None:
    options = {"segments": "grid", "regions": (2, 3), "tokens": (0, 2), "method": "greedy"}
    exact = explain(Interacting(seed), search="exact", **options)
    full = explain(Interacting(seed), window=6, enough=1.1, **options)
    assert np.array_equal(exact.values, full.values) and exact.history == full.history
    windowed = explain(Interacting(seed), window=1, **options)
    assert windowed.provenance["diagnostics"]["images"] < exact.provenance["diagnostics"]["images"]


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


def shown(replay: ToyReplay, cells: set[int]) -> float:
    mask = torch.tensor([float(cell in cells) for cell in range(6)]).reshape(1, 2, 3)
    return float(replay.log_probs(mask)[0].double().exp().mean())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("lambdas", [(1.0, 1.0), (1.0, 0.0), (0.5, 1.0)])
def test_windowed_search_by_hand(seed: int, lambdas: tuple[float, float]) -> None:
    """The first region is the better of the two that hiding alone ranks first; what is left stands in the order of F
    with it."""
    replay, everything, (l1, l2) = Interacting(seed), set(range(6)), lambdas

    def worth(cells: set[int]) -> float:
        return l1 * shown(replay, cells) + l2 * (1 - shown(replay, everything - cells))

    alone = {cell: -shown(replay, everything - {cell}) if l2 else shown(replay, {cell}) for cell in range(6)}
    window = sorted(alone, key=lambda cell: -alone[cell])[:2]
    first = max(window, key=lambda cell: worth({cell}))
    heat = explain(
        Interacting(seed), method="greedy", segments="grid", regions=(2, 3), tokens=(0, 2), window=2, enough=1e-6,
        l1=l1, l2=l2,
    )  # fmt: skip
    order = np.argsort(-heat.values.ravel(), kind="stable").tolist()
    taken = len(heat.history) - 1
    assert heat.history[1]["region"] == order[0] == first
    assert [record["worth"] for record in heat.history] == pytest.approx(
        [worth(set(order[:length])) for length in range(taken + 1)], abs=1e-6
    )
    assert taken < 6
    beside = {cell: worth({*order[:taken], cell}) for cell in order[taken:]}
    assert order[taken:] == sorted(beside, key=lambda cell: -beside[cell])


def test_rounds_that_add_little_are_followed_by_a_look_at_all_and_then_by_none() -> None:
    """Hiding alone points to three cells that do nothing else; one of two that make the words likely is found in the
    look at all that are left. What three more would add together, no round sees."""

    class Misleading(ToyReplay):
        def log_probs(self, mask=None, **_):  # type: ignore[no-untyped-def]
            mask = torch.ones(1, 4, 4) if mask is None else mask
            cells = mask.double().flatten(1)
            lost = (1 - cells[:, :3]).sum(dim=1) * (cells.sum(dim=1) >= 13)  # while nearly all is shown
            found = 0.4 * cells[:, 9:11].amax(dim=1) + 0.5 * (cells[:, 12:].sum(dim=1) >= 3)
            return (0.05 + found - 0.01 * lost).log()[:, None].float()

    replay = Misleading(torch.full((4, 4), 1 / 16), original=[0.95])
    heat = explain(replay, method="greedy", segments="grid", regions=(4, 4), window=1, l1=1.0, l2=0.01, tokens=(0, 1))
    said = heat.provenance["diagnostics"]
    order = [int(record["region"]) for record in heat.history[1:]]
    assert set(order[:2]) <= {0, 1, 2} and order[2] == 9
    assert said["stopped"] == "more regions did not help"
    sent = [point["images"] for point in said["curve"]]
    looks = [later - before for before, later in itertools.pairwise(sent)]
    assert max(looks) > 20 and sorted(looks)[-2] <= 6, "one round over all that were left"


@pytest.mark.parametrize("seed", range(3))
def test_with_a_budget_the_map_is_the_best_so_far(seed: int) -> None:
    options = {"segments": "grid", "regions": (2, 3), "tokens": (0, 2), "method": "greedy", "window": 2, "enough": 1.1}
    whole = explain(Interacting(seed), **options)
    curve = whole.provenance["diagnostics"]["curve"]
    assert [point["regions"] for point in curve] == [1, 2, 3, 4, 5, 6]
    for point, following in itertools.pairwise(curve):
        budget = int(following["images"]) - 1
        if budget < point["images"]:
            continue  # the next round sent nothing new
        replay = Interacting(seed)
        part = explain(replay, budget=budget, **options)
        said = part.provenance["diagnostics"]
        taken = int(point["regions"])
        assert replay.passes.forward == said["images"] <= budget
        assert said["stopped"] == f"the budget of {budget} images is spent"
        assert said["curve"][:taken] == curve[:taken] and part.history == whole.history[: taken + 1]
        order = np.argsort(-part.values.ravel(), kind="stable").tolist()
        assert order[:taken] == np.argsort(-whole.values.ravel(), kind="stable").tolist()[:taken]
        assert len(set(part.values.ravel().tolist())) == 6
    with pytest.raises(ExplainError, match="a budget of 7 images is less than the 8 that a first look at 6 regions"):
        explain(Interacting(seed), budget=7, **options)
    with pytest.raises(ExplainError, match="a budget of 13 images is less than the 14 that a first look"):
        explain(Interacting(seed), budget=13, **{**options, "search": "exact"})
    least = explain(Interacting(seed), budget=8, **options)
    assert len(least.history) == 1 and least.provenance["diagnostics"]["images"] == 8


@pytest.mark.parametrize("seed", range(3))
def test_the_curve_is_insertion_less_deletion_of_the_map(seed: int) -> None:
    """The last point is what ``evaluate`` finds on the same cells, which scores every mask itself."""
    replay = Interacting(seed)
    ends = replay.log_probs(torch.stack([torch.ones(2, 3), torch.zeros(2, 3)])).double().exp()
    replay.probability, replay.base_probability = ends
    options = {"segments": "grid", "regions": (2, 3), "tokens": (0, 2), "strengthen": False}
    heat = explain(replay, method="greedy", search="exact", **options)
    score = evaluate(heat, replay, grid=(2, 3), steps=6)
    assert heat.provenance["diagnostics"]["curve"][-1]["gain"] == pytest.approx(score.gain, abs=1e-5)


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


def test_the_search_ends_when_the_box_is_found() -> None:
    box = box_weights(8, slice(1, 3), slice(4, 7))
    told: list[tuple[int, int]] = []
    heat = explain(
        ToyReplay(box), method="greedy", segments="grid", regions=64, progress=lambda a, b: told.append((a, b))
    )
    said = heat.provenance["diagnostics"]
    assert heat.provenance["passes"]["forward"] == said["images"] <= 3 * 64 + 2 * (1 + 2) + 2 * 4 * 7
    assert said["stopped"].startswith("100.0% of what")
    assert [point["regions"] for point in said["curve"]] == [1, 2, 3, 4, 5, 6, 7, 7]  # the box, one in vain, the map
    assert len(np.unique(heat.values)) == 64
    inside = box.numpy() > 0
    assert heat.values[inside].min() > heat.values[~inside].max()
    assert told[0] == (0, 64)
    assert told[-1] == (64, 64)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_plan_holds_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    replay, sent = ToyReplay(box_weights(8, slice(1, 3), slice(4, 7))), list[int]()
    log_probs = ToyReplay.log_probs
    monkeypatch.setattr(
        ToyReplay, "log_probs", lambda self, mask, **given: sent.append(len(mask)) or log_probs(self, mask, **given)
    )
    problem = Problem(replay, select_tokens(replay))
    for params in ({}, {"search": "exact"}, {"budget": 150}, {"window": 1}, {"batch": 12}):
        cost = cost_of("greedy", problem, {"segments": "grid", "regions": 64, **params})
        sent.clear()
        taken = explain(replay, method="greedy", segments="grid", regions=64, **params).provenance["passes"]["forward"]
        assert max(sent) == max(cost.groups), params
        assert (cost.at_least or (0,))[0] <= taken <= cost.forward, params
        assert (cost.at_least is None) == ("search" in params)


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
    assert "no set of regions that was tried" in str(flat.reason)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"segments": "voronoi"}, "segments is 'slic' or 'grid'"),
        ({"search": "lazy"}, "search is 'windowed' or 'exact'"),
        ({"regions": 0}, "regions is a whole number of at least 1"),
        ({"regions": (2, 3)}, "regions is a whole number"),
        ({"l1": -1.0}, "l1 is not negative"),
        ({"l1": 0.0, "l2": 0.0}, "not 0 when l1 is"),
        ({"window": 0}, "window is a whole number of at least 1"),
        ({"enough": 0.0}, "enough is a positive number"),
        ({"budget": 0}, "budget is a whole number of at least 1"),
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


def test_a_score_that_is_no_probability_has_no_limit_of_one() -> None:
    """The first region alone is worth more than all together: with P's limit of 1 the search would end behind it."""
    parts = torch.tensor([10.0, 5.0, 4.0, -6.0, -6.0, -6.0], dtype=torch.float64)

    class Sums(ToyReplay):
        def log_probs(self, mask=None, **_):  # type: ignore[no-untyped-def]
            return (mask.double().flatten(1) @ parts[:, None]).expand(-1, 4)

    replay = Sums(torch.full((1, 2, 3), 1 / 6))
    own = OwnScore("sum", lambda given: given.log_probs.sum(dim=1), (0,))
    selection = dataclasses.replace(select_tokens(replay, indices=[0]), score=own)
    found = greedy(Problem(replay, selection), segments="grid", regions=(2, 3), window=2)
    assert [record["region"] for record in found.history[1:4]] == [0, 1, 2]
