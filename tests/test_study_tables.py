"""Tables from finished units: means by hand, notes that say what is missing, all forms."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lvlm_probe.errors import StudyError
from lvlm_probe.metrics import Interval
from lvlm_probe.study.ledger import ledger, printed
from lvlm_probe.study.paper_tables import make_table
from lvlm_probe.study.results import Results, collect
from lvlm_probe.study.spec import DatasetSpec, FilterSpec, MethodSpec, ModelSpec, Study
from lvlm_probe.study.tables import Table
from lvlm_probe.study.units import Records, answer_content, digest, map_content

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
            content = answer_content(study, "d", sample, spec, "f", picture="p" + sample, question="q")
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
                    found |= {"measured": {"seconds": 2.0}, "human": [{"soft_iou": 0.2, "rank_correlation": 0.5,
                              "auc_judd": 0.7, "nss": None}]}  # fmt: skip
                    maps.write(digest(asked), {**asked, **found})
                elif sample in ("10",):
                    failure = {"status": "failed", "error": "OutOfMemory", "reason": "not even one mask fits"}
                    maps.write(digest(asked), {**asked, **failure})
    stale = map_content(dataclasses.replace(study, settings=dataclasses.replace(study.settings, grid=5)), "x",
                        study.methods["rise"])  # fmt: skip
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
    assert estimates(table, "correct") == [0.75, 0.75]


def test_table_2_and_its_footer(results: Results) -> None:
    table = make_table(results, "2")
    assert estimates(table, "method") == ["igos++", "rise"] * 2
    assert estimates(table, "n") == [3, 2, 3, 2]
    assert estimates(table, "deletion ↓") == pytest.approx([0.1, 0.1, 0.2, 0.2])
    assert estimates(table, "insertion − deletion") == pytest.approx([0.8, 0.5, 0.7, 0.4])
    notes = " ".join(table.notes)
    assert "2 × OutOfMemory: not even one mask fits" in notes
    assert "d: 3 of 4 samples kept" in notes
    assert "1 × small hardly needs the picture" in notes


def test_table_3_pairs_samples(results: Results) -> None:
    table = make_table(results, "3")
    assert estimates(table, "judged alike, less igos++") == [None, pytest.approx(-0.2), None, pytest.approx(-0.2)]
    with pytest.raises(StudyError, match=r"no method of this study belongs to table 5; .* tables: \[5\]"):
        make_table(results, "5")


def test_table_4_tests_scale_and_architecture(results: Results) -> None:
    table = make_table(results, "4")
    assert estimates(table, "insertion − deletion") == pytest.approx([0.8, 0.7])
    scale, vision = table.notes[:2]
    assert scale.startswith("Scale of the decoder")
    assert "likelihood-ratio test of 'score ~ scale' against 'score ~ 1'" in scale
    assert "C(vision)" in vision


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
    assert estimates(table, "peak memory, GiB") == [None] * 4


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
    )
    judged.write_text("dataset,sample,model,plausible\nd,2,small,maybe\n")
    with pytest.raises(StudyError, match="line 2: plausible is 1 or 0, not 'maybe'"):
        make_table(results, "figure5", annotations=judged)
    judged.write_text("dataset,sample\n")
    with pytest.raises(StudyError, match="no column model, plausible"):
        make_table(results, "figure5", annotations=judged)


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


def test_all_forms(results: Results, tmp_path: Path) -> None:
    table = make_table(results, "2")
    made = table.write(tmp_path / "tables")
    assert [path.name for path in made] == ["table2.md", "table2.csv", "table2.tex", "table2.png"]
    rows = list(csv.DictReader(io.StringIO(made[1].read_text())))
    assert float(rows[0]["insertion − deletion"]) == pytest.approx(0.8)
    assert float(rows[0]["insertion − deletion low"]) == pytest.approx(0.6)
    assert r"insertion $\uparrow$" in made[2].read_text()
    assert made[0].read_text().count("\n| ") == 1 + len(table.rows)
    assert Image.open(made[3]).size[0] > 500


def test_a_table_without_anything(study: Study) -> None:
    results = collect(study)
    assert estimates(make_table(results, "2"), "n") == [0] * 4
    assert estimates(make_table(results, "2"), "deletion ↓") == [None] * 4
    with pytest.raises(StudyError, match="no map of this study is finished"):
        make_table(results, "9")
    with pytest.raises(StudyError, match="there is no table '10'"):
        make_table(results, "10")
