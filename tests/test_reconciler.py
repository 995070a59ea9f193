"""What the reconciler makes of each difference between the ledger and Redis, one round at a time."""

# ruff: noqa: F401, F811 - fixtures are imported
from __future__ import annotations

import asyncio
import logging
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import coord.worker.reconciler
import pytest
from arq.constants import default_queue_name
from coord.jobs.feed import Message
from coord.worker.census import NEVER, Seen
from coord.worker.keeper import Identity
from coord.worker.reconciler import Reconciler
from sqlalchemy import insert, update

from coord.jobs.model import jobs, workers
from coord.notify.channels import Channels
from tests.ledger import a_task, ledger
from tests.workers import given, office, opened, script

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from coord import Job
    from tests.workers import Office

PATIENCE = 0.2


class Round:
    """A reconciler, and a census that says what a test wants it to."""

    def __init__(self, office: Office, engine: AsyncEngine) -> None:
        identity = Identity(
            id=uuid4(),
            queue="default",
            key=default_queue_name,
            health_key="health",
            channels=Channels("coord", ""),
            attempts=3,
            tries={"rarely": 2},
            keep=1_000.0,
        )
        self.office = office
        self.engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self.reconciler = Reconciler(identity, self.engine, office.redis)
        self.census: Any = SimpleNamespace(dead={}, held=set(), all_heard_since=lambda moment: True)

    async def __call__(self, after: float = 0.0) -> None:
        await asyncio.sleep(after)  # time is what it goes by
        await self.reconciler.look_after(self.census)

    async def enrol(self) -> UUID:
        worker = uuid4()
        row = {"id": worker, "queue": "default", "host": "here", "pid": 1, "jobs": {}}
        async with self.engine.connect() as connection:
            await connection.execute(insert(workers), row)
        return worker

    async def delivered(self, job: Job, claim: Any = None) -> None:
        """To Redis, and there claimed by somebody."""
        async with self.office.redis.pipeline(transaction=True) as pipe:
            given(pipe, job)
            if claim is not None:
                pipe.set(f"arq:in-progress:{job.id}", str(claim), px=60_000)
            await pipe.execute()

    async def in_redis(self, job: Job) -> tuple[int, bool] | None:
        """The attempt of its message, and whether it is claimed."""
        text = await self.office.redis.get(f"arq:job:{job.id}")
        if text is None or await self.office.redis.zscore(default_queue_name, str(job.id)) is None:
            return None
        message = Message.read(text)
        assert message is not None
        return message.attempt, bool(await self.office.redis.exists(f"arq:in-progress:{job.id}"))

    def die(self, worker: UUID) -> None:
        self.census.dead = {worker: Seen(1, 0.0, NEVER, {})}


@pytest.fixture
def look(office: Office, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> Round:
    monkeypatch.setattr(coord.worker.reconciler, "PATIENCE", PATIENCE)
    monkeypatch.setattr(coord.worker.reconciler, "SECOND_LOOK", PATIENCE)
    return Round(office, engine)


async def test_what_is_missing_for_long_enough_is_handed_over(look: Round, script: Office) -> None:
    job = await script.enqueue(a_task)
    await look()
    assert await look.in_redis(job) is None, "it may be on its way"
    await look(after=1.1 * PATIENCE)
    assert await look.in_redis(job) == (1, False)


async def test_thousands_that_are_missing_are_handed_over(look: Round, script: Office) -> None:
    count = 2_345
    async with script.session_maker.begin() as session:
        rows = [{"id": uuid4(), "task": "a_task", "queue": "default", "arguments": [[n], {}]} for n in range(count)]
        await session.execute(insert(jobs), rows)
    await look()
    await look(after=1.1 * PATIENCE)
    assert await look.office.redis.zcard(default_queue_name) == count


async def test_what_somebody_says_he_runs_is_left_to_him(look: Round, script: Office) -> None:
    job = await script.enqueue(a_task)
    look.census.held = {(str(job.id), 1)}
    await look()
    await look(after=1.1 * PATIENCE)
    assert await look.in_redis(job) is None


@pytest.mark.parametrize("is_claimed", [True, False])
async def test_nothing_is_missing_before_everybody_has_said_what_he_runs(
    look: Round, script: Office, is_claimed: bool
) -> None:
    worker = await look.enrol()
    job = await script.enqueue(a_task)
    if is_claimed:
        await look.delivered(job, worker)
    before = await look.in_redis(job)
    heard = False
    look.census.all_heard_since = lambda moment: heard
    await look()
    await look(after=1.1 * PATIENCE)
    assert await look.in_redis(job) == before
    heard = True
    await look()
    assert await look.in_redis(job) == (1, False)


async def test_another_attempt_is_missing_only_since_it_is_there(look: Round, script: Office) -> None:
    worker = await look.enrol()
    job = await script.enqueue(a_task)
    await look.delivered(job, worker)
    await look()
    async with look.engine.connect() as connection:
        await connection.execute(update(jobs).where(jobs.c.id == job.id).values(attempt=2))
    await look(after=1.1 * PATIENCE)
    assert await look.in_redis(job) == (1, True)
    await look(after=1.1 * PATIENCE)
    assert await look.in_redis(job) == (2, False)


async def test_a_dead_workers_attempts_are_counted(look: Round, script: Office) -> None:
    worker = await look.enrol()
    job = await script.enqueue(a_task)
    await look.delivered(job, worker)
    look.die(worker)
    await look()
    assert await look.in_redis(job) == (2, False)
    row = await script.row(job)
    assert (row.attempt, row.state, row.error) == (2, "queued", "the worker that ran it died")


@pytest.mark.parametrize(("task", "most"), [("usual", 3), ("rarely", 2)])
async def test_a_dead_workers_last_attempt_is_the_end(look: Round, script: Office, task: str, most: int) -> None:
    """As many as the worker says, unless the function says something else."""
    job = await script.enqueue(task)
    for attempt in range(1, most + 1):
        worker = await look.enrol()
        await look.delivered(await script.row(job), worker)  # type: ignore[arg-type]
        look.die(worker)
        await look()
        assert (await script.row(job)).state == ("failed" if attempt == most else "queued")
    row = await script.row(job)
    assert (row.attempt, row.error) == (most, f"the worker that ran it died (attempt {most} of {most})")
    assert await look.office.left_in_redis() == []


async def test_an_attempt_is_counted_once_though_the_rescuer_died_as_well(look: Round, script: Office) -> None:
    """Between the ledger, where he had raised it, and Redis."""
    worker = await look.enrol()
    job = await script.enqueue(a_task)
    await look.delivered(job, worker)
    async with look.engine.connect() as connection:
        await connection.execute(update(jobs).where(jobs.c.id == job.id).values(attempt=2))
    look.die(worker)
    await look()
    assert await look.in_redis(job) == (2, False)
    assert (await script.row(job)).attempt == 2


@pytest.mark.parametrize("claim", ["somebody", "4f9b0f6e-0000-7000-8000-000000000000"])
async def test_a_claim_of_nobodys_uses_up_no_attempt(look: Round, script: Office, claim: Any) -> None:
    """Forged, or of a worker that stopped while Redis was away."""
    job = await script.enqueue(a_task)
    await look.delivered(job, claim)
    await look()
    assert await look.in_redis(job) == (1, True), "its worker may be about to say that it lives after all"
    await look(after=1.1 * PATIENCE)
    assert await look.in_redis(job) == (1, False)
    assert (await script.row(job)).attempt == 1


async def test_a_worker_whose_heart_has_beaten_after_all_is_not_buried(look: Round) -> None:
    worker = await look.enrol()
    look.census.dead = {worker: Seen(0, 0.0, NEVER, {})}
    await look()
    assert [row.id for row in await look.office.workers()] == [worker]


async def test_what_has_been_claimed_meanwhile_is_left_alone(look: Round, script: Office) -> None:
    job = await script.enqueue(a_task)
    await look()
    original = look.reconciler._hand_over

    async def late(missing: Any) -> None:
        await look.delivered(job, "somebody")
        await original(missing)

    look.reconciler._hand_over = late  # type: ignore[method-assign]
    await look(after=1.1 * PATIENCE)
    assert await look.in_redis(job) == (1, True)


async def test_rounds_are_short_and_say_nothing_when_nothing_is_missing(
    look: Round, office: Office, caplog: pytest.LogCaptureFixture
) -> None:
    count = 5_000
    async with office.session_maker.begin() as session:
        rows = [{"id": uuid4(), "task": "a_task", "queue": "default", "arguments": [[], {}]} for _ in range(count)]
        await session.execute(insert(jobs), rows)
    async with office.redis.pipeline(transaction=True) as pipe:
        for row in rows:
            pipe.set(f"arq:job:{row['id']}", "anything")
        pipe.zadd(default_queue_name, {str(row["id"]): 1 for row in rows})
        await pipe.execute()
    await look()
    began = time.perf_counter()
    with caplog.at_level(logging.INFO, "arq.coord"):
        await look(after=0)
    assert time.perf_counter() - began < 1.0
    assert [record for record in caplog.records if record.name == "arq.coord"] == []
