"""What coord asks of the engine it is given: PostgreSQL through asyncpg, no orphaned statements, honest commits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextvars import copy_context
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakSet, ref

import asyncpg
from sqlalchemy import Connection, Engine, TableClause, event, table, update
from sqlalchemy.engine import Dialect, ExceptionContext
from sqlalchemy.exc import InterfaceError, UnboundExecutionError
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Mapper, Session, SessionTransaction
from sqlalchemy.pool import ConnectionPoolEntry

from coord.cancellation import interruptible
from coord.retryable import SHUTDOWN_STATES, sqlstate_of

AnySession = AsyncSession | async_scoped_session[AsyncSession]

logger = logging.getLogger("coord.engine")

CONNECTION_CHECK = "250ms"
"""How soon a backend notices, in the middle of a statement, that its client has gone."""
FIRST_ANSWERS_SECONDS = 4.0
"""After which a new connection is given up that is answered nothing, before a statement is on it to be watched."""
DISPOSE_SECONDS = 3.0
"""For all connections of a pool to be closed."""
READ_ONLY = "25006"
"""PostgreSQL's answer to a write where only reads are allowed: on a replica, in a read-only transaction."""

_FAILURE = "coord.failure"
_BACKEND = "coord.backend"
_WHICH_BACKEND = "SELECT pg_postmaster_start_time(), backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()"
_SESSION = "coord.session"
"""In a connection's `info`: a reference to the session whose transaction it was given to."""
_prepared: WeakSet[Dialect] = WeakSet()
"""By their dialect, which an engine shares with those that its `execution_options()` make, as it does its pool."""


def session_of(session: AnySession) -> AsyncSession:
    """The session itself: of an `async_scoped_session` that of the current scope."""
    return session() if isinstance(session, async_scoped_session) else session


@lru_cache(maxsize=256)
def bind_for_writes(target: Mapper[Any] | TableClause) -> Mapping[str, Any]:
    """Bind arguments for where the class or table is written, and where coord reads it: a replica may be behind."""
    mapper = {} if isinstance(target, TableClause) else {"mapper": target}
    return {**mapper, "clause": update(target)}


NO_TABLE = bind_for_writes(table("coord"))
"""For what concerns no table."""


def engine_of(source: async_sessionmaker[Any] | AsyncSession, **bind_arguments: Any) -> AsyncEngine:
    """The engine behind a session or its maker, for these arguments of `get_bind`.

    `ValueError` unless it is `postgresql+asyncpg`.
    """
    session = source if isinstance(source, AsyncSession) else made_by(source)
    bind = getattr(session, "bind", None)  # SQLAlchemy 2.0 has none before there is one
    found = bind_of(session.sync_session, **(bind_arguments or NO_TABLE))
    if found is None:
        raise ValueError("coord needs sessions bound to one asynchronous engine here: async_sessionmaker(bind=engine)")
    if isinstance(found, Connection) and own_connection(session) is None:
        raise ValueError("coord takes a session on one connection by bind=, and not by binds=")
    require_asyncpg(found.dialect)
    return bind if isinstance(bind, AsyncEngine) and bind.sync_engine is found else AsyncEngine(found.engine)


def made_by(session_maker: Any) -> Any:
    """A session; `TypeError` for an engine."""
    if not callable(session_maker):
        raise TypeError(f"session_maker is what async_sessionmaker(engine) makes, not {session_maker!r}")
    return session_maker()


def bind_of(session: Session, **bind_arguments: Any) -> Engine | Connection | None:
    """Asked in a context of its own, where a `get_bind` that remembers in one what it was asked for may note it."""
    try:
        return copy_context().run(session.get_bind, **bind_arguments)
    except UnboundExecutionError:
        return None


def engines_of(session: AsyncSession) -> list[AsyncEngine]:
    """Those that the session has been given, and that which writes go to if its own `get_bind` tells."""
    given = [getattr(session, "bind", None), *(getattr(session, "binds", None) or {}).values()]
    known = [each.engine if isinstance(each, AsyncConnection) else each for each in given if each is not None]
    engines = {each.sync_engine: each for each in known}
    found = bind_of(session.sync_session, **NO_TABLE)
    if found is not None and found.engine not in engines:
        require_asyncpg(found.dialect)
        engines[found.engine] = AsyncEngine(found.engine)
    for engine in engines:
        require_asyncpg(engine.dialect)
    return [*engines.values()]


def own_connection(session: AsyncSession) -> AsyncConnection | None:
    """The one that the session is bound to, as a test's are."""
    bind = getattr(session, "bind", None)
    return bind if isinstance(bind, AsyncConnection) else None


def another(engine: AsyncEngine) -> AsyncEngine:
    """With connections of its own, which are made as the given one's are."""
    return create_async_engine(engine.url, pool=engine.pool.recreate())


async def dispose(engine: AsyncEngine, limit: float = DISPOSE_SECONDS) -> None:
    """Close what is in its pool. The driver waits for PostgreSQL to hang up, and a silent one never does.

    What is not closed within `limit` seconds is left to the end of the process, so that another `dispose()` is quick.
    """
    try:
        await interruptible(engine.dispose(), limit=limit)
    except TimeoutError:
        await engine.dispose(close=False)


def is_asyncpg(dialect: Dialect) -> bool:
    return (dialect.name, dialect.driver) == ("postgresql", "asyncpg")


def require_asyncpg(dialect: Dialect) -> None:
    if not is_asyncpg(dialect):
        raise ValueError(f"coord needs postgresql+asyncpg, not {dialect.name}+{dialect.driver}")


def prepare(engine: AsyncEngine) -> None:
    """Have the engine's connections end what their client abandoned, be given up when lost, and commit honestly.

    Sets `client_connection_check_interval` on each new connection (PostgreSQL 14 and later, where the platform can
    tell; section 19.3 of its manual), and asks which backend it has. Repeating the call changes nothing.
    """
    sync_engine = engine.sync_engine
    if sync_engine.dialect not in _prepared:
        _prepared.add(sync_engine.dialect)
        event.listen(sync_engine, "connect", _on_connect)
        event.listen(sync_engine, "handle_error", _on_error)
        event.listen(sync_engine, "checkin", _forget_failure)


def _on_connect(dbapi_connection: Any, record: Any) -> None:
    if _BACKEND not in record.info:  # an engine that shares the listeners of a prepared one may be prepared as well
        record.info[_BACKEND] = dbapi_connection.run_async(_set_up)


async def _set_up(driver: asyncpg.Connection) -> Backend | None:
    """Which backend it has. Whatever fails, the connection is made: its first statement will tell.

    If it takes long the connection is closed: a statement that is cancelled might wait for its cancellation.
    """
    timer = asyncio.get_running_loop().call_later(FIRST_ANSWERS_SECONDS, driver.terminate)
    try:
        await _set_connection_check(driver)
        async with driver.transaction():  # for a pooler's sake
            return Backend(*await driver.fetchrow(_WHICH_BACKEND))
    except Exception as error:  # noqa: BLE001 - raised in here, the driver's error would reach the caller as it is
        logger.debug("PostgreSQL does not say which backend it is: %s", error)
        return None
    finally:
        timer.cancel()


async def _set_connection_check(driver: asyncpg.Connection) -> None:
    try:
        await driver.execute(f"SET client_connection_check_interval = '{CONNECTION_CHECK}'")
    except asyncpg.PostgresError as error:
        logger.debug("client_connection_check_interval cannot be set here: %s", error)


class Backend(NamedTuple):
    """What tells it from any other, also of the other servers that an address may lead to."""

    server_started: datetime
    started: datetime


def backend_of(connection: Connection | ConnectionPoolEntry) -> Backend | None:
    """None if PostgreSQL has not said."""
    return connection.info.get(_BACKEND)


def _on_error(context: ExceptionContext) -> None:
    """Give up a connection that is unusable, and remember the failure of one that goes on."""
    connection, error = context.connection, context.original_exception
    if connection is None or connection.invalidated or connection.closed or not isinstance(error, Exception):
        return
    if context.is_disconnect or _is_lost(connection, error):
        context.is_disconnect = True
        if isinstance(error, asyncpg.InternalClientError):  # which SQLAlchemy passes on as it is
            lost = InterfaceError(context.statement, None, error, connection_invalidated=True)
            raise lost from error
    elif _is_committing(connection):
        logger.warning("A statement in a listener of a commit has failed, so the commit fails: %s", error)
        connection.invalidate(error)
    else:
        _note_failure(connection, context.sqlalchemy_exception or error)


def _is_lost(connection: Connection, error: Exception) -> bool:
    """Whether the server has gone or is another one now, also where the driver reports something else.

    Between the server's last message and the end of the TCP connection asyncpg raises errors about its own state.
    """
    driver: Any = connection.connection.driver_connection
    if driver.is_closed() or isinstance(error, asyncpg.InternalClientError):
        return True
    state = sqlstate_of(error)
    return state in SHUTDOWN_STATES or (state == READ_ONLY and _is_read_only(driver))


def _is_read_only(driver: asyncpg.Connection) -> bool:
    """A replica, or a primary that was demoted; PostgreSQL 14 and later report both settings as they change."""
    settings = driver.get_settings()
    return "on" in (getattr(settings, name, None) for name in ("in_hot_standby", "default_transaction_read_only"))


@event.listens_for(Session, "after_begin")
def _note_session(session: Session, _transaction: SessionTransaction, connection: Connection) -> None:
    if session.bind is not connection:
        connection.info[_SESSION] = ref(session)


def session_that_uses(connection: Connection) -> Session | None:
    """Whose transaction it was given to, if it is not the session's own for good, as a test's is."""
    session: Session | None = connection.info.get(_SESSION, lambda: None)()
    return session


def _is_committing(connection: Connection) -> bool:
    """Whether a listener of the engine's `commit` has sent the statement, after the last check that can be made.

    A session counts as inactive once it has flushed and its connections commit. A savepoint of the listener's own is
    its to roll back to.
    """
    session = session_that_uses(connection)
    return session is not None and not session.is_active and not connection.in_nested_transaction()


def _note_failure(connection: Connection, error: BaseException) -> None:
    """Have the next commit check that PostgreSQL has not aborted the transaction.

    Listening to the commits of this connection alone: on an engine that is listened to every statement is slower.
    """
    connection.info[_FAILURE] = error
    event.listen(connection, "commit", _refuse_failed)


def _forget_failure(_dbapi_connection: Any, record: Any) -> None:
    """Else what its traceback refers to would live as long as the pooled connection."""
    record.info.pop(_FAILURE, None)
    record.info.pop(_SESSION, None)


def last_failure(connection: Connection) -> BaseException | None:
    """What the last statement that failed in the connection's transaction has raised."""
    is_gone = connection.closed or connection.invalidated
    error: BaseException | None = None if is_gone else connection.info.get(_FAILURE)
    return error


def _refuse_failed(connection: Connection) -> None:
    """PostgreSQL answers COMMIT in a failed transaction with a ROLLBACK and no error; make it an error.

    Only after a statement has failed does this cost a round trip. Inside a savepoint that was rolled back it passes.
    """
    if connection.invalidated or connection.info.pop(_FAILURE, None) is None:
        return
    try:
        connection.exec_driver_sql("SELECT 1")
    except BaseException:
        # SQLAlchemy believes that the transaction is over, and would return the connection to the pool inside it.
        connection.invalidate()
        raise
