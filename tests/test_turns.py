"""`one_at_a_time`: of the jobs with a key one runs at a time, over all workers, and the others wait nowhere."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Any

import pytest
from arq.worker import Retry
from sqlalchemy import text, update

from coord import Job, JobSuperseded, call, cancel_job, enqueue_many, job_transaction, retry_job, task_options
from coord.jobs.model import jobs
from coord.queue.keys import QueueKeys
from coord.queue.message import Message
from coord.worker.maintenance.turnkeeper import TurnKeeper
from coord.worker.turns import Turns
from tests.ledger import a_task, committed, delivered, executed
from tests.serving import eventually
from tests.workers import Notes, Office, a_state, process, working

if TYPE_CHECKING:
    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

pytestmark = pytest.mark.usefixtures("tables")


class Stage:
    """A task that says who is on it, and stays until it is let go."""

    def __init__(self) -> None:
        self.on: list[int] = []
        self.most = 0
        self.seen: list[int] = []
        self.free = asyncio.Event()

    async def act(self, ctx: dict[str, Any], number: int) -> None:
        self.on.append(number)
        self.seen.append(number)
        self.most = max(self.most, len(self.on))
        try:
            await self.free.wait()
            async with job_transaction(ctx):
                await asyncio.sleep(0)
        finally:
            self.on.remove(number)

    @property
    def task(self) -> Any:
        async def act(ctx: dict[str, Any], number: int) -> None:
            await self.act(ctx, number)

        act.__qualname__ = "act"
        return act


async def enqueued(office: Office, task: Any, *numbers: int) -> list[Job]:
    async with office.session_maker() as session:
        made = await enqueue_many(session, [call(task, number) for number in numbers])
        await session.commit()
    return made


async def waiting(office: Office, count: int) -> None:
    """Return when so many wait for their turn."""
    statement = text("SELECT count(*) FROM coord_jobs WHERE state = 'queued' AND turn = 0")

    async def are() -> bool:
        async with office.session_maker() as session:
            return bool(await session.scalar(statement) == count)

    await eventually(are, within=15)


async def test_jobs_with_a_key_run_one_at_a_time_in_order_and_the_others_occupy_nothing(office: Office) -> None:
    stage = Stage()
    free: list[int] = []

    async def other(ctx: dict[str, Any], number: int) -> None:
        free.append(number)

    keyed = task_options(stage.task, one_at_a_time="stock")
    async with (
        working(office, [stage.task, other], max_jobs=2) as one,
        working(office, [stage.task], max_jobs=2) as two,
    ):
        made = await enqueued(office, keyed, *range(8))
        await waiting(office, 7)
        assert len(one.running) + len(two.running) == len(stage.on) == 1
        await office.waiting(0)
        await office.final(await office.enqueue(other, 1))
        stage.free.set()
        for job in made:
            assert (await office.final(job)).state == "done"
    assert stage.most == 1
    assert stage.seen[1:] == sorted(stage.seen[1:])
    assert sorted(stage.seen) == [*range(8)]
    await office.nothing_left_in_redis()


async def test_a_higher_priority_has_its_turn_first_and_keys_are_apart_but_queues_are_not(office: Office) -> None:
    stage = Stage()
    tasks = [stage.task]
    async with working(office, tasks), working(office, tasks, queue="other"):
        first = await enqueued(office, task_options(stage.task, one_at_a_time="a"), 0)
        await eventually(lambda: stage.on == [0])
        low = await enqueued(office, task_options(stage.task, one_at_a_time="a", priority=-1, queue="other"), 1)
        await waiting(office, 1)
        high = await enqueued(office, task_options(stage.task, one_at_a_time="a", priority=1), 2)
        await waiting(office, 2)
        other = await enqueued(office, task_options(stage.task, one_at_a_time="b", queue="other"), 3)
        await eventually(lambda: stage.on == [0, 3])
        stage.free.set()
        for job in (*first, *low, *high, *other):
            await office.final(job)
    assert stage.seen == [0, 3, 2, 1]


@pytest.mark.parametrize("end", ["returns", "fails", "retries", "is cancelled", "is unknown"])
async def test_a_turn_is_passed_on_at_once_however_the_attempt_ends(
    office: Office, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """By the worker itself: the leader does nothing about it."""
    begun, go_on = asyncio.Event(), asyncio.Event()
    ran: list[str] = []

    async def first(ctx: dict[str, Any]) -> None:
        begun.set()
        ran.append("first")
        if ctx["job_try"] == 1:
            await go_on.wait()
            match end:
                case "fails":
                    raise ValueError("final")
                case "retries":
                    raise Retry(defer=60)

    async def second(ctx: dict[str, Any]) -> None:
        ran.append("second")

    known = [second] if end == "is unknown" else [first, second]

    async def no_round(_: TurnKeeper) -> None: ...

    monkeypatch.setattr(TurnKeeper, "round", no_round)
    async with working(office, known):
        one = await office.enqueue(task_options(first, one_at_a_time="k"))
        if end != "is unknown":
            await begun.wait()
        two = await office.enqueue(task_options(second, one_at_a_time="k"))
        if end != "is unknown":
            await waiting(office, 1)
        if end == "is cancelled":
            async with office.session_maker() as session:
                await cancel_job(session, one.id)
                await session.commit()
        else:
            go_on.set()
        assert (await office.final(two)).state == "done"
    expected = {"returns": "done", "fails": "failed", "is cancelled": "cancelled"}.get(end, "queued")
    assert (await office.row(one)).state == expected


async def test_a_job_that_is_cancelled_keeps_its_turn_until_its_task_has_ended(office: Office) -> None:
    """Also outside its transaction, where nobody but its worker knows that it runs."""
    told, ends = asyncio.Event(), asyncio.Event()
    ran: list[int] = []

    async def task(ctx: dict[str, Any], number: int) -> None:
        ran.append(number)
        try:
            await asyncio.sleep(60 if number == 1 else 0)
        except asyncio.CancelledError:
            told.set()
            await ends.wait()
            raise

    async with working(office, [task]):
        one, two = await enqueued(office, task_options(task, one_at_a_time="k"), 1, 2)
        await waiting(office, 1)

        async def is_named() -> bool:
            return any(str(one.id) in worker.jobs for worker in await office.workers())

        await eventually(is_named)
        async with office.session_maker() as session:
            assert await cancel_job(session, one.id) == "running"
            await session.commit()
        await told.wait()
        await asyncio.sleep(1.5)  # in which the leader looks whose turn it is
        assert ran == [1]
        ends.set()
        assert (await office.final(two)).state == "done"
    assert (await office.row(one)).state == "cancelled"


async def test_after_a_death_the_others_have_their_turns(office: Office, notes: Notes) -> None:
    async with process(office, notes) as first:
        held = task_options("hold", one_at_a_time="k")
        one = await office.enqueue(held, "killed")
        await notes.say(one, "starts")
        two = await office.enqueue(held, "killed")
        await waiting(office, 1)
        first.signal(signal.SIGKILL)
        async with process(office, notes, heartbeat_process=False):
            notes.let("killed")
            for job in (one, two):
                assert (await office.final(job, within=25)).state == "done"
    assert await office.effects(one) == [2]
    assert await office.effects(two) == [1]


async def test_a_turn_whose_job_was_cancelled_before_it_began_is_passed_on_by_the_leader(
    office: Office, engine: AsyncEngine
) -> None:
    async def task(ctx: dict[str, Any]) -> None: ...

    one, two = [await office.enqueue(task_options(task, one_at_a_time="k", queue="apart")) for _ in range(2)]
    turns = Turns(a_state(engine, office.redis))
    assert await turns.admitted([Message.of(one), Message.of(two)]) == {(one.id, 1)}
    await office.redis.delete(QueueKeys(queue="apart").feed)
    async with office.session_maker() as session:
        await cancel_job(session, one.id)
        await session.commit()
    async with working(office, [task], queue="apart"):
        assert (await office.final(two, within=10)).state == "done"


# What holds whoever delivers what


async def test_only_who_has_the_turn_applies_its_effect(office: Office, observer: Connection) -> None:
    job = await committed(office.session_maker, task_options(a_task, one_at_a_time="k"))
    with pytest.raises(JobSuperseded):
        async with job_transaction(delivered(job, office.session_maker)):
            """Its turn has not come."""
    await observer.execute("UPDATE coord_jobs SET turn = attempt")
    async with job_transaction(delivered(job, office.session_maker)):
        """Now it has."""


async def test_the_ledger_holds_no_second_turn_of_a_key(office: Office, observer: Connection) -> None:
    for _ in range(2):
        await committed(office.session_maker, task_options(a_task, one_at_a_time="k"))
    with pytest.raises(Exception, match="coord_jobs_turn"):
        await observer.execute("UPDATE coord_jobs SET turn = attempt")


async def test_nobody_waits_for_a_job_that_runs_or_that_somebody_has_locked(
    office: Office, engine: AsyncEngine
) -> None:
    made = [await committed(office.session_maker, task_options(a_task, one_at_a_time="k")) for _ in range(3)]
    turns = Turns(a_state(engine, office.redis))
    assert await turns.admitted([Message.of(made[0])]) == {(made[0].id, 1)}
    async with asyncio.timeout(10), job_transaction(delivered(made[0], office.session_maker)):
        assert await turns.admitted([Message.of(job) for job in made]) == set()
        async with office.session_maker() as session:
            await session.execute(update(jobs).where(jobs.c.id == made[1].id).values(priority=1))
            await turns.pass_on(["k"])
            assert await turns.admitted([Message.of(job) for job in made[1:]]) == set()
    await turns.pass_on(["k"])
    assert (await office.row(made[1])).turn == 1


async def test_a_job_that_runs_again_by_hand_waits_for_its_turn_again(office: Office, observer: Connection) -> None:
    async def task(ctx: dict[str, Any]) -> None:
        if ctx["job_try"] == 1:
            raise ValueError("not yet")

    async with working(office, [task]):
        job = await office.enqueue(task_options(task, one_at_a_time="k"))
        assert (await office.final(job)).state == "failed"
        async with office.session_maker() as session:
            await retry_job(session, job.id)
            await session.commit()
        assert (await office.final(job)).state == "done"


async def test_a_job_without_a_key_costs_no_statement_more(office: Office) -> None:
    async def task(ctx: dict[str, Any]) -> None:
        async with job_transaction(ctx):
            """Nothing."""

    counts = []
    async with working(office, [task]) as worker:
        engine = worker.worker.ctx["coord.lifecycle"].state.config.session_maker.kw["bind"]
        for key in (None, "k"):
            with executed(engine) as seen:
                await office.final(await office.enqueue(task_options(task, one_at_a_time=key)))
                await eventually(lambda: not len(worker.running))
            counts.append([statement for statement in seen if "locked" in statement or "AS first" in statement])
    assert counts[0] == []


@pytest.mark.parametrize("refused", ["", "x" * 3000, "a\0b"])
def test_a_key_that_cannot_be_kept_is_refused(refused: str) -> None:
    with pytest.raises(ValueError, match="one_at_a_time is a text"):
        task_options(a_task, one_at_a_time=refused)
