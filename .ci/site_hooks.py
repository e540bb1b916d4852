"""What the site needs beside Markdown (mkdocs.yml, ``hooks``): included files, links into the repository, formulas.

* Files that stand elsewhere for a reason (the trace format beside its code, model cards, notebooks) become pages; links
  between them and the pages in ``docs/`` work both on the site and in the repository.
* A link to a file of the repository that has no page leads to ``repo_url`` where that is configured, and is plain text
  where it is not. A file that is not there is an error.
* Formulas, ``$…$`` and ``$$…$$``, become MathML, which browsers draw by themselves.
* In ``nav:``, ``folder/*`` stands for the pages of a folder.
"""

from __future__ import annotations

import base64
import html
import inspect
import json
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
log = logging.getLogger("mkdocs.hooks.site")  # a warning here is an error in strict mode

PAGES = {
    "trace-format.md": "lvlm_probe/SPEC.md",
    "demo-model.md": "lvlm_probe/demo/README.md",
    "real-parts-model.md": "examples/real_parts/README.md",
    "changelog.md": "CHANGELOG.md",
    "examples/index.md": "examples/README.md",
    "developing/contributing.md": "CONTRIBUTING.md",
}
"""Page of the site → the file it is made of. Notebooks in ``examples/`` are added by themselves."""

# ------------------------------------------------------------------------------------------------------------ the files


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are made of other files."""
    from lvlm_probe.study.reference import keys_page

    made = {"reference/command-line.md": command_line(), "reference/study-keys.md": keys_page()}
    for name, text in {**included(), **made}.items():
        files.append(File.generated(config, name, content=text))
    config.nav = expanded(config.nav, sorted(file.src_uri for file in files.documentation_pages()))
    return files


def included() -> dict[str, str]:
    """Page → Markdown, of everything that stands outside of ``docs/``."""
    pages = {page: (ROOT / path).read_text(encoding="utf-8") for page, path in sources().items() if path[-3:] == ".md"}
    notebooks = {page: path for page, path in sources().items() if path.endswith(".ipynb")}
    return pages | {page: notebook((ROOT / path).read_text(encoding="utf-8")) for page, path in notebooks.items()}


def sources() -> dict[str, str]:
    """Page → file, notebooks included. A file that is not there is missed by the navigation or by a link."""
    books = sorted((ROOT / "examples").glob("*.ipynb"))
    there = {page: path for page, path in PAGES.items() if (ROOT / path).is_file()}
    return {**there, **{f"examples/{book.stem}.md": f"examples/{book.name}" for book in books}}


def expanded(nav: Any, pages: list[str]) -> Any:
    """The navigation with ``folder/*`` replaced by the folder's pages, its index first; empty sections are left out."""
    if isinstance(nav, list):
        items = [expanded(item, pages) for item in nav]
        return [one for item in items for one in (item if isinstance(item, list) else [item]) if one not in ({}, [])]
    if isinstance(nav, dict):
        return {title: made for title, item in nav.items() if (made := expanded(item, pages))}
    if isinstance(nav, str) and nav.endswith("/*"):
        inside = [page for page in pages if posixpath.dirname(page) == nav[:-2]]
        return sorted(inside, key=lambda page: (posixpath.basename(page) != "index.md", page))
    return nav


def notebook(text: str) -> str:
    """A notebook as Markdown: its text, its code, and its outputs as they are kept in the file."""
    parts: list[str] = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source.strip():
            parts += [f"```python\n{source}\n```", *(shown for out in cell["outputs"] if (shown := output(out)))]
    return "\n\n".join(parts) + "\n"


def output(out: dict[str, Any]) -> str:
    """One output of a cell: a picture, HTML or text."""
    data = out.get("data", {})
    for kind in ("image/png", "image/jpeg"):
        if kind in data:
            encoded = base64.b64encode(base64.b64decode("".join(data[kind]))).decode()
            return f'<img alt="what the cell above draws" src="data:{kind};base64,{encoded}">'
    if "text/html" in data:
        return f'<div class="output">{" ".join("".join(data["text/html"]).split())}</div>'
    plain = "".join(out.get("text", "")) or "".join(data.get("text/plain", ""))
    return f"```text\n{plain.rstrip()}\n```" if plain.strip() else ""


def command_line() -> str:
    """The commands with their options, from the program itself."""
    import typer

    import lvlm_probe.cli

    codes = (
        inspect.cleandoc(lvlm_probe.cli.__doc__ or "").partition("Exit codes:\n")[2].strip("\n").partition("\n\n")[0]
    )
    parts = ["# Command line", "", "Made from the program: `lvlm-probe COMMAND --help` says the same.", ""]
    parts += [
        "Results go to standard output (`--json`: nothing but JSON), progress and notes to standard error. Exit codes:"
    ]
    parts += ["", "```text", inspect.cleandoc(codes), "```", ""]

    def described(command: Any, name: str, level: int) -> None:
        parts.extend([f"{'#' * level} {name}", "", paragraphs(command.help or ""), ""])
        if commands := getattr(command, "commands", None):
            for inner, one in commands.items():
                described(one, f"{name} {inner}", level + 1)
            return
        parts.extend(["| argument | |", "|---|---|"])
        for one in command.params:
            option = one.param_type_name == "option"
            names = ", ".join((*one.opts, *one.secondary_opts)) if option else (one.metavar or one.name.upper())
            said = " ".join((getattr(one, "help", None) or "").split()).replace("|", "\\|")
            if option and one.default not in (None, False, True, (), []) and not callable(one.default):
                said += f" Default: `{one.default}`."
            parts.append(f"| `{names}` | {said}{' Required.' if one.required else ''} |")
        parts.append("")

    for name, command in typer.main.get_command(lvlm_probe.cli.app).commands.items():  # type: ignore[attr-defined]
        described(command, f"lvlm-probe {name}", 2)
    return "\n".join(parts)


def paragraphs(text: str) -> str:
    """Help text as Markdown: examples are code."""
    text = text.replace("\b", "")
    lines = [re.sub(r"^Example:\s+(.*)$", r"`\1`  ", line.strip()) for line in text.splitlines()]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ the links

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
FENCE = re.compile(r"(^|\n)(```|~~~).*?\n\2[^\n]*", re.DOTALL)


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links that leave ``docs/`` to where the reader finds what they name."""
    made_of = sources()
    here = made_of.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    page_of = {path: name for name, path in made_of.items()}

    def led(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
        name = page_of.get(wanted) or (wanted.removeprefix("docs/") if wanted.startswith("docs/") else None)
        if name is not None:
            relative = posixpath.relpath(name, posixpath.dirname(page.file.src_uri) or ".")
            return f"{picture}[{text}]({relative}{'#' + anchor if anchor else ''})"
        if not (ROOT / wanted).exists():
            log.warning("%s links to %s, which is not in the repository", here, wanted)
        if config.repo_url:
            return f"{picture}[{text}]({config.repo_url.rstrip('/')}/blob/main/{wanted})"
        return text

    parts, last = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(led, markdown[last : fence.start()]), fence[0]]
        last = fence.end()
    return "".join([*parts, LINK.sub(led, markdown[last:])])


# --------------------------------------------------------------------------------------------------------- the formulas

FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL)


def on_page_content(content: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML."""

    def drawn(match: re.Match[str]) -> str:
        inline, block = match[2], match[3]
        formula = html.unescape(inline if inline is not None else block)
        made = convert(" ".join(formula.split()), display="inline" if inline is not None else "block")
        return made if inline is not None else f'<div class="formula">{made}</div>'

    return FORMULA.sub(drawn, content)
