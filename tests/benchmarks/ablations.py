"""The paper's ablations of iGOS++ (Tables 3, 5, 6 and 7) on scenes whose visual words are known.

    python tests/benchmarks/ablations.py
    python tests/benchmarks/ablations.py --hard --model examples/hard_model --shard 0/2

Whatever tokens a heatmap was made for, it is judged on the words that only the image can tell
(``Scene.visual_spans``): a selection that takes the wrong words is scored on the right ones. Heatmaps are those of the
paper's objective alone (Eq. 8): what iGOS++ here does to the order of cells after it would hide what is compared.

* Table 3, which tokens: by LLR (Eq. 6), all of them (joint probability), or keywords by YAKE as in the published recipe
  (n = 2; 3 keywords, a quarter of the words for answers over 10), each mapped onto the tokens of all its occurrences.
* Table 5, λ2 of the graduated non-convexity, 0 to 10, for both readings of the term (sum of squares, norm).
* Table 6, the threshold α of the LLR.
* Table 7, the baseline image: judged against the one that the heatmap was made with, and against the blur.

One JSON line per scene and setting: it can be stopped and goes on where it was. ``summary.json`` and ``table.md`` are
written at the end, and by ``--table`` at any time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from held_out import Case
from judging import (
    PROTOCOL,
    Line,
    Lines,
    comparison,
    digest,
    figure,
    holm,
    judged,
    scene_arguments,
    scenes_sentence,
    scenes_summary,
    scenes_to_do,
    settle,
    shown,
    values_of,
    weights_digest,
    write,
)
from tqdm import tqdm

import lvlm_probe as probe
from lvlm_probe.selection import TokenSelection

BLUR = "blur"
EQUATION_8 = {"preset": "paper", "masks": 1}
COLUMNS = ("deletion", "insertion", "gain", "pointing", "average_precision")


@dataclass(frozen=True)
class Setting:
    """One line of a table: ``tokens`` is ``"llr"`` with ``alpha``, ``"joint"``, ``"keywords"`` or ``"true"``."""

    table: int
    label: str
    tokens: str = "llr"
    alpha: float = 1.0
    params: Mapping[str, Any] = field(default_factory=dict)
    baseline: str = BLUR

    @property
    def name(self) -> str:
        return f"Table {self.table}: {self.label}"


SETTINGS = (
    Setting(3, "LLR > 1 (proposed)"),
    Setting(3, "joint probability", tokens="joint"),
    Setting(3, "keywords (YAKE)", tokens="keywords"),
    Setting(3, "the true visual words", tokens="true"),
    *(
        Setting(5, f"λ2 = {weight:g}, {reading}", params={"l2": weight, "l2_form": form})
        for form, reading in (("sum_sq", "Σ (1 − M)²"), ("norm", "‖1 − M‖₂"))
        for weight in (0.1, 0.0, 1.0, 10.0)
    ),
    *(Setting(6, f"α = {alpha:g}", alpha=alpha) for alpha in (1.0, 0.5, 2.0)),
    *(Setting(7, baseline, baseline=baseline) for baseline in (BLUR, "blank", "noise")),
)
"""The first setting of a table, in Table 5 the first of a reading, is the paper's choice: others are compared to it."""

TITLES = {
    3: "Table 3: token selection",
    5: "Table 5: weight of the graduated non-convexity term",
    6: "Table 6: threshold of the log-likelihood ratio, nats",
    7: "Table 7: baseline image",
}


def true_words(case: Case) -> TokenSelection:
    """The tokens of the words that only the image can tell, pieces of words included."""
    pieces = ["" if special else piece for piece, special in zip(case.replay.tokens, case.replay.special, strict=True)]
    ends = np.cumsum([len(piece) for piece in pieces])
    text = "".join(pieces)
    lead = len(text) - len(text.lstrip())
    indices = tuple(
        index
        for index, (piece, end) in enumerate(zip(pieces, ends.tolist(), strict=True))
        if any(
            start + lead < end and end - len(piece.lstrip()) < stop + lead for start, stop in case.scene.visual_spans
        )
    )
    return dataclasses.replace(case.selection, indices=indices, rule="words", params={"words": case.scene.visual_words})


def keywords(answer: str) -> list[str]:
    """Keywords of an answer by YAKE (Campos et al., 2020), as many as the published recipe takes."""
    import yake

    words = len(answer.split())
    top = 3 if words <= 10 else words // 4
    return [text for text, _ in yake.KeywordExtractor(lan="en", n=2, top=top).extract_keywords(answer)]


def selected(case: Case, setting: Setting) -> TokenSelection:
    """What a setting explains."""
    if setting.tokens == "true":
        return true_words(case)
    if setting.tokens == "joint":
        return probe.select_tokens(case.replay, rule="joint")
    if setting.tokens == "keywords":
        found = keywords(case.scene.answer)
        if not found:
            raise probe.errors.SelectionError("YAKE finds no keyword in this answer")
        return probe.select_tokens(case.replay, words=found)
    return probe.select_tokens(case.replay, alpha=setting.alpha)


def measure(case: Case, setting: Setting, made: dict[str, probe.Heatmap]) -> Line:
    """One setting on one scene; ``made`` keeps the scene's heatmaps, as several settings are the same for it."""
    truth = true_words(case)
    try:
        selection = selected(case, setting)
    except probe.errors.SelectionError as error:
        return {"reason": str(error)}
    right = set(selection.indices) & set(truth.indices)
    line: Line = {
        "tokens": len(selection),
        "precision": len(right) / len(selection) if selection else None,
        "recall": len(right) / len(truth),
    }
    if not selection:
        return {**line, "reason": selection.reason}
    # The case's own baseline is a blur of the strength that it takes.
    other = setting.baseline != BLUR
    over = case.replay.over(setting.baseline) if other else case.replay
    same = digest(selection.indices, dict(setting.params), setting.baseline)
    if same not in made:
        made[same] = probe.explain(
            over,
            method="igos++",
            tokens=selection,
            seed=case.scene.index,
            strengthen=False,
            **EQUATION_8,
            **setting.params,
        )
    heat = made[same]
    if heat.values is None:
        return {**line, "reason": heat.reason}
    heat = dataclasses.replace(heat, selection=truth)
    line |= judged(dataclasses.replace(case, replay=over), heat, held_out=(), causal=False)
    if setting.table == 7:
        by_blur = judged(case, heat, held_out=(), causal=False) if other else line
        line |= {f"{column}_{BLUR}": by_blur[column] for column in ("deletion", "insertion", "gain")}
    return line


def summarise(arguments: argparse.Namespace, lines: Lines) -> dict[str, Any]:
    """Means with intervals, and every setting against the paper's choice in its table."""
    rows: dict[str, Any] = {}
    for setting in SETTINGS:
        mine = lines.of(setting.name)
        if not mine:
            continue
        columns = (*COLUMNS, "tokens", "precision", "recall", *(f"{column}_{BLUR}" for column in COLUMNS[:3]))
        rows[setting.name] = {
            "table": setting.table,
            "label": setting.label,
            "scenes": len(mine),
            "maps": sum(line.get("gain") is not None for line in mine),
            "reasons": sorted({line["reason"] for line in mine if line.get("reason")})[:3],
            **{column: figure(values_of(mine, column).values()) for column in columns},
        }
        chosen = _reference(setting)
        if chosen.name != setting.name:
            column = f"gain_{BLUR}" if setting.table == 7 else "gain"
            rows[setting.name]["against"] = comparison(
                values_of(mine, column), values_of(lines.of(chosen.name), column)
            )
    for table in TITLES:
        tests = {name: row["against"] for name, row in rows.items() if row["table"] == table and row.get("against")}
        for name, p in holm({name: test["p"] for name, test in tests.items()}).items():
            tests[name]["p_holm"] = p
    return {**scenes_summary(arguments, lines), "settings": rows}


def _reference(setting: Setting) -> Setting:
    """The paper's choice in a setting's table: the first of the same kind."""
    form = setting.params.get("l2_form")
    return next(other for other in SETTINGS if other.table == setting.table and other.params.get("l2_form") == form)


def table(summary: dict[str, Any]) -> str:
    """The summary as Markdown, one table per table of the paper."""
    text = []
    for number, title in TITLES.items():
        rows = [row for row in summary["settings"].values() if row["table"] == number]
        if not rows:
            continue
        by_token = number in (3, 6)
        extra = "| tokens | precision | recall " if by_token else ""
        judges = "| judged by blur: deletion ↓ | insertion ↑ " if number == 7 else ""
        text += [
            f"**{title}**",
            "",
            f"| setting | deletion ↓ | insertion ↑ {judges}| pointing ↑ | average precision ↑ {extra}"
            f"| gain − that of the first{' (by blur)' if number == 7 else ''} | p |",
            "|---" * (7 + (3 if by_token else 0) + (2 if number == 7 else 0)) + "|",
        ]
        for row in rows:
            cells = [shown(row[column]) for column in ("deletion", "insertion")]
            cells += [shown(row[f"{column}_{BLUR}"]) for column in ("deletion", "insertion")] if number == 7 else []
            cells += [shown(row[column]) for column in ("pointing", "average_precision")]
            if by_token:
                cells += [
                    f"{row[column]['mean']:.2f}" if row[column] else "–" for column in ("tokens", "precision", "recall")
                ]
            test = row.get("against")
            cells += [shown(test, signed=True), f"{test['p_holm']:.3f}"] if test else ["–", "–"]
            missing = f" ({row['maps']} of {row['scenes']} scenes)" if row["maps"] < row["scenes"] else ""
            text.append(f"| {row['label']}{missing} | {' | '.join(cells)} |")
        text.append("")
    text.append(
        f"{scenes_sentence(summary)} Every heatmap is iGOS++'s (Eq. 8 alone, without the refinement of the order) "
        f"and is judged on the words that only the image can tell, {summary['protocol']['steps']} points, whatever "
        "it was made for. In Table 5 each reading is compared with its own λ2 = 0.1. Table 7: judged by the baseline "
        "it was made with, then by the blur. Precision and recall: of the "
        f"selected tokens, against the true ones. p: two-sided sign-flip permutation test of paired differences, Holm "
        f"within a table. {summary['machine']}."
    )
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scene_arguments(parser, "runs/ablations")
    parser.add_argument("--tables", default="3,5,6,7", help="which tables of the paper, with commas")
    arguments = parser.parse_args()
    settle(arguments)
    wanted = {int(number) for number in arguments.tables.split(",")}
    if unknown := wanted - set(TITLES):
        raise SystemExit(f"no Table {min(unknown)} here; there are {', '.join(map(str, TITLES))}")
    chosen = {setting.name: setting for setting in SETTINGS if setting.table in wanted}
    if unnamed := [name for name in arguments.again if name not in chosen]:
        raise SystemExit(f"no setting {unnamed[0]!r}; there are {'; '.join(chosen)}")
    lines = Lines(arguments.out, arguments.shard)
    if not arguments.table:
        weights = weights_digest(arguments.model)
        keys = {
            name: digest(dataclasses.asdict(setting), EQUATION_8, PROTOCOL, weights, arguments.split, arguments.hard)
            for name, setting in chosen.items()
        }
        lines.forget(arguments.again)
        total = len(range(arguments.shard[0], arguments.scenes, arguments.shard[1]))
        with tqdm(unit="scene", total=total, smoothing=0, mininterval=5) as bar:
            for facts, case in scenes_to_do(arguments, lines, keys):
                bar.update(facts["number"] // arguments.shard[1] - bar.n)
                made: dict[str, probe.Heatmap] = {}
                for name, setting in chosen.items():
                    if not lines.has(facts["scene"], name, keys[name]):
                        lines.add({**facts, "name": name, "key": keys[name], **measure(case, setting, made)})
            bar.update(total - bar.n)
        lines = Lines(arguments.out, arguments.shard)
    if not lines.latest:
        raise SystemExit(f"no lines in {arguments.out}; run without --table first")
    summary = summarise(arguments, lines)
    write(arguments.out / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    write(arguments.out / "table.md", table(summary))
    print(table(summary))


if __name__ == "__main__":
    main()
