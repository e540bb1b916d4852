"""Fails when a built page loads something from the network, or links to a page, a file or an anchor that is not there.

python .ci/site_links.py site
"""

from __future__ import annotations

import posixpath
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADING = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src"), ("video", "src")}
LINKING = {("a", "href")}
NOT_LOADED = {"canonical", "alternate", "prev", "next", "edit"}
"""Relations of ``<link>`` that a browser does not fetch."""


class Page(HTMLParser):
    """What a page loads, where it links to, and its own anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := given.get(name))}
        for name, value in given.items():
            if value and (tag, name) in LINKING:
                self.links.append(value)
            elif value and (tag, name) in LOADING and given.get("rel") not in NOT_LOADED:
                self.loads.append(value)


def faults(site: Path) -> list[str]:
    """Sentences; empty where all is well."""
    pages = {path.relative_to(site).as_posix(): Page(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}
    found = [] if pages else [f"{site} holds no pages"]
    for name, page in pages.items():
        if name == "404.html":  # its links are those of the server's root
            continue
        found += [f"{name} loads {target} from the network" for target in page.loads if urlsplit(target).netloc]
        for target in [*page.links, *page.loads]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            path = (
                posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(parts.path))) if parts.path else name
            )
            if not (site / path).exists():
                found.append(f"{name} links to {target}, which is not there")
            elif parts.fragment and path in pages and unquote(parts.fragment) not in pages[path].anchors:
                found.append(f"{name} links to {target}, which has no such anchor")
    for sheet in sorted(site.rglob("*.css")):
        text = sheet.read_text("utf-8")
        found += [
            f"{sheet.relative_to(site)} loads from the network" for start in ("url(http", "url(//") if start in text
        ]
    return found


def main() -> int:
    """Check the site that is named on the command line."""
    site = Path(sys.argv[1])
    found = faults(site)
    print(*found, f"{len(list(site.rglob('*.html')))} pages, {len(found)} faults", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
