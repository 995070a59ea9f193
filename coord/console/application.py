"""The console as an ASGI application, to be mounted anywhere: its routes, and what every answer carries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from coord.console.access import Access
from coord.console.desk import ASSETS, Desk
from coord.console.handlers import Handlers
from coord.console.pages import PAGES

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    # Not `no-referrer`, with which a browser sends `Origin: null` with the console's own forms (Fetch, section 3.2).
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def console(
    session_maker: async_sessionmaker[AsyncSession], *, full_token: str | None = None, read_token: str | None = None
) -> ASGIApp:
    """The console, for `app.mount("/console", console(session_maker, full_token=...))`.

    It shows the ledger that the sessions write, and the waits of the process that serves it. Without a token it is
    closed: every page is 403 and says how to open it. `full_token` shows and does everything, `read_token` shows what
    waits for what, and neither arguments nor results nor tracebacks. Raises `ValueError` for a token of less than 16
    characters, or two that are equal. Opens no connection, and starts nothing: what is read is read for who looks.
    """
    desk = Desk(session_maker, Access(full_token=full_token, read_token=read_token))
    handlers = Handlers(desk)
    routes = [Route(page.path, handlers.page(page), methods=["GET"]) for page in PAGES]
    routes += [
        Route("/sign-in", handlers.sign_in, methods=["POST"]),
        Route("/sign-out", handlers.signed_in(handlers.sign_out), methods=["POST"]),
        Route("/static/{name}", _static(desk), methods=["GET"]),
    ]
    for path, actions, ask, do in (
        ("/jobs/{job_id:uuid}", ("retry", "cancel"), handlers.ask_job, handlers.do_job),
        ("/queues", ("pause", "resume"), handlers.ask_queue, handlers.do_queue),
        ("/bulk", ("retry", "cancel"), handlers.ask_bulk, handlers.do_bulk),
    ):
        for action in actions:
            routes.append(Route(f"{path}/{action}", handlers.asking(ask, action), methods=["GET"]))
            routes.append(Route(f"{path}/{action}", handlers.doing(do, action), methods=["POST"]))
    app = Starlette(routes=routes, exception_handlers={HTTPException: handlers.http_error})
    return _Mounted(app)


def _static(desk: Desk) -> Any:
    async def static(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in desk.assets:
            raise HTTPException(404)
        return Response(desk.assets[name], media_type=ASSETS[name], headers={"Cache-Control": "max-age=3600"})

    return static


class _Mounted:
    """Adds the headers, and finds its way behind a proxy whose prefix the application knows and the path has not."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(_found_way(scope), receive, send_with_headers)


def _found_way(scope: Scope) -> Scope:
    """Starlette matches what follows `root_path`; of a path without it, what follows the mount's own prefix."""
    root, above = scope.get("root_path", ""), scope.get("app_root_path", "")
    prefix = root.removeprefix(above)
    if scope["path"].startswith(root) or not scope["path"].startswith(prefix):
        return scope
    return {**scope, "path": f"{above}{scope['path']}"}
