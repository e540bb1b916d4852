"""Servers in the place of models: options, and what is asked before much is sent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lvlm_probe.cli.shared.terminal import note, one_line, stage
from lvlm_probe.errors import ProbeError

if TYPE_CHECKING:
    from lvlm_probe.serving import Server

__all__ = ["MaxRequests", "Road", "ServedModel", "ServerUrl", "Yes", "open_server"]

ServerUrl = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="URL",
        help="In place of --model: a server that runs it (vLLM). Its key is read from OPENAI_API_KEY.",
    ),
]
ServedModel = Annotated[
    str | None,
    typer.Option("--served-model", metavar="NAME", help="What the server calls the model, if it has several."),
]
Road = Annotated[
    str | None,
    typer.Option(
        "--road",
        metavar="NAME",
        help="With --server: ask on this road alone: tokens, chat, next-token, top-k or sampling. Default: the best "
        "that works.",
    ),
]
MaxRequests = Annotated[
    int, typer.Option("--max-requests", min=1, help="With --server: requests at most; --yes lifts the limit.")
]
Yes = Annotated[bool, typer.Option("--yes", help="With --server: as many requests as it takes.")]


def open_server(
    url: str | None,
    name: str | None,
    *,
    model: str | None,
    road: str | None,
    max_requests: int,
    yes: bool,
    journal: Path | None = None,
    log_probs_for: str | None = None,
    against: list[str] | None = None,
) -> Server | None:
    """Find out what a server can do; ``None`` where none is named.

    Args:
        url, name, model, road, max_requests, yes: the options.
        journal: as for ``connect``.
        log_probs_for: what takes log-probabilities of given answers, and can do nothing with less.
        against: words of a contrast, which no server scores.

    Raises:
        ProbeError: a model or a contrast is named too, a name or a road without a server, or the server cannot be used.
    """
    if url is None:
        if name is not None:
            raise ProbeError("--served-model names a model of a server: add --server URL")
        if road is not None:
            raise ProbeError("--road says how a server is asked: add --server URL")
        return None
    if model is not None:
        raise ProbeError("give --model or --server, not both: the server runs the model")
    if against:
        raise ProbeError(
            "--against is scored inside the model's passes, which a server does not give: load the model here, --model "
            "DIR_OR_ID in place of --server"
        )
    from lvlm_probe.serving import connect
    from lvlm_probe.serving.roads import roads_named

    if log_probs_for is not None and all(one.gives != "passes" for one in roads_named(road)):
        raise ProbeError(
            f"{log_probs_for} takes log-probabilities of a given answer, and --road {road} gives none: leave --road out"
        )
    with stage(f"asking {one_line(url, 100)} what it can do"):
        limit = None if yes else max_requests
        server = connect(url, name, road=road, max_requests=limit, tell=note, journal=journal)
    if log_probs_for is not None:
        server.require_log_probs(log_probs_for)
    works = ", ".join(one.road for one in server.measured if one.works)
    note(f"{server.name}: {server.what} ({works}); no gradients, no attention")
    return server
