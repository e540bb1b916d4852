"""What goes through nnsight. Collected by ``test_nnsight.py`` in a process of its own: importing nnsight changes a
process for good (``torch.Tensor.backward``, an attribute ``save`` on every object).
"""

from __future__ import annotations

import inspect
import sys
import threading

import numpy as np
import pytest
import tiny_models
import torch

import lvlm_probe as probe
from lvlm_probe import causal
from lvlm_probe.attention.cutting import attention_layers, cut_attention
from lvlm_probe.causal import through_nnsight
from lvlm_probe.causal.through_nnsight import cut_through_nnsight
from lvlm_probe.causal.tokens import placed_tokens, query_positions

IMPORTED_WITH_THE_PACKAGE = "nnsight" in sys.modules  # before anything here has used it
HEAT = np.random.default_rng(0).random((6, 9))
FIRST = "model.language_model.layers.0.self_attn"


def record(name, directory, implementation="sdpa"):
    model, processor = tiny_models.build(name, attn_implementation=implementation)
    with probe.attach(model, processor) as p, p.record(directory) as recording:
        inputs = tiny_models.inputs(name, model, processor, [tiny_models.picture()], "What is this?")
        model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return probe.replay(recording.traces[0], model, processor)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return record("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    return record("llava", tmp_path_factory.mktemp("eager"), "eager")


@pytest.fixture(scope="module")
def scene(demo, tmp_path_factory):
    model, processor = demo
    (scene,) = probe.demo.scenes(1, split="eval")
    with probe.attach(model, processor) as p, p.record(tmp_path_factory.mktemp("demo")) as recording:
        inputs = processor.apply_chat_template(
            scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return scene, probe.replay(recording.traces[0], model, processor)


def contents(model):
    """What stands in the ``__dict__`` of every module, by identity."""
    return [{name: id(value) for name, value in vars(module).items()} for module in model.modules()]


def test_nnsight_is_not_imported_with_the_package():
    assert not IMPORTED_WITH_THE_PACKAGE


# ---------------------------------------------------------------- the same cut


def assert_same_bits(replay, keys):
    queries = query_positions(replay, probe.select_tokens(replay, rule="joint"), "text")
    for wanted in ("all", [1]):
        layers = attention_layers(replay.model, wanted)
        with cut_attention(replay, layers, queries, keys):
            ours = replay.log_probs(None)[0]
        with replay.replica.use() as model, through_nnsight.wrapped(model) as envoys:
            theirs = cut_through_nnsight(replay, envoys, layers, queries, keys)
        assert torch.equal(ours, theirs)
        assert not torch.allclose(ours, replay.log_probs(None)[0], atol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_hooks_and_nnsight_cut_to_the_same_bits(name, implementation, tmp_path):
    replay = record(name, tmp_path, implementation)
    assert_same_bits(replay, placed_tokens(replay, 0).positions[::2])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_on_the_demo_model_too(scene, implementation):
    _, replay = scene
    replay.model.set_attn_implementation(implementation)
    try:
        assert_same_bits(replay, placed_tokens(replay, 0).positions[:40])
    finally:
        replay.model.set_attn_implementation("sdpa")


def test_whole_results_are_equal(scene):
    scene, replay = scene
    region = scene.mask.astype(bool)
    ours, theirs = (causal.knockout(replay, region, draws=2, backend=name) for name in ("hooks", "nnsight"))
    assert ours.effects == theirs.effects
    assert ours.windows == theirs.windows
    assert (ours.original, ours.everything) == (theirs.original, theirs.everything)
    assert theirs.params["backend"] == "nnsight"
    assert ours.drop > 1


def test_the_weights_of_the_cut_are_zero_inside(eager):
    """Seen by nnsight itself, after the softmax, while the hooks cut."""
    keys = placed_tokens(eager, 0).positions[::2]
    queries = query_positions(eager, probe.select_tokens(eager, rule="joint"), "text")
    point = f"{FIRST}::attention_interface::nn.functional.softmax"
    plain = causal.points(eager, [point])[point]
    with cut_attention(eager, attention_layers(eager.model, "all"), queries, keys):
        cut = causal.points(eager, [point])[point]
    pairs = torch.zeros(plain.shape[-2:], dtype=torch.bool)
    pairs[queries[:, None], keys] = True
    assert cut[..., pairs].max() == 0 < plain[..., pairs].min()
    torch.testing.assert_close(cut.sum(-1), torch.ones_like(cut.sum(-1)))


# ---------------------------------------------------------------- points


def test_points_are_what_plain_hooks_see(llava):
    paths = ["model.multi_modal_projector", "model.language_model.layers.1", FIRST]
    seen = {}
    handles = [
        llava.model.get_submodule(path).register_forward_hook(lambda m, a, o, path=path: seen.__setitem__(path, o))
        for path in paths
    ]
    llava.log_probs(None)
    for handle in handles:
        handle.remove()
    values = causal.points(llava, ["model.language_model.layers.1", FIRST, "model.multi_modal_projector"])  # any order
    assert set(values) == set(paths)
    for path in paths:
        ours, theirs = (value[0] if isinstance(value, tuple) else value for value in (values[path], seen[path]))
        assert torch.equal(ours, theirs)
        assert not ours.requires_grad


def test_operations_are_found_by_name_in_patterns(llava):
    """Rotary embeddings turn, and do not stretch: norms of queries before and after are equal."""
    pattern = "model.language_model.layers.*.self_attn"
    values = causal.points(llava, [f"{pattern}::apply_rotary_pos_emb", f"{pattern}.q_proj"])
    assert len(values) == 6
    for layer in range(3):
        path = pattern.replace("*", str(layer))
        queries, keys = values[f"{path}::apply_rotary_pos_emb"]
        before = values[f"{path}.q_proj"].unflatten(-1, (queries.shape[1], -1)).transpose(1, 2)
        assert keys.shape[2] == queries.shape[2] == llava.prompt_length + len(llava.tokens) - 1
        torch.testing.assert_close(queries.norm(dim=-1), before.norm(dim=-1), atol=1e-4, rtol=1e-4)


def test_a_call_goes_before_an_assignment_of_the_same_name(llava, eager):
    output, weights = causal.points(eager, [f"{FIRST}::attention_interface"])[f"{FIRST}::attention_interface"]
    assert torch.allclose(weights.sum(-1), torch.ones(()))
    output, weights = causal.points(llava, [f"{FIRST}::attention_interface"])[f"{FIRST}::attention_interface"]
    assert output.ndim == 4
    assert weights is None


def test_several_operations_of_one_name_are_numbered(llava):
    first, second = (f"{FIRST}::attn_output[{number}]" for number in (0, 1))
    values = causal.points(llava, [second, first, f"{FIRST}.o_proj"])
    torch.testing.assert_close(values[second], llava.model.get_submodule(f"{FIRST}.o_proj")(values[first]))
    assert torch.equal(values[second], values[f"{FIRST}.o_proj"])
    with pytest.raises(
        probe.errors.ExplainError, match=r"there are 2, say which one: attn_output\[0\] is `attn_output = "
    ):
        causal.points(llava, [f"{FIRST}::attn_output"])
    with pytest.raises(probe.errors.ExplainError, match="there are 2"):
        causal.points(llava, [f"{FIRST}::attn_output[2]"])


def test_points_under_a_mask(llava):
    path = "model.multi_modal_projector"
    (whole,), (masked,) = (
        causal.points(llava, [path], mask=mask).values() for mask in (torch.ones(4, 4), torch.zeros(4, 4))
    )
    assert torch.equal(whole, causal.points(llava, [path])[path])
    assert not torch.allclose(whole, masked)


def test_points_that_are_not_there(llava):
    with pytest.raises(probe.errors.PointNotFound, match=r"closest: .*self_attn"):
        causal.points(llava, ["model.language_model.layers.9.self_attn"])
    with pytest.raises(probe.errors.PointNotFound, match=r"no operation 'atention_interface'.*: attention_interface"):
        causal.points(llava, [f"{FIRST}::atention_interface"])
    with pytest.raises(probe.errors.ExplainError, match="a name like"):
        causal.points(llava, [f"{FIRST}::a b"])
    attention = inspect.signature(llava.model.get_submodule(FIRST).forward).parameters
    cache = "cache" if "cache" in attention else "past_key_values"  # the former from transformers 5.24 on
    with pytest.raises(probe.errors.ExplainError, match=rf"did not reach .*{cache}.update"):
        causal.points(llava, [f"{FIRST}::{cache}.update"])  # replay keeps none
    with pytest.raises(probe.errors.ExplainError, match="no look inside"):
        causal.points(llava, [f"{FIRST}::self.q_proj::linear"])
    with pytest.raises(probe.errors.ExplainError, match="as a list"):
        causal.points(llava, FIRST)


# ---------------------------------------------------------------- unwrapped, locked, not nested


def test_the_model_is_left_as_it_was(llava):
    before, scores, keys = contents(llava.model), llava.log_probs(None), list(llava.model.state_dict())
    with through_nnsight.wrapped(llava.model):
        assert all("forward" in vars(module) for module in llava.model.modules())
    causal.points(llava, [f"{FIRST}::apply_rotary_pos_emb", FIRST])
    causal.knockout(llava, HEAT, tokens=probe.select_tokens(llava, rule="joint"), backend="nnsight")
    with pytest.raises(probe.errors.PointNotFound):
        causal.points(llava, [f"{FIRST}::nothing_like_it"])
    assert contents(llava.model) == before
    assert not any("forward" in vars(m) or any("nnsight" in name for name in vars(m)) for m in llava.model.modules())
    assert torch.equal(llava.log_probs(None), scores)
    assert list(llava.model.state_dict()) == keys


def test_a_forward_of_somebody_else_is_put_back(tmp_path):
    """accelerate keeps one on every module of a model on several devices."""
    replay = record("llava", tmp_path)
    layer = replay.model.get_submodule(FIRST)
    calls = []

    def forward(*args, **kwargs):
        calls.append(len(args))
        return type(layer).forward(layer, *args, **kwargs)

    layer.forward = forward
    before = contents(replay.model)
    causal.points(replay, [FIRST])
    assert contents(replay.model) == before
    assert calls


def test_the_models_error_surfaces_and_nothing_stays(llava, monkeypatch):
    before = contents(llava.model)

    def fail(*_):
        raise ValueError("broken on purpose")

    monkeypatch.setattr(llava, "log_probs", fail)
    with pytest.raises(ValueError, match="broken on purpose"):
        causal.points(llava, [FIRST])
    monkeypatch.undo()
    assert contents(llava.model) == before
    assert causal.points(llava, [FIRST])


def test_threads_take_turns(llava, tmp_path):
    other = record("llava", tmp_path)
    expected = causal.points(llava, [FIRST])[FIRST][0]
    results, errors = [], []

    def work(replay):
        try:
            results.append(causal.points(replay, [FIRST, f"{FIRST}::apply_rotary_pos_emb"])[FIRST][0])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(replay,)) for replay in (llava, other) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(results) == 6
    assert all(torch.equal(result, expected) for result in results)


def test_nested_use_is_refused(llava):
    for call in (
        lambda: causal.points(llava, ["lm_head"]),
        lambda: causal.knockout(llava, HEAT, tokens=probe.select_tokens(llava, rule="joint"), backend="nnsight"),
    ):
        with through_nnsight.wrapped(llava.model):
            with pytest.raises(probe.errors.ExplainError, match="cannot be nested"):
                call()
    before = contents(llava.model)
    handle = llava.model.get_submodule(FIRST).register_forward_hook(lambda m, a, o: causal.points(llava, ["lm_head"]))
    with pytest.raises(probe.errors.ExplainError, match="cannot be nested"):
        causal.points(llava, [FIRST])
    handle.remove()
    assert contents(llava.model) == before
    assert causal.points(llava, [FIRST])


@pytest.mark.parametrize("number", [0, 3, -1, -3])
def test_an_interrupt_before_or_after_the_trace_is_not_taken_for_a_trace_that_runs(llava, monkeypatch, number):
    plain, calls = through_nnsight._marks, 2 * len(list(llava.model.modules()))
    count = 0

    def interrupted(module):
        nonlocal count
        count += 1
        if count - 1 == number % calls:
            raise KeyboardInterrupt
        return plain(module)

    expected = causal.points(llava, [FIRST])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(through_nnsight, "_marks", interrupted)
        causal.points(llava, [FIRST])
    found = causal.points(llava, [FIRST])
    assert repr(found) == repr(expected)


def test_inside_a_trace_of_the_users_own_it_is_refused(tmp_path):
    import nnsight

    replay = record("llava", tmp_path)
    mine = nnsight.NNsight(replay.model)
    errors = []

    def call():
        try:
            causal.points(replay, [FIRST])
        except probe.errors.ExplainError as error:
            errors.append(error)
        return replay.log_probs(None)

    with mine.trace(fn=call) as tracer:
        with tracer.invoke():
            mine.lm_head.output.save()
    assert "cannot be nested" in str(errors[0])
    assert causal.points(replay, [FIRST])  # and beside it, it is welcome
    with mine.trace(fn=lambda: replay.log_probs(None)) as tracer:
        with tracer.invoke():
            logits = mine.lm_head.output.save()
    said = logits[0, -len(replay.tokens) :].float().log_softmax(-1)[range(len(replay.tokens)), replay.token_ids]
    torch.testing.assert_close(said, replay.original_log_probs.cpu(), atol=1e-5, rtol=0)


def test_only_this_module_imports_nnsight():
    from pathlib import Path

    package = Path(probe.__file__).parent
    importing = [path.name for path in package.rglob("*.py") if "import nnsight" in path.read_text(encoding="utf-8")]
    assert importing == ["through_nnsight.py"]
    assert "nnsight" in sys.modules
