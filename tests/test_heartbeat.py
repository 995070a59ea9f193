"""The keeper keeps its hours: what it has waited for is no time spent, and who is stopped early is not on the list."""

# ruff: noqa: F401, F811 - fixtures are imported
from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from arq.worker import create_worker
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from coord import worker_settings
from coord.jobs.model import JobState
from tests.ledger import a_task, ledger
from tests.proxy import Proxy
from tests.serving import eventually
from tests.shop import waiting_for_locks
from tests.workers import Working, office, script, until, working

if TYPE_CHECKING:
    from asyncpg import Connection

    from tests.workers import Office

HELD_UP = 4.0
ANSWERS = 30


async def test_a_look_that_was_held_up_delays_the_next_by_nothing(
    office: Office, script: Office, observer: Connection
) -> None:
    """As one is whose process was frozen: the eldest worker would look after nobody for four times as long."""

    async def held_up() -> bool:
        return await waiting_for_locks(observer, "SELECT coord_jobs.id, coord_jobs.attempt") > 0

    async with working(office, [a_task]):
        async with script.session_maker.begin() as session:
            await session.execute(text("LOCK TABLE coord_jobs"))
            await eventually(held_up)
            await asyncio.sleep(HELD_UP)
        job = await script.enqueue(a_task)
        assert (await office.final(job, within=HELD_UP + 4)).state is JobState.DONE


async def test_a_worker_stopped_at_any_step_of_its_start_is_not_on_the_list(office: Office) -> None:
    """Whether its row is not yet written, is, or is and the worker does not know."""
    for answer in range(1, ANSWERS):
        has_begun = await stopped_before(answer, office)
        assert await office.workers() == [], answer
        if has_begun:
            return
    raise AssertionError(f"it waits for more than {ANSWERS} answers")


async def stopped_before(answer: int, office: Office) -> bool:
    """A worker that is stopped while that answer of PostgreSQL is on its way; whether it has begun without."""
    async with Proxy(office.database_url).opened() as proxy:
        proxy.stops_at = answer
        engine = create_async_engine(proxy.url)
        sessions = async_sessionmaker(engine, expire_on_commit=False)
        settings: Any = worker_settings([a_task], session_maker=sessions, redis=office.redis_url, handle_signals=False)
        worker = Working(create_worker(settings), settings.redis_pool)
        await until(lambda: not proxy.flows.is_set() or worker.redis.pickup is not None)
        has_begun = worker.redis.pickup is not None
        worker.running.cancel()
        await asyncio.sleep(0)
        proxy.stops_at = 0
        proxy.flows.set()
        while not worker.running.done():  # redis-py may swallow a cancellation; see coord.notify.client
            worker.running.cancel()
            await asyncio.wait([worker.running], timeout=0.5)
        await worker.stop()
        await engine.dispose()
    return has_begun
