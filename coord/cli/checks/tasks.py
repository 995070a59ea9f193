"""Jobs that workers put off again and again: nobody knows their task, or their arguments do not fit."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy import func, select, true

from coord.cli.checks.finding import Finding, Setup
from coord.jobs.model import is_in_feed, jobs, queues, workers
from coord.jobs.queries import HEARTBEAT_EXPIRY_SECONDS
from coord.worker.executor import NOT_KNOWN, NOT_TAKEN
from coord.worker.finalizer import UNKNOWN_PAUSE_SECONDS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MAX_READ_JOBS = 50_000
"""Of each queue: the last of those that are due within the longest pause, however many are due already, or later."""
_now = func.statement_timestamp()
_served = select(queues.c.name).union(select(workers.c.queue)).subquery()
_near = (
    select(jobs.c.queue, jobs.c.task, jobs.c.error, jobs.c.unknown_seconds, jobs.c.scheduled_at)
    .where(is_in_feed, jobs.c.queue == _served.c.name)
    .where(jobs.c.scheduled_at <= _now + timedelta(seconds=UNKNOWN_PAUSE_SECONDS[1]))
    .order_by(jobs.c.scheduled_at.desc())
    .limit(MAX_READ_JOBS)
    .lateral()
)
_is_unknown = _near.c.error.contains(NOT_KNOWN, autoescape=True) & (_near.c.scheduled_at > _now)
"""One that is due is found by `fleet.known`."""
_is_refused = _near.c.error.contains(NOT_TAKEN, autoescape=True)
_waiting = (
    select(
        _near.c.queue,
        _near.c.task,
        _is_refused.label("is_refused"),
        func.count().label("number"),
        func.max(_near.c.error).label("error"),
    )
    .select_from(_served.join(_near, true()))
    .where(_near.c.unknown_seconds > 0, _is_unknown | _is_refused)
    .group_by(_near.c.queue, _near.c.task, _is_refused)
    .order_by(_near.c.queue, _near.c.task)
)
_living = select(workers.c.queue, workers.c.tasks).where(
    workers.c.beat_at > func.clock_timestamp() - timedelta(seconds=HEARTBEAT_EXPIRY_SECONDS)
)


async def put_off(setup: Setup) -> AsyncIterator[Finding]:
    """Which tasks have queued jobs that go back each time they are taken, and are hardly ever due."""
    async with setup.engine.connect() as connection:
        rows = (await connection.execute(_waiting)).all()
        fleet = (await connection.execute(_living)).all()
    for row in rows:
        jobs_of = f"{row.number} jobs of {row.task} in the queue {row.queue} are put off again and again"
        if row.is_refused:
            do = f"deploy a worker whose {row.task} takes them, or coord jobs cancel, and enqueue with what it takes"
            yield Finding("tasks", f"{jobs_of}: {row.error}", do)
        elif not any(row.task in each.tasks for each in fleet if each.queue == row.queue):
            what = f"{jobs_of}, since no worker of it knows the task"
            yield Finding("tasks", what, "deploy a worker that has it, or coord jobs cancel")
