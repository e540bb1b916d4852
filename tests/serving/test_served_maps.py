"""Maps through a server equal those on the model itself, on every road; what a server cannot give, it says."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demo_server import DemoServer, serving

import lvlm_probe as probe
from lvlm_probe.explainers import methods, needs_of
from lvlm_probe.explainers.attention_maps import GENERAL_PROMPT
from lvlm_probe.replaying.protocol import ReplayLike

ROADS = {
    "tokens": {"tokens"},
    "chat": {"chat"},
    "next token (allowed_token_ids)": {"allowed"},
    "next token (logit_bias)": {"bias"},
    "sglang": {"sglang"},
}
# float32: passes of another batch shape round in another order
CLOSE = 2e-4


@pytest.fixture(scope="module")
def local(demo: Any, scene: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same answer on the model itself."""
    return probe.ask(*demo, scene.image, scene.question, out=tmp_path_factory.mktemp("local")).replay


def exact(replay: Any) -> Any:
    """The replay with real composites for whoever asks."""
    other = copy.copy(replay)
    other.log_probs = functools.partial(replay.log_probs, mode="exact")
    return other


@pytest.fixture(scope="module")
def masks() -> torch.Tensor:
    return torch.rand(6, 5, 7, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("road", list(ROADS))
def test_log_probabilities_equal_the_models_own_on_every_road(
    road: str, demo: Any, scene: Any, local: Any, masks: torch.Tensor, tmp_path: Path
) -> None:
    processor = demo[1] if road == "sglang" else None
    with serving(*demo, ROADS[road]) as behind, probe.connect(behind.url, processor=processor) as server:
        assert server.road == road
        trace = server.ask(scene.image, scene.question, out=tmp_path)
        replay = probe.replay(trace, server)
        found, wanted = replay.log_probs(masks), local.log_probs(masks, mode="exact")
        assert trace.answer.strip() == local.trace.answer
        held = len(trace.token_ids)
        assert held == len(local.token_ids) - (road == "chat")  # which cannot hold the closing token
        assert torch.equal(replay.token_ids, local.token_ids[:held])
        assert float((found - wanted[:, :held]).abs().max()) < CLOSE
        assert float((replay.baseline_log_probs - local.baseline_log_probs[:held]).abs().max()) < CLOSE
        assert np.allclose(trace.log_probs, local.trace.log_probs[:held], atol=CLOSE)


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("rise", {"masks": 24, "cells": 3, "size": 6}),
        ("occlusion", {"size": 4}),
        ("greedy", {"segments": "grid", "regions": 6}),
        ("center", {}),
    ],
)
def test_maps_equal_the_local_ones(
    method: str, params: dict[str, Any], behind: DemoServer, trace: Any, local: Any
) -> None:
    with probe.connect(behind.url) as server:
        heat = probe.explain(probe.replay(trace, server), method=method, strengthen=False, **params)
    wanted = probe.explain(exact(local), method=method, strengthen=False, **params)
    assert heat.values is not None and wanted.values is not None
    assert np.abs(heat.values - wanted.values).max() < 5e-3
    assert heat.provenance["server"]["road"] == "tokens"
    assert heat.provenance["device"] == "the server of 'demo'"


@pytest.mark.quick
def test_everything_after_the_replay_is_as_it_is(behind: DemoServer, trace: Any, tmp_path: Path) -> None:
    with probe.connect(behind.url) as server:
        replay = probe.replay(trace, server)
        assert isinstance(replay, ReplayLike)
        chosen = probe.select_tokens(replay)
        heat = probe.explain(replay, method="occlusion", size=4, tokens=chosen)
        score = probe.evaluate(heat, replay)
        assert score.insertion - score.deletion > 0.3
        assert score.params["mode"] == "exact" and score.provenance["server"]["model"] == "demo"
        other = probe.explain(replay.over("mean"), method="rise", masks=8, cells=3, size=4)
        assert other.provenance["baseline"]["kind"] == "mean"
        page = probe.report([heat], scores=[score], out=tmp_path / "report.html")
        both = probe.compare([heat, other], out=tmp_path / "compare.html")
        assert page.stat().st_size and both.path.stat().st_size
        found = probe.verify(trace, server)  # type: ignore[arg-type]
        assert found.within() and found.steps == len(trace.token_ids)
        assert probe.sanity.seeds(replay, heat) is not None


@pytest.mark.parametrize("method", [name for name in methods() if needs_of(name) - {"passes"}])
def test_what_a_server_cannot_give_is_said_before_anything_is_sent(method: str, behind: DemoServer, trace: Any) -> None:
    with probe.connect(behind.url) as server:
        replay = probe.replay(trace, server)
        before = behind.count
        with pytest.raises(probe.errors.ExplainError, match=r"the server of .demo. does not give.*rise"):
            probe.explain(replay, method=method)
        assert behind.count == before


def test_what_takes_the_model_itself_is_refused_by_name(behind: DemoServer, trace: Any, masks: torch.Tensor) -> None:
    with probe.connect(behind.url) as server:
        replay: Any = probe.replay(trace, server)
        before = behind.count
        for ask in (
            lambda: replay.score_and_grad(masks, lambda found: found.sum(1)),
            lambda: replay.log_probs(masks.clone().requires_grad_(True)),
            lambda: replay.log_probs(masks.detach(), noise=0.1),
            lambda: replay.anatomy,
            replay.require_gradients,
        ):
            with pytest.raises(probe.errors.ExplainError, match="cannot be had of the server of 'demo'"):
                ask()
        assert behind.count == before
        with pytest.raises(probe.errors.MaskError):
            replay.log_probs(torch.full((1, 4, 4), 2.0))
        with pytest.raises(probe.errors.ReplayError, match="steps are tokens 0 to"):
            replay.log_probs(masks.detach(), steps=[99])


def test_one_of_two_images_is_masked_alone(demo: Any, behind: DemoServer, tmp_path: Path) -> None:
    first, second = (one.image for one in probe.demo.scenes(2, size=(64, 64)))
    question = "What color is the circle?"
    with probe.connect(behind.url) as server:
        trace = server.ask([first, second], question, out=tmp_path)
        replay = probe.replay(trace, server)
        local = probe.ask(*demo, [first, second], question).replay
        masks = torch.zeros(1, 1, 1)
        for image in (0, 1):
            found = replay.log_probs(masks, image=image)
            assert float((found - local.log_probs(masks, image=image, mode="exact")).abs().max()) < CLOSE
        with pytest.raises(probe.errors.MaskError, match="2 images"):
            replay.log_probs(masks)


def test_a_trace_recorded_on_the_model_itself_is_replayed_on_the_server(
    demo: Any, scene: Any, behind: DemoServer, tmp_path: Path, masks: torch.Tensor
) -> None:
    local = probe.ask(*demo, scene.image, scene.question, out=tmp_path)
    with probe.connect(behind.url) as server:
        replay = probe.replay(local.trace, server)
        found = replay.log_probs(masks)
        assert float((found - local.replay.log_probs(masks, mode="exact")).abs().max()) < CLOSE


def test_an_answer_that_was_given_before_is_measured_as_such(
    demo: Any, behind: DemoServer, scene: Any, local: Any, tmp_path: Path
) -> None:
    said = local.trace.answer
    with probe.connect(behind.url) as server:
        trace = server.ask(scene.image, scene.question, answer=said, out=tmp_path)
        assert trace.answer.strip() == said and trace.log_probs_source == "teacher_forced"
        assert np.allclose(trace.log_probs, local.trace.log_probs[: len(trace.log_probs)], atol=CLOSE)
        ids = local.token_ids.tolist()
        same = server.ask(scene.image, scene.question, answer=said, token_ids=ids, out=tmp_path)
        assert same.token_ids.tolist() == ids[: len(same.token_ids)]
        with pytest.raises(probe.errors.ReplayError, match="other tokens"):
            server.ask(scene.image, scene.question, answer=said, token_ids=[ids[0] + 1, *ids[1:]], out=tmp_path)


def test_the_trace_of_a_server_says_where_it_is_from(asked: Any, demo: Any) -> None:
    assert "answered by" not in asked.question
    told = asked.meta["served"]
    assert (
        told["engine"]["engine"] == "vLLM"
        and told["road"] == "tokens"
        and told["images_as"] in ("PNG, level 1", "WebP, lossless")
    )
    assert told["checks"]["against_generation"] < CLOSE and told["checks"]["image_moves"] > 1
    assert 0.9 < told["checks"]["likeliest_sum"] <= 1.01
    assert asked.status == "complete" and "vLLM" in asked.describe()
    json.dumps(told, allow_nan=False)
    with pytest.raises(probe.errors.ImageError, match="was answered by a server"):
        probe.replay(asked, *demo)


def test_the_key_is_sent_and_kept_nowhere(
    behind: DemoServer, scene: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    with probe.connect(behind.url, key_variable="MY_KEY") as server:
        trace = server.ask(scene.image, scene.question, out=tmp_path)
        heat = probe.explain(probe.replay(trace, server), method="rise", masks=4, cells=2, size=4)
        heat.write(tmp_path / "heat.h5")
        assert "secret" not in repr(vars(server)) + str(server)
    assert behind.headers[-1]["Authorization"] == "Bearer sk-very-secret"
    assert all(b"sk-very-secret" not in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


@pytest.mark.parametrize("taken", [True, False])
def test_images_are_sent_in_the_smaller_lossless_format_that_the_server_takes(
    taken: bool, demo: Any, local: Any, masks: torch.Tensor, tmp_path: Path, scene: Any
) -> None:
    with serving(*demo, {"tokens"}) as behind:
        behind.takes_webp = taken
        with probe.connect(behind.url) as server:
            assert server.takes_webp is taken
            replay = probe.replay(server.ask(scene.image, scene.question, out=tmp_path), server)
            before = len(behind.requests)
            found = replay.log_probs(masks)
        sent = [body["content_parts"][0]["url"] for _, body in behind.requests[before:]]
    told = replay.trace.meta["served"]["images_as"]
    assert told.startswith("WebP" if taken else "PNG")  # of a drawing of few colours it is smaller
    assert all(uri.startswith("data:image/webp" if taken else "data:image/png") for uri in sent) and len(sent) == 6
    assert float((found - local.log_probs(masks, mode="exact")).abs().max()) < CLOSE


def test_a_processor_here_says_what_the_model_sees(demo: Any, behind: DemoServer, tmp_path: Path) -> None:
    image = probe.demo.scenes(1, size=(160, 96))[0].image  # the demo's processor crops the middle
    with probe.connect(behind.url) as server:
        trace = server.ask(image, "What color is the cross?", out=tmp_path)
        blind, knowing = probe.replay(trace, server), probe.replay(trace, server, demo[1])
        wanted = probe.ask(*demo, image, "What color is the cross?").replay
        assert bool(blind.seen(0).all())
        for view in (knowing, knowing.over("mean")):
            assert torch.equal(view.seen(0, (6, 10)), wanted.seen(0, (6, 10)))
            assert torch.equal(view.seen(0), wanted.seen(0))
        assert torch.equal(blind.log_probs(torch.zeros(1, 2, 2)), knowing.log_probs(torch.zeros(1, 2, 2)))


def test_attention_of_a_served_model_is_that_of_the_model_itself(
    demo: Any, behind: DemoServer, trace: Any, scene: Any, local: Any, tmp_path: Path
) -> None:
    with probe.connect(behind.url) as server:
        before = server.spent.requests
        made = probe.import_attention(trace, server, processor=demo[1])
        assert server.spent.requests == before + 1
        general = server.ask(scene.image, GENERAL_PROMPT, out=tmp_path, max_tokens=4)
        general = probe.import_attention(general, server, processor=demo[1])
        replay = probe.replay(made, server)
        before = behind.count
        found = probe.explain(replay, method="attention", tokens=[3])
        relative = probe.explain(replay, method="relative_attention", tokens=[3], reference=general)
        with pytest.raises(probe.errors.ExplainError, match="give reference="):
            probe.explain(replay, method="relative_attention", tokens=[3])
        with pytest.raises(probe.errors.ExplainError, match="does not give"):
            probe.explain(replay, method="rollout", tokens=[3])
        assert behind.count <= before + 3  # log-probabilities on baselines, for the selection
    assert np.allclose(made.attention.values, local.trace.attention.values, rtol=2e-3, atol=1e-5)
    assert np.allclose(made.layout.patch_box, local.trace.layout.patch_box, atol=0.01)
    wanted = probe.explain(local.trace, method="attention", tokens=[3])
    assert np.abs(found.values - wanted.values).max() < 5e-3
    asked = probe.ask(*demo, scene.image, GENERAL_PROMPT, max_new_tokens=4, out=tmp_path / "local").trace
    wanted = probe.explain(local.trace, method="relative_attention", tokens=[3], reference=asked)
    assert np.abs(relative.values - wanted.values).max() < 2e-2


def test_a_server_without_vllm_lens_is_named(demo: Any, scene: Any, tmp_path: Path) -> None:
    with serving(*demo, {"tokens", "chat"}) as behind, probe.connect(behind.url) as server:
        trace = server.ask(scene.image, scene.question, out=tmp_path)
        with pytest.raises(probe.errors.ReplayError, match="runs without vllm-lens"):
            probe.import_attention(trace, server)
        behind.fault = lambda number, body: "wrong_ids" if "vllm_xargs" in body else None
        with pytest.raises(probe.errors.ReplayError, match="other tokens than they are"):
            probe.import_attention(trace, server)
