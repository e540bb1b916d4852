"""``lvlm-probe study contradictions``: how well the meter tells wrong answers on a data set."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Annotated

import typer

from lvlm_probe.cli.shared.inputs import baseline_from, parameters
from lvlm_probe.cli.shared.models import load_model
from lvlm_probe.cli.shared.options import BaselineOption, Json, Loading, Model
from lvlm_probe.cli.shared.rows import tell_refused
from lvlm_probe.cli.shared.terminal import bar, print_json, say
from lvlm_probe.errors import ProbeError


def contradictions(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the data set; `study datasets` lists them.")],
    source: Annotated[str, typer.Argument(metavar="PATH_OR_ID", help="Its directory or file, or a hub id.")],
    model: Model,
    split: Annotated[str | None, typer.Option("--split", help="Where there are several.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Samples to look at, at most.")] = 200,
    threshold: Annotated[float, typer.Option("--threshold", min=0.0, help="As of `meter`, nats.")] = 3.0,
    baseline: BaselineOption = None,
    param: Annotated[
        list[str] | None, typer.Option("--param", metavar="NAME=VALUE", help="Option of the reader; repeatable.")
    ] = None,
    loading: Loading = Loading(),
    as_json: Json = False,
) -> None:
    """Measure how well the meter tells answers that contradict their image, on data that has both kinds.

    Each sample's right answer and one that contradicts the image (HalLoc's, or another of the choices, as in POPE and
    HallusionBench) are put into the model's mouth: two passes each, nothing is generated. Printed are areas under the
    ROC curve, 0.5 being chance, and what `meter` would flag at the threshold.

    Example:  lvlm-probe study contradictions pope data/pope --model llava-hf/llava-1.5-7b-hf
    """
    own_baseline, options = baseline_from(baseline, video=False), parameters(param or [])
    loaded, processor = load_model(model, **vars(loading))
    from lvlm_probe.study import open_dataset
    from lvlm_probe.study.contradictions import detect, pairs

    samples = itertools.islice(open_dataset(name, source, split=split, **options), limit)
    with bar(f"measuring {name}") as advance:
        found = detect(
            pairs(samples),
            loaded,
            processor,
            baseline=own_baseline or "blur",
            threshold=threshold,
            tell=lambda done: advance(done, limit),
        )
    tell_refused([f"{one.source}: {one.reason}" for one in found.unread], "could not be measured")
    if not found.pairs:
        raise ProbeError(
            f"{source}, read as {name}, has no sample with a right answer and one that contradicts its image, or none "
            "could be measured"
        )
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    say((f"{found.pairs} pairs of answers, ", "bold"), "area under the ROC curve:")
    for what, value in (
        ("answers, by their most surprising word", found.answers),
        ("words, by their surprise", found.words),
        ("answers, by the drop of their joint probability", found.joint_drop),
    ):
        say((f"  {value:.3f}  ", "bold"), what)
    say(
        f"above {threshold:g} nats: {100 * found.flagged:.1f} % of the answers that contradict, "
        f"{100 * found.false_alarms:.1f} % of the right ones"
    )
