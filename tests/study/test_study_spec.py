"""Studies read from YAML: what a file says, and where it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from lvlm_probe.errors import StudyError
from lvlm_probe.study.spec import FilterSpec, Settings, read_study

WHOLE = """\
name: demo
models:
  demo: demo
  other: {source: dir/model, dtype: bfloat16, device_map: auto, group: a, size: 7}
datasets:
  scenes: {reader: demo, source: test, limit: 3, options: {hard: true}}
methods:
  igos++: {}
  paper: {method: igos++, params: {preset: release}, tokens: joint, tables: [2, 3]}
  occlusion:
settings: {alpha: 2, steps: 20}
filter: {minimum_drop: 0.5, normalised: true}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.quick
def test_a_whole_study(tmp_path: Path) -> None:
    study = read_study(written(tmp_path, WHOLE))
    assert study.name == "demo"
    assert study.out == tmp_path / "runs" / "study"
    assert study.models["demo"].source == "demo"
    assert study.models["other"].dtype == "bfloat16"
    assert study.models["other"].size == 7.0
    assert study.datasets["scenes"].options == {"hard": True}
    assert study.methods["igos++"].method == "igos++"
    assert study.methods["paper"].params == {"preset": "release"}
    assert study.methods["paper"].tables == (2, 3)
    assert study.methods["occlusion"].tokens == "llr"
    assert study.settings == Settings(alpha=2.0, steps=20)
    assert study.filter == FilterSpec(0.5, True)


@pytest.mark.parametrize(
    ("change", "line", "sentence"),
    [
        (("demo: demo", "demo: {sourc: demo}"), 3, "did you mean 'source'"),
        (("demo: demo", "demo: {dtype: float32}"), 3, "model demo has no source"),
        (("limit: 3", "limit: 0"), 6, "limit is at least 1"),
        (("limit: 3", "limit: many"), 6, "limit is a whole number, not 'many'"),
        (("reader: demo, ", ""), 6, "data set scenes has no reader"),
        (("method: igos++", "method: igos"), 9, "there is no explainer 'igos'"),
        (("tokens: joint", "tokens: all"), 9, "tokens is one of llr, joint, keywords"),
        (("tables: [2, 3]", "tables: [two]"), 9, "list of whole numbers"),
        (("tokens: joint", "search_dtype: float16"), 9, "search_dtype is one of bfloat16, not 'float16'"),
        (("steps: 20", "steps: 0"), 11, "steps is at least 1"),
        (("minimum_drop: 0.5", "minimum_drop: 50"), 12, "between 0 and 1"),
        (("normalised: true", "normalised: 1"), 12, "normalised is true or false"),
        (("methods:", "metods:"), 7, "did you mean 'methods'"),
        (("  other:", "  demo:"), 4, "'demo' twice"),
        (("  igos++: {}", "  igos++: {params: 3}"), 8, "params is a mapping"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, change: tuple[str, str], line: int, sentence: str) -> None:
    assert change[0] in WHOLE
    with pytest.raises(StudyError, match=f"study.yaml, line {line}: ") as caught:
        read_study(written(tmp_path, WHOLE.replace(*change, 1)))
    assert sentence in str(caught.value)


def test_sources_are_found_beside_the_file_and_nothing_of_its_place_is_handed_on(tmp_path: Path) -> None:
    (tmp_path / "dir" / "model").mkdir(parents=True)
    study = read_study(written(tmp_path, WHOLE.replace("name: demo\n", "name: demo\nabout: Two\n  lines.\n")))
    assert study.about == "Two lines."
    assert study.located("dir/model") == str(tmp_path / "dir" / "model")
    assert study.located("owner/on-the-hub") == "owner/on-the-hub"
    (tmp_path / "demo").mkdir()
    assert study.located("demo") == "demo", "the embedded model, whatever lies beside the file"
    assert study.models["other"].source == "dir/model"
    record = study.to_dict()
    assert "base" not in record
    assert str(tmp_path) not in str({name: value for name, value in record.items() if name != "out"})


def test_a_file_that_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="cannot be read"):
        read_study(tmp_path / "none.yaml")
    with pytest.raises(StudyError, match="is empty"):
        read_study(written(tmp_path, "# nothing\n"))
    with pytest.raises(StudyError, match=r"line 2: not YAML"):
        read_study(written(tmp_path, "models: {a: b}\n  - c\n"))
    with pytest.raises(StudyError, match="a study is a mapping"):
        read_study(written(tmp_path, "- models\n"))
    with pytest.raises(StudyError, match="there are no methods"):
        read_study(written(tmp_path, "models: {a: b}\ndatasets: {c: {reader: demo, source: test}}\n"))
