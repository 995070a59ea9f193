"""What waiting costs while nothing changes: connections, statements, memory and CPU time."""

from __future__ import annotations

import asyncio
import gc
import math
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from redis.asyncio import Redis
from sqlalchemy import event, update
from sqlalchemy.ext.asyncio import async_sessionmaker

from benchmarks.cpu import postgresql_seconds
from benchmarks.loop import installed
from benchmarks.report import Section, Table, Target
from benchmarks.waiting.crowd import INTERVAL, Crowd
from benchmarks.waiting.process import apart, resident_bytes
from benchmarks.waiting.stage import Order, coord_wait, missing_peer, toolsets_wait
from coord import Coordinator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    from benchmarks.report import Row
    from benchmarks.waiting.scale import Scale
    from benchmarks.waiting.stage import Stage

CHUNK = 5_000
"""Keys that coord reads in one statement."""
NAME = "waiters"
UNDECLARED = "coord, without read_settings"
DECLARED: Mapping[str, str] = MappingProxyType({})
WARM = 10
"""Waiters before the crowd, so that what is made once counts for nobody."""


@dataclass(frozen=True, slots=True)
class Idle:
    waiters: int
    pool: int
    connections: int
    redis_connections: int
    statements_a_second: float
    bytes_each: float
    cpu: float
    """Share of a core."""
    postgresql_cpu: float

    @property
    def statements_an_interval(self) -> float:
        """With the chunks of a read as one."""
        return self.statements_a_second * INTERVAL / _chunks(self.waiters)


def measure(stage: Stage, scale: Scale) -> dict[str, Idle]:
    found = {"coord": apart(_measure, stage, scale, scale.waiters, 1, False)}
    found[UNDECLARED] = apart(_measure, stage, scale, scale.waiters, 1, False, None)
    found["coord, as few"] = apart(_measure, stage, scale, scale.peer_waiters, 1, False)
    if installed("fastapi_toolsets"):
        found["fastapi-toolsets"] = apart(_measure, stage, scale, scale.peer_waiters, 20, True)
    return found


async def _measure(
    stage: Stage, scale: Scale, waiters: int, pool: int, peer: bool, read_settings: Mapping[str, str] | None = DECLARED
) -> Idle:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(stage.orders(max(waiters, WARM)))
        engine = await stack.enter_async_context(stage.engine(NAME, pool))
        sessions = async_sessionmaker(engine, expire_on_commit=False)
        if not peer:
            coordinator = Coordinator(sessions, redis=stage.redis(NAME), read_settings=read_settings)
            await stack.enter_async_context(coordinator)
        wait = toolsets_wait if peer else coord_wait
        warm = Crowd(sessions, wait)
        async with warm.gathered(WARM):
            await warm.answered(_change_all(sessions))
        gc.collect()
        before = resident_bytes()
        async with Crowd(sessions, wait).gathered(waiters):
            await asyncio.sleep(scale.settle_seconds)
            gc.collect()
            each = (resident_bytes() - before) / waiters
            await asyncio.sleep(INTERVAL)  # the collection has kept a read waiting
            return await _watched(stage, engine, scale.idle_seconds, waiters, pool, each)


async def _change_all(sessions: async_sessionmaker[AsyncSession]) -> float:
    """Through the waiters' engine, so that their process has rung and is connected for that as well."""
    async with sessions.begin() as session:
        await session.execute(update(Order).values(status="paid"))
    return time.perf_counter()


async def _watched(stage: Stage, engine: AsyncEngine, seconds: float, waiters: int, pool: int, each: float) -> Idle:
    """Each statement has a connection checked out for itself, by coord's waits as by the other's."""
    times: list[float] = []

    def note(*_: Any) -> None:
        times.append(time.monotonic())

    event.listen(engine.sync_engine, "checkout", note)
    began, cpu, postgresql_cpu = time.monotonic(), time.process_time(), postgresql_seconds(stage.postgresql_pid)
    await asyncio.sleep(seconds)
    took = time.monotonic() - began
    cpu, postgresql_cpu = time.process_time() - cpu, postgresql_seconds(stage.postgresql_pid) - postgresql_cpu
    event.remove(engine.sync_engine, "checkout", note)
    samples = [await _connections(stage) for _ in range(10)]
    most, most_redis = (max(column) for column in zip(*samples, strict=True))
    return Idle(
        waiters, pool, most, most_redis, _pace(times, _chunks(waiters)), each, cpu / took, postgresql_cpu / took
    )


def _pace(times: list[float], chunks: int) -> float:
    """Statements a second, from the same chunk of one read to that of another: a window may cut a read short."""
    reads = times[::chunks]
    return chunks * (len(reads) - 1) / (reads[-1] - reads[0])


def _chunks(waiters: int) -> int:
    return math.ceil(waiters / CHUNK)


async def _connections(stage: Stage) -> tuple[int, int]:
    await asyncio.sleep(INTERVAL / 7)
    async with stage.connection() as observer, Redis.from_url(stage.redis_url) as redis:
        pooled = await observer.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", NAME)
        clients = await redis.client_list()
    return pooled, sum(client["name"] == NAME for client in clients)


def report(found: dict[str, Idle], scale: Scale) -> Section:
    head = ("", *found)
    lines = {
        "waiters": [f"{idle.waiters:,}" for idle in found.values()],
        "pool size": [str(idle.pool) for idle in found.values()],
        "PostgreSQL connections": [str(idle.connections) for idle in found.values()],
        "Redis connections": [str(idle.redis_connections) for idle in found.values()],
        "statements a second": [f"{idle.statements_a_second:.1f}" for idle in found.values()],
        "reads a model and interval": [f"{idle.statements_an_interval:.2f}" for idle in found.values()],
        "KiB a waiter": [f"{idle.bytes_each / 1024:.1f}" for idle in found.values()],
        "CPU, % of a core": [f"{idle.cpu:.1%}".rstrip("%") for idle in found.values()],
        "CPU a 1,000 waiters": [f"{idle.cpu / idle.waiters * 1_000:.1%}".rstrip("%") for idle in found.values()],
        "PostgreSQL's CPU": [f"{idle.postgresql_cpu:.1%}".rstrip("%") for idle in found.values()],
    }
    rows: list[Row] = [(line, *values) for line, values in lines.items()]
    remarks = [
        f"Every {INTERVAL} s each row is looked at; nothing changes. coord reads {CHUNK:,} rows in one statement.",
        "A waiter's memory is what the process grew by: its task, its session, its row and its wait.",
        *missing_peer(),
    ]
    return Section("Waiters, idle", [Table(head, rows)], _targets(found["coord"]), remarks)


def _targets(idle: Idle) -> list[Target]:
    name = f"{idle.waiters:,} waiters idle"
    connections = f"{idle.connections} and {idle.redis_connections}"
    reads, kib = idle.statements_an_interval, idle.bytes_each / 1024
    fits = idle.connections <= 1 and idle.redis_connections <= 2
    return [
        Target(f"{name}, pooled and Redis connections", "≤ 1 and ≤ 2", connections, fits),
        Target(f"{name}, queries a model and interval", "≤ 1", f"{reads:.2f}", round(reads, 2) <= 1),
        Target(f"{name}, a waiter's memory", "≤ 8 KiB", f"{kib:.1f} KiB", kib <= 8),
    ]
