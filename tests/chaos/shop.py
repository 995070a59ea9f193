"""The shop, as a proof drives it: its programs, a customer, and what its database has in the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coord.testing.history import Complaint, Effect, Number, Row
from coord.testing.proof import Application, Shown
from tests.shop import API, ROOT, WORKER

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import AsyncIterator, Awaitable, Callable

    import asyncpg
    import httpx

    from coord.testing.proof import Visit

CLOCK = "tests.chaos.clock"
CLOCKS = (-600.0, 600.0, 0.0)
"""Seconds by which each worker's clock is off; there are as many workers."""
API_CLOCK = 600.0
SKUS = ("tea", "coffee", "cocoa", "saffron")
SCARCE = "saffron"
PATIENCE = 20.0
"""Seconds that a customer asks the shop to wait."""

SHOP = Application(
    api=(CLOCK, str(API_CLOCK), *API[:-1], "{port}"),
    workers=[(CLOCK, str(clock), *WORKER) for clock in CLOCKS],
    directory=ROOT,
)


def quantity_of(number: int) -> int:
    return 1 + number % 3


def stock_for(customers: int) -> dict[str, int]:
    """Enough of everything, and of one thing a third of what is wanted."""
    demand = dict.fromkeys(SKUS, 0)
    for number in range(customers):
        demand[SKUS[number % len(SKUS)]] += quantity_of(number)
    return {sku: total // 3 if sku == SCARCE else total for sku, total in demand.items()}


def stocking(stock: dict[str, int]) -> Callable[[httpx.AsyncClient], Awaitable[object]]:
    async def prepare(shop: httpx.AsyncClient) -> None:
        for sku, quantity in stock.items():
            (await shop.put(f"/stock/{sku}", json={"quantity": quantity})).raise_for_status()

    return prepare


async def customer(visit: Visit, *, looks: int, seen: deque[str]) -> None:
    """Nothing is placed twice that matters: an order that nobody asks to be fulfilled takes nothing.

    In the end it `looks` so many times at an order of those that were `seen` last, by itself or another.
    """
    wanted = {"sku": SKUS[visit.number % len(SKUS)], "quantity": quantity_of(visit.number)}
    placed = await visit.ask("POST", "/orders", json=wanted, shows=_placed)
    order_id = placed.json()["id"]
    headers = {"Prefer": f"wait={PATIENCE:g}", "Idempotency-Key": f'"{visit.number}"'}
    path = f"/orders/{order_id}/fulfil"
    await visit.ask("POST", path, headers=headers, effect=f"order {order_id}", deadline=PATIENCE, shows=_dealt_with)
    seen.append(order_id)
    for _ in range(looks):
        await visit.ask("GET", f"/orders/{visit.random.choice(seen)}", shows=_dealt_with)


def _placed(answer: httpx.Response) -> Shown | None:
    return Shown(row=f"order {answer.json()['id']}", version=1) if answer.status_code == 201 else None


def _dealt_with(answer: httpx.Response) -> Shown | None:
    """The shop's answers have no version: an order is in its first one until it is dealt with, and then in its last."""
    if answer.status_code == 202:
        body = answer.json()
        return Shown(row=f"order {body['order']['id']}", version=1, job=body["job"]["id"])
    if answer.status_code != 200:
        return None
    order = answer.json()
    is_settled = order["status"] != "pending"
    effect = outcome_of(order) if is_settled else None
    return Shown(effect, row=f"order {order['id']}", version=1 + is_settled)


def outcome_of(order: Any) -> str:
    return f"{order['quantity']} {order['sku']} {order['status']}, invoice {order['invoice_number']}"


def effect_of(_task: str, args: list[Any], _kwargs: dict[str, Any]) -> str:
    return f"order {args[0]}"


HELD = """
    SELECT count(*) FROM pg_locks AS held JOIN pg_class AS class ON class.oid = held.relation
    WHERE class.relname IN ('orders', 'stock') AND held.mode = 'ShareRowExclusiveLock'
"""
DOUBLED = "SELECT arguments->0->>0 AS id, count(*) FROM coord_jobs GROUP BY 1 HAVING count(*) > 1"
SOLD = """
    SELECT stock.sku, stock.quantity AS there, coalesce(sum(orders.quantity), 0) AS sold
    FROM stock LEFT JOIN orders ON orders.sku = stock.sku AND orders.status = 'fulfilled' GROUP BY 1, 2
"""


def left_by(stock: dict[str, int]) -> Callable[[asyncpg.Connection], AsyncIterator[Any]]:
    async def read(connection: asyncpg.Connection) -> AsyncIterator[Any]:
        async for order in connection.cursor("SELECT * FROM orders"):
            name = f"order {order['id']}"
            yield Row(name, order["version"])
            if order["status"] != "pending":
                yield Effect(name, outcome_of(order), times=order["version"] - 1)
            if order["invoice_number"] is not None:
                yield Number("invoice", order["invoice_number"], name)
        for sold in await connection.fetch(SOLD):
            if sold["there"] != stock[sold["sku"]] - sold["sold"]:
                yield Complaint(f"{sold['there']} of {stock[sold['sku']]} {sold['sku']} are left, {sold['sold']} sold")
        for doubled in await connection.fetch(DOUBLED):
            yield Complaint(f"order {doubled['id']} has {doubled['count']} jobs under one idempotency key")
        if held := await connection.fetchval(HELD):
            yield Complaint(f"{held} table locks are still held")

    return read
