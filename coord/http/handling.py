"""Errors become problem documents that show nothing of how this service is made."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import asyncpg
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from coord.errors import CoordError, JobCancelledError, JobFailedError
from coord.http.methods import allowed
from coord.http.problem import (
    CONFLICT,
    CONTENTION,
    DATABASE_AWAY,
    ERRORS,
    INVALID,
    phrase,
    problem,
    problem_of,
    public_reason,
)
from coord.retryable import CONTENTION_STATES, is_retryable, sqlstate_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi import Request

logger = logging.getLogger("coord.http")

CLIENT_GONE = 499
"""No client reads it; it is nginx's status for a client that went away, and looks right in access logs."""
MAX_ERRORS = 20
"""Of one request, in a problem document."""
VIOLATIONS = {"23505", "23P01"}
"""Of a unique and of an exclusion constraint, at a statement or, where it is deferred, at the commit."""


def problem_handlers() -> dict[Any, Callable[..., Any]]:
    """For `FastAPI(exception_handlers=…)`: whatever is raised is answered with a problem document."""
    return {
        HTTPException: _http,
        RequestValidationError: _invalid,
        CoordError: _coord,
        PoolTimeoutError: _coord,
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
        {"where": [str(part).encode(errors="replace").decode() for part in found["loc"]], "message": found["msg"]}
        for found in error.errors()[:MAX_ERRORS]
    ]
    detail = "; ".join(f"{'.'.join(found['where'])}: {found['message']}" for found in errors)
    return problem_of(INVALID, detail, errors=errors)


async def _coord(_: Request, error: Exception) -> Response:
    kind = next((kind for known, kind in ERRORS.items() if isinstance(error, known)), None)
    match error:
        case _ if kind is None:
            raise error
        case JobFailedError():
            return problem_of(kind, public_reason(error.reason), job=str(error.job_id))
        case JobCancelledError():
            return problem_of(kind, job=str(error.job_id))
    return problem_of(kind)


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
    if not isinstance(error, OSError):
        return True
    step = error.__traceback__
    while step is not None:
        if str(step.tb_frame.f_globals.get("__name__")).partition(".")[0] in {"sqlalchemy", "asyncpg"}:
            return True
        step = step.tb_next
    return False
