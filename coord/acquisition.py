"""How a lock is taken: one message to PostgreSQL, one deadline, and a transaction that outlives a refusal."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import asyncpg
from sqlalchemy import bindparam, select, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError, InvalidRequestError

from coord.errors import DeadlockError, LockHolder, LockTimeoutError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import ClauseElement
    from sqlalchemy.ext.asyncio import AsyncConnection

_KEEP = "SELECT set_config('coord.lock_timeout', current_setting('lock_timeout'), true)"
_LIMIT = text("""SELECT set_config('lock_timeout', greatest(1,
    :limit - extract(epoch FROM clock_timestamp() - statement_timestamp()) * 1000)::integer::text, true)""")
_RESTORE = "SELECT set_config('lock_timeout', current_setting('coord.lock_timeout'), true)"
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
    """Locks to be taken one after another, in this order."""

    statements: Sequence[str]
    subject: str
    """What is locked, for messages: `order, stock in EXCLUSIVE mode`."""
    limit: float | None
    """Seconds for all of them together; None leaves it to the server's own `lock_timeout`."""
    blockers: str
    """A condition on `pg_locks AS lock` that finds who is in the way."""
    blocked_by: Sequence[Any]
    """Its arguments."""
    tables: Sequence[str] = ()

    def sql(self) -> str:
        """One message of the simple protocol: PostgreSQL runs its statements without another round trip.

        `statement_timestamp()` is when the message arrived, so each lock gets what is left of the limit;
        `lock_timeout` alone counts anew for every lock (section 19.11 of the manual).
        """
        if not self.limit:
            return "; ".join(("SAVEPOINT coord_lock", *self.statements, "RELEASE SAVEPOINT coord_lock"))
        limited = [part for statement in self.statements for part in (_limit(self.limit), statement)]
        return "; ".join(("SAVEPOINT coord_lock", _KEEP, *limited, _RESTORE, "RELEASE SAVEPOINT coord_lock"))


async def acquire(connection: AsyncConnection, acquisition: Acquisition) -> None:
    """Take the locks in the connection's transaction, which stays usable if they are not granted."""
    driver = await _in_transaction(connection)
    try:
        await driver.execute(acquisition.sql())
    except asyncpg.LockNotAvailableError as error:
        await driver.execute(_UNDO)
        raise await _timed_out(driver, acquisition) from error
    except asyncpg.DeadlockDetectedError as error:
        await driver.execute(_UNDO)
        raise DeadlockError(f"Deadlock while locking {acquisition.subject}: {error.detail or error}") from error
    except asyncio.CancelledError:
        await driver.execute(_UNDO)  # asyncpg sends it once the server has confirmed that the wait has ended
        raise
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        lost = driver.is_closed()
        if lost:
            await connection.invalidate(error)
        raise DBAPIError(acquisition.sql(), None, error, connection_invalidated=lost) from error


async def _in_transaction(connection: AsyncConnection) -> asyncpg.Connection:
    raw = await connection.get_raw_connection()
    driver: Any = raw.driver_connection
    if not driver.is_in_transaction():
        await connection.execute(select(1))  # SQLAlchemy sends BEGIN with a transaction's first statement
    if not driver.is_in_transaction():
        raise InvalidRequestError("A lock lasts as long as a transaction, and this connection is in AUTOCOMMIT mode.")
    return driver


async def _timed_out(driver: asyncpg.Connection, acquisition: Acquisition) -> LockTimeoutError:
    rows = await driver.fetch(f"{_HOLDERS} AND {acquisition.blockers}", *acquisition.blocked_by)
    holders = [LockHolder(**row) for row in rows]
    waited = "the server's lock_timeout" if acquisition.limit is None else f"{acquisition.limit:g} s"
    seen = "; ".join(map(str, holders)) or "whoever held it is gone"
    message = f"{acquisition.subject} was not to be had within {waited}: {seen}"
    return LockTimeoutError(message, tables=acquisition.tables, holders=holders)


def literal(statement: ClauseElement) -> str:
    """The statement with its bound numbers written out by SQLAlchemy: the simple protocol has no parameters."""
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    return str(statement.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))


def _limit(limit: float) -> str:
    return literal(_LIMIT.bindparams(bindparam("limit", max(1, round(limit * 1000)))))
