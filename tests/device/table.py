"""Figures of the device lane for docs/reality.md: waits, memory and agreement of every method on a pretended card.

python tests/device/table.py            # prints them
python tests/device/table.py --write    # and writes them into docs/reality.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from judging import fill
from test_device import METHODS, load, on_card, record, waits_of_tokens

import lvlm_probe as probe
from lvlm_probe._version import versions_of
from lvlm_probe.planning import show_bytes

PAGE = Path(__file__).parents[2] / "docs" / "reality.md"
MODEL = "llava"


def methods_on(model: Any, processor: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """Of every method, warm, on the device the model lies on: its map, and on a card its waits and its memory."""
    found = {}
    with on_card(model, float64=False) as card:
        trace = record(MODEL, model, processor, folder, tokens=5)
        replay = probe.replay(trace, model, processor)
        selection = probe.select_tokens(replay, span=(0, 3))
        for method, params in METHODS.items():
            asked: dict[str, Any] = {"method": method, "tokens": selection, "strengthen": False, **params}
            planned = probe.plan(replay, method=method, seconds=False, **params)
            probe.explain(replay, plan=planned, **asked)
            before = card.peak[0] = card.held()
            with card.counting() as waits:
                heat = probe.explain(replay, plan=planned, **asked)
            passes = heat.provenance["passes"]
            found[method] = {
                "values": heat.values, "waits": sum(waits.values()), "planned": planned.peak,
                "taken": card.peak[0] - before, "passes": f"{passes['forward']} + {passes['backward']}",
            }  # fmt: skip
        with card.counting() as waits:
            probe.replay(trace, model, processor)
        found["replay"] = {"waits": sum(waits.values())}
        heat = probe.explain(replay, method="igos++", tokens=selection, strengthen=False, **METHODS["igos++"])
        for name in ("evaluate", "again"):  # each batch of points is waited for, and a map decides how many it takes
            with card.counting() as waits:
                probe.evaluate(heat, replay)
            found[name] = {"waits": sum(waits.values())}
    replay = probe.replay(trace, model, processor)
    for method, params in METHODS.items():
        heat = probe.explain(replay, method=method, tokens=selection, strengthen=False, **params)
        found[method]["here"] = heat.values
    return found


def table() -> str:
    """The figures as markdown."""
    torch.set_num_threads(1)
    model, processor = load(MODEL)
    with tempfile.TemporaryDirectory() as scratch:
        found = methods_on(model, processor, Path(scratch))
        plain, recorded = (waits_of_tokens(MODEL, model, processor, Path(scratch), recorded=on) for on in (False, True))
    lines = [
        "| verb | waits of the host for the device |", "|---|---|",
        f"| `generate()`, eight tokens more, alone | {plain} |", f"| the same, recorded | {recorded} |",
        f"| `replay()`, the model's fingerprint included | {found.pop('replay')['waits']} |",
        "| `evaluate()` of the map of `igos++`: 6 for each batch of points, and 9 | "
        f"{found.pop('evaluate')['waits']} |",
        f"| the same again, where most points are known | {found.pop('again')['waits']} |", "",
        "| method | passes, forward + backward | waits, all of it | memory planned | taken | farthest from the CPU |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for method, row in sorted(found.items()):
        off = float(np.abs(row["values"] - row["here"]).max())
        told = f"{off:.0e}" if off else "0"
        planned, taken = (show_bytes(row[name]) if row[name] else "–" for name in ("planned", "taken"))
        lines.append(f"| `{method}` | {row['passes']} | {row['waits']} | {planned} | {taken} | {told} |")
    versions = ", ".join(f"{name} {version}" for name, version in versions_of("torch", "transformers").items())
    lines += ["", f"A tiny LLaVA ({show_bytes(probe.planning.weight_bytes(model))} of weights), warm; {versions}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write them into {PAGE.name}")
    asked = parser.parse_args()
    made = table()
    print(made)
    if asked.write:
        fill(PAGE, "device lane", made)


if __name__ == "__main__":
    main()
