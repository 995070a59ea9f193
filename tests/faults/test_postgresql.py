"""PostgreSQL is killed, frozen, restarted, full, or only reads."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import pytest

from tests.faults.customer import FINAL, MARGIN, SLACK, answered, statuses
from tests.faults.faults import at_commit
from tests.serving import eventually
from tests.shop import dsn_of, waiting_for_locks
from worker.database import POOL_SIZE

if TYPE_CHECKING:
    from coord.dev.server import StopMode
    from tests.faults.customer import Shop
    from tests.faults.stack import Member, Stack

pytestmark = [pytest.mark.faults, pytest.mark.slow]

ALL_OTHERS = """
    SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
    WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
"""


def backends(stack: Stack) -> list[int]:
    """PostgreSQL's processes, its first one last."""
    pid = stack.postgresql.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [*map(int, children), pid]


@pytest.mark.parametrize("mode", ["immediate", "fast"], ids=["killed", "restarted"])
async def test_a_server_that_ends_and_starts_is_got_over(shop: Shop, stack: Stack, mode: StopMode) -> None:
    async with shop.holding() as held:
        await held.run_by(*stack.workers)
        await asyncio.to_thread(stack.postgresql.stop, mode)
        refused = await shop.call("POST", "/orders", json={"sku": "nothing", "quantity": 1})
        await asyncio.to_thread(stack.postgresql.start)
        struck = time.monotonic()
    assert (refused.status, refused.kind) == (503, "database-away")
    assert refused.seconds < 1 + SLACK
    assert statuses(await answered(*held.asking)) <= {200, 503}
    assert time.monotonic() - struck < FINAL
    assert statuses(await shop.fulfilled(3)) == {200}


async def test_a_server_that_is_killed_as_it_is_sent_commit_has_committed_or_not(shop: Shop, stack: Stack) -> None:
    victim = stack.workers[0]

    def crash() -> None:
        for pid in backends(stack):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async with shop.holding() as held:
        await held.run_by(victim)
        port, *_ = (await stack.locking())[victim.name]
        passed = at_commit(victim.postgresql, lambda _wire: crash(), arrives=True, port=port)
    await asyncio.wait_for(passed.wait(), 10)
    await asyncio.to_thread(stack.postgresql.restart, "immediate")
    assert statuses(await answered(*held.asking)) <= {200, 503}


@pytest.mark.parametrize("seconds", [3.0, 8.0], ids=["three seconds", "longer"])
async def test_a_server_that_stands_still_delays_and_robs_nobody(shop: Shop, stack: Stack, seconds: float) -> None:
    """Its processes are stopped; nobody is taken for dead because it could not be asked."""
    deaths = "SELECT count(*) FROM coord_attempts WHERE outcome = 'died'"
    before = await stack.ask(deaths)
    async with shop.holding() as held:
        await held.run_by(*stack.workers)
        stopped = backends(stack)
        for pid in reversed(stopped):
            os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        answer = asyncio.create_task(shop.call("POST", "/orders", json={"sku": "nothing", "quantity": 1}))
        await asyncio.sleep(seconds)
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    assert (await answer).status in (201, 503)
    assert (await answer).seconds < 25 + MARGIN + SLACK
    assert statuses(await answered(*held.asking)) <= {200, 503}
    assert time.monotonic() - began < seconds + FINAL
    assert await stack.ask(deaths) == before


async def test_all_backends_terminated_at_once_are_got_over(shop: Shop, stack: Stack) -> None:
    async with shop.holding() as held:
        await held.run_by(*stack.workers)
        assert await stack.ask(ALL_OTHERS) > 3
    assert statuses(await answered(*held.asking)) == {200}
    assert statuses(await shop.fulfilled(3)) == {200}


async def test_a_pool_that_is_exhausted_is_waited_for(shop: Shop, stack: Stack) -> None:
    """Every connection of the API's waits for a lock: waits hold none, and what needs one is answered in time."""
    async with shop.holding() as held:
        await held.run_by()
        putting = [
            asyncio.create_task(shop.call("PUT", "/stock/crowd", json={"quantity": 1}, headers={"Prefer": "wait=2"}))
            for _ in range(POOL_SIZE)
        ]

        async def every_connection_waits() -> bool:
            async with stack.sql() as connection:
                return await waiting_for_locks(connection, "INSERT INTO stock") == POOL_SIZE

        await eventually(every_connection_waits)
        late = await shop.call("POST", "/orders", json={"sku": "x", "quantity": 1}, headers={"Prefer": "wait=2"})
        health = await shop.call("GET", "/healthz")
    assert (late.status, late.seconds < 2 + MARGIN + SLACK) == (503, True) or late.status == 201
    assert health.status == 200
    assert {answer.status for answer in await asyncio.gather(*putting)} <= {200, 503}
    assert statuses(await answered(*held.asking)) <= {200, 503}


LOST = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE client_port = ANY($1)"


@pytest.mark.parametrize("who", ["everybody", "api", "worker", "leader"])
async def test_a_server_that_admits_nobody_more_is_waited_for(shop: Shop, stack: Stack, who: str) -> None:
    """Others have every connection that there is, just as ours were lost."""
    chosen = stack.members if who == "everybody" else [stack.api if who == "api" else await _named(stack, who)]
    orders = await shop.ordered(number=2)
    async with AsyncExitStack() as exits:
        control, *_ = await _all_taken(stack, exits)
        without = 0
        while without < 2:  # looks in a row: who has lost a connection may be the first to have another
            wires = [wire.port for member in chosen for wire in member.postgresql.wires]
            without = 0 if await control.fetchval(LOST, wires) else without + 1
            await _all_taken(stack, exits)
        asking = [shop.asked(order, wait=10.0) for order in orders]
        refused = await shop.call("POST", "/orders", json={"sku": "x", "quantity": 1}, headers={"Prefer": "wait=2"})
        await asyncio.sleep(2)
    assert (refused.status, refused.kind) == (503, "database-away") or who in ("worker", "leader")
    assert statuses(await answered(*asking)) <= {200, 202, 503}


async def _named(stack: Stack, who: str) -> Member:
    return await (stack.leader() if who == "leader" else stack.follower())


async def _all_taken(stack: Stack, exits: AsyncExitStack) -> list[asyncpg.Connection]:
    """Connections, until there are no more."""
    taken: list[asyncpg.Connection] = []
    while True:
        try:
            connection = await asyncpg.connect(dsn_of(stack.postgresql.url))
        except asyncpg.TooManyConnectionsError:
            return taken
        exits.push_async_callback(connection.close)
        taken.append(connection)


async def test_a_server_that_only_reads_is_waited_for(shop: Shop, stack: Stack) -> None:
    """503 for what writes; what was enqueued is tried again, and done once it writes again."""
    (order,) = await shop.ordered()
    async with stack.sql() as connection:
        await connection.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        await connection.execute("SELECT pg_reload_conf()")
        try:
            asking = shop.asked(order)
            await asyncio.sleep(1)
            refused = await shop.call("POST", "/orders", json={"sku": "nothing", "quantity": 1})
            await asyncio.sleep(2)
        finally:
            await connection.execute("ALTER SYSTEM RESET default_transaction_read_only")
            await connection.execute("SELECT pg_reload_conf()")
    assert (refused.status, refused.kind) == (503, "database-away")
    answers = await answered(asking)
    assert statuses(answers) == {200, 503}
