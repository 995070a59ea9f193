"""What must hold after the storm, looked up in the database."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import asyncpg

from tests.chaos.customers import LATE, PATIENCE, Customer
from tests.shop import dsn_of

if TYPE_CHECKING:
    from collections.abc import Iterator

FINAL_SECONDS = 30.0
ANSWERED = 0.8
ORDERS = "SELECT id, sku, quantity, status, invoice_number, version FROM orders"
JOBS = "SELECT id, state, attempt, error, (arguments->0->>0)::bigint AS order_id FROM coord_jobs"
OLDEST = """
    SELECT extract(epoch FROM clock_timestamp() - greatest(min(created_at), $1))::float8
    FROM coord_jobs WHERE state = 'queued' HAVING count(*) > 0
"""
HELD = """
    SELECT count(*) FROM pg_locks AS held JOIN pg_class AS class ON class.oid = held.relation
    WHERE class.relname IN ('orders', 'stock') AND held.mode = 'ShareRowExclusiveLock'
"""


class Found(NamedTuple):
    """The database, as it is in the end."""

    orders: dict[int, asyncpg.Record]
    stock: dict[str, int]
    jobs: list[asyncpg.Record]
    held: int


async def settled(database_url: str, serving: asyncio.Task[None]) -> float:
    """The most seconds that a job has been unfinished, from now on or from when it was enqueued.

    Returns when everybody is served and all jobs are final, or one is late.
    """
    connection = await asyncpg.connect(dsn_of(database_url))
    try:
        since, longest = await connection.fetchval("SELECT now()"), 0.0
        while True:
            age = await connection.fetchval(OLDEST, since)
            longest = max(longest, age or 0.0)
            if longest > FINAL_SECONDS or (age is None and serving.done()):
                return longest
            await asyncio.sleep(0.2)  # until another process has written
    finally:
        await connection.close()


async def found_in(database_url: str) -> Found:
    connection = await asyncpg.connect(dsn_of(database_url))
    try:
        orders = {row["id"]: row for row in await connection.fetch(ORDERS)}
        stock = {row["sku"]: row["quantity"] for row in await connection.fetch("SELECT sku, quantity FROM stock")}
        return Found(orders, stock, await connection.fetch(JOBS), await connection.fetchval(HELD))
    finally:
        await connection.close()


def broken(crowd: list[Customer], stock: dict[str, int], final: float, found: Found) -> Iterator[str]:
    """What does not hold, a line each."""
    if final > FINAL_SECONDS:
        yield f"a job was not final {FINAL_SECONDS:g} s after the last fault, or after it was enqueued"
    yield from _answers(crowd, found)
    yield from _jobs(crowd, found)
    yield from effects(stock, found)


def answered_in_the_calm(crowd: list[Customer]) -> tuple[int, int]:
    """Of the requests sent while both servers were up: how many were answered with their effect, and how many."""
    asked = [asked for customer in crowd for asked in customer.asked if asked.in_the_calm]
    return sum(one.has_effect for one in asked), len(asked)


def _answers(crowd: list[Customer], found: Found) -> Iterator[str]:
    lost = [customer for customer in crowd if not customer.served]
    if lost:
        yield f"{len(lost)} customers were never served, such as {lost[:3]}"
    late = [asked.seconds for customer in crowd for asked in customer.asked if asked.seconds > PATIENCE + LATE]
    if late:
        yield f"{len(late)} waits ended up to {max(late) - PATIENCE:.1f} s after their deadline"
    for customer in crowd:
        for asked in customer.asked:
            if asked.order is not None:
                row = found.orders[asked.order["id"]]
                differing = {name: value for name, value in asked.order.items() if row[name] != value}
                if differing:
                    yield f"customer {customer.number} was told {differing}, but it is {row}"
    effect, all_of_them = answered_in_the_calm(crowd)
    if effect < ANSWERED * all_of_them:
        yield f"only {effect} of {all_of_them} requests sent while the servers were up were answered with their effect"


def _jobs(crowd: list[Customer], found: Found) -> Iterator[str]:
    states = Counter(job["state"] for job in found.jobs)
    if set(states) != {"done"}:
        yield f"jobs are {dict(states)}, such as {next(job for job in found.jobs if job['state'] != 'done')}"
    doubled = [order for order, count in Counter(job["order_id"] for job in found.jobs).items() if count > 1]
    if doubled:
        yield f"{len(doubled)} orders have more than one job, such as {doubled[:5]}"
    wanted = {customer.order_id for customer in crowd if customer.served}
    if missing := wanted - {job["order_id"] for job in found.jobs}:
        yield f"orders {sorted(map(str, missing))[:5]} were promised, but have no job"


def effects(stock: dict[str, int], found: Found) -> Iterator[str]:
    for job in found.jobs:
        order = found.orders[job["order_id"]]
        if order["status"] == "pending" or order["version"] != 2:
            yield f"{order} was not dealt with exactly once"
    invoices = sorted(row["invoice_number"] for row in found.orders.values() if row["status"] == "fulfilled")
    if invoices != list(range(1, len(invoices) + 1)):
        yield f"the invoices do not run from 1 to {len(invoices)}"
    for sku, had in stock.items():
        sold = sum(
            row["quantity"] for row in found.orders.values() if row["sku"] == sku and row["status"] == "fulfilled"
        )
        if found.stock[sku] != had - sold or found.stock[sku] < 0:
            yield f"{found.stock[sku]} of {sku} is left of {had}, {sold} having been sold"
    if found.held:
        yield f"{found.held} table locks are still held"
