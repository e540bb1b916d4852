"""Models that take no question: asked by what they take instead, from memory and from disk; and two readers that
transformers files under one entry of its mapping."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checks import run_checks
from command_line import run
from members.readers import bart_decoder, donut, encoder_decoder, image_alone
from tiny_models import LAYERS, square
from zoo import Backend, Built, Member, build, image_processor, load_members

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError, ProbeError

load_members()
_MEASURED = ("generation", "replay", "pixels", "gradient", "checkpointing", "detach")


def _trocr(ids: dict[str, int]) -> Any:
    encoder = transformers.ViTConfig(**LAYERS, image_size=56, patch_size=14)
    decoder = transformers.TrOCRConfig(**bart_decoder(ids, cross_attention_hidden_size=32))
    return encoder_decoder(encoder, decoder, ids)


def _trocr_processor(tokenizer: Any, backend: Backend) -> Any:
    return transformers.TrOCRProcessor(image_processor("ViTImageProcessor", backend, size=square()), tokenizer)


def _nougat_processor(tokenizer: Any, backend: Backend) -> Any:
    images = image_processor("NougatImageProcessor", backend, size=square(), do_crop_margin=False)
    return transformers.NougatProcessor(images, tokenizer)


def _built(name: str, model: Any, processor: Any) -> Built:
    """A member that stands in no table: the mapping has one entry for all of its kind."""
    from zoo import MEMBERS

    made = Member(name=name, kind="B", model=model, processor=processor, prepare=image_alone)
    MEMBERS[name] = made
    try:
        return build(name, "pil")
    finally:
        del MEMBERS[name]


def trocr() -> Built:
    return _built("trocr", _trocr, _trocr_processor)


@pytest.mark.parametrize(
    ("name", "model", "processor"), [("trocr", _trocr, _trocr_processor), ("nougat", donut, _nougat_processor)]
)
def test_a_reader_of_an_encoder_and_a_decoder_passes_what_every_family_does(
    name: str, model: Any, processor: Any
) -> None:
    for verdict in run_checks(_built(name, model, processor), only=_MEASURED):
        assert verdict.passed, f"{verdict.check}: {verdict.figure} {verdict.note}"


@pytest.mark.parametrize(
    ("name", "prompt", "begins"),
    [
        ("blip", None, "<bos>"),
        ("blip", "a picture of the", "<bos>"),
        ("git", None, "<bos>"),
        ("git", "a picture of the", "<bos>a picture of the"),
        ("pp_formulanet", None, "<eos>"),
        ("pix2struct", None, "<pad>"),
        ("pix2struct", "a picture", "<pad>a picture"),
        ("vision-encoder-decoder", "<s_docvqa>", "<s_docvqa>"),
        ("kosmos-2.5", None, "<ocr>"),
    ],
)
def test_it_is_asked_without_a_question(name: str, prompt: str | None, begins: str) -> None:
    built = build(name, "torchvision")
    answer = probe.ask(built.model, built.processor, built.picture(), prompt=prompt, max_new_tokens=3, min_new_tokens=3)
    trace = answer.trace
    assert trace.status == "complete"
    assert trace.prompt.endswith(begins) if begins.startswith("<ocr") else trace.prompt.startswith(begins)
    assert trace.log_probs_source == "generation"
    torch.testing.assert_close(
        answer.replay.original_log_probs,
        torch.tensor(trace.log_probs),
        rtol=0,
        atol=float(answer.replay.rounding.max()),
    )
    heat = answer.explain((0, 2), method="input_gradient")
    assert (heat.values is None) == (heat.reason is not None)


def test_the_words_that_begin_a_caption_are_a_part_of_its_prompt() -> None:
    # BLIP's generate() puts a token of its own first, and drops the last one that the processor wrote.
    built = build("blip", "pil")
    tokenizer = built.processor.tokenizer
    tokenizer.add_special_tokens({"cls_token": "<bos>", "sep_token": "<eos>"})
    answer = probe.ask(built.model, built.processor, built.picture(), prompt="a picture of", max_new_tokens=3)
    written = built.processor(images=built.picture(), text=["a picture of"], return_tensors="pt").input_ids[0]
    assert answer.trace.input_ids.tolist() == [tokenizer.bos_token_id, *written[1:-1].tolist()]


def test_a_caption_of_a_model_that_could_be_asked() -> None:
    built = build("blip-2", "pil")
    pixels = built.processor(images=built.picture(), text=["x"], return_tensors="pt").pixel_values
    with tempfile.TemporaryDirectory() as directory, probe.attach(built.model, built.processor) as attached:
        with attached.record(directory, images=[built.picture()]) as recording:
            built.model.generate(pixel_values=pixels, max_new_tokens=3, min_new_tokens=3)
        (trace,) = recording.traces
        replay = probe.replay(trace, built.model, built.processor)
        again = replay.original_log_probs
        assert trace.log_probs_source == "generation"
        torch.testing.assert_close(again, torch.tensor(trace.log_probs), rtol=0, atol=float(replay.rounding.max()))


def test_two_images_are_two_captions(tmp_path: Path) -> None:
    built = build("git", "pil")
    images = [built.picture(seed=seed) for seed in (1, 2)]
    with probe.attach(built.model, built.processor) as attached, attached.record(tmp_path) as recording:
        inputs = built.processor(images=images, return_tensors="pt")
        built.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert len(recording.traces) == 2
    for trace, image in zip(recording.traces, images, strict=True):
        assert trace.images[0].tobytes() == image.tobytes()
        replay = probe.replay(trace, built.model, built.processor)
        torch.testing.assert_close(
            replay.original_log_probs, torch.tensor(trace.log_probs), rtol=0, atol=float(replay.rounding.max())
        )


def test_a_question_to_a_model_that_takes_none_is_refused() -> None:
    built = build("blip", "pil")
    with pytest.raises(ProbeError, match=r"takes no question.*--prompt"):
        probe.ask(built.model, built.processor, built.picture(), "What is this?")


def test_a_task_prompt_takes_a_question() -> None:
    built = build("vision-encoder-decoder", "pil")
    answer = probe.ask(
        built.model, built.processor, built.picture(), "What?", prompt="<s_docvqa>{question}:", max_new_tokens=2
    )
    assert answer.trace.prompt == "<s_docvqa>What?:"
    assert answer.trace.question == "What?"
    other = answer.replay.reworded("Where?")
    assert not torch.equal(other.original_log_probs, answer.replay.original_log_probs)


@pytest.fixture(scope="module")
def read_through_the_encoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    built, folder = build("t5gemma2", "pil"), tmp_path_factory.mktemp("t5gemma2")
    points = {"llr": False, "points": ["hidden"]}
    with probe.attach(built.model, built.processor) as attached, attached.record(folder, **points) as recording:
        built.generate(built.inputs([built.picture()]))
    (trace,) = recording.traces
    return probe.replay(trace, built.model, built.processor)


@pytest.mark.parametrize("method", ["tmm", "rollout", "iia", "weighted_tmm"])
def test_a_decoder_that_reads_through_its_encoder_has_no_relevance_of_image_tokens(
    read_through_the_encoder: Any, method: str
) -> None:
    with pytest.raises(ExplainError, match="reads the image through its encoder"):
        probe.explain(read_through_the_encoder, method=method, tokens=(0, 2))


def test_a_decoder_that_reads_through_its_encoder_has_no_states_of_the_prompt(read_through_the_encoder: Any) -> None:
    """Those of the answer, which are all that it has, are not recorded for them, nor read."""
    (note,) = [note for note in read_through_the_encoder.trace.notes if "hidden" in note]
    assert "one hidden state per token" in note
    with pytest.raises(ExplainError, match="one hidden state per token of prompt and answer"):
        probe.explain(read_through_the_encoder, method="tam", tokens=(0, 2))
    with pytest.raises(ExplainError, match="one state per token of prompt and answer"):
        probe.causal.logit_lens(read_through_the_encoder)


def test_a_reader_is_recorded_and_explained_at_the_command_line(tmp_path: Path) -> None:
    built = build("vision-encoder-decoder", "pil")
    built.processor.chat_template = None
    built.model.save_pretrained(tmp_path / "model")
    built.processor.save_pretrained(tmp_path / "model")
    built.picture().save(tmp_path / "page.png")
    what = ["--model", str(tmp_path / "model"), "--image", str(tmp_path / "page.png"), "--max-new-tokens", "3"]
    out = ["--out", str(tmp_path / "runs")]
    done = run("record", *what, *out, "--prompt", "<s_docvqa>", "--json")
    assert done.code == 0, done.err
    assert done.json["status"] == "complete"
    refused = run("record", *what, *out, "--question", "What?")
    assert refused.code == 2
    assert "takes no question" in refused.err
    done = run("explain", *what, *out, "--method", "occlusion", "--no-scores")
    assert done.code == 0, done.err
    done = run("doctor", tmp_path / "model", "--json")
    found = {one["name"]: one for one in done.json["findings"]}
    assert found["answer"]["state"] == "ok" and found["methods"]["state"] == "ok", done.out


@pytest.mark.parametrize("name", ["pix2struct", "kosmos-2.5"])
@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_masks_of_ones_and_zeros_are_what_a_whitening_processor_makes(name: str, backend: Backend) -> None:
    path = _replay(name, backend).path
    for value, inputs in ((1.0, path.inputs), (0.0, path.baseline_inputs)):
        made = path.apply(torch.full((2, 5, 4), value))
        torch.testing.assert_close(made["flattened_patches"][:1], inputs["flattened_patches"], rtol=0, atol=0)
    # What lies far from a mask's hole moves too: the mean of all pixels has.
    mask = torch.ones(1, 5, 4)
    mask[:, 0, 0] = 0
    moved = (path.apply(mask)["flattened_patches"] - path.inputs["flattened_patches"]).abs()[0]
    live = path.inputs["flattened_patches"][0, :, 2:].abs().sum(1) > 0
    assert bool((moved[live, 2:].amax(1) > 0).all())
    assert not moved[:, :2].any()  # the numbers of row and column


def _replay(name: str, backend: Backend) -> Any:
    built = build(name, backend)
    return probe.ask(built.model, built.processor, built.picture(), max_new_tokens=2).replay


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_a_question_that_is_drawn_into_the_image_is_no_part_of_the_mask(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    built = build("pix2struct", backend)
    module: Any = sys.modules[type(built.processor.image_processor).__module__]
    render = module.render_text  # its own font comes from the network
    monkeypatch.setattr(module, "render_text", lambda text, **given: render(text, **{**given, "font_path": str(font)}))
    built.processor.image_processor.is_vqa = True
    with pytest.raises(ProbeError, match="there is no question"):
        probe.ask(built.model, built.processor, built.picture())
    trace = probe.ask(built.model, built.processor, built.picture(), "What?", out=tmp_path, max_new_tokens=3).trace
    assert trace.question == "What?"
    replay = probe.replay(trace, built.model, built.processor)
    replay.log_probs(torch.full((1, 6, 6), 0.5))
    assert replay.path.report.mean_error <= 2
    assert 0.9 < replay.path.report.coverage[0] <= 1.0
    ends = replay.path.inputs["flattened_patches"] - replay.path.baseline_inputs["flattened_patches"]
    top = ends[0, 0, 2:].abs().max()  # of the drawn question only the statistics change
    assert float(top) < 0.5 * float(ends[..., 2:].abs().max())


@pytest.mark.parametrize("name", ["chameleon", "emu3"])
def test_without_gradients_masks_remain(name: str) -> None:
    built = build(name, "pil")
    answer = probe.ask(built.model, built.processor, built.picture(), "What colour?", max_new_tokens=2)
    for method in ("igos++", "integrated_gradients", "gradcam", "tmm"):
        with pytest.raises(ExplainError, match=r"discrete codes.*occlusion, rise, greedy"):
            answer.explain((0, 1), method=method)
    heat = answer.explain((0, 1), method="rise", masks=20)
    assert heat.values is not None
    assert answer.explained[-1][1] is not None
