"""Who plays: a worker in a process of its own, its tasks, and how much there is to do."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arq.worker import create_worker
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from benchmarks.loop import run
from coord import create_ledger, job_transaction, worker_settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from benchmarks.servers import Servers

    Sessions = async_sessionmaker[AsyncSession]

SLOTS = 20


@dataclass(frozen=True, slots=True)
class Scale:
    later: int
    """Jobs scheduled for the days after tomorrow."""
    due: int
    """Jobs due at once."""
    ahead: float
    """Seconds by which these are written before their time: the scheduler takes them up a minute before."""
    warm: int
    """Jobs before any is counted, so that what a process needs once counts for nobody."""
    idle_seconds: float
    scripts: int
    """Jobs that nobody hands over, while nothing else is due."""
    drain_seconds: float = 900.0
    """After which the rest is left."""


FULL = Scale(later=1_000_000, due=100_000, ahead=70.0, warm=2_000, idle_seconds=20.0, scripts=10)
QUICK = Scale(later=5_000, due=200, ahead=0.0, warm=100, idle_seconds=1.0, scripts=1)


async def drain(ctx: dict[str, Any]) -> None:
    async with job_transaction(ctx):
        """The effect would be here."""


async def urgent(ctx: dict[str, Any]) -> float:
    """When it was begun, on the clock that all processes of a machine share."""
    return time.monotonic()


@asynccontextmanager
async def opened_sessions(database_url: str) -> AsyncIterator[Sessions]:
    engine = create_async_engine(database_url, pool_size=SLOTS, max_overflow=0)
    try:
        yield async_sessionmaker(engine, expire_on_commit=False)
    finally:
        await engine.dispose()


def work(servers: Servers) -> None:
    run(_work(servers))


async def _work(servers: Servers) -> None:
    async with opened_sessions(servers.database_url) as sessions:
        options: dict[str, Any] = {"max_jobs": SLOTS, "handle_signals": False}
        settings = worker_settings([drain, urgent], session_maker=sessions, redis=servers.redis_url, **options)
        await create_worker(settings).async_run()


async def prepare(database_url: str) -> None:
    async with opened_sessions(database_url) as sessions, sessions.begin() as session:
        await create_ledger(await session.connection())
