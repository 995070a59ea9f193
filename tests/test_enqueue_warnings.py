"""What would otherwise go wrong without a word: an enqueue that nobody commits, and a process without a coordinator."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi.responses import StreamingResponse
from sqlalchemy.ext.asyncio import AsyncSession

from coord import create_db_context, create_db_dependency, enqueue, get_transaction
from tests import warm
from tests.counter import jobs_of
from tests.ledger import a_task
from tests.serving import eventually, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from sqlalchemy.ext.asyncio import async_sessionmaker

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.usefixtures("ledger")


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, "coord.session")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "coord.session"]


def application(maker: SessionMaker) -> FastAPI:
    app = FastAPI()
    get_db = create_db_dependency(maker)

    async def later(session: AsyncSession, commits: bool) -> None:
        await enqueue(session, a_task, 1)
        if commits:
            await session.commit()

    @app.post("/background")
    async def background(
        tasks: BackgroundTasks, commits: bool = False, session: AsyncSession = Depends(get_db)
    ) -> None:
        tasks.add_task(later, session, commits)

    @app.post("/stream")
    async def stream(commits: bool = False, session: AsyncSession = Depends(get_db)) -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            yield "begun"
            await later(session, commits)

        return StreamingResponse(body())

    return app


@pytest.mark.parametrize("commits", [False, True])
@pytest.mark.parametrize("path", ["/background", "/stream"])
async def test_an_enqueue_after_the_requests_commit_is_warned_of_unless_it_is_committed(
    session_maker: SessionMaker, warnings: Callable[[], list[str]], path: str, commits: bool
) -> None:
    async with served(application(session_maker)) as client:
        assert (await client.post(path, params={"commits": commits})).status_code == 200
        if not commits:
            await eventually(lambda: warnings())
    assert len(await jobs_of(session_maker)) == commits
    assert len(warnings()) == (not commits)
    if not commits:
        assert "a_task" in warnings()[0]
        assert "without a commit" in warnings()[0]


async def closes(maker: SessionMaker) -> None:
    async with maker() as session:
        await enqueue(session, a_task, 1)


async def closes_after_a_savepoint(maker: SessionMaker) -> None:
    async with maker() as session:
        async with session.begin_nested():
            await enqueue(session, a_task, 1)


async def commits(maker: SessionMaker) -> None:
    async with maker() as session:
        await enqueue(session, a_task, 1)
        await session.commit()


async def commits_a_block(maker: SessionMaker) -> None:
    async with maker() as session, get_transaction(session), get_transaction(session):
        await enqueue(session, a_task, 1)


async def commits_a_context(maker: SessionMaker) -> None:
    async with create_db_context(maker)() as session:
        await enqueue(session, a_task, 1)


async def rolls_back(maker: SessionMaker) -> None:
    async with maker() as session:
        await enqueue(session, a_task, 1)
        await session.rollback()


async def raises(maker: SessionMaker) -> None:
    with pytest.raises(KeyError):
        async with create_db_context(maker)() as session:
            await enqueue(session, a_task, 1)
            raise KeyError


@pytest.mark.parametrize("act", [closes, closes_after_a_savepoint])
async def test_a_session_that_is_closed_with_an_enqueue_uncommitted_says_so(
    session_maker: SessionMaker, warnings: Callable[[], list[str]], act: Callable[[SessionMaker], Awaitable[None]]
) -> None:
    await act(session_maker)
    assert len(warnings()) == 1
    assert await jobs_of(session_maker) == []


@pytest.mark.parametrize("act", [commits, commits_a_block, commits_a_context, rolls_back, raises])
async def test_an_enqueue_that_was_committed_or_rolled_back_is_not_warned_of(
    session_maker: SessionMaker, warnings: Callable[[], list[str]], act: Callable[[SessionMaker], Awaitable[None]]
) -> None:
    await act(session_maker)
    assert warnings() == []


PROCESS = """
import asyncio, os, sys
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from coord import Coordinator, Job, WaitTimeoutError, enqueue, wait_for_row_change

async def act(maker, what):
    async with maker() as session:
        job = await enqueue(session, "task") if "enqueue" in what else None
        await session.commit()
        if "wait" in what:
            seen = {"attempt": 1}
            try:
                await wait_for_row_change(session, Job, sys.argv[2], since=seen, columns=["attempt"], timeout=0.1)
            except WaitTimeoutError:
                pass

async def main():
    engine = create_async_engine(os.environ["COORD_DATABASE_URL"])
    maker = async_sessionmaker(engine, expire_on_commit=False)
    for what in sys.argv[1].split(","):
        if "coordinated" in what:
            async with Coordinator(maker, redis=os.environ["COORD_REDIS_URL"] if "redis" in what else None):
                await act(maker, what)
        else:
            await act(maker, what)
    await engine.dispose()

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("acts", "lines"),
    [
        ("enqueue", 1),
        ("wait", 1),
        ("enqueue,enqueue,wait,wait", 1),
        ("enqueue-wait-coordinated-redis", 0),
        ("enqueue-wait-coordinated", 0),
        ("enqueue-coordinated-redis,enqueue", 1),
    ],
)
async def test_a_process_without_a_coordinator_says_so_once(
    database_url: str, redis_url: str, session_maker: SessionMaker, acts: str, lines: int
) -> None:
    async with session_maker() as session, session.begin():
        job = await enqueue(session, a_task, 1)
    environment: dict[str, Any] = {**os.environ, "COORD_DATABASE_URL": database_url, "COORD_REDIS_URL": redis_url}
    status, _, said = await warm.ended("-c", PROCESS, acts, str(job.id), env=environment)
    assert status == 0, said
    assert said.count("No Coordinator is open in this process") == len(said.splitlines()) == lines, said
