"""How a lock is taken: within one deadline, in a transaction that outlives a refusal.

Where the ledger is, `coord_lock` does it in one round trip (see `lock_function.py`). Above READ COMMITTED, where its
SELECT would take the snapshot before the lock, and where it is not installed, the plain statements are sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from time import monotonic
from typing import Any

from sqlalchemy import ClauseElement, Connection, bindparam, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError, InvalidRequestError

from coord.database.lock_function import call_lock, lock_function
from coord.errors import DeadlockError, LockHolder, LockTimeoutError
from coord.retryable import sqlstate_of

LOCK_NOT_AVAILABLE, DEADLOCK, NO_ACTIVE_TRANSACTION = "55P03", "40P01", "25P01"
ACTIVE_TRANSACTION = "25001"
SET_BY_SQL = (
    "This transaction was made {0} by SQL, and its snapshot would be older than the lock: tell SQLAlchemy, by "
    'execution_options(isolation_level="{0}").'
)
NO_TRANSACTION = "A lock needs a transaction, and the connection is in AUTOCOMMIT mode."
ABOVE_READ_COMMITTED = ("REPEATABLE READ", "SERIALIZABLE")

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
    """A lock to be taken, or several one after another."""

    mode: str
    """Of tables, or `ADVISORY` and `ADVISORY SHARED`."""
    names: Sequence[str]
    """Tables as SQL spells them, or an advisory lock's key."""
    statements: Sequence[str]
    """What takes them one by one."""
    subject: str
    """What is locked, for messages: `order, stock in EXCLUSIVE mode`."""
    blockers: str
    """A condition on `pg_locks AS lock` that finds the locks that are in the way."""
    blocked_by: Mapping[str, Any]
    """Its parameters."""
    tables: Sequence[str] = ()


def acquire(connection: Connection, acquisition: Acquisition, limit: float | None) -> None:
    """Take the lock in the connection's transaction, which stays usable if it is not granted.

    `limit` is seconds for all of it together; 0 is NOWAIT, None leaves it to the server's `lock_timeout`, which is
    afterwards as it was before. To be called where SQLAlchemy's own connections are (`run_sync`).
    """
    function = None if _keeps_its_snapshot(connection) else lock_function(connection)
    if function is None:
        refusal = _send_plain_statements(connection, acquisition, limit)
    else:
        refusal = call_lock(connection, function, acquisition.mode, acquisition.names, limit)
    driver: Any = connection.connection.driver_connection
    if not driver.is_in_transaction():
        raise InvalidRequestError(NO_TRANSACTION)
    if refusal is None:
        return
    state, detail = refusal
    if state == ACTIVE_TRANSACTION:
        raise InvalidRequestError(SET_BY_SQL.format(detail.upper()))
    if state == LOCK_NOT_AVAILABLE:
        holders = _holders(connection, acquisition)
        seen = "; ".join(map(str, holders)) or "its holder is gone"
        message = f"timed out waiting for {acquisition.subject}: {seen}"
        raise LockTimeoutError(message, tables=acquisition.tables, holders=holders)
    raise DeadlockError(f"Deadlock while locking {acquisition.subject}: {detail}")


def _keeps_its_snapshot(connection: Connection) -> bool:
    """Whether all statements of a transaction see what its first one has seen.

    As set in SQLAlchemy, for the connection, its engine or in `create_engine`, else as the server's default is.
    """
    level = connection.get_execution_options().get("isolation_level") or connection.default_isolation_level or ""
    return str(level).replace("_", " ").upper() in ABOVE_READ_COMMITTED


def _send_plain_statements(
    connection: Connection, acquisition: Acquisition, limit: float | None
) -> tuple[str, str] | None:
    """SQLSTATE and detail of a refusal. SHOW, SET and LOCK take no snapshot (section 13.2.2 of the manual)."""
    deadline = monotonic() + (limit or 0)
    try:
        savepoint = connection.begin_nested()
    except DBAPIError as error:
        if sqlstate_of(error) != NO_ACTIVE_TRANSACTION:
            raise
        raise InvalidRequestError(NO_TRANSACTION) from error
    try:
        usual = connection.exec_driver_sql("SHOW lock_timeout").scalar_one() if limit else None
        for statement in acquisition.statements:
            if limit:
                connection.exec_driver_sql(_set_local(max(1, math.ceil((deadline - monotonic()) * 1000))))
            connection.exec_driver_sql(f"{statement} NOWAIT" if limit == 0 else statement)
        if usual is not None:
            connection.exec_driver_sql(_set_local(usual))
    except DBAPIError as error:
        state = sqlstate_of(error)
        if error.connection_invalidated or state not in (LOCK_NOT_AVAILABLE, DEADLOCK):
            raise
        savepoint.rollback()
        return state, str(error.orig)
    savepoint.commit()
    return None


def _holders(connection: Connection, acquisition: Acquisition) -> list[LockHolder]:
    """None are known if the query fails, which does not end the transaction either."""
    question = text(f"{_HOLDERS} AND {acquisition.blockers}")
    try:
        with connection.begin_nested():
            rows = connection.execute(question, dict(acquisition.blocked_by)).mappings().all()
    except DBAPIError as error:
        if error.connection_invalidated:
            raise
        return []
    return [LockHolder(**row) for row in rows]


def literal(statement: ClauseElement) -> str:
    """The statement with its bound values written out by SQLAlchemy: SET and LOCK have no parameters."""
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    return str(statement.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))


@lru_cache(maxsize=256)  # what is left of a deadline is another number each time; the usual ones are few
def _set_local(value: str | int) -> str:
    return f"SET LOCAL lock_timeout = {literal(bindparam(None, value))}"
