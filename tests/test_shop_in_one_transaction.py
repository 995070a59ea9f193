"""The shop tested with coord's own kit, as a user tests an application: in one transaction, and once the whole way."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import httpx
import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from api import app
from api.sessions import get_db
from coord import Coordinator, Job, create_db_dependency, create_ledger, task_options, worker_settings
from coord.testing import Drained, assert_enqueued, drain_jobs, perform, refute_enqueued, run_worker
from worker.fulfilment import fulfil_order
from worker.models import Base, Order, OrderStatus, Stock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from coord.testing import Servers

    SessionMaker = async_sessionmaker[AsyncSession]

AT_ONCE = {"Prefer": "wait=0"}


@pytest.fixture
async def session(coord_session: AsyncSession) -> AsyncSession:
    """With the shop's tables, which `coord_schema` would make if these were the only tests."""
    await (await coord_session.connection()).run_sync(Base.metadata.create_all)
    coord_session.add(Stock(sku="tea", quantity=3))
    await coord_session.commit()
    return coord_session


@pytest.fixture
async def client(session: AsyncSession, coord_session_maker: SessionMaker) -> AsyncIterator[httpx.AsyncClient]:
    app.dependency_overrides[get_db] = create_db_dependency(coord_session_maker)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client
    app.dependency_overrides.clear()


async def test_an_order_is_placed_asked_for_and_fulfilled(session: AsyncSession, client: httpx.AsyncClient) -> None:
    placed = (await client.post("/orders", json={"sku": "tea", "quantity": 2})).json()
    answer = await client.post(f"/orders/{placed['id']}/fulfil", headers=AT_ONCE)
    assert (answer.status_code, answer.json()["job"]["state"]) == (202, "queued")
    job = await assert_enqueued(session, fulfil_order, placed["id"])
    assert await drain_jobs([fulfil_order], session=session) == Drained(done=1)
    assert (await client.get(answer.headers["Location"])).json()["state"] == "done"
    order = (await client.get(f"/orders/{placed['id']}")).json()
    assert (order["status"], order["invoice_number"]) == ("fulfilled", 1)
    assert (await session.get_one(Job, job.id)).unique_key == f"order {placed['id']}"


async def test_an_order_that_is_asked_for_twice_has_one_job(session: AsyncSession, client: httpx.AsyncClient) -> None:
    order = Order(sku="tea", quantity=1)
    session.add(order)
    await session.commit()
    answers = [(await client.post(f"/orders/{order.id}/fulfil", headers=AT_ONCE)).json() for _ in range(2)]
    assert answers[0]["job"]["id"] == answers[1]["job"]["id"]
    await assert_enqueued(session, task_options(fulfil_order, unique_key=f"order {order.id}"), order.id)


async def test_an_order_of_more_than_there_is_is_rejected(session: AsyncSession) -> None:
    order = Order(sku="tea", quantity=4)
    session.add(order)
    await session.flush()
    await perform(fulfil_order, order.id, session=session)
    await session.refresh(order)
    assert (order.status, order.invoice_number) == (OrderStatus.REJECTED, None)


async def test_an_order_that_does_not_exist_enqueues_nothing(session: AsyncSession, client: httpx.AsyncClient) -> None:
    assert (await client.post("/orders/77/fulfil", headers=AT_ONCE)).status_code == 404
    await refute_enqueued(session, fulfil_order)


async def test_orders_are_fulfilled_by_a_worker_while_their_requests_wait(coord_database: Servers) -> None:
    engine = create_async_engine(coord_database.database_url, pool_size=10)
    session_maker = async_sessionmaker(engine, expire_on_commit=False)
    async with engine.begin() as connection:
        await create_ledger(connection)
        await connection.run_sync(Base.metadata.create_all)
    async with session_maker.begin() as session:
        session.add(Stock(sku="tea", quantity=3))
        orders = [Order(sku="tea", quantity=1) for _ in range(4)]
        session.add_all(orders)
    redis = coord_database.redis_url
    settings = worker_settings([fulfil_order], session_maker=session_maker, redis=redis, max_jobs=5)
    app.dependency_overrides[get_db] = create_db_dependency(session_maker)
    try:
        async with Coordinator(session_maker, redis=redis, read_settings={}), run_worker(settings):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                answers = await asyncio.gather(*(client.post(f"/orders/{order.id}/fulfil") for order in orders))
    finally:
        app.dependency_overrides.clear()
        await engine.dispose()
    assert sorted(answer.json()["status"] for answer in answers) == ["fulfilled"] * 3 + ["rejected"]
    assert sorted(answer.json()["invoice_number"] or 0 for answer in answers) == [0, 1, 2, 3]
