"""What the tournament and the ablations rest on: lines that survive, shards that add up, words and p-values."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lvlm_probe as probe
from lvlm_probe.selection import TokenSelection

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import ablations
import judging
import photographs
import tournament
import tune_igos


def line(scene: int, name: str, key: str = "k", **facts: Any) -> dict[str, Any]:
    return {"scene": scene, "number": scene, "passed_over": {}, "name": name, "key": key, **facts}


def test_lines_survive_being_cut_off_and_the_latest_counts(tmp_path: Path) -> None:
    mine, other = judging.Lines(tmp_path, (0, 2)), judging.Lines(tmp_path, (1, 2))
    mine.add(line(0, "a", gain=0.5))
    mine.add(line(2, "a", gain=float("nan")))
    other.add(line(1, "a", gain=0.7))
    text = mine.path.read_text("utf-8")
    mine.path.write_text(text[:-9], encoding="utf-8")  # killed while writing scene 2

    again = judging.Lines(tmp_path, (0, 2))
    assert [(found["scene"], found["gain"]) for found in again.of("a")] == [(0, 0.5), (1, 0.7)]
    assert again.has(0, "a", "k") and not again.has(2, "a", "k") and not again.has(0, "a", "other settings")
    again.add(line(2, "a", gain=float("nan")))
    again.add(line(0, "a", gain=0.6))
    last = judging.Lines(tmp_path)
    assert [found["gain"] for found in last.of("a")] == [0.6, 0.7, None]
    assert all(json.loads(text) for text in mine.path.read_text("utf-8").splitlines()[2:])
    # Lines of settings that have been given up do not mix with those of the new ones.
    last.add(line(0, "a", key="new", gain=0.1))
    assert [found["gain"] for found in last.of("a")] == [0.1]


def test_entries_are_forgotten_until_they_are_made_anew(tmp_path: Path) -> None:
    lines = judging.Lines(tmp_path)
    for scene, name in ((0, "a"), (0, "b"), (1, "a")):
        lines.add(line(scene, name, gain=0.5))
    lines.forget(["a"])
    assert lines.names() == ["b"] and not lines.has(0, "a", "k")
    lines.add(line(0, "a", gain=0.6))
    assert [found["gain"] for found in lines.of("a")] == [0.6]
    assert [found["gain"] for found in judging.Lines(tmp_path).of("a")] == [0.6, 0.5]  # the files keep them


@pytest.fixture
def dealt(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Scenes of which every third is answered wrongly, and which of them were answered."""
    answered: list[int] = []

    def cases(split: str, wanted: int, folder: Path, *, skipped: Any, after: int, **rest: Any) -> Iterator[Any]:
        index, found = after + 1, 0
        while found < wanted:
            answered.append(index)
            if index % 3 == 1:
                skipped["answered wrongly"] += 1
            else:
                found += 1
                scene = SimpleNamespace(index=index, kind="colour", answer="")
                yield SimpleNamespace(scene=scene, replay=SimpleNamespace(baseline={"kind": "blur"}))
            index += 1

    monkeypatch.setattr(judging, "cases", cases)
    return answered


def arguments(out: Path, shard: tuple[int, int], scenes: int) -> argparse.Namespace:
    return argparse.Namespace(
        scenes=scenes, shard=shard, split="eval", hard=False, model=None, cases=None, adaptive=None, out=out
    )


def test_shards_together_judge_what_one_process_would(dealt: list[int], tmp_path: Path) -> None:
    def run(out: Path, shard: tuple[int, int], scenes: int = 7, stop: int = 99) -> list[int]:
        lines, seen = judging.Lines(out, shard), []
        for facts, case in judging.scenes_to_do(arguments(out, shard, scenes), lines, {"a": "k"}):
            if len(seen) == stop:
                break
            seen.append(case.scene.index)
            lines.add({**facts, "name": "a", "key": "k"})
        return seen

    whole = run(tmp_path / "whole", (0, 1))
    assert whole == [0, 2, 3, 5, 6, 8, 9]
    assert run(tmp_path / "parts", (1, 3)) == [2, 6]
    assert run(tmp_path / "parts", (0, 3), stop=1) == [0]  # interrupted
    dealt.clear()
    assert run(tmp_path / "parts", (0, 3)) == [5, 9]
    assert 0 not in dealt  # what lies before the first scene to do is not answered again
    assert run(tmp_path / "parts", (2, 3)) == [3, 8]
    records = [judging.Lines(tmp_path / place).of("a") for place in ("whole", "parts")]
    facts = [[(r["scene"], r["number"], r["passed_over"]) for r in found] for found in records]
    assert facts[0] == facts[1]
    assert facts[0][-1] == (9, 6, {"answered wrongly": 3})
    assert run(tmp_path / "parts", (0, 1)) == []
    assert run(tmp_path / "parts", (0, 1), scenes=9) == [11, 12]


def test_holm_is_that_of_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = {"a": 0.001, "b": 0.04, "c": 0.03, "d": 0.7, "e": 0.6, "f": 0.009}
    expected = multitest.multipletests(list(p.values()), method="holm")[1]
    assert list(judging.holm(p).values()) == pytest.approx(sorted(expected))
    assert [judging.holm(p)[name] for name in p] == pytest.approx(list(expected))


def test_comparisons_are_paired_by_scene() -> None:
    first, second = {1: 0.9, 2: 0.8, 5: 0.5}, {5: 0.2, 2: 0.7, 7: 0.0}
    found = judging.comparison(first, second)
    assert found is not None
    assert (found["n"], found["mean"]) == (2, pytest.approx(0.2))
    assert found["p"] == pytest.approx(0.5)  # 2 of 4 sign flips are as far from 0
    assert judging.comparison(first, {9: 1.0}) is None


def test_peak_memory_is_what_is_alive_at_once() -> None:
    def run() -> None:
        first = torch.zeros(1000, 1000)
        second = first + 1
        del first
        third = second * 2  # two of the three at any time
        del second, third

    assert judging.peak_memory(run) == pytest.approx(8_000_000, rel=0.01)


@pytest.mark.parametrize("kind", ["where", "pair", "cell"])
def test_true_words_are_the_tokens_of_the_visual_spans(kind: str) -> None:
    _, processor = probe.demo.load()
    for scene in probe.demo.scenes(4, kinds=[kind], split="tune"):
        ids = processor.tokenizer(scene.answer, add_special_tokens=False).input_ids
        bare = [processor.tokenizer.decode(ids[: n + 1]) for n in range(len(ids))]
        pieces = [bare[0], *(text[len(before) :] for before, text in itertools.pairwise(bare)), "</s>"]
        assert "".join(pieces[:-1]).strip() == scene.answer
        special = [False] * len(ids) + [True]
        chosen = TokenSelection((), tuple(pieces), (), "llr", reason="none")
        case: Any = SimpleNamespace(
            scene=scene, replay=SimpleNamespace(tokens=pieces, special=special), selection=chosen
        )
        found = ablations.true_words(case)
        runs = np.split(list(found.indices), np.flatnonzero(np.diff(found.indices) > 1) + 1)
        texts = ["".join(pieces[index] for index in run).strip() for run in runs]
        assert " ".join(texts) == " ".join(scene.visual_words)


def test_keywords_are_as_many_as_the_recipe_takes() -> None:
    pytest.importorskip("yake")
    assert len(ablations.keywords("The star is yellow and the cross is cyan.")) == 3
    long = " ".join(f"The {noun} stands beside another old wooden table." for noun in ("lamp", "vase", "chair"))
    assert len(ablations.keywords(long)) == len(long.split()) // 4


@pytest.mark.quick
def test_tables_say_what_the_lines_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    lines = judging.Lines(tmp_path)
    gains = {name: rng.normal(mean, 0.05, 12) for name, mean in (("igos++", 0.9), ("tmm", 0.6), ("random", 0.0))}
    for name, values in gains.items():
        for scene, gain in enumerate(values):
            facts = {"gain": gain, "deletion": 0.1, "insertion": 0.1 + gain, "kind": "colour", "trusted": True}
            facts |= {"forward": 100, "backward": 100, "seconds": 1.0, "params": {}}
            lines.add(line(scene, name, **facts))
    lines.add(line(3, "tmm", gain=None, reason="no such layers", kind="colour"))
    wanted = argparse.Namespace(
        out=tmp_path, methods="all", against="igos++", split="eval", hard=False, model=None, cases=None, scenes=12,
        adaptive=None, held_out="mean,noise",
    )  # fmt: skip
    summary = tournament.summarise(wanted, lines)
    assert summary["methods"]["tmm"]["maps"] == 11
    kept = np.arange(12) != 3
    behind = summary["methods"]["tmm"]["behind"]["gain"]
    assert behind["mean"] == pytest.approx(float((gains["igos++"] - gains["tmm"])[kept].mean()))
    assert behind["low"] > 0 and behind["n"] == 11
    assert behind["p_holm"] == pytest.approx(2 * min(behind["p"], 1.0), rel=0.5)
    text = tournament.table({**summary, "begun": 2})
    assert "Scenes begun and not judged under every method yet are left out: 2." in text
    short = tournament.short_table(summary).splitlines()
    assert short[2].startswith("| igos++ |") and short[3].startswith("| tmm |")
    assert f"{behind['mean']:+.3f}" in short[3]
    order = [row.split("|")[1].strip() for row in text.splitlines()[2:5]]
    assert order == ["igos++", "tmm", "random"]
    assert "Scenes without a map are left out: tmm 11 of 12." in text


@pytest.mark.quick
def test_the_table_says_what_the_default_is_ahead_of(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = judging.Lines(tmp_path)
    default = rng.uniform(0.7, 0.9, 12)
    gains = {
        "igos++": default,
        "igos++ (thorough)": default + 0.05,  # a preset of its own
        "tmm": default - rng.uniform(0.2, 0.3, 12),
        "rise": default - rng.uniform(0.05, 0.1, 12),
        "greedy": default - np.where(np.arange(12) < 6, 0.1, -0.08),  # behind in the mean, but not surely
        "random": default - 2 * default,
        tournament.GROUND_TRUTH: default,
    }
    for name, values in gains.items():
        for scene, gain in enumerate(values):
            facts = {"gain": gain, "deletion": 0.1, "insertion": 0.1 + gain, "kind": "colour", "trusted": True}
            held_out = {"held_out": gain + (0.2 if name == "igos++" else 0.0)} if name != "tmm" else {}
            lines.add(line(scene, name, forward=1, backward=1, seconds=1.0, params={}, **facts, **held_out))
    wanted = argparse.Namespace(
        out=tmp_path, methods="all", against="igos++", split="eval", hard=False, model=None, cases=None, scenes=12,
        adaptive=None, held_out="mean,noise",
    )  # fmt: skip
    summary = {**tournament.summarise(wanted, lines), "begun": 0}
    (said,) = (
        one for one in tournament.table(summary).splitlines() if one.startswith("Is `igos++` ahead of every other")
    )
    behind = {name: float((default - gains[name]).mean()) for name in ("rise", "greedy")}
    assert f"By gain: not of `greedy`, {behind['greedy']:+.3f} [-" in said
    assert f"; the nearest that it is ahead of is `rise`, {behind['rise']:+.3f} [+" in said
    assert (
        f"By held-out baselines: yes; the nearest that it is ahead of is `greedy`, {behind['greedy'] + 0.2:+.3f}"
        in said
    )
    few = {**summary, "ahead": {"gain": {}, "held_out": {}}}
    assert "ahead of every other" not in tournament.table(few)


@pytest.mark.parametrize("mark", ["easy", "hard"])
def test_peaks_of_the_page_are_those_that_are_kept(mark: str) -> None:
    kept = json.loads((tournament.RESULTS / mark / "memory.json").read_text("utf-8"))
    page = (tournament.ROOT / "docs" / "tournament.md").read_text("utf-8")
    text = page.partition(f"<!-- {mark} -->")[2].partition(f"<!-- /{mark} -->")[0]
    rows = [row.strip("| ").split(" | ") for row in text.splitlines() if row.startswith("| ")]
    first = next(number for number, row in enumerate(rows) if row[-1] == "peak MiB")
    shown = {row[0].partition(" (the first")[0]: row[-1] for row in rows[first + 1 :]}
    assert {name: f"{np.mean(peaks) / 2**20:.1f}" for name, peaks in kept.items()} == {
        name: peak for name, peak in shown.items() if peak != "–"
    }
    assert {name for name, peak in shown.items() if peak == "–"} == {tournament.GROUND_TRUTH, "greedy (650 images)"}


def test_only_scenes_that_every_method_has_judged_are_compared(tmp_path: Path) -> None:
    lines = judging.Lines(tmp_path)
    for scene, name in ((0, "a"), (0, "b"), (1, "a"), (2, "b"), (3, "a"), (3, "b")):
        lines.add(line(scene, name))
    assert lines.keep_complete(["a", "b"]) == 2
    assert sorted(lines.latest) == [(0, "a"), (0, "b"), (3, "a"), (3, "b")]
    assert judging.Lines(tmp_path).keep_complete(["a"]) == 1  # the file keeps them all


@pytest.fixture(scope="module")
def cases_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three demo scenes as photographs.py writes images, the last without a mask, and one that is answered wrongly."""
    found: list[dict[str, Any]] = []
    for place, scene in enumerate(probe.demo.scenes(3)):
        found.append({"picture": scene.image, "region": scene.mask, "question": scene.question})
        found[-1] |= {"words": list(scene.visual_words), "kind": f"kind {place}"}
    found[2] |= {"region": None, "words": []}
    found.insert(1, {**found[0], "words": ["zebra"]})
    folder = tmp_path_factory.mktemp("photographs") / "images"
    assert photographs.write(iter(found), folder) == 4
    return folder


def test_stored_images_are_judged_as_scenes_are(
    cases_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["center", "input_gradient", "random", tournament.GROUND_TRUTH]
    common = ["x", "--scenes", "3", "--methods", ",".join(names), "--no-causal", "--memory", "0", "--against", "center"]
    common += ["--held-out", "blank", "--adaptive", "0.04"]
    few = ["--few", "random", "--few-scenes", "1"]
    for more in (
        ["--cases", str(cases_folder), *few, "--out", str(tmp_path / "stored")],
        ["--out", str(tmp_path / "own")],
    ):
        monkeypatch.setattr(sys, "argv", [*common, *more])
        tournament.main()
    stored, own = (judging.Lines(tmp_path / place) for place in ("stored", "own"))
    for line_, other in zip(stored.of("input_gradient"), own.of("input_gradient"), strict=True):
        assert line_["gain"] == pytest.approx(other["gain"], abs=1e-5)
        assert line_["held_out"] == pytest.approx(other["held_out"], abs=1e-5)
    places = [line_.get("pointing") for line_ in stored.of("input_gradient")]
    assert places[:2] == [line_["pointing"] for line_ in own.of("input_gradient")][:2] and places[2] is None
    assert [line_["passed_over"] for line_ in stored.of("center")][-1] == {"answered wrongly": 1}
    assert [line_["number"] for line_ in stored.of("random")] == [0]
    assert "nobody has marked" in stored.of(tournament.GROUND_TRUTH)[2]["reason"]
    text = (tmp_path / "stored" / "table.md").read_text("utf-8")
    assert "| random (the first 1) |" in text and "| input_gradient |" in text
    assert "3 images (1 kind 0, 1 kind 1, 1 kind 2); passed over on the way: 1 answered wrongly" in text
    # Nothing is made twice, and what is asked for beyond what there is is no error.
    before = stored.path.read_text("utf-8")
    monkeypatch.setattr(sys, "argv", [*common, "--cases", str(cases_folder), *few, "--out", str(tmp_path / "stored")])
    tournament.main()
    assert stored.path.read_text("utf-8") == before


def test_some_methods_are_judged_by_place_alone_from_a_scene_on(
    cases_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["x", "--cases", str(cases_folder), "--scenes", "3", "--methods", "random,center", "--place", "random"]
    common += ["--no-causal", "--memory", "0", "--held-out", "", "--against", "center", "--out", str(tmp_path)]

    def gains(place_from: int) -> dict[str, dict[int, float | None]]:
        more = ["--place-from", str(place_from), "--adaptive", "0.04"]
        monkeypatch.setattr(sys, "argv", common + more)
        tournament.main()
        lines = judging.Lines(tmp_path)
        return {name: {found["number"]: found.get("gain") for found in lines.of(name)} for name in lines.names()}

    first = gains(1)
    assert first["random"][0] is not None
    assert first["random"] == {0: first["random"][0], 1: None}  # and nobody has marked a place in the third
    assert judging.Lines(tmp_path).of("random")[1]["pointing"] is not None
    assert set(first["center"]) == {0, 1, 2} and None not in first["center"].values()
    text = (tmp_path / "table.md").read_text("utf-8")
    assert "Judged by place alone from some image on, with as many gains: random 1." in text
    whole = gains(3)  # now with curves: lines without are made again
    assert set(whole["random"]) == {0, 1, 2} and None not in whole["random"].values()
    assert whole["random"][0] == first["random"][0]
    assert "by place alone" not in (tmp_path / "table.md").read_text("utf-8")

    # Tables go where the folder of the lines is named, and nowhere else.
    monkeypatch.setattr(tournament, "ROOT", tmp_path)
    monkeypatch.setattr(tournament, "RESULTS", tmp_path)
    (tmp_path / "docs").mkdir()
    marks = {"reality.md": f"tournament {tmp_path.name}", "tournament.md": tmp_path.name}
    for page, mark in marks.items():
        text = f"<!-- other -->\n<!-- /other -->\n<!-- {mark} -->\n<!-- /{mark} -->\n"
        (tmp_path / "docs" / page).write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [*common, "--table", "--fill"])
    tournament.main()
    for page in marks:
        filled = (tmp_path / "docs" / page).read_text("utf-8")
        assert "| center |" in filled and filled.startswith("<!-- other -->\n<!-- /other -->\n")
    assert json.loads((tmp_path / f"{tmp_path.name}.json").read_text("utf-8"))["scenes"] == 3


def test_composites_have_the_masks_of_the_objects_asked_for() -> None:
    """Cut-outs of pure colours on black: the pixels of an object are those where its channel is at least half on."""
    scenes, colours = photographs.recipe(), {"red": 0, "green": 1, "blue": 2}
    cut_outs = []
    for word, channel in colours.items():
        for size in ((90, 120), (130, 40)):  # two that are as high as wide and two that are not: all four places
            pixels = np.zeros((size[1], size[0], 4), dtype=np.uint8)
            pixels[..., channel], pixels[: size[1] // 2, :, 3], pixels[:, : size[0] // 3, 3] = 255, 255, 255  # an L
            cut_outs.append(scenes.CutOut(f"{word}-{size[0]}", word, Image.fromarray(pixels)))
    found = list(itertools.islice(photographs.composites(cut_outs, [Image.new("RGB", (300, 200))]), 40))
    for case in found:
        image, mask = np.asarray(case["picture"]), case["region"]
        (word,) = case["words"]
        assert np.array_equal(mask, image[..., colours[word]] >= 128) and mask.any()
        rows, columns = (axis.mean() / size for axis, size in zip(np.nonzero(mask), mask.shape, strict=True))
        middle = {"left": columns < 0.5, "right": columns > 0.5, "top": rows < 0.5, "bottom": rows > 0.5}
        assert middle.get(case["kind"], True)
        others = {other for other, channel in colours.items() if image[..., channel].any()} - {word}
        assert len(others) == (case["kind"] != "alone")
        asked = "in the picture" if case["kind"] == "alone" else f"the {case['kind']}"
        assert case["question"].endswith(f" {asked}?")
    assert {case["kind"] for case in found} == {"alone", "left", "right", "top", "bottom"}
    again = next(itertools.islice(photographs.composites(cut_outs, [Image.new("RGB", (300, 200))]), 7, None))
    assert again["picture"].tobytes() == found[7]["picture"].tobytes()  # a scene is a function of its number


@pytest.mark.quick
def test_the_default_is_judged_by_the_lines_of_the_tournament(tmp_path: Path) -> None:
    """Scenes without a mask have no place; on the last, a blob in the middle beats what the fast setting found."""
    lines = judging.Lines(tmp_path)
    for scene in range(4):
        for name, gain, forward in (("igos++", 0.8, 40), ("igos++ (fast)", 0.6, 25), ("igos++ (thorough)", 0.9, 196)):
            facts = {"gain": gain, "deletion": 0.1, "insertion": 0.1 + gain, "trusted": True, "rounds": 1 + scene % 2}
            facts |= {"forward": forward, "backward": 24, "center": 0.8 if scene == 3 else 0.3}
            lines.add(line(scene, name, **facts))
    lines.add(line(4, "igos++", gain=0.1, deletion=0.1, insertion=0.2, trusted=True))  # of before the floor was known
    records = tune_igos.tournament_records(tmp_path, 9, "weights")
    assert len(records) == 12
    assert len(tune_igos.tournament_records(tmp_path, 2, "weights")) == 6
    wanted = argparse.Namespace(model=None, name="a model", hard=False, lines=tmp_path)
    found = tune_igos.summary(records, wanted, Counter())
    ahead = {name: pair["mean"] for name, pair in found["ahead_of"].items()}
    assert ahead == {"igos++ (fast)": pytest.approx(0.2), "igos++ (thorough)": pytest.approx(-0.1)}
    assert found["scenes"] == 4 and found["went_on"] == 2
    assert found["share_of_thorough"] == pytest.approx(0.8 / 0.9)
    assert found["settings"]["default"]["forward"]["mean"] == 40
    assert [one["trusted"] for one in found["settings"].values()] == [4, 3, 4]


@pytest.mark.quick
def test_plain_photographs_stand_among_the_composites() -> None:
    plain = [Image.new("RGB", (8, 8))] * 3
    endless = (
        {"picture": None, "region": None, "question": "", "words": ["a"], "kind": "left"} for _ in itertools.count()
    )
    kinds = [case["kind"] for case in photographs.mixed(endless, plain, 6)]
    assert kinds.count("photograph") == 3 and len(kinds) == 9
    assert "photograph" in kinds[:4]


def test_filling_a_place_leaves_the_rest(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- easy -->\nold\n<!-- /easy -->\nbelow\n", encoding="utf-8")
    for text in ("| new |", "| newer |"):
        judging.fill(page, "easy", text)
    assert page.read_text("utf-8") == "above\n<!-- easy -->\n| newer |\n<!-- /easy -->\nbelow\n"
    with pytest.raises(SystemExit, match="has no place <!-- hard -->"):
        judging.fill(page, "hard", "")
