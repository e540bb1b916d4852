"""Heatmap: which regions of an image made the model say some words, with everything needed to say how it was made.

Values live on a grid over the *original* image, 0 to 1, high = important. Cells that no pixel input of the model
sees are 0 and known as such (``seen``). A heatmap of nothing, when no token was selected, has ``values=None`` and a
``reason``.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from PIL import Image, PngImagePlugin

from lvlm_probe import drawing
from lvlm_probe._moved import renamed
from lvlm_probe.cards import equal
from lvlm_probe.drawing import resample
from lvlm_probe.errors import ExplainError, ImageError, ProbeError, TraceError
from lvlm_probe.files import in_the_way, path_of, write_whole
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.selection import TokenSelection
from lvlm_probe.trace.clips import Clip, images_of
from lvlm_probe.trace.parts import PIXEL_LIMIT
from lvlm_probe.words import group_words, spelled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lvlm_probe.trace import Trace

KIND, VERSION = "heatmap", "1.0"
PNG_KEY = "lvlm_probe"
"""Text chunk of a saved PNG that holds the provenance as JSON."""


@dataclass(frozen=True, eq=False, repr=False)
class HeatGrid:
    """What heatmaps of images and of videos share: values that are checked and frozen, and the way they are told.

    ``Heatmap`` says what the fields are.
    """

    axes: ClassVar[tuple[str, ...]]
    _of: ClassVar[str] = ""
    __eq__ = equal

    values: np.ndarray | None
    image_size: tuple[int, int]
    _: KW_ONLY
    seen: np.ndarray | None = None
    selection: TokenSelection = field(default_factory=lambda: TokenSelection((), (), (), "joint"))
    method: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Mapping[str, float], ...] = ()
    reason: str | None = None
    trace: Trace | None = None

    def __post_init__(self) -> None:
        if self.values is None:
            if not self.reason:
                raise ExplainError("a heatmap without values needs a reason")
            return
        values = np.array(self.values, dtype=np.float32)
        if (
            values.ndim != len(self.axes)
            or values.size == 0
            or not (np.isfinite(values).all() and 0 <= values.min() <= values.max() <= 1)
        ):
            axes = ", ".join(self.axes)
            raise ExplainError(f"heatmap values{self._of} are ({axes}) within [0, 1]; got shape {values.shape}")
        seen = np.ones(values.shape, dtype=bool) if self.seen is None else np.array(self.seen, dtype=bool)
        if seen.shape != values.shape:
            raise ExplainError(f"values are {values.shape}, but seen is {seen.shape}")
        values[~seen] = 0.0
        for array in (values, seen):
            array.flags.writeable = False
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "seen", seen)

    @property
    def uncertainty(self) -> str | None:
        """By how much an estimated map may be off, as a sentence; ``None`` where its method does not tell (RISE does).

        The standard error is that of the random masks and, on a server that gives samples, of what was drawn; the bound
        is what a server leaves open that lists the likeliest tokens alone.
        """
        found = self.provenance.get("diagnostics")
        shares = {
            name: f"{value:.0%}".replace("%", " %") if value >= 0.005 else "under 1 %"
            for name, value in (found.items() if isinstance(found, Mapping) else ())
            if isinstance(value, float) and 0 <= value < float("inf")
        }
        if self.values is None or not {"standard_error_mean", "standard_error_max"} <= set(shares):
            return None
        said = (
            f"the standard error of the map is {shares['standard_error_mean']} of its peak on average and "
            f"{shares['standard_error_max']} at most; more masks make it smaller"
        )
        if "bound_max" in shares:
            said += f"; tokens that the server does not list may shift it by at most {shares['bound_max']}"
        return said

    @property
    def search_dtype(self) -> str | None:
        """The number format that its method searched in; ``None`` is the model's own."""
        found = self.provenance.get("search")
        return str(found["dtype"]) if isinstance(found, Mapping) and "dtype" in found else None

    @property
    def cost(self) -> str:
        """The passes that it took, as a phrase; empty where they are not known."""
        passes, search = self.provenance.get("passes"), self.provenance.get("search")
        if not isinstance(passes, Mapping):
            return ""
        said = f"{passes.get('forward', 0)} forward and {passes.get('backward', 0)} backward passes"
        if self.search_dtype is None or not isinstance(search, Mapping):
            return said
        return f"{said}, {search.get('forward', 0)} and {search.get('backward', 0)} of them in {self.search_dtype}"

    def __bool__(self) -> bool:
        return self.values is not None

    def __hash__(self) -> int:
        values = None if self.values is None else (self.values + 0.0).tobytes()  # of −0, which equals it, 0
        return hash((self.method, self.image_size, values))

    @property
    def target(self) -> int | Clip:
        """What a mask is laid over to judge it, as ``image=`` of a replay."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Everything but the values; JSON-ready."""
        raise NotImplementedError

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Writes values, provenance and history to an HDF5 file (complete or not at all); returns the path."""
        from lvlm_probe.storage import write_arrays

        target = Path(path)
        arrays = {} if self.values is None else {"values": self.values, "seen": self._seen()}
        attrs = self.describe()
        trace_path = getattr(self.trace, "path", None)
        if trace_path is not None:
            # Relative, so that a directory of traces and explanations can be moved, and no private path is stored.
            attrs["trace_path"] = os.path.relpath(trace_path, target.resolve().parent)
            attrs["trace_row"] = int(getattr(self.trace, "row", 0))
        written: Path = write_arrays(target, KIND, VERSION, arrays, attrs)
        return written

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, trace: Trace | None = None) -> Self:
        """Reads what ``write`` wrote; finds its trace beside it, where it is still there.

        ``HeatGrid.read`` reads either kind.

        Raises:
            TraceError: The file is missing, damaged, or no heatmap of this kind.
        """
        from lvlm_probe.storage import read_arrays

        source = path_of(path, "a stored heatmap", TraceError)
        arrays, attrs = read_arrays(source, KIND, version=VERSION)
        kinds = HeatGrid.__subclasses__() if cls is HeatGrid else [cls]
        make: Any = next((kind for kind in kinds if ("t" in kind.axes) == ("clip" in attrs)), kinds[0])
        try:
            record: Any = attrs
            heat = make(
                values=arrays.get("values"),
                image_size=_stored_size(record["image_size"]),
                seen=arrays.get("seen"),
                selection=TokenSelection.from_dict(record["selection"]),
                method=str(record["method"]),
                params=dict(record["params"]),
                provenance=dict(record["provenance"]),
                history=tuple(dict(item) for item in record["history"]),
                reason=None if record["reason"] is None else str(record["reason"]),
                **make.stored_place(record),
            )
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, ProbeError) as error:
            said = f"{type(error).__name__}: {str(error)[:200]}"
            raise TraceError(f"{source}: not a complete heatmap ({said}); explain the trace again") from error
        found = trace if trace is not None else _trace_beside(source, attrs, heat.provenance)
        read: Self = dataclasses.replace(heat, trace=found)
        return read

    @classmethod
    def stored_place(cls, record: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that say which of the prompt's images a stored heatmap is over, which ``describe`` told."""
        raise NotImplementedError

    def _described(self, **place: Any) -> dict[str, Any]:
        """Everything but the values, ``place`` saying which of the prompt's images they are over."""
        return {
            "method": self.method,
            "params": dict(self.params),
            "selection": self.selection.to_dict(),
            "image_size": list(self.image_size),
            **place,
            "provenance": dict(self.provenance),
            "history": [dict(record) for record in self.history],
            "reason": self.reason,
        }

    def panel(self, score: drawing.Scored | None, image: Image.Image | None, row: str, col: str) -> drawing.Panel:
        """This heatmap as a part of a figure.

        Args:
            score: what ``evaluate`` said of it.
            image: image to draw on instead of the trace's.
            row, col: texts of its row and column.

        Raises:
            ImageError: no image at hand, or one of another size.
        """
        raise NotImplementedError

    picture = renamed("picture", "image")

    def _on_panel(self, image: Image.Image, which: str, **shown: Any) -> drawing.Panel:
        """A part of a figure with question, answer and verdict; ``which`` names it among several of a prompt."""
        answer = []
        for before, text, explained in explained_words(self.selection):
            space = before[: len(before) - len(before.lstrip())]  # what else stands there shows nothing
            answer.append((space + text, explained))
        question = None if self.trace is None else self.trace.question or f"Prompt: {self.trace.prompt}"
        shown["col"] += which
        return drawing.Panel(image.convert("RGB"), question=question, answer=answer, reason=self.reason, **shown)

    def known_values(self) -> np.ndarray:
        """The values. Raises ``ExplainError`` where there are none, with the reason."""
        if self.values is None:
            raise ExplainError(f"this heatmap has no values: {self.reason}")
        return self.values

    def _seen(self) -> np.ndarray:
        assert self.seen is not None  # set with the values, in __post_init__
        return self.seen

    def _png(self, drawn: Image.Image) -> bytes:
        """A drawing of it as a PNG that says how it was made."""
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt(PNG_KEY, json.dumps(self.describe(), allow_nan=False))
        chunks.add_text("Software", "lvlm_probe")
        buffer = io.BytesIO()
        drawn.save(buffer, format="PNG", pnginfo=chunks)
        return buffer.getvalue()

    def _card(self, png: bytes | None, told: str) -> str:
        """The drawing under its title in a notebook, with what is told of it; without one that alone."""
        title = f"{html.escape(self.method[:100])}: {html.escape((self.selection.label or 'nothing selected')[:400])}"
        if png is None:
            return f"<p><b>{title}</b><br>{html.escape(told[:1000])}</p>"
        data = base64.b64encode(png).decode("ascii")
        return (
            f'<figure style="margin:0"><img alt="{title}" src="data:image/png;base64,{data}" style="max-width:100%">'
            f"<figcaption><b>{title}</b><br><small>{html.escape(told)}</small></figcaption></figure>"
        )

    def figure(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        score: drawing.Scored | None = None,
        image: Image.Image | None = None,
        **look: Any,
    ) -> Figure:
        """A figure for print: question, answer, map (of a video a strip of frames, and its mean over time), verdict,
        colour bar; ``figure`` (the function) shows several.

        Args:
            path: where to save it (PDF, SVG, PNG or TIFF); by default nowhere.
            score: what ``evaluate`` said of this heatmap; without it the figure says "not checked".
            image: image to draw on instead of the trace's; none of a video.
            **look: ``width``, ``font_size``, ``colormap``, … of ``figure``.

        Raises:
            ImageError: no image, or none of the frames, at hand.
        """
        images = None if image is None else [image]
        return figure([self], scores=[score], images=images, out=path, **look)


@dataclass(frozen=True, eq=False, repr=False)
class Heatmap(HeatGrid):
    """The result of one explanation.

    Attributes:
        values: ``(row, col)`` float32 in [0, 1] over the original image, high = important, or ``None``.
        image_size: ``(width, height)`` of the original image, pixels.
        image_index: Its number in the prompt, from 0.
        seen: ``(row, col)`` bool, cells that reach the model; ``None`` without values.
        selection: The tokens that are explained.
        method, params: The explainer and its parameters as used.
        provenance: Trace id, versions, seed, baseline, passes, seconds, device, time of making.
        history: One record per iteration, for methods that iterate.
        reason: Why there are no values.
        trace: The trace explained, while one is at hand; never stored.
    """

    axes = ("row", "col")

    image_index: int = 0

    @property
    def target(self) -> int:
        """What a mask is laid over to judge it, as ``image=`` of a replay."""
        return self.image_index

    def __repr__(self) -> str:
        if self.values is None:
            return f"<Heatmap {self.method}: none, {self.reason}>"
        rows, cols = self.shape
        width, height = self.image_size
        return f"<Heatmap {self.method} of {self.selection.label!r}: {rows}×{cols} cells over {width}×{height} pixels>"

    @property
    def shape(self) -> tuple[int, int]:
        """Grid ``(row, col)``. Raises ``ExplainError`` when there are no values."""
        rows, cols = self.known_values().shape
        return rows, cols

    @property
    def coarse(self) -> str | None:
        """What a map of few cells cannot say, as a sentence; ``None`` for one of 5 × 5 or more, or without values."""
        cells = None if self.values is None else drawing.cells_of(self.values.shape)
        return cells and f"the map has only {cells}, which are drawn as blocks: smaller regions are not told apart"

    def upsampled(self) -> np.ndarray:
        """Values brought bilinearly to the image's pixels, ``(height, width)`` float32, as masks are."""
        width, height = self.image_size
        return resample(self.known_values(), (height, width))

    def image(self) -> Image.Image:
        """The original image, RGB. Raises ``ImageError`` when no trace is at hand."""
        if self.trace is None:
            raise ImageError(
                "this heatmap has no image at hand: its trace was not found beside it; "
                "give one (Heatmap.read(path, trace=...), or overlay(image=...))"
            )
        images = self.trace.images
        if self.image_index >= len(images):
            raise ImageError(
                f"trace {self.provenance.get('trace_id', '')} holds no original image, as its processor call was not "
                f"watched: attach the processor before it prepares the inputs, record with images=[...], or draw on an "
                f"image of your own with overlay(image=...)"
            )
        found = images[self.image_index].convert("RGB")
        if found.size != tuple(self.image_size):
            raise ImageError(f"the heatmap is of an image of {self.image_size} pixels, the trace's has {found.size}")
        return found

    @naming_arguments
    def overlay(
        self,
        alpha: float = 0.8,
        colormap: str = "inferno",
        *,
        image: Image.Image | None = None,
        normalise: bool = True,
        contour: bool = True,
        score: drawing.Scored | None = None,
        mark: bool = True,
    ) -> Image.Image:
        """The heatmap over the original image, at the image's own size.

        Opacity grows with importance, so the image stays visible where little matters; regions the model never saw
        are greyed and hatched.

        Args:
            alpha: Opacity of the most important region, 0 to 1.
            colormap: Name of a matplotlib colour map.
            image: image to draw on instead of the trace's.
            normalise: Stretch the values so that the highest is 1.
            contour: Outline the region above half of the highest value, which reads on images of any colour.
            score: What ``evaluate`` said of this heatmap: its verdict is drawn into the corner.
            mark: Without a score, say "not checked" there. ``False``: draw no verdict.

        Raises:
            ExplainError: There are no values, or no such colour map.
            ImageError: no image at hand, or one of another size.
        """
        return drawing.overlay(
            self.image_for(image),
            self.known_values(),
            seen=self._seen(),
            alpha=alpha,
            colormap=colormap,
            normalise=normalise,
            contour=contour,
            mark=drawing.mark_of(score) if mark else None,
        )

    def difference(self, other: Heatmap, *, alpha: float = 0.85, image: Image.Image | None = None) -> Image.Image:
        """This heatmap against another one over the same image: orange where this one is higher, blue where the other
        is. Each is stretched so that its highest value is 1.

        Of a contrast, ``explain(replay, tokens="red", against="blue")`` and the same with the two exchanged, it shows
        what speaks for either side.

        Args:
            other: A heatmap over the same image, of any resolution.
            alpha: Opacity of the largest difference, 0 to 1.
            image: image to draw on instead of the trace's.

        Raises:
            ExplainError: One of them has no values, or they are not over the same image.
            ImageError: no image at hand, or one of another size.
        """
        if (other.image_size, other.image_index) != (self.image_size, self.image_index):
            raise ExplainError("a difference is of two heatmaps over the same image; these are over two")
        return drawing.difference(self.image_for(image), self.known_values(), other.known_values(), alpha=alpha)

    def image_for(self, image: Image.Image | None) -> Image.Image:
        """``image``, which has to be of the heatmap's size, or the one that was explained."""
        found = self.image() if image is None else image
        if not isinstance(found, Image.Image):
            raise ImageError(f"an image to draw on is a PIL image; got a {type(found).__name__}")
        if found.size != tuple(self.image_size):
            raise ImageError(f"the heatmap is of an image of {self.image_size} pixels; got one of {found.size}")
        return found

    def panel(self, score: drawing.Scored | None, image: Image.Image | None, row: str, col: str) -> drawing.Panel:
        several = 0 if self.trace is None else len(self.trace.images)
        return self._on_panel(
            self.image_for(image),
            f" · image {self.image_index + 1} of {several}" if several > 1 else "",
            values=self.values,
            row=row,
            col=col,
            seen=self.seen,
            mark=drawing.mark_of(score),
        )

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        alpha: float = 0.8,
        colormap: str = "inferno",
        score: drawing.Scored | None = None,
    ) -> Path:
        """Writes the overlay as a PNG whose text chunk ``lvlm_probe`` says how it was made; returns the path.

        ``score``, what ``evaluate`` said of this heatmap, puts its verdict into the corner; without, it is "not
        checked". ``figure`` makes PDF, SVG and TIFF.

        Raises:
            ExplainError: There are no values: there is nothing to draw, and the message says why.
        """
        target = Path(path)
        if target.suffix.lower() != ".png":
            raise ExplainError(f"an overlay is saved as PNG; got {target.name!r}: figure(...) makes PDF, SVG and TIFF")
        content = self._png(self.overlay(alpha, colormap, score=score))
        write_whole(target, content)
        return target

    def describe(self) -> dict[str, Any]:
        """Everything but the values: what ``save`` and ``write`` keep. JSON-ready."""
        return self._described(image_index=self.image_index)

    @classmethod
    def stored_place(cls, record: Mapping[str, Any]) -> dict[str, Any]:
        """The image's number, by name. Raises ``ValueError`` for a heatmap of a video."""
        if "clip" in record:
            raise ValueError("it is of a video: probe.video.ClipHeatmap.read")
        return {"image_index": _natural(record["image_index"])}

    def preview(self, side: int = 640, *, score: drawing.Scored | None = None) -> Image.Image:
        """The overlay with its verdict, made small; on grey where no image is at hand.

        Args:
            side: longest side, pixels.
            score: what ``evaluate`` said of this heatmap; without it, it is "not checked".

        Raises:
            ExplainError: there are no values, or ``side`` is no number of pixels.
        """
        if not side >= 1:
            raise ExplainError(f"side is a number of pixels, at least 1; got {side!r}")
        scale = min(1.0, side / max(self.image_size))
        width, height = (max(1, round(length * scale)) for length in self.image_size)
        try:
            shown = self.image().resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
        except ProbeError:  # none at hand, or one that cannot be read
            shown = Image.new("RGB", (width, height), (128, 128, 128))
        return dataclasses.replace(self, image_size=(width, height)).overlay(image=shown, score=score)

    def _repr_png_(self) -> bytes | None:
        return None if self.values is None else self._png(self.preview())

    def _repr_html_(self) -> str:
        png = self._repr_png_()
        if png is None:
            return self._card(None, self.reason or "")
        detail = "not checked: evaluate(heat, replay) says whether to believe it · "
        detail += f"trace {str(self.provenance.get('trace_id', ''))[:128]} · grid {self.shape[0]} × {self.shape[1]}"
        if self.cost:
            detail += f" · {self.cost}"
        return self._card(png, detail)


@naming_arguments
def figure(
    heats: HeatGrid | Sequence[HeatGrid],
    *,
    scores: drawing.Scored | Sequence[drawing.Scored | None] | None = None,
    images: Sequence[Image.Image] | None = None,
    out: str | os.PathLike[str] | None = None,
    dpi: float = 300,
    overwrite: bool | None = None,
    **look: Any,
) -> Figure:
    """A figure for print of one or more heatmaps: words beside each other, methods below each other; of a video a strip
    of its frames over a curve of the heatmap in time.

    Question and answer with the explained words in colour, the verdict of each map or "not checked", a colour bar with
    its unit and a legend of the outline. Saved files carry their provenance in their own metadata.

    Args:
        heats: in the order of showing. Rows are methods and columns words, or answers, where both differ.
        scores: what ``evaluate`` said of each, in the same order, ``None`` for one that was not evaluated.
        images: images to draw on instead of the traces'.
        out: where to save it, a PDF, SVG, PNG or TIFF.
        dpi: pixels per inch of images, and of PNG and TIFF.
        overwrite: replace ``out`` if it exists; by default only a file that this package wrote, so that a notebook cell
            can run again.
        **look: ``width`` (``"column"``, ``"text"`` or inches), ``columns``, ``font_size``, ``alpha``, ``colormap``,
            ``contour``; see ``drawing.figure``.

    Returns:
        The matplotlib figure, which belongs to no window.

    Raises:
        ExplainError: no heatmaps, not one score or image per heatmap, another file ending; ``out`` exists.
        ImageError: a heatmap has no image at hand, or one of another size is given.
    """
    shown = list(heats) if isinstance(heats, Sequence) else [heats]
    for heat in shown:
        if not isinstance(heat, HeatGrid):
            raise ExplainError(f"figure() shows heatmaps; got a {type(heat).__name__}")
    nothing = [None] * len(shown)
    given: list[Any] = list(scores or nothing) if isinstance(scores, Sequence | None) else [scores]
    over: list[Any] = nothing if images is None else list(images)
    for name, listed in (("scores", given), ("images", over)):
        if len(listed) != len(shown):
            raise ExplainError(f"figure() was given {len(shown)} heatmaps but {len(listed)} {name}: pass one for each")
    if out is not None and (there := in_the_way(Path(out), overwrite=overwrite)) is not None:
        raise ExplainError(there)
    panels = [
        heat.panel(score, image, *place)
        for heat, score, image, place in zip(shown, given, over, _places(shown), strict=True)
    ]
    drawn = drawing.figure(panels, dpi=dpi, **look)
    if out is not None:
        drawing.save_figure(drawn, out, provenance={"heatmaps": [heat.describe() for heat in shown]}, dpi=dpi)
    return drawn


def _places(heats: Sequence[HeatGrid]) -> list[tuple[str, str]]:
    """Row and column of each heatmap's panel: methods below each other where words differ too, else beside."""
    answers = [(str(heat.provenance.get("trace_id", "")), images_of(heat.target).start) for heat in heats]
    methods = [str(heat.provenance.get("label") or heat.method) for heat in heats]
    words = [heat.selection.label or "whole answer" for heat in heats]
    several = len(set(methods)) > 1
    if len(set(answers)) > 1:
        return [
            (str(one), method) if several else ("", word)
            for one, method, word in zip(answers, methods, words, strict=True)
        ]
    if len(set(words)) > 1:
        return [(method if several else "", word) for method, word in zip(methods, words, strict=True)]
    return [("", method) for method in methods]


def explained_words(selection: TokenSelection) -> list[tuple[str, str, bool]]:
    """Return the answer word by word: the text before it, the word, and whether it is one that is explained."""
    special = [index in selection.special for index in range(len(selection.tokens))]
    words, chosen = group_words(selection.tokens, special), set(selection.indices)
    texts, _ = spelled(["" if flag else piece for piece, flag in zip(selection.tokens, special, strict=True)], words)
    return [
        (before, text, not chosen.isdisjoint(range(word.start, word.stop)))
        for word, (before, text) in zip(words, texts, strict=True)
    ]


def _stored_size(value: Any) -> tuple[int, int]:
    width, height = (_natural(side) for side in value)
    if not 0 < width * height <= PIXEL_LIMIT:
        raise ValueError(f"an image of {width} × {height} pixels")
    return width, height


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:32]!r} is no number of pixels or of an image")
    return value


def trace_file_of(path: str | os.PathLike[str]) -> Path | None:
    """Return the trace file that a stored heatmap is of, whether or not it is there; ``None`` where none is named."""
    from lvlm_probe.storage import read_attrs

    source = Path(path)
    try:
        return _named_trace(source, read_attrs(source, KIND, version=VERSION))
    except TraceError:
        return None


def _named_trace(source: Path, attrs: Mapping[str, Any]) -> Path | None:
    relative = attrs.get("trace_path")
    # Kept relative when written; an absolute one is no path of ours.
    if not isinstance(relative, str) or os.path.isabs(relative):
        return None
    try:
        return (source.resolve().parent / relative).resolve()
    except (OSError, ValueError, RuntimeError):  # a NUL, a ring of links
        return None


def _trace_beside(source: Path, attrs: Mapping[str, Any], provenance: Mapping[str, Any]) -> Trace | None:
    path, row = _named_trace(source, attrs), attrs.get("trace_row", 0)
    if path is None or type(row) is not int:
        return None
    from lvlm_probe.trace import open_trace

    try:
        trace = open_trace(path, row=row)
    except (ProbeError, OSError, ValueError, RuntimeError):
        return None
    return trace if trace.trace_id == provenance.get("trace_id") else None
