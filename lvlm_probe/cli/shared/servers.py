"""Servers in the place of models: options, and what is asked before much is sent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lvlm_probe.cli.shared.terminal import note, one_line, stage
from lvlm_probe.errors import ProbeError

if TYPE_CHECKING:
    from lvlm_probe.serving import Server

_Url = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="URL",
        help="In place of --model: a server that runs it (vLLM). Its key is read from OPENAI_API_KEY.",
    ),
]
_Model = Annotated[
    str | None,
    typer.Option("--served-model", metavar="NAME", help="What the server calls the model, if it has several."),
]
_Road = Annotated[
    str | None,
    typer.Option(
        "--road",
        metavar="NAME",
        help="With --server: ask on this road alone: tokens, chat, next-token, top-k or sampling. Default: the best "
        "that works.",
    ),
]
_MaxRequests = Annotated[
    int, typer.Option("--max-requests", min=1, help="With --server: requests at most; --yes lifts the limit.")
]
_Yes = Annotated[bool, typer.Option("--yes", help="With --server: as many requests as it takes.")]


@dataclass(frozen=True)
class Served:
    """The options of a command that takes a server in the place of a model."""

    server: _Url = None
    served_model: _Model = None
    road: _Road = None
    max_requests: _MaxRequests = 2000
    yes: _Yes = False

    def open(
        self,
        *,
        model: str | None,
        journal: Path | None = None,
        log_probs_for: str | None = None,
        against: list[str] | None = None,
    ) -> Server | None:
        """Find out what the server can do; ``None`` where none is named.

        Args:
            model: the option of this name.
            journal: as for ``connect``.
            log_probs_for: what takes log-probabilities of given answers, and can do nothing with less.
            against: words of a contrast, which no server scores.

        Raises:
            ProbeError: a model or a contrast is named too, a name or a road without a server, or the server cannot be
                used.
        """
        if self.server is None:
            if self.served_model is not None:
                raise ProbeError("--served-model names a model of a server: add --server URL")
            if self.road is not None:
                raise ProbeError("--road says how a server is asked: add --server URL")
            return None
        if model is not None:
            raise ProbeError("give --model or --server, not both: the server runs the model")
        if against:
            raise ProbeError(
                "--against is scored inside the model's passes, which a server does not give: load the model here, "
                "--model DIR_OR_ID in place of --server"
            )
        from lvlm_probe.serving import connect
        from lvlm_probe.serving.roads import no_log_probs, roads_named

        if log_probs_for is not None and all(one.gives != "passes" for one in roads_named(self.road)):
            raise no_log_probs(log_probs_for, f"--road {self.road}", "none")
        with stage(f"asking {one_line(self.server, 100)} what it can do"):
            limit = None if self.yes else self.max_requests
            server = connect(
                self.server, self.served_model, road=self.road, max_requests=limit, tell=note, journal=journal
            )
        if log_probs_for is not None:
            server.require_log_probs(log_probs_for)
        works = ", ".join(one.road for one in server.measured if one.works)
        note(f"{server.name}: {server.what} ({works}); no gradients, no attention")
        return server
