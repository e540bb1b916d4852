"""Tables from finished units: means by hand, notes that say what is missing, all forms."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lvlm_probe.errors import StudyError
from lvlm_probe.metrics import Interval
from lvlm_probe.study.results import Results, collect
from lvlm_probe.study.run.units import Records, answer_content, digest, map_content, model_stamp
from lvlm_probe.study.spec import DatasetSpec, FilterSpec, MethodSpec, ModelSpec, Study
from lvlm_probe.study.tables.cells import share
from lvlm_probe.study.tables.ledger import ledger, printed
from lvlm_probe.study.tables.paper import make_table
from lvlm_probe.study.tables.table import Table

DROPS = {"1": 0.1, "2": 0.5, "3": 0.9, "10": 0.99}
GAINS = {"igos++": {"2": 0.8, "3": 0.6, "10": 1.0}, "rise": {"2": 0.5, "3": 0.5}}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(
        name="s",
        out=tmp_path,
        models={
            "small": ModelSpec("small", "demo", group="g", size=1, vision="a", paper="LLaVA-1.5-7b"),
            "large": ModelSpec("large", "demo", group="g", size=4, vision="b"),
        },
        datasets={"d": DatasetSpec("d", "demo", "test", paper="MMVP")},
        methods={
            "igos++": MethodSpec("igos++", "igos++", tables=(2, 3), paper="iGOS++"),
            "rise": MethodSpec("rise", "rise", tables=(2, 3), behaviour="release", paper="iGOS++"),
        },
        filter=FilterSpec(0.3),
    )


@pytest.fixture
def results(study: Study) -> Results:
    """Finished units as a run leaves them, with numbers that are easy to average."""
    answers, maps, models = (Records(study.out / name) for name in ("answers", "maps", "models"))
    for model, spec in study.models.items():
        models.write(model, {"model": model, "source": spec.source, "fingerprint": "f"})
        for sample, drop in DROPS.items():
            content = answer_content(study, "d", sample, spec, "f", image="p" + sample, question="q")
            made = {"status": "done", "answer": "red", "drop": drop, "drop_normalised": drop / 2}
            about = {"true_answer": "red" if sample != "3" else "blue", "choices": [], "group": "colour"}
            key = digest(content)
            answers.write(key, {**content, **about, **made})
            for row, gains in GAINS.items():
                asked = map_content(study, key, study.methods[row])
                if sample in gains:
                    offset = 0.1 if model == "large" else 0.0
                    found = {"status": "done", "map": "m", "reason": None, "passes": {"forward": 10, "backward": 4}}
                    found |= {
                        "deletion": 0.1 + offset,
                        "insertion": 0.1 + gains[sample],
                        "pointing": float(sample != "2"),
                    }
                    memory = {"measured_peak": 3 * 10**9, "weights": 12 * 10**9}
                    found |= {"measured": {"seconds": 2.0, "memory": memory, "machine": "some GPU"}}
                    person = {"soft_iou": 0.2, "rank_correlation": 0.5, "auc_judd": 0.7, "nss": None}
                    found |= {"human": [person]}
                    maps.write(digest(asked), {**asked, **found})
                elif sample in ("10",):
                    failure = {"status": "failed", "error": "OutOfMemory", "reason": "not even one mask fits"}
                    maps.write(digest(asked), {**asked, **failure})
    stale = map_content(
        dataclasses.replace(study, settings=dataclasses.replace(study.settings, grid=5)), "x", study.methods["rise"]
    )
    maps.write(digest(stale), {**stale, "status": "done", "map": "m"})
    return collect(study)


def estimates(table: Table, column: str) -> list[Any]:
    place = table.columns.index(column)
    return [cell.estimate if isinstance(cell, Interval) else cell for cell in (row[place] for row in table.rows)]


def test_the_filter_and_the_order_of_samples(results: Results) -> None:
    assert results.kept == {"d": ("2", "3", "10")}
    assert set(results.dropped["d"]) == {"1"}
    assert [record["sample"] for record in results.answers if record["model"] == "small"] == ["1", "2", "3", "10"]
    assert {record["correct"] for record in results.answers if record["sample"] == "3"} == {False}
    assert len(results.maps) == 2 * (3 + 3)


def test_table_1(results: Results) -> None:
    table = make_table(results, "1")
    assert estimates(table, "n") == [4, 4]
    assert estimates(table, "< 30 %, joint") == [25.0, 25.0]
    assert estimates(table, "30–70 %, joint") == [25.0, 25.0]
    assert estimates(table, "< 30 %, per token") == [50.0, 50.0]
    assert estimates(table, "30–70 %, per token") == [50.0, 50.0]
    assert estimates(table, "correct, %") == [75.0, 75.0]


def test_table_2_and_its_footer(results: Results) -> None:
    table = make_table(results, "2")
    assert estimates(table, "method") == ["igos++", "rise"] * 2
    assert estimates(table, "n") == [3, 2, 3, 2]
    assert estimates(table, "deletion ↓") == pytest.approx([0.1, 0.1, 0.2, 0.2])
    assert estimates(table, "insertion − deletion") == pytest.approx([0.8, 0.5, 0.7, 0.4])
    notes = " ".join(table.notes)
    assert "2 × OutOfMemory: not even one mask fits" in notes
    assert "d: 3 of 4 samples kept" in notes
    assert "1 × small hardly needs the image" in notes


def test_table_3_pairs_samples(results: Results) -> None:
    table = make_table(results, "3")
    assert estimates(table, "judged alike, less igos++") == [None, pytest.approx(-0.2), None, pytest.approx(-0.2)]
    with pytest.raises(StudyError, match=r"no method of this study belongs to table 5; .* tables: \[5\]"):
        make_table(results, "5")


@pytest.mark.quick
def test_table_4_tests_scale_and_architecture(results: Results) -> None:
    table = make_table(results, "4")
    assert estimates(table, "insertion − deletion") == pytest.approx([0.8, 0.7])
    scale, vision = table.notes[:2]
    assert scale.startswith("Scale of the decoder")
    assert "likelihood-ratio test of 'score ~ scale' against 'score ~ 1'" in scale
    assert "C(vision)" in vision


def test_table_4_says_when_scale_and_architecture_cannot_be_told_apart(results: Results, study: Study) -> None:
    assert "cannot tell which of the two" in make_table(results, "4").notes[2]
    third = dataclasses.replace(study.models["large"], name="third", vision="a")
    models = {**study.models, "third": third}
    maps = [*results.maps]
    for record in results.maps:
        if record["model"] == "large" and record["status"] == "done":
            maps.append({**record, "model": "third", "insertion": record["insertion"] - 0.05})
    three = dataclasses.replace(results, study=dataclasses.replace(study, models=models), maps=tuple(maps))
    assert "cannot tell" not in " ".join(make_table(three, "4").notes)


def test_a_map_without_a_score_is_counted_as_one(results: Results) -> None:
    maps = [
        {**record, "deletion": None, "verdict": "picture and baseline score alike"}
        if (record["sample"], record["model"], record["row"]) == ("2", "small", "igos++")
        else record
        for record in results.maps
    ]
    table = make_table(dataclasses.replace(results, maps=tuple(maps)), "2")
    assert estimates(table, "n")[0] == 2
    assert "1 × no score: picture and baseline score alike" in " ".join(table.notes)


def test_scores_that_divide_by_next_to_nothing_are_left_out_and_counted(results: Results) -> None:
    narrow = {"original_probability": 0.99, "mean_probability": 0.97}
    maps = [
        {**record, "insertion": 13.0, "baseline_check": narrow, "common": {"deletion": 0.1, "insertion": 0.5}}
        if (record["sample"], record["row"]) == ("2", "rise")
        else record
        for record in results.maps
    ]
    found = dataclasses.replace(results, maps=tuple(maps))
    table = make_table(found, "3")
    assert estimates(table, "n")[1] == 2
    assert estimates(table, "insertion ↑")[1] == pytest.approx(0.6), "of the other sample alone"
    assert "Scores are not clamped" in table.notes[-2]
    assert estimates(table, "judged alike: insertion − deletion")[1] == pytest.approx((0.4 + 0.5) / 2)
    assert "less than 0.05 of probability on the baseline" in table.notes[-1] and "rise: 2" in table.notes[-1]
    by_cell = {row[:5]: row[5:] for row in ledger(found).rows}
    assert by_cell["Table 2", "LLaVA-1.5-7b", "iGOS++", "MMVP", "insertion"][1].n == 1


def test_text_is_as_wide_as_the_terminal() -> None:
    """Whole where it fits; else without the bounds, which it says; wide characters take two columns."""
    mean = Interval(0.25, 0.125, 0.5, level=0.95, n=4)
    table = Table("t", "A title", ("model", "the data set", "deletion ↓"), (("a", "日本語", mean),), labels=2)
    assert table.text(80).splitlines() == [
        "A title",
        "",
        "model  the data set            deletion ↓",
        "─────  ────────────  ────────────────────",
        "a      日本語        0.250 [0.125, 0.500]",
    ]
    assert table.text(40).splitlines()[2:5] == [
        "model  the data            deletion ↓",
        "       set",
        "─────  ────────  ────────────────────",
    ]
    narrow = table.text(30).splitlines()
    assert "a      日本語       0.250" in narrow and "intervals" in " ".join(narrow)


@pytest.mark.parametrize(("true", "count"), [(0, 10), (3, 10), (8, 8), (1, 1), (17, 200)])
def test_shares_have_wilsons_interval(true: int, count: int) -> None:
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    low, high = proportion.proportion_confint(true, count, method="wilson")
    found = share([True] * true + [False] * (count - true))
    assert found is not None and found.n == count
    assert (found.estimate, found.low, found.high) == pytest.approx((100 * true / count, 100 * low, 100 * high))
    assert share([]) is None


def test_a_row_is_judged_alike_only_where_there_is_something_to_judge_it_by(results: Results) -> None:
    nothing = {"deletion": None, "insertion": None}
    maps = [{**record, "common": nothing} if record["row"] == "rise" else record for record in results.maps]
    table = make_table(dataclasses.replace(results, maps=tuple(maps)), "3")
    assert estimates(table, "judged alike, less igos++") == [None] * 4
    assert estimates(table, "insertion − deletion")[1] == pytest.approx(0.5)


def test_answers_without_a_probability_are_counted_in_table_1(results: Results) -> None:
    answers = [
        {**record, "drop": None, "drop_normalised": None} if record["sample"] == "2" else record
        for record in results.answers
    ]
    table = make_table(dataclasses.replace(results, answers=tuple(answers)), "1")
    assert estimates(table, "n") == [3, 3]
    assert "2 × the answer's probability is no number" in table.notes[1]


def test_results_are_of_the_weights_that_are_there_now(study: Study, results: Results) -> None:
    records = Records(study.out / "models")
    for model, spec in study.models.items():
        records.write(f"newer {model}", {"model": model, "source": spec.source, "fingerprint": "other"})
    assert collect(study).answers == (), "what was seen last, where files tell nothing"
    for spec in study.models.values():
        found = {"model": spec.name, "source": spec.source, "fingerprint": "f"}
        records.write(model_stamp(study, spec), found)
    assert len(collect(study).answers) == len(results.answers)


def test_table_8_shows_both_signs(results: Results) -> None:
    table = make_table(results, "8")
    assert estimates(table, "rank correlation ρ")[0] == "+0.500 ± 0.000"
    assert estimates(table, "ρ of the reversed map")[0] == "-0.500 ± 0.000"
    assert estimates(table, "NSS")[0] is None
    assert estimates(table, "soft IoU")[0] == pytest.approx(0.2)


def test_table_9(results: Results) -> None:
    table = make_table(results, "9")
    assert estimates(table, "passes, forward + backward") == ["10 + 4"] * 4
    assert estimates(table, "seconds") == [2.0] * 4
    assert estimates(table, "peak memory beside the weights, GB") == pytest.approx([3e9 / 1e9] * 4)
    assert estimates(table, "highest, weights included, GB") == pytest.approx([15.0] * 4)
    assert "some GPU" in table.notes[0]


def test_table_9_has_the_rows_that_name_it_and_small_models_in_megabytes(results: Results) -> None:
    study = results.study
    methods = {**study.methods, "rise": dataclasses.replace(study.methods["rise"], tables=(2, 9))}
    maps = [
        {**record, "measured": {**record.get("measured", {}), "memory": {"measured_peak": 2_000_000, "weights": 10**6}}}
        for record in results.maps
    ]
    table = make_table(
        dataclasses.replace(results, study=dataclasses.replace(study, methods=methods), maps=tuple(maps)), "9"
    )
    assert estimates(table, "method") == ["rise", "rise"]
    assert estimates(table, "highest, weights included, MB") == [3.0, 3.0]


@pytest.mark.quick
def test_figure_5_computed_and_annotated(results: Results, tmp_path: Path) -> None:
    table = make_table(results, "figure5")
    assert [row[:3] for row in table.rows] == [("large", "colour", 3), ("small", "colour", 3)]
    # Sample 2: right, pointing missed. Sample 3: wrong, pointing hit. Sample 10: right, hit.
    assert table.rows[1][3:] == ("33 %", "33 %", "33 %", "0 %")
    judged = tmp_path / "judged.csv"
    judged.write_text("dataset,sample,model,plausible,correct,category\nd,2,small,1,1,counting\nd,3,small,0,1,\n")
    table = make_table(results, "figure5", annotations=judged)
    assert table.rows == (
        ("small", "colour", 1, "0 %", "100 %", "0 %", "0 %"),
        ("small", "counting", 1, "100 %", "0 %", "0 %", "0 %"),
        ("small", "all categories", 2, "50 %", "50 %", "0 %", "0 %"),
    )
    judged.write_text("dataset,sample,model,plausible\nd,2,small,maybe\n")
    with pytest.raises(StudyError, match="line 2: plausible is 1 or 0, not 'maybe'"):
        make_table(results, "figure5", annotations=judged)
    judged.write_text("dataset,sample\n")
    with pytest.raises(StudyError, match="no column model, plausible"):
        make_table(results, "figure5", annotations=judged)


@pytest.mark.quick
def test_the_ledger_says_what_was_not_run(results: Results) -> None:
    table = ledger(results)
    assert len(table.rows) == sum(2 for _ in _printed_cells())
    by_cell = {row[:5]: row[5:] for row in table.rows}
    paper, release, corrected, n, ids = by_cell["Table 2", "LLaVA-1.5-7b", "iGOS++", "MMVP", "deletion"]
    assert paper == 0.366
    assert release.estimate == pytest.approx(0.1) and release.n == 2
    assert corrected.estimate == pytest.approx(0.1) and corrected.n == 3
    assert n == "3" and len(ids) == 12
    assert by_cell["Table 2", "LLaVA-OV-7b", "T-MM", "MMVP", "deletion"] == (0.528, "not run", "not run", "–", "–")
    assert by_cell["Table 1", "LLaVA-1.5-7b", "–", "MMVP", "< 30 %"][2].estimate == 25.0


def test_the_ledger_takes_table_9_of_one_model_with_the_highest_memory(results: Results, study: Study) -> None:
    def taking(record: Any) -> Any:
        peak = 4 * 10**9 if record.get("sample") == "3" else 3 * 10**9
        memory = {"measured_peak": peak, "weights": 12 * 10**9}
        return {**record, "measured": {"seconds": 1.0 if record["model"] == "small" else 9.0, "memory": memory}}

    by_cell = {
        row[:5]: row[5:] for row in ledger(dataclasses.replace(results, maps=tuple(map(taking, results.maps)))).rows
    }
    paper, _, corrected, n, _ = by_cell["Table 9", "–", "iGOS++", "–", "GB"]
    assert (paper, corrected, n) == (31.0, pytest.approx(16.0), "3")
    assert by_cell["Table 9", "–", "iGOS++", "–", "seconds"][2].estimate == 1.0, "the other model is another paper's"


def test_the_ledger_compares_the_release_by_its_own_rule(results: Results) -> None:
    maps = [
        {**record, "release": {"deletion": 0.4, "insertion": 0.6}} if record["row"] == "rise" else record
        for record in results.maps
    ]
    found = dataclasses.replace(results, maps=tuple(maps))
    by_cell = {row[:5]: row[5:] for row in ledger(found).rows}
    assert by_cell["Table 2", "LLaVA-1.5-7b", "iGOS++", "MMVP", "insertion"][1].estimate == pytest.approx(0.6)
    assert estimates(make_table(found, "2"), "insertion ↑")[1] == pytest.approx(0.6), (
        "0.1 + 0.5, by the rule of all rows"
    )


def _printed_cells() -> Any:
    for name, content in printed().items():
        for inner in content.values():
            if name == "table9":
                yield inner
            elif name in ("table1", "table8"):
                yield from inner.values()
            else:
                for sets in inner.values():
                    yield from sets.values()


@pytest.mark.quick
def test_all_forms(results: Results, tmp_path: Path) -> None:
    table = make_table(results, "2")
    made = table.write(tmp_path / "tables")
    assert [path.name for path in made] == [
        "table2.md",
        "table2.csv",
        "table2.tex",
        "table2.pdf",
        "table2-figure.png",
        "table2-figure.pdf",
        "table2-figure.svg",
    ]
    rows = list(csv.DictReader(io.StringIO(made[1].read_text())))
    assert float(rows[0]["insertion − deletion"]) == pytest.approx(0.8)
    assert float(rows[0]["insertion − deletion low"]) == pytest.approx(0.6)
    assert r"insertion $\uparrow$" in made[2].read_text()
    assert made[0].read_text().count("\n| ") == 1 + len(table.rows)
    assert Image.open(made[4]).size[0] > 500
    assert all(path.read_bytes().startswith(b"%PDF") for path in (made[3], made[5]))
    assert "Table 2" in made[6].read_text() and "<svg" in made[6].read_text()


def test_a_table_without_anything(study: Study) -> None:
    results = collect(study)
    assert estimates(make_table(results, "2"), "n") == [0] * 4
    assert estimates(make_table(results, "2"), "deletion ↓") == [None] * 4
    with pytest.raises(StudyError, match="no map of this study is finished"):
        make_table(results, "9")
    with pytest.raises(StudyError, match="there is no table '10'"):
        make_table(results, "10")


def printed_table(**change: Any) -> Table:
    def cell(value: float) -> Interval:
        return Interval(value, value - 0.1, value + 0.1, 0.95, 9)

    rows = (
        ("m", "a", cell(0.80004), 3.0, "+0.100 ± 0.010"),
        ("m", "b", cell(0.80001), 1.0, "+0.300 ± 0.010"),
        ("m", "c", cell(0.70001), 2.0, "+0.200 ± 0.010"),
        ("m", "untrusted", cell(0.99), 0.5, "+0.900 ± 0.010"),
        ("n", "a", cell(0.5), math.nan, None),
        ("n", "b", None, math.nan, None),
    )
    given = {"labels": 2, "better": {"rho": "higher"}, "doubted": frozenset({3}), **change}
    return Table("t", "Title", ("model", "method", "insertion ↑", "seconds ↓", "rho"), rows, **given)


@pytest.mark.quick
def test_best_and_second_in_print() -> None:
    """By hand: equal as printed shares the rank, the doubted row has none, a row alone is compared with nothing."""
    assert printed_table().ranks() == {
        (0, 2): "best", (1, 2): "best", (2, 2): "second", (1, 3): "best", (2, 3): "second", (1, 4): "best",
        (2, 4): "second",
    }  # fmt: skip
    lowest = printed_table(doubted=frozenset(), within=()).ranks()
    assert lowest[3, 2] == "best" and lowest[0, 2] == lowest[1, 2] == "second", "one group of all rows"
    assert lowest[3, 3] == "best" and lowest[1, 3] == "second" and (0, 3) not in lowest
    assert not printed_table(doubted=frozenset(range(6))).ranks()


@pytest.mark.quick
def test_latex_of_a_table() -> None:
    tex = printed_table().latex()
    assert tex.startswith("% Needs \\usepackage{booktabs}")
    assert r"\label{tab:t}" in tex
    assert r"\caption{Title. Best in bold; second underlined. In brackets: 95 \% intervals." in tex
    assert r"m & a & \textbf{0.800} {\scriptsize [0.700, 0.900]} & 3.000 & +0.100 $\pm$ 0.010 \\" in tex
    assert r"m & c & \underline{0.700} {\scriptsize [0.600, 0.800]} & \underline{2.000} & " in tex
    assert r"m & untrusted $\dagger$ & 0.990 {\scriptsize" in tex
    assert r"model & method & insertion $\uparrow$ & seconds $\downarrow$ & rho $\uparrow$ \\" in tex
    assert tex.count(r"\midrule") == 2 and tex.index(r"\midrule" + "\nn & a") > 0
    assert tex.count(r"\begin") == tex.count(r"\end") == 2


def test_a_table_as_a_page() -> None:
    """Nothing stands on anything else or beyond the page, and the best is bold."""
    page = printed_table(notes=("A note of many words. " * 12,)).page()
    page.set_dpi(720)  # as on paper: on a screen letters are moved to whole dots
    renderer = page.canvas.get_renderer()  # type: ignore[attr-defined]
    texts = [text for text in page.texts if text.get_text()]
    boxes = [text.get_window_extent(renderer) for text in texts]
    width, height = page.get_size_inches() * page.dpi
    assert all(box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in boxes)
    assert not [
        (one.get_text(), other.get_text())
        for number, one in enumerate(texts)
        for place, other in enumerate(texts[:number])
        if boxes[number].shrunk(0.98, 0.5).overlaps(boxes[place].shrunk(0.98, 0.5))
    ]
    bold = {text.get_text() for text in texts if text.get_fontweight() == "bold"}
    assert {"Title", "insertion ↑", "0.800", "1.000", "+0.300 ± 0.010"} <= bold and "0.990" not in bold


def test_a_row_of_untrusted_maps_is_never_best(results: Results) -> None:
    maps = tuple({**record, "trusted": record["row"] != "igos++"} for record in results.maps)
    maps = tuple({**record, "verdict": "do not trust: no better than chance"} for record in maps)
    table = make_table(dataclasses.replace(results, maps=maps), "2")
    rows = [number for number, row in enumerate(table.rows) if row[2] == "igos++"]
    assert table.doubted == frozenset(rows)
    assert not [place for place in table.ranks() if place[0] in rows]
