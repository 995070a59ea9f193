"""What the caller's transaction is and holds, as far as locks and waits must know.

SQLAlchemy tells of each connection that a session's transaction takes (`after_begin`), and of its end; both are
listened to for every session from the import of this module on, so that nothing depends on what was called first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, event, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction, SessionTransactionOrigin

from coord.database.engine import bind_of, is_asyncpg

logger = logging.getLogger("coord.session")

_BEGUN = "coord.begun"
"""In a session's `info`: the connections of its transaction, each with its `_transaction_ids` at the begin."""
_FLUSHED = "coord.flushed"
_mutexes: WeakKeyDictionary[Connection, asyncio.Lock] = WeakKeyDictionary()
_LOCKS = "coord.locks"
_ENQUEUED = "coord.enqueued"
"""In a session's `info`: the jobs of a transaction that has not ended."""
_OWNED = "coord.owned"

_WRITTEN = text("""
    SELECT pg_current_xact_id_if_assigned() IS NOT NULL OR EXISTS (
        SELECT FROM pg_locks WHERE pid = pg_backend_pid() AND granted AND locktype = 'relation' AND mode IN
            ('ShareUpdateExclusiveLock', 'ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock'))
""")
_TRANSACTION_IDS = text("""
    SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'transactionid' AND mode = 'ExclusiveLock'
""")


@event.listens_for(Session, "after_begin")
def _note_begin(session: Session, _transaction: SessionTransaction, connection: Connection) -> None:
    """SQLAlchemy calls this for each savepoint as well."""
    begun = session.info.setdefault(_BEGUN, {})
    if connection not in begun:
        shared = session.bind is connection and is_asyncpg(connection.dialect)
        begun[connection] = _transaction_ids(connection) if shared else None


@event.listens_for(Session, "after_flush")
def _note_flush(session: Session, _context: Any) -> None:
    if isinstance(session.bind, Connection):
        session.info[_FLUSHED] = True


@event.listens_for(Session, "after_transaction_end")
def _note_end(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.info.pop(_BEGUN, None)
        session.info.pop(_FLUSHED, None)
        if lost := session.info.pop(_ENQUEUED, None):
            logger.warning(
                "A session was closed without a commit, so the jobs that it has enqueued never run: %d, of which the "
                "first is %s",
                len(lost),
                lost[0],
            )
        if not session.info:
            session.info.clear()  # an emptied dict keeps its table, and a session may wait for long


@event.listens_for(Session, "after_commit")
def _note_commit(session: Session) -> None:
    """SQLAlchemy calls this at a savepoint's release as well."""
    if not session.in_nested_transaction():
        session.info.pop(_ENQUEUED, None)


@event.listens_for(Session, "after_rollback")
def _note_rollback(session: Session) -> None:
    """On purpose or by an exception; also of a savepoint."""
    session.info.pop(_ENQUEUED, None)


def expect_commit(session: Session, job: object) -> None:
    """Log a WARNING if the session's transaction ends by neither commit nor rollback."""
    session.info.setdefault(_ENQUEUED, []).append(job)


def connections_in_use(session: Session) -> Mapping[Connection, int | None]:
    """Those that the session's transaction has; an autobegun one has none before its first statement."""
    begun: dict[Connection, int | None] = session.info.get(_BEGUN, {})
    return begun


def connection_in_use(session: Session, **bind_arguments: Any) -> Connection | None:
    """The one of the bind that SQLAlchemy gives for these arguments (`mapper=`, `clause=`)."""
    begun = connections_in_use(session)
    bind = bind_of(session, **bind_arguments) if begun else None
    return next((each for each in begun if bind is each or bind is each.engine), None)


def is_explicit(session: AsyncSession) -> bool:
    """Whether the caller has opened a block, `session.begin()` or a savepoint, which only the caller may end."""
    transaction = session.sync_session.get_transaction()
    return transaction is not None and (
        session.in_nested_transaction() or transaction.origin is not SessionTransactionOrigin.AUTOBEGIN
    )


def own(session: AsyncSession) -> None:
    """From now on each transaction of the session is its request's or context's, to commit or to roll back."""
    session.sync_session.info[_OWNED] = True


def is_owned(session: AsyncSession) -> bool:
    """Whether a request or a context has the session, whose blocks therefore join its transaction."""
    return bool(session.sync_session.info.get(_OWNED))


def is_joined(session: AsyncSession) -> bool:
    """Whether a block of the session's is part of a transaction that something else ends."""
    return is_owned(session) or is_explicit(session) or bool(connections_in_use(session.sync_session))


@contextmanager
def holding_lock(session: AsyncSession) -> Iterator[None]:
    """Mark the session as inside `lock_tables` or `advisory_lock`."""
    info = session.sync_session.info
    info[_LOCKS] = info.get(_LOCKS, 0) + 1
    try:
        yield
    finally:
        info[_LOCKS] -= 1


def holds_lock(session: AsyncSession) -> bool:
    return bool(session.sync_session.info.get(_LOCKS))


def connection_mutex(session: AsyncSession) -> AbstractAsyncContextManager[object]:
    """A mutex for statements that belong together, where the session shares its connection with other sessions.

    As a test's sessions do: one of them waits, and reads, while another enqueues or locks. No statement of another
    session may come between a savepoint and its release.
    """
    bind = session.sync_session.bind
    return _mutexes.setdefault(bind, asyncio.Lock()) if isinstance(bind, Connection) else nullcontext()


async def has_written(session: AsyncSession) -> bool:
    """Whether others must wait for this transaction to end before they see, or can make, a change.

    PostgreSQL assigns a transaction id at the first write or row lock (section 67.1 of its manual), so one query
    also covers raw SQL and functions; a table lock stronger than a writer's counts as well. A session bound to one
    connection shares that connection's transaction: there only its own part counts, from its begin on.
    """
    async with connection_mutex(session):
        return await session.run_sync(_has_written)


def _has_written(session: Session) -> bool:
    return bool(session.info.get(_FLUSHED)) or any(
        bool(connection.scalar(_WRITTEN)) if before is None else _transaction_ids(connection) > before
        for connection, before in [*connections_in_use(session).items()]
    )


def _transaction_ids(connection: Connection) -> int:
    """How many levels of savepoints, the transaction itself included, have written: each holds a lock on an id."""
    return connection.scalar(_TRANSACTION_IDS) or 0


def cut_connections(session: AsyncSession) -> None:
    """Have what the session waits for fail at once, and its connections be given up.

    Of a statement that is cancelled SQLAlchemy sees the connection closed, for which a silent server gets two seconds;
    meanwhile the session cannot be used.
    """
    for connection in connections_in_use(session.sync_session):
        if not connection.closed and not connection.invalidated:
            driver: Any = connection.connection.driver_connection
            driver.terminate()


async def end_transaction(session: AsyncSession) -> None:
    """End the transaction and free its connection, leaving loaded rows and unflushed changes as they are.

    `commit()` would flush and `rollback()` would expire and expunge.
    """
    transaction = session.sync_session.get_transaction()
    if transaction is not None:
        await session.run_sync(lambda _: transaction.close())  # pinned by tests/test_transaction.py
