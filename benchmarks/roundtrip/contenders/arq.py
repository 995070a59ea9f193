"""arq, waited for by fastapi-toolsets, which polls the row, or by arq's own result, which polls Redis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from arq import create_pool
from arq.connections import RedisSettings
from arq.worker import Worker, func

from benchmarks.roundtrip.contender import PATIENCE, Contender
from benchmarks.roundtrip.orders import CONCURRENCY, Order

if TYPE_CHECKING:
    from arq.typing import WorkerCoroutine

JOB = "fulfil"


class _Arq(Contender):
    poll_delay: float
    """Seconds between the worker's looks at its queue."""

    async def work(self) -> None:
        async def fulfil(_: dict[Any, Any], order_id: int) -> None:
            await self.orders.fulfil(order_id)

        worker = Worker(
            functions=[func(cast("WorkerCoroutine", fulfil), name=JOB)],
            redis_settings=RedisSettings.from_dsn(self.scene.redis_url),
            max_jobs=CONCURRENCY,
            poll_delay=self.poll_delay,
            handle_signals=False,
        )
        await worker.async_run()

    async def open(self) -> None:
        self._pool = await create_pool(RedisSettings.from_dsn(self.scene.redis_url))


class Documented(_Arq):
    """Both with their defaults."""

    poll_delay = 0.5

    async def request(self, order_id: int) -> str:
        from fastapi_toolsets.db import wait_for_row_change

        await self.orders.insert(order_id)
        await self._pool.enqueue_job(JOB, order_id)
        async with self.orders.sessions() as session:
            order: Order = await wait_for_row_change(session, Order, order_id, timeout=PATIENCE)
            return order.status


class Tuned(_Arq):
    poll_delay = 0.01

    async def have_fulfilled(self, order_id: int) -> None:
        job = await self._pool.enqueue_job(JOB, order_id)
        assert job is not None
        await job.result(poll_delay=0.01)
