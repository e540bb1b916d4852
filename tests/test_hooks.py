"""HookSet and Shadow: fenced, and gone without a trace."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch

from lvlm_probe.hooks import HookSet, shadow_of


class Greeter:
    def greet(self, name: str) -> str:
        return f"hello {name}"


class Named:
    def __init__(self, name: str) -> None:
        self.name = name

    def say(self) -> str:
        return f"I am {self.name}"


def loud(original, name):
    return original(name).upper()


@pytest.mark.quick
def test_shadow_stands_in_front_and_leaves_nothing():
    owner, other = Greeter(), Greeter()
    hooks = HookSet()
    hooks.shadow(owner, "greet", loud)
    assert owner.greet("you") == "HELLO YOU"
    assert other.greet("you") == "hello you"
    hooks.remove()
    hooks.remove()
    assert owner.greet("you") == "hello you"
    assert vars(owner) == {}


def test_shadow_restores_the_users_own_override():
    owner = Greeter()
    owner.greet = lambda name: f"hi {name}"
    mine = owner.greet
    with HookSet() as hooks:
        hooks.shadow(owner, "greet", loud)
        assert owner.greet("you") == "HI YOU"
    assert owner.greet is mine


@pytest.mark.parametrize("first_to_go", [0, 1])
def test_two_shadows_come_off_in_any_order(first_to_go):
    owner = Greeter()
    sets = [HookSet(), HookSet()]
    sets[0].shadow(owner, "greet", loud)
    sets[1].shadow(owner, "greet", lambda original, name: original(name) + "!")
    assert owner.greet("you") == "HELLO YOU!"
    sets[first_to_go].remove()
    assert owner.greet("you") == ("hello you!" if first_to_go == 0 else "HELLO YOU")
    sets[1 - first_to_go].remove()
    assert owner.greet("you") == "hello you"
    assert vars(owner) == {}


def test_shadow_sees_later_changes_of_the_class():
    class Own(Greeter):
        pass

    owner = Own()
    hooks = HookSet()
    shadow = hooks.shadow(owner, "greet", loud)
    Own.greet = lambda self, name: f"bye {name}"
    assert owner.greet("you") == "BYE YOU"
    assert shadow_of(owner.greet) is shadow


def test_shadow_does_not_keep_its_owner_alive():
    owner = Greeter()
    hooks = HookSet()
    hooks.shadow(owner, "greet", loud)
    seen = weakref.ref(owner)
    del owner
    gc.collect()
    assert seen() is None
    hooks.remove()


def test_fenced_hooks_disarm_once_and_leave_the_output():
    module = torch.nn.Linear(3, 2)
    x = torch.randn(4, 3)
    expected = module(x)
    errors: list[tuple[str, str]] = []
    calls = []

    def broken(*args):
        calls.append(1)
        raise RuntimeError("boom")

    hooks = HookSet(lambda name, error: errors.append((name, str(error))))
    hooks.forward(module, broken, name="after")
    hooks.forward_pre(module, broken, name="before")
    assert torch.equal(module(x), expected)
    assert torch.equal(module(x), expected)
    assert sorted(errors) == [("after", "boom"), ("before", "boom")]
    assert len(calls) == 2
    hooks.remove()
    assert not module._forward_hooks and not module._forward_pre_hooks


def test_unfenced_hook_raises():
    module = torch.nn.Linear(3, 2)

    def broken(*args):
        raise RuntimeError("boom")

    with HookSet() as hooks:
        hooks.forward_pre(module, broken, name="masked", fenced=False)
        with pytest.raises(RuntimeError, match="boom"):
            module(torch.zeros(1, 3))


def test_other_peoples_handles_stay():
    module = torch.nn.Linear(3, 2)
    theirs = module.register_forward_hook(lambda *args: None)
    with HookSet() as hooks:
        hooks.forward(module, lambda *args: None, name="ours")
        assert len(hooks) == 1
    assert list(module._forward_hooks) == [theirs.id]


def test_modules_pickle_and_copy_after_removal():
    module = torch.nn.Linear(3, 2)
    with HookSet() as hooks:
        hooks.shadow(module, "extra_repr", lambda original: original())
        hooks.forward(module, lambda *args: None, name="ours")
    pickle.loads(pickle.dumps(module))
    copy.deepcopy(module)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda owner: pickle.loads(pickle.dumps(owner))])
@pytest.mark.parametrize("shadows", [1, 2])
def test_a_copy_of_a_shadowed_object_calls_its_own_method(copied, shadows):
    owner = Named("first")
    with HookSet() as hooks:
        for _ in range(shadows):
            hooks.shadow(owner, "say", lambda original: original().upper())
        other = copied(owner)
        assert owner.say() == "I AM FIRST"
        other.name = "second"
        assert other.say() == "I am second"
        assert shadow_of(other.say) is None
        # A copy is as good as any other object: it can be shadowed, copied and pickled itself.
        with HookSet() as more:
            more.shadow(other, "say", lambda original: original() + "!")
            assert other.say() == "I am second!"
        third = copied(other)
        third.name = "third"
        assert (third.say(), other.say()) == ("I am third", "I am second")
    assert vars(owner) == {"name": "first"}


def test_a_copy_keeps_the_users_own_override():
    owner = Named("first")
    owner.say = len  # something that pickles
    with HookSet() as hooks:
        hooks.shadow(owner, "say", lambda original, value: -original(value))
        assert owner.say("abc") == -3
        assert copy.deepcopy(owner).say is len
        assert pickle.loads(pickle.dumps(owner)).say is len


@pytest.mark.parametrize("shadows", [1, 2])
def test_settings_of_a_shadowed_object_are_its_own(shadows):
    owner = Named("first")
    owner.parts = {"inner": Named("inner")}
    with HookSet() as hooks, HookSet() as more:
        for number in range(shadows):
            (more if number else hooks).shadow(owner, "say", lambda original: original().upper())
            hooks.shadow(owner.parts["inner"], "say", lambda original: original().upper())
        settings = copy.deepcopy(vars(owner))  # as to_dict() of a processor makes it
        assert type(settings) is dict and set(settings) == {"name", "parts"}
        assert vars(settings["parts"]["inner"]) == {"name": "inner"}
        assert set(pickle.loads(pickle.dumps(vars(owner)))) == {"name", "parts"}
        owner.name = "second"
        assert owner.say() == "I AM SECOND"
        hooks.remove()
        assert owner.say() == ("I am second" if shadows == 1 else "I AM SECOND")
    assert type(vars(owner)) is dict and set(vars(owner)) == {"name", "parts"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_hooks_do_not_act_in_a_copy(copied):
    module = torch.nn.Linear(3, 2)
    x = torch.randn(4, 3)
    expected = module(x)
    with HookSet() as hooks:
        hooks.forward_pre(module, lambda _module, args, kwargs: ((args[0] + 1,), kwargs), name="before", fenced=False)
        hooks.forward(module, lambda _module, args, kwargs, output: output * 2, name="after")
        other = copied(module)
        assert not torch.equal(module(x), expected)
        assert torch.equal(other(x), expected)
    assert torch.equal(module(x), expected)


def test_a_pickle_needs_nothing_of_this_package():
    module = torch.nn.Linear(3, 2)
    with HookSet() as hooks:
        hooks.forward(module, lambda *args: None, name="ours")
        hooks.shadow(module, "extra_repr", lambda original: original())
        assert b"lvlm_probe" not in pickle.dumps(module)
