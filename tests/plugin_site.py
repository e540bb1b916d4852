"""Distributions with plugins, as pip would leave them in site-packages."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """``install(distribution, plugin_name, target, source=…)``: what pip would leave in site-packages."""
    from lvlm_probe import plugins
    from lvlm_probe.explainers import registry

    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    before = set(sys.modules)

    def write(distribution: str, name: str, target: str, *, source: str | None = None) -> None:
        info = site / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{name} = {target}\n")
        if source is not None:
            (site / f"{target.partition(':')[0]}.py").write_text(source)
        importlib.invalidate_caches()

    plugins._cache.clear()
    yield write
    plugins._cache.clear()
    for module in set(sys.modules) - before:
        if getattr(sys.modules[module], "__file__", None) and str(site) in str(sys.modules[module].__file__):
            del sys.modules[module]
