"""How a lock is taken: one message to PostgreSQL, one deadline, and a transaction that outlives a refusal."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import asyncpg
from sqlalchemy import bindparam
from sqlalchemy.dialects import postgresql

from coord.errors import DeadlockError, LockHolder, LockTimeoutError
from coord.postgresql.driver import in_transaction, keeps_its_snapshot, translated, turn
from coord.postgresql.engine import note_failure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import ClauseElement, Connection

    Settings = Mapping[str, str | int]

_SAVE = """SELECT set_config('coord.lock_timeout', current_setting('lock_timeout'), true),
    set_config('coord.statement_timeout', current_setting('statement_timeout'), true)"""
_RESTORE = """SELECT set_config('lock_timeout', current_setting('coord.lock_timeout'), true),
    set_config('statement_timeout', current_setting('coord.statement_timeout'), true)"""
_UNDO = "ROLLBACK TO SAVEPOINT coord_lock; RELEASE SAVEPOINT coord_lock"

_HOLDERS = """
    SELECT DISTINCT ON (lock.pid, lock.relation) lock.relation::regclass::text AS "table", lock.mode, lock.pid,
        coalesce(application_name, '') AS application_name, state,
        coalesce(extract(epoch FROM clock_timestamp() - xact_start), 0)::float8 AS transaction_age
    FROM pg_locks AS lock LEFT JOIN pg_stat_activity USING (pid)
    WHERE lock.granted AND lock.pid <> pg_backend_pid()
      AND lock.database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


@dataclass(frozen=True, slots=True)
class Acquisition:
    """A lock to be taken, or several by one statement, which PostgreSQL takes in the order they are named."""

    statement: str
    subject: str
    """What is locked, for messages: `order, stock in EXCLUSIVE mode`."""
    blockers: str
    """A condition on `pg_locks AS lock` that finds who is in the way."""
    blocked_by: Sequence[Any]
    """Its arguments."""
    tables: Sequence[str] = ()

    def sql(self, limit: float | None, known: Settings | None) -> str:
        """One message of the simple protocol: PostgreSQL runs its statements without another round trip.

        `lock_timeout` counts anew for every lock, `statement_timeout` for the statement (section 19.11 of the manual).
        Afterwards both are as they were: `known`, or if None as they are found. Finding them takes a snapshot, which in
        a transaction at REPEATABLE READ must not be older than the lock; LOCK and SET take none.
        """
        parts = [self.statement]
        if limit:
            time = max(1, round(limit * 1000))
            limited = [*_set({"lock_timeout": time, "statement_timeout": time + 1}), self.statement]
            parts = [_SAVE, *limited, _RESTORE] if known is None else [*limited, *_set(known)]
        return "; ".join(("SAVEPOINT coord_lock", *parts, "RELEASE SAVEPOINT coord_lock"))


async def acquire(connection: Connection, acquisition: Acquisition, limit: float | None) -> None:
    """Take the lock in the connection's transaction, which stays usable if it is not granted.

    `limit` is seconds for all of it together; 0 is in the statement, None leaves it to the server's `lock_timeout`.
    """
    async with turn(connection):
        await _acquire(connection, acquisition, limit)


async def _acquire(connection: Connection, acquisition: Acquisition, limit: float | None) -> None:
    driver = await in_transaction(connection)
    known = await _settings(driver) if limit and keeps_its_snapshot(connection) else None
    sql = acquisition.sql(limit, known)
    try:
        await driver.execute(sql)
    except asyncio.CancelledError:
        await _undo(connection, driver)
        raise
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        refusal = None if driver.is_closed() else await _refused(connection, driver, acquisition, error, bool(limit))
        raise refusal or await translated(connection, sql, error) from error


async def _refused(
    connection: Connection, driver: asyncpg.Connection, acquisition: Acquisition, error: Exception, limited: bool
) -> LockTimeoutError | DeadlockError | None:
    """What to raise instead of the error, if anything; whoever is cancelled here must not commit what has failed."""
    try:
        await _undo(connection, driver)
        return await _refusal(driver, acquisition, error, limited=limited)
    except BaseException as later:
        note_failure(connection)
        if isinstance(later, asyncpg.InternalClientError):  # of a farewell that came while nothing was asked
            driver.terminate()
        elif not isinstance(later, asyncpg.PostgresError | asyncpg.InterfaceError | OSError):
            raise
        return None  # the connection was lost meanwhile


async def _undo(connection: Connection, driver: asyncpg.Connection) -> None:
    """Make the transaction usable again. A cancelled lock may have been granted after all, and then it is so already.

    asyncpg sends the question once the server has confirmed that the statement has ended.
    """
    try:
        await driver.execute("SELECT 1")
    except asyncpg.InFailedSQLTransactionError:
        try:
            await driver.execute(_UNDO)
        except asyncpg.PostgresError:  # it was stopped before the savepoint
            note_failure(connection)


async def _refusal(
    driver: asyncpg.Connection, acquisition: Acquisition, error: Exception, *, limited: bool
) -> LockTimeoutError | DeadlockError | None:
    match error:
        case asyncpg.LockNotAvailableError():
            return await _timed_out(driver, acquisition)
        case asyncpg.QueryCanceledError() if limited and "statement timeout" in str(error):
            return await _timed_out(driver, acquisition)
        case asyncpg.DeadlockDetectedError():
            return DeadlockError(f"Deadlock while locking {acquisition.subject}: {error.detail or error}")
    return None


async def _settings(driver: asyncpg.Connection) -> Settings:
    """As they are; SHOW takes no snapshot."""
    return {name: await driver.fetchval(f"SHOW {name}") for name in ("lock_timeout", "statement_timeout")}


async def _timed_out(driver: asyncpg.Connection, acquisition: Acquisition) -> LockTimeoutError:
    holders = await _holders(driver, acquisition)
    seen = "; ".join(map(str, holders)) or "whoever held it is gone"
    message = f"{acquisition.subject} was not to be had in time: {seen}"
    return LockTimeoutError(message, tables=acquisition.tables, holders=holders)


async def _holders(driver: asyncpg.Connection, acquisition: Acquisition) -> list[LockHolder]:
    """None if they cannot be asked about, which ends no transaction either."""
    try:
        async with driver.transaction():  # a savepoint
            rows = await driver.fetch(f"{_HOLDERS} AND {acquisition.blockers}", *acquisition.blocked_by)
    except asyncpg.PostgresError:
        return []
    return [LockHolder(**row) for row in rows]


def literal(statement: ClauseElement) -> str:
    """The statement with its bound numbers written out by SQLAlchemy: the simple protocol has no parameters."""
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    return str(statement.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))


def _set(settings: Settings) -> list[str]:
    return [_set_local(name, value) for name, value in settings.items()]


@lru_cache(maxsize=256)  # a deadline's rest is another number each time; the usual ones are few
def _set_local(name: str, value: str | int) -> str:
    return f"SET LOCAL {name} = {literal(bindparam(None, value))}"
