"""Randomisation checks: what is randomised, in which order, that weights come back, and that both verdicts happen."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tiny_models
import torch

import lvlm_probe as probe
from lvlm_probe.explainers import registry
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.metrics import compare_maps
from lvlm_probe.metrics import similarity as similarity_module
from lvlm_probe.sanity import SanityStep, answers, prompts, randomised, weight_blocks, weights
from lvlm_probe.sanity.random_weights import grouped
from lvlm_probe.sanity.randomisation import judged_answers

GRID = (12, 12)


def _scaled(values: torch.Tensor) -> torch.Tensor:
    return values / values.max().clamp(min=1e-12)


def gradient(problem: registry.Problem) -> registry.Outcome:
    """What the score loses per cell: depends on the model."""
    _, slope = problem.replay.score_and_grad(torch.full((1, *GRID), 0.5), problem.score)
    return registry.Outcome(_scaled(slope[0].clamp(min=0)))


def edges(problem: registry.Problem) -> registry.Outcome:
    """An edge detector, which every such check is there to catch."""
    grey = np.asarray(problem.replay.image().convert("L").resize(GRID[::-1]), dtype=np.float32)
    steps = np.abs(np.diff(grey, axis=0, append=grey[-1:])) + np.abs(np.diff(grey, axis=1, append=grey[:, -1:]))
    return registry.Outcome(_scaled(torch.from_numpy(steps)))


def moody(problem: registry.Problem) -> registry.Outcome:
    """Works on the true model only."""
    if float(problem.replay.original_log_probs[list(problem.selection.indices)].exp().mean()) < 0.5:
        raise probe.errors.ExplainError("scores are not what they were")
    return gradient(problem)


@pytest.fixture(scope="module", autouse=True)
def methods():
    mine = {"test gradient": gradient, "test edges": edges, "test moody": moody}
    for name, function in mine.items():
        registry.register(name, needs=("passes", "gradients"))(function)
    yield
    for name in mine:
        del registry.METHODS[name]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A trace of the demo model, a copy of the model that may be changed, and its processor."""
    model, processor = probe.demo.load()
    (scene,) = probe.demo.scenes(1, split="tune", seed=5, kinds=["colour"])
    with probe.attach(model, processor) as p, p.record(tmp_path_factory.mktemp("sanity")) as recording:
        inputs = processor.apply_chat_template(
            scene.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        model.generate(**inputs)
    return recording.traces[0], model, processor


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return all(_bytes(value) == _bytes(after[name]) for name, value in before.items())


def _bytes(value: torch.Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# ---------------------------------------------------------------- weights


def test_blocks_go_from_the_output_to_the_input_and_hold_every_weight_once(recorded) -> None:
    _, model, _ = recorded
    blocks = weight_blocks(model)
    names = list(blocks)
    assert names[0] == "lm_head"
    assert names[1] == "model.language_model.norm"
    layers = [name for name in names if name.startswith("model.language_model.layers")]
    assert layers == [f"model.language_model.layers.{index}" for index in (2, 1, 0)]
    assert names.index("model.language_model.embed_tokens") < names.index("model.multi_modal_projector.linear_2")
    assert names.index("model.multi_modal_projector.linear_1") < names.index("model.vision_tower.encoder.layers.2")
    assert "patch_embedding" in names[-2] or "patch_embedding" in names[-1]
    held = [id(weight) for block in blocks.values() for weight in block.values()]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in model.parameters()}
    assert "model.language_model.layers.2.mlp.up_proj.weight" in blocks["model.language_model.layers.2"]


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_every_family_has_blocks_for_all_weights(name: str) -> None:
    model, _ = tiny_models.build(name)
    blocks = weight_blocks(model)
    assert sum(len(block) for block in blocks.values()) == len(list(model.parameters()))
    first = {id(weight) for weight in next(iter(blocks.values())).values()}
    assert id(model.get_output_embeddings().weight) in first
    assert any(word in list(blocks)[-1] for word in ("vis", "embed", "patch"))


def test_weights_that_are_drawn_in_inference_mode_are_those_drawn_outside(replay) -> None:
    heat = probe.explain(replay, method="test gradient")
    with torch.inference_mode():
        inside = weights(replay, heat, stages=1, draws=1)
    assert inside.to_dict() == weights(replay, heat, stages=1, draws=1).to_dict()
    assert inside.steps[0].similarity is not None


def test_chosen_blocks_and_stages(recorded) -> None:
    _, model, _ = recorded
    chosen = weight_blocks(model, ["lm_head", "model.language_model.layers.*.mlp"])
    assert list(chosen) == ["lm_head", "model.language_model.layers.*.mlp"]
    assert len(chosen["model.language_model.layers.*.mlp"]) == 9
    with pytest.raises(probe.errors.PointNotFound, match="no module matches 'nothing'"):
        weight_blocks(model, ["nothing"])
    blocks = weight_blocks(model)
    groups = grouped(blocks, 4)
    assert len(groups) == 4
    assert [path for group in groups.values() for path in group] == [path for b in blocks.values() for path in b]
    assert next(iter(groups)).startswith("lm_head … ")
    assert grouped(blocks, 1000) == blocks
    with pytest.raises(probe.errors.ExplainError, match="stages"):
        grouped(blocks, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["normal", "permute"])
def test_weights_are_random_inside_and_the_same_bits_outside(how: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = torch.nn.Linear(64, 48).to(dtype)
    module.weight.data = module.weight.data.t().contiguous().t()  # not contiguous
    state = torch.random.get_rng_state()
    weights = dict(module.named_parameters())
    before = bits(module)
    with randomised(weights, how=how, seed=3):
        inside = module.weight.detach().clone()
        assert not torch.equal(inside, before["weight"])
        if how == "permute":
            assert torch.equal(inside.flatten().sort().values, before["weight"].flatten().sort().values)
        else:
            assert float(inside.float().mean()) == pytest.approx(float(before["weight"].float().mean()), abs=0.01)
            assert float(inside.float().std()) == pytest.approx(float(before["weight"].float().std()), rel=0.05)
        # Hardly any entry stays where it was.
        assert float((inside == before["weight"]).float().mean()) < 0.05
    assert unchanged(module, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    with randomised({"weight": module.weight}, how=how, seed=3):
        assert torch.equal(module.weight, inside)  # name and seed decide
    with randomised({"weight": module.weight}, how=how, seed=4):
        assert not torch.equal(module.weight, inside)


def test_not_a_number_comes_back_with_its_bits() -> None:
    module = torch.nn.Linear(4, 4)
    module.weight.data[0] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    before = bits(module)
    with randomised(dict(module.named_parameters()), how="permute"):
        pass
    assert unchanged(module, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_weights_come_back_after_any_error(recorded, error: type[BaseException]) -> None:
    _, model, _ = recorded
    before = bits(model)
    with pytest.raises(error):
        with randomised(dict(model.named_parameters())):
            assert not unchanged(model, before)
            raise error
    assert unchanged(model, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_weights_come_back_when_interrupted_while_being_drawn_and_while_being_put_back(
    monkeypatch, error: type[BaseException]
) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    before = bits(module)
    copy, calls = torch.nn.Parameter.copy_, []

    def interrupted(self, source):
        calls.append(1)
        if len(calls) in (3, 5, 6):  # the third tensor drawn; twice while putting back
            raise error
        return copy(self, source)

    monkeypatch.setattr(torch.nn.Parameter, "copy_", interrupted, raising=False)
    with pytest.raises(error):
        with randomised(dict(module.named_parameters())):
            pytest.fail("it was interrupted before")
    assert len(calls) > 6
    assert unchanged(module, before)


def test_weights_without_numbers_are_refused_before_any_change() -> None:
    module = torch.nn.Linear(4, 4)
    before = bits(module)
    quantised = torch.nn.Parameter(torch.ones(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(probe.errors.ExplainError, match=r"packed is torch\.uint8.*unquantised"):
        with randomised({**dict(module.named_parameters()), "packed": quantised}):
            pass
    offloaded = torch.nn.Linear(4, 4, device="meta")
    with pytest.raises(probe.errors.ExplainError, match="has no data here"):
        with randomised(dict(offloaded.named_parameters())):
            pass
    assert unchanged(module, before)


# ---------------------------------------------------------------- verdicts


@pytest.fixture(scope="module")
def replay(recorded):
    return probe.replay(*recorded)


def test_a_cascade_tells_a_map_of_the_model_from_a_map_of_edges(recorded, replay) -> None:
    _, model, _ = recorded
    before = bits(model)
    told = []
    heat = probe.explain(replay, method="test gradient")
    check = weights(replay, heat, stages=3, progress=lambda *at: told.append(at))
    assert unchanged(model, before)
    assert told == [(number, 5) for number in range(1, 6)]
    assert check.steps[0].name.startswith("lm_head … ")
    sizes = [step.weights for step in check.steps]
    assert sizes == sorted(sizes) and sizes[-1] == sum(parameter.numel() for parameter in model.parameters())
    assert [step.weights for step in check.steps[-3:]] == [sizes[-1]] * 3
    assert len({heat.values.tobytes() for heat in check.heatmaps}) == 5  # every draw is another model
    assert np.mean(np.abs(check.rank_correlations[-3:])) < 0.5
    assert (check.verdict, check.threshold) == ("passes", 0.5)
    caught = weights(replay, probe.explain(replay, method="test edges"), stages=2, draws=1)
    assert caught.rank_correlations == pytest.approx((1.0, 1.0))
    assert str(caught).startswith("weights: fails: with the weights of all blocks random")
    assert "is 1.00 (limit 0.5): the image draws it rather than what the model has learnt" in caught.reason


@pytest.mark.parametrize("method", ["center", "random"])
def test_a_built_in_method_that_ignores_the_model_fails(replay, method: str) -> None:
    heat = probe.explain(replay, method=method)
    assert weights(replay, heat, stages=1, draws=1).verdict == "fails"
    assert answers(replay, heat, draws=1).verdict == "fails"


def test_the_heatmap_is_made_again_as_it_was_made(recorded, replay) -> None:
    trace, model, processor = recorded
    over = replay.over("blur", strength=0.6)
    heat = probe.explain(over, method="test gradient", seed=4)
    check = weights(replay, heat, kind="independent", stages=2)
    assert check.params == {"kind": "independent", "how": "normal", "draws": 1, "seed": 0}
    for again in check.heatmaps:
        assert again.selection.indices == heat.selection.indices
        assert again.provenance["baseline"]["strength"] == heat.provenance["baseline"]["strength"] == 0.6
        assert again.provenance["baseline"]["kind"] == "blur"
        assert again.provenance["seed"] == 4
    # Each step by hand: the same explanation on the model randomised by hand.
    step, block = check.steps[1], list(grouped(weight_blocks(model), 2).values())[1]
    assert step.weights == sum(weight.numel() for weight in block.values())
    with randomised(block):
        fresh = probe.replay(trace, model, processor, strict=False).over("blur", strength=0.6)
        by_hand = probe.explain(fresh, method="test gradient", tokens=heat.selection, strengthen=False)
    np.testing.assert_array_equal(by_hand.values, check.heatmaps[1].values)
    assert step.similarity == compare_maps(heat, by_hand)


def test_a_baseline_of_the_users_own_goes_along(replay) -> None:
    own = replay.image().convert("L").convert("RGB")
    heat = probe.explain(replay.over(own), method="test gradient")
    with pytest.raises(probe.errors.ImageError, match="give the image again"):
        weights(replay, heat, stages=1, draws=1)
    check = weights(replay.over(own), heat, stages=1, draws=1)
    first, again = (one.provenance["baseline"] for one in (heat, check.heatmaps[0]))
    assert first["kind"] == again["kind"] == "image" and first["sha256"] == again["sha256"]


@pytest.mark.quick
def test_an_error_in_the_explainer_leaves_the_model_whole(recorded, replay, monkeypatch) -> None:
    _, model, _ = recorded
    before = bits(model)
    heat = probe.explain(replay, method="test gradient")
    calls = []

    def failing(problem: registry.Problem) -> registry.Outcome:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return gradient(problem)

    needs = frozenset(registry.needs_of("test gradient"))
    monkeypatch.setitem(registry.METHODS, "test gradient", registry.Method(failing, needs))
    with pytest.raises(KeyboardInterrupt):
        weights(replay, heat, stages=4)
    assert unchanged(model, before)


def test_no_heatmap_under_randomisation_is_a_result_with_a_reason(replay) -> None:
    check = weights(replay, probe.explain(replay, method="test moody"), stages=2, draws=1)
    assert [step.similarity for step in check.steps] == [None, None]
    assert "scores are not what they were" in str(check.steps[0].reason)
    assert np.isnan(check.rank_correlations).all()
    assert check.verdict == "cannot say"
    assert "no second heatmap to compare with" in check.reason and "scores are not what they were" in check.reason


def test_too_few_cells_and_an_even_map_say_nothing(replay) -> None:
    few = weights(replay, probe.explain(replay, method="input_gradient", size=3), stages=1, draws=1)
    assert few.verdict == "cannot say" and "has 9 cells" in few.reason
    heat = dataclasses.replace(probe.explain(replay, method="center"), values=np.full((16, 16), 0.5, np.float32))
    even = answers(replay, heat, draws=1)
    assert even.verdict == "cannot say" and "the same value everywhere" in even.reason


def test_another_answer_is_scored_in_the_place_of_the_recorded_one(recorded, replay) -> None:
    trace, _, processor = recorded
    colours = processor.tokenizer.convert_tokens_to_ids(processor.tokenizer.tokenize(" red blue green"))
    heat = probe.explain(replay, method="test gradient")
    check = answers(replay, heat, draws=2, pool=colours, seed=1)
    assert len(check.steps) == 2
    for again, step in zip(check.heatmaps, check.steps, strict=True):
        changed = [index for index, token in enumerate(trace.tokens) if again.selection.tokens[index] != token]
        assert changed
        assert set(changed) <= set(heat.selection.indices)
        assert step.name == again.selection.text
    assert not np.array_equal(check.heatmaps[0].values, heat.values)
    caught = answers(replay, probe.explain(replay, method="test edges"), draws=2)
    assert caught.verdict == "fails" and "does not depend on the words" in caught.reason
    default = answers(replay, heat, draws=1)
    special = set(processor.tokenizer.all_special_tokens)
    assert not special & {default.heatmaps[0].selection.tokens[i] for i in heat.selection.indices}


def test_another_wording_is_asked_in_the_place_of_the_question(recorded, replay) -> None:
    trace, _, _ = recorded
    heat = probe.explain(replay, method="test gradient")
    wording = trace.question.replace("What", "Which")
    check = prompts(replay, heat, [wording, trace.question])
    assert [step.name for step in check.steps] == [wording, trace.question]
    asked = replay.over(heat.provenance["baseline"]).reworded(wording)
    by_hand = probe.explain(asked, method="test gradient", tokens=heat.selection, strengthen=False)
    np.testing.assert_array_equal(check.heatmaps[0].values, by_hand.values)
    assert not np.array_equal(by_hand.values, heat.values)
    np.testing.assert_array_equal(check.heatmaps[1].values, heat.values)
    with pytest.raises(probe.errors.ReplayError):
        prompts(replay, heat, [wording], question="What is not asked?")


def test_other_words_that_resemble_the_map_are_no_verdict() -> None:
    values = np.random.default_rng(3).random((10, 10))
    for noise, verdict in ((0.0, "fails"), (0.5, "cannot say"), (50.0, "passes")):
        other = values + noise * np.random.default_rng(4).random((10, 10))
        step = SanityStep("blue", similarity=compare_maps(heat(values), heat(other / other.max())))
        assert judged_answers(heat(values), [step])[0] == verdict


def test_words_are_drawn_without_embeddings_to_count(replay, monkeypatch) -> None:
    """BLIP and a plugin's wrapper hand out no embeddings, and have no LM head of their own."""

    def none_here() -> None:
        raise NotImplementedError("get_input_embeddings not auto-handled")

    heat = probe.explain(replay, method="test gradient")
    before = answers(replay, heat, draws=1)
    monkeypatch.setattr(replay.model, "get_input_embeddings", none_here, raising=False)
    monkeypatch.setattr(replay.model, "get_output_embeddings", lambda: None, raising=False)
    assert answers(replay, heat, draws=1).heatmaps[0].selection.tokens == before.heatmaps[0].selection.tokens
    with pytest.raises(probe.errors.ExplainError, match="pool holds token ids, 0 to"):
        answers(replay, heat, draws=1, pool=[10**6])


def test_a_check_goes_with_its_heatmap(replay, tmp_path) -> None:
    check = weights(replay, probe.explain(replay, method="test gradient"), stages=1, draws=1)
    record = json.loads(json.dumps(check.to_dict(), allow_nan=False))
    assert record["check"] == "weights" and record["verdict"] == "passes" and record["params"]["how"] == "normal"
    assert record["steps"][0]["similarity"]["rank_correlation"] == pytest.approx(check.rank_correlations[0])
    other = answers(replay, check.heatmap, draws=1)
    stored = Heatmap.read(other.attached(check.attached()).write(tmp_path / "heat.h5"))
    assert stored.provenance["sanity"] == {"weights": record, "answers": json.loads(json.dumps(other.to_dict()))}
    np.testing.assert_array_equal(stored.values, check.heatmap.values)


def test_a_stored_heatmap_is_checked_like_a_fresh_one(replay, tmp_path) -> None:
    fresh = probe.explain(replay, method="igos++", seed=2)
    stored = Heatmap.read(fresh.write(tmp_path / "heat.h5"))
    first, second = (answers(replay, one, draws=1) for one in (fresh, stored))
    np.testing.assert_array_equal(first.heatmaps[0].values, second.heatmaps[0].values)


def test_refusals(recorded, replay) -> None:
    trace, model, processor = recorded
    heat = probe.explain(replay, method="test gradient")
    for function, options, message in [
        (weights, {"kind": "both"}, "kind is"),
        (weights, {"how": "zero"}, "how is"),
        (weights, {"stages": 0}, "stages is"),
        (weights, {"draws": 0}, "draws is"),
        (answers, {"draws": 0}, "draws is"),
        (answers, {"pool": []}, "the pool holds no token besides"),
    ]:
        with pytest.raises(probe.errors.ExplainError, match=message):
            function(replay, heat, **options)
    with pytest.raises(probe.errors.ExplainError, match="give the processor, or pool="):
        answers(probe.replay(trace, model, processor.image_processor), heat)
    with pytest.raises(probe.errors.ExplainError, match="there is no heatmap to check: nothing selected"):
        weights(replay, Heatmap(None, heat.image_size, reason="nothing selected"))
    with pytest.raises(probe.errors.ExplainError, match="another answer"):
        answers(replay, dataclasses.replace(heat, selection=dataclasses.replace(heat.selection, tokens=("x",) * 9)))
    with pytest.raises(probe.errors.ExplainError, match="no explainer 'of another time'"):
        answers(replay, dataclasses.replace(heat, method="of another time"))


@pytest.mark.quick
def test_the_former_names_and_arguments_go_on_working(recorded) -> None:
    trace, model, processor = recorded
    with pytest.warns(DeprecationWarning, match="has moved to"):
        former = [getattr(probe.metrics, f"{name}_randomisation") for name in ("weight", "answer")]
    first = former[0](
        trace, model, processor, method="test gradient", stages=1, draws=1, baseline=("blur", {"strength": 0.6})
    )
    assert first.check == "weights" and first.heatmap.provenance["baseline"]["strength"] == 0.6
    assert former[1](trace, model, processor, method="test edges", draws=1, explain_seed=3).verdict == "fails"
    other, _ = probe.demo.load()
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    with pytest.raises(probe.errors.ModelMismatch):
        former[0](trace, other, processor, method="test gradient")


# ---------------------------------------------------------------- similarity


def heat(values: np.ndarray, seen: np.ndarray | None = None) -> Heatmap:
    return Heatmap(values, (64, 64), seen=seen)


def test_similarity_against_scipy_scikit_image_and_hand() -> None:
    from scipy.stats import spearmanr
    from skimage.metrics import structural_similarity

    generator = np.random.default_rng(0)
    first, second = generator.random((10, 10)), generator.random((10, 10)) * 0.5
    first[0, :5] = 0.25
    result = compare_maps(heat(first), heat(second))
    stored = [np.float32(values).astype(float) for values in (first, second)]
    assert result.rank_correlation == pytest.approx(spearmanr(stored[0].ravel(), stored[1].ravel()).statistic)
    assert result.absolute_rank_correlation == abs(result.rank_correlation)
    scaled = [values / values.max() for values in stored]
    assert result.ssim == pytest.approx(structural_similarity(*scaled, data_range=1.0, full=True)[1].mean())
    assert result.difference == pytest.approx(np.abs(scaled[0] - scaled[1]).mean())
    tops = [set(np.argsort(-values.ravel())[:20].tolist()) for values in stored]
    assert result.top_iou == pytest.approx(len(tops[0] & tops[1]) / len(tops[0] | tops[1]))


def test_similarity_of_a_map_with_itself_upside_down_and_constant(monkeypatch) -> None:
    values = np.random.default_rng(1).random((8, 8)) * 0.9
    same = compare_maps(heat(values), heat(values * 0.5))
    assert (same.rank_correlation, same.top_iou) == pytest.approx((1.0, 1.0))
    assert same.difference == pytest.approx(0.0, abs=1e-6)
    assert same.ssim == pytest.approx(1.0)
    turned = compare_maps(heat(values), heat(1 - values))
    assert turned.rank_correlation == pytest.approx(-1.0)
    assert turned.absolute_rank_correlation == pytest.approx(1.0)
    flat = compare_maps(heat(values), heat(np.full((8, 8), 0.5)))
    assert np.isnan(flat.rank_correlation)
    assert json.loads(json.dumps(flat.to_dict(), allow_nan=False))["rank_correlation"] is None
    # Every cell of a constant map holds 13/64 of a place.
    shared = 13**2 / 64
    assert flat.top_iou == pytest.approx(shared / (26 - shared))
    monkeypatch.setattr(similarity_module.importlib.util, "find_spec", lambda name: None)
    assert compare_maps(heat(values), heat(values)).ssim is None


def test_cells_out_of_sight_do_not_count_as_agreement() -> None:
    generator = np.random.default_rng(2)
    seen = np.zeros((10, 10), dtype=bool)
    seen[:, :5] = True
    first, second = generator.random((10, 10)), generator.random((10, 10))
    whole = compare_maps(heat(first, seen), heat(second, seen))
    half = compare_maps(heat(first[:, :5]), heat(second[:, :5]))
    assert whole.rank_correlation == pytest.approx(half.rank_correlation)
    with pytest.raises(probe.errors.ExplainError, match="no cell is seen in both"):
        compare_maps(heat(first, seen), heat(second, ~seen))
    with pytest.raises(probe.errors.ExplainError, match="images of"):
        compare_maps(heat(first), Heatmap(second, (32, 32)))
    with pytest.raises(probe.errors.ExplainError, match="because nothing selected"):
        compare_maps(heat(first), Heatmap(None, (64, 64), reason="nothing selected"))
