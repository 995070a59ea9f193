"""What can be done about jobs from outside: look, cancel, run again. None of it ever waits for a job that runs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import case, delete, inspect, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError

from coord.changes import collect
from coord.errors import RowNotFoundError, UniqueKeyConflictError
from coord.jobs.arguments import as_it_arrives
from coord.jobs.attempt import ATTEMPT, Attempt
from coord.jobs.ledger import Cancellation, Job, JobState, cancellations, is_queued, jobs, workers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncSession

MOST = 1_000
"""Jobs in one answer of `list_jobs`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobReport:
    """A job as it is now; whether it runs, and how far it is, as its worker's last heartbeat says (2 s)."""

    id: UUID
    task: str
    queue: str
    state: JobState
    attempt: int
    arguments: Sequence[Any]
    unique_key: str | None
    created_at: datetime
    due_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: str | None
    """The last failure, in one line."""
    traceback: str | None
    result: Any
    progress: Any
    worker: UUID | None


async def get_job(session: AsyncSession, job_id: UUID) -> JobReport:
    """The job; `RowNotFoundError` if the ledger does not have it, or not any more. Joins the session's transaction."""
    rows = (await session.execute(select(jobs).where(jobs.c.id == job_id))).all()
    if not rows:
        raise RowNotFoundError(f"Job({job_id}) not found")
    return (await _reports(session, rows))[0]


async def list_jobs(
    session: AsyncSession,
    *,
    state: JobState | str | None = None,
    task: str | None = None,
    before: UUID | None = None,
    limit: int = 100,
) -> list[JobReport]:
    """Jobs, the newest first; `before` is the last one of the answer before. Joins the session's transaction.

    `state` may also be "running". Raises `ValueError` for an unknown one, or a `limit` that is not 1 to 1,000.
    """
    if not 1 <= limit <= MOST:
        raise ValueError(f"limit is 1 to {MOST}, not {limit!r}")
    wanted = None if state is None else JobState(state)
    statement = select(jobs).order_by(jobs.c.id.desc()).limit(limit)
    if wanted is JobState.RUNNING:
        statement = statement.where(is_queued, jobs.c.id.in_(await _running(session)))
    elif wanted is not None:
        statement = statement.where(is_queued if wanted is JobState.QUEUED else jobs.c.state == wanted)
    if task is not None:
        statement = statement.where(jobs.c.task == task)
    if before is not None:
        statement = statement.where(jobs.c.id < before)
    return await _reports(session, (await session.execute(statement)).all())


async def cancel_job(session: AsyncSession, job_id: UUID) -> JobState:
    """Have the job not run, or not run on; the caller commits. Joins the session's transaction, and waits for nobody.

    `cancelled`: it has not begun its transaction, and never will. `running`: it has; its worker cancels the task, rolls
    back and marks the job, or the job is done first. `done`, `failed`: it was too late. `RowNotFoundError`.
    """
    free = select(jobs.c.id).where(jobs.c.id == job_id, is_queued).with_for_update(skip_locked=True)
    values = {"state": JobState.CANCELLED, "finished_at": datetime.now(UTC)}
    ended = await session.execute(update(jobs).where(jobs.c.id.in_(free)).values(values).returning(jobs.c.id))
    running = ended.one_or_none() is None
    if running:
        state = await session.scalar(select(jobs.c.state).where(jobs.c.id == job_id))
        if state is None:
            raise RowNotFoundError(f"Job({job_id}) not found")
        if state is not JobState.QUEUED:
            return JobState(state)
    # Kept until a reconciler has taken the job out of Redis, or its worker has ended it.
    await session.execute(insert(cancellations).values(job_id=job_id).on_conflict_do_nothing())
    collect(session.sync_session, (inspect(Job), (job_id,)))
    collect(session.sync_session, (inspect(Cancellation), None))
    return JobState.RUNNING if running else JobState.CANCELLED


async def retry_job(session: AsyncSession, job_id: UUID) -> Job:
    """Have a failed or cancelled job run again, with an attempt more; the caller commits.

    Joins the session's transaction. `ValueError` if the job is unfinished or done, `UniqueKeyConflictError` if there is
    another unfinished one with its unique key, `RowNotFoundError`.
    """
    state = await session.scalar(select(jobs.c.state).where(jobs.c.id == job_id).with_for_update())
    if state is None:
        raise RowNotFoundError(f"Job({job_id}) not found")
    if state not in (JobState.FAILED, JobState.CANCELLED):
        raise ValueError(f"Job {job_id} is {state}; only a failed or cancelled one can be run again")
    more = case((jobs.c.attempts <= jobs.c.attempt, jobs.c.attempt + 1), else_=jobs.c.attempts)
    values = {"state": JobState.QUEUED, "attempt": jobs.c.attempt + 1, "attempts": more, "due_at": datetime.now(UTC)}
    again = update(jobs).where(jobs.c.id == job_id).values(values | {"finished_at": None, "started_at": None})
    try:
        async with session.begin_nested():
            row = (await session.execute(again.returning(jobs))).mappings().one()
    except IntegrityError as error:
        raise UniqueKeyConflictError(f"Another unfinished job has the unique key of job {job_id}") from error
    await session.execute(delete(cancellations).where(cancellations.c.job_id == job_id))
    job = Job(**row)
    collect(session.sync_session, (inspect(Job), (job_id,)), job)
    return job


def set_progress(ctx: Mapping[str, Any], value: Any) -> None:
    """Say how far the task is, in JSON: `get_job` tells it, from the next heartbeat on, as long as the job runs.

    Writes nothing itself. `TypeError` for what is not JSON, `RuntimeError` outside a job of the ledger.
    """
    attempt = ctx.get(ATTEMPT)
    if not isinstance(attempt, Attempt):
        raise RuntimeError("set_progress needs the ctx of a job of the ledger.")  # noqa: TRY004 - of its context
    _, attempt.progress = as_it_arrives("progress", value)


async def _running(session: AsyncSession) -> list[UUID]:
    beats = await session.scalars(select(workers.c.jobs))
    return [UUID(job_id) for held in beats for job_id in held]


async def _reports(session: AsyncSession, rows: Sequence[Any]) -> list[JobReport]:
    unfinished = any(row.state is JobState.QUEUED for row in rows)
    beats = (await session.execute(select(workers.c.id, workers.c.jobs))).all() if unfinished else []
    return [_report(row, beats) for row in rows]


def _report(row: Any, beats: Sequence[Any]) -> JobReport:
    held = next(
        ((worker, told) for worker, jobs in beats if (told := jobs.get(str(row.id), {})).get("attempt") == row.attempt),
        None,
    )
    worker, told = held if held is not None and row.state is JobState.QUEUED else (None, {})
    own = ("id", "task", "queue", "attempt", "arguments", "unique_key", "created_at", "due_at", "started_at")
    rest = ("finished_at", "error", "traceback", "result")
    return JobReport(
        **{name: getattr(row, name) for name in own + rest},
        state=row.state if worker is None else JobState.RUNNING,
        progress=told.get("progress"),
        worker=worker,
    )
