"""Two coordinators of one process on one engine, as an application and a worker in one test have them."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import async_sessionmaker

from coord import Coordinator, TooManyWaitersError, enqueue, wait_for_row_change
from tests.ledger import a_task
from tests.models import User
from tests.round_trip import rename
from tests.serving import eventually
from tests.waits import registered, waiting
from tests.workers import KEYS, Office, client, working

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.usefixtures("tables", "ledger", "nobody_left_waiting")

NEVER = 60.0


async def opened(coordinator: Coordinator, stack: AsyncExitStack) -> None:
    await stack.enter_async_context(coordinator)
    await eventually(lambda: asyncio.sleep(0, coordinator._bell is None or coordinator._bell.connected))


async def a_change_is_heard(session_maker: SessionMaker, task: asyncio.Task[User] | None = None) -> None:
    """By a wait that polls once a minute. Redis may take its time to subscribe, so there are some changes."""
    async with session_maker() as session, session_maker() as writer:
        waits = {task or waiting(session, User, 1, interval=NEVER, timeout=NEVER)}
        await registered()
        user = await writer.get_one(User, 1)
        async with asyncio.timeout(10):
            while waits:
                user.name += "!"
                await writer.commit()
                done, waits = await asyncio.wait(waits, timeout=0.5)
        assert all(wait.result().name[-1] == "!" for wait in done)


@pytest.mark.parametrize("first_ends", [True, False])
@pytest.mark.parametrize("silent", [None, "first", "second"])
async def test_the_end_of_one_leaves_the_other_its_messages(
    session_maker: SessionMaker, redis_url: str, first_ends: bool, silent: str | None
) -> None:
    """One of them may have no Redis."""
    async with session_maker.begin() as session:
        session.add(User(id=1, name=""))
    stacks = AsyncExitStack(), AsyncExitStack()
    for stack, name in zip(stacks, ("first", "second"), strict=True):
        await opened(Coordinator(session_maker, redis=None if silent == name else redis_url, read_settings={}), stack)
    try:
        await a_change_is_heard(session_maker)
        ending, _ = stacks if first_ends else stacks[::-1]
        async with session_maker() as session:
            task = waiting(session, User, 1, interval=NEVER, timeout=NEVER)  # begun under both of them
            await registered()
            await ending.aclose()
            if silent != ("second" if first_ends else "first"):
                await a_change_is_heard(session_maker, task)
            task.cancel()
            await asyncio.wait([task])
    finally:
        for stack in stacks:
            await stack.aclose()


async def test_a_job_is_handed_over_once(session_maker: SessionMaker, redis_url: str) -> None:
    async with Redis.from_url(redis_url) as redis, Coordinator(session_maker, redis=redis_url):
        await redis.flushdb()
        async with Coordinator(session_maker, redis=redis_url), redis.monitor() as monitor:
            async with session_maker.begin() as session:
                job = await enqueue(session, a_task)
            said: list[str] = []
            async with asyncio.timeout(5):
                while not any(str(job.id) in each and KEYS.feed in each for each in said):
                    said.append((await monitor.next_command())["command"])
                await redis.ping()
                while said[-1] != "PING":
                    said.append((await monitor.next_command())["command"])
        assert sum(each.startswith("EVAL") and str(job.id) in each for each in said) == 1
        await redis.flushdb()


async def test_the_widest_cap_and_the_first_declaration_count(session_maker: SessionMaker) -> None:
    async with session_maker.begin() as session:
        session.add(User(id=1, name=""))
    asked: list[AsyncSession] = []

    def declared(session: AsyncSession) -> dict[str, str]:
        asked.append(session)
        return {}

    async with Coordinator(session_maker, max_waiters=1), Coordinator(session_maker, read_settings=declared):
        async with Coordinator(session_maker, max_waiters=2):
            async with session_maker() as one, session_maker() as two:
                tasks = [waiting(session, User, 1) for session in (one, two)]
                await registered(2)
                assert asked == [one, two]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    async with Coordinator(session_maker, max_waiters=1), session_maker() as one, session_maker() as two:
        task = waiting(one, User, 1)
        await registered()
        with pytest.raises(TooManyWaitersError):
            await wait_for_row_change(two, User, 1)
        task.cancel()
        await asyncio.wait([task])


async def test_the_cap_is_on_the_waits_for_all_engines_together(
    session_maker: SessionMaker, single: AsyncEngine
) -> None:
    async with session_maker.begin() as session:
        session.add(User(id=1, name=""))
    elsewhere = async_sessionmaker(single)
    async with Coordinator(session_maker, max_waiters=1), Coordinator(elsewhere, max_waiters=2):
        async with session_maker() as one, elsewhere() as two, elsewhere() as three:
            tasks = [waiting(session, User, 1) for session in (one, two)]
            await registered(2)
            with pytest.raises(TooManyWaitersError, match="2 waits are as many"):
                await wait_for_row_change(three, User, 1)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def test_an_application_outlives_a_worker_of_its_own_process(
    session_maker: SessionMaker, redis_url: str, database_url: str
) -> None:
    """The worker has the application's engine, and stops first."""
    redis = client(redis_url)
    await redis.flushdb()
    async with Coordinator(session_maker, redis=redis_url, read_settings={}):
        async with session_maker.begin() as session:
            session.add(User(id=1, name=""))
        office = Office(session_maker, redis, redis_url, database_url)
        for _ in range(2):
            async with working(office, [rename], session_maker=session_maker), session_maker() as session:
                user = await session.get(User, 1)
                assert user is not None
                user.name = "new"
                job = await enqueue(session, rename, 1)
                await session.commit()
                done = await wait_for_row_change(session, User, 1, interval=NEVER, timeout=5, job=job)
                assert done.name == "renamed"
            await a_change_is_heard(session_maker)
    await redis.aclose()
