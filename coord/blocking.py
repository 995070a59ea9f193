"""Who holds which table, who waits behind whom, and which job each of them is: one look, for the command and a console.

Which backend runs which job costs the job nothing: its claim has written the ledger's row, whose `xmax` (section 5.5 of
PostgreSQL's manual) is the transaction that `pg_locks` has for the backend. A job is found once a heartbeat names it,
half a second after it began.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Text, cast, literal_column, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from coord.jobs.model import execute, jobs, workers
from coord.jobs.queries import heartbeats
from coord.telemetry import ids_of

MAX_QUERY_CHARACTERS = 200
WEAK_MODES = {"ACCESS SHARE", "ROW SHARE", "ROW EXCLUSIVE"}
"""Those that every statement takes: they are told of only where somebody waits for them."""

_BACKENDS = text(f"""
    WITH locks AS MATERIALIZED (SELECT * FROM pg_locks),
    held AS (
        SELECT locks.pid, array_agg(locks.relation::regclass::text ORDER BY locks.relation, locks.mode) AS tables,
            array_agg(locks.mode ORDER BY locks.relation, locks.mode) AS modes
        FROM locks JOIN pg_class ON pg_class.oid = locks.relation AND pg_class.relkind IN ('r', 'p')
        WHERE locks.granted AND locks.locktype = 'relation'
            AND pg_class.relnamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)
        GROUP BY locks.pid
    ),
    waiting AS (
        SELECT DISTINCT ON (pid) pid, locktype, mode, relation::regclass::text AS "table",
            extract(epoch FROM clock_timestamp() - waitstart)::float8 AS seconds, pg_blocking_pids(pid) AS blockers
        FROM locks WHERE NOT granted ORDER BY pid
    )
    SELECT pid, application_name, state, left(query, {MAX_QUERY_CHARACTERS}) AS query,
        extract(epoch FROM clock_timestamp() - xact_start)::float8 AS transaction_seconds,
        (SELECT transactionid::text FROM locks WHERE locks.pid = activity.pid AND locktype = 'transactionid'
            AND granted LIMIT 1) AS xid,
        tables, modes, locktype, mode, "table", seconds, blockers
    FROM pg_stat_activity AS activity LEFT JOIN held USING (pid) LEFT JOIN waiting USING (pid)
    WHERE datname = current_database() AND pid <> pg_backend_pid()
        AND (tables IS NOT NULL OR locktype IS NOT NULL OR pid IN (SELECT unnest(blockers) FROM waiting))
    ORDER BY pid
""")


@dataclass(frozen=True, slots=True)
class TableLock:
    table: str | None
    """As PostgreSQL spells it; None of what is no table's: a row of another transaction, an advisory lock."""
    mode: str
    """As PostgreSQL spells it, `SHARE ROW EXCLUSIVE`; of what is no table's, its kind."""

    @property
    def is_strong(self) -> bool:
        """Whether it keeps writers, or others of its own kind, away."""
        return self.mode not in WEAK_MODES

    def __str__(self) -> str:
        return f"{self.table} ({self.mode})" if self.table else self.mode


@dataclass(frozen=True, slots=True, kw_only=True)
class JobAboard:
    id: UUID
    task: str
    queue: str
    attempt: int
    worker: UUID
    host: str | None
    pid: int | None
    """Of the worker."""
    trace_id: str | None
    request_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A session of the database that holds a lock of note, or waits for one."""

    pid: int
    application_name: str
    state: str | None
    query: str
    """Its last statement, or the one that runs."""
    transaction_seconds: float | None
    """Since its transaction began; None for who may not see that."""
    holds: Sequence[TableLock]
    waits_for: TableLock | None
    waiting_seconds: float | None
    blocked_by: Sequence[int]
    """Of those that it waits behind, those that hold the lock or stand in its queue (`pg_blocking_pids`)."""
    job: JobAboard | None


async def blocking(session: AsyncSession) -> list[Backend]:
    """The backends of the session's database as they are now. Joins the session's transaction, and only reads."""
    rows = (await session.run_sync(execute, _BACKENDS)).all()
    aboard = await _aboard(session)
    blockers = {pid for row in rows for pid in row.blockers or ()}
    return [_backend(row, aboard.get(row.xid)) for row in rows if _is_of_note(row, blockers)]


def tree(backends: Sequence[Backend]) -> Iterator[tuple[int, Backend]]:
    """Each with its depth: who waits comes below the first of those that it waits behind."""
    by_pid = {backend.pid: backend for backend in backends}
    below: dict[int | None, list[Backend]] = {}
    for backend in backends:
        first = next((pid for pid in backend.blocked_by if pid in by_pid), None)
        below.setdefault(first, []).append(backend)
    seen: set[int] = set()

    def walk(backend: Backend, depth: int) -> Iterator[tuple[int, Backend]]:
        if backend.pid not in seen:
            seen.add(backend.pid)
            yield depth, backend
            for behind in below.get(backend.pid, ()):
                yield from walk(behind, depth + 1)

    for backend in (*below.get(None, ()), *backends):  # nobody is first in a deadlock, until PostgreSQL breaks it
        yield from walk(backend, 0)


def _is_of_note(row: Any, blockers: set[int]) -> bool:
    strong = any(_spelled(mode) not in WEAK_MODES for mode in row.modes or ())
    return strong or row.locktype is not None or row.pid in blockers


async def _aboard(session: AsyncSession) -> Mapping[str | None, JobAboard]:
    """By the number of the transaction that has claimed the job, or ends it."""
    beats = {beat.id: beat.worker for beat in await heartbeats(session)}
    own = (jobs.c.id, jobs.c.task, jobs.c.queue, jobs.c.attempt, jobs.c.trace)
    xmax = cast(literal_column("coord_jobs.xmax"), Text).label("xid")
    found = (await session.run_sync(execute, select(*own, xmax).where(jobs.c.id.in_(list(beats))))).all()
    where = select(workers.c.id, workers.c.host, workers.c.pid).where(workers.c.id.in_(set(beats.values())))
    places = {row.id: row for row in await session.run_sync(execute, where)}
    made = {}
    for row in found:
        place, ids = places.get(beats[row.id]), ids_of(row.trace)
        made[row.xid] = JobAboard(
            id=row.id,
            task=row.task,
            queue=row.queue,
            attempt=row.attempt,
            worker=beats[row.id],
            host=place and place.host,
            pid=place and place.pid,
            trace_id=ids.get("trace_id"),
            request_id=ids.get("request_id"),
        )
    made.pop("0", None)  # nobody's
    return made


def _backend(row: Any, job: JobAboard | None) -> Backend:
    held = zip(row.tables or (), row.modes or (), strict=True)
    waits_for = None
    if row.locktype is not None:
        waits_for = TableLock(row.table if row.locktype == "relation" else None, _kind(row))
    return Backend(
        pid=row.pid,
        application_name=row.application_name or "",
        state=row.state,
        query=" ".join((row.query or "").split()),
        transaction_seconds=row.transaction_seconds,
        holds=tuple(TableLock(name, _spelled(mode)) for name, mode in held),
        waits_for=waits_for,
        waiting_seconds=row.seconds,
        blocked_by=tuple(row.blockers or ()),
        job=job,
    )


def _kind(row: Any) -> str:
    match row.locktype:
        case "relation":
            return _spelled(row.mode)
        case "transactionid" | "tuple":
            return "a row of another transaction"
        case other:
            return f"{other} lock"


def _spelled(mode: str) -> str:
    """`ShareRowExclusiveLock` as `SHARE ROW EXCLUSIVE`."""
    words = "".join(f" {letter}" if letter.isupper() else letter for letter in mode.removesuffix("Lock"))
    return words.strip().upper()
