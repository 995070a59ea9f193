"""Every error answer is a problem document (RFC 9457), and this is the one table from error to status."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import asyncpg
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException

from coord import CoordError, JobCancelledError, JobFailedError, RowNotFoundError, TooManyWaitersError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import Request

RETRY_AFTER = {"Retry-After": "1"}


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None, **members: Any) -> JSONResponse:
    content = {"title": HTTPStatus(status).phrase, "status": status, "detail": detail, **members}
    return JSONResponse(content, status, headers, media_type="application/problem+json")


async def _refused(_: Request, error: HTTPException) -> JSONResponse:
    # FastAPI answers 400, and nobody else here does, when a body cannot even be decoded: it is not JSON either.
    status = 422 if error.status_code == 400 else error.status_code
    return problem(status, error.detail, error.headers)


async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    """Without the refused input: not every input can be written as JSON again (NaN, half a surrogate pair)."""
    errors = [{"where": [str(part) for part in found["loc"]], "message": found["msg"]} for found in error.errors()]
    return problem(422, "; ".join(f"{'.'.join(found['where'])}: {found['message']}" for found in errors), errors=errors)


async def _coord(_: Request, error: CoordError) -> JSONResponse:
    match error:
        case RowNotFoundError():
            return problem(404, str(error))
        case JobFailedError() | JobCancelledError():
            return problem(500, str(error))
        case TooManyWaitersError() | CoordError(retryable=True):
            return problem(503, str(error), RETRY_AFTER)
    raise error


async def _database(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, DBAPIError) and not error.connection_invalidated:
        raise error
    return problem(503, "the database cannot be reached", RETRY_AFTER)


async def _bug(_: Request, error: Exception) -> JSONResponse:
    return problem(500, "this is our fault, and in our log")


HANDLERS: dict[Any, Any] = {
    HTTPException: _refused,
    RequestValidationError: _invalid,
    CoordError: _coord,
    PoolTimeoutError: _database,
    DBAPIError: _database,
    asyncpg.PostgresError: _database,  # not wrapped by SQLAlchemy: a server that refuses the connection
    OSError: _database,
    Exception: _bug,
}
