"""Pages of a study: what is on them, against the study's own records, and against figures worked out by hand."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import study_samples
from PIL import Image, ImageDraw
from typer.testing import CliRunner

import lvlm_probe as probe
from lvlm_probe.cli import app
from lvlm_probe.demo.scene import scenes
from lvlm_probe.errors import ReportError, StudyError
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.metrics import compare_maps
from lvlm_probe.study.pages import PART, changes, write_page
from lvlm_probe.study.pages.samples import MAP_SIDE, gather, rank_correlation
from lvlm_probe.study.results import Results, collect
from lvlm_probe.study.run.runner import run_study
from lvlm_probe.study.run.units import Records
from lvlm_probe.study.run.word_maps import read_words
from lvlm_probe.study.spec import Study, read_study

HARD = Path(__file__).parents[2] / "examples" / "hard_model"


def study_of(directory: Path, text: str) -> Study:
    path = directory / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return read_study(path)


def data_of(page: Path) -> dict[str, Any]:
    """The JSON of a page; of a folder, with its parts put together."""
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    if data["details"] is None:
        data["details"] = []
        for number, file in enumerate(sorted((page.parent / "data").iterdir())):
            call = re.fullmatch(r"lvlm_probe_part\((\d+), (.*)\);\n", file.read_text(encoding="utf-8"), re.DOTALL)
            assert call is not None and int(call[1]) == number
            data["details"] += json.loads(call[2])
    return data


def decoded(values: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(values["data"]), np.uint8).reshape(values["h"], values["w"]) / 255


# ------------------------------------------------------------------------------------------------- a study that was run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Two models on two scenes, without word maps."""
    study = study_of(
        tmp_path_factory.mktemp("study"),
        f"models: {{demo: demo, hard: {{source: {HARD}}}}}\n"
        "datasets: {scenes: {reader: demo, source: eval, limit: 2}}\n"
        "methods: {input_gradient: {}, joint: {method: input_gradient, tokens: joint}}\n"
        "settings: {grid: 8, steps: 4, max_new_tokens: 24}\n"
        "filter: {minimum_drop: 0}\n",
    )
    run_study(study)
    return study


@pytest.fixture(scope="module")
def with_words(finished: Study) -> Study:
    """The same study, when word maps are asked for later."""
    before = dict(Records(finished.out / "maps"))
    kept = {path: probe.Heatmap.read(path).values for path in (finished.out / "maps").glob("*.heat.h5")}
    study = dataclasses.replace(finished, settings=dataclasses.replace(finished.settings, words=True))
    counts = run_study(study)
    assert counts["answers"] == 0 and counts["maps"] == len(before)
    after = dict(Records(study.out / "maps"))
    assert {key: {k: v for k, v in record.items() if k != "words"} for key, record in after.items()} == before
    for path, values in kept.items():
        again = probe.Heatmap.read(path).values
        assert values is not None and again is not None
        np.testing.assert_array_equal(again, values)
    assert run_study(study)["maps"] == 0
    return study


def test_word_maps_are_those_of_the_words(with_words: Study) -> None:
    results = collect(with_words)
    model, processor = probe.demo.load()
    several = [one for one in results.chosen(model="demo", row="joint") if len(one["words"]) > 1]
    assert several, "an answer with more than one selected word is needed"
    record = several[0]
    file = with_words.out / "maps" / record["map"]
    replay = probe.replay(probe.open_trace(with_words.out / "answers" / f"{record['answer']}.h5"), model, processor)
    heat = probe.Heatmap.read(file)
    entries = read_words(record, file)
    assert sorted(token for entry in entries for token in entry["tokens"]) == sorted(heat.selection.indices)
    for entry in entries:
        part = dataclasses.replace(heat.selection, indices=tuple(entry["tokens"]))
        alone = probe.explain(replay.over(with_words.settings.baseline), method="input_gradient", tokens=part)
        if alone.values is None:  # words such as "the", in which the picture has no part
            assert entry["reason"] == alone.reason and "values" not in entry
        else:
            np.testing.assert_array_equal(entry["values"], alone.values)
    assert any("values" in entry for entry in entries)


def test_every_sample_answer_and_score_is_on_the_page(with_words: Study, tmp_path: Path) -> None:
    results = collect(with_words)
    page = write_page(results, tmp_path / "page.html")
    data = data_of(page)
    assert data["by"] == "models"
    assert [index["id"] for index in data["samples"]] == ["0", "1"]
    answers = {(record["sample"], record["model"]): record for record in results.answers}
    seen = 0
    for index, detail in zip(data["samples"], data["details"], strict=True):
        for m, model in enumerate(data["models"]):
            record = answers[index["id"], model]
            assert index["question"] == record["question"]
            assert index["answers"][m]["text"] == record["answer"].strip()
            assert index["answers"][m]["correct"] is record["correct"]
            trace = probe.open_trace(with_words.out / "answers" / f"{record['key']}.h5")
            words = detail["words"][m]
            assert "".join(before + text for before, text, _ in words["words"]) + words["tail"] == trace.answer.strip()
            told = [llr for _, _, llr in words["words"]]
            assert trace.llr is not None
            assert told == pytest.approx([trace.llr[word.start : word.stop].sum() for word in trace.words], abs=0.006)
    for record in results.maps:
        place = data["samples"][int(record["sample"])]
        m, k = data["models"].index(record["model"]), data["methods"].index(record["row"])
        score = place["maps"][m][k]
        assert (score["deletion"], score["insertion"]) == pytest.approx(
            (record["deletion"], record["insertion"]), abs=1e-4
        )
        assert score["trusted"] is record["trusted"]
        drawn = data["details"][place["n"]]["maps"][m][k]
        heat = Heatmap.read(with_words.out / "maps" / record["map"])
        assert heat.values is not None
        if max(heat.shape) <= MAP_SIDE:
            np.testing.assert_allclose(decoded(drawn["values"]), heat.values / heat.values.max(), atol=0.5 / 255 + 1e-6)
        assert len(drawn["words"]) == len(record["words"])
        assert any("map" in entry for entry in record["words"])
        seen += 1
    assert seen == 8
    assert str(with_words.out.parent) not in page.read_text(encoding="utf-8")


def test_agreement_is_the_rank_correlation_of_the_maps(with_words: Study) -> None:
    results = collect(with_words)
    index, detail = next(iter(gather(results)))
    heats = {
        (record["model"], record["row"]): Heatmap.read(with_words.out / "maps" / record["map"])
        for record in results.chosen()
        if record["sample"] == index["id"]
    }
    pair = compare_maps(heats["demo", "input_gradient"], heats["hard", "input_gradient"]).rank_correlation
    assert detail["pairs"]["models"][0] == pytest.approx([pair], abs=6e-4)
    assert index["agree"]["models"][0] == pytest.approx(pair, abs=6e-4)
    rows = list(results.study.methods)
    pairs = [
        compare_maps(heats["hard", rows[a]], heats["hard", rows[b]]).rank_correlation
        for a in range(len(rows))
        for b in range(a + 1, len(rows))
    ]
    assert detail["pairs"]["methods"][1] == pytest.approx(pairs, abs=6e-4)
    assert index["agree"]["methods"][1] == pytest.approx(float(np.mean(pairs)), abs=2e-3)


def test_agreement_leaves_out_what_one_of_two_does_not_see() -> None:
    generator = np.random.default_rng(1)
    seen = np.ones((6, 6), bool)
    seen[:, :2] = False
    first = Heatmap(generator.random((6, 6)), (60, 60), seen=seen)
    second = Heatmap(generator.random((6, 6)), (60, 60))
    assert rank_correlation(first, second) == pytest.approx(compare_maps(first, second).rank_correlation, abs=6e-4)
    assert rank_correlation(first, Heatmap(np.ones((6, 6)), (60, 60))) is None


def test_the_page_says_what_is_stored(with_words: Study, tmp_path: Path) -> None:
    results = collect(with_words)
    assert "the map of that word alone" in write_page(results, tmp_path / "a.html").read_text(encoding="utf-8")
    bare = dataclasses.replace(
        results, maps=tuple({k: v for k, v in record.items() if k != "words"} for record in results.maps)
    )
    page = write_page(bare, tmp_path / "b.html")
    assert "words: true" in page.read_text(encoding="utf-8")
    assert all(cell["words"] == {} for detail in data_of(page)["details"] for row in detail["maps"] for cell in row)


def test_files_that_are_gone_are_told(with_words: Study, tmp_path: Path) -> None:
    results = collect(with_words)
    moved = dataclasses.replace(results, study=dataclasses.replace(results.study, out=tmp_path / "elsewhere"))
    data = data_of(write_page(moved, tmp_path / "page.html"))
    detail = data["details"][0]
    assert detail["image"] is None and any("cannot be read" in note for note in detail["notes"])
    assert detail["words"][0] == {"words": [], "tail": data["samples"][0]["answers"][0]["text"]}
    assert "elsewhere/" not in json.dumps(data)


def test_the_command(with_words: Study, tmp_path: Path) -> None:
    file = with_words.out.parent.parent / "study.yaml"
    out = tmp_path / "folder"
    for extra, code in (([], 0), ([], 1), (["--overwrite"], 0)):
        result = CliRunner().invoke(app, ["study", "page", str(file), "--out", str(out), "--by", "methods", *extra])
        assert (result.exit_code != 0) is bool(code), result.output
    assert data_of(out / "index.html")["by"] == "methods"
    result = CliRunner().invoke(app, ["study", "page", str(file)])
    assert result.exit_code == 0, result.output
    assert data_of(with_words.out / "page.html")["by"] == "models"
    result = CliRunner().invoke(app, ["study", "page", str(file), "--out", str(tmp_path / "g.html"), "--by", "groups"])
    assert result.exit_code != 0 and not (tmp_path / "g.html").exists()


# ----------------------------------------------------------------------------------------------------- samples together


def test_references() -> None:
    def one(role: str | None, question: str, picture: str) -> dict[str, Any]:
        return {"role": role, "question": question, "picture": picture}

    members = [
        one("original", "q0", "p0"),
        one("counterfactual question", "q1", "p0"),
        one("counterfactual image", "q0", "p1"),
        one("counterfactual image", "q1", "p1"),
        one("counterfactual image", "q2", "p2"),
    ]
    # An edited picture is compared under the same question, and where nobody else was asked it, with the original.
    assert changes.references(members) == {1: 0, 2: 0, 3: 1, 4: 0}
    assert changes.references([one(None, "q", "a"), one(None, "q", "b")]) == {1: 0}  # pairs without roles (MMVP)
    assert changes.references([]) == {}


@pytest.mark.quick
def test_question_diff() -> None:
    assert changes.question_diff("Is the cup red?", "Is the cup blue?") == [
        ("Is the cup ", "same"),
        ("red", "gone"),
        ("blue", "new"),
        ("?", "same"),
    ]
    parts = changes.question_diff("How many dogs are there?", "How many are there in all?")
    assert "".join(text for text, kind in parts if kind != "gone") == "How many are there in all?"
    assert "".join(text for text, kind in parts if kind != "new") == "How many dogs are there?"


def test_changed_region_is_where_pixels_differ(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(60, 180, (9, 12, 3), dtype=np.uint8))
    grain = generator.normal(0, 6, (240, 320, 1))
    pixels = np.asarray(coarse.resize((320, 240), Image.Resampling.BICUBIC)) + grain
    before = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    after = before.copy()
    ImageDraw.Draw(after).rectangle((40, 30, 99, 89), fill=(255, 0, 0))
    region = changes.changed_region(before, after)
    assert region.mask is not None and region.mask.shape == (240, 320)
    inside = np.zeros((240, 320), bool)
    inside[30:90, 40:100] = True
    wide = np.zeros((240, 320), bool)
    wide[24:96, 34:106] = True
    assert region.mask[inside].mean() > 0.99 and not region.mask[~wide].any()
    # Saved as JPEG, a picture is not changed; a small copy is brought to size.
    for quality in (75, 95):
        after.save(tmp_path / "a.jpg", quality=quality)
        assert changes.changed_region(after, Image.open(tmp_path / "a.jpg")).mask is None
    small = changes.changed_region(before.resize((160, 120)), after)
    assert small.mask is not None and small.mask[inside].mean() > 0.99
    for other, why in (
        (before, "do not differ"),
        (Image.new("RGB", (320, 240), "white"), "nearly everywhere"),
        (before.resize((240, 240)), "different shapes"),
    ):
        found = changes.changed_region(before, other)
        assert found.mask is None and why in str(found.reason)


def test_looking() -> None:
    mask = np.zeros((40, 40), bool)
    mask[:20, :20] = True
    values = np.zeros((2, 2), np.float32)
    values[0, 0], values[1, 1] = 1.0, 1.0
    there = Heatmap(np.kron(values, np.ones((20, 20), np.float32)), (40, 40))
    nowhere = Heatmap(np.ones((40, 40), np.float32), (40, 40))
    look = changes.looking(there, nowhere, changes.Region(mask))
    assert look == {
        "mass": 0.5,
        "mass_before": 0.25,
        "area": 0.25,
        "rank_correlation": None,
        "top_iou": look["top_iou"],
    }  # type: ignore[index]
    half = np.ones((40, 40), bool)
    half[:, 20:] = False
    assert changes.looking(Heatmap(np.ones((40, 40)), (40, 40), seen=half), None, changes.Region(mask)) == {
        "mass": 1.0 / 2,
        "mass_before": None,
        "area": 1.0 / 2,
        "rank_correlation": None,
        "top_iou": None,
    }
    again = changes.looking(there, there, changes.Region(None, "the same"))
    assert again is not None and again["rank_correlation"] == pytest.approx(1) and again["mass"] is None
    assert changes.looking(None, there, changes.Region(mask)) is None


def test_stance() -> None:
    assert changes.stance("Yes, there is.", ("yes", "no")) == changes.stance("yes!", ("yes", "no")) == "yes"
    assert changes.stance("No.", ("yes", "no")) == "no"
    assert changes.stance("It is Red.", ()) == changes.stance("it is red", ())
    assert changes.stance("Yes and no", ("yes", "no")) == "yes and no"


def test_sets_of_hallusion_bench(tmp_path: Path) -> None:
    (scene,) = scenes(1, seed=3, split="eval")
    folder = tmp_path / "bench" / "hallusion_bench" / "VS" / "scene"
    folder.mkdir(parents=True)
    scene.image.save(folder / "0_0.png")
    pixels = np.array(scene.image)
    pixels[scene.mask] = pixels[scene.mask][:, ::-1]
    Image.fromarray(pixels).save(folder / "0_1.png")
    other = scene.question.replace("What", "Which")
    assert other != scene.question

    def row(figure: str, question: str, visual: str, text: str, truth: str) -> dict[str, str]:
        return {
            "category": "VS",
            "subcategory": "scene",
            "visual_input": visual,
            "set_id": "0",
            "figure_id": figure,
            "question_id": question,
            "question": text,
            "gt_answer": truth,
            "filename": f"./VS/scene/0_{figure}.png",
        }

    rows = [
        row("0", "0", "1", scene.question, "1"),
        row("0", "1", "1", other, "0"),
        row("1", "0", "2", scene.question, "1"),
    ]
    (tmp_path / "bench" / "HallusionBench.json").write_text(json.dumps(rows))
    study = study_of(
        tmp_path,
        "models: {demo: demo}\n"
        f"datasets: {{bench: {{reader: hallusion-bench, source: {tmp_path / 'bench'}}}}}\n"
        "methods: {input_gradient: {}}\n"
        "settings: {grid: 8, steps: 4}\n"
        "filter: {minimum_drop: 0}\n",
    )
    run_study(study)
    results = collect(study)
    assert [(record["set"], record["role"]) for record in results.answers] == [
        ("VS-scene-0", "original"),
        ("VS-scene-0", "counterfactual question"),
        ("VS-scene-0", "counterfactual image"),
    ]
    data = data_of(write_page(results, tmp_path / "page.html", by="groups"))
    first, asked, edited = data["samples"]
    assert "ref" not in first and asked["ref"] == edited["ref"] == 0
    changed = data["details"][1]["change"]
    assert changed["region"] is None and not changed["image"] and changed["reason"] == "it is the same image"
    assert ["Which", "new"] in changed["question"] and changed["truth"] is True
    changed = data["details"][2]["change"]
    assert changed["question"] is None and changed["truth"] is False
    region = changes.changed_region(scene.image, Image.fromarray(pixels))
    assert region.mask is not None and region.mask[scene.mask].mean() > 0.9
    heats = {
        record["sample"]: Heatmap.read(study.out / "maps" / record["map"]) for record in results.chosen(model="demo")
    }
    if edited["id"] in heats:
        look = changed["looks"][0][0]
        values = heats[edited["id"]].upsampled().astype(np.float64)
        assert look["mass"] == pytest.approx(values[region.mask].sum() / values.sum(), abs=1e-3)
        assert look["area"] == pytest.approx(region.mask.mean(), abs=1e-3)
        assert edited["looked"][0][0] == pytest.approx(look["mass"] / look["area"], abs=2e-2)
    old = tuple({k: v for k, v in record.items() if k not in ("set", "role")} for record in results.answers)
    again = data_of(write_page(dataclasses.replace(results, answers=old), tmp_path / "old.html", by="groups"))
    assert again["samples"] == data["samples"] and again["details"] == data["details"]
    answers = {record["role"]: record for record in results.answers}
    same = changes.stance(answers["original"]["answer"], ("yes", "no")) == changes.stance(
        answers["counterfactual question"]["answer"], ("yes", "no")
    )
    assert asked["same"] == [same] and asked["fooled"] == [same] and edited["fooled"] == [False]


# --------------------------------------------------------------------------------------------------------- made up data


def test_hostile_text_stays_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study_samples.open_without_files(monkeypatch)
    evil = "</script><script>alert({n})</script><img src=x onerror=alert(1)> {{title}} <!--"
    made = study_samples.results(
        tmp_path, 2, models=("<b>one</b>", "two"), question=evil.replace("{{", "{{{{").replace("}}", "}}}}")
    )
    page = write_page(made, tmp_path / "page.html")
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == 2 and text.count("</script>") == 2
    assert "<img src=x" not in text and "<b>one" not in text
    data = data_of(page)
    assert (
        data["samples"][0]["question"]
        == "</script><script>alert(0)</script><img src=x onerror=alert(1)> {{title}} <!--"
    )
    assert data["models"][0] == "<b>one</b>"
    folder = write_page(made, tmp_path / "folder")
    for file in [folder, *(folder.parent / "data").iterdir()]:
        assert "<script>alert" not in file.read_text(encoding="utf-8")
    assert data_of(folder)["samples"] == data["samples"]


def test_a_sample_takes_bounded_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study_samples.open_without_files(monkeypatch, size=(1600, 1200), cells=200)
    sizes = {}
    for n in (4, 14):
        page = write_page(study_samples.results(tmp_path, n), tmp_path / f"{n}.html")
        sizes[n] = page.stat().st_size
    cells = MAP_SIDE * MAP_SIDE * 4 / 3
    # Four maps and two word maps, a picture of 336 pixels, and words.
    assert (sizes[14] - sizes[4]) / 10 < 6 * cells + 40_000
    assert sizes[4] < 4 * (6 * cells + 40_000) + 150_000


@pytest.mark.quick
def test_thousands_make_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study_samples.open_without_files(monkeypatch)
    out = tmp_path / "out"
    few = write_page(study_samples.results(out, 3, models=("one",), methods=("m",)))
    assert few == out / "page.html" and data_of(few)["by"] == "methods"
    told: list[tuple[int, int]] = []
    many = write_page(
        study_samples.results(out, 301, models=("one",), methods=("m",)), tell=lambda *how_far: told.append(how_far)
    )
    assert many == out / "page" / "index.html" and told[-1] == (301, 301)
    data = data_of(many)
    assert len(data["samples"]) == len(data["details"]) == 301
    assert [index["n"] for index in data["samples"]] == list(range(301))
    assert len(list((many.parent / "data").iterdir())) == -(-301 // PART)
    assert many.stat().st_size < 350 * 301 + 150_000  # the index holds no pictures and no maps
    assert not list(out.glob("*.part"))


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study_samples.open_without_files(monkeypatch)
    made = study_samples.results(tmp_path, 2)
    target = tmp_path / "folder"
    write_page(made, target)
    with pytest.raises(ReportError, match="exists"):
        write_page(made, target)
    write_page(made, target, overwrite=True)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ReportError, match="other things"):
        write_page(made, target, overwrite=True)
    assert (target / "notes.txt").read_text() == "mine"
    write_page(made, tmp_path / "a.html")
    with pytest.raises(ReportError, match="exists"):
        write_page(made, tmp_path / "a.html")


def test_what_cannot_be_shown_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study_samples.open_without_files(monkeypatch)
    made = study_samples.results(tmp_path, 2)
    with pytest.raises(StudyError, match="belong together"):
        write_page(made, tmp_path / "a.html", by="groups")
    with pytest.raises(StudyError, match="side by side"):
        write_page(made, tmp_path / "a.html", by="colour")
    with pytest.raises(StudyError, match="no answers yet"):
        write_page(Results(made.study, (), ()), tmp_path / "a.html")


def test_failures_and_dropped_samples_have_their_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study_samples.open_without_files(monkeypatch)
    made = study_samples.results(tmp_path, 3)
    answers = [dict(record) for record in made.answers]
    answers[0] |= {"status": "failed", "error": "ImageError", "reason": "the file /home/ada/secret/a.png is broken"}
    maps = [dict(record) for record in made.maps if record["sample"] != "0"]
    maps[0] |= {"status": "failed", "error": "ExplainError", "reason": "no gradients"}
    maps[1] |= {"map": None, "reason": "nothing to explain"}
    results = dataclasses.replace(
        made,
        answers=tuple(answers),
        maps=tuple(maps),
        kept={"scenes": ("1", "2")},
        dropped={"scenes": {"0": "first failed"}},
    )
    data = data_of(write_page(results, tmp_path / "page.html"))
    first, second, _ = data["samples"]
    assert first["answers"][0]["failed"] == "ImageError: the file a.png is broken"
    assert first["dropped"] == "first failed" and first["maps"] == [[None, None], [None, None]]
    cells = data["details"][1]["maps"][0]
    assert cells[0] == {"none": "ExplainError: no gradients"} and cells[1] == {"none": "nothing to explain"}
    assert second["maps"][0] == [None, None]
