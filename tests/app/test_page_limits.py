"""What a request may bring and what a browser may load, on an ASGI application of three lines."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lvlm_probe.app.page_limits import Fence


def answered(body: list[bytes], *headers: tuple[bytes, bytes], most: int = 10) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and text of the answer to a request whose body comes in these pieces."""
    sent: list[Any] = []
    pieces = [{"type": "http.request", "body": one, "more_body": n < len(body) - 1} for n, one in enumerate(body)]

    async def echo(_scope: Any, receive: Any, send: Any) -> None:
        read = b""
        while True:
            message = await receive()
            read += message["body"]
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})
        await send({"type": "http.response.body", "body": read})

    async def receive() -> Any:
        return pieces.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Fence(echo, most)({"type": "http", "headers": list(headers)}, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


@pytest.mark.quick
def test_what_is_small_passes_with_a_policy_that_allows_no_other_address() -> None:
    status, headers, text = answered([b"12345", b"67890"])
    assert (status, text, headers[b"x-own"]) == (200, b"1234567890", b"1")
    policy = headers[b"content-security-policy"].decode()
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert "*" not in policy


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ([b"12345", b"678901"], []),
        ([b""], [(b"content-length", b"11")]),
        ([b"12345678901"], [(b"content-length", b"1")]),
    ],
)
def test_what_is_too_large_is_refused_in_a_sentence(body: list[bytes], headers: list[tuple[bytes, bytes]]) -> None:
    status, _, text = answered(body, *headers)
    assert status == 413
    assert b"is not read here" in text


def test_a_length_that_is_no_number_is_refused() -> None:
    assert answered([b""], (b"content-length", b"many"))[0] == 400
