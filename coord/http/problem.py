"""Every error answer is a problem document (RFC 9457), and this is the one table from error to status."""

from __future__ import annotations

import http.client
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from fastapi.responses import JSONResponse
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

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

if TYPE_CHECKING:
    from collections.abc import Mapping

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 1
"""After which a client may repeat a request that was refused for now."""


class Kind(NamedTuple):
    """A problem type."""

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
    *(OUT_OF_TIME, DATABASE_AWAY, CONFLICT, CONTENTION),
    *ERRORS.values(),
)
ANYWHERE = (408, 413, 422, 431, 500, 503)
"""Statuses that any route may answer: size, time, parameters, bugs, servers that are away."""

_INTERNAL = re.compile(
    r"\[SQL: |\(sqlalchemy\.|<class '|\[Errno |://|(?:^|[\s'\"(=])/\w|0x[0-9a-f]{6}|\bpassword\b"
    r"|\b(?:File|relation|column|constraint|type|function|schema|role|user|database) \""
)


def problem(
    status: int, detail: str, *, kind: str | None = None, headers: Mapping[str, str] | None = None, **members: Any
) -> JSONResponse:
    """A problem document of the type `urn:coord:problem:<kind>`, or of none of its own; 503 has `Retry-After`."""
    title = phrase(status) if kind is None else kind.replace("-", " ").capitalize()
    found = {"type": _urn(kind), "title": title, "status": status, "detail": _text(detail), **members}
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
    """
    return {status: _declared(status) for status in statuses or ANYWHERE}


def public_reason(text: str | None) -> str | None:
    """A job's error as any client may read it: of one that shows SQL, paths, addresses or the like, only its kind."""
    if text is None:
        return None
    line = " ".join(text.split())
    return line if _INTERNAL.search(line) is None else line.split(":")[0].split("(")[0].strip() or "an internal error"


def phrase(status: int) -> str:
    return http.client.responses.get(status, "Error")


def _urn(kind: str | None) -> str:
    return "about:blank" if kind is None else f"urn:coord:problem:{kind}"


def _text(detail: str) -> str:
    """Half a surrogate pair, which a client may have sent as JSON, cannot be sent back."""
    return detail.encode(errors="replace").decode()


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
