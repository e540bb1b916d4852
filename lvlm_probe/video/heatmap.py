"""ClipHeatmap: which places in which frames of a video made the model say some words.

Values live on a grid over the video, ``(t, row, col)``: cells of the original frames, and even steps in time, which
need not be frames. Between the middles of two steps they are interpolated, as masks are.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from lvlm_probe import drawing
from lvlm_probe.cards import in_one_line
from lvlm_probe.errors import ExplainError, ImageError
from lvlm_probe.files import write_whole
from lvlm_probe.heatmap import PNG_KEY, HeatGrid, Heatmap
from lvlm_probe.images.clips import over_frames
from lvlm_probe.kinds import is_whole
from lvlm_probe.trace.clips import Clip
from lvlm_probe.trace.video_files import encode_video

_SHOWN = 12  # frames of a strip
_TILES = 8  # ... and of a sheet
_SIDE = 180  # longest side of a frame in it, pixels
_MOVIE_SIDE = 480  # ... and of an animation's
_GAP, _TEXT, _CURVE = 6, 12, 64  # pixels: between frames, of letters, of the curve below them
_INK, _PAPER, _LINE = (40, 40, 40), (255, 255, 255), (0, 114, 178)


@dataclass(frozen=True, eq=False, repr=False)
class ClipHeatmap(HeatGrid):
    """The result of explaining a recorded answer by a video.

    Attributes:
        values: ``(t, row, col)`` float32 in [0, 1], high = important, or ``None``.
        image_size: ``(width, height)`` of a frame, pixels.
        clip: the video: which images of the prompt are its frames, and when they are shown.
        seen: ``(t, row, col)`` bool, cells that reach the model; ``None`` without values.
        selection, method, params, provenance, history, reason, trace: as of a ``Heatmap``.
    """

    axes = ("t", "row", "col")
    _of = " of a video"
    __repr__ = in_one_line

    clip: Clip

    @property
    def target(self) -> Clip:
        """What a mask is laid over to judge it, as ``image=`` of a replay."""
        return self.clip

    @property
    def image_index(self) -> int:
        """Number of its first frame among the images of the prompt."""
        return self.clip.first

    @property
    def coarse(self) -> str | None:
        """What a heatmap of few cells cannot say, as a sentence; ``None`` where a frame has enough, or nothing has."""
        cells = None if self.values is None else drawing.cells_of(self.values.shape[1:])
        return cells and f"a frame has only {cells}, which are drawn as blocks: smaller regions are not told apart"

    @property
    def by_frame(self) -> np.ndarray:
        """The values of each frame, ``(frame, row, col)`` float32, interpolated between steps as masks are.

        Raises:
            ExplainError: there are no values.
        """
        return self._frames(self.known_values())

    @property
    def over_time(self) -> np.ndarray:
        """Mean of the values that the model sees, at each frame, ``(frame,)`` float32."""
        frames, seen = self.by_frame, self._frames(np.asarray(self._seen(), np.float32))
        curve: np.ndarray = frames.sum((1, 2)) / np.maximum(seen.sum((1, 2)), 1e-9)
        return curve

    def frame(self, number: int) -> Heatmap:
        """The heatmap of one frame, counted from the clip's first: an image, for all that shows images.

        Its values are not stretched, so that frames can be compared; judge the video as a whole, not its frames.
        """
        self._known_frame(number)
        of = {name: getattr(self, name) for name in ("image_size", "selection", "method", "params", "trace", "reason")}
        shown: dict[str, Any] = {}
        if self.values is not None:
            shown["values"] = self._frames(self.values)[number].clip(0, 1)
            shown["seen"] = self._frames(np.asarray(self.seen, np.float32))[number] > 0
        return Heatmap(
            **{"values": None, **shown},
            **of,
            image_index=self.clip.first + number,
            provenance={**self.provenance, "frame_of": self.clip.to_dict()},
            history=self.history,
        )

    def on_sheet(self) -> Heatmap:
        """The heatmap over ``film_sheet``: one of an image, for what shows images. Cells without a frame are not
        seen."""
        chosen = self.clip.spread(_TILES)
        rows, columns = _tiling(len(chosen))
        shown: dict[str, Any] = {"values": None}
        if self.values is not None:
            of_frames = (self._frames(self.values).clip(0, 1), self._frames(np.asarray(self.seen, np.float32)) > 0)
            laid = []
            for frames in of_frames:
                high, wide = frames.shape[1:]
                sheet = np.zeros((rows * high, columns * wide), frames.dtype)
                for place, number in enumerate(chosen):
                    top, left = place // columns * high, place % columns * wide
                    sheet[top : top + high, left : left + wide] = frames[number]
                laid.append(sheet)
            shown = {"values": laid[0], "seen": laid[1]}
        width, height = self.image_size
        return Heatmap(
            **shown,
            image_size=(columns * width, rows * height),
            image_index=self.clip.first,
            **{name: getattr(self, name) for name in ("selection", "method", "params", "provenance", "history")},
            reason=self.reason,
        )

    def image(self, number: int) -> Image.Image:
        """One frame as the model was shown it, RGB.

        Raises:
            ExplainError: there is no such frame.
            ImageError: no trace is at hand.
        """
        self._known_frame(number)
        if self.trace is None:
            raise ImageError("this heatmap has no frames at hand: its trace was not found beside it")
        images = self.trace.images
        if self.clip.images.stop > len(images):
            raise ImageError(
                f"trace {self.provenance.get('trace_id', '')} has {len(images)} images, and not its frames"
            )
        return images[self.clip.first + number].convert("RGB")

    def overlay(
        self, *, alpha: float = 0.8, colormap: str = "inferno", score: drawing.Scored | None = None, mark: bool = True
    ) -> Image.Image:
        """A strip of frames with the heatmap over them, and the curve of its mean over time below; RGB.

        Args:
            alpha: opacity of the most important region, 0 to 1.
            colormap: name of a matplotlib colour map.
            score: what ``evaluate`` said of this heatmap: its verdict is drawn into the first frame.
            mark: without a score, say "not checked" there. ``False``: draw no verdict.

        Raises:
            ExplainError: there are no values, or no such colour map.
            ImageError: no frames at hand.
        """
        stamp = drawing.mark_of(score) if mark else None
        return self._strip(_SHOWN, 6, _SIDE, stamp, alpha=alpha, colormap=colormap)

    def preview(self, side: int = 640, *, score: drawing.Scored | None = None) -> Image.Image:
        """A few frames with the heatmap over them and the verdict, in two columns, and the curve; RGB.

        Args:
            side: width, pixels.
            score: what ``evaluate`` said of this heatmap; without it, it is "not checked".

        Raises:
            ExplainError: there are no values, or ``side`` is no number of pixels.
            ImageError: no frames at hand.
        """
        if not side >= 1:
            raise ExplainError(f"side is a number of pixels, at least 1; got {side!r}")
        width, height = self.image_size
        longest = (side - _GAP) // 2 * max(width, height) // width
        return self._strip(6, 2, longest, drawing.mark_of(score))

    def _strip(self, most: int, across: int, side: int, stamp: drawing.Mark | None, **look: Any) -> Image.Image:
        """At most so many frames, evenly spaced, in so many columns, the verdict in the first; the curve below."""
        chosen = self.clip.spread(most)
        drawn = [
            self.shown(number, side, mark=stamp if place == 0 else None, **look) for place, number in enumerate(chosen)
        ]
        wide, high = drawn[0].size
        columns = min(len(drawn), across)
        rows = -(-len(drawn) // columns)
        width = columns * (wide + _GAP) - _GAP
        row_height = high + _TEXT + 2 * _GAP
        sheet = Image.new("RGB", (width, rows * row_height + _CURVE + _TEXT + 3 * _GAP), _PAPER)
        pencil, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT)
        for place, (number, frame) in enumerate(zip(chosen, drawn, strict=True)):
            at = place % columns * (wide + _GAP), place // columns * row_height
            sheet.paste(frame, at)
            pencil.text((at[0], at[1] + high + 2), self.when(number), font=font, fill=_INK)
        self._curve(sheet, rows * row_height + _GAP, chosen)
        return sheet

    def panel(self, score: drawing.Scored | None, image: Image.Image | None, row: str, col: str) -> drawing.Panel:
        if image is not None:
            raise ImageError("images= are of heatmaps of images; a video is drawn on the frames of its trace")
        clips = 0 if self.trace is None else len(self.trace.clips)
        which = f" · video from image {self.clip.first + 1}" if clips > 1 else ""
        shown: dict[str, Any] = {"row": row, "col": col, "mark": drawing.mark_of(score), "values": None}
        if self.values is not None:
            peak = float(self.values.max())
            frames = [(number, self.frame(number)) for number in self.clip.spread(_SHOWN)]
            shown["frames"] = [
                drawing.Panel(self.image(number), heat.values, seen=heat.seen, col=self.when(number), peak=peak)
                for number, heat in frames
            ]
            shown |= {"values": self.values.max(0), "curve": self.over_time.tolist(), "times": self.clip.times}
        return self._on_panel(self.image(0), which, **shown)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        alpha: float = 0.8,
        colormap: str = "inferno",
        score: drawing.Scored | None = None,
        seconds: float | None = None,
    ) -> Path:
        """Write the heatmap as a strip (PNG) or as an animation (GIF, MP4); returns the path.

        Args:
            path: its ending says which. An MP4 takes ``pip install 'lvlm-probe[video]'``.
            alpha, colormap, score: as for ``overlay``.
            seconds: how long the animation shows a frame; by default as long as the video does, where that is known
                and between 0.1 and 1.

        Raises:
            ExplainError: there are no values, or another ending.
            ImageError: no frames at hand.
            ProbeError: an MP4 is asked for, and PyAV is not installed.
        """
        target = Path(path)
        ending = target.suffix.lower()
        if ending not in (".png", ".gif", ".mp4"):
            raise ExplainError(f"a heatmap of a video is saved as PNG (a strip), GIF or MP4; got {target.name!r}")
        if ending == ".png":
            content = self._png(self.overlay(alpha=alpha, colormap=colormap, score=score))
        else:
            frames = [
                self.shown(number, _MOVIE_SIDE, alpha=alpha, colormap=colormap, mark=drawing.mark_of(score))
                for number in range(self.clip.frames)
            ]
            lasting = self._lasting() if seconds is None else seconds
            comment = json.dumps({PNG_KEY: self.describe()}, allow_nan=False)
            movie = encode_video if ending == ".mp4" else _gif
            content = movie(frames, seconds=lasting, comment=comment)
        write_whole(target, content)
        return target

    def describe(self) -> dict[str, Any]:
        """Everything but the values; JSON-ready."""
        return self._described(clip=self.clip.to_dict())

    @classmethod
    def stored_place(cls, record: Mapping[str, Any]) -> dict[str, Any]:
        """The clip, by name. Raises ``ValueError`` for a heatmap of an image."""
        if "clip" not in record:
            raise ValueError("it is of an image: Heatmap.read")
        return {"clip": Clip.from_dict(record["clip"])}

    def _repr_html_(self) -> str:
        if self.values is None:
            return self._card(None, self.reason or "")
        try:
            png = self._png(self.overlay())
        except ImageError as error:
            return self._card(None, str(error))
        grid = " × ".join(map(str, self.values.shape))
        return self._card(png, f"not checked: evaluate(heat, replay) says whether to believe it · grid {grid}")

    def shown(self, number: int, side: int, **look: Any) -> Image.Image:
        """One frame with its part of the heatmap, stretched by the highest value of all frames.

        Args:
            number: of the frame, counted from the clip's first.
            side: its longest side, pixels.
            **look: ``alpha``, ``colormap`` and ``mark`` of ``drawing.overlay``.
        """
        peak = float(self.known_values().max())
        width, height = self.image_size
        scale = side / max(width, height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        frame = self.image(number).resize(size, Image.Resampling.BICUBIC)
        heat = self.frame(number)
        assert heat.values is not None
        return drawing.overlay(frame, heat.values, seen=heat.seen, peak=peak, **look)

    def when(self, number: int) -> str:
        """When a frame is shown, in words: seconds, or its number where they are not known."""
        times = self.clip.times
        return f"frame {number}" if times is None else f"{times[number]:.1f} s"

    # ------------------------------------------------------------------------------------------------------- inside

    def _known_frame(self, number: int) -> None:
        if not (is_whole(number) and 0 <= int(number) < self.clip.frames):
            raise ExplainError(f"frame {number!r} of a video of {self.clip.frames} frames, counted from 0")

    def _frames(self, steps: np.ndarray) -> np.ndarray:
        """Steps in time ``(t, row, col)`` as frames ``(frame, row, col)``, as masks are brought to them."""
        alone = dataclasses.replace(self.clip, first=0)
        found: np.ndarray = over_frames(torch.from_numpy(np.array(steps))[None], alone, self.clip.frames)[0].numpy()
        return found

    def _lasting(self) -> float:
        times = self.clip.times
        if times is None or len(times) < 2:
            return 0.5
        return min(1.0, max(0.1, (times[-1] - times[0]) / (len(times) - 1)))

    def _curve(self, sheet: Image.Image, top: int, shown: list[int]) -> None:
        """The mean over time as a line, from 0 to its highest, with a point for each frame that is shown."""
        curve, pencil = self.over_time, ImageDraw.Draw(sheet)
        highest, width = float(curve.max()) or 1.0, sheet.width - 1
        bottom = top + _CURVE
        pencil.line([(0, bottom), (width, bottom)], fill=(200, 200, 200))
        across = [round((k + 0.5) / len(curve) * width) for k in range(len(curve))]
        points = [(x, bottom - round(float(v) / highest * (_CURVE - 4))) for x, v in zip(across, curve, strict=True)]
        if len(points) > 1:
            pencil.line(points, fill=_LINE, width=2, joint="curve")
        for number in shown:
            x, y = points[number]
            pencil.ellipse([x - 3, y - 3, x + 3, y + 3], fill=_LINE)
        font = ImageFont.load_default(_TEXT)
        told = f"mean of the heatmap in each frame, highest {highest:.2g} at {self.when(int(curve.argmax()))}"
        pencil.text((0, bottom + _GAP), told, font=font, fill=_INK)


def film_sheet(images: Sequence[Image.Image], clip: Clip) -> Image.Image:
    """At most eight frames of a clip, evenly spaced, two beside each other, each with when it is shown; RGB.

    Args:
        images: of the prompt.
    """
    chosen = clip.spread(_TILES)
    rows, columns = _tiling(len(chosen))
    width, height = images[clip.first].size
    sheet = Image.new("RGB", (columns * width, rows * height), _PAPER)
    pencil, font = ImageDraw.Draw(sheet), ImageFont.load_default(max(8, width // 10))
    for place, number in enumerate(chosen):
        left, top = place % columns * width, place // columns * height
        sheet.paste(images[clip.first + number].convert("RGB").resize((width, height)), (left, top))
        when = f"{number}" if clip.times is None else f"{clip.times[number]:.1f} s"
        pencil.rectangle(pencil.textbbox((left + 2, top + 1), when, font=font), fill=_PAPER)
        pencil.text((left + 2, top + 1), when, font=font, fill=_INK)
    return sheet


def _tiling(count: int) -> tuple[int, int]:
    """Rows and columns of a sheet."""
    columns = min(count, 2)
    return -(-count // columns), columns


def _gif(frames: Sequence[Image.Image], *, seconds: float, comment: str) -> bytes:
    buffer = io.BytesIO()
    frames[0].save(
        buffer, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 * seconds), loop=0,
        comment=comment.encode(),
    )  # fmt: skip
    return buffer.getvalue()
