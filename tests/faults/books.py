"""The shop's books, looked up in the database: each order dealt with once, no invoice left out, the stock in accord."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import asyncpg

from tests.chaos.shop import HELD
from tests.shop import dsn_of

if TYPE_CHECKING:
    from collections.abc import Iterator

ORDERS = "SELECT id, sku, quantity, status, invoice_number, version FROM orders"
JOBS = "SELECT id, state, attempt, error, (arguments->0->>0)::bigint AS order_id FROM coord_jobs"


class Found(NamedTuple):
    """The database, as it is in the end."""

    orders: dict[int, asyncpg.Record]
    stock: dict[str, int]
    jobs: list[asyncpg.Record]
    held: int


async def found_in(database_url: str) -> Found:
    connection = await asyncpg.connect(dsn_of(database_url))
    try:
        orders = {row["id"]: row for row in await connection.fetch(ORDERS)}
        stock = {row["sku"]: row["quantity"] for row in await connection.fetch("SELECT sku, quantity FROM stock")}
        return Found(orders, stock, await connection.fetch(JOBS), await connection.fetchval(HELD))
    finally:
        await connection.close()


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
