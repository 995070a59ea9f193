"""Customers who all come at once: each places an order, asks for it to be fulfilled, and waits for the answer."""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

GOODS = ("tea", "coffee", "cocoa", "saffron")
SCARCE = GOODS[-1]
PATIENCE = httpx.Timeout(60.0)
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # given, so that httpx does not load certificates for each customer


@dataclass(frozen=True, slots=True)
class Wish:
    sku: str
    quantity: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one customer was told, and how long it took from the request to the answer."""

    wish: Wish
    seconds: float
    order: dict[str, Any] | None
    """None when the shop gave no outcome; then `complaint` says what it gave."""
    complaint: str = ""


def wishes(count: int, run: str) -> list[Wish]:
    """Goods of this run alone: what an interrupted run has left in the queue takes nothing from them."""
    return [Wish(f"{GOODS[n % len(GOODS)]}.{run}", 1 + n % 3) for n in range(count)]


def stock_for(wanted: Sequence[Wish]) -> dict[str, int]:
    """Enough of everything, and of one thing a third of what is wanted."""
    demand: dict[str, int] = {}
    for wish in wanted:
        demand[wish.sku] = demand.get(wish.sku, 0) + wish.quantity
    return {sku: total // 3 if sku.startswith(SCARCE) else total for sku, total in demand.items()}


async def serve_all(url: str, wanted: Sequence[Wish], stock: dict[str, int], tick: Callable[[], None]) -> list[Outcome]:
    async with _customer(url) as shop:
        for sku, quantity in stock.items():
            (await shop.put(f"/stock/{sku}", json={"quantity": quantity})).raise_for_status()
    return await asyncio.gather(*(_visit(url, wish, tick) for wish in wanted))


def _customer(url: str) -> httpx.AsyncClient:
    """One for each: httpx shares out a connection in time that grows with how many wait for one."""
    return httpx.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False, verify=NO_TLS)


async def _visit(url: str, wish: Wish, tick: Callable[[], None]) -> Outcome:
    try:
        async with _customer(url) as shop:
            return await _order(shop, wish)
    finally:
        tick()


async def _order(shop: httpx.AsyncClient, wish: Wish) -> Outcome:
    asked = time.perf_counter()
    try:
        placed = await shop.post("/orders", json={"sku": wish.sku, "quantity": wish.quantity})
        placed.raise_for_status()
        asked = time.perf_counter()
        answer = await shop.post(f"{placed.headers['location']}/fulfil")
    except httpx.HTTPError as error:
        return Outcome(wish, time.perf_counter() - asked, None, str(error) or type(error).__name__)
    seconds = time.perf_counter() - asked
    if answer.status_code != httpx.codes.OK:
        return Outcome(wish, seconds, None, f"{answer.status_code} {answer.text[:200]}")
    return Outcome(wish, seconds, answer.json())
