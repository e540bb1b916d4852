"""What the app does for its visitors: answer, explain, check, hide a part, look inside; each a call without looks.

Models are loaded once and belong to everybody; one request at a time runs on them (``Service.turn``), and others wait.
Everything else belongs to one visitor: each has a folder of traces of its own, named by a digest of a secret that the
visitor's browser keeps, and a trace is opened by its name inside that folder alone. What a visitor sends is an image,
which Pillow decodes within ``Limits``, text, and numbers; no file of a visitor is opened as anything else.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import re
import secrets
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from lvlm_probe.app.answering import answer_growing
from lvlm_probe.causal import logit_lens
from lvlm_probe.errors import ImageError, ProbeError
from lvlm_probe.evidence import edit
from lvlm_probe.explainers import explain, methods, needs_of
from lvlm_probe.heatmap_store import MapFile, MapSettings, Shown, explain_one, find_maps, score_one
from lvlm_probe.images import make_baseline
from lvlm_probe.pages import report
from lvlm_probe.process import of_the_last
from lvlm_probe.recording.token_boxes import BoxCache
from lvlm_probe.replaying import replay
from lvlm_probe.selection import TokenSelection, select_tokens
from lvlm_probe.serving import Server
from lvlm_probe.trace import Trace, TraceSummary, open_store, open_trace
from lvlm_probe.trace.image_files import open_image_file

if TYPE_CHECKING:
    from lvlm_probe.causal import LogitLens
    from lvlm_probe.heatmap import Heatmap
    from lvlm_probe.metrics import Score

_REPLAYS = 8
"""Answers that are ready to be explained; one more, and the one that was asked for longest ago is opened anew."""
_LAST_SECONDS = 10.0
"""How long what runs on a model may take to its end when the app is closed."""
_SECRET = re.compile(r"[0-9a-f]{32}")
_CONTROLS = frozenset({"random", "center"})
"""Floors of tables, which explain nothing."""


@dataclass(frozen=True)
class Limits:
    """What a visitor may ask for.

    Attributes:
        file_bytes: of an uploaded image.
        pixels: of an image, counted before it is decoded.
        images: of one question.
        question: characters.
        answer: tokens of an answer at most.
        waiting: requests that wait; one more is told to come back.
        answers: kept in all where the folder is a temporary one; beyond that the oldest go.
    """

    file_bytes: int = 20_000_000
    pixels: int = 40_000_000
    images: int = 3
    question: int = 4_000
    answer: int = 128
    waiting: int = 32
    answers: int = 1_000


class Service:
    """Models, and what visitors ask of them.

    Args:
        models: name → (model, processor), or a server (``connect``) in their place; the first is the default.
        store: folder of the traces, one below it for each visitor; by default a temporary one, which goes with the
            process.
        limits: of visitors.

    Attributes:
        turn: held by whoever runs on a model.
    """

    def __init__(
        self, models: Mapping[str, Any], *, store: str | Path | None = None, limits: Limits = Limits()
    ) -> None:
        if not models:
            raise ProbeError("there is no model to serve: Service({name: (model, processor)})")
        self.models, self.limits = dict(models), limits
        self._temporary = None if store is not None else tempfile.TemporaryDirectory(prefix="lvlm_probe_app_")
        self.folder = Path(self._temporary.name if self._temporary else store or "").absolute()
        self.turn = threading.Lock()
        self.scratch = tempfile.mkdtemp(prefix="lvlm_probe_pages_")
        self._boxes: dict[str, BoxCache] = {}  # of all answers of a model
        self._replays: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._written: collections.deque[Path] = collections.deque()
        self._running: weakref.WeakSet[threading.Event] = weakref.WeakSet()  # what ends each answer that grows
        self._closed = False

    # ------------------------------------------------------------------ visitors

    @staticmethod
    def new_visitor() -> str:
        """Return the secret of a new visitor."""
        return secrets.token_hex(16)

    def folder_of(self, visitor: str) -> Path:
        """Return the folder of a visitor's traces. Raises ``ProbeError`` for what is no visitor's secret."""
        if not isinstance(visitor, str) or not _SECRET.fullmatch(visitor):
            raise ProbeError("this page has lost its visitor: load it again")
        return self.folder / hashlib.sha256(visitor.encode()).hexdigest()[:16]

    def history(self, visitor: str) -> list[TraceSummary]:
        """Return a visitor's answers, newest first; files that cannot be read are left out."""
        folder = self.folder_of(visitor)
        return open_store(folder).find(on_error=lambda error: None)[::-1] if folder.is_dir() else []

    def open(self, visitor: str, name: str) -> Trace:
        """Open a visitor's trace by its file name. Raises ``ProbeError`` where the visitor has none of that name."""
        found = next((one for one in self.history(visitor) if one.path.name == name), None)
        if found is None:
            raise ProbeError("there is no such answer among yours: ask again")
        return found.open()

    # ------------------------------------------------------------------ asking

    def open_upload(self, path: str | Path) -> Image.Image:
        """Open an uploaded image within the limits. Raises ``ImageError`` with a sentence for the visitor."""
        size = Path(path).stat().st_size
        if size > self.limits.file_bytes:
            raise ImageError(
                f"this file has {size / 1e6:.1f} MB, and {self.limits.file_bytes / 1e6:.0f} MB is the most here: save "
                "the image smaller"
            )
        try:
            return open_image_file(path, most_pixels=self.limits.pixels)
        except ImageError as error:
            raise ImageError(str(error).replace(str(path), "this file")) from error.__cause__

    def ask(
        self,
        name: str,
        images: Image.Image | Sequence[Image.Image | None] | None,
        question: str,
        visitor: str,
        stop: threading.Event | None = None,
    ) -> Iterator[str | Trace]:
        """Ask a model about an image, or several: yields the answer so far as it grows, and the trace at last.

        Args:
            name: of the model.
            images: one, or several in the order in which the model sees them; ``None`` among them is none.
            stop: ends the answer early when it is set; what was said until then is the answer.

        Raises:
            ProbeError: there is no image or no question, they are too large, or the model could not be asked.
        """
        model = self._model(name)
        folder = self.folder_of(visitor)
        given = [one for one in ([images] if isinstance(images, Image.Image) else images or ()) if one is not None]
        if not given:
            raise ImageError("there is no image yet: upload one, or take one of the gallery")
        if len(given) > self.limits.images:
            raise ImageError(f"these are {len(given)} images, and {self.limits.images} is the most of one question")
        if len(question) > self.limits.question:
            raise ProbeError(f"the question has {len(question)} characters, and {self.limits.question} is the most")
        if isinstance(model, Server):
            with self._a_turn():
                found: Any = iter([model.ask(given, question, out=folder, max_tokens=self.limits.answer)])
        else:
            boxes, stop = self._boxes.setdefault(name, {}), stop or threading.Event()
            self._running.add(stop)
            options: dict[str, Any] = {"most": self.limits.answer, "boxes": boxes, "stop": stop}
            found = answer_growing(self._a_turn(), model[0], model[1], given, question, folder, **options)
        for one in found:
            if isinstance(one, Trace):
                if one.status == "error":
                    raise ProbeError(f"the recording is faulty: {one.error}")
                self._keep_few(one.path)
            yield one

    @contextlib.contextmanager
    def _a_turn(self) -> Iterator[None]:
        """``turn``, held in the block. Raises ``ProbeError`` where the app has been closed while one waited for it."""
        with self.turn:
            if self._closed:
                raise ProbeError("the app has been closed: start it again")
            yield

    def _model(self, name: str) -> Any:
        if not isinstance(name, str) or name not in self.models:
            raise ProbeError(f"there is no model {str(name)[:80]!r} here; there are {', '.join(self.models)}")
        return self.models[name]

    def _keep_few(self, path: Path) -> None:
        """The oldest answers of a temporary folder go: strangers must not fill the disk."""
        if self._temporary is None:
            return
        self._written.append(path)
        while len(self._written) > self.limits.answers:
            old = self._written.popleft()
            with contextlib.suppress(ProbeError):  # one that is damaged or gone is no fault of this answer's
                for found in find_maps([open_trace(old).path]):
                    for file in (found.path, found.overlay_path, found.score_path):
                        file.unlink(missing_ok=True)
            old.unlink(missing_ok=True)
            shutil.rmtree(self._page_of(old).parent, ignore_errors=True)

    # ------------------------------------------------------------------ explaining

    def methods(self, name: str) -> list[str]:
        """Return the methods that a model can be explained by, the default first."""
        model = self._model(name)
        given = {"passes"} if isinstance(model, Server) else {"passes", "gradients", "attention", "activations"}
        best = "rise" if isinstance(model, Server) else "igos++"
        found = [one for one in methods() if needs_of(one) <= given and one not in _CONTROLS]
        return sorted(found, key=lambda one: one != best)

    def replay(self, name: str, trace: Trace) -> Any:
        """Return the replay of a trace on its model; the last few are kept. Raises ``ProbeError``."""

        def opened() -> Any:
            model = self._model(name)
            return replay(trace, *(model if isinstance(model, tuple) else (model,)))

        return of_the_last(self._replays, f"{name} {trace.path}", opened, most=_REPLAYS)

    def explain(
        self, name: str, trace: Trace, word: int | None, method: str, shown: Shown | None = None, *, image: int = 0
    ) -> MapFile:
        """Explain a word of an answer, by its number, or what the image decides of all of it; kept beside the trace.

        Args:
            name: of the model.
            image: number of the image that the map is of.

        Raises:
            ProbeError: no such word, image or method, or the method cannot run on this model.
        """
        if method not in self.methods(name):
            raise ProbeError(f"{name} cannot be explained by {str(method)[:40]!r}; take one of {self.methods(name)}")
        with self._a_turn():
            source = self.replay(name, trace)
            chosen = selection_of(source, word)
            label = "answer" if word is None else chosen.label
            settings = MapSettings(method, {}, image=image, scored=False)
            more = {} if shown is None else {"shown": shown}
            return explain_one(source, chosen, label, settings, trace.explanations_dir, **more)[0]

    def check(self, name: str, trace: Trace, found: MapFile, shown: Shown | None = None) -> Score:
        """Score a map by deletion and insertion; what was scored before is not scored again. Raises ``ProbeError``."""
        if (score := found.score()) is not None:
            return score
        with self._a_turn():
            more = {} if shown is None else {"shown": shown}
            return score_one(self.replay(name, trace), found, **more)

    def page(self, trace: Trace, out: Path | None = None) -> Path:
        """Write the page of all maps of an answer, by default over the one before. Raises ``ProbeError``, also where
        there are no maps yet."""
        if not (found := _maps(trace)):
            raise ProbeError("there is no map of this answer yet: click a word, or explain the whole answer")
        out = out or self._page_of(trace.path)
        return report([one.read() for one in found], scores=[one.score() for one in found], out=out, overwrite=True)

    def _page_of(self, trace: Path) -> Path:
        folder = hashlib.sha256(str(trace).encode()).hexdigest()[:32]
        return Path(self.scratch) / folder / "where-the-answer-came-from.html"

    # ------------------------------------------------------------------ asking again, looking inside

    def say_again(
        self, name: str, trace: Trace, region: np.ndarray, kind: Literal["keep", "remove"], *, image: int = 0
    ) -> tuple[str, Image.Image]:
        """Ask again with nothing but a region of the image, or without it.

        Args:
            region: ``(row, col)`` bool over the image, of any resolution.
            image: its number; others stay as they are.

        Returns:
            What it says then, in a sentence, and the image that it saw.

        Raises:
            ProbeError: nothing is painted, or the model cannot be asked again.
        """
        if not region.any():
            raise ProbeError("nothing is painted yet: take the brush, and paint over a part of the image")
        model = self._model(name)
        images = list(trace.images)
        whole = images[image]
        shown = Image.fromarray(region if kind == "keep" else ~region).convert("L").resize(whole.size)
        seen = Image.composite(whole, make_baseline(whole).image, shown)
        with self._a_turn():
            if isinstance(model, Server):
                with tempfile.TemporaryDirectory() as folder:
                    again = model.ask(
                        [*images[:image], seen, *images[image + 1 :]],
                        trace.question or "",
                        out=folder,
                        max_tokens=self.limits.answer,
                        llr=False,
                    )
                    share = f"{region.mean():.0%} of the image"
                    before = f"With nothing but this {share}" if kind == "keep" else f"Without this {share}"
                    return f"{before} it says “{again.answer}”.", seen
            words = [n for word in trace.words for n in range(word.start, word.stop)]
            return edit(self.replay(name, trace), tokens=words, image=image, **{kind: region}).sentence, seen  # type: ignore[arg-type]

    def attention(
        self, name: str, trace: Trace, word: int | None, layer: int | None, head: int | None, *, image: int = 0
    ) -> Heatmap:
        """Attention of a word, or of the whole answer, to the image: as recorded; of a single head by one more pass.

        Raises:
            ProbeError: there is no such layer or head, or nothing is known of attention (a server).
        """
        if isinstance(self._model(name), Server):
            raise ProbeError(
                f"{name} runs on a server, which gives no attention: serve the model itself, --model DIR_OR_ID"
            )
        wanted: dict[str, Any] = {"layers": "all" if layer is None else layer, "heads": "all" if head is None else head}
        chosen = selection_of(trace, word, everything=True)
        rows = trace.attention
        if rows is not None and (head is None or rows.reduce == "none"):
            return explain(trace, method="attention", tokens=chosen, image=image, **wanted)
        with self._a_turn():
            source = self.replay(name, trace)
            return explain(source, method="attention", tokens=chosen, image=image, progress=False, **wanted)

    def heads(self, name: str) -> int:
        """Return how many attention heads a layer of a model has; 0 where that is not known (a server)."""
        model = self._model(name)
        config = getattr(model[0], "config", None) if isinstance(model, tuple) else None
        text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
        return int(getattr(text, "num_attention_heads", 0) or 0)

    def lens(self, name: str, trace: Trace, *, image: int = 0) -> LogitLens:
        """Return the logit lens at tokens of an image. Raises ``ProbeError``."""
        if isinstance(self._model(name), Server):
            raise ProbeError(
                f"{name} runs on a server, which shows nothing of its layers: serve the model itself, --model DIR_OR_ID"
            )
        with self._a_turn():
            return logit_lens(self.replay(name, trace), image=image)

    def close(self) -> None:
        """End the answers that grow, and delete what is temporary. What is asked from now on is refused."""
        self._closed = True
        for stop in list(self._running):
            stop.set()
        if self.turn.acquire(timeout=_LAST_SECONDS):  # whoever runs would write into folders that are gone
            self.turn.release()
        shutil.rmtree(self.scratch, ignore_errors=True)
        if self._temporary is not None:
            self._temporary.cleanup()


def selection_of(source: Any, word: int | None, *, everything: bool = False) -> TokenSelection:
    """Select a word of an answer by its number; without one what the image decides, or with ``everything`` all of it.

    Raises:
        ProbeError: the answer has no such word.
    """
    if word is None:
        return select_tokens(source, rule="joint" if everything or source.llr is None else "llr")
    words = source.words
    if not isinstance(word, int) or not 0 <= word < len(words):
        raise ProbeError(f"the answer has {len(words)} words, and none of number {word}")
    return select_tokens(source, span=(words[word].start, words[word].stop))


def _maps(trace: Trace) -> list[MapFile]:
    try:
        return find_maps([trace.path])
    except ProbeError:
        return []
