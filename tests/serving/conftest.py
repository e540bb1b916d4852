"""The demo server, its scenes, and what clients of it need, for all files of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from demo_server import DemoServer, no_fault, serving

import lvlm_probe as probe


@pytest.fixture(scope="session")
def scene() -> Any:
    return probe.demo.scenes(1, size=(96, 96))[0]


@pytest.fixture(scope="session")
def demo_server(demo: Any) -> Iterator[DemoServer]:
    with serving(*demo) as server:
        yield server


@pytest.fixture
def behind(demo_server: DemoServer) -> Iterator[DemoServer]:
    """The server, answering well; what a test does to it is taken back."""
    yield demo_server
    demo_server.fault, demo_server.before, demo_server.retry_after = no_fault, lambda number: None, None
    demo_server.name, demo_server.version, demo_server.biased_before = "demo", "0.32.0", False
    demo_server.lists_models = True


@pytest.fixture(scope="session")
def asked(demo_server: DemoServer, scene: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trace of the scene's question, answered by the server; its folder is nobody else's."""
    with probe.connect(demo_server.url) as server:
        return server.ask(scene.image, scene.question, out=tmp_path_factory.mktemp("asked"))


@pytest.fixture
def trace(asked: Any, tmp_path: Path) -> Any:
    """The same trace in a folder without a journal."""
    path = tmp_path / asked.path.name
    path.write_bytes(asked.path.read_bytes())
    return probe.open_trace(path)


@pytest.fixture
def naps() -> list[float]:
    """Seconds that a client would have slept: ``connect(..., sleep=naps.append)``."""
    return []
