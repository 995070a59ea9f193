"""SQLModel: its models, and its own session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlmodel import Field, SQLModel, select
from sqlmodel.ext.asyncio.session import AsyncSession

from coord import (
    Coordinator,
    create_db_dependency,
    create_ledger,
    enqueue,
    job_transaction,
    lock_tables,
    wait_for_row_change,
)
from tests.pooler import UNTOLD
from tests.round_trip import running
from tests.shop import empty_database

if TYPE_CHECKING:
    from collections.abc import Mapping


class Hero(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    name: str
    level: int = 0


async def train(ctx: dict[str, Any], hero_id: int) -> None:
    async with job_transaction(ctx) as session, lock_tables(session, [Hero]):
        hero = await session.get_one(Hero, hero_id)
        hero.level += 1


@pytest.mark.parametrize("read_settings", [None, {}], ids=["undeclared", "declared"])
async def test_a_hero_is_trained_before_the_answer(
    database_url: str, redis_url: str, read_settings: Mapping[str, str] | None
) -> None:
    async with empty_database(database_url) as url:
        engine = create_async_engine(url, pool_size=15, **UNTOLD)
        async with engine.begin() as connection:
            await connection.run_sync(SQLModel.metadata.create_all)
            await create_ledger(connection)
        maker: Any = async_sessionmaker(engine, class_=AsyncSession, expire_on_commit=False)
        app = FastAPI(lifespan=Coordinator(maker, redis=redis_url, read_settings=read_settings).lifespan)
        get_db = create_db_dependency(maker)

        @app.post("/heroes", response_model=Hero)
        async def post(hero: Hero, session: AsyncSession = Depends(get_db)) -> Hero:
            session.add(hero)
            await session.flush()
            assert hero.id is not None
            job = await enqueue(session, train, hero.id)
            await session.commit()
            trained = await wait_for_row_change(session, Hero, hero.id, columns=["level"], timeout=10, job=job)
            assert trained is hero
            assert (await session.exec(select(Hero))).one() is hero
            return trained

        async with running(app, [train], maker, redis_url, url) as http:
            answer = await http.post("/heroes", json={"name": "Tea"})
            assert answer.json() == {"id": 1, "name": "Tea", "level": 1}
        await engine.dispose()
