"""Recording adds no wait for the device to a decoding step.

Two views of that. On the CPU, a real ``generate()``: how many values are read out of tensors (``.item()`` or ``bool()``
of a tensor) with and without the probe. And a decoding step under the probe's hooks on the meta device, whose tensors
hold no values, so that whatever wants one on the host fails.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import lvlm_probe as probe
from lvlm_probe.attention import RowTap
from lvlm_probe.attention.collection import Transfers
from lvlm_probe.attention.dispatch import AttentionCall
from lvlm_probe.hooks import HookSet
from lvlm_probe.recording.log_probs import StepLogProbs


class Waits(TorchDispatchMode):
    """Counts operations after which the host has to wait for the device: values read out, and copies to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero"):
            self.seen[name] += 1
        elif name in ("_to_copy", "copy_"):
            target = kwargs.get("device") if name == "_to_copy" else args[0].device
            source = args[1] if name == "copy_" else args[0]
            waits = not (name == "copy_" and (args[2:] == (True,) or kwargs.get("non_blocking")))
            if target is not None and torch.device(target).type == "cpu" and source.device.type != "cpu" and waits:
                self.seen[name] += 1
        return function(*args, **kwargs)


def waits_of(model: Any, inputs: Any, tokens: int) -> Counter[str]:
    with Waits() as waits:
        model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
    return waits.seen


@pytest.mark.parametrize("pictures", [1, 2])
def test_a_decoding_step_reads_no_more_values_with_the_probe_than_without(tmp_path: Path, pictures: int) -> None:
    """With two prompts of unequal length the batch is padded, and attention has a mask."""
    model, processor = tiny_models.build("llava")
    images = [tiny_models.picture(seed=number) for number in range(pictures)]
    questions = ["What is this?", "What is on the left of the other thing in this picture?"][:pictures]
    few, many = 4, 12
    grown = {}
    for recorded in (False, True):
        with probe.attach(model, processor) as attached:
            inputs = batch(model, processor, images, questions)
            if not recorded:
                before, after = (waits_of(model, inputs, tokens) for tokens in (few, many))
            else:
                with attached.record(tmp_path, llr=False, boxes=False) as recording:
                    before, after = (waits_of(model, inputs, tokens) for tokens in (few, many))
                assert all(trace.attention is not None for trace in recording.traces)
                assert len(recording.traces) == 2 * pictures
        grown[recorded] = after - before
    assert sum(grown[False].values()) >= many - few  # generate() itself asks once a step whether all rows are done
    assert grown[True] == grown[False]


def batch(model: Any, processor: Any, images: list[Any], questions: list[str]) -> Any:
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question in zip(images, questions, strict=True)
    ]
    processor.tokenizer.padding_side = "left"
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    return processor(images=images, text=texts, padding=True, return_tensors="pt").to(model.dtype)


def test_the_counter_counts() -> None:
    with Waits() as waits:
        assert bool(torch.ones(1).sum() > 0)
    assert sum(waits.seen.values()) == 1
    with FakeTensorMode(), Waits() as waits:
        there = torch.ones(3, device="cuda")
        there.cpu()
        torch.empty(3).copy_(there, non_blocking=True)
        torch.empty(3).copy_(there)
        there.to(torch.float16)
    assert waits.seen == {"_to_copy": 1, "copy_": 1}


@pytest.mark.parametrize("padded", [False, True])
def test_no_value_leaves_the_device_in_a_step(padded: bool) -> None:
    """Tensors of the meta device hold no values: whatever asks for one (``.cpu()``, ``.item()``, ``if``) fails."""
    model, reader, waits = decoder_without_values(), StepLogProbs(), Waits()
    with HookSet() as hooks, RowTap(model) as tap:
        hooks.forward(model, reader, name="log_probs", fenced=False)
        tap.arm(torch.arange(4)[None].repeat(2, 1))
        cache = DynamicCache(config=model.config)
        step(model, cache, 7, 7, padded)
        with waits:
            for total in (8, 9, 10):
                step(model, cache, 1, total, padded)
        assert tap.error is None
        assert tap._armed is not None
        assert [len(waiting.queries) for waiting in tap._armed.waiting.values()] == [4, 4]
        assert [len(waiting.masks) for waiting in tap._armed.waiting.values()] == [4 * padded] * 2
        # A hook that does read a value is noticed.
        hooks.forward(model, lambda *seen: seen[-1].logits[0, -1, 0].item(), name="reads", fenced=False)
        with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
            step(model, cache, 1, 11, padded)
    assert len(reader._values) == 4
    assert not waits.seen


@pytest.mark.quick
def test_a_further_step_is_only_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking into a call's arguments takes as long as a small layer; the first of its kind is looked into."""
    looked: list[int] = []
    look = AttentionCall.of
    monkeypatch.setattr(AttentionCall, "of", lambda args, kwargs: (looked.append(1), look(args, kwargs))[1])
    model = decoder_without_values()
    with RowTap(model) as tap:
        tap.arm(torch.arange(4)[None].repeat(2, 1))
        cache = DynamicCache(config=model.config)
        step(model, cache, 7, 7, False)
        assert len(looked) == 2  # layers
        for total in (8, 9, 10):
            step(model, cache, 1, total, False)
        assert len(looked) == 2
        assert tap.error is None
        assert tap._armed is not None
        assert [len(waiting.lengths) for waiting in tap._armed.waiting.values()] == [4, 4]


def decoder_without_values() -> Any:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config).eval()


def step(model: Any, cache: DynamicCache, tokens: int, total: int, padded: bool) -> None:
    """A pass over ``tokens`` more, ``total`` with what the cache holds."""
    mask: Any = None
    if padded:  # what generate() hands down for a padded batch: (batch, 1, query, key)
        mask = torch.ones(2, 1, tokens, total, dtype=torch.bool, device="meta")
    with torch.no_grad():
        model(
            input_ids=torch.zeros(2, tokens, dtype=torch.long, device="meta"), attention_mask=mask,
            past_key_values=cache, use_cache=True,
            position_ids=torch.arange(total - tokens, total, device="meta")[None].expand(2, -1),
        )  # fmt: skip


def test_copies_are_read_only_after_they_have_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Event:
        def record(self, _stream: Any) -> None:
            order.append("record")

        def synchronize(self) -> None:
            order.append("synchronize")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: None)
    asked: list[dict[str, Any]] = []
    with FakeTensorMode():
        source = torch.ones(3, device="cuda")
        original = torch.empty

        def empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
            asked.append({"pin_memory": pin_memory})
            return original(*args, **kwargs)

        monkeypatch.setattr(torch, "empty", empty)
        with Waits() as waits:
            transfers = Transfers()
            places = [transfers.copy(source), transfers.copy(source)]
            begun = [place[0] for place in places]
            assert order == ["record", "record"]
            transfers.finish()
            transfers.finish()  # nothing is left to wait for
    assert order == ["record", "record", "synchronize"]
    assert asked == [{"pin_memory": True}] * 2
    assert not waits.seen
    # Page-locked memory has been given back: what is kept is a copy in ordinary memory.
    assert all(place[0] is not first for place, first in zip(places, begun, strict=True))


def test_on_the_cpu_a_copy_is_the_tensor_itself() -> None:
    values = torch.arange(3.0)
    place = Transfers().copy(values)
    assert place[0] is values
