"""Servers that give less than log-probabilities: bounds by what is likeliest, or samples."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from demo_server import DemoServer, serving

import lvlm_probe as probe
from lvlm_probe.explainers import methods, needs_of
from lvlm_probe.serving.journal import Journal

RISE: dict[str, Any] = {"method": "rise", "masks": 40, "cells": 3, "size": 6, "score": "prob", "strengthen": False}
CLOSE = 2e-4


def nameless(number: int, body: dict[str, Any]) -> str:
    """A hosted API: log-probabilities of texts, no token ids."""
    return "no_ids"


def mute(number: int, body: dict[str, Any]) -> str:
    """An API that says nothing but text."""
    return "ignored"


@pytest.fixture(scope="module")
def behind_top(demo: Any) -> Iterator[DemoServer]:
    with serving(*demo, {"top"}) as behind:
        behind.fault = nameless
        yield behind


@pytest.fixture(scope="module")
def behind_samples(demo: Any) -> Iterator[DemoServer]:
    with serving(*demo, {"samples"}) as behind:
        behind.fault = mute
        yield behind


@pytest.fixture(scope="module")
def bounded(behind_top: DemoServer, scene: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Any]]:
    """Replays by the likeliest 20 tokens, and by the likeliest one."""
    with (
        probe.connect(behind_top.url, road="top (20)") as many,
        probe.connect(behind_top.url, road="top (1)") as one,
    ):
        yield {
            number: asked(server, scene, tmp_path_factory.mktemp("top")) for number, server in ((20, many), (1, one))
        }


@pytest.fixture(scope="module")
def sampled(behind_samples: DemoServer, scene: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A replay by samples, one request at a time: their order decides what is drawn."""
    with probe.connect(behind_samples.url, concurrency=1) as server:
        yield asked(server, scene, tmp_path_factory.mktemp("sampled"))


@pytest.fixture(scope="module")
def local(demo: Any, scene: Any) -> Any:
    return probe.ask(*demo, scene.image, scene.question).replay


@pytest.fixture(scope="module")
def named(local: Any, scene: Any) -> Any:
    """The words that the image decides."""
    return probe.select_tokens(local).text


def exact_map(local: Any, **options: Any) -> Any:
    """RISE on the model itself, with real composites."""
    other = copy.copy(local)
    other.log_probs = functools.partial(local.log_probs, mode="exact")
    return probe.explain(other, **options)


def asked(server: Any, scene: Any, folder: Any) -> Any:
    return probe.replay(server.ask(scene.image, scene.question, out=folder), server)


# --------------------------------------------------------------------------------------------------------------- bounds


def test_a_token_is_known_where_it_is_listed_and_bounded_where_not(bounded: dict[int, Any], local: Any) -> None:
    masks = torch.rand(8, 3, 3, generator=torch.Generator().manual_seed(1)).round()
    wanted = local.log_probs(masks, mode="exact")
    shares = []
    for replay in bounded.values():
        assert replay.server.gives == "bounds"
        steps = [step for step in range(len(replay.tokens)) if not replay.special[step]]
        assert "".join(replay.tokens).strip() == local.trace.answer
        low, high = (ends[:, steps] for ends in replay.between(masks, steps=steps))
        truth = wanted[:, steps]
        assert bool((low <= truth + CLOSE).all()) and bool((truth <= high + CLOSE).all())
        known = low == high
        assert float((low - truth)[known].abs().max()) < CLOSE
        shares.append(float(known.float().mean()))
    assert shares[0] == 1.0 and 0 < shares[1] < 1.0  # 20 of 137 words hold them all, one does not


@pytest.mark.quick
def test_rise_by_bounds_is_off_by_no_more_than_it_says(bounded: dict[int, Any], local: Any, named: str) -> None:
    wanted = exact_map(local, tokens=named, **RISE)
    truth = wanted.values * wanted.provenance["diagnostics"]["unit"]
    for number, replay in bounded.items():
        heat = probe.explain(replay, tokens=named, **RISE)
        found = heat.provenance["diagnostics"]
        assert heat.provenance["server"]["gives"] == "bounds"
        assert ("bound_max" in found) == (number == 1)
        allowed = found.get("bound_max", 0.0) * found["unit"] + 2e-3 * max(found["unit"], float(truth.max()))
        assert np.abs(heat.values * found["unit"] - truth).max() <= allowed
        assert np.corrcoef(heat.values.ravel(), wanted.values.ravel())[0, 1] > 0.9


def test_where_bounds_say_too_little_there_is_a_reason_and_no_map(bounded: dict[int, Any], named: str) -> None:
    replay = copy.copy(bounded[1])

    def unlisted(masks: torch.Tensor, **options: Any) -> Any:
        low, high = bounded[1].between(masks, **options)
        return torch.full_like(low, -math.inf), high

    replay.between, replay.counted = unlisted, lambda: replay
    heat = probe.explain(replay, tokens=named, **RISE)
    assert heat.values is None and "no place is certain to matter" in heat.reason


def test_two_tokens_of_one_text_are_a_bound() -> None:
    from lvlm_probe.serving.messages import Prompt, Said
    from lvlm_probe.serving.roads import Top, Untrue

    said = Said(Prompt("?"), "cat", (-1,), ("cat",), (False,), ())

    def read(*listed: tuple[str, float]) -> Any:
        top = [{"token": text, "logprob": value} for text, value in listed]
        return Top(5).read(said, {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}, 0)[0]

    assert read(("dog", -1.0), ("cat", -2.0)) == -2.0
    assert read(("cat", -1.0), ("cat", -2.0)) == (-2.0, -1.0)
    low, high = read(("dog", math.log(0.6)), ("cow", math.log(0.3)))
    assert low == -math.inf and high == pytest.approx(math.log(0.1), abs=2e-2)
    low, high = read(("dog", math.log(0.6)), ("cow", math.log(0.05)))
    assert high == pytest.approx(math.log(0.05))  # what is not listed is no likelier than the last that is
    with pytest.raises(Untrue, match=r"add up to 1\.2"):
        read(("dog", math.log(0.6)), ("cow", math.log(0.6)))


# -------------------------------------------------------------------------------------------------------------- samples


@pytest.mark.quick
def test_rise_by_samples_is_within_its_error_of_the_exact_map(
    behind_samples: DemoServer, sampled: Any, local: Any, named: str
) -> None:
    behind_samples.luck.manual_seed(5)
    options = {**RISE, "masks": 60, "cells": 2, "size": 4}
    assert sampled.server.road == "sampling" and sampled.server.gives == "samples"
    assert sampled.trace.answer.strip() == local.trace.answer and np.isnan(sampled.trace.log_probs).all()
    heat = probe.explain(sampled, tokens=named, **options)
    before = sampled.server.spent.requests
    again = probe.explain(sampled, tokens=named, **options)
    assert sampled.server.spent.requests == before  # a draw is kept as any answer
    assert np.array_equal(again.values, heat.values)
    wanted = exact_map(local, tokens=named, **options)
    found, truth = heat.provenance["diagnostics"], wanted.provenance["diagnostics"]
    error = found["standard_error_max"] * found["unit"]
    assert error > truth["standard_error_max"] * truth["unit"]  # that of the draws comes on top of that of the masks
    apart = heat.values * found["unit"] - wanted.values * truth["unit"]
    assert np.abs(apart).max() < 4 * error
    lines = (sampled.trace.path.parent / "served.jsonl").read_text().splitlines()
    drawn = [value for line in lines for value in json.loads(line)["log_probs"].values()]
    assert set(drawn) == {0.0, None}


def test_samples_follow_the_models_probabilities(behind_samples: DemoServer, sampled: Any, local: Any) -> None:
    """Of one mask, drawn again and again: the share of hits is P, within five standard errors."""
    masks = torch.linspace(0, 1, 33)[:, None, None]
    found = local.log_probs(masks, mode="exact").exp()[:, : local.special.tolist().index(True)]
    row, step = map(int, (found - 0.5).abs().eq((found - 0.5).abs().min()).nonzero()[0])
    p, number = float(found[row, step]), 100
    assert 0.05 < p < 0.95
    behind_samples.luck.manual_seed(11)
    images = sampled.path.composites(masks[row, None])
    hits = sampled._forcing.between([lambda: images] * number, [step], fresh=True)[0]
    assert abs(float(hits[:, step].exp().mean()) - p) < 5 * math.sqrt(p * (1 - p) / number)


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("by", ["bounds", "samples"])
def test_what_does_not_stay_right_is_refused_by_name_before_anything_is_sent(
    by: str, behind_top: DemoServer, behind_samples: DemoServer, bounded: dict[int, Any], sampled: Any, named: str
) -> None:
    behind, replay = (behind_top, bounded[1]) if by == "bounds" else (behind_samples, sampled)
    before = behind.count
    for method in [name for name in methods() if needs_of(name) and name != "rise"]:
        with pytest.raises(probe.errors.ExplainError, match=r"does not give but for (bounds|samples): use rise"):
            probe.explain(replay, method=method, tokens=named)
    with pytest.raises(probe.errors.SelectionError, match="words="):
        probe.explain(replay, **RISE)
    with pytest.raises(probe.errors.ExplainError, match="score='prob'"):
        probe.explain(replay, tokens=named, **{**RISE, "score": "log"})
    floor = probe.explain(replay, method="center", tokens=named)
    with pytest.raises(probe.errors.ExplainError, match=r"(bounds|samples) in the place of log-probabilities"):
        probe.evaluate(floor, replay)
    with pytest.raises(probe.errors.ReplayError, match="cannot be measured through it"):
        replay.server.measured_answer(replay.trace.images, "What?", "A cat")
    assert behind.count == before


def test_several_tokens_by_samples_take_the_mean_of_their_probabilities(
    sampled: Any, scene: Any, tmp_path: Any
) -> None:
    with pytest.raises(probe.errors.ExplainError, match="would be biased: use score='prob'"):
        probe.explain(sampled, tokens=(0, 2), **{**RISE, "score": "geometric"})
    with pytest.raises(probe.errors.ReplayError, match="the greedy one, without sampling="):
        sampled.server.ask(scene.image, scene.question, out=tmp_path, sampling={"temperature": 1})


def test_a_token_without_a_text_of_its_own_is_named() -> None:
    from lvlm_probe.serving.messages import Prompt, Said
    from lvlm_probe.serving.roads import Sampled, Top

    said = Said(
        Prompt("?"), "I 🙂!", (-1,) * 4, ("I ", "", "🙂", "!"), (False,) * 4, (), texts=("I ", "\ufffd", "\ufffd", "!")
    )
    for road in (Top(5), Sampled("sampling", {})):
        for step in (1, 2):
            with pytest.raises(probe.errors.ReplayError, match=f"token {step} of the answer.*whole characters"):
                road.request(said, [], step)
        assert road.request(said, [], 3)[1]["messages"][-1]["content"] == "I 🙂"


# --------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("logits", "which none is|add up to|differ by up to"),
        ("half", "differ by up to"),
        ("no_image", "do not arrive at the model|differ by up to"),
        ("other_model", "an answer of another model|differ by up to"),
    ],
)
def test_lies_about_what_is_likeliest_are_found_out(fault: str, said: str, demo: Any) -> None:
    with serving(*demo, {"top"}) as behind:
        behind.fault = lambda number, body: fault if body["max_tokens"] == 1 else None
        with pytest.raises(probe.errors.ReplayError, match=said):
            probe.connect(behind.url, road="top")


def test_where_ids_are_named_they_have_to_be_the_right_ones(demo: Any) -> None:
    with serving(*demo, {"top", "samples"}) as behind:
        behind.fault = lambda number, body: "wrong_ids" if body["max_tokens"] == 1 else None
        with pytest.raises(probe.errors.ReplayError, match="other tokens than they are"):
            probe.connect(behind.url, road="top")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("greedy", "does not sample: 16 answers"),
        ("new turn", "does not go on with an answer that was begun"),
        ("no image", "the answer is the same when the image is replaced"),
    ],
)
def test_a_server_that_cannot_be_sampled_is_refused_by_its_reason(what: str, said: str, demo: Any) -> None:
    with serving(*demo, {"allowed"} if what == "greedy" else {"samples"}) as behind:
        behind.goes_on = what != "new turn"
        ignored = mute
        behind.fault = ignored
        if what == "no image":
            behind.sees_images = False
        with pytest.raises(probe.errors.ReplayError, match=said):
            probe.connect(behind.url)


def test_samples_of_another_model_are_forgotten(
    behind_samples: DemoServer, scene: Any, named: str, tmp_path: Any
) -> None:
    try:
        with probe.connect(behind_samples.url) as server:
            replay = asked(server, scene, tmp_path)
            behind_samples.flipped = True
            with pytest.raises(probe.errors.ModelMismatch, match="now answers"):
                probe.explain(replay, tokens=named, **RISE)
    finally:
        behind_samples.flipped = False
    lines = (tmp_path / "served.jsonl").read_text().splitlines()
    assert '"drop"' in lines[-1] and not len(Journal(tmp_path / "served.jsonl"))
