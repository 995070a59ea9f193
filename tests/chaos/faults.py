"""What goes wrong, and when: the same seed gives the same storm."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from tests.chaos.stack import Stack
    from tests.shop import Network

TO_WORKERS = ("worker killed", "worker frozen")
TO_SERVERS = ("Redis flushed", "Redis restarted", "PostgreSQL restarted")
TO_NETWORKS = {"a worker cut off from Redis": "Redis", "a worker cut off from PostgreSQL": "PostgreSQL"}
BETWEEN_WORKERS = 3.0  # seconds, on average
BETWEEN_SERVERS = 6.0
BETWEEN_CUTS = 9.0
FROZEN = (0.5, 12.0)
AWAY = (0.2, 3.0)
CUT_OFF = (1.0, 15.0)


class Fault(NamedTuple):
    at: float
    """Seconds after the storm has begun."""
    kind: str
    seconds: float
    """How long a frozen worker stands still, Redis is away, or a worker is cut off."""


def forecast(seconds: float, seed: int) -> list[Fault]:
    """A worker is killed or frozen every three seconds; the others take turns, in random order."""
    chance = random.Random(seed)
    faults, at = [], 1.0
    while at < seconds:
        faults.append(Fault(at, chance.choice(TO_WORKERS), chance.uniform(*FROZEN)))
        at += chance.uniform(0.5, 1.5) * BETWEEN_WORKERS
    for kinds, first, pause, lasting in (
        (TO_SERVERS, 3.0, BETWEEN_SERVERS, AWAY),
        (tuple(TO_NETWORKS), 5.0, BETWEEN_CUTS, CUT_OFF),
    ):
        at, turns = first, list[str]()
        while at < seconds:
            turns = turns or chance.sample(kinds, len(kinds))
            faults.append(Fault(at, turns.pop(), chance.uniform(*lasting)))
            at += chance.uniform(0.5, 1.5) * pause
    return sorted(faults)


async def _cut(network: Network, seconds: float) -> None:
    network.cut()
    try:
        await asyncio.sleep(seconds)
    finally:
        network.up = True


class Storm:
    """Does the faults to a stack, and knows whether one of its servers is away."""

    def __init__(self, stack: Stack, seconds: float, seed: int) -> None:
        self._stack = stack
        self._faults = forecast(seconds, seed)
        self._chance = random.Random(seed)
        self._away = 0
        self._thaws: set[asyncio.Task[None]] = set()
        self.done: Counter[str] = Counter()

    @property
    def is_calm(self) -> bool:
        """Whether both servers are up."""
        return not self._away

    async def rage(self) -> None:
        """All faults in turn; returns when the last is over."""
        began = time.monotonic()
        for fault in self._faults:
            await asyncio.sleep(began + fault.at - time.monotonic())
            if fault.kind in TO_WORKERS:
                self._strike(fault)
            elif fault.kind in TO_NETWORKS:
                self._cut_off(fault)
            else:
                await self._shake(fault)
        if self._thaws:
            await asyncio.wait(self._thaws)

    def _strike(self, fault: Fault) -> None:
        """One worker is always left to do the work, and to look after the others."""
        working = [worker for worker in self._stack.workers if worker.is_working]
        able = [worker for worker in self._stack.workers if worker.is_alive and [worker] != working]
        if not working or not able:
            self.done["worker spared"] += 1
            return
        worker = self._chance.choice(able)
        if fault.kind == "worker killed":
            worker.kill()
        else:
            self._begin(worker.freeze(fault.seconds))
        self.done[fault.kind] += 1

    def _begin(self, lasting: Coroutine[Any, Any, None]) -> None:
        """What is over before the storm is."""
        thaw = asyncio.create_task(lasting)
        self._thaws.add(thaw)
        thaw.add_done_callback(self._thaws.discard)

    def _cut_off(self, fault: Fault) -> None:
        network = self._stack.networks[TO_NETWORKS[fault.kind]]
        others = [worker for worker in self._stack.workers if worker.is_working and worker.network is not network]
        if not network.up or not others:
            self.done["worker spared"] += 1
            return
        self._begin(_cut(network, fault.seconds))
        self.done[fault.kind] += 1

    async def _shake(self, fault: Fault) -> None:
        stack = self._stack
        if fault.kind == "Redis flushed":
            await stack.flush_redis()
        elif fault.kind == "Redis restarted":
            with self._without():
                await asyncio.to_thread(stack.valkey.stop, "immediate")
                await asyncio.sleep(fault.seconds)
                await asyncio.to_thread(stack.valkey.start)
        else:
            with self._without():
                await asyncio.to_thread(stack.postgresql.restart, "immediate")
        self.done[fault.kind] += 1

    @contextmanager
    def _without(self) -> Iterator[None]:
        self._away += 1
        try:
            yield
        finally:
            self._away -= 1
