"""``lvlm-probe edit`` on the embedded model: a map's region, a box, and what a user gets wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import run, succeed

import lvlm_probe as probe
from lvlm_probe.heatmap_store import MapFile


@pytest.fixture(scope="module")
def stored(demo: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map of "green" in "The cross is green and the star is yellow.", beside its trace."""
    folder = tmp_path_factory.mktemp("edit")
    scene = probe.demo.scenes(1, kinds=["pair"])[0]
    answer = probe.ask(*demo, scene.image, scene.question, out=folder)
    path: Path = folder / "explanations" / "green.h5"
    path.parent.mkdir()
    return probe.explain(answer.replay, tokens="green", method="occlusion", progress=False).write(path)


def test_what_is_said_is_told_and_kept_with_the_map(stored: Path) -> None:
    told = succeed("edit", stored, "--model", "demo")
    assert "Without this" in told.out and "green → hidden" in told.out
    (record,) = succeed("edit", stored, "--model", "demo", "--box", "0,0,40,40", "--json").json
    assert record["flipped"] is False and record["boxes"] == [[0.0, 0.0, 40.0, 40.0]]
    kept = MapFile(stored).read().provenance["edits"]
    assert [one["smallest"] for one in kept] == [True, False]


def test_it_refuses_in_a_sentence(stored: Path, tmp_path: Path) -> None:
    for wrong, said in (
        (["--box", "1,2,3"], "four numbers"),
        (["--box", "a,2,3,4"], "four numbers"),
        (["--remove", "0.1", "--keep", "0.1"], "give one of them"),
        (["--remove", "7"], "share of the image"),
    ):
        refused = run("edit", stored, "--model", "demo", *wrong)
        assert refused.code == 2 and said in refused.err and "Traceback" not in refused.err
    missing = run("edit", tmp_path / "none.h5")
    assert missing.code == 2 and "none.h5" in missing.err
