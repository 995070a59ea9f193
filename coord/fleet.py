"""The queues and the workers, for whoever looks at them: what is due, and what runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Float, cast, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from coord.jobs.model import execute, is_in_feed, is_queued, jobs, queues, workers
from coord.jobs.queries import heartbeats

MAX_EXACT_JOBS = 50_000
"""More of a kind are estimated."""


@dataclass(frozen=True, slots=True)
class Number:
    value: int
    exact: bool = True

    def __add__(self, other: Number) -> Number:
        return Number(self.value + other.value, self.exact and other.exact)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueDepth:
    name: str
    due: Number
    """Those that run are not among them. Not exact, there are at least so many."""
    later: Number
    oldest: float | None
    """Seconds since the oldest was due that nobody runs."""
    paused_at: datetime | None
    workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningJob:
    id: UUID
    task: str | None
    """None once the ledger does not have it any more."""
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LivingWorker:
    id: UUID
    queue: str
    host: str
    pid: int
    started_at: datetime
    heartbeat: float
    """Seconds since the last one."""
    state: str
    runs: Sequence[RunningJob]
    tasks: Sequence[str]


@dataclass(frozen=True, slots=True)
class Fleet:
    queues: Sequence[QueueDepth]
    workers: Sequence[LivingWorker]


async def look_at_fleet(session: AsyncSession) -> Fleet:
    """Joins the session's transaction, and only reads; of unfinished jobs it counts 50,000."""
    living = await living_workers(session)
    return Fleet(await queue_depths(session, living, most=MAX_EXACT_JOBS), living)


async def queue_depths(
    session: AsyncSession, living: Sequence[LivingWorker], *, most: int | None = None
) -> Sequence[QueueDepth]:
    """Of all unfinished jobs, or of so many at most."""
    now = func.clock_timestamp()
    beats = [beat.id for beat in await heartbeats(session)]
    waits = (is_queued, jobs.c.id.not_in(beats))
    some = select(jobs.c.queue, jobs.c.scheduled_at).where(*waits).limit(most and most + 1).subquery()
    due = func.count().filter(some.c.scheduled_at <= now)
    depths = select(some.c.queue, due, func.count()).group_by(some.c.queue)
    rows: Sequence[Any] = (await session.run_sync(execute, depths)).all()
    counted = {name: (number, every - number) for name, number, every in rows}
    exact = most is None or sum(row[2] for row in rows) <= most
    paused = {row.name: row.paused_at for row in await session.run_sync(execute, select(queues))}
    found = []
    for name in sorted({*paused, *counted, *(worker.queue for worker in living)}):
        # By the index on what is due, which has its first entry: cheap however many there are.
        first = select(func.min(jobs.c.scheduled_at)).where(is_in_feed, jobs.c.queue == name, jobs.c.id.not_in(beats))
        age = cast(func.extract("epoch", now - first.scalar_subquery()), Float)
        seconds = (await session.run_sync(execute, select(age))).scalar()
        ready, later = counted.get(name, (0, 0))
        found.append(
            QueueDepth(
                name=name,
                due=Number(ready, exact),
                later=Number(later, exact),
                oldest=seconds if seconds is not None and seconds > 0 else None,
                paused_at=paused.get(name),
                workers=sum(worker.queue == name for worker in living),
            )
        )
    return found


async def living_workers(session: AsyncSession) -> Sequence[LivingWorker]:
    """Those that have a heartbeat, the oldest first."""
    since = cast(func.extract("epoch", func.clock_timestamp() - workers.c.beat_at), Float).label("heartbeat")
    leads = (queues.c.leader == workers.c.id).label("leads")
    both = workers.outerjoin(queues, queues.c.name == workers.c.queue)
    statement = select(workers, since, leads).select_from(both).order_by(workers.c.started_at)
    rows = (await session.run_sync(execute, statement)).all()
    ids = [job_id for row in rows for job_id in row.jobs]
    named = select(jobs.c.id, jobs.c.task).where(jobs.c.id.in_(ids))
    tasks = {str(row.id): row.task for row in await session.run_sync(execute, named)} if ids else {}
    return [
        LivingWorker(
            id=row.id,
            queue=row.queue,
            host=row.host,
            pid=row.pid,
            started_at=row.started_at,
            heartbeat=row.heartbeat,
            state="dead" if row.dead else "stopping" if row.stopping else "leads" if row.leads else "works",
            runs=[RunningJob(id=id_, task=tasks.get(id_), attempt=run["attempt"]) for id_, run in row.jobs.items()],
            tasks=sorted(row.tasks),
        )
        for row in rows
    ]
