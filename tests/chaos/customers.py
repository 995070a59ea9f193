"""Customers who come one after the other and each ask until their order is dealt with, or is going to be."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import Callable

SKUS = ("tea", "coffee", "cocoa", "saffron")
SCARCE = "saffron"
PATIENCE = 20.0
"""Seconds that a customer asks the shop to wait."""
LATE = 6.0
"""Seconds after which a customer of two busy cores calls the shop late."""
SENT = "http11.send_request_headers.started"
PAUSE = 0.5
GIVE_UP = 90.0


@dataclass(slots=True)
class Asked:
    """One request, and what it was answered with: a status, or the error that came instead of one."""

    in_the_calm: bool
    """Whether both servers were up when it was sent."""
    sent: float
    """When it left: a thousand customers are one process, which may have to wait for a processor before."""
    seconds: float = 0.0
    """From then on until the answer."""
    answer: int | str = ""
    order: dict[str, Any] | None = None
    """As the answer had it, with its effect."""

    @property
    def has_effect(self) -> bool:
        return self.order is not None


@dataclass(slots=True)
class Customer:
    number: int
    sku: str
    quantity: int
    order_id: int | None = None
    refused: list[str] = field(default_factory=list)
    """What came of placing it until that was answered well: a status or an error, and after how many seconds."""
    asked: list[Asked] = field(default_factory=list)
    """How often the order was asked for; the last time is the one that was answered well, if any was."""

    @property
    def served(self) -> bool:
        return bool(self.asked) and self.asked[-1].answer in (200, 202)


def customers(count: int) -> list[Customer]:
    return [Customer(n, SKUS[n % len(SKUS)], 1 + n % 3) for n in range(count)]


def stock_for(crowd: list[Customer]) -> dict[str, int]:
    """Enough of everything, and of one thing a third of what is wanted."""
    demand = {sku: sum(customer.quantity for customer in crowd if customer.sku == sku) for sku in SKUS}
    return {sku: total // 3 if sku == SCARCE else total for sku, total in demand.items()}


async def put(stock: dict[str, int], url: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE * 2, trust_env=False) as shop:
        for sku, quantity in stock.items():
            (await shop.put(f"/stock/{sku}", json={"quantity": quantity})).raise_for_status()


async def serve(crowd: list[Customer], url: str, seconds: float, calm: Callable[[], bool]) -> None:
    """Let them in evenly over so many seconds; returns when the last has been served or has given up."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE * 2, limits=limits, trust_env=False) as shop:
        began = time.monotonic()
        visits = []
        for customer in crowd:
            await asyncio.sleep(began + seconds * customer.number / len(crowd) - time.monotonic())
            visits.append(asyncio.create_task(_visit(customer, shop, calm)))
        await asyncio.gather(*visits)


async def _visit(customer: Customer, shop: httpx.AsyncClient, calm: Callable[[], bool]) -> None:
    """Nothing is placed twice that matters: an order that nobody asks to be fulfilled takes nothing."""
    give_up = time.monotonic() + GIVE_UP
    while customer.order_id is None and time.monotonic() < give_up:
        began = time.monotonic()
        try:
            placed = await shop.post("/orders", json={"sku": customer.sku, "quantity": customer.quantity})
        except httpx.HTTPError as error:
            answer = type(error).__name__
        else:
            answer = str(placed.status_code)
            if placed.status_code == 201:
                customer.order_id = placed.json()["id"]
                break
        customer.refused.append(f"{answer} after {time.monotonic() - began:.1f} s")
        await asyncio.sleep(PAUSE)
    while customer.order_id is not None and not customer.served and time.monotonic() < give_up:
        customer.asked.append(await _ask(customer, shop, calm))
        if not customer.served:
            await asyncio.sleep(PAUSE)


async def _ask(customer: Customer, shop: httpx.AsyncClient, calm: Callable[[], bool]) -> Asked:
    asked = Asked(calm(), time.monotonic())

    async def note(event: str, _info: object) -> None:
        if event == SENT:
            asked.in_the_calm, asked.sent = calm(), time.monotonic()

    headers = {"Prefer": f"wait={PATIENCE:g}", "Idempotency-Key": f'"{customer.number}"'}
    path, extensions = f"/orders/{customer.order_id}/fulfil", {"trace": note}
    try:
        answer = await shop.post(path, headers=headers, extensions=extensions)
    except httpx.HTTPError as error:
        asked.answer = type(error).__name__
    else:
        asked.answer = answer.status_code
        asked.order = answer.json() if answer.status_code == 200 else None
    asked.seconds = time.monotonic() - asked.sent
    return asked
