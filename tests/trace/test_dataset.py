"""Traces as a Hugging Face dataset: every row read back, and what is sent to the hub."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from trace_samples import sample_capture

import lvlm_probe as probe
from lvlm_probe.trace import write


@pytest.fixture(scope="module")
def store(demo, tmp_path_factory):
    """Two traces, the second without log-likelihood ratios."""
    model, processor = demo
    folder = tmp_path_factory.mktemp("traces")
    with probe.attach(model, processor) as p:
        for number, scene in enumerate(probe.demo.scenes(2)):
            inputs = processor.apply_chat_template(
                scene.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            with p.record(folder, llr=number == 0, attention=False):
                model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return probe.open_store(folder)


@pytest.mark.quick
def test_every_trace_is_a_row(store, tmp_path):
    found = store.to_dataset(cache_dir=str(tmp_path))
    assert isinstance(found, datasets.Dataset) and len(found) == 2
    for row, trace in zip(found, store, strict=True):
        for name in ("trace_id", "created", "status", "question", "answer"):
            assert row[name] == getattr(trace, name)
        assert (row["file"], row["row"]) == (trace.path.name, 0)
        (image,) = row["images"]
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(trace.image))
        assert [word["text"] for word in row["words"]] == [word.text for word in trace.words]
        for word, own in zip(row["words"], trace.words, strict=True):
            assert word["log_prob"] == pytest.approx(float(trace.log_probs[own.start : own.stop].sum()), abs=1e-6)
            if trace.llr is None:
                assert word["llr"] is None
            else:
                assert word["llr"] == pytest.approx(float(trace.llr[own.start : own.stop].sum()), abs=1e-5)
    assert [store[0].llr is None, store[1].llr is None] == [False, True]


def test_halves_of_characters_are_shown_as_escapes(tmp_path):
    capture = sample_capture()
    capture.rows[0].question, capture.rows[0].tokens[1] = "half \ud83d", " \udc80"
    write(capture, tmp_path / "runs")
    (row,) = probe.open_store(tmp_path / "runs").to_dataset(cache_dir=str(tmp_path / "cache"))
    assert row["question"] == "half \\ud83d" and "\\udc80" in row["answer"]
    assert "\\udc80" in [word["text"] for word in row["words"]]


def test_a_file_that_cannot_be_read_is_said_or_left_out(store, tmp_path):
    for trace in store:
        (tmp_path / trace.path.name).write_bytes(trace.path.read_bytes())
    (tmp_path / "0.h5").write_bytes(b"no trace")
    damaged = probe.open_store(tmp_path)
    with pytest.raises(probe.ProbeError, match=r"0\.h5"):
        damaged.to_dataset(cache_dir=str(tmp_path / "cache"))
    heard = []
    assert len(damaged.to_dataset(on_error=heard.append, cache_dir=str(tmp_path / "cache"))) == 2
    assert len(heard) == 1


def test_what_goes_to_the_hub_is_private_unless_said_otherwise(store, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    sent = []

    def push(self, repo_id, **options):
        sent.append((len(self), repo_id, options))
        return "commit"

    monkeypatch.setattr(datasets.Dataset, "push_to_hub", push)
    assert store.push_to_hub("me/traces", token="x") == "commit"
    store.push_to_hub("me/traces", private=False)
    assert sent == [
        (2, "me/traces", {"private": True, "token": "x"}),
        (2, "me/traces", {"private": False}),
    ]
