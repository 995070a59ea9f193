"""How soon all are answered when every watched row changes at once."""

from __future__ import annotations

import asyncio
import statistics
from contextlib import AsyncExitStack
from time import perf_counter
from typing import TYPE_CHECKING

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import async_sessionmaker

from benchmarks.report import Section, Table, Target, milliseconds
from benchmarks.waiting.crowd import Crowd
from benchmarks.waiting.process import apart
from benchmarks.waiting.stage import Order, coord_wait
from coord import Coordinator

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks.report import Row
    from benchmarks.waiting.scale import Scale
    from benchmarks.waiting.stage import Stage

    Changes = dict[str, Callable[[str], Awaitable[float]]]

LIMIT = 2.0
BULK = "one ORM bulk update, the table's bell"
FLUSH = "one flush of every row, the table's bell"
RAW = "raw SQL, no bell, interval 0.5"
UNDECLARED = ", without read_settings"

Waves = dict[str, list[list[float]]]
"""By the way of changing, for each wave the seconds from the commit to each answer."""


def measure(stage: Stage, scale: Scale) -> Waves:
    undeclared = apart(_measure, stage, scale, None)
    return apart(_measure, stage, scale, {}) | {way + UNDECLARED: waves for way, waves in undeclared.items()}


async def _measure(stage: Stage, scale: Scale, read_settings: dict[str, str] | None) -> Waves:
    found: Waves = {BULK: [], FLUSH: [], RAW: []}
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(stage.orders(scale.waiters))
        engine = await stack.enter_async_context(stage.engine("waiters", 1))
        sessions = async_sessionmaker(engine, expire_on_commit=False)
        coordinator = Coordinator(sessions, redis=stage.redis_url, read_settings=read_settings)
        await stack.enter_async_context(coordinator)
        changes = await _writer(stack, stage)
        crowd = Crowd(sessions, coord_wait)
        await stack.enter_async_context(crowd.gathered(scale.waiters))
        for number in range(scale.waves):
            for way, change in changes.items():
                await asyncio.sleep(scale.settle_seconds)
                found[way].append(await crowd.answered(change(f"{way} {number}")))
    return found


async def _writer(stack: AsyncExitStack, stage: Stage) -> Changes:
    """With an engine and a bell of its own, as in a process of its own."""
    engine = await stack.enter_async_context(stage.engine("writer", 1))
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    await stack.enter_async_context(Coordinator(sessions, redis=stage.redis_url, read_settings={}))
    plain = await stack.enter_async_context(stage.connection())

    async def bulk(status: str) -> float:
        async with sessions() as session:
            await session.execute(update(Order).values(status=status))
            await session.commit()
            return perf_counter()

    async def flush(status: str) -> float:
        async with sessions() as session:
            for order in await session.scalars(select(Order)):
                order.status = status
            await session.commit()
            return perf_counter()

    async def raw(status: str) -> float:
        await plain.execute("UPDATE orders SET status = $1", status)
        return perf_counter()

    return {BULK: bulk, FLUSH: flush, RAW: raw}


def report(found: Waves, scale: Scale) -> Section:
    rows: list[Row] = []
    quickest = statistics.median(wave[-1] for wave in found[BULK])
    declared = {way: waves for way, waves in found.items() if not way.endswith(UNDECLARED)}
    for way, waves in declared.items():
        halves = statistics.median(wave[len(wave) // 2] for wave in waves)
        lasts = [wave[-1] for wave in waves]
        times = (halves, statistics.median(lasts), max(lasts))
        ratio = f"{times[1] / quickest:.2f}"
        without = milliseconds(statistics.median(wave[-1] for wave in found[way + UNDECLARED]))
        rows.append((way, str(len(waves)), *map(milliseconds, times), ratio, without))
    worst = max(wave[-1] for waves in declared.values() for wave in waves)
    head = ("changed by", "waves", "half answered", "all answered", "worst", "ratio", "all, without read_settings")
    remarks = [
        f"{scale.waiters:,} waiters, seconds from the return of the commit to the return of their waits.",
        "The writer is in the same process, with an engine and a bell of its own.",
    ]
    target = Target(
        f"{scale.waiters:,} rows changed at once, the last waiter answered", "≤ 2 s", f"{worst:.2f} s", worst <= LIMIT
    )
    return Section("All rows changed at once", [Table(head, rows)], [target], remarks)
