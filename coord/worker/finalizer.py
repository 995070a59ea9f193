"""How an attempt ends in the ledger when its own transaction has not already said so: in one of the worker's own."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError

from coord.errors import LockTimeoutError
from coord.jobs.job_transaction import CLASS, is_ours, ours
from coord.jobs.model import Job, JobState, attempts, cancellations, execute, job_mapper, jobs
from coord.notify.changes import collect
from coord.retryable import is_retryable, sqlstate_of
from coord.session import create_db_context
from coord.timings import ATTEMPT_TIMINGS
from coord.worker.failure import backoff, escaped, full_text, one_line

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from uuid import UUID

    from sqlalchemy import RowMapping
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
    from sqlalchemy.orm import Session

    from coord.jobs.attempt import Attempt

logger = logging.getLogger("arq.coord")

LEDGER_PAUSE_SECONDS = (0.2, 2.0)
"""Before the second attempt to reach the ledger, and before any later one at most."""
MAX_HAND_BACKS = 100
"""How often a job is given back by workers that were told to stop; one that makes them stop must come to an end."""
HANDED_BACK = f"its worker was told to stop {MAX_HAND_BACKS} times while it ran"
LOCK_PATIENCE_SECONDS = 900.0
"""Since its first failure, in which a job does not fail for a lock that it did not get: maintenance takes minutes."""
UNKNOWN_PAUSE_SECONDS = (0.5, 60.0)
UNTRANSLATABLE = {"22021", "22P05"}
"""A character that the database's encoding does not have (appendix A of PostgreSQL's manual)."""


class Finalizer:
    """Writes how attempts end. Each method answers None if the job was no longer this attempt's to end.

    Each opens a transaction of its own and commits it; while PostgreSQL is away it goes on trying.
    """

    def __init__(self, session_maker: async_sessionmaker[AsyncSession], worker: UUID) -> None:
        self._context = create_db_context(session_maker)
        self._worker = worker
        self._text: Callable[[str], str] = str
        self.on_put_off: Callable[[float], None] = _nobody
        """Told of the seconds after which a job that this worker has put off is due."""

    async def done(self, attempt: Attempt, result: Any) -> JobState | None:
        """Of a task without a `job_transaction`: it has returned."""
        return await self._persistent(self._ended, attempt, {"state": JobState.DONE, "result": result})

    async def keep_result(self, attempt: Attempt, result: Any) -> None:
        """Of a task whose effect was applied; its result comes in a commit of its own."""
        job = jobs.c.id == attempt.job_id
        await self._persistent(self._executed, attempt, update(jobs).where(job).values(result=result))

    async def cancelled(self, attempt: Attempt) -> JobState | None:
        return await self._persistent(self._ended, attempt, {"state": JobState.CANCELLED})

    async def cancelled_if_wished(self, attempt: Attempt) -> JobState | None:
        """Of an attempt that was refused its effect: somebody may have cancelled the job before it began."""
        return await self._persistent(self._wished, attempt)

    async def failed(self, attempt: Attempt, error: BaseException) -> JobState | None:
        return await self._persistent(self._failed, attempt, error, one_line(error))

    async def again(
        self, attempt: Attempt, error: BaseException, *, pause: float | None, counts: bool
    ) -> JobState | None:
        """Handed over with the commit, to begin after a pause in seconds; FAILED when that was the last attempt."""
        return await self._persistent(self._again, attempt, error, pause, counts)

    async def handed_back(self, attempt: Attempt) -> JobState | None:
        """Of a worker that stops: no attempt is used up, and another may begin at once."""
        return await self._persistent(self._handed_back, attempt)

    async def unknown(self, attempt: Attempt, error: Exception, *, limit: float | None) -> JobState | None:
        """Of a task that cannot be run here: it goes back, and fails after `limit` seconds of that if there is one."""
        return await self._persistent(self._unknown, attempt, error, limit)

    async def _ended(self, session: AsyncSession, attempt: Attempt, values: dict[str, Any]) -> JobState | None:
        if await _locked(session, attempt) is None:
            return None
        ended = {"finished_at": func.clock_timestamp(), "started_at": attempt.began}
        await session.run_sync(_write, attempt.job_id, values | ended)
        state: JobState = values["state"]
        return state

    async def _wished(self, session: AsyncSession, attempt: Attempt) -> JobState | None:
        wish = select(cancellations.c.job_id).where(cancellations.c.job_id == attempt.job_id)
        if (await session.run_sync(execute, wish)).first() is None:
            return None
        return await self._ended(session, attempt, {"state": JobState.CANCELLED})

    async def _executed(self, session: AsyncSession, _attempt: Attempt, statement: Any) -> None:
        await session.run_sync(execute, statement)

    async def _failed(
        self, session: AsyncSession, attempt: Attempt, error: BaseException, reason: str
    ) -> JobState | None:
        found = {"error": self._text(reason), "traceback": self._text(full_text(error))}
        state = await self._ended(session, attempt, {"state": JobState.FAILED} | found)
        if state is not None:
            await self._record(session, attempt, JobState.FAILED, found)
        return state

    async def _again(
        self, session: AsyncSession, attempt: Attempt, error: BaseException, pause: float | None, counts: bool
    ) -> JobState | None:
        row = await _locked(session, attempt)
        if row is None:
            return None
        used, limit = row["attempt"] - row["uncounted"], row["max_attempts"] or attempt.max_attempts
        if counts and used >= limit and not await _is_waited_out(session, attempt, error):
            return await self._failed(session, attempt, error, f"{one_line(error)} (attempt {used} of {limit})")
        uncounted = row["uncounted"] + (not counts or used >= limit)
        found = {"error": self._text(one_line(error)), "traceback": self._text(full_text(error))}
        await self._record(session, attempt, "retried", found)
        wait = backoff(row["attempt"]) if pause is None else pause
        values = {"attempt": row["attempt"] + 1, "uncounted": uncounted, **found}
        await session.run_sync(_put_off, row, wait, values)
        self.on_put_off(wait)
        return JobState.QUEUED

    async def _handed_back(self, session: AsyncSession, attempt: Attempt) -> JobState | None:
        row = await _locked(session, attempt)
        if row is None:
            return None
        if row["hand_backs"] >= MAX_HAND_BACKS:
            error = RuntimeError(HANDED_BACK)
            return await self._failed(session, attempt, error, one_line(error))
        await session.run_sync(_put_off, row, 0.0, {"hand_backs": row["hand_backs"] + 1})
        return JobState.QUEUED

    async def _unknown(
        self, session: AsyncSession, attempt: Attempt, error: Exception, limit: float | None
    ) -> JobState | None:
        row = await _locked(session, attempt)
        if row is None:
            return None
        waited = row["unknown_seconds"]
        if limit is not None and waited >= limit:
            return await self._failed(session, attempt, error, one_line(error))
        wait = min(max(waited / 2, UNKNOWN_PAUSE_SECONDS[0]), UNKNOWN_PAUSE_SECONDS[1])
        values = {"unknown_seconds": waited + wait, "error": self._text(one_line(error))}
        await session.run_sync(_put_off, row, wait, values)
        return JobState.QUEUED

    async def _record(self, session: AsyncSession, attempt: Attempt, outcome: str, found: Mapping[str, str]) -> None:
        """An attempt that did not succeed leaves a row."""
        who = {"worker": self._worker, "host": socket.gethostname(), "pid": os.getpid()}
        which = {"job_id": attempt.job_id, "number": attempt.number, "began": attempt.began}
        values = {**which, **who, **found, "outcome": outcome}
        await session.run_sync(execute, insert(attempts).values(values).on_conflict_do_nothing())

    async def _persistent(
        self, write: Callable[..., Awaitable[JobState | None]], attempt: Attempt, *arguments: Any
    ) -> JobState | None:
        pause = LEDGER_PAUSE_SECONDS[0]
        while True:
            try:
                async with self._context() as session:
                    session.info[ATTEMPT_TIMINGS] = attempt.timings
                    return await write(session, attempt, *arguments)
            except Exception as error:  # noqa: BLE001 - see below
                if self._text is str and isinstance(error, DBAPIError) and sqlstate_of(error) in UNTRANSLATABLE:
                    self._text = escaped
                    continue
                # It goes on in any case: with its end unwritten the job would be handed over and run again.
                level = logging.DEBUG if is_retryable(error) else logging.ERROR
                logger.log(level, "the end of job %s cannot be written yet: %s", attempt.job_id, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LEDGER_PAUSE_SECONDS[1])


def _nobody(_seconds: float) -> None:
    """Nobody waits for it."""


_lock = (
    select(
        jobs,
        func.set_config("idle_in_transaction_session_timeout", bindparam("idle"), True),
        func.pg_advisory_xact_lock_shared(CLASS, bindparam("lock")),
    )
    .where(is_ours)
    .with_for_update(of=jobs)
)


async def _locked(session: AsyncSession, attempt: Attempt) -> RowMapping | None:
    """The job's row, if it is still this attempt's to end; what a dead worker leaves is bounded as for its effect."""
    bounds = {"idle": f"{attempt.idle_limit * 1000:.0f}ms", "lock": attempt.worker_lock}
    return (await session.run_sync(execute, _lock, ours(attempt) | bounds)).mappings().one_or_none()


async def _is_waited_out(session: AsyncSession, attempt: Attempt, error: BaseException) -> bool:
    """Whether it is a lock that somebody has had for long, and the job has not been at it for so long itself."""
    if not isinstance(error, LockTimeoutError):
        return False
    first = select(func.min(attempts.c.began)).where(attempts.c.job_id == attempt.job_id)
    began: datetime = (await session.run_sync(execute, first)).scalar() or attempt.began
    waited = (datetime.now(UTC) - began).total_seconds()
    logger.warning("Job %s has waited %.0f s for a lock, and goes on: %s", attempt.job_id, waited, error)
    return waited < LOCK_PATIENCE_SECONDS


def _write(session: Session, job_id: UUID, values: dict[str, Any]) -> None:
    execute(session, update(jobs).where(jobs.c.id == job_id).values(values))
    execute(session, delete(cancellations).where(cancellations.c.job_id == job_id))
    collect(session, (job_mapper, (job_id,)))


def _put_off(session: Session, row: RowMapping, wait: float, values: dict[str, Any]) -> None:
    """Have it begin in so many seconds by PostgreSQL's clock, and hand it over with the commit."""
    due = {"scheduled_at": func.clock_timestamp() + timedelta(seconds=wait)} if wait else {}
    execute(session, update(jobs).where(jobs.c.id == row["id"]).values(values | due))
    job = Job(**{column.name: row[column.name] for column in jobs.c} | values)
    job.due_in, job.due_said_at = wait, time.monotonic()
    collect(session, (job_mapper, (job.id,)), job)
