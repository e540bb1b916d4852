"""Comforts of the command line: how much it says, pages that open, tables that fit, names and completion."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import webbrowser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from command_line import run, succeed

import lvlm_probe as probe
from lvlm_probe import causal, heatmap_store
from lvlm_probe.cli.shared import terminal
from lvlm_probe.cli.shared.terminal import bar, show_table
from lvlm_probe.errors import ProbeError
from lvlm_probe.heatmap_store import MapFile, MapSettings, find_maps
from lvlm_probe.progress import Lines
from lvlm_probe.selection import TokenSelection

QUICK = tuple(f"--param={pair}" for pair in ("iterations=2", "ig_steps=3", "size=8", "refine=0"))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of the embedded model, recorded in a folder whose name a shell would take apart."""
    folder = tmp_path_factory.mktemp("recorded") / "my runs"
    scene = probe.demo.scenes(1, kinds=["pair"])[0]
    picture = tmp_path_factory.mktemp("picture") / "two shapes.png"
    scene.image.save(picture)
    result = succeed("record", "--model", "demo", "--image", picture, "--question", scene.question, "--out", folder)
    assert (
        f"lvlm-probe explain '{os.path.relpath(folder)}" in result.out or f"lvlm-probe explain '{folder}" in result.out
    )
    (path,) = folder.glob("*.h5")
    return path


@pytest.fixture
def trace(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(recorded, tmp_path / recorded.name))


# ----------------------------------------------------------------------------------------------------- how much is said


def test_quiet_leaves_results_and_errors(trace: Path) -> None:
    before = probe.demo.scenes(1)[0].image
    empty = trace.parent / "one-colour.png"
    before.point(lambda _: 128).save(empty)
    ask = ("record", "--model", "demo", "--image", empty, "--question", "What is it?", "--out", trace.parent / "o")
    assert "warning: " in succeed(*ask).err  # an image of one colour
    result = succeed("-q", *ask)
    assert result.err == "" and "trace: " in result.out
    assert "error: " in run("inspect", trace.parent / "nowhere.h5", "--quiet").err


@pytest.mark.quick
@pytest.mark.parametrize(
    "line",
    [
        *(f"{name} FILE" for name in ("boxes", "edit", "fields", "frames", "steps", "which")),
        "study init FILE",
        "study contradictions pope FILE --model demo",
    ],
)
def test_a_file_that_is_not_there_is_told_in_a_sentence(line: str, tmp_path: Path) -> None:
    found = run(*line.replace("FILE", str(tmp_path / "nowhere.h5")).split())
    assert found.code and "nowhere.h5" in found.err and "Traceback" not in found.err and not found.out


def test_verbose_shows_what_is_logged_and_only_then(trace: Path) -> None:
    asked = ("plan", trace, "--model", "demo", "--no-seconds")
    assert "DEBUG:lvlm_probe" not in succeed(*asked).err
    assert "DEBUG:lvlm_probe" in succeed(*asked, "-vv").err
    assert "DEBUG:lvlm_probe" not in succeed(*asked).err  # each command anew


def test_a_contrast_is_planned_with_its_sequences(trace: Path) -> None:
    asked = ("plan", trace, "--model", "demo", "--no-seconds", "--methods", "rise,attention", "--json")
    word = str(probe.open_trace(trace).words[-2].text)
    found = succeed(*asked, "--words", word, "--against", "a purple triangle").json
    (plain, _), (contrast,) = succeed(*asked).json["plans"], found["plans"]
    assert contrast["forward"] == 2 * plain["forward"] and "follows no score" in found["refused"]["attention"]
    refused = run(*asked, "--words", word)
    assert refused.code == 2 and "--words goes with --against" in refused.err


def test_a_word_behind_two_dashes_is_no_option_of_ours(tmp_path: Path) -> None:
    assert "-v" in run("inspect", "--", "-v").err.replace("\n", " ")


def test_in_a_log_long_work_says_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter([0.0, 0.0, 40.0, 50.0])
    with mock.patch.object(terminal, "Lines", lambda *given: Lines(*given, clock=lambda: next(seconds))):
        with bar("study mine") as advance:
            advance(0, 10)
            advance(4, 10)
            advance(5, 10)  # too soon
    assert capsys.readouterr().err.splitlines()[0] == "study mine: 4 of 10, 0:40 gone, about 1:00 left"


# ---------------------------------------------------------------------------------------------------------------- pages


@pytest.fixture
def browser(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or True)
    return opened


def test_pages_open_in_the_browser_when_asked(trace: Path, browser: list[str], tmp_path: Path) -> None:
    succeed("explain", trace, "--model", "demo", "--method", "center", "--no-scores")
    assert browser == []
    result = succeed("explain", trace, "--model", "demo", "--method", "center", "--no-scores", "--open")
    (page,) = trace.parent.glob("explanations/*.html")
    assert browser.pop() == page.as_uri() and page.name in result.out
    page = tmp_path / "a page.html"
    succeed("report", trace, "--out", page, "--open")
    assert browser.pop() == page.as_uri()
    page = tmp_path / "compared.html"
    named = ("--methods", "center,random", "--steps", "3", "--out", page)
    succeed("evaluate", trace, "--model", "demo", *named, "--open")
    assert browser.pop() == page.as_uri()
    assert "go with --methods" in run("evaluate", trace, "--open").err


def test_no_browser_is_a_note(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    succeed("explain", trace, "--model", "demo", "--method", "center", "--no-scores")
    result = succeed("report", trace, "--out", tmp_path / "r.html", "--open")
    assert "no browser could be opened" in result.err


# --------------------------------------------------------------------------------------------------------------- tables


def lines_of(width: int, *, wide: bool = False) -> tuple[list[str], list[str]]:
    heads = ("method", "gain ↑", "passes", "trusted")
    rows = [["igos++", "1.03 [0.96, 1.10]", "29 + 27", "20 of 20"], ["方法", "–", "–", "–"]]
    out = io.StringIO()
    with mock.patch.dict(os.environ, {"COLUMNS": str(width)}), mock.patch("sys.stdout", out):
        left = show_table(heads, rows, first=(0, 1, 3, 2), wide=wide)
    return out.getvalue().splitlines(), left


def test_a_table_leaves_out_whole_columns_and_cuts_nothing() -> None:
    lines, left = lines_of(80)
    assert left == [] and "29 + 27" in lines[1]
    lines, left = lines_of(36)
    assert left == ["passes"] and "1.03 [0.96, 1.10]" in lines[1] and "20 of 20" in lines[1]
    lines, left = lines_of(10)
    assert left == ["gain ↑", "passes", "trusted"] and "…" not in "".join(lines)
    lines, left = lines_of(10, wide=True)
    assert left == [] and "29 + 27" in lines[1]


def test_in_few_columns_a_comparison_says_what_it_leaves_out(trace: Path, tmp_path: Path) -> None:
    asked = ("evaluate", trace.parent, "--model", "demo", "--methods", "center,random", "--steps", "3")
    result = succeed(*asked, "--out", tmp_path / "w" / "c.html", columns=60)
    table = [line for line in result.out.splitlines() if line.startswith(("method", "center", "random"))]
    assert len(table) == 3 and all(len(line) <= 60 for line in table) and "…" not in "".join(table)
    assert "--wide shows them" in result.out
    result = succeed(*asked, "--out", tmp_path / "v" / "c.html", "--wide", columns=60)
    assert "seconds" in result.out and "--wide" not in result.out


@pytest.mark.parametrize("command", ["families", "methods", "doctor"])
def test_lists_fit_into_80_columns(command: str) -> None:
    result = succeed(command, columns=80)
    assert max(map(len, result.out.splitlines())) <= 80


# ---------------------------------------------------------------------------------------------------------------- names


def test_maps_have_names_that_a_person_recognises(recorded: Path) -> None:
    asked = ("explain", recorded, "--model", "demo", "--method", "center", "--no-scores")
    succeed(*asked)
    found = succeed(*asked, "--words", "star", "--json").json["maps"][0]
    name = Path(found["picture"]).name
    assert re.fullmatch(r"two-shapes_what-color-are-the-cross-and-the-star_center_star\.[0-9a-f]{8}\.png", name)
    assert [item["map"] for item in succeed(*asked, "--words", "star", "--json").json["maps"]] == [found["map"]]


def test_maps_are_found_by_their_trace_whatever_they_are_called(trace: Path, tmp_path: Path) -> None:
    asked = ("explain", trace, "--model", "demo", "--method", "center", "--no-scores", "--json")
    made = Path(succeed(*asked).json["maps"][0]["map"])
    other = Path(shutil.copy(trace, trace.parent / "another.h5"))
    assert find_maps([trace]) == [MapFile(made)]
    with pytest.raises(ProbeError, match=r"no explanations of .*another"):
        find_maps([other])
    renamed = made.rename(made.with_name("mine.h5"))
    assert find_maps([trace]) == [MapFile(renamed)] and MapFile(renamed).read().trace is not None


@pytest.mark.parametrize(
    ("file", "question"),
    [
        ("../../etc/passwd.png", "a/b\\c\0d\n\u202e?"),
        ("." * 300, "?" * 500),
        ("图" * 200 + ".png", "猫在哪里" * 100),
        ("", ""),
        ("-rf *.png", "$(reboot) `x` ; 'y' \"z\""),
        ("\ud800.png", "e\u0301 " * 200),
        (7, None),
    ],
)
def test_hostile_texts_make_safe_names(file: Any, question: Any) -> None:
    trace = SimpleNamespace(meta={"image_files": [file]}, question=question, rows=1, path=Path("t.h5"))
    replay: Any = SimpleNamespace(trace=trace, trace_id="t", baseline={})
    chosen = TokenSelection(indices=(1,), tokens=(" The", " red"), llr=(), rule="indices")
    name = heatmap_store.map_name(replay, chosen, "wörd /../ \u202e" * 30, MapSettings("a/b method" * 20, {}))
    assert len(os.fsencode(name.replace(".h5", ".score.json"))) < 200
    assert re.fullmatch(r"[\w+-]+\.[0-9a-f]{8}\.h5", name) and not name.startswith("-")


def test_parts_are_ended_at_a_word() -> None:
    trace = SimpleNamespace(meta={}, question="What is the colour of the very large umbrella on the beach?", rows=1)
    replay: Any = SimpleNamespace(trace=trace, trace_id="t", baseline={})
    chosen = TokenSelection(indices=(1,), tokens=(" The", " red"), llr=(), rule="indices")
    name = heatmap_store.map_name(replay, chosen, "red", MapSettings("rise", {}))
    assert name.startswith("what-is-the-colour-of-the-very-large_rise_red.")


# ----------------------------------------------------------------------------------------------------------- completion


def completed(*words: str) -> list[str]:
    """What bash is offered behind the words, the last of which is not finished."""
    asked = {"_LVLM_PROBE_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    with mock.patch.dict(os.environ, asked):
        return run().out.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("explain --method ig", ["igos+", "igos++"]),
        ("evaluate runs --methods gradcam,til", []),
        ("evaluate runs --methods gradcam,t", ["gradcam,tam", "gradcam,tmm"]),
        ("plan runs --methods al", ["all"]),
        ("families qwen2", ["qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl"]),
        ("study peek mm", ["mmstar", "mmvp"]),
        ("study table s.yaml --table fig", ["figure5"]),
        ("study table s.yaml --format la", ["latex"]),
        ("record --model d", ["demo"]),
        ("record --dtype b", ["bfloat16"]),
        ("doctor --dev", ["--device"]),
        ("stu", ["study"]),
    ],
)
def test_completion(line: str, offered: list[str]) -> None:
    assert completed("lvlm-probe", *line.split()) == offered


@pytest.mark.quick
def test_names_read_off_the_source_are_those_that_are_registered() -> None:
    from lvlm_probe import explainers
    from lvlm_probe.cli.shared.completion import complete_dataset, complete_method
    from lvlm_probe.cli.study.table import NAMES
    from lvlm_probe.explainers import registry
    from lvlm_probe.study import readers
    from lvlm_probe.study.tables.paper import TABLES

    own = [name for name in explainers.methods() if registry.resolve(name).__module__.startswith("lvlm_probe.")]
    assert complete_method("") == own
    assert set(complete_dataset("")) <= set(readers()) and len(complete_dataset("")) >= 8
    assert set(TABLES) <= set(NAMES)


def test_completion_imports_no_torch() -> None:
    code = "import sys\nfrom lvlm_probe.cli.shared.completion import *\ncomplete_method('i'), complete_family('q')\n"
    code += "print(complete_dataset('m'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "['mmstar', 'mmvp'] False", done.stderr


# -------------------------------------------------------------------------------------------------- parts of the prompt


def test_which_part_is_told_kept_and_reported(trace: Path) -> None:
    told = succeed("which", trace, "--model", "demo")
    assert "image " in told.out and "together " in told.out and "kept in" in told.out
    found = succeed("which", trace, "--model", "demo", "--parts", "all", "--json").json
    assert found["parts"][0] == "image 1" and found["parts"][1].startswith("turn 1, user")
    assert sum(found["shares"]) == pytest.approx(found["total"], abs=1e-6)
    modal = succeed("which", trace, "--model", "demo", "--parts", "modalities", "--json").json
    assert len(modal["together"]) == len(modal["words"]) and modal["verdict"]
    succeed("which", trace, "--model", "demo", "--text", "color")
    assert len(list((trace.parent / "explanations").glob("*.evidence.json"))) == 3  # the same again replaces
    succeed("explain", trace, "--model", "demo", "--method", "random", "--no-scores")
    page = trace.parent / "report.html"
    succeed("report", trace, "--out", page)
    assert page.read_text().count('<section class="evidence">') == 2 * 3  # and for a reader without scripts


def test_which_part_refuses_in_a_sentence(trace: Path) -> None:
    for asked, said in (
        (("--parts", "pages"), "--parts is images, turns, all or modalities"),
        (("--parts", "all", "--text", "color"), "either --parts or --text"),
        (("--text", "nowhere"), "no run of tokens that reads as 'nowhere'"),
    ):
        result = run("which", trace, "--model", "demo", *asked)
        assert result.code == 2 and said in result.err.replace("\n", " "), result.err


def test_which_part_goes_on_and_a_check_of_steps_loses_nothing(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    stop_after: int | None = 7

    def stopping(real: Any) -> Any:
        def run_it(self: probe.Replay, *given: Any) -> Any:
            ran.append(1)
            if stop_after is not None and len(ran) > stop_after:
                raise KeyboardInterrupt
            return real(self, *given)

        return run_it

    for name in ("_in_micro_batches", "_whole_pass"):
        monkeypatch.setattr(probe.Replay, name, stopping(getattr(probe.Replay, name)))
    folder = trace.parent / "explanations"
    command = ("which", trace, "--model", "demo", *(p for text in ("What", "color", "the") for p in ("--text", text)))
    stopped = run(*command)
    assert stopped.code == 130 and "the same command goes on from there" in " ".join(stopped.err.split())
    assert len(list(folder.glob("*.masks.jsonl"))) == 1 and not list(folder.glob("*.json"))
    stop_after = None
    ran.clear()
    resumed, after = succeed(*command, "--json").json, len(ran)
    assert not list(folder.glob("*.masks.jsonl"))
    ran.clear()
    assert succeed(*command, "--json").json == resumed and len(ran) >= after + 4  # 8 coalitions, some were there

    succeed("steps", trace)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr(causal, "check_steps", mock.Mock(side_effect=KeyboardInterrupt))
    stopped = run("steps", trace, "--model", "demo", "--check")
    assert stopped.code == 130 and "The same command begins again" in " ".join(stopped.err.split())
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_steps_are_told_kept_and_reported(trace: Path) -> None:
    page = trace.parent / "steps.html"
    told = succeed("steps", trace, "--page", page)
    assert "kept in" in told.out and page.read_text().count('<section class="evidence">') == 2
    assert run("steps", trace, "--page", page).code == 2
    found = succeed("steps", trace, "--json").json
    assert found["steps"] and found["passes"] == 0 and "verdict" in found
    for asked, said in (
        (("--step", "1"), "go with --check"),
        (("--model", "demo", "--check", "--step", "9"), "before the conclusion"),
    ):
        result = run("steps", trace, *asked)
        assert result.code == 2 and said in result.err.replace("\n", " ")


def test_evaluate_says_what_image_and_question_give_together(trace: Path) -> None:
    succeed("explain", trace, "--model", "demo", "--method", "random", "--no-scores")
    (found,) = succeed("evaluate", trace, "--model", "demo", "--steps", "10", "--synergy", "--json").json
    assert len(found["score"]["params"]["synergy"]["curve"]) == 11 and found["score"]["synergy"] is not None
    assert "leave --methods out" in run("evaluate", trace, "--methods", "random", "--synergy").err.replace("\n", " ")
