"""What the terminal shows: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from rich.text import Text

    from lvlm_probe.words import Word

__all__ = [
    "answer_text",
    "bar",
    "finite",
    "note",
    "print_json",
    "quiet_libraries",
    "say",
    "stage",
    "stop",
    "stored_path",
]

_SLOW = 2.0
"""Seconds after which a finished stage is worth a line of its own where no live display is possible."""

_STYLES = {"note": "yellow", "error": "bold red", "warning": "yellow"}


def note(sentence: str, *, kind: Literal["note", "warning", "error"] = "note") -> None:
    """A sentence to the person, on standard error."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble((f"{kind}: ", _STYLES[kind]), sentence), soft_wrap=True)


def say(*parts: str | Text | tuple[str, str]) -> None:
    """A line of the result, on standard output; a pair is (text, style), and text is never taken for markup."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text.assemble(*parts), soft_wrap=True)


def print_json(value: Any) -> None:
    """A result for programs. NaN and infinity have no place in JSON and become null."""
    typer.echo(json.dumps(finite(value), ensure_ascii=False, indent=2, allow_nan=False, default=str))


def finite(value: Any) -> Any:
    """A value as JSON can hold it: NaN and infinity become ``None``."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def stored_path(path: Path) -> str:
    """A path as short as it can be named from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Shows what is being done and for how long; a pipe or log file gets one line, if it took long."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    started = time.perf_counter()
    if console.is_terminal:
        with console.status(title):
            yield
    else:
        yield
    seconds = time.perf_counter() - started
    if seconds >= _SLOW:
        console.print(f"{title}: {seconds:.1f} s", markup=False, style="dim", soft_wrap=True)


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar; yields the function to call with (done, total)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    started = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield advance
    seconds = time.perf_counter() - started
    if seconds >= _SLOW:
        console.print(f"{title}: {seconds:.1f} s", markup=False, style="dim", soft_wrap=True)


def stop(sentence: str) -> typer.Exit:
    """Ctrl-C: tells what is kept and how to go on; raise what it returns."""
    sys.stderr.write("\n")
    note(sentence, kind="note")
    return typer.Exit(130)


def quiet_libraries() -> None:
    """Hides the progress bars and advice of the libraries below; our own warnings become one-line notes."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from lvlm_probe.errors import ProbeWarning

    warnings.filterwarnings("ignore")
    warnings.filterwarnings("always", category=ProbeWarning)

    def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        note(str(message), kind="warning")

    warnings.showwarning = show  # type: ignore[assignment]
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def answer_text(
    words: Sequence[Word], tokens: Sequence[str], llr: Sequence[float] | None, selected: Sequence[int]
) -> Text:
    """The answer; words that the picture decides (LLR > 1 nat) are bold, the selected ones underlined."""
    from rich.text import Text

    text = Text()
    chosen = set(selected)
    position = 0
    for word in words:
        text.append("".join(tokens[position : word.start]))
        style = ""
        if llr is not None and len(llr) > 0:
            strongest = max(float(llr[index]) for index in range(word.start, word.stop))
            style = "bold green" if strongest > 1.0 else ""
        if chosen.intersection(range(word.start, word.stop)):
            style += " underline"
        piece = "".join(tokens[word.start : word.stop])
        text.append(piece[: len(piece) - len(piece.lstrip())])
        text.append(piece.lstrip(), style=style.strip())
        position = word.stop
    return text
