"""Turns, schedules and priorities under random interleavings of workers, deaths and clocks, on the real servers.

What is driven are the worker's own statements and commands, a step at a time or two at once; workers are what holds
their results. Never two run with one key, nor is one lost; no slot is made twice or left out; nothing waits behind what
came later and is of a lower priority.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, text, update

from coord import Job, JobSuperseded, cancel_job, job_transaction, periodic, task_options
from coord.jobs.model import is_in_feed, is_queued, jobs
from coord.queue.handover import push
from coord.queue.keys import QueueKeys
from coord.queue.message import Message
from coord.worker.maintenance.turnkeeper import free_keys
from coord.worker.turns import Turns
from tests.clock import START, Clock
from tests.ledger import a_task, committed, delivered
from tests.workers import a_state

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncEngine

    from coord.worker.maintenance.ticker import Ticker
    from tests.workers import Office

WORKERS = st.integers(0, 2)
KEYS = st.sampled_from(["a", "b"])
steps = st.one_of(
    st.tuples(st.just("enqueue"), KEYS, st.sampled_from([-1, 0, 0, 1])),
    st.tuples(st.just("take"), WORKERS),
    st.tuples(st.just("take at once"), WORKERS, WORKERS),
    st.tuples(st.just("claim"), WORKERS),
    st.tuples(st.just("finish"), WORKERS, st.booleans()),
    st.tuples(st.just("put off"), WORKERS),
    st.tuples(st.just("kill"), WORKERS),
    st.tuples(st.just("rescue")),
    st.tuples(st.just("lose the feed")),
    st.tuples(st.just("reconcile")),
    st.tuples(st.just("keep turns")),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
)
common = settings(max_examples=20, deadline=None, suppress_health_check=[*HealthCheck])


@dataclass
class Worker:
    """Its jobs that were taken; those that it had when it was killed are dead until somebody rescues them."""

    turns: Turns
    running: dict[tuple[UUID, int], Message] = field(default_factory=dict)
    claims: dict[tuple[UUID, int], AsyncExitStack] = field(default_factory=dict)


class World:
    def __init__(self, office: Office, engine: AsyncEngine) -> None:
        self.office = office
        self.engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self.keys = QueueKeys(queue="turns")
        self.workers = [Worker(Turns(a_state(engine, office.redis))) for _ in range(3)]
        self.dead: dict[tuple[UUID, int], Message] = {}
        self.made: list[Job] = []

    async def do(self, step: tuple[Any, ...]) -> None:
        match step:
            case ("enqueue", key, priority):
                options = task_options(a_task, one_at_a_time=key, priority=priority, queue="turns")
                job = await committed(self.office.session_maker, options)
                self.made.append(job)
                await self.push(job)
            case ("take", number):
                await self.take(self.workers[number])
            case ("take at once", one, two):
                await asyncio.gather(self.take(self.workers[one]), self.take(self.workers[two]))
            case ("claim", number):
                await self.claim(self.workers[number])
            case ("finish", number, passes_on):
                await self.finish(self.workers[number], passes_on=passes_on)
            case ("put off", number):
                await self.put_off(self.workers[number])
            case ("kill", number):
                await self.kill(self.workers[number])
            case ("rescue",):
                await self.rescue()
            case ("lose the feed",):
                await self.office.redis.delete(self.keys.feed)
            case ("reconcile",):
                await self.reconcile()
            case ("keep turns",):
                await self.keep_turns()
            case ("cancel", number) if number < len(self.made):
                async with self.office.session_maker() as session:
                    await cancel_job(session, self.made[number].id)
                    await session.commit()

    async def push(self, *waiting: Any) -> None:
        command = push(self.keys, [(job, 0.0) for job in waiting])
        if command is not None:
            await self.office.redis.execute_command(*command)  # type: ignore[no-untyped-call]

    async def take(self, worker: Worker) -> None:
        found = [Message.read(raw) for raw, _ in await self.office.redis.zpopmin(self.keys.feed, 2)]
        if found:
            admitted = await worker.turns.admitted(found)
            held = {key for other in self.workers for key in other.running} | {*self.dead}
            worker.running |= {message.key: message for message in found if message.key in admitted - held}

    async def claim(self, worker: Worker) -> None:
        for key, message in [*worker.running.items()]:
            if key not in worker.claims:
                job = next(job for job in self.made if job.id == message.id)
                stack = AsyncExitStack()
                ctx = delivered(job, self.office.session_maker, attempt=message.attempt)
                try:
                    await stack.enter_async_context(job_transaction(ctx))
                except JobSuperseded:
                    del worker.running[key]  # it was cancelled
                    await worker.turns.pass_on([str(message.one_at_a_time)])
                else:
                    worker.claims[key] = stack

    async def finish(self, worker: Worker, *, passes_on: bool) -> None:
        await self.claim(worker)
        for key, stack in [*worker.claims.items()]:
            await stack.aclose()
            message = worker.running.pop(key)
            del worker.claims[key]
            if passes_on:  # else it dies before that
                await worker.turns.pass_on([str(message.one_at_a_time)])

    async def put_off(self, worker: Worker) -> None:
        """As an attempt that is tried again."""
        for key, message in [*worker.running.items()]:
            if key not in worker.claims:
                del worker.running[key]
                await self.begin_anew(message)
                await worker.turns.pass_on([str(message.one_at_a_time)])

    async def kill(self, worker: Worker) -> None:
        for stack in worker.claims.values():
            await stack.__aexit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        self.dead |= worker.running
        worker.running, worker.claims = {}, {}

    async def rescue(self) -> None:
        for message in self.dead.values():
            await self.begin_anew(message)
        self.dead = {}

    async def begin_anew(self, message: Message) -> None:
        again = update(jobs).where(is_queued, jobs.c.id == message.id, jobs.c.attempt == message.attempt)
        async with self.engine.connect() as connection:
            rows = (await connection.execute(again.values(attempt=jobs.c.attempt + 1).returning(jobs))).all()
        await self.push(*rows)

    async def reconcile(self) -> None:
        """What is nowhere is handed over again; what waits for its turn belongs nowhere."""
        async with self.engine.connect() as connection:
            rows = (await connection.execute(select(jobs).where(is_in_feed, jobs.c.queue == "turns"))).all()
        held = {key for worker in self.workers for key in worker.running} | {*self.dead}
        await self.push(*(row for row in rows if (row.id, row.attempt) not in held))

    async def keep_turns(self) -> None:
        async with self.engine.connect() as connection:
            free = [*await connection.scalars(free_keys())]
        await self.workers[0].turns.pass_on(free)

    async def rows(self) -> dict[UUID, Any]:
        async with self.engine.connect() as connection:
            return {row.id: row for row in (await connection.execute(select(jobs).where(is_queued))).all()}

    async def check(self, before: dict[UUID, Any]) -> dict[UUID, Any]:
        now = await self.rows()
        current = [message for worker in self.workers for message in worker.running.values()]
        current = [message for message in current if message.id in now and now[message.id].attempt == message.attempt]
        keys = [message.one_at_a_time for message in current]
        assert len(keys) == len({*keys}), "two run with one key"
        for row in now.values():
            old = before.get(row.id)
            if row.turn == row.attempt and (old is None or old.turn != old.attempt):
                waited = [before[id_] for id_, each in now.items() if each.turn == 0 and before.get(id_, row).turn == 0]
                behind = [each for each in waited if each.one_at_a_time == row.one_at_a_time]
                assert all(each.priority <= row.priority for each in behind), "a lower one had its turn first"
        return now

    async def come_to_an_end(self) -> None:
        """Left to themselves, whatever has happened, workers run all there is."""
        for _ in range(4 * len(self.made) + 4):
            await self.rescue()
            await self.keep_turns()
            await self.reconcile()
            for worker in self.workers:
                await self.take(worker)
                await self.finish(worker, passes_on=True)
        assert await self.rows() == {}, "lost"


@pytest.mark.slow
@common
@given(script=st.lists(steps, min_size=5, max_size=30))
@example(script=[("enqueue", "a", 0), ("enqueue", "a", 0), ("take", 0), ("finish", 0, False)])
@example(script=[("enqueue", "a", 0), ("enqueue", "a", 0), ("take", 0), ("claim", 0), ("kill", 0), ("take", 1)])
@example(script=[("enqueue", "a", 0)] * 4 + [("take at once", 0, 1), ("enqueue", "a", 1), ("take at once", 1, 2)])
async def test_no_two_jobs_with_one_key_run_at_once_and_none_is_lost(
    script: list[tuple[Any, ...]], office: Office, engine: AsyncEngine
) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("DELETE FROM coord_jobs"))
        await connection.execute(text("DELETE FROM coord_cancellations"))
    world = World(office, engine)
    await office.redis.delete(world.keys.feed, world.keys.soon)
    rows: dict[UUID, Any] = {}
    try:
        for step in script:
            await world.do(step)
            rows = await world.check(rows)
        for worker in world.workers:
            await world.kill(worker)
        async with engine.begin() as connection:  # a wish is its worker's to fulfil, and that was killed
            await connection.execute(text("DELETE FROM coord_cancellations"))
        await world.come_to_an_end()
    finally:
        for worker in world.workers:
            await world.kill(worker)


ticks = st.one_of(
    st.tuples(st.just("look"), st.sets(st.integers(0, 2), min_size=1)),
    st.tuples(st.just("pass"), st.sampled_from([1, 20, 59, 60, 61, 200, 301, 4000])),
    st.tuples(st.just("fail"), st.integers(0, 2)),
    st.tuples(st.just("restart"), st.integers(0, 2)),
)


@pytest.mark.slow
@pytest.mark.usefixtures("tables")
@common
@given(script=st.lists(ticks, min_size=4, max_size=25), every=st.sampled_from([1, 7]))
async def test_no_slot_is_made_twice_or_left_out(
    script: list[tuple[Any, ...]], every: int, clock: Clock, engine: AsyncEngine
) -> None:
    schedule = periodic(a_task, f"*/{every} * * * *", overlap=True, catch_up=10_000)
    async with engine.begin() as connection:
        await connection.execute(text("DELETE FROM coord_jobs"))
        await connection.execute(text("DELETE FROM coord_schedules"))
    await clock.set(START)
    workers: list[Ticker] = [clock.ticker(schedule) for _ in range(3)]
    await workers[0].round()
    for step in script:
        match step:
            case ("look", numbers):
                await asyncio.gather(*(workers[number].round() for number in numbers))
            case ("pass", seconds):
                await clock.go_on(seconds=seconds)
            case ("fail", number):
                await fails(engine, workers[number])
            case ("restart", number):
                workers[number] = clock.ticker(schedule)
    while not await workers[0].round():
        """It makes so many at a time."""
    async with engine.connect() as connection:
        ids = [*await connection.scalars(select(jobs.c.id).order_by(jobs.c.id))]
    made = [(id_.int >> 80) / 1000 for id_ in ids]
    first, step_seconds = START.timestamp(), 60
    minutes = range(1, int((clock.now - START) / timedelta(minutes=1)) + 1)
    assert made == [first + minute * step_seconds for minute in minutes if minute % 60 % every == 0]


async def fails(engine: AsyncEngine, ticker: Ticker) -> None:
    """Its connection is lost as it writes the job."""
    async with engine.begin() as connection:
        await connection.execute(text("ALTER TABLE coord_jobs ADD CONSTRAINT refused CHECK (task = '') NOT VALID"))
    try:
        await ticker.round()
    except Exception as error:
        if "refused" not in str(error):
            raise
    finally:
        async with engine.begin() as connection:
            await connection.execute(text("ALTER TABLE coord_jobs DROP CONSTRAINT refused"))


@common
@given(
    script=st.lists(st.one_of(st.integers(-100, 100), st.just("take")), min_size=3, max_size=60),
    queue=st.sampled_from(["default", "other"]),
)
async def test_a_higher_priority_is_taken_before_all_lower_ones_that_wait(
    script: list[int | str], queue: str, office: Office
) -> None:
    keys = QueueKeys(queue=queue)
    await office.redis.delete(keys.feed, keys.soon)
    waiting: list[tuple[int, int]] = []
    for number, step in enumerate([*script, *["take"] * len(script)]):
        if isinstance(step, int):
            job = Job(id=None, attempt=1, task="t", arguments=[[number], {}], priority=step, deaths=0)
            command = push(keys, [(job, -float(len(script) - number))])  # each was due before the next
            assert command is not None
            await office.redis.execute_command(*command)  # type: ignore[no-untyped-call]
            waiting.append((-step, number))
        elif waiting:
            [(raw, _)] = await office.redis.zpopmin(keys.feed)
            expected = min(waiting)
            waiting.remove(expected)
            assert f'"arguments":[[{expected[1]}],' in raw.decode()
