"""The floor: what somebody would write by hand who has this one job, no framework, and no wish to survive anything."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import asyncpg
from redis.asyncio import Redis

from benchmarks.roundtrip.contender import Contender
from benchmarks.roundtrip.orders import CONCURRENCY

if TYPE_CHECKING:
    from benchmarks.roundtrip.orders import Scene

QUEUE, CHANNEL = "orders", "orders_done"


class _Floor(Contender):
    """A list in Redis, from which each of the worker's tasks takes the next order; one subscriber for all waits."""

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.redis = Redis.from_url(scene.redis_url)
        self._waits: dict[int, asyncio.Future[None]] = {}

    async def work(self) -> None:
        await asyncio.gather(*(self._take() for _ in range(CONCURRENCY)))

    async def _take(self) -> None:
        while True:
            _, order_id = await self.redis.blpop([QUEUE])
            await self.fulfil(int(order_id))

    @abstractmethod
    async def fulfil(self, order_id: int) -> None:
        """And say so."""

    async def have_fulfilled(self, order_id: int) -> None:
        done = self._waits[order_id] = asyncio.get_running_loop().create_future()
        await self.redis.rpush(QUEUE, order_id)
        await done

    def hear(self, order_id: int) -> None:
        done = self._waits.pop(order_id, None)
        if done is not None and not done.done():
            done.set_result(None)


class Publish(_Floor):
    """Says so with PUBLISH, after the commit."""

    async def fulfil(self, order_id: int) -> None:
        await self.orders.fulfil(order_id)
        await self.redis.publish(CHANNEL, order_id)

    async def open(self) -> None:
        self._subscription = self.redis.pubsub()
        await self._subscription.subscribe(CHANNEL)
        self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        async for message in self._subscription.listen():
            if message["type"] == "message":
                self.hear(int(message["data"]))


class Notify(_Floor):
    """Says so with NOTIFY, in the job's transaction."""

    async def fulfil(self, order_id: int) -> None:
        await self.orders.fulfil(order_id, announced_on=CHANNEL)

    async def open(self) -> None:
        self._connection = await asyncpg.connect(self.scene.dsn)

        def heard(*notification: Any) -> None:
            self.hear(int(notification[-1]))

        await self._connection.add_listener(CHANNEL, heard)
