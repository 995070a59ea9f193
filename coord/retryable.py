"""Which failures pass by themselves: the same transaction, run again from its first statement, may well succeed."""

from __future__ import annotations

import errno
import socket
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
SHUTDOWNS = {"57P01", "57P02", "57P03", "57P05", "25P03", "25P04"}
"""The server stops, crashed or starts; it ended what did nothing, or too much, for too long."""
NETWORK = {errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH}
INVALIDATED = "8s2b"
"""SQLAlchemy's code for a transaction whose connection was lost before."""


def is_retryable(error: BaseException) -> bool:
    """Lock timeouts, deadlocks, serialization failures, lost connections, and an exhausted pool."""
    return any(_passes(cause) for cause in _chain(error))


def _passes(error: BaseException) -> bool:
    match error:
        case BaseExceptionGroup():
            return all(is_retryable(part) for part in error.exceptions)
        case CoordError():
            return error.retryable
        case ConnectionError() | PoolTimeoutError() | socket.gaierror():
            return True
        case OSError():
            # The last is asyncio's, of a host with several addresses.
            return error.errno in NETWORK or str(error).startswith("Multiple exceptions: ")
        case PendingRollbackError() if error.code == INVALIDATED:
            return True
        case DBAPIError() if error.connection_invalidated:
            return True
        case asyncpg.InternalClientError():  # an answer that it did not expect: the connection is of no use any more
            return True
        case asyncpg.InterfaceError():
            return "connection" in str(error) and not isinstance(error, ValueError)
    state = sqlstate_of(error)
    return state in STATES or state in SHUTDOWNS or state[:2] in CLASSES


def sqlstate_of(error: BaseException) -> str:
    """PostgreSQL's code of the error, beneath SQLAlchemy's; empty if it has none."""
    original = error.orig if isinstance(error, DBAPIError) else error
    return str(getattr(original, "sqlstate", None) or "")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it says it came from: SQLAlchemy and drivers wrap what PostgreSQL has said."""
    seen: BaseException | None = error
    known: list[BaseException] = []
    while seen is not None and seen not in known:
        known.append(seen)
        yield seen
        if isinstance(seen, DBAPIError) and isinstance(seen.orig, BaseException):
            yield seen.orig
        seen = seen.__cause__
