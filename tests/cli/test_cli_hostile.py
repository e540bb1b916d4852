"""What a stranger's file says to the command line: it is shown, not obeyed, and loads no model."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import pty
import random
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trace_samples
from command_line import Result, run
from PIL import Image

from lvlm_probe import cli
from lvlm_probe.cli.shared import inputs, models, terminal
from lvlm_probe.cli.shared.options import Loading
from lvlm_probe.errors import ProbeError
from lvlm_probe.heatmap_store import MapFile
from lvlm_probe.metrics import Score
from lvlm_probe.trace import write
from lvlm_probe.trace.records import Capture

ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
EVIL = (
    "\x1b]0;OWNED\x07\x1b[2J\x1b[31mred\x1b[0m \x9b31m \x1b]8;;http://evil/\x1b\\link\x1b]8;;\x1b\\ \u202egnp.exe "
    "\x1b]52;c;ZWNobyBvd25lZA==\x07 \r\x08\x7f \u2028\u2066\ud800 [red]markup[/red]"
)
BAD = [b"\x1b]", b"\x1b[2J", b"\x9b", "\x9b".encode(), "\u202e".encode(), "\u2066".encode(), b"\x08", b"\x7f"]
TEXT = EVIL.replace("\ud800", "")


def evil_capture(model_id: str = "nowhere/at-all", **changes: Any) -> Capture:
    made = trace_samples.sample_capture(tokens=6)
    (row,) = made.rows
    row.question, row.notes, row.meta = f"Q{TEXT}", [f"N{TEXT}"], {f"k{TEXT}": f"v{TEXT}"}
    row.tokens[0] = f"A{TEXT}"
    row.log_probs[0], row.top_log_probs[0] = -12.0, 0.0  # a word that the meter shows
    for name, value in changes.items():
        setattr(row, name, value)
    made.model["model_id"] = model_id
    return made


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A directory with a hostile trace, one under a hostile name, and a broken file under one."""
    folder = tmp_path / "evil"
    write(evil_capture(), folder)
    named = write(evil_capture(f"owner/{TEXT[:40]}"), folder)
    named.rename(folder / "z\x1b[31mname\x1b]0;T\x07\n✓ ok\u202e.h5")
    (folder / "zz\x1b[2Jbroken\n.h5").write_bytes(b"\x1b[2J no trace")
    return folder


def clean(result: Result) -> str:
    written = result.out + result.err
    found = ACTING.search(written)
    assert found is None, written[max(0, found.start() - 60) : found.end() + 20]
    assert "Traceback" not in written
    return written


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "DIR"),
        ("inspect", "DIR", "--json"),
        ("inspect", "FILE"),
        ("inspect", "FILE", "--json"),
        ("inspect", "BROKEN"),
        ("inspect", "NAMED"),
        ("meter", "DIR", "--out", "OUT/m.html"),
        ("meter", "DIR", "--out", "OUT/n.html", "--json"),
        ("verify", "FILE"),
        ("verify", "NAMED"),
        ("verify", "DIR"),
        ("explain", "NAMED"),
        ("explain", "FILE", "--method", f"igos{TEXT}"),
        ("evaluate", "DIR", "--methods", "attention"),
        ("plan", "NAMED"),
        ("report", "DIR", "--out", "OUT/r.html"),
        ("report", "BROKEN", "--out", "OUT/r.html"),
        ("inspect", f"missing{TEXT}"),
        ("inspect", "DIR", f"--unknown{TEXT}"),
        (f"command{TEXT}",),
        ("study", "status", "STUDY"),
        ("families", f"family{TEXT}"),
    ],
)
@pytest.mark.quick
def test_nothing_acts_on_the_terminal(evil: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    files = sorted(evil.iterdir())
    (tmp_path / "study.yaml").write_text(f"models: {{{json.dumps('m' + TEXT.replace(chr(0x7F), ''))}: demo}}\n")
    places = {"DIR": evil, "FILE": files[0], "NAMED": files[1], "BROKEN": files[2], "STUDY": tmp_path / "study.yaml"}
    result = run(*(places.get(word, word.replace("OUT", str(tmp_path))) for word in arguments))
    written = clean(result)
    assert result.code in (0, 2)
    assert written.strip()
    if "--json" in arguments and result.code == 0:
        assert TEXT in json.dumps(result.json, ensure_ascii=False) or "question" in result.out
    assert "\n✓ ok" not in written, "a name passes for a line of ours"


def test_json_reads_as_what_the_file_says(evil: Path) -> None:
    first = sorted(evil.iterdir())[0]
    assert run("inspect", first, "--json").json["question"] == f"Q{TEXT}"


def test_half_a_character_in_a_trace_costs_no_page(tmp_path: Path) -> None:
    path = write(evil_capture(question="\ud800 What?"), tmp_path)
    for arguments in (("inspect", path), ("inspect", tmp_path), ("meter", tmp_path, "--out", tmp_path / "m.html")):
        result = run(*arguments)
        assert result.code == 0, result.err
        assert "\\ud800 What?" in clean(result)
    assert "\\ud800 What?" in (tmp_path / "m.html").read_text(encoding="utf-8")
    assert "\\ud800 What?" in (tmp_path / "m.csv").read_text(encoding="utf-8")


def test_a_listing_is_short_whatever_the_texts(tmp_path: Path) -> None:
    write(evil_capture(question="word " * 800_000), tmp_path)
    result = run("inspect", tmp_path)
    assert result.code == 0
    assert len(result.out) < 2000


def test_imported_rows_are_told_safely(demo: Any, tmp_path: Path) -> None:
    Image.new("RGB", (112, 112)).save(tmp_path / "ok.png")
    rows = [
        {"image": f"x{EVIL}.png", "question": "q", "answer": "a"},
        {"image": "ok.png", "question": EVIL, "answer": "a"},
    ]
    name = tmp_path / "rows\x1b[2J.jsonl"
    name.write_text("\n".join([*map(json.dumps, rows), "\x1b[2J"]))
    with mock.patch.object(cli.import_, "load_model", return_value=demo):
        result = run("import", name, "--model", "demo", "--out", tmp_path / "out")
    assert result.code == 1, result.err
    assert "3 rejected" in clean(result)


def test_logs_warnings_and_tracebacks_are_safe(capsys: pytest.CaptureFixture[str]) -> None:
    import warnings

    from lvlm_probe.errors import ProbeWarning

    last = logging.lastResort
    assert last is not None
    with mock.patch.object(sys, "excepthook"), mock.patch.object(last, "formatter", last.formatter):
        with warnings.catch_warnings():
            terminal.guard_streams()
            warnings.warn(EVIL, ProbeWarning, stacklevel=1)
        last.stream.write(last.format(logging.makeLogRecord({"msg": EVIL})) + "\n")  # type: ignore[attr-defined]
        try:
            raise ProbeError(EVIL)
        except ProbeError as error:
            sys.excepthook(ProbeError, error, error.__traceback__)
    shown = capsys.readouterr().err
    assert shown.count("OWNED") == 3
    assert not ACTING.search(shown)


def test_progress_and_stages_show_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.dict(os.environ, {"FORCE_COLOR": "1", "TERM": "xterm"}), mock.patch.object(terminal, "_SLOW", -1.0):
        with terminal.stage(f"loading {EVIL}"), contextlib.suppress(ZeroDivisionError):
            pass
        with terminal.bar(f"reading {EVIL}") as advance:
            advance(1, 1)
    shown = capsys.readouterr().err.encode()
    assert b"[red]markup[/red]" in shown
    assert not [bad for bad in BAD if bad in shown]


TERMINAL_BITS = (
    "\x1b", "\x1b[", "\x1b]", "\x1bP", "\x9b", "\x9d", "\x07", "\x08", "\r", "\r\n", "\n", "\t", "\x00", "\x7f",
    "\u202e", "\u2066", "\u2028", "\u2029", "\u200f", "\ufeff", "\ud800", "\udfff", "[red]", "[/red]", "[link=http://evil]",
    "a", "é", "\U0001f600", "\u200d", "中", "{}", "%s", "\\",
)  # fmt: skip


def test_mutated_texts_never_act() -> None:
    """Texts of acting characters through every way to the terminal; nothing acting comes out, and JSON is unchanged."""
    rng = random.Random(1)
    ways: set[str] = set()
    for _ in range(400):
        text = "".join(rng.choice(TERMINAL_BITS) for _ in range(rng.randrange(1, 12)))
        way = rng.choice(("say", "note", "json", "show", "stored_path"))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if way == "say":
                terminal.say(text, (text, "bold"), terminal.answer_text((), [text], None, ()))
            elif way == "note":
                terminal.note(text)
            elif way == "json":
                terminal.print_json({text: [text]})
            elif way == "show":
                terminal.show(text)
            else:
                terminal.show(terminal.stored_path(Path(text.replace("\x00", ""))))
        written = out.getvalue() + err.getvalue()
        assert not ACTING.search(written), (way, text, written)
        written.encode("utf-8")
        if way == "json":
            same = json.loads(json.dumps(text))  # two halves become one character in JSON
            assert json.loads(out.getvalue()) == {same: [same]}
        ways.add(way)
    assert ways == {"say", "note", "json", "show", "stored_path"}


def in_terminal(*arguments: str | Path, answer: bytes | None = None, until: bytes = b"[y/N]") -> tuple[int, bytes]:
    """A command in a terminal of its own: exit code and everything that was drawn; ``answer`` is typed when asked."""
    pid, handle = pty.fork()
    if pid == 0:
        code = 70
        try:
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
            sys.argv = ["lvlm-probe", *map(str, arguments)]
            os.environ.update(TERM="xterm-256color", COLUMNS="200")
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    drawn = b""
    while True:
        try:
            piece = os.read(handle, 65536)
        except OSError:
            break
        if not piece:
            break
        drawn += piece
        if answer is not None and until in drawn:
            os.write(handle, answer)
            answer = None
    os.close(handle)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), drawn


def test_in_a_real_terminal(evil: Path, tmp_path: Path) -> None:
    for arguments in (("inspect", evil), ("meter", evil, "--out", tmp_path / "m.html")):
        code, drawn = in_terminal(*arguments)
        assert code == 0, drawn
        assert b"OWNED" in drawn
        assert not [bad for bad in BAD if bad in drawn], arguments


# ------------------------------------------------------------------------------------------- models that a trace names


@pytest.fixture
def owner(tmp_path: Path) -> tuple[Path, Path]:
    """A model directory with code of its own, and the file that appears when that code runs."""
    folder, mark = tmp_path / "owner", tmp_path / "EXECUTED"
    folder.mkdir()
    names = {
        "AutoConfig": "evil.EvilConfig",
        "AutoModelForImageTextToText": "evil.Evil",
        "AutoProcessor": "evil.EvilProcessor",
    }
    config = {"model_type": "evil", "architectures": ["Evil"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "EvilProcessor", "auto_map": names}))
    code = "from transformers import PretrainedConfig\nclass EvilConfig(PretrainedConfig):\n    model_type = 'evil'\n"
    (folder / "evil.py").write_text(
        f"open({str(mark)!r}, 'w').write('x')\n{code}class Evil: pass\nclass EvilProcessor: pass\n"
    )
    return folder, mark


@pytest.mark.parametrize("command", ["verify", "explain", "plan", "evaluate"])
def test_a_model_that_only_a_trace_names_is_not_loaded(command: str, tmp_path: Path, owner: tuple[Path, Path]) -> None:
    loaded: list[str] = []
    for name in (str(owner[0]), "owner/on-the-hub"):
        path = write(evil_capture(name, question="q"), tmp_path / "runs")
        more = ("--methods", "attention", "--overwrite") if command == "evaluate" else ()
        with mock.patch.object(inputs, "load_model", lambda spec, **options: loaded.append(spec)):
            result = run(command, path, *more)
        assert result.code == 2, result.err
        assert "a file does not decide what is loaded" in result.err and "--model DIR_OR_ID" in result.err
    assert not loaded
    assert not owner[1].exists()


def test_the_question_stands_and_no_is_its_answer(tmp_path: Path, owner: tuple[Path, Path]) -> None:
    path = write(evil_capture(str(owner[0]), question="q"), tmp_path / "runs")
    code, drawn = in_terminal("verify", path, answer=b"\n")
    assert code == 2
    assert b"names its model itself" in drawn and b"you did not agree" in drawn
    code, drawn = in_terminal("verify", path, answer=b"y\n")
    assert code == 2
    assert b"code of its own, which is not run unasked" in drawn
    assert not owner[1].exists()


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    main, side = pty.openpty()
    with open(side, "r+b", buffering=0) as raw, io.TextIOWrapper(raw) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(terminal, "_PATIENCE", 0.0)
        assert terminal.agrees("Load it?") is False
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
        assert terminal.agrees("Load it?") is None
        monkeypatch.setattr(sys, "stdin", None)
        assert terminal.agrees("Load it?") is None
    os.close(main)


def test_one_agreement_is_for_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(inputs, "agrees", lambda question: asked.append(question) or True)
    monkeypatch.setattr(inputs, "load_model", lambda spec, **options: (spec, options["dtype"]))
    found = inputs.ReplayModels(None, Loading(dtype="float32"))
    from lvlm_probe.trace import open_trace

    traces = [open_trace(write(evil_capture(name), tmp_path)) for name in ("a/b", "a/b", "c/d", "a/b")]
    assert [found.of(trace)[0] for trace in traces] == ["a/b", "a/b", "c/d", "a/b"]
    assert len(asked) == 2
    assert inputs.ReplayModels("x", Loading(dtype="float32")).of(traces[0]) == ("x", "float32")


def test_code_of_a_model_runs_for_whoever_asks(owner: tuple[Path, Path]) -> None:
    with pytest.raises(ProbeError, match="brings code of its own, which is not run unasked"):
        models.load_model(str(owner[0]))
    assert not owner[1].exists()
    with pytest.raises(ProbeError):  # it is no model after all
        models.load_model(str(owner[0]), trust_remote_code=True)
    assert owner[1].exists()


def test_every_command_that_loads_a_model_says_whether_code_runs() -> None:
    for command in ("record", "explain", "evaluate", "verify", "plan", "import", "meter", "study run", "study plan"):
        assert "--trust-remote-code" in run(*command.split(), "--help").out, command
    source = "".join(path.read_text() for path in (Path(cli.__file__).parent.parent).rglob("*.py"))
    calls = re.findall(r"(?:Auto\w+|processor_class\))\.from_pretrained\(([^()]*(?:\([^()]*\))*[^()]*)\)", source)
    loading = [call for call in calls if "path()" in call or "source" in call]
    assert len(loading) == 4
    assert all("trust_remote_code=" in call or "**options" in call for call in loading), loading


# ------------------------------------------------------------------------------------------------ streams that are odd


def in_child(out: int | None, *arguments: str | Path, **environment: str) -> tuple[int, bytes]:
    """A command with ``out`` as its standard output (``None``: closed): exit code and standard error."""
    read, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.dup2(write_end, 2)
            sys.stderr = open(2, "w")  # noqa: SIM115
            if out is None:
                sys.stdout = None  # type: ignore[assignment]
            else:
                os.dup2(out, 1)
                sys.stdout = open(1, "w", encoding=environment.pop("encoding", "utf-8"))  # noqa: SIM115
            os.environ.update(environment)
            sys.argv = ["lvlm-probe", *map(str, arguments)]
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(code)
    os.close(write_end)
    with open(read, "rb") as errors:
        said = errors.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


@pytest.mark.parametrize("arguments", [("methods",), ("methods", "--json"), ("inspect", "DIR"), ("--help",)])
def test_a_reader_that_has_gone(arguments: tuple[str, ...], evil: Path) -> None:
    read, out = os.pipe()
    os.close(read)
    code, said = in_child(out, *(evil if word == "DIR" else word for word in arguments))
    os.close(out)
    assert code == 1
    assert b"Traceback" not in said and b"BrokenPipe" not in said


def test_a_closed_output_and_a_full_one(evil: Path) -> None:
    code, said = in_child(None, "inspect", evil)
    assert code == 0 and b"Traceback" not in said
    with open("/dev/full", "w") as full:
        code, said = in_child(full.fileno(), "inspect", evil)
    assert code != 0 and b"No space left" in said and b"Traceback" not in said


def test_an_output_that_cannot_say_everything(evil: Path, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w+b") as out:
        code, said = in_child(out.fileno(), "methods", encoding="ascii", NO_COLOR="1")
        assert code == 0, said
        code, said = in_child(out.fileno(), "inspect", evil, encoding="ascii", NO_COLOR="1")
        assert code == 0, said
    assert (tmp_path / "out").read_bytes().isascii()


@pytest.mark.parametrize(
    ("command", "where"),
    [
        ("inspect", "lvlm_probe.trace.open_store"),
        ("verify", "lvlm_probe.importing.meter.open_store"),
        ("inspect", "lvlm_probe.trace.open_rows"),
        ("verify", "lvlm_probe.trace.open_rows"),
    ],
)
def test_ctrl_c_ends_without_a_traceback(command: str, where: str, evil: Path) -> None:
    target = evil if where.endswith("store") else sorted(evil.iterdir())[0]
    with mock.patch(where, side_effect=KeyboardInterrupt):
        result = run(command, target)
    assert result.code == 130
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("record",), "stopped while the model was answering"),
        (("explain",), "stopped while the model was answering"),
        (("demo",), "0 finished maps are kept"),
        (("doctor", "demo"), ""),
        (("selfcheck", "demo", "--quick"), "0 checks are kept"),
    ],
)
def test_ctrl_c_while_a_model_answers_ends_the_command(command: tuple[str, ...], said: str, tmp_path: Path) -> None:
    scene = tmp_path / "scene.png"
    Image.new("RGB", (96, 96), "red").save(scene)
    if command[0] in ("record", "explain"):
        command += ("--model", "demo", "--image", str(scene), "--question", "What is it?")
    command += () if command[0] == "doctor" else ("--out", str(tmp_path / "out"))
    with mock.patch("lvlm_probe.recording.answering.record_answer", side_effect=KeyboardInterrupt) as asked:
        result = run(*command)
    assert result.code == 130 and said in result.err and asked.call_count == 1
    assert "130" not in result.out + result.err  # not taken for what is wrong with the model


def test_command_lines_to_copy_are_quoted(tmp_path: Path) -> None:
    path = tmp_path / "a; rm -rf $HOME"
    assert terminal.quoted_path(path) == f"'{path}'"
    assert not ACTING.search(terminal.quoted_path(tmp_path / TEXT))
    assert dataclasses.is_dataclass(Result)


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, "[]", "5", '{"verdict": 5}', '{"deletion": 1' + "0" * 400 + "}", "\x1b[2J", '{"a": "\\ud800"}'],
)
def test_a_score_that_is_none_is_named(content: str, tmp_path: Path) -> None:
    found = MapFile(tmp_path / "map.h5")
    whole = {item.name: 0.5 for item in dataclasses.fields(Score)} | {"verdict": {"trusted": True, "reasons": []}}
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        content = json.dumps(whole | json.loads(content))
    found.score_path.write_text(content)
    with pytest.raises(ProbeError, match="is not a score that can be read"):
        found.score()
