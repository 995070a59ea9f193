"""Every error answer is a problem document (RFC 9457) that shows nothing of how this service is made.

Here is the one table from error to status, and the handlers that answer by it.
"""

from __future__ import annotations

import http.client
import logging
import re
from collections.abc import Callable, Mapping
from functools import partial
from traceback import walk_tb
from typing import Any, NamedTuple

import asyncpg
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from coord.errors import (
    DeadlockError,
    JobCancelledError,
    JobFailedError,
    LockTimeoutError,
    RowNotFoundError,
    TooManyWaitersError,
    UniqueKeyConflictError,
    WaitTimeoutError,
)
from coord.http.methods import allowed
from coord.retryable import CONTENTION_STATES, is_retryable, sqlstate_of

logger = logging.getLogger("coord.http")

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 1
"""After which a client may repeat a request that was refused for now."""


CLIENT_GONE = 499
"""No client reads it; it is nginx's status for a client that went away, and looks right in access logs."""
MAX_ERRORS = 20
"""Of one request, in a problem document."""
VIOLATIONS = {"23505", "23P01"}
"""Of a unique and of an exclusion constraint, at a statement or, where it is deferred, at the commit."""


class Kind(NamedTuple):
    name: str
    """The last part of its URN."""
    status: int
    detail: str
    """What the client gets, in place of an error's own text, which may name tables and backends."""


MALFORMED_KEY = Kind("idempotency-key-malformed", 400, "Idempotency-Key is one quoted string of 1 to 255 characters")
UNSCOPED_KEY = Kind(
    "idempotency-key-unscoped",
    400,
    "Idempotency-Key is not accepted here: idempotency(caller=...) must tell whose keys they are",
)
MISSING_KEY = Kind("idempotency-key-missing", 400, "this request needs an Idempotency-Key")
REUSED_KEY = Kind("idempotency-key-reused", 422, "another request has used this Idempotency-Key")
EXPIRED_JOB = Kind("idempotency-key-expired", 422, "the job of this Idempotency-Key is no longer known")
INVALID = Kind("invalid", 422, "the request is not as it should be")
OUT_OF_TIME = Kind("out-of-time", 503, "there was no time left to answer")
DATABASE_AWAY = Kind("database-away", 503, "the database cannot be reached")
CONFLICT = Kind("conflict", 409, "there is something already that excludes this")
CONTENTION = Kind("contention", 503, "others changed the same at the same time")
ERRORS: dict[type[Exception], Kind] = {
    RowNotFoundError: Kind("not-found", 404, "it is not there, or not any more"),
    UniqueKeyConflictError: Kind("unique-key-conflict", 409, "an unfinished job has the same key, and other arguments"),
    JobCancelledError: Kind("job-cancelled", 409, "the job was cancelled"),
    JobFailedError: Kind("job-failed", 500, "the job has failed"),
    TooManyWaitersError: Kind("too-many-waiters", 503, "as many requests wait here as may"),
    LockTimeoutError: Kind("lock-timeout", 503, "what is needed was locked for too long"),
    DeadlockError: Kind("deadlock", 503, "two transactions were in each other's way"),
    WaitTimeoutError: Kind("wait-timeout", 503, "nothing has changed in time"),
    PoolTimeoutError: Kind("busy", 503, "every connection to the database is in use"),
}
"""Coord's errors and the pool's. What is not here is a bug: 500, and the error is only in the log."""
KINDS = (
    *(MALFORMED_KEY, UNSCOPED_KEY, MISSING_KEY, REUSED_KEY, EXPIRED_JOB, INVALID),
    *(OUT_OF_TIME, DATABASE_AWAY, CONFLICT, CONTENTION, *ERRORS.values()),
)
ANYWHERE = (408, 413, 422, 431, 500, 503)
"""Statuses that any route may answer: size, time, parameters, bugs, servers that are away."""

_INTERNAL = re.compile(
    r"\[SQL: |\(sqlalchemy\.|<class '|\[Errno |://|(?:^|[\s'\"(=])/\w|0x[0-9a-f]{6}|\bpassword\b"
    r"|\b(?:File|relation|column|constraint|type|function|schema|role|user|database) \"|\badvisory lock ['\"(\d-]"
)


def problem(
    status: int, detail: str, *, kind: str | None = None, headers: Mapping[str, str] | None = None, **members: Any
) -> JSONResponse:
    """A problem document of the type `urn:coord:problem:<kind>`, or of none of its own; 503 has `Retry-After`."""
    title = phrase(status) if kind is None else kind.replace("-", " ").capitalize()
    found = {"type": _urn(kind), "title": title, "status": status, "detail": _sendable(detail), **members}
    fields = dict(headers or {})
    if status == http.client.SERVICE_UNAVAILABLE:
        fields.setdefault("Retry-After", str(RETRY_AFTER_SECONDS))
    return JSONResponse(found, status, fields, media_type=MEDIA_TYPE)


def problem_of(kind: Kind, detail: str | None = None, **members: Any) -> JSONResponse:
    return problem(kind.status, detail or kind.detail, kind=kind.name, **members)


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses=`: the problem documents it may answer with; for an application's, those of any route.

        app = FastAPI(exception_handlers=problem_handlers(), responses=problems())

        @app.get("/orders/{order_id}", responses=problems(404, 422))

    Without statuses they are those that any route may answer: 408, 413, 422, 431, 500 and 503.
    """
    return {status: _declared(status) for status in statuses or ANYWHERE}


def public_reason(text: str | None) -> str | None:
    """A job's error as any client may read it: of one that shows SQL, paths, keys or the like, only its kind."""
    if text is None:
        return None
    line = " ".join(text.split())
    return line if _INTERNAL.search(line) is None else line.split(":")[0].split("(")[0].strip() or "an internal error"


def phrase(status: int) -> str:
    return http.client.responses.get(status, "Error")


def _urn(kind: str | None) -> str:
    return "about:blank" if kind is None else f"urn:coord:problem:{kind}"


def _sendable(text: str) -> str:
    """Half a surrogate pair, which a client may have sent as JSON, cannot be sent back."""
    return text.encode(errors="replace").decode()


def _declared(status: int) -> dict[str, Any]:
    """Some problems have more members."""
    types = [_urn(None), *(_urn(kind.name) for kind in KINDS if kind.status == status)]
    members: dict[str, Any] = {
        "type": {"type": "string", "enum": types},
        "title": {"type": "string"},
        "status": {"type": "integer", "const": status},
        "detail": {"type": "string"},
    }
    schema = {"title": f"Problem{status}", "type": "object", "properties": members, "required": [*members]}
    found = {"description": phrase(status), "content": {MEDIA_TYPE: {"schema": schema}}}
    headers = {401: ("WWW-Authenticate", "string"), 503: ("Retry-After", "integer")}
    if status in headers:
        name, kind = headers[status]
        found["headers"] = {name: {"schema": {"type": kind}, "required": True}}
    return found


def problem_handlers() -> dict[Any, Callable[..., Any]]:
    """For `FastAPI(exception_handlers=…)`: whatever is raised is answered with a problem document."""
    return {
        HTTPException: _http,
        RequestValidationError: _invalid,
        **{error: partial(_known, kind) for error, kind in ERRORS.items()},
        DBAPIError: _database,
        asyncpg.PostgresError: _database,  # not wrapped by SQLAlchemy: a server that refuses the connection
        asyncpg.InterfaceError: _database,
        OSError: _database,  # nor is one that is not there
        ClientDisconnect: _gone,
        Exception: _bug,
    }


async def _http(request: Request, error: HTTPException) -> Response:
    status, detail, headers = error.status_code, error.detail, dict(error.headers or {})
    if status in {204, 304}:  # which have no body
        return Response(status_code=status, headers=headers)
    if status == 400 and detail == "There was an error parsing the body":  # FastAPI, of what is not even text
        return problem_of(INVALID, f"body: {detail}")
    if status == 405 and "Allow" in headers:
        headers["Allow"] = ", ".join(allowed(request)) or headers["Allow"]
    members: dict[str, Any] = {} if isinstance(detail, str) else {"errors": detail}
    text = detail if isinstance(detail, str) else phrase(status)
    return problem(status, text, kind=getattr(error, "kind", None), headers=headers, **members)


async def _invalid(_: Request, error: RequestValidationError) -> Response:
    """Without the refused input: not every input can be written as JSON again (NaN, half a surrogate pair)."""
    errors = [
        {"where": [_sendable(str(part)) for part in found["loc"]], "message": found["msg"]}
        for found in error.errors()[:MAX_ERRORS]
    ]
    detail = "; ".join(f"{'.'.join(found['where'])}: {found['message']}" for found in errors)
    return problem_of(INVALID, detail, errors=errors)


async def _known(kind: Kind, _: Request, error: Exception) -> Response:
    detail = public_reason(error.reason) if isinstance(error, JobFailedError) else None
    job = {"job": str(error.job_id)} if isinstance(error, JobFailedError | JobCancelledError) else {}
    return problem_of(kind, detail, **job)


async def _database(_: Request, error: Exception) -> Response:
    if sqlstate_of(error) in VIOLATIONS:
        return problem_of(CONFLICT)
    if not _of_the_database(error) or not (is_retryable(error) or isinstance(error, OSError)):
        raise error
    if sqlstate_of(error) in CONTENTION_STATES:
        return problem_of(CONTENTION)
    cause = error.orig if isinstance(error, DBAPIError) else error  # without the statement and its values
    logger.warning("The database cannot be reached: %s", " ".join(str(cause).split()) or type(cause).__name__)
    return problem_of(DATABASE_AWAY)


async def _gone(_: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _bug(_: Request, error: Exception) -> Response:
    return problem(500, "this is our fault, and in our log")


def _of_the_database(error: Exception) -> bool:
    """Whether SQLAlchemy or the driver met it: a file that is missing, or another service, is not the database."""
    modules = (str(frame.f_globals.get("__name__")) for frame, _ in walk_tb(error.__traceback__))
    return not isinstance(error, OSError) or any(name.split(".")[0] in {"sqlalchemy", "asyncpg"} for name in modules)
