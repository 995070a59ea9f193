"""Cancelling and retrying jobs by what they are, some at a time, so that nobody waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, Text, bindparam, cast, exists, func, literal, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from coord.cancellation import interruptible
from coord.database.engine import AnySession, session_of
from coord.durations import Seconds, whole
from coord.jobs.model import JobState, jobs
from coord.jobs.options import checked_text, span
from coord.jobs.queries import MAX_LISTED_JOBS, RETRYABLE_STATES, cancel_some, free_of, heartbeats, in_state, run_again

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
    whole("limit", limit, most=MAX_LISTED_JOBS)
    conditions = conditions_of(task, queue, older_than, newer_than)
    if wanted is not None:
        conditions += in_state(wanted, await heartbeats(session))
    return sum(await interruptible(session_of(session).run_sync(cancel_some, conditions, limit)))


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
    whole("limit", limit, most=MAX_LISTED_JOBS)
    conditions = conditions_of(task, queue, older_than, newer_than)
    # Written out, as in is_queued: there is an index for what has failed.
    conditions.append(jobs.c.state.in_(bindparam(None, states, expanding=True, literal_execute=True)))
    return await interruptible(session_of(session).run_sync(_retry, conditions, limit))


def conditions_of(
    task: str | None, queue: str | None, older_than: Seconds | None, newer_than: Seconds | None
) -> list[ColumnElement[bool]]:
    """Which jobs these filters mean; the two spans are seconds since they were enqueued."""
    found: list[ColumnElement[bool]] = []
    if task is not None:
        found.append(jobs.c.task == checked_text("task", task))
    if queue is not None:
        found.append(jobs.c.queue == checked_text("queue", queue))
    if older_than is not None:
        found.append(jobs.c.created_at < _ago("older_than", older_than))
    if newer_than is not None:
        found.append(jobs.c.created_at > _ago("newer_than", newer_than))
    return found


def _ago(name: str, value: Seconds) -> Any:
    return func.now() - literal(timedelta(seconds=span(name, value)))


def _retry(session: Session, conditions: Sequence[ColumnElement[bool]], limit: int) -> int:
    other = jobs.alias("other")
    same_key = (other.c.task == jobs.c.task) & (other.c.unique_key == jobs.c.unique_key)
    taken = exists().where(same_key, other.c.state == JobState.QUEUED)
    key = func.coalesce(jobs.c.unique_key, cast(jobs.c.id, Text))
    place = func.row_number().over(partition_by=(jobs.c.task, key), order_by=jobs.c.id.desc()).label("place")
    ranked = select(jobs.c.id, place).where(*conditions, ~taken).subquery()
    newest = select(ranked.c.id).where(ranked.c.place == 1)
    free = free_of(select(jobs.c.id).where(*conditions, jobs.c.id.in_(newest)).order_by(jobs.c.id).limit(limit))
    for _ in range(MAX_CONFLICTS - 1):
        with suppress(IntegrityError):
            return len(run_again(session, jobs.c.id.in_(free)))
    return len(run_again(session, jobs.c.id.in_(free)))
