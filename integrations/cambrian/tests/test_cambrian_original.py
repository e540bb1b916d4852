"""The authors' package by duck type: recorded as its user calls it, replayed and explained, and left as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import cambrian_lookalike as lookalike
import numpy as np
import pytest
import torch
from lvlm_probe_cambrian.original import CambrianDriver, OriginalProcessor, matches, tokenize
from lvlm_probe_cambrian.transformers5 import on_transformers_5
from PIL import Image

import lvlm_probe as probe
from lvlm_probe.models.drivers import probed_model, register_original

PROMPT = "Hello <image>\nWhat?"
SETTINGS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}

register_original("cambrian", matches=matches, adapt=CambrianDriver)


def make(**options: Any) -> tuple[Any, OriginalProcessor]:
    model, tokenizer = lookalike.build(**options)
    towers = model.get_vision_tower_aux_list()
    return model, OriginalProcessor(tokenizer, [tower.image_processor for tower in towers], model.config)


def record(
    model: Any, processor: Any, folder: Path, *, image: Image.Image | None = None, prompt: str = PROMPT, **options: Any
) -> Any:
    """What a user's script does, and its one trace."""
    image = image or lookalike.picture()
    with probe.attach(model, processor) as p, p.record(folder, **options) as recording:
        model.generate(**processor(prompt, image, dtype=model.dtype), **SETTINGS)
    assert not recording.faults
    (trace,) = recording.traces
    return trace


def state(model: Any) -> dict[str, Any]:
    """Everything that stands in the ``__dict__`` of the model, its parts and its towers, dictionaries one by one."""
    found = {}
    for root in (model, *model.get_vision_tower_aux_list()):
        for path, module in root.named_modules():
            for name, value in vars(module).items():
                found[id(root), path, name] = dict(value) if isinstance(value, dict) else value
    for config in (model.config,):
        found.update({("config", name): value for name, value in vars(config).items()})
    return found


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    def equal(one: Any, two: Any) -> bool:
        if isinstance(one, dict) and isinstance(two, dict):
            return list(one) == list(two) and all(one[key] is two[key] for key in one)
        return one is two or (type(one) in (int, float, bool, str) and one == two)

    return before.keys() == after.keys() and all(equal(before[key], after[key]) for key in before)


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    before = state(model)
    yield
    assert same(before, state(model))


# ------------------------------------------------------------------------------------------------- record and replay


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("size", [(50, 50), (60, 40), (50, 40), (20, 64)])
def test_a_recorded_answer_replays_on_the_original_model(size: tuple[int, int], attention: str, tmp_path: Path) -> None:
    model, processor = make(attention=attention)
    image = lookalike.picture(*size)
    plain = model.generate(**processor(PROMPT, image), **SETTINGS)
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        out = model.generate(**processor(PROMPT, image), **SETTINGS)
    assert torch.equal(out, plain) and not recording.faults
    (trace,) = recording.traces
    assert trace.token_ids.tolist() == out[0].tolist() and trace.log_probs_source == "generation"
    replay = probe.replay(trace, model, processor)
    assert np.abs(replay.original_log_probs.numpy() - trace.log_probs).max() < 1e-5
    assert np.abs(replay.baseline_log_probs.numpy() - trace.baseline_log_probs).max() < 1e-5
    assert np.abs(trace.llr).max() > 0.1 and trace.model["class"] == "LookalikeForCausalLM"


def test_a_batch_of_masks_is_each_mask_alone(tmp_path: Path) -> None:
    model, processor = make()
    replay = probe.replay(record(model, processor, tmp_path), model, processor)
    masks = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = replay.log_probs(masks, micro_batch=3)
        alone = torch.cat([replay.log_probs(mask[None]) for mask in masks])
        exact = replay.log_probs(masks, mode="exact")
    assert torch.allclose(together, alone, atol=1e-5) and together.std(dim=0).max() > 0.01
    assert (together - exact).abs().max() < 0.05


def test_where_the_image_tokens_lie(tmp_path: Path) -> None:
    """60 × 40 in a square of 60: of four rows of 15 pixels the outer two are half padding, and left out by the model's
    own rule only as far as ⌊(4 − ⌊2.67⌋) / 2⌋ = 1 row on either side goes."""
    model, processor = make()
    trace = record(model, processor, tmp_path, image=lookalike.picture(60, 40))
    layout = trace.layout
    assert len(layout.image_positions) == 2 * 5 and layout.image_positions[0] == 6
    boxes = layout.patch_box.reshape(2, 5, 4)
    assert np.allclose(boxes[0, 0], [0, 5, 15, 20]) and np.allclose(boxes[1, 3], [45, 20, 60, 35])
    assert not boxes[:, 4].any()  # newlines
    assert trace.attention.values.shape[-1] == 10
    heat = probe.explain(trace, method="attention", tokens=(0, 3), size=(8, 4))
    assert not heat.values[0].any() and not heat.values[-1].any()  # rows of pixels that no token has


def test_pictures_may_be_given_instead_of_a_processor_call(tmp_path: Path) -> None:
    model, processor = make()
    image = lookalike.picture()
    inputs = processor(PROMPT, image)  # before attach
    with probe.attach(model, processor) as p, p.record(tmp_path, images=[image]) as recording:
        model.generate(inputs["inputs"], inputs["images"], inputs["image_sizes"], **SETTINGS)
    replay = probe.replay(recording.traces[0], model, processor)
    assert replay.image_sizes == [(50, 40)]


def test_a_script_in_inference_mode_is_recorded(tmp_path: Path) -> None:
    model, processor = make()
    with torch.inference_mode():
        trace = record(model, processor, tmp_path)
    replay = probe.replay(trace, model, processor)
    assert np.abs(replay.original_log_probs.numpy() - trace.log_probs).max() < 1e-5


def test_features_that_generate_left_behind_are_not_used(tmp_path: Path) -> None:
    """The package's forward uses what the last generate() stored: here, that of another picture."""
    model, processor = make()
    trace = record(model, processor, tmp_path)
    other = processor(PROMPT, lookalike.picture(seed=5))
    model.generate(**other, **SETTINGS)
    left = {name: getattr(model, name) for name in lookalike.STATE}
    driver = probed_model(model)
    inputs = driver.arguments((), processor(PROMPT, lookalike.picture()))
    with torch.no_grad():
        made = model.prepare_inputs_labels_for_multimodal(
            processor(PROMPT, lookalike.picture())["inputs"], None, None, None, None,
            [inputs[name] for name in driver.pixel_keys], image_sizes=[(50, 40)],
        )  # fmt: skip
        stale = model(inputs_embeds=made[4], use_cache=False).logits
        right = driver(**inputs).logits
    assert (stale - right).abs().max() > 0.1  # the trap is there
    replay = probe.replay(trace, model, processor)
    assert np.abs(replay.original_log_probs.numpy() - trace.log_probs).max() < 1e-5
    assert all(getattr(model, name) is value for name, value in left.items())


# ---------------------------------------------------------------------------------------------------------- gradients


def test_gates_are_open_during_a_pass_and_shut_after_it(tmp_path: Path) -> None:
    model, processor = make()
    replay = probe.replay(record(model, processor, tmp_path), model, processor)
    towers = model.get_vision_tower_aux_list()
    leaves = {key: replay.path.inputs[key].clone().requires_grad_(True) for key in replay.path.pixel_keys}
    closed = [tower(leaf) for tower, leaf in zip(towers, leaves.values(), strict=True)]
    assert not any(features.requires_grad for features in closed)  # as shipped
    with unchanged(model):
        replay.run_inputs({**replay.path.inputs, **leaves}).sum().backward()
    assert all(float(leaf.grad.abs().max()) > 1e-4 for leaf in leaves.values())
    assert all(tower.unfreeze_mm_vision_tower is False for tower in towers)


def test_a_tower_without_a_flag_is_opened_by_hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = make()
    replay = probe.replay(record(model, processor, tmp_path), model, processor)
    ones = torch.ones(1, 4, 5)

    def gradient() -> torch.Tensor:
        return replay.score_and_grad(ones, lambda log_probs: log_probs.sum(1))[1]

    by_flag = gradient()

    class Shut(lookalike.Tower):
        """A gate without a flag."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            vars(self)["unfreeze_mm_vision_tower"] = False
            try:
                return super().forward(images)
            finally:
                del vars(self)["unfreeze_mm_vision_tower"]

    for tower in model.get_vision_tower_aux_list():
        del tower.unfreeze_mm_vision_tower
        monkeypatch.setattr(tower, "__class__", Shut)
    with unchanged(model):
        by_hooks = gradient()
    assert by_flag.abs().max() > 0.01 and torch.equal(by_hooks, by_flag)
    assert not any(module._forward_pre_hooks for module in replay.model.outside.modules())


def test_the_gradient_of_the_mask_is_the_difference_quotient(tmp_path: Path) -> None:
    model, processor = make()
    for part in (model, *model.get_vision_tower_aux_list()):
        part.double()
    replay = probe.replay(record(model, processor, tmp_path), model, processor)
    mask = torch.full((1, 4, 5), 0.6, dtype=torch.float64)

    def score(log_probs: torch.Tensor) -> torch.Tensor:
        return log_probs.sum(dim=1)

    _, gradient = replay.score_and_grad(mask, score)
    assert gradient.abs().max() > 0.01
    for row, col in [(0, 0), (1, 3), (3, 4), tuple(divmod(int(gradient.abs().argmax()), 5))]:
        step = torch.zeros_like(mask)
        step[0, row, col] = 1e-3
        with torch.no_grad():
            slope = float((score(replay.log_probs(mask + step)) - score(replay.log_probs(mask - step))) / 2e-3)
        assert slope == pytest.approx(float(gradient[0, row, col]), rel=0.01, abs=2e-3)


# ------------------------------------------------------------------------------------------------ explain and evaluate


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("igos++", {"preset": "fast", "size": 4}),
        ("integrated_gradients", {"steps": 4, "size": 4}),
        ("rise", {"masks": 8, "size": 4}),
        ("gradcam", {}),
        ("tmm", {}),
    ],
)
def test_maps_lie_on_the_original_picture(method: str, params: dict[str, Any], tmp_path: Path) -> None:
    model, processor = make()
    replay = probe.replay(record(model, processor, tmp_path), model, processor)
    with unchanged(model):
        heat = probe.explain(replay, method=method, tokens=(0, 5), strengthen=False, **params)
        score = probe.evaluate(heat, replay)
    assert heat.image_size == (50, 40) and heat.values.min() >= 0 and heat.values.max() <= 1
    assert np.isfinite([score.deletion, score.insertion]).all() and score.deletion != score.insertion


def test_every_encoder_has_a_map_of_its_own(tmp_path: Path) -> None:
    model, processor = make()
    replay = probe.replay(record(model, processor, tmp_path), model, processor)
    maps = [
        probe.explain(replay, method="gradcam", tokens=(0, 5), strengthen=False, encoder=name, size=(8, 8))
        for name in ("siglip", "clip", "convnext")
    ]
    assert [heat.params["layer"] for heat in maps] == [
        "outside.0.vision_tower.encoder.layers.1",
        "outside.1.vision_tower.encoder.layers.0",  # hidden state −2
        "outside.2.vision_tower.encoder.stages.1",
    ]
    both = probe.explain(replay, method="gradcam", tokens=(0, 5), strengthen=False, size=(8, 8))
    mean = np.mean([heat.values for heat in maps], axis=0)
    assert np.allclose(both.values, (mean - mean.min()) / (mean.max() - mean.min()), atol=0.02)
    with pytest.raises(probe.errors.ExplainError, match=r"not applicable: outside\.2 is a convolutional encoder"):
        probe.explain(replay, method="tmm", tokens=(0, 5), scope="encoder", encoder="convnext")


def test_the_rest_of_the_road(tmp_path: Path) -> None:
    """Verification, inside views, cutting attention, recomputed layers, another question, a page."""
    model, processor = make()
    points = ("hidden", "encoder", "merger")
    trace = record(model, processor, tmp_path, points=points, question="What?")
    assert {name for name in trace.points if "mm_projector" in name}
    assert probe.verify(trace, model, processor).largest_difference < 1e-5
    replay = probe.replay(trace, model, processor)
    heat = probe.explain(replay, method="rise", masks=8, size=4, tokens=(0, 5), strengthen=False)
    assert np.isfinite(probe.causal.knockout(replay, heat).drop)
    assert probe.explain(trace, method="tam", tokens=(0, 3)).values is not None
    other = probe.explain(replay, method="relative_attention", tokens=(0, 3), strengthen=False)
    assert other.values is not None

    def gradient(through: Any) -> torch.Tensor:
        return through.score_and_grad(torch.ones(1, 3, 3), lambda log_probs: log_probs.sum(1))[1]

    again = probe.replay(trace, model, processor, gradient_checkpointing=True)
    assert torch.equal(gradient(replay), gradient(again))
    probe.compare(replay, methods=["gradcam", "tmm"], out=tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_a_masked_generation_sees_the_masked_picture(tmp_path: Path) -> None:
    model, processor = make()
    image = lookalike.picture()
    plain = model.generate(**processor(PROMPT, image), **SETTINGS)
    with probe.attach(model, processor) as p:
        inputs = processor(PROMPT, image)
        with p.masked(torch.ones(4, 5)):
            assert torch.equal(model.generate(**inputs, **SETTINGS), plain)
        with p.masked(torch.zeros(4, 5), baseline="blank"):
            masked = model.generate(**inputs, **SETTINGS)
        black = model.generate(**processor(PROMPT, Image.new("RGB", image.size)), **SETTINGS)
        assert torch.equal(masked, black) and not torch.equal(masked, plain)
        with p.masked(torch.zeros(4, 5)), pytest.raises(probe.errors.MaskError, match=r"use replay\.log_probs"):
            model(inputs_embeds=torch.zeros(1, 2, 32))


# --------------------------------------------------------------------------------------------------------- left alone


@pytest.mark.parametrize("how", ["detach", "exception", "garbage"])
def test_nothing_is_left_on_the_model(how: str, tmp_path: Path) -> None:
    model, processor = make()
    inputs = processor(PROMPT, lookalike.picture())
    model.generate(**inputs, **SETTINGS)
    before, processor_before = state(model), dict(vars(processor.image_processor))
    embeddings = torch.rand(1, 30, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(inputs_embeds=embeddings, use_cache=False).logits
    p = probe.attach(model, processor)
    assert not same(before, state(model))
    if how == "exception":

        def fail(*_: Any) -> None:
            raise RuntimeError("in the middle")

        handle = model.get_model().layers[1].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"), p, p.record(tmp_path):
            model.generate(**inputs, **SETTINGS)
        handle.remove()
        vars(model).update({name: before[id(model), "", name] for name in lookalike.STATE})  # generate()'s own doing
    elif how == "garbage":
        del p
        gc.collect()
    else:
        p.detach()
    assert same(before, state(model)) and dict(vars(processor.image_processor)) == processor_before
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeddings, use_cache=False).logits, expected)


def test_a_failing_pass_of_ours_leaves_no_open_gate(tmp_path: Path) -> None:
    model, processor = make()
    replay = probe.replay(record(model, processor, tmp_path), model, processor)

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    handle = model.get_model().layers[1].register_forward_hook(fail)
    with unchanged(model), pytest.raises(RuntimeError, match="in the middle"):
        replay.score_and_grad(torch.ones(1, 2, 2), lambda log_probs: log_probs.sum(1))
    handle.remove()


# ----------------------------------------------------------------------------------------------------------- refusals


def test_a_picture_elsewhere_in_the_prompt_is_refused(tmp_path: Path) -> None:
    """One more token in front: the decoder would update other positions than the picture's, without an error."""
    model, processor = make()
    longer = "Hello! <image>\nWhat?"
    with probe.attach(model, processor) as p, p.record(tmp_path / "a") as recording:
        with pytest.warns(probe.ProbeWarning, match=r"stands at position 7 .* config\.image_position = 6"):
            out = model.generate(**processor(longer, lookalike.picture()), **SETTINGS)
    assert out.shape == (1, 5) and not recording.paths
    trace = record(model, processor, tmp_path / "b")
    model.config.image_position = 5
    with pytest.raises(probe.errors.ReplayError, match="stands at position 6"):
        probe.replay(trace, model, processor).log_probs(torch.ones(2, 2))
    model.config.connector_only = True  # then no layer looks for it
    probe.replay(trace, model, processor).log_probs(torch.ones(2, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None, "image_sizes": None}, "the prompt holds no image"),
        ({"image_sizes": None}, "original picture"),
        ({"inputs": torch.tensor([[1, 2, -200]] * 2)}, "one prompt at a time"),
        ({"num_beams": 2}, "first of several beams"),
    ],
)
def test_calls_that_are_not_recorded_say_why(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, processor = make()
    driver = probed_model(model, processor)
    from lvlm_probe.recording.prompt_images import NotRecorded

    with pytest.raises(NotRecorded, match=message):
        driver.arguments((), {**processor(PROMPT, lookalike.picture()), **change})
    model.config.tokenizer_model_max_length = 12
    with pytest.raises(NotRecorded, match="tokenizer_model_max_length = 12"):
        driver.arguments((), processor(PROMPT, lookalike.picture()))


def test_towers_that_are_not_loaded_are_named() -> None:
    model, processor = make()
    model.get_vision_tower_aux_list()[1].is_loaded = False
    with pytest.raises(probe.errors.AttachError, match=r"tower\.load_model\(\)"):
        probe.attach(model, processor)
    assert "generate" not in vars(model)


# ----------------------------------------------------------------------------------------------------- transformers 5


@pytest.mark.parametrize("size", [(50, 50), (60, 40), (20, 64)])
def test_a_decoder_whose_own_forward_is_gone_runs_all_the_same(
    size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder's forward is replaced by its parent's with hooks: the same numbers as its own gave."""
    model, processor = make()
    image = lookalike.picture(*size)
    inputs = processor(PROMPT, image)
    expected = model.generate(**inputs, **SETTINGS)
    driver = probed_model(model, processor)
    arguments = driver.arguments((), inputs)
    with torch.no_grad():
        logits = driver(**arguments).logits

    def gone(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
             use_cache=None, vision_tower_aux_feature_list=None, vision_tower_aux_attention_masks_list=None,
             final_vision_feature_size=None, global_context_feature=None, **kwargs):  # fmt: skip
        raise TypeError("'NoneType' object is not iterable: position_embeddings")

    monkeypatch.setattr(lookalike.LookalikeModel, "forward", gone)
    with pytest.raises(TypeError, match="position_embeddings"):
        model.generate(**inputs, **SETTINGS)
    before = state(model)
    with on_transformers_5(model):
        assert torch.equal(model.generate(**inputs, **SETTINGS), expected)
        with torch.no_grad():
            assert torch.allclose(driver(**arguments).logits, logits, atol=1e-5)
        trace = record(model, processor, tmp_path, image=image)
        replay = probe.replay(trace, model, processor)
        assert np.abs(replay.original_log_probs.numpy() - trace.log_probs).max() < 1e-5
        _, gradient = replay.score_and_grad(torch.ones(1, 4, 5), lambda log_probs: log_probs.sum(1))
        assert gradient.abs().max() > 1e-3
    for name in lookalike.STATE:  # generate()'s own doing
        before[id(model), "", name] = getattr(model, name)
    assert same(before, state(model))


def test_two_threads_update_the_image_tokens_of_their_own_pass_only() -> None:
    """A pass of another thread, from inside of this one's last layer."""
    model, _ = make()
    body = model.get_model()
    generator = torch.Generator().manual_seed(0)

    def given() -> dict[str, Any]:
        def rand(*shape: int) -> torch.Tensor:
            return torch.rand(shape, generator=generator)

        return {
            "inputs_embeds": rand(1, 16, 32),
            "vision_tower_aux_feature_list": [rand(2, size, lookalike.CHANNELS) for size in (1, 1, 4)],
            "vision_tower_aux_attention_masks_list": [torch.ones(2, size, dtype=torch.bool) for size in (1, 1, 4)],
            "final_vision_feature_size": [(1, 2)],
            "global_context_feature": rand(2, 1, lookalike.CHANNELS),
            "use_cache": False,
        }

    one, other = given(), given()
    found: list[torch.Tensor] = []

    def in_between(*_: Any) -> None:
        if not found:
            found.append(torch.empty(0))
            thread = Thread(target=lambda: found.append(run(other)))
            thread.start()
            thread.join()

    @torch.no_grad()
    def run(inputs: dict[str, Any]) -> torch.Tensor:
        value: torch.Tensor = body(**inputs)[0]
        return value

    with on_transformers_5(model):
        alone = run(one), run(other)
        handle = body.layers[3].register_forward_hook(in_between)
        assert torch.equal(run(one), alone[0]) and torch.equal(found[1], alone[1])
        handle.remove()


# ------------------------------------------------------------------------------------------------------ preprocessing


def test_preprocessing_pads_with_the_mean_colour_and_resizes_per_tower() -> None:
    _, processor = make()
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    made = processor.image_processor(image)
    assert [tuple(made[f"pixel_values_{t}"].shape) for t in range(3)] == [(1, 3, side, side) for side in (60, 56, 64)]
    assert made["image_sizes"].tolist() == [[40, 20]]
    first = made["pixel_values_0"][0]
    pad, red = (int(0.48 * 255) / 255 - 0.48) / 0.25, (1 - 0.48) / 0.25
    assert torch.allclose(first[:, 0, 0], torch.tensor([pad] * 3), atol=1e-6)
    assert float(first[0, 30, 30]) == pytest.approx(red, abs=1e-6)
    assert float(first[0, 12, 30]) == pytest.approx(pad, abs=1e-6) and float(first[0, 18, 30]) > 1


def test_the_beginning_of_sequence_stands_in_front_of_the_whole_prompt() -> None:
    class WithBos:
        bos_token_id = 1

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1, *(ord(letter) for letter in text)]}

    assert tokenize(WithBos(), "a<image>b").tolist() == [[1, 97, -200, 98]]
    with pytest.raises(ValueError, match="holds 2 times"):
        tokenize(WithBos(), "<image><image>")
