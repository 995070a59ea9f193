"""A paused queue: nothing of it begins, what runs goes on, and every worker knows, also one that starts later."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import pytest

from coord import pause_queue, resume_queue, task_options
from coord.queue.keys import QueueKeys
from coord.worker.maintenance.registry import WorkerRegistry
from tests.serving import eventually
from tests.workers import Office, working

if TYPE_CHECKING:
    from asyncpg import Connection

pytestmark = pytest.mark.usefixtures("tables")


async def change(office: Office, function: Any, *queue: str) -> None:
    async with office.session_maker() as session:
        await function(session, *queue)
        await session.commit()


async def test_a_paused_queue_begins_nothing_until_it_is_resumed_and_what_runs_goes_on(office: Office) -> None:
    begun: list[int] = []
    go_on = asyncio.Event()

    async def task(ctx: dict[str, Any], number: int) -> None:
        begun.append(number)
        if number == 0:
            await go_on.wait()

    async with working(office, [task]) as worker:
        first = await office.enqueue(task, 0)
        await eventually(lambda: begun == [0])
        await change(office, pause_queue)
        await eventually(lambda: worker.worker.ctx["coord.lifecycle"].state.is_paused, within=2)
        second = await office.enqueue(task, 1)
        go_on.set()
        assert (await office.final(first)).state == "done"
        await office.waiting(1)
    async with working(office, [task]) as worker:  # the pause survives its workers

        async def healthy() -> bytes:
            return (await office.redis.get(QueueKeys().health(socket.gethostname()))) or b""

        async def says_so() -> bool:
            return b"paused" in await healthy()

        await eventually(says_so)
        await office.waiting(1)
        assert begun == [0]
        await change(office, resume_queue)
        assert (await office.final(second, within=5)).state == "done"

        async def says_nothing() -> bool:
            return b"paused" not in await healthy()

        await eventually(says_nothing)


async def test_a_worker_that_starts_takes_nothing_before_it_knows_whether_its_queue_is_paused(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late PostgreSQL says so."""
    begun: list[str] = []
    answers = asyncio.Event()
    look = WorkerRegistry.round

    async def late(registry: WorkerRegistry) -> None:
        await answers.wait()
        await look(registry)

    async def task(ctx: dict[str, Any]) -> None:
        begun.append(ctx["job_id"])

    monkeypatch.setattr(WorkerRegistry, "round", late)
    await change(office, pause_queue)
    async with working(office, [task]) as worker:
        state = worker.worker.ctx["coord.lifecycle"].state
        await eventually(lambda: state.clock.is_set)
        job = await office.enqueue(task)
        await asyncio.sleep(1)  # in which somebody might take it
        answers.set()
        await eventually(lambda: state.is_paused)
        await office.waiting(1)
        assert begun == []
        await change(office, resume_queue)
        assert (await office.final(job)).state == "done"


async def test_other_queues_go_on(office: Office) -> None:
    async def task(ctx: dict[str, Any]) -> None: ...

    await change(office, pause_queue, "other")
    async with working(office, [task]), working(office, [task], queue="other") as other:
        await eventually(lambda: other.worker.ctx["coord.lifecycle"].state.is_paused)
        held = await office.enqueue(task_options(task, queue="other"))
        assert (await office.final(await office.enqueue(task))).state == "done"
        assert (await office.row(held)).state == "queued"


async def test_a_second_pause_keeps_the_time_of_the_first_and_a_rollback_pauses_nothing(
    office: Office, observer: Connection
) -> None:
    async with office.session_maker() as session:
        await pause_queue(session)
        await session.rollback()
    assert await observer.fetchval("SELECT paused_at FROM coord_queues") is None
    await change(office, pause_queue)
    since = await observer.fetchval("SELECT paused_at FROM coord_queues")
    await change(office, pause_queue)
    assert await observer.fetchval("SELECT paused_at FROM coord_queues") == since
    await change(office, resume_queue, "unknown")
    await change(office, resume_queue)
    assert await observer.fetchval("SELECT paused_at FROM coord_queues") is None


@pytest.mark.parametrize("function", [pause_queue, resume_queue])
@pytest.mark.parametrize("queue", ["", "a\0b", "\ud800"])
async def test_what_can_be_no_queue_is_refused_before_any_sql(office: Office, function: Any, queue: str) -> None:
    async with office.session_maker() as session:
        with pytest.raises(ValueError, match="queue is a text of"):
            await function(session, queue)
        assert not session.in_transaction()
