"""The native model as a transformers model: generation, saving, options, errors. Tiny, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lvlm_probe_mini_gemini import MiniGeminiConfig, MiniGeminiForConditionalGeneration, register
from lvlm_probe_mini_gemini.mining import PatchInfoMining, crops, low_resolution_views, resize
from mini_gemini_tiny import KINDS, build, chat, inputs, picture, settings
from torch.nn.functional import layer_norm, linear
from transformers import AutoConfig, AutoModelForImageTextToText


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _stepwise(model: Any, given: dict[str, Any], steps: int) -> torch.Tensor:
    """Greedy decoding by hand: the whole sequence through the model for every token, no cache."""
    ids = given["input_ids"]
    for _ in range(steps):
        with torch.no_grad():
            logits = model(ids, pixel_values=given["pixel_values"], use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_is_the_model_stepped_by_hand(kind: str, attention: str) -> None:
    model, processor = build(kind, attention=attention)
    given = inputs(processor, picture())
    found = model.generate(**given, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, _stepwise(model, given, 6))
    assert not torch.equal(
        found, model.generate(**inputs(processor, picture(seed=1)), max_new_tokens=6, do_sample=False)
    )


def test_pictures_are_encoded_once(kind: str) -> None:
    model, processor = build(kind)
    calls: list[str] = []
    for name in ("vision_tower", "vision_tower_aux"):
        model.model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    model.generate(**inputs(processor, picture()), max_new_tokens=5, do_sample=False)
    assert calls == ["vision_tower", "vision_tower_aux"]


def test_a_batch_padded_on_the_left_is_its_rows(kind: str) -> None:
    model, processor = build(kind)
    images, questions = [picture(), picture(30, 50, seed=1)], ["What?", "Which colour is it?"]
    texts = [f"<image>\n{question}" for question in questions]
    batch = processor(text=texts, images=images, return_tensors="pt", padding=True)
    assert (batch["attention_mask"][0] == 0).any()
    found = model.generate(**batch, max_new_tokens=5, do_sample=False)
    for row, (image, question) in enumerate(zip(images, questions, strict=True)):
        alone = model.generate(**inputs(processor, image, question), max_new_tokens=5, do_sample=False)
        assert found[row, -5:].tolist() == alone[0, -5:].tolist()


def test_beams_sampling_and_penalties(kind: str) -> None:
    """Prompts hold placeholders outside the vocabulary, which logits processors look up in the scores."""
    model, processor = build(kind)
    assert processor.image_token_id >= model.config.text_config.vocab_size
    given = inputs(processor, picture())
    length = given["input_ids"].shape[1]
    beams = model.generate(**given, max_new_tokens=5, num_beams=3, do_sample=False, repetition_penalty=1.3)
    assert beams.shape == (1, length + 5)
    several = model.generate(**given, max_new_tokens=4, num_beams=3, num_return_sequences=3, do_sample=False)
    assert len({tuple(row.tolist()) for row in several}) == 3
    torch.manual_seed(0)
    sampled = model.generate(**given, max_new_tokens=5, do_sample=True, top_p=0.9, no_repeat_ngram_size=2)
    assert int(sampled[:, length:].max()) < model.config.text_config.vocab_size


def test_repetition_penalty_by_hand(kind: str) -> None:
    """Scores of tokens that occurred are divided by it, or multiplied where negative; placeholders are token 0."""
    model, processor = build(kind)
    given = inputs(processor, picture())
    ids = given["input_ids"]
    for _ in range(5):
        with torch.no_grad():
            scores = model(ids, pixel_values=given["pixel_values"], use_cache=False).logits[0, -1]
        occurred = sorted({0 if token == processor.image_token_id else token for token in ids[0].tolist()})
        for token in occurred:
            scores[token] = scores[token] / 1.7 if scores[token] > 0 else scores[token] * 1.7
        ids = torch.cat([ids, scores.argmax()[None, None]], dim=1)
    found = model.generate(**given, max_new_tokens=5, do_sample=False, repetition_penalty=1.7)
    assert torch.equal(found, ids)


def test_beams_of_a_batch_are_those_of_its_rows(kind: str) -> None:
    model, processor = build(kind)
    images = [picture(), picture(30, 50, seed=1)]
    batch = processor(text=["<image>\nWhat?"] * 2, images=images, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    found = model.generate(**batch, **options)
    for row, image in enumerate(images):
        assert torch.equal(found[row], model.generate(**inputs(processor, image), **options)[0])


def test_two_pictures_in_one_prompt() -> None:
    model, processor = build("plain")
    first, second = picture(), picture(seed=1)
    given = processor(text="<image>\n<image>\nCompare.", images=[first, second], return_tensors="pt")
    swapped = processor(text="<image>\n<image>\nCompare.", images=[second, first], return_tensors="pt")
    with torch.no_grad():
        assert not torch.allclose(model(**given).logits, model(**swapped).logits, atol=1e-3)
    assert model.generate(**given, max_new_tokens=3, do_sample=False).shape[1] == given["input_ids"].shape[1] + 3


def test_text_alone(kind: str) -> None:
    model, processor = build(kind)
    given = processor(text="What is red?", return_tensors="pt")
    found = model.generate(**given, max_new_tokens=4, do_sample=False)
    language = model.model.language_model
    with torch.no_grad():
        states = language(input_ids=given["input_ids"]).last_hidden_state
        assert torch.equal(model(**given).logits, model.lm_head(states))
    assert found.shape[1] == given["input_ids"].shape[1] + 4


def test_logits_to_keep_and_labels(kind: str) -> None:
    model, processor = build(kind)
    given = inputs(processor, picture())
    labels = given["input_ids"].masked_fill(given["input_ids"] == processor.image_token_id, -100)
    with torch.no_grad():
        whole = model(**given, labels=labels)
        assert torch.allclose(model(**given, logits_to_keep=3).logits, whole.logits[:, -3:], atol=1e-6)
    log_probs = whole.logits[0, :-1].log_softmax(dim=-1)
    targets = labels[0, 1:]
    own = -log_probs[targets >= 0].gather(1, targets[targets >= 0][:, None]).mean()
    assert float(whole.loss) == pytest.approx(float(own), abs=1e-5)


def test_saved_and_loaded_is_the_same(kind: str, tmp_path: Path) -> None:
    register()
    model, processor = build(kind)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(again, MiniGeminiForConditionalGeneration)
    for config in (again.config, AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(config, MiniGeminiConfig)
        for name in ("image_size_aux", "image_grid", "image_global", "aux", "image_token_id", "vision_feature_layer"):
            assert getattr(config, name) == getattr(model.config, name)
        assert config.image_tokens() == model.config.image_tokens()
        assert config.vision_aux_config.depths == model.config.vision_aux_config.depths
    state = model.state_dict()
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    for weight in again.parameters():  # read in place, a file's tensors are aligned otherwise, and so is their rounding
        weight.data = weight.data.clone()
    given = inputs(processor, picture())
    with torch.no_grad():
        assert torch.equal(model(**given).logits, again.eval()(**given).logits)


def test_aux_none_by_argument_attribute_and_processor(kind: str) -> None:
    model, processor = build(kind)
    image = picture()
    given = inputs(processor, image, aux="none")
    assert given["pixel_values"].shape[-2:] == (28, 28)
    calls: list[int] = []
    model.model.vision_tower_aux.register_forward_hook(lambda *_: calls.append(1))
    options = {"max_new_tokens": 4, "do_sample": False}
    by_argument = model.generate(**given, **options, aux="none")
    assert torch.equal(by_argument, model.generate(**given, **options))  # the pictures' size says it too
    model.config.aux = "none"
    assert torch.equal(by_argument, model.generate(**given, **options))
    processor.image_processor.aux = "none"
    again = inputs(processor, image)
    assert torch.equal(again["pixel_values"], given["pixel_values"])
    assert torch.equal(again["input_ids"], given["input_ids"])
    assert not calls
    with pytest.raises(ValueError, match=r"with aux='none' this model takes pictures of 28 × 28"):
        model(**inputs(processor, image, aux="full"))
    with pytest.raises(ValueError, match=r"with aux='full' this model takes pictures of"):
        model(**given, aux="full")
    with pytest.raises(ValueError, match="takes none at all"):
        model(**given, pixel_values_low=given["pixel_values"])


def test_gradient_checkpointing_gives_the_same_gradient(kind: str) -> None:
    model, processor = build(kind)
    given = inputs(processor, picture())

    def gradient() -> torch.Tensor:
        pixels = given["pixel_values"].clone().requires_grad_()
        score = model(**{**given, "pixel_values": pixels}, use_cache=False).logits[0, -1].log_softmax(-1)[7]
        return torch.autograd.grad(score, [pixels])[0]

    plain = gradient()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert torch.allclose(gradient(), plain, atol=1e-7)
    assert plain.abs().max() > 1e-4


def test_low_precision_runs() -> None:
    model, processor = build("hd", dtype=torch.bfloat16)
    given = inputs(processor, picture()).to(torch.bfloat16)
    exact, _ = build("hd")
    with torch.no_grad():
        found = model(**given).logits.float()
        wanted = exact(**inputs(processor, picture())).logits
    assert found.isfinite().all()
    assert float((found - wanted).norm() / wanted.norm()) < 0.1


def test_errors_say_what_and_how(kind: str) -> None:
    model, processor = build(kind)
    given = inputs(processor, picture())
    count = model.config.image_tokens()
    with pytest.raises(ValueError, match="there are no pixel_values"):
        model(input_ids=given["input_ids"])
    with pytest.raises(ValueError, match=rf"has {count - 1} image placeholders.*{count} features"):
        short = given["input_ids"][:, 1:]
        model(input_ids=short, pixel_values=given["pixel_values"])
    with pytest.raises(ValueError, match="prepare them with the model's own processor"):
        model(input_ids=given["input_ids"], pixel_values=torch.zeros(1, 3, 20, 20))
    with pytest.raises(ValueError, match="aux is 'full' or 'none'; got 'half'"):
        model(**given, aux="half")
    with pytest.raises(ValueError, match=r"pixel_values_low has shape"):
        model(**given, pixel_values_low=torch.zeros(1, 3, 3, 28, 28))


def test_configuration_refuses_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="belongs to a grid of crops"):
        MiniGeminiConfig(**settings("plain", image_global=True))
    with pytest.raises(ValueError, match="do not divide; take a multiple"):
        MiniGeminiConfig(**settings("plain", image_size_aux=72))
    with pytest.raises(ValueError, match="aux is 'full' or 'none'; got 'half'"):
        MiniGeminiConfig(**settings("plain", aux="half"))


def test_default_sizes_are_the_published_ones() -> None:
    plain, large = MiniGeminiConfig(), MiniGeminiConfig.hd()
    assert (plain.image_size_aux, plain.image_tokens(), plain.image_tokens("none")) == (768, 576, 576)
    assert (large.image_size_aux, large.image_tokens(), large.image_tokens("none")) == (1536, 2880, 576)
    assert sum(plain.vision_aux_config.hidden_sizes) == 2880


# ------------------------------------------------------------------------------------------------ the parts, by hand


def test_crops_row_by_row() -> None:
    picture = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert crops(picture, 2)[0, :, 0].tolist() == [
        [[0, 1], [4, 5]], [[2, 3], [6, 7]], [[8, 9], [12, 13]], [[10, 11], [14, 15]],
    ]  # fmt: skip


def test_resize_by_hand() -> None:
    """Halving without antialiasing takes the mean of the two middle elements on each axis."""
    row = torch.tensor([0.0, 1.0, 5.0, 9.0, 2.0, 4.0, 6.0, 6.0])
    halved = resize(row.expand(1, 1, 8, 8).contiguous(), 4)
    assert halved[0, 0, 0].tolist() == [0.5, 7.0, 3.0, 6.0]
    # From 8 to 2 the centres lie between elements 1 and 2, and 5 and 6: elements 0, 3, 4 and 7 are not read at all.
    assert resize(row.expand(1, 1, 8, 8).contiguous(), 2)[0, 0, 0].tolist() == [3.0, 5.0]


def test_whole_picture_is_made_from_the_crops_resolution() -> None:
    pixels = torch.rand(1, 3, 24, 24)
    views = low_resolution_views(pixels, 4, 2, True)
    assert views.shape == (1, 5, 3, 4, 4)
    large = resize(pixels, 8)
    assert torch.equal(views[0, 1], large[0, :, :4, 4:]) and torch.equal(views[0, 2], large[0, :, 4:, :4])
    assert torch.equal(views[0, 4], resize(large, 4)[0])
    assert not torch.allclose(views[0, 4], resize(pixels, 4)[0])


def test_mining_by_loops() -> None:
    torch.manual_seed(0)
    module = PatchInfoMining(6, 5).double()
    tokens, picture = torch.randn(2, 4, 6).double(), torch.randn(2, 5, 6, 6).double()
    found = module(tokens, picture)

    def part(which: torch.nn.Sequential, value: torch.Tensor) -> torch.Tensor:
        norm, project = which
        return linear(
            layer_norm(value, norm.normalized_shape, norm.weight, norm.bias, norm.eps), project.weight, project.bias
        )

    for batch in range(2):
        for row in range(2):
            for col in range(2):
                x = tokens[batch, row * 2 + col]
                cells = [picture[batch, :, row * 3 + i, col * 3 + j] for i in range(3) for j in range(3)]
                scores = torch.stack([part(module.query, x) @ part(module.key, cell) / 6**0.5 for cell in cells])
                values = torch.stack([part(module.value, cell) for cell in cells])
                wanted = x + scores.softmax(0) @ values
                assert torch.allclose(found[batch, row * 2 + col], wanted, atol=1e-12)


def test_chat_helper_is_a_user_turn() -> None:
    _, processor = build("plain")
    given = processor.apply_chat_template(
        chat("What?", picture()), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert int((given["input_ids"] == processor.image_token_id).sum()) == 16
    assert given["pixel_values"].shape == (1, 3, 64, 64)
