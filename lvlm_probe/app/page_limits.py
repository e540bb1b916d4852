"""What a browser may load for the app's page, and how much a request may bring: an ASGI application around it.

The page's content security policy allows nothing but the app's own address, so nothing is asked of the network, and no
font, script or image of elsewhere is loaded. A request whose body is larger than the limit is refused in a sentence,
by its length where it is given, else once it has grown too large.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

_POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # Gradio's page builds its templates in the browser
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
    ]
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class _TooLarge(Exception):
    pass


class Fence:
    """An ASGI application that is another one within limits.

    Args:
        app: the other one.
        most_bytes: of a request's body.
    """

    def __init__(self, app: Any, most_bytes: int) -> None:
        self._app, self._most = app, most_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        read, began = 0, False

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise _TooLarge
            return message

        async def fenced(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
            await send(message)

        try:
            if int(dict(scope["headers"]).get(b"content-length", b"0") or 0) > self._most:
                raise _TooLarge
            await self._app(scope, counted, fenced)
        except _TooLarge:
            if not began:
                await self._refuse(fenced)
        except ValueError:
            if began:
                raise
            await self._refuse(fenced, 400, "the length of this request is no number\n")

    async def _refuse(self, send: Send, status: int = 413, said: str = "") -> None:
        text = said or f"a request of more than {self._most / 1e6:.0f} MB is not read here: save the image smaller\n"
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})
