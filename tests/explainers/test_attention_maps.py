"""Raw and relative attention: recorded against replayed rows, every way to name layers and heads, sinks, rewording."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import inside
import numpy as np
import pytest
import tiny_models
import torch

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError, ReplayError
from lvlm_probe.explainers.attention_maps import (
    GENERAL_PROMPT,
    _layer_places,
    _recorded_rows,
    _replayed_rows,
    _without_sinks,
)
from lvlm_probe.replaying.rewording import positions_of, reword


def explain(what, method: str = "attention", **params: Any):
    return probe.explain(what, method=method, tokens=inside.SPAN, strengthen=False, **params)


def per_token(heat, trace) -> np.ndarray:
    """A heatmap on the tokens' own grid, read at the middle of every token."""
    width, height = heat.image_size
    rows, cols = heat.values.shape
    x = (trace.layout.patch_box[:, 0] + trace.layout.patch_box[:, 2]) / 2
    y = (trace.layout.patch_box[:, 1] + trace.layout.patch_box[:, 3]) / 2
    return heat.values[(y / height * rows).astype(int), (x / width * cols).astype(int)]


def scaled(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / (values.max() - values.min())


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "paligemma"])
def test_recorded_rows_are_those_of_a_replay(name):
    """What generation left behind in half precision, against one teacher-forced pass."""
    trace, replay = inside.trace(name), inside.replay(name)
    positions = torch.tensor(trace.layout.image_positions)
    recorded = _recorded_rows(trace, SimpleNamespace(positions=positions, cross=False), 0, "all")
    replayed = _replayed_rows(replay, positions, range(len(trace.tokens)), cross=False)
    assert recorded.values.shape == replayed.values.shape and recorded.layers == replayed.layers
    assert float(recorded.values.sum()) > 0.1
    assert float((recorded.values - replayed.values).abs().max()) <= 1e-3
    one, two = explain(replay, source="recorded"), explain(replay, source="replay")
    assert (one.params["source"], two.params["source"]) == ("recorded", "replay")
    assert np.abs(one.values - two.values).max() < 0.02
    assert inside.own_passes(replay, "attention", source="recorded") == {"forward": 0, "backward": 0}
    assert inside.own_passes(replay, "attention", source="replay") == {"forward": 1, "backward": 0}


@pytest.mark.parametrize(
    ("layers", "heads", "where"),
    [
        ("all", "all", np.s_[:, :]),
        ("first", "all", np.s_[[0], :]),
        ("middle", "all", np.s_[[1], :]),
        ("last", "all", np.s_[[2], :]),
        (1, "all", np.s_[[1], :]),
        ("1:3", "all", np.s_[1:3, :]),
        (":2", "all", np.s_[:2, :]),
        ("-2:", "all", np.s_[1:, :]),
        ([0, 2], "all", np.s_[[0, 2], :]),
        ("all", 2, np.s_[:, [2]]),
        ("all", [0, 3], np.s_[:, [0, 3]]),
        (1, [0, 3], np.s_[1:2, [0, 3]]),
        ("all", "1.2", np.s_[[1], [2]]),
        ("all", ["0.1", "2.3"], np.s_[[0, 2], [1, 3]]),
    ],
)
def test_layers_and_heads_by_every_name(layers, heads, where):
    """The mean of the selected tokens' recorded rows, taken out of the trace by plain indexing."""
    trace = inside.trace("llava")
    rows = trace.attention.values[slice(*inside.SPAN)].astype(np.float64)  # (token, layer, head, image token)
    chosen = rows.transpose(1, 2, 0, 3)[where]
    wanted = chosen.reshape(-1, rows.shape[-1]).mean(axis=0)
    heat = explain(trace, layers=layers, heads=heads)
    assert np.allclose(per_token(heat, trace), scaled(wanted), atol=2e-3)


def test_thirds_of_any_number_of_layers():
    for count in range(1, 12):
        known = tuple(range(10, 10 + count))
        thirds = [_layer_places(known, part) for part in ("first", "middle", "last")]
        assert all(thirds) and all(0 <= place < count for third in thirds for place in third)
        assert count < 3 or [place for third in thirds for place in third] == list(range(count))
    assert _layer_places((4, 9), 9) == [1]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"layers": "top"}, "layers is 'all', 'first'"),
        ({"layers": "1:x"}, "layers is 'all', 'first'"),
        ({"layers": "--1:"}, "layers is 'all', 'first'"),
        ({"layers": 7}, "attention is known of layers 0, 1, 2"),
        ({"layers": "5:9"}, "attention is known of layers 0, 1, 2"),
        ({"layers": []}, "attention is known of layers 0, 1, 2"),
        ({"heads": 4}, "there are 4, counted from 0"),
        ({"heads": []}, "there are 4, counted from 0"),
        ({"heads": "0.4"}, "no head '0.4': layers 0 to 2 have 4"),
        ({"heads": "3.0"}, "no head '3.0'"),
        ({"heads": "mean"}, "a head is named 'layer.head'"),
        ({"heads": ["0.1"], "layers": 1}, "choose the layers too"),
        ({"sinks": "remove"}, "sinks is 'keep' or 'drop'"),
        ({"source": "file"}, "source is 'auto'"),
    ],
)
def test_what_does_not_exist_is_refused(params, message):
    with pytest.raises(ExplainError, match=message):
        explain(inside.trace("llava"), **params)


def test_heads_that_were_averaged_are_not_single_heads():
    model, processor = tiny_models.build("llava")
    trace = inside.record("llava", model, processor, heads="mean")
    assert explain(trace, layers=1).values is not None
    with pytest.raises(ExplainError, match=r"single heads.*heads='all'.*explain a replay"):
        explain(trace, heads=1)
    heat = explain(probe.replay(trace, model, processor), heads=1)  # a replay computes them
    assert heat.params["source"] == "replay"
    with pytest.raises(ExplainError, match="single heads"):
        explain(probe.replay(trace, model, processor), heads=1, source="recorded")


def test_sinks_by_hand():
    """16 tokens; 15 get 1 from elsewhere and one 100: mean 7.1875, deviation 23.96, limit 79.07. Its value becomes the
    median of the others; a token that is high for these words alone stays."""
    values = torch.arange(16.0)
    by_others = torch.ones(16)
    by_others[5] = 100
    kept, dropped = _without_sinks(values, by_others)
    others = sorted(float(value) for value in values if value != 5)
    assert dropped == 1 and float(kept[5]) == others[7]
    assert torch.equal(kept[torch.arange(16) != 5], values[torch.arange(16) != 5])
    assert _without_sinks(values, torch.ones(16))[1] == 0


def test_sinks_are_dropped_from_a_map(monkeypatch):
    trace = inside.trace("llava")
    rows = trace.attention
    changed = rows.values.copy()
    changed[..., 7] = 0.9  # every position looks at this token
    monkeypatch.setitem(trace.__dict__, "attention", type(rows)(changed, rows.layers, rows.text_mass, rows.reduce))
    kept, dropped = explain(trace), explain(trace, sinks="drop")
    assert per_token(kept, trace).argmax() == 7
    assert dropped.provenance["diagnostics"] == {"sinks_dropped": 1}
    assert per_token(dropped, trace).argmax() != 7
    rest = np.delete(changed[slice(*inside.SPAN)].mean(axis=(0, 1, 2)), 7)
    assert np.allclose(np.delete(per_token(dropped, trace), 7), scaled(rest), atol=2e-3)


# ----------------------------------------------------------------------------------------------------- rewording


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "llava_next", "paligemma", "mllama"])
def test_another_question_is_what_the_processor_would_have_made(name):
    """Token ids, and what the model says to them: against a fresh call of the processor with the other question."""
    replay = inside.replay(name)
    before = replay.original_log_probs.clone()
    asked = replay.reworded(GENERAL_PROMPT)
    tokenizer = replay.processor.tokenizer
    text = tokenizer.decode(replay.input_ids)
    assert text.count(inside.QUESTION) == 1
    assert tokenizer.decode(asked.input_ids) == text.replace(inside.QUESTION, GENERAL_PROMPT)
    fresh = tiny_models.inputs(name, replay.model, replay.processor, [tiny_models.picture()], GENERAL_PROMPT)
    assert torch.equal(fresh["input_ids"][0], asked.input_ids)
    answer = replay.token_ids
    sequence = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask"}
    longer = {}
    for key, value in fresh.items():
        if key in sequence:
            tail = value[:, -1:].expand(-1, len(answer) - 1, *value.shape[2:])
            if name == "paligemma" and key == "token_type_ids":
                tail = torch.ones_like(tail)  # the answer is not part of the prefix that sees itself whole
            value = torch.cat([value, answer[None, :-1] if key == "input_ids" else tail], dim=1)
        longer[key] = value
    longer.pop("labels", None)
    with torch.no_grad():
        logits = replay.model(**longer, use_cache=False).logits[0, -len(answer) :]
    wanted = logits.log_softmax(-1)[torch.arange(len(answer)), answer]
    assert torch.allclose(asked.original_log_probs, wanted, atol=1e-4)
    assert not torch.allclose(wanted, before, atol=1e-3)
    assert torch.equal(replay.original_log_probs, before) and asked.passes is replay.passes
    assert torch.isfinite(asked.score_and_grad(torch.ones(1, 2, 2), lambda lp: lp.sum(1))[1]).all()


def test_questions_in_any_script_and_with_a_space_in_front():
    tokenizer = tiny_models.build_processor("llava").tokenizer
    for question in ("图中的形状是什么颜色？", "Où est l'été ?", "🟥 or 🟦?", "a", "What is this?  And that?"):
        for around in ("<image>\n{} ASSISTANT:", "a question: {}", "{}\nWhat", "What is this? {}"):
            prompt = torch.tensor(tokenizer(around.format(question))["input_ids"])
            start, stop, ids = reword(prompt, tokenizer, question, "Describe the picture")
            new = tokenizer.decode([*prompt[:start].tolist(), *ids.tolist(), *prompt[stop:].tolist()])
            assert new == around.format("Describe the picture")


def test_a_text_of_the_prompt_is_no_part_of_a_longer_word():
    tokenizer, none = tiny_models.build_processor("llava").tokenizer, np.zeros(0, int)
    prompt = torch.tensor(tokenizer("Is red or a covered 3.5 reddish thing left?")["input_ids"])
    found = positions_of(prompt, none, tokenizer, "red")
    assert tokenizer.decode(prompt[: int(found[-1]) + 1]) == "Is red"
    for part in ("cover", "3", "eft", "dish"):
        with pytest.raises(ReplayError, match="no run of tokens"):
            positions_of(prompt, none, tokenizer, part)


@pytest.mark.quick
def test_rewording_that_cannot_be_done_says_why():
    replay = inside.replay("llava")
    with pytest.raises(ReplayError, match=r"no run of tokens that reads as 'Who is it\?'.*question="):
        replay.reworded(GENERAL_PROMPT, question="Who is it?")
    with pytest.raises(ReplayError, match="no token of"):
        replay.reworded(" ")
    with pytest.raises(ExplainError, match="no run of tokens"):
        explain(replay, "relative_attention", question="Who is it?")
    bare = probe.replay(inside.trace("llava"), replay.model)
    with pytest.raises(ReplayError, match="replay with the processor"):
        bare.reworded(GENERAL_PROMPT)
    with pytest.raises(ReplayError, match="not to a question"):
        reword(torch.tensor([5, 6]), replay.processor, "", "x")


# ---------------------------------------------------------------------------------------------- relative attention


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_relative_attention_is_a_quotient(name):
    """Above: the recorded rows. Below: an eager model's own maps for the general prompt, at its last position."""
    trace, replay = inside.trace(name), inside.replay(name)
    eager = inside.replay(name, attention="eager")
    fresh = tiny_models.inputs(name, eager.model, eager.processor, [tiny_models.picture()], GENERAL_PROMPT)
    with torch.no_grad():
        maps = eager.model(**fresh, output_attentions=True).attentions
    columns = (fresh["input_ids"][0] == eager.model.config.image_token_id).nonzero()[:, 0]
    for layers, heads, part in (("all", "all", np.s_[:, :]), ("last", 1, np.s_[2:, 1:2])):
        below = torch.stack([layer[0, :, -1, columns] for layer in maps])[part].mean(dim=(0, 1)).numpy()
        above = trace.attention.values[slice(*inside.SPAN)].mean(axis=0)[part].mean(axis=(0, 1))
        heat = explain(replay, "relative_attention", layers=layers, heads=heads)
        assert np.allclose(per_token(heat, trace), scaled(above / below), atol=0.01)
    assert heat.params["general"] == GENERAL_PROMPT


def test_relative_attention_of_two_traces_needs_no_model():
    model, processor = tiny_models.build("llava")
    trace = inside.trace("llava")
    reference = inside.record("llava", model, processor, tokens=2, question="Describe the picture")
    heat = explain(trace, "relative_attention", reference=reference)
    below = reference.attention.values[0].mean(axis=(0, 1))
    above = trace.attention.values[slice(*inside.SPAN)].mean(axis=(0, 1, 2))
    assert np.allclose(per_token(heat, trace), scaled(above / below), atol=0.01)
    assert heat.params["reference"] == reference.trace_id
    # A reference that recorded no attention is replayed, however much shorter its answer is.
    plain = inside.record("llava", model, processor, tokens=2, question="Describe the picture", attention=False)
    with pytest.raises(ExplainError, match="holds no attention rows"):
        explain(trace, "relative_attention", reference=plain)
    again = explain(trace, "relative_attention", reference=probe.replay(plain, model, processor))
    assert np.abs(again.values - heat.values).max() < 0.02
    with pytest.raises(ExplainError, match="give reference="):
        explain(trace, "relative_attention")


def test_a_reference_of_another_picture_is_refused():
    with pytest.raises(ExplainError, match="of another image"):
        explain(inside.trace("llava"), "relative_attention", reference=inside.trace("gemma3"))


def test_a_token_that_nobody_looks_at_does_not_explode(monkeypatch):
    trace, reference = inside.trace("llava"), inside.trace("llava")
    rows = reference.attention
    changed = rows.values.copy()
    changed[..., 3] = 0
    monkeypatch.setitem(reference.__dict__, "attention", type(rows)(changed, rows.layers, rows.text_mass, rows.reduce))
    heat = explain(trace, "relative_attention", reference=reference)
    assert np.isfinite(heat.values).all()
    changed[...] = 0
    with pytest.raises(ExplainError, match="has no attention to image 0"):
        explain(trace, "relative_attention", reference=reference)


def test_the_second_picture_of_a_prompt():
    trace = inside.trace("qwen2_vl", images=2)
    rows = trace.attention.values[slice(*inside.SPAN)].mean(axis=(0, 1, 2))
    for image in (0, 1):
        heat = explain(trace, image=image)
        mine = trace.layout.image_index == image
        assert np.allclose(per_token(heat, trace)[mine], scaled(rows[mine]), atol=2e-3)
    with pytest.raises(ExplainError, match="image=2, but the prompt has 2"):
        explain(trace, image=2)
