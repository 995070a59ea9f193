"""`run_worker`: a real worker in the test's event loop, and the whole round trip of a request."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from coord import (
    Coordinator,
    Job,
    JobState,
    create_db_dependency,
    enqueue,
    job_transaction,
    wait_for_row_change,
    worker_settings,
)
from coord.testing import Servers, run_worker
from tests.models import User
from tests.serving import engine_at, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    SessionMaker = async_sessionmaker[AsyncSession]


async def name(ctx: dict[str, Any], user_id: int) -> None:
    async with job_transaction(ctx) as session:
        (await session.get_one(User, user_id)).name = "named"


@pytest.fixture
async def maker(coord_database: Servers) -> AsyncIterator[SessionMaker]:
    async with engine_at(coord_database.database_url) as engine:
        yield async_sessionmaker(engine, expire_on_commit=False)


def settings_of(maker: SessionMaker, servers: Servers, **options: Any) -> type:
    return worker_settings([name], session_maker=maker, redis=servers.redis_url, max_jobs=2, **options)


def an_app(maker: SessionMaker) -> FastAPI:
    get_db = create_db_dependency(maker)
    app = FastAPI()

    @app.post("/users/{user_id}")
    async def place(user_id: int, session: AsyncSession = Depends(get_db)) -> str:
        user = User(id=user_id)
        session.add(user)
        job = await enqueue(session, name, user_id)
        await session.commit()
        await wait_for_row_change(session, User, user_id, columns=[User.name], timeout=20, job=job)
        return user.name

    return app


async def test_a_request_is_answered_by_a_worker_in_the_same_loop(maker: SessionMaker, coord_database: Servers) -> None:
    transport = httpx.ASGITransport(an_app(maker))
    async with Coordinator(maker, redis=coord_database.redis_url), run_worker(settings_of(maker, coord_database)):
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answers = await asyncio.gather(*(client.post(f"/users/{number}") for number in range(5)))
    assert [answer.json() for answer in answers] == ["named"] * 5


async def test_a_request_over_a_socket_is(maker: SessionMaker, coord_database: Servers) -> None:
    async with Coordinator(maker, redis=coord_database.redis_url), run_worker(settings_of(maker, coord_database)):
        async with served(an_app(maker)) as client:
            assert (await client.post("/users/1")).json() == "named"


async def test_jobs_of_a_worker_that_has_stopped_wait_for_the_next(
    maker: SessionMaker, coord_database: Servers
) -> None:
    settings = settings_of(maker, coord_database)
    async with run_worker(settings):
        pass
    async with maker() as session:
        session.add(User(id=1))
        job = await enqueue(session, name, 1)
        await session.commit()
    async with run_worker(settings), maker() as session:
        await wait_for_row_change(session, User, 1, until=lambda user: user.name == "named", timeout=20)
        assert (await session.get_one(Job, job.id)).state == JobState.DONE


@pytest.mark.parametrize("error", [ZeroDivisionError("of on_startup"), SystemExit("refused")])
async def test_a_worker_that_does_not_start_says_why(
    maker: SessionMaker, coord_database: Servers, error: BaseException
) -> None:
    async def on_startup(ctx: dict[str, Any]) -> None:
        raise error

    with pytest.raises((ZeroDivisionError, RuntimeError), match=r"of on_startup|refused"):
        async with run_worker(settings_of(maker, coord_database, on_startup=on_startup)):
            pytest.fail("entered")


async def test_what_is_no_settings_class_is_refused() -> None:
    with pytest.raises(TypeError, match="a class that worker_settings has made"):
        async with run_worker(User):
            pass


async def test_each_test_has_an_empty_database_and_redis(
    maker: SessionMaker, coord_database: Servers, database_url: str
) -> None:
    assert coord_database.database_url != database_url
    async with maker() as session:
        assert await session.get(User, 1) is None
