"""SAQ on Redis, waited for by `Job.refresh`, which subscribes, or by `Queue.apply`, which polls."""

from __future__ import annotations

from typing import Any

from saq import Queue, Worker

from benchmarks.roundtrip.contender import PATIENCE, Contender
from benchmarks.roundtrip.orders import CONCURRENCY

JOB = "fulfil"


class _Saq(Contender):
    async def work(self) -> None:
        async def fulfil(_: Any, *, order_id: int) -> None:
            await self.orders.fulfil(order_id)

        await self.open()
        await Worker(self.queue, [(JOB, fulfil)], concurrency=CONCURRENCY).start()

    async def open(self) -> None:
        self.queue = Queue.from_url(self.scene.redis_url)
        await self.queue.connect()


class Refresh(_Saq):
    async def have_fulfilled(self, order_id: int) -> None:
        job = await self.queue.enqueue(JOB, order_id=order_id)
        await job.refresh(until_complete=PATIENCE)


class Apply(_Saq):
    async def have_fulfilled(self, order_id: int) -> None:
        await self.queue.apply(JOB, timeout=PATIENCE, poll_interval=0.01, order_id=order_id)
