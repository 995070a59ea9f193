"""A link of the shop is cut, half open, reset or slow, or loses its connection as a COMMIT passes."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.customer import ELSEWHERE, MARGIN, SLACK, Answer, answered, statuses
from tests.faults.faults import cut, half_open, late, reset
from tests.serving import eventually

if TYPE_CHECKING:
    from tests.faults.customer import Shop
    from tests.faults.stack import Member, Stack

pytestmark = [pytest.mark.faults, pytest.mark.slow]

LINKS = ["api-postgresql", "api-redis", "worker-postgresql", "worker-redis", "leader-postgresql", "leader-redis"]
FAULTS = [cut, half_open, late, reset]
SECONDS = 6.0
"""That a fault lasts."""
TERMINATE = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE client_port = ANY($1::int[])"


async def member_of(stack: Stack, link: str) -> Member:
    role = link.partition("-")[0]
    return stack.api if role == "api" else await (stack.leader() if role == "leader" else stack.follower())


async def buys(shop: Shop, until: float) -> list[Answer]:
    """One who comes while the fault lasts, again and again, and does not insist."""
    answers: list[Answer] = []
    while time.monotonic() < until:
        answers.append(await shop.call("POST", "/orders", json={"sku": "nothing", "quantity": 1}))
        if answers[-1].status == 201:
            path = f"/orders/{answers[-1].body['id']}/fulfil"
            answers.append(await shop.call("POST", path, headers={"Prefer": "wait=5"}))
        await asyncio.sleep(0.3)
    return answers


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_a_fault_of_one_link_is_got_over(shop: Shop, stack: Stack, link: str, fault: Any) -> None:
    """What was under way is done once, what comes meanwhile is answered in time, and all is well afterwards."""
    victim = await member_of(stack, link)
    async with shop.holding() as held, asyncio.timeout(100):
        await held.run_by(*([] if victim is stack.api else [victim]))
        struck = time.monotonic()
        bad = fault(victim.links[link.partition("-")[2]])
        await bad.__aenter__()
    buying = asyncio.create_task(buys(shop, struck + SECONDS))
    await asyncio.sleep(struck + SECONDS - time.monotonic())
    await bad.__aexit__(None, None, None)
    meanwhile = await buying
    answers = await answered(*held.asking)
    if link == "api-postgresql" and fault is not reset:
        assert statuses([meanwhile]) <= {200, 201, 202, 503}
        limit = SECONDS + ELSEWHERE if fault is half_open else 25 + MARGIN
        assert max(answer.seconds for answer in meanwhile) < limit + SLACK
    else:
        found_dead = [answer for each in (*answers, meanwhile) for answer in each if answer.status == 503]
        assert len(found_dead) <= (link == "api-postgresql")  # by whom the pool finds out that all of it is gone
        assert all(answer.kind == "database-away" and answer.seconds < 1 + SLACK for answer in found_dead)
        assert statuses(answers) <= {200, 503}
        assert statuses([meanwhile]) <= {200, 201, 202, 503}
        assert 200 in statuses([meanwhile])
        assert time.monotonic() - struck < SECONDS + ELSEWHERE + SLACK
    assert statuses(await shop.fulfilled(3)) == {200}


@pytest.mark.parametrize("link", ["api-postgresql", "worker-postgresql", "leader-postgresql"])
async def test_backends_that_are_terminated_are_got_over(shop: Shop, stack: Stack, link: str) -> None:
    """All that a process has: its pool's, its jobs', its maintenance's."""
    victim = await member_of(stack, link)
    async with shop.holding() as held:
        await held.run_by(*([] if victim is stack.api else [victim]))
        await stack.ask(TERMINATE, [wire.port for wire in victim.postgresql.wires])
    answers = await answered(*held.asking)
    assert statuses(answers) == {200}
    assert statuses(await shop.fulfilled(3)) == {200}


@pytest.mark.parametrize("link", ["api-redis", "worker-redis", "leader-redis"])
async def test_clients_that_redis_closes_connect_again(shop: Shop, stack: Stack, link: str) -> None:
    victim = await member_of(stack, link)
    async with shop.holding() as held:
        await held.run_by(*([] if victim is stack.api else [victim]))
        async with stack.redis() as redis:
            for wire in {*victim.redis.wires}:
                await redis.execute_command("CLIENT", "KILL", "ADDR", f"127.0.0.1:{wire.port}")
    assert statuses(await answered(*held.asking)) == {200}
    answers = await shop.fulfilled(3)
    assert statuses(answers) == {200}


@pytest.mark.parametrize("role", ["api", "worker", "leader"])
async def test_an_answer_of_redis_that_is_lost_loses_no_job(shop: Shop, stack: Stack, role: str) -> None:
    """A push that was carried out and not answered; a job that was popped and never arrived."""
    victim = await member_of(stack, role)
    lost = asyncio.Event()

    def on_answer(wire: Any, data: bytes) -> bool:
        if role != "api" and b"fulfil_order" not in data:
            return False
        victim.redis.on_answer = None
        wire.reset()
        lost.set()
        return True

    victim.redis.on_answer = on_answer
    answers = []
    for _ in range(4):
        answers += await shop.fulfilled()
        if lost.is_set():
            break
    await eventually(lost.is_set, within=1)
    assert statuses(answers) == {200}
    assert max(answer.seconds for each in answers for answer in each) < ELSEWHERE + SLACK
