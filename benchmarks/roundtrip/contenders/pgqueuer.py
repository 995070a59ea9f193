"""PgQueuer on asyncpg's pool, with one `CompletionWatcher` for all waits: LISTEN, and a poll for what that misses."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import asyncpg
from pgqueuer import PgQueuer
from pgqueuer.adapters.drivers.asyncpg import AsyncpgPoolDriver
from pgqueuer.adapters.persistence.queries import Queries
from pgqueuer.core.completion import CompletionWatcher

from benchmarks.roundtrip.contender import Contender
from benchmarks.roundtrip.orders import CONCURRENCY

JOB = "fulfil"


class Default(Contender):
    batch_size = 10
    debounce = timedelta(milliseconds=50)

    async def prepare(self) -> None:
        await super().prepare()
        pool = await self._pool()
        await Queries(AsyncpgPoolDriver(pool)).install()
        await pool.close()

    async def work(self) -> None:
        async def fulfil(job: Any) -> None:
            await self.orders.fulfil(int(job.payload))

        queuer = PgQueuer.from_asyncpg_pool(await self._pool())
        queuer.entrypoint(JOB)(fulfil)
        await queuer.run(batch_size=self.batch_size, max_concurrent_tasks=CONCURRENCY)

    async def open(self) -> None:
        driver = AsyncpgPoolDriver(await self._pool())
        self._queries = Queries(driver)
        self._watcher = CompletionWatcher(driver, queries=self._queries, debounce=self.debounce)
        await self._watcher.__aenter__()

    async def have_fulfilled(self, order_id: int) -> None:
        [job_id] = await self._queries.enqueue(JOB, str(order_id).encode())
        status = await self._watcher.wait_for(job_id)
        if status != "successful":
            raise RuntimeError(status)

    async def _pool(self) -> Any:
        return await asyncpg.create_pool(self.scene.dsn, min_size=2, max_size=CONCURRENCY)


class Tuned(Default):
    batch_size = 1
    debounce = timedelta(milliseconds=1)
