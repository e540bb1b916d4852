"""Code in README.md and docs/ is run as it stands there, page by page, on the demo model.

Blocks of one page share their names, in order. `probe`, `model`, `processor`, `trace`, `replay` and `heat` are there
from the start, as the start page makes them; `path/to/model` is the demo model, `photo.jpg` and `other.jpg` are two
scenes. A block under the comment ``<!-- not run: why -->`` is compiled only. Of shell blocks the product's own commands
are run, and of the others it is checked that the files, targets and extras that they name exist.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import lvlm_probe as probe
from lvlm_probe.cli import app, main

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    *sorted(
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "docs").rglob("*.md")
        if path.parent.name != "developing"  # fragments of changes to be made; the pages name the tests that hold them
    ),
]
BLOCK = re.compile(
    r"^(?P<mark><!-- not run: [^\n]+ -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
RUN = ("python", "sh")


@dataclass(frozen=True)
class Block:
    """One block of a page."""

    page: str
    line: int
    language: str
    code: str
    run: bool


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(
            page, text[: found.start("code")].count("\n") + 1, found["language"], found["code"], found["mark"] is None
        )
        for found in BLOCK.finditer(text)
    ]


def guides() -> list[str]:
    return [page for page in PAGES if any(block.language in RUN for block in blocks(page))]


# -------------------------------------------------------------------------------------------- what stands in the folder


@pytest.fixture(scope="module")
def prepared(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder that pages are run in, and the names that they start with."""
    model, processor = demo
    folder = tmp_path_factory.mktemp("pages")
    first, second = (
        next(
            scene
            for scene in probe.demo.scenes(40, kinds=["colour"])
            if scene.question == f"What color is the {shape}?"
        )
        for shape in ("triangle", "cross")
    )
    first.image.save(folder / "photo.jpg", quality=95)
    second.image.save(folder / "other.jpg", quality=95)
    with probe.attach(model, processor) as p, p.record(folder / "runs" / "demo", question=first.question) as recording:
        inputs = processor.apply_chat_template(
            first.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        model.generate(**inputs, max_new_tokens=24, do_sample=False)
    trace = recording.traces[-1]
    shutil.copytree(folder / "runs" / "demo", folder / "runs" / "mine")
    row = {"id": "q1", "image": "photo.jpg", "question": first.question, "answer": trace.answer.strip()}
    (folder / "answers.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (folder / "questions.csv").write_text(
        f"file,text,truth\nphoto.jpg,{first.question},{first.answer}\n", encoding="utf-8"
    )
    (folder / "data" / "mine").mkdir(parents=True)
    (folder / "data" / "mine" / "questions.txt").write_text(first.question, encoding="utf-8")
    first.image.save(folder / "data" / "mine" / "0.png")
    (folder / "path" / "to").mkdir(parents=True)
    (folder / "path" / "to" / "model").symlink_to(probe.demo.path(), target_is_directory=True)
    (folder / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    replay = probe.replay(trace, model, processor)
    names = {
        "probe": probe,
        "model": model,
        "processor": processor,
        "trace": trace,
        "replay": replay,
        "heat": probe.explain(replay),
        "other_image": second.image,
    }
    return folder, names


@pytest.fixture
def registries() -> Iterator[None]:
    """What pages register is taken back."""
    from lvlm_probe.explainers import registry
    from lvlm_probe.study import readers

    tables = [table for module in (registry, sys.modules[readers.__module__]) for table in vars(module).values()
              if isinstance(table, dict) and table and all(isinstance(name, str) for name in table)]  # fmt: skip
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before, strict=True):
        for name in set(table) - set(kept):
            if not name.startswith("__"):
                del table[name]


# -------------------------------------------------------------------------------------------------------- how it is run


def command_lines(code: str) -> list[str]:
    """Commands of a shell block: comments and continuations taken out."""
    joined = code.replace("\\\n", " ")
    lines = [shlex.join(shlex.split(line, comments=True)) for line in joined.splitlines()]
    return [command for line in lines for command in re.split(r" (?:'&&'|&&) ", line) if command]


def check_command(command: str) -> None:
    """Checks what a command that is not run names: files, targets, extras, options of the product's own."""
    words = shlex.split(command)
    if words[0] == "lvlm-probe":
        level: Any = typer.main.get_command(app)
        while words[1:] and words[1] in getattr(level, "commands", {}):
            level = level.commands[words.pop(1)]
        known = {name for option in level.params for name in (*option.opts, *option.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= known | {"--help"}, command
    elif words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets, f"make has no {words[1]}"
    elif words[:2] == ["pip", "install"]:
        for word in words[2:]:
            extras = re.search(r"\[(.+)\]", word)
            if extras and (word.startswith((".", "lvlm-probe"))):
                project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
                assert set(extras[1].split(",")) <= set(project["optional-dependencies"]), word
            elif word.startswith("./"):
                assert (ROOT / word / "pyproject.toml").is_file(), word
    elif words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), words[1]


def run_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a command of the product in this process. Output goes where pytest looks."""
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None), f"{command} ended with {ended.value.code}"


def compiled(block: Block) -> Any:
    """The code with the page's line numbers."""
    return compile("\n" * (block.line - 1) + block.code, str(ROOT / block.page), "exec")


@pytest.mark.parametrize("page", guides())
def test_the_code_of_a_page_runs(
    page: str, prepared: Any, registries: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, given = prepared
    here = tmp_path / "here"
    shutil.copytree(folder, here, symlinks=True)
    monkeypatch.chdir(here)
    names: dict[str, Any] = {**given, "__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python" and block.run:
            exec(compiled(block), names)
        elif block.language == "python":
            compiled(block)
        elif block.language == "yaml" and block.run:
            name = re.match(r"# (\S+\.yaml)\n", block.code)
            if name is not None:
                (here / name[1]).write_text(block.code, encoding="utf-8")
            yaml.safe_load(block.code)
        elif block.language == "sh":
            for command in command_lines(block.code):
                if command.startswith("lvlm-probe ") and block.run:
                    run_command(command, monkeypatch)
                else:
                    check_command(command)
        elif block.language == "json":
            json.loads(block.code)


def test_blocks_are_found() -> None:
    assert {"README.md", "docs/index.md", "docs/guides/own-model.md", "docs/methods.md"} <= set(guides())
    assert sum(block.language == "python" and block.run for page in PAGES for block in blocks(page)) > 20
    for page in PAGES:  # two marks on a page hide nothing that stands between them
        assert len(blocks(page)) == (ROOT / page).read_text(encoding="utf-8").count("\n```") // 2, page


@pytest.mark.parametrize(
    "code",
    ["raise ValueError('planted')", "probe.explain(replay, method='no such method')", "from lvlm_probe import nothing"],
)
def test_a_block_that_does_not_run_is_found_out(prepared: Any, code: str) -> None:
    with pytest.raises((ValueError, probe.ProbeError, ImportError)):
        exec(compiled(Block("README.md", 3, "python", code, True)), dict(prepared[1]))


@pytest.mark.parametrize(
    "command",
    [
        "make nonsense",
        "lvlm-probe study run x.yaml --nonsense",
        "pip install '.[nonsense]'",
        "python examples/nonsense.py",
    ],
)
def test_a_command_that_names_what_is_not_there_is_found_out(command: str) -> None:
    with pytest.raises(AssertionError):
        check_command(command)
