"""coord, by its public names, as its README says; the worker is arq's own."""

from __future__ import annotations

from typing import Any

from arq.worker import create_worker

from benchmarks.roundtrip.contender import PATIENCE, Contender
from benchmarks.roundtrip.orders import CONCURRENCY, Order, fulfil, pending
from coord import (
    Coordinator,
    create_ledger,
    enqueue,
    job_transaction,
    lock_tables,
    wait_for_row_change,
    worker_settings,
)


class Coord(Contender):
    async def prepare(self) -> None:
        await super().prepare()
        async with self.orders.engine.begin() as connection:
            await create_ledger(connection)

    async def fulfil_order(self, ctx: dict[str, Any], order_id: int) -> None:
        async with job_transaction(ctx) as session, lock_tables(session, [Order], mode=self.scene.mode):
            fulfil(await session.get_one(Order, order_id))

    async def work(self) -> None:
        settings = worker_settings(
            [self.fulfil_order],
            session_maker=self.orders.sessions,
            redis=self.scene.redis_url,
            max_jobs=CONCURRENCY,
            handle_signals=False,
        )
        await create_worker(settings).async_run()

    async def open(self) -> None:
        self._coordinator = await Coordinator(
            self.orders.sessions, redis=self.scene.redis_url, read_settings={}
        ).__aenter__()

    async def request(self, order_id: int) -> str:
        async with self.orders.sessions() as session:
            session.add(order := pending(order_id))
            job = await enqueue(session, self.fulfil_order, order_id)
            await session.commit()
            await wait_for_row_change(
                session=session, model=Order, pk_value=order.id, columns=[Order.status], timeout=PATIENCE, job=job
            )
            return order.status
