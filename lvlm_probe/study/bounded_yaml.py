"""YAML that anybody may have written: nodes that know their lines, of bounded number and depth, and plain values.

A study says what is run, so its file is read as data and no more: texts, finite numbers, true, false, null, lists and
mappings. Tags, dates, sets, binary data and merge keys are refused with their line; so is what is small as a file and
large as a value (aliases of aliases), nested without end, or too long to be a number.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import yaml

from lvlm_probe.errors import StudyError

LARGEST_FILE = 2**20
"""Bytes; a study of a hundred rows takes ten thousand."""

MOST_NODES = 10_000
"""Values and keys, each alias counted as all that it stands for."""

DEEPEST = 32
"""Lists and mappings in one another."""

LONGEST_NUMBER = 64
"""Characters of a number: Python's own limit is time, its square for a number of millions of digits."""

_TAG = "tag:yaml.org,2002:"
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")


class WrongYaml(Exception):
    """Something in the file is not as it has to be: ``line``, from 1, and a sentence."""

    def __init__(self, line: int, sentence: str) -> None:
        super().__init__(sentence)
        self.line = line


def compose(path: Path) -> yaml.Node | None:
    """The root node of a YAML file, ``None`` of an empty one.

    Raises:
        StudyError: the file cannot be read, is no YAML, or goes beyond the bounds; the message names the line.
    """
    if not path.is_file():  # a pipe or a device would be waited for
        raise StudyError(f"{path} cannot be read: it is {'no file' if os.path.lexists(path) else 'not there'}")
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
        text = data[:LARGEST_FILE].decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} cannot be read: {error}") from error
    if len(data) > LARGEST_FILE:
        raise StudyError(f"{path} cannot be read: it is larger than {LARGEST_FILE} bytes, and a study is not")
    try:
        return _composed(text)
    except WrongYaml as error:
        raise StudyError(f"{path}, line {error.line}: {error}") from error


def _composed(text: str) -> yaml.Node | None:
    loader = None
    try:
        loader = _Loader(text)
        node: yaml.Node | None = loader.get_single_node()
        return node
    except WrongYaml:
        raise
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise WrongYaml(
            line, f"not YAML: the character U+{ord(text[error.position]):04X} has no place in it"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        said = getattr(error, "problem", None) or error
        raise WrongYaml(1 if mark is None else mark.line + 1, f"not YAML: {said}") from error
    except Exception as error:  # the scanner's own, for a character beyond Unicode for instance
        line = 1 if loader is None else loader.line + 1
        raise WrongYaml(line, f"not YAML: {type(error).__name__}: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()  # type: ignore[no-untyped-call]


class _Loader(yaml.SafeLoader):
    """Counts nodes as they come, so that reading stops where a bound is passed and not after it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.nodes = self.depth = 0
        self.sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            size = self.sizes.get(id(node))
            if size is None:
                raise WrongYaml(line, f"*{event.anchor} stands inside of what it names, which would have no end")
            self._add(size, line)
            return node
        before = self.nodes
        self._add(1, line)
        self.depth += 1
        if self.depth > DEEPEST:
            raise WrongYaml(line, f"more than {DEEPEST} lists and mappings in one another")
        node = super().compose_node(parent, index)
        self.depth -= 1
        self.sizes[id(node)] = self.nodes - before
        return node

    def _add(self, count: int, line: int) -> None:
        self.nodes += count
        if self.nodes > MOST_NODES:
            raise WrongYaml(line, f"more than {MOST_NODES} values, aliases counted as what they stand for")


def plain(node: yaml.Node) -> Any:
    """The value of a node: text, number, bool, ``None``, list, or mapping with texts as keys. Raises ``WrongYaml``."""
    line = node.start_mark.line + 1
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [plain(item) for item in node.value]
    if isinstance(node, yaml.MappingNode) and kind == "map":
        found: dict[str, Any] = {}
        for key, value in node.value:
            name = plain(key) if isinstance(key, yaml.ScalarNode) else None
            if not isinstance(name, str):
                raise WrongYaml(key.start_mark.line + 1, "a key is a text; put it in quotes")
            if name in found:
                raise WrongYaml(key.start_mark.line + 1, f"{name!r} stands there twice")
            found[name] = plain(value)
        return found
    if isinstance(node, yaml.ScalarNode) and kind in ("str", "int", "float", "bool", "null"):
        return _scalar(kind, node, line)
    what = {"merge": "a merge key (<<)", "timestamp": "a date"}.get(kind, f"a value with the tag {node.tag[:60]!r}")
    raise WrongYaml(line, f"{what} has no place in a study; write out what is meant, a text in quotes")


def _scalar(kind: str, node: yaml.ScalarNode, line: int) -> Any:
    text = node.value
    if kind == "str":
        if unfit := _UNFIT.search(text):
            raise WrongYaml(line, f"a text holds the character U+{ord(unfit[0]):04X}, which cannot be shown or written")
        return text
    if len(text) > LONGEST_NUMBER:
        raise WrongYaml(line, f"a number of {len(text)} characters; if a text is meant, put it in quotes")
    try:
        value = _CONSTRUCTORS[kind](_PLAIN, node)
    except (ValueError, LookupError, OverflowError, yaml.YAMLError):
        raise WrongYaml(line, f"{text!r} is no {kind}") from None
    if (isinstance(value, int) and abs(value) >= 2**63) or (isinstance(value, float) and not math.isfinite(value)):
        raise WrongYaml(line, f"{text} is no number that can be computed with")
    return value


_PLAIN = yaml.constructor.SafeConstructor()
_CONSTRUCTORS: dict[str, Any] = {
    name: getattr(yaml.constructor.SafeConstructor, f"construct_yaml_{name}")
    for name in ("int", "float", "bool", "null")
}
