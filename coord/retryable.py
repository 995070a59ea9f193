"""Which errors are worth another attempt: of a transaction, from its first statement, and of a single read."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import asyncpg
from sqlalchemy.exc import DBAPIError, NotSupportedError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from coord.errors import CoordError

CONTENTION_STATES = {"40001", "40P01", "55P03"}
"""Serialization failure, deadlock, lock not available (appendix A of PostgreSQL's manual)."""
OUTAGE_CLASSES = {"08", "53"}
"""Connection exceptions, insufficient resources."""
UNAVAILABLE_CLASSES = {*OUTAGE_CLASSES, "57"}
"""And operator intervention, a cancelled statement among them: reason enough to repeat a read, not a transaction."""
SHUTDOWN_STATES = {"57P01", "57P02", "57P03", "57P05", "25P03", "25P04"}
"""The server stops, crashed or starts; it ended a session that was idle, or a transaction that ran, for too long."""
NETWORK_ERRORS = {errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH}
INVALIDATED_CODE = "8s2b"
"""SQLAlchemy's code for a transaction whose connection was lost before."""


def is_retryable(error: BaseException) -> bool:
    """Lock timeouts, deadlocks, serialization failures, lost connections, and an exhausted pool."""
    return any(_is_transient(cause) for cause in _chain(error))


def _is_transient(error: BaseException) -> bool:
    match error:
        case BaseExceptionGroup():
            return all(is_retryable(part) for part in error.exceptions)
        case CoordError():
            return error.retryable
        case ConnectionError() | PoolTimeoutError() | socket.gaierror() | asyncpg.InternalClientError():
            return True  # the last is about an answer that asyncpg did not expect: the connection is unusable
        case OSError():
            # The last is asyncio's, of a host with several addresses.
            return error.errno in NETWORK_ERRORS or str(error).startswith("Multiple exceptions: ")
        case PendingRollbackError() if error.code == INVALIDATED_CODE:
            return True
        case DBAPIError() if error.connection_invalidated:
            return True
        case asyncpg.InterfaceError():
            return "connection" in str(error) and not isinstance(error, ValueError)
    state = sqlstate_of(error)
    return state in CONTENTION_STATES or state in SHUTDOWN_STATES or state[:2] in OUTAGE_CLASSES


def is_server_away(error: BaseException) -> bool:
    """Whether PostgreSQL is away or overloaded, as opposed to refusing this statement or its values.

    Of a single read, which may be repeated at no risk. So it is wider than `is_retryable`: every `OSError`, every
    time-out, a statement that the server has cancelled, and a plan that an ALTER TABLE has outdated. And it is about
    the error itself, not about its causes: one that a hook of the application's made of another is the application's.
    """
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    original = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(original, OSError | PoolTimeoutError):
        return True
    if isinstance(original, asyncpg.InterfaceError):
        return not isinstance(original, ValueError)  # a key that the driver cannot encode
    if isinstance(error, NotSupportedError):
        cause = original.__cause__ if original is not None else None
        return isinstance(cause, asyncpg.InvalidCachedStatementError)  # SQLAlchemy prepares it anew
    state = sqlstate_of(error)
    return state in CONTENTION_STATES or state[:2] in UNAVAILABLE_CLASSES


def sqlstate_of(error: BaseException) -> str:
    """PostgreSQL's code of the error, beneath SQLAlchemy's; empty if it has none."""
    original = error.orig if isinstance(error, DBAPIError) else error
    return str(getattr(original, "sqlstate", None) or "")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes: SQLAlchemy and drivers wrap what PostgreSQL has answered."""
    seen: BaseException | None = error
    known: list[BaseException] = []
    while seen is not None and seen not in known:
        known.append(seen)
        yield seen
        if isinstance(seen, DBAPIError) and isinstance(seen.orig, BaseException):
            yield seen.orig
        seen = seen.__cause__
