"""``lvlm-probe serve``: the app in the browser, on the embedded model, on models of your own, or on a server's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lvlm_probe.cli.shared.completion import choices
from lvlm_probe.cli.shared.models import DEMO, load_model
from lvlm_probe.cli.shared.options import Loading, MaxNewTokens
from lvlm_probe.cli.shared.servers import Served
from lvlm_probe.cli.shared.terminal import note, one_line, say
from lvlm_probe.extras import require

RUNS_BARE = True


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="DIR_OR_ID",
            autocompletion=choices("demo"),
            help="Model directory, hub id, or 'demo' for the embedded one, which is the default; repeat it to compare "
            "several.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 7860,
    store: Annotated[
        Path | None,
        typer.Option(
            "--store", metavar="DIR", help="Keep answers and maps as traces in DIR; otherwise they go with the app."
        ),
    ] = None,
    max_mb: Annotated[int, typer.Option("--max-mb", min=1, help="Largest image that can be uploaded, MB.")] = 20,
    max_new_tokens: MaxNewTokens = 128,
    loading: Loading = Loading(),
    served: Served = Served(max_requests=100_000),
) -> None:
    """Serve an app in the browser: ask about images, click words, see maps. Needs the extra app.

    Example:  lvlm-probe serve
    Example:  lvlm-probe serve --model path/to/model --store runs/app
    Example:  lvlm-probe serve --server http://gpu:8000
    """
    require("gradio", extra="app", purpose="lvlm-probe serve")  # before a model is loaded
    from lvlm_probe.app import Limits, Service
    from lvlm_probe.app import serve as serve_app

    behind = served.open(model=" ".join(model or []) or None)
    sources: dict[str, Any] = {}
    if behind is not None:
        sources[behind.name] = behind
    for spec in dict.fromkeys(model or ([DEMO] if behind is None else [])):
        sources[spec if spec == DEMO else Path(spec).name or spec] = load_model(spec, **vars(loading))
    service = Service(sources, store=store, limits=Limits(file_bytes=max_mb * 1_000_000, answer=max_new_tokens))
    if host not in ("127.0.0.1", "localhost", "::1"):
        note(f"listening on {one_line(host)}: whoever reaches this machine can ask the model")
    say("app: ", (f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}", "bold"), "  (Ctrl-C ends it)")
    try:
        serve_app(service, host=host, port=port)
    finally:
        service.close()
