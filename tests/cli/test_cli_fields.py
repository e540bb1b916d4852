"""``lvlm-probe fields`` on an answer of the embedded model, which is no JSON and has words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import run, succeed

import lvlm_probe as probe


@pytest.fixture(scope="module")
def trace(demo: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    scene = probe.demo.scenes(1, kinds=["colour"])[0]
    answer = probe.ask(*demo, scene.image, scene.question, out=tmp_path_factory.mktemp("fields"))
    assert answer.text == "The cross is yellow."
    return Path(answer.trace.path)


def test_values_are_listed_without_a_model_and_located_with_one(trace: Path, tmp_path: Path) -> None:
    listed = succeed("fields", trace, "--json").json
    assert [one["value"] for one in listed][:2] == ["The", "cross"] and all(one["p"] <= 1 for one in listed)
    assert "nats by the image" in succeed("fields", trace).out
    out = tmp_path / "places.json"
    options = ("--model", "demo", "--method", "occlusion", "--param", "size=8")
    told = succeed("fields", trace, "--out", out, *options)
    places = json.loads(out.read_text("utf-8"))
    colour = next(one for one in places if one["value"] == "yellow")
    assert colour["region"]["area"] < 0.3 and colour["trusted"] and "page 1, " in told.out
    assert next(one for one in places if one["value"] == "The")["trusted"] is False


def test_it_refuses_in_a_sentence(trace: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.json"
    there.write_text("{}")
    for wrong, said in (
        ([trace, "--out", there], "--overwrite"),
        ([trace, "--format", "coco"], "--out FILE"),
        ([trace, "--out", tmp_path / "x.json", "--model", "demo", "--search-dtype", "int8"], "got 'int8'"),
        ([trace, "--out", tmp_path / "x.json", "--name", "tip", "--model", "demo"], "no field 'tip'"),
        ([tmp_path / "none.h5"], "none.h5"),
    ):
        refused = run("fields", *wrong)
        assert refused.code == 2 and said in refused.err and "Traceback" not in refused.err
