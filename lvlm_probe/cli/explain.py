"""``lvlm-probe explain``: from a trace, or from an image or a video and a question, to heatmaps with their scores."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvlm_probe.cli.shared.answers import ask, ask_server, nothing_before
from lvlm_probe.cli.shared.inputs import (
    Making,
    ReplayModels,
    alternatives,
    baseline_from,
    find_trace,
    open_replay,
    open_shown,
    output_directory,
)
from lvlm_probe.cli.shared.models import load_model
from lvlm_probe.cli.shared.options import (
    AgainstOption,
    Asked,
    BaselineOption,
    Json,
    Loading,
    MaxNewTokens,
    OptionalModel,
    Row,
    given,
)
from lvlm_probe.cli.shared.servers import Served
from lvlm_probe.cli.shared.terminal import note, open_page, print_json, quoted_path, say, stop, stored_path
from lvlm_probe.errors import ProbeError
from lvlm_probe.escaping import counted

if TYPE_CHECKING:
    from lvlm_probe.cli.shared.maps import Explained
    from lvlm_probe.explainers import Recipe
    from lvlm_probe.replaying import Replay
    from lvlm_probe.selection import TokenSelection
    from lvlm_probe.serving import Server

_OF_THE_RECORDING = ("trace", "image", "video", "num_frames", "fps", "question", "prompt", "max_new_tokens")


@dataclass(frozen=True)
class Selecting:
    """What of the answer is explained."""

    words: Annotated[
        list[str] | None,
        typer.Option(
            "--words", metavar="TEXT", help="Explain this word or phrase of the answer; repeat it for several."
        ),
    ] = None
    against: AgainstOption = None
    word_maps: Annotated[
        bool, typer.Option("--word-maps", help="Also make a map of its own for every selected word.")
    ] = False
    alpha: Annotated[
        float, typer.Option("--alpha", help="Select tokens whose log-likelihood ratio exceeds this, nats.")
    ] = 1.0
    joint: Annotated[
        bool, typer.Option("--joint", help="Explain every token of the answer instead of selected ones.")
    ] = False

    def of(self, replay: Replay) -> TokenSelection:
        """The tokens of an answer. Raises ``SelectionError``."""
        from lvlm_probe.selection import select_tokens

        other = alternatives(self.against)
        if self.words:
            return select_tokens(replay, words=self.words, against=other)
        return select_tokens(replay, alpha=self.alpha, rule="joint" if self.joint else "llr", against=other)


def explain(
    context: typer.Context,
    trace: Annotated[
        Path | None, typer.Argument(metavar="[TRACE]", help="A trace file, or a directory: its last trace.")
    ] = None,
    model: OptionalModel = None,
    asked: Asked = Asked(),
    selecting: Selecting = Selecting(),
    making: Making = Making(),
    image_number: Annotated[
        int | None,
        typer.Option(
            "--image-number",
            min=0,
            help="Which image of the prompt to explain by; a frame stands for its video. Default: 0, or a video.",
        ),
    ] = None,
    scores: Annotated[bool, typer.Option(help="Score each map by deletion and insertion.")] = True,
    exact: Annotated[
        bool, typer.Option("--exact", help="Score with the real processor on real composites; slower.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Maps go to DIR/explanations (default: beside the trace; new ones: runs)."
        ),
    ] = None,
    open_it: Annotated[
        bool, typer.Option("--open", help="Write the page of these maps beside them, and open it in the browser.")
    ] = False,
    row: Row = None,
    baseline: BaselineOption = None,
    max_new_tokens: MaxNewTokens = 128,
    loading: Loading = Loading(),
    served: Served = Served(),
    as_json: Json = False,
) -> None:
    """Show which regions of an image, or of a video's frames, made the model say its words: of an answer old or new.

    Finished maps are kept: the same command again makes only those that are missing.

    Example:  lvlm-probe explain runs/demo --words red
    Example:  lvlm-probe explain runs/demo --words red --against blue --open
    Example:  lvlm-probe explain --model demo --image scene.png --question "What color is the circle?" --word-maps
    Example:  lvlm-probe explain --model path/to/model --video clip.mp4 --num-frames 8 --question "What happens?"
    Example:  lvlm-probe explain --server http://gpu:8000 --image scene.png --question "What color is it?"
    """
    from lvlm_probe.cli.shared.maps import Explained, explain_replay
    from lvlm_probe.heatmap_store import FOLDER, MapSettings

    if len(chosen := given(context, "words", "joint", "alpha")) > 1:
        raise ProbeError(f"{chosen[0]} and {chosen[1]} both say which words are explained: give one of them")
    if exact and not scores:
        raise ProbeError("--exact says how maps are scored, and --no-scores that they are not: give either")
    if selecting.against and selecting.word_maps:
        raise ProbeError("--against makes a map for each side, and --word-maps one for each word: give either")
    behind = served.open(model=model, against=selecting.against)
    recipe = making.recipe() if behind is None else _on_server(behind, making, selecting, scores=scores)
    scores = scores and (behind is None or behind.gives == "passes")
    if trace is None:
        if row is not None:
            raise ProbeError("--row is of a trace, and none is given")
        directory = output_directory(out or Path("runs"))
        replay = _new_replay(model, behind, loading, asked, directory, baseline=baseline, max_new_tokens=max_new_tokens)
    else:
        if any(vars(asked).values()):
            raise ProbeError("a trace has its own image and question: give either TRACE, or --image and --question")
        if given(context, "max_new_tokens"):
            raise ProbeError("--max-new-tokens is of a new answer, and a trace has its own: give either")
        found = find_trace(trace, row)
        directory = output_directory(out) if out is not None else found.path.parent
        own_baseline = baseline_from(baseline, video=bool(found.clips))
        replay = ReplayModels(model, loading, server=behind).replay(found, own_baseline)
    recorded = replay.trace
    if image_number is None:
        image_number = recorded.clips[0].first if recorded.clips else 0
    mode = "exact" if exact or behind else "fast"
    settings = MapSettings(**vars(recipe), image=image_number, scored=scores, mode=mode)
    selection = selecting.of(replay)
    folder = directory / FOLDER
    explained = Explained(recorded, [])
    try:
        for made in explain_replay(replay, selection, settings, folder, word_maps=selecting.word_maps):
            explained.maps.append(made)
    except KeyboardInterrupt:
        kept = f"{counted(len(explained.maps), 'finished map')}"
        again = _same_command(context, recorded.path)
        raise stop(f"stopped; {kept} kept in {stored_path(folder)}. Go on with:  {again}") from None
    _tell(explained, replay, page=_opened(explained) if open_it else None, as_json=as_json)


def _on_server(behind: Server, making: Making, selecting: Selecting, *, scores: bool) -> Recipe:
    """What maps are made by on a server, by what it gives. Raises ``ProbeError``."""
    recipe = making.recipe("rise")
    if behind.gives == "passes":
        return recipe
    if not selecting.words and not selecting.joint:
        raise ProbeError(f"{behind.name} gives {behind.what}: name the words to explain, --words TEXT, or --joint")
    if scores:
        note(f"the map is not scored: that takes log-probabilities, and {behind.name} gives {behind.what}")
    if behind.gives == "samples" and recipe.method == "rise":
        return dataclasses.replace(recipe, params={"score": "prob", **recipe.params})
    return recipe


def _tell(explained: Explained, replay: Replay, *, page: Path | None, as_json: bool) -> None:
    """Print the maps, for programs or for a person, and where their page is or how it is made."""
    from lvlm_probe.cli.shared.maps import map_summary, show_explained

    if as_json:
        print_json(
            {
                "trace": str(explained.trace.path),
                "answer": explained.trace.answer,
                "report": None if page is None else str(page),
                "maps": [map_summary(item) for item in explained.maps],
            }
        )
        return
    show_explained(explained, replay)
    if page is not None:
        say("report: ", (stored_path(page), "bold"))
    else:
        folder = explained.maps[0].path.parent
        say("next:  ", f"lvlm-probe report {quoted_path(folder)} --out report.html --open")


def _new_replay(
    model: str | None,
    behind: Server | None,
    loading: Loading,
    asked: Asked,
    directory: Path,
    *,
    baseline: str | None,
    max_new_tokens: int,
) -> Replay:
    """Ask the model, or the server in its place, and return the replay of the answer."""
    if behind is None and model is None:
        raise ProbeError("give a trace file, or a new run: --model DIR_OR_ID --image FILE --question TEXT")
    shown = open_shown(asked)
    own_baseline = baseline_from(baseline, video=bool(shown.videos))
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "baseline": own_baseline or "blur"}
    if behind is not None:
        if asked.prompt is not None:
            raise ProbeError("--prompt does not go with --server, which makes the prompt: give --question")
        if shown.videos:
            raise ProbeError("a server is sent images, no videos: load the model here, --model DIR_OR_ID")
        with nothing_before():
            recorded = ask_server(behind, shown.images, asked.question, directory, **options)
        return open_replay(recorded, behind, None, own_baseline)
    loaded, processor = load_model(model or "", **vars(loading))
    with nothing_before():
        recorded = ask(
            loaded, processor, shown.images, asked.question, directory, shown=shown, prompt=asked.prompt, **options
        )
    return open_replay(recorded, loaded, processor, own_baseline)


def _opened(explained: Explained) -> Path:
    """Write the page of these maps beside the first one, and open it in the browser."""
    from lvlm_probe.cli.shared.maps import write_report

    page = explained.maps[0].path.with_suffix(".html")
    write_report(explained.maps, page, overwrite=True)
    open_page(page)
    return page


def _same_command(context: typer.Context, trace: Path) -> str:
    """This command line once more, on the trace it has recorded."""
    parts = ["lvlm-probe", "explain", stored_path(trace)]
    for option in context.command.params:
        value = context.params.get(option.name or "")
        if option.name in _OF_THE_RECORDING or value == option.default or value is None:
            continue
        if isinstance(value, bool):
            names = option.opts if value else option.secondary_opts
            parts += names[:1]
        else:
            for item in value if isinstance(value, list | tuple) else [value]:
                parts += [option.opts[0], str(item)]
    return shlex.join(parts)
