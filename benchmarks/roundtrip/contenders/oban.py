"""Oban with sessions on psycopg, in whose transaction its job is inserted. It has no call that waits for a job, so the
job's state is polled.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from oban import Oban as Instance
from oban import worker
from oban.schema import install

from benchmarks.roundtrip.contender import Contender
from benchmarks.roundtrip.orders import CONCURRENCY, pending

if TYPE_CHECKING:
    from benchmarks.roundtrip.orders import Scene

INTERVAL = 0.01
QUEUE = "default"
FINAL = "discarded", "cancelled"


class Oban(Contender):
    def __init__(self, scene: Scene) -> None:
        super().__init__(replace(scene, database_url=scene.database_url.replace("+asyncpg", "+psycopg")))
        orders = self.orders

        @worker(queue=QUEUE)
        class Fulfil:
            async def process(self, job: Any) -> None:
                await orders.fulfil(job.args["order_id"])

        self._job: Any = Fulfil

    async def prepare(self) -> None:
        await super().prepare()
        pool = await self._pool()
        await install(pool)
        await pool.close()

    async def work(self) -> None:
        async with Instance(pool=await self._pool(), queues={QUEUE: CONCURRENCY}):
            await asyncio.Event().wait()

    async def open(self) -> None:
        self._oban = await Instance(pool=await self._pool()).start()

    async def request(self, order_id: int) -> str:
        async with self.orders.sessions.begin() as session:
            session.add(pending(order_id))
            await session.flush()
            job = await self._job.enqueue({"order_id": order_id}, conn=session)
        while (state := str((await self._oban.get_job(job.id)).state)) != "completed":
            if state in FINAL:
                raise RuntimeError(state)
            await asyncio.sleep(INTERVAL)
        return await self.orders.status(order_id)

    async def _pool(self) -> Any:
        dsn = self.scene.database_url.replace("+psycopg", "")
        return await Instance.create_pool(dsn, min_size=2, max_size=CONCURRENCY)
