"""What the main road of ``test_device`` leaves aside, on the same devices: verbs that look at parts of the prompt, at
frames or at the states of image tokens, processors with statistics of their own, and masks of other types."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from pretend import Card
from test_device import ask, llava, on_card, record, spread  # noqa: F401  (a fixture)
from toy_clip import ToyClip, tube_weights

import lvlm_probe as probe
from lvlm_probe import causal
from lvlm_probe.errors import OutOfMemory
from lvlm_probe.images.whitening import Whitening
from lvlm_probe.recording.answering import record_answer


def verbs(model: Any, processor: Any, folder: Path) -> dict[str, Any]:
    """What they give, as numbers."""
    replay = probe.replay(record("llava", model, processor, folder, tokens=4), model, processor)
    selection = probe.select_tokens(replay, span=(0, 3))
    shares = causal.which_parts(replay, tokens=selection, progress=False)
    ends = causal.modalities(replay, tokens=selection)
    scores, _ = replay.score_and_grad(torch.eye(3, dtype=torch.float64)[None], lambda log_probs: log_probs.sum(dim=1))
    assert scores.dtype == torch.float32
    return {
        "parts": shares.shares, "modalities": [ends.both, ends.image_only, ends.question_only, ends.neither],
        "lens": causal.logit_lens(replay).probabilities, "a mask in float64": scores.cpu().numpy(),
    }  # fmt: skip


def test_verbs_without_double_precision(llava: Any, tmp_path: Path) -> None:  # noqa: F811
    there = verbs(*llava, tmp_path / "cpu")
    with on_card(llava[0], float64=False) as card:
        here = verbs(*llava, tmp_path / "device")
    assert not card.mixed and not card.doubles
    for name, value in there.items():
        np.testing.assert_allclose(np.asarray(here[name]), np.asarray(value), atol=1e-4, err_msg=name)


def test_answers_are_imported_where_tensors_are_made_on_the_device(llava: Any, tmp_path: Path) -> None:  # noqa: F811
    tiny_models.picture().save(tmp_path / "image.png")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"image": "image.png", "question": "What is on the left?", "answer": "a red circle"}\n')
    with on_card(llava[0]), torch.device("cuda"):
        found = probe.import_answers(rows, *llava, out=tmp_path / "imported")
    assert not found.rejected and len(found.imported) == 1


class ClipOnACard(ToyClip):
    """Its log-probabilities are where a model's would be."""

    device = torch.device("cuda", 0)

    def log_probs(self, mask: torch.Tensor | None = None, **settings: Any) -> torch.Tensor:
        return super().log_probs(None if mask is None else mask.cpu(), **settings).to("cuda")


def test_frames_without_double_precision() -> None:
    weights = tube_weights(4, 2, slice(1, 3), slice(0, 1), slice(0, 2))
    there = probe.video.which_frames(ToyClip(weights), progress=False)
    with Card(float64=False) as card:
        here = probe.video.which_frames(ClipOnACard(weights), progress=False)
    assert not card.doubles
    np.testing.assert_allclose(here.shares, there.shares, atol=1e-6)


@pytest.mark.parametrize("low", [(90, 10, 200), (121, 121, 121)])
def test_statistics_of_an_image_without_double_precision(low: tuple[int, int, int]) -> None:
    """Of an even image too, whose deviation is the small difference of two large numbers."""
    from PIL import Image

    image, baseline = Image.new("RGB", (40, 30), (120, 121, 121)), Image.new("RGB", (40, 30), low)
    plain = SimpleNamespace(name="a processor", settings={}, call=None)
    mask = torch.rand(1, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    statistics = Whitening(plain, [image], [baseline]).statistics
    with Card(float64=False) as card:
        found = [value.cpu().double() for value in statistics(mask.to("cuda"))]
    assert not card.doubles
    for here, there in zip(found, statistics(mask), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


def test_a_logit_lens_through_layers_on_two_devices(llava: Any, tmp_path: Path) -> None:  # noqa: F811
    trace = record("llava", *llava, tmp_path, llr=False)
    there = causal.logit_lens(probe.replay(trace, *llava))
    model, processor = tiny_models.build("llava")
    with Card(count=2) as card:
        spread(model)
        here = causal.logit_lens(probe.replay(trace, model, processor))
    assert not card.mixed
    np.testing.assert_allclose(here.probabilities, there.probabilities, atol=1e-5)


def test_an_answer_that_does_not_fit_is_told(llava: Any, tmp_path: Path) -> None:  # noqa: F811
    """To a visitor of the app, at the command line and in the row of a study: each records an answer in this way."""
    model, processor = llava
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    answer = model, processor, [tiny_models.picture()], "What is on the left?", tmp_path
    with on_card(model, memory=weights + 20_000) as card:
        with pytest.raises(OutOfMemory, match="smaller image"):
            record_answer(*answer, generate={"max_new_tokens": 2})
        assert card.held() <= weights + 8192
    assert not list(tmp_path.iterdir()) and "generate" not in vars(model)


def test_an_answer_behind_which_memory_runs_out_is_kept(llava: Any, tmp_path: Path) -> None:  # noqa: F811
    """Without what the passes behind it would have given; and the next one, where there is memory, has all."""
    model, processor = llava

    def recorded(attached: probe.Probe, **settings: Any) -> probe.Trace:
        with attached.record(tmp_path, **settings) as recording:
            model.generate(**ask("llava", model, processor), min_new_tokens=3, max_new_tokens=3, do_sample=False)
        return recording.traces[-1]

    with on_card(model, own_thread=False) as card, probe.attach(model, processor) as attached:
        card.peak[0] = card.held()
        plain = recorded(attached, llr=False, boxes=False)
        card.memory = card.peak[0]
        with pytest.warns(probe.ProbeWarning, match=r"without log-likelihood ratios: .*load the model in bfloat16"):
            short = recorded(attached)
        card.memory = None
        whole = recorded(attached)
    assert short.status == "complete" and short.llr is None and short.layout.patch_box is None
    for missing in ("no boxes for the image tokens: memory ran out", "without log-likelihood ratios: "):
        assert any(missing in note for note in short.notes), short.notes
    assert np.array_equal(short.log_probs, plain.log_probs)
    np.testing.assert_allclose(short.attention.values, plain.attention.values)
    assert whole.llr is not None and whole.layout.patch_box is not None


def test_a_recording_holds_nothing_of_the_device_until_the_collector_comes(
    llava: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Nor does one that failed: pixels are large, and the collector counts objects."""
    model, processor = llava
    with on_card(model) as card, probe.attach(model, processor) as attached:
        inputs = ask("llava", model, processor)
        for tokens in (2, -1):
            before = card.held()
            gc.disable()
            try:
                with contextlib.suppress(ValueError), attached.record(tmp_path):
                    model.generate(**inputs, min_new_tokens=0, max_new_tokens=tokens, do_sample=False)
            finally:
                gc.enable()
            card.let_go()
            assert card.used[0] <= before + 4096, tokens
