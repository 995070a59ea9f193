"""What a request may cost before it has been looked at: its size, and its time until the answer begins."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from starlette.exceptions import HTTPException

from coord.http.prefer import Preference
from coord.http.problem import OUT_OF_TIME, problem, problem_of

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ARRIVAL = "coord.arrival"
"""Where in its scope a request's `Arrival` is."""
WAIT = 25.0
"""Seconds that a request may wait for its answer: less than what proxies allow."""
MARGIN = 2.0
"""Seconds beyond what the client would wait, after which no answer has begun in spite of it: a pool, or a lock."""
CLEANUP = 0.5
"""Seconds for a cancelled handler to end; then the answer is given without it: a thread, or a server, does not stop."""
BODY, HEAD = 1_000_000, 16_384
"""Bytes."""
_CLOSE = {"Connection": "close"}  # the rest of the body is not worth reading


class Arrival(NamedTuple):
    """When a request came, on its event loop's clock, and how many seconds it may wait at most."""

    time: float
    cap: float


class RequestLimits:
    """ASGI middleware: bounds a request's head, body, and time, and notes when it arrived.

    One deadline holds for everything a handler waits for, its connection, its locks and its row: `Prefer: wait=N`, or
    `wait`, the most that counts, and `margin` seconds more; what would hardly wait at all has twice the margin. When it
    has passed and no answer has begun, the handler is cancelled, its transaction rolled back, and the answer is 503, or
    408 if it is the client's body that is missing. An answer that has begun, a stream, takes as long as it takes.

        app.add_middleware(RequestLimits)
    """

    def __init__(
        self, app: ASGIApp, *, wait: float = WAIT, margin: float = MARGIN, body: int = BODY, head: int = HEAD
    ) -> None:
        self._app = app
        self._wait = wait
        self._margin = margin
        self._body = body
        self._head = head

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[ARRIVAL] = arrival = Arrival(asyncio.get_running_loop().time(), self._wait)
        exchange = _Exchange(scope, receive, send, self._body)
        if _size_of_head(scope) > self._head:
            await exchange.refuse(problem(431, f"the head of the request is larger than {self._head} bytes"))
        elif _announced(scope) > self._body:
            await exchange.refuse(exchange.too_large())
        else:
            preferred = Preference.of(value.decode("latin-1") for name, value in scope["headers"] if name == b"prefer")
            wait = self._wait if preferred.wait is None else preferred.seconds(self._wait)
            await exchange.run(self._app, arrival.time + max(wait, self._margin) + self._margin)


class _BodyTooLargeError(HTTPException):
    """More has come than was allowed. FastAPI lets no other error through that is met while it reads a body."""


class _Exchange:
    """One request and its answer, watched."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, body: int) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._body = self._left = body
        self._complete = self._missed = False
        """Whether all of the body has come; whether somebody waits, or has waited in vain, for more of it."""
        self._started = self._refused = False
        """Whether the application has begun to answer, or was answered for."""
        self._deadline: asyncio.Timeout | None = None
        self._late: asyncio.TimerHandle | None = None
        self._refusing: asyncio.Task[None] | None = None

    async def run(self, app: ASGIApp, limit: float) -> None:
        self._late = asyncio.get_running_loop().call_at(limit + CLEANUP, self._refuse_late)
        try:
            async with asyncio.timeout_at(limit) as deadline:
                self._deadline = deadline
                await app(self._scope, self._hear, self._say)
        except _BodyTooLargeError:
            await self.refuse(self.too_large())
        except TimeoutError:
            if not deadline.expired():
                raise
            await self.refuse(self._out_of_time())
        finally:
            self._late.cancel()
            if self._refusing is not None:
                await self._refusing

    async def refuse(self, answer: Response) -> None:
        """Answer in the application's place, unless it has begun to; what it says from now on is not heard."""
        if not self._started and not self._refused:
            self._refused = True
            await answer(self._scope, self._receive, self._send)

    def too_large(self) -> Response:
        return problem(413, f"the body is larger than {self._body} bytes", headers=_CLOSE)

    def _out_of_time(self) -> Response:
        if self._missed:
            return problem(408, "the body of the request did not come in time", headers=_CLOSE)
        return problem_of(OUT_OF_TIME)

    def _refuse_late(self) -> None:
        self._refusing = asyncio.create_task(self.refuse(self._out_of_time()))

    async def _hear(self) -> Message:
        self._missed = not self._complete
        message = await self._receive()
        self._missed = False
        if message["type"] == "http.request":
            self._complete = not message.get("more_body", False)
            self._left -= len(message.get("body", b""))
            if self._left < 0 and not self._started:
                raise _BodyTooLargeError(413, f"the body is larger than {self._body} bytes", _CLOSE)
        return message

    async def _say(self, message: Message) -> None:
        if self._refused:
            return
        if message["type"] == "http.response.start":
            self._started = True
            if self._late is not None:
                self._late.cancel()
            if self._deadline is not None and not self._deadline.expired():
                self._deadline.reschedule(None)
        await self._send(message)


def _size_of_head(scope: Scope) -> int:
    fields = sum(len(name) + len(value) for name, value in scope["headers"])
    return fields + len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"])


def _announced(scope: Scope) -> int:
    """How long the body says that it is."""
    length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    return int(length) if length.isdigit() else 0
