"""What a request may cost before it has been looked at: its size, and its time until the answer begins."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from coord.http.prefer import Preference
from coord.http.problem import problem

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    Scope = MutableMapping[str, Any]
    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    Application = Callable[[Scope, Receive, Send], Awaitable[None]]

ARRIVED = "coord.arrived"
"""When the request arrived, on its event loop's clock, in its scope."""
WAIT = 25.0
"""Seconds that a request may wait for its answer: less than what proxies allow."""
MARGIN = 5.0
"""Seconds beyond what the client would wait, after which no answer has begun in spite of it: a pool, or a lock."""
BODY, HEADERS = 1_000_000, 16_384
"""Bytes."""


class RequestLimits:
    """ASGI middleware: bounds a request's headers, body, and time, and notes when it arrived.

    One deadline holds for everything a handler waits for, its connection, its locks and its row: `Prefer: wait=N`, or
    the cap, and five seconds. When it has passed and no answer has begun, the handler is cancelled, its transaction
    rolled back, and the answer is 503. Plain ASGI, since `BaseHTTPMiddleware` hides a client that leaves.

        app.add_middleware(RequestLimits)
    """

    def __init__(
        self, app: Application, *, wait: float = WAIT, body: int = BODY, headers: int = HEADERS, margin: float = MARGIN
    ) -> None:
        self._app = app
        self._wait = wait
        self._body = body
        self._headers = headers
        self._margin = margin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived = scope[ARRIVED] = asyncio.get_running_loop().time()
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self._headers:
            await problem(431, f"the headers are larger than {self._headers} bytes")(scope, receive, send)
            return
        exchange = _Exchange(receive, send, self._body)
        limit = arrived + self._preferred(scope) + self._margin
        try:
            async with asyncio.timeout_at(limit) as exchange.deadline:
                await self._app(scope, exchange.receive, exchange.send)
        except _BodyTooLargeError:
            await self._refuse(scope, exchange, 413, f"the body is larger than {self._body} bytes")
        except TimeoutError:
            if exchange.deadline is None or not exchange.deadline.expired():
                raise
            await self._refuse(scope, exchange, 503, "there was no time left to answer", kind="out-of-time")

    def _preferred(self, scope: Scope) -> float:
        preferred = Preference.of(value.decode("latin-1") for name, value in scope["headers"] if name == b"prefer")
        return self._wait if preferred.wait is None else preferred.seconds(self._wait)

    async def _refuse(self, scope: Scope, exchange: _Exchange, status: int, detail: str, **options: Any) -> None:
        if exchange.started:
            raise RuntimeError(detail)
        await problem(status, detail, **options)(scope, exchange.receive, exchange.send)


class _BodyTooLargeError(Exception):
    """More has come than was allowed."""


class _Exchange:
    """One request and its answer, watched."""

    def __init__(self, receive: Receive, send: Send, body: int) -> None:
        self._receive = receive
        self._send = send
        self._left = body
        self.deadline: asyncio.Timeout | None = None
        self.started = False
        """Whether the answer has begun."""

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0 and not self.started:
                raise _BodyTooLargeError
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            if self.deadline is not None and not self.deadline.expired():
                self.deadline.reschedule(None)
        await self._send(message)
