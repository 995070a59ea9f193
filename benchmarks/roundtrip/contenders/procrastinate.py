"""procrastinate on psycopg. It has no call that waits for a job, so the job's status is polled."""

from __future__ import annotations

import asyncio

from procrastinate import App, PsycopgConnector

from benchmarks.roundtrip.contender import Contender
from benchmarks.roundtrip.orders import CONCURRENCY

INTERVAL = 0.01
FINAL = "failed", "aborted", "cancelled"


class Procrastinate(Contender):
    async def prepare(self) -> None:
        await super().prepare()
        await self.open()
        await self._app.schema_manager.apply_schema_async()
        await self._app.close_async()

    async def work(self) -> None:
        await self.open()
        await self._app.run_worker_async(concurrency=CONCURRENCY)

    async def open(self) -> None:
        connector = PsycopgConnector(conninfo=self.scene.dsn, min_size=CONCURRENCY, max_size=CONCURRENCY)
        self._app = App(connector=connector)
        self._task = self._app.task(name="fulfil")(self._fulfil)
        await self._app.open_async()

    async def _fulfil(self, order_id: int) -> None:
        await self.orders.fulfil(order_id)

    async def have_fulfilled(self, order_id: int) -> None:
        job_id = await self._task.defer_async(order_id=order_id)
        while (status := await self._app.job_manager.get_job_status_async(job_id)).value != "succeeded":
            if status.value in FINAL:
                raise RuntimeError(status.value)
            await asyncio.sleep(INTERVAL)
