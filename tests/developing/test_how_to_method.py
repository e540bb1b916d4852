"""docs/developing/add-a-method.md: every built-in method has what the page asks for, and so has the page's example."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from toy_replay import ToyReplay

from lvlm_probe import explainers
from lvlm_probe.explainers import registry

ROOT = Path(__file__).parents[2]
METHODS_PAGE = ROOT / "docs" / "methods.md"
HOW_TO = (ROOT / "docs" / "developing" / "add-a-method.md").read_text(encoding="utf-8")
BUILT_IN = [name for name in explainers.methods() if registry.resolve(name).__module__.startswith(explainers.__name__)]
TESTS = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "explainers").glob("test_*.py")}


def faults(name: str) -> list[str]:
    """What a built-in method lacks, as sentences; step by step of the page."""
    function = registry.resolve(name)
    said = list(of_file(name, function, sys.modules[function.__module__]))
    rows = [line for line in METHODS_PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    if not any(f"`{name}`" in row.split("|")[1] for row in rows):
        said.append(f"docs/methods.md has no row of `{name}`")
    if not any(f'"{name}"' in text or f"import {name}\n" in text for text in TESTS.values()):
        said.append(f"no test in tests/explainers names {name!r}")
    return said


def of_file(name: str, function: Any, module: ModuleType) -> list[str]:
    said = []
    documentation = inspect.getdoc(function) or ""
    if not re.search(r"\d{4}|paper|Eq\.|floor|control|gradient", inspect.getdoc(module) or ""):
        said.append(f"{module.__name__} names no source in its docstring")
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty:
            said.append(f"{name}: {parameter.name} is keyword-only and has a default")
        if not re.search(rf"^ +(\w+, )*{parameter.name}(, \w+)*:|^``{parameter.name}``:", documentation, re.MULTILINE):
            said.append(f"{name}: {parameter.name} has no line under Args:")
    if registry.METHODS[name].cost is None:
        said.append(f"{name} declares no cost: register({name!r}, cost=...)")
    return said


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_method_has_a_file_a_row_and_a_test(name: str) -> None:
    assert not faults(name)


@pytest.fixture
def windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The page's example as a file of the package's folder, found as the others are."""
    (tmp_path / "windows.py").write_text(HOW_TO.split("```python\n")[1].split("```")[0], encoding="utf-8")
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    monkeypatch.setattr(explainers, "__path__", [*explainers.__path__, str(tmp_path)])
    registry.discover(explainers.__path__, explainers.__name__)
    yield registry.resolve("windows")
    del sys.modules[f"{explainers.__name__}.windows"], explainers.windows  # type: ignore[attr-defined]


def test_the_file_of_the_page_is_all_the_code_it_takes(windows: Any) -> None:
    """And what is still missing, the table's row and the test, is found."""
    assert "windows" in explainers.methods()
    weights = torch.tensor([[0.0, 0.1], [0.2, 0.7]])
    heat = explainers.explain(ToyReplay(weights), method="windows", size=2, tokens=[0])
    assert heat.values is not None
    assert heat.values.argsort(axis=None).tolist() == [0, 1, 2, 3], "the more a cell weighs, the hotter it is"
    assert faults("windows") == [
        "docs/methods.md has no row of `windows`",
        "no test in tests/explainers names 'windows'",
    ]


def test_a_file_that_says_too_little_is_found(windows: Any) -> None:
    @registry.register("careless")
    def careless(problem: registry.Problem, *, size: int) -> registry.Outcome:
        """Explain."""
        raise AssertionError

    assert [sentence.split(": ")[-1] for sentence in of_file("careless", careless, ModuleType("careless"))] == [
        "careless names no source in its docstring",
        "size is keyword-only and has a default",
        "size has no line under Args:",
        "register('careless', cost=...)",
    ]
