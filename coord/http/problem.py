"""Every error answer is a problem document (RFC 9457), and this is the one table from error to status."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import asyncpg
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from coord.errors import (
    CoordError,
    DeadlockError,
    JobCancelledError,
    JobFailedError,
    LockTimeoutError,
    RowNotFoundError,
    TooManyWaitersError,
    UniqueKeyConflictError,
    WaitTimeoutError,
)
from coord.transient import is_transient

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fastapi import Request

logger = logging.getLogger("coord.http")

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER = 1
"""Seconds after which to ask again for what was refused for now."""
CLIENT_GONE = 499
"""Nobody reads it; it is nginx's status for a client that went away, and looks right in access logs."""

STATUSES: tuple[tuple[type[Exception], int, str], ...] = (
    (RowNotFoundError, 404, "not-found"),
    (UniqueKeyConflictError, 409, "unique-key-conflict"),
    (JobCancelledError, 409, "job-cancelled"),
    (JobFailedError, 500, "job-failed"),
    (TooManyWaitersError, 503, "too-many-waiters"),
    (LockTimeoutError, 503, "lock-timeout"),
    (DeadlockError, 503, "deadlock"),
    (WaitTimeoutError, 503, "wait-timeout"),
    (PoolTimeoutError, 503, "busy"),
)
"""Coord's errors and the pool's, the status of each, and the last part of its problem type."""
DETAILS = {
    "lock-timeout": "a table was locked for too long",
    "deadlock": "two transactions were in each other's way",
    "busy": "every connection to the database is in use",
}
"""Instead of the error's own words, which name tables and backends."""


class Problem(BaseModel):
    """A problem document; some have more members."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str


def problem(
    status: int, detail: str, *, kind: str | None = None, headers: Mapping[str, str] | None = None, **members: Any
) -> JSONResponse:
    """A problem document of the type `urn:coord:problem:<kind>`, or of none of its own; 503 says when to ask again."""
    found = {"type": f"urn:coord:problem:{kind}" if kind else "about:blank", "title": _title(status), "status": status}
    said = dict(headers or {})
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        said.setdefault("Retry-After", str(RETRY_AFTER))
    return JSONResponse({**found, "detail": detail, **members}, status, said, media_type=MEDIA_TYPE)


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses=`: the problem documents it may answer with."""
    retry = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}, "required": True}}
    return {
        status: {
            "description": _title(status),
            "content": {MEDIA_TYPE: {"schema": Problem.model_json_schema()}},
            **({"headers": retry} if status == HTTPStatus.SERVICE_UNAVAILABLE else {}),
        }
        for status in statuses
    }


def problem_handlers() -> dict[Any, Callable[..., Any]]:
    """For `FastAPI(exception_handlers=…)`: whatever is raised is answered with a problem document."""
    return {
        HTTPException: _http,
        RequestValidationError: _invalid,
        CoordError: _coord,
        PoolTimeoutError: _coord,
        DBAPIError: _database,
        asyncpg.PostgresError: _database,  # not wrapped by SQLAlchemy: a server that refuses the connection
        OSError: _database,
        ClientDisconnect: _gone,
        Exception: _bug,
    }


def _title(status: int) -> str:
    return HTTPStatus(status).phrase


async def _http(_: Request, error: HTTPException) -> Response:
    # FastAPI answers 400, and nobody else here does, when a body cannot even be decoded: it is not JSON either.
    status = 422 if error.status_code == 400 and error.detail.startswith("There was an error") else error.status_code
    return problem(status, error.detail, kind=getattr(error, "kind", None), headers=error.headers)


async def _invalid(_: Request, error: RequestValidationError) -> Response:
    """Without the refused input: not every input can be written as JSON again (NaN, half a surrogate pair)."""
    errors = [{"where": [str(part) for part in found["loc"]], "message": found["msg"]} for found in error.errors()]
    detail = "; ".join(f"{'.'.join(found['where'])}: {found['message']}" for found in errors)
    return problem(422, detail, kind="invalid", errors=errors)


async def _coord(_: Request, error: Exception) -> Response:
    for kind, status, name in STATUSES:
        if isinstance(error, kind):
            members: dict[str, Any] = (
                {"job": str(error.job_id)} if isinstance(error, JobFailedError | JobCancelledError) else {}
            )
            return problem(status, DETAILS.get(name, str(error)), kind=name, **members)
    raise error


async def _database(_: Request, error: Exception) -> Response:
    if not is_transient(error) and not isinstance(error, OSError):
        raise error
    logger.warning("The database cannot be reached: %s", " ".join(str(error).split()))
    return problem(503, "the database cannot be reached", kind="database-away")


async def _gone(_: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _bug(_: Request, error: Exception) -> Response:
    return problem(500, "this is our fault, and in our log")
