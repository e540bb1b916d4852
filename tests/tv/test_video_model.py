"""The recipe of the video model: what it trains is what the real processor and model run, and it can be stopped."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import lvlm_probe as probe

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import evaluate_demo_model as evaluation
import train_demo_model as recipe
import train_video_model as video

SHIPPED = Path(video.__file__).parent / "video_model"
SHORT = ("--family", "video", "--threads", "1", "--scale", "0.001", "--video-pool", "8000", "--check", "2",
         "--video-steps", "2000", "3000", "4000")  # fmt: skip


@pytest.fixture(scope="module")
def untrained() -> tuple[video.Net, Any, video.Loader]:
    torch.manual_seed(0)
    processor = video.build_processor()
    net = video.Net(video.build_model(processor.tokenizer)).eval()
    pool = video.Pool.draw("tune", 4, objects=(2, 3), offset=0, workers=1)
    return net, processor, video.Loader(pool, recipe.Writer(processor.tokenizer), processor.video_processor, seed=0)


def test_training_sees_what_the_model_sees_through_its_processor(
    untrained: tuple[video.Net, Any, video.Loader],
) -> None:
    net, processor, loader = untrained
    batch = loader.batch(1, room=60)
    clip = (batch.pixels[0].numpy() * loader.std + loader.mean).round().astype(np.uint8)
    first = batch.block[0].eq(0) | batch.block[0].eq(1)
    ids = batch.ids[:, first]
    text = processor.decode(ids[0]).replace("<|video_pad|>" * video.VIDEO_TOKENS, "<|video_pad|>")
    question = text.removeprefix("<s><user><|vision_start|><|video_pad|><|vision_end|>").partition("<assistant>")[0]
    content = [{"type": "video", "video": clip}, {"type": "text", "text": question.strip()}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    length = prompt["input_ids"].shape[1]
    assert prompt["input_ids"][0].tolist() == ids[0, :length].tolist()
    with torch.no_grad():
        real = net.model(**prompt).logits[0]
        trained = net.lm_head(net(batch)[1])[0, first][:length]
    torch.testing.assert_close(trained, real, atol=2e-5, rtol=1e-5)
    assert real.std() > 0.1  # not two of nothing


def test_a_question_sees_no_other_question_of_its_clip(untrained: tuple[video.Net, Any, video.Loader]) -> None:
    net, _, loader = untrained
    batch = loader.batch(1, room=80)
    with torch.no_grad():
        before = net(batch)[1][0]
        batch.ids[batch.block == 1] = 4
        after = net(batch)[1][0]
    kept = batch.block[0] != 1
    assert int(batch.block.max()) >= 2
    torch.testing.assert_close(after[kept & (batch.block[0] >= 0)], before[kept & (batch.block[0] >= 0)])
    assert not torch.allclose(after[~kept], before[~kept])


def test_the_tower_alone_is_shown_two_frames_and_what_is_under_their_patches(
    untrained: tuple[video.Net, Any, video.Loader],
) -> None:
    net, processor, loader = untrained
    again = video.Loader(loader.pool, loader.writer, processor.video_processor, seed=0)
    for _ in range(8):  # some of a later moment, in which something has moved
        again.rng.bit_generator.state = loader.rng.bit_generator.state
        batch = loader.batch(1)
        pixels, film, seen, labels = again.clip(0.0, 0.0)
        whole = torch.from_numpy((pixels - loader.mean) / loader.std)
        pairs = [k for k in range(video.STEPS) if torch.equal(whole[2 * k : 2 * k + 2], batch.pixels[0])]
        under = slice(pairs[0] * video.PATCHES, (pairs[0] + 1) * video.PATCHES)
        for name, wanted in video.patch_targets(film, labels, seen).items():
            assert batch.patches[name][0].tolist() == wanted[under].tolist()
        with torch.no_grad():
            alone, together = net.patches(batch.pixels), net.patches(whole[None])
        torch.testing.assert_close(alone, together[:, under])


def test_what_cannot_be_seen_is_answered_hidden(untrained: tuple[video.Net, Any, video.Loader]) -> None:
    _, processor, loader = untrained
    film = loader.pool.films[0]
    asker = video.Asker(np.random.default_rng(0), absent=0.0)
    none, all_of_it = (np.full((len(film.tracks), 8), share) for share in (0.0, 1.0))
    assert not any(any(example.seen) for example in asker.ask(film, none))
    assert all(all(example.seen) for example in asker.ask(film, all_of_it))
    targets = loader.writer.write(next(iter(asker.ask(film, none))))[1]
    said = processor.decode([target for target in targets if target >= 0])
    assert any(word in said for word in ("hidden", "somewhere"))


def train(out: Path) -> None:
    recipe.main([*SHORT, "--out", str(out)])


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "whole")
    said = recipe.log

    def stop_in_the_middle(**values: Any) -> None:
        said(**values)
        if (values.get("stage"), values.get("step")) == (2, 2):
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "log", stop_in_the_middle)
        train(tmp_path / "parts")
    assert torch.load(tmp_path / "parts" / "training.pt", weights_only=False)["step"] == 2
    train(tmp_path / "parts")
    assert not (tmp_path / "parts" / "training.pt").exists()
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)

    made = tmp_path / "whole"
    assert sum(file.stat().st_size for file in made.iterdir()) <= 2 * 2**20
    assert json.loads((made / "config.json").read_text())["dtype"] == "float32"
    explain_a_clip(made, tmp_path / "runs")


def explain_a_clip(path: Path, runs: Path) -> None:
    """What the recipe writes is an ordinary checkpoint: it answers, and its answer is recorded and explained."""
    model, processor = AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)
    (clip,) = probe.demo.clips(1, split="tune")
    with probe.attach(model, processor) as attached, attached.record(runs) as recording:
        prompt = processor.apply_chat_template(
            clip.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        model.generate(**prompt)
    replay = probe.replay(recording.traces[0], model, processor)
    (recorded,) = replay.clips
    assert recorded.frames == 8
    shown = np.stack([np.asarray(image) for image in recording.traces[0].images])
    assert np.array_equal(shown, clip.pixels)  # at the model's own size: not a pixel is lost
    heat = probe.video.explain(replay, method="input_gradient", tokens=(0, 2), progress=False)
    assert heat.values is not None and heat.values.shape[0] == 8


def test_the_shipped_model_knows_what_it_is_asked() -> None:
    """A few of the clips that docs/video.md counts; two hundred of each kind are above these floors by themselves."""
    model, processor = probe.load(SHIPPED)
    found = evaluation.exact_match(model, processor, n=60, seed=5, of="clips")
    exact = {kind: row["exact"] for kind, row in found.items()}
    assert exact["appearance"] + exact["colour"] >= 2 * 0.9
    assert exact["direction"] + exact["order"] >= 2 * 0.85
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 2 * 2**20
