"""The replica of a model: what it shares, what it has of its own, and that it follows what a user does."""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from forks import HAS_FORK, entered_elsewhere, holds_in_a_fork
from torch import nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

import lvlm_probe as probe
from lvlm_probe.attention.cutting import attention_layers, cut_attention
from lvlm_probe.hooks import HookSet
from lvlm_probe.models.replica import Replica, duplicated


class Pair(nn.Module):
    """Two layers, and one that is no sub-module: it stands in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("shift", torch.zeros(3))
        self.outside = [nn.Linear(3, 3)]
        self.rope_deltas: Any = None

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        self.rope_deltas = 5
        return self.outside[0](self.second(self.first(value))) + self.shift


class Doubling(nn.Linear):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return super().forward(value) * 2


class Stubborn(Doubling):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("not to be copied")


ONES = torch.ones(1, 3)


@pytest.fixture
def pair() -> Pair:
    torch.manual_seed(0)
    return Pair().train()


def test_a_pass_touches_nothing_of_the_models(pair: Pair) -> None:
    pair.rope_deltas = "of generate()"
    before = [(id(m), dict(vars(m)), [w.requires_grad for w in m.parameters()]) for m in pair.modules()]
    with Replica(pair).use() as own, HookSet() as hooks:
        hooks.forward(own.first, lambda *_: None, name="hook")
        assert type(own) is Pair and not own.training and own.rope_deltas is None
        assert not own(ONES).requires_grad
        assert own.first.weight.data_ptr() == pair.first.weight.data_ptr()
        own.first.flag = True
    assert [(id(m), dict(vars(m)), [w.requires_grad for w in m.parameters()]) for m in pair.modules()] == before


CHANGES: dict[str, Any] = {
    "weights in place": lambda pair: pair.first.weight.data.mul_(2),
    "data of a weight": lambda pair: setattr(pair.first.weight, "data", torch.eye(3)),
    "another weight": lambda pair: setattr(pair.first, "weight", nn.Parameter(torch.eye(3))),
    "a buffer": lambda pair: setattr(pair, "shift", torch.ones(3)),
    "a layer": lambda pair: setattr(pair, "second", nn.Identity()),
    "a layer in a list": lambda pair: pair.outside.__setitem__(0, nn.Identity()),
    "a hook": lambda pair: pair.second.register_forward_hook(lambda _m, _a, output: output * 2),
    "a hook with keywords": lambda pair: pair.register_forward_hook(lambda *given: given[-1] * 2, with_kwargs=True),
    "another forward": lambda pair: setattr(pair.first, "forward", lambda value: value + 1),
    "another class": lambda pair: setattr(pair.first, "__class__", Doubling),
    "a class that copies itself": lambda pair: setattr(pair.outside[0], "__class__", Stubborn),
    "a parametrization": lambda pair: register_parametrization(pair.first, "weight", nn.Tanh()),
    "another precision": lambda pair: (pair.to(torch.float64), pair.outside[0].to(torch.float64)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_follows_the_model(pair: Pair, change: str) -> None:
    replica = Replica(pair)
    for _ in range(2):
        with replica.use(look=True) as own:
            before = own(ONES)
    assert not replica.changes
    CHANGES[change](pair)
    value = ONES.to(pair.first.weight.dtype if hasattr(pair.first, "weight") else torch.float32)
    for _ in range(2):
        with replica.use(look=True) as own:
            assert torch.equal(own(value), pair(value)) and own(value).dtype == pair(value).dtype
            assert not torch.equal(own(value), before)
    assert replica.changes == 1


NO_CHANGES: dict[str, Any] = {
    "training mode": lambda pair: pair.eval(),
    "state of generate()": lambda pair: setattr(pair, "rope_deltas", torch.ones(1)),
    "flags of weights": lambda pair: pair.requires_grad_(False),
    "gradients": lambda pair: pair(ONES).sum().backward(),
    "hooks of ours": lambda pair: HookSet().forward(pair.second, lambda *_: None, name="one"),
    "a shadow of ours": lambda pair: HookSet().shadow(pair.second, "forward", lambda original, value: original(value)),
}


@pytest.mark.parametrize("change", NO_CHANGES)
def test_what_changes_no_pass_is_no_change(pair: Pair, change: str) -> None:
    replica = Replica(pair)
    NO_CHANGES[change](pair)
    with replica.use(look=True):
        assert not replica.changes


def test_a_hook_that_is_gone_is_gone(pair: Pair) -> None:
    replica = Replica(pair)
    handle = pair.second.register_forward_hook(lambda _m, _a, output: output * 2)
    with replica.use() as own:
        loud = own(ONES)
    handle.remove()
    with replica.use() as own:
        assert torch.equal(own(ONES), pair(ONES)) and not torch.equal(own(ONES), loud)


def test_a_parametrized_layer_is_copied_like_others(pair: Pair) -> None:
    register_parametrization(pair.first, "weight", nn.Tanh())
    replica = Replica(pair)
    with replica.use() as own:
        assert own.first is not pair.first and not own(ONES).requires_grad
        assert torch.equal(own(ONES), pair(ONES))
    remove_parametrizations(pair.first, "weight", leave_parametrized=False)
    with replica.use() as own:
        assert type(own.first) is nn.Linear and torch.equal(own(ONES), pair(ONES))


def test_shadows_that_a_model_needs_run_the_replicas_own_method(pair: Pair) -> None:
    def doubled(original: Any, value: torch.Tensor) -> torch.Tensor:
        return original(value) * 2

    def shifted(original: Any, value: torch.Tensor) -> torch.Tensor:
        return original(value) + 1

    replica = Replica(pair)
    plain = pair(ONES)
    seen: list[nn.Module] = []
    with HookSet() as ours, HookSet() as theirs:
        ours.shadow(pair, "forward", shifted)
        theirs.shadow(pair, "forward", doubled, inherited=True)
        ours.shadow(pair, "forward", shifted)
        with replica.use() as own, HookSet() as hooks:
            hooks.forward(own.first, lambda module, *_: seen.append(module), name="hook")
            assert torch.equal(own(ONES), plain * 2) and seen == [own.first]
        theirs.remove()
        with replica.use() as own:
            assert torch.equal(own(ONES), plain)
    with replica.use() as own:
        assert torch.equal(own(ONES), plain) and "forward" not in vars(own)


def bound(pair: Pair) -> None:
    pair.first.forward = pair.second.forward


def decorated(pair: Pair) -> None:
    pair.first.forward = torch.no_grad()(pair.first.forward)


def partial(pair: Pair) -> None:
    pair.first.forward = functools.partial(type(pair.first).forward, pair.first)


def around(pair: Pair) -> None:
    old = pair.first.forward
    pair.first.forward = types.MethodType(lambda _self, value: old(value), pair.first)


class Calling:
    """A callable object around a method, as accelerate puts one up for mixed precision."""

    def __init__(self, method: Any) -> None:
        self.method = method

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        return self.method(value)


def calling(pair: Pair) -> None:
    pair.first.forward = Calling(pair.first.forward)


def compiled(pair: Pair) -> None:
    def backend(*_args: Any) -> Any:
        raise AssertionError("compiled")

    pair.first.compile(backend=backend)
    pair.second = torch.compile(pair.second, backend=backend)


@pytest.mark.parametrize("dress", [bound, decorated, partial, around, calling, compiled])
def test_what_runs_inside_is_the_replica(pair: Pair, dress: Any) -> None:
    """Its own layers run, and only they: seen by hooks on it, at the linear layers of both."""
    plain = pair(ONES) if dress in (decorated, partial, around, calling, compiled) else None
    dress(pair)
    heard: list[str] = []
    pair.register_forward_pre_hook(lambda module, _args: heard.append("a hook of the user's"))
    with Replica(pair).use() as own, HookSet() as hooks:
        for name in ("first", "second"):
            hooks.forward(own.get_submodule(name), lambda *_: heard.append("own"), name=name)
        hooks.forward(own.outside[0], lambda *_: heard.append("own"), name="outside")
        assert own.outside[0] is not pair.outside[0]
        own.first.weight = own.second.weight = nn.Parameter(torch.zeros(3, 3))  # the model's keep theirs
        output = own(ONES)
        assert torch.allclose(output, pair.outside[0](pair.second.bias))
    assert heard == ["a hook of the user's", "own", "own", "own"]
    if plain is not None and dress is not compiled:
        assert torch.equal(pair(ONES), plain)


def test_tied_weights_stay_tied_and_modules_that_copy_themselves_are_shared(pair: Pair) -> None:
    class Own(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            return self

    pair.second.weight = pair.first.weight
    pair.third = Own(3, 3)
    with Replica(pair).use() as own:
        assert own.first.weight is own.second.weight and own.third is pair.third
        assert torch.equal(own(ONES), pair(ONES))


def test_weights_that_the_model_has_let_go_of_are_not_kept(pair: Pair) -> None:
    replica = Replica(pair)
    with replica.use():
        pass
    kept = pair.first.weight.untyped_storage()._weak_ref()
    pair.first.weight.data = torch.eye(3)
    assert torch.UntypedStorage._expired(kept)
    torch.UntypedStorage._free_weak_ref(kept)


def test_a_duplicate_keeps_our_hooks(pair: Pair) -> None:
    with Replica(pair).use() as own, HookSet() as hooks:
        hooks.forward(own, lambda *_: torch.zeros(1), name="zero")
        kept, bare = duplicated(own, bare=False), duplicated(own)
    assert kept(ONES).equal(torch.zeros(1)) and bare(ONES).shape == (1, 3)


@pytest.mark.parametrize("executor", [False, True])
def test_a_thread_that_is_waited_for_inside_a_block_is_refused_its_turn(pair: Pair, executor: bool) -> None:
    """Neither could go on; an error comes out of the one that would have to wait for ever."""
    replica, said = Replica(pair), []

    def other() -> None:
        try:
            with replica.use():
                pass
        except probe.errors.ReplayError as error:
            said.append(str(error))

    with replica.use():
        if executor:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(other).result()
        else:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
    assert len(said) == 1 and "neither could go on" in said[0]
    other()  # and afterwards it is its turn
    assert len(said) == 1


def test_threads_take_turns(pair: Pair) -> None:
    replica, entered, order = Replica(pair), threading.Event(), []

    def other() -> None:
        entered.set()
        with replica.use():
            order.append("other")

    with replica.use(), replica.use():
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait()
        order.append("first")
    thread.join()
    assert order == ["first", "other"]


@pytest.mark.skipif(not HAS_FORK, reason="no fork here")
def test_an_interrupt_in_the_removal_of_a_hook_leaves_nothing_on_the_replica(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_hooks: HookSet) -> None:
        raise KeyboardInterrupt

    def hanging(own: nn.Module) -> list[Any]:
        return [(path, sorted(vars(module)), list(module._forward_hooks)) for path, module in own.named_modules()]

    replica = Replica(pair)
    with replica.use() as own:
        before = hanging(own)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HookSet, "remove", interrupted)
        with replica.use() as own, HookSet() as hooks:
            hooks.shadow(next(own.children()), "forward", lambda original, *args, **kwargs: None)
            hooks.forward(own, lambda *_: None, name="left behind", fenced=False)
    with replica.use() as own:
        assert hanging(own) == before
    assert replica.changes == 0


def test_a_forked_process_waits_for_nobody(pair: Pair) -> None:
    """Another thread was in the middle of a pass, with a hook hung up."""
    replica = Replica(pair)

    @contextmanager
    def hooked() -> Iterator[None]:
        with replica.use() as own, HookSet() as hooks:
            hooks.forward(own, lambda *_: torch.zeros(1), name="zero")
            yield

    def equal() -> bool:
        with replica.use() as own:
            return torch.equal(own(ONES), pair(ONES))

    with entered_elsewhere(hooked()):
        assert holds_in_a_fork(equal)


# ------------------------------------------------------------------------------------------------------- backward


def test_layers_that_run_again_in_another_thread_see_the_same_hooks() -> None:
    """A device's gradients are computed in threads of autograd's, where nothing of the caller's context is left."""
    replay = inside.replay("llava")
    images = replay.trace.layout.image_positions
    queries = torch.arange(int(images.max()) + 1, replay.length).numpy()
    mask = torch.full((1, 4, 4), 0.5)

    def gradient(checkpointing: bool) -> torch.Tensor:
        own = probe.replay(replay.trace, replay.model, replay.processor, gradient_checkpointing=checkpointing)
        leaf = mask.clone().requires_grad_(True)
        with cut_attention(own, attention_layers(own.model, [0, 1]), queries, images[::2]):
            value = own.log_probs(leaf).sum()
        with ThreadPoolExecutor(1) as pool:  # and after the cut has been taken away
            pool.submit(value.backward).result()
        return leaf.grad

    plain = gradient(False)
    assert torch.equal(gradient(True), plain)
    uncut = mask.clone().requires_grad_(True)
    replay.log_probs(uncut).sum().backward()
    assert not torch.allclose(plain, uncut.grad, rtol=0.05)


def test_micro_batches_run_again_while_the_replay_is_in_use() -> None:
    """By a thread of autograd's, which may not wait for the one that waits for it."""
    replay = inside.replay("llava")
    masks = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = masks.clone().requires_grad_(True)
    replay.log_probs(expected, micro_batch=2).sum().backward()
    leaf = masks.clone().requires_grad_(True)
    value = replay.log_probs(leaf, micro_batch=2).sum()
    with replay.replica.use(), ThreadPoolExecutor(1) as pool:
        pool.submit(value.backward).result()
    assert torch.equal(leaf.grad, expected.grad)


def test_random_weights_are_not_the_users(demo: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = demo
    scene = probe.demo.scenes(1)[0]
    with probe.attach(model, processor) as attached, attached.record(tmp_path) as recording:
        inputs = processor.apply_chat_template(
            scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        plain = model(**inputs).logits
    seen: list[bool] = []

    def told(_done: int, _total: int) -> None:
        with torch.no_grad():
            seen.append(torch.equal(model(**inputs).logits, plain))

    def first(module: nn.Module, _args: Any) -> None:
        seen.append(torch.equal(model.lm_head.weight, weight))

    weight = model.lm_head.weight.detach().clone()
    handle = model.lm_head.register_forward_pre_hook(first)
    replay = probe.replay(recording.traces[0], model, processor)
    heat = probe.explain(replay, method="gradcam", tokens=(0, 2))
    report = probe.sanity.weights(replay, heat, stages=1, draws=1, progress=told)
    handle.remove()
    assert all(seen) and len(report.steps) == 1
    assert not torch.equal(torch.from_numpy(report.heatmaps[0].values), torch.from_numpy(report.heatmap.values))


def test_passes_of_a_replica_hold_its_lock(pair: Pair) -> None:
    """Two threads in one replica would mix their hooks, flags and generation state."""
    replica = Replica(pair)
    log: list[str] = []

    class Lock:
        def acquire(self, **_how: Any) -> bool:
            log.append("taken")
            return True

        def release(self) -> None:
            log.append("given back")

    replica._lock = Lock()
    with replica.use():
        log.append("pass")
    assert log == ["taken", "pass", "given back"]
