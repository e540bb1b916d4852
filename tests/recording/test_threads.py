"""One model, many callers: nobody notices a pass of ours, and every call inside ``record`` and ``masked`` is met.

Threads meet at events and barriers inside ``generate()`` (in a logits processor of the user's) and inside ``explain()``
(in its progress), so that what is to overlap does.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import thread_campaign
import torch
from thread_campaign import Subject, left_behind

import lvlm_probe as probe
from lvlm_probe.attention import RowTap
from lvlm_probe.attention.dispatch import NAME
from lvlm_probe.errors import AttachError
from lvlm_probe.hooks import HookSet
from lvlm_probe.recording import Recording
from lvlm_probe.recording import probe as recording_probe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Subject]:
    return thread_campaign.subjects(tmp_path_factory.mktemp("threads"))


@pytest.fixture(params=["demo", "qwen2_vl"])
def subject(request: pytest.FixtureRequest, made: list[Subject]) -> Any:
    found = made[["demo", "qwen2_vl"].index(request.param)]
    before = left_behind(found.model)
    yield found
    assert left_behind(found.model) == before


def generate(subject: Subject, index: int, at: Callable[[int], None]) -> Any:
    """``generate()`` that calls ``at(step)`` between its passes."""
    steps: list[int] = []

    def look(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        steps.append(1)
        at(len(steps))
        return scores

    settings = {**thread_campaign.GENERATION, "logits_processor": [look]}
    return subject.model.generate(**subject.prompts[index](), **settings)


def same(one: Any, other: Any) -> bool:
    return torch.equal(one.sequences, other.sequences) and all(
        torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True)
    )


def test_a_few_dozen_calls(made: list[Subject]) -> None:
    counts = thread_campaign.run(24, 6, 0, made=made)
    assert counts.calls >= 24
    assert (counts.changed, counts.lost, counts.mixed) == (0, 0, 0), counts.words


@pytest.mark.parametrize("method", ["igos++", "tmm", "gradcam", "integrated_gradients", "iia"])
def test_explaining_in_the_middle_of_a_generation(subject: Subject, method: str) -> None:
    """Between two passes of a generate(), another thread explains: neither notices."""
    found: list[Any] = []

    def at(step: int) -> None:
        if step == 2:
            with ThreadPoolExecutor(1) as pool:
                found.append(pool.submit(subject.explain, 1, method).result())

    assert same(generate(subject, 0, at), subject.answers[0])
    assert np.array_equal(found[0].values, subject.quiet_map(1, method).values)


def test_generating_in_the_middle_of_an_explanation(subject: Subject) -> None:
    """While a replay is being explained, generate() of another thread runs from its beginning to its end."""
    answers: list[Any] = []

    def at(_done: int, _total: int) -> None:
        if not answers:
            with ThreadPoolExecutor(1) as pool:
                answers.append(pool.submit(subject.generate, 1).result())

    heat = probe.explain(subject.replay(0), method="igos++", tokens=(0, 2), strengthen=False, progress=at, iterations=2)
    assert same(answers[0], subject.answers[1])
    assert np.array_equal(heat.values, subject.quiet_map(0, "igos++").values)


def test_looking_inside_a_replay_while_others_generate(subject: Subject) -> None:
    replay = subject.replay(0)
    with replay.capture(modules=["*"], attention=["decoder"], edit=lambda _layer, output: output * 0):
        broken = replay.log_probs(None)
        assert same(subject.generate(0), subject.answers[0])
    assert not torch.allclose(broken, replay.log_probs(None))


def test_two_generations_at_once_are_two_traces(subject: Subject, tmp_path: Path) -> None:
    gate = threading.Barrier(2)
    with (
        probe.attach(subject.model, subject.processor) as attached,
        attached.record(tmp_path) as recording,
        ThreadPoolExecutor(2) as pool,
    ):
        answers = list(pool.map(lambda index: generate(subject, index, lambda _: gate.wait()), (0, 1)))
    assert all(same(answer, quiet) for answer, quiet in zip(answers, subject.answers, strict=True))
    traces = sorted(recording.traces, key=lambda trace: trace.images[0].tobytes())
    quiet = sorted(subject.traces, key=lambda trace: trace.images[0].tobytes())
    assert len(traces) == 2 and not recording.faults
    for trace, alone in zip(traces, quiet, strict=True):
        assert trace.images[0].tobytes() == alone.images[0].tobytes()
        assert np.array_equal(trace.log_probs, alone.log_probs) and trace.status == "complete"
        assert np.array_equal(trace.attention.values, alone.attention.values)


def test_what_others_generate_meanwhile_is_not_what_was_asked(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one begins inside the call of ``ask``, and ends when that has returned and nothing is read yet."""
    asked, said = threading.Event(), []
    other = threading.Thread(target=lambda: said.append(generate(subject, 1, lambda step: step > 1 or asked.wait())))
    read = Recording.traces.fget

    def look(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if other.ident is None:
            began.set()
            other.start()
        return scores

    def late(recording: Recording) -> Any:
        asked.set()
        other.join()
        return read(recording)

    began = threading.Event()
    monkeypatch.setattr(Recording, "traces", property(late))
    question = subject.question or "What color is the cross?"
    options = {"max_new_tokens": 3, "logits_processor": [look]}
    answer = probe.ask(subject.model, subject.processor, subject.pictures[0], question, out=tmp_path, **options)
    assert began.is_set() and same(said[0], subject.answers[1])
    assert answer.trace.images[0].tobytes() == subject.pictures[0].convert("RGB").tobytes()
    assert len(answer.trace.token_ids) == 3 and len(list(tmp_path.glob("*.h5"))) == 1


def test_tasks_of_one_loop(subject: Subject, tmp_path: Path) -> None:
    async def serve() -> None:
        await asyncio.gather(*(asyncio.to_thread(subject.generate, index) for index in (0, 1, 0, 1)))

    with probe.attach(subject.model, subject.processor) as attached, attached.record(tmp_path) as recording:
        asyncio.run(serve())
    assert len(recording.paths) == 4 and all(trace.images for trace in recording.traces)


def test_a_lock_around_generate_and_preprocessing_outside(subject: Subject, tmp_path: Path) -> None:
    """Prompts are prepared while another thread is inside generate()."""
    with probe.attach(subject.model, subject.processor) as attached, attached.record(tmp_path) as recording:
        prepared: list[Any] = []

        def at(step: int) -> None:
            if step == 1:
                with ThreadPoolExecutor(1) as pool:
                    prepared.append(pool.submit(subject.prompts[1]).result())

        generate(subject, 0, at)
        subject.model.generate(**prepared[0], max_new_tokens=2, do_sample=False)
    assert [len(trace.images) for trace in recording.traces] == [1, 1]


def test_every_caller_is_masked(subject: Subject) -> None:
    """Also one whose call begins inside another's."""
    others: list[Any] = []

    def at(step: int) -> None:
        if step == 2:
            with ThreadPoolExecutor(1) as pool:
                others.append(pool.submit(subject.generate, 1).result())

    with probe.attach(subject.model, subject.processor) as attached, attached.masked(subject.mask):
        own = generate(subject, 0, at)
    assert same(own, subject.masked[0]) and same(others[0], subject.masked[1])


def test_masks_that_are_left_in_the_order_they_were_entered(subject: Subject) -> None:
    """Two threads' blocks overlap: the one that stays open is in force, and after both nothing is masked."""
    with probe.attach(subject.model, subject.processor) as attached:
        first, second = attached.masked(torch.zeros(4, 4)), attached.masked(subject.mask)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert same(subject.generate(0), subject.masked[0])
        second.__exit__(None, None, None)
        assert same(subject.generate(0), subject.answers[0])


def test_a_context_taken_along_is_another_call(subject: Subject, tmp_path: Path) -> None:
    """Servers hand copies of a context on, made inside generate(); what runs in them later is not nested in it."""
    copies: list[contextvars.Context] = []
    with probe.attach(subject.model, subject.processor) as attached, attached.record(tmp_path) as recording:

        def at(step: int) -> None:
            if step == 2:
                copies.append(contextvars.copy_context())
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(copies[0].run, subject.generate, 1).result()

        assert same(generate(subject, 0, at), subject.answers[0])
        copies[0].run(subject.generate, 0)
    assert len(recording.paths) == 3 and not recording.faults


def test_what_a_generation_calls_itself_is_a_part_of_it(subject: Subject, tmp_path: Path) -> None:
    def at(step: int) -> None:
        if step == 2:
            subject.generate(1)

    with probe.attach(subject.model, subject.processor) as attached, attached.record(tmp_path, llr=False) as recording:
        generate(subject, 0, at)
    assert len(recording.paths) == 1


def test_detaching_while_others_generate(subject: Subject, tmp_path: Path) -> None:
    attached = probe.attach(subject.model, subject.processor)
    with attached.record(tmp_path) as recording:

        def at(step: int) -> None:
            if step == 2:
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(attached.detach).result()

        assert same(generate(subject, 0, at), subject.answers[0])
    assert len(recording.paths) == 1 and not recording.faults
    assert same(subject.generate(1), subject.answers[1])
    assert len(recording.paths) == 1


def test_one_probe_at_a_time(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread attaches while this one looks at what the model is made of."""
    found, plain = [], recording_probe.examine

    def late(*given: Any) -> Any:
        monkeypatch.setattr(recording_probe, "examine", plain)
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(probe.attach, subject.model, subject.processor).result())
        return plain(*given)

    monkeypatch.setattr(recording_probe, "examine", late)
    with pytest.raises(AttachError, match="use that one"):
        probe.attach(subject.model, subject.processor)
    with found[0]:
        assert same(subject.generate(0), subject.answers[0])


def test_one_recording_at_a_time(subject: Subject, tmp_path: Path) -> None:
    gate = threading.Barrier(8)

    def enter(number: int) -> bool:
        gate.wait()
        try:
            attached.record(tmp_path / str(number)).__enter__()
        except AttachError:
            return False
        return True

    with probe.attach(subject.model, subject.processor) as attached, ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(enter, range(8))) == 1


def test_recording_leaves_the_random_numbers_of_others(subject: Subject, tmp_path: Path, monkeypatch: Any) -> None:
    """Drawing is the process's own: it goes on from where it is, whatever a recording does meanwhile."""
    from lvlm_probe.recording import probe as session

    drawn: list[torch.Tensor] = []
    write = session.write
    monkeypatch.setattr(session, "describe_model", lambda model: drawn.append(torch.rand(3)) or {})
    with probe.attach(subject.model, subject.processor) as attached, attached.record(tmp_path):
        torch.manual_seed(0)
        subject.generate(0)
        drawn.append(torch.rand(3))
    assert session.write is write
    torch.manual_seed(0)
    assert torch.equal(torch.cat(drawn), torch.rand(6))


# ------------------------------------------------------------------------------------------------------- interrupts


@pytest.mark.parametrize("where", ["arm", "install", "redirect", "hook", "registered"])
def test_an_interrupt_while_hooks_are_hung_up(subject: Subject, tmp_path: Path, monkeypatch: Any, where: str) -> None:
    from lvlm_probe.attention import tap

    def interrupted(*_args: Any, **_kwargs: Any) -> Any:
        raise KeyboardInterrupt

    register = torch.nn.Module.register_forward_hook

    def registered(*args: Any, **kwargs: Any) -> Any:
        register(*args, **kwargs)
        raise KeyboardInterrupt

    if where in ("arm", "install"):
        monkeypatch.setattr(RowTap, where, interrupted)
    elif where == "redirect":  # when the views are there already, and nobody has been told
        redirect = tap.redirect
        monkeypatch.setattr(tap, "redirect", lambda *args: (redirect(*args), interrupted()))
    elif where == "hook":
        monkeypatch.setattr(torch.nn.Module, "register_forward_hook", interrupted)
    else:
        monkeypatch.setattr(torch.nn.Module, "register_forward_hook", registered)
    with probe.attach(subject.model, subject.processor) as attached:
        before = left_behind(subject.model)
        with attached.record(tmp_path / "interrupted"), pytest.raises(KeyboardInterrupt):
            subject.generate(0)
        assert left_behind(subject.model) == before
        monkeypatch.undo()
        with attached.record(tmp_path / "next") as recording:
            subject.generate(0)
    (trace,) = recording.traces
    assert trace.status == "complete" and trace.attention is not None


# ------------------------------------------------------------------------------------------------------- the parts


def test_a_hook_that_is_registered_or_removed_just_now_is_not_there() -> None:
    """torch notes in a second step that a hook takes keyword arguments."""
    module = torch.nn.Linear(2, 2)
    with HookSet() as hooks:
        hooks.forward(module, lambda *_: pytest.fail("called"), name="output", fenced=False)
        hooks.forward_pre(module, lambda *_: pytest.fail("called"), name="input", fenced=False)
        module._forward_hooks_with_kwargs.clear()
        module._forward_pre_hooks_with_kwargs.clear()
        module(torch.ones(1, 2))


def test_hooks_of_a_set_with_a_scope_act_in_its_calls_only() -> None:
    from lvlm_probe.hooks import Call

    module, scope, heard = torch.nn.Linear(2, 2), object(), []
    ones = torch.ones(1, 2)
    with HookSet(scope=scope) as hooks:
        hooks.forward(module, lambda *_: heard.append(threading.get_ident()), name="output")
        hooks.shadow(module, "forward", lambda original, value: original(value) * 0)
        outside = module(ones)
        with Call(scope):
            assert not module(ones).any()
            context = contextvars.copy_context()
            with ThreadPoolExecutor(1) as pool:
                assert torch.equal(pool.submit(module, ones).result(), outside)
                assert torch.equal(pool.submit(context.run, module, ones).result(), outside)
        assert torch.equal(context.run(module, ones), outside)
    assert heard == [threading.get_ident()]


def test_the_registered_function_stays_and_does_without_a_view(subject: Subject) -> None:
    """A layer reads the name, then the last tap goes, then the layer asks the registry and calls."""
    from transformers import AttentionInterface

    with RowTap(subject.model) as tap:
        module = subject.model.get_submodule(tap.layers[0].module)
        name = module.config._attn_implementation
    attend = AttentionInterface().get_interface(name, None)
    assert attend is AttentionInterface._global_mapping[NAME]
    query = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    plain = AttentionInterface._global_mapping["sdpa"](module, query, query, query, None)
    assert torch.equal(attend(module, query, query, query, None)[0], plain[0])
