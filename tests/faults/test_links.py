"""A link of the shop is cut, half open, reset, or late, or the server ends what comes by it."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.faults.customer import ELSEWHERE, SLACK, answered, slowest, statuses
from tests.faults.faults import cut, half_open, late, reset

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.faults.customer import Shop
    from tests.faults.stack import Member, Stack
    from tests.shop import Network

pytestmark = [pytest.mark.faults, pytest.mark.slow]

LINKS = ["api-postgresql", "api-redis", "worker-postgresql", "worker-redis", "leader-postgresql", "leader-redis"]


async def member_of(stack: Stack, link: str) -> Member:
    role = link.partition("-")[0]
    return stack.api if role == "api" else await (stack.leader() if role == "leader" else stack.follower())

SECONDS = 8.0

@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("fault", [cut, half_open, late, reset], ids=lambda f: f.__name__)
async def test_link(shop: Shop, stack: Stack, link: str, fault) -> None:
    victim = await member_of(stack, link)
    wire = victim.links[link.partition("-")[2]]
    async with shop.holding() as held:
        await held.run_by(*([victim] if victim is not stack.api else []))
        struck = time.monotonic()
        block = fault(wire)
        await block.__aenter__()
    async def during():
        out = []
        while time.monotonic() - struck < SECONDS:
            out.append(await shop.call("POST", "/orders", json={"sku": "x", "quantity": 1}))
            if out[-1].status == 201:
                i = out[-1].body["id"]
                out.append(await shop.call("POST", f"/orders/{i}/fulfil", headers={"Prefer": "wait=5"}))
            await asyncio.sleep(0.5)
        return out
    more = await during()
    await block.__aexit__(None, None, None)
    answers = await answered(*held.asking)
    print("\n==", fault.__name__, link, "inflight", [[(a.status, round(a.seconds,1)) for a in each] for each in answers], "total", round(time.monotonic()-struck,1), "\n   during", [(a.status, a.kind, round(a.seconds,1)) for a in more])
    t=time.monotonic()
    after = await shop.fulfilled(3)
    print("   after", [[(a.status, round(a.seconds,1)) for a in each] for each in after], round(time.monotonic()-t,1))
    t=time.monotonic()
    await shop.sound()
    print("   sound after", round(time.monotonic()-t,1), await stack.ask("SELECT array_agg(attempt) FROM (SELECT attempt FROM coord_jobs ORDER BY created_at DESC LIMIT 20) AS j"))
