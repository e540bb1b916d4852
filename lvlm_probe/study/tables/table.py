"""A table of results, and its forms: Markdown, CSV, LaTeX, and a figure.

Names of models, data sets and methods come from the study's file, questions and answers from anybody. Each form has
one function that makes a text harmless in it (``markdown_text``, ``csv_cell``, ``tex_text``), and whatever writes such
a form goes through it.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvlm_probe.errors import StudyError
from lvlm_probe.escaping import csv_cell, markdown_text, one_line, tex_text
from lvlm_probe.files import write_whole
from lvlm_probe.metrics import Interval

__all__ = ["FORMS", "Cell", "Table"]

Cell = str | int | float | Interval | None
FORMS = ("markdown", "csv", "latex", "figure")


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
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    labels: int = 1
    notes: tuple[str, ...] = field(default=())
    decimals: int = 3

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

    def latex(self) -> str:
        """A ``tabular`` in the style of booktabs."""
        columns = "l" * self.labels + "r" * (len(self.columns) - self.labels)
        lines = [_tex_row(self.columns), r"\midrule"]
        lines += [_tex_row(_text(cell, self.decimals) for cell in row) for row in self.rows]
        body = "\n".join(lines)
        notes = "".join(f"\n% {one_line(note)}" for note in self.notes)
        head = f"% {one_line(self.title)}{notes}\n\\begin{{tabular}}{{{columns}}}"
        return f"{head}\n\\toprule\n{body}\n\\bottomrule\n\\end{{tabular}}\n"

    def figure(self, path: Path) -> Path:
        """An image: one panel per column of intervals, one line per row.

        Raises:
            StudyError: no column holds intervals.
        """
        import matplotlib

        matplotlib.use("Agg", force=False)
        from matplotlib.figure import Figure

        places = [
            place for place in range(len(self.columns)) if any(isinstance(row[place], Interval) for row in self.rows)
        ]
        if not places:
            raise StudyError(f"{self.name} holds no means with intervals to draw")
        height = 1.1 + 0.28 * len(self.rows)
        drawing = Figure(figsize=(2.2 + 2.6 * len(places), height), layout="constrained")
        # Names are shown as they are: a dollar sign in one begins no formula.
        names = [one_line(" · ".join(_text(cell, self.decimals) for cell in row[: self.labels])) for row in self.rows]
        for number, place in enumerate(places):
            axes = drawing.add_subplot(1, len(places), number + 1)
            for line, row in enumerate(self.rows):
                cell = row[place]
                if isinstance(cell, Interval) and not _is_nothing(cell):
                    axes.plot([cell.low, cell.high], [line, line], color="#7f8ea3", linewidth=2, solid_capstyle="round")
                    axes.plot(cell.estimate, line, "o", color="#1f4e9c", markersize=5)
            axes.set_yticks(range(len(names)), names if number == 0 else [""] * len(names), parse_math=False)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_title(one_line(self.columns[place]), fontsize=10, parse_math=False)
            axes.grid(axis="x", color="#e3e6ea")
            axes.set_axisbelow(True)
            for side in ("top", "right", "left"):
                axes.spines[side].set_visible(False)
            axes.tick_params(left=False, labelsize=9)
        drawing.suptitle(one_line(self.title), fontsize=11, parse_math=False)
        drawing.savefig(path, dpi=160)
        return path

    def write(self, directory: Path, forms: Sequence[str] = FORMS) -> list[Path]:
        """Write the table in some forms; return the files. A table without intervals has no figure."""
        directory.mkdir(parents=True, exist_ok=True)
        made = []
        for form in forms:
            if form == "figure":
                if any(isinstance(cell, Interval) for row in self.rows for cell in row):
                    made.append(self.figure(directory / f"{self.name}.png"))
                continue
            suffix = {"markdown": "md", "csv": "csv", "latex": "tex"}.get(form)
            if suffix is None:
                raise StudyError(f"a table has the forms {', '.join(FORMS)}; not {form!r}")
            path = directory / f"{self.name}.{suffix}"
            write_whole(path, getattr(self, form)())
            made.append(path)
        return made


def _tex_row(cells: Iterable[str]) -> str:
    line = " & ".join(map(tex_text, cells))
    # After the line end before it, LaTeX would take these for that command's star or argument.
    return ("{}" if line.startswith(("[", "*", "(")) else "") + line + r" \\"


def _text(cell: Cell, decimals: int) -> str:
    if _is_nothing(cell):
        return "–"
    if isinstance(cell, Interval) and cell.n == 1 and cell.low == cell.high:
        return f"{cell.estimate:.{decimals}f}"
    if isinstance(cell, Interval):
        return f"{cell.estimate:.{decimals}f} [{cell.low:.{decimals}f}, {cell.high:.{decimals}f}]"
    if isinstance(cell, float):
        return f"{cell:.3g}" if abs(cell) < 1e-3 or abs(cell) >= 1e4 else f"{cell:.3f}"
    return str(cell).replace("\n", " ")


def _is_nothing(cell: Cell) -> bool:
    """Whether a cell could not be computed; a number that is not finite is none."""
    number = cell.estimate if isinstance(cell, Interval) else cell
    return number is None or (isinstance(number, float) and not math.isfinite(number))
