"""Parts of a prompt: values against plain forward passes made by hand, shares against all orders of the parts."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from scipy.integrate import trapezoid
from toy_clip import ToyClip, tube_weights

import lvlm_probe as probe
from lvlm_probe import causal
from lvlm_probe.causal.parts import Modalities, PartShares
from lvlm_probe.errors import ExplainError, ReplayError, ReportError
from lvlm_probe.serving.journal import Journal

QUESTION = "Is it red"


def conversation(images: int) -> list[dict[str, Any]]:
    """Two questions, the first of them answered; the images stand in the first."""
    return [
        {"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "the small dog"}]},
        {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
    ]


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The third turn of a conversation about two images, on a tiny model."""
    model, processor = tiny_models.build("llava")
    text = processor.apply_chat_template(conversation(2), add_generation_prompt=True)
    pictures = [tiny_models.picture(seed=seed) for seed in (0, 1)]
    with probe.attach(model, processor) as p, p.record(tmp_path_factory.mktemp("talk")) as recording:
        inputs = processor(images=pictures, text=text, return_tensors="pt")
        model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    return probe.replay(recording.traces[0], model, processor)


def by_hand(replay: Any, shown: tuple[bool, ...], unread: set[int]) -> np.ndarray:
    """log P of the answer's tokens by one plain pass: the processor on images or their baselines, and a mask written
    out pair by pair, in which what is unread is seen by nobody else."""
    pictures = [replay.image(k) if there else replay.baseline_image(k) for k, there in enumerate(shown)]
    pixels = replay.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    ids = torch.cat([torch.tensor(replay.trace.input_ids).long(), replay.token_ids[:-1]])
    mask = torch.full((1, 1, len(ids), len(ids)), torch.finfo(torch.float32).min)
    for query, key in itertools.product(range(len(ids)), repeat=2):
        ends = query in unread and query + 1 not in unread  # it predicts what follows: blind as well
        if key <= query and (key not in unread or (query in unread and not ends)):
            mask[0, 0, query, key] = 0
    with torch.no_grad():
        logits = replay.model(input_ids=ids[None], pixel_values=pixels, attention_mask=mask).logits[0]
    log_probs = logits.double().log_softmax(-1)[len(replay.trace.input_ids) - 1 :]
    return log_probs.gather(1, replay.token_ids[:, None])[:, 0].numpy()


def places(replay: Any, text: str) -> set[int]:
    """Positions of a text in the prompt, from the tokens' own texts."""
    ids, tokenizer = replay.trace.input_ids.tolist(), replay.processor.tokenizer
    for spelled in (text, f" {text}"):
        wanted = tokenizer(spelled, add_special_tokens=False)["input_ids"]
        if found := [k for k in range(len(ids)) if ids[k : k + len(wanted)] == wanted]:
            return set(range(found[0], found[0] + len(wanted)))
    raise AssertionError(text)


# ------------------------------------------------------------------------------------------------- a text is not read


@pytest.mark.parametrize("text", ["What is this?", "the small dog", QUESTION])
def test_a_text_that_is_not_read(talk: Any, text: str) -> None:
    deaf = talk.without(text)
    assert set(deaf.unread) == places(talk, text)
    expected = by_hand(talk, (True, True), places(talk, text))
    np.testing.assert_allclose(deaf.log_probs(None)[0], expected, atol=1e-4)
    assert np.abs(expected - talk.log_probs(None)[0].numpy()).max() > 1e-3
    assert deaf.origin["unread"] == list(deaf.unread) and "unread" not in talk.origin


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "paligemma", "mllama"])
def test_what_an_unread_text_says_makes_no_difference(name: str, tmp_path: Any) -> None:
    """In decoders that look both ways, number positions their own way, or read the image by cross-attention."""
    model, processor = tiny_models.build(name)
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        inputs = tiny_models.inputs(name, model, processor, [tiny_models.picture()], "What is this?")
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    replay = probe.replay(recording.traces[0], model, processor)
    deaf = replay.without()
    before = [view.log_probs(None)[0] for view in (replay, deaf)]

    def other_words(_module: Any, _args: Any, states: torch.Tensor) -> torch.Tensor:
        states = states.clone()
        states[:, list(deaf.unread)] += 3 * torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(0))
        return states

    hook = model.get_input_embeddings().register_forward_hook(other_words)
    after = [view.log_probs(None)[0] for view in (replay, deaf)]
    hook.remove()
    assert (before[0] - after[0]).abs().max() > 1e-3
    assert torch.allclose(before[1], after[1], atol=1e-5)


def test_an_answer_token_that_is_not_read(talk: Any) -> None:
    place = talk.prompt_length + 1
    found = talk.without([place]).log_probs(None)[0]
    np.testing.assert_allclose(found, by_hand(talk, (True, True), {place}), atol=1e-4)
    np.testing.assert_allclose(found[:2], talk.log_probs(None)[0][:2], atol=1e-5)  # it comes later


def test_masks_gradients_and_views_are_of_the_deaf_answer(talk: Any) -> None:
    deaf = talk.without()
    assert set(deaf.unread) == places(talk, QUESTION)
    assert set(deaf.without("the small dog").unread) == places(talk, QUESTION) | places(talk, "the small dog")
    assert torch.equal(deaf.original_log_probs, deaf.log_probs(None)[0])
    assert not torch.equal(deaf.original_log_probs, talk.original_log_probs)
    mask = torch.full((3, 2, 2, 2), 0.5)
    scores, gradient = deaf.score_and_grad(mask, lambda log_probs: log_probs.sum(1))
    assert torch.allclose(scores, deaf.log_probs(mask).sum(1), atol=1e-4)
    step = torch.zeros_like(mask)
    step[:, 0, 0, 0] = 1e-2
    slope = (deaf.log_probs(mask + step).double().sum(1) - deaf.log_probs(mask - step).double().sum(1)) / 2e-2
    assert torch.allclose(gradient[:, 0, 0, 0].double(), slope, rtol=0.05, atol=2e-3)


@pytest.mark.parametrize(
    ("text", "said"),
    [("nowhere", "no run of tokens"), ([10**6], "positions of text"), ([], "positions of text"), (" ", "name it")],
)
def test_what_cannot_be_left_unread(talk: Any, text: Any, said: str) -> None:
    with pytest.raises(ReplayError, match=said):
        talk.without(text)
    with pytest.raises(ReplayError, match="positions of text"):
        talk.without(talk.trace.layout.image_positions[:1].tolist())


def test_a_journal_keeps_the_two_apart(talk: Any) -> None:
    journal = Journal(None)
    mask = torch.ones(1, 2, 1, 1)
    with torch.no_grad():
        whole, deaf = (view.journalled(journal).log_probs(mask) for view in (talk, talk.without()))
    assert len(journal) == 2 and not torch.equal(whole, deaf)


# --------------------------------------------------------------------------------------------------------- their shares


def test_shares_of_images_and_turns_are_the_mean_over_all_orders(talk: Any) -> None:
    found = causal.which_parts(talk, "all", tokens=[1, 3], progress=False)
    assert [part.split(":")[0] for part in found.parts] == [
        "image 1", "image 2", "turn 1, user", "turn 2, assistant", "turn 3, user",
    ]  # fmt: skip
    replay = talk.strengthened(probe.select_tokens(talk, indices=[1, 3]).decided)
    texts = ["What is this?", "the small dog", QUESTION]
    v = {}
    for coalition in itertools.product((False, True), repeat=5):
        gone = {p for text, there in zip(texts, coalition[2:], strict=True) if not there for p in places(talk, text)}
        v[coalition] = by_hand(replay, coalition[:2], gone)[[1, 3]].sum()
    expected = np.zeros(5)
    orders = list(itertools.permutations(range(5)))
    for order in orders:
        for place, player in enumerate(order):
            there = tuple(k in order[:place] for k in range(5))
            expected[player] += v[tuple(k in order[: place + 1] for k in range(5))] - v[there]
    np.testing.assert_allclose(found.shares, expected / len(orders), atol=2e-3)
    assert sum(found.shares) == pytest.approx(found.total, abs=1e-6)
    assert found.total == pytest.approx(v[(True,) * 5] - v[(False,) * 5], abs=2e-3)
    assert found.passes <= 2**5 + 6  # and those on baselines
    np.testing.assert_allclose(np.sum(found.by_word, axis=0), found.shares, atol=1e-9)
    assert PartShares.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_texts_of_the_prompt_are_parts(talk: Any) -> None:
    turns = causal.which_parts(talk, "turns", tokens=[1], progress=False)
    texts = causal.which_parts(talk, ["What is this?", "the small dog", QUESTION], tokens=[1], progress=False)
    assert texts.shares == pytest.approx(turns.shares, abs=1e-6)
    assert texts.parts[0] == "“What is this?”"
    for parts, said in (("pages", "'images', 'turns'"), ([], "one text or several"), ([QUESTION, "red"], "inside")):
        with pytest.raises(ExplainError, match=said):
            causal.which_parts(talk, parts)


@pytest.mark.filterwarnings("ignore:every pixel:lvlm_probe.errors.ProbeWarning")
def test_the_image_that_is_asked_about_has_the_share(demo: Any, tmp_path: Any) -> None:
    """Of three images the first and the last are blank, which is what their baseline is too."""
    model, processor = demo
    scene = probe.demo.scenes(1, seed=3)[0]
    blank = Image.new("RGB", scene.image.size, (127, 127, 127))
    messages = [{"role": "user", "content": [*[{"type": "image"}] * 3, {"type": "text", "text": scene.question}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        inputs = processor(images=[blank, scene.image, blank], text=text, return_tensors="pt")
        model.generate(**inputs, max_new_tokens=12)
    replay = probe.replay(recording.traces[0], model, processor)
    found = causal.which_parts(replay, progress=False)
    assert found.parts == ("image 1", "image 2", "image 3")
    assert abs(found.shares[0]) + abs(found.shares[2]) < 1e-3
    assert found.shares[1] == pytest.approx(found.total, abs=1e-3) and found.total > 1
    assert "image 2" in str(found) and f"{found.total:+.2f}" in str(found)


def test_a_video_is_one_part() -> None:
    toy = ToyClip(tube_weights(4, 2, slice(1, 3), slice(0, 1), slice(0, 2)))
    found = causal.which_parts(toy, tokens=[0], progress=False)
    assert found.parts == ("video 1",) and found.passes == 2
    assert found.shares[0] == pytest.approx(np.log(0.9 / 0.01), abs=1e-5)
    for parts in ("turns", "all", ["a text"]):
        with pytest.raises(ExplainError, match="replay on the model itself"):
            causal.which_parts(toy, parts)


# --------------------------------------------------------------------------------------------------- image and question


def test_where_the_text_alone_answers(tmp_path: Any) -> None:
    """No image reaches the decoder of this model: all is the question's, and nothing is of both together."""
    model, processor = tiny_models.build("llava", seed=1)
    with torch.no_grad():
        for weight in model.model.multi_modal_projector.parameters():
            weight.zero_()
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        inputs = tiny_models.inputs("llava", model, processor, [tiny_models.picture()], QUESTION)
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    found = causal.modalities(probe.replay(recording.traces[0], model, processor))
    assert not any(found.image) and not any(found.together)
    assert found.question == pytest.approx(np.subtract(found.both, found.neither), abs=1e-6) and any(found.question)
    assert found.verdict.startswith("The question gives")


def test_image_question_and_both_together(talk: Any) -> None:
    found = causal.modalities(talk)
    replay = talk.strengthened(probe.select_tokens(talk, rule="joint").decided)
    if probe.select_tokens(talk):
        replay = talk.strengthened(probe.select_tokens(talk).decided)
    asked = places(talk, QUESTION)
    v = {
        (image, read): by_hand(replay, (image, image), set() if read else asked)
        for image, read in itertools.product((True, False), repeat=2)
    }
    spans = [slice(word.start, word.stop) for word in talk.words]

    def expected(*terms: tuple[int, bool, bool]) -> list[float]:
        return [sum(sign * v[image, read][span].sum() for sign, image, read in terms) for span in spans]

    assert found.image == pytest.approx(expected((1, True, False), (-1, False, False)), abs=2e-3)
    assert found.question == pytest.approx(expected((1, False, True), (-1, False, False)), abs=2e-3)
    together = expected((1, True, True), (-1, False, True), (-1, True, False), (1, False, False))
    assert found.together == pytest.approx(together, abs=4e-3)
    np.testing.assert_allclose(
        np.sum([found.image, found.question, found.together], axis=0), np.subtract(found.both, found.neither), atol=1e-9
    )
    assert found.words == tuple(word.text for word in talk.words) and found.asked == QUESTION
    assert Modalities.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.quick
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((-1.0, -1.2, -6.0, -6.0), "The question gives “red” without the image, which adds +0.20 nats"),
        ((-1.0, -6.0, -1.2, -6.0), "The image gives “red” without the question, which adds +0.20 nats"),
        ((-1.0, -6.0, -6.0, -6.0), "“red” takes image and question together: +5.00 nats"),
        ((-1.0, -3.0, -3.0, -9.0), "Image and question say the same of “red”: either would do for 4.00 nats"),
        ((-1.0, -4.0, -4.0, -7.0), "Image and question add to “red” each on its own"),
    ],
)
def test_the_verdict_says_which(values: tuple[float, ...], said: str) -> None:
    both, question_only, image_only, neither = ((value,) for value in values)
    found = Modalities(("red",), (0,), both, image_only, question_only, neither, "What?", 4, "blur", "t")
    assert found.verdict.startswith(said)
    assert said in str(found)


def test_what_image_and_question_give_together_along_deletion(talk: Any, tmp_path: Any) -> None:
    """F_syn of images whose first cells are gone, from plain log-probabilities; its end is that of ``modalities``."""
    cells = np.arange(16, dtype=np.float32).reshape(4, 4)[::-1].copy() / 15
    tokens = probe.select_tokens(talk, indices=[1, 3])
    replay = talk.strengthened(tokens.decided)
    heat = probe.Heatmap(
        cells, talk.image_sizes[0], seen=np.ones((4, 4), bool), selection=tokens, method="by hand",
        provenance={"baseline": replay.baseline},
    )  # fmt: skip
    before = talk.passes.forward
    plain = probe.evaluate(heat, talk, score="log", center=False)
    took = talk.passes.forward - before
    score = probe.evaluate(heat, talk, score="log", center=False, synergy=True)
    assert talk.passes.forward - before - took <= took + 11
    gone = [round(16 * k / 10) for k in range(11)]
    masks = torch.stack([torch.from_numpy(cells * 15 < 15.5 - count).float() for count in gone])
    with torch.no_grad():
        heard, deaf = (
            view.log_probs(masks, image=0).double()[:, [1, 3]].mean(1).numpy() for view in (replay, replay.without())
        )
    expected = heard[0] - heard - deaf[0] + deaf
    assert score.params["synergy"]["fractions"] == pytest.approx([count / 16 for count in gone])
    np.testing.assert_allclose(score.params["synergy"]["curve"], expected, atol=1e-4)
    assert score.synergy == pytest.approx(trapezoid(expected, [count / 16 for count in gone]), abs=1e-4)
    assert any("together give" in remark for remark in score.remarks)
    assert (plain.deletion, plain.insertion) == (score.deletion, score.insertion) and np.isnan(plain.synergy)
    again = probe.Score.from_dict(json.loads(json.dumps(score.to_dict())))
    assert again.synergy == score.synergy
    assert np.isnan(probe.Score.from_dict({k: v for k, v in plain.to_dict().items() if k != "synergy"}).synergy)
    with pytest.raises(ReplayError, match="no run of tokens"):
        probe.evaluate(heat, talk, synergy="nowhere")
    page = probe.report([heat], scores=[score], out=tmp_path / "page.html").read_text()
    assert f'"synergy":{score.synergy:.4g}'[:14] in page


@pytest.fixture(scope="module")
def answered(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The demo model's answer about one scene."""
    scene = probe.demo.scenes(1, seed=3)[0]
    return probe.ask(*demo, scene.image, scene.question, out=tmp_path_factory.mktemp("answered")).replay


def test_the_end_of_that_curve_is_what_the_two_give_together(answered: Any) -> None:
    tokens = probe.select_tokens(answered)
    heat = probe.explain(answered, method="input_gradient", tokens=tokens)
    score = probe.evaluate(heat, answered, score="log", steps=10, center=False, synergy=True)
    together = causal.modalities(answered, tokens=tokens)
    assert len(tokens) == 1
    assert score.params["synergy"]["curve"][-1] == pytest.approx(together.totals[2], abs=1e-3)


def test_a_contrast_has_what_the_two_give_it_together(answered: Any) -> None:
    (word,) = probe.select_tokens(answered).indices
    other = "blue" if "blue" not in answered.tokens[word] else "red"
    heat = probe.explain(answered, method="input_gradient", tokens=[word], against=other)
    score = probe.evaluate(heat, answered, steps=10, center=False, synergy=True)
    ends = torch.tensor([1.0, 0.0])[:, None, None]
    base = answered.strengthened(heat.selection.decided)
    with torch.no_grad():
        heard, deaf = (
            view.scored(heat.selection.score).log_probs(ends)[:, -1].sigmoid() for view in (base, base.without())
        )
    expected = float(heard[0] - heard[1] - deaf[0] + deaf[1])
    assert score.params["synergy"]["curve"][-1] == pytest.approx(expected, abs=1e-4)
    for asked in (causal.which_parts, causal.modalities):
        with pytest.raises(ExplainError, match="measured by log-likelihood"):
            asked(answered, tokens=heat.selection)


@pytest.mark.parametrize("record", [{}, {"parts": 3}, {"parts": ["a"], "shares": ["x"]}])
def test_a_record_that_is_none_is_refused(record: dict[str, Any]) -> None:
    for kind in (PartShares, Modalities):
        with pytest.raises(ExplainError, match=f"not a stored {kind.__name__}"):
            kind.from_dict(record)


# ------------------------------------------------------------------------------------------------------------ on pages


def test_bars_stand_on_the_page_of_the_answer(talk: Any, tmp_path: Any) -> None:
    shares = causal.which_parts(talk, "all", tokens=[1, 3], progress=False)
    parts = causal.modalities(talk)
    heat = probe.explain(talk, method="random", tokens=[1])
    page = probe.report([heat], evidence=[shares, parts], out=tmp_path / "page.html").read_text()
    template = page.split('<template id="evidence-0">')[1].split("</template>")[0]
    assert "Which part of the prompt?" in template and "Image or question?" in template
    assert template.count('class="of-image"') == len(shares.parts) + len(parts.words) + 1  # and the key
    for share in shares.shares:
        assert f"{share:+.2f}" in template
    assert "evidence-0" not in probe.report([heat], out=tmp_path / "bare.html").read_text().split("<script>")[0]
    foreign = Modalities.from_dict({**parts.to_dict(), "trace_id": "other"})
    for thing, said in ((foreign, "no heatmap on this page is"), ("bars", "got a str")):
        with pytest.raises(ReportError, match=said):
            probe.report([heat], evidence=[thing], out=tmp_path / "page.html")


def test_texts_on_the_page_are_escaped(talk: Any, tmp_path: Any) -> None:
    parts = Modalities.from_dict(
        {**causal.modalities(talk).to_dict(), "words": ["<img src=x onerror=alert(1)>"] * len(talk.words)}
    )
    heat = probe.explain(talk, method="random", tokens=[1])
    page = probe.report([heat], evidence=parts, out=tmp_path / "page.html").read_text()
    assert "<img src=x" not in page and "&lt;img src=x" in page
