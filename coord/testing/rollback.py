"""Sessions on one connection, in a transaction that the test rolls back: who commits there leaves nothing."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool

from coord.database.engine import own_connection, prepare, require_asyncpg, session_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy import URL
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

    from coord.database.engine import AnySession

JOINS: dict[str, Any] = {"join_transaction_mode": "create_savepoint"}
"""SQLAlchemy's manual, "Joining a Session into an External Transaction (such as for test suites)"."""


@asynccontextmanager
async def rolled_back(database_url: str | URL, **options: Any) -> AsyncIterator[async_sessionmaker[AsyncSession]]:
    """A maker whose sessions share one connection, in a transaction that the end of the block rolls back.

    A commit of such a session releases a savepoint. `options` are those of `async_sessionmaker`; `expire_on_commit` is
    False unless given. Use them one after another: there is one connection, and PostgreSQL nests savepoints.

        async with rolled_back(coord_servers.database_url) as session_maker:
            app.dependency_overrides[get_db] = create_db_dependency(session_maker)

    Raises `RuntimeError` at the end if something has committed the connection's transaction, by its own `commit()`.
    """
    engine = create_async_engine(database_url, poolclass=NullPool)
    require_asyncpg(engine.dialect)
    prepare(engine)
    try:
        async with engine.connect() as connection:
            transaction = await connection.begin()
            yield async_sessionmaker(connection, **{"expire_on_commit": False, **options, **JOINS})
            if not transaction.is_active and not connection.invalidated:
                raise RuntimeError(ENDED)
    finally:
        await engine.dispose()


ENDED = (
    "The transaction that the test was to roll back has ended: commit() and rollback() are for sessions, and not for "
    "the connection that they share. What was written may be in the database for good."
)


def sessions_beside(session: AnySession) -> async_sessionmaker[AsyncSession]:
    """A maker of sessions like this one on its connection, for the code under test."""
    session = session_of(session)
    options: dict[str, Any] = {
        "class_": type(session),
        "sync_session_class": type(session.sync_session),
        "expire_on_commit": False,
    }
    return async_sessionmaker(connection_of(session), **options, **JOINS)


def connection_of(session: AnySession) -> AsyncConnection:
    """`ValueError` unless the session is on a connection whose transaction a test can roll back."""
    connection = own_connection(session_of(session))
    if connection is None or not connection.in_transaction():
        raise ValueError(
            "session is one that a test rolls back, on a connection with an open transaction: "
            "coord_session, or one made by coord_session_maker"
        )
    return connection
