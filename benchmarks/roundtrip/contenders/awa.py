"""Awa: its job is inserted in the order's transaction. It has no call that waits for a job, so its state is polled."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from awa import AsyncClient, JobState
from awa.bridge import insert_job

from benchmarks.roundtrip.contender import Contender
from benchmarks.roundtrip.orders import CONCURRENCY, pending

INTERVAL = 0.01
QUEUE = "default"
FINAL = JobState.Failed, JobState.Cancelled


@dataclass
class Fulfil:
    order_id: int


class Default(Contender):
    options: dict[str, Any] = {}  # noqa: RUF012 - of the client's start

    async def prepare(self) -> None:
        await super().prepare()
        await self.open()
        await self._client.migrate()
        await self._client.close()

    async def work(self) -> None:
        async def fulfil(job: Any) -> None:
            await self.orders.fulfil(job.args.order_id)

        await self.open()
        self._client.task(Fulfil, queue=QUEUE)(fulfil)
        await self._client.start([(QUEUE, CONCURRENCY)], **self.options)
        await asyncio.Event().wait()

    async def open(self) -> None:
        self._client = AsyncClient(self.scene.dsn, max_connections=CONCURRENCY)

    async def request(self, order_id: int) -> str:
        async with self.orders.sessions.begin() as session:
            session.add(pending(order_id))
            await session.flush()
            job = await insert_job(session, Fulfil(order_id), queue=QUEUE)
        while (state := (await self._client.get_job(job["id"])).state) != JobState.Completed:
            if state in FINAL:
                raise RuntimeError(str(state))
            await asyncio.sleep(INTERVAL)
        return await self.orders.status(order_id)


class Tuned(Default):
    options = {"poll_interval_ms": 10}  # noqa: RUF012 - as above
