"""``lvlm-probe boxes`` on an answer of the embedded model that is made to hold a box."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import run, succeed
from PIL import Image

import lvlm_probe as probe
from lvlm_probe.heatmap_store import MapFile
from lvlm_probe.recording import recorder


@pytest.fixture(scope="module")
def trace(demo: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace whose pieces read as a box of the whole image: the ids stay the model's, so it can be replayed."""
    scene = probe.demo.scenes(1, kinds=["colour"])[0]
    patch = pytest.MonkeyPatch()
    patch.setattr(
        recorder, "display_pieces", lambda _t, ids: ["at", " [10,", " 20,", " 330,", " 320]", *[""] * 99][: len(ids)]
    )
    try:
        answer = probe.ask(*demo, scene.image, scene.question, out=tmp_path_factory.mktemp("boxes"))
    finally:
        patch.undo()
    return Path(answer.trace.path)


def test_boxes_are_listed_drawn_and_mapped(trace: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "boxes.png"
    told = succeed("boxes", trace, "--boxes", "pixels", "--draw", drawn)
    assert "box: (10, 20, 330, 320), P " in told.out and Image.open(drawn).size == (336, 336)
    options = ("--maps", "--model", "demo", "--method", "occlusion")
    (record,) = succeed("boxes", trace, "--boxes", "pixels", *options, "--json").json
    assert record["pixels"] == [10, 20, 330, 320] and record["verdict"] in ("agrees", "partly", "elsewhere")
    assert MapFile(Path(record["map"])).read().provenance["box"]["verdict"] == record["verdict"]
    made = ("--search-dtype", "bfloat16", "--seed", "3")
    (low,) = succeed("boxes", trace, "--boxes", "pixels", *options, *made, "--json").json
    heat = MapFile(Path(low["map"])).read()
    assert (heat.search_dtype, heat.provenance["seed"]) == ("bfloat16", 3) and low["map"] != record["map"]
    refused = run("boxes", trace, "--boxes", "pixels", *options, "--budget", "9")
    assert refused.code == 2 and "occlusion takes no parameter 'budget'" in refused.err


def test_it_refuses_in_a_sentence(trace: Path, tmp_path: Path) -> None:
    for wrong, said in (
        ([trace], "--boxes"),
        ([trace, "--boxes", "inches"], "boxes is one of"),
        ([trace, "--boxes", "pixels", "--draw", tmp_path / "a.gif"], "FILE.png"),
        ([tmp_path / "none.h5"], "none.h5"),
    ):
        refused = run("boxes", *wrong)
        assert refused.code == 2 and said in refused.err and "Traceback" not in refused.err
