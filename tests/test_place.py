"""The ledger has one place, whatever schema the sessions, and their roles, are in."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from coord import Coordinator, Job, create_ledger, enqueue, get_job, lock_tables, wait_for_row_change
from tests.ledger import a_task, executed
from tests.models import User
from tests.round_trip import rename
from tests.serving import engine_at
from tests.shop import dsn_of, empty_database
from tests.workers import Office, client, working

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PLACE = "The Jobs"


@asynccontextmanager
async def placed(database_url: str, *schemas: str | None) -> AsyncIterator[tuple[str, AsyncEngine, asyncpg.Connection]]:
    """A database of a tenant, with a ledger in each of these schemas."""
    async with empty_database(database_url) as url:
        engine, observer = create_async_engine(url), await asyncpg.connect(dsn_of(url))
        await observer.execute("CREATE SCHEMA acme; CREATE TABLE acme.users (id int PRIMARY KEY, name text NOT NULL)")
        for schema in schemas:
            async with (
                engine_at(url, execution_options={"schema_translate_map": {None: "acme"}}) as maker,
                maker.begin() as connection,
            ):
                await create_ledger(connection, schema=schema)
                assert await connection.scalar(text("SHOW search_path")) == '"$user", public'
        yield url, engine, observer
        await observer.close()
        await engine.dispose()


@pytest.mark.parametrize("way", ["map", "search_path"])
async def test_a_ledger_in_a_schema_of_its_own_is_found_by_everybody(
    database_url: str, redis_url: str, way: str
) -> None:
    ways: dict[str, dict[str, Any]] = {
        "map": {"execution_options": {"schema_translate_map": {None: "acme"}}},
        "search_path": {"connect_args": {"server_settings": {"search_path": "acme"}}},
    }
    tenant = ways[way]
    async with placed(database_url, PLACE) as (url, _, observer):
        engine = create_async_engine(url, **tenant)
        sessions = async_sessionmaker(engine, expire_on_commit=False)
        redis = client(redis_url)
        await redis.flushdb()
        office = Office(sessions, redis, redis_url, url)
        async with (
            Coordinator(sessions, redis=redis_url),
            working(office, [rename], engine=tenant, heartbeat_process=True),
        ):
            async with sessions() as session:
                session.add(User(id=1, name="new"))
                job = await enqueue(session, rename, 1)
                await session.commit()
                with executed(engine) as seen:
                    user = await wait_for_row_change(session, User, 1, job=job)
                    assert user.name == "renamed"
                    assert (await wait_for_row_change(session, Job, job.id, until=lambda job: job.state.is_final)).id
                    assert (await get_job(session, job.id)).state == "done"
                    async with lock_tables(session, [User]):
                        pass
            assert any("coord_lock(" in statement for statement in seen)
        assert await observer.fetchval(f'SELECT count(*) FROM "{PLACE}".coord_jobs') == 1
        assert await observer.fetchval("SELECT count(*) FROM pg_class WHERE relname = 'coord_jobs'") == 1
        await redis.aclose()
        await engine.dispose()


async def test_of_several_ledgers_that_of_the_default_schema_counts_unless_another_is_named(database_url: str) -> None:
    async with placed(database_url, None, "a") as (url, engine, observer):
        another = create_async_engine(url)
        async with another.begin() as connection:
            await create_ledger(connection, schema="a")
        for each, place in ((engine, "public"), (another, "a")):
            async with async_sessionmaker(each).begin() as session:
                await enqueue(session, a_task)
            assert await observer.fetchval(f"SELECT count(*) FROM {place}.coord_jobs") == 1
        await another.dispose()


async def test_of_several_ledgers_none_is_guessed(database_url: str) -> None:
    async with placed(database_url, "a", "b") as (_, engine, _observer):
        async with async_sessionmaker(engine)() as session:
            with pytest.raises(RuntimeError, match=r"a, b.*create_ledger\(connection, schema=…\)"):
                await enqueue(session, a_task)


async def test_a_ledger_that_is_made_later_is_found_then(database_url: str) -> None:
    async with placed(database_url) as (_, engine, observer):
        sessions = async_sessionmaker(engine)
        with pytest.raises(ProgrammingError, match="coord_jobs"):
            async with sessions.begin() as session:
                await enqueue(session, a_task)
        async with engine_at(engine.url) as maker, maker.begin() as connection:
            await create_ledger(connection, schema=PLACE)
        async with sessions.begin() as session:
            await enqueue(session, a_task)
        assert await observer.fetchval(f'SELECT count(*) FROM "{PLACE}".coord_jobs') == 1
