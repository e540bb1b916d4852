"""One answer on a server: its log-probabilities under any images, from the journal or by requests."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lvlm_probe.errors import ReplayError
from lvlm_probe.serving.journal import Journal
from lvlm_probe.serving.messages import PNG, ImageFormat, Said, as_uri
from lvlm_probe.serving.roads import Reading, Road
from lvlm_probe.serving.transport import Spent

if TYPE_CHECKING:
    from PIL import Image

_BUSY = 16
"""Requests of one batch from which on it says how many a server answers in a second."""

DrawImages = Callable[[], Sequence["Image.Image"]]
"""Draws the images of one request, RGB, when it is its turn."""


class Forcing:
    """Teacher forcing through requests.

    Args:
        post: sends a body to a path; may be called from several threads.
        road: how the numbers are asked for.
        said: the answer.
        engine: what decides the numbers besides: engine, version, model.
        journal: answers that are paid for.
        workers: sends requests at the same time.
        spent: counts what the journal had.
        form: what images are sent as.
    """

    def __init__(
        self,
        post: Callable[[str, dict[str, Any]], Any],
        road: Road,
        said: Said,
        *,
        engine: Mapping[str, Any],
        journal: Journal,
        workers: concurrent.futures.Executor,
        spent: Spent,
        form: ImageFormat = PNG,
    ) -> None:
        self.send, self.road, self.said, self.journal = post, road, said, journal
        self._workers, self._spent, self.form = workers, spent, form
        prompt = said.prompt
        by_id = [list(said.prompt_ids), list(said.token_ids)] if said.prompt_ids else [[], list(said.raw)]
        asked = [prompt.question, prompt.system, dict(prompt.fields), *by_id]
        self._content = json.dumps([dict(engine), road.name, *asked], sort_keys=True, default=str).encode()
        self.unchecked: list[str] = []

    def requests_for(self, steps: Sequence[int] | None) -> int:
        """Requests that one set of images takes, at least; ``None`` where the tokens are not known yet."""
        return 1 if self.road.every or steps is None else len(steps)

    @functools.cached_property
    def askable(self) -> tuple[int, ...]:
        """Steps that a road of one token each can ask about."""
        found = []
        for step in range(len(self.said.token_ids)):
            with contextlib.suppress(ReplayError):
                self.road.request(self.said, [], step)
                found.append(step)
        return tuple(found)

    def score(
        self, images: Sequence[DrawImages], steps: Sequence[int] | None = None, *, fresh: bool = False
    ) -> torch.Tensor:
        """log P(a_t), ``(batch, step)`` float32, NaN for steps that were not asked for, cannot be, or are known within
        bounds only. Arguments and errors are those of ``between``."""
        low, high = self.between(images, steps, fresh=fresh)
        return torch.where(low == high, low, torch.nan)

    def between(
        self, images: Sequence[DrawImages], steps: Sequence[int] | None = None, *, fresh: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The least and the most that log P(a_t) can be, ``(batch, step)`` float32 each, NaN for steps that were not
        asked for or cannot be; of samples 0, or −∞, twice.

        Args:
            images: the images of each row.
            steps: the tokens that are wanted; ``None``: all.
            fresh: ask even where the journal has it, and keep nothing.

        Raises:
            Untrue: a reply is not about this answer, or holds no log-probabilities.
            ReplayError: the server is not there, or the requests are spent.
        """
        asked, started = self._spent.requests, time.perf_counter()
        work = [self._workers.submit(self._one, one, steps, fresh) for one in images]
        try:
            done, _ = concurrent.futures.wait(work, return_when=concurrent.futures.FIRST_EXCEPTION)
            for one in done:
                one.result()
            rows = [one.result() for one in work]
        except BaseException:  # Ctrl-C too: what is under way is finished and kept, the rest is not sent
            for one in work:
                one.cancel()
            raise
        if (answered := self._spent.requests - asked) >= _BUSY:
            self._spent.per_second = answered / (time.perf_counter() - started)
        ends = torch.full((2, len(rows), len(self.said.token_ids)), torch.nan, dtype=torch.float32)
        for row, found in enumerate(rows):
            for step, value in found.items():
                ends[:, row, step] = torch.tensor(value)
        return ends[0], ends[1]

    def confirmed(self) -> None:
        """What was answered so far is known to come from the same model."""
        self.unchecked.clear()

    def withdraw(self) -> None:
        """Take back what was answered since the last ``confirmed``."""
        self.journal.drop(self.unchecked)
        self.unchecked.clear()

    # ------------------------------------------------------------------ inside

    def _one(self, draw: DrawImages, steps: Sequence[int] | None, fresh: bool) -> dict[int, Reading]:
        images = draw()
        key = self._key(images)
        known = None if fresh else self.journal.get(key)
        if self.road.every:
            wanted: list[int | None] = [] if known else [None]
        else:
            every = self.askable if steps is None else steps
            wanted = [step for step in every if known is None or step not in known]
        if not wanted:
            self._spent.reuse()
            return known or {}
        found = dict(known or {})
        uris = [as_uri(image, self.form) for image in images]
        for step in wanted:
            path, body = self.road.request(self.said, uris, step)
            values = self.road.read(self.said, self.send(path, body), step)
            found.update(values)
            if not fresh:
                self.unchecked.append(key)
                self.journal.put(key, values)
        return found

    def _key(self, images: Sequence[Image.Image]) -> str:
        digest = hashlib.sha256(self._content)
        for image in images:
            digest.update(repr((image.mode, image.size)).encode() + image.tobytes())
        return digest.hexdigest()
