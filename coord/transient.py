"""Which failures pass by themselves: the same transaction, run again from its first statement, may well succeed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import asyncpg
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from coord.errors import CoordError

if TYPE_CHECKING:
    from collections.abc import Iterator

STATES = {"40001", "40P01", "55P03"}
"""Serialization failure, deadlock, lock not available (appendix A of PostgreSQL's manual)."""
CLASSES = {"08", "53"}
"""Connection exceptions, insufficient resources."""
SHUTDOWNS = {"57P01", "57P02", "57P03", "25P03", "25P04"}
"""The server stops, crashed or starts; it ended a transaction that did nothing, or too much, for too long."""


def is_transient(error: BaseException) -> bool:
    """Lock timeouts, deadlocks, serialization failures, lost connections, and an exhausted pool."""
    if isinstance(error, BaseExceptionGroup):
        return all(is_transient(part) for part in error.exceptions)
    return any(_passes(cause) for cause in _chain(error))


def _passes(error: BaseException) -> bool:
    match error:
        case CoordError():
            return error.retryable
        case ConnectionError() | PoolTimeoutError():
            return True
        case DBAPIError() if error.connection_invalidated:
            return True
        case asyncpg.InterfaceError():
            return "connection" in str(error) and not isinstance(error, ValueError)
    state = str(getattr(error, "sqlstate", None) or "")
    return state in STATES or state in SHUTDOWNS or state[:2] in CLASSES


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it says it came from: SQLAlchemy and drivers wrap what PostgreSQL has said."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        if isinstance(seen, DBAPIError) and isinstance(seen.orig, BaseException):
            yield seen.orig
        seen = seen.__cause__ or (seen.__context__ if isinstance(seen, PendingRollbackError) else None)
