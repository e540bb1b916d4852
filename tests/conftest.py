"""Fixtures shared by the tests, the order of the files, and what `make quick` holds the package to."""

from __future__ import annotations

import ast
import gc
import importlib.util
import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from browser import CHROMIUM, DRIVER, driver, show  # noqa: F401  (two of them fixtures)
from draws import pytest_runtest_call, pytest_runtest_setup  # noqa: F401  (hooks)
from PIL import Image
from plugin_site import install  # noqa: F401  (a fixture)

PACKAGE = Path(__file__).parents[1] / "lvlm_probe"
LONGEST = (
    "test_cli", "test_wrappers", "test_code_blocks", "test_image_path", "test_shortcuts_explainers", "test_selfcheck",
    "test_judging", "test_benchmarks", "test_study_run", "test_study_pages", "test_hard_scenes", "test_threads",
    "test_probe", "test_plugins", "test_nnsight",
)  # fmt: skip
"""Files that take ten seconds and more, which are begun first, so that no process is left with one at the end."""

if importlib.util.find_spec("hypothesis") is not None:  # the second environment is without
    from hypothesis import HealthCheck, settings

    # The same examples on every machine; and how long one takes is the machine's affair.
    settings.register_profile("tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-module", action="store_true", help="fail when a module of the package has not run")


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until every file is imported
    if config.getoption("--every-module"):
        config.pluginmanager.register(EveryModule())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    if CHROMIUM is None or DRIVER is None:
        absent = pytest.mark.skip(reason="no Chromium: apt-get install chromium chromium-driver")
        for item in items:
            if "driver" in getattr(item, "fixturenames", ()):
                item.add_marker(absent)


def pytest_collection_finish() -> None:
    """Leave the objects of torch, transformers and the test files themselves, which live to the end, out of every later
    collection of garbage: looking through them took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.enable()


def _works(node: ast.AST) -> bool:
    """Whether a node is a function with something to run: not what a protocol only names."""
    if not isinstance(node, ast.FunctionDef):
        return False
    return not all(isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant) for step in node.body)


class EveryModule:
    """Fails a run in which no function of some module of the package has been called by a test that is marked `quick`.

    Where tests run in several processes, each tells the first one what it has called."""

    def __init__(self) -> None:
        self._run: set[str] = set()
        self._known: set[Any] = set()

    def _called(self, frame: FrameType, _event: str, _argument: Any) -> None:
        code = frame.f_code
        if code not in self._known:
            self._known.add(code)
            if code.co_name != "<module>":
                self._run.add(code.co_filename)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        if item.get_closest_marker("quick") is None:
            return (yield)
        before = sys.gettrace()
        sys.settrace(self._called)
        try:
            return (yield)
        finally:
            sys.settrace(before)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self._run.update(getattr(node, "workeroutput", {}).get("called", ()))  # none of one that has crashed

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["called"] = sorted(name for name in self._run if name.startswith(str(PACKAGE)))
            self.missing = []
            return
        self.missing = [
            path.relative_to(PACKAGE).as_posix()
            for path in sorted(PACKAGE.rglob("*.py"))
            if str(path) not in self._run and any(map(_works, ast.walk(ast.parse(path.read_text(encoding="utf-8")))))
        ]
        if self.missing and exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.missing:
            terminalreporter.write_line(f"no quick test of {', '.join(self.missing)}: mark one of its tests `quick`")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tests run side by side on few cores; more threads only fight each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo():
    """The embedded model and its processor, ``(model, processor)``; treat as read-only."""
    import lvlm_probe as probe

    return probe.demo.load()


@pytest.fixture
def photo() -> Image.Image:
    """A smooth colourful picture, 90 x 60, that no processor leaves at its size."""
    rows, cols = np.mgrid[0:60, 0:90]
    pixels = np.stack([cols * 2.5, rows * 4.0, 255 - cols - rows], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
