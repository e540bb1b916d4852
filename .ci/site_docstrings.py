"""Docstrings as Markdown: a paragraph that ends in ``::`` and introduces a block ends in one colon, or not at all."""

from __future__ import annotations

import re
from typing import Any

import griffe

ALONE = re.compile(r"^[ \t]*::[ \t]*\n", re.MULTILINE)
AT_THE_END = re.compile(r"::([ \t]*\n[ \t]*\n)")


class Literal(griffe.Extension):
    """Rewrites the docstring of every object that is collected."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = AT_THE_END.sub(r":\1", ALONE.sub("", obj.docstring.value))
