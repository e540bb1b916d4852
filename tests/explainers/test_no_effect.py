"""A picture that plays no part has no heatmap; a score that divides by next to nothing is none; neither is ever best.

Truth: a picture of one colour is its own blur, and a projector of zeros hands on no picture, so that replacing either
by its baseline changes nothing, exactly.
"""

from __future__ import annotations

import dataclasses
import html.parser
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_samples as samples
import study_samples
import tiny_models
import torch
from PIL import Image
from toy_replay import ToyReplay, box_weights

import lvlm_probe as probe
from lvlm_probe import causal
from lvlm_probe.causal.effects import agreement_score
from lvlm_probe.explainers import methods
from lvlm_probe.explainers.scores import LEAST_SHARE, too_narrow
from lvlm_probe.metrics import (
    CurveRule,
    Interval,
    bootstrap_ci,
    evaluate,
    human_agreement,
    mean_and_error,
    permutation_test,
    pointing_game,
)
from lvlm_probe.metrics.deletion_insertion import normalise
from lvlm_probe.metrics.verdict import Verdict, judge
from lvlm_probe.models.prompts import chat_inputs
from lvlm_probe.pages.ranking import standings
from lvlm_probe.replaying.teacher_forcing import rounding_of
from lvlm_probe.sanity import Completeness, stability
from lvlm_probe.study.pages.samples import gather
from lvlm_probe.study.tables.cells import mean, objection
from lvlm_probe.study.tables.paper import make_table
from lvlm_probe.study.tables.table import Table

BOX = box_weights(4, slice(0, 2), slice(0, 2))


class Cells(html.parser.HTMLParser):
    """Texts of a page's table cells."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.cells: list[str] = []
        self._inside = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "td":
            self._inside += 1
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside -= tag == "td"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.cells[-1] += data


def answer(model: Any, processor: Any, pictures: list[Image.Image], folder: Path, question: str, n: int = 8) -> Any:
    attached = probe.attach(model, processor)
    try:
        inputs = chat_inputs(processor, pictures, question)
        with attached.record(folder, images=pictures, question=question) as recording:
            model.generate(**inputs, max_new_tokens=n, do_sample=False)
    finally:
        attached.detach()
    return recording.traces[-1]


@pytest.fixture(scope="module")
def two(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A replay of an answer about the second of two pictures, the first of which is grey all over."""
    scene = probe.demo.scenes(2, seed=3)[1]
    trace = answer(*demo, [Image.new("RGB", (336, 336), (120, 120, 120)), scene.image],
                   tmp_path_factory.mktemp("two"), scene.question)  # fmt: skip
    return probe.replay(trace, *demo)


@pytest.fixture(scope="module")
def slight(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A replay of an answer about the second of two scenes, in which the first has a very small part."""
    first, second = probe.demo.scenes(2, seed=3)
    trace = answer(*demo, [first.image, second.image], tmp_path_factory.mktemp("slight"), first.question)
    return probe.replay(trace, *demo)


# -------------------------------------------------------------------------------------------------- no part, no heatmap


@pytest.mark.parametrize("method", methods())
def test_a_picture_without_a_part_has_no_heatmap_by_any_method(two: Any, method: str) -> None:
    heat = probe.explain(two, method=method, image=0)
    assert heat.values is None and heat.selection
    assert "image 1 of 2 plays no part" in str(heat.reason) and "at most 0 nats" in str(heat.reason)
    assert "its baseline is the image itself" in str(heat.reason)
    assert heat.provenance["passes"]["forward"] in (1, 3) and heat.provenance["passes"]["backward"] == 0
    assert "plays no part" in str(evaluate(heat, two).verdict) and heat.image_index == 0


def test_the_other_picture_of_the_same_answer_has_one(two: Any) -> None:
    heat = probe.explain(two, method="input_gradient", image=1)
    assert heat.values is not None
    score = evaluate(heat, two, grid=16, steps=8)
    assert score.reason is None and score.gain > 0.5


@pytest.mark.parametrize("with_processor", [True, False])
def test_a_model_that_hands_on_no_picture(with_processor: bool, tmp_path: Path) -> None:
    """One picture, with its processor and in pixel space."""
    model, processor = tiny_models.build("llava")
    with torch.no_grad():
        for weight in model.model.multi_modal_projector.parameters():
            weight.zero_()
    own = processor if with_processor else None
    attached = probe.attach(model, own)
    inputs = tiny_models.inputs("llava", model, processor, [tiny_models.picture()], "What is this?")
    with attached.record(tmp_path) as recording:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    attached.detach()
    (trace,) = recording.traces
    replay = probe.replay(trace, model, own)
    for method in ("igos++", "occlusion", "gradcam", "random"):
        heat = probe.explain(replay, method=method, tokens=(0, 2))
        assert heat.values is None and "the image plays no part" in str(heat.reason)
    alone = probe.explain(trace, method="random", tokens=(0, 2)) if trace.images else None
    assert alone is None or "the image plays no part" in str(alone.reason)


def test_tokens_that_move_against_each_other_are_moved() -> None:
    """What cancels in the sum is no absence of an effect."""
    replay = ToyReplay(torch.stack([BOX, BOX]), original=[0.8, 0.2], base=[0.2, 0.8])
    heat = probe.explain(replay, method="random", tokens=(0, 2), strengthen=False)
    assert heat.values is not None
    still = ToyReplay(torch.stack([BOX, BOX]), original=[0.8, 0.2], base=[0.8, 0.2])
    assert probe.explain(still, method="random", tokens=(0, 2), strengthen=False).values is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_word_that_is_certain_to_the_last_digit_has_no_slope(dtype: torch.dtype, tmp_path: Path) -> None:
    """Which is no word of regions: the baseline takes hundreds of nats."""
    model, processor = tiny_models.build("llava")
    with torch.no_grad():
        model.lm_head.weight.mul_(3000.0 if dtype == torch.float16 else 1e6)
    model.to(dtype)
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        inputs = tiny_models.inputs("llava", model, processor, [tiny_models.picture()], "What is on the left?")
        model.generate(**inputs.to(dtype), max_new_tokens=3, do_sample=False)
    replay = probe.replay(recording.traces[0], model, processor)
    assert not replay.original_log_probs.any() and float(replay.llr.max()) > 100
    for method in ("input_gradient", "gradcam", "tmm", "gradient_value"):
        heat = probe.explain(replay, method=method, tokens=(0, 3))
        assert heat.values is None and "gradient is zero in every cell" in str(heat.reason), method
    assert probe.explain(replay, method="occlusion", size=3, tokens=(0, 3)).values is not None


@pytest.mark.parametrize(
    "verb",
    [
        lambda replay, heat: causal.knockout(replay, heat, draws=1),
        lambda replay, heat: causal.patch(replay, heat, draws=1),
        lambda replay, heat: causal.modalities(replay, tokens=(0, 2)),
        lambda replay, heat: causal.which_parts(replay, tokens=(0, 2), progress=False),
    ],
    ids=["knockout", "patch", "modalities", "which_parts"],
)
def test_no_sentence_is_made_of_numbers_that_are_none(verb: Any, tmp_path: Path) -> None:
    """As in float16, where the image's features overflow: "the answer does not depend on them" was said of them."""
    model, processor = tiny_models.build("llava")
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        inputs = tiny_models.inputs("llava", model, processor, [tiny_models.picture()], "What is on the left?")
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    replay = probe.replay(recording.traces[0], model, processor)
    heat = probe.explain(replay, method="center", tokens=(0, 2))
    broken = model.lm_head.register_forward_hook(lambda _module, _args, output: output * torch.nan)
    try:
        with pytest.raises(probe.errors.ExplainError, match=r"not finite on .*: load the model in float32"):
            verb(probe.replay(recording.traces[0], model, processor), heat)
    finally:
        broken.remove()


# ------------------------------------------------------------------------------------- dividing by next to nothing


def test_a_picture_with_a_very_small_part_has_a_heatmap_and_no_score(slight: Any, tmp_path: Path) -> None:
    made = probe.compare(
        slight, ["attention", "input_gradient", "rollout"], image=0, grid=8, steps=4, out=tmp_path / "page.html"
    )
    (row,) = made.rows
    assert all(heat is not None and heat.values is not None for heat in row.heats)
    for score in row.scores:
        assert score is not None and math.isnan(score.gain) and not score.verdict.trusted
        assert "the whole image decides 0.0055 of the score" in str(score.reason)
        assert "undefined" in repr(score) and probe.metrics.Score.from_dict(score.to_dict()).reason == score.reason
    cells = Cells(made.path).cells
    assert len(cells) == 3 and all("–" in cell and "No score: the whole image decides" in cell for cell in cells)
    assert "best" not in " ".join(cells) and "nan" not in " ".join(cells).lower()
    for one in made.standings():
        assert one.gain is None and one.judged == 1 and sum(one.left_out.values()) == 1


@pytest.mark.parametrize("score", ["prob", "log"])
def test_the_share_below_which_there_is_no_score(score: Any) -> None:
    """Of the probability for ``prob``, of the geometric mean probability for ``log``: the same number here."""
    for original in (0.9, 1e-6):
        for share, defined in ((LEAST_SHARE * 1.02, True), (LEAST_SHARE * 0.98, False)):
            replay = ToyReplay(BOX, original=[original], base=[original * (1 - share)])
            heat = probe.explain(replay, method="random", tokens=(0, 1), strengthen=False)
            found = evaluate(heat, replay, score=score, steps=4)
            assert math.isfinite(found.gain) is defined and (found.reason is None) is defined
            assert np.isfinite(found.deletion_curve).all() == defined
            adaptive = evaluate(heat, replay, score=score, curve=CurveRule(sampling="adaptive"))
            assert math.isfinite(adaptive.gain) is defined
            assert np.isnan(adaptive.deletion_raw).any() == (not defined), "nothing is drawn that was not scored"


def test_ends_that_are_lost_in_what_lies_between_them() -> None:
    """The picture decides a tenth of a small probability, and half of it makes the words nearly certain."""
    assert too_narrow(1e-4, 0.9e-4) is None
    assert "run from" in str(too_narrow(1e-4, 0.9e-4, met=np.array([1e-4, 0.95, 0.9e-4])))
    assert too_narrow(0.9, 0.1, met=np.array([0.9, 1.0, 0.1])) is None
    assert "not numbers" in str(too_narrow(0.9, 0.1, met=np.array([0.9, np.nan, 0.1])))
    assert "not a number" in str(too_narrow(math.nan, 0.1)) and too_narrow(0.0, 0.0) and too_narrow(0.0, 0.2) is None
    assert np.isnan(normalise(np.array([0.5, 0.52]), original=0.5, baseline=0.49)).all()


def test_causal_agreement_and_completeness_divide_by_enough() -> None:
    tops, ends = [0.25, 0.5], {"original": 1.0, "everything": 0.1}
    assert math.isnan(agreement_score(tops, [0.9, 0.9], [0.1 + 1e-6, 0.1], **ends)), "was −477,778"
    assert math.isfinite(agreement_score(tops, [0.9, 0.9], [0.4, 0.2], **ends))
    assert math.isnan(Completeness(1.0, 1e-6).error) and Completeness(1.0, 1e-6).reason
    assert Completeness(1.0, 2.0).error == 0.5


# ------------------------------------------------------------------------------------------------ best, and in the mean

ABOUT_THE_MAP = "insertion − deletion is 0.10, not clearly above the 0 of a random heatmap (threshold 0.35)"
ABOUT_THE_MEASURE = (
    "taking the image away changes the probability of these tokens hardly at all (1 with the image, 0.99"
)


def test_objections_to_the_map_and_to_the_measurement() -> None:
    good = {"deletion": 0.1, "insertion": 0.9, "original_probability": 0.9, "baseline_probability": 0.01}
    assert judge(**good).measured
    for change in ({"insertion": 0.2}, {"tie_share": 0.9, "tie_spread": 0.3}, {"random_gains": (0.85, math.nan)}):
        found = judge(**good | change)
        assert not found.trusted and found.measured, change
    for change in (
        {"insertion": math.nan}, {"original_probability": 0.01}, {"baseline_probability": 0.5},
        {"replay_difference": 1.0}, {"parity_error": 9.0}, {"deterministic": False}, {"empty": "no reason"},
    ):  # fmt: skip
        found = judge(**good | change)
        assert not found.trusted and not found.measured, change
        assert Verdict.from_text(str(found)) == found == Verdict.from_dict(found.to_dict())
    assert judge(**good | {"random_gains": (math.nan,)}).trusted


def test_a_row_that_measures_nothing_is_never_best_and_in_no_mean(tmp_path: Path) -> None:
    heats, scores, labels = [], [], []
    for number in range(2):
        trace = samples.trace(f"trace-{number}")
        for label, gain, reasons in (
            ("steady", 0.6, ()), ("wild", 734.0 if number == 0 else 0.5, (ABOUT_THE_MEASURE,) if number == 0 else ()),
            ("floor", 0.1, (ABOUT_THE_MAP,)), ("none", math.nan, ("deletion and insertion are undefined: because",)),
        ):  # fmt: skip
            heats.append(samples.heat(trace, method="igos++"))
            scores.append(samples.score(deletion=0.0, insertion=gain, reasons=reasons))
            labels.append(label)
    made = probe.compare(heats, scores=scores, labels=labels, out=tmp_path / "page.html")
    steady, wild, floor, none = made.standings()
    assert [one.method for one in (steady, wild, floor, none)] == ["steady", "wild", "floor", "none"]
    assert wild.gain is not None and (wild.gain.estimate, wild.gain.n, wild.gain.missing) == (0.5, 1, 1)
    assert (wild.judged, wild.trusted, dict(wild.left_out)) == (2, 1, {ABOUT_THE_MEASURE: 1})
    assert floor.gain is not None and floor.gain.estimate == pytest.approx(0.1), "a bad map, well measured, counts"
    assert (floor.trusted, floor.gain.n) == (0, 2)
    assert none.gain is None and none.judged == 2 and sum(none.left_out.values()) == 2
    text = made.path.read_text(encoding="utf-8")
    assert "wild: 1 × Taking the image away changes" in text and "1 of 2" in text
    cells = Cells(made.path).cells
    assert ["best" in cell for cell in cells[:4]] == [True, False, False, False], (
        "0.60 is best where 734 was not to trust"
    )
    assert "734" in cells[1] and "do not trust" in cells[1]
    assert standings(["only"], []) and standings(["only"], [])[0].gain is None


def test_no_row_is_best_where_none_is_trusted(tmp_path: Path) -> None:
    heats = [samples.heat(samples.trace(), method=name) for name in ("one", "other")]
    scores = [samples.score(deletion=0.0, insertion=gain, reasons=("anything",)) for gain in (0.9, 0.3)]
    made = probe.compare(heats, scores=scores, out=tmp_path / "page.html")
    assert not any("best" in cell for cell in Cells(made.path).cells)


def test_study_tables_leave_out_what_measures_nothing(tmp_path: Path) -> None:
    results = study_samples.results(tmp_path, 4, models=("m",), methods=("igos++", "center"))
    methods_of = {name: dataclasses.replace(spec, tables=(2, 3)) for name, spec in results.study.methods.items()}
    study = dataclasses.replace(results.study, methods=methods_of)
    maps = []
    for record in results.maps:
        change = {"deletion": 0.1, "insertion": 0.7, "trusted": True, "verdict": "no objection: fine"}
        if record["sample"] == "0" and record["row"] == "igos++":
            change |= {"insertion": 734.1, "trusted": False, "verdict": f"do not trust: {ABOUT_THE_MEASURE}"}
        elif record["row"] == "center":
            change |= {"insertion": 0.2, "trusted": False, "verdict": f"do not trust: {ABOUT_THE_MAP}"}
        maps.append({**record, **change})
    results = dataclasses.replace(results, study=study, maps=tuple(maps))
    assert [objection(record) for record in maps if record["row"] == "igos++"].count(None) == 3
    for name, column in (("2", "insertion − deletion"), ("3", "judged alike: insertion − deletion"),
                         ("4", "insertion − deletion")):  # fmt: skip
        table = make_table(results, name)
        row = table.rows[0]
        cell = row[table.columns.index(column)]
        assert isinstance(cell, Interval) and cell.estimate == pytest.approx(0.6) and cell.n == 3
        assert ABOUT_THE_MEASURE in " ".join(table.notes), "and the table says so"
        for text in (table.markdown(), table.csv(), table.latex()):
            assert "734" not in text
    centre = make_table(results, "2").rows[1]
    assert isinstance(centre[-1], Interval) and centre[-1].estimate == pytest.approx(0.1)


def test_a_study_page_sorts_by_what_measures_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study_samples.open_without_files(monkeypatch)
    results = study_samples.results(tmp_path, 2, models=("m",), methods=("igos++",))
    doubted = {"insertion": 734.1, "trusted": False, "verdict": f"do not trust: {ABOUT_THE_MEASURE}"}
    maps = [{**record, **doubted} if record["sample"] == "0" else record for record in results.maps]
    first, second = (index["maps"][0][0] for index, _ in gather(dataclasses.replace(results, maps=tuple(maps))))
    assert first["counts"] is False and "counts" not in second


def test_cells_that_could_not_be_computed_are_dashes_in_every_form() -> None:
    nothing = Interval(math.nan, math.nan, math.nan, 0.95, 0)
    rows = (("a", 1, math.nan), ("b", 2, nothing), ("c", 3, None), ("d", 1, bootstrap_ci([0.5])), ("e", 4, math.inf))
    table = Table("t", "T", ("name", "n", "gain"), rows)
    assert table.markdown().count("–") == 4 and "0.500 |" in table.markdown() and "[0.500" not in table.markdown()
    assert table.latex().count("--") == 4
    assert table.csv().splitlines()[1:4] == ["a,1,,,", "b,2,,,", "c,3,,,"]
    assert not any(word in form for form in (table.markdown(), table.latex(), table.csv()) for word in ("nan", "inf"))


# --------------------------------------------------------------------------------------- what rounding may come to


def test_the_bound_is_what_moved_logits_do() -> None:
    """Against logits moved at random and at worst, in float64."""
    generator = torch.Generator().manual_seed(0)
    logits = 12 * torch.randn(50, 40, generator=generator, dtype=torch.float64)
    epsilon = float(torch.finfo(torch.bfloat16).eps)
    before = logits.log_softmax(-1)[:, 0]
    allowed = rounding_of(before, float(logits.abs().max()), epsilon)
    size = 1.5 * epsilon * logits.abs().max()
    worst = torch.cat([-torch.ones(50, 1), torch.ones(50, 39)], dim=1) * size
    random = (2 * torch.rand(50, 40, generator=generator, dtype=torch.float64) - 1) * size
    for moved in (worst, -worst, random):
        assert bool(((logits + moved).log_softmax(-1)[:, 0] - before).abs().le(allowed).all())
    tight = (before - (logits + worst).log_softmax(-1)[:, 0]) / allowed
    assert float(tight.max()) > 0.99, "and no more than that"
    huge = rounding_of(torch.tensor([0.0, -1.0]), 1e6, epsilon)
    assert bool(huge.isfinite().all())


def loud(top: float, dtype: torch.dtype, folder: Path, family: str = "llava") -> tuple[Any, Any, Any]:
    """A tiny model whose largest logit is ``top``, and its answer of 24 tokens, sampled."""
    model, processor = tiny_models.build(family, seed=3)
    pictures = [tiny_models.picture(seed=3)]
    inputs = tiny_models.inputs(family, model, processor, pictures, "What is this?")
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(top / float(model(**inputs).logits[:, -1].abs().max()))
    model.to(dtype)
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    attached = probe.attach(model, processor)
    torch.manual_seed(1)
    with attached.record(folder, images=pictures) as recording:
        model.generate(**cast, max_new_tokens=24, min_new_tokens=24, do_sample=True)
    attached.detach()
    return recording.traces[-1], model, processor


@pytest.mark.parametrize("top", [12, 25])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_healthy_recordings_are_not_branded_and_wrong_replays_are(
    top: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    trace, model, processor = loud(top, dtype, tmp_path)
    replay = probe.replay(trace, model, processor)
    found = probe.verify(trace, model, processor)
    assert found.within() and found.excess <= 1, found
    heat = probe.explain(replay, method="random", tokens=(0, 24), strengthen=False, size=2)
    said = "the replay differs from the recording"
    assert said not in str(evaluate(heat, replay, steps=1).verdict)
    with torch.no_grad():  # another model, by a tenth of its weights' spread
        generator = torch.Generator().manual_seed(0)
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator) * 0.1 * float(weight.float().std(correction=0))
            weight.add_(noise.to(dtype))
    other = probe.replay(trace, model, processor, strict=False)
    assert said in str(evaluate(heat, other, steps=1).verdict)
    missed = np.abs(np.asarray(trace.log_probs) - other.original_log_probs.numpy())
    assert (missed > 1.5 * np.maximum(1e-4, other.rounding.numpy())).any()


def test_a_recording_in_bfloat16_replayed_in_float32_allows_for_bfloat16(tmp_path: Path) -> None:
    trace, model, processor = loud(25, torch.bfloat16, tmp_path)
    coarse = probe.replay(trace, model, processor).rounding
    fine = probe.replay(trace, model.float(), processor, strict=False)
    assert trace.model["torch_dtype"] == "bfloat16" and torch.allclose(fine.rounding, coarse, rtol=0.5)
    missed = np.abs(np.asarray(trace.log_probs) - fine.original_log_probs.numpy())
    assert (missed <= fine.rounding.numpy()).all()


# ------------------------------------------------------------------------------------------------------------- corners


@pytest.fixture
def strict() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("score", ["prob", "log"])
@pytest.mark.parametrize("auc", ["trapezoid", "release"])
@pytest.mark.parametrize("values", [np.zeros((1, 1)), np.zeros((4, 4)), np.ones((3, 5)), np.eye(4)])
def test_constant_tied_and_single_cell_maps_are_scored(strict: Any, values: Any, auc: Any, score: Any) -> None:
    replay = ToyReplay(BOX)
    heat = dataclasses.replace(
        probe.explain(replay, method="random"), values=values.astype(np.float32), seen=np.ones(values.shape, bool)
    )
    found = evaluate(heat, replay, curve=CurveRule(auc=auc), score=score)
    assert math.isfinite(found.gain) and 0 <= found.tie_share <= 1
    if values.size == 1 and auc == "trapezoid":
        assert (found.deletion, found.insertion) == (0.5, 0.5) and not found.verdict.trusted


@pytest.mark.parametrize(
    ("original", "base", "defined"),
    [(1.0, 1e-12, True), (1.0, 1.0, False), (1e-12, 1e-12, False), (1e-11, 1e-9, True), (1e-7, 1e-10, True)],
)
def test_certain_and_impossible_tokens(strict: Any, original: float, base: float, defined: bool) -> None:
    replay = ToyReplay(BOX, original=[original], base=[base])
    selection = probe.select_tokens(replay, span=(0, 1))
    heat = probe.Heatmap(np.eye(4, dtype=np.float32), (64, 64), selection=selection)
    for score in ("prob", "log"):
        found = evaluate(heat, replay, score=score)
        assert math.isfinite(found.gain) is defined and not abs(found.gain) > 30
        assert (found.reason is None) is math.isfinite(found.gain)


def test_values_that_are_not_numbers_are_refused_or_said(strict: Any) -> None:
    with pytest.raises(probe.errors.ExplainError, match="within"):
        probe.Heatmap(np.array([[np.nan, 0.5]], dtype=np.float32), (8, 8))

    class Broken(ToyReplay):
        def log_probs(self, mask: Any = None, **more: Any) -> torch.Tensor:
            found = super().log_probs(mask, **more)
            half = None if mask is None else mask.mean(dim=(1, 2))[:, None].sub(0.5).abs() < 0.2
            return found if half is None else found.masked_fill(half, torch.nan)

    replay = Broken(BOX)
    heat = probe.Heatmap(np.eye(4, dtype=np.float32), (64, 64), selection=probe.select_tokens(replay))
    for sampling in ("full", "adaptive"):
        score = evaluate(heat, replay, curve=CurveRule(sampling=sampling))  # type: ignore[arg-type]
        assert math.isnan(score.gain) and "not numbers" in str(score.reason) and not score.verdict.measured


def test_statistics_of_nothing_one_and_all_equal(strict: Any) -> None:
    assert mean([]) is None and mean([None, math.nan, math.inf]) is None
    one = mean([0.5, None, math.nan])
    assert one is not None and (one.estimate, one.n, one.missing) == (0.5, 1, 2) and "[" not in str(one)
    equal = bootstrap_ci([0.25] * 6, method="bca")
    assert (equal.low, equal.estimate, equal.high, equal.n) == (0.25, 0.25, 0.25, 6)
    error = mean_and_error([0.5, math.nan, -math.inf])
    assert (error.mean, error.n, error.missing) == (0.5, 1, 2) and "nan" not in str(error)
    assert permutation_test([0.5] * 4, [0.5] * 4).p_value == 1.0
    for bad in ([], [math.nan], [1.0, math.inf]):
        with pytest.raises(ValueError, match="numbers"):
            bootstrap_ci(bad)
        with pytest.raises(ValueError, match="numbers"):
            permutation_test(bad, bad)


def test_comparisons_of_constant_maps(strict: Any) -> None:
    size = (40, 40)
    flat, zero = (probe.Heatmap(np.full((4, 4), value, dtype=np.float32), size) for value in (0.5, 0.0))
    found = stability([flat, zero])
    assert math.isnan(found.rank_correlation) and found.to_dict()["rank_correlation"] is None
    assert found.top_iou == 1.0 and "nan" not in repr(found)
    region = np.zeros((40, 40), dtype=bool)
    region[:10] = True
    assert math.isnan(pointing_game(flat, region))
    agreement = human_agreement(zero, np.ones((14, 14)))
    assert math.isnan(agreement.rank_correlation) and agreement.to_dict()["nss"] is None
