"""What passes buy: insertion − deletion against the number of passes, on held-out plain scenes.

    python tests/benchmarks/pareto.py --scenes 100            # makes what is missing, then the figure
    python tests/benchmarks/pareto.py --table                 # the figure alone
    python tests/benchmarks/pareto.py --table --also "hard scenes=runs/tournament/hard"

Settings of iGOS++ between its presets, and integrated gradients with few steps, are judged here; all other points are
the tournament's own lines (runs/tournament/easy), on the same scenes. A pass is one image sent forward; where it was
sent back as well, that is in the same column. ``--also`` adds a table for the tournament's lines of another model, each
method on the scenes that it was judged on there. Writes docs/pareto.png and docs/pareto.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import tournament
from judging import Lines, comparison, figure, scene_arguments, scenes_summary, settle, shown, values_of, write

ENTRIES: dict[str, tournament.Entry] = {
    "igos++, 12 passes": tournament.Entry("igos++", {"preset": "fast", "ig_steps": 2, "refine": 2}),
    "igos++, 48 passes": tournament.Entry("igos++", {"preset": "fast", "ig_steps": 8, "refine": 8}),
    "integrated_gradients, 5 steps": tournament.Entry("integrated_gradients", {"steps": 5}),
    "integrated_gradients, 25 steps": tournament.Entry("integrated_gradients", {"steps": 25}),
}
FROM_TOURNAMENT = (
    "igos++", "igos++ (fast)",
    "igos++ (thorough)", "igos++ (release)", "igos+", "integrated_gradients", "input_gradient", "rise",
    "greedy", "occlusion", "tmm", "iia", "gradcam",
)  # fmt: skip
NO_METHOD = ("random", "center", tournament.GROUND_TRUTH)
OURS = ("igos++, 12 passes", "igos++ (fast)", "igos++", "igos++ (thorough)")
"""The line of the figure, from few passes to many; another point lies under the default and is in the table alone."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scene_arguments(parser, "runs/pareto")
    parser.add_argument("--tournament", type=Path, default=Path("runs/tournament/easy"), help="where its lines are")
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=FOLDER", help="lines of other models")
    parser.set_defaults(scenes=100, causal=False, few={}, place={})
    arguments = parser.parse_args()
    settle(arguments)
    lines = Lines(arguments.out, arguments.shard)
    if not arguments.table:
        tournament.play(arguments, lines, ENTRIES)
        lines = Lines(arguments.out, arguments.shard)
    others = Lines(arguments.tournament)
    lines.keep_complete(list(ENTRIES))
    scenes = {line["scene"] for line in lines.latest.values()}
    if not scenes:
        raise SystemExit("no scene has been judged under every setting yet; run without --table first")
    rows = rows_of({**dict.fromkeys(FROM_TOURNAMENT, others), **dict.fromkeys(ENTRIES, lines)}, scenes)
    compare(rows, "igos+")
    more = {}
    for name, _, folder in (each.partition("=") for each in arguments.also):
        found = Lines(Path(folder))
        more[name] = rows_of({each: found for each in found.names() if each not in NO_METHOD})
        compare(more[name], tournament.DEFAULT)
    summary = scenes_summary(arguments, lines)
    root = tournament.ROOT / "docs"
    _draw(rows, root / "pareto.png", len(scenes))
    text = _text(rows, summary) + "".join(section(name, rows) for name, rows in more.items())
    write(root / "pareto.md", text)
    print(text)


def rows_of(lines: Mapping[str, Lines], scenes: Set[int] | None = None) -> list[dict[str, Any]]:
    """A row for each entry that has scores, of few passes first; on these scenes where they are given."""
    rows = []
    for name, found in lines.items():
        of = [line for line in found.of(name) if scenes is None or line["scene"] in scenes]
        if made := [line for line in of if line.get("gain") is not None]:
            rows.append(_row(name, made))
    return sorted(rows, key=lambda row: row["passes"])


def compare(rows: list[dict[str, Any]], reference: str) -> None:
    """How far each other row is ahead of one of them, in ``against``."""
    known = next((row for row in rows if row["name"] == reference), None)
    for row in rows:
        if known is not None and row is not known:
            row["against"] = comparison(row["gains"], known["gains"])


def _row(name: str, made: list[dict[str, Any]]) -> dict[str, Any]:
    count = len(made)
    return {
        "name": name,
        "passes": sum(line["forward"] for line in made) / count,
        "backward": sum(line["backward"] for line in made) / count,
        "gains": values_of(made, "gain"),
        **{column: figure(values_of(made, column).values()) for column in ("gain", "held_out", "pointing")},
        "average_precision": figure(values_of(made, "average_precision").values()),
    }


def _text(rows: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    lines = [
        "# What passes buy",
        "",
        "Printed by `python tests/benchmarks/pareto.py`, which says at its top what is measured. The scenes are held",
        "out: no setting was chosen on them.",
        "",
        "![Insertion − deletion against passes](pareto.png)",
        "",
        *_table(rows, "igos+ (Eq. 8, 100 passes)"),
        "",
        f"{summary['scenes']} plain scenes of split {summary['split']}, {summary['model']}. Mean [95 % bootstrap "
        f"interval]; differences are paired by scene. {summary['machine']}.",
    ]
    return "\n".join(lines) + "\n"


def section(name: str, rows: list[dict[str, Any]]) -> str:
    most = max(len(row["gains"]) for row in rows)
    lines = [
        "",
        f"## {name[:1].upper()}{name[1:]}",
        "",
        *_table(rows, tournament.DEFAULT),
        "",
        f"{most} images; differences are paired, on the images that both were judged on.",
    ]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]], reference: str) -> list[str]:
    table = [
        f"| heatmap | passes: forward + backward | gain ↑ | less {reference} | held-out baselines ↑ | pointing ↑ "
        "| average precision ↑ |",
        "|---|---|---|---|---|---|---|",
    ]
    most = max(len(row["gains"]) for row in rows)
    for row in rows:
        cells = [shown(row[column]) for column in ("held_out", "pointing", "average_precision")]
        first = "" if len(row["gains"]) == most else f" (on {len(row['gains'])})"
        table.append(
            f"| {row['name']}{first} | {row['passes']:.0f} + {row['backward']:.0f} | {shown(row['gain'])} "
            f"| {shown(row.get('against'), signed=True)} | {' | '.join(cells)} |"
        )
    return table


def _draw(rows: list[dict[str, Any]], path: Path, scenes: int) -> None:
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7.6, 4.4), layout="constrained")
    axes = drawing.add_subplot()
    by_name = {row["name"]: row for row in rows}
    line = [by_name[name] for name in OURS if name in by_name]
    axes.plot([row["passes"] for row in line], [row["gain"]["mean"] for row in line], color="#c2410c", linewidth=1.5)
    path_rows = [row for row in rows if row["name"].startswith("integrated_gradients")]
    axes.plot([r["passes"] for r in path_rows], [r["gain"]["mean"] for r in path_rows], color="#475569", linewidth=1)
    # Labels that would lie over each other stand apart: (points right, points up).
    apart = {
        "integrated_gradients": (-44, -17),
        "igos++ (fast)": (-26, 9),
        "igos++ (thorough)": (-48, 9),
        "igos++, 12 passes": (-32, -19),
        "igos++": (-16, 13),
        "igos+": (9, -12),
        "input_gradient": (9, -3),
        "rise": (-26, -4),
        "greedy": (7, -9),
        "occlusion": (-12, -15),
    }
    for row in (row for row in rows if row["name"] != "igos++, 48 passes"):
        ours = row["name"].startswith("igos++") and "release" not in row["name"]
        colour = "#c2410c" if ours else "#475569"
        x, cell = max(row["passes"], 1), row["gain"]
        axes.plot([x, x], [cell["low"], cell["high"]], color=colour, linewidth=1.5, alpha=0.7)
        axes.plot(x, cell["mean"], "o", color=colour, markersize=5)
        if row in path_rows and row["name"] != "integrated_gradients":
            continue  # one label for the line
        axes.annotate(
            row["name"].replace("_", " "), (x, cell["mean"]), xytext=apart.get(row["name"], (8, -3)),
            textcoords="offset points", fontsize=8, color=colour,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(0.8, 1500)
    axes.set_xlabel("images sent through the model, forward")
    axes.set_ylabel("insertion − deletion")
    axes.set_title(f"What passes buy, on {scenes} held-out scenes (95 % intervals)", fontsize=10, loc="left")
    axes.grid(color="#e5e7eb")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    drawing.savefig(path, dpi=170)


if __name__ == "__main__":
    main()
