"""A table of results, and its forms: text, Markdown, CSV, LaTeX, a page of its own (PDF), and a figure.

In print (LaTeX, PDF) the best of each column that has a direction is bold and the second underlined, among the rows
that are compared with each other; equal as printed is equal, and a row whose maps are not trusted is neither.

Names of models, data sets and methods come from the study's file, questions and answers from anybody. Each form has
one function that makes a text harmless in it (``markdown_text``, ``csv_cell``, ``tex_text``), and whatever writes such
a form goes through it.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lvlm_probe._version import __version__
from lvlm_probe.drawing import figure_bytes
from lvlm_probe.errors import StudyError
from lvlm_probe.escaping import csv_cell, markdown_text, one_line, tex_text
from lvlm_probe.files import write_whole
from lvlm_probe.metrics import Interval
from lvlm_probe.study.tables.typeset import Line, Printed, Rank, set_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = str | int | float | Interval | None
FORMS = ("markdown", "csv", "latex", "pdf", "figure")
_FOLDS = (1000, 20, 14, 9, 1)
"""Characters that a heading may have on a line, where its column is narrower: tried in turn until the lines fit."""
_NUMBER = re.compile(r"[-+−]?\d+(\.\d+)?(?= ± |$)")


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: For file names, ``table2``.
        title: What it shows.
        columns: Headings.
        rows: Cells, as many per row as there are headings. An interval is a mean with its 95 % bounds; ``None``, or a
            number that is not finite, is a cell that could not be computed.
        labels: How many of the first columns name the row.
        notes: Sentences under the table: what was left out and why, how it was computed.
        decimals: Of intervals.
        better: Column → what is better in it, where no arrow in its heading says so.
        within: Columns whose values are the same in the rows that are compared with each other; by default all that
            name the row but the last.
        doubted: Numbers of the rows whose maps are not to be trusted, which are never marked best or second.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    labels: int = 1
    notes: tuple[str, ...] = field(default=())
    decimals: int = 3
    better: Mapping[str, Literal["higher", "lower"]] = field(default_factory=dict)
    within: tuple[str, ...] | None = None
    doubted: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise StudyError(f"{self.name}: a row has {len(row)} cells for {len(self.columns)} columns")

    def markdown(self) -> str:
        """A pipe table under its title, notes below it."""
        notes = "".join(f"\n\n{markdown_text(note)}" for note in self.notes)
        return f"**{markdown_text(self.title)}**\n\n{self.pipes()}{notes}\n"

    def pipes(self) -> str:
        """The pipe table alone."""
        head = "| " + " | ".join(map(markdown_text, self.columns)) + " |\n|" + "---|" * len(self.columns)
        lines = [
            [markdown_text(cell) if isinstance(cell, str) else _text(cell, self.decimals) for cell in row]
            for row in self.rows
        ]
        return "\n".join([head, *("| " + " | ".join(line) + " |" for line in lines)])

    def text(self, width: int = 80) -> str:
        """The table as aligned columns for a terminal: headings on several lines, notes below it.

        Bounds of intervals are left out, and a sentence says so, where the lines would be wider than ``width``.
        """
        from rich.cells import cell_len

        whole = [[one_line(_text(cell, self.decimals)) for cell in row] for row in self.rows]
        short = [[one_line(_estimate(cell, self.decimals)) for cell in row] for row in self.rows]

        def laid(cells: list[list[str]], least: int) -> list[str]:
            heads, sizes = [], []
            for name, column in zip(self.columns, zip(*cells, strict=True), strict=True):
                room = max(least, *map(cell_len, [*name.split(), *column]))
                heads.append(textwrap.wrap(one_line(name), room, break_long_words=False, break_on_hyphens=False))
                sizes.append(max(map(cell_len, [*heads[-1], *column])))
            above = itertools.zip_longest(*heads, fillvalue="")
            lines = [*above, ["─" * size for size in sizes], *cells]
            return ["  ".join(map(_aligned, line, sizes, self._lefts())).rstrip() for line in lines]

        tries = [laid(cells, least) for cells in (whole, short) for least in _FOLDS] if whole else [[]]
        lines = next((one for one in tries if max(map(cell_len, one), default=0) <= width), tries[-1])
        bare = whole != short and lines in tries[len(_FOLDS) :]
        said = ["Without the intervals, which are in the files and the other formats."] if bare else []
        title = textwrap.wrap(one_line(self.title), width, break_long_words=False)
        notes = [line for note in (*self.notes, *said) for line in textwrap.wrap(one_line(note), width)]
        return "\n".join([*title, *[""] * bool(title), *lines, *[""] * bool(notes), *notes]) + "\n"

    def _lefts(self) -> list[bool]:
        """Which columns stand left: those that name the row."""
        return [place < self.labels for place in range(len(self.columns))]

    def csv(self) -> str:
        """Comma-separated, with the bounds of every interval in columns of their own."""
        spread = [any(isinstance(row[place], Interval) for row in self.rows) for place in range(len(self.columns))]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        names: list[str] = []
        for name, wide in zip(self.columns, spread, strict=True):
            names += [name, f"{name} low", f"{name} high"] if wide else [name]
        writer.writerow(map(csv_cell, names))
        for row in self.rows:
            cells: list[Any] = []
            for cell, wide in zip(row, spread, strict=True):
                if isinstance(cell, Interval) and not _is_nothing(cell):
                    cells += [cell.estimate, cell.low, cell.high]
                else:
                    cells += ["" if _is_nothing(cell) else cell] + (["", ""] if wide else [])
            writer.writerow(map(csv_cell, cells))
        return out.getvalue()

    def headings(self) -> tuple[str, ...]:
        """The columns' headings with an arrow where one value is better than another."""
        arrow = {"higher": " ↑", "lower": " ↓"}
        return tuple(name + arrow[self.better[name]] if name in self.better else name for name in self.columns)

    def ranks(self) -> dict[tuple[int, int], Rank]:
        """(row, column) → whether it is the best or the second of its column among the rows that it is compared with.

        Values that are equal as they are printed share a rank.
        """
        found: dict[tuple[int, int], Rank] = {}
        for place, name in enumerate(self.headings()):
            if not name.endswith(("↑", "↓")):
                continue
            for group in self._groups():
                values = {
                    row: value for row in group if (value := _value(self.rows[row][place], self.decimals)) is not None
                }
                trusted = {row: value for row, value in values.items() if row not in self.doubted}
                order = sorted(set(trusted.values()), reverse=name.endswith("↑"))
                if len(values) < 2:
                    continue
                for row, value in trusted.items():
                    if value in order[:2]:
                        found[row, place] = "best" if value == order[0] else "second"
        return found

    def _groups(self) -> list[list[int]]:
        """Numbers of the rows that are compared with each other."""
        names = self.columns[: self.labels - 1] if self.within is None else self.within
        places = [self.columns.index(name) for name in names]
        found: dict[tuple[Cell, ...], list[int]] = {}
        for number, row in enumerate(self.rows):
            found.setdefault(tuple(row[place] for place in places), []).append(number)
        return list(found.values())

    def _lines(self) -> Iterator[Line]:
        """The rows in print; a group that stands together begins with a rule."""
        ranks, groups = self.ranks(), self._groups()
        together = all(group == list(range(group[0], group[-1] + 1)) and len(group) > 1 for group in groups)
        firsts = {group[0] for group in groups} if together else set()
        for number, row in enumerate(self.rows):
            cells = [
                Printed(
                    (str if place < self.labels else _minus)(one_line(_estimate(cell, self.decimals))),
                    _minus(_bounds(cell, self.decimals)),
                    ranks.get((number, place)),
                )
                for place, cell in enumerate(row)
            ]
            if number in self.doubted and self.labels:
                last = cells[self.labels - 1]
                cells[self.labels - 1] = Printed(f"{last.text} †")
            yield Line(cells, number in firsts)

    def _legend(self) -> list[str]:
        """What the marks mean."""
        ranks = set(self.ranks().values())
        said = {"best": "best in bold", "second": "second underlined"}
        shown = [text for rank, text in said.items() if rank in ranks]
        sentences = ["; ".join(shown).capitalize() + "."] if shown else []
        if any(isinstance(cell, Interval) for row in self.rows for cell in row):
            sentences.append("In brackets: 95 % intervals.")
        if self.doubted:
            sentences.append("†: most maps of the row are not to be trusted, and it is not ranked.")
        return sentences

    def latex(self) -> str:
        """A ``table`` with caption and label, in the style of the package booktabs."""
        columns = "l" * self.labels + "r" * (len(self.columns) - self.labels)
        lines = [_tex_row(map(tex_text, self.headings())), r"\midrule"]
        for number, line in enumerate(self._lines()):
            lines += [r"\midrule"] * (line.begins and number > 0) + [_tex_row(map(_tex_cell, line.cells))]
        body = "\n".join(lines)
        comments = "".join(f"% {one_line(note)}\n" for note in self.notes)
        caption = tex_text(
            " ".join([self.title if self.title.endswith(("?", ".")) else f"{self.title}.", *self._legend()])
        )
        place = "table*" if len(self.columns) > 5 else "table"  # the width of the page, in two columns
        return (
            f"% Needs \\usepackage{{booktabs}} in the preamble.\n{comments}\\begin{{{place}}}[t]\n\\centering\n"
            f"\\caption{{{caption}}}\n\\label{{tab:{self.name}}}\n\\small\n\\setlength{{\\tabcolsep}}{{4pt}}\n"
            f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{body}\n\\bottomrule\n\\end{{tabular}}\n\\end{{{place}}}\n"
        )

    def page(self) -> Figure:
        """The table set for print, with its title and notes."""
        headings = [one_line(name) for name in self.headings()]
        notes = [one_line(note) for note in (" ".join(self._legend()), *self.notes) if note]
        return set_table(one_line(self.title), headings, list(self._lines()), labels=self.labels, notes=notes)

    def figure(self) -> Figure:
        """A figure: one panel per column of intervals, one line per row.

        Raises:
            StudyError: no column holds intervals.
        """
        from matplotlib.figure import Figure

        places = [
            place for place in range(len(self.columns)) if any(isinstance(row[place], Interval) for row in self.rows)
        ]
        if not places:
            raise StudyError(f"{self.name} holds no means with intervals to draw")
        drawing = Figure(figsize=(2.2 + 2.6 * len(places), 1.1 + 0.28 * len(self.rows)), layout="constrained")
        # Names are shown as they are: a dollar sign in one begins no formula.
        names = [one_line(" · ".join(_text(cell, self.decimals) for cell in row[: self.labels])) for row in self.rows]
        for number, place in enumerate(places):
            axes = drawing.add_subplot(1, len(places), number + 1)
            for line, row in enumerate(self.rows):
                cell = row[place]
                if isinstance(cell, Interval) and not _is_nothing(cell):
                    axes.plot([cell.low, cell.high], [line, line], color="#7f8ea3", linewidth=2, solid_capstyle="round")
                    axes.plot(cell.estimate, line, "o", color="#0072b2", markersize=5)
            axes.set_yticks(range(len(names)), names if number == 0 else [""] * len(names), parse_math=False)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_title(one_line(self.headings()[place]), fontsize=10, parse_math=False)
            axes.locator_params(axis="x", nbins=5)  # numbers of neighbouring panels do not meet
            axes.grid(axis="x", color="#e3e6ea")
            axes.set_axisbelow(True)
            for side in ("top", "right", "left"):
                axes.spines[side].set_visible(False)
            axes.tick_params(left=False, labelsize=9)
        drawing.suptitle(one_line(self.title), fontsize=11, parse_math=False)
        return drawing

    def write(self, directory: Path, forms: Sequence[str] = FORMS) -> list[Path]:
        """Write the table in some forms; return the files. A table without intervals has no figure."""
        directory.mkdir(parents=True, exist_ok=True)
        made = []

        def keep(name: str, content: str | bytes) -> None:
            write_whole(directory / name, content)
            made.append(directory / name)

        def draw(drawn: Figure, *names: str) -> None:
            for name in names:
                keep(name, figure_bytes(drawn, name, provenance=f"lvlm_probe {__version__}: {one_line(self.title)}"))

        for form in forms:
            suffix = {"markdown": "md", "csv": "csv", "latex": "tex"}.get(form)
            if suffix is not None:
                keep(f"{self.name}.{suffix}", getattr(self, form)())
            elif form == "pdf":
                draw(self.page(), f"{self.name}.pdf")
            elif form != "figure":
                raise StudyError(f"a table has the forms {', '.join(FORMS)}; not {form!r}")
            elif any(isinstance(cell, Interval) for row in self.rows for cell in row):
                draw(self.figure(), *(f"{self.name}-figure.{ending}" for ending in ("png", "pdf", "svg")))
        return made


def _aligned(cell: str, size: int, left: bool) -> str:
    from rich.cells import cell_len

    room = " " * (size - cell_len(cell))
    return cell + room if left else room + cell


def _tex_row(cells: Iterable[str]) -> str:
    line = " & ".join(cells)
    # After the line end before it, LaTeX would take these for that command's star or argument.
    return ("{}" if line.startswith(("[", "*", "(")) else "") + line + r" \\"


def _tex_cell(cell: Printed) -> str:
    text = tex_text(cell.text)
    text = {"best": rf"\textbf{{{text}}}", "second": rf"\underline{{{text}}}"}.get(cell.rank or "", text)
    return text + (rf" {{\scriptsize {tex_text(cell.beside)}}}" if cell.beside else "")


def _text(cell: Cell, decimals: int) -> str:
    return f"{_estimate(cell, decimals)} {_bounds(cell, decimals)}".rstrip()


def _estimate(cell: Cell, decimals: int) -> str:
    """A cell's value without its interval."""
    if _is_nothing(cell):
        return "–"
    if isinstance(cell, Interval):
        return f"{cell.estimate:.{decimals}f}"
    if isinstance(cell, float):
        return f"{cell:.3g}" if abs(cell) < 1e-3 or abs(cell) >= 1e4 else f"{cell:.3f}"
    return str(cell).replace("\n", " ")


def _bounds(cell: Cell, decimals: int) -> str:
    """Its interval; nothing where there is none."""
    if _is_nothing(cell) or not isinstance(cell, Interval) or (cell.n == 1 and cell.low == cell.high):
        return ""
    return f"[{cell.low:.{decimals}f}, {cell.high:.{decimals}f}]"


def _minus(text: str) -> str:
    """A number in print: a minus where a hyphen stands for one."""
    return re.sub(r"-(?=\d)", "−", text) if re.match(r"[-+\d\[]", text) else text


def _value(cell: Cell, decimals: int) -> float | None:
    """The number that a cell shows, as it is printed."""
    found = _NUMBER.match(_estimate(cell, decimals))
    if found is None or _is_nothing(cell):
        return None
    return float(found[0].replace("−", "-"))


def _is_nothing(cell: Cell) -> bool:
    """Whether a cell could not be computed; a number that is not finite is none."""
    number = cell.estimate if isinstance(cell, Interval) else cell
    return number is None or (isinstance(number, float) and not math.isfinite(number))
