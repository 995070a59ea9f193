"""Methods that FastAPI leaves out: HEAD, and what `Allow` must list."""

from __future__ import annotations

import asyncio

from fastapi import Request
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
_HEAD = "coord.head"


class HeadRequests:
    """ASGI middleware: HEAD is answered as GET would be, without the body (RFC 9110, section 9.3.2).

        app.add_middleware(HeadRequests)

    `Allow`, of a 405, then lists HEAD too.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope[_HEAD] = True
            if scope["method"] == "HEAD":
                # Of a server with a newer ASGI, Starlette ends a stream only at the next piece of it.
                scope = {**scope, "method": "GET", "asgi": {**scope["asgi"], "spec_version": "2.3"}}
                receive, send = _head_alone(receive, send)
        await self._app(scope, receive, send)


def _head_alone(receive: Receive, send: Send) -> tuple[Receive, Send]:
    """The client is as good as gone once it has the beginning of the answer."""
    sent = asyncio.Event()

    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            await send({"type": "http.response.body", "body": b""})
            sent.set()

    async def receive_until_sent() -> Message:
        receiving, sending = asyncio.ensure_future(receive()), asyncio.ensure_future(sent.wait())
        try:
            await asyncio.wait({receiving, sending}, return_when=asyncio.FIRST_COMPLETED)
            return {"type": "http.disconnect"} if sent.is_set() else receiving.result()
        finally:
            receiving.cancel()
            sending.cancel()

    return receive_until_sent, send_head


def allowed(request: Request) -> list[str]:
    """The methods of the request's path, over all of its routes: each route knows only its own."""
    found = []
    for method in METHODS:
        scope = {**request.scope, "method": "GET" if method == "HEAD" and _HEAD in request.scope else method}
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.router.routes):
            found.append(method)
    return found
