"""The round trip over a real socket, with real workers: what the shop answers is what the database holds."""

from __future__ import annotations

import asyncio
import json
import uuid
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import asyncpg
import httpx
import pytest

from tests.raw import call
from tests.serving import eventually
from tests.shop import (
    API,
    SERVING,
    WORKER,
    WORKING,
    Command,
    dsn_of,
    emptied,
    empty_database,
    running,
    waiting_for_locks,
)
from worker.database import POOL_SIZE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


PROBLEM = "application/problem+json"
MOST = 2**63 - 1


@dataclass
class Shop:
    """An API and two workers, a client, and a look at the database past all of them."""

    http: httpx.AsyncClient
    database: asyncpg.Connection
    workers: list[Command]

    async def stock(self, sku: str, quantity: int) -> None:
        (await self.http.put(f"/stock/{sku}", json={"quantity": quantity})).raise_for_status()

    async def place(self, sku: str, quantity: int) -> int:
        answer = await self.http.post("/orders", json={"sku": sku, "quantity": quantity})
        order_id: int = answer.raise_for_status().json()["id"]
        return order_id

    async def fulfil(self, order_id: int) -> httpx.Response:
        return await self.http.post(f"/orders/{order_id}/fulfil")

    async def left(self, sku: str) -> Any:
        return await self.database.fetchval("SELECT quantity FROM stock WHERE sku = $1", sku)

    async def last_invoice(self) -> Any:
        return await self.database.fetchval("SELECT coalesce(max(invoice_number), 0) FROM orders")

    async def counts(self) -> tuple[int, int]:
        row = await self.database.fetchrow("SELECT (SELECT count(*) FROM orders), (SELECT count(*) FROM stock)")
        return tuple(row)


@pytest.fixture(scope="module")
async def shop(database_url: str, redis_url: str) -> AsyncIterator[Shop]:
    async with AsyncExitStack() as stack:
        await emptied(redis_url)
        url = await stack.enter_async_context(empty_database(database_url))
        workers = [await stack.enter_async_context(running(WORKER, url, redis_url)) for _ in range(2)]
        api = await stack.enter_async_context(running(API, url, redis_url))
        for worker in workers:
            await worker.says(WORKING)
        address = (await api.says(SERVING))[1]
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=address, timeout=40))
        database = await asyncpg.connect(dsn_of(url))
        stack.push_async_callback(database.close)
        yield Shop(http, database, workers)


JOB_OF = "task = 'fulfil_order' AND arguments::text = $1"


async def test_an_order_is_pending_where_its_location_says(shop: Shop) -> None:
    answer = await shop.http.post("/orders", json={"sku": "Tea_1.x-Y", "quantity": 3})
    order = answer.json()
    expected = {"id": order["id"], "sku": "Tea_1.x-Y", "quantity": 3, "status": "pending", "invoice_number": None}
    assert (answer.status_code, answer.headers["location"]) == (201, f"/orders/{order['id']}")
    assert order == expected
    assert (await shop.http.get(answer.headers["location"])).json() == expected


async def test_fulfilling_takes_stock_and_the_next_invoice_number(shop: Shop) -> None:
    await shop.stock("coffee", 5)
    order_id, last = await shop.place("coffee", 3), await shop.last_invoice()
    answer = await shop.fulfil(order_id)
    expected = {"id": order_id, "sku": "coffee", "quantity": 3, "status": "fulfilled", "invoice_number": last + 1}
    assert (answer.status_code, answer.json()) == (200, expected)
    assert await shop.left("coffee") == 2
    assert (await shop.http.get(f"/orders/{order_id}")).json() == expected


async def test_an_order_for_more_than_there_is_is_rejected_and_takes_nothing(shop: Shop) -> None:
    await shop.stock("cocoa", 2)
    last = await shop.last_invoice()
    answer = await shop.fulfil(await shop.place("cocoa", 3))
    assert (answer.status_code, answer.json()["status"], answer.json()["invoice_number"]) == (200, "rejected", None)
    assert (await shop.left("cocoa"), await shop.last_invoice()) == (2, last)


async def test_the_whole_stock_may_be_ordered(shop: Shop) -> None:
    await shop.stock("last", 1)
    assert (await shop.fulfil(await shop.place("last", 1))).json()["status"] == "fulfilled"
    assert await shop.left("last") == 0


async def test_an_unknown_sku_is_accepted_and_later_rejected(shop: Shop) -> None:
    answer = await shop.fulfil(await shop.place("never-stocked", 1))
    assert (answer.status_code, answer.json()["status"]) == (200, "rejected")


async def test_asking_again_is_answered_at_once_and_changes_nothing(shop: Shop) -> None:
    await shop.stock("again", 10)
    order_id = await shop.place("again", 4)
    first = await shop.fulfil(order_id)
    async with asyncio.timeout(5):
        assert (await shop.fulfil(order_id)).json() == first.json()
    jobs = await shop.database.fetchval(f"SELECT count(*) FROM coord_jobs WHERE {JOB_OF}", f"[[{order_id}],{{}}]")
    assert (await shop.left("again"), jobs) == (6, 1)


async def test_clients_who_fulfil_one_order_together_have_one_effect(shop: Shop) -> None:
    await shop.stock("together", 100)
    order_id, last = await shop.place("together", 7), await shop.last_invoice()
    answers = await asyncio.gather(*(shop.fulfil(order_id) for _ in range(10)))
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["invoice_number"] for answer in answers} == {last + 1}
    assert (await shop.left("together"), await shop.last_invoice()) == (93, last + 1)


async def test_orders_that_come_all_at_once_leave_exact_stock_and_no_gap(shop: Shop) -> None:
    await shop.stock("rush", 50)
    orders = await asyncio.gather(*(shop.place("rush", 2) for _ in range(40)))
    answers = [answer.json() for answer in await asyncio.gather(*map(shop.fulfil, orders))]
    assert sorted(answer["status"] for answer in answers) == ["fulfilled"] * 25 + ["rejected"] * 15
    assert await shop.left("rush") == 0
    numbers = await shop.database.fetch("SELECT invoice_number FROM orders WHERE status = 'fulfilled' ORDER BY 1")
    assert [number for (number,) in numbers] == list(range(1, len(numbers) + 1))


@pytest.mark.slow
async def test_a_task_that_finds_the_tables_locked_tries_again(shop: Shop) -> None:
    await shop.stock("locked", 1)
    order_id = await shop.place("locked", 1)
    transaction = shop.database.transaction()
    await transaction.start()
    await shop.database.execute("LOCK TABLE stock IN EXCLUSIVE MODE")
    asking = asyncio.create_task(shop.fulfil(order_id))

    async def retried() -> bool:
        found = f"SELECT attempt > 1 FROM coord_jobs WHERE {JOB_OF}"
        return bool(await shop.database.fetchval(found, f"[[{order_id}],{{}}]"))

    await eventually(retried, within=20)
    await transaction.rollback()
    assert (await asking).json()["status"] == "fulfilled"


async def test_fifty_clients_with_one_key_have_one_job_and_equal_answers(shop: Shop) -> None:
    await shop.stock("fifty", 10)
    order_id = await shop.place("fifty", 2)
    before = await shop.database.fetchval("SELECT count(*) FROM coord_jobs")
    headers = {"Idempotency-Key": '"fifty"'}
    answers = await asyncio.gather(*(shop.http.post(f"/orders/{order_id}/fulfil", headers=headers) for _ in range(50)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert (await shop.database.fetchval("SELECT count(*) FROM coord_jobs"), await shop.left("fifty")) == (
        before + 1,
        8,
    )
    reused = await shop.http.post(f"/orders/{await shop.place('fifty', 2)}/fulfil", headers=headers)
    assert (reused.status_code, reused.headers["content-type"]) == (422, PROBLEM)


async def test_an_order_that_needs_no_job_has_its_key_checked_too(shop: Shop) -> None:
    first, second = await shop.place("never-stocked", 1), await shop.place("never-stocked", 2)
    headers = {"Idempotency-Key": "checked"}
    for order_id, status in ((first, 200), (first, 200), (second, 422)):
        answer = await shop.http.post(f"/orders/{order_id}/fulfil", headers=headers)
        assert answer.status_code == status
    await shop.fulfil(second)
    assert (await shop.http.post(f"/orders/{second}/fulfil", headers=headers)).status_code == 422


async def test_a_job_can_be_looked_at_and_its_order_polled_and_followed(shop: Shop) -> None:
    await shop.stock("followed", 5)
    order_id = await shop.place("followed", 1)
    path, tag = f"/orders/{order_id}", (await shop.http.get(f"/orders/{order_id}")).headers["etag"]
    async with call(str(shop.http.base_url), "GET", f"{path}/events") as stream:
        first = await (await stream.begun()).event()
        assert first is not None
        assert (first.name, first.data["status"]) == ("order", "pending")
        polling = asyncio.create_task(shop.http.get(path, headers={"If-None-Match": tag, "Prefer": "wait=20"}))
        async with shop.database.transaction():  # or the worker may be quicker than the answer
            await shop.database.execute("LOCK TABLE stock IN EXCLUSIVE MODE")
            accepted = await shop.http.post(f"{path}/fulfil", headers={"Prefer": "respond-async"})
        assert (accepted.status_code, accepted.headers["preference-applied"]) == (202, "respond-async")
        assert accepted.json()["order"] == first.data
        changed = await stream.event()
        assert changed is not None
        assert changed.data == (await polling).json() == (await shop.http.get(path)).json()
        assert f'"{changed.id}"' == (await polling).headers["etag"] != tag
    location = accepted.headers["location"]
    async with call(str(shop.http.base_url), "GET", f"{location}/events") as stream:
        await stream.begun()
        events = [event.data["state"] async for event in stream.events()]
    job = {"id": accepted.json()["job"]["id"], "task": "fulfil_order", "state": "done", "attempt": 1, "error": None}
    assert (await shop.http.get(location)).json() == job
    assert events[-1] == "done"


async def test_a_failed_job_is_a_problem_that_does_not_say_how_the_shop_is_made(shop: Shop) -> None:
    order_id = await shop.place("broken", 1)
    await shop.database.execute("ALTER TABLE stock RENAME TO hidden")
    try:
        answer = await shop.fulfil(order_id)
    finally:
        await shop.database.execute("ALTER TABLE hidden RENAME TO stock")
    problem = answer.json()
    assert (answer.status_code, answer.headers["content-type"]) == (500, PROBLEM)
    assert problem["type"] == "urn:coord:problem:job-failed"
    assert problem["detail"].isidentifier()  # the kind of error alone
    job = await shop.http.get(f"/jobs/{problem['job']}")
    assert (job.json()["state"], job.json()["error"]) == ("failed", problem["detail"])
    assert (await shop.fulfil(order_id)).json()["status"] == "rejected"


@pytest.mark.parametrize(("job_id", "status"), [(str(uuid.UUID(int=7)), 404), ("x", 422), ("1", 422), ("%00", 422)])
@pytest.mark.parametrize("suffix", ["", "/events"])
async def test_a_job_that_is_not_there_is_a_404(shop: Shop, job_id: str, status: int, suffix: str) -> None:
    answer = await shop.http.get(f"/jobs/{job_id}{suffix}")
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/jobs"), ("GET", "/jobs/{id}/details"), ("POST", "/jobs/{id}/cancel"), ("POST", "/jobs/{id}/retry")],
)
async def test_without_a_token_the_job_routes_do_not_exist(shop: Shop, method: str, path: str) -> None:
    job_id = await shop.database.fetchval("SELECT id FROM coord_jobs LIMIT 1") or uuid.uuid4()
    headers = {"Authorization": "Bearer anything"}
    answer = await shop.http.request(method, path.format(id=job_id), headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (404, PROBLEM)


async def test_a_task_that_loses_its_connection_tries_again(shop: Shop) -> None:
    await shop.stock("cut", 1)
    order_id = await shop.place("cut", 1)
    transaction = shop.database.transaction()
    await transaction.start()
    await shop.database.execute("LOCK TABLE stock IN EXCLUSIVE MODE")
    asking = asyncio.create_task(shop.fulfil(order_id))

    async def cut() -> Any:
        return await shop.database.fetchval(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_locks WHERE NOT granted AND relation = 'stock'::regclass"
        )

    await eventually(cut)
    await transaction.rollback()
    assert (await asking).json()["status"] == "fulfilled"
    assert await shop.left("cut") == 0


async def test_stock_is_what_was_put_there_last(shop: Shop) -> None:
    for quantity in (0, 7, 1_000_000_000):
        answer = await shop.http.put("/stock/levels", json={"quantity": quantity})
        assert (answer.status_code, answer.json()) == (200, {"sku": "levels", "quantity": quantity})
        assert (await shop.http.get("/stock/levels")).json() == {"sku": "levels", "quantity": quantity}


GOOD = {"sku": "tea", "quantity": 1}
BAD_ORDERS = [
    *({**GOOD, "quantity": quantity} for quantity in (0, -1, 10**20, 1_000_001, True, "3", 1.0, None, [1])),
    *({**GOOD, "sku": sku} for sku in ("", "a" * 65, "a b", "a/b", "a\x00", "té", "tea\n", 3, None)),
    {"sku": "tea"},
    {"quantity": 1},
    [GOOD],
    None,
]
RAW_BODIES = [
    b"",
    b"{",
    b"quantity=1",
    b"\xff\xfe",
    b'{"sku": "\xff", "quantity": 1}',
    b'{"sku": "\\ud800", "quantity": 1}',
    b'{"sku": "\\u0000", "quantity": 1}',
    b'{"sku": "tea", "quantity": NaN}',
    b'{"sku": "tea", "quantity": 1e400}',
    b'{"sku": "tea", "quantity": ' + b"9" * 5000 + b"}",
    b"[" * 100_000,
]


@pytest.mark.parametrize("body", [*(json.dumps(order).encode() for order in BAD_ORDERS), *RAW_BODIES], ids=repr)
async def test_a_bad_order_is_a_problem_and_changes_nothing(shop: Shop, body: bytes) -> None:
    before = await shop.counts()
    answer = await shop.http.post("/orders", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.headers["content-type"]) == (422, PROBLEM)
    assert answer.json()["detail"]
    assert await shop.counts() == before


@pytest.mark.parametrize("quantity", [-1, 1_000_000_001, 10**30, False, "5", 1.5, None])
async def test_a_bad_stock_level_is_refused_and_changes_nothing(shop: Shop, quantity: object) -> None:
    before = await shop.counts()
    answer = await shop.http.put("/stock/refused", json={"quantity": quantity})
    assert (answer.status_code, answer.headers["content-type"]) == (422, PROBLEM)
    assert await shop.counts() == before


@pytest.mark.parametrize("sku", ["a%20b", "%00", "a" * 65, "%F0%9F%8D%B5", "%FF"])
@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_a_bad_sku_in_the_path_is_refused(shop: Shop, method: str, sku: str) -> None:
    answer = await shop.http.request(method, f"/stock/{sku}", json={"quantity": 1})
    assert (answer.status_code, answer.headers["content-type"]) == (422, PROBLEM)


@pytest.mark.parametrize("suffix", ["", "/fulfil"])
@pytest.mark.parametrize("order_id", ["0", "-1", str(MOST), str(-MOST - 1)])
async def test_an_order_that_is_not_there_is_a_404(shop: Shop, order_id: str, suffix: str) -> None:
    answer = await shop.http.request("POST" if suffix else "GET", f"/orders/{order_id}{suffix}")
    assert (answer.status_code, answer.headers["content-type"]) == (404, PROBLEM)


@pytest.mark.parametrize("suffix", ["", "/fulfil"])
@pytest.mark.parametrize("order_id", [str(MOST + 1), str(10**20), "9" * 5000, "x", "1.5", "%00", "NaN"])
async def test_an_id_that_no_order_can_have_is_refused(shop: Shop, order_id: str, suffix: str) -> None:
    answer = await shop.http.request("POST" if suffix else "GET", f"/orders/{order_id}{suffix}")
    assert (answer.status_code, answer.headers["content-type"]) == (422, PROBLEM)


async def test_an_unknown_path_is_a_problem(shop: Shop) -> None:
    for answer, status in (
        (await shop.http.get("/stock/never-stocked"), 404),
        (await shop.http.get("/nowhere"), 404),
        (await shop.http.delete("/orders"), 405),
        (await shop.http.get("/orders"), 405),
    ):
        assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM)
    assert (await shop.http.request("TRACE", "/stock/tea")).headers["allow"] == "GET, HEAD, PUT"
    assert (await shop.http.head("/stock/never-stocked")).status_code == 404


async def test_a_busy_shop_is_a_healthy_one(shop: Shop) -> None:
    transaction = shop.database.transaction()
    await transaction.start()
    await shop.database.execute("LOCK TABLE orders IN EXCLUSIVE MODE")
    placing = [asyncio.create_task(shop.place("tea", 1)) for _ in range(POOL_SIZE + 5)]

    async def every_connection_waits() -> bool:
        return await waiting_for_locks(shop.database, "INSERT") == POOL_SIZE

    await eventually(every_connection_waits)
    answer = await shop.http.get("/healthz")
    await transaction.rollback()
    assert (answer.status_code, answer.json()) == (200, {"postgresql": "ok", "redis": "ok"})
    assert len(set(await asyncio.gather(*placing))) == POOL_SIZE + 5


async def test_healthz_says_that_both_servers_answer(shop: Shop) -> None:
    answer = await shop.http.get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"postgresql": "ok", "redis": "ok"})
