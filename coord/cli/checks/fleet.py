"""Queues and workers: does somebody run what is due, and is it handed over when it should be."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import exists, func, select

from coord.cli.checks.finding import Finding, Setup
from coord.jobs.model import JobState, is_queued, jobs, queues, workers
from coord.jobs.queries import HEARTBEAT_EXPIRY_SECONDS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

APART_SECONDS = 2.0
LATE_SECONDS = 0.9
LOOKED_AT = 200
"""Jobs, of the last hour, and among the newest."""
NEWEST = 2_000
"""Of which those are looked for: a ledger may have millions, and none of them from the last hour."""
FEWEST = 3
"""From which on something can be said."""
_now = func.clock_timestamp()


async def known(setup: Setup) -> AsyncIterator[Finding]:
    """Whether each task that is due has a living worker of its queue that knows it."""
    living = workers.c.beat_at > _now - timedelta(seconds=HEARTBEAT_EXPIRY_SECONDS)
    due = is_queued & (jobs.c.scheduled_at <= _now)
    waiting = select(jobs.c.queue, jobs.c.task, func.count().label("number")).where(due)
    async with setup.engine.connect() as connection:
        fleet = (await connection.execute(select(workers.c.queue, workers.c.tasks).where(living))).all()
        rows = (await connection.execute(waiting.group_by(jobs.c.queue, jobs.c.task))).all()
        paused = (await connection.execute(select(queues).where(queues.c.paused_at.is_not(None)))).all()
    for row in paused:
        yield Finding(
            "paused", f"the queue {row.name} is paused since {row.paused_at}", f"coord queues resume {row.name}"
        )
    served = {row.queue for row in fleet}
    for name in sorted({row.queue for row in rows} - served):
        number = sum(row.number for row in rows if row.queue == name)
        yield Finding("workers", f"{number} jobs of the queue {name} are due, and no worker of it lives", "start one")
    for row in rows:
        if row.queue in served and not any(row.task in each.tasks for each in fleet if each.queue == row.queue):
            what = f"{row.number} jobs of {row.task} are due, and no worker of the queue {row.queue} knows the task"
            yield Finding("tasks", what, "deploy a worker that has it, or coord jobs cancel")


async def handed_over(setup: Setup) -> AsyncIterator[Finding]:
    """A process without a Coordinator leaves its jobs to the reconciler, which takes seconds."""
    newest = select(jobs).order_by(jobs.c.id.desc()).limit(NEWEST).subquery()
    began = func.coalesce(newest.c.started_at, newest.c.finished_at)
    late = func.extract("epoch", began - newest.c.scheduled_at).label("late")
    at_once = newest.c.scheduled_at - newest.c.created_at < timedelta(seconds=1)
    ended = (
        newest.c.state == JobState.DONE,
        newest.c.attempt == 1,
        newest.c.finished_at > _now - timedelta(hours=1),
        at_once,
    )
    last = select(late).where(*ended).order_by(newest.c.id.desc()).limit(LOOKED_AT).subquery()
    figures = select(func.count(), func.percentile_cont(0.5).within_group(last.c.late.asc()))
    due = is_queued & (jobs.c.scheduled_at <= _now)
    async with setup.engine.connect() as connection:
        number, median = (await connection.execute(figures)).one()
        has_backlog = await connection.scalar(select(exists().where(due)))
    if number >= FEWEST and median > LATE_SECONDS and not has_backlog:
        what = f"half of the last {number} jobs began {median:.1f} s or more after they were due, and nothing waits"
        do = "open a Coordinator with redis= in every process that enqueues; or there are too few workers"
        yield Finding("coordinator", what, do)


async def clocks(setup: Setup) -> AsyncIterator[Finding]:
    """Only PostgreSQL's decides; the others are in logs, started_at and what Redis keeps for later."""
    async with setup.engine.connect() as connection:
        asked = time.time()
        server: Any = await connection.scalar(select(func.extract("epoch", _now)))
        own = (asked + time.time()) / 2
    if abs(float(server) - own) > APART_SECONDS:
        what = f"PostgreSQL's clock and this machine's are {abs(float(server) - own):.0f} s apart"
        yield Finding("clocks", what, "synchronise them (chrony, systemd-timesyncd)")
    if setup.redis is None:
        return
    asked = time.time()
    seconds, micro = await setup.redis.time()
    apart = abs(seconds + micro / 1e6 - (asked + time.time()) / 2)
    if apart > APART_SECONDS:
        yield Finding("clocks", f"Redis' clock and this machine's are {apart:.0f} s apart", "synchronise them")
