"""taskiq with the list broker and the result backend of taskiq-redis; the result's key is polled."""

from __future__ import annotations

from taskiq.api import run_receiver_task
from taskiq_redis import ListQueueBroker, RedisAsyncResultBackend

from benchmarks.roundtrip.contender import PATIENCE, Contender
from benchmarks.roundtrip.orders import CONCURRENCY


class Taskiq(Contender):
    async def work(self) -> None:
        await self.open()
        await run_receiver_task(self._broker, max_async_tasks=CONCURRENCY)

    async def open(self) -> None:
        async def fulfil(order_id: int) -> None:
            await self.orders.fulfil(order_id)

        url = self.scene.redis_url
        self._broker = ListQueueBroker(url).with_result_backend(RedisAsyncResultBackend(url))
        self._task = self._broker.register_task(fulfil, task_name="fulfil")
        await self._broker.startup()

    async def have_fulfilled(self, order_id: int) -> None:
        task = await self._task.kiq(order_id)
        result = await task.wait_result(check_interval=0.01, timeout=PATIENCE)
        result.raise_for_error()
