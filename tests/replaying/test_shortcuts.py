"""Passes that leave out what the wanted tokens do not depend on give what plain passes give, or are not taken."""

from __future__ import annotations

import copy
import inspect
import types

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image

import lvlm_probe as probe
from lvlm_probe.replaying import shortcuts
from lvlm_probe.replaying.teacher_forcing import TeacherForcing

BEFORE = "USER Describe this picture to the ASSISTANT in two words there are red blue green yellow left right"


def picture(seed: int = 0) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((90, 60), Image.Resampling.BICUBIC)


def record(name, directory, *, before=BEFORE, tokens=5, question="What is this?", model=None):
    """An answer to a prompt that says something before it shows the picture, as LLaVA's and Qwen's do."""
    built, processor = tiny_models.build(name)
    model = model if model is not None else built
    said = [{"type": "text", "text": before}] if before else []
    asked = {"type": "text", "text": question}
    chat = [{"role": "user", "content": [*said, {"type": "image", "image": picture()}, asked]}]
    with probe.attach(model, processor) as p, p.record(directory) as recording:
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return recording.traces[0], model, processor


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return probe.replay(*record("llava", tmp_path_factory.mktemp("llava")))


@pytest.fixture
def fed(llava, monkeypatch):
    """What each pass was fed: batch and positions of ``input_ids``, and columns of logits."""
    seen: list[tuple[int, int]] = []

    def listen(_module, _args, kwargs):
        seen.append(tuple(kwargs["input_ids"].shape))

    handle = llava.model.register_forward_pre_hook(listen, with_kwargs=True)
    yield seen
    handle.remove()


def masks(count=3, seed=0):
    return torch.rand(count, 5, 6, generator=torch.Generator().manual_seed(seed))


EXPECTED = {
    # M-RoPE numbers positions by pictures it has been fed; what a plain pass numbered is handed over.
    "qwen2_vl": "positions handed over",
    "qwen2_5_vl": "positions handed over",
    # The beginning attends to the picture behind it: no cache of it can be right.
    "paligemma": "no cache",
    "gemma3": "no cache",
    # The picture enters through cross-attention, from the first token of the prompt on.
    "mllama": "no cache",
}


@pytest.mark.parametrize("name", [name for name in tiny_models.NAMES if name != "qwen3_vl"])
def test_all_cuts_together_equal_the_plain_pass(name, tmp_path):
    """Log-probabilities to 1e-5 and gradients to 1e-4, on batches, for two tokens of five."""
    replay = probe.replay(*record(name, tmp_path))
    steps, several = [1, 3], masks()
    with torch.no_grad():
        plain = replay.log_probs(several)
        cut = replay.log_probs(several, steps=steps)
    assert torch.allclose(cut[:, steps], plain[:, steps], atol=1e-5, rtol=0)
    assert cut[:, [0, 2, 4]].isnan().all()  # nobody can take for a result what was not computed
    score = lambda log_probs: log_probs[:, steps].sum(1)  # noqa: E731
    _, gradient = replay.score_and_grad(several, score, noise=0.1)
    _, mine = replay.score_and_grad(several, score, noise=0.1, steps=steps)
    assert float((mine - gradient).norm() / gradient.norm()) < 1e-4
    taken = str(replay.shortcuts)
    assert "later tokens cut" in taken and "mlp at wanted positions" in taken
    if EXPECTED.get(name) == "no cache":
        assert "cache" not in taken
    else:
        assert "beginning read from a cache" in taken
        assert ("positions handed over" in taken) == (name in EXPECTED)


def named_anew(model):
    """The model as transformers 5.24 has it: ``forward`` takes and returns ``cache``, and no ``past_key_values``."""
    before, caches = type(model), []
    signature = inspect.signature(before.forward)
    old = "past_key_values" if "past_key_values" in signature.parameters else "cache"

    class Model(before):
        def forward(self, *args, cache=None, **kwargs):
            made = before.forward(self, *args, **{old: cache}, **kwargs)
            caches.append(cache)
            return types.SimpleNamespace(logits=made.logits, cache=getattr(made, old))

    parts = (part.replace(name="cache") if part.name == old else part for part in signature.parameters.values())
    Model.forward.__signature__ = signature.replace(parameters=list(parts))
    Model.__name__, Model.__qualname__, Model.__module__ = before.__name__, before.__qualname__, before.__module__
    model.__class__ = Model
    return model, caches


def test_a_cache_by_its_newer_name(tmp_path):
    trace, model, processor = record("llava", tmp_path)
    plain = probe.replay(trace, model, processor).log_probs(masks()).detach()
    model, caches = named_anew(model)
    replay = probe.replay(trace, model, processor)
    with torch.no_grad():
        cut = replay.log_probs(masks(), steps=[1, 3])
    assert torch.allclose(cut[:, [1, 3]], plain[:, [1, 3]], atol=1e-5, rtol=0)
    assert "beginning read from a cache" in str(replay.shortcuts)
    assert caches[-1].get_seq_length() > replay.shortcuts.start  # the last pass went on from the beginning's


@pytest.mark.quick
def test_only_what_depends_on_the_mask_is_fed(llava, fed):
    start, prompt = llava.shortcuts.start, llava.prompt_length
    assert llava.input_ids[start] == llava.anatomy.image_token_id
    assert llava.anatomy.image_token_id not in llava.input_ids[:start]
    with torch.no_grad():
        llava.log_probs(masks(), steps=[2])
        fed.clear()
        llava.log_probs(masks(), steps=[2, 0])
    # The beginning once, alone; then the rest up to the token before step 2.
    assert fed == [(1, start), (3, prompt + 2 - start)]
    fed.clear()
    with torch.no_grad():
        llava.log_probs(masks())
    assert fed == [(3, prompt + len(llava.token_ids) - 1)]


def test_an_explanation_and_its_curves_compute_the_beginning_once_each(llava, monkeypatch):
    made: list[int] = []
    original = TeacherForcing.past

    def counted(self, length, **options):
        made.append(length)
        return original(self, length, **options)

    span = probe.select_tokens(llava, span=(1, 3))
    probe.explain(llava, method="igos++", tokens=span, strengthen=False)
    monkeypatch.setattr(TeacherForcing, "past", counted)
    heat = probe.explain(llava, method="igos++", tokens=span, strengthen=False)
    assert len(made) == 1
    probe.evaluate(heat, llava, steps=4)
    assert len(made) == 2
    with torch.no_grad():  # the model may be another one by now
        llava.log_probs(masks(), steps=[1])
        llava.log_probs(masks(), steps=[1])
    assert len(made) == 4


def test_differentiable_beyond_a_micro_batch(llava):
    several = masks(5)
    gradients = []
    for options in ({}, {"steps": [3, 1]}, {"steps": [1, 3], "micro_batch": 2}):
        leaf = several.clone().requires_grad_(True)
        llava.log_probs(leaf, **options)[:, [1, 3]].exp().sum().backward()
        gradients.append(leaf.grad)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)
    assert torch.allclose(gradients[0], gradients[2], atol=1e-6)


def test_what_measuring_takes_is_counted(llava):
    model = copy.deepcopy(llava.model)
    counted = []
    for _ in range(2):
        replay = probe.replay(llava.trace, model, tiny_models.build_processor("llava"))
        replay.require_gradients()
        before = replay.counted()
        before.score_and_grad(masks(3), lambda log_probs: log_probs[:, 1], steps=[1], micro_batch=3)
        counted.append((before.passes.forward, before.passes.backward))
    # Plainly and shortened, there and back, and the cache for two at once; on a further answer only there, for one.
    assert counted == [(3 + 2 + 2, 3 + 2), (3 + 2, 3)]


def test_weights_that_change_are_seen(llava):
    """Nothing that was computed with other weights is used again."""
    model = copy.deepcopy(llava.model)
    replay = probe.replay(llava.trace, model, tiny_models.build_processor("llava"))
    with torch.no_grad():
        replay.log_probs(masks(), steps=[2])
        for weight in model.parameters():
            weight.data.mul_(1.1)
        assert torch.allclose(replay.log_probs(masks(), steps=[2])[:, 2], replay.log_probs(masks())[:, 2], atol=1e-5)


def test_a_model_whose_beginning_sees_everything_keeps_its_plain_pass(llava):
    """A user's own hook that lets the beginning read the picture: found out, though the class is LLaVA's."""
    model = copy.deepcopy(llava.model)
    start = llava.shortcuts.start

    def mix(_module, args, kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        leaky = states + 0.1 * states[:, start:].mean(dim=1, keepdim=True) if states.shape[1] > start else states
        return (leaky, *args[1:]), kwargs

    model.model.language_model.layers[1].register_forward_pre_hook(mix, with_kwargs=True)
    replay = probe.replay(llava.trace, model, tiny_models.build_processor("llava"), strict=False)
    with torch.no_grad():
        assert torch.allclose(replay.log_probs(masks(), steps=[2])[:, 2], replay.log_probs(masks())[:, 2], atol=1e-5)
    assert str(replay.shortcuts) == "plain passes"


def test_it_is_measured_where_there_is_something_to_cut(llava):
    """The first call wants the last token, for which nothing can be cut. That says nothing about the next call."""
    model = copy.deepcopy(llava.model)

    def mix(_module, args, kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        return (states + 0.1 * states.mean(dim=1, keepdim=True), *args[1:]), kwargs

    model.model.language_model.layers[1].register_forward_pre_hook(mix, with_kwargs=True)
    replay = probe.replay(llava.trace, model, tiny_models.build_processor("llava"), strict=False)
    with torch.no_grad():
        replay.log_probs(masks(), steps=range(5))
        assert torch.allclose(replay.log_probs(masks(), steps=[1])[:, 1], replay.log_probs(masks())[:, 1], atol=1e-5)
    assert str(replay.shortcuts) == "plain passes"


def test_an_answer_of_one_token(tmp_path):
    replay = probe.replay(*record("llava", tmp_path, tokens=1))
    with torch.no_grad():
        assert torch.allclose(replay.log_probs(masks(), steps=[0]), replay.log_probs(masks()), atol=1e-5)
    assert "beginning read from a cache" in str(replay.shortcuts)


def test_hooks_hung_later_are_found_out_too(llava):
    model = copy.deepcopy(llava.model)
    replay = probe.replay(llava.trace, model, tiny_models.build_processor("llava"))
    with torch.no_grad():
        replay.log_probs(masks(), steps=[2])
        assert "cache" in str(replay.shortcuts)
        # Cuts what the first position says; it is not among those that are fed once the beginning is cached.
        handle = model.model.language_model.layers[1].register_forward_hook(
            lambda _m, _a, output: torch.cat([output[:, :1] * 0, output[:, 1:]], dim=1)
        )
        plain = replay.log_probs(masks())
        assert torch.allclose(replay.log_probs(masks(), steps=[2])[:, 2], plain[:, 2], atol=1e-5)
        handle.remove()


def test_a_prompt_that_passes_a_limit_is_measured_anew(llava, tmp_path, monkeypatch):
    """What is known of a model is tried once on every answer; here the second answer's cache is a wrong one."""
    trace, model, processor = record("llava", tmp_path, question="Where is the blue circle?", model=llava.model)
    with torch.no_grad():
        llava.log_probs(masks(1), steps=[1])
    original = TeacherForcing.past

    def wrong(self, length, **options):
        cache = original(self, length, **options)
        for layer in cache.layers:
            layer.keys = layer.keys * 1.5
        return cache

    monkeypatch.setattr(TeacherForcing, "past", wrong)
    replay = probe.replay(trace, model, processor)
    with torch.no_grad():
        assert torch.allclose(replay.log_probs(masks(), steps=[1])[:, 1], replay.log_probs(masks())[:, 1], atol=1e-5)
    assert "cache" not in str(replay.shortcuts) and "later tokens cut" in str(replay.shortcuts)


def test_whoever_looks_inside_sees_the_whole_sequence(llava, fed):
    with llava.capture(modules=["model.language_model.layers.*"]) as seen:
        llava.score_and_grad(masks(1), lambda log_probs: log_probs[:, 1], steps=[1])
    assert fed[-1] == (1, llava.length)
    assert {output.shape[1] for output in seen.outputs.values()} == {llava.length}


def test_checkpointed_layers_cut_the_answer_only(tmp_path):
    trace, model, processor = record("llava", tmp_path)
    saving = probe.replay(trace, model, processor, gradient_checkpointing=True)
    plain = probe.replay(trace, model, processor)
    score = lambda log_probs: log_probs[:, [0, 2]].sum(1)  # noqa: E731
    _, expected = plain.score_and_grad(masks(), score)
    _, mine = saving.score_and_grad(masks(), score, steps=[0, 2])
    assert torch.allclose(mine, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_and_log_softmax_are_in_single_precision_on_half_precision_models(llava, dtype):
    """log P of the model's own logits, normalised in float32; the gradient arrives at a float32 mask, and points where
    that of the float32 model does."""
    model = copy.deepcopy(llava.model).to(dtype)
    replay = probe.replay(llava.trace, model, tiny_models.build_processor("llava"), strict=False)
    heard = []
    handle = model.lm_head.register_forward_hook(lambda _m, _a, output: heard.append(output.detach()))
    with torch.no_grad():
        result = replay.log_probs(masks(2), micro_batch=2)
    handle.remove()
    (logits,) = heard
    assert logits.dtype == dtype and result.dtype == torch.float32
    rows = logits[:, -len(replay.token_ids) :].double()
    expected = rows.log_softmax(-1).gather(-1, replay.token_ids[None, :, None].expand(2, -1, 1))[..., 0]
    assert float((result - expected).abs().max()) < 1e-5  # of half-precision arithmetic there would be 1e-2
    score = lambda log_probs: log_probs[:, [1, 3]].sum(1)  # noqa: E731
    scores, gradient = replay.score_and_grad(masks(2), score, steps=[1, 3])
    assert scores.dtype == gradient.dtype == torch.float32
    _, single = llava.score_and_grad(masks(2), score)
    assert float(torch.nn.functional.cosine_similarity(gradient.flatten(), single.flatten(), dim=0)) > 0.9


def test_steps_that_are_not_there_are_refused(llava):
    for steps in ([5], [-1], []):
        with pytest.raises(probe.errors.ReplayError, match="steps are tokens 0 to 4"):
            llava.log_probs(masks(1), steps=steps)


def test_memory_that_runs_out_in_the_check_leaves_plain_passes(llava, monkeypatch):
    model = copy.deepcopy(llava.model)
    replay = probe.replay(llava.trace, model, tiny_models.build_processor("llava"))

    def exhausted(*_args, **_options):
        raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patched:
        patched.setattr(shortcuts, "_differentiated", exhausted)
        with torch.no_grad():
            assert replay.log_probs(masks(1), steps=[1])[:, 1].isfinite().all()
    assert str(replay.shortcuts) == "plain passes"
    with torch.no_grad():
        replay.log_probs(masks(1), steps=[1])
    assert "cache" in str(replay.shortcuts)  # tried again once there is memory


def test_memory_that_runs_out_in_a_call_ends_its_shortcuts(llava):
    """Layers that run again in backward can neither read a cache of the beginning nor be narrowed, and the call had
    begun with both."""
    mask, steps, full = masks(1), [1, 3], []

    def score(log_probs):
        return log_probs[:, steps].sum(dim=1)

    def out_of_memory(_module, _args):
        if full and torch.is_grad_enabled():
            raise full.pop()

    wanted = llava.score_and_grad(mask, score)
    view = llava.with_settings()
    handle = llava.model.get_submodule(llava.anatomy.decoder).layers[1].register_forward_pre_hook(out_of_memory)
    try:
        view.score_and_grad(mask, score, steps=steps)
        assert "cache" in str(view.shortcuts) and "at wanted positions" in str(view.shortcuts)
        full.append(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"))
        found = view.score_and_grad(mask, score, steps=steps)
    finally:
        handle.remove()
    assert not full and view.limits.recompute
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
