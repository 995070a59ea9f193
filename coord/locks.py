"""Table locks and advisory locks that end with the transaction."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from enum import StrEnum
from functools import lru_cache, partial
from typing import Any

from sqlalchemy import Connection, Table, func, inspect, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.sql.compiler import IdentifierPreparer

from coord.cancellation import cleaned_up, interruptible
from coord.database.acquisition import Acquisition, acquire, literal
from coord.database.engine import NO_TABLE, AnySession, bind_for_writes, engine_of, session_of
from coord.database.target import mapper_of
from coord.database.transaction import connection_in_use, connection_mutex, end_transaction, holding_lock, is_joined
from coord.durations import Seconds, postgres_timeout
from coord.errors import LockTimeoutError
from coord.observation import lock_wait

Plan = Callable[[Connection], Acquisition]


class LockMode(StrEnum):
    """PostgreSQL's table lock modes, weakest first (section 13.3.1 of its manual)."""

    ACCESS_SHARE = "ACCESS SHARE"
    ROW_SHARE = "ROW SHARE"
    ROW_EXCLUSIVE = "ROW EXCLUSIVE"
    SHARE_UPDATE_EXCLUSIVE = "SHARE UPDATE EXCLUSIVE"
    SHARE = "SHARE"
    SHARE_ROW_EXCLUSIVE = "SHARE ROW EXCLUSIVE"
    EXCLUSIVE = "EXCLUSIVE"
    ACCESS_EXCLUSIVE = "ACCESS EXCLUSIVE"

    @classmethod
    def _missing_(cls, value: object) -> LockMode:
        if isinstance(value, str) and value in cls.__members__:
            return cls[value]
        raise ValueError(f"{value!r} is not a lock mode; the modes are {', '.join(cls)}")


NOWAIT_CONNECT_TIMEOUT_SECONDS = 1.0
"""For the connection of a lock with `timeout=0`: it may have to be made."""

_MODES = list(LockMode)
_CONFLICTS = {  # table 13.2 of the manual, by strength
    LockMode.ACCESS_SHARE: _MODES[7:],
    LockMode.ROW_SHARE: _MODES[6:],
    LockMode.ROW_EXCLUSIVE: _MODES[4:],
    LockMode.SHARE_UPDATE_EXCLUSIVE: _MODES[3:],
    LockMode.SHARE: [*_MODES[2:4], *_MODES[5:]],
    LockMode.SHARE_ROW_EXCLUSIVE: _MODES[2:],
    LockMode.EXCLUSIVE: _MODES[1:],
    LockMode.ACCESS_EXCLUSIVE: _MODES,
}


def lock_tables(
    session: AnySession,
    tables: Sequence[type[Any] | Table],
    *,
    mode: LockMode | str = LockMode.SHARE_ROW_EXCLUSIVE,
    timeout: Seconds | str | None = 5.0,
) -> AbstractAsyncContextManager[AsyncSession]:
    """Hold table locks until the transaction ends; with none open, this block is the transaction and commits at exit.

    The tables are locked in one order everywhere, so calls that lock before they touch a table never deadlock each
    other. The lock is taken before any pending change is flushed. Read after it: `session.get` returns a row that was
    loaded before the lock without reading it again, unless `populate_existing=True` is given.

    `timeout` is one deadline in seconds for all the tables ("500ms" works too); 0 does not wait for a lock, and at most
    a second for a connection; None leaves it to the server's `lock_timeout`, which is afterwards as it was before. The
    default mode excludes itself and all writers, not readers. Inside a savepoint, the lock is lost when that rolls
    back.

        async with lock_tables(session=session, tables=[Stock, Order]):
            stock = await session.get(Stock, sku)

    Raises `LockTimeoutError`, after which an open transaction is still usable, and `DeadlockError`. An unknown mode, an
    empty list and a negative timeout are a `ValueError` before any SQL.
    """
    lock_mode = LockMode(mode)
    limit = None if timeout is None else postgres_timeout("timeout", timeout)
    session = session_of(session)
    targets, binding = _tables(tables), _binding(session, tables)
    return _held(session, binding, partial(_table_acquisition, targets, lock_mode), limit)


def advisory_lock(
    session: AnySession,
    key: int | tuple[int, int] | str,
    *,
    shared: bool = False,
    timeout: Seconds | None = 5.0,
) -> AbstractAsyncContextManager[AsyncSession]:
    """Hold a transaction-level advisory lock (section 13.3.5 of PostgreSQL's manual), on a number, a pair or a name.

    It excludes only locks of the same key, and no autovacuum. Unlike a table's lock it comes after the snapshot of
    a transaction at REPEATABLE READ or SERIALIZABLE, which then does not see what the last holder committed.
    Transaction, deadline and errors are those of `lock_tables`; a `timeout` of 0 waits a millisecond. A name is hashed
    to 64 bits, the same in every process.

        async with advisory_lock(session, "nightly-report"):
            ...
    """
    words = _advisory_key(key)
    limit = None if timeout is None else postgres_timeout("timeout", timeout)
    session = session_of(session)
    engine_of(session)
    acquisition = _advisory_acquisition(key, words, shared)
    return _held(session, NO_TABLE, lambda _: acquisition, limit, least=0.001)


@asynccontextmanager
async def _held(
    session: AsyncSession, binding: Mapping[str, Any], plan: Plan, limit: float | None, *, least: float = 0
) -> AsyncIterator[AsyncSession]:
    """Take the locks in the session's transaction, or in one of the block's own when none is open in PostgreSQL."""
    joins = is_joined(session)
    try:
        async with connection_mutex(session):
            left = await _connected(session, binding, limit)
            await interruptible(session.run_sync(_acquire, binding, plan, None if left is None else max(least, left)))
    except BaseException:
        if not joins:
            await cleaned_up(end_transaction(session))
        raise
    transaction = session.sync_session.get_transaction()
    try:
        with holding_lock(session):
            yield session
        if not joins and session.sync_session.get_transaction() is not transaction:
            raise RuntimeError("The lock was lost before its block ended: the transaction was ended inside the block.")
        if not joins:
            async with connection_mutex(session):
                await interruptible(session.commit())
    except BaseException:
        if not joins:
            await cleaned_up(session.rollback())
        raise


def _acquire(session: Session, binding: Mapping[str, Any], plan: Plan, limit: float | None) -> None:
    connection = session.connection(bind_arguments=dict(binding))
    acquisition = plan(connection)
    with lock_wait(session, acquisition):
        acquire(connection, acquisition, limit)


async def _connected(session: AsyncSession, binding: Mapping[str, Any], limit: float | None) -> float | None:
    """Have the session take its connection; what of the limit is left when the pool has given it."""
    if limit is None or connection_in_use(session.sync_session, **binding) is not None:
        return limit
    loop = asyncio.get_running_loop()
    began = loop.time()
    timeout = limit or NOWAIT_CONNECT_TIMEOUT_SECONDS
    try:
        await interruptible(session.connection(bind_arguments=dict(binding)), limit=timeout)
    except TimeoutError as error:
        if loop.time() - began < timeout:  # the driver's own
            raise
        raise LockTimeoutError(f"timed out after {timeout:g} s waiting for a connection, and so for a lock") from error
    return limit and max(0.001, limit - (loop.time() - began))


def _tables(tables: Sequence[type[Any] | Table]) -> tuple[Table, ...]:
    if isinstance(tables, str | type | Table) or not tables:
        raise ValueError(f"tables is a list of at least one mapped class or Table, not {tables!r}")
    return tuple(table for target in tables for table in _tables_of(target))


def _binding(session: AsyncSession, tables: Sequence[type[Any] | Table]) -> Mapping[str, Any]:
    """Bind arguments for any of them."""
    bindings = [bind_for_writes(each if isinstance(each, Table) else inspect(each)) for each in tables]
    if len({engine_of(session, **binding).sync_engine for binding in bindings}) > 1:
        raise ValueError("The session has these tables on different engines, so no transaction can lock all of them.")
    return bindings[0]


def _tables_of(target: type[Any] | Table) -> Iterable[Table]:
    """A mapped class may have several tables (joined inheritance)."""
    if isinstance(target, Table):
        return [target]
    found = [table for table in mapper_of(target).tables if isinstance(table, Table)]
    if not found:
        raise ValueError(f"{target!r} is not mapped to a table")
    return found


def _table_acquisition(tables: tuple[Table, ...], mode: LockMode, connection: Connection) -> Acquisition:
    schemas = connection.get_execution_options().get("schema_translate_map") or {}
    dialect = connection.dialect
    under = tuple(schemas.get(table.schema, table.schema) for table in tables)
    return _in_one_order(dialect.identifier_preparer, tables, under, dialect.default_schema_name or "", mode)


@lru_cache(maxsize=256)  # a job's locks are the same each time
def _in_one_order(
    preparer: IdentifierPreparer,
    tables: tuple[Table, ...],
    schemas: tuple[str | None, ...],
    default: str,
    mode: LockMode,
) -> Acquisition:
    spelled: dict[tuple[str, str, str], tuple[str, str]] = {}
    for table, schema in zip(tables, schemas, strict=True):
        quoted = preparer.quote(table.name)
        sql = f"{preparer.quote_schema(schema)}.{quoted}" if schema else quoted
        plain = f"{schema}.{table.name}" if schema else table.name
        spelled[schema or default, table.name, sql] = (sql, plain)
    ordered = [spelled[key] for key in sorted(spelled)]
    names, shown = [sql for sql, _ in ordered], [plain for _, plain in ordered]
    as_pg_locks_spells = [other.title().replace(" ", "") + "Lock" for other in _CONFLICTS[mode]]
    return Acquisition(
        mode=mode,
        names=names,
        statements=[f"LOCK TABLE {name} IN {mode} MODE" for name in names],
        subject=f"{', '.join(shown)} in {mode} mode",
        blockers="lock.relation = ANY (CAST(CAST(:names AS text[]) AS regclass[])) AND lock.mode = ANY (:modes)",
        blocked_by={"names": names, "modes": as_pg_locks_spells},
        tables=shown,
    )


def _advisory_key(key: int | tuple[int, int] | str) -> tuple[int, ...]:
    match key:
        case str():
            digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
            return (int.from_bytes(digest, signed=True),)
        case int() if not isinstance(key, bool) and -(2**63) <= key < 2**63:
            return (key,)
        case (int(), int()) if all(not isinstance(part, bool) and -(2**31) <= part < 2**31 for part in key):
            return key
    raise ValueError(f"key is a 64-bit integer, a pair of 32-bit integers or a name, not {key!r}")


def _advisory_acquisition(key: int | tuple[int, int] | str, words: tuple[int, ...], shared: bool) -> Acquisition:
    take = func.pg_advisory_xact_lock_shared if shared else func.pg_advisory_xact_lock
    high, low = words if len(words) == 2 else (words[0] >> 32, words[0])
    return Acquisition(
        mode="ADVISORY SHARED" if shared else "ADVISORY",
        names=[",".join(map(str, words))],
        statements=[literal(select(take(*words)))],
        subject=f"advisory lock {key!r}",
        blockers="lock.locktype = 'advisory' AND lock.classid = CAST(CAST(:high AS bigint) AS oid)"
        " AND lock.objid = CAST(CAST(:low AS bigint) AS oid) AND lock.objsubid = :words",
        blocked_by={"high": high % 2**32, "low": low % 2**32, "words": len(words)},
    )
