"""Scores of the user's own: a column of a replay's log-probabilities, against plain forwards of the bare model."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any

import inside
import numpy as np
import pytest
import tiny_models
import torch
from inside import other_ids

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError, ReplayError, SelectionError
from lvlm_probe.replaying.own_scores import Contrast, OwnScore, alternative_ids
from lvlm_probe.selection import TokenSelection
from lvlm_probe.serving.journal import Journal

MASKS = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(1))
PLACE = (1, 3)


def forward(name: str, replay: Any, answer: list[int]) -> torch.Tensor:
    """log P of an answer's tokens ``(step,)`` by the model itself, on the processor's inputs of the whole image."""
    model, processor = replay.model, replay.processor
    inputs = dict(tiny_models.inputs(name, model, processor, [tiny_models.picture(seed=0)], inside.QUESTION))
    prompt, more = inputs["input_ids"], torch.tensor([answer])
    inputs["input_ids"] = torch.cat([prompt, more], dim=1)
    for key, value in inputs.items():
        if key != "input_ids" and isinstance(value, torch.Tensor) and value.shape[:2] == prompt.shape:
            tail = value[:, -1:] if key == "attention_mask" or value.ndim > 2 else torch.zeros_like(value[:, -1:])
            inputs[key] = torch.cat([value, *[tail] * len(answer)], dim=1)
    with torch.no_grad():
        logits = model(**inputs).logits[0, prompt.shape[1] - 1 : -1].float()
    return logits.log_softmax(-1)[range(len(answer)), answer]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "idefics3", "mllama"])
def test_a_contrast_is_that_of_plain_forwards(name: str) -> None:
    """Of alternatives with one token, as many as were said, and more than the answer has left."""
    replay = inside.replay(name)
    said, others = replay.token_ids.tolist(), other_ids(replay, 1, 2, 6)
    start, stop = PLACE
    own = forward(name, replay, said)[start:stop].sum()
    each = [forward(name, replay, [*said[:start], *ids])[start:].sum() for ids in others]
    scored = replay.scored(Contrast.of([PLACE], others, ["a", "b", "c"], "said"))
    assert float(scored.original_log_probs[-1]) == pytest.approx(float(own - torch.stack(each).logsumexp(0)), abs=2e-4)
    torch.testing.assert_close(scored.original_log_probs[:-1], replay.original_log_probs, atol=2e-5, rtol=0)
    assert (scored.rows, scored.plain is replay, replay.rows) == (3, True, 1)
    one = replay.scored(Contrast.of([PLACE], others[:1], ["a"], "said"))
    assert one.rows == 1
    assert float(one.log_probs(None)[0, -1]) == pytest.approx(float(own - each[0]), abs=2e-4)


@pytest.mark.parametrize("lengths", [(1, 2), (4, 6)])
def test_a_score_and_text_that_is_not_read_go_together(lengths: tuple[int, int]) -> None:
    """In either order of asking; also where other courses make the sequence longer."""
    replay = inside.replay("llava")
    contrast = Contrast.of([PLACE], other_ids(replay, *lengths), ["a", "b"], "said")
    unread = [int(replay.length) - 1 - len(replay.token_ids)]  # text of the prompt's end
    one, other = replay.scored(contrast).without(unread), replay.without(unread).scored(contrast)
    with torch.no_grad():
        here, there, whole = (view.log_probs(MASKS) for view in (one, other, replay.scored(contrast)))
        plain, deaf = one.plain.log_probs(MASKS), replay.without(unread).log_probs(MASKS)
    torch.testing.assert_close(here, there, atol=2e-5, rtol=0)
    torch.testing.assert_close(here[:, :-1], deaf, atol=2e-5, rtol=0)
    torch.testing.assert_close(plain, deaf, atol=0, rtol=0)
    assert float((here - whole)[:, -1].abs().max()) > 1e-4


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_masks_are_scored_alone_and_together(name: str) -> None:
    """Whatever goes through the model at once, and whatever passes leave out; every sequence is a counted pass."""
    replay = inside.replay(name)
    scored = replay.scored(Contrast.of([PLACE], other_ids(replay, 1, 3), ["a", "b"], "said"))
    with torch.no_grad():
        plain = scored.log_probs(MASKS)[:, -1]
        before = scored.passes.forward
        scored.log_probs(MASKS)
        assert scored.passes.forward - before == 2 * len(MASKS)
        for other in (
            scored.log_probs(MASKS, micro_batch=1)[:, -1],
            scored.log_probs(MASKS, steps=[len(replay.tokens)])[:, -1],
            torch.cat([scored.log_probs(mask[None], steps=[2])[:, -1] for mask in MASKS]),
        ):
            torch.testing.assert_close(other, plain, atol=2e-5, rtol=0)
    assert float(plain.max() - plain.min()) > 1e-3
    assert torch.isnan(scored.log_probs(MASKS, steps=[2])[:, 0]).all()


def test_a_journal_keeps_scores_apart() -> None:
    """And gives each back to the bit, without the model; the answer's tokens have entries of their own."""
    replay, journal = inside.replay("llava"), Journal(None)
    first, second = (Contrast.of([PLACE], [ids], ["a"], "said") for ids in other_ids(replay, 1, 2))
    with torch.no_grad():
        wanted = [replay.scored(score).log_probs(MASKS) for score in (first, second)]
        for _ in range(2):
            found = [replay.scored(score).journalled(journal).log_probs(MASKS) for score in (first, second)]
            assert all(torch.equal(*pair) for pair in zip(wanted, found, strict=True))
        assert replay.journalled(journal).log_probs(MASKS).shape == (3, 5)
    assert len(journal) == 3 * len(MASKS)
    assert float((wanted[0] - wanted[1])[:, -1].abs().min()) > 1e-3


def test_a_loop_over_scores_ends_with_the_last_of_them() -> None:
    """Results and functions of the others are gone; what is asked again of those that are left costs no pass."""
    replay, functions = inside.replay("llava"), []

    def asked(number: int) -> OwnScore:
        made = OwnScore(str(number), lambda given: given.log_probs[:, 0] * number, (0,))
        functions.append(weakref.ref(made.function))
        assert float(replay.scored(made).original_log_probs[-1]) <= 0
        return made

    first = asked(0)
    for number in range(1, 40):
        asked(number)
        replay.scored(first)
    gc.collect()
    left = [number for number, function in enumerate(functions) if function() is not None]
    assert left == [0, *range(9, 40)]
    before = replay.passes.forward
    _ = replay.scored(first).original_log_probs
    assert replay.passes.forward == before


def test_what_passes_leave_out_is_looked_for_once_for_a_score() -> None:
    replay = inside.replay("llava")
    contrast = Contrast.of([PLACE], other_ids(replay, 2), ["a"], "said")
    passes, found = [], []
    for _ in range(2):
        before = replay.passes.forward
        found.append(replay.counted().scored(contrast).log_probs(MASKS, steps=[len(replay.tokens)]))
        passes.append(replay.passes.forward - before)
    assert passes[0] > passes[1] == 2 * len(MASKS)
    assert torch.equal(found[0][:, -1], found[1][:, -1])


def test_fewer_masks_go_through_at_once_where_each_is_several_sequences() -> None:
    replay = inside.replay("llava")
    scored = replay.scored(Contrast.of([PLACE], other_ids(replay, 2, 3), ["a", "b"], "said"))
    assert scored.masks_at_once == max(1, replay.masks_at_once // 3) < replay.masks_at_once


def test_the_gradient_equals_central_differences() -> None:
    """On a float64 model, with a further sequence per mask."""
    model, processor = tiny_models.build("llava")
    trace = inside.trace("llava")
    replay = probe.replay(trace, model.double(), processor, strict=False)
    scored = replay.scored(Contrast.of([PLACE], other_ids(replay, 1, 3), ["a", "b"], "said"))
    column, step = len(replay.tokens), 1e-2
    mask = 0.1 + 0.8 * MASKS[:1].double()
    direction = torch.randn(mask.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    scores, gradient = scored.score_and_grad(mask, lambda found: found[:, column])
    with torch.no_grad():
        ends = [scored.log_probs(mask + sign * step * direction)[0, column] for sign in (1, -1)]
    assert float((gradient * direction).sum()) == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=1e-3)
    assert scores.shape == (1,)


def test_what_the_model_held_for_next_likely() -> None:
    replay = inside.replay("llava")
    said = replay.token_ids.tolist()
    ids, values = replay.runners_up
    for step in range(len(said)):
        every = forward_row(replay, said, step)
        every[said[step]] = -torch.inf
        assert int(ids[step]) == int(every.argmax())
        assert float(values[step]) == pytest.approx(float(every.max()), abs=1e-4)


def forward_row(replay: Any, said: list[int], step: int) -> torch.Tensor:
    """log P of every token in the place of one, by the bare model."""
    picture = tiny_models.picture(seed=0)
    inputs = dict(tiny_models.inputs("llava", replay.model, replay.processor, [picture], inside.QUESTION))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([said[:step]], dtype=torch.long)], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        row: torch.Tensor = replay.model(**inputs).logits[0, -1].log_softmax(-1)
    return row


# --------------------------------------------------------------------------------------------- functions of the user's


def test_a_function_is_given_what_the_model_gives() -> None:
    """Log-probabilities and logits of its steps, other courses of the answer, hidden states, where the image is."""
    replay = inside.replay("llava")
    (course,) = other_ids(replay, 3)
    met: list[probe.Given] = []

    @probe.score(name="look", steps=[2], others=[(1, course)], states=True)
    def look(given: probe.Given) -> torch.Tensor:
        met.append(given)
        return given.logits(2)[:, 7]

    scored = replay.scored(look)
    column = scored.log_probs(MASKS[:2])[:, -1]
    given = met[-1]
    assert torch.equal(given.logits(2)[:, 7], column)
    torch.testing.assert_close(
        given.logits(2).log_softmax(-1)[:, replay.token_ids[2]], given.log_probs[:, 2], atol=1e-5, rtol=0
    )
    assert torch.isnan(given.log_probs[:, [0, 1, 3, 4]]).all()
    with torch.no_grad():
        whole = replay.scored(look).log_probs(None)
    assert float(whole[0, -1]) == float(replay.scored(look).original_log_probs[-1])
    own = forward("llava", replay, [*replay.token_ids.tolist()[:1], *course])[1:]
    torch.testing.assert_close(met[-1].others[0][0], own, atol=2e-4, rtol=0)
    states = met[-1].states
    head = replay.model.get_output_embeddings()
    assert states.shape[1] == replay.scored(look).length
    predicted = head(states[:, replay.prompt_length + 2 - 1])
    torch.testing.assert_close(predicted, met[-1].logits(2), atol=1e-5, rtol=0)
    assert (given.input_ids[given.image_positions] == replay.anatomy.image_token_id).all()
    with pytest.raises(ReplayError, match="step 3 is not among them"):
        given.logits(3)
    with pytest.raises(ReplayError, match="states=True"):
        replay.scored(probe.score(lambda given: given.states.sum(dim=(1, 2)), name="no states")).log_probs(MASKS)


def test_a_contrast_is_a_function_of_the_users_too() -> None:
    """The same mechanism: with the courses of the alternatives anybody's function is the built-in one."""
    replay = inside.replay("llava")
    others = other_ids(replay, 1, 3)

    @probe.score(name="mine", steps=range(*PLACE), others=[(PLACE[0], ids) for ids in others])
    def mine(given: probe.Given) -> torch.Tensor:
        said = given.log_probs[:, slice(*PLACE)].sum(dim=1)
        return said - torch.stack([found.sum(dim=1) for found in given.others]).logsumexp(dim=0)

    built_in = Contrast.of([PLACE], others, ["a", "b"], "said")
    columns = [replay.scored(score).log_probs(MASKS)[:, -1] for score in (mine, built_in, built_in.other_way())]
    assert torch.equal(columns[0], columns[1])
    assert torch.equal(columns[0], -columns[2])


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda given: given.logits(0), "one number per mask"),
        (lambda given: 1.0, "one number per mask"),
    ],
)
def test_what_a_function_may_not_return(function: Any, said: str) -> None:
    with pytest.raises(ReplayError, match=said):
        inside.replay("llava").scored(probe.score(function, name="wrong")).log_probs(MASKS)


def test_a_score_without_a_gradient_is_for_methods_without() -> None:
    replay = inside.replay("llava")
    count = probe.score(lambda given: given.logits(0).argmax(-1).float(), name="argmax", steps=[0])
    with pytest.raises(ExplainError, match=r"hands on no gradient.*occlusion"):
        replay.scored(count).score_and_grad(MASKS, lambda found: found[:, -1])
    assert replay.scored(count).log_probs(MASKS)[:, -1].shape == (3,)


def test_the_unit_of_a_score_does_not_matter() -> None:
    """Neither to a map that is weighed against regularisers, nor to normalised curves."""
    replay = inside.replay("llava")

    def margin(given: probe.Given) -> torch.Tensor:
        found = given.logits(2)
        return found[:, 7] - found[:, 11]

    scores = [probe.score(margin, name="margin", steps=[2])]
    scores.append(probe.score(lambda given: 1000 * margin(given) + 50, name="margin in another unit", steps=[2]))
    settings = {"preset": "fast", "size": 6, "strengthen": False}
    one, other = (probe.explain(replay, tokens=score, method="igos++", **settings) for score in scores)
    assert one.values is not None
    np.testing.assert_allclose(one.values, other.values, atol=1e-3)
    first, second = (probe.evaluate(heat, replay, steps=6, center=False) for heat in (one, one_of(one, other)))
    assert (first.deletion, first.insertion) == pytest.approx((second.deletion, second.insertion), abs=1e-4)
    assert second.original == pytest.approx(1000 * first.original + 50, rel=1e-4)


def one_of(values: Any, other: Any) -> Any:
    """The values of one heatmap under another's selection."""
    return dataclasses.replace(values, selection=other.selection)


@pytest.mark.parametrize("low", [False, True])
def test_what_raises_a_score_is_what_a_good_map_shows(low: bool) -> None:
    """A score that the whole image lowers is judged from its lower end: the reverse of a map is as bad as the map is
    good, and a map of what raises it does better than one of what lowers it."""
    replay = inside.replay("llava")
    sign = -1.0 if low else 1.0
    ends = replay.original_log_probs[2] - replay.baseline_log_probs[2]
    sign *= 1.0 if float(ends) > 0 else -1.0
    score = probe.score(lambda given: sign * given.log_probs[:, 2], name=f"signed {low}", steps=[2])
    heat = probe.explain(replay, tokens=score, method="integrated_gradients", size=4, steps=8, strengthen=False)
    assert heat.values is not None
    good = probe.evaluate(heat, replay, center=False)
    bad = probe.evaluate(dataclasses.replace(heat, values=1 - heat.values), replay, center=False)
    assert (good.original < good.baseline) is low
    assert good.gain > bad.gain
    assert good.gain > 0


def test_a_stored_score_is_found_by_its_name() -> None:
    replay = inside.replay("llava")
    made = probe.score(lambda given: given.log_probs[:, 0], name="first", steps=[0])
    selection = probe.explain(replay, method="center", tokens=made).selection
    read = TokenSelection.from_dict(selection.to_dict())
    assert (read.score, read.columns, read.label, bool(read)) == (made, (5,), "first", True)
    unknown = TokenSelection.from_dict({**selection.to_dict(), "score": {"kind": "own", "name": "nobody's"}})
    with pytest.raises(ReplayError, match='there is no score "nobody\'s" here'):
        replay.scored(unknown.score).log_probs(MASKS)
    with pytest.raises(SelectionError, match="not a stored token selection"):
        TokenSelection.from_dict({**selection.to_dict(), "score": {"kind": "contrast"}})


def test_a_score_of_tokens_that_are_not_there() -> None:
    replay = inside.replay("llava")
    with pytest.raises(ReplayError, match="the answer has tokens 0 to 4"):
        replay.scored(probe.score(lambda given: given.log_probs[:, 0], name="late", steps=[9]))
    with pytest.raises(ReplayError, match="another course begins at 7"):
        replay.scored(probe.score(lambda given: given.log_probs[:, 0], name="late", others=[(7, [3])]))
    with pytest.raises(SelectionError, match="token numbers from 0"):
        probe.score(lambda given: given.log_probs[:, 0], name="none", steps=[])
    assert isinstance(probe.score(lambda given: given.log_probs[:, 0], name="all"), OwnScore)


# ----------------------------------------------------------------------------------------------------- how it is spelt


def test_an_alternative_is_written_as_the_said_word_is() -> None:
    """With the white space in front that the answer has there, whoever puts it there."""
    tokenizer = tiny_models.build_processor("llava").tokenizer
    ids = tuple(tokenizer(" red", add_special_tokens=False)["input_ids"])
    first = tuple(tokenizer("red", add_special_tokens=False)["input_ids"])
    assert tokenizer.decode(alternative_ids(tokenizer, ids, " red", "blue")) == " blue"
    assert tokenizer.decode(alternative_ids(tokenizer, first, "red", " blue ")) == "blue"

    def dummy_prefix(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return dict(tokenizer(" " + text.lstrip(), add_special_tokens=add_special_tokens))

    assert tokenizer.decode(alternative_ids(dummy_prefix, ids, " red", "blue")) == " blue"
    with pytest.raises(SelectionError, match="makes no token"):
        alternative_ids(tokenizer, ids, " red", " ")
    with pytest.raises(SelectionError, match="half of a character"):
        alternative_ids(tokenizer, ids, " red", "\ud800")
