"""What a request may cost: its size, and its time until the answer begins, whatever it is that a handler waits for."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import Depends, FastAPI, Request
from fastapi.responses import StreamingResponse
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from starlette.middleware.base import BaseHTTPMiddleware

from coord import create_db_dependency, lock_tables
from coord.cancellation import uninterrupted
from coord.http import RequestLimits, problem_handlers
from tests.counter import PROBLEM, URN, pass_on
from tests.proxy import Proxy
from tests.raw import call
from tests.serving import engine_at, eventually, served
from tests.shop import waiting_for_locks
from worker.models import Order

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import asyncpg

    SessionMaker = async_sessionmaker[AsyncSession]

AT_ONCE = {"Prefer": "wait=0"}
OUT_OF_TIME = (503, f"{URN}out-of-time")


class Service:
    """Handlers that wait for whatever there is to wait for."""

    def __init__(self, maker: SessionMaker, **limits: Any) -> None:
        self.app = app = FastAPI(exception_handlers=problem_handlers())
        app.add_middleware(RequestLimits, **limits)
        self.calls: list[str] = []
        self.go_on = threading.Event()
        get_db = create_db_dependency(maker)

        @app.post("/json")
        async def read_json(body: dict[str, Any]) -> int:
            return len(body)

        @app.post("/bytes")
        async def read_bytes(request: Request) -> int:
            self.calls.append("bytes")
            return len(await request.body())

        @app.get("/select")
        async def select(session: AsyncSession = Depends(get_db)) -> Any:
            return await session.scalar(text("SELECT 1"))

        @app.post("/order")
        async def order(session: AsyncSession = Depends(get_db)) -> None:
            session.add(Order(sku="tea", quantity=1))

        @app.post("/lock")
        async def lock(session: AsyncSession = Depends(get_db)) -> None:
            async with lock_tables(session, [Order], timeout=60):
                pass

        @app.get("/stubborn")
        async def stubborn() -> str:
            await uninterrupted(asyncio.to_thread(self.go_on.wait, 20))
            return "late"

        @app.get("/timeout")
        async def timeout() -> None:
            raise TimeoutError

        @app.get("/stream")
        async def stream() -> StreamingResponse:
            return StreamingResponse(self.numbers())

    async def numbers(self) -> AsyncIterator[str]:
        yield "first"
        await asyncio.to_thread(self.go_on.wait, 20)
        yield "last"


@pytest.fixture
def service(session_maker: SessionMaker) -> Service:
    return Service(session_maker, margin=0.3, body=1_000, head=2_000)


async def in_chunks(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def test_a_body_that_says_it_is_too_large_is_refused_unread(service: Service) -> None:
    async with served(service.app) as client:
        async with call(str(client.base_url), "POST", "/bytes", {"Content-Length": "1001"}) as refused:
            await refused.begun()
            assert (refused.status, refused.headers["content-type"]) == (413, PROBLEM)
        assert service.calls == []
        assert (await client.post("/bytes", content=b"x" * 1_000)).json() == 1_000


@pytest.mark.parametrize("path", ["/bytes", "/json"])
async def test_a_body_that_does_not_say_so_is_refused_too(service: Service, path: str) -> None:
    headers = {"content-type": "application/json"}
    async with served(service.app) as client:
        answer = await client.post(path, content=in_chunks(b'{"a": "', b"x" * 1_000, b'"}'), headers=headers)
        assert (answer.status_code, answer.headers["content-type"]) == (413, PROBLEM)
        assert "1000 bytes" in answer.json()["detail"]
        assert (
            await client.post("/json", content=in_chunks(b'{"a": "', b"x" * 900, b'"}'), headers=headers)
        ).json() == 1


async def test_a_head_that_is_too_large_is_refused(service: Service) -> None:
    async with served(service.app) as client:
        for answer in (
            await client.get("/select", headers={"x": "y" * 2_000}),
            await client.get("/select", headers=[("x", "y" * 50)] * 40),
            await client.get(f"/select?{'x' * 2_000}"),
            await client.get(f"/{'x' * 2_000}"),
        ):
            assert (answer.status_code, answer.headers["content-type"]) == (431, PROBLEM)
        assert (await client.get("/select", headers={"x": "y" * 1_000})).json() == 1


async def test_an_upload_that_takes_too_long_is_a_408_and_the_end_of_the_connection(service: Service) -> None:
    headers = {**AT_ONCE, "Content-Length": "100", "Content-Type": "application/json"}
    async with served(service.app) as client:
        for path in ("/bytes", "/json"):
            async with call(str(client.base_url), "POST", path, headers) as slow:
                await slow.send(b'{"a": ')
                await slow.begun(within=5)
                assert (slow.status, slow.headers["content-type"]) == (408, PROBLEM)
                assert slow.headers["connection"] == "close"
                await slow.json()
                async with asyncio.timeout(5):
                    assert await slow.reader.read() == b""
        async with call(str(client.base_url), "POST", "/bytes", {"Content-Length": "6"}) as steady:
            await steady.send(b"abc")
            await eventually(lambda: service.calls.count("bytes") == 2)
            await steady.send(b"def")
            assert (await steady.begun()).status == 200


async def test_a_pool_that_somebody_holds_is_waited_for_until_the_deadline(database_url: str) -> None:
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0)
    async with served(Service(async_sessionmaker(engine), margin=0.5).app) as client:
        async with engine.connect():
            answer = await client.get("/select", headers={"Prefer": "wait=1"})
            assert (answer.status_code, answer.json()["type"]) == OUT_OF_TIME
            assert int(answer.headers["retry-after"]) >= 1
            assert 1.4 < answer.elapsed.total_seconds() < 3
        assert (await client.get("/select")).json() == 1  # and nobody else took the one connection
    assert "Current Checked out connections: 0" in engine.pool.status()
    await engine.dispose()


@pytest.mark.usefixtures("orders")
@pytest.mark.parametrize("path", ["/order", "/lock"])
async def test_a_table_that_somebody_has_locked_is_waited_for_until_the_deadline(
    service: Service, path: str, observer: asyncpg.Connection
) -> None:
    async with served(service.app) as client:
        async with observer.transaction():
            await observer.execute("LOCK TABLE orders IN EXCLUSIVE MODE")
            asking = asyncio.create_task(client.post(path, headers={"Prefer": "wait=1"}))
            await eventually(lambda: waiting_for_locks(observer))
            answer = await asking
            assert (answer.status_code, answer.json()["type"]) == OUT_OF_TIME
            assert answer.elapsed.total_seconds() < 3
            assert await waiting_for_locks(observer) == 0
        assert await observer.fetchval("SELECT count(*) FROM orders") == 0
        assert (await client.post(path)).status_code == 200


@pytest.mark.usefixtures("orders")
async def test_nobody_waits_longer_than_the_cap(session_maker: SessionMaker, observer: asyncpg.Connection) -> None:
    async with served(Service(session_maker, wait=0.2, margin=0.2).app) as client:
        async with observer.transaction():
            await observer.execute("LOCK TABLE orders IN ACCESS EXCLUSIVE MODE")
            answer = await client.post("/order", headers={"Prefer": "wait=1000"})
    assert (answer.status_code, answer.json()["type"]) == OUT_OF_TIME
    assert answer.elapsed.total_seconds() < 2


async def test_a_handler_that_does_not_stop_is_answered_for(service: Service) -> None:
    async with served(service.app) as client:
        answer = await client.get("/stubborn", headers=AT_ONCE)
        assert (answer.status_code, answer.json()["type"]) == OUT_OF_TIME
        assert answer.elapsed.total_seconds() < 3
        assert not service.go_on.is_set()
        assert (await client.get("/select")).json() == 1
        service.go_on.set()
        assert (await client.get("/stubborn")).json() == "late"


async def test_what_a_handler_sends_after_the_deadline_is_dropped() -> None:
    said: list[dict[str, Any]] = []
    refused = asyncio.Event()

    async def late(_scope: Any, _receive: Any, send: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await refused.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"late"})

    async def say(message: Any) -> None:
        said.append(message)
        refused.set()

    async def hear() -> Any:
        return {"type": "http.request"}

    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": []}
    async with asyncio.timeout(5):
        await RequestLimits(late, wait=0, margin=0.05)(scope, hear, say)
    assert [message.get("status", 503) for message in said] == [503, 503]


@pytest.mark.usefixtures("orders")
@pytest.mark.parametrize(("method", "path"), [("GET", "/select"), ("POST", "/order"), ("POST", "/lock")])
async def test_a_database_that_does_not_answer_holds_no_request(database_url: str, method: str, path: str) -> None:
    async with Proxy(database_url).opened() as way:
        async with engine_at(way.url) as engine, served(Service(async_sessionmaker(engine), margin=0.3).app) as client:
            assert (await client.get("/select")).json() == 1
            way.flows.clear()
            try:
                answer = await client.request(method, path, headers=AT_ONCE)
            finally:
                way.flows.set()
            assert (answer.status_code, answer.json()["type"]) == OUT_OF_TIME
            assert answer.elapsed.total_seconds() < 3
            assert (await client.get("/select")).json() == 1


async def test_a_stream_that_has_begun_takes_as_long_as_it_takes(service: Service) -> None:
    async with served(service.app) as client, call(str(client.base_url), "GET", "/stream", AT_ONCE) as stream:
        await stream.begun()
        assert await stream.text() == "first"
        assert (await client.get("/stubborn", headers=AT_ONCE)).status_code == 503  # which takes as long as is allowed
        service.go_on.set()
        assert (await stream.text(), await stream.text()) == ("last", "")


async def test_a_timeout_of_the_handlers_own_is_a_bug_of_its_own(service: Service) -> None:
    async with served(service.app) as client:
        answer = await client.get("/timeout")
    assert (answer.status_code, answer.json()["type"]) == (500, "about:blank")


async def test_the_deadline_holds_behind_a_base_http_middleware_too(service: Service) -> None:
    service.app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    async with served(service.app) as client:
        answer = await client.get("/stubborn", headers=AT_ONCE)
        assert (answer.status_code, answer.json()["type"]) == OUT_OF_TIME
        service.go_on.set()
