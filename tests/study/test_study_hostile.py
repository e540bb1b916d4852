"""Studies that nobody sane has written: read as data, refused with file and line, in bounded time and memory."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

import pytest
from campaigns import texts

import lvlm_probe.study.spec as spec_module
from lvlm_probe.errors import StudyError
from lvlm_probe.study import open_dataset
from lvlm_probe.study.spec import read_study

STUDY = """\
models:
  demo: demo
datasets:
  scenes: {reader: demo, source: eval, limit: 1}
methods:
  igos++: {}
"""
PARAMS = STUDY.replace("igos++: {}", "igos++: {params: {init_area: VALUE}}")
OPTIONS = STUDY.replace("limit: 1", "options: {hard: VALUE}")
ALIASES = "".join(f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))

WRONG = {
    "python tag": (PARAMS.replace("VALUE", "!!python/object/apply:os.system [id]"), 6, "tag"),
    "own tag": (STUDY.replace("demo: demo", "demo: !model demo"), 2, "tag"),
    "tag on a list": (PARAMS.replace("VALUE", "!!omap [{a: 1}]"), 6, "tag"),
    "set": (PARAMS.replace("VALUE", "!!set {a, b}"), 6, "tag"),
    "binary": (PARAMS.replace("VALUE", "!!binary R0lG"), 6, "tag"),
    "date": (PARAMS.replace("VALUE", "2024-01-01"), 6, "a date"),
    "date, deep": (PARAMS.replace("VALUE", "[{a: [1, {b: 2024-01-01}]}]"), 6, "a date"),
    "date as a name": (STUDY.replace("  demo: demo", "  2024-01-01: demo"), 2, "a date"),
    "merge key": (STUDY.replace("igos++: {}", "igos++: {<<: {alpha: 1}}"), 6, "merge key"),
    "merge key, deep": (PARAMS.replace("VALUE", "{<<: {a: 1}}"), 6, "merge key"),
    "recursion": (PARAMS.replace("VALUE", "&a [*a]"), 6, "no end"),
    "recursion in a mapping": (STUDY.replace("igos++: {}", "igos++: &a {params: *a}"), 6, "no end"),
    "alias bomb": (STUDY + "engine_options:\n  a0: &a0 [1]\n" + ALIASES, 12, "more than 10000"),
    "200,000 keys": (STUDY + "about:\n" + "".join(f"  k{n}: 1\n" for n in range(20_000)), None, "more than 10000"),
    "larger than a study": (STUDY + "# " + "x" * 2**20, None, "larger than"),
    "deep nesting": (PARAMS.replace("VALUE", "[" * 5000 + "]" * 5000), 6, "more than 32"),
    "deep nesting in blocks": (STUDY + "about: " + "- " * 5000, 7, None),
    "deep keys": (STUDY + "about:\n  " + "? " * 5000, 8, "more than 32"),
    "int of 5,000 digits": (STUDY + "settings: {seed: " + "9" * 5000 + "}", 7, "5000 characters"),
    "int in base 60": (STUDY + "settings: {seed: 1" + ":59" * 5000 + "}", 7, "characters"),
    "int of 30 digits": (STUDY + "settings: {seed: " + "9" * 30 + "}", 7, "no number that can be computed with"),
    "int, deep": (PARAMS.replace("VALUE", "[[1" + "0" * 30 + "]]"), 6, "no number that can be computed with"),
    "float beyond its range": (STUDY + "settings: {alpha: 1.0e+999}", 7, "no number that can be computed with"),
    "alpha: .nan": (STUDY + "settings: {alpha: .nan}", 7, "no number that can be computed with"),
    "alpha: -.inf": (STUDY.replace("igos++: {}", "igos++: {alpha: -.inf}"), 6, "no number that can be computed with"),
    ".nan, deep": (PARAMS.replace("VALUE", "[{a: .nan}]"), 6, "no number that can be computed with"),
    "grid of 10^9": (STUDY + "settings: {grid: 1000000000}", 7, "grid is at most 1024"),
    "steps of 10^9": (STUDY + "settings: {steps: 1000000000}", 7, "steps is at most"),
    "seed below 0": (STUDY + "settings: {seed: -1}", 7, "seed is at least 0"),
    "size 0": (STUDY.replace("demo: demo", "demo: {source: demo, size: 0}"), 2, "size is above 0"),
    "!!int word": (STUDY + "settings: {seed: !!int word}", 7, "'word' is no int"),
    "!!bool word": (PARAMS.replace("VALUE", "!!bool word"), 6, "'word' is no bool"),
    "number as a key": (PARAMS.replace("VALUE", "{1: 2}"), 6, "a key is a text"),
    "list as a key": (PARAMS.replace("VALUE", "{[1]: 2}"), 6, "a key is a text"),
    "list as a name": (STUDY.replace("  demo: demo", "  ? [a]\n  : demo"), 2, "a name is a text"),
    "key twice, deep": (PARAMS.replace("VALUE", "{a: 1, a: 2}"), 6, "twice"),
    "mapping as a text": (STUDY + "name: {a: b}", 7, "name is a text"),
    "list as about": (STUDY + "about: [a]", 7, "about is a text"),
    "true as an engine": (STUDY + "engine: true", 7, "engine is a text"),
    "list as engine_options": (STUDY + "engine_options: [a]", 7, "engine_options is a mapping"),
    "options as a list": (STUDY.replace("limit: 1", "options: [a]"), 4, "options is a mapping"),
    "no such parameter": (STUDY.replace("igos++", "occlusion").replace("{}", "{params: {sizes: 4}}"), 6, "'sizes'"),
    "NUL in a source": (STUDY.replace("demo: demo", 'demo: "a\\0b"'), 2, "U+0000"),
    "escape in a name": (STUDY.replace("  demo: demo", '  "\\e[2J": demo'), 2, "U+001B"),
    "half a character": (STUDY.replace("demo: demo", 'demo: "\\ud800"'), 2, "U+D800"),
    "beyond Unicode": (STUDY.replace("demo: demo", 'demo: "\\UFFFFFFFF"'), 2, None),
    "bare control character": (STUDY.replace("demo: demo", "demo: \x1b[2J"), 2, "U+001B"),
    "two documents": (STUDY + "---\na: b\n", None, "not YAML"),
    "unknown alias": (PARAMS.replace("VALUE", "*nowhere"), 6, "not YAML"),
    "unclosed": (STUDY + "settings: {alpha: 1", None, "not YAML"),
    "tab": (STUDY.replace("  demo: demo", "\tdemo: demo"), 2, "not YAML"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_its_line(name: str, tmp_path: Path) -> None:
    text, line, sentence = WRONG[name]
    path = tmp_path / "study.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    where = "" if name == "larger than a study" else rf", line {line or '[0-9]+'}: "
    with pytest.raises(StudyError, match=re.escape(str(path)) + where) as caught:
        read_study(path)
    assert (sentence or "") in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_aliases_are_taken_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(PARAMS.replace("VALUE", "&a 0.1").replace("igos++", "one") + "  two: {params: {init_area: *a}}\n")
    text = path.read_text().replace("one: {", "one: {method: igos++, ").replace("two: {", "two: {method: igos++, ")
    path.write_text(text)
    assert read_study(path).methods["two"].params == {"init_area": 0.1}


def test_a_home_that_there_is_not_is_a_name_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.replace("demo: demo", "demo: ~nosuchuser/model") + "out: ~nosuchuser/out\n")
    study = read_study(path)
    assert study.out == tmp_path / "~nosuchuser" / "out"
    assert study.located(study.models["demo"].source) == "~nosuchuser/model"


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "study.yaml")
    with pytest.raises(StudyError, match="cannot be read: it is no file"):
        read_study(tmp_path / "study.yaml")
    with pytest.raises(StudyError, match="cannot be read"):
        read_study(tmp_path)


def test_the_example_of_the_documentation_is_a_study(tmp_path: Path) -> None:
    block = (spec_module.__doc__ or "").split("::\n", 1)[1].split("\n\nEverything")[0]
    path = tmp_path / "study.yaml"
    path.write_text("\n".join(line.removeprefix("    ") for line in block.splitlines()))
    study = read_study(path)
    assert set(study.methods) == {"igos++", "quick", "paper", "joint"}
    scenes = study.datasets["scenes"]
    (sample,) = itertools.islice(open_dataset(scenes.reader, scenes.source), 1)
    assert sample.image.size


def test_no_file_says_that_code_is_trusted(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    assert not read_study(path).trust_remote_code
    assert "trust_remote_code" not in read_study(path).to_dict()
    for text in (STUDY + "trust_remote_code: true\n", STUDY.replace("demo: demo", "demo: {trust_remote_code: true}")):
        path.write_text(text)
        with pytest.raises(StudyError, match="has no 'trust_remote_code'"):
            read_study(path)


def test_mutated_studies_are_read_or_refused() -> None:
    tally = texts.STUDIES.run(0, 200, 1)
    assert tally.tried == 200
    assert not tally.broken, tally.examples
    assert tally.counts["read"] > 0
    assert tally.counts["refused"] > 50
