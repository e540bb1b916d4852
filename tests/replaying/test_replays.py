"""Replay: the one differentiable function, against recordings, finite differences and itself."""

from __future__ import annotations

import threading
import warnings
import weakref

import inside
import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image

import lvlm_probe as probe
from lvlm_probe import replaying as player
from lvlm_probe.explainers import registry
from lvlm_probe.images import BLUR_LADDER
from lvlm_probe.replaying import replays
from lvlm_probe.replaying.isolation import checkpointed
from lvlm_probe.replaying.teacher_forcing import TeacherForcing


def picture(seed: int = 0, size: tuple[int, int] = (90, 60)) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def record(name, directory, *, images=1, tokens=5, record=None):
    model, processor = tiny_models.build(name)
    with probe.attach(model, processor) as p, p.record(directory, **(record or {})) as recording:
        inputs = tiny_models.inputs(name, model, processor, [picture(k) for k in range(images)], "What is this?")
        model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return recording.traces[0], model, processor


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    trace, model, processor = record("llava", tmp_path_factory.mktemp("llava"))
    return probe.replay(trace, model, processor)


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_replay_says_what_was_recorded(name, tmp_path):
    trace, model, processor = record(name, tmp_path)
    replay = probe.replay(trace, model, processor)
    np.testing.assert_allclose(replay.original_log_probs, trace.log_probs, atol=1e-4)
    np.testing.assert_allclose(replay.llr, trace.llr, atol=1e-4)
    assert torch.equal(replay.log_probs(torch.ones(1, 4, 4))[0], replay.original_log_probs)
    assert torch.equal(replay.log_probs(torch.zeros(1, 4, 4))[0], replay.baseline_log_probs)


@pytest.mark.parametrize("name", ["llava", "gemma3", "paligemma"])
def test_without_a_processor_a_replay_says_what_was_recorded(name, tmp_path):
    """Inputs with an entry per token of the prompt are the text's there too, and go on over the answer."""
    model, processor = tiny_models.build(name)
    inputs = tiny_models.inputs(name, model, processor, [picture()], "What is this?")
    with probe.attach(model) as p, p.record(tmp_path) as recording:
        model.generate(**inputs, max_new_tokens=5, do_sample=False)
    replay = probe.replay(recording.traces[0], model)
    seen = {}
    hook = model.register_forward_pre_hook(lambda _module, _args, given: seen.update(given), with_kwargs=True)
    np.testing.assert_allclose(replay.original_log_probs, recording.traces[0].log_probs, atol=1e-4)
    hook.remove()
    per_token = {key for key, value in inputs.items() if value.shape == inputs["input_ids"].shape} - {"labels"}
    assert {tuple(seen[key].shape) for key in per_token} == {(1, replay.length)}


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_5_vl", "gemma3", "mllama"])
def test_gradient_to_the_mask_equals_central_differences(name, tmp_path):
    """On float64 models, in a random direction."""
    trace, model, processor = record(name, tmp_path)
    replay = probe.replay(trace, model.double(), processor, strict=False)
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(1, 5, 6, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    direction = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    mask.requires_grad_(True)
    value = replay.log_probs(mask).sum()
    (gradient,) = torch.autograd.grad(value, mask)
    step = 1e-2  # norms and rotary embeddings compute in float32 whatever the model is in, which drowns smaller steps
    with torch.no_grad():
        above = replay.log_probs(mask + step * direction).sum()
        below = replay.log_probs(mask - step * direction).sum()
    expected = float((above - below) / (2 * step))
    assert abs(expected) > 1e-4
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=0.01)


def test_log_probs_are_those_of_a_plain_forward_pass(llava):
    """Composite by hand, the processor, the model's own forward, log-softmax of the whole sequence."""
    replay = llava
    image, baseline = replay.image(), replay.baseline_image()
    mask = torch.ones(1, 60, 90)
    mask[:, :, 45:] = 0
    by_hand = image.copy()
    by_hand.paste(baseline.crop((45, 0, 90, 60)), (45, 0))
    processor = tiny_models.build_processor("llava")
    pixels = processor.image_processor(images=[by_hand], return_tensors="pt")["pixel_values"]
    ids = torch.cat([torch.tensor(replay.trace.input_ids), replay.token_ids])[None]
    with torch.no_grad():
        logits = replay.model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits[0]
    prompt = len(replay.trace.input_ids)
    expected = logits.log_softmax(-1)[torch.arange(prompt - 1, ids.shape[1] - 1), replay.token_ids]
    with torch.no_grad():
        assert torch.allclose(replay.log_probs(mask, mode="exact")[0], expected, atol=1e-5)
        assert torch.allclose(replay.log_probs(mask)[0], expected, atol=0.05)


def test_micro_batches_change_nothing(llava):
    masks = torch.rand(7, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = llava.log_probs(masks, micro_batch=7)
        parts = llava.log_probs(masks, micro_batch=2)
    assert torch.allclose(whole, parts, atol=1e-5)
    gradients = []
    for size in (7, 3):
        leaf = masks.clone().requires_grad_(True)
        llava.log_probs(leaf, micro_batch=size, noise=0.1).exp().sum().backward()
        gradients.append(leaf.grad)
    assert torch.allclose(*gradients, atol=1e-5)


def test_score_and_grad_is_autograd_of_log_probs(llava):
    masks = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(0))

    def score(log_probs):
        return log_probs[:, 1:3].sum(1)

    leaf = masks.clone().requires_grad_(True)
    expected = score(llava.log_probs(leaf))
    expected.sum().backward()
    scores, gradient = llava.score_and_grad(masks, score)
    assert torch.allclose(scores, expected.detach(), atol=1e-5)
    assert torch.allclose(gradient, leaf.grad, atol=1e-5)
    with pytest.raises(probe.errors.ReplayError, match="one number per mask"):
        llava.score_and_grad(masks, lambda log_probs: log_probs.sum())


def test_noise_is_seeded_per_call_and_leaves_the_global_state(llava):
    masks = torch.ones(2, 4, 4)
    state = torch.random.get_rng_state()
    with torch.no_grad():
        first, again, other = (
            llava.log_probs(masks, noise=0.3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
        )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_only_answer_positions_go_through_the_head(llava):
    shapes = []
    handle = llava.model.get_output_embeddings().register_forward_hook(lambda m, a, o: shapes.append(tuple(o.shape)))
    try:
        with torch.no_grad():
            llava.log_probs(torch.rand(3, 4, 4), micro_batch=3)
    finally:
        handle.remove()
    assert [shape[:2] for shape in shapes] == [(3, len(llava.token_ids))]


def test_head_is_trimmed_where_forward_cannot_be_asked(llava):
    """Families without logits_to_keep give the same numbers, and the head sees answer positions only."""
    forcing = llava._forcing
    inputs = {name: value for name, value in llava.path.inputs.items() if name in llava._fed}
    shapes = []
    handle = llava.model.get_output_embeddings().register_forward_hook(lambda m, a, o: shapes.append(tuple(o.shape)))
    try:
        forcing._keeps_logits = False
        with torch.no_grad():
            trimmed = forcing.log_probs(inputs, batch=1)
    finally:
        forcing._keeps_logits = True
        handle.remove()
    assert torch.allclose(trimmed[0], llava.original_log_probs, atol=1e-6)
    assert shapes[0][1] == len(llava.token_ids)
    assert not llava.model.get_output_embeddings()._forward_pre_hooks


def test_weights_get_no_gradients_and_flags_come_back(llava):
    model = llava.model
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.train()
    try:
        mask = torch.full((1, 4, 4), 0.5, requires_grad=True)
        result = llava.log_probs(mask)
        assert all(parameter.requires_grad for parameter in model.parameters()) and model.training
        result.sum().backward()
        llava.score_and_grad(mask, lambda log_probs: log_probs.sum(1))
    finally:
        model.eval()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.allclose(result[0], llava.log_probs(mask.detach())[0], atol=1e-5)  # dropout stayed off


def kept_for_backward(replay):
    """Bytes that autograd keeps for one backward pass, weights included, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # what saves its own output would keep itself alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        replay.log_probs(torch.full((1, 4, 4), 0.5, requires_grad=True))
    weights = {weight.untyped_storage().data_ptr() for weight in replay.model.parameters()}
    return sum(size for place, size in storages.items() if place not in weights)


@pytest.mark.parametrize("trainable", [False, True])
def test_checkpointing_fires_in_eval_mode_and_gives_the_same_gradient(tmp_path, trainable):
    trace, model, processor = record("llava", tmp_path)
    for parameter in model.parameters():
        parameter.requires_grad_(trainable)
    plain = probe.replay(trace, model, processor)
    saving = probe.replay(trace, model, processor, gradient_checkpointing=True)
    calls = {"forward": 0}
    layers = model.model.language_model.layers
    handle = layers[0].mlp.register_forward_pre_hook(lambda *args: calls.__setitem__("forward", calls["forward"] + 1))
    gradients = []
    for replay in (plain, saving):
        calls["forward"] = 0
        leaf = torch.full((1, 4, 4), 0.5, requires_grad=True)
        replay.log_probs(leaf).sum().backward()
        gradients.append((leaf.grad, calls["forward"]))
    handle.remove()
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert (gradients[0][1], gradients[1][1]) == (1, 2)
    assert not model.training and not any(getattr(layer, "gradient_checkpointing", False) for layer in layers)
    few, many = (kept_for_backward(replay) for replay in (saving, plain))
    assert few < 0.6 * many


def test_checkpointing_leaves_nothing_and_is_refused_where_no_layer_supports_it(llava):
    before = [vars(module).copy() for module in llava.model.modules()]
    with checkpointed(llava.model) as model:
        again = [name for name, module in model.named_modules() if "forward" in vars(module)]
        assert len(again) == 5  # two layers of the tower, three of the language model
    assert before == [vars(module) for module in llava.model.modules()]
    with pytest.raises(probe.errors.ReplayError, match="Linear; replay without"), checkpointed(torch.nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "internvl"])
def test_an_answer_with_the_image_token_in_it_is_refused_and_at_its_end_replayed(name, tmp_path):
    model, processor = tiny_models.build(name)
    with probe.attach(model, processor) as p:
        token, start = p.anatomy.image_token_id, []

        def force(ids, scores):
            start.append(ids.shape[1])
            return scores + 100 * (torch.arange(scores.shape[1]) == token) * (ids.shape[1] - start[0] in (1, 3))

        with p.record(tmp_path, llr=False, boxes=False) as recording:
            inputs = tiny_models.inputs(name, model, processor, [picture()], "What is this?")
            kinds = {"max_new_tokens": 2, "do_sample": False, "logits_processor": [force]}
            model.generate(**inputs, **kinds)
            start.clear()
            model.generate(**inputs, **{**kinds, "max_new_tokens": 4, "min_new_tokens": 4})
    last, within = recording.traces
    assert last.token_ids[-1] == token and within.token_ids[1] == token
    assert len(probe.replay(last, model, processor).original_log_probs) == 2
    with pytest.raises(probe.errors.ReplayError, match="the answer holds the image token itself"):
        _ = probe.replay(within, model, processor).original_log_probs


def test_out_of_memory_halves_and_goes_on(llava, monkeypatch):
    masks = torch.rand(6, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = llava.log_probs(masks)
    original = TeacherForcing.log_probs
    tried = []

    def narrow(self, pixel_inputs, *, batch, **settings):
        tried.append(batch)
        if batch > limit:
            raise torch.OutOfMemoryError("injected")
        return original(self, pixel_inputs, batch=batch, **settings)

    monkeypatch.setattr(TeacherForcing, "log_probs", narrow)
    limit = 3
    replay = probe.replay(llava.trace, llava.model, tiny_models.build_processor("llava"), micro_batch=6)
    with torch.no_grad():
        assert torch.allclose(replay.log_probs(masks), expected, atol=1e-5)
    assert tried == [6, 3, 3]
    limit = 0
    with pytest.raises(probe.errors.OutOfMemory, match="even with gradient checkpointing"):
        replay.log_probs(masks[:1])


@pytest.mark.parametrize("what", ["original_log_probs", "baseline_log_probs"])
def test_a_whole_picture_that_does_not_fit_says_what_would(llava, monkeypatch, what):
    def nothing_fits(self, pixel_inputs, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore of torch's advice")

    replay = probe.replay(llava.trace, llava.model, tiny_models.build_processor("llava"))
    with monkeypatch.context() as patch:
        patch.setattr(TeacherForcing, "log_probs", nothing_fits)
        with pytest.raises(
            probe.errors.OutOfMemory, match=r"\(CUDA out of memory. Tried to allocate 2 GiB.\); load the model"
        ):
            getattr(replay, what)
        patch.setattr(TeacherForcing, "log_probs", lambda *_, **__: torch.zeros(()) @ torch.zeros(()))
        with pytest.raises(RuntimeError) as other:
            getattr(replay, what)
        assert not isinstance(other.value, probe.ProbeError), "an error of another kind stays what it is"
    assert torch.equal(getattr(replay, what), getattr(llava, what)), "and afterwards the replay works"


def test_an_out_of_memory_error_holds_nothing_of_the_pass_that_failed(llava, monkeypatch):
    alive = []

    def nothing_fits(self, pixel_inputs, **settings):
        activation = torch.zeros(3)
        alive.append(weakref.ref(activation))
        raise torch.OutOfMemoryError("injected")

    replay = probe.replay(llava.trace, llava.model, tiny_models.build_processor("llava"), gradient_checkpointing=True)
    monkeypatch.setattr(TeacherForcing, "log_probs", nothing_fits)
    for run in (lambda: replay.original_log_probs, lambda: replay.log_probs(torch.ones(1, 4, 4))):
        with pytest.raises(probe.errors.OutOfMemory) as error:
            run()
        assert isinstance(error.value.__cause__, torch.OutOfMemoryError)
    assert len(alive) == 2 and not any(kept() is not None for kept in alive)


def test_nor_of_the_method_that_failed(llava, monkeypatch):
    alive = []

    def greedy(problem):
        state = torch.zeros(3)
        alive.append(weakref.ref(state))
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    registry.register("test greedy")(greedy)
    with pytest.raises(probe.errors.OutOfMemory, match=r"test greedy on .* ran out of memory") as error:
        probe.explain(llava, method="test greedy", tokens=(0, 2), strengthen=False)
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)
    assert alive and alive[0]() is None


def test_masks_that_do_not_fit_say_what_would(llava):
    for mask, words in (
        (torch.ones(4, 4, dtype=torch.long), "floating-point"),
        (np.ones((4, 4)), "floating-point"),
        (torch.full((4, 4), 1.5), r"\[0, 1\]"),
        (torch.full((4, 4), float("nan")), r"\[0, 1\]"),
        (torch.ones(2, 3, 4, 4), r"\(batch, row, col\)"),
        (torch.ones(0, 4, 4), "empty"),
    ):
        with pytest.raises(probe.errors.MaskError, match=words):
            llava.log_probs(mask)
    with pytest.raises(probe.errors.MaskError, match="numbered from 0"):
        llava.log_probs(torch.ones(1, 4, 4), image=1)


@pytest.mark.quick
def test_several_images_are_masked_apart(tmp_path):
    trace, model, processor = record("llava", tmp_path, images=2)
    replay = probe.replay(trace, model, processor)
    both = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    only = both.clone()
    only[:, 0] = 1
    with torch.no_grad():
        assert torch.allclose(replay.log_probs(only), replay.log_probs(both[:, 1], image=1), atol=1e-5)
        assert not torch.allclose(replay.log_probs(both), replay.log_probs(only))
    with pytest.raises(probe.errors.MaskError, match="image=k"):
        replay.log_probs(torch.ones(3, 4, 4))
    leaf = both.clone().requires_grad_(True)
    replay.log_probs(leaf).sum().backward()
    assert leaf.grad[:, 0].abs().max() > 0 and leaf.grad[:, 1].abs().max() > 0


def test_another_model_is_refused(llava):
    other, processor = tiny_models.build("llava", seed=1)
    with pytest.raises(probe.errors.ModelMismatch, match="fingerprint"):
        probe.replay(llava.trace, other, processor)
    difference = probe.replay(llava.trace, other, processor, strict=False).original_log_probs - llava.original_log_probs
    assert difference.abs().max() > 0.01


def test_other_settings_give_way_to_the_recorded_ones_and_another_processor_is_refused(llava):
    processor = tiny_models.build_processor("llava")
    processor.image_processor.size = {"shortest_edge": 84}
    processor.image_processor.crop_size = {"height": 84, "width": 84}
    replay = probe.replay(llava.trace, llava.model, processor)
    assert torch.equal(replay.original_log_probs, llava.original_log_probs)
    with pytest.raises(probe.errors.ModelMismatch, match="does not make the inputs"):
        probe.replay(llava.trace, llava.model, tiny_models.build_processor("qwen2_vl"))


def resized(image_processor):
    image_processor.size = {"shortest_edge": 84}
    image_processor.crop_size = {"height": 84, "width": 84}


SETTINGS = {
    "another size": resized,
    "another size in place": lambda image_processor: vars(image_processor.crop_size).update(height=84, width=84),
    "another mean": lambda image_processor: setattr(image_processor, "image_mean", [0.1, 0.2, 0.3]),
}


@pytest.mark.parametrize("change", SETTINGS)
def test_settings_that_change_while_a_replay_is_open_are_the_next_ones(llava, change):
    processor, mask = tiny_models.build_processor("llava"), torch.full((1, 4, 4), 0.5)

    def asked(replay):
        return [replay.over("mean").log_probs(mask), replay.log_probs(mask, mode="exact"), replay.seen(0, (5, 5))]

    replay, expected = probe.replay(llava.trace, llava.model, processor), asked(llava)
    SETTINGS[change](processor.image_processor)
    assert all(torch.equal(one, other) for one, other in zip(asked(replay), expected, strict=True))


def test_same_weights_in_bfloat16_are_the_same_model(llava):
    model, processor = tiny_models.build("llava")
    replay = probe.replay(llava.trace, model.to(torch.bfloat16), processor)
    assert torch.allclose(replay.original_log_probs, llava.original_log_probs, atol=0.3)
    assert replay.log_probs(torch.rand(1, 4, 4)).dtype == torch.float32


def test_a_backward_pass_of_another_thread_leaves_what_is_said_of_the_whole_image(llava, monkeypatch):
    """It waits for nobody, so it comes between a pass over the whole image and what is read off that."""
    expected, fresh = llava.likeliest, probe.replay(llava.trace, llava.model, llava.processor)
    mask = torch.zeros(2, 3, 3, requires_grad=True)
    loss = fresh.log_probs(mask, micro_batch=1).sum()
    plain = replays.rounding_of

    def late(*args):
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        return plain(*args)

    monkeypatch.setattr(replays, "rounding_of", late)
    found = fresh.likeliest
    assert mask.grad is not None and torch.equal(fresh.rounding, llava.rounding)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def scaled(factor):
    def change(model):
        with torch.no_grad():
            model.lm_head.weight.mul_(factor)

    return change


CHANGES = {
    "weights in place": scaled(0.5),
    "weights through .data": lambda model: model.lm_head.weight.data.mul_(0.5),
    "other weights": lambda model: setattr(model.lm_head, "weight", torch.nn.Parameter(model.lm_head.weight * 0.5)),
    "a layer that does more": lambda model: model.lm_head.register_forward_hook(lambda _m, _a, logits: logits * 0.5),
    "another precision": lambda model: model.to(torch.bfloat16),
    "another attention": lambda model: model.set_attn_implementation("eager"),
}


def asked(replay):
    """What is kept of an answer, and what is made of it."""
    heat = probe.explain(replay, method="occlusion", size=3, tokens=(0, 2))
    score = probe.evaluate(heat, replay, steps=3)
    return repr([heat.values.tolist(), score.to_dict(), replay.llr.tolist(), replay.rounding.tolist()])


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_has_changed_is_asked_anew(llava, change):
    model, processor = tiny_models.build("llava")
    replay = probe.replay(llava.trace, model, processor, strict=False)
    before = asked(replay)
    assert asked(replay) == before
    CHANGES[change](model)
    assert asked(replay) == asked(probe.replay(llava.trace, model, processor, strict=False)) != before


@pytest.mark.parametrize("how", ["weights in place", "weights through .data"])
def test_weights_that_are_no_longer_the_recorded_ones_are_told(llava, how):
    model, processor = tiny_models.build("llava")
    replay = probe.replay(llava.trace, model, processor)
    before = asked(replay)
    CHANGES[how](model)
    with pytest.warns(probe.errors.ProbeWarning, match="has changed since this replay was opened.*fingerprint"):
        changed = asked(replay)
    assert changed == asked(probe.replay(llava.trace, model, processor, strict=False)) != before
    scaled(2)(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", probe.errors.ProbeWarning)
        assert asked(replay) == before


def test_a_model_that_has_gone_elsewhere_is_said(llava, monkeypatch):
    model, processor = tiny_models.build("llava")
    replay = probe.replay(llava.trace, model, processor, strict=False)
    model.lm_head.weight.data = model.lm_head.weight.clone()  # as model.to(device) does
    monkeypatch.setattr(player, "input_device", lambda _model: torch.device("cuda:1"))
    with pytest.raises(probe.errors.ReplayError, match="gone from cpu to cuda:1 since"):
        replay.log_probs(torch.ones(1, 3, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_in_half_precision_cost_the_scores_none(llava, dtype):
    """Their gradient comes in their own precision, and is not rounded to nothing where the score is small."""
    replay = probe.replay(llava.trace, llava.model, llava.processor)
    mask = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)

    def score(log_probs):
        return 1e-4 * log_probs.sum(dim=1)

    found, slopes = replay.score_and_grad(mask, score)
    wanted, exact = replay.score_and_grad(mask.float(), score)
    assert found.dtype == replay.log_probs(mask).dtype == torch.float32 and torch.equal(found, wanted)
    assert slopes.dtype == dtype and torch.allclose(slopes.float(), exact, rtol=0.01, atol=1e-7)
    leaf = mask.clone().requires_grad_(True)
    score(replay.log_probs(leaf)).sum().backward()
    assert leaf.grad.dtype == dtype and torch.allclose(leaf.grad.float(), exact, rtol=0.01, atol=1e-7)


def test_baselines(llava):
    replay = probe.replay(llava.trace, llava.model, tiny_models.build_processor("llava"))
    seen = set()
    for kind in ("blur", "blank", "noise", "mean", Image.new("RGB", (90, 60), (200, 10, 10))):
        view = replay.over(kind)
        seen.add((view.baseline["kind"], round(float(view.baseline_log_probs.sum()), 4)))
    assert len({kind for kind, _ in seen}) == 5 and len({value for _, value in seen}) == 5
    with pytest.raises(probe.errors.ImageError):
        replay.over("sepia")


def test_blur_is_strengthened_until_the_words_are_gone(llava, monkeypatch):
    replay = probe.replay(llava.trace, llava.model, tiny_models.build_processor("llava"))
    probabilities = {0: 0.5, 1: 0.2, 2: 0.01, 3: 0.3, 4: 0.3}
    tried = []

    class Faked(player.Replay):
        @property
        def baseline_log_probs(self):
            strength = 1e9 if self.baseline.get("limit") else self.baseline["strength"]
            rung = sum(strength > other for other in BLUR_LADDER)
            tried.append(rung)
            return torch.full((len(self.token_ids),), probabilities[rung]).log()

    replay.__class__ = Faked
    found = replay.over("blur", strength=BLUR_LADDER[0]).strengthened([0, 1]).baseline
    assert found["verified"] and found["mean_probability"] == pytest.approx(0.01)
    assert max(tried) == 2  # no harder than needed
    probabilities.update({0: 0.5, 1: 0.2, 2: 0.3})
    found = replay.over("blur", strength=BLUR_LADDER[0]).strengthened([0, 1]).baseline
    assert not found["verified"] and found["mean_probability"] == pytest.approx(0.2)  # the best of all, not the last


def test_counts_passes(tmp_path):
    trace, model, processor = record("llava", tmp_path)
    replay = probe.replay(trace, model, processor, micro_batch=np.int64(4))  # numbers of NumPy are numbers
    with torch.no_grad():
        replay.log_probs(torch.rand(6, 4, 4))
    replay.score_and_grad(torch.rand(3, 4, 4), lambda log_probs: log_probs.sum(1))
    # Three pictures forward and one back are the check of gradients, once per replay.
    assert (replay.passes.forward, replay.passes.backward) == (9 + 3, 3 + 1)


def test_captum_explains_a_replay_as_any_function(demo, tmp_path):
    """`log_probs` is an ordinary differentiable function: captum's integrated gradients are complete on it."""
    from captum.attr import IntegratedGradients

    model, processor = demo
    scene = probe.demo.scenes(1, split="tune", seed=5, kinds=["colour"])[0]
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        inputs = processor.apply_chat_template(
            scene.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        model.generate(**inputs)
    replay = probe.replay(recording.traces[0], model, processor)
    steps = list(probe.select_tokens(replay))

    def score(masks):
        return replay.log_probs(masks)[:, steps].sum(1)

    ones, zeros = torch.ones(1, 8, 8), torch.zeros(1, 8, 8)
    found = IntegratedGradients(score).attribute(ones, baselines=zeros, n_steps=200, internal_batch_size=50)
    gain = float(score(ones) - score(zeros))
    assert gain > 1
    assert float(found.sum()) == pytest.approx(gain, rel=0.05)
    inside = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(scene.mask)[None].float(), (8, 8))
    assert float((found * (inside > 0)).sum()) > 0.5 * gain


def test_what_is_no_trace_model_number_of_masks_or_image_is_told() -> None:
    trace, (model, processor) = inside.trace("llava"), tiny_models.build("llava")
    cases = [(str(trace.path), model, "a trace is what"), (trace, processor, "the model is what"), (trace, None, "the")]
    for first, second, said in cases:
        with pytest.raises(probe.errors.ReplayError, match=said):
            probe.replay(first, second, processor)  # type: ignore[arg-type]
    for count in (0, -1, 2.5, "4", True):
        with pytest.raises(probe.errors.ReplayError, match="micro_batch is a number of masks, at least 1"):
            probe.replay(trace, model, processor, micro_batch=count)  # type: ignore[arg-type]
    replay = inside.replay("llava")
    with pytest.raises(probe.errors.ReplayError, match="micro_batch is a number of masks, at least 1"):
        replay.log_probs(torch.ones(3, 2, 2), micro_batch=-1)
    with pytest.raises(probe.errors.ReplayError, match="micro_batch is a number of masks, at least 1"):
        replay.score_and_grad(torch.ones(3, 2, 2), lambda found: found.sum(dim=1), micro_batch=-1)
    for image in ("0", 1.0, None, -1):
        with pytest.raises(probe.errors.ExplainError, match="image is a whole number of at least 0"):
            probe.explain(replay, method="attention", tokens=inside.SPAN, image=image)  # type: ignore[arg-type]
    for method in (None, ["rise"]):
        with pytest.raises(probe.errors.ExplainError, match="a method is named by a text"):
            probe.explain(replay, method=method)  # type: ignore[arg-type]


VERBS = [
    probe.explain, probe.causal.which_parts, probe.causal.modalities, probe.causal.check_steps, probe.video.explain,
    probe.video.which_frames, probe.video.order, probe.select_tokens,
]  # fmt: skip


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: f"{verb.__module__.split('.')[1]}.{verb.__name__}")
@pytest.mark.parametrize("wrong", [None, 3, "runs/a.h5"])
def test_what_is_no_replay_is_told(verb, wrong):
    with pytest.raises(probe.ProbeError, match=rf"replay.*; got a {type(wrong).__name__}"):
        verb(wrong)


def test_what_is_no_replay_or_score_beside_a_heatmap_is_told():
    heat = probe.explain(inside.replay("llava"), method="center", tokens=inside.SPAN)
    for verb in (probe.causal.knockout, probe.causal.patch):
        with pytest.raises(probe.ProbeError, match=r"replay.*; got a NoneType"):
            verb(None, heat)
    with pytest.raises(probe.ProbeError, match=r"replay.*; got a int"):
        probe.evaluate(heat, 3)
    for draw in (lambda: probe.figure([heat], scores=[3]), lambda: heat.overlay(score=3), lambda: heat.figure(score=3)):
        with pytest.raises(probe.ProbeError, match="a score is what evaluate"):
            draw()
    with pytest.raises(probe.ProbeError, match="an image to draw on is a PIL image; got a int"):
        probe.figure([heat], images=[3])


@pytest.mark.parametrize("verb", [probe.open_trace, probe.open_store, probe.Heatmap.read, probe.load])
@pytest.mark.parametrize("wrong", [None, 3, b"runs", []])
def test_what_is_no_path_is_told(verb, wrong):
    with pytest.raises(probe.ProbeError, match="is named by its path; got a "):
        verb(wrong)


@pytest.mark.parametrize("alpha", ["x", None, float("nan"), [1.0], True])
def test_what_is_no_number_of_nats_is_told(alpha):
    with pytest.raises(probe.ProbeError, match="alpha is a number of nats"):
        probe.select_tokens(inside.replay("llava"), alpha=alpha)
