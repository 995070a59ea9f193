"""What coord asks of the engine it is given: PostgreSQL through asyncpg, no orphaned statements, honest commits."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import asyncpg
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from coord.postgresql.flushing import begin_last_flush, end_last_flush, note_statement
from coord.postgresql.pipelining import PipeliningConnection

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine import Dialect, ExceptionContext

logger = logging.getLogger("coord.engine")

CONNECTION_CHECK = "250ms"
"""How soon a backend notices, in the middle of a statement, that its client has gone."""

_CHECKED = "coord.checked"
_FAILED = "coord.failed"


def engine_of(source: async_sessionmaker[Any] | AsyncSession) -> AsyncEngine:
    """The engine behind a session or its maker; `ValueError` unless it is `postgresql+asyncpg`."""
    bind = source.kw.get("bind") if isinstance(source, async_sessionmaker) else source.bind
    engine = bind.engine if isinstance(bind, AsyncConnection) else bind
    if not isinstance(engine, AsyncEngine):
        message = "coord needs sessions bound to one asynchronous engine: async_sessionmaker(bind=engine)"
        raise ValueError(message)  # noqa: TRY004 - what a maker is bound to is its value
    require_asyncpg(engine.dialect)
    return engine


def source_of(session: AsyncSession) -> AsyncEngine | AsyncConnection:
    """What reads for this session go through: its engine, or the one connection it is bound to."""
    engine = engine_of(session)
    return session.bind if isinstance(session.bind, AsyncConnection) else engine


def require_asyncpg(dialect: Dialect) -> None:
    if (dialect.name, dialect.driver) != ("postgresql", "asyncpg"):
        raise ValueError(f"coord needs postgresql+asyncpg, not {dialect.name}+{dialect.driver}")


def prepare(engine: AsyncEngine) -> None:
    """Have the engine's connections end what their client abandoned, refuse to commit what has failed, and pipeline.

    Sets `client_connection_check_interval` once a connection (PostgreSQL 14 and later, where the platform can tell; see
    section 19.3 of its manual). Repeating the call changes nothing.
    """
    sync_engine = engine.sync_engine
    if not event.contains(sync_engine, "checkout", _check_client):
        event.listen(sync_engine, "checkout", _check_client)
        event.listen(sync_engine, "handle_error", _note_error)
        event.listen(sync_engine, "do_connect", _pipeline)
        event.listen(sync_engine, "do_execute", note_statement)
    if not event.contains(Session, "before_flush", begin_last_flush):
        event.listen(Session, "before_flush", begin_last_flush)
        event.listen(Session, "after_flush", end_last_flush)


def _pipeline(_dialect: Dialect, _record: Any, _arguments: Any, parameters: dict[str, Any]) -> None:
    """Not where the application makes its connections itself, or of a class of its own."""
    if "async_creator_fn" not in parameters:
        parameters.setdefault("connection_class", PipeliningConnection)


def _check_client(dbapi_connection: Any, record: Any, _proxy: Any) -> None:
    if record.info.get(_CHECKED) is not dbapi_connection:
        record.info[_CHECKED] = dbapi_connection
        dbapi_connection.run_async(_set_connection_check)


async def _set_connection_check(driver: asyncpg.Connection) -> None:
    try:
        await driver.execute(f"SET client_connection_check_interval = '{CONNECTION_CHECK}'")
    except asyncpg.PostgresError as error:
        logger.debug("client_connection_check_interval is not to be had here: %s", error)


def _note_error(context: ExceptionContext) -> None:
    if context.connection is not None and not context.is_disconnect and not context.connection.invalidated:
        note_failure(context.connection)


def note_failure(connection: Connection) -> None:
    """Have the next commit make sure that PostgreSQL has not given the transaction up.

    Listening to the commits of this connection alone: on an engine that is listened to every statement is slower.
    """
    connection.info[_FAILED] = True
    event.listen(connection, "commit", _refuse_failed)


def _refuse_failed(connection: Connection) -> None:
    """PostgreSQL answers COMMIT in a failed transaction with a ROLLBACK and no error; make it an error.

    Only after a statement has failed does this cost a round trip. Inside a savepoint that was rolled back it passes.
    """
    if connection.invalidated or not connection.info.pop(_FAILED, False):
        return
    try:
        connection.exec_driver_sql("SELECT 1")
    except BaseException:
        # SQLAlchemy takes the transaction for over, and would give the connection back in it.
        connection.invalidate()
        raise
