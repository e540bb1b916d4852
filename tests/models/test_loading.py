"""Models a user has on disk, with and without torchvision."""

from __future__ import annotations

import threading

import pytest
import tiny_models
import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

import lvlm_probe as probe
from lvlm_probe.errors import LoadError
from lvlm_probe.models import loading


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_5_vl", "internvl"])
def test_load_gives_the_model_and_a_processor_that_serves_it(name, tmp_path):
    directory = tiny_models.save(name, tmp_path)
    model, processor = probe.load(directory)
    original, own = tiny_models.build(name)
    assert not model.training
    picture = tiny_models.picture()
    inputs = tiny_models.inputs(name, model, processor, [picture], "What?")
    expected = tiny_models.inputs(name, original, own, [picture], "What?")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, original(**expected).logits)


@pytest.mark.quick
def test_what_is_no_model_stays_an_error(tmp_path):
    with pytest.raises((OSError, ValueError)):
        probe.load(tmp_path)


@pytest.mark.parametrize("source", ["demo", "directory"])
def test_transformers_makes_one_model_at_a_time(source, monkeypatch):
    """Two at once leave the process without tied weights: each puts back the method that it found."""
    make = AutoModelForImageTextToText.from_pretrained
    inside, others, seen = threading.Event(), [], []

    def watched(*args, **kwargs):
        if not others:  # the first one: the second may now begin
            others.append(threading.Thread(target=load))
            others[0].start()
            inside.wait()
        seen.append(PreTrainedModel.tie_weights)
        model = make(*args, **kwargs)
        seen.append(PreTrainedModel.tie_weights)
        return model

    def load():
        inside.set()
        if source == "demo":
            probe.demo.load()
        else:
            probe.load(probe.demo.path())

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", watched)
    whole = PreTrainedModel.tie_weights
    load()
    others[0].join()
    assert seen == [whole] * 4


def test_a_load_holds_the_lock_while_transformers_works(monkeypatch):
    held = []

    def told(*_args, **_kwargs):
        asker = threading.Thread(target=lambda: held.append(not loading.ONE_LOAD.acquire(blocking=False)))
        asker.start()
        asker.join()
        raise OSError("no model today")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", told)
    for load in (probe.demo.load, lambda: probe.load(probe.demo.path())):
        with pytest.raises(OSError, match="no model today"):
            load()
    assert held == [True, True]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"device": "gpu"}, "no device 'gpu' is here"),
        ({"device": -1}, "no device -1 is here"),
        ({"device": "xpu:7"}, "no device 'xpu:7' is here"),
        ({"dtype": "fp16"}, "dtype is 'auto', float32, bfloat16, float16 .*; got 'fp16'"),
        ({"dtype": torch.int8}, "got torch.int8"),
    ],
)
def test_what_is_not_here_is_told_before_anything_is_loaded(given, said, monkeypatch):
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(LoadError, match=said):
        probe.load(probe.demo.path(), **given)


def test_a_number_format_may_be_named():
    for named in ("bfloat16", "torch.bfloat16"):
        assert probe.load(probe.demo.path(), device="cpu", dtype=named)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("cuda", "given", "wanted"),
    [
        (False, {}, ("cpu", torch.float32)),
        (True, {}, ("cuda", "auto")),
        (True, {"device": "cpu"}, ("cpu", torch.float32)),
        (True, {"dtype": torch.float16}, ("cuda", torch.float16)),
        (False, {"dtype": "auto"}, ("cpu", "auto")),
        (False, {"device_map": "auto"}, (None, "auto")),
    ],
)
def test_the_defaults_are_those_of_the_command_line(cuda, given, wanted, monkeypatch):
    asked, moved = [], []

    class Model:
        def eval(self):
            return self

        def to(self, place):
            moved.append(place.type)
            return self

    def made(_source, **options):
        asked.append(options["dtype"])
        return Model()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", made)
    probe.load(probe.demo.path(), **given)
    assert (moved[0] if moved else None, asked[0]) == wanted
