"""How an attempt ends in the ledger when its own transaction has not already said so: in one of the worker's own."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import traceback
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, delete, func, select, update

from coord.jobs.model import Job, JobState, cancellations, job_mapper, jobs
from coord.jobs.transaction import CLASS, is_ours, ours
from coord.notify.changes import collect
from coord.retryable import is_retryable
from coord.session import create_db_context

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy import RowMapping
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
    from sqlalchemy.orm import Session

    from coord.jobs.attempt import Attempt

logger = logging.getLogger("arq.coord")

PAUSE = (0.1, 30.0)
"""Seconds before the second attempt, and before any later one at most."""
LEDGER_PAUSE = (0.2, 2.0)
"""Seconds between attempts to reach the ledger."""
LINE, TEXT = 500, 20_000
"""Characters kept of an error and of its traceback."""


class Endings:
    """Writes how attempts end. Each method answers False or None if the job was no longer this attempt's to end.

    Each opens a transaction of its own and commits it; while PostgreSQL is away it goes on trying.
    """

    def __init__(self, session_maker: async_sessionmaker[AsyncSession]) -> None:
        self._context = create_db_context(session_maker)

    async def done(self, attempt: Attempt) -> bool:
        """Of a task without a `job_transaction`: it has returned."""
        values = {"state": JobState.DONE, "finished_at": func.clock_timestamp(), "started_at": attempt.began}
        return bool(await self._persistent(self._final, attempt, values))

    async def cancelled(self, attempt: Attempt) -> bool:
        values = {"state": JobState.CANCELLED, "finished_at": func.clock_timestamp(), "started_at": attempt.began}
        return bool(await self._persistent(self._final, attempt, values))

    async def failed(self, attempt: Attempt, error: BaseException, reason: str | None = None) -> bool:
        values = {
            "state": JobState.FAILED,
            "finished_at": func.clock_timestamp(),
            "started_at": attempt.began,
            "error": reason or one_line(error),
            "traceback": _traceback(error),
        }
        return bool(await self._persistent(self._final, attempt, values))

    async def again(self, attempt: Attempt, error: BaseException, pause: float | None) -> float | None:
        """Seconds until the next attempt, which is handed over with the commit; infinite when that was the last."""
        wait: float | None = await self._persistent(self._again, attempt, error, pause)
        return wait

    async def _final(self, session: AsyncSession, attempt: Attempt, values: dict[str, Any]) -> bool:
        if await _locked(session, attempt) is None:
            return False
        await session.run_sync(_write, attempt, values)
        return True

    async def _again(
        self, session: AsyncSession, attempt: Attempt, error: BaseException, pause: float | None
    ) -> float | None:
        row = await _locked(session, attempt)
        if row is None:
            return None
        most = row["attempts"] or attempt.attempts
        if row["attempt"] >= most:
            reason = f"{one_line(error)} (attempt {row['attempt']} of {most})"
            values = {"state": JobState.FAILED, "finished_at": func.clock_timestamp(), "started_at": attempt.began}
            last = {"error": reason[:LINE], "traceback": _traceback(error)}
            await session.run_sync(_write, attempt, values | last)
            return math.inf
        wait = backoff(row["attempt"]) if pause is None else pause
        due = datetime.now(UTC) + timedelta(seconds=wait)
        values = {"attempt": row["attempt"] + 1, "due_at": due, "error": one_line(error)}
        following = Job(**{column.name: row[column.name] for column in jobs.c} | values)
        await session.run_sync(_write, attempt, values | {"traceback": _traceback(error)}, following)
        return wait

    async def _persistent(self, write: Callable[..., Awaitable[Any]], attempt: Attempt, *arguments: Any) -> Any:
        pause = LEDGER_PAUSE[0]
        while True:
            try:
                async with self._context() as session:
                    return await write(session, attempt, *arguments)
            except Exception as error:
                if not is_retryable(error):
                    raise
                logger.debug("the end of job %s cannot be written yet: %s", attempt.job_id, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LEDGER_PAUSE[1])


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
    return (await session.execute(_lock, ours(attempt) | bounds)).mappings().one_or_none()


def _write(session: Session, attempt: Attempt, values: dict[str, Any], next_attempt: Job | None = None) -> None:
    session.execute(update(jobs).where(jobs.c.id == attempt.job_id).values(values))
    if next_attempt is None:
        session.execute(delete(cancellations).where(cancellations.c.job_id == attempt.job_id))
    collect(session, (job_mapper, (attempt.job_id,)), next_attempt)


def backoff(attempt: int) -> float:
    """Seconds, doubling, with a jitter that keeps what failed together from failing together again."""
    return float(min(PAUSE[0] * 2 ** min(attempt - 1, 30), PAUSE[1]) * random.uniform(0.5, 1.0))


def can_be_told(error: BaseException) -> bool:
    try:
        str(error)
    except Exception:  # noqa: BLE001 - whatever it is, the error itself must not be lost for it
        return False
    return True


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) if can_be_told(error) else "cannot say what it is"
    return _storable(f"{type(error).__name__}: {text}"[:LINE] if text else type(error).__name__)


def _traceback(error: BaseException) -> str:
    return _storable("".join(traceback.format_exception(error))[-TEXT:])


def _storable(text: str) -> str:
    """Without what PostgreSQL's text cannot hold: a null character, half a surrogate pair."""
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()
