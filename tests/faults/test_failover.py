"""PostgreSQL fails over to a replica of its own, which had everything or was behind; Redis by Sentinel."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
import time
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import pytest
from sqlalchemy import make_url

from coord.dev.embedded import PostgreSQL
from tests.faults.customer import FINAL, Shop, answered, statuses
from tests.faults.stack import Stack
from tests.serving import eventually
from tests.shop import dsn_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [pytest.mark.faults, pytest.mark.slow]

ALL_REPLAYED = "SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn"
ORDERS = "SELECT id, invoice_number FROM orders WHERE status = 'fulfilled' ORDER BY invoice_number"


class Replica(PostgreSQL):
    """Follows another; the data of `pg_basebackup` is all that it is made of."""

    def __init__(self, directory: Path, primary: PostgreSQL) -> None:
        super().__init__(directory, settings={"fsync": "off", "hot_standby": "on", "max_connections": "80"})
        self.primary = primary

    def _initialise(self) -> None:
        owner = self._owner()
        command = [self._bin / "pg_basebackup", "-D", self.data, "-h", "127.0.0.1", "-p", str(self.primary.port)]
        options = ["-U", "postgres", "-R", "-X", "stream", "-c", "fast", "--no-sync"]
        user = {} if owner is None else {"user": owner.uid, "group": owner.gid, "extra_groups": []}
        if owner is not None:
            os.chown(self.directory, owner.uid, owner.gid)
        subprocess.run([*command, *options], check=True, capture_output=True, **user)  # type: ignore[call-overload]


@pytest.fixture
async def failing() -> AsyncIterator[tuple[Shop, Replica]]:
    """A shop of the test's own, whose PostgreSQL has a replica."""
    with tempfile.TemporaryDirectory(prefix="coord-failover-", ignore_cleanup_errors=True) as directory:
        async with Stack(Path(directory)).running() as stack:
            replica = Replica(Path(directory) / "replica", stack.postgresql)
            await asyncio.to_thread(replica.start)
            try:
                yield Shop(stack), replica
            finally:
                await asyncio.to_thread(replica.stop, "immediate")


@asynccontextmanager
async def at(server: PostgreSQL) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(dsn_of(server.url))
    try:
        yield connection
    finally:
        await connection.close()


async def caught_up(stack: Stack, replica: Replica) -> None:
    position = await stack.ask("SELECT pg_current_wal_lsn()::text")

    async def has_all() -> bool:
        async with at(replica) as connection:
            return bool(await connection.fetchval(ALL_REPLAYED, position))

    await eventually(has_all)


async def fail_over(stack: Stack, replica: Replica) -> None:
    """The primary is gone for good, and its address leads to the promoted replica."""
    await asyncio.to_thread(stack.postgresql.stop, "immediate")
    async with at(replica) as connection:
        assert await connection.fetchval("SELECT pg_promote(true, 30)")
    for link in stack.links("postgresql"):
        link.target = make_url(replica.url)
    stack.postgresql = replica


async def test_a_failover_to_a_replica_that_has_everything_is_got_over(failing: tuple[Shop, Replica]) -> None:
    shop, replica = failing
    stack = shop.stack
    assert statuses(await shop.fulfilled(3)) == {200}
    async with shop.holding() as held:
        await held.run_by(*stack.workers)
        await caught_up(stack, replica)
        await fail_over(stack, replica)
        promoted = time.monotonic()
    assert statuses(await answered(*held.asking)) <= {200, 503}
    assert time.monotonic() - promoted < FINAL
    assert statuses(await shop.fulfilled(3)) == {200}
    await shop.sound()


async def test_a_failover_that_loses_the_last_commits_doubles_nothing(failing: tuple[Shop, Replica]) -> None:
    """What the replica never had is gone, answered or not: whoever asks again is told 404, and ids begin again there.

    What it had is done once, and invoice numbers run on without a gap from what is left.
    """
    shop, replica = failing
    stack = shop.stack
    assert statuses(await shop.fulfilled(3)) == {200}
    known = await shop.ordered(number=2)
    await caught_up(stack, replica)
    async with at(replica) as connection:
        await connection.execute("ALTER SYSTEM SET primary_conninfo = ''")
        await connection.execute("SELECT pg_reload_conf()")
        await eventually(lambda: _nobody_feeds(connection))
    lost = await shop.ordered(number=2)
    assert statuses(await answered(*map(shop.asked, [*known, *lost]))) == {200}
    assert len(await _invoices(stack)) == 7
    await fail_over(stack, replica)
    for order in lost:
        assert (await shop.until(404, "GET", f"/orders/{order}"))[-1].seconds < 5
    assert statuses(await answered(*map(shop.asked, known))) <= {200, 503}
    assert statuses(await shop.fulfilled(3)) == {200}
    invoices = await _invoices(stack)
    assert sorted(invoices.values()) == [*range(1, len(invoices) + 1)]
    assert len(invoices) == 8
    assert Counter(await stack.ask("SELECT array_agg(state) FROM coord_jobs")) == {"done": 8}


async def _invoices(stack: Stack) -> dict[int, int]:
    async with at(stack.postgresql) as connection:
        return {row["id"]: row["invoice_number"] for row in await connection.fetch(ORDERS)}


async def _nobody_feeds(connection: asyncpg.Connection) -> bool:
    return bool(await connection.fetchval("SELECT count(*) = 0 FROM pg_stat_wal_receiver"))
