"""Who orders, asks until the order is dealt with, and notes what was answered and when."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx

from tests.faults.books import effects, found_in
from tests.serving import eventually
from worker.database import MAX_JOBS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from tests.faults.stack import Member, Stack

WAIT = 20.0
"""Seconds that a request says it would wait."""
MARGIN = 2.5
"""Seconds after them, in which whatever hangs is answered 503 (docs/http.md)."""
SLACK = 1.5
"""Seconds for two busy cores."""
ELSEWHERE = 10.0
"""Seconds in which the jobs of a worker that is gone run elsewhere."""
FINAL = 30.0
"""Seconds after a fault in which every job is final."""
PAUSE = 0.3
TRANSIENT = {503, 202, "ConnectError", "ReadError", "RemoteProtocolError", "WriteError"}
"""What a client may be answered under a fault: it asks again."""
UNFINISHED = "SELECT count(*) FROM coord_jobs WHERE state = 'queued'"


class Answer(NamedTuple):
    status: int | str
    """Or the kind of error that came in its place."""
    seconds: float
    body: Any = None

    @property
    def kind(self) -> str:
        """Of a problem."""
        return str(self.body.get("type", "")).rpartition(":")[2] if isinstance(self.body, dict) else ""


class Shop:
    """The shop from outside, and from beneath when it is over."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._stock: dict[str, int] = {}
        self._keys = 0
        self._asking: set[asyncio.Task[Any]] = set()

    async def call(self, method: str, path: str, **options: Any) -> Answer:
        """One request on a connection of its own."""
        began = time.monotonic()
        async with httpx.AsyncClient(base_url=self.stack.url, timeout=60, trust_env=False) as client:
            try:
                answer = await client.request(method, path, **options)
            except httpx.HTTPError as error:
                return Answer(type(error).__name__, time.monotonic() - began)
        return Answer(answer.status_code, time.monotonic() - began, answer.json())

    async def until(self, status: int, method: str, path: str, *, within: float = 60.0, **options: Any) -> list[Answer]:
        """Ask until that is answered; all answers, each of which is one that a client may be given, and in time."""
        answers: list[Answer] = []
        give_up = time.monotonic() + within
        limit = max(float(options.get("headers", {}).get("Prefer", "wait=25")[5:]), 2.0) + MARGIN + SLACK
        while not answers or answers[-1].status != status:
            assert time.monotonic() < give_up, answers
            if answers:
                await asyncio.sleep(PAUSE)
            answers.append(await self.call(method, path, **options))
            assert answers[-1].status in {status, *TRANSIENT}, answers
            assert answers[-1].status not in (200, 202, 503) or answers[-1].seconds <= limit, answers
        return answers

    async def ordered(self, number: int = 1) -> list[int]:
        """So many orders for one piece each, of a thing that is named anew each time."""
        name = f"tea-{len(self._stock)}"
        await self.until(200, "PUT", f"/stock/{name}", json={"quantity": 100})
        self._stock[name] = 100
        placed = [await self.until(201, "POST", "/orders", json={"sku": name, "quantity": 1}) for _ in range(number)]
        return [answers[-1].body["id"] for answers in placed]

    def asked(self, order: int, wait: float = WAIT) -> asyncio.Task[list[Answer]]:
        """Asks for it with one key until it is fulfilled."""
        self._keys += 1
        headers = {"Prefer": f"wait={wait:g}", "Idempotency-Key": f'"{self._keys}"'}
        asking = asyncio.create_task(self.until(200, "POST", f"/orders/{order}/fulfil", headers=headers))
        self._asking.add(asking)
        asking.add_done_callback(self._asking.discard)
        return asking

    async def close(self) -> None:
        """Nobody asks any more, as after a cell that has failed somebody may."""
        asking = {*self._asking}
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    async def fulfilled(self, number: int = 1) -> list[list[Answer]]:
        """So many orders, placed and asked for; what was answered to each."""
        return await answered(*[self.asked(order) for order in await self.ordered(number=number)])

    @asynccontextmanager
    async def holding(self) -> AsyncIterator[Held]:
        """While nobody gets at the stock: what is asked for meanwhile stands in its transaction, waiting for it."""
        held = Held(self, iter(await self.ordered(number=MAX_JOBS + 2)))
        async with self.stack.held():
            yield held

    async def sound(self) -> None:
        """All jobs end in time, and the ledger and the rows say that each has had its effect once."""
        stack = self.stack

        async def all_final() -> bool:
            return bool(await stack.ask(UNFINISHED) == 0)

        await eventually(all_final, within=FINAL, message="jobs were not final in time")

        async def broken() -> list[str]:
            found = await found_in(stack.postgresql.url)
            asked = Counter(job["order_id"] for job in found.jobs)
            doubled = [f"order {order} has {count} jobs" for order, count in asked.items() if count > 1]
            return [*effects(self._stock, found), *doubled, *(str(job) for job in found.jobs if job["state"] != "done")]

        async def nothing() -> bool:
            lines = await broken()
            lasting = [line for line in lines if "held" not in line]
            assert not lasting, lasting
            return not lines

        await eventually(nothing, within=5.0, message="table locks are still held")


class Held:
    """Orders that are asked for while the stock is held."""

    def __init__(self, shop: Shop, orders: Iterator[int]) -> None:
        self._shop = shop
        self._orders = orders
        self.asking: list[asyncio.Task[list[Answer]]] = []

    async def run_by(self, *members: Member) -> None:
        """Ask for one after the other until each of these workers has a job that waits for the stock.

        Which worker takes a job is chance, until one has no slot left.
        """
        stack = self._shop.stack
        wanted = {member.name for member in members}
        for order in self._orders:
            self.asking.append(self._shop.asked(order))
            await eventually(self._all_wait, within=10)
            if wanted <= set(await stack.locking()):
                return
        raise AssertionError(f"of {wanted} not all have taken a job")

    async def _all_wait(self) -> bool:
        found = await self._shop.stack.locking()
        return sum(map(len, found.values())) >= len(self.asking)


async def answered(*asking: asyncio.Task[list[Answer]]) -> list[list[Answer]]:
    return [*await asyncio.gather(*asking)]


def statuses(answers: Sequence[Sequence[Answer]]) -> set[int | str]:
    return {answer.status for each in answers for answer in each}


def slowest(answers: Sequence[Sequence[Answer]]) -> float:
    """Seconds of the answer that came last."""
    return max(sum(answer.seconds for answer in each) for each in answers)
