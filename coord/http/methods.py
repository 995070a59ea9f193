"""Methods that FastAPI leaves out: HEAD, and what `Allow` must list."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.routing import Match

if TYPE_CHECKING:
    from fastapi import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
_HEAD = "coord.head"


class HeadRequests:
    """ASGI middleware: HEAD is answered as GET would be, without the body (RFC 9110, section 9.3.2).

    app.add_middleware(HeadRequests)
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[_HEAD] = True
        if scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        head = _Head(receive, send)
        # Of a server with a newer ASGI, Starlette ends a stream only at the next piece of it.
        as_get = {**scope, "method": "GET", "asgi": {**scope["asgi"], "spec_version": "2.3"}}
        await self._app(as_get, head.receive, head.send)


class _Head:
    """The beginning of an answer, after which the client is as good as gone."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._sent = asyncio.Event()

    async def receive(self) -> Message:
        receiving, sent = asyncio.ensure_future(self._receive()), asyncio.ensure_future(self._sent.wait())
        try:
            await asyncio.wait({receiving, sent}, return_when=asyncio.FIRST_COMPLETED)
            return {"type": "http.disconnect"} if self._sent.is_set() else receiving.result()
        finally:
            receiving.cancel()
            sent.cancel()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._send(message)
            await self._send({"type": "http.response.body", "body": b""})
            self._sent.set()


def allowed(request: Request) -> list[str]:
    """The methods of the request's path, over all of its routes: each route knows only its own."""
    names = ("type", "path", "raw_path", "root_path", "headers", "server", "scheme", "query_string")
    scope = {name: request.scope[name] for name in names if name in request.scope}
    routes = request.app.router.routes
    found = {
        method
        for method in METHODS
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in routes)
    }
    if "GET" in found and _HEAD in request.scope:
        found.add("HEAD")
    return [method for method in METHODS if method in found]
