"""``lvlm-probe serve``: what it makes of its options, and what it says where it cannot serve."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import run

from lvlm_probe import app


@pytest.mark.quick
def test_without_gradio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = run("serve")
    assert result.code == 2
    assert "pip install 'lvlm-probe[app]'" in result.err


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be served, and where: the web server itself is Gradio's affair."""
    found: list[Any] = []
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace())

    def serve(service: Any, **where: Any) -> None:
        found.extend([service, where, service.folder.is_dir()])

    monkeypatch.setattr(app, "serve", serve)
    return found


def test_the_embedded_model_for_this_machine_alone(served: list[Any]) -> None:
    result = run("serve")
    assert result.code == 0, result.err
    service, where, there = served
    assert list(service.models) == ["demo"]
    assert where == {"host": "127.0.0.1", "port": 7860}
    assert "http://127.0.0.1:7860" in result.out
    assert there
    assert not service.folder.exists()  # it was a temporary one


def test_options_reach_the_service(served: list[Any], tmp_path: Path) -> None:
    result = run(
        "serve", "--host", "0.0.0.0", "--port", "8000", "--store", tmp_path, "--max-mb", "3", "--max-new-tokens", "9"
    )
    assert result.code == 0, result.err
    service, where, _ = served
    assert where == {"host": "0.0.0.0", "port": 8000}
    assert (service.folder, service.limits.file_bytes, service.limits.answer) == (tmp_path, 3_000_000, 9)
    assert "whoever reaches this machine can ask the model" in result.err


def test_a_model_and_a_server_are_not_both_served(served: list[Any]) -> None:
    result = run("serve", "--model", "demo", "--server", "http://127.0.0.1:9")
    assert result.code == 2
    assert "not both" in result.err
    assert served == []
