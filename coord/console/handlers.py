"""Requests and their answers: who asks, what he may, and the page or the stream that he is given."""

from __future__ import annotations

import logging
import re
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, RedirectResponse, StreamingResponse

from coord.cancellation import interruptible
from coord.console import actions, wording
from coord.console.access import has_form_token, is_from_here
from coord.console.listing import Filter
from coord.console.live import UnreadableError, events
from coord.errors import RowNotFoundError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Send

    from coord.console.access import Viewer
    from coord.console.actions import Question
    from coord.console.desk import Desk
    from coord.console.pages import Page

    Handler = Callable[[Request], Awaitable[Response]]
    Ask = Callable[[Request, str], Awaitable[Question]]
    Do = Callable[[Request, str, Mapping[str, str]], Awaitable[str]]
    """Gives where to go on, as seen from the console's first page."""

logger = logging.getLogger("coord.console")

MAX_FORM_BYTES = 65_536
MAX_STREAMS = 200
_REFUSALS: Mapping[type[Exception], tuple[int, str]] = {
    UnreadableError: (503, "The ledger cannot be read"),
    RowNotFoundError: (404, "Not there"),
    ValueError: (400, "That cannot be asked for"),
}
_WITHIN = re.compile(r"(?!.*//)[\w./?&=%+-]{0,1000}")
"""Where somebody wanted to go before he signed in: a place in the console."""


class Handlers:
    """Of one console."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._streams = 0

    def page(self, page: Page) -> Handler:
        """As a page, or for `Accept: text/event-stream` as what it shows after each change."""

        async def show(request: Request, viewer: Viewer) -> Response:
            if "text/event-stream" in request.headers.get("accept", ""):
                return self._stream(page, request, viewer)
            try:
                read = await page.read(self._desk, request, viewer)
            except tuple(_REFUSALS) as error:
                return self._refused(request, error, viewer)
            context = {**self._context(request, viewer), **read, "page": page}
            return HTMLResponse(self._desk.render(f"{page.name}.html", **context))

        return self.signed_in(show)

    def _stream(self, page: Page, request: Request, viewer: Viewer) -> Response:
        if self._streams >= MAX_STREAMS:
            raise HTTPException(503, f"{MAX_STREAMS} event streams are as many as this process serves")

        async def show() -> str:
            try:
                read = await page.read(self._desk, request, viewer)
            except (RowNotFoundError, ValueError) as error:
                raise UnreadableError(str(error)) from error
            context = {**self._context(request, viewer), **read, "page": page}
            return self._desk.render(f"{page.name}_live.html", **context)

        async def counted() -> Any:
            self._streams += 1
            try:
                async for event in events(show, interval=page.interval, last=request.headers.get("last-event-id")):
                    yield event
            finally:
                self._streams -= 1

        headers = {"X-Accel-Buffering": "no", "Vary": "Accept"}
        return _EventStream(counted(), media_type="text/event-stream", headers=headers)

    async def sign_in(self, request: Request) -> Response:
        fields = await _fields(request)
        onward = fields.get("next", "")
        onward = onward if _WITHIN.fullmatch(onward) else ""
        if not is_from_here(request):
            return self._message(request, 403, "Refused", "The form was not sent from a page of the console.")
        role = self._desk.access.role_of(fields.get("token", ""))
        if role is None:
            logger.warning("Somebody has tried to sign in to the console with a wrong token")
            return self._sign_in_page(request, onward, "That is not a token of this console.")
        response = RedirectResponse(f"{_base(request)}{onward}", 303)
        self._desk.access.sign_in(response, request, role)
        return response

    async def sign_out(self, request: Request, viewer: Viewer) -> Response:
        await self._allowed(request, viewer)
        response = RedirectResponse(_base(request), 303)
        self._desk.access.sign_out(response)
        return response

    def asking(self, ask: Ask, action: str) -> Handler:
        """The confirmation page of an action."""

        async def show(request: Request, viewer: Viewer) -> Response:
            if not viewer.is_full:
                return self._read_only(request, viewer)
            try:
                question = await ask(request, action)
            except tuple(_REFUSALS) as error:
                return self._refused(request, error, viewer)
            context = self._context(request, viewer)
            return HTMLResponse(self._desk.render("confirm.html", **context, question=question))

        return self.signed_in(show)

    def doing(self, do: Do, action: str) -> Handler:
        """What the confirmation page sends: from here, with its token, by who may act."""

        async def act(request: Request, viewer: Viewer) -> Response:
            fields = await self._allowed(request, viewer)
            if not viewer.is_full:
                return self._read_only(request, viewer)
            try:
                onward = await do(request, action, fields)
            except tuple(_REFUSALS) as error:
                return self._refused(request, error, viewer)
            self._desk.reads.forget()
            logger.info("The console was told: %s %s", action, request.url.path)
            return RedirectResponse(f"{_base(request)}{onward}", 303)

        return self.signed_in(act)

    async def ask_job(self, request: Request, action: str) -> Question:
        async with self._desk.session_maker() as session:
            return await interruptible(actions.ask_about_job(session, action, request.path_params["job_id"]))

    async def do_job(self, request: Request, action: str, fields: Mapping[str, str]) -> str:
        job_id = request.path_params["job_id"]
        async with self._desk.session_maker() as session:
            done = await interruptible(actions.do_to_job(session, action, job_id))
        return f"jobs/{job_id}?done={done}"

    async def ask_queue(self, request: Request, action: str) -> Question:
        return actions.ask_about_queue(action, actions.queue_of(request.query_params))

    async def do_queue(self, request: Request, action: str, fields: Mapping[str, str]) -> str:
        queue = actions.queue_of(fields)
        async with self._desk.session_maker() as session:
            await interruptible(actions.do_to_queue(session, action, queue))
        return f"?done={action}"

    async def ask_bulk(self, request: Request, action: str) -> Question:
        wanted = _bulk(action, request.query_params)
        read = partial(actions.count_matching, action=action, wanted=wanted)
        number = await self._desk.reads.get(("matching", action, wanted), read, interval=0)
        return actions.ask_about_many(action, wanted, number, wording.count(number))

    async def do_bulk(self, request: Request, action: str, fields: Mapping[str, str]) -> str:
        return f"jobs?{await actions.do_to_many(self._desk, action, _bulk(action, fields))}"

    async def http_error(self, request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        said = error.detail if isinstance(error, HTTPException) else ""
        viewer = self._desk.access.viewer_of(request)
        if self._desk.access.is_closed or viewer is None:
            return HTMLResponse(
                self._desk.render("message.html", **self._context(request), title=said, text=""), status
            )
        return self._message(request, status, said, "", viewer)

    def signed_in(self, answer: Callable[[Request, Viewer], Awaitable[Response]]) -> Handler:
        """`answer`, or what he is told who may see nothing."""

        async def handle(request: Request) -> Response:
            if self._desk.access.is_closed:
                return HTMLResponse(self._desk.render("closed.html", **self._context(request)), 403)
            viewer = self._desk.access.viewer_of(request)
            return self._sign_in_page(request, _here(request)) if viewer is None else await answer(request, viewer)

        return handle

    async def _allowed(self, request: Request, viewer: Viewer) -> Mapping[str, str]:
        """The fields of a form that this viewer was given, and sends from here."""
        fields = await _fields(request)
        if not is_from_here(request) or not has_form_token(viewer, fields):
            raise HTTPException(
                403, "The form is not one that you were given: go back, reload the page, and try again."
            )
        return fields

    def _refused(self, request: Request, error: Exception, viewer: Viewer) -> HTMLResponse:
        status, title = next(told for kind, told in _REFUSALS.items() if isinstance(error, kind))
        return self._message(request, status, title, str(error), viewer)

    def _read_only(self, request: Request, viewer: Viewer) -> HTMLResponse:
        said = "You have signed in with the token that only reads. Sign out, and in with the other one."
        return self._message(request, 403, "Not with this token", said, viewer)

    def _sign_in_page(self, request: Request, onward: str, fault: str = "") -> HTMLResponse:
        context = {**self._context(request), "onward": onward, "fault": fault}
        return HTMLResponse(self._desk.render("sign_in.html", **context), 403)

    def _message(
        self, request: Request, status: int, title: str, text: str, viewer: Viewer | None = None
    ) -> HTMLResponse:
        context = self._context(request, viewer)
        return HTMLResponse(self._desk.render("message.html", **context, title=title, text=text), status)

    def _context(self, request: Request, viewer: Viewer | None = None) -> dict[str, Any]:
        return {
            "base": _base(request),
            "viewer": viewer,
            "notice": actions.notice(request.query_params) if viewer is not None else None,
            "page": None,
        }


class _EventStream(StreamingResponse):
    """Closes what it sends from, when its client has left too."""

    async def stream_response(self, send: Send) -> None:
        body: Any = self.body_iterator
        async with aclosing(body):
            await super().stream_response(send)


def _bulk(action: str, given: Mapping[str, str]) -> Filter:
    wanted = Filter.of(given)
    if not actions.states_of(action, wanted):
        raise ValueError(f"{wanted.state} jobs cannot be told to {action}")
    return wanted


def _place(request: Request) -> str:
    """The path within the console, without its first slash."""
    path: str = request.scope["path"]
    return path.removeprefix(request.scope.get("root_path", "")).removeprefix("/")


def _here(request: Request) -> str:
    if request.method != "GET":
        return ""
    query = f"?{request.url.query}" if request.url.query else ""
    return f"{_place(request)}{query}"


def _base(request: Request) -> str:
    """The console's first page as seen from this one: whatever prefixes a proxy adds or takes, it is right."""
    return "../" * _place(request).count("/") or "./"


async def _fields(request: Request) -> Mapping[str, str]:
    """Of a form; a later field of one name wins."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM_BYTES:
            raise HTTPException(413, "The form is too large.")
    return dict(parse_qsl(body.decode("latin-1"), keep_blank_values=True, encoding="utf-8", errors="replace"))
