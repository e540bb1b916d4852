"""What the site adds to Markdown, and the check of what was built: each finds what it is there to find."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lvlm_probe as probe
import lvlm_probe.errors

pytest.importorskip("mkdocs")

ROOT = Path(__file__).parents[2]


def loaded(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks, links = loaded("site_hooks"), loaded("site_links")


def led(markdown: str, page: str, repo_url: str = "") -> str:
    """Markdown of a page after its links have been led."""
    at = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    return hooks.on_page_markdown(markdown, page=at, config=SimpleNamespace(repo_url=repo_url), files=None)


# ------------------------------------------------------------------------------------------------------------ the hooks


def test_a_link_to_a_file_that_has_a_page_leads_to_the_page() -> None:
    assert led("[format](../lvlm_probe/SPEC.md#rows)", "methods.md") == "[format](trace-format.md#rows)"
    assert led("[format](../../lvlm_probe/SPEC.md)", "guides/memory.md") == "[format](../trace-format.md)"
    assert led("[card](../docs/hard-scenes.md)", "examples/index.md") == "[card](../hard-scenes.md)"


def test_a_link_into_the_repository_is_text_or_leads_to_the_repository() -> None:
    assert led("[`own`](../examples/own_model.py)", "methods.md") == "`own`"
    assert led("[own](../examples/own_model.py)", "methods.md", "https://x.org/p/") == (
        "[own](https://x.org/p/blob/main/examples/own_model.py)"
    )


def test_code_and_other_addresses_are_left_alone() -> None:
    text = "[a](https://x.org) [b](#here)\n```python\nx[0](../examples/nothing.py)\n```\n"
    assert led(text, "methods.md") == text


def test_a_link_to_a_file_that_is_not_there_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger=hooks.log.name):
        led("[x](../examples/nothing.py)", "methods.md")
    assert "docs/methods.md links to examples/nothing.py, which is not in the repository" in caplog.text


def test_a_folder_in_the_navigation_stands_for_its_pages() -> None:
    nav = [{"Start": "index.md"}, {"More": ["more/*", "last.md"]}, {"None yet": ["empty/*"]}]
    pages = ["index.md", "more/b.md", "more/index.md", "more/deep/c.md", "last.md"]
    assert hooks.expanded(nav, pages) == [{"Start": "index.md"}, {"More": ["more/index.md", "more/b.md", "last.md"]}]


def test_formulas_become_mathml() -> None:
    made = hooks.on_page_content(
        '<p><span class="arithmatex">\\(a &lt; b\\)</span></p><div class="arithmatex">\\[\\frac12\\]</div>',
        page=None, config=None, files=None,
    )  # fmt: skip
    assert "arithmatex" not in made and made.count("<math") == 2
    assert "<mo>&#x0003C;</mo>" in made and "<mfrac>" in made


def test_a_notebook_becomes_a_page() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# First map\n", "Text."]},
        {"cell_type": "code", "source": ["1 + 1"], "outputs": [{"data": {"text/plain": ["2"]}}]},
        {"cell_type": "code", "source": ["draw()"], "outputs": [{"data": {"image/png": "iVBORw0K"}}]},
        {"cell_type": "code", "source": ["print(3)"], "outputs": [{"name": "stdout", "text": ["3\n"]}]},
    ]
    made = hooks.notebook(json.dumps({"cells": cells}))
    assert made.startswith("# First map\nText.\n\n```python\n1 + 1\n```\n\n```text\n2\n```\n")
    assert 'src="data:image/png;base64,iVBORw0K"' in made and "```text\n3\n```" in made


def test_every_command_is_on_the_page_of_commands() -> None:
    page = hooks.command_line()
    for command in ("demo", "explain", "import", "study run", "study peek"):
        assert f" lvlm-probe {command}\n" in page
    assert "| `--word-maps` |" in page
    assert "\n130  stopped with Ctrl-C" in page  # the exit codes


def test_every_public_name_is_in_the_reference() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md"))
    shown = re.findall(r"^::: (\S+)", pages, re.MULTILINE)
    assert "lvlm_probe.errors" in shown
    names = set(probe.__all__) - set(probe.errors.__all__) - {"errors"}
    missing = [
        name for name in names
        if not any(path.endswith(f".{name}") or path.startswith(f"lvlm_probe.{name}.") for path in shown)
        and f"heading: probe.{name}," not in pages
        and not re.search(rf"members: \[[^]]*\b{name}\b", pages)
    ]  # fmt: skip
    assert not missing, f"docs/reference does not show {missing}"


# ------------------------------------------------------------------------------------------------------------ the check


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ('<a href="missing.html">x</a>', "a.html links to missing.html, which is not there"),
        ('<a href="b.html#nowhere">x</a>', "a.html links to b.html#nowhere, which has no such anchor"),
        ('<a href="#nowhere">x</a>', "a.html links to #nowhere, which has no such anchor"),
        ('<script src="https://x.org/a.js"></script>', "a.html loads https://x.org/a.js from the network"),
        ('<link rel="stylesheet" href="//x.org/a.css">', "a.html loads //x.org/a.css from the network"),
        ('<img src="missing.png">', "a.html links to missing.png, which is not there"),
        ('<a href="b.html#here">x</a> <a href="https://x.org">y</a> <a href="mailto:x@y.z">z</a>', None),
    ],
)
def test_a_built_page_is_checked(tmp_path: Path, page: str, said: str | None) -> None:
    (tmp_path / "a.html").write_text(page, encoding="utf-8")
    (tmp_path / "b.html").write_text('<p id="here">x</p>', encoding="utf-8")
    assert links.faults(tmp_path) == ([] if said is None else [said])


def test_an_empty_site_is_a_fault(tmp_path: Path) -> None:
    assert links.faults(tmp_path) == [f"{tmp_path} holds no pages"]


# ------------------------------------------------------------------------------------- what scripts write between marks


@pytest.mark.parametrize(
    ("page", "mark"),
    [
        ("figures.md", "tournament easy"),
        ("figures.md", "tournament hard"),
        ("figures.md", "families"),
        ("reality.md", "tournament photographs"),
        ("tournament.md", "photographs"),
        ("video.md", "tournament"),
    ],
)
def test_pages_have_the_marks_that_scripts_fill(page: str, mark: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    before, _, rest = text.partition(f"<!-- {mark} -->\n")
    assert before != text and f"<!-- /{mark} -->" in rest


def test_the_figures_of_the_readme_are_those_of_the_summary() -> None:
    readme, summary = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/figures.md"))
    easy = summary.partition("<!-- tournament easy -->")[2].partition("<!-- /tournament easy -->")[0]
    gain = re.search(r"^\| igos\+\+ \(fast\) \(the first (\d+)\) \| ([\d.]+) \[", easy, re.MULTILINE)
    families = re.search(r"\*\*(\d+ of \d+)\*\* pass every check", summary)
    assert gain is not None and f"insertion − deletion of {gain[2]} on {gain[1]} held-out" in readme
    assert families is not None and f"* {families[1]} families" in readme


def test_the_glossary_is_short() -> None:
    assert len((ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines()) <= 30
