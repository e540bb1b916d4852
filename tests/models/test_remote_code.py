"""Models and processors that this package has never heard of: they work, or are refused by name."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from remote_code.configuration_peeper import PeeperConfig
from remote_code.modeling_peeper import PeeperForConversation, PeeperWithChat
from remote_code.processing_peeper import PeeperPictures, PeeperProcessor
from tiny_models import picture
from transformers import AutoModel, AutoModelForCausalLM

import lvlm_probe as probe
from lvlm_probe.models.anatomy import examine

SOURCE = Path(__file__).parents[1] / "remote_code"
TEXT = "<bos>USER: <image>\nWhat colour is the circle? ASSISTANT:"


def tokenizer() -> Any:
    return tiny_models.make_tokenizer(tiny_models.FAMILIES["llava"])


def peeper(kind: Any = PeeperForConversation) -> tuple[Any, Any]:
    """The made-up model with weights that let everything through, and its processor."""
    words = tokenizer()
    torch.manual_seed(0)
    model = kind(PeeperConfig(vocab_size=len(words), image_token_index=words.convert_tokens_to_ids("<image>")))
    tiny_models.redraw(model, 0)
    model.generation_config.pad_token_id = words.pad_token_id
    model.generation_config.eos_token_id = words.eos_token_id
    return model.eval(), PeeperProcessor(PeeperPictures(), words)


def generate(model: Any, inputs: dict[str, Any]) -> Any:
    return model.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
    )


def check(model: Any, processor: Any, directory: Path) -> Any:
    """Bit-equal generation, replay, gradient, detach; gives the trace."""
    plain = generate(model, processor([picture()], TEXT))
    before = {path: sorted(vars(module)) for path, module in model.named_modules()}
    with probe.attach(model, processor) as p, p.record(directory) as recording:
        seen = generate(model, processor([picture()], TEXT))
    assert not recording.faults
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, seen.logits, strict=True))
    assert before == {path: sorted(vars(module)) for path, module in model.named_modules()}
    (trace,) = recording.traces
    assert trace.log_probs_source == "generation"
    assert probe.verify(trace, model, processor).within(1e-4)
    replay = probe.replay(trace, model, processor)
    mask = 0.3 + 0.5 * torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(1))
    way = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(2))
    leaf = mask.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(replay.log_probs(leaf).sum(), leaf)
    high, low = replay.log_probs(torch.cat([mask + 1e-2 * way, mask - 1e-2 * way])).double().sum(1).tolist()
    measured = (high - low) / 2e-2
    assert measured != 0 and abs(float((gradient * way).sum()) - measured) <= 1e-2 * abs(measured)
    return trace


@pytest.mark.quick
def test_an_unusual_layout_works(tmp_path):
    model, processor = peeper()
    trace = check(model, processor, tmp_path)
    anatomy = examine(model, processor)
    assert (anatomy.encoders, anatomy.mergers, anatomy.decoder) == (("eyes",), ("bridge",), "mind.model")
    assert trace.image.size == (90, 60) and "".join(trace.tokens) == processor.tokenizer.decode(trace.token_ids)
    replay = probe.replay(trace, model, processor)
    # The traced geometry is what the processor makes of the composite.
    mask = torch.rand(1, 5, 7, generator=torch.Generator().manual_seed(3))
    replay.log_probs(mask)
    assert replay.path.report.mean_error <= 2
    # The decoder is found, and what it attends to; each image token has its patch of the picture.
    assert trace.attention is not None and len(trace.attention.layers) == 2
    assert np.asarray(trace.layout.patch_box).shape == (16, 4)
    assert probe.explain(replay, method="gradcam", tokens=(0, 2)).values.max() > 0
    with probe.attach(model, processor) as p, torch.no_grad():
        inputs = processor([picture()], TEXT)
        with p.masked(torch.zeros(4, 4)):
            masked = model(**inputs).logits
        assert not torch.equal(masked, model(**inputs).logits)


def test_remote_code_from_a_directory(tmp_path, monkeypatch):
    """config.json with auto_map, loaded with trust_remote_code=True."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    model, processor = peeper()
    home = tmp_path / "peeper"
    model.save_pretrained(home)
    for name in ("configuration_peeper.py", "modeling_peeper.py"):
        shutil.copy(SOURCE / name, home / name)
    settings = json.loads((home / "config.json").read_text())
    settings["auto_map"] = {
        "AutoConfig": "configuration_peeper.PeeperConfig",
        "AutoModel": "modeling_peeper.PeeperForConversation",
        "AutoModelForCausalLM": "modeling_peeper.PeeperForConversation",
    }
    (home / "config.json").write_text(json.dumps(settings))
    for auto in (AutoModel, AutoModelForCausalLM):
        loaded = auto.from_pretrained(home, trust_remote_code=True, dtype=torch.float32).eval()
        assert type(loaded).__module__.startswith("transformers_modules") and type(loaded) is not type(model)
        trace = check(loaded, processor, tmp_path / auto.__name__)
        assert probe.verify(trace, model, processor).within(1e-4)  # the same weights under another class object


def test_no_processor_and_a_tokenizer_alone(tmp_path):
    model, processor = peeper()
    for number, held in enumerate((None, processor.tokenizer)):
        with probe.attach(model, held) as p, p.record(tmp_path / str(number)) as recording:
            generate(model, processor([picture()], TEXT))
        assert not recording.faults
        (trace,) = recording.traces
        assert any("pixel-input space" in note for note in trace.notes)
        assert probe.verify(trace, model, held).within(1e-4)
        leaf = torch.full((1, 4, 4), 0.5, requires_grad=True)
        (gradient,) = torch.autograd.grad(probe.replay(trace, model, held).log_probs(leaf).sum(), leaf)
        assert gradient.abs().max() > 0


class OneCall:
    """A processor that does it all in ``__call__``: there is no method on it that could be watched."""

    def __init__(self, words: Any) -> None:
        self.tokenizer = words
        self._whole = PeeperProcessor(PeeperPictures(), words)

    def __call__(self, images: Any, text: str) -> Any:
        return self._whole(images, text)


def test_a_processor_that_cannot_be_watched(tmp_path):
    model, processor = peeper()
    held = OneCall(processor.tokenizer)
    for number, given in enumerate((None, [picture()])):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with probe.attach(model, held) as p, p.record(tmp_path / str(number), images=given) as recording:
                generate(model, held([picture()], TEXT))
        (trace,) = recording.traces
        assert not recording.faults, recording.faults
        assert any("pixel-input space" in note for note in trace.notes)
        assert bool(given) == any(issubclass(warning.category, probe.ProbeWarning) for warning in caught)
        assert probe.verify(trace, model, held).within(1e-4)


def test_a_generate_of_its_own_is_recorded_right_or_refused_by_name(tmp_path):
    model, processor = peeper(PeeperWithChat)
    plain = generate(model, processor([picture()], TEXT))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
            seen = generate(model, processor([picture()], TEXT))
    assert torch.equal(plain.sequences, seen.sequences)
    said = [str(warning.message) for warning in caught if issubclass(warning.category, probe.ProbeWarning)]
    if recording.paths:
        (trace,) = recording.traces
        assert np.array_equal(trace.token_ids, plain.sequences[0])
        assert probe.verify(trace, model, processor).within(1e-4)
    else:
        assert len(said) == 1 and "PeeperWithChat" in said[0]


class Blind(torch.nn.Module):
    """Has a config and can generate, but nothing in it looks at pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PeeperConfig()
        self.mind = torch.nn.Linear(2, 2)

    def generate(self, input_ids: Any) -> Any:
        return input_ids

    def forward(self, input_ids: Any) -> Any:
        return input_ids


def test_what_sees_nothing_is_refused_by_name():
    with pytest.raises(probe.errors.AttachError, match="Blind"):
        probe.attach(Blind())
