"""Records in a study's folder that no run has written: refused with the file and a way out, never a traceback."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lvlm_probe.errors import ProbeError, StudyError
from lvlm_probe.study.pages import write_page
from lvlm_probe.study.results import collect
from lvlm_probe.study.run.units import Records, answer_content, digest, map_content, model_stamp
from lvlm_probe.study.spec import DatasetSpec, FilterSpec, MethodSpec, ModelSpec, Study
from lvlm_probe.study.tables.document import document
from lvlm_probe.study.tables.export import export, state

PERSON = {"soft_iou": 0.2, "rank_correlation": 0.5, "auc_judd": 0.7, "nss": None}
SCORES = {"deletion": 0.1, "insertion": 0.8, "tie_share": 0.0, "trusted": True, "verdict": "no objection"}
CHECK = {"kind": "blur", "original_probability": 0.9, "mean_probability": 0.01}
ANSWER = {
    "true_answer": "red",
    "choices": ["red", "blue"],
    "group": "colour",
    "set": "a",
    "role": "original",
    "status": "done",
    "answer": "It is red.",
    "log_prob": -0.1,
    "baseline_log_prob": -9.0,
    "drop": 0.99,
    "drop_normalised": 0.7,
    "measured": {"seconds": 0.5, "machine": "some machine", "unit_seconds": 1.0, "processor_seconds": 1.0},
}
MAP = {
    "status": "done",
    "map": "m.heat.h5",
    "reason": None,
    "text": "red",
    "selected": 1,
    "passes": {"forward": 10, "backward": 4},
    **SCORES,
    "baseline_check": CHECK,
    "common": {**SCORES, "baseline_check": CHECK},
    "release": {"deletion": 0.2, "insertion": 0.7},
    "pointing": 1.0,
    "human": [PERSON],
    "words": [{"text": "red", "tokens": [3], "map": "word_0"}],
    "measured": {"seconds": 2.0, "memory": {"measured_peak": 3, "weights": 12}, "machine": "some machine"},
}
WRONG: tuple[Any, ...] = (
    None,
    True,
    7,
    -1.5,
    float("nan"),
    10**400,
    "x",
    "../x",
    "\ud800\x1b[2J",
    [],
    [[1]],
    {},
    {"a": 1},
)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A study of one finished answer and its map, on no files."""
    made = Study(
        "s",
        tmp_path,
        {"m": ModelSpec("m", "demo", size=1, vision="a", group="g", paper="LLaVA-1.5-7b")},
        {"d": DatasetSpec("d", "demo", "eval", limit=1, paper="MMVP")},
        {"row": MethodSpec("row", "center", tables=(2, 3, 8, 9), paper="iGOS++")},
        filter=FilterSpec(0.3),
    )
    Records(tmp_path / "models").write(
        model_stamp(made, made.models["m"]), {"model": "m", "source": "demo", "fingerprint": "f"}
    )
    content = answer_content(made, "d", "1", made.models["m"], "f", image="p", question="What is it?")
    Records(tmp_path / "answers").write(digest(content), {**content, **ANSWER})
    asked = map_content(made, digest(content), made.methods["row"])
    Records(tmp_path / "maps").write(digest(asked), {**asked, **MAP})
    return made


def record_file(study: Study, kind: str) -> Path:
    (file,) = (study.out / kind).glob("*.json")
    return file


def everything(study: Study) -> None:
    """All that is made of a study's records."""
    results = collect(study)
    state(results)
    export(results, study.out / "export")
    document(results, command="x")
    if results.answers:
        write_page(results, study.out / "page.html", overwrite=True)


def test_the_records_themselves_are_taken(study: Study) -> None:
    everything(study)
    results = collect(study)
    assert len(results.answers) == len(results.maps) == 1


@pytest.mark.parametrize("kind", ["answers", "maps", "models"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is damaged"),
        ("[" * 200_000, "nested too deep"),
        ('{"a":' * 200_000, "nested too deep"),
        ("[1]", "is no record"),
        ('"text"', "is no record"),
        ("1" * 5000, "is damaged"),
        ("\x00\xff", "is damaged"),
        ("", "is damaged"),
    ],
)
def test_what_is_no_record_is_named(kind: str, content: str, said: str, study: Study) -> None:
    file = record_file(study, kind)
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(StudyError, match=rf"{re.escape(str(file))} {said}|{said}") as caught:
        collect(study)
    assert str(file) in str(caught.value)
    assert "delete it and resume" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", ["answers", "maps", "models"])
def test_a_pipe_and_a_folder_are_not_read(kind: str, study: Study) -> None:
    file = record_file(study, kind)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(StudyError, match="it is not a regular file"):
        collect(study)
    file.unlink()
    file.mkdir()
    with pytest.raises(StudyError, match="it is a directory"):
        collect(study)


def test_a_file_where_the_records_are_to_be(study: Study, tmp_path: Path) -> None:
    record_file(study, "answers").unlink()
    (study.out / "answers").rmdir()
    (study.out / "answers").write_text("")
    with pytest.raises(StudyError, match=r"answers cannot be made: .*give the study another out"):
        collect(study)


@pytest.mark.parametrize("name", ["../m.heat.h5", "/etc/passwd", "a/b.h5", "..\\m.h5", "."])
def test_a_map_is_a_file_beside_its_record(name: str, study: Study) -> None:
    file = record_file(study, "maps")
    file.write_text(json.dumps({**json.loads(file.read_text()), "map": name}))
    with pytest.raises(StudyError, match="map is no name of a file beside it"):
        collect(study)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("answers", {"drop": "0.9"}, "drop is not a number"),
        ("answers", {"choices": "red"}, "choices is not a list of texts"),
        ("answers", {"true_answer": [1]}, "true_answer is not a text or a list of texts"),
        ("answers", {"status": "lost"}, "status 'lost'"),
        ("answers", {"unit": ["answer"]}, "of a unit"),
        ("maps", {"passes": [1, 2]}, "passes is not a mapping"),
        ("maps", {"passes": {"forward": 1}}, "passes: it has no 'backward'"),
        ("maps", {"measured": {"seconds": "long"}}, "measured: seconds is not a number"),
        ("maps", {"human": [{"soft_iou": "x"}]}, "soft_iou is not a number"),
        ("maps", {"deletion": 10**400}, "deletion is not a number"),
        ("maps", {"common": 5}, "common is not a mapping"),
        ("maps", {"words": [{"text": "red", "tokens": [[1]]}]}, "tokens is not a list of numbers"),
    ],
)
def test_a_wrong_type_is_named_with_its_entry(kind: str, changes: dict[str, Any], said: str, study: Study) -> None:
    file = record_file(study, kind)
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(StudyError, match=re.escape(f"{file} is no record of a unit: ")) as caught:
        collect(study)
    assert said in str(caught.value)


@pytest.mark.parametrize("kind", ["answers", "maps"])
def test_a_missing_entry_is_named(kind: str, study: Study) -> None:
    file = record_file(study, kind)
    record = json.loads(file.read_text())
    name = "choices" if kind == "answers" else "passes"
    del record[name]
    file.write_text(json.dumps(record))
    with pytest.raises(StudyError, match=f"it has no '{name}'"):
        collect(study)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a record."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from places(item)


@pytest.mark.parametrize("kind", ["answers", "maps", "models"])
def test_records_changed_at_random_are_taken_or_refused(kind: str, study: Study) -> None:
    generator, file = random.Random(kind), record_file(study, kind)
    whole = file.read_text()
    refused: list[str] = []
    for _ in range(40):
        record = json.loads(whole)
        container, key = generator.choice(list(places(record)))
        if generator.random() < 0.2:
            del container[key]
        else:
            container[key] = generator.choice(WRONG)
        file.write_text(json.dumps(record))
        try:
            everything(study)
        except ProbeError as error:
            refused.append(str(error))
    assert all(str(file) in message for message in refused)
    assert kind == "models" or len(refused) > 5


@pytest.mark.parametrize("sample", ["²", "9" * 5000, "٣", "", "007"])
def test_any_name_of_a_sample_has_its_place(sample: str, study: Study) -> None:
    model = study.models["m"]
    content = answer_content(study, "d", sample, model, "f", image="p", question="What is it?")
    Records(study.out / "answers").write(digest(content), {**content, **ANSWER})
    assert {record["sample"] for record in collect(study).answers} == {"1", sample}
