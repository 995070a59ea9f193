"""What must hold, looked up in the database: nothing here believes the shop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import asyncpg

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from demo.customers import Outcome

ORDERS = "SELECT id, sku, quantity, status, invoice_number FROM orders WHERE sku = ANY ($1)"
STOCK = "SELECT sku, quantity FROM stock WHERE sku = ANY ($1)"
INVOICES = """
    SELECT count(*) FILTER (WHERE status = 'fulfilled') AS fulfilled,
           count(*) FILTER (WHERE status <> 'fulfilled' AND invoice_number IS NOT NULL) AS undeserved,
           count(invoice_number) AS invoices,
           count(DISTINCT invoice_number) AS numbers,
           coalesce(min(invoice_number), 1) AS first,
           coalesce(max(invoice_number), 0) AS last
    FROM orders
"""


@dataclass(frozen=True, slots=True)
class Check:
    promise: str
    broken: str | None
    """What was found instead, or None when the promise held."""


async def verify(database_url: str, outcomes: Sequence[Outcome], stock: Mapping[str, int]) -> list[Check]:
    connection = await asyncpg.connect(database_url.replace("postgresql+asyncpg", "postgresql", 1))
    try:
        orders = await connection.fetch(ORDERS, list(stock))
        left = {row["sku"]: row["quantity"] for row in await connection.fetch(STOCK, list(stock))}
        invoices = await connection.fetchrow(INVOICES)
    finally:
        await connection.close()
    return [
        _answered(outcomes),
        _agreed(outcomes, orders),
        _stock_exact(orders, stock, left),
        _rejected_rightly(orders, left),
        _invoices_gapless(invoices),
    ]


def _answered(outcomes: Sequence[Outcome]) -> Check:
    complaints = [outcome.complaint for outcome in outcomes if outcome.order is None]
    broken = f"{len(complaints)} were not, the first: {complaints[0]}" if complaints else None
    return Check("every order was answered with its outcome", broken)


def _agreed(outcomes: Sequence[Outcome], orders: Sequence[asyncpg.Record]) -> Check:
    stored = {row["id"]: dict(row) for row in orders}
    told = [outcome.order for outcome in outcomes if outcome.order is not None]
    differing = [order["id"] for order in told if stored.get(order["id"]) != order]
    broken = f"orders {differing[:5]} differ" if differing else None
    if len(orders) != len(outcomes):
        broken = f"there are {len(orders)} orders for {len(outcomes)} customers"
    return Check("the database holds what the customers were told", broken)


def _stock_exact(orders: Sequence[asyncpg.Record], stock: Mapping[str, int], left: Mapping[str, int]) -> Check:
    """Stock only fell: at the end it is the least it ever was."""
    expected = dict(stock)
    for row in orders:
        if row["status"] == "fulfilled":
            expected[row["sku"]] -= row["quantity"]
    holds = expected == left and min(expected.values()) >= 0
    return Check("stock is exact and never went negative", None if holds else f"{left} is left of {stock}")


def _rejected_rightly(orders: Sequence[asyncpg.Record], left: Mapping[str, int]) -> Check:
    """Stock only fell: an order that was out of stock once still is."""
    wrong = [row["id"] for row in orders if row["status"] == "rejected" and row["quantity"] <= left.get(row["sku"], 0)]
    return Check("nobody was turned away while there was stock", f"orders {wrong[:5]} were" if wrong else None)


def _invoices_gapless(found: asyncpg.Record) -> Check:
    expected = {"invoices": "fulfilled", "numbers": "fulfilled", "last": "fulfilled"}
    whole = found["first"] == 1 and not found["undeserved"]
    holds = whole and all(found[name] == found[same] for name, same in expected.items())
    promise = f"one invoice for each fulfilled order, 1…{found['last']} without a gap"
    return Check(promise, None if holds else ", ".join(f"{value} {name}" for name, value in found.items()))
