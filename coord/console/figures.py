"""How many jobs there are, by state and task, and what the last hour was like: exact where that is cheap."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import Float, Integer, cast, func, literal_column, select, tuple_

from coord.fleet import MAX_EXACT_JOBS, Number
from coord.jobs.model import JobState, execute, is_queued, jobs
from coord.jobs.queries import heartbeats, held_by

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import ColumnElement, TableSample
    from sqlalchemy.ext.asyncio import AsyncSession

SAMPLE_PAGES = 2_000
"""Of the table, 8 KiB each, that an estimate reads at most."""
SAMPLE_SEED = 7
"""The same pages each time, so that an estimate changes with the ledger alone."""
MINUTES = 60

is_failed = jobs.c.state == literal_column("'failed'")
"""Written out, as `is_queued` is: there is an index for it."""


@dataclass(frozen=True, slots=True)
class TaskCounts:
    task: str
    by_state: Mapping[JobState, Number]


@dataclass(frozen=True, slots=True)
class Counts:
    """Jobs by task and state."""

    tasks: Sequence[TaskCounts]
    by_state: Mapping[JobState, Number]


@dataclass(frozen=True, slots=True)
class TaskHour:
    """What finished of a task in the last hour; None of what there is nothing to tell of."""

    task: str | None
    """None is all of them."""
    done: int
    failed: int
    cancelled: int
    queue: Sequence[float] | None
    """Seconds from when a job was due until the attempt that ended it began: median, 95 and 99 of a hundred."""


@dataclass(frozen=True, slots=True)
class Hour:
    all: TaskHour
    tasks: Sequence[TaskHour]
    minutes: Sequence[tuple[int, int]]
    """Of each minute, the eldest first: how many were done, and how many failed."""


Kinds = Counter[tuple[str, JobState]]


async def count_jobs(session: AsyncSession) -> Counts:
    """By state and task. A kind of more than 50,000 is estimated, from a sample of the table's pages."""
    held = held_by(await heartbeats(session))
    running, queued = is_queued & held, is_queued & ~held
    found, whole = await _first(session)
    exact = dict.fromkeys(JobState, whole)
    if not whole:
        found = await _sampled(session)
    for state, condition in ((JobState.QUEUED, queued), (JobState.RUNNING, running), (JobState.FAILED, is_failed)):
        own, exact[state] = await _first(session, condition)
        if exact[state]:  # by an index, so that of a few in a million none is missed
            found = Counter({kind: number for kind, number in found.items() if kind[1] is not state})
            found.update({(task, state): number for (task, _), number in own.items()})
    by_task: dict[str, dict[JobState, Number]] = {}
    for (task, which), number in found.items():
        by_task.setdefault(task, {})[which] = Number(number, exact[which])
    totals = {
        which: sum((row[which] for row in by_task.values() if which in row), Number(0, exact[which]))
        for which in JobState
    }
    return Counts([TaskCounts(task, by_task[task]) for task in sorted(by_task)], totals)


async def _first(session: AsyncSession, condition: ColumnElement[bool] | None = None) -> tuple[Kinds, bool]:
    """Of up to 50,000; and whether those are all."""
    read = select(jobs.c.task, jobs.c.state).limit(MAX_EXACT_JOBS + 1)
    some = (read if condition is None else read.where(condition)).subquery()
    kinds = select(some.c.task, some.c.state, func.count()).group_by(some.c.task, some.c.state)
    found = _counted((await session.run_sync(execute, kinds)).all())
    return found, found.total() <= MAX_EXACT_JOBS


async def _sampled(session: AsyncSession) -> Kinds:
    percent = await sample_percent(session)
    some = sample_of(percent)
    kinds = select(some.c.task, some.c.state, func.count()).group_by(some.c.task, some.c.state)
    rows = (await session.run_sync(execute, kinds)).all()
    return Counter({kind: round(number * 100 / percent) for kind, number in _counted(rows).items()})


def sample_of(percent: float) -> TableSample:
    return jobs.tablesample(func.system(percent), name="sample", seed=cast(SAMPLE_SEED, Integer))


async def sample_percent(session: AsyncSession) -> float:
    """How much of the table an estimate may read; by its size now, since statistics may be old."""
    table: ColumnElement[int] = literal_column(f"{jobs.name}.tableoid")
    pages = func.pg_relation_size(table) / cast(func.current_setting("block_size"), Integer)
    found = (await session.run_sync(execute, select(pages).select_from(jobs).limit(1))).scalar()
    return min(100.0, 100.0 * SAMPLE_PAGES / max(1, int(found or 0)))


def _counted(rows: Sequence[Any]) -> Kinds:
    return Counter({(task, JobState(state)): number for task, state, number in rows})


async def last_hour(session: AsyncSession) -> Hour:
    """What finished in the last 60 minutes; one scan of the table, not to be repeated often."""
    now = func.clock_timestamp()
    due = func.greatest(jobs.c.scheduled_at, jobs.c.created_at)
    queued = func.greatest(0, func.extract("epoch", jobs.c.started_at - due))
    ago = cast(func.floor(func.extract("epoch", now - jobs.c.finished_at) / 60), Integer)
    recent = (
        select(jobs.c.task, jobs.c.state, cast(queued, Float).label("queued"), ago.label("ago"))
        .where(~is_queued, jobs.c.finished_at > now - timedelta(minutes=MINUTES))
        .cte("recent")
        .prefix_with("MATERIALIZED", dialect="postgresql")
    )
    columns = [
        func.count().filter(recent.c.state == state) for state in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)
    ]
    shares: ColumnElement[list[float]] = literal_column("ARRAY[0.5, 0.95, 0.99]::float8[]")
    queue = func.percentile_cont(shares).within_group(recent.c.queued.asc())
    rows = select(recent.c.task, recent.c.ago, *columns, queue).group_by(
        func.grouping_sets(tuple_(), tuple_(recent.c.task), tuple_(recent.c.ago))
    )
    every: TaskHour | None = None
    tasks, minutes = [], [(0, 0)] * MINUTES
    found: Sequence[Any] = (await session.run_sync(execute, rows)).all()
    for task, minute, done, failed, cancelled, waited in found:
        if minute is not None:
            minutes[MINUTES - 1 - min(MINUTES - 1, max(0, minute))] = (done, failed)
        elif task is not None:
            tasks.append(TaskHour(task, done, failed, cancelled, waited))
        else:
            every = TaskHour(None, done, failed, cancelled, waited)
    return Hour(every or TaskHour(None, 0, 0, 0, None), sorted(tasks, key=lambda each: each.task or ""), minutes)
