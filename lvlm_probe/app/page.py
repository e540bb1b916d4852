"""The app's page, on Gradio: its layout, and which handler each part calls. All that runs on a model goes through one
queue."""

from __future__ import annotations

import functools
import html
import os
from collections.abc import Mapping
from importlib import resources
from typing import Any

from PIL import Image

from lvlm_probe import demo
from lvlm_probe.app.handlers import Handlers, refusal
from lvlm_probe.app.markup import MASK_CELLS
from lvlm_probe.app.page_limits import Fence
from lvlm_probe.app.service import Service
from lvlm_probe.errors import ImageError, ProbeError
from lvlm_probe.extras import require
from lvlm_probe.pages.data_uris import data_uri, shrink

_SCENES = 8
_MODEL = {"concurrency_id": "model", "concurrency_limit": 1}
"""Of all that runs on a model: one at a time, whoever asks."""


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
    ).set(
        body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400",
        button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700",
    )  # fmt: skip
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
    """The layout of the page of one service; what is done on it is done by ``Handlers``."""

    def __init__(self, service: Service, gr: Any) -> None:
        self.service, self.gr = service, gr
        self.scenes = demo.scenes(_SCENES)
        self.do = Handlers(service, gr, self.scenes)
        self.names = list(service.models)

    def blocks(self) -> Any:
        gr = self.gr
        with gr.Blocks(title="lvlm_probe", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
            gr.HTML(
                "<h1>lvlm_probe</h1><p>Ask about an image. Warm words are those that the image decides; "
                "click one to see where it came from.</p>",
                elem_classes="lp-head",
            )
            visitor = gr.BrowserState("", storage_key="lvlm-probe-visitor", secret="lvlm-probe")
            page.load(self.do.on_enter, visitor, visitor, api_name=False, queue=False)
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    image = _upload(gr, self.service, label="Image", sources=["upload", "clipboard"], height=300)
                    with gr.Accordion("More images", open=False), gr.Row():
                        more = [
                            _upload(
                                gr, self.service, label=f"Image {number}", sources=["upload", "clipboard"], height=180
                            )
                            for number in range(2, self.service.limits.images + 1)
                        ]
                    images = [image, *more]
                    scenes = gr.HTML(self.thumbnails(), js_on_load=_asset("clicks.js"), elem_classes="lp-scenes")
                    question = gr.Textbox(label="Question", placeholder="What color is the circle?", lines=1)
                    model = self.model_choice()
                    with gr.Row():
                        ask = gr.Button("Ask", variant="primary", min_width=80)
                        stop = gr.Button("Stop", min_width=80)
                with gr.Column(scale=3, min_width=320), gr.Tabs():
                    with gr.Tab("Answer"):
                        panel = self.panel(model, images, question, visitor, [ask.click, question.submit], stop)
                    with gr.Tab("Only this part"):
                        self.part(panel)
                    with gr.Tab("Attention"):
                        self.attention(panel)
                    with gr.Tab("Layers"):
                        self.lens(panel)
                    with gr.Tab("Compare"):
                        self.compare(images, question, visitor)
                    with gr.Tab("History") as history:
                        self.history(history, panel, visitor)
            on_scene = self.do.said(self.do.on_scene, clicked=True)
            scenes.click(on_scene, None, [image, question, *more], api_name=False, queue=False)
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
        self,
        model: Any,
        images: list[Any],
        question: Any,
        visitor: Any,
        asks: list[Any],
        stop: Any,
        *,
        side: str = "answer",
    ) -> dict[str, Any]:
        """An answer with its words, the map of the clicked one, and what is known of it."""
        gr = self.gr
        state = gr.State(None, time_to_live=3600)
        words = gr.HTML(
            "", js_on_load=_asset("clicks.js"), elem_classes="lp-words", elem_id=f"words-{side}", min_height=48
        )
        numbers = [str(number + 1) for number in range(self.service.limits.images)]
        which = gr.Radio(numbers, value="1", label="Image", visible=False, elem_id=f"image-{side}")
        height = 380 if side == "answer" else 280
        view = _image(gr, "Map", height, "fullscreen", "download")
        with gr.Row(equal_height=True, elem_classes="lp-tools"):
            method = gr.Dropdown(self.service.methods(self.names[0]), label="Method", min_width=140)
            whole = gr.Button("Explain all of it", size="sm", min_width=100)
            check = gr.Button("Check this map", size="sm", min_width=100)
            save = gr.Button("Save as a page", size="sm", min_width=100)
        facts = gr.HTML("", elem_classes="lp-facts", elem_id=f"facts-{side}")
        file = gr.DownloadButton(visible="hidden", elem_id=f"page-{side}")
        shown = [state, words, view, facts]
        given = [model, images[0], question, visitor, *images[1:]]
        asked = gr.on(asks, self.do.on_ask, given, shown, api_name=f"ask_{side}", **_MODEL)
        state.change(self.do.on_images, state, which, api_name=False, queue=False)
        which.input(self.do.said(self.do.on_image), [state, which], shown, api_name=f"image_{side}", queue=False)
        stop.click(None, cancels=[asked], api_name=False)
        words.click(self.do.said(self.do.on_word, clicked=True), [state, method], shown, api_name=False, **_MODEL)
        whole.click(self.do.said(self.do.on_whole), [state, method], shown, api_name=f"explain_{side}", **_MODEL)
        check.click(self.do.said(self.do.on_check), [state], shown, api_name=f"check_{side}", **_MODEL)
        made = save.click(self.do.said(self.do.on_save), [state], file, api_name=f"page_{side}")
        made.success(None, js=f"() => document.querySelector('#page-{side}').click()", api_name=False)
        model.change(self.do.said(self.do.on_model), model, method, api_name=False, queue=False)
        return {"state": state, "words": words, "view": view, "facts": facts, "model": model}

    def part(self, panel: Mapping[str, Any]) -> None:
        """A brush over the image, and the answer to what is painted alone, or to all but that."""
        gr = self.gr
        _told(gr, "Paint over a part of the image, and ask the same question again.")
        with gr.Row():
            with gr.Column(min_width=260):
                paint = {"html_template": _asset("paint.html"), "js_on_load": _asset("paint.js")}
                canvas = gr.HTML({"src": "", "cells": MASK_CELLS}, **paint)
            with gr.Column(min_width=260):
                seen = _image(gr, "What the model saw", 320)
        mask = gr.State("")
        with gr.Row():
            keep = gr.Button("If it sees only this?", variant="primary")
            remove = gr.Button("And without this?")
        said = gr.HTML("", elem_classes="lp-words", elem_id="said-part")
        shown = [canvas, mask, said, seen]
        panel["state"].change(self.do.on_canvas, panel["state"], shown, api_name=False, queue=False)
        # Gradio by itself drops a stroke that ends before the one before it has arrived.
        painted = self.do.said(self.do.on_painted, clicked=True)
        canvas.input(painted, None, mask, api_name=False, queue=False, trigger_mode="multiple")
        for button, kind in ((keep, "keep"), (remove, "remove")):
            again = functools.partial(self.do.on_again, kind)
            button.click(self.do.said(again), [panel["state"], mask], [said, seen], api_name=f"{kind}_part", **_MODEL)

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
        view = _image(gr, "Attention", 380, "fullscreen")
        facts = gr.HTML("", elem_classes="lp-facts")
        panel["state"].change(self.do.on_rows, panel["state"], [layer, head], api_name=False, queue=False)
        inputs = [panel["state"], layer, head]
        shown = self.do.said(self.do.on_attention)
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
        view = _image(gr, "Words at image tokens", 420, "fullscreen")
        table = gr.HTML("", elem_classes="lp-facts", elem_id="lens-table")
        shown = [lens, layer, view, table]
        read.click(self.do.said(self.do.on_lens), panel["state"], shown, api_name="lens", **_MODEL)
        layer.release(self.do.said(self.do.on_layer), [panel["state"], lens, layer], view, api_name=False)
        view.select(self.do.said(self.do.on_cell, clicked=True), [panel["state"], lens], table, api_name=False)

    def compare(self, images: list[Any], question: Any, visitor: Any) -> None:
        """Two panels on the same images."""
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
                    gr.on(typed, self.do.on_typed, both, asked, api_name=False, queue=False)
                    self.panel(choice, images, asked, visitor, [ask.click], stop, side=side)

    def history(self, tab: Any, panel: Mapping[str, Any], visitor: Any) -> None:
        """The visitor's earlier answers; a click opens one."""
        gr = self.gr
        listed = gr.HTML("", js_on_load=_asset("clicks.js"), elem_classes="lp-history")
        again = gr.Button("Look again", size="sm", min_width=80)
        for event, name in ((tab.select, False), (again.click, "history")):
            event(self.do.said(self.do.on_history), visitor, listed, api_name=name, queue=False)
        shown = [panel[key] for key in ("state", "words", "view", "facts")]
        listed.click(self.do.said(self.do.on_open, clicked=True), [panel["model"], visitor], shown, api_name=False)


def _told(gr: Any, text: str) -> None:
    gr.HTML(f"<p>{text}</p>", elem_classes="lp-facts")


def _image(gr: Any, label: str, height: int, *buttons: str) -> Any:
    """An image of the page's own, with a name for who does not see it."""
    return gr.Image(label=label, alt_text=label, interactive=False, height=height, buttons=list(buttons))


def _upload(gr: Any, service: Service, **look: Any) -> Any:
    """Gradio's image field, which decodes nothing beyond the limits, and fetches nothing from the network.

    Its methods are replaced on the field itself: of every subclass Gradio writes a stub file beside this module.
    """
    field = gr.Image(alt_text=look["label"], **look)
    move = field.async_move_resource_to_block_cache

    def preprocess(payload: Any) -> Image.Image | None:
        if payload is None or not payload.path:
            return None
        try:
            return service.open_upload(payload.path)
        except ProbeError as error:
            raise refusal(gr, error) from error

    async def local(url_or_file_path: Any) -> Any:
        if "://" in str(url_or_file_path):
            raise refusal(gr, ImageError("images are uploaded, not fetched from an address"))
        return await move(url_or_file_path)

    field.preprocess, field.async_move_resource_to_block_cache = preprocess, local
    return field
