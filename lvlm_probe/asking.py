"""One question about images or a video, from asking to a figure: ``ask`` records, replays and explains in one line.

    answer = probe.ask(model, processor, "photo.jpg", "What is on the table?")
    answer.explain("mug")
    answer.figure("figure.pdf")
    answer.report("report.html")

It stands on the verbs of the package and adds nothing to them: ``answer.trace`` and ``answer.replay`` lead on to all of
them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lvlm_probe.cards import answer_html, card, text_html
from lvlm_probe.errors import ImageError
from lvlm_probe.escaping import counted
from lvlm_probe.explainers import explain
from lvlm_probe.heatmap import Heatmap, figure
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.metrics import Score, evaluate
from lvlm_probe.models.exhaustion import told_out_of_memory
from lvlm_probe.pages import report
from lvlm_probe.recording.answering import record_answer
from lvlm_probe.replaying import Replay, replay
from lvlm_probe.replaying.views import OnItsModel
from lvlm_probe.trace.image_files import open_image
from lvlm_probe.trace.video_files import is_video_name
from lvlm_probe.video import ClipHeatmap
from lvlm_probe.video import explain as explain_clip

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from lvlm_probe.trace import Trace
    from lvlm_probe.words import Word


@naming_arguments
@told_out_of_memory
def ask(
    model: torch.nn.Module,
    processor: Any,
    image: Any = None,
    question: str = "",
    *,
    video: Any = None,
    num_frames: int | None = None,
    fps: float | None = None,
    out: str | os.PathLike[str] | None = None,
    fetch: bool = False,
    prompt: str | None = None,
    max_new_tokens: int = 128,
    **generate: Any,
) -> Answer:
    """Ask a model about an image or a video, and keep what it takes to explain the answer.

    The prompt is the processor's chat template with images first, then videos, then the question; decoding is greedy
    unless ``do_sample=True`` is given. Families without a chat template (BLIP-2, Kosmos-2, Florence-2, ...) are asked
    as their model cards say. For conversations of your own: ``attach`` and ``record``.

    Args:
        model: any that ``attach`` takes.
        processor: its processor.
        image: one image, or a list of several, of any kind that ``open_image`` opens. A file named like a video
            (``.mp4``, ``.webm``, …) is one.
        question: what is asked. Captioners and readers (BLIP, Donut, TrOCR, ...) take none; their task, or how the
            answer begins, is ``prompt``.
        video: one video, or a list of several: a file (MP4, WebM, GIF, …; ``pip install 'lvlm-probe[video]'``), or an
            array ``(frame, row, col, channel)`` of uint8; one may also be a list of images.
        num_frames, fps: how many frames of a video the processor samples, in all or in a second; by default as it does
            by itself, or of a file 16, where it would take all.
        out: folder to keep the trace in; by default one that goes when nothing that was made of the answer is left.
        fetch: ask the network for images given as URLs.
        prompt: how the question is put, instead: a text with ``{question}`` and, where the processor wants image tokens
            written out, ``{images}``, as in ``"Question: {question} Answer:"``.
        max_new_tokens: length of the answer at most, tokens.
        **generate: further arguments of ``model.generate``.

    Raises:
        AttachError: the model cannot be probed, or is probed already.
        ImageError: an image or a video cannot be opened.
        ProbeError: the question is missing, or the model takes none, or the answer could not be recorded; the message
            says why.
    """
    given = [] if image is None else list(image) if isinstance(image, list | tuple) else [image]
    images = [open_image(one, fetch=fetch) for one in given if not is_video_name(one)]
    videos = [*filter(is_video_name, given), *_videos(video)]
    if not images and not videos:
        raise ImageError("there is nothing to ask about: give image=…, or video=…")
    folder = tempfile.TemporaryDirectory(prefix="lvlm_probe_answer_") if out is None else None
    directory = Path(folder.name) if folder is not None else Path(out or "")
    options = {"max_new_tokens": max_new_tokens, **generate}
    trace = record_answer(
        model, processor, images, question, directory, videos=videos, num_frames=num_frames, fps=fps, generate=options,
        prompt=prompt,
    )  # fmt: skip
    return Answer(trace, replay(trace, model, processor), folder)


def _videos(video: Any) -> list[Any]:
    """Videos one by one. A list of images is the frames of one."""
    if video is None:
        return []
    if isinstance(video, list | tuple) and not all(isinstance(frame, Image.Image) for frame in video):
        return list(video)
    return [video]


class Answer(OnItsModel):
    """An answer with all that explains it; what was explained is kept, with its score, for figures and reports.

    Attributes:
        trace: What was recorded.
        replay: The answer as a function of masks.
    """

    _called = "an answer"
    _instead = "its trace and what it has explained (answer.trace, with out=… at ask, and answer.explained)"

    def __init__(self, trace: Trace, replay: Replay, folder: tempfile.TemporaryDirectory[str] | None = None) -> None:
        self.trace, self.replay = trace, replay
        trace.holds = folder
        self._explained: list[tuple[Heatmap | ClipHeatmap, Score | None]] = []

    def __copy__(self) -> Answer:
        """The answer on the same model; what either explains from now on is its own."""
        other = super().__copy__()
        vars(other)["_explained"] = list(self._explained)
        return other

    @property
    def text(self) -> str:
        """The answer, without special tokens."""
        return self.trace.answer

    @property
    def words(self) -> list[Word]:
        """The words of the answer as spans of tokens."""
        return self.trace.words

    @property
    def explained(self) -> tuple[tuple[Heatmap | ClipHeatmap, Score | None], ...]:
        """The maps made so far with their scores, in the order of making."""
        return tuple(self._explained)

    def explain(
        self, words: str | Sequence[str] | None = None, *, method: str = "igos++", check: bool = True, **options: Any
    ) -> Heatmap | ClipHeatmap:
        """Explain the answer or some of its words, and check the map by deletion and insertion.

        Args:
            words: one word, several, or ``None``: what the image decides of the whole answer. In full: ``tokens`` of
                ``explain``.
            method: one of ``lvlm-probe methods``.
            check: evaluate the map; otherwise pages and figures say "not checked".
            **options: ``image`` or, of a video, ``clip``, ``seed``, ``progress``, ``search_dtype`` and the method's
                parameters. An answer about a video is explained by that unless ``image`` is given.

        Returns:
            The map. Its score is the last of ``explained``.
        """
        tokens: Any = [words] if isinstance(words, str) else words
        by_clip = bool(self.replay.clips) and "image" not in options
        heat = (explain_clip if by_clip else explain)(self.replay, method=method, tokens=tokens, **options)
        self._explained.append((heat, evaluate(heat, self.replay) if check else None))
        return heat

    def figure(self, path: str | os.PathLike[str] | None = None, **look: Any) -> Figure:
        """A figure for print of all maps made so far, of the whole answer if there is none; see ``heatmap.figure``."""
        heats: Any
        heats, scores = self._shown()
        return figure(heats, scores=scores, out=path, **look)

    def report(self, path: str | os.PathLike[str] = "report.html", **options: Any) -> Path:
        """Write one HTML page of all maps made so far, in the place of an earlier one; see ``report``."""
        heats, scores = self._shown()
        return report(heats, scores=scores, out=path, **options)

    def _shown(self) -> tuple[list[Heatmap | ClipHeatmap], list[Score | None]]:
        if not self._explained:
            self.explain()
        return [heat for heat, _ in self._explained], [score for _, score in self._explained]

    def __repr__(self) -> str:
        return f"<Answer {self.text!r} to {self.trace.question!r}, {counted(len(self._explained), 'map')}>"

    def _repr_html_(self) -> str:
        llr = None if self.trace.llr is None else self.trace.llr.tolist()
        words = answer_html(self.trace.tokens, self.trace.special.tolist(), llr=llr)
        maps = f"{counted(len(self._explained), 'map')} so far" if self._explained else ""
        facts = [maps, "" if llr is None else "shaded: words that the image decides (log-likelihood ratio)"]
        return card("Answer", f'<br><span dir="auto">{text_html(self.trace.question or "")}</span>', words, facts=facts)
