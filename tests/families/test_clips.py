"""Videos: frames recorded as they were sampled, masks over time and space through the real video processors."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import clips
import inside
import numpy as np
import pytest
import torch
import transformers
from float64 import in_float64
from PIL import Image
from tiny_models import picture
from zoo import Built, build, load_members

import lvlm_probe as probe
from lvlm_probe.boxes.encoder_tokens import tokens_that_read
from lvlm_probe.boxes.image_tokens import image_tokens
from lvlm_probe.boxes.painting import paint
from lvlm_probe.errors import ExplainError, ImageError, MaskError, ProbeWarning, ProcessorRefused
from lvlm_probe.explainers.attention_flow import flows
from lvlm_probe.explainers.attention_maps import GENERAL_PROMPT
from lvlm_probe.explainers.registry import Problem, resolve
from lvlm_probe.models.families import _of_transformers
from lvlm_probe.planning import Meter, cost_for
from lvlm_probe.planning.rehearsal import cost_model

_STEP = 3e-6
_LIKE = {"gradient_attention": "tmm", "weighted_tmm": "tmm", "attention_flow": "rollout", "refined": "attention"}
"""Methods over tokens that a model refuses where it refuses another."""
_LEVELS = 1.0  # of 255, in the mean: two roundings to 8 bits


class Case(NamedTuple):
    built: Built
    frames: np.ndarray
    inputs: dict[str, Any]
    output: Any
    trace: Any
    replay: Any


def record(built: Built, directory: Path, given: list[np.ndarray], images: Any = (), **call: Any) -> Case:
    """One answer about clips, recorded, and its replay."""
    with probe.attach(built.model, built.processor) as p, p.record(directory) as recording:
        inputs = clips.clip_inputs(built, given, images, **call)
        output = built.generate(inputs)
    assert not recording.faults
    trace = recording.traces[0]
    return Case(built, given[0], inputs, output, trace, probe.replay(trace, built.model, built.processor))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.campaign] if takes.long else []) for name, takes in clips.CLIPS.items()
    ],
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return record(clips.built(request.param), tmp_path_factory.mktemp("clips"), [clips.frames()])


def composite(mask: torch.Tensor, frames: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Frames masked by hand: each mask enlarged between the middles of its cells, 8 bit."""
    masks = torch.nn.functional.interpolate(mask[:, None], frames.shape[1:3], mode="bilinear", align_corners=False)
    weight = masks[:, 0, :, :, None].double().numpy()
    return np.rint(baseline + weight * (frames.astype(float) - baseline)).astype(np.uint8)


def test_every_family_that_records_clips_is_checked_here() -> None:
    assert {name for name, family in _of_transformers().items() if family.clips} == set(clips.CLIPS)


def test_the_trace_holds_the_frames_that_the_processor_sampled_and_when(case: Case) -> None:
    trace = case.trace
    trace.verify()
    (clip,) = trace.clips
    assert (clip.first, clip.frames, clip.indices, clip.times) == (0, 4, (0, 1, 2, 3), (0.0, 0.5, 1.0, 1.5))
    assert np.array_equal(np.stack([np.asarray(frame) for frame in trace.images]), case.frames)
    assert np.array_equal(case.built.generate(case.inputs).sequences, case.output.sequences)


def test_a_replay_has_the_log_probabilities_of_generate(case: Case) -> None:
    model = case.built.model
    wide = {k: v.double() if v.is_floating_point() else v for k, v in case.inputs.items()}
    model.double()
    try:
        player = probe.replay(case.trace, model, case.built.processor)
        _ = player.path.report  # the processor runs as it does for everybody
        with in_float64(model):
            output = case.built.generate(wide)
            scores = torch.cat(list(output.logits)).log_softmax(-1)
            truth = scores.gather(-1, output.sequences[0, -len(scores) :, None])[:, 0]
            assert float((player.original_log_probs - truth).abs().max()) < 1e-9
            mask = 0.3 + 0.5 * torch.rand(1, 4, 3, 3, generator=torch.Generator().manual_seed(1)).double()
            way = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(2)).double()
            leaf = mask.clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(player.log_probs(leaf).sum(), leaf)
            high, low = (player.log_probs(mask + sign * _STEP * way).sum() for sign in (1, -1))
            slope = float((high - low) / (2 * _STEP))
            assert abs(slope - float((gradient * way).sum())) < 1e-4 * float(gradient.norm() * way.norm())
            assert bool(gradient.flatten(2).norm(dim=2).gt(0).all()), "a frame has no gradient"
    finally:
        model.float()


def test_a_composite_has_the_pixels_that_the_real_video_processor_makes_of_it(case: Case) -> None:
    path, built = case.replay.path, case.built
    mask = torch.rand(4, 5, 7, generator=torch.Generator().manual_seed(3))
    baseline = np.stack([np.asarray(frame) for frame in path.baseline_images])
    real = clips.clip_inputs(built, [composite(mask, case.frames, baseline)])
    exact = path.apply(mask[None], mode="exact")
    fast = path.apply(mask[None])
    for name in path.pixel_keys:
        assert torch.equal(exact[name], real[name])
        assert fast[name].shape == real[name].shape
    assert path.report.mean_error < _LEVELS


def test_all_kept_and_all_taken_away_are_the_processor_s_own_to_the_last_bit(case: Case) -> None:
    path = case.replay.path
    baseline = np.stack([np.asarray(frame) for frame in path.baseline_images])
    blurred = clips.clip_inputs(case.built, [baseline])
    for value, real in ((1.0, case.inputs), (0.0, blurred)):
        made = path.apply(torch.full((1, 4, 2, 3), value))
        for name in path.pixel_keys:
            assert torch.equal(made[name], real[name])


def test_a_call_is_masked_in_time_and_space_as_a_replay_is(case: Case) -> None:
    built, mask = case.built, torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(6))
    with probe.attach(built.model, built.processor) as p:
        own = clips.clip_inputs(built, [case.frames])
        for baseline in ("blur", "first_frame"):
            made = case.replay.over(baseline).path.apply(mask[None], image=case.replay.clips[0])
            output = built.generate(own | {name: made[name] for name in own.keys() & made.keys()})
            with p.masked(mask, baseline=baseline):
                masked = built.generate(own)
            assert torch.equal(masked.sequences, output.sequences)
            assert all(map(torch.equal, masked.logits, output.logits))
            assert not torch.equal(masked.logits[0], case.output.logits[0])
        with p.masked(torch.ones(1, 1)):
            assert all(map(torch.equal, built.generate(own).logits, case.output.logits))
        leaf = mask.clone().requires_grad_(True)
        with p.masked(leaf):
            built.model(**own).logits.sum().backward()
        assert bool(leaf.grad.abs().flatten(1).sum(1).gt(0).all())


def test_a_mask_of_fewer_steps_lasts_several_frames(case: Case) -> None:
    (clip,) = case.replay.clips
    steps = torch.zeros(1, 2, 1, 1)
    steps[:, 1] = 1
    by_hand = torch.tensor([0.0, 0.25, 0.75, 1.0]).reshape(1, 4, 1, 1)
    made, expected = case.replay.log_probs(steps, image=clip), case.replay.log_probs(by_hand)
    assert torch.allclose(made, expected, atol=1e-6)


def test_masks_go_through_together_as_they_do_alone(case: Case) -> None:
    masks = torch.rand(3, 4, 2, 2, generator=torch.Generator().manual_seed(5))
    alone = torch.cat([case.replay.log_probs(mask[None]) for mask in masks])
    assert torch.allclose(case.replay.log_probs(masks), alone, atol=1e-4)


def test_an_image_token_knows_its_frames_and_its_box(case: Case) -> None:
    layout, together = case.trace.layout, clips.CLIPS[case.built.member.name].together
    placed = layout.patch_box[:, 2] > layout.patch_box[:, 0]
    found = np.unique(layout.patch_frames[placed], axis=0).tolist()
    assert found == [[first, first + together - 1] for first in range(0, 4, together)]
    for first in range(0, 4, together):  # the tokens of each moment cover a point of the frame
        boxes = layout.patch_box[placed & (layout.patch_frames[:, 0] == first)]
        inside = (boxes[:, 0] < 40) & (boxes[:, 2] > 40) & (boxes[:, 1] < 25) & (boxes[:, 3] > 25)
        assert inside.sum() == 1


def test_a_planted_token_lands_in_its_frames_and_its_cell(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens stand in the prompt moment by moment, each row by row: the first is in a corner, the last in the other."""
    trace, moments = case.trace, clips.FRAMES // clips.CLIPS[case.built.member.name].together
    rows, layout = trace.attention, trace.layout
    placed = np.flatnonzero(layout.patch_box[:, 2] > layout.patch_box[:, 0]).reshape(moments, -1)
    for moment, token in itertools.product(range(moments), (0, -1)):
        values = np.zeros_like(rows.values)
        values[..., placed[moment, token]] = 1
        planted = dataclasses.replace(rows, values=values)
        monkeypatch.setattr(type(trace), "attention", property(lambda _, found=planted: found))
        heat = probe.video.explain(trace, method="attention", tokens=[0, 1], progress=False)
        assert len(heat.values) == moments
        seen = np.argwhere(heat.seen[moment])
        corner = seen.min(0) if token == 0 else seen.max(0)
        assert np.unravel_index(heat.values.argmax(), heat.values.shape) == (moment, *corner)


def test_methods_over_tokens_explain_by_tubes(case: Case) -> None:
    takes = clips.CLIPS[case.built.member.name]
    shown = {}
    for method in ("attention recorded", "attention replay", "tmm", "tam", "gradcam", *_LIKE):
        name, _, source = method.partition(" ")
        more = {"source": source} if source else {}
        if why := takes.refused.get(_LIKE.get(name, name)):
            with pytest.raises(ExplainError, match=why):
                probe.video.explain(case.replay, method=name, tokens=[0, 1], progress=False)
            continue
        heat = probe.video.explain(case.replay, method=name, tokens=[0, 1], progress=False, **more)
        together = takes.seen_by_gradcam if name == "gradcam" and takes.seen_by_gradcam else takes.together
        assert heat.clip == case.trace.clips[0] and len(heat.values) == clips.FRAMES // together, method
        assert heat.values.max() == 1.0
        shown[method] = heat.values
    assert np.allclose(shown["attention recorded"], shown["attention replay"], atol=0.02)  # kept in float16
    assert "tmm" not in shown or not np.allclose(shown["tmm"], shown["attention replay"], atol=0.02)


def means(run: inside.Scored, decoder: str) -> list[torch.Tensor]:
    """A of each decoder layer, mean over heads, ``(query, key)`` float64, lowest first."""
    return [call.weights[0].double().mean(0) for call in run.of(decoder)]


def read(calls: list[inside.Dense], queries: torch.Tensor, columns: np.ndarray) -> torch.Tensor:
    """Σ_t g_t Σ_lh w_lh E_lh of image tokens, ``gradient_attention``'s formulas, ``(image_token,)`` float64."""
    products = torch.stack([(call.weights * call.gradient)[0].double().clamp(min=0) for call in calls])
    rows = products[:, :, queries]  # (layer, head, query, key)
    seen, whole = rows[..., columns], rows.sum(-1)
    words = torch.einsum("lhq,lhqk->qk", seen.sum(-1) / whole, seen)
    return (seen.sum((0, 1, 3)) / whole.sum((0, 1))) @ words


def between(replay: probe.Replay, share: float) -> dict[str, torch.Tensor]:
    """r·I + (1 − r)·Ĩ in the model's own pixel inputs."""
    first, last, keys = replay.path.baseline_inputs, replay.path.inputs, replay.path.pixel_keys
    return {name: first[name] + share * (last[name] - first[name]) if name in keys else last[name] for name in last}


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_methods_over_attention_are_dense_products_on_tubes(name: str, tmp_path: Path) -> None:
    """Against attention and its gradients as an eager model's own autograd has them."""
    steps, question = [0, 1], "What happens?"
    case, twin = record(clips.built(name), tmp_path, [clips.frames()]), clips.built(name)
    twin.model.set_attn_implementation("eager")
    eager, decoder = probe.replay(case.trace, twin.model, twin.processor), case.replay.anatomy.decoder
    tokens, queries = image_tokens(case.replay, case.replay.clips[0]), eager.prompt_length - 1 + torch.tensor(steps)
    truth = inside.dense(eager, steps)
    layers, one = means(truth, decoder), torch.eye(eager.length, dtype=torch.float64)
    assert len(layers) == twin.model.config.get_text_config().num_hidden_layers
    rolled = one
    for layer in layers:
        rolled = (layer + one) / (layer + one).sum(1, keepdim=True) @ rolled
    runs = [inside.dense(eager, steps, between(eager, point / 3)).of(decoder) for point in range(4)]
    gradients = [
        torch.stack([call.gradient[0].double() for call in calls]).mean(0) for calls in zip(*runs, strict=True)
    ]
    shown = [call.weights[0].double() for call in runs[-1]]
    relevance = [(gradient * own).clamp(min=0).mean(0) for gradient, own in zip(gradients, shown, strict=True)]
    asked = eager.reworded(GENERAL_PROMPT, question=question)
    moved = torch.isin(asked.input_ids, eager.input_ids[tokens.positions].unique()).nonzero()[:, 0]
    general = torch.stack(means(inside.dense(asked, steps), decoder)).mean(0)[asked.prompt_length - 1, moved]
    wanted = {
        "rollout": rolled[queries].sum(0)[tokens.positions],
        "iia": inside.chefer(relevance)[queries].sum(0)[tokens.positions],
        "relative_attention": torch.stack(layers).mean(0)[queries].mean(0)[tokens.positions] / general,
        "gradient_attention": read(truth.of(decoder), queries, tokens.positions),
        "attention_flow": flows(layers, queries, torch.from_numpy(tokens.positions)),
    }
    params: dict[str, Any] = {"iia": {"points": 4}, "relative_attention": {"question": question}}
    inner = tokens_that_read(case.replay, 0, case.replay.clips[0])
    reached = [call for call in truth.of(inner.encoder) if call.gradient is not None]
    last = [call for call in reached if call.module == reached[-1].module]
    columns = torch.cat([(call.weights * call.gradient).double().sum((1, 2)).abs().flatten() for call in last])
    places = dict.fromkeys(wanted, (tokens.boxes, tokens.size)) | {"gradient_value": (inner.boxes, tokens.size)}
    for method, values in (wanted | {"gradient_value": columns}).items():
        heat = probe.video.explain(
            case.replay, method=method, tokens=steps, strengthen=False, progress=False, **params.get(method, {})
        )
        grid, met = paint(values, *places[method], heat.values.shape)
        low, high = grid[met].min(), grid[met].max()
        within = 2e-3 if method == "relative_attention" else 1e-4  # rows are recorded in float16
        assert np.abs(heat.values - torch.where(met, (grid - low) / (high - low), 0.0).numpy()).max() < within, method


def test_a_clip_is_searched_in_bfloat16(tmp_path: Path) -> None:
    """On a decoder without experts, which bfloat16 may send a token to others."""
    replay = record(clips.built("qwen2_vl"), tmp_path, [clips.frames()]).replay
    asked: dict[str, Any] = {"method": "rise", "masks": 8, "tokens": [0, 1], "strengthen": False, "progress": False}
    exact, searched = (probe.video.explain(replay, **asked, **more) for more in ({}, {"search_dtype": "bfloat16"}))
    assert (exact.search_dtype, searched.search_dtype) == (None, "bfloat16")
    assert searched.provenance["search"]["forward"] > 0
    assert np.corrcoef(exact.values.ravel(), searched.values.ravel())[0, 1] > 0.9
    assert not np.array_equal(exact.values, searched.values)


def test_tokens_of_the_encoder_know_their_frames(case: Case) -> None:
    """The left of one frame is taken away: the tokens that are given something else are those whose tubes are there."""
    replay, built = case.replay, case.built
    (clip,) = replay.clips
    if why := clips.CLIPS[built.member.name].refused.get("encoder"):
        with pytest.raises(ExplainError, match=why):
            tokens_that_read(replay, 0, clip)
        return
    tokens = tokens_that_read(replay, 0, clip)
    found: list[torch.Tensor] = []
    handle = built.model.get_submodule(tokens.blocks[0]).register_forward_pre_hook(
        lambda _module, args, kwargs: found.append(next(v for v in (*args, *kwargs.values()) if torch.is_tensor(v))),
        with_kwargs=True,
    )
    mask = torch.ones(1, clips.FRAMES, 1, 2)
    mask[:, 2, :, 0] = 0
    try:
        for given in (torch.ones(1, clips.FRAMES, 1, 2), mask):
            pixels = replay.path.apply(given)
            with torch.no_grad():
                built.model(**{k: pixels.get(k, v) for k, v in case.inputs.items()})
    finally:
        handle.remove()
    whole, without = (value.reshape(len(tokens.boxes), -1) for value in found)
    moved = ((whole - without).abs().amax(1) > 1e-4).numpy()
    x0, _, t0, x1, _, t1 = tokens.boxes.T
    now, edge = (t0 <= 2) & (t1 > 2), 0.75 * replay.image_sizes[0][0]  # of what the mask, interpolated, leaves whole
    assert moved[tokens.live & now & (x1 < edge - 4)].all()
    assert not moved[tokens.live & ~(now & (x0 < edge + 4))].any()
    assert 0 < moved.sum() < tokens.live.sum() / 2


@pytest.mark.parametrize("name", ["internvl", "qwen3_vl", "glm4v", "glm46v"])
def test_labels_of_frames_are_no_part_of_the_question(name: str, tmp_path: Path) -> None:
    built = clips.built(name)
    text = f"<bos>USER: {2 * clips.CLIPS[name].slot}What happens 2 times? ASSISTANT:"
    with probe.attach(built.model, built.processor) as p, p.record(tmp_path) as recording:
        built.generate(clips.clip_inputs(built, [clips.frames(), clips.frames(seed=9)], text=text))
    assert recording.traces[0].question == "What happens 2 times?"


# ---------------------------------------------------------------------------------------------- mixed, several, batched


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision", "video_llava"])
def test_images_and_several_clips_stand_side_by_side(name: str, tmp_path: Path) -> None:
    given = [clips.frames(), clips.frames(seed=9)]
    case = record(clips.built(name), tmp_path, given, [picture(70, 80, seed=30)])
    assert [(clip.first, clip.frames) for clip in case.trace.clips] == [(1, 4), (5, 4)]
    assert len(case.trace.images) == 9
    assert float((case.replay.original_log_probs - torch.tensor(case.trace.log_probs)).abs().max()) < 1e-4
    path = case.replay.path
    for key in path.pixel_keys:
        source = path.coordinates(key)[2]
        assert set(source.unique().tolist()) <= ({*range(1, 9)} if "video" in key else {0})
    _, second = case.replay.clips
    only = path.apply(torch.zeros(1, 2, 2, 2), image=second)
    for key in path.pixel_keys:
        changed = (only[key] != path.inputs[key]).flatten()
        assert set(path.coordinates(key)[2].flatten()[changed].tolist()) <= {5, 6, 7, 8}
    assert set(case.trace.image_index.tolist()) == ({0, 1, 3, 5, 7} if name == "qwen2_vl" else {*range(9)})


@pytest.mark.parametrize("name", ["qwen2_vl", "internvl"])
def test_one_of_several_clips_is_masked(name: str, tmp_path: Path) -> None:
    given, stills = [clips.frames(), clips.frames(seed=9)], [picture(70, 80, seed=30)]
    case = record(clips.built(name), tmp_path, given, stills)
    model, mask = case.built.model, torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(7))
    before = dict(case.inputs)
    with probe.attach(model, case.built.processor) as p, torch.no_grad():
        with pytest.raises(ImageError, match="of this call is not known"), p.masked(mask, clip=1):
            model(**before)
        own = clips.clip_inputs(case.built, given, stills)
        made = case.replay.path.apply(mask[None], image=case.replay.clips[1])
        with p.masked(mask, clip=1):
            masked = model(**own).logits
        assert torch.equal(masked, model(**own | {name: made[name] for name in case.replay.path.pixel_keys}).logits)
        with pytest.raises(MaskError, match=r"has 2 video\(s\), counted from 0"), p.masked(mask, clip=2):
            model(**own)
        with pytest.raises(MaskError, match=r"or clip=k with \(t, row, col\)"), p.masked(mask):
            model(**own)
        with pytest.raises(ImageError, match="images= are given beside it"), p.masked(mask, clip=0, images=stills):
            model(**own)


def test_audio_beside_a_clip_stays_as_it_was(tmp_path: Path) -> None:
    built = clips.built("qwen2_5_omni_thinker")
    text = clips.CLIPS["qwen2_5_omni_thinker"].slot + "<|audio_start|><|audio_pad|><|audio_end|> What happens?"
    sound = np.random.default_rng(0).normal(size=600).astype(np.float32)
    with probe.attach(built.model, built.processor) as p, p.record(tmp_path) as recording:
        made = built.processor(
            videos=[clips.frames()], audio=[sound], text=[text], do_sample_frames=False, return_tensors="pt"
        )
        inputs = {name: value for name, value in made.items() if torch.is_tensor(value)}
        built.generate(inputs)
    (trace,) = recording.traces
    assert torch.equal(torch.as_tensor(trace.model_kwargs["input_features"]), inputs["input_features"])
    replay = probe.replay(trace, built.model, built.processor)
    assert float((replay.original_log_probs - torch.tensor(trace.log_probs)).abs().max()) < 1e-4
    assert set(trace.image_index.tolist()) == {0, 2} and len(trace.image_positions) < len(trace.input_ids)


def test_images_and_clips_may_share_a_name(tmp_path: Path) -> None:
    still = picture(70, 80, seed=30)
    case = record(clips.built("internvl"), tmp_path, [clips.frames(), clips.frames(seed=9)], [still])
    assert [(clip.first, clip.frames) for clip in case.trace.clips] == [(1, 4), (5, 4)]
    assert [image.size for image in case.trace.images] == [still.size, *[(90, 60)] * 8]
    assert float((case.replay.original_log_probs - torch.tensor(case.trace.log_probs)).abs().max()) < 1e-4
    path = case.replay.path
    assert path.pixel_keys == ("pixel_values",)
    assert torch.equal(path.apply(torch.ones(1, 9, 2, 2))["pixel_values"], case.inputs["pixel_values"])
    rows = path.coordinates("pixel_values")[2].flatten(1)
    assert all(len(row.unique()) == 1 for row in rows)
    assert [int(row[0]) for row in rows][-8:] == [*range(1, 9)]
    only = path.apply(torch.zeros(2, 2, 2, 2), image=case.replay.clips[1])["pixel_values"]
    for masked in only.unflatten(0, (2, -1)):
        changed = [bool(new.ne(old).any()) for new, old in zip(masked, case.inputs["pixel_values"], strict=True)]
        assert changed == [*[False] * (len(changed) - 4), *[True] * 4]
    assert set(case.trace.image_index.tolist()) == {*range(9)}


def test_each_prompt_of_a_batch_has_its_clip(tmp_path: Path) -> None:
    built = clips.built("qwen2_vl")
    text = clips.CLIPS["qwen2_vl"].slot + " What happens?"
    given = [clips.frames(), clips.frames(seed=20)]
    with probe.attach(built.model, built.processor) as p, p.record(tmp_path) as recording:
        inputs = built.processor(videos=given, text=[text, text], return_tensors="pt", padding=True)
        built.generate({name: value for name, value in inputs.items() if torch.is_tensor(value)})
    for trace, frames in zip(recording.traces, given, strict=True):
        assert np.array_equal(np.stack([np.asarray(frame) for frame in trace.images]), frames)
        player = probe.replay(trace, built.model, built.processor)
        assert float((player.original_log_probs - torch.tensor(trace.log_probs)).abs().max()) < 1e-4


def test_frames_are_kept_as_they_were_sampled_and_shown(tmp_path: Path) -> None:
    built = clips.built("llava_onevision")
    video = clips.frames(8)
    kept = video.copy()
    with probe.attach(built.model, built.processor) as p, p.record(tmp_path) as recording:
        inputs = clips.clip_inputs(built, [video], do_sample_frames=True, num_frames=4)
        video[:] = 0  # the user's own array, and the user goes on with it
        built.generate(inputs)
    (clip,) = recording.traces[0].clips
    assert clip.frames == 4 and clip.total == 8
    assert clip.times == tuple(index / 2 for index in clip.indices)
    for index, frame in zip(clip.indices, recording.traces[0].images, strict=True):
        assert np.array_equal(np.asarray(frame), kept[index])
    path = probe.replay(recording.traces[0], built.model, built.processor).path  # which must not sample them again
    assert torch.equal(path.inputs["pixel_values_videos"], inputs["pixel_values_videos"])


def test_frames_may_have_their_channels_first(tmp_path: Path) -> None:
    built = clips.built("qwen2_vl")
    given = np.ascontiguousarray(clips.frames().transpose(0, 3, 1, 2))
    case = record(built, tmp_path, [given], input_data_format="channels_first")
    assert np.array_equal(np.stack([np.asarray(frame) for frame in case.trace.images]), clips.frames())
    assert torch.equal(case.replay.path.inputs["pixel_values_videos"], case.inputs["pixel_values_videos"])


def test_what_a_method_takes_on_a_video_is_foretold(tmp_path: Path) -> None:
    replay = record(clips.built("qwen2_vl"), tmp_path, [clips.frames(width=180, height=120)]).replay
    for method, params in (("igos++", {"preset": "fast"}), ("tmm", {}), ("rise", {"masks": 16})):
        planned = probe.plan(replay, method=method, image=2, seconds=False, **params)  # a frame stands for its video
        view = replay.with_settings(micro_batch=planned.micro_batch)
        problem, meter = Problem(view, probe.select_tokens(replay, span=None), clip=replay.clips[0]), Meter(view.device)
        with view.shortcuts.caching(), meter.running():
            resolve(method)(problem, **params)
        assert abs(planned.peak / meter.reading.peak - 1) < 0.15
        heat = probe.video.explain(replay, method=method, strengthen=False, progress=False, plan=planned, **params)
        assert heat.provenance["memory"]["predicted_peak"] == planned.peak
        assert heat.provenance["passes"]["backward"] == planned.backward
    assert probe.plan(replay, method="rise", masks=16).seconds > 0
    view, later = replay.counted(), dataclasses.replace(replay.clips[0], fps=9.0)
    cost_model(view, cost_for(view, "rise", {"masks": 16}), target=later)
    assert view.passes.forward == 0  # known of a video of the same shape, whenever its frames are shown


@pytest.mark.parametrize("name", ["qwen3_vl", "llava_onevision"])
def test_tokens_under_a_tube_are_cut_and_patched(name: str, tmp_path: Path) -> None:
    """Features that enter at later layers too (qwen3_vl)."""
    case = record(clips.built(name), tmp_path, [clips.frames()])
    replay, region = case.replay, np.zeros((4, 1, 1), bool)
    region[3] = True  # the last frame, or the pair that it is in
    selection = probe.select_tokens(replay, rule="joint")
    other = [Image.fromarray(frame) for frame in clips.frames(seed=40)]
    effect = probe.causal.patch(replay, region, donor=other, tokens=selection)
    assert effect.effects[0].tokens == len(case.trace.image_index) // (4 // clips.CLIPS[name].together)
    assert effect.everything == pytest.approx(float(replay.over(other).baseline_log_probs.sum()), abs=1e-4)
    same = probe.causal.patch(replay, region, donor=list(case.trace.images), tokens=selection)
    assert same.effects[0].score == effect.original == same.everything
    heat = probe.video.explain(replay, method="attention", tokens=selection, progress=False)
    cut = probe.causal.knockout(replay, heat, top=0.25, sweep=0, draws=2)
    late = probe.causal.knockout(replay, np.float32(region), top=0.25, sweep=0, draws=2, tokens=selection)
    assert cut.everything == late.everything != cut.original
    with pytest.raises(ExplainError, match=r"boolean region \(t, row, col\)"):
        probe.causal.knockout(replay, region[0], tokens=selection, image=1)
    with pytest.raises(ImageError, match="2 donor images for 4"):
        probe.causal.patch(replay, heat, donor=other[:2])
    with pytest.raises(ExplainError, match="a video that this prompt does not have"):
        probe.causal.knockout(replay, dataclasses.replace(heat, clip=dataclasses.replace(heat.clip, fps=9.0)))


def test_geometry_is_traced_once_for_videos_of_one_size(tmp_path: Path) -> None:
    built = clips.built("qwen2_vl")
    record(built, tmp_path, [clips.frames()])
    later = {"total_num_frames": 400, "fps": 25.0, "duration": 16.0, "frames_indices": [0, 9, 99, 399]}
    again = record(built, tmp_path / "again", [clips.frames(seed=40)], video_metadata=[later])
    assert again.trace.clips[0].times == (0.0, 0.36, 3.96, 15.96)
    assert again.replay.path.report.runs == 0


def test_frames_may_be_pil_images(tmp_path: Path) -> None:
    built = clips.built("qwen2_vl")
    shown = [Image.fromarray(frame) for frame in clips.frames()]
    text = clips.CLIPS["qwen2_vl"].slot + " What happens?"
    with probe.attach(built.model, built.processor) as p, p.record(tmp_path) as recording:
        built.generate(dict(built.processor(videos=[shown], text=[text], return_tensors="pt")))
    assert [frame.tobytes() for frame in recording.traces[0].images] == [frame.tobytes() for frame in shown]


# ------------------------------------------------------------------------------------------------- what is refused


def refused(built: Built, directory: Path, inputs: Any) -> str:
    """What a user reads whose video is not recorded; the answer is theirs all the same."""
    with probe.attach(built.model, built.processor) as p, pytest.warns(ProbeWarning) as said:
        made = inputs()
        plain = built.generate(made)
        with p.record(directory) as recording:
            seen = built.generate(made)
    assert torch.equal(plain.sequences, seen.sequences)
    assert not recording.paths
    return " ".join(str(item.message) for item in said if issubclass(item.category, ProbeWarning))


def test_other_families_are_refused_by_name(tmp_path: Path) -> None:
    load_members()
    built = build("muse_spark")

    def inputs() -> dict[str, Any]:
        whole = {"videos": [clips.frames()], "do_sample_frames": False, "return_tensors": "pt", "return_metadata": True}
        made = built.processor(text=["<|video|> What happens?"], **whole)
        return {name: value for name, value in made.items() if torch.is_tensor(value)}

    told = refused(built, tmp_path, inputs)
    assert "videos of MuseSparkForConditionalGeneration are not recorded yet" in told


def test_tokens_that_are_dropped_by_content_are_not_masked(tmp_path: Path) -> None:
    built = clips.built("video_llama_3")
    built.processor.video_processor = transformers.VideoLlama3VideoProcessor(
        size={"shortest_edge": 784, "longest_edge": 21_600}
    )
    case = record(built, tmp_path, [clips.frames()])
    assert any("'video_compression_mask' depends on the image's content" in note for note in case.trace.notes)
    with pytest.raises(ProcessorRefused, match="Switch that option off"):
        case.replay.log_probs(torch.zeros(1, 4, 1, 1), image=case.replay.clips[0])


def test_a_video_whose_frames_are_not_known_is_refused(tmp_path: Path) -> None:
    built = clips.built("qwen2_vl")
    before = clips.clip_inputs(built, [clips.frames()])
    assert "holds a video, and the attached processor has made nothing" in refused(built, tmp_path, lambda: before)
    floats = clips.frames() / np.float32(255)
    told = refused(built, tmp_path, lambda: clips.clip_inputs(built, [floats]))
    assert "float32" in told and "nothing is recorded" in told


def test_more_pixels_than_a_trace_keeps_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lvlm_probe.recording.handed_images.MOST_PIXELS", 4 * 90 * 60 - 1)
    built = clips.built("qwen2_vl")
    told = refused(built, tmp_path, lambda: clips.clip_inputs(built, [clips.frames()]))
    assert "4 frames of 90 x 60" in told


def test_a_clip_is_replayed_by_the_processor_that_has_it(case: Case) -> None:
    with pytest.raises(ImageError, match="takes the processor"):
        probe.replay(case.trace, case.built.model, None)


def test_a_probe_leaves_nothing_on_the_video_processor(tmp_path: Path) -> None:
    built = clips.built("qwen2_vl")
    videos = built.processor.video_processor
    before = dict(vars(videos))
    with probe.attach(built.model, built.processor) as p, p.record(tmp_path):
        built.generate(clips.clip_inputs(built, [clips.frames()]))
        assert vars(videos) != before
    assert vars(videos) == before
