"""``lvlm-probe explain``: from a trace, or from a picture and a question, to heatmaps with their scores."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvlm_probe.cli.record import ask, required_question
from lvlm_probe.cli.shared.inputs import ReplayModels, find_trace, open_images, output_directory, parameters
from lvlm_probe.cli.shared.maps import FOLDER, MapFile, Settings, baseline_from, explain_one
from lvlm_probe.cli.shared.models import load_model
from lvlm_probe.cli.shared.options import (
    Attn,
    BaselineOption,
    Device,
    Dtype,
    Images,
    Json,
    MaxNewTokens,
    OptionalModel,
    Question,
    Row,
    TrustRemoteCode,
)
from lvlm_probe.cli.shared.terminal import answer_text, one_line, print_json, quoted_path, say, stage, stop, stored_path
from lvlm_probe.errors import ProbeError

if TYPE_CHECKING:
    from lvlm_probe.heatmap import Heatmap
    from lvlm_probe.replaying import Replay
    from lvlm_probe.selection import TokenSelection
    from lvlm_probe.trace import Trace

__all__ = [
    "Explained",
    "explain",
    "explain_replay",
    "label_of",
    "map_summary",
    "open_replay",
    "show_explained",
    "show_map",
    "words_of",
]


def explain(
    context: typer.Context,
    trace: Annotated[
        Path | None, typer.Argument(metavar="[TRACE]", help="A trace file, or a directory: its last trace.")
    ] = None,
    model: OptionalModel = None,
    image: Images = None,
    question: Question = None,
    method: Annotated[str, typer.Option("--method", help="Which explainer; plugins add more.")] = "igos++",
    words: Annotated[
        list[str] | None,
        typer.Option(
            "--words", metavar="TEXT", help="Explain this word or phrase of the answer; repeat it for several."
        ),
    ] = None,
    word_maps: Annotated[
        bool, typer.Option("--word-maps", help="Also make a map of its own for every selected word.")
    ] = False,
    alpha: Annotated[
        float, typer.Option("--alpha", help="Select tokens whose log-likelihood ratio exceeds this, nats.")
    ] = 1.0,
    joint: Annotated[
        bool, typer.Option("--joint", help="Explain every token of the answer instead of selected ones.")
    ] = False,
    param: Annotated[
        list[str] | None, typer.Option("--param", metavar="NAME=VALUE", help="A parameter of the method; repeatable.")
    ] = None,
    image_number: Annotated[
        int, typer.Option("--image-number", min=0, help="Which picture of the prompt to explain by.")
    ] = 0,
    scores: Annotated[bool, typer.Option(help="Score each map by deletion and insertion.")] = True,
    exact: Annotated[
        bool, typer.Option("--exact", help="Score with the real processor on real composites; slower.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of everything random.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Maps go to DIR/explanations (default: beside the trace; new ones: runs)."
        ),
    ] = None,
    row: Row = None,
    baseline: BaselineOption = None,
    max_new_tokens: MaxNewTokens = 128,
    device: Device = None,
    dtype: Dtype = None,
    attn: Attn = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Show which regions of the picture made the model say its words: a recorded run, or a new one.

    Finished maps are kept: the same command again makes only those that are missing.

    Example:  lvlm-probe explain runs/demo --words red
    Example:  lvlm-probe explain --model demo --image scene.png --question "What color is the circle?" --word-maps
    """
    params = parameters(param or [])
    own_baseline = baseline_from(baseline)
    loading: dict[str, Any] = {"device": device, "dtype": dtype, "attn": attn, "trust_remote_code": trust_remote_code}
    settings = Settings(method, params, image_number, seed, scores, "exact" if exact else "fast")
    if trace is None:
        if model is None:
            raise ProbeError("give a trace file, or a new run: --model DIR_OR_ID --image FILE --question TEXT")
        pictures, asked = open_images(image or []), required_question(question)
        directory = output_directory(out or Path("runs"))
        loaded, processor = load_model(model, **loading)
        recorded = ask(
            loaded,
            processor,
            pictures,
            asked,
            directory,
            max_new_tokens=max_new_tokens,
            baseline=own_baseline or "blur",
        )
    else:
        if image or question:
            raise ProbeError("a trace has its own picture and question: give either TRACE, or --image and --question")
        recorded = find_trace(trace, row)
        directory = output_directory(out) if out is not None else recorded.path.parent
        loaded, processor = ReplayModels(model, **loading).of(recorded)
    replay = open_replay(recorded, loaded, processor)
    if own_baseline is not None:
        replay = replay.over(own_baseline)
    selection = _select(replay, words=words, alpha=alpha, joint=joint)
    folder = directory / FOLDER
    explained = Explained(recorded, [])
    try:
        for _ in explain_replay(replay, selection, settings, folder, word_maps=word_maps, into=explained):
            pass
    except KeyboardInterrupt:
        kept = f"{len(explained.maps)} finished map{'' if len(explained.maps) == 1 else 's'}"
        again = _same_command(context, recorded.path)
        raise stop(f"stopped; {kept} kept in {stored_path(folder)}. Go on with:  {again}") from None
    if as_json:
        print_json(
            {
                "trace": str(recorded.path),
                "answer": recorded.answer,
                "maps": [map_summary(item) for item in explained.maps],
            }
        )
        return
    show_explained(explained, replay)
    say("next:  ", f"lvlm-probe report {quoted_path(folder)} --out report.html")


@dataclass
class Explained:
    """A trace and the maps made of it so far."""

    trace: Trace
    maps: list[MapFile]


def open_replay(trace: Trace, model: Any, processor: Any) -> Replay:
    """The replay of a trace, with a line that says so when it takes long."""
    from lvlm_probe import replay

    with stage("replaying the trace"):
        return replay(trace, model, processor)


def explain_replay(
    replay: Replay, selection: TokenSelection, settings: Settings, folder: Path, *, word_maps: bool, into: Explained
) -> Any:
    """Makes the map of the selection and, if wanted, one per word; yields each as it is finished."""
    jobs = [(label_of(selection), selection)]
    if word_maps and selection:
        from lvlm_probe.selection import word_selections

        jobs += [job for job in word_selections(replay, selection) if job[1].indices != selection.indices]
    for label, chosen in jobs:
        found, _ = explain_one(replay, chosen, label, settings, folder)
        into.maps.append(found)
        yield found


def map_summary(found: MapFile) -> dict[str, Any]:
    """A map for programs."""
    heat, score = found.read(), found.score()
    return {
        "map": str(found.path),
        "picture": str(found.picture) if found.picture.is_file() else None,
        "method": heat.method,
        "words": words_of(heat),
        "tokens": list(heat.selection.indices),
        "reason": heat.reason,
        "passes": heat.provenance.get("passes"),
        "seconds": heat.provenance.get("seconds"),
        "baseline": heat.provenance.get("baseline"),
        "deletion": None if score is None else score.deletion,
        "insertion": None if score is None else score.insertion,
        "undefined": None if score is None else score.reason,
        "trusted": None if score is None else score.verdict.trusted,
        "reasons": None if score is None else list(score.verdict.reasons),
    }


def words_of(heat: Heatmap) -> str:
    """The words that a map explains; whole words where its trace is at hand, else the bare tokens."""
    if heat.trace is None:
        return heat.selection.text
    chosen = set(heat.selection.indices)
    return " … ".join(word.text for word in heat.trace.words if chosen.intersection(range(word.start, word.stop)))


def show_explained(explained: Explained, replay: Replay) -> None:
    """Question, answer, and one line per map with its scores and verdict."""
    trace = explained.trace
    first = explained.maps[0].read()
    if trace.question:
        say(("Q  ", "dim"), trace.question)
    say(("A  ", "dim"), answer_text(trace.words, trace.tokens, replay.llr.tolist(), first.selection.indices))
    say(("   bold: the picture makes the word likelier by more than a factor of e; underlined: explained", "dim"))
    for found in explained.maps:
        show_map(found)


def show_map(found: MapFile) -> None:
    """A map in two lines: what it explains and how well, and where it is."""
    heat, score = found.read(), found.score()
    title = one_line(words_of(heat), 300) or "nothing selected"
    if heat.values is None:
        say(("  – ", "yellow"), (title, "bold"), f": no map, {heat.reason}")
        return
    if score is None:
        say(("  · ", "dim"), (title, "bold"), "  not scored")
    else:
        mark, style = ("✓", "green") if score.verdict.trusted else ("✗", "red")
        said = f"  deletion {score.deletion:.3f} (low is good)  insertion {score.insertion:.3f} (high is good)"
        say((f"  {mark} ", style), (title, "bold"), "  no score" if score.reason else said)
        if not score.verdict.trusted:
            say(("    ", ""), (str(score.verdict), "red"))
    say(("    ", ""), (stored_path(found.picture if found.picture.is_file() else found.path), "dim"))


def _select(replay: Replay, *, words: list[str] | None, alpha: float, joint: bool) -> TokenSelection:
    from lvlm_probe.selection import select_tokens

    if words:
        return select_tokens(replay, words=words)
    return select_tokens(replay, alpha=alpha, rule="joint" if joint else "llr")


def label_of(selection: TokenSelection) -> str:
    """What a map's file name calls its words."""
    return selection.text if selection.rule in ("words", "span", "indices") else "answer"


def _same_command(context: typer.Context, trace: Path) -> str:
    """This command line once more, on the trace it has recorded."""
    parts = ["lvlm-probe", "explain", stored_path(trace)]
    for option in context.command.params:
        value = context.params.get(option.name or "")
        if option.name in ("trace", "image", "question", "max_new_tokens") or value == option.default or value is None:
            continue
        if isinstance(value, bool):
            names = option.opts if value else option.secondary_opts
            parts += names[:1]
        else:
            for item in value if isinstance(value, list | tuple) else [value]:
                parts += [option.opts[0], str(item)]
    return shlex.join(parts)
