"""The main road on a device that is not the CPU: no tensors of two devices meet, nothing waits that need not, nothing
is computed in double precision there, and the numbers agree with the CPU's."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from pretend import Card, put

import lvlm_probe as probe
from lvlm_probe import causal
from lvlm_probe.causal.knockout import attention_layers, cut_attention
from lvlm_probe.errors import ExplainError, OutOfMemory

METHODS: dict[str, dict[str, Any]] = {
    "igos++": {}, "gradcam": {}, "tmm": {}, "iia": {}, "attention": {"source": "replay"}, "relative_attention": {},
    "rollout": {}, "tam": {}, "rise": {"masks": 8}, "occlusion": {"size": 3},
    "greedy": {"segments": "grid", "regions": 4}, "integrated_gradients": {"steps": 4}, "input_gradient": {},
}  # fmt: skip
FAMILIES = ("demo", "llava", "qwen2_5_vl", "llava_onevision", "mllama")


def load(name: str) -> tuple[Any, Any]:
    return probe.demo.load() if name == "demo" else tiny_models.build(name)


def ask(name: str, model: Any, processor: Any) -> Any:
    if name != "demo":
        return tiny_models.inputs(name, model, processor, [tiny_models.picture()], "What is on the left?")
    (scene,) = probe.demo.scenes(1)
    return processor.apply_chat_template(
        scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).to(model.device)


def record(name: str, model: Any, processor: Any, folder: Path, tokens: int = 3, **settings: Any) -> Any:
    with probe.attach(model, processor) as attached, attached.record(folder, **settings) as recording:
        model.generate(**ask(name, model, processor), min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
    assert not recording.faults
    return recording.traces[-1]


def road(name: str, place: Callable[[Any], Any], folder: Path) -> dict[str, Any]:
    """What every public verb gives, as numbers or a sentence."""
    model, processor = load(name)
    place(model)
    trace = record(name, model, processor, folder, tokens=5)
    found: dict[str, Any] = {"log_probs": trace.log_probs, "llr": trace.llr, "rows": trace.attention.values}
    replay = probe.replay(trace, model, processor)
    selection = probe.select_tokens(replay, span=(0, 3))
    for method, params in METHODS.items():
        try:
            heat = probe.explain(replay, method=method, tokens=selection, strengthen=False, **params)
            found[method] = heat.reason if heat.values is None else heat.values
        except ExplainError as error:
            found[method] = str(error)
    score = probe.evaluate(heat, replay, steps=4, mode="exact")
    found["evaluate"] = [score.original, score.baseline]
    with contextlib.suppress(ExplainError):
        found["knockout"] = [effect.score for effect in causal.knockout(replay, heat, draws=1, sweep=2).effects]
    mask = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0)).to(replay.device).requires_grad_(True)
    replay.log_probs(mask, micro_batch=2, noise=0.1).sum().backward()
    assert mask.grad is not None
    found["gradient"] = mask.grad.cpu().numpy()
    with probe.attach(model, processor) as attached, attached.masked(mask[0].detach()), torch.no_grad():
        found["masked"] = model(**ask(name, model, processor)).logits[0, -1, :9].float().cpu().numpy()
    found["verify"] = [probe.verify(trace, model, processor).largest_difference]
    return found


def agree(here: dict[str, Any], there: dict[str, Any]) -> None:
    assert here.keys() == there.keys()
    for step, value in there.items():
        if isinstance(value, str):
            assert here[step] == value, step
        else:
            np.testing.assert_allclose(np.asarray(here[step]), np.asarray(value), atol=2e-3, err_msg=step)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_main_road_without_double_precision(name: str, tmp_path: Path) -> None:
    """As Apple's devices have none; where there is one, sums on the device are no finer for it."""
    there = road(name, lambda model: model, tmp_path / "cpu")
    with Card(float64=False) as card:
        here = road(name, lambda model: model.to("cuda"), tmp_path / "device")
    assert not card.mixed and not card.doubles
    agree(here, there)


def test_a_model_on_two_devices(tmp_path: Path) -> None:
    from accelerate import dispatch_model

    def spread(model: Any) -> None:
        count = len(model.model.language_model.layers)
        layers = {f"model.language_model.layers.{number}": number % 2 for number in range(count)}
        rest = {
            "model.vision_tower": 1, "model.multi_modal_projector": 1, "model.language_model.embed_tokens": 0,
            "model.language_model.norm": 1, "model.language_model.rotary_emb": 0, "lm_head": 1,
        }  # fmt: skip
        places = {**rest, **layers}
        for path, index in places.items():
            put(model.get_submodule(path), f"cuda:{index}")
        dispatch_model(model, {path: f"cuda:{index}" for path, index in places.items()}, main_device="cuda:0")

    there = road("llava", lambda model: model, tmp_path / "cpu")
    with Card(count=2) as card:
        here = road("llava", spread, tmp_path / "device")
    assert not card.mixed and min(card.peak) > 0
    agree(here, there)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_recording_adds_no_wait_to_a_token(name: str, tmp_path: Path) -> None:
    grown = {}
    model, processor = load(name)
    with Card() as card:
        model.to("cuda")
        for recorded in (False, True):
            counts = []
            for tokens in (4, 12):
                with probe.attach(model, processor) as attached:
                    inputs = ask(name, model, processor)
                    with attached.record(tmp_path, llr=False, boxes=False) if recorded else contextlib.nullcontext():
                        with card.counting() as waits:
                            model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
                counts.append(sum(waits.values()))
            grown[recorded] = counts[1] - counts[0]
    assert grown[True] == grown[False]


@pytest.mark.parametrize(("method", "few", "many", "limit"), [
    ("igos++", {"preset": "paper", "iterations": 1}, {"preset": "paper", "iterations": 2}, 4),
    ("rise", {"masks": 64}, {"masks": 128}, 5),
    ("integrated_gradients", {"steps": 16}, {"steps": 32}, 7),
])  # fmt: skip
def test_waits_of_an_iteration(method: str, few: Any, many: Any, limit: int, tmp_path: Path) -> None:
    """Of 20 masks, 64 masks, 16 steps; one of them is transformers' own."""
    model, processor = load("llava")
    with Card() as card:
        model.to("cuda")
        replay = probe.replay(record("llava", model, processor, tmp_path, llr=False), model, processor)
        selection = probe.select_tokens(replay, span=(0, 2))
        counts: list[Counter[Any]] = []
        for params in (few, few, many):  # the first warms up
            with card.counting() as waits:
                probe.explain(replay, method=method, tokens=selection, strengthen=False, **params)
            counts.append(waits)
    more = counts[2] - counts[1]
    assert 0 < sum(more.values()) <= limit, card.table(more)


@pytest.mark.parametrize("method", ["igos++", "tmm", "iia", "rise", "gradcam", "rollout"])
def test_what_is_planned_is_what_is_taken(method: str, tmp_path: Path) -> None:
    model, processor = load("llava")
    with Card(float64=False) as card:
        model.to("cuda")
        replay = probe.replay(record("llava", model, processor, tmp_path, llr=False), model, processor)
        params = {"masks": 64} if method == "rise" else {}
        planned = probe.plan(replay, method=method, **params)
        before = card.peak[0] = card.held()
        selection = probe.select_tokens(replay, span=(0, 2))
        probe.explain(replay, method=method, tokens=selection, strengthen=False, plan=planned, **params)
        taken = card.peak[0] - before
    # Some 4 MB are the same for every model: the regularisers work on an image of 336 × 336.
    assert 0.85 * (taken - 4_500_000) <= planned.peak <= 1.2 * taken


@pytest.mark.parametrize(("method", "params"), [("integrated_gradients", {}), ("rise", {"masks": 32})])
def test_what_does_not_fit_is_done_in_smaller_parts(method: str, params: Any, tmp_path: Path) -> None:
    """Backward in the caller's thread: torch ends the process where memory runs out in a device's own."""
    model, processor = load("llava")
    trace = record("llava", model, processor, tmp_path, llr=False)

    def explained(memory: int | None, micro_batch: int) -> tuple[Any, int]:
        with Card(memory=memory, own_thread=False) as card:
            model.to("cuda")
            try:
                replay = probe.replay(trace, model, processor, micro_batch=micro_batch)
                selection = probe.select_tokens(replay, span=(0, 2))
                card.peak[0] = card.held()
                heat = probe.explain(replay, method=method, tokens=selection, strengthen=False, **params)
                return heat.values, card.peak[0]
            finally:
                model.to("cpu")

    (whole, eight), (_, one) = explained(None, 8), explained(None, 1)
    assert one < 0.8 * eight
    np.testing.assert_allclose(explained((one + eight) // 2, 8)[0], whole, atol=1e-5)
    with pytest.raises(OutOfMemory):
        explained(int(0.8 * one), 8)


class OffloadedCache(transformers.DynamicCache):
    """Keys and values are in main memory between the passes of their layer, as transformers' own has them; without its
    streams, which the pretended device lacks."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.offloading = True

    def update(self, key: Any, value: Any, layer: int, *args: Any, **settings: Any) -> Any:
        kept = self.layers[layer]
        if kept.is_initialized:
            kept.keys, kept.values = kept.keys.to(key.device), kept.values.to(key.device)
        found = kept.update(key, value, *args, **settings)
        kept.keys, kept.values = kept.keys.cpu(), kept.values.cpu()
        return found


def test_keys_of_an_offloaded_cache_stay_off_the_device(tmp_path: Path) -> None:
    model, processor = load("llava")
    grown: dict[bool, int] = {}
    with Card() as card:
        model.to("cuda")
        inputs = ask("llava", model, processor)
        for recorded in (False, True):
            counts: list[int] = []
            hook = model.register_forward_hook(lambda *_, counts=counts: counts.append(card.held()))
            with probe.attach(model, processor) as attached, contextlib.ExitStack() as stack:
                if recorded:
                    recording = stack.enter_context(attached.record(tmp_path, llr=False, boxes=False))
                cache = OffloadedCache(model.config.get_text_config())
                model.generate(**inputs, past_key_values=cache, min_new_tokens=6, max_new_tokens=6, do_sample=False)
            hook.remove()
            grown[recorded] = counts[-1] - counts[0]
    (trace,) = recording.traces
    assert not recording.faults and trace.attention.values.shape[0] == 6
    keys = cache.layers[0].keys  # of one layer
    assert grown[True] - grown[False] < keys.numel() * keys.element_size()


def test_a_cut_holds_where_layers_run_again(tmp_path: Path) -> None:
    """On a device backward runs in a thread of its own, and with it the layers that are recomputed."""
    model, processor = load("demo")
    gradients = []
    with Card():
        model.to("cuda")
        trace = record("demo", model, processor, tmp_path, llr=False)
        for checkpointing in (False, True):
            replay = probe.replay(trace, model, processor, gradient_checkpointing=checkpointing)
            queries = np.arange(replay.prompt_length - 1, replay.length)
            with cut_attention(replay, attention_layers(model, None), queries, trace.layout.image_positions[:20]):
                _, gradient = replay.score_and_grad(torch.full((1, 6, 6), 0.5), lambda log_probs: log_probs.sum(dim=1))
            gradients.append(gradient.cpu())
    assert torch.allclose(*gradients, atol=1e-3 * float(gradients[0].abs().max()))


def explain_all(replay: Any, selection: Any) -> None:
    for method in ("igos++", "gradcam", "tmm", "rise"):
        probe.explain(replay, method=method, tokens=selection, **({"masks": 8} if method == "rise" else {}))


@pytest.mark.parametrize("what", ["record", "explain", "evaluate", "knockout", "plan", "verify"])
def test_nothing_is_left_on_the_device(what: str, tmp_path: Path) -> None:
    model, processor = load("llava")
    with Card() as card:
        model.to("cuda")
        again = partial(record, "llava", model, processor, tmp_path)
        trace = again()
        selection = probe.select_tokens(probe.replay(trace, model, processor), span=(0, 2))
        heat = probe.explain(probe.replay(trace, model, processor), method="input_gradient", tokens=selection)
        work: dict[str, Callable[[Any], Any]] = {
            "record": lambda replay: again(),
            "explain": lambda replay: explain_all(replay, selection),
            "evaluate": lambda replay: probe.evaluate(heat, replay, steps=3),
            "knockout": lambda replay: causal.knockout(replay, heat, draws=1, sweep=2),
            "plan": lambda replay: probe.plan(replay),
            "verify": lambda replay: probe.verify(trace, model, processor),
        }
        used = []
        for _ in range(3):
            work[what](probe.replay(trace, model, processor))
            used.append(card.held())
    assert used[2] == used[1]
