"""What a request may cost before it is handled: its size, and its time until the answer begins."""

from __future__ import annotations

import asyncio
import re
from inspect import isawaitable
from typing import NamedTuple

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coord.http.interruption import stop_observed
from coord.http.prefer import Preference
from coord.http.problem import OUT_OF_TIME, problem, problem_of
from coord.telemetry import request_id

ARRIVAL = "coord.arrival"
"""Where in its scope a request's `Arrival` is."""
MAX_WAIT_SECONDS = 25.0
"""How long a request may wait for its answer: less than what proxies allow."""
ANSWER_MARGIN_SECONDS = 2.0
"""How long beyond what the client would wait, after which no answer has begun in spite of it: a pool, or a lock."""
CLEANUP_SECONDS = 0.5
"""For a cancelled handler to end; then the answer is given without it: a thread, or a server, does not stop."""
MAX_BODY_BYTES, MAX_HEAD_BYTES = 1_000_000, 16_384
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_TOO_LARGE = "the body is larger than {} bytes"
_CLOSE = {"Connection": "close"}  # the rest of the body is not worth reading


class Arrival(NamedTuple):
    """When a request came, on its event loop's clock, and how many seconds it may wait at most."""

    time: float
    cap: float
    server_timing: bool = False
    """Whether its answer says where the time of its wait went."""


class RequestLimits:
    """ASGI middleware: bounds a request's head, body, and time, and notes when it arrived.

    One deadline holds for everything a handler waits for, its connection, its locks and its row: the seconds of
    `Prefer: wait=N`, at most `wait`, and `margin` seconds more, but never less than twice the margin. When it has
    passed and no response has begun, the handler is cancelled, its transaction rolled back, and the response is 503, or
    408 if it is the client's body that is missing. A response that has begun, a stream, takes as long as it takes. What
    the application's handler for `Exception` makes of an error is sent from here as well.

    With `server_timing` the answers of `Reply` and `Poll` have a `Server-Timing` header, which names the tables that
    were waited for. A request's `X-Request-ID` is kept with the jobs that it enqueues, for their lines in the log.

        app.add_middleware(RequestLimits)
        app.add_middleware(CORSMiddleware, allow_origins=[...])  # last, which is outermost: errors have its headers
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        wait: float = MAX_WAIT_SECONDS,
        margin: float = ANSWER_MARGIN_SECONDS,
        body: int = MAX_BODY_BYTES,
        head: int = MAX_HEAD_BYTES,
        server_timing: bool = False,
    ) -> None:
        self._app = app
        self._wait = wait
        self._margin = margin
        self._body = body
        self._head = head
        self._server_timing = server_timing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[ARRIVAL] = arrival = Arrival(asyncio.get_running_loop().time(), self._wait, self._server_timing)
        request_id.set(_request_id(scope))
        exchange = _Exchange(scope, receive, send, self._body)
        headers = Headers(scope=scope)
        announced = headers.get("content-length", "")
        if _size_of_head(scope) > self._head:
            await exchange.respond(problem(431, f"the head of the request is larger than {self._head} bytes"))
        elif announced.isdecimal() and int(announced) > self._body:
            await exchange.respond(_too_large(self._body))
        else:
            preferred = Preference.of(headers.getlist("prefer"))
            wait = self._wait if preferred.wait is None else preferred.seconds(self._wait)
            with stop_observed():  # from the arrival on, so that no signal is missed before the handler waits
                await exchange.run(self._app, arrival.time + max(wait, self._margin) + self._margin)


class _Exchange:
    """One request and its response, watched."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, body: int) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._body = self._left = body
        self._complete = self._missed = False
        """Whether all of the body has come; whether a reader waits, or has waited in vain, for more of it."""
        self._started = self._replaced = False
        """Whether the application has begun to respond, or a response was sent in its place."""
        self._deadline = asyncio.timeout(None)
        self._responding: asyncio.Task[None] | None = None

    async def run(self, app: ASGIApp, limit: float) -> None:
        late = asyncio.get_running_loop().call_at(limit + CLEANUP_SECONDS, self._respond_late)
        try:
            async with self._deadline as deadline:
                deadline.reschedule(limit)
                await app(self._scope, self._receive_message, self._send_message)
        except Exception as error:
            if self._left < 0 and isinstance(error, HTTPException):  # met by a middleware that reads the body
                await self.respond(_too_large(self._body))
            elif deadline.expired() and isinstance(error, TimeoutError):
                await self.respond(self._out_of_time())
            else:
                await self._respond_to(error)
                raise  # for the server's log
        finally:
            late.cancel()
            if self._responding is not None:
                await self._responding

    async def respond(self, response: Response) -> None:
        """Respond in the application's place, unless it has begun to; what it sends from now on is dropped."""
        if not self._started and not self._replaced:
            self._replaced = True
            await response(self._scope, self._receive, self._send)

    async def _respond_to(self, error: Exception) -> None:
        """By the application's own handler: Starlette would call it outside all middleware, CORS's among it."""
        app = self._scope.get("app")
        handlers = getattr(app, "exception_handlers", {})
        handler = handlers.get(500) or handlers.get(Exception)
        if handler is not None and not getattr(app, "debug", False) and not self._started:
            response = handler(Request(self._scope), error)
            await self.respond(await response if isawaitable(response) else response)

    def _out_of_time(self) -> Response:
        if self._missed:
            return problem(408, "the body of the request did not come in time", headers=_CLOSE)
        return problem_of(OUT_OF_TIME)

    def _respond_late(self) -> None:
        if not self._started:
            self._responding = asyncio.create_task(self.respond(self._out_of_time()))

    async def _receive_message(self) -> Message:
        self._missed = not self._complete
        message = await self._receive()
        self._missed = False
        if message["type"] == "http.request":
            self._complete = not message.get("more_body", False)
            self._left -= len(message.get("body", b""))
            if self._left < 0 and not self._started:
                # FastAPI lets no other error through that is met while it reads a body.
                raise HTTPException(413, _TOO_LARGE.format(self._body), _CLOSE)
        return message

    async def _send_message(self, message: Message) -> None:
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            self._started = True
            if not self._deadline.expired():
                self._deadline.reschedule(None)
        await self._send(message)


def _request_id(scope: Scope) -> str | None:
    value = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
    return value if _REQUEST_ID.fullmatch(value) else None


def _size_of_head(scope: Scope) -> int:
    fields = sum(len(name) + len(value) for name, value in scope["headers"])
    return fields + len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"])


def _too_large(limit: int) -> Response:
    return problem(413, _TOO_LARGE.format(limit), headers=_CLOSE)
