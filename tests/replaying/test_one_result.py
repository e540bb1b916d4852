"""One result, whatever came before: a replay is a value, what runs is counted, and modes of torch change nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flat_memory
import numpy as np
import pytest
import torch
from marks import campaign
from PIL import Image

import lvlm_probe as probe
from lvlm_probe import causal
from lvlm_probe.planning import plan_for
from lvlm_probe.sanity import answers, seeds, weights

METHODS: dict[str, dict[str, Any]] = {
    "igos++": {},
    "igos+": {"iterations": 1, "ig_steps": 2},
    "integrated_gradients": {"steps": 4},
    "input_gradient": {},
    "gradcam": {},
    "tmm": {},
    "iia": {"variant": "iia2", "points": 2},
    "rise": {"masks": 12},
    "occlusion": {"size": 4},
    "greedy": {"regions": 4},
    "rollout": {},
    "attention": {},
    "relative_attention": {},
    "tam": {},
    "gradient_attention": {},
    "weighted_tmm": {},
    "gradient_value": {},
    "attention_flow": {},
    "refined": {"of": "tmm", "earlier": 1},
    "random": {},
    "center": {},
}


@pytest.fixture(scope="module")
def recorded(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An answer whose word keeps its probability on the recorded baseline, so that explaining strengthens it."""
    model, processor = demo
    scene = probe.demo.scenes(1)[0]
    with probe.attach(model, processor) as p, p.record(tmp_path_factory.mktemp("one"), points=["hidden"]) as recording:
        inputs = processor.apply_chat_template(
            scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        model.generate(**inputs, max_new_tokens=20, do_sample=False)
    return recording.traces[0], model, processor


@pytest.fixture
def replay(recorded: Any) -> probe.Replay:
    return probe.replay(*recorded)


def told(heat: probe.Heatmap) -> tuple[Any, ...]:
    """All of a heatmap but when, how long and how much."""
    values = None if heat.values is None else (heat.values.shape, heat.values.tobytes())
    kept = {key: heat.provenance.get(key) for key in ("baseline", "diagnostics", "seed", "memory")}
    return values, heat.selection, heat.params, heat.reason, heat.history, repr(kept)


def calls(recorded: Any, folder: Path) -> dict[str, Callable[[probe.Replay], Any]]:
    """What may be asked of a replay, each with an answer that can be compared bit for bit."""
    trace, model, processor = recorded
    maps = {word: probe.explain(probe.replay(*recorded), method="occlusion", size=4, tokens=word) for word in WORDS}
    sampled = probe.explain(probe.replay(*recorded), method="rise", masks=8, tokens="cross")
    mean = probe.explain(probe.replay(*recorded).over("mean"), method="input_gradient")

    def explaining(method: str, word: str | None) -> Callable[[probe.Replay], Any]:
        return lambda replay: told(probe.explain(replay, method=method, tokens=word, seed=3, **METHODS[method]))

    def compared(replay: probe.Replay) -> Any:
        page = folder / f"{random.random()}.html"
        made = probe.compare([replay], methods=["input_gradient", "center"], tokens="cross", out=page, steps=4)
        return [
            (told(heat), score and score.to_dict())
            for row in made.rows
            for heat, score in zip(row.heats, row.scores, strict=True)
        ]

    def planned(replay: probe.Replay) -> Any:
        found = plan_for(replay, "igos++", {}, memory="1GB")
        heat = probe.explain(replay, plan=dataclasses.replace(found, micro_batch=3))
        return found.forward, found.micro_batch, told(heat)

    # Some words keep their probability on the recorded blur and some do not.
    found = {method: explaining(method, (None, "cross")[number % 2]) for number, method in enumerate(METHODS)}
    found["igos++ of another word"] = explaining("igos++", "cross")
    for word, heat in maps.items():
        found[f"evaluate {word}"] = lambda replay, heat=heat: probe.evaluate(heat, replay, steps=4).to_dict()
    return found | {
        "evaluate over mean": lambda replay: probe.evaluate(mean, replay, steps=4).to_dict(),
        "held out": lambda replay: probe.evaluate(mean, replay, steps=4, baseline=("noise", {"seed": 2})).to_dict(),
        "compare": compared,
        "plan": planned,
        "verify": lambda _replay: probe.verify(trace, model, processor),
        "select": lambda replay: (probe.select_tokens(replay), replay.llr.tolist()),
        "word answers": lambda replay: answers(replay, mean, draws=1).to_dict(),
        "random weights": lambda replay: weights(replay, mean, stages=1, draws=1).to_dict(),
        "seeds": lambda replay: seeds(replay, sampled, seeds=2).to_dict(),
        "patch": lambda replay: causal.patch(replay, maps["yellow"], top=0.2, draws=1).effects,
        "passes": lambda replay: replay.score_and_grad(torch.full((3, 4, 4), 0.4), lambda p: p.sum(1))[1].tolist(),
    }


WORDS = ("cross", "yellow")


def test_any_sequence_of_calls_gives_what_fresh_replays_give(recorded: Any, tmp_path: Path) -> None:
    known = calls(recorded, tmp_path)
    fresh = {name: repr(call(probe.replay(*recorded))) for name, call in known.items()}
    for seed in range(1):
        order = list(known)
        random.Random(seed).shuffle(order)
        replay = probe.replay(*recorded)
        baseline, path = replay.baseline, replay.path
        for number, name in enumerate(order):
            assert repr(known[name](replay)) == fresh[name], f"{name} after {order[:number]}"
            assert replay.baseline == baseline and replay.path is path and not replay.inside


def test_a_score_does_not_depend_on_what_was_scored_before_it(recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model whose numbers differ with how many masks go at once, as those of any real one do in the last bits."""
    heat, middle = (
        probe.explain(probe.replay(*recorded), method=method, tokens="yellow", size=4)
        for method in ("occlusion", "center")
    )
    plain = probe.Replay.log_probs

    def rounded(replay: probe.Replay, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        found = plain(replay, mask, **options)
        return found - 1e-4 * len(found)

    monkeypatch.setattr(probe.Replay, "log_probs", rounded)
    asked: dict[str, Callable[[probe.Replay], Any]] = {
        "region": lambda replay: dataclasses.replace(probe.evidence.region(replay, heat), cells=None),
        "explain": lambda replay: told(probe.explain(replay, tokens="yellow", budget=40, size=4)),
        "evaluate": lambda replay: probe.evaluate(heat, replay).to_dict(),
        "evaluate the middle": lambda replay: probe.evaluate(middle, replay).to_dict(),
    }
    fresh = {name: repr(call(probe.replay(*recorded))) for name, call in asked.items()}
    for order in (list(asked), list(asked)[::-1]):
        replay = probe.replay(*recorded)
        for name in order:
            assert repr(asked[name](replay)) == fresh[name], f"{name} in the order {order}"


def test_explaining_strengthens_a_view_and_the_heatmap_names_it(replay: probe.Replay) -> None:
    own, log_probs = replay.baseline, replay.baseline_log_probs
    weak = replay.over("blur", strength=0.001)
    heat = probe.explain(weak, method="gradcam", tokens="yellow")
    named = heat.provenance["baseline"]
    assert named["strength"] > 0.001 and named["verified"] is (named["mean_probability"] < 0.05)
    assert weak.baseline == {"kind": "blur", "strength": 0.001, "sigma": 0.001 * 336}
    assert replay.baseline == own and torch.equal(replay.baseline_log_probs, log_probs)
    # Whatever the replay's own baseline is, the heatmap is judged over the one it was made over.
    judged = [probe.evaluate(heat, view, steps=4) for view in (replay, weak, replay.over("mean"))]
    assert all(score.to_dict() == judged[0].to_dict() for score in judged)
    assert judged[0].baseline_check["same_as_explained"] is True
    by_name = probe.evaluate(heat, weak, steps=4, baseline=weak.baseline)
    assert by_name.baseline_check["same_as_explained"] is False
    assert by_name.baseline_check["mean_probability"] > named["mean_probability"]


def test_a_baseline_picture_of_the_users_is_known_by_its_pixels(replay: probe.Replay, tmp_path: Path) -> None:
    mine, other = (Image.new("RGB", (336, 336), colour) for colour in ((10, 90, 20), (10, 90, 21)))
    heat = probe.explain(replay.over(mine), method="input_gradient", strengthen=False)
    heat = probe.Heatmap.read(heat.write(tmp_path / "map.h5"))
    assert heat.provenance["baseline"]["kind"] == "image" and len(heat.provenance["baseline"]["sha256"]) == 64
    expected = probe.evaluate(heat, replay.over(mine), steps=4)
    assert expected.baseline_check["same_as_explained"] is True
    assert probe.evaluate(heat, replay, steps=4, baseline=mine.copy()).deletion == expected.deletion
    for wrong in (replay, replay.over(other)):
        with pytest.raises(probe.errors.ImageError, match=r"an image of your own.*give the image again"):
            probe.evaluate(heat, wrong, steps=4)
    assert probe.evaluate(heat, replay, steps=4, baseline=other).baseline_check["same_as_explained"] is False


@contextlib.contextmanager
def pictures(model: torch.nn.Module) -> Iterator[list[int]]:
    """Pictures that enter the model, seen from outside of the package."""
    seen: list[int] = []

    def enter(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(len(kwargs["pixel_values"]))

    handle = model.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("method", METHODS)
def test_every_picture_that_went_through_the_model_is_counted(recorded: Any, method: str) -> None:
    trace, _, processor = recorded
    model, _ = probe.demo.load()  # on which nothing has been measured yet
    replay = probe.replay(trace, model, processor).over("blur", strength=0.001)
    with pictures(model) as seen:
        heat = probe.explain(replay, method=method, tokens="yellow", **METHODS[method])
    assert heat.provenance["passes"]["forward"] == sum(seen) == replay.passes.forward
    with pictures(model) as seen:
        again = probe.explain(replay, method=method, tokens="yellow", **METHODS[method])
    assert again.provenance["passes"]["forward"] == sum(seen)
    assert again.provenance["passes"]["backward"] == replay.passes.backward - heat.provenance["passes"]["backward"]


def test_no_planner_on_the_default_road(
    replay: probe.Replay, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("lvlm_probe.planning")]:
        monkeypatch.delitem(sys.modules, name)
    assert probe.explain(replay)
    assert not [name for name in sys.modules if name.startswith("lvlm_probe.planning")]
    assert capfd.readouterr().err == ""


def test_a_plan_is_followed_and_one_of_another_method_is_not(replay: probe.Replay) -> None:
    plan = dataclasses.replace(plan_for(replay, "rise", {"masks": 12}), micro_batch=5)
    with pictures(replay.model) as seen:
        heat = probe.explain(replay, method="rise", masks=12, plan=plan, tokens=(0, 2), strengthen=False)
    assert max(seen) <= 5 and heat.provenance["memory"]["micro_batch"] == 5
    assert heat.provenance["memory"]["predicted_peak"] == plan.peak
    assert replay.limits.micro_batch is None
    with pytest.raises(probe.errors.ExplainError, match="plan is of 'rise'"):
        probe.explain(replay, method="occlusion", plan=plan)


def test_the_same_masks_go_at_once_whatever_ran_before(recorded: Any) -> None:
    first, second = probe.replay(*recorded), probe.replay(*recorded)
    first.log_probs(torch.rand(70, 2, 2))
    second.log_probs(torch.rand(2, 30, 30))
    assert first.masks_at_once == second.masks_at_once == probe.replay(*recorded).masks_at_once
    assert probe.replay(*recorded, micro_batch=3).masks_at_once == 3


# ------------------------------------------------------------------------------------------------- modes of torch


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "inference_mode": torch.inference_mode,
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
}


def everything(recorded: Any) -> list[Any]:
    """Maps of all methods, a score and a gradient, of a replay that is opened here."""
    replay = probe.replay(*recorded)
    heats = [probe.explain(replay, method=method, **params) for method, params in METHODS.items()]
    score = probe.evaluate(heats[0], replay, steps=4)
    mask = torch.full((2, 4, 4), 0.5, dtype=torch.float32)
    _, gradient = replay.score_and_grad(mask, lambda log_probs: log_probs.sum(dim=1))
    return [*map(told, heats), score.to_dict(), replay.log_probs(mask).tolist(), gradient.tolist()]


@pytest.fixture(scope="module")
def plainly(recorded: Any) -> list[Any]:
    return everything(recorded)


@pytest.mark.parametrize(
    "surroundings", ["no_grad", "inference_mode", "bfloat16", "float64", *campaign("set_grad_enabled", "float16")]
)
def test_modes_and_default_dtypes_change_no_bit(recorded: Any, plainly: list[Any], surroundings: str) -> None:
    with SURROUNDINGS[surroundings]():
        found = everything(recorded)
    for name, one, other in zip([*METHODS, "score", "log_probs", "gradient"], found, plainly, strict=True):
        assert repr(one) == repr(other), name


def test_a_replay_opened_in_inference_mode_serves_outside_and_the_other_way_round(recorded: Any) -> None:
    with torch.inference_mode():
        inside = probe.replay(*recorded)
        inside.log_probs(torch.full((1, 4, 4), 0.5))
        mask = torch.full((1, 4, 4), 0.5)
    outside = probe.replay(*recorded)
    outside.over("mean").log_probs(torch.full((1, 4, 4), 0.5))
    with torch.inference_mode():
        first = told(probe.explain(outside, method="input_gradient"))
    assert (
        first
        == told(probe.explain(inside, method="input_gradient"))
        == told(probe.explain(outside, method="input_gradient"))
    )
    inside.score_and_grad(mask, lambda log_probs: log_probs.sum(dim=1))  # a mask that was made there


def test_what_was_found_under_autocast_stays_there(recorded: Any) -> None:
    replay, outside = probe.replay(*recorded), probe.replay(*recorded).llr
    with torch.autocast("cpu", torch.bfloat16):
        inside = replay.llr
    assert not torch.equal(inside, outside)
    assert torch.equal(replay.llr, outside)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(replay.llr, inside)


def test_answers_recorded_in_inference_mode_lack_nothing(demo: Any, tmp_path: Path) -> None:
    model, processor = demo
    scene = probe.demo.scenes(1)[0]
    with torch.inference_mode(), probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        inputs = processor.apply_chat_template(
            scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        model.generate(**inputs, max_new_tokens=8, do_sample=False)
    (trace,) = recording.traces
    assert trace.llr is not None and trace.layout.patch_box is not None and not trace.notes
    assert probe.explain(probe.replay(trace, model, processor), method="gradcam")


# ------------------------------------------------------------------------------------------------- memory


def test_memory_is_flat(recorded: Any, tmp_path: Path) -> None:
    alive = flat_memory.cycles(*recorded, tmp_path, count=4)
    assert alive[-1] == alive[1], alive  # the first cycles fill what is kept per model


def test_a_model_that_was_explained_and_dropped_is_collected(recorded: Any, tmp_path: Path) -> None:
    trace, _, processor = recorded
    assert flat_memory.collected(trace, lambda: probe.demo.load()[0], processor, tmp_path)


# ------------------------------------------------------------------------------------------------- float16


def test_small_slopes_survive_half_precision(recorded: Any) -> None:
    """Of a score 3000 times smaller than any gradient that half precision carries, as those of certain words are."""
    trace, _, processor = recorded
    slopes = {}
    for dtype in (torch.float32, torch.float16):
        model = probe.demo.load()[0].to(dtype)
        replay = probe.replay(trace, model, processor, strict=False)
        mask = torch.full((1, 8, 8), 0.5, dtype=torch.float32)
        slopes[dtype] = replay.score_and_grad(mask, lambda log_probs: 3e-5 * log_probs.sum(dim=1).float())[1].flatten()
    exact, half = slopes.values()
    assert float(torch.nn.functional.cosine_similarity(exact, half, dim=0)) > 0.98
    assert int((half == 0).sum()) <= int((exact == 0).sum())


def test_a_certain_word_keeps_its_slopes_beside_an_uncertain_one(recorded: Any) -> None:
    """Of one model in float16: what a mask gives does not depend on the others of its batch."""
    trace, _, processor = recorded
    model = probe.demo.load()[0]
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
    replay = probe.replay(trace, model.half(), processor, strict=False)
    masks = torch.stack([torch.full((8, 8), 1.0), torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) / 2])
    step = int(replay.original_log_probs.argmax())

    def score(log_probs: torch.Tensor) -> torch.Tensor:
        return log_probs[:, step]

    _, both = replay.score_and_grad(masks, score)
    for mask, beside in zip(masks, both, strict=True):
        _, alone = replay.score_and_grad(mask[None], score)
        assert alone.any() and int((beside == 0).sum()) == int((alone == 0).sum())
        one, other = (slopes.flatten() / slopes.abs().max() for slopes in (alone, beside))
        assert float(torch.nn.functional.cosine_similarity(one, other, dim=0)) > 0.99


def test_the_cli_takes_no_device_by_itself_that_lacks_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    from lvlm_probe.cli.shared import models

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, _ = models.load_model("demo")
    assert next(model.parameters()).device.type == "cpu"


def test_heatmaps_are_equal_to_the_bit_when_they_are_read_again(replay: probe.Replay, tmp_path: Path) -> None:
    heat = probe.explain(replay, method="input_gradient")
    again = probe.Heatmap.read(heat.write(tmp_path / "map.h5"))
    np.testing.assert_array_equal(again.values, heat.values)
    assert probe.evaluate(again, replay, steps=3).to_dict() == probe.evaluate(heat, replay, steps=3).to_dict()


def test_what_is_handed_out_may_be_written_into(recorded: Any) -> None:
    """Drawn on, filled, emptied: neither the trace, nor a replay that was opened before or after, has changed."""

    def asked(replay: probe.Replay) -> list[Any]:
        whole, even = torch.ones(4, 4), torch.full((4, 4), 0.5)
        told = [replay.log_probs(even, mode=mode).tolist() for mode in ("fast", "exact")]
        told += [replay.over("mean").log_probs(even).tolist(), replay.scored(LENGTH).log_probs(whole).tolist()]
        trace = replay.trace
        texts = [trace.tokens, trace.notes, trace.meta, trace.model, trace.baseline, trace.processor_call, trace.words]
        pixels = [image.tobytes() for image in (trace.image, *trace.images, trace.images[0])]
        return [*told, replay.baseline, replay.llr.tolist(), probe.select_tokens(replay), repr(texts), pixels]

    trace = probe.open_trace(recorded[0].path)
    replay = probe.replay(trace, *recorded[1:])
    before = asked(replay)
    drawn_on = [trace.image, *trace.images, *trace.images[:1], replay.image(0), replay.baseline_image(0)]
    for image in drawn_on:
        image.paste((0, 0, 0), (0, 0, *image.size))
    for values in (replay.token_ids, replay.special, replay.input_ids, replay.llr, *replay.likeliest):
        values.zero_()
    for text in (replay.tokens, replay.words, trace.tokens, trace.words, trace.notes):
        text.clear()
    for record in (replay.baseline, trace.baseline, trace.model, trace.meta, trace.processor_call):
        record["kind"] = "drawn on"
    trace.processor_call["kwargs"]["size"] = trace.model["config"]["vision_config"] = {}
    for array in (trace.attention.values, trace.token_ids, trace.log_probs, trace.layout.patch_box):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    assert asked(replay) == before and asked(probe.replay(trace, *recorded[1:])) == before


LENGTH = probe.score(lambda given: given.log_probs.sum(-1), name="length")
