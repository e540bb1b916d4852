"""``lvlm_probe`` on the native model, from attaching to the heatmap. Tiny, random weights."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from lvlm_probe_mini_gemini.places import square_boxes, token_boxes
from mini_gemini_tiny import KINDS, build, chat, picture
from torch import nn

import lvlm_probe as probe
from lvlm_probe.boxes.encoder_tokens import encoder_tokens
from lvlm_probe.errors import ExplainError
from lvlm_probe.models.anatomy import examine

STEPS = 5
SPAN = (0, 3)
LOW, HIGH = "model.vision_tower", "model.vision_tower_aux"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def prompt(processor: Any, *images: Any) -> Any:
    return processor.apply_chat_template(
        chat("What is it?", *images), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def recorded(kind: str, *images: Any, attention: str = "sdpa", **more: Any) -> tuple[Any, Any, Any]:
    """Model, processor, and the trace of one answer."""
    model, processor = build(kind, attention=attention)
    if more.get("aux") == "none":
        processor.image_processor.aux = "none"
    with probe.attach(model, processor) as p, p.record(mkdtemp(prefix="mini_gemini_"), heads="all") as recording:
        inputs = prompt(processor, *images or (picture(),))
        model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, **more)
    assert not recording.faults
    (trace,) = recording.traces
    return model, processor, trace


@cache
def replayed(kind: str) -> Any:
    model, processor, trace = recorded(kind)
    return probe.replay(trace, model, processor)


def test_parts_are_found(kind: str) -> None:
    model, processor = build(kind)
    found = examine(model, processor)
    assert found.encoders == (LOW, HIGH)
    assert found.mergers == ("model.patch_mining", "model.multi_modal_projector")
    assert (found.decoder, found.image_token_id) == ("model.language_model", processor.image_token_id)
    assert "pixel_values" in found.pixel_names


def test_generation_is_the_same_with_and_without(kind: str) -> None:
    model, processor = build(kind)
    inputs = prompt(processor, picture())
    options = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(**inputs, **options)
    with probe.attach(model, processor) as p, p.record(mkdtemp()) as recording:
        seen = model.generate(**prompt(processor, picture()), **options)
    assert torch.equal(plain.sequences, seen.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, seen.logits, strict=True))
    scores = torch.cat(list(plain.logits)).log_softmax(-1)
    truth = scores.gather(1, plain.sequences[0, -STEPS:, None])[:, 0]
    (trace,) = recording.traces
    assert np.abs(np.asarray(trace.log_probs) - truth.numpy()).max() <= 1e-5
    assert trace.notes == [f"the answer was cut after {STEPS} tokens (max_new_tokens)"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_replay_is_what_was_generated(kind: str, attention: str) -> None:
    model, processor, trace = recorded(kind, attention=attention)
    replay = probe.replay(trace, model, processor)
    wanted = torch.tensor(np.array(trace.log_probs))
    assert float((replay.original_log_probs - wanted).abs().max()) <= 1e-5
    assert float((replay.log_probs(torch.ones(1, 6, 6), mode="exact")[0] - wanted).abs().max()) <= 1e-5
    # The ratio against the model's own answer to the baseline picture, prepared by the processor as the picture was.
    (blurred,) = replay.path.baseline_images
    given = prompt(processor, blurred)
    ids = torch.cat([given["input_ids"], replay.token_ids[None]], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=given["pixel_values"]).logits[0, -STEPS - 1 : -1]
    baseline = logits.log_softmax(-1).gather(1, replay.token_ids[:, None])[:, 0]
    assert float((torch.tensor(np.array(trace.llr)) - (wanted - baseline)).abs().max()) <= 1e-4


def test_mask_gradient_is_the_finite_difference(kind: str) -> None:
    model, processor, trace = recorded(kind)
    model.double()
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:  # Llama's own goes through float32
            module.forward = lambda hidden, module=module: nn.functional.rms_norm(
                hidden, hidden.shape[-1:], module.weight, module.variance_epsilon
            )
    replay = probe.replay(trace, model, processor)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(1, 6, 6, generator=generator, dtype=torch.float64) * 0.6 + 0.2
    towards = torch.randn(1, 6, 6, generator=generator, dtype=torch.float64)
    leaf = mask.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(replay.log_probs(leaf).sum(), [leaf])
    step = 1e-4
    with torch.no_grad():
        difference = replay.log_probs(mask + step * towards).sum() - replay.log_probs(mask - step * towards).sum()
    slope = float(difference) / (2 * step)
    assert abs(slope) > 1e-3
    assert float((gradient * towards).sum()) == pytest.approx(slope, rel=1e-4)


class _Constant(nn.Module):
    """An encoder that answers with what it once answered: no gradient goes through it."""

    def __init__(self, module: nn.Module, answer: Any) -> None:
        super().__init__()
        self.inner, self.answer = module, answer

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.answer


def test_both_encoders_contribute(kind: str) -> None:
    """The gradient to the mask with one encoder held constant is that of the other; both are needed for the whole."""
    model, processor, trace = recorded(kind)
    replay = probe.replay(trace, model, processor)

    def gradient() -> torch.Tensor:
        mask = torch.full((1, 6, 6), 0.7, requires_grad=True)
        return torch.autograd.grad(replay.log_probs(mask).sum(), [mask])[0]

    whole = gradient()
    parts = []
    for name in ("vision_tower", "vision_tower_aux"):
        module = getattr(model.model, name)
        answers: list[Any] = []
        handle = module.register_forward_hook(lambda _module, _args, output, answers=answers: answers.append(output))
        with torch.no_grad():
            replay.log_probs(torch.full((1, 6, 6), 0.7))
        handle.remove()
        setattr(model.model, name, _Constant(module, answers[-1]))
        parts.append(gradient())
        setattr(model.model, name, module)
    assert torch.allclose(gradient(), whole)
    for part in parts:
        assert float(part.norm()) > 0.02 * float(whole.norm())
        assert float((part - whole).norm()) > 0.02 * float(whole.norm())
    # The score is a function of both features, so the whole gradient is the sum of the two parts.
    assert torch.allclose(parts[0] + parts[1], whole, atol=1e-4 * float(whole.abs().max()))


def test_padding_takes_no_part(kind: str) -> None:
    replay = replayed(kind)
    x, y, _, alive = replay.path.coordinates("pixel_values")
    side = replay.model.config.image_size_aux
    share = alive[0, 0].float().mean()
    assert 40 / 60 - 1 / side <= float(share) <= 44 / 60 + 1 / side  # bicubic blends two pixels of either side in
    assert float(x[alive].max()) <= 60 and float(y[alive].max()) <= 40
    full, none = (replay.path.apply(torch.full((1, 1, 1), value))["pixel_values"] for value in (1.0, 0.0))
    assert torch.equal(full[~alive], none[~alive]) and not torch.equal(full[alive], none[alive])
    assert replay.path.seen().all()


# ---------------------------------------------------------------------------------------------------- places of tokens


def test_boxes_by_hand() -> None:
    """2 × 2 tokens a view, on the unit square: the whole first, then the crops, row by row."""
    half, quarter = square_boxes(2, 1, False), square_boxes(2, 2, True)
    assert half.tolist() == [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]
    assert quarter.shape == (20, 4)
    assert np.array_equal(quarter[:4], half)
    assert quarter[4:8].tolist() == [
        [0, 0, 0.25, 0.25], [0.25, 0, 0.5, 0.25], [0, 0.25, 0.25, 0.5], [0.25, 0.25, 0.5, 0.5],
    ]  # fmt: skip
    assert quarter[8].tolist() == [0.5, 0, 0.75, 0.25] and quarter[12].tolist() == [0, 0.5, 0.25, 0.75]
    assert quarter[19].tolist() == [0.75, 0.75, 1, 1]


@pytest.mark.parametrize("size", [(60, 40), (30, 50), (48, 48)])
def test_boxes_are_where_the_encoder_reads(kind: str, size: tuple[int, int]) -> None:
    """The declared places against those found by gradients, from the low-resolution encoder's patches to the pixels."""
    model, processor, trace = recorded(kind, picture(*size))
    replay = probe.replay(trace, model, processor)
    found = encoder_tokens(replay, LOW)
    views, tokens = found.shape
    patches = found.boxes.reshape(views, tokens, 4)[:, 1:]  # without the class token
    if kind == "hd":
        patches = np.concatenate([patches[-1:], patches[:-1]])
    patches = patches.reshape(-1, 4)
    declared = token_boxes(replay, np.flatnonzero(replay.input_ids == processor.image_token_id))
    assert declared is not None
    live = patches[:, 2] > patches[:, 0]
    whole, part = max(size) / 4, max(size) / (4 if kind == "plain" else 8)
    edges = declared.boxes[:, 2:] - declared.boxes[:, :2]
    # Tokens that lie in the picture and not partly in its padding, where bicubic resizing has mixed the two.
    inside = np.isclose(edges, whole).all(axis=1) | np.isclose(edges, part).all(axis=1)
    assert live[inside].all() and not live[declared.images < 0].any() and inside.sum() >= len(live) // 2
    # Within the spacing of what bilinear sampling reads, in pixels of the picture.
    assert np.abs(patches - declared.boxes)[inside].max() < max(size) / 50


def test_layout_of_the_trace(kind: str) -> None:
    replay = replayed(kind)
    layout = replay.trace.layout
    count = 16 if kind == "plain" else 80
    assert layout.patch_box.shape == (count, 4)
    side, top = 60, 10  # a picture of 60 × 40 on its square
    assert layout.patch_box[0].tolist() == [0, 0, 15, 15 - top]
    assert layout.patch_box[6].tolist() == [30, 15 - top, 45, 30 - top]
    if kind == "hd":
        assert layout.patch_box[16].tolist() == [0, 0, 0, 0]  # the first row of the first crop ends above the picture
        assert layout.patch_box[16 + 4 + 1].tolist() == [7.5, 0, 15, 15 - top]
        assert layout.patch_box[16 + 3 * 16].tolist() == [30, 30 - top, 37.5, 37.5 - top]
    assert float(layout.patch_box[:, 2].max()) == side and float(layout.patch_box[:, 3].max()) == 40


def test_two_pictures_have_their_own_boxes() -> None:
    model, processor, trace = recorded("plain", picture(60, 40), picture(30, 50, seed=1))
    assert trace.layout.image_index.tolist() == [0] * 16 + [1] * 16
    assert trace.layout.patch_box[16 + 1].tolist() == [2.5, 0, 15, 12.5]  # padded by 10 on the left
    replay = probe.replay(trace, model, processor)
    assert float((replay.original_log_probs - torch.tensor(np.array(trace.log_probs))).abs().max()) <= 1e-5


def test_attention_rows_are_eager_attention(kind: str) -> None:
    """Recorded under sdpa, against the maps that the model returns under eager."""
    model, processor, trace = recorded(kind)
    rows = trace.attention
    assert rows is not None
    count = model.config.image_tokens()
    assert rows.values.shape == (STEPS, 2, 4, count)
    eager, _ = build(kind, attention="eager")
    given = prompt(processor, picture())
    ids = torch.cat([given["input_ids"], torch.tensor(np.array(trace.token_ids))[None]], dim=1)
    with torch.no_grad():
        maps = eager(input_ids=ids, pixel_values=given["pixel_values"], output_attentions=True).attentions
    at = torch.nonzero(ids[0] == processor.image_token_id)[:, 0]
    wanted = torch.stack([layer[0, :, -STEPS - 1 : -1][:, :, at] for layer in maps]).permute(2, 0, 1, 3)
    assert np.abs(rows.values - wanted.numpy()).max() < 1e-4


# ------------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("igos++", {"preset": "fast", "size": 8}),
        ("integrated_gradients", {"steps": 6}),
        ("rise", {"masks": 40}),
        ("gradcam", {}),
        ("gradcam", {"encoder": "clip"}),
        ("gradcam", {"encoder": "convnext"}),
        ("tmm", {}),
        ("tmm", {"scope": "both"}),
        ("iia", {"points": 4}),
        ("attention", {}),
        ("rollout", {}),
    ],
)
def test_methods_give_maps(kind: str, method: str, options: dict[str, Any], tmp_path: Path) -> None:
    heat = probe.explain(replayed(kind), method=method, tokens=SPAN, **options)
    assert heat.values is not None, heat.reason
    assert 0 <= float(heat.values.min()) < float(heat.values.max()) <= 1
    overlay = heat.overlay()
    assert overlay.size == (60, 40)


def test_gradcam_is_the_mean_of_its_encoders(kind: str) -> None:
    replay = replayed(kind)
    size = (6, 6)
    low, high, both = (
        probe.explain(replay, method="gradcam", tokens=SPAN, encoder=encoder, size=size).values
        for encoder in ("clip", "convnext", None)
    )
    mean = (np.asarray(low, float) + np.asarray(high, float)) / 2
    found = np.asarray(both, float)
    assert np.allclose(found, (mean - mean.min()) / (mean.max() - mean.min()), atol=1e-3) or np.allclose(
        found, mean / mean.max(), atol=1e-3
    )


@pytest.mark.parametrize("method", ["tmm", "iia"])
def test_attention_methods_say_that_convnext_has_none(kind: str, method: str) -> None:
    with pytest.raises(ExplainError, match=r"not applicable: model\.vision_tower_aux is a convolutional encoder"):
        probe.explain(replayed(kind), method=method, tokens=SPAN, scope="encoder", encoder=1)


def test_evaluate_and_save(kind: str, tmp_path: Path) -> None:
    replay = replayed(kind)
    step = int(replay.llr.abs().argmax())  # of weights drawn at random the picture decides little else
    heat = probe.explain(replay, method="attention", tokens=(step, step + 1))
    score = probe.evaluate(heat, replay)
    assert np.isfinite([score.deletion, score.insertion]).all()
    probe.report([heat], scores=[score], out=tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_aux_none_is_recorded_and_replayed(kind: str) -> None:
    """One encoder on one view, as the paper's release runs the model: 16 tokens here, 576 at real size."""
    model, processor, trace = recorded(kind, aux="none")
    assert trace.layout.patch_box.shape == (16, 4)
    assert trace.layout.patch_box[0].tolist() == [0, 0, 15, 5]
    calls: list[int] = []
    handle = model.model.vision_tower_aux.register_forward_hook(lambda *_: calls.append(1))
    replay = probe.replay(trace, model, processor)
    wanted = torch.tensor(np.array(trace.log_probs))
    assert float((replay.original_log_probs - wanted).abs().max()) <= 1e-5
    handle.remove()
    assert not calls


def test_opens_by_the_library_after_saving(tmp_path: Path) -> None:
    model, processor = build("hd")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, its_processor = probe.load(tmp_path)
    with probe.attach(again, its_processor) as p, p.record(tmp_path / "runs") as recording:
        again.generate(**prompt(its_processor, picture()), max_new_tokens=3, do_sample=False)
    assert not recording.faults and len(recording.traces) == 1
