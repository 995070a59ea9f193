"""What can be done about jobs from outside: read, cancel, run again. None of it ever waits for a job that runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Select,
    bindparam,
    case,
    delete,
    func,
    insert,
    inspect,
    literal,
    select,
    tuple_,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from coord.cancellation import interruptible
from coord.database.engine import AnySession, session_of
from coord.durations import whole
from coord.errors import RowNotFoundError, UniqueKeyConflictError
from coord.jobs.job_transaction import is_unwanted
from coord.jobs.model import (
    Cancellation,
    Job,
    JobState,
    attempts,
    cancellations,
    execute,
    is_queued,
    job_mapper,
    jobs,
    ledger_connection,
    workers,
)
from coord.notify.changes import collect

MAX_LISTED_JOBS = 1_000
"""In one answer of `list_jobs`."""
HEARTBEAT_EXPIRY_SECONDS = 10.0
"""Since a worker's last heartbeat, after which it is ignored: its jobs run elsewhere by then."""
RETRYABLE_STATES = (JobState.FAILED, JobState.CANCELLED)
_used = jobs.c.attempt - jobs.c.uncounted
_AGAIN: Mapping[str, Any] = {
    "state": JobState.QUEUED,
    "attempt": jobs.c.attempt + 1,
    "max_attempts": case((jobs.c.max_attempts <= _used, _used + 1), else_=jobs.c.max_attempts),
    "scheduled_at": func.now(),
    "finished_at": None,
    "started_at": None,
    "turn": None,
    "deaths": 0,
    "hand_backs": 0,
    "unknown_seconds": 0,
}
"""What makes a job that has ended begin anew, with an attempt more."""
_is_alive = workers.c.beat_at > func.clock_timestamp() - timedelta(seconds=HEARTBEAT_EXPIRY_SECONDS)


class Beat(NamedTuple):
    """What a worker's heartbeat has of one job."""

    id: UUID
    attempt: int
    progress: Any
    worker: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class JobReport:
    """A job as it is now; whether it runs, and how far it is, by its worker's last heartbeat (every 2 s)."""

    id: UUID
    task: str
    queue: str
    state: JobState
    attempt: int
    arguments: Sequence[Any]
    unique_key: str | None
    created_at: datetime
    scheduled_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    """Of a job done in a `job_transaction`, when that began, not when it was committed."""
    error: str | None
    """The last failure, in one line."""
    traceback: str | None
    result: Any
    progress: Any
    worker: UUID | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptReport:
    """An attempt that did not succeed."""

    number: int
    outcome: str
    """`retried`, `failed`, `cancelled`, or `died` with its worker."""
    worker: UUID | None
    host: str | None
    pid: int | None
    began: datetime | None
    """By the worker's clock; None of one that died, whose worker has not said."""
    ended: datetime
    error: str | None
    """In one line."""
    traceback: str | None


async def get_job(session: AnySession, job_id: UUID) -> JobReport:
    """The job; `RowNotFoundError` if the ledger does not have it, or not any more. Joins the session's transaction."""
    found = (await session_of(session).run_sync(execute, select(jobs).where(jobs.c.id == job_id))).one_or_none()
    if found is None:
        raise _not_found(job_id)
    return _report(found, _by_attempt([] if found.state.is_final else await heartbeats(session)))


async def list_jobs(
    session: AnySession,
    *,
    state: JobState | str | None = None,
    task: str | None = None,
    before: UUID | None = None,
    limit: int = 100,
) -> list[JobReport]:
    """Jobs, the newest first; `before` is the last one of the answer before. Joins the session's transaction.

    `state` is that of the reports, "running" among them. Raises `ValueError` for an unknown one, or a `limit` that is
    not 1 to 1,000.
    """
    whole("limit", limit, most=MAX_LISTED_JOBS)
    wanted = None if state is None else JobState(state)
    beats = [] if wanted is not None and wanted.is_final else await heartbeats(session)
    statement = select(jobs).where(*in_state(wanted, beats)).order_by(jobs.c.id.desc()).limit(limit)
    if task is not None:
        statement = statement.where(jobs.c.task == task)
    if before is not None:
        statement = statement.where(jobs.c.id < before)
    found = (await session_of(session).run_sync(execute, statement)).all()
    running = _by_attempt(beats)
    return [_report(row, running) for row in found]


async def list_attempts(session: AnySession, job_id: UUID) -> list[AttemptReport]:
    """The attempts at a job that did not succeed, in order; none of a job that the ledger does not have.

    Joins the session's transaction. They leave the ledger with their job.
    """
    names = AttemptReport.__slots__
    found = select(*(attempts.c[name] for name in names)).where(attempts.c.job_id == job_id)
    rows = await interruptible(session_of(session).run_sync(execute, found.order_by(attempts.c.number)))
    return [AttemptReport(**row) for row in rows.mappings()]


async def cancel_job(session: AnySession, job_id: UUID) -> JobState:
    """Cancel the job; the caller commits. Joins the session's transaction, and waits for no running job.

    Returns `cancelled`: it has not begun its transaction, and never will; `running`: it has, or it runs with a key of
    `one_at_a_time`, and its worker cancels the task, rolls back and marks the job, unless the job is done first;
    `done`, `failed`: it was too late. Raises `RowNotFoundError`.
    """
    return await interruptible(session_of(session).run_sync(_cancel, job_id))


async def retry_job(session: AnySession, job_id: UUID) -> Job:
    """Queue a failed or cancelled job again, with one attempt more; the caller commits.

    Joins the session's transaction. `ValueError` if the job is unfinished or done, `UniqueKeyConflictError` if there is
    another unfinished one with its unique key, `RowNotFoundError`.
    """
    return await interruptible(session_of(session).run_sync(_retry, job_id))


def _cancel(session: Session, job_id: UUID) -> JobState:
    ended, _ = cancel_some(session, [jobs.c.id == job_id], 1)
    if ended:
        return JobState.CANCELLED
    state = execute(session, select(jobs.c.state).where(jobs.c.id == job_id)).scalar_one_or_none()
    if state is None:
        raise _not_found(job_id)
    return JobState.RUNNING if state is JobState.QUEUED else JobState(state)


def cancel_some(session: Session, conditions: Sequence[ColumnElement[bool]], limit: int) -> tuple[int, int]:
    """How many unfinished jobs were cancelled, the eldest first, and of how many that run their workers are told."""
    # With its row a turn ends, and another job's begins.
    runs_in_turn = jobs.c.turn.is_not_distinct_from(jobs.c.attempt) & held_by(_heartbeats(session))
    may_end = is_queued & ~runs_in_turn
    free = free_of(select(jobs.c.id).where(may_end, *conditions).order_by(jobs.c.id).limit(limit))
    values = {"state": JobState.CANCELLED, "finished_at": func.now()}
    ended = execute(session, update(jobs).where(jobs.c.id.in_(free)).values(values).returning(jobs)).mappings().all()
    for row in ended:
        collect(session, (job_mapper, (row["id"],)), Job(**row))
    # What is unfinished still is locked, or has a turn: it runs, and its worker ends it. A row of its own for each who
    # wishes it, so that none waits for another.
    running = select(jobs.c.id).where(is_queued, *conditions, ~is_unwanted).limit(limit - len(ended))
    wish = insert(cancellations).from_select(["job_id"], running)
    wishes = execute(session, wish).rowcount if len(ended) < limit else 0
    collect(session, (inspect(Cancellation), None), beside=job_mapper)
    return len(ended), wishes


def _retry(session: Session, job_id: UUID) -> Job:
    found = execute(session, select(jobs).where(jobs.c.id == job_id)).one_or_none()
    if found is None:
        raise _not_found(job_id)
    # Looked for first: an update would wait for a job that runs just now, this one or one with its key.
    conflict = UniqueKeyConflictError(f"another unfinished job has the unique key of {Job(**found._mapping)}")
    same_key = select(jobs.c.id).where(is_queued, jobs.c.task == found.task, jobs.c.unique_key == found.unique_key)
    if found.state in RETRYABLE_STATES and found.unique_key is not None and execute(session, same_key).first():
        raise conflict
    try:
        retried = run_again(session, jobs.c.id == job_id, jobs.c.state.in_(RETRYABLE_STATES))
    except IntegrityError as error:
        raise conflict from error
    if not retried:
        raise ValueError(f"Job {job_id} is {found.state}; only a failed or cancelled one can be run again")
    return retried[0]


def run_again(session: Session, *conditions: ColumnElement[bool]) -> Sequence[Job]:
    """The jobs as they are then. `IntegrityError`, and all is as before, if another has a unique key of theirs."""
    again = update(jobs).where(*conditions).values(_AGAIN).returning(jobs)
    with ledger_connection(session).begin_nested():
        found = [Job(**row) for row in execute(session, again).mappings()]
    execute(session, delete(cancellations).where(cancellations.c.job_id.in_([job.id for job in found])))
    for job in found:
        collect(session, (job_mapper, (job.id,)), job)
    return found


def free_of(found: Select[Any]) -> Select[Any]:
    """Locked, without what others have locked; read once (or the plan may have the limit begin anew with each row)."""
    return select(found.with_for_update(skip_locked=True, of=jobs).cte("found").c.id)


def _not_found(job_id: UUID) -> RowNotFoundError:
    return RowNotFoundError(f"Job({job_id}) not found")


async def heartbeats(session: AnySession) -> list[Beat]:
    return await session_of(session).run_sync(_heartbeats)


def _heartbeats(session: Session) -> list[Beat]:
    """Taken apart here: PostgreSQL refuses some JSON that it has stored, which a progress may be."""
    return [
        Beat(UUID(job_id), running["attempt"], running.get("progress"), worker.id)
        for worker in execute(session, select(workers.c.id, workers.c.jobs).where(_is_alive))
        for job_id, running in worker.jobs.items()
    ]


def held_by(beats: Iterable[Beat]) -> ColumnElement[bool]:
    """Whether a queued job runs. Two arrays: of single values a statement may have no more than 32,767."""
    told = [(beat.id, beat.attempt) for beat in beats]
    ids = literal([job_id for job_id, _ in told], ARRAY(jobs.c.id.type))
    numbers = literal([attempt for _, attempt in told], ARRAY(jobs.c.attempt.type))
    return tuple_(jobs.c.id, jobs.c.attempt).in_(select(func.unnest(ids), func.unnest(numbers)))


def in_state(wanted: JobState | None, beats: Iterable[Beat]) -> list[ColumnElement[bool]]:
    """Which jobs are in that state, by these heartbeats; None for any."""
    match wanted:
        case None:
            return []
        case JobState.RUNNING:
            return [is_queued, held_by(beats)]
        case JobState.QUEUED:
            return [is_queued, ~held_by(beats)]
    return [jobs.c.state == bindparam(None, wanted, literal_execute=True)]  # written out, as in is_queued


def _by_attempt(beats: Iterable[Beat]) -> dict[tuple[UUID, int], Beat]:
    return {(beat.id, beat.attempt): beat for beat in beats}


def _report(row: Any, running: Mapping[tuple[UUID, int], Beat]) -> JobReport:
    beat = running.get((row.id, row.attempt)) if row.state is JobState.QUEUED else None
    stored = {name: getattr(row, name) for name in JobReport.__slots__ if name in jobs.c}
    if beat is None:
        return JobReport(**stored, progress=None, worker=None)
    return JobReport(**stored | {"state": JobState.RUNNING}, progress=beat.progress, worker=beat.worker)
