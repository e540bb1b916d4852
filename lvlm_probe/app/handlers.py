"""What a visitor does on the app's page, handed to the ``Service``, and what comes of it, as the page shows it.

Every handler takes what the page sends, which may be anything, and ends in a sentence where that cannot be done. What a
visitor has open stands in a state of the visitor's own (``gr.State``), on the server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from lvlm_probe.app.markup import MASK_CELLS, SIDE, facts_of, lens_table, lens_view
from lvlm_probe.app.service import Service
from lvlm_probe.cards import answer_html, text_html
from lvlm_probe.demo import Scene
from lvlm_probe.errors import ProbeError
from lvlm_probe.heatmap_store import MapFile
from lvlm_probe.pages.data_uris import data_uri, shrink
from lvlm_probe.pages.plain import without_folders
from lvlm_probe.trace import Trace

_log = logging.getLogger("lvlm_probe")


@dataclass(frozen=True)
class _Open:
    """What a visitor has open on one panel: an answer, and of it the word, the map and the image on show."""

    model: str
    trace: Trace
    word: int | None = None
    found: MapFile | None = None
    number: int = 0

    @property
    def image(self) -> Image.Image:
        return self.trace.images[self.number]


class Handlers:
    """The handlers of one service, named ``on_`` and what was done.

    Args:
        service: does it.
        gr: the module ``gradio``.
        scenes: what the thumbnails show.
    """

    def __init__(self, service: Service, gr: Any, scenes: list[Scene]) -> None:
        self.service, self.gr, self.scenes = service, gr, scenes

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """In the block every error is what a visitor reads: a ``ProbeError`` as its sentence, any other by its kind.

        The log has that one whole.
        """
        try:
            yield
        except ProbeError as error:
            raise refusal(self.gr, error) from error
        except Exception as error:
            _log.exception("a request of a visitor failed")
            told = f"something unexpected happened ({type(error).__name__}): try it again in another way"
            raise refusal(self.gr, ProbeError(told)) from error

    def said(self, handler: Callable[..., Any], *, clicked: bool = False) -> Callable[..., Any]:
        """A handler as Gradio calls it: it is given what shows how far it is, and what was clicked; a visitor reads its
        errors as sentences."""
        gr = self.gr

        idle = gr.Progress()  # Gradio knows by the default that progress is wanted

        def call(progress: Any, *args: Any) -> Any:
            @contextlib.contextmanager
            def shown(title: str) -> Iterator[Any]:
                yield lambda done, total: progress((done, total), desc=title)

            with self.refusing():
                return handler(shown, *args)

        if clicked:

            def of_click(event: Any, progress: Any = idle, *args: Any) -> Any:
                return call(progress, vars(event)["_data"] or {}, *args)

            of_click.__annotations__ = {"event": gr.EventData}
            return of_click

        def plain(progress: Any = idle, *args: Any) -> Any:
            return call(progress, *args)

        return plain

    def on_enter(self, visitor: Any) -> str:
        with contextlib.suppress(ProbeError):
            self.service.folder_of(visitor)
            return str(visitor)
        return self.service.new_visitor()

    def on_scene(self, _shown: Any, click: Mapping[str, Any]) -> tuple[Image.Image | str | None, ...]:
        scene = self.scenes[(_whole(click.get("scene")) or 0) % len(self.scenes)]
        return scene.image, scene.question, *[None] * (self.service.limits.images - 1)

    def on_model(self, _shown: Any, model: str) -> Any:
        methods = self.service.methods(model)
        return self.gr.Dropdown(methods, value=methods[0])

    def on_typed(self, own: Any, first: Any) -> str:
        return str(own or "").strip() or str(first or "")

    def on_ask(self, model: str, image: Any, question: Any, visitor: str, *more: Any) -> Iterator[tuple[Any, ...]]:
        keep, stop = self.gr.skip(), threading.Event()
        try:
            with self.refusing():
                for found in self.service.ask(model, [image, *more], str(question or ""), visitor, stop):
                    if isinstance(found, Trace):
                        yield self.shown(_Open(model, found))
                    elif found:
                        yield keep, f'<p dir="auto" class="lp-growing">{text_html(found)}</p>', keep, keep
        finally:
            stop.set()

    def on_word(self, shown: Any, click: Mapping[str, Any], now: _Open | None, method: str) -> tuple[Any, ...]:
        if (number := _whole(click.get("word"))) is None:
            raise ProbeError("that is no word of the answer")
        return self.explained(shown, now, number, method)

    def on_whole(self, shown: Any, now: _Open | None, method: str) -> tuple[Any, ...]:
        return self.explained(shown, now, None, method)

    def explained(self, shown: Any, now: _Open | None, word: int | None, method: str) -> tuple[Any, ...]:
        opened = _opened(now)
        found = self.service.explain(opened.model, opened.trace, word, method, shown, image=opened.number)
        return self.shown(dataclasses.replace(opened, word=word, found=found))

    def on_images(self, now: _Open | None) -> Any:
        """The choice of an image, where there are several."""
        numbers = [str(number + 1) for number in range(1 if now is None else len(now.trace.header.image_sizes))]
        return self.gr.Radio(numbers, value="1" if now is None else str(now.number + 1), visible=len(numbers) > 1)

    def on_image(self, _shown: Any, now: _Open | None, choice: Any) -> tuple[Any, ...]:
        opened, number = _opened(now), (_number(choice) or 0) - 1
        if not 0 <= number < len(opened.trace.header.image_sizes):
            raise ProbeError(f"the question has no image {str(choice)[:40]!r}")
        return self.shown(dataclasses.replace(opened, number=number, found=None))

    def on_check(self, shown: Any, now: _Open | None) -> tuple[Any, ...]:
        opened = _opened(now)
        if opened.found is None:
            raise ProbeError("there is no map yet: click a word, or explain the whole answer")
        self.service.check(opened.model, opened.trace, opened.found, shown)
        return self.shown(opened)

    def on_save(self, _shown: Any, now: _Open | None) -> str:
        return str(self.service.page(_opened(now).trace))

    def on_canvas(self, now: _Open | None) -> tuple[Any, ...]:
        if now is None:
            return self.gr.skip(), "", "", None
        return {"src": data_uri(shrink(now.image, SIDE)), "cells": MASK_CELLS}, "", "", None

    def on_painted(self, _shown: Any, click: Mapping[str, Any]) -> str:
        return _painted(click.get("mask"))

    def on_again(self, kind: Any, _shown: Any, now: _Open | None, mask: str) -> tuple[str, Image.Image]:
        opened = _opened(now)
        cells = [one == "1" for one in _painted(mask)] or [False] * MASK_CELLS**2
        region = np.array(cells).reshape(MASK_CELLS, MASK_CELLS)
        said, seen = self.service.say_again(opened.model, opened.trace, region, kind, image=opened.number)
        return f'<p dir="auto">{text_html(said)}</p>', shrink(seen, SIDE)

    def on_rows(self, now: _Open | None) -> tuple[Any, Any]:
        """What can be chosen of the attention of an answer."""
        rows = None if now is None else now.trace.attention
        heads = 0 if now is None else self.service.heads(now.model)
        layers = [] if rows is None else [str(layer) for layer in rows.layers]
        return tuple(
            self.gr.Dropdown(["all", *names], value="all") for names in (layers, [str(head) for head in range(heads)])
        )  # type: ignore[return-value]

    def on_attention(self, _shown: Any, now: _Open | None, layer: Any, head: Any) -> tuple[Any, ...]:
        opened = _opened(now)
        which: dict[str, Any] = {"layer": _number(layer), "head": _number(head), "image": opened.number}
        heat = self.service.attention(opened.model, opened.trace, opened.word, **which)
        return heat.preview(SIDE) if heat.values is not None else shrink(opened.image, SIDE), facts_of(heat, None)

    def on_lens(self, _shown: Any, now: _Open | None) -> tuple[Any, ...]:
        opened = _opened(now)
        lens = self.service.lens(opened.model, opened.trace, image=opened.number)
        last = len(lens.words) - 1
        said = "".join(f"<p>{text_html(note)}</p>" for note in (*lens.notes, "Click a cell to see it in every layer."))
        return (
            (opened.trace, opened.number, lens), self.gr.Slider(0, max(1, last), value=last, visible=last > 0),
            lens_view(opened.image, lens, last), said,
        )  # fmt: skip

    def on_layer(self, _shown: Any, now: _Open | None, found: Any, layer: Any) -> Image.Image:
        image, lens = self.read_lens(now, found)
        return lens_view(image, lens, max(0, min(_number(layer) or 0, len(lens.words) - 1)))

    def on_cell(self, _shown: Any, click: Mapping[str, Any], now: _Open | None, found: Any) -> str:
        image, lens = self.read_lens(now, found)
        index = click.get("index")
        if not isinstance(index, list) or len(index) != 2 or not all(isinstance(one, int | float) for one in index):
            raise ProbeError("that is no place in the image")
        scale = max(image.size) / SIDE
        return lens_table(lens, lens.at(index[0] * scale, index[1] * scale))

    def read_lens(self, now: _Open | None, found: Any) -> tuple[Image.Image, Any]:
        if found is None or now is None or found[:2] != (now.trace, now.number):
            raise ProbeError("the layers of this answer are not read yet: press “Read the layers”")
        return now.image, found[2]

    def on_history(self, _shown: Any, visitor: str) -> str:
        rows = "".join(
            f'<li><button type="button" data-name="{html.escape(one.path.name)}"><b>{text_html(one.question)}</b> '
            f"{text_html(one.answer)}<small>{text_html(one.created[:16].replace('T', ' '))} UTC · "
            f"{text_html(without_folders(one.model))}</small></button></li>"
            for one in self.service.history(visitor)[:100]
        )
        return f"<ul>{rows}</ul>" if rows else "<p>No answers yet. They stay in this browser's own list.</p>"

    def on_open(self, _shown: Any, click: Mapping[str, Any], model: str, visitor: str) -> tuple[Any, ...]:
        return self.shown(_Open(model, self.service.open(visitor, str(click.get("name", "")))))

    def shown(self, now: _Open) -> tuple[Any, ...]:
        """What the panel shows of an answer: state, words, map, facts."""
        trace = now.trace
        marked: set[int] = set()
        view, facts = shrink(now.image, SIDE), "<p>Click a word to see its map.</p>"
        if trace.llr is None:
            facts = "<p>Words are not coloured: no log-likelihood ratios are known here. Click one for its map.</p>"
        if now.found is not None:
            heat, score = now.found.read(), now.found.score()
            marked = set(heat.selection.indices)
            if heat.values is not None:
                view = heat.preview(SIDE, score=score)  # type: ignore[union-attr]
            facts = facts_of(heat, score)
        llr = None if trace.llr is None else trace.llr.tolist()
        words = answer_html(trace.tokens, trace.special.tolist(), llr=llr, marked=marked, clickable=True)
        return now, words, view, facts


def _opened(now: _Open | None) -> _Open:
    if now is None:
        raise ProbeError("there is no answer yet: ask first")
    return now


def _number(value: Any) -> int | None:
    """The number of a layer or head, ``None`` for all. Raises ``ProbeError`` for what is neither."""
    if value is None or value == "all":
        return None
    if (number := _whole(value)) is None:
        raise ProbeError(f"this is no number of a layer or a head: {str(value)[:40]!r}")
    return number


def _whole(value: Any) -> int | None:
    """A number that counts something, of up to nine digits; ``None`` for what is none."""
    text = str(value)
    return int(text) if text.isdecimal() and len(text) < 10 else None


def _painted(mask: Any) -> str:
    """What is painted, a digit for each cell; empty for what is none of that."""
    text = str(mask or "")
    return text if len(text) == MASK_CELLS * MASK_CELLS and set(text) <= {"0", "1"} else ""


def refusal(gr: Any, error: ProbeError) -> Any:
    """What the visitor reads of an error: nothing of the operator's folders. Gradio takes its message for HTML."""
    told = html.escape(without_folders(str(error)))
    return gr.Error(told, title="Not done", duration=None, print_exception=False)
