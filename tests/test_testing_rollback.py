"""Sessions that a test rolls back: what handlers and tasks commit is seen by one another, and by nobody afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from coord import Job, create_db_dependency, enqueue, job_transaction
from coord.testing import Drained, assert_enqueued, drain_jobs, refute_enqueued, rolled_back
from tests.models import User

if TYPE_CHECKING:
    from typing import Any

    import asyncpg
    from sqlalchemy.ext.asyncio import async_sessionmaker

    SessionMaker = async_sessionmaker[AsyncSession]


async def name(ctx: dict[str, Any], user_id: int) -> None:
    async with job_transaction(ctx) as session:
        (await session.get_one(User, user_id)).name = "named"


@pytest.fixture
def app(session_maker: SessionMaker, coord_session_maker: SessionMaker) -> FastAPI:
    get_db = create_db_dependency(session_maker)
    app = FastAPI()
    app.dependency_overrides[get_db] = create_db_dependency(coord_session_maker)

    @app.post("/users/{user_id}")
    async def place(user_id: int, fails: bool = False, session: AsyncSession = Depends(get_db)) -> str:
        session.add(User(id=user_id))
        await session.flush()
        await enqueue(session, name, user_id)
        if fails:
            raise HTTPException(409)
        await session.commit()
        return "placed"

    return app


@pytest.fixture
async def client(app: FastAPI) -> Any:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


async def test_handler_task_and_test_meet_in_one_transaction(
    client: httpx.AsyncClient, coord_session: AsyncSession, observer: asyncpg.Connection
) -> None:
    assert (await client.post("/users/1")).json() == "placed"
    await assert_enqueued(coord_session, name, 1)
    assert await drain_jobs([name], session=coord_session) == Drained(done=1)
    assert (await coord_session.get_one(User, 1)).name == "named"
    assert await observer.fetchval("SELECT count(*) FROM users") == 0


async def test_a_handler_that_raises_leaves_neither_row_nor_job(
    client: httpx.AsyncClient, coord_session: AsyncSession
) -> None:
    assert (await client.post("/users/1?fails=true")).status_code == 409
    await refute_enqueued(coord_session, name)
    assert await coord_session.get(User, 1) is None


async def test_nothing_is_left_when_the_block_ends(database_url: str, observer: asyncpg.Connection) -> None:
    async with rolled_back(database_url) as maker:
        async with maker() as session:
            session.add(User(id=1))
            await enqueue(session, name, 1)
            await session.commit()
        async with maker() as session:
            assert await session.scalar(select(func.count()).select_from(Job)) == 1
    assert await observer.fetchval("SELECT (SELECT count(*) FROM users) + (SELECT count(*) FROM coord_jobs)") == 0
    assert await observer.fetchval("SELECT count(*) FROM pg_stat_activity WHERE xact_start < now()") == 0


async def test_options_of_the_maker_are_taken(database_url: str) -> None:
    class Mine(AsyncSession):
        pass

    async with rolled_back(database_url, class_=Mine, info={"tenant": "acme"}) as maker, maker() as session:
        assert isinstance(session, Mine)
        assert session.info["tenant"] == "acme"


async def test_a_commit_of_the_connection_itself_is_told(database_url: str) -> None:
    with pytest.raises(RuntimeError, match="may be in the database for good"):
        async with rolled_back(database_url) as maker, maker() as session:
            await (await session.connection()).commit()


async def test_another_database_than_postgresql_is_refused() -> None:
    with pytest.raises(ValueError, match="coord needs postgresql"):
        async with rolled_back("sqlite+aiosqlite://"):
            pass
