"""The authors' package by duck type: recorded as its user calls it, replayed and explained, and left as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mini_gemini_lookalike as lookalike
import numpy as np
import pytest
import torch
from lvlm_probe_mini_gemini.original import MiniGeminiDriver, OriginalProcessor, matches, views_of
from PIL import Image
from torch.nn import functional as F

import lvlm_probe as probe
from lvlm_probe.models.drivers import probed_model, register_original
from lvlm_probe.recording.prompt_images import NotRecorded

PROMPT = "Hello <image>\nWhat?"
SETTINGS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}

register_original("mini_gemini", matches=matches, adapt=MiniGeminiDriver)


def make(*, aux: str = "full", **options: Any) -> tuple[Any, OriginalProcessor]:
    model, tokenizer = lookalike.build(**options)
    return model, OriginalProcessor(tokenizer, model.get_vision_tower().image_processor, model.config, aux=aux)


def record(model: Any, processor: Any, folder: Path, *, image: Image.Image | None = None, **options: Any) -> Any:
    """What a user's script does, and its one trace."""
    image = image or lookalike.picture()
    with probe.attach(model, processor) as p, p.record(folder, **options) as recording:
        model.generate(**processor(PROMPT, image, dtype=model.dtype), **SETTINGS)
    assert not recording.faults
    (trace,) = recording.traces
    return trace


def state(model: Any) -> dict[Any, Any]:
    """Everything that stands in the ``__dict__`` of the model, its parts and its config, dictionaries one by one."""
    found: dict[Any, Any] = {("config", name): value for name, value in vars(model.config).items()}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            found[path, name] = dict(value) if isinstance(value, dict) else value
    return found


def same(before: dict[Any, Any], after: dict[Any, Any]) -> bool:
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
@pytest.mark.parametrize("size", [(60, 40), (50, 50), (20, 64)])
@pytest.mark.parametrize("hd", [False, True])
def test_a_recorded_answer_replays_on_the_original_model(
    hd: bool, size: tuple[int, int], attention: str, tmp_path: Path
) -> None:
    model, processor = make(hd=hd, attention=attention)
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
    assert np.abs(trace.llr).max() > 0.1
    assert len(trace.layout.image_positions) == (80 if hd else 16)


def test_the_second_tensor_is_what_the_packages_scripts_make() -> None:
    """HD, by hand: scaled to 2 · 28, the four quarters row by row, then scaled once more to 28."""
    model, processor = make(hd=True)
    inputs = processor(PROMPT, lookalike.picture())
    large = F.interpolate(inputs["images_aux"], size=(56, 56), mode="bilinear", align_corners=False)
    wanted = [large[..., :28, :28], large[..., :28, 28:], large[..., 28:, :28], large[..., 28:, 28:]]
    wanted.append(F.interpolate(large, size=(28, 28), mode="bilinear", align_corners=False))
    assert inputs["images"].shape == (1, 5, 3, 28, 28)
    for view, part in enumerate(wanted):
        assert torch.equal(inputs["images"][:, view], part)
    assert torch.equal(views_of(model.config, inputs["images_aux"], 28), inputs["images"])


def test_a_script_in_inference_mode_is_recorded(tmp_path: Path) -> None:
    model, processor = make()
    with torch.inference_mode():  # as the package's command line does
        trace = record(model, processor, tmp_path)
    replay = probe.replay(trace, model, processor)
    assert np.abs(replay.original_log_probs.numpy() - trace.log_probs).max() < 1e-5


def test_where_the_image_tokens_lie(tmp_path: Path) -> None:
    """60 × 40 padded to 60 × 60: 16 tokens of 15 pixels for the whole, then four crops of 16 at half that size."""
    model, processor = make(hd=True)
    boxes = record(model, processor, tmp_path).layout.patch_box
    assert np.allclose(boxes[0], [0, 0, 15, 5]) and np.allclose(boxes[5], [15, 5, 30, 20])
    assert not boxes[16:20].any()  # the first crop's first row is padding
    assert np.allclose(boxes[20], [0, 0, 7.5, 5]) and np.allclose(boxes[16 + 16 + 15], [52.5, 12.5, 60, 20])
    assert np.allclose(boxes[16 + 32], [0, 20, 7.5, 27.5])  # third crop: lower left


def test_an_answer_as_long_as_the_model_takes_replays(tmp_path: Path) -> None:
    """The package cuts sequences off; prompt and answer together are longer than the prompt that generate() embeds."""
    model, processor = make()
    model.config.tokenizer_model_max_length = len(PROMPT) - len("<image>") + 16
    trace = record(model, processor, tmp_path)
    with unchanged(model):
        replay = probe.replay(trace, model, processor)
        assert np.abs(replay.original_log_probs.numpy() - trace.log_probs).max() < 1e-5
    model.config.tokenizer_model_max_length -= 1
    with pytest.raises(NotRecorded, match="cuts this prompt of 28 tokens off"):
        probed_model(model).arguments((), processor(PROMPT, lookalike.picture()))


# ---------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("hd", [False, True])
def test_gates_of_both_encoders_are_open_during_a_pass(hd: bool, tmp_path: Path) -> None:
    model, processor = make(hd=hd)
    replay = probe.replay(record(model, processor, tmp_path), model, processor)
    towers = model.get_vision_tower(), model.get_vision_tower_aux()
    leaf = replay.path.inputs["pixel_values"].clone().requires_grad_(True)
    assert not towers[0](leaf[..., :28, :28]).requires_grad and not towers[1](leaf).requires_grad  # as shipped

    def gradient() -> torch.Tensor:
        value = replay.run_inputs({"pixel_values": leaf}).sum()
        return torch.autograd.grad(value, leaf)[0]

    with unchanged(model):
        whole = gradient()
    parts = []
    for tower in towers:  # what is left when one of the two is cut from the graph
        handle = tower.register_forward_hook(lambda _m, _a, output: output.detach())
        parts.append(gradient())
        handle.remove()
    assert all(float((whole - part).abs().max()) > 0.01 * float(whole.abs().max()) for part in parts)
    assert not any(tower.is_optimize for tower in towers)


@pytest.mark.parametrize("hd", [False, True])
def test_the_gradient_of_the_mask_is_the_difference_quotient(hd: bool, tmp_path: Path) -> None:
    model, processor = make(hd=hd)
    replay = probe.replay(record(model.double(), processor, tmp_path), model, processor)
    mask = torch.full((1, 4, 5), 0.6, dtype=torch.float64)

    def score(log_probs: torch.Tensor) -> torch.Tensor:
        return log_probs.sum(dim=1)

    _, gradient = replay.score_and_grad(mask, score)
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
@pytest.mark.parametrize("hd", [False, True])
def test_maps_lie_on_the_original_picture(hd: bool, method: str, params: dict[str, Any], tmp_path: Path) -> None:
    model, processor = make(hd=hd)
    replay = probe.replay(record(model, processor, tmp_path), model, processor)
    with unchanged(model):
        heat = probe.explain(replay, method=method, tokens=(0, 5), strengthen=False, **params)
        score = probe.evaluate(heat, replay)
    assert heat.image_size == (60, 40) and heat.values.min() >= 0 and heat.values.max() <= 1
    assert np.isfinite([score.deletion, score.insertion]).all() and score.deletion != score.insertion


def test_each_encoder_has_a_map_of_its_own(tmp_path: Path) -> None:
    model, processor = make()
    replay = probe.replay(record(model, processor, tmp_path), model, processor)
    layers = {
        name: probe.explain(replay, method="gradcam", tokens=(0, 5), strengthen=False, encoder=name).params["layer"]
        for name in ("clip", "convnext")
    }
    assert layers["clip"] == "original.model.vision_tower.vision_tower.encoder.layers.0"  # hidden state −2
    assert layers["convnext"] == "original.model.vision_tower_aux.vision_tower.encoder.stages.1"
    with pytest.raises(
        probe.errors.ExplainError, match=r"not applicable: .*vision_tower_aux is a convolutional encoder"
    ):
        probe.explain(replay, method="tmm", tokens=(0, 5), scope="encoder", encoder="convnext")


@pytest.mark.parametrize("hd", [False, True])
def test_without_the_second_encoder_as_published(hd: bool, tmp_path: Path) -> None:
    """One grid of CLIP tokens and no mining, which the model's own parts put together say as well."""
    model, processor = make(aux="none", hd=hd)
    image = lookalike.picture()
    inputs = processor(PROMPT, image)
    assert inputs.keys() == {"inputs", "images"} and inputs["images"].shape == (1, 3, 28, 28)
    driver = probed_model(model, processor)
    arguments = driver.arguments((), inputs)
    assert int((arguments["input_ids"] == driver.placeholder).sum()) == 16
    body, ids = model.get_model(), inputs["inputs"][0]
    calls: list[int] = []
    body.vision_tower(inputs["images"])  # transformers installs something of its own at a first call
    handle = body.vision_tower_aux.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), unchanged(model):
        logits = driver(**arguments).logits
        features = body.mm_projector(body.vision_tower(inputs["images"]))[0]
        at = ids.tolist().index(-200)
        embeddings = torch.cat([body.embed_tokens(ids[:at]), features, body.embed_tokens(ids[at + 1 :])])
        wanted = model(inputs_embeds=embeddings[None]).logits
    handle.remove()
    assert torch.allclose(logits, wanted, atol=1e-5) and not calls
    if not hd:  # the unmodified package itself takes one picture without crops for the plain model only
        replay = probe.replay(record(model, processor, tmp_path, image=image), model, processor)
        assert replay.path.pixel_keys == ("pixel_values_low",)
        heat = probe.explain(replay, method="gradcam", tokens=(0, 5), strengthen=False)
        assert heat.params["layer"].startswith("original.model.vision_tower.")


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


def test_beams_and_several_answers_are_recorded(tmp_path: Path) -> None:
    model, processor = make()
    inputs = processor(PROMPT, lookalike.picture())
    settings = {"max_new_tokens": 4, "min_new_tokens": 4}
    with probe.attach(model, processor) as p, p.record(tmp_path, images=[lookalike.picture()]) as recording:
        beams = model.generate(**inputs, **settings, num_beams=2, do_sample=False)
        several = model.generate(**inputs, **settings, num_return_sequences=2, do_sample=True)
    assert not recording.faults
    answers = [trace.token_ids.tolist() for trace in recording.traces]
    assert answers == [*beams.tolist(), *several.tolist()]
    for trace in recording.traces:
        assert probe.verify(trace, model, processor).largest_difference < 1e-5


def test_a_masked_generation_sees_the_masked_picture() -> None:
    model, processor = make(hd=True)
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


# --------------------------------------------------------------------------------------------------------- left alone


@pytest.mark.parametrize("how", ["detach", "exception", "garbage"])
def test_nothing_is_left_on_the_model(how: str, tmp_path: Path) -> None:
    model, processor = make()
    inputs = processor(PROMPT, lookalike.picture())
    with torch.no_grad():  # also has transformers install what it installs at a first call
        expected = model(inputs["inputs"], images=inputs["images"], images_aux=inputs["images_aux"]).logits
    before, processor_before = state(model), dict(vars(processor.image_processor))
    p = probe.attach(model, processor)
    assert not same(before, state(model))
    if how == "exception":

        def fail(*_: Any) -> None:
            raise RuntimeError("in the middle")

        handle = model.get_model().layers[1].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"), p, p.record(tmp_path):
            model.generate(**inputs, **SETTINGS)
        handle.remove()
    elif how == "garbage":
        del p
        gc.collect()
    else:
        p.detach()
    assert same(before, state(model)) and dict(vars(processor.image_processor)) == processor_before
    with torch.no_grad():
        again = model(inputs["inputs"], images=inputs["images"], images_aux=inputs["images_aux"]).logits
    assert torch.equal(again, expected)


# ----------------------------------------------------------------------------------------------------------- refusals


def test_a_model_without_the_modules_between_its_encoders_is_refused(tmp_path: Path) -> None:
    model, processor = make(initialised=False)
    with pytest.raises(probe.errors.AttachError, match=r"initialize_uni_modules\(model\.config, for_eval=True\)"):
        probe.attach(model, processor)
    with pytest.raises(probe.errors.ReplayError, match="vlm_uni_query_projector"):
        probed_model(model)(torch.ones(1, 3).long(), pixel_values=torch.zeros(1, 3, 64, 64))
    alone = OriginalProcessor(processor.tokenizer, model.get_vision_tower().image_processor, model.config, aux="none")
    trace = record(model, alone, tmp_path)
    assert np.isfinite(trace.llr).all()


def test_towers_that_are_not_loaded_are_named() -> None:
    model, processor = make()
    model.get_vision_tower_aux().is_loaded = False
    with pytest.raises(probe.errors.AttachError, match=r"get_vision_tower_aux\(\)\.load_model\(\)"):
        probe.attach(model, processor)


def test_tensors_that_do_not_belong_together_are_not_recorded(tmp_path: Path) -> None:
    model, processor = make()
    inputs, other = (processor(PROMPT, lookalike.picture(seed=seed)) for seed in (0, 1))
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        with pytest.warns(probe.ProbeWarning, match="images is not images_aux scaled down"):
            model.generate(**{**inputs, "images": other["images"]}, **SETTINGS)
    assert not recording.paths


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "the prompt holds no image"),
        ({"inputs": torch.tensor([[1, 2, -200]] * 2)}, "one prompt at a time"),
        ({"inputs": torch.tensor([[1, 2, 3]])}, "the prompt holds 0 images"),
        ({"images": torch.zeros(1, 5, 3, 28, 28), "images_aux": None}, "recorded on one picture"),
    ],
)
def test_calls_that_are_not_recorded_say_why(change: dict[str, Any], message: str) -> None:
    model, processor = make()
    with pytest.raises(NotRecorded, match=message):
        probed_model(model, processor).arguments((), {**processor(PROMPT, lookalike.picture()), **change})


# ------------------------------------------------------------------------------------------------------ preprocessing


def test_preprocessing_pads_with_the_mean_colour() -> None:
    _, processor = make()
    made = processor.image_processor(Image.new("RGB", (40, 20), (255, 0, 0)))["pixel_values"]
    assert made.shape == (1, 3, 64, 64)
    for channel, (mean, std) in enumerate(zip([0.48, 0.45, 0.41], [0.26, 0.26, 0.27], strict=True)):
        assert float(made[0, channel, 0, 0]) == pytest.approx((int(mean * 255) / 255 - mean) / std, abs=1e-5)
        colour = 1.0 if channel == 0 else 0.0
        assert float(made[0, channel, 32, 32]) == pytest.approx((colour - mean) / std, abs=1e-5)
    with pytest.raises(ValueError, match='aux is "full" or "none"'):
        OriginalProcessor(processor.tokenizer, processor.image_processor, processor.config, side=28, aux="half")
