"""Videos that are files, from the question to the page: asked from Python and on the command line."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import clips
import numpy as np
import pytest
import torch
from zoo import Built, build, load_members

pytest.importorskip("av", reason="needs PyAV, which the second environment has")

from command_line import run, succeed
from PIL import Image
from tiny_models import picture
from video_samples import film

import lvlm_probe as probe
from lvlm_probe import open_trace
from lvlm_probe.errors import ImageError, ProbeError, ProbeWarning
from lvlm_probe.heatmap_store import find_maps
from lvlm_probe.metrics import tube_energy, tube_iou, tube_pointing
from lvlm_probe.trace.video_files import read_video
from lvlm_probe.video import ClipHeatmap

FEW: dict[str, Any] = {"max_new_tokens": 3}


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("video") / "ball.mp4", frames=40, fps=10, size=(90, 60), audio=True)


@pytest.fixture(scope="module")
def qwen() -> Built:
    return clips.built("qwen2_vl")


def ask(built: Built, *given: Any, question: str = "What happens?", **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ProbeWarning)
        return probe.ask(built.model, built.processor, *given, question=question, **FEW, **options)


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision", "smolvlm", "internvl", "perception_lm"])
def test_the_processor_samples_as_many_frames_as_it_is_asked_for(name: str, video: Path) -> None:
    built = clips.built(name)
    if name == "smolvlm":
        built.processor.video_processor.fps = 10  # as its checkpoints have one
    answer = ask(built, video=video, num_frames=4)
    (clip,) = answer.replay.clips
    assert (clip.frames, clip.total, clip.fps, clip.duration) == (4, 40, 10.0, 4.0)
    with pytest.warns(ProbeWarning, match="audio"):
        frames, _, _ = read_video(video, lambda _: clip.indices)
    shown = np.stack([np.asarray(image) for image in answer.trace.images])
    assert np.array_equal(shown, frames)
    if name in ("qwen2_vl", "llava_onevision", "perception_lm"):
        assert clip.indices == (0, 10, 20, 30)  # transformers' own rule
    assert float((answer.replay.original_log_probs - torch.tensor(answer.trace.log_probs)).abs().max()) < 1e-4


def test_a_processor_that_samples_none_is_shown_some(qwen: Built, video: Path) -> None:
    with pytest.warns(ProbeWarning, match="16 of 40 in ball.mp4 are shown"):
        answer = probe.ask(qwen.model, qwen.processor, video=video, question="What?", **FEW)
    (clip,) = answer.replay.clips
    assert clip.frames == 16
    assert clip.indices[0] > 0
    assert np.ptp(np.diff(clip.indices)) <= 1


def test_a_processor_with_a_rule_of_its_own_is_asked_by_it(video: Path) -> None:
    built = clips.built("qwen3_vl")
    assert ask(built, video=video).replay.clips[0].frames == 8  # two in a second
    assert ask(built, video=video, fps=1).replay.clips[0].frames == 4
    assert ask(built, video=video, num_frames=6).replay.clips[0].frames == 6
    glm = clips.built("glm4v")
    with pytest.warns(ProbeWarning, match="rule of its own: 8 frames of ball.mp4, not 5"):
        probe.ask(glm.model, glm.processor, video=video, question="What?", num_frames=5, **FEW)


def test_images_files_and_arrays_stand_in_one_prompt(qwen: Built, video: Path) -> None:
    moving = film(video.with_name("b.gif"), codec="gif", pixels="rgb8")
    answer = ask(qwen, [picture(70, 80, seed=30), video], video=moving, num_frames=2)
    assert [(clip.first, clip.frames) for clip in answer.replay.clips] == [(1, 2), (3, 2)]
    frames = clips.frames()
    by_array, by_images = ask(qwen, video=frames), ask(qwen, video=[Image.fromarray(frame) for frame in frames])
    assert by_array.replay.clips[0].frames == by_images.replay.clips[0].frames == 4
    assert by_array.text == by_images.text


def test_a_family_without_a_chat_template_is_asked_by_its_rule(video: Path) -> None:
    built = clips.built("video_llava")
    built.processor.chat_template = None
    answer = ask(built, video=video, num_frames=4)
    assert answer.trace.meta["prompt_rule"] == "USER: {images}\n{question} ASSISTANT:"
    assert answer.replay.clips[0].frames == 4


def test_an_answer_about_a_video_is_explained_by_it(qwen: Built, video: Path, tmp_path: Path) -> None:
    answer = ask(qwen, video=video, num_frames=4)
    heat = answer.explain(method="input_gradient", size=4)
    assert isinstance(heat, ClipHeatmap)
    assert heat.values is None or heat.values.shape == (4, 4, 4)
    page = answer.report(tmp_path / "page.html")
    assert "What happens?" in Path(page).read_text()


def refused(error: type[Exception], built: Built, *given: Any, **options: Any) -> str:
    with pytest.raises(error) as raised:
        ask(built, *given, **options)
    assert "generate" not in vars(built.model)  # nothing is left attached
    assert "fetch_videos" not in vars(built.processor.video_processor)
    return str(raised.value)


def test_what_cannot_be_shown_says_the_way_out(qwen: Built, video: Path, tmp_path: Path) -> None:
    assert "there is no such file" in refused(ImageError, qwen, video=tmp_path / "none.mp4")
    assert "download it first" in refused(ImageError, qwen, video="https://example.org/a.mp4")
    assert "give one of them" in refused(ProbeError, qwen, video=video, num_frames=2, fps=1)
    assert "at least one frame" in refused(ProbeError, qwen, video=video, num_frames=0)
    assert "none is given" in refused(ProbeError, qwen, picture(70, 80), num_frames=2)
    assert "give image=…, or video=…" in refused(ImageError, qwen)
    assert "exceeds total_num_frames" in refused(ImageError, clips.built("llava_onevision"), video=video, num_frames=41)
    mute = clips.built("qwen2_vl")
    mute.processor.chat_template = build("qwen2_vl").processor.chat_template
    assert "may know no videos" in refused(ProbeError, mute, video=video)
    load_members()
    other = build("muse_spark")
    assert "MuseSparkForConditionalGeneration are not recorded yet" in refused(ProbeError, other, video=video)


# ------------------------------------------------------------------------------------------------------ command line


@pytest.fixture(scope="module")
def recorded(qwen: Built, video: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trace by ``record``, and the command line with the model at hand."""
    with pytest.MonkeyPatch.context() as patched:
        for module in ("inputs", "models"):
            patched.setattr(f"lvlm_probe.cli.shared.{module}.load_model", lambda *_, **__: (qwen.model, qwen.processor))
        for command in ("record", "explain", "meter"):
            patched.setattr(f"lvlm_probe.cli.{command}.load_model", lambda *_, **__: (qwen.model, qwen.processor))
        out = tmp_path_factory.mktemp("runs")
        made = succeed(
            "record", "--model", "m", "--video", video, "--num-frames", "4", "--question", "What happens?",
            "--out", out, "--max-new-tokens", "12", "--json",
        )  # fmt: skip
        yield Path(made.json["trace"])


def test_every_command_knows_a_trace_with_a_video(recorded: Path, tmp_path: Path) -> None:
    folder = recorded.parent
    assert "4 frames" in succeed("inspect", recorded).out
    assert "largest difference" in succeed("verify", recorded, "--model", "m").out
    explained = succeed(
        "explain", recorded, "--model", "m", "--joint", "--method", "input_gradient", "--param", "size=4", "--json",
    ).json  # fmt: skip
    (made,) = explained["maps"]
    assert made["cells"] == [4, 4, 4]
    assert "ball_what-happens" in made["map"]
    with Image.open(made["picture"]) as strip:
        assert "clip" in strip.text["lvlm_probe"]
    (found,) = find_maps([Path(made["map"])])
    heat = found.read()
    assert isinstance(heat, ClipHeatmap)
    assert heat.trace is not None
    again = succeed(
        "explain", recorded, "--model", "m", "--joint", "--method", "input_gradient", "--param", "size=4",
        "--image-number", "2", "--json",
    ).json  # fmt: skip
    assert [item["map"] for item in again["maps"]] == [made["map"]]  # a frame stands for its video
    assert "input_gradient" in succeed("inspect", found.path, "--json").out
    assert "insertion" in succeed("evaluate", folder, "--model", "m").out
    page = tmp_path / "page.html"
    succeed("report", folder, "--out", page)
    assert 'class="clip"' in page.read_text()
    done = succeed("sanity", found.path, "--model", "m", "--checks", "weights,seeds", "--stages", "1", "--draws", "1")
    assert "seeds: passes: the maps are identical: input_gradient draws no random numbers" in done.out
    assert set(found.read().provenance["sanity"]) == {"weights", "seeds"}
    succeed("report", folder, "--out", page, "--overwrite")
    assert "draws no random numbers" in page.read_text()
    planned = succeed("plan", recorded, "--model", "m", "--methods", "igos++,occlusion,attention", "--json").json
    assert {plan["method"] for plan in planned["plans"]} == {"igos++", "occlusion", "attention"}


def test_frames_are_told_by_their_shares(recorded: Path, tmp_path: Path) -> None:
    word = open_trace(recorded).words[0].text
    found = succeed("frames", recorded, "--model", "m", "--words", word, "--json").json
    assert [one["frames"] for one in found["segments"]] == [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert sum(one["share"] for one in found["segments"]) == pytest.approx(found["total"], abs=1e-4)
    assert set(found["llr"]) == {"blur", "first_frame", "middle_frame", "shuffled_frames"}
    told = succeed("frames", recorded, "--model", "m", "--words", word, "--segments", "2").out
    assert "0.0 to 1.0 s" in told
    assert "the order of frames" in told
    assert succeed("explain", recorded, "--model", "m", "--words", word, "--method", "center").code == 0
    page = tmp_path / "page.html"
    succeed("report", recorded.parent, "--out", page)
    kept = json.loads(Path(found["order"]).read_text())
    assert kept["llr"] == found["llr"] and kept["text"].strip() == word.strip()
    assert "the order of frames" in page.read_text() and "Log-likelihood ratio of" in page.read_text()
    Path(found["order"]).write_text("{}")
    damaged = run("report", recorded.parent, "--out", page, "--overwrite")
    Path(found["order"]).unlink()
    assert "delete it and run lvlm-probe frames again" in damaged.err


def test_what_is_hidden_may_be_seen_in_another_order(qwen: Built, recorded: Path, video: Path, tmp_path: Path) -> None:
    given = ("--model", "m", "--baseline", "shuffled_frames")
    (made,) = succeed(
        "explain", recorded, *given, "--joint", "--method", "input_gradient", "--param", "size=2", "--json"
    ).json["maps"]
    assert made["baseline"]["kind"] == "shuffled_frames"
    succeed("meter", recorded.parent, *given, "--out", tmp_path / "meter.html")
    (row,) = csv.DictReader((tmp_path / "meter.csv").open())
    assert row["baseline"] == "shuffled_frames"
    asked = ("--video", video, "--num-frames", "4", "--question", "What?", "--out", tmp_path, "--max-new-tokens", "4")
    with open_trace(succeed("record", *given, *asked, "--json").json["trace"]) as trace:
        against = probe.replay(trace, qwen.model, qwen.processor).over("shuffled_frames").llr
        assert trace.baseline["kind"] == "shuffled_frames" and np.abs(trace.llr - against.numpy()).max() < 1e-4
        assert not np.allclose(trace.llr, probe.replay(trace, qwen.model, qwen.processor).over("blur").llr.numpy())


def test_methods_are_compared_on_a_video(recorded: Path, tmp_path: Path) -> None:
    page = tmp_path / "compare.html"
    result = succeed(
        "evaluate", recorded, "--model", "m", "--methods", "input_gradient,occlusion,gradcam", "--out", page,
        "--words", open_trace(recorded).words[0].text, "--json",
    )  # fmt: skip
    maps = {one["method"]: one for one in result.json["traces"][0]["maps"]}
    assert all(len(one["cells"]) == 3 for one in maps.values())
    assert maps["occlusion"]["score"] is not None
    text = page.read_text()
    assert "Video of 4 frames, from 0.0 s to 3.0 s" in text
    assert "time × rows × columns" in text


def test_a_video_may_be_given_as_an_image(recorded: Path, video: Path, tmp_path: Path) -> None:
    made = succeed(
        "explain", "--model", "m", "--image", video, "--fps", "1", "--question", "What?", "--out", tmp_path, "--joint",
        "--method", "input_gradient", "--param", "size=2", "--no-scores", "--max-new-tokens", "2", "--json",
    )  # fmt: skip
    assert made.json["maps"][0]["cells"] == [4, 2, 2]
    assert "audio track" in made.err
    with pytest.MonkeyPatch.context() as patched:  # it is said before the model is loaded
        patched.setattr("lvlm_probe.cli.explain.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
        nothing = run("explain", "--model", "m", "--video", tmp_path / "none.mp4", "--question", "What?")
    assert "there is no such file" in nothing.err
    beside = run("explain", recorded, "--video", video)
    assert "a trace has its own" in beside.err


# ------------------------------------------------------------------------------------------------------------- studies


@pytest.fixture
def study(qwen: Built, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of two questions about videos, by a column of that name."""
    monkeypatch.setattr("lvlm_probe.study.run.runner.load", lambda *_, **__: (qwen.model, qwen.processor))
    (tmp_path / "ball.mp4").write_bytes(video.read_bytes())
    boxes = '"{""0"": [[0, 0, 45, 60]], ""20"": []}"'
    rows = f"id,clip,question,answer,boxes\na,ball.mp4,What happens?,red,{boxes}\nb,ball.mp4,What moves?,red,\n"
    (tmp_path / "rows.csv").write_text(rows)
    return tmp_path


def test_a_study_has_a_column_of_videos(study: Path) -> None:
    model = study / "model"
    model.mkdir()
    file = study / "study.yaml"
    started = succeed("study", "init", study / "rows.csv", "--model", model, "--out", file)
    assert "video" in file.read_text(), started.out
    assert "2 of the first 2 videos open" in file.read_text()
    file.write_text(
        f"out: {study / 'out'}\nmodels: {{m: {model}}}\n"
        "datasets: {rows: {reader: table, source: rows.csv, columns: {video: clip}}}\n"
        "methods: {by gradient: {method: input_gradient, tokens: joint, params: {size: 4}},"
        " by hiding: {method: occlusion, tokens: joint, params: {size: 4}}, other: {method: gradcam, tokens: joint}}\n"
        "settings: {num_frames: 4, max_new_tokens: 3, baseline: blank, words: true, steps: 4}\n"
        "filter: {minimum_drop: 0}\n"
    )
    peeked = succeed("study", "peek", "table", study / "rows.csv", "--column", "video=clip")
    assert "a video: ball.mp4" in peeked.out
    done = run("study", "run", file)
    assert done.code == 0
    records = [json.loads(file.read_text()) for file in (study / "out" / "maps").glob("*.json")]
    by_method = {record["method"]: record for record in records}
    assert len(records) == 6
    assert {record["status"] for record in records} == {"done"}
    assert set(by_method) == {"input_gradient", "occlusion", "gradcam"}
    placed = [record for record in records if "pointing" in record]
    assert len(placed) == 3
    for record in placed:
        heat = ClipHeatmap.read(study / "out" / "maps" / record["map"])
        tube = np.zeros((4, 60, 90), bool)
        tube[:2, :, :45] = True  # frames 0, 10, 20 and 30 of the file are shown
        assert record["energy"] == pytest.approx(tube_energy(heat, tube))
        assert record["pointing"] == tube_pointing(heat, tube) and record["iou"] == pytest.approx(tube_iou(heat, tube))
    page = study / "page.html"
    succeed("study", "page", file, "--out", page)
    table = succeed("study", "table", file, "--format", "markdown")
    assert "by gradient" in table.out
    trace = open_trace(next((study / "out" / "answers").glob("*.h5")))
    assert trace.clips[0].frames == 4
    assert page.stat().st_size > 10_000
