"""Asked again with a region taken away: the same answer as the user's own masked call, and the smallest region."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError, ReplayError
from lvlm_probe.explainers.curve_points import curve_masks, rank
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.pages.edits import edits_of


@dataclasses.dataclass
class Asked:
    """A question about two objects, "The cross is green and the star is yellow.", and a map of "green"."""

    scene: Any
    answer: Any
    heat: Heatmap

    @property
    def replay(self) -> probe.Replay:
        return self.answer.replay

    def by_hand(self, mask: torch.Tensor, baseline: Any = None) -> str:
        """What the user's own generate() says under the mask, through the probe's `masked`."""
        model, processor = self.answer.replay.model, self.answer.replay.processor
        inputs = processor.apply_chat_template(
            self.scene.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        replay = self.replay if baseline is None else self.replay.over(baseline)
        with probe.attach(model, processor) as attached:
            options = {"images": [self.scene.image], "baseline": replay.baseline_image()}
            with attached.masked(mask, **options), torch.no_grad():
                output = model.generate(**inputs, do_sample=False, max_new_tokens=40)
        return str(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


@pytest.fixture(scope="module")
def asked(demo: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Asked:
    scene = probe.demo.scenes(1, kinds=["pair"])[0]
    answer = probe.ask(*demo, scene.image, scene.question, out=tmp_path_factory.mktemp("edit"))
    assert answer.text == scene.answer == "The cross is green and the star is yellow."
    heat = probe.explain(answer.replay, tokens="green", method="occlusion", progress=False)
    return Asked(scene, answer, heat)


@pytest.mark.quick
def test_without_the_object_it_was_asked_about_the_word_is_gone_and_without_others_it_stays(asked: Asked) -> None:
    cross, star = asked.scene.word_masks
    before = asked.replay.passes.forward
    without = probe.edit(asked.replay, asked.heat, remove=cross)
    assert without.flipped and ("green", "hidden") in without.changes
    assert without.area == pytest.approx(cross.mean()) and without.cells is None
    assert asked.replay.passes.forward - before == without.answers == 2  # the whole image is asked about too
    assert without.answer == asked.by_hand(torch.from_numpy(~cross).float(), asked.heat.provenance["baseline"])
    rows, cols = star.nonzero()
    box = (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1)
    other = probe.edit(asked.replay, asked.heat, remove=[box])
    assert not other.flipped and other.changes == (("yellow", "hidden"),)
    assert str(other).endswith("(yellow → hidden), and still 'green'.")
    alone = probe.edit(asked.replay, tokens="green", keep=cross | star)
    assert not alone.flipped and alone.answer.startswith("The cross is green and the star is")
    corner = probe.edit(asked.replay, asked.heat, remove=(0, 0, 20, 20))
    assert corner.changes == () and str(corner) == "Without this 0.35 % of the image it says the same."


def test_the_smallest_region_flips_and_one_cell_less_does_not(asked: Asked) -> None:
    found = probe.edit(asked.replay, asked.heat, progress=False)
    assert found.smallest and found.flipped and found.correction == found.area < 0.1
    seen, values = asked.heat.seen, asked.heat.values
    assert found.cells is not None and found.answers <= 2 * int(seen.sum()).bit_length() + 2
    assert found.area == pytest.approx(found.cells / values.size)
    order = rank(values, seen, np.random.default_rng(0))
    kind = asked.heat.provenance["baseline"]
    for cells, stays in ((found.cells, False), (found.cells - 1, True)):
        mask = curve_masks(order, np.array([cells]), values.shape, insert=False)[0]
        assert asked.by_hand(mask, kind).startswith("The cross is green") is stays
    assert str(found).startswith(f"Without this {100 * found.area:.2g} % of the image it says “The cross is hidden")


def test_until_asks_for_a_word_or_by_a_function(asked: Asked) -> None:
    cross, _ = asked.scene.word_masks
    for until in ("HIDDEN", lambda answer: "hidden" in answer):
        assert probe.edit(asked.replay, asked.heat, remove=cross, until=until).flipped
    assert not probe.edit(asked.replay, asked.heat, remove=cross, until="purple").flipped
    assert not probe.edit(asked.replay, asked.heat, remove=cross, until="hid").flipped, "a part of another word"


def test_a_map_that_flips_nothing_says_so(asked: Asked) -> None:
    found = probe.edit(asked.replay, asked.heat, until="purple", progress=False)
    assert not found.smallest and not found.flipped and found.correction is None and found.area == 1.0
    assert str(found).startswith("Without all of the image it says “The cross is hidden")


def test_amcr_and_csr_count_what_is_never_corrected() -> None:
    areas = [0.05, 0.10, 0.25, None]
    assert probe.metrics.amcr(areas) == pytest.approx((0.05 + 0.10 + 0.25 + 1) / 4)
    assert probe.metrics.csr(areas) == 0.5
    assert probe.metrics.csr(areas, budget=0.3) == 0.75
    assert np.isnan(probe.metrics.amcr([])) and np.isnan(probe.metrics.csr([]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"remove": 0.1, "keep": 0.1}, "give one of them"),
        ({"remove": 0}, r"a share of the image in \(0, 1\]"),
        ({"keep": "largest"}, "a share of the image"),
        ({"remove": True}, "a share of the image"),
        ({"remove": np.zeros((4, 4))}, "something in it"),
        ({"keep": np.linspace(0, 1, 16).reshape(4, 4)}, "keep as an array is a mask"),
        ({"remove": [(400, 0, 500, 20)]}, "outside the image"),
    ],
)
def test_what_is_no_region_is_refused(asked: Asked, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ExplainError, match=said):
        probe.edit(asked.replay, asked.heat, **arguments)


def test_who_cannot_be_asked_again(asked: Asked) -> None:
    with pytest.raises(ExplainError, match="give boxes"):
        probe.edit(asked.replay, remove=0.1, tokens="green")
    with pytest.raises(ExplainError, match="on the model itself"):
        probe.edit(SimpleNamespace(), asked.heat)  # type: ignore[arg-type]
    empty = Heatmap(None, asked.heat.image_size, selection=asked.heat.selection, reason="nothing there")
    with pytest.raises(ExplainError, match="nothing there"):
        probe.edit(asked.replay, empty)


def test_an_answer_that_was_sampled_is_refused(demo: tuple[Any, Any], asked: Asked, tmp_path: Path) -> None:
    torch.manual_seed(1)
    hot = {"do_sample": True, "temperature": 30.0, "top_k": 0, "max_new_tokens": 6}
    sampled = probe.ask(*demo, asked.scene.image, asked.scene.question, out=tmp_path, **hot)
    with pytest.raises(ExplainError, match="record it with do_sample=False"):
        probe.edit(sampled.replay, remove=[(0, 0, 9, 9)], tokens=(0, 5))


def test_the_users_model_is_left_alone(asked: Asked, demo: tuple[Any, Any]) -> None:
    model, _ = demo
    config = model.generation_config
    before = {name: id(value) for name, value in vars(model).items()}
    state = torch.random.get_rng_state()
    probe.edit(asked.replay, asked.heat, remove=0.05)
    assert {name: id(value) for name, value in vars(model).items()} == before
    assert model.generation_config is config and torch.equal(torch.random.get_rng_state(), state)
    with probe.attach(*demo) as attached, attached.record(asked.answer.trace.path.parent) as recording:
        probe.edit(asked.replay, asked.heat, remove=0.05)
        assert not recording.paths  # its answers are nobody's recording
        recording._met = True  # and nothing to warn of


@pytest.mark.parametrize("name", ["qwen2_5_vl", "mllama", "gemma3"])
def test_families_are_asked_again_with_their_own_inputs(name: str, tmp_path: Path) -> None:
    model, processor = tiny_models.build(name)
    inputs = tiny_models.inputs(name, model, processor, [tiny_models.picture()], "What is it?")
    options = {"images": [tiny_models.picture()], "llr": False, "attention": False}
    with probe.attach(model, processor) as attached, attached.record(tmp_path, **options) as recording:
        model.generate(**inputs, max_new_tokens=5, do_sample=False)
    replay = probe.replay(recording.traces[0], model, processor)
    whole = np.ones((4, 4), dtype=bool)
    same = probe.edit(replay, keep=whole, tokens=(0, len(replay.tokens)))
    assert not same.changes and same.answer == same.original
    masked = torch.zeros(4, 4)
    with probe.attach(model, processor) as attached, attached.masked(masked, images=[tiny_models.picture()]):
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    by_hand = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert probe.edit(replay, remove=whole, tokens=(0, len(replay.tokens))).answer.split() == by_hand.split()


# ---------------------------------------------------------------- kept, shown, on the command line


def test_it_is_kept_with_the_map_and_shown_on_the_page(asked: Asked, tmp_path: Path) -> None:
    found = probe.edit(asked.replay, asked.heat, remove=0.05)
    again = probe.edit(asked.replay, asked.heat, remove=0.05, until="hidden")
    kept = again.attached(found.attached(asked.heat))
    assert [one["flipped"] for one in kept.provenance["edits"]] == [again.flipped]  # the same region: replaced
    kept = probe.edit(asked.replay, asked.heat, keep=0.05).attached(kept)
    read = Heatmap.read(kept.write(tmp_path / "map.h5"), trace=asked.answer.trace)
    assert read.provenance["edits"] == json.loads(json.dumps(kept.provenance["edits"]))
    first, second = edits_of(read, [asked.scene.image])
    assert first["src"].startswith("data:image/") and second["src"] != first["src"]
    assert first["lead"] == "Without this 5.1 % of the image" and ["green", "hidden"] in first["changes"]
    page = probe.report([read], out=tmp_path / "report.html").read_text("utf-8")
    assert "Without this 5.1 % of the image" in page and "With nothing but this 5.1 %" in page


@pytest.mark.parametrize(
    "record",
    [
        3,
        None,
        [3],
        [{}],
        [{"kind": "say"}],
        {"kind": "remove"},
        [{"kind": "keep", "cells": -4, "changes": 9}],
        [{"kind": "keep", "notes": 5}],
    ],
)
def test_what_a_file_claims_of_edits_is_shown_only_if_it_is_one(asked: Asked, record: object) -> None:
    heat = dataclasses.replace(asked.heat, provenance={**asked.heat.provenance, "edits": record})
    assert all(one["src"] is None and one["changes"] == [] for one in edits_of(heat, [asked.scene.image]))


def test_another_packages_model_names_the_way_out(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    from lvlm_probe.models.drivers import Driver

    driver = Driver(asked.replay.model, None)
    replay = asked.replay.viewed()
    replay.model = driver
    with pytest.raises(ReplayError, match=r"attach\(model, processor\)\.masked"):
        probe.edit(replay, asked.heat, remove=0.1)
