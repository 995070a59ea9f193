"""A client that leaves ends its wait within a second, and leaves nothing behind but its job."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import Request
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from starlette.middleware.base import BaseHTTPMiddleware

from coord import Coordinator, JobState
from coord.http.interruption import while_connected
from tests.counter import changed, counter, do, pass_on, placed, the_job
from tests.raw import call
from tests.serving import all_given_back, eventually, served
from tests.waits import open_waits, registered

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx
    from fastapi import FastAPI
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.usefixtures("orders", "nobody_left_waiting")

ROUTES = {
    "fulfil": ("POST", "/fulfil", {}),
    "fulfil with a key": ("POST", "/fulfil", {"Idempotency-Key": "one"}),
    "poll": ("GET", "", {"If-None-Match": "*", "Prefer": "wait=20"}),
    "head": ("HEAD", "", {"If-None-Match": "*", "Prefer": "wait=20"}),
    "events": ("GET", "/events", {}),
    "events without news": ("GET", "/events", {"Last-Event-ID": "1"}),
}
EVERY_ROUTE = pytest.mark.parametrize("route", ROUTES)


class Counter:
    """A counter of its own engine, with a bell, whose traces can be looked for."""

    def __init__(
        self, app: FastAPI, http: httpx.AsyncClient, engine: AsyncEngine, coordinator: Coordinator, redis: Redis
    ) -> None:
        self.app = app
        self.http = http
        self.engine = engine
        self.coordinator = coordinator
        self.redis = redis

    async def is_connected(self) -> bool:
        return self.coordinator._bell is not None and self.coordinator._bell.connected

    async def left_no_trace(self) -> None:
        """Within a second nobody waits, no channel is subscribed to, and no connection is taken."""
        await eventually(lambda: not open_waits(), within=1)
        await eventually(self._has_unsubscribed, within=1)
        await all_given_back(self.engine, within=1)

    async def _has_unsubscribed(self) -> bool:
        return not await self.redis.pubsub_channels()


@contextlib.asynccontextmanager
async def open_counter(database_url: str, redis_url: str, *middleware: Any) -> AsyncIterator[Counter]:
    engine = create_async_engine(database_url, pool_size=5, max_overflow=0)
    maker = async_sessionmaker(engine, expire_on_commit=False)
    app = counter(maker)
    for dispatch in middleware:
        app.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)
    async with (
        Coordinator(maker, redis=redis_url) as coordinator,
        Redis.from_url(redis_url) as redis,
        served(app) as http,
    ):
        yield Counter(app, http, engine, coordinator, redis)
    await engine.dispose()


@pytest.fixture
async def bell(database_url: str, redis_url: str) -> AsyncIterator[Counter]:
    async with open_counter(database_url, redis_url) as opened:
        await eventually(opened.is_connected)
        yield opened


def tasks() -> set[str]:
    """What runs in this loop, but for what redis-py and uvicorn do between two requests."""
    return {task.get_coro().__qualname__ for task in asyncio.all_tasks() if task is not asyncio.current_task()}  # type: ignore[union-attr]


@EVERY_ROUTE
@pytest.mark.parametrize("leave", ["reset", "close"])
async def test_a_client_that_leaves_ends_its_wait_and_leaves_nothing_but_its_job(
    bell: Counter, session_maker: SessionMaker, route: str, leave: str
) -> None:
    method, suffix, headers = ROUTES[route]
    order_id = await placed(session_maker)
    before = tasks()
    async with call(str(bell.http.base_url), method, f"/orders/{order_id}{suffix}", headers) as leaving:
        await eventually(open_waits)
        await registered()
        if leave == "reset":
            leaving.leave()
        else:
            leaving.writer.close()
        await bell.left_no_trace()
        await eventually(lambda: tasks() <= before, within=1)
    if method == "POST":
        job = await the_job(session_maker)
        assert job.state is JobState.QUEUED
        await do(session_maker, job)
    assert (await bell.http.get(f"/orders/{order_id}")).status_code == 200


async def test_clients_that_stay_are_answered_when_others_leave(bell: Counter, session_maker: SessionMaker) -> None:
    order_id = await placed(session_maker)
    path = f"/orders/{order_id}/fulfil"
    async with contextlib.AsyncExitStack() as stack:
        asked = [
            await stack.enter_async_context(call(str(bell.http.base_url), "POST", path, {"Idempotency-Key": "one"}))
            for _ in range(9)
        ]
        await the_job(session_maker)
        await eventually(lambda: open_waits() == 9)
        for leaving in asked[::2]:
            leaving.leave()
        await eventually(lambda: open_waits() == 4, within=1)
        await do(session_maker, await the_job(session_maker))
        for staying in asked[1::2]:
            assert (await staying.begun()).status == 200
            assert (await staying.json())["status"] == "fulfilled"


async def test_nothing_watches_a_client_that_was_answered(bell: Counter, session_maker: SessionMaker) -> None:
    """The connection is still there, for the next request."""
    order_id, before = await placed(session_maker), tasks()
    async with call(str(bell.http.base_url), "POST", f"/orders/{order_id}/fulfil") as asking:
        await do(session_maker, await the_job(session_maker))
        assert (await asking.begun()).status == 200
        await eventually(lambda: tasks() <= before, within=1)


async def test_a_receive_that_fails_is_not_taken_for_a_disconnect() -> None:
    failed, answered = asyncio.Event(), asyncio.Event()

    async def fail() -> Any:
        failed.set()
        raise RuntimeError("Unexpected message received: http.request")

    working = asyncio.create_task(while_connected(Request({"type": "http"}, fail), answered.wait()))
    await failed.wait()
    for _ in range(10):  # turns of the event loop, in which a departure would end it
        await asyncio.sleep(0)
    answered.set()
    assert await working


async def test_a_client_that_leaves_in_the_middle_of_its_body_starts_no_wait(
    bell: Counter, session_maker: SessionMaker
) -> None:
    path = f"/orders/{await placed(session_maker)}/fulfil"
    headers = {"Content-Length": "100", "Content-Type": "application/json"}
    async with call(str(bell.http.base_url), "POST", path, headers) as leaving:
        await leaving.send(b'{"note": ')
    assert (await bell.http.get("/nowhere")).status_code == 404
    assert not open_waits()


async def test_more_bytes_from_a_waiting_client_are_not_taken_for_a_disconnect(
    bell: Counter, session_maker: SessionMaker, order_id: int
) -> None:
    """More of a body that nobody reads, and the next request on the same connection."""
    path = f"/orders/{order_id}"
    headers = {"If-None-Match": "*", "Prefer": "wait=20", "Content-Length": "6"}
    async with call(str(bell.http.base_url), "GET", path, headers) as asking:
        await asking.send(b"abc")
        await eventually(open_waits)
        await asking.send(b"def")
        await asking.send(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        await registered()
        await changed(session_maker, order_id)
        await asking.begun()
        assert (asking.status, (await asking.json())["status"]) == (200, "fulfilled")
        assert ((await asking.begun()).status, asking.headers["etag"]) == (200, '"2"')


@EVERY_ROUTE
async def test_behind_a_base_http_middleware_waits_end_too(
    database_url: str, redis_url: str, session_maker: SessionMaker, route: str
) -> None:
    """It may hide who leaves; then the cap ends the wait."""
    method, suffix, headers = ROUTES[route]
    order_id = await placed(session_maker)
    async with open_counter(database_url, redis_url, pass_on, pass_on) as bell:
        path = f"/orders/{order_id}{suffix}"
        async with call(str(bell.http.base_url), method, path, {**headers, "Prefer": "wait=2"}) as leaving:
            await eventually(open_waits)
            leaving.leave()
            await eventually(lambda: not open_waits(), within=4)
            await bell.left_no_trace()
        async with call(str(bell.http.base_url), method, path, headers) as staying:
            await eventually(open_waits)
            await registered()
            await changed(session_maker, order_id)
            assert (await staying.begun()).status == 200
