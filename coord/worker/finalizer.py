"""How an attempt ends in the ledger when its own transaction has not already said so: in one of the worker's own."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from sqlalchemy import CursorResult, Executable, RowMapping, bindparam, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from coord.errors import LockTimeoutError
from coord.jobs.attempt import Attempt
from coord.jobs.job_transaction import WORKER_LOCK_CLASS, is_ours, is_unwanted, ours
from coord.jobs.model import Job, JobState, attempts, cancellations, execute, job_mapper, jobs
from coord.notify.changes import collect
from coord.retryable import is_retryable, sqlstate_of
from coord.session import create_db_context
from coord.timings import ATTEMPT_TIMINGS
from coord.worker.failure import backoff, escaped, full_text, one_line
from coord.worker.state import WorkerState

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger("arq.coord")

LEDGER_PAUSE_SECONDS = (0.2, 2.0)
"""Before the second attempt to reach the ledger, and before any later one at most."""
MAX_HAND_BACKS = 100
"""How often a job is given back by workers that were told to stop; one that makes them stop must come to an end."""
HANDED_BACK = f"its worker was told to stop {MAX_HAND_BACKS} times while it ran"
LOCK_PATIENCE_SECONDS = 900.0
"""Since its first failure, or the first after its worker has died or it was run again, in which a job does not fail for
a lock that it did not get: maintenance takes minutes."""
UNKNOWN_PAUSE_SECONDS = (0.5, 60.0)
UNTRANSLATABLE = {"22021", "22P05"}
"""A character that the database's encoding does not have (appendix A of PostgreSQL's manual)."""


class End(NamedTuple):
    """What the end of an attempt is written with."""

    session: AsyncSession
    attempt: Attempt
    row: RowMapping
    """The job's, locked."""

    async def execute(self, statement: Executable) -> CursorResult[Any]:
        return await self.session.run_sync(execute, statement)


def _persistent(
    write: Callable[Concatenate[Finalizer, End, P], Awaitable[T]],
) -> Callable[Concatenate[Finalizer, Attempt, P], Awaitable[T | None]]:
    """Write it in a transaction of its own, with the job's row locked; None if the row is no longer the attempt's."""

    @wraps(write)
    async def written(self: Finalizer, attempt: Attempt, /, *args: P.args, **kwargs: P.kwargs) -> T | None:
        async def transaction(session: AsyncSession) -> T | None:
            bounds = {"idle": f"{attempt.idle_limit * 1000:.0f}ms", "lock": attempt.worker_lock}
            found = await session.run_sync(execute, _lock, ours(attempt) | bounds)
            row = found.mappings().one_or_none()
            return None if row is None else await write(self, End(session, attempt, row), *args, **kwargs)

        return await self.persist(attempt, transaction)

    return written


class Finalizer:
    """Writes how attempts end. Each method answers None if the job was no longer this attempt's to end.

    `on_put_off` is told of the seconds after which a job that this worker has put off is due.
    """

    def __init__(self, state: WorkerState, on_put_off: Callable[[float], None]) -> None:
        self._context = create_db_context(state.config.session_maker)
        self._worker = state.id
        self._on_put_off = on_put_off
        self._text: Callable[[str], str] = str

    @_persistent
    async def done(self, end: End, result: Any) -> JobState:
        """Of a task without a `job_transaction`: it has returned."""
        return await self._end(end, JobState.DONE, result=result)

    async def keep_result(self, attempt: Attempt, result: Any) -> None:
        """Of a task whose effect was applied; its result comes in a commit of its own."""
        kept = update(jobs).where(jobs.c.id == attempt.job_id).values(result=result)
        await self.persist(attempt, lambda session: session.run_sync(execute, kept))

    @_persistent
    async def cancelled(self, end: End) -> JobState:
        await self._record(end, JobState.CANCELLED)
        return await self._end(end, JobState.CANCELLED)

    @_persistent
    async def cancelled_if_wished(self, end: End) -> JobState | None:
        """Of an attempt that was refused its effect: somebody may have cancelled the job before it began."""
        return await self._end(end, JobState.CANCELLED) if end.row["is_unwanted"] else None

    @_persistent
    async def failed(self, end: End, error: BaseException) -> JobState:
        return await self._fail(end, error)

    @_persistent
    async def again(self, end: End, error: BaseException, pause: float | None, *, counts: bool) -> JobState:
        """Handed over with the commit, to begin after a pause in seconds; FAILED when that was the last attempt."""
        row = end.row
        used, limit = row["attempt"] - row["uncounted"], row["max_attempts"] or end.attempt.max_attempts
        if counts and used >= limit and not await _is_waited_out(end, error):
            return await self._fail(end, error, f" (attempt {used} of {limit})")
        uncounted = row["uncounted"] + (not counts or used >= limit)
        found = await self._record(end, "retried", error)
        wait = backoff(row["attempt"]) if pause is None else pause
        self._on_put_off(wait)
        return await self._put_off(end, wait, attempt=row["attempt"] + 1, uncounted=uncounted, **found)

    @_persistent
    async def handed_back(self, end: End) -> JobState:
        """Of a worker that stops: no attempt is used up, and another may begin at once."""
        if end.row["hand_backs"] >= MAX_HAND_BACKS:
            return await self._fail(end, RuntimeError(HANDED_BACK))
        return await self._put_off(end, 0.0, hand_backs=end.row["hand_backs"] + 1)

    @_persistent
    async def unknown(self, end: End, error: Exception, limit: float | None) -> JobState:
        """Of a task that cannot be run here: it goes back, and fails after `limit` seconds of that if there is one."""
        waited = end.row["unknown_seconds"]
        if limit is not None and waited >= limit:
            return await self._fail(end, error)
        wait = min(max(waited / 2, UNKNOWN_PAUSE_SECONDS[0]), UNKNOWN_PAUSE_SECONDS[1])
        return await self._put_off(end, wait, unknown_seconds=waited + wait, error=self._text(one_line(error)))

    async def _fail(self, end: End, error: BaseException, more: str = "") -> JobState:
        found = await self._record(end, JobState.FAILED, error, more)
        return await self._end(end, JobState.FAILED, **found)

    async def _end(self, end: End, state: JobState, **values: Any) -> JobState:
        job_id = end.attempt.job_id
        ended = {"state": state, "finished_at": func.clock_timestamp(), "started_at": end.attempt.began, **values}
        await end.execute(update(jobs).where(jobs.c.id == job_id).values(ended))
        await end.execute(delete(cancellations).where(cancellations.c.job_id == job_id))
        collect(end.session.sync_session, (job_mapper, (job_id,)))
        return state

    async def _put_off(self, end: End, wait: float, **values: Any) -> JobState:
        """Have it begin in so many seconds by PostgreSQL's clock, and hand it over with the commit.

        One that somebody has cancelled ends: its worker had not stopped it yet.
        """
        if end.row["is_unwanted"]:
            return await self._end(end, JobState.CANCELLED)
        due = {"scheduled_at": func.clock_timestamp() + timedelta(seconds=wait)} if wait else {}
        await end.execute(update(jobs).where(jobs.c.id == end.attempt.job_id).values(values | due | {"turn": None}))
        job = Job(**{column.name: end.row[column.name] for column in jobs.c} | values)
        job.due_in, job.due_said_at = wait, time.monotonic()
        collect(end.session.sync_session, (job_mapper, (job.id,)), job)
        return JobState.QUEUED

    async def _record(
        self, end: End, outcome: str, error: BaseException | None = None, more: str = ""
    ) -> dict[str, str]:
        """An attempt that did not succeed leaves a row; what the job's own row has of it: the error, and `more`."""
        attempt = end.attempt
        found: dict[str, str] = {}
        if error is not None:
            found = {"error": self._text(one_line(error) + more), "traceback": self._text(full_text(error))}
        who = {"worker": self._worker, "host": socket.gethostname(), "pid": os.getpid()}
        which = {"job_id": attempt.job_id, "number": attempt.number, "began": attempt.began, "outcome": outcome}
        await end.execute(insert(attempts).values({**which, **who, **found}).on_conflict_do_nothing())
        return found

    async def persist(self, attempt: Attempt, write: Callable[[AsyncSession], Awaitable[T]]) -> T:
        """Have it written and committed, going on while PostgreSQL is away."""
        failures = 0
        while True:
            try:
                async with self._context() as session:
                    session.info[ATTEMPT_TIMINGS] = attempt.timings
                    return await write(session)
            except Exception as error:  # noqa: BLE001 - see below
                if self._text is str and isinstance(error, DBAPIError) and sqlstate_of(error) in UNTRANSLATABLE:
                    self._text = escaped
                    continue
                # It goes on in any case: with its end unwritten the job would be handed over and run again.
                level = logging.DEBUG if is_retryable(error) else logging.ERROR
                logger.log(level, "the end of job %s cannot be written yet: %s", attempt.job_id, error)
            failures += 1
            await asyncio.sleep(backoff(failures, LEDGER_PAUSE_SECONDS))


# What a dead worker leaves is bounded as for its effect.
_lock = (
    select(
        jobs,
        is_unwanted.label("is_unwanted"),
        func.set_config("idle_in_transaction_session_timeout", bindparam("idle"), True),
        func.pg_advisory_xact_lock_shared(WORKER_LOCK_CLASS, bindparam("lock")),
    )
    .where(is_ours)
    .with_for_update(of=jobs)
)


async def _is_waited_out(end: End, error: BaseException) -> bool:
    """Whether it is a lock that somebody has had for long, and the job has not been at it for so long itself."""
    if not isinstance(error, LockTimeoutError):
        return False
    its_own = attempts.c.job_id == end.attempt.job_id
    last_end = select(func.max(attempts.c.number)).where(its_own, attempts.c.outcome != "retried").scalar_subquery()
    first = select(func.min(attempts.c.began)).where(its_own, attempts.c.number > func.coalesce(last_end, 0))
    began: datetime = (await end.execute(first)).scalar() or end.attempt.began
    waited = (datetime.now(UTC) - began).total_seconds()
    if waited >= LOCK_PATIENCE_SECONDS:
        return False
    logger.warning("Job %s has waited %.0f s for a lock, and goes on: %s", end.attempt.job_id, waited, error)
    return True
