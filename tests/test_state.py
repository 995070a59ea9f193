"""What the parts of a worker share."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import func, select

from coord.worker.state import MAX_CONNECTIONS
from tests.workers import a_state

if TYPE_CHECKING:
    import asyncpg
    from sqlalchemy.ext.asyncio import AsyncEngine

ASLEEP = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%' AND state = 'active'"


@pytest.mark.usefixtures("ledger")
async def test_maintenance_uses_no_more_connections_than_are_told_of(
    engine: AsyncEngine, observer: asyncpg.Connection
) -> None:
    """However many of its loops want one at once."""
    state = a_state(engine)
    reads = [asyncio.create_task(state.read(select(func.pg_sleep(0.2)))) for _ in range(3 * MAX_CONNECTIONS)]
    most = 0
    while not all(read.done() for read in reads):
        most = max(most, await observer.fetchval(ASLEEP))
        await asyncio.sleep(0)
    assert most == MAX_CONNECTIONS
