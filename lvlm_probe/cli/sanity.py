"""``lvlm-probe sanity``: do stored maps depend on the model and on the words, and do they come out the same again?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvlm_probe.cli.shared.inputs import ReplayModels, baseline_from
from lvlm_probe.cli.shared.options import BaselineOption, Json, Loading, Maps, OptionalModel
from lvlm_probe.cli.shared.terminal import bar, print_json, say, stop
from lvlm_probe.errors import ProbeError

if TYPE_CHECKING:
    from lvlm_probe.heatmap_store import MapFile
    from lvlm_probe.replaying import Replay
    from lvlm_probe.sanity import SanityCheck

_CHECKS = ("weights", "answers", "seeds")
_MARKS = {"passes": ("✓", "green"), "fails": ("✗", "red"), "cannot say": ("–", "yellow")}


def sanity(
    paths: Maps,
    model: OptionalModel = None,
    checks: Annotated[
        str, typer.Option("--checks", metavar="NAMES", help="Which: weights, answers, seeds; commas between.")
    ] = ",".join(_CHECKS),
    question: Annotated[
        list[str] | None,
        typer.Option("--question", metavar="TEXT", help="Also check another wording of the question; repeatable."),
    ] = None,
    stages: Annotated[
        int, typer.Option("--stages", min=1, help="weights: steps from the output layer to all weights random.")
    ] = 4,
    draws: Annotated[
        int, typer.Option("--draws", min=1, help="How many times all weights, and other words, are drawn.")
    ] = 3,
    seeds: Annotated[int, typer.Option("--seeds", min=2, help="seeds: how many maps are compared.")] = 5,
    seed: Annotated[int, typer.Option("--seed", help="Of random weights and of other words.")] = 0,
    baseline: BaselineOption = None,
    loading: Loading = Loading(),
    as_json: Json = False,
) -> None:
    """Check whether stored maps depend on the model and on the words, and come out the same with other random numbers.

    Each map is explained again, with random weights, for other words, with other seeds. The verdicts (passes, fails,
    cannot say) are kept with the map, and a report shows them. Random weights take memory for the weights once more.

    Example:  lvlm-probe sanity runs/demo
    Example:  lvlm-probe sanity runs/demo --checks weights --stages 1 --json
    """
    from lvlm_probe.cli.shared.maps import map_summary, show_map
    from lvlm_probe.heatmap_store import by_trace, find_maps

    names = [name.strip() for name in checks.split(",") if name.strip()]
    if unknown := sorted(set(names) - set(_CHECKS)):
        raise ProbeError(f"--checks {unknown[0]!r}: choose from {', '.join(_CHECKS)}; wordings go by --question")
    options: dict[str, dict[str, Any]] = {
        "weights": {"stages": stages, "draws": draws, "seed": seed},
        "answers": {"draws": draws, "seed": seed},
        "seeds": {"seeds": seeds},
        "prompts": {"others": question},
    }
    wanted = {name: options[name] for name in [*names, *(["prompts"] if question else [])]}
    found = [item for item in find_maps(paths) if item.read().values is not None]
    if not found:
        raise ProbeError("none of these maps has values, so there is nothing to check; lvlm-probe report says why")
    of_traces = by_trace(found)
    own_baseline = baseline_from(baseline, video=all(trace.clips for trace, _ in of_traces))
    done: list[tuple[MapFile, dict[str, SanityCheck]]] = []
    models = ReplayModels(model, loading)
    try:
        for trace, items in of_traces:
            replay = models.replay(trace, own_baseline)
            for item in items:
                done.append((item, _checked(replay, item, wanted)))
                if not as_json:
                    show_map(item)
                    _show(done[-1][1])
    except KeyboardInterrupt:
        raise stop(f"stopped; the checks of {len(done)} of {len(found)} maps are stored with them") from None
    if as_json:
        print_json([
            {**map_summary(item), "sanity": {name: check.to_dict() for name, check in results.items()}}
            for item, results in done
        ])  # fmt: skip


def _checked(replay: Replay, item: MapFile, wanted: dict[str, dict[str, Any]]) -> dict[str, SanityCheck]:
    from lvlm_probe import sanity as run

    heat = kept = item.read()
    results = {}
    for name, options in wanted.items():
        with bar(f"checking {name}") as progress:
            results[name] = getattr(run, name)(replay, heat, progress=progress, **options)
        kept = results[name].attached(kept)
    item.rewrite(kept)
    return results


def _show(results: dict[str, SanityCheck]) -> None:
    for name, check in results.items():
        mark, style = _MARKS[check.verdict]
        say((f"    {mark} ", style), (f"{name}: {check.verdict}", "bold"), f": {check.reason}")
