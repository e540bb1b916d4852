"""``--server`` in place of ``--model``: explain, evaluate, compare and meter through a server."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import h5py
import pytest
from command_line import run, succeed
from demo_server import DemoServer, serving
from forgery import write_seal

import lvlm_probe as probe
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.importing.meter import Reading, measure
from lvlm_probe.trace.schema import FORMAT_VERSION

SMALL = ("--param", "masks=12", "--param", "cells=3", "--param", "size=6")


@pytest.fixture
def photo_file(scene: Any, tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    scene.image.save(path)
    return path


def test_explain_evaluate_and_compare_through_a_server(
    behind: DemoServer, scene: Any, photo_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    asking = ("--image", photo_file, "--question", scene.question, "--out", out)
    made = succeed("explain", "--server", behind.url, "--served-model", "demo", *asking, *SMALL, "--json")
    (one,) = made.json["maps"]
    assert one["method"] == "rise" and one["passes"]["backward"] == 0  # the default has no gradients there
    assert "rise: 12 requests" in made.err and "no gradients" in made.err
    trace = Path(made.json["trace"])
    before = behind.count
    scored = succeed("evaluate", trace, "--server", behind.url, "--json").json
    assert scored[0]["score"]["params"]["mode"] == "exact"
    assert behind.count - before < 20  # connecting and checking: the curves are in the journal
    page = tmp_path / "compare.html"
    options = ("--methods", "center,tmm", "--grid", "4", "--out", page, "--json")
    compared = succeed("evaluate", trace, "--server", behind.url, *options).json
    reasons = {one["method"]: one["reasons"] for one in compared["methods"]}
    assert "does not give" in str(reasons["tmm"]) and page.is_file()


def test_a_map_by_less_than_log_probabilities_is_made_and_not_scored(
    demo: Any, scene: Any, photo_file: Path, tmp_path: Path
) -> None:
    with serving(*demo, {"top"}) as behind:
        behind.fault = lambda number, body: "no_ids"
        asking = (
            "--server",
            behind.url,
            "--image",
            photo_file,
            "--question",
            scene.question,
            "--out",
            tmp_path / "out",
        )
        failed = run("explain", *asking, *SMALL)
        assert failed.code == 2 and "--words" in failed.err, failed.err
        made = succeed("explain", *asking, "--words", "yellow", *SMALL)
    said = " ".join(made.err.split())
    assert "bounds on those of others (top (20))" in said and "the map is not scored" in said
    assert "yellow" in made.out and "not scored" in made.out
    assert "the standard error of the map is" in " ".join(made.out.split())


@pytest.mark.quick
def test_a_name_without_a_server_is_refused(trace: Any) -> None:
    failed = run("explain", trace.path, "--served-model", "demo")
    assert failed.code == 2 and "add --server URL" in failed.err


def test_what_does_not_go_together_is_said(behind: DemoServer, trace: Any) -> None:
    for arguments, said in (
        (("--server", behind.url, "--model", "demo"), "not both"),
        (("--served-model", "demo"), "add --server URL"),
        (("--road", "chat"), "add --server URL"),
        (("--server", behind.url, "--road", "rail"), "there are tokens, sglang, chat, next token, top, sampling"),
        (("--server", behind.url, "--road", "sglang"), "one of another engine"),
        (("--server", behind.url, "--method", "igos++"), "does not give"),
        (("--server", behind.url, "--served-model", "other"), "serves no 'other'"),
        (("--server", behind.url, "--max-requests", "30"), "--max-requests or --yes"),
        (("--server", "gpu:8000"), "http://host:8000"),
    ):
        failed = run("explain", trace.path, *arguments)
        assert failed.code == 2 and said in " ".join(failed.err.split()), failed.err


def test_a_contrast_is_refused_before_anything_is_sent(behind: DemoServer, trace: Any) -> None:
    before = behind.count
    for command in (("explain",), ("evaluate", "--methods", "rise")):
        failed = run(*command, trace.path, "--server", behind.url, "--words", "yellow", "--against", "cyan")
        assert failed.code == 2 and "--model DIR_OR_ID in place of --server" in " ".join(failed.err.split())
    assert behind.count == before


@pytest.mark.parametrize(
    ("road", "used", "options"),
    [
        ("chat", "chat", ()),
        ("next-token", "next token (allowed_token_ids)", ("--words", "yellow")),
        ("top-k", "top (20)", ("--words", "yellow")),
        ("sampling", "sampling", ("--words", "yellow")),
    ],
)
def test_a_road_is_used_that_is_named(
    road: str, used: str, options: tuple[str, ...], behind: DemoServer, photo_file: Path, scene: Any, tmp_path: Path
) -> None:
    asking = ("--image", photo_file, "--question", scene.question, "--out", tmp_path, "--no-scores", *options)
    made = succeed("explain", "--server", behind.url, "--road", road, *asking, *SMALL, "--json").json
    (found,) = made["maps"]
    assert Heatmap.read(found["map"]).provenance["server"]["road"] == used
    assert probe.open_trace(made["trace"]).meta["served"]["road"] == used


def test_a_road_that_does_not_work_is_refused_with_the_way_out(demo: Any, trace: Any, tmp_path: Path) -> None:
    with serving(*demo, {"top", "samples"}) as behind:
        failed = run("explain", trace.path, "--server", behind.url, "--road", "tokens")
        said = " ".join(failed.err.split())
        assert failed.code == 2 and "cannot be asked on this road (tokens: " in said and "--road" in said, said
        behind.fault = lambda number, body: "ignored"
        failed = run("explain", trace.path, "--server", behind.url, "--road", "chat")
        said = " ".join(failed.err.split())
        assert failed.code == 2 and "without log-probabilities" in said and "--road" in said, said


@pytest.mark.parametrize("road", ["top-k", "sampling"])
def test_scores_and_the_meter_are_refused_on_a_road_that_gives_too_little(
    road: str, behind: DemoServer, photo_file: Path, scene: Any, tmp_path: Path
) -> None:
    asking = ("--image", photo_file, "--question", scene.question, "--out", tmp_path, "--no-scores", *SMALL, "--json")
    made = succeed("explain", "--server", behind.url, *asking).json
    failed = run("evaluate", made["trace"], "--server", behind.url, "--road", road)
    said = " ".join(failed.err.split())
    assert failed.code == 2 and "a score takes log-probabilities" in said and "--road" in said, said
    assert "evaluate:" not in said  # what it would cost is not said of what is refused
    file = tmp_path / "answers.jsonl"
    row = {"image": photo_file.name, "question": scene.question, "answer": scene.answer}
    file.write_text(json.dumps(row), encoding="utf-8")
    failed = run("meter", file, "--server", behind.url, "--road", road, "--out", tmp_path / "meter.html")
    said = " ".join(failed.err.split())
    assert failed.code == 2 and "the meter takes log-probabilities" in said and "--road" in said, said


def test_the_meter_reads_answers_through_a_server(
    behind: DemoServer, demo: Any, scene: Any, photo_file: Path, tmp_path: Path
) -> None:
    rows = [
        {"id": "good", "image": photo_file.name, "question": scene.question, "answer": scene.answer},
        {"id": "prompt", "image": photo_file.name, "prompt": "<image> What?", "answer": scene.answer},
        {"id": "missing", "image": "nowhere.png", "question": scene.question, "answer": scene.answer},
    ]
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with probe.connect(behind.url) as server:
        before = server.spent.requests
        served = [one for one in measure(file, server) if isinstance(one, Reading)]
        assert server.spent.requests - before == 3
    (local,) = [one for one in measure(file, *demo, limit=1) if isinstance(one, Reading)]
    assert [one.id for one in served] == ["good"]
    assert served[0].elsewhere and not served[0].bound and served[0].origin == local.origin
    for one, other in zip(served[0].words, local.words, strict=True):
        assert (one.text, one.origin, one.instead) == (other.text, other.origin, other.instead)
        assert one.llr == pytest.approx(other.llr, abs=2e-3)
        assert one.surprise == pytest.approx(other.surprise, abs=2e-3)
    page = tmp_path / "meter.html"
    done = run("meter", file, "--server", behind.url, "--out", page)
    assert done.code == 1 and "2 of 3 rows are refused" in done.err  # as without a server
    assert page.is_file()
    table = list(csv.DictReader(page.with_suffix(".csv").open(encoding="utf-8")))
    assert [bool(line["reason"]) for line in table] == [False, True, True]
    before = behind.count
    again = run("meter", file, "--server", behind.url, "--out", page, "--overwrite")
    assert again.code == 1 and behind.count - before < 15  # connecting alone: the answers are in the journal
    assert list(csv.DictReader(page.with_suffix(".csv").open(encoding="utf-8"))) == table
    few = run("meter", file, "--server", behind.url, "--out", tmp_path / "other.html", "--max-requests", "5")
    assert few.code == 2 and "about 9 requests" in " ".join(few.err.split())


def test_what_was_asked_besides_a_question_is_not_left_out(behind: DemoServer, scene: Any, tmp_path: Path) -> None:
    scene.image.save(tmp_path / "photo.png")
    content = [{"type": "image_url", "image_url": {"url": "photo.png"}}, {"type": "text", "text": scene.question}]
    user = {"role": "user", "content": content}
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    asked = {
        "alone": [user],
        "system": [{"role": "system", "content": "Be brief."}, user],
        "turns": [*before, user],
        "behind": [{**user, "content": content[::-1]}],
    }
    reply = {"choices": [{"message": {"role": "assistant", "content": scene.answer}}]}
    rows = [{"id": name, "request": {"messages": turns}, "response": reply} for name, turns in asked.items()]
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    start = len(behind.requests)
    with probe.connect(behind.url) as server:
        found = list(measure(file, server))
    assert [isinstance(one, Reading) for one in found] == [True, True, False, False]
    systems = [body["messages"][0] for _, body in behind.requests[start:] if "messages" in body]
    assert sum(turn == {"role": "system", "content": "Be brief."} for turn in systems) >= 2


@pytest.mark.parametrize(
    ("road", "compared", "left"),
    [(None, "7 tokens", []), ("chat", "6 of 7 tokens", [6]), ("next-token", "7 tokens", [])],
)
def test_verify_compares_what_was_recorded_with_what_the_server_says(
    road: str | None, compared: str, left: list[int], behind: DemoServer, trace: Any
) -> None:
    asking = ("verify", trace.path, "--server", behind.url, *(("--road", road) if road else ()))
    made = succeed(*asking)
    said = " ".join((made.out + made.err).split())
    assert compared in said and "vLLM 0.32.0 serving 'demo'" in said and "weights and inputs are not seen" in said
    assert ("cannot be asked about token 6 ('</s>')" in said) == bool(left)
    (one,) = succeed(*asking, "--json").json
    assert one["ok"] and one["not_given"] == left and one["difference"] < 1e-3 and 0.01 < one["tolerance"] < 0.02


def test_verify_takes_what_was_recorded_on_the_model_itself(
    behind: DemoServer, demo: Any, scene: Any, tmp_path: Path
) -> None:
    local = probe.ask(*demo, scene.image, scene.question, max_new_tokens=16, out=tmp_path).trace
    with probe.connect(behind.url) as server:
        found = probe.verify(local, server)
    assert found.within() and found.steps == len(local.tokens) and not found.not_given


def test_verify_says_no_to_another_model(behind: DemoServer, trace: Any) -> None:
    asking = ("verify", trace.path, "--server", behind.url)
    behind.flipped = True
    try:
        failed = run(*asking)
    finally:
        behind.flipped = False
    assert failed.code == 1 and "another model" in " ".join(failed.out.split()), failed.out
    behind.name = "other"
    failed = run(*asking)
    assert failed.code == 1 and "was answered by 'demo'" in " ".join(failed.out.split()), failed.out


@pytest.mark.quick
@pytest.mark.parametrize("road", ["top-k", "sampling"])
def test_verify_refuses_a_road_without_log_probabilities_before_anything_is_sent(
    road: str, behind: DemoServer, trace: Any
) -> None:
    before = behind.count
    failed = run("verify", trace.path, "--server", behind.url, "--road", road)
    said = " ".join(failed.err.split())
    assert failed.code == 2 and f"--road {road} gives none" in said, said
    assert "leave the road out (road=, --road)" in said, said
    assert behind.count == before


def test_verify_refuses_a_server_that_has_nothing_better(demo: Any, trace: Any) -> None:
    with serving(*demo, {"top"}) as other:
        with probe.connect(other.url) as server:
            before = other.count
            with pytest.raises(probe.errors.ReplayError, match="verify takes log-probabilities"):
                probe.verify(trace, server)
            assert other.count == before


@pytest.mark.quick
@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("report", "runs"), "report has no use for a server: leave it out"),
        (("inspect", "runs"), "inspect has no use for a server"),
        (("frames", "runs"), "frames needs the model itself"),
        (("import", "answers.jsonl", "--model", "demo"), "import needs the model itself"),
        (("study", "run", "study.yaml"), "names its servers in its file"),
    ],
)
def test_a_command_that_takes_no_server_says_so(command: tuple[str, ...], said: str) -> None:
    failed = run(*command, "--server", "http://gpu:8000")
    shown = " ".join(failed.err.replace("│", " ").split())
    assert failed.code == 2 and said in shown, shown
    assert command[0] == "study" or "evaluate, explain, meter, serve, verify" in shown


def test_verify_states_a_difference_and_keeps_to_the_tolerance(behind: DemoServer, trace: Any) -> None:
    with h5py.File(trace.path, "r+") as file:
        file["traces/000000/output/log_probs"][1] -= 0.005
    write_seal(trace.path, "lvlm_probe.trace", FORMAT_VERSION)
    asking = ("verify", trace.path, "--server", behind.url, "--json")
    (one,) = succeed(*asking).json  # within what rounding may come to on an engine
    assert one["step"] == 1 and one["difference"] == pytest.approx(0.005, abs=1e-3)
    failed = run(*asking, "--tolerance", "1e-3")
    assert failed.code == 1 and not failed.json[0]["ok"]
