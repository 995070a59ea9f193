"""Jobs that come near: a wave that is due in the same second, of which one look at the ledger reads a part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from arq.worker import func
from sqlalchemy import text

from coord import Job, task_options
from coord.queue.message import Message
from coord.worker.maintenance import scheduler as scheduling
from coord.worker.maintenance.rows import QueuedJobs
from coord.worker.state import WorkerState
from tests.serving import eventually
from tests.workers import KEYS, Office, fresh, working

if TYPE_CHECKING:
    from collections.abc import Sequence

WAVE = """
    INSERT INTO coord_jobs (id, task, queue, arguments, scheduled_at, priority)
    SELECT gen_random_uuid(), 'task', 'default', '[[],{}]', now() + interval '12 s', n % 3
    FROM generate_series(1, :jobs) AS n
"""
JOBS = 100


class FewAtOnce(QueuedJobs):
    async def ids(self, *conditions: Any, limit: int = 16, after: Any = None) -> Sequence[Any]:
        return await super().ids(*conditions, limit=limit, after=after)


@pytest.mark.slow
async def test_a_wave_is_taken_up_over_many_looks_and_each_job_runs_once(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the same microsecond, so that only their ids tell where a look has ended."""
    monkeypatch.setattr(scheduling, "QueuedJobs", FewAtOnce)
    monkeypatch.setattr(scheduling, "MOVED", 16)
    ran: list[str] = []

    async def task(ctx: dict[str, Any]) -> None:
        ran.append(ctx["job_id"])

    async with working(office, [func(task, name="task")]):
        await eventually(lambda: count(office, "SELECT count(*) FROM coord_queues WHERE leader IS NOT NULL"))
        async with office.session_maker.begin() as session:
            await session.execute(text(WAVE), {"jobs": JOBS})
        await eventually(lambda: is_full(office), within=11)
        assert ran == []
        await eventually(lambda: len(ran) >= JOBS, within=30)
        await office.waiting(0)
        assert await count(office, "SELECT count(*) FROM coord_jobs WHERE state = 'done'") == JOBS
        assert await count(office, "SELECT count(*) FROM coord_jobs WHERE started_at < scheduled_at") == 0
    assert len(ran) == len(set(ran)) == JOBS


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [4, 4 - 3600], ids=["before the worker knows", "when it knows"])
async def test_no_job_begins_before_its_time_when_the_clock_of_redis_is_set_forward(office: Office, ahead: int) -> None:
    """By an hour: what has waited there goes into the feed at once, and seems to be due soon, or an hour ago."""

    async def task(ctx: dict[str, Any]) -> None: ...

    async with working(office, [func(task, name="task")]):
        job = await office.enqueue(task_options("task", delay=4))
        await eventually(lambda: office.redis.delete(KEYS.soon))
        await office.put(Message.of(job).text(), fresh() + 1000 * ahead)
        row = await office.final(job, within=4 + 5 + 1)
    assert row.started_at >= row.scheduled_at


async def test_a_job_that_has_run_while_the_ledger_was_looked_at_is_not_handed_over_again(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL's now() is that of the transaction, a little before what its statement sees."""
    ran: list[str] = []
    jobs: list[Job] = []
    hand_over = WorkerState.hand_over

    async def task(ctx: dict[str, Any]) -> None:
        ran.append(ctx["job_id"])

    class OneIsMade(QueuedJobs):
        async def ids(self, *conditions: Any, limit: int = 16, after: Any = None) -> Sequence[Any]:
            if not jobs:
                jobs.append(await office.enqueue(task_options("task", delay=0.5)))
            return await super().ids(*conditions, limit=limit, after=after)

    async def late(self: WorkerState, rows: Any, **options: Any) -> None:
        if "least" in options:
            await office.final(jobs[0])
        await hand_over(self, rows, **options)

    monkeypatch.setattr(scheduling, "QueuedJobs", OneIsMade)
    monkeypatch.setattr(WorkerState, "hand_over", late)
    tasks = [func(task, name="task")]
    async with working(office, tasks), working(office, tasks):  # of which one moves what is due meanwhile
        await eventually(lambda: jobs)
        await office.final(jobs[0])
        await office.final(await office.enqueue(task_options("task", delay=1.5)))
    assert ran.count(str(jobs[0].id)) == 1


async def is_full(office: Office) -> bool:
    return int(await office.redis.zcard(KEYS.soon)) == JOBS


async def count(office: Office, statement: str) -> int:
    async with office.session_maker() as session:
        return int(await session.scalar(text(statement)) or 0)
