"""How soon a wait is answered: by the bell, against the same written by hand, and by polling, against a peer's."""

from __future__ import annotations

import asyncio
import random
import statistics
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from redis.asyncio import Redis
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from benchmarks.figures import percentile, ratio_of_blocks
from benchmarks.loop import installed
from benchmarks.report import Section, Table, Target, milliseconds
from benchmarks.waiting.process import apart
from benchmarks.waiting.stage import Base, Order, coord_wait, missing_peer, toolsets_wait
from coord import Coordinator

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from sqlalchemy.ext.asyncio import AsyncEngine

    from benchmarks.report import Row
    from benchmarks.waiting.scale import Scale
    from benchmarks.waiting.stage import Stage, Wait

    Sessions = async_sessionmaker[AsyncSession]

ROWS = 1_000
INTERVAL = 0.5
SETTLE = 0.005, 0.010
"""Seconds from the start of a wait to the change, long enough for its first look."""
FLOOR = "floor: publish → subscriber → select, by hand"
BELL = "coord, the bell"
UNDECLARED = "coord, the bell, without read_settings"
COORD_POLL = "coord, polling alone, interval 0.5"
TOOLSETS_POLL = "fastapi-toolsets, interval 0.5"
TOOLSETS_FAST = "fastapi-toolsets, interval 0.05"


@dataclass(frozen=True, slots=True)
class Latencies:
    """Seconds of every wake."""

    pushed: dict[str, list[float]]
    polled: dict[str, list[float]]

    @property
    def all(self) -> dict[str, list[float]]:
        return self.pushed | self.polled


def measure(stage: Stage, scale: Scale) -> Latencies:
    return apart(_measure, stage, scale)


async def _measure(stage: Stage, scale: Scale) -> Latencies:
    async with stage.orders(ROWS):
        async with stage.engine("pushed", 5) as engine:
            pushed = await _pushed(stage, engine, scale, {}, BELL)
        async with stage.engine("undeclared", 5) as engine:
            pushed[UNDECLARED] = (await _pushed(stage, engine, scale, None, UNDECLARED))[UNDECLARED]
        async with stage.engine("polled", 2 * scale.poll_batch) as engine:
            polled = await _polled(engine, scale)
    return Latencies(pushed, polled)


async def _pushed(
    stage: Stage, engine: AsyncEngine, scale: Scale, read_settings: dict[str, str] | None, way: str
) -> dict[str, list[float]]:
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    floor, bell = [], []
    coordinator = Coordinator(sessions, redis=stage.redis_url, read_settings=read_settings)
    async with coordinator, _by_hand(stage, engine) as hand:
        for number in range(-10, scale.pairs):  # the first ten make the connections and the statements
            key = 1 + number % ROWS
            pair = await hand.wake(key), await _wake(sessions, coord_wait, key, INTERVAL, random.uniform(*SETTLE))
            if number >= 0:
                floor.append(pair[0])
                bell.append(pair[1])
    return {FLOOR: floor, way: bell}


class _Hand:
    """The floor: what somebody would write who has this one wait and no other."""

    def __init__(self, redis: Redis, engine: AsyncEngine) -> None:
        self.heard: asyncio.Future[None] | None = None
        self._redis = redis
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")

    async def wake(self, key: int) -> float:
        self.heard = asyncio.get_running_loop().create_future()
        waiting = asyncio.create_task(self._wait(self.heard, key))
        await asyncio.sleep(random.uniform(*SETTLE))
        began = perf_counter()
        await self._redis.publish("by-hand", b"")
        return await waiting - began

    async def _wait(self, heard: asyncio.Future[None], key: int) -> float:
        await heard
        async with self._engine.connect() as connection:
            row = (await connection.execute(select(Base.metadata.tables["orders"]).where(Order.id == key))).one()
        ended = perf_counter()
        assert row.id == key
        return ended


@asynccontextmanager
async def _by_hand(stage: Stage, engine: AsyncEngine) -> AsyncIterator[_Hand]:
    async with Redis.from_url(stage.redis_url) as redis, redis.pubsub() as subscription:
        hand = _Hand(redis, engine)
        await subscription.subscribe("by-hand")

        async def listen() -> None:
            async for message in subscription.listen():
                if message["type"] == "message" and hand.heard is not None:
                    hand.heard.set_result(None)

        listening = asyncio.create_task(listen())
        try:
            yield hand
        finally:
            listening.cancel()
            with suppress(asyncio.CancelledError):
                await listening


async def _wake(sessions: Sessions, wait: Wait, key: int, interval: float, settle: float) -> float:
    """Seconds from the return of the writer's commit to the return of the wait."""
    async with sessions() as waiter, sessions() as writer:
        seen = await waiter.get_one(Order, key)
        await waiter.commit()
        waiting = asyncio.create_task(_timed(wait(waiter, key, interval)))
        await asyncio.sleep(settle)
        order = await writer.get_one(Order, key)
        order.status = "paid" if seen.status == "pending" else "pending"
        await writer.commit()
        committed = perf_counter()
        return await waiting - committed


async def _timed(wait: Awaitable[Order]) -> float:
    await wait
    return perf_counter()


async def _polled(engine: AsyncEngine, scale: Scale) -> dict[str, list[float]]:
    """Without a Coordinator. Changes come at any moment of the interval, several rows at once, to get on with it."""
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    ways: dict[str, tuple[Wait, float]] = {COORD_POLL: (coord_wait, 0.5)}
    if installed("fastapi_toolsets"):
        ways |= {TOOLSETS_POLL: (toolsets_wait, 0.5), TOOLSETS_FAST: (toolsets_wait, 0.05)}
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(scale.poll_batches):
        for way, (wait, interval) in ways.items():
            keys = random.sample(range(1, ROWS + 1), scale.poll_batch)
            wakes = [_wake(sessions, wait, key, interval, 0.05 + random.uniform(0, interval)) for key in keys]
            found[way] += await asyncio.gather(*wakes)
    return found


def report(found: Latencies, scale: Scale) -> Section:
    base = statistics.median(found.pushed[FLOOR])
    ratio = ratio_of_blocks(found.pushed[BELL], found.pushed[FLOOR], scale.block)
    ratios = {FLOOR: "1", BELL: str(ratio)}
    rows: list[Row] = []
    for way, values in found.all.items():
        percentiles = [milliseconds(percentile(values, share)) for share in (0.5, 0.95, 0.99)]
        by = ratios.get(way, f"{statistics.median(values) / base:.3g}")
        rows.append((way, str(len(values)), *percentiles, by))
    blocks = scale.pairs // scale.block
    how = (
        f"The bell's ratio is the median, with its 95 % interval, of {blocks} ratios of medians, each of {scale.block} "
        "alternating pairs; the others' is that of the two medians."
    )
    remarks = [how, *missing_peer()]
    target = Target(
        "commit → waiter returns, p50",
        "≤ 1 × the floor",
        f"{ratio} ×",
        statistics.median(found.pushed[BELL]) <= base,
    )
    head = ("woken by", "wakes", "p50", "p95", "p99", "ratio of p50")
    return Section("Wake latency", [Table(head, rows)], [target], remarks)
