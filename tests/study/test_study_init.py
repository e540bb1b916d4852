"""A first file of a study on a table of one's own, and what a run of it says."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from command_line import run, succeed

from lvlm_probe import demo
from lvlm_probe.errors import StudyError
from lvlm_probe.study.spec import read_study
from lvlm_probe.study.starting import start


def scenes_in(folder: Path, count: int = 2, images: str = ".") -> list[dict[str, Any]]:
    """Rows on scenes, whose images lie in a folder beside the table."""
    found = []
    (folder / images).mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(demo.scenes(count)):
        scene.image.save(folder / images / f"{number}.png")
        found.append({"photo": f"{number}.png", "What to ask": scene.question, "truth": scene.answer})
    return found


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".json":
            json.dump(rows, file)
        elif path.suffix == ".jsonl":
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        else:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return path


def test_from_a_table_to_tables(tmp_path: Path) -> None:
    """The whole way on the embedded model: the file is written, runs as it stands, and makes tables."""
    data = written(tmp_path / "my data.csv", scenes_in(tmp_path, images="pics"))
    file = tmp_path / "new" / "study.yaml"
    shown = succeed("study", "init", data, "--out", file).out
    assert shown.splitlines()[-1].startswith("next:  lvlm-probe study run ")
    text = file.read_text(encoding="utf-8")
    assert 'image: "photo"  # by its name' in text and "question mark" in text
    assert "2 of the first 2 images open" in text
    spec = read_study(file).datasets["my data"]
    assert spec.options == {
        "columns": {"question": "What to ask", "image": "photo", "answer": "truth"},
        "images": "pics",
    }
    file.write_text(
        text.replace("igos++: {}", "attention: {}")
        .replace("gradcam: {}", "relative_attention: {}")
        .replace("max_new_tokens: 64", "max_new_tokens: 24, steps: 4")
    )
    done = succeed("study", "run", file)
    lines = done.out.splitlines()
    assert "1 model, 1 data set, 4 methods" in lines[0]
    assert any("an answer takes" in line and "1 of 2 to go" in line for line in lines)
    assert any("a map takes" in line and "at most 4 to go" in line for line in lines)
    assert lines[-2].startswith("next:  lvlm-probe study table") and "lvlm-probe study page" in lines[-1]
    again = succeed("study", "run", file).out
    assert "made: 0 answers, 0 maps" in again and "takes" not in again, "nothing was measured, nothing is foretold"
    quiet = succeed("study", "run", file, "--json")
    assert quiet.json["made"]["finished"] == 2 and "1 model," in quiet.err
    shown = succeed("study", "table", file, columns=80)
    assert (
        max(map(len, shown.out.split("tables: ")[0].splitlines())) <= 80
        and "Table 2" in shown.out
        and "&" not in shown.out
    )
    assert "Reproduction ledger" not in shown.out, "no number of the paper stands in a study on a table of one's own"
    assert "no table 3, 5" in shown.err and "ledger" in shown.err
    assert "Reproduction ledger" in succeed("study", "table", file, "--table", "ledger").out
    assert (file.parent / "runs" / "study" / "tables" / "table2.pdf").read_bytes().startswith(b"%PDF")
    refused = run("study", "init", data, "--out", file)
    assert refused.code == 2 and "--overwrite" in refused.err
    assert run("study", "init", data, "--out", file, "--overwrite").code == 0


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
def test_every_kind_of_table(tmp_path: Path, suffix: str) -> None:
    rows = [{**row, "bbox": "[[1, 2, 3, 4]]", "category": "c", "no": 7} for row in scenes_in(tmp_path)]
    made = start(written(tmp_path / f"x{suffix}", rows), tmp_path / "study.yaml")
    assert made.columns == {
        "question": "What to ask", "image": "photo", "answer": "truth", "group": "category", "boxes": "bbox",
    }  # fmt: skip
    assert not made.warnings


def test_parquet(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("datasets")
    pandas.DataFrame(scenes_in(tmp_path)).to_parquet(tmp_path / "x.parquet")
    assert start(tmp_path / "x.parquet", tmp_path / "study.yaml").columns["image"] == "photo"


@pytest.mark.quick
def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    rows = [{"file": "gone.png", "boxes": "[here]", "label: # odd": "x"}]
    data = written(tmp_path / "x.csv", rows)
    made = start(data, tmp_path / "study.yaml", model="owner/model", columns={"answer": "label: # odd"})
    (tmp_path / "study.yaml").write_text(made.text, encoding="utf-8")
    study = read_study(tmp_path / "study.yaml")
    assert study.models["model"].source == "owner/model"
    options = study.datasets["x"].options
    assert options["question"] == "Describe this image." and options["columns"]["answer"] == "label: # odd"
    said = " ".join(made.warnings)
    assert "'boxes' is not taken for boxes" in said and "0 of the first 1 images open" in said and "gone.png" in said
    assert "boxes" not in made.columns
    with pytest.raises(
        StudyError, match=r"no column of .* looks like an image or a video; it has 'a': say which, --column image"
    ):
        start(written(tmp_path / "none.csv", [{"a": 1}]), tmp_path / "study.yaml")
    with pytest.raises(StudyError, match="there is no column 'fil'; did you mean 'file'"):
        start(data, tmp_path / "study.yaml", columns={"image": "fil"})
    with pytest.raises(StudyError, match="there is no field 'imag'; did you mean 'image'"):
        start(data, tmp_path / "study.yaml", columns={"imag": "file"})
    with pytest.raises(StudyError, match="there is no file"):
        start(tmp_path / "nowhere.csv", tmp_path / "study.yaml")
    (tmp_path / "empty.csv").write_text("a,b\n")
    with pytest.raises(StudyError, match="holds no rows"):
        start(tmp_path / "empty.csv", tmp_path / "study.yaml")
