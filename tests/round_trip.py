"""A small application that goes the round trip: enqueue, a worker, the wait, the answer."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession

from coord import Coordinator, create_db_dependency, enqueue, job_transaction, lock_tables, wait_for_row_change
from tests.models import User
from tests.serving import served
from tests.workers import Office, client, working

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx


async def rename(ctx: dict[str, Any], user_id: int) -> None:
    async with job_transaction(ctx) as session, lock_tables(session, [User]):
        (await session.get_one(User, user_id)).name = "renamed"


def application(session_maker: Any, redis_url: str) -> FastAPI:
    """`POST /users/1` answers with the name that a worker has given."""
    app = FastAPI(lifespan=Coordinator(session_maker, redis=redis_url).lifespan)
    get_db = create_db_dependency(session_maker)

    @app.post("/users/{user_id}")
    async def post(user_id: int, session: AsyncSession = Depends(get_db)) -> str:
        user = User(id=user_id, name="new")
        session.add(user)
        job = await enqueue(session, rename, user_id)
        await session.commit()
        user = await wait_for_row_change(session, User, user_id, columns=[User.name], timeout=10, job=job)
        return user.name

    return app


@asynccontextmanager
async def running(
    app: Any, functions: list[Any], session_maker: Any, redis_url: str, database_url: str
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application, beside a worker whose sessions are the application's."""
    redis = client(redis_url)
    await redis.flushdb()
    try:
        office = Office(session_maker, redis, redis_url, database_url)
        async with working(office, functions, session_maker=session_maker), served(app) as found:
            yield found
    finally:
        await redis.aclose()
