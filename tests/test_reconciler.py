"""What the reconciler makes of each difference between the ledger and what Redis and the heartbeats say."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from sqlalchemy import insert, select, text, update

import coord.worker.maintenance.reconciler
from coord import task_options
from coord.jobs.model import jobs, workers
from coord.queue.keys import soon_member, taken_member
from coord.queue.message import Message
from coord.worker.maintenance.reconciler import Reconciler
from coord.worker.maintenance.rows import MAX_ROWS, PAGE, QueuedJobs
from coord.worker.state import WorkerState
from tests.ledger import a_task, executed
from tests.workers import KEYS, a_state, fresh

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from coord import Job
    from tests.workers import Office

MISSING = 0.2


class Looks:
    """A reconciler that leads, one look at a time."""

    def __init__(self, office: Office, engine: AsyncEngine) -> None:
        self.office = office
        self.engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self.forgotten = 0
        self.state = a_state(engine, office.redis)
        self.state.leads_until = float("inf")
        self.reconciler = Reconciler(self.state, self._forget)

    def _forget(self) -> None:
        self.forgotten += 1

    async def __call__(self, times: int = 1) -> None:
        for _ in range(times):
            await self.reconciler.round()
            await asyncio.sleep(MISSING + 0.05)  # time is what it goes by

    async def waiting(self) -> list[str]:
        """The ids of the jobs in the feed, as they would be taken."""
        return [str(Message.read(text).id) for text in await self.office.redis.zrange(KEYS.feed, 0, -1)]

    async def aged(self, job: Job, seconds: float = 5.0) -> Job:
        """As one that has been due for so long."""
        async with self.engine.connect() as connection:
            due = jobs.c.scheduled_at - text(f"interval '{seconds} seconds'")
            await connection.execute(update(jobs).where(jobs.c.id == job.id).values(scheduled_at=due))
        return job


@pytest.fixture
def looks(office: Office, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> Looks:
    monkeypatch.setattr(coord.worker.maintenance.reconciler, "MISSING_SECONDS", MISSING)
    monkeypatch.setattr(coord.worker.maintenance.reconciler, "LOOK_SECONDS", 30.0)
    return Looks(office, engine)


async def test_what_is_nowhere_in_two_looks_is_handed_over(looks: Looks, script: Office) -> None:
    job = await looks.aged(await script.enqueue(a_task))
    await looks()
    assert await looks.waiting() == []
    await looks()
    assert await looks.waiting() == [str(job.id)]
    await looks(3)
    assert await looks.waiting() == [str(job.id)]


async def test_what_has_just_become_due_is_left_a_while(
    looks: Looks, script: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is on its way, from the commit or from a worker."""
    await looks()
    with monkeypatch.context() as longer:
        longer.setattr(coord.worker.maintenance.reconciler, "RECENT_SECONDS", (60.0, 120.0))
        job = await script.enqueue(a_task)
        await looks(2)
        assert await looks.waiting() == []
    await looks.aged(job, 2)
    await looks(2)
    assert await looks.waiting() == [str(job.id)]


@pytest.mark.parametrize("place", ["feed", "soon", "taken", "heartbeat"])
async def test_what_is_somewhere_is_left_there(looks: Looks, script: Office, place: str) -> None:
    job = await looks.aged(await script.enqueue(a_task))
    message = Message.of(job).text()
    match place:
        case "feed":
            await looks.office.put(message, fresh())
        case "soon":
            await looks.office.redis.zadd(KEYS.soon, {soon_member(message, 0): time.time() * 1000 + 5000})
        case "taken":
            await looks.office.redis.zadd(KEYS.taken, {taken_member(job.id, 1): time.time() * 1000})
        case "heartbeat":
            row = {"id": uuid4(), "queue": "default", "host": "here", "pid": 1, "jobs": {str(job.id): {"attempt": 1}}}
            async with looks.engine.connect() as connection:
                await connection.execute(insert(workers), row)
    await looks(3)
    assert await looks.waiting() == ([str(job.id)] if place == "feed" else [])


@pytest.mark.parametrize("place", ["soon", "taken"])
@pytest.mark.parametrize("ahead", [600.0, float("inf")], ids=["ten minutes", "for ever"])
async def test_what_is_due_does_not_wait_for_a_clock_that_was_set_back(
    looks: Looks, script: Office, place: str, ahead: float
) -> None:
    """As by a failover of Redis: what it was told before lies ahead of its time."""
    job = await looks.aged(await script.enqueue(a_task))
    near = place == "soon"
    member = soon_member(Message.of(job).text(), 0) if near else taken_member(job.id, 1)
    await looks.office.redis.zadd(KEYS.soon if near else KEYS.taken, {member: (time.time() + ahead) * 1000})
    await looks(3)
    assert await looks.waiting() == [str(job.id)]


async def test_another_attempt_is_missing_although_the_last_one_is_named(looks: Looks, script: Office) -> None:
    job = await looks.aged(await script.enqueue(a_task))
    async with looks.engine.connect() as connection:
        await connection.execute(update(jobs).values(attempt=2))
        row = {"id": uuid4(), "queue": "default", "host": "here", "pid": 1, "jobs": {str(job.id): {"attempt": 1}}}
        await connection.execute(insert(workers), row)
    await looks(2)
    assert await looks.waiting() == [str(job.id)]


async def test_a_pop_counts_for_some_seconds_only(looks: Looks, script: Office) -> None:
    job = await looks.aged(await script.enqueue(a_task))
    await looks.office.redis.zadd(KEYS.taken, {taken_member(job.id, 1): time.time() * 1000 - 7000})
    await looks(2)
    assert await looks.waiting() == [str(job.id)]


async def test_who_does_not_lead_looks_at_nothing(looks: Looks, script: Office) -> None:
    await looks.aged(await script.enqueue(a_task))
    looks.state.leads_until = 0.0
    await looks(3)
    assert await looks.waiting() == []


@pytest.mark.parametrize("loss", ["emptied", "an old file", "only the epoch"])
async def test_a_redis_that_has_forgotten_is_noticed(looks: Looks, loss: str) -> None:
    """By what it does not remember having been told; whoever hands over what comes near begins anew."""
    await looks(3)
    assert looks.forgotten == 1, "who begins to look knows nothing"
    match loss:
        case "emptied":
            await looks.office.redis.flushall()
        case "an old file":
            await looks.office.redis.set(KEYS.epoch, 1)
        case "only the epoch":
            await looks.office.redis.delete(KEYS.epoch)
    await looks(2)
    assert looks.forgotten == 2


async def test_a_redis_that_is_full_has_forgotten_nothing(looks: Looks) -> None:
    """It refuses to count on, and still knows how far it has come."""
    redis = looks.office.redis
    await looks(2)
    await redis.config_set("maxmemory", "1")
    try:
        await looks(3)
        assert looks.forgotten == 1
        await redis.delete(KEYS.epoch)
        await looks(3)
    finally:
        await redis.config_set("maxmemory", "0")
    await looks(2)
    assert looks.forgotten == 2


async def test_everything_due_is_found_when_redis_was_emptied(looks: Looks, script: Office) -> None:
    """Behind what is in the feed as well."""
    async with script.session_maker.begin() as session:
        from coord import enqueue

        made = [await enqueue(session, task_options(a_task, priority=n % 3)) for n in range(1_500)]
        later = await enqueue(session, task_options(a_task, delay=90))
    async with looks.engine.connect() as connection:
        await connection.execute(update(jobs).values(scheduled_at=jobs.c.scheduled_at - text("interval '20 seconds'")))
    first = min(made, key=lambda job: (-job.priority, job.scheduled_at, job.id))
    await looks.office.put(Message.of(first).text(), 0)
    await looks(2)
    found = await looks.waiting()
    assert len(found) == len(set(found)) == len(made)
    assert str(later.id) not in found


async def test_what_would_be_first_in_the_feed_is_found_at_once(looks: Looks, script: Office) -> None:
    """With any number of others waiting in it."""
    waiting = [await looks.aged(await script.enqueue(a_task), 60 - n / 10) for n in range(300)]
    urgent = await looks.aged(await script.enqueue(task_options(a_task, priority=1)), 30)
    eldest = await looks.aged(await script.enqueue(a_task), 120)
    recent = await looks.aged(await script.enqueue(a_task), 3)
    async with looks.office.redis.pipeline() as pipe:
        for n, job in enumerate(waiting):
            pipe.zadd(KEYS.feed, {Message.of(job).text(): fresh() - 60_000 + 100 * n})
        await pipe.execute()
    looks.reconciler._epoch = int(await looks.office.redis.incr(KEYS.epoch))
    await looks(2)
    found = await looks.waiting()
    assert found[:2] == [str(urgent.id), str(eldest.id)]
    assert str(recent.id) in found
    assert len(found) == 303


async def test_what_would_be_first_is_found_behind_a_wave_that_became_due_just_now(
    looks: Looks, script: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of which is in Redis, and eldest first more than is read of what is recent."""
    monkeypatch.setattr(QueuedJobs.ids, "__kwdefaults__", {"limit": 5, "after": None})
    monkeypatch.setattr(coord.worker.maintenance.reconciler, "REST", 1)
    for _ in range(10):
        job = await looks.aged(await script.enqueue(a_task), 6)
        due = (await script.row(job)).scheduled_at.timestamp()
        await looks.office.put(Message.of(job).text(), fresh() - round((time.time() - due) * 1000))
    urgent = await looks.aged(await script.enqueue(task_options(a_task, priority=1)), 3)
    looks.reconciler._epoch = int(await looks.office.redis.incr(KEYS.epoch))
    looks.reconciler._counted_at = time.monotonic()
    await looks(2)
    assert (await looks.waiting())[0] == str(urgent.id)


async def test_a_higher_priority_is_found_although_a_wave_seems_older_than_the_feeds_first(
    looks: Looks, script: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of it than is read at once; and it is neither recent nor among the part of the rest that a look compares."""
    monkeypatch.setattr(QueuedJobs.ids, "__kwdefaults__", {"limit": 5, "after": None})
    monkeypatch.setattr(coord.worker.maintenance.reconciler, "REST", 1)
    for _ in range(10):
        job = await looks.aged(await script.enqueue(a_task), 30)
        await looks.office.put(Message.of(job).text(), fresh() - 25_000)
    urgent = await looks.aged(await script.enqueue(task_options(a_task, priority=1)), 20)
    looks.reconciler._epoch = int(await looks.office.redis.incr(KEYS.epoch))
    looks.reconciler._counted_at = time.monotonic()
    await looks(2)
    assert (await looks.waiting())[0] == str(urgent.id)


FILL = text("""
    INSERT INTO coord_jobs (id, task, queue, arguments)
    SELECT gen_random_uuid(), 'a_task', 'default', '[[],{}]' FROM generate_series(1, :jobs) AS n
""")


async def test_a_round_is_short_however_much_is_due(
    looks: Looks, script: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be first does not wait until everything was looked at, and everything is looked at in the end."""
    monkeypatch.setattr(coord.worker.maintenance.reconciler, "LOOK_SECONDS", 0.0)
    async with looks.engine.connect() as connection:
        await connection.execute(FILL, {"jobs": 5_000})
        statement = select(jobs).order_by(jobs.c.scheduled_at, jobs.c.id)
        rows = (await connection.execute(statement)).all()
    async with looks.office.redis.pipeline() as pipe:
        for row in rows[:-1]:
            pipe.zadd(KEYS.feed, {Message.of(row).text(): fresh() - 60_000})
        await pipe.execute()
    urgent = await looks.aged(await script.enqueue(task_options(a_task, priority=1)), 3)
    with executed(looks.state.engine) as statements:
        await looks()
    assert len(statements) < 3 * PAGE / MAX_ROWS + 10, len(statements)
    await looks()
    assert (await looks.waiting())[0] == str(urgent.id)
    await looks(5_000 // PAGE + 2)
    assert len(await looks.waiting()) == 5_001


@pytest.mark.parametrize("step", range(6))
async def test_what_ends_while_the_numbers_are_compared_is_not_missed(
    looks: Looks, script: Office, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """A look at everything would be begun every few seconds, for as long as a backlog drains."""
    waiting = [await looks.aged(await script.enqueue(a_task), 60) for _ in range(20)]
    for job in waiting:
        await looks.office.put(Message.of(job).text(), fresh() - 60_000)
    steps = iter(range(1_000))

    read = WorkerState.read
    execute: Any = looks.state.redis.execute_command

    async def all_end() -> None:
        if next(steps) == step:
            await execute("DEL", KEYS.feed)
            async with looks.engine.connect() as connection:
                await connection.execute(update(jobs).values(state="done"))

    async def reads(state: WorkerState, statement: Any) -> Any:
        await all_end()
        return await read(state, statement)

    async def executes(*command: Any, **options: Any) -> Any:
        await all_end()
        return await execute(*command, **options)

    looks.reconciler._epoch = int(await looks.office.redis.incr(KEYS.epoch))
    monkeypatch.setattr(WorkerState, "read", reads)
    monkeypatch.setattr(looks.state.redis, "execute_command", executes)
    with executed(looks.state.engine) as statements:
        await looks.reconciler.round()
    assert not any("now() AS now_" in statement for statement in statements), "begins a look at everything"


async def test_more_that_is_due_than_redis_knows_of_is_noticed(looks: Looks, script: Office) -> None:
    """Whatever was taken and is named by a heartbeat is counted once."""
    waiting = [await looks.aged(await script.enqueue(a_task), 60) for _ in range(4)]
    await looks.office.put(Message.of(waiting[0]).text(), fresh() - 60_000)
    for job in waiting[1:3]:
        await looks.office.redis.zadd(KEYS.taken, {taken_member(job.id, 1): time.time() * 1000})
    running = {str(job.id): {"attempt": 1} for job in waiting[1:3]}
    row = {"id": uuid4(), "queue": "default", "host": "here", "pid": 1, "jobs": running}
    async with looks.engine.connect() as connection:
        await connection.execute(insert(workers), row)
    looks.reconciler._epoch = int(await looks.office.redis.incr(KEYS.epoch))
    with executed(looks.state.engine) as statements:
        await looks.reconciler.round()
    assert any("count(" in statement for statement in statements)
    await asyncio.sleep(MISSING + 0.05)  # time is what it goes by
    await looks()
    assert len(await looks.waiting()) == 2


async def test_a_look_at_everything_waits_until_what_is_missing_is_handed_over(
    looks: Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is missing is remembered, which takes memory."""
    monkeypatch.setattr(coord.worker.maintenance.reconciler, "MAX_MISSING", PAGE)
    async with looks.engine.connect() as connection:
        await connection.execute(FILL, {"jobs": 3 * PAGE})
    with executed(looks.state.engine) as statements:
        await looks()
    assert len(statements) < 2 * PAGE / MAX_ROWS + 10, len(statements)
    await looks(7)
    assert len(await looks.waiting()) == 3 * PAGE


async def test_a_look_at_everything_ends_while_more_becomes_due(looks: Looks) -> None:
    """However fast that is: what comes meanwhile is left to the next look."""

    async def fill() -> None:
        async with looks.engine.connect() as connection:
            while True:
                await connection.execute(FILL, {"jobs": 1})

    filling = [asyncio.create_task(fill()) for _ in range(2)]
    try:
        async with asyncio.timeout(20):
            await looks(2)
    finally:
        for task in filling:
            task.cancel()
        await asyncio.wait(filling)
    assert await looks.waiting()


async def test_thousands_are_back_after_two_looks_and_are_read_in_batches(looks: Looks) -> None:
    async with looks.engine.connect() as connection:
        await connection.execute(FILL, {"jobs": 3_000})
    await looks()
    with executed(looks.state.engine) as statements:
        await looks()
    assert len(await looks.waiting()) == 3_000
    assert 3_000 / MAX_ROWS < len(statements) <= 3_000 / PAGE + 2 * 3_000 / MAX_ROWS + 10, len(statements)


@pytest.mark.slow
async def test_a_million_jobs_for_later_cost_a_look_nothing(looks: Looks, script: Office) -> None:
    """A hundred thousand here: what is read is what is due."""
    async with looks.engine.connect() as connection:
        await connection.execute(
            text("""
            INSERT INTO coord_jobs (id, task, queue, arguments, scheduled_at)
            SELECT gen_random_uuid(), 'a_task', 'default', '[[],{}]', now() + interval '20 days' + n * interval '1 s'
            FROM generate_series(1, 100000) AS n
            """)
        )
        await connection.execute(text("ANALYZE coord_jobs"))
    job = await looks.aged(await script.enqueue(a_task))
    took = []
    for _ in range(4):
        began = time.process_time()
        await looks.reconciler.round()
        took.append(time.process_time() - began)
        await asyncio.sleep(MISSING)
    assert await looks.waiting() == [str(job.id)]
    assert max(took) < 0.2, took
