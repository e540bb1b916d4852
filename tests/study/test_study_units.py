"""Keys and records of a study's units, the filter, and when an answer is right."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lvlm_probe.errors import StudyError
from lvlm_probe.study.run.sample_filter import is_correct, verdict
from lvlm_probe.study.run.units import Records, answer_content, digest, image_digest, map_content
from lvlm_probe.study.spec import DatasetSpec, FilterSpec, MethodSpec, ModelSpec, Settings, Study


def study(out: Path = Path("runs"), **changes: Any) -> Study:
    base = Study(
        name="s",
        out=out,
        models={"m": ModelSpec("m", "demo"), "n": ModelSpec("n", "demo")},
        datasets={"d": DatasetSpec("d", "demo", "test")},
        methods={"igos++": MethodSpec("igos++", "igos++")},
    )
    return dataclasses.replace(base, **changes)


PLAIN = study()


def test_a_key_changes_with_what_the_result_depends_on_and_with_nothing_else() -> None:
    model = ModelSpec("m", "demo")

    def answer(study_: Study = PLAIN, model_: ModelSpec = model, **changes: str) -> str:
        given = {"dataset": "d", "sample": "1", "fingerprint": "f", "image": "p", "question": "q", **changes}
        dataset, sample, fingerprint = given.pop("dataset"), given.pop("sample"), given.pop("fingerprint")
        return digest(answer_content(study_, dataset, sample, model_, fingerprint, **given))

    same = answer()
    assert same == answer(model_=dataclasses.replace(model, group="g", device="cuda"))
    assert same == answer(study(settings=Settings(grid=7, alpha=3)))
    others = [answer(**{name: "else"}) for name in ("dataset", "sample", "fingerprint", "image", "question")]
    others += [answer(model_=dataclasses.replace(model, **change)) for change in ({"dtype": "bfloat16"}, {"name": "n"})]
    others += [answer(study(settings=Settings(baseline="blank"))), answer(study(settings=Settings(max_new_tokens=5)))]
    assert len({same, *others}) == 1 + len(others)

    method = MethodSpec("row", "igos++")

    def a_map(study_: Study = PLAIN, **changes: Any) -> str:
        return digest(map_content(study_, changes.pop("answer", "a"), dataclasses.replace(method, **changes)))

    assert a_map() == a_map(name="another row of the same", tables=(3,)) == a_map(alpha=1.0) == a_map(baseline="blur")
    changed = [a_map(answer="b"), a_map(method="rise"), a_map(params={"size": 8}), a_map(tokens="joint")]
    changed += [a_map(alpha=2.0), a_map(baseline="noise"), a_map(behaviour="release"), a_map(search_dtype="bfloat16")]
    changed += [a_map(study(settings=Settings(**{name: 9}))) for name in ("grid", "steps", "seed")]
    assert len({a_map(), *changed}) == 1 + len(changed)
    assert "search_dtype" not in map_content(PLAIN, "a", method), "keys of units that are kept stay what they were"


def test_a_picture_is_known_by_its_pixels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "copy.png")
    assert image_digest(picture) == image_digest(Image.open(tmp_path / "copy.png"))
    pixels[2, 2, 1] ^= 1
    assert image_digest(picture) != image_digest(Image.fromarray(pixels))
    assert image_digest(picture) != image_digest(picture.transpose(Image.Transpose.ROTATE_90))


def test_records_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records(tmp_path / "units")
    assert records.read("k") is None
    assert "k" not in records
    records.write("k", {"status": "done", "nan": math.nan, "numbers": (np.float32(0.5), np.int64(3)), "text": "à"})
    assert records.read("k") == {"status": "done", "nan": None, "numbers": [0.5, 3], "text": "à"}
    assert [key for key, _ in records] == ["k"]

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(StudyError, match="No space left"):
        records.write("other", {"status": "done"})
    assert sorted(path.name for path in records.directory.iterdir()) == ["k.json"]
    monkeypatch.undo()

    records.path("broken").write_text("{", encoding="utf-8")
    with pytest.raises(StudyError, match=r"broken\.json is damaged .* delete it and resume"):
        records.read("broken")
    records.path("list").write_text(json.dumps([1]), encoding="utf-8")
    with pytest.raises(StudyError, match="is no record"):
        records.read("list")


@pytest.mark.parametrize(
    ("drops", "rule", "expected"),
    [
        ({"m": 0.3, "n": 0.9}, FilterSpec(0.3), None),
        ({"m": 0.29, "n": 0.9}, FilterSpec(0.3), r"m hardly needs the image \(drop 0.29 < 0.3\)"),
        ({"m": 0.9, "n": -2.0}, FilterSpec(0.3), "n hardly needs"),
        ({"m": 0.0, "n": 0.0}, FilterSpec(0.0), None),
        ({"m": 0.9, "n": 0.9}, FilterSpec(0.3, normalised=True), "m hardly needs"),
    ],
)
def test_the_filter_keeps_what_all_models_need_the_picture_for(
    drops: dict[str, float], rule: FilterSpec, expected: str | None
) -> None:
    records = {name: {"status": "done", "drop": drop, "drop_normalised": drop / 10} for name, drop in drops.items()}
    found = verdict(study(filter=rule), records)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert pytest.importorskip("re").search(expected, found)


@pytest.mark.quick
def test_a_probability_that_is_no_number_drops_its_sample() -> None:
    done = {"status": "done", "drop": 0.9, "drop_normalised": 0.9}
    assert verdict(study(), {"m": done, "n": {**done, "drop": None}}) == (
        "n gives the answer a probability that is no number"
    )


def test_the_filter_needs_every_models_answer() -> None:
    done = {"status": "done", "drop": 1.0, "drop_normalised": 1.0}
    assert verdict(study(), {"m": done, "n": None}) == "n has not answered yet"
    failed = {"status": "failed", "reason": "no picture"}
    assert verdict(study(), {"m": failed, "n": done}) == "m failed: no picture"


@pytest.mark.parametrize(
    ("answer", "truth", "choices", "expected"),
    [
        ("The circle is red.", "red", (), True),
        ("The circle is reddish.", "red", (), False),
        ("Yes", "yes", ("Yes", "No"), True),
        ("No, there are none", "Yes", ("Yes", "No"), False),
        ("It is open or closed", "Open", ("Open", "Closed"), False),
        ("two red apples", "two red apples", ("apples", "two red apples"), True),
        ("about 3.5 metres", "3.5", (), True),
        ("about 3.55 metres", "3.5", (), False),
        ("about 3.5 metres", "3", (), False),
        ("at 12:30", "12", (), False),
        ("about 1,000 metres", "1", (), False),
        ("about 1,000 metres", "1000", (), True),
        ("1,2,3", "2", (), True),
        ("un caf\u00e9.", "cafe\u0301", (), True),  # one text, written in two ways
        ("की", "कि", (), False),  # another vowel, which is a mark
        ("a cat", "the cat", (), True),
        ("It is 5 degrees", "-5", (), False),  # signs that make another number, name or grade
        ("It is −5 degrees", "5", (), False),
        ("minus 5", "-5", (), True),
        ("3-5 cats", "5", (), True),
        ("- 5 cats", "5", (), True),
        ("C", "C++", (), False),
        ("Grade: A-.", "A", (), False),
        ("Grade: A-.", "A-", (), True),
        ("A.", "A", (), True),  # an article that is the answer
        ("It is \U0001f44d!", "\U0001f44d", (), True),
        ("\U0001f44e", "\U0001f44d", (), False),
        ("anything", None, (), None),
        ("anything", "  ", (), None),
        ("a brown dog", ["puppy", "dog"], (), True),
    ],
)
def test_correctness(answer: str, truth: Any, choices: tuple[str, ...], expected: bool | None) -> None:
    assert is_correct(answer, truth, choices) is expected


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none(), max_size=4))
def test_a_digest_does_not_depend_on_the_order_of_names(content: dict[str, Any]) -> None:
    assert digest(content) == digest(dict(reversed(content.items())))
