"""docs/developing/add-a-data-set.md: every reader of the package has what the page asks for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lvlm_probe.study.datasets as package
from lvlm_probe.study.datasets import registry

TESTS = Path(__file__).parents[1] / "study"
BUILT_IN = [
    name for name in registry.readers() if registry.reader_named(name).read.__module__.startswith(package.__name__)
]


def fault(name: str) -> str | None:
    """What a reader lacks, as a sentence."""
    entry = registry.reader_named(name)
    if len(entry.layout.split()) < 5:
        return f"{name}: its layout is no sentence on the files that it expects"
    documentation = inspect.getdoc(entry.read) or ""
    published = entry.read.__module__.endswith("published")
    if not documentation or (published and not re.search(r"\(.+, \d{4}\)", documentation)):
        return f"{name}: its docstring does not say what it reads, and where that was published"
    if not any(f'open_dataset("{name}"' in path.read_text(encoding="utf-8") for path in TESTS.glob("test_*.py")):
        return f'{name}: no test in tests/study opens it: open_dataset("{name}", …)'
    return None


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_reader_has_a_layout_a_source_and_a_test(name: str) -> None:
    assert fault(name) is None


def test_a_forgotten_step_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_READERS", dict(registry._READERS))

    @registry.register_dataset("untested", layout="a directory with five files")
    def untested(source: str, *, split: str | None = None) -> Iterator[registry.Sample]:
        """Nothing (Nobody, 2026)."""
        yield from ()

    assert "no test in tests/study opens it" in str(fault("untested"))
    registry.register_dataset("silent", layout="files")(untested)
    assert "layout" in str(fault("silent"))


def test_a_file_in_the_folder_is_all_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's own reader, put into a file of the package."""
    page = (Path(__file__).parents[2] / "docs" / "developing" / "add-a-data-set.md").read_text(encoding="utf-8")
    reader, example = page.split("```python\n")[1].split("```")[0].split("\nhere = ")
    (tmp_path / "receipts.py").write_text(reader, encoding="utf-8")
    monkeypatch.setattr(registry, "_READERS", dict(registry._READERS))
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    assert registry.readers()["receipts"].startswith("a directory with receipts.jsonl")
    exec("import json\nfrom pathlib import Path\nfrom PIL import Image\n"
         "from lvlm_probe.study.datasets.registry import open_dataset\nhere = " + example, {})  # fmt: skip
