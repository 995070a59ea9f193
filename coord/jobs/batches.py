"""Cancelling and retrying jobs by what they are, some at a time, so that nobody waits for it."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import Text, bindparam, cast, exists, func, insert, inspect, literal, select, tuple_, update
from sqlalchemy.exc import IntegrityError

from coord.cancellation import interruptible
from coord.database.engine import session_of
from coord.durations import seconds
from coord.jobs.model import (
    Cancellation,
    Job,
    JobState,
    cancellations,
    execute,
    is_queued,
    job_mapper,
    jobs,
    ledger_connection,
)
from coord.jobs.queries import AGAIN, MAX_LISTED_JOBS, RETRYABLE_STATES, heartbeats
from coord.notify.changes import collect

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import ColumnElement, Select
    from sqlalchemy.orm import Session

    from coord.database.engine import AnySession
    from coord.durations import Seconds

    Conditions = Sequence[ColumnElement[bool]]

MAX_CONFLICTS = 5
"""With jobs that are enqueued meanwhile under the unique keys of those that are to run again."""


async def cancel_jobs(
    session: AnySession,
    *,
    state: JobState | str | None = None,
    task: str | None = None,
    queue: str | None = None,
    older_than: Seconds | None = None,
    newer_than: Seconds | None = None,
    limit: int = MAX_LISTED_JOBS,
) -> int:
    """Cancel up to `limit` unfinished jobs, the eldest first, as `cancel_job` does each; how many there were.

    `state` is "queued", "running", or None for both; `older_than` and `newer_than` are seconds since they were
    enqueued. Joins the session's transaction and locks what it cancels until the caller commits, so call it until there
    are no more:

        while await cancel_jobs(session, task="send_letter"):
            await session.commit()

    Of a running job its worker is told, once; it counts as cancelled here.
    """
    wanted = None if state is None else JobState(state)
    if wanted is not None and wanted.is_final:
        raise ValueError(f"only what is queued or running can be cancelled, and not what is {wanted}")
    _check(limit)
    conditions = conditions_of(task, queue, older_than, newer_than)
    if wanted is not None:
        beats = await heartbeats(session)
        held = tuple_(jobs.c.id, jobs.c.attempt).in_([(beat.id, beat.attempt) for beat in beats])
        conditions.append(held if wanted is JobState.RUNNING else ~held)
    return await interruptible(session_of(session).run_sync(_cancel, conditions, limit))


async def retry_jobs(
    session: AnySession,
    *,
    state: JobState | str | None = None,
    task: str | None = None,
    queue: str | None = None,
    older_than: Seconds | None = None,
    newer_than: Seconds | None = None,
    limit: int = MAX_LISTED_JOBS,
) -> int:
    """Run up to `limit` failed or cancelled jobs again, the eldest first, as `retry_job` does each; how many.

    `state` is "failed", "cancelled", or None for both; the rest is as for `cancel_jobs`, also that it is called until
    there are no more. A job is left out while another one is unfinished under its unique key; of several with one key
    the newest runs.

        while await retry_jobs(session, state="failed", newer_than=3600):
            await session.commit()
    """
    states = RETRYABLE_STATES if state is None else (JobState(state),)
    if not {*states} <= {*RETRYABLE_STATES}:
        raise ValueError(f"only what has failed or was cancelled can be run again, and not what is {states[0]}")
    _check(limit)
    conditions = conditions_of(task, queue, older_than, newer_than)
    # Written out, as in is_queued: there is an index for what has failed.
    conditions.append(jobs.c.state.in_(bindparam(None, states, expanding=True, literal_execute=True)))
    return await interruptible(session_of(session).run_sync(_retry, conditions, limit))


def _check(limit: int) -> None:
    if not isinstance(limit, int) or not 1 <= limit <= MAX_LISTED_JOBS:
        raise ValueError(f"limit is a whole number, 1 to {MAX_LISTED_JOBS}, not {limit!r}")


def conditions_of(
    task: str | None, queue: str | None, older_than: Seconds | None, newer_than: Seconds | None
) -> list[ColumnElement[bool]]:
    """Which jobs these filters mean; the two spans are seconds since they were enqueued."""
    found: list[ColumnElement[bool]] = []
    if task is not None:
        found.append(jobs.c.task == task)
    if queue is not None:
        found.append(jobs.c.queue == queue)
    if older_than is not None:
        found.append(jobs.c.created_at < _ago("older_than", older_than))
    if newer_than is not None:
        found.append(jobs.c.created_at > _ago("newer_than", newer_than))
    return found


def _ago(name: str, span: Seconds) -> Any:
    return func.now() - literal(timedelta(seconds=seconds(name, span)))


def _cancel(session: Session, conditions: Conditions, limit: int) -> int:
    free = _free(select(jobs.c.id).where(is_queued, *conditions).order_by(jobs.c.id).limit(limit))
    values = {"state": JobState.CANCELLED, "finished_at": func.now()}
    ended = execute(session, update(jobs).where(jobs.c.id.in_(free)).values(values).returning(jobs)).mappings().all()
    for row in ended:
        collect(session, (job_mapper, (row["id"],)), Job(**row))
    # What is unfinished still is locked: it runs, and its worker ends it.
    wished = exists().where(cancellations.c.job_id == jobs.c.id)
    running = select(jobs.c.id).where(is_queued, *conditions, ~wished).limit(limit - len(ended))
    wish = insert(cancellations).from_select(["job_id"], running)
    wishes = execute(session, wish).rowcount if len(ended) < limit else 0
    collect(session, (inspect(Cancellation), None), beside=job_mapper)
    return len(ended) + wishes


def _retry(session: Session, conditions: Conditions, limit: int) -> int:
    other = jobs.alias("other")
    same_key = (other.c.task == jobs.c.task) & (other.c.unique_key == jobs.c.unique_key)
    taken = exists().where(same_key, other.c.state == JobState.QUEUED)
    key = func.coalesce(jobs.c.unique_key, cast(jobs.c.id, Text))
    place = func.row_number().over(partition_by=(jobs.c.task, key), order_by=jobs.c.id.desc()).label("place")
    ranked = select(jobs.c.id, place).where(*conditions, ~taken).subquery()
    newest = select(ranked.c.id).where(ranked.c.place == 1)
    free = _free(select(jobs.c.id).where(*conditions, jobs.c.id.in_(newest)).order_by(jobs.c.id).limit(limit))
    again = update(jobs).where(jobs.c.id.in_(free)).values(AGAIN).returning(jobs)
    for left in reversed(range(MAX_CONFLICTS)):
        try:
            with ledger_connection(session).begin_nested():
                rows = execute(session, again).mappings().all()
            break
        except IntegrityError:
            if not left:
                raise
    execute(session, cancellations.delete().where(cancellations.c.job_id.in_([row["id"] for row in rows])))
    for row in rows:
        collect(session, (job_mapper, (row["id"],)), Job(**row))
    return len(rows)


def _free(found: Select[Any]) -> Select[Any]:
    """Locked, without what others have locked; read once (or the plan may have the limit begin anew with each row)."""
    return select(found.with_for_update(skip_locked=True, of=jobs).cte("found").c.id)
