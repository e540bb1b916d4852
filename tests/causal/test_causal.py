"""The causal check: cuts against attention written out by hand, patches against the donor's own run, scores by hand.

What goes through nnsight is checked in ``nnsight_checks.py``, in a process of its own (see ``test_nnsight.py``).
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import lvlm_probe as probe
from lvlm_probe import causal
from lvlm_probe.attention.cutting import AttentionCut, attention_layers, cut_attention
from lvlm_probe.causal import interventions as checks
from lvlm_probe.causal.effects import agreement_score
from lvlm_probe.causal.tokens import placed_tokens, query_positions, token_heat

FAMILIES = ("llava", "qwen2_5_vl", "gemma3", "paligemma")


def record(name, directory, *, implementation="sdpa", images=1, size=(90, 60), **options):
    model, processor = tiny_models.build(name, attn_implementation=implementation)
    pictures = [tiny_models.picture(*size, seed=k) for k in range(images)]
    with probe.attach(model, processor) as p, p.record(directory, **options) as recording:
        inputs = tiny_models.inputs(name, model, processor, pictures, "What is this?")
        model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return probe.replay(recording.traces[0], model, processor)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return record("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture
def everything(llava):
    return probe.select_tokens(llava, rule="joint")


@pytest.fixture
def heat():
    return np.random.default_rng(0).random((6, 9))


def hooks_of(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


# ---------------------------------------------------------------- which tokens


def test_token_heat_is_the_mean_over_the_pixels_of_the_box():
    values = np.random.default_rng(0).random((4, 5))
    pixels = np.kron(values, np.ones((6, 4)))  # a picture of 20 x 24 pixels
    boxes = np.array([[0, 0, 20, 24], [3, 5, 9, 11], [0, 0, 4, 6], [19, 23, 20, 24], [7, 0, 8, 24]], dtype=float)
    expected = [pixels[int(y0) : int(y1), int(x0) : int(x1)].mean() for x0, y0, x1, y1 in boxes]
    np.testing.assert_allclose(token_heat(values, boxes, (20, 24)), expected, atol=1e-12)


def test_token_heat_weighs_cells_by_shared_area():
    """A quarter of the box's width is in the left cell, three quarters in the right one."""
    heat = token_heat(np.array([[0.0, 1.0]]), np.array([[0.75, 0.0, 1.75, 1.0]]), (2, 1))
    assert heat == pytest.approx([0.75])


def test_token_heat_of_a_tube_is_the_mean_over_its_pixels_and_frames():
    values = np.random.default_rng(1).random((2, 4, 5))
    pixels = np.kron(values, np.ones((3, 6, 4)))  # six frames of 20 x 24 pixels
    boxes = np.array([[0, 0, 0, 20, 24, 6], [3, 5, 2, 9, 11, 4], [0, 0, 5, 4, 6, 6]], dtype=float)
    expected = [
        pixels[int(t0) : int(t1), int(y0) : int(y1), int(x0) : int(x1)].mean() for x0, y0, t0, x1, y1, t1 in boxes
    ]
    np.testing.assert_allclose(token_heat(values, boxes, (20, 24, 6)), expected, atol=1e-12)


def test_image_tokens_of_one_of_two_pictures(tmp_path):
    replay = record("llava", tmp_path, images=2)
    first, second = placed_tokens(replay, 0), placed_tokens(replay, 1)
    assert len(first) == len(second) == 16
    assert set(first.positions).isdisjoint(second.positions)
    layout = replay.trace.layout
    np.testing.assert_array_equal(layout.image_positions[second.rows], second.positions)
    assert set(layout.image_index[second.rows]) == {1}
    with pytest.raises(probe.errors.ExplainError, match="2 image"):
        placed_tokens(replay, 2)


def test_query_positions_are_those_that_predict(llava):
    """Blind from one position on, earlier predictions stay the same to the bit and this one changes."""
    prompt = len(llava.trace.input_ids)
    selection = probe.select_tokens(llava, span=(2, 4))
    assert query_positions(llava, selection, "tokens").tolist() == [prompt + 1, prompt + 2]
    assert query_positions(llava, selection, "answer").tolist() == [prompt - 1, prompt, prompt + 1, prompt + 2]
    text = query_positions(llava, selection, "text")
    images = llava.trace.layout.image_positions
    assert text[0] == images[-1] + 1
    assert text[-1] == prompt + 2
    assert set(text).isdisjoint(images)
    # The same mask for all of them: the kernel that gets none rounds differently.
    layers = attention_layers(llava.model, "all")
    with cut_attention(llava, layers, np.array([0]), images[-1:]):  # a pair that is not visible anyway
        whole = llava.log_probs(None)[0]
    with cut_attention(llava, layers, query_positions(llava, selection, "tokens"), images):
        blind = llava.log_probs(None)[0]
    assert torch.equal(blind[:2], whole[:2])
    assert (blind[2:4] - whole[2:4]).abs().min() > 1e-3


# ---------------------------------------------------------------- the cut


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_cut_weights_are_zero_and_the_rest_of_the_row_shares_them(name, implementation, tmp_path):
    """In the first layer, whose inputs a cut does not change: A' = A / (1 − Σ cut A)."""
    replay = record(name, tmp_path, implementation=implementation)
    keys = placed_tokens(replay, 0).positions[1::2]
    queries = query_positions(replay, probe.select_tokens(replay, rule="joint"), "text")
    rows = torch.arange(replay.prompt_length + len(replay.tokens) - 1)

    def weights():
        with replay.capture(attention=["decoder"]) as seen:
            replay.log_probs(None)
        first = min(seen.layers, key=lambda layer: layer.layer.index)
        return first.weights(rows)[0]

    plain = weights()
    with cut_attention(replay, attention_layers(replay.model, "all"), queries, keys):
        cut = weights()
    pairs = torch.zeros(len(rows), len(rows), dtype=torch.bool)
    pairs[queries[:, None], keys] = True
    assert float(plain[:, pairs].max()) > 0.01
    assert float(cut[:, pairs].max()) == 0
    expected = plain.masked_fill(pairs, 0)
    expected = expected / expected.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(cut, expected, atol=1e-6, rtol=1e-5)


def test_a_cut_of_all_layers_equals_attention_written_out(llava, heat, everything):
    """Softmax, zeros in the cut places, division by the row's sum: through all layers."""
    target = checks.target_of(llava, heat, everything, 0)
    effect = causal.knockout(llava, heat, tokens=everything, top=0.25, sweep=0)
    keys = target.tokens.positions[np.argsort(-target.heat)[:4]]
    queries = query_positions(llava, everything, "text")

    def attention(module, query, key, value, attention_mask, scaling=None, **_):
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
        weights = (query @ key.transpose(2, 3) * scaling + attention_mask).softmax(-1)
        weights[:, :, queries[:, None], keys] = 0
        weights = weights / weights.sum(-1, keepdim=True)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    AttentionInterface.register("written_out", attention)
    AttentionMaskInterface.register("written_out", eager_mask)
    decoder = llava.model.model.language_model
    try:
        decoder.set_attn_implementation("written_out")
        expected = llava.log_probs(None)[0]
    finally:
        decoder.set_attn_implementation("sdpa")
        AttentionInterface._global_mapping.pop("written_out")
        AttentionMaskInterface._global_mapping.pop("written_out")
    assert effect.effects[0].score == pytest.approx(float(expected.sum()), abs=1e-4)
    assert abs(effect.drop) > 0.1


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_sdpa_and_eager_agree(name, tmp_path, heat):
    effects = []
    for implementation in ("sdpa", "eager"):
        replay = record(name, tmp_path / implementation, implementation=implementation)
        selection = probe.select_tokens(replay, rule="joint")
        effects.append(causal.knockout(replay, heat, tokens=selection, top=0.3, sweep=3))
    ours, theirs = effects
    for one, other in zip([*ours.effects, *ours.windows], [*theirs.effects, *theirs.windows], strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-4)
        assert one.control == pytest.approx(other.control, abs=1e-4)
    assert abs(ours.drop) > 0.1


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_empty_cut_changes_no_bit_and_nothing_is_left_behind(implementation, tmp_path, heat):
    replay = record("llava", tmp_path, implementation=implementation)
    before, hooks = replay.log_probs(None), hooks_of(replay.model)
    layers = attention_layers(replay.model, None)
    nothing = np.array([], dtype=np.int64)
    for queries, keys in ((nothing, np.array([5])), (np.array([25]), nothing)):
        with cut_attention(replay, layers, queries, keys):
            assert torch.equal(replay.log_probs(None), before)
    causal.knockout(replay, heat, tokens=probe.select_tokens(replay, rule="joint"))
    causal.patch(replay, heat, tokens=probe.select_tokens(replay, rule="joint"))
    assert torch.equal(replay.log_probs(None), before)
    assert hooks_of(replay.model) == hooks
    assert all("forward" not in vars(module) for module in replay.model.modules())


@pytest.mark.quick
def test_nothing_is_left_behind_when_a_pass_fails(llava, heat, everything, monkeypatch):
    hooks = hooks_of(llava.model)

    def fail(*_):
        raise RuntimeError("out of order")

    monkeypatch.setattr(llava, "log_probs", fail)
    for check in (causal.knockout, causal.patch):
        with pytest.raises(RuntimeError, match="out of order"):
            check(llava, heat, tokens=everything)
    assert hooks_of(llava.model) == hooks


def test_other_threads_are_not_cut(llava, everything):
    whole = llava.log_probs(None)
    images = llava.trace.layout.image_positions
    other = probe.replay(llava.trace, llava.model, llava.processor)
    results = []
    with cut_attention(llava, attention_layers(llava.model, "all"), query_positions(llava, everything, "text"), images):
        thread = threading.Thread(target=lambda: results.append(other.log_probs(None)))
        thread.start()
        thread.join()
        waiting = threading.Thread(target=lambda: results.append(llava.log_probs(None)))
        waiting.start()  # the same replay: it waits for the end of the block
        blind = llava.log_probs(None)
    waiting.join()
    assert torch.equal(results[0], whole) and torch.equal(results[1], whole)
    assert not torch.allclose(blind, whole, atol=1e-3)


def test_windows_cut_their_own_layers_only(llava, heat, everything):
    effect = causal.knockout(llava, heat, tokens=everything, top=0.5, sweep=2, draws=1)
    assert [window.layers for window in effect.windows] == [(0, 1), (2,)]
    for window in effect.windows:
        alone = causal.knockout(llava, heat, tokens=everything, top=0.5, layers=window.layers, sweep=0, draws=1)
        assert alone.effects[0].score == window.score
        assert alone.effects[0].control == window.control
    assert effect.windows[0].score != effect.windows[1].score
    assert causal.knockout(llava, heat, tokens=everything, layers=range(3), sweep=9).windows[2].layers == (2,)


# ---------------------------------------------------------------- the patch


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_all_tokens_patched_is_the_donors_own_run(name, tmp_path, heat):
    """Deepstack features too (qwen3_vl)."""
    replay = record(name, tmp_path)
    selection = probe.select_tokens(replay, rule="joint")
    donor = tiny_models.picture(seed=5)
    effect = causal.patch(replay, heat, donor=donor, tokens=selection, top=0.5)
    assert effect.original == pytest.approx(float(replay.original_log_probs.sum()), abs=1e-5)
    assert effect.everything == pytest.approx(float(replay.over(donor).baseline_log_probs.sum()), abs=1e-4)
    assert abs(effect.everything - effect.original) > 0.1
    assert effect.effects[0].score not in (effect.original, effect.everything)


def test_a_picture_patched_into_itself_changes_no_bit(llava, heat, everything):
    effect = causal.patch(llava, heat, donor=llava.image(), tokens=everything, top=[0.2, 0.7])
    for one in effect.effects:
        assert one.score == effect.original
        assert set(one.control) == {effect.original}


def test_the_donor_is_the_baseline_by_default(llava, heat, everything):
    effect = causal.patch(llava, heat, tokens=everything)
    assert effect.everything == pytest.approx(float(llava.baseline_log_probs.sum()), abs=1e-4)


def test_one_of_two_pictures_is_patched(tmp_path, heat):
    replay = record("llava", tmp_path, images=2)
    selection = probe.select_tokens(replay, rule="joint")
    effect = causal.patch(replay, heat, donor=tiny_models.picture(seed=5), tokens=selection, image=1)
    replay = replay.over([replay.image(0), tiny_models.picture(seed=5)])
    assert effect.everything == pytest.approx(float(replay.baseline_log_probs.sum()), abs=1e-4)


# ---------------------------------------------------------------- the score


def test_agreement_score_by_hand():
    """Shares 0.25 and 0.5; d of the heatmap 0.8, 1; of the control 0.2, 0.4; at best 1, 1; trapezoids added up."""
    value = agreement_score([0.25, 0.5], [0.28, 0.1], [0.82, 0.64], original=1.0, everything=0.1)
    hot = 0.25 * 0.4 + 0.25 * 0.9 + 0.5 * 1.0
    chance = 0.25 * 0.1 + 0.25 * 0.3 + 0.5 * 0.7
    best = 0.25 * 0.5 + 0.25 * 1.0 + 0.5 * 1.0
    assert value == pytest.approx((hot - chance) / (best - chance))


def test_agreement_score_at_its_ends():
    tops, control = [0.1, 0.3], [0.8, 0.5]
    ends = {"original": 0.9, "everything": 0.1}
    assert agreement_score(tops, control, control, **ends) == 0
    assert agreement_score(tops, [0.1, 0.1], control, **ends) == 1
    assert agreement_score(tops, [0.05, -3.0], control, **ends) == 1  # clipped: more than everything is everything
    assert agreement_score(tops, [0.9, 0.9], control, **ends) < 0
    assert np.isnan(agreement_score([1.0], [0.1], [0.1], **ends))
    assert np.isnan(agreement_score(tops, [0.1, 0.1], [0.1, 0.1], **ends))


def linear_target(heat):
    selection = SimpleNamespace(indices=(0,), text="red", tokens=("red",))
    return checks.Target(np.zeros(len(heat)), np.asarray(heat), selection, 0, False, "toy")


def measured(heat, weights, **settings):
    """An answer whose probability is what the tokens that are left weigh together."""
    replay = SimpleNamespace(trace_id="toy", passes=SimpleNamespace(forward=0))

    def take(rows, _layers):
        return (1 - torch.as_tensor(weights)[np.asarray(rows).copy()].sum()).clamp(min=1e-9).log()[None]

    given = {"top": checks.SHARES, "control": "random", "draws": 5, "seed": 0, **settings}
    target = linear_target(heat)
    counts = checks.counts_of(given.pop("top"), target)
    drawn = checks.Draws(**given)
    return checks.measure("knockout", replay, target, checks.Measured(take, [0], None), drawn, counts=counts, params={})


def test_agreement_on_a_linear_answer():
    """Right order: high; reversed: far below zero; random heatmaps: zero on average, within three standard errors."""
    generator = np.random.default_rng(1)
    weights = generator.random(50) ** 6
    weights /= weights.sum()
    right = measured(weights, weights).agreement
    assert right > 0.5
    assert measured(-weights, weights).agreement < -0.3
    values = [measured(generator.random(50), weights, seed=seed).agreement for seed in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    assert np.std(values) > 0.02


def test_control_bottom_takes_the_coldest_tokens():
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    effect = measured(weights, weights, top=0.5, control="bottom")
    assert effect.effects[0].probability == pytest.approx(0.3)
    assert effect.effects[0].control_probability == pytest.approx((0.7,))
    assert effect.probability_drop == pytest.approx(0.7)
    assert effect.control_probability_drop == pytest.approx(0.3)
    assert effect.drop == pytest.approx(-np.log(0.3))


def test_ties_are_broken_at_random_by_the_seed():
    weights = np.linspace(0, 1, 40) / 20
    scores = {measured(np.ones(40), weights, top=0.25, seed=seed).effects[0].probability for seed in range(5)}
    assert len(scores) == 5
    first, again = (measured(np.ones(40), weights, top=0.25, seed=3) for _ in range(2))
    assert first.effects == again.effects


def test_no_score_where_the_answer_does_not_depend_on_the_tokens():
    effect = measured(np.arange(10.0), np.full(10, 1e-4))
    assert np.isnan(effect.agreement)
    assert "does not depend" in effect.reason
    assert effect.to_dict()["agreement"] is None
    assert json.loads(json.dumps(effect.to_dict(), allow_nan=False))["reason"] == effect.reason


# ---------------------------------------------------------------- the demo model


@pytest.fixture(scope="module")
def scenes(demo, tmp_path_factory):
    """One held-out scene of each of four kinds, answered: ``(scene, replay, selection)``."""
    model, processor = demo
    found = []
    for scene in probe.demo.scenes(6, split="eval"):
        if scene.kind not in ("colour", "shape", "where", "pair"):
            continue
        with probe.attach(model, processor) as p, p.record(tmp_path_factory.mktemp(scene.kind)) as recording:
            inputs = processor.apply_chat_template(
                scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            model.generate(**inputs, max_new_tokens=32, do_sample=False)
        replay = probe.replay(recording.traces[0], model, processor)
        assert recording.traces[0].answer.strip() == scene.answer
        found.append((scene, replay, probe.select_tokens(replay)))
    assert len(found) == 4
    return found


@pytest.mark.parametrize("check", [causal.knockout, causal.patch])
def test_the_true_region_matters_and_others_do_not(check, scenes):
    for scene, replay, selection in scenes:
        effect = check(replay, scene.mask.astype(bool), tokens=selection)
        assert effect.effects[0].top < 0.25
        assert effect.probability_drop > 0.8, scene.answer
        assert effect.control_probability_drop < 0.3, scene.answer
        assert effect.drop > 3 + effect.control_drop, scene.answer


def test_agreement_tells_the_true_region_from_chance(scenes):
    true, chance = [], []
    for scene, replay, selection in scenes[:3]:
        values = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(scene.mask)[None].float(), 16)[0].numpy()
        settings = {"selection": selection, "image_size": replay.image_sizes[0]}
        true.append(causal.agreement(replay, probe.Heatmap(values, **settings), draws=2))
        noise = np.random.default_rng(scene.index).random((16, 16))
        chance.append(causal.agreement(replay, probe.Heatmap(noise, **settings), draws=2))
    assert np.mean(true) > 0.7
    assert abs(np.mean(chance)) < 0.4
    assert min(true) > max(chance)


def test_blind_question_and_answer_know_nothing(scenes):
    """Without any image token, through all layers, the words of the picture are lost."""
    _, replay, selection = scenes[0]
    effect = causal.knockout(replay, np.ones((4, 4), dtype=bool), tokens=selection, sweep=0)
    assert effect.effects[0].top == 1
    assert effect.effects[0].probability == pytest.approx(effect.everything_probability)
    assert effect.everything_probability < 0.2 < 0.9 < effect.original_probability


# ---------------------------------------------------------------- results and errors


def test_a_result_says_how_it_was_made(llava, heat, everything):
    told = []
    effect = causal.knockout(
        llava, heat, tokens=everything, top=[0.5, 0.1], draws=2, sweep=1, progress=lambda *now: told.append(now)
    )
    assert [one.tokens for one in effect.effects] == [2, 8]
    assert effect.provenance["passes"] == len(told) == told[-1][0] == told[-1][1] == 2 + 3 * 3
    record = json.loads(json.dumps(effect.to_dict(), allow_nan=False))
    assert record["kind"] == "knockout"
    assert record["effects"][1]["score"] == effect.effects[1].score
    assert record["provenance"]["trace_id"] == llava.trace_id
    assert record["params"]["queries"] == "text"
    assert "2 image tokens" in repr(effect)
    with pytest.raises(dataclasses.FrozenInstanceError):
        effect.kind = "patch"


def test_a_heatmap_brings_its_own_tokens_and_picture(llava, heat):
    selection = probe.select_tokens(llava, span=(1, 3))
    made = probe.Heatmap(heat / heat.max(), llava.image_sizes[0], selection=selection, method="mine")
    effect = causal.knockout(llava, made, sweep=0)
    assert effect.provenance["tokens"] == [1, 2]
    assert effect.provenance["method"] == "mine"
    assert effect.original == pytest.approx(float(llava.original_log_probs[1:3].sum()), abs=1e-5)


def test_a_region_is_all_tokens_that_it_touches(llava, everything):
    region = np.zeros((60, 90), dtype=bool)
    boxes = placed_tokens(llava, 0).boxes
    x0, y0, x1, y1 = boxes[5]
    region[int(y0) + 2 : int(y1) - 2, int(x0) + 2 : int(x1) - 2] = True
    assert causal.knockout(llava, region, tokens=everything, sweep=0).effects[0].tokens == 1
    with pytest.raises(probe.errors.ExplainError, match="region is empty"):
        causal.knockout(llava, np.zeros((60, 90), dtype=bool), tokens=everything)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top": 0.0}, "share of the image tokens"),
        ({"top": [0.1, 1.2]}, "share of the image tokens"),
        ({"layers": [0, 7]}, r"no attention layer \[7\].*it has \[0, 1, 2\]"),
        ({"layers": []}, "none given"),
        ({"layers": "first"}, "layers is 'all'"),
        ({"queries": "question"}, "queries is 'tokens'"),
        ({"queries": [5]}, "text positions"),
        ({"queries": [4000]}, "text positions"),
        ({"control": "top"}, "'random' or 'bottom'"),
        ({"draws": 0}, "draws is at least 1"),
        ({"backend": "jax"}, "'hooks' or 'nnsight'"),
        ({"image": 1}, r"1 image\(s\)"),
    ],
)
def test_bad_settings_are_refused(llava, heat, everything, settings, message):
    with pytest.raises(probe.errors.ExplainError, match=message):
        causal.knockout(llava, heat, **{"tokens": everything, **settings})


def test_bad_heatmaps_are_refused(llava, everything):
    size = llava.image_sizes[0]
    with pytest.raises(probe.errors.ExplainError, match="no values: because"):
        causal.knockout(llava, probe.Heatmap(None, size, selection=everything, reason="because"))
    assert np.isnan(causal.agreement(llava, probe.Heatmap(None, size, selection=everything, reason="because")))
    other = dataclasses.replace(everything, tokens=("another", "answer"))
    with pytest.raises(probe.errors.ExplainError, match="another answer"):
        causal.knockout(llava, np.ones((2, 2)), tokens=other)
    with pytest.raises(probe.errors.ExplainError, match="no explained tokens: none"):
        causal.knockout(llava, np.ones((2, 2)), tokens=dataclasses.replace(everything, indices=(), reason="none"))
    with pytest.raises(probe.errors.ExplainError, match=r"\(row, col\)"):
        causal.knockout(llava, np.full((2, 2), np.nan), tokens=everything)
    with pytest.raises(probe.errors.ExplainError, match="kind is"):
        causal.agreement(llava, np.ones((2, 2)), tokens=everything, kind="ablation")


def test_models_whose_tokens_or_attention_are_out_of_reach_are_refused(tmp_path, heat):
    lost = record("llava_next", tmp_path / "lost", boxes=False)
    path, selection = lost.path, probe.select_tokens(lost, rule="joint")
    lost.path = SimpleNamespace(
        inputs=path.inputs, pixel_keys=path.pixel_keys, image_sizes=path.image_sizes, n_images=1
    )
    with pytest.raises(probe.errors.ExplainError, match=r"is not known \(there is no processor to trace"):
        causal.knockout(lost, heat, tokens=selection)
    crossed = record("mllama", tmp_path / "crossed")
    for check in (causal.knockout, causal.patch):
        with pytest.raises(probe.errors.ExplainError, match="no image tokens"):
            check(crossed, heat, tokens=probe.select_tokens(crossed, rule="joint"))
    with pytest.raises(
        probe.errors.ExplainError, match=r"cannot be cut in every layer .*cross-attention.*layers=\[0, 2\]"
    ):
        attention_layers(crossed.model, "all")
    assert [layer.index for layer, _ in attention_layers(crossed.model, [0, 2])] == [0, 2]


def test_attention_without_weights_is_refused(tmp_path, heat):
    replay = record("llava", tmp_path)
    decoder = replay.model.model.language_model
    selection = probe.select_tokens(replay, rule="joint")
    decoder.config._attn_implementation = "flex_attention"
    with pytest.raises(probe.errors.ExplainError, match='attn_implementation="sdpa" or "eager"'):
        causal.knockout(replay, heat, tokens=selection)


def test_donors_of_another_size_and_missing_processors_are_refused(llava, heat, everything, tmp_path):
    with pytest.raises(probe.errors.ImageError, match="100x60"):
        causal.patch(llava, heat, donor=tiny_models.picture(100, 60), tokens=everything)
    bare = probe.replay(llava.trace, llava.model)
    for check in (causal.knockout, causal.patch):
        with pytest.raises(probe.errors.ExplainError, match="processor"):
            check(bare, np.ones((4, 4)), tokens=everything)


def test_masks_that_cannot_be_cut_are_refused():
    cut = AttentionCut(np.array([3]), np.array([0]), 4)
    hidden = torch.zeros(1, 4, 8)
    module = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"), is_causal=True)
    with pytest.raises(probe.errors.ExplainError, match="edits its sequence"):
        cut.mask(module, None, torch.zeros(1, 5, 8), {})
    with pytest.raises(probe.errors.ExplainError, match=r"shape \(1, 4\)"):
        cut.mask(module, torch.ones(1, 4), hidden, {})
    with pytest.raises(probe.errors.ExplainError, match="boolean or additive"):
        cut.mask(module, torch.ones(1, 1, 4, 4, dtype=torch.long), hidden, {})


def test_masks_that_are_built():
    """sdpa: boolean, causal where the module is; eager, which hides nothing by itself: additive."""
    cut = AttentionCut(np.array([3]), np.array([0, 1]), 4)
    hidden = torch.zeros(2, 4, 8, dtype=torch.float16)

    def built(implementation, causal_module, **kwargs):
        config = SimpleNamespace(_attn_implementation=implementation)
        return cut.mask(SimpleNamespace(config=config, is_causal=causal_module), None, hidden, kwargs)[0, 0]

    last = torch.tensor([False, False, True, True])
    lower = torch.ones(4, 4, dtype=torch.bool).tril()
    for mask, above in ((built("sdpa", True), lower), (built("sdpa", True, is_causal=False), None)):
        assert mask.dtype == torch.bool
        assert torch.equal(mask[3], last)
        assert torch.equal(mask[:3], (torch.ones(4, 4, dtype=torch.bool) if above is None else above)[:3])
    additive = built("eager", True)
    assert additive.dtype == torch.float16
    assert additive[3].tolist() == [torch.finfo(torch.float16).min] * 2 + [0, 0]
    assert not additive[:3].any()


@pytest.mark.quick
def test_without_nnsight_the_way_out_is_named(llava, heat, everything, monkeypatch):
    monkeypatch.setitem(sys.modules, "nnsight", None)
    for call in (
        lambda: causal.knockout(llava, heat, tokens=everything, backend="nnsight"),
        lambda: causal.points(llava, ["lm_head"]),
    ):
        with pytest.raises(probe.errors.ExplainError, match=r"pip install 'lvlm-probe\[causal\]'"):
            call()
    assert causal.knockout(llava, heat, tokens=everything, sweep=0).drop != 0  # hooks do not need it
