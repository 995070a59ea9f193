"""One contender's turn: a database of its own, its processes, requests one at a time and then many at once."""

from __future__ import annotations

import asyncio
import os
import statistics
from collections import Counter
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from redis.asyncio import Redis

from benchmarks.cpu import postgresql_seconds, process_seconds
from benchmarks.roundtrip.contender import PATIENCE
from benchmarks.roundtrip.crew import Crew, TurnError
from benchmarks.roundtrip.orders import Scene
from benchmarks.roundtrip.requester import READY_SECONDS, Tally

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from pathlib import Path

    import asyncpg

    from benchmarks.roundtrip.catalogue import Entry
    from benchmarks.roundtrip.crew import Member
    from benchmarks.roundtrip.scale import Scale
    from benchmarks.servers import Servers

    Connect = Callable[[], AbstractAsyncContextManager[asyncpg.Connection]]

T = TypeVar("T")

GRACE = 3 * PATIENCE
"""Seconds that a phase may take longer than it should, for requests that have no answer."""
TURN_SECONDS = 300.0
"""After which something hangs."""
DATABASE = "turn"
WRONG_SQL = "SELECT count(*) FROM orders WHERE effects <> 1"


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU seconds by process, or of one request."""

    requester: float
    worker: float
    postgresql: float
    redis: float

    @property
    def all(self) -> tuple[float, ...]:
        return self.requester, self.worker, self.postgresql, self.redis

    def since(self, before: Cost) -> Cost:
        return Cost(*(now - then for now, then in zip(self.all, before.all, strict=True)))

    def over(self, requests: int) -> Cost:
        return Cost(*(seconds / requests for seconds in self.all))


@dataclass(frozen=True, slots=True)
class Turn:
    single: Tally
    """One request at a time."""
    crowd: Tally
    """Many at once."""
    rate: float
    """Answers a second, of the crowd."""
    cost: Cost
    """Of a request of the crowd."""
    wrong: int
    """Orders whose effect was applied never or twice."""
    load: float
    """Average of the minute before."""

    @property
    def p50(self) -> float:
        """Seconds of a request that is alone."""
        return statistics.median(self.single.microseconds) / 1e6

    @property
    def failures(self) -> Counter[str]:
        return self.single.failures + self.crowd.failures

    @property
    def lost(self) -> int:
        return self.single.lost + self.crowd.lost

    @property
    def answered(self) -> int:
        return self.single.answered + self.crowd.answered


@dataclass(frozen=True, slots=True)
class Team:
    """How many processes play."""

    workers: int = 1
    requesters: int = 1


async def play(servers: Servers, entry: Entry, python: Path, mode: str, scale: Scale) -> Turn:
    """One request at a time, and then many at once, with one process on either side."""
    load = os.getloadavg()[0]
    async with asyncio.timeout(TURN_SECONDS), staged(servers, entry, python, mode, Team()) as (crew, database):
        single = await _one_at_a_time(crew, scale)
        crowd, before, after = await at_once(crew, scale, partial(spent, servers, crew))
        if not single.microseconds or not crowd.microseconds:
            raise TurnError(f"{entry.title} has answered nothing in time: {single.failures}, {crowd.failures}")
        cost = after.since(before).over(max(1, len(crowd.microseconds)))
        rate = len(crowd.microseconds) / scale.crowd_seconds
        async with database() as connection:
            return Turn(single, crowd, rate, cost, await connection.fetchval(WRONG_SQL), load)


@asynccontextmanager
async def staged(
    servers: Servers, entry: Entry, python: Path, mode: str, team: Team
) -> AsyncIterator[tuple[Crew, Connect]]:
    """From when every requester has had an answer. Connections are to the turn's own database."""
    async with _fresh(servers) as database, AsyncExitStack() as stack:
        scene = Scene(database.database_url, servers.redis_url, mode)
        crew = await stack.enter_async_context(Crew(python, entry.path, scene, servers.directory, root=entry.root))
        requesters = [await crew.add_requester() for _ in range(team.requesters)]
        await requesters[0].ask("prepare", READY_SECONDS)
        for _ in range(team.workers):
            await crew.add_worker()
        await asyncio.gather(*(each.ask("begin", 2 * READY_SECONDS) for each in requesters))
        yield crew, database.connection


@asynccontextmanager
async def _fresh(servers: Servers) -> AsyncIterator[Servers]:
    """A database and a Redis that are empty."""
    async with servers.connection() as admin, Redis.from_url(servers.redis_url) as redis:
        await redis.flushall()
        await admin.execute(f"CREATE DATABASE {DATABASE}")
        fresh = replace(servers, database_url=f"{servers.database_url.rpartition('/')[0]}/{DATABASE}")
        try:
            await admin.execute("CHECKPOINT")
            yield fresh
        finally:
            await admin.execute(f"DROP DATABASE {DATABASE} WITH (FORCE)")


async def _one_at_a_time(crew: Crew, scale: Scale) -> Tally:
    options = {"requests": scale.requests, "seconds": scale.request_seconds, "think": scale.think_seconds}
    return _tally([await crew.requesters[0].ask("one_at_a_time", scale.request_seconds + GRACE, **options)])


async def at_once(crew: Crew, scale: Scale, observe: Callable[[], Awaitable[T]]) -> tuple[Tally, T, T]:
    """What came of it, and what was observed when the window began and ended. Each process has its share of them."""
    each = scale.requesters // len(crew.requesters)
    options = {"requesters": each, "warm": scale.warm_seconds, "seconds": scale.crowd_seconds}
    within = scale.warm_seconds + scale.crowd_seconds + GRACE
    asked = [asyncio.create_task(member.ask("at_once", within, **options)) for member in crew.requesters]
    try:
        await asyncio.sleep(scale.warm_seconds)
        before = await observe()
        await asyncio.sleep(scale.crowd_seconds)
        after = await observe()
        return _tally(await asyncio.gather(*asked)), before, after
    finally:
        for task in asked:
            task.cancel()


async def spent(servers: Servers, crew: Crew) -> Cost:
    def of(members: Sequence[Member]) -> float:
        return sum(process_seconds(member.process.pid) for member in members)

    rest = postgresql_seconds(servers.postgresql_pid), process_seconds(servers.redis_pid)
    return Cost(of(crew.requesters), of(crew.workers), *rest)


def _tally(answers: Sequence[dict[str, Any]]) -> Tally:
    """Of all the processes."""
    whole = Tally()
    for answer in answers:
        whole.answered += answer["answered"]
        whole.lost += answer["lost"]
        whole.failures += Counter(answer["failures"])
        whole.microseconds += answer["microseconds"]
    return whole
