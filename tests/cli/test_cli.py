"""The command line, run for real on the embedded model: every command, every way to get it wrong, Ctrl-C."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import new_process
import numpy as np
import pytest
import torch
from command_line import run, succeed
from PIL import Image

import lvlm_probe as probe
from lvlm_probe import cli, heatmap_store, planning
from lvlm_probe.cli.shared.inputs import columns_from, parameters
from lvlm_probe.errors import ImageError, ProbeError
from lvlm_probe.heatmap_store import MapFile
from lvlm_probe.models.prompts import chat_inputs
from lvlm_probe.selection import word_selections
from lvlm_probe.video.explaining import explain_by

QUICK = tuple(f"--param={pair}" for pair in ("iterations=2", "ig_steps=3", "size=8", "refine=0"))
COMMANDS = [
    str(file.relative_to(Path(cli.__file__).parent).with_suffix("")).replace("/", " ").rstrip("_")
    for file in sorted(Path(cli.__file__).parent.rglob("*.py"))
    if file.name != "__init__.py" and "shared" not in file.parts
]
"""One file each, those of a group in its folder."""


@pytest.fixture(scope="module")
def scene() -> Any:
    """A scene whose answer names two objects."""
    return probe.demo.scenes(1, kinds=["pair"])[0]


@pytest.fixture(scope="module")
def picture(scene: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("picture") / "scene.png"
    scene.image.save(path)
    return path


@pytest.fixture(scope="module")
def recorded(scene: Any, picture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace recorded by ``lvlm-probe record``; read-only."""
    directory = tmp_path_factory.mktemp("recorded")
    result = succeed("record", "--model", "demo", "--image", picture, "--question", scene.question, "--out", directory)
    (path,) = directory.glob("*.h5")
    assert path.name in result.out
    return path


@pytest.fixture
def trace(recorded: Path, tmp_path: Path) -> Path:
    """A copy of the trace in a directory of its own, to explain and to damage."""
    directory = tmp_path / "runs"
    directory.mkdir()
    return Path(shutil.copy(recorded, directory))


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with one weight changed: same shapes, another model."""
    directory: Path = tmp_path_factory.mktemp("other_model")
    model, processor = probe.demo.load()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that has nothing to do with pictures."""
    from transformers import BertConfig, BertModel

    directory: Path = tmp_path_factory.mktemp("text_model")
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=20)
    BertModel(config).save_pretrained(directory)
    return directory


# ---------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    result = succeed(*command.split(), "--help")
    assert f"lvlm-probe {command}" in result.out
    assert f"Example:  lvlm-probe {command}" in result.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_on_80_columns_with_whole_options(command: str) -> None:
    shown = succeed(*command.split(), "--help", columns=80).out
    assert max(map(len, shown.splitlines())) <= 80
    assert not re.search(r"--[\w-]*…", shown), "an option is cut"
    assert "<bool>" not in shown and "<int" not in shown


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "lvlm_probe", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == f"lvlm-probe {probe.__version__}", done.stderr


def test_help_lists_every_command_and_imports_no_torch() -> None:
    code = "import sys; sys.argv = ['lvlm-probe', '--help']\nfrom lvlm_probe.cli import main\ntry: main()\nfinally: "
    code += "print('HEAVY', sorted({'torch', 'transformers', 'h5py', 'matplotlib', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(COMMANDS) >= 21
    assert all(f" {command.split()[0]} " in result.stdout for command in COMMANDS)
    assert result.stdout.rstrip().endswith("HEAVY []")


def test_version() -> None:
    assert succeed("--version").out.strip() == f"lvlm-probe {probe.__version__}"


@pytest.mark.parametrize("wrong", [("dmeo",), ("record", "--imag", "x.png"), ("demo", "--scenes", "none")])
def test_usage_errors_end_with_code_2(wrong: tuple[str, ...]) -> None:
    result = run(*wrong)
    assert result.code == 2
    assert "Traceback" not in result.err
    assert "Usage" in result.err


# ---------------------------------------------------------------------------------------------------------------- demo


@pytest.mark.quick
def test_demo_goes_from_a_picture_to_a_page(tmp_path: Path) -> None:
    result = succeed("demo", "--out", tmp_path / "demo", "--json").json
    page = Path(result["report"])
    (shown,) = result["scenes"]
    assert shown["question"] in page.read_text(encoding="utf-8")
    assert shown["answer"].strip() == shown["expected"]
    answer_map, *word_maps = shown["maps"]
    assert len(word_maps) >= 2
    assert answer_map["trusted"] is True
    assert answer_map["deletion"] < 0.2 < 0.8 < answer_map["insertion"]
    assert {Path(item["picture"]).suffix for item in shown["maps"]} == {".png"}
    with Image.open(word_maps[0]["picture"]) as overlay:
        assert overlay.size == (336, 336)
    assert max(word["llr"] for word in shown["words"]) > 1.0

    again = run("demo", "--out", tmp_path / "demo")
    assert again.code == 2
    assert "report.html exists; add --overwrite" in again.err


# -------------------------------------------------------------------------------------------------------------- record


def test_record_json_names_the_words_and_what_the_picture_did(scene: Any, picture: Path, tmp_path: Path) -> None:
    options = ("--model", str(probe.demo.path()), "--image", picture, "--question", scene.question, "--out", tmp_path)
    result = succeed("record", *options, "--json").json
    trace = probe.open_trace(result["trace"])
    assert trace.answer == result["answer"]
    assert result["question"] == trace.question == scene.question
    assert trace.image.size == scene.image.size
    assert trace.attention is not None
    by_word = {word["text"]: word["llr"] for word in result["words"]}
    assert max(by_word[word] for word in scene.visual_words if word in by_word) > 1.0
    for word in result["words"]:
        start, stop = word["tokens"]
        assert word["log_prob"] == pytest.approx(float(trace.log_probs[start:stop].sum()), abs=1e-5)


def test_record_options_reach_the_trace(scene: Any, picture: Path, tmp_path: Path) -> None:
    options = ("--model", "demo", "--image", picture, "--question", scene.question, "--out", tmp_path, "--json")
    more = ("--no-attention", "--baseline", "mean", "--max-new-tokens", "2", "--attn", "eager", "--device", "cpu")
    trace = probe.open_trace(succeed("record", *options, *more).json["trace"])
    assert trace.attention is None
    assert trace.baseline is not None
    assert trace.baseline["kind"] == "mean"
    assert len(trace.tokens) == 2
    assert trace.model["attn_implementation"] == "eager"


def test_record_adds_to_an_existing_directory(scene: Any, picture: Path, trace: Path) -> None:
    succeed("record", "--model", "demo", "--image", picture, "--question", scene.question, "--out", trace.parent)
    assert len(list(trace.parent.glob("*.h5"))) == 2


@pytest.fixture
def wrong_inputs(tmp_path: Path, picture: Path, text_model: Path) -> dict[str, Path]:
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:400])
    (tmp_path / "empty_dir").mkdir()
    return {"tmp": tmp_path, "picture": picture, "text_model": text_model}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--model demo --image {tmp}/nowhere.png --question Q", "no image at {tmp}/nowhere.png"),
        ("--model demo --image {tmp}/notes.txt --question Q", "{tmp}/notes.txt is not an image"),
        ("--model demo --image https://example.com/a.png --question Q", "curl -LO https://example.com/a.png"),
        ("--model demo --image {tmp}/broken.png --question Q", "{tmp}/broken.png is not an image"),
        ("--model demo --image {tmp}/empty_dir --question Q", "it is a directory"),
        ("--model demo --question Q", "add --image FILE"),
        ("--model demo --image {picture}", "--question"),
        ("--model demo --image {picture} --question Q --out {tmp}/notes.txt", "is a file; name a directory"),
        ("--model demo --image {picture} --question Q --baseline fog", "choose one of blur, blank"),
        ("--model demo --image {picture} --question Q --device warp9", "no device 'warp9'"),
        ("--model demo --image {picture} --question Q --dtype float31", "no dtype 'float31'"),
        ("--model ./no/model --image {picture} --question Q", "no model directory at ./no/model"),
        ("--model {tmp}/empty_dir --image {picture} --question Q", "it has no config.json"),
        ("--model {picture} --image {picture} --question Q", "is a file; a model is a directory or a hub id"),
        ("--model {text_model} --image {picture} --question Q", "not a vision-language model"),
        ("--model no-such-owner/no-such-model --image {picture} --question Q", "Check the spelling and the network"),
    ],
)
def test_record_refuses_in_a_sentence(arguments: str, said: str, wrong_inputs: dict[str, Path]) -> None:
    result = run("record", "--out", wrong_inputs["tmp"] / "out", *arguments.format(**wrong_inputs).split())
    assert result.code == 2
    assert said.format(**wrong_inputs) in result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    assert not list((wrong_inputs["tmp"] / "out").glob("*.h5"))


def test_a_path_is_never_looked_up_on_the_network(monkeypatch: pytest.MonkeyPatch, picture: Path) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a path went to the network"))
    assert run("record", "--model", "/nowhere/model", "--image", picture, "--question", "Q").code == 2


def test_debug_gives_the_error_itself(tmp_path: Path) -> None:
    arguments = [
        "lvlm-probe",
        "record",
        "--model",
        "demo",
        "--image",
        str(tmp_path / "no.png"),
        "--question",
        "Q",
        "--debug",
    ]
    with mock.patch.object(sys, "argv", arguments), pytest.raises(ImageError):
        cli.main()


def test_something_unexpected_is_said_in_a_sentence(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.Trace, "describe", lambda _: 1 / 0)
    result = run("inspect", trace)
    assert result.code == 3
    assert "ZeroDivisionError: division by zero" in result.err
    assert "--debug" in result.err
    assert "Traceback" not in result.err


# ----------------------------------------------------------------------------------- explain, evaluate, report, inspect


def test_explain_evaluate_report(scene: Any, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The road in separate commands; what is finished is not computed again."""
    made = succeed("explain", trace.parent, "--word-maps", *QUICK, "--json").json
    answer_map, *word_maps = made["maps"]
    assert set(answer_map["words"].split(" … ")) >= {item["words"] for item in word_maps}
    assert len(word_maps) >= 2
    tokens = [index for item in word_maps for index in item["tokens"]]
    assert sorted(tokens) == answer_map["tokens"]
    files = [Path(item["map"]) for item in made["maps"]]
    assert all(file.parent == trace.parent / "explanations" for file in files)
    assert all(Path(item["picture"]).is_file() for item in made["maps"])

    stamps = [file.stat().st_mtime_ns for file in files]
    with monkeypatch.context() as patch:
        patch.setattr(heatmap_store, "explain_by", lambda *_, **__: pytest.fail("a finished map was made again"))
        patch.setattr(heatmap_store, "evaluate", lambda *_, **__: pytest.fail("a finished map was scored again"))
        again = succeed("explain", trace, "--word-maps", *QUICK, "--json").json
    assert again == made
    assert [file.stat().st_mtime_ns for file in files] == stamps

    scored = succeed("evaluate", answer_map["map"], "--steps", "8", "--score", "log", "--json").json
    assert scored[0]["score"]["params"]["score"] == "log"
    assert len(scored[0]["score"]["fractions"]) == 9
    stored = MapFile(files[0]).score()
    assert stored is not None
    assert stored.deletion == pytest.approx(scored[0]["deletion"])

    page = tmp_path / "report.html"
    result = succeed("report", trace.parent, "--out", page)
    assert f"({len(files)} maps)" in result.out
    assert scene.question in page.read_text(encoding="utf-8")
    refused = run("report", trace, "--out", page)
    assert refused.code == 2
    assert "exists; add --overwrite" in refused.err
    succeed("report", trace, "--out", page, "--overwrite", "--title", "A new page")
    assert "A new page" in page.read_text(encoding="utf-8")

    assert "deletion" in succeed("inspect", files[0]).out
    assert succeed("inspect", files[0], "--json").json["method"] == "igos++"

    trace.unlink()
    orphaned = run("evaluate", trace.parent)
    assert orphaned.code == 2
    assert "its trace is not beside it" in orphaned.err


def test_the_score_of_a_stored_map_is_the_score_it_was_made_with(trace: Path) -> None:
    made = succeed("explain", trace, *QUICK, "--json").json["maps"][0]
    scored = succeed("evaluate", trace, "--json").json[0]
    assert scored["deletion"] == pytest.approx(made["deletion"], abs=1e-5)
    assert scored["insertion"] == pytest.approx(made["insertion"], abs=1e-5)


def test_explain_searches_in_bfloat16_and_says_so(trace: Path) -> None:
    """A map of its own beside the one in float32, scored in float32."""
    asked = ("explain", trace, *QUICK, "--json")
    plain, found = (succeed(*asked, *more).json["maps"][0] for more in ((), ("--search-dtype", "bfloat16")))
    assert plain["search"] is None and plain["map"] != found["map"]
    assert found["search"]["dtype"] == "bfloat16" and 0 < found["search"]["backward"] <= found["passes"]["backward"]
    assert found["search"]["forward"] < found["passes"]["forward"]
    shown = " ".join(succeed("explain", trace, *QUICK, "--search-dtype", "bfloat16").out.split())
    assert re.search(r"\d+ forward and \d+ backward passes, \d+ and \d+ of them in bfloat16", shown)
    refused = run("explain", trace, *QUICK, "--search-dtype", "float16")
    assert refused.code == 2 and "a search is computed in bfloat16" in refused.err


def test_explain_says_what_a_map_took_and_keeps_to_a_budget(trace: Path) -> None:
    shown = " ".join(succeed("explain", trace, "--budget", "24").out.split())
    assert re.search(r"\d+ forward and \d+ backward passes", shown) and "round" not in shown
    assert re.search(r"insertion − deletion [\d.]+; a blob in the middle of the image has -?[\d.]+", shown)
    shown = " ".join(succeed("explain", trace).out.split())
    assert re.search(r"\d+ forward and \d+ backward passes in \d rounds?: \w+", shown)
    searched = ("explain", trace, "--method", "greedy", "--param", "segments=grid", "--param", "regions=6")
    shown = " ".join(
        succeed(*searched, "--param", "budget=10").out.split()
    )  # a method that ends early, and has no rounds
    assert re.search(r"\d+ forward and \d+ backward passes: the budget of 10 images is spent", shown)
    made = succeed("explain", trace, "--json").json["maps"][0]
    assert made["rounds"][0]["passes"] == 24 and isinstance(made["center_gain"], float)
    refused = run("explain", trace, "--method", "random", "--budget", "24")
    assert refused.code == 2 and "random takes no parameter 'budget'" in refused.err
    assert "a budget of 9 passes is less than the 24 of the first round" in run("explain", trace, "--budget", "9").err


def test_explain_a_word_directly_from_a_picture(scene: Any, picture: Path, tmp_path: Path) -> None:
    word = scene.visual_words[0]
    options = ("--model", "demo", "--image", picture, "--question", scene.question, "--out", tmp_path / "new")
    result = succeed("explain", *options, "--words", word, "--no-scores", *QUICK)
    assert len(list((tmp_path / "new").glob("*.h5"))) == 1
    (found,) = (tmp_path / "new" / "explanations").glob("*.h5")
    assert found.name.startswith("scene_what-") and f"_igos++_{word}." in found.name
    assert MapFile(found).score() is None
    assert scene.answer in result.out
    heat = MapFile(found).read()
    assert heat.selection.rule == "words"
    assert heat.selection.text == word


def test_explain_with_a_picture_as_baseline(picture: Path, trace: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 50), (90, 120, 60)).save(tmp_path / "grey.png")
    made = succeed("explain", trace, "--baseline", tmp_path / "grey.png", *QUICK, "--json").json["maps"][0]
    assert made["baseline"]["kind"] == "image"
    without = run("evaluate", trace)
    assert without.code == 2
    assert "--baseline FILE" in without.err
    scored = succeed("evaluate", trace, "--baseline", tmp_path / "grey.png", "--json").json[0]
    assert scored["insertion"] == pytest.approx(made["insertion"], abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--words", "zebra"), "zebra"),
        (("--method", "igoss"), "closest first): 'igos+', 'igos++'"),
        (("--param", "iteration=3"), "'iterations'"),
        (("--param", "iterations"), "NAME=VALUE"),
        (("--image-number", "4"), "image=4"),
        (("--image", "x.png"), "give either TRACE, or --image"),
        (("--alpha", "99"), None),
        (("--words", "is", "--joint"), "--words and --joint both say"),
        (("--words", "is", "--alpha", "2"), "--words and --alpha both say"),
        (("--joint", "--alpha", "1"), "--joint and --alpha both say"),
        (("--exact", "--no-scores"), "give either"),
        (("--max-new-tokens", "128"), "--max-new-tokens is of a new answer"),
        (("--budget", "40", "--param", "budget=50"), "--budget 40 and --param budget=50"),
        (("--param", "size=9"), "size is given twice"),
        (("--out", ""), "--out is an empty text"),
        (("--image=",), "--image is an empty text"),
    ],
)
def test_explain_says_what_is_wrong(arguments: tuple[str, ...], said: str | None, trace: Path) -> None:
    result = run("explain", trace, *QUICK, *arguments)
    if said is None:  # an empty selection is a result, not a mistake
        assert result.code == 0
        assert "no token gains more than 99" in result.out
    else:
        assert result.code == 2
        assert said in result.err
        assert "Traceback" not in result.err


@pytest.mark.quick
def test_a_variable_of_the_shell_that_is_not_set_names_no_trace(monkeypatch: pytest.MonkeyPatch, trace: Path) -> None:
    monkeypatch.chdir(trace.parent)
    assert "TRACE is an empty text" in run("inspect", "").err.replace("PATH", "TRACE")
    assert run("inspect", ".").code == 0
    assert "--row is of one file" in run("inspect", ".", "--row", "0").err
    new = run("explain", "--model", "demo", "--image", "x.png", "--question", "Q", "--row", "0")
    assert new.code == 2 and "--row is of a trace" in new.err


@pytest.mark.quick
def test_what_a_command_reads_is_not_written_over(tmp_path: Path, picture: Path) -> None:
    """Also where the name of what is written is made from another one, and where a link leads to it."""
    rows, link = tmp_path / "rows.csv", tmp_path / "link.html"
    rows.write_text(f"image,question,answer\n{picture},What color is the circle?,red\n")
    link.symlink_to(rows)
    before = rows.read_text()
    for arguments, said in (
        (("meter", rows, "--model", "demo", "--out", tmp_path / "rows.html"), "the csv beside the page would be"),
        (("meter", rows, "--model", "demo", "--out", link), "--out .* is a file that this command reads"),
        (("study", "init", rows, "--model", "demo", "--out", rows), "--out .* is a file that this command reads"),
        (("meter", rows, "--model", "demo", "--out", tmp_path / "page.csv"), "call it page.html"),
    ):
        result = run(*arguments, "--overwrite")
        assert result.code == 2 and re.search(said, result.err), result
    assert rows.read_text() == before and sorted(tmp_path.iterdir()) == [link, rows]


@pytest.mark.quick
def test_options_of_a_file_of_answers_do_not_go_with_traces(trace: Path, tmp_path: Path) -> None:
    result = run("meter", trace, "--out", tmp_path / "m.html", "--format", "csv")
    assert result.code == 2 and "--format is of a file of answers" in result.err
    twice = run("meter", trace, "--out", tmp_path / "m.html", "--fail-on", "habit", "--fail-on", "habit=20%")
    assert twice.code == 2 and "habit is given twice" in twice.err
    with pytest.raises(ProbeError, match="answer is given twice"):
        columns_from(["answer=a", "answer=b"])


@pytest.mark.quick
def test_a_terminal_that_does_not_know_its_width_is_told_all_the_same(trace: Path) -> None:
    assert run("inspect", trace, columns=0).out == run("inspect", trace, columns=80).out != ""


@pytest.mark.quick
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device here")
def test_a_disk_that_is_full_is_told_in_a_sentence(trace: Path) -> None:
    command = [sys.executable, "-m", "lvlm_probe", "inspect", str(trace)]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 2 and ended.stderr.startswith("error: the disk is full")


@pytest.mark.quick
def test_explain_without_anything_to_explain(tmp_path: Path) -> None:
    assert "give a trace file, or a new run" in run("explain", "--method", "igos++").err
    (tmp_path / "empty").mkdir()
    assert "holds no traces; record one" in run("explain", tmp_path / "empty").err
    assert "there is no" in run("explain", tmp_path / "no.h5").err


def test_commands_on_maps_say_how_to_make_some(trace: Path, tmp_path: Path) -> None:
    for command in ("evaluate", "report"):
        result = run(command, trace, *(("--out", str(tmp_path / "r.html")) if command == "report" else ()))
        assert result.code == 2
        assert f"lvlm-probe explain {trace}" in result.err


@pytest.mark.quick
def test_inspect_shows_answer_words_and_model(scene: Any, trace: Path) -> None:
    shown = succeed("inspect", trace).out
    assert scene.question in shown
    assert "LlavaForConditionalGeneration" in shown
    assert all(word in shown for word in scene.visual_words)
    listed = succeed("inspect", trace.parent).out
    assert trace.name in listed
    assert scene.answer in listed
    assert succeed("inspect", trace, "--json").json["answer"].strip() == scene.answer


def test_inspect_lists_the_last_traces_and_names_damaged_ones(trace: Path) -> None:
    damaged = trace.with_name("20000101T000000.000000Z-1-00000000.b1.h5")
    damaged.write_bytes(trace.read_bytes()[:3000])
    result = succeed("inspect", trace.parent)
    assert trace.name in result.out
    assert damaged.name in result.err
    assert "the last 1 of 2 files" in succeed("inspect", trace.parent, "--last", "1").out


# ------------------------------------------------------------------------------------------- several methods, compared


SWIFT = "input_gradient,attention,random"


@pytest.fixture
def two_traces(recorded: Path, tmp_path: Path) -> Path:
    """A run directory with two answers."""
    directory = tmp_path / "runs"
    shutil.copytree(recorded.parent, directory, ignore=shutil.ignore_patterns("explanations"))
    (other,) = probe.demo.scenes(1, kinds=["colour"])
    other.image.save(tmp_path / "other.png")
    succeed(
        *("record", "--model", "demo", "--image", tmp_path / "other.png"),
        *("--question", other.question, "--out", directory),
    )
    return directory


def test_evaluate_compares_methods_and_goes_on_where_it_was(two_traces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = two_traces / "comparison.html"
    real, made = explain_by, []

    def explain(replay: Any, **options: Any) -> Any:
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(options["method"])
        return real(replay, **options)

    with monkeypatch.context() as patch:
        patch.setattr(heatmap_store, "explain_by", explain)
        stopped = run("evaluate", two_traces, "--methods", SWIFT, "--steps", "8")
    assert stopped.code == 130
    assert "4 finished maps are kept" in stopped.err
    assert f"the page so far: {page}" in stopped.err and "4 of 6 maps so far" in page.read_text("utf-8")
    assert [len(entry["maps"]) for entry in json.loads(page.with_suffix(".json").read_text("utf-8"))["traces"]] == [
        3,
        1,
    ]
    kept = {file: file.stat().st_mtime_ns for file in (two_traces / "explanations").glob("*.h5")}
    assert len(kept) == 4

    result = succeed("evaluate", two_traces, "--methods", SWIFT, "--steps", "8")
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert len(list((two_traces / "explanations").glob("*.score.json"))) == 6
    lines = result.out.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("method"))
    rows = {line.split()[0]: line for line in lines[head + 1 : head + 4]}
    assert set(rows) == set(SWIFT.split(","))
    assert all("2 of 2" in row and row.count("[") == 3 for row in rows.values())
    text = page.read_text("utf-8")
    assert "3 methods on 2 answers" in text and "one grid of 32 × 32 cells" in text and "so far" not in text

    stored = json.loads(page.with_suffix(".json").read_text("utf-8"))
    for number, entry in enumerate(stored["methods"]):
        gains = []
        for answer in stored["traces"]:
            (score,) = [item["score"] for item in answer["maps"] if item["method"] == entry["method"]]
            assert (score["params"]["grid"], score["params"]["steps"]) == ([32, 32], 8)
            gains.append(score["insertion"] - score["deletion"])
        assert entry["gain"]["mean"] == pytest.approx(sum(gains) / 2)
        shown = rows[entry["method"]].split()[1]
        assert float(shown) == pytest.approx(entry["gain"]["mean"], abs=0.0051)
        assert lines[head + 1 + number].startswith(entry["method"])  # highest gain first

    refused = run("evaluate", two_traces, "--methods", SWIFT)
    assert refused.code == 2
    assert "exists; add --overwrite" in refused.err
    with monkeypatch.context() as patch:
        patch.setattr(heatmap_store, "explain_by", lambda *_, **__: pytest.fail("a finished map was made again"))
        patch.setattr(heatmap_store, "evaluate", lambda *_, **__: pytest.fail("a finished map was scored again"))
        again = succeed("evaluate", two_traces, "--methods", SWIFT, "--steps", "8", "--overwrite", "--json").json
    assert again["methods"] == stored["methods"]
    # Judged in another way, it is judged anew.
    other = succeed(
        "evaluate", two_traces, "--methods", "random", "--steps", "9", "--grid", "16", "--overwrite", "--json"
    )
    assert other.json["traces"][0]["maps"][0]["score"]["params"]["grid"] == [16, 16]


def test_a_search_in_bfloat16_makes_other_maps_beside_the_exact_ones(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / recorded.name
    shutil.copy(recorded, trace)
    asked = ("evaluate", trace, "--methods", "input_gradient", "--steps", "4", "--overwrite", "--json")
    exact = succeed(*asked).json["traces"][0]["maps"][0]
    low = succeed(*asked, "--search-dtype", "bfloat16").json["traces"][0]["maps"][0]
    assert exact["search"] is None and low["search"]["dtype"] == "bfloat16" and low["search"]["backward"] >= 1
    kept = sorted((tmp_path / "explanations").glob("*.h5"), key=lambda file: file.stat().st_mtime_ns)
    assert [probe.Heatmap.read(file).search_dtype for file in kept] == [None, "bfloat16"]
    assert succeed(*asked).json["traces"][0]["maps"][0] == exact and len(kept) == 2
    formats: list[Any] = []
    timed = planning.timed

    def watched(by: probe.Replay, **how: Any) -> Any:
        formats.append(by.reduced and by.reduced.dtype)
        return timed(by, **how)

    with monkeypatch.context() as patch:  # what it will take is timed in the format of the search
        patch.setattr(planning, "timed", watched)
        named = ("evaluate", trace, "--methods", "gradcam,center", "--steps", "4", "--overwrite")
        succeed(*named, "--search-dtype", "bfloat16")
    assert formats == [None, None, "bfloat16", "bfloat16"]
    assert "computed in bfloat16" in run(*asked, "--search-dtype", "int8").err
    assert "--search-dtype" in run("evaluate", trace, "--search-dtype", "bfloat16").err
    planned = ("plan", trace, "--no-seconds", "--methods", "input_gradient", "--json")
    assert succeed(*planned, "--search-dtype", "bfloat16").json["plans"][0]["search_dtype"] == "bfloat16"
    assert succeed(*planned).json["plans"][0]["search_dtype"] is None


def test_equal_words_and_few_cells_are_said_at_the_command_line(tmp_path: Path) -> None:
    (scene,) = probe.demo.scenes(1)
    scene.image.save(tmp_path / "a.png")
    answer = {"image": "a.png", "question": scene.question, "answer": "The cross is yellow and yellow."}
    (tmp_path / "given.jsonl").write_text(json.dumps(answer))
    folder = tmp_path / "runs"
    succeed("import", tmp_path / "given.jsonl", "--model", "demo", "--out", folder)
    asked = ("explain", folder, "--model", "demo", "--words", "yellow", "--word-maps", "--method", "occlusion")
    result = succeed(*asked, "--param", "size=3", "--no-scores")
    shown = [re.split(r"  not scored|: no map", line)[0][4:] for line in result.out.splitlines() if line[2:3] in "·–"]
    assert shown == ["yellow … yellow (2nd)", "yellow", "yellow (2nd)"]  # of the last there is no map
    assert result.out.count("only 3 × 3 cells") == 2
    assert "bold:" not in result.out and "underlined:" not in result.out  # in a pipe nothing is either
    names = [file.name.split(".")[0] for file in (folder / "explanations").glob("*.h5")]
    assert sum(name.endswith("_yellow-2nd") for name in names) == 1
    assert sum(name.endswith("_yellow") for name in names) == 1
    page = tmp_path / "page.html"
    succeed("report", folder, "--out", page)
    labels = [entry["label"] for entry in report_data(page)["samples"][0]["maps"]]
    assert labels == ["“yellow yellow (2nd)”", "“yellow”", "“yellow (2nd)”"]
    assert "only 3 × 3 cells" in report_data(page)["samples"][0]["maps"][0]["verdict"]["reasons"][-1]


def report_data(page: Path) -> dict[str, Any]:
    """The data that a report's page shows."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    assert found is not None
    return json.loads(found[1])  # type: ignore[no-any-return]


def test_the_legend_names_the_looks_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.text import Text

    from lvlm_probe.cli.shared import maps

    answer = Text.assemble("The ", ("cat", "bold green underline"))
    under = Text.assemble("The ", ("cat", "underline"))
    monkeypatch.setattr(maps, "shows_looks", lambda: True)
    assert maps.legend(answer) == "bold: the image makes the word over e times likelier; underlined: explained"
    assert maps.legend(under) == "underlined: explained" and maps.legend(Text("The cat")) == ""
    monkeypatch.setattr(maps, "shows_looks", lambda: False)
    assert maps.legend(answer) == ""


def test_evaluate_says_before_what_it_takes_and_begins_with_what_is_quick(trace: Path) -> None:
    result = succeed("evaluate", trace, "--methods", "occlusion,input_gradient,center")
    said = result.err.splitlines()
    forecast = next(number for number, line in enumerate(said) if line.startswith("about "))
    assert " for 3 methods on 1 answer, judging included" in said[forecast]
    assert "2 quick ones first" in said[forecast] and said[forecast].endswith("then occlusion")
    rows = [line.split(":")[0] for line in said[forecast + 1 :] if line.endswith(" of 3)")]
    assert rows == ["center", "input_gradient", "occlusion"]  # not the order in which they were named
    # On the page, and for programs, they stand as they always do.
    stored = json.loads((trace.parent / "comparison.json").read_text("utf-8"))
    assert [item["method"] for item in stored["traces"][0]["maps"]] == ["occlusion", "input_gradient", "center"]
    # Nothing is left to be told when all is there.
    again = succeed("evaluate", trace, "--methods", "occlusion,input_gradient,center", "--overwrite")
    assert "judging included" not in again.err


@pytest.mark.parametrize("method", ["occlusion", "rise"])
def test_a_long_method_goes_on_within_its_map(
    method: str, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lvlm_probe.replaying import Replay

    ran: list[int] = []
    real = Replay._in_micro_batches

    def run_masks(self: Replay, masks: Any, *rest: Any) -> Any:
        ran.append(len(masks))
        if stop_after is not None and sum(ran) > stop_after:
            raise KeyboardInterrupt
        return real(self, masks, *rest)

    monkeypatch.setattr(Replay, "_in_micro_batches", run_masks)
    command = ("explain", trace, "--method", method, "--no-scores", "--json")
    command += ("--param", "masks=300") if method == "rise" else ("--param", "batch=40")
    stop_after: int | None = 150
    assert run(*command).code == 130
    folder = trace.parent / "explanations"
    assert len(list(folder.glob("*.masks.jsonl"))) == 1 and not list(folder.glob("*.h5"))
    stop_after, before = None, sum(ran[:-1])
    ran.clear()
    resumed = succeed(*command).json["maps"][0]
    after = sum(ran)
    assert not list(folder.glob("*.masks.jsonl"))
    # What was finished was not sent again, and counts as what the map took.
    ran.clear()
    whole = succeed(*command, "--out", tmp_path / "again").json["maps"][0]
    assert sum(ran) - after >= before - 2 > 50
    assert resumed["passes"] == whole["passes"]
    maps = [probe.Heatmap.read(Path(one["map"])).values for one in (resumed, whole)]
    assert np.array_equal(*maps)  # to the last bit


def test_a_comparison_that_is_killed_leaves_a_page_of_what_was_finished(
    trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lvlm_probe.cli.shared import comparison

    real, made = explain_by, []

    class Killed(BaseException):
        """Nobody catches it, as nobody catches SIGKILL."""

    def explain(replay: Any, **options: Any) -> Any:
        if len(made) == 2:
            raise Killed
        made.append(options["method"])
        return real(replay, **options)

    monkeypatch.setattr(heatmap_store, "explain_by", explain)
    monkeypatch.setattr(comparison, "_PAGE_EVERY", 0.0)
    with pytest.raises(Killed):
        succeed("evaluate", trace, "--methods", SWIFT, "--steps", "4")
    page = trace.parent / "comparison.html"
    assert re.search("[12] of 3 maps so far", page.read_text("utf-8"))  # how often it is written is the clock's
    monkeypatch.setattr(heatmap_store, "explain_by", real)
    succeed("evaluate", trace, "--methods", SWIFT, "--steps", "4")  # without --overwrite
    assert "so far" not in page.read_text("utf-8")


def test_a_comparison_that_is_stopped_between_its_page_and_its_scores_goes_on(
    trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lvlm_probe.cli.shared import comparison

    command = ("evaluate", trace, "--methods", "center,random", "--steps", "4")
    with monkeypatch.context() as patch:
        patch.setattr(comparison, "_record", mock.Mock(side_effect=KeyboardInterrupt))
        assert run(*command).code == 130
    page = trace.parent / "comparison.html"
    assert page.exists()
    succeed(*command)  # without --overwrite
    assert json.loads(page.with_suffix(".json").read_text("utf-8"))["finished"]


def test_methods_are_judged_on_few_points_whose_bound_is_stored(trace: Path) -> None:
    named = ("evaluate", trace, "--methods", "input_gradient,center", "--chance", "2", "--overwrite", "--json")
    quick, whole = succeed(*named).json, succeed(*named, "--full").json
    judged = {"score": "prob", "auc": "trapezoid", "steps": None, "chance": 2, "grid": 32, "mode": "fast", "seed": 0}
    assert whole["judged"] == judged and quick["judged"] == {**judged, "sampling": "adaptive", "tolerance": 0.005}
    few, full = quick["traces"][0]["maps"], whole["traces"][0]["maps"]
    for one, other in zip(few, full, strict=True):
        params = one["score"]["params"]
        assert params["sampling"] == "adaptive" and "sampling" not in other["score"]["params"]
        for name in ("deletion", "insertion"):
            assert params["error_bound"][name] <= params["tolerance"] == 0.005
            wander = params["turns"][name]  # the bound is one for curves that do not turn
            assert one["score"][name] == pytest.approx(other["score"][name], abs=0.005 + wander)
    # Curves of every point are taken for those of few.
    assert succeed(*named).json["traces"][0]["maps"] == full


def test_what_methods_are_both_asked_for_is_scored_once(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lvlm_probe.metrics import deletion_insertion

    scored: list[int] = []
    real = deletion_insertion.MaskScores.__call__

    def counting(self: Any, masks: Any) -> Any:
        before = len(self)
        found = real(self, masks)
        scored.append(len(self) - before)
        return found

    monkeypatch.setattr(deletion_insertion.MaskScores, "__call__", counting)

    def images(*methods: str) -> int:
        scored.clear()
        named = ("--methods", ",".join(methods), "--steps", "6", "--chance", "5", "--overwrite")
        succeed("evaluate", trace, *named)
        for file in (trace.parent / "explanations").glob("*.score.json"):
            file.unlink()
        return sum(scored)

    # Of the second method its own two curves; both ends and five random maps are the first one's.
    assert images("input_gradient", "igos+") - images("input_gradient") <= 2 * 5


def test_methods_are_compared_by_a_contrast(trace: Path) -> None:
    """Methods that follow no score say so, and the others are judged by it; maps of the words alone are other maps."""
    named = ("evaluate", trace, "--methods", "input_gradient,attention,random", "--steps", "6", "--overwrite", "--json")
    plain, made = succeed(*named).json, succeed(*named, "--against", "next").json
    folder = trace.parent / "explanations"
    labels = [probe.Heatmap.read(file).selection.score for file in sorted(folder.glob("*.h5"))]
    assert sum(label is not None for label in labels) == 2 and len(labels) >= 5
    found = {one["method"]: one for one in made["methods"]}
    assert found["attention"]["maps"] == 0 and found["random"]["maps"] == found["input_gradient"]["maps"] == 1
    before = {one["method"]: one for one in plain["methods"]}
    assert before["attention"]["maps"] == 1
    assert found["input_gradient"]["gain"] != before["input_gradient"]["gain"]


def test_maps_of_explain_are_used_by_evaluate(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    succeed("explain", trace, "--method", "random")
    monkeypatch.setattr(heatmap_store, "explain_by", lambda *_, **__: pytest.fail("a finished map was made again"))
    out = trace.parent / "new" / "page.html"
    made = succeed("evaluate", trace, "--methods", "random", "--out", out, "--json").json
    assert made["methods"][0]["maps"] == 1
    assert out.is_file()


def test_a_method_that_cannot_run_leaves_the_others_alone(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = explain_by

    def explain(replay: Any, **options: Any) -> Any:
        if options["method"] == "center":
            raise RuntimeError("no centre to be found")
        return real(replay, **options)

    monkeypatch.setattr(heatmap_store, "explain_by", explain)
    result = succeed("evaluate", trace, "--methods", "center,random", "--words", "is", "--steps", "4")
    assert "center made no map on any trace: something unexpected happened, RuntimeError: no centre" in result.err
    page = (trace.parent / "comparison.html").read_text("utf-8")
    assert "no centre to be found" in page
    assert '<span class="k">is</span>' in page
    assert "random" in result.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--methods", "randon"), "no explainer 'randon'; there are (closest first): 'random'"),
        (("--methods", " , "), "--methods names none; write all, or some of: attention"),
        (("--methods", "random", "--words", "zebra"), "'zebra' is not in the answer"),
        (("--words", "red"), "go with --methods"),
        (("--against", "red"), "go with --methods"),
        (("--out", "page.html"), "go with --methods"),
    ],
)
def test_evaluate_says_what_is_wrong(arguments: tuple[str, ...], said: str, trace: Path) -> None:
    result = run("evaluate", trace, *arguments)
    assert result.code == 2
    assert said in result.err
    assert "Traceback" not in result.err
    assert not list(trace.parent.glob("comparison.*"))


@pytest.mark.quick
def test_evaluate_methods_without_traces(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no traces; record one" in run("evaluate", tmp_path / "empty", "--methods", "random").err
    assert "there is no" in run("evaluate", tmp_path / "none", "--methods", "random").err


@pytest.mark.quick
def test_methods_lists_what_there_is_and_what_it_needs() -> None:
    from lvlm_probe.explainers import methods, needs_of

    rows = {row["method"]: row for row in succeed("methods", "--json").json}
    assert list(rows) == methods()
    assert all(rows[name]["summary"] in line for name, line in zip(rows, repr(methods()).splitlines(), strict=True))
    assert all(set(row["needs"]) == needs_of(name) for name, row in rows.items())
    assert rows["attention"]["trace_alone"] and not rows["tmm"]["trace_alone"]
    assert "masks" in rows["rise"]["parameters"]
    assert all(row["summary"].endswith((".", "?")) and len(row["summary"]) < 200 for row in rows.values())
    assert len({row["summary"] for row in rows.values()}) == len(rows)
    listed = succeed("methods").out.splitlines()
    at = next(number for number, line in enumerate(listed) if line.startswith("tmm "))
    assert "needs passes, gradients, attention" in listed[at]
    assert " ".join(" ".join(listed[at + 1 :]).split()).startswith(rows["tmm"]["summary"])
    at = next(number for number, line in enumerate(listed) if line.startswith("random "))
    assert "needs nothing" in listed[at] and "trace alone" in listed[at]


# -------------------------------------------------------------------------------------------------------------- verify


def test_verify_states_the_difference(trace: Path) -> None:
    result = succeed("verify", trace, "--model", "demo")
    assert "largest difference" in result.out
    (row,) = succeed("verify", trace.parent, "--json").json  # the model the trace names
    assert row["ok"]
    assert 0.0 <= row["difference"] <= 1e-4


def test_verify_ends_with_1_beyond_the_tolerance(trace: Path) -> None:
    result = run("verify", trace, "--model", "demo", "--dtype", "bfloat16", "--tolerance", "1e-7", "--json")
    assert result.code == 1
    (row,) = result.json
    assert row["difference"] > 1e-7
    assert not row["ok"]


def test_verify_ends_with_1_on_another_model(trace: Path, other_model: Path) -> None:
    result = run("verify", trace, "--model", other_model)
    assert result.code == 1
    assert "another model" in result.out
    assert "fingerprint" in result.out


def test_explain_refuses_another_model(trace: Path, other_model: Path) -> None:
    result = run("explain", trace, "--model", other_model)
    assert result.code == 2
    assert "fingerprint" in result.err


@pytest.mark.parametrize("command", ["inspect", "verify", "explain"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_trace_is_named(command: str, share: float, trace: Path) -> None:
    data = trace.read_bytes()
    trace.write_bytes(data[: int(len(data) * share)])
    result = run(command, trace)
    assert result.code == 2
    assert trace.name in result.err
    assert "Traceback" not in result.err


# -------------------------------------------------------------------------------------------------------------- Ctrl-C


# The command as a process of its own that gets Ctrl-C in the middle of its second map: sent from inside the work, so
# that the moment does not depend on how fast the machine is.
INTERRUPTED = """
import contextlib, os, signal, torch
from lvlm_probe import cli, heatmap_store, planning
from lvlm_probe.cli.shared import maps

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts jobs in the background ignores it
real_bar, begun = maps.bar, []

@contextlib.contextmanager
def bar(title):
    if title.startswith("explaining"):
        begun.append(title)
    now = len(begun) == 2
    with real_bar(title) as advance:
        def tell(done, total):
            advance(done, total)
            if now and done == 1:
                os.kill(os.getpid(), signal.SIGINT)
        yield tell

maps.bar = bar
cli.main()
"""


def test_ctrl_c_keeps_finished_maps_and_says_how_to_go_on(scene: Any, picture: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "explanations"
    options = ("--image", picture, "--question", scene.question, "--out", tmp_path / "runs", "--word-maps", *QUICK)
    process = new_process.run(INTERRUPTED, "explain", "--model", "demo", *map(str, options))
    err = process.stderr
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "1 finished map kept in" in err
    assert not list(folder.glob("*.part"))
    kept = {file: file.stat().st_mtime_ns for file in folder.glob("*.h5")}
    assert len(kept) == 1

    command = shlex.split(err.split("Go on with:")[1].strip().replace("\n", " "))
    assert command[:2] == ["lvlm-probe", "explain"]
    assert "--word-maps" in command
    assert "--question" not in command
    result = succeed(*command[1:])
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in kept.items())
    assert len(list(folder.glob("*.h5"))) > len(kept)
    assert "report" in result.out


# ------------------------------------------------------------------------------------------------------------- details


def test_parameters_are_read_as_yaml() -> None:
    assert parameters(["size=14", "preset=release", "lr=0.5", "size2=[3, 4]", "line_search=true"]) == {
        "size": 14,
        "preset": "release",
        "lr": 0.5,
        "size2": [3, 4],
        "line_search": True,
    }
    for wrong in ("size", "=3", "a b=1", "x=[1"):
        with pytest.raises(ProbeError, match="--param"):
            parameters([wrong])


def test_a_processor_without_chat_template_still_gets_its_picture(scene: Any) -> None:
    _, processor = probe.demo.load()
    templated = chat_inputs(processor, [scene.image], scene.question)
    processor.chat_template = None
    said: list[str] = []
    plain = chat_inputs(processor, [scene.image], scene.question, note=said.append)
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert int((plain["input_ids"] == image_token).sum()) == int((templated["input_ids"] == image_token).sum()) > 0
    assert torch.equal(plain["pixel_values"], templated["pixel_values"])
    assert len(said) == 1 and "has no chat template" in said[0]


@pytest.fixture
def replayed(demo: Any, recorded: Path) -> probe.Replay:
    model, processor = demo
    return probe.replay(probe.open_trace(recorded), model, processor)


def test_word_selections_part_the_selection(replayed: probe.Replay) -> None:
    selection = probe.select_tokens(replayed)
    parts = word_selections(replayed, selection)
    assert sorted(index for _, part in parts for index in part.indices) == list(selection.indices)
    for word, part in parts:
        (span,) = [item for item in replayed.words if item.start <= part.indices[0] < item.stop]
        assert word == span.text
        assert all(span.start <= index < span.stop for index in part.indices)


def test_a_video_is_refused_in_a_sentence(
    trace: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "holds no video: lvlm-probe explain" in run("frames", trace, "--model", "demo").err
    missing = run("record", "--model", "demo", "--video", tmp_path / "none.mp4", "--question", "What?")
    monkeypatch.setitem(sys.modules, "av", None)
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"film")
    without = run("record", "--model", "demo", "--image", clip, "--question", "What?")
    assert "pip install 'lvlm-probe[video]'" in without.err
    assert missing.code == without.code == 2
    assert run("record", "--model", "demo", "--image", picture, "--fps", "2", "--question", "What?").code == 2


@pytest.mark.parametrize(
    "command",
    ["explain TRACE", "explain --model demo --image PICTURE --question What?", "evaluate TRACE --methods center",
     "record --model demo --image PICTURE --question What?", "meter ROWS --model demo", "import ROWS --model demo",
     "study contradictions pope ROWS --model demo"],
)  # fmt: skip
def test_an_image_has_no_frames_to_hide_it_with(
    command: str, trace: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.csv").write_text("image,question,answer\na.png,What?,red\n")
    named = {"TRACE": trace, "PICTURE": picture, "ROWS": tmp_path / "rows.csv"}
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*.h5"))
    said = run(*(named.get(word, word) for word in command.split()), "--baseline", "first_frame")
    assert said.code == 2
    assert "first_frame is made of the frames of a video, and there is none here: choose one of blur" in said.err
    assert set(tmp_path.rglob("*.h5")) == before


@pytest.mark.quick
def test_sanity_refuses_in_a_sentence(tmp_path: Path) -> None:
    missing = run("sanity", tmp_path / "none.h5")
    assert missing.code == 2 and "none.h5" in missing.err and "Traceback" not in missing.err
