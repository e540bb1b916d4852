"""Keeps a share of the chat requests that a vLLM server answers, with their answers, as rows that can be imported.

    SAMPLES=/data/samples.jsonl SHARE=0.01 MOST_MB=512 PYTHONPATH=integrations/vllm \\
        vllm serve MODEL --middleware sample_requests.SampleRequests

It needs nothing but Python. A request that is not drawn is handed on and never looked at. Of one that is drawn, what
goes by is copied on the way, by reference; a thread of its own makes a row of it and writes it. Whatever fails there,
or is too large (`LARGEST`), or comes while the thread is behind (`WAITING`) or the file is full (`MOST_MB`), is left
out: the request is answered as if nobody had looked. No header is kept, so no key; of the body, the fields of `KEPT`
alone. Requests of lvlm-probe itself are passed over.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

PATH = "/v1/chat/completions"
KEPT = ("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "seed", "chat_template_kwargs")
LARGEST = 32 << 20
"""Bytes of a request, and of an answer."""
WAITING = 8
"""Requests whose copies are in memory at the same time."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class SampleRequests:
    """ASGI middleware, made by vLLM's ``--middleware``.

    Args:
        app: what answers.
        path, share, most_mb: by default the environment's ``SAMPLES``, ``SHARE`` (0.01) and ``MOST_MB`` (512).
        draw: random numbers in [0, 1).
    """

    def __init__(
        self,
        app: Callable[[Message, Receive, Send], Awaitable[None]],
        *,
        path: str | None = None,
        share: float | None = None,
        most_mb: float | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.app, self._draw = app, draw
        self._share = float(os.environ.get("SHARE", "0.01")) if share is None else share
        self._path = os.environ.get("SAMPLES", "samples.jsonl") if path is None else path
        self._most = 1e6 * (float(os.environ.get("MOST_MB", "512")) if most_mb is None else most_mb)
        self._free = threading.Semaphore(WAITING)
        self._work: queue.SimpleQueue[tuple[list[bytes], list[bytes]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="sample-requests", daemon=True)
        self._thread.start()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, and copy it if it is drawn."""
        drawn = scope.get("type") == "http" and str(scope.get("path")).endswith(PATH) and self._draw() < self._share
        if not drawn or _own(scope) or not self._free.acquire(blocking=False):
            await self.app(scope, receive, send)
            return
        asked, said, copies = [], [], _Copies()

        async def copied_in() -> Message:
            message = await receive()
            copies.add(asked, message)
            return message

        async def copied_out(message: Message) -> None:
            copies.add(said, message)
            await send(message)

        try:
            await self.app(scope, copied_in, copied_out)
        except BaseException:
            self._free.release()
            raise
        if copies.whole:
            self._work.put((asked, said))
        else:
            self._free.release()

    def close(self) -> None:
        """Write what is waiting, and end the thread."""
        self._work.put(None)
        self._thread.join()

    def _write(self) -> None:
        while (work := self._work.get()) is not None:
            with contextlib.suppress(Exception):  # nobody waits for it, and nobody is to hear of it
                row = row_of(b"".join(work[0]), b"".join(work[1]))
                if row is not None:
                    self._append(json.dumps(row).encode() + b"\n")
            self._free.release()

    def _append(self, line: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        file = os.open(self._path, flags, 0o600)
        try:
            if os.fstat(file).st_size + len(line) <= self._most:
                os.write(file, line)
        finally:
            os.close(file)


class _Copies:
    """What has gone by of one request: whole, as long as it was answered well and is not too large."""

    def __init__(self) -> None:
        self.whole, self._bytes = True, 0

    def add(self, kept: list[bytes], message: Message) -> None:
        if message.get("type") == "http.response.start":
            self.whole &= message.get("status") == 200
        body = message.get("body")
        if not isinstance(body, bytes) or not body or not self.whole:
            return
        self._bytes += len(body)
        if self._bytes > LARGEST:
            self.whole = False
            kept.clear()
        else:
            kept.append(body)


def _own(scope: Message) -> bool:
    return any(name == b"user-agent" and value.startswith(b"lvlm-probe") for name, value in scope.get("headers", ()))


def row_of(asked: bytes, said: bytes) -> dict[str, Any] | None:
    """A row with ``request`` and ``response``; ``None`` where no image was asked about, or nothing was answered."""
    body = json.loads(asked)
    parts = [part for turn in body["messages"] if isinstance(turn.get("content"), list) for part in turn["content"]]
    if not any(part.get("type") == "image_url" for part in parts):
        return None
    answer = streamed(said) if said.lstrip().startswith(b"data:") else json.loads(said)
    if not answer.get("choices"):
        return None
    return {"request": {name: body[name] for name in KEPT if name in body}, "response": answer}


def streamed(said: bytes) -> dict[str, Any]:
    """The first choice of a streamed answer, put together."""
    pieces: list[str] = []
    listed: list[Any] = []
    ids: list[int] = []
    finish = None
    for line in said.split(b"\n"):
        text = line.strip().removeprefix(b"data:").strip()
        if not line.strip().startswith(b"data:") or text == b"[DONE]":
            continue
        choice = next((one for one in json.loads(text).get("choices", ()) if one.get("index", 0) == 0), {})
        pieces.append((choice.get("delta") or {}).get("content") or "")
        listed += (choice.get("logprobs") or {}).get("content") or []
        ids += choice.get("token_ids") or []
        finish = choice.get("finish_reason") or finish
    if not finish:
        return {}  # cut off: nobody knows what would have come
    found: dict[str, Any] = {"message": {"role": "assistant", "content": "".join(pieces)}, "finish_reason": finish}
    found |= {"logprobs": {"content": listed}} if listed else {}
    found |= {"token_ids": ids} if ids else {}
    return {"choices": [found]}
