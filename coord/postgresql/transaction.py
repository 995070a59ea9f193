"""What the caller's transaction is and holds, as far as locks and waits must know."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import SessionTransactionOrigin

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection
    from sqlalchemy.orm import Session, SessionTransaction

_LOCKS = "coord.locks"

_WRITTEN = text("""
    SELECT pg_current_xact_id_if_assigned() IS NOT NULL OR EXISTS (
        SELECT FROM pg_locks WHERE pid = pg_backend_pid() AND granted AND locktype = 'relation' AND mode IN
            ('ShareUpdateExclusiveLock', 'ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock'))
""")
_TRANSACTION_IDS = text("""
    SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'transactionid' AND mode = 'ExclusiveLock'
""")


def connection_in_use(session: Session) -> Connection | None:
    """The one of the session's own bind that its transaction has; an autobegun one has none before its first statement.

    Who routes statements to several binds (`binds=`, `get_bind`) may have one of another.
    """
    return _connection_in(session.get_transaction(), session)


def _connection_in(transaction: SessionTransaction | None, session: Session) -> Connection | None:
    held = None if transaction is None else transaction._connections.get(session.get_bind())
    return held and held[0]  # pinned by tests/test_transaction.py


async def connection_of(session: AsyncSession) -> Connection:
    """The connection of the session's transaction, or of its savepoint: taken from the pool, and begun, if need be."""
    own = session.sync_session
    if _connection_in(own.get_nested_transaction() or own.get_transaction(), own) is not None:
        return own.connection()
    connection = await session.connection()
    assert connection.sync_connection is not None
    return connection.sync_connection


def is_explicit(session: AsyncSession) -> bool:
    """Whether somebody opened a block, `session.begin()` or a savepoint, that is theirs to end."""
    transaction = session.sync_session.get_transaction()
    return transaction is not None and (
        session.in_nested_transaction() or transaction.origin is not SessionTransactionOrigin.AUTOBEGIN
    )


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


async def has_written(session: AsyncSession) -> bool:
    """Whether others must wait for this transaction to end before they see, or can make, a change.

    PostgreSQL assigns a transaction id at the first write or row lock (section 67.1 of its manual), so one question
    also covers raw SQL and functions; a table lock stronger than a writer's counts as well. A session bound to one
    connection shares that connection's transaction: there its own part is asked about, which is its savepoint, or
    without one the rows it has flushed and still refers to.
    """
    connection = await session.connection()
    if not isinstance(session.bind, AsyncConnection) or _owns_transaction(session):
        return bool(await connection.scalar(_WRITTEN))
    outside = _savepoints(session.bind) - _own_savepoints(session)
    if outside == 0:
        return _orm_has_flushed(session)
    # Every level of savepoints that has written, and so each around it, holds a lock on a transaction id of its own.
    return bool((await connection.scalar(_TRANSACTION_IDS) or 0) > outside)


async def end_transaction(session: AsyncSession) -> None:
    """End the transaction and free its connection, leaving loaded rows and unflushed changes as they are.

    `commit()` would flush and `rollback()` would expire and expunge.
    """
    transaction = session.sync_session.get_transaction()
    if transaction is not None:
        await session.run_sync(lambda _: transaction.close())


def _owns_transaction(session: AsyncSession) -> bool:
    """Whether the session itself began the transaction of the connection it is bound to."""
    assert isinstance(session.bind, AsyncConnection)
    assert session.bind.sync_connection is not None
    root, own = session.bind.sync_connection.get_transaction(), session.sync_session.get_transaction()
    return own is not None and any(begun is root and ours for _, begun, ours, _ in set(own._connections.values()))


def _own_savepoints(session: AsyncSession) -> int:
    depth, savepoint = 0, session.sync_session.get_nested_transaction()
    while savepoint is not None:
        depth += savepoint.nested
        savepoint = savepoint.parent
    return depth


def _savepoints(connection: AsyncConnection) -> int:
    assert connection.sync_connection is not None
    depth, savepoint = 0, connection.sync_connection.get_nested_transaction()
    while savepoint is not None:
        depth, savepoint = depth + 1, savepoint._previous_nested
    return depth


def _orm_has_flushed(session: AsyncSession) -> bool:
    transaction = session.sync_session.get_transaction()
    return transaction is not None and bool(transaction._new or transaction._dirty or transaction._deleted)
