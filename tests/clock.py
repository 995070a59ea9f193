"""A clock in PostgreSQL that a test drives, for who asks there what time it is."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import DateTime, column, select, table, text

from coord.queue.keys import QueueKeys
from coord.worker.maintenance.ticker import Ticker
from tests.workers import a_state

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from coord import Periodic
    from tests.workers import Office

START = datetime(2026, 1, 5, tzinfo=UTC)
_at = table("clock", column("at", DateTime(timezone=True)))


class Clock:
    def __init__(self, engine: AsyncEngine, office: Office) -> None:
        self.engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self.session_maker = office.session_maker
        self.now = START

    def ticker(self, *schedules: Periodic, queue: str = "default") -> Ticker:
        now = select(_at.c.at).scalar_subquery()
        keys = QueueKeys(queue=queue)
        return Ticker(a_state(self.engine, session_maker=self.session_maker, periodic=schedules, keys=keys), clock=now)

    async def set(self, now: datetime) -> None:
        self.now = now
        async with self.engine.connect() as connection:
            await connection.execute(text("UPDATE clock SET at = :now"), {"now": now})

    async def go_on(self, **span: float) -> None:
        await self.set(self.now + timedelta(**span))


@pytest.fixture
async def clock(engine: AsyncEngine, office: Office) -> Clock:
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE IF NOT EXISTS clock (at timestamptz)"))
        await connection.execute(text("DELETE FROM clock"))
        await connection.execute(text("INSERT INTO clock VALUES (:now)"), {"now": START})
    return Clock(engine, office)
