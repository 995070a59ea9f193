"""A thousand clients at once, some of whom leave, and five hundred streams: each is told of its own order."""

from __future__ import annotations

import asyncio
import contextlib
import random
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from coord import Coordinator
from tests.counter import changed, counter, placed
from tests.raw import call
from tests.serving import all_given_back, eventually, served
from tests.shop import API, SERVING, WORKER, WORKING, dsn_of, emptied, empty_database, running
from worker.models import OrderStatus

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = [pytest.mark.slow, pytest.mark.alone]

CLIENTS = 1_000
LEAVE_WITHIN = 4.0
"""Seconds in which those who leave do so."""
PATIENCE = 60.0
"""Seconds after which nothing comes any more, on however slow a machine."""


@contextlib.asynccontextmanager
async def shop(database_url: str, redis_url: str) -> AsyncIterator[tuple[str, asyncpg.Connection]]:
    """An API and two workers, and a look at their database."""
    async with AsyncExitStack() as stack:
        await emptied(redis_url)
        url = await stack.enter_async_context(empty_database(database_url))
        workers = [await stack.enter_async_context(running(WORKER, url, redis_url)) for _ in range(2)]
        api = await stack.enter_async_context(running(API, url, redis_url))
        address = (await api.says(SERVING))[1]
        for worker in workers:
            await worker.says(WORKING)
        database = await asyncpg.connect(dsn_of(url))
        stack.push_async_callback(database.close)
        yield address, database
        assert api.count("Traceback|ERROR") == 0, api.lines


class Proxy:
    """Holds every answer back until it is whole, and cuts some connections in the middle of whatever they do."""

    def __init__(self, url: str, chance: random.Random) -> None:
        self._target = urlsplit(url)
        self._chance = chance
        self._passing: set[asyncio.Task[Any]] = set()
        self.cuts = 0

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._pass, "127.0.0.1", 0, backlog=2_048)
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        server.close()
        await asyncio.gather(*self._passing, return_exceptions=True)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._passing.add(task)
        there, back = await asyncio.open_connection(self._target.hostname, self._target.port)
        patience = self._chance.uniform(0, LEAVE_WITHIN) if self._chance.random() < 1 / 3 else None
        try:
            async with asyncio.timeout(patience):
                back.write(await message(reader))
                writer.write(await message(there))
                await writer.drain()
                writer.close()
        except TimeoutError:
            self.cuts += 1
        except (asyncio.IncompleteReadError, OSError):
            pass
        writer.transport.abort()
        back.transport.abort()


async def message(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next((line[16:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: ")), b"0")
    return head + await reader.readexactly(int(length))


@dataclass
class Client:
    """Somebody with an order of a quantity that nobody else has."""

    number: int
    order_id: int
    leaves_after: float | None
    answer: dict[str, Any] | None = None
    put_off: int = 0

    async def ask(self, url: str) -> None:
        """Until there is an answer: who was cut off, or told to ask again, does."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.leaves_after):
                while self.answer is None:
                    with contextlib.suppress(asyncio.IncompleteReadError, OSError):
                        await self._ask_once(url)

    async def _ask_once(self, url: str) -> None:
        path, key = f"/orders/{self.order_id}/fulfil", {"Idempotency-Key": f'"{self.number}"'}
        async with call(url, "POST", path, key) as asking:
            await asking.begun(within=PATIENCE)
            assert asking.status in {200, 202, 503}, asking
            if asking.status == 200:
                self.answer = await asking.json()
            elif asking.status == 503:  # a slow machine: its time was over before its turn came
                self.put_off += 1
                await asyncio.sleep(int(asking.headers["retry-after"]))


async def clients(http: httpx.AsyncClient, database: asyncpg.Connection, chance: random.Random) -> list[Client]:
    """Whose orders are placed already, in one statement."""
    await http.put("/stock/tea", json={"quantity": CLIENTS**2})
    rows = "INSERT INTO orders (sku, quantity) SELECT 'tea', n FROM generate_series(1, $1) AS n RETURNING id, quantity"
    found = []
    for order_id, quantity in await database.fetch(rows, CLIENTS):
        leaves_after = chance.uniform(0, LEAVE_WITHIN) if quantity % 3 == 0 else None
        found.append(Client(quantity, order_id, leaves_after))
    return found


async def test_a_thousand_clients_at_once_are_each_told_of_their_own_order(database_url: str, redis_url: str) -> None:
    """Half of them through a proxy. A third of all leave at random; their orders are fulfilled all the same."""
    chance = random.Random("crowd")
    async with shop(database_url, redis_url) as (address, database):
        async with httpx.AsyncClient(base_url=address, timeout=PATIENCE) as http:
            everybody = await clients(http, database, chance)
            proxy = Proxy(address, chance)
            async with proxy.opened() as url:
                await asyncio.gather(*(client.ask((address, url)[client.number % 2]) for client in everybody))
            assert proxy.cuts > CLIENTS / 20
            for client in everybody:
                if client.leaves_after is None:
                    assert client.answer is not None
                if client.answer is not None:
                    expected = (client.order_id, client.number, "fulfilled")
                    assert (client.answer["id"], client.answer["quantity"], client.answer["status"]) == expected
            assert sum(client.answer is None for client in everybody) > CLIENTS / 20
            assert sum(client.put_off for client in everybody) < CLIENTS / 10
            await fulfilled_without_a_gap(database)
            assert (await http.get("/healthz")).json() == {"postgresql": "ok", "redis": "ok"}


async def fulfilled_without_a_gap(database: asyncpg.Connection) -> None:
    """Every order that was asked for, once all jobs are done."""

    async def all_done() -> bool:
        return bool(await database.fetchval("SELECT bool_and(state = 'done') FROM coord_jobs"))

    await eventually(all_done, within=PATIENCE)
    invoices = await database.fetch("SELECT invoice_number FROM orders ORDER BY 1")
    fulfilled = [number for (number,) in invoices if number is not None]
    assert fulfilled == list(range(1, len(fulfilled) + 1))
    assert len(fulfilled) == await database.fetchval("SELECT count(*) FROM coord_idempotency_keys")


STREAMS, ORDERS, CHANGES = 500, 50, 8


@dataclass
class Follower:
    """One stream, cut off now and then and resumed where it was."""

    order_id: int
    chance: random.Random
    seen: list[int] = field(default_factory=list)
    last: str = ""
    resumed: int = 0

    async def follow(self, url: str) -> None:
        while self.last != OrderStatus.FULFILLED:
            headers = {"Last-Event-ID": str(self.seen[-1])} if self.seen else {}
            async with call(url, "GET", f"/orders/{self.order_id}/events", headers) as stream:
                await stream.begun(within=PATIENCE)
                assert stream.status == 200
                left = self.chance.randint(1, 6) if self.resumed < 3 and self.chance.random() < 1 / 3 else -1
                while left != 0 and self.last != OrderStatus.FULFILLED:
                    event = await stream.event(within=PATIENCE)
                    assert event is not None
                    self.seen.append(int(event.id))
                    self.last = event.data["status"]
                    left -= 1
            self.resumed += 1


async def test_five_hundred_streams_on_a_pool_of_two_are_told_what_lasts(
    database_url: str, redis_url: str, engine: AsyncEngine, session_maker: SessionMaker, orders: None
) -> None:
    """None goes backwards, and what lasts, in the middle and at the end, everybody sees."""
    chance = random.Random(500)
    pool = create_async_engine(database_url, pool_size=2, max_overflow=0)
    maker = async_sessionmaker(pool, expire_on_commit=False)
    order_ids = [await placed(session_maker) for _ in range(ORDERS)]
    followers = [Follower(order_ids[n % ORDERS], random.Random(n)) for n in range(STREAMS)]

    async def flow(last: OrderStatus) -> None:
        async def change(order_id: int) -> None:
            for _ in range(CHANGES - 1):
                await changed(session_maker, order_id, OrderStatus.PENDING)
                await asyncio.sleep(chance.uniform(0, 0.2))
            await changed(session_maker, order_id, last)

        await asyncio.gather(*map(change, order_ids))

    def all_have_seen(version: int) -> bool:
        return all(follower.seen and follower.seen[-1] == version for follower in followers)

    async with AsyncExitStack() as stack:
        stack.push_async_callback(pool.dispose)
        await stack.enter_async_context(Coordinator(session_maker, redis=redis_url))
        await stack.enter_async_context(Coordinator(maker, redis=redis_url))
        http = await stack.enter_async_context(served(counter(maker)))
        async with asyncio.TaskGroup() as following:
            for follower in followers:
                following.create_task(follower.follow(str(http.base_url)))
            await eventually(lambda: all_have_seen(1), within=PATIENCE)
            await flow(OrderStatus.PENDING)
            await eventually(lambda: all_have_seen(1 + CHANGES), within=PATIENCE)
            await all_given_back(pool, within=PATIENCE)
            await flow(OrderStatus.FULFILLED)
            await eventually(lambda: all_have_seen(1 + 2 * CHANGES), within=PATIENCE)
    for follower in followers:
        assert follower.seen == sorted({*follower.seen})
        assert follower.seen[-1] == 1 + 2 * CHANGES
        assert 1 + CHANGES in follower.seen
    assert sum(follower.resumed > 1 for follower in followers) > STREAMS / 10
