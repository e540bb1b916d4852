"""The main road on a device that is not the CPU: no tensors of two devices meet, nothing waits that need not, nothing
is computed in double precision there, and the numbers agree with the CPU's. And mistakes of these kinds, made on
purpose, are seen by the same checks."""

from __future__ import annotations

import contextlib
import inspect
import re
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flat_memory
import numpy as np
import pytest
import tiny_models
import torch
import transformers
from marks import campaign
from pretend import Card, put

import lvlm_probe as probe
from lvlm_probe import causal
from lvlm_probe.attention.collection import Collection, Transfers
from lvlm_probe.attention.cutting import attention_layers, cut_attention
from lvlm_probe.errors import ExplainError, OutOfMemory
from lvlm_probe.explainers.igos import descent, order
from lvlm_probe.models.fingerprint import fingerprint
from lvlm_probe.models.loading import default_device
from lvlm_probe.replaying import capture, micro_batches
from lvlm_probe.replaying.capture import AttentionLayer

METHODS: dict[str, dict[str, Any]] = {
    "igos++": {"iterations": 3}, "igos+": {"iterations": 1, "ig_steps": 2}, "gradcam": {}, "tmm": {}, "iia": {},
    "attention": {"source": "replay"}, "relative_attention": {}, "rollout": {}, "tam": {}, "rise": {"masks": 8},
    "occlusion": {"size": 3}, "greedy": {"segments": "grid", "regions": 4}, "integrated_gradients": {"steps": 4},
    "input_gradient": {}, "center": {}, "random": {}, "gradient_attention": {}, "weighted_tmm": {}, "refined": {},
    "gradient_value": {"weights": "cosine"}, "attention_flow": {"layers": 2},
}  # fmt: skip
FAMILIES = ("qwen2_5_vl", "mllama", *campaign("demo", "llava", "llava_onevision"))
"""Of llava the tests of Apple's devices and of two cards hold the same; mllama has tiles as well."""


@pytest.fixture(scope="module")
def llava() -> tuple[Any, Any]:
    """A model on the CPU, and its processor."""
    return load("llava")


@pytest.fixture(scope="module")
def llava_on_the_cpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What its road gives there."""
    return road("llava", lambda model: model, tmp_path_factory.mktemp("cpu"))


@contextlib.contextmanager
def on_card(model: Any, **settings: Any) -> Iterator[Card]:
    """A card with the model on it for the block."""
    with Card(**settings) as card:
        model.to("cuda")
        try:
            yield card
        finally:
            model.to("cpu")


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
    mask = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0), device="cpu")
    mask = mask.to(replay.device).requires_grad_(True)
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
        elif step == "igos++":  # its values say an order of cells, in which two that round alike may change places
            ours, theirs = np.asarray(here[step]), np.asarray(value)
            np.testing.assert_allclose(np.sort(ours, axis=None), np.sort(theirs, axis=None), atol=2e-3, err_msg=step)
            assert np.abs(ours - theirs).mean() < 2e-3, step
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


def test_the_main_road_where_tensors_are_made_on_the_device(llava_on_the_cpu: dict[str, Any], tmp_path: Path) -> None:
    """As after ``torch.set_default_device("cuda")``, with which model cards begin."""
    with Card() as card, contextlib.ExitStack() as stack:

        def place(model: Any) -> None:
            model.to("cuda")
            stack.enter_context(torch.device("cuda"))

        here = road("llava", place, tmp_path)
    assert not card.mixed
    agree(here, llava_on_the_cpu)


def test_every_method_is_on_the_road() -> None:
    assert set(METHODS) == set(probe.methods())
    page = (Path(__file__).parents[2] / "docs" / "reality.md").read_text(encoding="utf-8")
    page = page.partition("<!-- device lane -->")[2].partition("<!-- /device lane -->")[0]
    assert sorted(METHODS) == re.findall(r"^\| `(\S+)` \| \d", page, flags=re.MULTILINE)


def spread(model: Any, decoder: tuple[int, int] = (0, 1)) -> None:
    """Layers by turns on two cards."""
    from accelerate import dispatch_model

    count = len(model.model.language_model.layers)
    layers = {f"model.language_model.layers.{number}": decoder[number % 2] for number in range(count)}
    rest = {
        "model.vision_tower": 1, "model.multi_modal_projector": 1, "model.language_model.embed_tokens": 0,
        "model.language_model.norm": 1, "model.language_model.rotary_emb": 0, "lm_head": 1,
    }  # fmt: skip
    places = {**rest, **layers}
    for path, index in places.items():
        put(model.get_submodule(path), f"cuda:{index}")
    dispatch_model(model, {path: f"cuda:{index}" for path, index in places.items()}, main_device="cuda:0")


def test_a_model_on_two_devices(llava_on_the_cpu: dict[str, Any], tmp_path: Path) -> None:
    with Card(count=2) as card:
        here = road("llava", spread, tmp_path)
    assert not card.mixed and min(card.peak) > 0
    agree(here, llava_on_the_cpu)


def test_a_plan_looks_at_every_card(tmp_path: Path) -> None:
    """Here at the second one, where the tower is and hardly anything is free."""
    model, processor = load("llava")
    with Card(count=2, memory=400_000_000) as card:
        spread(model, (1, 1))
        replay = probe.replay(record("llava", model, processor, tmp_path, llr=False), model, processor)
        selection = probe.select_tokens(replay, span=(0, 2))
        full = torch.empty(300_000_000, dtype=torch.uint8, device="cuda:1")
        planned = probe.plan(replay, method="integrated_gradients")
        before, card.peak = list(card.used), list(card.used)
        probe.explain(replay, method="integrated_gradients", tokens=selection, strengthen=False, plan=planned)
    first, taken = (most - held for most, held in zip(card.peak, before, strict=True))
    assert replay.device.index == 0 and first < 0.8 * taken
    assert planned.budget <= 0.95 * (card.total - full.numel())
    assert 0.85 * taken <= planned.peak <= 1.2 * taken


def test_the_fullest_card_says_how_many_masks_go_at_once() -> None:
    layers = torch.nn.ModuleList([torch.nn.Linear(10, 10), torch.nn.Linear(10, 200)])
    with Card(count=2, memory=20_000):
        for index, layer in enumerate(layers):
            put(layer, f"cuda:{index}")
        count = micro_batches.masks_at_once(layers, [], {}, 1, torch.device("cuda:0"))
    assert count == (20_000 - 4 * 2200) // 2 // (4 * (20 + 210))  # on the first alone 10


def test_a_plan_leaves_the_users_own_peak(llava: Any, tmp_path: Path) -> None:
    model, processor = llava
    with on_card(model):
        replay = probe.replay(record("llava", model, processor, tmp_path, llr=False), model, processor)
        torch.empty(200_000_000, dtype=torch.uint8, device="cuda")
        before = torch.cuda.max_memory_allocated()
        assert probe.plan(replay, method="gradcam", seconds=False).peak < 200_000_000
        assert torch.cuda.max_memory_allocated() == before


def test_apples_devices_are_taken_when_asked_for(llava: Any, llava_on_the_cpu: dict[str, Any], tmp_path: Path) -> None:
    """The road is the same; only how much memory is taken cannot be planned, which is said."""
    model, processor = llava
    with Card(kind="mps", float64=False) as card:
        assert torch.backends.mps.is_available() and default_device().type == "cpu"
        here = road("llava", lambda model: model.to("mps"), tmp_path / "device")
        model.to("mps")
        planned = probe.plan(model, record("llava", model, processor, tmp_path), processor)
        model.to("cpu")
    assert not card.mixed and not card.doubles
    agree(here, llava_on_the_cpu)
    assert planned.peak is None and "cannot be metered" in planned.sentence()


def waits_of_tokens(name: str, model: Any, processor: Any, folder: Path, *, recorded: bool) -> int:
    """How much oftener the host waits for eight tokens more."""
    counts = []
    with on_card(model) as card:
        for tokens in (4, 12):
            with probe.attach(model, processor) as attached:
                inputs = ask(name, model, processor)
                with attached.record(folder, llr=False, boxes=False) if recorded else contextlib.nullcontext():
                    with card.counting() as waits:
                        model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
            counts.append(sum(waits.values()))
    return counts[1] - counts[0]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_recording_adds_no_wait_to_a_token(name: str, tmp_path: Path) -> None:
    model, processor = load(name)
    plain, recorded = (waits_of_tokens(name, model, processor, tmp_path, recorded=on) for on in (False, True))
    assert recorded == plain


@pytest.mark.parametrize(("method", "few", "many", "limit"), [
    ("igos++", {"preset": "paper", "iterations": 1}, {"preset": "paper", "iterations": 2}, 4),
    ("rise", {"masks": 64}, {"masks": 128}, 5),
    ("integrated_gradients", {"steps": 16}, {"steps": 32}, 7),
])  # fmt: skip
def test_waits_of_an_iteration(method: str, few: Any, many: Any, limit: int, llava: Any, tmp_path: Path) -> None:
    """Of 20 masks, 64 masks, 16 steps; one of them is transformers' own."""
    model, processor = llava
    with on_card(model) as card:
        replay = probe.replay(record("llava", model, processor, tmp_path, llr=False), model, processor)
        selection = probe.select_tokens(replay, span=(0, 2))
        counts: list[Counter[Any]] = []
        for params in (few, few, many):  # the first warms up
            with card.counting() as waits:
                probe.explain(replay, method=method, tokens=selection, strengthen=False, **params)
            counts.append(waits)
    more = counts[2] - counts[1]
    assert 0 < sum(more.values()) <= limit, card.table(more)


@pytest.mark.parametrize(("method", "params"), [
    ("tmm", {}), ("iia", {"points": 3}), ("iia", {"points": 3, "variant": "iia2"}), ("rollout", {}),
])  # fmt: skip
def test_relevance_is_carried_on_the_device(
    method: str, params: Any, llava: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """However many blocks of rows a layer's attention is made in, the host does not wait for them."""
    model, processor = llava
    counts, blocks = [], []
    with on_card(model) as card:
        replay = probe.replay(record("llava", model, processor, tmp_path, llr=False), model, processor)
        selection = probe.select_tokens(replay, span=(0, 2))
        weights = AttentionLayer.weights
        monkeypatch.setattr(AttentionLayer, "weights", lambda layer, rows: blocks.append(1) or weights(layer, rows))
        for rows in (128, 128, 4):  # the first warms up
            monkeypatch.setattr(capture, "_BLOCK_ROWS", rows)
            blocks.clear()
            with card.counting() as waits:
                probe.explain(replay, method=method, tokens=selection, strengthen=False, **params)
            counts.append((sum(waits.values()), len(blocks)))
    (_, _), (waits_of_few, few), (waits_of_many, many) = counts
    assert many > 3 * few and waits_of_many == waits_of_few


def test_a_fingerprint_waits_twice(llava: Any, tmp_path: Path) -> None:
    """For all tensors of a model together; and it is the one that was taken on the CPU, whatever it is made of."""
    model, processor = llava
    layer = model.get_submodule("lm_head")
    values = [
        torch.tensor([True, False]), torch.arange(100), torch.randn(7, 3).half().t(), torch.randn(70).bfloat16(),
        torch.arange(200, dtype=torch.uint8), torch.tensor(3.0), torch.randn(5, dtype=torch.float64), torch.zeros(0),
    ]  # fmt: skip
    odd = {f"odd_{place}": value for place, value in enumerate(values)}
    for name, value in odd.items():
        layer.register_buffer(name, value)
    try:
        before = fingerprint(model)
        with on_card(model) as card:
            with card.counting() as waits:
                assert fingerprint(model) == before
            assert sum(waits.values()) == 2, card.table(waits)
            trace = record("llava", model, processor, tmp_path, llr=False)
            with card.counting() as waits:
                probe.replay(trace, model, processor)
            assert sum(waits.values()) <= 6, card.table(waits)
    finally:
        for name in odd:
            del layer._buffers[name]


@pytest.mark.parametrize("method", ["igos++", "tmm", "iia", "rise", "gradcam", "rollout"])
def test_what_is_planned_is_what_is_taken(method: str, llava: Any, tmp_path: Path) -> None:
    """Backward in the caller's thread: when a device's own lets go of a pass, and so the peak, is up to the machine."""
    model, processor = llava
    with on_card(model, float64=False, own_thread=False) as card:
        replay = probe.replay(record("llava", model, processor, tmp_path, llr=False), model, processor)
        params = {"masks": 64} if method == "rise" else {}
        planned = probe.plan(replay, method=method, **params)
        before = card.peak[0] = card.held()
        selection = probe.select_tokens(replay, span=(0, 2))
        probe.explain(replay, method=method, tokens=selection, strengthen=False, plan=planned, **params)
        taken = card.peak[0] - before
    # Some 4 MB are the same for every model: the regularisers work on an image of 336 × 336.
    assert 0.85 * (taken - 4_500_000) <= planned.peak <= 1.2 * taken


@pytest.mark.parametrize(("method", "params"), [("integrated_gradients", {"steps": 8}), ("rise", {"masks": 8})])
def test_what_does_not_fit_is_done_in_smaller_parts(method: str, params: Any, llava: Any, tmp_path: Path) -> None:
    """Backward in the caller's thread: torch ends the process where memory runs out in a device's own."""
    model, processor = llava
    trace = record("llava", model, processor, tmp_path, llr=False)

    def explained(memory: int | None, micro_batch: int) -> tuple[Any, int]:
        with on_card(model, memory=memory, own_thread=False) as card:
            replay = probe.replay(trace, model, processor, micro_batch=micro_batch)
            selection = probe.select_tokens(replay, span=(0, 2))
            card.peak[0] = card.held()
            heat = probe.explain(replay, method=method, tokens=selection, strengthen=False, **params)
            return heat.values, card.peak[0]

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


def test_keys_of_an_offloaded_cache_stay_off_the_device(llava: Any, tmp_path: Path) -> None:
    model, processor = llava
    grown: dict[bool, int] = {}
    with on_card(model) as card:
        for recorded in (False, True):
            counts: list[int] = []
            hook = model.register_forward_hook(lambda *_, counts=counts: counts.append(card.held()))
            with probe.attach(model, processor) as attached, contextlib.ExitStack() as stack:
                if recorded:
                    recording = stack.enter_context(attached.record(tmp_path, llr=False, boxes=False))
                inputs = ask("llava", model, processor)
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


def test_nothing_is_left_on_the_device(tmp_path: Path) -> None:
    """Of answers that were recorded and asked everything."""
    model, processor = load("demo")
    with on_card(model) as card:
        trace = record("demo", model, processor, tmp_path, tokens=8, points=["hidden"])
        held = flat_memory.cycles(trace, model, processor, tmp_path, count=3, alive=card.held)
    assert held[2] == held[1], held


# ------------------------------------------------------------------------------------------- mistakes made on purpose


def plant(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], right: str, wrong: str) -> None:
    """Let a function run with one piece of its source replaced."""
    source = Path(inspect.getsourcefile(function) or "").read_text(encoding="utf-8")
    first, there = function.__code__.co_firstlineno, source.splitlines()[: function.__code__.co_firstlineno - 1]
    assert right in source[len("\n".join(there)) :], "the source has changed: plant the mistake again"
    begin = len("\n".join(there))
    planted = source[:begin] + source[begin:].replace(right, wrong, 1)

    def codes(code: types.CodeType) -> Iterator[types.CodeType]:
        for part in code.co_consts:
            if isinstance(part, types.CodeType):
                yield part
                yield from codes(part)

    (made,) = (
        code
        for code in codes(compile(planted, function.__code__.co_filename, "exec"))
        if code.co_firstlineno == first and code.co_name == function.__code__.co_name
    )
    monkeypatch.setattr(function, "__code__", made)


@pytest.mark.parametrize(("function", "right", "wrong", "said"), [
    (descent.Optimisation.__init__, ", dtype=torch.float32, device=self.device)", ")", "same device"),
    (order.refine_order, "slopes.to(masks)", "slopes", "same device"),
    (micro_batches.noise_like, "torch.Generator(pixels.device)", "torch.Generator()", "device type for generator"),
], ids=["a mask left on the CPU", "slopes left on the device", "noise from a CPU generator"])  # fmt: skip
def test_a_tensor_on_the_wrong_device_is_seen(
    function: Any, right: str, wrong: str, said: str, llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = llava
    plant(monkeypatch, function, right, wrong)
    with on_card(model):
        replay = probe.replay(record("llava", model, processor, tmp_path, llr=False), model, processor)
        with pytest.raises(RuntimeError, match=said):
            probe.explain(replay, method="igos++", tokens=probe.select_tokens(replay, span=(0, 2)), strengthen=False)
            replay.log_probs(torch.ones(2, 3, 3, device=replay.device), noise=0.1)


def test_a_wait_in_a_token_is_seen(llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = llava
    plain = waits_of_tokens("llava", model, processor, tmp_path, recorded=False)
    plant(monkeypatch, Collection.wait_again, "keys = self", "bool(key.isfinite().all()); keys = self")
    assert waits_of_tokens("llava", model, processor, tmp_path, recorded=True) > plain


def test_a_copy_that_is_read_too_early_is_seen(llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = llava
    plant(monkeypatch, Transfers.finish, "event.synchronize()", "pass")
    with on_card(model):
        trace = record("llava", model, processor, tmp_path, llr=False)
    assert np.isnan(trace.attention.values).any()
