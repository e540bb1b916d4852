"""The terminal: results on standard output, everything else on standard error.

Questions, answers, names and errors come from files, and files from anybody. A terminal obeys control characters: they
rename its window, clear it, write to the clipboard, turn text around. So everything that is printed goes through
``safe`` (or, as JSON, through ``print_json``), which shows such a character as its escape instead.
"""

from __future__ import annotations

import json
import logging
import math
import os
import select
import shlex
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import typer

from lvlm_probe.escaping import ACTING, escaped
from lvlm_probe.files import json_ready
from lvlm_probe.progress import Lines, Progress

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from rich.console import Console
    from rich.text import Text

    from lvlm_probe.words import Word

_log = logging.getLogger("lvlm_probe")

_SLOW = 2.0
"""Seconds after which a finished stage is worth a line of its own where no live display is possible."""

_STYLES = {"note": "yellow", "error": "bold red", "warning": "yellow"}

_PATIENCE = 30.0
"""Seconds that a question waits for its answer; then it is no."""


def safe(text: object) -> str:
    """A text in which nothing acts on a terminal: control characters, and those that turn text, as their escapes.

    Tabs and newlines stay; a Windows line end becomes a newline.
    """
    return escaped(str(text).replace("\r\n", "\n"))


def one_line(text: object, width: int | None = None) -> str:
    """A text on one line, so that it cannot pass for lines of ours; cut to ``width`` characters."""
    given = str(text)
    if width is not None and len(given) > 8 * width:
        given = given[: 8 * width] + "…"  # no need to look at megabytes for a line
    given = safe(" ".join(given.split()))
    return given if width is None or len(given) <= width else given[: width - 1] + "…"


def note(sentence: object, *, kind: Literal["note", "warning", "error"] = "note") -> None:
    """A sentence to the person, on standard error; with --quiet errors alone."""
    if kind != "error" and not _log.isEnabledFor(logging.WARNING):
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    # Further lines stand under the first one, so that a name with a newline in it does not pass for a line of ours.
    indented = safe(sentence).replace("\n", "\n" + " " * (len(kind) + 2))
    console.print(Text.assemble((f"{kind}: ", _STYLES[kind]), indented), soft_wrap=True)


def tell(line: str) -> None:
    """How far the work is, as a line on standard error; with --quiet nothing."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, quiet=not _log.isEnabledFor(logging.WARNING))
    console.print(safe(line), markup=False, style="dim", soft_wrap=True)


def say(*parts: str | Text | tuple[str, str]) -> None:
    """A line of the result, on standard output; a pair is (text, style), and text is never taken for markup."""
    from rich.console import Console
    from rich.text import Text

    safe_parts: list[str | Text | tuple[str, str]] = []
    for part in parts:
        if isinstance(part, str):
            safe_parts.append(safe(part))
        elif isinstance(part, tuple):
            safe_parts.append((safe(part[0]), part[1]))
        else:
            safe_parts.append(Text(safe(part.plain)) if ACTING.search(part.plain) else part)
    console = Console(highlight=False)
    console.print(Text.assemble(*safe_parts), soft_wrap=True)


def shows_looks() -> bool:
    """Tell whether bold and underlined words on standard output look so: a pipe has neither."""
    from rich.console import Console

    console = Console()
    return console.is_terminal and not console.is_dumb_terminal


def width() -> int:
    """Columns of the terminal; in a pipe 80, or what COLUMNS says."""
    from rich.console import Console

    return Console().width


def wrapped(text: str, *, indent: int) -> list[str]:
    """A text as the lines that fit beside an indent: on a terminal as wide as that, in a pipe in 80 columns."""
    return textwrap.wrap(text, max(min(width(), 100) - indent, 20), break_long_words=False, break_on_hyphens=False)


def show_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, first: Sequence[int], wide: bool = False
) -> list[str]:
    """Show a table on lines that fit: whole columns are left out, no cell is cut.

    Args:
        heads: of the columns; the first one stands left, the others right.
        rows: of cells, each on one line.
        first: columns in the order of importance; those that do not fit any more are left out.
        wide: leave out none, however long the lines.

    Returns:
        The heads of the columns that were left out.
    """
    from rich.cells import cell_len

    lines = [list(map(one_line, row)) for row in (heads, *rows)]
    widths = [max(cell_len(line[column]) for line in lines) for column in range(len(heads))]
    room = width()
    shown: list[int] = []
    for column in first:
        if shown and not wide and sum(widths[one] + 2 for one in shown) + widths[column] > room:
            break
        shown.append(column)
    for number, line in enumerate(lines):
        cells = []
        for column in sorted(shown):
            gap = " " * (widths[column] - cell_len(line[column]))
            cells.append(line[column] + gap if column == 0 else gap + line[column])
        text = "  ".join(cells).rstrip()
        say((text, "dim") if number == 0 else text)
    return [heads[column] for column in range(len(heads)) if column not in shown]


def show(text: str) -> None:
    """Lines of the result as they are, a table for instance, on standard output."""
    typer.echo(safe(text))


def print_json(value: Any) -> None:
    """A result for programs. NaN and infinity have no place in JSON and become null.

    Characters that act on a terminal are written as JSON's own escapes: what is read is the same.
    """
    text = json.dumps(json_ready(value), ensure_ascii=False, indent=2, allow_nan=False)
    typer.echo(ACTING.sub(lambda match: json.dumps(match[0])[1:-1], text))


def agrees(question: str) -> bool | None:
    """The person's answer to a question, no by default; ``None`` where nobody can be asked.

    Never ask inside a ``stage`` or a ``bar``: they draw over what is written.
    """
    if sys.stdin is None or sys.stderr is None or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    sys.stderr.write(f"{safe(question)} [y/N] ")
    sys.stderr.flush()
    try:
        waiting = bool(select.select([sys.stdin], [], [], _PATIENCE)[0])
    except (OSError, ValueError):
        waiting = True  # a system that can only wait
    answer = sys.stdin.readline() if waiting else ""
    if not answer.endswith("\n"):
        sys.stderr.write("\n")
    return answer.strip().lower() in ("y", "yes")


def open_page(page: Path) -> None:
    """Open a page in the person's browser; a note where there is none."""
    import webbrowser

    try:
        opened = webbrowser.open(page.resolve().as_uri())
    except (webbrowser.Error, OSError) as error:
        opened = False
        _log.info("the browser: %s", error)
    if not opened:
        note(f"no browser could be opened; the page is {stored_path(page)}", kind="warning")


def stored_path(path: Path) -> str:
    """A path as short as it can be named from here, on one line, in characters that do not act on a terminal."""
    relative = os.path.relpath(path)
    shown = safe(path if relative.startswith("..") else relative)
    return shown.replace("\n", "\\n").replace("\t", "\\t")


def quoted_path(path: Path) -> str:
    """A path as a shell takes it, for command lines to copy."""
    return shlex.quote(stored_path(path))


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Show what is being done and for how long; a pipe or log file gets one line, if it took long."""
    from rich.text import Text

    title = one_line(title)
    with _timed(title) as console:
        if console.is_terminal:
            with console.status(Text(title)):
                yield
        else:
            yield


@contextmanager
def bar(title: str, *, timed: bool = True) -> Iterator[Progress]:
    """Show a progress bar, elsewhere than on a terminal plain lines; yields what to call with (done, total).

    Args:
        timed: say afterwards how long it took, where it took long.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    title = one_line(title)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with _timed(title, slow=_SLOW if timed else math.inf) as console:
        if not console.is_terminal:
            yield Lines(title, lambda line: console.print(line, markup=False, style="dim", soft_wrap=True))
            return
        with Bar(*columns, console=console, transient=True) as shown:
            task = shown.add_task(title, total=None)
            yield lambda done, total: shown.update(task, completed=done, total=total)


@contextmanager
def _timed(title: str, *, slow: float = _SLOW) -> Iterator[Console]:
    from rich.console import Console

    console = Console(stderr=True, highlight=False, quiet=not _log.isEnabledFor(logging.WARNING))
    started = time.perf_counter()
    yield console
    seconds = time.perf_counter() - started
    if seconds >= slow:
        console.print(f"{title}: {seconds:.1f} s", markup=False, style="dim", soft_wrap=True)


def stop(sentence: str) -> typer.Exit:
    """Ctrl-C: tells what is kept and how to go on; raise what it returns."""
    typer.echo("", err=True)
    note(sentence, kind="note")
    return typer.Exit(130)


def guard_streams() -> None:
    """Sees to it that whatever is written comes out: by us, by a library's warning or log, or as a traceback.

    A closed stream takes everything and keeps nothing; one that cannot encode a character writes its escape.
    """
    from lvlm_probe.errors import ProbeWarning

    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    loud = _log.isEnabledFor(logging.INFO)
    warnings.filterwarnings("default" if loud else "ignore")
    warnings.filterwarnings("always" if _log.isEnabledFor(logging.WARNING) else "ignore", category=ProbeWarning)

    def show_warning(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        note(message, kind="warning")

    def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        typer.echo(safe("".join(traceback.format_exception(kind, error, trace))), err=True)

    warnings.showwarning = show_warning  # type: ignore[assignment]
    sys.excepthook = show_traceback
    _guard_logs("")


def quiet_libraries() -> None:
    """Hide the progress bars and advice of the libraries below; our own warnings become one-line notes.

    With --verbose they say what they have to say.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if _log.isEnabledFor(logging.INFO):
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info")
        guard_streams()
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_info()
    else:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        guard_streams()
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    _guard_logs("transformers")


def set_verbosity(level: int) -> None:
    """What is said on standard error from here on.

    Args:
        level: of ``logging``: ``ERROR`` errors alone, ``WARNING`` notes and progress too, ``INFO`` and ``DEBUG`` also
            what the package and the libraries below log.
    """
    _log.setLevel(level)
    for handler in [one for one in _log.handlers if isinstance(one, _Here)]:
        _log.removeHandler(handler)
    if level < logging.WARNING:
        shown = _Here()
        shown.setFormatter(_SafeFormatter(logging.Formatter("%(levelname)s:%(name)s: %(message)s")))
        _log.addHandler(shown)


class _Here(logging.StreamHandler):  # type: ignore[type-arg]
    """Standard error, with --verbose."""


class _SafeFormatter(logging.Formatter):
    """What a formatter makes of a record, with nothing in it that acts on a terminal."""

    def __init__(self, inner: logging.Formatter | None) -> None:
        super().__init__()
        self._inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        return safe(self._inner.format(record))


def _guard_logs(name: str) -> None:
    """Make the handlers of a logger, and the one of last resort, write safe lines."""
    for handler in [*logging.getLogger(name).handlers, logging.lastResort]:
        if handler is not None and not isinstance(handler.formatter, _SafeFormatter):
            handler.setFormatter(_SafeFormatter(handler.formatter))


def answer_text(
    words: Sequence[Word], tokens: Sequence[str], llr: Sequence[float] | None, selected: Sequence[int]
) -> Text:
    """The answer; words that the image decides (LLR > 1 nat) are bold, the selected ones underlined."""
    from rich.text import Text

    text = Text()
    chosen = set(selected)
    position = 0
    for word in words:
        text.append(safe("".join(tokens[position : word.start])))
        style = ""
        if llr is not None and len(llr) > 0:
            strongest = max(float(llr[index]) for index in range(word.start, word.stop))
            style = "bold green" if strongest > 1.0 else ""
        if chosen.intersection(range(word.start, word.stop)):
            style += " underline"
        piece = safe("".join(tokens[word.start : word.stop]))
        text.append(piece[: len(piece) - len(piece.lstrip())])
        text.append(piece.lstrip(), style=style.strip())
        position = word.stop
    return text
