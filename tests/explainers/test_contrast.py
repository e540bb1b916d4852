"""Contrasts, why this word and not that: selection, every method, judging, the store; on scenes of a known answer."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import command_line
import inside
import numpy as np
import pytest
import torch

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError, SelectionError
from lvlm_probe.explainers.attention_relevance import Walk, relu_product
from lvlm_probe.explainers.registry import Problem, follows_score
from lvlm_probe.heatmap_store import MapSettings, explain_one, score_one
from lvlm_probe.metrics.verdict import judge
from lvlm_probe.replaying.own_scores import Contrast
from lvlm_probe.selection import TokenSelection, select_tokens

SMALL: dict[str, dict[str, Any]] = {
    "igos++": {"preset": "fast"},
    "integrated_gradients": {"steps": 10, "size": 12},
    "input_gradient": {"sign": "positive"},
    "tmm": {},
    "gradcam": {},
    "iia": {"points": 3},
    "rise": {"masks": 60, "size": 12, "cells": 5},
    "occlusion": {"size": 8, "patch": 2},
    "greedy": {"segments": "grid", "regions": (3, 3)},
}
"""Every kind of method that follows a score, in few passes."""


@pytest.fixture(scope="module")
def asked(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, str, Any]:
    """A scene with a cyan object beside the yellow one that is asked about: replay, scene, other colour, its item."""
    scene = probe.demo.scenes(1, kinds=["colour"])[0]
    answer = probe.ask(*demo, scene.image, scene.question, out=tmp_path_factory.mktemp("contrast"))
    other = next(item for item in scene.layout.items if item.colour == "cyan")
    assert scene.visual_words == ("yellow",)
    assert "yellow" in answer.text
    return answer.replay, scene, "cyan", other


def inside_share(heat: Any, mask: np.ndarray) -> float:
    """Share of a map's heat on a mask."""
    values = heat.upsampled()
    return float(values[mask].sum() / values.sum())


def disc(item: Any, size: tuple[int, int]) -> np.ndarray:
    """The circle around an object."""
    width, height = size
    rows, cols = np.mgrid[:height, :width]
    return np.hypot((cols + 0.5) / width - item.x, (rows + 0.5) / height - item.y) < item.radius


# -------------------------------------------------------------------------------------------- the region that is known


@pytest.mark.quick
def test_either_side_of_a_contrast_points_at_its_object(asked: Any) -> None:
    """Yellow is asked about, and another object is cyan: one map marks the one, the other way round the other."""
    replay, scene, cyan, item = asked
    sides = [
        probe.explain(replay, tokens=tokens, against=against, method="igos++", preset="fast")
        for tokens, against in (("yellow", cyan), (cyan, "yellow"))
    ]
    where = [disc(next(i for i in scene.layout.items if i.colour == "yellow"), scene.image.size)]
    where.append(disc(item, scene.image.size))
    for mine, other, heat in ((0, 1, sides[0]), (1, 0, sides[1])):
        peak = np.unravel_index(heat.upsampled().argmax(), where[0].shape)
        assert where[mine][peak], heat
        assert inside_share(heat, where[mine]) > 4 * where[mine].mean()
        assert inside_share(heat, where[mine]) > 3 * inside_share(heat, where[other])
    assert [heat.selection.label for heat in sides] == ["yellow, not cyan", "cyan, not yellow"]
    scores = [probe.evaluate(heat, replay, steps=10) for heat in sides]
    assert all(score.verdict.trusted for score in scores), scores
    assert scores[0].original > 0.9
    assert scores[1].original < 0.1, "P of the other colour, among the two"
    drawn = np.asarray(sides[0].difference(sides[1])).astype(int)
    plain = np.asarray(scene.image.convert("RGB")).astype(int)
    warmer = (drawn - plain)[..., 0] - (drawn - plain)[..., 2]
    assert warmer[where[0]].mean() > 0 > warmer[where[1]].mean()


@pytest.mark.parametrize("method", SMALL)
def test_every_method_that_follows_a_score_follows_a_contrast(method: str, asked: Any) -> None:
    replay, scene, cyan, _ = asked
    heat = probe.explain(replay, tokens="yellow", against=cyan, method=method, strengthen=False, **SMALL[method])
    assert heat.values is not None, heat.reason
    assert heat.provenance["passes"]["forward"] > 0
    assert inside_share(heat, scene.mask) > (2 * scene.mask.mean() if method != "gradcam" else 0)


@pytest.mark.parametrize("method", ["attention", "relative_attention", "rollout", "tam"])
def test_methods_without_a_score_refuse(method: str, asked: Any) -> None:
    replay, _, cyan, _ = asked
    assert not follows_score(method)
    with pytest.raises(ExplainError, match=rf"{method} follows no score.*use .*gradcam.*rise"):
        probe.explain(replay, tokens="yellow", against=cyan, method=method)


def test_a_contrast_of_a_word_with_itself_is_zero(asked: Any) -> None:
    """Whatever the image: so it plays no part, and there is no map."""
    replay, *_ = asked
    heat = probe.explain(replay, tokens="yellow", against="yellow", method="occlusion")
    assert heat.values is None
    assert "plays no part" in str(heat.reason)
    scored = replay.scored(heat.selection.score)
    masks = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0))
    assert float(scored.log_probs(masks)[:, -1].abs().max()) < 1e-4


def test_alternatives_that_are_as_likely_count_together(asked: Any) -> None:
    """Any of several: named twice, a word is twice as likely, which costs log 2; and order does not matter."""
    replay, _, cyan, _ = asked
    one, two, turned = (
        float(replay.scored(select_tokens(replay, words="yellow", against=others).score).original_log_probs[-1])
        for others in ([cyan], [cyan, cyan], [cyan, "purple"])
    )
    assert two == pytest.approx(one - np.log(2), abs=1e-5)
    assert turned < one
    other = select_tokens(replay, words="yellow", against=["purple", cyan]).score
    assert float(replay.scored(other).original_log_probs[-1]) == pytest.approx(turned, abs=1e-5)


# ----------------------------------------------------------------------------------------------------------- selecting


def test_the_models_own_second_choice(asked: Any) -> None:
    """At the first token of the word, which is all that is compared."""
    replay, *_ = asked
    selection = select_tokens(replay, words="yellow", against="next")
    (first,) = selection.indices
    assert replay.tokens[first] == " yel"
    score = selection.score
    assert isinstance(score, Contrast)
    assert score.alternatives == ((int(replay.runners_up[0][first]),),)
    value = float(replay.original_log_probs[first] - replay.runners_up[1][first])
    assert float(replay.scored(score).original_log_probs[-1]) == pytest.approx(value, abs=1e-4)
    assert select_tokens(replay, against="next").score == score, "the selected word is the only one the image decides"
    with pytest.raises(SelectionError, match="'next' is not in the answer"):
        select_tokens(replay, words="next", against="cyan")


def test_a_word_that_the_tokenizer_cannot_write_is_no_alternative(asked: Any) -> None:
    """It would be a contrast with the unknown token."""
    replay, *_ = asked
    word = replay.words[0].text
    with pytest.raises(SelectionError, match=r"cannot write '十'.*<unk>"):
        probe.explain(replay, method="input_gradient", tokens=word, against="十")
    with pytest.raises(SelectionError, match="against is a word"):
        probe.explain(replay, method="input_gradient", tokens=word, against=3)


def test_words_that_were_not_said(asked: Any) -> None:
    """Named first they turn the contrast round, where what they stand against was said; else the way out is told."""
    replay, _, cyan, _ = asked
    turned, straight = (select_tokens(replay, words=w, against=a) for w, a in ((cyan, "yellow"), ("yellow", cyan)))
    assert turned.indices == straight.indices
    assert turned.score is not None
    assert turned.score == straight.score.other_way()  # type: ignore[union-attr]
    with pytest.raises(
        SelectionError, match=r"'cyan' is not in the answer.*name what it says in that place, and against="
    ):
        select_tokens(replay, words=cyan)
    with pytest.raises(SelectionError, match="'cyan' is not in the answer"):
        select_tokens(replay, words=cyan, against="purple")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"words": ["The", "yellow"], "against": "cyan"}, "in the place of one word"),
        ({"words": "yellow", "against": []}, "or several"),
        ({"words": "yellow", "against": " "}, "or several"),
    ],
)
def test_what_cannot_be_contrasted(given: dict[str, Any], said: str, asked: Any) -> None:
    with pytest.raises(SelectionError, match=said):
        select_tokens(asked[0], **given)
    with pytest.raises(SelectionError, match="of a server, or a trace alone"):
        select_tokens(asked[0].trace, **{**given, "words": "yellow", "against": "cyan"})


def test_a_contrast_needs_the_model(asked: Any) -> None:
    replay, _, cyan, _ = asked
    selection = select_tokens(replay, words="yellow", against=cyan)
    with pytest.raises(ExplainError, match="against goes with words"):
        probe.explain(replay, tokens=selection, against=cyan)
    from toy_replay import ToyReplay

    toy = ToyReplay(torch.ones(1, 2, 2) / 4, tokens=["yellow"])
    alone = dataclasses.replace(selection, tokens=("yellow",), indices=(0,), llr=())
    with pytest.raises(ExplainError, match="inside the model's passes"):
        probe.explain(toy, tokens=alone, method="occlusion")  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- kept and compared


def test_stored_maps_of_contrasts_are_told_apart_and_found_again(asked: Any, tmp_path: Path) -> None:
    replay, _, cyan, _ = asked
    settings = MapSettings("occlusion", {"size": 3, "patch": 1}, scored=False)
    made = []
    for words, against in (("yellow", None), ("yellow", cyan), ("yellow", "purple"), (cyan, "yellow")):
        selection = select_tokens(replay, words=words, against=against)
        found, before = explain_one(replay, selection, selection.label, settings, tmp_path)
        assert not before
        assert explain_one(replay, selection, selection.label, settings, tmp_path) == (found, True)
        assert found.read(replay.trace).selection == selection
        made.append(found)
    assert len({found.path for found in made}) == 4
    assert "yellow-not-cyan" in made[1].path.name
    score = score_one(replay, made[1], steps=3, center=False)
    assert (score.params["own_score"], found.score()) == ("yellow, not cyan", None)
    assert made[1].score() == score
    heat = made[1].read(replay.trace)
    assert probe.evaluate(heat, replay, steps=3, center=False).deletion_raw == score.deletion_raw


def test_scores_of_a_contrast_are_its_own(asked: Any) -> None:
    """The raw curve is P(said) among the two, and in nats their log-odds; its ends are those of a plain replay."""
    replay, _, cyan, _ = asked
    heat = probe.explain(replay, tokens="yellow", against=cyan, method="center", size=6, strengthen=False)
    odds = [float(ends[-1]) for ends in _ends(replay, heat)]
    nats = probe.evaluate(heat, replay, score="log", center=False, steps=3)
    assert (nats.original, nats.baseline) == pytest.approx(tuple(odds), abs=1e-4)
    score = probe.evaluate(heat, replay, center=False, steps=3)
    assert (score.original, score.baseline) == pytest.approx([1 / (1 + np.exp(-one)) for one in odds], abs=1e-5)
    assert "mean_probability" not in score.baseline_check


def _ends(replay: Any, heat: Any) -> tuple[torch.Tensor, torch.Tensor]:
    scored = replay.scored(heat.selection.score)
    return scored.original_log_probs, scored.baseline_log_probs


def test_a_command_makes_a_map_for_each_side(asked: Any, tmp_path: Path) -> None:
    """And finds them finished the second time; the page of them shows both."""
    replay, *_ = asked
    trace = Path(shutil.copy(replay.trace.path, tmp_path))
    command = ["explain", trace, "--model", "demo", "--method", "occlusion", "--param", "size=3", "--param", "patch=1"]
    command += ["--words", "yellow", "--against", "cyan", "--no-scores"]
    made = command_line.succeed(*command, "--json").json["maps"]
    assert [one["words"] for one in made] == ["yellow, not cyan", "cyan, not yellow"]
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "explanations").glob("*.h5")}
    command_line.succeed(*command)
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "explanations").glob("*.h5")}
    page = tmp_path / "page.html"
    command_line.succeed("report", tmp_path / "explanations", "--out", page)
    assert "Why “yellow” and not “cyan”?" in page.read_text(encoding="utf-8")
    refused = command_line.run(*command, "--word-maps")
    assert (refused.code != 0, "give either" in refused.err) == (True, True)


def test_a_side_that_nothing_in_the_image_speaks_for_is_not_trusted() -> None:
    """A map of everything but the other side's object has a good gain too: what it marks has to raise the score above
    what it is without the image."""
    measured = {"deletion": 0.02, "insertion": 0.98}
    idle = judge(**measured, own_score=("blue, not red", 0.1, 0.7, 0.71))
    assert not idle.trusted
    assert "nothing in the image speaks for 'blue, not red'" in str(idle)
    assert judge(**measured, own_score=("blue, not red", 0.1, 0.7, 0.9)).trusted
    assert judge(**measured, own_score=("red, not blue", 0.7, 0.1, 0.7)).trusted


def test_methods_are_compared_on_a_contrast(asked: Any, tmp_path: Path) -> None:
    replay, _, cyan, _ = asked
    found = probe.compare(
        replay, methods={"input_gradient": {"sign": "positive"}, "tam": {}}, tokens="yellow", against=cyan, grid=6,
        out=tmp_path / "page.html", progress=False,
    )  # fmt: skip
    ((gradient, tam),) = [row.heats for row in found.rows]
    assert gradient is not None
    assert tam is not None
    assert gradient.selection.label == "yellow, not cyan"
    assert "follows no score" in str(tam.reason)


def test_a_page_shows_both_sides_and_their_difference(asked: Any, tmp_path: Path) -> None:
    from lvlm_probe.pages.samples import gather

    replay, _, cyan, _ = asked
    sides = [
        probe.explain(replay, tokens=tokens, against=against, method="occlusion", size=6)
        for tokens, against in (("yellow", cyan), (cyan, "yellow"))
    ]
    (sample,) = gather(sides, [None, None])
    (side,) = sample["sides"]
    assert side["title"] == "Why “yellow” and not “cyan”?"
    assert [picture["src"][:11] for picture in side["drawn"]] == ["data:image/"] * 3
    assert [entry["label"] for entry in sample["maps"]] == ["“yellow, not cyan”", "“cyan, not yellow”"]
    assert gather(sides[:1], [None])[0]["sides"] == []
    page = probe.report(sides, out=tmp_path / "page.html")
    assert "Why “yellow” and not “cyan”?" in Path(page).read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------- several sequences per image


def test_relevance_through_two_sequences_is_the_sum_of_both() -> None:
    """An alternative of three tokens: its first is read next to the said one, the rest in a sequence of its own, whose
    relevance is that of the same tokens in a replay of that answer."""
    replay = inside.replay("llava")
    (ids,) = inside.other_ids(replay, 3)
    whole = torch.ones(1, 1, 1)

    def walked(source: Any, selection: TokenSelection, sign: float) -> torch.Tensor:
        problem = Problem(source if selection.score is None else source.scored(selection.score), selection)
        walk = Walk(problem, "decoder", relu_product)
        with problem.replay.capture(attention=walk.parts, visit=walk):
            problem.replay.score_and_grad(whole, lambda found: sign * problem.score(found), image=0)
        return walk.values()[0]

    plain = select_tokens(replay, indices=[1])
    three, one = (
        dataclasses.replace(plain, score=Contrast.of([(1, 2)], [tokens], ["other"], "said"))
        for tokens in (ids, ids[:1])
    )
    tail = inside.answering(inside.replay("llava"), [int(replay.token_ids[0]), *ids])
    rest = dataclasses.replace(plain, indices=(2, 3), tokens=tuple(tail.tokens))
    together = walked(replay, three, 1.0)
    apart = walked(replay, one, 1.0) + walked(tail, rest, -1.0)
    torch.testing.assert_close(together, apart, atol=1e-5 * float(apart.max()), rtol=1e-4)


def test_a_long_alternative_has_maps_of_every_kind() -> None:
    """With a sequence more per image, which is counted; the encoder's attention is refused by name."""
    replay = inside.replay("qwen2_5_vl")
    (ids,) = inside.other_ids(replay, 3)
    score = Contrast.of([(1, 2)], [ids], ["other"], "said")
    selection = dataclasses.replace(select_tokens(replay, indices=[1]), score=score)
    for method in ("gradcam", "tmm", "input_gradient", "input_gradient"):  # the first pass tries shortcuts
        heat = probe.explain(replay, tokens=selection, method=method, strengthen=False)
        assert heat.values is not None
    assert heat.provenance["passes"] == {"forward": 2, "backward": 2}
    for method, params in (("tmm", {"scope": "encoder"}), ("gradient_value", {})):
        with pytest.raises(ExplainError, match=r"scored on 2 sequences .* alternatives of a single token"):
            probe.explain(replay, tokens=selection, method=method, strengthen=False, **params)


def test_grad_cam_adds_up_the_gradients_of_all_sequences() -> None:
    """The map of a long alternative equals the one whose gradient is that of the sum, by the encoder's one output."""
    replay = inside.replay("llava")
    said = replay.token_ids.tolist()
    (ids,) = inside.other_ids(replay, 2)
    selection = dataclasses.replace(
        select_tokens(replay, indices=[1]), score=Contrast.of([(1, 2)], [ids], ["other"], "said")
    )
    problem = Problem(replay.scored(selection.score), selection)
    heat = probe.explain(replay, tokens=selection, method="gradcam", strengthen=False)
    module = heat.params["layer"]
    gradients = []
    for answer, steps in (([said[0], *ids], (1, 2)), (said, (1,))):
        other = inside.answering(inside.replay("llava"), answer)
        with other.capture(modules=[module]) as seen:
            other.score_and_grad(torch.ones(1, 1, 1), lambda found, steps=steps: found[:, list(steps)].sum(dim=1))
        gradients.append(seen.gradients[module])
    with problem.replay.capture(modules=[module]) as seen:
        problem.replay.score_and_grad(torch.ones(1, 1, 1), problem.score, image=0)
    both = seen.gradients[module].chunk(2)
    torch.testing.assert_close(both[0] + both[1], gradients[1] - gradients[0], atol=1e-5, rtol=1e-3)
