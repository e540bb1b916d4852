"""Requests to a server: as many at once as it takes, again where it was busy or gone, and counted.

**Back-pressure.** Up to ``concurrency`` requests are under way. Whenever the server says that it is busy (429, 503),
half as many are; as many answers without that as are under way allow one more. Answers of requests that were sent
before the last halving halve nothing: they all speak of the same moment.

**Again.** What passes (408, 409, 425, 429, 5xx, a connection that is dropped, a body that is cut off) is sent again
after the server's ``Retry-After``, or after a time that doubles and is drawn at random within a factor of three, so
that many clients do not come back at once. What does not pass (any other 4xx, a redirection) is not.

**The key** is read from the environment for each request, goes into its header, and nowhere else.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import os
import random
import statistics
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lvlm_probe.errors import ReplayError
from lvlm_probe.escaping import one_line
from lvlm_probe.process import lock

_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_BUSY = frozenset({429, 503})
_LARGEST = 512 << 20
"""Bytes of an answer: log-probabilities of a prompt of a million tokens are some 100 MB."""
_LONGEST_WAIT = 120.0
"""Seconds that a server may ask to wait; one that wants more is given up, and the run goes on another time."""
_SHOWN = 300


_COUNTING = lock()


class Refused(ReplayError):
    """The server does not do what was asked, and will not the next time; ``status`` is its HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Spent:
    """What a server was asked for.

    Attributes:
        requests: answered ones.
        retries: how often one of them had to be sent again.
        reused: answers that the journal held.
        megabytes: sent.
        seconds: from sending to the answer, all requests together.
        per_second: answers, of the last batch that kept the server busy; 0 before there was one.
    """

    requests: int = 0
    retries: int = 0
    reused: int = 0
    megabytes: float = 0.0
    seconds: float = 0.0
    per_second: float = 0.0

    def reuse(self) -> None:
        """Count an answer that the journal held; from any thread."""
        with _COUNTING:
            self.reused += 1


class _Gate:
    """How many requests are under way at most, by how the server takes them."""

    def __init__(self, most: int) -> None:
        self._most, self.limit = most, most
        self._turn = threading.Condition()
        self._inside = self._epoch = self._calm = 0

    @contextlib.contextmanager
    def slot(self) -> Iterator[int]:
        """A place among those under way; yields the number of halvings so far."""
        with self._turn:
            self._turn.wait_for(lambda: self._inside < self.limit)
            self._inside += 1
            epoch = self._epoch
        try:
            yield epoch
        finally:
            with self._turn:
                self._inside -= 1
                self._turn.notify_all()

    def busy(self, epoch: int) -> None:
        """The server was busy with a request that had got its place at ``epoch``."""
        with self._turn:
            if epoch == self._epoch:
                self.limit, self._epoch, self._calm = max(1, self.limit // 2), self._epoch + 1, 0

    def calm(self) -> None:
        """A request was answered."""
        with self._turn:
            self._calm += 1
            if self._calm >= self.limit and self.limit < self._most:
                self.limit, self._calm = self.limit + 1, 0
                self._turn.notify_all()


class Transport:
    """JSON over HTTP to one server.

    Args:
        url: of the server, with or without ``/v1``.
        key_variable: environment variable of the key.
        concurrency: requests under way at most.
        retries: how often a request is sent again.
        timeout: seconds that the server may say nothing.
        max_requests: requests that may be answered in all; ``None``: any number.
        sleep: waits for some seconds; by default so that ``stop`` ends it.
    """

    def __init__(
        self,
        url: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        retries: int = 6,
        timeout: float = 120.0,
        max_requests: int | None = None,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        for name, value in (("concurrency", concurrency), ("retries", retries + 1), ("max_requests", max_requests)):
            if value is not None and value < 1:
                raise ReplayError(f"{name} is at least {0 if name == 'retries' else 1}; got {value}")
        at = _address(url)
        self.address = at.geturl()
        self._host, self._port, self._root = at.hostname or "", at.port, at.path.rstrip("/")
        self._tls = at.scheme == "https"
        self._key_variable, self._retries, self._timeout = key_variable, retries, timeout
        self.concurrency, self.max_requests, self.spent = concurrency, max_requests, Spent()
        self._gate, self._here, self._lock = _Gate(concurrency), threading.local(), threading.Lock()
        self._sleep = time.sleep if sleep is None else sleep
        self._asked = 0
        self._latencies: deque[float] = deque(maxlen=32)

    @property
    def at_once(self) -> int:
        """Requests that may be under way now."""
        return self._gate.limit

    @property
    def latency(self) -> float | None:
        """Seconds until an answer, the median of the last ones; ``None`` before the first."""
        with self._lock:
            return statistics.median(self._latencies) if self._latencies else None

    def get(self, path: str) -> Any:
        """What is at a path. Raises ``ReplayError``; ``Refused`` where the server has it not."""
        return self._answered("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The server's answer to a request.

        Raises:
            Refused: it does not do that.
            ReplayError: it cannot be reached, is busy for too long, sends no JSON, or ``max_requests`` are spent.
        """
        with self._lock:
            if self.max_requests is not None and self._asked >= self.max_requests:
                raise ReplayError(
                    f"max_requests={self.max_requests} are spent ({self.address}); what was answered is kept: allow "
                    "more and do the same again, and it goes on from there"
                )
            self._asked += 1
        return self._answered("POST", path, json.dumps(body, ensure_ascii=True).encode())

    # ------------------------------------------------------------------ inside

    def _answered(self, verb: str, path: str, data: bytes | None) -> Any:
        for attempt in range(self._retries + 1):
            with self._gate.slot() as epoch:
                started = time.perf_counter()
                status, text, after = self._once(verb, path, data)
                seconds = time.perf_counter() - started
                if status in _BUSY:
                    self._gate.busy(epoch)
            found = _json(text) if status == 200 else _NOTHING
            if found is not _NOTHING:
                self._gate.calm()
                with self._lock:
                    self.spent.requests += verb == "POST"
                    self.spent.megabytes += len(data or b"") / 1e6
                    if verb == "POST":
                        self.spent.seconds += seconds
                        self._latencies.append(seconds)
                return found
            what = _told(status, text)
            if status not in _AGAIN and status not in (0, 200):
                raise Refused(f"{self.address}{path}: {what}", status)
            first = self.spent.requests == 0 and verb == "GET"  # nobody is there: that is no reason to wait
            if attempt == self._retries or (first and status == 0 and "refused" in what):
                tried = f" ({attempt + 1} tries)" if attempt else ""
                way_out = "is the server running, and is this its address?" if status == 0 else "try again later"
                raise ReplayError(f"{self.address}{path}: {what}{tried}; {way_out}")
            with self._lock:
                self.spent.retries += 1
            self._sleep(self._wait(after, attempt, path))
        raise AssertionError("unreachable")

    def _wait(self, after: str | None, attempt: int, path: str) -> float:
        asked = _seconds(after)
        if asked is not None and asked > _LONGEST_WAIT:
            raise ReplayError(
                f"{self.address}{path}: the server is busy and asks to come back in {asked:.0f} s; do the same again "
                "then: what was answered is kept"
            )
        return asked if asked is not None else min(30.0, 0.5 * 2**attempt) * random.uniform(0.5, 1.5)

    def _once(self, verb: str, path: str, data: bytes | None) -> tuple[int, bytes, str | None]:
        """Status (0: none came), body or what went wrong, and ``Retry-After``."""
        headers = {"Accept": "application/json", "User-Agent": "lvlm-probe"}
        if data is not None:
            headers["Content-Type"] = "application/json"
        if key := os.environ.get(self._key_variable, "").strip():
            headers["Authorization"] = f"Bearer {key}"
        for fresh in (False, True):
            link: http.client.HTTPConnection | None = getattr(self._here, "link", None)
            kept, link = link is not None, link or self._connection()
            try:
                link.request(verb, self._root + path, data, headers)
                answer = link.getresponse()
                body = answer.read(_LARGEST + 1)
                self._here.link = link
                if len(body) > _LARGEST:
                    raise http.client.HTTPException(f"an answer of more than {_LARGEST >> 20} MB")
                return answer.status, body, answer.headers.get("Retry-After")
            except (OSError, http.client.HTTPException) as error:
                link.close()
                self._here.link = None
                # Servers close connections that were idle; only the next request finds that out.
                if kept and not fresh:
                    continue
                return 0, f"{type(error).__name__}: {error}".encode(), None
            except BaseException:  # Ctrl-C in the middle of an answer: the rest of it must not be the next one's
                link.close()
                self._here.link = None
                raise
        raise AssertionError("unreachable")

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._tls else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=self._timeout)


_NOTHING = object()


def _address(url: str) -> urllib.parse.SplitResult:
    try:
        at = urllib.parse.urlsplit(url.strip())
        _ = at.port
    except ValueError as error:
        raise ReplayError(f"{one_line(url)[:_SHOWN]} is no address: {error}") from error
    if at.scheme not in ("http", "https") or not at.hostname:
        raise ReplayError(f"{one_line(url)[:_SHOWN]} is no address of a server: write it as http://host:8000")
    if at.username or at.password:
        raise ReplayError("a server's address holds no name or password: put the key into OPENAI_API_KEY")
    path = at.path.rstrip("/").removesuffix("/v1")
    return urllib.parse.SplitResult(at.scheme, at.netloc, path, "", "")


def _json(text: bytes) -> Any:
    """The value, or ``_NOTHING`` for what is no JSON: a body that was cut off."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NOTHING


def _told(status: int, text: bytes) -> str:
    """What went wrong, in a sentence of bounded length."""
    said = text.decode("utf-8", "replace")
    found = _json(text)
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = found[name]
            said = found if isinstance(found, str) else json.dumps(found)
    said = one_line(" ".join(said.split()))[:_SHOWN]
    if status == 0:
        return f"no answer ({said})"
    if status == 200:
        return f"an answer that is no JSON ({said[:80]!r})"
    if status in (401, 403):
        return f"HTTP {status}, the server wants a key or does not allow this: {said}"
    return f"HTTP {status}: {said or 'no reason given'}"


def _seconds(after: str | None) -> float | None:
    """``Retry-After``: seconds, or a date."""
    if not after:
        return None
    try:
        return max(0.0, float(after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
