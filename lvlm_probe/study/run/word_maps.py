"""One map per selected word, kept in the file of the answer's map.

The file stays a heatmap that ``Heatmap.read`` reads; beside ``values`` stand ``word_0``, ``word_1``, … Word maps are
made to be looked at (``study page``): they change neither the answer's map nor its scores, and are not judged
themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_probe.errors import ProbeError
from lvlm_probe.explainers import explain
from lvlm_probe.heatmap import KIND, VERSION, Heatmap
from lvlm_probe.selection import word_selections
from lvlm_probe.storage import read_arrays, write_arrays
from lvlm_probe.video import ClipHeatmap
from lvlm_probe.video import explain as explain_clip

if TYPE_CHECKING:
    from lvlm_probe.replaying import Replay
    from lvlm_probe.study.spec import MethodSpec, Study


def add_words(
    study: Study, player: Replay, method: MethodSpec, heat: Heatmap | ClipHeatmap, map_file: Path
) -> list[dict[str, Any]]:
    """Explain the selected words of a map one by one and add their maps to its file, all or none.

    Each word starts from the method's own baseline, as the answer's map did. Where one word is all that is selected,
    its map is the answer's.

    Args:
        heat: the answer's map, with values, as it stands in ``map_file``.

    Returns:
        per word its ``text``, ``tokens`` (those selected), and either ``map``, the name of its values in the file, or
        the ``reason`` why there are none.
    """
    found: list[dict[str, Any]] = []
    made: dict[str, np.ndarray] = {}
    for number, (text, part) in enumerate(word_selections(player, heat.selection)):
        entry: dict[str, Any] = {"text": text, "tokens": list(part.indices)}
        found.append(entry)
        if part.indices == heat.selection.indices:
            entry["map"] = "values"
            continue
        try:
            over = player.over(method.baseline or study.settings.baseline)
            word = (explain_clip if player.clips else explain)(
                over, tokens=part, seed=study.settings.seed, progress=False, **method.asked
            )
        except (ProbeError, RuntimeError, ValueError) as error:
            entry["reason"] = str(error).strip().partition("\n")[0] or type(error).__name__
            continue
        if word.values is None:
            entry["reason"] = str(word.reason)
        else:
            entry["map"] = f"word_{number}"
            made[entry["map"]] = word.values
    if made:
        arrays, attrs = read_arrays(map_file, KIND, version=VERSION)
        write_arrays(map_file, KIND, VERSION, {**arrays, **made}, {**attrs, "words": found})
    return found


def read_words(record: Mapping[str, Any], map_file: Path) -> list[dict[str, Any]]:
    """The word maps of a finished map: entries as ``add_words`` returned them, with ``values``, ``(row, col)`` (of a
    video ``(t, row, col)``) float32 in [0, 1], where there are any. Empty for a study without ``words: true``.

    Raises:
        TraceError: the file is missing or damaged.
    """
    entries = [dict(entry) for entry in record.get("words") or ()]
    if any("map" in entry for entry in entries):
        arrays, _ = read_arrays(map_file, KIND, version=VERSION)
        for entry in entries:
            if entry.get("map") in arrays:
                entry["values"] = arrays[entry["map"]]
    return entries
