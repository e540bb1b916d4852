"""The app's page, on Gradio: what a visitor does, handed to the ``Service``, and what comes of it, shown.

Every handler takes what the page sends, which may be anything, and ends in a sentence where that cannot be done. What a
visitor has open stands in a state of the visitor's own (``gr.State``), on the server. All that runs on a model goes
through one queue. Texts come onto the page escaped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import html
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lvlm_probe import demo
from lvlm_probe.app.page_limits import Fence
from lvlm_probe.app.service import Service
from lvlm_probe.cards import answer_html, text_html
from lvlm_probe.errors import ImageError, ProbeError
from lvlm_probe.extras import require
from lvlm_probe.heatmap_store import MapFile
from lvlm_probe.pages.data_uris import data_uri, shrink
from lvlm_probe.pages.plain import plain, without_folders
from lvlm_probe.pages.samples import verdict_of
from lvlm_probe.trace import Trace

_SIDE = 900
"""Longest side of an image on the page, pixels."""
_MASK = 64
"""Cells of the painted mask along a side."""
_SCENES = 8
_MODEL = {"concurrency_id": "model", "concurrency_limit": 1}
"""Of all that runs on a model: one at a time, whoever asks."""


@dataclass(frozen=True)
class _Open:
    """What a visitor has open on one panel: an answer, and of it the word and the map on show."""

    model: str
    trace: Trace
    word: int | None = None
    found: MapFile | None = None


def _gradio() -> Any:
    # Read when it is imported; nothing is told to anybody.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    return require("gradio", extra="app", purpose="the app")


def _asset(name: str) -> str:
    return resources.files("lvlm_probe.app").joinpath("assets", name).read_text(encoding="utf-8")


def application(service: Service) -> Any:
    """Return the app as an ASGI application, for a server of your own (``uvicorn.run``). Raises ``ProbeError`` where
    Gradio is not installed."""
    gr = _gradio()
    fastapi = require("fastapi", extra="app", purpose="the app")
    blocks = _Page(service, gr).blocks()
    outer = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    theme = gr.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400")
    gr.mount_gradio_app(
        outer, blocks, path="/", theme=theme, css=_asset("app.css"), show_error=False, run_history=False,
        ssr_mode=False, max_file_size=service.limits.file_bytes, footer_links=[], enable_monitoring=False, pwa=False,
        mcp_server=False,
    )  # fmt: skip
    return Fence(outer, service.limits.file_bytes + 1_000_000)


def serve(service: Service, *, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve the app until Ctrl-C.

    Args:
        host: address to listen on; the default lets nobody in from other machines.
        port: its port.

    Raises:
        ProbeError: Gradio is not installed.
    """
    app = application(service)
    uvicorn = require("uvicorn", extra="app", purpose="the app")
    uvicorn.run(app, host=host, port=port, log_level="warning")


class _Page:
    """The page of one service. Methods that begin with ``on_`` are handlers."""

    def __init__(self, service: Service, gr: Any) -> None:
        self.service, self.gr = service, gr
        self.scenes = demo.scenes(_SCENES)
        self.names = list(service.models)

    # ------------------------------------------------------------------ layout

    def blocks(self) -> Any:
        gr = self.gr
        with gr.Blocks(title="lvlm_probe", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
            gr.HTML(
                "<h1>lvlm_probe</h1><p>Ask about an image. Warm words are those that the image decides; "
                "click one to see where it came from.</p>",
                elem_classes="lp-head",
            )
            visitor = gr.BrowserState("", storage_key="lvlm-probe-visitor", secret="lvlm-probe")
            page.load(self.on_enter, visitor, visitor, api_name=False, queue=False)
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    image = _upload(gr, self.service, label="Image", sources=["upload", "clipboard"], height=300)
                    scenes = gr.HTML(self.thumbnails(), js_on_load=_asset("clicks.js"), elem_classes="lp-scenes")
                    question = gr.Textbox(label="Question", placeholder="What color is the circle?", lines=1)
                    model = self.model_choice()
                    with gr.Row():
                        ask = gr.Button("Ask", variant="primary", min_width=80)
                        stop = gr.Button("Stop", min_width=80)
                with gr.Column(scale=3, min_width=320), gr.Tabs():
                    with gr.Tab("Answer"):
                        panel = self.panel(model, image, question, visitor, [ask.click, question.submit], stop)
                    with gr.Tab("Only this part"):
                        self.part(panel)
                    with gr.Tab("Attention"):
                        self.attention(panel)
                    with gr.Tab("Layers"):
                        self.lens(panel)
                    with gr.Tab("Compare"):
                        self.compare(image, question, visitor)
                    with gr.Tab("History") as history:
                        self.history(history, panel, visitor)
            scenes.click(self.said(self.on_scene, clicked=True), None, [image, question], api_name=False, queue=False)
        page.queue(max_size=self.service.limits.waiting, api_open=False)
        return page

    def thumbnails(self) -> str:
        """The embedded model's scenes as buttons."""
        shown = [(data_uri(shrink(one.image, 200)), html.escape(one.question)) for one in self.scenes]
        buttons = [
            f'<button type="button" data-scene="{number}" title="{asked}"><img src="{source}" alt="{asked}"></button>'
            for number, (source, asked) in enumerate(shown)
        ]
        return f"<p>Or one of these:</p><div>{''.join(buttons)}</div>"

    def model_choice(self) -> Any:
        several = len(self.names) > 1
        return self.gr.Dropdown(self.names, value=self.names[0], label="Model", visible=several, min_width=120)

    def panel(
        self, model: Any, image: Any, question: Any, visitor: Any, asks: list[Any], stop: Any, *, side: str = "answer"
    ) -> dict[str, Any]:
        """An answer with its words, the map of the clicked one, and what is known of it."""
        gr = self.gr
        state = gr.State(None, time_to_live=3600)
        words = gr.HTML(
            "", js_on_load=_asset("clicks.js"), elem_classes="lp-words", elem_id=f"words-{side}", min_height=48
        )
        height = 380 if side == "answer" else 280
        view = gr.Image(label="Map", interactive=False, height=height, buttons=["fullscreen", "download"])
        with gr.Row(equal_height=True, elem_classes="lp-tools"):
            method = gr.Dropdown(self.service.methods(self.names[0]), label="Method", min_width=140)
            whole = gr.Button("Explain all of it", size="sm", min_width=100)
            check = gr.Button("Check this map", size="sm", min_width=100)
            save = gr.Button("Save as a page", size="sm", min_width=100)
        facts = gr.HTML("", elem_classes="lp-facts", elem_id=f"facts-{side}")
        file = gr.DownloadButton(visible="hidden", elem_id=f"page-{side}")
        shown = [state, words, view, facts]
        asked = gr.on(asks, self.on_ask, [model, image, question, visitor], shown, api_name=f"ask_{side}", **_MODEL)
        stop.click(None, cancels=[asked], api_name=False)
        words.click(self.said(self.on_word, clicked=True), [state, method], shown, api_name=False, **_MODEL)
        whole.click(self.said(self.on_whole), [state, method], shown, api_name=f"explain_{side}", **_MODEL)
        check.click(self.said(self.on_check), [state], shown, api_name=f"check_{side}", **_MODEL)
        made = save.click(self.said(self.on_save), [state], file, api_name=f"page_{side}")
        made.success(None, js=f"() => document.querySelector('#page-{side}').click()", api_name=False)
        model.change(self.said(self.on_model), model, method, api_name=False, queue=False)
        return {"state": state, "words": words, "view": view, "facts": facts, "model": model}

    def part(self, panel: Mapping[str, Any]) -> None:
        """A brush over the image, and the answer to what is painted alone, or to all but that."""
        gr = self.gr
        _told(gr, "Paint over a part of the image, and ask the same question again.")
        with gr.Row():
            with gr.Column(min_width=260):
                paint = {"html_template": _asset("paint.html"), "js_on_load": _asset("paint.js")}
                canvas = gr.HTML({"src": "", "cells": _MASK}, **paint)
            with gr.Column(min_width=260):
                seen = gr.Image(label="What the model saw", interactive=False, height=320, buttons=[])
        mask = gr.State("")
        with gr.Row():
            keep = gr.Button("If it sees only this?", variant="primary")
            remove = gr.Button("And without this?")
        said = gr.HTML("", elem_classes="lp-words", elem_id="said-part")
        panel["state"].change(self.on_canvas, panel["state"], [canvas, mask, said, seen], api_name=False, queue=False)
        canvas.input(self.said(self.on_painted, clicked=True), None, mask, api_name=False, queue=False)
        for button, kind in ((keep, "keep"), (remove, "remove")):
            again = functools.partial(self.on_again, kind)
            button.click(self.said(again), [panel["state"], mask], [said, seen], api_name=f"{kind}_part", **_MODEL)

    def attention(self, panel: Mapping[str, Any]) -> None:
        """Attention rows by layer and head."""
        gr = self.gr
        _told(
            gr,
            "Where the decoder looks while it predicts the word that was clicked, or all words: as recorded, the mean "
            "over heads; of a single head by one more pass.",
        )
        with gr.Row(equal_height=True, elem_classes="lp-tools"):
            layer = gr.Dropdown(["all"], value="all", label="Layer", min_width=100)
            head = gr.Dropdown(["all"], value="all", label="Head", min_width=100)
            show = gr.Button("Show", variant="primary", size="sm", min_width=80)
        view = gr.Image(label="Attention", interactive=False, height=380, buttons=["fullscreen"])
        facts = gr.HTML("", elem_classes="lp-facts")
        panel["state"].change(self.on_rows, panel["state"], [layer, head], api_name=False, queue=False)
        inputs = [panel["state"], layer, head]
        shown = self.said(self.on_attention)
        gr.on([show.click, layer.input, head.input], shown, inputs, [view, facts], api_name="attention", **_MODEL)

    def lens(self, panel: Mapping[str, Any]) -> None:
        """The logit lens: a word on each image token, and of one token all layers."""
        gr = self.gr
        _told(
            gr,
            "What the LM head reads off each image token behind a layer (the logit lens); click a cell for all layers. "
            "A word here is close to the state, which need not use it.",
        )
        lens = gr.State(None, time_to_live=3600)
        with gr.Row(equal_height=True, elem_classes="lp-tools"):
            read = gr.Button("Read the layers", variant="primary", size="sm", min_width=100)
            layer = gr.Slider(0, 1, step=1, label="Layer", visible=False, min_width=200)
        view = gr.Image(label="Words at image tokens", interactive=False, height=420, buttons=["fullscreen"])
        table = gr.HTML("", elem_classes="lp-facts", elem_id="lens-table")
        shown = [lens, layer, view, table]
        read.click(self.said(self.on_lens), panel["state"], shown, api_name="lens", **_MODEL)
        layer.release(self.said(self.on_layer), [panel["state"], lens, layer], view, api_name=False)
        view.select(self.said(self.on_cell, clicked=True), [panel["state"], lens], table, api_name=False)

    def compare(self, image: Any, question: Any, visitor: Any) -> None:
        """Two panels on one image."""
        gr = self.gr
        _told(gr, "The same image, two models or two questions: each side is asked and explained by itself.")
        with gr.Row():
            ask = gr.Button("Ask both", variant="primary", size="sm", min_width=80)
            stop = gr.Button("Stop", size="sm", min_width=80)
        with gr.Row():
            for side, model in (("left", self.names[0]), ("right", self.names[min(1, len(self.names) - 1)])):
                with gr.Column(min_width=280):
                    choice = self.model_choice()
                    choice.value = model
                    own = gr.Textbox(label="Question", placeholder="if it is another one")
                    asked = gr.State("")
                    typed, both = [own.change, question.change], [own, question]
                    gr.on(typed, self.on_typed, both, asked, api_name=False, queue=False)
                    self.panel(choice, image, asked, visitor, [ask.click], stop, side=side)

    def history(self, tab: Any, panel: Mapping[str, Any], visitor: Any) -> None:
        """The visitor's earlier answers; a click opens one."""
        gr = self.gr
        listed = gr.HTML("", js_on_load=_asset("clicks.js"), elem_classes="lp-history")
        again = gr.Button("Look again", size="sm", min_width=80)
        for event, name in ((tab.select, False), (again.click, "history")):
            event(self.said(self.on_history), visitor, listed, api_name=name, queue=False)
        shown = [panel[key] for key in ("state", "words", "view", "facts")]
        listed.click(self.said(self.on_open, clicked=True), [panel["model"], visitor], shown, api_name=False)

    # ------------------------------------------------------------------ handlers

    def said(self, handler: Callable[..., Any], *, clicked: bool = False) -> Callable[..., Any]:
        """A handler as Gradio calls it: it is given what shows how far it is, and what was clicked; a visitor reads its
        ``ProbeError`` as a sentence."""
        gr = self.gr

        idle = gr.Progress()  # Gradio knows by the default that progress is wanted

        def call(progress: Any, *args: Any) -> Any:
            @contextlib.contextmanager
            def shown(title: str) -> Iterator[Any]:
                yield lambda done, total: progress((done, total), desc=title)

            try:
                return handler(shown, *args)
            except ProbeError as error:
                raise _refusal(gr, error) from error

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

    def on_scene(self, _shown: Any, click: Mapping[str, Any]) -> tuple[Image.Image, str]:
        number = str(click.get("scene", ""))
        scene = self.scenes[int(number) % len(self.scenes) if number.isdecimal() else 0]
        return scene.image, scene.question

    def on_model(self, _shown: Any, model: str) -> Any:
        methods = self.service.methods(model)
        return self.gr.Dropdown(methods, value=methods[0])

    def on_typed(self, own: Any, first: Any) -> str:
        return str(own or "").strip() or str(first or "")

    def on_ask(self, model: str, image: Any, question: Any, visitor: str) -> Iterator[tuple[Any, ...]]:
        keep, stop = self.gr.skip(), threading.Event()
        try:
            for found in self.service.ask(model, image, str(question or ""), visitor, stop):
                if isinstance(found, Trace):
                    yield self.shown(_Open(model, found))
                elif found:
                    yield keep, f'<p dir="auto" class="lp-growing">{text_html(found)}</p>', keep, keep
        except ProbeError as error:
            raise _refusal(self.gr, error) from error
        finally:
            stop.set()

    def on_word(self, shown: Any, click: Mapping[str, Any], now: _Open | None, method: str) -> tuple[Any, ...]:
        number = str(click.get("word", ""))
        if not number.isdecimal():
            raise ProbeError("that is no word of the answer")
        return self.explained(shown, now, int(number), method)

    def on_whole(self, shown: Any, now: _Open | None, method: str) -> tuple[Any, ...]:
        return self.explained(shown, now, None, method)

    def explained(self, shown: Any, now: _Open | None, word: int | None, method: str) -> tuple[Any, ...]:
        opened = _opened(now)
        found = self.service.explain(opened.model, opened.trace, word, method, shown)
        return self.shown(dataclasses.replace(opened, word=word, found=found))

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
        return {"src": data_uri(shrink(now.trace.image, _SIDE)), "cells": _MASK}, "", "", None

    def on_painted(self, _shown: Any, click: Mapping[str, Any]) -> str:
        mask = str(click.get("mask", ""))
        return mask if len(mask) == _MASK * _MASK and set(mask) <= {"0", "1"} else ""

    def on_again(self, kind: Any, _shown: Any, now: _Open | None, mask: str) -> tuple[str, Image.Image]:
        opened = _opened(now)
        cells = [one == "1" for one in mask] or [False] * _MASK**2
        region = np.array(cells).reshape(_MASK, _MASK)
        said, seen = self.service.say_again(opened.model, opened.trace, region, kind)
        return f'<p dir="auto">{text_html(said)}</p>', shrink(seen, _SIDE)

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
        heat = self.service.attention(opened.model, opened.trace, opened.word, _number(layer), _number(head))
        return (heat.preview(_SIDE) if heat.values is not None else shrink(opened.trace.image, _SIDE)), _facts(
            heat, None
        )

    def on_lens(self, _shown: Any, now: _Open | None) -> tuple[Any, ...]:
        opened = _opened(now)
        lens = self.service.lens(opened.model, opened.trace)
        last = len(lens.words) - 1
        said = "".join(f"<p>{text_html(note)}</p>" for note in (*lens.notes, "Click a cell to see it in every layer."))
        return (
            (opened.trace, lens), self.gr.Slider(0, max(1, last), value=last, visible=last > 0),
            _lens_view(opened.trace.image, lens, last), said,
        )  # fmt: skip

    def on_layer(self, _shown: Any, now: _Open | None, found: Any, layer: Any) -> Image.Image:
        trace, lens = self.read_lens(now, found)
        return _lens_view(trace.image, lens, max(0, min(_number(layer) or 0, len(lens.words) - 1)))

    def on_cell(self, _shown: Any, click: Mapping[str, Any], now: _Open | None, found: Any) -> str:
        trace, lens = self.read_lens(now, found)
        index = click.get("index")
        if not isinstance(index, list) or len(index) != 2 or not all(isinstance(one, int | float) for one in index):
            raise ProbeError("that is no place in the image")
        scale = max(trace.image.size) / _SIDE
        return _lens_table(lens, lens.at(index[0] * scale, index[1] * scale))

    def read_lens(self, now: _Open | None, found: Any) -> tuple[Trace, Any]:
        if found is None or now is None or found[0] != now.trace:
            raise ProbeError("the layers of this answer are not read yet: press “Read the layers”")
        return found  # type: ignore[no-any-return]

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

    # ------------------------------------------------------------------ showing

    def shown(self, now: _Open) -> tuple[Any, ...]:
        """What the panel shows of an answer: state, words, map, facts."""
        trace = now.trace
        marked: set[int] = set()
        view, facts = shrink(trace.image, _SIDE), "<p>Click a word to see its map.</p>"
        if trace.llr is None:
            facts = "<p>Words are not coloured: no log-likelihood ratios are known here. Click one for its map.</p>"
        if now.found is not None:
            heat, score = now.found.read(), now.found.score()
            marked = set(heat.selection.indices)
            if heat.values is not None:
                view = heat.preview(_SIDE, score=score)  # type: ignore[union-attr]
            facts = _facts(heat, score)
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
    if not str(value).isdecimal():
        raise ProbeError(f"this is no number of a layer or a head: {str(value)[:40]!r}")
    return int(value)


def _told(gr: Any, text: str) -> None:
    gr.HTML(f"<p>{text}</p>", elem_classes="lp-facts")


def _upload(gr: Any, service: Service, **look: Any) -> Any:
    """Gradio's image field, which decodes nothing beyond the limits, and fetches nothing from the network.

    Its methods are replaced on the field itself: of every subclass Gradio writes a stub file beside this module.
    """
    field = gr.Image(**look)
    move = field.async_move_resource_to_block_cache

    def preprocess(payload: Any) -> Image.Image | None:
        if payload is None or not payload.path:
            return None
        try:
            return service.open_upload(payload.path)
        except ProbeError as error:
            raise _refusal(gr, error) from error

    async def local(url_or_file_path: Any) -> Any:
        if "://" in str(url_or_file_path):
            raise _refusal(gr, ImageError("images are uploaded, not fetched from an address"))
        return await move(url_or_file_path)

    field.preprocess, field.async_move_resource_to_block_cache = preprocess, local
    return field


def _refusal(gr: Any, error: ProbeError) -> Any:
    """What the visitor reads of an error: nothing of the operator's folders. Gradio takes its message for HTML."""
    told = html.escape(without_folders(str(error)))
    return gr.Error(told, title="Not done", duration=None, print_exception=False)


def _facts(heat: Any, score: Any, *, way_out: str = "Press “Check this map”.") -> str:
    """Method, settings and verdict of a map, as HTML.

    Args:
        way_out: what is said of a map that was not checked.
    """
    verdict = verdict_of(heat, score)
    settings = ", ".join(f"{key} {plain(value)}" for key, value in heat.params.items())
    passes = heat.provenance.get("passes") or {}
    rows = [
        ("Words", heat.selection.label or "none"),
        ("Method", heat.method),
        ("Took", ", ".join(f"{count} {name}" for name, count in passes.items() if count) or "no pass of the model"),
        ("Baseline image", str((heat.provenance.get("baseline") or {}).get("kind") or "none")),
    ]
    if score is not None and score.reason is None:
        rows.append(
            ("Scores", f"deletion {score.deletion:.3f} (low is good), insertion {score.insertion:.3f} (high is good)")
        )
    listed = "".join(f"<dt>{name}</dt><dd>{text_html(value)}</dd>" for name, value in rows)
    reasons = " ".join(verdict["reasons"]) if score is not None or heat.values is None else way_out
    return (
        f'<p class="lp-verdict lp-{verdict["state"]}"><b>{text_html(verdict["title"])}</b> {text_html(reasons)}</p>'
        f"<dl>{listed}</dl><details><summary>Settings</summary>{text_html(settings)}</details>"
    )


def _lens_view(image: Image.Image, lens: Any, layer: int) -> Image.Image:
    """The image, its longest side ``_SIDE``, with the likeliest word on each image token."""
    scale = _SIDE / max(image.size)
    drawn = image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)))
    drawn = Image.blend(drawn, Image.new("RGB", drawn.size, "white"), 0.45)
    pen = ImageDraw.Draw(drawn)
    for box, words, shares in zip(lens.boxes * scale, lens.words[layer], lens.probabilities[layer], strict=True):
        x0, y0, x1, y1 = (float(edge) for edge in box)
        pen.rectangle((x0, y0, x1, y1), outline=(120, 130, 145))
        word = words[0].strip()
        size = min(30.0, (y1 - y0) / 2.2, 1.7 * (x1 - x0) / max(1, len(word)))
        if size >= 6:
            fill = (20, 25, 35) if shares[0] >= 0.2 else (110, 115, 125)
            pen.text(((x0 + x1) / 2, (y0 + y1) / 2), word, fill=fill, anchor="mm", font=ImageFont.load_default(size))
    return drawn


def _lens_table(lens: Any, token: int) -> str:
    """The likeliest words of one image token in every layer, as HTML."""
    rows = ""
    for layer, (words, shares) in enumerate(zip(lens.words[:, token], lens.probabilities[:, token], strict=True)):
        cells = zip(words, shares, strict=True)
        told = "".join(f"<td>{text_html(word.strip() or '␣')} <small>{share:.2f}</small></td>" for word, share in cells)
        rows += f"<tr><th>{layer}</th>{told}</tr>"
    title = f"likeliest words at image token {token + 1}, and their probability"
    return f"<table><tr><th>layer</th><th colspan=9>{title}</th></tr>{rows}</table>"
