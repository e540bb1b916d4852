"""docs/developing/add-a-command.md: every command has what the page asks for, and the page's file becomes one."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

import lvlm_probe as probe
from lvlm_probe import cli
from lvlm_probe.cli.shared.options import Loading, spelled_out

ROOT = Path(__file__).parents[2]
HOW_TO = (ROOT / "docs" / "developing" / "add-a-command.md").read_text(encoding="utf-8")
TESTS = [
    path.read_text(encoding="utf-8")
    for folder in ("cli", "study", "importing", "planning", "sanity", "metrics", "pages", "models", "explainers")
    for path in (ROOT / "tests" / folder).glob("test_*.py")
]


def commands(group: Any = None, before: str = "") -> dict[str, Callable[..., None]]:
    """Command line → function, groups followed."""
    found: dict[str, Callable[..., None]] = {}
    for name, command in (group or typer.main.get_command(cli.app)).commands.items():
        below = getattr(command, "commands", None)
        line = f"{before} {name}".strip()
        found |= commands(command, line) if below else {line: inspect.unwrap(command.callback)}
    return found


def faults(line: str, function: Callable[..., None]) -> list[str]:
    """What a command lacks, as sentences."""
    said = []
    path = ".".join([cli.__name__, *line.split()])
    module = next((sys.modules[name] for name in (path, f"{path}_") if name in sys.modules), None)
    if module is None:
        said.append(f"{line} has no file of its name")
    elif f"``lvlm-probe {line}``" not in (inspect.getdoc(module) or "").splitlines()[0]:
        said.append(f"{line}: its file does not begin with ``lvlm-probe {line}``")
    documentation = getattr(module, "HELP", None) or inspect.getdoc(function) or ""
    if not documentation.split("\n")[0].endswith(".") or f"lvlm-probe {line}" not in documentation:
        said.append(f"{line}: its docstring has no first sentence, or no example")
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        options = getattr(parameter.annotation, "__metadata__", ())
        if parameter.annotation is not typer.Context and not any(getattr(option, "help", None) for option in options):
            said.append(f"{line}: {name} has no help")
    words = ", ".join(f'"{word}"' for word in line.split())
    # Of a call that runs it, or of a list of what to run: `row["words"]` and `mktemp("words")` run nothing.
    call = rf"(?:\b(?:run|succeed|in_terminal)|(?<![\w)\]]))[(\[]\s*{words}[,)\]]"
    if not any(re.search(call, text) for text in TESTS):
        said.append(f"{line}: no test runs it")
    return said


@pytest.mark.parametrize("line", commands())
def test_a_command_has_a_file_help_and_a_test(line: str) -> None:
    assert not faults(line, commands()[line])


def test_options_that_go_together_are_spelled_out_where_they_stand() -> None:
    asked: list[object] = []

    def command(path: Path, loading: Loading = Loading(dtype="auto"), last: int = 3) -> None:
        asked.extend([path, loading, last])

    spelled = spelled_out(command)
    parameters = inspect.signature(spelled).parameters
    assert list(parameters) == ["path", "device", "dtype", "attn", "trust_remote_code", "last"]
    assert parameters["dtype"].default == "auto" and parameters["device"].annotation.__metadata__[0].help
    spelled(path=Path("x"), device="mps", dtype="auto", attn=None, trust_remote_code=True, last=4)
    assert asked == [Path("x"), Loading("mps", "auto", None, True), 4]


def test_a_forgotten_step_is_found() -> None:
    def careless(path: Annotated[Path, typer.Argument()]) -> None:
        """Do something"""

    said = " ".join(faults("careless", careless))
    for lack in ("no file of its name", "no example", "path has no help", "no test runs it"):
        assert lack in said
    assert "no test runs it" in " ".join(faults("words", careless))  # which tests name, as a key of records


def test_the_file_of_the_page_is_all_the_code_it_takes(tmp_path: Path) -> None:
    """In a process of its own, whose package of commands has one more folder."""
    (tmp_path / "words.py").write_text(HOW_TO.split("```python\n")[1].split("```")[0], encoding="utf-8")
    model, processor = probe.demo.load()
    (scene,) = probe.demo.scenes(1)
    with probe.attach(model, processor) as p, p.record(tmp_path / "runs") as recording:
        inputs = processor.apply_chat_template(
            scene.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        model.generate(**inputs, max_new_tokens=24, do_sample=False)
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.find_spec('lvlm_probe.cli')\n"
        f"spec.submodule_search_locations.append({str(tmp_path)!r})\n"
        "cli = importlib.util.module_from_spec(spec)\n"
        "sys.modules[spec.name] = cli\n"
        "spec.loader.exec_module(cli)\n"
        "cli.main()\n"
    )

    def lvlm_probe(*arguments: str) -> str:
        result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    said = json.loads(lvlm_probe("words", str(recording.paths[0]), "--json"))
    assert [word["word"] for word in said] == [word.text for word in recording.traces[0].words]
    assert max(word["llr"] for word in said) > 1
    assert "List the words of an answer" in lvlm_probe("--help")
