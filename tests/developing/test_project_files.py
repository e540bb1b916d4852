"""Pages and forms for people who work on the package: what they name is there, and they agree with each other."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import lvlm_probe as probe

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lvlm_probe"
PAGES = [*sorted((ROOT / "docs" / "developing").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.quick
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_path_and_link_of_a_page_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:py|md|yaml|toml|h5))`", text)
    paths = [
        path
        for path in named
        if re.search(r"\.(py|md|yaml|yml|toml|ipynb)$|/$", path) and not re.search("NAME|GROUP", path)
    ]
    missing = [path for path in paths if not any((base / path).exists() for base in (ROOT, PACKAGE, page.parent))]
    links = [link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in link]
    missing += [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"{name(page)} names what is not there: {missing}"


def test_the_architecture_page_names_every_room_and_every_module_at_the_top() -> None:
    text = (ROOT / "docs" / "developing" / "architecture.md").read_text(encoding="utf-8")
    rooms = [path.parent.name for path in PACKAGE.glob("*/__init__.py")]
    modules = [path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("_")]
    missing = [room for room in rooms if f"**{room}**" not in text]
    missing += [module for module in modules if f"`lvlm_probe/{module}`" not in text]
    assert not missing, f"docs/developing/architecture.md says nothing of {missing}"


def test_one_version_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["version"] == probe.__version__ == citation["version"]
    assert project["license"] == citation["license"]


def test_the_changelog_has_versions_and_their_sections() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - (unreleased|\d{4}-\d\d-\d\d)", version) for version in versions), versions
    assert versions[0].startswith(probe.__version__)
    assert not any(version.endswith("unreleased") for version in versions[1:])
    sections = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for release in text.split("\n## ")[1:]:
        found = re.findall(r"^### (.+)$", release, re.MULTILINE)
        assert found and len(set(found)) == len(found) and set(found) <= sections, found
        assert not re.search(r"^- ", release.split("\n### ")[0], re.MULTILINE), "an entry without a section"


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=name)
def test_issue_forms_are_forms(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "labels", "body"} <= set(form)
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(ids) == len(set(ids)) > 2
    for field in form["body"]:
        assert field["type"] in {"markdown", "textarea", "input", "dropdown", "checkboxes"}
        assert field["attributes"].get("label") or field["attributes"].get("value")
        assert (field["type"] == "dropdown") == ("options" in field["attributes"])


def test_hooks_and_pages_name_commands_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    texts = [hook["entry"] for hook in hooks] + [page.read_text(encoding="utf-8") for page in PAGES]
    called = {target for text in texts for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)}
    assert called and called <= targets, called - targets


# ---------------------------------------------------------------------------------------------- the check of notebooks


@pytest.fixture(scope="module")
def notebooks() -> Any:
    pytest.importorskip("nbclient")
    spec = importlib.util.spec_from_file_location("ci_notebooks", ROOT / ".ci" / "notebooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def said(text: str, stream: str = "stdout") -> Any:
    nbformat = pytest.importorskip("nbformat")
    output = nbformat.v4.new_output("stream", name=stream, text=text)
    return SimpleNamespace(cells=[nbformat.v4.new_code_cell("print()", outputs=[output])])


def test_a_notebook_may_differ_in_figures_and_in_nothing_else(notebooks: Any) -> None:
    stored = said("gain  0.93\nno objection")
    assert not list(notebooks.differences(stored, said("gain 0.9301 \nno objection")))
    assert list(notebooks.differences(stored, said("gain 0.93\ndo not trust")))
    assert list(notebooks.differences(stored, said("gain nan\nno objection")))
    assert list(notebooks.differences(stored, said("")))
    assert not list(notebooks.differences(said("a warning", "stderr"), said("another", "stderr")))


def test_notebooks_are_kept_with_outputs_and_small(notebooks: Any) -> None:
    import nbformat

    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        outputs = [output for cell in cells for output in cell.outputs]
        assert all(cell.execution_count for cell in cells), f"{path.name} was not executed to the end"
        assert any("image/jpeg" in output.get("data", {}) for output in outputs), f"{path.name} shows no image"
        assert not any(output.output_type == "error" for output in outputs)
        assert path.stat().st_size < notebooks.LARGEST
