"""What goes wrong, and when: the same seed gives the same storm."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

import redis.asyncio

from coord.testing.history import FaultSpan

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from coord.testing.history import Recorder
    from coord.testing.proof.stack import Stack


class Fault(StrEnum):
    WORKER_KILLED = "worker killed"
    WORKER_FROZEN = "worker frozen"
    WORKER_WITHOUT_REDIS = "worker cut off from Redis"
    WORKER_WITHOUT_POSTGRESQL = "worker cut off from PostgreSQL"
    API_KILLED = "API killed"
    API_FROZEN = "API frozen"
    REDIS_FLUSHED = "Redis flushed"
    REDIS_RESTARTED = "Redis restarted"
    POSTGRESQL_RESTARTED = "PostgreSQL restarted"


class Rhythm(NamedTuple):
    """Faults that take turns, in random order. Times are seconds."""

    kinds: tuple[Fault, ...]
    first: float
    pause: float
    """Between two, on average."""
    shortest: float
    """How long one lasts, if it does."""
    longest: float


RHYTHMS = (
    Rhythm((Fault.WORKER_KILLED, Fault.WORKER_FROZEN), 1.0, 3.0, 0.5, 12.0),
    Rhythm((Fault.REDIS_FLUSHED, Fault.REDIS_RESTARTED, Fault.POSTGRESQL_RESTARTED), 3.0, 6.0, 0.2, 3.0),
    Rhythm((Fault.WORKER_WITHOUT_REDIS, Fault.WORKER_WITHOUT_POSTGRESQL), 5.0, 9.0, 1.0, 15.0),
    Rhythm((Fault.API_KILLED, Fault.API_FROZEN), 7.0, 12.0, 0.5, 4.0),
)


RESTARTS = (Fault.REDIS_RESTARTED, Fault.POSTGRESQL_RESTARTED)
"""Which nothing else is begun beside."""


class Strike(NamedTuple):
    at: float
    """Seconds after the storm has begun."""
    kind: Fault
    lasting: float


def forecast(seconds: float, seed: int, faults: Iterable[Fault]) -> Iterator[Strike]:
    """In the order of time, however long it goes on."""
    chance, wanted = random.Random(seed), {*faults}
    chosen = {rhythm: [kind for kind in rhythm.kinds if kind in wanted] for rhythm in RHYTHMS}
    due = {rhythm: (rhythm.first, list[Fault]()) for rhythm, kinds in chosen.items() if kinds}
    while due:
        rhythm = min(due, key=lambda each: due[each][0])
        at, turns = due[rhythm]
        if at >= seconds:
            return
        turns = turns or chance.sample(chosen[rhythm], len(chosen[rhythm]))
        yield Strike(at, turns.pop(), chance.uniform(rhythm.shortest, rhythm.longest))
        due[rhythm] = (at + chance.uniform(0.5, 1.5) * rhythm.pause, turns)


class Storm:
    """Does the faults to a stack. One worker is always left, to do the work and to look after the others."""

    def __init__(self, stack: Stack, recorder: Recorder, seed: int) -> None:
        self._stack = stack
        self._recorder = recorder
        self._chance = random.Random(seed)
        self._away = self._outages = 0
        self.done: Counter[str] = Counter()
        self.last = ""

    @property
    def calm(self) -> int | None:
        """While the API and both servers are up, the same number until one of them is not; else None."""
        return None if self._away else self._outages

    async def rage(self, strikes: Iterator[Strike]) -> None:
        """All of them in turn; returns when the last is over."""
        began = self._recorder.now()
        async with asyncio.TaskGroup() as lasting:
            for strike in strikes:
                await asyncio.sleep(began + strike.at - self._recorder.now())
                task = lasting.create_task(self._strike(strike), name=f"coord proof: {strike.kind}")
                if strike.kind in RESTARTS:
                    await task

    async def _strike(self, strike: Strike) -> None:
        match strike.kind:
            case Fault.WORKER_KILLED | Fault.WORKER_FROZEN:
                await self._worker(strike)
            case Fault.WORKER_WITHOUT_REDIS | Fault.WORKER_WITHOUT_POSTGRESQL:
                await self._link(strike)
            case Fault.REDIS_FLUSHED:
                with self._fault(strike):
                    async with redis.asyncio.Redis.from_url(self._stack.valkey.url) as client:
                        await client.flushall()
            case _:
                with self._fault(strike), self._without():
                    await self._server(strike)

    async def _worker(self, strike: Strike) -> None:
        working = await self._stack.at_work()
        able = [worker for worker in self._stack.workers if worker.is_alive and [worker] != working]
        if not working or not able:
            self.done["worker spared"] += 1
            return
        worker = self._chance.choice(able)
        with self._fault(strike):
            if strike.kind is Fault.WORKER_KILLED:
                await worker.kill()
            else:
                await worker.freeze(strike.lasting)

    async def _link(self, strike: Strike) -> None:
        link = self._stack.links[strike.kind is Fault.WORKER_WITHOUT_POSTGRESQL]
        if not link.up or not [one for one in await self._stack.at_work() if self._stack.link_of(one) is not link]:
            self.done["worker spared"] += 1
            return
        with self._fault(strike):
            await link.cut(strike.lasting)

    async def _server(self, strike: Strike) -> None:
        stack = self._stack
        match strike.kind:
            case Fault.API_KILLED:
                await stack.api.kill()
                await stack.serves()
            case Fault.API_FROZEN:
                await stack.api.freeze(strike.lasting)
            case Fault.REDIS_RESTARTED:
                await asyncio.to_thread(stack.valkey.stop, "immediate")
                await asyncio.sleep(strike.lasting)
                await asyncio.to_thread(stack.valkey.start)
            case Fault.POSTGRESQL_RESTARTED:
                await asyncio.to_thread(stack.postgresql.restart, "immediate")

    @contextmanager
    def _without(self) -> Iterator[None]:
        self._away += 1
        self._outages += 1
        try:
            yield
        finally:
            self._away -= 1

    @contextmanager
    def _fault(self, strike: Strike) -> Iterator[None]:
        began, self.last = self._recorder.now(), strike.kind
        yield
        self.done[strike.kind] += 1
        stops = strike.kind is Fault.API_FROZEN
        self._recorder.write(FaultSpan(strike.kind, began, self._recorder.now(), stops_clients=stops))
