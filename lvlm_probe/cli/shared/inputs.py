"""Inputs of the commands besides models: images and questions, trace files, method parameters, baselines."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvlm_probe.cli.shared.completion import complete_method
from lvlm_probe.cli.shared.models import DEMO, load_model
from lvlm_probe.cli.shared.options import Asked, Loading, SearchDtype
from lvlm_probe.cli.shared.terminal import agrees, one_line, stage
from lvlm_probe.errors import ImageError, ProbeError, TraceError
from lvlm_probe.escaping import first_line

if TYPE_CHECKING:
    from PIL import Image

    from lvlm_probe.explainers import Recipe
    from lvlm_probe.replaying import Replay
    from lvlm_probe.serving import Server
    from lvlm_probe.trace import Trace


@dataclass(frozen=True)
class Making:
    """How maps are made."""

    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            autocompletion=complete_method,
            help="Which explainer; plugins add more. Default: igos++; on a server rise, it has no gradients.",
        ),
    ] = None
    param: Annotated[
        list[str] | None, typer.Option("--param", metavar="NAME=VALUE", help="A parameter of the method; repeatable.")
    ] = None
    budget: Annotated[
        int | None,
        typer.Option(
            "--budget",
            metavar="N",
            min=1,
            help="Passes forward at most for a map. Default: as many as igos++ finds it needs, 32 to 188.",
        ),
    ] = None
    search_dtype: SearchDtype = None
    seed: Annotated[int, typer.Option("--seed", help="Of everything random.")] = 0

    def recipe(self, usual: str = "igos++") -> Recipe:
        """What maps are made by, of the method ``usual`` where none is named. Raises ``ProbeError`` for a ``--param``
        that cannot be read."""
        from lvlm_probe.explainers import Recipe

        params = parameters(self.param or [])
        if self.budget is not None and params.setdefault("budget", self.budget) != self.budget:
            raise ProbeError(f"--budget {self.budget} and --param budget={params['budget']}: give one of them")
        return Recipe(self.method or usual, params, self.seed, self.search_dtype)


@dataclass(frozen=True)
class Shown:
    """What a model is shown beside the question, from the options of a command.

    Attributes:
        images: opened.
        videos: files, which the model's processor opens.
        files: names of the files without folders, of images and of videos, as traces keep them.
    """

    images: list[Image.Image]
    videos: list[Path]
    sampling: dict[str, Any]
    files: dict[str, list[str]]


def open_shown(asked: Asked) -> Shown:
    """Open what ``--image`` and ``--video`` name; a video that is given as an image is one.

    Raises:
        ImageError: nothing is given, or a file is missing or no image.
        ProbeError: PyAV is needed and not installed.
    """
    from lvlm_probe.extras import require
    from lvlm_probe.trace.image_files import open_image_file
    from lvlm_probe.trace.video_files import check_video_file, is_video_name

    files = [path for path in asked.image or [] if not is_video_name(path)]
    clips = [*(path for path in asked.image or [] if is_video_name(path)), *(asked.video or [])]
    if not files and not clips:
        raise ImageError("there is no image to explain anything with: add --image FILE, or --video FILE")
    for path in (*files, *clips):
        if address := re.match(r"(https?):/+", str(path)):  # as a path, it has lost a slash
            url = f"{address[1]}://{str(path)[address.end() :]}"
            raise ImageError(
                f"--image and --video take files, and {url} is an address; fetch it first:  curl -LO {shlex.quote(url)}"
            )
    if clips:  # before the model is loaded
        require("av", extra="video", purpose=f"the video file {clips[0].name}")
    for path in clips:
        check_video_file(path)
    names = {"image_files": [path.name for path in files], "video_files": [path.name for path in clips]}
    return Shown(
        [open_image_file(path) for path in files],
        clips,
        {"num_frames": asked.num_frames, "fps": asked.fps},
        {kind: found for kind, found in names.items() if found},
    )


def output_directory(path: Path) -> Path:
    """Return a directory to add to. Raises ``ProbeError`` when the path is a file."""
    if path.exists() and not path.is_dir():
        raise ProbeError(f"--out {path} is a file; name a directory (an existing one is added to)")
    return path


def find_trace(path: Path, row: int | None = None) -> Trace:
    """Return the trace in a file, or the last one of a directory. Raises ``TraceError``."""
    from lvlm_probe.trace import open_store, open_trace

    if path.is_dir():
        store = open_store(path)
        if not store.files:
            raise TraceError(f"{path} holds no traces; record one: lvlm-probe record --out {path} …")
        return open_trace(store.files[-1], row=row) if row is not None else store[-1]
    return open_trace(path, row=row or 0)


def rows_of(path: Path, row: int | None) -> list[Trace]:
    """Return the traces of a file: one row, or all of them. Raises ``TraceError``."""
    from lvlm_probe.trace import open_rows, open_trace

    return list(open_rows(path)) if row is None else [open_trace(path, row=row)]


class ReplayModels:
    """The models that traces are replayed on, one at a time in memory.

    Args:
        spec: the model that the user has named; ``None`` takes what a trace names, once the user has agreed to it. A
            trace may come from anybody, and what it names may be any directory of this machine, or be fetched from the
            network.
        loading: how it is loaded.
        server: one that runs the model, in its place.
    """

    def __init__(self, spec: str | None, loading: Loading = Loading(), *, server: Server | None = None) -> None:
        self._spec, self._server, self._loading = spec, server, loading
        self._agreed: set[str] = set()
        self._loaded: tuple[str, tuple[Any, Any]] | None = None

    def of(self, trace: Trace) -> tuple[Any, Any]:
        """The model and the processor. Raises ``ProbeError`` where none is named, agreed to, or can be loaded."""
        if self._server is not None:
            return self._server, None
        name = self._spec if self._spec is not None else self._named(trace)
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None  # the old one goes before the new one comes
            self._loaded = (name, load_model(name, **vars(self._loading)))
        return self._loaded[1]

    def replay(self, trace: Trace, baseline: str | Image.Image | None = None) -> Replay:
        """Open the replay of a trace, over a baseline where one is given. Raises ``ProbeError``, also as ``of``."""
        return open_replay(trace, *self.of(trace), baseline)

    def _named(self, trace: Trace) -> str:
        named = str(trace.model.get("model_id") or "")
        # A demo trace names the package directory of the machine it was made on; the model is the same everywhere.
        if Path(named).parts[-3:] == ("lvlm_probe", "demo", "checkpoint"):
            return DEMO
        file, shown = one_line(trace.path.name, 100), one_line(named, 200)
        if not named:
            raise ProbeError(f"{file} does not name its model; add --model DIR_OR_ID")
        here = _is_directory(named)
        if not here and (named.count("/") != 1 or named.startswith((".", "/", "~"))):
            raise ProbeError(f"{file} was recorded with {shown}, which is not here; add --model DIR_OR_ID")
        if named in self._agreed:
            return named
        what = "a directory on this machine" if here else "a model of the Hugging Face hub, fetched if it is not here"
        said = agrees(f"{file} names its model itself: {shown}, {what}. Load it?")
        if not said:
            raise ProbeError(
                f"{file} names the model {shown}, but a file does not decide what is loaded"
                f"{'' if said is None else ', and you did not agree'}; name it yourself, --model DIR_OR_ID"
            )
        self._agreed.add(named)
        return named


def open_replay(trace: Trace, model: Any, processor: Any, baseline: str | Image.Image | None = None) -> Replay:
    """Open the replay of a trace, with a line that says so when it takes long; over a baseline where one is given."""
    from lvlm_probe.replaying import replay

    with stage("replaying the trace"):
        opened = replay(trace, model, processor)
    return opened if baseline is None else opened.over(baseline)


def _is_directory(name: str) -> bool:
    try:
        return Path(os.path.expanduser(name)).is_dir()
    except (OSError, ValueError):  # too long, or with a NUL in it
        return False


def parameters(pairs: Sequence[str]) -> dict[str, Any]:
    """``["size=14", "columns.image=photo"]`` as keyword arguments: values are YAML, a dot leads into a mapping."""
    import yaml

    found: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        *outer, last = name.split(".")
        if not sign or not all(part.isidentifier() for part in (*outer, last)):
            raise ProbeError(f"--param {pair!r}: write it as NAME=VALUE, e.g. --param size=14")
        inner = found
        for part in outer:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ProbeError(f"--param {pair!r}: {part} is given as a value and as a mapping; give one of them")
        if last in inner:
            raise ProbeError(f"--param {pair!r}: {name} is given twice")
        try:
            inner[last] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ProbeError(f"--param {pair!r}: the value cannot be read ({first_line(error)})") from error
    return found


def alternatives(given: list[str] | None) -> str | list[str] | None:
    """Return what ``--against`` names, as ``select_tokens`` takes it."""
    return "next" if given == ["next"] else given or None


def baseline_from(value: str | None, *, video: bool) -> str | Image.Image | None:
    """Return what ``--baseline`` names: a kind, or an image.

    Args:
        video: whether a video is hidden by it: some kinds are made of its frames.

    Raises:
        ProbeError: there is no such kind, or it is of videos; or no such image.
    """
    from lvlm_probe.images.baselines import CLIP_KINDS, KINDS

    kinds = (*KINDS, *CLIP_KINDS) if video else KINDS
    if value is None or value in kinds:
        return value
    way_out = f"choose one of {', '.join(kinds)}, or give an image's path"
    if value in CLIP_KINDS:
        raise ProbeError(f"--baseline {value} is made of the frames of a video, and there is none here: {way_out}")
    if Path(value).suffix or os.sep in value:
        from lvlm_probe.trace.image_files import open_image_file

        return open_image_file(Path(value))
    raise ProbeError(f"--baseline {value!r}: {way_out}")


def columns_from(pairs: list[str] | None) -> dict[str, str]:
    """``["answer=pred"]`` as a mapping. Raises ``ProbeError``."""
    found: dict[str, str] = {}
    for pair in pairs or []:
        name, sign, value = pair.partition("=")
        if not (sign and name and value):
            raise ProbeError(f"--column {pair!r}: write it as FIELD=NAME, e.g. --column answer=pred")
        if name in found:
            raise ProbeError(f"--column {pair!r}: {name} is given twice")
        found[name] = value
    return found
